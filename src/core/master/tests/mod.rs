//! Tests of the master's decisions. This file has what several of these modules use, and the tests
//! of ids.

mod adopted;
mod closing;
mod dispatch;
mod parked;
mod passed;
mod shards;
mod shared;
mod users;

use std::os::unix::process::ExitStatusExt;

use super::*;
use crate::types::endpoint::{BindAddress, BindFlags, Endpoint, Kind};
use crate::types::errno;
use crate::types::poll_number::POLL_NUMBER_MAX;
use crate::types::user::{ParkHistory, User};
use crate::wire::frame::ToMaster;

/// A core whose connections are numbers and whose messages have no descriptors.
type Core = MasterCore<u32, ()>;

/// Makes a worker listen on a port that has no listener. Returns the new listener's handle.
fn listen(core: &mut Core, worker: WorkerId, port: u16) -> HandleId {
    let endpoint = Endpoint::new(Kind::Tcp, BindAddress::Port(port));
    let listen = ToMaster::Listen {
        request: 1,
        key: HandleKey { endpoint, index: 0 },
        flags: BindFlags::default(),
    };
    core.frame(worker, listen);
    let is_bind = |action: &Action<u32>| matches!(action, Action::Bind { .. });
    let bind = std::iter::from_fn(|| core.next_action()).find(is_bind);
    let Some(Action::Bind { handle, .. }) = bind else {
        unreachable!("the port has no listener");
    };
    core.bound(handle, Ok(None));
    handle
}

fn online(core: &mut Core) -> WorkerId {
    online_as(core, User::default())
}

/// Adds a worker of the user.
fn online_as(core: &mut Core, user: User) -> WorkerId {
    let worker = core.next_worker_id().unwrap();
    core.forked(worker, user);
    core.frame(worker, ToMaster::Online);
    worker
}

/// Returns the history of a connection that a worker of the default user has parked.
fn parked_by_default(times: u32) -> ParkHistory {
    ParkHistory {
        times,
        by: Some(User::default()),
    }
}

fn port(port: u16) -> Endpoint {
    Endpoint::new(Kind::Tcp, BindAddress::Port(port))
}

fn ip(text: &str) -> Endpoint {
    Endpoint::new(Kind::Tcp, BindAddress::Ip(text.parse().unwrap()))
}

/// Opens a listener that the application retains. Returns the listener's handle.
fn retain(core: &mut Core, endpoint: Endpoint) -> HandleId {
    let (handle, policy) = (core.next_handle(), core.policy_of(&endpoint));
    core.retained(handle, endpoint, None, policy);
    handle
}

/// Makes a worker listen on an endpoint. Returns the resulting actions.
fn request(core: &mut Core, worker: WorkerId, endpoint: Endpoint) -> Vec<Action<u32>> {
    core.frame(worker, listen_frame(endpoint));
    actions(core)
}

fn listen_frame(endpoint: Endpoint) -> ToMaster {
    ToMaster::Listen {
        request: 1,
        key: HandleKey { endpoint, index: 0 },
        flags: BindFlags::default(),
    }
}

fn actions(core: &mut Core) -> Vec<Action<u32>> {
    std::iter::from_fn(|| core.next_action()).collect()
}

/// Returns the worker, the connection, and the number of times that the connection has been parked,
/// of each `MoveParked` action. A connection that the master already held is returned as `u32::MAX`.
fn moved(core: &mut Core) -> Vec<(WorkerId, u32, u32)> {
    let all = actions(core).into_iter();
    let moved = all.filter_map(|action| match action {
        Action::MoveParked {
            worker,
            connection,
            history,
            ..
        } => Some((worker, connection, history.times)),
        _ => None,
    });
    let moved = moved.map(|(worker, connection, times_parked)| match connection {
        HandOff::New(connection) => (worker, connection, times_parked),
        HandOff::Held(_) => (worker, u32::MAX, times_parked),
    });
    moved.collect()
}

/// Returns a core with a retained shared listener and three workers that serve it.
fn shared_by_three() -> (Core, HandleId, [WorkerId; 3]) {
    let mut core = Core::new(SchedulingPolicy::Shared);
    let handle = retain(&mut core, port(80));
    let workers = [(); 3].map(|()| online(&mut core));
    for worker in workers {
        request(&mut core, worker, port(80));
    }
    (core, handle, workers)
}

#[test]
fn listener_numbers_wrap_around_and_skip_those_in_use() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let worker = online(&mut core);
    assert_eq!(listen(&mut core, worker, 1), HandleId(1));
    core.last_handle = POLL_NUMBER_MAX - 1;
    assert_eq!(listen(&mut core, worker, 2), HandleId(POLL_NUMBER_MAX));
    assert_eq!(listen(&mut core, worker, 3), HandleId(2));
}

#[test]
fn worker_ids_run_out_and_are_never_used_again() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    core.last_worker = WorkerId::MAX - 1;
    let last = core.next_worker_id();
    assert_eq!(last, Some(WorkerId::new(WorkerId::MAX)));
    core.forked(last.unwrap(), User::default());
    assert_eq!(core.next_worker_id(), None);
}

#[test]
fn workers_cannot_make_the_master_accept_from_their_own_listener() {
    for policy in [SchedulingPolicy::Shared, SchedulingPolicy::Sharded] {
        let mut core = Core::new(policy);
        let handle = retain(&mut core, port(1));
        let worker = online(&mut core);
        request(&mut core, worker, port(1));
        let idle = ToMaster::Idle {
            handle,
            received: 0,
            open: 0,
        };
        core.frame(worker, idle);
        let actions = actions(&mut core);
        let is_accept = |action: &Action<u32>| matches!(action, Action::Accept { .. });
        assert!(!actions.iter().any(is_accept), "{policy:?}: {actions:?}");
        assert!(!core.is_connected(worker), "{policy:?}");
    }
}

fn is_closing(actions: &[Action<u32>]) -> bool {
    actions.iter().any(|action| {
        matches!(
            action,
            Action::AttachSynFilter { .. } | Action::Unbind { .. } | Action::RemoveFile { .. }
        )
    })
}
