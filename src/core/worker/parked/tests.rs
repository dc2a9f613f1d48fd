use super::*;
use crate::types::endpoint::{BindAddress, BindFlags, Endpoint, Kind, Parking};
use crate::types::policy::SchedulingPolicy;
use crate::wire::frame::{Bound, ToMaster, ToWorker, Unreceived};

type Core = WorkerCore<()>;

const HANDLE: HandleId = HandleId(7);
const NOW: Time = Time::from_millis(100);

/// Returns a core with a shared listener whose clients may be silent for `seconds`.
fn shared(seconds: u32) -> (Core, ListenerId) {
    shared_with(Parking {
        idle_seconds: Some(seconds),
        ..Parking::default()
    })
}

fn shared_with(parking: Parking) -> (Core, ListenerId) {
    let mut core = Core::new();
    let flags = BindFlags {
        parking,
        ..BindFlags::default()
    };
    let path = BindAddress::Path("/path".into());
    let listener = core.listen(Endpoint::new(Kind::Unix, path), flags);
    let result = Ok(Bound {
        handle: HANDLE,
        policy: SchedulingPolicy::Shared,
        address: None,
    });
    let request = listener.0;
    core.frame(ToWorker::Reply { request, result }).unwrap();
    actions(&mut core);
    (core, listener)
}

fn actions(core: &mut Core) -> Vec<Action> {
    std::iter::from_fn(|| core.next_action()).collect()
}

fn idle(core: &mut Core, listener: ListenerId, parked: u32) -> ConnectionId {
    let handle = core.handle(listener);
    match core.hold(listener, handle, parked, NOW) {
        Held::Idle(id) => id,
        held @ (Held::Leaving(_) | Held::Closed) => panic!("{held:?}"),
    }
}

fn leaving(core: &mut Core) -> Vec<(ConnectionId, u32)> {
    let all = std::iter::from_fn(|| core.next_leaving());
    let all = all.inspect(|leaving| assert_eq!(leaving.handle, HANDLE));
    all.map(|leaving| (leaving.id, leaving.times_parked))
        .collect()
}

#[test]
fn connections_are_resumed_in_the_order_of_their_requests() {
    let (mut core, listener) = shared(60);
    let [first, second, third] = [1, 2, 3].map(|parked| idle(&mut core, listener, parked));
    assert!(!core.has_resumed(listener));
    for id in [second, first] {
        assert_eq!(core.data_arrived(id), Some(listener));
        assert_eq!(core.data_arrived(id), None, "reported twice");
    }
    core.hung_up(first);
    assert_eq!(core.next_resumed(listener), Some((second, 2)));
    assert_eq!(core.next_resumed(listener), Some((first, 1)));
    assert_eq!(core.next_resumed(listener), None);
    core.hung_up(third);
    assert_eq!(actions(&mut core), [Action::CloseParked(third)]);
    assert!(core.parked.is_empty());
}

#[test]
fn silent_connections_expire_together_at_the_end_of_a_second() {
    let (mut core, listener) = shared(1);
    let early = idle(&mut core, listener, 1);
    let same = core.hold(listener, None, 1, Time::from_millis(900));
    let late = core.hold(listener, None, 1, Time::from_millis(1100));
    let end = Time::from_secs(2);
    assert_eq!(core.parked_deadline(), Some(end));
    core.expire_parked(Time::from_millis(1999));
    assert_eq!(actions(&mut core), []);
    core.expire_parked(end);
    let (Held::Idle(same), Held::Idle(late)) = (same, late) else {
        panic!("{same:?} {late:?}");
    };
    let closed = [Action::CloseParked(early), Action::CloseParked(same)];
    assert_eq!(actions(&mut core), closed);
    assert_eq!(core.parked_deadline(), Some(Time::from_secs(3)));
    core.expire_parked(Time::from_secs(3));
    assert_eq!(actions(&mut core), [Action::CloseParked(late)]);
    assert_eq!(core.parked_deadline(), None);
}

#[test]
fn new_connections_expire_after_the_timeout_for_first_data() {
    let parking = Parking {
        idle_seconds: Some(60),
        first_data_seconds: Some(1),
        wait_for_data: Some(true),
    };
    let (mut core, listener) = shared_with(parking);
    idle(&mut core, listener, 0);
    assert_eq!(core.parked_deadline(), Some(Time::from_secs(2)));
}

#[test]
fn new_connection_takes_the_place_of_one_that_expires_later() {
    let parking = Parking {
        idle_seconds: Some(60),
        first_data_seconds: Some(1),
        wait_for_data: Some(true),
    };
    let (mut core, listener) = shared_with(parking);
    core.set_parked_limit(1);
    let parked = idle(&mut core, listener, 1);
    assert!(core.holds_silent(listener));
    let new = idle(&mut core, listener, 0);
    assert_eq!(actions(&mut core), [Action::CloseParked(parked)]);
    core.data_arrived(new);
    assert!(!core.holds_silent(listener), "no idle connection can close");
}

#[test]
fn silent_clients_are_held_only_while_the_listener_is_open() {
    let parking = Parking {
        wait_for_data: Some(true),
        ..Parking::default()
    };
    let (mut core, listener) = shared_with(parking);
    core.frame(ToWorker::Disconnect).unwrap();
    assert!(core.holds_silent(listener), "a silent client delays others");
    listener_closed(&mut core, &[Unreceived::AreServed]);
    assert!(!core.holds_silent(listener));
    let (core, listener) = shared_with(Parking::default());
    assert!(!core.holds_silent(listener));
}

#[test]
fn resumed_connection_does_not_move_the_timer() {
    let (mut core, listener) = shared(1);
    let id = idle(&mut core, listener, 1);
    let deadline = core.parked_deadline();
    core.data_arrived(id);
    core.next_resumed(listener);
    assert_eq!(core.parked_deadline(), None, "no connection is idle");
    let later = Time::from_millis(1500);
    assert!(matches!(core.hold(listener, None, 2, later), Held::Idle(_)));
    assert_eq!(core.parked_deadline(), deadline);
    core.expire_parked(Time::from_secs(2));
    assert_eq!(actions(&mut core), [], "the connection was parked again");
    assert_eq!(core.parked_deadline(), Some(Time::from_secs(3)));
}

#[test]
fn first_to_expire_is_closed_beyond_the_limit() {
    let (mut core, listener) = shared(60);
    core.set_parked_limit(2);
    let ids: Vec<_> = (0..5).map(|n| idle(&mut core, listener, n)).collect();
    let closed: Vec<_> = ids[..3].iter().copied().map(Action::CloseParked).collect();
    assert_eq!(actions(&mut core), closed);
    core.data_arrived(ids[4]);
    assert_eq!(core.next_resumed(listener), Some((ids[4], 4)));
}

#[test]
fn connections_are_checked_before_they_close() {
    let (mut core, listener) = shared(1);
    let [first, second] = [1, 2].map(|parked| idle(&mut core, listener, parked));
    core.set_parked_limit(2);
    assert_eq!(core.next_surplus(), Some(first));
    assert_eq!(core.expiring(Time::from_millis(1999)), []);
    let end = Time::from_secs(2);
    assert_eq!(core.expiring(end), [first, second]);
    core.data_arrived(first);
    assert_eq!(
        (core.next_surplus(), core.expiring(end)),
        (Some(second), vec![second])
    );
    core.expire_parked(end);
    assert_eq!(actions(&mut core), [Action::CloseParked(second)]);
    assert_eq!(core.next_surplus(), None);
}

/// Lets the worker process a `ListenerClosed` frame for each of `rests` at a time.
fn listener_closed(core: &mut Core, all: &[Unreceived]) {
    for &unreceived in all {
        let handle = HANDLE;
        let frame = ToWorker::ListenerClosed { handle, unreceived };
        core.frame(frame).unwrap();
    }
    core.frames_processed();
}

#[test]
fn disconnecting_worker_holds_connections_until_their_listener_ends() {
    let (mut core, listener) = shared(60);
    let private = core.listen_privately(Kind::Tcp, Parking::default());
    let private_one = idle(&mut core, private, 1);
    let [resumed, other] = [1, 2].map(|parked| idle(&mut core, listener, parked));
    core.frame(ToWorker::Disconnect).unwrap();
    let all = actions(&mut core);
    assert!(all.contains(&Action::CloseParked(private_one)), "{all:?}");
    assert!(!core.has_leaving(), "{all:?}");
    assert_eq!(core.hold(private, None, 2, NOW), Held::Closed);
    let again = idle(&mut core, listener, 3);
    // No other worker serves the listener, so this worker serves the client that has asked.
    core.data_arrived(resumed);
    listener_closed(&mut core, &[Unreceived::AreServed]);
    assert!(actions(&mut core).contains(&Action::SendLeaving));
    let left = leaving(&mut core);
    assert!(
        left.contains(&(other, 2)) && left.contains(&(again, 3)),
        "{left:?}"
    );
    assert_eq!(core.next_resumed(listener), Some((resumed, 1)));
    // A connection that the application parks now leaves at once.
    let Held::Leaving(id) = core.hold(listener, Some(HANDLE), 2, NOW) else {
        panic!("the worker holds a connection");
    };
    core.close(private);
    core.close(listener);
    assert!(!core.is_drained(), "a connection is left");
    assert_eq!(leaving(&mut core), [(id, 2)]);
    assert!(core.is_drained());
}

#[test]
fn all_connections_leave_for_the_workers_that_serve_on() {
    let (mut core, listener) = shared(60);
    let [resumed, other] = [1, 2].map(|parked| idle(&mut core, listener, parked));
    core.frame(ToWorker::Disconnect).unwrap();
    core.data_arrived(resumed);
    listener_closed(&mut core, &[Unreceived::GoToOthers]);
    assert_eq!(leaving(&mut core), [(resumed, 1), (other, 2)]);
}

#[test]
fn worker_that_was_busy_serves_the_clients_that_no_other_worker_will_serve() {
    let (mut core, listener) = shared(60);
    let [resumed, other] = [1, 2].map(|parked| idle(&mut core, listener, parked));
    core.frame(ToWorker::Disconnect).unwrap();
    core.data_arrived(resumed);
    listener_closed(
        &mut core,
        &[Unreceived::GoToOthers, Unreceived::ParkedAreServed],
    );
    assert_eq!(leaving(&mut core), [(other, 2)]);
    assert!(core.is_serving_parked(listener) && !core.has_ended(listener));
    core.close_if_served(listener);
    assert!(!core.has_ended(listener), "a client waits");
    assert_eq!(core.next_resumed(listener), Some((resumed, 1)));
    assert!(matches!(
        core.hold(listener, Some(HANDLE), 2, NOW),
        Held::Leaving(_)
    ));
    core.close_if_served(listener);
    assert!(core.has_ended(listener));
    let release = ToMaster::Release { handle: HANDLE };
    assert!(actions(&mut core).contains(&Action::Send(release)));
}

#[test]
fn listener_without_waiting_clients_closes_at_once() {
    for rests in [
        &[Unreceived::ParkedAreServed][..],
        &[Unreceived::GoToOthers, Unreceived::ParkedAreServed],
    ] {
        let (mut core, listener) = shared(60);
        let idle_one = idle(&mut core, listener, 1);
        core.frame(ToWorker::Disconnect).unwrap();
        listener_closed(&mut core, rests);
        assert_eq!(leaving(&mut core), [(idle_one, 1)]);
        assert!(core.has_ended(listener));
    }
}

#[test]
fn draining_listener_goes_on_when_no_other_worker_serves_it() {
    let (mut core, listener) = shared(60);
    core.frame(ToWorker::Disconnect).unwrap();
    listener_closed(
        &mut core,
        &[Unreceived::AreServed, Unreceived::ParkedAreServed],
    );
    assert!(core.is_draining(listener));
}

#[test]
fn connections_leave_a_listener_on_which_other_code_accepts() {
    let (mut core, listener) = shared(60);
    let [resumed, other] = [1, 2].map(|parked| idle(&mut core, listener, parked));
    core.data_arrived(resumed);
    core.use_std(listener);
    assert_eq!(leaving(&mut core), [(resumed, 1), (other, 2)]);
    assert!(!core.holds_silent(listener));
    assert_eq!(core.hold_moved(HANDLE, 1, NOW), Held::Closed);
}

#[test]
fn all_connections_of_a_closed_listener_leave_before_its_release() {
    let (mut core, listener) = shared(60);
    let [resumed, idle_one] = [1, 2].map(|parked| idle(&mut core, listener, parked));
    core.data_arrived(resumed);
    core.forget(listener);
    let release = Action::Send(ToMaster::Release { handle: HANDLE });
    let close = Action::CloseListener(listener);
    assert_eq!(actions(&mut core), [Action::SendLeaving, release, close]);
    assert_eq!(leaving(&mut core), [(resumed, 1), (idle_one, 2)]);
    assert!(!core.has_resumed(listener));
    let held = core.hold(listener, Some(HANDLE), 3, NOW);
    assert!(matches!(held, Held::Leaving(_)), "{held:?}");
}

#[test]
fn moved_connection_is_idle_or_returns_to_the_master() {
    let (mut core, listener) = shared(60);
    let Held::Idle(id) = core.hold_moved(HANDLE, 4, NOW) else {
        panic!("not held");
    };
    assert_eq!(core.data_arrived(id), Some(listener));
    assert_eq!(core.next_resumed(listener), Some((id, 4)));
    core.close(listener);
    let held = core.hold_moved(HANDLE, 4, NOW);
    assert!(matches!(held, Held::Leaving(_)), "{held:?}");
    assert_eq!(leaving(&mut core).len(), 1);
}

#[test]
fn closed_channel_closes_all_connections() {
    let (mut core, listener) = shared(60);
    let [first, second] = [1, 2].map(|parked| idle(&mut core, listener, parked));
    core.data_arrived(first);
    core.channel_closed();
    let mut all = actions(&mut core);
    all.retain(|action| matches!(action, Action::CloseParked(_)));
    assert_eq!(all, [first, second].map(Action::CloseParked));
    assert!(core.parked.is_empty() && core.parked_deadline().is_none());
    assert_eq!(core.hold(listener, Some(HANDLE), 1, NOW), Held::Closed);
}

#[test]
fn channel_of_a_killed_worker_closes_after_the_last_idle_connection_has_left() {
    for is_killed_late in [false, true] {
        let (mut core, listener) = shared(60);
        let all = [1, 2].map(|parked| idle(&mut core, listener, parked));
        if !is_killed_late {
            core.kill();
        }
        core.frame(ToWorker::Disconnect).unwrap();
        if is_killed_late {
            core.kill();
        }
        assert!(!actions(&mut core).contains(&Action::CloseChannel));
        assert_eq!(core.next_leaving().unwrap().id, all[0]);
        assert!(!actions(&mut core).contains(&Action::CloseChannel));
        assert_eq!(core.next_leaving().unwrap().id, all[1]);
        assert!(actions(&mut core).contains(&Action::CloseChannel));
    }
}
