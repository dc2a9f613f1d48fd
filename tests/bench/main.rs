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
mod server;
mod table;
mod thousand;
mod usage;
mod workers;

use std::process::ExitCode;

use harness::SCENARIO;
use table::Table;

/// How often everything is measured, after a first time that does not count.
const ROUNDS: usize = 7;

type Part = fn(&mut Table);
const PARTS: [(&str, Part); 10] = [
    ("connections", connections::measure),
    ("workers", workers::measure),
    ("fairness", fairness::measure),
    ("mixed", mixed::measure),
    ("messages", messages::measure),
    ("fork", fork::measure),
    ("thousand", thousand::measure),
    ("memory", idle::memory),
    ("idle", idle::measure),
    ("calls", calls::measure),
];

fn main() -> ExitCode {
    if let Ok(role) = std::env::var(SCENARIO) {
        match role.as_str() {
            server::SERVER => server::serve(),
            messages::MESSAGES => messages::count(),
            fork::FORK => fork::fork(),
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
    nix::sys::prctl::set_child_subreaper(true).expect("subreaper");
    let mut table = Table::default();
    for (name, measure) in PARTS {
        if asked.is_empty() || asked.iter().any(|asked| asked == name) {
            table.begin(name);
            measure(&mut table);
        }
    }
    table.end();
    ExitCode::SUCCESS
}
