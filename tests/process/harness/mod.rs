//! Runs each test in its own processes, and checks that no process, file or descriptor remains.
//!
//! A *scenario* is a function that calls `cluster::init` and runs as the master or as a worker. The
//! driver starts this test binary with the scenario's name in its environment. The started process
//! becomes the master. The master executes this binary for its workers, which inherit the
//! environment and run the same scenario.

mod group;
mod listeners;
mod log;
mod needs;
mod processes;
mod serving;
mod variants;
mod waiting;

pub use group::*;
pub use listeners::*;
pub use log::*;
pub use needs::*;
pub use processes::*;
pub use serving::*;
pub use variants::*;
pub use waiting::*;

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cluster::{Master, Role, Worker};
use libtest_mimic::{Failed, Trial};
use nix::sys::signal::{SigHandler, Signal, signal};

/// Environment variable that names the scenario of a process.
pub const SCENARIO: &str = "SCENARIO";

/// Time for one round of a test, after which the test is treated as hanging. No test takes nearly
/// as long.
const DEADLINE: Duration = Duration::from_secs(120);

/// Returns how many times a repeatable test runs: the value of `CLUSTER_TEST_ROUNDS`, or 1 if the
/// variable is not set.
pub fn rounds() -> u32 {
    let wanted = std::env::var("CLUSTER_TEST_ROUNDS").ok();
    wanted.map_or(1, |wanted| wanted.parse().expect("a number"))
}

/// Returns `limit` multiplied by `CLUSTER_TEST_TIME_FACTOR`, which is 1 if the variable is not set.
///
/// A test's time limits are for a machine of usual speed. An emulator needs about ten times as long.
pub fn scaled(limit: Duration) -> Duration {
    let factor = std::env::var("CLUSTER_TEST_TIME_FACTOR").ok();
    limit * factor.map_or(1, |factor| factor.parse().expect("a number"))
}

/// Resets all signals except SIGPIPE to their default actions. This process may have been started
/// with ignored signals, for example by nohup(1) or in the background of a script, and the
/// processes that it starts would inherit them.
#[allow(unsafe_code)]
pub fn reset_ignored_signals() {
    let is_fixed = |signal: &Signal| {
        // Leave SIGPIPE ignored, as Rust's runtime has set it. `Command` resets it in every child.
        matches!(signal, Signal::SIGKILL | Signal::SIGSTOP | Signal::SIGPIPE)
    };
    for number in Signal::iterator().filter(|signal| !is_fixed(signal)) {
        // SAFETY: the default action runs no code in this process, which has no handlers yet.
        unsafe { signal(number, SigHandler::SigDfl) }.unwrap();
    }
}

pub struct Scenario {
    pub name: &'static str,
    pub play: fn(),
    /// Requirement that some machines do not meet. `None` if the scenario runs on every machine.
    pub need: Option<&'static Need>,
}

/// Builds the table of scenarios from function names. A function with a requirement is followed by
/// a colon and the requirement's name.
#[macro_export]
macro_rules! scenarios {
    ($($name:ident $(: $need:ident)?)*) => {
        pub const SCENARIOS: &[$crate::harness::Scenario] = &[
            $($crate::harness::Scenario {
                name: stringify!($name),
                play: $name,
                need: $crate::scenarios!(@need $($need)?),
            },)*
        ];
    };
    (@need) => { None };
    (@need $need:ident) => { Some(&$crate::harness::$need) };
}

/// Returns the test that runs a scenario.
pub fn trial(scenario: &'static Scenario) -> Trial {
    let test = Trial::test(scenario.name, || run(scenario.name));
    match scenario.need {
        Some(need) => need.of(test),
        None => test,
    }
}

fn run(name: &str) -> Result<(), Failed> {
    run_with(name, &[])
}

/// Runs a scenario with additional environment variables, and fails if its process fails.
pub fn run_with(name: &str, env: &[(&str, &str)]) -> Result<(), Failed> {
    let mut command = Command::new(std::env::current_exe()?);
    run_by(command.envs(env.iter().copied()), name)
}

/// Runs a scenario by a command that executes this program, and fails if its process fails.
pub fn run_by(command: &mut Command, name: &str) -> Result<(), Failed> {
    let group = Group::start(command.env(SCENARIO, name))?;
    let status = group.finish()?;
    status
        .success()
        .then_some(())
        .ok_or_else(|| status.to_string().into())
}

/// Runs a scenario as the master or as a worker, and returns only in the master.
///
/// The master runs until no work remains. Its process then asserts that no worker and no connection
/// in flight remain, and that the master has closed its descriptors.
pub fn cluster(master: impl FnOnce(&Master), worker: impl FnOnce(Worker)) {
    let before = open_fds();
    match cluster::init().expect("init") {
        Role::Master(role) => {
            master(&role);
            role.run().expect("run");
            assert!(role.workers().is_empty());
            assert_eq!(role.ledger().in_flight(), 0);
            drop(role);
            let after = open_fds();
            let left: Vec<_> = after.iter().filter(|fd| !before.contains(fd)).collect();
            // The signal socketpair stays open until the process exits, because a signal handler
            // may use it at any time.
            let pair = if SIGNALS.load(Ordering::SeqCst) { 2 } else { 0 };
            assert_eq!(left.len(), pair, "descriptors left open: {left:?}");
        }
        Role::Worker(role) => {
            worker(role);
            // Exit here, because the scenario's code after this call checks events that only the
            // master has recorded.
            std::process::exit(0);
        }
    }
}

/// Whether the master handles signals in this scenario, so that [`cluster`] expects the signal
/// socketpair to stay open. Scenarios set this flag themselves.
pub static SIGNALS: AtomicBool = AtomicBool::new(false);

/// Returns the sorted link targets of the open descriptors, except those of files in `/proc`.
pub fn open_fds() -> Vec<PathBuf> {
    let fds = std::fs::read_dir("/proc/self/fd").expect("/proc");
    let links = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    let mut links: Vec<_> = links.filter(|link| !link.starts_with("/proc")).collect();
    links.sort();
    links
}
