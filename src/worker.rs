//! The worker as the program sees it: its methods, its callbacks, and how its loop turns.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::net::ToSocketAddrs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use crate::callbacks::{CallbackId, Callbacks, Shared};
use crate::error::{Error, Result};
use crate::event_loop::{EventLoop, Token, WatchId};
use crate::listener::{Connection, Listener};
use crate::message::Message;
use crate::signal::Signal;
use crate::sys::poll::Interest;
use crate::timers::TimerId;
use crate::worker_core::{Event, Listen, ListenerId};
use crate::worker_id::WorkerId;
use crate::worker_shell::WorkerShell;

/// How many connections one shared listener accepts in a turn.
const ACCEPT_BATCH: u32 = 16;
/// How long a shared listener rests when accepting failed, for instance without descriptors left.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// The process that a master forked: this one.
///
/// Node: `cluster.worker`. It comes from [`init`](crate::init), and can be used in three ways:
///
/// - *blocking*: [`listen`](Self::listen), then [`Listener::accept`] or [`Listener::incoming`];
///   messages, timers and the request to leave are served while it waits;
/// - *with callbacks*: [`Listener::on_connection`], [`watch`](Self::watch), then
///   [`run`](Self::run);
/// - *embedded* in the program's own loop: the same callbacks, with [`AsFd`],
///   [`time_left`](Self::time_left) and [`dispatch`](Self::dispatch).
///
/// All methods can be called at any time, by callbacks too, unless they say otherwise. When the
/// master is gone, `accept` and `run` come to an end, as when the worker is told to leave; on
/// Linux the kernel also kills the worker then, in case it is stuck.
///
/// ```no_run
/// # fn serve(_: cluster::Connection) {}
/// # fn f(worker: cluster::Worker) -> cluster::Result<()> {
/// let listener = worker.listen("127.0.0.1:8000")?;
/// for connection in listener.incoming() {
///     serve(connection?);
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Worker {
    inner: Rc<Inner>,
    /// The program's own, and not the one by which `accept` calls it back.
    is_owner: bool,
}

type OnMessage = dyn FnMut(&Worker, &Message);
type OnDisconnect = dyn FnMut(&Worker);
type OnError = dyn FnMut(&Worker, &Error);
pub(crate) type OnConnection = dyn FnMut(&Worker, Connection);

/// All of a worker: its listeners share it.
pub(crate) struct Inner {
    id: WorkerId,
    pub(crate) shell: Rc<WorkerShell>,
    home: EventLoop<Worker>,
    on_connection: RefCell<BTreeMap<ListenerId, Shared<OnConnection>>>,
    /// `accept` has found the poller ready and has not looked yet.
    poller_waits: Cell<bool>,
    on_message: Callbacks<OnMessage>,
    on_disconnect: Callbacks<OnDisconnect>,
    on_error: Callbacks<OnError>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Worker {
    pub(crate) fn new(id: WorkerId, channel: UnixStream) -> Result<Self> {
        let home = EventLoop::new()?;
        let shell = WorkerShell::new(channel, home.poller().clone());
        let inner = Inner {
            id,
            shell: Rc::new(shell.map_err(Error::io("wait for the channel"))?),
            home,
            on_connection: RefCell::default(),
            poller_waits: Cell::new(false),
            on_message: Callbacks::default(),
            on_disconnect: Callbacks::default(),
            on_error: Callbacks::default(),
        };
        Ok(Self {
            inner: Rc::new(inner),
            is_owner: true,
        })
    }

    /// Returns the number of this worker, which no other worker of the same master has or had.
    ///
    /// Node: `cluster.worker.id`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) {
    /// println!("I am worker #{}", worker.id());
    /// # }
    /// ```
    #[must_use]
    pub fn id(&self) -> WorkerId {
        self.inner.id
    }

    /// Listens on a TCP address together with all workers that ask for the same one.
    ///
    /// Node: `server.listen()`. The master binds the address when the first worker asks and closes
    /// it when the last one has left it. Port 0 is any free port, and the same one for the first
    /// `listen` of every worker, another one for the second. If the argument stands for several
    /// addresses, the first that can be had is taken; for all of the machine's addresses write
    /// `"[::]:8000"` or `"0.0.0.0:8000"`. This waits for the master's answer.
    ///
    /// A worker that has been told to leave, or whose master is gone, gets a listener that has
    /// ended, so that its program comes to its end.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] with the system's reason if the address is in use, not allowed or cannot
    /// be resolved. Nothing of it remains, and a later try may succeed.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// let http = worker.listen("[::]:80")?;
    /// println!("listening on {}", http.local_addr());
    /// # Ok(()) }
    /// ```
    pub fn listen(&self, address: impl ToSocketAddrs + std::fmt::Debug) -> Result<Listener> {
        let failed = |source| Error::Listen {
            address: format!("{address:?}").trim_matches('"').to_owned(),
            source,
        };
        let addresses = address.to_socket_addrs().map_err(failed)?;
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in addresses {
            let id = self.inner.shell.core.borrow_mut().listen(address);
            let listener = Listener::new(Rc::clone(&self.inner), id);
            let outcome = loop {
                self.inner.shell.act();
                let outcome = self.inner.shell.core.borrow().listen_result(id);
                if outcome != Listen::Pending {
                    break outcome;
                }
                self.inner.shell.wait_for_channel()?;
            };
            match outcome {
                Listen::Done(address) => {
                    self.inner.shell.core.borrow_mut().listening(id);
                    self.inner.shell.act();
                    return Ok(listener.at(address));
                }
                Listen::Failed(errno) => last = io::Error::from_raw_os_error(errno),
                Listen::Pending => {}
            }
        }
        Err(failed(last))
    }

    /// Returns whether the channel to the master is open.
    ///
    /// Node: `worker.isConnected()`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) {
    /// worker.on_disconnect(|worker| assert!(!worker.is_connected()));
    /// # }
    /// ```
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.inner.shell.core.borrow().is_connected()
    }

    /// Returns whether this worker left because it was to, or `None` as long as the channel is
    /// open.
    ///
    /// Node: `worker.exitedAfterDisconnect`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) {
    /// worker.on_disconnect(|worker| {
    ///     if worker.exited_after_disconnect() == Some(false) {
    ///         eprintln!("the master is gone");
    ///     }
    /// });
    /// # }
    /// ```
    #[must_use]
    pub fn exited_after_disconnect(&self) -> Option<bool> {
        self.inner.shell.core.borrow().exited_after_disconnect()
    }

    /// Sends a message of at most 1 MiB to the master. It arrives after everything sent before.
    ///
    /// Node: `worker.send(message)` or `process.send(message)`. Returns `true`, or `false` as
    /// advice to pause when more than 64 KiB wait to be written; the message is on its way in both
    /// cases. What waits is written while the worker waits for something.
    ///
    /// # Errors
    ///
    /// [`Error::Send`] with [`ChannelClosed`](crate::SendError::ChannelClosed),
    /// [`TooLong`](crate::SendError::TooLong), or [`QueueFull`](crate::SendError::QueueFull) when 8 MiB wait already.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// worker.on_message(|worker, message| {
    ///     let _ = worker.send(message.bytes());
    /// });
    /// worker.run()
    /// # }
    /// ```
    pub fn send(&self, message: &[u8]) -> Result<bool> {
        self.send_with_fds(message, Vec::new())
    }

    /// Sends a message with at most 16 descriptors, which are closed here once they are sent.
    ///
    /// Node: `worker.send(message, handle)`. See [`send`](Self::send) for what is returned.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send), and [`TooManyDescriptors`](crate::SendError::TooManyDescriptors).
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker, stream: std::net::TcpStream) -> cluster::Result<()> {
    /// worker.send_with_fds(b"not for me", vec![stream.into()])?;
    /// # Ok(()) }
    /// ```
    pub fn send_with_fds(&self, message: &[u8], fds: Vec<OwnedFd>) -> Result<bool> {
        self.inner.shell.send(message, fds)
    }

    /// Leaves: tells the master, and on its word closes the listeners, waits for the connections,
    /// and closes the channel. Returns the worker.
    ///
    /// Node: `worker.disconnect()`. All of this happens while the worker waits for something, and
    /// the `disconnect` event never comes inside this call. Nothing happens if the worker is
    /// leaving already or has left.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// worker.disconnect().run()
    /// # }
    /// ```
    pub fn disconnect(&self) -> &Self {
        self.inner.shell.core.borrow_mut().disconnect();
        self.inner.shell.act();
        self
    }

    /// Leaves without waiting for connections: on the master's word the channel closes, and
    /// [`run`](Self::run) or [`Listener::accept`] come to an end.
    ///
    /// Node: `worker.kill()` in a worker, with its alias `worker.destroy()`. The process ends when
    /// the program returns from `main`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// worker.kill();
    /// worker.run()
    /// # }
    /// ```
    pub fn kill(&self) {
        self.inner.shell.core.borrow_mut().kill();
        self.inner.shell.act();
    }
}

/// Callbacks. Each method adds one to those that are there, and returns what
/// [`off`](Worker::off) takes.
impl Worker {
    /// Calls back when a message has come from the master. One that comes while there is no
    /// callback is dropped.
    ///
    /// Node: `process.on('message')` or `worker.on('message')`. See [`send`](Self::send) for an
    /// example.
    pub fn on_message(&self, callback: impl FnMut(&Self, &Message) + 'static) -> CallbackId {
        self.inner.on_message.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when the channel to the master has closed. A program that leaves `main` without
    /// waiting for that in [`run`](Self::run) does not see it.
    ///
    /// Node: `process.on('disconnect')` or `worker.on('disconnect')`. See
    /// [`is_connected`](Self::is_connected) for an example.
    pub fn on_disconnect(&self, callback: impl FnMut(&Self) + 'static) -> CallbackId {
        self.inner
            .on_disconnect
            .add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when something failed outside any call of the program's.
    ///
    /// Node: `process.on('error')`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) {
    /// worker.on_error(|_, error| eprintln!("{error}"));
    /// # }
    /// ```
    pub fn on_error(&self, callback: impl FnMut(&Self, &Error) + 'static) -> CallbackId {
        self.inner.on_error.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when the process gets `signal`, in the loop and not in a signal handler.
    ///
    /// Node: `process.on(signal)`. The signal loses its default effect until the worker is
    /// dropped; see [`Master::on_signal`](crate::Master::on_signal) for the rest. A terminal sends
    /// `INT` to master and workers alike, and some supervisors do so with `TERM`: a worker that is
    /// to finish its work takes no notice and leaves it to the master.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the signal cannot be handled, as `KILL` and `STOP`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// worker.on_signal(cluster::Signal::INT, |_, _| {})?;
    /// # Ok(()) }
    /// ```
    pub fn on_signal(
        &self,
        signal: Signal,
        callback: impl FnMut(&Self, Signal) + 'static,
    ) -> Result<CallbackId> {
        self.inner.home.on_signal(signal, callback)
    }

    /// Removes a callback. One that is gone already is no error.
    ///
    /// Node: `worker.removeListener()`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) {
    /// let id = worker.on_message(|_, _| {});
    /// worker.off(id);
    /// # }
    /// ```
    pub fn off(&self, id: CallbackId) {
        self.inner.on_message.remove(id);
        self.inner.on_disconnect.remove(id);
        self.inner.on_error.remove(id);
        self.inner.home.remove_signal_callback(id);
    }
}

/// The loop: timers, the program's own descriptors, and how it turns.
impl Worker {
    /// Calls back once, `after` this time. See [`Master::set_timeout`](crate::Master::set_timeout)
    /// for an example.
    ///
    /// Node: `setTimeout`.
    pub fn set_timeout(&self, after: Duration, callback: impl FnOnce(&Self) + 'static) -> TimerId {
        self.inner.home.set_timeout(after, callback)
    }

    /// Calls back again and again, `every` time this has passed; 1 ms at least. See
    /// [`Master::set_interval`](crate::Master::set_interval) for an example.
    ///
    /// Node: `setInterval`.
    pub fn set_interval(&self, every: Duration, callback: impl FnMut(&Self) + 'static) -> TimerId {
        self.inner.home.set_interval(every, callback)
    }

    /// Cancels a timer. See [`Master::clear_timer`](crate::Master::clear_timer) for an example.
    ///
    /// Node: `clearTimeout` and `clearInterval`.
    pub fn clear_timer(&self, timer: TimerId) {
        self.inner.home.clear_timer(timer);
    }

    /// Waits for a descriptor: calls back whenever `source` is ready for `interest`.
    ///
    /// Node has no counterpart; there, every socket is in the loop. The callback returns what to
    /// wait for next, or `None` to let go of the source, which drops it. A source that is ready and
    /// not read or written makes the callback come again at once.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the descriptor is of a kind that cannot be waited for, such as a file.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker, connection: cluster::Connection) -> cluster::Result<()> {
    /// use std::io::{Read, Write};
    /// use cluster::Interest;
    ///
    /// worker.watch(connection, Interest::Readable, |_, mut connection| {
    ///     let mut buffer = [0; 1024];
    ///     let length = connection.read(&mut buffer).ok().filter(|length| *length > 0)?;
    ///     connection.write_all(&buffer[..length]).ok()?;
    ///     Some(Interest::Readable)
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn watch<S: AsFd + 'static>(
        &self,
        source: S,
        interest: Interest,
        callback: impl FnMut(&Self, &S) -> Option<Interest> + 'static,
    ) -> Result<WatchId> {
        self.inner.home.watch(source, interest, callback)
    }

    /// Lets go of a watched descriptor, and drops it. One that is gone already is no error. See
    /// [`watch`](Self::watch) for an example.
    ///
    /// Node has no counterpart.
    pub fn unwatch(&self, watch: WatchId) {
        self.inner.home.unwatch(watch);
    }

    /// Turns the loop until the worker has left and nothing else is left to wait for: connection,
    /// timer or watched descriptor. If the channel closed although nobody had asked the worker to
    /// leave (the master is gone, for instance), it returns at once.
    ///
    /// Node: a worker goes on by itself, and ends like this.
    ///
    /// # Errors
    ///
    /// - [`Error::AlreadyRunning`] if a callback calls it;
    /// - [`Error::Io`] if the system refuses to wait.
    ///
    /// See [`send`](Self::send) for an example.
    pub fn run(&self) -> Result<()> {
        drop(self.inner.home.enter()?);
        loop {
            let core = self.inner.shell.core.borrow();
            let idle = core.is_finished() && !core.has_events() && !self.inner.home.has_work();
            let must_exit = core.must_exit() && !core.has_events();
            drop(core);
            if idle || must_exit {
                return Ok(());
            }
            self.dispatch(None)?;
        }
    }

    /// Turns the loop once: waits until something happens or `timeout` is over (`None`: without
    /// limit; zero: not at all), handles it and calls back. For programs with a loop of their own,
    /// as [`Master::dispatch`](crate::Master::dispatch) is, which has an example. Such a program
    /// ends when [`is_connected`](Self::is_connected) says so.
    ///
    /// Node has no counterpart.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub fn dispatch(&self, timeout: Option<Duration>) -> Result<()> {
        self.inner.shell.read_by_poller(true)?;
        self.inner.shell.core.borrow_mut().wait_for_events();
        self.inner.shell.act();
        self.turn(timeout)?;
        // The request to leave may have come just now, and nothing else may come any more.
        self.inner.shell.core.borrow_mut().close_unserved();
        self.inner.shell.act();
        Ok(())
    }

    /// Returns how long the program may wait before it calls [`dispatch`](Self::dispatch) although
    /// the descriptor of [`AsFd`] is not readable: `None` for any time, zero if events wait.
    ///
    /// Node has no counterpart. See [`Master::time_left`](crate::Master::time_left) for an example.
    #[must_use]
    pub fn time_left(&self) -> Option<Duration> {
        let shell = &self.inner.shell;
        let core = shell.core.borrow();
        if core.has_events() || core.is_done() || shell.has_errors() {
            return Some(Duration::ZERO);
        }
        self.inner.home.time_left(None)
    }

    /// Turns the loop once.
    fn turn(&self, timeout: Option<Duration>) -> Result<()> {
        let home = &self.inner.home;
        let _running = home.enter()?;
        // Before anything is delivered: after the last event nothing wakes the poller any more.
        let limit = self.time_left().into_iter().chain(timeout).min();
        self.settle();
        for (token, writable) in home.wait(limit)? {
            match token {
                Token::Channel(_) => {
                    if writable {
                        self.inner.shell.flush_channel();
                    }
                    self.inner.shell.receive();
                }
                Token::Listener(number) => self.accept_shared(ListenerId(number)),
                Token::Watch(number) => home.watch_ready(self, number),
                Token::Signals => {
                    for signal in home.take_signals() {
                        home.call_signal(self, signal);
                    }
                }
                Token::Process(_) => {}
            }
            self.settle();
        }
        home.fire_timers(self, || self.settle());
        Ok(())
    }

    /// Carries out what the core decided and calls the program, until nothing is left to do.
    fn settle(&self) {
        loop {
            self.inner.shell.act();
            for error in self.inner.shell.take_errors() {
                self.inner.on_error.each(|f| f(self, &error));
            }
            let event = self.inner.shell.core.borrow_mut().next_event();
            match event {
                None => break,
                Some(Event::Message(message)) => {
                    self.inner.on_message.each(|f| f(self, &message));
                }
                Some(Event::AcceptRest(listener)) => self.accept_shared(listener),
                Some(Event::Disconnect) => self.inner.on_disconnect.each(|f| f(self)),
                Some(Event::Connection(listener, fd)) => {
                    self.deliver(listener, Connection::new(fd, &self.inner.shell));
                    self.inner.forget_callback(listener);
                    self.inner.shell.core.borrow_mut().delivered(listener);
                }
            }
        }
    }

    fn deliver(&self, listener: ListenerId, connection: Connection) {
        let callback = self
            .inner
            .on_connection
            .borrow()
            .get(&listener)
            .map(Rc::clone);
        if let Some(callback) = callback {
            if let Ok(mut callback) = callback.try_borrow_mut() {
                callback(self, connection);
            }
        }
    }

    /// Accepts what a shared listener with a callback has.
    fn accept_shared(&self, listener: ListenerId) {
        let shell = &self.inner.shell;
        for _ in 0..ACCEPT_BATCH {
            match shell.try_accept(listener) {
                Ok(Some(fd)) => self.deliver(listener, Connection::new(fd, shell)),
                Ok(None) => return,
                Err(error) => {
                    shell.report(error);
                    // It stays readable: without a rest it would keep the loop.
                    shell.watch(listener, false);
                    let again = move |worker: &Self| {
                        worker.inner.shell.watch(listener, true);
                        // One that is ending may have nothing more that could make it readable.
                        worker.accept_shared(listener);
                    };
                    self.inner.home.set_timeout(ACCEPT_RETRY, again);
                    return;
                }
            }
        }
        // Nor may one whose batch was just full.
        shell.core.borrow_mut().accept_rest(listener);
    }

    /// Waits for the next connection of a listener without a callback.
    pub(crate) fn accept(inner: &Rc<Inner>, listener: ListenerId) -> Result<Option<Connection>> {
        drop(inner.home.enter()?);
        let shell = &inner.shell;
        shell.read_by_poller(false)?;
        let worker = Self {
            inner: Rc::clone(inner),
            is_owner: false,
        };
        loop {
            // What the program is to be told comes before it is kept waiting.
            if inner.poller_waits.take() || worker.time_left() == Some(Duration::ZERO) {
                worker.turn(Some(Duration::ZERO))?;
            }
            shell.core.borrow_mut().want(listener);
            shell.act();
            if let Some(connection) = worker.arrived(listener) {
                return Ok(Some(connection));
            }
            let core = shell.core.borrow();
            let (ended, ending) = (core.has_ended(listener), core.is_ending(listener));
            let events = core.has_events();
            drop(core);
            if ended && !events {
                return Ok(None);
            }
            // A shared listener that is ending is emptied without waiting.
            if ending || worker.wait(listener)? {
                if let Some(fd) = shell.try_accept(listener)? {
                    return Ok(Some(Connection::new(fd, shell)));
                }
            }
            // Before anything else is looked at: a callback might close the listener.
            if let Some(connection) = worker.arrived(listener) {
                return Ok(Some(connection));
            }
        }
    }

    fn arrived(&self, listener: ListenerId) -> Option<Connection> {
        let shell = &self.inner.shell;
        let arrived = shell.core.borrow_mut().arrived(listener);
        arrived.map(|fd| Connection::new(fd, shell))
    }

    /// Waits for anything at all; the channel, by which connections come, is read. Returns whether
    /// the listener, if it is a shared one, has something.
    fn wait(&self, listener: ListenerId) -> Result<bool> {
        let shell = &self.inner.shell;
        let shared = shell.listener(listener);
        let shared = shared.as_deref().map(|registered| &**registered);
        let ready = shell.wait(self.inner.home.as_fd(), shared, self.time_left())?;
        self.inner.poller_waits.set(ready.poller);
        Ok(ready.listener)
    }
}

/// The descriptor that is readable when [`dispatch`](Worker::dispatch) has something to do.
impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // It fails only if the poller is beyond use, which the next call of `dispatch` reports.
        let _ = self.inner.shell.read_by_poller(true);
        self.inner.home.as_fd()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Callbacks own what they please, this very worker's listeners for instance: left alone,
        // they would keep each other, and the last words would not be written.
        if self.is_owner {
            self.inner.clear();
        }
    }
}

impl Inner {
    fn clear(&self) {
        self.home.clear();
        self.on_message.clear();
        self.on_disconnect.clear();
        self.on_error.clear();
        drop(self.on_connection.take());
    }

    /// Sends the connections of a listener to a callback from now on.
    pub(crate) fn serve(&self, listener: ListenerId, callback: Shared<OnConnection>) {
        let replaced = self.on_connection.borrow_mut().insert(listener, callback);
        drop(replaced);
        self.shell.serve(listener);
    }

    pub(crate) fn close(&self, listener: ListenerId) {
        self.shell.close(listener);
        self.forget_callback(listener);
    }

    /// Drops the callback of a listener that is closed and has nothing more for it.
    fn forget_callback(&self, listener: ListenerId) {
        let core = self.shell.core.borrow();
        if !core.is_served(listener) && !core.owes(listener) {
            drop(core);
            let callback = self.on_connection.borrow_mut().remove(&listener);
            drop(callback);
        }
    }
}
