//! How one master takes over from another.
//!
//! The predecessor starts its successor with copies of its listeners, the way systemd passes them, and
//! with one end of a socketpair as standard input. Both may accept then, as they have the same sockets.
//! When enough workers of the successor are ready, that one writes a byte, and the predecessor leaves.
//! If it ends before, or does not write in time, it is killed, and nothing has changed.

use std::cell::Cell;
use std::io::{self, Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::rc::Rc;

use cluster::systemd::ListenFd;
use cluster::{Error, Interest, Master, Result, Settings, Signal, Stdio, WorkerProcess};

use super::Pool;
use super::event::PoolEvent;

/// Tells a successor who its predecessor is. Whoever finds it and has another parent is somebody else:
/// a worker, or a program that one of them has started.
const PREDECESSOR: &str = "CLUSTER_PREDECESSOR";

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

/// The standard input of a process that a predecessor has started.
pub(super) fn predecessor() -> Option<UnixStream> {
    let parent = std::env::var(PREDECESSOR).ok()?;
    let is_ours = parent == std::os::unix::process::parent_id().to_string();
    let input = || io::stdin().as_fd().try_clone_to_owned().ok();
    is_ours.then(input).flatten().map(UnixStream::from)
}

/// Tells the predecessor to leave.
pub(super) fn relieve(mut predecessor: UnixStream) {
    // It may have died, and then this is nobody's successor.
    let _ = predecessor.write_all(&[SERVES]);
}

impl Pool {
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
            let listener = if passed.is_unix() {
                master.listen(UnixListener::try_from(passed)?)
            } else {
                master.listen(TcpListener::try_from(passed)?)
            };
            self.0.listeners.borrow_mut().push(listener?);
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
        if self.is_stopping() || self.0.upgrading.replace(true) {
            return Ok(());
        }
        let begun = self.begin_upgrade(master);
        self.0.upgrading.set(begun.is_ok());
        begun
    }

    fn begin_upgrade(&self, master: &Master) -> Result<()> {
        let failed = |attempt| move |source| Error::Io { attempt, source };
        let program = self.0.program.path.as_ref();
        let program = program
            .map_err(|error| failed("find the program of this process")(error.kind().into()))?;
        let (ours, theirs) =
            UnixStream::pair().map_err(failed("make a channel to a new master"))?;
        let mut passed = Vec::new();
        for listener in &*self.0.listeners.borrow() {
            let copy = listener.as_fd().try_clone_to_owned();
            let copy = copy.map_err(failed("copy a listener for a new master"))?;
            passed.push(("listener", copy));
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
        self.await_successor(master, &successor, ours)
    }

    /// Waits for a byte, for the end of the process, or for the end of its time, whatever is first.
    fn await_successor(
        &self,
        master: &Master,
        successor: &WorkerProcess,
        channel: UnixStream,
    ) -> Result<()> {
        let over = Rc::new(Cell::new(false));
        let end = {
            let (pool, over, successor) = (self.clone(), Rc::clone(&over), successor.clone());
            Rc::new(
                move |master: &Master, outcome: std::result::Result<(), String>| {
                    if !over.replace(true) {
                        pool.upgrade_ends(master, &successor, outcome);
                    }
                },
            )
        };
        let ended = Rc::clone(&end);
        successor.on_exit(move |master, _, status| ended(master, Err(status.to_string())));
        let options = self.0.core.borrow().options().clone();
        let late = Rc::clone(&end);
        let timer = master.set_timeout(options.boot.saturating_add(options.trial), move |master| {
            late(master, Err("not ready in time".to_owned()));
        });
        let hear = move |master: &Master, mut channel: &UnixStream| {
            let mut byte = [0];
            match channel.read(&mut byte) {
                Ok(1) if byte == [SERVES] => end(master, Ok(())),
                // Its end is told by the process.
                _ => {}
            }
            master.clear_timer(timer);
            None
        };
        master.watch(channel, Interest::Readable, hear)?;
        Ok(())
    }

    fn upgrade_ends(
        &self,
        master: &Master,
        successor: &WorkerProcess,
        outcome: std::result::Result<(), String>,
    ) {
        let event = match outcome {
            Ok(()) => {
                self.0.has_successor.set(true);
                self.stop(master);
                PoolEvent::Upgraded
            }
            Err(reason) => {
                self.0.upgrading.set(false);
                successor.process().kill(Signal::KILL);
                PoolEvent::UpgradeFailed { reason }
            }
        };
        self.tell(master, event);
    }
}
