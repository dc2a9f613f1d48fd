//! Choosing the next connection and its worker.

use super::member::{IdleRank, Member};
use super::{
    BUSY_WORKERS_CHECKED, Dispatched, Dispatcher, FAIRNESS_BUSY_SPAN, FAIRNESS_LEAD,
    RECENT_LOAD_SPAN, Undispatched,
};
use crate::types::time::Time;
use crate::types::user::User;
use crate::types::worker_id::WorkerId;

impl<C> Dispatcher<C> {
    /// Takes the first of the connections that are assigned to one worker with capacity (rule 1).
    /// Returns `None` if there is no such worker.
    fn next_assigned(&mut self) -> Option<(WorkerId, Undispatched<C>)> {
        let worker = self.assignable.first()?;
        let sequence = self.members.get(&worker)?.assigned.first()?;
        Some((worker, self.dequeue(sequence)?))
    }

    /// Takes the first unassigned connection that can go to a worker (rules 2 and 3).
    fn next_unassigned(&mut self, now: Time) -> Option<(WorkerId, Undispatched<C>)> {
        let mut next = None;
        if let Some(sequence) = self.unassigned.first() {
            next = self.next_worker(None, now).map(|worker| (sequence, worker));
        }
        for (user, restricted) in self.restricted.iter() {
            let is_first = |sequence: &u64| next.is_none_or(|(first, _)| *sequence < first);
            let sequence = restricted.unassigned.first().filter(is_first);
            let worker = sequence.and_then(|_| self.next_worker(Some(*user), now));
            next = sequence.zip(worker).or(next);
        }
        let (sequence, worker) = next?;
        Some((worker, self.dequeue(sequence)?))
    }

    /// Returns whether an unassigned connection waits although a worker that may receive it is idle.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn waits_beside_idle_worker(&self) -> bool {
        let unrestricted = (!self.unassigned.is_empty()).then_some(None);
        let restricted = self.restricted.iter();
        let restricted = restricted.filter(|(_, own)| !own.unassigned.is_empty());
        let users = unrestricted
            .into_iter()
            .chain(restricted.map(|(user, _)| Some(*user)));
        users
            .into_iter()
            .any(|user| self.first_idle(user).is_some())
    }

    /// Returns the worker that receives the next connection. If the connection is restricted, `user`
    /// is the user to whose workers it may go.
    fn next_worker(&self, user: Option<User>, now: Time) -> Option<WorkerId> {
        let may_receive = |member: &Member| user.is_none_or(|user| member.user == user);
        match self.first_idle(user) {
            Some(idle) if self.has_scheduler => Some(idle.worker),
            Some(idle) => {
                let busy = self.yields_to(idle.worker, may_receive, now);
                Some(busy.unwrap_or(idle.worker))
            }
            None if self.has_scheduler => None,
            None => self.first_with_space(u64::MAX, may_receive, |_| true),
        }
    }

    /// Returns the idle worker whose turn is next. If `user` is given, considers only its workers.
    pub(super) fn first_idle(&self, user: Option<User>) -> Option<IdleRank> {
        let Some(user) = user else {
            return self.idle.first();
        };
        self.idle.iter().find(|rank| {
            let member = self.members.get(&rank.worker);
            member.is_some_and(|member| member.user == user)
        })
    }

    /// Returns whether a connection with this restriction has to wait although a worker is idle.
    pub(crate) fn must_wait(&self, user: Option<User>) -> bool {
        !self.idle.is_empty() && self.first_idle(user).is_none()
    }

    /// Returns the busy worker to which this idle worker yields its turn, if any.
    fn yields_to(
        &self,
        idle: WorkerId,
        may_receive: impl Fn(&Member) -> bool,
        now: Time,
    ) -> Option<WorkerId> {
        let load_max = self
            .members
            .get(&idle)?
            .recent_load
            .checked_sub(FAIRNESS_LEAD)?;
        self.first_with_space(load_max, may_receive, |busy| {
            busy.became_busy_within(FAIRNESS_BUSY_SPAN, now)
        })
    }

    /// Returns the suitable busy worker with the lowest recent load, at most `load_max`, whose
    /// window has space. Considers only workers that may receive the connection.
    fn first_with_space(
        &self,
        load_max: u64,
        may_receive: impl Fn(&Member) -> bool,
        is_suitable: impl Fn(&Member) -> bool,
    ) -> Option<WorkerId> {
        let busy = self.busy.iter();
        let busy = busy.take_while(|rank| rank.recent_load <= load_max);
        let busy = busy.filter_map(|rank| Some((rank.worker, self.members.get(&rank.worker)?)));
        let mut busy = busy
            .filter(|(_, member)| may_receive(member))
            .take(BUSY_WORKERS_CHECKED);
        busy.find(|(_, member)| member.load() < self.window && is_suitable(member))
            .map(|(worker, _)| worker)
    }

    /// Ends the penalties that have expired.
    pub(crate) fn end_penalties(&mut self, now: Time) {
        while let Some((_, worker)) = self.penalized.first().filter(|(until, _)| *until <= now) {
            self.update(worker, Member::end_penalty);
        }
    }

    /// Takes out the next waiting connection, and returns it with the worker to which it is
    /// dispatched.
    ///
    /// Returns `None` if no connection waits, or if no worker can receive any of the waiting
    /// connections now.
    pub(crate) fn dispatch_next(&mut self, now: Time) -> Option<Dispatched<C>> {
        self.end_penalties(now);
        let assigned = self.next_assigned();
        let Some((worker, connection)) = assigned.or_else(|| self.next_unassigned(now)) else {
            // Treat the connections as having waited only if the scheduler has been called for each
            // of them. An unscheduled connection has not waited for a worker.
            if self.unscheduled.is_empty() {
                self.last_delayed = self.last_sequence;
            }
            return None;
        };
        let Undispatched { connection, user } = connection;
        let has_waited = connection.sequence <= self.last_delayed;
        self.turns += 1;
        let turn = self.turns;
        let load_min = self.recent_load_max.saturating_sub(RECENT_LOAD_SPAN);
        let (recent_load, _) = self.update(worker, |member| {
            member.dispatch(user, turn, load_min, now);
            member.recent_load
        })?;
        self.recent_load_max = self.recent_load_max.max(recent_load);
        Some(Dispatched {
            worker,
            connection,
            has_waited,
        })
    }
}
