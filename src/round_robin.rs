//! Which worker gets the next connection of one listener. Pure: a connection is any `C`.
//!
//! What a worker is given lies in its *queue* until it takes it out; until then the master can take
//! it back. A worker that has found its queue empty says so: it is *idle* then. An idle worker comes
//! before a busy one, and among idle ones the one served longest ago comes first. A busy worker is
//! given something ahead of its turn only if it has been quick before; what lies behind a request
//! that turns out slow is taken back as soon as another worker is idle.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::frame::FrameError;
use crate::timers::Time;
use crate::worker_id::WorkerId;

/// The most connections one worker is given before it says that it is idle again. Each time costs a
/// frame and two changes of process; but what is given ahead may have to be taken back.
pub(crate) const MAX_WINDOW: u32 = 16;
/// A worker is quick if it needs no longer than this for a connection.
const QUICK: Time = Duration::from_millis(1);
/// An idle worker that has not taken what it was given for so long has been stopped, most likely.
pub(crate) const STALE: Time = Duration::from_millis(20);

/// A connection on its way to a worker.
#[derive(Debug)]
pub(crate) struct Given<C> {
    pub(crate) worker: WorkerId,
    pub(crate) placed: Placed<C>,
}

/// A connection with its place among all that were accepted.
pub(crate) type Placed<C> = (u64, C);

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
    /// How many it may have been sent since then.
    window: u32,
    /// When it was sent the first of them.
    busy_since: Time,
    /// It was idle, and did not take what it was sent.
    sleeps: bool,
    /// When it was last sent something; the smallest is next.
    turn: u64,
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

    fn room(&self) -> u32 {
        if self.ready && !self.ended {
            self.window.saturating_sub(self.load())
        } else {
            0
        }
    }

    /// What may lie behind another connection.
    fn behind(&self) -> u32 {
        self.queued().min(self.load().saturating_sub(1))
    }

    /// Its places in the orders below.
    fn ranks(&self, worker: WorkerId) -> Ranks {
        let (load, behind) = (self.load(), self.behind());
        let unmoved = load > 0 && self.taken == self.done;
        Ranks {
            next: (self.room() > 0).then_some((self.sleeps, load, self.turn, worker)),
            behind: (behind > 0).then_some((behind, worker)),
            unmoved: unmoved.then_some((self.busy_since, worker)),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Ranks {
    next: Option<(bool, u32, u64, WorkerId)>,
    behind: Option<(u32, WorkerId)>,
    unmoved: Option<(Time, WorkerId)>,
}

#[derive(Debug)]
pub(crate) struct RoundRobin<C> {
    members: BTreeMap<WorkerId, Member>,
    /// Who can be given something; the first is next.
    next: BTreeSet<(bool, u32, u64, WorkerId)>,
    /// From whom something can be taken that lies behind another; the last has most.
    behind: BTreeSet<(u32, WorkerId)>,
    /// Who was idle and is not known to have taken anything since.
    unmoved: BTreeSet<(Time, WorkerId)>,
    /// How many connections all of them can be given.
    room: u64,
    /// Accepted and given to nobody, by place.
    waiting: BTreeMap<u64, C>,
    /// Sent and not known to be taken.
    under_way: u64,
    accepted: u64,
    turns: u64,
}

impl<C> RoundRobin<C> {
    pub(crate) fn new() -> Self {
        Self {
            members: BTreeMap::new(),
            next: BTreeSet::new(),
            behind: BTreeSet::new(),
            unmoved: BTreeSet::new(),
            room: 0,
            waiting: BTreeMap::new(),
            under_way: 0,
            accepted: 0,
            turns: 0,
        }
    }

    /// How many more connections may be accepted now: the room not spoken for.
    pub(crate) fn room(&self) -> u64 {
        self.room.saturating_sub(self.waiting.len() as u64)
    }

    /// Whether any connection waits for a worker.
    pub(crate) fn anyone_waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(crate) fn join(&mut self, worker: WorkerId) {
        self.turns += 1;
        let member = Member {
            ready: false,
            ended: false,
            sent: 0,
            taken: 0,
            done: 0,
            window: 1,
            busy_since: Time::ZERO,
            sleeps: false,
            turn: self.turns,
        };
        self.members.insert(worker, member);
    }

    /// Changes a member and keeps the orders and sums right. Returns what `change` does, and how
    /// many connections are known now to have been taken.
    fn change<T>(
        &mut self,
        worker: WorkerId,
        change: impl FnOnce(&mut Member) -> T,
    ) -> Option<(T, u64)> {
        let member = self.members.get_mut(&worker)?;
        let (ranks, room) = (member.ranks(worker), member.room());
        let (sent, taken) = (member.sent, member.taken);
        let result = change(member);
        let (new, new_room) = (member.ranks(worker), member.room());
        self.under_way = self.under_way + member.sent + taken - sent - member.taken;
        let taken = member.taken.saturating_sub(taken);
        exchange(&mut self.next, ranks.next, new.next);
        exchange(&mut self.behind, ranks.behind, new.behind);
        exchange(&mut self.unmoved, ranks.unmoved, new.unmoved);
        self.room = self.room - u64::from(room) + u64::from(new_room);
        Some((result, taken))
    }

    /// Takes note that `worker` found its queue empty when it had taken `taken` connections in all.
    /// Returns how many of them are news.
    pub(crate) fn idle(
        &mut self,
        worker: WorkerId,
        taken: u64,
        now: Time,
    ) -> Result<u64, FrameError> {
        let outcome = self.change(worker, |member| {
            if taken > member.sent {
                return Err(FrameError::State("took a connection it was never given"));
            }
            let served = taken.saturating_sub(member.done);
            let quick = u32::try_from(served).is_ok_and(|served| {
                now.saturating_sub(member.busy_since) <= QUICK.saturating_mul(served)
            });
            member.window = match u32::try_from(served) {
                Ok(served) if quick && served >= member.window => {
                    member.window.saturating_mul(2).min(MAX_WINDOW)
                }
                Ok(served) if quick => served.max(1),
                _ => 1,
            };
            member.ready = true;
            member.sleeps &= served == 0;
            // What it said may be older than what is known.
            member.taken = member.taken.max(taken);
            member.done = member.done.max(taken);
            member.busy_since = now;
            Ok(())
        });
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
        self.change(worker, |member| member.ended = true);
    }

    /// So many are left in the queue of `worker`. Returns how many are known now to be taken.
    pub(crate) fn counted(&mut self, worker: WorkerId, queued: u64) -> u64 {
        let counted = self.change(worker, |member| {
            let taken = member.sent.saturating_sub(queued);
            member.taken = member.taken.max(taken);
        });
        counted.map_or(0, |((), taken)| taken)
    }

    /// These have been taken back out of the queue of `worker`, which is empty then or not. Returns
    /// how many others are known now to be taken.
    pub(crate) fn came_back(
        &mut self,
        worker: WorkerId,
        connections: Vec<Placed<C>>,
        is_empty: bool,
    ) -> u64 {
        let count = connections.len() as u64;
        let changed = self.change(worker, |member| {
            member.sent -= count;
            if is_empty {
                member.taken = member.sent;
            }
            // It was idle, and still is; but somebody else would have taken them.
            member.sleeps |= count > 0 && member.load() == 0;
        });
        self.waiting.extend(connections);
        changed.map_or(0, |((), taken)| taken)
    }

    /// This could not be put into the queue of `worker`. If it `takes_more` all the same, it is
    /// offered more later, and otherwise when it is idle again.
    pub(crate) fn not_given(&mut self, worker: WorkerId, connection: Placed<C>, takes_more: bool) {
        self.change(worker, |member| {
            member.sent -= 1;
            member.ready &= takes_more;
        });
        self.waiting.extend([connection]);
    }

    /// Forgets `worker`, out of whose queue these were taken back. Returns how many others are known
    /// now to be taken.
    pub(crate) fn leave(&mut self, worker: WorkerId, connections: Vec<Placed<C>>) -> u64 {
        self.end(worker);
        let taken = self.came_back(worker, connections, true);
        // It is in none of the orders: it has no room, and nothing in its queue.
        self.members.remove(&worker);
        taken
    }

    pub(crate) fn push(&mut self, connection: C) {
        self.accepted += 1;
        self.waiting.insert(self.accepted, connection);
    }

    /// Removes those waiting connections that `gone` says are gone.
    pub(crate) fn sweep(&mut self, mut gone: impl FnMut(&C) -> bool) -> u64 {
        let before = self.waiting.len();
        self.waiting.retain(|_, connection| !gone(connection));
        (before - self.waiting.len()) as u64
    }

    pub(crate) fn drop_waiting(&mut self) -> u64 {
        let dropped = self.waiting.len() as u64;
        self.waiting.clear();
        dropped
    }

    /// Gives the first waiting connection to the worker whose turn it is.
    pub(crate) fn distribute(&mut self, now: Time) -> Option<Given<C>> {
        let &(_, _, _, worker) = self.next.first()?;
        let placed = self.waiting.pop_first()?;
        self.turns += 1;
        let turn = self.turns;
        self.change(worker, |member| {
            if member.load() == 0 {
                member.busy_since = now;
            }
            member.sent += 1;
            member.turn = turn;
        })?;
        Some(Given { worker, placed })
    }

    /// Out of whose queue a connection should be taken back, because another worker is idle.
    pub(crate) fn to_take_back(&self, now: Time) -> Option<WorkerId> {
        if !self.anyone_is_idle() || self.anyone_waits() {
            return None;
        }
        let stale = self
            .unmoved
            .first()
            .filter(|(since, _)| *since + STALE <= now);
        let behind = self.behind.last().map(|(_, worker)| *worker);
        behind.or(stale.map(|(_, worker)| *worker))
    }

    /// When `to_take_back` may have somebody to name although nothing has happened.
    pub(crate) fn look_at(&self) -> Option<Time> {
        let (since, _) = self.unmoved.first().filter(|_| self.anyone_is_idle())?;
        Some(*since + STALE)
    }

    fn anyone_is_idle(&self) -> bool {
        matches!(self.next.first(), Some((false, 0, _, _)))
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
        self.waiting.len() as u64 + self.under_way
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
