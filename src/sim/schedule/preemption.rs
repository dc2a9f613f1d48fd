//! Preempts one process for a while, as a loaded machine does.

use crate::types::time::Time;
use crate::types::worker_id::WorkerId;

/// The time that passes instead of each step of the preempted process. After 20 of these steps, the
/// time reaches `STALL_TIMEOUT`, so a worker that was idle is treated as stalled.
const INSTEAD: Time = Time::from_millis(1);

/// A process of the simulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Runner {
    Master,
    Worker(WorkerId),
}

/// The process that is preempted at present, if any, and the number of its steps still to skip.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Preemption {
    preempted: Option<Runner>,
    left: u8,
}

impl Preemption {
    /// Preempts `runner` for its next `steps` steps.
    pub(super) fn begin(&mut self, runner: Runner, steps: u8) {
        (self.preempted, self.left) = (Some(runner), steps);
    }

    /// Counts a step of `runner` if the process is preempted. Returns the time that passes instead
    /// of the step, or `None` if the process can run.
    pub(super) fn step_preempted(&mut self, runner: Option<Runner>) -> Option<Time> {
        if runner.is_none() || self.preempted != runner {
            return None;
        }
        self.left = self.left.checked_sub(1)?;
        Some(INSTEAD)
    }
}
