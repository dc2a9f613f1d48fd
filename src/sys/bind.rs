//! Opens what an endpoint stands for, in the master or in a worker that keeps it to itself.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use crate::sys;
use crate::sys::listen::PortSharing;
use crate::sys::socket_file::{self, SocketFile};
use crate::types::endpoint::{BindFlags, Endpoint, Kind, Place};
use crate::types::errno;

/// A socket that listens, or is bound if it is for datagrams; it does not block.
#[derive(Debug)]
pub(crate) struct BoundSocket {
    /// Of a Unix path. It goes with the socket.
    pub(crate) file: Option<SocketFile>,
    pub(crate) socket: OwnedFd,
    /// With the real port; none for a Unix path.
    pub(crate) address: Option<SocketAddr>,
}

pub(crate) fn bind(
    endpoint: &Endpoint,
    flags: &BindFlags,
    sharing: PortSharing,
) -> io::Result<BoundSocket> {
    let mut file = None;
    let reuse_port = sharing != PortSharing::Exclusive;
    let socket = match (endpoint.kind, &endpoint.place) {
        (kind, Place::Fd(number)) => borrow(kind, *number, flags)?,
        (Kind::Udp, Place::Ip(address)) => sys::listen::bind_udp(address, flags, reuse_port)?,
        (Kind::Tcp, Place::Ip(address)) => sys::listen::listen_tcp(address, flags, sharing)?,
        (Kind::Tcp, Place::Port(port)) => {
            let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, *port));
            let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, *port));
            match sys::listen::listen_tcp(&both, flags, sharing) {
                Err(error) if sys::listen::lacks_family(&error) => {
                    sys::listen::listen_tcp(&v4, flags, sharing)?
                }
                outcome => outcome?,
            }
        }
        (Kind::Unix, Place::Path(path)) => {
            let (socket, own) = socket_file::listen(path, flags)?;
            file = Some(own);
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

/// A copy of a socket that this process has under this number.
fn borrow(kind: Kind, number: RawFd, flags: &BindFlags) -> io::Result<OwnedFd> {
    check_kind(kind, number)?;
    let socket = sys::fd::duplicate(number, 0)?;
    adopt(&socket, flags.backlog)?;
    Ok(socket)
}

/// Whether this is a socket of that kind.
fn check_kind(kind: Kind, number: RawFd) -> io::Result<()> {
    let found = sys::listen::kind_of(number)?;
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

/// Adopts a listener of this kind for workers. Returns what they ask for to get it: its address, or its
/// path.
pub(crate) fn adopt_as(kind: Kind, socket: &OwnedFd, backlog: u32) -> io::Result<Endpoint> {
    check_kind(kind, socket.as_raw_fd())?;
    // It may get its port here.
    adopt(socket, backlog)?;
    let place = match kind {
        Kind::Tcp | Kind::Udp => sys::listen::local_addr(socket).map(Place::Ip),
        Kind::Unix => {
            let address = UnixListener::from(socket.try_clone()?).local_addr()?;
            let path = address.as_pathname().map(socket_file::absolute);
            path.transpose()?.map(Place::Path)
        }
    };
    let nameless = || io::Error::new(io::ErrorKind::InvalidInput, "it has no address or path");
    Ok(Endpoint::new(kind, place.ok_or_else(nameless)?))
}

/// Makes a socket listen that is there already, if it is a stream and does not listen yet. Removes the SYN
/// filter that a master may have left on it which ended while it drained the listener.
pub(crate) fn adopt(socket: &OwnedFd, backlog: u32) -> io::Result<()> {
    let found = sys::listen::kind_of(socket.as_raw_fd())?;
    if found.is_stream && !found.listens {
        sys::listen::listen(socket, backlog)?;
    }
    if found.is_stream && !found.is_unix {
        sys::listen::detach_foreign_syn_filter(socket)?;
    }
    sys::fd::set_nonblocking(socket.as_fd(), true)
}
