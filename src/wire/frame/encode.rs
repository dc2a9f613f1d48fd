//! Encodes frames: one function for each direction, then one for each type of value in a body.

use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt as _;

use super::header::HEADER;
use super::{ToMaster, ToWorker, Unreceived, kind};
use crate::types::connection_id::ConnectionId;
use crate::types::endpoint::{BindAddress, BindFlags, Endpoint, Kind};
use crate::types::handle::HandleId;
use crate::types::policy::SchedulingPolicy;
use crate::types::protocol::{MAX_FDS, VERSION};

pub(super) fn to_master(frame: &ToMaster, fds: usize, out: &mut Vec<u8>) {
    match frame {
        ToMaster::Online => put_frame(out, kind::ONLINE, fds, |_| {}),
        ToMaster::Listen {
            request,
            key,
            flags,
        } => put_frame(out, kind::LISTEN, fds, |out| {
            out.extend_from_slice(&request.to_le_bytes());
            out.extend_from_slice(&key.index.to_le_bytes());
            put_flags(out, flags);
            put_endpoint(out, &key.endpoint);
        }),
        ToMaster::Listening { handle } => put_handle_frame(out, kind::LISTENING, fds, *handle),
        ToMaster::Idle {
            handle,
            received,
            open,
        } => put_frame(out, kind::IDLE, fds, |out| {
            put_handle(out, *handle);
            out.extend_from_slice(&received.to_le_bytes());
            out.extend_from_slice(&open.to_le_bytes());
        }),
        ToMaster::Pause { handle } => put_handle_frame(out, kind::PAUSE, fds, *handle),
        ToMaster::Release { handle } => put_handle_frame(out, kind::RELEASE, fds, *handle),
        ToMaster::DisconnectRequest => put_frame(out, kind::DISCONNECT_REQUEST, fds, |_| {}),
        ToMaster::Park {
            handle,
            times_parked,
        } => {
            put_parked_frame(out, kind::PARK, fds, *handle, *times_parked);
        }
        ToMaster::ParkAgain { connection } => {
            put_connection_frame(out, kind::PARK_AGAIN, fds, *connection);
        }
        ToMaster::Detach { connection } => {
            put_connection_frame(out, kind::DETACH, fds, *connection);
        }
        ToMaster::Message(bytes) => put_message(out, fds, bytes),
    }
}

pub(super) fn to_worker(frame: &ToWorker, fds: usize, out: &mut Vec<u8>) {
    match frame {
        ToWorker::Reply { request, result } => put_frame(out, kind::REPLY, fds, |out| {
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
        ToWorker::ListenerClosed { handle, unreceived } => {
            put_frame(out, kind::LISTENER_CLOSED, fds, |out| {
                put_handle(out, *handle);
                out.push(match unreceived {
                    Unreceived::GoToOthers => 0,
                    Unreceived::AreServed => 1,
                    Unreceived::ParkedAreServed => 2,
                });
            });
        }
        ToWorker::Disconnect => put_frame(out, kind::DISCONNECT, fds, |_| {}),
        ToWorker::MoveParked {
            handle,
            times_parked,
        } => {
            put_parked_frame(out, kind::MOVE_PARKED, fds, *handle, *times_parked);
        }
        ToWorker::Message(bytes) => put_message(out, fds, bytes),
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
fn put_parked_frame(out: &mut Vec<u8>, kind: u8, fds: usize, handle: HandleId, times_parked: u32) {
    put_frame(out, kind, fds, |out| {
        put_handle(out, handle);
        out.extend_from_slice(&times_parked.to_le_bytes());
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
    match &endpoint.address {
        BindAddress::Ip(address) => put_address(out, Some(address)),
        BindAddress::Port(port) => {
            out.push(1);
            out.extend_from_slice(&port.to_le_bytes());
        }
        BindAddress::Fd(number) => {
            out.push(2);
            out.extend_from_slice(&number.to_le_bytes());
        }
        BindAddress::Path(path) => {
            out.push(3);
            let path = path.as_bytes();
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
        flags.parking.first_data_seconds.is_some(),
    ];
    let bits = bits.iter().enumerate();
    out.push(bits.fold(0, |sum, (n, bit)| sum | u8::from(*bit) << n));
    let parking = &flags.parking;
    for seconds in [parking.idle_seconds, parking.first_data_seconds] {
        out.extend_from_slice(&seconds.unwrap_or(0).to_le_bytes());
    }
}

fn put_policy(out: &mut Vec<u8>, policy: SchedulingPolicy) {
    out.push(match policy {
        SchedulingPolicy::RoundRobin => 0,
        SchedulingPolicy::Shared => 1,
        SchedulingPolicy::Sharded => 2,
    });
}
