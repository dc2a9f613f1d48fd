//! A supervisor that keeps workers running, replaces them and reports their state.
//!
//! A [`Pool`] has slots and forks a worker for each slot. If a worker fails, the pool forks a
//! replacement after a back-off. A reload replaces all workers without losing a client, and an
//! upgrade replaces the master itself. The pool reports these changes as events. The module uses
//! only this crate's public API, so an application can implement its own supervisor instead.
//!
//! Without this module, every application with workers would write such a supervisor around
//! [`Master::fork`].
//!
//! ```no_run
//! use std::time::Duration;
//! use cluster::{LogWriter, Role};
//! use cluster::pool::{Pool, PoolOptions};
//!
//! fn main() -> cluster::Result<()> {
//!     let passed = cluster::systemd::listen_fds()?;
//!     match cluster::init()? {
//!         Role::Master(master) => {
//!             let options = PoolOptions::default().drain_timeout(Duration::from_secs(10));
//!             let pool = Pool::new(&master, options);
//!             pool.adopt(&master, passed)?;
//!             pool.listen(&master, "127.0.0.1:8000")?;
//!             let log = LogWriter::stderr().attached_to(&master);
//!             pool.on_event(move |_, _, event| log.line(event));
//!             pool.on_default_signals(&master)?;
//!             master.run()
//!         }
//!         Role::Worker(worker) => {
//!             cluster::pool::ignore_pool_signals(&worker)?;
//!             let listener = worker.listen("127.0.0.1:8000")?;
//!             for connection in listener.incoming() {
//!                 drop(connection?);
//!             }
//!             Ok(())
//!         }
//!     }
//! }
//! ```

mod core;
mod driver;
mod event;
mod failure;
mod generations;
mod memory;
mod options;
mod passed_values;
mod signals;
mod sockets;
mod status;
mod systemd;
mod upgrade;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{
    CallbackId, ListenOptions, Master, MasterListener, Result, Settings, TimerId, WorkerId,
};

use self::core::{Core, Time};
pub use event::{Limit, PoolEvent, ReloadFailure, UpgradeFailure};
pub use failure::{FailureAction, FailureCause, WorkerFailure};
use generations::Generations;
pub use options::{Canary, PoolOptions, Readiness};
pub use signals::{SignalAction, ignore_pool_signals};
pub use status::{SlotStatus, Status, StatusAddress, WorkerPhase, WorkerStatus};
use status::{StatusServer, StatusSocket};
use upgrade::{NewMaster, OldMaster};

/// The environment variable that contains the number of a worker's slot. The numbers begin at 0.
///
/// Node: `NODE_APP_INSTANCE`, which the process manager PM2 sets.
///
/// A replacement has the same slot number as the worker that it replaces.
///
/// ```no_run
/// let slot = std::env::var(cluster::pool::SLOT);
/// # let _ = slot;
/// ```
pub const SLOT: &str = "CLUSTER_SLOT";

/// The message with which a worker reports that it is ready, for [`Readiness::Message`]. Like any
/// other message, `READY` is also delivered to the application.
///
/// Node: `process.send('ready')` under the process manager PM2.
///
/// ```no_run
/// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
/// let _ = worker.send(cluster::pool::READY)?;
/// # Ok(()) }
/// ```
pub const READY: &[u8] = b"\0cluster:ready";

/// The message with which a worker reports that it is alive, for
/// [`PoolOptions::heartbeat_timeout`]. Like any other message, `HEARTBEAT` is also delivered to the
/// application.
///
/// Node has no counterpart.
///
/// If a timer sends the heartbeats, as in the example, a worker with blocking code sends them while
/// it waits for a connection, but not while it serves a connection. The heartbeat timeout then
/// limits the duration of a request.
///
/// ```no_run
/// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
/// use std::time::Duration;
///
/// let timer = worker.set_interval(Duration::from_secs(1), |worker| {
///     let _ = worker.send(cluster::pool::HEARTBEAT);
/// });
/// worker.unreference(timer);
/// # Ok(()) }
/// ```
pub const HEARTBEAT: &[u8] = b"\0cluster:beat";

/// A supervisor of workers, which keeps one worker running in each slot.
///
/// Node has no counterpart.
///
/// A clone is a handle to the same pool. Most methods take the master as an argument. Callbacks
/// also receive the master, so they may call these methods.
///
/// The application may send messages to a pool's workers. If the application kills a worker, the
/// pool replaces it. The application must not disconnect a pool's workers, because the pool treats
/// the exit of a worker that it has not disconnected itself as a failure. Workers that the
/// application itself forks do not belong to the pool.
///
/// See the [module](self) for an example.
#[derive(Clone)]
pub struct Pool(Rc<Inner>);

type EventCallback = dyn FnMut(&Pool, &Master, &PoolEvent);
type FailureLimitCallback = dyn FnMut(&Pool, &Master, &WorkerFailure) -> FailureAction;

struct Inner {
    core: RefCell<Core>,
    created_at: Instant,
    /// The timer for the core's next deadline or for pending notifications. If there is neither a
    /// deadline nor a notification, the timer only keeps the loop running while the pool has no
    /// worker.
    timer: Cell<Option<TimerId>>,
    /// The pending notifications, which the loop delivers in its next iteration.
    notifications: RefCell<VecDeque<Notification>>,
    event_callbacks: RefCell<Vec<(CallbackId, Rc<RefCell<EventCallback>>)>>,
    failure_limit_callback: RefCell<Option<Rc<RefCell<FailureLimitCallback>>>>,
    generations: RefCell<Generations<Settings>>,
    listeners: RefCell<Vec<PoolListener>>,
    /// The sockets that only workers have opened. The pool retains them while a new master that has
    /// copies of them runs.
    worker_sockets: RefCell<Vec<PoolListener>>,
    /// The old master, until this process has taken over. Always `None` if no old master started
    /// this process for an upgrade.
    old_master: RefCell<Option<OldMaster>>,
    /// Whether this process has taken over from an old master that has not exited.
    is_old_master_running: Cell<bool>,
    /// The new masters that this process has started and that have not exited, including those
    /// whose upgrade has failed.
    new_masters: RefCell<BTreeMap<WorkerId, NewMaster>>,
    status_servers: RefCell<Vec<Rc<StatusServer>>>,
    /// The status sockets that the old master has passed, until `serve_status` uses them or this
    /// process takes over.
    inherited_status_sockets: RefCell<Vec<StatusSocket>>,
}

/// A listener or UDP socket that stays open while workers come and go.
struct PoolListener {
    listener: MasterListener,
    /// Whether the socket is the service's own (see `sockets`).
    is_own: bool,
}

enum Notification {
    Event(PoolEvent),
    FailureLimitReached(WorkerFailure),
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("core", &self.0.core)
            .finish_non_exhaustive()
    }
}

// Creating and stopping a pool.
impl Pool {
    /// Creates a pool. The pool's workers are forked in the next iteration of the loop.
    ///
    /// Node has no counterpart.
    ///
    /// If a worker cannot be forked, the pool reports a failure with [`FailureCause::ForkFailed`]
    /// or [`FailureCause::OutOfResources`], and tries again after the back-off. A pool that is
    /// process 1 also reaps orphans ([`PoolOptions::reap_orphans`]).
    ///
    /// See the [module](self) for an example.
    #[must_use]
    pub fn new(master: &Master, options: PoolOptions) -> Self {
        if options.reap_orphans && std::process::id() == 1 {
            master.reap_orphans();
        }
        let seed = RandomState::new().hash_one(std::process::id());
        let core = Core::new(options, Time::ZERO, seed);
        let pool = Self(Rc::new(Inner {
            core: RefCell::new(core),
            created_at: Instant::now(),
            timer: Cell::new(None),
            notifications: RefCell::default(),
            event_callbacks: RefCell::default(),
            failure_limit_callback: RefCell::default(),
            generations: RefCell::new(Generations::new()),
            listeners: RefCell::default(),
            worker_sockets: RefCell::default(),
            old_master: RefCell::default(),
            is_old_master_running: Cell::new(false),
            new_masters: RefCell::default(),
            status_servers: RefCell::default(),
            inherited_status_sockets: RefCell::default(),
        }));
        pool.register_callbacks(master);
        pool.schedule(master, Duration::ZERO);
        pool
    }

    /// Opens a listener that stays open until the pool stops. While no worker serves the listener,
    /// clients wait in the listener's backlog.
    ///
    /// Node has no counterpart.
    ///
    /// Workers share the listener by listening on the same address. Call `listen` before the loop
    /// runs. Otherwise, a worker may listen on the address first, with its own options.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`Master::listen`].
    ///
    /// See the [module](self) for an example.
    pub fn listen<S>(
        &self,
        master: &Master,
        options: impl Into<ListenOptions<S>>,
    ) -> Result<cluster::Address> {
        let listener = master.listen(options)?;
        let address = listener.address();
        let mut listeners = self.0.listeners.borrow_mut();
        // Add the listener only if its address is new. If an adopted listener has this address, the
        // list already contains it.
        let is_new = |other: &PoolListener| other.listener.address() != address;
        if listeners.iter().all(is_new) {
            let is_own = !listener.has_foreign_copies();
            listeners.push(PoolListener { listener, is_own });
        }
        Ok(address)
    }

    /// Disconnects all workers and lets [`Master::run`] return after the workers have exited.
    ///
    /// The workers still serve the clients in the backlogs of the pool's listeners. A worker that
    /// has not exited within [`PoolOptions::drain_timeout`] is killed.
    ///
    /// Node has no counterpart.
    ///
    /// If there is a [`PoolOptions::stop_delay`], the pool first continues to serve for this time.
    /// From the call on, [`is_stopping`](Self::is_stopping) is true and
    /// [`has_quorum`](Self::has_quorum) is false. Workers that fail or reach a limit are still
    /// replaced, the number of slots can still be changed, and a reload that is in progress
    /// continues. New reloads and upgrades are ignored, and an upgrade that is in progress fails.
    /// If this method is called again at least one second after the first call, the delay ends at
    /// once. There is no delay if a new master has taken over, if this process is a new master that
    /// has not taken over, or if the pool gives up.
    ///
    /// A stopped pool cannot be restarted.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) {
    /// pool.stop(master);
    /// # }
    /// ```
    pub fn stop(&self, master: &Master) {
        self.input(master, Core::stop);
    }

    /// Kills all workers and lets [`Master::run`] return.
    ///
    /// This method also kills every new master that an [`upgrade`](Self::upgrade) has started and
    /// that has not taken over.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) {
    /// pool.stop_at_once(master);
    /// # }
    /// ```
    pub fn stop_at_once(&self, master: &Master) {
        self.input(master, Core::stop_at_once);
    }

    /// Returns whether the pool is stopping or has stopped. The
    /// [`stop_delay`](PoolOptions::stop_delay) is part of the stop.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) {
    /// if pool.is_stopping() {
    ///     pool.stop_at_once(master);
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.0.core.borrow().is_stopping()
    }
}

// Registering callbacks.
impl Pool {
    /// Adds a callback for the pool's events.
    ///
    /// Node has no counterpart.
    ///
    /// The loop delivers events, so no method of the pool calls the callback directly. Use
    /// [`remove_callback`](Self::remove_callback) to remove the callback.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master, pool: &cluster::pool::Pool) {
    /// use cluster::LogWriter;
    /// use cluster::pool::PoolEvent;
    ///
    /// let log = LogWriter::stderr().attached_to(master);
    /// pool.on_event(move |_, _, event| match event {
    ///     PoolEvent::WorkerFailed(failure) => log.line(failure),
    ///     PoolEvent::ReloadFailed { reason, .. } => log.line(reason),
    ///     _ => {}
    /// });
    /// # }
    /// ```
    pub fn on_event(
        &self,
        callback: impl FnMut(&Self, &Master, &PoolEvent) + 'static,
    ) -> CallbackId {
        let id = CallbackId::unique();
        let callback = Rc::new(RefCell::new(callback));
        self.0.event_callbacks.borrow_mut().push((id, callback));
        id
    }

    /// Removes a callback that [`on_event`](Self::on_event) has added. The callback is not called
    /// again, not even for an event that is being delivered. An unknown id has no effect.
    ///
    /// Node: `removeListener`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master, pool: &cluster::pool::Pool) {
    /// let log = cluster::LogWriter::stderr().attached_to(master);
    /// let id = pool.on_event(move |_, _, event| log.line(event));
    /// pool.remove_callback(id);
    /// # }
    /// ```
    pub fn remove_callback(&self, id: CallbackId) {
        let mut callbacks = self.0.event_callbacks.borrow_mut();
        let index = callbacks.iter().position(|(other, _)| *other == id);
        let removed = index.map(|index| callbacks.remove(index));
        // Drop the closure only after the borrow has ended, because the `Drop` of a value it owns
        // may call the pool.
        drop(callbacks);
        drop(removed);
    }

    /// Sets the callback that decides what happens to a slot at its failure limit. The callback
    /// replaces the previous one.
    ///
    /// The limit is [`PoolOptions::max_failures`]. Without a callback, the pool chooses
    /// [`FailureAction::GiveUp`] if at least one worker is ready. If no worker is ready, the pool
    /// chooses [`FailureAction::StopPool`], and [`Master::run`] returns
    /// [`Error::GaveUp`](cluster::Error::GaveUp).
    ///
    /// Node has no counterpart.
    ///
    /// The loop calls the callback, so no method of the pool calls it directly.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master, pool: &cluster::pool::Pool) {
    /// use std::time::Duration;
    /// use cluster::pool::FailureAction;
    ///
    /// let log = cluster::LogWriter::stderr().attached_to(master);
    /// pool.set_failure_limit_callback(move |_, _, failure| {
    ///     log.line(format_args!("{failure}; next try in five minutes"));
    ///     FailureAction::RetryAfter(Duration::from_secs(300))
    /// });
    /// # }
    /// ```
    pub fn set_failure_limit_callback(
        &self,
        callback: impl FnMut(&Self, &Master, &WorkerFailure) -> FailureAction + 'static,
    ) {
        self.replace_failure_limit_callback(Some(Rc::new(RefCell::new(callback))));
    }

    /// Removes the callback set with
    /// [`set_failure_limit_callback`](Self::set_failure_limit_callback), so that the default
    /// decision applies.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool) {
    /// pool.remove_failure_limit_callback();
    /// # }
    /// ```
    pub fn remove_failure_limit_callback(&self) {
        self.replace_failure_limit_callback(None);
    }

    fn replace_failure_limit_callback(&self, callback: Option<Rc<RefCell<FailureLimitCallback>>>) {
        // Drop the previous closure only after the borrow has ended, because the `Drop` of a value
        // it owns may call the pool.
        let previous = self.0.failure_limit_callback.replace(callback);
        drop(previous);
    }
}

// Scaling and replacing workers.
impl Pool {
    /// Changes the number of slots, to at most 65,536.
    ///
    /// The pool forks workers for new slots immediately. If the number decreases, the pool removes
    /// the last slots and disconnects their workers. If the pool has given up all remaining slots,
    /// the pool forks workers for them. The number stays the same after an
    /// [`upgrade`](Self::upgrade), unless it is 0.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) {
    /// pool.scale(master, 8);
    /// # }
    /// ```
    pub fn scale(&self, master: &Master, workers: usize) {
        self.input(master, |core, now| core.scale(workers, now));
    }

    /// Returns the number of slots.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) {
    /// pool.scale(master, pool.slots() + 1);
    /// # }
    /// ```
    #[must_use]
    pub fn slots(&self) -> usize {
        self.0.core.borrow().slots().len()
    }

    /// Replaces all workers without losing a client. The pool disconnects a worker only after its
    /// replacement has been ready for [`PoolOptions::min_ready_time`].
    ///
    /// Node has no counterpart.
    ///
    /// A successful reload ends with [`PoolEvent::Reloaded`]. If a new worker fails or is not ready
    /// in time, the reload ends with [`PoolEvent::ReloadFailed`], and old workers that have not
    /// been replaced stay. This also holds for a new worker that has already replaced the old one, if
    /// it was ready for less than [`PoolOptions::back_off_reset`] and other workers are still to be
    /// replaced. If the [`surge`](PoolOptions::surge) is at least the number of slots and
    /// there is no canary, a reload replaces either all workers or none. If this method is called
    /// during a reload, one more reload begins after that reload has ended.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) {
    /// pool.reload(master);
    /// # }
    /// ```
    pub fn reload(&self, master: &Master) {
        self.input(master, Core::reload);
    }

    /// Replaces all workers, like [`reload`](Self::reload), with workers that have other settings.
    ///
    /// A worker that the reload has not replaced keeps its settings. If the worker fails, its
    /// replacement also has the old settings.
    ///
    /// Node has no counterpart.
    ///
    /// Like [`Master::fork_as`], this method uses the default for each setting without a value. To
    /// change only one setting, start from [`Master::settings`].
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) {
    /// pool.reload_with(master, master.settings().exec("./server-2"));
    /// # }
    /// ```
    pub fn reload_with(&self, master: &Master, settings: Settings) {
        self.replace_next_settings(Some(settings));
        self.reload(master);
    }

    /// Cancels a reload, for example because the [`canary`](PoolOptions::canary) is faulty. New
    /// workers that have not yet replaced a worker are disconnected.
    ///
    /// Node has no counterpart.
    ///
    /// A reload that has been requested but has not begun is also cancelled. If there is no such
    /// reload and none is in progress, nothing happens.
    ///
    /// ```no_run
    /// # fn looks_bad() -> bool { true }
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) {
    /// if looks_bad() {
    ///     pool.cancel_reload(master);
    /// }
    /// # }
    /// ```
    pub fn cancel_reload(&self, master: &Master) {
        self.replace_next_settings(None);
        self.input(master, Core::cancel_reload);
    }

    /// Forks workers for the slots that the pool has given up. See [`FailureAction::GiveUp`].
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) {
    /// pool.retry(master);
    /// # }
    /// ```
    pub fn retry(&self, master: &Master) {
        self.input(master, Core::retry);
    }
}

// Querying the pool's state.
impl Pool {
    /// Returns whether at least [`PoolOptions::quorum`] workers are ready and the pool is not
    /// stopping.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool) {
    /// let answer = if pool.has_quorum() { "up\n" } else { "down\n" };
    /// # let _ = answer;
    /// # }
    /// ```
    #[must_use]
    pub fn has_quorum(&self) -> bool {
        self.0.core.borrow().has_quorum()
    }

    /// Returns the current state of the pool.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) {
    /// let log = cluster::LogWriter::stderr().attached_to(master);
    /// let status = pool.status(master);
    /// log.line(&status);
    /// log.line(status.to_json());
    /// log.line(status.to_prometheus());
    /// assert!(status.ready_workers() <= status.slots.len() + 1);
    /// # }
    /// ```
    #[must_use]
    pub fn status(&self, master: &Master) -> Status {
        let loads = master.loads().workers;
        Status::new(&self.0.core.borrow(), &loads, self.now())
    }
}
