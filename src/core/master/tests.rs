//! Tests of the master's decisions, mostly about listeners.

mod parked;
mod passed;

use std::os::unix::process::ExitStatusExt;

use super::listen::HANDLE_MAX;
use super::*;
use crate::types::endpoint::{BindFlags, Endpoint, Kind, Place};
use crate::types::errno;
use crate::wire::frame::ToMaster;

/// A core whose connections are numbers and whose messages have no descriptors.
type Core = MasterCore<u32, ()>;

/// Makes a worker listen on a port that has no listener. Returns the new listener's handle.
fn listen(core: &mut Core, worker: WorkerId, port: u16) -> HandleId {
    let endpoint = Endpoint::new(Kind::Tcp, Place::Port(port));
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

#[test]
fn listener_numbers_wrap_around_and_skip_those_in_use() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let worker = online(&mut core);
    assert_eq!(listen(&mut core, worker, 1), HandleId(1));
    core.last_handle = HANDLE_MAX - 1;
    assert_eq!(listen(&mut core, worker, 2), HandleId(HANDLE_MAX));
    assert_eq!(listen(&mut core, worker, 3), HandleId(2));
}

#[test]
fn worker_ids_run_out_and_are_never_used_again() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    core.last_worker = WorkerId::MAX - 1;
    let last = core.next_worker_id();
    assert_eq!(last, Some(WorkerId::new(WorkerId::MAX)));
    core.forked(last.unwrap());
    assert_eq!(core.next_worker_id(), None);
}

/// Sets a scheduler. Returns a listener's handle, and the idle worker that serves the listener.
fn with_scheduler(core: &mut Core) -> (HandleId, WorkerId) {
    core.use_scheduler();
    let worker = online(core);
    let handle = listen(core, worker, 1);
    let (received, open) = (0, 0);
    core.frame(
        worker,
        ToMaster::Idle {
            handle,
            received,
            open,
        },
    );
    while core.next_action().is_some() {}
    (handle, worker)
}

/// Takes all actions from the core. Returns the dispatched connections, each with whether it has
/// waited.
fn dispatched(core: &mut Core) -> Vec<(u32, bool)> {
    let actions = std::iter::from_fn(|| core.next_action());
    let dispatched = actions.filter_map(|action| match action {
        Action::Dispatch {
            connection,
            has_waited,
            ..
        } => match connection.connection {
            Handoff::New(client) => Some((client, has_waited)),
            Handoff::Held(_) => None,
        },
        _ => None,
    });
    dispatched.collect()
}

#[test]
fn clients_of_connections_that_have_waited_are_checked_before_the_dispatch() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let (handle, worker) = with_scheduler(&mut core);
    for client in 1..=17 {
        core.accepted(handle, client);
        let (handle, sequence, _) = core.unscheduled().unwrap();
        core.choose(handle, sequence, Some(worker));
    }
    let at_once: Vec<_> = (1..=16).map(|client| (client, false)).collect();
    assert_eq!(dispatched(&mut core), at_once);
    let idle = ToMaster::Idle {
        handle,
        received: 1,
        open: 0,
    };
    core.frame(worker, idle);
    assert_eq!(dispatched(&mut core), [(17, true)]);
    assert_eq!(core.ledger().in_flight(), 16);
    core.hung_up(handle, worker, Handoff::New(17));
    assert_eq!(core.ledger().in_flight(), 15);
    assert_eq!(core.ledger().closed_by_peer, 1);
}

/// Returns the number of a new connection.
fn new_client(handoff: &Handoff<u32>) -> u32 {
    match handoff {
        Handoff::New(client) => *client,
        Handoff::Held(_) => unreachable!("no connection is held"),
    }
}

#[test]
fn sweeps_take_turns_through_all_connections() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let (first, worker) = with_scheduler(&mut core);
    let second = listen(&mut core, worker, 2);
    (0..3).for_each(|client| core.accepted(first, client));
    (3..5).for_each(|client| core.accepted(second, client));
    let mut checked = Vec::new();
    for _ in 0..4 {
        core.sweep(2, |handoff| {
            checked.push(new_client(handoff));
            false
        });
    }
    // Each call checks two connections. The calls start at each listener in turn, and continue
    // behind the connection that was checked last in that listener. The third call checks the last
    // connection of the first listener and then the first connection of the second listener.
    assert_eq!(checked, [0, 1, 3, 4, 2, 3, 0, 1]);
    // Now clients 0, 2 and 4 have hung up. The first call continues behind the connections that
    // were checked above, so it finds only clients 2 and 4. The second call starts again at each
    // listener's first connection, and finds client 0.
    for _ in 0..2 {
        core.sweep(usize::MAX, |handoff| new_client(handoff) % 2 == 0);
    }
    assert_eq!(core.ledger().closed_by_peer, 3);
    assert_eq!(core.in_flight(), 2);
}

fn online(core: &mut Core) -> WorkerId {
    let worker = core.next_worker_id().unwrap();
    core.forked(worker);
    core.frame(worker, ToMaster::Online);
    worker
}

fn port(port: u16) -> Endpoint {
    Endpoint::new(Kind::Tcp, Place::Port(port))
}

fn ip(text: &str) -> Endpoint {
    Endpoint::new(Kind::Tcp, Place::Ip(text.parse().unwrap()))
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

/// Returns the index of the shard that these actions send to a worker.
fn shard(actions: &[Action<u32>]) -> Option<usize> {
    actions.iter().find_map(|action| match action {
        Action::Send {
            with: Attachment::Shard(_, shard),
            ..
        } => Some(*shard),
        _ => None,
    })
}

/// Returns the shards that receive new connections after these actions, or `None` if the actions do
/// not change them.
fn selected(actions: &[Action<u32>]) -> Option<&[usize]> {
    actions.iter().rev().find_map(|action| match action {
        Action::SelectShards { shards, .. } => Some(&shards[..]),
        _ => None,
    })
}

fn is_closing(actions: &[Action<u32>]) -> bool {
    actions.iter().any(|action| {
        matches!(
            action,
            Action::AttachSynFilter { .. } | Action::Unbind { .. } | Action::RemoveFile { .. }
        )
    })
}

/// Returns a core in which a client of a borrowed listener waits, because the worker is not idle.
///
/// No SYN filter is attached to a borrowed listener. Its first closing action is therefore the last
/// step of a drain.
fn with_waiting_client() -> Core {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let worker = online(&mut core);
    let borrowed = Endpoint::new(Kind::Tcp, Place::Fd(3));
    let requested = request(&mut core, worker, borrowed);
    let is_bind = matches!(requested[..], [Action::Bind { .. }]);
    assert!(is_bind, "{requested:?}");
    let handle = HandleId(1);
    core.bound(handle, Ok(None));
    core.accepted(handle, 7);
    core
}

#[test]
fn sweeps_are_scheduled_only_while_a_draining_listener_has_waiting_clients() {
    let mut core = with_waiting_client();
    assert_eq!(core.deadline(), None, "nothing drains");
    core.disconnect_all(true);
    let first = core.deadline().unwrap();
    core.tick(first);
    core.sweep(8, |_| false);
    let next = core.deadline().unwrap();
    assert_eq!(next, first + listener::SWEEP_INTERVAL);
    core.tick(next);
    core.sweep(8, |_| true);
    assert_eq!(core.deadline(), None, "no client waits");
}

#[test]
fn hang_up_of_the_last_waiting_client_ends_a_drain() {
    let mut core = with_waiting_client();
    core.disconnect_all(true);
    assert!(!is_closing(&actions(&mut core)), "a client waits");
    core.sweep(8, |_| false);
    assert!(!is_closing(&actions(&mut core)));
    core.sweep(8, |_| true);
    assert!(is_closing(&actions(&mut core)));
    assert_eq!(core.ledger().closed_by_peer, 1);
}

#[test]
fn drain_ends_although_the_worker_is_not_idle_again() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let worker = online(&mut core);
    request(&mut core, worker, port(1));
    let handle = HandleId(1);
    core.bound(handle, Ok(None));
    let idle = ToMaster::Idle {
        handle,
        received: 0,
        open: 0,
    };
    core.frame(worker, idle);
    core.accepted(handle, 7);
    core.accept_done(handle);
    // Carry out the dispatch. The worker then receives the connection, and pauses instead of
    // reporting that it is idle.
    actions(&mut core);
    core.frame(worker, ToMaster::Pause { handle });
    core.reclaimed(handle, worker, Vec::new(), true);
    assert_eq!(core.ledger().received, 1);
    core.disconnect_all(true);
    core.tick(super::drain::DRAIN_GRACE);
    let checks = actions(&mut core);
    let is_accept = |action: &Action<u32>| matches!(action, Action::Accept { at_most: 1, .. });
    assert!(checks.iter().any(is_accept), "{checks:?}");
    core.drained(handle);
    let unbound = actions(&mut core);
    let is_unbind = |action: &Action<u32>| matches!(action, Action::Unbind { .. });
    assert!(unbound.iter().any(is_unbind), "{unbound:?}");
}

#[test]
fn retained_listener_stays_open_until_it_is_released() {
    for policy in [
        SchedulingPolicy::RoundRobin,
        SchedulingPolicy::Shared,
        SchedulingPolicy::Sharded,
    ] {
        let mut core = Core::new(policy);
        let handle = retain(&mut core, port(1));
        for exits_unasked in [true, false] {
            let worker = online(&mut core);
            assert!(!is_closing(&request(&mut core, worker, port(1))));
            if !exits_unasked {
                core.disconnect_all(true);
            }
            core.channel_closed(worker);
            core.exited(worker, ExitStatusExt::from_raw(0));
            assert!(!is_closing(&actions(&mut core)));
            core.queue_closed(handle, worker, Vec::new());
        }
        let events: Vec<_> = std::iter::from_fn(|| core.next_event()).collect();
        let last = events.last().map(|emitted| &emitted.event);
        assert!(matches!(last, Some(Event::Disconnected)), "{policy:?}");
        core.release(handle);
        assert!(is_closing(&actions(&mut core)));
        assert_eq!(core.sizes().handles, 0);
    }
}

#[test]
fn last_worker_serves_accepted_connections_before_it_disconnects() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let handle = retain(&mut core, port(1));
    let worker = online(&mut core);
    request(&mut core, worker, port(1));
    let idle = |received| ToMaster::Idle {
        handle,
        received,
        open: 0,
    };
    core.frame(worker, idle(0));
    let accepts = |actions: &[Action<u32>]| {
        let is_accept = |action: &Action<u32>| matches!(action, Action::Accept { .. });
        actions.iter().any(is_accept)
    };
    let ends = |actions: &[Action<u32>]| {
        actions.iter().any(|action| {
            matches!(
                action,
                Action::Send {
                    frame: ToWorker::ListenerClosed { .. },
                    ..
                }
            )
        })
    };
    assert!(accepts(&actions(&mut core)));
    // The accept action is still in flight when the worker disconnects, and then returns a
    // connection. The worker's listener must not end before the worker has received the connection.
    core.disconnect(worker);
    assert!(!ends(&actions(&mut core)));
    core.accepted(handle, 7);
    core.accept_done(handle);
    let dispatched = actions(&mut core);
    let is_dispatch = |action: &Action<u32>| matches!(action, Action::Dispatch { .. });
    assert!(dispatched.iter().any(is_dispatch));
    assert!(!ends(&dispatched) && !accepts(&dispatched));
    core.readable(handle);
    assert!(!accepts(&actions(&mut core)));
    core.frame(worker, idle(1));
    let last = actions(&mut core);
    assert!(ends(&last) && !accepts(&last) && !is_closing(&last));
}

#[test]
fn listener_with_foreign_copies_is_neither_filtered_nor_shut_down() {
    for policy in [
        SchedulingPolicy::RoundRobin,
        SchedulingPolicy::Shared,
        SchedulingPolicy::Sharded,
    ] {
        for states in [
            &[][..],
            &[Ownership::Joint],
            &[Ownership::Joint, Ownership::Sole],
        ] {
            let mut core = Core::new(policy);
            let handle = retain(&mut core, port(1));
            let worker = online(&mut core);
            request(&mut core, worker, port(1));
            for state in states {
                core.set_ownership(handle, *state);
            }
            let is_sole = states.last() != Some(&Ownership::Joint);
            core.release(handle);
            core.disconnect_all(true);
            let mut all = actions(&mut core);
            core.drained(handle);
            core.channel_closed(worker);
            core.exited(worker, ExitStatusExt::from_raw(0));
            all.extend(actions(&mut core));
            core.queue_closed(handle, worker, Vec::new());
            all.extend(actions(&mut core));
            let has = |is: fn(&Action<u32>) -> bool| all.iter().any(is);
            let filtered = has(|action| matches!(action, Action::AttachSynFilter { .. }));
            let stopped = has(|action| matches!(action, Action::StopListening { .. }));
            assert_eq!((filtered, stopped), (is_sole, is_sole), "{policy:?}");
            assert!(has(|action| matches!(action, Action::Unbind { .. })));
            assert_eq!(core.sizes().handles, 0);
        }
    }
}

#[test]
fn sharded_listener_opens_again_while_a_worker_empties_its_shard() {
    let mut core = Core::new(SchedulingPolicy::Sharded);
    let first = online(&mut core);
    request(&mut core, first, port(1));
    let handle = HandleId(1);
    core.bound(handle, Ok(None));
    let second = online(&mut core);
    request(&mut core, second, port(1));
    core.shard_bound(handle, second, 1, Ok(()));
    core.disconnect(first);
    actions(&mut core);
    // Close the channel of the only worker that still serves the listener.
    core.channel_closed(second);
    let emptying = actions(&mut core);
    let filters = |action: &Action<u32>| matches!(action, Action::AttachSynFilter { .. });
    assert!(emptying.iter().any(filters), "{emptying:?}");
    assert!(core.is_bound(handle));
    // A third worker that listens now joins the same listener: it receives a shard, and the SYN
    // filter is detached.
    let third = online(&mut core);
    let joined = request(&mut core, third, port(1));
    assert_eq!(
        (shard(&joined), selected(&joined)),
        (Some(1), Some(&[1][..]))
    );
    let unfilters = |action: &Action<u32>| matches!(action, Action::DetachSynFilter { .. });
    assert!(joined.iter().any(unfilters), "{joined:?}");
    // The listener closes when the channel of its last worker closes.
    core.channel_closed(first);
    assert!(!is_closing(&actions(&mut core)));
    core.channel_closed(third);
    assert!(is_closing(&actions(&mut core)));
    assert_eq!(core.sizes().handles, 0);
}

#[test]
fn connections_that_arrive_without_workers_go_to_the_shard_of_the_next_worker() {
    let mut core = Core::new(SchedulingPolicy::Sharded);
    let handle = retain(&mut core, port(1));
    let first = online(&mut core);
    assert_eq!(shard(&request(&mut core, first, port(1))), Some(0));
    let second = online(&mut core);
    request(&mut core, second, port(1));
    core.shard_bound(handle, second, 1, Ok(()));
    let bound = actions(&mut core);
    assert_eq!(
        (shard(&bound), selected(&bound)),
        (Some(1), Some(&[0, 1][..]))
    );
    // When both workers disconnect, shard 0 stays selected. New connections wait in shard 0 for the
    // next worker.
    core.disconnect_all(false);
    assert_eq!(selected(&actions(&mut core)), Some(&[0][..]));
    core.frame(second, ToMaster::Release { handle });
    assert_eq!(selected(&actions(&mut core)), Some(&[0][..]));
    let third = online(&mut core);
    let joined = request(&mut core, third, port(1));
    assert_eq!(
        (shard(&joined), selected(&joined)),
        (Some(0), Some(&[0][..]))
    );
    // The third and the fourth worker exit while a shard is being bound for the fifth worker. The
    // fifth worker then receives shard 1 instead, because connections wait in shard 1.
    let fourth = online(&mut core);
    assert_eq!(shard(&request(&mut core, fourth, port(1))), Some(1));
    let fifth = online(&mut core);
    assert_eq!(shard(&request(&mut core, fifth, port(1))), None);
    core.channel_closed(fourth);
    core.channel_closed(third);
    assert_eq!(selected(&actions(&mut core)), Some(&[1][..]));
    core.shard_bound(handle, fifth, 1, Ok(()));
    let bound = actions(&mut core);
    assert_eq!((shard(&bound), selected(&bound)), (Some(1), Some(&[1][..])));
}

#[test]
fn replacement_of_a_killed_worker_receives_its_shard() {
    let mut core = Core::new(SchedulingPolicy::Sharded);
    let handle = retain(&mut core, port(1));
    let drained = online(&mut core);
    assert_eq!(shard(&request(&mut core, drained, port(1))), Some(0));
    let killed = online(&mut core);
    request(&mut core, killed, port(1));
    core.shard_bound(handle, killed, 1, Ok(()));
    assert_eq!(shard(&actions(&mut core)), Some(1));
    // Shard 0 is free too, but its worker has drained it.
    core.disconnect(drained);
    core.frame(drained, ToMaster::Release { handle });
    core.channel_closed(killed);
    let replacement = online(&mut core);
    assert_eq!(shard(&request(&mut core, replacement, port(1))), Some(1));
    let next = online(&mut core);
    assert_eq!(shard(&request(&mut core, next, port(1))), Some(0));
}

#[test]
fn adopted_listener_is_found_by_its_address_and_by_its_port_if_unspecified() {
    let mut core = Core::new(SchedulingPolicy::Sharded);
    let mut adopt = |text: &str| {
        let handle = core.next_handle();
        core.adopted(handle, ip(text), text.parse().ok());
        handle
    };
    let (all, both) = (adopt("0.0.0.0:80"), adopt("[::]:80"));
    let again = adopt("[::]:80");
    let one = adopt("127.0.0.1:81");
    let mut shared = |endpoint| {
        let worker = online(&mut core);
        let requested = request(&mut core, worker, endpoint);
        requested.into_iter().find_map(|action| match action {
            Action::Send {
                with: Attachment::Listener(handle),
                ..
            } => Some(handle),
            _ => None,
        })
    };
    assert_eq!(shared(port(80)), Some(all), "the first one");
    assert_eq!(shared(ip("0.0.0.0:80")), Some(all));
    assert_eq!(shared(ip("[::]:80")), Some(both));
    assert_eq!(shared(ip("127.0.0.1:81")), Some(one));
    assert_eq!(shared(port(81)), None);
    let worker = online(&mut core);
    request(&mut core, worker, port(80));
    let twice = request(&mut core, worker, ip("0.0.0.0:80"));
    let is_error = |action: &Action<u32>| {
        let Action::Send { frame, .. } = action else {
            return false;
        };
        matches!(frame, ToWorker::Reply { result, .. } if *result == Err(errno::EADDRINUSE))
    };
    assert!(twice.iter().any(is_error) && core.is_connected(worker));
    core.release(again);
    core.release(all);
    assert!(core.is_bound(all), "a worker has it");
    assert!(!core.is_bound(again));
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

#[test]
fn adopted_socket_is_requested_only_after_a_worker_or_the_application_requests_it() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let mut adopt = |endpoint: Endpoint, bound: &str| {
        let handle = core.next_handle();
        core.adopted(handle, endpoint, bound.parse().ok());
        handle
    };
    let fixed = adopt(ip("127.0.0.1:80"), "127.0.0.1:80");
    let any = adopt(ip("127.0.0.1:0"), "127.0.0.1:81");
    let unused = adopt(ip("127.0.0.1:82"), "127.0.0.1:82");
    let worker = online(&mut core);
    request(&mut core, worker, ip("127.0.0.1:80"));
    // The first request for port 0 receives the adopted socket. The second one must open another
    // socket.
    assert_eq!(core.retain(&ip("127.0.0.1:0")), Some(any));
    assert_eq!(core.retain(&ip("127.0.0.1:0")), None);
    let requested = [fixed, any, unused].map(|handle| core.is_requested(handle));
    assert_eq!(requested, [true, true, false]);
}

#[test]
fn adopted_udp_socket_is_shared_and_has_one_key() {
    let udp = Endpoint::new(Kind::Udp, Place::Ip("0.0.0.0:53".parse().unwrap()));
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let handle = core.next_handle();
    core.adopted(handle, udp.clone(), "0.0.0.0:53".parse().ok());
    let worker = online(&mut core);
    let is_copy = |action: &Action<u32>| matches!(action, Action::Send { with: Attachment::Listener(own), .. } if *own == handle);
    assert!(request(&mut core, worker, udp).iter().any(is_copy));
    let binds = |action: &Action<u32>| matches!(action, Action::Bind { .. });
    assert!(request(&mut core, worker, port(53)).iter().any(binds));
}

#[test]
fn retain_all_retains_open_sockets_except_borrowed_descriptors() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let worker = online(&mut core);
    let own = listen(&mut core, worker, 1);
    let borrowed = Endpoint::new(Kind::Tcp, Place::Fd(9));
    request(&mut core, worker, borrowed);
    core.bound(HandleId(own.0 + 1), Ok(None));
    assert_eq!(core.retain_all(), [own]);
    core.disconnect_all(true);
    core.channel_closed(worker);
    core.exited(worker, ExitStatusExt::from_raw(0));
    core.queue_closed(own, worker, Vec::new());
    assert!(core.is_bound(own), "retained");
    core.release(own);
    assert!(!core.is_bound(own));
}

#[test]
fn new_connections_go_to_the_first_shard_if_foreign_copies_may_exist() {
    for (ownership, expected) in [(Ownership::Sole, 1), (Ownership::Joint, 0)] {
        let mut core = Core::new(SchedulingPolicy::Sharded);
        let handle = retain(&mut core, port(1));
        let workers = [online(&mut core), online(&mut core)];
        request(&mut core, workers[0], port(1));
        request(&mut core, workers[1], port(1));
        core.shard_bound(handle, workers[1], 1, Ok(()));
        core.channel_closed(workers[1]);
        core.set_ownership(handle, ownership);
        actions(&mut core);
        core.disconnect_all(true);
        let selected: Vec<_> = actions(&mut core)
            .into_iter()
            .filter_map(|action| match action {
                Action::SelectShards { shards, .. } => Some(shards),
                _ => None,
            })
            .collect();
        assert_eq!(selected.last(), Some(&vec![expected]), "{ownership:?}");
    }
}

#[test]
fn error_names_the_masters_own_socket_that_occupies_the_port() {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let handle = core.next_handle();
    core.adopted(handle, ip("[::]:80"), "[::]:80".parse().ok());
    let worker = online(&mut core);
    request(&mut core, worker, ip("0.0.0.0:80"));
    core.bound(HandleId(handle.0 + 1), Err(errno::EADDRINUSE));
    let errors =
        std::iter::from_fn(|| core.next_event()).filter_map(|emitted| match emitted.event {
            Event::Error(error) => Some(error.to_string()),
            _ => None,
        });
    let errors: Vec<_> = errors.collect();
    assert_eq!(errors.len(), 2, "at both levels: {errors:?}");
    let expected = "cannot listen on 0.0.0.0:80: ";
    assert!(errors[0].starts_with(expected), "{errors:?}");
    assert!(
        errors[0].ends_with("; this master already has [::]:80"),
        "{errors:?}"
    );
    assert_eq!(core.occupant_address(&ip("0.0.0.0:81")), None);
    let udp = Endpoint::new(Kind::Udp, Place::Ip("0.0.0.0:80".parse().unwrap()));
    assert_eq!(core.occupant_address(&udp), None);
    let local = core.next_handle();
    core.adopted(local, ip("127.0.0.1:82"), "127.0.0.1:82".parse().ok());
    assert!(core.occupant_address(&ip("0.0.0.0:82")).is_some());
    assert_eq!(core.occupant_address(&ip("127.0.0.2:82")), None);
}

/// Returns the worker, the connection, and the number of times that the connection has been parked,
/// of each `Adopt` action. A connection that the master already held is returned as `u32::MAX`.
fn adopted(core: &mut Core) -> Vec<(WorkerId, u32, u32)> {
    let all = actions(core).into_iter();
    let adopted = all.filter_map(|action| match action {
        Action::Adopt {
            worker,
            connection,
            parked,
            ..
        } => Some((worker, connection, parked)),
        _ => None,
    });
    let adopted = adopted.map(|(worker, connection, parked)| match connection {
        Handoff::New(connection) => (worker, connection, parked),
        Handoff::Held(_) => (worker, u32::MAX, parked),
    });
    adopted.collect()
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
fn remaining_workers_take_turns_with_the_idle_connections_of_another() {
    let (mut core, handle, [leaving, second, third]) = shared_by_three();
    core.disconnect(leaving);
    for connection in 0..3 {
        core.park(leaving, handle, connection, 5);
    }
    let expected = [(second, 0, 5), (third, 1, 5), (second, 2, 5)];
    assert_eq!(adopted(&mut core), expected);
    // A worker that closes its listener parks its connections before the master knows of the close.
    // It does not get them back.
    core.park(third, handle, 3, 1);
    assert_eq!(adopted(&mut core), [(second, 3, 1)]);
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
    assert_eq!(adopted(&mut core), [(next, u32::MAX, 5)]);
    assert_eq!(core.ledger().in_flight(), 0);
}

#[test]
fn connection_for_a_worker_that_does_not_read_is_offered_again() {
    let (mut core, handle, [leaving, second, _]) = shared_by_three();
    core.park(leaving, handle, 0, 5);
    assert_eq!(adopted(&mut core), [(second, 0, 5)]);
    core.not_adopted(handle, 0, 5);
    assert_eq!(core.ledger().in_flight(), 1);
    let retry = core.deadline().unwrap();
    core.tick(retry);
    assert_eq!(adopted(&mut core).len(), 1);
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
