//! Workers that are kept running, replaced, and seen.
//!
//! What most programs need around [`Master::fork`]: a [`Pool`] fills its slots with workers, fills them
//! again when they die, backs off when they die again and again, replaces all of them without losing a
//! client, and says what it does. It is written with what is public in this crate, and nothing else: a
//! program can build another one in its place.
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
//!             let pool = Pool::new(&master, PoolOptions::default().drain(Duration::from_secs(10)));
//!             pool.adopt(&master, passed)?;
//!             pool.listen(&master, "127.0.0.1:8000")?;
//!             pool.on_event(|_, _, event| eprintln!("{event}"));
//!             pool.on_usual_signals(&master)?;
//!             master.run()
//!         }
//!         Role::Worker(worker) => {
//!             cluster::pool::leave_signals_to_master(&worker)?;
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
mod event;
mod generations;
mod options;
mod service;
mod shell;
mod signals;
mod status;
mod upgrade;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{
    ListenOptions, Master, MasterListener, Result, Settings, TimerId, WatchId, WorkerId,
    WorkerProcess,
};

use self::core::{Core, State, Time};
pub use event::{Cause, Death, GiveUp, Limit, PoolEvent};
use generations::Generations;
pub use options::{PoolOptions, Readiness};
pub use signals::{Action, leave_signals_to_master};
pub use status::{SlotStatus, Status, WorkerPhase, WorkerStatus};
use upgrade::{OwnProgram, Predecessor};

/// The variable in a worker's environment that has the number of its slot, from 0.
///
/// Node: `NODE_APP_INSTANCE` of process managers. Whoever replaces a worker has its number.
///
/// ```no_run
/// let slot = std::env::var(cluster::pool::SLOT);
/// # let _ = slot;
/// ```
pub const SLOT: &str = "CLUSTER_SLOT";

/// The message by which a worker says that it is ready, with [`Readiness::Told`]. It is delivered as any
/// other message, too.
///
/// Node: `process.send('ready')` of process managers.
///
/// ```no_run
/// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
/// worker.send(cluster::pool::READY)?;
/// # Ok(()) }
/// ```
pub const READY: &[u8] = b"\0cluster:ready";

/// The message by which a worker says that it is alive, with [`PoolOptions::heartbeat`]. It is delivered
/// as any other message, too.
///
/// Node has no counterpart. A worker that blocks sends it while it waits for a connection, and not while
/// it deals with one: the heartbeat is the longest time that a request may take, then.
///
/// ```no_run
/// # fn f(worker: &cluster::Worker) -> cluster::Result<()> {
/// use std::time::Duration;
///
/// let beat = worker.set_interval(Duration::from_secs(1), |worker| {
///     let _ = worker.send(cluster::pool::BEAT);
/// });
/// worker.unref(beat);
/// # Ok(()) }
/// ```
pub const BEAT: &[u8] = b"\0cluster:beat";

/// Workers that are kept running.
///
/// Node has no counterpart: there, every program writes this again. A clone is the same pool. Its
/// methods that do something take the master, which a callback has at hand; they may be called at any
/// time, by callbacks too. When the master is dropped, nothing happens any more.
///
/// A program that has a pool leaves the workers of the pool to it: it may send to them, and kill them (the
/// pool replaces them), but does not disconnect them. Workers that it forks by itself are its own affair.
///
/// See the [module](self) for an example.
#[derive(Clone)]
pub struct Pool(Rc<Inner>);

type OnEvent = dyn FnMut(&Pool, &Master, &PoolEvent);
type OnGiveUp = dyn FnMut(&Pool, &Master, &Death) -> GiveUp;

struct Inner {
    core: RefCell<Core>,
    began: Instant,
    timer: Cell<Option<TimerId>>,
    /// What is to be told when the loop turns.
    news: RefCell<VecDeque<News>>,
    on_event: RefCell<Vec<Rc<RefCell<OnEvent>>>>,
    on_give_up: RefCell<Option<Rc<RefCell<OnGiveUp>>>>,
    generations: RefCell<Generations<Settings>>,
    listeners: RefCell<Vec<Kept>>,
    program: OwnProgram,
    predecessor: RefCell<Option<Predecessor>>,
    /// New masters that have been started and have not ended.
    successors: RefCell<BTreeMap<WorkerId, WorkerProcess>>,
    /// Watches for the byte by which the pending one says that it serves.
    upgrade: Cell<Option<WatchId>>,
}

/// A listener that outlives the workers.
struct Kept {
    listener: MasterListener,
    /// What it was called when it was passed.
    name: Option<String>,
}

enum News {
    Event(PoolEvent),
    GiveUp(Death),
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("core", &self.0.core)
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// Makes a pool, whose workers are forked when the loop turns.
    ///
    /// Node has no counterpart. A worker that cannot be forked has died, with
    /// [`Cause::NotForked`]; it is tried again, as any other.
    ///
    /// See the [module](self) for an example.
    #[must_use]
    pub fn new(master: &Master, options: PoolOptions) -> Self {
        let seed = RandomState::new().hash_one(std::process::id());
        let core = Core::new(options, Time::ZERO, seed);
        let pool = Self(Rc::new(Inner {
            core: RefCell::new(core),
            began: Instant::now(),
            timer: Cell::new(None),
            news: RefCell::default(),
            on_event: RefCell::default(),
            on_give_up: RefCell::default(),
            generations: RefCell::new(Generations::new()),
            listeners: RefCell::default(),
            program: OwnProgram::new(),
            predecessor: RefCell::default(),
            successors: RefCell::default(),
            upgrade: Cell::new(None),
        }));
        pool.attend(master);
        pool.wake(master, Duration::ZERO);
        pool
    }

    /// Opens a listener that outlives all workers: clients wait in the kernel's queue while there is
    /// none. It is closed when the pool stops.
    ///
    /// Node has no counterpart. Workers share it by asking for the same address. Call it before the loop
    /// turns for the first time, so that no worker is faster.
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
        // What was adopted is here already.
        if listeners
            .iter()
            .all(|kept| kept.listener.address() != address)
        {
            let name = None;
            listeners.push(Kept { listener, name });
        }
        Ok(address)
    }

    /// Calls back for everything that a pool tells.
    ///
    /// Node has no counterpart. Callbacks are called when the loop turns, and never inside a method of
    /// the pool.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool) {
    /// use cluster::pool::PoolEvent;
    ///
    /// pool.on_event(|_, _, event| match event {
    ///     PoolEvent::Died(death) => eprintln!("{death}"),
    ///     PoolEvent::ReloadFailed { .. } => eprintln!("{event}"),
    ///     _ => {}
    /// });
    /// # }
    /// ```
    pub fn on_event(&self, callback: impl FnMut(&Self, &Master, &PoolEvent) + 'static) {
        let callback = Rc::new(RefCell::new(callback));
        self.0.on_event.borrow_mut().push(callback);
    }

    /// Asks the program what becomes of a slot that has lost too many workers, instead of the default:
    /// [`GiveUp::Hold`] as long as a worker is ready in another slot, [`GiveUp::Stop`] otherwise.
    ///
    /// Node has no counterpart. There is one such callback: the last one counts.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool) {
    /// use std::time::Duration;
    /// use cluster::pool::GiveUp;
    ///
    /// pool.on_give_up(|_, _, death| {
    ///     eprintln!("{death}; next try in five minutes");
    ///     GiveUp::RetryAfter(Duration::from_secs(300))
    /// });
    /// # }
    /// ```
    pub fn on_give_up(&self, callback: impl FnMut(&Self, &Master, &Death) -> GiveUp + 'static) {
        let previous = self
            .0
            .on_give_up
            .replace(Some(Rc::new(RefCell::new(callback))));
        drop(previous);
    }

    /// Changes the number of slots. New ones are filled at once; of those that are too many, the last
    /// ones lose their workers, which are told to leave.
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

    /// Returns how many slots there are.
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
        self.0.core.borrow().slots.len()
    }

    /// Replaces all workers, without losing a client: each one is told to leave only after another one
    /// is ready and has lived for [`PoolOptions::trial`].
    ///
    /// Node has no counterpart. Ends in [`PoolEvent::Reloaded`] or, at the first new worker that dies or
    /// is not ready in time, in [`PoolEvent::ReloadFailed`]: whoever has not been replaced goes on then.
    /// With a [`surge`](PoolOptions::surge) of as many as there are slots it is all or nobody. One that is
    /// wanted while another is under way comes after that.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) {
    /// pool.reload(master);
    /// # }
    /// ```
    pub fn reload(&self, master: &Master) {
        self.input(master, Core::reload);
    }

    /// Replaces all workers by such with other settings, as [`reload`](Self::reload) does. Those who are
    /// forked in place of old ones meanwhile, or after it has failed, have the old settings.
    ///
    /// Node has no counterpart. A field that is `None` has its default, as with
    /// [`Master::fork_as`]; [`Master::settings`] is what to begin with to change one of them.
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

    /// Calls a reload off: new workers that have not replaced anybody yet are told to leave. This is
    /// how a [`canary`](PoolOptions::canary) that the program does not like goes back.
    ///
    /// Node has no counterpart. Nothing happens if no reload is under way.
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

    /// Fills the slots that have been given up.
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

    /// Tells all workers to leave, and lets [`Master::run`] come to its end. Clients that wait in the
    /// kernel's queue are served; whoever has not left within [`PoolOptions::drain`] is killed.
    ///
    /// Node has no counterpart. There is no way back.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) {
    /// pool.stop(master);
    /// # }
    /// ```
    pub fn stop(&self, master: &Master) {
        self.input(master, Core::stop);
    }

    /// Kills all workers, and lets [`Master::run`] come to its end. A new master that does not serve
    /// yet ([`upgrade`](Self::upgrade)), or has failed to, is killed, too.
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

    /// Returns whether the pool has been told to stop.
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

    /// Returns whether enough workers are ready: as many as [`PoolOptions::quorum`] says.
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
        self.0.core.borrow().quorum
    }

    /// Returns what the pool is doing at this moment.
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
        let core = self.0.core.borrow();
        let now = self.now();
        let loads = master.loads().workers;
        let worker = |id: WorkerId| {
            let member = core.members.get(&id)?;
            let load = loads.iter().find(|load| load.worker == id);
            Some(WorkerStatus {
                worker: id,
                pid: member.pid,
                generation: member.generation,
                phase: match member.state() {
                    State::Booting => WorkerPhase::Booting,
                    State::Ready => WorkerPhase::Ready,
                    State::Leaving => WorkerPhase::Leaving,
                },
                age: now.saturating_sub(member.forked),
                taken: load.map_or(0, |load| load.taken),
                open: load.map_or(0, |load| load.open),
            })
        };
        let slots = core
            .slots
            .iter()
            .enumerate()
            .map(|(number, slot)| SlotStatus {
                slot: number,
                worker: slot.current.and_then(worker),
                successor: slot.successor.and_then(worker),
                restarts: slot.restarts,
                restart_in: slot.restart_at.map(|at| at.saturating_sub(now)),
                is_given_up: slot.held,
                last_death: slot.last_death.clone(),
            });
        let leaving = core.members.iter();
        let leaving = leaving.filter(|(_, member)| member.state() == State::Leaving);
        Status {
            generation: core.generation,
            is_ready: core.quorum,
            is_reloading: core.is_reloading(),
            is_stopping: core.is_stopping(),
            age: now,
            deaths: core.deaths,
            slots: slots.collect(),
            leaving: leaving.filter_map(|(id, _)| worker(*id)).collect(),
        }
    }
}
