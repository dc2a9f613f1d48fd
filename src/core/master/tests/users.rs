//! Tests of listeners whose workers have different users. A parked connection goes only to workers
//! of the user whose worker parked it.

use super::parked::{closed, dispatch, hand_offs, held, park, report_idle};
use super::*;
use crate::core::dispatch::Sequenced;
use crate::types::connection_id::ConnectionId;
use crate::types::time::Time;

const OTHER: User = User { uid: 1, gid: 0 };

/// Returns a core whose listener the application retains, with the listener's handle and two idle
/// workers: one of the default user, and one of the user `OTHER`.
fn two_users(policy: SchedulingPolicy) -> (Core, HandleId, [WorkerId; 2]) {
    let mut core = Core::new(policy);
    let handle = retain(&mut core, port(1));
    let workers = [User::default(), OTHER].map(|user| join(&mut core, handle, user));
    core.backlog_emptied(handle);
    actions(&mut core);
    (core, handle, workers)
}

/// Adds a worker that serves the listener and is idle.
fn join(core: &mut Core, handle: HandleId, user: User) -> WorkerId {
    let worker = online_as(core, user);
    request(core, worker, port(1));
    if core.master_accepts(handle) {
        report_idle(core, worker, handle, 0);
    }
    worker
}

/// Makes a worker exit whose queue is empty.
fn exit(core: &mut Core, handle: HandleId, worker: WorkerId) {
    core.channel_closed(worker);
    core.queue_closed(handle, worker, Vec::new());
}

/// Returns a core like that of `two_users`, whose listener pauses because the second worker has a
/// connection in its queue, after the first worker has exited. Also returns the second worker, and
/// the connections that the two workers parked.
fn paused() -> (Core, HandleId, WorkerId, [ConnectionId; 2]) {
    let (mut core, handle, [own, other]) = two_users(SchedulingPolicy::RoundRobin);
    let mine = park(&mut core, own, handle, 1);
    let theirs = park(&mut core, other, handle, 2);
    dispatch(&mut core, theirs);
    core.disconnect_workers(&[own, other]);
    exit(&mut core, handle, own);
    (core, handle, other, [mine, theirs])
}

/// Lets clients send requests on three connections that a worker has parked. Returns the
/// connections' ids, and those in the worker's queue.
fn send_requests(
    core: &mut Core,
    handle: HandleId,
    worker: WorkerId,
) -> (Vec<ConnectionId>, Vec<Sequenced<HandOff<u32>>>) {
    let ids: Vec<_> = (0..3).map(|n| park(core, worker, handle, n)).collect();
    ids.iter().for_each(|id| core.data_arrived(*id));
    let in_queue = hand_offs(actions(core)).into_iter();
    (ids, in_queue.map(|(_, connection)| connection).collect())
}

/// Asserts that these connections close, and that their requests are lost.
fn assert_dropped(core: &mut Core, ids: &[ConnectionId]) {
    let mut all = closed(&actions(core));
    all.sort_unstable();
    assert_eq!(all, ids);
    let ledger = core.ledger();
    assert_eq!((ledger.dropped, ledger.in_flight()), (3, 0));
    check(core);
}

fn check(core: &Core) {
    assert_eq!(core.ledger().in_flight(), core.in_flight());
}

#[test]
fn parked_connection_returns_to_the_user_that_parked_it() {
    let (mut core, handle, [own, other]) = two_users(SchedulingPolicy::RoundRobin);
    for worker in [own, other, other, own] {
        let id = park(&mut core, worker, handle, 7);
        for _ in 0..2 {
            let (receiver, _) = dispatch(&mut core, id);
            assert_eq!(receiver, worker);
            core.frame(worker, ToMaster::ParkAgain { connection: id });
            let loads = core.loads().0;
            let load = loads.iter().find(|load| load.worker == worker).unwrap();
            report_idle(&mut core, worker, handle, load.dispatched);
            actions(&mut core);
        }
        check(&core);
    }
}

#[test]
fn connections_of_a_busy_user_do_not_use_the_capacity_of_another_user() {
    let (mut core, handle, [own, other]) = two_users(SchedulingPolicy::RoundRobin);
    let ids: Vec<_> = (0..5).map(|n| park(&mut core, own, handle, n)).collect();
    ids.iter().for_each(|id| core.data_arrived(*id));
    let first = hand_offs(actions(&mut core));
    assert_eq!(first.len(), 1);
    assert_eq!(first[0].0, own);
    core.readable(handle);
    let accepts = actions(&mut core);
    let is_accept = |action: &Action<u32>| matches!(action, Action::Accept { .. });
    assert!(accepts.iter().any(is_accept), "{accepts:?}");
    core.accepted(handle, 100);
    core.backlog_emptied(handle);
    let next = hand_offs(actions(&mut core));
    assert_eq!(next.len(), 1);
    assert_eq!(next[0].0, other);
    check(&core);
}

#[test]
fn connections_of_a_user_close_when_its_last_worker_leaves() {
    let (mut core, handle, [own, other]) = two_users(SchedulingPolicy::RoundRobin);
    let second = join(&mut core, handle, User::default());
    let mine = park(&mut core, own, handle, 1);
    let theirs = park(&mut core, other, handle, 2);
    core.disconnect(own);
    assert_eq!(closed(&actions(&mut core)), []);
    core.disconnect(second);
    assert_eq!(closed(&actions(&mut core)), [mine]);
    assert_eq!(core.ledger().idle_closed, 1);
    check(&core);
    // The disconnecting worker parks one more connection.
    core.park(second, handle, 3, 1);
    assert_eq!(core.ledger().idle_closed, 2);
    let (receiver, _) = dispatch(&mut core, theirs);
    assert_eq!(receiver, other);
    check(&core);
}

#[test]
fn connections_of_a_user_close_when_its_last_worker_crashes() {
    let (mut core, handle, [own, other]) = two_users(SchedulingPolicy::RoundRobin);
    let mine = park(&mut core, own, handle, 1);
    let theirs = park(&mut core, other, handle, 2);
    exit(&mut core, handle, own);
    assert_eq!(closed(&actions(&mut core)), [mine]);
    let (receiver, _) = dispatch(&mut core, theirs);
    assert_eq!(receiver, other);
    check(&core);
}

#[test]
fn requests_close_when_the_last_worker_of_their_user_leaves() {
    let (mut core, handle, [own, _]) = two_users(SchedulingPolicy::RoundRobin);
    let (ids, in_queue) = send_requests(&mut core, handle, own);
    core.disconnect(own);
    core.reclaimed(handle, own, in_queue, QueueState::Empty);
    assert_dropped(&mut core, &ids);
}

#[test]
fn requests_close_when_the_last_worker_of_their_user_crashes() {
    let (mut core, handle, [own, _]) = two_users(SchedulingPolicy::RoundRobin);
    let (ids, in_queue) = send_requests(&mut core, handle, own);
    core.channel_closed(own);
    core.queue_closed(handle, own, in_queue);
    assert_dropped(&mut core, &ids);
}

#[test]
fn idle_connections_outlive_a_pause_in_which_their_worker_is_the_first_to_leave() {
    let (mut core, handle, other, [mine, _]) = paused();
    assert_eq!(closed(&actions(&mut core)), []);
    core.data_arrived(mine);
    exit(&mut core, handle, other);
    actions(&mut core);
    let next = online(&mut core);
    core.frame(next, listen_frame(port(1)));
    core.bound(handle, Ok(None));
    report_idle(&mut core, next, handle, 0);
    let dispatched = hand_offs(actions(&mut core));
    let to_next = |(worker, sequenced): &(WorkerId, Sequenced<HandOff<u32>>)| {
        let resumed = Resumed {
            connection: mine,
            times_parked: 1,
        };
        *worker == next && sequenced.connection == HandOff::Held(resumed)
    };
    assert!(dispatched.iter().any(to_next), "{dispatched:?}");
    check(&core);
}

#[test]
fn listener_that_is_released_during_a_pause_drains_without_the_workers_of_a_user() {
    let (mut core, handle, other, [mine, theirs]) = paused();
    core.data_arrived(mine);
    actions(&mut core);
    core.release(handle);
    report_idle(&mut core, other, handle, 1);
    core.frame(other, ToMaster::ParkAgain { connection: theirs });
    for seconds in 1..5 {
        for action in actions(&mut core) {
            match action {
                Action::Accept { .. } => core.backlog_emptied(handle),
                Action::CountQueued { worker, .. } => core.counted(handle, worker, 0),
                _ => {}
            }
        }
        core.tick(Time::from_secs(seconds));
    }
    assert!(!core.is_bound(handle), "{:?}", core.ledger());
    check(&core);
}

#[test]
fn request_that_returns_during_an_upgrade_passes_to_the_other_master() {
    let (mut core, handle, [own, _]) = two_users(SchedulingPolicy::RoundRobin);
    let id = park(&mut core, own, handle, 1);
    let (_, connection) = dispatch(&mut core, id);
    core.pass_parked();
    core.channel_closed(own);
    core.queue_closed(handle, own, vec![connection]);
    let all = actions(&mut core);
    let is_pass = |action: &Action<u32>| matches!(action, Action::Pass { .. });
    assert!(all.iter().any(is_pass), "{all:?}");
    assert_eq!(closed(&all), []);
    check(&core);
}

#[test]
fn requests_of_a_busy_user_do_not_delay_those_of_another_user() {
    let (mut core, handle, [own, other]) = two_users(SchedulingPolicy::RoundRobin);
    let theirs: Vec<_> = (0..100)
        .map(|n| park(&mut core, other, handle, n))
        .collect();
    let mine = park(&mut core, own, handle, 100);
    core.data_arrived(theirs[0]);
    core.readable(handle);
    core.accepted(handle, 200);
    core.accept_done(handle);
    assert_eq!(hand_offs(actions(&mut core)).len(), 2, "both are busy");
    theirs[1..].iter().for_each(|id| core.data_arrived(*id));
    core.data_arrived(mine);
    // The backlog is never empty, so new connections and requests take turns.
    let mut received = 0;
    while core.ledger().received < 5 {
        received += 1;
        core.set_time(Time::from_secs(received));
        report_idle(&mut core, own, handle, received);
        while let Some(action) = core.next_action() {
            match action {
                Action::Accept { .. } => {
                    core.accepted(handle, 300);
                    core.accept_done(handle);
                }
                Action::Watch { .. } => core.readable(handle),
                Action::Dispatch {
                    worker, connection, ..
                } => {
                    assert_eq!(worker, own);
                    if matches!(connection.connection, HandOff::Held(_)) {
                        return;
                    }
                }
                _ => {}
            }
        }
    }
    panic!("the request waits behind those of the other user");
}

#[test]
fn connections_wait_for_the_next_worker_only_if_it_has_their_user() {
    for next in [User::default(), OTHER] {
        let mut core = Core::new(SchedulingPolicy::RoundRobin);
        let handle = retain(&mut core, port(1));
        let first = join(&mut core, handle, User::default());
        core.backlog_emptied(handle);
        actions(&mut core);
        let id = park(&mut core, first, handle, 1);
        exit(&mut core, handle, first);
        assert_eq!(closed(&actions(&mut core)), []);
        let second = join(&mut core, handle, next);
        let is_kept = next == User::default();
        assert_eq!(core.ledger().idle_closed, u64::from(!is_kept));
        if is_kept {
            assert_eq!(dispatch(&mut core, id).0, second);
        }
        check(&core);
    }
}

#[test]
fn workers_that_disconnect_together_close_no_connection() {
    let (mut core, handle, [own, other]) = two_users(SchedulingPolicy::RoundRobin);
    park(&mut core, own, handle, 1);
    park(&mut core, other, handle, 2);
    core.disconnect_workers(&[own, other]);
    assert_eq!(closed(&actions(&mut core)), []);
    check(&core);
}

#[test]
fn new_connection_that_waited_for_data_goes_to_any_user() {
    let (mut core, handle, [own, other]) = two_users(SchedulingPolicy::RoundRobin);
    parked::set_parking(&mut core, handle, 60, true);
    let mut receivers = Vec::new();
    for client in 0..2 {
        core.accepted(handle, client);
        let id = held(&actions(&mut core));
        receivers.push(dispatch(&mut core, id).0);
        // From now on, it belongs to the user of its worker.
        core.frame(receivers[0], ToMaster::ParkAgain { connection: id });
        actions(&mut core);
    }
    assert_eq!(receivers, [own, other]);
}

#[test]
fn worker_that_accepts_receives_only_connections_of_its_user() {
    let (mut core, handle, [own, other]) = two_users(SchedulingPolicy::Shared);
    let second = join(&mut core, handle, User::default());
    let by = |user| ParkHistory {
        times: 1,
        by: Some(user),
    };
    core.park(own, handle, 1, 1);
    core.receive_parked(Some(handle), 2, by(OTHER));
    core.receive_parked(Some(handle), 3, by(User { uid: 9, gid: 9 }));
    let moved = moved(&mut core);
    assert_eq!(moved, [(second, 1, 1), (other, 2, 1)]);
    assert_eq!(core.ledger().idle_closed, 1);
    check(&core);
}

#[test]
fn connections_that_no_worker_may_receive_do_not_delay_others() {
    let mut core = Core::new(SchedulingPolicy::Shared);
    let handle = retain(&mut core, port(1));
    // More connections than are moved at once.
    for (count, user) in [(1500, User::default()), (3, OTHER)] {
        for client in 0..count {
            let history = ParkHistory {
                times: 1,
                by: Some(user),
            };
            core.receive_parked(Some(handle), client, history);
        }
    }
    actions(&mut core);
    let other = online_as(&mut core, OTHER);
    core.frame(other, listen_frame(port(1)));
    let moved = moved(&mut core);
    assert_eq!(moved.len(), 3);
    assert_eq!(core.ledger().idle_closed, 1500);
    assert_eq!(core.deadline(), None);
    check(&core);
}
