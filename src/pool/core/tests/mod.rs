//! Tests of the core in a simulated pool, in which the tests control the processes and the time.

mod limits;
mod schedules;
mod stopping;

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use super::super::event::{Limit, ReloadFailure, UpgradeFailure};
use super::super::failure::{FailureAction, FailureCause};
use super::super::generations::Generations;
use super::super::options::{Canary, Readiness};
use super::*;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

fn id(number: u32) -> WorkerId {
    crate::worker_id(number)
}

/// Returns the default options for `workers` slots, without jitter.
fn options(workers: usize) -> PoolOptions {
    PoolOptions::default().workers(workers).jitter(0)
}

/// A pool with simulated processes and a virtual clock.
struct World {
    core: Core,
    now: Time,
    last_id: u32,
    /// The time, slot and generation of each fork.
    forks: Vec<(Time, usize, u64)>,
    events: Vec<PoolEvent>,
    disconnected: Vec<u32>,
    killed: Vec<u32>,
    /// The failures for which a failure action was requested.
    limits_reached: Vec<WorkerFailure>,
    /// The failures with which the pool has given up.
    gave_up: Vec<WorkerFailure>,
    /// The cause with which all later forks fail, or `None` if they succeed.
    fork_failure: Option<FailureCause>,
    measurements: u32,
    /// The settings of the generations that still exist. In these tests, settings are numbers.
    generations: Generations<u32>,
    /// The settings of every generation since the pool was created.
    settings: BTreeMap<u64, Option<u32>>,
    /// A function that is called during the next fork, because an application's closure may also
    /// call the pool while the pool forks.
    during_fork: Option<fn(&mut Core, Time)>,
    /// The new masters that have not exited.
    new_masters: BTreeSet<u32>,
    terminated: Vec<u32>,
}

impl World {
    fn new(options: PoolOptions) -> Self {
        let core = Core::new(options, Time::ZERO, 7);
        let mut world = Self {
            core,
            now: Time::ZERO,
            last_id: 0,
            forks: Vec::new(),
            events: Vec::new(),
            disconnected: Vec::new(),
            killed: Vec::new(),
            limits_reached: Vec::new(),
            gave_up: Vec::new(),
            fork_failure: None,
            measurements: 0,
            generations: Generations::new(),
            settings: BTreeMap::from([(0, None)]),
            during_fork: None,
            new_masters: BTreeSet::new(),
            terminated: Vec::new(),
        };
        world.carry_out_actions();
        world
    }

    /// Returns a pool in which all workers are ready. `events` and `forks` are empty.
    fn serving(options: PoolOptions) -> Self {
        let mut world = Self::new(options);
        world.all_ready();
        world.events.clear();
        world.forks.clear();
        world
    }

    fn carry_out_actions(&mut self) {
        while let Some(action) = self.core.next_action() {
            match action {
                Action::Fork { slot, generation } => {
                    let settings = self.generations.settings(generation);
                    assert_eq!(Some(&settings), self.settings.get(&generation));
                    self.forks.push((self.now, slot, generation));
                    if let Some(call) = self.during_fork.take() {
                        self.input(call);
                    }
                    if let Some(cause) = self.fork_failure {
                        let (error, now) = ("why".to_owned(), self.now);
                        self.core.fork_failed(slot, generation, cause, error, now);
                    } else {
                        self.last_id += 1;
                        let pid = 1000 + self.last_id;
                        let worker = id(self.last_id);
                        self.core.forked(slot, generation, worker, pid, self.now);
                    }
                }
                Action::BeginGeneration { generation, base } => {
                    let core = &self.core;
                    let unused = self.generations.begin(generation, base, |g| core.uses(g));
                    drop(unused);
                    let settings = self.generations.settings(generation);
                    let other = self.settings.insert(generation, settings);
                    assert_eq!(other, None, "a generation begins once");
                }
                Action::ReleaseSocketFiles | Action::PassParked(_) | Action::EndPassing(_) => {}
                Action::TerminateNewMaster(new_master) => self.terminated.push(new_master.get()),
                Action::Disconnect(worker) => self.disconnected.push(worker.get()),
                Action::DisconnectAll => self.disconnected.extend(self.workers()),
                Action::Kill(worker) => self.killed.push(worker.get()),
                Action::MeasureWorkers => self.measurements += 1,
                Action::RequestDecision(failure) => self.limits_reached.push(failure),
                Action::GiveUp(failure) => self.gave_up.push(failure),
                Action::EmittedEvent(event) => self.events.push(event),
            }
        }
    }

    fn input(&mut self, input: impl FnOnce(&mut Core, Time)) {
        input(&mut self.core, self.now);
        self.carry_out_actions();
    }

    /// Chooses the action for the last failure at a failure limit.
    fn choose(&mut self, action: FailureAction) {
        let failure = self.limits_reached.pop().unwrap();
        self.input(|core, now| core.failure_action_chosen(failure, action, now));
    }

    fn ready(&mut self, worker: u32) {
        self.input(|core, now| core.became_ready(id(worker), now));
    }

    fn all_ready(&mut self) {
        let workers = self.workers();
        for worker in workers {
            self.ready(worker);
        }
    }

    fn exit(&mut self, worker: u32) {
        let status = ExitStatus::from_raw(1 << 8);
        self.input(|core, now| core.exited(id(worker), status, None, now));
    }

    /// Advances the time, with a tick at each deadline.
    fn advance(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(next) = self.core.next_deadline().filter(|next| *next <= end) {
            self.now = self.now.max(next);
            self.input(Core::tick);
            let next = self.core.next_deadline();
            assert!(
                next.is_none_or(|next| next > self.now),
                "a tick leaves no deadline that is due"
            );
        }
        self.now = end;
    }

    fn reload_with(&mut self, settings: u32) {
        let _ = self.generations.replace_next(Some(settings));
        self.input(Core::reload);
    }

    fn cancel_reload(&mut self) {
        let _ = self.generations.replace_next(None);
        self.input(Core::cancel_reload);
    }

    /// Simulates the start of a new master in an upgrade. Returns the new master's id.
    fn upgrade(&mut self) -> u32 {
        assert!(self.core.can_upgrade());
        self.last_id += 1;
        let new_master = self.last_id;
        self.new_masters.insert(new_master);
        self.input(|core, now| core.new_master_started(id(new_master), now));
        new_master
    }

    fn exit_new_master(&mut self, new_master: u32) {
        assert!(self.new_masters.remove(&new_master));
        let status = ExitStatus::from_raw(0);
        self.input(|core, _| core.new_master_exited(id(new_master), status));
    }

    /// Simulates the exit of all processes that the pool has killed.
    fn exit_killed(&mut self) {
        for process in std::mem::take(&mut self.killed) {
            if self.new_masters.contains(&process) {
                self.exit_new_master(process);
            } else {
                self.exit(process);
            }
        }
    }

    fn upgrade_failures(&self) -> Vec<UpgradeFailure> {
        let failures = self.events.iter().filter_map(|event| {
            let PoolEvent::UpgradeFailed { reason } = event else {
                return None;
            };
            Some(reason.clone())
        });
        failures.collect()
    }

    fn slot_workers(&self) -> Vec<Option<u32>> {
        let number = |slot: &Slot| slot.worker().map(WorkerId::get);
        self.core.slots.iter().map(number).collect()
    }

    fn workers(&self) -> Vec<u32> {
        self.core
            .workers
            .keys()
            .map(|worker| worker.get())
            .collect()
    }
}

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

/// Returns the slots and workers of all `WorkerDisconnecting` events.
fn disconnecting(world: &World) -> Vec<(usize, WorkerId)> {
    let events = world.events.iter().filter_map(|event| {
        let PoolEvent::WorkerDisconnecting { slot, worker } = event else {
            return None;
        };
        Some((*slot, *worker))
    });
    events.collect()
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
fn new_master_that_serves_outlives_the_stop() {
    let mut world = World::serving(options(1));
    let new_master = world.upgrade();
    world.input(|core, now| core.new_master_took_over(id(new_master), now));
    assert_eq!(world.events.last(), Some(&PoolEvent::Upgraded));
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
