//! Where a worker listens, as the `listening` event tells it.

use std::net::SocketAddr;
use std::os::fd::RawFd;

use crate::types::endpoint::{Endpoint, Kind, Place};

/// What a worker listens on.
///
/// Node: the argument `address` of the `listening` event. It prints as `127.0.0.1:8000`,
/// `[::1]:8000`, `*:8000` where no host was given, or as the path.
///
/// ```no_run
/// # fn f(master: &cluster::Master) {
/// master.on_listening(|_, worker, address| {
///     println!("worker {} listens on {address}, port {:?}", worker.id(), address.port);
/// });
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Address {
    /// The IP address or the path that the worker asked for, as text; `None` if it gave none, but
    /// a port alone or a descriptor.
    pub address: Option<String>,
    /// The real port, 1 to 65535, also where the worker asked for port 0; `None` for a Unix path.
    pub port: Option<u16>,
    /// What kind of address it is.
    pub address_type: AddressType,
    /// The master's descriptor that the worker asked for, if it did.
    pub fd: Option<RawFd>,
}

/// The kind of an [`Address`].
///
/// Node: `addressType`, whose values are `4`, `6`, `-1`, `'udp4'` and `'udp6'`. See [`Address`] for
/// an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AddressType {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6, or over both where no host was given.
    Tcp6,
    /// A Unix path.
    Unix,
    /// UDP over IPv4.
    Udp4,
    /// UDP over IPv6.
    Udp6,
}

impl Address {
    /// `bound` is what the system says; it has none for a Unix path.
    pub(crate) fn new(asked: &Endpoint, bound: Option<SocketAddr>) -> Self {
        let (address, fd) = match &asked.place {
            Place::Port(_) => (None, None),
            Place::Ip(address) => (Some(address.ip().to_string()), None),
            Place::Path(path) => (Some(path.to_string_lossy().into_owned()), None),
            Place::Fd(number) => (None, Some(*number)),
        };
        let address_type = match (asked.kind, bound) {
            (Kind::Unix, _) | (_, None) => AddressType::Unix,
            (Kind::Tcp, Some(SocketAddr::V4(_))) => AddressType::Tcp4,
            (Kind::Tcp, Some(SocketAddr::V6(_))) => AddressType::Tcp6,
            (Kind::Udp, Some(SocketAddr::V4(_))) => AddressType::Udp4,
            (Kind::Udp, Some(SocketAddr::V6(_))) => AddressType::Udp6,
        };
        Self {
            address,
            port: bound.map(|bound| bound.port()),
            address_type,
            fd,
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let host = self.address.as_deref().unwrap_or("*");
        match (self.port, host.contains(':')) {
            (Some(port), true) => write!(f, "[{host}]:{port}"),
            (Some(port), false) => write!(f, "{host}:{port}"),
            (None, _) => f.write_str(host),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_as_it_was_asked_for() {
        let bound = |text: &str| text.parse::<SocketAddr>().ok();
        let address = |kind, place, bound| Address::new(&Endpoint::new(kind, place), bound);
        for text in ["127.0.0.1:80", "[::1]:8000"] {
            let place = Place::Ip(text.parse().unwrap());
            assert_eq!(address(Kind::Tcp, place, bound(text)).to_string(), text);
        }
        let port = address(Kind::Tcp, Place::Port(0), bound("[::]:80"));
        assert_eq!(port.to_string(), "*:80");
        assert_eq!(port.address_type, AddressType::Tcp6);
        let path = address(Kind::Unix, Place::Path("/run/a".into()), None);
        assert_eq!(path.to_string(), "/run/a");
    }
}
