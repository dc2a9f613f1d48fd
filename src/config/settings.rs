//! The settings of the processes that `fork` starts.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use crate::config::inspect_port::InspectPort;
use crate::config::stdio::{Stdio, StdioKind};
use crate::sys::fd::LISTEN_FDS_START;
use crate::worker::Worker;
use crate::worker::worker_main::WorkerMain;

/// The settings of the processes that [`Master::fork`](crate::Master::fork) starts.
///
/// Node: `cluster.settings`. A value of this type is also the argument of
/// [`Master::setup_master`](crate::Master::setup_master). There, a setting that the value does not
/// mention keeps what was set before, and a setting that was [`unset`](Self::unset) gets its default
/// again.
///
/// Each setting has one method that sets it and one whose name begins with `get_`. A `get_` method
/// returns `None` for a setting that has not been set. [`Master::settings`](crate::Master::settings)
/// returns settings in which the defaults are filled in.
///
/// This type is not `Send`, because it may contain closures. Build it on the thread of the master.
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

/// The choice that a value of [`Settings`] makes for one setting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Choice<T> {
    /// Nothing: `update` keeps the earlier choice.
    #[default]
    Unmentioned,
    /// The default, whatever was set before.
    Default,
    Value(T),
}

impl<T> Choice<T> {
    fn get(&self) -> Option<&T> {
        match self {
            Self::Value(value) => Some(value),
            Self::Unmentioned | Self::Default => None,
        }
    }

    /// Replaces this choice, if `later` mentions the setting.
    fn update(&mut self, later: Self) {
        match later {
            Self::Unmentioned => {}
            Self::Default | Self::Value(_) => *self = later,
        }
    }

    fn fill(&mut self, default: impl FnOnce() -> T) {
        if self.get().is_none() {
            *self = Self::Value(default());
        }
    }

    /// Ends the effect of `unset`, which has been carried out.
    fn settle(&mut self) {
        if matches!(self, Self::Default) {
            *self = Self::Unmentioned;
        }
    }
}

/// Names a setting, for [`Settings::unset`].
///
/// Node has no counterpart. See [`Settings::unset`] for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Setting {
    /// [`Settings::exec`]; the default is the master's own program.
    Exec,
    /// [`Settings::exec_args`]; the default is none.
    ExecArgs,
    /// [`Settings::args`]; the default is the master's own arguments.
    Args,
    /// [`Settings::cwd`]; the default is the master's directory.
    Cwd,
    /// [`Settings::silent`]; the default is `false`.
    Silent,
    /// [`Settings::stdio`]; the default is what `silent` says.
    Stdio,
    /// [`Settings::listen_fds`]; the default is none.
    ListenFds,
    /// [`Settings::detached`]; the default is `false`.
    Detached,
    /// [`Settings::setsid`]; the default is `true` for a detached process and `false` for a worker.
    Setsid,
    /// [`Settings::uid`]; the default is the master's user.
    Uid,
    /// [`Settings::gid`]; the default is the master's groups.
    Gid,
    /// [`Settings::inspect_port`]; the default is none.
    InspectPort,
    /// [`Settings::main`]; the default is that workers execute a program.
    Main,
}

impl Settings {
    /// Sets the program of the workers: a path, absolute or relative to the master's directory.
    ///
    /// There is no search in `PATH`. The default is the master's own program. Workers execute the program
    /// even if [`main`](Self::main) was set before.
    ///
    /// Node: `settings.exec`. See [`Settings`] for an example.
    #[must_use]
    pub fn exec(mut self, program: impl Into<PathBuf>) -> Self {
        self.exec = Choice::Value(program.into());
        self.main = Choice::Unmentioned;
        self
    }

    /// Returns the program that [`exec`](Self::exec) sets.
    ///
    /// Node: `settings.exec`. See [`Settings`] for an example.
    #[must_use]
    pub fn get_exec(&self) -> Option<&Path> {
        self.exec.get().map(PathBuf::as_path)
    }

    /// Sets the arguments that come before [`args`](Self::args): those that the program always needs.
    /// The default is none.
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
    /// Node: `settings.execArgv`. See [`Settings`] for an example of such a method.
    #[must_use]
    pub fn get_exec_args(&self) -> Option<&[OsString]> {
        self.exec_args.get().map(Vec::as_slice)
    }

    /// Sets the arguments of the workers, without the program's name. The default is the master's own
    /// arguments.
    ///
    /// Node: `settings.args`. See [`Settings`] for an example.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args = Choice::Value(args.into_iter().map(Into::into).collect());
        self
    }

    /// Returns the arguments that [`args`](Self::args) sets.
    ///
    /// Node: `settings.args`. See [`Settings`] for an example of such a method.
    #[must_use]
    pub fn get_args(&self) -> Option<&[OsString]> {
        self.args.get().map(Vec::as_slice)
    }

    /// Sets the directory in which workers start. The default is the master's.
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
    /// Node: `settings.cwd`. See [`Settings`] for an example of such a method.
    #[must_use]
    pub fn get_cwd(&self) -> Option<&Path> {
        self.cwd.get().map(PathBuf::as_path)
    }

    /// Sets whether a worker's standard input, output and error are pipes to the master
    /// ([`Process::take_stdio`](crate::Process::take_stdio)) instead of the master's own. The default is
    /// `false`.
    ///
    /// Node: `settings.silent`. See [`Process::take_stdio`](crate::Process::take_stdio) for an
    /// example.
    #[must_use]
    pub fn silent(mut self, silent: bool) -> Self {
        self.silent = Choice::Value(silent);
        self
    }

    /// Returns what [`silent`](Self::silent) sets.
    ///
    /// Node: `settings.silent`. See [`Settings`] for an example of such a method.
    #[must_use]
    pub fn get_silent(&self) -> Option<bool> {
        self.silent.get().copied()
    }

    /// Sets what a worker's descriptors 0, 1, 2 and so on are, instead of what
    /// [`silent`](Self::silent) says.
    ///
    /// If the list has fewer than three entries, the rest of descriptors 0 to 2 are the master's. There
    /// is no entry for the channel, which has a higher number than all entries.
    ///
    /// Node: `settings.stdio`. See [`Stdio`] for an example.
    #[must_use]
    pub fn stdio(mut self, stdio: impl IntoIterator<Item = Stdio>) -> Self {
        self.stdio = Choice::Value(stdio.into_iter().collect());
        self
    }

    /// Returns the list that [`stdio`](Self::stdio) sets.
    ///
    /// Node: `settings.stdio`. See [`Settings`] for an example of such a method.
    #[must_use]
    pub fn get_stdio(&self) -> Option<&[Stdio]> {
        self.stdio.get().map(Vec::as_slice)
    }

    /// Sets the descriptors that workers are passed as systemd passes them to a service: as numbers 3, 4
    /// and so on, each with a name. The default is none, and so is an empty list.
    ///
    /// Node has no counterpart. The worker finds `LISTEN_FDS`, `LISTEN_FDNAMES` and `LISTEN_PID` in its
    /// environment. Any program that supports systemd's socket activation can therefore be a worker,
    /// without knowing this crate. Such a worker has only the events `fork`, `disconnect` and `exit`. It
    /// does not receive the request to disconnect: send it a signal
    /// ([`Process::kill`](crate::Process::kill)), or let the deadline of `disconnect_within` kill it. A
    /// worker that uses this crate takes the descriptors with
    /// [`systemd::listen_fds`](crate::systemd::listen_fds) before it calls [`init`](crate::init()).
    ///
    /// All workers share the descriptors, and accept from a listener by themselves. If one of them
    /// makes it non-blocking, it is non-blocking for all, and for the master.
    ///
    /// `fork` fails if [`stdio`](Self::stdio) has more than three entries, because both settings would
    /// claim descriptor 3. It also fails unless each name is 1 to 255 characters of printable ASCII
    /// without a colon.
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
    /// Node has no counterpart. See [`Settings`] for an example of such a method.
    #[must_use]
    pub fn get_listen_fds(&self) -> Option<&[(String, Stdio)]> {
        self.listen_fds.get().map(Vec::as_slice)
    }

    /// Sets whether the process is not a worker but a program that outlives the master, such as its
    /// successor. The default is `false`.
    ///
    /// Node: `options.detached` of `child_process`. A detached process is not a worker:
    ///
    /// - It has no channel, and its `init` returns a master. It is not in
    ///   [`Master::workers`](crate::Master::workers). Of the cluster's callbacks, only those for `error`
    ///   are called for it.
    /// - Nothing waits for it: [`Master::run`](crate::Master::run) returns, and a
    ///   [`disconnect`](crate::Master::disconnect) of all workers finishes, while it runs. Node's parent
    ///   waits for it until `unref`; here [`Process::reference`](crate::Process::reference) makes `run`
    ///   wait.
    /// - Only [`Process::kill`](crate::Process::kill) and
    ///   [`WorkerProcess::kill`](crate::WorkerProcess::kill) end it. Both signal it at once. A deadline of
    ///   `disconnect_within`, a pool that stops, and the end of the master do not end it.
    ///   [`WorkerProcess::disconnect`](crate::WorkerProcess::disconnect) does nothing.
    /// - It leads a session of its own, unless [`setsid`](Self::setsid) says otherwise. A signal to
    ///   the master's process group, and the SIGHUP of its terminal, do not reach it.
    ///
    /// `fork` returns its handle. Its number is one that no worker has, and its state is
    /// [`Disconnected`](crate::WorkerState::Disconnected). While the master's loop runs, the exit of the
    /// process is handled: its callbacks of [`on_exit`](crate::WorkerProcess::on_exit) are called, and it
    /// leaves no zombie. `fork` fails if [`main`](Self::main) is set, too.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::{Settings, SpawnOptions};
    ///
    /// let settings = Settings::default().exec("./server-2").detached(true);
    /// let before = std::process::id().to_string();
    /// let successor = master.fork_as(SpawnOptions::new(settings).env("BEFORE", before))?;
    /// successor.on_exit(|_, _, status| eprintln!("the new server has exited: {status}"));
    /// master.on_all_disconnected_once(|_| println!("only the new server is left"));
    /// master.disconnect();
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn detached(mut self, detached: bool) -> Self {
        self.detached = Choice::Value(detached);
        self
    }

    /// Returns what [`detached`](Self::detached) sets.
    ///
    /// Node: `options.detached` of `child_process`. See [`Settings`] for an example of such a method.
    #[must_use]
    pub fn get_detached(&self) -> Option<bool> {
        self.detached.get().copied()
    }

    /// Sets whether the process leads a session and a process group of its own, without a controlling
    /// terminal (setsid(2)). The default is `true` for a [`detached`](Self::detached) process and `false`
    /// for a worker.
    ///
    /// Node: a part of `options.detached` of `child_process`. A detached process that stays in the
    /// master's session and process group still gets the signals that a terminal (Ctrl-C) or a
    /// supervisor sends to the whole group. [`Pool::upgrade`](crate::pool::Pool::upgrade) starts the new
    /// master this way.
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

    /// Returns what [`setsid`](Self::setsid) sets.
    ///
    /// Node: a part of `options.detached` of `child_process`. See [`Settings`] for an example of such a
    /// method.
    #[must_use]
    pub fn get_setsid(&self) -> Option<bool> {
        self.setsid.get().copied()
    }

    /// Sets the user that workers run as. The master must be allowed to change its user, as root is;
    /// otherwise `fork` fails.
    ///
    /// Node: `settings.uid`. The worker has no supplementary groups. Unless the user is root (0), it has
    /// no capabilities either, whatever the master has: the permitted, effective, inheritable and ambient
    /// sets are empty before the program or [`main`](Self::main) begins. The bounding set, the securebits
    /// and `no_new_privs` stay as they are (capabilities(7)). `fork` waits for such a worker for at most
    /// one second.
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
    /// Node: `settings.uid`. See [`Settings`] for an example of such a method.
    #[must_use]
    pub fn get_uid(&self) -> Option<u32> {
        self.uid.get().copied()
    }

    /// Sets the group that workers run as. The master must be allowed to change its groups, as root is;
    /// otherwise `fork` fails.
    ///
    /// Node: `settings.gid`. The worker has no supplementary groups. Without [`uid`](Self::uid) it
    /// keeps the master's user and capabilities. See `uid` for an example.
    #[must_use]
    pub fn gid(mut self, gid: u32) -> Self {
        self.gid = Choice::Value(gid);
        self
    }

    /// Returns the group that [`gid`](Self::gid) sets.
    ///
    /// Node: `settings.gid`. See [`Settings`] for an example of such a method.
    #[must_use]
    pub fn get_gid(&self) -> Option<u32> {
        self.gid.get().copied()
    }

    /// Sets a port for each worker, for a debugger or a page with metrics. The worker gets it from
    /// [`Worker::inspect_port`](crate::Worker::inspect_port). The default is none.
    ///
    /// Node: `settings.inspectPort`. See [`InspectPort`] for an example.
    #[doc(alias = "inspectPort")]
    #[must_use]
    pub fn inspect_port(mut self, port: impl Into<InspectPort>) -> Self {
        self.inspect_port = Choice::Value(port.into());
        self
    }

    /// Returns what [`inspect_port`](Self::inspect_port) sets.
    ///
    /// Node: `settings.inspectPort`. See [`Settings`] for an example of such a method.
    #[must_use]
    pub fn get_inspect_port(&self) -> Option<&InspectPort> {
        self.inspect_port.get()
    }

    /// Sets a closure that workers run instead of executing a program. The worker exits with the code
    /// that the closure returns, or with 101 if the closure panics. The default is that workers execute a
    /// program.
    ///
    /// Node has no counterpart. A worker is then a copy of the master's process. The two share all memory
    /// that neither of them changes. The closure gets the [`Worker`] that [`init`](crate::init()) would
    /// return to a program; `is_worker` is true, and a call of `init` is an error. All other settings
    /// apply except [`exec_args`](Self::exec_args) and [`args`](Self::args): the arguments are the
    /// master's. A later [`exec`](Self::exec) ends the effect of `main`.
    ///
    /// *Descriptors.* Those that the master has opened for itself are closed in the worker, and so are
    /// those that it [`watch`](crate::Master::watch)es: a closure that needs such a descriptor has its own
    /// copy (`try_clone`). If the application may have another handle of a descriptor, its number is not
    /// freed but refers to an unconnected socket, so that the handle can be dropped and reaches nothing.
    /// The application's other descriptors stay open, unless [`stdio`](Self::stdio) replaces them.
    ///
    /// *Output.* The buffer of [`std::io::stdout`] is flushed before each fork, so that its contents are
    /// printed once. Other buffers, such as a [`BufWriter`](std::io::BufWriter) of the application, are
    /// copied with their contents.
    ///
    /// *Memory.* A value that was drawn at random before the fork, such as a seed, is the same in all
    /// workers. When the closure returns, only what it owns is dropped: the worker then calls
    /// [`std::process::exit`]. If the closure owns handles of the master or its workers, their methods
    /// return [`Error::ForeignProcess`](crate::Error::ForeignProcess) or do nothing. A fork takes longer
    /// the more memory the master has. A worker of another [`uid`](Self::uid) still has a copy of all
    /// secrets in the master's memory.
    ///
    /// *Threads.* The master must have one thread: a worker has a copy of the thread that forked and of no
    /// other, and a lock that another thread held at that moment, for instance in the allocator, is never
    /// released. If the master has more threads, `fork` fails with [`Error::Fork`](crate::Error::Fork) of
    /// the kind [`Deadlock`](std::io::ErrorKind::Deadlock), and no process is made. Threads that have been
    /// joined do not count. Outside Linux, and in a sandbox that refuses unshare(2) and has no `/proc`, the
    /// number of threads is unknown and not checked.
    ///
    /// *Signals* have their default effect, except that SIGPIPE stays ignored if the master ignores it, as
    /// Rust programs do.
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

    /// Returns whether workers run the closure of [`main`](Self::main) instead of a program.
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

    /// Gives a setting its default again.
    ///
    /// Node has no counterpart. As an argument of [`Master::setup_master`](crate::Master::setup_master)
    /// the result replaces an earlier value by the default. A later call of the setting's method sets a
    /// value again.
    ///
    /// ```
    /// use cluster::{Setting, Settings};
    ///
    /// let settings = Settings::default().cwd("/srv").silent(true);
    /// let settings = settings.unset(Setting::Cwd);
    /// assert_eq!(settings.get_cwd(), None);
    /// assert_eq!(settings.get_silent(), Some(true));
    /// ```
    #[must_use]
    pub fn unset(mut self, setting: Setting) -> Self {
        match setting {
            Setting::Exec => self.exec = Choice::Default,
            Setting::ExecArgs => self.exec_args = Choice::Default,
            Setting::Args => self.args = Choice::Default,
            Setting::Cwd => self.cwd = Choice::Default,
            Setting::Silent => self.silent = Choice::Default,
            Setting::Stdio => self.stdio = Choice::Default,
            Setting::ListenFds => self.listen_fds = Choice::Default,
            Setting::Detached => self.detached = Choice::Default,
            Setting::Setsid => self.setsid = Choice::Default,
            Setting::Uid => self.uid = Choice::Default,
            Setting::Gid => self.gid = Choice::Default,
            Setting::InspectPort => self.inspect_port = Choice::Default,
            Setting::Main => self.main = Choice::Default,
        }
        self
    }

    pub(crate) fn get_main(&self) -> Option<&WorkerMain> {
        self.main.get()
    }

    /// Fills in the defaults of the settings that always have a value.
    pub(crate) fn complete(mut self) -> Self {
        self.exec.fill(|| {
            // Without /proc, use the name by which the program was started.
            let name = || std::env::args_os().next().map(PathBuf::from);
            std::env::current_exe()
                .ok()
                .or_else(name)
                .unwrap_or_default()
        });
        self.args.fill(|| std::env::args_os().skip(1).collect());
        self.exec_args.fill(Vec::new);
        self.silent.fill(|| false);
        self.cwd.settle();
        self.stdio.settle();
        self.listen_fds.settle();
        self.detached.settle();
        self.setsid.settle();
        self.uid.settle();
        self.gid.settle();
        self.inspect_port.settle();
        self.main.settle();
        self
    }

    /// Replaces the settings that `later` mentions and keeps the rest.
    pub(crate) fn update(&mut self, later: Self) {
        // A later program ends the effect of `main`, unless `later` has both.
        if later.exec.get().is_some() {
            self.main = Choice::Unmentioned;
        }
        self.exec.update(later.exec);
        self.exec_args.update(later.exec_args);
        self.args.update(later.args);
        self.cwd.update(later.cwd);
        self.silent.update(later.silent);
        self.stdio.update(later.stdio);
        self.listen_fds.update(later.listen_fds);
        self.detached.update(later.detached);
        self.setsid.update(later.setsid);
        self.uid.update(later.uid);
        self.gid.update(later.gid);
        self.inspect_port.update(later.inspect_port);
        self.main.update(later.main);
    }

    /// The descriptors that [`stdio`](Self::stdio) copies into workers.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        let stdio = self.get_stdio().into_iter().flatten();
        stdio.filter_map(|stdio| match &stdio.0 {
            StdioKind::Fd(fd) => Some(fd.as_raw_fd()),
            StdioKind::Inherit | StdioKind::Null | StdioKind::Pipe => None,
        })
    }

    /// Combines `stdio` or `silent` with `listen_fds`, whose descriptors come after the first three.
    ///
    /// # Errors
    ///
    /// Both `stdio` and `listen_fds` claim descriptor 3.
    pub(crate) fn effective_stdio(&self) -> io::Result<Vec<Stdio>> {
        let mut stdio = match (self.get_stdio(), self.get_silent()) {
            (Some(stdio), _) => stdio.to_vec(),
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
        self.get_detached() == Some(true)
    }

    pub(crate) fn leads_session(&self) -> bool {
        self.get_setsid().unwrap_or(self.is_detached())
    }

    pub(crate) fn passed_fds(&self) -> &[(String, Stdio)] {
        self.get_listen_fds().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_of_exec_and_main_takes_effect() {
        let mut settings = Settings::default();
        settings.update(Settings::default().main(|_| 0));
        settings.update(Settings::default().cwd("/"));
        assert!(settings.has_main());
        settings.update(Settings::default().exec("a"));
        assert!(!settings.has_main());
        settings.update(Settings::default().exec("b").main(|_| 0));
        assert!(settings.has_main());
        settings.update(Settings::default().main(|_| 0).exec("c"));
        assert!(!settings.has_main());
    }

    #[test]
    fn updates_accumulate() {
        let mut settings = Settings::default();
        settings.update(Settings::default().exec("a").args(["1"]));
        settings.update(Settings::default());
        settings.update(Settings::default().exec("b").exec_args(["0"]).cwd("/"));
        settings.update(Settings::default().silent(true).uid(1).gid(2));
        let all = Settings::default().exec("b").args(["1"]).exec_args(["0"]);
        assert_eq!(settings, all.cwd("/").silent(true).uid(1).gid(2));
    }

    const ALL: [Setting; 13] = [
        Setting::Exec,
        Setting::ExecArgs,
        Setting::Args,
        Setting::Cwd,
        Setting::Silent,
        Setting::Stdio,
        Setting::ListenFds,
        Setting::Detached,
        Setting::Setsid,
        Setting::Uid,
        Setting::Gid,
        Setting::InspectPort,
        Setting::Main,
    ];

    /// Which settings have a value, in the order of `ALL`.
    fn are_set(settings: &Settings) -> [bool; 13] {
        [
            settings.get_exec().is_some(),
            settings.get_exec_args().is_some(),
            settings.get_args().is_some(),
            settings.get_cwd().is_some(),
            settings.get_silent().is_some(),
            settings.get_stdio().is_some(),
            settings.get_listen_fds().is_some(),
            settings.get_detached().is_some(),
            settings.get_setsid().is_some(),
            settings.get_uid().is_some(),
            settings.get_gid().is_some(),
            settings.get_inspect_port().is_some(),
            settings.has_main(),
        ]
    }

    fn every_setting() -> Settings {
        let settings = Settings::default().exec("a").exec_args(["b"]).args(["c"]);
        let settings = settings.cwd("/").silent(true).stdio([Stdio::null()]);
        let no_fds: [(&str, OwnedFd); 0] = [];
        let settings = settings.listen_fds(no_fds).detached(true).setsid(true);
        settings.uid(1).gid(2).inspect_port(3).main(|_| 0)
    }

    #[test]
    fn unset_removes_one_value_and_leaves_the_others() {
        assert_eq!(are_set(&every_setting()), [true; 13]);
        for (index, setting) in ALL.into_iter().enumerate() {
            let mut expected = [true; 13];
            expected[index] = false;
            assert_eq!(
                are_set(&every_setting().unset(setting)),
                expected,
                "{setting:?}"
            );
            let mut updated = every_setting();
            updated.update(Settings::default().unset(setting));
            assert_eq!(are_set(&updated), expected, "{setting:?} by update");
        }
    }

    #[test]
    fn setting_after_unset_has_the_new_value() {
        let mut settings = Settings::default().cwd("/");
        settings.update(Settings::default().unset(Setting::Cwd).cwd("/srv"));
        assert_eq!(settings.get_cwd(), Some(Path::new("/srv")));
    }

    #[test]
    fn unset_settings_get_their_defaults_on_completion() {
        let settings = every_setting();
        let unset = ALL.into_iter().fold(settings, Settings::unset).complete();
        let fresh = Settings::default().complete();
        assert_eq!(unset, fresh);
        assert_eq!(unset.get_silent(), Some(false));
    }

    #[test]
    fn stdio_takes_precedence_over_silent() {
        let silent = Settings::default().silent(true);
        assert_eq!(silent.effective_stdio().unwrap(), vec![Stdio::pipe(); 3]);
        let both = silent.stdio([Stdio::null()]);
        assert_eq!(both.effective_stdio().unwrap(), [Stdio::null()]);
        assert_eq!(Settings::default().effective_stdio().unwrap(), []);
    }

    #[test]
    fn passed_descriptors_follow_the_first_three() {
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
}
