//! Where a worker listens, as the `listening` event tells it.

use std::net::SocketAddr;

/// The address on which a worker listens.
///
/// Node: the argument `address` of the `listening` event. It prints as `127.0.0.1:8000` or
/// `[::1]:8000`.
///
/// ```no_run
/// # fn f(master: &cluster::Master) {
/// master.on_listening(|_, worker, address| {
///     println!("worker {} listens on {}", worker.id(), address.port);
/// });
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Address {
    /// The IP address that the worker asked for, as text.
    pub address: String,
    /// The real port, 1 to 65535, also where the worker asked for port 0.
    pub port: u16,
    /// What kind of address it is.
    pub address_type: AddressType,
}

/// The kind of an [`Address`].
///
/// Node: `addressType`, whose values 4 and 6 are `Tcp4` and `Tcp6` here. See [`Address`] for an
/// example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AddressType {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self {
            address: address.ip().to_string(),
            port: address.port(),
            address_type: if address.is_ipv4() {
                AddressType::Tcp4
            } else {
                AddressType::Tcp6
            },
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.address_type {
            AddressType::Tcp4 => write!(f, "{}:{}", self.address, self.port),
            AddressType::Tcp6 => write!(f, "[{}]:{}", self.address, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_as_the_socket_address_does() {
        for text in ["127.0.0.1:80", "[::1]:8000"] {
            let address = Address::from(text.parse::<SocketAddr>().unwrap());
            assert_eq!(address.to_string(), text);
        }
    }
}
