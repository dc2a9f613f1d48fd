//! Master or worker: which of them this process is.

use std::os::fd::{AsFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::config::settings::{
    CHANNEL_FD, INSPECT_PORT, SCHED_POLICY, SchedulingPolicy, UNIQUE_ID, WORKER_PID, WRAPPED,
};
use crate::error::{Error, Result};
use crate::master::Master;
use crate::sys;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::{FrameError, PREAMBLE_LENGTH, VERSION, preamble, preamble_version};
use crate::worker::Worker;

const UNKNOWN: u8 = 0;
const MASTER: u8 = 1;
const WORKER: u8 = 2;
/// A master that a forking wrapper separates from its own master.
const WRAPPED_MASTER: u8 = 3;

static ROLE: AtomicU8 = AtomicU8::new(UNKNOWN);

/// What this process is in its cluster.
///
/// Node: `cluster.isMaster` and `cluster.isWorker`. See [`init`] for an example.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one in a process")]
pub enum Role {
    /// The process that forks workers. Newer versions of Node say *primary*.
    Master(Master),
    /// A process that a master forked.
    Worker(Worker),
}

/// Finds out what this process is, and gives it the means.
///
/// Node: loading the module, with `cluster.isMaster`. Call it once, early in `main`: before anything
/// that a worker must not do. In a worker, the master has its `online` event after this.
///
/// A process is a worker if `CLUSTER_WORKER_PID` is its own process id. The variables stay in the
/// environment. Programs that a worker starts inherit them, but have another process id, and are masters.
/// So is the program of a worker behind a wrapper that forks, such as `sh -c 'program; true'`. If this master
/// starts such a wrapper in its turn, `init` is an error there, because otherwise masters would start
/// masters without end. A wrapper that executes the program in its own place, such as `env`, `nice` or
/// `sh -c 'exec program'`, changes nothing. A worker that executes its own program once more is an error: it has lost its channel.
///
/// On Linux, a worker is killed when its master ends. For a program with file capabilities or a
/// set-user-ID bit, `execve` clears what the master has arranged, and `init` arranges it again
/// (prctl(2), `PR_SET_PDEATHSIG`). If the master has ended before, `accept` and
/// [`run`](Worker::run) return at once.
///
/// A child that the application forks, and that executes nothing, has copies of all handles. It may drop
/// them, which closes its copies of their descriptors and nothing else. Methods that would reach the
/// master, a worker, a client that waits, or the loop are [`Error::ForeignProcess`] there, or do nothing
/// if they return no [`Result`]. A [`Connection`](crate::Connection) is the child's to read and write,
/// and [`UdpSocket::send_to`](crate::UdpSocket::send_to) sends.
///
/// # Errors
///
/// - [`Error::AlreadyInitialized`] at the second call;
/// - [`Error::Environment`] if `CLUSTER_SCHED_POLICY` is neither `rr` nor `none`; if
///   `CLUSTER_WORKER_PID`, and for the process that it names `CLUSTER_UNIQUE_ID`,
///   `CLUSTER_CHANNEL_FD` and `CLUSTER_INSPECT_PORT`, are not what a master sets: a descriptor that is no
///   channel to one stays as it is; or if wrappers have forked both this program and its master's;
/// - [`Error::Frame`] if the master was built with another version of this crate;
/// - [`Error::Io`] if the system has no descriptors left for a poller.
///
/// ```no_run
/// use cluster::Role;
///
/// fn main() -> cluster::Result<()> {
///     match cluster::init()? {
///         Role::Master(master) => {
///             master.fork()?;
///             master.run()
///         }
///         Role::Worker(worker) => {
///             println!("I am worker {}", worker.id());
///             Ok(())
///         }
///     }
/// }
/// ```
pub fn init() -> Result<Role> {
    let identity = identity()?;
    let role = match identity {
        Identity::Master => MASTER,
        Identity::WrappedMaster => WRAPPED_MASTER,
        Identity::Worker { .. } => WORKER,
    };
    let first = ROLE.compare_exchange(UNKNOWN, role, Ordering::SeqCst, Ordering::SeqCst);
    if first.is_err() {
        return Err(Error::AlreadyInitialized);
    }
    match identity {
        Identity::Master | Identity::WrappedMaster => Ok(Role::Master(Master::new(policy()?)?)),
        Identity::Worker { id, number } => {
            let port = inspect_port()?;
            let channel = channel(id, number)?;
            sys::parent_death_signal::renew(channel.as_fd());
            Ok(Role::Worker(Worker::new(id, port, channel)?))
        }
    }
}

/// In a child that its master has forked and that executes nothing: makes it the worker that `init`
/// would have found.
pub(crate) fn become_worker(id: WorkerId, port: Option<u16>, number: RawFd) -> Result<Worker> {
    ROLE.store(WORKER, Ordering::SeqCst);
    Worker::new(id, port, channel(id, number)?)
}

/// Whether the programs that this master starts are marked with `CLUSTER_WRAPPED`.
pub(crate) fn is_wrapped_master() -> bool {
    ROLE.load(Ordering::SeqCst) == WRAPPED_MASTER
}

/// The first bytes in a socket, if there are as many as a master writes into a channel.
fn peek_preamble(number: RawFd) -> Option<[u8; PREAMBLE_LENGTH]> {
    let mut found = [0; PREAMBLE_LENGTH];
    let read = sys::fd::peek(number, &mut found);
    matches!(read, Ok(PREAMBLE_LENGTH)).then_some(found)
}

/// Takes over the channel, if it is one: what a master has written there says so.
fn channel(id: WorkerId, number: RawFd) -> Result<UnixStream> {
    let found = peek_preamble(number);
    if let Some(mut found) = found.filter(|found| *found == preamble(id)) {
        let attempt = "take over the channel to the master";
        return sys::fd::adopt_channel(number, &mut found).map_err(Error::io(attempt));
    }
    let version = found.and_then(preamble_version);
    match version.filter(|version| *version != VERSION) {
        Some(version) => Err(Error::Frame {
            worker: None,
            source: FrameError::Version(version),
        }),
        None => Err(Error::Environment {
            variable: CHANNEL_FD,
            value: number.to_string(),
            expected: "the descriptor of a channel to a master",
        }),
    }
}

/// The role that the environment gives to this process.
enum Identity {
    Master,
    /// It has inherited the channel of a worker, which is its wrapper.
    WrappedMaster,
    /// `number` is that of the channel's descriptor.
    Worker {
        id: WorkerId,
        number: RawFd,
    },
}

/// Reads the variables that a master sets. They are for the process that `CLUSTER_WORKER_PID` names, and
/// not for programs that it starts, which inherit them.
fn identity() -> Result<Identity> {
    let number = |variable| {
        let value = std::env::var_os(variable).unwrap_or_default();
        let value = value.to_string_lossy().into_owned();
        match value.parse::<u32>() {
            Ok(number) => Ok(number),
            Err(_) => Err(Error::Environment {
                variable,
                value,
                expected: "a number set by a master",
            }),
        }
    };
    if std::env::var_os(WORKER_PID).is_none() {
        return Ok(Identity::Master);
    }
    let pid = number(WORKER_PID)?;
    // Beyond what a descriptor can be, it is one that is not open.
    let descriptor = |channel| RawFd::try_from(channel).unwrap_or(RawFd::MAX);
    if pid == std::process::id() {
        let id = WorkerId::new(number(UNIQUE_ID)?);
        let number = descriptor(number(CHANNEL_FD)?);
        return Ok(Identity::Worker { id, number });
    }
    // A worker reads the preamble in `init`, and no program that it starts then inherits the channel.
    let (Ok(id), Ok(channel)) = (number(UNIQUE_ID), number(CHANNEL_FD)) else {
        return Ok(Identity::Master);
    };
    if peek_preamble(descriptor(channel)) != Some(preamble(WorkerId::new(id))) {
        return Ok(Identity::Master);
    }
    if std::env::var_os(WRAPPED).is_some() {
        return Err(Error::Environment {
            variable: WORKER_PID,
            value: pid.to_string(),
            expected: "the process id of this program, whose wrapper must execute it, and not fork",
        });
    }
    Ok(Identity::WrappedMaster)
}

/// Reads the variable by which a worker knows its inspect port.
fn inspect_port() -> Result<Option<u16>> {
    let Some(value) = std::env::var_os(INSPECT_PORT) else {
        return Ok(None);
    };
    let value = value.to_string_lossy().into_owned();
    match value.parse() {
        Ok(port) => Ok(Some(port)),
        Err(_) => Err(Error::Environment {
            variable: INSPECT_PORT,
            value,
            expected: "a port set by a master",
        }),
    }
}

fn policy() -> Result<SchedulingPolicy> {
    let Some(value) = std::env::var_os(SCHED_POLICY) else {
        return Ok(SchedulingPolicy::default());
    };
    let value = value.to_string_lossy().into_owned();
    value.parse().map_err(|_| Error::Environment {
        variable: SCHED_POLICY,
        value,
        expected: "\"rr\" or \"none\"",
    })
}

/// Returns whether this process is a master, that is, whether it was not forked by one.
///
/// Node: `cluster.isMaster`. Can be called at any time, also before [`init`]. A child that the
/// application forks inherits the answer.
///
/// ```
/// assert!(cluster::is_master());
/// ```
#[must_use]
pub fn is_master() -> bool {
    !is_worker()
}

/// Returns whether this process was forked by a master.
///
/// Node: `cluster.isWorker`. Can be called at any time, also before [`init`]. A child that the
/// application forks inherits the answer.
///
/// ```
/// assert!(!cluster::is_worker());
/// ```
#[must_use]
pub fn is_worker() -> bool {
    match ROLE.load(Ordering::SeqCst) {
        UNKNOWN => std::env::var(WORKER_PID).is_ok_and(|pid| pid.parse() == Ok(std::process::id())),
        role => role == WORKER,
    }
}

/// Returns how many workers this machine can run at once: the number of cores that this process
/// may use, at least 1.
///
/// Node: `os.cpus().length`. Can be called at any time.
///
/// ```
/// assert!(cluster::available_parallelism() >= 1);
/// ```
#[must_use]
pub fn available_parallelism() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
