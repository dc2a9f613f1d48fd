//! Chooses the worker for the next connection of one listener, with the round robin policy.
//!
//! `Dispatcher::dispatch_next` makes the choice. If the application has a scheduler, the master
//! asks the scheduler instead, and reports its choice by `Dispatcher::choose`.
//!
//! The master accepts connections and dispatches each one into the queue of one worker. The master
//! can reclaim a connection until the worker receives it. A worker that finds its queue empty
//! reports that it is idle, and how many connections it has received.
//!
//! # States of a worker
//!
//! | state | meaning | dispatched connections |
//! |---|---|---|
//! | paused | the worker has not reported that it is idle, has asked for a pause, or had a full queue | none |
//! | idle | no connection has been dispatched to the worker since it reported an empty queue | yes |
//! | busy | connections have been dispatched to the worker since it reported an empty queue | ahead of time, up to the window |
//! | slow | the worker is busy, and connections queued behind its current request were reclaimed | only those that the scheduler has assigned, until the worker is idle |
//! | ended | the listener has ended for the worker | none |
//!
//! In this table, a connection that was reclaimed counts as not dispatched. In the code, a busy
//! worker is `Ready`. An idle worker is `Ready`, or `Slow` if all its connections were reclaimed.
//!
//! An idle worker can also be *stalled*: all connections that were dispatched to it since its last
//! idle report had to be reclaimed, probably because its process is stopped. All other idle workers
//! are *prompt* (`Response::Prompt` or `Response::Retried` in the code). Until its penalty ends, a
//! stalled worker comes after all prompt workers.
//!
//! A dispatch is a decision, which the shell carries out later. Until then, the connection is
//! *undelivered*: it counts as dispatched, but it is not in the queue.
//!
//! # The next connection
//!
//! The dispatcher applies these rules in order. Among the connections that are assigned to one
//! worker, and among those that are assigned to none, the connection that entered the dispatcher
//! first is next. A parked connection enters again each time its client sends something. A reclaimed
//! connection keeps its position.
//!
//! 1. A connection that the scheduler has assigned to a worker waits for that worker. The worker
//!    must be idle, busy or slow, and have fewer than `MAX_WINDOW` connections in its queue.
//! 2. If any worker is idle, the connection goes to an idle worker. Prompt workers come before
//!    stalled ones. Idle workers take strict turns, so the worker whose last dispatch is the oldest
//!    is next. Fairness (see its section) can pass the turn to a busy worker.
//! 3. If no worker is idle, the connection goes to the busy worker with the lowest recent load
//!    whose window has space. Only the `BUSY_WORKERS_CHECKED` workers with the lowest loads are
//!    checked. Workers whose penalty has not ended are left out.
//! 4. If no rule applies, the connection waits.
//!
//! Some connections are *restricted* to the workers of one user (see `ParkHistory`). The rules then
//! apply to these workers only, as if there were no others. A restricted connection that waits
//! delays no connection that another worker may receive. Therefore, the connection that entered
//! first is the next one among those for which the rules find a worker.
//!
//! If the application has a scheduler, the dispatcher skips rule 3 and fairness. The reason is that
//! connections are not reclaimed then, so none may be queued behind a slow request unless the
//! scheduler chose that worker.
//!
//! The master accepts connections only while the dispatcher has capacity:
//!
//! - Without a scheduler, the capacity is the number of idle workers times the window, minus the
//!   waiting connections that are not restricted. If no worker is idle, new connections stay in the
//!   kernel's backlog. Restricted connections wait only while no worker of their user is idle, so
//!   they need none of this capacity.
//! - With a scheduler, the capacity is the number of idle, busy and slow workers times
//!   `MAX_WINDOW`, minus the connections that are not known to have been received. Those that wait
//!   for the workers of one user, or are in their queues, count at most as many as these workers'
//!   part of the capacity, so that they leave the other users' part.
//!
//! # The window
//!
//! The window is the maximum number of connections that a worker may have before it reports again
//! that it is idle. All workers share one window, which starts at 1.
//!
//! An idle report is quick if the connections since the worker's last report took at most `QUICK`
//! each on average. Each report changes the window:
//!
//! - If the report is quick and the worker served a full window, the window doubles, up to
//!   `MAX_WINDOW`.
//! - If the report is quick but the worker served fewer connections, the window shrinks to their
//!   number, but at most by half.
//! - If the report is not quick, the window is halved, down to 1.
//! - If the worker served nothing since its last report, the window does not change.
//!
//! # Reclaiming
//!
//! Connections are reclaimed for an idle worker only if it is prompt and there is no scheduler. If it
//! has another user than the worker from which they are reclaimed, at least one of them must be
//! unrestricted.
//!
//! 1. If a worker has been busy for `QUICK`, everything queued behind its current request is
//!    reclaimed, and the worker becomes slow. The worker that became busy first is checked first.
//! 2. If a worker was idle and has received none of its connections `STALL_TIMEOUT` after the first
//!    of them was dispatched, they are reclaimed. If the worker has none left, it becomes stalled.
//!    The first penalty lasts `PENALTY_MIN`. Each later penalty is twice as long as the one before,
//!    up to `PENALTY_MAX`, until the worker receives a connection.
//!
//! If all idle workers that could receive reclaimed connections are stalled, the earliest end of a
//! penalty is a deadline, because a worker then becomes prompt without any event.
//!
//! Connections are also reclaimed when a worker pauses or when the listener ends for it. Such a
//! worker does not become stalled.
//!
//! # Fairness
//!
//! A worker on a core with little other work is idle more often, so strict turns would send it more
//! than its share. Therefore each worker has a *recent load*, the number of connections that were
//! dispatched to it and not reclaimed. Before each dispatch to a worker, its recent load is raised
//! to at least the highest recent load minus `RECENT_LOAD_SPAN`. A new worker starts with the
//! highest recent load.
//!
//! An idle worker yields its turn to a busy worker that meets three conditions:
//!
//! - The busy worker became busy less than `FAIRNESS_BUSY_SPAN` ago.
//! - The busy worker's window has space.
//! - The busy worker's recent load is lower by at least `FAIRNESS_LEAD`.
//!
//! If several busy workers qualify, the one with the lowest recent load receives the connection.
//!
//! The dispatcher is pure: a connection is any type `C`, and the time is an argument.

mod choosing;
mod member;
mod reclaiming;
#[cfg(test)]
mod tests;
mod waiting;

use std::time::Duration;

use crate::types::loads::WorkerLoad;
use crate::types::number_map::NumberMap;
use crate::types::ordered_set::OrderedSet;
use crate::types::protocol::FrameError;
use crate::types::protocol::Violation;
use crate::types::sorted_map::SortedMap;
use crate::types::time::Time;
use crate::types::user::User;
use crate::types::worker_id::WorkerId;
use member::{BusyRank, IdleRank, Member, Snapshot};
use waiting::{Restricted, Target, Waiting};

/// The largest window, in connections.
///
/// Each idle report costs one frame and two context switches. A larger window spreads this cost
/// over more connections. However, more descriptors are in flight, and more connections may have to
/// be reclaimed from a slow worker. `cargo bench -- connections mixed` measures both.
pub(crate) const MAX_WINDOW: u32 = 16;

/// The average time per connection up to which an idle report is quick. Also the time for which a
/// worker must have been busy before the connections queued behind its request are reclaimed.
///
/// If it is longer, connections wait longer behind a slow request. If it is shorter than a time
/// slice of the kernel's scheduler (a few milliseconds), workers that only wait for a core lose
/// their connections. `cargo bench -- mixed` measures how long connections wait while a worker is
/// idle.
const QUICK: Time = Duration::from_millis(5);

/// The minimum difference between two recent loads, in connections, at which an idle worker yields
/// its turn to a busy one.
///
/// If it is larger, the workers' shares differ more. If it is 1, idle workers yield for differences
/// that strict turns would even out. `cargo bench -- fairness` measures the shares.
const FAIRNESS_LEAD: u64 = 4;

/// The maximum time for which a worker may have been busy when an idle worker yields its turn to
/// it.
///
/// If it is longer, more connections are queued behind requests that turn out to be slow. If it is
/// much shorter than a typical short request, idle workers rarely yield. `cargo bench -- fairness
/// mixed` measures both.
const FAIRNESS_BUSY_SPAN: Time = Duration::from_millis(1);

/// The maximum difference between two recent loads, in connections.
///
/// A limit keeps a worker from being preferred for too long after it was paused or slow. If the
/// limit is not well above `FAIRNESS_LEAD`, differences are forgotten before they are corrected. No
/// benchmark chose this value.
const RECENT_LOAD_SPAN: u64 = 1000;

/// The number of busy workers, lowest recent load first, that are checked for space in their
/// window.
///
/// A larger number makes each dispatch more expensive. If the number is smaller, a connection may
/// wait although some busy worker has space. No benchmark chose this value.
const BUSY_WORKERS_CHECKED: usize = 16;

/// The time after which an idle worker that receives none of its connections is treated as stalled.
///
/// If it is longer, connections wait longer for a stopped process. If it is shorter than a
/// process's usual wait for a core on a loaded machine, running workers are penalized. No benchmark
/// chose this value.
pub(crate) const STALL_TIMEOUT: Time = Duration::from_millis(20);

/// The first penalty of a stalled worker. A penalty begins when the connection is dispatched, so
/// `STALL_TIMEOUT` of it has passed when the stall is noticed.
///
/// If the value is not larger than `STALL_TIMEOUT`, the penalty has no effect. If it is larger, a
/// worker that only waited for a core is passed over for longer. Each later penalty is twice as long
/// as the previous one. No benchmark chose this value.
const PENALTY_MIN: Time = Duration::from_millis(40);

/// The longest penalty.
///
/// After each penalty, a stopped worker delays one connection by `STALL_TIMEOUT`. If penalties are
/// shorter, these delays are more frequent. If penalties are longer, a worker that continues after
/// a stop is passed over for longer while other workers are idle. No benchmark chose this value.
const PENALTY_MAX: Time = Duration::from_secs(1);

/// A connection with its sequence number. The first connection of a listener has the number 1. A
/// connection gets a new number each time it enters the dispatcher: when it is accepted without being
/// held, and each time its client sends something while the master holds it. A reclaimed connection
/// keeps its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequenced<C> {
    pub(crate) sequence: u64,
    pub(crate) connection: C,
}

/// Why a connection could not be put into a worker's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DispatchFailure {
    /// The system lacks a resource.
    Exhausted,
    /// The queue is full or broken.
    QueueUnusable,
}

/// A connection that is in no worker's queue.
#[derive(Debug)]
pub(crate) struct Undispatched<C> {
    pub(crate) connection: Sequenced<C>,
    /// The user to whose workers the connection is restricted, if any.
    pub(crate) user: Option<User>,
}

/// A connection, and the worker to whose queue it is dispatched.
#[derive(Debug)]
pub(crate) struct Dispatched<C> {
    pub(crate) worker: WorkerId,
    pub(crate) connection: Sequenced<C>,
    /// Whether the connection has waited for a worker or has been reclaimed. If so, its client may
    /// have hung up in the meantime.
    pub(crate) has_waited: bool,
}

#[derive(Debug)]
pub(crate) struct Dispatcher<C> {
    members: SortedMap<WorkerId, Member>,
    /// The idle workers, the next one first.
    idle: OrderedSet<IdleRank>,
    /// The busy workers that are not stalled, the one with the lowest recent load first.
    busy: OrderedSet<BusyRank>,
    /// The workers that may have connections queued behind their current request, sorted by the
    /// time at which each worker became busy.
    queued_behind: OrderedSet<(Time, WorkerId)>,
    /// The workers to which connections have been dispatched since their last idle report, but that
    /// are not known to have received any of these connections. They are sorted by the time at
    /// which each worker became busy.
    unresponsive: OrderedSet<(Time, WorkerId)>,
    /// The stalled workers that have not ended, sorted by the time at which each penalty ends.
    penalized: OrderedSet<(Time, WorkerId)>,
    /// The maximum number of connections that a worker may have before it reports that it is idle.
    window: u32,
    /// The connections that have been accepted and not been dispatched, by sequence number.
    waiting: NumberMap<Waiting<C>>,
    /// The sequence numbers of the waiting connections that are assigned to no worker and not
    /// restricted. Each goes to the next worker according to the rules of this module.
    unassigned: OrderedSet<u64>,
    /// The waiting connections that are restricted to the workers of one user. A user's entry stays
    /// when it becomes empty, until the user's last worker is removed.
    restricted: SortedMap<User, Restricted>,
    /// The sequence numbers of the waiting connections for which the scheduler has not been called.
    unscheduled: OrderedSet<u64>,
    /// Whether the application's scheduler chooses the workers.
    has_scheduler: bool,
    /// The workers that have capacity for a connection that the scheduler has assigned to them.
    assignable: OrderedSet<WorkerId>,
    /// The number of workers that have reported that they are idle and have not paused or ended
    /// since.
    ready_count: usize,
    /// The number of workers that have not ended.
    candidate_count: usize,
    /// The sequence number of the connection that a sweep checked last.
    last_swept: u64,
    /// The sequence number up to which connections are treated as having waited.
    last_delayed: u64,
    /// The number of connections that have been dispatched and are not known to have been received.
    queued_total: u64,
    /// The number of connections that have been accepted.
    accepted: u64,
    /// The sequence number of the connection that was added last.
    last_sequence: u64,
    /// The number of turns that have been taken. A worker takes a turn when it is added, and at
    /// each dispatch.
    turns: u64,
    /// The highest recent load that any worker has had.
    recent_load_max: u64,
}

impl<C> Dispatcher<C> {
    pub(crate) fn new() -> Self {
        Self {
            members: SortedMap::new(),
            idle: OrderedSet::new(),
            busy: OrderedSet::new(),
            queued_behind: OrderedSet::new(),
            unresponsive: OrderedSet::new(),
            penalized: OrderedSet::new(),
            window: 1,
            waiting: NumberMap::new(),
            unassigned: OrderedSet::new(),
            restricted: SortedMap::new(),
            unscheduled: OrderedSet::new(),
            has_scheduler: false,
            assignable: OrderedSet::new(),
            ready_count: 0,
            candidate_count: 0,
            last_swept: 0,
            last_delayed: 0,
            queued_total: 0,
            accepted: 0,
            last_sequence: 0,
            turns: 0,
            recent_load_max: 0,
        }
    }

    /// Returns how many more connections the master may accept now.
    pub(crate) fn capacity(&self) -> u64 {
        if self.has_scheduler {
            let capacity = self.ready_count as u64 * u64::from(MAX_WINDOW);
            return capacity.saturating_sub(self.scheduled_load());
        }
        let capacity = self.idle.len() as u64 * u64::from(self.window);
        capacity.saturating_sub(self.unassigned.len() as u64)
    }

    /// Returns how much of the capacity is used if the application has a scheduler.
    fn scheduled_load(&self) -> u64 {
        if self.restricted.len() <= 1 {
            return self.in_flight();
        }
        let restricted = self.restricted.iter().map(|(user, restricted)| {
            let members = self.members.values();
            let members = members.filter(|member| member.user == *user);
            let (mut queued, mut max) = (0, 0);
            for member in members {
                queued += member.in_flight();
                max += u64::from(member.is_ready()) * u64::from(MAX_WINDOW);
            }
            (queued, restricted.waiting, max)
        });
        let (mut load, mut unrestricted) = (0, self.in_flight());
        for (queued, waiting, max) in restricted {
            unrestricted -= queued + waiting;
            load += (queued + waiting).min(max);
        }
        load + unrestricted
    }

    /// Adds a worker of the user, in the paused state.
    pub(crate) fn add(&mut self, worker: WorkerId, user: User) {
        self.turns += 1;
        let member = Member::new(user, self.turns, self.recent_load_max);
        self.candidate_count += 1;
        self.members.insert(worker, member);
        self.restricted.get_or_insert_with(user, Restricted::new);
    }

    /// Changes a worker, and updates the dispatcher's ordered sets and sums.
    ///
    /// Returns the result of `change`, and how many more connections are now known to have been
    /// received.
    fn update<T>(
        &mut self,
        worker: WorkerId,
        change: impl FnOnce(&mut Member) -> T,
    ) -> Option<(T, i64)> {
        let member = self.members.get_mut(&worker)?;
        let old = member.snapshot(worker);
        let result = change(member);
        let new = member.snapshot(worker);
        let received = self.replace(&old, &new);
        Some((result, received))
    }

    /// Updates the ordered sets and sums after a worker has changed. Returns how many more
    /// connections are now known to have been received.
    ///
    /// This is a separate function, because the compiler copies `update` for each type of `change`.
    fn replace(&mut self, old: &Snapshot, new: &Snapshot) -> i64 {
        self.queued_total = self.queued_total + new.in_flight - old.in_flight;
        self.ready_count = self.ready_count + usize::from(new.is_ready) - usize::from(old.is_ready);
        self.candidate_count =
            self.candidate_count + usize::from(new.is_candidate) - usize::from(old.is_candidate);
        let (old_ranks, new_ranks) = (&old.ranks, &new.ranks);
        self.idle.replace(old_ranks.idle, new_ranks.idle);
        self.busy.replace(old_ranks.busy, new_ranks.busy);
        self.queued_behind
            .replace(old_ranks.queued_behind, new_ranks.queued_behind);
        self.unresponsive
            .replace(old_ranks.unresponsive, new_ranks.unresponsive);
        self.penalized
            .replace(old_ranks.penalized, new_ranks.penalized);
        self.assignable
            .replace(old_ranks.assigned, new_ranks.assigned);
        let signed = |count| i64::try_from(count).unwrap_or(i64::MAX);
        signed(new.received) - signed(old.received)
    }

    /// Records the worker's report that its queue is empty. The worker has received `received`
    /// connections in total, and `open` of them are open.
    ///
    /// Returns how many more connections are now known to have been received.
    ///
    /// # Errors
    ///
    /// Returns a violation if the listener does not have the worker, or if `received` is higher
    /// than the number of dispatched connections.
    pub(crate) fn idle_reported(
        &mut self,
        worker: WorkerId,
        received: u64,
        open: u32,
        now: Time,
    ) -> Result<i64, FrameError> {
        let window = self.window;
        let reported = self.update(worker, |member| {
            let is_possible = received <= member.dispatched;
            is_possible.then(|| member.idle_reported(received, open, window, now))
        });
        let Some((window, received)) = reported else {
            return Err(FrameError::Violation(Violation::UnknownIdle));
        };
        self.window = window.ok_or(FrameError::Violation(Violation::UndispatchedConnection))?;
        Ok(received)
    }

    /// Stops dispatching to `worker` until it reports again that it is idle.
    ///
    /// # Errors
    ///
    /// Returns a violation if the listener does not have the worker.
    pub(crate) fn pause(&mut self, worker: WorkerId) -> Result<(), FrameError> {
        let paused = self.update(worker, Member::pause);
        paused
            .map(drop)
            .ok_or(FrameError::Violation(Violation::UnknownQueue))
    }

    /// Stops dispatching to `worker` permanently. The worker may still receive the connections in its
    /// queue. The scheduler is called again for waiting connections that it had assigned to the
    /// worker.
    pub(crate) fn end(&mut self, worker: WorkerId) {
        let ended = self.update(worker, Member::end);
        let Some((assigned, _)) = ended else {
            return;
        };
        for sequence in assigned.iter() {
            if let Some(waiting) = self.waiting.get_mut(sequence) {
                waiting.target = Target::Unscheduled;
                self.unscheduled.insert(sequence);
            }
        }
    }

    /// Records that `queued` connections are in the worker's queue or on their way to it, whatever
    /// the worker has reported.
    ///
    /// Returns how many more connections are now known to have been received.
    pub(crate) fn counted(&mut self, worker: WorkerId, queued: u64) -> i64 {
        let counted = self.update(worker, |member| member.counted(queued));
        counted.map_or(0, |((), received)| received)
    }

    /// Lets connections that were reclaimed from the worker's queue wait again. If the queue is now
    /// empty, `undelivered` is the number of connections that are still on their way to the queue.
    /// Otherwise, `undelivered` is `None`.
    ///
    /// Returns how many more connections are now known to have been received. The number is
    /// negative if the worker had reported receiving connections that were in fact reclaimed.
    pub(crate) fn reclaimed(
        &mut self,
        worker: WorkerId,
        connections: Vec<Undispatched<C>>,
        undelivered: Option<u64>,
    ) -> i64 {
        let count = connections.len() as u64;
        let reclaimed = self.update(worker, |member| member.reclaimed(count, undelivered));
        self.push_back(connections);
        reclaimed.map_or(0, |((), received)| received)
    }

    /// Lets a connection that could not be put into the worker's queue wait again. If `connection` is
    /// `None`, only reverts the count of the dispatch. If the queue is unusable, nothing more is
    /// dispatched to the worker until it reports that it is idle.
    pub(crate) fn not_dispatched(
        &mut self,
        worker: WorkerId,
        connection: Option<Undispatched<C>>,
        failure: DispatchFailure,
    ) {
        self.update(worker, |member| {
            member.undo_dispatch();
            if failure == DispatchFailure::QueueUnusable {
                member.pause();
            }
        });
        self.push_back(connection);
    }

    /// Records that a client hung up before its connection reached the worker's queue.
    pub(crate) fn hung_up(&mut self, worker: WorkerId) {
        self.update(worker, Member::undo_dispatch);
    }

    /// Records that `count` connections were reclaimed from the worker's queue, and that they must
    /// not be dispatched again.
    ///
    /// Returns how many more connections are now known to have been received. The number is zero or
    /// negative.
    pub(crate) fn drop_reclaimed(&mut self, worker: WorkerId, count: u64) -> i64 {
        let reclaimed = self.update(worker, |member| member.reclaimed(count, None));
        reclaimed.map_or(0, |((), received)| received)
    }

    /// Removes a worker whose queue has been closed, and lets the connections that were in it wait
    /// again. `undelivered` connections were still on their way to the queue.
    ///
    /// Returns the final load of the worker, and how many more connections are now known to have
    /// been received.
    pub(crate) fn queue_closed(
        &mut self,
        worker: WorkerId,
        connections: Vec<Undispatched<C>>,
        undelivered: u64,
    ) -> (Option<WorkerLoad>, i64) {
        self.end(worker);
        let received = self.reclaimed(worker, connections, Some(undelivered));
        // The worker has ended and its queue is empty, so no ordered set contains it.
        let member = self.members.remove(&worker);
        self.forget_unused_users();
        let load = member.map(|member| WorkerLoad {
            open: 0,
            ..member.figures(worker)
        });
        (load, received)
    }

    /// Removes the entries of users that have neither a worker nor a waiting connection.
    pub(crate) fn forget_unused_users(&mut self) {
        let members = &self.members;
        self.restricted.retain(|user, restricted| {
            let mut members = members.values();
            restricted.waiting > 0 || members.any(|member| member.user == *user)
        });
    }

    /// Returns how many connections have been accepted.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Returns the load of each worker of this listener.
    pub(crate) fn loads(&self) -> impl Iterator<Item = WorkerLoad> + '_ {
        let members = self.members.iter();
        members.map(|(worker, member)| member.figures(*worker))
    }

    /// Returns the load of each worker that the scheduler may choose for the waiting connection.
    pub(crate) fn candidates(&self, sequence: u64) -> impl Iterator<Item = WorkerLoad> + '_ {
        let waiting = self.waiting.get(sequence);
        let members = self.members.iter();
        let members = members
            .filter(move |(_, member)| waiting.is_some_and(|waiting| waiting.may_choose(member)));
        members.map(|(worker, member)| member.figures(*worker))
    }

    /// Returns the workers that may have connections in their queues.
    pub(crate) fn workers_with_queued(&self) -> impl Iterator<Item = WorkerId> + '_ {
        let members = self.members.iter();
        let queued = members.filter(|(_, member)| member.queued() > 0);
        queued.map(|(worker, _)| *worker)
    }

    /// Returns how many connections have been accepted and are not known to have been received.
    pub(crate) fn in_flight(&self) -> u64 {
        self.waiting_count() + self.queued_total
    }
}
