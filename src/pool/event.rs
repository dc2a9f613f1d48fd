//! The events that a pool reports.

use std::fmt;
use std::process::ExitStatus;
use std::time::Duration;

use cluster::WorkerId;

use super::failure::WorkerFailure;

/// An event of a pool, for [`Pool::on_event`](super::Pool::on_event). See `on_event` for an
/// example.
///
/// Node has no counterpart.
///
/// The `Display` output is one line for a log.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PoolEvent {
    /// A worker has become ready.
    #[non_exhaustive]
    WorkerReady {
        /// The worker's slot.
        slot: usize,
        /// The worker's id.
        worker: WorkerId,
    },
    /// A worker exited although the pool had not disconnected it, was killed because it missed its
    /// start-up or heartbeat deadline, or could not be forked. If the worker had not yet taken its
    /// predecessor's place in the slot, `ReloadFailed` or `RecyclingFailed` is emitted instead.
    WorkerFailed(WorkerFailure),
    /// The pool has requested that a worker disconnect. In the worker,
    /// [`Worker::is_disconnecting`](cluster::Worker::is_disconnecting) is true from now on, unless
    /// the pool has sent the
    /// [`PoolOptions::disconnect_signal`](super::PoolOptions::disconnect_signal) instead.
    #[non_exhaustive]
    WorkerDisconnecting {
        /// The worker's slot.
        slot: usize,
        /// The worker's id.
        worker: WorkerId,
    },
    /// A worker has exited that the pool had disconnected, or had killed during a stop.
    #[non_exhaustive]
    WorkerShutDown {
        /// The worker's slot.
        slot: usize,
        /// The worker's id.
        worker: WorkerId,
        /// Whether the pool killed the worker, for example because the worker took longer to exit
        /// than [`PoolOptions::drain_timeout`](super::PoolOptions::drain_timeout).
        killed: bool,
    },
    /// A worker has reached a limit. The pool is forking a replacement.
    #[non_exhaustive]
    Recycling {
        /// The worker's slot.
        slot: usize,
        /// The id of the worker that is being replaced.
        worker: WorkerId,
        /// The limit that the worker has reached.
        limit: Limit,
    },
    /// A worker and its predecessor have reached the memory limit soon after their forks. The pool
    /// replaces the worker later, because a new worker would soon reach the limit too. This event
    /// is emitted at most once for each worker. See
    /// [`PoolOptions::max_memory`](super::PoolOptions::max_memory).
    #[non_exhaustive]
    RecyclingPostponed {
        /// The worker's slot.
        slot: usize,
        /// The worker's id.
        worker: WorkerId,
        /// The limit that the worker has reached.
        limit: Limit,
        /// How long after this event the pool replaces the worker, if its memory is still at the
        /// limit then.
        by: Duration,
    },
    /// A worker has reached a limit, but its replacement has failed. The old worker stays.
    RecyclingFailed(WorkerFailure),
    /// More workers of a slot have failed within
    /// [`PoolOptions::failure_window`](super::PoolOptions::failure_window) than
    /// [`PoolOptions::max_failures`](super::PoolOptions::max_failures) allows.
    #[non_exhaustive]
    FailureLimitReached {
        /// The number of the slot.
        slot: usize,
    },
    /// A reload has begun.
    #[non_exhaustive]
    Reloading {
        /// The new workers' generation. A pool's first generation is 0.
        generation: u64,
    },
    /// A reload has succeeded.
    #[non_exhaustive]
    Reloaded {
        /// The generation to which all workers now belong.
        generation: u64,
    },
    /// A reload has failed. Old workers that had not been replaced stay.
    #[non_exhaustive]
    ReloadFailed {
        /// The generation that failed.
        generation: u64,
        /// The number of workers that had been replaced. The replacements stay.
        replaced: usize,
        /// The reason for the failure.
        reason: ReloadFailure,
    },
    /// The pool has become ready, because [`PoolOptions::quorum`](super::PoolOptions::quorum)
    /// workers are ready.
    QuorumReached,
    /// The pool is no longer ready, because fewer than
    /// [`PoolOptions::quorum`](super::PoolOptions::quorum) workers are ready or the pool is
    /// stopping.
    QuorumLost,
    /// This master has taken over from the old master. The old master's pool stops.
    TookOver,
    /// A new master has taken over. This pool stops.
    Upgraded,
    /// systemd could not be notified ([`Pool::notify_systemd`](super::Pool::notify_systemd)). The
    /// pool continues. If consecutive notifications fail, only the first failure is reported.
    #[non_exhaustive]
    NotificationFailed {
        /// The text of the error.
        reason: String,
    },
    /// An upgrade has failed. This pool continues unless it is stopping.
    #[non_exhaustive]
    UpgradeFailed {
        /// The reason for the failure.
        reason: UpgradeFailure,
    },
}

/// A limit at which a worker is replaced.
///
/// Node has no counterpart.
///
/// See [`PoolEvent::Recycling`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Limit {
    /// The maximum age, [`PoolOptions::max_age`](super::PoolOptions::max_age).
    Age,
    /// The maximum number of connections,
    /// [`PoolOptions::max_connections`](super::PoolOptions::max_connections).
    Connections,
    /// The maximum memory, [`PoolOptions::max_memory`](super::PoolOptions::max_memory).
    Memory,
}

/// The reason why a reload failed.
///
/// Node has no counterpart.
///
/// See [`PoolEvent::ReloadFailed`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReloadFailure {
    /// A new worker failed or was not ready in time.
    WorkerFailed(WorkerFailure),
    /// The application called [`Pool::cancel_reload`](super::Pool::cancel_reload).
    Cancelled,
}

/// The reason why an upgrade failed.
///
/// Node has no counterpart.
///
/// See [`PoolEvent::UpgradeFailed`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UpgradeFailure {
    /// The new master could not be started. Only upgrades that were requested by a signal report
    /// this failure as an event. The text is the error returned by
    /// [`Pool::upgrade`](super::Pool::upgrade).
    NotStarted(String),
    /// The upgrade is impossible, because this process has the process id 1
    /// ([`Error::InitProcess`](cluster::Error::InitProcess)). Only upgrades that were requested by
    /// a signal report this failure as an event.
    InitProcess,
    /// The new master exited before taking over.
    Exited(ExitStatus),
    /// The new master did not take over in time.
    Timeout,
    /// The pool was stopped before the new master took over.
    PoolStopped,
}

impl std::error::Error for ReloadFailure {}

impl std::error::Error for UpgradeFailure {}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Age => "age",
            Self::Connections => "connections",
            Self::Memory => "memory",
        })
    }
}

impl fmt::Display for ReloadFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WorkerFailed(failure) => failure.fmt(f),
            Self::Cancelled => f.write_str("cancelled"),
        }
    }
}

impl fmt::Display for UpgradeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotStarted(error) => f.write_str(error),
            Self::InitProcess => cluster::Error::InitProcess.fmt(f),
            Self::Exited(status) => status.fmt(f),
            Self::Timeout => f.write_str("not ready in time"),
            Self::PoolStopped => f.write_str("the pool is stopping"),
        }
    }
}

impl fmt::Display for PoolEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WorkerReady { slot, worker } => {
                write!(f, "slot {slot}: worker {worker} is ready")
            }
            Self::WorkerFailed(failure) => failure.fmt(f),
            Self::WorkerDisconnecting { slot, worker } => {
                write!(f, "slot {slot}: worker {worker} is disconnecting")
            }
            Self::WorkerShutDown {
                slot,
                worker,
                killed,
            } => {
                let outcome = if *killed { "was killed" } else { "has exited" };
                write!(f, "slot {slot}: worker {worker} {outcome}")
            }
            Self::Recycling {
                slot,
                worker,
                limit,
            } => write!(
                f,
                "slot {slot}: worker {worker} is being replaced ({limit})"
            ),
            Self::RecyclingPostponed {
                slot,
                worker,
                limit,
                by,
            } => write!(
                f,
                "slot {slot}: worker {worker} has reached its limit ({limit}) soon after its start \
                 and is replaced in {:.1} s",
                by.as_secs_f64()
            ),
            Self::RecyclingFailed(failure) => write!(f, "replacement failed: {failure}"),
            Self::FailureLimitReached { slot } => write!(f, "slot {slot}: too many failures"),
            Self::Reloading { generation } => write!(f, "reloading to generation {generation}"),
            Self::Reloaded { generation } => write!(f, "generation {generation} serves"),
            Self::ReloadFailed {
                generation,
                replaced,
                reason,
            } => write!(
                f,
                "generation {generation} failed after {replaced} replaced: {reason}"
            ),
            Self::QuorumReached => f.write_str("ready"),
            Self::QuorumLost => f.write_str("not ready"),
            Self::TookOver => f.write_str("this master has taken over"),
            Self::Upgraded => f.write_str("a new master has taken over"),
            Self::NotificationFailed { reason } => f.write_str(reason),
            Self::UpgradeFailed { reason } => write!(f, "the new master failed: {reason}"),
        }
    }
}
