//! Receives connections and datagrams.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use super::WorkerShell;
use super::parked::{Holder, Origin, Registration, Turn};
use super::sockets::{AcceptMode, Socket, SocketOwner};
use crate::core::worker::{ListenerId, WorkerCore};
use crate::error::{Error, Result};
use crate::sys;
use crate::sys::fd::NoLingerFd;
use crate::sys::interruptible_accept::InterruptibleAccept;
use crate::sys::queue::{self, Dequeued};
use crate::types::connection_id::ConnectionId;
use crate::types::errno;
use crate::types::time::Time;

/// Number of descriptors that are kept free for the rest of the application and for connections in
/// flight.
///
/// With fewer, the kernel may drop a connection in flight for lack of a descriptor. With more, the
/// worker serves fewer connections than its descriptor limit allows. 32 is twice the number of
/// connections that the master dispatches ahead of time (`MAX_WINDOW`). No benchmark chose this
/// value.
const SPARE_FDS: u64 = 32;

/// Maximum number of connections with silent clients that one attempt to accept a connection holds.
///
/// A larger number delays messages, timers and signals while many silent clients connect. A smaller
/// number costs one call of the poller more often. No benchmark chose this value.
const HOLD_BATCH: u32 = 64;

/// A connection that was accepted from a listener or received from a queue.
pub(crate) struct Accepted {
    pub(crate) fd: OwnedFd,
    pub(crate) origin: Origin,
    /// Whether the connection exceeds the listener's limit and must go to the drop callback.
    pub(crate) is_excess: bool,
}

/// The result of a blocking `accept`.
pub(crate) enum Blocked {
    Accepted(Accepted),
    /// The worker holds the new connection until its client sends something, or has closed it
    /// because the client has hung up.
    Held,
    /// Another event has interrupted the call, the deadline has passed, the client has hung up
    /// before, or the listener turns out to be non-blocking.
    Nothing,
}

/// A connection as it arrives from a listener or a queue.
pub(super) struct Arrived {
    pub(super) fd: OwnedFd,
    pub(super) held: Option<ConnectionId>,
    pub(super) times_parked: u32,
    pub(super) registration: Option<Registration>,
}

impl Arrived {
    /// Returns a new connection.
    fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            held: None,
            times_parked: 0,
            registration: None,
        }
    }
}

impl WorkerShell {
    /// Returns the next connection of the listener without waiting: a new connection, or a parked
    /// one whose client has sent something. If there are both, they take turns. On a draining
    /// listener, the parked ones come first, because the listener closes when it is found empty. If
    /// the listener serves only parked ones, nothing is accepted.
    pub(crate) fn try_next(&self, listener: ListenerId) -> Result<Option<Accepted>> {
        let core = self.core.borrow();
        if core.is_serving_parked(listener) {
            drop(core);
            let resumed = self.resume(listener);
            if resumed.is_none() {
                self.core.borrow_mut().close_if_served(listener);
                self.act();
            }
            return Ok(resumed);
        }
        let resumes = core.has_resumed(listener)
            && (self.turn.get() != Turn::New || core.is_draining(listener));
        drop(core);
        if resumes {
            return Ok(self.resume(listener));
        }
        match self.try_accept(listener) {
            Ok(Some(accepted)) => {
                self.turn.set(Turn::Parked);
                Ok(Some(accepted))
            }
            Ok(None) => {
                self.mark_backlog_empty();
                Ok(self.resume(listener))
            }
            // A parked connection already has a descriptor, so a lack of descriptors must not delay
            // it.
            Err(error) => self
                .resume(listener)
                .map_or(Err(error), |own| Ok(Some(own))),
        }
    }

    /// Accepts the next connection from the listener, or receives it from the queue. Returns `None`
    /// if there is no connection, or if no descriptor is free for a connection from the queue. A
    /// draining listener that is found empty closes, unless it is paused.
    fn try_accept(&self, listener: ListenerId) -> Result<Option<Accepted>> {
        let Some(socket) = self.socket(listener).filter(|socket| socket.is_own()) else {
            return Ok(None);
        };
        let connection = match &**socket {
            Socket::Listener(shared) => {
                let accepted = self.accept_shared(listener, &shared.fd)?;
                accepted.map(Arrived::new)
            }
            Socket::Queue(queue) => self.receive_from_queue(listener, queue)?,
            Socket::Datagrams(_) => None,
        };
        if let Some(connection) = connection {
            return Ok(Some(self.accepted(listener, connection)));
        }
        let mut core = self.core.borrow_mut();
        if !core.is_draining(listener) {
            core.found_empty(listener);
        } else if !core.is_paused(listener) {
            core.close(listener);
        }
        drop(core);
        self.act();
        Ok(None)
    }

    /// Notifies the core of a connection that the application receives.
    pub(super) fn accepted(&self, listener: ListenerId, arrived: Arrived) -> Accepted {
        let Arrived {
            fd,
            held,
            times_parked,
            registration,
        } = arrived;
        let mut core = self.core.borrow_mut();
        let handle = core.handle(listener);
        let holder = match core.has_queue(listener) {
            true => handle.map_or(Holder::None, Holder::Master),
            false => Holder::Worker(listener, handle),
        };
        let origin = Origin {
            listener: Some(listener),
            holder,
            held,
            times_parked,
            registration,
        };
        let is_excess = core.connection_opened(listener);
        if core.has_queue(listener) {
            self.count_descriptors(&mut core, &fd);
        }
        drop(core);
        self.publish_in_service();
        self.act();
        Accepted {
            fd,
            origin,
            is_excess,
        }
    }

    /// Accepts a connection from a shared listener. Returns `None` if no connection waits, or if
    /// the worker holds those that it has accepted until their clients send something, or has closed
    /// those whose clients have hung up. Most errors are returned only if a connection waits,
    /// because accept(2) fails without a free descriptor even if no connection waits.
    fn accept_shared(&self, listener: ListenerId, shared: &OwnedFd) -> Result<Option<OwnedFd>> {
        let mut accepted = 0;
        loop {
            // Make the listener non-blocking again, because any process with a copy may have made
            // it blocking, and `accept` would wait. The call cannot fail, because the descriptor is
            // open.
            let _ = sys::fd::set_nonblocking(shared.as_fd(), true);
            match sys::listen::accept(shared) {
                Ok(fd) => {
                    let received = self.hold_if_silent(listener, fd);
                    accepted += 1;
                    if received.is_some() || accepted == HOLD_BATCH {
                        return Ok(received);
                    }
                }
                Err(error) if sys::listen::is_connection_error(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(reason) => {
                    let is_empty = if sys::listen::is_shutdown_error(&reason) {
                        self.core.borrow().is_draining(listener)
                    } else {
                        !sys::listen::has_input(shared.as_fd())
                    };
                    if is_empty {
                        return Ok(None);
                    }
                    let attempt = "accept a connection";
                    return Err(Error::Io { attempt, reason });
                }
            }
        }
    }

    /// Returns whether the next attempt to receive a connection can be left out, because the
    /// listener's queue was empty when the application parked its last connection.
    pub(crate) fn take_empty_at_park(&self, listener: ListenerId) -> bool {
        let skips_attempt = self.core.borrow_mut().take_empty_at_park(listener);
        self.act();
        skips_attempt
    }

    fn receive_from_queue(&self, listener: ListenerId, queue: &OwnedFd) -> Result<Option<Arrived>> {
        match queue::receive(queue.as_fd()) {
            Ok(Dequeued::Connection(label, connection)) => {
                self.is_out_of_fds.set(false);
                Ok(Some(Arrived {
                    fd: connection.into_owned_fd(),
                    held: label.held,
                    times_parked: label.times_parked,
                    registration: None,
                }))
            }
            Ok(Dequeued::Lost(label)) => {
                // If the connection was parked before, the master still has its own copy, and holds
                // the connection again.
                if let Some(connection) = label.held {
                    self.core.borrow_mut().park_again(connection);
                }
                self.out_of_fds();
                Ok(None)
            }
            // If the master has closed the queue, a frame on the channel tells the worker what to
            // do.
            Ok(Dequeued::Empty | Dequeued::Closed) => Ok(None),
            // Without a free descriptor, `receive` fails even if the queue is empty. A draining
            // queue that is empty must still close.
            Err(_) if self.core.borrow().is_draining(listener) && queue::is_empty(queue) => {
                Ok(None)
            }
            Err(reason) if reason.raw_os_error() == Some(errno::EMFILE) => {
                self.out_of_fds();
                Ok(None)
            }
            Err(reason) => {
                let attempt = "take a connection";
                Err(Error::Io { attempt, reason })
            }
        }
    }

    /// Leaves the connections in the queues to other workers for a while, because no descriptor is
    /// free.
    fn out_of_fds(&self) {
        if !self.is_out_of_fds.replace(true) {
            self.report(Error::no_descriptors(None));
        }
        self.core.borrow_mut().fds_exhausted();
        self.back_off();
    }

    /// Notifies the core if few or many descriptors are free. The kernel assigns the lowest free
    /// number to a new descriptor, so the number of `fd` shows about how many descriptors are in
    /// use.
    fn count_descriptors(&self, core: &mut WorkerCore<Vec<NoLingerFd>>, fd: &OwnedFd) {
        let Ok(number) = u64::try_from(fd.as_raw_fd()) else {
            return;
        };
        let limit = self.fd_limit.get();
        if number + SPARE_FDS > limit {
            core.fds_scarce();
        } else if number + 2 * SPARE_FDS <= limit {
            core.fds_plentiful();
        }
    }

    /// Records that the application no longer has a connection.
    pub(crate) fn connection_closed(&self, listener: Option<ListenerId>) {
        self.core.borrow_mut().connection_closed(listener);
        self.publish_in_service();
    }

    /// Records that the application has a connection that comes from no listener.
    pub(crate) fn connection_adopted(&self) {
        self.core.borrow_mut().connection_adopted();
        self.publish_in_service();
    }

    /// Shows the master how many connections the application has open. The value is one more than this
    /// number, because a worker that does not use this crate leaves the value at 0.
    pub(super) fn publish_in_service(&self) {
        if let Some(number) = self.in_service.as_ref().filter(|_| self.poller.is_own()) {
            let open = self.core.borrow().open_connections();
            number.set(u32::try_from(open).unwrap_or(u32::MAX).saturating_add(1));
        }
    }
}

// Blocking in `accept`.
impl WorkerShell {
    /// Makes input on the channel and on `signals` interrupt this process when it blocks in
    /// `accept`. Returns whether the interrupts are new. If they are, the caller must check both
    /// sources for input that arrived earlier.
    pub(crate) fn prepare_to_block(&self, signals: BorrowedFd<'_>) -> io::Result<bool> {
        let is_new = self.interrupt.get().is_none();
        if is_new {
            let interrupt = InterruptibleAccept::new()?;
            interrupt.add(signals)?;
            let added = self.channel.with(|channel| interrupt.add(channel.as_fd()));
            added.unwrap_or(Ok(()))?;
            self.interrupt_for_parked(&interrupt)?;
            let _ = self.interrupt.set(interrupt);
            // Write the queued frames now. The kernel reports free space in the channel, and thus
            // interrupts `accept`, only after it has rejected a write.
            self.flush_channel();
        }
        Ok(is_new)
    }

    /// Blocks in `accept`, at most until the deadline.
    pub(crate) fn accept_blocking(
        &self,
        listener: ListenerId,
        deadline: Option<Time>,
    ) -> Result<Blocked> {
        let socket = self.socket(listener);
        let socket = socket.as_deref().map(|socket| &**socket);
        let (Some(Socket::Listener(shared)), Some(interrupt)) = (socket, self.interrupt.get())
        else {
            return Ok(Blocked::Nothing);
        };
        // If the clock cannot represent the deadline, wait without one.
        let deadline = deadline.and_then(|deadline| self.start.checked_add(deadline));
        match interrupt.accept(shared.fd.as_fd(), deadline) {
            Ok(Some(fd)) => match self.hold_if_silent(listener, fd) {
                Some(fd) => {
                    self.turn.set(Turn::Parked);
                    Ok(Blocked::Accepted(self.accepted(listener, Arrived::new(fd))))
                }
                None => Ok(Blocked::Held),
            },
            Ok(None) => Ok(Blocked::Nothing),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                shared.mode.set(AcceptMode::NonBlocking);
                Ok(Blocked::Nothing)
            }
            Err(error) if sys::listen::is_connection_error(&error) => Ok(Blocked::Nothing),
            Err(reason) => {
                let attempt = "accept a connection";
                Err(Error::Io { attempt, reason })
            }
        }
    }

    /// Returns whether a connection waits in the listener's backlog, or the listener has an error.
    pub(crate) fn has_input(&self, listener: ListenerId) -> bool {
        let socket = self.socket(listener);
        socket.is_some_and(|socket| sys::listen::has_input(socket.as_fd()))
    }

    /// Returns whether accepting failed because another process shut down one of the master's TCP
    /// listeners. The master makes such a listener listen again, unless it is a borrowed
    /// descriptor.
    pub(crate) fn will_listen_again(&self, listener: ListenerId, error: &Error) -> bool {
        let Error::Io { reason, .. } = error else {
            return false;
        };
        let sockets = self.sockets.borrow();
        let entry = sockets.get(&listener);
        let Some(entry) = entry.filter(|entry| entry.owner == SocketOwner::Master) else {
            return false;
        };
        let Socket::Listener(shared) = &**entry.socket else {
            return false;
        };
        sys::listen::is_shutdown_error(reason) && sys::listen::local_addr(&shared.fd).is_some()
    }
}

// Receiving datagrams.
impl WorkerShell {
    /// Receives a datagram, or returns `None` if none is available.
    pub(crate) fn try_receive(
        &self,
        listener: ListenerId,
        buffer: &mut [u8],
    ) -> Result<Option<(usize, SocketAddr)>> {
        let socket = self.socket(listener).filter(|socket| socket.is_own());
        let Some(Socket::Datagrams(socket)) = socket.as_deref().map(|socket| &**socket) else {
            return Ok(None);
        };
        loop {
            match socket.recv_from(buffer) {
                Ok(received) => return Ok(Some(received)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    sys::connection::discard_socket_error(socket.as_fd());
                    return Ok(None);
                }
                Err(error) if sys::listen::is_datagram_error(&error) => {}
                Err(reason) => {
                    let attempt = "receive a datagram";
                    return Err(Error::Io { attempt, reason });
                }
            }
        }
    }

    /// Receives a datagram of any length, or returns `None` if none is available.
    pub(crate) fn try_receive_vec(
        &self,
        listener: ListenerId,
    ) -> Result<Option<(Vec<u8>, SocketAddr)>> {
        /// The maximum length of a datagram in bytes, rounded up (udp(7)).
        const DATAGRAM_MAX: usize = 64 << 10;
        let mut buffer = self.datagram.borrow_mut();
        buffer.resize(DATAGRAM_MAX, 0);
        let received = self.try_receive(listener, &mut buffer)?;
        Ok(received.map(|(length, from)| (buffer[..length].to_vec(), from)))
    }
}
