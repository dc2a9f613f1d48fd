//! The ids of connections that the master holds.

/// Identifies a connection of which the master holds a copy while a worker serves the connection or
/// while the connection is parked. Numbers are reused, but no two connections have the same number
/// at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ConnectionId(pub(crate) u32);
