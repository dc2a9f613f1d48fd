//! Tests of the connections that the master holds. The first tests follow the rows of the table in
//! [`parked`](crate::core::master::parked).

use std::time::Duration;

use super::*;
use crate::core::dispatch::{DispatchFailure, Sequenced};
use crate::types::connection_id::ConnectionId;
use crate::types::endpoint::Parking;
use crate::types::time::Time;

const fn millis(millis: u64) -> Time {
    Duration::from_millis(millis)
}

/// Returns the core of a master whose listener the application retains, with the listener's handle
/// and `count` idle workers that serve it.
fn serving(count: usize) -> (Core, HandleId, Vec<WorkerId>) {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let handle = retain(&mut core, port(1));
    let workers = (0..count).map(|_| {
        let worker = online(&mut core);
        request(&mut core, worker, port(1));
        worker
    });
    let workers: Vec<_> = workers.collect();
    for worker in &workers {
        report_idle(&mut core, *worker, handle, 0);
    }
    // Report an empty backlog, so that the master stops accepting.
    core.backlog_emptied(handle);
    actions(&mut core);
    (core, handle, workers)
}

pub(super) fn report_idle(core: &mut Core, worker: WorkerId, handle: HandleId, received: u64) {
    let idle = ToMaster::Idle {
        handle,
        received,
        open: 0,
    };
    core.frame(worker, idle);
}

/// Makes a worker park a connection for the first time. Returns the connection's id.
pub(super) fn park(
    core: &mut Core,
    worker: WorkerId,
    handle: HandleId,
    client: u32,
) -> ConnectionId {
    core.park(worker, handle, client, 1);
    held(&actions(core))
}

/// Returns the id of the only connection that these actions hold.
pub(super) fn held(actions: &[Action<u32>]) -> ConnectionId {
    let ids = actions.iter().filter_map(|action| match action {
        Action::Hold { id, .. } => Some(*id),
        _ => None,
    });
    let ids: Vec<_> = ids.collect();
    assert_eq!(ids.len(), 1, "{actions:?}");
    ids[0]
}

/// Returns the connections whose copies these actions close.
pub(super) fn closed(actions: &[Action<u32>]) -> Vec<ConnectionId> {
    let closed = actions.iter().filter_map(|action| match action {
        Action::CloseHeld { id } => Some(*id),
        _ => None,
    });
    closed.collect()
}

/// Returns the connections that these actions dispatch, each with its worker.
pub(super) fn hand_offs(actions: Vec<Action<u32>>) -> Vec<(WorkerId, Sequenced<HandOff<u32>>)> {
    let dispatched = actions.into_iter().filter_map(|action| match action {
        Action::Dispatch {
            worker, connection, ..
        } => Some((worker, connection)),
        _ => None,
    });
    dispatched.collect()
}

/// Makes the client of an idle connection send something. Returns the worker to which the
/// connection is dispatched, and the connection in its queue.
pub(super) fn dispatch(core: &mut Core, id: ConnectionId) -> (WorkerId, Sequenced<HandOff<u32>>) {
    core.data_arrived(id);
    let mut dispatched = hand_offs(actions(core));
    assert_eq!(dispatched.len(), 1, "{dispatched:?}");
    dispatched.remove(0)
}

/// Checks that the ledger and the core agree on the number of connections in flight.
fn check(core: &Core) {
    assert_eq!(core.ledger().in_flight(), core.in_flight());
}

pub(super) fn set_parking(
    core: &mut Core,
    handle: HandleId,
    idle_seconds: u32,
    wait_for_data: bool,
) {
    let parking = Parking {
        idle_seconds: Some(idle_seconds),
        first_data_seconds: None,
        wait_for_data: Some(wait_for_data),
    };
    core.set_parking(handle, parking);
}

#[test]
fn parked_connection_goes_to_an_idle_worker_when_its_client_sends_something() {
    let (mut core, handle, workers) = serving(1);
    let id = park(&mut core, workers[0], handle, 7);
    assert_eq!(core.in_flight(), 1, "idle");
    let (worker, connection) = dispatch(&mut core, id);
    let resumed = Resumed {
        connection: id,
        times_parked: 1,
    };
    assert_eq!(worker, workers[0]);
    assert_eq!(connection.connection, HandOff::Held(resumed));
    check(&core);
    report_idle(&mut core, worker, handle, 1);
    let ledger = core.ledger();
    assert_eq!((ledger.parked, ledger.resumed), (1, 1));
    assert_eq!((ledger.accepted, ledger.received), (0, 1));
    check(&core);
}

#[test]
fn new_connection_waits_for_data_and_does_not_count_as_resumed() {
    let (mut core, handle, workers) = serving(1);
    set_parking(&mut core, handle, 60, true);
    core.accepted(handle, 7);
    let id = held(&actions(&mut core));
    check(&core);
    let (worker, connection) = dispatch(&mut core, id);
    assert_eq!(worker, workers[0]);
    let is_new =
        matches!(connection.connection, HandOff::Held(resumed) if resumed.times_parked == 0);
    assert!(is_new, "{connection:?}");
    let ledger = core.ledger();
    assert_eq!((ledger.accepted, ledger.parked, ledger.resumed), (1, 0, 0));
    check(&core);
}

#[test]
fn master_accepts_connections_that_wait_for_data_while_no_worker_is_idle() {
    let (mut core, handle, workers) = serving(1);
    set_parking(&mut core, handle, 60, true);
    core.frame(workers[0], ToMaster::Pause { handle });
    actions(&mut core);
    core.readable(handle);
    let accepts = |action: &Action<u32>| matches!(action, Action::Accept { .. });
    assert!(actions(&mut core).iter().any(accepts));
    core.accepted(handle, 7);
    core.backlog_emptied(handle);
    let id = held(&actions(&mut core));
    core.data_arrived(id);
    assert!(
        hand_offs(actions(&mut core)).is_empty(),
        "no worker is idle"
    );
    check(&core);
    report_idle(&mut core, workers[0], handle, 0);
    assert_eq!(hand_offs(actions(&mut core)).len(), 1);
    check(&core);
}

#[test]
fn reclaimed_connection_goes_to_another_worker() {
    let (mut core, handle, workers) = serving(2);
    let id = park(&mut core, workers[0], handle, 7);
    let (first, connection) = dispatch(&mut core, id);
    core.frame(first, ToMaster::Pause { handle });
    actions(&mut core);
    core.reclaimed(handle, first, vec![connection], QueueState::Empty);
    let again = hand_offs(actions(&mut core));
    assert_eq!(again.len(), 1);
    assert_ne!(again[0].0, first);
    assert_eq!(again[0].1, connection, "the sequence number stays");
    check(&core);
    // The first worker no longer has the connection.
    core.frame(first, ToMaster::Detach { connection: id });
    assert!(!core.is_connected(first));
    check(&core);
}

#[test]
fn connection_that_is_parked_again_waits_in_the_master() {
    let (mut core, handle, workers) = serving(1);
    let id = park(&mut core, workers[0], handle, 7);
    for times_parked in 2..5_u32 {
        let (worker, _) = dispatch(&mut core, id);
        core.frame(worker, ToMaster::ParkAgain { connection: id });
        let awaits =
            |action: &Action<u32>| matches!(action, Action::AwaitData { id: own } if *own == id);
        assert!(actions(&mut core).iter().any(awaits));
        report_idle(&mut core, worker, handle, u64::from(times_parked) - 1);
        actions(&mut core);
        check(&core);
        assert_eq!(core.ledger().parked, u64::from(times_parked));
    }
    assert_eq!(core.ledger().received, 3);
    assert_eq!(core.sizes().held, 1);
}

#[test]
fn master_closes_its_copy_of_a_connection_that_the_worker_keeps() {
    let (mut core, handle, workers) = serving(1);
    let id = park(&mut core, workers[0], handle, 7);
    let (worker, _) = dispatch(&mut core, id);
    core.frame(worker, ToMaster::Detach { connection: id });
    assert_eq!(closed(&actions(&mut core)), [id]);
    report_idle(&mut core, worker, handle, 1);
    check(&core);
    assert_eq!((core.sizes().held, core.in_flight()), (0, 0));
}

#[test]
fn connections_that_an_exited_worker_has_received_close_and_the_others_stay() {
    for releases_first in [false, true] {
        let (mut core, handle, workers) = serving(1);
        let ids: Vec<_> = (0..3)
            .map(|client| park(&mut core, workers[0], handle, client))
            .collect();
        let worker = workers[0];
        // The worker receives the first connection. The second one stays in its queue, and the
        // third one is idle.
        dispatch(&mut core, ids[0]);
        report_idle(&mut core, worker, handle, 1);
        actions(&mut core);
        let (_, queued) = dispatch(&mut core, ids[1]);
        if releases_first {
            core.frame(worker, ToMaster::Release { handle });
            core.queue_closed(handle, worker, vec![queued]);
            assert_eq!(closed(&actions(&mut core)), [], "the worker still has it");
            core.channel_closed(worker);
            assert_eq!(closed(&actions(&mut core)), [ids[0]]);
        } else {
            core.channel_closed(worker);
            assert_eq!(closed(&actions(&mut core)), [], "the queue is not empty");
            core.queue_closed(handle, worker, vec![queued]);
            assert_eq!(closed(&actions(&mut core)), [ids[0]]);
        }
        check(&core);
        assert_eq!((core.sizes().held, core.in_flight()), (2, 2));
        // Both connections are still there for the next worker.
        let next = online(&mut core);
        request(&mut core, next, port(1));
        core.data_arrived(ids[2]);
        report_idle(&mut core, next, handle, 0);
        core.backlog_emptied(handle);
        let first = hand_offs(actions(&mut core));
        report_idle(&mut core, next, handle, first.len() as u64);
        let all = [first, hand_offs(actions(&mut core))].concat();
        assert_eq!(all.len(), 2, "{all:?}");
        check(&core);
        let ledger = core.ledger();
        assert_eq!((ledger.dropped, ledger.idle_closed), (0, 0));
    }
}

#[test]
fn hang_up_before_a_worker_receives_the_connection_closes_it() {
    let (mut core, handle, workers) = serving(1);
    let id = park(&mut core, workers[0], handle, 7);
    let (worker, connection) = dispatch(&mut core, id);
    core.hung_up(handle, worker, connection.connection);
    assert_eq!(closed(&actions(&mut core)), [id]);
    check(&core);
    assert_eq!(core.ledger().closed_by_peer, 1);
    assert_eq!((core.sizes().held, core.in_flight()), (0, 0));
}

#[test]
fn idle_connection_closes_when_its_client_hangs_up_or_it_cannot_be_watched() {
    let (mut core, handle, workers) = serving(1);
    let first = park(&mut core, workers[0], handle, 7);
    core.idle_hung_up(first);
    assert_eq!(closed(&actions(&mut core)), [first]);
    let second = park(&mut core, workers[0], handle, 8);
    core.not_held(second);
    assert_eq!(closed(&actions(&mut core)), [second]);
    // Reports about a connection that is no longer idle change nothing.
    for id in [first, second] {
        core.idle_hung_up(id);
        core.not_held(id);
        core.data_arrived(id);
    }
    assert!(actions(&mut core).is_empty());
    check(&core);
    let ledger = core.ledger();
    assert_eq!((ledger.closed_by_peer, ledger.idle_closed), (1, 1));
    assert_eq!((core.sizes().held, core.in_flight()), (0, 0));
}

#[test]
fn one_tick_closes_all_connections_that_expire_in_the_same_second() {
    let (mut core, handle, workers) = serving(1);
    set_parking(&mut core, handle, 1, false);
    let mut ids = Vec::new();
    for (client, time) in [100, 500, 999, 1001].into_iter().enumerate() {
        core.set_time(millis(time));
        ids.push(park(
            &mut core,
            workers[0],
            handle,
            u32::try_from(client).unwrap(),
        ));
    }
    assert_eq!(core.deadline(), Some(millis(2000)));
    core.tick(millis(1999));
    assert_eq!(closed(&actions(&mut core)), []);
    core.tick(millis(2000));
    assert_eq!(closed(&actions(&mut core)), ids[..3]);
    assert_eq!(core.deadline(), Some(millis(3000)));
    core.tick(millis(3000));
    assert_eq!(closed(&actions(&mut core)), ids[3..]);
    assert_eq!(core.deadline(), None);
    assert_eq!(core.ledger().expired, 4);
    check(&core);
}

#[test]
fn resumed_connection_does_not_expire() {
    let (mut core, handle, workers) = serving(1);
    set_parking(&mut core, handle, 1, false);
    let id = park(&mut core, workers[0], handle, 7);
    let (worker, _) = dispatch(&mut core, id);
    assert_eq!(core.deadline(), None);
    core.tick(millis(10_000));
    assert_eq!(core.ledger().expired, 0);
    core.frame(worker, ToMaster::ParkAgain { connection: id });
    assert_eq!(core.deadline(), Some(millis(11_000)), "it is idle again");
}

#[test]
fn connection_that_would_expire_first_makes_room_for_a_further_one() {
    let (mut core, handle, workers) = serving(1);
    core.set_parked_limit(2);
    set_parking(&mut core, handle, 60, false);
    let late = park(&mut core, workers[0], handle, 1);
    set_parking(&mut core, handle, 10, false);
    let early = park(&mut core, workers[0], handle, 2);
    core.park(workers[0], handle, 3, 1);
    let evicting = actions(&mut core);
    assert_eq!(closed(&evicting), [early]);
    let third = held(&evicting);
    assert_eq!((core.ledger().idle_closed, core.sizes().held), (1, 2));
    // After the limit has been lowered, a further connection closes only one other, although more
    // are beyond the limit.
    core.set_parked_limit(1);
    core.park(workers[0], handle, 4, 1);
    let evicting = actions(&mut core);
    assert_eq!(closed(&evicting), [third]);
    let fourth = held(&evicting);
    assert_eq!(core.sizes().held, 2);
    // If no held connection is idle, a newly parked connection is closed at once.
    core.data_arrived(late);
    core.data_arrived(fourth);
    actions(&mut core);
    core.park(workers[0], handle, 5, 1);
    assert!(actions(&mut core).is_empty(), "closed at once");
    assert_eq!((core.ledger().idle_closed, core.sizes().held), (3, 2));
    check(&core);
}

#[test]
fn connections_that_a_tick_closes_are_checked_before() {
    let (mut core, handle, workers) = serving(1);
    set_parking(&mut core, handle, 1, false);
    let [first, second] = [7, 8].map(|client| park(&mut core, workers[0], handle, client));
    assert_eq!(core.closing_at(millis(999)), []);
    assert_eq!(core.closing_at(millis(1000)), [first, second]);
    core.data_arrived(first);
    assert_eq!(core.closing_at(millis(1000)), [second]);
    core.tick(millis(1000));
    assert_eq!(closed(&actions(&mut core)), [second]);
    assert_eq!(core.ledger().expired, 1);
    // The shell has not received this connection yet, and may still have an earlier one with the
    // same number.
    core.park(workers[0], handle, 9, 1);
    assert_eq!(core.closing_at(millis(10_000)), []);
    actions(&mut core);
    assert_eq!(core.closing_at(millis(10_000)).len(), 1);
    check(&core);
}

#[test]
fn connection_beyond_the_limit_is_checked_before_it_closes() {
    let (mut core, handle, workers) = serving(1);
    core.set_parked_limit(2);
    let first = park(&mut core, workers[0], handle, 1);
    assert_eq!(core.next_surplus(), None);
    let second = park(&mut core, workers[0], handle, 2);
    assert_eq!(core.next_surplus(), Some(first));
    core.data_arrived(first);
    actions(&mut core);
    assert_eq!(core.next_surplus(), Some(second));
    core.park(workers[0], handle, 3, 1);
    assert_eq!(core.next_surplus(), None, "the shell does not have it yet");
    assert_eq!(closed(&actions(&mut core)), [second]);
    check(&core);
}

#[test]
fn oldest_connection_makes_room_among_those_that_expire_in_the_same_second() {
    let (mut core, handle, workers) = serving(1);
    core.set_parked_limit(3);
    for client in 0..3 {
        park(&mut core, workers[0], handle, client);
    }
    for id in [0, 1, 2, 0, 1] {
        core.park(workers[0], handle, 7, 1);
        assert_eq!(closed(&actions(&mut core)), [ConnectionId(id)]);
    }
}

#[test]
fn limit_of_zero_closes_parked_connections() {
    let (mut core, handle, workers) = serving(1);
    core.set_parked_limit(0);
    core.park(workers[0], handle, 1, 1);
    assert!(actions(&mut core).is_empty());
    assert_eq!((core.ledger().idle_closed, core.in_flight()), (1, 0));
}

#[test]
fn listener_that_closes_closes_its_idle_and_its_ready_connections() {
    let (mut core, handle, workers) = serving(1);
    let idle = park(&mut core, workers[0], handle, 1);
    let ready = park(&mut core, workers[0], handle, 2);
    let received = park(&mut core, workers[0], handle, 3);
    let other = retain(&mut core, port(2));
    request(&mut core, workers[0], port(2));
    let elsewhere = park(&mut core, workers[0], other, 4);
    dispatch(&mut core, received);
    core.frame(workers[0], ToMaster::Pause { handle });
    core.reclaimed(handle, workers[0], Vec::new(), QueueState::Empty);
    core.data_arrived(ready);
    core.frame(workers[0], ToMaster::Release { handle });
    core.queue_closed(handle, workers[0], Vec::new());
    assert_eq!(closed(&actions(&mut core)), []);
    core.release(handle);
    let mut all = closed(&actions(&mut core));
    all.sort();
    assert_eq!(all, [idle, ready]);
    let ledger = core.ledger();
    assert_eq!((ledger.idle_closed, ledger.dropped), (1, 1));
    check(&core);
    // The worker cannot park a connection of a closed listener, but may try.
    core.frame(
        workers[0],
        ToMaster::ParkAgain {
            connection: received,
        },
    );
    assert_eq!(closed(&actions(&mut core)), [received]);
    core.park(workers[0], handle, 5, 1);
    assert!(core.is_connected(workers[0]));
    assert_eq!(core.ledger().idle_closed, 3);
    assert!(core.is_idle(elsewhere));
    check(&core);
}

/// Makes the workers' reports quick, so that the window becomes `window`.
fn widen(core: &mut Core, handle: HandleId, worker: WorkerId, window: u64) -> u64 {
    let mut received = 0;
    let mut size = 1;
    while size < window {
        for client in 0..size {
            core.accepted(handle, u32::try_from(client).unwrap());
        }
        received += size;
        report_idle(core, worker, handle, received);
        size *= 2;
        actions(core);
    }
    received
}

#[test]
fn new_and_resumed_connections_take_turns() {
    for window in [1, 2, 4, 16] {
        let (mut core, handle, workers) = serving(1);
        let worker = workers[0];
        let mut received = widen(&mut core, handle, worker, window);
        core.frame(worker, ToMaster::Pause { handle });
        core.reclaimed(handle, worker, Vec::new(), QueueState::Empty);
        core.backlog_emptied(handle);
        actions(&mut core);
        let ids: Vec<_> = (0..200)
            .map(|client| park(&mut core, worker, handle, client))
            .collect();
        ids.iter().for_each(|id| core.data_arrived(*id));
        core.readable(handle);
        let (mut resumed, mut accepted) = (0, 0);
        for _ in 0..10 {
            report_idle(&mut core, worker, handle, received);
            // The backlog is never empty.
            while let Some(action) = core.next_action() {
                match action {
                    Action::Accept { at_most, .. } => {
                        (0..at_most).for_each(|_| core.accepted(handle, 1000));
                        core.accept_done(handle);
                    }
                    Action::Dispatch { connection, .. } => {
                        received += 1;
                        match connection.connection {
                            HandOff::New(_) => accepted += 1,
                            HandOff::Held(_) => resumed += 1,
                        }
                    }
                    _ => {}
                }
            }
            check(&core);
        }
        assert!(resumed >= 4 && accepted >= 4, "{resumed} and {accepted}");
        assert!(
            u64::abs_diff(resumed, accepted) <= 2 * window,
            "{resumed} and {accepted}"
        );
    }
}

#[test]
fn resumed_connections_use_all_capacity_if_the_backlog_is_empty_or_accepting_fails() {
    for fails in [false, true] {
        let (mut core, handle, workers) = serving(1);
        let received = widen(&mut core, handle, workers[0], 4);
        core.frame(workers[0], ToMaster::Pause { handle });
        core.reclaimed(handle, workers[0], Vec::new(), QueueState::Empty);
        core.backlog_emptied(handle);
        actions(&mut core);
        let ids: Vec<_> = (0..4)
            .map(|client| park(&mut core, workers[0], handle, client))
            .collect();
        ids.iter().for_each(|id| core.data_arrived(*id));
        core.readable(handle);
        report_idle(&mut core, workers[0], handle, received);
        let mut all = hand_offs(actions(&mut core));
        if fails {
            core.accept_failed(handle, std::io::Error::from_raw_os_error(errno::EMFILE));
        } else {
            core.backlog_emptied(handle);
        }
        all.extend(hand_offs(actions(&mut core)));
        let queued = all.len();
        // If the worker was no longer idle when accepting ended, it receives the rest after its
        // next report.
        report_idle(&mut core, workers[0], handle, received + queued as u64);
        core.backlog_emptied(handle);
        all.extend(hand_offs(actions(&mut core)));
        assert_eq!(all.len(), 4, "{all:?}");
        check(&core);
    }
}

#[test]
fn drain_dispatches_what_is_readable_and_closes_the_rest() {
    for kind in [Kind::Tcp, Kind::Unix] {
        let mut core = Core::new(SchedulingPolicy::RoundRobin);
        let worker = online(&mut core);
        let endpoint = match kind {
            Kind::Unix => Endpoint::new(Kind::Unix, BindAddress::Path("/s".into())),
            _ => port(1),
        };
        request(&mut core, worker, endpoint);
        let handle = HandleId(1);
        core.bound(handle, Ok(None));
        set_parking(&mut core, handle, 60, true);
        report_idle(&mut core, worker, handle, 0);
        core.accepted(handle, 1);
        let silent = held(&actions(&mut core));
        core.accepted(handle, 2);
        let readable = held(&actions(&mut core));
        core.backlog_emptied(handle);
        core.disconnect_all();
        core.backlog_emptied(handle);
        assert!(!core.is_bound(handle) || core.is_idle(silent));
        // The poller reports the second connection only now.
        core.data_arrived(readable);
        let dispatched = hand_offs(actions(&mut core));
        assert_eq!(dispatched.len(), 1, "{kind:?}");
        // A connection in the backlog goes to the worker at once, because its client may have sent
        // something that the poller has not reported.
        core.accepted(handle, 3);
        report_idle(&mut core, worker, handle, 1);
        assert_eq!(hand_offs(actions(&mut core)).len(), 1, "{kind:?}");
        core.tick(super::super::drain::DRAIN_GRACE);
        report_idle(&mut core, worker, handle, 2);
        core.backlog_emptied(handle);
        let last = actions(&mut core);
        assert_eq!(closed(&last), [silent], "{kind:?}");
        assert!(!core.is_bound(handle), "{kind:?}");
        check(&core);
        assert_eq!(core.ledger().dropped, 0);
    }
}

#[test]
fn connection_that_is_reported_while_it_is_in_the_queue_counts_once() {
    for parks in [false, true] {
        for outcome in 0..4 {
            let (mut core, handle, workers) = serving(1);
            let hostile = workers[0];
            let id = park(&mut core, hostile, handle, 7);
            let (_, connection) = dispatch(&mut core, id);
            let report = match parks {
                true => ToMaster::ParkAgain { connection: id },
                false => ToMaster::Detach { connection: id },
            };
            core.frame(hostile, report);
            check(&core);
            match outcome {
                0 => core.reclaimed(handle, hostile, vec![connection], QueueState::Empty),
                1 => {
                    let failure = DispatchFailure::QueueUnusable;
                    core.not_dispatched(handle, hostile, connection, failure);
                }
                2 => core.hung_up(handle, hostile, connection.connection),
                _ => {
                    core.channel_closed(hostile);
                    core.queue_closed(handle, hostile, vec![connection]);
                }
            }
            check(&core);
            assert_eq!(core.is_idle(id), parks, "outcome {outcome}");
            assert_eq!(core.in_flight(), u64::from(parks), "outcome {outcome}");
            let again = hand_offs(actions(&mut core));
            assert!(again.is_empty(), "outcome {outcome}: {again:?}");
        }
    }
}

#[test]
fn report_of_a_connection_that_the_worker_does_not_have_is_a_violation() {
    let unknown = ConnectionId(99);
    for again in [false, true] {
        for is_known in [false, true] {
            let (mut core, handle, workers) = serving(2);
            let id = park(&mut core, workers[0], handle, 7);
            let (worker, _) = dispatch(&mut core, id);
            let other = workers.iter().find(|other| **other != worker).unwrap();
            let connection = if is_known { id } else { unknown };
            let frame = match again {
                true => ToMaster::ParkAgain { connection },
                false => ToMaster::Detach { connection },
            };
            core.frame(*other, frame);
            assert!(!core.is_connected(*other));
            assert!(core.is_connected(worker));
            assert_eq!(closed(&actions(&mut core)), []);
            check(&core);
        }
    }
}

#[test]
fn worker_parks_only_connections_of_listeners_that_it_has_had() {
    let (mut core, handle, _) = serving(1);
    let foreign = online(&mut core);
    core.park(foreign, handle, 7, 1);
    assert!(!core.is_connected(foreign));
    assert_eq!(core.ledger().parked, 0);
}
