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
        })
    }

    /// Starts the program in a child that inherits the descriptor `channel`, with default signal
    /// dispositions and an empty mask. On Linux the child dies with the thread that called this.
    ///
    /// # Errors
    ///
    /// The process cannot be made, or the program cannot be executed.
    pub(crate) fn spawn(&self, channel: RawFd) -> io::Result<Pid> {
        let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
            let pointers = strings.iter().map(|string| string.as_ptr());
            pointers.chain([std::ptr::null()]).collect()
        };
        let (args, env) = (pointers(&self.args), pointers(&self.env));
        // Closed by a successful `execve`; otherwise the child writes its errno.
        let (mut failure, child_failure) = UnixStream::pair()?;
        let child = Child {
            path: self.path.as_ptr(),
            args: args.as_ptr(),
            env: env.as_ptr(),
            channel,
            failure: child_failure.as_raw_fd(),
            parent: std::process::id(),
        };

        // A handler of ours or of the host that ran in the child would act on the master's
        // descriptors: no signal is delivered until the child has default dispositions.
        let mask = block_signals()?;
        // SAFETY: the child makes only async-signal-safe calls until `execve`.
        let forked = check(unsafe { libc::fork() });
        if let Ok(0) = forked {
            child.exec();
        }
        restore_signals(&mask);
        let pid = Pid(forked?);

        drop(child_failure);
        let mut errno = [0; 4];
        match failure.read_exact(&mut errno) {
            Err(_) => Ok(pid),
            Ok(()) => {
                let _ = pid.wait();
                Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
            }
        }
    }
}

/// What the child needs to know, as plain values.
struct Child {
    path: *const libc::c_char,
    args: *const *const libc::c_char,
    env: *const *const libc::c_char,
    channel: RawFd,
    failure: RawFd,
    parent: u32,
}

impl Child {
    /// Runs in the child, where other threads' locks may be held for ever: nothing here allocates,
    /// locks or panics.
    fn exec(&self) -> ! {
        let error = self.try_exec().unwrap_or_else(|error| error);
        let errno = error.raw_os_error().unwrap_or(libc::EINVAL).to_ne_bytes();
        // SAFETY: the buffer lives through the call.
        unsafe { libc::write(self.failure, errno.as_ptr().cast(), errno.len()) };
        // SAFETY: `_exit` runs no destructors and no handlers of the parent.
        unsafe { libc::_exit(127) }
    }

    fn try_exec(&self) -> io::Result<io::Error> {
        let last = libc::c_int::try_from(SIGNALS).unwrap_or(64);
        for signal in 1..=last {
            // Ignored signals would stay ignored through `execve`. Some numbers are refused.
            // SAFETY: SIG_DFL is always a valid disposition.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        let mask = empty_set();
        // SAFETY: the set is initialised.
        check(unsafe {
            libc::sigprocmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut())
        })?;
        die_with_parent(self.parent)?;
        // The one descriptor that stays open: cleared here and not in the parent, where another
        // thread may fork at this moment.
        // SAFETY: F_SETFD changes no memory.
        check(unsafe { libc::fcntl(self.channel, libc::F_SETFD, 0) })?;
        // SAFETY: path, arguments and environment were built by the parent as zero-terminated
        // strings in arrays that end with a null pointer, and this process has a copy of them.
        unsafe { libc::execve(self.path, self.args, self.env) };
        Ok(io::Error::last_os_error())
    }
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
