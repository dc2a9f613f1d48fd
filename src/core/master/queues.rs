//! Dispatching connections to the workers' queues, and reclaiming them.

use super::accept::RETRY_DELAY;
use super::listener::Stage;
use super::{Action, HandOff, MasterCore};
use crate::core::dispatch::{DispatchFailure, Dispatched, Sequenced, Undispatched};
use crate::types::handle::HandleId;
use crate::types::worker_id::WorkerId;

/// The state of a queue after connections were reclaimed from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QueueState {
    /// The queue contains no connection.
    Empty,
    /// The requested number of connections was reclaimed, and the queue may contain more.
    PerhapsMore,
    /// The queue may contain connections but cannot be read, for instance because this process has
    /// no free descriptor.
    Unknown,
}

// Reports from the shell about queues.
impl<C, F> MasterCore<C, F> {
    /// Lets a connection that could not be put into the worker's queue wait again. Counts it as
    /// dropped if the worker has already parked or detached it.
    ///
    /// If the system is exhausted, none of the listener's connections is dispatched until
    /// `RETRY_DELAY` has passed. If the queue is unusable, nothing is dispatched to this worker until
    /// it reports that it is idle.
    pub(crate) fn not_dispatched(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        connection: Sequenced<HandOff<C>>,
        failure: DispatchFailure,
    ) {
        let still_waits = self.reclaim_hand_off(handle, &connection.connection, worker);
        let Some(listener) = self.listeners.get_mut(&handle) else {
            let waiting = still_waits.then_some(connection.connection);
            return self.drop_hand_offs(waiting.into_iter().collect());
        };
        self.ledger.dropped += u64::from(!still_waits);
        let user = self.parked.parked_by(&connection.connection);
        let connection = still_waits.then_some(Undispatched { connection, user });
        listener
            .dispatcher
            .not_dispatched(worker, connection, failure);
        if failure == DispatchFailure::Exhausted {
            self.dispatch_later(handle);
        }
        self.redistribute(handle);
    }

    /// Records that a client hung up before its connection reached the worker's queue.
    pub(crate) fn hung_up(&mut self, handle: HandleId, worker: WorkerId, connection: HandOff<C>) {
        self.ledger.closed_by_peer += 1;
        if self.parked.reclaim(&connection, worker) {
            self.close_hand_off(connection);
        }
        if let Some(listener) = self.listeners.get_mut(&handle) {
            listener.dispatcher.hung_up(worker);
            self.redistribute(handle);
        }
    }

    /// Delays further dispatching, because the shell lacks descriptors for reclaiming connections.
    pub(crate) fn cannot_reclaim(&mut self, handle: HandleId) {
        self.dispatch_later(handle);
    }

    /// Returns how many connections are on their way to the worker's queue, because the shell has
    /// not carried out their `Dispatch` actions.
    ///
    /// The dispatches that result from an `Accept` come after the actions that are already pending.
    /// A pending `Reclaim` or `CountQueued` is therefore carried out before them, and does not see
    /// their connections in the queue.
    pub(super) fn count_undelivered(&self, handle: HandleId, worker: WorkerId) -> u64 {
        let undelivered = self.actions.iter().filter(|action| {
            matches!(action, Action::Dispatch { handle: to, worker: of, .. } if (*to, *of) == (handle, worker))
        });
        undelivered.count() as u64
    }

    /// Lets connections that have been reclaimed from the worker's queue wait again. The queue is now
    /// in the given `state`.
    pub(crate) fn reclaimed(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        connections: Vec<Sequenced<HandOff<C>>>,
        state: QueueState,
    ) {
        let connections = self.keep_reclaimed(handle, worker, connections);
        let is_empty = state == QueueState::Empty;
        let undelivered = is_empty.then(|| self.count_undelivered(handle, worker));
        if let Some(listener) = self.listeners.get_mut(&handle) {
            let dispatcher = &mut listener.dispatcher;
            let received = dispatcher.reclaimed(worker, connections, undelivered);
            self.count_received(received);
            self.redistribute(handle);
        }
    }

    /// Records that `queued` connections are in the worker's queue.
    pub(crate) fn counted(&mut self, handle: HandleId, worker: WorkerId, queued: u64) {
        let queued = queued + self.count_undelivered(handle, worker);
        if let Some(listener) = self.listeners.get_mut(&handle) {
            let received = listener.dispatcher.counted(worker, queued);
            self.count_received(received);
            if received != 0 {
                // With a scheduler, the master may have been waiting for this capacity.
                self.accept_if_possible(handle);
                self.check_backlog_if_draining(handle);
            }
        }
    }

    /// Lets the connections of a worker's queue that has been closed wait again, and removes the
    /// worker from the listener.
    pub(crate) fn queue_closed(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        connections: Vec<Sequenced<HandOff<C>>>,
    ) {
        let connections = self.keep_reclaimed(handle, worker, connections);
        self.remove_member(handle, worker, connections);
    }
}

// Dispatching and reclaiming.
impl<C, F> MasterCore<C, F> {
    /// Adds `more` to the number of connections that are known to have been received. A negative
    /// number corrects an earlier count.
    pub(super) fn count_received(&mut self, more: i64) {
        self.ledger.received = self.ledger.received.saturating_add_signed(more);
    }

    fn dispatch_later(&mut self, handle: HandleId) {
        let from = self.now.saturating_add(RETRY_DELAY);
        if let Some(listener) = self.listeners.get_mut(&handle) {
            listener.dispatch_from.get_or_insert(from);
        }
    }

    /// Dispatches waiting connections until none waits or no worker has capacity. Does nothing
    /// while dispatching is delayed.
    pub(super) fn dispatch_waiting(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if listener.dispatch_from.is_some() {
            return;
        }
        while let Some(dispatched) = listener.dispatcher.dispatch_next(self.now) {
            let Dispatched {
                worker,
                connection,
                has_waited,
            } = dispatched;
            self.parked.dispatched(&connection.connection, worker);
            self.actions.push_back(Action::Dispatch {
                handle,
                worker,
                connection,
                has_waited,
            });
        }
    }

    /// Reclaims connections from a busy or unresponsive worker's queue for an idle worker. Returns
    /// whether there are any to reclaim.
    pub(super) fn rebalance(&mut self, handle: HandleId) -> bool {
        let listener = self.listeners.get_mut(&handle);
        let Some(listener) = listener.filter(|listener| listener.may_dispatch()) else {
            return false;
        };
        listener.dispatcher.end_penalties(self.now);
        let Some((worker, at_most)) = listener.dispatcher.reclaimable(self.now) else {
            return false;
        };
        self.actions.push_back(Action::Reclaim {
            handle,
            worker,
            at_most,
        });
        true
    }

    pub(super) fn reclaim_all(&mut self, handle: HandleId, worker: WorkerId) {
        self.actions.push_back(Action::Reclaim {
            handle,
            worker,
            at_most: usize::MAX,
        });
    }

    /// Dispatches waiting connections to other workers, accepts more, and continues a drain or ends
    /// a pause. If the listener is closed, closes the waiting connections instead.
    pub(super) fn redistribute(&mut self, handle: HandleId) {
        self.pass_waiting(handle);
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if listener.stage == Stage::Unbound {
            let waiting = listener.dispatcher.take_waiting();
            self.drop_hand_offs(waiting);
        } else {
            self.dispatch_waiting(handle);
            self.accept_if_possible(handle);
            self.rebalance(handle);
            self.check_backlog_if_draining(handle);
        }
    }
}
