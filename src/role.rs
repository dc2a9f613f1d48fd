//! Master or worker: which of them this process is.

use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::error::{Error, Result};
use crate::frame::{FrameError, VERSION, WELCOME_LENGTH, version_of_welcome, welcome};
use crate::master::Master;
use crate::settings::{CHANNEL_FD, INSPECT_PORT, SCHED_POLICY, SchedulingPolicy, UNIQUE_ID};
use crate::sys;
use crate::worker::Worker;
use crate::worker_id::WorkerId;

const UNKNOWN: u8 = 0;
const MASTER: u8 = 1;
const WORKER: u8 = 2;

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
/// Node: loading the module, with `cluster.isMaster`. Call it once, first thing in `main`: before
/// the program starts threads, because it removes from the environment the variables by which a
/// worker knows itself (so that a worker's own children are not workers), and before anything
/// that a worker must not do. In a worker, the master has its `online` event after this.
///
/// # Errors
///
/// - [`Error::AlreadyInitialized`] at the second call;
/// - [`Error::Environment`] if `CLUSTER_SCHED_POLICY` is neither `rr` nor `none`, or if
///   `CLUSTER_UNIQUE_ID`, `CLUSTER_CHANNEL_FD` and `CLUSTER_INSPECT_PORT` are not what a master
///   sets: a descriptor that is no channel to one stays as it is;
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
    let worker = identity()?;
    let role = if worker.is_some() { WORKER } else { MASTER };
    let first = ROLE.compare_exchange(UNKNOWN, role, Ordering::SeqCst, Ordering::SeqCst);
    if first.is_err() {
        return Err(Error::AlreadyInitialized);
    }
    match worker {
        None => Ok(Role::Master(Master::new(policy()?)?)),
        Some((id, number)) => {
            let port = inspect_port()?;
            Ok(Role::Worker(Worker::new(id, port, channel(id, number)?)?))
        }
    }
}

/// In a child that its master has forked and that executes nothing: makes it the worker that `init`
/// would have found.
pub(crate) fn become_worker(id: WorkerId, port: Option<u16>, number: RawFd) -> Result<Worker> {
    ROLE.store(WORKER, Ordering::SeqCst);
    for variable in [UNIQUE_ID, CHANNEL_FD, INSPECT_PORT] {
        sys::env::take(variable);
    }
    Worker::new(id, port, channel(id, number)?)
}

/// Takes over the channel, if it is one: what a master has written there says so.
fn channel(id: WorkerId, number: RawFd) -> Result<UnixStream> {
    let mut found = [0; WELCOME_LENGTH];
    let read = sys::fd::peek(number, &mut found);
    let found_all = matches!(read, Ok(WELCOME_LENGTH));
    if found_all && found == welcome(id) {
        let attempt = "take over the channel to the master";
        return sys::fd::adopt_channel(number, &mut found).map_err(Error::io(attempt));
    }
    match version_of_welcome(found).filter(|version| found_all && *version != VERSION) {
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

/// Reads and removes the variables that a master sets.
fn identity() -> Result<Option<(WorkerId, RawFd)>> {
    let (id, channel) = (sys::env::take(UNIQUE_ID), sys::env::take(CHANNEL_FD));
    if id.is_none() && channel.is_none() {
        return Ok(None);
    }
    let number = |variable, value: Option<std::ffi::OsString>| {
        let value = value.unwrap_or_default().to_string_lossy().into_owned();
        match value.parse::<u32>() {
            Ok(number) => Ok(number),
            Err(_) => Err(Error::Environment {
                variable,
                value,
                expected: "a number set by a master",
            }),
        }
    };
    let id = WorkerId::new(number(UNIQUE_ID, id)?);
    let channel = number(CHANNEL_FD, channel)?;
    // Beyond what a descriptor can be, it is one that is not open.
    Ok(Some((id, RawFd::try_from(channel).unwrap_or(RawFd::MAX))))
}

/// Reads and removes the variable by which a worker knows its inspect port.
fn inspect_port() -> Result<Option<u16>> {
    let Some(value) = sys::env::take(INSPECT_PORT) else {
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
/// Node: `cluster.isMaster`. Anyone may ask at any time, also before [`init`].
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
/// Node: `cluster.isWorker`. Anyone may ask at any time, also before [`init`].
///
/// ```
/// assert!(!cluster::is_worker());
/// ```
#[must_use]
pub fn is_worker() -> bool {
    match ROLE.load(Ordering::SeqCst) {
        UNKNOWN => std::env::var_os(UNIQUE_ID).is_some(),
        role => role == WORKER,
    }
}

/// Returns how many workers this machine can run at once: the number of cores that this process
/// may use, at least 1.
///
/// Node: `os.cpus().length`. Anyone may ask at any time.
///
/// ```
/// assert!(cluster::available_parallelism() >= 1);
/// ```
#[must_use]
pub fn available_parallelism() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
