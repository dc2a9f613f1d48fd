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
    /// The pool has begun to stop: [`Pool::stop`](super::Pool::stop) or a signal has requested it, or
    /// the pool gives up. Not emitted if the pool stops because a new master has taken over; see
    /// `Upgraded`.
    Stopping,
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
    /// A new worker failed or was not ready in time, or failed soon after it had replaced the old one
    /// (see [`Pool::reload`](super::Pool::reload)).
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
    /// The upgrade is impossible, because this master is itself a new master that has not taken over
    /// yet.
    TakeoverPending,
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
            Self::TakeoverPending => f.write_str("this master has not taken over yet"),
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
            Self::Stopping => f.write_str("stopping"),
            Self::TookOver => f.write_str("this master has taken over"),
            Self::Upgraded => f.write_str("a new master has taken over"),
            Self::NotificationFailed { reason } => f.write_str(reason),
            Self::UpgradeFailed { reason } => write!(f, "the new master failed: {reason}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::super::failure::FailureCause;
    use super::*;

    const OPERATING: &str = include_str!("../guide/operating.md");
    const QUICK_START: &str = include_str!("../guide/quick_start.md");

    /// Returns the lines of the first block after `text`, without comments, without the line that
    /// the example itself prints, and without the ellipsis.
    fn block_after<'a>(page: &'a str, text: &str) -> Vec<&'a str> {
        let (_, rest) = page.split_once(text).unwrap();
        let lines = rest.split("```").nth(1).unwrap().lines().skip(1);
        let lines = lines.map(|line| line.split('#').next().unwrap().trim_end());
        let is_event = |line: &&str| !line.starts_with("listening on ") && *line != "...";
        lines.filter(is_event).collect()
    }

    fn ready(slot: usize, worker: u32) -> PoolEvent {
        let worker = crate::worker_id(worker);
        PoolEvent::WorkerReady { slot, worker }
    }

    fn disconnecting(slot: usize, worker: u32) -> PoolEvent {
        let worker = crate::worker_id(worker);
        PoolEvent::WorkerDisconnecting { slot, worker }
    }

    fn shut_down(slot: usize, worker: u32, killed: bool) -> PoolEvent {
        PoolEvent::WorkerShutDown {
            slot,
            worker: crate::worker_id(worker),
            killed,
        }
    }

    fn failure(cause: FailureCause) -> WorkerFailure {
        WorkerFailure {
            slot: 0,
            worker: Some(crate::worker_id(1)),
            pid: Some(23749),
            generation: 0,
            cause,
            error: None,
            status: Some(ExitStatus::from_raw(9)),
            age: Duration::from_millis(1300),
            usage: None,
        }
    }

    #[test]
    fn guide_shows_the_lines_of_pool_events() {
        let (generation, exited) = (1, failure(FailureCause::Exited));
        let reload = [
            PoolEvent::Reloading { generation },
            ready(0, 3),
            disconnecting(0, 1),
            shut_down(0, 1, false),
            ready(1, 4),
            disconnecting(1, 2),
            shut_down(1, 2, false),
            PoolEvent::Reloaded { generation },
        ];
        let start = [ready(0, 1), ready(1, 2), PoolEvent::QuorumReached];
        let events = start.iter().chain(&reload).map(PoolEvent::to_string);
        let shown = block_after(QUICK_START, "The log shows what happened");
        assert_eq!(shown, events.collect::<Vec<_>>());

        let rest = [
            PoolEvent::WorkerFailed(exited),
            PoolEvent::QuorumLost,
            ready(0, 3),
            PoolEvent::QuorumReached,
            PoolEvent::Reloading { generation },
            ready(0, 4),
            disconnecting(0, 3),
            shut_down(0, 3, false),
            PoolEvent::Reloaded { generation },
            PoolEvent::TookOver,
            PoolEvent::Upgraded,
            shut_down(1, 2, true),
        ];
        let events = start.iter().chain(&rest).map(PoolEvent::to_string);
        let shown = block_after(OPERATING, "prints these lines");
        assert_eq!(shown, events.collect::<Vec<_>>());
    }

    /// Returns whether `line` has the form of a row, in which `…` stands for any text, and `N` and
    /// `M` stand for the numbers 0 and 1.
    fn has_form(line: &str, form: &str) -> bool {
        let form = form.replace(" N", " 0").replace(" M ", " 1 ");
        let (begin, end) = form.rsplit_once('…').unwrap_or((&form, &form));
        let mut parts = begin.split('…');
        let rest = line.strip_prefix(parts.next().unwrap_or_default());
        let rest =
            rest.and_then(|rest| parts.try_fold(rest, |rest, part| Some(rest.split_once(part)?.1)));
        rest.is_some() && line.ends_with(end)
    }

    #[test]
    fn guide_explains_lines_that_pool_events_have() {
        let not_forked = WorkerFailure {
            worker: None,
            error: Some("cannot execute".to_owned()),
            status: None,
            ..failure(FailureCause::ForkFailed)
        };
        let events = [
            PoolEvent::WorkerFailed(failure(FailureCause::ExitedBeforeReady)),
            PoolEvent::WorkerFailed(failure(FailureCause::StartupTimeout)),
            PoolEvent::WorkerFailed(failure(FailureCause::HeartbeatTimeout)),
            PoolEvent::WorkerFailed(not_forked),
            PoolEvent::FailureLimitReached { slot: 0 },
            PoolEvent::ReloadFailed {
                generation: 0,
                replaced: 1,
                reason: ReloadFailure::Cancelled,
            },
            PoolEvent::UpgradeFailed {
                reason: UpgradeFailure::Timeout,
            },
            PoolEvent::RecyclingPostponed {
                slot: 0,
                worker: crate::worker_id(1),
                limit: Limit::Memory,
                by: Duration::from_secs(1),
            },
        ];
        let (_, table) = OPERATING.split_once("| line | what to do |\n").unwrap();
        let rows = table
            .lines()
            .skip(1)
            .map_while(|line| line.strip_prefix("| `"));
        let forms: Vec<_> = rows.map(|row| row.split('`').next().unwrap()).collect();
        // The last row is about a line of `LogWriter`.
        assert_eq!(forms.len(), events.len() + 1);
        for (event, form) in events.iter().zip(forms) {
            let line = event.to_string();
            assert!(has_form(&line, form), "{line:?} is not {form:?}");
        }
    }
}
