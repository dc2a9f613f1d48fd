//! The identity of a socket.

/// Identifies a socket among all open sockets of the system. All copies of a socket have the same
/// identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SocketId {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}
