//! Tests of workers that fail and of forks that fail: the back-off, and the failure limit.

use super::*;

#[test]
fn crash_loop_backs_off_and_gives_up() {
    let mut world = World::new(options(1).max_failures(8).failure_window(60 * SECOND));
    while world.limits_reached.is_empty() {
        if let [Some(worker)] = world.slot_workers()[..] {
            world.exit(worker);
        } else if let Some(next) = world.core.next_deadline() {
            world.advance(next - world.now);
        }
    }
    let times: Vec<_> = world
        .forks
        .iter()
        .map(|(at, _, _)| at.as_millis())
        .collect();
    assert_eq!(times, [0, 0, 100, 300, 700, 1500, 3100, 6300, 12700]);
    assert!(
        world
            .events
            .contains(&PoolEvent::FailureLimitReached { slot: 0 })
    );
    world.choose(FailureAction::GiveUp);
    world.advance(3600 * SECOND);
    assert_eq!(world.forks.len(), 9, "a given-up slot is not filled");
    world.input(Core::retry);
    assert_eq!(world.forks.len(), 10);
}

#[test]
fn given_up_slot_is_filled_again_when_the_application_says_so() {
    let mut world = World::new(options(1).max_failures(0).failure_window(SECOND));
    world.exit(1);
    assert_eq!(world.limits_reached[0].slot, 0);
    world.choose(FailureAction::RetryAfter(5 * SECOND));
    world.advance(4999 * MS);
    assert_eq!(world.forks.len(), 1);
    world.advance(MS);
    assert_eq!(world.forks.len(), 2);
    world.exit(2);
    world.choose(FailureAction::StopPool);
    assert!(world.core.is_over());
}

#[test]
fn back_off_has_a_cap_and_a_healthy_worker_resets_it() {
    let mut world = World::new(options(1).max_failures(100).failure_window(SECOND));
    for _ in 0..20 {
        let [Some(worker)] = world.slot_workers()[..] else {
            panic!("empty")
        };
        world.exit(worker);
        world.advance(30 * SECOND);
    }
    let slot = &world.core.slots[0];
    assert_eq!(slot.restart_at(), None);
    let worker = slot.worker().unwrap().get();
    world.ready(worker);
    world.advance(9999 * MS);
    world.exit(worker);
    assert_eq!(
        world.core.slots[0].restart_at(),
        Some(world.now + 30 * SECOND)
    );
    world.advance(30 * SECOND);
    let worker = world.core.slots[0].worker().unwrap().get();
    world.ready(worker);
    world.advance(10 * SECOND);
    world.exit(worker);
    assert_eq!(
        world.forks.last().unwrap().0,
        world.now,
        "the first failure has no pause"
    );
}

#[test]
fn jitter_lengthens_pauses_up_to_its_percentage() {
    let mut core = Core::new(options(0).jitter(50), Time::ZERO, 3);
    let pauses: BTreeSet<_> = (0..1000).map(|_| core.jittered_time(SECOND)).collect();
    assert!(pauses.len() > 300);
    assert!(*pauses.first().unwrap() >= SECOND);
    assert!(*pauses.last().unwrap() < 1500 * MS);
    assert!(*pauses.last().unwrap() > 1450 * MS);
}

#[test]
fn failed_fork_is_a_worker_failure() {
    let mut world = World::new(options(0));
    world.fork_failure = Some(FailureCause::ForkFailed);
    world.input(|core, now| core.scale(1, now));
    let PoolEvent::WorkerFailed(failure) = &world.events[0] else {
        panic!("{:?}", world.events)
    };
    assert_eq!(
        (failure.cause, failure.worker),
        (FailureCause::ForkFailed, None)
    );
    world.fork_failure = None;
    world.advance(100 * MS);
    assert!(world.core.slots[0].worker().is_some());
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
