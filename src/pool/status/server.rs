//! The status server: its clients, their deadlines, and its part in an upgrade.
//!
//! The master's loop serves the clients, so nothing here waits. A client that sends its whole
//! request is answered at once. Every other client is watched until it has sent the rest and has
//! read the answer. One timer ends the clients that take too long.

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
/// Each client costs the master a descriptor and up to `MAX_REQUEST` bytes. With a lower number,
/// silent clients replace a slow client sooner. A client that sends its request at once is answered
/// when it is accepted, so no other client can replace it first.
const MAX_CLIENTS: usize = 16;

/// Time after which a client is disconnected, whatever it does. It is the longest time that a
/// status may be under way: with a shorter time, slow clients get no answer, and with a longer one,
/// silent clients keep their descriptors longer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum number of clients that are accepted in one iteration of the loop. The others wait for
/// the next iteration, in which the loop also serves the workers.
const ACCEPTS_PER_ITERATION: usize = 8;

/// Maximum number of bytes that a client may send after its request. The master discards them,
/// because it would otherwise reset the connection, and the client might lose the answer.
const MAX_DISCARDED: usize = 64 * 1024;

/// Pause after an accept that failed, for example because no descriptor is free. During a shorter
/// pause, the loop would nearly spin.
const BACK_OFF: Duration = Duration::from_millis(100);

impl Pool {
    /// Serves the pool's state over HTTP, for Prometheus, load balancers and operators.
    ///
    /// | path | answer |
    /// |---|---|
    /// | `/metrics` | the [status](Self::status) in the text format of Prometheus |
    /// | `/health` | the code 200 if the pool [has a quorum](Self::has_quorum); the code 503 if not, and from the call of [`stop`](Self::stop) on |
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
    /// disconnecting. `run` does not wait for clients. The answers are those of HTTP/1.0: one for
    /// each connection. The server never waits for a client. It serves at most 16 clients at the
    /// same time, and closes the oldest connection if there are more. A client has 5 s for its
    /// request and the answer together. A request may have 8 KiB.
    ///
    /// Reloads do not affect the server. An [upgrade](Self::upgrade) passes the socket to the new
    /// master, which answers as soon as it has taken over. Call this method after
    /// [`adopt`](Self::adopt). It may be called several times, with different addresses.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Io`] if the address is in use or is not allowed. The kind of the reason is
    /// [`ErrorKind::InvalidInput`] if a port is not on a loopback address, or if the path is that of
    /// an abstract Unix socket, which has no file mode. As for all Unix sockets of this crate, a
    /// file that another process has left at the path is not removed, and the reason is then
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
            Error::io("serve the status on")(error)
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
        // Until this process takes over, its old master answers.
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

    /// Leaves the status to a new master.
    pub(in super::super) fn release_status(&self, master: &Master) {
        for server in &*self.0.status_servers.borrow() {
            server.stop_accepting(master);
            server.socket.release_file();
        }
    }
}

/// A socket on which the status is served, and the clients that are waiting.
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
                // The client has hung up, or a signal has arrived.
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

    /// Serves a client, and watches it if it cannot be served completely at once.
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
        // Drop the client if it cannot be watched.
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

// Ending clients.
impl StatusServer {
    fn remove_oldest(&self, master: &Master) {
        let oldest = self.clients.borrow_mut().pop_front();
        if let Some(client) = oldest {
            master.unwatch(client.watch);
        }
    }

    /// Removes a client whose watch ends by itself.
    fn remove(&self, master: &Master, number: u64) {
        let mut clients = self.clients.borrow_mut();
        clients.retain(|client| client.number != number);
        if clients.is_empty() {
            if let Some(timer) = self.timer.take() {
                master.clear_timer(timer);
            }
        }
    }

    /// Sets the timer for the oldest client's deadline, unless a timer is set. A timer for a client
    /// that has been removed is too early for the oldest one, and is then set again.
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
    /// What the client has sent of its request.
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
    /// Continues until the client must be waited for. Returns `None` if the connection must close.
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
