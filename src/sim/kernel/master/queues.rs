//! Simulates the queues through which the master dispatches connections to workers.

use crate::core::dispatch::{DispatchFailure, MAX_WINDOW, Sequenced};
use crate::core::master::{HandOff, QueueState};
use crate::sim::kernel::socket::{Client, Location, QUEUE_CAPACITY, Queue, Queued};
use crate::sim::kernel::{BACKOFF, Failure, KNOWN, World};
use crate::types::handle::HandleId;
use crate::types::worker_id::WorkerId;

/// The connections that the master has reclaimed from a queue.
type Reclaimed = Vec<Sequenced<HandOff<Client>>>;

impl World {
    pub(super) fn dispatch(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        connection: Sequenced<HandOff<Client>>,
        has_waited: bool,
    ) {
        if has_waited && self.is_gone(&connection.connection) {
            return self.report(|core| core.hung_up(handle, worker, connection.connection));
        }
        let failure = match self.failing.remove(&Failure::Send) {
            true => DispatchFailure::Exhausted,
            false => DispatchFailure::QueueUnusable,
        };
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        let queue = self.queues.get_mut(&(handle, worker));
        let is_unshared = self.unshared.contains(&(handle, worker));
        assert!(queue.is_some() || is_unshared, "dispatched to no queue");
        let has_space = |queue: &&mut Queue| {
            failure == DispatchFailure::QueueUnusable
                && !queue.is_shut
                && queue.connections.len() < QUEUE_CAPACITY
        };
        let Some(queue) = queue.filter(has_space) else {
            return self.report(|core| core.not_dispatched(handle, worker, connection, failure));
        };
        let (client, resumed) = match connection.connection {
            HandOff::New(client) => (client, None),
            HandOff::Held(resumed) => {
                let held = self
                    .held
                    .get_mut(&resumed.connection)
                    .expect("a held connection");
                held.location = Location::Worker(worker);
                let copy = held.copy.as_ref().expect("a copy");
                (Client::clone(copy), Some(resumed))
            }
        };
        queue.connections.push_back(Queued {
            sequence: connection.sequence,
            connection: client,
            resumed,
        });
        process.counters.dispatched += 1;
        let is_trusted = !process.is_liar || !self.has_false_claims;
        let is_within = queue.connections.len() <= MAX_WINDOW as usize;
        assert!(is_within || !is_trusted, "dispatched too far ahead");
    }

    /// Reclaims at most `at_most` connections from a queue. Returns the connections and the state of
    /// the queue, which is unknown if `failing` contains `Reclaim`. Returns `None` if the queue does
    /// not exist.
    fn take_back(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        at_most: usize,
    ) -> Option<(Reclaimed, QueueState)> {
        let is_failing = self.failing.remove(&Failure::Reclaim);
        let queue = self.queues.get_mut(&(handle, worker))?;
        let queued = queue.connections.len();
        let (count, state) = if is_failing {
            (at_most.min(queued / 2), QueueState::Unknown)
        } else if at_most > queued {
            (queued, QueueState::Empty)
        } else {
            (at_most, QueueState::PerhapsMore)
        };
        let reclaimed: Vec<_> = queue.connections.drain(..count).collect();
        for resumed in reclaimed.iter().filter_map(|queued| queued.resumed) {
            let held = self.held.get_mut(&resumed.connection);
            if let Some(held) = held.filter(|held| held.location == Location::Worker(worker)) {
                held.location = Location::Master;
            }
        }
        let reclaimed = reclaimed.into_iter().map(Queued::reclaim).collect();
        self.process(worker).counters.reclaimed += count;
        Some((reclaimed, state))
    }

    pub(super) fn reclaim(&mut self, handle: HandleId, worker: WorkerId, at_most: usize) {
        let Some((reclaimed, state)) = self.take_back(handle, worker, at_most) else {
            return;
        };
        if state == QueueState::Unknown {
            self.report(|core| core.cannot_reclaim(handle));
        }
        self.report(|core| core.reclaimed(handle, worker, reclaimed, state));
    }

    pub(super) fn count_queue(&mut self, handle: HandleId, worker: WorkerId) {
        let queue = self.queues.get(&(handle, worker));
        if let Some(queue) = queue.filter(|_| self.config.counts_queues) {
            let queued = queue.connections.len() as u64;
            self.report(|core| core.counted(handle, worker, queued));
        }
    }

    /// Reclaims all connections in a queue, and closes the queue. If reclaiming fails, schedules
    /// another attempt.
    pub(crate) fn close_queue(&mut self, handle: HandleId, worker: WorkerId) {
        match self.take_back(handle, worker, usize::MAX) {
            Some((reclaimed, state @ QueueState::Unknown)) => {
                self.unclosed.push((handle, worker));
                self.closes_at.get_or_insert(self.now + BACKOFF);
                self.report(|core| core.reclaimed(handle, worker, reclaimed, state));
            }
            outcome => {
                self.queues.remove(&(handle, worker));
                let reclaimed = outcome.map(|(reclaimed, _)| reclaimed).unwrap_or_default();
                self.report(|core| core.queue_closed(handle, worker, reclaimed));
            }
        }
    }

    /// Receives the first connection in the worker's queue.
    pub(crate) fn receive(&mut self, handle: HandleId, worker: WorkerId) -> Option<Queued> {
        let queue = self.queues.get_mut(&(handle, worker))?;
        let queued = queue.connections.pop_front()?;
        queue.received += 1;
        self.received += 1;
        Some(queued)
    }

    /// Receives the first connection in the worker's queue, without the knowledge of the worker's
    /// core.
    pub(crate) fn receive_secretly(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
    ) -> Option<Queued> {
        let queued = self.receive(handle, worker)?;
        let times_parked = queued.resumed.map_or(0, |resumed| resumed.times_parked);
        self.mark_served(
            worker,
            queued.connection.client,
            times_parked,
            queued.resumed.is_some(),
        );
        self.process(worker).counters.received += 1;
        Some(queued)
    }

    /// Returns the number of connections that a worker has received from its queue.
    pub(crate) fn count_received(&self, handle: HandleId, worker: WorkerId) -> u64 {
        let queue = self.queues.get(&(handle, worker));
        queue.map_or(0, |queue| queue.received)
    }

    /// Reports the length of every queue to the master's core.
    pub(crate) fn report_queue_lengths(&mut self) {
        let queues: Vec<_> = self.queues.keys().copied().collect();
        for (handle, worker) in queues {
            self.count_queue(handle, worker);
        }
    }
}
