//! Plays the scenarios of Node's own test suite with real processes. Each of these tests is named
//! after Node's file, and `tests/CONFORMANCE.md` lists its result. The modules also contain tests
//! of this crate's own, for related behaviour.

mod callbacks;
mod calls;
mod datagrams;
mod descriptors;
mod disconnecting;
mod events;
mod failures;
mod further;
mod further_disconnecting;
mod handles;
mod killing;
mod listening;
mod messages;
mod receipts;
mod references;
mod settings;
mod spawning;
mod unix_paths;

use std::collections::BTreeSet;

use crate::harness::Scenario;

/// Returns the scenarios of all modules.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    let scenarios = [
        callbacks::SCENARIOS,
        calls::SCENARIOS,
        datagrams::SCENARIOS,
        descriptors::SCENARIOS,
        disconnecting::SCENARIOS,
        events::SCENARIOS,
        failures::SCENARIOS,
        further::SCENARIOS,
        further_disconnecting::SCENARIOS,
        handles::SCENARIOS,
        killing::SCENARIOS,
        listening::SCENARIOS,
        messages::SCENARIOS,
        receipts::SCENARIOS,
        references::SCENARIOS,
        settings::SCENARIOS,
        spawning::SCENARIOS,
        unix_paths::SCENARIOS,
    ];
    scenarios.into_iter().flatten()
}

const LIST: &str = include_str!("../../CONFORMANCE.md");

/// Checks that each row in the list is well-formed and names a test, and that the list has 75 rows.
pub fn list_and_tests_agree() -> Result<(), libtest_mimic::Failed> {
    let rows = LIST.lines().filter_map(|line| line.strip_prefix("| "));
    let rows = rows.map(|row| row.split(" | ").collect::<Vec<_>>());
    let rows: Vec<_> = rows.filter(|row| row[0] != "Node's file").collect();
    let mut listed = BTreeSet::new();
    for row in &rows {
        let [file, test, result, reason] = row[..] else {
            return Err(format!("malformed row: {row:?}").into());
        };
        let test = test.trim_matches('`');
        assert_eq!(test, test_name(file), "test name for {file}");
        let has_reason = reason.trim_matches([' ', '|']).len() > 10;
        let expected = match result {
            "all" => false,
            "part" | "ours" => true,
            _ => return Err(format!("{file}: unknown result {result:?}").into()),
        };
        assert_eq!(has_reason, expected, "whether {file} has a reason");
        assert!(listed.insert(test), "{test} is listed twice");
    }
    let tests: BTreeSet<_> = scenarios().map(|scenario| scenario.name).collect();
    let untested: Vec<_> = listed.difference(&tests).collect();
    assert!(untested.is_empty(), "listed without a test: {untested:?}");
    assert_eq!(rows.len(), 75);
    Ok(())
}

/// Returns the name of the test for one of Node's files: without prefix, and in snake case.
fn test_name(file: &str) -> String {
    let plain = match file.strip_prefix("test-") {
        Some(rest) => rest.strip_prefix("cluster-").unwrap_or(rest),
        None => file,
    };
    let mut name = String::new();
    let mut previous = '-';
    for letter in plain.chars() {
        if letter.is_ascii_uppercase() && previous.is_ascii_lowercase() {
            name.push('_');
        }
        name.push(if letter == '-' {
            '_'
        } else {
            letter.to_ascii_lowercase()
        });
        previous = letter;
    }
    name
}
