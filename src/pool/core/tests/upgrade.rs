//! Tests of upgrades: new masters, and what the old master passes to them.

use super::*;

#[test]
fn new_master_that_serves_outlives_the_stop() {
    let mut world = World::serving(options(1));
    let new_master = world.upgrade();
    world.input(|core, now| core.new_master_took_over(id(new_master), now));
    assert_eq!(world.events.last(), Some(&PoolEvent::Upgraded));
    assert!(!world.events.contains(&PoolEvent::Stopping));
    assert!(world.core.is_upgraded());
    world.input(Core::stop_at_once);
    assert_eq!(
        (&world.killed[..], &world.terminated[..]),
        (&[1][..], &[][..])
    );
    world.exit_killed();
    assert!(world.core.is_over());
}

#[test]
fn new_master_whose_upgrade_has_failed_cannot_take_over() {
    let mut world = World::serving(options(1));
    let failed = world.upgrade();
    world.advance(32 * SECOND);
    world.upgrade();
    world.input(|core, now| core.new_master_took_over(id(failed), now));
    assert!(!world.core.is_upgraded() && !world.core.is_stopping());
}

#[test]
fn takeover_counts_although_the_master_reads_of_it_only_after_the_deadline() {
    let mut world = World::serving(options(1));
    world.upgrade();
    world.has_taken_over = true;
    world.advance(32 * SECOND);
    assert!(world.core.is_upgraded());
    assert_eq!(
        (world.upgrade_failures(), &world.terminated[..]),
        (vec![], &[][..])
    );
}

#[test]
fn time_in_which_the_master_was_stopped_does_not_fail_an_upgrade() {
    let mut world = World::serving(options(1));
    let new_master = world.upgrade();
    world.core.next_deadline();
    world.now += 100 * SECOND;
    world.input(Core::tick);
    world.advance(31 * SECOND);
    assert_eq!(world.upgrade_failures(), []);
    world.advance(SECOND);
    assert_eq!(world.upgrade_failures(), [UpgradeFailure::Timeout]);
    assert_eq!(world.terminated, [new_master]);
}

#[test]
fn time_in_which_the_master_was_stopped_does_not_kill_disconnecting_workers() {
    let mut world = World::serving(options(1).drain_timeout(8 * SECOND));
    world.input(Core::stop_signal_received);
    world.core.next_deadline();
    world.now += 11 * SECOND;
    world.input(Core::tick);
    world.advance(7 * SECOND);
    assert_eq!(world.killed, []);
    world.advance(SECOND);
    assert_eq!(world.killed, [1]);
}

#[test]
fn short_delays_do_not_postpone_the_end_of_a_drain() {
    let mut world = World::serving(options(1).drain_timeout(Duration::from_millis(50)));
    world.input(Core::stop_signal_received);
    world.core.next_deadline();
    world.now += Duration::from_millis(500);
    world.input(Core::tick);
    assert_eq!(world.killed, [1]);
}

#[test]
fn new_master_cannot_upgrade_before_it_has_taken_over() {
    let mut world = World::new(options(1));
    world.core.await_takeover();
    assert!(!world.core.can_upgrade());
    world.core.took_over();
    assert!(world.core.can_upgrade());
}

#[test]
fn failed_upgrade_allows_the_next_one() {
    let mut world = World::serving(options(1).drain_timeout(5 * SECOND));
    let first = world.upgrade();
    world.exit_new_master(first);
    let status = ExitStatus::from_raw(0);
    assert_eq!(world.upgrade_failures(), [UpgradeFailure::Exited(status)]);
    assert_eq!(world.terminated, []);
    assert_eq!(world.core.next_deadline(), None);
    let second = world.upgrade();
    world.advance(32 * SECOND);
    assert_eq!(world.terminated, [second]);
    let third = world.upgrade();
    world.advance(5 * SECOND);
    assert_eq!(world.killed, [second], "the drain timeout has passed");
    world.exit_killed();
    world.exit_new_master(third);
    assert_eq!(world.slot_workers(), [Some(1)]);
    assert_eq!(world.core.next_deadline(), None);
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
fn number_of_slots_is_passed_on_if_it_differs_from_the_options() {
    let mut world = World::serving(options(2));
    let handed_over = |world: &World| world.core.handed_over_slots().map(usize::from);
    assert_eq!(handed_over(&world), None);
    for (size, expected) in [(3, Some(3)), (1, Some(1)), (2, None), (0, None)] {
        world.input(|core, now| core.scale(size, now));
        assert_eq!(handed_over(&world), expected, "{size}");
    }
}
