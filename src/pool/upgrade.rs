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
use cluster::{
    Error, Interest, Master, Result, Settings, Signal, TimerId, WorkerId, WorkerProcess,
};

use super::core::Core;
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
        // The pool may have lost its quorum, or have been stopped, in this iteration of the loop:
        // `prove` is called when the event is delivered.
        if !self.has_quorum() {
            return;
        }
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
    /// than [`drain`](super::PoolOptions::drain()), or at once if the pool
    /// [stops at once](Self::stop_at_once); nothing has changed. The
    /// process id of the master is another one afterwards, so process 1 cannot upgrade; and a program
    /// has one pool. The new master is a [detached](Settings::detached()) process, and so it is not one of
    /// [`Master::workers`]. As with nginx and gunicorn, it stays in the session and the process group of
    /// this one: a signal to the process group, such as Ctrl-C in a terminal, reaches both masters. One upgrade at a time: nothing happens if one is under way, or the pool
    /// stops.
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
        if !self.0.core.borrow().can_upgrade() {
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
            .detached(true)
            // A signal to the process group (Ctrl-C, a supervisor) stops both masters, as with nginx
            // and gunicorn.
            .setsid(false);
        // What systemd tells the main process holds for the next one, too.
        let service = ["NOTIFY_SOCKET", "WATCHDOG_USEC"];
        let service = service.map(|name| Some((name, std::env::var_os(name)?)));
        let successor = master.fork_as(settings, service.into_iter().flatten())?;
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
                pool.input(master, Core::upgraded);
            }
            None
        };
        let watch = master.watch(channel, Interest::Readable, hear)?;
        self.0.upgrade.set(Some(watch));
        let pool = self.clone();
        successor.on_exit(move |master, successor, status| {
            let id = successor.id();
            pool.0.successors.borrow_mut().remove(&id);
            pool.input(master, |core, _| core.successor_exited(id, status));
        });
        let id = successor.id();
        let mut successors = self.0.successors.borrow_mut();
        successors.insert(id, successor.clone());
        drop(successors);
        self.input(master, |core, now| core.upgrading(id, now));
        Ok(())
    }

    /// The new master has the files of the listeners from now on.
    pub(super) fn hand_over(&self) {
        for kept in &*self.0.listeners.borrow() {
            // To leave a file cannot fail.
            let _ = kept.listener.set_removes_file(false);
        }
    }

    /// Asks a new master to leave. `run` waits for its exit.
    pub(super) fn dismiss(&self, successor: WorkerId) {
        if let Some(successor) = self.0.successors.borrow().get(&successor) {
            successor.process().ref_();
            successor.process().kill(Signal::TERM);
        }
    }
}

fn failed(attempt: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { attempt, source }
}
