//! Checks that the memory and descriptors of a master and its workers stay bounded.
//!
//! A plain `cargo test` plays 500 respawns, 50,000 connections, 50,000 message round trips, 1,000
//! listeners with each policy, and 2,000 timers and watches in each role. The following command
//! plays 200 times as much (for example 100,000 respawns and 10 million connections), in about
//! twenty minutes on one core:
//!
//! ```sh
//! CLUSTER_TEST_SOAK=200 cargo test --release --test soak -- --test-threads=1
//! ```
//!
//! Each scenario has twenty rounds. Everything that a round starts has ended when the round ends.
//! Then the test measures the master, and the workers that run through all rounds, if there are any
//! (see `measure`). The first round is the warm-up. After the last round, the processes may hold no
//! more than after the first round, apart from the small growth that the constants in `measure`
//! allow. The scenario `serving` is stricter and short.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    missing_docs,
    unreachable_pub
)]

mod client;
mod connections;
#[allow(dead_code, unused_imports)]
#[path = "../process/harness/mod.rs"]
mod harness;
mod listeners;
mod long_lived;
mod r#loop;
mod measure;
mod messages;
mod respawns;
mod serving;

use std::process::{Command, ExitCode};
use std::sync::Mutex;

use harness::{Group, SCENARIO, Scenario};
use libtest_mimic::{Arguments, Failed, Trial};
use nix::sys::wait::{Id, WaitPidFlag, waitid};

#[global_allocator]
static HEAP: measure::CountingHeap = measure::CountingHeap;

/// Number of rounds. Each round ends with a measurement.
const ROUNDS: u64 = 20;

/// Returns the factor by which the work of a plain `cargo test` is multiplied.
fn work_factor() -> u64 {
    let times = std::env::var("CLUSTER_TEST_SOAK");
    times.map_or(1, |times| times.parse().expect("a number"))
}

/// Returns the amount of work for one round. `usual` is the amount for all rounds of a plain `cargo
/// test`.
fn work_per_round(usual: u64) -> u64 {
    usual * work_factor() / ROUNDS
}

fn main() -> ExitCode {
    if client::is_client() {
        client::run_orders();
        return ExitCode::SUCCESS;
    }
    let mut scenarios = [
        respawns::SCENARIOS,
        connections::SCENARIOS,
        messages::SCENARIOS,
        listeners::SCENARIOS,
        r#loop::SCENARIOS,
        serving::SCENARIOS,
    ]
    .into_iter()
    .flatten();
    if let Ok(name) = std::env::var(SCENARIO) {
        let scenario = scenarios.find(|scenario| scenario.name == name);
        (scenario.expect("a known scenario").play)();
        return ExitCode::SUCCESS;
    }
    // Make orphans of a scenario children of this process, so that `Group::finish` can check that
    // there are none.
    nix::sys::prctl::set_child_subreaper(true).expect("subreaper");
    let trials = scenarios.map(trial).collect();
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    print!("{}{}", measure::head(), TABLE.lock().unwrap());
    conclusion.exit_code()
}

/// The output of all scenarios, with the rows of the table and lines with the amounts of work.
static TABLE: Mutex<String> = Mutex::new(String::new());

fn trial(scenario: &'static Scenario) -> Trial {
    Trial::test(scenario.name, || run(scenario.name))
}

fn run(name: &str) -> Result<(), Failed> {
    let mut command = Command::new(std::env::current_exe()?);
    // Disable glibc's thread cache. The cache grows until it holds blocks of every size. After tens
    // of thousands of listeners it has grown by half a megabyte, which looks like a leak.
    command.env("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0");
    let group = Group::start(command.env(SCENARIO, name))?;
    // Wait without a deadline, because an alarm kills a process that does not finish a round.
    let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    waitid(Id::Pid(group.pid()), ended)?;
    let status = group.finish()?;
    if !status.success() {
        return Err(status.to_string().into());
    }
    TABLE.lock().unwrap().push_str(&group.output());
    Ok(())
}
