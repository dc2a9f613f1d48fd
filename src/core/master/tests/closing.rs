//! Tests of listeners that close: when they drain, stay open or are filtered.

use std::os::unix::process::ExitStatusExt;

use super::*;

/// Returns a core in which a client of a borrowed listener waits, because the worker is not idle.
///
/// No SYN filter is attached to a borrowed listener. Its first closing action is therefore the last
/// step of a drain.
fn with_waiting_client() -> Core {
    let mut core = Core::new(SchedulingPolicy::RoundRobin);
    let worker = online(&mut core);
    let borrowed = Endpoint::new(Kind::Tcp, BindAddress::Fd(3));
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
    core.disconnect_all();
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
    core.disconnect_all();
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
    core.reclaimed(handle, worker, Vec::new(), QueueState::Empty);
    assert_eq!(core.ledger().received, 1);
    core.disconnect_all();
    core.tick(super::drain::DRAIN_GRACE);
    let checks = actions(&mut core);
    let is_accept = |action: &Action<u32>| matches!(action, Action::Accept { at_most: 1, .. });
    assert!(checks.iter().any(is_accept), "{checks:?}");
    core.backlog_emptied(handle);
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
                core.disconnect_all();
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
            core.disconnect_all();
            let mut all = actions(&mut core);
            core.backlog_emptied(handle);
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
