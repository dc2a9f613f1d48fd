//! What everything costs, beside what else there is. All figures of a line come from one run on one
//! machine.
//!
//! ```sh
//! cargo bench                 # all parts, within 15 minutes
//! cargo bench -- NAME…        # only these
//! ```
//!
//! It prints one table, and writes the same to `bench.json` in cargo's target directory. A peer or a
//! tool that is not there is a line that says so.
//!
//! Every variant is a group of processes of its own: this binary, executed again, plays the master
//! and its workers, the bare loop, and whatever else is to be compared with. They live through all
//! rounds, in which they take turns (A B C A B C …), and those whose turn it is not are blocked.
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
#[allow(dead_code)]
#[path = "../process/harness.rs"]
mod harness;
mod idle;
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
use nix::sys::prctl::{set_child_subreaper, set_pdeathsig};
use nix::sys::signal::Signal;
use table::Table;

/// How often everything is measured, after a first time that does not count.
const ROUNDS: usize = 7;

type Part = fn(&mut Table);
const PARTS: [(&str, Part); 12] = [
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
];

fn main() -> ExitCode {
    if let Ok(role) = std::env::var(SCENARIO) {
        // Whoever is to be stopped stops all that has been started.
        set_pdeathsig(Signal::SIGKILL).unwrap();
        match role.as_str() {
            peers::PEER => peers::become_other(),
            server::SERVER => server::serve(),
            messages::MESSAGES => messages::count(),
            fork::FORK => fork::fork(),
            scaling::SCALING => scaling::turn(),
            fork::BYTE => print!("!"),
            _ => panic!("{role}"),
        }
        return ExitCode::SUCCESS;
    }
    let asked: Vec<_> = std::env::args()
        .skip(1)
        .filter(|arg| arg != "--bench")
        .collect();
    let unknown = |name: &&String| !PARTS.iter().any(|part| part.0 == *name);
    if let Some(name) = asked.iter().find(unknown) {
        let names = PARTS.map(|part| part.0).join(" ");
        eprintln!("there is no part {name}; there are: {names}");
        return ExitCode::from(2);
    }
    // What its processes leave behind comes to this one.
    set_child_subreaper(true).unwrap();
    let mut table = Table::default();
    let mut code = ExitCode::SUCCESS;
    for (name, measure) in PARTS {
        if asked.is_empty() || asked.iter().any(|asked| asked == name) {
            table.begin(name);
            // The others are measured all the same.
            if catch_unwind(AssertUnwindSafe(|| measure(&mut table))).is_err() {
                table.skip("the rest", "it failed, as is said above");
                code = ExitCode::FAILURE;
            }
        }
    }
    note_circumstances(&mut table);
    table.end();
    code
}

fn note_circumstances(table: &mut Table) {
    let cores = cluster::available_parallelism();
    let system = nix::sys::utsname::uname().unwrap();
    let (name, release) = (
        system.sysname().to_string_lossy(),
        system.release().to_string_lossy(),
    );
    let load = if load::has_wrk() {
        "wrk"
    } else {
        "clients of our own (no wrk)"
    };
    table.note(&format!(
        "{cores} cores, {name} {release}; {ROUNDS} rounds: median (least–most)."
    ));
    table.note(&format!(
        "Load by {load}, with a thread for each of the same cores. Times are user and"
    ));
    table
        .note("system time of the server's processes alone, and the clients' beside. A sleep is a");
    table.note("voluntary context switch of one of the server's processes.");
}
