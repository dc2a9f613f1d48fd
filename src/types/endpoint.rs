//! The endpoints that a worker requests, in the form that master and workers share.

use std::ffi::{OsStr, OsString};
use std::fmt::Display as _;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;
use std::time::Duration;

/// The default backlog, in connections. The value is the same as in Node.
pub(crate) const BACKLOG: u32 = 511;

/// The kind of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    Tcp,
    Unix,
    Udp,
}

/// The address that a socket is bound to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum BindAddress {
    /// A port on all addresses of the machine, both IPv4 and IPv6 if the machine has both.
    Port(u16),
    Ip(SocketAddr),
    /// An absolute path, because the master and its workers may have different working directories.
    /// As in Node, a path that begins with a zero byte is an abstract name. Not a `PathBuf`, which
    /// takes the abstract names `a/b` and `a//b` for equal.
    Path(OsString),
    /// A socket that is already open in the master, by its descriptor.
    Fd(RawFd),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Endpoint {
    pub(crate) kind: Kind,
    pub(crate) address: BindAddress,
}

/// The default of [`ListenOptions::idle_timeout`](crate::ListenOptions::idle_timeout), in seconds.
///
/// With a longer time, more connections of absent clients stay open. Each of them costs a
/// descriptor in the master. With a shorter time, more clients have to connect again. Browsers
/// close idle connections after one to five minutes themselves. nginx's default is 75 seconds
/// (`keepalive_timeout`).
const IDLE_SECONDS: u32 = 60;

/// How connections of a listener are treated while their clients send nothing. A value is `None` if
/// the application has not set it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parking {
    /// The maximum number of seconds for which the client of a parked connection may be silent.
    pub(crate) idle_seconds: Option<u32>,
    /// The maximum number of seconds for which the client of a new connection may be silent if the
    /// listener waits for data. `None` stands for `idle_seconds`.
    pub(crate) first_data_seconds: Option<u32>,
    /// Whether a new connection goes to a worker only when its client has sent something.
    pub(crate) wait_for_data: Option<bool>,
}

impl Parking {
    /// Changes those values that the application has set in `other`.
    pub(crate) fn update(&mut self, other: Self) {
        self.idle_seconds = other.idle_seconds.or(self.idle_seconds);
        self.first_data_seconds = other.first_data_seconds.or(self.first_data_seconds);
        self.wait_for_data = other.wait_for_data.or(self.wait_for_data);
    }

    /// Returns how long the client of a parked connection may be silent.
    pub(crate) fn idle_timeout(&self) -> Duration {
        Duration::from_secs(self.idle_seconds.unwrap_or(IDLE_SECONDS).into())
    }

    /// Returns how long the client of a new connection may be silent if the listener waits for
    /// data.
    pub(crate) fn first_data_timeout(&self) -> Duration {
        let seconds = self.first_data_seconds.map(u64::from);
        seconds.map_or_else(|| self.idle_timeout(), Duration::from_secs)
    }

    /// Returns the number of seconds for which the kernel should keep a new connection out of a
    /// listener's backlog while the client sends nothing. 0 means that new connections enter the
    /// backlog at once.
    pub(crate) fn deferred_seconds(&self) -> u32 {
        match self.waits_for_data() {
            true => {
                let seconds = self.first_data_seconds.or(self.idle_seconds);
                seconds.unwrap_or(IDLE_SECONDS).max(1)
            }
            false => 0,
        }
    }

    pub(crate) fn waits_for_data(&self) -> bool {
        self.wait_for_data.unwrap_or(false)
    }
}

/// The options for binding a socket. If several workers listen on one endpoint, the first worker's
/// options apply. Each later shard of a sharded listener has the options of the worker for which it
/// was bound. Of the options in `parking`, the values that were set last apply to the connections
/// that the master or the kernel holds. A worker uses its own values for those that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BindFlags {
    /// The length of the backlog, in connections.
    pub(crate) backlog: u32,
    /// Whether an IPv6 socket receives no IPv4 traffic (`IPV6_V6ONLY`).
    pub(crate) ipv6_only: bool,
    pub(crate) reuse_addr: bool,
    /// Whether all users may read the file of a Unix socket.
    pub(crate) readable_all: bool,
    /// Whether all users may write the file of a Unix socket, and therefore connect to it.
    pub(crate) writable_all: bool,
    pub(crate) parking: Parking,
}

impl Default for BindFlags {
    fn default() -> Self {
        Self {
            backlog: BACKLOG,
            ipv6_only: false,
            reuse_addr: false,
            readable_all: false,
            writable_all: false,
            parking: Parking::default(),
        }
    }
}

impl Endpoint {
    pub(crate) fn new(kind: Kind, address: BindAddress) -> Self {
        Self { kind, address }
    }

    /// Returns the requested IP address and port, or `None` for a path or a descriptor. If only a
    /// port was requested, the IP address is `::`.
    pub(crate) fn socket_addr(&self) -> Option<SocketAddr> {
        match self.address {
            BindAddress::Ip(address) => Some(address),
            BindAddress::Port(port) => Some((Ipv6Addr::UNSPECIFIED, port).into()),
            BindAddress::Path(_) | BindAddress::Fd(_) => None,
        }
    }

    /// Returns whether the system chooses the port.
    pub(crate) fn is_any_port(&self) -> bool {
        self.socket_addr()
            .is_some_and(|address| address.port() == 0)
    }

    /// Returns whether the endpoint is a descriptor of the master's application. The application
    /// keeps the socket when the listener closes.
    pub(crate) fn is_borrowed(&self) -> bool {
        matches!(self.address, BindAddress::Fd(_))
    }
}

/// Returns the abstract name that a path stands for, without the zero byte at its beginning.
/// Returns `None` if the path names a file.
pub(crate) fn abstract_name(path: &OsStr) -> Option<&[u8]> {
    path.as_bytes().strip_prefix(&[0])
}

/// Returns the path that stands for an abstract name.
pub(crate) fn abstract_path(name: &[u8]) -> OsString {
    OsString::from_vec([&[0], name].concat())
}

/// Prints a path, or an abstract name after `@`, as systemd and ss(8) do.
pub(crate) fn fmt_path(path: &OsStr, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
    match abstract_name(path) {
        Some(name) => write!(f, "@{}", name.escape_ascii()),
        None => Path::new(path).display().fmt(f),
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.address {
            BindAddress::Port(port) => write!(f, "*:{port}"),
            BindAddress::Ip(address) => address.fmt(f),
            BindAddress::Path(path) => fmt_path(path, f),
            BindAddress::Fd(number) => write!(f, "the master's descriptor {number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn abstract_names_differ_in_each_byte() {
        let address = |name: &[u8]| BindAddress::Path(abstract_path(name));
        assert_ne!(address(b"a/b"), address(b"a//b"));
        assert_ne!(
            address(b"a/b").cmp(&address(b"a//b")),
            std::cmp::Ordering::Equal
        );
    }

    #[test]
    fn new_client_has_the_idle_timeout_unless_it_has_a_timeout_of_its_own() {
        let mut parking = Parking {
            wait_for_data: Some(true),
            ..Parking::default()
        };
        let seconds = |parking: &Parking| {
            let (first, idle) = (parking.first_data_timeout(), parking.idle_timeout());
            (parking.deferred_seconds(), first.as_secs(), idle.as_secs())
        };
        assert_eq!(seconds(&parking), (60, 60, 60));
        parking.update(Parking {
            idle_seconds: Some(9),
            ..Parking::default()
        });
        assert_eq!(seconds(&parking), (9, 9, 9));
        parking.update(Parking {
            first_data_seconds: Some(0),
            ..Parking::default()
        });
        // The kernel would not wait at all for 0 seconds.
        assert_eq!(seconds(&parking), (1, 0, 9));
    }
}
