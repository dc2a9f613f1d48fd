//! Defines the frames that a master and its workers exchange: the format, the kinds and the types.
//!
//! `header` and `preamble` have the parts that the channel needs before it knows a frame's kind.
//! `encode` and `decode` convert the bodies, and `tests` has the golden bytes. These modules are
//! pure: they use neither a socket nor a clock.
//!
//! ```text
//!    0       1       2       3       4       5       6       7
//! +-------+-------+-------+-------+-------+-------+-------+-------+
//! | length of the body, bytes     |version| kind  | fds   | batch |
//! +-------+-------+-------+-------+-------+-------+-------+-------+
//! | body, by kind                                         ...
//! +-------+-------+-------+-------+
//! ```
//!
//! All numbers are little-endian. `fds` is the number of the frame's descriptors. A frame's
//! descriptors arrive with its first byte or earlier, in the order of the frames.
//!
//! The writer sends descriptors in batches, one batch per system call. In a batch's first frame
//! with descriptors, `batch` is the number of descriptors in the whole batch. In every other frame,
//! `batch` is 0. The reader compares `batch` with the number of descriptors that arrived, and
//! thereby notices if the kernel dropped some.
//!
//! The master first writes a preamble, whose body is the worker's id. The preamble is in the socket
//! before the worker's program starts, so that a process can check whether an inherited descriptor
//! is a channel. The preamble's first descriptor is a socket that becomes readable when the worker
//! must disconnect (`worker/disconnect_token`). The second one is a file in memory, through which
//! the worker shows how many connections its application holds (`sys/linux/shared_number`). The
//! second one may be missing, so the preamble's header counts only the first.
//!
//! A successful `Reply` carries one descriptor. Depending on the request and the policy, the
//! descriptor is a listener, a UDP socket or the worker's end of a queue (`sys/queue`).
//!
//! The tables list all kinds of frames. The number after the name of a field is the field's length
//! in bytes. The module `kind` has a constant for each kind.
//!
//! ```text
//! kind  to master            body                     fds
//!   1   Online                                        0
//!   2   Listen               request 4, index 4,
//!                            backlog 4, flags 1,
//!                            idle seconds 4,
//!                            first data seconds 4,
//!                            socket type 1, address   0
//!   3   Listening            handle 4                 0
//!   4   Idle                 handle 4, received 8,
//!                            open 4                   0
//!   5   Pause                handle 4                 0
//!   6   Release              handle 4                 0
//!   7   DisconnectRequest                             0
//!   8   Park                 handle 4, parked 4       1
//!   9   ParkAgain            connection 4             0
//!  10   Detach               connection 4             0
//! 127   Message              application's bytes      0 to 16
//!
//! kind  to worker            body                     fds
//!  64   preamble             worker id 4              1
//!  65   Reply, success       request 4, zero 4,
//!                            handle 4, policy 1,
//!                            IP address               1
//!  65   Reply, failure       request 4, errno 4       0
//!  66   ListenerClosed       handle 4, unreceived 1   0
//!  67   Disconnect                                    0
//!  68   MoveParked           handle 4, parked 4       1
//! 127   Message              application's bytes      0 to 16
//!
//! IP address:  family 1 (4 or 6), port 2, IP 4 or 16;
//!              after an IPv6 address also flow 4, scope 4;
//!              or only the byte 0 if there is no address
//! address:     an IP address, or the byte 1 and port 2,
//!              or the byte 2 and descriptor number 4,
//!              or the byte 3, length 2 and path
//! socket type: 0 TCP, 1 Unix, 2 UDP
//! policy:      0 round robin, 1 shared, 2 sharded
//! flags:       1 ipv6_only, 2 reuse_addr, 4 readable_all, 8 writable_all,
//!              16 idle seconds are set, 32 wait_for_data is set, 64 its value,
//!              128 first data seconds are set
//! ```
//!
//! # Adding a frame
//!
//! 1. In this file, extend the table, `kind` and the enum. If the frame has a descriptor, also
//!    extend `carries_connection` or `carries_fd`. Then extend `encode`, `decode` and the golden
//!    bytes in `tests`, and increment `VERSION`.
//! 2. For a frame to the master, send it in `core/worker` and process it in
//!    `core/master/frames`. For a frame to a worker, send it in `core/master` and process it in
//!    `core/worker`. If the frame has a descriptor, add an `Attachment`.
//! 3. In `types/protocol`, add the ways in which a peer can misuse the frame to `Violation`.
//! 4. Add tests: forged frames in `sim/schedule/step` and `sim/fuzz/script/hostile`, attacks in
//!    `tests/process/hostile`, and inputs in `tests/corpus/frame`.

mod decode;
mod encode;
pub(crate) mod header;
pub(crate) mod preamble;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;

use crate::types::connection_id::ConnectionId;
use crate::types::endpoint::BindFlags;
use crate::types::handle::{HandleId, HandleKey};
use crate::types::policy::SchedulingPolicy;
use crate::types::protocol::FrameError;

/// The values of the header's `kind` byte.
mod kind {
    // Frames to the master.
    pub(super) const ONLINE: u8 = 1;
    pub(super) const LISTEN: u8 = 2;
    pub(super) const LISTENING: u8 = 3;
    pub(super) const IDLE: u8 = 4;
    pub(super) const PAUSE: u8 = 5;
    pub(super) const RELEASE: u8 = 6;
    pub(super) const DISCONNECT_REQUEST: u8 = 7;
    pub(super) const PARK: u8 = 8;
    pub(super) const PARK_AGAIN: u8 = 9;
    pub(super) const DETACH: u8 = 10;
    // Frames to a worker.
    pub(super) const PREAMBLE: u8 = 64;
    pub(super) const REPLY: u8 = 65;
    pub(super) const LISTENER_CLOSED: u8 = 66;
    pub(super) const DISCONNECT: u8 = 67;
    pub(super) const MOVE_PARKED: u8 = 68;
    // Frames in both directions.
    pub(super) const MESSAGE: u8 = 127;
}

/// The result of a successful `Listen`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bound {
    pub(crate) handle: HandleId,
    pub(crate) policy: SchedulingPolicy,
    /// The address with its actual port, or `None` for a Unix socket.
    pub(crate) address: Option<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToMaster {
    /// Reports that the worker's application has called `init`.
    Online,
    /// Requests a listener. The master answers with `Reply`.
    Listen {
        request: u32,
        key: HandleKey,
        flags: BindFlags,
    },
    /// Reports that the worker's application has received the requested listener.
    Listening {
        handle: HandleId,
    },
    /// Reports that the worker is idle, because it has found its queue empty.
    Idle {
        handle: HandleId,
        /// The total number of connections that the worker has received from the queue.
        received: u64,
        /// The number of the listener's connections that are open in the worker.
        open: u32,
    },
    /// Reports that the worker receives nothing more from the listener. Of all later frames, only
    /// `Park` may name the listener.
    Release {
        handle: HandleId,
    },
    /// Requests to disconnect. The master answers with `Disconnect`.
    DisconnectRequest,
    /// Reports that the worker receives no connections for now. Other workers receive the
    /// connections in its queue. `Idle` ends the pause.
    Pause {
        handle: HandleId,
    },
    /// Returns an idle connection to the master. With round robin, the master holds the connection
    /// until its client sends something. With the other policies, the master moves the connection
    /// to another worker, or holds it until another worker serves the listener. The frame carries
    /// the connection's descriptor.
    Park {
        handle: HandleId,
        /// The number of times that the connection has been parked.
        times_parked: u32,
    },
    /// Reports that the worker has closed its copy of a connection that the master holds. The
    /// master dispatches the connection again when its client sends something.
    ParkAgain {
        connection: ConnectionId,
    },
    /// Reports that the worker keeps or has closed a connection that the master holds. The master
    /// closes its copy.
    Detach {
        connection: ConnectionId,
    },
    Message(Vec<u8>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToWorker {
    /// Answers `Listen`. The error is an errno.
    Reply {
        request: u32,
        result: Result<Bound, i32>,
    },
    /// Reports that the listener yields no new connections to the worker.
    ListenerClosed {
        handle: HandleId,
        unreceived: Unreceived,
    },
    /// Requests that the worker disconnect once all its listeners and their connections are closed.
    Disconnect,
    /// Moves an idle connection that another worker parked to this worker. The frame carries the
    /// connection's descriptor.
    MoveParked {
        handle: HandleId,
        /// The number of times that the connection has been parked.
        times_parked: u32,
    },
    Message(Vec<u8>),
}

/// The fate of a listener's connections that the worker's application has not received, when the
/// listener ends for the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unreceived {
    /// Other workers serve the listener. The worker's parked connections go to them.
    GoToOthers,
    /// The worker serves all of them, because no other worker can: those in its backlog or queue,
    /// and the parked ones whose clients have sent something.
    AreServed,
    /// The worker serves only the parked ones whose clients have sent something. No other worker
    /// will serve the listener, but the backlog is not the worker's concern.
    ParkedAreServed,
}

/// A frame type for one direction of a channel.
pub(crate) trait Frame: Sized {
    /// The number of unwritten protocol frames with a descriptor above which the peer is
    /// disconnected. A protocol frame is any frame that is not a message of the application.
    const FRAMES_WITH_FD_MAX: usize;
    /// Appends the frame to `out`, with a header that announces `fds` descriptors.
    fn encode(&self, fds: usize, out: &mut Vec<u8>);
    /// Decodes the body of a frame whose header announced `kind` and `fds` descriptors.
    fn decode(kind: u8, fds: usize, body: &[u8]) -> Result<Self, FrameError>;
    /// Returns the frame that carries a message from the application.
    fn message(body: Vec<u8>) -> Self;
}

impl Frame for ToMaster {
    /// No limit. Each of these frames carries a connection that the worker had open before, so the
    /// frames do not increase the number of open descriptors.
    const FRAMES_WITH_FD_MAX: usize = usize::MAX;

    fn encode(&self, fds: usize, out: &mut Vec<u8>) {
        encode::to_master(self, fds, out);
    }

    fn decode(kind: u8, fds: usize, body: &[u8]) -> Result<Self, FrameError> {
        decode::to_master(kind, fds, body)
    }

    fn message(body: Vec<u8>) -> Self {
        Self::Message(body)
    }
}

impl ToMaster {
    /// Returns whether the frame must carry the descriptor of a connection.
    fn carries_connection(&self) -> bool {
        matches!(self, Self::Park { .. })
    }
}

impl Frame for ToWorker {
    /// Each of these frames keeps a descriptor open in the master. A well-behaved worker causes at
    /// most a few of them for each of the 64 listeners that it may have.
    const FRAMES_WITH_FD_MAX: usize = 256;

    fn encode(&self, fds: usize, out: &mut Vec<u8>) {
        encode::to_worker(self, fds, out);
    }

    fn decode(kind: u8, fds: usize, body: &[u8]) -> Result<Self, FrameError> {
        decode::to_worker(kind, fds, body)
    }

    fn message(body: Vec<u8>) -> Self {
        Self::Message(body)
    }
}

impl ToWorker {
    /// Returns whether the frame must carry the descriptor of a listener, a UDP socket, a queue or
    /// a connection.
    fn carries_fd(&self) -> bool {
        matches!(
            self,
            Self::Reply { result: Ok(_), .. } | Self::MoveParked { .. }
        )
    }
}
