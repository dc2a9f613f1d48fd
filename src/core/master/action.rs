//! The actions that the shell carries out, in order, without calling the application.

use crate::config::policy::SchedulingPolicy;
use crate::core::dispatch::Sequenced;
use crate::types::endpoint::{BindFlags, Endpoint};
use crate::types::signal::Signal;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::{HandleId, ToWorker};

#[derive(Debug)]
pub(crate) enum Action<C> {
    Send {
        worker: WorkerId,
        frame: ToWorker,
        with: Attachment,
    },
    /// Puts a connection into a worker's queue. The answer is `not_dispatched` if that fails.
    Dispatch {
        handle: HandleId,
        worker: WorkerId,
        connection: Sequenced<C>,
        /// The connection has waited in the master. The answer is `hung_up` if its client has hung up.
        has_waited: bool,
    },
    /// Reclaims at most `at_most` connections from a worker's queue. The answer is `reclaimed`.
    Reclaim {
        handle: HandleId,
        worker: WorkerId,
        at_most: usize,
    },
    /// Counts the connections in a worker's queue. The answer is `counted`, unless the system cannot
    /// count them.
    CountQueued {
        handle: HandleId,
        worker: WorkerId,
    },
    /// Empties a worker's queue and closes both ends. The answer is `queue_closed`, with the connections
    /// that were in it. As long as the queue cannot be emptied for lack of descriptors, the answers are
    /// `reclaimed`.
    CloseQueue {
        handle: HandleId,
        worker: WorkerId,
    },
    /// Binds a socket and listens on it. The answer is `bound`.
    Bind {
        handle: HandleId,
        endpoint: Endpoint,
        flags: BindFlags,
        policy: SchedulingPolicy,
    },
    /// Binds one more shard. The answer is `shard_bound`.
    BindShard {
        handle: HandleId,
        flags: BindFlags,
        worker: WorkerId,
        request: u32,
    },
    /// Sends all new connections to these shards.
    SelectShards {
        handle: HandleId,
        shards: Vec<usize>,
    },
    /// Makes the listener, or one shard of it, non-blocking, so that no worker waits in `accept`.
    Unblock {
        handle: HandleId,
        shard: Option<usize>,
    },
    /// Reports by `readable` when the listener is readable.
    Watch {
        handle: HandleId,
    },
    Unwatch {
        handle: HandleId,
    },
    /// Accepts connections. Each answer is `accepted`; the last one is `accept_done`, `drained` or
    /// `accept_failed`. A listener that was shut down is treated as drained if the core says that it `is_ending`.
    Accept {
        handle: HandleId,
        at_most: u64,
    },
    /// Removes the file of a Unix path, so that no client can connect.
    RemoveFile {
        handle: HandleId,
    },
    /// Keeps new connections out of the backlog, as far as the system can. For a Unix path, this cannot
    /// be undone.
    AttachSynFilter {
        handle: HandleId,
    },
    /// Undoes `AttachSynFilter`.
    DetachSynFilter {
        handle: HandleId,
    },
    /// Reports by `was_shut_down` that a process has shut the listener, or one of its shards, down.
    WatchHangUp {
        handle: HandleId,
    },
    /// Shuts the listener down in all processes that have a copy.
    StopListening {
        handle: HandleId,
    },
    /// Closes the master's copy of the listener.
    Unbind {
        handle: HandleId,
    },
    /// Shuts the channel down for writing by the worker, processes the final frames that it has written,
    /// and then answers with `channel_closed`.
    CloseChannel {
        worker: WorkerId,
    },
    /// Closes the channel without reading it.
    DiscardChannel {
        worker: WorkerId,
    },
    Signal {
        worker: WorkerId,
        signal: Signal,
    },
}

/// The descriptor that is sent with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attachment {
    None,
    /// A copy of the listener.
    Listener(HandleId),
    /// A copy of one shard of the listener.
    Shard(HandleId, usize),
    /// The worker's end of a new queue.
    Queue(HandleId),
}
