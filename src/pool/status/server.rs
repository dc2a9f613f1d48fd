//! The status server: its clients, their deadlines, and its part in an upgrade.
//!
//! The master's loop serves the clients, so nothing here waits. If a client's whole request has
//! arrived, the server answers when it accepts the client. The loop then watches the client until
//! the client closes the connection. One timer disconnects the clients that take too long.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{Address, Error, Interest, LoopId, Master, Result, TimerId, WatchId};

use super::super::Pool;
use super::address::StatusAddress;
use super::http;
use super::socket::StatusSocket;

/// Maximum number of clients that are served at the same time. Another client replaces the oldest.
///
/// Each client costs the master a descriptor and about `MAX_REQUEST` bytes, or the unwritten rest
/// of an answer. With a lower number, silent clients replace a slow client sooner. If a client's
/// request has already arrived, the server answers when it accepts the client, so no other client
/// can replace it first. The value is an estimate without a benchmark.
const MAX_CLIENTS: usize = 16;

/// Maximum time between accepting a client and closing the connection.
///
/// With a shorter time, slow clients get no answer. With a longer time, silent clients keep their
/// descriptors longer. The value is an estimate without a benchmark.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum number of clients that are accepted in one iteration of the loop. The others wait for
/// the next iteration. A higher number delays the workers longer, because the loop also serves
/// them. The value is an estimate without a benchmark.
const ACCEPTS_PER_ITERATION: usize = 8;

/// Maximum number of bytes that a client may send after its request. The server reads and discards
/// them. If it closed the connection with unread bytes, the kernel would reset the connection, and
/// the client might lose the answer.
const MAX_DISCARDED: usize = 64 * 1024;

/// Pause after a failed accept, for example because no descriptor is free. With a shorter pause,
/// the loop would nearly spin during a shortage. With a longer pause, clients would wait longer
/// after the shortage has ended.
const BACK_OFF: Duration = Duration::from_millis(100);

impl Pool {
    /// Serves the pool's state over HTTP, for Prometheus, load balancers and operators on the same
    /// machine or in the same container.
    ///
    /// | path | answer |
    /// |---|---|
    /// | `/metrics` | the [status](Self::status) in the text format of Prometheus |
    /// | `/health` | the code 200 if the pool [has a quorum](Self::has_quorum); otherwise the code 503, also during the [`stop_delay`](super::super::PoolOptions::stop_delay). A client that connected before a new master took over receives the code 200 |
    /// | `/status` | the status as a table |
    /// | `/status.json` | the status as a JSON object |
    ///
    /// Returns the address to which clients connect. The server has no access control. It is
    /// therefore either on a loopback port, which all users of the machine can reach, or on a Unix
    /// socket whose file has the mode 0600, which only this user and root can reach.
    ///
    /// Node has no counterpart.
    ///
    /// The master's loop serves the clients until [`Master::run`] returns, also while workers are
    /// disconnecting. The protocol is HTTP/1.0, so each connection gets one answer. The server
    /// never waits for a client. It serves at most 16 clients at the same time, and closes the
    /// oldest connection if there are more. A client has 5 s for its request and the answer
    /// together. The line and the headers of a request may have 8 KiB.
    ///
    /// Reloads do not affect the server. An [upgrade](Self::upgrade) passes the socket to the new
    /// master, which answers as soon as it has taken over. In the old master, `run` then returns
    /// only after its last client has closed the connection or has reached its 5 s. After a stop
    /// without an upgrade, `run` does not wait for clients. Call this method after
    /// [`adopt`](Self::adopt), which receives the old master's sockets. This method may be called
    /// several times, with different addresses.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Io`] if the address is in use or is not allowed. The kind of the reason is
    /// [`ErrorKind::InvalidInput`] if a port is not on a loopback address, or if the path is that
    /// of an abstract Unix socket, which has no file mode. As for all Unix sockets of this crate,
    /// a file that another process has left at the path is not removed. The kind is then
    /// [`ErrorKind::AddrInUse`].
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) -> cluster::Result<()> {
    /// use std::net::Ipv4Addr;
    /// use std::path::Path;
    ///
    /// pool.serve_status(master, (Ipv4Addr::LOCALHOST, 9100))?;
    /// pool.serve_status(master, Path::new("/run/app/status.sock"))?;
    /// # Ok(()) }
    /// ```
    pub fn serve_status(
        &self,
        master: &Master,
        address: impl Into<StatusAddress>,
    ) -> Result<Address> {
        let requested = address.into();
        let failed = |error: io::Error| {
            let error = io::Error::new(error.kind(), format!("{requested}: {error}"));
            Error::io("serve the status")(error)
        };
        let mut inherited = self.0.inherited_status_sockets.borrow_mut();
        let index = inherited
            .iter()
            .position(|socket| socket.serves(&requested));
        let socket = match index {
            Some(index) => inherited.remove(index),
            None => StatusSocket::bind(&requested).map_err(failed)?,
        };
        drop(inherited);
        let address = socket.address().map_err(failed)?;
        let server = Rc::new(StatusServer::new(socket));
        // If an old master serves, start only at the takeover, because the old master answers until
        // then.
        if self.0.old_master.borrow().is_none() {
            server.start(master, self)?;
        }
        self.0.status_servers.borrow_mut().push(server);
        Ok(address)
    }

    /// Serves the status in place of the old master.
    pub(in super::super) fn take_over_status(&self, master: &Master) {
        let servers = self.0.status_servers.borrow().clone();
        for server in servers {
            server.socket.inherit_file();
            server.start_or_back_off(master, self);
        }
        // Close the sockets that this release does not use, and remove their files.
        let unused = self.0.inherited_status_sockets.take();
        unused.iter().for_each(StatusSocket::inherit_file);
    }

    /// Stops accepting clients, and leaves the sockets' files to the new master that serves the
    /// status now. The loop continues to run until the accepted clients are served. Otherwise, a
    /// health check that connected just before the upgrade would fail.
    pub(in super::super) fn release_status(&self, master: &Master) {
        for server in &*self.0.status_servers.borrow() {
            server.stop_accepting(master);
            for client in &*server.clients.borrow() {
                master.reference(client.watch);
            }
            server.socket.release_file();
        }
    }
}

/// A socket on which the status is served, and its clients.
#[derive(Debug)]
pub(in super::super) struct StatusServer {
    socket: StatusSocket,
    /// The watch of the socket, or the timer of the back-off. `None` before this process has taken
    /// over from an old master, and after a new master has taken over.
    accepting: Cell<Option<LoopId>>,
    /// The watched clients, oldest first.
    clients: RefCell<VecDeque<WatchedClient>>,
    last_number: Cell<u64>,
    /// The timer for the deadline of the oldest client. `None` if there are no clients.
    timer: Cell<Option<TimerId>>,
}

#[derive(Debug)]
struct WatchedClient {
    number: u64,
    watch: WatchId,
    deadline: Instant,
}

// Accepting clients.
impl StatusServer {
    /// Returns a copy of the socket for a new master.
    pub(in super::super) fn copy_socket(&self) -> io::Result<OwnedFd> {
        self.socket.try_clone()
    }

    pub(in super::super) fn removes_file(&self) -> bool {
        self.socket.removes_file()
    }

    pub(in super::super) fn has_lost_path(&self) -> bool {
        self.socket.has_lost_path()
    }

    fn new(socket: StatusSocket) -> Self {
        Self {
            socket,
            accepting: Cell::new(None),
            clients: RefCell::default(),
            last_number: Cell::new(0),
            timer: Cell::new(None),
        }
    }

    fn start(self: &Rc<Self>, master: &Master, pool: &Pool) -> Result<()> {
        let source = self.socket.listener();
        let (server, pool) = (Rc::clone(self), pool.clone());
        let on_readable = move |master: &Master, _: &_| server.accept(master, &pool);
        let watch = master.watch(source, Interest::Readable, on_readable)?;
        // Unreference the watch, because the pool and not its status keeps the master running.
        master.unreference(watch);
        self.accepting.set(Some(watch.into()));
        Ok(())
    }

    fn start_or_back_off(self: &Rc<Self>, master: &Master, pool: &Pool) {
        if self.start(master, pool).is_err() {
            self.back_off(master, pool);
        }
    }

    fn back_off(self: &Rc<Self>, master: &Master, pool: &Pool) {
        let (server, pool) = (Rc::clone(self), pool.clone());
        let retry = move |master: &Master| server.start_or_back_off(master, &pool);
        let timer = master.set_timeout(BACK_OFF, retry);
        master.unreference(timer);
        self.accepting.set(Some(timer.into()));
    }

    fn stop_accepting(&self, master: &Master) {
        match self.accepting.take() {
            Some(LoopId::Watch(watch)) => master.unwatch(watch),
            Some(LoopId::Timer(timer)) => master.clear_timer(timer),
            _ => {}
        }
    }

    /// Accepts waiting clients. Returns `None` if the watch must end.
    fn accept(self: &Rc<Self>, master: &Master, pool: &Pool) -> Option<Interest> {
        for _ in 0..ACCEPTS_PER_ITERATION {
            match self.socket.accept() {
                Ok(stream) => self.add(master, pool, stream),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // Try again. The client hung up before it was accepted, or a signal interrupted the
                // call.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.back_off(master, pool);
                    return None;
                }
            }
        }
        Some(Interest::Readable)
    }

    /// Serves a client as far as possible without waiting, and watches it until its connection
    /// closes.
    fn add(self: &Rc<Self>, master: &Master, pool: &Pool, stream: UnixStream) {
        let mut client = Client::Reading(Vec::new());
        let Some(interest) = client.advance(master, pool, &stream) else {
            return;
        };
        let number = self.last_number.get() + 1;
        self.last_number.set(number);
        if self.clients.borrow().len() == MAX_CLIENTS {
            self.remove_oldest(master);
        }
        let (server, pool) = (Rc::clone(self), pool.clone());
        let on_ready = move |master: &Master, stream: &UnixStream| {
            let interest = client.advance(master, &pool, stream);
            if interest.is_none() {
                server.remove(master, number);
            }
            interest
        };
        // If the client cannot be watched, close the connection.
        let Ok(watch) = master.watch(stream, interest, on_ready) else {
            return;
        };
        master.unreference(watch);
        self.clients.borrow_mut().push_back(WatchedClient {
            number,
            watch,
            deadline: Instant::now() + CLIENT_TIMEOUT,
        });
        self.schedule(master);
    }
}

// Removing clients.
impl StatusServer {
    fn remove_oldest(&self, master: &Master) {
        let oldest = self.clients.borrow_mut().pop_front();
        if let Some(client) = oldest {
            master.unwatch(client.watch);
        }
    }

    /// Removes a client whose watch ends because its callback returns `None`.
    fn remove(&self, master: &Master, number: u64) {
        let mut clients = self.clients.borrow_mut();
        clients.retain(|client| client.number != number);
        if clients.is_empty() {
            if let Some(timer) = self.timer.take() {
                master.clear_timer(timer);
            }
        }
    }

    /// Sets the timer for the oldest client's deadline, unless a timer is set. If the timer was set
    /// for a client that has been removed since, it fires too early, and is then set again.
    fn schedule(self: &Rc<Self>, master: &Master) {
        let deadline = self.clients.borrow().front().map(|client| client.deadline);
        let (Some(deadline), None) = (deadline, self.timer.get()) else {
            return;
        };
        let server = Rc::clone(self);
        let wait = deadline.saturating_duration_since(Instant::now());
        let timer = master.set_timeout(wait, move |master| {
            server.timer.set(None);
            server.remove_expired(master);
            server.schedule(master);
        });
        master.unreference(timer);
        self.timer.set(Some(timer));
    }

    fn remove_expired(&self, master: &Master) {
        let now = Instant::now();
        let is_expired = || {
            let clients = self.clients.borrow();
            clients.front().is_some_and(|client| client.deadline <= now)
        };
        while is_expired() {
            self.remove_oldest(master);
        }
    }
}

/// The state of a client.
///
/// | from | input | to |
/// |---|---|---|
/// | `Reading` | the request is complete or invalid | `Writing` |
/// | `Writing` | the answer has been written | `Closing` |
/// | `Reading`, `Closing` | end-of-file | (closed) |
/// | any | an error, the deadline, or a newer client at the limit | (closed) |
#[derive(Debug)]
enum Client {
    /// The bytes that the client has sent of its request.
    Reading(Vec<u8>),
    Writing {
        answer: Vec<u8>,
        written: usize,
    },
    /// The master waits until the client closes the connection.
    Closing {
        discarded: usize,
    },
}

impl Client {
    /// Serves the client until the server would have to wait for it. Returns the readiness to wait
    /// for, or `None` if the connection must close.
    fn advance(
        &mut self,
        master: &Master,
        pool: &Pool,
        mut stream: &UnixStream,
    ) -> Option<Interest> {
        let mut buffer = [0; 4096];
        loop {
            let (done, interest) = match self {
                Self::Reading(_) | Self::Closing { .. } => {
                    (stream.read(&mut buffer), Interest::Readable)
                }
                Self::Writing { answer, written } => {
                    (stream.write(&answer[*written..]), Interest::Writable)
                }
            };
            let count = match done {
                Ok(0) => return None,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Some(interest),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return None,
            };
            match self {
                Self::Reading(received) => {
                    received.extend(&buffer[..count]);
                    if let Some(request) = http::parse(received) {
                        let answer = request.answer(|| pool.status(master));
                        *self = Self::Writing { answer, written: 0 };
                    }
                }
                Self::Writing { answer, written } => {
                    *written += count;
                    if *written == answer.len() {
                        stream.shutdown(Shutdown::Write).ok()?;
                        *self = Self::Closing { discarded: 0 };
                    }
                }
                Self::Closing { discarded } => {
                    *discarded += count;
                    if *discarded > MAX_DISCARDED {
                        return None;
                    }
                }
            }
        }
    }
}
