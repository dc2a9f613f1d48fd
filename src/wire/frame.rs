//! What master and worker say to each other, as bytes. Pure: no socket, no clock.
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
//! All numbers are little-endian. `fds` counts the descriptors that travel with the frame: they
//! arrive with its first byte or before, in the order of the frames. Descriptors leave in batches, one
//! with a call to the system; `batch` counts those of the batch that the frame's own are the first
//! of, and is 0 in other frames. So the reader knows it if the kernel had to drop some.
//!
//! The master begins with a welcome, of kind 64, whose body is the worker's id. It is there before the
//! worker's program begins, so that a process can see whether what it takes for its channel is one.
//!
//! With a `Reply` comes a copy of the listener, or the end of a queue by which the connections come
//! (`sys/queue`), depending on the policy.
//!
//! ```text
//! kind  to master   body                       | kind  to worker   body                    fds
//!   1   Online                                 |  65   Reply       request 4, errno 4,
//!   2   Listen      request 4, index 4,        |                   handle 4, policy 1,
//!                   backlog 4, flags 1,        |                   address                 0, 1
//!                   kind 1, place              |
//!   3   Listening   handle 4                   |
//!   4   Ready       handle 4, taken 8, open 4  |  66   End         handle 4, drain 1
//!   5   Revoke      handle 4                   |  67   Disconnect
//!   6   Close       handle 4                   | 127   Message     the program's bytes       n
//!   7   Leaving                                |
//! 127   Message     the program's bytes        |
//!
//! address: family 1 (4, 6, or 0 for none), port 2, IP 4 or 16; for family 6 then flow 4, scope 4
//! place:   an address, or 1 and a port 2, or 2 and a descriptor's number 4, or 3, length 2 and a path
//! kind:    0 TCP, 1 Unix, 2 UDP
//! flags:   1 ipv6_only, 2 reuse_addr, 4 readable_all, 8 writable_all
//! ```

use std::ffi::OsStr;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::unix::ffi::OsStrExt as _;

use crate::config::settings::SchedulingPolicy;
use crate::types::endpoint::{BindFlags, Endpoint, Kind, Place};
use crate::types::worker_id::WorkerId;

/// Version of the format; a frame with another one is refused.
pub(crate) const VERSION: u8 = 1;
/// Bytes before the body.
pub(crate) const HEADER: usize = 8;
/// Bytes of the welcome.
pub(crate) const PREAMBLE_LENGTH: usize = HEADER + 4;
/// The longest body in bytes, and so the longest message. A longer one is refused by its header,
/// before a byte of it is stored.
pub(crate) const MAX_BODY: usize = 1 << 20;
/// The most descriptors one frame may carry.
pub(crate) const MAX_FDS: usize = 16;
/// The most descriptors that leave with one call to the system.
pub(crate) const MAX_BATCH: usize = 64;
/// Where a frame says how many its batch has; known when it leaves.
pub(crate) const BATCH: usize = 7;

const PREAMBLE: u8 = 64;
const MESSAGE: u8 = 127;

/// Names a bound listener of the master to the workers that use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HandleId(pub(crate) u32);

/// What a worker asks to listen on. Workers that ask with equal keys share a listener.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HandleKey {
    pub(crate) endpoint: Endpoint,
    /// Tells apart several listens on one endpoint within a worker, so that the n-th `listen` on
    /// port 0 is the same port in every worker, and another one than its first.
    pub(crate) index: u32,
}

/// How a `Listen` ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bound {
    pub(crate) handle: HandleId,
    pub(crate) policy: SchedulingPolicy,
    /// The address with the real port; none for a Unix path.
    pub(crate) address: Option<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToMaster {
    /// The worker's program has called `init`.
    Online,
    Listen {
        request: u32,
        key: HandleKey,
        flags: BindFlags,
    },
    /// The worker's program has the listener that it asked for.
    Listening {
        handle: HandleId,
    },
    /// The worker's queue was empty when its program had taken `taken` connections out of it in all,
    /// and had `open` of them: it is idle.
    Idle {
        handle: HandleId,
        taken: u64,
        open: u32,
    },
    /// The worker will take nothing more from this listener; the last frame that names it.
    Release {
        handle: HandleId,
    },
    /// The worker wants to leave; the answer is `Disconnect`.
    DisconnectRequest,
    /// What is in the queue is for others: the program wants no more for now. Undone by `Ready`.
    Pause {
        handle: HandleId,
    },
    Message(Vec<u8>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToWorker {
    /// The answer to `Listen`; the error is an errno.
    Reply {
        request: u32,
        result: Result<Bound, i32>,
    },
    /// Nothing more comes from this listener. With `drain` nobody else is there to serve what the
    /// worker still has of it.
    ListenerClosed {
        handle: HandleId,
        drain: bool,
    },
    /// Leave when every listener has ended and its connections are closed.
    Disconnect,
    Message(Vec<u8>),
}

/// Why a worker's or master's bytes are not a frame. [`Error`](crate::Error) has an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameError {
    /// The frame has another version of the format: the two programs were built with different
    /// versions of this crate.
    Version(u8),
    /// The header announces a body longer than the limit.
    TooLong(u32),
    /// No frame of this kind travels in this direction.
    Kind(u8),
    /// The body does not have the form that its kind demands.
    Body(u8),
    /// More or other descriptors came than the frames announce.
    Descriptors,
    /// A well-formed frame that makes no sense now; the text says which.
    State(&'static str),
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Version(version) => {
                write!(
                    f,
                    "frame of version {version}, this program speaks {VERSION}"
                )
            }
            Self::TooLong(length) => {
                write!(f, "frame of {length} bytes, the limit is {MAX_BODY}")
            }
            Self::Kind(kind) => write!(f, "unknown kind of frame {kind}"),
            Self::Body(kind) => write!(f, "malformed frame of kind {kind}"),
            Self::Descriptors => write!(f, "descriptors that no frame announced"),
            Self::State(what) => write!(f, "{what}"),
        }
    }
}

/// What a master writes before all else.
pub(crate) fn preamble(worker: WorkerId) -> [u8; PREAMBLE_LENGTH] {
    let mut bytes = [0; PREAMBLE_LENGTH];
    bytes[..HEADER].copy_from_slice(&[4, 0, 0, 0, VERSION, PREAMBLE, 0, 0]);
    bytes[HEADER..].copy_from_slice(&worker.get().to_le_bytes());
    bytes
}

/// The version that a welcome is of, if these bytes are one.
pub(crate) fn version_of_preamble(bytes: [u8; PREAMBLE_LENGTH]) -> Option<u8> {
    let [4, 0, 0, 0, version, PREAMBLE, 0, 0, ..] = bytes else {
        return None;
    };
    Some(version)
}

/// One direction of the conversation.
pub(crate) trait Frame: Sized {
    /// Appends the frame, header included.
    fn encode(&self, fds: usize, out: &mut Vec<u8>);
    /// Reads the body of a frame whose header announced `kind`.
    fn decode(kind: u8, fds: usize, body: &[u8]) -> Result<Self, FrameError>;
    /// The frame of a message of the program's.
    fn message(body: Vec<u8>) -> Self;
}

/// The first eight bytes, checked as far as they can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) length: usize,
    pub(crate) kind: u8,
    pub(crate) fds: usize,
    pub(crate) batch: usize,
}

impl Header {
    /// The bytes before a message of the program's, which is no longer than the limit.
    pub(crate) fn of_message(length: usize, fds: usize) -> [u8; HEADER] {
        let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
        let fds = u8::try_from(fds).unwrap_or(u8::MAX);
        [a, b, c, d, VERSION, MESSAGE, fds, 0]
    }

    pub(crate) fn is_message(self) -> bool {
        self.kind == MESSAGE
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

/// Writes the header, then the body, then the length back into the header.
fn frame(out: &mut Vec<u8>, kind: u8, fds: usize, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    debug_assert!(fds <= MAX_FDS);
    let fds = u8::try_from(fds).unwrap_or(u8::MAX);
    out.extend_from_slice(&[0, 0, 0, 0, VERSION, kind, fds, 0]);
    body(out);
    // A body beyond the limit is refused by whoever queues it; beyond 4 GiB it gets a length
    // that the reader refuses.
    let length = u32::try_from(out.len() - start - HEADER).unwrap_or(u32::MAX);
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
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
            // One that does not fit is refused by the reader; no system has paths so long.
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
    ];
    let bits = bits.iter().enumerate();
    out.push(bits.fold(0, |sum, (n, bit)| sum | u8::from(*bit) << n));
}

/// Reads a body from its front; `None` where it ends too early.
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
    /// An address, or that there is none.
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
        let bit = |n: u8| bits & 1 << n != 0;
        (bits < 16).then(|| BindFlags {
            backlog,
            ipv6_only: bit(0),
            reuse_addr: bit(1),
            readable_all: bit(2),
            writable_all: bit(3),
        })
    }
    fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

impl Frame for ToMaster {
    fn encode(&self, fds: usize, out: &mut Vec<u8>) {
        match self {
            Self::Online => frame(out, 1, fds, |_| {}),
            Self::Listen {
                request,
                key,
                flags,
            } => frame(out, 2, fds, |out| {
                out.extend_from_slice(&request.to_le_bytes());
                out.extend_from_slice(&key.index.to_le_bytes());
                put_flags(out, flags);
                put_endpoint(out, &key.endpoint);
            }),
            Self::Listening { handle } => frame(out, 3, fds, |out| {
                out.extend_from_slice(&handle.0.to_le_bytes());
            }),
            Self::Idle {
                handle,
                taken,
                open,
            } => frame(out, 4, fds, |out| {
                out.extend_from_slice(&handle.0.to_le_bytes());
                out.extend_from_slice(&taken.to_le_bytes());
                out.extend_from_slice(&open.to_le_bytes());
            }),
            Self::Release { handle } => frame(out, 6, fds, |out| {
                out.extend_from_slice(&handle.0.to_le_bytes());
            }),
            Self::DisconnectRequest => frame(out, 7, fds, |_| {}),
            Self::Pause { handle } => frame(out, 5, fds, |out| {
                out.extend_from_slice(&handle.0.to_le_bytes());
            }),
            Self::Message(bytes) => frame(out, MESSAGE, fds, |out| out.extend_from_slice(bytes)),
        }
    }

    fn message(body: Vec<u8>) -> Self {
        Self::Message(body)
    }

    fn decode(kind: u8, fds: usize, body: &[u8]) -> Result<Self, FrameError> {
        if kind == MESSAGE {
            return Ok(Self::Message(body.to_vec()));
        }
        let mut body = Body(body);
        let read = |body: &mut Body<'_>| {
            let frame = match kind {
                1 => Self::Online,
                2 => {
                    let request = body.u32()?;
                    let index = body.u32()?;
                    let flags = body.flags()?;
                    let endpoint = body.endpoint()?;
                    let key = HandleKey { endpoint, index };
                    Self::Listen {
                        request,
                        key,
                        flags,
                    }
                }
                3 => Self::Listening {
                    handle: body.handle()?,
                },
                4 => Self::Idle {
                    handle: body.handle()?,
                    taken: body.u64()?,
                    open: body.u32()?,
                },
                5 => Self::Pause {
                    handle: body.handle()?,
                },
                6 => Self::Release {
                    handle: body.handle()?,
                },
                7 => Self::DisconnectRequest,
                _ => return None,
            };
            body.end()?;
            Some(frame)
        };
        match (kind, read(&mut body)) {
            (_, Some(_)) if fds > 0 => Err(FrameError::Descriptors),
            (_, Some(frame)) => Ok(frame),
            (1..=7, None) => Err(FrameError::Body(kind)),
            (_, None) => Err(FrameError::Kind(kind)),
        }
    }
}

fn put_policy(out: &mut Vec<u8>, policy: SchedulingPolicy) {
    out.push(match policy {
        SchedulingPolicy::RoundRobin => 0,
        SchedulingPolicy::Shared => 1,
        SchedulingPolicy::Sharded => 2,
    });
}

impl Frame for ToWorker {
    fn encode(&self, fds: usize, out: &mut Vec<u8>) {
        match self {
            Self::Reply { request, result } => frame(out, 65, fds, |out| {
                out.extend_from_slice(&request.to_le_bytes());
                match result {
                    Ok(bound) => {
                        out.extend_from_slice(&0i32.to_le_bytes());
                        out.extend_from_slice(&bound.handle.0.to_le_bytes());
                        put_policy(out, bound.policy);
                        put_address(out, bound.address.as_ref());
                    }
                    Err(errno) => out.extend_from_slice(&errno.to_le_bytes()),
                }
            }),
            Self::ListenerClosed { handle, drain } => frame(out, 66, fds, |out| {
                out.extend_from_slice(&handle.0.to_le_bytes());
                out.push(u8::from(*drain));
            }),
            Self::Disconnect => frame(out, 67, fds, |_| {}),
            Self::Message(bytes) => frame(out, MESSAGE, fds, |out| out.extend_from_slice(bytes)),
        }
    }

    fn message(body: Vec<u8>) -> Self {
        Self::Message(body)
    }

    fn decode(kind: u8, fds: usize, body: &[u8]) -> Result<Self, FrameError> {
        if kind == MESSAGE {
            return Ok(Self::Message(body.to_vec()));
        }
        let mut body = Body(body);
        let read = |body: &mut Body<'_>| {
            let (frame, wanted) = match kind {
                65 => {
                    let request = body.u32()?;
                    let errno = body.array().map(i32::from_le_bytes)?;
                    if errno == 0 {
                        let handle = body.handle()?;
                        let policy = match body.u8()? {
                            0 => SchedulingPolicy::RoundRobin,
                            1 => SchedulingPolicy::Shared,
                            2 => SchedulingPolicy::Sharded,
                            _ => return None,
                        };
                        let address = body.address()?;
                        let result = Ok(Bound {
                            handle,
                            policy,
                            address,
                        });
                        (Self::Reply { request, result }, 1)
                    } else {
                        let result = Err(errno);
                        (Self::Reply { request, result }, 0)
                    }
                }
                66 => {
                    let handle = body.handle()?;
                    let drain = body.bool()?;
                    (Self::ListenerClosed { handle, drain }, 0)
                }
                67 => (Self::Disconnect, 0),
                _ => return None,
            };
            body.end()?;
            Some((frame, wanted))
        };
        match (kind, read(&mut body)) {
            (_, Some((_, wanted))) if fds != wanted => Err(FrameError::Descriptors),
            (_, Some((frame, _))) => Ok(frame),
            (65..=67, None) => Err(FrameError::Body(kind)),
            (_, None) => Err(FrameError::Kind(kind)),
        }
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

    fn read<F: Frame>(bytes: &[u8]) -> Result<F, FrameError> {
        let (header, body) = bytes
            .split_first_chunk()
            .ok_or(FrameError::State("short"))?;
        let header = Header::decode(*header)?;
        if header.length != body.len() {
            return Err(FrameError::State("other length"));
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
                ..BindFlags::default()
            },
        }
    }

    /// What every `Listen` here begins with, after the length.
    const LISTEN: [u8; 17] = [1, 2, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 255, 1, 0, 0, 1];

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
            (ToMaster::Online, vec![0, 0, 0, 0, 1, 1, 0, 0]),
            (
                ToMaster::Listening { handle: H },
                vec![4, 0, 0, 0, 1, 3, 0, 0, 4, 3, 2, 1],
            ),
            (
                ToMaster::Idle {
                    handle: H,
                    taken: 3,
                    open: 2,
                },
                vec![
                    16, 0, 0, 0, 1, 4, 0, 0, 4, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0,
                ],
            ),
            (
                ToMaster::Release { handle: H },
                vec![4, 0, 0, 0, 1, 6, 0, 0, 4, 3, 2, 1],
            ),
            (ToMaster::DisconnectRequest, vec![0, 0, 0, 0, 1, 7, 0, 0]),
            (
                ToMaster::Pause { handle: H },
                vec![4, 0, 0, 0, 1, 5, 0, 0, 4, 3, 2, 1],
            ),
            (
                ToMaster::Message(b"hi".to_vec()),
                vec![2, 0, 0, 0, 1, 127, 0, 0, b'h', b'i'],
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
                    20, 0, 0, 0, 1, 65, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 1, 4, 64, 31,
                    127, 0, 0, 1,
                ],
            ),
            (
                ToWorker::Reply {
                    request: 5,
                    result: Err(98),
                },
                0,
                vec![8, 0, 0, 0, 1, 65, 0, 0, 5, 0, 0, 0, 98, 0, 0, 0],
            ),
            (
                ToWorker::ListenerClosed {
                    handle: H,
                    drain: true,
                },
                0,
                vec![5, 0, 0, 0, 1, 66, 0, 0, 4, 3, 2, 1, 1],
            ),
            (ToWorker::Disconnect, 0, vec![0, 0, 0, 0, 1, 67, 0, 0]),
            (
                ToWorker::Message(b"hi".to_vec()),
                0,
                vec![2, 0, 0, 0, 1, 127, 0, 0, b'h', b'i'],
            ),
        ]
    }

    #[test]
    fn golden_bytes() {
        for (frame, golden) in to_master() {
            assert_eq!(bytes(&frame, 0), golden, "{frame:?}");
            assert_eq!(read::<ToMaster>(&golden), Ok(frame));
        }
        for (frame, fds, golden) in to_worker() {
            assert_eq!(bytes(&frame, fds), golden, "{frame:?}");
            assert_eq!(read::<ToWorker>(&golden), Ok(frame));
        }
    }

    #[test]
    fn a_welcome_tells_its_version_and_is_no_other_frame() {
        let bytes = preamble(WorkerId::new(7));
        assert_eq!(bytes, [4, 0, 0, 0, 1, 64, 0, 0, 7, 0, 0, 0]);
        assert_eq!(version_of_preamble(bytes), Some(VERSION));
        assert_eq!(version_of_preamble([1; PREAMBLE_LENGTH]), None);
        assert_eq!(read::<ToWorker>(&bytes), Err(FrameError::Kind(PREAMBLE)));
    }

    #[test]
    fn a_truncated_body_is_an_error() {
        let golden = to_master().into_iter().map(|(_, bytes)| bytes);
        for bytes in golden.filter(|bytes| bytes[5] != MESSAGE) {
            for cut in HEADER..bytes.len() {
                let mut short = bytes[..cut].to_vec();
                short[0] = u8::try_from(cut - HEADER).unwrap();
                assert_eq!(read::<ToMaster>(&short), Err(FrameError::Body(bytes[5])));
            }
        }
    }

    #[test]
    fn a_changed_byte_is_an_error_or_another_frame() {
        for (_, bytes) in to_master() {
            for (at, value) in (0..bytes.len()).flat_map(|at| (0..=255).map(move |v| (at, v))) {
                let mut changed = bytes.clone();
                changed[at] = value;
                if let Ok(frame) = read::<ToMaster>(&changed) {
                    // Written when the frame leaves.
                    let batch = std::mem::take(&mut changed[BATCH]);
                    assert!(batch == 0 || changed[6] > 0);
                    assert_eq!(super::tests::bytes(&frame, changed[6].into()), changed);
                }
            }
        }
    }

    #[test]
    fn limits_are_in_the_header() {
        let long = [1, 0, 16, 0, VERSION, MESSAGE, 0, 0];
        assert_eq!(
            Header::decode(long),
            Err(FrameError::TooLong(u32::try_from(MAX_BODY).unwrap() + 1))
        );
        let version = [0, 0, 0, 0, 2, MESSAGE, 0, 0];
        assert_eq!(Header::decode(version), Err(FrameError::Version(2)));
        for (fds, batch) in [(17, 0), (17, 17), (1, 65), (0, 1), (2, 1)] {
            let header = [0, 0, 0, 0, VERSION, MESSAGE, fds, batch];
            assert_eq!(Header::decode(header), Err(FrameError::Descriptors));
        }
    }

    #[test]
    fn directions_do_not_mix() {
        for (_, bytes) in to_master() {
            if bytes[5] != MESSAGE {
                assert_eq!(read::<ToWorker>(&bytes), Err(FrameError::Kind(bytes[5])));
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_err(kind: u8, fds in 0..20usize, body: Vec<u8>) {
            let _ = ToMaster::decode(kind, fds, &body);
            let _ = ToWorker::decode(kind, fds, &body);
        }
    }
}
