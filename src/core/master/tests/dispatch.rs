//! Tests of connections between `accept` and the worker: checks of waiting clients, and sweeps.

use super::*;

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
            HandOff::New(client) => Some((client, has_waited)),
            HandOff::Held(_) => None,
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
    core.hung_up(handle, worker, HandOff::New(17));
    assert_eq!(core.ledger().in_flight(), 15);
    assert_eq!(core.ledger().closed_by_peer, 1);
}

/// Returns the number of a new connection.
fn new_client(hand_off: &HandOff<u32>) -> u32 {
    match hand_off {
        HandOff::New(client) => *client,
        HandOff::Held(_) => unreachable!("no connection is held"),
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
        core.sweep(2, |hand_off| {
            checked.push(new_client(hand_off));
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
        core.sweep(usize::MAX, |hand_off| new_client(hand_off) % 2 == 0);
    }
    assert_eq!(core.ledger().closed_by_peer, 3);
    assert_eq!(core.in_flight(), 2);
}
