//! Measures the crate's costs and compares them with other servers. All figures of a row come from
//! one run on one machine.
//!
//! ```sh
//! cargo bench                     # all benchmarks, tens of minutes
//! cargo bench -- NAME…            # only the named benchmarks
//! cargo bench -- keep_alive       # all benchmarks of a group
//! cargo bench -- keep_alive/cost
//! CLUSTER_BENCH_PERCENT=10 cargo bench -- mixed keep_alive   # a short run; only for these parts
//! ```
//!
//! Prints one table, and writes the same figures to `bench.json` in cargo's target directory. If
//! another server or a tool is missing, its row says so.
//!
//! Every variant runs in its own group of processes. To start a group, this binary executes itself
//! in another role, for example as the master and its workers, as the bare loop, or as a process
//! that executes another program. Variants that are compared with each other are measured in turn
//! (A B C A B C …). A group that is not being measured has nothing to do, and its processes block.
#![allow(
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    missing_docs,
    unreachable_pub
)]

mod calls;
mod connections;
mod costs;
mod fairness;
mod fork;
#[allow(dead_code, unused_imports)]
#[path = "../process/harness/mod.rs"]
mod harness;
mod idle;
mod keep_alive;
mod load;
mod messages;
mod mixed;
mod peers;
mod scaling;
mod server;
mod size;
mod table;
mod thousand;
mod usage;
mod workers;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use harness::SCENARIO;
use keep_alive::server::{BARE_KEEP_ALIVE, POOL, bare_keep_alive, pool};
use nix::sys::prctl::{set_child_subreaper, set_pdeathsig};
use nix::sys::signal::Signal;
use table::Table;

/// Number of measured rounds. In most benchmarks, one round of warm-up precedes them.
const ROUNDS: usize = 7;

type Part = fn(&mut Table);
const PARTS: [(&str, Part); 21] = [
    ("connections", connections::measure),
    ("workers", workers::measure),
    ("fairness", fairness::measure),
    ("mixed", mixed::measure),
    ("messages", messages::measure),
    ("fork", fork::measure),
    ("thousand", thousand::measure),
    ("scaling", scaling::measure),
    ("memory", idle::memory),
    ("idle", idle::measure),
    ("calls", calls::measure),
    ("size", size::measure),
    ("keep_alive/cost", keep_alive::cost),
    ("keep_alive/watch", keep_alive::watch),
    ("keep_alive/idle", keep_alive::measure_parked),
    ("keep_alive/latency", keep_alive::latency),
    ("keep_alive/rivals", keep_alive::rivals),
    ("keep_alive/reloads", keep_alive::reloads),
    ("keep_alive/upgrades", keep_alive::upgrades),
    ("keep_alive/threads", keep_alive::threads),
    ("keep_alive/kills", keep_alive::kills),
];

fn main() -> ExitCode {
    if let Ok(role) = std::env::var(SCENARIO) {
        if role == POOL {
            pool().unwrap();
            return ExitCode::SUCCESS;
        }
        // Make the kernel kill this process when its parent, the benchmark, is killed.
        set_pdeathsig(Signal::SIGKILL).unwrap();
        match role.as_str() {
            peers::PEER => peers::exec_peer(),
            server::SERVER => server::serve(),
            messages::MESSAGES => messages::count(),
            BARE_KEEP_ALIVE => bare_keep_alive(),
            fork::FORK => fork::fork(),
            scaling::SCALING => scaling::run_loop(),
            fork::BYTE => print!("!"),
            _ => panic!("{role}"),
        }
        return ExitCode::SUCCESS;
    }
    let selected: Vec<_> = std::env::args()
        .skip(1)
        .filter(|arg| arg != "--bench")
        .collect();
    let unknown = |name: &&String| !PARTS.iter().any(|part| is_in(part.0, name));
    if let Some(name) = selected.iter().find(unknown) {
        let names = PARTS.map(|part| part.0).join(" ");
        eprintln!("unknown part {name}; known parts: {names}");
        return ExitCode::from(2);
    }
    // A pool whose SIGHUP is ignored would not reload.
    harness::reset_ignored_signals();
    // Make orphans of the measured processes children of this process, so that `server::end` can
    // wait for them.
    set_child_subreaper(true).unwrap();
    let mut table = Table::default();
    let mut code = ExitCode::SUCCESS;
    for (name, measure) in PARTS {
        if selected.is_empty() || selected.iter().any(|selected| is_in(name, selected)) {
            table.begin(name);
            // Continue with the other benchmarks if one fails.
            if catch_unwind(AssertUnwindSafe(|| measure(&mut table))).is_err() {
                table.skip("the rest", "this part failed, see the message above");
                code = ExitCode::FAILURE;
            }
        }
    }
    note_environment(&mut table);
    table.end();
    code
}

/// Returns a percentage of `usual`, at least 1. The environment variable `CLUSTER_BENCH_PERCENT`
/// sets the percentage for short runs. The default is 100.
fn share(usual: usize) -> usize {
    let percent = std::env::var("CLUSTER_BENCH_PERCENT");
    let percent = percent.map_or(100, |percent| percent.parse().expect("a number"));
    (usual * percent / 100).max(1)
}

/// Returns whether `name` selects a part: the name of the part, or the name of its group.
fn is_in(part: &str, name: &str) -> bool {
    let rest = part.strip_prefix(name);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn note_environment(table: &mut Table) {
    let cores = cluster::available_parallelism();
    let system = nix::sys::utsname::uname().unwrap();
    let (name, release) = (
        system.sysname().to_string_lossy(),
        system.release().to_string_lossy(),
    );
    let load = if load::has_wrk() {
        "wrk"
    } else {
        "built-in clients (no wrk)"
    };
    table.note(&format!(
        "{cores} cores, {name} {release}; {ROUNDS} rounds: median (min–max)."
    ));
    table.note(&format!(
        "Load by {load}, with one thread per core. Times are the user and system time of the"
    ));
    table
        .note("server's processes; the clients' time is listed separately. A sleep is a voluntary");
    table.note("context switch of a server process.");
}
