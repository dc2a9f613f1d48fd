//! The worker's role: its public handles, and the shell that carries out the core's decisions.
//!
//! Decisions belong to `core::worker`, and system calls to `sys`. `event_loop` and `accept` contain
//! the two ways in which a worker waits. `callbacks` adds and removes callbacks.
//!
//! `worker`, `listener`, `udp_socket` and `connection` refer to each other, because callbacks
//! receive the worker and the worker makes the other handles. `worker` and `master` import each
//! other, because a worker that executes no program starts in the master's code (`worker_main`).

mod accept;
mod bind;
mod callbacks;
pub(crate) mod connection;
pub(crate) mod disconnect_token;
mod event_loop;
mod finish;
pub(crate) mod guard;
pub(crate) mod listener;
pub(crate) mod own_process;
pub(crate) mod shell;
pub(crate) mod std_listener;
pub(crate) mod udp_socket;
pub(crate) mod worker_main;

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use crate::config::listen::{BindOptions, ListenOptions};
use crate::config::send::{SendOptions, Sent, Written};
use crate::core::worker::ListenerId;
use crate::error::{Error, Result};
use crate::runtime::event_loop::EventLoop;
use crate::sys::channel::AdoptedChannel;
use crate::types::sorted_map::SortedMap;
use crate::types::worker_id::WorkerId;
use crate::wire::receipts::ReceiptCallbacks;
use crate::worker::accept::WaitState;
use crate::worker::callbacks::{ListenerCallbacks, WorkerCallbacks};
use crate::worker::connection::Connection;
use crate::worker::guard::DroppedGuards;
use crate::worker::listener::Listener;
use crate::worker::own_process::OwnProcess;
use crate::worker::shell::{Origin, WorkerShell};
use crate::worker::udp_socket::UdpSocket;

/// This process, which a master forked.
///
/// Node: `cluster.worker`.
///
/// [`init`](crate::init()) returns the worker. A worker can be used in three ways:
///
/// - *blocking*: call [`listen`](Self::listen), then [`Listener::accept`] or
///   [`Listener::incoming`]. While the worker waits, it handles messages, timers and disconnect
///   requests;
/// - *with callbacks*: call [`Listener::set_connection_callback`] or [`watch`](Self::watch), then
///   [`run`](Self::run);
/// - *embedded* in the application's own loop: use the same callbacks with
///   [`AsFd`](std::os::fd::AsFd), [`time_left`](Self::time_left) and [`dispatch`](Self::dispatch).
///
/// All methods can be called at any time, even by callbacks, unless their description says
/// otherwise. If the channel closes without a disconnect request, for instance because the master
/// has been dropped, `accept` returns `None`, and `run` returns without waiting for connections. On
/// Linux, the kernel kills the worker when its master exits, even if the worker is stuck.
///
/// A worker is not `Send`: it stays on the thread that called `init`. Another thread can send its
/// result through a pipe or socket that the worker [`watch`](Self::watch)es. To serve a connection
/// on another thread, use [`Connection::into_parts`].
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
    /// Whether this is the application's handle, as opposed to a handle that `accept` passes to
    /// callbacks.
    is_owner: bool,
}

/// The state of a worker. The worker shares it with its listeners and sockets.
pub(crate) struct Inner {
    id: WorkerId,
    inspect_port: Option<u16>,
    shell: Rc<WorkerShell>,
    event_loop: EventLoop<Worker>,
    wait_state: WaitState,
    callbacks: WorkerCallbacks,
    dropped_guards: DroppedGuards,
    listener_callbacks: RefCell<SortedMap<ListenerId, ListenerCallbacks>>,
    /// The listeners that have had a full batch of connections in this iteration of the loop. The next
    /// iteration serves them again.
    deferred: RefCell<Vec<ListenerId>>,
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
        channel: AdoptedChannel,
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
            dropped_guards: DroppedGuards::default(),
            listener_callbacks: RefCell::default(),
            deferred: RefCell::default(),
            receipts: ReceiptCallbacks::default(),
        };
        Ok(Self {
            inner: Rc::new(inner),
            is_owner: true,
        })
    }

    /// Returns this worker's id. Each worker of a master has a different id, and ids are never
    /// reused.
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

    /// Returns the port that this worker may open for a debugger or for metrics, or `None` if
    /// [`Settings::inspect_port`](crate::Settings::inspect_port) is not set.
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

    /// Returns this worker's process. Its method [`disconnect`](OwnProcess::disconnect) closes the
    /// channel without an orderly disconnect.
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

    /// Listens on an address together with all workers that request the same address.
    ///
    /// Node: `server.listen()`.
    ///
    /// The call waits for the master's reply. The master binds the address when the first worker
    /// requests it. The master closes the listener when the last worker has closed it, unless the
    /// master retains the listener ([`Master::listen`](crate::Master::listen)). See
    /// [`ListenOptions`] for the addresses and options.
    ///
    /// Port 0 stands for any free port. All workers receive one port for their first `listen` on
    /// port 0, and another port for their second. If a name resolves to several addresses, the
    /// first usable one is used. A path names a Unix socket and is relative to the worker's
    /// directory. The master removes the socket's file when it closes the socket.
    ///
    /// If the worker is disconnecting or its master has exited, the returned listener has already
    /// ended, so that the application finishes.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Listen`] if the listener cannot be opened, for instance because the address
    /// is in use, is not allowed or cannot be resolved, or because the worker already has 64
    /// listeners and sockets. Returns [`Error::Io`] if the wait for the master's reply fails. A
    /// failed call has no effect and can be repeated.
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
                occupied_by: None,
            }),
        }
    }

    /// Binds a UDP socket together with all workers that request the same address. With every
    /// scheduling policy, the workers share one socket, and each datagram goes to one of them.
    ///
    /// Node: `dgram.createSocket()` and `socket.bind()`.
    ///
    /// In all other respects, this method works like [`listen`](Self::listen). See [`BindOptions`]
    /// for the addresses and options.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Bind`] if the socket cannot be opened, for instance because the address is
    /// in use, is not allowed or cannot be resolved, or because the worker already has 64 listeners
    /// and sockets. Returns [`Error::Io`] if the wait for the master's reply fails. A failed call
    /// has no effect and can be repeated.
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
                occupied_by: None,
            }),
        }
    }

    /// Counts a stream as if a listener had accepted it. A worker that is disconnecting waits until
    /// the returned connection is dropped.
    ///
    /// Node: `server.emit('connection', socket)`, for a socket from a message.
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
        self.inner.shell.connection_adopted();
        Connection::new(stream, &self.inner, Origin::default())
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

    /// Returns `false`, because the calling process has not exited.
    ///
    /// Node: `worker.isDead()`, which a worker can also call for itself.
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

    /// Returns whether the master had requested a disconnect, or confirmed the worker's own
    /// request, before the channel closed. Returns `None` while the channel is open.
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

    /// Sends a message of at most 1 MiB to the master. The master receives the message after all
    /// earlier ones.
    ///
    /// Node: `worker.send(message)` or `process.send(message)`.
    ///
    /// The call writes as many bytes as the channel accepts at once. The remaining bytes wait in
    /// this process, which writes them while the worker waits for something. [`Sent`] tells whether
    /// the sender should pause.
    ///
    /// If the process exits right after the call, the bytes that have been written to the channel
    /// still reach the master. Bytes that wait in this process are lost if the process is killed or
    /// calls [`std::process::exit`]. When the `Worker` is dropped, it waits for at most one second
    /// until all bytes have been written. To be sure that a message has been written, use
    /// [`on_written`](SendOptions::on_written).
    ///
    /// # Errors
    ///
    /// Returns [`Error::Send`] with one of these reasons:
    ///
    /// - [`ChannelClosed`](crate::SendError::ChannelClosed);
    /// - [`TooLong`](crate::SendError::TooLong);
    /// - [`QueueFull`](crate::SendError::QueueFull) if more than 8 MiB would be waiting.
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

    /// Sends a message with at most 16 descriptors. This process closes the descriptors once they
    /// are sent.
    ///
    /// Node: `worker.send(message, handle)`.
    ///
    /// See [`send`](Self::send) for the result.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`send`](Self::send), and
    /// [`TooManyDescriptors`](crate::SendError::TooManyDescriptors) for more than 16 descriptors.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::Worker, stream: std::net::TcpStream) -> cluster::Result<()> {
    /// let _ = worker.send_with_fds(b"not for me", vec![stream.into()])?;
    /// # Ok(()) }
    /// ```
    pub fn send_with_fds(&self, message: &[u8], fds: Vec<OwnedFd>) -> Result<Sent> {
        self.inner.shell.send(message, fds, None).map(Sent::new)
    }

    /// Sends a message with options: descriptors, and a callback that is called once the message
    /// has been written or lost.
    ///
    /// Node: `worker.send(message, handle, options, callback)`.
    ///
    /// See [`SendOptions`] for an example, and [`send`](Self::send) for the result.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`send_with_fds`](Self::send_with_fds). Also returns
    /// [`Error::Io`] if a descriptor of [`keep_open`](SendOptions::keep_open) cannot be copied.
    pub fn send_with(&self, message: &[u8], options: SendOptions<Self>) -> Result<Sent> {
        let (fds, written) = options.into_parts()?;
        let receipts = &self.inner.receipts;
        let sent = receipts.send_with(written, |receipt| {
            self.inner.shell.send(message, fds, receipt)
        });
        sent.map(Sent::new)
    }

    /// Sends a disconnect request to the master. When the master has confirmed the request, the
    /// worker closes its listeners, waits for its connections, and closes the channel. Returns the
    /// worker.
    ///
    /// Node: `worker.disconnect()`.
    ///
    /// The disconnect takes place while the worker waits for something. The `disconnect` event is
    /// never emitted inside this call. Nothing happens if the worker is already disconnecting or
    /// disconnected.
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

    /// Disconnects without waiting for connections. When the master has confirmed the disconnect
    /// request, the channel closes, and [`run`](Self::run) or [`Listener::accept`] returns.
    ///
    /// Node: `worker.kill()` in a worker, with its alias `worker.destroy()`.
    ///
    /// The process exits when the application returns from `main`.
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

    /// Disconnects without waiting for connections, like [`kill`](Self::kill).
    ///
    /// Node: `worker.destroy()`.
    ///
    /// See [`kill`](Self::kill) for an example.
    pub fn destroy(&self) {
        self.kill();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Break reference cycles through closures, which may own this worker's listeners.
        // Otherwise, the shell would never be dropped, and its final frames would not be written.
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

    /// Sets whether `run` waits for a listener.
    fn reference(&self, listener: ListenerId, referenced: bool) {
        let mut core = self.shell.core.borrow_mut();
        core.reference(Some(listener), referenced);
    }

    /// Returns whether a callback receives the listener's connections or datagrams.
    fn has_callback(&self, listener: ListenerId) -> bool {
        self.shell.core.borrow().has_callback(listener)
    }

    /// Returns whether a listener stays open when its handle is dropped.
    fn outlives_handle(&self, listener: ListenerId) -> bool {
        self.shell.core.borrow().outlives_handle(listener)
    }

    fn close(&self, listener: ListenerId) {
        self.shell.close(listener);
        self.forget_callbacks(listener);
    }
}
