//! The master's role: its public handles, and the shell that carries out the core's decisions.
//!
//! Decisions belong to `core::master`, and system calls to `sys`. The master's public methods are
//! spread over three files: `callbacks` adds and removes callbacks, `event_loop` runs the loop and
//! delivers events, and this file has the others.
//!
//! `master` and `worker_process` refer to each other, because callbacks receive both handles and
//! the master makes the workers' handles.

pub(crate) mod callbacks;
mod event_loop;
pub(crate) mod listener;
mod orphans;
mod passed_name;
mod passing;
pub(crate) mod process;
pub(crate) mod shard_group;
pub(crate) mod shell;
pub(crate) mod worker_process;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::config::env::DEBUG;
use crate::config::listen::{BindRequest, ListenOptions};
use crate::config::settings::Settings;
use crate::config::spawn::SpawnOptions;
use crate::error::{Error, Result};
use crate::master::callbacks::{MasterCallbacks, WorkerCallbacks};
use crate::master::listener::MasterListener;
use crate::master::orphans::Orphans;
use crate::master::shell::{MasterShell, RetainedListener};
use crate::master::worker_process::WorkerProcess;
use crate::runtime::callbacks::Shared;
use crate::runtime::event_loop::EventLoop;
use crate::runtime::log::{AttachedLogs, LogWriter};
use crate::sys;
use crate::sys::signal::InstalledHandler;
use crate::systemd::ListenFd;
use crate::types::address::Address;
use crate::types::endpoint::BACKLOG;
use crate::types::ledger::Ledger;
use crate::types::loads::{Loads, WorkerLoad};
use crate::types::policy::SchedulingPolicy;
use crate::types::signal::Signal;
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
///                 println!("worker {} exited ({status})", worker.process().id());
///                 let served = serving.borrow_mut().remove(&worker.id());
///                 if worker.exited_after_disconnect() == Some(true) {
///                     return;
///                 }
///                 // If it could not even listen, its replacement could not either.
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
    worker_callbacks: RefCell<BTreeMap<WorkerId, Rc<WorkerCallbacks>>>,
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
    orphans: RefCell<Orphans>,
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

/// Returns the workers' program for an error message. If its path is unknown, returns the name by
/// which the master's own program was called.
fn program_name(settings: &Settings) -> PathBuf {
    let own_name = || std::env::args_os().next().map(PathBuf::from);
    let program = settings.get_exec().map(Path::to_owned);
    program.or_else(own_name).unwrap_or_default()
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
            orphans: RefCell::default(),
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

    /// Lets the loop write the lines that wait in a log.
    pub(crate) fn attach_log(&self, log: &LogWriter) {
        self.logs.add(log, self.event_loop.poller());
    }

    /// Starts a worker. The worker executes the program of [`settings`](Self::settings), or runs
    /// the closure of [`main`](Settings::main) in a copy of this process.
    ///
    /// Node: `cluster.fork()`.
    ///
    /// The worker inherits the master's environment, except the variables that
    /// [`systemd`](crate::systemd) sets for the master only. No signal is blocked in the worker.
    /// The worker ignores the signals that were ignored when [`init`](crate::init()) created the
    /// master, except SIGPIPE and SIGCHLD. All other signals have their default effect.
    ///
    /// The calling thread waits until the program has started, or until `main` is about to be
    /// called. When the call returns, [`workers`](Self::workers) contains the worker. The events
    /// `setup` and `fork` are emitted in the next iteration of the loop.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Fork`] if:
    ///
    /// - the program cannot be executed;
    /// - the system has no process or descriptor left;
    /// - the system denies the worker its directory, user or group;
    /// - the settings contradict each other ([`Settings::listen_fds`]);
    /// - the closure that chooses the inspect port makes this call, and the new worker needs an
    ///   inspect port too;
    /// - with [`main`](Settings::main), the master has other threads;
    /// - with [`uid`](Settings::uid) or [`gid`](Settings::gid), the worker has not executed its
    ///   program within one second, for instance because another process of its user has stopped
    ///   it. The master then kills the worker, and the reason's kind is
    ///   [`TimedOut`](std::io::ErrorKind::TimedOut).
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

    /// Starts a worker with additional or changed variables in its environment.
    ///
    /// Node: `cluster.fork(env)`.
    ///
    /// The master's own environment does not change. Apart from the variables, this method works
    /// like [`fork`](Self::fork).
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`fork`](Self::fork). Also returns [`Error::Fork`] if a name or
    /// value contains a zero byte, or, with [`main`](Settings::main), if a name is empty or
    /// contains an equals sign.
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
        let options = SpawnOptions::new(self.settings()).envs(env);
        self.spawn(options)
    }

    /// Starts a worker with the given settings and variables, instead of the settings of
    /// [`setup_master`](Self::setup_master).
    ///
    /// Node has no counterpart: in Node, an application calls `setupMaster` before and after the
    /// fork.
    ///
    /// A setting without a value has its default. To change one setting only, begin with
    /// [`settings`](Self::settings). The call emits no `setup` event. If the settings are
    /// [`detached`](Settings::detached), the process is not a worker, and the call emits no `fork`
    /// event either. See [`fork_with`](Self::fork_with) for how the worker starts.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`fork_with`](Self::fork_with).
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::{Settings, SpawnOptions};
    ///
    /// let cache = Settings::default().exec("./cache");
    /// master.fork_as(cache.clone())?;
    /// master.fork_as(SpawnOptions::new(cache).env("SIZE", "64M"))?;
    /// # Ok(()) }
    /// ```
    pub fn fork_as(&self, options: impl Into<SpawnOptions>) -> Result<WorkerProcess> {
        let SpawnOptions { settings, env } = options.into();
        self.spawn(SpawnOptions {
            settings: settings.complete(self.launch.own_program.as_deref()),
            env,
        })
    }

    fn spawn(&self, options: SpawnOptions) -> Result<WorkerProcess> {
        self.event_loop.check_own()?;
        let SpawnOptions { settings, env } = options;
        let watch_children = || self.watch_children();
        let abandon_watches = || self.event_loop.abandon_watches();
        let forked = self.shell.fork(
            &settings,
            env,
            &self.launch,
            watch_children,
            abandon_watches,
        );
        let worker_io = forked.map_err(|(step, reason)| Error::Fork {
            program: program_name(&settings),
            step,
            reason,
        })?;
        let callbacks = Rc::new(WorkerCallbacks::default());
        self.worker_callbacks
            .borrow_mut()
            .insert(worker_io.id, Rc::clone(&callbacks));
        self.report_ignored_policy(&settings);
        Ok(WorkerProcess::new(&self.shell, worker_io, callbacks))
    }

    /// Emits an error, at most once, if the selected policy has no effect because the worker
    /// accepts connections itself, from the listeners that `listen_fds` passes to it.
    fn report_ignored_policy(&self, settings: &Settings) {
        let is_ignored = |policy: &SchedulingPolicy| {
            *policy != SchedulingPolicy::Shared
                && !settings.is_detached()
                && settings.passes_listener()
        };
        if let Some(policy) = self.selected_policy.get().filter(is_ignored) {
            self.selected_policy.set(None);
            let error = Error::PolicyIgnored { policy };
            self.shell.core.borrow_mut().error(None, error);
        }
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
    /// emits one `setup` event in the next iteration of the loop.
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
    /// Returns [`Error::PolicyFrozen`] after the first `fork`, `listen` or `adopt`.
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

    /// Opens a listener before the workers do, and retains it. Until the returned value is dropped,
    /// the listener stays open even if no worker has it.
    ///
    /// Node has no counterpart: in Node, a listener closes with its last worker.
    ///
    /// Workers that request the same address receive this listener. For example, `worker.listen(0)`
    /// receives the port that the kernel chose for `master.listen(0)`. If workers already have a
    /// listener on the address, the master retains that listener. If the master already retains it,
    /// the listener stays open until every `MasterListener` for it is dropped.
    ///
    /// The argument can also be a listening socket, for instance from systemd or from another
    /// process that served it before. Workers receive that socket if they request its address. The
    /// address of a Unix socket is its path, or its abstract name after a zero byte. A TCP listener
    /// on all addresses also matches requests that name only its port. The call makes the socket
    /// non-blocking.
    ///
    /// The scheduling policy cannot change after this call. See [`MasterListener`] for how a
    /// retained listener behaves.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Listen`] if:
    ///
    /// - the address is in use, is not allowed, or cannot be resolved;
    /// - the options contain [`exclusive`](ListenOptions::exclusive),
    ///   [`reuse_port`](ListenOptions::reuse_port) or [`fd`](ListenOptions::fd), which are only for
    ///   workers;
    /// - the argument is a socket that is not a stream socket of the requested kind, or that is a
    ///   Unix socket without a name.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// let listener = master.listen("127.0.0.1:8000")?;
    /// println!("clients can connect to {}, and wait", listener.address());
    /// master.fork()?; // which requests "127.0.0.1:8000" and serves the clients
    /// master.run()
    /// # }
    /// ```
    pub fn listen<S>(&self, options: impl Into<ListenOptions<S>>) -> Result<MasterListener> {
        self.event_loop.check_own()?;
        let mut bind_request = options.into().bind_request;
        match self.open(&mut bind_request) {
            Ok(retained) => Ok(MasterListener::new(&self.shell, retained)),
            Err(reason) => Err(Error::Listen {
                address: bind_request.to_string(),
                occupied_by: self.occupant(&bind_request, &reason),
                reason,
            }),
        }
    }

    /// Returns the address of the master's own socket that occupies the requested port, if the
    /// request has failed because the address is in use.
    fn occupant(&self, bind_request: &BindRequest, reason: &io::Error) -> Option<Address> {
        if reason.kind() != io::ErrorKind::AddrInUse {
            return None;
        }
        let endpoints = bind_request.resolve().ok()?;
        let core = self.shell.core.borrow();
        endpoints
            .iter()
            .find_map(|endpoint| core.occupant_address(endpoint))
    }

    /// Retains a socket that was passed to this process, for instance by systemd or by an old
    /// master. Until the returned value is dropped, the socket stays open even if no worker has it.
    ///
    /// Node has no counterpart.
    ///
    /// The socket is a TCP listener, a Unix listener or a UDP socket. Workers receive it if they
    /// request its address. The address of a Unix listener is its path, or its abstract name after
    /// a zero byte. A TCP listener on all addresses also matches requests that name only its port.
    /// The call makes the socket non-blocking.
    ///
    /// If another master opened the socket for port 0 and passed it under its
    /// [name](MasterListener::name), workers receive the socket if they request port 0.
    ///
    /// The scheduling policy cannot change after this call. With the sharded policy, workers share
    /// the socket, because the process that opened it may not have allowed other sockets on its
    /// port.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Descriptor`] if the descriptor is none of these sockets, and
    /// [`Error::Listen`] if the socket cannot be used, for instance because it has no address.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master, passed: Vec<cluster::systemd::ListenFd>) -> cluster::Result<()> {
    /// let mut sockets = Vec::new();
    /// for passed in passed {
    ///     sockets.push(master.adopt(passed)?);
    /// }
    /// # Ok(()) }
    /// ```
    pub fn adopt(&self, passed: ListenFd) -> Result<MasterListener> {
        self.event_loop.check_own()?;
        let kind = passed.kind()?;
        let name = passed.name().map(str::to_owned);
        let socket = OwnedFd::from(passed);
        let address = format!("descriptor {}", socket.as_raw_fd());
        match self.shell.adopt(kind, socket, name, BACKLOG) {
            Ok(retained) => Ok(MasterListener::new(&self.shell, retained)),
            Err(reason) => Err(Error::Listen {
                address,
                reason,
                occupied_by: None,
            }),
        }
    }

    /// Retains all listeners and UDP sockets that are open for workers, and returns them. The
    /// result includes sockets that were opened for a worker's request. It does not include
    /// descriptors that a worker has requested by number ([`ListenOptions::fd`]), because they
    /// belong to the application.
    ///
    /// Node has no counterpart.
    ///
    /// Use this method to pass all sockets to a new master, as
    /// [`Pool::upgrade`](crate::pool::Pool::upgrade) does.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> Result<(), Box<dyn std::error::Error>> {
    /// use std::os::fd::AsFd;
    /// use cluster::Settings;
    ///
    /// let sockets = master.retain_all();
    /// let mut passed = Vec::new();
    /// for socket in &sockets {
    ///     passed.push((socket.name(), socket.as_fd().try_clone_to_owned()?));
    /// }
    /// master.fork_as(Settings::default().detached(true).listen_fds(passed))?;
    /// # Ok(()) }
    /// ```
    #[must_use = "the sockets are released when the values are dropped"]
    pub fn retain_all(&self) -> Vec<MasterListener> {
        if self.event_loop.check_own().is_err() {
            return Vec::new();
        }
        let retained = self.shell.retain_all().into_iter();
        let listeners = retained.map(|retained| MasterListener::new(&self.shell, retained));
        listeners.collect()
    }

    /// Retains the socket that the request contains. Without one, retains the listener on the first
    /// usable address of those that the request resolves to, and opens the listener if necessary.
    fn open(&self, bind_request: &mut BindRequest) -> io::Result<RetainedListener> {
        bind_request.check_for_master()?;
        if let Some(socket) = bind_request.take_socket() {
            let backlog = bind_request.flags.backlog;
            let retained = self.shell.adopt(bind_request.kind, socket, None, backlog)?;
            let mut core = self.shell.core.borrow_mut();
            core.set_parking(retained.handle, bind_request.flags.parking);
            return Ok(retained);
        }
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for endpoint in bind_request.resolve()? {
            match self.shell.listen(&endpoint, &bind_request.flags) {
                Ok(retained) => return Ok(retained),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Disconnects all workers. When all workers have exited and all listeners except the retained
    /// ones are closed, the callbacks of [`on_all_disconnected`](Self::on_all_disconnected) are
    /// called.
    ///
    /// Node: `cluster.disconnect()`.
    ///
    /// The workers still serve connections that have been accepted. They also serve the kernel's
    /// backlog of every listener that is not retained. Serving them may take any time;
    /// [`disconnect_within`](Self::disconnect_within) sets a limit. If a worker is forked in the
    /// meantime, the disconnect also waits for that worker, but does not request it to disconnect.
    /// Therefore, an application that replaces exited workers stops doing so first, like the
    /// example of [`Master`]. Callbacks are never called inside this call.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.on_all_disconnected_once(|_| println!("all workers have exited"));
    /// master.disconnect();
    /// # }
    /// ```
    pub fn disconnect(&self) {
        self.shell.core_now().disconnect_all(true);
        self.shell.act();
    }

    /// Disconnects all workers, and kills those that have not exited when the time `deadline` has
    /// passed since the call.
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
    pub fn disconnect_within(&self, deadline: Duration) {
        self.shell.core_now().disconnect_all_within(deadline);
        self.shell.act();
    }

    /// Returns the numbers of accepted connections, by outcome.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let ledger = master.ledger();
    /// println!("{} accepted, {} in flight", ledger.accepted, ledger.in_flight());
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
    /// let loads = master.loads();
    /// for load in &loads.workers {
    ///     println!("worker {}: {} served, {} open", load.worker, load.received, load.open);
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

    /// Sets the maximum number of connections of which the master holds a copy: those that are
    /// [parked](crate::Connection::park), those that wait for data
    /// ([`ListenOptions::wait_for_data`](crate::ListenOptions::wait_for_data)), and those that were
    /// parked before and that a worker has. Each of them needs one descriptor in the master.
    ///
    /// Node has no counterpart.
    ///
    /// The default is half of the soft limit of descriptors (`RLIMIT_NOFILE`) at the time when the
    /// master was created. If a further connection exceeds the maximum, the idle connection that
    /// would expire first is closed, and [`Ledger::idle_closed`](crate::Ledger::idle_closed) counts
    /// it. If no connection is idle, the further one is closed. Connections beyond a lower maximum
    /// stay open.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// master.set_max_parked(10_000);
    /// # }
    /// ```
    pub fn set_max_parked(&self, connections: usize) {
        self.shell.core.borrow_mut().set_parked_limit(connections);
    }

    /// Sets a closure that chooses the worker for each connection that the master accepts. The
    /// closure replaces the round robin; it can choose by the client's address, for instance, or by
    /// the workers' loads.
    ///
    /// Node has no counterpart.
    ///
    /// The closure receives the client's address, which is `None` for a Unix socket, and the loads
    /// of the listening workers in the order of their ids. A connection waits for the chosen
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
        self.shell.core.borrow_mut().use_scheduler();
        let replaced = self.scheduler.replace(Some(Rc::new(RefCell::new(choose))));
        drop(replaced);
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
