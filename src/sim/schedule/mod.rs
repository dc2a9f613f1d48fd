//! Drives the simulated kernel with random schedules.
//!
//! A schedule is a list of [`Step`]s. Each step is one of the smallest possible operations. For
//! example, a process carries out an action or writes a frame, an application makes a call, or an
//! operation fails. A schedule that fails is shrunk and printed as a test. Copy this test to the
//! end of `tests.rs`.
//!
//! ```sh
//! CLUSTER_SIMULATION_STEPS=100000000 cargo test --release a_million_steps
//! CLUSTER_SIMULATION_SEED=7 cargo test a_million_steps # this schedule only
//! ```

mod keep_alive;
mod parked;
mod preemption;
mod shrink;
mod step;
mod tests;

use fastrand::Rng;

use super::kernel::{Call, Config, Ending, World};
use crate::types::ledger::Ledger;
use crate::types::policy::SchedulingPolicy;
use crate::types::worker_id::WorkerId;
use preemption::Preemption;
use step::{Step, Trouble, step};

/// The total number of steps in all schedules, unless `CLUSTER_SIMULATION_STEPS` is set. A test run
/// spends about two seconds on them.
const STEPS: u64 = 2_000_000;
/// The number of steps in one schedule. In 2,000 steps, workers are forked, serve clients and exit
/// several times. A longer schedule takes longer to shrink.
const STEPS_PER_SCHEDULE: u64 = 2000;

struct Schedule {
    world: World,
    /// The call that the master's application makes in its next callback, and the argument `n` of
    /// that call.
    callback: Option<(Call, u8)>,
    preemption: Preemption,
}

impl Schedule {
    fn new(policy: SchedulingPolicy) -> Self {
        let config = Config {
            policy,
            counts_queues: true,
            accept_batch: 1,
        };
        Self {
            world: World::new(config),
            callback: None,
            preemption: Preemption::default(),
        }
    }

    /// Makes the master carry out an action, write a frame, deliver an event, or handle an input.
    /// If the master delivers an event, its application makes the call in `callback`, if any.
    fn master_step(&mut self, n: u8) {
        let Some(emit) = self.world.master_step(n) else {
            return;
        };
        if let Some((call, n)) = self.callback.take() {
            let is_known = |id: &WorkerId| self.world.master.state(*id).is_some();
            let worker = emit.worker.filter(is_known);
            self.world.call(call, worker, n);
        }
    }
}

#[derive(Clone, Debug)]
struct Case {
    policy: SchedulingPolicy,
    ending: Ending,
    steps: Vec<Step>,
}

impl Case {
    fn random(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let policy = match rng.u8(0..4) {
            0 => SchedulingPolicy::Shared,
            _ => SchedulingPolicy::RoundRobin,
        };
        let ending = if rng.bool() {
            Ending::Stop
        } else {
            Ending::Kill
        };
        let trouble = Trouble::random(&mut rng);
        let steps = (0..STEPS_PER_SCHEDULE).map(|_| Step::random(&mut rng, trouble));
        Self {
            policy,
            ending,
            steps: steps.collect(),
        }
    }

    /// Runs the schedule and its ending. Returns the ledger, which counts the connections.
    fn replay(&self) -> Ledger {
        let mut schedule = Schedule::new(self.policy);
        for step in &self.steps {
            schedule.step(*step);
        }
        schedule.world.end(self.ending);
        schedule.world.master.ledger()
    }
}

/// Runs a schedule that once failed. Panics if it fails again.
fn replay(policy: SchedulingPolicy, ending: Ending, steps: &[Step]) {
    let steps = steps.to_vec();
    let case = Case {
        policy,
        ending,
        steps,
    };
    case.replay();
}

/// Returns the number in an environment variable, or `None` if the variable is not set. Panics if
/// its value is not a number.
fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().expect("a number"))
}

/// Runs the schedules of all `seeds`. Returns the sums of their ledgers' outcomes. If a schedule
/// fails, prints the shrunk schedule and panics.
#[allow(clippy::print_stdout)]
fn run(seeds: std::ops::Range<u64>) -> Ledger {
    let mut total = Ledger::default();
    for seed in seeds {
        let case = Case::random(seed);
        let Some(ledger) = shrink::outcome(&case) else {
            let shrunk = shrink::shrink(&case);
            println!("CLUSTER_SIMULATION_SEED={seed} fails, and so does:\n");
            println!("{}", shrink::as_test(&shrunk));
            shrunk.replay();
            panic!("the shrunk schedule fails no more");
        };
        total.parked += ledger.parked;
        total.resumed += ledger.resumed;
        total.expired += ledger.expired;
        total.idle_closed += ledger.idle_closed;
        total.received += ledger.received;
        total.closed_by_peer += ledger.closed_by_peer;
        total.dropped += ledger.dropped;
        total.passed += ledger.passed;
    }
    total
}

/// Seeds of schedules that failed in longer runs than `a_million_steps`.
///
/// 10,994: an idle worker left connections to busy workers for fairness, and the rest of them waited
/// in the master.
const FAILED_SEEDS: [u64; 1] = [10_994];

#[test]
#[cfg_attr(miri, ignore = "slow")]
fn schedules_that_failed_pass() {
    for seed in FAILED_SEEDS {
        run(seed..seed + 1);
    }
}

#[test]
fn a_million_steps() {
    let steps = number("CLUSTER_SIMULATION_STEPS").unwrap_or(STEPS);
    let single = number("CLUSTER_SIMULATION_SEED");
    let total = match single {
        Some(seed) => run(seed..seed + 1),
        None => run(0..steps.div_ceil(STEPS_PER_SCHEDULE)),
    };
    // Fail if too few connections were received, parked or closed in each way. The schedules would
    // then no longer exercise all ways in which a connection can end.
    let is_enough = total.received > 5000 && total.closed_by_peer > 5 && total.dropped > 300;
    let is_enough = is_enough && total.parked > 500 && total.resumed > 100;
    let is_enough = is_enough && total.expired > 10 && total.idle_closed > 100;
    let is_enough = is_enough && total.passed > 50;
    assert!(single.is_some() || is_enough, "{total:?}");
}
