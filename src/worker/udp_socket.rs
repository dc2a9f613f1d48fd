//! A UDP socket of a worker.

use std::cell::RefCell;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::rc::Rc;

use crate::core::worker::ListenerId;
use crate::error::Result;
use crate::worker::bind::Opened;
use crate::worker::shell::Socket;
use crate::worker::{Inner, Worker};

/// A UDP socket that a worker shares with others.
///
/// Node: the `dgram.Socket` after `socket.bind()`. It comes from [`Worker::bind`]. All workers that
/// have bound the same address have the same socket: each datagram goes to one of them. A worker that
/// closes the socket leaves the datagrams that it has not read to the others. When the value is dropped,
/// the socket closes, unless it has a callback: then it stays open until [`close`](Self::close). It closes
/// by itself when the worker disconnects.
///
/// The type is not `Send`, as the [`Worker`] is not. To send datagrams from another thread, give the
/// thread a descriptor of [`try_clone`](Self::try_clone).
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
    /// Shared with the values that a callback is passed: the socket closes with the last of them.
    handle: Rc<Handle>,
}

#[derive(Debug)]
struct Handle {
    worker: Rc<Inner>,
    id: ListenerId,
    address: Option<SocketAddr>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.worker.has_callback(self.id) {
            self.worker.close(self.id);
        }
    }
}

impl UdpSocket {
    pub(super) fn new(worker: Rc<Inner>, opened: Opened) -> Self {
        let handle = Handle {
            worker,
            id: opened.id,
            address: opened.address,
        };
        Self {
            handle: Rc::new(handle),
        }
    }

    /// Returns the address, with the real port if port 0 was requested. It is `None` if the worker was
    /// already disconnecting when it asked for the socket, which was therefore never bound.
    ///
    /// Node: `socket.address()`.
    ///
    /// ```no_run
    /// # fn f(socket: &cluster::UdpSocket) {
    /// if let Some(address) = socket.local_addr() {
    ///     println!("send to {address}");
    /// }
    /// # }
    /// ```
    #[doc(alias = "address")]
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.handle.address
    }

    /// Waits for the next datagram, and returns its length and its sender. `None` means that the socket
    /// is closed, because the worker is disconnecting or has lost its master. Messages, timers, signals
    /// and watches are handled meanwhile.
    ///
    /// If the datagram is longer than `buffer`, the rest of it is lost. After the end, the application can
    /// still send messages.
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
        Worker::receive(&self.handle.worker, self.handle.id, buffer)
    }

    /// Sets the callback that gets each datagram from now on, instead of [`recv_from`](Self::recv_from):
    /// this socket, the bytes, and the sender. A second callback replaces the first.
    ///
    /// The next datagram is read after the callback has returned.
    ///
    /// Node: `socket.on('message')`. See [`Worker::bind`] for an example.
    pub fn set_message_callback(
        &self,
        mut callback: impl FnMut(&Worker, &Self, &[u8], SocketAddr) + 'static,
    ) {
        // Not a strong reference: the callback would keep the socket open for ever.
        let weak = Rc::downgrade(&self.handle);
        let (id, address) = (self.handle.id, self.handle.address);
        let with_socket = move |worker: &Worker, datagram: &[u8], from: SocketAddr| {
            let handle = weak.upgrade().unwrap_or_else(|| {
                let worker = Rc::clone(&worker.inner);
                Rc::new(Handle {
                    worker,
                    id,
                    address,
                })
            });
            callback(worker, &Self { handle }, datagram, from);
        };
        let callback = Rc::new(RefCell::new(with_socket));
        self.handle.worker.serve_datagrams(self.handle.id, callback);
    }

    /// Goes back to [`recv_from`](Self::recv_from): datagrams are no longer passed to the callback of
    /// [`set_message_callback`](Self::set_message_callback).
    ///
    /// A callback that removes itself, after the application has dropped the socket, closes the socket.
    ///
    /// Node: `socket.removeListener('message')`. Nothing happens if there is no callback.
    ///
    /// ```no_run
    /// # fn f(socket: &cluster::UdpSocket) -> cluster::Result<()> {
    /// socket.remove_message_callback();
    /// let next = socket.recv_from(&mut [0; 1500])?;
    /// # let _ = next;
    /// # Ok(()) }
    /// ```
    #[doc(alias = "removeListener")]
    pub fn remove_message_callback(&self) {
        self.handle.worker.remove_message_callback(self.handle.id);
    }

    /// Sends a datagram, without waiting for space in the socket's buffer. A name is looked up.
    ///
    /// Node: `socket.send()`.
    ///
    /// # Errors
    ///
    /// The system's reason; [`WouldBlock`](io::ErrorKind::WouldBlock) if the socket's buffer is full,
    /// [`NotConnected`](io::ErrorKind::NotConnected) if the socket is closed,
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) if `to` stands for no address.
    ///
    /// See [`UdpSocket`] for an example.
    pub fn send_to(&self, datagram: &[u8], to: impl ToSocketAddrs) -> io::Result<usize> {
        self.with_socket(|socket| socket.send_to(datagram, to))
    }

    /// Returns another descriptor of the same socket, for operations that this type has no method for:
    /// multicast, time to live, buffer sizes. Leave it non-blocking: the mode is a property of the socket
    /// that all workers share.
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
        self.with_socket(std::net::UdpSocket::try_clone)
    }

    fn with_socket<T>(
        &self,
        call: impl FnOnce(&std::net::UdpSocket) -> io::Result<T>,
    ) -> io::Result<T> {
        let socket = self.handle.worker.shell.socket(self.handle.id);
        match socket.as_deref().map(|socket| &**socket) {
            Some(Socket::Datagrams(socket)) => call(socket),
            Some(Socket::Listener(_) | Socket::Queue(_)) | None => {
                Err(io::ErrorKind::NotConnected.into())
            }
        }
    }

    /// Closes the socket for this worker. Other workers keep theirs.
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
        self.handle.worker.close(self.handle.id);
    }

    /// Lets [`Worker::run`] return although this socket is open. See
    /// [`Listener::unreference`](crate::Listener::unreference), which is the same, for an example.
    ///
    /// Node: `socket.unref()`.
    #[doc(alias = "unref")]
    pub fn unreference(&self) {
        self.handle.worker.reference(self.handle.id, false);
    }

    /// Undoes [`unreference`](Self::unreference), which has an example.
    ///
    /// Node: `socket.ref()`.
    #[doc(alias = "ref")]
    pub fn reference(&self) {
        self.handle.worker.reference(self.handle.id, true);
    }
}
