//! The worker's role: its public handles, and the shell that carries out what its core decides.
//!
//! Decisions belong to `core::worker`, system calls to `sys`. The public methods are here by subject:
//! `event_loop` and `accept` are the two ways to wait, `callbacks` adds and removes callbacks.
//!
//! `worker`, `listener`, `udp_socket` and `connection` refer to each other: callbacks get the worker,
//! and the worker makes the handles.

mod accept;
mod bind;
mod callbacks;
pub(crate) mod connection;
mod event_loop;
pub(crate) mod listener;
pub(crate) mod own_process;
pub(crate) mod shell;
pub(crate) mod udp_socket;
pub(crate) mod worker_main;

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use crate::config::listen::{BindOptions, ListenOptions};
use crate::config::send::{SendOptions, Sent, Written};
use crate::core::worker::ListenerId;
use crate::error::{Error, Result};
use crate::runtime::event_loop::EventLoop;
use crate::types::sorted_map::SortedMap;
use crate::types::worker_id::WorkerId;
use crate::wire::receipts::ReceiptCallbacks;
use crate::worker::accept::WaitState;
use crate::worker::callbacks::{ListenerCallbacks, WorkerCallbacks};
use crate::worker::connection::Connection;
use crate::worker::listener::Listener;
use crate::worker::own_process::OwnProcess;
use crate::worker::shell::WorkerShell;
use crate::worker::udp_socket::UdpSocket;

/// This process, which a master forked.
///
/// Node: `cluster.worker`. It comes from [`init`](crate::init()), and can be used in three ways:
///
/// - *blocking*: [`listen`](Self::listen), then [`Listener::accept`] or [`Listener::incoming`];
///   messages, timers and the request to disconnect are handled while it waits;
/// - *with callbacks*: [`Listener::set_connection_callback`], [`watch`](Self::watch), then
///   [`run`](Self::run);
/// - *embedded* in the application's own loop: the same callbacks, with
///   [`AsFd`](std::os::fd::AsFd), [`time_left`](Self::time_left) and [`dispatch`](Self::dispatch).
///
/// All methods can be called at any time, also by callbacks, unless they say otherwise. When the master
/// exits, `accept` and `run` return, as they do when the worker is requested to disconnect. On Linux, the
/// kernel also kills the worker then, in case it is stuck.
///
/// A worker is not `Send`: it stays on the thread that called `init`. Another thread sends its result
/// through a pipe or socket that the worker [`watch`](Self::watch)es, and gets a connection by
/// [`Connection::into_stream`].
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
    /// Whether this is the application's handle, and not one by which `accept` calls back.
    is_owner: bool,
}

/// Everything of a worker, shared with its listeners and sockets.
pub(crate) struct Inner {
    id: WorkerId,
    inspect_port: Option<u16>,
    shell: Rc<WorkerShell>,
    event_loop: EventLoop<Worker>,
    wait_state: WaitState,
    callbacks: WorkerCallbacks,
    listener_callbacks: RefCell<SortedMap<ListenerId, ListenerCallbacks>>,
    /// The callbacks of `SendOptions::on_written`.
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
            wait_state: WaitState::new(),
            callbacks: WorkerCallbacks::default(),
            listener_callbacks: RefCell::default(),
            receipts: ReceiptCallbacks::default(),
        };
        Ok(Self {
            inner: Rc::new(inner),
            is_owner: true,
        })
    }

    /// Returns the number of this worker. No other worker of the same master has or had it.
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

    /// Returns the port that this worker may open for a debugger or a page with metrics, if
    /// [`Settings::inspect_port`](crate::Settings::inspect_port) is set.
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
    #[doc(alias = "debugPort")]
    #[must_use]
    pub fn inspect_port(&self) -> Option<u16> {
        self.inner.inspect_port
    }

    /// Returns this worker's process, whose methods bypass the orderly disconnect.
    ///
    /// Node: `worker.process`, which is `process` in a worker.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) {
    /// println!("worker {} has pid {}", worker.id(), worker.process().id());
    /// # }
    /// ```
    #[must_use]
    pub fn process(&self) -> OwnProcess<'_> {
        OwnProcess::new(self)
    }

    /// Listens together with all workers that request the same address.
    ///
    /// Node: `server.listen()`. See [`ListenOptions`] for the addresses and options. The call waits for
    /// the master's reply. The master binds the address when the first worker requests it, and closes it
    /// when the last worker has closed it, unless the master retains it
    /// ([`Master::listen`](crate::Master::listen)).
    ///
    /// Port 0 stands for any free port. All workers get the same port for their first `listen` on port 0,
    /// and another one for their second. If a name stands for several addresses, the first usable one is
    /// taken. A path is relative to the worker's directory; the master removes the file when it closes the
    /// socket.
    ///
    /// A worker that is disconnecting, or whose master has exited, gets a listener that has already ended,
    /// so that its application finishes.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] with the system's reason if the address is in use, not allowed or cannot
    /// be resolved, or if the worker already has 64 listeners and sockets. A failed call leaves nothing
    /// behind, and can be repeated.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// let http = worker.listen(80)?;
    /// println!("listening on {:?}", http.local_addr());
    /// # Ok(()) }
    /// ```
    pub fn listen<S>(&self, options: impl Into<ListenOptions<S>>) -> Result<Listener<S>> {
        let mut bind_request = options.into().bind_request;
        match self.open(&mut bind_request)? {
            Ok(opened) => Ok(Listener::new(Rc::clone(&self.inner), opened)),
            Err(reason) => Err(Error::Listen {
                address: bind_request.to_string(),
                reason,
            }),
        }
    }

    /// Binds a UDP socket together with all workers that request the same address. They share one socket,
    /// and each datagram goes to one of them.
    ///
    /// Node: `dgram.createSocket()` and `socket.bind()`. See [`BindOptions`] for the addresses and
    /// options. The rest is as with [`listen`](Self::listen), with every scheduling policy.
    ///
    /// # Errors
    ///
    /// [`Error::Bind`] with the system's reason if the address is in use, not allowed or cannot be
    /// resolved. A failed call leaves nothing behind, and can be repeated.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// worker.bind("127.0.0.1:7")?.set_message_callback(|_, socket, datagram, from| {
    ///     let _ = socket.send_to(datagram, from);
    /// });
    /// worker.run()
    /// # }
    /// ```
    pub fn bind(&self, options: impl Into<BindOptions>) -> Result<UdpSocket> {
        let mut bind_request = options.into().bind_request;
        match self.open(&mut bind_request)? {
            Ok(opened) => Ok(UdpSocket::new(Rc::clone(&self.inner), opened)),
            Err(reason) => Err(Error::Bind {
                address: bind_request.to_string(),
                reason,
            }),
        }
    }

    /// Counts a stream as if a listener had accepted it. A worker that is disconnecting waits until the
    /// connection is dropped.
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
    #[doc(alias = "isConnected")]
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.inner.shell.core.borrow().is_connected()
    }

    /// Returns `false`, because the process that calls it has not exited.
    ///
    /// Node: `worker.isDead()`, which a worker can call for itself, too.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) {
    /// assert!(!worker.is_dead());
    /// # }
    /// ```
    #[doc(alias = "isDead")]
    #[must_use]
    pub fn is_dead(&self) -> bool {
        false
    }

    /// Returns whether the worker disconnected because it was requested to, or `None` as long as the
    /// channel is open.
    ///
    /// Node: `worker.exitedAfterDisconnect`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) {
    /// worker.on_disconnect(|worker| {
    ///     if worker.exited_after_disconnect() == Some(false) {
    ///         eprintln!("the master has exited");
    ///     }
    /// });
    /// # }
    /// ```
    #[doc(alias = "exitedAfterDisconnect")]
    #[doc(alias = "suicide")]
    #[must_use]
    pub fn exited_after_disconnect(&self) -> Option<bool> {
        self.inner.shell.core.borrow().exited_after_disconnect()
    }

    /// Sends a message of at most 1 MiB to the master. It arrives after everything that was sent before.
    ///
    /// Node: `worker.send(message)` or `process.send(message)`.
    ///
    /// The call writes as much as the channel takes at once. The rest waits in this process, and is
    /// written while the worker waits for something. [`Sent`] tells whether the sender should pause.
    ///
    /// If the process exits right after the call, what has been written to the channel still reaches the
    /// master. Bytes that wait in this process are lost if the process is killed or calls
    /// [`std::process::exit`]. When the `Worker` is dropped, it waits for at most one second until
    /// everything is written. To be sure, use [`on_written`](SendOptions::on_written).
    ///
    /// # Errors
    ///
    /// [`Error::Send`] with [`ChannelClosed`](crate::SendError::ChannelClosed),
    /// [`TooLong`](crate::SendError::TooLong), or [`QueueFull`](crate::SendError::QueueFull)
    /// if 8 MiB are already waiting.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
    /// worker.on_message(|worker, message| {
    ///     let _ = worker.send(message.bytes());
    /// });
    /// worker.run()
    /// # }
    /// ```
    #[doc(alias = "process.send")]
    pub fn send(&self, message: &[u8]) -> Result<Sent> {
        self.send_with_fds(message, Vec::new())
    }

    /// Sends a message with at most 16 descriptors, which are closed in this process once they are sent.
    ///
    /// Node: `worker.send(message, handle)`. See [`send`](Self::send) for the result.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send), and [`TooManyDescriptors`](crate::SendError::TooManyDescriptors).
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker, stream: std::net::TcpStream) -> cluster::Result<()> {
    /// let _ = worker.send_with_fds(b"not for me", vec![stream.into()])?;
    /// # Ok(()) }
    /// ```
    pub fn send_with_fds(&self, message: &[u8], fds: Vec<OwnedFd>) -> Result<Sent> {
        self.inner.shell.send(message, fds, None).map(Sent::new)
    }

    /// Sends a message with descriptors, and with a callback for the time when it is written. See
    /// [`SendOptions`] for an example.
    ///
    /// Node: `worker.send(message, handle, options, callback)`. See [`send`](Self::send) for the result.
    ///
    /// # Errors
    ///
    /// As [`send_with_fds`](Self::send_with_fds), and [`Error::Io`] if a descriptor of
    /// [`keep_open`](SendOptions::keep_open) cannot be copied.
    pub fn send_with(&self, message: &[u8], options: SendOptions<Self>) -> Result<Sent> {
        let (fds, written) = options.into_parts()?;
        let receipts = &self.inner.receipts;
        let sent = receipts.send_with(written, |receipt| {
            self.inner.shell.send(message, fds, receipt)
        });
        sent.map(Sent::new)
    }

    /// Disconnects: sends a request to the master, and when the master agrees, closes the listeners,
    /// waits for the connections, and closes the channel. Returns the worker.
    ///
    /// Node: `worker.disconnect()`. All of this happens while the worker waits for something, and
    /// the `disconnect` event never comes inside this call. Nothing happens if the worker is already
    /// disconnecting or disconnected.
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

    /// Disconnects without waiting for connections: when the master agrees, the channel closes, and
    /// [`run`](Self::run) or [`Listener::accept`] returns.
    ///
    /// Node: `worker.kill()` in a worker, with its alias `worker.destroy()`. The process exits when
    /// the application returns from `main`.
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

    /// Does the same as [`kill`](Self::kill), which has an example.
    ///
    /// Node: `worker.destroy()`.
    pub fn destroy(&self) {
        self.kill();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Break reference cycles through closures, which may own listeners of this worker. Otherwise the
        // shell would not be dropped, and its final frames would not be written.
        if self.is_owner {
            self.inner.clear();
        }
    }
}

impl Inner {
    fn clear(&self) {
        self.event_loop.clear();
        self.callbacks.clear();
        drop(self.listener_callbacks.take());
        self.receipts.clear();
    }

    /// Sets whether a listener makes `run` wait.
    fn reference(&self, listener: ListenerId, referenced: bool) {
        let mut core = self.shell.core.borrow_mut();
        core.reference(Some(listener), referenced);
    }

    /// Returns whether a callback gets the connections or datagrams.
    fn has_callback(&self, listener: ListenerId) -> bool {
        self.shell.core.borrow().has_callback(listener)
    }

    fn close(&self, listener: ListenerId) {
        self.shell.close(listener);
        self.forget_callbacks(listener);
    }
}
