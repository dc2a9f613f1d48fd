//! The address of a listener, as the `listening` event reports it.

use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use crate::types::endpoint::{BindAddress, Endpoint, Kind, fmt_path};

/// The address that a worker listens on.
///
/// Node: the argument `address` of the `listening` event, and its `addressType`.
///
/// An address prints as `127.0.0.1:8000` or `[::1]:8000`. If the worker gave a TCP port without a
/// host, the address prints as `*:8000`. A Unix socket prints as its path, or as `descriptor 3` if
/// the worker requested the socket by its descriptor. An abstract Unix socket prints as `@name`.
///
/// ```no_run
/// # fn f(master: &cluster::Master) {
/// let log = cluster::LogWriter::stderr().attached_to(master);
/// master.on_listening(move |_, worker, address| {
///     log.line(format_args!("worker {}: {address}, port {:?}", worker.id(), address.port()));
/// });
/// # }
/// ```
#[doc(alias = "addressType")]
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// A TCP port on the IP address that the worker gave.
    ///
    /// Node: `addressType` 4 or 6.
    Tcp(SocketAddr),
    /// A TCP port on all addresses, because the worker gave no host. The value is the address that
    /// the system bound: `[::]`, or `0.0.0.0` on a machine without IPv6.
    ///
    /// Node: `addressType` 4 or 6, and `address` is `null`.
    TcpPort(SocketAddr),
    /// A UDP port.
    ///
    /// Node: `addressType` `'udp4'` or `'udp6'`.
    Udp(SocketAddr),
    /// A Unix socket. The path of an abstract socket begins with a zero byte.
    ///
    /// Node: `addressType` -1.
    Unix(PathBuf),
    /// A descriptor of the master, which the worker requested by its number.
    ///
    /// Node: `fd`.
    #[non_exhaustive]
    Fd {
        /// The descriptor's number in the master.
        number: RawFd,
        /// Whether the descriptor is a UDP socket and not a listener.
        is_udp: bool,
        /// The address that the descriptor is bound to. `None` for a Unix socket.
        address: Option<SocketAddr>,
    },
}

impl Address {
    /// Creates the address from the endpoint that the worker requested and the address to which the
    /// system bound the socket. `bound` is `None` for a Unix socket.
    pub(crate) fn new(requested: &Endpoint, bound: Option<SocketAddr>) -> Self {
        let is_udp = requested.kind == Kind::Udp;
        match &requested.address {
            BindAddress::Port(port) => {
                let bound = bound.unwrap_or((Ipv6Addr::UNSPECIFIED, *port).into());
                if is_udp {
                    Self::Udp(bound)
                } else {
                    Self::TcpPort(bound)
                }
            }
            BindAddress::Ip(address) => {
                let mut address = *address;
                if let Some(bound) = bound {
                    address.set_port(bound.port());
                }
                if is_udp {
                    Self::Udp(address)
                } else {
                    Self::Tcp(address)
                }
            }
            BindAddress::Path(path) => Self::Unix(path.into()),
            BindAddress::Fd(number) => Self::Fd {
                number: *number,
                is_udp,
                address: bound,
            },
        }
    }

    /// Returns the port, from 1 to 65535, or `None` for a Unix socket. If the worker requested port
    /// 0, the result is the port that the system chose.
    ///
    /// Node: `address.port`.
    ///
    /// See [`Address`] for an example.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        self.socket_addr().map(|address| address.port())
    }

    /// Returns the IP address and port, or `None` for a Unix socket.
    ///
    /// Node: `address.address` and `address.port`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let log = cluster::LogWriter::stderr().attached_to(master);
    /// master.on_listening(move |_, _, address| {
    ///     if let Some(address) = address.socket_addr() {
    ///         log.line(format_args!("bound to {}", address.ip()));
    ///     }
    /// });
    /// # }
    /// ```
    #[must_use]
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(address) | Self::TcpPort(address) | Self::Udp(address) => Some(*address),
            Self::Fd { address, .. } => *address,
            Self::Unix(_) => None,
        }
    }

    /// Returns the path of a Unix socket. Returns `None` for all other sockets, and if the worker
    /// requested the Unix socket by its descriptor.
    ///
    /// Node: `address.address` of a path.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let log = cluster::LogWriter::stderr().attached_to(master);
    /// master.on_listening(move |_, _, address| {
    ///     if let Some(path) = address.path() {
    ///         log.line(format_args!("connect to {}", path.display()));
    ///     }
    /// });
    /// # }
    /// ```
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Tcp(_) | Self::TcpPort(_) | Self::Udp(_) | Self::Fd { .. } => None,
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TcpPort(address) => write!(f, "*:{}", address.port()),
            Self::Tcp(address)
            | Self::Udp(address)
            | Self::Fd {
                address: Some(address),
                ..
            } => address.fmt(f),
            Self::Unix(path) => fmt_path(path.as_os_str(), f),
            Self::Fd { number, .. } => write!(f, "descriptor {number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bound(kind: Kind, address: BindAddress, bound: Option<&str>) -> Address {
        let bound = bound.map(|bound| bound.parse().unwrap());
        Address::new(&Endpoint::new(kind, address), bound)
    }

    #[test]
    fn address_prints_as_it_was_requested() {
        for text in ["127.0.0.1:80", "[::1]:8000"] {
            let address = BindAddress::Ip(text.parse().unwrap());
            assert_eq!(bound(Kind::Tcp, address, Some(text)).to_string(), text);
        }
        let port = bound(Kind::Tcp, BindAddress::Port(0), Some("[::]:80"));
        assert_eq!(port.to_string(), "*:80");
        assert_eq!(port, Address::TcpPort("[::]:80".parse().unwrap()));
        let path = bound(Kind::Unix, BindAddress::Path("/run/a".into()), None);
        assert_eq!(path.to_string(), "/run/a");
        let path = bound(Kind::Unix, BindAddress::Path("\0a b\n".into()), None);
        assert_eq!(path.to_string(), "@a b\\n");
        let fd = bound(Kind::Tcp, BindAddress::Fd(3), Some("127.0.0.1:80"));
        assert_eq!(fd.to_string(), "127.0.0.1:80");
        let fd = bound(Kind::Unix, BindAddress::Fd(3), None);
        assert_eq!(fd.to_string(), "descriptor 3");
    }

    #[test]
    fn address_has_the_requested_ip_and_the_bound_port() {
        let any = BindAddress::Ip("127.0.0.1:0".parse().unwrap());
        for kind in [Kind::Tcp, Kind::Udp] {
            let address = bound(kind, any.clone(), Some("127.0.0.1:7"));
            assert_eq!(address.socket_addr(), "127.0.0.1:7".parse().ok());
            assert_eq!((address.port(), address.path()), (Some(7), None));
        }
        let path = bound(Kind::Unix, BindAddress::Path("/run/a".into()), None);
        assert_eq!((path.port(), path.path()), (None, Some("/run/a".as_ref())));
        let fd = bound(Kind::Udp, BindAddress::Fd(3), Some("127.0.0.1:7"));
        let Address::Fd {
            number: 3,
            is_udp: true,
            ..
        } = fd
        else {
            panic!("{fd:?}");
        };
        assert_eq!(fd.port(), Some(7));
    }
}
