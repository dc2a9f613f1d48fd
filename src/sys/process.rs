//! `fork`, `execve`, and waiting for the child.

use std::ffi::{CString, OsString};
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use super::{check, retry};

/// Everything `execve` needs, made before `fork`: between the two nothing may be allocated.
#[derive(Debug)]
pub(crate) struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    cwd: Option<CString>,
    /// What becomes descriptor 0, 1 and so on; `None` for what stays as it is.
    stdio: Vec<Option<OwnedFd>>,
    uid: Option<libc::uid_t>,
    gid: Option<libc::gid_t>,
}

/// What was attempted in vain, and the system's reason.
pub(crate) type Failure = (&'static str, io::Error);

/// What the child does between `fork` and `execve`, by the number that it reports.
const STEPS: [&str; 6] = [
    "execute it",
    "prepare its signals",
    "prepare its descriptors",
    "enter its directory",
    "change its groups",
    "change its user",
];
const EXECUTE: u8 = 0;
const SIGNALS_STEP: u8 = 1;
const DESCRIPTORS: u8 = 2;
const DIRECTORY: u8 = 3;
const GROUPS: u8 = 4;
const USER: u8 = 5;

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

    pub(crate) fn identity(&mut self, uid: Option<u32>, gid: Option<u32>) {
        (self.uid, self.gid) = (uid, gid);
    }

    /// Starts the program in a child that inherits the descriptor `channel`, whose number is beyond
    /// those of `stdio`, with default signal dispositions and an empty mask. On Linux the child
    /// dies with the thread that called this.
    ///
    /// # Errors
    ///
    /// The process cannot be made, or the program cannot be executed.
    pub(crate) fn spawn(&self, channel: RawFd) -> Result<Pid, Failure> {
        let forking = |error| ("make a process", error);
        let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
            let pointers = strings.iter().map(|string| string.as_ptr());
            pointers.chain([std::ptr::null()]).collect()
        };
        let (args, env) = (pointers(&self.args), pointers(&self.env));
        // Closed by a successful `execve`; otherwise the child writes its errno. The child's end
        // must not be where its other descriptors go.
        let (mut failure, low) = UnixStream::pair().map_err(forking)?;
        let beyond = RawFd::try_from(self.stdio.len()).unwrap_or(RawFd::MAX);
        let child_failure = super::fd::duplicate(low.as_raw_fd(), beyond).map_err(forking)?;
        drop(low);
        let child = Child {
            path: self.path.as_ptr(),
            args: args.as_ptr(),
            env: env.as_ptr(),
            program: self,
            channel,
            failure: child_failure.as_raw_fd(),
            parent: std::process::id(),
        };

        // A handler of ours or of the host that ran in the child would act on the master's
        // descriptors: no signal is delivered until the child has default dispositions.
        let mask = block_signals().map_err(forking)?;
        // SAFETY: the child makes only async-signal-safe calls until `execve`.
        let forked = check(unsafe { libc::fork() });
        if let Ok(0) = forked {
            child.exec();
        }
        restore_signals(&mask);
        let pid = Pid(forked.map_err(forking)?);

        drop(child_failure);
        let mut report = [0; 5];
        match failure.read_exact(&mut report) {
            Err(_) => Ok(pid),
            Ok(()) => {
                let _ = pid.wait();
                let [step, errno @ ..] = report;
                let step = STEPS.get(usize::from(step)).unwrap_or(&STEPS[0]);
                let errno = i32::from_ne_bytes(errno);
                Err((step, io::Error::from_raw_os_error(errno)))
            }
        }
    }
}

/// What the child needs to know, as plain values.
struct Child<'a> {
    path: *const libc::c_char,
    args: *const *const libc::c_char,
    env: *const *const libc::c_char,
    program: &'a Program,
    channel: RawFd,
    failure: RawFd,
    parent: u32,
}

impl Child<'_> {
    /// Runs in the child, where other threads' locks may be held for ever: nothing here allocates,
    /// locks or panics.
    fn exec(&self) -> ! {
        let (step, error) = self.try_exec().unwrap_or_else(|failure| failure);
        let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
        let [a, b, c, d] = errno.to_ne_bytes();
        let report = [step, a, b, c, d];
        // SAFETY: the buffer lives through the call.
        unsafe { libc::write(self.failure, report.as_ptr().cast(), report.len()) };
        // SAFETY: `_exit` runs no destructors and no handlers of the parent.
        unsafe { libc::_exit(127) }
    }

    /// Returns the step that failed, and why: the last one if all others went well.
    fn try_exec(&self) -> Result<(u8, io::Error), (u8, io::Error)> {
        let at = |step| move |error| (step, error);
        default_signals().map_err(at(SIGNALS_STEP))?;
        self.arrange_descriptors().map_err(at(DESCRIPTORS))?;
        if let Some(directory) = &self.program.cwd {
            // SAFETY: the path is zero-terminated.
            check(unsafe { libc::chdir(directory.as_ptr()) }).map_err(at(DIRECTORY))?;
        }
        // The groups first: who has given up being root cannot change them any more.
        if self.program.uid.is_some() || self.program.gid.is_some() {
            // SAFETY: a list of no groups is not read.
            check(unsafe { libc::setgroups(0, std::ptr::null()) }).map_err(at(GROUPS))?;
        }
        if let Some(gid) = self.program.gid {
            // SAFETY: setgid takes an integer.
            check(unsafe { libc::setgid(gid) }).map_err(at(GROUPS))?;
        }
        if let Some(uid) = self.program.uid {
            // SAFETY: setuid takes an integer.
            check(unsafe { libc::setuid(uid) }).map_err(at(USER))?;
        }
        // Last: the kernel forgets this request when the user changes.
        die_with_parent(self.parent).map_err(at(SIGNALS_STEP))?;
        // SAFETY: path, arguments and environment were built by the parent as zero-terminated
        // strings in arrays that end with a null pointer, and this process has a copy of them.
        unsafe { libc::execve(self.path, self.args, self.env) };
        Ok((EXECUTE, io::Error::last_os_error()))
    }

    fn arrange_descriptors(&self) -> io::Result<()> {
        for (number, source) in self.program.stdio.iter().enumerate() {
            if let (Some(source), Ok(number)) = (source, RawFd::try_from(number)) {
                // The copy stays open through `execve`.
                // SAFETY: dup2 changes no memory. No source is overwritten: they are all beyond.
                check(unsafe { libc::dup2(source.as_raw_fd(), number) })?;
            }
        }
        // Cleared here and not in the parent, where another thread may fork at this moment.
        // SAFETY: F_SETFD changes no memory.
        check(unsafe { libc::fcntl(self.channel, libc::F_SETFD, 0) })?;
        Ok(())
    }
}

fn default_signals() -> io::Result<()> {
    let last = libc::c_int::try_from(SIGNALS).unwrap_or(64);
    for signal in 1..=last {
        // Ignored signals would stay ignored through `execve`. Some numbers are refused.
        // SAFETY: SIG_DFL is always a valid disposition.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let mask = empty_set();
    // SAFETY: the set is initialised.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut()) })?;
    Ok(())
}

/// The highest signal number there is.
const SIGNALS: usize = 64;

#[cfg(target_os = "linux")]
fn die_with_parent(parent: u32) -> io::Result<()> {
    let signal = libc::c_ulong::from(libc::SIGKILL.unsigned_abs());
    // SAFETY: PR_SET_PDEATHSIG takes a signal number.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) })?;
    // SAFETY: always callable.
    let now = unsafe { libc::getppid() };
    // The parent may have died before the request: then no signal comes.
    if now.unsigned_abs() == parent {
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

fn empty_set() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data.
    let mut set = unsafe { std::mem::zeroed() };
    // SAFETY: the set is writable.
    unsafe { libc::sigemptyset(&raw mut set) };
    set
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

/// Stands for an end that nobody can learn about: code 255.
pub(crate) fn unknown_status() -> ExitStatus {
    ExitStatus::from_raw(255 << 8)
}

impl Pid {
    pub(crate) fn number(self) -> u32 {
        self.0.unsigned_abs()
    }

    /// Reaps the child if it has ended.
    ///
    /// # Errors
    ///
    /// Somebody else has waited for it.
    pub(crate) fn try_wait(self) -> io::Result<Option<ExitStatus>> {
        retry(|| self.wait_with(libc::WNOHANG))
    }

    /// Waits for the child to end.
    ///
    /// # Errors
    ///
    /// Somebody else has waited for it.
    pub(crate) fn wait(self) -> io::Result<Option<ExitStatus>> {
        retry(|| self.wait_with(0))
    }

    fn wait_with(self, options: libc::c_int) -> io::Result<Option<ExitStatus>> {
        let mut status = 0;
        // SAFETY: the status is writable. Only this one child is waited for.
        let pid = check(unsafe { libc::waitpid(self.0, &raw mut status, options) })?;
        Ok((pid != 0).then(|| ExitStatus::from_raw(status)))
    }

    /// Sends a signal. The caller has not reaped the child, so the number is still its own.
    pub(crate) fn signal(self, signal: libc::c_int) -> io::Result<()> {
        // SAFETY: kill changes no memory.
        check(unsafe { libc::kill(self.0, signal) })?;
        Ok(())
    }

    /// A descriptor that becomes readable when the child ends; `None` where the kernel has none.
    #[cfg(target_os = "linux")]
    pub(crate) fn open(self) -> Option<OwnedFd> {
        // SAFETY: the call takes two integers. The new descriptor is closed on exec.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.0, 0) };
        let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        Some(super::fd::adopt(fd))
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn open(self) -> Option<OwnedFd> {
        None
    }
}
