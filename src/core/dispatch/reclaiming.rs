//! Deciding when connections are reclaimed, and from which worker.

use super::member::IdleRank;
use super::{Dispatcher, QUICK, STALL_TIMEOUT};
use crate::types::ordered_set::OrderedSet;
use crate::types::time::{Time, earlier};
use crate::types::worker_id::WorkerId;

impl<C> Dispatcher<C> {
    /// Returns how many connections to reclaim for an idle worker now, and from which worker.
    /// Returns `None` if no connection can be reclaimed now. Call `end_penalties` first.
    ///
    /// A worker that became busy recently keeps its connections, because it may only be waiting for
    /// a core. Without this rule, the workers that happen to run would take all connections.
    pub(crate) fn reclaimable(&self, now: Time) -> Option<(WorkerId, usize)> {
        let [queued_behind, unresponsive] = self.reclaim_times();
        let due = |(time, worker): (Time, WorkerId)| (time <= now).then_some(worker);
        let worker = queued_behind
            .and_then(due)
            .or_else(|| unresponsive.and_then(due))?;
        let member = self.members.get(&worker)?;
        Some((worker, member.queued_behind().max(1) as usize))
    }

    /// Returns the latest time at which `end_penalties` and `reclaimable` must be called, provided
    /// that no event changes the dispatcher before.
    ///
    /// Returns `None` if only an event can make connections reclaimable.
    pub(crate) fn rebalance_deadline(&self) -> Option<Time> {
        let times = self.reclaim_times().into_iter().flatten();
        let reclaim = times.map(|(time, _)| time).min();
        // If all suitable idle workers are stalled, connections become reclaimable when a penalty
        // ends. Do not rely on an event, because a busy worker reports nothing during a long
        // request.
        let is_awaited = self.is_any_worth_reclaiming(|idle| idle.is_stalled);
        let penalty = self.penalized.first().filter(|_| is_awaited);
        earlier(reclaim, penalty.map(|(until, _)| until))
    }

    /// Returns whether connections may become reclaimable while the idle workers are prompt.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn may_have_reclaimable(&self) -> bool {
        self.is_any_worth_reclaiming(|_| true)
    }

    /// Returns whether a suitable idle worker may receive any of the connections that may be in
    /// other workers' queues.
    fn is_any_worth_reclaiming(&self, is_suitable: fn(IdleRank) -> bool) -> bool {
        let queued = self.queued_behind.iter().chain(self.unresponsive.iter());
        // If all workers have the same user, the answer is the same for all queues.
        let checked = match self.restricted.len() {
            0 | 1 => 1,
            2.. => usize::MAX,
        };
        let mut queued = queued.take(checked);
        !self.has_scheduler
            && queued.any(|(_, worker)| self.is_worth_reclaiming(worker, is_suitable))
    }

    /// Returns when connections can be reclaimed, and from which worker. The first entry is for
    /// connections queued behind a worker's current request. The second entry is for those of an
    /// unresponsive worker.
    fn reclaim_times(&self) -> [Option<(Time, WorkerId)>; 2] {
        if self.has_scheduler || !self.is_prompt_worker_idle() {
            return [None, None];
        }
        let first = |order: &OrderedSet<(Time, WorkerId)>, delay| {
            let mut order = order.iter();
            let is_prompt = |idle: IdleRank| !idle.is_stalled;
            let (since, worker) =
                order.find(|(_, worker)| self.is_worth_reclaiming(*worker, is_prompt))?;
            Some((since.saturating_add(delay), worker))
        };
        [
            first(&self.queued_behind, QUICK),
            first(&self.unresponsive, STALL_TIMEOUT),
        ]
    }

    /// Returns whether a suitable idle worker may receive any of the connections that may be in this
    /// worker's queue.
    fn is_worth_reclaiming(&self, worker: WorkerId, is_suitable: fn(IdleRank) -> bool) -> bool {
        let member = self.members.get(&worker);
        member.is_some_and(|member| {
            let user = match member.may_have_unrestricted() {
                true => None,
                false => Some(member.user),
            };
            self.first_idle(user).is_some_and(is_suitable)
        })
    }

    fn is_prompt_worker_idle(&self) -> bool {
        self.idle.first().is_some_and(|rank| !rank.is_stalled)
    }
}
