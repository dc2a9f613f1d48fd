//! The pool's slots, their workers and the replacement of failed workers.

use std::collections::VecDeque;
use std::process::ExitStatus;
use std::time::Duration;

use cluster::{Usage, WorkerId};

use super::super::event::{PoolEvent, ReloadFailure};
use super::super::failure::{FailureAction, FailureCause, WorkerFailure};
use super::super::options::PoolOptions;
use super::worker::{Worker, WorkerState};
use super::{Action, Core, MIN_PAUSE, Quorum, Time};

/// The maximum number of slots. A system has fewer processes by default (`kernel.pid_max` is 32,768 on
/// small machines). Without a maximum, a wrong number would use up the memory.
pub(super) const SLOTS_MAX: usize = 1 << 16;

/// A slot. The pool keeps one worker running for each slot.
#[derive(Debug)]
pub(in super::super) struct Slot {
    pub(super) occupancy: Occupancy,
    /// The worker that a rollout has forked to replace the slot's worker.
    pub(in super::super) successor: Option<WorkerId>,
    /// The generation of the slot's next worker, except that a reload forks a successor of the
    /// reload's generation.
    pub(super) generation: u64,
    /// The number of failures since the back-off was last reset. The back-off is reset in three
    /// cases:
    ///
    /// - A worker that was ready for `PoolOptions::back_off_reset` fails. Its own failure is
    ///   counted after the reset.
    /// - A rollout promotes a successor.
    /// - The slot reaches its failure limit.
    consecutive_failures: u32,
    /// The times of the failures within `PoolOptions::failure_window` that count towards the
    /// failure limit.
    recent_failures: VecDeque<Time>,
    pub(super) quorum_share: QuorumShare,
    /// The number of consecutive forks that have failed for lack of resources.
    shortages: u32,
    /// The earliest time for the slot's next recycling. After a failed recycling, the next one must
    /// wait.
    pub(super) recycle_from: Time,
    /// The minimum age at which the slot's worker is replaced for its memory. The age grows while
    /// workers reach the limit soon after their fork, because a new worker would soon reach it too.
    pub(super) memory_age: Duration,
    pub(in super::super) restarts: u64,
    pub(in super::super) last_failure: Option<WorkerFailure>,
}

/// The state of a slot.
///
/// | from | input | to |
/// |---|---|---|
/// | | the slot is added, and the fork of a worker begins | `Vacant` |
/// | `Vacant`, `Waiting`, `GivenUp` | a worker for the slot was forked | `Occupied` |
/// | `Vacant`, `Occupied` | the worker failed while a successor exists | `Occupied` by the successor |
/// | `Vacant`, `Occupied` | the worker failed | `Waiting`, or `GivenUp` at the failure limit |
/// | `Vacant` | the system lacked resources for the fork | `Waiting` |
/// | `Waiting` | the pause has ended, no rollout fills the slot, and a fork begins | `Vacant` |
/// | `GivenUp` | `retry`, or the application chooses `RetryAfter` | `Waiting` |
/// | any | the rollout promotes the successor | `Occupied` by the successor |
/// | any except `GivenUp` | the pool stops | `Vacant` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Occupancy {
    /// The driver is forking a worker for the slot, or the pool is stopping or has stopped.
    Vacant,
    /// The pool waits until this time before it forks a worker.
    Waiting {
        restart_at: Time,
    },
    /// The slot has reached its failure limit. It stays empty until a reload, `retry` or the
    /// application's decision fills it.
    GivenUp,
    Occupied {
        worker: WorkerId,
    },
}

/// Whether a slot counts towards the quorum.
///
/// | from | input | to |
/// |---|---|---|
/// | | the slot is added before the pool has become ready for the first time | `Counted` |
/// | | the slot is added later | `Pending` |
/// | `Pending` | a worker of the slot has become ready | `Counted` |
///
/// A pool that grows therefore stays ready. Its earlier workers still serve all clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QuorumShare {
    Pending,
    Counted,
}

impl Slot {
    fn new(generation: u64, quorum_share: QuorumShare) -> Self {
        Self {
            occupancy: Occupancy::Vacant,
            successor: None,
            generation,
            consecutive_failures: 0,
            recent_failures: VecDeque::new(),
            quorum_share,
            shortages: 0,
            recycle_from: Time::ZERO,
            memory_age: Duration::ZERO,
            restarts: 0,
            last_failure: None,
        }
    }

    pub(in super::super) fn worker(&self) -> Option<WorkerId> {
        match self.occupancy {
            Occupancy::Occupied { worker } => Some(worker),
            Occupancy::Vacant | Occupancy::Waiting { .. } | Occupancy::GivenUp => None,
        }
    }

    pub(in super::super) fn restart_at(&self) -> Option<Time> {
        match self.occupancy {
            Occupancy::Waiting { restart_at } => Some(restart_at),
            Occupancy::Vacant | Occupancy::GivenUp | Occupancy::Occupied { .. } => None,
        }
    }

    pub(in super::super) fn is_given_up(&self) -> bool {
        self.occupancy == Occupancy::GivenUp
    }

    /// Returns whether a newly forked worker of this generation should fill the slot. If a reload
    /// was cancelled during the fork, the new worker has the reload's generation, which the slot
    /// does not need.
    fn needs(&self, generation: u64) -> bool {
        self.worker().is_none() && self.generation == generation
    }

    /// Makes the successor the slot's worker. Returns the replaced worker.
    pub(super) fn promote(&mut self, successor: WorkerId) -> Option<WorkerId> {
        let replaced = self.worker().filter(|worker| *worker != successor);
        self.occupancy = Occupancy::Occupied { worker: successor };
        self.successor = None;
        self.consecutive_failures = 0;
        replaced
    }

    /// Counts a failure of the slot's worker. Returns whether the slot has reached its failure
    /// limit.
    fn count_failure(
        &mut self,
        ready_since: Option<Time>,
        options: &PoolOptions,
        now: Time,
    ) -> bool {
        let reset = options.back_off_reset;
        if ready_since.is_some_and(|since| now.saturating_sub(since) >= reset) {
            self.consecutive_failures = 0;
        }
        self.consecutive_failures += 1;
        self.recent_failures.push_back(now);
        let is_past = |at: &Time| now.saturating_sub(*at) > options.failure_window;
        while self.recent_failures.front().is_some_and(is_past) {
            self.recent_failures.pop_front();
        }
        let limit = usize::try_from(options.max_failures).unwrap_or(usize::MAX);
        let is_reached = self.recent_failures.len() > limit;
        if is_reached {
            self.recent_failures.clear();
            self.consecutive_failures = 0;
        }
        is_reached
    }

    /// Returns the pause after a failure of the slot's worker, without jitter. The first failure
    /// needs no pause.
    fn failure_pause(&self, options: &PoolOptions) -> Duration {
        match self.consecutive_failures.checked_sub(2) {
            Some(doublings) => pause(options, doublings),
            None => Duration::ZERO,
        }
    }

    /// Counts a fork that failed for lack of resources. Returns the pause before the next attempt,
    /// without jitter.
    fn count_shortage(&mut self, options: &PoolOptions) -> Duration {
        let pause = pause(options, self.shortages);
        self.shortages = self.shortages.saturating_add(1);
        pause
    }
}

/// Returns the back-off's first pause, doubled `doublings` times, up to the cap. The result is at
/// least `MIN_PAUSE`.
fn pause(options: &PoolOptions, doublings: u32) -> Duration {
    // Limit the shift, because `1 << 32` would overflow. A back-off of 2^31 times the first pause
    // is beyond any useful cap.
    let pause = options.back_off.saturating_mul(1 << doublings.min(31));
    pause.min(options.back_off_cap).max(MIN_PAUSE)
}

// Application calls.
impl Core {
    pub(in super::super) fn scale(&mut self, workers: usize, now: Time) {
        if !self.keeps_workers() {
            return;
        }
        let workers = workers.min(SLOTS_MAX);
        while self.slots.len() < workers {
            let (slot, generation) = (self.slots.len(), self.generation);
            let share = match self.quorum {
                Quorum::NotYetReached => QuorumShare::Counted,
                Quorum::Reached | Quorum::Lost => QuorumShare::Pending,
            };
            self.slots.push(Slot::new(generation, share));
            self.actions.push_back(Action::Fork { slot, generation });
        }
        while self.slots.len() > workers {
            let Some(slot) = self.slots.pop() else {
                break;
            };
            let number = self.slots.len();
            let is_fork =
                |action: &Action| matches!(action, Action::Fork { slot, .. } if *slot == number);
            self.actions.retain(|action| !is_fork(action));
            self.limits_reached.remove(&number);
            if let Some(rollout) = &mut self.rollout {
                rollout.batch.remove(&number);
            }
            for worker in slot.worker().into_iter().chain(slot.successor) {
                self.disconnect(worker, now);
            }
        }
        // Retry if all remaining slots were given up. Otherwise, the pool would serve no client and
        // would never report an error.
        if self.slots.iter().all(Slot::is_given_up) {
            return self.retry(now);
        }
        self.settle(now);
    }

    pub(in super::super) fn retry(&mut self, now: Time) {
        if !self.keeps_workers() {
            return;
        }
        for slot in self.slots.iter_mut().filter(|slot| slot.is_given_up()) {
            slot.occupancy = Occupancy::Waiting { restart_at: now };
        }
        self.tick(now);
    }

    pub(in super::super) fn failure_action_chosen(
        &mut self,
        failure: WorkerFailure,
        action: FailureAction,
        now: Time,
    ) {
        if !self.keeps_workers() {
            return;
        }
        // Ignore the decision if the slot has been removed or filled since the failure, for example
        // by a reload.
        let slot = self.slots.get_mut(failure.slot);
        let Some(slot) = slot.filter(|slot| slot.is_given_up()) else {
            return;
        };
        match action {
            FailureAction::StopPool => {
                self.actions.push_back(Action::GiveUp(failure));
                self.drain(now);
            }
            FailureAction::GiveUp => {}
            FailureAction::RetryAfter(pause) => {
                let restart_at = now.saturating_add(pause);
                slot.occupancy = Occupancy::Waiting { restart_at };
            }
        }
    }
}

// Process events.
impl Core {
    pub(in super::super) fn forked(
        &mut self,
        slot: usize,
        generation: u64,
        id: WorkerId,
        pid: u32,
        now: Time,
    ) {
        let max_age = self.options.max_age;
        let expires_at = max_age.map(|age| now.saturating_add(self.jittered_time(age)));
        let max_connections = self.options.max_connections;
        let max_connections = max_connections.map(|max| self.jittered(max));
        let ready_by = now.saturating_add(self.options.startup_timeout);
        let worker = Worker {
            slot,
            pid,
            generation,
            forked_at: now,
            expires_at,
            max_connections,
            is_postponed: false,
            state: WorkerState::Starting { ready_by },
        };
        self.workers.insert(id, worker);
        if !self.keeps_workers() {
            return self.forked_while_stopping(id);
        }
        let is_successor = self.is_awaited(slot, generation);
        if let Some(rollout) = self.rollout.as_mut().filter(|_| is_successor) {
            rollout.batch.insert(slot, Some(id));
        }
        match self.slots.get_mut(slot) {
            Some(slot) if is_successor => slot.successor = Some(id),
            Some(slot) if slot.needs(generation) => {
                slot.occupancy = Occupancy::Occupied { worker: id };
                slot.shortages = 0;
            }
            // The worker is not needed, because the slot was removed or filled, or the rollout was
            // cancelled, during the fork.
            _ => self.disconnect(id, now),
        }
    }

    pub(in super::super) fn fork_failed(
        &mut self,
        slot: usize,
        generation: u64,
        cause: FailureCause,
        error: String,
        now: Time,
    ) {
        let failure = WorkerFailure {
            slot,
            worker: None,
            pid: None,
            generation,
            cause,
            error: Some(error),
            status: None,
            age: Duration::ZERO,
            usage: None,
        };
        if self.is_awaited(slot, generation) {
            self.fail_rollout(ReloadFailure::WorkerFailed(failure), now);
        } else if self.slots.get(slot).is_some_and(|s| s.needs(generation)) {
            if self.fails_reload(&failure, None, now) {
                self.fail_rollout(ReloadFailure::WorkerFailed(failure.clone()), now);
            }
            self.worker_failed(failure, None, now);
        }
        self.settle(now);
    }

    /// Removes a worker whose process has exited. If the exit is a failure, also handles the
    /// failure of the worker's slot or rollout.
    pub(in super::super) fn exited(
        &mut self,
        id: WorkerId,
        status: ExitStatus,
        usage: Option<Usage>,
        now: Time,
    ) {
        let Some(worker) = self.workers.remove(&id) else {
            return;
        };
        let slot = worker.slot;
        if let Some(rollout) = &mut self.rollout {
            rollout.retired(id);
        }
        let Some(cause) = worker.failure_cause() else {
            self.emit(PoolEvent::WorkerShutDown {
                slot,
                worker: id,
                killed: worker.state == WorkerState::Killed,
            });
            return self.settle(now);
        };
        let failure = WorkerFailure {
            slot,
            worker: Some(id),
            pid: Some(worker.pid),
            generation: worker.generation,
            cause,
            error: None,
            status: Some(status),
            age: now.saturating_sub(worker.forked_at),
            usage,
        };
        let was_current = self.slots.get(slot).is_some_and(|s| s.worker() == Some(id));
        let rollout = self.rollout.as_ref();
        let is_of_batch =
            rollout.is_some_and(|rollout| rollout.batch.get(&slot) == Some(&Some(id)));
        let ready_since = worker.ready_since();
        if is_of_batch || (was_current && self.fails_reload(&failure, ready_since, now)) {
            self.fail_rollout(ReloadFailure::WorkerFailed(failure.clone()), now);
        }
        if was_current {
            self.worker_failed(failure, ready_since, now);
        }
        self.settle(now);
    }

    /// Records a slot's failure. The slot's successor becomes its worker. If the slot has no
    /// successor, a new worker is forked after the back-off, unless the slot has reached its
    /// failure limit. A lack of resources does not count towards that limit, because the worker is
    /// not at fault.
    fn worker_failed(&mut self, failure: WorkerFailure, ready_since: Option<Time>, now: Time) {
        self.failures += 1;
        self.emit(PoolEvent::WorkerFailed(failure.clone()));
        if !self.keeps_workers() {
            return;
        }
        let number = failure.slot;
        let Some(slot) = self.slots.get_mut(number) else {
            return;
        };
        slot.last_failure = Some(failure.clone());
        let is_shortage = failure.cause == FailureCause::OutOfResources;
        let is_limit_reached = !is_shortage && slot.count_failure(ready_since, &self.options, now);
        if let Some(worker) = slot.successor.take() {
            slot.occupancy = Occupancy::Occupied { worker };
        } else if is_limit_reached {
            slot.occupancy = Occupancy::GivenUp;
            self.emit(PoolEvent::FailureLimitReached { slot: number });
            self.actions.push_back(Action::RequestDecision(failure));
        } else {
            let pause = match is_shortage {
                true => slot.count_shortage(&self.options),
                false => slot.failure_pause(&self.options),
            };
            let restart_at = now.saturating_add(self.jittered_time(pause));
            self.slots[number].occupancy = Occupancy::Waiting { restart_at };
            self.restart(now);
        }
    }

    /// Forks workers for the slots whose pause has ended. Skips the slots in the rollout's batch,
    /// because their successors fill them.
    pub(super) fn restart(&mut self, now: Time) {
        let batch = self.rollout.as_ref().map(|rollout| &rollout.batch);
        for (number, slot) in self.slots.iter_mut().enumerate() {
            let is_due = slot.restart_at().is_some_and(|at| at <= now);
            if is_due && batch.is_none_or(|batch| !batch.contains_key(&number)) {
                slot.occupancy = Occupancy::Vacant;
                slot.restarts += 1;
                let generation = slot.generation;
                self.actions.push_back(Action::Fork {
                    slot: number,
                    generation,
                });
            }
        }
    }
}
