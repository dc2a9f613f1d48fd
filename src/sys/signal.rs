//! Signals, turned into a readable descriptor.
//!
//! The handler marks the signal and writes one byte. Whoever reads drains the pipe first and looks
//! at the marks then: a signal that comes between the two is seen twice, never lost. A handler that
//! was there before still runs, after ours, and is put back when the last interest is dropped.

use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::check;
use super::owner::AtomicOwner;

pub(crate) use libc::{
    SIGALRM as ALRM, SIGCHLD as CHLD, SIGCONT as CONT, SIGHUP as HUP, SIGINT as INT,
    SIGKILL as KILL, SIGQUIT as QUIT, SIGSTOP as STOP, SIGTERM as TERM, SIGTTIN as TTIN,
    SIGTTOU as TTOU, SIGUSR1 as USR1, SIGUSR2 as USR2, SIGWINCH as WINCH,
};

/// Signals are numbered from 1 to 64 at most.
const SIGNALS: usize = 65;

/// The pipe is never closed: a handler may be using it on another thread at any time.
static PIPE: OnceLock<Pipe> = OnceLock::new();
static PENDING: AtomicU64 = AtomicU64::new(0);
/// The handlers that ours replaced, as `sa_sigaction`, for those that are functions.
static PREVIOUS: [AtomicUsize; SIGNALS] = [const { AtomicUsize::new(0) }; SIGNALS];

#[derive(Debug)]
struct Pipe {
    reader: UnixStream,
    writer: UnixStream,
    /// A child that the application has forked inherits the handlers, and must not wake its parent.
    owner: AtomicOwner,
}

fn bit(signal: libc::c_int) -> u64 {
    u32::try_from(signal - 1).map_or(0, |shift| 1u64.checked_shl(shift).unwrap_or(0))
}

/// Only async-signal-safe calls, and errno as it was.
extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the location of errno is valid for the thread that runs this.
    let errno = unsafe { *errno_location() };
    PENDING.fetch_or(bit(signal), Ordering::SeqCst);
    if let Some(Pipe { writer, .. }) = PIPE.get().filter(|pipe| pipe.owner.is_current()) {
        let byte = [0u8];
        // SAFETY: one byte is read from a live buffer. A full pipe is fine: it wakes the reader.
        unsafe {
            libc::send(
                writer.as_raw_fd(),
                byte.as_ptr().cast(),
                1,
                super::socket::SEND_FLAGS,
            )
        };
    }
    let previous = usize::try_from(signal).ok().and_then(|at| PREVIOUS.get(at));
    let previous = previous.map_or(0, |previous| previous.load(Ordering::SeqCst));
    if previous != 0 {
        // SAFETY: `install` stored the address of a handler that the system would have called. A
        // handler that takes only the number ignores the other two arguments.
        let previous = unsafe {
            std::mem::transmute::<
                usize,
                extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void),
            >(previous)
        };
        previous(signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *errno_location() = errno };
}

#[cfg(any(target_os = "linux", target_os = "emscripten", target_os = "l4re"))]
fn errno_location() -> *mut libc::c_int {
    // SAFETY: always callable.
    unsafe { libc::__errno_location() }
}

#[cfg(any(target_vendor = "apple", target_os = "freebsd"))]
fn errno_location() -> *mut libc::c_int {
    // SAFETY: always callable.
    unsafe { libc::__error() }
}

/// The readable end, for the poller.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SignalPipe(&'static Pipe);

impl SignalPipe {
    pub(crate) fn new() -> io::Result<Self> {
        if PIPE.get().is_none() {
            let (reader, writer) = UnixStream::pair()?;
            reader.set_nonblocking(true)?;
            writer.set_nonblocking(true)?;
            let owner = AtomicOwner::current();
            // Another thread may have been faster, which is as good.
            let _ = PIPE.set(Pipe {
                reader,
                writer,
                owner,
            });
        }
        match PIPE.get() {
            Some(pipe) => Ok(Self(pipe)),
            None => Err(io::ErrorKind::Other.into()),
        }
    }

    /// Returns the numbers of the signals that came since the last call.
    pub(crate) fn take(self) -> Vec<libc::c_int> {
        if !self.0.owner.is_current() {
            return Vec::new();
        }
        let mut sink = [0; 64];
        let mut reader = &self.0.reader;
        while matches!(reader.read(&mut sink), Ok(n) if n == sink.len()) {}
        let pending = PENDING.swap(0, Ordering::SeqCst);
        (1..=64)
            .filter(|&signal| pending & bit(signal) != 0)
            .collect()
    }
}

impl AsFd for SignalPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.reader.as_fd()
    }
}

/// In a child that goes on with the memory of its parent, where no handler is in place: gives it a pipe
/// of its own. The one it was born with wakes its parent.
pub(super) fn renew() -> io::Result<()> {
    PENDING.store(0, Ordering::SeqCst);
    let Some(pipe) = PIPE.get() else {
        return Ok(());
    };
    let (new_reader, new_writer) = UnixStream::pair()?;
    for (new, old) in [(new_reader, &pipe.reader), (new_writer, &pipe.writer)] {
        new.set_nonblocking(true)?;
        super::fd::replace(old.as_raw_fd(), new.as_fd())?;
    }
    pipe.owner.claim();
    Ok(())
}

/// Keeps our handler in place, and puts the previous one back.
#[derive(Debug)]
pub(crate) struct Installed {
    signal: libc::c_int,
    previous: Action,
}

/// What the kernel does on a signal.
struct Action(libc::sigaction);

impl std::fmt::Debug for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Action").field(&self.0.sa_sigaction).finish()
    }
}

fn empty_action() -> libc::sigaction {
    // SAFETY: all zeroes is a valid sigaction: the default disposition, no flags, an empty mask.
    unsafe { std::mem::zeroed() }
}

/// The address of our handler, as the system stores it.
fn ours() -> libc::sighandler_t {
    handler as extern "C" fn(_, _, _) as libc::sighandler_t
}

/// Asks the system to write to the pipe when `signal` comes.
///
/// # Errors
///
/// There is no such signal, or it cannot be handled.
pub(crate) fn install(signal: libc::c_int) -> io::Result<Installed> {
    let mut previous = empty_action();
    // SAFETY: without a new action the call only reads the old one.
    check(unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut previous) })?;
    let is_function =
        previous.sa_sigaction != libc::SIG_DFL && previous.sa_sigaction != libc::SIG_IGN;
    let at = usize::try_from(signal).ok();
    let chained = at.and_then(|at| PREVIOUS.get(at));
    // Installed once more over ours, it must not forget what came before.
    if let Some(chained) = chained.filter(|_| previous.sa_sigaction != ours()) {
        let address = if is_function {
            previous.sa_sigaction
        } else {
            0
        };
        chained.store(address, Ordering::SeqCst);
    }
    let mut action = empty_action();
    action.sa_sigaction = ours();
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // What the host has said about its children goes on to hold.
    action.sa_flags |= previous.sa_flags & (libc::SA_NOCLDWAIT | libc::SA_NOCLDSTOP);
    if signal == libc::SIGCHLD && previous.sa_sigaction == libc::SIG_IGN {
        action.sa_flags |= libc::SA_NOCLDWAIT;
    }
    if is_function {
        // It runs inside ours, and as it is used to.
        action.sa_mask = previous.sa_mask;
        action.sa_flags |= previous.sa_flags & (libc::SA_RESTART | libc::SA_NODEFER);
    } else {
        action.sa_flags |= libc::SA_RESTART;
    }
    // SAFETY: the handler makes only async-signal-safe calls.
    check(unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) })?;
    let previous = Action(previous);
    Ok(Installed { signal, previous })
}

impl Drop for Installed {
    fn drop(&mut self) {
        // Whoever put a handler over ours keeps it.
        if is_handled(self.signal) {
            // SAFETY: this is the action that was in force before ours.
            unsafe {
                libc::sigaction(
                    self.signal,
                    &raw const self.previous.0,
                    std::ptr::null_mut(),
                )
            };
        }
    }
}

/// Whether our handler is in place.
pub(crate) fn is_handled(signal: libc::c_int) -> bool {
    let mut current = empty_action();
    // SAFETY: without a new action the call only reads the old one.
    let read = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut current) };
    read == 0 && current.sa_sigaction == ours()
}

#[cfg(test)]
pub(crate) fn raise(signal: libc::c_int) {
    // SAFETY: raise takes an integer.
    unsafe { libc::raise(signal) };
}
