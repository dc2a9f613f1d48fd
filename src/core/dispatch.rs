//! Which worker gets the next connection of one listener. Pure: a connection is any `C`.
//!
//! What a worker is given lies in its *queue* until it takes it out; until then the master can take
//! it back. A worker that has found its queue empty says so: it is *idle* then. An idle worker comes
//! before a busy one, and among idle ones the one served longest ago comes first. A busy worker is
//! given something ahead only as far as workers have been quick before; what lies behind a request
//! that turns out slow is taken back if another worker is idle.
//!
//! Who is often the only idle one would have more than its share: it runs on the core that has less
//! to do. So it leaves what it would be given to a busy worker that *had* less and has not been busy for
//! long, if there is one.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::Duration;

use crate::runtime::timers::{Time, earlier};
use crate::types::loads::WorkerLoad;
use crate::types::sorted_map::SortedMap;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::FrameError;

/// The most connections one worker is given before it says that it is idle again. Each time costs a
/// frame and two changes of process; but what is given ahead may have to be taken back.
pub(crate) const MAX_WINDOW: u32 = 16;
/// A worker is quick if it needs no longer than this for a connection, with others on the same core.
const QUICK: Time = Duration::from_millis(5);
/// So many fewer a busy worker must have had than an idle one that lets it go first.
const LEAD: u64 = 4;
/// And it must not have been busy for longer than this, with whatever it is.
const FRESH: Time = Duration::from_millis(1);
/// Nobody is taken to have had so many fewer than another: what is longer ago does not count.
const MEMORY: u64 = 1000;
/// So many of those who had least are looked at to find one that has room.
const LOOK: usize = 16;
/// An idle worker that has not taken what it was given for so long has been stopped, most likely.
pub(crate) const STALE: Time = Duration::from_millis(20);
/// After that time a worker that did not take what it was given has its turn again: it may have been
/// waiting for a core. If it does not take that either, the next time is twice as long.
const SHORTEST_NAP: Time = Duration::from_millis(40);
const LONGEST_NAP: Time = Duration::from_secs(1);

/// A connection on its way to a worker.
#[derive(Debug)]
pub(crate) struct Dispatched<C> {
    pub(crate) worker: WorkerId,
    pub(crate) placed: Sequenced<C>,
    /// No worker could take it at once. The client may have hung up meanwhile.
    pub(crate) has_waited: bool,
}

/// A connection with its place among all that were accepted.
pub(crate) type Sequenced<C> = (u64, C);

/// A connection that has been accepted and not been dispatched.
#[derive(Debug)]
struct Held<C> {
    connection: C,
    wanted: Wanted,
}

/// The worker that a waiting connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// The next one in turn.
    Next,
    /// The scheduler has not been asked yet.
    Unscheduled,
    /// The one that the scheduler has chosen.
    Chosen(WorkerId),
}

/// The result of one sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Swept {
    /// How many connections were checked.
    pub(crate) checked: usize,
    /// How many of them were closed.
    pub(crate) gone: u64,
}

#[derive(Debug)]
struct Member {
    /// It takes connections: it has said so, and not that it wants no more.
    ready: bool,
    /// Told that nothing more comes.
    ended: bool,
    /// Put into its queue, and not taken back.
    sent: u64,
    /// Of these, how many it has taken out, as far as is known.
    taken: u64,
    /// How many of these it had taken out when it was idle.
    done: u64,
    /// How many of these its program still had then.
    open: u64,
    /// Taken back.
    refused: u64,
    /// What lay behind another connection was taken back from it, and it has not been idle since.
    slow: bool,
    /// When it was sent the first of them.
    busy_since: Time,
    /// It was idle, and did not take what it was sent.
    sleeps: bool,
    /// For how long it was taken to sleep the last time; zero if it has taken something since.
    nap: Time,
    /// When it was last sent something; of those who are idle the smallest is next.
    turn: u64,
    /// How many connections it has had, as far as that counts; of those who are busy the smallest is
    /// next.
    had: u64,
    /// The connections that the scheduler has chosen it for, by place.
    chosen: SortedMap<u64, ()>,
}

impl Member {
    /// What it has been sent since it was idle: all this it may still be busy with.
    fn load(&self) -> u32 {
        u32::try_from(self.sent - self.done).unwrap_or(u32::MAX)
    }

    /// What may still be in its queue.
    fn queued(&self) -> u32 {
        u32::try_from(self.sent - self.taken).unwrap_or(u32::MAX)
    }

    /// Whether it can be given something, if it is idle or has not too much already.
    fn takes(&self) -> bool {
        self.ready && !self.ended && !(self.slow && self.load() > 0)
    }

    fn is_idle(&self) -> bool {
        self.takes() && self.load() == 0
    }

    /// Whether the scheduler may choose it.
    fn is_candidate(&self) -> bool {
        !self.ended
    }

    /// Whether it has said that it takes connections.
    fn is_ready(&self) -> bool {
        self.ready && !self.ended
    }

    /// What may lie behind another connection.
    fn behind(&self) -> u32 {
        self.queued().min(self.load().saturating_sub(1))
    }

    fn figures(&self, worker: WorkerId) -> WorkerLoad {
        WorkerLoad {
            given: self.sent + self.refused,
            taken: self.taken,
            open: self.open + self.taken - self.done,
            refused: self.refused,
            ..WorkerLoad::new(worker)
        }
    }

    /// Its places in the orders below.
    fn ranks(&self, worker: WorkerId) -> Ranks {
        let (load, behind) = (self.load(), self.behind());
        let unmoved = load > 0 && self.taken == self.done;
        let has_room = self.is_ready() && self.queued() < MAX_WINDOW;
        Ranks {
            idle: self.is_idle().then_some((self.sleeps, self.turn, worker)),
            busy: (self.takes() && load > 0 && !self.sleeps).then_some((self.had, worker)),
            behind: (behind > 0).then_some((self.busy_since, worker)),
            unmoved: unmoved.then_some((self.busy_since, worker)),
            chosen: (has_room && !self.chosen.is_empty()).then_some(worker),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Ranks {
    idle: Option<(bool, u64, WorkerId)>,
    busy: Option<(u64, WorkerId)>,
    behind: Option<(Time, WorkerId)>,
    unmoved: Option<(Time, WorkerId)>,
    chosen: Option<WorkerId>,
}

#[derive(Debug)]
pub(crate) struct RoundRobin<C> {
    members: BTreeMap<WorkerId, Member>,
    /// Who is idle: whether it sleeps, and when it was its turn last; the first is next.
    idle: BTreeSet<(bool, u64, WorkerId)>,
    /// Who is busy and can be given something ahead, by what it had.
    busy: BTreeSet<(u64, WorkerId)>,
    /// From whom something can be taken that lies behind another; the first has been busy longest.
    behind: BTreeSet<(Time, WorkerId)>,
    /// Who was idle and is not known to have taken anything since.
    unmoved: BTreeSet<(Time, WorkerId)>,
    /// Who sleeps, and until when; some may not sleep any more.
    sleepers: BTreeSet<(Time, WorkerId)>,
    /// How many connections one worker is sent before it is idle again, as it has turned out.
    window: u32,
    /// The connections that have been accepted and not been dispatched, by place.
    held: BTreeMap<u64, Held<C>>,
    /// Those of them that the next worker in turn gets.
    waiting: SortedMap<u64, ()>,
    /// The program says who gets what; here is what it has not been asked about.
    chooses: bool,
    unscheduled: SortedMap<u64, ()>,
    /// The workers with queue capacity for a connection that the scheduler has chosen for them.
    chosen: BTreeSet<WorkerId>,
    /// How many members are ready, and how many are candidates.
    ready: usize,
    candidates: usize,
    /// The last connection that a sweep has checked, by place.
    swept: u64,
    /// No worker could take the connections up to this place when they came.
    waited: u64,
    /// Sent and not known to be taken.
    under_way: u64,
    accepted: u64,
    turns: u64,
    /// What the one had who had most.
    most: u64,
}

impl<C> RoundRobin<C> {
    pub(crate) fn new() -> Self {
        Self {
            members: BTreeMap::new(),
            idle: BTreeSet::new(),
            busy: BTreeSet::new(),
            behind: BTreeSet::new(),
            unmoved: BTreeSet::new(),
            sleepers: BTreeSet::new(),
            window: 1,
            held: BTreeMap::new(),
            waiting: SortedMap::new(),
            chooses: false,
            unscheduled: SortedMap::new(),
            chosen: BTreeSet::new(),
            ready: 0,
            candidates: 0,
            swept: 0,
            waited: 0,
            under_way: 0,
            accepted: 0,
            turns: 0,
            most: 0,
        }
    }

    /// How many more connections may be accepted now: the room not spoken for. None as long as
    /// nobody is idle: whoever comes may as well wait in the kernel.
    pub(crate) fn room(&self) -> u64 {
        if self.chooses {
            let most = self.ready as u64 * u64::from(MAX_WINDOW);
            return most.saturating_sub(self.in_hand());
        }
        let room = self.idle.len() as u64 * u64::from(self.window);
        room.saturating_sub(self.count_waiting())
    }

    /// Accepted and given to nobody.
    fn count_waiting(&self) -> u64 {
        self.held.len() as u64
    }

    /// All that were accepted and given to nobody.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = &C> {
        self.held.values().map(|held| &held.connection)
    }

    /// Whether any connection waits for a worker.
    pub(crate) fn has_waiting(&self) -> bool {
        !self.held.is_empty()
    }

    /// From now on the program says who gets what.
    pub(crate) fn use_scheduler(&mut self) {
        self.chooses = true;
    }

    /// A connection of which the program is to say who gets it. It is not asked as long as there is
    /// nobody to choose.
    pub(crate) fn unscheduled(&self) -> Option<(u64, &C)> {
        let (place, ()) = self.unscheduled.first_key_value()?;
        if self.candidates == 0 {
            return None;
        }
        Some((*place, &self.held.get(place)?.connection))
    }

    /// The program has chosen this worker; or none, and leaves it to whoever is next.
    pub(crate) fn choose(&mut self, place: u64, worker: Option<WorkerId>) {
        if !self.unscheduled.contains_key(&place) {
            return;
        }
        let candidate = worker.filter(|worker| {
            let member = self.members.get(worker);
            member.is_some_and(Member::is_candidate)
        });
        if let Some(connection) = self.release(place) {
            let wanted = candidate.map_or(Wanted::Next, Wanted::Chosen);
            self.hold((place, connection), wanted);
        }
    }

    /// Keeps a connection until it is dispatched.
    fn hold(&mut self, (place, connection): Sequenced<C>, wanted: Wanted) {
        match wanted {
            Wanted::Next => {
                self.waiting.insert(place, ());
            }
            Wanted::Unscheduled => {
                self.unscheduled.insert(place, ());
            }
            Wanted::Chosen(worker) => {
                self.change(worker, |member| member.chosen.insert(place, ()));
            }
        }
        self.held.insert(place, Held { connection, wanted });
    }

    /// Undoes `hold`.
    fn release(&mut self, place: u64) -> Option<C> {
        let Held { connection, wanted } = self.held.remove(&place)?;
        match wanted {
            Wanted::Next => {
                self.waiting.remove(&place);
            }
            Wanted::Unscheduled => {
                self.unscheduled.remove(&place);
            }
            Wanted::Chosen(worker) => {
                self.change(worker, |member| member.chosen.remove(&place));
            }
        }
        Some(connection)
    }

    /// Adds connections that wait to be dispatched.
    fn wait(&mut self, connections: impl IntoIterator<Item = Sequenced<C>>) {
        let wanted = if self.chooses {
            Wanted::Unscheduled
        } else {
            Wanted::Next
        };
        for placed in connections {
            self.hold(placed, wanted);
        }
    }

    /// The same of connections that have been dispatched once. Their clients may have hung up since.
    fn wait_again(&mut self, connections: Vec<Sequenced<C>>) {
        let last = connections.iter().map(|(place, _)| *place).max();
        self.waited = self.waited.max(last.unwrap_or(0));
        self.wait(connections);
    }

    pub(crate) fn join(&mut self, worker: WorkerId) {
        self.turns += 1;
        let member = Member {
            ready: false,
            ended: false,
            sent: 0,
            taken: 0,
            done: 0,
            open: 0,
            refused: 0,
            slow: false,
            busy_since: Time::ZERO,
            sleeps: false,
            nap: Time::ZERO,
            turn: self.turns,
            had: self.most,
            chosen: SortedMap::new(),
        };
        self.candidates += 1;
        self.members.insert(worker, member);
    }

    /// Changes a member and keeps the orders and sums right. Returns what `change` does, and how
    /// many more connections are known now to have been taken.
    fn change<T>(
        &mut self,
        worker: WorkerId,
        change: impl FnOnce(&mut Member) -> T,
    ) -> Option<(T, i64)> {
        let member = self.members.get_mut(&worker)?;
        let ranks = member.ranks(worker);
        let (was_ready, was_candidate) = (member.is_ready(), member.is_candidate());
        let (sent, taken) = (member.sent, member.taken);
        let result = change(member);
        let new = member.ranks(worker);
        self.under_way = self.under_way + member.sent + taken - sent - member.taken;
        self.ready = self.ready + usize::from(member.is_ready()) - usize::from(was_ready);
        self.candidates =
            self.candidates + usize::from(member.is_candidate()) - usize::from(was_candidate);
        let signed = |count| i64::try_from(count).unwrap_or(i64::MAX);
        let taken = signed(member.taken) - signed(taken);
        exchange(&mut self.idle, ranks.idle, new.idle);
        exchange(&mut self.busy, ranks.busy, new.busy);
        exchange(&mut self.behind, ranks.behind, new.behind);
        exchange(&mut self.unmoved, ranks.unmoved, new.unmoved);
        exchange(&mut self.chosen, ranks.chosen, new.chosen);
        Some((result, taken))
    }

    /// Takes note that `worker` found its queue empty when it had taken `taken` connections in all,
    /// of which `open` are open. Returns how many of the first are news.
    pub(crate) fn idle(
        &mut self,
        worker: WorkerId,
        (taken, open): (u64, u32),
        now: Time,
    ) -> Result<i64, FrameError> {
        let mut window = self.window;
        let outcome = self.change(worker, |member| {
            if taken > member.sent {
                return Err(FrameError::State("took a connection it was never given"));
            }
            let served = u32::try_from(taken.saturating_sub(member.done)).unwrap_or(u32::MAX);
            let quick = now.saturating_sub(member.busy_since) <= QUICK.saturating_mul(served);
            window = match (served, quick) {
                (0, _) => window,
                (served, true) if served >= window => window.saturating_mul(2).min(MAX_WINDOW),
                // There was not as much to do, or it took too long.
                (served, true) => served.max(window / 2).max(1),
                (_, false) => (window / 2).max(1),
            };
            member.slow = false;
            member.ready = true;
            if served > 0 {
                (member.sleeps, member.nap) = (false, Time::ZERO);
            }
            // What it said may be older than what is known.
            member.taken = member.taken.max(taken);
            member.done = member.done.max(taken);
            member.open = open.into();
            member.busy_since = now;
            Ok(())
        });
        self.window = window;
        match outcome {
            Some((Ok(()), taken)) => Ok(taken),
            Some((Err(error), _)) => Err(error),
            None => Err(FrameError::State("ready for a listener it has not")),
        }
    }

    /// Gives `worker` nothing more before it is idle again.
    pub(crate) fn revoke(&mut self, worker: WorkerId) -> Result<(), FrameError> {
        let revoked = self.change(worker, |member| member.ready = false);
        revoked
            .map(drop)
            .ok_or(FrameError::State("revoked what it never had"))
    }

    /// Gives `worker` nothing more; what is in its queue it may still take.
    pub(crate) fn end(&mut self, worker: WorkerId) {
        let ended = self.change(worker, |member| {
            member.ended = true;
            std::mem::take(&mut member.chosen)
        });
        for (place, ()) in ended.into_iter().flat_map(|(chosen, _)| chosen) {
            if let Some(held) = self.held.get_mut(&place) {
                held.wanted = Wanted::Unscheduled;
                self.unscheduled.insert(place, ());
            }
        }
    }

    /// So many are left in the queue of `worker`, whatever it has said. Returns how many more are
    /// known now to be taken.
    pub(crate) fn counted(&mut self, worker: WorkerId, queued: u64) -> i64 {
        let counted = self.change(worker, |member| {
            member.taken = member.sent.saturating_sub(queued);
            member.done = member.done.min(member.taken);
        });
        counted.map_or(0, |((), taken)| taken)
    }

    /// These have been taken back out of the queue of `worker`, which is empty then or not. Returns
    /// how many more are known now to be taken: less than none, if it has said that it took these.
    pub(crate) fn reclaimed(
        &mut self,
        worker: WorkerId,
        connections: Vec<Sequenced<C>>,
        is_empty: bool,
    ) -> i64 {
        let count = connections.len() as u64;
        let changed = self.change(worker, |member| {
            member.sent = member.sent.saturating_sub(count);
            member.refused += count;
            member.had = member.had.saturating_sub(count);
            member.taken = if is_empty {
                member.sent
            } else {
                member.taken.min(member.sent)
            };
            member.done = member.done.min(member.taken);
            member.slow |= count > 0 && member.load() > 0;
            // It was idle, and still is; but somebody else would have taken them.
            let falls_asleep = count > 0 && member.load() == 0 && !member.sleeps;
            if falls_asleep {
                member.sleeps = true;
                member.nap = (member.nap * 2).clamp(SHORTEST_NAP, LONGEST_NAP);
            }
            falls_asleep.then_some((member.busy_since.saturating_add(member.nap), worker))
        });
        self.wait_again(connections);
        changed.map_or(0, |(sleeper, taken)| {
            self.sleepers.extend(sleeper);
            taken
        })
    }

    /// This could not be put into the queue of `worker`. If it `takes_more` all the same, it is
    /// offered more later, and otherwise when it is idle again.
    pub(crate) fn not_dispatched(
        &mut self,
        worker: WorkerId,
        connection: Sequenced<C>,
        takes_more: bool,
    ) {
        self.change(worker, |member| {
            member.sent -= 1;
            member.had = member.had.saturating_sub(1);
            member.ready &= takes_more;
        });
        self.wait_again(vec![connection]);
    }

    /// The client of this connection, which was to be put into the queue of `worker`, has hung up.
    pub(crate) fn hung_up(&mut self, worker: WorkerId) {
        self.change(worker, |member| {
            member.sent -= 1;
            member.had = member.had.saturating_sub(1);
        });
    }

    /// Gives `worker` nothing more, out of whose queue these were taken back, the last ones. Returns
    /// how many more are known now to be taken.
    pub(crate) fn leave(&mut self, worker: WorkerId, connections: Vec<Sequenced<C>>) -> i64 {
        self.end(worker);
        self.reclaimed(worker, connections, true)
    }

    /// Forgets a worker that has left. Returns what it has had.
    pub(crate) fn forget(&mut self, worker: WorkerId) -> Option<WorkerLoad> {
        // It is in none of the orders: it has no room, and nothing in its queue.
        let member = self.members.remove(&worker)?;
        Some(WorkerLoad {
            open: 0,
            ..member.figures(worker)
        })
    }

    pub(crate) fn push(&mut self, connection: C) {
        self.accepted += 1;
        self.wait([(self.accepted, connection)]);
    }

    /// How many connections have been accepted.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Checks at most `at_most` waiting connections, and removes those that `gone` says are gone.
    /// Each call goes on where the last one ended.
    pub(crate) fn sweep(&mut self, at_most: usize, mut gone: impl FnMut(&C) -> bool) -> Swept {
        let after = (Bound::Excluded(self.swept), Bound::Unbounded);
        if self.held.range(after).next().is_none() {
            self.swept = 0;
        }
        let after = (Bound::Excluded(self.swept), Bound::Unbounded);
        let mut swept = Swept::default();
        let mut closed = Vec::new();
        for (place, held) in self.held.range(after).take(at_most) {
            swept.checked += 1;
            self.swept = *place;
            closed.extend(gone(&held.connection).then_some(*place));
        }
        for place in closed {
            swept.gone += u64::from(self.release(place).is_some());
        }
        swept
    }

    pub(crate) fn drop_waiting(&mut self) -> u64 {
        let places: Vec<_> = self.held.keys().copied().collect();
        let dropped = places.into_iter().filter_map(|place| self.release(place));
        dropped.count() as u64
    }

    /// The first connection for which a worker was chosen that has room.
    fn next_chosen(&mut self) -> Option<(WorkerId, Sequenced<C>)> {
        let worker = *self.chosen.first()?;
        let (place, ()) = self.members.get(&worker)?.chosen.first_key_value()?;
        let place = *place;
        Some((worker, (place, self.release(place)?)))
    }

    /// The first waiting connection, and the worker whose turn it is.
    fn next_in_turn(&mut self, now: Time) -> Option<(WorkerId, Sequenced<C>)> {
        let worker = match self.idle.first() {
            // Nothing would be taken back that turns out to lie behind a slow one.
            None if self.chooses => return None,
            Some(&(_, _, idle)) if self.chooses => idle,
            None => self.first_with_room(u64::MAX, |_| true)?,
            Some(&(_, _, idle)) => {
                let fresh = |busy: &Member| now.saturating_sub(busy.busy_since) < FRESH;
                let most = self.members.get(&idle)?.had.checked_sub(LEAD);
                let other = most.and_then(|most| self.first_with_room(most, fresh));
                other.unwrap_or(idle)
            }
        };
        let (place, ()) = self.waiting.first_key_value()?;
        let place = *place;
        Some((worker, (place, self.release(place)?)))
    }

    /// Of the busy workers that had no more than `most` and are `fit`, the one that had least and can
    /// be given something ahead.
    fn first_with_room(&self, most: u64, fit: impl Fn(&Member) -> bool) -> Option<WorkerId> {
        let behind = self.busy.iter().take_while(|(had, _)| *had <= most);
        let has_room = |worker: &WorkerId| {
            let member = self.members.get(worker);
            member.is_some_and(|member| member.load() < self.window && fit(member))
        };
        behind.map(|(_, worker)| *worker).take(LOOK).find(has_room)
    }

    /// Gives a waiting connection to a worker.
    pub(crate) fn distribute(&mut self, now: Time) -> Option<Dispatched<C>> {
        while let Some(&(until, worker)) = self.sleepers.first() {
            if until > now {
                break;
            }
            self.sleepers.pop_first();
            self.change(worker, |member| member.sleeps = false);
        }
        let chosen = self.next_chosen();
        let Some((worker, placed)) = chosen.or_else(|| self.next_in_turn(now)) else {
            // The scheduler is asked at once: what it has not been asked about does not wait yet.
            if self.unscheduled.is_empty() {
                self.waited = self.accepted;
            }
            return None;
        };
        let has_waited = placed.0 <= self.waited;
        self.turns += 1;
        let (turn, forgotten) = (self.turns, self.most.saturating_sub(MEMORY));
        let (had, _) = self.change(worker, |member| {
            if member.load() == 0 {
                member.busy_since = now;
            }
            member.sent += 1;
            member.turn = turn;
            member.had = member.had.max(forgotten) + 1;
            member.had
        })?;
        self.most = self.most.max(had);
        Some(Dispatched {
            worker,
            placed,
            has_waited,
        })
    }

    /// Out of whose queue connections should be taken back, because another worker is idle, and how
    /// many. Not at once: who is only waiting for a core would lose what it has to whoever has one.
    pub(crate) fn to_reclaim(&self, now: Time) -> Option<(WorkerId, usize)> {
        if self.chooses || !self.anyone_is_idle() {
            return None;
        }
        let is_over = |since: Time, patience| since.saturating_add(patience) <= now;
        let behind = self.behind.first();
        let behind = behind.filter(|(since, _)| is_over(*since, QUICK));
        let unmoved = self.unmoved.first();
        let unmoved = unmoved.filter(|(since, _)| is_over(*since, STALE));
        let (_, worker) = behind.or(unmoved)?;
        let member = self.members.get(worker)?;
        Some((*worker, member.behind().max(1) as usize))
    }

    /// When `to_reclaim` may have somebody to name although nothing has happened.
    pub(crate) fn rebalance_deadline(&self) -> Option<Time> {
        if self.chooses || !self.anyone_is_idle() {
            return None;
        }
        let behind = self
            .behind
            .first()
            .map(|(since, _)| since.saturating_add(QUICK));
        let unmoved = self
            .unmoved
            .first()
            .map(|(since, _)| since.saturating_add(STALE));
        earlier(behind, unmoved)
    }

    fn anyone_is_idle(&self) -> bool {
        matches!(self.idle.first(), Some((false, ..)))
    }

    /// What each has had so far.
    pub(crate) fn loads(&self) -> impl Iterator<Item = WorkerLoad> + '_ {
        let members = self.members.iter();
        members.map(|(worker, member)| member.figures(*worker))
    }

    /// The same of those that may be given something.
    pub(crate) fn candidates(&self) -> impl Iterator<Item = WorkerLoad> + '_ {
        let members = self.members.iter().filter(|(_, member)| !member.ended);
        members.map(|(worker, member)| member.figures(*worker))
    }

    /// Who may have something in its queue.
    pub(crate) fn with_queues(&self) -> impl Iterator<Item = WorkerId> + '_ {
        let queued = self
            .members
            .iter()
            .filter(|(_, member)| member.queued() > 0);
        queued.map(|(worker, _)| *worker)
    }

    /// Accepted and not known to be taken, wherever they are.
    pub(crate) fn in_hand(&self) -> u64 {
        self.count_waiting() + self.under_way
    }
}

fn exchange<T: Ord>(set: &mut BTreeSet<T>, old: Option<T>, new: Option<T>) {
    if old != new {
        if let Some(old) = old {
            set.remove(&old);
        }
        set.extend(new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    const NOW: Time = Time::ZERO;
    const LATER: Time = Time::from_secs(1);

    fn id(n: u32) -> WorkerId {
        WorkerId::new(n)
    }

    /// Workers that are idle.
    fn idle(count: u32) -> RoundRobin<u32> {
        let mut rr = RoundRobin::new();
        for n in 1..=count {
            rr.join(id(n));
            rr.idle(id(n), (0, 0), NOW).unwrap();
        }
        rr
    }

    fn who(rr: &mut RoundRobin<u32>) -> Vec<(u32, u32)> {
        let given = std::iter::from_fn(|| rr.distribute(NOW));
        given.map(|g| (g.worker.get(), g.placed.1)).collect()
    }

    /// Makes a worker that is idle prove to be quick, until it is given as many ahead as possible.
    fn hurry(rr: &mut RoundRobin<u32>, worker: u32) {
        let mut taken = 0;
        for window in [1, 2, 4, 8] {
            (0..window).for_each(|c| rr.push(c));
            assert_eq!(who(rr).len(), window as usize);
            taken += u64::from(window);
            rr.idle(id(worker), (taken, 0), NOW).unwrap();
        }
    }

    #[test]
    fn nothing_is_given_to_who_is_not_idle() {
        let mut rr = RoundRobin::new();
        rr.join(id(1));
        rr.push(7);
        assert!(rr.distribute(NOW).is_none());
        rr.idle(id(1), (0, 0), NOW).unwrap();
        assert_eq!(rr.room(), 0, "what there is is spoken for");
        assert_eq!(who(&mut rr), [(1, 7)]);
    }

    #[test]
    fn idle_workers_take_strict_turns() {
        let mut rr = idle(3);
        let mut taken = [0; 3];
        for n in 0..300 {
            rr.push(n);
            let worker = n % 3 + 1;
            assert_eq!(who(&mut rr), [(worker, n)]);
            let count = &mut taken[worker as usize - 1];
            *count += 1;
            rr.idle(id(worker), (*count, 0), NOW).unwrap();
        }
    }

    #[test]
    fn a_late_worker_gets_its_turn_back() {
        let mut rr = RoundRobin::new();
        (1..=3).for_each(|n| rr.join(id(n)));
        for n in [2, 3] {
            rr.idle(id(n), (0, 0), NOW).unwrap();
        }
        rr.push(0);
        assert_eq!(who(&mut rr), [(2, 0)]);
        rr.idle(id(1), (0, 0), NOW).unwrap();
        rr.push(1);
        assert_eq!(who(&mut rr), [(1, 1)]);
    }

    /// The first worker is idle after each connection, the second is busy all the time with what it
    /// was given first. Returns who got which.
    fn uneven(took: Time) -> Vec<u32> {
        let mut rr = idle(2);
        rr.push(0);
        assert_eq!(who(&mut rr), [(1, 0)]);
        rr.idle(id(1), (1, 0), NOW).unwrap();
        let mut now = NOW;
        let mut next = |n| {
            rr.push(n);
            let given = rr.distribute(now).unwrap();
            now += took;
            let (taken, load) = (rr.members[&id(1)].sent, rr.members[&id(1)].load());
            if load > 0 {
                rr.idle(id(1), (taken, 0), now).unwrap();
            }
            // As if others were as quick as the first.
            rr.window = MAX_WINDOW;
            given.worker.get()
        };
        (0..12).map(&mut next).collect()
    }

    #[test]
    fn an_idle_worker_lets_those_go_first_who_had_less_and_are_not_busy_for_long() {
        let even = [2, 1, 1, 1, 1, 2, 1, 2, 1, 2, 1, 2];
        assert_eq!(uneven(Time::ZERO), even);
        assert_eq!(uneven(FRESH), [2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
    }

    #[test]
    fn whom_the_program_leaves_to_whoever_is_next_waits_for_one_who_is_idle() {
        let mut rr = idle(2);
        rr.use_scheduler();
        let give = |rr: &mut RoundRobin<u32>, worker| {
            rr.window = MAX_WINDOW;
            rr.push(0);
            let (place, _) = rr.unscheduled().unwrap();
            rr.choose(place, worker);
            who(rr)
                .iter()
                .map(|(worker, _)| *worker)
                .collect::<Vec<_>>()
        };
        for taken in 1..=2 * LEAD {
            assert_eq!(give(&mut rr, Some(id(2))), [2]);
            rr.idle(id(2), (taken, 0), NOW).unwrap();
        }
        assert_eq!(
            give(&mut rr, Some(id(1))),
            [1],
            "which had less, and is busy"
        );
        assert_eq!(give(&mut rr, None), [2]);
        assert_eq!(give(&mut rr, None), [0; 0], "nobody is idle");
        rr.idle(id(1), (1, 0), NOW).unwrap();
        assert_eq!(who(&mut rr).len(), 1);
    }

    #[test]
    fn what_is_long_ago_does_not_count() {
        let mut rr = idle(2);
        let mut sent = 0;
        let mut serve = |rr: &mut RoundRobin<u32>| {
            rr.push(0);
            sent += 1;
            assert_eq!(who(rr), [(2, 0)]);
            rr.idle(id(2), (sent, 0), NOW).unwrap();
        };
        rr.revoke(id(1)).unwrap();
        (0..3 * MEMORY).for_each(|_| serve(&mut rr));
        rr.idle(id(1), (0, 0), NOW).unwrap();
        rr.push(0);
        assert_eq!(who(&mut rr), [(1, 0)]);
        assert_eq!(rr.members[&id(1)].had, 2 * MEMORY + 1);
    }

    #[test]
    fn who_is_slow_is_given_nothing_ahead() {
        let mut rr = idle(2);
        for taken in 1..10 {
            (0..5).for_each(|c| rr.push(c));
            assert_eq!(who(&mut rr).len(), 2, "one each");
            rr.drop_waiting();
            for worker in [1, 2] {
                rr.idle(id(worker), (taken, 0), LATER).unwrap();
            }
        }
    }

    #[test]
    fn quick_workers_are_given_more_and_more_ahead_and_less_if_one_was_slow() {
        let mut rr = idle(1);
        hurry(&mut rr, 1);
        assert_eq!(rr.room(), u64::from(MAX_WINDOW));
        rr.push(0);
        assert_eq!(who(&mut rr).len(), 1);
        rr.idle(id(1), (16, 0), LATER).unwrap();
        assert_eq!(rr.room(), u64::from(MAX_WINDOW) / 2);
    }

    #[test]
    fn what_lies_behind_a_slow_one_is_for_whoever_is_idle() {
        let mut rr = idle(1);
        hurry(&mut rr, 1);
        (0..5).for_each(|c| rr.push(c));
        assert_eq!(who(&mut rr).len(), 5);
        assert_eq!(rr.to_reclaim(LATER), None, "nobody is idle");
        rr.join(id(2));
        rr.idle(id(2), (0, 0), NOW).unwrap();
        assert_eq!(rr.to_reclaim(NOW), None, "it may still be quick");
        assert_eq!(rr.rebalance_deadline(), Some(QUICK));
        assert_eq!(rr.to_reclaim(QUICK), Some((id(1), 4)));
        rr.reclaimed(id(1), (17..21).map(|place| (place, 0)).collect(), false);
        assert_eq!(who(&mut rr), [(2, 0); 4], "and nothing for the slow one");
        rr.idle(id(2), (4, 0), LATER).unwrap();
        rr.reclaimed(id(1), vec![], true);
        assert_eq!(rr.to_reclaim(LATER), None, "the first one is being served");
    }

    #[test]
    fn what_a_sleeper_does_not_take_is_for_others() {
        let mut rr = idle(2);
        rr.push(5);
        assert_eq!(who(&mut rr), [(1, 5)]);
        assert_eq!(rr.to_reclaim(NOW), None);
        assert_eq!(rr.rebalance_deadline(), Some(STALE));
        assert_eq!(rr.to_reclaim(STALE), Some((id(1), 1)));
        rr.reclaimed(id(1), vec![(1, 5)], false);
        assert_eq!(who(&mut rr), [(2, 5)]);
        rr.idle(id(2), (1, 0), NOW).unwrap();
        for n in 6..9 {
            rr.push(n);
            assert_eq!(who(&mut rr), [(2, n)], "the sleeper comes last");
            rr.idle(id(2), (u64::from(n) - 4, 0), NOW).unwrap();
        }
        (0..2).for_each(|n| rr.push(n));
        let given = who(&mut rr);
        assert_eq!(given, [(2, 0), (1, 1)], "its chance");
        rr.idle(id(1), (1, 0), NOW).unwrap();
        rr.idle(id(2), (5, 0), NOW).unwrap();
        (9..11).for_each(|n| rr.push(n));
        assert_eq!(who(&mut rr), [(2, 9), (1, 10)], "it has used it");
    }

    #[test]
    fn a_sleeper_has_its_turn_again_after_a_nap_and_a_longer_one_next_time() {
        let mut rr = idle(2);
        let (mut taken, mut times) = (0, Vec::new());
        for ms in 0..4000u32 {
            let now = Duration::from_millis(u64::from(ms));
            rr.push(ms);
            while let Some(given) = rr.distribute(now) {
                if given.worker == id(1) {
                    times.push(ms);
                    rr.reclaimed(id(1), vec![given.placed], false);
                } else {
                    taken += 1;
                    rr.idle(id(2), (taken, 0), now).unwrap();
                }
            }
        }
        assert_eq!(times, [0, 40, 120, 280, 600, 1240, 2240, 3240]);
    }

    #[test]
    fn a_sleeper_that_is_idle_comes_before_who_is_busy() {
        let mut rr = idle(2);
        rr.push(0);
        assert_eq!(who(&mut rr), [(1, 0)]);
        rr.reclaimed(id(1), vec![(1, 0)], false);
        assert_eq!(who(&mut rr), [(2, 0)]);
        rr.idle(id(2), (1, 0), NOW).unwrap();
        (1..4).for_each(|n| rr.push(n));
        assert_eq!(who(&mut rr)[..2], [(2, 1), (1, 2)]);
        rr.drop_waiting();
        rr.reclaimed(id(1), vec![(3, 2)], false);
        rr.drop_waiting();
        assert!(rr.room() > 0, "it may be awake by now");
    }

    #[test]
    fn who_was_looked_at_and_had_taken_all_is_left_alone() {
        let mut rr = idle(2);
        rr.push(5);
        assert_eq!(who(&mut rr), [(1, 5)]);
        assert_eq!(rr.reclaimed(id(1), Vec::new(), true), 1);
        assert_eq!(
            (rr.to_reclaim(LATER), rr.rebalance_deadline()),
            (None, None)
        );
        assert_eq!(rr.in_hand(), 0);
        assert_eq!(rr.idle(id(1), (1, 0), LATER), Ok(0), "no news");
    }

    #[test]
    fn what_comes_back_keeps_its_place() {
        let mut rr = idle(1);
        hurry(&mut rr, 1);
        (0..3).for_each(|c| rr.push(c));
        assert_eq!(who(&mut rr).len(), 3);
        rr.push(3);
        rr.revoke(id(1)).unwrap();
        let back = [(18, 2), (17, 1)];
        assert_eq!(rr.leave(id(1), back.into()), 1, "one was taken");
        let load = rr.forget(id(1)).unwrap();
        assert_eq!((load.given, load.taken, load.refused), (18, 16, 2));
        rr.join(id(2));
        rr.idle(id(2), (0, 0), LATER).unwrap();
        assert_eq!(who(&mut rr), [(2, 1), (2, 2), (2, 3)]);
        assert_eq!(rr.in_hand(), 3);
    }

    #[test]
    fn a_queue_that_is_full_gets_no_more_before_it_is_empty() {
        let mut rr = idle(2);
        rr.push(5);
        let Dispatched { worker, placed, .. } = rr.distribute(NOW).unwrap();
        rr.not_dispatched(worker, placed, false);
        assert_eq!(who(&mut rr), [(2, 5)]);
        assert_eq!(rr.room(), 0);
        rr.idle(id(1), (0, 0), NOW).unwrap();
        assert_eq!(rr.room(), 1);
    }

    #[test]
    fn lies_are_errors() {
        let mut rr = idle(1);
        assert!(rr.idle(id(1), (1, 0), NOW).is_err());
        assert!(rr.idle(id(2), (0, 0), NOW).is_err());
        assert!(rr.revoke(id(2)).is_err());
    }

    #[test]
    fn an_ended_worker_gets_nothing_more() {
        let mut rr = idle(1);
        rr.end(id(1));
        assert_eq!(rr.room(), 0);
        rr.push(1);
        assert!(rr.distribute(NOW).is_none());
        assert_eq!(
            rr.idle(id(1), (0, 0), NOW),
            Ok(0),
            "a late word is no crime"
        );
        assert!(rr.distribute(NOW).is_none());
    }

    proptest! {
        /// Workers that take what they are given, whatever the order of things: the sums stay right,
        /// and nothing waits in a queue behind another while somebody is idle.
        #[test]
        fn sums_are_right(steps in proptest::collection::vec((0..6u8, 1..4u32, 0..30u64), 0..200)) {
            let mut rr = idle(3);
            let mut queues = [const { VecDeque::new() }; 4];
            let mut taken = [0; 4];
            let (mut accepted, mut now) = (0, NOW);
            for (what, worker, n) in steps {
                let (own, at) = (id(worker), worker as usize);
                match what {
                    0 | 1 => {
                        rr.push(0);
                        accepted += 1;
                    }
                    2 | 3 if !queues[at].is_empty() => {
                        queues[at].pop_front();
                        taken[at] += 1;
                    }
                    2..=4 if queues[at].is_empty() => {
                        rr.idle(own, (taken[at], 0), now).unwrap();
                    }
                    5 => now += Time::from_millis(n),
                    _ => {
                        rr.counted(own, queues[at].len() as u64);
                    }
                }
                while let Some(given) = rr.distribute(now) {
                    queues[given.worker.get() as usize].push_back(given.placed);
                }
                while let Some((victim, count)) = rr.to_reclaim(now) {
                    let queue = &mut queues[victim.get() as usize];
                    let back: Vec<_> = queue.drain(..count.min(queue.len())).collect();
                    let is_empty = back.len() < count;
                    rr.reclaimed(victim, back, is_empty);
                    while let Some(given) = rr.distribute(now) {
                        queues[given.worker.get() as usize].push_back(given.placed);
                    }
                }
                prop_assert!(queues.iter().all(|queue| queue.len() <= MAX_WINDOW as usize));
                for n in 1..4 {
                    rr.counted(id(n), queues[n as usize].len() as u64);
                }
                let queued: usize = queues.iter().map(VecDeque::len).sum();
                prop_assert_eq!(rr.in_hand(), (rr.held.len() + queued) as u64);
                prop_assert_eq!(accepted, rr.in_hand() + taken.iter().sum::<u64>());
            }
        }
    }
}
