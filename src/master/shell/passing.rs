//! Passing connections to the master that takes over from this one, and receiving them.
//!
//! The descriptors of connections that wait to be passed stay in the table of held connections. A
//! successor that reads slowly or never therefore costs this master only the space in the stream's
//! send buffer.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::MasterShell;
use super::parked::HeldConnections;
use crate::error::{Error, Result};
use crate::runtime::backoff::BACKOFF;
use crate::runtime::token::Token;
use crate::sys;
use crate::sys::fd::NoLingerFd;
use crate::sys::poll::{Interest, Registered};
use crate::types::connection_id::ConnectionId;
use crate::types::handle::HandleId;
use crate::types::socket_id::SocketId;
use crate::types::sorted_map::SortedMap;
use crate::types::time::{Time, earlier};
use crate::types::user::ParkHistory;
use crate::wire::parked_message::inbox::{Arrival, Inbox};
use crate::wire::parked_message::{MAX_CONNECTIONS, MAX_LENGTH, ParkedMessage};

/// The requested size of the stream's send buffer, in bytes.
///
/// Linux doubles the size, and charges about 1 KiB for a message of up to 64 connections. About 500
/// connections are therefore on their way to a successor that does not read. With a larger buffer,
/// such a successor could use up the number of descriptors that may be in flight, and no connection
/// could be dispatched to workers either (`ETOOMANYREFS` in unix(7)). A smaller buffer costs more
/// context switches.
const SEND_BUFFER: i32 = 4096;

/// The maximum number of reads from a predecessor before the loop serves other descriptors. A
/// message takes two reads.
///
/// A larger number delays workers and clients for longer. A smaller one costs more polls.
const READS_PER_ITERATION: usize = 8;

const PASS: &str = "pass connections to another master";
const RECEIVE: &str = "receive connections from another master";

/// A connection that waits until it is passed.
#[derive(Clone, Copy, Debug)]
pub(super) struct ToPass {
    pub(super) id: ConnectionId,
    pub(super) handle: HandleId,
    pub(super) history: ParkHistory,
}

/// A message that has not been written completely.
#[derive(Debug)]
struct Message {
    /// The bytes that have not been written.
    rest: Vec<u8>,
    connections: Vec<ConnectionId>,
    /// Whether any bytes have been written. The descriptors are sent with the first byte.
    is_begun: bool,
}

/// Whether the next message can be sent.
///
/// | from | event | to |
/// |---|---|---|
/// | `Ready` | the stream's buffer is full | `Full` |
/// | `Full` | the stream is writable | `Ready` |
/// | `Ready` | the system lacks a resource | `BackingOff` |
/// | `BackingOff` | the back-off delay ends | `Ready` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SendState {
    Ready,
    Full,
    /// The next attempt is at this time.
    BackingOff(Time),
}

/// The master that takes over from this one.
#[derive(Debug)]
pub(super) struct Successor {
    stream: Registered<UnixStream>,
    /// The identity of each listening socket. It stays here after the socket is closed, because
    /// workers park connections even then.
    socket_ids: SortedMap<HandleId, SocketId>,
    queue: VecDeque<ToPass>,
    message: Option<Message>,
    state: SendState,
    /// The time at which this master stops passing connections.
    deadline: Time,
}

/// The result of an attempt to send.
enum Sent {
    /// These connections have been sent.
    Message(Vec<ConnectionId>),
    /// A part of a message has been sent.
    Part,
    /// The connection cannot be sent, because its listener was unknown when the passing began.
    Unsendable(ConnectionId),
    /// There is nothing to send.
    Nothing,
}

impl Successor {
    pub(super) fn number(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.message.is_none()
    }

    /// Sends the next message, or the rest of an incomplete one.
    fn send(&mut self, held: &HeldConnections) -> io::Result<Sent> {
        if self.message.is_none() {
            let Some(&ToPass { id, handle, .. }) = self.queue.front() else {
                return Ok(Sent::Nothing);
            };
            let Some(&socket) = self.socket_ids.get(&handle) else {
                self.queue.pop_front();
                return Ok(Sent::Unsendable(id));
            };
            self.message = Some(self.next_message(handle, socket));
        }
        let Some(message) = &mut self.message else {
            return Ok(Sent::Nothing);
        };
        let connections = message.connections.iter().filter(|_| !message.is_begun);
        let fds = connections.filter_map(|id| held.get(*id));
        let fds: Vec<_> = fds.map(|connection| connection.as_fd()).collect();
        let written = sys::socket::send(&self.stream, &message.rest, &fds)?;
        message.is_begun = true;
        message.rest.drain(..written);
        match self.message.take_if(|message| message.rest.is_empty()) {
            Some(message) => Ok(Sent::Message(message.connections)),
            None => Ok(Sent::Part),
        }
    }

    /// Takes connections of one listener out of the queue.
    fn next_message(&mut self, handle: HandleId, socket: SocketId) -> Message {
        let first = self.queue.iter().take(MAX_CONNECTIONS);
        let count = first.take_while(|passed| passed.handle == handle).count();
        let passed = (0..count).filter_map(|_| self.queue.pop_front());
        let (connections, histories) = passed.map(|passed| (passed.id, passed.history)).unzip();
        Message {
            rest: ParkedMessage { socket, histories }.encode(),
            connections,
            is_begun: false,
        }
    }
}

// Passing connections.
impl MasterShell {
    /// Passes all connections that no worker has, and all that workers park from now on, to another
    /// master, until `deadline` has passed.
    pub(crate) fn pass_parked(&self, stream: UnixStream, deadline: Duration) -> Result<()> {
        let prepared = stream.set_nonblocking(true);
        let prepared = prepared.and_then(|()| sys::socket::set_send_buffer(&stream, SEND_BUFFER));
        prepared.map_err(Error::io(PASS))?;
        let stream = self.poller.add(stream, Token::Successor.key(), None);
        let stream = stream.and_then(|stream| stream.watch_hang_up().map(|()| stream));
        let stream = stream.map_err(Error::io(PASS))?;
        // Carry out the actions for a previous successor before there is a new one.
        self.end_passing(None);
        self.act();
        let mut socket_ids = SortedMap::new();
        for (handle, own) in self.sockets.borrow().iter() {
            let socket = own.sockets.first();
            let id = socket.map(|socket| sys::file::socket_id(socket.as_fd()));
            if let Some(Ok(id)) = id {
                socket_ids.insert(*handle, id);
            }
        }
        self.successor.replace(Some(Successor {
            stream,
            socket_ids,
            queue: VecDeque::new(),
            message: None,
            state: SendState::Ready,
            deadline: self.start.elapsed().saturating_add(deadline),
        }));
        self.core_now().pass_parked();
        self.act();
        Ok(())
    }

    /// Returns whether connections wait to be passed, or may still arrive from a master whose
    /// connections are passed on.
    pub(crate) fn is_passing(&self) -> bool {
        let successor = self.successor.borrow();
        let has_predecessor = self.predecessors.get() > 0;
        successor
            .as_ref()
            .is_some_and(|successor| has_predecessor || !successor.is_empty())
    }

    /// Puts a connection into the queue to the successor. If the shell does not keep the connection
    /// yet, it is in `connection`.
    pub(super) fn pass(&self, passed: ToPass, connection: Option<NoLingerFd>) {
        if let Some(connection) = connection {
            let key = Token::Parked(passed.id.0).key();
            match self.poller.add(connection, key, None) {
                Ok(connection) => self.held.borrow_mut().insert(passed.id, connection),
                Err(_) => return self.core_now().not_passed(passed.id),
            }
        }
        if self.held.borrow().get(passed.id).is_none() {
            // The connection could not be held, for instance for lack of memory.
            return self.core_now().not_passed(passed.id);
        }
        // If there is no successor any longer, this master already holds the connection again.
        if let Some(successor) = &mut *self.successor.borrow_mut() {
            successor.queue.push_back(passed);
        }
    }

    /// Sends the next message to the successor. Returns whether there may be new actions or more to
    /// send.
    pub(super) fn pass_next(&self) -> bool {
        let mut successor = self.successor.borrow_mut();
        let ready = successor.as_mut();
        let Some(ready) = ready.filter(|successor| successor.state == SendState::Ready) else {
            return false;
        };
        let failure = match ready.send(&self.held.borrow()) {
            Ok(Sent::Nothing) => return false,
            Ok(Sent::Part) => return true,
            Ok(Sent::Message(connections)) => {
                let mut core = self.core.borrow_mut();
                connections.into_iter().for_each(|id| core.passed(id));
                return true;
            }
            Ok(Sent::Unsendable(connection)) => {
                self.core.borrow_mut().not_passed(connection);
                return true;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ready.state = SendState::Full;
                match ready.stream.set_interest(Some(Interest::Writable)) {
                    Ok(()) => return false,
                    Err(error) => error,
                }
            }
            Err(error) if sys::socket::is_exhaustion(&error) => {
                let until = self.start.elapsed().saturating_add(BACKOFF);
                ready.state = SendState::BackingOff(until);
                return false;
            }
            Err(error) => error,
        };
        drop(successor);
        self.end_passing(Some(failure));
        true
    }

    /// Handles a successor that the poller has reported as writable or as hung up.
    pub(crate) fn successor_ready(&self) {
        let mut successor = self.successor.borrow_mut();
        let Some(ready) = &mut *successor else {
            return;
        };
        let result = match sys::poll::has_hung_up(ready.stream.as_fd()) {
            Ok(true) => Err(io::ErrorKind::BrokenPipe.into()),
            Ok(false) => ready.stream.watch_hang_up(),
            Err(error) => Err(error),
        };
        ready.state = SendState::Ready;
        drop(successor);
        if let Err(reason) = result {
            self.end_passing(Some(reason));
        }
        self.carry_out_actions();
    }

    /// Returns the time by which `tick_passing` must be called.
    pub(super) fn passing_deadline(&self) -> Option<Time> {
        let successor = self.successor.borrow();
        let successor = successor.as_ref()?;
        let retry = match successor.state {
            SendState::BackingOff(until) => Some(until),
            SendState::Ready | SendState::Full => None,
        };
        earlier(Some(successor.deadline), retry)
    }

    /// Sends again after a back-off, or stops passing connections at the deadline.
    pub(super) fn tick_passing(&self, now: Time) {
        let mut successor = self.successor.borrow_mut();
        let Some(due) = &mut *successor else {
            return;
        };
        if due.deadline <= now {
            drop(successor);
            return self.end_passing(Some(io::ErrorKind::TimedOut.into()));
        }
        if matches!(due.state, SendState::BackingOff(until) if until <= now) {
            due.state = SendState::Ready;
            drop(successor);
            self.carry_out_actions();
        }
    }

    /// Stops passing connections. This master holds those again that have not been passed. Reports
    /// `reason` if any connection still waited to be passed.
    fn end_passing(&self, reason: Option<io::Error>) {
        let Some(successor) = self.successor.take() else {
            return;
        };
        let mut core = self.core_now();
        core.end_passing();
        if let Some(reason) = reason.filter(|_| !successor.is_empty()) {
            let attempt = PASS;
            core.error(None, Error::Io { attempt, reason });
        }
    }
}

// Receiving connections.
impl MasterShell {
    pub(crate) fn add_predecessor(&self) {
        self.predecessors.set(self.predecessors.get() + 1);
    }

    pub(crate) fn remove_predecessor(&self) {
        self.predecessors.set(self.predecessors.get() - 1);
    }

    /// Receives connections from a predecessor. Returns `false` at end-of-file.
    pub(crate) fn receive_parked(&self, stream: &UnixStream, inbox: &mut Inbox) -> bool {
        for _ in 0..READS_PER_ITERATION {
            let mut buffer = [0; MAX_LENGTH];
            let buffer = &mut buffer[..inbox.missing()];
            let piece = match sys::socket::receive(stream.as_fd(), buffer) {
                Ok(piece) => piece,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) => {
                    self.report_io(RECEIVE, error);
                    self.lose(inbox.take_fds());
                    return false;
                }
            };
            if piece.lost_fds {
                let error = Error::no_descriptors(None);
                self.core.borrow_mut().error(None, error);
            }
            if piece.bytes == 0 {
                self.lose(inbox.take_fds());
                return false;
            }
            match inbox.push(&buffer[..piece.bytes], piece.fds) {
                Arrival::Incomplete => {}
                Arrival::Complete(message, fds) => self.hold_received(&message, fds),
                Arrival::Invalid(fds) => {
                    let reason = "invalid message";
                    let reason = io::Error::new(io::ErrorKind::InvalidData, reason);
                    self.report_io(RECEIVE, reason);
                    self.lose(fds);
                }
                Arrival::Discarded(fds) => self.lose(fds),
            }
        }
        true
    }

    /// Holds the connections of a message.
    fn hold_received(&self, message: &ParkedMessage, fds: Vec<NoLingerFd>) {
        let handle = self.listener_with(message.socket);
        // If this process had too few free descriptors, the kernel has delivered the message's
        // first descriptors and closed the others.
        self.core_now()
            .lost_parked(message.histories.len().saturating_sub(fds.len()));
        let mut histories = message.histories.iter();
        for connection in fds {
            match histories.next() {
                Some(history) if sys::connection::is_connection(connection.as_fd()) => {
                    let mut core = self.core_now();
                    self.check_surplus(&mut core);
                    core.receive_parked(handle, connection, *history);
                }
                _ => self.lose(vec![connection]),
            }
        }
    }

    /// Closes received descriptors that this master cannot use, and counts them as closed
    /// connections.
    fn lose(&self, fds: Vec<NoLingerFd>) {
        self.core_now().lost_parked(fds.len());
    }

    /// Returns the listener with this socket. Returns `None` if there is none, or if several
    /// sockets have the same identity, which happens on a system that does not identify sockets.
    fn listener_with(&self, id: SocketId) -> Option<HandleId> {
        let sockets = self.sockets.borrow();
        let mut found = sockets.iter().filter(|(_, own)| {
            let mut sockets = own.sockets.iter();
            sockets.any(|socket| sys::file::socket_id(socket.as_fd()).is_ok_and(|own| own == id))
        });
        let (handle, _) = found.next()?;
        found.next().is_none().then_some(*handle)
    }
}
