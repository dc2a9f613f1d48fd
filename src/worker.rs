//! The worker's shell: carries out what [`WorkerCore`] decides, and calls the program.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use crate::callbacks::{CallbackId, Callbacks, Shared};
use crate::channel::{Channel, Received};
use crate::error::{Error, Result, SendError};
use crate::event_loop::{EventLoop, Token, WatchId};
use crate::frame::{ToMaster, ToWorker};
use crate::listener::{Connection, Listener};
use crate::message::Message;
use crate::signal::Signal;
use crate::sys::poll::{Interest, Registered, wait_readable, wait_readable_or_writable};
use crate::timers::TimerId;
use crate::worker_core::{Action, Event, Listen, ListenerId, WorkerCore};
use crate::worker_id::WorkerId;

/// How many connections one shared listener accepts in a turn.
const ACCEPT_BATCH: u32 = 16;
/// How long a worker that ends waits for the master to read its last words.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// The channel is the only one of its kind here.
const CHANNEL: u32 = 0;

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
}

type OnMessage = dyn FnMut(&Worker, &Message);
type OnDisconnect = dyn FnMut(&Worker);
type OnError = dyn FnMut(&Worker, &Error);
pub(crate) type OnConnection = dyn FnMut(&Worker, Connection);

/// A listener that this process has a copy of.
type SharedListener = Rc<Registered<TcpListener>>;

pub(crate) struct Inner {
    id: WorkerId,
    pub(crate) core: RefCell<WorkerCore<OwnedFd>>,
    home: EventLoop<Worker>,
    /// `None` when it is closed.
    channel: RefCell<Option<Channel<ToWorker, ToMaster>>>,
    listeners: RefCell<BTreeMap<ListenerId, SharedListener>>,
    on_connection: RefCell<BTreeMap<ListenerId, Shared<OnConnection>>>,
    on_message: Callbacks<OnMessage>,
    on_disconnect: Callbacks<OnDisconnect>,
    on_error: Callbacks<OnError>,
    errors: RefCell<Vec<Error>>,
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
        let channel = Channel::new(channel, home.poller(), Token::Channel(CHANNEL).key())
            .map_err(Error::io("wait for the channel"))?;
        let inner = Inner {
            id,
            core: RefCell::new(WorkerCore::new()),
            home,
            channel: RefCell::new(Some(channel)),
            listeners: RefCell::default(),
            on_connection: RefCell::default(),
            on_message: Callbacks::default(),
            on_disconnect: Callbacks::default(),
            on_error: Callbacks::default(),
            errors: RefCell::default(),
        };
        inner.act();
        let inner = Rc::new(inner);
        Ok(Self { inner })
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
    /// addresses, the first that can be had is taken. This waits for the master's answer.
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
            let id = self.inner.core.borrow_mut().listen(address);
            let listener = Listener::new(Rc::clone(&self.inner), id);
            let outcome = loop {
                self.inner.act();
                let outcome = self.inner.core.borrow().listen_result(id);
                match outcome {
                    Listen::Pending => self.inner.wait_for_channel()?,
                    outcome => break outcome,
                }
            };
            match outcome {
                Listen::Done(address) => {
                    self.inner.core.borrow_mut().listening(id);
                    self.inner.act();
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
        self.inner.core.borrow().is_connected()
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
        self.inner.core.borrow().exited_after_disconnect()
    }

    /// Sends a message of at most 1 MiB to the master. It arrives after everything sent before.
    ///
    /// Node: `worker.send(message)` or `process.send(message)`. Returns `true`, or `false` as
    /// advice to pause when more than 64 KiB wait to be written; the message is on its way in both
    /// cases. What waits is written while the worker waits for something.
    ///
    /// # Errors
    ///
    /// [`Error::Send`] with [`SendError::ChannelClosed`], [`SendError::TooLong`], or
    /// [`SendError::QueueFull`] when 8 MiB wait already.
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
    /// As [`send`](Self::send), and [`SendError::TooManyDescriptors`].
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker, stream: std::net::TcpStream) -> cluster::Result<()> {
    /// worker.send_with_fds(b"not for me", vec![stream.into()])?;
    /// # Ok(()) }
    /// ```
    pub fn send_with_fds(&self, message: &[u8], fds: Vec<OwnedFd>) -> Result<bool> {
        let failed = |reason| Error::Send {
            worker: None,
            reason,
        };
        let frame = ToMaster::Message(message.to_vec());
        let mut channel = self.inner.channel.borrow_mut();
        let Some(channel) = channel.as_mut() else {
            return Err(failed(SendError::ChannelClosed));
        };
        channel.send(&frame, message.len(), fds).map_err(failed)?;
        self.inner.flush(channel);
        Ok(channel.has_room())
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
        self.inner.core.borrow_mut().disconnect();
        self.inner.act();
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
        self.inner.core.borrow_mut().kill();
        self.inner.act();
    }
}

/// Callbacks. Each method adds one to those that are there, and returns what
/// [`off`](Worker::off) takes.
impl Worker {
    /// Calls back when a message has come from the master.
    ///
    /// Node: `process.on('message')` or `worker.on('message')`. See [`send`](Self::send) for an
    /// example.
    pub fn on_message(&self, callback: impl FnMut(&Self, &Message) + 'static) -> CallbackId {
        self.inner.on_message.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when the channel to the master has closed.
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
    pub fn set_timeout(
        &self,
        after: Duration,
        callback: impl FnOnce(&Self) + 'static,
    ) -> TimerId {
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
    /// worker.watch(connection, Interest::Readable, |_, connection| {
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
        callback: impl FnMut(&Self, &mut S) -> Option<Interest> + 'static,
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
            let core = self.inner.core.borrow();
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
    /// as [`Master::dispatch`](crate::Master::dispatch) is, which has an example.
    ///
    /// Node has no counterpart.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub fn dispatch(&self, timeout: Option<Duration>) -> Result<()> {
        self.inner.read_by_poller(true)?;
        self.inner.core.borrow_mut().wait_for_events();
        self.inner.act();
        self.turn(timeout)
    }

    /// Returns how long the program may wait before it calls [`dispatch`](Self::dispatch) although
    /// the descriptor of [`AsFd`] is not readable: `None` for any time, zero if events wait.
    ///
    /// Node has no counterpart. See [`Master::time_left`](crate::Master::time_left) for an example.
    #[must_use]
    pub fn time_left(&self) -> Option<Duration> {
        self.inner.time_left()
    }

    /// Turns the loop once.
    fn turn(&self, timeout: Option<Duration>) -> Result<()> {
        let home = &self.inner.home;
        let _running = home.enter()?;
        self.settle();
        let limits = self.time_left().into_iter().chain(timeout);
        for (token, writable) in home.wait(limits.min())? {
            match token {
                Token::Channel(_) => {
                    if writable {
                        self.inner.flush_channel();
                    }
                    self.inner.receive();
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
            self.inner.act();
            for error in self.inner.errors.take() {
                self.inner.on_error.each(|f| f(self, &error));
            }
            let event = self.inner.core.borrow_mut().next_event();
            match event {
                None => break,
                Some(Event::Message(message)) => {
                    self.inner.on_message.each(|f| f(self, &message));
                }
                Some(Event::AcceptRest(listener)) => self.accept_shared(listener),
                Some(Event::Disconnect) => self.inner.on_disconnect.each(|f| f(self)),
                Some(Event::Connection(listener, fd)) => {
                    self.deliver(listener, Connection::new(fd, &self.inner));
                }
            }
        }
    }

    fn deliver(&self, listener: ListenerId, connection: Connection) {
        let callback = self.inner.on_connection.borrow().get(&listener).map(Rc::clone);
        if let Some(callback) = callback {
            if let Ok(mut callback) = callback.try_borrow_mut() {
                callback(self, connection);
            }
        }
    }

    /// Accepts what a shared listener with a callback has.
    fn accept_shared(&self, listener: ListenerId) {
        for _ in 0..ACCEPT_BATCH {
            match self.inner.try_accept(listener) {
                Ok(Some(connection)) => self.deliver(listener, connection),
                Ok(None) => return,
                Err(error) => return self.inner.errors.borrow_mut().push(error),
            }
        }
    }

    /// Waits for the next connection of a listener without a callback.
    pub(crate) fn accept(inner: &Rc<Inner>, listener: ListenerId) -> Result<Option<Connection>> {
        drop(inner.home.enter()?);
        inner.read_by_poller(false)?;
        let worker = Self {
            inner: Rc::clone(inner),
        };
        loop {
            inner.core.borrow_mut().want(listener);
            inner.act();
            let arrived = inner.core.borrow_mut().arrived(listener);
            if let Some(fd) = arrived {
                return Ok(Some(Connection::new(fd, inner)));
            }
            let core = inner.core.borrow();
            let (ended, ending) = (core.has_ended(listener), core.is_ending(listener));
            let events = core.has_events();
            drop(core);
            if events {
                worker.turn(Some(Duration::ZERO))?;
            } else if ended {
                return Ok(None);
            } else {
                let shared = inner.listeners.borrow().get(&listener).map(Rc::clone);
                // One that is ending is taken from until nothing is left, without waiting.
                let ready = ending || worker.wait_and_serve(shared.as_deref())?;
                if let (true, Some(_)) = (ready, shared) {
                    if let Some(connection) = inner.try_accept(listener)? {
                        return Ok(Some(connection));
                    }
                }
            }
        }
    }

    /// Waits for anything at all and handles it; the channel first, by which connections come.
    /// Returns whether the shared listener has something.
    fn wait_and_serve(&self, shared: Option<&Registered<TcpListener>>) -> Result<bool> {
        let inner = &self.inner;
        let timeout = inner.time_left();
        let waited = match (inner.channel.borrow().as_ref(), shared) {
            (None, _) => return Ok(false),
            (Some(channel), None) => {
                wait_readable([channel.as_fd(), inner.home.as_fd()], timeout)
                    .map(|[channel, home]| [channel, home, false])
            }
            (Some(channel), Some(listener)) => {
                let fds = [channel.as_fd(), inner.home.as_fd(), listener.as_fd()];
                wait_readable(fds, timeout)
            }
        };
        let [channel, home, listener] = waited.map_err(Error::io("wait for a connection"))?;
        if channel {
            inner.receive();
        }
        if home || inner.time_left() == Some(Duration::ZERO) {
            self.turn(Some(Duration::ZERO))?;
        }
        Ok(listener)
    }
}

/// The descriptor that is readable when [`dispatch`](Worker::dispatch) has something to do.
impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // It fails only if the poller is beyond use, which the next call of `dispatch` reports.
        let _ = self.inner.read_by_poller(true);
        self.inner.home.as_fd()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Callbacks own what they please, this very worker's listeners for instance. The worker
        // that `accept` makes for callbacks is one of several.
        if Rc::strong_count(&self.inner) == 1 {
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

    fn time_left(&self) -> Option<Duration> {
        if self.core.borrow().has_events() || !self.errors.borrow().is_empty() {
            return Some(Duration::ZERO);
        }
        self.home.time_left(None)
    }

    /// Carries out everything that needs no callback.
    pub(crate) fn act(&self) {
        let mut sent = false;
        loop {
            let action = self.core.borrow_mut().next_action();
            match action {
                Some(Action::Send(frame)) => {
                    sent = true;
                    if let Some(channel) = self.channel.borrow_mut().as_mut() {
                        channel.queue(&frame, None);
                    }
                }
                Some(Action::CloseListener(listener)) => {
                    self.listeners.borrow_mut().remove(&listener);
                }
                Some(Action::CloseChannel) => {
                    sent = true;
                    if let Some(channel) = self.channel.borrow_mut().as_mut() {
                        channel.close();
                    }
                }
                None => break,
            }
        }
        if sent {
            self.flush_channel();
        }
    }

    fn flush_channel(&self) {
        if let Some(channel) = self.channel.borrow_mut().as_mut() {
            self.flush(channel);
        }
    }

    /// Writes what can be written, and tells the core if that was everything.
    fn flush(&self, channel: &mut Channel<ToWorker, ToMaster>) {
        match channel.flush() {
            Ok(()) if channel.is_flushed() => self.core.borrow_mut().confirmed(),
            Ok(()) => {}
            Err(source) => {
                let worker = None;
                self.errors
                    .borrow_mut()
                    .push(Error::Channel { worker, source });
            }
        }
    }

    /// Reads once from the channel and feeds the frames.
    fn receive(&self) -> Received {
        let received = self.home.with_scratch(|scratch| {
            let mut channel = self.channel.borrow_mut();
            channel.as_mut().map(|channel| channel.receive(scratch))
        });
        let received = match received {
            None => return Received::Nothing,
            Some(Ok(received)) => received,
            Some(Err(source)) => {
                let worker = None;
                let error = Error::Channel { worker, source };
                self.errors.borrow_mut().push(error);
                Received::End
            }
        };
        if received == Received::Something {
            while self.feed() {}
        }
        if received == Received::End {
            self.cut_off();
        }
        received
    }

    /// Feeds one frame that has arrived. Returns whether there was one.
    fn feed(&self) -> bool {
        let next = self.channel.borrow_mut().as_mut().map(Channel::next);
        let outcome = match next {
            None | Some(Ok(None)) => return false,
            Some(Ok(Some((frame, fds)))) => self.understand(frame, fds),
            Some(Err(error)) => Err(error),
        };
        match outcome {
            Ok(()) => {
                self.act();
                true
            }
            Err(source) => {
                let worker = None;
                let error = Error::Frame { worker, source };
                self.errors.borrow_mut().push(error);
                self.cut_off();
                false
            }
        }
    }

    fn understand(
        &self,
        frame: ToWorker,
        fds: Vec<OwnedFd>,
    ) -> std::result::Result<(), crate::frame::FrameError> {
        let mut core = self.core.borrow_mut();
        match frame {
            ToWorker::Message(bytes) => {
                let message = Message::new(bytes, fds);
                core.frame(ToWorker::Message(Vec::new()), None, Some(message))?;
            }
            ToWorker::Reply { .. } => {
                let listener = core.frame(frame, None, None)?;
                drop(core);
                if let (Some(listener), Some(fd)) = (listener, fds.into_iter().next()) {
                    self.adopt(listener, fd);
                }
            }
            ToWorker::Connection { .. } | ToWorker::End { .. } | ToWorker::Disconnect => {
                core.frame(frame, fds.into_iter().next(), None)?;
            }
        }
        Ok(())
    }

    /// Whether the channel wakes the poller. In `accept` it is waited for beside the poller, which
    /// would otherwise be ready each time the channel is.
    fn read_by_poller(&self, by_poller: bool) -> Result<()> {
        match self.channel.borrow_mut().as_mut() {
            Some(channel) => channel
                .wait_to_read(by_poller)
                .map_err(Error::io("wait for the channel")),
            None => Ok(()),
        }
    }

    /// Keeps the copy of a shared listener.
    fn adopt(&self, listener: ListenerId, fd: OwnedFd) {
        let key = Token::Listener(listener.0).key();
        match self.home.poller().add(TcpListener::from(fd), key, None) {
            Ok(registered) => {
                let mut listeners = self.listeners.borrow_mut();
                listeners.insert(listener, Rc::new(registered));
            }
            Err(source) => {
                let attempt = "wait for a shared listener";
                self.errors
                    .borrow_mut()
                    .push(Error::Io { attempt, source });
                self.core.borrow_mut().close(listener);
            }
        }
    }

    fn cut_off(&self) {
        drop(self.channel.take());
        self.core.borrow_mut().channel_closed();
        self.act();
    }

    /// Waits until something has come by the channel. Events wait meanwhile.
    fn wait_for_channel(&self) -> Result<()> {
        let waited = match self.channel.borrow().as_ref() {
            Some(channel) if channel.is_flushed() => {
                wait_readable([channel.as_fd()], None).map(drop)
            }
            Some(channel) => wait_readable_or_writable(channel.as_fd()),
            None => Ok(()),
        };
        waited.map_err(Error::io("wait for the master"))?;
        self.flush_channel();
        self.receive();
        Ok(())
    }

    /// Accepts from a shared listener, if this is one and has something.
    fn try_accept(self: &Rc<Self>, listener: ListenerId) -> Result<Option<Connection>> {
        let shared = self.listeners.borrow().get(&listener).map(Rc::clone);
        let Some(shared) = shared else {
            return Ok(None);
        };
        loop {
            match shared.accept() {
                Ok((stream, _)) => {
                    self.core.borrow_mut().connection_opened();
                    return Ok(Some(Connection::new(stream.into(), self)));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.core.borrow().is_ending(listener) {
                        self.core.borrow_mut().close(listener);
                        self.act();
                    }
                    return Ok(None);
                }
                Err(error) if crate::sys::socket::lost_before_accept(&error) => {}
                Err(source) => {
                    let attempt = "accept a connection";
                    return Err(Error::Io { attempt, source });
                }
            }
        }
    }

    /// Sends the connections of a listener to a callback from now on.
    pub(crate) fn serve(&self, listener: ListenerId, callback: Shared<OnConnection>) {
        self.on_connection.borrow_mut().insert(listener, callback);
        self.core.borrow_mut().serve(listener);
        self.act();
        let shared = self.listeners.borrow().get(&listener).map(Rc::clone);
        let watched = shared.map_or(Ok(()), |shared| {
            shared.set_interest(Some(Interest::Readable))
        });
        if let Err(source) = watched {
            let attempt = "wait for a shared listener";
            self.errors
                .borrow_mut()
                .push(Error::Io { attempt, source });
        }
    }

    pub(crate) fn close(&self, listener: ListenerId) {
        let callback = self.on_connection.borrow_mut().remove(&listener);
        drop(callback);
        self.core.borrow_mut().forget(listener);
        self.act();
    }

    pub(crate) fn connection_closed(&self) {
        self.core.borrow_mut().connection_closed();
        self.act();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(channel) = self.channel.borrow_mut().as_mut() {
            channel.flush_blocking(LAST_WORDS);
        }
    }
}
