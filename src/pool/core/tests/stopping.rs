//! Tests of stops: stop signals, the drain timeout, the stop delay, and pools that give up.

use super::*;

#[test]
fn stop_kills_workers_at_the_drain_timeout() {
    let mut world = World::serving(options(2));
    world.exit(1);
    world.input(Core::reload);
    world.input(Core::stop);
    let workers: Vec<_> = world.workers().into_iter().map(id).collect();
    let disconnected = disconnecting(&world).into_iter().map(|(_, worker)| worker);
    assert_eq!(disconnected.collect::<Vec<_>>(), workers);
    world.advance(29 * SECOND);
    assert!(world.killed.is_empty());
    world.exit(2);
    world.input(Core::reload);
    world.input(|core, now| core.scale(9, now));
    world.advance(SECOND);
    let remaining = world.workers();
    assert_eq!(world.killed, remaining);
    let forks = world.forks.len();
    remaining.into_iter().for_each(|worker| world.exit(worker));
    assert!(world.core.is_over());
    assert_eq!(world.core.next_deadline(), None);
    assert_eq!(world.forks.len(), forks);
}

#[test]
fn stop_at_once_after_a_stop_kills_all_workers() {
    let mut world = World::serving(options(2));
    world.input(Core::stop);
    world.input(Core::stop_at_once);
    assert_eq!(world.killed, [1, 2]);
}

#[test]
fn stop_at_once_kills_every_new_master() {
    for is_second in [false, true] {
        let mut world = World::serving(options(1));
        let failed = world.upgrade();
        world.advance(32 * SECOND);
        assert_eq!(world.upgrade_failures(), [UpgradeFailure::Timeout]);
        let pending = world.upgrade();
        if is_second {
            world.input(Core::stop);
            assert_eq!(world.killed, []);
        }
        world.input(Core::stop_at_once);
        assert_eq!(world.terminated, [failed, pending]);
        assert_eq!(world.killed, [1, failed, pending]);
        assert_eq!(world.core.next_deadline(), None);
        world.exit_killed();
        assert!(world.core.is_over());
    }
}

#[test]
fn worker_forked_during_a_stop_gets_its_deadline() {
    for (stop, killed) in [
        (Core::stop as fn(&mut Core, Time), false),
        (Core::stop_at_once, true),
    ] {
        let mut world = World::serving(options(1));
        world.during_fork = Some(stop);
        world.input(|core, now| core.scale(3, now));
        assert_eq!(world.workers(), [1, 2], "no third worker is forked");
        assert_eq!(world.disconnected.contains(&2), !killed);
        assert_eq!(world.killed, if killed { &[1, 2][..] } else { &[] });
        world.advance(30 * SECOND);
        assert_eq!(world.killed, [1, 2]);
    }
}

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
fn second_call_of_stop_has_no_effect() {
    let mut world = World::serving(options(2));
    world.input(Core::stop);
    world.advance(2 * SECOND);
    world.input(Core::stop);
    assert!(world.killed.is_empty());
    world.advance(28 * SECOND);
    assert_eq!(world.killed, [1, 2], "the first call sets the deadline");
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

fn delayed(workers: usize) -> PoolOptions {
    options(workers).stop_delay(10 * SECOND)
}

#[test]
fn pool_serves_until_the_stop_delay_has_passed() {
    let mut world = World::serving(delayed(2));
    world.input(Core::stop);
    assert!(world.core.is_stopping() && !world.core.has_quorum());
    assert_eq!(world.events, [PoolEvent::Stopping, PoolEvent::QuorumLost]);
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
fn begin_of_a_stop_is_reported_once() {
    type Stop = fn(&mut Core, Time);
    let stops: [&[Stop]; 3] = [
        &[Core::stop, Core::stop],
        &[Core::stop, Core::stop_at_once],
        &[Core::stop_at_once],
    ];
    for options in [options(2), delayed(2)] {
        for stops in stops {
            let mut world = World::serving(options.clone());
            for stop in stops {
                world.input(stop);
                world.advance(SECOND);
            }
            world.advance(60 * SECOND);
            let is_stopping = |event: &&PoolEvent| **event == PoolEvent::Stopping;
            assert_eq!(world.events.iter().filter(is_stopping).count(), 1);
        }
    }
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
