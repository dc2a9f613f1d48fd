//! Opens the socket of an endpoint. A worker opens the socket itself if the application has
//! requested it with the option `exclusive` or `reuse_port`. Otherwise, the master does.
//!
//! This module only combines functions of other modules, mainly of `listen` and `socket_file`. It
//! makes no `libc` calls itself.

use std::ffi::OsString;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use crate::sys;
use crate::sys::listen::{Family, PortSharing};
use crate::sys::socket_file::{self, SocketFile};
use crate::types::endpoint::{
    BindAddress, BindFlags, Endpoint, Kind, abstract_name, abstract_path,
};
use crate::types::errno;

/// A listener, or a bound UDP socket. The socket is non-blocking.
#[derive(Debug)]
pub(crate) struct BoundSocket {
    /// The file of a Unix socket that was bound to a path.
    pub(crate) file: Option<SocketFile>,
    pub(crate) socket: OwnedFd,
    /// The local address with the actual port. `None` for a Unix socket, or if no descriptor was
    /// free for reading the address.
    pub(crate) address: Option<SocketAddr>,
}

/// Binds or duplicates the endpoint's socket, and makes a stream socket listen.
pub(crate) fn bind(
    endpoint: &Endpoint,
    flags: &BindFlags,
    sharing: PortSharing,
) -> io::Result<BoundSocket> {
    let mut file = None;
    let reuse_port = sharing != PortSharing::Exclusive;
    let socket = match (endpoint.kind, &endpoint.address) {
        (kind, BindAddress::Fd(number)) => duplicate(kind, *number, flags)?,
        (Kind::Udp, BindAddress::Ip(address)) => sys::listen::bind_udp(address, flags, reuse_port)?,
        (Kind::Tcp, BindAddress::Ip(address)) => sys::listen::listen_tcp(address, flags, sharing)?,
        (Kind::Tcp, BindAddress::Port(port)) => {
            let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, *port));
            let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, *port));
            match sys::listen::listen_tcp(&both, flags, sharing) {
                Err(error) if sys::listen::is_family_missing(&error) => {
                    sys::listen::listen_tcp(&v4, flags, sharing)?
                }
                outcome => outcome?,
            }
        }
        (Kind::Unix, BindAddress::Path(path)) => match abstract_name(path) {
            Some(name) => listen_abstract(name, flags)?,
            None => {
                let (socket, socket_file) = socket_file::listen(path.as_ref(), flags)?;
                file = Some(socket_file);
                socket
            }
        },
        (Kind::Unix, _) | (_, BindAddress::Path(_)) | (Kind::Udp, BindAddress::Port(_)) => {
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

/// Listens on an abstract Unix address (unix(7)). Such an address has no file.
fn listen_abstract(name: &[u8], flags: &BindFlags) -> io::Result<OwnedFd> {
    let listener = UnixListener::bind_addr(&sys::platform::socket::abstract_address(name)?)?;
    listener.set_nonblocking(true)?;
    let listener = OwnedFd::from(listener);
    sys::listen::listen(&listener, flags.backlog)?;
    Ok(listener)
}

/// Duplicates a socket that the application owns, and prepares the copy for accepting.
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
        Kind::Tcp => found.is_stream && found.family == Family::Internet,
        Kind::Unix => found.is_stream && found.family == Family::Unix,
        Kind::Udp => !found.is_stream && found.family == Family::Internet,
    };
    if !fits {
        return Err(io::Error::from_raw_os_error(errno::EINVAL));
    }
    Ok(())
}

/// Prepares a socket that the application passes to the master, and makes a stream socket listen.
/// Returns the endpoint by which workers request the socket: its address, path or abstract name.
pub(crate) fn adopt_socket(kind: Kind, socket: &OwnedFd, backlog: u32) -> io::Result<Endpoint> {
    check_kind(kind, socket.as_raw_fd())?;
    // Listen before reading the address, because listening on an unbound socket assigns its port.
    make_listen(socket, backlog)?;
    let address = match kind {
        Kind::Tcp | Kind::Udp => sys::listen::local_addr(socket).map(BindAddress::Ip),
        Kind::Unix => {
            let address = UnixListener::from(socket.try_clone()?).local_addr()?;
            let path = address.as_pathname().map(socket_file::absolute);
            let path = path.transpose()?.map(OsString::from);
            let name = || sys::platform::socket::abstract_name(&address).map(abstract_path);
            path.or_else(name).map(BindAddress::Path)
        }
    };
    let unbound = || {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            "the socket has no address or name",
        )
    };
    Ok(Endpoint::new(kind, address.ok_or_else(unbound)?))
}

/// Makes an open socket non-blocking, and makes a stream socket listen.
pub(crate) fn prepare(socket: &OwnedFd, backlog: u32) -> io::Result<()> {
    make_listen(socket, backlog)?;
    sys::fd::set_nonblocking(socket.as_fd(), true)
}

/// Makes a stream socket listen if it does not listen yet.
///
/// Also detaches the SYN filter from a TCP listener. Another master leaves this filter attached if
/// it exits while it drains the listener.
fn make_listen(socket: &OwnedFd, backlog: u32) -> io::Result<()> {
    let found = sys::listen::socket_kind(socket.as_raw_fd())?;
    if found.is_stream && !found.listens {
        sys::listen::listen(socket, backlog)?;
    }
    if found.is_stream && found.family == Family::Internet {
        sys::filter::detach_foreign_syn_filter(socket)?;
    }
    Ok(())
}
