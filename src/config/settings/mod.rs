//! The settings of the processes that `fork` starts.

mod update;

pub use update::Setting;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::config::inspect_port::InspectPort;
use crate::config::settings::update::Choice;
use crate::config::stdio::Stdio;
use crate::worker::Worker;
use crate::worker::worker_main::WorkerMain;

/// The settings of the processes that [`Master::fork`](crate::Master::fork) starts.
///
/// Node: `cluster.settings`.
///
/// The argument of [`Master::setup_master`](crate::Master::setup_master) also has this type.
/// `setup_master` keeps the earlier value of each setting that its argument does not mention. For a
/// setting that the argument has [`unset`](Self::unset), `setup_master` restores the default.
///
/// Each setting has a method that sets its value. Each setting except [`main`](Self::main) also has
/// a getter, whose name begins with `get_`. A getter returns `None` if the setting has no value.
/// [`Master::settings`](crate::Master::settings) returns settings with the defaults filled in.
///
/// This type is not `Send`, because settings may contain closures. Build them on the master's
/// thread.
///
/// ```
/// use cluster::Settings;
///
/// let https = Settings::default().exec("./worker").args(["--use", "https"]);
/// assert_eq!(https.get_exec(), Some("./worker".as_ref()));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    exec: Choice<PathBuf>,
    exec_args: Choice<Vec<OsString>>,
    args: Choice<Vec<OsString>>,
    cwd: Choice<PathBuf>,
    silent: Choice<bool>,
    stdio: Choice<Vec<Stdio>>,
    listen_fds: Choice<Vec<(String, Stdio)>>,
    detached: Choice<bool>,
    setsid: Choice<bool>,
    uid: Choice<u32>,
    gid: Choice<u32>,
    inspect_port: Choice<InspectPort>,
    main: Choice<WorkerMain>,
}

impl Settings {
    /// Sets the path of the workers' program. A relative path starts at the master's working
    /// directory.
    ///
    /// `PATH` is not searched. The path is resolved each time a worker starts. This method cancels
    /// an earlier [`main`](Self::main).
    ///
    /// The default is the path with which the master itself was started. [`init`](crate::init())
    /// makes this path absolute, but does not resolve its symbolic links. If a link is changed to a
    /// new release, or the file at the path is replaced, workers that start later run the new
    /// program. If the master's program has no path, `fork` fails unless `exec` or `main` is set.
    ///
    /// Node: `settings.exec`.
    ///
    /// See [`Settings`] for an example.
    #[must_use]
    pub fn exec(mut self, program: impl Into<PathBuf>) -> Self {
        self.exec = Choice::Value(program.into());
        self.main = Choice::Unmentioned;
        self
    }

    /// Returns the program that [`exec`](Self::exec) sets.
    ///
    /// Node: `settings.exec`.
    ///
    /// See [`Settings`] for an example.
    #[must_use]
    pub fn get_exec(&self) -> Option<&Path> {
        self.exec.get().map(PathBuf::as_path)
    }

    /// Sets arguments that precede [`args`](Self::args) on the command line, for example options
    /// that the program always needs. The default is no arguments.
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
    #[doc(alias = "execArgv")]
    #[must_use]
    pub fn exec_args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.exec_args = Choice::Value(args.into_iter().map(Into::into).collect());
        self
    }

    /// Returns the arguments that [`exec_args`](Self::exec_args) sets.
    ///
    /// Node: `settings.execArgv`.
    ///
    /// See [`Settings`] for an example of a getter.
    #[must_use]
    pub fn get_exec_args(&self) -> Option<&[OsString]> {
        self.exec_args.get().map(Vec::as_slice)
    }

    /// Sets the workers' arguments, without the program's name. The default is the master's own
    /// arguments.
    ///
    /// Node: `settings.args`.
    ///
    /// See [`Settings`] for an example.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args = Choice::Value(args.into_iter().map(Into::into).collect());
        self
    }

    /// Returns the arguments that [`args`](Self::args) sets.
    ///
    /// Node: `settings.args`.
    ///
    /// See [`Settings`] for an example of a getter.
    #[must_use]
    pub fn get_args(&self) -> Option<&[OsString]> {
        self.args.get().map(Vec::as_slice)
    }

    /// Sets the workers' working directory. The default is the master's working directory.
    ///
    /// Node: `settings.cwd`.
    ///
    /// ```
    /// let settings = cluster::Settings::default().cwd("/var/empty");
    /// # let _ = settings;
    /// ```
    #[must_use]
    pub fn cwd(mut self, directory: impl Into<PathBuf>) -> Self {
        self.cwd = Choice::Value(directory.into());
        self
    }

    /// Returns the directory that [`cwd`](Self::cwd) sets.
    ///
    /// Node: `settings.cwd`.
    ///
    /// See [`Settings`] for an example of a getter.
    #[must_use]
    pub fn get_cwd(&self) -> Option<&Path> {
        self.cwd.get().map(PathBuf::as_path)
    }

    /// Sets whether a worker's standard input, output and error are pipes to the master instead of
    /// the master's own. The default is `false`.
    ///
    /// Node: `settings.silent`.
    ///
    /// See [`Process::take_stdio`](crate::Process::take_stdio) for an example.
    #[must_use]
    pub fn silent(mut self, silent: bool) -> Self {
        self.silent = Choice::Value(silent);
        self
    }

    /// Returns the value of [`silent`](Self::silent).
    ///
    /// Node: `settings.silent`.
    ///
    /// See [`Settings`] for an example of a getter.
    #[must_use]
    pub fn get_silent(&self) -> Option<bool> {
        self.silent.get().copied()
    }

    /// Sets a worker's descriptors 0, 1, 2 and so on. This setting overrides
    /// [`silent`](Self::silent).
    ///
    /// If the list has fewer than three entries, the worker inherits the rest of descriptors 0 to 2
    /// from the master. The list has no entry for the channel. The channel's descriptor number is
    /// higher than those in the list.
    ///
    /// Node: `settings.stdio`.
    ///
    /// See [`Stdio`] for an example.
    #[must_use]
    pub fn stdio(mut self, stdio: impl IntoIterator<Item = Stdio>) -> Self {
        self.stdio = Choice::Value(stdio.into_iter().collect());
        self
    }

    /// Returns the list that [`stdio`](Self::stdio) sets.
    ///
    /// Node: `settings.stdio`.
    ///
    /// See [`Settings`] for an example of a getter.
    #[must_use]
    pub fn get_stdio(&self) -> Option<&[Stdio]> {
        self.stdio.get().map(Vec::as_slice)
    }

    /// Sets the descriptors to pass to workers by systemd's protocol, as numbers 3, 4 and so on.
    /// Each descriptor has a name. By default, or with an empty list, no descriptors are passed.
    ///
    /// Node has no counterpart.
    ///
    /// The worker's environment contains `LISTEN_FDS`, `LISTEN_FDNAMES` and `LISTEN_PID`. Any
    /// program that supports systemd's socket activation can therefore be a worker, even if it does
    /// not use this crate. A worker without this crate causes only the events `fork`, `disconnect`
    /// and `exit`, and cannot receive a disconnect request. To end the worker, send a signal with
    /// [`Process::kill`](crate::Process::kill), or call `disconnect_within`, which kills the worker
    /// at its deadline.
    ///
    /// The worker leads its own process group, because its program may start other processes. The
    /// group ends with the worker:
    ///
    /// - When the worker's process has exited, the master kills the rest of the group.
    /// - If the master had already sent SIGTERM, SIGINT or SIGQUIT to the worker, the master sends
    ///   the same signal to the rest of the group instead. The worker's `exit` event then waits
    ///   until the whole group has exited. The master checks `/proc` for processes of the group
    ///   every 100 ms. Without `/proc`, the event waits for the processes that still have the
    ///   channel. On Linux before 5.3, the master kills the rest of the group.
    /// - If the master sends SIGKILL to the worker, for example at a deadline, the signal kills the
    ///   whole group.
    ///
    /// A terminal's Ctrl-C therefore reaches the master, but not the worker. If the master itself
    /// is killed, only the worker's process ends with it, and the rest of the group continues.
    ///
    /// A worker that uses this crate takes the descriptors with
    /// [`systemd::listen_fds`](crate::systemd::listen_fds) before it calls [`init`](crate::init()).
    ///
    /// All workers share the descriptors. If a worker makes a descriptor non-blocking, the
    /// descriptor becomes non-blocking for all workers and for the master. Workers accept
    /// connections from a passed listener themselves, so the scheduling policy has no effect on the
    /// listener. If the user or the application has selected a policy other than
    /// [`SchedulingPolicy::Shared`](crate::SchedulingPolicy::Shared), the master emits one `error`
    /// event with [`Error::PolicyIgnored`](crate::Error::PolicyIgnored).
    ///
    /// `fork` fails if [`stdio`](Self::stdio) has more than three entries, because both settings
    /// would then define descriptor 3. `fork` also fails unless each name consists of 1 to 255
    /// printable ASCII characters other than a colon.
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
        self.listen_fds = Choice::Value(passed.collect());
        self
    }

    /// Returns the names and descriptors that [`listen_fds`](Self::listen_fds) sets.
    ///
    /// Node has no counterpart.
    ///
    /// See [`Settings`] for an example of a getter.
    #[must_use]
    pub fn get_listen_fds(&self) -> Option<&[(String, Stdio)]> {
        self.listen_fds.get().map(Vec::as_slice)
    }

    /// Sets whether the process is detached. A detached process is not a worker but a program that
    /// may outlive the master, such as a new master. The default is `false`.
    ///
    /// Node: `options.detached` of `child_process`.
    ///
    /// A detached process differs from a worker as follows:
    ///
    /// - The process has no channel. `init` returns a master in the process, and
    ///   [`Master::workers`](crate::Master::workers) does not contain the process. Of the cluster's
    ///   callbacks, only those for `error` are called for the process.
    /// - The master does not wait for the process. [`Master::run`](crate::Master::run) may return,
    ///   and a [`disconnect`](crate::Master::disconnect) of all workers may finish, while the
    ///   process runs. Call [`Process::reference`](crate::Process::reference) to make `run` wait.
    ///   In Node, the parent waits unless it calls `unref`.
    /// - Of this crate's methods, only [`Process::kill`](crate::Process::kill),
    ///   [`WorkerProcess::kill`](crate::WorkerProcess::kill) and its alias
    ///   [`destroy`](crate::WorkerProcess::destroy) end the process. All of them send the signal
    ///   immediately. The process survives a deadline of `disconnect_within`, a pool's stop and the
    ///   master's exit. [`WorkerProcess::disconnect`](crate::WorkerProcess::disconnect) does
    ///   nothing.
    /// - The process leads its own session unless [`setsid`](Self::setsid) is `false`. Signals to
    ///   the master's process group and the terminal's SIGHUP therefore do not reach the process.
    ///
    /// `fork` returns a handle for the process. The handle's id differs from all worker ids, and
    /// its state is [`Disconnected`](crate::WorkerState::Disconnected). While the master's loop
    /// runs, the process's exit calls its [`on_exit`](crate::WorkerProcess::on_exit) callbacks, and
    /// no zombie remains. `fork` fails if [`main`](Self::main) is also set.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::{Settings, SpawnOptions};
    ///
    /// let settings = Settings::default().exec("./server-2").detached(true);
    /// let before = std::process::id().to_string();
    /// let successor = master.fork_as(SpawnOptions::new(settings).env("BEFORE", before))?;
    /// let log = cluster::LogWriter::stderr().attached_to(master);
    /// successor.on_exit(move |_, _, status| log.line(format_args!("new server: {status}")));
    /// master.disconnect();
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn detached(mut self, detached: bool) -> Self {
        self.detached = Choice::Value(detached);
        self
    }

    /// Returns the value of [`detached`](Self::detached).
    ///
    /// Node: `options.detached` of `child_process`.
    ///
    /// See [`Settings`] for an example of a getter.
    #[must_use]
    pub fn get_detached(&self) -> Option<bool> {
        self.detached.get().copied()
    }

    /// Sets whether the process leads its own session and process group, without a controlling
    /// terminal. See setsid(2). The default is `true` for a [`detached`](Self::detached) process
    /// and `false` for a worker.
    ///
    /// Node: a part of `options.detached` of `child_process`.
    ///
    /// A detached process that stays in the master's session and process group receives signals
    /// that a terminal or a supervisor sends to the whole group. For example, a terminal sends
    /// SIGINT for Ctrl-C. [`Pool::upgrade`](crate::pool::Pool::upgrade) starts the new master with
    /// `setsid(false)`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::Settings;
    ///
    /// master.fork_as(Settings::default().exec("./server-2").detached(true).setsid(false))?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn setsid(mut self, setsid: bool) -> Self {
        self.setsid = Choice::Value(setsid);
        self
    }

    /// Returns the value of [`setsid`](Self::setsid).
    ///
    /// Node: a part of `options.detached` of `child_process`.
    ///
    /// See [`Settings`] for an example of a getter.
    #[must_use]
    pub fn get_setsid(&self) -> Option<bool> {
        self.setsid.get().copied()
    }

    /// Sets the user id of the workers. `fork` fails unless the master has the permission to change
    /// its user, for example as root, or already runs as that user.
    ///
    /// Node: `settings.uid`.
    ///
    /// The worker has no supplementary groups, unless the master has no permission to change its
    /// groups (setgroups(2)). In that case, the worker keeps the master's supplementary groups if
    /// the master's real, effective and saved ids are already those that `uid` and
    /// [`gid`](Self::gid) set. If the ids differ, and the master has a supplementary group other
    /// than the worker's group, `fork` fails with [`ForkStep::Groups`](crate::ForkStep::Groups). In
    /// a user namespace, root also has no permission unless `/proc/PID/setgroups` allows the change
    /// (user_namespaces(7)).
    ///
    /// Unless the user is root (0), the worker has no capabilities, even if the master has some.
    /// The permitted, effective, inheritable and ambient sets are empty before the program or
    /// [`main`](Self::main) begins. The bounding set, the securebits and `no_new_privs` do not
    /// change. See capabilities(7).
    ///
    /// With this setting, `fork` waits at most one second for the worker to start.
    ///
    /// ```
    /// let settings = cluster::Settings::default().gid(65534).uid(65534);
    /// # let _ = settings;
    /// ```
    #[must_use]
    pub fn uid(mut self, uid: u32) -> Self {
        self.uid = Choice::Value(uid);
        self
    }

    /// Returns the user that [`uid`](Self::uid) sets.
    ///
    /// Node: `settings.uid`.
    ///
    /// See [`Settings`] for an example of a getter.
    #[must_use]
    pub fn get_uid(&self) -> Option<u32> {
        self.uid.get().copied()
    }

    /// Sets the group id of the workers. `fork` fails unless the master has the permission to
    /// change its groups, for example as root, or already runs with that group.
    ///
    /// Node: `settings.gid`.
    ///
    /// For the worker's supplementary groups, see [`uid`](Self::uid). Without `uid`, the worker
    /// keeps the master's user and capabilities. With this setting, `fork` waits at most one second
    /// for the worker to start. See `uid` for an example.
    #[must_use]
    pub fn gid(mut self, gid: u32) -> Self {
        self.gid = Choice::Value(gid);
        self
    }

    /// Returns the group that [`gid`](Self::gid) sets.
    ///
    /// Node: `settings.gid`.
    ///
    /// See [`Settings`] for an example of a getter.
    #[must_use]
    pub fn get_gid(&self) -> Option<u32> {
        self.gid.get().copied()
    }

    /// Sets a port for each worker, for example for a debugger or a metrics page. The worker reads
    /// its port with [`Worker::inspect_port`](crate::Worker::inspect_port). The default is no port.
    ///
    /// Node: `settings.inspectPort`.
    ///
    /// See [`InspectPort`] for an example.
    #[doc(alias = "inspectPort")]
    #[must_use]
    pub fn inspect_port(mut self, port: impl Into<InspectPort>) -> Self {
        self.inspect_port = Choice::Value(port.into());
        self
    }

    /// Returns the value of [`inspect_port`](Self::inspect_port).
    ///
    /// Node: `settings.inspectPort`.
    ///
    /// See [`Settings`] for an example of a getter.
    #[must_use]
    pub fn get_inspect_port(&self) -> Option<&InspectPort> {
        self.inspect_port.get()
    }

    /// Sets a closure that workers run instead of executing a program. The worker exits with the
    /// code that the closure returns, or with 101 if the closure panics. By default, workers
    /// execute a program.
    ///
    /// Node has no counterpart.
    ///
    /// With this setting, a worker is a copy of the master's process. The two share all memory that
    /// neither of them changes. The closure receives the [`Worker`] that [`init`](crate::init())
    /// would return to a program. In the closure, `is_worker` returns true and `init` fails. The
    /// worker has the master's arguments, so [`exec_args`](Self::exec_args) and
    /// [`args`](Self::args) have no effect. `fork` fails if [`listen_fds`](Self::listen_fds) passes
    /// descriptors or the process is [`detached`](Self::detached). All other settings apply. A
    /// later [`exec`](Self::exec) cancels `main`.
    ///
    /// *Descriptors.* In the worker, the crate closes the master's internal descriptors and those
    /// that the master [`watch`](crate::Master::watch)es. If the closure needs a watched
    /// descriptor, give the closure a copy made with `try_clone`. If the application may hold
    /// another handle for a closed descriptor, an unconnected socket takes over the descriptor's
    /// number, so that the handle can be dropped safely. The application's other descriptors stay
    /// open unless [`stdio`](Self::stdio) replaces them.
    ///
    /// *Output.* The master flushes [`std::io::stdout`] before each fork, so that its buffered
    /// contents are printed only once. Other buffers, such as the application's own
    /// [`BufWriter`](std::io::BufWriter), are copied with their contents.
    ///
    /// *Memory.* A random value from before the fork, such as a seed, is the same in all workers.
    /// When the closure returns, the worker drops the values that the closure owns and calls
    /// [`std::process::exit`]. No other values are dropped. If the closure owns handles of the
    /// master or its workers, their methods return
    /// [`Error::ForeignProcess`](crate::Error::ForeignProcess) or do nothing. The more memory the
    /// master uses, the longer a fork takes. A worker with another [`uid`](Self::uid) still has a
    /// copy of all secrets in the master's memory.
    ///
    /// *Threads.* The master must have only one thread, because a fork copies only the calling
    /// thread. A lock that another thread holds during the fork, for example in the allocator,
    /// would never be released in the worker. If the master has more threads, `fork` starts no
    /// process and fails with [`Error::Fork`](crate::Error::Fork) of the kind
    /// [`Deadlock`](std::io::ErrorKind::Deadlock). Joined threads do not count. The number of
    /// threads is not checked outside Linux, nor in a sandbox that forbids unshare(2) and has no
    /// `/proc`.
    ///
    /// *Signals.* Signals have the same effects as in a worker that executes a program
    /// ([`Master::fork`](crate::Master::fork)), with one exception. If the master ignores SIGPIPE,
    /// as Rust programs do by default, the worker also ignores it.
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
        self.main = Choice::Value(WorkerMain::new(main));
        self
    }

    /// Returns whether workers run a closure set with [`main`](Self::main) instead of a program.
    ///
    /// Node has no counterpart.
    ///
    /// ```
    /// use cluster::Settings;
    ///
    /// let settings = Settings::default().main(|_| 0);
    /// assert!(settings.has_main() && !settings.exec("./worker").has_main());
    /// ```
    #[must_use]
    pub fn has_main(&self) -> bool {
        self.get_main().is_some()
    }

    pub(crate) fn get_main(&self) -> Option<&WorkerMain> {
        self.main.get()
    }

    pub(crate) fn is_detached(&self) -> bool {
        self.get_detached() == Some(true)
    }

    /// Returns whether a worker with these settings leads its own process group. A worker with
    /// `listen_fds` does, because its program may start other processes.
    pub(crate) fn leads_group(&self) -> bool {
        !self.is_detached() && !self.passed_fds().is_empty()
    }

    pub(crate) fn leads_session(&self) -> bool {
        self.get_setsid().unwrap_or(self.is_detached())
    }
}
