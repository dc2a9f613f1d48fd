//! Socket flags, `accept`, queue lengths and abstract addresses.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::SocketAddr;

use super::system;
use crate::sys::{check, fd};

pub(in crate::sys) use system::{MSG_CMSG_CLOEXEC, MSG_NOSIGNAL, SOCK_CLOEXEC, SOCK_NONBLOCK};

/// The socket type of a hand-off queue. Unix datagrams are reliable and keep their order.
pub(in crate::sys) const QUEUE_TYPE: libc::c_int = libc::SOCK_DGRAM;

/// A placeholder, because no control message of these systems has a process descriptor.
pub(in crate::sys) const SCM_PIDFD: libc::c_int = libc::SCM_RIGHTS;

/// Accepts a connection, and makes it blocking and closed on exec. The flags are set explicitly,
/// because the system copies the listener's flags.
pub(in crate::sys) fn accept(listener: RawFd) -> io::Result<OwnedFd> {
    let number = check(system::accept(listener))?;
    // SAFETY: the kernel has just opened the descriptor for this call.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    fd::close_on_exec(socket.as_raw_fd())?;
    fd::set_nonblocking(socket.as_fd(), false)?;
    Ok(socket)
}

/// Does nothing, because these systems have no such option, or only as a loadable module.
pub(in crate::sys) fn defer_accept(_listener: &OwnedFd, _seconds: libc::c_int) -> io::Result<()> {
    Ok(())
}

/// Returns `None`, because the system does not report the backlog in a portable way.
pub(in crate::sys) fn backlog_length(_listener: &OwnedFd) -> Option<u64> {
    None
}

/// Returns `None`, because systems count the bytes of datagrams differently.
pub(in crate::sys) fn readable_bytes(_socket: &OwnedFd) -> Option<u64> {
    None
}

/// Does nothing, because sockets have no error queue on these systems.
pub(in crate::sys) fn discard_socket_error(_socket: RawFd) {}

/// Returns `None`, because these systems have no abstract names.
pub(in crate::sys) fn abstract_name(_address: &SocketAddr) -> Option<&[u8]> {
    None
}

pub(in crate::sys) fn abstract_address(_name: &[u8]) -> io::Result<SocketAddr> {
    Err(io::ErrorKind::Unsupported.into())
}
