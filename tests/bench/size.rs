//! How large a program is that is to be small.

use std::path::Path;
use std::process::Command;

use crate::table::{Goal, Table, number};

pub fn measure(table: &mut Table) {
    let name = "http_server, static musl, x86-64";
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/checks/static");
    let Ok(output) = Command::new(script).args(["x86_64", "size"]).output() else {
        return table.skip(name, "no tests/checks/static");
    };
    let (text, errors) = (output.stdout, output.stderr);
    let (text, errors) = (
        String::from_utf8_lossy(&text),
        String::from_utf8_lossy(&errors),
    );
    let size = |program: &str| -> Option<f64> {
        let prefix = format!("static: {program} for x86_64: ");
        let line = text.lines().find_map(|line| line.strip_prefix(&prefix))?;
        Some(line.split_once(" bytes")?.0.parse::<f64>().ok()? / 1024.0)
    };
    match (size("http_server"), size("hello")) {
        (Some(own), Some(hello)) => {
            let row = table.row(name, own, "KiB").goal(Goal::AtMost(400.0));
            row.note(&format!("a program that says hello: {} KiB", number(hello)));
        }
        _ => {
            let why = errors.lines().last().unwrap_or("it says no size");
            table.skip(name, why.trim_start_matches("static: skipped: "));
        }
    }
}
