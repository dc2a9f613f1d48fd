//! What the master tells the program, and at which level.

use std::process::ExitStatus;
use std::rc::Rc;

use crate::error::Error;
use crate::types::address::Address;
use crate::types::message::Message;
use crate::types::worker_id::WorkerId;

/// Whose callbacks an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Worker,
    Cluster,
}

#[derive(Debug)]
pub(crate) enum Event {
    Setup,
    Fork,
    Online,
    Listening(Rc<Address>),
    /// For the callbacks of both levels; Node has the cluster's come first here.
    Message(Message),
    Disconnect,
    Exit(ExitReport),
    /// A detached process has exited: for its own callbacks alone.
    DetachedExit(ExitStatus),
    Error(Rc<Error>),
    /// `disconnect_all` is finished.
    Disconnected,
}

/// What is known of a worker that has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExitReport {
    pub(crate) status: ExitStatus,
    pub(crate) exited_after_disconnect: bool,
}

#[derive(Debug)]
pub(crate) struct Emit {
    pub(crate) level: Level,
    pub(crate) worker: Option<WorkerId>,
    pub(crate) event: Event,
}

/// How far a worker has come.
///
/// Node: `worker.state`. See [`WorkerProcess::state`](crate::WorkerProcess::state) for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WorkerState {
    /// Forked; its program has not called `init` yet. Node: `none`.
    None,
    /// Its program runs.
    Online,
    /// It listens on something.
    Listening,
    /// Its channel is closed.
    Disconnected,
    /// Its process has ended.
    Dead,
}
