//! Opens listeners, expects errors of listeners, and reserves addresses.

use std::cell::RefCell;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd as _, OwnedFd};

use cluster::{Error, ListenOptions, Master, SchedulingPolicy, Worker, WorkerProcess};

use super::wait_until;

pub fn share_listeners(master: &Master) {
    let policy = SchedulingPolicy::Shared;
    master.set_scheduling_policy(policy).unwrap();
}

/// Opens a non-blocking listener on a free port without the crate, and returns the listener and its
/// address.
pub fn idle_server() -> (TcpListener, SocketAddr) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let address = server.local_addr().unwrap();
    (server, address)
}

/// Closes the listener when the worker exits, after asserting that no client has connected to it.
pub fn close_at_exit(worker: &WorkerProcess, server: TcpListener) {
    let server = RefCell::new(Some(server));
    worker.on_exit(move |_, _, _| {
        let error = server.take().unwrap().accept().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    });
}

/// Asserts that `listen` fails with `errno`, and returns the error.
pub fn expect_listen_error<S: std::fmt::Debug>(
    worker: &Worker,
    options: impl Into<ListenOptions<S>>,
    errno: i32,
) -> Error {
    let error = worker.listen(options).unwrap_err();
    assert!(matches!(error, Error::Listen { .. }), "{error}");
    assert_eq!(error.raw_os_error(), Some(errno), "{error}");
    error
}

/// Reserves a free port until the returned socket is dropped.
///
/// The socket is bound but does not listen. Other sockets with SO_REUSEADDR can therefore listen on
/// the port, and the kernel does not choose the port for another socket.
pub fn reserve_port() -> (OwnedFd, SocketAddr) {
    reserve("127.0.0.1:0".parse().unwrap()).unwrap()
}

/// Reserves a port that is free in both address families, until the returned sockets are dropped.
pub fn reserve_both_families() -> ([OwnedFd; 2], u16) {
    wait_until("a port", || {
        let (v6, address) = reserve("[::]:0".parse().unwrap()).unwrap();
        let v4 = SocketAddr::from(([0, 0, 0, 0], address.port()));
        let (v4, _) = reserve(v4).ok()?;
        Some(([v6, v4], address.port()))
    })
}

/// Reserves an address until the returned socket is dropped. An IPv6 address does not reserve the
/// IPv4 port.
pub fn reserve(address: SocketAddr) -> nix::Result<(OwnedFd, SocketAddr)> {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, getsockname, setsockopt, socket,
        sockopt::{Ipv6V6Only, ReuseAddr},
    };
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, ReuseAddr, &true)?;
    if address.is_ipv6() {
        setsockopt(&socket, Ipv6V6Only, &true)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    let bound = getsockname::<SockaddrStorage>(socket.as_raw_fd())?;
    let v4 = bound.as_sockaddr_in().map(|v4| v4.port());
    let port = v4.or_else(|| bound.as_sockaddr_in6().map(|v6| v6.port()));
    Ok((socket, SocketAddr::new(address.ip(), port.unwrap())))
}
