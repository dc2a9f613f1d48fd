//! Chooses the worker for the next connection of one listener, with the round robin policy:
//! `Dispatcher::dispatch_next`. The master asks the application's scheduler, if there is one, and reports
//! its choice by `Dispatcher::choose`.
//!
//! The master accepts connections and puts each into the queue of one worker. Until the worker
//! receives a connection, the master can reclaim it. A worker that finds its queue empty reports that
//! it is idle, and how many connections it has received.
//!
//! # States of a worker
//!
//! | state | gets connections |
//! |---|---|
//! | paused | no: it has not reported that it is idle, it takes no more for now, or its queue was full |
//! | idle | yes: it has received and served everything it got |
//! | busy | ahead of time, as far as the window allows |
//! | slow | no, until it reports that it is idle: connections queued behind its current request were reclaimed |
//! | ended | never again |
//!
//! An idle worker can also be *stalled*: it received nothing of what it got while it was idle, probably
//! because the process is stopped. It is then the last of the idle workers until its penalty is over.
//!
//! # The next connection
//!
//! The rules, in order. Among the connections that one rule is for, the one that was accepted first is
//! next. A reclaimed connection keeps its position.
//!
//! 1. A connection that the scheduler has assigned to a worker goes to that worker once it is idle,
//!    busy or slow, and has fewer than `MAX_WINDOW` connections in its queue.
//! 2. If any worker is idle, an idle worker gets the connection. Prompt workers come before stalled ones.
//!    Otherwise idle workers take strict turns: the worker that got a connection longest ago is next.
//!    Fairness (below) can pass the turn to a busy worker.
//! 3. If no worker is idle, the connection goes to the busy worker with the lowest recent load that has
//!    fewer connections than the window. Only the `BUSY_WORKERS_CHECKED` lowest are checked.
//! 4. Otherwise the connection waits.
//!
//! If the application has a scheduler, rule 3 and fairness do not apply: nothing that a scheduler has
//! assigned is reclaimed, so no connection may be queued behind a slow request unasked.
//!
//! The master accepts connections only while the idle workers have capacity: their number times the
//! window, minus the connections that wait. If no worker is idle, new connections stay in the kernel's
//! backlog. With a scheduler, the capacity is the number of ready workers times `MAX_WINDOW`, minus the
//! connections that no worker has received.
//!
//! # The window
//!
//! The window is the number of connections that a worker may have before it reports that it is idle
//! again. One window holds for all workers, and it starts at 1. A report is quick if the worker
//! needed at most `QUICK` for each connection since its last report.
//!
//! - Quick, and it served a full window: the window doubles, up to `MAX_WINDOW`.
//! - Quick, but it served fewer: the window shrinks to that number, at most by half.
//! - Not quick: the window is halved, down to 1.
//!
//! A worker that served nothing since its last report does not change the window.
//!
//! # Reclaiming
//!
//! While a prompt worker is idle, and if there is no scheduler, connections are reclaimed:
//!
//! 1. From a worker that has been busy for `QUICK`, everything queued behind its current request is
//!    reclaimed. The worker that became busy first is checked first. It is slow afterwards.
//! 2. From a worker that was idle and has received nothing for `STALL_TIMEOUT`, its connections are
//!    reclaimed. If it has none left, it is stalled: for `PENALTY_MIN`, and for twice as long each
//!    further time, up to `PENALTY_MAX`.
//!
//! # Fairness
//!
//! A worker on a core with less other work is idle more often, and strict turns alone would give it more
//! than its share. So each worker has a *recent load*: the number of connections it got, raised to at
//! least `RECENT_LOAD_SPAN` less than the highest one at each dispatch. A new worker starts with the
//! highest recent load.
//!
//! The idle worker whose turn it is yields to a busy worker if that worker became busy less than
//! `FAIRNESS_BUSY_SPAN` ago, has space in its window, and has a recent load that is lower by at least
//! `FAIRNESS_LEAD`. If there are several, the one with the lowest recent load gets the connection.
//!
//! The dispatcher is pure: a connection is any type `C`, and the time is an argument.

mod member;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::Duration;

use crate::types::loads::WorkerLoad;
use crate::types::sorted_map::SortedMap;
use crate::types::time::Time;
use crate::types::violation::Violation;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::FrameError;
use member::{BusyRank, IdleRank, Member};

/// The largest window, in connections.
///
/// Each idle report costs one frame and two context switches, which a larger window spreads over more
/// connections. But more connections may have to be reclaimed from a slow worker, and more descriptors
/// are in flight. `cargo bench -- connections mixed` measures both.
pub(crate) const MAX_WINDOW: u32 = 16;

/// The time that a quick worker needs for one connection.
///
/// If it is longer, connections wait longer behind a slow request. If it is shorter than a time slice of
/// the kernel's scheduler, a few milliseconds, workers that only wait for a core lose their
/// connections. `cargo bench -- mixed` measures how long connections wait while a worker is idle.
const QUICK: Time = Duration::from_millis(5);

/// How many connections fewer a busy worker must have got than an idle one that yields its turn.
///
/// If it is larger, the shares of workers differ more. At 1, idle workers would yield for differences
/// that strict turns even out. `cargo bench -- fairness` measures the shares.
const FAIRNESS_LEAD: u64 = 4;

/// How long a worker that gets the turn of an idle one may have been busy.
///
/// If it is longer, more connections are queued behind requests that turn out to be slow. If it is
/// shorter than a typical short request, no idle worker ever yields. `cargo bench -- fairness mixed`
/// measures both.
const FAIRNESS_BUSY_SPAN: Time = Duration::from_millis(1);

/// The largest difference between two recent loads, in connections.
///
/// It bounds how long a worker that was paused or slow is preferred afterwards. It must be well above
/// `FAIRNESS_LEAD`, or differences would be forgotten before they are corrected.
const RECENT_LOAD_SPAN: u64 = 1000;

/// How many of the busy workers with the lowest recent load are checked for space in their window.
///
/// It bounds the cost of one dispatch. If it is smaller, a connection may wait although some busy
/// worker has space.
const BUSY_WORKERS_CHECKED: usize = 16;

/// The time after which a worker that was idle, and has received nothing since, is stalled.
///
/// If it is longer, connections wait longer for a stopped process. If it is shorter than the time that a
/// process waits for a core on a loaded machine, running workers are penalized.
pub(crate) const STALL_TIMEOUT: Time = Duration::from_millis(20);

/// The first penalty of a stalled worker: twice the `STALL_TIMEOUT`, because the worker may only have
/// waited for a core. Each further penalty is twice as long as the one before.
const PENALTY_MIN: Time = Duration::from_millis(40);

/// The longest penalty. A stopped worker delays one connection by `STALL_TIMEOUT` each time a penalty is
/// over; a worker that continues after a stop gets no connections for at most this time while other
/// workers are idle.
const PENALTY_MAX: Time = Duration::from_secs(1);

/// A connection with its number in the order of acceptance, which is 1 for the first connection of the
/// listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequenced<C> {
    pub(crate) sequence: u64,
    pub(crate) connection: C,
}

/// A connection and the worker whose queue it goes into.
#[derive(Debug)]
pub(crate) struct Dispatched<C> {
    pub(crate) worker: WorkerId,
    pub(crate) connection: Sequenced<C>,
    /// No worker could get it when it was accepted. The client may have hung up since.
    pub(crate) has_waited: bool,
}

/// A connection that has been accepted and is not in a worker's queue.
#[derive(Debug)]
struct Waiting<C> {
    connection: C,
    target: Target,
}

/// The worker that a waiting connection goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// The next worker by the rules.
    Next,
    /// Not known: the scheduler has not been called.
    Unscheduled,
    /// The worker that the scheduler has chosen.
    Assigned(WorkerId),
}

/// The result of one sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Swept {
    /// How many connections were checked.
    pub(crate) checked: usize,
    /// How many of them were closed.
    pub(crate) closed: u64,
}

#[derive(Debug)]
pub(crate) struct Dispatcher<C> {
    members: BTreeMap<WorkerId, Member>,
    /// The idle workers. The first one is next.
    idle: BTreeSet<IdleRank>,
    /// The busy workers whose window may have space. The first one is next.
    busy: BTreeSet<BusyRank>,
    /// The workers with connections queued behind another one, by the time since which they are busy.
    queued_behind: BTreeSet<(Time, WorkerId)>,
    /// The workers that were idle and are not known to have received anything since, by that time.
    unresponsive: BTreeSet<(Time, WorkerId)>,
    /// The ends of penalties. Some of these workers are not stalled any more.
    penalties: BTreeSet<(Time, WorkerId)>,
    /// How many connections a worker may have before it reports that it is idle again.
    window: u32,
    /// The connections that have been accepted and not been dispatched, by sequence number.
    waiting: BTreeMap<u64, Waiting<C>>,
    /// The sequence numbers of the waiting connections that the next worker gets.
    unassigned: SortedMap<u64, ()>,
    /// The sequence numbers of the waiting connections for which the scheduler has not been called.
    unscheduled: SortedMap<u64, ()>,
    /// The application chooses the workers.
    has_scheduler: bool,
    /// The workers that have capacity for a connection that is assigned to them.
    assignable: BTreeSet<WorkerId>,
    ready_count: usize,
    candidate_count: usize,
    /// The sequence number of the connection that a sweep has checked last.
    last_swept: u64,
    /// Connections up to this sequence number could not be dispatched when they were accepted.
    last_delayed: u64,
    /// Dispatched and not known to be received.
    queued_total: u64,
    accepted: u64,
    turns: u64,
    /// The highest recent load that any worker has had.
    recent_load_max: u64,
}

impl<C> Dispatcher<C> {
    pub(crate) fn new() -> Self {
        Self {
            members: BTreeMap::new(),
            idle: BTreeSet::new(),
            busy: BTreeSet::new(),
            queued_behind: BTreeSet::new(),
            unresponsive: BTreeSet::new(),
            penalties: BTreeSet::new(),
            window: 1,
            waiting: BTreeMap::new(),
            unassigned: SortedMap::new(),
            unscheduled: SortedMap::new(),
            has_scheduler: false,
            assignable: BTreeSet::new(),
            ready_count: 0,
            candidate_count: 0,
            last_swept: 0,
            last_delayed: 0,
            queued_total: 0,
            accepted: 0,
            turns: 0,
            recent_load_max: 0,
        }
    }

    /// Returns how many more connections may be accepted now.
    pub(crate) fn capacity(&self) -> u64 {
        if self.has_scheduler {
            let capacity = self.ready_count as u64 * u64::from(MAX_WINDOW);
            return capacity.saturating_sub(self.in_flight());
        }
        let capacity = self.idle.len() as u64 * u64::from(self.window);
        capacity.saturating_sub(self.waiting_count())
    }

    fn waiting_count(&self) -> u64 {
        self.waiting.len() as u64
    }

    /// Returns the connections that have been accepted and not been dispatched.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = &C> {
        self.waiting.values().map(|waiting| &waiting.connection)
    }

    pub(crate) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Lets the scheduler choose the worker of each further connection.
    pub(crate) fn use_scheduler(&mut self) {
        self.has_scheduler = true;
    }

    /// Returns the first connection for which the scheduler has not been called, and its sequence
    /// number; `None` also as long as there is no worker to choose.
    pub(crate) fn unscheduled(&self) -> Option<(u64, &C)> {
        let (sequence, ()) = self.unscheduled.first_key_value()?;
        if self.candidate_count == 0 {
            return None;
        }
        Some((*sequence, &self.waiting.get(sequence)?.connection))
    }

    /// Assigns an unscheduled connection to this worker, or to the next one by the rules if there is
    /// no such worker.
    pub(crate) fn choose(&mut self, sequence: u64, worker: Option<WorkerId>) {
        if !self.unscheduled.contains_key(&sequence) {
            return;
        }
        let candidate = worker.filter(|worker| {
            let member = self.members.get(worker);
            member.is_some_and(Member::is_candidate)
        });
        if let Some(connection) = self.dequeue(sequence) {
            let target = candidate.map_or(Target::Next, Target::Assigned);
            self.enqueue(connection, target);
        }
    }

    fn enqueue(&mut self, connection: Sequenced<C>, target: Target) {
        let Sequenced {
            sequence,
            connection,
        } = connection;
        match target {
            Target::Next => {
                self.unassigned.insert(sequence, ());
            }
            Target::Unscheduled => {
                self.unscheduled.insert(sequence, ());
            }
            Target::Assigned(worker) => {
                self.update(worker, |member| member.assigned.insert(sequence, ()));
            }
        }
        let waiting = Waiting { connection, target };
        self.waiting.insert(sequence, waiting);
    }

    fn dequeue(&mut self, sequence: u64) -> Option<Sequenced<C>> {
        let Waiting { connection, target } = self.waiting.remove(&sequence)?;
        match target {
            Target::Next => {
                self.unassigned.remove(&sequence);
            }
            Target::Unscheduled => {
                self.unscheduled.remove(&sequence);
            }
            Target::Assigned(worker) => {
                self.update(worker, |member| member.assigned.remove(&sequence));
            }
        }
        Some(Sequenced {
            sequence,
            connection,
        })
    }

    fn default_target(&self) -> Target {
        if self.has_scheduler {
            Target::Unscheduled
        } else {
            Target::Next
        }
    }

    /// Adds a connection that has just been accepted.
    pub(crate) fn push(&mut self, connection: C) {
        self.accepted += 1;
        let connection = Sequenced {
            sequence: self.accepted,
            connection,
        };
        self.enqueue(connection, self.default_target());
    }

    /// Adds connections that have been dispatched before. Their clients may have hung up since.
    fn push_back(&mut self, connections: Vec<Sequenced<C>>) {
        for connection in connections {
            self.last_delayed = self.last_delayed.max(connection.sequence);
            self.enqueue(connection, self.default_target());
        }
    }

    /// Adds a worker, which is paused.
    pub(crate) fn add(&mut self, worker: WorkerId) {
        self.turns += 1;
        let member = Member::new(self.turns, self.recent_load_max);
        self.candidate_count += 1;
        self.members.insert(worker, member);
    }

    /// Changes a worker, and updates the orders and sums. Returns the result of `change`, and how many
    /// more connections are now known to have been received.
    fn update<T>(
        &mut self,
        worker: WorkerId,
        change: impl FnOnce(&mut Member) -> T,
    ) -> Option<(T, i64)> {
        let member = self.members.get_mut(&worker)?;
        let old = member.ranks(worker);
        let (was_ready, was_candidate) = (member.is_ready(), member.is_candidate());
        let (in_flight, received) = (member.in_flight(), member.received());
        let result = change(member);
        let new = member.ranks(worker);
        self.queued_total = self.queued_total + member.in_flight() - in_flight;
        self.ready_count =
            self.ready_count + usize::from(member.is_ready()) - usize::from(was_ready);
        self.candidate_count =
            self.candidate_count + usize::from(member.is_candidate()) - usize::from(was_candidate);
        let signed = |count| i64::try_from(count).unwrap_or(i64::MAX);
        let received = signed(member.received()) - signed(received);
        replace(&mut self.idle, old.idle, new.idle);
        replace(&mut self.busy, old.busy, new.busy);
        replace(
            &mut self.queued_behind,
            old.queued_behind,
            new.queued_behind,
        );
        replace(&mut self.unresponsive, old.unresponsive, new.unresponsive);
        replace(&mut self.assignable, old.assigned, new.assigned);
        Some((result, received))
    }

    /// `worker` found its queue empty when it had received `received` connections in all, of which
    /// `open` are open. Returns how many more connections are now known to have been received.
    ///
    /// # Errors
    ///
    /// If the worker is not one of this listener, or has received more connections than it got.
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

    /// Dispatches nothing more to `worker` before it reports that it is idle again.
    ///
    /// # Errors
    ///
    /// If the worker is not one of this listener.
    pub(crate) fn pause(&mut self, worker: WorkerId) -> Result<(), FrameError> {
        let paused = self.update(worker, Member::pause);
        paused
            .map(drop)
            .ok_or(FrameError::Violation(Violation::UnknownQueue))
    }

    /// Dispatches nothing more to `worker`. It may still receive what is in its queue.
    pub(crate) fn end(&mut self, worker: WorkerId) {
        let ended = self.update(worker, Member::end);
        for (sequence, ()) in ended.into_iter().flat_map(|(assigned, _)| assigned) {
            if let Some(waiting) = self.waiting.get_mut(&sequence) {
                waiting.target = Target::Unscheduled;
                self.unscheduled.insert(sequence, ());
            }
        }
    }

    /// `queued` connections are in the queue of `worker`, whatever it has reported. Returns how many
    /// more connections are now known to have been received.
    pub(crate) fn counted(&mut self, worker: WorkerId, queued: u64) -> i64 {
        let counted = self.update(worker, |member| member.counted(queued));
        counted.map_or(0, |((), received)| received)
    }

    /// These connections were reclaimed from the queue of `worker`. If nothing is left there, `queued`
    /// has the number of connections that are still on their way to the queue. Returns how many more
    /// connections are now known to have been received: a negative number if the worker had reported
    /// that it received reclaimed ones.
    pub(crate) fn reclaimed(
        &mut self,
        worker: WorkerId,
        connections: Vec<Sequenced<C>>,
        queued: Option<u64>,
    ) -> i64 {
        let count = connections.len() as u64;
        let reclaimed = self.update(worker, |member| member.reclaimed(count, queued));
        self.push_back(connections);
        reclaimed.map_or(0, |(penalty_end, received)| {
            self.penalties
                .extend(penalty_end.map(|time| (time, worker)));
            received
        })
    }

    /// The connection could not be put into the queue of `worker`. If the worker `is_full`, it gets
    /// nothing more before it reports that it is idle.
    pub(crate) fn not_dispatched(
        &mut self,
        worker: WorkerId,
        connection: Sequenced<C>,
        is_full: bool,
    ) {
        self.update(worker, |member| {
            member.undo_dispatch();
            if is_full {
                member.pause();
            }
        });
        self.push_back(vec![connection]);
    }

    /// The client of a connection that should go into the queue of `worker` has hung up.
    pub(crate) fn hung_up(&mut self, worker: WorkerId) {
        self.update(worker, Member::undo_dispatch);
    }

    /// The queue of `worker` is closed, and these connections were in it; `queued` connections were
    /// still on their way to it. The worker is removed.
    /// Returns what is known about its load, and how many more connections are now known to have been
    /// received.
    pub(crate) fn queue_closed(
        &mut self,
        worker: WorkerId,
        connections: Vec<Sequenced<C>>,
        queued: u64,
    ) -> (Option<WorkerLoad>, i64) {
        self.end(worker);
        let received = self.reclaimed(worker, connections, Some(queued));
        // It is in none of the orders: it has ended, and its queue is empty.
        let member = self.members.remove(&worker);
        let load = member.map(|member| WorkerLoad {
            open: 0,
            ..member.figures(worker)
        });
        (load, received)
    }

    /// Returns how many connections have been accepted.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Checks at most `limit` waiting connections, and closes those for which `is_gone` is true. Each
    /// call continues where the last one ended.
    pub(crate) fn sweep(&mut self, limit: usize, mut is_gone: impl FnMut(&C) -> bool) -> Swept {
        let after = (Bound::Excluded(self.last_swept), Bound::Unbounded);
        if self.waiting.range(after).next().is_none() {
            self.last_swept = 0;
        }
        let after = (Bound::Excluded(self.last_swept), Bound::Unbounded);
        let mut swept = Swept::default();
        let mut gone = Vec::new();
        for (sequence, waiting) in self.waiting.range(after).take(limit) {
            swept.checked += 1;
            self.last_swept = *sequence;
            gone.extend(is_gone(&waiting.connection).then_some(*sequence));
        }
        for sequence in gone {
            swept.closed += u64::from(self.dequeue(sequence).is_some());
        }
        swept
    }

    /// Closes all waiting connections. Returns how many there were.
    pub(crate) fn drop_waiting(&mut self) -> u64 {
        let sequences: Vec<_> = self.waiting.keys().copied().collect();
        let dropped = sequences
            .into_iter()
            .filter_map(|sequence| self.dequeue(sequence));
        dropped.count() as u64
    }

    /// Takes the first connection that is assigned to a worker with capacity (rule 1).
    fn next_assigned(&mut self) -> Option<(WorkerId, Sequenced<C>)> {
        let worker = *self.assignable.first()?;
        let (&sequence, ()) = self.members.get(&worker)?.assigned.first_key_value()?;
        Some((worker, self.dequeue(sequence)?))
    }

    /// Takes the first unassigned connection, if a worker can get it (rules 2 and 3).
    fn next_unassigned(&mut self, now: Time) -> Option<(WorkerId, Sequenced<C>)> {
        let worker = match self.idle.first() {
            None if self.has_scheduler => return None,
            Some(idle) if self.has_scheduler => idle.worker,
            None => self.first_with_space(u64::MAX, |_| true)?,
            Some(idle) => self.yields_to(idle.worker, now).unwrap_or(idle.worker),
        };
        let (&sequence, ()) = self.unassigned.first_key_value()?;
        Some((worker, self.dequeue(sequence)?))
    }

    /// Returns the busy worker to which this idle worker yields its turn.
    fn yields_to(&self, idle: WorkerId, now: Time) -> Option<WorkerId> {
        let load_max = self
            .members
            .get(&idle)?
            .recent_load
            .checked_sub(FAIRNESS_LEAD)?;
        self.first_with_space(load_max, |busy| {
            busy.became_busy_within(FAIRNESS_BUSY_SPAN, now)
        })
    }

    /// Returns the busy worker with the lowest recent load, at most `load_max`, whose window has space
    /// and that `is_suitable`.
    fn first_with_space(
        &self,
        load_max: u64,
        is_suitable: impl Fn(&Member) -> bool,
    ) -> Option<WorkerId> {
        let busy = self.busy.iter();
        let mut busy = busy
            .take_while(|rank| rank.recent_load <= load_max)
            .take(BUSY_WORKERS_CHECKED)
            .map(|rank| rank.worker);
        busy.find(|worker| {
            let member = self.members.get(worker);
            member.is_some_and(|member| member.load() < self.window && is_suitable(member))
        })
    }

    /// Ends the penalties that are over.
    fn end_penalties(&mut self, now: Time) {
        while let Some(&(end, worker)) = self.penalties.first() {
            if end > now {
                break;
            }
            self.penalties.pop_first();
            self.update(worker, Member::penalty_over);
        }
    }

    /// Takes the next waiting connection, and says which worker gets it; `None` if there is no such
    /// connection or worker.
    pub(crate) fn dispatch_next(&mut self, now: Time) -> Option<Dispatched<C>> {
        self.end_penalties(now);
        let assigned = self.next_assigned();
        let Some((worker, connection)) = assigned.or_else(|| self.next_unassigned(now)) else {
            // Connections for which the scheduler is about to be called have not waited.
            if self.unscheduled.is_empty() {
                self.last_delayed = self.accepted;
            }
            return None;
        };
        let has_waited = connection.sequence <= self.last_delayed;
        self.turns += 1;
        let turn = self.turns;
        let load_min = self.recent_load_max.saturating_sub(RECENT_LOAD_SPAN);
        let (recent_load, _) = self.update(worker, |member| {
            member.dispatch(turn, load_min, now);
            member.recent_load
        })?;
        self.recent_load_max = self.recent_load_max.max(recent_load);
        Some(Dispatched {
            worker,
            connection,
            has_waited,
        })
    }

    /// Returns how many connections to reclaim for an idle worker now, and from which worker.
    ///
    /// A worker that has become busy recently keeps its connections: it may only be waiting for a core,
    /// and the workers that run at the moment would get everything.
    pub(crate) fn reclaimable(&self, now: Time) -> Option<(WorkerId, usize)> {
        let [queued_behind, unresponsive] = self.reclaim_times();
        let due = |(time, worker): (Time, WorkerId)| (time <= now).then_some(worker);
        let worker = queued_behind
            .and_then(due)
            .or_else(|| unresponsive.and_then(due))?;
        let member = self.members.get(&worker)?;
        Some((worker, member.queued_behind().max(1) as usize))
    }

    /// Returns the time at which `reclaimable` changes although nothing has happened.
    pub(crate) fn rebalance_deadline(&self) -> Option<Time> {
        let times = self.reclaim_times().into_iter().flatten();
        times.map(|(time, _)| time).min()
    }

    /// Returns when connections queued behind another one, and those of an unresponsive worker, can be
    /// reclaimed first, and from which worker.
    fn reclaim_times(&self) -> [Option<(Time, WorkerId)>; 2] {
        if self.has_scheduler || !self.is_prompt_worker_idle() {
            return [None, None];
        }
        let first = |order: &BTreeSet<(Time, WorkerId)>, delay| {
            let &(since, worker) = order.first()?;
            Some((since.saturating_add(delay), worker))
        };
        [
            first(&self.queued_behind, QUICK),
            first(&self.unresponsive, STALL_TIMEOUT),
        ]
    }

    fn is_prompt_worker_idle(&self) -> bool {
        self.idle.first().is_some_and(|rank| !rank.is_stalled)
    }

    /// Returns the load of each worker of this listener.
    pub(crate) fn loads(&self) -> impl Iterator<Item = WorkerLoad> + '_ {
        let members = self.members.iter();
        members.map(|(worker, member)| member.figures(*worker))
    }

    /// Returns the load of each worker that the scheduler may choose.
    pub(crate) fn candidates(&self) -> impl Iterator<Item = WorkerLoad> + '_ {
        let members = self.members.iter();
        let members = members.filter(|(_, member)| member.is_candidate());
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

fn replace<T: Ord>(set: &mut BTreeSet<T>, old: Option<T>, new: Option<T>) {
    if old != new {
        if let Some(old) = old {
            set.remove(&old);
        }
        set.extend(new);
    }
}
