//! The stop of a pool.

use std::time::Duration;

use cluster::WorkerId;

use super::super::event::{PoolEvent, UpgradeFailure};
use super::slots::Occupancy;
use super::upgrade::{RejectedMaster, Takeover};
use super::worker::WorkerState;
use super::{Action, Core, Time};

/// The minimum time between the start of a stop delay and a second request, which ends the delay.
/// Also the minimum time between the start of a drain and a signal that stops the pool at once.
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
/// | `Running` | `stop` or a stop signal, with a stop delay, not before a takeover | `Delayed` |
/// | `Running` | `stop` or a stop signal, without a stop delay or before a takeover | `Draining` |
/// | `Delayed` | the delay has passed, or `stop` or a stop signal after `REPEAT_TIME` | `Draining` |
/// | `Running`, `Delayed` | the application chooses `StopPool` at a failure limit | `Draining` |
/// | `Running` | a new master has taken over | `Draining` |
/// | `Draining` | a stop signal after `REPEAT_TIME`, if no new master has taken over | `Killing` |
/// | any | `stop_at_once` | `Killing` |
///
/// The pool has ended when its state is `Draining` or `Killing` and all workers and rejected new
/// masters have exited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopState {
    Running,
    /// The pool reports that it has no quorum, so that load balancers send no more clients. The
    /// workers serve as before.
    Delayed {
        began_at: Time,
        /// The time at which the pool begins to drain.
        until: Time,
    },
    Draining {
        began_at: Time,
        /// The time at which the pool kills workers that have not exited.
        exit_by: Time,
    },
    Killing,
}

/// Returns whether a request to stop is a deliberate second one, if the first one came at
/// `began_at`.
fn is_second(began_at: Time, now: Time) -> bool {
    now.saturating_sub(began_at) >= REPEAT_TIME
}

impl Core {
    /// Returns whether the pool is stopping or has stopped. The stop delay is part of the stop.
    pub(in super::super) fn is_stopping(&self) -> bool {
        self.stop != StopState::Running
    }

    /// Returns whether the pool keeps workers running. It still does during the stop delay.
    pub(super) fn keeps_workers(&self) -> bool {
        match self.stop {
            StopState::Running | StopState::Delayed { .. } => true,
            StopState::Draining { .. } | StopState::Killing => false,
        }
    }

    /// Returns the time at which the stop delay ends, or `None` if no delay is in progress.
    pub(in super::super) fn delayed_until(&self) -> Option<Time> {
        match self.stop {
            StopState::Delayed { until, .. } => Some(until),
            StopState::Running | StopState::Draining { .. } | StopState::Killing => None,
        }
    }

    /// Returns whether the pool has stopped and all its processes have exited. A new master that
    /// has taken over does not count.
    pub(in super::super) fn is_over(&self) -> bool {
        !self.keeps_workers() && self.workers.is_empty() && self.rejected_masters.is_empty()
    }

    /// Begins the stop delay, or disconnects all workers if there is no delay. A second call ends
    /// the delay if at least `REPEAT_TIME` has passed.
    ///
    /// A master that has not taken over from its old master stops without a delay, because the old
    /// master still serves all clients.
    pub(in super::super) fn stop(&mut self, now: Time) {
        match self.stop {
            StopState::Running => {
                let delay = self.options.stop_delay;
                if delay.is_zero() || self.takeover == Takeover::Pending {
                    self.drain(now);
                } else {
                    self.delay_stop(now, delay);
                }
            }
            StopState::Delayed { began_at, .. } if is_second(began_at, now) => self.drain(now),
            StopState::Delayed { .. } | StopState::Draining { .. } | StopState::Killing => {}
        }
    }

    /// Emits `Stopping`, unless the pool has already begun to stop or a new master has taken over.
    /// The caller must not have changed the state yet.
    fn emit_stopping(&mut self) {
        if self.stop == StopState::Running && !self.is_upgraded() {
            self.emit(PoolEvent::Stopping);
        }
    }

    fn delay_stop(&mut self, now: Time, delay: Duration) {
        self.emit_stopping();
        self.stop = StopState::Delayed {
            began_at: now,
            until: now.saturating_add(delay),
        };
        // A reload that is in progress continues, because its workers serve during the delay.
        self.reload_requested = false;
        self.fail_upgrade(UpgradeFailure::PoolStopped, now);
        self.settle(now);
    }

    /// Disconnects all workers. Does nothing if the pool is already draining or killing them.
    pub(super) fn drain(&mut self, now: Time) {
        if !self.keeps_workers() {
            return;
        }
        self.emit_stopping();
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

    /// Calls [`stop`](Self::stop), or stops the pool at once if it has been draining for at least
    /// `REPEAT_TIME`.
    ///
    /// After an upgrade, the signal has no effect. Operators often send a stop signal to the old
    /// master although it is already stopping, and its workers may still serve clients.
    pub(in super::super) fn stop_signal_received(&mut self, now: Time) {
        match self.stop {
            StopState::Running | StopState::Delayed { .. } => self.stop(now),
            StopState::Draining { began_at, .. }
                if is_second(began_at, now) && !self.is_upgraded() =>
            {
                self.stop_at_once(now);
            }
            StopState::Draining { .. } | StopState::Killing => {}
        }
    }

    pub(in super::super) fn stop_at_once(&mut self, now: Time) {
        self.drain(now);
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
            StopState::Running | StopState::Delayed { .. } => return,
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
