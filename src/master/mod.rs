//! The master as the program sees it: its methods, its callbacks, and how its loop turns.

pub(crate) mod listener;
pub(crate) mod shard_group;
pub(crate) mod shell;
pub(crate) mod worker_process;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::config::listen::{BindRequest, ListenOptions};
use crate::config::settings::{DEBUG, SchedulingPolicy, Settings};
use crate::core::event::{EmittedEvent, Event, ExitReport, Level};
use crate::error::{Error, Result};
use crate::master::listener::MasterListener;
use crate::master::shell::{MasterShell, Processed, RetainedListener, WorkerIo};
use crate::master::worker_process::{WorkerCallbacks, WorkerProcess};
use crate::runtime::callbacks::{CallbackId, Callbacks, Shared};
use crate::runtime::event_loop::{EventLoop, LoopId, Token, WatchId};
use crate::runtime::timers::TimerId;
use crate::sys;
use crate::sys::fd::NoLingerFd;
use crate::sys::poll::{Interest, Ready, ReadyList};
use crate::sys::signal::InstalledHandler;
use crate::types::address::Address;
use crate::types::ledger::Ledger;
use crate::types::loads::{Loads, WorkerLoad};
use crate::types::message::Message;
use crate::types::signal::Signal;
use crate::types::time::{Time, earlier};
use crate::types::worker_id::WorkerId;
use crate::wire::frame::HandleId;
use crate::wire::receipts::Receipt;

/// How many events are delivered before the loop looks around again: a callback for errors that
/// causes one each time must not keep it for ever.
const EVENTS_PER_TURN: u32 = 1024;
/// How often a dead worker's channel is read before its end is told; more often than it takes to
/// empty a socket, unless the worker's own children go on writing.
const LAST_WORDS: u32 = 64;
/// How often to look whether a worker has ended, where nothing tells.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often one worker's channel is read before the others have their turn, while more comes than one
/// read has room for.
const READS_PER_TURN: u32 = 4;
/// How many frames of one worker are heard before the others have their turn.
const FRAMES_PER_TURN: u32 = 64;

/// The process that forks workers, supervises them and shares its ports with them.
///
/// Node: `cluster` where `cluster.isMaster` is true. It comes from [`init`](crate::init). All
/// methods can be called at any time, by callbacks too, unless they say otherwise. Callbacks are
/// called by [`run`](Self::run) and [`dispatch`](Self::dispatch) and never inside another call.
///
/// When it is dropped the channels to its workers close, and they leave; but nobody waits for their
/// processes then, which stay zombies for as long as this one lives. Let [`run`](Self::run) come
/// to its end first.
///
/// ```no_run
/// use std::{cell::RefCell, collections::BTreeSet, rc::Rc};
/// use cluster::{Role, Signal};
///
/// # fn serve(_: cluster::Connection) {}
/// fn main() -> cluster::Result<()> {
///     match cluster::init()? {
///         Role::Master(master) => {
///             for _ in 0..cluster::available_parallelism() {
///                 master.fork()?;
///             }
///             let serving = Rc::new(RefCell::new(BTreeSet::new()));
///             let listening = Rc::clone(&serving);
///             master.on_listening(move |_, worker, _| {
///                 listening.borrow_mut().insert(worker.id());
///             });
///             let replace = master.on_exit(move |master, worker, status| {
///                 println!("worker {} died ({status})", worker.process().id());
///                 // One that could not even listen would not do better the next time.
///                 let served = serving.borrow_mut().remove(&worker.id());
///                 if served && worker.exited_after_disconnect() != Some(true) {
///                     let _ = master.fork();
///                 }
///             });
///             master.on_signal(Signal::TERM, move |master, _| {
///                 master.off(replace);
///                 master.disconnect(|_| {});
///             })?;
///             master.run()
///         }
///         Role::Worker(worker) => {
///             let listener = worker.listen("127.0.0.1:8000")?;
///             for connection in listener.incoming() {
///                 serve(connection?);
///             }
///             Ok(())
///         }
///     }
/// }
/// ```
pub struct Master {
    shell: Rc<MasterShell>,
    event_loop: EventLoop<Self>,
    callbacks: ClusterCallbacks,
    scheduler: RefCell<Option<Shared<Scheduler>>>,
    /// Those of the workers and detached processes that have not left.
    of_worker: RefCell<BTreeMap<WorkerId, Rc<WorkerCallbacks>>>,
    settings: RefCell<Settings>,
    /// Where the kernel has no descriptors for processes.
    child_signal: RefCell<Option<InstalledHandler>>,
    /// A worker may have ended before the signal for it was asked for.
    reap: Cell<bool>,
    /// When the workers were last checked of whose end nothing tells.
    checked_unseen: Cell<Instant>,
    /// Whether the user wants to see what happens.
    debug: bool,
}

impl std::fmt::Debug for Master {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Master")
            .field("workers", &self.workers())
            .finish_non_exhaustive()
    }
}

type OnFork = dyn FnMut(&Master, &WorkerProcess);
type OnSetup = dyn FnMut(&Master, &Settings);
type OnDisconnected = dyn FnOnce(&Master);
type Scheduler = dyn FnMut(Option<SocketAddr>, &[WorkerLoad]) -> Option<WorkerId>;

#[derive(Default)]
struct ClusterCallbacks {
    fork: Callbacks<OnFork>,
    setup: Callbacks<OnSetup>,
    of_workers: WorkerCallbacks,
    disconnected: RefCell<Vec<Box<OnDisconnected>>>,
    /// Those whose time has come. They are called one by one: whoever panics in one of them and
    /// goes on gets the rest later.
    over: RefCell<VecDeque<Box<OnDisconnected>>>,
}

impl Master {
    pub(crate) fn new(policy: SchedulingPolicy) -> Result<Self> {
        let event_loop = EventLoop::new()?;
        let shell = MasterShell::new(policy, event_loop.poller().clone(), event_loop.start_time());
        Ok(Self {
            shell: Rc::new(shell),
            event_loop,
            callbacks: ClusterCallbacks::default(),
            scheduler: RefCell::default(),
            of_worker: RefCell::default(),
            settings: RefCell::default(),
            child_signal: RefCell::default(),
            reap: Cell::new(false),
            checked_unseen: Cell::new(Instant::now()),
            debug: std::env::var_os(DEBUG).is_some_and(|value| value == "1"),
        })
    }

    /// Starts a worker: the program of [`settings`](Self::settings), or a copy of this process if they say
    /// [`main`](Settings::main()), with the master's environment except for what
    /// [`systemd`](crate::systemd) says to the master alone.
    ///
    /// Node: `cluster.fork()`. The worker is in [`workers`](Self::workers) when this returns, and
    /// the events `setup` and `fork` come when the loop turns. The calling thread waits until the
    /// program is executed, or `main` is about to be called.
    ///
    /// # Errors
    ///
    /// [`Error::Fork`] if the program cannot be executed, the system has no process or descriptor
    /// left, or refuses the worker its directory, user or group, or the [`settings`](Self::settings)
    /// are not possible ([`Settings::listen_fds`](crate::Settings::listen_fds())). With
    /// [`uid`](Settings::uid()) or [`gid`](Settings::gid()) also if the worker has not executed its program
    /// within one second, for instance because another process of its user has stopped it: then it is
    /// killed, and the kind of the source is [`TimedOut`](std::io::ErrorKind::TimedOut).
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// let worker = master.fork()?;
    /// worker.on_online(|_, worker| println!("worker {} is online", worker.id()));
    /// # Ok(()) }
    /// ```
    pub fn fork(&self) -> Result<WorkerProcess> {
        self.fork_with(std::iter::empty::<(OsString, OsString)>())
    }

    /// Starts a worker with more or other variables in its environment.
    ///
    /// Node: `cluster.fork(env)`. The master's own environment stays as it is; see
    /// [`fork`](Self::fork) for the rest.
    ///
    /// # Errors
    ///
    /// As [`fork`](Self::fork), and [`Error::Fork`] if a name or value has a zero byte in it, or, for
    /// [`main`](Settings::main()), a name is empty or has an equals sign in it.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// master.fork_with([("ROLE", "cache"), ("RUST_BACKTRACE", "1")])?;
    /// # Ok(()) }
    /// ```
    pub fn fork_with<K, V>(&self, env: impl IntoIterator<Item = (K, V)>) -> Result<WorkerProcess>
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        self.setup_master(Settings::default());
        self.start(self.settings(), env)
    }

    /// Starts a worker with settings of its own.
    ///
    /// Node has no counterpart: there, `setupMaster` is called before and afterwards. A field that is
    /// `None` has its default, whatever [`setup_master`](Self::setup_master) has said; to change one
    /// thing, begin with [`settings`](Self::settings). There is no event `setup`. If the settings say
    /// [`detached`](Settings::detached()), the process is not a worker, and there is no event `fork`
    /// either. See [`fork_with`](Self::fork_with) for the rest.
    ///
    /// # Errors
    ///
    /// As [`fork_with`](Self::fork_with).
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::Settings;
    ///
    /// master.fork_as(Settings::default().exec("./cache"), [("SIZE", "64M")])?;
    /// # Ok(()) }
    /// ```
    pub fn fork_as<K, V>(
        &self,
        settings: Settings,
        env: impl IntoIterator<Item = (K, V)>,
    ) -> Result<WorkerProcess>
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        self.start(settings.complete(), env)
    }

    fn start<K, V>(
        &self,
        settings: Settings,
        env: impl IntoIterator<Item = (K, V)>,
    ) -> Result<WorkerProcess>
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        self.event_loop.check_own()?;
        let env = env.into_iter().map(|(k, v)| (k.into(), v.into()));
        let watch_children = || self.watch_children();
        let abandon_watches = || self.event_loop.abandon_watches();
        let forked = self
            .shell
            .fork(&settings, env, watch_children, abandon_watches);
        let worker_io = forked.map_err(|(attempt, source)| Error::Fork {
            program: settings.exec.unwrap_or_default(),
            attempt,
            source,
        })?;
        let callbacks = Rc::new(WorkerCallbacks::default());
        self.of_worker
            .borrow_mut()
            .insert(worker_io.id, Rc::clone(&callbacks));
        Ok(WorkerProcess::new(&self.shell, worker_io, callbacks))
    }

    /// Makes the loop wake up when any child ends.
    fn watch_children(&self) -> io::Result<()> {
        let mut installed = self.child_signal.borrow_mut();
        if installed.is_none() {
            let signal = Signal::from_number(sys::signal::CHLD);
            *installed = Some(self.event_loop.install(signal)?);
        }
        self.reap.set(true);
        Ok(())
    }

    /// Changes what later calls of [`fork`](Self::fork) start; running workers are not affected.
    ///
    /// Node: `cluster.setupMaster(settings)`. A field left `None` keeps its value, and at the first
    /// call gets the default. The event `setup` comes when the loop turns, once for each call.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::Settings;
    ///
    /// master.setup_master(Settings::default().exec("./worker").args(["--use", "https"]));
    /// master.fork()?; // https worker
    /// master.setup_master(Settings::default().args(["--use", "http"]));
    /// master.fork()?; // http worker
    /// # Ok(()) }
    /// ```
    pub fn setup_master(&self, settings: Settings) {
        let mut current = self.settings();
        current.update(settings);
        // What closures own may come back here when it is dropped.
        let previous = self.settings.replace(current.complete());
        drop(previous);
        self.shell.core.borrow_mut().setup();
    }

    /// Returns the settings as they are now: empty before the first
    /// [`setup_master`](Self::setup_master) or [`fork`](Self::fork), complete afterwards.
    ///
    /// Node: `cluster.settings`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// assert_eq!(master.settings().exec, None);
    /// # }
    /// ```
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.settings.borrow().clone()
    }

    /// Chooses who accepts connections, instead of `CLUSTER_SCHED_POLICY` or the default.
    ///
    /// Node: `cluster.schedulingPolicy = …`. Call it before the first [`fork`](Self::fork) and
    /// [`listen`](Self::listen).
    ///
    /// # Errors
    ///
    /// [`Error::PolicyFrozen`] after the first fork or [`listen`](Self::listen).
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// master.set_scheduling_policy(cluster::SchedulingPolicy::Shared)?;
    /// # Ok(()) }
    /// ```
    pub fn set_scheduling_policy(&self, policy: SchedulingPolicy) -> Result<()> {
        self.shell.core.borrow_mut().set_policy(policy)
    }

    /// Returns who accepts connections.
    ///
    /// Node: `cluster.schedulingPolicy`. See
    /// [`set_scheduling_policy`](Self::set_scheduling_policy) for an example.
    #[must_use]
    pub fn scheduling_policy(&self) -> SchedulingPolicy {
        self.shell.core.borrow().policy()
    }

    /// Returns the workers in the order of their ids. One leaves the table when it has
    /// disconnected and exited, just before its `exit` event.
    ///
    /// Node: `cluster.workers`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// for worker in master.workers() {
    ///     let _ = worker.send(b"big announcement to all workers");
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn workers(&self) -> Vec<WorkerProcess> {
        let core = self.shell.core.borrow();
        core.worker_ids().filter_map(|id| self.find(id)).collect()
    }

    /// Returns the worker with this id, if it is in the table.
    ///
    /// Node: `cluster.workers[id]`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master, id: cluster::WorkerId) {
    /// if let Some(worker) = master.worker(id) {
    ///     worker.disconnect();
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn worker(&self, id: WorkerId) -> Option<WorkerProcess> {
        let is_worker = self.shell.core.borrow().is_worker(id);
        self.find(id).filter(|_| is_worker)
    }

    fn find(&self, id: WorkerId) -> Option<WorkerProcess> {
        let worker_io = self.shell.worker_io(id)?;
        let callbacks = Rc::clone(self.of_worker.borrow().get(&id)?);
        Some(WorkerProcess::new(&self.shell, worker_io, callbacks))
    }

    /// Opens a listener ahead of the workers, and keeps it: it stays open when no worker has it,
    /// until what this returns is dropped.
    ///
    /// Node has no counterpart: there, a listener closes with its last worker. Workers that ask for
    /// the same get this one, as a second worker gets what a first has opened: `worker.listen(0)`
    /// gets the free port of `master.listen(0)`. If workers have it already, it is kept from now on; if it is
    /// kept already, it is until both are dropped.
    /// With a listener as the argument (from systemd, say, or from another process that serves until
    /// now) it is the one for workers that ask for its address; a Unix socket's is its path, and one
    /// on all addresses is also the one for its port alone. The descriptor is set not to block. The
    /// scheduling policy cannot change any more. See [`MasterListener`] for what it does.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] with the reason if the address is in use, not allowed or cannot be resolved;
    /// if the options say [`exclusive`](ListenOptions::exclusive),
    /// [`reuse_port`](ListenOptions::reuse_port) or [`fd`](ListenOptions::fd), which are for workers;
    /// or if what is passed is no stream socket of this kind, or is a Unix socket without a path.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// let listener = master.listen("127.0.0.1:8000")?;
    /// println!("clients can connect to {}, and wait", listener.address());
    /// master.fork()?; // which asks for "127.0.0.1:8000" and serves them
    /// master.run()
    /// # }
    /// ```
    pub fn listen<S>(&self, options: impl Into<ListenOptions<S>>) -> Result<MasterListener> {
        self.event_loop.check_own()?;
        let mut bind_request = options.into().bind_request;
        match self.open(&mut bind_request) {
            Ok(kept) => Ok(MasterListener::new(&self.shell, kept)),
            Err(source) => Err(Error::Listen {
                address: bind_request.to_string(),
                source,
            }),
        }
    }

    /// Opens the first that can be had of what the program wants.
    fn open(&self, bind_request: &mut BindRequest) -> io::Result<RetainedListener> {
        bind_request.check_for_master()?;
        if let Some(socket) = bind_request.take_socket() {
            return self
                .shell
                .adopt(bind_request.kind, socket, &bind_request.flags);
        }
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for endpoint in bind_request.resolve()? {
            match self.shell.listen(&endpoint, &bind_request.flags) {
                Ok(kept) => return Ok(kept),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Disconnects every worker, and calls back when all have left and all listeners are closed, save
    /// those that the program keeps.
    ///
    /// Node: `cluster.disconnect(callback)`. Connections that have been accepted, or wait in the
    /// kernel's queue, are still served. Workers may take all the time they want:
    /// [`disconnect_within`](Self::disconnect_within) sets a limit. A worker that is forked meanwhile
    /// is waited for, too, and nobody tells it to leave: a program that replaces dead workers stops
    /// doing so first, as the example of [`Master`] does. The callback is never called inside this
    /// call.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.disconnect(|_| println!("nobody is left"));
    /// # }
    /// ```
    pub fn disconnect(&self, callback: impl FnOnce(&Self) + 'static) {
        self.when_disconnected(callback);
        self.shell.core_now().disconnect_all(true);
        self.shell.act();
    }

    /// Disconnects every worker, and kills those that have not exited when `deadline`, counted from
    /// now, is over. Calls back when all have left and all listeners are closed, save those that the
    /// program keeps.
    ///
    /// Node has no counterpart: there, programs set a timer. All is as with
    /// [`disconnect`](Self::disconnect) until then. At the deadline every worker that is still there
    /// gets SIGKILL, which also ends those that loop or are stopped; one that was forked meanwhile,
    /// too, but not one that is forked later. Of several deadlines the first one counts, and there is
    /// no way back.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use std::time::Duration;
    /// use cluster::Signal;
    ///
    /// master.on_signal(Signal::TERM, |master, _| {
    ///     master.disconnect_within(Duration::from_secs(10), |_| println!("nobody is left"));
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn disconnect_within(&self, deadline: Duration, callback: impl FnOnce(&Self) + 'static) {
        self.when_disconnected(callback);
        self.shell.core_now().disconnect_all_within(deadline);
        self.shell.act();
    }

    fn when_disconnected(&self, callback: impl FnOnce(&Self) + 'static) {
        let mut waiting = self.callbacks.disconnected.borrow_mut();
        waiting.push(Box::new(callback));
    }

    /// Returns what became of the accepted connections so far.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let ledger = master.ledger();
    /// println!("{} accepted, {} on their way", ledger.accepted, ledger.in_hand());
    /// # }
    /// ```
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.shell.count_all();
        self.shell.core.borrow().ledger()
    }
}

/// Who gets the connections.
impl Master {
    /// Returns how busy workers and listeners are: figures to show, or to decide by.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let loads = master.loads();
    /// for load in &loads.workers {
    ///     println!("worker {}: {} served, {} open", load.worker, load.taken, load.open);
    /// }
    /// for load in &loads.listeners {
    ///     println!("{}: {:?} wait", load.address, load.queued);
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn loads(&self) -> Loads {
        self.shell.loads()
    }

    /// Lets the program choose the worker for each connection that the master accepts, instead of
    /// round robin: by the client's address, say, or by what workers have to do.
    ///
    /// Node has no counterpart. The closure gets the client's address (`None` for a Unix socket), and
    /// those workers that listen, by id. A connection waits for the worker that was chosen, however
    /// busy that is; should the worker die before it takes it, the closure is asked again. With
    /// `None`, or a worker that is not among them, whoever is next in round robin gets it. The master
    /// accepts at most 16 connections ahead for each worker. Call it at any time; the latest closure
    /// is asked. Only with [`SchedulingPolicy::RoundRobin`] there is something to choose.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// // Whoever has the fewest connections open gets the next one.
    /// master.set_scheduler(|_, workers| {
    ///     let least = workers.iter().min_by_key(|load| load.open + load.waiting());
    ///     least.map(|load| load.worker)
    /// });
    /// # }
    /// ```
    pub fn set_scheduler(
        &self,
        choose: impl FnMut(Option<SocketAddr>, &[WorkerLoad]) -> Option<WorkerId> + 'static,
    ) {
        self.shell.core.borrow_mut().use_scheduler();
        let replaced = self.scheduler.replace(Some(Rc::new(RefCell::new(choose))));
        drop(replaced);
    }
}

/// Callbacks. Each method adds one to those that are there, and returns what
/// [`off`](Master::off) takes. For every event but `message`, the callbacks of the worker itself
/// are called before these.
impl Master {
    /// Calls back when a worker has been forked.
    ///
    /// Node: `cluster.on('fork')`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_fork(|_, worker| println!("worker {} forked", worker.id()));
    /// # }
    /// ```
    pub fn on_fork(&self, callback: impl FnMut(&Self, &WorkerProcess) + 'static) -> CallbackId {
        self.callbacks.fork.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when a worker's program has called [`init`](crate::init).
    ///
    /// Node: `cluster.on('online')`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_online(|_, worker| println!("worker {} is online", worker.id()));
    /// # }
    /// ```
    pub fn on_online(&self, callback: impl FnMut(&Self, &WorkerProcess) + 'static) -> CallbackId {
        let callbacks = &self.callbacks.of_workers.online;
        callbacks.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when a worker listens, once for each of its listeners.
    ///
    /// Node: `cluster.on('listening')`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_listening(|_, worker, address| {
    ///     println!("worker {} is now connected to {address}", worker.id());
    /// });
    /// # }
    /// ```
    pub fn on_listening(
        &self,
        callback: impl FnMut(&Self, &WorkerProcess, &Address) + 'static,
    ) -> CallbackId {
        let callbacks = &self.callbacks.of_workers.listening;
        callbacks.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when a message has come from a worker; before the worker's own callbacks.
    ///
    /// Node: `cluster.on('message')`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_message(|_, worker, message| {
    ///     println!("{} bytes from worker {}", message.bytes().len(), worker.id());
    /// });
    /// # }
    /// ```
    pub fn on_message(
        &self,
        callback: impl FnMut(&Self, &WorkerProcess, &Message) + 'static,
    ) -> CallbackId {
        let callbacks = &self.callbacks.of_workers.message;
        callbacks.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when a worker's channel has closed.
    ///
    /// Node: `cluster.on('disconnect')`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_disconnect(|_, worker| println!("worker {} has disconnected", worker.id()));
    /// # }
    /// ```
    pub fn on_disconnect(
        &self,
        callback: impl FnMut(&Self, &WorkerProcess) + 'static,
    ) -> CallbackId {
        let callbacks = &self.callbacks.of_workers.disconnect;
        callbacks.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when a worker has ended, with its exit code or the signal that ended it. It is
    /// the last event of a worker; the process is gone and no longer in the table.
    ///
    /// Node: `cluster.on('exit')`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_exit(|master, worker, status| {
    ///     println!("worker {} died ({status}), restarting", worker.process().id());
    ///     let _ = master.fork();
    /// });
    /// # }
    /// ```
    pub fn on_exit(
        &self,
        callback: impl FnMut(&Self, &WorkerProcess, ExitStatus) + 'static,
    ) -> CallbackId {
        let callbacks = &self.callbacks.of_workers.exit;
        callbacks.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when something failed outside any call of the program's: with the worker it
    /// concerns, or with `None` for a listener.
    ///
    /// Node: the `error` events. Without a callback these errors go unnoticed.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_error(|_, _, error| eprintln!("{error}"));
    /// # }
    /// ```
    pub fn on_error(
        &self,
        callback: impl FnMut(&Self, Option<&WorkerProcess>, &Error) + 'static,
    ) -> CallbackId {
        let callbacks = &self.callbacks.of_workers.error;
        callbacks.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back for each [`setup_master`](Self::setup_master), of which each
    /// [`fork`](Self::fork) implies one, with the settings as they are then.
    ///
    /// Node: `cluster.on('setup')`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_setup(|_, settings| println!("workers run {:?}", settings.exec));
    /// # }
    /// ```
    pub fn on_setup(&self, callback: impl FnMut(&Self, &Settings) + 'static) -> CallbackId {
        self.callbacks.setup.add(Rc::new(RefCell::new(callback)))
    }

    /// Calls back when the process gets `signal`, in the loop and not in a signal handler.
    ///
    /// Node: `process.on(signal)`. The signal loses its default effect until the master is
    /// dropped. A handler that the program installed before still runs. Several signals of one
    /// kind that come at once may lead to one call.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the signal cannot be handled, as `KILL` and `STOP`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::Signal;
    ///
    /// for signal in [Signal::INT, Signal::TERM] {
    ///     master.on_signal(signal, |master, _| master.disconnect(|_| {}))?;
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

    /// Makes a callback, of the cluster, of a worker or of a signal, one that is called once: it is
    /// removed before its next call. One that is gone already is no error.
    ///
    /// Node: `cluster.once()` and `worker.once()`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.once(master.on_listening(|_, _, address| println!("serving {address}")));
    /// # }
    /// ```
    pub fn once(&self, id: CallbackId) {
        self.callbacks.fork.once(id);
        self.callbacks.setup.once(id);
        self.callbacks.of_workers.once(id);
        for callbacks in self.of_worker.borrow().values() {
            callbacks.once(id);
        }
        self.event_loop.signal_callback_once(id);
    }

    /// Removes a callback of the cluster, of a worker or of a signal. One that is gone already is
    /// no error.
    ///
    /// Node: `cluster.removeListener()`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let id = master.on_fork(|_, _| println!("the first time only"));
    /// master.on_online(move |master, _| master.off(id));
    /// # }
    /// ```
    pub fn off(&self, id: CallbackId) {
        self.callbacks.fork.remove(id);
        self.callbacks.setup.remove(id);
        self.callbacks.of_workers.remove(id);
        // Not while the table is borrowed: what a callback owns may come back here when dropped.
        let workers: Vec<_> = self.of_worker.borrow().values().map(Rc::clone).collect();
        for callbacks in workers {
            callbacks.remove(id);
        }
        self.event_loop.remove_signal_callback(id);
    }
}

/// The loop: timers, the program's own descriptors, and how it turns.
impl Master {
    /// Calls back once, `after` this time.
    ///
    /// Node: `setTimeout`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// use std::time::Duration;
    ///
    /// master.set_timeout(Duration::from_secs(2), |_| println!("two seconds later"));
    /// # }
    /// ```
    pub fn set_timeout(&self, after: Duration, callback: impl FnOnce(&Self) + 'static) -> TimerId {
        self.event_loop.set_timeout(after, callback)
    }

    /// Calls back again and again, `every` time this has passed; 1 ms at least. If the program is
    /// late, calls are left out.
    ///
    /// Node: `setInterval`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// use std::time::Duration;
    ///
    /// master.set_interval(Duration::from_secs(1), |master| println!("{:?}", master.ledger()));
    /// # }
    /// ```
    pub fn set_interval(&self, every: Duration, callback: impl FnMut(&Self) + 'static) -> TimerId {
        self.event_loop.set_interval(every, callback)
    }

    /// Cancels a timer. One that is over already is no error.
    ///
    /// Node: `clearTimeout` and `clearInterval`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// use std::time::Duration;
    ///
    /// let timer = master.set_timeout(Duration::from_secs(2), |_| println!("too late"));
    /// master.on_listening(move |master, _, _| master.clear_timer(timer));
    /// # }
    /// ```
    pub fn clear_timer(&self, timer: TimerId) {
        self.event_loop.clear_timer(timer);
    }

    /// Waits for a descriptor of the program's own in the master's loop. See
    /// [`Worker::watch`](crate::Worker::watch), which is the same, for an example.
    ///
    /// Node has no counterpart; there, everything is in the loop.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the descriptor is of a kind that cannot be waited for, such as a file.
    pub fn watch<S: AsFd + 'static>(
        &self,
        source: S,
        interest: Interest,
        callback: impl FnMut(&Self, &S) -> Option<Interest> + 'static,
    ) -> Result<WatchId> {
        self.event_loop.watch(source, interest, callback)
    }

    /// Lets go of a watched descriptor, and drops it. One that is gone already is no error.
    ///
    /// Node has no counterpart. See [`Worker::watch`](crate::Worker::watch) for an example.
    pub fn unwatch(&self, watch: WatchId) {
        self.event_loop.unwatch(watch);
    }

    /// Lets the master end although a timer or watched descriptor is still there:
    /// [`run`](Self::run) does not wait for it. One that is gone already is no error.
    ///
    /// Node: `timer.unref()` and `socket.unref()`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use std::time::Duration;
    ///
    /// let report = master.set_interval(Duration::from_secs(1), |_| println!("still here"));
    /// master.unref(report);
    /// master.fork()?;
    /// master.run() // returns when the worker has left
    /// # }
    /// ```
    pub fn unref(&self, id: impl Into<LoopId>) {
        self.event_loop.set_referenced(id.into(), false);
    }

    /// Undoes [`unref`](Self::unref), which has an example.
    ///
    /// Node: `timer.ref()` and `socket.ref()`.
    pub fn ref_(&self, id: impl Into<LoopId>) {
        self.event_loop.set_referenced(id.into(), true);
    }

    /// Turns the loop until nothing is left to wait for: no worker, no timer, no watched
    /// descriptor, no event to deliver, no message to write. Callbacks for signals do not count,
    /// listeners that are kept neither, nor what has been released with `unref`. A
    /// [detached](Settings::detached()) process counts only after
    /// [`ref_`](crate::Process::ref_).
    ///
    /// Node: the process goes on by itself after the main program, and ends when nothing is left.
    ///
    /// # Errors
    ///
    /// - [`Error::AlreadyRunning`] if a callback calls it;
    /// - [`Error::Io`] if the system refuses to wait.
    ///
    /// See [`Master`] for an example.
    pub fn run(&self) -> Result<()> {
        drop(self.event_loop.enter()?);
        while self.has_work() {
            self.dispatch(None)?;
        }
        Ok(())
    }

    fn has_work(&self) -> bool {
        let workers = self.shell.core.borrow().has_workers();
        let busy = workers || self.has_notifications() || self.event_loop.has_work();
        busy || self.shell.is_writing()
    }

    /// Whether there is something to tell the program.
    fn has_notifications(&self) -> bool {
        let unscheduled = self.shell.core.borrow().has_unscheduled();
        unscheduled || self.shell.has_notifications() || !self.callbacks.over.borrow().is_empty()
    }

    /// Turns the loop once: waits until something happens or `timeout` is over (`None`: without
    /// limit; zero: not at all), handles it and calls back. For programs with a loop of their own,
    /// which wait for [`as_fd`](Self::as_fd) to be readable, at most for
    /// [`time_left`](Self::time_left), and then call this with a timeout of zero.
    ///
    /// Node has no counterpart.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use std::time::Duration;
    ///
    /// master.dispatch(Some(Duration::ZERO))?;
    /// # Ok(()) }
    /// ```
    pub fn dispatch(&self, timeout: Option<Duration>) -> Result<()> {
        let event_loop = &self.event_loop;
        let _running = event_loop.enter()?;
        let due = self.shell.deadline();
        let limit = self.time_until(due);
        let mut ready = ReadyList::new();
        let ready = event_loop.wait(earlier(limit, timeout), &mut ready)?;
        let pending = self.shell.pending();
        // Without a limit nothing was left to tell.
        if self.shell.tick(due) || limit.is_some() {
            self.settle();
        }
        for worker in pending {
            // One by one: whoever panics here and goes on hears the rest later.
            if self.shell.remove_pending(worker) {
                if let Some(worker_io) = self.shell.worker_io(worker) {
                    let mut left = FRAMES_PER_TURN;
                    self.process_frames(&worker_io, &mut left);
                }
                self.settle();
            }
        }
        for (token, ready) in ready {
            // A callback may return in a child that it has forked.
            event_loop.check_own()?;
            match token {
                Token::Channel(number) => self.channel_ready(WorkerId::new(number), ready),
                Token::Process(number) => self.process_ready(WorkerId::new(number)),
                Token::Listener(number) => self.shell.listener_ready(HandleId(number)),
                Token::Selector(number) => self.shell.selector_ready(HandleId(number)),
                Token::Watch(number) => event_loop.watch_ready(self, number),
                Token::Signals => self.signals_ready(),
            }
            self.settle();
        }
        for worker in self.perhaps_ended() {
            self.process_ready(worker);
            self.settle();
        }
        event_loop.fire_timers(self, || self.settle());
        Ok(())
    }

    /// Returns how long the program may wait before it calls [`dispatch`](Self::dispatch) although
    /// [`as_fd`](Self::as_fd) is not readable: `None` for any time, zero if events wait.
    ///
    /// Node has no counterpart. It changes with every call of another method, so ask last.
    ///
    /// ```no_run
    /// # fn wait(_: std::os::fd::BorrowedFd<'_>, _: Option<std::time::Duration>) {}
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use std::{os::fd::AsFd, time::Duration};
    ///
    /// loop {
    ///     wait(master.as_fd(), master.time_left());
    ///     master.dispatch(Some(Duration::ZERO))?;
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn time_left(&self) -> Option<Duration> {
        self.time_until(self.shell.deadline())
    }

    /// The same, if the shell has something to do at `due`.
    fn time_until(&self, due: Option<Time>) -> Option<Duration> {
        if self.has_notifications() || self.reap.get() || self.shell.has_pending() {
            return Some(Duration::ZERO);
        }
        let looks = self.has_unwatched_exits().then_some(LOOK_EVERY);
        earlier(looks, self.event_loop.time_left(due))
    }

    /// Whether a worker may end without anything to tell it. Not where processes have descriptors.
    fn has_unwatched_exits(&self) -> bool {
        self.child_signal.borrow().is_some() && self.shell.has_unwatched_exits()
    }

    /// The workers that are to be checked for their end, where processes have no descriptors: all, if
    /// SIGCHLD has come; from time to time those of whose end nothing tells.
    fn perhaps_ended(&self) -> Vec<WorkerId> {
        if self.reap.take() {
            return self.shell.unwatched();
        }
        if !self.has_unwatched_exits() || self.checked_unseen.get().elapsed() < LOOK_EVERY {
            return Vec::new();
        }
        self.checked_unseen.set(Instant::now());
        self.shell.unwatched_exits()
    }

    /// Carries out what the core decided.
    fn act(&self) {
        self.shell.act();
        if self.shell.core.borrow().has_unscheduled() {
            self.choose();
        }
    }

    /// Asks the program who gets the connections that have been accepted.
    fn choose(&self) {
        loop {
            // Not borrowed while the closure runs, which may set another one.
            let scheduler = self.scheduler.borrow().clone();
            let Some(scheduler) = scheduler else {
                return;
            };
            let core = self.shell.core.borrow();
            let Some((handle, place, connection)) = core.unscheduled() else {
                return;
            };
            let peer = sys::listen::peer_addr(connection.as_fd());
            let candidates = core.candidates(handle);
            drop(core);
            // It may turn the loop, and be asked while it is asked.
            let chosen = scheduler.try_borrow_mut();
            let chosen = chosen.ok().and_then(|mut choose| choose(peer, &candidates));
            self.shell.core.borrow_mut().choose(handle, place, chosen);
            self.shell.act();
        }
    }

    /// Carries out what the core decided and calls the program, until nothing is left to do.
    fn settle(&self) {
        self.act();
        for _ in 0..EVENTS_PER_TURN {
            if self.event_loop.check_own().is_err() {
                break;
            }
            let over = self.callbacks.over.borrow_mut().pop_front();
            if let Some(callback) = over {
                callback(self);
                self.act();
                continue;
            }
            self.tell_receipts();
            let emit = self.shell.core.borrow_mut().next_event();
            let Some(emit) = emit else {
                break;
            };
            self.deliver(emit);
            self.act();
        }
    }

    /// Tells which messages have been written or lost: those of now, and not what comes of that,
    /// which would keep events waiting.
    fn tell_receipts(&self) {
        for _ in 0..self.shell.count_receipts() {
            if let Some((worker, receipt)) = self.shell.next_receipt() {
                self.written(worker, receipt);
                self.shell.act();
            }
        }
    }

    fn written(&self, worker: WorkerId, receipt: Receipt) {
        let found = self.find(worker);
        let callback = found.and_then(|worker| worker.callbacks().receipts.take(receipt.id));
        if let Some(callback) = callback {
            callback(self, receipt.outcome(Some(worker)));
        }
    }

    fn deliver(&self, emit: EmittedEvent<Vec<NoLingerFd>>) {
        let cluster = &self.callbacks;
        let worker = emit.worker.and_then(|id| self.find(id));
        let callbacks = match (emit.level, &worker) {
            (Level::Worker, Some(worker)) => worker.callbacks(),
            (Level::Worker, None) => return,
            (Level::Cluster, _) => &cluster.of_workers,
        };
        if let Event::Error(error) = &emit.event {
            return callbacks.error.each(|f| f(self, worker.as_ref(), error));
        }
        if let Event::Setup = emit.event {
            let settings = self.settings();
            return cluster.setup.each(|f| f(self, &settings));
        }
        if let Event::Disconnected = emit.event {
            let over = cluster.disconnected.take();
            return cluster.over.borrow_mut().extend(over);
        }
        let Some(worker) = &worker else {
            return;
        };
        match emit.event {
            Event::Fork => cluster.fork.each(|f| f(self, worker)),
            Event::Online => {
                if emit.level == Level::Cluster {
                    self.debug(format_args!("Worker {} online", worker.process().id()));
                }
                callbacks.online.each(|f| f(self, worker));
            }
            Event::Listening(address) => {
                callbacks.listening.each(|f| f(self, worker, &address));
            }
            Event::Message { bytes, fds } => {
                let message = Message::new(bytes, fds);
                if let Some(untaken) = message.unclaimed_fds() {
                    *self.shell.delivering_fds.borrow_mut() = Rc::downgrade(untaken);
                }
                callbacks.message.each(|f| f(self, worker, &message));
                let own = &worker.callbacks().message;
                own.each(|f| f(self, worker, &message));
            }
            Event::Disconnect => callbacks.disconnect.each(|f| f(self, worker)),
            Event::Exit(exit_report) => {
                worker.has_left(exit_report);
                callbacks.exit.each(|f| f(self, worker, exit_report.status));
                if emit.level == Level::Cluster {
                    self.forget(worker);
                }
            }
            Event::DetachedExit(status) => {
                let exited_after_disconnect = false;
                worker.has_left(ExitReport {
                    status,
                    exited_after_disconnect,
                });
                callbacks.exit.each(|f| f(self, worker, status));
                self.forget(worker);
            }
            Event::Error(_) | Event::Setup | Event::Disconnected => {}
        }
    }

    /// The last event of the process has been delivered.
    fn forget(&self, process: &WorkerProcess) {
        self.shell.forget(process.id());
        self.of_worker.borrow_mut().remove(&process.id());
        // They may own the very handle that has them.
        process.callbacks().clear();
    }

    /// What `CLUSTER_DEBUG=1` asks for, on standard error.
    fn debug(&self, what: std::fmt::Arguments<'_>) {
        if self.debug {
            use std::io::Write as _;

            // In one piece: workers may write there at the same time.
            let line = format!("{},Master {what}\n", std::process::id());
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn channel_ready(&self, worker: WorkerId, ready: &Ready) {
        if ready.writable {
            self.shell.channel_writable(worker);
        }
        // What has arrived is heard before more is read: else it would pile up here.
        if ready.readable && !self.shell.is_pending(worker) {
            if let Some(worker_io) = self.shell.worker_io(worker) {
                self.read(&worker_io);
            }
        }
    }

    /// Reads and hears what has come; what comes of the last frame is still to be settled.
    fn read(&self, worker: &WorkerIo) {
        let mut left = FRAMES_PER_TURN;
        for _ in 0..READS_PER_TURN {
            if !self.shell.read(worker)
                || !self.process_frames(worker, &mut left)
                || !worker.has_more()
            {
                return;
            }
            self.settle();
        }
    }

    /// A worker has ended: what it wrote before comes first.
    fn process_ready(&self, worker: WorkerId) {
        let Some(worker_io) = self.shell.worker_io(worker) else {
            return;
        };
        for _ in 0..LAST_WORDS {
            while self.shell.process_frame(&worker_io) != Processed::Nothing {
                self.settle();
            }
            if !self.shell.read(&worker_io) {
                break;
            }
        }
        self.shell.try_reap(worker);
    }

    /// Feeds frames that have arrived: so many that the others are not kept waiting. What comes of the
    /// last one is still to be settled. Returns whether these were all.
    fn process_frames(&self, worker: &WorkerIo, left: &mut u32) -> bool {
        let mut is_noted = false;
        while *left > 0 {
            *left -= 1;
            match self.shell.process_frame(worker) {
                Processed::Nothing | Processed::Drained => {
                    if is_noted {
                        self.shell.remove_pending(worker.id);
                    }
                    return true;
                }
                Processed::More => {
                    // Whoever panics here and goes on hears the rest later.
                    if !is_noted {
                        self.shell.add_pending(worker.id);
                        is_noted = true;
                    }
                    self.settle();
                }
                Processed::Yield => break,
            }
        }
        self.shell.add_pending(worker.id);
        false
    }

    fn signals_ready(&self) {
        for signal in self.event_loop.take_signals() {
            if signal.number() == sys::signal::CHLD {
                self.reap.set(true);
            }
            self.event_loop.call_signal(self, signal);
            self.settle();
        }
    }
}

/// The descriptor that is readable when [`dispatch`](Master::dispatch) has something to do.
impl AsFd for Master {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event_loop.as_fd()
    }
}

impl Drop for Master {
    fn drop(&mut self) {
        // What closures own may own what owns them.
        self.event_loop.clear();
        drop(self.scheduler.take());
        for callbacks in self.of_worker.take().into_values() {
            callbacks.clear();
        }
        // The program may still have workers in its hands.
        self.shell.close();
    }
}
