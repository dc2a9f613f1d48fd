//! A worker, seen from the master.

use std::os::fd::OwnedFd;
use std::process::ExitStatus;
use std::rc::{Rc, Weak};
use std::time::Duration;

use crate::config::send::{SendOptions, Sent};
use crate::core::master::event::{ExitReport, WorkerState};
use crate::error::{Error, Result, SendError};
use crate::master::Master;
use crate::master::callbacks::WorkerCallbacks;
use crate::master::process::Process;
use crate::master::shell::{Core, MasterShell, WorkerIo};
use crate::types::signal::Signal;
use crate::types::worker_id::WorkerId;
use crate::wire::receipts::ReceiptId;

/// The master's handle of a worker.
///
/// Node: the class `Worker`, as `cluster.fork()` returns it.
///
/// The handle can be cloned; all clones refer to the same worker. Every method can be called at any
/// time, even after the worker has exited. The same type is used for a process that is not a worker
/// ([`Settings::detached`](crate::Settings::detached)).
///
/// Like the [`Master`], the handle is not `Send`. Another thread can refer to a worker by its
/// [`WorkerId`], for instance in a request through a pipe that the master
/// [`watch`](Master::watch)es.
///
/// ```no_run
/// # fn f(master: &cluster::Master) -> cluster::Result<()> {
/// use std::time::Duration;
///
/// let worker = master.fork()?;
/// worker.on_listening(|_, worker, _| {
///     let _ = worker.send(b"shutdown");
///     worker.disconnect_within(Duration::from_secs(2));
/// });
/// # Ok(()) }
/// ```
#[doc(alias = "Worker")]
#[derive(Clone, Debug)]
pub struct WorkerProcess {
    master: Weak<MasterShell>,
    worker_io: Rc<WorkerIo>,
    callbacks: Rc<WorkerCallbacks>,
}

impl PartialEq for WorkerProcess {
    fn eq(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.worker_io, &other.worker_io)
    }
}

impl Eq for WorkerProcess {}

impl WorkerProcess {
    pub(super) fn new(
        master: &Rc<MasterShell>,
        worker_io: Rc<WorkerIo>,
        callbacks: Rc<WorkerCallbacks>,
    ) -> Self {
        Self {
            master: Rc::downgrade(master),
            worker_io,
            callbacks,
        }
    }

    pub(super) fn callbacks(&self) -> &WorkerCallbacks {
        &self.callbacks
    }

    pub(super) fn worker_io(&self) -> &WorkerIo {
        &self.worker_io
    }

    pub(super) fn set_exit_report(&self, exit_report: ExitReport) {
        self.worker_io.exit_report.set(Some(exit_report));
    }

    /// Returns the result of `query` on the core, or `None` once the worker's `exit` event is
    /// delivered or the master has been dropped.
    fn query<T>(&self, query: impl FnOnce(&Core) -> T) -> Option<T> {
        if self.worker_io.exit_report.get().is_some() {
            return None;
        }
        let master = self.master.upgrade()?;
        let core = master.core.borrow();
        Some(query(&core))
    }

    /// Calls `update` with the core and carries out the core's decisions. Does nothing after the
    /// master has been dropped.
    pub(super) fn update(&self, update: impl FnOnce(&mut Core)) {
        if let Some(master) = self.master.upgrade() {
            update(&mut master.core_now());
            master.act();
        }
    }

    /// Returns the worker's id.
    ///
    /// Node: `worker.id`.
    ///
    /// See [`Master::on_fork`] for an example.
    #[must_use]
    pub fn id(&self) -> WorkerId {
        self.worker_io.id
    }

    /// Returns the worker's process. Its methods [`kill`](Process::kill) and
    /// [`disconnect`](Process::disconnect) bypass the orderly disconnect.
    ///
    /// Node: `worker.process`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) -> std::io::Result<()> {
    /// std::fs::write(format!("worker-{}.pid", worker.id()), worker.process().id().to_string())?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn process(&self) -> Process<'_> {
        Process::new(self)
    }

    /// Returns the worker's current state in its life cycle.
    ///
    /// Node: `worker.state`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// if worker.state() == cluster::WorkerState::Listening {
    ///     let _ = cluster::systemd::notify("READY=1");
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn state(&self) -> WorkerState {
        let state = self.query(|core| core.state(self.id())).flatten();
        let without_core = || match self.master.upgrade() {
            Some(_) => WorkerState::Dead,
            // The channel closed when the master was dropped, but the worker's exit was not
            // observed.
            None if self.worker_io.exit_report.get().is_none() => WorkerState::Disconnected,
            None => WorkerState::Dead,
        };
        state.unwrap_or_else(without_core)
    }

    /// Returns whether the channel to the worker is open. The channel is open from the fork to the
    /// `disconnect` event.
    ///
    /// Node: `worker.isConnected()`.
    ///
    /// A worker that has just exited is treated as connected until that event, although
    /// [`send`](Self::send) may already fail.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let connected = master.workers().iter().filter(|worker| worker.is_connected()).count();
    /// # let _ = connected;
    /// # }
    /// ```
    #[doc(alias = "isConnected")]
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.query(|core| core.is_connected(self.id()))
            .unwrap_or(false)
    }

    /// Returns whether the worker's process has exited.
    ///
    /// Node: `worker.isDead()`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_exit(|_, worker, _| assert!(worker.is_dead()));
    /// # }
    /// ```
    #[doc(alias = "isDead")]
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.exit_status().is_some()
    }

    pub(super) fn exit_status(&self) -> Option<ExitStatus> {
        let reported = self.worker_io.exit_report.get();
        let reported = reported.map(|exit_report| exit_report.status);
        reported.or_else(|| self.query(|core| core.exit_status(self.id())).flatten())
    }

    /// Returns whether the worker exited after a requested disconnect or kill.
    ///
    /// Node: `worker.exitedAfterDisconnect`, formerly `worker.suicide`.
    ///
    /// Returns `None` until the worker has disconnected or exited. Afterwards, returns `Some(true)`
    /// if the master or the worker called [`disconnect`](Self::disconnect) or [`kill`](Self::kill)
    /// before the channel closed, and `Some(false)` otherwise. The value is set before the
    /// callbacks for `disconnect` and `exit` are called.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_exit(|master, worker, _| {
    ///     if worker.exited_after_disconnect() == Some(false) {
    ///         let _ = master.fork();
    ///     }
    /// });
    /// # }
    /// ```
    #[doc(alias = "exitedAfterDisconnect")]
    #[doc(alias = "suicide")]
    #[must_use]
    pub fn exited_after_disconnect(&self) -> Option<bool> {
        match self.worker_io.exit_report.get() {
            Some(exit_report) => Some(exit_report.exited_after_disconnect),
            None => self
                .query(|core| core.exited_after_disconnect(self.id()))
                .flatten(),
        }
    }

    /// Requests the worker to disconnect. The worker then closes its listeners, waits for its
    /// connections, and closes the channel. Returns this handle.
    ///
    /// Node: `worker.disconnect()`.
    ///
    /// The worker receives no new connections, and other workers receive those in flight to it. The
    /// worker first serves the connections that no other worker can serve. These wait in the
    /// kernel's backlog of the worker's shard, or of a listener that no other worker serves. As an
    /// exception, if no other worker serves a [retained](Master::listen) listener, the connections
    /// in its backlog wait for the next worker. With the sharded policy, this exception applies to
    /// only one shard ([`MasterListener`](crate::MasterListener)). The disconnect may take any
    /// time; [`disconnect_within`](Self::disconnect_within) sets a limit. Nothing happens if the
    /// worker is already disconnecting or disconnected.
    pub fn disconnect(&self) -> &Self {
        self.update(|core| core.disconnect(self.id()));
        self
    }

    /// Asks the worker to disconnect, and kills it if it has not exited by the deadline, which
    /// is `timeout` after the call. Returns this handle.
    ///
    /// Node has no counterpart: in Node, applications set a timer.
    ///
    /// Until the deadline, this method works like [`disconnect`](Self::disconnect). The signal is
    /// SIGKILL, which also ends a worker that loops or is stopped. Even then,
    /// [`exited_after_disconnect`](Self::exited_after_disconnect) returns `Some(true)`, unless the
    /// channel had closed before a disconnect was requested. With a timeout of zero, the master
    /// kills the worker in the next iteration of the loop. If several deadlines are set, the
    /// earliest one applies. A deadline cannot be revoked. Nothing happens if the process has
    /// already exited.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// use std::time::Duration;
    ///
    /// worker.disconnect_within(Duration::from_secs(2));
    /// # }
    /// ```
    pub fn disconnect_within(&self, timeout: Duration) -> &Self {
        self.update(|core| core.disconnect_within(self.id(), timeout));
        self
    }

    /// Requests the worker to disconnect, and sends `signal` to it when its channel has closed.
    ///
    /// Node: `worker.kill(signal)`, with the default signal `'SIGTERM'`, and its alias
    /// `worker.destroy`.
    ///
    /// The signal waits for the disconnect, so it does not end a worker that is stuck. To end a
    /// worker that is stuck, use [`process().kill`](Process::kill). A worker that has closed its
    /// channel may be about to exit by itself, so the timing decides whether `exit` reports the
    /// signal or an exit code. If the channel is already closed, the master sends the signal at
    /// once. Nothing happens if the process has already exited.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// worker.kill(cluster::Signal::TERM);
    /// # }
    /// ```
    pub fn kill(&self, signal: Signal) {
        self.update(|core| core.kill(self.id(), signal));
    }

    /// Does the same as [`kill`](Self::kill).
    ///
    /// Node: `worker.destroy(signal)`.
    ///
    /// See [`kill`](Self::kill) for an example.
    pub fn destroy(&self, signal: Signal) {
        self.kill(signal);
    }

    /// Sends a message of at most 1 MiB. The worker receives the message after all earlier ones.
    ///
    /// Node: `worker.send(message)`.
    ///
    /// A message can be sent as soon as the worker has been forked; the message then waits until
    /// the worker is online.
    ///
    /// The call writes as many bytes as the channel accepts at once. The remaining bytes wait in
    /// the master, whose loop writes them. [`Sent`] tells whether the sender should pause. If the
    /// master's process exits right after the call, the bytes that wait in the master are lost. The
    /// worker may also exit before it reads the bytes in the channel.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Send`] with one of these reasons:
    ///
    /// - [`SendError::ChannelClosed`];
    /// - [`SendError::TooLong`];
    /// - [`SendError::QueueFull`] if more than 8 MiB would be waiting.
    ///
    /// The master also emits the error as an `error` event until the worker's `exit` event. After
    /// the channel has closed, the master emits at most 16 of these events.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// let _ = master.fork()?.send(b"hi there")?;
    /// # Ok(()) }
    /// ```
    pub fn send(&self, message: &[u8]) -> Result<Sent> {
        self.send_with_fds(message, Vec::new())
    }

    /// Sends a message with at most 16 descriptors. This process closes the descriptors once they
    /// are sent.
    ///
    /// Node: `worker.send(message, handle)`.
    ///
    /// See [`send`](Self::send) for the result. To keep a descriptor, send a clone of it.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`send`](Self::send), and [`SendError::TooManyDescriptors`] for
    /// more than 16 descriptors.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) -> cluster::Result<()> {
    /// let file = std::fs::File::open("/etc/hostname").expect("a file");
    /// let _ = worker.send_with_fds(b"read this", vec![file.into()])?;
    /// # Ok(()) }
    /// ```
    pub fn send_with_fds(&self, message: &[u8], fds: Vec<OwnedFd>) -> Result<Sent> {
        self.send_with_receipt(message, fds, None)
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
    pub fn send_with(&self, message: &[u8], options: SendOptions<Master>) -> Result<Sent> {
        let (fds, written) = options.into_parts()?;
        let receipts = &self.callbacks.receipts;
        receipts.send_with(written, |receipt| {
            self.send_with_receipt(message, fds, receipt)
        })
    }

    fn send_with_receipt(
        &self,
        message: &[u8],
        fds: Vec<OwnedFd>,
        receipt: Option<ReceiptId>,
    ) -> Result<Sent> {
        let outcome = match self.master.upgrade() {
            Some(master) => {
                master.check_own()?;
                master.send(&self.worker_io, message, fds, receipt)
            }
            None => Err(SendError::ChannelClosed),
        };
        outcome.map(Sent::new).map_err(|reason| {
            let error = || Error::Send {
                worker: Some(self.id()),
                reason,
            };
            self.update(|core| core.error(Some(self.id()), error()));
            error()
        })
    }
}
