//! Upgrades: the processes and descriptors by which a new master takes over from an old one.
//!
//! The old master starts the new one with copies of its listeners and one end of a channel, which it
//! passes as systemd passes sockets. Both masters accept from the same sockets then. When the new master
//! has had a quorum for a while, it writes a byte to the channel, and the old one stops. If the new
//! master exits before, or is late, the old one terminates it and goes on.

use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use cluster::systemd::ListenFd;
use cluster::{
    Error, Interest, Master, Result, Settings, Signal, SpawnOptions, TimerId, WorkerId,
    WorkerProcess,
};

use super::core::Core;
use super::event::PoolEvent;
use super::{Pool, PoolListener};

/// The name of the descriptor for the channel to the old master.
///
/// From the channel the new master reads one byte for each of the other descriptors. The byte is 1 if the
/// new master inherits the socket file of the listener, and so must remove it at the end, otherwise 0.
const CHANNEL: &str = "cluster-predecessor";

/// The name of a listener that was passed without a name.
const UNNAMED_LISTENER: &str = "listener";

/// The byte by which a new master reports that it has taken over.
const TOOK_OVER: u8 = b'S';

/// The program of this process, as it was found when the pool was created. The file may have been
/// replaced since then.
#[derive(Debug)]
pub(super) struct OwnProgram {
    path: io::Result<PathBuf>,
    args: Vec<OsString>,
}

impl OwnProgram {
    pub(super) fn new() -> Self {
        let mut args = std::env::args_os();
        let name = args.next().map(PathBuf::from);
        // The path of the command line, unresolved: its symbolic links may lead to a new release at the
        // next start.
        let path = name.filter(|name| name.parent() != Some(Path::new("")));
        Self {
            path: path.map_or_else(std::env::current_exe, std::path::absolute),
            args: args.collect(),
        }
    }
}

/// The old master, until this process has taken over from it.
#[derive(Debug)]
pub(super) struct OldMaster {
    channel: UnixStream,
    /// The indexes of the listeners whose socket files this process inherits.
    inherits_files: Vec<usize>,
    /// Runs while there is a quorum; this process takes over when it fires.
    takeover_timer: Option<TimerId>,
}

// The new master.
impl Pool {
    /// Adopts the listeners that systemd, or the old master of an [upgrade](Self::upgrade), has passed to
    /// this process. They outlive all workers, as those of [`listen`](Self::listen).
    ///
    /// Node has no counterpart.
    ///
    /// Workers get these listeners by listening on the same addresses. Call it before `listen`,
    /// which uses an adopted listener instead of opening another one.
    ///
    /// # Errors
    ///
    /// [`Error::Descriptor`] if a descriptor is not a listener; [`Error::Io`] if the channel to the old
    /// master is broken; and as [`Master::listen`].
    ///
    /// ```no_run
    /// # use cluster::pool::{Pool, PoolOptions};
    /// use cluster::{Role, systemd};
    ///
    /// # fn main() -> cluster::Result<()> {
    /// let passed = systemd::listen_fds()?;
    /// if let Role::Master(master) = cluster::init()? {
    ///     let pool = Pool::new(&master, PoolOptions::default());
    ///     pool.adopt(&master, passed)?;
    ///     pool.listen(&master, "127.0.0.1:8000")?;
    /// }
    /// # Ok(()) }
    /// ```
    pub fn adopt(&self, master: &Master, mut passed: Vec<ListenFd>) -> Result<()> {
        let is_channel = |passed: &ListenFd| passed.name() == Some(CHANNEL);
        let channel = passed.iter().position(is_channel);
        let mut inherits_file = Vec::new();
        if let Some(channel) = channel.map(|index| passed.remove(index)) {
            let mut channel = UnixStream::from(OwnedFd::from(channel));
            inherits_file.resize(passed.len(), 0);
            // The old master wrote these bytes before it started this process.
            let read = channel.set_nonblocking(true);
            let read = read.and_then(|()| channel.read_exact(&mut inherits_file));
            read.map_err(Error::io("read from the old master"))?;
            self.0.old_master.replace(Some(OldMaster {
                channel,
                inherits_files: Vec::new(),
                takeover_timer: None,
            }));
        }
        for (index, passed) in passed.into_iter().enumerate() {
            let name = passed.name().map(str::to_owned);
            let listener = if passed.is_unix() {
                master.listen(UnixListener::try_from(passed)?)
            } else {
                master.listen(TcpListener::try_from(passed)?)
            }?;
            let mut listeners = self.0.listeners.borrow_mut();
            let mut old_master = self.0.old_master.borrow_mut();
            if let Some(old_master) = old_master.as_mut() {
                if inherits_file.get(index) == Some(&1) {
                    old_master.inherits_files.push(listeners.len());
                }
            }
            listeners.push(PoolListener { listener, name });
        }
        Ok(())
    }

    /// The quorum was reached: this process takes over if it keeps the quorum for `min_ready_time`.
    pub(super) fn restart_takeover_timer(&self, master: &Master) {
        self.stop_takeover_timer(master);
        if let Some(old_master) = self.0.old_master.borrow_mut().as_mut() {
            let pool = self.clone();
            let min_ready_time = self.0.core.borrow().options().min_ready_time;
            let take_over = move |master: &Master| pool.take_over(master);
            let timer = master.set_timeout(min_ready_time, take_over);
            old_master.takeover_timer = Some(timer);
        }
    }

    pub(super) fn stop_takeover_timer(&self, master: &Master) {
        if let Some(old_master) = self.0.old_master.borrow_mut().as_mut() {
            if let Some(timer) = old_master.takeover_timer.take() {
                master.clear_timer(timer);
            }
        }
    }

    fn take_over(&self, master: &Master) {
        // In this iteration of the loop the pool may have lost its quorum, or have been stopped. The
        // event, which stops the timer, is delivered later.
        if !self.has_quorum() {
            return;
        }
        let Some(mut old_master) = self.0.old_master.take() else {
            return;
        };
        // The old master may have exited; then there is no process to report to.
        let _ = old_master.channel.write_all(&[TOOK_OVER]);
        let listeners = self.0.listeners.borrow();
        let indexes = old_master.inherits_files.into_iter();
        for inherited in indexes.filter_map(|index| listeners.get(index)) {
            // This fails if the file has been removed, so that no client can connect to it.
            let _ = inherited.listener.set_removes_file(true);
        }
        drop(listeners);
        self.emit(master, PoolEvent::TookOver);
    }
}

// The old master.
impl Pool {
    /// Starts a new master from the program's file, which may be a new release. When the new master
    /// serves, this pool stops. No client is refused.
    ///
    /// The new master runs the program of this process, with the same arguments. If the command line
    /// named the program by a path, that path is used again. The new master must call
    /// [`adopt`](Self::adopt), which gives it the listeners of this master, and forks its own workers.
    ///
    /// The upgrade ends in [`PoolEvent::Upgraded`], and this pool stops. Or it ends in
    /// [`PoolEvent::UpgradeFailed`], and this pool goes on. It fails if the new master exits, if this pool
    /// stops, or if the new master does not take over in time. The new master takes over when it has had a
    /// [quorum](super::PoolOptions::quorum) for
    /// [`min_ready_time`](super::PoolOptions::min_ready_time). Its time is
    /// [`startup_timeout`](super::PoolOptions::startup_timeout) and twice `min_ready_time`.
    ///
    /// A new master that has failed gets SIGTERM. It is killed if it has not exited after
    /// [`drain_timeout`](super::PoolOptions::drain_timeout), or at once if the pool
    /// [stops at once](Self::stop_at_once).
    ///
    /// Node has no counterpart.
    ///
    /// An upgrade changes the process id of the master, so process 1 cannot upgrade. A program that
    /// upgrades has one pool. The new master is a [detached](Settings::detached()) process, so it
    /// is not in [`Master::workers`]. As with nginx and gunicorn, it stays in the session and the
    /// process group of this one: a signal to the process group, such as Ctrl-C in a terminal,
    /// reaches both masters. If an upgrade is in progress, or the pool is stopping, nothing
    /// happens.
    ///
    /// # Errors
    ///
    /// As [`Master::fork`]; [`Error::Io`] if the process has no descriptors left, or the program of this
    /// process is unknown.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) -> cluster::Result<()> {
    /// pool.upgrade(master)?;
    /// # Ok(()) }
    /// ```
    pub fn upgrade(&self, master: &Master) -> Result<()> {
        if !self.0.core.borrow().can_upgrade() {
            return Ok(());
        }
        let program = self.0.program.path.as_ref();
        let program = program.map_err(|error| {
            // An `io::Error` cannot be cloned.
            Error::io("find the program of this process")(error.kind().into())
        })?;
        let channel = UnixStream::pair().map_err(Error::io("create a channel to a new master"))?;
        let (mut ours, theirs) = channel;
        let listeners = self.copy_listeners()?;
        let inherits_file = |own: &PoolListener| u8::from(own.listener.removes_file());
        let inherits_file: Vec<u8> = self
            .0
            .listeners
            .borrow()
            .iter()
            .map(inherits_file)
            .collect();
        ours.write_all(&inherits_file)
            .map_err(Error::io("write to a new master"))?;
        let channel = (CHANNEL.to_owned(), OwnedFd::from(theirs));
        let settings = Settings::default()
            .exec(program)
            .args(self.0.program.args.clone())
            .listen_fds([channel].into_iter().chain(listeners))
            .detached(true)
            // A signal to the process group stops both masters.
            .setsid(false);
        // The workers of a pool do not inherit these variables, but the new master is the service.
        let variables = ["NOTIFY_SOCKET", "WATCHDOG_USEC"];
        let variables = variables.map(|name| Some((name, std::env::var_os(name)?)));
        let new_master =
            master.fork_as(SpawnOptions::new(settings).envs(variables.into_iter().flatten()))?;
        self.watch_new_master(master, &new_master, ours)
            .inspect_err(|_| new_master.process().kill(Signal::KILL))
    }

    /// Returns copies of the listeners, with their names.
    fn copy_listeners(&self) -> Result<Vec<(String, OwnedFd)>> {
        let mut copies = Vec::new();
        for PoolListener { listener, name } in &*self.0.listeners.borrow() {
            let copy = listener.as_fd().try_clone_to_owned();
            let copy = copy.map_err(Error::io("copy a listener for a new master"))?;
            let name = name.clone().unwrap_or_else(|| UNNAMED_LISTENER.to_owned());
            copies.push((name, copy));
        }
        Ok(copies)
    }

    /// Reports to the core when the new master takes over or exits.
    fn watch_new_master(
        &self,
        master: &Master,
        new_master: &WorkerProcess,
        channel: UnixStream,
    ) -> Result<()> {
        let pool = self.clone();
        let on_readable = move |master: &Master, mut channel: &UnixStream| {
            // End-of-file is no failure: the exit of the process, or the deadline, ends the upgrade.
            if matches!(channel.read(&mut [0]), Ok(1)) {
                pool.input(master, Core::new_master_took_over);
            }
            None
        };
        let watch = master.watch(channel, Interest::Readable, on_readable)?;
        self.0.upgrade_channel.set(Some(watch));
        let pool = self.clone();
        new_master.on_exit(move |master, new_master, status| {
            let id = new_master.id();
            pool.0.new_masters.borrow_mut().remove(&id);
            pool.input(master, |core, _| core.new_master_exited(id, status));
        });
        let id = new_master.id();
        let mut new_masters = self.0.new_masters.borrow_mut();
        new_masters.insert(id, new_master.clone());
        drop(new_masters);
        self.input(master, |core, now| core.new_master_started(id, now));
        Ok(())
    }

    /// Leaves the socket files of the listeners to the new master.
    pub(super) fn release_socket_files(&self) {
        for PoolListener { listener, .. } in &*self.0.listeners.borrow() {
            // Not to remove a file cannot fail.
            let _ = listener.set_removes_file(false);
        }
    }

    /// Sends SIGTERM to a new master, and keeps the loop running until it has exited.
    pub(super) fn terminate_new_master(&self, new_master: WorkerId) {
        if let Some(new_master) = self.0.new_masters.borrow().get(&new_master) {
            new_master.process().reference();
            new_master.process().kill(Signal::TERM);
        }
    }
}
