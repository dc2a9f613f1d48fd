//! The outcomes of all accepted connections.

/// Counts of the outcomes of all connections that the master accepted.
///
/// Every accepted connection either has exactly one outcome or is still in flight. Therefore
/// `accepted == received + closed_by_peer + dropped + in_flight()` holds at all times.
///
/// The master accepts connections only with round robin. With [`SchedulingPolicy::Shared`] and
/// [`SchedulingPolicy::Sharded`], the workers accept connections, and the counters do not include
/// these connections. If a connection to a sharded listener reaches no worker and is reset, the
/// connection counts as accepted and as dropped.
///
/// Node has no counterpart. See [`Master::ledger`] for an example.
///
/// [`SchedulingPolicy::Shared`]: crate::SchedulingPolicy::Shared
/// [`SchedulingPolicy::Sharded`]: crate::SchedulingPolicy::Sharded
/// [`Master::ledger`]: crate::Master::ledger
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ledger {
    /// Connections that the master has accepted since the master started.
    pub accepted: u64,
    /// Connections that a worker's application received.
    pub received: u64,
    /// Connections whose client hung up before a worker received the connection.
    pub closed_by_peer: u64,
    /// Connections that were closed because no worker could serve them.
    pub dropped: u64,
}

impl Ledger {
    /// Returns the number of connections that have no outcome yet, because they wait in the master
    /// or in a worker's queue.
    ///
    /// Node has no counterpart. See [`Master::ledger`](crate::Master::ledger) for an example.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.accepted - self.received - self.closed_by_peer - self.dropped
    }
}
