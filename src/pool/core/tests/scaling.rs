//! Tests of changes of the number of slots, and of the quorum during such changes.

use super::super::slots::SLOTS_MAX;
use super::*;

impl World {
    fn quorum_events(&self) -> Vec<&PoolEvent> {
        let is_quorum =
            |event: &&PoolEvent| matches!(event, PoolEvent::QuorumReached | PoolEvent::QuorumLost);
        self.events.iter().filter(is_quorum).collect()
    }
}

#[test]
fn scaling_adds_and_removes_the_last_slots() {
    let mut world = World::serving(options(2));
    world.input(|core, now| core.scale(4, now));
    assert_eq!(world.forks.len(), 2);
    world.all_ready();
    world.input(|core, now| core.scale(1, now));
    assert_eq!(world.disconnected, [4, 3, 2]);
    assert_eq!(disconnecting(&world), [(3, id(4)), (2, id(3)), (1, id(2))]);
    world.advance(30 * SECOND);
    assert_eq!(world.killed, [2, 3, 4], "the drain timeout has passed");
    for worker in [2, 3, 4] {
        world.exit(worker);
    }
    assert!(world.events.contains(&PoolEvent::WorkerShutDown {
        slot: 1,
        worker: id(2),
        killed: true
    }));
    assert_eq!(world.slot_workers(), [Some(1)]);
    assert_eq!(world.forks.len(), 2);
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

#[test]
fn scaling_down_to_given_up_slots_retries_them() {
    let mut world = World::serving(limited(2));
    world.exit(1);
    world.choose(FailureAction::GiveUp);
    world.input(|core, now| core.scale(1, now));
    assert_eq!(world.disconnected, [2]);
    assert_eq!(world.slot_workers(), [Some(3)]);
}

#[test]
fn scaling_down_cancels_forks_that_have_not_begun() {
    let mut core = Core::new(options(4), Time::ZERO, 7);
    core.scale(1, Time::ZERO);
    let actions = std::iter::from_fn(|| core.next_action());
    let (slot, generation) = (0, 0);
    assert!(actions.eq([Action::Fork { slot, generation }]));
}

#[test]
fn number_of_slots_has_a_maximum() {
    let mut world = World::serving(options(1));
    world.input(|core, now| core.scale(usize::MAX, now));
    assert_eq!(world.slot_workers().len(), SLOTS_MAX);
}
