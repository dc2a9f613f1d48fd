//! Identifies the listeners and UDP sockets of a master.

use super::endpoint::Endpoint;
use super::ordered_set::Id;

/// Identifies one of the master's bound listeners or UDP sockets in frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HandleId(pub(crate) u32);

impl Id for HandleId {
    fn number(self) -> u32 {
        self.0
    }

    fn from_number(number: u32) -> Self {
        Self(number)
    }
}

/// Identifies what a worker listens on. Workers that send equal keys share a listener.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HandleKey {
    pub(crate) endpoint: Endpoint,
    /// The lowest index that no other listener of the worker on the same endpoint uses. On port 0,
    /// equal indexes get the same port in every worker, and different indexes get different ports.
    pub(crate) index: u32,
}
