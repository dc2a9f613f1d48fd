//! How one master takes over from another.
//!
//! The predecessor starts its successor with copies of its listeners and one end of a channel, the way
//! systemd passes them. Both may accept then, as they have the same sockets. When enough workers of the
//! successor have been ready for a while, it writes a byte, and the predecessor leaves. If it ends before,
//! or does not write in time, it is told to leave, and nothing has changed.

use std::io::{self, Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use cluster::systemd::ListenFd;
use cluster::{Error, Interest, Master, Result, Settings, Signal, TimerId, WatchId, WorkerProcess};

use super::event::PoolEvent;
use super::{Kept, Pool};

/// The name of the descriptor by which a successor talks to its predecessor. What can be read there is a
/// byte for each of the other descriptors: whether a file is left with it.
const CHANNEL: &str = "cluster-predecessor";
/// The name of those that nobody else has named.
const LISTENER: &str = "listener";

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
        let mut args = std::env::args_os();
        let name = args.next().map(PathBuf::from);
        // As it was called: a link on the way may lead to another release next time.
        let called = name.filter(|name| name.parent() != Some(Path::new("")));
        Self {
            path: called.map_or_else(std::env::current_exe, std::path::absolute),
            args: args.collect(),
        }
    }
}

/// Who is to be told that this process serves.
#[derive(Debug)]
pub(super) struct Predecessor {
    channel: UnixStream,
    /// Which of the listeners it leaves to this process with their files.
    left: Vec<usize>,
    /// Until then this process must have been ready all the time.
    trial: Option<TimerId>,
}

/// A successor that has not said yet that it serves.
#[derive(Debug)]
pub(super) struct Upgrade {
    successor: WorkerProcess,
    watch: WatchId,
    timer: TimerId,
}

impl Pool {
    /// A successor takes over when it has been ready for a while.
    pub(super) fn prove(&self, master: &Master, is_ready: bool) {
        let mut predecessor = self.0.predecessor.borrow_mut();
        let Some(predecessor) = predecessor.as_mut() else {
            return;
        };
        let unproved = predecessor.trial.take();
        unproved
            .into_iter()
            .for_each(|timer| master.clear_timer(timer));
        if is_ready {
            let pool = self.clone();
            let trial = self.0.core.borrow().options().trial;
            let relieve = move |master: &Master| pool.relieve(master);
            predecessor.trial = Some(master.set_timeout(trial, relieve));
        }
    }

    fn relieve(&self, master: &Master) {
        let Some(mut predecessor) = self.0.predecessor.take() else {
            return;
        };
        // It may have died, and then this is nobody's successor.
        let _ = predecessor.channel.write_all(&[SERVES]);
        let listeners = self.0.listeners.borrow();
        for kept in predecessor
            .left
            .into_iter()
            .filter_map(|at| listeners.get(at))
        {
            // It may be gone, and nobody finds the way then.
            let _ = kept.listener.set_removes_file(true);
        }
        drop(listeners);
        self.tell(master, PoolEvent::TookOver);
    }

    /// Adopts the listeners that this process was passed: by systemd, or by the master that it is to
    /// [take over](Self::upgrade) from. They outlive all workers, as those of [`listen`](Self::listen).
    ///
    /// Node has no counterpart. Workers get them by asking for their addresses. Call it before `listen`,
    /// which finds what was passed instead of opening it once more.
    ///
    /// # Errors
    ///
    /// [`Error::Descriptor`] if one of them is no listener; [`Error::Io`] if the channel to the master
    /// before is broken; and as [`Master::listen`].
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
        let mut flags = Vec::new();
        let channel = passed
            .iter()
            .position(|passed| passed.name() == Some(CHANNEL));
        if let Some(channel) = channel.map(|at| passed.remove(at)) {
            let mut channel = UnixStream::from(OwnedFd::from(channel));
            flags.resize(passed.len(), 0);
            // They were written before this process began.
            let read = channel.set_nonblocking(true);
            let read = read.and_then(|()| channel.read_exact(&mut flags));
            read.map_err(failed("hear from the master before"))?;
            self.0.predecessor.replace(Some(Predecessor {
                channel,
                left: Vec::new(),
                trial: None,
            }));
        }
        for (number, passed) in passed.into_iter().enumerate() {
            let name = passed.name().map(str::to_owned);
            let listener = if passed.is_unix() {
                master.listen(UnixListener::try_from(passed)?)
            } else {
                master.listen(TcpListener::try_from(passed)?)
            }?;
            let mut listeners = self.0.listeners.borrow_mut();
            if let Some(predecessor) = self.0.predecessor.borrow_mut().as_mut() {
                let is_left = flags.get(number) == Some(&1);
                predecessor.left.extend(is_left.then_some(listeners.len()));
            }
            listeners.push(Kept { listener, name });
        }
        Ok(())
    }

    /// Starts this program again, from the file that may be a new one now, and leaves when it serves:
    /// no client is refused meanwhile. The new master calls [`adopt`](Self::adopt), which it must, gets
    /// the listeners of this one, and forks workers of its own.
    ///
    /// Node has no counterpart. The program is the one of this process, as it was called if that was by a
    /// path, with the same arguments. Ends in [`PoolEvent::Upgraded`], and then the pool stops; or in
    /// [`PoolEvent::UpgradeFailed`], if the new master ends, or has not had a
    /// [quorum](super::PoolOptions::quorum()) of ready workers for the time of
    /// [`trial`](super::PoolOptions::trial()) when [`boot`](super::PoolOptions::boot()) and twice `trial`
    /// are over, or if this pool stops. It gets SIGTERM then, and SIGKILL if it takes longer to leave
    /// than [`drain`](super::PoolOptions::drain()); nothing has changed. The
    /// process id of the master is another one afterwards, so process 1 cannot upgrade; and a program
    /// has one pool. Meanwhile the new master is one of [`Master::workers`], with its events. One upgrade
    /// at a time: nothing happens if one is under way, or the pool stops.
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
        let program = self.0.program.path.as_ref();
        let unknown = |error: &io::Error| error.kind().into();
        let program =
            program.map_err(|error| failed("find the program of this process")(unknown(error)))?;
        let channel = UnixStream::pair().map_err(failed("make a channel to a new master"))?;
        let (mut ours, theirs) = channel;
        let mut passed = vec![(CHANNEL.to_owned(), OwnedFd::from(theirs))];
        let mut flags = Vec::new();
        for kept in &*self.0.listeners.borrow() {
            let copy = kept.listener.as_fd().try_clone_to_owned();
            let copy = copy.map_err(failed("copy a listener for a new master"))?;
            let name = kept.name.clone().unwrap_or_else(|| LISTENER.to_owned());
            passed.push((name, copy));
            flags.push(u8::from(kept.listener.removes_file()));
        }
        ours.write_all(&flags)
            .map_err(failed("speak to a new master"))?;
        let settings = Settings::default()
            .exec(program)
            .args(self.0.program.args.clone())
            .listen_fds(passed)
            .detached(true);
        // What systemd tells the main process holds for the next one, too.
        let service = ["NOTIFY_SOCKET", "WATCHDOG_USEC"];
        let service = service.map(|name| Some((name, std::env::var_os(name)?)));
        let successor = master.fork_as(settings, service.into_iter().flatten())?;
        // It is to be there when this one has gone.
        successor.process().unref();
        self.await_successor(master, &successor, ours)
            .inspect_err(|_| {
                successor.process().kill(Signal::KILL);
            })
    }

    /// Waits for its byte, its end, or the end of its time, whatever is first.
    fn await_successor(
        &self,
        master: &Master,
        successor: &WorkerProcess,
        channel: UnixStream,
    ) -> Result<()> {
        let pool = self.clone();
        let hear = move |master: &Master, mut channel: &UnixStream| {
            // Without a word, its time goes on: its end is told by the process.
            if matches!(channel.read(&mut [0]), Ok(1)) {
                pool.end_upgrade(master, Ok(()));
            }
            None
        };
        let watch = master.watch(channel, Interest::Readable, hear)?;
        let pool = self.clone();
        let options = self.0.core.borrow().options().clone();
        // Its own trial begins when it is ready, and that may be at the last moment.
        let time = options.boot.saturating_add(options.trial.saturating_mul(2));
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
        let successor = successor.clone();
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
                for kept in &*self.0.listeners.borrow() {
                    // To leave a file cannot fail.
                    let _ = kept.listener.set_removes_file(false);
                }
                self.stop(master);
                PoolEvent::Upgraded
            }
            Err(reason) => {
                self.dismiss(master, &upgrade.successor);
                PoolEvent::UpgradeFailed { reason }
            }
        };
        self.tell(master, event);
    }
}

impl Pool {
    /// It may have clients already: like a pool's workers, it is asked first.
    fn dismiss(&self, master: &Master, successor: &WorkerProcess) {
        if successor.is_dead() {
            return;
        }
        successor.process().ref_();
        successor.process().kill(Signal::TERM);
        let late = successor.clone();
        let drain = self.0.core.borrow().options().drain;
        let timer = master.set_timeout(drain, move |_| late.process().kill(Signal::KILL));
        successor.on_exit(move |master, _, _| master.clear_timer(timer));
    }
}

fn failed(attempt: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { attempt, source }
}
