//! Creates TCP listeners and UDP sockets, accepts connections, and reads the state of sockets.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::time::Duration;

use super::platform::socket::{self as platform, SOCK_CLOEXEC, SOCK_NONBLOCK};
use super::{check, filter, option, retry};
use crate::types::endpoint::BindFlags;

/// Creates a socket that is non-blocking and closed on exec.
pub(super) fn open(address: &SocketAddr, kind: libc::c_int) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    };
    // SAFETY: socket accesses no memory of this process.
    let number = check(unsafe { libc::socket(family, kind | SOCK_CLOEXEC | SOCK_NONBLOCK, 0) })?;
    // SAFETY: the kernel has just opened the descriptor for this call.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    if SOCK_CLOEXEC == 0 {
        super::fd::close_on_exec(number)?;
        super::fd::set_nonblocking(socket.as_fd(), true)?;
    }
    Ok(socket)
}

fn bind(socket: &OwnedFd, address: &SocketAddr, flags: &BindFlags) -> io::Result<()> {
    if address.is_ipv6() {
        // Set the option even if the flag is false, because the system's default may differ from
        // the application's choice.
        let only = libc::c_int::from(flags.ipv6_only);
        option::set(socket.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &only)?;
    }
    bind_address(socket, address)
}

fn bind_address(socket: &OwnedFd, address: &SocketAddr) -> io::Result<()> {
    match address {
        SocketAddr::V4(v4) => {
            // SAFETY: all zeroes is a valid `sockaddr_in`.
            let mut raw: libc::sockaddr_in = unsafe { std::mem::zeroed() };
            raw.sin_family = family(libc::AF_INET);
            raw.sin_port = v4.port().to_be();
            raw.sin_addr.s_addr = u32::from_ne_bytes(v4.ip().octets());
            bind_raw(socket, &raw)
        }
        SocketAddr::V6(v6) => {
            // SAFETY: all zeroes is a valid `sockaddr_in6`.
            let mut raw: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
            raw.sin6_family = family(libc::AF_INET6);
            raw.sin6_port = v6.port().to_be();
            raw.sin6_addr.s6_addr = v6.ip().octets();
            raw.sin6_flowinfo = v6.flowinfo();
            raw.sin6_scope_id = v6.scope_id();
            bind_raw(socket, &raw)
        }
    }
}

fn family(number: libc::c_int) -> libc::sa_family_t {
    libc::sa_family_t::try_from(number).unwrap_or(0)
}

/// Binds a socket. `T` is a C address type, such as `sockaddr_in`.
fn bind_raw<T>(socket: &OwnedFd, address: &T) -> io::Result<()> {
    // SAFETY: the pointer is valid for reads of the given length.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            std::ptr::from_ref(address).cast(),
            option::size_of_value(address),
        )
    })?;
    Ok(())
}

/// The way in which a TCP listener shares its port with other sockets of the same user
/// (`SO_REUSEPORT`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortSharing {
    /// No other socket may listen on the port.
    Exclusive,
    /// The listener joins the group of sockets on the port. If there is no group, the listener
    /// starts one.
    Join,
    /// The listener starts a new group. If another socket already listens on the port, listening
    /// fails, even if that socket shares the port.
    Create,
}

/// Creates a non-blocking TCP listener.
pub(crate) fn listen_tcp(
    address: &SocketAddr,
    flags: &BindFlags,
    sharing: PortSharing,
) -> io::Result<OwnedFd> {
    let socket = bind_tcp(address, flags, sharing)?;
    listen(&socket, flags.backlog)?;
    if sharing == PortSharing::Create {
        // Set the option only after listening, because listening without the option excludes other
        // groups. Later sockets can still join, because the kernel reads each listener's option
        // when they do.
        share_port(&socket)?;
    }
    Ok(socket)
}

fn bind_tcp(address: &SocketAddr, flags: &BindFlags, sharing: PortSharing) -> io::Result<OwnedFd> {
    let socket = open(address, libc::SOCK_STREAM)?;
    // Allow binding while the port still has connections in TIME_WAIT.
    option::set_int(socket.as_fd(), libc::SO_REUSEADDR, 1)?;
    if sharing == PortSharing::Join {
        share_port(&socket)?;
    }
    bind(&socket, address, flags)?;
    Ok(socket)
}

fn share_port(socket: &OwnedFd) -> io::Result<()> {
    option::set_int(socket.as_fd(), libc::SO_REUSEPORT, 1)
}

/// Creates a TCP listener that joins the group of sockets on its port. Makes the kernel select the
/// group's first socket for all new connections.
pub(crate) fn listen_as_selector(address: &SocketAddr, flags: &BindFlags) -> io::Result<OwnedFd> {
    let socket = bind_tcp(address, flags, PortSharing::Join)?;
    // The kernel attaches a selection program to a group only through a socket that listens. Until
    // then, the kernel may choose this socket, so the SYN filter drops new connections. Their
    // clients send the SYN again after a second, and are served by the first socket.
    filter::attach_syn_filter(&socket)?;
    listen(&socket, flags.backlog)?;
    filter::select_sockets(&socket, &[0])?;
    filter::detach_syn_filter(&socket)?;
    Ok(socket)
}

/// Makes a TCP listener listen again after it was shut down.
pub(crate) fn listen_again(socket: &OwnedFd, address: &SocketAddr, backlog: u32) -> io::Result<()> {
    clear_shutdown(socket)?;
    match bind_address(socket, address) {
        // `shutdown` unbinds the socket only if the kernel chose its port. Otherwise the socket is
        // still bound, and `bind` fails with EINVAL.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
        bound => bound?,
    }
    listen(socket, backlog)
}

/// Clears the shutdown flag that the kernel sets when `shutdown` is called a second time on a
/// listener. Connections that the socket accepts later would inherit the flag, so reading from them
/// would return end-of-file.
fn clear_shutdown(socket: &OwnedFd) -> io::Result<()> {
    // SAFETY: all zeroes is a valid `sockaddr`.
    let mut unspecified: libc::sockaddr = unsafe { std::mem::zeroed() };
    unspecified.sa_family = family(libc::AF_UNSPEC);
    let size = option::size_of_value(&unspecified);
    // SAFETY: the pointer is valid for reads of the given size.
    check(unsafe { libc::connect(socket.as_raw_fd(), &raw const unspecified, size) })?;
    Ok(())
}

/// Creates a non-blocking UDP socket and binds it to `address`.
pub(crate) fn bind_udp(
    address: &SocketAddr,
    flags: &BindFlags,
    reuse_port: bool,
) -> io::Result<OwnedFd> {
    let socket = open(address, libc::SOCK_DGRAM)?;
    if flags.reuse_addr {
        option::set_int(socket.as_fd(), libc::SO_REUSEADDR, 1)?;
    }
    if reuse_port {
        share_port(&socket)?;
    }
    bind(&socket, address, flags)?;
    Ok(socket)
}

/// Makes a bound socket listen, or changes its backlog limit.
pub(crate) fn listen(socket: &OwnedFd, backlog: u32) -> io::Result<()> {
    let backlog = libc::c_int::try_from(backlog).unwrap_or(libc::c_int::MAX);
    // SAFETY: listen accesses no memory of this process.
    check(unsafe { libc::listen(socket.as_raw_fd(), backlog) })?;
    Ok(())
}

/// The kind and state of a socket that the application names or passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SocketKind {
    /// Whether the socket is a stream socket (TCP or Unix) instead of a datagram socket.
    pub(crate) is_stream: bool,
    pub(crate) family: Family,
    pub(crate) listens: bool,
}

/// The address family of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4 or IPv6.
    Internet,
    Unix,
    /// A family that this crate cannot share, such as `AF_VSOCK` or `AF_NETLINK`.
    Other,
}

/// Returns a socket's kind, and whether the socket listens.
///
/// # Errors
///
/// Returns an error if the number is not an open stream or datagram socket.
pub(crate) fn socket_kind(number: RawFd) -> io::Result<SocketKind> {
    let is_stream = match option::get_int(number, libc::SO_TYPE)? {
        libc::SOCK_STREAM => true,
        libc::SOCK_DGRAM => false,
        _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
    };
    // SAFETY: all zeroes is a valid `sockaddr_storage`.
    let mut address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut size = option::size_of_value(&address);
    // SAFETY: both pointers are valid for writes, and `size` is the address's size.
    check(unsafe { libc::getsockname(number, (&raw mut address).cast(), &raw mut size) })?;
    let family = match libc::c_int::from(address.ss_family) {
        libc::AF_INET | libc::AF_INET6 => Family::Internet,
        libc::AF_UNIX => Family::Unix,
        _ => Family::Other,
    };
    Ok(SocketKind {
        is_stream,
        family,
        listens: option::get_int(number, libc::SO_ACCEPTCONN)? != 0,
    })
}

/// Returns the local address of a TCP or UDP socket. Returns `None` for any other socket, or if no
/// descriptor is free for a temporary copy.
pub(crate) fn local_addr(socket: &OwnedFd) -> Option<SocketAddr> {
    // Use `TcpListener` for both, because TCP and UDP sockets have the same address structure.
    TcpListener::from(socket.try_clone().ok()?)
        .local_addr()
        .ok()
}

/// Returns the number of connections in the backlog. Returns `None` if the system does not report
/// this number.
pub(crate) fn backlog_length(listener: &OwnedFd) -> Option<u64> {
    platform::backlog_length(listener)
}

/// Makes the kernel keep each new connection out of the backlog until its client has sent
/// something, for at most about `seconds`. With 0 seconds, new connections enter the backlog at
/// once. Does nothing if the socket is not a TCP listener, or if the system cannot do this.
pub(crate) fn defer_accept(listener: &OwnedFd, seconds: u32) {
    let seconds = libc::c_int::try_from(seconds).unwrap_or(libc::c_int::MAX);
    // Ignore the error. The worker then holds a silent client's connection from the start.
    let _ = platform::defer_accept(listener, seconds);
}

/// Accepts a connection, and makes it blocking and closed on exec.
pub(crate) fn accept(listener: &impl AsFd) -> io::Result<OwnedFd> {
    let number = listener.as_fd().as_raw_fd();
    retry(|| platform::accept(number))
}

/// Accepts a connection if the listener is ready, and otherwise fails with `WouldBlock`.
///
/// All copies of a descriptor share `O_NONBLOCK`, so another owner of the listener may have cleared
/// the flag. Therefore this function checks for a connection first. The call still waits if the
/// flag is cleared and another process accepts the connection after the check.
pub(crate) fn accept_if_ready(listener: &impl AsFd) -> io::Result<OwnedFd> {
    let [ready] = super::poll::wait_readable([listener.as_fd()], Some(Duration::ZERO))?;
    match ready {
        true => accept(listener),
        false => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// Returns whether a socket has something to receive: a connection, a datagram or an error. Also
/// returns `true` if the check itself fails.
pub(crate) fn has_input(socket: BorrowedFd<'_>) -> bool {
    let ready = super::poll::wait_readable([socket], Some(Duration::ZERO));
    !matches!(ready, Ok([false]))
}

/// Returns whether the error means that the machine has no addresses of the requested family.
pub(crate) fn is_family_missing(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    matches!(errno, Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

/// Returns whether an `accept` error means that the listener was shut down.
pub(crate) fn is_shutdown_error(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

/// Returns whether accepting or receiving failed because the descriptor is not, or no longer, a
/// suitable socket. Later calls then fail as well. Other errors are temporary, such as a lack of
/// descriptors or memory.
pub(crate) fn is_permanent_error(errno: i32) -> bool {
    matches!(errno, libc::EBADF | libc::EINVAL | libc::ENOTSOCK)
}

/// Returns whether a receive error on a UDP socket concerns only an earlier datagram, so that the
/// next call may succeed.
///
/// If the option `IP_RECVERR` (ip(7)) is set, an ICMP error for a datagram that the socket has sent
/// makes the next call fail.
pub(crate) fn is_datagram_error(error: &io::Error) -> bool {
    is_connection_error(error)
        || matches!(
            error.raw_os_error(),
            Some(libc::ECONNREFUSED | libc::EMSGSIZE)
        )
}

/// Returns whether an `accept` error concerns only one connection, so that the next call may
/// succeed.
///
/// The match contains `ECONNABORTED`, `EINTR`, and the pending network errors that accept(2) lists
/// for Linux, except `ENONET`, which other systems do not define.
pub(crate) fn is_connection_error(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::EINTR
                | libc::ENETDOWN
                | libc::EPROTO
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH
        )
    )
}

/// Shuts down a listener in all processes that have a copy. A Unix socket keeps its backlog, but a
/// TCP listener loses it.
pub(crate) fn shut_down(listener: &OwnedFd) {
    // Ignore errors, because some systems do not shut down listeners. On those systems, closing all
    // copies has to suffice.
    // SAFETY: shutdown accesses no memory of this process.
    unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RD) };
}
