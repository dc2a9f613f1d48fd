//! The shards of a sharded listener: one listening socket per worker, on the same port.

use std::io;

use super::accept::RETRY_DELAY;
use super::listener::{Listener, Stage};
use super::{Action, MasterCore};
use crate::error::Error;
use crate::types::errno;
use crate::types::handle::HandleId;
use crate::types::policy::SchedulingPolicy;
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::Unreceived;

impl<C, F> MasterCore<C, F> {
    /// Assigns a free shard to the worker. Returns `false` if another shard must be bound first.
    ///
    /// Always returns `true` for a listener without shards.
    pub(super) fn assign_shard(&mut self, handle: HandleId, worker: WorkerId) -> bool {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return false;
        };
        // Prefer the spare shard, because its connections arrived while no worker served. Then
        // prefer the shard of a worker that was killed. After reloads there are more shards than
        // workers, and the clients in its backlog would otherwise wait for a further worker.
        let free = listener.free_shard();
        match listener.spare_shard.take().or(free) {
            Some(shard) => {
                listener.shards[shard] = Some(worker);
                listener.abandoned_shards.retain(|other| *other != shard);
                true
            }
            None => listener.policy != SchedulingPolicy::Sharded,
        }
    }

    /// Returns the index of the worker's shard. If the worker has none, returns `usize::MAX`, which
    /// is the index of no shard, so that each lookup with the result finds nothing.
    pub(super) fn shard_index(&self, handle: HandleId, worker: WorkerId) -> usize {
        let listener = self.listeners.get(&handle);
        let shards = listener.map_or(&[][..], |listener| &listener.shards);
        let own = shards.iter().position(|shard| *shard == Some(worker));
        own.unwrap_or(usize::MAX)
    }

    /// Completes a worker's request after one more shard has been bound, or could not be bound.
    pub(crate) fn shard_bound(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        request: u32,
        result: Result<(), i32>,
    ) {
        match (result, self.listeners.get_mut(&handle)) {
            (Ok(()), Some(listener)) => {
                listener.shards.push(None);
                self.actions.push_back(Action::WatchHangUp { handle });
                // Search all shards for a free one, because an earlier shard may have become free
                // while this one was being bound.
                self.assign_shard(handle, worker);
                self.join(worker, request, handle);
            }
            (Ok(()), None) => self.reject(worker, request, errno::EINVAL),
            (Err(errno), _) => self.reject(worker, request, errno),
        }
    }

    /// Counts connections that reached no shard and were reset. If the listener is open, reports
    /// them as an error, and selects the shards again.
    pub(crate) fn misdirected(&mut self, handle: HandleId, count: u64) {
        self.ledger.accepted += count;
        self.ledger.dropped += count;
        let Some(listener) = self.listeners.get(&handle) else {
            return;
        };
        // Report the resets only for an open listener. While a listener drains, the BPF program
        // sends all new connections to the selector (see `shard_group`), whose SYN filter drops
        // them. A connection that was completed by a SYN cookie still passes the filter, and its
        // reset is not an error.
        if count > 0 && listener.stage == Stage::Open {
            let address = listener.public_address().to_string();
            self.error(None, Error::Misdirected { address, count });
            self.select_shards(handle);
        }
    }

    /// Reports that the shell could not accept the connections that have reached no shard. The shell
    /// watches the selector again when the shards are selected again.
    pub(crate) fn selector_failed(&mut self, handle: HandleId, reason: io::Error) {
        let Some(listener) = self.listeners.get(&handle) else {
            return;
        };
        let address = listener.public_address().to_string();
        self.error(None, Error::Accept { address, reason });
        self.select_later(handle);
    }

    /// Selects the shards again after `RETRY_DELAY`, because the system lacked a resource.
    pub(crate) fn select_later(&mut self, handle: HandleId) {
        if let Some(listener) = self.listeners.get_mut(&handle) {
            listener.select_from = Some(self.now.saturating_add(RETRY_DELAY));
        }
    }

    /// Selects the shards again once the delay after a failure has passed.
    pub(super) fn select_if_due(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if listener.select_from.is_some_and(|time| time <= self.now) {
            listener.select_from = None;
            self.select_shards(handle);
        }
    }

    /// Directs new connections to the shards of the workers that serve the listener, and to the
    /// spare shard if there is one.
    pub(super) fn select_shards(&mut self, handle: HandleId) {
        self.choose_spare_shard(handle);
        let Some(listener) = self.listeners.get(&handle) else {
            return;
        };
        match listener.stage {
            Stage::Open | Stage::Pausing => {}
            Stage::Draining(_) | Stage::Emptying | Stage::Unbound => return,
        }
        let is_served = |shard: &Option<WorkerId>| {
            shard.is_some_and(|worker| listener.members.is_serving(worker))
        };
        let shards = listener.shards.iter().enumerate();
        let served = shards.filter(|(_, shard)| is_served(shard));
        let served = served.map(|(index, _)| index);
        let shards: Vec<_> = served.chain(listener.spare_shard).collect();
        if !shards.is_empty() {
            self.actions
                .push_back(Action::SelectShards { handle, shards });
        }
    }

    /// Chooses a spare shard for the next worker if a retained listener has no serving worker.
    ///
    /// The choice is a free shard or, if none is free, the first shard. If a process outside the
    /// cluster may have a copy, the choice is always the first shard. `MasterListener::as_fd`
    /// returns that shard, so only its clients can be served by the other process. If the chosen
    /// shard still has a worker, the worker releases the shard without draining it.
    fn choose_spare_shard(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        let is_needed = listener.outlives_workers()
            && !listener.members.is_served()
            && listener.spare_shard.is_none();
        if !is_needed || listener.shards.is_empty() {
            return;
        }
        let free = listener.free_shard();
        let spare = free.filter(|_| listener.is_sole()).unwrap_or_default();
        listener.spare_shard = Some(spare);
        if let Some(worker) = listener.shards[spare].take() {
            listener.departing.retain(|(_, other)| other != worker);
            self.send_listener_closed(handle, worker, Unreceived::GoToOthers);
        }
    }

    /// Sends `ListenerClosed` to the departing workers whose grace period has ended, so that they
    /// drain their shards.
    pub(super) fn end_departing(&mut self, handle: HandleId) {
        loop {
            let Some(listener) = self.listeners.get_mut(&handle) else {
                return;
            };
            let is_due = |(time, _): &(Time, WorkerId)| *time <= self.now;
            let Some((time, worker)) = listener.departing.first().filter(is_due) else {
                return;
            };
            listener.departing.remove((time, worker));
            let shard = Some(self.shard_index(handle, worker));
            self.actions.push_back(Action::Unblock { handle, shard });
            self.send_listener_closed(handle, worker, Unreceived::AreServed);
        }
    }

    /// Frees the worker's shard. The shard stays bound, so that the next worker receives its
    /// backlog and the other shards keep their indices.
    pub(super) fn leave_shard(&mut self, handle: HandleId, worker: WorkerId) {
        let shard = self.shard_index(handle, worker);
        // A worker that is still connected has released the listener itself, after draining its
        // shard.
        let has_drained = self.is_connected(worker);
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        listener.departing.retain(|(_, other)| other != worker);
        if let Some(owner) = listener.shards.get_mut(shard) {
            *owner = None;
            listener
                .abandoned_shards
                .extend((!has_drained).then_some(shard));
        }
        self.select_shards(handle);
    }
}

impl<C> Listener<C> {
    /// Returns a free shard, preferably one that was abandoned.
    fn free_shard(&self) -> Option<usize> {
        let abandoned = self.abandoned_shards.first().copied();
        abandoned.or_else(|| self.shards.iter().position(Option::is_none))
    }
}
