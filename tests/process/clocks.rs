//! Plays scenarios on machines with unusual clocks, which time_namespaces(7) imitate.

use std::process::Command;

use libtest_mimic::Trial;

use crate::harness::{Scenario, TIME_NAMESPACE, run_by};

/// Scenarios with timers of the application, with time limits that the master keeps, and with one
/// that a worker keeps while it waits in accept(2).
const SCENARIO_NAMES: [&str; 4] = [
    "timers_fire_in_order_and_can_be_cleared",
    "silent_client_is_closed_after_the_idle_timeout",
    "worker_closes_silent_clients_after_the_idle_timeout",
    "workers_are_killed_at_the_deadline_of_the_master",
];

/// The seconds by which CLOCK_MONOTONIC and CLOCK_BOOTTIME are ahead.
const CLOCKS: [(&str, [&str; 2]); 2] = [
    // More seconds than a signed number with 32 bits can represent.
    ("after_a_century", ["4000000000", "4000000000"]),
    // Only CLOCK_BOOTTIME also runs while the machine is suspended.
    ("after_a_suspend_of_years", ["0", "100000000"]),
];

pub fn trials(scenarios: &[&'static Scenario]) -> Vec<Trial> {
    let play = |scenario: &'static str, (name, offsets): (&str, [&'static str; 2])| {
        let known = scenarios.iter().any(|known| known.name == scenario);
        assert!(known, "no scenario {scenario}");
        let play = move || {
            let [monotonic, boottime] = offsets;
            let mut command = Command::new("unshare");
            command
                .args(["--time", "--monotonic", monotonic, "--boottime", boottime])
                .arg(std::env::current_exe()?);
            run_by(&mut command, scenario)
        };
        TIME_NAMESPACE.of(Trial::test(format!("{scenario}_{name}"), play))
    };
    let each = |scenario| CLOCKS.map(|clock| play(scenario, clock));
    SCENARIO_NAMES.into_iter().flat_map(each).collect()
}
