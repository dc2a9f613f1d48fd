//! The load of workers and listeners.

use crate::types::address::Address;
use crate::types::worker_id::WorkerId;

/// The current load of all workers and listeners.
///
/// Taking it needs no counters beyond those that the master keeps anyway.
///
/// Node has no counterpart. See [`Master::loads`](crate::Master::loads) for an example.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loads {
    /// The workers that have been forked and have not exited, by id.
    pub workers: Vec<WorkerLoad>,
    /// The listeners, in the order in which workers first listened on them.
    pub listeners: Vec<ListenerLoad>,
}

/// The load of one worker, in connections that the master dispatched to it.
///
/// With a policy other than round robin the workers accept connections themselves, and all counters
/// stay at 0.
///
/// Node has no counterpart. See [`Master::set_scheduler`](crate::Master::set_scheduler) for an
/// example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerLoad {
    /// The id of the worker.
    pub worker: WorkerId,
    /// Connections that were dispatched to the worker since it was forked.
    pub dispatched: u64,
    /// The part of `dispatched` that its application has received.
    pub received: u64,
    /// The part of `received` that its application has not closed, for listeners that the worker has not
    /// released. While the worker receives no further connections, the number is updated when half of
    /// them have been closed.
    pub open: u64,
    /// The part of `dispatched` that the worker did not receive, and that was returned to the master.
    pub returned: u64,
}

impl WorkerLoad {
    pub(crate) fn new(worker: WorkerId) -> Self {
        Self {
            worker,
            dispatched: 0,
            received: 0,
            open: 0,
            returned: 0,
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.dispatched += other.dispatched;
        self.received += other.received;
        self.open += other.open;
        self.returned += other.returned;
    }

    /// Returns the number of connections that wait in the queue of the worker.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let queued: u64 = master.loads().workers.iter().map(|load| load.queued()).sum();
    /// # }
    /// ```
    #[must_use]
    pub fn queued(&self) -> u64 {
        self.dispatched - self.received - self.returned
    }
}

/// The load of one listener.
///
/// Node has no counterpart. See [`Master::loads`](crate::Master::loads) for an example.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListenerLoad {
    /// The address of the listener.
    pub address: Address,
    /// Connections that the master has accepted; 0 if the workers accept them.
    pub accepted: u64,
    /// Connections that wait in the backlog; `None` if the system does not report it: for listeners
    /// other than TCP ports, and on systems other than Linux.
    pub queued: Option<u64>,
}
