//! Drives the simulated kernel by random schedules.
//!
//! A schedule is a list of plain [`Step`]s. Each is the smallest thing that can happen: an action is
//! carried out, a frame is written or read, an event is delivered, an application calls something,
//! something fails. A schedule that fails is shrunk and printed as a test, to be copied to the end
//! of `tests.rs`.
//!
//! ```sh
//! CLUSTER_SIMULATION_STEPS=100000000 cargo test --release a_million_steps
//! CLUSTER_SIMULATION_SEED=7 cargo test a_million_steps # this schedule only
//! ```

mod shrink;
mod step;
mod tests;

use fastrand::Rng;

use super::kernel::{Call, Config, Ending, World};
use crate::config::policy::SchedulingPolicy;
use crate::types::ledger::Ledger;
use crate::types::worker_id::WorkerId;
use step::{Step, Trouble, step};

/// The number of steps of all schedules together, unless `CLUSTER_SIMULATION_STEPS` says otherwise.
/// About two seconds of a test run.
const STEPS: u64 = 2_000_000;
/// The number of steps of one schedule. Enough for workers to be forked, to serve and to exit a few
/// times; a longer schedule takes longer to shrink.
const STEPS_PER_SCHEDULE: u64 = 2000;

struct Schedule {
    world: World,
    /// The next call of the master's application from a callback.
    callback: Option<(Call, u8)>,
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
        }
    }

    /// The master does one thing. If it delivers an event, its application may call something.
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

    /// Returns where the connections went.
    fn replay(&self) -> Ledger {
        let mut schedule = Schedule::new(self.policy);
        for step in &self.steps {
            schedule.step(*step);
        }
        schedule.world.end(self.ending);
        schedule.world.master.ledger()
    }
}

/// Runs a schedule that has failed once.
fn replay(policy: SchedulingPolicy, ending: Ending, steps: &[Step]) {
    let steps = steps.to_vec();
    let case = Case {
        policy,
        ending,
        steps,
    };
    case.replay();
}

/// The number in an environment variable, if it is set.
fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().expect("a number"))
}

/// Runs the schedules of all seeds. Returns where the connections went.
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
        total.received += ledger.received;
        total.closed_by_peer += ledger.closed_by_peer;
        total.dropped += ledger.dropped;
    }
    total
}

#[test]
fn a_million_steps() {
    let steps = number("CLUSTER_SIMULATION_STEPS").unwrap_or(STEPS);
    let single = number("CLUSTER_SIMULATION_SEED");
    let total = match single {
        Some(seed) => run(seed..seed + 1),
        None => run(0..steps.div_ceil(STEPS_PER_SCHEDULE)),
    };
    // The schedules prove something only if connections end in all ways.
    let is_enough = total.received > 5000 && total.closed_by_peer > 5 && total.dropped > 300;
    assert!(single.is_some() || is_enough, "{total:?}");
}
