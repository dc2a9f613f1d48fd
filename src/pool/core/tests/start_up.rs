//! Tests of workers from their fork until they are ready.

use super::*;

#[test]
fn slots_are_filled_and_no_deadline_is_left() {
    let mut world = World::new(options(3));
    assert_eq!(
        world.forks,
        [(Time::ZERO, 0, 0), (Time::ZERO, 1, 0), (Time::ZERO, 2, 0)]
    );
    world.ready(1);
    assert!(!world.core.has_quorum());
    world.ready(2);
    assert_eq!(world.events.last(), Some(&PoolEvent::QuorumReached));
    world.ready(3);
    assert_eq!(world.core.next_deadline(), None);
}

#[test]
fn startup_timeout_begins_after_the_time_of_alive() {
    let readiness = Readiness::Alive(60 * SECOND);
    let mut world = World::new(options(1).readiness(readiness).startup_timeout(30 * SECOND));
    world.advance(60 * SECOND);
    assert_eq!(world.killed, []);
    assert!(world.core.has_quorum());
}

#[test]
fn worker_is_killed_at_the_startup_timeout() {
    let mut world = World::new(options(1));
    world.advance(29_999 * MS);
    assert!(world.killed.is_empty());
    world.advance(MS);
    assert_eq!(world.killed, [1]);
    // The worker reports that it is ready after it has been killed. The failure must still be a
    // start-up timeout.
    world.ready(1);
    world.exit(1);
    assert!(world.events.iter().any(
        |event| matches!(event, PoolEvent::WorkerFailed(failure) if failure.cause == FailureCause::StartupTimeout)
    ));
    assert_eq!(world.slot_workers(), [Some(2)]);
}

#[test]
fn worker_that_stays_alive_becomes_ready() {
    let readiness = Readiness::Alive(2 * SECOND);
    let mut world = World::new(options(1).readiness(readiness));
    world.advance(1999 * MS);
    assert_eq!(world.core.ready_workers(), 0);
    world.advance(MS);
    assert_eq!(world.core.ready_workers(), 1);
    assert_eq!(world.core.next_deadline(), None);
}
