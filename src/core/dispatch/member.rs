//! The dispatcher's record of one worker.

use super::{MAX_WINDOW, PENALTY_MAX, PENALTY_MIN, QUICK};
use crate::types::loads::WorkerLoad;
use crate::types::sorted_map::SortedMap;
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;

/// Whether a worker gets connections.
///
/// ```text
/// from         event                                                          to
/// ----------   ------------------------------------------------------------   ------
/// Paused       it reports that it is idle                                     Ready
/// Ready        connections queued behind its current request are reclaimed    Slow
/// Slow         it reports that it is idle                                     Ready
/// Ready, Slow  it pauses, or its queue is full                                Paused
/// any          the listener ends for it                                       Ended
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Gets nothing. The first state.
    Paused,
    /// Gets connections: idle if it has received and served all of them, and busy otherwise.
    Ready,
    /// Gets nothing as long as it is busy with a request that turned out to be slow.
    Slow,
    /// Gets nothing more. It may still receive what is in its queue.
    Ended,
}

/// Whether an idle worker receives its connections in time.
///
/// ```text
/// from       event                                                 to
/// ---------  ----------------------------------------------------  ----------------------------
/// Prompt     all it got while idle was reclaimed: it received      Stalled, for `PENALTY_MIN`
///            nothing for `STALL_TIMEOUT`
/// Stalled    the penalty is over                                   Retried, with that penalty
/// Retried    all it got while idle was reclaimed                   Stalled, for twice as long
/// any        it reports that it has received a connection          Prompt
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Response {
    Prompt,
    /// Gets a connection only if no other worker is idle. The value is the whole penalty.
    Stalled(Time),
    /// Has its turn again, and has not received anything since its last penalty.
    Retried(Time),
}

#[derive(Debug)]
pub(super) struct Member {
    state: State,
    response: Response,
    /// Connections put into its queue and not reclaimed.
    pub(super) dispatched: u64,
    /// How many of `dispatched` it is known to have received.
    received: u64,
    /// The value of `received` at its last idle report.
    received_at_idle: u64,
    /// How many connections its application still had at its last idle report.
    open_at_idle: u64,
    /// Connections that were reclaimed.
    returned: u64,
    /// When it was last idle: the time of its last idle report, or of the first dispatch since.
    busy_since: Time,
    /// The turn in which it last got a connection. The idle worker with the lowest turn is next.
    last_turn: u64,
    /// Connections it has got, as far as they count for fairness. The busy worker with the lowest
    /// load is next.
    pub(super) recent_load: u64,
    /// The sequence numbers of waiting connections for which the scheduler has chosen this worker.
    pub(super) assigned: SortedMap<u64, ()>,
}

impl Member {
    pub(super) fn new(last_turn: u64, recent_load: u64) -> Self {
        Self {
            state: State::Paused,
            response: Response::Prompt,
            dispatched: 0,
            received: 0,
            received_at_idle: 0,
            open_at_idle: 0,
            returned: 0,
            busy_since: Time::ZERO,
            last_turn,
            recent_load,
            assigned: SortedMap::new(),
        }
    }

    /// Returns how many connections it may still be busy with: those dispatched since its last idle
    /// report.
    pub(super) fn load(&self) -> u32 {
        u32::try_from(self.dispatched - self.received_at_idle).unwrap_or(u32::MAX)
    }

    /// Returns how many connections may still be in its queue.
    pub(super) fn queued(&self) -> u32 {
        u32::try_from(self.in_flight()).unwrap_or(u32::MAX)
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.dispatched - self.received
    }

    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// Whether it can get a connection, if it is idle or its window has space.
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
        matches!(self.response, Response::Stalled(_))
    }

    /// Whether the scheduler may choose it.
    pub(super) fn is_candidate(&self) -> bool {
        self.state != State::Ended
    }

    /// Whether it has reported that it takes connections.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready | State::Slow)
    }

    /// Returns how many connections may be queued behind its current request.
    pub(super) fn queued_behind(&self) -> u32 {
        self.queued().min(self.load().saturating_sub(1))
    }

    /// Whether it became busy less than `span` ago.
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

    /// It found its queue empty when it had received `received` connections. Returns the next window.
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
        // The report may be older than what is known from the queue.
        self.received = self.received.max(received);
        self.received_at_idle = self.received_at_idle.max(received);
        self.open_at_idle = open.into();
        self.busy_since = now;
        match (served, is_quick) {
            (0, _) => window,
            (served, true) if served >= window => window.saturating_mul(2).min(MAX_WINDOW),
            // It had less to do than the window allows.
            (served, true) => served.max(window / 2).max(1),
            (_, false) => (window / 2).max(1),
        }
    }

    pub(super) fn pause(&mut self) {
        if self.is_ready() {
            self.state = State::Paused;
        }
    }

    /// Returns the connections that were assigned to it.
    pub(super) fn end(&mut self) -> SortedMap<u64, ()> {
        self.state = State::Ended;
        std::mem::take(&mut self.assigned)
    }

    /// A connection is put into its queue. `load_min` is the least recent load that counts.
    pub(super) fn dispatch(&mut self, turn: u64, load_min: u64, now: Time) {
        if self.load() == 0 {
            self.busy_since = now;
        }
        self.dispatched += 1;
        self.last_turn = turn;
        self.recent_load = self.recent_load.max(load_min) + 1;
    }

    /// A connection did not reach its queue.
    pub(super) fn undo_dispatch(&mut self) {
        self.dispatched -= 1;
        self.recent_load = self.recent_load.saturating_sub(1);
    }

    /// `queued` connections are in its queue, or on their way to it.
    pub(super) fn counted(&mut self, queued: u64) {
        self.received = self.dispatched.saturating_sub(queued);
        self.received_at_idle = self.received_at_idle.min(self.received);
    }

    /// `count` connections were reclaimed from its queue. If nothing is left there, `queued` has the
    /// number of connections that are still on their way to the queue. Returns the end of its penalty
    /// if it has stalled.
    pub(super) fn reclaimed(&mut self, count: u64, queued: Option<u64>) -> Option<Time> {
        self.dispatched = self.dispatched.saturating_sub(count);
        self.returned += count;
        self.recent_load = self.recent_load.saturating_sub(count);
        self.received = match queued {
            Some(queued) => self.dispatched.saturating_sub(queued),
            None => self.received.min(self.dispatched),
        };
        self.received_at_idle = self.received_at_idle.min(self.received);
        if count == 0 {
            return None;
        }
        if self.load() > 0 {
            if self.state == State::Ready {
                self.state = State::Slow;
            }
            return None;
        }
        // It has been idle all the time. Another worker would have received the connections.
        let penalty = match self.response {
            Response::Prompt => PENALTY_MIN,
            Response::Retried(previous) => (previous * 2).clamp(PENALTY_MIN, PENALTY_MAX),
            Response::Stalled(_) => return None,
        };
        self.response = Response::Stalled(penalty);
        Some(self.busy_since.saturating_add(penalty))
    }

    pub(super) fn penalty_over(&mut self) {
        if let Response::Stalled(penalty) = self.response {
            self.response = Response::Retried(penalty);
        }
    }

    /// Its positions in the orders of the dispatcher.
    pub(super) fn ranks(&self, worker: WorkerId) -> Ranks {
        let is_busy = self.is_available() && self.load() > 0 && !self.is_stalled();
        let is_unresponsive = self.load() > 0 && self.received == self.received_at_idle;
        let is_assignable = self.is_ready() && self.queued() < MAX_WINDOW;
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
            assigned: (is_assignable && !self.assigned.is_empty()).then_some(worker),
        }
    }
}

/// The order of idle workers: stalled workers are last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct IdleRank {
    pub(super) is_stalled: bool,
    last_turn: u64,
    pub(super) worker: WorkerId,
}

/// The order of busy workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct BusyRank {
    pub(super) recent_load: u64,
    pub(super) worker: WorkerId,
}

/// The positions of one worker in the orders of the dispatcher; `None` where it is not a part.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Ranks {
    pub(super) idle: Option<IdleRank>,
    pub(super) busy: Option<BusyRank>,
    pub(super) queued_behind: Option<(Time, WorkerId)>,
    pub(super) unresponsive: Option<(Time, WorkerId)>,
    pub(super) assigned: Option<WorkerId>,
}
