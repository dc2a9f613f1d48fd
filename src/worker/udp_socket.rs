//! The UDP sockets of a worker.

use std::cell::RefCell;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::rc::Rc;

use crate::core::worker::ListenerId;
use crate::error::Result;
use crate::worker::bind::Opened;
use crate::worker::shell::Socket;
use crate::worker::{Inner, Worker};

/// A UDP socket that a worker shares with other workers.
///
/// Node: the `dgram.Socket` after `socket.bind()`.
///
/// [`Worker::bind`] returns this value. All workers that have bound the same address share one
/// socket, and each datagram goes to one of them. If a worker closes the socket, the other workers
/// receive the datagrams that it has not read. The socket closes when the value is dropped, unless
/// the socket has a callback. A socket with a callback stays open until [`close`](Self::close). A
/// socket also closes when the worker disconnects.
///
/// Like the [`Worker`], this type is not `Send`. To send datagrams from another thread, pass the
/// thread a descriptor that [`try_clone`](Self::try_clone) returns.
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
#[must_use = "without a callback, the socket closes when it is dropped"]
#[derive(Debug)]
pub struct UdpSocket {
    /// The state that this value shares with the values that are passed to a callback. When the
    /// last of these values is dropped, the socket closes, unless the socket has a callback.
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

    /// Returns the socket's address, with the actual port if port 0 was requested.
    ///
    /// Node: `socket.address()`.
    ///
    /// Returns `None` if the worker was already disconnecting, or its channel had closed, when it
    /// requested the socket. Such a socket is never bound.
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

    /// Waits for the next datagram, and returns its length and its sender. Returns `None` if the
    /// socket is closed: the application has closed it, the worker is disconnecting, or its channel
    /// has closed.
    ///
    /// Node has no counterpart: in Node, datagrams are events.
    ///
    /// While the call waits, the worker handles messages, timers, signals and watches. If the
    /// datagram is longer than `buffer`, the excess bytes are lost. After the socket has closed,
    /// the application can still send messages to the master, unless the master has exited.
    ///
    /// # Errors
    ///
    /// Returns:
    ///
    /// - [`Error::AlreadyRunning`](crate::Error::AlreadyRunning) if a callback calls this method;
    /// - [`Error::ForeignProcess`](crate::Error::ForeignProcess) in a process that did not create
    ///   this value, such as a forked child;
    /// - [`Error::Io`](crate::Error::Io) if waiting fails, or if the descriptor is no longer a
    ///   socket (EBADF, EINVAL, ENOTSOCK).
    ///
    /// An error that concerns only an earlier datagram, such as ECONNREFUSED, is ignored. Other
    /// errors are temporary, for example a lack of memory. The call does not return temporary
    /// errors. The callbacks of [`Worker::on_error`] receive them as
    /// [`Error::Io`](crate::Error::Io), and the next attempt follows after 100 ms.
    ///
    /// See [`UdpSocket`] for an example.
    pub fn recv_from(&self, buffer: &mut [u8]) -> Result<Option<(usize, SocketAddr)>> {
        Worker::receive(&self.handle.worker, self.handle.id, buffer)
    }

    /// Sets the callback that receives each datagram from now on, instead of
    /// [`recv_from`](Self::recv_from). The callback receives the worker, this socket, the bytes,
    /// and the sender.
    ///
    /// Node: `socket.on('message')`.
    ///
    /// A second callback replaces the first. The worker reads the next datagram after the callback
    /// has returned. See [`Worker::bind`] for an example.
    pub fn set_message_callback(
        &self,
        mut callback: impl FnMut(&Worker, &Self, &[u8], SocketAddr) + 'static,
    ) {
        // Store only a weak reference, because the socket owns the callback. A strong reference
        // would keep the socket open forever.
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

    /// Removes the callback of [`set_message_callback`](Self::set_message_callback), so that
    /// [`recv_from`](Self::recv_from) returns the datagrams again.
    ///
    /// Node: `socket.removeListener('message')`.
    ///
    /// If the application has already dropped the socket and the callback removes itself, the
    /// socket closes. Nothing happens if there is no callback.
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

    /// Sends a datagram without waiting for space in the socket's buffer. If `to` contains a host
    /// name, the call resolves it.
    ///
    /// Node: `socket.send()`.
    ///
    /// # Errors
    ///
    /// Returns the system's error, in particular:
    ///
    /// - [`WouldBlock`](io::ErrorKind::WouldBlock) if the socket's buffer is full;
    /// - [`NotConnected`](io::ErrorKind::NotConnected) if the socket is closed;
    /// - [`InvalidInput`](io::ErrorKind::InvalidInput) if `to` resolves to no address.
    ///
    /// See [`UdpSocket`] for an example.
    pub fn send_to(&self, datagram: &[u8], to: impl ToSocketAddrs) -> io::Result<usize> {
        self.with_socket(|socket| socket.send_to(datagram, to))
    }

    /// Returns another descriptor of the same socket, for operations that this type does not offer,
    /// such as multicast, time to live, and buffer sizes.
    ///
    /// Node: `socket.addMembership()` and similar methods.
    ///
    /// Leave the descriptor non-blocking, because all workers share the socket's mode.
    ///
    /// # Errors
    ///
    /// Returns the system's error, or [`NotConnected`](io::ErrorKind::NotConnected) if the socket
    /// is closed.
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

    /// Closes the socket for this worker. Other workers keep their copies.
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

    /// Lets [`Worker::run`] return although this socket is open.
    ///
    /// Node: `socket.unref()`.
    ///
    /// See [`Listener::unreference`](crate::Listener::unreference) for an example with a listener.
    #[doc(alias = "unref")]
    pub fn unreference(&self) {
        self.handle.worker.reference(self.handle.id, false);
    }

    /// Undoes [`unreference`](Self::unreference).
    ///
    /// Node: `socket.ref()`.
    #[doc(alias = "ref")]
    pub fn reference(&self) {
        self.handle.worker.reference(self.handle.id, true);
    }
}
