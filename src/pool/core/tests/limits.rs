//! Tests of the limits of a worker: its age, its connections, its memory and its heartbeats.

use super::*;

#[test]
fn worker_at_its_maximum_age_stays_until_its_successor_is_ready() {
    let mut world = World::serving(options(2).max_age(Some(60 * SECOND)));
    world.advance(60 * SECOND);
    assert_eq!(world.forks.len(), 1, "the surge is 1");
    assert!(world.events.contains(&PoolEvent::Recycling {
        slot: 0,
        worker: id(1),
        limit: Limit::Age
    }));
    assert!(world.disconnected.is_empty());
    world.all_ready();
    world.advance(SECOND);
    assert_eq!(world.disconnected, [1]);
    world.exit(1);
    assert_eq!(world.forks.len(), 2);
    world.exit(4);
    assert!(matches!(
        world.events.last(),
        Some(PoolEvent::RecyclingFailed(_))
    ));
    assert_eq!(world.slot_workers(), [Some(3), Some(2)]);
    world.advance(29 * SECOND);
    assert_eq!(
        world.forks.len(),
        2,
        "the next try waits for the back-off cap"
    );
    world.advance(SECOND);
    assert_eq!(world.forks.len(), 3);
}

#[test]
fn connections_and_memory_limits_replace_workers() {
    let limits = options(2).max_connections(Some(100)).max_memory(Some(1000));
    let mut world = World::serving(limits);
    world.advance(5 * SECOND);
    assert_eq!(world.measurements, 1);
    world.input(|core, now| core.measured(id(1), Some(99), Some(999), now));
    assert!(world.forks.is_empty());
    world.input(|core, now| core.measured(id(1), Some(100), None, now));
    assert_eq!(world.forks.len(), 1);
    world.input(|core, now| core.measured(id(2), None, Some(1000), now));
    world.all_ready();
    world.advance(SECOND);
    world.exit(1);
    let limits: Vec<_> = world
        .events
        .iter()
        .filter_map(|event| {
            let PoolEvent::Recycling { slot, limit, .. } = event else {
                return None;
            };
            Some((*slot, *limit))
        })
        .collect();
    assert_eq!(limits, [(0, Limit::Connections), (1, Limit::Memory)]);
}

#[test]
fn silent_worker_is_killed_at_the_heartbeat_timeout() {
    let mut world = World::serving(options(2).heartbeat_timeout(Some(10 * SECOND)));
    world.advance(9 * SECOND);
    world.input(|core, now| core.heartbeat_received(id(1), now));
    world.advance(SECOND);
    assert_eq!(world.killed, [2]);
    world.exit(2);
    assert!(
        world
            .events
            .iter()
            .any(|event| matches!(event, PoolEvent::WorkerFailed(failure) if failure.cause == FailureCause::HeartbeatTimeout))
    );
    // Simulate a master that was stopped for an hour and could not read heartbeats in that time.
    // The master must give each worker another full timeout before it kills the worker.
    world.core.next_deadline();
    world.now += 3600 * SECOND;
    world.input(Core::tick);
    assert_eq!(world.killed, [2]);
    world.advance(10 * SECOND);
    assert_eq!(world.killed.len(), 2);
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
