//! Determines whether this process is a master or a worker.

use std::ffi::OsString;
use std::os::fd::{AsFd as _, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::config::env::{CHANNEL_FD, INSPECT_PORT, SCHED_POLICY, UNIQUE_ID, WORKER_PID, WRAPPED};
use crate::error::{Error, Result};
use crate::master::{Launch, Master};
use crate::sys;
use crate::sys::channel::AdoptedChannel;
use crate::types::policy::SchedulingPolicy;
use crate::types::protocol::{FrameError, VERSION};
use crate::types::worker_id::WorkerId;
use crate::wire::frame::preamble::{PREAMBLE_LENGTH, preamble, preamble_version};
use crate::worker::Worker;

const UNKNOWN: u8 = 0;
const MASTER: u8 = 1;
const WORKER: u8 = 2;

static ROLE: AtomicU8 = AtomicU8::new(UNKNOWN);

/// The role of this process in its cluster.
///
/// Node: `cluster.isMaster` and `cluster.isWorker`.
///
/// Use the contained handle only on the thread that called [`init`]. See [`init`] for an example.
#[doc(alias = "isMaster")]
#[doc(alias = "isPrimary")]
#[doc(alias = "isWorker")]
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a process has one value")]
pub enum Role {
    /// The process that forks workers. Newer versions of Node call it the *primary*.
    Master(Master),
    /// A process that a master forked, with a channel to the master.
    Worker(Worker),
}

/// Determines the role of this process, and returns the handle for that role.
///
/// Node: loading the `cluster` module.
///
/// Call `init` once, early in `main`, before any code that a worker must not run. In a worker, the
/// call makes the master emit the `online` event.
///
/// Only a process that a master has started is a worker. The programs that a worker starts are
/// masters, and may have workers of their own. These programs inherit the variables that a master
/// sets for its worker, because `init` does not remove the variables from the environment. The
/// variables do not make such a program a worker, even in a nested PID namespace, where the program
/// may have the worker's process id.
///
/// A wrapper that replaces itself with the program, such as `env`, `nice` or
/// `sh -c 'exec program'`, changes nothing, because the process stays the same. If a master starts
/// a program through a forking wrapper, such as `sh -c 'program; true'`, the wrapper is the
/// master's child, and the program is a master. If that program starts the same program with the
/// same arguments through a forking wrapper again, `init` fails in the new program. Without this
/// check, masters would start masters without end.
///
/// If a worker replaces itself with its own program (execve(2)) after `init`, `init` fails in the
/// new program, because the process has lost its channel.
///
/// In a master, `init` also determines the path of the master's program, which is the default of
/// [`Settings::exec`](crate::Settings::exec()). Call `init` before the process changes its working
/// directory.
///
/// On Linux, the kernel kills a worker when its master exits, because the worker requests this
/// signal before it executes its program (prctl(2), `PR_SET_PDEATHSIG`). For a program with file
/// capabilities or a set-user-ID bit, `execve` clears the request, so `init` repeats it. If the
/// master has already exited, `accept` and [`run`](Worker::run) return at once.
///
/// If the application forks a child that executes no program, the child has copies of all handles.
/// The child may drop these copies, which only closes its copies of the descriptors. Methods that
/// would reach the master, a worker, a waiting client, or the loop return [`Error::ForeignProcess`]
/// in the child. If such a method returns no [`Result`], the call has no effect. The child may read
/// and write a [`Connection`](crate::Connection) and call
/// [`UdpSocket::send_to`](crate::UdpSocket::send_to).
///
/// # Errors
///
/// Returns:
///
/// - [`Error::AlreadyInitialized`] if `init` has already been called in this process;
/// - [`Error::Environment`] if `CLUSTER_WORKER_PID` is set but is not a number;
/// - [`Error::Environment`] in a master if `CLUSTER_SCHED_POLICY` is not a [`SchedulingPolicy`];
/// - [`Error::Environment`] in a worker if `CLUSTER_UNIQUE_ID`, `CLUSTER_CHANNEL_FD` or
///   `CLUSTER_INSPECT_PORT` is not a value that a master sets. If `CLUSTER_CHANNEL_FD` is the
///   number of a descriptor that is not a channel to a master, that descriptor stays unchanged;
/// - [`Error::Environment`] if this program and its master's program have the same command line,
///   and both were started through forking wrappers;
/// - [`Error::Frame`] if the master was built with a version of this crate that has another
///   protocol;
/// - [`Error::Io`] if the system has no descriptors left for the event loop, or if the channel to
///   the master cannot be set up.
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
        Identity::Master | Identity::WrappedMaster { .. } => MASTER,
        Identity::Worker { .. } => WORKER,
    };
    let first = ROLE.compare_exchange(UNKNOWN, role, Ordering::SeqCst, Ordering::SeqCst);
    if first.is_err() {
        return Err(Error::AlreadyInitialized);
    }
    match identity {
        Identity::Master => new_master(None),
        Identity::WrappedMaster { command } => new_master(Some(command)),
        Identity::Worker { id, number } => {
            let port = inspect_port()?;
            let channel = channel(id, number)?;
            sys::parent_death_signal::renew(channel.stream.as_fd());
            Ok(Role::Worker(Worker::new(id, port, channel)?))
        }
    }
}

fn new_master(wrapped: Option<u64>) -> Result<Role> {
    let launch = Launch {
        own_program: sys::own_program::own_program(),
        wrapper_script: sys::own_program::wrapper_script(),
        become_worker,
        wrapped,
    };
    Ok(Role::Master(Master::new(policy()?, launch)?))
}

/// Makes this process a worker. The process is a child that its master forked and that executes no
/// program. `number` is the descriptor number of its channel.
fn become_worker(id: WorkerId, port: Option<u16>, number: RawFd) -> Result<Worker> {
    ROLE.store(WORKER, Ordering::SeqCst);
    Worker::new(id, port, channel(id, number)?)
}

/// Returns the first bytes in a socket without removing them. Returns `None` if the socket contains
/// fewer bytes than a preamble, or if the descriptor is not a socket. The caller must check whether
/// the bytes are a preamble.
fn peek_preamble(number: RawFd) -> Option<[u8; PREAMBLE_LENGTH]> {
    let mut found = [0; PREAMBLE_LENGTH];
    let read = sys::fd::peek(number, &mut found);
    matches!(read, Ok(PREAMBLE_LENGTH)).then_some(found)
}

/// Takes ownership of the channel if the socket contains the preamble that the master sends to this
/// worker. Also returns the preamble's descriptors. If there is no such preamble, returns an error
/// and leaves the descriptor unchanged.
fn channel(id: WorkerId, number: RawFd) -> Result<AdoptedChannel> {
    let found = peek_preamble(number);
    if let Some(mut found) = found.filter(|found| *found == preamble(id)) {
        let attempt = "take over the channel to the master";
        let adopted = sys::channel::adopt(number, &mut found);
        return adopted.map_err(Error::io(attempt));
    }
    let version = found.and_then(preamble_version);
    match version.filter(|version| *version != VERSION) {
        Some(version) => Err(Error::Frame {
            worker: None,
            reason: FrameError::Version(version),
        }),
        None => Err(Error::Environment {
            variable: CHANNEL_FD,
            value: number.to_string(),
            expected: "the descriptor of a channel to a master",
        }),
    }
}

/// The role that the environment assigns to this process.
enum Identity {
    Master,
    /// A master that a forking wrapper has started. Another master started the wrapper as a worker,
    /// and this process has inherited the wrapper's channel. `command` is a hash of this process's
    /// command line.
    WrappedMaster {
        command: u64,
    },
    /// A worker. `number` is the descriptor number of its channel.
    Worker {
        id: WorkerId,
        number: RawFd,
    },
}

/// Reads a variable whose value is a number that a master has set.
fn parse_variable(variable: &'static str) -> Result<u32> {
    let value = std::env::var_os(variable).unwrap_or_default();
    let value = value.to_string_lossy().into_owned();
    match value.parse() {
        Ok(number) => Ok(number),
        Err(_) => Err(Error::Environment {
            variable,
            value,
            expected: "a number set by a master",
        }),
    }
}

/// Reads the variables that a master sets, and returns the role of this process.
///
/// The programs that a worker starts inherit the variables, but the variables apply only to the
/// process that the master has started. A process id alone does not identify that process, because
/// a program in a nested PID namespace may have the same id.
fn identity() -> Result<Identity> {
    if std::env::var_os(WORKER_PID).is_none() {
        return Ok(Identity::Master);
    }
    let pid = parse_variable(WORKER_PID)?;
    // A value that is too large for a descriptor number becomes `RawFd::MAX`. No descriptor has
    // that number, so `peek_preamble` finds nothing.
    let descriptor = |channel| RawFd::try_from(channel).unwrap_or(RawFd::MAX);
    let id = parse_variable(UNIQUE_ID).map(WorkerId::new);
    let channel = parse_variable(CHANNEL_FD).map(descriptor);
    // A worker that calls `init` removes the preamble from its channel and makes the channel
    // close-on-exec. If the preamble is still there, but another process owns the channel, then the
    // owner is only a wrapper, such as a shell, that has started this program. `None` means that
    // there is no channel with a preamble.
    let owns_unread = match channel {
        Ok(number) => peek_preamble(number)
            .and_then(preamble_version)
            .map(|_| sys::channel::is_owned(number)),
        Err(_) => None,
    };
    // A worker that has lost its channel still has the request for SIGKILL at its master's exit.
    // Its children do not inherit that request, so the request distinguishes the worker from them.
    let is_executed = || pid == std::process::id() && sys::parent_death_signal::is_requested();
    match owns_unread {
        Some(false) => wrapped_master(pid),
        None if !is_executed() => Ok(Identity::Master),
        Some(true) | None => Ok(Identity::Worker {
            id: id?,
            number: channel?,
        }),
    }
}

/// The hash of no bytes by FNV-1a with 64 bits.
const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;

/// Continues the hash of a command line with one argument and a zero byte. FNV-1a is enough to tell
/// command lines apart, and a tenth of the size of the standard library's hasher.
#[allow(clippy::needless_pass_by_value)]
fn hash_argument(hash: u64, argument: OsString) -> u64 {
    let bytes = argument.as_bytes().iter().chain(&[0]);
    bytes.fold(hash, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// Returns the role of a program that a forking wrapper has started. `wrapper` is the wrapper's
/// process id.
///
/// # Errors
///
/// Returns an error if the master that started the wrapper is also a wrapped program with the same
/// command line. Each master would otherwise start another one.
fn wrapped_master(wrapper: u32) -> Result<Identity> {
    let command = std::env::args_os().fold(FNV_BASIS, hash_argument);
    if std::env::var_os(WRAPPED).is_some_and(|mark| mark == *command.to_string()) {
        return Err(Error::Environment {
            variable: WORKER_PID,
            value: wrapper.to_string(),
            expected: "the process id of this program: its wrapper must execute it and not fork",
        });
    }
    Ok(Identity::WrappedMaster { command })
}

/// Reads the worker's inspect port from the environment.
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

/// Reads the policy that `CLUSTER_SCHED_POLICY` selects. Returns `None` if the variable is not set, or
/// is empty, as after `CLUSTER_SCHED_POLICY=${POLICY}` without the other variable.
fn policy() -> Result<Option<SchedulingPolicy>> {
    let value = std::env::var_os(SCHED_POLICY).filter(|value| !value.is_empty());
    let Some(value) = value else {
        return Ok(None);
    };
    let value = value.to_string_lossy().into_owned();
    let policy = value.parse().map_err(|_| Error::Environment {
        variable: SCHED_POLICY,
        value,
        expected: "\"rr\", \"none\" or \"sharded\"",
    });
    policy.map(Some)
}

/// Returns whether this process is a master. Every process that is not a worker is a master.
///
/// Node: `cluster.isMaster`.
///
/// The function can be called at any time, even before [`init`]. After `init`, a child that the
/// application forks inherits the result.
///
/// ```
/// assert!(cluster::is_master());
/// ```
#[doc(alias = "isMaster")]
#[doc(alias = "isPrimary")]
#[must_use]
pub fn is_master() -> bool {
    !is_worker()
}

/// Returns whether this process is a worker, that is, a process that a master forked with a channel
/// to the master.
///
/// Node: `cluster.isWorker`.
///
/// The function can be called at any time, even before [`init`]. After `init`, a child that the
/// application forks inherits the result.
///
/// ```
/// assert!(!cluster::is_worker());
/// ```
#[doc(alias = "isWorker")]
#[must_use]
pub fn is_worker() -> bool {
    match ROLE.load(Ordering::SeqCst) {
        UNKNOWN => matches!(identity(), Ok(Identity::Worker { .. })),
        role => role == WORKER,
    }
}

/// Returns the number of cores that this process may use. The result is at least 1. More workers
/// than cores cannot run in parallel.
///
/// Node: `os.cpus().length`.
///
/// The function can be called at any time.
///
/// ```
/// assert!(cluster::available_parallelism() >= 1);
/// ```
#[must_use]
pub fn available_parallelism() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_have_the_hash_of_their_arguments_with_zero_bytes() {
        let hash = |arguments: &[&str]| {
            let arguments = arguments.iter().map(OsString::from);
            arguments.fold(FNV_BASIS, hash_argument)
        };
        // The value comes from another implementation.
        assert_eq!(hash(&["a"]), 0x089b_e207_b544_f1e4);
        assert_ne!(hash(&["ab"]), hash(&["a", "b"]));
    }
}
