//! The state of a pool at one moment, as data, in several text formats, and over HTTP.
//!
//! | file | contains |
//! |---|---|
//! | `table`, `json`, `prometheus` | the text formats |
//! | `server` | the HTTP server in the master's loop, `Pool::serve_status` |
//! | `http` | the server's requests and answers, as pure functions |
//! | `address`, `socket` | the server's address and its listening socket |

mod address;
mod http;
mod json;
mod prometheus;
mod server;
mod socket;
mod table;

#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use cluster::{WorkerId, WorkerLoad};

use super::core::{Core, Slot, Time};
use super::failure::WorkerFailure;
pub use address::StatusAddress;
pub(super) use server::StatusServer;
pub(super) use socket::StatusSocket;

/// The state of a pool at one moment.
///
/// Node has no counterpart.
///
/// The `Display` output is a table for people. See [`Pool::status`](super::Pool::status) for an
/// example.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// The generation of the last complete reload, or 0 before the first one. During a reload, the
    /// value is the old generation.
    pub generation: u64,
    /// Whether at least [`PoolOptions::quorum`](super::PoolOptions::quorum) workers are ready and
    /// the pool is not stopping.
    pub is_ready: bool,
    /// Whether a reload has been requested or is in progress.
    pub is_reloading: bool,
    /// Whether the pool is stopping or has stopped. The
    /// [`stop_delay`](super::PoolOptions::stop_delay) is part of the stop.
    pub is_stopping: bool,
    /// Whether a new master has taken over from this pool.
    pub(super) is_upgraded: bool,
    /// The time until the [`stop_delay`](super::PoolOptions::stop_delay) ends, or `None` if no
    /// delay is in progress.
    pub stop_in: Option<Duration>,
    /// The time since the pool was created.
    pub age: Duration,
    /// The number of worker failures since the pool was created, including failed forks. Failures
    /// of a [`successor`](SlotStatus::successor) are not counted.
    pub failures: u64,
    /// The slots' states, in the order of the slot numbers.
    pub slots: Vec<SlotStatus>,
    /// The workers that are disconnecting and have not exited.
    pub disconnecting: Vec<WorkerStatus>,
}

/// The state of a slot and of its workers.
///
/// Node has no counterpart.
///
/// See [`Status`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SlotStatus {
    /// The number of the slot. The numbers begin at 0.
    pub slot: usize,
    /// The slot's current worker, or `None` if the slot is empty.
    pub worker: Option<WorkerStatus>,
    /// The new worker that will replace the current worker, or `None` if no replacement has been
    /// forked.
    pub successor: Option<WorkerStatus>,
    /// The number of times that the pool has forked, or tried to fork, a worker for the slot after
    /// a failure.
    pub restarts: u64,
    /// The time until a worker is forked for the slot, or `None` if the slot is not waiting for a
    /// new worker.
    pub restart_in: Option<Duration>,
    /// Whether the slot stays empty because it has reached its failure limit.
    pub is_given_up: bool,
    /// The most recent failure of a worker of the slot, or `None` if none has failed. Failures of a
    /// [`successor`](Self::successor) are not recorded here.
    pub last_failure: Option<WorkerFailure>,
}

/// The state of a worker.
///
/// Node has no counterpart.
///
/// See [`Status`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerStatus {
    /// The worker's id.
    pub worker: WorkerId,
    /// The worker's process id.
    pub pid: u32,
    /// The worker's generation.
    pub generation: u64,
    /// The worker's phase.
    pub phase: WorkerPhase,
    /// The time since the worker's fork.
    pub age: Duration,
    /// The number of connections that the worker has received from the master. The value is 0 if
    /// workers accept connections themselves.
    pub received: u64,
    /// The number of connections that the worker's application has open. With the policies in which
    /// workers accept connections themselves, the value is 0 if it is unknown (see
    /// [`WorkerLoad::in_service`]). With round robin, an unknown value is replaced by the approximate
    /// [`WorkerLoad::open`].
    pub open: u64,
    /// Whether the worker's application has a connection open, or `None` if this is unknown.
    pub is_busy: Option<bool>,
}

/// The phase of a worker between its fork and its exit. A worker passes through the phases in the
/// order of the variants, and may skip phases.
///
/// Node has no counterpart.
///
/// See [`WorkerStatus::phase`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WorkerPhase {
    /// The worker has not yet become ready, as defined by
    /// [`PoolOptions::readiness`](super::PoolOptions::readiness).
    Starting,
    /// The worker has become ready. A worker that missed a heartbeat deadline stays in this phase
    /// until its killed process exits.
    Ready,
    /// The pool has disconnected the worker, and the worker has not exited.
    Disconnecting,
}

impl WorkerPhase {
    const ALL: [Self; 3] = [Self::Starting, Self::Ready, Self::Disconnecting];

    fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Disconnecting => "disconnecting",
        }
    }
}

impl Status {
    pub(super) fn new(core: &Core, loads: &[WorkerLoad], now: Time) -> Self {
        let workers = core.workers().iter();
        let workers = workers.filter(|(_, worker)| worker.phase() == WorkerPhase::Disconnecting);
        let disconnecting = workers.filter_map(|(id, _)| WorkerStatus::new(core, loads, *id, now));
        let slots = core.slots().iter().enumerate();
        let slots = slots.map(|(number, slot)| SlotStatus::new(core, loads, number, slot, now));
        Self {
            generation: core.generation(),
            is_ready: core.has_quorum(),
            is_reloading: core.is_reloading(),
            is_stopping: core.is_stopping(),
            is_upgraded: core.is_upgraded(),
            stop_in: core.delayed_until().map(|at| at.saturating_sub(now)),
            age: now,
            failures: core.failures(),
            slots: slots.collect(),
            disconnecting: disconnecting.collect(),
        }
    }

    /// Returns the number of ready workers.
    ///
    /// Node has no counterpart.
    ///
    /// See [`Pool::status`](super::Pool::status) for an example.
    #[must_use]
    pub fn ready_workers(&self) -> usize {
        self.count(WorkerPhase::Ready)
    }

    fn count(&self, phase: WorkerPhase) -> usize {
        let workers = self.workers();
        workers.filter(|worker| worker.phase == phase).count()
    }

    /// Returns the workers of all slots, followed by the disconnecting workers.
    fn workers(&self) -> impl Iterator<Item = &WorkerStatus> {
        let slots = self.slots.iter();
        let workers = slots.flat_map(|slot| slot.worker.iter().chain(&slot.successor));
        workers.chain(&self.disconnecting)
    }

    /// Returns the status as one JSON object. Times are in seconds.
    ///
    /// Node has no counterpart.
    ///
    /// See [`Pool::status`](super::Pool::status) for an example.
    #[must_use]
    pub fn to_json(&self) -> String {
        json::render(self)
    }

    /// Returns the status in the text format of Prometheus. The metrics' names begin with
    /// `cluster_`.
    ///
    /// Node has no counterpart.
    ///
    /// See [`Pool::status`](super::Pool::status) for an example.
    #[must_use]
    pub fn to_prometheus(&self) -> String {
        prometheus::render(self)
    }
}

impl SlotStatus {
    fn new(core: &Core, loads: &[WorkerLoad], number: usize, slot: &Slot, now: Time) -> Self {
        let worker = |id: WorkerId| WorkerStatus::new(core, loads, id, now);
        Self {
            slot: number,
            worker: slot.worker().and_then(worker),
            successor: slot.successor.and_then(worker),
            restarts: slot.restarts,
            restart_in: slot.restart_at().map(|at| at.saturating_sub(now)),
            is_given_up: slot.is_given_up(),
            last_failure: slot.last_failure.clone(),
        }
    }
}

impl WorkerStatus {
    fn new(core: &Core, loads: &[WorkerLoad], id: WorkerId, now: Time) -> Option<Self> {
        let worker = core.workers().get(&id)?;
        let load = loads.iter().find(|load| load.worker == id);
        Some(Self {
            worker: id,
            pid: worker.pid,
            generation: worker.generation,
            phase: worker.phase(),
            age: now.saturating_sub(worker.forked_at),
            received: load.map_or(0, |load| load.received),
            open: load.map_or(0, |load| load.in_service.unwrap_or(load.open)),
            is_busy: load.and_then(|load| load.in_service).map(|count| count > 0),
        })
    }
}

/// A time whose `Display` output is in seconds, with three decimal places.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}", self.0.as_secs_f64())
    }
}
