//! The steps of a child between `fork` and `execve`.
//!
//! Other threads of the parent may have held locks at the `fork`, and the child would wait for
//! these locks forever. So a child that executes a program makes only async-signal-safe calls. The
//! child allocates nothing, locks nothing and does not panic. A child that executes no program is
//! exempt, because its later code does all of this anyway.

use std::cell::Cell;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd, FromRawFd as _, IntoRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::report::{Report, Step};
use crate::sys::fd::LISTEN_FDS_START;
use crate::sys::platform::{MAX_SIGNAL, child as platform};
use crate::sys::signal_mask::SignalSet;
use crate::sys::{check, fd, parent_death_signal, retry, signal, socket};

/// How the parent waits until the child has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::sys) enum ParentWait {
    /// The kernel suspends the parent (`CLONE_VFORK`). The parent reads the report afterwards.
    #[allow(dead_code, reason = "only Linux does this")]
    Suspended,
    /// The parent polls for the report. The end of the stream means that the child has executed its
    /// program, or has exited.
    Polling,
}

/// The exit code of a child whose closure panics. A Rust program that panics has the same exit
/// code.
const PANICKED: i32 = 101;

/// The user whose processes receive all capabilities when they execute a program.
const ROOT: libc::uid_t = 0;

/// Space for an environment variable, which consists of a name of up to 18 bytes, an equals sign, a
/// process id of up to 10 digits, and a terminating zero.
pub(super) type PidVariable = [u8; 30];

/// Returns the beginning of a variable to which the child appends its process id.
pub(super) fn pid_variable(name: &str) -> PidVariable {
    let mut text = PidVariable::default();
    let _ = write!(&mut text[..], "{name}=");
    text
}

/// Whether a child leads a process group or a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Leads {
    #[default]
    Nothing,
    /// The child leads its own process group.
    Group,
    /// The child leads its own session and process group, without a terminal.
    Session,
}

/// The settings of a child, as plain values that the child can use without allocating.
pub(in crate::sys) struct Child<'a> {
    pub(super) path: *const libc::c_char,
    pub(super) args: *const *const libc::c_char,
    pub(super) env: *const *const libc::c_char,
    /// The strings in `env` to which the child appends its process id, because the parent cannot
    /// know it.
    pub(super) pid_variables: &'a [Cell<PidVariable>],
    /// The child's directory, or null if the child keeps its parent's directory.
    pub(super) cwd: *const libc::c_char,
    pub(super) stdio: &'a [Option<OwnedFd>],
    pub(super) uid: Option<libc::uid_t>,
    pub(super) gid: Option<libc::gid_t>,
    pub(super) channel: RawFd,
    /// Whether the child may outlive its parent. A detached child is not killed with its parent,
    /// and its channel is closed on exec.
    pub(super) is_detached: bool,
    pub(super) leads: Leads,
    /// The signals that the child ignores.
    pub(super) ignored: SignalSet,
    /// The descriptor to which the child writes reports.
    pub(super) reports: Cell<RawFd>,
    pub(super) parent: u32,
}

/// The step that failed, and the system's error.
type StepFailure = (Step, io::Error);

impl Child<'_> {
    /// Returns whether the child changes its user or group. If so, processes of another user may
    /// signal the child before it has executed its program.
    pub(in crate::sys) fn changes_identity(&self) -> bool {
        self.uid.is_some() || self.gid.is_some()
    }

    /// Executes the program. If a step fails, reports it and exits.
    pub(in crate::sys) fn exec(&self, wait: ParentWait) -> ! {
        let (Ok((step, error)) | Err((step, error))) = self.try_exec(wait);
        self.fail(step, &error)
    }

    /// Runs the closure that `begin` returns, and exits with its code. If a step fails, reports the
    /// failure and exits.
    ///
    /// Never returns, because the callers' frames, and the values in them, belong to the master.
    pub(super) fn run<M: FnOnce() -> i32>(
        &self,
        parents_end: RawFd,
        abandon: impl FnOnce() -> io::Result<Vec<RawFd>>,
        begin: impl FnOnce() -> io::Result<M>,
    ) -> ! {
        let run = || match self.try_begin(parents_end, abandon, begin) {
            Ok(main) => {
                self.report(Report::Started);
                self.wait_for_parent();
                // SAFETY: SIG_DFL is always valid.
                unsafe { set_stop_handlers(libc::SIG_DFL, &self.ignored) };
                main()
            }
            Err((step, error)) => self.fail(step, &error),
        };
        let code = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| {
            // Forget the payload, because dropping it could panic again.
            std::mem::forget(payload);
            PANICKED
        });
        std::process::exit(code)
    }

    fn try_begin<M>(
        &self,
        parents_end: RawFd,
        abandon: impl FnOnce() -> io::Result<Vec<RawFd>>,
        begin: impl FnOnce() -> io::Result<M>,
    ) -> Result<M, StepFailure> {
        let descriptors = || {
            // Close the parent's end before calling `abandon`, because `abandon` may need one free
            // descriptor.
            close_all([parents_end]);
            close_all(abandon()?);
            // Arrange the new descriptors only now, because the descriptors that were just closed
            // may have used the numbers that the new ones receive.
            self.arrange_stdio()?;
            close_all(self.stdio.iter().flatten().map(AsRawFd::as_raw_fd));
            signal::replace_pipe()
        };
        // Check SIGPIPE before the reset, because this child must continue to ignore SIGPIPE if its
        // parent does. The runtime of a Rust program ignores SIGPIPE by default.
        let ignores_pipe = signal::is_ignored(libc::SIGPIPE);
        self.prepare(set_disposition_by_libc, descriptors)?;
        if ignores_pipe {
            // SAFETY: SIG_IGN is always a valid disposition.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
        }
        begin().map_err(|error| (Step::BecomeWorker, error))
    }

    /// Waits until the parent has opened this child's process descriptor. The parent then sends one
    /// byte. Closes the report stream afterwards.
    fn wait_for_parent(&self) {
        let mut byte = 0u8;
        let _ = retry(|| {
            // SAFETY: the pointer is valid for writes of one byte.
            let read = unsafe { libc::read(self.reports.get(), (&raw mut byte).cast(), 1) };
            check(libc::c_int::try_from(read).unwrap_or(0))
        });
        close_all([self.reports.get()]);
    }

    /// Replaces the report stream with a new one. No other process has the child's end of the new
    /// stream, so the new stream ends when the program is executed.
    ///
    /// The first stream may stay open after the program is executed. If another thread of the
    /// parent forked while the parent had the child's end, that thread's child has a copy. If no
    /// descriptor is free for a new stream, the first stream stays in use.
    ///
    /// Must not be called in a child that shares its parent's memory.
    fn move_reports(&self) {
        let Ok((own, parents)) = UnixStream::pair() else {
            return;
        };
        // SAFETY: this child owns the descriptor. It replaces the number below, or takes the number
        // back out of the stream.
        let first = UnixStream::from(unsafe { OwnedFd::from_raw_fd(self.reports.get()) });
        match socket::send_one(&first, &Report::Moved.encode(), parents.as_fd()) {
            Ok(_) => self.reports.set(own.into_raw_fd()),
            // Keep the first stream open for the later reports.
            Err(_) => drop(first.into_raw_fd()),
        }
    }

    fn report(&self, report: Report) {
        let bytes = report.encode();
        // SAFETY: the pointer is valid for reads of the buffer's length.
        unsafe { libc::write(self.reports.get(), bytes.as_ptr().cast(), bytes.len()) };
    }

    fn fail(&self, step: Step, error: &io::Error) -> ! {
        let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
        self.report(Report::Failed(step, errno));
        // Exit with 127, like a shell that cannot execute a command. The parent ignores the code,
        // because it has the report.
        // SAFETY: `_exit` runs neither destructors nor exit handlers of the parent.
        unsafe { libc::_exit(127) }
    }

    /// Takes all steps up to `execve`. Returns only if a step failed: `Ok` if `execve` failed, and
    /// `Err` for any other step.
    fn try_exec(&self, wait: ParentWait) -> Result<StepFailure, StepFailure> {
        let descriptors = || {
            self.arrange_descriptors()?;
            if wait == ParentWait::Polling {
                self.move_reports();
            }
            Ok(())
        };
        self.prepare(platform::set_disposition, descriptors)?;
        self.pid_variables.iter().for_each(append_own_pid);
        // SAFETY: the parent built path, arguments and environment as zero-terminated strings in
        // arrays that end with a null pointer. All of them are alive in this process.
        unsafe { libc::execve(self.path, self.args, self.env) };
        Ok((Step::Execute, io::Error::last_os_error()))
    }

    /// Takes the steps that children with and without a program have in common.
    fn prepare(
        &self,
        set_disposition: fn(libc::c_int, Disposition),
        arrange_descriptors: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), StepFailure> {
        let at = |step| move |error| (step, error);
        reset_signals(set_disposition, &self.ignored).map_err(at(Step::Signals))?;
        let led = match self.leads {
            Leads::Nothing => Ok(0),
            // SAFETY: setpgid accesses no memory of this process.
            Leads::Group => check(unsafe { libc::setpgid(0, 0) }),
            // SAFETY: setsid has no preconditions.
            Leads::Session => check(unsafe { libc::setsid() }),
        };
        led.map_err(at(Step::Session))?;
        arrange_descriptors().map_err(at(Step::Descriptors))?;
        if !self.cwd.is_null() {
            // SAFETY: the path is zero-terminated and alive in this process.
            check(unsafe { libc::chdir(self.cwd) }).map_err(at(Step::Directory))?;
        }
        // Change the groups before the user, because a process that is no longer root cannot change
        // its groups.
        if self.changes_identity() {
            self.drop_groups().map_err(at(Step::Groups))?;
        }
        if let Some(gid) = self.gid {
            check_id(gid).map_err(at(Step::Groups))?;
            platform::set_group(gid).map_err(at(Step::Groups))?;
        }
        if let Some(uid) = self.uid {
            check_id(uid).map_err(at(Step::User))?;
            platform::set_user(uid).map_err(at(Step::User))?;
            if uid != ROOT {
                platform::drop_capabilities().map_err(at(Step::Capabilities))?;
            }
        }
        // A detached child does not request the parent-death signal. Any other child requests the
        // signal after all other steps, because the kernel drops the request when the user changes.
        if self.is_detached {
            return Ok(());
        }
        parent_death_signal::request(self.parent).map_err(at(Step::Signals))
    }

    /// Drops the supplementary groups. If the system does not permit this, succeeds nevertheless if
    /// the child may keep them.
    fn drop_groups(&self) -> io::Result<()> {
        match platform::drop_groups() {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) && self.may_keep_groups() => {
                Ok(())
            }
            dropped => dropped,
        }
    }

    /// Returns whether the child may continue although it cannot drop its supplementary groups:
    /// either its parent already has the requested identity, or there is no group to drop. In any
    /// other case, the child would keep its parent's groups under another identity.
    ///
    /// A process cannot drop groups without CAP_SETGID, or in a user namespace that forbids it
    /// (`/proc/PID/setgroups` in user_namespaces(7)).
    fn may_keep_groups(&self) -> bool {
        platform::has_ids(self.uid, self.gid) || has_only_group(self.gid)
    }

    fn arrange_stdio(&self) -> io::Result<()> {
        for (number, source) in self.stdio.iter().enumerate() {
            if let (Some(source), Ok(number)) = (source, RawFd::try_from(number)) {
                // The copy stays open through `execve`, because `dup2` does not set close-on-exec.
                // SAFETY: dup2 changes no memory. No source is overwritten, because the sources'
                // numbers are higher.
                check(unsafe { libc::dup2(source.as_raw_fd(), number) })?;
            }
        }
        Ok(())
    }

    fn arrange_descriptors(&self) -> io::Result<()> {
        self.arrange_stdio()?;
        if !self.is_detached {
            // Clear close-on-exec here and not in the parent, where another thread may fork at this
            // moment.
            // SAFETY: F_SETFD changes no memory.
            check(unsafe { libc::fcntl(self.channel, libc::F_SETFD, 0) })?;
            // Let `channel::is_owned` distinguish the worker from the processes that inherit its channel
            // and its environment.
            // SAFETY: getpid has no preconditions.
            let own = unsafe { libc::getpid() };
            // SAFETY: F_SETOWN changes no memory.
            check(unsafe { libc::fcntl(self.channel, libc::F_SETOWN, own) })?;
        }
        self.close_others();
        Ok(())
    }

    /// Closes all descriptors except 0 to 2, those that `stdio` sets, the channel and the report
    /// stream. The application may have left other descriptors open for programs that it executes
    /// itself.
    fn close_others(&self) {
        let standard = self.stdio.len().max(LISTEN_FDS_START);
        let standard = RawFd::try_from(standard).unwrap_or(RawFd::MAX);
        let low = self.channel.min(self.reports.get());
        let high = self.channel.max(self.reports.get());
        for (first, last) in [
            (standard, low - 1),
            (low + 1, high - 1),
            (high + 1, RawFd::MAX),
        ] {
            if first > last {
                continue;
            }
            // SAFETY: this child uses only its standard descriptors and the two that are left out.
            let is_closed = unsafe { platform::close_range(first, last) };
            if !is_closed {
                close_one_by_one(first, last);
            }
        }
    }
}

/// Closes descriptors by number. Dropping the values that own them would also change objects that
/// the parent shares.
fn close_all(numbers: impl IntoIterator<Item = RawFd>) {
    for number in numbers {
        // SAFETY: this child no longer uses the descriptor.
        unsafe { libc::close(number) };
    }
}

/// Returns whether this process has no supplementary group except `gid`. If `gid` is `None`, the
/// process's effective group takes its place.
fn has_only_group(gid: Option<libc::gid_t>) -> bool {
    // SAFETY: getegid has no preconditions.
    let own = gid.unwrap_or_else(|| unsafe { libc::getegid() });
    let mut group = own;
    // SAFETY: the pointer is valid for writes of one group. With more than one group, the call
    // fails.
    let count = unsafe { libc::getgroups(1, &raw mut group) };
    matches!(count, 0 | 1) && group == own
}

/// Appends this child's process id. If the child shares the parent's memory, the write is harmless,
/// because the parent made the variable for this child and does not read it again.
fn append_own_pid(variable: &Cell<PidVariable>) {
    let mut text = variable.get();
    if let Some(end) = text.iter().position(|byte| *byte == 0) {
        // SAFETY: getpid has no preconditions.
        let own = unsafe { libc::getpid() };
        // Write into an array, because a child must not allocate.
        let _ = write!(&mut text[end..], "{own}");
    }
    variable.set(text);
}

/// Ignores the signals in `ignored`, resets all others to their default, and unblocks all signals.
/// Signals that only the application ignores would otherwise stay ignored through `execve`. The
/// system rejects the change of some signals, such as SIGKILL. These errors are ignored. The
/// signals by which a terminal stops a process receive a handler that does nothing (see
/// [`set_stop_handlers`]).
fn reset_signals(
    set_disposition: fn(libc::c_int, Disposition),
    ignored: &SignalSet,
) -> io::Result<()> {
    for signal in 1..=libc::c_int::from(MAX_SIGNAL) {
        let disposition = match ignored.contains(signal) {
            true => Disposition::Ignore,
            false => Disposition::Default,
        };
        set_disposition(signal, disposition);
    }
    extern "C" fn do_nothing(_: libc::c_int) {}
    let do_nothing = do_nothing as extern "C" fn(_) as libc::sighandler_t;
    // SAFETY: the handler does nothing, so it may run at any time.
    unsafe { set_stop_handlers(do_nothing, ignored) };
    let mask = SignalSet::empty();
    // SAFETY: the set is initialized, and the old mask is not requested.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, mask.as_ptr(), std::ptr::null_mut()) })?;
    Ok(())
}

/// Sets the handler of the signals by which a terminal stops a process, unless they are ignored.
///
/// Ctrl-Z reaches both the child and its parent. If the child stopped before `execve`, a parent
/// that the kernel has suspended until then could neither stop nor continue. The shell would wait
/// for the parent.
///
/// A handler that does nothing prevents this without a gap, because `execve` resumes the parent
/// before it resets the handlers. A child has its own table of handlers, even if it shares memory.
///
/// # Safety
///
/// The handler must be SIG_DFL, or a function that may run at any time.
unsafe fn set_stop_handlers(handler: libc::sighandler_t, ignored: &SignalSet) {
    let signals = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
    for signal in signals
        .into_iter()
        .filter(|signal| !ignored.contains(*signal))
    {
        // Use the C library, because it takes no lock for these signals. Some C libraries take one
        // for SIGABRT.
        // SAFETY: the caller guarantees that the handler is valid.
        unsafe { libc::signal(signal, handler) };
    }
}

/// The effect of a signal on a process that has no handler for it.
#[derive(Clone, Copy, Debug)]
pub(in crate::sys) enum Disposition {
    Default,
    Ignore,
}

impl Disposition {
    pub(in crate::sys) fn value(self) -> libc::sighandler_t {
        match self {
            Self::Default => libc::SIG_DFL,
            Self::Ignore => libc::SIG_IGN,
        }
    }
}

/// Sets a signal's disposition through the C library. The library rejects the signals that it uses
/// itself, because it would not notice the loss of its own handlers.
pub(in crate::sys) fn set_disposition_by_libc(signal: libc::c_int, disposition: Disposition) {
    // SAFETY: SIG_DFL and SIG_IGN are always valid.
    unsafe { libc::signal(signal, disposition.value()) };
}

/// Closes the descriptors from `first` to `last` on systems without close_range(2). Stops at this
/// process's descriptor limit, clamped to the two constants.
fn close_one_by_one(first: RawFd, last: RawFd) {
    /// The lowest limit that is used. The process's limit may have been lowered after higher
    /// descriptors were opened, so numbers above a low limit may still be in use.
    const MIN_LIMIT: u64 = 4096;
    /// The highest limit that is used. The process's limit can be in the millions, and each number
    /// costs a system call. Descriptors beyond this number stay open.
    const MAX_LIMIT: u64 = 65_536;
    let limit = fd::limit().clamp(MIN_LIMIT, MAX_LIMIT);
    let last = last.min(RawFd::try_from(limit).unwrap_or(RawFd::MAX));
    for number in first..=last {
        // SAFETY: this child no longer uses the descriptor.
        unsafe { libc::close(number) };
    }
}

/// Returns an error for the id that means "unchanged" to the system (setresuid(2)). A worker would
/// otherwise keep the master's user.
fn check_id(id: u32) -> io::Result<()> {
    match id {
        u32::MAX => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(()),
    }
}
