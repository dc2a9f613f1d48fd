//! Tests of idle connections that a worker of a shared listener parks in the master.

use super::*;

#[test]
fn remaining_workers_take_turns_with_the_idle_connections_of_another() {
    let (mut core, handle, [leaving, second, third]) = shared_by_three();
    core.disconnect(leaving);
    for connection in 0..3 {
        core.park(leaving, handle, connection, 5);
    }
    let expected = [(second, 0, 5), (third, 1, 5), (second, 2, 5)];
    assert_eq!(moved(&mut core), expected);
    // A worker that closes its listener parks its connections before the master knows of the close.
    // It does not get them back.
    core.park(third, handle, 3, 1);
    assert_eq!(moved(&mut core), [(second, 3, 1)]);
    let ledger = core.ledger();
    assert_eq!((ledger.parked, ledger.received), (4, 4));
    assert_eq!(ledger.in_flight(), 0);
}

#[test]
fn idle_connections_wait_in_the_master_while_no_worker_serves() {
    let (mut core, handle, workers) = shared_by_three();
    for worker in workers {
        core.disconnect(worker);
    }
    core.park(workers[0], handle, 0, 5);
    core.park(workers[1], handle, 1, 6);
    let all = actions(&mut core);
    let held = all.iter().filter_map(|action| match action {
        Action::Hold { id, .. } => Some(*id),
        _ => None,
    });
    let held: Vec<_> = held.collect();
    assert_eq!(held.len(), 2, "{all:?}");
    assert_eq!(core.ledger().in_flight(), 2);
    // Data does not make the master dispatch, but a hang-up closes the connection.
    core.data_arrived(held[0]);
    core.idle_hung_up(held[1]);
    assert_eq!(core.ledger().closed_by_peer, 1);
    let next = online(&mut core);
    core.frame(next, listen_frame(port(80)));
    assert_eq!(moved(&mut core), [(next, u32::MAX, 5)]);
    assert_eq!(core.ledger().in_flight(), 0);
}

#[test]
fn last_worker_receives_idle_connections_until_the_grace_period_ends() {
    let (mut core, handle, [first, second, last]) = shared_by_three();
    core.release(handle);
    for worker in [first, second, last] {
        core.disconnect(worker);
    }
    core.park(first, handle, 0, 5);
    assert_eq!(moved(&mut core), [(last, 0, 5)]);
    let end = core.deadline().unwrap();
    core.tick(end);
    core.park(second, handle, 1, 6);
    assert_eq!(moved(&mut core), []);
    // The client learns at once that it must connect again.
    let ledger = core.ledger();
    assert_eq!((ledger.idle_closed, ledger.in_flight()), (1, 0));
}

#[test]
fn workers_that_disconnect_together_drain_together() {
    let (mut core, handle, workers) = shared_by_three();
    core.release(handle);
    core.disconnect_workers(&workers);
    let end_frame = ToWorker::ListenerClosed {
        handle,
        unreceived: Unreceived::AreServed,
    };
    let ends = |core: &mut Core| {
        let mut sent = actions(core);
        sent.retain(|action| matches!(action, Action::Send { frame, .. } if *frame == end_frame));
        sent.len()
    };
    assert_eq!(ends(&mut core), 0);
    let end = core.deadline().unwrap();
    core.tick(end);
    assert_eq!(ends(&mut core), workers.len());
}

/// Returns the workers to which the master reports that they serve their parked connections although
/// their listener has ended.
fn serving_parked(core: &mut Core, handle: HandleId) -> Vec<WorkerId> {
    let unreceived = Unreceived::ParkedAreServed;
    let expected = ToWorker::ListenerClosed { handle, unreceived };
    let sent = actions(core).into_iter().filter_map(|action| match action {
        Action::Send { worker, frame, .. } if frame == expected => Some(worker),
        _ => None,
    });
    sent.collect()
}

#[test]
fn worker_that_was_busy_during_a_stop_serves_its_parked_connections() {
    for policy in [SchedulingPolicy::Shared, SchedulingPolicy::Sharded] {
        let mut core = Core::new(policy);
        let workers = [(); 4].map(|()| online(&mut core));
        let handle = HandleId(1);
        for worker in workers {
            request(&mut core, worker, port(80));
            if worker == workers[0] {
                core.bound(handle, Ok(None));
            } else if policy == SchedulingPolicy::Sharded {
                core.shard_bound(handle, worker, 1, Ok(()));
            }
            core.frame(worker, ToMaster::Listening { handle });
        }
        let [busy, idle, last, late] = workers;
        core.disconnect(busy);
        core.disconnect(idle);
        if let Some(end) = core.deadline() {
            core.tick(end);
        }
        core.frame(idle, ToMaster::Release { handle });
        core.disconnect(late);
        assert_eq!(serving_parked(&mut core, handle), []);
        core.disconnect(last);
        let busy_ones = serving_parked(&mut core, handle);
        // The late worker still serves its shard.
        let expected = match policy {
            SchedulingPolicy::Sharded => vec![busy],
            _ => vec![busy, late],
        };
        assert_eq!(busy_ones, expected);
    }
}

#[test]
fn workers_of_a_borrowed_listener_serve_their_parked_connections() {
    let mut core = Core::new(SchedulingPolicy::Shared);
    let worker = online(&mut core);
    request(
        &mut core,
        worker,
        Endpoint::new(Kind::Tcp, BindAddress::Fd(3)),
    );
    let handle = HandleId(1);
    core.bound(handle, Ok(None));
    core.disconnect(worker);
    assert_eq!(serving_parked(&mut core, handle), [worker]);
}

#[test]
fn connection_for_a_worker_that_does_not_read_is_offered_again() {
    let (mut core, handle, [leaving, second, _]) = shared_by_three();
    core.park(leaving, handle, 0, 5);
    assert_eq!(moved(&mut core), [(second, 0, 5)]);
    core.not_moved(handle, 0, parked_by_default(5));
    assert_eq!(core.ledger().in_flight(), 1);
    let retry = core.deadline().unwrap();
    core.tick(retry);
    assert_eq!(moved(&mut core).len(), 1);
    assert_eq!((core.ledger().received, core.ledger().in_flight()), (1, 0));
}

#[test]
fn idle_connections_close_with_their_shared_listener() {
    let mut core = Core::new(SchedulingPolicy::Shared);
    let worker = online(&mut core);
    let handle = listen(&mut core, worker, 80);
    core.park(worker, handle, 0, 1);
    assert_eq!(core.ledger().in_flight(), 1);
    core.frame(worker, ToMaster::Release { handle });
    let closed = |action: &Action<u32>| matches!(action, Action::CloseHeld { .. });
    assert!(actions(&mut core).iter().any(closed));
    assert_eq!(core.ledger().idle_closed, 1);
    // The listener does not exist any more.
    core.park(worker, handle, 1, 1);
    assert_eq!(core.ledger().idle_closed, 2);
    assert_eq!(core.ledger().in_flight(), 0);
}

#[test]
fn worker_that_listens_again_receives_what_it_parked_if_it_is_the_only_one() {
    let (mut core, handle, [second, third, only]) = shared_by_three();
    for worker in [second, third] {
        core.disconnect(worker);
    }
    for is_listening in [true, false] {
        core.park(only, handle, 0, 5);
        assert_eq!(moved(&mut core), []);
        if !is_listening {
            core.disconnect(only);
        }
        let retry = core.deadline().unwrap();
        core.tick(retry);
        let expected = is_listening.then_some((only, u32::MAX, 5));
        assert_eq!(moved(&mut core), Vec::from_iter(expected));
        assert_eq!(core.ledger().in_flight(), u64::from(!is_listening));
    }
}
