//! The failure of a worker, and what the application can decide about it.

use std::fmt;
use std::process::ExitStatus;
use std::time::Duration;

use cluster::WorkerId;

/// The failure of a worker: it exited although the pool had not disconnected it, or it could not be
/// forked.
///
/// Node has no counterpart.
///
/// It is part of [`PoolEvent::WorkerFailed`](super::PoolEvent::WorkerFailed) and of the
/// [status](super::SlotStatus::last_failure). Its `Display` output is one line for a log.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerFailure {
    /// The slot of the worker.
    pub slot: usize,
    /// The worker; `None` if it could not be forked.
    pub worker: Option<WorkerId>,
    /// The process id of the worker; `None` if it could not be forked.
    pub pid: Option<u32>,
    /// The generation of the worker.
    pub generation: u64,
    /// The cause of the failure.
    pub cause: FailureCause,
    /// The reason why the worker could not be forked, if it could not.
    pub error: Option<String>,
    /// The exit status of the process; `None` if there was no process.
    pub status: Option<ExitStatus>,
    /// The time from the fork to the exit.
    pub age: Duration,
    /// The resources that the process used; `None` if the system did not report them.
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
    /// The worker could not be forked.
    ForkFailed,
    /// The worker exited before it was ready.
    ExitedBeforeReady,
    /// The worker was killed because it was not ready within
    /// [`PoolOptions::startup_timeout`](super::PoolOptions::startup_timeout).
    StartupTimeout,
    /// The worker exited after it was ready.
    Exited,
    /// The worker was killed because it sent no heartbeat within
    /// [`PoolOptions::heartbeat_timeout`](super::PoolOptions::heartbeat_timeout).
    HeartbeatTimeout,
}

/// A decision about a slot that has reached its failure limit, for
/// [`Pool::set_failure_limit_callback`](super::Pool::set_failure_limit_callback), which has an example.
///
/// Node has no counterpart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailureAction {
    /// The slot stays empty until the next reload, or [`Pool::retry`](super::Pool::retry).
    GiveUp,
    /// The slot is filled again after this time, and its failures are counted anew.
    RetryAfter(Duration),
    /// The pool stops, as with [`Pool::stop`](super::Pool::stop).
    StopPool,
}

impl fmt::Display for FailureCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ForkFailed => "could not be forked",
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
