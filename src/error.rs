//! The error types of this crate.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::types::address::Address;
use crate::types::errno;
use crate::types::fork_step::ForkStep;
use crate::types::policy::SchedulingPolicy;
use crate::types::protocol::{FrameError, MAX_BODY, MAX_FDS};
use crate::types::worker_id::WorkerId;

/// The result type of this crate's fallible functions.
///
/// See [`Error`] for an example.
pub type Result<T> = std::result::Result<T, Error>;

/// The error type of this crate. Each error says what failed, on what, and why.
///
/// Node: the `Error` objects with a `code`.
///
/// An error's text contains its reason. Therefore [`source`](std::error::Error::source) is `None`,
/// and programs that print the chain of sources print the reason once. [`Debug`](std::fmt::Debug)
/// prints the same text as [`Display`](std::fmt::Display), because a `main` that returns an error
/// prints it in this way.
/// [`raw_os_error`](Self::raw_os_error) returns the system's error number. An event such as the
/// exit of a worker is not an error.
///
/// ```no_run
/// use cluster::Error;
/// use std::io::ErrorKind;
///
/// fn listen(worker: &cluster::Worker) -> cluster::Result<cluster::Listener> {
///     match worker.listen("127.0.0.1:80") {
///         Err(Error::Listen { reason, .. }) if reason.kind() == ErrorKind::PermissionDenied => {
///             worker.listen("127.0.0.1:8080")
///         }
///         other => other,
///     }
/// }
/// ```
#[non_exhaustive]
pub enum Error {
    /// An environment variable has an invalid value.
    #[non_exhaustive]
    Environment {
        /// The variable's name.
        variable: &'static str,
        /// The variable's value. Bytes that are not valid UTF-8 are replaced by U+FFFD.
        value: String,
        /// A description of the valid values.
        expected: &'static str,
    },
    /// A descriptor that was passed to this process is not of the kind that the application
    /// expects.
    #[non_exhaustive]
    Descriptor {
        /// The descriptor's number in this process.
        number: RawFd,
        /// The descriptor's name, if the sender named it.
        name: Option<String>,
        /// The kind of the descriptor.
        found: &'static str,
        /// The kind that the application expects.
        expected: &'static str,
    },
    /// `init` was called a second time in this process.
    AlreadyInitialized,
    /// The scheduling policy cannot change once a worker has been forked, or the master's `listen`
    /// or `adopt` has succeeded.
    PolicyFrozen,
    /// A callback called `run`, `dispatch`, `accept` or `recv_from`. Calls of these methods cannot
    /// be nested, and the method that called the callback is still running.
    AlreadyRunning,
    /// This process called a method of a handle that another process created. This process is a
    /// child that the application forked, or a worker that executes no program
    /// ([`Settings::main`](crate::Settings::main)). The call had no effect.
    ForeignProcess,
    /// A master that is process 1, for example in a container, cannot be upgraded. In an upgrade,
    /// the old master exits, but when process 1 exits, the kernel kills all other processes of the
    /// PID namespace (pid_namespaces(7)).
    InitProcess,
    /// The workers failed, and their supervisor gave up
    /// ([`Master::give_up`](crate::Master::give_up)).
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// use cluster::{Error, pool::WorkerFailure};
    ///
    /// if let Err(Error::GaveUp { reason, .. }) = master.run() {
    ///     // A pool's reason is the last failure.
    ///     let failure = reason.downcast_ref::<WorkerFailure>();
    ///     let status = failure.and_then(|failure| failure.status);
    /// #   let _ = status;
    /// }
    /// # }
    /// ```
    #[non_exhaustive]
    GaveUp {
        /// The argument of `give_up`. A [`Pool`](crate::pool::Pool) passes a
        /// [`WorkerFailure`](crate::pool::WorkerFailure).
        reason: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A worker or a detached process could not be started.
    #[non_exhaustive]
    Fork {
        /// The program of the worker or process.
        program: PathBuf,
        /// The step that failed.
        step: ForkStep,
        /// The reason why the step failed.
        reason: io::Error,
    },
    /// A worker or the master could not listen.
    #[non_exhaustive]
    Listen {
        /// The address as the application gave it.
        address: String,
        /// The reason, for instance that the address is in use.
        reason: io::Error,
        /// The address of the master's own socket that occupies the port, for instance `[::]:80` if
        /// `0.0.0.0:80` was requested. `None` if there is no such socket.
        ///
        /// In a worker, always `None`, because a worker does not know the master's sockets. If a
        /// worker's request fails because of a retained socket that no worker has, the master emits
        /// an `error` event. The event's error contains the retained socket's address here.
        occupied_by: Option<Address>,
    },
    /// A worker could not bind a UDP socket.
    #[non_exhaustive]
    Bind {
        /// The address as the application gave it.
        address: String,
        /// The reason, for instance that the address is in use.
        reason: io::Error,
        /// The address of the master's own socket that occupies the port, for instance `[::]:80` if
        /// `0.0.0.0:80` was requested. `None` if there is no such socket.
        ///
        /// In a worker, always `None`, because a worker does not know the master's sockets. If a
        /// worker's request fails because of a retained socket that no worker has, the master emits
        /// an `error` event. The event's error contains the retained socket's address here.
        occupied_by: Option<Address>,
    },
    /// The master could not accept a connection. The master tries again after 100 ms.
    #[non_exhaustive]
    Accept {
        /// The listener's address.
        address: String,
        /// The system's reason, for instance too many open files.
        reason: io::Error,
    },
    /// The scheduling policy that the application or `CLUSTER_SCHED_POLICY` selected has no effect
    /// on a worker. The worker received listeners through
    /// [`Settings::listen_fds`](crate::Settings::listen_fds()), and accepts connections from these
    /// listeners itself. The master reports this error once.
    #[non_exhaustive]
    PolicyIgnored {
        /// The policy that was selected.
        policy: SchedulingPolicy,
    },
    /// Another process shut a listener down. That process is a worker with the shared or sharded
    /// policy, or a process outside the cluster that shares the listener. The system does not tell
    /// which process it was.
    ///
    /// Connections in the listener's backlog are lost. The master makes a TCP listener listen again
    /// at once. If that fails, the master tries again after 100 ms. A Unix listener cannot listen
    /// again. A listener that the application passed by its descriptor stays shut down, because the
    /// application may have shut it down itself.
    #[non_exhaustive]
    ShutDown {
        /// The listener's address.
        address: String,
        /// `Ok` if the listener listens again, or the system's reason why it does not.
        outcome: std::result::Result<(), io::Error>,
    },
    /// Connections to a sharded listener reached no worker, because a process with a copy of a
    /// shard had changed the selection among the shards. Usually, this process is a worker; the
    /// system does not tell which one. The master has closed the connections and restored the
    /// selection.
    #[non_exhaustive]
    Misdirected {
        /// The listener's address.
        address: String,
        /// The number of connections that were closed.
        count: u64,
    },
    /// A message could not be sent.
    #[non_exhaustive]
    Send {
        /// The receiver. `None` in a worker, where the receiver is the master.
        worker: Option<WorkerId>,
        /// The reason why the message was not sent.
        reason: SendError,
    },
    /// The peer sent bytes that the protocol does not allow. This process closed the channel. If
    /// this process is the master, it also killed the worker. [`init`](crate::init()) returns this
    /// error, and leaves the channel open, if the master uses another version of the protocol.
    #[non_exhaustive]
    Frame {
        /// The sender. `None` in a worker, where the sender is the master.
        worker: Option<WorkerId>,
        /// The fault in the frame.
        reason: FrameError,
    },
    /// The channel to the peer failed. The worker is now disconnected.
    #[non_exhaustive]
    Channel {
        /// The worker whose channel failed. `None` in a worker, where the peer is the master.
        worker: Option<WorkerId>,
        /// The system's reason.
        reason: io::Error,
    },
    /// The system lacked resources for the channel to the peer. The channel stays open.
    ///
    /// Outgoing frames wait, and the process retries them every 100 ms. Descriptors that arrived
    /// are lost: a message is delivered without its descriptors, and a parked connection is closed.
    /// A connection that waits in a worker's queue is not lost. It goes to another worker.
    #[non_exhaustive]
    Exhausted {
        /// The worker at the other end. `None` in a worker, where the peer is the master.
        worker: Option<WorkerId>,
        /// The system's reason, for instance too many open files or too many descriptors in flight.
        reason: io::Error,
    },
    /// The worker's exit status is unknown, because other code in this process has already called
    /// waitpid(2) for the worker, or has made the process ignore SIGCHLD. The worker's `exit` event
    /// reports code 255.
    #[non_exhaustive]
    ExitStatus {
        /// The worker.
        worker: WorkerId,
        /// The system's reason.
        reason: io::Error,
    },
    /// Another system call failed.
    #[non_exhaustive]
    Io {
        /// The attempt that failed, as a verb phrase.
        attempt: &'static str,
        /// The system's reason.
        reason: io::Error,
    },
}

/// The reason why a message was not sent.
///
/// ```no_run
/// # fn f(worker: &cluster::Worker) {
/// use cluster::{Error, SendError};
///
/// if let Err(Error::Send { reason: SendError::QueueFull, .. }) = worker.send(b"news") {
///     // The master does not keep up: skip this message.
/// }
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendError {
    /// The channel is closed.
    ChannelClosed,
    /// More than 8 MiB would be waiting to be sent if this message were added.
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
            Self::QueueFull => write!(f, "too many bytes are waiting to be sent"),
            Self::TooLong => write!(f, "the message is longer than {MAX_BODY} bytes"),
            Self::TooManyDescriptors => {
                write!(f, "the message has more than {MAX_FDS} descriptors")
            }
        }
    }
}

impl std::error::Error for SendError {}

/// The error of `watch`. The error contains the source that cannot be watched.
///
/// The operator `?` converts this error into an [`Error`] and drops the source.
///
/// ```no_run
/// # fn f(master: &cluster::Master, file: std::fs::File) {
/// use cluster::Interest;
///
/// if let Err(error) = master.watch(file, Interest::Readable, |_, _| None) {
///     eprintln!("{error}");
///     let file = error.into_source();
/// #   drop(file);
/// }
/// # }
/// ```
pub struct WatchError<S> {
    source: S,
    error: Error,
}

impl<S> WatchError<S> {
    pub(crate) fn new(source: S, error: Error) -> Self {
        Self { source, error }
    }

    /// Returns the reason why the source cannot be watched.
    ///
    /// Node has no counterpart.
    ///
    /// See [`WatchError`] for an example.
    #[must_use]
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// Returns the source that was passed to `watch`.
    ///
    /// Node has no counterpart.
    ///
    /// See [`WatchError`] for an example.
    #[must_use]
    pub fn into_source(self) -> S {
        self.source
    }
}

impl<S> std::fmt::Debug for WatchError<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WatchError")
            .field("error", &self.error)
            .finish_non_exhaustive()
    }
}

impl<S> std::fmt::Display for WatchError<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

impl<S> std::error::Error for WatchError<S> {}

impl<S> From<WatchError<S>> for Error {
    fn from(error: WatchError<S>) -> Self {
        error.error
    }
}

impl Error {
    /// Returns the error for descriptors that arrived while this process had no free descriptor for
    /// them.
    pub(crate) fn no_descriptors(worker: Option<WorkerId>) -> Self {
        let reason = io::Error::from_raw_os_error(errno::EMFILE);
        Self::Exhausted { worker, reason }
    }

    /// Returns a function that makes an [`Error::Io`] from the system's reason, for use with
    /// [`map_err`](std::result::Result::map_err).
    ///
    /// Node has no counterpart.
    ///
    /// Use this function in code that extends the cluster, such as a supervisor.
    ///
    /// ```
    /// use cluster::Error;
    ///
    /// let missing = std::fs::read("/no/such/file").map_err(Error::io("read the configuration"));
    /// assert!(missing.unwrap_err().to_string().starts_with("cannot read the configuration: "));
    /// ```
    pub fn io(attempt: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |reason| Self::Io { attempt, reason }
    }

    /// Returns the system's error number, or `None` if the error contains none.
    ///
    /// Node: `error.errno`.
    ///
    /// ```
    /// assert_eq!(cluster::Error::PolicyFrozen.raw_os_error(), None);
    /// ```
    #[doc(alias = "errno")]
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Fork { reason, .. }
            | Self::Listen { reason, .. }
            | Self::Bind { reason, .. }
            | Self::Accept { reason, .. }
            | Self::Channel { reason, .. }
            | Self::Exhausted { reason, .. }
            | Self::ExitStatus { reason, .. }
            | Self::Io { reason, .. } => reason.raw_os_error(),
            Self::ShutDown { outcome, .. } => outcome.as_ref().err()?.raw_os_error(),
            Self::Environment { .. }
            | Self::Descriptor { .. }
            | Self::AlreadyInitialized
            | Self::PolicyFrozen
            | Self::PolicyIgnored { .. }
            | Self::AlreadyRunning
            | Self::ForeignProcess
            | Self::InitProcess
            | Self::GaveUp { .. }
            | Self::Misdirected { .. }
            | Self::Send { .. }
            | Self::Frame { .. } => None,
        }
    }

    /// Returns whether the operation failed because the system lacked processes, memory,
    /// descriptors or space. The operation may succeed later.
    ///
    /// Node has no counterpart.
    ///
    /// A limit of the process, user, control group or system is reached, or the system itself has
    /// no more of the resource. The method recognizes the error numbers with which fork(2),
    /// execve(2), socketpair(2), pidfd_open(2) and epoll_ctl(2) report this: `EAGAIN`, `ENOMEM`,
    /// `EMFILE`, `ENFILE`, `ENOBUFS` and `ENOSPC`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// let log = cluster::LogWriter::stderr().attached_to(master);
    /// match master.fork() {
    ///     Err(error) if error.is_out_of_resources() => log.line(error), // one worker fewer
    ///     forked => drop(forked?),
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn is_out_of_resources(&self) -> bool {
        matches!(
            self.raw_os_error(),
            Some(
                errno::EAGAIN
                    | errno::ENOMEM
                    | errno::EMFILE
                    | errno::ENFILE
                    | errno::ENOBUFS
                    | errno::ENOSPC
            )
        )
    }
}

/// The other end of a channel: the worker with this id, or the master if there is no id. Displayed
/// as "worker 3" or "the master".
struct Peer(Option<WorkerId>);

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(worker) => write!(f, "worker {worker}"),
            None => f.write_str("the master"),
        }
    }
}

fn fmt_descriptor(
    f: &mut std::fmt::Formatter<'_>,
    number: RawFd,
    name: Option<&str>,
    [found, expected]: [&str; 2],
) -> std::fmt::Result {
    write!(f, "descriptor {number}")?;
    if let Some(name) = name {
        write!(f, " ({name:?})")?;
    }
    write!(f, " is {found}, expected {expected}")
}

fn fmt_occupant(
    f: &mut std::fmt::Formatter<'_>,
    occupied_by: Option<&Address>,
) -> std::fmt::Result {
    match occupied_by {
        Some(own) => write!(f, "; this master already has {own}"),
        None => Ok(()),
    }
}

fn fmt_shut_down(
    f: &mut std::fmt::Formatter<'_>,
    address: &str,
    outcome: std::result::Result<&(), &io::Error>,
) -> std::fmt::Result {
    write!(f, "another process shut down the listener on {address}")?;
    match outcome {
        Ok(()) => write!(f, "; it listens again"),
        Err(reason) => write!(f, "; it cannot listen again: {reason}"),
    }
}

impl std::fmt::Debug for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

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
            } => fmt_descriptor(f, *number, name.as_deref(), [found, expected]),
            Self::AlreadyInitialized => write!(f, "init was called twice in this process"),
            Self::PolicyFrozen => {
                write!(
                    f,
                    "the scheduling policy cannot change after the first fork or listen"
                )
            }
            Self::PolicyIgnored { policy } => write!(
                f,
                "the scheduling policy {policy} has no effect on listeners of listen_fds: \
                 the workers accept for themselves"
            ),
            Self::AlreadyRunning => {
                write!(
                    f,
                    "run, dispatch, accept or recv_from was called inside a callback"
                )
            }
            Self::ForeignProcess => write!(f, "this handle was created by another process"),
            Self::InitProcess => write!(
                f,
                "process 1 cannot be upgraded: the kernel kills the new master when process 1 exits"
            ),
            Self::GaveUp { reason } => write!(f, "gave up: {reason}"),
            Self::Fork {
                program,
                step,
                reason,
            } => {
                let program = program.display();
                write!(f, "cannot start {program}: cannot {step}: {reason}")
            }
            Self::Listen {
                address,
                reason,
                occupied_by,
            } => {
                write!(f, "cannot listen on {address}: {reason}")?;
                fmt_occupant(f, occupied_by.as_ref())
            }
            Self::Bind {
                address,
                reason,
                occupied_by,
            } => {
                write!(f, "cannot bind {address}: {reason}")?;
                fmt_occupant(f, occupied_by.as_ref())
            }
            Self::Accept { address, reason } => {
                write!(f, "cannot accept a connection on {address}: {reason}")
            }
            Self::ShutDown { address, outcome } => fmt_shut_down(f, address, outcome.as_ref()),
            Self::Misdirected { address, count } => write!(
                f,
                "another process changed the shard selection of {address}: \
                 {count} connections were closed"
            ),
            Self::Send { worker, reason } => {
                write!(f, "cannot send to {}: {reason}", Peer(*worker))
            }
            Self::Frame { worker, reason } => {
                write!(f, "invalid frame from {}: {reason}", Peer(*worker))
            }
            Self::Channel { worker, reason } => {
                write!(f, "lost the channel to {}: {reason}", Peer(*worker))
            }
            Self::Exhausted { worker, reason } => {
                let peer = Peer(*worker);
                write!(f, "no resources for the channel to {peer}: {reason}")
            }
            Self::ExitStatus { worker, reason } => {
                write!(f, "cannot get the exit status of worker {worker}: {reason}")
            }
            Self::Io { attempt, reason } => write!(f, "cannot {attempt}: {reason}"),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn errors_contain_their_reason_and_have_no_source() {
        let reason = SendError::QueueFull;
        let worker = Some(WorkerId::new(3));
        let error = Error::Send { worker, reason };
        assert_eq!(
            error.to_string(),
            "cannot send to worker 3: too many bytes are waiting to be sent"
        );
        assert_eq!(format!("{error:?}"), error.to_string());
        assert!(error.source().is_none() && reason.source().is_none());
        let error = Error::Fork {
            program: "./a".into(),
            step: ForkStep::Execute,
            reason: io::Error::other("why"),
        };
        assert_eq!(
            error.to_string(),
            "cannot start ./a: cannot execute it: why"
        );
        assert!(error.source().is_none());
    }

    #[test]
    fn only_shortages_of_the_system_are_out_of_resources() {
        let shortage = Error::no_descriptors(None);
        assert!(shortage.is_out_of_resources());
        let other = Error::io("bind")(io::Error::from_raw_os_error(errno::EADDRINUSE));
        assert!(!other.is_out_of_resources());
        assert!(!Error::PolicyFrozen.is_out_of_resources());
    }
}
