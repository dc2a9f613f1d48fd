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

fn delayed(workers: usize) -> PoolOptions {
    options(workers).stop_delay(10 * SECOND)
}

#[test]
fn pool_serves_until_the_stop_delay_has_passed() {
    let mut world = World::serving(delayed(2));
    world.input(Core::stop);
    assert!(world.core.is_stopping() && !world.core.has_quorum());
    assert_eq!(world.events, [PoolEvent::QuorumLost]);
    assert_eq!(world.core.delayed_until(), Some(10 * SECOND));
    world.advance(10 * SECOND - MS);
    assert_eq!(world.disconnected, []);
    world.advance(MS);
    assert_eq!(world.disconnected, [1, 2]);
    assert_eq!(world.core.delayed_until(), None);
    world.advance(30 * SECOND - MS);
    assert_eq!(world.killed, []);
    world.advance(MS);
    assert_eq!(
        world.killed,
        [1, 2],
        "the drain timeout begins after the delay"
    );
}

#[test]
fn second_stop_ends_the_delay_after_one_second() {
    let stops: [fn(&mut Core, Time); 2] = [Core::stop, Core::stop_signal_received];
    for stop in stops {
        let mut world = World::serving(delayed(2));
        world.input(stop);
        world.input(stop);
        world.advance(999 * MS);
        world.input(stop);
        assert_eq!(world.disconnected, []);
        world.advance(MS);
        world.input(stop);
        world.input(Core::stop_signal_received);
        assert_eq!(world.disconnected, [1, 2]);
        assert_eq!(world.killed, []);
        world.advance(SECOND);
        world.input(Core::stop_signal_received);
        assert_eq!(world.killed, [1, 2], "one second after the delay's end");
    }
}

#[test]
fn stop_at_once_does_not_wait_for_the_delay() {
    let mut world = World::serving(delayed(2));
    world.input(Core::stop);
    world.input(Core::stop_at_once);
    assert_eq!(world.core.delayed_until(), None);
    assert_eq!(world.disconnected, [1, 2], "their listeners close, too");
    assert_eq!(world.killed, [1, 2]);
    world.exit_killed();
    assert!(world.core.is_over());
}

#[test]
fn worker_that_fails_during_the_stop_delay_is_replaced() {
    let mut world = World::serving(delayed(2));
    world.input(Core::stop);
    world.exit(1);
    world.exit(2);
    assert!(!world.core.is_over());
    assert_eq!(world.slot_workers(), [Some(3), Some(4)]);
    world.all_ready();
    assert!(!world.core.has_quorum());
    world.input(|core, now| core.scale(3, now));
    assert_eq!(world.slot_workers(), [Some(3), Some(4), Some(5)]);
    world.advance(10 * SECOND);
    assert_eq!(world.disconnected, [3, 4, 5]);
}

#[test]
fn stop_delay_lets_a_reload_continue_and_begins_no_other() {
    let mut world = World::serving(delayed(1));
    world.input(Core::reload);
    world.input(Core::reload);
    world.input(Core::stop);
    world.all_ready();
    world.advance(SECOND);
    world.exit(1);
    assert_eq!(world.slot_workers(), [Some(2)]);
    assert!(
        world
            .events
            .contains(&PoolEvent::Reloaded { generation: 1 })
    );
    world.input(Core::reload);
    assert!(!world.core.is_reloading());
}

#[test]
fn stop_delay_ends_an_upgrade_and_begins_no_other() {
    let mut world = World::serving(delayed(1));
    let new_master = world.upgrade();
    world.input(Core::stop);
    assert_eq!(world.terminated, [new_master]);
    assert!(!world.core.can_upgrade());
    world.input(|core, now| core.new_master_took_over(id(new_master), now));
    assert!(!world.core.is_upgraded());
    assert_eq!(world.disconnected, []);
}

#[test]
fn stop_of_a_master_that_serves_no_client_alone_is_not_delayed() {
    let mut world = World::serving(delayed(1));
    let new_master = world.upgrade();
    world.input(|core, now| core.new_master_took_over(id(new_master), now));
    assert_eq!(world.disconnected, [1], "the new master serves");

    let mut world = World::serving(delayed(1));
    world.core.await_takeover();
    world.input(Core::stop);
    assert_eq!(world.disconnected, [1], "the old master serves");

    let mut world = World::serving(delayed(1));
    world.core.await_takeover();
    world.core.took_over();
    world.input(Core::stop);
    assert_eq!(world.disconnected, []);
}

#[test]
fn pool_that_gives_up_does_not_wait_for_the_stop_delay() {
    let mut world = World::new(limited(1).stop_delay(10 * SECOND));
    world.exit(1);
    world.choose(FailureAction::StopPool);
    assert!(world.core.is_over());

    let mut world = World::new(limited(1).stop_delay(10 * SECOND));
    world.input(Core::stop);
    world.exit(1);
    world.choose(FailureAction::StopPool);
    assert_eq!(world.gave_up.len(), 1);
    assert!(world.core.is_over());
}
