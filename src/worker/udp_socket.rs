//! Where a worker's datagrams come from.

use std::cell::RefCell;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::rc::Rc;

use crate::core::worker::ListenerId;
use crate::error::Result;
use crate::worker::shell::Socket;
use crate::worker::{Inner, Worker};

/// A UDP socket that a worker shares with others.
///
/// Node: the `dgram.Socket` after `socket.bind()`. It comes from [`Worker::bind`]. All workers that
/// have bound the same address have the same socket: each datagram goes to one of them, and one
/// that closes leaves what it has not read to the others. When it is dropped it closes, unless it
/// has a callback: then it stays open until [`close`](Self::close). It closes by itself when the
/// worker is to leave.
///
/// ```no_run
/// # fn f(worker: cluster::Worker) -> cluster::Result<()> {
/// let socket = worker.bind(("0.0.0.0", 7))?;
/// let mut buffer = [0; 1500];
/// while let Some((length, from)) = socket.recv_from(&mut buffer)? {
///     let _ = socket.send_to(&buffer[..length], from);
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct UdpSocket {
    worker: Rc<Inner>,
    id: ListenerId,
    address: SocketAddr,
}

impl UdpSocket {
    pub(crate) fn new(worker: Rc<Inner>, id: ListenerId, address: Option<SocketAddr>) -> Self {
        let nowhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        Self {
            worker,
            id,
            address: address.unwrap_or(nowhere),
        }
    }

    /// Returns the address, with the real port where port 0 was asked for.
    ///
    /// Node: `socket.address()`.
    ///
    /// ```no_run
    /// # fn f(socket: &cluster::UdpSocket) {
    /// println!("send to {}", socket.local_addr());
    /// # }
    /// ```
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Waits for the next datagram, and returns its length and where it comes from; `None` means
    /// that the socket is closed, because the worker is to leave or has lost its master. Messages,
    /// timers, signals and watched descriptors are served meanwhile. What does not fit into
    /// `buffer` is lost. After the end the program can still send messages.
    ///
    /// Node has no counterpart; there, datagrams are events.
    ///
    /// # Errors
    ///
    /// - [`Error::AlreadyRunning`](crate::Error::AlreadyRunning) if a callback calls it;
    /// - [`Error::Io`](crate::Error::Io) if the system refuses to wait or to receive.
    ///
    /// See [`UdpSocket`] for an example.
    pub fn recv_from(&self, buffer: &mut [u8]) -> Result<Option<(usize, SocketAddr)>> {
        Worker::receive(&self.worker, self.id, buffer)
    }

    /// Calls back for each datagram from now on, instead of [`recv_from`](Self::recv_from), with
    /// this socket, the bytes, and where they come from. A second callback replaces the first. The
    /// next datagram is not read before the callback has returned.
    ///
    /// Node: `socket.on('message')`. See [`Worker::bind`] for an example.
    pub fn on_message(
        &self,
        mut callback: impl FnMut(&Worker, &Self, &[u8], SocketAddr) + 'static,
    ) {
        let (id, address) = (self.id, self.address);
        let with_socket = move |worker: &Worker, datagram: &[u8], from: SocketAddr| {
            // It is served, and so it stays open when this is dropped.
            let socket = Self::new(worker.inner(), id, Some(address));
            callback(worker, &socket, datagram, from);
        };
        let callback = Rc::new(RefCell::new(with_socket));
        self.worker.serve_datagrams(self.id, callback);
    }

    /// Sends a datagram, without waiting for room; a name is looked up.
    ///
    /// Node: `socket.send()`.
    ///
    /// # Errors
    ///
    /// The system's reason; [`WouldBlock`](io::ErrorKind::WouldBlock) if there is no room for it
    /// now, [`NotConnected`](io::ErrorKind::NotConnected) if the socket is closed,
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) if `to` stands for no address.
    ///
    /// See [`UdpSocket`] for an example.
    pub fn send_to(&self, datagram: &[u8], to: impl ToSocketAddrs) -> io::Result<usize> {
        match self.worker.shell.socket(self.id).as_deref().map(|s| &**s) {
            Some(Socket::Datagrams(socket)) => socket.send_to(datagram, to),
            Some(Socket::Listener(_) | Socket::Queue(_)) | None => {
                Err(io::ErrorKind::NotConnected.into())
            }
        }
    }

    /// Returns another descriptor of the same socket, for what this type has no method for:
    /// multicast, time to live, buffer sizes. It must go on not to block: that is a property of the
    /// one socket that all workers share.
    ///
    /// Node: `socket.addMembership()` and its like.
    ///
    /// # Errors
    ///
    /// The system's reason; [`NotConnected`](io::ErrorKind::NotConnected) if the socket is closed.
    ///
    /// ```no_run
    /// # fn f(socket: &cluster::UdpSocket) -> std::io::Result<()> {
    /// socket.try_clone()?.set_ttl(16)?;
    /// # Ok(()) }
    /// ```
    pub fn try_clone(&self) -> io::Result<std::net::UdpSocket> {
        match self.worker.shell.socket(self.id).as_deref().map(|s| &**s) {
            Some(Socket::Datagrams(socket)) => socket.try_clone(),
            Some(Socket::Listener(_) | Socket::Queue(_)) | None => {
                Err(io::ErrorKind::NotConnected.into())
            }
        }
    }

    /// Closes the socket for this worker; others go on.
    ///
    /// Node: `socket.close()`.
    ///
    /// ```no_run
    /// # fn f(socket: &cluster::UdpSocket) {
    /// socket.close();
    /// assert!(matches!(socket.recv_from(&mut [0]), Ok(None)));
    /// # }
    /// ```
    pub fn close(&self) {
        self.worker.close(self.id);
    }

    /// Lets the worker end although this socket is open. See
    /// [`Listener::unref`](crate::Listener::unref), which is the same, for an example.
    ///
    /// Node: `socket.unref()`.
    pub fn unref(&self) {
        self.worker.reference(self.id, false);
    }

    /// Undoes [`unref`](Self::unref), which has an example.
    ///
    /// Node: `socket.ref()`.
    pub fn ref_(&self) {
        self.worker.reference(self.id, true);
    }
}

impl Drop for UdpSocket {
    fn drop(&mut self) {
        if !self.worker.has_callback(self.id) {
            self.close();
        }
    }
}
