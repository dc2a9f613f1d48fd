//! A client connection that the worker counts.

use std::cell::Cell;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::{Rc, Weak};

use crate::sys;
use crate::worker::guard::ConnectionGuard;
use crate::worker::shell::{Origin, Registration, StreamOptions};
use crate::worker::{Inner, finish};

/// A connection to a client: a [`TcpStream`] or [`UnixStream`] that the worker tracks.
///
/// Node: `net.Socket`.
///
/// Reading and writing continue after a signal, even if the stream has a timeout, which then starts
/// again. The methods of the stream itself, and a stream that was taken out of the connection, return
/// [`Interrupted`](io::ErrorKind::Interrupted) in this case.
///
/// Like any new stream, a connection blocks. A worker that is disconnecting in
/// [`Worker::run`](crate::Worker::run) or [`Worker::dispatch`](crate::Worker::dispatch) keeps its
/// channel open until all of its connections are dropped.
///
/// Dropping a connection closes it. If the client has sent bytes that the worker has not read, the
/// system then resets the connection, and the client may lose the answer.
/// [`finish`](Self::finish) prevents this loss.
///
/// A connection is not `Send`, because the worker tracks it on its own thread. To serve the stream
/// on another thread, use [`into_parts`](Self::into_parts). To use it for longer than the worker
/// exists, take it out with [`into_stream`](Self::into_stream).
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
/// connection.finish();
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Connection<S = TcpStream> {
    // Keep `stream` before `counted`, because fields are dropped in this order. The stream must be
    // closed before `counted` notifies the worker, which notifies the master.
    stream: S,
    counted: Counted,
    options: Cell<StreamOptions>,
}

/// A guard that notifies the worker when its connection is dropped.
#[derive(Debug)]
struct Counted {
    worker: Weak<Inner>,
    origin: Origin,
}

impl Counted {
    /// Returns the guard's parts. The guard no longer notifies the worker.
    fn disarm(mut self) -> (Weak<Inner>, Origin) {
        (std::mem::take(&mut self.worker), self.origin)
    }

    /// Ends the poller's registration of a connection that was parked, and its interrupts of
    /// accept(2).
    fn unregister(&self) {
        let Some(registration) = self.origin.registration else {
            return;
        };
        match self.worker.upgrade() {
            Some(worker) => worker.shell.unregister(registration),
            None => Registration::stop_interrupts(registration),
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.upgrade() {
            worker.shell.connection_closed(self.origin.listener);
            worker.shell.forget(&self.origin);
        }
    }
}

impl<S> Connection<S> {
    pub(super) fn new(stream: S, worker: &Rc<Inner>, origin: Origin) -> Self {
        let worker = Rc::downgrade(worker);
        let counted = Counted { worker, origin };
        let options = Cell::new(StreamOptions::Unchanged);
        Self {
            stream,
            counted,
            options,
        }
    }

    /// Returns the number of times that the application has received this connection, in any
    /// worker: 1 for a new connection, and 1 more each time it has been [parked](Self::park).
    ///
    /// Node has no counterpart.
    ///
    /// An application can use the number to limit the requests of one connection. It decides before
    /// it answers, so that the answer can tell the client whether the connection stays open:
    ///
    /// ```no_run
    /// # fn f(connection: &cluster::Connection) -> &'static str {
    /// let keeps_alive = connection.can_park() && connection.requests() < 1000;
    /// if keeps_alive { "" } else { "Connection: close\r\n" }
    /// # }
    /// ```
    #[must_use]
    pub fn requests(&self) -> u64 {
        u64::from(self.counted.origin.times_parked) + 1
    }

    /// Returns the stream, which the worker no longer counts.
    ///
    /// Node has no counterpart.
    ///
    /// A worker that disconnects does not wait for the stream, so the client may lose its answer in
    /// a reload. Use this method for streams that stay open although the worker disconnects, such
    /// as those that are sent to another process. To serve a stream on a thread, use
    /// [`into_parts`](Self::into_parts).
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker, connection: cluster::Connection) -> cluster::Result<()> {
    /// // Let the master choose another worker for this client.
    /// let stream = connection.into_stream();
    /// let _ = worker.send_with_fds(b"not for me", vec![stream.into()])?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn into_stream(self) -> S {
        self.counted.unregister();
        self.stream
    }

    /// Returns the stream, and a guard that keeps the connection counted until it is dropped. Both
    /// can be moved to another thread.
    ///
    /// Node has no counterpart.
    ///
    /// A worker that disconnects in [`Worker::run`](crate::Worker::run) or
    /// [`Worker::dispatch`](crate::Worker::dispatch) waits for the guard. An application that calls
    /// `accept` should call `run` afterwards. Otherwise, the process exits at the end of `main`,
    /// and all threads with it. See [`ConnectionGuard`] for the other effects.
    ///
    /// A thread for each connection:
    ///
    /// ```no_run
    /// # fn serve(_: std::net::TcpStream, _: cluster::DisconnectToken) {}
    /// # fn f(worker: cluster::Worker) -> cluster::Result<()> {
    /// let listener = worker.listen(8000)?;
    /// listener.set_max_connections(Some(100));
    /// for connection in listener.incoming() {
    ///     let (stream, guard) = connection?.into_parts();
    ///     let token = worker.disconnect_token();
    ///     std::thread::spawn(move || {
    ///         // Make the thread own the guard until the stream is closed.
    ///         let _guard = guard;
    ///         serve(stream, token);
    ///     });
    /// }
    /// // The worker is disconnecting. Wait for the threads.
    /// worker.run()
    /// # }
    /// ```
    pub fn into_parts(self) -> (S, ConnectionGuard) {
        let Self {
            stream, counted, ..
        } = self;
        counted.unregister();
        let (worker, origin) = counted.disarm();
        let worker = worker.upgrade();
        if let Some(worker) = &worker {
            worker.shell.detach(&origin);
        }
        (stream, ConnectionGuard::new(worker, origin.listener))
    }
}

impl<S> Connection<S> {
    /// Returns whether the connection can be [parked](Self::park): it comes from a listener, and
    /// the channel is open. In a stop, the process that holds the connection may nevertheless
    /// close it.
    ///
    /// Node has no counterpart.
    ///
    /// Call this method before the answer to a request, so that the answer can tell the client
    /// whether the connection stays open. See [`requests`](Self::requests) for an example.
    #[must_use]
    pub fn can_park(&self) -> bool {
        let worker = self.counted.worker.upgrade();
        worker.is_some_and(|worker| worker.shell.can_park(&self.counted.origin))
    }
}

impl<S: Into<OwnedFd>> Connection<S> {
    /// Gives the connection back until its client sends something. The application then receives it
    /// again from [`accept`](crate::Listener::accept), [`incoming`](crate::Listener::incoming) or
    /// the connection callback, perhaps in another worker.
    ///
    /// Node: an idle keep-alive connection of an `http.Server`. In Node, such a connection belongs
    /// to its worker, and closes with it.
    ///
    /// An application that has answered a request parks the connection, instead of waiting for the
    /// next request itself. A worker then has a connection only while it works on it, and idle
    /// clients occupy no worker.
    ///
    /// With round robin, the master holds parked connections. It dispatches each request like a new
    /// connection, to an idle worker if there is one. Idle connections stay open when workers
    /// disconnect or crash, and when an [upgrade](crate::pool::Pool::upgrade) replaces the master.
    ///
    /// With the other policies, the worker holds them itself, so each request goes to the same
    /// worker. When the worker disconnects or closes the listener, its idle connections go to the
    /// other workers of the listener. While there are none, the master holds the connections. In an
    /// upgrade, they go to the workers of the new master. If the worker crashes, its idle
    /// connections close. On a
    /// [private listener](crate::ListenOptions::exclusive), they also close when the worker
    /// disconnects. A connection from [`Worker::adopt`](crate::Worker::adopt) cannot be parked, and
    /// closes.
    ///
    /// A worker may keep a copy of the connection, so the connection goes only to workers that have
    /// the same user and group ([`Settings::uid`](crate::Settings::uid())). If all workers that serve
    /// the listener have other ones, the connection closes.
    ///
    /// The process that holds a parked connection closes it when the client hangs up, when the
    /// client has been silent for
    /// [`ListenOptions::idle_timeout`](crate::ListenOptions::idle_timeout), when the process holds
    /// too many connections, and when the listener closes. The master's maximum is
    /// [`Master::set_max_parked`](crate::Master::set_max_parked). The maximum of a worker is half
    /// of its descriptor limit. Beyond the maximum, the connection that expires first is closed.
    /// The process checks for a request right before it closes a connection whose time is over or
    /// that is beyond the maximum. If a request arrives after this check, the client has to send it
    /// again, as with any server that closes idle connections.
    ///
    /// Bytes that the application has read but not processed are lost. Before you park a
    /// connection, answer all requests that were read completely, and read the rest of an
    /// incomplete one. When the application receives the connection again, the connection counts
    /// for [`set_max_connections`](crate::Listener::set_max_connections) again, and the stream
    /// blocks and has no timeouts, like a new one. Other socket options stay as they were. State
    /// that the application keeps for the connection, such as a TLS session, does not move with it.
    /// Do not park a connection that has such state, or of whose stream the application keeps a
    /// copy.
    ///
    /// ```no_run
    /// # fn f(listener: cluster::Listener) -> cluster::Result<()> {
    /// use std::io::{Read, Write};
    ///
    /// for connection in listener.incoming() {
    ///     let mut connection = connection?;
    ///     // Each request of this protocol has 4 bytes, so nothing is read ahead.
    ///     let mut request = [0; 4];
    ///     if connection.read_exact(&mut request).is_ok() && connection.write_all(b"pong").is_ok() {
    ///         connection.park();
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    pub fn park(self) {
        let Self {
            stream,
            counted,
            options,
        } = self;
        let (worker, origin) = counted.disarm();
        if let Some(worker) = worker.upgrade() {
            worker.shell.park(stream.into(), &origin, options.get());
        }
    }
}

impl<S: AsFd + 'static> Connection<S> {
    /// Closes the connection once the client has closed it, so that the client receives everything
    /// that was written.
    ///
    /// Node: `socket.end()`.
    ///
    /// The method shuts down the sending direction: after the answer, the client reads end-of-file.
    /// The worker then reads and discards what the client still sends, such as the body of a
    /// request, until the client closes the connection (RFC 9112, section 9.6). This takes one
    /// round trip if the client closes at the end of the answer. The connection is closed in any
    /// case when
    ///
    /// - 5 seconds have passed since the call (up to 6, because the connections that expire in the
    ///   same second are closed together),
    /// - 64 MiB have been discarded, or
    /// - the worker holds too many finished and [parked](Self::park) connections, and this one
    ///   expires first. The maximum is half of the worker's descriptor limit.
    ///
    /// Outside a callback, the call waits for at most 1 millisecond, which is long enough for most
    /// clients on the same network. After the call, the worker reads while it waits in `accept`,
    /// `run` or `dispatch`, and the worker's other clients do not wait. If the worker does not wait
    /// there for 5 seconds, because it is busy, the time starts again. The connection no longer
    /// counts for [`set_max_connections`](crate::Listener::set_max_connections) and
    /// [`loads`](crate::Master::loads).
    ///
    /// A worker that disconnects keeps its channel open until its finished connections are closed.
    /// When the application drops the [`Worker`](crate::Worker) and its listeners, the last drop
    /// waits for them, for at most 5 seconds. If the process exits without these drops, or if the
    /// channel closes, they are closed at once.
    ///
    /// In a child that the application has forked, after the channel has closed, and, outside a
    /// callback, for a connection from [`Worker::adopt`](crate::Worker::adopt), the call itself
    /// waits until the end. A client that sends nothing for 1 second is then disconnected.
    ///
    /// The stream's timeouts have no effect, and the stream may be blocking or non-blocking.
    ///
    /// The method returns no error, because the worker can do nothing more for the connection.
    ///
    /// ```no_run
    /// # fn f(listener: cluster::Listener) -> cluster::Result<()> {
    /// use std::io::Write;
    ///
    /// for connection in listener.incoming() {
    ///     let mut connection = connection?;
    ///     let _ = connection.write_all(b"hello world\n");
    ///     connection.finish();
    /// }
    /// # Ok(()) }
    /// ```
    pub fn finish(self) {
        // A failure means that the client has already closed or reset the connection.
        if sys::socket::shutdown_write(self.as_fd()).is_err() {
            return;
        }
        let worker = self.counted.worker.upgrade();
        let Some(worker) = worker.filter(|worker| worker.shell.can_linger()) else {
            return finish::wait(self.as_fd());
        };
        let mut bytes_left = finish::DISCARD_MAX;
        if !worker.event_loop.is_running() {
            if self.counted.origin.listener.is_none() {
                // The application need not wait for the worker again, so nothing would read.
                return finish::wait(self.as_fd());
            }
            if !finish::wait_briefly(self.as_fd(), &mut bytes_left) {
                return;
            }
        }
        let Self {
            stream, counted, ..
        } = self;
        let (_, origin) = counted.disarm();
        worker.shell.linger(Box::new(stream), &origin, bytes_left);
    }
}

impl Connection<OwnedFd> {
    pub(super) fn cast<S: From<OwnedFd>>(self) -> Connection<S> {
        Connection {
            stream: self.stream.into(),
            counted: self.counted,
            options: self.options,
        }
    }
}

impl<S> Deref for Connection<S> {
    type Target = S;

    fn deref(&self) -> &S {
        self.options.set(StreamOptions::Unknown);
        &self.stream
    }
}

impl<S: AsFd> AsFd for Connection<S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.options.set(StreamOptions::Unknown);
        self.stream.as_fd()
    }
}

/// Implements reading and writing for references to connections.
///
/// One implementation for all `S` with `&S: Read` would be recursive without end, because `S` may
/// be another `Connection`. Type inference would overflow (E0275) even in code that does not use
/// connections.
macro_rules! read_and_write_by_reference {
    ($($stream:ty),*) => {$(
        impl Read for &Connection<$stream> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                uninterrupted(|| (&self.stream).read(buffer))
            }

            fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
                uninterrupted(|| (&self.stream).read_vectored(buffers))
            }
        }

        impl Write for &Connection<$stream> {
            fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
                uninterrupted(|| (&self.stream).write(buffer))
            }

            fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
                uninterrupted(|| (&self.stream).write_vectored(buffers))
            }

            fn flush(&mut self) -> io::Result<()> {
                (&self.stream).flush()
            }
        }
    )*};
}

read_and_write_by_reference!(TcpStream, UnixStream);

impl<S: Read> Read for Connection<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        uninterrupted(|| self.stream.read(buffer))
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        uninterrupted(|| self.stream.read_vectored(buffers))
    }
}

impl<S: Write> Write for Connection<S> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        uninterrupted(|| self.stream.write(buffer))
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        uninterrupted(|| self.stream.write_vectored(buffers))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// Repeats a call that a signal has interrupted. If the stream has a timeout, every signal handler
/// interrupts the call, and so does SIGCONT (signal(7)).
fn uninterrupted(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_byte<R>(source: &R) -> io::Result<u8>
    where
        for<'a> &'a R: Read,
    {
        let (mut source, mut byte) = (source, [0]);
        source.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    fn copy_byte<R>(source: &R) -> io::Result<()>
    where
        for<'a> &'a R: Read + Write,
    {
        // This call must compile. If one implementation of `Read` covered all `&Connection<S>`,
        // type inference would overflow here (E0275). See `read_and_write_by_reference`.
        let byte = read_byte(source)?;
        (&mut { source }).write_all(&[byte])
    }

    #[test]
    fn only_access_to_the_stream_itself_can_change_options() {
        fn has_access(use_connection: impl Fn(&mut Connection<UnixStream>)) -> bool {
            let (stream, mut far) = UnixStream::pair().unwrap();
            far.write_all(b"request").unwrap();
            let mut connection = Connection {
                stream,
                counted: Counted {
                    worker: Weak::new(),
                    origin: Origin::default(),
                },
                options: Cell::new(StreamOptions::Unchanged),
            };
            use_connection(&mut connection);
            connection.options.get() == StreamOptions::Unknown
        }
        assert!(!has_access(|connection| {
            connection.read_exact(&mut [0]).unwrap();
            connection.write_all(b"answer").unwrap();
            copy_byte(&*connection).unwrap();
        }));
        assert!(!has_access(|connection| {
            let [mut first, mut second] = [[0; 2]; 2];
            let buffers = &mut [&mut first, &mut second].map(|buffer| IoSliceMut::new(buffer));
            assert_eq!(connection.read_vectored(buffers).unwrap(), 4);
            assert_eq!((&*connection).read_vectored(buffers).unwrap(), 3);
            let buffers = [&b"an"[..], b"swer"].map(IoSlice::new);
            assert_eq!(connection.write_vectored(&buffers).unwrap(), 6);
            assert_eq!((&*connection).write_vectored(&buffers).unwrap(), 6);
        }));
        assert!(has_access(|connection| connection
            .set_nonblocking(true)
            .unwrap()));
        assert!(has_access(|connection| {
            sys::fd::set_nonblocking(connection.as_fd(), true).unwrap();
        }));
        assert!(has_access(|connection| drop(connection.try_clone())));
    }

    #[test]
    fn generic_helpers_take_references_to_connections() {
        let _: fn(&Connection<TcpStream>) -> io::Result<()> = copy_byte;
        let _: fn(&Connection<UnixStream>) -> io::Result<()> = copy_byte;
        let (near, far) = UnixStream::pair().unwrap();
        (&near).write_all(b"x").unwrap();
        copy_byte(&far).unwrap();
        assert_eq!(read_byte(&near).unwrap(), b'x');
    }
}
