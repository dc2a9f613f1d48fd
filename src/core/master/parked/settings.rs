//! Settings of parking: whether a listener holds new connections until their clients send something,
//! and how many connections the master holds.

use crate::core::master::listener::Listener;
use crate::core::master::{Action, MasterCore};
use crate::core::parked::CONNECTIONS_MAX;
use crate::types::endpoint::Parking;
use crate::types::handle::HandleId;
use crate::types::policy::SchedulingPolicy;

impl<C, F> MasterCore<C, F> {
    /// Changes how the master treats the listener's connections while their clients send nothing.
    pub(crate) fn set_parking(&mut self, handle: HandleId, parking: Parking) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        let before = listener.parking.deferred_seconds();
        listener.parking.update(parking);
        if listener.parking.deferred_seconds() != before {
            self.defer_accept(handle);
            // With `wait_for_data`, the master may accept even if no worker is idle.
            self.accept_if_possible(handle);
        }
    }

    /// Updates how long the kernel holds back new connections until their first bytes arrive; 0
    /// seconds ends this. Does nothing if the listener is not shared, or if a process outside the
    /// cluster may have a copy of it.
    pub(in super::super) fn defer_accept(&mut self, handle: HandleId) {
        let listener = self.listeners.get(&handle);
        // Do not defer a shard's connections. The shard's worker holds them. When that worker
        // disconnects, the connections that the kernel holds back would later enter the backlog of
        // a shard without a worker.
        let is_deferrable = |listener: &&Listener<C>| {
            listener.policy == SchedulingPolicy::Shared && listener.is_sole()
        };
        if let Some(listener) = listener.filter(is_deferrable) {
            let seconds = listener.parking.deferred_seconds();
            self.actions
                .push_back(Action::DeferAccept { handle, seconds });
        }
    }

    /// Returns whether the master holds the next connection that it accepts from the listener until
    /// the client sends something.
    pub(crate) fn holds_new(&self, handle: HandleId) -> bool {
        self.listeners.get(&handle).is_some_and(Listener::holds_new)
    }

    /// Sets the maximum number of connections that the master holds.
    pub(crate) fn set_parked_limit(&mut self, limit: usize) {
        self.parked.limit = limit.min(CONNECTIONS_MAX);
        self.space_freed();
    }
}
