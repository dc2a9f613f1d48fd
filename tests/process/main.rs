//! Tests that run real master and worker processes.
//!
//! The target sets `harness = false`, because libtest runs each test on a thread. A worker executes
//! this binary again, and must run its scenario in `main`.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    missing_docs,
    unreachable_pub
)]

mod accept_errors;
mod adopted;
mod blocking;
mod callbacks;
mod clients;
mod clocks;
mod conformance;
mod counting;
mod deadlines;
mod deploying;
mod detached;
mod disconnecting;
mod edges;
mod examples;
mod exhaustion;
mod finish;
mod fleet;
mod forked;
mod giving_up;
mod groups;
mod guide;
mod hand_off;
mod hand_off_parked;
mod harness;
mod host;
mod hostile;
mod hostile_parked;
mod inherited;
mod inherited_sockets;
mod last_check;
mod leave;
mod life;
mod listen;
mod listener_owners;
mod loads;
mod logs;
mod lowered_limit;
mod messages;
mod nested;
mod notify;
mod old_kernels;
mod operator;
mod orphans;
mod own_user;
mod parked;
mod parked_in_worker;
mod passed;
mod passing;
mod pool;
/// The pool's source, compiled a second time to check that it uses only the crate's public API.
#[allow(dead_code, unused_imports)]
#[path = "../../src/pool/mod.rs"]
mod pool_elsewhere;
mod pool_limits;
mod privileges;
mod program_path;
mod public_api;
mod refused;
mod retained;
mod round_robin;
mod running;
mod scheduler;
mod serve;
mod serve_listeners;
mod serve_operation;
mod serve_options;
mod serve_surroundings;
mod sharded;
mod stalled;
mod status;
mod std_listener;
mod sticky;
mod systemd;
mod threads;
mod usage;
mod users;
mod watchdog;
mod without_exec;

/// Stands in for `cluster::worker_id`, which is private, in the pool's unit tests. Their modules
/// are part of `pool_elsewhere` and therefore compile here, but this target has no harness that
/// would run them.
#[allow(dead_code)]
fn worker_id(_: u32) -> cluster::WorkerId {
    unreachable!("the unit tests of the pool run in the crate")
}

use std::collections::BTreeSet;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    let scenarios = [
        life::SCENARIOS,
        listen::SCENARIOS,
        stalled::SCENARIOS,
        messages::SCENARIOS,
        leave::SCENARIOS,
        hostile_parked::SCENARIOS,
        exhaustion::SCENARIOS,
        lowered_limit::SCENARIOS,
        accept_errors::SCENARIOS,
        finish::SCENARIOS,
        old_kernels::SCENARIOS,
        running::SCENARIOS,
        edges::SCENARIOS,
        hand_off::SCENARIOS,
        hand_off_parked::SCENARIOS,
        deadlines::SCENARIOS,
        detached::SCENARIOS,
        disconnecting::SCENARIOS,
        nested::SCENARIOS,
        orphans::SCENARIOS,
        adopted::SCENARIOS,
        groups::SCENARIOS,
        inherited::SCENARIOS,
        privileges::SCENARIOS,
        program_path::SCENARIOS,
        own_user::SCENARIOS,
        sharded::SCENARIOS,
        listener_owners::SCENARIOS,
        blocking::SCENARIOS,
        loads::SCENARIOS,
        logs::SCENARIOS,
        scheduler::SCENARIOS,
        systemd::SCENARIOS,
        threads::SCENARIOS,
        std_listener::SCENARIOS,
        pool_limits::SCENARIOS,
        status::SCENARIOS,
        operator::SCENARIOS,
        notify::SCENARIOS,
        giving_up::SCENARIOS,
        inherited_sockets::SCENARIOS,
        parked::SCENARIOS,
        users::SCENARIOS,
        last_check::SCENARIOS,
        passed::SCENARIOS,
        public_api::SCENARIOS,
    ];
    let folders = [
        callbacks::SCENARIOS,
        forked::SCENARIOS,
        host::SCENARIOS,
        hostile::SCENARIOS,
        parked_in_worker::SCENARIOS,
        passing::SCENARIOS,
        pool::SCENARIOS,
        retained::SCENARIOS,
        round_robin::SCENARIOS,
        without_exec::SCENARIOS,
    ];
    let scenarios = scenarios.into_iter().chain(folders.concat()).flatten();
    let scenarios: Vec<_> = scenarios.chain(conformance::scenarios()).collect();
    if let Ok(name) = std::env::var(harness::SCENARIO) {
        old_kernels::become_old();
        let mut known = scenarios
            .iter()
            .copied()
            .chain(serve::PROGRAMS)
            .chain(groups::PROGRAMS);
        let scenario = known.find(|scenario| scenario.name == name);
        (scenario.expect("a known scenario").play)();
        return ExitCode::SUCCESS;
    }
    harness::reset_ignored_signals();
    // Adopt the tests' orphans, so that this process can report them. Some emulators do not support
    // the request; orphans then remain unnoticed.
    let subreaper = nix::sys::prctl::set_child_subreaper(true);
    assert!(matches!(subreaper, Ok(()) | Err(nix::Error::EINVAL)));
    let mut trials: Vec<_> = scenarios.iter().map(|s| harness::trial(s)).collect();
    trials.extend(old_kernels::trials(&scenarios));
    trials.extend(clocks::trials(&scenarios));
    trials.extend(examples::trials());
    trials.extend(clients::trials());
    trials.extend(usage::trials());
    trials.extend(watchdog::trials());
    trials.extend(serve::trials());
    trials.extend(serve_options::trials());
    trials.extend(serve_operation::trials());
    trials.extend(serve_listeners::trials());
    trials.extend(serve_surroundings::trials());
    trials.extend(groups::trials());
    trials.extend(inherited::trials());
    trials.extend(fleet::trials());
    trials.extend(sticky::trials());
    trials.extend(logs::trials());
    trials.extend(giving_up::trials());
    trials.extend(deploying::trials());
    trials.extend(guide::trials());
    trials.push(Trial::test(
        "conformance_list_and_tests_agree",
        conformance::list_and_tests_agree,
    ));
    // A name selects a trial on the command line, and a scenario in the environment of a worker.
    let programs = serve::PROGRAMS.iter().chain(groups::PROGRAMS);
    let programs = programs.map(|program| program.name);
    let mut names = BTreeSet::new();
    for name in trials.iter().map(Trial::name).chain(programs) {
        assert!(names.insert(name), "the name {name} is not unique");
    }
    let names = names.into_iter().map(str::to_owned).collect();
    trials.push(guide::names_trial(names));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
