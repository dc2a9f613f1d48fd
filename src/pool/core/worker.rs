//! The states of one worker, from its fork to its exit.

use cluster::WorkerId;

use super::super::event::PoolEvent;
use super::super::failure::FailureCause;
use super::super::options::PoolOptions;
use super::super::status::WorkerPhase;
use super::slots::QuorumShare;
use super::{Action, Core, Time};

/// A worker whose process has not exited.
#[derive(Debug)]
pub(in super::super) struct Worker {
    pub(super) slot: usize,
    pub(in super::super) pid: u32,
    pub(in super::super) generation: u64,
    pub(in super::super) forked_at: Time,
    /// The time at which the worker reaches its maximum age.
    pub(super) expires_at: Option<Time>,
    pub(super) max_connections: Option<u64>,
    /// Whether `PoolEvent::RecyclingPostponed` was emitted for the worker.
    pub(super) is_postponed: bool,
    pub(super) state: WorkerState,
}

/// The state of a worker.
///
/// | from | input | to |
/// |---|---|---|
/// | | forked | `Starting` |
/// | | forked while the pool drains | `Disconnecting` |
/// | | forked after the pool was stopped at once | `Killed` |
/// | `Starting` | ready | `Ready` |
/// | `Starting` | the start-up timeout has passed | `Failed` |
/// | `Ready` | the heartbeat timeout has passed | `Failed` |
/// | `Starting`, `Ready` | disconnected | `Disconnecting` |
/// | `Failed` | disconnected | `Killed` |
/// | `Disconnecting` | the drain timeout has passed | `Killed` |
/// | any | the pool is stopped at once | `Killed` |
///
/// Each transition to `Failed` or `Killed` kills the process, except a disconnect in `Failed`,
/// because that process has already been killed. The exit of the process removes the worker. In
/// `Disconnecting` and `Killed`, the exit is a shutdown. In the other states, the exit is a
/// failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WorkerState {
    Starting {
        /// The time at which the worker is killed if it has not become ready.
        ready_by: Time,
    },
    Ready {
        since: Time,
        /// The time of the last heartbeat, or of becoming ready if there was none.
        last_heartbeat: Time,
    },
    /// The worker was killed because it missed a deadline.
    Failed {
        cause: FailureCause,
        ready_since: Option<Time>,
    },
    Disconnecting {
        /// The time at which the worker is killed if it has not exited.
        exit_by: Time,
    },
    /// The worker was killed and its exit is not a failure, because the worker was also
    /// disconnected or the pool was stopped at once.
    Killed,
}

impl Worker {
    /// Returns the worker's phase for the status. A worker that was killed after a heartbeat
    /// timeout still counts as ready until its process has exited.
    pub(in super::super) fn phase(&self) -> WorkerPhase {
        match self.state {
            WorkerState::Starting { .. }
            | WorkerState::Failed {
                ready_since: None, ..
            } => WorkerPhase::Starting,
            WorkerState::Ready { .. }
            | WorkerState::Failed {
                ready_since: Some(_),
                ..
            } => WorkerPhase::Ready,
            WorkerState::Disconnecting { .. } | WorkerState::Killed => WorkerPhase::Disconnecting,
        }
    }

    /// Returns whether the worker is ready and has not been killed.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.state, WorkerState::Ready { .. })
    }

    /// Returns whether the worker was killed because it missed a deadline.
    pub(super) fn has_failed(&self) -> bool {
        matches!(self.state, WorkerState::Failed { .. })
    }

    /// Returns when the worker became ready. Returns `None` if the worker never became ready, and
    /// also in the states `Disconnecting` and `Killed`.
    pub(super) fn ready_since(&self) -> Option<Time> {
        match self.state {
            WorkerState::Ready { since, .. } => Some(since),
            WorkerState::Failed { ready_since, .. } => ready_since,
            WorkerState::Starting { .. }
            | WorkerState::Disconnecting { .. }
            | WorkerState::Killed => None,
        }
    }

    /// Returns the cause of the failure if the process exits in the current state. Returns `None`
    /// if the exit is a shutdown.
    pub(super) fn failure_cause(&self) -> Option<FailureCause> {
        match self.state {
            WorkerState::Starting { .. } => Some(FailureCause::ExitedBeforeReady),
            WorkerState::Ready { .. } => Some(FailureCause::Exited),
            WorkerState::Failed { cause, .. } => Some(cause),
            WorkerState::Disconnecting { .. } | WorkerState::Killed => None,
        }
    }

    /// Changes the worker's state for a disconnect. Returns `false`, and changes nothing, if the
    /// worker is already disconnecting or killed.
    pub(super) fn disconnect(&mut self, exit_by: Time) -> bool {
        match self.state {
            WorkerState::Starting { .. } | WorkerState::Ready { .. } => {
                self.state = WorkerState::Disconnecting { exit_by };
                true
            }
            WorkerState::Failed { .. } => {
                self.state = WorkerState::Killed;
                true
            }
            WorkerState::Disconnecting { .. } | WorkerState::Killed => false,
        }
    }

    /// Applies the current state's deadline. Returns whether the deadline has passed, in which case
    /// the caller must kill the process.
    pub(super) fn expire(&mut self, options: &PoolOptions, now: Time) -> bool {
        let is_silent = |last: Time| {
            let timeout = options.heartbeat_timeout;
            timeout.is_some_and(|timeout| last.saturating_add(timeout) <= now)
        };
        self.state = match self.state {
            WorkerState::Starting { ready_by } if ready_by <= now => WorkerState::Failed {
                cause: FailureCause::StartupTimeout,
                ready_since: None,
            },
            WorkerState::Ready {
                since,
                last_heartbeat,
            } if is_silent(last_heartbeat) => WorkerState::Failed {
                cause: FailureCause::HeartbeatTimeout,
                ready_since: Some(since),
            },
            WorkerState::Disconnecting { exit_by } if exit_by <= now => WorkerState::Killed,
            WorkerState::Starting { .. }
            | WorkerState::Ready { .. }
            | WorkerState::Failed { .. }
            | WorkerState::Disconnecting { .. }
            | WorkerState::Killed => return false,
        };
        true
    }
}

impl Core {
    /// Records that a worker has become ready.
    pub(in super::super) fn became_ready(&mut self, id: WorkerId, now: Time) {
        let Some(worker) = self.workers.get_mut(&id) else {
            return;
        };
        if let WorkerState::Starting { .. } = worker.state {
            worker.state = WorkerState::Ready {
                since: now,
                last_heartbeat: now,
            };
            let number = worker.slot;
            if let Some(slot) = self.slots.get_mut(number) {
                slot.quorum_share = QuorumShare::Counted;
            }
            self.emit(PoolEvent::WorkerReady {
                slot: number,
                worker: id,
            });
            self.settle(now);
        }
    }

    pub(in super::super) fn heartbeat_received(&mut self, id: WorkerId, now: Time) {
        let worker = self.workers.get_mut(&id);
        if let Some(WorkerState::Ready { last_heartbeat, .. }) = worker.map(|w| &mut w.state) {
            *last_heartbeat = now;
        }
    }

    /// Disconnects a worker, unless it is already disconnecting or killed.
    pub(super) fn disconnect(&mut self, id: WorkerId, now: Time) {
        let exit_by = now.saturating_add(self.options.drain_timeout);
        let worker = self.workers.get_mut(&id);
        if worker.is_some_and(|worker| worker.disconnect(exit_by)) {
            self.actions.push_back(Action::Disconnect(id));
            self.emit_disconnecting(id);
        }
    }

    /// Emits the event of a worker that has just been disconnected, unless the pool has killed the
    /// worker before.
    pub(super) fn emit_disconnecting(&mut self, id: WorkerId) {
        if let Some(worker) = self.workers.get(&id) {
            if let WorkerState::Disconnecting { .. } = worker.state {
                let (slot, worker) = (worker.slot, id);
                self.emit(PoolEvent::WorkerDisconnecting { slot, worker });
            }
        }
    }
}
