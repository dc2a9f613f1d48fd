//! The events of which the master notifies the application, and their levels.

use std::process::ExitStatus;
use std::rc::Rc;

use crate::error::Error;
use crate::types::address::Address;
use crate::types::worker_id::WorkerId;

/// The callbacks that an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Worker,
    Cluster,
}

/// An event; `F` is the descriptors that arrive with a message.
#[derive(Debug)]
pub(crate) enum Event<F> {
    Setup,
    Fork,
    Online,
    Listening(Rc<Address>),
    /// For the callbacks of both levels: in Node, too, those of the cluster come first here.
    Message {
        bytes: Vec<u8>,
        fds: F,
    },
    Disconnect,
    Exit(ExitReport),
    /// A detached process has exited. Only its own callbacks are called.
    DetachedExit(ExitStatus),
    Error(Rc<Error>),
    /// All workers have exited and all listeners are closed, after `disconnect_all`.
    Disconnected,
}

/// How a worker exited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExitReport {
    pub(crate) status: ExitStatus,
    pub(crate) exited_after_disconnect: bool,
}

/// An event for the callbacks of one level.
#[derive(Debug)]
pub(crate) struct EmittedEvent<F> {
    pub(crate) level: Level,
    pub(crate) worker: Option<WorkerId>,
    pub(crate) event: Event<F>,
}

/// The state of a worker, as its events have reported it.
///
/// Node: `worker.state`. See [`WorkerProcess::state`](crate::WorkerProcess::state) for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WorkerState {
    /// Forked; the worker has not called `init` yet. Node: `none`.
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
