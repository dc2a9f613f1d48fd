//! The replacement of a pool's workers by rollouts.
//!
//! A rollout is either a reload, which replaces all workers, or a recycling, which replaces workers
//! that have reached a limit. Only one rollout runs at a time. A rollout handles the slots in
//! batches and forks a successor for each slot of the batch. After all successors have been ready
//! for `PoolOptions::min_ready_time`, or in a canary step for the canary's duration, the old
//! workers are disconnected. If a successor fails, the rollout fails. A reload also fails if a worker
//! fails soon after it has replaced the old one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cluster::WorkerId;

use super::super::event::{Limit, PoolEvent, ReloadFailure};
use super::super::failure::{FailureCause, WorkerFailure};
use super::super::options::Canary;
use super::worker::Worker;
use super::{Action, Core, MIN_PAUSE, Time};

/// A rollout that is in progress.
#[derive(Debug)]
pub(super) struct Rollout {
    kind: Kind,
    /// The batch's successors, by slot. A successor is `None` until it is forked. The map is empty
    /// in `Phase::Retiring`.
    pub(super) batch: BTreeMap<usize, Option<WorkerId>>,
    phase: Phase,
    /// The canary step, until it has ended.
    canary: Option<Canary>,
    replaced: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A reload. It replaces the workers of all slots with workers of this generation.
    Reload { generation: u64 },
    /// A recycling. It replaces the workers in `Core::limits_reached` with workers of the slots'
    /// generations.
    Recycling,
}

/// The phase of a rollout.
///
/// | from | input | to |
/// |---|---|---|
/// | | the rollout begins | `Retiring` without workers |
/// | `Retiring` | all replaced workers have exited, and slots remain | `Starting` with the next batch |
/// | `Retiring` | all replaced workers have exited, and no slots remain | (ended: success) |
/// | `Starting` | all successors of the batch are ready | `Observing` |
/// | `Observing` | the time has passed | `Retiring` |
/// | `Starting`, `Observing` | all slots of the batch were removed | `Retiring` without workers |
/// | `Starting`, `Observing` | a successor has failed | (ended: failure) |
/// | any | the new worker of a slot that the reload has replaced fails soon | (ended: failure) |
/// | any | the reload is cancelled | (ended: failure) |
/// | any | the pool stops | (ended) |
#[derive(Debug)]
enum Phase {
    /// The rollout waits until all successors are ready.
    Starting,
    /// The rollout waits until this time. The successors must stay ready in the meantime.
    Observing { until: Time },
    /// The rollout waits until these replaced workers have exited.
    Retiring { workers: BTreeSet<WorkerId> },
}

/// A worker that has reached a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LimitReached {
    worker: WorkerId,
    limit: Limit,
}

impl Rollout {
    fn new(kind: Kind, canary: Option<Canary>) -> Self {
        Self {
            kind,
            batch: BTreeMap::new(),
            phase: Phase::Retiring {
                workers: BTreeSet::new(),
            },
            canary,
            replaced: 0,
        }
    }

    pub(super) fn is_reload(&self) -> bool {
        matches!(self.kind, Kind::Reload { .. })
    }

    /// Records that a worker has exited, in case the rollout is waiting for its exit.
    pub(super) fn retired(&mut self, worker: WorkerId) {
        if let Phase::Retiring { workers } = &mut self.phase {
            workers.remove(&worker);
        }
    }

    /// Returns the time at which the batch's observation ends, or `None` if the batch is not being
    /// observed.
    pub(super) fn observed_until(&self) -> Option<Time> {
        match self.phase {
            Phase::Observing { until } => Some(until),
            Phase::Starting | Phase::Retiring { .. } => None,
        }
    }
}

// Reload requests and measurements.
impl Core {
    /// Requests a reload. If a rollout is in progress, the reload begins after that rollout has
    /// ended.
    pub(in super::super) fn reload(&mut self, now: Time) {
        if !self.is_stopping() {
            self.reload_requested = true;
            self.settle(now);
        }
    }

    pub(in super::super) fn cancel_reload(&mut self, now: Time) {
        self.reload_requested = false;
        if self.rollout.as_ref().is_some_and(Rollout::is_reload) {
            self.fail_rollout(ReloadFailure::Cancelled, now);
        }
        self.settle(now);
    }

    /// Checks a worker's received connections and its private memory, in bytes, against the limits.
    pub(in super::super) fn measured(
        &mut self,
        id: WorkerId,
        connections: Option<u64>,
        memory: Option<u64>,
        now: Time,
    ) {
        let Some(worker) = self.workers.get(&id) else {
            return;
        };
        let reaches = |value: Option<u64>, max: Option<u64>| {
            value.zip(max).is_some_and(|(value, max)| value >= max)
        };
        if reaches(connections, worker.max_connections) {
            self.limit_reached(id, Limit::Connections, now);
        } else if reaches(memory, self.options.max_memory) {
            self.memory_limit_reached(id, now);
        }
        self.settle(now);
    }

    /// Schedules a worker that has reached the memory limit for the next recycling. If the worker
    /// is younger than `Slot::memory_age`, reports the postponement instead, once for each worker.
    fn memory_limit_reached(&mut self, id: WorkerId, now: Time) {
        let Some(worker) = self.workers.get(&id) else {
            return;
        };
        let (number, forked_at) = (worker.slot, worker.forked_at);
        let is_postponed = worker.is_postponed;
        let slot = self.slots.get(number);
        let Some(slot) = slot.filter(|slot| slot.worker() == Some(id)) else {
            return;
        };
        let due = forked_at.saturating_add(slot.memory_age);
        if due <= now {
            return self.limit_reached(id, Limit::Memory, now);
        }
        // Do not report the postponement twice. Also do not report it if the slot must wait at
        // least as long because of a failed recycling, because that failure was reported.
        if is_postponed || slot.recycle_from >= due || !self.keeps_workers() {
            return;
        }
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.is_postponed = true;
        }
        self.emit(PoolEvent::RecyclingPostponed {
            slot: number,
            worker: id,
            limit: Limit::Memory,
            by: due - now,
        });
    }

    /// Sets the minimum age at which this worker's successor is replaced for its memory. The age
    /// doubles with each early replacement, up to `PoolOptions::back_off_cap`, and is reset by a
    /// late one.
    fn recycled_for_memory(&mut self, number: usize, worker: WorkerId, now: Time) {
        let (Some(slot), Some(worker)) = (self.slots.get_mut(number), self.workers.get(&worker))
        else {
            return;
        };
        let cap = self.options.back_off_cap;
        let age = now.saturating_sub(worker.forked_at);
        // Compare with the required age plus the cap. A worker that reached the limit early and had
        // to wait is only a little older than the required age, so its age alone does not show that
        // its memory grows slowly.
        slot.memory_age = if age >= slot.memory_age.saturating_add(cap) {
            Duration::ZERO
        } else {
            // Begin with the check interval, because the pool cannot replace workers more often.
            let doubled = slot.memory_age.saturating_mul(2);
            doubled.max(self.options.check_interval).min(cap)
        };
    }

    /// Schedules a worker for the next recycling, unless a recycling of its slot failed recently.
    fn limit_reached(&mut self, id: WorkerId, limit: Limit, now: Time) {
        let Some(number) = self.workers.get(&id).map(|worker| worker.slot) else {
            return;
        };
        let slot = self.slots.get(number).filter(|s| s.worker() == Some(id));
        let is_due = slot.is_some_and(|slot| slot.recycle_from <= now);
        if is_due && self.keeps_workers() {
            let entry = self.limits_reached.entry(number);
            entry.or_insert(LimitReached { worker: id, limit });
        }
    }
}

// Transitions of the rollout.
impl Core {
    /// Returns whether the rollout is forking a successor for the slot. In a reload, the successor
    /// must also be of this generation.
    pub(super) fn is_awaited(&self, slot: usize, generation: u64) -> bool {
        self.rollout.as_ref().is_some_and(|rollout| {
            let is_of_rollout = match rollout.kind {
                Kind::Reload { generation: new } => generation == new,
                Kind::Recycling => true,
            };
            is_of_rollout && rollout.batch.get(&slot) == Some(&None)
        })
    }

    /// Returns whether the failure of a slot's worker also fails the reload that is in progress. It
    /// does if the worker is of the new generation, was ready for less than
    /// `PoolOptions::back_off_reset`, and slots are left to be replaced. The new release probably
    /// fails everywhere, so the reload must not replace the workers that still serve. A later failure
    /// is probably no fault of the release.
    pub(super) fn fails_reload(
        &self,
        failure: &WorkerFailure,
        ready_since: Option<Time>,
        now: Time,
    ) -> bool {
        let generation = failure.generation;
        let rollout = self.rollout.as_ref();
        let is_of_reload =
            rollout.is_some_and(|rollout| rollout.kind == Kind::Reload { generation });
        let are_left = self.slots.iter().any(|slot| slot.generation != generation);
        let reset = self.options.back_off_reset;
        let is_soon = ready_since.is_none_or(|since| now.saturating_sub(since) < reset);
        let is_fault = failure.cause != FailureCause::OutOfResources;
        is_of_reload && are_left && is_soon && is_fault
    }

    /// Makes all transitions of the rollout that are due. If no rollout is in progress, begins the
    /// next one.
    pub(super) fn advance_rollout(&mut self, now: Time) {
        while self.keeps_workers() {
            let Some(rollout) = &mut self.rollout else {
                if !self.begin_rollout(now) {
                    return;
                }
                continue;
            };
            let is_ready = |worker: &Option<WorkerId>| {
                let worker = worker.and_then(|worker| self.workers.get(&worker));
                // A successor that missed a deadline is not ready. The rollout ends when the killed
                // process exits.
                worker.is_some_and(Worker::is_ready)
            };
            let are_ready = rollout.batch.values().all(is_ready);
            match &rollout.phase {
                Phase::Starting | Phase::Observing { .. } if rollout.batch.is_empty() => {
                    rollout.phase = Phase::Retiring {
                        workers: BTreeSet::new(),
                    };
                }
                Phase::Starting | Phase::Observing { .. } if !are_ready => return,
                Phase::Starting => {
                    let canary = rollout.canary.map(|canary| canary.duration);
                    let time = canary.unwrap_or(self.options.min_ready_time);
                    let until = now.saturating_add(time);
                    rollout.phase = Phase::Observing { until };
                }
                Phase::Observing { until } if *until <= now => self.promote_batch(now),
                Phase::Retiring { workers } if workers.is_empty() => self.start_batch(now),
                Phase::Observing { .. } | Phase::Retiring { .. } => return,
            }
        }
    }

    /// Begins the next reload or recycling. Returns `false` if neither is due.
    fn begin_rollout(&mut self, now: Time) -> bool {
        let is_expired = |worker: &Worker| {
            worker.is_ready() && worker.expires_at.is_some_and(|expires| expires <= now)
        };
        let workers = self.workers.iter();
        let expired = workers.filter(|(_, worker)| is_expired(worker));
        let expired: Vec<_> = expired.map(|(id, _)| *id).collect();
        for worker in expired {
            self.limit_reached(worker, Limit::Age, now);
        }
        if std::mem::take(&mut self.reload_requested) {
            self.last_generation += 1;
            let generation = self.last_generation;
            let base = self.generation;
            self.actions
                .push_back(Action::BeginGeneration { generation, base });
            self.emit(PoolEvent::Reloading { generation });
            let kind = Kind::Reload { generation };
            self.rollout = Some(Rollout::new(kind, self.options.canary));
        } else if self.limits_reached.is_empty() {
            return false;
        } else {
            self.rollout = Some(Rollout::new(Kind::Recycling, None));
        }
        true
    }

    /// Forks the next batch's successors, or ends the rollout if no slots remain.
    fn start_batch(&mut self, now: Time) {
        let Some(rollout) = &mut self.rollout else {
            return;
        };
        if rollout.replaced > 0 {
            rollout.canary = None;
        }
        let size = rollout
            .canary
            .map_or(self.options.surge, |canary| canary.workers.max(1));
        let kind = rollout.kind;
        let (batch, events) = match kind {
            Kind::Reload { generation } => (self.next_reloads(generation, size), Vec::new()),
            Kind::Recycling => self.next_recyclings(size, now),
        };
        if batch.is_empty() {
            self.rollout = None;
            if let Kind::Reload { generation } = kind {
                self.generation = generation;
                self.emit(PoolEvent::Reloaded { generation });
            }
            return;
        }
        if let Some(rollout) = &mut self.rollout {
            rollout.batch = batch.iter().map(|(slot, _)| (*slot, None)).collect();
            rollout.phase = Phase::Starting;
        }
        events.into_iter().for_each(|event| self.emit(event));
        for (slot, generation) in batch {
            self.actions.push_back(Action::Fork { slot, generation });
        }
    }

    /// Returns the next slots for a reload, each with its successor's generation.
    fn next_reloads(&self, generation: u64, size: usize) -> Vec<(usize, u64)> {
        let slots = self.slots.iter().enumerate();
        let old = slots.filter(|(_, slot)| slot.generation != generation);
        old.map(|(slot, _)| (slot, generation)).take(size).collect()
    }

    /// Returns the next slots for a recycling, each with its successor's generation, and the events
    /// to emit.
    fn next_recyclings(&mut self, size: usize, now: Time) -> (Vec<(usize, u64)>, Vec<PoolEvent>) {
        let (mut batch, mut events) = (Vec::new(), Vec::new());
        while batch.len() < size {
            let Some((number, reached)) = self.limits_reached.pop_first() else {
                break;
            };
            let LimitReached { worker, limit } = reached;
            // Replace the worker only if it is still its slot's worker. It may have failed after it
            // reached the limit.
            let slot = self.slots.get(number);
            if let Some(slot) = slot.filter(|slot| slot.worker() == Some(worker)) {
                batch.push((number, slot.generation));
                events.push(PoolEvent::Recycling {
                    slot: number,
                    worker,
                    limit,
                });
                if limit == Limit::Memory {
                    self.recycled_for_memory(number, worker, now);
                }
            }
        }
        (batch, events)
    }

    /// Makes the successors the workers of their slots and disconnects the old workers.
    fn promote_batch(&mut self, now: Time) {
        let Some(rollout) = &mut self.rollout else {
            return;
        };
        let batch = std::mem::take(&mut rollout.batch);
        rollout.replaced += batch.len();
        let mut old_workers = Vec::new();
        for (number, successor) in batch {
            let (Some(slot), Some(successor)) = (self.slots.get_mut(number), successor) else {
                continue;
            };
            if let Kind::Reload { generation } = rollout.kind {
                slot.generation = generation;
            }
            old_workers.extend(slot.promote(successor));
            self.limits_reached.remove(&number);
        }
        rollout.phase = Phase::Retiring {
            workers: old_workers.iter().copied().collect(),
        };
        for worker in old_workers {
            self.disconnect(worker, now);
        }
    }

    /// Ends the rollout as a failure and disconnects the successors that have not replaced a
    /// worker.
    pub(super) fn fail_rollout(&mut self, reason: ReloadFailure, now: Time) {
        let Some(rollout) = self.rollout.take() else {
            return;
        };
        let recycle_from = now.saturating_add(self.options.back_off_cap.max(MIN_PAUSE));
        for (number, successor) in rollout.batch {
            let Some(slot) = self.slots.get_mut(number) else {
                continue;
            };
            if rollout.kind == Kind::Recycling {
                slot.recycle_from = recycle_from;
            }
            // Disconnect the successor only if it still waits to take over. If the old worker
            // failed, the successor is already the slot's worker and stays.
            if slot.successor == successor {
                slot.successor = None;
                if let Some(successor) = successor {
                    self.disconnect(successor, now);
                }
            }
        }
        match (rollout.kind, reason) {
            (Kind::Reload { generation }, reason) => self.emit(PoolEvent::ReloadFailed {
                generation,
                replaced: rollout.replaced,
                reason,
            }),
            (Kind::Recycling, ReloadFailure::WorkerFailed(failure)) => {
                self.emit(PoolEvent::RecyclingFailed(failure));
            }
            (Kind::Recycling, ReloadFailure::Cancelled) => {}
        }
        self.restart(now);
    }
}
