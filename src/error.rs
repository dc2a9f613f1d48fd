//! What can go wrong, and with what.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::types::errno;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::{FrameError, MAX_BODY, MAX_FDS};

/// The result of everything in this crate that can fail.
///
/// See [`Error`] for an example.
pub type Result<T> = std::result::Result<T, Error>;

/// What was attempted, on what, and why it failed.
///
/// Node: the `Error` objects with a `code`; the system's code is in
/// [`raw_os_error`](Self::raw_os_error). Printed, it includes the reason, so that
/// [`source`](std::error::Error::source) is `None`. What happens in the normal life of a cluster,
/// such as the death of a worker, is an event and not an error.
///
/// ```no_run
/// use cluster::Error;
/// use std::io::ErrorKind;
///
/// fn listen(worker: &cluster::Worker) -> cluster::Result<cluster::Listener> {
///     match worker.listen("127.0.0.1:80") {
///         Err(Error::Listen { source, .. }) if source.kind() == ErrorKind::PermissionDenied => {
///             worker.listen("127.0.0.1:8080")
///         }
///         other => other,
///     }
/// }
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// An environment variable has a value that means nothing.
    Environment {
        /// The variable's name.
        variable: &'static str,
        /// Its value, made printable.
        value: String,
        /// What would be valid.
        expected: &'static str,
    },
    /// A descriptor that was passed to this process is not what the program takes it for.
    Descriptor {
        /// Its number, as it was passed.
        number: RawFd,
        /// Its name, if it was passed with one.
        name: Option<String>,
        /// What it is.
        found: &'static str,
        /// What it was taken for.
        expected: &'static str,
    },
    /// `init` was called a second time in this process.
    AlreadyInitialized,
    /// The scheduling policy cannot change after the first `fork` or the master's first `listen`.
    PolicyFrozen,
    /// `run`, `dispatch` or `accept` was called by a callback, which one of them had called.
    AlreadyRunning,
    /// A handle was used by a process that did not create it: a child that the application has
    /// forked, or a worker that executes nothing ([`Settings::main`](crate::Settings::main())). Nothing
    /// has happened.
    ForeignProcess,
    /// A worker could not be started.
    Fork {
        /// The program that was to run.
        program: PathBuf,
        /// What could not be done, for instance "execute it" or "change its user".
        attempt: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A worker, or the master, could not listen.
    Listen {
        /// The address as the program gave it.
        address: String,
        /// The system's reason, for instance that the address is in use.
        source: io::Error,
    },
    /// A worker could not bind a UDP socket.
    Bind {
        /// The address as the program gave it.
        address: String,
        /// The system's reason, for instance that the address is in use.
        source: io::Error,
    },
    /// The master could not accept a connection, and tries again in 100 ms.
    Accept {
        /// The address of the listener.
        address: String,
        /// The system's reason, for instance too many open files.
        source: io::Error,
    },
    /// Another process shut a listener down: a worker with the shared or sharded policy, or an owner
    /// outside the cluster. Which one is not known.
    ///
    /// Connections that waited to be accepted are lost. The master makes a TCP listener listen again at
    /// once, and tries again after 100 ms if that fails. A Unix listener never listens again.
    /// A listener that the application named by its descriptor stays shut: the application may have done it.
    ShutDown {
        /// The address of the listener.
        address: String,
        /// Whether it listens again; otherwise the system's reason.
        outcome: std::result::Result<(), io::Error>,
    },
    /// Connections to a sharded listener reached no worker, and were reset: a worker has changed the
    /// selection among the shards. Which one is not known. The selection is as before again.
    Misdirected {
        /// The address of the listener.
        address: String,
        /// How many connections were reset.
        count: u64,
    },
    /// A message could not be sent.
    Send {
        /// The worker it was for; `None` in a worker, where it was for the master.
        worker: Option<WorkerId>,
        /// Why not.
        reason: SendError,
    },
    /// The other side sent something that is not in the protocol, and was cut off.
    Frame {
        /// The worker that sent it; `None` in a worker, where it was the master.
        worker: Option<WorkerId>,
        /// What is wrong with it.
        source: FrameError,
    },
    /// The channel to this worker broke; the worker was cut off.
    Channel {
        /// The worker; `None` in a worker, where it was the channel to the master.
        worker: Option<WorkerId>,
        /// The system's reason.
        source: io::Error,
    },
    /// The system has run out of room for what goes through the channel to this worker; nobody is
    /// cut off. What was to be sent waits, and is tried again every 100 ms. Of what was received,
    /// descriptors are lost: a message comes without them, and a connection goes to another worker.
    Exhausted {
        /// The worker; `None` in a worker, where it is the channel to the master.
        worker: Option<WorkerId>,
        /// The system's reason, for instance too many open files, or too many descriptors under
        /// way.
        source: io::Error,
    },
    /// How this worker ended is not known, because something else in this process waited for it.
    /// Its `exit` event says code 255.
    ExitStatus {
        /// The worker.
        worker: WorkerId,
        /// The system's reason.
        source: io::Error,
    },
    /// Another call to the system failed.
    Io {
        /// What was attempted.
        attempt: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

/// Why a message was not sent.
///
/// ```no_run
/// # fn f(worker: &cluster::Worker) {
/// use cluster::{Error, SendError};
///
/// if let Err(Error::Send { reason: SendError::QueueFull, .. }) = worker.send(b"news") {
///     // The master does not keep up: leave this one out.
/// }
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendError {
    /// The channel is closed.
    ChannelClosed,
    /// So much waits already that this message would exceed the hard limit of 8 MiB.
    QueueFull,
    /// The message is longer than 1 MiB.
    TooLong,
    /// The message has more than 16 descriptors.
    TooManyDescriptors,
}

impl std::fmt::Display for SendError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ChannelClosed => write!(f, "the channel is closed"),
            Self::QueueFull => write!(f, "too much waits to be sent"),
            Self::TooLong => write!(f, "longer than {MAX_BODY} bytes"),
            Self::TooManyDescriptors => write!(f, "more than {MAX_FDS} descriptors"),
        }
    }
}

impl Error {
    /// Descriptors that were received found no place in this process.
    pub(crate) fn no_descriptors(worker: Option<WorkerId>) -> Self {
        let source = io::Error::from_raw_os_error(errno::EMFILE);
        Self::Exhausted { worker, source }
    }

    pub(crate) fn io(attempt: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { attempt, source }
    }

    /// Returns the system's error number, if the system was the one to refuse.
    ///
    /// Node: `error.errno`.
    ///
    /// ```
    /// assert_eq!(cluster::Error::PolicyFrozen.raw_os_error(), None);
    /// ```
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Fork { source, .. }
            | Self::Listen { source, .. }
            | Self::Bind { source, .. }
            | Self::Accept { source, .. }
            | Self::Channel { source, .. }
            | Self::Exhausted { source, .. }
            | Self::ExitStatus { source, .. }
            | Self::Io { source, .. } => source.raw_os_error(),
            Self::ShutDown { outcome, .. } => outcome.as_ref().err()?.raw_os_error(),
            Self::Environment { .. }
            | Self::Descriptor { .. }
            | Self::AlreadyInitialized
            | Self::PolicyFrozen
            | Self::AlreadyRunning
            | Self::ForeignProcess
            | Self::Misdirected { .. }
            | Self::Send { .. }
            | Self::Frame { .. } => None,
        }
    }
}

/// "worker 3", or "the master" where there is no worker.
fn peer(worker: Option<WorkerId>) -> String {
    worker.map_or_else(
        || "the master".to_owned(),
        |worker| format!("worker {worker}"),
    )
}

// The reason is part of the text, so `source()` stays `None`: whoever prints the chain would print
// it twice.
impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Environment {
                variable,
                value,
                expected,
            } => write!(
                f,
                "environment variable {variable} is {value:?}, expected {expected}"
            ),
            Self::Descriptor {
                number,
                name,
                found,
                expected,
            } => {
                let name = name.as_ref().map(|name| format!(" ({name:?})"));
                let name = name.unwrap_or_default();
                write!(
                    f,
                    "descriptor {number}{name} is {found}, expected {expected}"
                )
            }
            Self::AlreadyInitialized => write!(f, "init was called twice in this process"),
            Self::PolicyFrozen => {
                write!(
                    f,
                    "the scheduling policy cannot change after the first fork or listen"
                )
            }
            Self::AlreadyRunning => write!(f, "run, dispatch or accept called inside a callback"),
            Self::ForeignProcess => write!(f, "this handle belongs to the process that created it"),
            Self::Fork {
                program,
                attempt,
                source,
            } => {
                let program = program.display();
                write!(
                    f,
                    "cannot start a worker from {program}: cannot {attempt}: {source}"
                )
            }
            Self::Listen { address, source } => write!(f, "cannot listen on {address}: {source}"),
            Self::Bind { address, source } => write!(f, "cannot bind {address}: {source}"),
            Self::Accept { address, source } => {
                write!(f, "cannot accept a connection on {address}: {source}")
            }
            Self::ShutDown { address, outcome } => {
                write!(f, "another process shut down the listener on {address}")?;
                match outcome {
                    Ok(()) => write!(f, "; it listens again"),
                    Err(source) => write!(f, "; it cannot listen again: {source}"),
                }
            }
            Self::Misdirected { address, count } => write!(
                f,
                "a worker changed the selection among the shards of {address}: {count} connections were reset"
            ),
            Self::Send { worker, reason } => {
                write!(f, "cannot send to {}: {reason}", peer(*worker))
            }
            Self::Frame { worker, source } => {
                write!(f, "cut off from {}: {source}", peer(*worker))
            }
            Self::Channel { worker, source } => {
                write!(f, "lost the channel to {}: {source}", peer(*worker))
            }
            Self::Exhausted { worker, source } => {
                let peer = peer(*worker);
                write!(f, "no room for the channel to {peer}: {source}")
            }
            Self::ExitStatus { worker, source } => {
                write!(f, "cannot learn how worker {worker} ended: {source}")
            }
            Self::Io { attempt, source } => write!(f, "cannot {attempt}: {source}"),
        }
    }
}

impl std::error::Error for Error {}
