//! Checks the texts that the binary prints. Because this test needs the binary, `cargo test` builds
//! it. The repository's tests in `tests/process/serve*.rs` run it as a server.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

fn run(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cluster-serve"));
    command.args(args).output().unwrap()
}

#[test]
fn help_fits_on_60_lines() {
    let help = run(&["--help"]);
    assert!(help.status.success());
    let text = String::from_utf8(help.stdout).unwrap();
    assert!(text.starts_with("Usage: cluster-serve "), "{text}");
    assert!(text.lines().count() <= 60, "{} lines", text.lines().count());
    assert!(text.lines().all(|line| line.len() <= 105), "{text}");
}

#[test]
fn version_is_that_of_the_package() {
    let version = run(&["--version"]);
    assert!(version.status.success());
    let expected = format!("cluster-serve {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(String::from_utf8(version.stdout).unwrap(), expected);
}
