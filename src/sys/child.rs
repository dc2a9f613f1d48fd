//! What the child does between `fork` and `execve`. Other threads' locks may be held for ever here:
//! nothing allocates, locks or panics, unless the child executes nothing and will do so anyway.

use std::cell::Cell;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd, IntoRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{check, empty_set, retry};
use identity::{give_up_capabilities, give_up_groups, set_group, set_user};

/// What the child does between `fork` and `execve`, or what it does instead, by the number that it
/// reports.
pub(super) const STEPS: [&str; 9] = [
    "execute it",
    "prepare its signals",
    "prepare its descriptors",
    "enter its directory",
    "change its groups",
    "change its user",
    "give up its capabilities",
    "make it a worker",
    "begin its session",
];
const EXECUTE: u8 = 0;
const SIGNALS_STEP: u8 = 1;
const DESCRIPTORS: u8 = 2;
const DIRECTORY: u8 = 3;
const GROUPS: u8 = 4;
const USER: u8 = 5;
const CAPABILITIES: u8 = 6;
const BEGIN: u8 = 7;
const SESSION: u8 = 8;
/// Reported by a child that executes nothing when nothing can fail any more.
pub(super) const STARTED: u8 = u8::MAX;
/// Reported with a descriptor: the stream that carries all further reports.
pub(super) const MOVED: u8 = u8::MAX - 1;

/// A step or one of the two above, and an error number.
pub(super) type Report = [u8; 5];

/// How the parent waits until the child has executed its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parent {
    /// The kernel suspends it (`CLONE_VFORK`), and it reads the report afterwards.
    Suspended,
    /// It polls for the report. The end of the stream means that the program has been executed.
    Polling,
}

/// The exit code of a Rust program that has panicked.
const PANICKED: i32 = 101;

/// A variable of the environment with room for a name of 18 bytes, the highest number of a process, and a
/// zero.
pub(super) type PidVariable = [u8; 30];

/// A variable whose value the child writes.
pub(super) fn pid_variable(name: &str) -> PidVariable {
    let mut text = PidVariable::default();
    let _ = write!(&mut text[..], "{name}=");
    text
}

/// What the child needs to know, as plain values.
pub(super) struct Child<'a> {
    pub(super) path: *const libc::c_char,
    pub(super) args: *const *const libc::c_char,
    pub(super) env: *const *const libc::c_char,
    /// Strings of `env` that end with the child's number, which the child alone knows.
    pub(super) own_pid: &'a [Cell<PidVariable>],
    /// Null if it stays where it is.
    pub(super) cwd: *const libc::c_char,
    pub(super) stdio: &'a [Option<OwnedFd>],
    pub(super) uid: Option<libc::uid_t>,
    pub(super) gid: Option<libc::gid_t>,
    pub(super) channel: RawFd,
    /// It does not die with its parent, and the channel is closed when the program is executed.
    pub(super) detached: bool,
    /// It leads a session and a process group of its own, without a terminal.
    pub(super) setsid: bool,
    pub(super) failure: Cell<RawFd>,
    pub(super) parent: u32,
}

impl Child<'_> {
    /// Whether the processes of another user may signal this child before it has executed its program.
    pub(super) fn changes_identity(&self) -> bool {
        self.uid.is_some() || self.gid.is_some()
    }

    /// Executes the program, or reports why not.
    pub(super) fn exec(&self, parent: Parent) -> ! {
        let (step, error) = self.try_exec(parent).unwrap_or_else(|failure| failure);
        self.fail(step, &error)
    }

    /// Runs what `begin` returns, or reports why not. The frames of the caller are the master's, and
    /// so is what they own: nobody comes back to them.
    pub(super) fn run<M: FnOnce() -> i32>(
        &self,
        parents_end: RawFd,
        abandon: impl FnOnce() -> io::Result<Vec<RawFd>>,
        begin: impl FnOnce() -> io::Result<M>,
    ) -> ! {
        let run = || match self.try_begin(parents_end, abandon, begin) {
            Ok(main) => {
                self.report(STARTED, 0);
                self.wait_for_parent();
                handle_stops(libc::SIG_DFL);
                main()
            }
            Err((step, error)) => self.fail(step, &error),
        };
        let code = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| {
            // To drop it might be to panic once more.
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
    ) -> Result<M, (u8, io::Error)> {
        let descriptors = || {
            // First, because `abandon` may need room for one more.
            close_all([parents_end]);
            close_all(abandon()?);
            // Now there is nobody where these go.
            self.arrange_stdio()?;
            close_all(self.stdio.iter().flatten().map(AsRawFd::as_raw_fd));
            super::signal::renew()
        };
        // Every Rust program begins with this one ignored.
        let ignores_pipe = is_ignored(libc::SIGPIPE);
        self.prepare(default_signal_of_library, descriptors)?;
        if ignores_pipe {
            // SAFETY: SIG_IGN is always a valid disposition.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
        }
        begin().map_err(|error| (BEGIN, error))
    }

    /// Until the parent has a descriptor of this process.
    fn wait_for_parent(&self) {
        let mut byte = 0u8;
        let _ = retry(|| {
            // SAFETY: one byte is written, to where there is room for it.
            let read = unsafe { libc::read(self.failure.get(), (&raw mut byte).cast(), 1) };
            check(libc::c_int::try_from(read).unwrap_or(0))
        });
        close_all([self.failure.get()]);
    }

    /// Replaces the stream of the reports: of the new one no other process has this end, and so it ends
    /// when the program is executed. The first one may not: a child that another thread of the host
    /// forked while the parent had this end, too, has a copy for as long as it likes. Where the system has
    /// no room for another stream, the first one has to do.
    ///
    /// Not for a child that shares its parent's memory.
    fn move_reports(&self) {
        let Ok((own, parents)) = UnixStream::pair() else {
            return;
        };
        let first = UnixStream::from(super::fd::adopt(self.failure.get()));
        match super::socket::send_one(&first, &report(MOVED, 0), parents.as_fd()) {
            Ok(_) => self.failure.set(own.into_raw_fd()),
            // It stays open.
            Err(_) => drop(first.into_raw_fd()),
        }
    }

    fn report(&self, step: u8, errno: i32) {
        let report = report(step, errno);
        // SAFETY: the buffer lives through the call.
        unsafe { libc::write(self.failure.get(), report.as_ptr().cast(), report.len()) };
    }

    fn fail(&self, step: u8, error: &io::Error) -> ! {
        self.report(step, error.raw_os_error().unwrap_or(libc::EINVAL));
        // SAFETY: `_exit` runs no destructors and no handlers of the parent.
        unsafe { libc::_exit(127) }
    }

    /// Returns the step that failed, and why: the last one if all others went well.
    fn try_exec(&self, parent: Parent) -> Result<(u8, io::Error), (u8, io::Error)> {
        let descriptors = || {
            self.arrange_descriptors()?;
            if parent == Parent::Polling {
                self.move_reports();
            }
            Ok(())
        };
        self.prepare(default_signal, descriptors)?;
        self.own_pid.iter().for_each(write_own_pid);
        // SAFETY: path, arguments and environment were built by the parent as zero-terminated
        // strings in arrays that end with a null pointer, and this process has a copy of them.
        unsafe { libc::execve(self.path, self.args, self.env) };
        Ok((EXECUTE, io::Error::last_os_error()))
    }

    /// What every child does first. Returns the step that failed, and why.
    fn prepare(
        &self,
        default_signal: fn(libc::c_int),
        arrange_descriptors: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), (u8, io::Error)> {
        let at = |step| move |error| (step, error);
        default_signals(default_signal).map_err(at(SIGNALS_STEP))?;
        if self.setsid {
            // SAFETY: setsid changes no memory.
            check(unsafe { libc::setsid() }).map_err(at(SESSION))?;
        }
        arrange_descriptors().map_err(at(DESCRIPTORS))?;
        if !self.cwd.is_null() {
            // SAFETY: the path is zero-terminated.
            check(unsafe { libc::chdir(self.cwd) }).map_err(at(DIRECTORY))?;
        }
        // The groups first: who has given up being root cannot change them any more.
        if self.changes_identity() {
            give_up_groups().map_err(at(GROUPS))?;
        }
        if let Some(gid) = self.gid {
            set_group(gid).map_err(at(GROUPS))?;
        }
        if let Some(uid) = self.uid {
            set_user(uid).map_err(at(USER))?;
            if uid != ROOT {
                give_up_capabilities().map_err(at(CAPABILITIES))?;
            }
        }
        // Last: the kernel forgets this request when the user changes.
        if self.detached {
            return Ok(());
        }
        die_with_parent(self.parent).map_err(at(SIGNALS_STEP))
    }

    fn arrange_stdio(&self) -> io::Result<()> {
        for (number, source) in self.stdio.iter().enumerate() {
            if let (Some(source), Ok(number)) = (source, RawFd::try_from(number)) {
                // The copy stays open through `execve`.
                // SAFETY: dup2 changes no memory. No source is overwritten: they are all beyond.
                check(unsafe { libc::dup2(source.as_raw_fd(), number) })?;
            }
        }
        Ok(())
    }

    fn arrange_descriptors(&self) -> io::Result<()> {
        self.arrange_stdio()?;
        if !self.detached {
            // Cleared here and not in the parent, where another thread may fork at this moment.
            // SAFETY: F_SETFD changes no memory.
            check(unsafe { libc::fcntl(self.channel, libc::F_SETFD, 0) })?;
        }
        self.close_others();
        Ok(())
    }

    /// What the host has left open for programs that it executes is not for workers.
    fn close_others(&self) {
        let standard = RawFd::try_from(self.stdio.len()).unwrap_or(RawFd::MAX);
        let low = self.channel.min(self.failure.get());
        let high = self.channel.max(self.failure.get());
        for (first, last) in [
            (standard.max(3), low - 1),
            (low + 1, high - 1),
            (high + 1, RawFd::MAX),
        ] {
            if first <= last && !close_range(first, last) {
                close_one_by_one(first, last);
            }
        }
    }
}

/// The user whose processes have all capabilities when they execute a program.
const ROOT: libc::uid_t = 0;

pub(super) fn report(step: u8, errno: i32) -> Report {
    let [a, b, c, d] = errno.to_ne_bytes();
    [step, a, b, c, d]
}

/// Closes them by number: what would happen when their owners are dropped would happen to the parent.
fn close_all(numbers: impl IntoIterator<Item = RawFd>) {
    for number in numbers {
        // SAFETY: nothing in this child uses it any more.
        unsafe { libc::close(number) };
    }
}

fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: all zeroes is a valid sigaction.
    let mut current: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action the call only reads the old one.
    let read = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut current) };
    read == 0 && current.sa_sigaction == libc::SIG_IGN
}

/// The text is that of this child, be it in memory that the parent has, too: the parent has made it for
/// this child, and does not look at it again.
fn write_own_pid(text: &Cell<PidVariable>) {
    let mut complete = text.get();
    if let Some(end) = complete.iter().position(|byte| *byte == 0) {
        // SAFETY: always callable.
        let own = unsafe { libc::getpid() };
        // Into an array: this allocates nothing.
        let _ = write!(&mut complete[end..], "{own}");
    }
    text.set(complete);
}

/// Ignored signals would stay ignored through `execve`. Some numbers are refused.
fn default_signals(default_signal: fn(libc::c_int)) -> io::Result<()> {
    for signal in 1..=SIGNALS {
        default_signal(signal);
    }
    extern "C" fn do_nothing(_: libc::c_int) {}
    handle_stops(do_nothing as extern "C" fn(_) as libc::sighandler_t);
    let mask = empty_set();
    // SAFETY: the set is initialised.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut()) })?;
    Ok(())
}

/// Sets what the signals do that stop a process from its terminal.
///
/// Ctrl-Z reaches the child with its parent. If the child stopped before `execve`, a parent that the
/// kernel has suspended until then could neither stop nor go on, and the shell would wait for it. A
/// handler that does nothing prevents that without a gap: `execve` replaces handlers by the default, and
/// resumes the parent before it does so. Handlers are a child's own, also where the memory is not.
fn handle_stops(handler: libc::sighandler_t) {
    for signal in [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU] {
        // No C library takes a lock for these, as some do for SIGABRT.
        // SAFETY: the handler does nothing, or it is the default.
        unsafe { libc::signal(signal, handler) };
    }
}

/// The system's own call: the C library's may take a lock that another thread held when this child
/// was made.
#[cfg(target_os = "linux")]
fn default_signal(signal: libc::c_int) {
    /// Longer than the structure is anywhere. All zeroes are the default disposition.
    const DEFAULT: [u64; 8] = [0; 8];
    let (new, old) = (DEFAULT.as_ptr(), std::ptr::null_mut::<u64>());
    // SAFETY: the new action lives through the call, and no room for the old one is given.
    unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, old, KERNEL_SET) };
}

/// How long the kernel's set of signals is, in bytes.
#[cfg(all(target_os = "linux", any(target_arch = "mips", target_arch = "mips64")))]
const KERNEL_SET: usize = 16;
#[cfg(all(
    target_os = "linux",
    not(any(target_arch = "mips", target_arch = "mips64"))
))]
const KERNEL_SET: usize = 8;

#[cfg(not(target_os = "linux"))]
use default_signal_of_library as default_signal;

/// Leaves alone those signals that the C library uses itself: it does not know that it has lost a
/// handler of its own.
fn default_signal_of_library(signal: libc::c_int) {
    // SAFETY: SIG_DFL is always a valid disposition.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// The highest signal number there is.
const SIGNALS: libc::c_int = 64;

#[cfg(target_os = "linux")]
fn die_with_parent(parent: u32) -> io::Result<()> {
    let signal = libc::c_ulong::from(libc::SIGKILL.unsigned_abs());
    // SAFETY: PR_SET_PDEATHSIG takes a signal number.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) })?;
    // SAFETY: always callable.
    let now = unsafe { libc::getppid() };
    // The parent may have died before the request: then no signal comes. One that is in another
    // namespace has no number here, and has to be believed.
    if now == 0 || now.unsigned_abs() == parent {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ESRCH))
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_parent(_parent: u32) -> io::Result<()> {
    // End-of-file on the channel has to do.
    Ok(())
}

/// The system's own calls: the C library would change the user of other threads, too, and this
/// process has only its memory of them.
#[cfg(target_os = "linux")]
mod identity {
    use super::*;

    #[cfg(not(any(target_arch = "arm", target_arch = "x86")))]
    use libc::{
        SYS_setgroups as SETGROUPS, SYS_setresgid as SETRESGID, SYS_setresuid as SETRESUID,
    };
    #[cfg(any(target_arch = "arm", target_arch = "x86"))]
    use libc::{
        SYS_setgroups32 as SETGROUPS, SYS_setresgid32 as SETRESGID, SYS_setresuid32 as SETRESUID,
    };

    fn checked(result: libc::c_long) -> io::Result<()> {
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(super) fn give_up_groups() -> io::Result<()> {
        // SAFETY: a list of no groups is not read.
        checked(unsafe { libc::syscall(SETGROUPS, 0, std::ptr::null::<libc::gid_t>()) })
    }

    pub(super) fn set_group(gid: libc::gid_t) -> io::Result<()> {
        // SAFETY: setresgid takes three integers.
        checked(unsafe { libc::syscall(SETRESGID, gid, gid, gid) })
    }

    pub(super) fn set_user(uid: libc::uid_t) -> io::Result<()> {
        // SAFETY: setresuid takes three integers.
        checked(unsafe { libc::syscall(SETRESUID, uid, uid, uid) })
    }

    /// Empties the permitted, effective and inheritable sets, and the ambient set with them. The change
    /// of user does not always: not with SECBIT_NO_SETUID_FIXUP or SECBIT_KEEP_CAPS, not if the
    /// parent was not root, and never the inheritable set (capabilities(7)).
    ///
    /// A kernel without capabilities has one user alone, and gets no further than `set_user`.
    pub(super) fn give_up_capabilities() -> io::Result<()> {
        #[repr(C)]
        struct Header {
            version: u32,
            pid: libc::c_int,
        }
        /// `_LINUX_CAPABILITY_VERSION_3`: 64 bits in a set, since Linux 2.6.26.
        const VERSION: u32 = 0x2008_0522;
        /// Effective, permitted and inheritable: the low halves, and then the high ones.
        const NONE: [u32; 6] = [0; 6];
        let mut header = Header {
            version: VERSION,
            pid: 0,
        };
        // SAFETY: the header is writable, and the sets are as long as this version has them.
        checked(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, NONE.as_ptr()) })
    }
}

#[cfg(not(target_os = "linux"))]
mod identity {
    use super::*;

    pub(super) fn give_up_groups() -> io::Result<()> {
        // SAFETY: a list of no groups is not read.
        check(unsafe { libc::setgroups(0, std::ptr::null()) }).map(drop)
    }

    pub(super) fn set_group(gid: libc::gid_t) -> io::Result<()> {
        // SAFETY: setgid takes an integer.
        check(unsafe { libc::setgid(gid) }).map(drop)
    }

    pub(super) fn set_user(uid: libc::uid_t) -> io::Result<()> {
        // SAFETY: setuid takes an integer.
        check(unsafe { libc::setuid(uid) }).map(drop)
    }

    pub(super) fn give_up_capabilities() -> io::Result<()> {
        Ok(())
    }
}

/// Closes all descriptors from `first` to `last`. Returns whether the system can.
#[cfg(target_os = "linux")]
fn close_range(first: RawFd, last: RawFd) -> bool {
    // SAFETY: nothing in this child uses them any more.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn close_range(_first: RawFd, _last: RawFd) -> bool {
    false
}

/// The same, as far as numbers go in practice: a process may have a limit in the millions, and each
/// number is a call to the system.
fn close_one_by_one(first: RawFd, last: RawFd) {
    // The limit may have been higher when they were opened.
    let limit = super::fd::limit().clamp(LEAST_CLOSED, MOST_CLOSED);
    let last = last.min(RawFd::try_from(limit).unwrap_or(RawFd::MAX));
    for number in first..=last {
        // SAFETY: nothing in this child uses it any more.
        unsafe { libc::close(number) };
    }
}

/// How many descriptors are closed one by one.
const LEAST_CLOSED: u64 = 4096;
const MOST_CLOSED: u64 = 65_536;
