//! The worker as the program sees it: its methods and its callbacks.

mod bind;
pub(crate) mod listener;
mod poll;
pub(crate) mod shell;
pub(crate) mod udp_socket;

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::config::listen::{BindOptions, ListenOptions};
use crate::config::send::{SendOptions, Written};
use crate::core::worker::ListenerId;
use crate::error::{Error, Result};
use crate::runtime::callbacks::{CallbackId, Callbacks, Shared};
use crate::runtime::event_loop::{EventLoop, LoopId, WatchId};
use crate::runtime::timers::TimerId;
use crate::sys::poll::Interest;
use crate::types::message::Message;
use crate::types::signal::Signal;
use crate::types::sorted_map::SortedMap;
use crate::types::worker_id::WorkerId;
use crate::wire::receipts::ReceiptCallbacks;
use crate::worker::listener::{Connection, Listener};
use crate::worker::shell::WorkerShell;
use crate::worker::udp_socket::UdpSocket;

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
pub(crate) type OnConnection = dyn FnMut(&Worker, Connection<OwnedFd>);
pub(crate) type OnDatagram = dyn FnMut(&Worker, &[u8], SocketAddr);

/// The callbacks of one listener or socket.
#[derive(Default)]
struct ListenerCallbacks {
    connection: Option<Shared<OnConnection>>,
    drop: Option<Shared<OnConnection>>,
    datagram: Option<Shared<OnDatagram>>,
}

/// All of a worker: its listeners share it.
pub(crate) struct Inner {
    id: WorkerId,
    inspect_port: Option<u16>,
    pub(crate) shell: Rc<WorkerShell>,
    event_loop: EventLoop<Worker>,
    of_listener: RefCell<SortedMap<ListenerId, ListenerCallbacks>>,
    /// `accept` has found the poller ready and has not looked yet.
    poller_waits: Cell<bool>,
    /// Before `accept` waits in the kernel, the channel has to be empty.
    looks_around: Cell<bool>,
    /// It has waited there, and been interrupted.
    has_waited: Cell<bool>,
    /// When `accept` has waited last.
    waited: Cell<Instant>,
    on_message: Callbacks<OnMessage>,
    on_disconnect: Callbacks<OnDisconnect>,
    on_error: Callbacks<OnError>,
    /// To be called when their messages have been written.
    receipts: ReceiptCallbacks<Written<Worker>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Worker {
    pub(crate) fn new(
        id: WorkerId,
        inspect_port: Option<u16>,
        channel: UnixStream,
    ) -> Result<Self> {
        let event_loop = EventLoop::new()?;
        let shell = WorkerShell::new(
            channel,
            event_loop.poller().clone(),
            event_loop.start_time(),
        );
        let inner = Inner {
            id,
            inspect_port,
            shell: Rc::new(shell.map_err(Error::io("wait for the channel"))?),
            event_loop,
            of_listener: RefCell::default(),
            poller_waits: Cell::new(true),
            looks_around: Cell::new(true),
            has_waited: Cell::new(false),
            waited: Cell::new(Instant::now()),
            on_message: Callbacks::default(),
            on_disconnect: Callbacks::default(),
            on_error: Callbacks::default(),
            receipts: ReceiptCallbacks::default(),
        };
        Ok(Self {
            inner: Rc::new(inner),
            is_owner: true,
        })
    }

    pub(crate) fn inner(&self) -> Rc<Inner> {
        Rc::clone(&self.inner)
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

    /// Returns the port that this worker may open for whatever looks into it: the one that
    /// [`Settings::inspect_port`](crate::Settings::inspect_port) says, if it says one.
    ///
    /// Node: `process.debugPort`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> std::io::Result<()> {
    /// if let Some(port) = worker.inspect_port() {
    ///     let metrics = std::net::TcpListener::bind(("127.0.0.1", port))?;
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn inspect_port(&self) -> Option<u16> {
        self.inner.inspect_port
    }

    /// Returns this worker's process, for what is done to it without the cluster's courtesy.
    ///
    /// Node: `worker.process`, which is `process` here.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) {
    /// println!("worker {} has pid {}", worker.id(), worker.process().id());
    /// # }
    /// ```
    #[must_use]
    pub fn process(&self) -> OwnProcess<'_> {
        OwnProcess(self)
    }

    /// Listens together with all workers that ask for the same.
    ///
    /// Node: `server.listen()`. See [`ListenOptions`] for what can be listened on, and how. The
    /// master binds the address when the first worker asks and closes it when the last one has left
    /// it, unless it keeps it ([`Master::listen`](crate::Master::listen)). Port 0 is any free port, and the same one for the first `listen` of every worker, another
    /// one for the second. If a name stands for several addresses, the first that can be had is
    /// taken. A path is relative to the worker's directory; the master removes the file at the end.
    /// This waits for the master's answer.
    ///
    /// A worker that has been told to leave, or whose master is gone, gets a listener that has
    /// ended, so that its program comes to its end.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] with the system's reason if the address is in use, not allowed or cannot
    /// be resolved, or if the worker has 64 listeners and sockets already. Nothing of it remains,
    /// and a later try may succeed.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// let http = worker.listen(80)?;
    /// println!("listening on {}", http.local_addr());
    /// # Ok(()) }
    /// ```
    pub fn listen<S>(&self, options: impl Into<ListenOptions<S>>) -> Result<Listener<S>> {
        let mut bind_request = options.into().bind_request;
        match self.open(&mut bind_request)? {
            Ok((id, address)) => Ok(Listener::new(Rc::clone(&self.inner), id, address)),
            Err(source) => Err(Error::Listen {
                address: bind_request.to_string(),
                source,
            }),
        }
    }

    /// Binds a UDP socket together with all workers that ask for the same: they share one socket,
    /// and each datagram goes to one of them.
    ///
    /// Node: `dgram.createSocket()` and `socket.bind()`. See [`BindOptions`] for what it can be
    /// bound to, and how; the rest is as with [`listen`](Self::listen), whatever the scheduling
    /// policy.
    ///
    /// # Errors
    ///
    /// [`Error::Bind`] with the system's reason if the address is in use, not allowed or cannot be
    /// resolved. Nothing of it remains, and a later try may succeed.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// worker.bind("127.0.0.1:7")?.on_message(|_, socket, datagram, from| {
    ///     let _ = socket.send_to(datagram, from);
    /// });
    /// worker.run()
    /// # }
    /// ```
    pub fn bind(&self, options: impl Into<BindOptions>) -> Result<UdpSocket> {
        let mut bind_request = options.into().bind_request;
        match self.open(&mut bind_request)? {
            Ok((id, address)) => Ok(UdpSocket::new(Rc::clone(&self.inner), id, address)),
            Err(source) => Err(Error::Bind {
                address: bind_request.to_string(),
                source,
            }),
        }
    }

    /// Takes a stream as if a listener had accepted it: the worker counts it, and waits for its end
    /// when it is to leave.
    ///
    /// Node: `server.emit('connection', socket)`, for a socket that came with a message.
    ///
    /// ```no_run
    /// # fn serve(_: cluster::Connection) {}
    /// # fn f(worker: &cluster::Worker) {
    /// worker.on_message(|worker, message| {
    ///     for fd in message.take_fds() {
    ///         serve(worker.adopt(fd.into()));
    ///     }
    /// });
    /// # }
    /// ```
    pub fn adopt<S>(&self, stream: S) -> Connection<S> {
        self.inner.shell.core.borrow_mut().connection_adopted();
        Connection::new(stream, &self.inner.shell, None)
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

    /// Returns whether this worker's process has ended, and so `false`.
    ///
    /// Node: `worker.isDead()`, which a worker can ask about itself.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) {
    /// assert!(!worker.is_dead());
    /// # }
    /// ```
    #[must_use]
    pub fn is_dead(&self) -> bool {
        false
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
    /// advice to pause when with one more such message over 64 KiB would wait to be written, until
    /// [`on_written`](SendOptions::on_written) of the last message; the message is on its way in
    /// both cases. What waits is written while the worker waits for something.
    ///
    /// # Errors
    ///
    /// [`Error::Send`] with [`ChannelClosed`](crate::SendError::ChannelClosed),
    /// [`TooLong`](crate::SendError::TooLong), or [`QueueFull`](crate::SendError::QueueFull)
    /// when 8 MiB wait already.
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
        self.inner.shell.send(message, fds, None)
    }

    /// Sends a message with descriptors, and with a callback for when it is written. See
    /// [`SendOptions`] for an example.
    ///
    /// Node: `worker.send(message, handle, options, callback)`. See [`send`](Self::send) for what is
    /// returned.
    ///
    /// # Errors
    ///
    /// As [`send_with_fds`](Self::send_with_fds), and [`Error::Io`] if a descriptor that is to be
    /// kept open cannot be copied.
    pub fn send_with(&self, message: &[u8], options: SendOptions<Self>) -> Result<bool> {
        let (fds, written) = options.into_parts()?;
        let receipts = &self.inner.receipts;
        receipts.send_with(written, |receipt| {
            self.inner.shell.send(message, fds, receipt)
        })
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

    /// The same as [`kill`](Self::kill), which has an example.
    ///
    /// Node: `worker.destroy()`.
    pub fn destroy(&self) {
        self.kill();
    }
}

/// The process of this worker, as the system knows it.
///
/// Node: `process`. See [`Worker::process`] for an example.
#[derive(Clone, Copy, Debug)]
pub struct OwnProcess<'a>(&'a Worker);

impl OwnProcess<'_> {
    /// Returns the process id.
    ///
    /// Node: `process.pid`. See [`Worker::process`] for an example.
    #[must_use]
    pub fn id(&self) -> u32 {
        std::process::id()
    }

    /// Closes the channel without a word, once everything sent has been written. It does not count
    /// as leaving on purpose: [`run`](Worker::run) and [`Listener::accept`] come to an end, whatever
    /// is still open.
    ///
    /// Node: `process.disconnect()`. To leave in an orderly way, use [`Worker::disconnect`].
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// worker.process().disconnect();
    /// worker.run()
    /// # }
    /// ```
    pub fn disconnect(&self) {
        self.0.inner.shell.core.borrow_mut().close_channel();
        self.0.inner.shell.act();
    }

    /// Lets the worker end although its channel is open: [`run`](Worker::run) returns when nothing
    /// else is left to wait for, and everything sent has been written.
    ///
    /// Node: `process.channel.unref()`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// worker.send(b"done")?;
    /// worker.process().unref();
    /// worker.run()
    /// # }
    /// ```
    pub fn unref(&self) {
        self.reference(false);
    }

    /// Undoes [`unref`](Self::unref), which has an example.
    ///
    /// Node: `process.channel.ref()`.
    pub fn ref_(&self) {
        self.reference(true);
    }

    fn reference(&self, referenced: bool) {
        let mut core = self.0.inner.shell.core.borrow_mut();
        core.reference(None, referenced);
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
        self.inner.event_loop.on_signal(signal, callback)
    }

    /// Makes a callback one that is called once: it is removed before its next call. One that is
    /// gone already is no error.
    ///
    /// Node: `worker.once()`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) {
    /// worker.once(worker.on_message(|_, _| println!("the first message")));
    /// # }
    /// ```
    pub fn once(&self, id: CallbackId) {
        self.inner.on_message.once(id);
        self.inner.on_disconnect.once(id);
        self.inner.on_error.once(id);
        self.inner.event_loop.signal_callback_once(id);
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
        self.inner.event_loop.remove_signal_callback(id);
    }
}

/// The loop: timers, the program's own descriptors, and how it turns.
impl Worker {
    /// Calls back once, `after` this time. See [`Master::set_timeout`](crate::Master::set_timeout)
    /// for an example.
    ///
    /// Node: `setTimeout`.
    pub fn set_timeout(&self, after: Duration, callback: impl FnOnce(&Self) + 'static) -> TimerId {
        self.inner.event_loop.set_timeout(after, callback)
    }

    /// Calls back again and again, `every` time this has passed; 1 ms at least. See
    /// [`Master::set_interval`](crate::Master::set_interval) for an example.
    ///
    /// Node: `setInterval`.
    pub fn set_interval(&self, every: Duration, callback: impl FnMut(&Self) + 'static) -> TimerId {
        self.inner.event_loop.set_interval(every, callback)
    }

    /// Cancels a timer. See [`Master::clear_timer`](crate::Master::clear_timer) for an example.
    ///
    /// Node: `clearTimeout` and `clearInterval`.
    pub fn clear_timer(&self, timer: TimerId) {
        self.inner.event_loop.clear_timer(timer);
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
        self.inner.event_loop.watch(source, interest, callback)
    }

    /// Lets go of a watched descriptor, and drops it. One that is gone already is no error. See
    /// [`watch`](Self::watch) for an example.
    ///
    /// Node has no counterpart.
    pub fn unwatch(&self, watch: WatchId) {
        self.inner.event_loop.unwatch(watch);
    }

    /// Lets the worker end although a timer or watched descriptor is still there:
    /// [`run`](Self::run) does not wait for it. One that is gone already is no error. See
    /// [`Master::unref`](crate::Master::unref) for an example.
    ///
    /// Node: `timer.unref()` and `socket.unref()`.
    pub fn unref(&self, id: impl Into<LoopId>) {
        self.inner.event_loop.set_referenced(id.into(), false);
    }

    /// Undoes [`unref`](Self::unref), which has an example.
    ///
    /// Node: `timer.ref()` and `socket.ref()`.
    pub fn ref_(&self, id: impl Into<LoopId>) {
        self.inner.event_loop.set_referenced(id.into(), true);
    }

    /// Turns the loop until the worker has left and nothing else is left to wait for: connection,
    /// timer or watched descriptor. Whatever has been let go with `unref` does not count. If the channel closed although nobody had asked the worker to
    /// leave (the master is gone, for instance), it returns at once.
    ///
    /// Nothing can be sent any more then: whoever has last words says them in answer to a message, or
    /// uses the blocking form.
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
        drop(self.inner.event_loop.enter()?);
        loop {
            let core = self.inner.shell.core.borrow();
            let events = core.has_events() || self.inner.shell.has_notifications();
            let busy = self.inner.event_loop.has_work() || self.inner.shell.is_writing();
            let idle = core.is_finished() && !busy && !events;
            let must_exit = core.must_exit() && !events;
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
        drop(self.inner.event_loop.enter()?);
        self.inner.shell.watch_channel(true)?;
        self.inner.shell.core.borrow_mut().waiting_for_events();
        self.turn(timeout)?;
        // The request to leave may have come just now, and nothing else may come any more.
        self.inner.shell.core.borrow_mut().close_unused_listeners();
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
        if core.has_events() || core.is_drained() || shell.has_notifications() {
            return Some(Duration::ZERO);
        }
        self.inner.event_loop.time_left(shell.deadline())
    }
}

/// The descriptor that is readable when [`dispatch`](Worker::dispatch) has something to do.
impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // It fails only if the poller is beyond use, which the next call of `dispatch` reports.
        let _ = self.inner.shell.watch_channel(true);
        self.inner.event_loop.as_fd()
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
        self.event_loop.clear();
        self.on_message.clear();
        self.on_disconnect.clear();
        self.on_error.clear();
        drop(self.of_listener.take());
        self.receipts.clear();
    }

    /// Sends the connections of a listener to a callback from now on.
    pub(crate) fn serve(&self, listener: ListenerId, callback: Shared<OnConnection>) {
        self.set_callback(listener, |callbacks| callbacks.connection.replace(callback));
        self.shell.serve(listener);
        self.forget_callbacks(listener);
    }

    /// Drops the connections that are too many, and tells a callback.
    pub(crate) fn drop_excess(&self, listener: ListenerId, callback: Shared<OnConnection>) {
        self.set_callback(listener, |callbacks| callbacks.drop.replace(callback));
        self.shell.core.borrow_mut().drop_excess(listener);
        self.shell.act();
        self.shell.update_watch(listener);
        self.forget_callbacks(listener);
    }

    /// Whether a listener keeps the program running.
    pub(crate) fn reference(&self, listener: ListenerId, referenced: bool) {
        let mut core = self.shell.core.borrow_mut();
        core.reference(Some(listener), referenced);
    }

    pub(crate) fn has_callback(&self, listener: ListenerId) -> bool {
        self.shell.core.borrow().has_callback(listener)
    }

    /// How many connections of a listener the program wants at most.
    pub(crate) fn set_connection_limit(&self, listener: ListenerId, most: Option<u64>) {
        self.shell
            .core
            .borrow_mut()
            .set_connection_limit(listener, most);
        self.shell.act();
        self.shell.update_watch(listener);
    }

    /// Sends the datagrams of a socket to a callback from now on.
    pub(crate) fn serve_datagrams(&self, listener: ListenerId, callback: Shared<OnDatagram>) {
        self.set_callback(listener, |callbacks| callbacks.datagram.replace(callback));
        self.shell.serve(listener);
        self.forget_callbacks(listener);
    }

    fn set_callback<T>(
        &self,
        listener: ListenerId,
        set: impl FnOnce(&mut ListenerCallbacks) -> Option<T>,
    ) {
        let mut all = self.of_listener.borrow_mut();
        let replaced = set(all.get_or_insert_with(listener, ListenerCallbacks::default));
        // What a closure owns may come back here when it is dropped.
        drop(all);
        drop(replaced);
    }

    pub(crate) fn close(&self, listener: ListenerId) {
        self.shell.close(listener);
        self.forget_callbacks(listener);
    }

    /// Drops the callbacks of a listener that the program has let go of.
    fn forget_callbacks(&self, listener: ListenerId) {
        let core = self.shell.core.borrow();
        if !core.is_known(listener) {
            drop(core);
            let callbacks = self.of_listener.borrow_mut().remove(&listener);
            drop(callbacks);
        }
    }
}
