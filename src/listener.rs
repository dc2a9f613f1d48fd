//! Where a worker's connections come from, and the connections.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::{Rc, Weak};

use crate::error::Result;
use crate::worker::{Inner, Worker};
use crate::worker_core::ListenerId;
use crate::worker_shell::WorkerShell;

/// What a worker listens on, together with others.
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
pub struct Listener {
    worker: Rc<Inner>,
    id: ListenerId,
    address: SocketAddr,
}

impl Listener {
    pub(crate) fn new(worker: Rc<Inner>, id: ListenerId) -> Self {
        let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        Self {
            worker,
            id,
            address,
        }
    }

    pub(crate) fn at(mut self, address: SocketAddr) -> Self {
        self.address = address;
        self
    }

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
        self.address
    }

    /// Waits for the next connection; `None` means that the listener has ended, because the worker
    /// is to leave or has lost its master. Messages, timers, signals and watched descriptors are
    /// served meanwhile.
    ///
    /// Node has no counterpart; there, connections are events. While the program is not in this
    /// call, connections go to other workers; of several listeners only the one that it waits for
    /// is served. After the end the program can still send messages, and is free to finish its
    /// work; a program that wants to see the `disconnect` event calls [`Worker::run`] then.
    ///
    /// # Errors
    ///
    /// - [`Error::AlreadyRunning`](crate::Error::AlreadyRunning) if a callback calls it;
    /// - [`Error::Io`](crate::Error::Io) if the system refuses to wait or to accept.
    ///
    /// See [`Listener`] for an example.
    pub fn accept(&self) -> Result<Option<Connection>> {
        Worker::accept(&self.worker, self.id)
    }

    /// Returns an iterator over the connections, which ends when the listener does.
    ///
    /// Node has no counterpart. It calls [`accept`](Self::accept). See [`Worker`] for an example.
    #[must_use]
    pub fn incoming(&self) -> Incoming<'_> {
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
    pub fn on_connection(&self, callback: impl FnMut(&Worker, Connection) + 'static) {
        self.worker.serve(self.id, Rc::new(RefCell::new(callback)));
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
}

impl Drop for Listener {
    fn drop(&mut self) {
        let served = self.worker.shell.core.borrow().is_served(self.id);
        if !served {
            self.close();
        }
    }
}

/// The connections of a [`Listener`], one after the other.
///
/// Node has no counterpart. It comes from [`Listener::incoming`]. See [`Worker`] for an example.
#[derive(Debug)]
pub struct Incoming<'a>(&'a Listener);

impl Iterator for Incoming<'_> {
    type Item = Result<Connection>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.accept().transpose()
    }
}

/// A connection to a client: a [`TcpStream`] that the worker counts.
///
/// Node: `net.Socket`. It blocks, like any new `TcpStream`. In [`Worker::run`] and
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
pub struct Connection {
    // Dropped in this order: the master must not hear of the end before the client does.
    stream: TcpStream,
    _counted: Counted,
}

/// Tells the worker when its connection is gone.
#[derive(Debug)]
struct Counted(Weak<WorkerShell>);

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(worker) = self.0.upgrade() {
            worker.connection_closed();
        }
    }
}

impl Connection {
    pub(crate) fn new(fd: OwnedFd, worker: &Rc<WorkerShell>) -> Self {
        Self {
            stream: fd.into(),
            _counted: Counted(Rc::downgrade(worker)),
        }
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
    pub fn into_stream(self) -> TcpStream {
        self.stream
    }
}

impl Deref for Connection {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.stream
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Read for &Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.stream).read(buffer)
    }
}

impl Write for &Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&self.stream).write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&self.stream).flush()
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}
