//! Tests of the shards of a listener: which worker has which shard, and which shards receive new
//! connections.

use super::*;

/// Returns the index of the shard that these actions send to a worker.
fn shard(actions: &[Action<u32>]) -> Option<usize> {
    actions.iter().find_map(|action| match action {
        Action::Send {
            attachment: Attachment::Shard(_, shard),
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
    let attaches_filter = |action: &Action<u32>| matches!(action, Action::AttachSynFilter { .. });
    assert!(emptying.iter().any(attaches_filter), "{emptying:?}");
    assert!(core.is_bound(handle));
    // A third worker that listens now joins the same listener: it receives a shard, and the SYN
    // filter is detached.
    let third = online(&mut core);
    let joined = request(&mut core, third, port(1));
    assert_eq!(
        (shard(&joined), selected(&joined)),
        (Some(1), Some(&[1][..]))
    );
    let detaches_filter = |action: &Action<u32>| matches!(action, Action::DetachSynFilter { .. });
    assert!(joined.iter().any(detaches_filter), "{joined:?}");
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
    core.disconnect_all();
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
        core.disconnect_all();
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
