//! Simulates the idle connections that the master holds, moves to workers, or passes to the next
//! master.

use crate::core::master::{HandOff, Resumed};
use crate::sim::kernel::socket::{Client, Connection, Fate, Held, Location};
use crate::sim::kernel::{Failure, KNOWN, World};
use crate::types::connection_id::ConnectionId;
use crate::types::handle::HandleId;
use crate::types::user::ParkHistory;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::ToWorker;

impl World {
    /// Returns whether the client of a connection on its way to a worker has hung up.
    pub(crate) fn is_gone(&self, hand_off: &HandOff<Client>) -> bool {
        let client = match hand_off {
            HandOff::New(connection) => Some(connection.client),
            HandOff::Held(Resumed { connection, .. }) => {
                self.held.get(connection).and_then(Held::client)
            }
        };
        client.is_none_or(|client| self.fates[client as usize].left)
    }

    /// Carries out `Action::Hold`: stores the connection and marks it as waiting for data. If
    /// `failing` contains `Hold`, reports instead that it cannot be watched.
    pub(super) fn hold_connection(&mut self, id: ConnectionId, connection: Client) {
        let is_failing = self.failing.remove(&Failure::Hold);
        let held = Held {
            copy: (!is_failing).then_some(connection),
            is_awaited: !is_failing,
            is_unwatched: is_failing,
            location: Location::Master,
            since: self.now,
        };
        let previous = self.held.insert(id, held);
        assert!(previous.is_none(), "a second connection with one number");
        assert!(self.held.len() <= self.parked_limit_max, "holds too many");
        if is_failing {
            // Allow for one unexplained close (see `check_closing`). If the master has accepted
            // more connections at once than it may hold, it may already have assigned this number to
            // another connection, and `not_held` closes that one.
            self.failed_holds += 1;
            self.report(|core| core.not_held(id));
        }
    }

    pub(super) fn await_data(&mut self, id: ConnectionId) {
        let now = self.now;
        let held = self.held.get_mut(&id).expect("a held connection");
        held.location = Location::Master;
        held.since = now;
        self.watch_held(id);
    }

    /// Makes the poller watch a held connection. If `failing` contains `Hold`, this fails.
    fn watch_held(&mut self, id: ConnectionId) {
        let is_failing = self.failing.remove(&Failure::Hold);
        let held = self.held.get_mut(&id).expect("a held connection");
        held.is_awaited = !is_failing;
        held.is_unwatched = is_failing;
        if is_failing {
            self.report(|core| core.not_held(id));
        }
    }

    /// Puts a connection into the stream to the other master.
    pub(super) fn pass_connection(&mut self, id: ConnectionId, connection: Option<Client>) {
        if connection.is_some() {
            let held = Held {
                copy: connection,
                is_awaited: false,
                is_unwatched: false,
                location: Location::Master,
                since: self.now,
            };
            let previous = self.held.insert(id, held);
            assert!(previous.is_none(), "a second connection with one number");
            assert!(self.held.len() <= self.parked_limit_max, "holds too many");
        }
        let held = self.held.get_mut(&id).expect("a held connection");
        held.location = Location::Master;
        if held.copy.is_none() {
            self.report(|core| core.not_passed(id));
        } else if self.has_successor {
            assert!(!self.passing.contains(&id), "passed twice");
            self.passing.push_back(id);
        }
    }

    /// Makes the other master read a connection from the stream.
    pub(crate) fn successor_reads(&mut self) {
        if let Some(id) = self.passing.pop_front() {
            let held = self.held.get_mut(&id).expect("a held connection");
            held.location = Location::Detached;
            self.passed.extend(held.client());
            self.report(|core| core.passed(id));
        }
    }

    pub(super) fn close_held(&mut self, id: ConnectionId) {
        let held = self.held.remove(&id).expect("a held connection");
        self.check_closing(&held);
    }

    /// Makes the master handle a held connection that its poller has reported, as the shell does.
    /// The event may belong to an earlier connection with the same number.
    pub(crate) fn held_ready(&mut self, id: ConnectionId) {
        let Some(held) = self.held.get_mut(&id) else {
            return;
        };
        held.is_awaited = false;
        if held.client().is_some() && !self.check_client(id) {
            self.watch_held(id);
        }
    }

    /// Reports whether the client of a held connection has sent something or has hung up. Returns
    /// `false` if the client has done neither.
    pub(in super::super) fn check_client(&mut self, id: ConnectionId) -> bool {
        let Some(client) = self.held.get(&id).and_then(Held::client) else {
            return false;
        };
        let fate = self.fates[client as usize];
        if fate.is_pending {
            self.report(|core| core.data_arrived(id));
        } else if fate.left {
            self.report(|core| core.idle_hung_up(id));
        }
        fate.is_pending || fate.left
    }

    /// Checks the connections that may have to close if the master holds another one.
    pub(super) fn check_surplus(&mut self) {
        let mut checked = None;
        while let Some(id) = self.master.next_surplus().filter(|id| Some(*id) != checked) {
            self.check_client(id);
            checked = Some(id);
        }
    }

    /// Moves an idle connection to a worker. If `failing` contains `Send`, the worker's channel has
    /// no space for the connection.
    pub(super) fn move_parked(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        connection: HandOff<Client>,
        history: ParkHistory,
    ) {
        let client = match connection {
            HandOff::New(client) => Some(client),
            HandOff::Held(resumed) => {
                let held = self.held.remove(&resumed.connection);
                held.and_then(|held| held.copy)
            }
        };
        let is_full = self.failing.remove(&Failure::Send);
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        match client {
            Some(client) if is_full || !process.master_end => {
                self.report(|core| core.not_moved(handle, client, history));
            }
            Some(client) => {
                self.fates[client.client as usize].is_in_worker = true;
                let frame = ToWorker::MoveParked {
                    handle,
                    times_parked: history.times,
                };
                process.down.queue_connection(frame, client);
                self.moved_to_exited += usize::from(!process.worker_end);
                self.unflushed.insert(worker);
                self.received += 1;
            }
            None => self.received += 1,
        }
    }

    /// Receives a connection that another master has passed for the listener. `fate` describes the
    /// client.
    pub(crate) fn receive_passed(&mut self, handle: HandleId, fate: Fate) {
        let client = u32::try_from(self.fates.len()).expect("few clients");
        self.fates.push(Fate {
            port: Some(handle),
            is_closed: false,
            ..fate
        });
        let connection = Connection::new(client, &self.closed);
        let history = ParkHistory {
            times: u32::from(fate.served),
            by: fate.had_by,
        };
        self.served += u64::from(fate.served);
        self.check_surplus();
        self.report(|core| core.receive_parked(Some(handle), connection, history));
    }
}
