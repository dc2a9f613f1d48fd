//! Where a worker's connections come from, and the connections.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::marker::PhantomData;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::{Rc, Weak};

use crate::core::worker::ListenerId;
use crate::error::Result;
use crate::worker::shell::WorkerShell;
use crate::worker::{Inner, Worker};

/// What a worker listens on, together with others. Its connections are [`TcpStream`]s, or, if it is
/// a `Listener<UnixStream>`, [`UnixStream`](std::os::unix::net::UnixStream)s.
///
/// Node: the `net.Server` after `server.listen()`. It comes from [`Worker::listen`]. When it is
/// dropped it closes, unless it has a callback: then it stays open until [`close`](Self::close).
/// It ends by itself when the worker is to leave.
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
    pub(crate) fn new(worker: Rc<Inner>, id: ListenerId, address: Option<SocketAddr>) -> Self {
        Self {
            worker,
            id,
            address,
            streams: PhantomData,
        }
    }

    /// Closes the listener for this worker; others go on. Connections that were on their way go to
    /// them, and those that the program has stay open.
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

    /// Sets how many connections the program wants to have at a time; `None`, the default, for any
    /// number. While it has as many, the next ones go to other workers, and wait in the kernel's
    /// queue when there are none. The worker no longer counts a connection that it has dropped or
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
    pub fn set_max_connections(&self, most: Option<u64>) {
        self.worker.set_connection_limit(self.id, most);
    }

    /// Lets the worker end although this listener is open: [`Worker::run`] does not wait for it.
    /// Its connections it does wait for.
    ///
    /// Node: `server.unref()`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// let status = worker.listen(8001)?;
    /// status.unref();
    /// # Ok(()) }
    /// ```
    pub fn unref(&self) {
        self.worker.reference(self.id, false);
    }

    /// Undoes [`unref`](Self::unref), which has an example.
    ///
    /// Node: `server.ref()`.
    pub fn ref_(&self) {
        self.worker.reference(self.id, true);
    }
}

impl Listener<TcpStream> {
    /// Returns the address, with the real port where port 0 was asked for. The listener of a
    /// worker that was leaving already when it asked has the address it asked for.
    ///
    /// Node: `server.address()`.
    ///
    /// ```no_run
    /// # fn f(listener: &cluster::Listener) {
    /// println!("http://{}/", listener.local_addr());
    /// # }
    /// ```
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        let nowhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        self.address.unwrap_or(nowhere)
    }
}

impl<S: From<OwnedFd>> Listener<S> {
    /// Waits for the next connection; `None` means that the listener has ended, because the worker
    /// is to leave or has lost its master. Messages, timers, signals and watched descriptors are
    /// served meanwhile.
    ///
    /// Node has no counterpart; there, connections are events. While the program is not in this
    /// call, connections go to other workers; of several listeners without a callback only the one
    /// that it waits for is served. After the end the program can still send messages, and is free
    /// to finish its work; a program that still has connections in its timers or watches, or wants
    /// to see the `disconnect` event, calls [`Worker::run`] then.
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

    /// Calls back for each connection from now on, instead of [`accept`](Self::accept). A second
    /// callback replaces the first. Several connections may be on their way to this worker at a
    /// time, so the callback should not wait: it may [`watch`](Worker::watch) the connection.
    ///
    /// Node: `server.on('connection')`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// use std::io::Write;
    ///
    /// worker.listen("127.0.0.1:8000")?.on_connection(|_, mut connection| {
    ///     let _ = connection.write_all(b"hello and goodbye\n");
    /// });
    /// worker.run()
    /// # }
    /// ```
    pub fn on_connection(&self, mut callback: impl FnMut(&Worker, Connection<S>) + 'static) {
        let with_stream = move |worker: &Worker, connection: Connection<OwnedFd>| {
            callback(worker, connection.cast());
        };
        let callback = Rc::new(RefCell::new(with_stream));
        self.worker.serve(self.id, callback);
    }

    /// Takes the connections beyond the limit of
    /// [`set_max_connections`](Self::set_max_connections), too, instead of leaving them to others,
    /// and calls back for each of them: also when another worker could serve it. The connection is
    /// closed when the callback drops it. A second callback replaces the first. A worker that blocks
    /// takes them while it waits in [`accept`](Self::accept).
    ///
    /// Node: `server.dropMaxConnection` and the event `drop`.
    ///
    /// ```no_run
    /// # fn f(listener: &cluster::Listener) {
    /// use std::io::Write;
    ///
    /// listener.set_max_connections(Some(100));
    /// listener.on_drop(|_, mut connection| {
    ///     let _ = connection.write_all(b"HTTP/1.1 503 Service Unavailable\r\n\r\n");
    /// });
    /// # }
    /// ```
    pub fn on_drop(&self, mut callback: impl FnMut(&Worker, Connection<S>) + 'static) {
        let with_stream = move |worker: &Worker, connection: Connection<OwnedFd>| {
            callback(worker, connection.cast());
        };
        let callback = Rc::new(RefCell::new(with_stream));
        self.worker.drop_excess(self.id, callback);
    }
}

impl<S> Drop for Listener<S> {
    fn drop(&mut self) {
        if !self.worker.has_callback(self.id) {
            self.close();
        }
    }
}

/// The connections of a [`Listener`], one after the other.
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

/// A connection to a client: a [`TcpStream`] or
/// [`UnixStream`](std::os::unix::net::UnixStream) that the worker counts.
///
/// Node: `net.Socket`. It blocks, like any new stream. In [`Worker::run`] and
/// [`Worker::dispatch`] a worker that is to leave waits until all of its connections are dropped.
/// To use one beyond that, or on another thread, take the stream out of it with
/// [`into_stream`](Self::into_stream).
///
/// ```no_run
/// # fn f(mut connection: cluster::Connection) -> std::io::Result<()> {
/// use std::io::{Read, Write};
/// use std::time::Duration;
///
/// connection.set_read_timeout(Some(Duration::from_secs(5)))?;
/// let mut request = [0; 512];
/// let length = connection.read(&mut request)?;
/// connection.write_all(&request[..length])?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Connection<S = TcpStream> {
    // Dropped in this order: the master must not hear of the end before the client does.
    stream: S,
    counted: Counted,
}

/// Tells the worker when its connection is gone.
#[derive(Debug)]
struct Counted {
    worker: Weak<WorkerShell>,
    listener: Option<ListenerId>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.upgrade() {
            worker.connection_closed(self.listener);
        }
    }
}

impl<S> Connection<S> {
    pub(crate) fn new(stream: S, worker: &Rc<WorkerShell>, listener: Option<ListenerId>) -> Self {
        let worker = Rc::downgrade(worker);
        let counted = Counted { worker, listener };
        Self { stream, counted }
    }

    /// Returns the stream, which the worker no longer counts.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(connection: cluster::Connection) {
    /// let stream = connection.into_stream();
    /// std::thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
    /// # }
    /// ```
    #[must_use]
    pub fn into_stream(self) -> S {
        self.stream
    }
}

impl Connection<OwnedFd> {
    fn cast<S: From<OwnedFd>>(self) -> Connection<S> {
        Connection {
            stream: self.stream.into(),
            counted: self.counted,
        }
    }
}

impl<S> Deref for Connection<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.stream
    }
}

impl<S: AsFd> AsFd for Connection<S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl<'a, S> Read for &'a Connection<S>
where
    &'a S: Read,
{
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.stream).read(buffer)
    }
}

impl<'a, S> Write for &'a Connection<S>
where
    &'a S: Write,
{
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&self.stream).write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&self.stream).flush()
    }
}

impl<S: Read> Read for Connection<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl<S: Write> Write for Connection<S> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}
