//! Encodes and decodes the frames that a master and its workers exchange. The module is pure: it
//! uses neither a socket nor a clock.
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
//!                            socket type 1, place     0
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
//!                            address                  1
//!  65   Reply, failure       request 4, errno 4       0
//!  66   ListenerClosed       handle 4, drain 1        0
//!  67   Disconnect                                    0
//!  68   Adopt                handle 4, parked 4       1
//! 127   Message              application's bytes      0 to 16
//!
//! address:     family 1 (4 or 6), port 2, IP 4 or 16;
//!              after an IPv6 address also flow 4, scope 4;
//!              or only the byte 0 if there is no address
//! place:       an address, or the byte 1 and port 2,
//!              or the byte 2 and descriptor number 4,
//!              or the byte 3, length 2 and path
//! socket type: 0 TCP, 1 Unix, 2 UDP
//! policy:      0 round robin, 1 shared, 2 sharded
//! flags:       1 ipv6_only, 2 reuse_addr, 4 readable_all, 8 writable_all,
//!              16 idle seconds are set, 32 wait_for_data is set, 64 its value
//! ```
//!
//! # Adding a frame
//!
//! 1. In this module, extend the table, `kind`, the enum, `encode`, `decode` and the golden bytes
//!    of the unit tests, and increment `VERSION`. If the frame has a descriptor, also extend
//!    `carries_connection` or `carries_fd`.
//! 2. For a frame to the master, send it in `core/worker` and process it in
//!    `core/master/frames`. For a frame to a worker, send it in `core/master` and process it in
//!    `core/worker`. If the frame has a descriptor, add an `Attachment`.
//! 3. In `types/protocol`, add the ways in which a peer can misuse the frame to `Violation`.
//! 4. Add tests: forged frames in `sim/schedule/step` and `sim/fuzz/script`, attacks in
//!    `tests/process/hostile`, and inputs in `tests/corpus/frame`.

use std::ffi::OsStr;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::unix::ffi::OsStrExt as _;

use crate::types::connection_id::ConnectionId;
use crate::types::endpoint::{BindFlags, Endpoint, Kind, Parking, Place};
use crate::types::ordered_set::Id;
use crate::types::policy::SchedulingPolicy;
use crate::types::protocol::{FrameError, MAX_BODY, MAX_FDS, VERSION};
use crate::types::worker_id::WorkerId;

/// The header's length in bytes.
pub(crate) const HEADER: usize = 8;
/// The preamble's length in bytes, including its header.
pub(crate) const PREAMBLE_LENGTH: usize = HEADER + 4;
/// The maximum number of descriptors that a single system call sends.
///
/// The value bounds the descriptors that are open in the reader before their frames are processed.
/// Linux accepts at most 253 descriptors in one call (`SCM_MAX_FD`, unix(7)). If the value were
/// below `MAX_FDS`, some frames would not fit into a batch.
pub(crate) const MAX_BATCH: usize = 64;
/// The offset of the batch size in the header. The outbox sets the batch size when it writes the
/// frame, because the size is unknown until then.
pub(crate) const BATCH_OFFSET: usize = 7;

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
    pub(super) const ADOPT: u8 = 68;
    // Frames in both directions.
    pub(super) const MESSAGE: u8 = 127;
}

/// Identifies one of the master's bound listeners or UDP sockets in frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HandleId(pub(crate) u32);

impl Id for HandleId {
    fn number(self) -> u32 {
        self.0
    }

    fn from_number(number: u32) -> Self {
        Self(number)
    }
}

/// Identifies what a worker listens on. Workers that send equal keys share a listener.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HandleKey {
    pub(crate) endpoint: Endpoint,
    /// The lowest index that no other listener of the worker on the same endpoint uses. On port 0,
    /// equal indexes get the same port in every worker, and different indexes get different ports.
    pub(crate) index: u32,
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
    /// Gives an idle connection to the master. With round robin, the master holds the connection
    /// until its client sends something. With the other policies, the master gives the connection
    /// to another worker, or holds it until another worker serves the listener. The frame carries
    /// the connection's descriptor.
    Park {
        handle: HandleId,
        /// The number of times that the connection has been parked.
        parked: u32,
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
        /// Whether the worker must first accept the listener's remaining connections, because no
        /// other worker can serve them.
        drain: bool,
    },
    /// Requests that the worker disconnect once all its listeners and their connections are closed.
    Disconnect,
    /// Gives the worker an idle connection that another worker parked. The frame carries the
    /// connection's descriptor.
    Adopt {
        handle: HandleId,
        /// The number of times that the connection has been parked.
        parked: u32,
    },
    Message(Vec<u8>),
}

/// Returns the preamble that the master writes to the channel of `worker`, with one or two
/// descriptors, before any other frame.
pub(crate) fn preamble(worker: WorkerId) -> [u8; PREAMBLE_LENGTH] {
    let mut bytes = [0; PREAMBLE_LENGTH];
    bytes[..HEADER].copy_from_slice(&[4, 0, 0, 0, VERSION, kind::PREAMBLE, 1, 1]);
    bytes[HEADER..].copy_from_slice(&worker.get().to_le_bytes());
    bytes
}

/// Returns the format's version, or `None` if `bytes` are not a preamble of any version.
pub(crate) fn preamble_version(bytes: [u8; PREAMBLE_LENGTH]) -> Option<u8> {
    let [4, 0, 0, 0, version, kind::PREAMBLE, 1, 1, ..] = bytes else {
        return None;
    };
    Some(version)
}

/// A frame type for one direction of a channel.
pub(crate) trait Frame: Sized {
    /// The number of unwritten protocol frames with a descriptor above which the peer is
    /// disconnected. A protocol frame is any frame that is not a message of the application.
    const UNREAD_FDS_MAX: usize;
    /// Appends the frame to `out`, with a header that announces `fds` descriptors.
    fn encode(&self, fds: usize, out: &mut Vec<u8>);
    /// Decodes the body of a frame whose header announced `kind` and `fds` descriptors.
    fn decode(kind: u8, fds: usize, body: &[u8]) -> Result<Self, FrameError>;
    /// Returns the frame that carries a message from the application.
    fn message(body: Vec<u8>) -> Self;
}

/// A header with a supported version, whose numbers are within the limits. The header's kind may be
/// unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The length of the body in bytes.
    pub(crate) length: usize,
    pub(crate) kind: u8,
    /// The number of the frame's descriptors.
    pub(crate) fds: usize,
    /// The number of descriptors in the batch that begins with this frame, or 0 if none begins.
    pub(crate) batch: usize,
}

impl Header {
    /// Encodes a message's header. The caller ensures that `length` and `fds` are within the
    /// limits.
    pub(crate) fn of_message(length: usize, fds: usize) -> [u8; HEADER] {
        let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
        let fds = u8::try_from(fds).unwrap_or(u8::MAX);
        [a, b, c, d, VERSION, kind::MESSAGE, fds, 0]
    }

    pub(crate) fn is_message(self) -> bool {
        self.kind == kind::MESSAGE
    }

    pub(crate) fn decode(bytes: [u8; HEADER]) -> Result<Self, FrameError> {
        let [a, b, c, d, version, kind, fds, batch] = bytes;
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        let length = u32::from_le_bytes([a, b, c, d]);
        if length as usize > MAX_BODY {
            return Err(FrameError::TooLong(length));
        }
        let (fds, batch) = (usize::from(fds), usize::from(batch));
        let begins_batch = batch > 0;
        if fds > MAX_FDS || batch > MAX_BATCH || begins_batch && !(1..=batch).contains(&fds) {
            return Err(FrameError::Descriptors);
        }
        Ok(Self {
            length: length as usize,
            kind,
            fds,
            batch,
        })
    }
}

/// Appends a frame, and calls `body` to append the frame's body.
fn put_frame(out: &mut Vec<u8>, kind: u8, fds: usize, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    debug_assert!(fds <= MAX_FDS);
    let fds = u8::try_from(fds).unwrap_or(u8::MAX);
    out.extend_from_slice(&[0, 0, 0, 0, VERSION, kind, fds, 0]);
    body(out);
    // Write the length last, because `body` determines it. `send` enforces `MAX_BODY` for messages.
    // If a body ever had 4 GiB or more, the saturated length would make the reader reject it.
    let length = u32::try_from(out.len() - start - HEADER).unwrap_or(u32::MAX);
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
}

fn put_handle(out: &mut Vec<u8>, handle: HandleId) {
    out.extend_from_slice(&handle.0.to_le_bytes());
}

/// Appends a frame whose body contains only a handle.
fn put_handle_frame(out: &mut Vec<u8>, kind: u8, fds: usize, handle: HandleId) {
    put_frame(out, kind, fds, |out| put_handle(out, handle));
}

/// Appends a frame that carries an idle connection.
fn put_parked_frame(out: &mut Vec<u8>, kind: u8, fds: usize, handle: HandleId, parked: u32) {
    put_frame(out, kind, fds, |out| {
        put_handle(out, handle);
        out.extend_from_slice(&parked.to_le_bytes());
    });
}

/// Appends a frame whose body contains only a connection.
fn put_connection_frame(out: &mut Vec<u8>, kind: u8, fds: usize, connection: ConnectionId) {
    put_frame(out, kind, fds, |out| {
        out.extend_from_slice(&connection.0.to_le_bytes());
    });
}

fn put_message(out: &mut Vec<u8>, fds: usize, bytes: &[u8]) {
    put_frame(out, kind::MESSAGE, fds, |out| out.extend_from_slice(bytes));
}

fn put_address(out: &mut Vec<u8>, address: Option<&SocketAddr>) {
    match address {
        None => out.push(0),
        Some(SocketAddr::V4(v4)) => {
            out.push(4);
            out.extend_from_slice(&v4.port().to_le_bytes());
            out.extend_from_slice(&v4.ip().octets());
        }
        Some(SocketAddr::V6(v6)) => {
            out.push(6);
            out.extend_from_slice(&v6.port().to_le_bytes());
            out.extend_from_slice(&v6.ip().octets());
            out.extend_from_slice(&v6.flowinfo().to_le_bytes());
            out.extend_from_slice(&v6.scope_id().to_le_bytes());
        }
    }
}

fn put_endpoint(out: &mut Vec<u8>, endpoint: &Endpoint) {
    out.push(match endpoint.kind {
        Kind::Tcp => 0,
        Kind::Unix => 1,
        Kind::Udp => 2,
    });
    match &endpoint.place {
        Place::Ip(address) => put_address(out, Some(address)),
        Place::Port(port) => {
            out.push(1);
            out.extend_from_slice(&port.to_le_bytes());
        }
        Place::Fd(number) => {
            out.push(2);
            out.extend_from_slice(&number.to_le_bytes());
        }
        Place::Path(path) => {
            out.push(3);
            let path = path.as_os_str().as_bytes();
            // A path of 64 KiB or more gets a saturated length, so the reader rejects the frame. No
            // system supports paths of this length.
            let length = u16::try_from(path.len()).unwrap_or(u16::MAX);
            out.extend_from_slice(&length.to_le_bytes());
            out.extend_from_slice(path);
        }
    }
}

fn put_flags(out: &mut Vec<u8>, flags: &BindFlags) {
    out.extend_from_slice(&flags.backlog.to_le_bytes());
    let bits = [
        flags.ipv6_only,
        flags.reuse_addr,
        flags.readable_all,
        flags.writable_all,
        flags.parking.idle_seconds.is_some(),
        flags.parking.wait_for_data.is_some(),
        flags.parking.wait_for_data == Some(true),
    ];
    let bits = bits.iter().enumerate();
    out.push(bits.fold(0, |sum, (n, bit)| sum | u8::from(*bit) << n));
    let idle_seconds = flags.parking.idle_seconds.unwrap_or(0);
    out.extend_from_slice(&idle_seconds.to_le_bytes());
}

fn put_policy(out: &mut Vec<u8>, policy: SchedulingPolicy) {
    out.push(match policy {
        SchedulingPolicy::RoundRobin => 0,
        SchedulingPolicy::Shared => 1,
        SchedulingPolicy::Sharded => 2,
    });
}

/// The unread rest of a body. Each method except `finish` reads a value from the front, and returns
/// `None` if the body is malformed.
struct Body<'a>(&'a [u8]);

impl Body<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }
    fn u8(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }
    fn bool(&mut self) -> Option<bool> {
        match self.u8()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }
    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
    fn handle(&mut self) -> Option<HandleId> {
        self.u32().map(HandleId)
    }
    fn connection(&mut self) -> Option<ConnectionId> {
        self.u32().map(ConnectionId)
    }
    fn ip(&mut self, family: u8) -> Option<SocketAddr> {
        let port = self.u16()?;
        match family {
            4 => {
                let ip = Ipv4Addr::from(self.array::<4>()?);
                Some(SocketAddrV4::new(ip, port).into())
            }
            6 => {
                let ip = Ipv6Addr::from(self.array::<16>()?);
                let flow = self.u32()?;
                Some(SocketAddrV6::new(ip, port, flow, self.u32()?).into())
            }
            _ => None,
        }
    }
    /// Reads an optional address. Returns `Some(None)` if the body states that the listener has no
    /// address.
    fn address(&mut self) -> Option<Option<SocketAddr>> {
        match self.u8()? {
            0 => Some(None),
            family => self.ip(family).map(Some),
        }
    }
    fn endpoint(&mut self) -> Option<Endpoint> {
        let kind = match self.u8()? {
            0 => Kind::Tcp,
            1 => Kind::Unix,
            2 => Kind::Udp,
            _ => return None,
        };
        let place = match self.u8()? {
            1 => Place::Port(self.u16()?),
            2 => Place::Fd(self.array().map(i32::from_le_bytes)?),
            3 => {
                let length = self.u16()?;
                let (path, rest) = self.0.split_at_checked(length.into())?;
                self.0 = rest;
                Place::Path(OsStr::from_bytes(path).into())
            }
            family => Place::Ip(self.ip(family)?),
        };
        let possible = match (kind, &place) {
            (_, Place::Fd(_)) => true,
            (Kind::Unix, place) => matches!(place, Place::Path(_)),
            (Kind::Tcp, place) => !matches!(place, Place::Path(_)),
            (Kind::Udp, place) => matches!(place, Place::Ip(_)),
        };
        possible.then_some(Endpoint { kind, place })
    }
    fn flags(&mut self) -> Option<BindFlags> {
        let backlog = self.u32()?;
        let bits = self.u8()?;
        let idle_seconds = self.u32()?;
        let bit = |n: u8| bits & 1 << n != 0;
        let is_consistent = (bit(4) || idle_seconds == 0) && (bit(5) || !bit(6));
        (bits < 128 && is_consistent).then(|| BindFlags {
            backlog,
            ipv6_only: bit(0),
            reuse_addr: bit(1),
            readable_all: bit(2),
            writable_all: bit(3),
            parking: Parking {
                idle_seconds: bit(4).then_some(idle_seconds),
                wait_for_data: bit(5).then_some(bit(6)),
            },
        })
    }
    /// Returns the body of a frame that carries an idle connection.
    fn parked(&mut self) -> Option<(HandleId, u32)> {
        Some((self.handle()?, self.u32()?))
    }
    fn policy(&mut self) -> Option<SchedulingPolicy> {
        match self.u8()? {
            0 => Some(SchedulingPolicy::RoundRobin),
            1 => Some(SchedulingPolicy::Shared),
            2 => Some(SchedulingPolicy::Sharded),
            _ => None,
        }
    }
    /// Returns the decoded frame, or an error if `frame` is `None` or a part of the body is unread.
    fn finish<F>(self, kind: u8, frame: Option<F>) -> Result<F, FrameError> {
        frame
            .filter(|_| self.0.is_empty())
            .ok_or(FrameError::Body(kind))
    }
}

impl Frame for ToMaster {
    /// No limit. Each of these frames carries a connection that the worker had open before, so the
    /// frames do not increase the number of open descriptors.
    const UNREAD_FDS_MAX: usize = usize::MAX;

    fn encode(&self, fds: usize, out: &mut Vec<u8>) {
        match self {
            Self::Online => put_frame(out, kind::ONLINE, fds, |_| {}),
            Self::Listen {
                request,
                key,
                flags,
            } => put_frame(out, kind::LISTEN, fds, |out| {
                out.extend_from_slice(&request.to_le_bytes());
                out.extend_from_slice(&key.index.to_le_bytes());
                put_flags(out, flags);
                put_endpoint(out, &key.endpoint);
            }),
            Self::Listening { handle } => put_handle_frame(out, kind::LISTENING, fds, *handle),
            Self::Idle {
                handle,
                received,
                open,
            } => put_frame(out, kind::IDLE, fds, |out| {
                put_handle(out, *handle);
                out.extend_from_slice(&received.to_le_bytes());
                out.extend_from_slice(&open.to_le_bytes());
            }),
            Self::Pause { handle } => put_handle_frame(out, kind::PAUSE, fds, *handle),
            Self::Release { handle } => put_handle_frame(out, kind::RELEASE, fds, *handle),
            Self::DisconnectRequest => put_frame(out, kind::DISCONNECT_REQUEST, fds, |_| {}),
            Self::Park { handle, parked } => {
                put_parked_frame(out, kind::PARK, fds, *handle, *parked);
            }
            Self::ParkAgain { connection } => {
                put_connection_frame(out, kind::PARK_AGAIN, fds, *connection);
            }
            Self::Detach { connection } => {
                put_connection_frame(out, kind::DETACH, fds, *connection);
            }
            Self::Message(bytes) => put_message(out, fds, bytes),
        }
    }

    fn message(body: Vec<u8>) -> Self {
        Self::Message(body)
    }

    fn decode(kind: u8, fds: usize, body: &[u8]) -> Result<Self, FrameError> {
        let mut body = Body(body);
        let frame = match kind {
            kind::MESSAGE => return Ok(Self::Message(body.0.to_vec())),
            kind::ONLINE => Some(Self::Online),
            kind::LISTEN => Self::decode_listen(&mut body),
            kind::LISTENING => body.handle().map(|handle| Self::Listening { handle }),
            kind::IDLE => Self::decode_idle(&mut body),
            kind::PAUSE => body.handle().map(|handle| Self::Pause { handle }),
            kind::RELEASE => body.handle().map(|handle| Self::Release { handle }),
            kind::DISCONNECT_REQUEST => Some(Self::DisconnectRequest),
            kind::PARK => {
                let parked = body.parked();
                parked.map(|(handle, parked)| Self::Park { handle, parked })
            }
            kind::PARK_AGAIN => {
                let connection = body.connection();
                connection.map(|connection| Self::ParkAgain { connection })
            }
            kind::DETACH => {
                let connection = body.connection();
                connection.map(|connection| Self::Detach { connection })
            }
            _ => return Err(FrameError::Kind(kind)),
        };
        let frame = body.finish(kind, frame)?;
        if fds != usize::from(frame.carries_connection()) {
            return Err(FrameError::Descriptors);
        }
        Ok(frame)
    }
}

impl ToMaster {
    /// Returns whether the frame must carry the descriptor of a connection.
    fn carries_connection(&self) -> bool {
        matches!(self, Self::Park { .. })
    }

    fn decode_listen(body: &mut Body<'_>) -> Option<Self> {
        let request = body.u32()?;
        let index = body.u32()?;
        let flags = body.flags()?;
        let endpoint = body.endpoint()?;
        let key = HandleKey { endpoint, index };
        Some(Self::Listen {
            request,
            key,
            flags,
        })
    }

    fn decode_idle(body: &mut Body<'_>) -> Option<Self> {
        Some(Self::Idle {
            handle: body.handle()?,
            received: body.u64()?,
            open: body.u32()?,
        })
    }
}

impl Frame for ToWorker {
    /// Each of these frames keeps a descriptor open in the master. A well-behaved worker causes at
    /// most a few of them for each of the 64 listeners that it may have.
    const UNREAD_FDS_MAX: usize = 256;

    fn encode(&self, fds: usize, out: &mut Vec<u8>) {
        match self {
            Self::Reply { request, result } => put_frame(out, kind::REPLY, fds, |out| {
                out.extend_from_slice(&request.to_le_bytes());
                match result {
                    Ok(bound) => {
                        out.extend_from_slice(&0i32.to_le_bytes());
                        put_handle(out, bound.handle);
                        put_policy(out, bound.policy);
                        put_address(out, bound.address.as_ref());
                    }
                    Err(errno) => out.extend_from_slice(&errno.to_le_bytes()),
                }
            }),
            Self::ListenerClosed { handle, drain } => {
                put_frame(out, kind::LISTENER_CLOSED, fds, |out| {
                    put_handle(out, *handle);
                    out.push(u8::from(*drain));
                });
            }
            Self::Disconnect => put_frame(out, kind::DISCONNECT, fds, |_| {}),
            Self::Adopt { handle, parked } => {
                put_parked_frame(out, kind::ADOPT, fds, *handle, *parked);
            }
            Self::Message(bytes) => put_message(out, fds, bytes),
        }
    }

    fn message(body: Vec<u8>) -> Self {
        Self::Message(body)
    }

    fn decode(kind: u8, fds: usize, body: &[u8]) -> Result<Self, FrameError> {
        let mut body = Body(body);
        let frame = match kind {
            kind::MESSAGE => return Ok(Self::Message(body.0.to_vec())),
            kind::REPLY => Self::decode_reply(&mut body),
            kind::LISTENER_CLOSED => Self::decode_listener_closed(&mut body),
            kind::DISCONNECT => Some(Self::Disconnect),
            kind::ADOPT => {
                let parked = body.parked();
                parked.map(|(handle, parked)| Self::Adopt { handle, parked })
            }
            _ => return Err(FrameError::Kind(kind)),
        };
        let frame = body.finish(kind, frame)?;
        if fds != usize::from(frame.carries_fd()) {
            return Err(FrameError::Descriptors);
        }
        Ok(frame)
    }
}

impl ToWorker {
    /// Returns whether the frame must carry the descriptor of a listener, a UDP socket, a queue or
    /// a connection.
    fn carries_fd(&self) -> bool {
        matches!(self, Self::Reply { result: Ok(_), .. } | Self::Adopt { .. })
    }

    fn decode_reply(body: &mut Body<'_>) -> Option<Self> {
        let request = body.u32()?;
        let errno = body.array().map(i32::from_le_bytes)?;
        let result = match errno {
            0 => Ok(Bound {
                handle: body.handle()?,
                policy: body.policy()?,
                address: body.address()?,
            }),
            errno => Err(errno),
        };
        Some(Self::Reply { request, result })
    }

    fn decode_listener_closed(body: &mut Body<'_>) -> Option<Self> {
        Some(Self::ListenerClosed {
            handle: body.handle()?,
            drain: body.bool()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(frame: &impl Frame, fds: usize) -> Vec<u8> {
        let mut out = Vec::new();
        frame.encode(fds, &mut out);
        out
    }

    fn decode<F: Frame>(bytes: &[u8]) -> Result<F, FrameError> {
        let (header, body) = bytes.split_first_chunk().ok_or(FrameError::Body(0))?;
        let header = Header::decode(*header)?;
        if header.length != body.len() {
            return Err(FrameError::Body(0));
        }
        F::decode(header.kind, header.fds, body)
    }

    const H: HandleId = HandleId(0x0102_0304);

    fn listen(kind: Kind, place: Place) -> ToMaster {
        let endpoint = Endpoint { kind, place };
        ToMaster::Listen {
            request: 5,
            key: HandleKey { endpoint, index: 1 },
            flags: BindFlags {
                backlog: 511,
                ipv6_only: true,
                parking: Parking {
                    idle_seconds: Some(10),
                    wait_for_data: Some(false),
                },
                ..BindFlags::default()
            },
        }
    }

    /// The bytes from the version to the idle seconds, which all `Listen` frames of these tests
    /// share.
    const LISTEN: [u8; 21] = [
        2, 2, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 255, 1, 0, 0, 49, 10, 0, 0, 0,
    ];

    fn to_master() -> Vec<(ToMaster, Vec<u8>)> {
        let ip = |text: &str| Place::Ip(text.parse().unwrap());
        let mut v6 = vec![0, 6, 64, 31];
        v6.extend([0; 15]);
        v6.push(1);
        v6.extend([0; 8]);
        let listens = [
            (
                Kind::Tcp,
                ip("127.0.0.1:8000"),
                vec![0, 4, 64, 31, 127, 0, 0, 1],
            ),
            (Kind::Tcp, ip("[::1]:8000"), v6),
            (Kind::Tcp, Place::Port(8000), vec![0, 1, 64, 31]),
            (
                Kind::Unix,
                Place::Path("/a".into()),
                vec![1, 3, 2, 0, b'/', b'a'],
            ),
            (Kind::Udp, Place::Fd(3), vec![2, 2, 3, 0, 0, 0]),
        ];
        let listens = listens.map(|(kind, place, end)| {
            let length = u8::try_from(LISTEN.len() - 4 + end.len()).unwrap();
            let golden = [&[length, 0, 0, 0], &LISTEN[..], &end].concat();
            (listen(kind, place), golden)
        });
        let mut all = Vec::from(listens);
        all.extend(simple_to_master());
        all
    }

    fn simple_to_master() -> Vec<(ToMaster, Vec<u8>)> {
        vec![
            (ToMaster::Online, vec![0, 0, 0, 0, 2, 1, 0, 0]),
            (
                ToMaster::Listening { handle: H },
                vec![4, 0, 0, 0, 2, 3, 0, 0, 4, 3, 2, 1],
            ),
            (
                ToMaster::Idle {
                    handle: H,
                    received: 3,
                    open: 2,
                },
                vec![
                    16, 0, 0, 0, 2, 4, 0, 0, 4, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0,
                ],
            ),
            (
                ToMaster::Release { handle: H },
                vec![4, 0, 0, 0, 2, 6, 0, 0, 4, 3, 2, 1],
            ),
            (ToMaster::DisconnectRequest, vec![0, 0, 0, 0, 2, 7, 0, 0]),
            (
                ToMaster::Pause { handle: H },
                vec![4, 0, 0, 0, 2, 5, 0, 0, 4, 3, 2, 1],
            ),
            (
                ToMaster::ParkAgain {
                    connection: ConnectionId(7),
                },
                vec![4, 0, 0, 0, 2, 9, 0, 0, 7, 0, 0, 0],
            ),
            (
                ToMaster::Detach {
                    connection: ConnectionId(7),
                },
                vec![4, 0, 0, 0, 2, 10, 0, 0, 7, 0, 0, 0],
            ),
            (
                ToMaster::Message(b"hi".to_vec()),
                vec![2, 0, 0, 0, 2, 127, 0, 0, b'h', b'i'],
            ),
        ]
    }

    fn to_worker() -> Vec<(ToWorker, usize, Vec<u8>)> {
        vec![
            (
                ToWorker::Reply {
                    request: 5,
                    result: Ok(Bound {
                        handle: H,
                        policy: SchedulingPolicy::Shared,
                        address: "127.0.0.1:8000".parse().ok(),
                    }),
                },
                1,
                vec![
                    20, 0, 0, 0, 2, 65, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 1, 4, 64, 31,
                    127, 0, 0, 1,
                ],
            ),
            (
                ToWorker::Reply {
                    request: 5,
                    result: Err(98),
                },
                0,
                vec![8, 0, 0, 0, 2, 65, 0, 0, 5, 0, 0, 0, 98, 0, 0, 0],
            ),
            (
                ToWorker::ListenerClosed {
                    handle: H,
                    drain: true,
                },
                0,
                vec![5, 0, 0, 0, 2, 66, 0, 0, 4, 3, 2, 1, 1],
            ),
            (ToWorker::Disconnect, 0, vec![0, 0, 0, 0, 2, 67, 0, 0]),
            (
                ToWorker::Adopt {
                    handle: H,
                    parked: 3,
                },
                1,
                vec![8, 0, 0, 0, 2, 68, 1, 0, 4, 3, 2, 1, 3, 0, 0, 0],
            ),
            (
                ToWorker::Message(b"hi".to_vec()),
                0,
                vec![2, 0, 0, 0, 2, 127, 0, 0, b'h', b'i'],
            ),
        ]
    }

    #[test]
    fn frames_encode_to_fixed_bytes() {
        for (frame, golden) in to_master() {
            assert_eq!(bytes(&frame, 0), golden, "{frame:?}");
            assert_eq!(decode::<ToMaster>(&golden), Ok(frame));
        }
        for (frame, fds, golden) in to_worker() {
            assert_eq!(bytes(&frame, fds), golden, "{frame:?}");
            assert_eq!(decode::<ToWorker>(&golden), Ok(frame));
        }
    }

    #[test]
    fn parked_connection_needs_exactly_one_descriptor() {
        let (handle, parked) = (H, 3);
        let park = ToMaster::Park { handle, parked };
        let golden = [8, 0, 0, 0, 2, 8, 1, 0, 4, 3, 2, 1, 3, 0, 0, 0];
        assert_eq!(bytes(&park, 1), golden);
        let decode = |fds| ToMaster::decode(kind::PARK, fds, &golden[HEADER..]);
        assert_eq!(decode(1), Ok(park));
        for fds in [0, 2] {
            assert_eq!(decode(fds), Err(FrameError::Descriptors));
        }
    }

    #[test]
    fn preamble_states_its_version_and_is_no_other_frame() {
        let bytes = preamble(WorkerId::new(7));
        assert_eq!(bytes, [4, 0, 0, 0, 2, 64, 1, 1, 7, 0, 0, 0]);
        assert_eq!(preamble_version(bytes), Some(VERSION));
        assert_eq!(preamble_version([1; PREAMBLE_LENGTH]), None);
        assert_eq!(
            decode::<ToWorker>(&bytes),
            Err(FrameError::Kind(kind::PREAMBLE))
        );
    }

    #[test]
    fn truncated_body_is_an_error() {
        let golden = to_master().into_iter().map(|(_, bytes)| bytes);
        for bytes in golden.filter(|bytes| bytes[5] != kind::MESSAGE) {
            for cut in HEADER..bytes.len() {
                let mut short = bytes[..cut].to_vec();
                short[0] = u8::try_from(cut - HEADER).unwrap();
                assert_eq!(decode::<ToMaster>(&short), Err(FrameError::Body(bytes[5])));
            }
        }
    }

    #[test]
    fn changed_byte_makes_an_error_or_another_frame() {
        for (_, bytes) in to_master() {
            for (at, value) in (0..bytes.len()).flat_map(|at| (0..=255).map(move |v| (at, v))) {
                let mut changed = bytes.clone();
                changed[at] = value;
                if let Ok(frame) = decode::<ToMaster>(&changed) {
                    // Set the batch size to 0 before the comparison, because `encode` leaves the
                    // batch size to the outbox.
                    let batch = std::mem::take(&mut changed[BATCH_OFFSET]);
                    assert!(batch == 0 || changed[6] > 0);
                    assert_eq!(super::tests::bytes(&frame, changed[6].into()), changed);
                }
            }
        }
    }

    #[test]
    fn header_over_a_limit_is_an_error() {
        let long = [1, 0, 16, 0, VERSION, kind::MESSAGE, 0, 0];
        assert_eq!(
            Header::decode(long),
            Err(FrameError::TooLong(u32::try_from(MAX_BODY).unwrap() + 1))
        );
        let version = [0, 0, 0, 0, 3, kind::MESSAGE, 0, 0];
        assert_eq!(Header::decode(version), Err(FrameError::Version(3)));
        for (fds, batch) in [(17, 0), (17, 17), (1, 65), (0, 1), (2, 1)] {
            let header = [0, 0, 0, 0, VERSION, kind::MESSAGE, fds, batch];
            assert_eq!(Header::decode(header), Err(FrameError::Descriptors));
        }
    }

    #[test]
    fn frame_of_the_other_direction_is_an_error() {
        for (_, bytes) in to_master() {
            if bytes[5] != kind::MESSAGE {
                assert_eq!(decode::<ToWorker>(&bytes), Err(FrameError::Kind(bytes[5])));
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_an_error(kind: u8, fds in 0..20usize, body: Vec<u8>) {
            let _ = ToMaster::decode(kind, fds, &body);
            let _ = ToWorker::decode(kind, fds, &body);
        }
    }
}
