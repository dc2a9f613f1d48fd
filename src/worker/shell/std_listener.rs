//! Listeners on which other code accepts, and connections that the application has as plain
//! streams.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use super::WorkerShell;
use super::sockets::Socket;
use crate::core::worker::ListenerId;
use crate::error::{Error, Result};
use crate::sys;
use crate::sys::listen::Family;
use crate::sys::std_accept::{LocalName, StdAccept, has_connection};
use crate::types::time::Time;

/// The time between two checks of a disconnecting worker: whether `accept` calls wait, whether a
/// backlog is empty, and whether plain streams are open.
///
/// The kernel reports none of these. A longer interval delays the end of the worker. A shorter one
/// costs more system calls, about two for each open descriptor. No benchmark chose this value.
const CHECK_INTERVAL: Time = Time::from_millis(10);

/// The ended listeners on which other code may still accept, and the application's plain streams.
#[derive(Default)]
pub(super) struct StdSockets {
    /// Checks the sockets. `None` if the application has had neither. Only this pointer refers to
    /// the function, so the linker removes the function from programs that have neither.
    check: Option<fn(&WorkerShell)>,
    /// The ended listeners for which `accept` calls may still be waiting.
    ending: Vec<StdAccept>,
    /// The names of all listeners whose connections the application may have as plain streams.
    names: Vec<LocalName>,
    next_check: Time,
}

impl WorkerShell {
    /// Returns a blocking copy of a listener, for code that accepts without this crate. If the
    /// listener has ended, returns a socket of the same family on which `accept` fails.
    pub(crate) fn std_listener(&self, listener: ListenerId, family: Family) -> Result<OwnedFd> {
        let attempt = "let other code accept connections";
        if self.core.borrow().has_queue(listener) {
            let reason = "with round robin, only the master accepts connections";
            let reason = io::Error::new(io::ErrorKind::Unsupported, reason);
            return Err(Error::Io { attempt, reason });
        }
        self.add_std_copy(listener, family)
            .map_err(Error::io(attempt))
    }

    fn add_std_copy(&self, listener: ListenerId, family: Family) -> io::Result<OwnedFd> {
        let mut sockets = self.sockets.borrow_mut();
        let entry = sockets.get_mut(&listener);
        let Some((entry, Socket::Listener(shared))) =
            entry.map(|entry| (&mut entry.std, &**entry.socket))
        else {
            return sys::std_accept::stub(family);
        };
        let (accept, copy) = StdAccept::new(shared.fd.as_fd())?;
        if let Some(interrupt) = self.interrupt.get() {
            interrupt.unblock_signal();
        }
        *entry = Some(accept);
        drop(sockets);
        self.add_name(copy.as_fd());
        self.core.borrow_mut().use_std(listener);
        self.act();
        Ok(copy)
    }

    /// Records that the application has a connection as a plain stream.
    pub(crate) fn stream_taken(&self, stream: BorrowedFd<'_>) {
        self.add_name(stream);
        self.core.borrow_mut().stream_taken();
    }

    fn add_name(&self, socket: BorrowedFd<'_>) {
        let mut std_sockets = self.std_sockets.borrow_mut();
        std_sockets.check = Some(Self::check_now);
        if let Some(name) = LocalName::of(socket.as_raw_fd()) {
            if !std_sockets.names.contains(&name) {
                std_sockets.names.push(name);
            }
        }
    }

    /// Makes `accept` fail on the copy that other code has of a listener.
    pub(super) fn end_std_listener(&self, mut accept: StdAccept) {
        accept.end();
        if accept.interrupt() {
            self.std_sockets.borrow_mut().ending.push(accept);
        }
    }

    /// Returns the time of the next check, or `None` if there is nothing to check.
    pub(super) fn std_deadline(&self) -> Option<Time> {
        let (core, std_sockets) = (self.core.borrow(), self.std_sockets.borrow());
        let has_work = !std_sockets.ending.is_empty()
            || core.awaits_streams()
            || !core.draining_std_listeners().is_empty();
        has_work.then_some(std_sockets.next_check)
    }

    /// Carries out the checks that are due.
    pub(super) fn check_std_sockets(&self) {
        let check = self.std_sockets.borrow().check;
        let is_due = |deadline| deadline <= self.now();
        if let Some(check) = check.filter(|_| self.std_deadline().is_some_and(is_due)) {
            check(self);
        }
    }

    fn check_now(&self) {
        let draining = self.core.borrow().draining_std_listeners();
        for listener in draining {
            if self.is_std_listener_drained(listener) {
                self.core.borrow_mut().close(listener);
            }
        }
        self.act();
        let mut std_sockets = self.std_sockets.borrow_mut();
        std_sockets.ending.retain_mut(StdAccept::interrupt);
        // Check the streams last, because an `accept` call that was waiting may have returned one.
        let mut core = self.core.borrow_mut();
        if core.awaits_streams()
            && std_sockets.ending.is_empty()
            && !has_connection(&std_sockets.names)
        {
            core.streams_closed();
        }
        std_sockets.next_check = self.now().saturating_add(CHECK_INTERVAL);
    }

    /// Returns whether the backlog of a listener is empty, or the other code has closed its copy.
    fn is_std_listener_drained(&self, listener: ListenerId) -> bool {
        let sockets = self.sockets.borrow();
        let Some(entry) = sockets.get(&listener) else {
            return true;
        };
        let is_open = entry.std.as_ref().is_some_and(StdAccept::is_open);
        !is_open || !sys::listen::has_input(entry.socket.as_fd())
    }
}
