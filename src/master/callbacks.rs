//! The callbacks of the master and of its workers.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::process::ExitStatus;
use std::rc::Rc;

use crate::config::send::Written;
use crate::config::settings::Settings;
use crate::error::{Error, Result};
use crate::master::Master;
use crate::master::worker_process::WorkerProcess;
use crate::runtime::callback_methods::callback_methods;
use crate::runtime::callbacks::{CallbackId, Callbacks};
use crate::types::address::Address;
use crate::types::signal::Signal;
use crate::wire::message::Message;
use crate::wire::receipts::ReceiptCallbacks;

type OnEvent = dyn FnMut(&Master, &WorkerProcess);
type OnListening = dyn FnMut(&Master, &WorkerProcess, &Address);
type OnMessage = dyn FnMut(&Master, &WorkerProcess, &Message);
type OnExit = dyn FnMut(&Master, &WorkerProcess, ExitStatus);
type OnError = dyn FnMut(&Master, Option<&WorkerProcess>, &Error);
type OnSetup = dyn FnMut(&Master, &Settings);
type OnAllDisconnected = dyn FnMut(&Master);

/// The callbacks of one worker, or of all workers.
#[derive(Debug, Default)]
pub(crate) struct WorkerCallbacks {
    pub(super) online: Callbacks<OnEvent>,
    pub(super) listening: Callbacks<OnListening>,
    pub(super) message: Callbacks<OnMessage>,
    pub(super) disconnect: Callbacks<OnEvent>,
    pub(super) exit: Callbacks<OnExit>,
    pub(super) error: Callbacks<OnError>,
    /// The callbacks of `SendOptions::on_written`.
    pub(super) receipts: ReceiptCallbacks<Written<Master>>,
}

impl WorkerCallbacks {
    fn remove(&self, id: CallbackId) {
        self.online.remove(id);
        self.listening.remove(id);
        self.message.remove(id);
        self.disconnect.remove(id);
        self.exit.remove(id);
        self.error.remove(id);
    }

    pub(super) fn clear(&self) {
        self.online.clear();
        self.listening.clear();
        self.message.clear();
        self.disconnect.clear();
        self.exit.clear();
        self.error.clear();
        self.receipts.clear();
    }
}

/// The cluster's callbacks, except those for signals.
#[derive(Default)]
pub(super) struct MasterCallbacks {
    pub(super) fork: Callbacks<OnEvent>,
    pub(super) setup: Callbacks<OnSetup>,
    pub(super) all_disconnected: Callbacks<OnAllDisconnected>,
    /// The callbacks of a finished disconnect that have not been called yet. The list is a field,
    /// so that the other callbacks are still called if one panics and the application continues.
    pub(super) all_disconnected_pending: RefCell<VecDeque<CallbackId>>,
    /// The cluster's callbacks for the events of all workers.
    pub(super) workers: WorkerCallbacks,
}

/// The methods that add and remove callbacks.
///
/// Each `on_…` method adds a callback to the existing ones, and returns the id of the callback for
/// [`remove_callback`](Master::remove_callback). These callbacks are the cluster's: they receive
/// the events of all workers. The callbacks that were added for one worker are called first, except
/// for `message`, where they are called last.
impl Master {
    callback_methods! {
        /// Calls `callback` when a worker has been forked.
        ///
        /// Node: `cluster.on('fork')`.
        ///
        /// ```no_run
        /// # fn f(master: &cluster::Master) {
        /// let log = cluster::LogWriter::stderr().attached_to(master);
        /// master.on_fork(move |_, worker| log.line(format_args!("forked {}", worker.id())));
        /// # }
        /// ```
        on_fork, on_fork_once(master: &Self, worker: &WorkerProcess) of |this| this.callbacks.fork;

        /// Calls `callback` when a worker is online: its program has called
        /// [`init`](crate::init()), or it is about to run the closure of [`Settings::main`].
        ///
        /// Node: `cluster.on('online')`.
        ///
        /// ```no_run
        /// # fn f(master: &cluster::Master) {
        /// master.on_online(|_, worker| drop(worker.send(b"the configuration")));
        /// # }
        /// ```
        on_online, on_online_once(master: &Self, worker: &WorkerProcess)
            of |this| this.callbacks.workers.online;

        /// Calls `callback` when a worker listens, once for each of the worker's listeners.
        ///
        /// Node: `cluster.on('listening')`.
        ///
        /// ```no_run
        /// # fn f(master: &cluster::Master) {
        /// let log = cluster::LogWriter::stderr().attached_to(master);
        /// master.on_listening(move |_, worker, address| {
        ///     log.line(format_args!("worker {} is now connected to {address}", worker.id()));
        /// });
        /// # }
        /// ```
        on_listening, on_listening_once(master: &Self, worker: &WorkerProcess, address: &Address)
            of |this| this.callbacks.workers.listening;

        /// Calls `callback` when a message from a worker arrives, before the worker's own
        /// callbacks.
        ///
        /// Node: `cluster.on('message')`.
        ///
        /// ```no_run
        /// # fn f(master: &cluster::Master) {
        /// master.on_message(|_, worker, message| {
        ///     let _ = worker.send(message.bytes()); // an echo
        /// });
        /// # }
        /// ```
        on_message, on_message_once(master: &Self, worker: &WorkerProcess, message: &Message)
            of |this| this.callbacks.workers.message;

        /// Calls `callback` when a worker's channel has closed.
        ///
        /// Node: `cluster.on('disconnect')`.
        ///
        /// ```no_run
        /// # fn f(master: &cluster::Master) {
        /// let log = cluster::LogWriter::stderr().attached_to(master);
        /// master.on_disconnect(move |_, worker| {
        ///     log.line(format_args!("worker {} has disconnected", worker.id()));
        /// });
        /// # }
        /// ```
        on_disconnect, on_disconnect_once(master: &Self, worker: &WorkerProcess)
            of |this| this.callbacks.workers.disconnect;

        /// Calls `callback` when a worker has exited, with its exit code or the signal that killed
        /// it.
        ///
        /// Node: `cluster.on('exit')`.
        ///
        /// A worker emits no event after `exit`. The process no longer exists, and
        /// [`workers`](Self::workers) no longer contains the worker.
        ///
        /// ```no_run
        /// # fn f(master: &cluster::Master) {
        /// let log = cluster::LogWriter::stderr().attached_to(master);
        /// master.on_exit(move |master, worker, status| {
        ///     log.line(format_args!("worker {} exited ({status}), restarting", worker.id()));
        ///     let _ = master.fork();
        /// });
        /// # }
        /// ```
        on_exit, on_exit_once(master: &Self, worker: &WorkerProcess, status: ExitStatus)
            of |this| this.callbacks.workers.exit;

        /// Calls `callback` for each error that no call of the application can return, and for each
        /// message that could not be sent to a worker. The callback receives the worker that the
        /// error concerns, or `None` if the error concerns no worker.
        ///
        /// Node: the `error` events.
        ///
        /// Errors are ignored while there is no callback. After a worker's channel has closed, the
        /// callback receives at most 16 more of the worker's errors.
        ///
        /// ```no_run
        /// # fn f(master: &cluster::Master) {
        /// let log = cluster::LogWriter::stderr().attached_to(master);
        /// master.on_error(move |_, _, error| log.line(error));
        /// # }
        /// ```
        on_error, on_error_once(master: &Self, worker: Option<&WorkerProcess>, error: &Error)
            of |this| this.callbacks.workers.error;

        /// Calls `callback` for each call of [`setup_master`](Self::setup_master). The callback
        /// receives the settings that are current when the event is delivered.
        ///
        /// Node: `cluster.on('setup')`.
        ///
        /// Each call of [`fork`](Self::fork) or [`fork_with`](Self::fork_with) also calls
        /// `setup_master` once.
        ///
        /// ```no_run
        /// # fn f(master: &cluster::Master) {
        /// let log = cluster::LogWriter::stderr().attached_to(master);
        /// master.on_setup(move |_, settings| {
        ///     log.line(format_args!("workers run {:?}", settings.get_exec()));
        /// });
        /// # }
        /// ```
        on_setup, on_setup_once(master: &Self, settings: &Settings) of |this| this.callbacks.setup;

        /// Calls `callback` when a [`disconnect`](Self::disconnect) or
        /// [`disconnect_within`](Self::disconnect_within) has finished. All workers have then
        /// exited, and all listeners except the retained ones are closed.
        ///
        /// Node: the callback of `cluster.disconnect(callback)`.
        ///
        /// If several calls finish together, the event is emitted once.
        ///
        /// ```no_run
        /// # fn f(master: &cluster::Master) {
        /// master.on_all_disconnected(|master| drop(master.fork())); // restarts after a disconnect
        /// # }
        /// ```
        on_all_disconnected, on_all_disconnected_once(master: &Self)
            of |this| this.callbacks.all_disconnected;
    }

    /// Calls `callback` when the process receives `signal`. The callback runs in the loop, not in a
    /// signal handler.
    ///
    /// Node: `process.on(signal)`.
    ///
    /// The signal loses its default action until the master is dropped. A handler that the
    /// application installed earlier still runs. If the same signal arrives several times in a
    /// short period, the callback may be called only once.
    ///
    /// The callback is also called if the process was started with the signal blocked or ignored.
    /// For example, nohup(1) starts programs with SIGHUP ignored. To respect that choice, check
    /// [`is_signal_ignored`](Self::is_signal_ignored) first. `on_signal` unblocks the signal on the
    /// calling thread until the master is dropped. It does not change the signal masks of other
    /// threads (pthread_sigmask(3)).
    ///
    /// The kernel sends SIGTTIN or SIGTTOU to a background job that reads from its terminal or
    /// writes to it. In this case, the callback is not called and the process does not stop. If
    /// this process itself reads or writes, the write succeeds and the read fails with EIO.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Io`] if the signal cannot be handled, for instance `KILL` or `STOP`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::Signal;
    ///
    /// for signal in [Signal::INT, Signal::TERM] {
    ///     master.on_signal(signal, |master, _| master.disconnect())?;
    /// }
    /// # Ok(()) }
    /// ```
    pub fn on_signal(
        &self,
        signal: Signal,
        callback: impl FnMut(&Self, Signal) + 'static,
    ) -> Result<CallbackId> {
        self.event_loop.on_signal(signal, callback)
    }

    /// Calls `callback` once, when the process next receives `signal`. As with
    /// [`on_signal`](Self::on_signal), the signal loses its default action until the master is
    /// dropped.
    ///
    /// Node: `once`.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`on_signal`](Self::on_signal).
    #[doc(alias = "once")]
    pub fn on_signal_once(
        &self,
        signal: Signal,
        callback: impl FnOnce(&Self, Signal) + 'static,
    ) -> Result<CallbackId> {
        self.event_loop.on_signal_once(signal, callback)
    }

    /// Returns whether this process ignored `signal` when [`init`](crate::init()) created the
    /// master. Workers ignore the same signals.
    ///
    /// Node has no counterpart.
    ///
    /// A process inherits ignored signals from the process that starts it. For example, nohup(1)
    /// ignores SIGHUP, and a shell without job control ignores SIGINT and SIGQUIT for its
    /// background jobs. The result is always `false` for SIGPIPE and SIGCHLD. The runtime of every
    /// Rust program ignores SIGPIPE, so its disposition does not show what the process has
    /// inherited. Workers do not ignore SIGCHLD, because they could not wait for their own
    /// children.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::Signal;
    ///
    /// if !master.is_signal_ignored(Signal::HUP) {
    ///     master.on_signal(Signal::HUP, |master, _| master.disconnect())?;
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn is_signal_ignored(&self, signal: Signal) -> bool {
        self.shell.ignored_signals.contains(signal.number())
    }

    /// Removes a callback, whether it was added for the cluster, for a worker, or for a signal.
    ///
    /// Node: `cluster.removeListener()`.
    ///
    /// Nothing happens if the callback has already been removed.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let restart = master.on_exit(|master, _, _| drop(master.fork()));
    /// master.remove_callback(restart);
    /// master.disconnect();
    /// # }
    /// ```
    #[doc(alias = "off")]
    #[doc(alias = "removeListener")]
    pub fn remove_callback(&self, id: CallbackId) {
        self.callbacks.fork.remove(id);
        self.callbacks.setup.remove(id);
        self.callbacks.all_disconnected.remove(id);
        self.callbacks.workers.remove(id);
        // Collect the lists first, so that the table is not borrowed while callbacks are removed:
        // dropping a callback may run code that calls this method again.
        let workers: Vec<_> = self
            .worker_callbacks
            .borrow()
            .values()
            .map(Rc::clone)
            .collect();
        for callbacks in workers {
            callbacks.remove(id);
        }
        self.event_loop.remove_signal_callback(id);
    }
}

/// The methods that add callbacks for one worker.
///
/// These callbacks are called before the cluster's callbacks for the same event. For `message`,
/// they are called after the cluster's callbacks. [`Master::remove_callback`] removes these
/// callbacks. The master drops them after the worker's `exit` event.
impl WorkerProcess {
    callback_methods! {
        /// Calls `callback` when the worker is online: its program has called
        /// [`init`](crate::init()), or it is about to run the closure of [`Settings::main`].
        ///
        /// Node: `worker.on('online')`.
        ///
        /// See [`Master::on_online`] for an example.
        on_online, on_online_once(master: &Master, worker: &Self) of |this| this.callbacks().online;

        /// Calls `callback` when the worker listens, once for each of the worker's listeners.
        ///
        /// Node: `worker.on('listening')`.
        ///
        /// See [`Master::on_listening`] for an example.
        on_listening, on_listening_once(master: &Master, worker: &Self, address: &Address)
            of |this| this.callbacks().listening;

        /// Calls `callback` when a message from the worker arrives, after the cluster's callbacks.
        ///
        /// Node: `worker.on('message')`.
        ///
        /// See [`Master::on_message`] for an example.
        on_message, on_message_once(master: &Master, worker: &Self, message: &Message)
            of |this| this.callbacks().message;

        /// Calls `callback` when the worker's channel has closed.
        ///
        /// Node: `worker.on('disconnect')`.
        ///
        /// See [`Master::on_disconnect`] for an example.
        on_disconnect, on_disconnect_once(master: &Master, worker: &Self)
            of |this| this.callbacks().disconnect;

        /// Calls `callback` when the worker has exited.
        ///
        /// Node: `worker.on('exit')`.
        ///
        /// ```no_run
        /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
        /// use std::os::unix::process::ExitStatusExt;
        ///
        /// let log = cluster::LogWriter::stderr().attached_to(master);
        /// master.fork()?.on_exit(move |_, _, status| match (status.code(), status.signal()) {
        ///     (Some(0), _) => log.line("worker success!"),
        ///     (Some(code), _) => log.line(format_args!("worker exited with error code: {code}")),
        ///     (None, signal) => log.line(format_args!("worker was killed by signal: {signal:?}")),
        /// });
        /// # Ok(()) }
        /// ```
        on_exit, on_exit_once(master: &Master, worker: &Self, status: ExitStatus)
            of |this| this.callbacks().exit;
    }

    /// Calls `callback` for each error that concerns the worker and that no call of the application
    /// can return, and for each message that could not be sent to the worker.
    ///
    /// Node: `worker.on('error')`.
    ///
    /// See [`Master::on_error`] for an example, and for errors after the channel has closed.
    pub fn on_error(&self, callback: impl FnMut(&Master, &Self, &Error) + 'static) -> CallbackId {
        let mut callback = callback;
        let with_worker = move |master: &Master, worker: Option<&Self>, error: &Error| {
            if let Some(worker) = worker {
                callback(master, worker, error);
            }
        };
        let callbacks = &self.callbacks().error;
        callbacks.add(Rc::new(RefCell::new(with_worker)))
    }

    /// Calls `callback` once, for the next error that concerns the worker. See
    /// [`on_error`](Self::on_error) for the errors.
    ///
    /// Node: `once`.
    #[doc(alias = "once")]
    pub fn on_error_once(
        &self,
        callback: impl FnOnce(&Master, &Self, &Error) + 'static,
    ) -> CallbackId {
        let mut callback = Some(callback);
        let once = move |master: &Master, worker: Option<&Self>, error: &Error| {
            if let (Some(callback), Some(worker)) = (callback.take(), worker) {
                callback(master, worker, error);
            }
        };
        let callbacks = &self.callbacks().error;
        callbacks.add_once(Rc::new(RefCell::new(once)))
    }
}
