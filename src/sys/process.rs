//! Making a child, signalling it, and waiting for it.

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use super::child::{Child, MOVED, Parent, Report, STARTED, STEPS, pid_variable};
use super::poll::wait_readable;
use super::{check, empty_set, retry};

/// How long a child of another user may take to execute its program, or to become a worker without one,
/// before it is killed. With the time for reaping it, `fork` takes at most a second.
///
/// The processes of its user may stop it meanwhile, and the master does nothing else. Less time might not
/// do on a busy machine that reads the program from a disk; more would hold up the master for longer.
const START_TIMEOUT: Duration = Duration::from_millis(900);

/// How often a child that has been killed is waited for, and how long between the attempts: 100 ms in
/// all. A process ends within a millisecond or so, unless it waits in the kernel for a device, or there is
/// no processor for it.
const REAP_ATTEMPTS: u32 = 100;
const REAP_INTERVAL: Duration = Duration::from_millis(1);

/// Everything `execve` needs, made before `fork`: between the two nothing may be allocated. For a child
/// that executes nothing, no path, arguments and environment.
#[derive(Debug, Default)]
pub(crate) struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    cwd: Option<CString>,
    /// What becomes descriptor 0, 1 and so on; `None` for what stays as it is.
    stdio: Vec<Option<OwnedFd>>,
    /// Variables whose value is the child's number.
    tell_pid: Vec<&'static str>,
    detached: bool,
    setsid: bool,
    uid: Option<libc::uid_t>,
    gid: Option<libc::gid_t>,
}

/// What was attempted in vain, and the system's reason.
pub(crate) type Failure = (&'static str, io::Error);

/// A child that has been made, and the parent's part until it has started.
struct Made {
    pid: Pid,
    process: Option<OwnedFd>,
    parent: Parent,
}

/// The state of a child's reports.
enum Reported {
    Nothing,
    /// The child has executed its program, or has ended.
    End,
    Started,
    /// What follows comes from here.
    Moved(UnixStream),
    Failed(Failure),
}

/// Children that have been killed and had not ended after 100 ms. They are reaped before another one is
/// made.
#[derive(Debug, Default)]
pub(crate) struct Unreaped(RefCell<Vec<(Pid, Option<OwnedFd>)>>);

impl Unreaped {
    pub(crate) fn reap(&self) {
        let is_left = |(pid, process): &(Pid, Option<OwnedFd>)| {
            matches!(pid.try_wait(process.as_ref()), Ok(None))
        };
        self.0.borrow_mut().retain(is_left);
    }

    /// In a child that goes on with the memory of its parent: returns the descriptors, which are the
    /// parent's, and forgets the rest.
    pub(crate) fn abandon(&self) -> Vec<RawFd> {
        let children = self.0.take().into_iter();
        let processes = children.filter_map(|(_, process)| process);
        processes.map(IntoRawFd::into_raw_fd).collect()
    }
}

/// The identity of a child until it has been waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pid(libc::pid_t);

fn c_string(text: OsString) -> io::Result<CString> {
    CString::new(text.into_vec()).map_err(io::Error::from)
}

impl Program {
    /// `args` begins with the program's name.
    ///
    /// # Errors
    ///
    /// One of the strings has a zero byte in it.
    pub(crate) fn new(
        path: OsString,
        args: impl IntoIterator<Item = OsString>,
        env: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> io::Result<Self> {
        let pair = |(mut name, value): (OsString, OsString)| {
            name.push("=");
            name.push(value);
            c_string(name)
        };
        Ok(Self {
            path: c_string(path)?,
            args: args.into_iter().map(c_string).collect::<io::Result<_>>()?,
            env: env.into_iter().map(pair).collect::<io::Result<_>>()?,
            cwd: None,
            stdio: Vec::new(),
            tell_pid: Vec::new(),
            detached: false,
            setsid: false,
            uid: None,
            gid: None,
        })
    }

    pub(crate) fn cwd(&mut self, directory: OsString) -> io::Result<()> {
        self.cwd = Some(c_string(directory)?);
        Ok(())
    }

    /// What becomes descriptor 0, 1 and so on; their present numbers are beyond these.
    pub(crate) fn stdio(&mut self, stdio: Vec<Option<OwnedFd>>) {
        self.stdio = stdio;
    }

    /// The child finds its own number in this variable of its environment.
    pub(crate) fn tell_pid(&mut self, variable: &'static str) {
        self.tell_pid.push(variable);
    }

    /// The child outlives this process, and has no channel.
    pub(crate) fn detach(&mut self) {
        self.detached = true;
    }

    /// The child leads a session and a process group of its own, without a terminal.
    pub(crate) fn setsid(&mut self) {
        self.setsid = true;
    }

    pub(crate) fn identity(&mut self, uid: Option<u32>, gid: Option<u32>) {
        (self.uid, self.gid) = (uid, gid);
    }

    /// Starts the program in a child that inherits nothing but `stdio`, or what is 0, 1 and 2 here,
    /// and the descriptor `channel`, whose number is beyond those; with default signal dispositions
    /// and an empty mask. On Linux the child dies with the thread that called this.
    ///
    /// Returns also a descriptor that becomes readable when the child ends, where the system has
    /// such.
    ///
    /// # Errors
    ///
    /// The process cannot be made, or the program cannot be executed; or the child is of another user and
    /// has not executed it within [`START_TIMEOUT`]. A child that cannot be reaped at once goes to
    /// `unreaped`.
    pub(crate) fn spawn(
        &self,
        channel: RawFd,
        unreaped: &Unreaped,
    ) -> Result<(Pid, Option<OwnedFd>), Failure> {
        self.start(channel, unreaped, |child, _| fork(child))
    }

    /// Makes a child that executes nothing, and runs what `begin` returns there, with a copy of all
    /// memory. It has its descriptors, signals, directory and user as after `spawn`; but of the rest of
    /// what is open it loses only what `abandon` says. The child never comes back from here.
    ///
    /// # Errors
    ///
    /// The process cannot be made, or it has failed at a step, of which `begin` is the last; or it is of
    /// another user and has not come so far within [`START_TIMEOUT`]. A child that cannot be reaped at
    /// once goes to `unreaped`.
    pub(crate) fn fork<M: FnOnce() -> i32>(
        &self,
        channel: RawFd,
        unreaped: &Unreaped,
        abandon: impl FnOnce() -> io::Result<Vec<RawFd>>,
        begin: impl FnOnce() -> io::Result<M>,
    ) -> Result<(Pid, Option<OwnedFd>), Failure> {
        self.start(channel, unreaped, |child, parents_end| {
            // By the C library's way: it makes what it has locked itself usable for the child.
            // SAFETY: the child goes on with a copy of this thread. What other threads may have
            // locked meanwhile is the program's care, which is told so.
            match check(unsafe { libc::fork() })? {
                0 => child.run(parents_end.as_raw_fd(), abandon, begin),
                number => {
                    let pid = Pid(number);
                    let process = pid.open();
                    // It waits for this: if the host ignores SIGCHLD, the number of one that has ended
                    // says nothing.
                    let _ = super::socket::send(parents_end, &[0], &[]);
                    Ok(Made {
                        pid,
                        process,
                        parent: Parent::Polling,
                    })
                }
            }
        })
    }

    /// Makes a child by `make`, and waits until it has started or failed to.
    fn start(
        &self,
        channel: RawFd,
        unreaped: &Unreaped,
        make: impl FnOnce(&Child<'_>, &UnixStream) -> io::Result<Made>,
    ) -> Result<(Pid, Option<OwnedFd>), Failure> {
        let forking = |error| ("make a process", error);
        let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
            let pointers = strings.iter().map(|string| string.as_ptr());
            pointers.chain([std::ptr::null()]).collect()
        };
        let (args, mut env) = (pointers(&self.args), pointers(&self.env));
        let own_pid: Vec<_> = self.tell_pid.iter().copied().map(pid_variable).collect();
        let own_pid: Vec<_> = own_pid.into_iter().map(Cell::new).collect();
        env.splice(
            0..0,
            own_pid.iter().map(|text| text.as_ptr().cast_const().cast()),
        );
        // Closed by a successful `execve`; otherwise the child writes its errno. The child's end
        // must not be where its other descriptors go.
        let (failure, low) = UnixStream::pair().map_err(forking)?;
        let beyond = RawFd::try_from(self.stdio.len()).unwrap_or(RawFd::MAX);
        let child_failure = super::fd::duplicate(low.as_raw_fd(), beyond).map_err(forking)?;
        drop(low);
        let child = Child {
            path: self.path.as_ptr(),
            args: args.as_ptr(),
            env: env.as_ptr(),
            own_pid: &own_pid,
            cwd: self.cwd.as_deref().map_or(std::ptr::null(), CStr::as_ptr),
            stdio: &self.stdio,
            uid: self.uid,
            gid: self.gid,
            channel,
            detached: self.detached,
            setsid: self.setsid,
            failure: Cell::new(child_failure.as_raw_fd()),
            parent: std::process::id(),
        };

        // A handler of ours or of the host that ran in the child would act on the master's
        // descriptors: no signal is delivered until the child has default dispositions.
        let mask = block_signals().map_err(forking)?;
        let made = make(&child, &failure);
        restore_signals(&mask);
        // Else the stream would not end.
        drop(child_failure);
        let Made {
            pid,
            process,
            parent,
        } = made.map_err(forking)?;

        let started = match parent {
            Parent::Suspended => match read_report(&failure) {
                Ok(Reported::Failed(failure)) => Err(failure),
                Ok(_) | Err(_) => Ok(()),
            },
            Parent::Polling => {
                let limit = child.changes_identity().then_some(START_TIMEOUT);
                wait_for_start(failure, process.as_ref(), limit)
            }
        };
        if let Err(failure) = started {
            pid.discard(process, unreaped);
            return Err(failure);
        }
        Ok((pid, process))
    }
}

/// Waits until a child has started, has failed to, or has ended, but no longer than `limit`.
fn wait_for_start(
    mut reports: UnixStream,
    process: Option<&OwnedFd>,
    limit: Option<Duration>,
) -> Result<(), Failure> {
    let waiting = |error| ("wait until it starts", error);
    let begun = Instant::now();
    loop {
        let left = limit.map(|limit| limit.saturating_sub(begun.elapsed()));
        let has_ended = match process {
            // The stream of one that ends may not end: a child that another thread of the host forked
            // may have a copy.
            Some(process) => wait_readable([reports.as_fd(), process.as_fd()], left)
                .map(|[_, has_ended]| has_ended),
            None => wait_readable([reports.as_fd()], left).map(|_| false),
        };
        let has_ended = has_ended.map_err(waiting)?;
        match read_report(&reports).map_err(waiting)? {
            Reported::End | Reported::Started => return Ok(()),
            Reported::Failed(failure) => return Err(failure),
            Reported::Moved(stream) => reports = stream,
            // How it ended is told by its exit.
            Reported::Nothing if has_ended => return Ok(()),
            Reported::Nothing if left == Some(Duration::ZERO) => {
                let reason = format!("it had not started after {START_TIMEOUT:?}, and was killed");
                return Err(waiting(io::Error::new(io::ErrorKind::TimedOut, reason)));
            }
            Reported::Nothing => {}
        }
    }
}

/// Reads one report if there is one. Each arrives in one piece, because one call has written it.
fn read_report(reports: &UnixStream) -> io::Result<Reported> {
    let mut report = Report::default();
    let mut piece = match super::socket::receive(reports.as_fd(), &mut report) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Reported::Nothing),
        received => received?,
    };
    if piece.bytes < report.len() {
        return Ok(Reported::End);
    }
    let [step, errno @ ..] = report;
    match step {
        STARTED => Ok(Reported::Started),
        MOVED => match piece.fds.pop() {
            Some(stream) => Ok(Reported::Moved(stream.claim().into())),
            None => Err(io::Error::from_raw_os_error(libc::EMFILE)),
        },
        step => {
            let step = STEPS.get(usize::from(step)).unwrap_or(&STEPS[0]);
            let error = io::Error::from_raw_os_error(i32::from_ne_bytes(errno));
            Ok(Reported::Failed((step, error)))
        }
    }
}

/// Makes the child, which does not return from here.
fn fork(child: &Child<'_>) -> io::Result<Made> {
    #[cfg(target_os = "linux")]
    match clone(child) {
        // A sandbox that does not know it, or not these flags.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOSYS | libc::EINVAL | libc::EPERM)
            ) => {}
        cloned => return cloned,
    }
    // SAFETY: the child makes only async-signal-safe calls until `execve`.
    match check(unsafe { libc::fork() })? {
        0 => child.exec(Parent::Polling),
        number => {
            let pid = Pid(number);
            Ok(Made {
                pid,
                process: pid.open(),
                parent: Parent::Polling,
            })
        }
    }
}

/// What the child needs of a stack, and as much again.
#[cfg(target_os = "linux")]
const STACK: usize = 64 << 10;

/// Makes the child together with the descriptor of its process, which is there from the beginning: if the
/// host ignores SIGCHLD, the number of a child that ends at once may be another process's soon.
///
/// A child that stays the same user is waited for within the call until it has executed its program, or
/// failed to: then its report is there. Meanwhile it uses the memory of its parent, of which no copy is
/// made then, however much there is. The kernel ends this wait for nothing but the child and a signal that
/// kills the parent.
///
/// A child that is to be another user is not waited for here, as the processes of that user may stop it;
/// and its memory is its own, as whoever may trace it could reach its parent.
#[cfg(target_os = "linux")]
fn clone(child: &Child<'_>) -> io::Result<Made> {
    extern "C" fn exec(child: *mut libc::c_void) -> libc::c_int {
        // SAFETY: the parent's frame has it, and waits, or this is a copy of that.
        let child = unsafe { &*child.cast::<Child<'_>>() };
        child.exec(parent_of(child))
    }
    fn parent_of(child: &Child<'_>) -> Parent {
        if child.changes_identity() {
            Parent::Polling
        } else {
            Parent::Suspended
        }
    }
    let parent = parent_of(child);
    let flags = match parent {
        Parent::Suspended if clone_can_share_memory() => libc::CLONE_VFORK | libc::CLONE_VM,
        Parent::Suspended => libc::CLONE_VFORK,
        Parent::Polling => 0,
    };
    let flags = flags | libc::CLONE_PIDFD | libc::SIGCHLD;
    // Of numbers, because its end has to be aligned.
    let mut stack = Vec::<u128>::with_capacity(STACK / size_of::<u128>());
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end;
    let argument = std::ptr::from_ref(child).cast_mut().cast();
    let mut process: RawFd = -1;
    // SAFETY: a child that shares this memory finds stack and argument there until it has executed its
    // program or ended: this thread does not go on before. It writes to its stack, and has its own table
    // of signal handlers; the C library may note that some signals are handled. It makes only
    // async-signal-safe calls, and such that need nothing of what the C library does at a `fork`. Any
    // other child has a copy of all this. The kernel writes the descriptor to where it is told.
    let number = unsafe { libc::clone(exec, top.cast(), flags, argument, &raw mut process) };
    let pid = Pid(check(number)?);
    // Before Linux 5.2 the flag is ignored.
    let process = (process >= 0).then(|| super::fd::adopt(process));
    Ok(Made {
        pid,
        process: process.or_else(|| pid.open()),
        parent,
    })
}

/// Whether the C library's `clone` leaves the memory alone that a child shares with its parent.
///
/// Before version 2.25 glibc kept the numbers of process and thread in the thread's memory, and `clone`
/// put -1 there in a child with CLONE_VM (bug 19957; some architectures until 2.24): `raise`, `abort` and
/// `pthread_kill` fail in the parent from then on.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn clone_can_share_memory() -> bool {
    // SAFETY: always callable.
    let version = unsafe { libc::gnu_get_libc_version() };
    // SAFETY: it is a zero-terminated string that nothing changes.
    let version = unsafe { CStr::from_ptr(version) };
    keeps_no_thread_numbers(version.to_str().unwrap_or_default())
}

#[cfg(all(target_os = "linux", not(target_env = "gnu")))]
fn clone_can_share_memory() -> bool {
    true
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keeps_no_thread_numbers(glibc: &str) -> bool {
    let mut numbers = glibc.split('.').map_while(|number| number.parse().ok());
    (numbers.next(), numbers.next()) >= (Some(2u32), Some(25u32))
}

fn block_signals() -> io::Result<libc::sigset_t> {
    let mut all = empty_set();
    // SAFETY: the set is writable.
    unsafe { libc::sigfillset(&raw mut all) };
    let mut previous = empty_set();
    // SAFETY: both sets are initialised.
    let errno =
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut previous) };
    match errno {
        0 => Ok(previous),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

fn restore_signals(mask: &libc::sigset_t) {
    // SAFETY: the set is initialised; with it the call cannot fail.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, std::ptr::null_mut()) };
}

/// What a process has used in its life.
///
/// Node: what `process.resourceUsage()` calls the same, of a process that has ended. It counts what
/// has been used in the process, with those of its own children that it has waited for. See
/// [`Process::usage`](crate::Process::usage) for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// The CPU time that its own code took. Microseconds are counted; how exactly depends on the
    /// system.
    pub user_cpu_time: Duration,
    /// The CPU time that the system took on its behalf.
    pub system_cpu_time: Duration,
    /// The most memory that it had resident, in bytes. On Linux no less than its master had when it
    /// forked it: a worker begins with all the memory of its master.
    pub max_rss: u64,
}

/// How a process ended, and what it has used if this process was the one to wait for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    pub(crate) status: ExitStatus,
    pub(crate) usage: Option<Usage>,
}

impl End {
    /// Stands for an end that nobody can learn about: code 255.
    pub(crate) fn unknown() -> Self {
        Self {
            status: ExitStatus::from_raw(255 << 8),
            usage: None,
        }
    }
}

/// A time of so many seconds and microseconds, as the system counts them.
fn duration(seconds: impl TryInto<u64>, micros: impl TryInto<u64>) -> Duration {
    let seconds = Duration::from_secs(seconds.try_into().unwrap_or(0));
    seconds + Duration::from_micros(micros.try_into().unwrap_or(0))
}

/// What the system counts memory in.
const RSS_UNIT: u64 = if cfg!(target_vendor = "apple") {
    1
} else {
    1024
};

fn max_rss(units: libc::c_long) -> u64 {
    u64::try_from(units).unwrap_or(0).saturating_mul(RSS_UNIT)
}

impl Pid {
    pub(crate) fn own() -> Self {
        // SAFETY: always callable.
        Self(unsafe { libc::getpid() })
    }

    pub(crate) fn number(self) -> u32 {
        self.0.unsigned_abs()
    }

    /// Reaps the child if it has ended.
    ///
    /// # Errors
    ///
    /// Somebody else has waited for it, and the kernel does not say what it heard.
    pub(crate) fn try_wait(self, process: Option<&impl AsFd>) -> io::Result<Option<End>> {
        let options = libc::WNOHANG;
        let by_fd = process.and_then(|process| wait_by_fd(process.as_fd(), options));
        let waited = by_fd.unwrap_or_else(|| self.wait_by_number(options));
        // If that fails, the host waits for whatever child ends, or lets the kernel do it.
        waited.or_else(|error| {
            let status = process.and_then(|process| status_by_fd(process.as_fd()));
            let end = status.map(|status| End {
                status,
                usage: None,
            });
            end.map(Some).ok_or(error)
        })
    }

    /// Kills and reaps a child that is not to be a worker, unless it has ended. One that is not gone
    /// after 100 ms goes to `unreaped`.
    pub(crate) fn discard(self, process: Option<OwnedFd>, unreaped: &Unreaped) {
        // The number of one that has ended may be another process's, if the host ignores SIGCHLD.
        if !matches!(self.try_wait(process.as_ref()), Ok(None)) {
            return;
        }
        let _ = self.signal(process.as_ref().map(AsFd::as_fd), libc::SIGKILL);
        for _ in 0..REAP_ATTEMPTS {
            if !matches!(self.try_wait(process.as_ref()), Ok(None)) {
                return;
            }
            std::thread::sleep(REAP_INTERVAL);
        }
        unreaped.0.borrow_mut().push((self, process));
    }

    fn wait_by_number(self, options: libc::c_int) -> io::Result<Option<End>> {
        let mut status = 0;
        // SAFETY: all zeroes is a valid rusage, of nothing.
        let mut used: libc::rusage = unsafe { std::mem::zeroed() };
        let pid = retry(|| {
            // SAFETY: status and usage are writable. Only this one child is waited for.
            check(unsafe { libc::wait4(self.0, &raw mut status, options, &raw mut used) })
        })?;
        let usage = Usage {
            user_cpu_time: duration(used.ru_utime.tv_sec, used.ru_utime.tv_usec),
            system_cpu_time: duration(used.ru_stime.tv_sec, used.ru_stime.tv_usec),
            max_rss: max_rss(used.ru_maxrss),
        };
        Ok((pid != 0).then(|| End {
            status: ExitStatus::from_raw(status),
            usage: Some(usage),
        }))
    }

    /// Sends a signal: by the descriptor of the process, if there is one. The caller has not reaped
    /// the child; but where somebody else has, its number may be a stranger's by now.
    pub(crate) fn signal(
        self,
        process: Option<BorrowedFd<'_>>,
        signal: libc::c_int,
    ) -> io::Result<()> {
        if let Some(sent) = process.and_then(|process| signal_by_fd(process, signal)) {
            return sent;
        }
        // SAFETY: kill changes no memory.
        check(unsafe { libc::kill(self.0, signal) })?;
        Ok(())
    }

    /// A descriptor that becomes readable when the child ends; `None` where the kernel has none.
    #[cfg(target_os = "linux")]
    fn open(self) -> Option<OwnedFd> {
        // SAFETY: the call takes two integers. The new descriptor is closed on exec.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.0, 0) };
        let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        Some(super::fd::adopt(fd))
    }

    #[cfg(not(target_os = "linux"))]
    fn open(self) -> Option<OwnedFd> {
        None
    }
}

/// What the system itself fills in: on 32 bits the C library may have a longer one.
#[cfg(target_os = "linux")]
#[repr(C)]
#[derive(Default)]
struct KernelUsage {
    user: [libc::c_long; 2],
    system: [libc::c_long; 2],
    max_rss: libc::c_long,
    others: [libc::c_long; 13],
}

/// Waits by the descriptor: the number may be that of another child by now, if the host has waited for
/// ours. `None` where the kernel cannot. The C library's call has no room for what was used.
#[cfg(target_os = "linux")]
fn wait_by_fd(process: BorrowedFd<'_>, options: libc::c_int) -> Option<io::Result<Option<End>>> {
    // SAFETY: all zeroes is a valid siginfo, of nothing.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let mut used = KernelUsage::default();
    let (kind, number) = (libc::P_PIDFD, process.as_raw_fd());
    let options = libc::WEXITED | options;
    let waited = retry(|| {
        let (info, used) = (&raw mut info, &raw mut used);
        // SAFETY: both structures are writable.
        let waited = unsafe { libc::syscall(libc::SYS_waitid, kind, number, info, options, used) };
        check(libc::c_int::try_from(waited).unwrap_or(-1))
    });
    match waited {
        Ok(_) => {
            // SAFETY: the call has filled it in for a child, or left it at zero.
            let pid = unsafe { info.si_pid() };
            // SAFETY: as above.
            let status = unsafe { info.si_status() };
            let status = match info.si_code {
                libc::CLD_EXITED => status << 8,
                libc::CLD_DUMPED => status | 0x80,
                _ => status,
            };
            let usage = Usage {
                user_cpu_time: duration(used.user[0], used.user[1]),
                system_cpu_time: duration(used.system[0], used.system[1]),
                max_rss: max_rss(used.max_rss),
            };
            Some(Ok((pid != 0).then(|| End {
                status: ExitStatus::from_raw(status),
                usage: Some(usage),
            })))
        }
        Err(error) => {
            let unknown = [libc::EINVAL, libc::ENOSYS].map(Some);
            (!unknown.contains(&error.raw_os_error())).then_some(Err(error))
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn wait_by_fd(_process: BorrowedFd<'_>, _options: libc::c_int) -> Option<io::Result<Option<End>>> {
    None
}

/// How a process ended for which somebody else has waited: Linux 6.15 and newer know it.
#[cfg(target_os = "linux")]
fn status_by_fd(process: BorrowedFd<'_>) -> Option<ExitStatus> {
    /// What the call fills in, in its first version.
    #[repr(C)]
    #[derive(Default)]
    struct Information {
        mask: u64,
        control_group: u64,
        ids: [u32; 11],
        exit_code: i32,
    }
    /// `_IOWR(0xff, 11, Information)`, as on most architectures; on others it is no valid number.
    const GET_INFORMATION: u32 = 0xc040_ff0b;
    const EXIT: u64 = 1 << 3;
    let mut information = Information {
        mask: EXIT,
        ..Information::default()
    };
    // SAFETY: the structure is writable, and its size is part of the number.
    let got = unsafe {
        libc::ioctl(
            process.as_raw_fd(),
            GET_INFORMATION as _,
            &raw mut information,
        )
    };
    let is_known = got == 0 && information.mask & EXIT != 0;
    is_known.then(|| ExitStatus::from_raw(information.exit_code))
}

#[cfg(not(target_os = "linux"))]
fn status_by_fd(_process: BorrowedFd<'_>) -> Option<ExitStatus> {
    None
}

/// `None` where the kernel cannot, or a sandbox does not let us.
#[cfg(target_os = "linux")]
fn signal_by_fd(process: BorrowedFd<'_>, signal: libc::c_int) -> Option<io::Result<()>> {
    let nothing = std::ptr::null::<libc::siginfo_t>();
    let number = process.as_raw_fd();
    // SAFETY: without information about the signal, the call takes integers.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, number, signal, nothing, 0) };
    if sent == 0 {
        return Some(Ok(()));
    }
    let error = io::Error::last_os_error();
    let refused = [libc::ENOSYS, libc::EPERM]
        .map(Some)
        .contains(&error.raw_os_error());
    (!refused).then_some(Err(error))
}

#[cfg(not(target_os = "linux"))]
fn signal_by_fd(_process: BorrowedFd<'_>, _signal: libc::c_int) -> Option<io::Result<()>> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::child;

    const NO_PROCESS: Option<&OwnedFd> = None;

    #[test]
    fn start_is_reported_by_the_end_of_the_stream() {
        let (reports, child) = UnixStream::pair().unwrap();
        drop(child);
        wait_for_start(reports, NO_PROCESS, None).unwrap();
    }

    #[test]
    fn start_is_given_up_at_the_limit() {
        let (reports, _child) = UnixStream::pair().unwrap();
        let limit = Some(Duration::from_millis(2));
        let (attempt, error) = wait_for_start(reports, NO_PROCESS, limit).unwrap_err();
        assert_eq!(attempt, "wait until it starts");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn reports_are_followed_to_the_stream_that_the_child_sends() {
        let (reports, first) = UnixStream::pair().unwrap();
        let (parents, own) = UnixStream::pair().unwrap();
        let moved = child::report(MOVED, 0);
        super::super::socket::send_one(&first, &moved, parents.as_fd()).unwrap();
        drop(parents);
        super::super::socket::send(&own, &child::report(3, libc::ENOENT), &[]).unwrap();
        let (attempt, error) = wait_for_start(reports, NO_PROCESS, None).unwrap_err();
        assert_eq!(attempt, "enter its directory");
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        // The first one is still open, as it is if another process has a copy.
        drop(first);
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn memory_is_not_shared_where_glibc_keeps_thread_numbers() {
        for old in ["2.17", "2.19", "2.23", "2.24", "2", "", "unknown"] {
            assert!(!keeps_no_thread_numbers(old), "{old:?}");
        }
        for new in ["2.25", "2.36", "2.40.9000", "3.0"] {
            assert!(keeps_no_thread_numbers(new), "{new:?}");
        }
    }
}
