//! Tests of the quorum while a pool is scaled, of forks that fail for lack of resources, and of the
//! memory limit.

use super::*;

impl World {
    fn quorum_events(&self) -> Vec<&PoolEvent> {
        let is_quorum =
            |event: &&PoolEvent| matches!(event, PoolEvent::QuorumReached | PoolEvent::QuorumLost);
        self.events.iter().filter(is_quorum).collect()
    }
}

#[test]
fn growing_pool_keeps_its_quorum() {
    let mut world = World::serving(options(2));
    world.input(|core, now| core.scale(3, now));
    world.input(|core, now| core.scale(4, now));
    assert!(world.core.has_quorum());
    world.ready(3);
    world.ready(4);
    assert_eq!(world.quorum_events(), [] as [&PoolEvent; 0]);
    // All four slots now count, so two ready workers are too few.
    world.exit(3);
    world.exit(4);
    assert_eq!(world.quorum_events(), [&PoolEvent::QuorumLost]);
}

#[test]
fn added_slots_do_not_count_towards_the_quorum_before_they_are_ready() {
    let mut world = World::serving(options(2).max_failures(0));
    world.input(|core, now| core.scale(4, now));
    world.exit(3);
    world.exit(4);
    world.choose(FailureAction::GiveUp);
    world.advance(60 * SECOND);
    assert!(world.core.has_quorum());
    world.exit(1);
    assert!(!world.core.has_quorum());
}

#[test]
fn first_quorum_needs_slots_that_were_added_before_it() {
    let mut world = World::new(options(2));
    world.ready(1);
    world.input(|core, now| core.scale(4, now));
    world.ready(2);
    assert!(!world.core.has_quorum());
    world.ready(4);
    assert!(world.core.has_quorum());
}

#[test]
fn pool_that_shrinks_and_grows_keeps_its_quorum() {
    let mut world = World::serving(options(4));
    world.input(|core, now| core.scale(1, now));
    world.input(|core, now| core.scale(6, now));
    assert!(world.core.has_quorum());
    assert_eq!(world.quorum_events(), [] as [&PoolEvent; 0]);
}

#[test]
fn growing_pool_stays_ready_with_a_configured_quorum() {
    let mut world = World::serving(options(2).quorum(Some(4)));
    world.input(|core, now| core.scale(4, now));
    assert!(world.core.has_quorum());
    world.all_ready();
    world.exit(4);
    assert_eq!(world.quorum_events(), [&PoolEvent::QuorumLost]);
}

/// Returns the times of the forks, in milliseconds.
fn fork_times(world: &World) -> Vec<u128> {
    let forks = world.forks.iter();
    forks.map(|(at, _, _)| at.as_millis()).collect()
}

#[test]
fn forks_that_lack_resources_do_not_count_towards_the_failure_limit() {
    let mut world = World::new(options(0).max_failures(0));
    world.fork_failure = Some(FailureCause::OutOfResources);
    world.input(|core, now| core.scale(1, now));
    world.advance(40 * SECOND);
    assert_eq!(
        fork_times(&world),
        [0, 100, 300, 700, 1500, 3100, 6300, 12700, 25500]
    );
    world.fork_failure = None;
    world.advance(30 * SECOND);
    assert_eq!(world.slot_workers(), [Some(1)]);
    assert_eq!(world.limits_reached, []);
    assert_eq!(world.core.failures(), 9);
}

#[test]
fn lack_of_resources_leaves_the_back_off_of_failures_unchanged() {
    let mut world = World::new(options(1).max_failures(2));
    world.fork_failure = Some(FailureCause::OutOfResources);
    world.exit(1);
    world.advance(10 * SECOND);
    world.fork_failure = None;
    world.advance(10 * SECOND);
    let [Some(worker)] = world.slot_workers()[..] else {
        panic!("{:?}", world.core)
    };
    // The worker's exit is the slot's second failure, after which the pause is 100 ms.
    world.exit(worker);
    assert_eq!(world.limits_reached, []);
    assert_eq!(world.core.slots[0].restart_at(), Some(world.now + 100 * MS));
    // The next lack of resources also begins with the first pause.
    world.fork_failure = Some(FailureCause::OutOfResources);
    world.advance(100 * MS);
    assert_eq!(world.core.slots[0].restart_at(), Some(world.now + 100 * MS));
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

/// Runs a pool of one worker for this time. The worker's memory reaches the limit in each check.
fn recycle_for(time: Duration, options: PoolOptions) -> World {
    let mut world = World::serving(options.max_memory(Some(1000)));
    let mut measured = 0;
    let end = world.now + time;
    while world.now < end {
        world.advance(100 * MS);
        if std::mem::replace(&mut measured, world.measurements) < world.measurements {
            for worker in world.workers() {
                world.input(|core, now| core.measured(id(worker), None, Some(1000), now));
            }
        }
        world.all_ready();
        for worker in std::mem::take(&mut world.disconnected) {
            world.exit(worker);
        }
    }
    world
}

#[test]
fn workers_that_reach_the_memory_limit_at_once_are_replaced_less_and_less_often() {
    let world = recycle_for(120 * SECOND, options(1).check_interval(SECOND));
    assert_eq!(
        fork_times(&world),
        [1000, 2000, 4000, 8000, 16000, 32000, 62000, 92000]
    );
    let postponed = world.events.iter().filter_map(|event| {
        let PoolEvent::RecyclingPostponed { worker, by, .. } = event else {
            return None;
        };
        Some((worker.get(), by.as_secs()))
    });
    let postponed: Vec<_> = postponed.collect();
    assert_eq!(
        postponed,
        [(4, 3), (5, 7), (6, 15), (7, 29), (8, 29), (9, 29)]
    );
}

#[test]
fn worker_that_reaches_the_memory_limit_late_is_replaced_at_once() {
    let mut world = World::serving(options(1).check_interval(SECOND).max_memory(Some(1000)));
    for worker in 1..4 {
        world.advance(40 * SECOND);
        world.input(|core, now| core.measured(id(worker), None, Some(1000), now));
        world.all_ready();
        world.advance(SECOND);
        world.exit(worker);
        assert_eq!(world.slot_workers(), [Some(worker + 1)]);
    }
}

#[test]
fn worker_that_waits_for_the_memory_limit_is_replaced_at_the_connection_limit() {
    let options = options(1).check_interval(SECOND).jitter(0);
    let mut world = recycle_for(6 * SECOND, options.max_connections(Some(5)));
    let [Some(worker)] = world.slot_workers()[..] else {
        panic!("{:?}", world.core)
    };
    let is_postponed = |event: &PoolEvent| matches!(event, PoolEvent::RecyclingPostponed { .. });
    assert!(world.events.iter().any(is_postponed));
    let forks = world.forks.len();
    world.input(|core, now| core.measured(id(worker), Some(5), Some(1000), now));
    assert_eq!(world.forks.len(), forks + 1);
}

#[test]
fn unknown_memory_reaches_no_limit() {
    let mut world = World::serving(options(1).max_memory(Some(0)));
    world.advance(5 * SECOND);
    world.input(|core, now| core.measured(id(1), None, None, now));
    assert!(world.forks.is_empty() && world.events.is_empty());
}
