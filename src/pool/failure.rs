//! The failure of a worker, and the application's decision at the failure limit.

use std::fmt;
use std::process::ExitStatus;
use std::time::Duration;

use cluster::WorkerId;

/// The failure of a worker. The worker exited although the pool had not disconnected it, was killed
/// because it missed its start-up or heartbeat deadline, or could not be forked.
///
/// Node has no counterpart.
///
/// Events such as [`PoolEvent::WorkerFailed`](super::PoolEvent::WorkerFailed), and
/// [`SlotStatus::last_failure`](super::SlotStatus::last_failure), contain a `WorkerFailure`. The
/// `Display` output is one line for a log.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerFailure {
    /// The worker's slot.
    pub slot: usize,
    /// The worker's id, or `None` if the worker could not be forked.
    pub worker: Option<WorkerId>,
    /// The worker's process id, or `None` if the worker could not be forked.
    pub pid: Option<u32>,
    /// The worker's generation.
    pub generation: u64,
    /// The cause of the failure.
    pub cause: FailureCause,
    /// The error of a failed fork, or `None` if the fork succeeded.
    pub error: Option<String>,
    /// The exit status of the worker's process, or `None` if the fork failed.
    pub status: Option<ExitStatus>,
    /// The time from the worker's fork to its exit, or zero if the fork failed.
    pub age: Duration,
    /// The resources that the process used, or `None` if the fork failed or the system did not
    /// report them.
    pub usage: Option<cluster::Usage>,
}

/// The cause of a worker's failure.
///
/// Node has no counterpart.
///
/// See [`WorkerFailure::cause`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailureCause {
    /// The worker could not be forked for a reason other than `OutOfResources`, for example because
    /// its program does not exist.
    ForkFailed,
    /// The worker could not be forked, because the system lacked processes, memory or descriptors, or
    /// because the machine was too slow ([`Error::Fork`](cluster::Error::Fork) with
    /// [`TimedOut`](std::io::ErrorKind::TimedOut)). This failure does not count towards the slot's failure limit. The pool tries again after
    /// [`PoolOptions::back_off`](super::PoolOptions::back_off). The pause doubles with each
    /// attempt, up to [`PoolOptions::back_off_cap`](super::PoolOptions::back_off_cap).
    OutOfResources,
    /// The worker exited before it was ready.
    ExitedBeforeReady,
    /// The worker was killed because it was not ready within
    /// [`PoolOptions::startup_timeout`](super::PoolOptions::startup_timeout).
    StartupTimeout,
    /// The worker exited after it had become ready.
    Exited,
    /// The worker was killed because it sent no heartbeat within
    /// [`PoolOptions::heartbeat_timeout`](super::PoolOptions::heartbeat_timeout).
    HeartbeatTimeout,
}

/// A decision about a slot that has reached its failure limit. See
/// [`Pool::set_failure_limit_callback`](super::Pool::set_failure_limit_callback) for an example.
///
/// Node has no counterpart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailureAction {
    /// The slot stays empty until the next reload or a call of [`Pool::retry`](super::Pool::retry).
    /// A call of [`Pool::scale`](super::Pool::scale) also fills the slot if all remaining slots are
    /// given up. The pool keeps running, even if it has given up all slots.
    GiveUp,
    /// The pool forks a new worker for the slot after this time, and counts the slot's failures
    /// from 0 again.
    RetryAfter(Duration),
    /// The pool stops, as if the application had called [`Pool::stop`](super::Pool::stop). When the
    /// pool has stopped, [`Master::run`](cluster::Master::run) returns
    /// [`Error::GaveUp`](cluster::Error::GaveUp) with the [`WorkerFailure`].
    StopPool,
}

impl FailureCause {
    /// Returns the cause of a failure for an error of `Master::fork`.
    pub(super) fn of_fork_error(error: &cluster::Error) -> Self {
        let is_late = matches!(error, cluster::Error::Fork { reason, .. }
            if reason.kind() == std::io::ErrorKind::TimedOut);
        if is_late || error.is_out_of_resources() {
            Self::OutOfResources
        } else {
            Self::ForkFailed
        }
    }
}

impl std::error::Error for WorkerFailure {}

impl fmt::Display for FailureCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ForkFailed => "could not be forked",
            Self::OutOfResources => "could not be forked for lack of resources",
            Self::ExitedBeforeReady => "exited before it was ready",
            Self::StartupTimeout => "was not ready in time",
            Self::Exited => "exited",
            Self::HeartbeatTimeout => "sent no heartbeat in time",
        })
    }
}

impl fmt::Display for WorkerFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}: worker ", self.slot)?;
        if let (Some(worker), Some(pid)) = (self.worker, self.pid) {
            write!(f, "{worker} ({pid}) ")?;
        }
        write!(f, "{}", self.cause)?;
        if let Some(error) = &self.error {
            write!(f, ": {error}")?;
        }
        if let Some(status) = self.status {
            let age = self.age.as_secs_f64();
            write!(f, " after {age:.1} s ({status})")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use cluster::{Error, ForkStep};

    use super::*;

    #[test]
    fn slow_start_does_not_count_towards_the_failure_limit() {
        for (kind, cause) in [
            (io::ErrorKind::TimedOut, FailureCause::OutOfResources),
            (io::ErrorKind::NotFound, FailureCause::ForkFailed),
        ] {
            let error = Error::Fork {
                program: "app".into(),
                step: ForkStep::WaitForStart,
                reason: kind.into(),
            };
            assert_eq!(FailureCause::of_fork_error(&error), cause);
        }
    }
}
