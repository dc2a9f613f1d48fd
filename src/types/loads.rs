//! How busy workers and listeners are.

use crate::types::address::Address;
use crate::types::worker_id::WorkerId;

/// How busy all are at this moment. Nothing is counted for it that would not be counted without.
///
/// Node has no counterpart. It comes from [`Master::loads`](crate::Master::loads), which has an
/// example.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loads {
    /// The workers that have been forked and have not exited, by id.
    pub workers: Vec<WorkerLoad>,
    /// What workers listen on, in the order in which it was first asked for.
    pub listeners: Vec<ListenerLoad>,
}

/// What one worker has of the connections that the master hands over. Of those that workers accept
/// for themselves, with another policy than round robin, the master knows nothing: all is 0 then.
///
/// Node has no counterpart. See [`Master::set_scheduler`](crate::Master::set_scheduler) for an
/// example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerLoad {
    /// Which worker.
    pub worker: WorkerId,
    /// Connections that it has been given, since it was forked.
    pub given: u64,
    /// Of these, the ones that its program has received.
    pub taken: u64,
    /// Of these, the ones that its program still has, of listeners that it has not left. What it
    /// closes while it has nothing to take is known when half of them are gone.
    pub open: u64,
    /// Connections that it has been given and not taken, and that others got.
    pub refused: u64,
}

impl WorkerLoad {
    pub(crate) fn new(worker: WorkerId) -> Self {
        Self {
            worker,
            given: 0,
            taken: 0,
            open: 0,
            refused: 0,
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.given += other.given;
        self.taken += other.taken;
        self.open += other.open;
        self.refused += other.refused;
    }

    /// Returns how many connections wait for the worker to take them.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let waiting: u64 = master.loads().workers.iter().map(|load| load.waiting()).sum();
    /// # }
    /// ```
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.given - self.taken - self.refused
    }
}

/// How busy one listener is.
///
/// Node has no counterpart. See [`Master::loads`](crate::Master::loads) for an example.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListenerLoad {
    /// What is listened on.
    pub address: Address,
    /// Connections that the master has accepted; 0 where workers accept for themselves.
    pub accepted: u64,
    /// Connections that wait in the kernel's queue to be accepted; `None` where the system does not
    /// tell: for other listeners than TCP ports, and outside Linux.
    pub queued: Option<u64>,
}
