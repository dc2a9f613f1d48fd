//! A worker, as the master sees it.

use std::os::fd::OwnedFd;
use std::process::ExitStatus;
use std::rc::{Rc, Weak};
use std::time::Duration;

use crate::config::send::{SendOptions, Sent};
use crate::core::event::{ExitReport, WorkerState};
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
/// Node: the class `Worker`, as `cluster.fork()` returns it. The handle can be cloned; all clones stand
/// for the same worker. Every method can be called at any time, also after the worker has exited. It is also
/// the handle of a process that is not a worker ([`Settings::detached`](crate::Settings::detached)).
///
/// The handle is not `Send`, as the [`Master`] is not. Another thread addresses a worker by its
/// [`WorkerId`], for instance through a pipe that the master [`watch`](Master::watch)es.
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

    /// Reads a fact from the core. It is `None` if the worker has left the table, or the master has been
    /// dropped.
    fn query<T>(&self, query: impl FnOnce(&Core) -> T) -> Option<T> {
        if self.worker_io.exit_report.get().is_some() {
            return None;
        }
        let master = self.master.upgrade()?;
        let core = master.core.borrow();
        Some(query(&core))
    }

    /// Passes a request to the core, and carries out what follows.
    pub(super) fn update(&self, update: impl FnOnce(&mut Core)) {
        if let Some(master) = self.master.upgrade() {
            update(&mut master.core_now());
            master.act();
        }
    }

    /// Returns the number of the worker.
    ///
    /// Node: `worker.id`. See [`Master::on_online`] for an example.
    #[must_use]
    pub fn id(&self) -> WorkerId {
        self.worker_io.id
    }

    /// Returns the worker's process, whose methods bypass the orderly disconnect.
    ///
    /// Node: `worker.process`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// println!("worker {} has pid {}", worker.id(), worker.process().id());
    /// # }
    /// ```
    #[must_use]
    pub fn process(&self) -> Process<'_> {
        Process::new(self)
    }

    /// Returns the stage of life that the worker has reached.
    ///
    /// Node: `worker.state`.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// if worker.state() == cluster::WorkerState::Listening {
    ///     println!("worker {} serves", worker.id());
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn state(&self) -> WorkerState {
        let state = self.query(|core| core.state(self.id())).flatten();
        let without_core = || match self.master.upgrade() {
            Some(_) => WorkerState::Dead,
            // The channel closed when the master was dropped; the exit was not observed.
            None if self.worker_io.exit_report.get().is_none() => WorkerState::Disconnected,
            None => WorkerState::Dead,
        };
        state.unwrap_or_else(without_core)
    }

    /// Returns whether the channel to the worker is open, from the fork to the `disconnect` event.
    ///
    /// A worker that has just exited is treated as connected until that event. Only
    /// [`send`](Self::send) fails before.
    ///
    /// Node: `worker.isConnected()`.
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

    /// Returns whether the worker exited because it was requested to. It is `Some(true)` after
    /// [`disconnect`](Self::disconnect) or [`kill`](Self::kill), here or in the worker, `Some(false)`
    /// after any other exit, and `None` until the exit. The value is already set when the callbacks for
    /// `disconnect` and `exit` are called.
    ///
    /// Node: `worker.exitedAfterDisconnect`, formerly `worker.suicide`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_exit(|master, worker, _| {
    ///     if worker.exited_after_disconnect() == Some(true) {
    ///         println!("Oh, it was just voluntary – no need to worry");
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

    /// Requests the worker to disconnect: to close its listeners, wait for its connections, and close the
    /// channel. Returns the worker.
    ///
    /// Node: `worker.disconnect()`. The worker gets no new connections, and other workers get those in
    /// flight to it. Before it disconnects, it serves the connections that only it can serve: the
    /// kernel's backlog of a listener that no other worker serves. It may take any time;
    /// [`disconnect_within`](Self::disconnect_within) sets a limit. Nothing happens if it is already
    /// disconnecting or disconnected.
    pub fn disconnect(&self) -> &Self {
        self.update(|core| core.disconnect(self.id()));
        self
    }

    /// Requests the worker to disconnect, and kills it if it has not exited when `deadline`, counted from
    /// now, has passed. Returns the worker.
    ///
    /// Node has no counterpart: there, applications set a timer. Until the deadline, everything is as with
    /// [`disconnect`](Self::disconnect). The signal is SIGKILL, which also ends a worker that loops or is
    /// stopped. The exit is treated as voluntary even then. With a deadline of zero, the worker is killed
    /// in the next iteration of the loop. Of several deadlines, the first one counts. A deadline cannot be
    /// revoked. Nothing happens if the process has exited.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// use std::time::Duration;
    ///
    /// worker.disconnect_within(Duration::from_secs(2));
    /// # }
    /// ```
    pub fn disconnect_within(&self, deadline: Duration) -> &Self {
        self.update(|core| core.disconnect_within(self.id(), deadline));
        self
    }

    /// Requests the worker to disconnect, and sends it `signal` when its channel has closed.
    ///
    /// Node: `worker.kill(signal)`, with `'SIGTERM'` as the default signal, and its alias
    /// `worker.destroy`. Because the signal waits for the disconnect, it does not end a worker that is
    /// stuck: [`process().kill`](Process::kill) does. A worker that has closed its channel may be about to
    /// exit by itself. Whether `exit` then reports the signal or an exit code depends on timing. If the
    /// channel is already closed, the signal is sent at once. If the process has exited, nothing happens.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// worker.kill(cluster::Signal::TERM);
    /// # }
    /// ```
    pub fn kill(&self, signal: Signal) {
        self.update(|core| core.kill(self.id(), signal));
    }

    /// Does the same as [`kill`](Self::kill), which has an example.
    ///
    /// Node: `worker.destroy(signal)`.
    pub fn destroy(&self, signal: Signal) {
        self.kill(signal);
    }

    /// Sends a message of at most 1 MiB. It arrives after everything that was sent before.
    ///
    /// Node: `worker.send(message)`. A message may be sent as soon as the worker is forked; it waits until
    /// the worker is online.
    ///
    /// The call writes as much as the channel takes at once. The rest waits in the master, and is written
    /// by its loop. [`Sent`] tells whether the sender should pause. If the master's process exits right
    /// after the call, what waits in the master is lost, and a worker may exit before it reads the rest.
    ///
    /// # Errors
    ///
    /// [`Error::Send`] with [`SendError::ChannelClosed`], [`SendError::TooLong`], or
    /// [`SendError::QueueFull`] if 8 MiB are already waiting. The same error is also emitted as an `error`
    /// event, until the worker's `exit`, and at most 16 times after its channel has closed.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// let _ = master.fork()?.send(b"hi there")?;
    /// # Ok(()) }
    /// ```
    pub fn send(&self, message: &[u8]) -> Result<Sent> {
        self.send_with_fds(message, Vec::new())
    }

    /// Sends a message with at most 16 descriptors, which are closed in this process once they are sent.
    ///
    /// Node: `worker.send(message, handle)`. See [`send`](Self::send) for the result. To keep a
    /// descriptor, send a clone.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send), and [`SendError::TooManyDescriptors`].
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

    /// Sends a message with descriptors, and with a callback for the time when it is written. See
    /// [`SendOptions`] for an example.
    ///
    /// Node: `worker.send(message, handle, options, callback)`. See [`send`](Self::send) for the result.
    ///
    /// # Errors
    ///
    /// As [`send_with_fds`](Self::send_with_fds), and [`Error::Io`] if a descriptor of
    /// [`keep_open`](SendOptions::keep_open) cannot be copied.
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
