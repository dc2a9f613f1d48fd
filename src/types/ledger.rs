//! Where every accepted connection went.

/// Counts what became of the connections that the master accepted.
///
/// Every accepted connection is in exactly one place, so that
/// `accepted == taken + closed_by_peer + dropped + in_hand()` holds whenever the program looks.
/// Only round robin hands connections over; with [`SchedulingPolicy::Shared`] and
/// [`SchedulingPolicy::Sharded`] workers accept for themselves and these counters stay at 0.
///
/// Node has no counterpart. See [`Master::ledger`] for an example.
///
/// [`SchedulingPolicy::Shared`]: crate::SchedulingPolicy::Shared
/// [`SchedulingPolicy::Sharded`]: crate::SchedulingPolicy::Sharded
/// [`Master::ledger`]: crate::Master::ledger
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ledger {
    /// Connections that the master accepted, since it started.
    pub accepted: u64,
    /// Connections that a worker's program received.
    pub taken: u64,
    /// Connections whose client left while they waited for another worker after theirs had died.
    pub closed_by_peer: u64,
    /// Connections that the master closed because no worker was left to take them.
    pub dropped: u64,
}

impl Ledger {
    /// Returns how many connections are accepted and not yet in a program's hands: waiting in the
    /// master, or on their way to a worker.
    ///
    /// Node has no counterpart. See [`Master::ledger`](crate::Master::ledger) for an example.
    #[must_use]
    pub fn in_hand(&self) -> u64 {
        self.accepted - self.taken - self.closed_by_peer - self.dropped
    }
}
