//! Tests of reloads: batches, canaries, failures, and the settings of each generation.

use super::*;

#[test]
fn reload_replaces_one_worker_at_a_time() {
    let mut world = World::serving(options(2));
    world.input(Core::reload);
    assert_eq!(world.forks, [(Time::ZERO, 0, 1)]);
    world.ready(3);
    assert!(
        world.disconnected.is_empty(),
        "the minimum ready time is not over"
    );
    world.advance(SECOND);
    assert_eq!(world.disconnected, [1]);
    assert_eq!(world.forks.len(), 1, "the old worker has not exited");
    world.exit(1);
    assert_eq!(world.forks[1..], [(SECOND, 1, 1)]);
    world.ready(4);
    world.advance(SECOND);
    world.exit(2);
    assert_eq!(world.slot_workers(), [Some(3), Some(4)]);
    assert_eq!(world.core.generation, 1);
    assert_eq!(
        world.events.last(),
        Some(&PoolEvent::Reloaded { generation: 1 })
    );
    assert_eq!(world.core.next_deadline(), None);
}

#[test]
fn reload_with_surge_replaces_several_workers_together() {
    let mut world = World::serving(options(3).surge(3));
    world.input(Core::reload);
    assert_eq!(world.forks.len(), 3);
    world.ready(4);
    world.ready(5);
    world.advance(5 * SECOND);
    assert!(world.disconnected.is_empty());
    world.ready(6);
    world.advance(SECOND);
    assert_eq!(world.disconnected, [1, 2, 3]);
}

#[test]
fn failed_reload_with_surge_for_all_slots_replaces_no_worker() {
    for is_last_ready in [false, true] {
        let mut world = World::serving(options(3).surge(3));
        world.input(Core::reload);
        world.ready(4);
        world.ready(5);
        if is_last_ready {
            world.ready(6);
            world.advance(999 * MS);
        }
        world.exit(6);
        let Some(PoolEvent::ReloadFailed { replaced: 0, .. }) = world.events.last() else {
            panic!("{:?}", world.events)
        };
        assert_eq!(world.disconnected, [4, 5]);
        world.exit(4);
        world.exit(5);
        assert_eq!(world.slot_workers(), [Some(1), Some(2), Some(3)]);
    }
}

/// Checks a new worker that fails after the old workers have been disconnected. The pool replaces
/// it by a worker of the new generation, and the reload succeeds.
#[test]
fn reload_with_surge_for_all_slots_survives_a_failure_after_the_replacement() {
    let mut world = World::serving(options(3).surge(3));
    world.input(Core::reload);
    (4..=6).for_each(|worker| world.ready(worker));
    world.advance(SECOND);
    assert_eq!(world.disconnected, [1, 2, 3]);
    world.exit(5);
    (1..=3).for_each(|worker| world.exit(worker));
    world.ready(7);
    world.advance(SECOND);
    assert_eq!(world.slot_workers(), [Some(4), Some(7), Some(6)]);
    assert!(
        world
            .events
            .contains(&PoolEvent::Reloaded { generation: 1 })
    );
}

#[test]
fn failed_reload_leaves_the_old_workers() {
    for is_ready in [false, true] {
        let mut world = World::serving(options(2));
        for round in 1..=20 {
            world.input(Core::reload);
            let successor = world.last_id;
            if is_ready {
                world.ready(successor);
                world.advance(999 * MS);
            }
            world.exit(successor);
            let Some(PoolEvent::ReloadFailed {
                generation,
                replaced,
                reason: ReloadFailure::WorkerFailed(failure),
            }) = world.events.last()
            else {
                panic!("{:?}", world.events)
            };
            assert_eq!((*generation, *replaced), (round, 0));
            assert_eq!(failure.worker, Some(id(successor)));
        }
        assert_eq!(world.slot_workers(), [Some(1), Some(2)]);
        assert_eq!(world.forks.len(), 20);
        assert!(world.disconnected.is_empty());
        assert_eq!(world.core.generation, 0);
        assert_eq!(world.core.next_deadline(), None);
        // After the failed reload, a worker that exits must be replaced by a worker of the old
        // generation.
        world.exit(1);
        assert_eq!(world.forks.last(), Some(&(world.now, 0, 0)));
    }
}

fn has_failed(world: &World) -> bool {
    let is_failure =
        |event: &PoolEvent| matches!(event, PoolEvent::ReloadFailed { replaced: 1, .. });
    world.events.iter().any(is_failure)
}

/// Checks a release whose workers fail after they have replaced the old ones. With the default of
/// `back_off_reset`, 10 s after a worker became ready its failure is no fault of the release.
#[test]
fn reload_fails_if_a_new_worker_fails_soon_after_the_replacement() {
    for (wait, fails) in [
        (Time::ZERO, true),
        (9 * SECOND - MS, true),
        (9 * SECOND, false),
    ] {
        for is_next_starting in [false, true] {
            let mut world = World::serving(options(3));
            world.input(Core::reload);
            world.ready(4);
            world.advance(SECOND);
            assert_eq!(world.disconnected, [1]);
            if is_next_starting {
                world.exit(1);
                assert_eq!(world.last_id, 5);
            }
            world.advance(wait);
            world.exit(4);
            assert_eq!(has_failed(&world), fails);
            let is_disconnected = world.disconnected.contains(&5);
            assert_eq!(is_disconnected, fails && is_next_starting);
            assert_eq!(world.slot_workers()[1..], [Some(2), Some(3)]);
        }
    }
}

#[test]
fn reload_fails_if_a_replaced_worker_cannot_be_forked_again() {
    for (cause, fails) in [
        (FailureCause::ForkFailed, true),
        (FailureCause::OutOfResources, false),
    ] {
        let mut world = World::serving(options(3));
        world.input(Core::reload);
        world.ready(4);
        world.advance(15 * SECOND);
        world.fork_failure = Some(cause);
        world.exit(4);
        assert_eq!(has_failed(&world), fails);
        assert_eq!(world.slot_workers()[1..], [Some(2), Some(3)]);
    }
}

#[test]
fn reload_fails_when_its_successor_is_not_ready_in_time() {
    let mut world = World::serving(options(1));
    world.input(Core::reload);
    world.advance(30 * SECOND);
    assert_eq!(world.killed, [2]);
    world.exit(2);
    assert!(matches!(
        world.events.last(),
        Some(PoolEvent::ReloadFailed { .. })
    ));
    assert_eq!(world.slot_workers(), [Some(1)]);
}

#[test]
fn reload_that_lacks_resources_fails_and_leaves_the_old_workers() {
    let mut world = World::serving(options(1).max_failures(0));
    world.fork_failure = Some(FailureCause::OutOfResources);
    world.input(Core::reload);
    assert!(matches!(
        &world.events[..],
        [PoolEvent::Reloading { .. }, PoolEvent::ReloadFailed { reason: ReloadFailure::WorkerFailed(failure), .. }]
            if failure.cause == FailureCause::OutOfResources
    ));
    assert_eq!(world.slot_workers(), [Some(1)]);
    assert!(world.core.has_quorum() && world.limits_reached.is_empty());
}

#[test]
fn canaries_serve_beside_all_old_workers() {
    let canary = options(4).canary(Some(Canary::new(2, 60 * SECOND)));
    let mut world = World::serving(canary.clone());
    world.input(Core::reload);
    assert_eq!(world.forks.len(), 2);
    world.all_ready();
    world.advance(59 * SECOND);
    assert!(world.disconnected.is_empty());
    world.input(Core::cancel_reload);
    assert_eq!(world.disconnected, [5, 6]);
    assert_eq!(world.slot_workers(), [Some(1), Some(2), Some(3), Some(4)]);
    assert!(matches!(
        world.events.last(),
        Some(PoolEvent::ReloadFailed {
            reason: ReloadFailure::Cancelled,
            ..
        })
    ));

    let mut world = World::serving(canary);
    world.input(Core::reload);
    world.all_ready();
    world.advance(60 * SECOND);
    assert_eq!(world.disconnected, [1, 2]);
    world.exit(1);
    world.exit(2);
    assert_eq!(
        world.forks.len(),
        3,
        "the next batch has the size of the surge"
    );
}

#[test]
fn reload_requested_during_a_reload_begins_after_it() {
    let mut world = World::serving(options(1));
    world.input(Core::reload);
    world.input(Core::reload);
    world.input(Core::reload);
    assert_eq!(world.forks.len(), 1);
    world.all_ready();
    world.advance(SECOND);
    world.exit(1);
    assert_eq!(world.forks.len(), 2);
    world.all_ready();
    world.advance(SECOND);
    world.exit(2);
    assert_eq!(world.forks.len(), 2);
    assert_eq!(world.core.generation, 2);
}

#[test]
fn successor_replaces_a_worker_that_fails_during_a_reload() {
    let mut world = World::serving(options(1));
    world.input(Core::reload);
    world.exit(1);
    assert_eq!(world.forks.len(), 1);
    assert_eq!(world.slot_workers(), [Some(2)]);
    world.ready(2);
    world.advance(SECOND);
    assert_eq!(world.core.generation, 1);

    let mut world = World::serving(options(1));
    world.input(Core::reload);
    world.exit(1);
    world.exit(2);
    world.advance(SECOND);
    assert_eq!(world.forks.last(), Some(&(100 * MS, 0, 0)));
}

#[test]
fn reload_continues_when_the_slots_of_its_batch_are_removed() {
    let mut world = World::serving(
        options(3)
            .surge(2)
            .canary(Some(Canary::new(3, 60 * SECOND))),
    );
    world.input(Core::reload);
    world.all_ready();
    world.input(|core, now| core.scale(1, now));
    world.ready(4);
    world.advance(59 * SECOND);
    assert_eq!(world.core.generation, 0, "one slot of the batch is left");
    world.input(|core, now| core.scale(0, now));
    assert_eq!(world.core.generation, 1);
    assert!(
        world
            .events
            .contains(&PoolEvent::Reloaded { generation: 1 })
    );
}

#[test]
fn killed_successor_replaces_no_worker() {
    let mut world = World::serving(
        options(1)
            .heartbeat_timeout(Some(SECOND))
            .min_ready_time(SECOND),
    );
    world.input(|core, now| core.heartbeat_received(id(1), now));
    world.input(Core::reload);
    world.ready(2);
    world.advance(500 * MS);
    world.input(|core, now| core.heartbeat_received(id(1), now));
    // The successor's minimum ready time and heartbeat timeout expire at the same time. The
    // successor must be killed, and must not replace the old worker.
    world.advance(500 * MS);
    assert_eq!(world.killed, [2]);
    assert_eq!(world.disconnected, []);
    world.exit_killed();
    assert_eq!(world.slot_workers(), [Some(1)]);
    assert!(matches!(
        world.events.last(),
        Some(PoolEvent::ReloadFailed { replaced: 0, .. })
    ));
}

#[test]
fn failed_reload_does_not_postpone_the_replacement_for_a_limit() {
    let mut world = World::serving(options(1).max_age(Some(60 * SECOND)));
    world.advance(50 * SECOND);
    world.input(Core::reload);
    let successor = world.last_id;
    world.exit(successor);
    world.advance(10 * SECOND);
    assert!(world.events.contains(&PoolEvent::Recycling {
        slot: 0,
        worker: id(1),
        limit: Limit::Age
    }));
}

#[test]
fn settings_of_the_generation_that_serves_outlive_failed_reloads() {
    let mut world = World::serving(options(2));
    world.reload_with(7);
    for _ in 0..2 {
        world.all_ready();
        world.advance(SECOND);
        let old = *world.disconnected.last().unwrap();
        world.exit(old);
    }
    assert_eq!(world.core.generation, 1);
    world.reload_with(8);
    world.all_ready();
    world.advance(SECOND);
    let old = *world.disconnected.last().unwrap();
    world.exit(old);
    let successor = world.last_id;
    world.exit(successor);
    assert_eq!(world.core.generation, 1, "the second slot has failed");
    world.input(|core, now| core.scale(1, now));
    world.reload_with(9);
    let successor = world.last_id;
    world.exit(successor);
    world.input(|core, now| core.scale(2, now));
    let (_, slot, generation) = *world.forks.last().unwrap();
    assert_eq!((slot, world.generations.settings(generation)), (1, Some(7)));
}
