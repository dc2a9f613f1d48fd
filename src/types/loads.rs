//! The load of workers and listeners.

use crate::types::address::Address;
use crate::types::worker_id::WorkerId;

/// The current load of all workers and listeners.
///
/// Reporting the load adds no cost per connection, because the values come from counters that the
/// master and the kernel keep anyway.
///
/// Node has no counterpart. See [`Master::loads`](crate::Master::loads) for an example.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loads {
    /// The workers whose `exit` event has not been delivered, sorted by id.
    pub workers: Vec<WorkerLoad>,
    /// The open listeners, in the order in which they were opened.
    pub listeners: Vec<ListenerLoad>,
}

/// The load of one worker, in connections that the master dispatched to the worker.
///
/// With a policy other than round robin, the workers accept connections themselves, and all
/// counters except `in_service` stay at 0.
///
/// Node has no counterpart. See [`Master::set_scheduler`](crate::Master::set_scheduler) for an
/// example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerLoad {
    /// The worker's id.
    pub worker: WorkerId,
    /// The connections dispatched to the worker since its fork.
    pub dispatched: u64,
    /// The connections in `dispatched` that the worker's application has received.
    pub received: u64,
    /// The connections in `received` that the worker's application has not closed. Connections from
    /// listeners that the worker has released do not count.
    ///
    /// The number is approximate, because the worker reports its open connections only from time to
    /// time. A worker that receives no more connections sends its next report when at most half of
    /// the last reported number are open.
    pub open: u64,
    /// The connections in `dispatched` that returned to the master because the worker had not
    /// received them.
    pub returned: u64,
    /// The connections that the worker's application has open at the moment, with any policy. Parked
    /// connections do not count, so the value is 0 while the application serves no client.
    ///
    /// The value is `None` before the worker has called [`init`](crate::init()), if its program
    /// does not use this crate, and outside Linux. The worker writes the number into memory that it
    /// shares with the master, so a faulty worker can write any number.
    pub in_service: Option<u64>,
}

impl WorkerLoad {
    pub(crate) fn new(worker: WorkerId) -> Self {
        Self {
            worker,
            dispatched: 0,
            received: 0,
            open: 0,
            returned: 0,
            in_service: None,
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.dispatched += other.dispatched;
        self.received += other.received;
        self.open += other.open;
        self.returned += other.returned;
    }

    /// Returns the number of connections that wait in the worker's queue.
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
    /// The listener's address.
    pub address: Address,
    /// The connections that the master has accepted, or 0 if the workers accept them.
    pub accepted: u64,
    /// The connections that wait in the kernel's backlog. Only Linux reports their number, and only
    /// for TCP ports. In all other cases, the value is `None`.
    pub queued: Option<u64>,
}
