//! The outcomes of all accepted connections.

/// Counts of the outcomes of all connections that the master accepted, that workers parked, or that
/// another master passed to this one.
///
/// Every time the master gets a connection, the connection either has exactly one outcome or is
/// still in flight. The master gets a connection when it accepts the connection, each time a worker
/// [parks](crate::Connection::park) it, and when another master
/// [passes](crate::Master::receive_parked) it. Therefore `accepted + parked == received +
/// closed_by_peer + expired + idle_closed + passed + dropped + in_flight()` holds at all times.
///
/// The master accepts connections only with round robin. With [`SchedulingPolicy::Shared`] and
/// [`SchedulingPolicy::Sharded`], the workers accept connections, and the counters do not include
/// these connections, with two exceptions:
///
/// - A worker that disconnects gives the connections that it holds to the master: parked ones, and
///   new ones whose clients have sent nothing. Each counts as parked, and then as received when the
///   master has sent it to another worker, or as passed in an upgrade. The new master counts a
///   passed connection as parked and then as received, too.
/// - If a worker has detached the selection of a sharded listener's shards, a connection may reach
///   no worker. The master then resets it, and counts it as accepted and as dropped.
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
    /// The number of times that workers have parked a connection in the master, plus the number of
    /// connections that another master has passed to this one.
    pub parked: u64,
    /// The number of times that the client of a parked connection has sent something, after which
    /// the connection goes to a worker again. This does not count as an outcome.
    pub resumed: u64,
    /// Connections that a worker's application received. A connection that is received several
    /// times counts each time.
    pub received: u64,
    /// Connections whose client hung up before a worker received the connection, or while the
    /// connection was parked.
    pub closed_by_peer: u64,
    /// Idle connections that were closed because their client was silent for longer than
    /// [`ListenOptions::idle_timeout`](crate::ListenOptions::idle_timeout) or, before its first
    /// data, [`ListenOptions::first_data_timeout`](crate::ListenOptions::first_data_timeout).
    pub expired: u64,
    /// Idle connections that were closed early: because the master held too many, because their
    /// listener closed, because only workers of other users serve it, or because the system could
    /// not watch them. The number includes connections that another master passed and that this
    /// master could not hold.
    pub idle_closed: u64,
    /// Connections that went to the master that takes over from this one
    /// ([`Master::pass_parked`](crate::Master::pass_parked)).
    pub passed: u64,
    /// Connections that were closed because no worker could serve them.
    pub dropped: u64,
}

impl Ledger {
    /// Returns the number of connections that have no outcome yet, because they are idle in the
    /// master, or wait in the master or in a worker's queue.
    ///
    /// Node has no counterpart. See [`Master::ledger`](crate::Master::ledger) for an example.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        let gone = self.received + self.closed_by_peer + self.expired + self.passed;
        self.accepted + self.parked - gone - self.idle_closed - self.dropped
    }
}
