//! Tests the command line of every example.

use std::fs::read_dir;
use std::path::{Path, PathBuf};

use libtest_mimic::{Failed, Trial};

use crate::harness::example;

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples");

pub fn trials() -> Vec<Trial> {
    let answer_help = Trial::test("examples_answer_help", || help(&names()));
    let refuse_unknown = Trial::test("examples_refuse_unknown_options", || unknown(&names()));
    // There may be no sources if the tests run on another machine than the compiler.
    let trials = [answer_help, refuse_unknown].into_iter();
    let trials = trials.map(|trial| trial.with_kind("needs the sources"));
    trials
        .map(|trial| trial.with_ignored_flag(!Path::new(EXAMPLES).is_dir()))
        .collect()
}

/// Returns the names of all examples: files, and directories with a `main.rs`.
fn names() -> Vec<String> {
    let paths = read_dir(EXAMPLES)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let is_source = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "rs");
    let is_example = |path: &PathBuf| is_source(path) || path.join("main.rs").is_file();
    let stem = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
    paths.filter(is_example).map(stem).collect()
}

fn help(names: &[String]) -> Result<(), Failed> {
    assert!(!names.is_empty(), "no example in {EXAMPLES}");
    for name in names {
        for option in ["--help", "-h"] {
            let output = example(name).arg(option).output()?;
            let text = String::from_utf8_lossy(&output.stdout);
            assert_eq!(output.status.code(), Some(0), "{name} {option}");
            assert!(
                text.contains("Usage: ") && text.contains(name),
                "{name} {option}: {text}"
            );
            assert!(output.stderr.is_empty(), "{name} {option}");
        }
    }
    Ok(())
}

fn unknown(names: &[String]) -> Result<(), Failed> {
    for name in names {
        let output = example(name).arg("--nonsense").output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{name}: {text}");
        assert!(
            text.contains("--nonsense") && text.contains("Usage: "),
            "{name}: {text}"
        );
        assert!(output.stdout.is_empty(), "{name}");
    }
    Ok(())
}
