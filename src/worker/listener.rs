//! The listeners of a worker.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use crate::core::worker::ListenerId;
use crate::error::Result;
use crate::runtime::callbacks::Shared;
use crate::worker::bind::Opened;
use crate::worker::callbacks::OnConnection;
use crate::worker::connection::Connection;
use crate::worker::{Inner, Worker};

/// A listener that a worker shares with other workers. The connections are [`TcpStream`]s, or
/// [`UnixStream`](std::os::unix::net::UnixStream)s if the type is `Listener<UnixStream>`.
///
/// Node: the `net.Server` after `server.listen()`.
///
/// [`Worker::listen`] returns this value. The listener closes when the value is dropped, unless it
/// has a connection callback ([`set_connection_callback`](Self::set_connection_callback)). With
/// such a callback, the listener stays open until [`close`](Self::close). In both cases, the
/// listener closes when the worker disconnects. A server of another crate receives the connections
/// from [`into_std`](Self::into_std) or [`streams`](Self::streams).
///
/// Like the [`Worker`], a listener is not `Send`. To serve a connection on another thread, use
/// [`Connection::into_parts`].
///
/// ```no_run
/// # fn serve(_: cluster::Connection) {}
/// # fn f(worker: cluster::Worker) -> cluster::Result<()> {
/// let listener = worker.listen(("0.0.0.0", 8000))?;
/// while let Some(connection) = listener.accept()? {
///     serve(connection);
/// }
/// # Ok(()) }
/// ```
#[must_use = "without a callback, the listener closes when it is dropped"]
#[derive(Debug)]
pub struct Listener<S = TcpStream> {
    pub(super) worker: Rc<Inner>,
    pub(super) id: ListenerId,
    address: Option<SocketAddr>,
    streams: PhantomData<fn() -> S>,
}

impl<S> Listener<S> {
    pub(super) fn new(worker: Rc<Inner>, opened: Opened) -> Self {
        Self {
            worker,
            id: opened.id,
            address: opened.address,
            streams: PhantomData,
        }
    }

    /// Closes the listener for this worker. Other workers keep their listeners.
    ///
    /// Node: `server.close()`.
    ///
    /// Connections that were dispatched to this worker but not received go to other workers.
    /// Connections that the application has received stay open.
    ///
    /// ```no_run
    /// # fn f(listener: &cluster::Listener) {
    /// listener.close();
    /// assert!(matches!(listener.accept(), Ok(None)));
    /// # }
    /// ```
    pub fn close(&self) {
        self.worker.close(self.id);
    }

    /// Sets the maximum number of this listener's connections that the application has at a time.
    /// The default is `None`, which means no limit.
    ///
    /// Node: `server.maxConnections`.
    ///
    /// At the limit, new connections go to the callback of
    /// [`set_drop_callback`](Self::set_drop_callback). Without that callback, they go to other
    /// workers. If no other worker can serve them, they wait in the kernel's backlog. With the
    /// sharded policy, connections in this worker's shard always wait. Connections that this worker
    /// holds, because they are parked or [wait for data](crate::ListenOptions::wait_for_data), wait
    /// too. The worker no longer counts a connection once the application has dropped it or its
    /// [`ConnectionGuard`](crate::ConnectionGuard), or has called [`Connection::into_stream`] or
    /// [`Connection::park`].
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// let listener = worker.listen(8000)?;
    /// listener.set_max_connections(Some(100));
    /// # Ok(()) }
    /// ```
    #[doc(alias = "maxConnections")]
    pub fn set_max_connections(&self, limit: Option<u64>) {
        self.worker.set_connection_limit(self.id, limit);
    }

    /// Removes the callback of [`set_connection_callback`](Self::set_connection_callback), so that
    /// [`accept`](Self::accept) returns the connections again.
    ///
    /// Node: `server.removeListener('connection')`.
    ///
    /// Until the next call of `accept`, new connections go to other workers. With the sharded
    /// policy, however, connections in this worker's shard wait for that call. Nothing happens if
    /// there is no callback.
    ///
    /// ```no_run
    /// # fn f(listener: &cluster::Listener) -> cluster::Result<()> {
    /// listener.remove_connection_callback();
    /// let next = listener.accept()?;
    /// # let _ = next;
    /// # Ok(()) }
    /// ```
    #[doc(alias = "removeListener")]
    pub fn remove_connection_callback(&self) {
        self.worker.remove_connection_callback(self.id);
    }

    /// Removes the callback of [`set_drop_callback`](Self::set_drop_callback), so that connections
    /// beyond the limit go to other workers again.
    ///
    /// Node: `server.removeListener('drop')`.
    ///
    /// Nothing happens if there is no callback.
    ///
    /// ```no_run
    /// # fn f(listener: &cluster::Listener) {
    /// listener.set_drop_callback(|_, connection| drop(connection));
    /// listener.remove_drop_callback();
    /// # }
    /// ```
    #[doc(alias = "removeListener")]
    pub fn remove_drop_callback(&self) {
        self.worker.remove_drop_callback(self.id);
    }

    /// Lets [`Worker::run`] return although this listener is open. `run` still waits for the
    /// listener's connections.
    ///
    /// Node: `server.unref()`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// let status = worker.listen(8001)?;
    /// status.unreference();
    /// # Ok(()) }
    /// ```
    #[doc(alias = "unref")]
    pub fn unreference(&self) {
        self.worker.reference(self.id, false);
    }

    /// Undoes [`unreference`](Self::unreference).
    ///
    /// Node: `server.ref()`.
    ///
    /// See [`unreference`](Self::unreference) for an example of the opposite call.
    #[doc(alias = "ref")]
    pub fn reference(&self) {
        self.worker.reference(self.id, true);
    }
}

impl Listener<TcpStream> {
    /// Returns the listener's address, with the actual port if port 0 was requested.
    ///
    /// Node: `server.address()`.
    ///
    /// Returns `None` if the worker was already disconnecting, or its channel had closed, when it
    /// requested the listener. Such a listener is never bound.
    ///
    /// ```no_run
    /// # fn f(listener: &cluster::Listener) {
    /// if let Some(address) = listener.local_addr() {
    ///     println!("http://{address}/");
    /// }
    /// # }
    /// ```
    #[doc(alias = "address")]
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.address
    }
}

impl<S: From<OwnedFd>> Listener<S> {
    /// Waits for the next connection. Returns `None` if the listener has ended: the application has
    /// closed it, the worker is disconnecting, or its channel has closed.
    ///
    /// Node has no counterpart: in Node, connections are events.
    ///
    /// While the call waits, the worker handles messages, timers, signals and watches. While the
    /// application is not in this call, connections go to the other workers that wait for one. With
    /// the sharded policy, however, connections in this worker's shard wait for the next call. If
    /// several listeners have no callback, only the listener whose `accept` is being called
    /// receives connections.
    ///
    /// After the listener has ended, the application can still finish its work and, unless the
    /// master has exited, send messages. Then call [`Worker::run`] if timers or watches still own
    /// connections, or if the application needs the `disconnect` event.
    ///
    /// # Errors
    ///
    /// Returns:
    ///
    /// - [`Error::AlreadyRunning`](crate::Error::AlreadyRunning) if a callback calls this method;
    /// - [`Error::ForeignProcess`](crate::Error::ForeignProcess) in a process that did not create
    ///   this value, such as a forked child;
    /// - [`Error::Io`](crate::Error::Io) if waiting fails, or if the descriptor is no longer a
    ///   listener (EBADF, EINVAL, ENOTSOCK).
    ///
    /// An error that concerns only one connection, such as ECONNABORTED, is ignored. The remaining
    /// errors of accept(2) are temporary, for example a lack of descriptors or memory. The call
    /// does not return temporary errors. The callbacks of [`Worker::on_error`] receive them, and
    /// the next attempt follows after 100 ms.
    ///
    /// See [`Listener`] for an example.
    pub fn accept(&self) -> Result<Option<Connection<S>>> {
        let accepted = Worker::accept(&self.worker, self.id)?;
        Ok(accepted.map(Connection::cast))
    }

    /// Returns an iterator that calls [`accept`](Self::accept) for each connection and ends when
    /// the listener ends.
    ///
    /// Node has no counterpart.
    ///
    /// See [`Worker`] for an example.
    #[must_use]
    pub fn incoming(&self) -> Incoming<'_, S> {
        Incoming(self)
    }

    /// Sets the callback that receives each connection from now on, instead of
    /// [`accept`](Self::accept).
    ///
    /// Node: `server.on('connection')`.
    ///
    /// A second callback replaces the first. Several connections may be in flight to this worker at
    /// a time, so the callback should not wait. The callback can [`watch`](Worker::watch) the
    /// connection instead.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// use std::io::Write;
    ///
    /// worker.listen("127.0.0.1:8000")?.set_connection_callback(|_, mut connection| {
    ///     let _ = connection.write_all(b"hello and goodbye\n");
    /// });
    /// worker.run()
    /// # }
    /// ```
    pub fn set_connection_callback(&self, callback: impl FnMut(&Worker, Connection<S>) + 'static) {
        self.worker.serve(self.id, with_stream(callback));
    }

    /// Sets the callback that receives each connection beyond the limit of
    /// [`set_max_connections`](Self::set_max_connections).
    ///
    /// Node: `server.dropMaxConnection` and the event `drop`.
    ///
    /// The worker then receives these connections even if another worker could serve them. A
    /// connection closes when the callback drops it. A second callback replaces the first. A
    /// blocking worker receives these connections while it waits in [`accept`](Self::accept).
    ///
    /// ```no_run
    /// # fn f(listener: &cluster::Listener) {
    /// use std::io::Write;
    ///
    /// listener.set_max_connections(Some(100));
    /// listener.set_drop_callback(|_, mut connection| {
    ///     let _ = connection.write_all(b"HTTP/1.1 503 Service Unavailable\r\n\r\n");
    /// });
    /// # }
    /// ```
    #[doc(alias = "dropMaxConnection")]
    pub fn set_drop_callback(&self, callback: impl FnMut(&Worker, Connection<S>) + 'static) {
        self.worker.drop_excess(self.id, with_stream(callback));
    }
}

/// Converts a callback for one type of stream into a callback for any connection.
fn with_stream<S: From<OwnedFd>>(
    mut callback: impl FnMut(&Worker, Connection<S>) + 'static,
) -> Shared<OnConnection> {
    Rc::new(RefCell::new(
        move |worker: &Worker, connection: Connection<OwnedFd>| {
            callback(worker, connection.cast());
        },
    ))
}

impl<S> Drop for Listener<S> {
    fn drop(&mut self) {
        if !self.worker.outlives_handle(self.id) {
            self.close();
        }
    }
}

/// An iterator over the connections of a [`Listener`].
///
/// Node has no counterpart.
///
/// [`Listener::incoming`] returns this iterator. See [`Worker`] for an example.
#[derive(Debug)]
pub struct Incoming<'a, S = TcpStream>(&'a Listener<S>);

impl<S: From<OwnedFd>> Iterator for Incoming<'_, S> {
    type Item = Result<Connection<S>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.accept().transpose()
    }
}
