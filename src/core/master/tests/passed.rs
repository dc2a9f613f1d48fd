//! Tests of idle connections that one master passes to the next, on listeners whose workers hold
//! their idle connections themselves.

use super::*;
use crate::types::connection_id::ConnectionId;

/// Returns the ids of the connections that these actions pass, each with the connection itself if
/// the master did not hold it before.
fn passed(actions: &[Action<u32>]) -> Vec<(ConnectionId, Option<u32>)> {
    let passed = actions.iter().filter_map(|action| match action {
        Action::Pass { id, connection, .. } => Some((*id, *connection)),
        _ => None,
    });
    passed.collect()
}

#[test]
fn worker_that_disconnects_in_an_upgrade_gives_no_connection_to_the_other_workers() {
    let (mut core, handle, [first, ..]) = shared_by_three();
    core.pass_parked();
    core.disconnect(first);
    core.park(first, handle, 7, 5);
    let all = actions(&mut core);
    let passed = passed(&all);
    let [(id, Some(7))] = passed[..] else {
        panic!("{all:?}");
    };
    assert_eq!(core.ledger().in_flight(), 1);
    core.passed(id);
    let ledger = core.ledger();
    assert_eq!((ledger.parked, ledger.passed, ledger.received), (1, 1, 0));
    assert_eq!(ledger.in_flight(), 0);
}

#[test]
fn worker_that_joins_in_an_upgrade_receives_no_connection_that_is_being_passed() {
    let (mut core, handle, workers) = shared_by_three();
    for worker in workers {
        core.disconnect(worker);
    }
    core.park(workers[0], handle, 7, 5);
    actions(&mut core);
    core.pass_parked();
    assert_eq!(passed(&actions(&mut core)).len(), 1);
    let worker = online(&mut core);
    core.frame(worker, listen_frame(port(80)));
    assert_eq!(moved(&mut core), []);
    assert_eq!(core.ledger().in_flight(), 1);
}

#[test]
fn workers_receive_the_connections_that_could_not_be_passed() {
    let (mut core, handle, [leaving, second, third]) = shared_by_three();
    core.pass_parked();
    core.disconnect(leaving);
    core.park(leaving, handle, 7, 5);
    core.park(leaving, handle, 8, 6);
    actions(&mut core);
    core.end_passing();
    let expected = [(second, u32::MAX, 5), (third, u32::MAX, 6)];
    assert_eq!(moved(&mut core), expected);
    let ledger = core.ledger();
    assert_eq!((ledger.received, ledger.in_flight()), (2, 0));
}

#[test]
fn passed_connections_go_to_the_workers_in_turn() {
    let (mut core, handle, [first, second, third]) = shared_by_three();
    for client in 0..4 {
        core.receive_parked(Some(handle), client, parked_by_default(5));
    }
    let expected = [(first, 0, 5), (second, 1, 5), (third, 2, 5), (first, 3, 5)];
    assert_eq!(moved(&mut core), expected);
    let ledger = core.ledger();
    assert_eq!((ledger.parked, ledger.received), (4, 4));
    assert_eq!(ledger.in_flight(), 0);
}

#[test]
fn passed_connections_wait_for_the_first_worker_within_the_limit() {
    let mut core = Core::new(SchedulingPolicy::Shared);
    let handle = retain(&mut core, port(80));
    core.set_parked_limit(2);
    for client in 0..3 {
        core.receive_parked(Some(handle), client, parked_by_default(5));
    }
    let ledger = core.ledger();
    assert_eq!((ledger.idle_closed, ledger.in_flight()), (1, 2));
    actions(&mut core);
    let worker = online(&mut core);
    core.frame(worker, listen_frame(port(80)));
    assert_eq!(moved(&mut core), [(worker, u32::MAX, 5); 2]);
    assert_eq!(core.ledger().in_flight(), 0);
}

#[test]
fn connections_of_a_third_master_are_passed_on() {
    let (mut core, handle, _) = shared_by_three();
    core.pass_parked();
    core.receive_parked(Some(handle), 7, parked_by_default(5));
    let all = actions(&mut core);
    assert_eq!(passed(&all).len(), 1, "{all:?}");
}

#[test]
fn drain_waits_for_requests_on_passed_connections() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let worker = online(&mut core);
    let handle = listen(&mut core, worker, 80);
    core.receive_parked(Some(handle), 7, parked_by_default(5));
    core.disconnect(worker);
    core.backlog_emptied(handle);
    actions(&mut core);
    assert_eq!(core.ledger().idle_closed, 0);
    let end = core.deadline().unwrap();
    assert_eq!(core.closing_at(end).len(), 1, "checked before it closes");
    core.tick(end);
    core.backlog_emptied(handle);
    assert_eq!(core.ledger().idle_closed, 1);
}
