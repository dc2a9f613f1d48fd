//! Tests of stop signals, of pools that give up, and of the number of slots that an upgrade keeps.

use super::*;

#[test]
fn second_stop_signal_kills_workers_only_after_one_second() {
    let mut world = World::serving(options(2));
    world.input(Core::stop_signal_received);
    world.input(Core::stop_signal_received);
    world.advance(999 * MS);
    world.input(Core::stop_signal_received);
    assert_eq!(world.disconnected, [1, 2]);
    assert!(world.killed.is_empty());
    world.advance(MS);
    world.input(Core::stop_signal_received);
    world.input(Core::stop_signal_received);
    assert_eq!(world.killed, [1, 2]);
}

#[test]
fn stop_signal_after_an_upgrade_has_no_effect() {
    let mut world = World::serving(options(2));
    let new_master = world.upgrade();
    world.input(|core, now| core.new_master_took_over(id(new_master), now));
    for _ in 0..3 {
        world.advance(2 * SECOND);
        world.input(Core::stop_signal_received);
    }
    assert!(world.killed.is_empty());
    world.input(Core::stop_at_once);
    assert_eq!(world.killed, [1, 2]);
}

#[test]
fn second_call_of_stop_has_no_effect() {
    let mut world = World::serving(options(2));
    world.input(Core::stop);
    world.advance(2 * SECOND);
    world.input(Core::stop);
    assert!(world.killed.is_empty());
    world.advance(28 * SECOND);
    assert_eq!(world.killed, [1, 2], "the first call sets the deadline");
}

fn limited(workers: usize) -> PoolOptions {
    options(workers).max_failures(0).failure_window(SECOND)
}

#[test]
fn pool_that_stops_at_the_failure_limit_gives_up() {
    let mut world = World::new(limited(1));
    world.exit(1);
    world.choose(FailureAction::StopPool);
    let [failure] = &world.gave_up[..] else {
        panic!("{:?}", world.gave_up);
    };
    assert_eq!(failure.status, Some(ExitStatus::from_raw(1 << 8)));
    assert!(world.core.is_over());
}

#[test]
fn pool_that_is_stopping_does_not_give_up() {
    let mut world = World::new(limited(1));
    world.exit(1);
    world.input(Core::stop);
    world.choose(FailureAction::StopPool);
    assert!(world.gave_up.is_empty());
}

#[test]
fn pool_does_not_stop_for_a_slot_that_has_been_filled_or_removed() {
    let mut world = World::new(limited(1));
    world.exit(1);
    world.input(Core::retry);
    assert_eq!(world.slot_workers(), [Some(2)]);
    world.choose(FailureAction::StopPool);
    assert!(world.gave_up.is_empty() && !world.core.is_stopping());

    let mut world = World::serving(limited(2));
    world.exit(2);
    world.input(|core, now| core.scale(1, now));
    world.choose(FailureAction::StopPool);
    assert!(world.gave_up.is_empty() && !world.core.is_stopping());
}

#[test]
fn pool_that_gives_up_one_slot_keeps_running() {
    let mut world = World::serving(limited(2));
    world.exit(1);
    world.choose(FailureAction::GiveUp);
    assert_eq!(world.slot_workers(), [None, Some(2)]);
    assert!(world.gave_up.is_empty() && !world.core.is_stopping());
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
fn number_of_slots_is_handed_over_if_it_differs_from_the_options() {
    let mut world = World::serving(options(2));
    let handed_over = |world: &World| world.core.handed_over_slots().map(usize::from);
    assert_eq!(handed_over(&world), None);
    for (size, expected) in [(3, Some(3)), (1, Some(1)), (2, None), (0, None)] {
        world.input(|core, now| core.scale(size, now));
        assert_eq!(handed_over(&world), expected, "{size}");
    }
}
