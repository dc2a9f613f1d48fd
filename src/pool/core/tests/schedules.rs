//! Property tests of the core with random schedules of inputs.

use proptest::prelude::*;

use super::super::slots::Occupancy;
use super::*;

/// A call by the application or an event. An index selects a process, modulo the number of
/// processes.
#[derive(Clone, Debug)]
enum Step {
    /// Simulates that all workers become ready.
    AllReady,
    /// Simulates the exit of all disconnecting workers.
    AllShutDown,
    /// Simulates that the worker at this index becomes ready.
    Ready(usize),
    /// Simulates the exit of the worker at this index.
    Exits(usize),
    /// Advances the time by this number of milliseconds.
    Advance(u16),
    Scale(usize),
    Reload,
    ReloadWith(u32),
    Cancel,
    Retry,
    /// Sets the cause with which later forks fail, or `None` if they succeed.
    ForksFail(Option<FailureCause>),
    /// Reports that the worker at this index has received five connections, which is the limit.
    Measured(usize),
    Upgrade,
    NewMasterTookOver,
    /// Simulates the exit of the new master at this index.
    NewMasterExits(usize),
    Stop,
    StopAtOnce,
    /// Calls the function at this index of `DURING_FORK` during the next fork.
    DuringFork(usize),
}

/// The functions that `Step::DuringFork` calls. Only the last two stop the pool.
const DURING_FORK: [fn(&mut Core, Time); 5] = [
    |core, now| core.scale(1, now),
    |core, now| core.scale(4, now),
    Core::reload,
    Core::stop,
    Core::stop_at_once,
];

/// Returns a strategy for steps that often begin and end generations, and never stop the pool.
fn step_of_generations() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => any::<u32>().prop_map(Step::ReloadWith),
        1 => Just(Step::Reload),
        1 => Just(Step::Cancel),
        4 => Just(Step::AllReady),
        4 => Just(Step::AllShutDown),
        3 => any::<usize>().prop_map(Step::Exits),
        4 => (0u16..2_000).prop_map(Step::Advance),
        2 => (0usize..4).prop_map(Step::Scale),
        1 => (0..DURING_FORK.len() - 2).prop_map(Step::DuringFork),
    ]
}

fn fork_failure() -> impl Strategy<Value = Option<FailureCause>> {
    let causes = [FailureCause::ForkFailed, FailureCause::OutOfResources];
    prop::option::of(prop::sample::select(causes.to_vec()))
}

/// Returns a strategy for application calls and events that do not stop the pool.
fn step_before_a_stop() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => any::<usize>().prop_map(Step::Ready),
        5 => any::<usize>().prop_map(Step::Exits),
        6 => (0u16..40_000).prop_map(Step::Advance),
        1 => (0usize..6).prop_map(Step::Scale),
        2 => Just(Step::Reload),
        2 => any::<u32>().prop_map(Step::ReloadWith),
        1 => Just(Step::Cancel),
        1 => Just(Step::Retry),
        1 => fork_failure().prop_map(Step::ForksFail),
        2 => any::<usize>().prop_map(Step::Measured),
        2 => Just(Step::Upgrade),
        1 => any::<usize>().prop_map(Step::NewMasterExits),
        1 => (0..DURING_FORK.len() - 2).prop_map(Step::DuringFork),
    ]
}

/// Returns a strategy for all application calls and events, including those that stop the pool.
fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        40 => step_before_a_stop(),
        1 => (0..DURING_FORK.len()).prop_map(Step::DuringFork),
        1 => Just(Step::NewMasterTookOver),
        1 => Just(Step::Stop),
        1 => Just(Step::StopAtOnce),
    ]
}

impl World {
    fn step(&mut self, step: &Step) {
        let pick = |world: &Self, at: usize| {
            let count = world.core.workers.len().max(1);
            world.workers().get(at % count).copied()
        };
        match *step {
            Step::AllReady => self.all_ready(),
            Step::AllShutDown => {
                let workers = self.core.workers.iter();
                let workers = workers.filter(|(_, w)| w.phase() == WorkerPhase::Disconnecting);
                let workers: Vec<_> = workers.map(|(worker, _)| worker.get()).collect();
                workers.into_iter().for_each(|worker| self.exit(worker));
            }
            Step::Ready(at) => pick(self, at).into_iter().for_each(|w| self.ready(w)),
            Step::Exits(at) => pick(self, at).into_iter().for_each(|w| self.exit(w)),
            Step::Advance(time) => self.advance(u32::from(time) * MS),
            Step::Scale(workers) => {
                let grows = workers >= self.core.slots.len() && self.during_fork.is_none();
                let stays_ready = grows && self.core.has_quorum();
                self.input(|core, now| core.scale(workers, now));
                assert!(self.core.has_quorum() || !stays_ready);
            }
            Step::Reload => self.input(Core::reload),
            Step::ReloadWith(settings) => self.reload_with(settings),
            Step::Cancel => self.cancel_reload(),
            Step::Retry => self.input(Core::retry),
            Step::ForksFail(cause) => self.fork_failure = cause,
            Step::Measured(at) => {
                if let Some(worker) = pick(self, at) {
                    self.input(|core, now| core.measured(id(worker), Some(5), None, now));
                }
            }
            Step::Upgrade if self.core.can_upgrade() => drop(self.upgrade()),
            Step::Upgrade => {}
            Step::NewMasterTookOver => {
                if let Some(&new_master) = self.new_masters.last() {
                    self.input(|core, now| core.new_master_took_over(id(new_master), now));
                }
            }
            Step::NewMasterExits(at) => {
                let count = self.new_masters.len().max(1);
                if let Some(&new_master) = self.new_masters.iter().nth(at % count) {
                    self.exit_new_master(new_master);
                }
            }
            Step::Stop => self.input(Core::stop),
            Step::StopAtOnce => self.input(Core::stop_at_once),
            Step::DuringFork(which) => self.during_fork = Some(DURING_FORK[which]),
        }
    }

    /// Checks the invariants. At most `max` workers may exist that are not disconnecting.
    fn check(&self, max: usize) {
        let core = &self.core;
        let is_staying = |worker: &Worker| worker.phase() != WorkerPhase::Disconnecting;
        let staying = core.workers.values().filter(|worker| is_staying(worker));
        assert!(staying.count() <= max);
        for (id, worker) in &core.workers {
            let slot = core.slots.get(worker.slot);
            let is_in_slot =
                slot.is_some_and(|slot| [slot.worker(), slot.successor].contains(&Some(*id)));
            assert_eq!(is_in_slot, is_staying(worker));
        }
        for slot in &core.slots {
            for worker in slot.worker().iter().chain(&slot.successor) {
                assert!(core.workers.contains_key(worker));
            }
            let is_vacant = slot.occupancy == Occupancy::Vacant && slot.successor.is_none();
            assert!(!is_vacant || !core.keeps_workers());
            assert!(self.generations.settings(slot.generation) == self.settings[&slot.generation]);
        }
        assert!(!core.has_quorum() || !core.is_stopping());
        // Check the settings of the current generation, because new slots will get them.
        let next = core.generation;
        assert_eq!(self.generations.settings(next), self.settings[&next]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Checks that each worker has a slot or is disconnecting after each step, and that the number
    /// of workers that are not disconnecting is bounded. Also checks that all slots are filled in
    /// the end, unless the pool was stopped.
    #[test]
    fn any_schedule_ends_with_all_slots_filled(
        steps in prop::collection::vec(step(), 0..60),
        surge in 1usize..4,
        canary in prop::option::of(1usize..3),
        age in prop::option::of(20u64..200),
        delay in 0u64..60,
    ) {
        let delay = Duration::from_secs(delay);
        let mut options = options(3).surge(surge).max_connections(Some(5)).max_failures(5).failure_window(60 * SECOND).stop_delay(delay);
        options.canary = canary.map(|workers| Canary::new(workers, 20 * SECOND));
        options.max_age = age.map(Duration::from_secs);
        let mut world = World::new(options);
        for step in &steps {
            world.step(step);
            world.check(world.core.slots.len() + surge.max(canary.unwrap_or(0)));
        }
        world.during_fork = None;
        world.fork_failure = None;
        let is_stopped = world.core.is_stopping();
        world.core.options.max_age = None;
        for worker in world.core.workers.values_mut() {
            worker.expires_at = None;
        }
        for _ in 0..60 {
            world.input(Core::retry);
            world.all_ready();
            world.advance(31 * SECOND);
            world.exit_killed();
        }
        if !is_stopped {
            prop_assert!(world.slot_workers().iter().all(Option::is_some));
            prop_assert_eq!(world.core.workers.len(), world.core.slots.len());
        }
        prop_assert!(world.core.rollout.is_none());
        world.input(Core::stop);
        world.advance(delay + 30 * SECOND);
        world.exit_killed();
        prop_assert!(world.core.is_over());
        prop_assert_eq!(world.core.next_deadline(), None);
    }

    /// Checks that each worker is forked with the settings with which its generation began, even if
    /// later generations have failed, and that the settings of old generations do not accumulate.
    #[test]
    fn every_generation_keeps_its_settings(
        steps in prop::collection::vec(step_of_generations(), 0..80),
        surge in 1usize..3,
    ) {
        let mut world = World::serving(options(2).surge(surge).max_failures(u32::MAX).failure_window(SECOND));
        for step in &steps {
            // `World::carry_out_actions` compares the settings of every fork.
            world.step(step);
            world.check(world.core.slots.len() + surge);
            let known = world.generations.count();
            prop_assert!(known <= world.core.slots.len().max(4) + 2, "settings of {known} generations are kept");
        }
    }

    /// Checks that, in any state of the pool, `stop` kills the remaining processes at the deadline,
    /// and `stop_at_once` kills them immediately. The deadline is the sum of the stop delay and the
    /// drain timeout after the call. Also checks that the pool ends when the killed processes have
    /// exited.
    #[test]
    fn stop_ends_by_its_deadline(
        before in prop::collection::vec(step_before_a_stop(), 0..40),
        stop in prop_oneof![
            2 => Just(Step::Stop),
            2 => Just(Step::StopAtOnce),
            1 => (3..DURING_FORK.len()).prop_map(Step::DuringFork),
        ],
        after in prop::collection::vec(step(), 0..10),
        surge in 1usize..4,
        canary in prop::option::of(1usize..3),
        drain in 1u64..60,
        delay in 0u64..20,
    ) {
        let [drain, delay] = [drain, delay].map(Duration::from_secs);
        let mut options = options(3).surge(surge).max_connections(Some(5)).drain_timeout(drain).stop_delay(delay);
        options.canary = canary.map(|workers| Canary::new(workers, 20 * SECOND));
        options.heartbeat_timeout = canary.map(|_| 30 * SECOND);
        let mut world = World::new(options);
        for step in &before {
            world.step(step);
        }
        world.fork_failure = None;
        world.step(&stop);
        if let Step::DuringFork(_) = stop {
            // Fork one more worker. The step's function is called during the next fork, and there
            // may be no other fork.
            let slots = world.core.slots.len();
            world.input(|core, now| core.scale(slots + 1, now));
        }
        prop_assert!(world.core.is_stopping());
        let deadline = world.now + delay + drain;
        let mut at_once = world.core.stop == StopState::Killing;
        for step in &after {
            let remaining = deadline.saturating_sub(world.now);
            if let Step::Advance(time) = step {
                world.advance(remaining.min(u32::from(*time) * MS));
            } else {
                world.step(step);
            }
            at_once |= matches!(step, Step::StopAtOnce);
        }
        let alive = |world: &World| {
            let killed: BTreeSet<_> = world.killed.iter().copied().collect();
            let new_masters = world.new_masters.iter().copied();
            let new_masters = new_masters.filter(|_| !world.core.is_upgraded());
            let alive = world.workers().into_iter().chain(new_masters);
            alive.filter(|process| !killed.contains(process)).count()
        };
        prop_assert!(!at_once || alive(&world) == 0, "alive: {:?}", world.core);
        // Let half of the workers exit before the deadline. Only the others remain to be killed.
        let mut early = world.core.workers.keys().map(|worker| worker.get());
        let early: Vec<_> = early.by_ref().step_by(2).collect();
        early.into_iter().for_each(|worker| world.exit(worker));
        world.killed.retain(|process| {
            world.core.workers.contains_key(&id(*process))
                || world.new_masters.contains(process)
        });
        let end = deadline.saturating_sub(world.now);
        world.advance(end);
        prop_assert_eq!(alive(&world), 0, "alive: {:?}", world.core);
        world.exit_killed();
        prop_assert!(world.core.is_over());
        prop_assert_eq!(world.core.next_deadline(), None);
    }
}
