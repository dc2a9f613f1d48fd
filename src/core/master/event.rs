//! The events that the master reports to the application.

use std::process::ExitStatus;
use std::rc::Rc;

use crate::error::Error;
use crate::types::address::Address;
use crate::types::worker_id::WorkerId;

/// The group of callbacks that receives an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// The callbacks of one worker or detached process.
    Worker,
    /// The callbacks of the master, which receive the events of all workers.
    Cluster,
}

/// An event. `F` is the type of the descriptors that arrive with a message.
#[derive(Debug)]
pub(crate) enum Event<F> {
    /// The application has called `setup_master`.
    Setup,
    /// A worker has been forked.
    Fork,
    /// A worker has called `init`.
    Online,
    /// A worker listens on the address.
    Listening(Rc<Address>),
    /// A message for the callbacks of both levels. The cluster's callbacks run first, as in Node.
    Message {
        bytes: Vec<u8>,
        fds: F,
    },
    /// The channel to a worker is closed.
    Disconnect,
    /// A worker's process has exited.
    Exit(ExitReport),
    /// The exit of a detached process, for the callbacks of that process only.
    DetachedExit(ExitStatus),
    Error(Rc<Error>),
    /// The end of `disconnect_all`: all workers have exited, and all listeners are closed except
    /// those that the application retains.
    Disconnected,
}

/// The circumstances of a worker's exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExitReport {
    pub(crate) status: ExitStatus,
    /// Whether a disconnect was requested before the exit.
    pub(crate) exited_after_disconnect: bool,
}

/// An event for the callbacks of one level.
#[derive(Debug)]
pub(crate) struct EmittedEvent<F> {
    pub(crate) level: Level,
    pub(crate) worker: Option<WorkerId>,
    pub(crate) event: Event<F>,
}

/// The state of a worker, as reported by the worker's latest event.
///
/// Node: `worker.state`.
///
/// See [`WorkerProcess::state`](crate::WorkerProcess::state) for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WorkerState {
    /// The worker has been forked and has not called `init`.
    ///
    /// Node: `none`.
    None,
    /// The worker has called `init`.
    Online,
    /// The worker listens on an address.
    Listening,
    /// The channel to the worker is closed.
    Disconnected,
    /// The process has exited.
    Dead,
}
