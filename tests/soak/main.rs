//! Bounded for ever: whatever a master and a worker have done, they are as small as they were.
//!
//! A plain `cargo test` plays 500 respawns, 50,000 connections, 50,000 messages there and back,
//! 1,000 listeners by each policy, and 2,000 timers and watches in each role. This plays two hundred
//! times as much (100,000 respawns, 10 million connections, 10 million messages there and back), in
//! some twenty minutes of one core:
//!
//! ```sh
//! CLUSTER_TEST_SOAK=200 cargo test --release --test soak -- --test-threads=1
//! ```
//!
//! Each scenario is played in twenty rounds. After each of them everything that the round has
//! started has ended, and the master and a worker that lives through all rounds are measured (see
//! `measure`). The first round is the warm-up: what is there after it is what may be there after
//! the last.
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
#[allow(dead_code)]
#[path = "../process/harness.rs"]
mod harness;
mod listeners;
mod long_lived;
mod r#loop;
mod measure;
mod messages;
mod respawns;

use std::process::{Command, ExitCode};
use std::sync::Mutex;

use harness::{Group, SCENARIO, Scenario};
use libtest_mimic::{Arguments, Failed, Trial};
use nix::sys::wait::{Id, WaitPidFlag, waitid};

#[global_allocator]
static HEAP: measure::CountingHeap = measure::CountingHeap;

/// How often everything is measured.
const ROUNDS: u64 = 20;

/// How many times the usual amount is played.
fn times() -> u64 {
    let times = std::env::var("CLUSTER_TEST_SOAK");
    times.map_or(1, |times| times.parse().expect("a number"))
}

/// What one round plays of what a plain `cargo test` plays in all.
fn share(usual: u64) -> u64 {
    usual * times() / ROUNDS
}

fn main() -> ExitCode {
    if client::is_client() {
        client::obey();
        return ExitCode::SUCCESS;
    }
    let mut scenarios = [
        respawns::SCENARIOS,
        connections::SCENARIOS,
        messages::SCENARIOS,
        listeners::SCENARIOS,
        r#loop::SCENARIOS,
    ]
    .into_iter()
    .flatten();
    if let Ok(name) = std::env::var(SCENARIO) {
        let scenario = scenarios.find(|scenario| scenario.name == name);
        (scenario.expect("a known scenario").play)();
        return ExitCode::SUCCESS;
    }
    // Orphans come to this process, which sees whether there are any.
    nix::sys::prctl::set_child_subreaper(true).expect("subreaper");
    let trials = scenarios.map(trial).collect();
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    print!("{}{}", measure::head(), TABLE.lock().unwrap());
    conclusion.exit_code()
}

/// What the scenarios have printed.
static TABLE: Mutex<String> = Mutex::new(String::new());

fn trial(scenario: &'static Scenario) -> Trial {
    Trial::test(scenario.name, || run(scenario.name))
}

fn run(name: &str) -> Result<(), Failed> {
    let mut command = Command::new(std::env::current_exe()?);
    // The pieces that glibc's cache keeps stay in more and more pages, until it has some of each
    // size: half a megabyte after ten thousands of listeners.
    command.env("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0");
    let group = Group::start(command.env(SCENARIO, name))?;
    // However long that takes: one that comes to no next round ends itself.
    let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    waitid(Id::Pid(group.pid()), ended)?;
    let status = group.finish()?;
    if !status.success() {
        return Err(status.to_string().into());
    }
    TABLE.lock().unwrap().push_str(&group.output());
    Ok(())
}
