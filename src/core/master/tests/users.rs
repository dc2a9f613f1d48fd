//! Tests of workers with different users that serve the same listener.

use super::*;
use crate::core::dispatch::Sequenced;
use crate::types::connection_id::ConnectionId;

const OTHER: Credentials = Credentials { uid: 1, gid: 0 };

/// Returns the core of a master whose listener two workers of one user and one worker of another
/// user serve, with the listener's handle and the workers. All are idle.
fn serving_as_two_users() -> (Core, HandleId, [WorkerId; 3]) {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let handle = retain(&mut core, port(1));
    let workers = [Credentials::default(), Credentials::default(), OTHER].map(|credentials| {
        let worker = online_as(&mut core, credentials);
        request(&mut core, worker, port(1));
        report_idle(&mut core, worker, handle, 0);
        worker
    });
    core.drained(handle);
    actions(&mut core);
    (core, handle, workers)
}

fn report_idle(core: &mut Core, worker: WorkerId, handle: HandleId, received: u64) {
    let idle = ToMaster::Idle {
        handle,
        received,
        open: 0,
    };
    core.frame(worker, idle);
}

/// Makes a worker park a connection for the first time. Returns the connection's id.
fn park(core: &mut Core, worker: WorkerId, handle: HandleId) -> ConnectionId {
    core.park(worker, handle, 0, 1);
    let id = actions(core).into_iter().find_map(|action| match action {
        Action::Hold { id, .. } => Some(id),
        _ => None,
    });
    id.unwrap()
}

/// Returns the workers to which connections are dispatched, and the connections in their queues.
fn dispatched(core: &mut Core) -> Vec<(WorkerId, Sequenced<HandOff<u32>>)> {
    let dispatched = actions(core).into_iter().filter_map(|action| match action {
        Action::Dispatch {
            worker, connection, ..
        } => Some((worker, connection)),
        _ => None,
    });
    dispatched.collect()
}

fn check(core: &Core) {
    assert_eq!(core.ledger().in_flight(), core.in_flight());
}

#[test]
fn parked_connection_returns_only_to_workers_of_the_same_user() {
    let (mut core, handle, [first, second, other]) = serving_as_two_users();
    let id = park(&mut core, first, handle);
    let mut received = [0; 2];
    for _ in 0..6 {
        core.data_arrived(id);
        let all = dispatched(&mut core);
        assert_eq!(all.len(), 1, "{all:?}");
        let worker = all[0].0;
        assert_ne!(worker, other);
        let count = &mut received[usize::from(worker == second)];
        *count += 1;
        core.frame(worker, ToMaster::ParkAgain { connection: id });
        report_idle(&mut core, worker, handle, *count);
        actions(&mut core);
        check(&core);
    }
    // A connection that no worker has had goes to any worker.
    core.accepted(handle, 7);
    core.accepted(handle, 8);
    core.accepted(handle, 9);
    let workers: Vec<_> = dispatched(&mut core).iter().map(|(to, _)| *to).collect();
    assert!(workers.contains(&other), "{workers:?}");
}

#[test]
fn reclaimed_connection_waits_for_a_worker_of_the_same_user() {
    let (mut core, handle, [first, second, other]) = serving_as_two_users();
    core.disconnect(second);
    actions(&mut core);
    let id = park(&mut core, first, handle);
    core.data_arrived(id);
    let (worker, connection) = dispatched(&mut core).remove(0);
    assert_eq!(worker, first);
    core.frame(first, ToMaster::Pause { handle });
    actions(&mut core);
    core.reclaimed(handle, first, vec![connection], true);
    assert!(dispatched(&mut core).is_empty(), "{other} is idle");
    check(&core);
    report_idle(&mut core, first, handle, 0);
    assert_eq!(dispatched(&mut core)[0].0, first);
    check(&core);
}

#[test]
fn connection_for_a_busy_worker_stays_in_the_master_while_a_worker_of_another_user_is_idle() {
    let (mut core, handle, [first, second, _]) = serving_as_two_users();
    core.disconnect(second);
    actions(&mut core);
    let ids = [first, first].map(|worker| park(&mut core, worker, handle));
    core.data_arrived(ids[0]);
    assert_eq!(dispatched(&mut core).len(), 1);
    core.data_arrived(ids[1]);
    // In the worker's queue, the connection could be reclaimed for the idle worker again and again.
    assert!(dispatched(&mut core).is_empty());
    check(&core);
    report_idle(&mut core, first, handle, 1);
    assert_eq!(dispatched(&mut core)[0].0, first);
    check(&core);
}

#[test]
fn idle_connections_close_when_the_last_worker_of_their_user_disconnects() {
    let (mut core, handle, [first, second, other]) = serving_as_two_users();
    let ids = [first, second, other].map(|worker| park(&mut core, worker, handle));
    core.disconnect(first);
    assert_eq!(core.sizes().held, 3, "{second} may have it");
    core.disconnect(second);
    let closed = |action: Action<u32>| match action {
        Action::CloseHeld { id } => Some(id),
        _ => None,
    };
    let closed: Vec<_> = actions(&mut core).into_iter().filter_map(closed).collect();
    assert_eq!(closed, ids[..2]);
    assert_eq!(core.ledger().idle_closed, 2);
    check(&core);
    // The last worker parks another connection. No worker of its user serves the listener.
    core.park(second, handle, 0, 1);
    assert_eq!((core.ledger().idle_closed, core.sizes().held), (3, 1));
    check(&core);
}

#[test]
fn request_is_dropped_if_no_worker_of_the_user_is_left() {
    let (mut core, handle, [first, second, _]) = serving_as_two_users();
    core.disconnect(second);
    let id = park(&mut core, first, handle);
    core.frame(first, ToMaster::Pause { handle });
    core.data_arrived(id);
    assert!(dispatched(&mut core).is_empty(), "{first} is paused");
    core.disconnect(first);
    core.reclaimed(handle, first, Vec::new(), true);
    assert!(dispatched(&mut core).is_empty());
    assert_eq!((core.ledger().dropped, core.sizes().held), (1, 0));
    check(&core);
}

#[test]
fn idle_connections_of_a_shared_listener_go_to_workers_of_the_same_user() {
    let mut core = Core::new(SchedulingPolicy::Shared);
    let worker_as = |core: &mut Core, credentials| {
        let worker = online_as(core, credentials);
        core.frame(worker, listen_frame(port(80)));
        worker
    };
    let leaving = worker_as(&mut core, Credentials::default());
    let handle = HandleId(1);
    core.bound(handle, Ok(None));
    let other = worker_as(&mut core, OTHER);
    let second = worker_as(&mut core, Credentials::default());
    core.disconnect(leaving);
    for connection in 0..3 {
        core.park(leaving, handle, connection, 5);
    }
    let expected = [(second, 0, 5), (second, 1, 5), (second, 2, 5)];
    assert_eq!(adopted(&mut core), expected);
    core.disconnect(second);
    core.park(second, handle, 3, 5);
    assert_eq!(adopted(&mut core), [], "{other} has another user");
    assert_eq!((core.ledger().idle_closed, core.sizes().held), (1, 0));
    check(&core);
}
