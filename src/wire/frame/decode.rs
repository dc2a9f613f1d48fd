//! Decodes frames: one function for each direction, then one for each type of value in a body.

use std::ffi::OsStr;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::unix::ffi::OsStrExt as _;

use super::{Bound, ToMaster, ToWorker, Unreceived, kind};
use crate::types::connection_id::ConnectionId;
use crate::types::endpoint::{BindAddress, BindFlags, Endpoint, Kind, Parking};
use crate::types::handle::{HandleId, HandleKey};
use crate::types::policy::SchedulingPolicy;
use crate::types::protocol::FrameError;

pub(super) fn to_master(kind: u8, fds: usize, body: &[u8]) -> Result<ToMaster, FrameError> {
    let mut body = Body(body);
    let frame = match kind {
        kind::MESSAGE => return Ok(ToMaster::Message(body.0.to_vec())),
        kind::ONLINE => Some(ToMaster::Online),
        kind::LISTEN => decode_listen(&mut body),
        kind::LISTENING => body.handle().map(|handle| ToMaster::Listening { handle }),
        kind::IDLE => decode_idle(&mut body),
        kind::PAUSE => body.handle().map(|handle| ToMaster::Pause { handle }),
        kind::RELEASE => body.handle().map(|handle| ToMaster::Release { handle }),
        kind::DISCONNECT_REQUEST => Some(ToMaster::DisconnectRequest),
        kind::PARK => {
            let parked = body.parked();
            parked.map(|(handle, times_parked)| ToMaster::Park {
                handle,
                times_parked,
            })
        }
        kind::PARK_AGAIN => {
            let connection = body.connection();
            connection.map(|connection| ToMaster::ParkAgain { connection })
        }
        kind::DETACH => {
            let connection = body.connection();
            connection.map(|connection| ToMaster::Detach { connection })
        }
        _ => return Err(FrameError::Kind(kind)),
    };
    let frame = body.finish(kind, frame)?;
    if fds != usize::from(frame.carries_connection()) {
        return Err(FrameError::Descriptors);
    }
    Ok(frame)
}

fn decode_listen(body: &mut Body<'_>) -> Option<ToMaster> {
    let request = body.u32()?;
    let index = body.u32()?;
    let flags = body.flags()?;
    let endpoint = body.endpoint()?;
    let key = HandleKey { endpoint, index };
    Some(ToMaster::Listen {
        request,
        key,
        flags,
    })
}

fn decode_idle(body: &mut Body<'_>) -> Option<ToMaster> {
    Some(ToMaster::Idle {
        handle: body.handle()?,
        received: body.u64()?,
        open: body.u32()?,
    })
}

pub(super) fn to_worker(kind: u8, fds: usize, body: &[u8]) -> Result<ToWorker, FrameError> {
    let mut body = Body(body);
    let frame = match kind {
        kind::MESSAGE => return Ok(ToWorker::Message(body.0.to_vec())),
        kind::REPLY => decode_reply(&mut body),
        kind::LISTENER_CLOSED => decode_listener_closed(&mut body),
        kind::DISCONNECT => Some(ToWorker::Disconnect),
        kind::MOVE_PARKED => {
            let parked = body.parked();
            parked.map(|(handle, times_parked)| ToWorker::MoveParked {
                handle,
                times_parked,
            })
        }
        _ => return Err(FrameError::Kind(kind)),
    };
    let frame = body.finish(kind, frame)?;
    if fds != usize::from(frame.carries_fd()) {
        return Err(FrameError::Descriptors);
    }
    Ok(frame)
}

fn decode_reply(body: &mut Body<'_>) -> Option<ToWorker> {
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
    Some(ToWorker::Reply { request, result })
}

fn decode_listener_closed(body: &mut Body<'_>) -> Option<ToWorker> {
    Some(ToWorker::ListenerClosed {
        handle: body.handle()?,
        unreceived: body.unreceived()?,
    })
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
        let address = match self.u8()? {
            1 => BindAddress::Port(self.u16()?),
            2 => BindAddress::Fd(self.array().map(i32::from_le_bytes)?),
            3 => {
                let length = self.u16()?;
                let (path, rest) = self.0.split_at_checked(length.into())?;
                self.0 = rest;
                BindAddress::Path(OsStr::from_bytes(path).into())
            }
            family => BindAddress::Ip(self.ip(family)?),
        };
        let possible = match (kind, &address) {
            (_, BindAddress::Fd(_)) => true,
            (Kind::Unix, address) => matches!(address, BindAddress::Path(_)),
            (Kind::Tcp, address) => !matches!(address, BindAddress::Path(_)),
            (Kind::Udp, address) => matches!(address, BindAddress::Ip(_)),
        };
        possible.then_some(Endpoint { kind, address })
    }
    fn flags(&mut self) -> Option<BindFlags> {
        let backlog = self.u32()?;
        let bits = self.u8()?;
        let (idle_seconds, first_data_seconds) = (self.u32()?, self.u32()?);
        let bit = |n: u8| bits & 1 << n != 0;
        let is_consistent = (bit(4) || idle_seconds == 0)
            && (bit(5) || !bit(6))
            && (bit(7) || first_data_seconds == 0);
        is_consistent.then(|| BindFlags {
            backlog,
            ipv6_only: bit(0),
            reuse_addr: bit(1),
            readable_all: bit(2),
            writable_all: bit(3),
            parking: Parking {
                idle_seconds: bit(4).then_some(idle_seconds),
                first_data_seconds: bit(7).then_some(first_data_seconds),
                wait_for_data: bit(5).then_some(bit(6)),
            },
        })
    }
    /// Returns the body of a frame that carries an idle connection.
    fn parked(&mut self) -> Option<(HandleId, u32)> {
        Some((self.handle()?, self.u32()?))
    }
    fn unreceived(&mut self) -> Option<Unreceived> {
        match self.u8()? {
            0 => Some(Unreceived::GoToOthers),
            1 => Some(Unreceived::AreServed),
            2 => Some(Unreceived::ParkedAreServed),
            _ => None,
        }
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
