//! The dispatcher's record of one worker.

use super::{MAX_WINDOW, PENALTY_MAX, PENALTY_MIN, QUICK};
use crate::types::loads::WorkerLoad;
use crate::types::ordered_set::{Key, OrderedSet};
use crate::types::time::Time;
use crate::types::user::User;
use crate::types::worker_id::WorkerId;

/// The readiness of a worker for connections.
///
/// ```text
/// from         event                                                          to
/// ----------   ------------------------------------------------------------   ------
/// Paused       the worker reports that it is idle                             Ready
/// Ready        connections queued behind its current request are reclaimed    Slow
/// Slow         the worker reports that it is idle                             Ready
/// Ready, Slow  the worker pauses, or its queue is full                        Paused
/// any          the listener ends for the worker                               Ended
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The initial state, in which nothing is dispatched to the worker.
    Paused,
    /// Connections may be dispatched to the worker, whether it is idle or busy.
    Ready,
    /// Connections in the worker's queue were reclaimed, because the worker had been busy for `QUICK`
    /// or received nothing. Until it reports that it is idle, it receives only connections that the
    /// scheduler has assigned to it. If all its connections were reclaimed, it is idle and stalled.
    Slow,
    /// Nothing more is dispatched to the worker. The worker may still receive the connections in
    /// its queue.
    Ended,
}

/// The responsiveness of an idle worker to new connections.
///
/// ```text
/// from       event                                                 to
/// ---------  ----------------------------------------------------  ----------------------------
/// Prompt     all connections dispatched since the worker's last    Stalled, for `PENALTY_MIN`
///            idle report were reclaimed
/// Stalled    the penalty ends                                      Retried, with that penalty
/// Retried    all connections dispatched since the worker's last    Stalled, for twice as long
///            idle report were reclaimed
/// any        the worker reports that it received a connection      Prompt
/// ```
///
/// Connections that are reclaimed because the worker pauses, or because the listener ends for the
/// worker, do not make the worker stalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Response {
    Prompt,
    /// The worker is chosen only if no prompt worker is idle. The penalty began when the first of
    /// the reclaimed connections was dispatched.
    Stalled {
        penalty: Time,
        until: Time,
    },
    /// The worker takes turns like a prompt worker again, but has not reported any received
    /// connection since its last penalty. The value is the length of that penalty.
    Retried(Time),
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) user: User,
    state: State,
    response: Response,
    /// The number of connections that were dispatched to the worker and not reclaimed. A connection
    /// counts from the dispatcher's choice, before the shell puts it into the queue.
    pub(super) dispatched: u64,
    /// The number of `dispatched` connections that the worker is known to have received.
    received: u64,
    /// The value of `received` at the worker's last idle report.
    received_at_idle: u64,
    /// The number of connections that the worker's application still had at the last idle report.
    open_at_idle: u64,
    /// The number of connections that were reclaimed.
    returned: u64,
    /// The maximum number of unrestricted connections that the worker's queue may contain.
    unrestricted: u64,
    /// The time at which the worker was last known to be idle: its last idle report, or the first
    /// dispatch after that report.
    busy_since: Time,
    /// The turn of the last dispatch to the worker. The idle worker with the lowest turn is next.
    last_turn: u64,
    /// The number of dispatched connections that count for fairness. Among busy workers, the one
    /// with the lowest number is next.
    pub(super) recent_load: u64,
    /// The sequence numbers of the waiting connections that the scheduler has assigned to this
    /// worker.
    pub(super) assigned: OrderedSet<u64>,
}

impl Member {
    pub(super) fn new(user: User, last_turn: u64, recent_load: u64) -> Self {
        Self {
            user,
            state: State::Paused,
            response: Response::Prompt,
            dispatched: 0,
            received: 0,
            received_at_idle: 0,
            open_at_idle: 0,
            returned: 0,
            unrestricted: 0,
            busy_since: Time::ZERO,
            last_turn,
            recent_load,
            assigned: OrderedSet::new(),
        }
    }

    /// Returns how many connections the worker may have in its queue or still be serving, namely
    /// those that it had not received by its last idle report.
    pub(super) fn load(&self) -> u32 {
        u32::try_from(self.dispatched - self.received_at_idle).unwrap_or(u32::MAX)
    }

    /// Returns how many connections may still be in the worker's queue.
    pub(super) fn queued(&self) -> u32 {
        u32::try_from(self.in_flight()).unwrap_or(u32::MAX)
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.dispatched - self.received
    }

    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// Returns whether the dispatcher's rules may choose the worker, provided that the worker is
    /// idle or its window has space.
    fn is_available(&self) -> bool {
        match self.state {
            State::Ready => true,
            State::Slow => self.load() == 0,
            State::Paused | State::Ended => false,
        }
    }

    fn is_idle(&self) -> bool {
        self.is_available() && self.load() == 0
    }

    fn is_stalled(&self) -> bool {
        matches!(self.response, Response::Stalled { .. })
    }

    /// Returns whether the scheduler may choose the worker.
    pub(super) fn is_candidate(&self) -> bool {
        self.state != State::Ended
    }

    /// Returns whether the worker has reported that it is idle and has not paused or ended since.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready | State::Slow)
    }

    /// Returns how many connections may be queued behind the worker's current request.
    pub(super) fn queued_behind(&self) -> u32 {
        self.queued().min(self.load().saturating_sub(1))
    }

    /// Returns whether a connection that is not restricted may be in the worker's queue, and may be
    /// reclaimed for a worker of another user.
    pub(super) fn may_have_unrestricted(&self) -> bool {
        self.unrestricted > 0
    }

    /// Returns whether the worker became busy less than `span` ago.
    pub(super) fn became_busy_within(&self, span: Time, now: Time) -> bool {
        now.saturating_sub(self.busy_since) < span
    }

    pub(super) fn figures(&self, worker: WorkerId) -> WorkerLoad {
        WorkerLoad {
            dispatched: self.dispatched + self.returned,
            received: self.received,
            open: self.open_at_idle + self.received - self.received_at_idle,
            returned: self.returned,
            ..WorkerLoad::new(worker)
        }
    }

    /// Records that the worker found its queue empty after receiving `received` connections in
    /// total. Returns the next window.
    pub(super) fn idle_reported(
        &mut self,
        received: u64,
        open: u32,
        window: u32,
        now: Time,
    ) -> u32 {
        let served = received.saturating_sub(self.received_at_idle);
        let served = u32::try_from(served).unwrap_or(u32::MAX);
        let is_quick = now.saturating_sub(self.busy_since) <= QUICK.saturating_mul(served);
        if self.state != State::Ended {
            self.state = State::Ready;
        }
        if served > 0 {
            self.response = Response::Prompt;
        }
        // Keep the higher count, because counting the queue may already have shown that the worker
        // has received more connections than this older report says.
        self.received = self.received.max(received);
        self.received_at_idle = self.received_at_idle.max(received);
        self.open_at_idle = open.into();
        self.busy_since = now;
        // Connections that were dispatched after the worker sent this report may still be queued.
        self.unrestricted = self.unrestricted.min(self.load().into());
        match (served, is_quick) {
            (0, _) => window,
            (served, true) if served >= window => window.saturating_mul(2).min(MAX_WINDOW),
            // The worker had fewer connections than the window allows, so a smaller window is
            // enough.
            (served, true) => served.max(window / 2).max(1),
            (_, false) => (window / 2).max(1),
        }
    }

    pub(super) fn pause(&mut self) {
        if self.is_ready() {
            self.state = State::Paused;
        }
    }

    /// Ends the listener for the worker. Returns the sequence numbers of the connections that were
    /// assigned to the worker.
    pub(super) fn end(&mut self) -> OrderedSet<u64> {
        self.state = State::Ended;
        std::mem::take(&mut self.assigned)
    }

    /// Records that a connection is put into the worker's queue. If the connection is restricted,
    /// `user` is the user to whose workers it may go. The worker's recent load is first raised to at
    /// least `load_min`.
    pub(super) fn dispatch(&mut self, user: Option<User>, turn: u64, load_min: u64, now: Time) {
        if self.load() == 0 {
            self.busy_since = now;
        }
        self.dispatched += 1;
        self.unrestricted += u64::from(user.is_none());
        self.last_turn = turn;
        self.recent_load = self.recent_load.max(load_min) + 1;
    }

    /// Reverts the record of a dispatch whose connection did not reach the worker's queue.
    pub(super) fn undo_dispatch(&mut self) {
        self.dispatched -= 1;
        self.recent_load = self.recent_load.saturating_sub(1);
    }

    /// Records that `queued` connections are in the worker's queue or on their way to it.
    pub(super) fn counted(&mut self, queued: u64) {
        self.received = self.dispatched.saturating_sub(queued);
        self.received_at_idle = self.received_at_idle.min(self.received);
    }

    /// Records that `count` connections were reclaimed. If the queue is now empty, `undelivered` is
    /// the number of connections that are still on their way to the queue. Otherwise, `undelivered`
    /// is `None`.
    pub(super) fn reclaimed(&mut self, count: u64, undelivered: Option<u64>) {
        self.dispatched = self.dispatched.saturating_sub(count);
        self.returned += count;
        if undelivered == Some(0) {
            self.unrestricted = 0;
        }
        self.recent_load = self.recent_load.saturating_sub(count);
        self.received = match undelivered {
            Some(undelivered) => self.dispatched.saturating_sub(undelivered),
            None => self.received.min(self.dispatched),
        };
        self.received_at_idle = self.received_at_idle.min(self.received);
        if count == 0 || !self.is_ready() {
            return;
        }
        if self.load() > 0 {
            self.state = State::Slow;
        } else {
            self.stall();
        }
    }

    /// Records that all connections dispatched since the worker's last idle report were reclaimed.
    fn stall(&mut self) {
        let penalty = match self.response {
            Response::Prompt => PENALTY_MIN,
            Response::Retried(previous) => (previous * 2).clamp(PENALTY_MIN, PENALTY_MAX),
            Response::Stalled { .. } => return,
        };
        let until = self.busy_since.saturating_add(penalty);
        self.response = Response::Stalled { penalty, until };
    }

    pub(super) fn end_penalty(&mut self) {
        if let Response::Stalled { penalty, .. } = self.response {
            self.response = Response::Retried(penalty);
        }
    }

    /// Returns the values that the dispatcher's ordered sets and sums contain of the worker.
    pub(super) fn snapshot(&self, worker: WorkerId) -> Snapshot {
        Snapshot {
            ranks: self.ranks(worker),
            is_ready: self.is_ready(),
            is_candidate: self.is_candidate(),
            in_flight: self.in_flight(),
            received: self.received(),
        }
    }

    /// Returns the worker's keys in the dispatcher's ordered sets.
    pub(super) fn ranks(&self, worker: WorkerId) -> Ranks {
        let is_busy = self.is_available() && self.load() > 0 && !self.is_stalled();
        let is_unresponsive = self.load() > 0 && self.received == self.received_at_idle;
        let is_assignable = self.is_ready() && self.queued() < MAX_WINDOW;
        let penalty_end = match self.response {
            Response::Stalled { until, .. } if self.is_candidate() => Some(until),
            Response::Stalled { .. } | Response::Prompt | Response::Retried(_) => None,
        };
        Ranks {
            idle: self.is_idle().then_some(IdleRank {
                is_stalled: self.is_stalled(),
                last_turn: self.last_turn,
                worker,
            }),
            busy: is_busy.then_some(BusyRank {
                recent_load: self.recent_load,
                worker,
            }),
            queued_behind: (self.queued_behind() > 0).then_some((self.busy_since, worker)),
            unresponsive: is_unresponsive.then_some((self.busy_since, worker)),
            penalized: penalty_end.map(|until| (until, worker)),
            assigned: (is_assignable && !self.assigned.is_empty()).then_some(worker),
        }
    }
}

/// The sort key of an idle worker. Stalled workers come last. Otherwise, the worker whose last
/// dispatch is the oldest comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct IdleRank {
    pub(super) is_stalled: bool,
    last_turn: u64,
    pub(super) worker: WorkerId,
}

impl Key for IdleRank {
    fn pack(self) -> u128 {
        let turn = u128::from(self.is_stalled) << 64 | u128::from(self.last_turn);
        turn << 32 | self.worker.pack()
    }

    fn unpack(packed: u128) -> Self {
        Self {
            is_stalled: packed >> 96 != 0,
            last_turn: u64::unpack(packed >> 32),
            worker: WorkerId::unpack(packed),
        }
    }
}

/// The sort key of a busy worker. The worker with the lowest recent load comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct BusyRank {
    pub(super) recent_load: u64,
    pub(super) worker: WorkerId,
}

impl Key for BusyRank {
    fn pack(self) -> u128 {
        u128::from(self.recent_load) << 32 | self.worker.pack()
    }

    fn unpack(packed: u128) -> Self {
        Self {
            recent_load: u64::unpack(packed >> 32),
            worker: WorkerId::unpack(packed),
        }
    }
}

/// The sort keys of one worker in the dispatcher's ordered sets. A key is `None` if its set does
/// not contain the worker.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Ranks {
    pub(super) idle: Option<IdleRank>,
    pub(super) busy: Option<BusyRank>,
    pub(super) queued_behind: Option<(Time, WorkerId)>,
    pub(super) unresponsive: Option<(Time, WorkerId)>,
    pub(super) penalized: Option<(Time, WorkerId)>,
    pub(super) assigned: Option<WorkerId>,
}

/// The values that the dispatcher's ordered sets and sums contain of one worker.
pub(super) struct Snapshot {
    pub(super) ranks: Ranks,
    pub(super) is_ready: bool,
    pub(super) is_candidate: bool,
    pub(super) in_flight: u64,
    pub(super) received: u64,
}
