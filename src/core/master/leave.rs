//! Leaving a listener: a worker releases the listener, disconnects, or exits.

use super::listener::Stage;
use super::{Action, HandOff, MasterCore};
use crate::core::dispatch::Undispatched;
use crate::types::handle::HandleId;
use crate::types::policy::SchedulingPolicy;
use crate::types::worker_id::WorkerId;

impl<C, F> MasterCore<C, F> {
    /// Removes the worker from a listener, because the worker released it, the worker's channel
    /// closed, or the worker's copy or queue could not be created. With round robin, the
    /// connections that the worker has not received are reclaimed first.
    pub(super) fn leave_listener(&mut self, handle: HandleId, worker: WorkerId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        listener.members.release(worker);
        listener.dispatcher.end(worker);
        let policy = listener.policy;
        if !listener.members.is_served() {
            match (listener.is_retained(), listener.stage) {
                // End the pause, because no worker is left that could receive the accepted
                // connections. These connections wait for the next worker.
                (true, Stage::Pausing) => listener.stage = Stage::Open,
                (true, _) => {}
                (false, _) => self.close_unserved(handle, Some(worker)),
            }
        }
        match policy {
            SchedulingPolicy::RoundRobin => {
                let listener = self.listeners.get_mut(&handle);
                // Close the queue only once. A worker may exit while its queue is already being
                // closed.
                if listener.is_some_and(|listener| listener.members.begin_closing(worker)) {
                    self.actions
                        .push_back(Action::CloseQueue { handle, worker });
                }
            }
            SchedulingPolicy::Shared => self.remove_member(handle, worker, Vec::new()),
            SchedulingPolicy::Sharded => {
                self.leave_shard(handle, worker);
                self.remove_member(handle, worker, Vec::new());
            }
        }
        self.close_excluded(handle);
    }

    /// Removes a worker that has left the listener. The connections of its queue, which has been
    /// closed, wait again.
    pub(super) fn remove_member(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        connections: Vec<Undispatched<HandOff<C>>>,
    ) {
        let undelivered = self.count_undelivered(handle, worker);
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if listener.members.remove(worker) {
            let (load, received) =
                listener
                    .dispatcher
                    .queue_closed(worker, connections, undelivered);
            if let (Some(entry), Some(load)) = (self.workers.get_mut(&worker), load) {
                entry.past_load.add(&load);
            }
            self.count_received(received);
            self.redistribute(handle);
        }
        if !self.is_connected(worker) {
            self.close_held_by(worker);
        }
        self.remove_if_unused(handle);
    }
}
