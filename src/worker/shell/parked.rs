//! Parked connections: returning them to the master, or holding them in this worker.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use super::WorkerShell;
use super::accept::{Accepted, Arrived};
use super::sockets::Socket;
use crate::core::worker::{Held, Leaving, ListenerId};
use crate::runtime::token::Token;
use crate::sys;
use crate::sys::connection::IdleEvent;
use crate::sys::interruptible_accept::InterruptibleAccept;
use crate::types::connection_id::ConnectionId;
use crate::types::handle::HandleId;
use crate::wire::frame::ToMaster;
use crate::wire::frame::header::MAX_BATCH;

/// The source of a connection, and its destination when the application parks it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Origin {
    /// The listener that counts the connection.
    pub(crate) listener: Option<ListenerId>,
    pub(crate) holder: Holder,
    /// The connection's id if the master holds a copy.
    pub(crate) held: Option<ConnectionId>,
    /// The number of times that the connection has been parked.
    pub(crate) times_parked: u32,
    /// The registrations that this worker has made for the connection while it was parked.
    pub(crate) registration: Option<Registration>,
}

/// The process that holds a connection while it is parked. The master's handle of the listener
/// stays valid after the listener has closed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Holder {
    /// The connection comes from no listener, and is closed instead of being parked.
    #[default]
    None,
    Master(HandleId),
    /// This worker. The handle is `None` for a private listener.
    Worker(ListenerId, Option<HandleId>),
}

/// Whether the application may have changed options of a connection's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamOptions {
    /// The application has only read and written, so the options are as after accept(2).
    Unchanged,
    /// The application has had access to the stream itself.
    Unknown,
}

impl StreamOptions {
    /// Gives the options of `connection` the values that they have after accept(2).
    fn reset(self, connection: BorrowedFd<'_>) -> io::Result<()> {
        match self {
            // In a worker that accepts itself, these would be three of the seven system calls of a
            // request on a parked connection.
            Self::Unchanged => Ok(()),
            Self::Unknown => sys::connection::reset_options(connection),
        }
    }
}

/// The registrations that a resumed connection keeps while the application has it, so that parking
/// it again costs less.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Registration {
    /// The number of the connection's descriptor, which is dormant in the poller.
    number: RawFd,
    /// Whether arrivals on the connection interrupt a blocking `accept`.
    interrupts: bool,
}

/// A connection that this worker holds.
#[derive(Debug)]
pub(super) struct ParkedConnection {
    fd: OwnedFd,
    /// Whether arrivals on the connection interrupt a blocking `accept`.
    interrupts: bool,
}

/// The result of a check of an idle connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checked {
    /// The client has sent something, and this listener's application can receive the connection.
    Resumed(ListenerId),
    Silent,
    HungUp,
}

/// The source of the next connection, if a parked connection is ready.
///
/// | turn | event | next |
/// |---|---|---|
/// | any | the application receives a new connection | `Parked` |
/// | `Parked` | a parked connection is resumed | `New` |
/// | `New` | the backlog is found empty | `ParkedOnly` |
/// | `ParkedOnly` | `expect_backlog`, once per interval | `New` |
///
/// Without `ParkedOnly`, the worker would check the backlog for each request on a parked
/// connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    New,
    Parked,
    ParkedOnly,
}

impl WorkerShell {
    /// Lets the master close its copy of a connection, because the application keeps or has closed
    /// the connection.
    pub(crate) fn detach(&self, origin: &Origin) {
        if let Some(connection) = origin.held {
            self.core.borrow_mut().detach(connection);
            // Act at once, because the client receives end-of-file only when the master has closed
            // its copy.
            self.act();
        }
    }

    /// Removes a connection whose stream the application has closed from the poller, and lets the
    /// master close its copy.
    pub(crate) fn forget(&self, origin: &Origin) {
        if let Some(registration) = origin.registration {
            self.poller.forget_dormant(registration.number);
        }
        self.detach(origin);
    }

    /// Returns whether the worker can offer the connection to the process that holds it while it is
    /// idle. That process may still close it, if the listener has closed.
    pub(crate) fn can_park(&self, origin: &Origin) -> bool {
        let has_holder = !matches!(origin.holder, Holder::None) || origin.held.is_some();
        has_holder && self.core.borrow().is_writable() && self.poller.is_own()
    }

    /// Holds a connection until its client sends something, or returns the connection to the master,
    /// which then holds it.
    pub(crate) fn park(&self, fd: OwnedFd, origin: &Origin, options: StreamOptions) {
        self.fault("worker.before_park");
        match origin.holder {
            Holder::Worker(listener, handle) => {
                self.park_here(fd, origin, options, listener, handle);
            }
            Holder::Master(handle) => self.park_in_master(fd, origin, options, Some(handle)),
            Holder::None => self.park_in_master(fd, origin, options, None),
        }
        self.fault("worker.after_park");
    }

    fn park_in_master(
        &self,
        fd: OwnedFd,
        origin: &Origin,
        options: StreamOptions,
        handle: Option<HandleId>,
    ) {
        let mut core = self.core.borrow_mut();
        core.connection_closed(origin.listener);
        // A forked child only closes its copy of the connection.
        let is_writable = core.is_writable() && self.poller.is_own();
        match (origin.held, handle) {
            // The master's copy shares the options that are reset here.
            _ if options.reset(fd.as_fd()).is_err() || !is_writable => {
                if let Some(connection) = origin.held {
                    core.detach(connection);
                }
            }
            // Report with a frame. A trial wrote the report into shared memory instead, where the
            // master found it when it woke up for another reason. Such a request cost 9 % less CPU
            // time with 32 clients, but not less with 2: their next requests often came before the
            // report, or the master was still awake.
            (Some(connection), _) => core.park_again(connection),
            (None, Some(handle)) => {
                let times_parked = origin.times_parked.saturating_add(1);
                let frame = ToMaster::Park {
                    handle,
                    times_parked,
                };
                self.channel.queue(&frame, Some(fd));
            }
            (None, None) => {}
        }
        // If the queue is already empty, report now that the worker is idle, so that the report and
        // the frame above leave in one write. The worker would otherwise report this in a second
        // write.
        let listener = origin.listener.filter(|id| self.is_queue_empty(*id));
        if let Some(listener) = listener {
            core.found_empty_at_park(listener);
        }
        drop(core);
        self.publish_in_service();
        self.act();
        self.flush_channel();
    }

    /// Returns whether the listener has a queue that is known to be empty.
    fn is_queue_empty(&self, listener: ListenerId) -> bool {
        let socket = self.socket(listener);
        let socket = socket.as_deref().map(|registered| &**registered);
        matches!(socket, Some(Socket::Queue(queue)) if sys::queue::is_empty(queue))
    }
}

// Holding connections in this worker.
impl WorkerShell {
    fn park_here(
        &self,
        fd: OwnedFd,
        origin: &Origin,
        options: StreamOptions,
        listener: ListenerId,
        handle: Option<HandleId>,
    ) {
        self.check_surplus();
        let mut core = self.core.borrow_mut();
        core.connection_closed(origin.listener);
        let times_parked = origin.times_parked.saturating_add(1);
        let held = match options.reset(fd.as_fd()) {
            Ok(()) => core.hold(listener, handle, times_parked, self.now()),
            // The client has reset the connection.
            Err(_) => Held::Closed,
        };
        drop(core);
        self.publish_in_service();
        self.keep(held, fd, origin.registration);
        self.act();
    }

    /// Holds a new connection until its client sends something, if the listener waits for data and
    /// the client has sent nothing yet. Returns a connection that the application can receive now.
    pub(super) fn hold_if_silent(&self, listener: ListenerId, fd: OwnedFd) -> Option<OwnedFd> {
        if !self.core.borrow().holds_silent(listener) {
            return Some(fd);
        }
        match sys::connection::idle_event(fd.as_fd()) {
            IdleEvent::Data => Some(fd),
            IdleEvent::HangUp => None,
            IdleEvent::Nothing => {
                self.check_surplus();
                let mut core = self.core.borrow_mut();
                // The check may have found that no other connection can close.
                if !core.holds_silent(listener) {
                    return Some(fd);
                }
                let handle = core.handle(listener);
                let held = core.hold(listener, handle, 0, self.now());
                drop(core);
                self.keep(held, fd, None);
                self.act();
                None
            }
        }
    }

    /// Holds a connection that another worker parked.
    pub(super) fn hold_moved(&self, handle: HandleId, fd: OwnedFd, times_parked: u32) {
        self.check_surplus();
        let held = self
            .core
            .borrow_mut()
            .hold_moved(handle, times_parked, self.now());
        self.keep(held, fd, None);
    }

    /// Stores the descriptor of a held connection, or closes a connection that the core did not
    /// hold. If the connection is idle, makes the poller report once that its client has sent
    /// something or has hung up.
    fn keep(&self, held: Held, fd: OwnedFd, registration: Option<Registration>) {
        let mut interrupts = registration.is_some_and(|registration| registration.interrupts);
        let id = match held {
            Held::Idle(id) => {
                let awaited = self.await_data(id, fd.as_fd(), registration.is_some(), interrupts);
                match awaited {
                    Ok(interrupting) => interrupts = interrupting,
                    Err(reason) => {
                        self.report_io("hold an idle connection", reason);
                        self.core.borrow_mut().hung_up(id);
                    }
                }
                id
            }
            Held::Leaving(id) => id,
            Held::Closed => {
                self.poller.forget_dormant(fd.as_raw_fd());
                return;
            }
        };
        let connection = ParkedConnection { fd, interrupts };
        self.parked.borrow_mut().insert(id, connection);
    }

    /// Makes the poller report once that the client has sent something or has hung up. Returns
    /// whether the report also interrupts a blocking `accept`.
    fn await_data(
        &self,
        id: ConnectionId,
        fd: BorrowedFd<'_>,
        was_awaited: bool,
        interrupts: bool,
    ) -> io::Result<bool> {
        let interrupt = self.interrupt.get().filter(|_| !interrupts);
        if let Some(interrupt) = interrupt {
            interrupt.add_connection(fd)?;
        }
        let key = Token::Parked(id.0).key();
        self.poller.await_once(fd, key, was_awaited)?;
        self.has_newly_parked.set(true);
        Ok(interrupts || interrupt.is_some())
    }

    /// Makes arrivals on the parked connections interrupt `accept`.
    pub(super) fn interrupt_for_parked(&self, interrupt: &InterruptibleAccept) -> io::Result<()> {
        for connection in self.parked.borrow_mut().values_mut() {
            interrupt.add_connection(connection.fd.as_fd())?;
            connection.interrupts = true;
        }
        Ok(())
    }

    /// Returns whether a connection was parked since the last call. The poller may then report
    /// data that interrupts no `accept`.
    pub(crate) fn take_newly_parked(&self) -> bool {
        self.has_newly_parked.take()
    }

    /// Handles a parked connection that the poller has reported. Returns its listener if the
    /// application can receive the connection.
    pub(crate) fn parked_ready(&self, number: u32) -> Option<ListenerId> {
        let id = ConnectionId(number);
        self.lingering_ready(id);
        let resumed = match self.check_client(id)? {
            Checked::Resumed(listener) => Some(listener),
            Checked::Silent => {
                self.await_again(id);
                None
            }
            Checked::HungUp => None,
        };
        self.act();
        resumed
    }

    fn await_again(&self, id: ConnectionId) {
        let parked = self.parked.borrow();
        let Some(connection) = parked.get(id) else {
            return;
        };
        let fd = connection.fd.as_fd();
        let awaited = self.await_data(id, fd, true, connection.interrupts);
        if awaited.is_err() {
            self.core.borrow_mut().hung_up(id);
        }
    }

    /// Checks whether the client of a parked connection has sent something or has hung up, and
    /// reports this to the core. Returns `None` if the connection is not idle.
    fn check_client(&self, id: ConnectionId) -> Option<Checked> {
        let event = sys::connection::idle_event(self.parked.borrow().get(id)?.fd.as_fd());
        let mut core = self.core.borrow_mut();
        match event {
            IdleEvent::Data => core.data_arrived(id).map(Checked::Resumed),
            IdleEvent::Nothing => Some(Checked::Silent),
            IdleEvent::HangUp => {
                core.hung_up(id);
                Some(Checked::HungUp)
            }
        }
    }

    /// Checks a connection that is about to close or to leave, because the poller may not have
    /// reported yet that its client has sent something. Ignores a hang-up, because the number of a
    /// removed connection could be used again before its descriptor is closed.
    fn check_before_close(&self, id: ConnectionId) {
        let event = self
            .parked
            .borrow()
            .get(id)
            .map(|connection| sys::connection::idle_event(connection.fd.as_fd()));
        if event == Some(IdleEvent::Data) {
            let mut core = self.core.borrow_mut();
            if let Some(listener) = core.data_arrived(id) {
                core.notify_ready(listener);
            }
        }
    }

    /// Checks all idle connections before the worker disconnects or one of its listeners ends.
    /// Those whose clients have sent something then stay for the application.
    pub(super) fn check_before_leaving(&self) {
        let idle = self.core.borrow().idle_connections();
        for id in idle {
            self.check_before_close(id);
        }
    }

    /// Closes the connections whose clients have been silent for too long.
    pub(super) fn expire_parked(&self) {
        let now = self.now();
        let expiring = self.core.borrow().expiring(now);
        for id in expiring {
            self.check_before_close(id);
        }
        self.core.borrow_mut().expire_parked(now);
        self.act();
    }

    /// Checks the connections that may have to close because the worker holds another one.
    fn check_surplus(&self) {
        let mut checked = None;
        loop {
            let next = self.core.borrow().next_surplus();
            match next {
                Some(id) if next != checked => self.check_before_close(id),
                Some(_) | None => break,
            }
            checked = next;
        }
    }

    pub(super) fn close_parked(&self, id: ConnectionId) {
        let removed = self.parked.borrow_mut().remove(id);
        if let Some(connection) = removed {
            // Delete the registration explicitly, because closing this copy would not end it if a
            // process that the application forked has another copy.
            self.poller.delete(connection.fd.as_fd());
        }
        self.close_lingering(id);
    }

    /// Returns the listener's next parked connection whose client has sent something, unless the
    /// listener is paused.
    pub(crate) fn resume(&self, listener: ListenerId) -> Option<Accepted> {
        let mut core = self.core.borrow_mut();
        if !core.has_resumed(listener) || core.is_paused(listener) {
            return None;
        }
        let (id, times_parked) = core.next_resumed(listener)?;
        drop(core);
        let ParkedConnection { fd, interrupts } = self.parked.borrow_mut().remove(id)?;
        self.poller.keep_dormant(fd.as_fd());
        if self.turn.get() == Turn::Parked {
            self.turn.set(Turn::New);
        }
        let number = fd.as_raw_fd();
        let arrived = Arrived {
            fd,
            held: None,
            times_parked,
            registration: Some(Registration { number, interrupts }),
        };
        Some(self.accepted(listener, arrived))
    }

    /// Returns whether the listener has a parked connection whose client has sent something.
    pub(crate) fn has_resumed(&self, listener: ListenerId) -> bool {
        self.core.borrow().has_resumed(listener)
    }

    /// Returns whether a new connection comes before a parked one.
    pub(crate) fn is_new_next(&self) -> bool {
        self.turn.get() == Turn::New
    }

    /// Records that the backlog was found empty.
    pub(crate) fn mark_backlog_empty(&self) {
        self.turn.set(Turn::ParkedOnly);
    }

    /// Lets a new connection come before a parked one again, if the backlog was found empty before.
    pub(crate) fn expect_backlog(&self) {
        if self.turn.get() == Turn::ParkedOnly {
            self.turn.set(Turn::New);
        }
    }

    /// Discards a pending interrupt of a blocking `accept`. Returns whether there was one. The
    /// caller must then check all sources.
    pub(crate) fn discard_interrupt(&self) -> bool {
        let interrupt = self.interrupt.get();
        interrupt.is_some_and(InterruptibleAccept::discard)
    }
}

// Connections that leave this worker.
impl WorkerShell {
    /// Sends connections to the master for other workers, as far as the channel has space. Returns
    /// whether any connection was queued.
    pub(super) fn send_leaving(&self) -> bool {
        let mut has_queued = false;
        while self
            .channel
            .frames_with_fd()
            .is_some_and(|fds| fds < MAX_BATCH)
        {
            let Some(leaving) = self.core.borrow_mut().next_leaving() else {
                break;
            };
            let Leaving {
                id,
                handle,
                times_parked,
            } = leaving;
            let removed = self.parked.borrow_mut().remove(id);
            if let Some(ParkedConnection { fd, interrupts }) = removed {
                self.poller.delete(fd.as_fd());
                if interrupts {
                    InterruptibleAccept::remove_connection(fd.as_raw_fd());
                }
                let frame = ToMaster::Park {
                    handle,
                    times_parked,
                };
                self.channel.queue(&frame, Some(fd));
                has_queued = true;
            }
        }
        has_queued
    }

    /// Removes a connection from the poller and ends its interrupts of `accept`, because the
    /// application takes the stream out of the `Connection`.
    pub(crate) fn unregister(&self, registration: Registration) {
        self.poller.delete_dormant(registration.number);
        registration.stop_interrupts();
    }
}

impl Registration {
    /// Ends the interrupts of `accept`. They belong to the socket itself, so closing this copy
    /// would not end them if another process has a copy.
    pub(crate) fn stop_interrupts(self) {
        if self.interrupts {
            InterruptibleAccept::remove_connection(self.number);
        }
    }
}
