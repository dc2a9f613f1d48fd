//! Simulates the idle connections that a worker holds.

use super::World;
use crate::core::worker::{Held, ListenerId};
use crate::sim::kernel::KNOWN;
use crate::sim::kernel::process::Received;
use crate::sim::kernel::socket::Client;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::ToMaster;

impl World {
    /// Keeps a connection that the application has parked, or that the master has moved to the
    /// worker.
    pub(super) fn keep(&mut self, worker: WorkerId, held: Held, client: Client) {
        self.fates[client.client as usize].is_in_worker = true;
        let process = self.process(worker);
        if let Held::Idle(id) | Held::Leaving(id) = held {
            let previous = process.parked.insert(id, client);
            assert!(previous.is_none(), "a second connection with one number");
        }
        self.gather_from_worker(worker);
    }

    /// Holds a new connection until its client sends something, if the listener waits for data and
    /// the client has sent nothing yet. Returns a connection that the application receives now.
    pub(super) fn hold_if_silent(
        &mut self,
        worker: WorkerId,
        listener: ListenerId,
        client: Client,
    ) -> Option<Client> {
        let fate = &self.fates[client.client as usize];
        let is_silent = !fate.is_pending && !fate.left;
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        if !is_silent || !process.core.holds_silent(listener) {
            return Some(client);
        }
        let handle = process.core.handle(listener);
        let held = process.core.hold(listener, handle, 0, self.now);
        self.keep(worker, held, client);
        None
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
                process.core.hung_up(*id);
            }
        }
        self.poll_lingering(worker);
        let now = self.now;
        self.process(worker).core.expire_parked(now);
        self.gather_from_worker(worker);
        self.check_expired_lingering(worker);
    }

    /// Resumes the listener's next connection whose client has sent something. Returns whether
    /// there was one.
    pub(super) fn resume_parked(&mut self, worker: WorkerId, listener: ListenerId) -> bool {
        let process = self.process(worker);
        let Some((id, times_parked)) = process.core.next_resumed(listener) else {
            return false;
        };
        let client = process.parked.remove(&id).expect("a parked connection");
        process.core.connection_opened(listener);
        let received = Received {
            client,
            listener,
            handle: process.shared.get(&listener).copied(),
            resumed: None,
            times_parked,
        };
        self.hold(worker, received);
        true
    }

    /// Sends the connections that leave the worker to the master.
    pub(super) fn send_leaving(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        while let Some(leaving) = process.core.next_leaving() {
            let client = process.parked.remove(&leaving.id);
            let frame = ToMaster::Park {
                handle: leaving.handle,
                times_parked: leaving.times_parked,
            };
            let client = client.expect("a parked connection");
            process.up.queue_connection(frame, client);
            process.is_unflushed = true;
        }
    }
}
