//! A listener of a worker.

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

/// A listener that a worker shares with other workers. Its connections are [`TcpStream`]s, or, if it is
/// a `Listener<UnixStream>`, [`UnixStream`](std::os::unix::net::UnixStream)s.
///
/// Node: the `net.Server` after `server.listen()`. It comes from [`Worker::listen`]. When it is dropped
/// it closes, unless it has a callback: then it stays open until [`close`](Self::close). It closes by
/// itself when the worker disconnects.
///
/// A listener is not `Send`, as the [`Worker`] is not. To serve a connection on another thread, send the
/// stream there ([`Connection::into_stream`]).
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
#[derive(Debug)]
pub struct Listener<S = TcpStream> {
    worker: Rc<Inner>,
    id: ListenerId,
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

    /// Closes the listener for this worker. Other workers keep theirs, and get the connections that were
    /// dispatched to this worker and not received. Connections that the application has stay open.
    ///
    /// Node: `server.close()`.
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

    /// Sets how many connections of this listener the application wants to have at a time. `None`, the
    /// default, stands for any number.
    ///
    /// At the limit, further connections go to other workers. If there are none, the connections wait in
    /// the kernel's backlog. The worker no longer counts a connection that has been dropped or
    /// taken out of its [`Connection`].
    ///
    /// Node: `server.maxConnections`.
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

    /// Goes back to [`accept`](Self::accept): connections are no longer passed to the callback of
    /// [`set_connection_callback`](Self::set_connection_callback). Until the next call of `accept` they
    /// go to other workers.
    ///
    /// Node: `server.removeListener('connection')`. Nothing happens if there is no callback.
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

    /// Leaves connections beyond the limit to other workers again: removes the callback of
    /// [`set_drop_callback`](Self::set_drop_callback).
    ///
    /// Node: `server.removeListener('drop')`. Nothing happens if there is no callback.
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

    /// Lets [`Worker::run`] return although this listener is open. `run` still waits for its
    /// connections.
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

    /// Undoes [`unreference`](Self::unreference), which has an example.
    ///
    /// Node: `server.ref()`.
    #[doc(alias = "ref")]
    pub fn reference(&self) {
        self.worker.reference(self.id, true);
    }
}

impl Listener<TcpStream> {
    /// Returns the address, with the real port if port 0 was requested. It is `None` if the worker was
    /// already disconnecting when it asked for the listener, which was therefore never bound.
    ///
    /// Node: `server.address()`.
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
    /// Waits for the next connection. `None` means that the listener has ended, because the worker is
    /// disconnecting or has lost its master. Messages, timers, signals and watches are handled meanwhile.
    ///
    /// Node has no counterpart; there, connections are events. While the application is not in this call,
    /// connections go to other workers. Of several listeners without a callback, only the one whose
    /// `accept` is being called receives connections. After the end, the application can still send
    /// messages and finish its work. If its timers or watches still own connections, or if it wants the
    /// `disconnect` event, it then calls [`Worker::run`].
    ///
    /// # Errors
    ///
    /// - [`Error::AlreadyRunning`](crate::Error::AlreadyRunning) if a callback calls it;
    /// - [`Error::Io`](crate::Error::Io) if the system refuses to wait or to accept.
    ///
    /// See [`Listener`] for an example.
    pub fn accept(&self) -> Result<Option<Connection<S>>> {
        let accepted = Worker::accept(&self.worker, self.id)?;
        Ok(accepted.map(Connection::cast))
    }

    /// Returns an iterator over the connections, which ends when the listener does.
    ///
    /// Node has no counterpart. It calls [`accept`](Self::accept). See [`Worker`] for an example.
    #[must_use]
    pub fn incoming(&self) -> Incoming<'_, S> {
        Incoming(self)
    }

    /// Sets the callback that gets each connection from now on, instead of [`accept`](Self::accept). A
    /// second callback replaces the first.
    ///
    /// Several connections may be in flight to this worker at a time, so the callback should not wait. It
    /// may [`watch`](Worker::watch) the connection.
    ///
    /// Node: `server.on('connection')`.
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

    /// Sets the callback that gets each connection beyond the limit of
    /// [`set_max_connections`](Self::set_max_connections). The worker then receives these connections,
    /// instead of leaving them to other workers, even if another worker could serve them.
    ///
    /// The connection closes when the callback drops it. A second callback replaces the first. A worker
    /// that blocks receives these connections while it waits in [`accept`](Self::accept).
    ///
    /// Node: `server.dropMaxConnection` and the event `drop`.
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

/// Makes a callback for any kind of connection from one for a certain kind.
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
        if !self.worker.has_callback(self.id) {
            self.close();
        }
    }
}

/// An iterator over the connections of a [`Listener`].
///
/// Node has no counterpart. It comes from [`Listener::incoming`]. See [`Worker`] for an example.
#[derive(Debug)]
pub struct Incoming<'a, S = TcpStream>(&'a Listener<S>);

impl<S: From<OwnedFd>> Iterator for Incoming<'_, S> {
    type Item = Result<Connection<S>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.accept().transpose()
    }
}
