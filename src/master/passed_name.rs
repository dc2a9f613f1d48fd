//! The names under which a master passes its sockets to another master.
//!
//! The name in [`Settings::listen_fds`](crate::Settings::listen_fds()) is the only information that
//! accompanies a descriptor. If the kernel chose the port, workers request the socket by port 0.
//! The socket's own address does not show this, so the name does.

use crate::types::endpoint::{BindAddress, Endpoint, Kind};

/// The name of a socket that workers request by its own address.
const LISTENER: &str = "listener";
/// The name of a socket that workers request by port 0 of its IP address.
const ANY_PORT: &str = "cluster-any-port";
/// The name of a TCP listener that workers request by port 0 without a host.
const ANY_PORT_AND_HOST: &str = "cluster-any-port-and-host";

/// Returns the name under which to pass a socket that workers request by this endpoint.
pub(super) fn name_of(endpoint: &Endpoint) -> &'static str {
    match endpoint.address {
        BindAddress::Port(0) => ANY_PORT_AND_HOST,
        BindAddress::Ip(address) if address.port() == 0 => ANY_PORT,
        BindAddress::Port(_) | BindAddress::Ip(_) | BindAddress::Path(_) | BindAddress::Fd(_) => {
            LISTENER
        }
    }
}

/// Returns the endpoint by which workers request a passed socket. `bound` is the endpoint to which
/// the socket is bound.
pub(super) fn requested(name: Option<&str>, bound: Endpoint) -> Endpoint {
    let address = match (name, &bound.address) {
        (Some(ANY_PORT), BindAddress::Ip(address)) => {
            let mut any = *address;
            any.set_port(0);
            BindAddress::Ip(any)
        }
        (Some(ANY_PORT_AND_HOST), BindAddress::Ip(_)) if bound.kind == Kind::Tcp => {
            BindAddress::Port(0)
        }
        _ => return bound,
    };
    Endpoint::new(bound.kind, address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_preserves_the_requested_endpoint() {
        let ip = |text: &str| BindAddress::Ip(text.parse().unwrap());
        for (kind, requested_by, bound) in [
            (Kind::Tcp, ip("127.0.0.1:0"), ip("127.0.0.1:7")),
            (Kind::Tcp, ip("[::]:0"), ip("[::]:7")),
            (Kind::Udp, ip("0.0.0.0:0"), ip("0.0.0.0:7")),
            (Kind::Tcp, BindAddress::Port(0), ip("[::]:7")),
            (Kind::Tcp, ip("127.0.0.1:7"), ip("127.0.0.1:7")),
            (
                Kind::Unix,
                BindAddress::Path("/a".into()),
                BindAddress::Path("/a".into()),
            ),
        ] {
            let endpoint = Endpoint::new(kind, requested_by);
            let name = name_of(&endpoint);
            assert_eq!(requested(Some(name), Endpoint::new(kind, bound)), endpoint);
        }
    }

    #[test]
    fn other_names_leave_the_bound_endpoint() {
        let bound = Endpoint::new(Kind::Tcp, BindAddress::Ip("127.0.0.1:7".parse().unwrap()));
        for name in [None, Some("web"), Some("listener")] {
            assert_eq!(requested(name, bound.clone()), bound);
        }
        let path = Endpoint::new(Kind::Unix, BindAddress::Path("/a".into()));
        assert_eq!(requested(Some(ANY_PORT), path.clone()), path);
        let udp = Endpoint::new(Kind::Udp, BindAddress::Ip("127.0.0.1:7".parse().unwrap()));
        assert_eq!(requested(Some(ANY_PORT_AND_HOST), udp.clone()), udp);
    }
}
