//! What workers are made of, and who gets the connections.

use std::cell::Cell;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::str::FromStr;

use crate::sys::fd::LISTEN_FDS_START;
use crate::worker::Worker;

/// Carries the worker's process id from master to worker: the variables are for this process alone, and
/// not for programs that it starts.
pub(crate) const WORKER_PID: &str = "CLUSTER_WORKER_PID";
/// Carries the worker's id from master to worker.
pub(crate) const UNIQUE_ID: &str = "CLUSTER_UNIQUE_ID";
/// Carries the number of the channel's descriptor from master to worker.
pub(crate) const CHANNEL_FD: &str = "CLUSTER_CHANNEL_FD";
/// Carries the inspect port, if there is one, from master to worker.
pub(crate) const INSPECT_PORT: &str = "CLUSTER_INSPECT_PORT";
/// The variables that a master sets for one worker.
pub(crate) const TO_WORKER: [&str; 4] = [WORKER_PID, UNIQUE_ID, CHANNEL_FD, INSPECT_PORT];
/// Set by a master whose program a wrapper has forked, for the programs that it starts in turn.
pub(crate) const WRAPPED: &str = "CLUSTER_WRAPPED";
/// Makes the master write down on standard error what happens, if it is `1`.
pub(crate) const DEBUG: &str = "CLUSTER_DEBUG";
/// The first port that everybody may have.
const FIRST_FREE_PORT: u16 = 1024;
/// Chooses the scheduling policy from outside.
pub(crate) const SCHED_POLICY: &str = "CLUSTER_SCHED_POLICY";

/// Who accepts connections.
///
/// Node: `cluster.SCHED_RR` and `cluster.SCHED_NONE`. The default is round robin. The program
/// chooses with [`Master::set_scheduling_policy`](crate::Master::set_scheduling_policy), its user
/// with the environment variable `CLUSTER_SCHED_POLICY`, whose values `rr`, `none` and `sharded` are
/// what [`FromStr`] reads.
///
/// ```
/// use cluster::SchedulingPolicy;
///
/// assert_eq!("none".parse(), Ok(SchedulingPolicy::Shared));
/// assert_eq!(SchedulingPolicy::default().to_string(), "rr");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SchedulingPolicy {
    /// The master accepts and hands each connection to the next worker that can take one.
    ///
    /// Node: `SCHED_RR`.
    #[default]
    RoundRobin,
    /// The master binds, and the workers accept from the shared listener themselves.
    ///
    /// Node: `SCHED_NONE`.
    Shared,
    /// Each worker has a listener of its own on the same port (`SO_REUSEPORT`), and the system
    /// chooses by lot. The master keeps a copy, so that a worker that takes the place of a dead one
    /// finds the clients of that one waiting. What is no TCP port is shared, and outside Linux all is.
    ///
    /// Node has no counterpart in a cluster; `reusePort` in a server is the same without a master.
    Sharded,
}

impl std::fmt::Display for SchedulingPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::RoundRobin => "rr",
            Self::Shared => "none",
            Self::Sharded => "sharded",
        })
    }
}

/// A name of a scheduling policy that is none of `rr`, `none` and `sharded`.
///
/// It says what was read and what is valid; see [`SchedulingPolicy`] for an example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownPolicy(String);

impl std::fmt::Display for UnknownPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "unknown scheduling policy {:?}: valid are \"rr\", \"none\" and \"sharded\"",
            self.0
        )
    }
}

impl std::error::Error for UnknownPolicy {}

impl FromStr for SchedulingPolicy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        match name {
            "rr" => Ok(Self::RoundRobin),
            "none" => Ok(Self::Shared),
            "sharded" => Ok(Self::Sharded),
            _ => Err(UnknownPolicy(name.to_owned())),
        }
    }
}

/// What [`Master::fork`](crate::Master::fork) starts.
///
/// Node: `cluster.settings`. A value of this type is also the argument of
/// [`Master::setup_master`](crate::Master::setup_master), where a field left `None` keeps what was
/// set before.
///
/// ```
/// use cluster::Settings;
///
/// let https = Settings::default().exec("./worker").args(["--use", "https"]);
/// assert_eq!(https.exec.as_deref(), Some("./worker".as_ref()));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// The program of the workers: a path, absolute or relative to the master's directory, without
    /// a search in `PATH`. The default is the master's own program.
    ///
    /// Node: `settings.exec`.
    pub exec: Option<PathBuf>,
    /// Arguments that come before [`args`](Self::args): what the program needs, whatever the
    /// worker is to do. The default is none.
    ///
    /// Node: `settings.execArgv`.
    pub exec_args: Option<Vec<OsString>>,
    /// The arguments after the program's name. The default is the master's own arguments.
    ///
    /// Node: `settings.args`.
    pub args: Option<Vec<OsString>>,
    /// The directory in which workers start. Without it they start in the master's.
    ///
    /// Node: `settings.cwd`.
    pub cwd: Option<PathBuf>,
    /// Whether a worker's standard input, output and error are pipes to the master
    /// ([`Process::take_stdio`](crate::Process::take_stdio)) instead of the master's own. The
    /// default is `false`.
    ///
    /// Node: `settings.silent`.
    pub silent: Option<bool>,
    /// What a worker's descriptors 0, 1, 2 and so on are, instead of what
    /// [`silent`](Self::silent) says. Those of the first three that are not mentioned are the
    /// master's. There is no entry for the channel, which has a number beyond.
    ///
    /// Node: `settings.stdio`.
    pub stdio: Option<Vec<Stdio>>,
    /// What a worker's descriptors 3, 4 and so on are, each with a name, as systemd passes them to a
    /// service. The worker finds `LISTEN_FDS`, `LISTEN_FDNAMES` and `LISTEN_PID` in its environment. The
    /// default is none, and so is an empty list. See [`listen_fds`](Self::listen_fds()).
    ///
    /// Node has no counterpart.
    pub listen_fds: Option<Vec<(String, Stdio)>>,
    /// Whether the process is not a worker but a program that outlives the master, such as its successor.
    /// The default is `false`. See [`detached`](Self::detached()).
    ///
    /// Node: `options.detached` of `child_process`.
    pub detached: Option<bool>,
    /// Whether the process leads a session and a process group of its own, by `setsid(2)`, without a
    /// controlling terminal. The default is `true` for a [`detached`](Self::detached) process and
    /// `false` for a worker. See [`setsid`](Self::setsid()).
    ///
    /// Node: a part of `options.detached` of `child_process`.
    pub setsid: Option<bool>,
    /// The user that workers run as, and give up all other groups for. The master must be allowed
    /// to do this (be root, say), or `fork` fails.
    ///
    /// Node: `settings.uid`.
    pub uid: Option<u32>,
    /// The group that workers run as, and give up all other groups for. The master must be allowed
    /// to do this (be root, say), or `fork` fails.
    ///
    /// Node: `settings.gid`.
    pub gid: Option<u32>,
    /// A port for each worker, for whatever looks into it: a debugger, or a page of its metrics. The
    /// worker learns it from [`Worker::inspect_port`](crate::Worker::inspect_port).
    ///
    /// Node: `settings.inspectPort`.
    pub inspect_port: Option<InspectPort>,
    /// What workers run instead of executing a program; see [`main`](Self::main()). The default is
    /// that they execute one.
    ///
    /// Node has no counterpart.
    pub main: Option<WorkerMain>,
}

impl Settings {
    /// Sets [`exec`](Self::exec), the program of the workers. They execute it, also if
    /// [`main`](Self::main) was set before.
    ///
    /// Node: `settings.exec`. See [`Settings`] for an example.
    #[must_use]
    pub fn exec(mut self, program: impl Into<PathBuf>) -> Self {
        self.exec = Some(program.into());
        self.main = None;
        self
    }

    /// Sets [`exec_args`](Self::exec_args), the arguments before [`args`](Self::args).
    ///
    /// Node: `settings.execArgv`.
    ///
    /// ```
    /// use cluster::Settings;
    ///
    /// let worker = Settings::default().exec("/usr/bin/python3").exec_args(["-u", "worker.py"]);
    /// let https = worker.args(["--use", "https"]);
    /// # let _ = https;
    /// ```
    #[must_use]
    pub fn exec_args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.exec_args = Some(args.into_iter().map(Into::into).collect());
        self
    }

    /// Sets [`args`](Self::args), the arguments of the workers.
    ///
    /// Node: `settings.args`. See [`Settings`] for an example.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args = Some(args.into_iter().map(Into::into).collect());
        self
    }

    /// Sets [`cwd`](Self::cwd), the directory of the workers.
    ///
    /// Node: `settings.cwd`.
    ///
    /// ```
    /// let settings = cluster::Settings::default().cwd("/var/empty");
    /// # let _ = settings;
    /// ```
    #[must_use]
    pub fn cwd(mut self, directory: impl Into<PathBuf>) -> Self {
        self.cwd = Some(directory.into());
        self
    }

    /// Sets [`silent`](Self::silent), whether the master gets the workers' output.
    ///
    /// Node: `settings.silent`. See [`Process::take_stdio`](crate::Process::take_stdio) for an
    /// example.
    #[must_use]
    pub fn silent(mut self, silent: bool) -> Self {
        self.silent = Some(silent);
        self
    }

    /// Sets [`stdio`](Self::stdio), what the workers' descriptors are.
    ///
    /// Node: `settings.stdio`. See [`Stdio`] for an example.
    #[must_use]
    pub fn stdio(mut self, stdio: impl IntoIterator<Item = Stdio>) -> Self {
        self.stdio = Some(stdio.into_iter().collect());
        self
    }

    /// Sets [`listen_fds`](Self::listen_fds), the descriptors that workers are passed in systemd's way,
    /// with their names.
    ///
    /// Node has no counterpart. Any program that systemd can start by its sockets can so be a worker: it
    /// needs to know nothing of this crate. One that does not has the events `fork`, `disconnect` and
    /// `exit` alone, and does not hear that it is to leave: it is told by a signal
    /// ([`Process::kill`](crate::Process::kill)), or killed by the deadline of `disconnect_within`. A
    /// worker that does know this crate takes them by
    /// [`systemd::listen_fds`](crate::systemd::listen_fds), before it calls [`init`](crate::init).
    ///
    /// All workers share the descriptors, and accept from a listener by themselves. If one of them
    /// sets it not to block, so it is for all, and for the master.
    ///
    /// `fork` fails if [`stdio`](Self::stdio) has more than three entries, because descriptor 3 cannot
    /// be two things, or if a name is not 1 to 255 characters of printable ASCII without a colon.
    ///
    /// ```
    /// use std::net::TcpListener;
    /// use cluster::Settings;
    ///
    /// # fn f() -> std::io::Result<()> {
    /// let listener = TcpListener::bind("127.0.0.1:8000")?;
    /// let settings = Settings::default().exec("/usr/bin/gunicorn").args(["app"]);
    /// let settings = settings.listen_fds([("web", listener)]);
    /// # let _ = settings;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn listen_fds<N: Into<String>, D: Into<OwnedFd>>(
        mut self,
        descriptors: impl IntoIterator<Item = (N, D)>,
    ) -> Self {
        let descriptors = descriptors.into_iter();
        let passed = descriptors.map(|(name, fd)| (name.into(), Stdio::fd(fd)));
        self.listen_fds = Some(passed.collect());
        self
    }

    /// Sets [`detached`](Self::detached), whether the process outlives the master.
    ///
    /// Node: `options.detached` of `child_process`. A detached process is not a worker:
    ///
    /// - It has no channel, and `init` does not find a worker in it. It is not in
    ///   [`Master::workers`](crate::Master::workers), and the cluster's callbacks are not called for
    ///   it, save for `error`.
    /// - Nothing waits for it: [`Master::run`](crate::Master::run) returns, and
    ///   [`Master::disconnect`](crate::Master::disconnect) calls back, while it runs. Node's parent
    ///   waits for it until `unref`; here [`Process::ref_`](crate::Process::ref_) makes `run` wait.
    /// - Nothing ends it but [`Process::kill`](crate::Process::kill) and
    ///   [`WorkerProcess::kill`](crate::WorkerProcess::kill), which signal it at once. A deadline of
    ///   `disconnect_within`, a pool that stops, and the end of the master do not.
    ///   [`WorkerProcess::disconnect`](crate::WorkerProcess::disconnect) does nothing.
    /// - It leads a session of its own, unless [`setsid`](Self::setsid()) says otherwise. A signal to
    ///   the master's process group, and the SIGHUP of its terminal, do not reach it.
    ///
    /// What `fork` returns is its handle, with a number that no worker has and the state
    /// [`Disconnected`](crate::WorkerState::Disconnected). While the loop runs, the exit of the process
    /// is processed: its own callbacks of [`on_exit`](crate::WorkerProcess::on_exit) are called, and it
    /// leaves no zombie. `fork` fails together with [`main`](Self::main).
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::Settings;
    ///
    /// let settings = Settings::default().exec("./server-2").detached(true);
    /// let successor = master.fork_as(settings, [("BEFORE", std::process::id().to_string())])?;
    /// successor.on_exit(|_, _, status| eprintln!("the new server has ended: {status}"));
    /// master.disconnect(|_| println!("the new server is alone now"));
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn detached(mut self, detached: bool) -> Self {
        self.detached = Some(detached);
        self
    }

    /// Sets [`setsid`](Self::setsid), whether the process leads a session of its own.
    ///
    /// Node: a part of `options.detached` of `child_process`. A [`detached`](Self::detached())
    /// process that stays in the master's session and process group still gets the signals that a
    /// terminal (Ctrl-C) or a supervisor sends to the whole group.
    /// [`Pool::upgrade`](crate::pool::Pool::upgrade) starts the new master so.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::Settings;
    ///
    /// let settings = Settings::default().exec("./server-2").detached(true).setsid(false);
    /// master.fork_as(settings, [("BEFORE", std::process::id().to_string())])?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn setsid(mut self, setsid: bool) -> Self {
        self.setsid = Some(setsid);
        self
    }

    /// Sets [`uid`](Self::uid), the user that workers run as.
    ///
    /// Node: `settings.uid`. A worker has no supplementary groups then, and unless the user is root (0) no
    /// capabilities, whatever the master has: the permitted, effective, inheritable and ambient sets are
    /// empty before the program or [`main`](Self::main()) begins. The bounding set, the securebits and
    /// `no_new_privs` stay as they are (capabilities(7)). `fork` waits for such a worker for one second
    /// at most.
    ///
    /// ```
    /// // The group first: `nobody` could not change it any more.
    /// let settings = cluster::Settings::default().gid(65534).uid(65534);
    /// # let _ = settings;
    /// ```
    #[must_use]
    pub fn uid(mut self, uid: u32) -> Self {
        self.uid = Some(uid);
        self
    }

    /// Sets [`gid`](Self::gid), the group that workers run as.
    ///
    /// Node: `settings.gid`. See [`uid`](Self::uid()) for an example. A worker has no supplementary groups
    /// then; without `uid` it keeps the master's user, and its capabilities.
    #[must_use]
    pub fn gid(mut self, gid: u32) -> Self {
        self.gid = Some(gid);
        self
    }

    /// Sets [`inspect_port`](Self::inspect_port), a number or a closure.
    ///
    /// Node: `settings.inspectPort`. See [`InspectPort`] for an example.
    #[must_use]
    pub fn inspect_port(mut self, port: impl Into<InspectPort>) -> Self {
        self.inspect_port = Some(port.into());
        self
    }

    /// Sets [`main`](Self::main): workers execute nothing. They go on in a copy of the master's
    /// memory, of which only what changes takes room of its own, and run `main`; what it returns is
    /// their exit code, or 101 if it panics.
    ///
    /// Node has no counterpart. The closure gets the [`Worker`] as [`init`](crate::init) gives it to
    /// a program, and `is_worker` is true; a call of `init` there is an error. All the other settings
    /// apply but [`exec_args`](Self::exec_args) and [`args`](Self::args): the arguments are the
    /// master's. It lasts until [`exec`](Self::exec()) is set once more; if both are set at once,
    /// `main` counts.
    ///
    /// *Descriptors.* What the master has opened for itself is closed there, and so is what it
    /// [`watch`](crate::Master::watch)es: a closure that needs such a descriptor has a copy of its own
    /// (`try_clone`). If the application may have another handle of it, the number stays taken by a socket
    /// that is not connected: the handle can be dropped, and reaches nothing else. What the program has open otherwise stays open, unless
    /// [`stdio`](Self::stdio()) puts something else in its place.
    ///
    /// *Output.* What the master has written to [`std::io::stdout`], and what is still in its buffer, is
    /// written out before each fork, and so it is printed once. Other buffers, such as a
    /// [`BufWriter`](std::io::BufWriter) of the program's, are copied with what is in them.
    ///
    /// *Memory.* Whatever was drawn once is the same in all workers, for instance the seed of random
    /// numbers. Nothing is dropped when the closure returns but what it owns: the worker exits then, by
    /// [`std::process::exit`]. The master and its workers, should the closure have them, are useless
    /// there: what they do is [`Error::ForeignProcess`](crate::Error::ForeignProcess) or nothing. To fork takes longer the more memory the master
    /// has, and a worker of another [`uid`](Self::uid) still has a copy of all secrets in it.
    ///
    /// *Threads.* The master must have one thread: a worker has only a copy of the one that forked, and a
    /// lock that another thread held at this moment, in the allocator say, is held there for ever. With
    /// more threads, `fork` is an [`Error::Fork`](crate::Error::Fork) whose source is of the kind
    /// [`Deadlock`](std::io::ErrorKind::Deadlock), and nothing has happened. Threads that have been joined
    /// do not count. Outside Linux, and in a sandbox that refuses unshare(2) and has no `/proc`, the
    /// number of threads is not known, and `fork` goes on.
    ///
    /// *Signals* have their default effect, except that SIGPIPE stays ignored where the master ignores
    /// it, as Rust programs do.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::{Settings, Worker};
    ///
    /// let dictionary = std::fs::read_to_string("/usr/share/dict/words").unwrap_or_default();
    /// let serve = move |worker: Worker| {
    ///     println!("worker {} knows {} words", worker.id(), dictionary.lines().count());
    ///     0
    /// };
    /// master.setup_master(Settings::default().main(serve));
    /// master.fork()?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn main(mut self, main: impl Fn(Worker) -> i32 + 'static) -> Self {
        self.main = Some(WorkerMain::new(main));
        self
    }

    /// Gives what is not set its default.
    pub(crate) fn complete(mut self) -> Self {
        self.exec.get_or_insert_with(|| {
            // Without /proc the program's name has to do.
            let name = || std::env::args_os().next().map(PathBuf::from);
            std::env::current_exe()
                .ok()
                .or_else(name)
                .unwrap_or_default()
        });
        let own_args = || std::env::args_os().skip(1).collect();
        self.args.get_or_insert_with(own_args);
        self.exec_args.get_or_insert_with(Vec::new);
        self.silent.get_or_insert(false);
        self
    }

    /// Takes over what `later` sets and keeps the rest.
    pub(crate) fn update(&mut self, later: Self) {
        fn set<T>(value: &mut Option<T>, later: Option<T>) {
            if later.is_some() {
                *value = later;
            }
        }
        if later.exec.is_some() || later.main.is_some() {
            self.main = later.main;
        }
        set(&mut self.exec, later.exec);
        set(&mut self.exec_args, later.exec_args);
        set(&mut self.args, later.args);
        set(&mut self.cwd, later.cwd);
        set(&mut self.silent, later.silent);
        set(&mut self.stdio, later.stdio);
        set(&mut self.listen_fds, later.listen_fds);
        set(&mut self.detached, later.detached);
        set(&mut self.setsid, later.setsid);
        set(&mut self.uid, later.uid);
        set(&mut self.gid, later.gid);
        set(&mut self.inspect_port, later.inspect_port);
    }

    /// The descriptors that [`stdio`](Self::stdio) has copies made of.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        let stdio = self.stdio.iter().flatten();
        stdio.filter_map(|stdio| match &stdio.0 {
            StdioKind::Fd(fd) => Some(fd.as_raw_fd()),
            StdioKind::Inherit | StdioKind::Null | StdioKind::Pipe => None,
        })
    }

    /// What `stdio` and `silent` come to, and `listen_fds` behind it.
    ///
    /// # Errors
    ///
    /// Two of them want the same number.
    pub(crate) fn effective_stdio(&self) -> io::Result<Vec<Stdio>> {
        let mut stdio = match (&self.stdio, self.silent) {
            (Some(stdio), _) => stdio.clone(),
            (None, Some(true)) => vec![Stdio::pipe(); 3],
            (None, _) => Vec::new(),
        };
        let passed = self.passed_fds();
        if !passed.is_empty() {
            if stdio.len() > LISTEN_FDS_START {
                let reason = "descriptor 3 is in stdio and in listen_fds";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
            }
            stdio.resize(LISTEN_FDS_START, Stdio::inherit());
            stdio.extend(passed.iter().map(|(_, fd)| fd.clone()));
        }
        Ok(stdio)
    }

    pub(crate) fn is_detached(&self) -> bool {
        self.detached == Some(true)
    }

    pub(crate) fn leads_session(&self) -> bool {
        self.setsid.unwrap_or(self.is_detached())
    }

    pub(crate) fn passed_fds(&self) -> &[(String, Stdio)] {
        self.listen_fds.as_deref().unwrap_or_default()
    }
}

/// What one of a worker's descriptors is, for [`Settings::stdio`].
///
/// Node: an entry of `settings.stdio`.
///
/// ```
/// use cluster::{Settings, Stdio};
///
/// # fn f() -> std::io::Result<()> {
/// let log = std::fs::File::create("worker.log")?;
/// let stdio = [Stdio::null(), Stdio::fd(log), Stdio::inherit(), Stdio::pipe()];
/// let settings = Settings::default().stdio(stdio);
/// # let _ = settings;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Stdio(pub(crate) StdioKind);

#[derive(Clone, Debug)]
pub(crate) enum StdioKind {
    Inherit,
    Null,
    Pipe,
    Fd(Rc<OwnedFd>),
}

impl Stdio {
    /// The master's descriptor of the same number.
    ///
    /// Node: `'inherit'`. See [`Stdio`] for an example.
    #[must_use]
    pub fn inherit() -> Self {
        Self(StdioKind::Inherit)
    }

    /// `/dev/null`.
    ///
    /// Node: `'ignore'`. See [`Stdio`] for an example.
    #[must_use]
    pub fn null() -> Self {
        Self(StdioKind::Null)
    }

    /// One end of a stream of which the master has the other one,
    /// [`Process::take_stdio`](crate::Process::take_stdio). Both can be read and written. It is a
    /// socket, which a program has open but cannot open by a name such as `/dev/stdout`.
    ///
    /// Node: `'pipe'`. See [`Stdio`] for an example.
    #[must_use]
    pub fn pipe() -> Self {
        Self(StdioKind::Pipe)
    }

    /// A descriptor of the master's, which every worker gets a copy of.
    ///
    /// Node: a number, or a stream. See [`Stdio`] for an example.
    #[must_use]
    pub fn fd(descriptor: impl Into<OwnedFd>) -> Self {
        Self(StdioKind::Fd(Rc::new(descriptor.into())))
    }
}

impl PartialEq for Stdio {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (StdioKind::Fd(a), StdioKind::Fd(b)) => Rc::ptr_eq(a, b),
            (a, b) => std::mem::discriminant(a) == std::mem::discriminant(b),
        }
    }
}

impl Eq for Stdio {}

/// Where workers get their [`inspect_port`](Settings::inspect_port) from: a number, which the first
/// worker gets, the next worker the next one, and so on (after 65535 comes 1024); or a closure that
/// is asked at each fork.
///
/// Node: the two forms of `settings.inspectPort`.
///
/// ```
/// use cluster::{InspectPort, Settings};
///
/// let counted = Settings::default().inspect_port(9229);
/// let chosen = Settings::default().inspect_port(InspectPort::new(|| 9000 + rand() % 100));
/// # fn rand() -> u16 { 4 }
/// # assert_ne!(counted, chosen);
/// ```
#[derive(Clone)]
pub struct InspectPort(Rc<dyn Fn() -> u16>);

impl InspectPort {
    /// Asks `port` at each fork.
    ///
    /// Node: a function as `settings.inspectPort`. See [`InspectPort`] for an example.
    pub fn new(port: impl Fn() -> u16 + 'static) -> Self {
        Self(Rc::new(port))
    }

    pub(crate) fn next(&self) -> u16 {
        (self.0)()
    }
}

impl From<u16> for InspectPort {
    fn from(first: u16) -> Self {
        let next = Cell::new(first);
        Self::new(move || {
            let port = next.get();
            next.set(port.checked_add(1).unwrap_or(FIRST_FREE_PORT));
            port
        })
    }
}

impl std::fmt::Debug for InspectPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InspectPort").finish_non_exhaustive()
    }
}

/// Equal to its clones alone.
impl PartialEq for InspectPort {
    fn eq(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for InspectPort {}

/// What a worker runs that executes no program, for [`Settings::main`].
///
/// Node has no counterpart.
///
/// ```
/// use cluster::{Settings, WorkerMain};
///
/// let mut settings = Settings::default();
/// settings.main = Some(WorkerMain::new(|worker| i32::from(worker.inspect_port().is_none())));
/// ```
#[derive(Clone)]
pub struct WorkerMain(Rc<dyn Fn(Worker) -> i32>);

impl WorkerMain {
    /// Runs `main` in each worker; it returns the exit code. See [`Settings::main`](Settings::main())
    /// for what it finds there.
    ///
    /// Node has no counterpart. See [`WorkerMain`] for an example.
    pub fn new(main: impl Fn(Worker) -> i32 + 'static) -> Self {
        Self(Rc::new(main))
    }

    pub(crate) fn run(&self, worker: Worker) -> i32 {
        (self.0)(worker)
    }
}

impl std::fmt::Debug for WorkerMain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerMain").finish_non_exhaustive()
    }
}

/// Equal to its clones alone.
impl PartialEq for WorkerMain {
    fn eq(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for WorkerMain {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_last_is_started() {
        let mut settings = Settings::default();
        let starts_main = |settings: &Settings| settings.main.is_some();
        settings.update(Settings::default().main(|_| 0));
        settings.update(Settings::default().cwd("/"));
        assert!(starts_main(&settings));
        settings.update(Settings::default().exec("a"));
        assert!(!starts_main(&settings));
        settings.update(Settings::default().exec("b").main(|_| 0));
        assert!(starts_main(&settings));
        settings.update(Settings::default().main(|_| 0).exec("c"));
        assert!(!starts_main(&settings));
    }

    #[test]
    fn settings_accumulate() {
        let mut settings = Settings::default();
        settings.update(Settings::default().exec("a").args(["1"]));
        settings.update(Settings::default());
        settings.update(Settings::default().exec("b").exec_args(["0"]).cwd("/"));
        settings.update(Settings::default().silent(true).uid(1).gid(2));
        let all = Settings::default().exec("b").args(["1"]).exec_args(["0"]);
        assert_eq!(settings, all.cwd("/").silent(true).uid(1).gid(2));
    }

    #[test]
    fn stdio_comes_before_silent() {
        let silent = Settings::default().silent(true);
        assert_eq!(silent.effective_stdio().unwrap(), vec![Stdio::pipe(); 3]);
        let both = silent.stdio([Stdio::null()]);
        assert_eq!(both.effective_stdio().unwrap(), [Stdio::null()]);
        assert_eq!(Settings::default().effective_stdio().unwrap(), []);
    }

    #[test]
    fn passed_descriptors_come_behind_the_first_three() {
        let null = || std::fs::File::open("/dev/null").unwrap();
        let passed = Settings::default().listen_fds([("a", null()), ("b", null())]);
        let [(_, a), (_, b)] = passed.passed_fds() else {
            panic!("{passed:?}");
        };
        let (a, b, inherit) = (a.clone(), b.clone(), Stdio::inherit());
        let expected = [
            Stdio::null(),
            inherit.clone(),
            inherit.clone(),
            a.clone(),
            b,
        ];
        let stdio = passed.clone().stdio([Stdio::null()]).effective_stdio();
        assert_eq!(stdio.unwrap(), expected);
        let three = vec![inherit; 3];
        passed
            .clone()
            .stdio(three.clone())
            .effective_stdio()
            .unwrap();
        let both = passed.stdio(three.into_iter().chain([a]));
        both.effective_stdio().unwrap_err();
    }

    #[test]
    fn every_worker_has_its_own_inspect_port() {
        let ports = InspectPort::from(65534);
        let ports: Vec<_> = std::iter::repeat_with(|| ports.next()).take(4).collect();
        assert_eq!(ports, [65534, 65535, 1024, 1025]);
    }

    #[test]
    fn policy_names() {
        for policy in [SchedulingPolicy::RoundRobin, SchedulingPolicy::Shared] {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        let error = "RR".parse::<SchedulingPolicy>().unwrap_err().to_string();
        assert!(error.contains("\"RR\"") && error.contains("\"rr\"") && error.contains("\"none\""));
    }
}
