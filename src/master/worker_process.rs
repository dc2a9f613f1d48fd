//! A worker as the master sees it.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitStatus;
use std::rc::{Rc, Weak};
use std::time::Duration;

use crate::config::send::{SendOptions, Written};
use crate::core::event::{ExitReport, WorkerState};
use crate::error::{Error, Result, SendError};
use crate::master::Master;
use crate::master::shell::{Core, MasterShell, WorkerIo};
use crate::runtime::callbacks::{CallbackId, Callbacks};
use crate::sys::process::Usage;
use crate::types::address::Address;
use crate::types::message::Message;
use crate::types::signal::Signal;
use crate::types::worker_id::WorkerId;
use crate::wire::receipts::{ReceiptCallbacks, ReceiptId};

/// A worker, in the master's hands.
///
/// Node: the class `Worker`, as `cluster.fork()` returns it. It can be cloned; all clones are the
/// same worker. Every method can be called at any time, on a worker that has left too. It is also the
/// handle of a process that is not a worker ([`Settings::detached`](crate::Settings::detached())).
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
#[derive(Clone, Debug)]
pub struct WorkerProcess {
    master: Weak<MasterShell>,
    worker_io: Rc<WorkerIo>,
    callbacks: Rc<WorkerCallbacks>,
}

type OnEvent = dyn FnMut(&Master, &WorkerProcess);
type OnListening = dyn FnMut(&Master, &WorkerProcess, &Address);
type OnMessage = dyn FnMut(&Master, &WorkerProcess, &Message);
type OnExit = dyn FnMut(&Master, &WorkerProcess, ExitStatus);
type OnError = dyn FnMut(&Master, Option<&WorkerProcess>, &Error);

/// The callbacks of one worker, or of all of them.
#[derive(Debug, Default)]
pub(crate) struct WorkerCallbacks {
    pub(crate) online: Callbacks<OnEvent>,
    pub(crate) listening: Callbacks<OnListening>,
    pub(crate) message: Callbacks<OnMessage>,
    pub(crate) disconnect: Callbacks<OnEvent>,
    pub(crate) exit: Callbacks<OnExit>,
    pub(crate) error: Callbacks<OnError>,
    /// To be called when their messages have been written.
    pub(crate) receipts: ReceiptCallbacks<Written<Master>>,
}

impl WorkerCallbacks {
    pub(crate) fn once(&self, id: CallbackId) {
        self.online.once(id);
        self.listening.once(id);
        self.message.once(id);
        self.disconnect.once(id);
        self.exit.once(id);
        self.error.once(id);
    }

    pub(crate) fn remove(&self, id: CallbackId) {
        self.online.remove(id);
        self.listening.remove(id);
        self.message.remove(id);
        self.disconnect.remove(id);
        self.exit.remove(id);
        self.error.remove(id);
    }

    pub(crate) fn clear(&self) {
        self.online.clear();
        self.listening.clear();
        self.message.clear();
        self.disconnect.clear();
        self.exit.clear();
        self.error.clear();
        self.receipts.clear();
    }
}

impl PartialEq for WorkerProcess {
    fn eq(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.worker_io, &other.worker_io)
    }
}

impl Eq for WorkerProcess {}

impl WorkerProcess {
    pub(crate) fn new(
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

    pub(crate) fn callbacks(&self) -> &WorkerCallbacks {
        &self.callbacks
    }

    pub(crate) fn has_left(&self, exit_report: ExitReport) {
        self.worker_io.exit_report.set(Some(exit_report));
    }

    /// Asks the core, unless the worker has left or the master is gone.
    fn ask<T>(&self, ask: impl FnOnce(&Core) -> T) -> Option<T> {
        if self.worker_io.exit_report.get().is_some() {
            return None;
        }
        let master = self.master.upgrade()?;
        let core = master.core.borrow();
        Some(ask(&core))
    }

    /// Tells the core, and carries out what follows.
    fn tell(&self, tell: impl FnOnce(&mut Core)) {
        if let Some(master) = self.master.upgrade() {
            tell(&mut master.core_now());
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

    /// Returns the worker's process, for what is done to it without the cluster's courtesy.
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
        Process(self)
    }

    /// Returns how far the worker has come.
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
        let state = self.ask(|core| core.state(self.id())).flatten();
        let is_gone = || match self.master.upgrade() {
            Some(_) => WorkerState::Dead,
            // Its channel has closed with the master, and nobody knows more.
            None if self.worker_io.exit_report.get().is_none() => WorkerState::Disconnected,
            None => WorkerState::Dead,
        };
        state.unwrap_or_else(is_gone)
    }

    /// Returns whether the channel to the worker is open, as it is from the fork to the
    /// `disconnect` event. A worker that has just died counts as connected until then: only
    /// [`send`](Self::send) tells.
    ///
    /// Node: `worker.isConnected()`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let connected = master.workers().iter().filter(|worker| worker.is_connected()).count();
    /// # let _ = connected;
    /// # }
    /// ```
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.ask(|core| core.is_connected(self.id()))
            .unwrap_or(false)
    }

    /// Returns whether the worker's process has ended.
    ///
    /// Node: `worker.isDead()`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_exit(|_, worker, _| assert!(worker.is_dead()));
    /// # }
    /// ```
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.exit_status().is_some()
    }

    fn exit_status(&self) -> Option<ExitStatus> {
        let departed = self.worker_io.exit_report.get().map(|left| left.status);
        departed.or_else(|| self.ask(|core| core.exit_status(self.id())).flatten())
    }

    /// Returns whether the worker left because it was to: `Some(true)` after
    /// [`disconnect`](Self::disconnect) or [`kill`](Self::kill), here or in the worker,
    /// `Some(false)` if it left in any other way, and `None` as long as it has not left. It is set
    /// when `disconnect` and `exit` are called.
    ///
    /// Node: `worker.exitedAfterDisconnect`, once `worker.suicide`.
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
    #[must_use]
    pub fn exited_after_disconnect(&self) -> Option<bool> {
        match self.worker_io.exit_report.get() {
            Some(exit_report) => Some(exit_report.exited_after_disconnect),
            None => self
                .ask(|core| core.exited_after_disconnect(self.id()))
                .flatten(),
        }
    }

    /// Asks the worker to leave: to close its listeners, wait for its connections, and close the
    /// channel. Returns the worker.
    ///
    /// Node: `worker.disconnect()`. It gets no new connection; what other workers can serve goes
    /// to them, and what only this one can (the kernel's queue of a listener that nobody else
    /// serves) it still gets before it leaves. It may take all the time it wants:
    /// [`disconnect_within`](Self::disconnect_within) sets a limit. Nothing happens if it is leaving
    /// already or has left.
    pub fn disconnect(&self) -> &Self {
        self.tell(|core| core.disconnect(self.id()));
        self
    }

    /// Asks the worker to leave, and kills it if it has not exited when `deadline`, counted from
    /// now, is over. Returns the worker.
    ///
    /// Node has no counterpart: there, programs set a timer. The worker leaves as after
    /// [`disconnect`](Self::disconnect), and if it has to be killed (SIGKILL, which also ends one
    /// that loops or is stopped), it counts as having left on purpose all the same. With zero it is
    /// killed when the loop turns next. Of several deadlines the first one counts, and there is no
    /// way back. Nothing happens if the process has ended.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// use std::time::Duration;
    ///
    /// worker.disconnect_within(Duration::from_secs(2));
    /// # }
    /// ```
    pub fn disconnect_within(&self, deadline: Duration) -> &Self {
        self.tell(|core| core.disconnect_within(self.id(), deadline));
        self
    }

    /// Asks the worker to leave, and sends it `signal` once its channel is closed.
    ///
    /// Node: `worker.kill(signal)`, with `'SIGTERM'` as the default signal, and its alias
    /// `worker.destroy`. Because it waits for the worker to disconnect, it does not end one that is
    /// stuck: [`process().kill`](Process::kill) does. The signal comes when the worker has closed
    /// its channel and may be about to end by itself: whether `exit` reports the signal or a code
    /// is then a matter of chance. If the channel is closed already, the signal is sent at once; if
    /// the process has ended, nothing happens.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// worker.kill(cluster::Signal::TERM);
    /// # }
    /// ```
    pub fn kill(&self, signal: Signal) {
        self.tell(|core| core.kill(self.id(), signal));
    }

    /// The same as [`kill`](Self::kill), which has an example.
    ///
    /// Node: `worker.destroy(signal)`.
    pub fn destroy(&self, signal: Signal) {
        self.kill(signal);
    }

    /// Sends a message of at most 1 MiB. It arrives after everything sent before.
    ///
    /// Node: `worker.send(message)`. Returns `true`, or `false` as advice to pause when with one more
    /// such message over 64 KiB would wait to be written, until [`on_written`](SendOptions::on_written) of the last message;
    /// the message is on its way in both cases. It may be sent as soon
    /// as the worker is forked, and waits for it to come online.
    ///
    /// # Errors
    ///
    /// [`Error::Send`] with [`SendError::ChannelClosed`], [`SendError::TooLong`], or
    /// [`SendError::QueueFull`] when 8 MiB wait already. The same error then comes as an `error`
    /// event, until the worker's `exit` and at most 16 times once its channel is closed.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// master.fork()?.send(b"hi there")?;
    /// # Ok(()) }
    /// ```
    pub fn send(&self, message: &[u8]) -> Result<bool> {
        self.send_with_fds(message, Vec::new())
    }

    /// Sends a message with at most 16 descriptors, which are closed here once they are sent.
    ///
    /// Node: `worker.send(message, handle)`. See [`send`](Self::send) for what is returned; to keep
    /// a descriptor, send a clone.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send), and [`SendError::TooManyDescriptors`].
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) -> cluster::Result<()> {
    /// let file = std::fs::File::open("/etc/hostname").expect("a file");
    /// worker.send_with_fds(b"read this", vec![file.into()])?;
    /// # Ok(()) }
    /// ```
    pub fn send_with_fds(&self, message: &[u8], fds: Vec<OwnedFd>) -> Result<bool> {
        self.send_with_receipt(message, fds, None)
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
    pub fn send_with(&self, message: &[u8], options: SendOptions<Master>) -> Result<bool> {
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
    ) -> Result<bool> {
        let master = self.master.upgrade();
        master
            .as_ref()
            .map_or(Ok(()), |master| master.check_own())?;
        let outcome = match master {
            Some(master) => master.send(&self.worker_io, message, fds, receipt),
            None => Err(SendError::ChannelClosed),
        };
        outcome.map_err(|reason| {
            let error = || Error::Send {
                worker: Some(self.id()),
                reason,
            };
            self.tell(|core| core.error(Some(self.id()), error()));
            error()
        })
    }
}

/// Callbacks of this worker alone. For every event but `message` they are called before the
/// cluster's. [`Master::off`] removes them; they end with the worker's `exit`.
impl WorkerProcess {
    /// Calls back when the worker's program has called [`init`](crate::init).
    ///
    /// Node: `worker.on('online')`. See [`Master::on_online`] for an example.
    pub fn on_online(&self, callback: impl FnMut(&Master, &Self) + 'static) -> CallbackId {
        let callbacks = &self.callbacks.online;
        callbacks.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when the worker listens, once for each of its listeners.
    ///
    /// Node: `worker.on('listening')`. See [`Master::on_listening`] for an example.
    pub fn on_listening(
        &self,
        callback: impl FnMut(&Master, &Self, &Address) + 'static,
    ) -> CallbackId {
        let callbacks = &self.callbacks.listening;
        callbacks.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when a message has come from the worker, after the cluster's callbacks.
    ///
    /// Node: `worker.on('message')`. See [`Master::on_message`] for an example.
    pub fn on_message(
        &self,
        callback: impl FnMut(&Master, &Self, &Message) + 'static,
    ) -> CallbackId {
        let callbacks = &self.callbacks.message;
        callbacks.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when the worker's channel has closed.
    ///
    /// Node: `worker.on('disconnect')`. See [`Master::on_disconnect`] for an example.
    pub fn on_disconnect(&self, callback: impl FnMut(&Master, &Self) + 'static) -> CallbackId {
        let callbacks = &self.callbacks.disconnect;
        callbacks.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when the worker has ended.
    ///
    /// Node: `worker.on('exit')`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use std::os::unix::process::ExitStatusExt;
    ///
    /// master.fork()?.on_exit(|_, _, status| match (status.code(), status.signal()) {
    ///     (Some(0), _) => println!("worker success!"),
    ///     (Some(code), _) => println!("worker exited with error code: {code}"),
    ///     (None, signal) => println!("worker was killed by signal: {signal:?}"),
    /// });
    /// # Ok(()) }
    /// ```
    pub fn on_exit(
        &self,
        callback: impl FnMut(&Master, &Self, ExitStatus) + 'static,
    ) -> CallbackId {
        let callbacks = &self.callbacks.exit;
        callbacks.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when something concerning the worker failed outside any call of the program's.
    ///
    /// Node: `worker.on('error')`. See [`Master::on_error`] for an example.
    pub fn on_error(
        &self,
        mut callback: impl FnMut(&Master, &Self, &Error) + 'static,
    ) -> CallbackId {
        let with_worker = move |master: &Master, worker: Option<&Self>, error: &Error| {
            if let Some(worker) = worker {
                callback(master, worker, error);
            }
        };
        let callbacks = &self.callbacks.error;
        callbacks.add(Rc::new(RefCell::new(with_worker)))
    }
}

/// The process of a worker, as the system knows it.
///
/// Node: `worker.process`, a `ChildProcess`. See [`WorkerProcess::process`] for an example.
#[derive(Clone, Copy, Debug)]
pub struct Process<'a>(&'a WorkerProcess);

impl Process<'_> {
    /// Returns the process id. It is the worker's own until its `exit` event.
    ///
    /// Node: `worker.process.pid`. See [`WorkerProcess::process`] for an example.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.worker_io.pid.number()
    }

    /// Sends `signal` at once, without disconnecting first.
    ///
    /// Node: `worker.process.kill(signal)`. It does not count as leaving on purpose. Nothing
    /// happens if the process has ended.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// worker.process().kill(cluster::Signal::KILL);
    /// # }
    /// ```
    pub fn kill(&self, signal: Signal) {
        self.0.tell(|core| core.signal(self.0.id(), signal));
    }

    /// Closes the channel without a word: the worker leaves at once, and it does not count as
    /// leaving on purpose.
    ///
    /// Node: `worker.process.disconnect()`. Connections on their way to it go to other workers.
    ///
    /// ```no_run
    /// # fn f(worker: &cluster::WorkerProcess) {
    /// worker.process().disconnect();
    /// # }
    /// ```
    pub fn disconnect(&self) {
        self.0.tell(|core| core.close_channel(self.0.id()));
    }

    /// Takes the master's end of the pipe that is the worker's descriptor `number`: 0 for its
    /// standard input, 1 for its output, 2 for its error output, or one beyond; `None` if it is no
    /// pipe ([`Settings::silent`](crate::Settings::silent) and
    /// [`Settings::stdio`](crate::Settings::stdio) make them), or has been taken already.
    ///
    /// Node: `worker.process.stdin`, `stdout`, `stderr` and `stdio[number]`. It is a stream, as in
    /// Node: it can be read and written, and [`watch`](Master::watch)ed. It blocks, like any new
    /// one. A worker that fills a pipe that nobody reads waits. An end that nobody takes is closed
    /// after the worker's `exit` event.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use std::io::Read;
    /// use cluster::{Interest, Settings};
    ///
    /// master.setup_master(Settings::default().silent(true));
    /// if let Some(output) = master.fork()?.process().take_stdio(1) {
    ///     master.watch(output, Interest::Readable, |_, mut output| {
    ///         let mut bytes = [0; 4096];
    ///         let length = output.read(&mut bytes).ok().filter(|length| *length > 0)?;
    ///         print!("{}", String::from_utf8_lossy(&bytes[..length]));
    ///         Some(Interest::Readable)
    ///     })?;
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn take_stdio(&self, number: usize) -> Option<UnixStream> {
        self.0.worker_io.stdio.borrow_mut().remove(&number)
    }

    /// Lets the master end although this worker is still there: [`Master::run`] does not wait for
    /// it. The worker goes on as long as the master's process does. `run`
    /// never waits for a [detached](crate::Settings::detached()) process before [`ref_`](Self::ref_).
    ///
    /// Node: `worker.process.unref()`, with that of its channel.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// master.fork()?.process().unref();
    /// # Ok(()) }
    /// ```
    pub fn unref(&self) {
        self.0.tell(|core| core.reference(self.0.id(), false));
    }

    /// Makes [`Master::run`] wait for the process: undoes [`unref`](Self::unref), which has an
    /// example.
    ///
    /// Node: `worker.process.ref()`.
    pub fn ref_(&self) {
        self.0.tell(|core| core.reference(self.0.id(), true));
    }

    /// Returns how the process ended, or `None` as long as it has not.
    ///
    /// Node: `worker.process.exitCode` and `worker.process.signalCode`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_exit(|_, worker, status| {
    ///     assert_eq!(worker.process().exit_status(), Some(status));
    /// });
    /// # }
    /// ```
    #[must_use]
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.0.exit_status()
    }

    /// Returns what the process has used in its life: `None` until it has ended, and if something else
    /// in the master has waited for it.
    ///
    /// Node has no counterpart; a process can ask for its own by `process.resourceUsage()`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_exit(|_, worker, _| {
    ///     if let Some(usage) = worker.process().usage() {
    ///         let time = usage.user_cpu_time + usage.system_cpu_time;
    ///         println!("worker {}: {time:?}, {} KiB", worker.id(), usage.max_rss >> 10);
    ///     }
    /// });
    /// # }
    /// ```
    #[must_use]
    pub fn usage(&self) -> Option<Usage> {
        self.0.worker_io.usage.get()
    }
}
