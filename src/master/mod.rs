//! The master's role: its public handles, and the shell that carries out the core's decisions.
//!
//! Decisions belong to `core::master`, and system calls to `sys`. The master's public methods are
//! spread over several files: `fork` starts workers, `listener` retains sockets, `callbacks` adds
//! and removes callbacks, `event_loop` runs the loop, `logs` attaches logs to the loop, and `passing`
//! passes idle connections to the next master. `delivery` calls the callbacks, `orphans` reaps
//! orphans, and this file has the other methods.
//!
//! `master` and `worker_process` refer to each other, because callbacks receive both handles and
//! the master makes the workers' handles.

pub(crate) mod callbacks;
mod delivery;
mod event_loop;
mod fork;
pub(crate) mod listener;
mod logs;
mod orphans;
mod passed_name;
mod passing;
pub(crate) mod process;
pub(crate) mod shard_group;
pub(crate) mod shell;
pub(crate) mod worker_process;

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::config::env::DEBUG;
use crate::config::settings::Settings;
use crate::error::Result;
use crate::master::callbacks::{MasterCallbacks, WorkerCallbacks};
use crate::master::orphans::OrphanCheck;
use crate::master::shell::MasterShell;
use crate::master::worker_process::WorkerProcess;
use crate::runtime::callbacks::Shared;
use crate::runtime::event_loop::EventLoop;
use crate::runtime::log::{AttachedLogs, LogWriter};
use crate::sys;
use crate::sys::signal::InstalledHandler;
use crate::types::ledger::Ledger;
use crate::types::loads::{Loads, WorkerLoad};
use crate::types::policy::SchedulingPolicy;
use crate::types::signal::Signal;
use crate::types::sorted_map::SortedMap;
use crate::types::worker_id::WorkerId;
use crate::worker::Worker;

/// The process that forks workers, supervises them, and shares its ports with them.
///
/// Node: `cluster` in a process where `cluster.isMaster` is true.
///
/// [`init`](crate::init()) returns the master. All methods can be called at any time, even by
/// callbacks, unless their documentation says otherwise. Callbacks run only in [`run`](Self::run)
/// and [`dispatch`](Self::dispatch), never inside another call.
///
/// When the master is dropped, the channels to its workers close and the workers exit. A dropped
/// master does not wait for the workers' processes, so they stay zombies until the master's process
/// exits. To avoid zombies, let [`run`](Self::run) return before you drop the master.
///
/// A master is not `Send`: it stays on the thread that called `init`. Another thread can send its
/// result through a pipe or socket that the master [`watch`](Self::watch)es.
///
/// ```no_run
/// use std::{cell::RefCell, collections::BTreeSet, rc::Rc};
/// use cluster::{LogWriter, Role, Signal};
///
/// # fn serve(_: cluster::Connection) {}
/// fn main() -> cluster::Result<()> {
///     match cluster::init()? {
///         Role::Master(master) => {
///             for _ in 0..cluster::available_parallelism() {
///                 master.fork()?;
///             }
///             let log = LogWriter::stdout().attached_to(&master);
///             let serving = Rc::new(RefCell::new(BTreeSet::new()));
///             let listening = Rc::clone(&serving);
///             master.on_listening(move |_, worker, _| {
///                 listening.borrow_mut().insert(worker.id());
///             });
///             let replace = master.on_exit(move |master, worker, status| {
///                 log.line(format_args!("worker {} exited ({status})", worker.process().id()));
///                 let served = serving.borrow_mut().remove(&worker.id());
///                 if worker.exited_after_disconnect() == Some(true) {
///                     return;
///                 }
///                 // A worker that could not even listen is probably broken, and so would be its
///                 // replacement.
///                 if !served || master.fork().is_err() {
///                     // When all workers have exited, `run` returns this error.
///                     master.give_up(format!("a worker exited ({status})"));
///                 }
///             });
///             master.on_signal(Signal::TERM, move |master, _| {
///                 master.remove_callback(replace);
///                 master.disconnect();
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
#[doc(alias = "cluster")]
#[doc(alias = "primary")]
pub struct Master {
    shell: Rc<MasterShell>,
    event_loop: EventLoop<Self>,
    callbacks: MasterCallbacks,
    scheduler: RefCell<Option<Shared<Scheduler>>>,
    /// The callbacks of each worker and detached process whose last event has not been delivered.
    worker_callbacks: RefCell<SortedMap<WorkerId, Rc<WorkerCallbacks>>>,
    settings: RefCell<Settings>,
    launch: Launch,
    /// The policy that `CLUSTER_SCHED_POLICY` or the application has selected. `None` if neither
    /// has, or after `PolicyIgnored` has been reported.
    selected_policy: Cell<Option<SchedulingPolicy>>,
    /// The handler of SIGCHLD. `None` until the first worker without a process descriptor or the
    /// first call of `reap_orphans` requires it.
    child_signal: RefCell<Option<InstalledHandler>>,
    /// Whether all workers without a process descriptor must be checked for their exit, because
    /// SIGCHLD has arrived or `watch_children` has been called.
    reap: Cell<bool>,
    orphan_check: RefCell<OrphanCheck>,
    /// The time of the last check for exits that the system does not report.
    last_exit_check: Cell<Instant>,
    logs: AttachedLogs,
    /// The reason from the first call of `give_up`, until `run` or `dispatch` returns it.
    gave_up: RefCell<Option<Box<dyn std::error::Error + Send + Sync>>>,
    /// The log for the lines that `CLUSTER_DEBUG=1` requests. `None` without that variable.
    debug_log: Option<LogWriter>,
}

/// The inputs from `init` that are needed to start a worker. `init` passes them in, so the master
/// does not depend on `init`.
pub(crate) struct Launch {
    /// The path of this process's program, or `None` if it is unknown.
    pub(crate) own_program: Option<PathBuf>,
    /// The path of the script that has executed this process's program and has passed its own path
    /// as `argv[0]`. `None` if there is no such script.
    pub(crate) wrapper_script: Option<PathBuf>,
    /// Turns the calling process, a forked copy of the master, into a worker. The arguments are the
    /// worker's id, its inspect port, and its channel's descriptor.
    pub(crate) become_worker: fn(WorkerId, Option<u16>, RawFd) -> Result<Worker>,
    /// The value of `CLUSTER_WRAPPED` in the environment of the workers' programs, if the master is
    /// a wrapped program itself (see `WRAPPED`).
    pub(crate) wrapped: Option<u64>,
}

impl std::fmt::Debug for Master {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Master")
            .field("workers", &self.workers())
            .finish_non_exhaustive()
    }
}

type Scheduler = dyn FnMut(Option<SocketAddr>, &[WorkerLoad]) -> Option<WorkerId>;

impl Master {
    pub(crate) fn new(selected: Option<SchedulingPolicy>, launch: Launch) -> Result<Self> {
        let event_loop = EventLoop::new()?;
        let policy = selected.unwrap_or_default();
        let shell = MasterShell::new(policy, event_loop.poller().clone(), event_loop.start_time());
        let debug = std::env::var_os(DEBUG).is_some_and(|value| value == "1");
        let master = Self {
            shell: Rc::new(shell),
            event_loop,
            callbacks: MasterCallbacks::default(),
            scheduler: RefCell::default(),
            worker_callbacks: RefCell::default(),
            settings: RefCell::default(),
            launch,
            selected_policy: Cell::new(selected),
            child_signal: RefCell::default(),
            reap: Cell::new(false),
            orphan_check: RefCell::default(),
            last_exit_check: Cell::new(Instant::now()),
            logs: AttachedLogs::default(),
            gave_up: RefCell::default(),
            debug_log: debug.then(LogWriter::stderr),
        };
        if let Some(log) = &master.debug_log {
            master.attach_log(log);
        }
        Ok(master)
    }

    /// Installs a handler of SIGCHLD, so that the exit of any child wakes up the loop. Also
    /// requests one check of all workers without a process descriptor, because such a worker may
    /// have exited before the handler was installed.
    fn watch_children(&self) -> io::Result<()> {
        let mut installed = self.child_signal.borrow_mut();
        if installed.is_none() {
            let signal = Signal::from_number(sys::signal::CHLD);
            *installed = Some(self.event_loop.install(signal)?);
        }
        self.reap.set(true);
        Ok(())
    }

    /// Changes the settings with which later calls of [`fork`](Self::fork) start workers. Running
    /// workers are not affected.
    ///
    /// Node: `cluster.setupMaster(settings)`.
    ///
    /// A setting that the argument does not mention keeps its value, or receives its default at the
    /// first call. A setting that was [`unset`](Settings::unset) receives its default. Each call
    /// emits one `setup` event, which the loop delivers after the call.
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
    #[doc(alias = "setupMaster")]
    #[doc(alias = "setupPrimary")]
    pub fn setup_master(&self, settings: Settings) {
        let mut current = self.settings();
        current.update(settings);
        let current = current.complete(self.launch.own_program.as_deref());
        // Drop the previous settings only after the borrow has ended, because dropping a closure
        // may run code of the application that calls this method again.
        let previous = self.settings.replace(current);
        drop(previous);
        self.shell.core.borrow_mut().setup();
    }

    /// Returns the current settings. Before the first [`setup_master`](Self::setup_master) or
    /// [`fork`](Self::fork), they are empty; afterwards, all defaults are filled in.
    ///
    /// Node: `cluster.settings`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// assert_eq!(master.settings().get_exec(), None);
    /// # }
    /// ```
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.settings.borrow().clone()
    }

    /// Returns the path of the script that has executed this process's program and has passed its
    /// own path as `argv[0]`, as `exec -a "$0" program` does in bash. The path is absolute.
    ///
    /// Node has no counterpart.
    ///
    /// [`Pool::upgrade`](crate::pool::Pool::upgrade) executes this script instead of the program.
    /// The result is `None` if `argv[0]` contained no slash at the call of [`init`](crate::init()),
    /// or if its file was not an executable script that begins with `#!`. It is also `None` if the
    /// program has a set-user-ID or set-group-ID bit or file capabilities, because any user can
    /// choose `argv[0]` of such a program.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::Settings;
    ///
    /// let mut settings = Settings::default().detached(true);
    /// if let Some(script) = master.wrapper_script() {
    ///     settings = settings.exec(script);
    /// }
    /// master.fork_as(settings)?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn wrapper_script(&self) -> Option<&Path> {
        self.launch.wrapper_script.as_deref()
    }

    /// Sets the policy by which connections are distributed. The policy replaces that of
    /// `CLUSTER_SCHED_POLICY`, or the default.
    ///
    /// Node: `cluster.schedulingPolicy = …`.
    ///
    /// Call this method before the first call of [`fork`](Self::fork), [`listen`](Self::listen) or
    /// [`adopt`](Self::adopt).
    ///
    /// # Errors
    ///
    /// Returns [`Error::PolicyFrozen`](crate::Error::PolicyFrozen) once a worker has been forked,
    /// or `listen` or `adopt` has succeeded.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// master.set_scheduling_policy(cluster::SchedulingPolicy::Shared)?;
    /// # Ok(()) }
    /// ```
    #[doc(alias = "schedulingPolicy")]
    pub fn set_scheduling_policy(&self, policy: SchedulingPolicy) -> Result<()> {
        self.shell.core.borrow_mut().set_policy(policy)?;
        self.selected_policy.set(Some(policy));
        Ok(())
    }

    /// Returns the policy by which connections are distributed.
    ///
    /// Node: `cluster.schedulingPolicy`.
    ///
    /// See [`set_scheduling_policy`](Self::set_scheduling_policy) for an example.
    #[doc(alias = "schedulingPolicy")]
    #[must_use]
    pub fn scheduling_policy(&self) -> SchedulingPolicy {
        self.shell.core.borrow().policy()
    }

    /// Returns the workers in the order of their ids.
    ///
    /// Node: `cluster.workers`.
    ///
    /// A worker is removed from this list after it has disconnected and exited, just before its
    /// `exit` event.
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

    /// Returns the worker with this id, or `None` if [`workers`](Self::workers) does not contain
    /// it.
    ///
    /// Node: `cluster.workers[id]`.
    ///
    /// The argument is a [`WorkerId`] or a plain number, for instance a number from a message.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master, id: cluster::WorkerId) {
    /// if let Some(worker) = master.worker(id) {
    ///     worker.disconnect();
    /// }
    /// let first = master.worker(1_u32);
    /// # let _ = first;
    /// # }
    /// ```
    #[must_use]
    pub fn worker(&self, number: impl Into<u32>) -> Option<WorkerProcess> {
        let id = WorkerId::new(number.into());
        let is_worker = self.shell.core.borrow().is_worker(id);
        self.find(id).filter(|_| is_worker)
    }

    /// Returns the worker or detached process with this id, or `None` after its last event has been
    /// delivered.
    fn find(&self, id: WorkerId) -> Option<WorkerProcess> {
        let worker_io = self.shell.worker_io(id)?;
        let callbacks = Rc::clone(self.worker_callbacks.borrow().get(&id)?);
        Some(WorkerProcess::new(&self.shell, worker_io, callbacks))
    }

    /// Disconnects all workers. When all workers have exited and all listeners except the retained
    /// ones are closed, the callbacks of [`on_all_disconnected`](Self::on_all_disconnected) are
    /// called.
    ///
    /// Node: `cluster.disconnect()`.
    ///
    /// The workers still serve connections that have been accepted. They also serve the kernel's
    /// backlog of every listener, with two exceptions: the backlog of a retained listener waits for
    /// the next worker ([`MasterListener`](crate::MasterListener) describes the sharded policy),
    /// and the application keeps the backlog of a listener that it has opened itself
    /// ([`ListenOptions::fd`](crate::ListenOptions::fd)). Serving the backlogs can take arbitrarily long;
    /// [`disconnect_within`](Self::disconnect_within) sets a limit. If a worker is forked in the
    /// meantime, the disconnect also waits for that worker, but does not ask it to disconnect.
    /// Therefore, an application that replaces exited workers stops doing so first, like the
    /// example of [`Master`]. Callbacks are never called inside this call.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_all_disconnected_once(|_| drop(std::fs::remove_file("server.pid")));
    /// master.disconnect();
    /// # }
    /// ```
    pub fn disconnect(&self) {
        self.shell.core_now().disconnect_all();
        self.shell.act();
    }

    /// Disconnects several workers together. Ignores the ids of other processes.
    ///
    /// Node has no counterpart.
    ///
    /// Each worker disconnects as after [`WorkerProcess::disconnect`]. Use this method to disconnect
    /// all workers of a listener, if the master has other workers too. All of them then serve the
    /// listener's last connections and requests. If the workers are disconnected one after another,
    /// only the last one does.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master, workers: &[cluster::WorkerProcess]) {
    /// let ids: Vec<_> = workers.iter().map(cluster::WorkerProcess::id).collect();
    /// master.disconnect_workers(&ids);
    /// # }
    /// ```
    pub fn disconnect_workers(&self, workers: &[WorkerId]) {
        self.shell.core_now().disconnect_workers(workers);
        self.shell.act();
    }

    /// Disconnects all workers, and kills those that have not exited by the deadline, which is
    /// `timeout` after the call.
    ///
    /// Node has no counterpart: in Node, applications set a timer.
    ///
    /// Until the deadline, this method works like [`disconnect`](Self::disconnect). At the
    /// deadline, the master sends SIGKILL to every worker that still exists, which also ends
    /// workers that loop or are stopped. The master also kills workers that were forked between the
    /// call and the deadline, but no later ones. The deadline no longer applies once the disconnect
    /// has finished. If several deadlines are set, the earliest one applies. A deadline cannot be
    /// revoked.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use std::time::Duration;
    /// use cluster::Signal;
    ///
    /// master.on_signal(Signal::TERM, |master, _| {
    ///     master.disconnect_within(Duration::from_secs(10));
    /// })?;
    /// # Ok(()) }
    /// ```
    pub fn disconnect_within(&self, timeout: Duration) {
        self.shell.core_now().disconnect_all_within(timeout);
        self.shell.act();
    }

    /// Returns the numbers of accepted and parked connections, by outcome.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let log = cluster::LogWriter::stderr().attached_to(master);
    /// let ledger = master.ledger();
    /// log.line(format_args!("{} accepted, {} in flight", ledger.accepted, ledger.in_flight()));
    /// # }
    /// ```
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.shell.count_all();
        self.shell.core.borrow().ledger()
    }
}

// Distributing connections.
impl Master {
    /// Returns the loads of all workers and listeners, for monitoring or for a
    /// [scheduler](Self::set_scheduler).
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let log = cluster::LogWriter::stderr().attached_to(master);
    /// let loads = master.loads();
    /// for load in &loads.workers {
    ///     log.line(format_args!("{}: {} served, {} open", load.worker, load.received, load.open));
    /// }
    /// for load in &loads.listeners {
    ///     log.line(format_args!("{}: {:?} wait", load.address, load.queued));
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn loads(&self) -> Loads {
        self.shell.loads()
    }

    /// Sets the maximum number of connections of which the master holds a copy: those that are
    /// [parked](crate::Connection::park), those that wait for data
    /// ([`ListenOptions::wait_for_data`](crate::ListenOptions::wait_for_data)), and those that were
    /// parked before and that a worker has. Each of them needs one descriptor in the master.
    ///
    /// Node has no counterpart.
    ///
    /// The default is half of the soft limit of descriptors (`RLIMIT_NOFILE`) at the time when the
    /// master was created. If one more connection exceeds the maximum, the idle connection that
    /// would expire first is closed, and [`Ledger::idle_closed`](crate::Ledger::idle_closed) counts
    /// it. If no connection is idle, a connection that a worker parks is closed instead, and new
    /// connections that wait for data stay in the backlog. Connections beyond a lower maximum stay
    /// open. With the maximum 0, the master does not wait for data of new connections.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.set_max_parked(10_000);
    /// # }
    /// ```
    pub fn set_max_parked(&self, connections: usize) {
        self.shell.core_now().set_parked_limit(connections);
        self.shell.act();
    }

    /// Sets a closure that chooses the worker for each connection that the master accepts. The
    /// closure replaces the round robin; it can choose by the client's address, for instance, or by
    /// the workers' loads.
    ///
    /// Node has no counterpart.
    ///
    /// The closure receives the client's address, which is `None` for a Unix socket, and the loads
    /// of the listening workers in the order of their ids. For a parked connection, these are only the
    /// workers that may [receive](crate::Connection::park) it. A connection waits for the chosen
    /// worker, even if that worker is busy. If the worker exits before it receives the connection,
    /// the closure is called again. If the closure returns `None` or a worker that is not in the
    /// list, the connection goes to the next worker by round robin.
    ///
    /// The master accepts at most 16 connections ahead of time for each worker. The method can be
    /// called at any time; a second closure replaces the first. The closure has an effect only with
    /// [`SchedulingPolicy::RoundRobin`].
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// // The worker with the fewest open connections gets the next one.
    /// master.set_scheduler(|_, workers| {
    ///     let least = workers.iter().min_by_key(|load| load.open + load.queued());
    ///     least.map(|load| load.worker)
    /// });
    /// # }
    /// ```
    pub fn set_scheduler(
        &self,
        choose: impl FnMut(Option<SocketAddr>, &[WorkerLoad]) -> Option<WorkerId> + 'static,
    ) {
        let replaced = self.scheduler.replace(Some(Rc::new(RefCell::new(choose))));
        drop(replaced);
        self.shell.core_now().use_scheduler();
        self.shell.act();
    }
}

impl Drop for Master {
    fn drop(&mut self) {
        // Break reference cycles through closures.
        self.event_loop.clear();
        self.logs.detach();
        drop(self.scheduler.take());
        for callbacks in self.worker_callbacks.take().into_values() {
            callbacks.clear();
        }
        // Close the channels explicitly, because the application may still have workers' handles.
        // Each handle also owns its worker's channel.
        self.shell.close();
    }
}
