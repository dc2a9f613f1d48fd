//! The connections that the master holds while their clients send nothing.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd};

use super::{Core, MasterShell};
use crate::core::master::HandOff;
use crate::error::Error;
use crate::runtime::token::Token;
use crate::sys;
use crate::sys::connection::IdleEvent;
use crate::sys::fd::NoLingerFd;
use crate::sys::poll::Registered;
use crate::types::connection_id::{ConnectionId, ConnectionMap};
use crate::types::handle::HandleId;
use crate::types::user::ParkHistory;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::ToWorker;
use crate::wire::frame::header::MAX_BATCH;

/// The connections that the master holds.
pub(super) type HeldConnections = ConnectionMap<Registered<NoLingerFd>>;

/// Returns the descriptor of a connection on its way to a worker. Returns `None` if the master no
/// longer holds the connection.
pub(super) fn descriptor_of<'a>(
    held: &'a HeldConnections,
    hand_off: &'a HandOff<NoLingerFd>,
) -> Option<BorrowedFd<'a>> {
    match hand_off {
        HandOff::New(connection) => Some(connection.as_fd()),
        HandOff::Held(resumed) => held.get(resumed.connection).map(|held| held.as_fd()),
    }
}

impl MasterShell {
    /// Keeps a connection, and makes the poller report once that its client has sent something or
    /// has hung up.
    pub(super) fn hold(&self, id: ConnectionId, connection: NoLingerFd) {
        let added = self.poller.add(connection, Token::Parked(id.0).key(), None);
        let added = added.and_then(|connection| connection.await_once().map(|()| connection));
        match added {
            Ok(connection) => self.held.borrow_mut().insert(id, connection),
            Err(reason) => self.not_held(id, reason),
        }
    }

    /// Makes the poller report once more that the client of a held connection has sent something or
    /// has hung up.
    pub(super) fn await_data(&self, id: ConnectionId) {
        let held = self.held.borrow();
        // The connection is missing if it could not be held earlier.
        let missing = || Err(io::ErrorKind::NotFound.into());
        let awaited = held.get(id).map_or_else(missing, Registered::await_once);
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
        self.held.borrow_mut().remove(id);
    }

    /// Sends an idle connection to a worker. If the worker has not read the earlier connections
    /// that were sent to it, returns the connection to the core.
    pub(super) fn move_parked(
        &self,
        handle: HandleId,
        worker: WorkerId,
        connection: HandOff<NoLingerFd>,
        history: ParkHistory,
    ) {
        let connection = match connection {
            HandOff::New(connection) => Some(connection),
            HandOff::Held(resumed) => {
                let held = self.held.borrow_mut().remove(resumed.connection);
                held.map(Registered::into_source)
            }
        };
        let Some(connection) = connection else {
            return;
        };
        let mut has_space = self.has_space_for_fd(worker);
        if !has_space {
            self.unflushed.borrow_mut().push_back(worker);
            self.flush();
            has_space = self.has_space_for_fd(worker);
        }
        let worker_io = self.worker_io(worker).filter(|_| has_space);
        match worker_io {
            Some(worker_io) => {
                let frame = ToWorker::MoveParked {
                    handle,
                    times_parked: history.times,
                };
                let fd = connection.into_owned_fd();
                worker_io.channel.queue(&frame, Some(fd));
                self.unflushed.borrow_mut().push_back(worker);
            }
            None => self.core_now().not_moved(handle, connection, history),
        }
    }

    /// Returns whether the worker's channel accepts another protocol frame with a descriptor
    /// without the risk that the worker is disconnected.
    fn has_space_for_fd(&self, worker: WorkerId) -> bool {
        let worker_io = self.worker_io(worker);
        let queued = worker_io.and_then(|worker_io| worker_io.channel.frames_with_fd());
        queued.is_some_and(|queued| queued < MAX_BATCH)
    }

    /// Handles a held connection that the poller has reported.
    pub(crate) fn held_ready(&self, number: u32) {
        let id = ConnectionId(number);
        let is_held = self.held.borrow().get(id).is_some();
        if is_held && !self.check_client(&mut self.core_now(), id) {
            self.await_data(id);
        }
    }

    /// Reports to the core whether the client of a held connection has sent something or has hung
    /// up. Returns `false` if the client has done neither.
    pub(super) fn check_client(&self, core: &mut Core, id: ConnectionId) -> bool {
        let held = self.held.borrow();
        let event = held
            .get(id)
            .map(|held| sys::connection::idle_event(held.as_fd()));
        match event {
            None | Some(IdleEvent::Nothing) => return false,
            Some(IdleEvent::Data) => core.data_arrived(id),
            Some(IdleEvent::HangUp) => core.idle_hung_up(id),
        }
        true
    }

    /// Checks the connections that may have to close if the master holds another one. The poller
    /// may not have reported yet that their clients have sent something.
    pub(super) fn check_surplus(&self, core: &mut Core) {
        let mut checked = None;
        while let Some(id) = core.next_surplus().filter(|id| Some(*id) != checked) {
            self.check_client(core, id);
            checked = Some(id);
        }
    }

    /// Returns the address of the client of a connection on its way to a worker.
    pub(crate) fn peer_addr(&self, hand_off: &HandOff<NoLingerFd>) -> Option<SocketAddr> {
        let held = self.held.borrow();
        descriptor_of(&held, hand_off).and_then(sys::connection::peer_addr)
    }

    /// Returns whether the client of a connection on its way to a worker is gone.
    pub(super) fn is_gone(&self, hand_off: &HandOff<NoLingerFd>) -> bool {
        let held = self.held.borrow();
        let descriptor = descriptor_of(&held, hand_off);
        descriptor.is_none_or(sys::connection::is_closed_by_peer)
    }
}
