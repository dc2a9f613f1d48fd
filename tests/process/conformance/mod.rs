//! The scenarios of Node's own test suite, retold with real processes. Each is named after its
//! file there, and `tests/CONFORMANCE.md` says what became of every one.

mod callbacks;
mod calls;
mod datagrams;
mod descriptors;
mod events;
mod further;
mod further_leaving;
mod handles;
mod leaving;
mod listening;
mod messages;
mod receipts;
mod references;
mod settings;
mod spawning;
mod unix_paths;

use std::collections::BTreeSet;

use crate::harness::Scenario;

/// All of them.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    let scenarios = [
        callbacks::SCENARIOS,
        calls::SCENARIOS,
        datagrams::SCENARIOS,
        descriptors::SCENARIOS,
        events::SCENARIOS,
        further::SCENARIOS,
        further_leaving::SCENARIOS,
        handles::SCENARIOS,
        leaving::SCENARIOS,
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

/// Each scenario has a row in the list, and each row a scenario of its name.
pub fn list_and_tests_agree() -> Result<(), libtest_mimic::Failed> {
    let rows = LIST.lines().filter_map(|line| line.strip_prefix("| "));
    let rows = rows.map(|row| row.split(" | ").collect::<Vec<_>>());
    let rows: Vec<_> = rows.filter(|row| row[0] != "Node's file").collect();
    let mut listed = BTreeSet::new();
    for row in &rows {
        let [file, test, result, reason] = row[..] else {
            return Err(format!("a row of another form: {row:?}").into());
        };
        let test = test.trim_matches('`');
        assert_eq!(test, test_name(file), "the name for {file}");
        let has_reason = reason.trim_matches([' ', '|']).len() > 10;
        let expected = match result {
            "all" => false,
            "part" | "ours" => true,
            _ => return Err(format!("{file}: unknown result {result:?}").into()),
        };
        assert_eq!(has_reason, expected, "a reason for {file}");
        assert!(listed.insert(test), "{test} is listed twice");
    }
    let tests: BTreeSet<_> = scenarios().map(|scenario| scenario.name).collect();
    let untested: Vec<_> = listed.difference(&tests).collect();
    assert!(untested.is_empty(), "without a test: {untested:?}");
    assert_eq!(rows.len(), 75);
    Ok(())
}

/// The name of the test for one of Node's files.
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
