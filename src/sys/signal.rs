//! Makes signals available through a readable descriptor.
//!
//! The handler marks the signal as pending, and then writes a byte to a pipe. The reader drains the
//! pipe before it reads the marks. If a signal arrives between these two steps, the reader may be
//! woken once more without a pending signal, but the signal is never lost. A SIGTTIN or SIGTTOU
//! that the kernel sends is not marked (see [`suspend`]).
//!
//! The previously installed handler still runs, after ours. Dropping the `InstalledHandler`s of the
//! signal restores the previous handler.
//!
//! A handled signal is unblocked on the thread that installs the handler, because the process that
//! started this one may have blocked it.

use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::check;
use super::errno;
use super::owner::AtomicOwner;
use super::platform::{MAX_SIGNAL, SI_KERNEL};
use super::signal_mask::SignalSet;

pub(crate) use libc::SIGCHLD as CHLD;

/// The state of each signal, indexed by the signal's number.
static SIGNALS: [SignalState; MAX_SIGNAL as usize + 1] =
    [const { SignalState::new() }; MAX_SIGNAL as usize + 1];

/// The pipe that wakes the reader. It is never closed, because a handler may use it on another
/// thread at any time.
static PIPE: OnceLock<Pipe> = OnceLock::new();

/// The state of one signal, shared with the signal's handler.
///
/// Each signal has its own flags instead of bits of a shared word, because not every 32-bit
/// architecture has 64-bit atomic operations.
#[derive(Debug)]
struct SignalState {
    /// Whether the signal has arrived since the last read.
    is_pending: AtomicBool,
    /// Whether the handler has made the process ignore the signal, until
    /// [`InstalledHandler::resume`] is called.
    is_suspended: AtomicBool,
    replaced: ReplacedHandler,
}

impl SignalState {
    const fn new() -> Self {
        Self {
            is_pending: AtomicBool::new(false),
            is_suspended: AtomicBool::new(false),
            replaced: ReplacedHandler::none(),
        }
    }
}

fn state(signal: libc::c_int) -> Option<&'static SignalState> {
    SIGNALS.get(usize::try_from(signal).ok()?)
}

#[derive(Debug)]
struct Pipe {
    reader: UnixStream,
    writer: UnixStream,
    /// The only process whose handlers write to the pipe. A child that the application forks
    /// inherits the handlers and the pipe, but must not wake its parent.
    owner: AtomicOwner,
}

/// A signal handler in the form in which the system calls it with SA_SIGINFO.
pub(super) type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// Returns a handler's address in the form in which the system stores it.
pub(super) fn address(handler: Handler) -> libc::sighandler_t {
    handler as libc::sighandler_t
}

/// The application's handler that a handler of this crate replaced.
#[derive(Debug)]
pub(super) struct ReplacedHandler {
    /// The value of `sa_sigaction` if it is a function, otherwise 0.
    address: AtomicUsize,
}

impl ReplacedHandler {
    pub(super) const fn none() -> Self {
        Self {
            address: AtomicUsize::new(0),
        }
    }

    pub(super) fn store(&self, action: &libc::sigaction) {
        let address = match is_function(action) {
            true => action.sa_sigaction,
            false => 0,
        };
        self.address.store(address, Ordering::SeqCst);
    }

    /// Runs the body of a handler of this crate, and then the replaced handler. Preserves errno.
    /// Async-signal-safe if `body` is.
    pub(super) fn call_after(
        &self,
        signal: libc::c_int,
        info: *mut libc::siginfo_t,
        context: *mut libc::c_void,
        body: impl FnOnce(),
    ) {
        let number = errno::get();
        body();
        let address = self.address.load(Ordering::SeqCst);
        if address != 0 {
            // SAFETY: `store` received the address of a handler that the system would have called.
            // A handler that takes only the number ignores the other two arguments.
            let handler = unsafe { std::mem::transmute::<usize, Handler>(address) };
            handler(signal, info, context);
        }
        errno::set(number);
    }
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(state) = state(signal) else {
        return;
    };
    state.replaced.call_after(signal, info, context, || {
        // SAFETY: the system passes a valid structure, or null if another handler calls this one.
        let code = unsafe { info.as_ref() }.map(|info| info.si_code);
        let is_terminal_signal = matches!(signal, libc::SIGTTIN | libc::SIGTTOU);
        if is_terminal_signal && code == Some(SI_KERNEL) {
            suspend(signal, state);
        } else {
            state.is_pending.store(true, Ordering::SeqCst);
        }
        wake();
    });
}

/// Makes the pipe readable, so that the reader wakes up, from any thread. Does nothing if this
/// process has not created a pipe. Async-signal-safe.
pub(crate) fn wake() {
    if let Some(Pipe { writer, .. }) = PIPE.get().filter(|pipe| pipe.owner.is_current()) {
        let byte = [0u8];
        let (bytes, flags) = (byte.as_ptr().cast(), super::socket::SEND_FLAGS);
        // Ignore a full pipe, because its bytes already wake the reader.
        // SAFETY: the pointer is valid for reads of one byte.
        unsafe { libc::send(writer.as_raw_fd(), bytes, 1, flags) };
    }
}

/// Makes the process ignore a signal that the kernel has sent because this process belongs to a
/// background job and reads from its terminal or writes to it. Async-signal-safe.
///
/// After the handler, the kernel repeats the call that reads or writes. If the signal were still
/// handled, the kernel would send it again, without end. Once it is ignored, a write succeeds, and
/// a read fails with EIO (see `tty_check_change` in Linux).
fn suspend(signal: libc::c_int, state: &SignalState) {
    let mut ignore = empty_action();
    ignore.sa_sigaction = libc::SIG_IGN;
    // SAFETY: the action has no handler.
    let _ = unsafe { set_action(signal, &ignore) };
    // Set the mark last. Otherwise `resume` on another thread could clear the mark before this
    // thread ignores the signal, and the signal would stay ignored.
    state.is_suspended.store(true, Ordering::SeqCst);
}

/// The end of the pipe that the poller waits for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SignalPipe(&'static Pipe);

impl SignalPipe {
    pub(crate) fn new() -> io::Result<Self> {
        if PIPE.get().is_none() {
            let (reader, writer) = UnixStream::pair()?;
            reader.set_nonblocking(true)?;
            writer.set_nonblocking(true)?;
            let owner = AtomicOwner::current();
            // Ignore a failure, because another thread's pipe then serves both threads.
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

    /// Returns the signals that have arrived since the last call, in the order of their numbers.
    pub(crate) fn take(self) -> Vec<libc::c_int> {
        if !self.0.owner.is_current() {
            return Vec::new();
        }
        let mut sink = [0; 64];
        let mut reader = &self.0.reader;
        while matches!(reader.read(&mut sink), Ok(n) if n == sink.len()) {}
        let numbered = SIGNALS.iter().zip(0..);
        numbered
            .filter(|(state, _)| state.is_pending.swap(false, Ordering::SeqCst))
            .map(|(_, signal)| signal)
            .collect()
    }
}

impl AsFd for SignalPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.reader.as_fd()
    }
}

/// Gives a forked child that executes no program its own pipe, because the inherited pipe wakes the
/// parent. Clears all pending signals, and installs no handler.
pub(super) fn replace_pipe() -> io::Result<()> {
    for state in &SIGNALS {
        state.is_pending.store(false, Ordering::SeqCst);
        state.is_suspended.store(false, Ordering::SeqCst);
    }
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

/// Keeps our handler installed, and restores the previous action on drop.
#[derive(Debug)]
pub(crate) struct InstalledHandler {
    signal: libc::c_int,
    own: Action,
    previous: Action,
    /// Whether this thread had blocked the signal before the handler was installed.
    was_blocked: bool,
}

/// The system's action for a signal, with a `Debug` implementation.
struct Action(libc::sigaction);

impl std::fmt::Debug for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Action").field(&self.0.sa_sigaction).finish()
    }
}

/// Returns the default disposition without flags and with an empty mask.
fn empty_action() -> libc::sigaction {
    // SAFETY: all zeroes is a valid `sigaction`.
    unsafe { std::mem::zeroed() }
}

/// Returns a signal's current action.
pub(super) fn current_action(signal: libc::c_int) -> io::Result<libc::sigaction> {
    let mut current = empty_action();
    // SAFETY: without a new action, the call only writes the old one, and the pointer is valid for
    // writes.
    check(unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut current) })?;
    Ok(current)
}

/// Sets a signal's action.
///
/// # Safety
///
/// The action's handler must make only async-signal-safe calls, or must have been installed
/// earlier.
pub(super) unsafe fn set_action(signal: libc::c_int, action: &libc::sigaction) -> io::Result<()> {
    // SAFETY: the caller promises that the handler may run at any time, and the pointer is valid
    // for reads.
    check(unsafe { libc::sigaction(signal, action, std::ptr::null_mut()) })?;
    Ok(())
}

pub(super) fn is_ignored(signal: libc::c_int) -> bool {
    current_action(signal).is_ok_and(|action| action.sa_sigaction == libc::SIG_IGN)
}

/// Returns the signals that this process ignores, except SIGPIPE and SIGCHLD.
///
/// SIGPIPE is omitted because the runtime of a Rust program ignores it by default, so its action
/// does not show what this process inherited. SIGCHLD is omitted because a child that ignores it
/// cannot wait for its own children.
pub(crate) fn ignored() -> SignalSet {
    let mut ignored = SignalSet::empty();
    let all = 1..=libc::c_int::from(MAX_SIGNAL);
    let inherited = all.filter(|signal| ![libc::SIGPIPE, CHLD].contains(signal));
    inherited
        .filter(|signal| is_ignored(*signal))
        .for_each(|signal| ignored.add(signal));
    ignored
}

pub(super) fn is_function(action: &libc::sigaction) -> bool {
    action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN
}

/// Returns an action that runs `handler`. If the previous action is a function, `handler` calls
/// that function, so the new action takes over the mask and the `SA_RESTART`, `SA_NODEFER` and
/// `SA_ONSTACK` flags. Otherwise, the new action has `SA_RESTART` and `SA_ONSTACK`, and blocks all
/// signals while `handler` runs.
pub(super) fn chained_action(handler: Handler, previous: &libc::sigaction) -> libc::sigaction {
    let mut action = empty_action();
    action.sa_sigaction = address(handler);
    action.sa_flags = libc::SA_SIGINFO;
    if is_function(previous) {
        action.sa_mask = previous.sa_mask;
        let inherited = libc::SA_RESTART | libc::SA_NODEFER | libc::SA_ONSTACK;
        action.sa_flags |= previous.sa_flags & inherited;
    } else {
        // Block all signals while the handler runs. The kernel would otherwise nest the stack
        // frames of handlers whose signals arrive together. With AVX-512, a frame takes 3 KiB, so
        // three frames overflow the alternate stack of a Rust thread, and SIGSEGV kills the
        // process.
        action.sa_mask = SignalSet::all().into_raw();
        action.sa_flags |= libc::SA_RESTART | libc::SA_ONSTACK;
    }
    action
}

/// Installs the handler that marks `signal` as pending and writes to the pipe, and unblocks the
/// signal on this thread. Dropping the result restores the previous action, and blocks the signal
/// again if it was blocked.
///
/// # Errors
///
/// Returns an error if the signal does not exist or cannot be handled.
pub(crate) fn install(signal: libc::c_int) -> io::Result<InstalledHandler> {
    let previous = current_action(signal)?;
    // Store the previous handler as the replaced one, unless it is our own. Our handler would
    // otherwise call itself forever.
    if previous.sa_sigaction != address(handler) {
        if let Some(state) = state(signal) {
            state.replaced.store(&previous);
        }
    }
    let mut action = chained_action(handler, &previous);
    // Keep the application's choice whether its exited children become zombies and whether stopped
    // children raise SIGCHLD.
    action.sa_flags |= previous.sa_flags & (libc::SA_NOCLDWAIT | libc::SA_NOCLDSTOP);
    if signal == libc::SIGCHLD && previous.sa_sigaction == libc::SIG_IGN {
        action.sa_flags |= libc::SA_NOCLDWAIT;
    }
    // SAFETY: the handler makes only async-signal-safe calls.
    unsafe { set_action(signal, &action) }?;
    Ok(InstalledHandler {
        signal,
        own: Action(action),
        previous: Action(previous),
        was_blocked: SignalSet::only(signal).unblock().contains(signal),
    })
}

impl InstalledHandler {
    /// Installs the handler again if the process ignores the signal because of [`suspend`].
    pub(crate) fn resume(&self) {
        let state = state(self.signal);
        let was_suspended =
            state.is_some_and(|state| state.is_suspended.swap(false, Ordering::SeqCst));
        // Install the handler only if the signal is still ignored. Otherwise, the application has
        // set an action in the meantime, and this action stays.
        if was_suspended && is_ignored(self.signal) {
            // SAFETY: the handler makes only async-signal-safe calls.
            let _ = unsafe { set_action(self.signal, &self.own.0) };
        }
    }
}

impl Drop for InstalledHandler {
    fn drop(&mut self) {
        self.resume();
        // Restore the previous action only if our handler is still installed. A handler that the
        // application has installed over ours stays.
        if is_handled(self.signal) {
            if self.was_blocked {
                SignalSet::only(self.signal).block();
            }
            // SAFETY: this action was in force before ours, so its handler may run at any time.
            let _ = unsafe { set_action(self.signal, &self.previous.0) };
        }
    }
}

/// Returns whether our handler is installed.
pub(crate) fn is_handled(signal: libc::c_int) -> bool {
    current_action(signal).is_ok_and(|action| action.sa_sigaction == address(handler))
}

#[cfg(test)]
pub(crate) fn raise(signal: libc::c_int) {
    // SAFETY: raise accesses no memory of this process.
    unsafe { libc::raise(signal) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guards_restore_the_previous_action_in_any_order() {
        let signal = libc::SIGVTALRM;
        for is_first_dropped_first in [true, false] {
            let (first, second) = (install(signal).unwrap(), install(signal).unwrap());
            let guards = match is_first_dropped_first {
                true => [first, second],
                false => [second, first],
            };
            guards.into_iter().for_each(drop);
            let restored = current_action(signal).unwrap();
            assert_eq!(restored.sa_sigaction, libc::SIG_DFL);
        }
    }
}
