//! Tests of workers that run `Settings::main` in a copy of the master and execute no program.

mod descriptors;
mod exits;
mod isolation;
mod serving;
mod settings;
mod threads;

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use cluster::{Master, Settings, Worker};

use crate::harness::{Scenario, cluster};

/// The scenarios of all modules.
pub const SCENARIOS: &[&[Scenario]] = &[
    descriptors::SCENARIOS,
    exits::SCENARIOS,
    isolation::SCENARIOS,
    serving::SCENARIOS,
    settings::SCENARIOS,
    threads::SCENARIOS,
];

/// Makes workers run `main` in a copy of the master, and then exit with status 0.
fn set_main(master: &Master, main: impl Fn(Worker) + 'static) {
    let main = move |worker| {
        main(worker);
        0
    };
    master.setup_master(Settings::default().main(main));
}

/// Runs a scenario whose workers execute no program.
fn cluster_without_exec(master: impl FnOnce(&Master)) {
    cluster(master, |_| unreachable!("the workers execute no program"));
}

/// Returns this process's open descriptors with their link targets.
fn open_descriptors() -> BTreeMap<RawFd, PathBuf> {
    let numbers = std::fs::read_dir("/proc/self/fd").unwrap();
    let numbers = numbers.map(|entry| entry.unwrap().file_name());
    let numbers: Vec<_> = numbers.collect();
    let open = numbers.into_iter().filter_map(|number| {
        let link = std::fs::read_link(Path::new("/proc/self/fd").join(&number)).ok()?;
        Some((number.to_str().unwrap().parse().unwrap(), link))
    });
    open.collect()
}
