//! Which worker gets the next connection of one listener. Pure: a connection is any `C`.
//!
//! A worker grants *credits*: so many connections it can take now. Nothing is given without a
//! credit. Among workers with credit, one that holds nothing untaken comes before one that does,
//! and among equals the one served longest ago comes first.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::frame::FrameError;
use crate::worker_id::WorkerId;

/// The most credits one worker has, or grants at a time; one of ours believes to have half of it. And the
/// most connections that one may have been given and not taken: who takes nothing holds up no more.
pub(crate) const MAX_CREDITS: u32 = 16;

/// A connection on its way to a worker.
#[derive(Debug)]
pub(crate) struct Given<C> {
    pub(crate) worker: WorkerId,
    pub(crate) number: u64,
    pub(crate) connection: C,
}

/// A connection with its place among all that were accepted.
pub(crate) type Placed<C> = (u64, C);

#[derive(Debug)]
struct Member<C> {
    credits: u32,
    /// Number of the last connection given; they count from 1.
    last: u64,
    /// Given and not yet known to be taken, in order.
    given: VecDeque<(u64, Placed<C>)>,
    /// When this worker was last served; the smallest is served next.
    turn: u64,
    /// Told that nothing more comes.
    ended: bool,
}

impl<C> Member<C> {
    /// How many connections it can be given now.
    fn room(&self) -> u32 {
        if self.ended {
            return 0;
        }
        let held = u32::try_from(self.given.len()).unwrap_or(u32::MAX);
        self.credits.min(MAX_CREDITS.saturating_sub(held))
    }

    /// The place among those who can take a connection.
    fn rank(&self, worker: WorkerId) -> Option<(bool, u64, WorkerId)> {
        (self.room() > 0).then_some((!self.given.is_empty(), self.turn, worker))
    }
}

#[derive(Debug)]
pub(crate) struct RoundRobin<C> {
    members: BTreeMap<WorkerId, Member<C>>,
    ready: BTreeSet<(bool, u64, WorkerId)>,
    /// How many connections all of them can be given.
    room: u64,
    /// Accepted and given to nobody, by place: only what a dead or refusing worker gave back.
    waiting: BTreeMap<u64, C>,
    accepted: u64,
    turns: u64,
}

impl<C: Clone> RoundRobin<C> {
    pub(crate) fn new() -> Self {
        Self {
            members: BTreeMap::new(),
            ready: BTreeSet::new(),
            room: 0,
            waiting: BTreeMap::new(),
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
            credits: 0,
            last: 0,
            given: VecDeque::new(),
            turn: self.turns,
            ended: false,
        };
        self.members.insert(worker, member);
    }

    /// Changes a member and keeps its place in `ready` and the sum of room right.
    fn change<T>(
        &mut self,
        worker: WorkerId,
        change: impl FnOnce(&mut Member<C>) -> T,
    ) -> Option<T> {
        let member = self.members.get_mut(&worker)?;
        let (rank, room) = (member.rank(worker), member.room());
        let result = change(member);
        let (new_rank, new_room) = (member.rank(worker), member.room());
        if rank != new_rank {
            if let Some(rank) = rank {
                self.ready.remove(&rank);
            }
            self.ready.extend(new_rank);
        }
        self.room = self.room - u64::from(room) + u64::from(new_room);
        Some(result)
    }

    /// Takes note that `worker` has taken everything up to number `taken` and can take `credits`
    /// more. Returns how many connections this confirms.
    pub(crate) fn grant(
        &mut self,
        worker: WorkerId,
        credits: u32,
        taken: u64,
    ) -> Result<u64, FrameError> {
        let outcome = self.change(worker, |member| {
            if taken > member.last {
                return Err(FrameError::State("took a connection it was never given"));
            }
            let confirmed = member.given.partition_point(|(number, _)| *number <= taken);
            if credits > MAX_CREDITS {
                return Err(FrameError::State("granted more credits than allowed"));
            }
            if !member.ended {
                // What it granted, revoked and granted again may add up to more than it believes to
                // have granted: connections that were under way have used up the new credits.
                member.credits = member.credits.saturating_add(credits).min(MAX_CREDITS);
            }
            member.given.drain(..confirmed);
            Ok(confirmed as u64)
        });
        outcome.unwrap_or(Err(FrameError::State("ready for a listener it has not")))
    }

    /// Takes back the credits that `worker` has left.
    pub(crate) fn revoke(&mut self, worker: WorkerId) -> Result<(), FrameError> {
        let revoked = self.change(worker, |member| member.credits = 0);
        revoked.ok_or(FrameError::State("revoked what it never granted"))
    }

    /// Takes back the connection that `worker` refused.
    pub(crate) fn refuse(
        &mut self,
        worker: WorkerId,
        number: u64,
    ) -> Result<Placed<C>, FrameError> {
        let refused = self.change(worker, |member| {
            let at = member.given.iter().position(|(n, _)| *n == number)?;
            member.given.remove(at)
        });
        match refused.flatten() {
            Some((_, connection)) => Ok(connection),
            None => Err(FrameError::State("refused a connection it does not hold")),
        }
    }

    /// Gives `worker` nothing more; what it holds it may still take or refuse.
    pub(crate) fn end(&mut self, worker: WorkerId) {
        self.change(worker, |member| {
            member.credits = 0;
            member.ended = true;
        });
    }

    /// Forgets `worker`. Returns what it was given and never took.
    pub(crate) fn leave(&mut self, worker: WorkerId) -> Vec<Placed<C>> {
        self.end(worker);
        let member = self.members.remove(&worker);
        let given = member.map(|member| member.given).unwrap_or_default();
        given.into_iter().map(|(_, placed)| placed).collect()
    }

    pub(crate) fn push(&mut self, connection: C) {
        self.accepted += 1;
        self.waiting.insert(self.accepted, connection);
    }

    /// Puts back what somebody did not take, before everything that came later.
    pub(crate) fn put_back(&mut self, connections: Vec<Placed<C>>) {
        self.waiting.extend(connections);
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
    pub(crate) fn distribute(&mut self) -> Option<Given<C>> {
        let &(_, _, worker) = self.ready.first()?;
        let (place, connection) = self.waiting.pop_first()?;
        self.turns += 1;
        let turn = self.turns;
        let copy = connection.clone();
        let number = self.change(worker, |member| {
            member.credits -= 1;
            member.last += 1;
            member.turn = turn;
            member.given.push_back((member.last, (place, copy)));
            member.last
        })?;
        Some(Given {
            worker,
            number,
            connection,
        })
    }

    /// Accepted and not yet taken, wherever they are.
    pub(crate) fn in_hand(&self) -> u64 {
        let given: usize = self.members.values().map(|m| m.given.len()).sum();
        (self.waiting.len() + given) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u32) -> WorkerId {
        WorkerId::new(n)
    }

    fn with_members(n: u32) -> RoundRobin<u32> {
        let mut rr = RoundRobin::new();
        for n in 1..=n {
            rr.join(id(n));
        }
        rr
    }

    fn who(rr: &mut RoundRobin<u32>) -> Vec<(u32, u32)> {
        let given = std::iter::from_fn(|| rr.distribute());
        given.map(|g| (g.worker.get(), g.connection)).collect()
    }

    #[test]
    fn nothing_is_given_without_credit() {
        let mut rr = with_members(2);
        rr.push(7);
        assert!(rr.distribute().is_none());
        rr.grant(id(2), 1, 0).unwrap();
        assert_eq!(rr.room(), 0, "the credit is spoken for");
        assert_eq!(who(&mut rr), [(2, 7)]);
    }

    #[test]
    fn workers_take_turns() {
        let mut rr = with_members(3);
        for n in 1..=3 {
            rr.grant(id(n), 2, 0).unwrap();
        }
        (0..6).for_each(|c| rr.push(c));
        assert_eq!(
            who(&mut rr),
            [(1, 0), (2, 1), (3, 2), (1, 3), (2, 4), (3, 5)]
        );
    }

    #[test]
    fn an_idle_worker_comes_before_a_busy_one() {
        let mut rr = with_members(2);
        rr.grant(id(1), 5, 0).unwrap();
        (0..2).for_each(|c| rr.push(c));
        assert_eq!(who(&mut rr), [(1, 0), (1, 1)]);
        rr.grant(id(2), 5, 0).unwrap();
        rr.grant(id(1), 0, 1).unwrap();
        rr.push(2);
        assert_eq!(who(&mut rr), [(2, 2)], "worker 1 still holds one");
        rr.grant(id(2), 0, 1).unwrap();
        rr.grant(id(1), 0, 2).unwrap();
        rr.push(3);
        assert_eq!(who(&mut rr), [(1, 3)], "both idle, and 1 was served before");
    }

    #[test]
    fn a_late_worker_gets_its_turn_back() {
        let mut rr = with_members(3);
        for n in [2, 3] {
            rr.grant(id(n), 1, 0).unwrap();
        }
        rr.push(0);
        assert_eq!(who(&mut rr), [(2, 0)]);
        rr.grant(id(1), 1, 0).unwrap();
        rr.push(1);
        assert_eq!(who(&mut rr), [(1, 1)]);
    }

    #[test]
    fn a_leaving_worker_gives_back_what_it_did_not_take() {
        let mut rr = with_members(2);
        rr.grant(id(1), 3, 0).unwrap();
        (0..3).for_each(|c| rr.push(c));
        assert_eq!(who(&mut rr).len(), 3);
        assert_eq!(rr.grant(id(1), 0, 1), Ok(1));
        let untaken = rr.leave(id(1));
        assert_eq!(untaken, [(2, 1), (3, 2)]);
        rr.push(3);
        rr.put_back(untaken);
        rr.grant(id(2), 9, 0).unwrap();
        assert_eq!(who(&mut rr), [(2, 1), (2, 2), (2, 3)]);
    }

    #[test]
    fn what_comes_back_in_pieces_keeps_its_order() {
        let mut rr = with_members(2);
        rr.grant(id(1), 3, 0).unwrap();
        (0..3).for_each(|c| rr.push(c));
        assert_eq!(who(&mut rr).len(), 3);
        for number in [1, 2, 3] {
            let refused = rr.refuse(id(1), number).unwrap();
            rr.put_back(vec![refused]);
        }
        rr.push(3);
        rr.grant(id(2), 9, 0).unwrap();
        assert_eq!(who(&mut rr), [(2, 0), (2, 1), (2, 2), (2, 3)]);
    }

    #[test]
    fn revoked_credits_are_gone() {
        let mut rr = with_members(1);
        rr.grant(id(1), 3, 0).unwrap();
        rr.revoke(id(1)).unwrap();
        assert_eq!(rr.room(), 0);
        rr.push(1);
        assert!(rr.distribute().is_none());
        assert!(rr.revoke(id(2)).is_err());
    }

    #[test]
    fn lies_are_errors() {
        let mut rr = with_members(1);
        assert!(rr.grant(id(1), 0, 1).is_err());
        assert!(rr.grant(id(2), 1, 0).is_err());
        assert!(rr.grant(id(1), MAX_CREDITS + 1, 0).is_err());
        assert!(rr.refuse(id(1), 1).is_err());
        rr.grant(id(1), 1, 0).unwrap();
        rr.push(5);
        assert_eq!(who(&mut rr), [(1, 5)]);
        assert_eq!(rr.refuse(id(1), 1), Ok((1, 5)));
        assert!(rr.refuse(id(1), 1).is_err(), "only once");
    }

    #[test]
    fn who_takes_nothing_gets_no_more() {
        let mut rr = with_members(1);
        for connection in 0..MAX_CREDITS {
            rr.grant(id(1), 1, 0).unwrap();
            rr.push(connection);
            assert!(rr.distribute().is_some());
        }
        rr.grant(id(1), 1, 0).unwrap();
        assert_eq!(rr.room(), 0);
        rr.grant(id(1), 0, 1).unwrap();
        assert_eq!(rr.room(), 1);
    }

    #[test]
    fn an_ended_worker_gets_nothing_more() {
        let mut rr = with_members(1);
        rr.grant(id(1), 4, 0).unwrap();
        rr.end(id(1));
        assert_eq!(rr.room(), 0);
        rr.push(1);
        assert!(rr.distribute().is_none());
        assert_eq!(rr.grant(id(1), 1, 0), Ok(0), "a late credit is no crime");
        assert!(rr.distribute().is_none());
    }
}
