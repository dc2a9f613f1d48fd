//! The pool's deadlines, and the transitions that are due at them.

use std::time::Duration;

use super::rollout::Rollout;
use super::upgrade::Upgrade;
use super::worker::{Worker, WorkerState};
use super::{Action, Core, Time};

/// The minimum delay of a tick for which the drain timeout of a worker begins again.
///
/// With a shorter time, a loaded machine, which delays most ticks by some milliseconds, would
/// postpone the end of a short drain timeout again and again. With a longer time, workers are killed
/// although they were stopped together with the master. No benchmark chose this value.
const ABSENCE_MIN: Duration = Duration::from_secs(1);

impl Core {
    /// Returns the time by which the driver must call `tick`, or `None` if no deadline is pending.
    pub(in super::super) fn next_deadline(&mut self) -> Option<Time> {
        let batch = self.rollout.as_ref().map(|rollout| &rollout.batch);
        let is_in_batch = |slot: usize| batch.is_some_and(|batch| batch.contains_key(&slot));
        let slots = self.slots.iter().enumerate();
        let restarts = slots
            .filter(|(number, _)| !is_in_batch(*number))
            .filter_map(|(_, slot)| slot.restart_at());
        let workers = self.workers.values();
        let workers = workers.filter_map(|worker| self.worker_deadline(worker));
        let rollout = self.rollout.as_ref();
        let others = [
            rollout.and_then(|rollout| self.rollout_deadline(rollout)),
            self.next_check,
            self.upgrade_deadline(),
            self.delayed_until(),
        ];
        let others = others.into_iter().flatten();
        self.next_tick = workers.chain(restarts).chain(others).min();
        self.next_tick
    }

    fn worker_deadline(&self, worker: &Worker) -> Option<Time> {
        match worker.state {
            WorkerState::Starting { ready_by } => {
                let ready_at = self.options.readiness.ready_at(worker.forked_at);
                ready_at.into_iter().chain([ready_by]).min()
            }
            WorkerState::Ready { last_heartbeat, .. } => {
                let timeout = self.options.heartbeat_timeout;
                let silent_at = timeout.map(|timeout| last_heartbeat.saturating_add(timeout));
                // Ignore the maximum age if the worker is already scheduled for the next recycling.
                // Also ignore this age during a rollout, because the next rollout begins only after
                // the current one has ended.
                let is_blocked =
                    self.limits_reached.contains_key(&worker.slot) || self.rollout.is_some();
                let slot = self.slots.get(worker.slot);
                let recycle_from = slot.map_or(Time::ZERO, |slot| slot.recycle_from);
                let expires_at = worker.expires_at.filter(|_| !is_blocked);
                let expires_at = expires_at.map(|at| at.max(recycle_from));
                silent_at.into_iter().chain(expires_at).min()
            }
            WorkerState::Disconnecting { exit_by } => Some(exit_by),
            WorkerState::Failed { .. } | WorkerState::Killed => None,
        }
    }

    fn rollout_deadline(&self, rollout: &Rollout) -> Option<Time> {
        let mut successors = rollout.batch.values().flatten();
        let has_failed = successors.any(|successor| {
            let worker = self.workers.get(successor);
            worker.is_some_and(Worker::has_failed)
        });
        // If a successor was killed because it missed a deadline, the rollout needs no deadline,
        // because the rollout ends when the killed successor exits.
        rollout.observed_until().filter(|_| !has_failed)
    }

    pub(in super::super) fn tick(&mut self, now: Time) {
        self.forgive_absence(now);
        let mut ready = Vec::new();
        for (id, worker) in &mut self.workers {
            if worker.expire(&self.options, now) {
                self.actions.push_back(Action::Kill(*id));
            } else if let WorkerState::Starting { .. } = worker.state {
                let ready_at = self.options.readiness.ready_at(worker.forked_at);
                ready.extend(ready_at.filter(|at| *at <= now).map(|_| *id));
            }
        }
        for worker in ready {
            self.became_ready(worker, now);
        }
        if self.next_check.is_some_and(|at| at <= now) {
            self.next_check = Some(now.saturating_add(self.options.check_interval));
            self.actions.push_back(Action::MeasureWorkers);
        }
        self.tick_upgrade(now);
        if self.delayed_until().is_some_and(|until| until <= now) {
            self.drain(now);
        }
        if self.keeps_workers() {
            self.restart(now);
        }
        self.settle(now);
    }

    /// Restarts the timeouts of starting, ready and disconnecting workers and of an upgrade if the
    /// tick is late by more than a quarter of the timeout in question.
    ///
    /// If the master was stopped or the machine was asleep, the master may not have read the
    /// messages that its workers sent in the meantime, and the workers may have been stopped too. A
    /// missed deadline then does not mean that a worker hangs. If a smaller part of the timeout were enough, a busy loop would restart the
    /// timeouts again and again. If a larger part were needed, the pool would kill workers whose
    /// messages are still unread. No benchmark chose the quarter.
    fn forgive_absence(&mut self, now: Time) {
        let late = self
            .next_tick
            .map_or(Time::ZERO, |at| now.saturating_sub(at));
        let is_long = |timeout: Duration| late > timeout / 4;
        let startup_timeout = self.options.startup_timeout;
        let forgives_heartbeats = self.options.heartbeat_timeout.is_some_and(is_long);
        let drain_timeout = self.options.drain_timeout;
        let upgrade_timeout = self.upgrade_timeout();
        match &mut self.upgrade {
            Upgrade::Pending { deadline, .. } if is_long(upgrade_timeout) => {
                *deadline = now.saturating_add(upgrade_timeout);
            }
            Upgrade::Pending { .. } | Upgrade::Idle | Upgrade::Succeeded { .. } => {}
        }
        for worker in self.workers.values_mut() {
            match &mut worker.state {
                WorkerState::Starting { ready_by } if is_long(startup_timeout) => {
                    *ready_by = now.saturating_add(startup_timeout);
                }
                WorkerState::Ready { last_heartbeat, .. } if forgives_heartbeats => {
                    *last_heartbeat = now;
                }
                WorkerState::Disconnecting { exit_by }
                    if late >= ABSENCE_MIN && is_long(drain_timeout) =>
                {
                    *exit_by = now.saturating_add(drain_timeout);
                }
                WorkerState::Starting { .. }
                | WorkerState::Ready { .. }
                | WorkerState::Failed { .. }
                | WorkerState::Disconnecting { .. }
                | WorkerState::Killed => {}
            }
        }
    }
}
