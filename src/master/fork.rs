//! Starts workers and detached processes.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use crate::config::settings::Settings;
use crate::config::spawn::SpawnOptions;
use crate::error::{Error, Result};
use crate::master::Master;
use crate::master::callbacks::WorkerCallbacks;
use crate::master::worker_process::WorkerProcess;
use crate::types::policy::SchedulingPolicy;

impl Master {
    /// Starts a worker. The worker executes the program of [`settings`](Self::settings), or runs
    /// the closure of [`main`](Settings::main) in a copy of this process.
    ///
    /// Node: `cluster.fork()`.
    ///
    /// The worker inherits the master's environment, except the variables that
    /// [`systemd`](crate::systemd) sets for the master only. No signal is blocked in the worker.
    /// The worker ignores the signals that were ignored when [`init`](crate::init()) created the
    /// master, except SIGPIPE and SIGCHLD. All other signals have their default action. A worker
    /// that runs `main` also ignores SIGPIPE if the master does.
    ///
    /// The calling thread waits until the program has started, or until `main` is about to be
    /// called. When the call returns, [`workers`](Self::workers) contains the worker. The loop
    /// delivers the events `setup` and `fork` after the call.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Fork`] if:
    ///
    /// - the program's path is unknown, or the program cannot be executed;
    /// - the system has no process, memory or descriptor left;
    /// - the system denies the worker its directory, user or group;
    /// - a setting contains a zero byte, or names a descriptor that is not open;
    /// - a name in [`listen_fds`](Settings::listen_fds) is not valid;
    /// - the settings contradict each other (see [`listen_fds`](Settings::listen_fds) and
    ///   [`main`](Settings::main));
    /// - all worker ids have been used;
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
    /// worker.on_exit(|master, _, status| master.give_up(format!("the worker exited ({status})")));
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
        let forked = self.shell.fork(
            &settings,
            env,
            &self.launch,
            watch_children,
            &self.event_loop,
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
}

/// Returns the path of the worker's program for an error message. If the path is unknown, returns
/// the name by which the master's own program was called.
fn program_name(settings: &Settings) -> PathBuf {
    let own_name = || std::env::args_os().next().map(PathBuf::from);
    let program = settings.get_exec().map(Path::to_owned);
    program.or_else(own_name).unwrap_or_default()
}
