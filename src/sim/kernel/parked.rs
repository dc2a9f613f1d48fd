//! Simulates the idle connections that workers hold, and how the master gives them to workers.

use super::process::Received;
use super::socket::{Client, Connection, Fate};
use super::{Failure, KNOWN, World};
use crate::core::master::Handoff;
use crate::core::worker::{Held, ListenerId};
use crate::types::worker_id::WorkerId;
use crate::wire::frame::{HandleId, ToMaster, ToWorker};

// The connections that a worker holds while their clients send nothing.
impl World {
    /// Keeps a connection that the application has parked, or that the master has given to the
    /// worker.
    pub(super) fn keep(&mut self, worker: WorkerId, held: Held, client: Client) {
        let process = self.process(worker);
        if let Held::Idle(id) | Held::Leaving(id) = held {
            let previous = process.parked.insert(id, client);
            assert!(previous.is_none(), "a second connection with one number");
        }
        self.gather_from_worker(worker);
    }

    /// Makes the worker's poller report the connections whose clients have sent something or have
    /// hung up.
    pub(super) fn poll_parked(&mut self, worker: WorkerId) {
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        for (id, connection) in &process.parked {
            let fate = self.fates[connection.client as usize];
            if fate.is_pending {
                process.core.data_arrived(*id);
            } else if fate.left {
                process.core.idle_hung_up(*id);
            }
        }
        process.core.expire_parked(self.now);
        self.gather_from_worker(worker);
    }

    /// Resumes the listener's next connection whose client has sent something. Returns whether
    /// there was one.
    pub(super) fn resume_parked(&mut self, worker: WorkerId, listener: ListenerId) -> bool {
        let process = self.process(worker);
        let Some((id, parked)) = process.core.next_resumed(listener) else {
            return false;
        };
        let client = process.parked.remove(&id).expect("a parked connection");
        process.core.connection_opened(listener);
        let received = Received {
            client,
            listener,
            handle: process.shared.get(&listener).copied(),
            resumed: None,
            parked,
        };
        self.hold(worker, received);
        true
    }

    /// Sends the connections that leave the worker to the master.
    pub(super) fn hand_over(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        while let Some(leaving) = process.core.next_leaving() {
            let client = process.parked.remove(&leaving.id);
            let frame = ToMaster::Park {
                handle: leaving.handle,
                parked: leaving.parked,
            };
            let client = client.expect("a parked connection");
            process.up.queue_connection(frame, client);
            process.is_unflushed = true;
        }
    }
}

// The master's side.
impl World {
    /// Gives an idle connection to a worker. If `failing` contains `Send`, the worker's channel has
    /// no space for the connection.
    pub(super) fn give(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        connection: Handoff<Client>,
        parked: u32,
    ) {
        let client = match connection {
            Handoff::New(client) => Some(client),
            Handoff::Held(resumed) => {
                let held = self.held.remove(&resumed.connection);
                held.and_then(|held| held.copy)
            }
        };
        let is_full = self.failing.remove(&Failure::Send);
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        match client {
            Some(client) if is_full || !process.master_end => {
                self.report(|core| core.not_adopted(handle, client, parked));
            }
            Some(client) => {
                let frame = ToWorker::Adopt { handle, parked };
                process.down.queue_connection(frame, client);
                self.given_in_vain += usize::from(!process.worker_end);
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
        let parked = u32::from(fate.served);
        self.served += u64::from(fate.served);
        self.report(|core| core.receive_parked(Some(handle), connection, parked));
    }
}
