//! Provides a blocking `accept` that messages, signals and timers interrupt.
//!
//! Linux queues processes that block in `accept` first in, first out, and wakes one for each
//! connection. A process that polls does not take part in this queue. So a worker blocks in
//! `accept` although it also has to wait for its channel. The kernel signals each arrival on the
//! channel to the worker's thread. The signal is SIGURG, because it has no effect without a
//! handler. The signal is blocked except during the call, so it does not interrupt the
//! application's calls. If the application has taken a listener out of the crate, the signal stays
//! unblocked, because it must interrupt the threads that accept from this listener
//! (`blocked_threads`).
//!
//! A signal must not be lost if it arrives after it was unblocked, but before `accept` sleeps. So
//! `accept` is called on a reserved descriptor, the *slot*, which holds a copy of the listener. The
//! handler replaces the slot's content with a copy of the *stub*, a descriptor that is not a
//! socket. As a result, `accept` fails, even if it begins only after the signal.

mod async_io;
mod timer;

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Instant;

use crate::sys::check;
use crate::sys::owner::Owner;
use crate::sys::platform::{socket, uapi};
use crate::sys::signal::{ReplacedHandler, address, chained_action, current_action, set_action};
use crate::sys::signal_mask::SignalSet;
use timer::Timer;

const SIGNAL: libc::c_int = libc::SIGURG;

/// The id of the thread that the handler works for, or 0 if there is none.
static THREAD: AtomicI32 = AtomicI32::new(0);
/// The number of the descriptor that the handler replaces, or -1 if there is none.
static SLOT: AtomicI32 = AtomicI32::new(-1);
/// The number of the stub, or -1 if there is none.
static STUB: AtomicI32 = AtomicI32::new(-1);
/// Whether the handler has run since the thread last checked.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static REPLACED: ReplacedHandler = ReplacedHandler::none();

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    REPLACED.call_after(signal, info, context, || {
        // Act only on the thread that owns the `InterruptibleAccept`. If the handler ran `dup3` on
        // another thread, the owner could close the descriptors at the same time, and their numbers
        // could be reused. Another thread also has no `accept` of this module to interrupt.
        if THREAD.load(Ordering::SeqCst) == own_thread() {
            INTERRUPTED.store(true, Ordering::SeqCst);
            let (stub, slot) = (STUB.load(Ordering::SeqCst), SLOT.load(Ordering::SeqCst));
            // Ignore the result. If both descriptors are open, `dup3` fails only if the process's
            // descriptor limit has been lowered to the slot's number or less (EBADF in dup(2)).
            // dup(2) also documents EBUSY for a number that another thread is about to open, but
            // the slot's number is never free.
            // SAFETY: this module owns the slot, so dup3 replaces no other code's descriptor.
            unsafe { uapi::dup3(stub, slot) };
        }
    });
}

/// Returns the id of the calling thread. Async-signal-safe.
fn own_thread() -> libc::pid_t {
    // Make the system call directly, because glibc has a function for it only since 2.30.
    // SAFETY: gettid has no preconditions.
    let number = unsafe { libc::syscall(libc::SYS_gettid) };
    libc::pid_t::try_from(number).unwrap_or(-1)
}

/// A blocking `accept` that can be interrupted. A process has at most one.
///
/// `timer` makes the type `!Send`, which keeps the value on its thread.
pub(crate) struct InterruptibleAccept {
    slot: OwnedFd,
    stub: OwnedFd,
    signal: SignalSet,
    was_blocked: bool,
    previous_action: libc::sigaction,
    sources: RefCell<Vec<RawFd>>,
    /// The listener whose copy is in the slot, or `None` for the stub.
    listener: Cell<Option<RawFd>>,
    timer: Cell<Option<Timer>>,
    /// The deadline to which the timer is set.
    deadline: Cell<Option<Instant>>,
    owner: Owner,
}

impl InterruptibleAccept {
    /// Installs the signal handler, and blocks the signal on this thread.
    ///
    /// # Errors
    ///
    /// Returns `ResourceBusy` if the process already has an `InterruptibleAccept` on any thread.
    /// Also returns an error if no descriptor is free.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: eventfd accesses no memory of this process.
        let number = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) })?;
        // SAFETY: the kernel has just opened the descriptor for this call.
        let stub = unsafe { OwnedFd::from_raw_fd(number) };
        let slot = stub.try_clone()?;
        let order = Ordering::SeqCst;
        let claimed = THREAD.compare_exchange(0, own_thread(), order, order);
        if claimed.is_err() {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        STUB.store(stub.as_raw_fd(), Ordering::SeqCst);
        SLOT.store(slot.as_raw_fd(), Ordering::SeqCst);
        let signal = SignalSet::only(SIGNAL);
        let was_blocked = signal.block().contains(SIGNAL);
        Ok(Self {
            slot,
            stub,
            was_blocked,
            signal,
            previous_action: install_handler(),
            sources: RefCell::default(),
            listener: Cell::default(),
            timer: Cell::default(),
            deadline: Cell::default(),
            owner: Owner::current(),
        })
    }

    /// Adds a socket that interrupts `accept` from now on.
    ///
    /// An interruption follows when bytes arrive, when the peer hangs up, and when a send that
    /// would have waited becomes possible. The caller must check for earlier arrivals.
    ///
    /// # Errors
    ///
    /// Returns an error if the descriptor is not open, or `Unsupported` if the system cannot signal
    /// its arrivals.
    pub(crate) fn add(&self, source: BorrowedFd<'_>) -> io::Result<()> {
        let source = source.as_raw_fd();
        self.sources.borrow_mut().push(source);
        async_io::enable(source, SIGNAL, own_thread())
    }

    /// Makes arrivals on a connection interrupt `accept`, as [`add`](Self::add) does, until
    /// [`remove_connection`](Self::remove_connection) is called or the connection is closed.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`add`](Self::add).
    pub(crate) fn add_connection(&self, connection: BorrowedFd<'_>) -> io::Result<()> {
        async_io::enable(connection.as_raw_fd(), SIGNAL, own_thread())
    }

    /// Undoes [`add_connection`](Self::add_connection), also after the `InterruptibleAccept` was
    /// dropped. Does nothing if this thread did not add the connection.
    pub(crate) fn remove_connection(number: RawFd) {
        async_io::disable(number, own_thread());
    }

    /// Discards a pending interrupt. Returns whether there was one. The caller must then check all
    /// sources before it calls `accept`. Does nothing if the application handles the signal too,
    /// because the pending signal may be meant for the application.
    pub(crate) fn discard(&self) -> bool {
        let previous = self.previous_action.sa_sigaction;
        let is_ours = matches!(previous, libc::SIG_DFL | libc::SIG_IGN) && is_handled();
        is_ours && self.signal.take_pending()
    }

    /// Waits for a connection and returns it, blocking and closed on exec. Returns `None` if a
    /// source may have something to process, if a signal has interrupted the call, or if the
    /// deadline has passed.
    ///
    /// The kernel signals an arrival only once. So the caller must read all sources until they
    /// would block, before the first call and after each call that returns `None`.
    ///
    /// After a send that would have waited, the caller must also poll the socket, and call this
    /// function only when the socket is not writable. The kernel may have made space just before it
    /// recorded that this process waits for space.
    ///
    /// # Errors
    ///
    /// Returns the errors of accept(2), for example `WouldBlock` if the listener is non-blocking,
    /// and the errors of timer_create(2). Also returns `WouldBlock` if the process's descriptor
    /// limit no longer allows the slot's number. The caller must then poll the listener.
    pub(crate) fn accept(
        &self,
        listener: BorrowedFd<'_>,
        deadline: Option<Instant>,
    ) -> io::Result<Option<OwnedFd>> {
        if self.set_timer(deadline)? {
            return Ok(None);
        }
        let number = listener.as_raw_fd();
        if self.listener.get() != Some(number) {
            // The call fails only if the slot's number is not below the limit (EBADF in dup(2)).
            if self.fill_slot(number).is_err() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.listener.set(Some(number));
        }
        // Check for a signal that arrived when the last call already had its connection. If
        // `fill_slot` has replaced the stub in the meantime, `accept` would not fail.
        if self.take_interruption() {
            return Ok(None);
        }
        match self.accept_at_slot() {
            Err(error) => {
                let interrupted = self.take_interruption();
                if interrupted || error.kind() == io::ErrorKind::Interrupted {
                    Ok(None)
                } else {
                    Err(error)
                }
            }
            Ok(connection) => Ok(Some(connection)),
        }
    }

    /// Unblocks the signal on this thread, and therefore on the threads that it starts later, unless
    /// the application has blocked the signal.
    pub(crate) fn unblock_signal(&self) {
        if !self.was_blocked {
            self.signal.unblock();
        }
    }

    /// Removes the slot's copy of a listener, so that closing the listener closes the socket.
    pub(crate) fn release(&self, listener: BorrowedFd<'_>) -> io::Result<()> {
        if self.listener.get() == Some(listener.as_raw_fd()) {
            self.fill_slot(self.stub.as_raw_fd())?;
            self.listener.set(None);
        }
        Ok(())
    }

    fn fill_slot(&self, number: RawFd) -> io::Result<()> {
        // SAFETY: this module owns the slot, so dup3 replaces no other code's descriptor.
        check(unsafe { uapi::dup3(number, self.slot.as_raw_fd()) })?;
        Ok(())
    }

    fn take_interruption(&self) -> bool {
        let interrupted = INTERRUPTED.swap(false, Ordering::SeqCst);
        if interrupted {
            self.listener.set(None);
        }
        interrupted
    }

    /// Accepts a connection from the slot. The signal is unblocked only during this call.
    fn accept_at_slot(&self) -> io::Result<OwnedFd> {
        let mask = self.signal.unblock();
        let accepted = socket::accept(self.slot.as_raw_fd());
        mask.set_as_mask();
        accepted
    }

    /// Sets the timer to the deadline. Returns whether the caller must check all sources first,
    /// because this deadline or the previous one has passed.
    fn set_timer(&self, deadline: Option<Instant>) -> io::Result<bool> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(true);
        }
        if self.deadline.get() == deadline {
            return Ok(false);
        }
        self.timer()?.set(left)?;
        let previous = self.deadline.replace(deadline);
        if previous.is_none_or(|previous| previous > Instant::now()) {
            return Ok(false);
        }
        // The timer had expired, so its signal may be pending. Since Linux 6.13, the kernel
        // discards such a signal of a timer that is set again, but only when the signal would be
        // delivered. Until then, arrivals send no second signal. So deliver the signal now. The
        // caller checks all sources for earlier arrivals.
        self.signal.unblock().set_as_mask();
        Ok(true)
    }

    /// Returns the timer, and creates it in the first call.
    fn timer(&self) -> io::Result<Timer> {
        if let Some(timer) = self.timer.get() {
            return Ok(timer);
        }
        let timer = Timer::new(SIGNAL, own_thread())?;
        self.timer.set(Some(timer));
        Ok(timer)
    }
}

impl std::fmt::Debug for InterruptibleAccept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut f = f.debug_struct("InterruptibleAccept");
        f.field("slot", &self.slot).field("sources", &self.sources);
        f.finish_non_exhaustive()
    }
}

impl Drop for InterruptibleAccept {
    fn drop(&mut self) {
        // Reset the sources and delete the timer only on the thread that set them up. A child that
        // the application has forked shares the sources with its parent, and does not inherit the
        // timer.
        if self.owner.is_current() && THREAD.load(Ordering::SeqCst) == own_thread() {
            for &source in self.sources.borrow().iter() {
                async_io::disable(source, own_thread());
            }
            if let Some(timer) = self.timer.get() {
                timer.delete();
            }
        }
        SLOT.store(-1, Ordering::SeqCst);
        STUB.store(-1, Ordering::SeqCst);
        INTERRUPTED.store(false, Ordering::SeqCst);
        // Restore the previous action only if our handler is still installed. A handler that the
        // application has installed over ours stays, and may still call ours.
        if is_handled() {
            // SAFETY: this action was in force before ours, so its handler may run at any time.
            let _ = unsafe { set_action(SIGNAL, &self.previous_action) };
        }
        if !self.was_blocked {
            self.signal.unblock();
        }
        THREAD.store(0, Ordering::SeqCst);
    }
}

/// Installs our handler, and returns the action that it replaced. The installation cannot fail,
/// because the signal exists.
fn install_handler() -> libc::sigaction {
    let previous = action();
    REPLACED.store(&previous);
    // If our handler replaces no function, `chained_action` sets SA_RESTART for other threads that
    // may receive the signal. With this flag, the kernel repeats an interrupted `accept`, but the
    // repeated call fails, because the slot then holds the stub.
    let action = chained_action(handler, &previous);
    // SAFETY: the handler makes only async-signal-safe calls.
    let _ = unsafe { set_action(SIGNAL, &action) };
    previous
}

fn action() -> libc::sigaction {
    // SAFETY: all zeroes is a valid sigaction.
    current_action(SIGNAL).unwrap_or_else(|_| unsafe { std::mem::zeroed() })
}

fn is_handled() -> bool {
    action().sa_sigaction == address(handler)
}

#[cfg(test)]
mod tests;
