//! The connections that the master holds while their clients send nothing.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use super::MasterShell;
use crate::core::master::Handoff;
use crate::error::Error;
use crate::runtime::event_loop::Token;
use crate::sys;
use crate::sys::fd::NoLingerFd;
use crate::sys::poll::Registered;
use crate::types::connection_id::ConnectionId;

/// The connections that the master holds. The connection with the number `n` is at the index `n`.
pub(super) type HeldConnections = Vec<Option<Registered<NoLingerFd>>>;

/// Returns the held connection with this id.
pub(super) fn find(held: &HeldConnections, id: ConnectionId) -> Option<&Registered<NoLingerFd>> {
    held.get(id.0 as usize)?.as_ref()
}

/// Returns the descriptor of a connection on its way to a worker. Returns `None` if the master no
/// longer holds the connection.
pub(super) fn descriptor_of<'a>(
    held: &'a HeldConnections,
    handoff: &'a Handoff<NoLingerFd>,
) -> Option<BorrowedFd<'a>> {
    match handoff {
        Handoff::New(connection) => Some(connection.as_fd()),
        Handoff::Held(resumed) => find(held, resumed.connection).map(|held| held.as_fd()),
    }
}

impl MasterShell {
    /// Keeps a connection, and waits once until its client sends something or hangs up.
    pub(super) fn hold(&self, id: ConnectionId, connection: NoLingerFd) {
        let added = self.poller.add(connection, Token::Parked(id.0).key(), None);
        let added = added.and_then(|connection| connection.await_once().map(|()| connection));
        match added {
            Ok(connection) => self.keep(id, connection),
            Err(reason) => self.not_held(id, reason),
        }
    }

    pub(super) fn keep(&self, id: ConnectionId, connection: Registered<NoLingerFd>) {
        let mut held = self.held.borrow_mut();
        let at = id.0 as usize;
        if held.len() <= at {
            held.resize_with(at + 1, || None);
        }
        held[at] = Some(connection);
    }

    /// Waits again until the client of a held connection sends something or hangs up.
    pub(super) fn await_data(&self, id: ConnectionId) {
        let held = self.held.borrow();
        // The connection is missing if it could not be held earlier.
        let missing = || Err(io::ErrorKind::NotFound.into());
        let awaited = find(&held, id).map_or_else(missing, Registered::await_once);
        drop(held);
        if let Err(reason) = awaited {
            self.not_held(id, reason);
        }
    }

    fn not_held(&self, id: ConnectionId, reason: io::Error) {
        let mut core = self.core_now();
        core.not_held(id);
        let attempt = "hold a parked connection";
        core.error(None, Error::Io { attempt, reason });
    }

    pub(super) fn close_held(&self, id: ConnectionId) {
        let mut held = self.held.borrow_mut();
        if let Some(connection) = held.get_mut(id.0 as usize) {
            *connection = None;
        }
        if !self.core.borrow().holds_any() {
            // Return the memory after a peak.
            *held = Vec::new();
        }
    }

    /// Handles a held connection that the poller has reported.
    pub(crate) fn held_ready(&self, number: u32) {
        let id = ConnectionId(number);
        let held = self.held.borrow();
        let Some(connection) = find(&held, id) else {
            return;
        };
        let peeked = sys::fd::peek(connection.as_fd().as_raw_fd(), &mut [0]);
        drop(held);
        match peeked {
            Ok(0) => self.core_now().idle_hung_up(id),
            Ok(_) => self.core_now().data_arrived(id),
            // The event belonged to an earlier connection with this number.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.await_data(id),
            Err(_) => self.core_now().idle_hung_up(id),
        }
    }

    /// Returns the address of the client of a connection on its way to a worker.
    pub(crate) fn peer_addr(&self, handoff: &Handoff<NoLingerFd>) -> Option<SocketAddr> {
        let held = self.held.borrow();
        descriptor_of(&held, handoff).and_then(sys::listen::peer_addr)
    }

    /// Returns whether the client of a connection on its way to a worker is gone.
    pub(super) fn is_gone(&self, handoff: &Handoff<NoLingerFd>) -> bool {
        let held = self.held.borrow();
        let descriptor = descriptor_of(&held, handoff);
        descriptor.is_none_or(sys::fd::is_closed_by_peer)
    }
}
