//! Opens the socket of an endpoint, in the master or, for an exclusive endpoint, in a worker.
//!
//! This module chooses among the calls of `listen` and `socket_file`; it makes none itself.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use crate::sys;
use crate::sys::listen::PortSharing;
use crate::sys::socket_file::{self, SocketFile};
use crate::types::endpoint::{BindFlags, Endpoint, Kind, Place};
use crate::types::errno;

/// A socket that listens, or a UDP socket that is bound. It does not block.
#[derive(Debug)]
pub(crate) struct BoundSocket {
    /// The file of a Unix socket, which is removed with the socket.
    pub(crate) file: Option<SocketFile>,
    pub(crate) socket: OwnedFd,
    /// The address with its actual port; `None` for a Unix path.
    pub(crate) address: Option<SocketAddr>,
}

/// Opens the socket of an endpoint.
pub(crate) fn bind(
    endpoint: &Endpoint,
    flags: &BindFlags,
    sharing: PortSharing,
) -> io::Result<BoundSocket> {
    let mut file = None;
    let reuse_port = sharing != PortSharing::Exclusive;
    let socket = match (endpoint.kind, &endpoint.place) {
        (kind, Place::Fd(number)) => duplicate(kind, *number, flags)?,
        (Kind::Udp, Place::Ip(address)) => sys::listen::bind_udp(address, flags, reuse_port)?,
        (Kind::Tcp, Place::Ip(address)) => sys::listen::listen_tcp(address, flags, sharing)?,
        (Kind::Tcp, Place::Port(port)) => {
            let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, *port));
            let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, *port));
            match sys::listen::listen_tcp(&both, flags, sharing) {
                Err(error) if sys::listen::is_family_missing(&error) => {
                    sys::listen::listen_tcp(&v4, flags, sharing)?
                }
                outcome => outcome?,
            }
        }
        (Kind::Unix, Place::Path(path)) => {
            let (socket, socket_file) = socket_file::listen(path, flags)?;
            file = Some(socket_file);
            socket
        }
        (Kind::Unix, _) | (_, Place::Path(_)) | (Kind::Udp, Place::Port(_)) => {
            return Err(io::Error::from_raw_os_error(errno::EINVAL));
        }
    };
    let address = sys::listen::local_addr(&socket);
    Ok(BoundSocket {
        file,
        socket,
        address,
    })
}

/// Duplicates a socket that the application owns, and prepares it for accepting.
fn duplicate(kind: Kind, number: RawFd, flags: &BindFlags) -> io::Result<OwnedFd> {
    check_kind(kind, number)?;
    let socket = sys::fd::duplicate(number, 0)?;
    prepare(&socket, flags.backlog)?;
    Ok(socket)
}

/// Returns an error unless the descriptor is a socket of this kind.
fn check_kind(kind: Kind, number: RawFd) -> io::Result<()> {
    let found = sys::listen::socket_kind(number)?;
    let fits = match kind {
        Kind::Tcp => found.is_stream && !found.is_unix,
        Kind::Unix => found.is_stream && found.is_unix,
        Kind::Udp => !found.is_stream && !found.is_unix,
    };
    if !fits {
        return Err(io::Error::from_raw_os_error(errno::EINVAL));
    }
    Ok(())
}

/// Prepares a socket that the application passes to the master. Returns the endpoint by which workers
/// request it: its address or path.
pub(crate) fn adopt_socket(kind: Kind, socket: &OwnedFd, backlog: u32) -> io::Result<Endpoint> {
    check_kind(kind, socket.as_raw_fd())?;
    // Listening on an unbound socket assigns its port.
    prepare(socket, backlog)?;
    let place = match kind {
        Kind::Tcp | Kind::Udp => sys::listen::local_addr(socket).map(Place::Ip),
        Kind::Unix => {
            let address = UnixListener::from(socket.try_clone()?).local_addr()?;
            let path = address.as_pathname().map(socket_file::absolute);
            path.transpose()?.map(Place::Path)
        }
    };
    let unbound = || {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            "the socket has no address or path",
        )
    };
    Ok(Endpoint::new(kind, place.ok_or_else(unbound)?))
}

/// Prepares an open socket for accepting without blocking. A stream socket listens afterwards.
///
/// If another master exited while it drained this listener, its SYN filter may still be attached; it is
/// detached here.
pub(crate) fn prepare(socket: &OwnedFd, backlog: u32) -> io::Result<()> {
    let found = sys::listen::socket_kind(socket.as_raw_fd())?;
    if found.is_stream && !found.listens {
        sys::listen::listen(socket, backlog)?;
    }
    if found.is_stream && !found.is_unix {
        sys::filter::detach_foreign_syn_filter(socket)?;
    }
    sys::fd::set_nonblocking(socket.as_fd(), true)
}
