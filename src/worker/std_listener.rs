//! Listeners and connections for servers of other crates.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use crate::error::{Error, Result};
use crate::sys::listen::Family;
use crate::worker::listener::Listener;

impl Listener<TcpStream> {
    /// Returns the listening socket, for a server that accepts connections itself, on its own
    /// threads. The socket blocks.
    ///
    /// Node has no counterpart: in Node, every server accepts in the loop.
    ///
    /// The worker does not call the server. Run the server on a thread, and
    /// [`run`](crate::Worker::run) the worker meanwhile, so that it receives the disconnect
    /// request. When the worker disconnects, `accept` fails with EINVAL from then on, also in
    /// threads that wait in it. The other workers, which share the socket, are not affected, and
    /// connections in the backlog go to them, or to this worker if no other is left. `run` returns
    /// when all connections of the listener are closed, whichever thread has them. Then join the
    /// server's thread.
    ///
    /// The server must not close the socket before `accept` fails. Otherwise, if it closes the
    /// socket at the moment of the disconnect and opens another descriptor that gets the same
    /// number, the other descriptor is replaced.
    ///
    /// Requirements and limits:
    ///
    /// - The scheduling policy must be [`Shared`](crate::SchedulingPolicy::Shared) or
    ///   [`Sharded`](crate::SchedulingPolicy::Sharded), or the listener
    ///   [private](crate::ListenOptions::exclusive). With round robin, only the master accepts. Use
    ///   [`streams`](Self::streams).
    /// - With the shared policy, all workers must use the listener in this way. A worker with a
    ///   connection callback makes the socket non-blocking for all workers.
    /// - Unless the master retains the listener ([`Master::listen`](crate::Master::listen), or a
    ///   pool), the last workers to disconnect make the socket non-blocking. `accept` then fails
    ///   with [`WouldBlock`](io::ErrorKind::WouldBlock) when the backlog is empty.
    /// - The worker does not count connections before it disconnects, so
    ///   [`set_max_connections`](Self::set_max_connections) and [`Master::loads`] do not include
    ///   them.
    /// - [`wait_for_data`](crate::ListenOptions::wait_for_data) has no effect, except that on Linux,
    ///   the kernel holds the connections of shared and private TCP listeners.
    /// - A server that ignores the errors of `accept` repeats the call until the process exits.
    /// - On Linux, the call of a waiting thread is interrupted by SIGURG, which the thread must not
    ///   block. If /proc is not readable, and on other systems, the thread leaves the call when it
    ///   receives the next connection, which it still serves.
    ///
    /// [`Master::loads`]: crate::Master::loads
    ///
    /// # Errors
    ///
    /// Returns [`Error::Io`] with the kind [`Unsupported`](io::ErrorKind::Unsupported) for a
    /// listener with round robin, or if no descriptor is free. The listener is then closed.
    ///
    /// ```no_run
    /// # fn serve(_: std::net::TcpListener) {}
    /// # fn f(worker: cluster::Worker) -> cluster::Result<()> {
    /// let listener = worker.listen(8000)?.into_std()?;
    /// let server = std::thread::spawn(move || serve(listener));
    /// worker.run()?;
    /// let _ = server.join();
    /// # Ok(()) }
    /// ```
    pub fn into_std(self) -> Result<TcpListener> {
        self.std_copy(Family::Internet).map(TcpListener::from)
    }
}

impl Listener<UnixStream> {
    /// Returns the listening socket, for a server that accepts connections itself.
    ///
    /// See [`Listener::<TcpStream>::into_std`](Listener::into_std).
    ///
    /// # Errors
    ///
    /// Returns the same errors.
    pub fn into_std(self) -> Result<UnixListener> {
        self.std_copy(Family::Unix).map(UnixListener::from)
    }
}

impl<S> Listener<S> {
    fn std_copy(&self, family: Family) -> Result<OwnedFd> {
        self.worker.event_loop.check_own()?;
        self.worker.shell.std_listener(self.id, family)
    }

    /// Returns an iterator that yields the connections as plain streams, for servers that take such
    /// an iterator. It ends when the listener ends.
    ///
    /// Node has no counterpart.
    ///
    /// The iterator calls [`accept`](Self::accept) and works with every scheduling policy. The
    /// streams can be moved to other threads. The worker does not count them before it disconnects,
    /// so [`set_max_connections`](Self::set_max_connections) and
    /// [`Master::loads`](crate::Master::loads) do not include them. To count them from the start,
    /// use [`Connection::into_parts`](crate::Connection::into_parts).
    ///
    /// A worker that disconnects in [`run`](crate::Worker::run) waits until the streams are closed.
    ///
    /// ```no_run
    /// # struct Server;
    /// # impl Server { fn serve(self, _: impl Iterator<Item = std::net::TcpStream>) {} }
    /// # fn f(worker: cluster::Worker, server: Server) -> cluster::Result<()> {
    /// let listener = worker.listen(8000)?;
    /// server.serve(listener.streams().map_while(Result::ok));
    /// worker.run()
    /// # }
    /// ```
    #[must_use]
    pub fn streams(&self) -> Streams<'_, S> {
        Streams(self)
    }
}

/// An iterator over the connections of a [`Listener`] as plain streams. Each item has the type of
/// [`std::net::Incoming`]'s items.
///
/// Node has no counterpart.
///
/// [`Listener::streams`] returns this iterator, and has an example.
#[derive(Debug)]
pub struct Streams<'a, S = TcpStream>(&'a Listener<S>);

impl<S: AsFd + From<OwnedFd>> Iterator for Streams<'_, S> {
    type Item = io::Result<S>;

    fn next(&mut self) -> Option<Self::Item> {
        let accepted = self.0.accept().transpose()?;
        Some(accepted.map_err(into_io_error).map(|connection| {
            let stream = connection.into_stream();
            self.0.worker.shell.stream_taken(stream.as_fd());
            stream
        }))
    }
}

fn into_io_error(error: Error) -> io::Error {
    match error.raw_os_error() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::other(error),
    }
}
