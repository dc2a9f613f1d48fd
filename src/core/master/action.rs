//! The actions that the shell carries out, in order, without calling the application.

use super::hand_off::HandOff;
use crate::core::dispatch::Sequenced;
use crate::types::connection_id::ConnectionId;
use crate::types::endpoint::{BindFlags, Endpoint};
use crate::types::handle::HandleId;
use crate::types::policy::SchedulingPolicy;
use crate::types::signal::Signal;
use crate::types::user::ParkHistory;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::ToWorker;

#[derive(Debug)]
pub(crate) enum Action<C> {
    Send {
        worker: WorkerId,
        frame: ToWorker,
        attachment: Attachment,
    },
    /// Puts a connection into a worker's queue. The shell answers with `not_dispatched` if this
    /// fails.
    Dispatch {
        handle: HandleId,
        worker: WorkerId,
        connection: Sequenced<HandOff<C>>,
        /// Whether the connection has waited for a worker or has been reclaimed. If its client has
        /// hung up in the meantime, the shell does not dispatch it and answers with `hung_up`.
        has_waited: bool,
    },
    /// Keeps a connection, and makes the poller report once that its client has sent something or
    /// has hung up. After the report, the shell calls `data_arrived` or `idle_hung_up`. If the
    /// connection cannot be watched, the shell calls `not_held`.
    Hold {
        id: ConnectionId,
        connection: C,
    },
    /// Makes the poller report once more, like `Hold`, for a connection that the master holds.
    AwaitData {
        id: ConnectionId,
    },
    /// Passes a connection to the master that takes over from this one. The shell then calls
    /// `passed`, `not_passed` or `end_passing`.
    Pass {
        id: ConnectionId,
        /// The listener that accepted the connection. The listener may have been closed.
        handle: HandleId,
        history: ParkHistory,
        /// The connection, or `None` if the shell already keeps it.
        connection: Option<C>,
    },
    /// Closes the master's copy of a connection.
    CloseHeld {
        id: ConnectionId,
    },
    /// Sends `MoveParked` to a worker, with a connection that another worker parked. If the worker has
    /// not read the earlier connections that were sent to it, the shell calls `not_moved`
    /// instead. If the shell holds the connection, it removes the connection from those that it
    /// holds.
    MoveParked {
        handle: HandleId,
        worker: WorkerId,
        connection: HandOff<C>,
        history: ParkHistory,
    },
    /// Reclaims at most `at_most` connections from a worker's queue. The shell answers with
    /// `reclaimed`. If the shell lacks descriptors, it first answers with `cannot_reclaim`.
    Reclaim {
        handle: HandleId,
        worker: WorkerId,
        at_most: usize,
    },
    /// Counts the connections in a worker's queue. The shell answers with `counted`, unless the
    /// system does not support counting.
    CountQueued {
        handle: HandleId,
        worker: WorkerId,
    },
    /// Empties a worker's queue and closes both ends. The shell answers with `queue_closed`, and
    /// passes the connections that were in the queue.
    ///
    /// If the shell lacks descriptors to empty the queue at once, it first answers with `reclaimed`
    /// for the connections that it has taken out. It answers with `queue_closed` once the queue is
    /// empty.
    CloseQueue {
        handle: HandleId,
        worker: WorkerId,
    },
    /// Binds a socket and listens on it. The shell answers with `bound`.
    Bind {
        handle: HandleId,
        endpoint: Endpoint,
        flags: BindFlags,
        policy: SchedulingPolicy,
    },
    /// Binds one more shard. The shell answers with `shard_bound`.
    BindShard {
        handle: HandleId,
        flags: BindFlags,
        worker: WorkerId,
        request: u32,
    },
    /// Makes the kernel direct all new connections to these shards.
    SelectShards {
        handle: HandleId,
        shards: Vec<usize>,
    },
    /// Makes one shard of the listener non-blocking, or all of its sockets if `shard` is `None`, so
    /// that no worker blocks in `accept`.
    Unblock {
        handle: HandleId,
        shard: Option<usize>,
    },
    /// Watches the listener. The shell calls `readable` when the listener is readable.
    Watch {
        handle: HandleId,
    },
    Unwatch {
        handle: HandleId,
    },
    /// Accepts connections. The shell answers with `accepted` for each connection, and finally with
    /// `accept_done`, `backlog_emptied`, `accept_failed` or `shut_down_by_other`.
    ///
    /// If the listener was shut down and the core's `is_ending` returns true, the shell answers
    /// with `backlog_emptied`.
    Accept {
        handle: HandleId,
        at_most: u64,
    },
    /// Makes the kernel keep each new connection out of the backlog until its client has sent
    /// something, for at most about `seconds`; 0 ends this.
    DeferAccept {
        handle: HandleId,
        seconds: u32,
    },
    /// Removes the file of a Unix listener, so that no more clients can connect.
    RemoveFile {
        handle: HandleId,
    },
    /// Keeps new connections out of the backlog, as far as the system can. For a Unix listener,
    /// this cannot be undone.
    AttachSynFilter {
        handle: HandleId,
    },
    /// Reverts `AttachSynFilter`.
    DetachSynFilter {
        handle: HandleId,
    },
    /// Watches for a shutdown. The shell calls `shut_down_by_other` when a process has shut down the
    /// listener or one of its shards.
    WatchHangUp {
        handle: HandleId,
    },
    /// Shuts down the listener in all processes that have a copy.
    StopListening {
        handle: HandleId,
    },
    /// Closes the master's copy of the listener.
    Unbind {
        handle: HandleId,
    },
    /// Prevents the worker from writing more frames, processes the final frames that it has already
    /// written, and closes the channel. The shell answers with `channel_closed`.
    CloseChannel {
        worker: WorkerId,
    },
    /// Closes the channel without reading from it.
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
