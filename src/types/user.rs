//! The users of workers, and the connections that their workers have parked.

/// The user and the group with which the master starts a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// The history of a connection that the master holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ParkHistory {
    /// The number of times that the connection has been parked.
    pub(crate) times: u32,
    /// The user of the worker that parked the connection last, or that held it until its client sent
    /// something. Only workers of this user may receive the connection, because that worker may have
    /// kept a copy, with which it could read or write what a later worker exchanges with the client.
    /// `None` if only masters have had the connection.
    pub(crate) by: Option<User>,
}
