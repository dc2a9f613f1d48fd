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
mod options;
mod service;
mod signals;
mod status;
mod upgrade;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{
    ListenOptions, Master, MasterListener, Result, Settings, Signal, TimerId, WorkerId,
    WorkerProcess,
};

use self::core::{Command, Core, State, Time};
pub use event::{Cause, Death, GiveUp, Limit, PoolEvent};
pub use options::{PoolOptions, Readiness};
pub use signals::{Action, leave_signals_to_master};
pub use status::{SlotStatus, Status, WorkerPhase, WorkerStatus};
use upgrade::{OwnProgram, Predecessor, Upgrade};

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
    /// What the generations are forked with, if it is not what the master says.
    settings: RefCell<BTreeMap<u32, Option<Settings>>>,
    /// Those of the next generation.
    next_settings: RefCell<Option<Settings>>,
    listeners: RefCell<Vec<Kept>>,
    program: OwnProgram,
    predecessor: RefCell<Option<Predecessor>>,
    upgrade: RefCell<Option<Upgrade>>,
    has_successor: Cell<bool>,
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
            settings: RefCell::default(),
            next_settings: RefCell::default(),
            listeners: RefCell::default(),
            program: OwnProgram::new(),
            predecessor: RefCell::default(),
            upgrade: RefCell::default(),
            has_successor: Cell::new(false),
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
        let previous = self.0.next_settings.replace(Some(settings));
        drop(previous);
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
        let unused = self.0.next_settings.take();
        drop(unused);
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

    /// Kills all workers, and lets [`Master::run`] come to its end.
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
        self.0.core.borrow().stopping
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
            is_stopping: core.stopping,
            age: now,
            deaths: core.deaths,
            slots: slots.collect(),
            leaving: leaving.filter_map(|(id, _)| worker(*id)).collect(),
        }
    }
}

// Between the core and the master.
impl Pool {
    fn now(&self) -> Time {
        self.0.began.elapsed()
    }

    fn attend(&self, master: &Master) {
        let pool = self.clone();
        master.on_online(move |master, worker| {
            pool.proves(master, worker, Readiness::Online);
        });
        let pool = self.clone();
        master.on_listening(move |master, worker, _| {
            pool.proves(master, worker, Readiness::Listening);
        });
        let pool = self.clone();
        master.on_message(move |master, worker, message| {
            if message.bytes() == READY {
                pool.proves(master, worker, Readiness::Told);
            } else if message.bytes() == BEAT {
                let id = worker.id();
                pool.input(master, |core, now| core.beats(id, now));
            }
        });
        let pool = self.clone();
        master.on_exit(move |master, worker, status| {
            let (id, usage) = (worker.id(), worker.process().usage());
            pool.input(master, |core, now| core.exited(id, status, usage, now));
        });
    }

    fn proves(&self, master: &Master, worker: &WorkerProcess, proof: Readiness) {
        let id = worker.id();
        if self.0.core.borrow().options().readiness == proof {
            self.input(master, |core, now| core.is_ready(id, now));
        }
    }

    fn tell(&self, master: &Master, event: PoolEvent) {
        self.0.news.borrow_mut().push_back(News::Event(event));
        self.act(master);
    }

    fn input(&self, master: &Master, input: impl FnOnce(&mut Core, Time)) {
        let now = self.now();
        input(&mut self.0.core.borrow_mut(), now);
        self.act(master);
    }

    /// Does what the core has decided, and sees that the loop comes back when it must.
    fn act(&self, master: &Master) {
        loop {
            let command = self.0.core.borrow_mut().next_command();
            let Some(command) = command else {
                break;
            };
            match command {
                Command::Fork { slot, generation } => self.fork(master, slot, generation),
                Command::Leave(worker) => {
                    let worker = master.worker(worker);
                    worker
                        .into_iter()
                        .for_each(|worker| self.tell_to_leave(&worker));
                }
                Command::LeaveAll => self.tell_all_to_leave(master),
                Command::Kill(worker) => {
                    let worker = master.worker(worker);
                    worker
                        .into_iter()
                        .for_each(|worker| worker.process().kill(Signal::KILL));
                }
                Command::Look => self.look(master),
                Command::Tell(event) => self.0.news.borrow_mut().push_back(News::Event(event)),
                Command::Ask(death) => self.0.news.borrow_mut().push_back(News::GiveUp(death)),
            }
        }
        let mut core = self.0.core.borrow_mut();
        let deadline = core.next_deadline();
        // Also with no worker at all, the pool is there until it is stopped.
        let last = core.members.is_empty() && !core.is_over();
        drop(core);
        let wait = if self.0.news.borrow().is_empty() {
            let wait = deadline.map(|deadline| deadline.saturating_sub(self.now()));
            wait.or(last.then_some(Duration::MAX))
        } else {
            Some(Duration::ZERO)
        };
        match wait {
            Some(wait) => self.wake(master, wait),
            None => {
                let timer = self.0.timer.take();
                timer
                    .into_iter()
                    .for_each(|timer| master.clear_timer(timer));
            }
        }
    }

    /// Turns to the pool after this time, and no more at an earlier one.
    fn wake(&self, master: &Master, wait: Duration) {
        let pool = self.clone();
        let timer = master.set_timeout(wait, move |master| {
            pool.0.timer.set(None);
            pool.input(master, Core::tick);
            pool.deliver(master);
            pool.act(master);
        });
        let previous = self.0.timer.replace(Some(timer));
        previous
            .into_iter()
            .for_each(|timer| master.clear_timer(timer));
    }

    /// Tells what there is to tell now. If a callback panics and the program goes on, the rest is told
    /// later.
    fn deliver(&self, master: &Master) {
        let count = self.0.news.borrow().len();
        for _ in 0..count {
            let news = self.0.news.borrow_mut().pop_front();
            match news {
                Some(News::Event(event)) => {
                    if let PoolEvent::Quorum(is_ready) = event {
                        self.prove(master, is_ready);
                    }
                    let callbacks = self.0.on_event.borrow().clone();
                    for callback in callbacks {
                        // One that turns the loop may be led here again.
                        if let Ok(mut callback) = callback.try_borrow_mut() {
                            callback(self, master, &event);
                        }
                    }
                }
                Some(News::GiveUp(death)) => {
                    let decision = self.ask(master, &death);
                    let slot = death.slot;
                    self.input(master, |core, now| core.decide(slot, decision, now));
                }
                None => return,
            }
        }
    }

    fn ask(&self, master: &Master, death: &Death) -> GiveUp {
        let callback = self.0.on_give_up.borrow().clone();
        let callback = callback
            .as_ref()
            .and_then(|callback| callback.try_borrow_mut().ok());
        match callback {
            Some(mut callback) => callback(self, master, death),
            None if self.0.core.borrow().ready_workers() > 0 => GiveUp::Hold,
            None => GiveUp::Stop,
        }
    }

    fn fork(&self, master: &Master, slot: usize, generation: u32) {
        let env = [(SLOT, slot.to_string())];
        let forked = match self.settings_of(generation) {
            Some(settings) => master.fork_as(settings, env),
            None => master.fork_with(env),
        };
        let now = self.now();
        let mut core = self.0.core.borrow_mut();
        match forked {
            Ok(worker) => core.forked(slot, generation, worker.id(), worker.process().id(), now),
            Err(error) => core.not_forked(slot, generation, error.to_string(), now),
        }
    }

    /// A generation without settings of its own has those of the one that serves when it comes.
    fn settings_of(&self, generation: u32) -> Option<Settings> {
        let mut settings = self.0.settings.borrow_mut();
        if !settings.contains_key(&generation) {
            let core = self.0.core.borrow();
            let serving = settings.get(&core.generation).cloned().flatten();
            settings.insert(generation, self.0.next_settings.take().or(serving));
            let in_use = |known: &u32| core.slots.iter().any(|slot| slot.generation == *known);
            settings.retain(|known, _| *known == generation || in_use(known));
        }
        settings.get(&generation).cloned().flatten()
    }

    fn tell_to_leave(&self, worker: &WorkerProcess) {
        let signal = self.0.core.borrow().options().leave_signal;
        match signal {
            Some(signal) => worker.process().kill(signal),
            None => {
                worker.disconnect();
            }
        }
    }

    fn tell_all_to_leave(&self, master: &Master) {
        // Who waits is served before the listeners close; or by the successor, who has them, too.
        if !self.0.has_successor.get() {
            // It has them, too, and would not notice that they are shut.
            self.end_upgrade(master, Err("the pool stops".to_owned()));
            drop(self.0.listeners.take());
        }
        let workers: Vec<_> = self.0.core.borrow().members.keys().copied().collect();
        for worker in workers
            .into_iter()
            .filter_map(|worker| master.worker(worker))
        {
            self.tell_to_leave(&worker);
        }
    }

    fn look(&self, master: &Master) {
        let loads = master.loads().workers;
        let mut core = self.0.core.borrow_mut();
        let members = core.members.iter();
        let members: Vec<_> = members
            .map(|(worker, member)| (*worker, member.pid))
            .collect();
        let memory_counts = core.options().max_memory.is_some();
        let now = self.now();
        for (worker, pid) in members {
            let load = loads.iter().find(|load| load.worker == worker);
            let memory = memory_counts.then(|| resident_memory(pid)).flatten();
            core.measured(worker, load.map(|load| load.taken), memory, now);
        }
    }
}

/// How many bytes of memory a process has resident; `None` where the system does not tell.
fn resident_memory(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
