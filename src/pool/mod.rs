//! A supervisor: keeps workers running, replaces them, and reports their state.
//!
//! A [`Pool`] has slots, and forks a worker for each. It replaces workers that fail, with a back-off, and
//! replaces all of them for a reload without losing a client. It upgrades the master itself, and reports
//! what happens. It uses the public API of this crate alone, so an application can build another
//! supervisor in its place.
//!
//! Code that every application with workers needs around [`Master::fork`] belongs here. Code that needs
//! access to the crate's internals does not.
//!
//! ```no_run
//! use std::time::Duration;
//! use cluster::Role;
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
//!             pool.on_event(|_, _, event| eprintln!("{event}"));
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
mod options;
mod signals;
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
    CallbackId, ListenOptions, Master, MasterListener, Result, Settings, TimerId, WatchId,
    WorkerId, WorkerProcess,
};

use self::core::{Core, Time};
pub use event::{Limit, PoolEvent, ReloadFailure, UpgradeFailure};
pub use failure::{FailureAction, FailureCause, WorkerFailure};
use generations::Generations;
pub use options::{Canary, PoolOptions, Readiness};
pub use signals::{SignalAction, ignore_pool_signals};
pub use status::{SlotStatus, Status, WorkerPhase, WorkerStatus};
use upgrade::{OldMaster, OwnProgram};

/// The environment variable with the number of a worker's slot, from 0.
///
/// Node: `NODE_APP_INSTANCE` of process managers.
///
/// A replacement has the number of the worker that it replaces.
///
/// ```no_run
/// let slot = std::env::var(cluster::pool::SLOT);
/// # let _ = slot;
/// ```
pub const SLOT: &str = "CLUSTER_SLOT";

/// The message by which a worker reports that it is ready, with [`Readiness::Message`]. It is also
/// delivered as any other message.
///
/// Node: `process.send('ready')` of process managers.
///
/// ```no_run
/// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
/// let _ = worker.send(cluster::pool::READY)?;
/// # Ok(()) }
/// ```
pub const READY: &[u8] = b"\0cluster:ready";

/// The message by which a worker reports that it is alive, with [`PoolOptions::heartbeat_timeout`]. It is
/// also delivered as any other message.
///
/// Node has no counterpart.
///
/// A worker that blocks sends it while it waits for a connection, and not while it serves one. The
/// heartbeat timeout is then the longest time that a request may take.
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

/// A supervisor of workers.
///
/// Node has no counterpart.
///
/// A clone is a handle to the same pool. Methods that change the pool take the master, which every
/// callback gets as an argument, and may be called inside callbacks. After the master has been
/// dropped they have no effect.
///
/// The application may send messages to the workers of a pool, and may kill them: the pool replaces them.
/// It must not disconnect them. Workers that the application itself forks do not belong to the pool.
///
/// See the [module](self) for an example.
#[derive(Clone)]
pub struct Pool(Rc<Inner>);

type EventCallback = dyn FnMut(&Pool, &Master, &PoolEvent);
type FailureLimitCallback = dyn FnMut(&Pool, &Master, &WorkerFailure) -> FailureAction;

struct Inner {
    core: RefCell<Core>,
    created_at: Instant,
    /// Fires at the core's next deadline.
    timer: Cell<Option<TimerId>>,
    /// Delivered in the next iteration of the loop.
    notifications: RefCell<VecDeque<Notification>>,
    event_callbacks: RefCell<Vec<(CallbackId, Rc<RefCell<EventCallback>>)>>,
    failure_limit_callback: RefCell<Option<Rc<RefCell<FailureLimitCallback>>>>,
    generations: RefCell<Generations<Settings>>,
    listeners: RefCell<Vec<PoolListener>>,
    program: OwnProgram,
    /// Set in a new master until it has taken over.
    old_master: RefCell<Option<OldMaster>>,
    /// New masters that have been started and have not exited.
    new_masters: RefCell<BTreeMap<WorkerId, WorkerProcess>>,
    /// The watch for the byte by which a new master reports that it has taken over.
    upgrade_channel: Cell<Option<WatchId>>,
}

/// A listener that outlives the workers.
struct PoolListener {
    listener: MasterListener,
    /// The name with which it was passed to this process.
    name: Option<String>,
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

// Creation and stop.
impl Pool {
    /// Creates a pool. Its workers are forked in the next iteration of the loop.
    ///
    /// Node has no counterpart.
    ///
    /// A worker that cannot be forked has failed, with [`FailureCause::ForkFailed`], and is
    /// replaced like any other.
    ///
    /// See the [module](self) for an example.
    #[must_use]
    pub fn new(master: &Master, options: PoolOptions) -> Self {
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
            program: OwnProgram::new(),
            old_master: RefCell::default(),
            new_masters: RefCell::default(),
            upgrade_channel: Cell::new(None),
        }));
        pool.register_callbacks(master);
        pool.schedule(master, Duration::ZERO);
        pool
    }

    /// Opens a listener that outlives all workers. While no worker listens, clients wait in the kernel's
    /// queue. It is closed when the pool stops.
    ///
    /// Node has no counterpart.
    ///
    /// Workers share the listener by listening on the same address. Call it before the loop runs,
    /// so that no worker listens first.
    ///
    /// # Errors
    ///
    /// As [`Master::listen`].
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
        // An adopted listener with this address is already in the list.
        let is_new = |other: &PoolListener| other.listener.address() != address;
        if listeners.iter().all(is_new) {
            let name = None;
            listeners.push(PoolListener { listener, name });
        }
        Ok(address)
    }

    /// Stops the pool: disconnects all workers, and lets [`Master::run`] return when they have exited.
    ///
    /// Clients in the kernel's queue are served. Workers that have not exited within
    /// [`PoolOptions::drain_timeout`] are killed.
    ///
    /// Node has no counterpart.
    ///
    /// A pool cannot be started again.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) {
    /// pool.stop(master);
    /// # }
    /// ```
    pub fn stop(&self, master: &Master) {
        self.input(master, Core::stop);
    }

    /// Stops the pool and kills all workers, so that [`Master::run`] returns.
    ///
    /// A new master that has not taken over ([`upgrade`](Self::upgrade)) is killed, too.
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

    /// Returns whether the pool is stopping or has stopped.
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

// Callbacks.
impl Pool {
    /// Adds a callback for the events of the pool.
    ///
    /// Node has no counterpart.
    ///
    /// Events are delivered by the loop, never inside a method of the pool. The callback can be
    /// removed with [`remove_callback`](Self::remove_callback).
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool) {
    /// use cluster::pool::PoolEvent;
    ///
    /// pool.on_event(|_, _, event| match event {
    ///     PoolEvent::WorkerFailed(failure) => eprintln!("{failure}"),
    ///     PoolEvent::ReloadFailed { reason, .. } => eprintln!("{reason}"),
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

    /// Removes a callback that [`on_event`](Self::on_event) has added. It is not called again, also not
    /// for the event that is being delivered. Another id has no effect.
    ///
    /// Node: `removeListener`.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool) {
    /// let log = pool.on_event(|_, _, event| eprintln!("{event}"));
    /// pool.remove_callback(log);
    /// # }
    /// ```
    pub fn remove_callback(&self, id: CallbackId) {
        let mut callbacks = self.0.event_callbacks.borrow_mut();
        let index = callbacks.iter().position(|(other, _)| *other == id);
        let removed = index.map(|index| callbacks.remove(index));
        // A value that the closure owns may call the pool in its `Drop`.
        drop(callbacks);
        drop(removed);
    }

    /// Sets the callback that decides about a slot at its failure limit. It replaces an earlier callback.
    ///
    /// The limit is [`PoolOptions::max_failures`]. Without a callback, the decision is
    /// [`FailureAction::GiveUp`] while a worker of another slot is ready, and
    /// [`FailureAction::StopPool`] otherwise.
    ///
    /// Node has no counterpart.
    ///
    /// The callback is called by the loop, never inside a method of the pool.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool) {
    /// use std::time::Duration;
    /// use cluster::pool::FailureAction;
    ///
    /// pool.set_failure_limit_callback(|_, _, failure| {
    ///     eprintln!("{failure}; next try in five minutes");
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

    /// Removes the callback of
    /// [`set_failure_limit_callback`](Self::set_failure_limit_callback), so that the default decides.
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
        // A value that the previous closure owns may call the pool in its `Drop`.
        let previous = self.0.failure_limit_callback.replace(callback);
        drop(previous);
    }
}

// Workers.
impl Pool {
    /// Changes the number of slots.
    ///
    /// New slots are filled at once. If there are too many slots, the last ones are removed, and their
    /// workers are disconnected.
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

    /// Replaces all workers without losing a client. Each worker is disconnected only after its
    /// replacement has been ready for [`PoolOptions::min_ready_time`].
    ///
    /// Node has no counterpart.
    ///
    /// A reload ends in [`PoolEvent::Reloaded`]. If a new worker fails or is not ready in time, the
    /// reload ends in [`PoolEvent::ReloadFailed`], and workers that have not been replaced stay. If
    /// the [`surge`](PoolOptions::surge) equals the number of slots, either all workers are
    /// replaced or none. A reload that is requested during another one begins after it.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) {
    /// pool.reload(master);
    /// # }
    /// ```
    pub fn reload(&self, master: &Master) {
        self.input(master, Core::reload);
    }

    /// Replaces all workers, as [`reload`](Self::reload), by workers with other settings.
    ///
    /// Workers of the old generation that fail during the reload, or after it has failed, are replaced
    /// with the old settings.
    ///
    /// Node has no counterpart.
    ///
    /// As with [`Master::fork_as`], a setting that is not set has its default. To change one
    /// setting alone, begin with [`Master::settings`].
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

    /// Cancels a reload. New workers that have not replaced a worker yet are disconnected. An application
    /// that finds its [`canary`](PoolOptions::canary) faulty calls this.
    ///
    /// Node has no counterpart.
    ///
    /// Without a reload in progress, nothing happens.
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

    /// Fills the slots that the pool has given up ([`FailureAction::GiveUp`]).
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

// State.
impl Pool {
    /// Returns whether the pool is ready: [`PoolOptions::quorum`] workers are ready, and the pool is not
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
    /// let status = pool.status(master);
    /// println!("{status}");
    /// println!("{}", status.to_json());
    /// println!("{}", status.to_prometheus());
    /// assert!(status.ready_workers() <= status.slots.len() + 1);
    /// # }
    /// ```
    #[must_use]
    pub fn status(&self, master: &Master) -> Status {
        let loads = master.loads().workers;
        Status::new(&self.0.core.borrow(), &loads, self.now())
    }
}
