//! Socket flags, `accept`, queue lengths and abstract addresses.

use std::io;
#[cfg(target_os = "android")]
use std::os::android::net::SocketAddrExt as _;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
#[cfg(target_os = "linux")]
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::SocketAddr;

use super::uapi::TcpInfo;
use crate::sys::{check, option};

pub(in crate::sys) use libc::{MSG_CMSG_CLOEXEC, MSG_NOSIGNAL, SOCK_CLOEXEC, SOCK_NONBLOCK};

/// The socket type of a hand-off queue. Sockets of this type keep messages separate and in order,
/// and report end-of-file.
pub(in crate::sys) const QUEUE_TYPE: libc::c_int = libc::SOCK_SEQPACKET;

/// The type of a control message with the sender's process descriptor. The kernel adds this message
/// if any process that shares the socket has asked for it.
pub(in crate::sys) const SCM_PIDFD: libc::c_int = 4;

/// Accepts a connection, and makes it blocking and closed on exec.
pub(in crate::sys) fn accept(listener: RawFd) -> io::Result<OwnedFd> {
    let (address, size) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: null pointers are allowed, and no address is written then.
    let accepted = check(unsafe { libc::accept4(listener, address, size, SOCK_CLOEXEC) })?;
    // SAFETY: the kernel has just opened the descriptor for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(accepted) })
}

/// Keeps the connections of a TCP listener out of its backlog until their clients have sent
/// something (`TCP_DEFER_ACCEPT` in tcp(7)), for about this number of seconds. With 0 seconds,
/// connections are no longer kept out.
pub(in crate::sys) fn defer_accept(listener: &OwnedFd, seconds: libc::c_int) -> io::Result<()> {
    let (level, name) = (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT);
    option::set(listener.as_fd(), level, name, &seconds)
}

/// Returns the number of connections in a TCP listener's backlog. Returns `None` if the listener
/// does not use TCP.
pub(in crate::sys) fn backlog_length(listener: &OwnedFd) -> Option<u64> {
    // SAFETY: every bit pattern is a valid `TcpInfo`.
    let info: io::Result<TcpInfo> =
        unsafe { option::get(listener.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO) };
    // For a listener, this field is the length of its accept queue.
    info.ok().map(|info| info.unacked.into())
}

/// Returns the number of bytes that can be read from a socket.
pub(in crate::sys) fn readable_bytes(socket: &OwnedFd) -> Option<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the pointer is valid for writes of a `c_int`.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut bytes) }).ok()?;
    u64::try_from(bytes).ok()
}

/// Removes the first message from a socket's error queue (`MSG_ERRQUEUE` in recvmsg(2)).
pub(in crate::sys) fn discard_socket_error(socket: RawFd) {
    let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
    // Ignore an error, because the call fails only if the queue is empty.
    // SAFETY: no bytes are written, because the buffer's length is 0.
    unsafe { libc::recv(socket, std::ptr::null_mut(), 0, flags) };
}

/// Returns an address's abstract name, without the zero byte at its beginning.
pub(in crate::sys) fn abstract_name(address: &SocketAddr) -> Option<&[u8]> {
    address.as_abstract_name()
}

pub(in crate::sys) fn abstract_address(name: &[u8]) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(name)
}
