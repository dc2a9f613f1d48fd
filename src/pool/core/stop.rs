//! The stop of a pool.

use std::time::Duration;

use cluster::WorkerId;

use super::super::event::UpgradeFailure;
use super::slots::Occupancy;
use super::upgrade::RejectedMaster;
use super::worker::WorkerState;
use super::{Action, Core, Time};

/// The minimum time between the start of a stop and a signal that stops the pool at once.
///
/// One Ctrl-C may reach the master twice, from the terminal and from a parent that forwards it. The
/// two signals usually arrive within milliseconds. If the time is too short, the second signal
/// kills workers that serve clients. If the time is too long, an operator's deliberate second
/// signal has no effect. The value is an estimate without a benchmark.
const REPEAT_TIME: Duration = Duration::from_secs(1);

/// The state of a pool's stop.
///
/// | from | input | to |
/// |---|---|---|
/// | `Running` | `stop`, a stop signal, or a new master has taken over | `Draining` |
/// | `Draining` | a stop signal after `REPEAT_TIME`, if no new master has taken over | `Killing` |
/// | `Running`, `Draining` | `stop_at_once` | `Killing` |
///
/// The pool has ended when its state is not `Running` and all workers and rejected new masters have
/// exited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopState {
    Running,
    Draining {
        began_at: Time,
        /// The time at which the pool kills workers that have not exited.
        exit_by: Time,
    },
    Killing,
}

impl Core {
    pub(in super::super) fn is_stopping(&self) -> bool {
        self.stop != StopState::Running
    }

    /// Returns whether the pool has stopped and all its processes have exited. A new master that
    /// has taken over does not count.
    pub(in super::super) fn is_over(&self) -> bool {
        self.is_stopping() && self.workers.is_empty() && self.rejected_masters.is_empty()
    }

    pub(in super::super) fn stop(&mut self, now: Time) {
        if self.is_stopping() {
            return;
        }
        let exit_by = now.saturating_add(self.options.drain_timeout);
        self.stop = StopState::Draining {
            began_at: now,
            exit_by,
        };
        self.reload_requested = false;
        self.rollout = None;
        self.limits_reached.clear();
        self.next_check = None;
        for slot in &mut self.slots {
            slot.successor = None;
            if !slot.is_given_up() {
                slot.occupancy = Occupancy::Vacant;
            }
        }
        let workers = self.workers.iter_mut();
        let disconnected =
            workers.filter_map(|(id, worker)| worker.disconnect(exit_by).then_some(*id));
        let disconnected: Vec<_> = disconnected.collect();
        let is_fork = |action: &Action| matches!(action, Action::Fork { .. });
        self.actions.retain(|action| !is_fork(action));
        self.fail_upgrade(UpgradeFailure::PoolStopped, now);
        self.actions.push_back(Action::DisconnectAll);
        for id in disconnected {
            self.emit_disconnecting(id);
        }
        self.settle(now);
    }

    /// Stops the pool, or stops it at once if it has been stopping for at least `REPEAT_TIME`.
    ///
    /// After an upgrade, the signal has no effect. Operators often send a stop signal to the old
    /// master although it is already stopping, and its workers may still serve clients.
    pub(in super::super) fn stop_signal_received(&mut self, now: Time) {
        match self.stop {
            StopState::Running => self.stop(now),
            StopState::Draining { began_at, .. } => {
                let is_second = now.saturating_sub(began_at) >= REPEAT_TIME;
                if is_second && !self.is_upgraded() {
                    self.stop_at_once(now);
                }
            }
            StopState::Killing => {}
        }
    }

    pub(in super::super) fn stop_at_once(&mut self, now: Time) {
        self.stop(now);
        self.stop = StopState::Killing;
        for (id, worker) in &mut self.workers {
            worker.state = WorkerState::Killed;
            self.actions.push_back(Action::Kill(*id));
        }
        for (id, state) in &mut self.rejected_masters {
            *state = RejectedMaster::Killed;
            self.actions.push_back(Action::Kill(*id));
        }
        if let Some(new_master) = self.new_master() {
            self.actions.push_back(Action::EndPassing(new_master));
        }
    }

    /// Disconnects or kills a worker whose fork was in progress when the pool stopped. The worker
    /// has the same deadline as the other workers.
    pub(super) fn forked_while_stopping(&mut self, id: WorkerId) {
        let (state, action) = match self.stop {
            StopState::Running => return,
            StopState::Draining { exit_by, .. } => (
                WorkerState::Disconnecting { exit_by },
                Action::Disconnect(id),
            ),
            StopState::Killing => (WorkerState::Killed, Action::Kill(id)),
        };
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.state = state;
            self.actions.push_back(action);
            self.emit_disconnecting(id);
        }
    }
}
