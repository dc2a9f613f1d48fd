//! How large a program is that is to be small.

use std::path::Path;
use std::process::Command;

use crate::table::{Goal, Table};

pub fn measure(table: &mut Table) {
    let name = "http_server, static musl, x86-64";
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/checks/static");
    if !script.exists() {
        return table.skip(name, "no tests/checks/static");
    }
    let output = Command::new(script)
        .args(["x86_64", "size"])
        .output()
        .unwrap();
    let (text, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    let skipped = errors.lines().find_map(|line| line.split_once("skipped: "));
    if let Some((_, why)) = skipped {
        return table.skip(name, why);
    }
    println!("{text}{errors}");
    let _ = Goal::AtMost(400.0);
}
