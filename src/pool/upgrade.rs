//! How one master takes over from another.
//!
//! The predecessor starts its successor with copies of its listeners, the way systemd passes them, and
//! with one end of a socketpair as standard input. Both may accept then, as they have the same sockets.
//! When enough workers of the successor are ready, that one writes a byte, and the predecessor leaves.
//! If it ends before, or does not write in time, it is killed, and nothing has changed.

use std::io::{self, Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use cluster::systemd::ListenFd;
use cluster::{
    Error, Interest, Master, Result, Settings, Signal, Stdio, TimerId, WatchId, WorkerProcess,
};

use super::Pool;
use super::event::PoolEvent;

/// Tells a successor who its predecessor is. Whoever finds it and has another parent is somebody else:
/// a worker, or a program that one of them has started.
const PREDECESSOR: &str = "CLUSTER_PREDECESSOR";

/// What a predecessor calls the listeners that it leaves with their files.
const LEFT: &str = "cluster-left";

/// The byte by which a successor says that it serves.
const SERVES: u8 = b'S';

/// The program that this process is, as it was found when the pool was made: the file may have been
/// replaced since then.
#[derive(Debug)]
pub(super) struct OwnProgram {
    path: io::Result<PathBuf>,
    args: Vec<std::ffi::OsString>,
}

impl OwnProgram {
    pub(super) fn new() -> Self {
        Self {
            path: std::env::current_exe(),
            args: std::env::args_os().skip(1).collect(),
        }
    }
}

/// A successor that has not said yet that it serves.
#[derive(Debug)]
pub(super) struct Upgrade {
    successor: WorkerProcess,
    watch: WatchId,
    timer: TimerId,
}

/// The standard input of a process that a predecessor has started.
pub(super) fn predecessor() -> Option<UnixStream> {
    let parent = std::env::var(PREDECESSOR).ok()?;
    let is_ours = parent == std::os::unix::process::parent_id().to_string();
    let input = || io::stdin().as_fd().try_clone_to_owned().ok();
    is_ours.then(input).flatten().map(UnixStream::from)
}

impl Pool {
    /// Tells the predecessor to leave, if there is one.
    pub(super) fn relieve(&self) {
        let Some(mut predecessor) = self.0.predecessor.take() else {
            return;
        };
        // It may have died, and then this is nobody's successor.
        let _ = predecessor.write_all(&[SERVES]);
        let listeners = self.0.listeners.borrow();
        for listener in self
            .0
            .left
            .take()
            .into_iter()
            .filter_map(|at| listeners.get(at))
        {
            // It may be gone, and nobody finds the way then.
            let _ = listener.set_removes_file(true);
        }
    }

    /// Adopts the listeners that this process was passed: by systemd, or by the master that it is to
    /// [take over](Self::upgrade) from. They outlive all workers, as those of [`listen`](Self::listen).
    ///
    /// Node has no counterpart. Workers get them by asking for their addresses. Call it before `listen`,
    /// which finds what was passed instead of opening it once more.
    ///
    /// # Errors
    ///
    /// [`Error::Descriptor`] if one of them is no listener; and as [`Master::listen`].
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
    pub fn adopt(&self, master: &Master, passed: Vec<ListenFd>) -> Result<()> {
        for passed in passed {
            let is_left = passed.name() == Some(LEFT) && self.0.predecessor.borrow().is_some();
            let listener = if passed.is_unix() {
                master.listen(UnixListener::try_from(passed)?)
            } else {
                master.listen(TcpListener::try_from(passed)?)
            }?;
            let mut listeners = self.0.listeners.borrow_mut();
            if is_left {
                self.0.left.borrow_mut().push(listeners.len());
            }
            listeners.push(listener);
        }
        Ok(())
    }

    /// Starts this program again, from the file that may be a new one now, and leaves when it serves:
    /// no client is refused meanwhile. The new master gets the listeners of [`listen`](Self::listen) and
    /// [`adopt`](Self::adopt) from [`systemd::listen_fds`](cluster::systemd::listen_fds), and forks workers of its own.
    ///
    /// Node has no counterpart. Ends in [`PoolEvent::Upgraded`], and then the pool stops; or in
    /// [`PoolEvent::UpgradeFailed`], if the new master ends, or has no [quorum](super::PoolOptions::quorum())
    /// of ready workers within [`boot`](super::PoolOptions::boot()) and
    /// [`trial`](super::PoolOptions::trial()) together. It is killed then, with its workers, and nothing
    /// has changed. The process id of the master is another one afterwards. One upgrade at a time:
    /// nothing happens if one is under way, or the pool stops.
    ///
    /// # Errors
    ///
    /// As [`Master::fork`]; [`Error::Io`] if the system has no descriptors left, or does not tell which
    /// program this is.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) -> cluster::Result<()> {
    /// pool.upgrade(master)?;
    /// # Ok(()) }
    /// ```
    pub fn upgrade(&self, master: &Master) -> Result<()> {
        if self.is_stopping() || self.0.upgrade.borrow().is_some() {
            return Ok(());
        }
        let failed = |attempt| move |source| Error::Io { attempt, source };
        let program = self.0.program.path.as_ref();
        let unknown = |error: &io::Error| Error::Io {
            attempt: "find the program of this process",
            source: error.kind().into(),
        };
        let program = program.map_err(unknown)?;
        let (ours, theirs) =
            UnixStream::pair().map_err(failed("make a channel to a new master"))?;
        let mut passed = Vec::new();
        for listener in &*self.0.listeners.borrow() {
            let copy = listener.as_fd().try_clone_to_owned();
            let copy = copy.map_err(failed("copy a listener for a new master"))?;
            let is_ours = listener.removes_file();
            passed.push((if is_ours { LEFT } else { "passed" }, copy));
        }
        let settings = Settings::default()
            .exec(program)
            .args(self.0.program.args.clone())
            .stdio([Stdio::fd(OwnedFd::from(theirs))])
            .listen_fds(passed)
            .detached(true);
        // What systemd tells the main process holds for the next one, too.
        let service = ["NOTIFY_SOCKET", "WATCHDOG_USEC"];
        let service = service.map(|name| Some((name, std::env::var_os(name)?)));
        let own = (PREDECESSOR, std::process::id().to_string().into());
        let env = service.into_iter().flatten().chain([own]);
        let successor = master.fork_as(settings, env)?;
        // It is to be there when this one has gone.
        successor.process().unref();
        self.await_successor(master, successor, ours)
    }

    /// Waits for its byte, its end, or the end of its time, whatever is first.
    fn await_successor(
        &self,
        master: &Master,
        successor: WorkerProcess,
        channel: UnixStream,
    ) -> Result<()> {
        let pool = self.clone();
        let hear = move |master: &Master, mut channel: &UnixStream| {
            // Its end is told by the process.
            if matches!(channel.read(&mut [0]), Ok(1)) {
                pool.end_upgrade(master, Ok(()));
            }
            None
        };
        let watch = master.watch(channel, Interest::Readable, hear)?;
        let pool = self.clone();
        let options = self.0.core.borrow().options().clone();
        let time = options.boot.saturating_add(options.trial);
        let timer = master.set_timeout(time, move |master| {
            pool.end_upgrade(master, Err("not ready in time".to_owned()));
        });
        let pool = self.clone();
        successor.on_exit(move |master, worker, status| {
            let awaited = pool.0.upgrade.borrow();
            let is_awaited = awaited.as_ref().is_some_and(|u| u.successor == *worker);
            drop(awaited);
            if is_awaited {
                pool.end_upgrade(master, Err(status.to_string()));
            }
        });
        let upgrade = Upgrade {
            successor,
            watch,
            timer,
        };
        self.0.upgrade.replace(Some(upgrade));
        Ok(())
    }

    /// Nothing happens if no upgrade is under way.
    pub(super) fn end_upgrade(&self, master: &Master, outcome: std::result::Result<(), String>) {
        let Some(upgrade) = self.0.upgrade.take() else {
            return;
        };
        master.unwatch(upgrade.watch);
        master.clear_timer(upgrade.timer);
        let event = match outcome {
            Ok(()) => {
                self.0.has_successor.set(true);
                for listener in &*self.0.listeners.borrow() {
                    // To leave a file cannot fail.
                    let _ = listener.set_removes_file(false);
                }
                self.stop(master);
                PoolEvent::Upgraded
            }
            Err(reason) => {
                upgrade.successor.process().kill(Signal::KILL);
                PoolEvent::UpgradeFailed { reason }
            }
        };
        self.tell(master, event);
    }
}
