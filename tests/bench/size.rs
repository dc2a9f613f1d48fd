//! Measures the size of static programs that are built for size.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::table::{Goal, Table, number};

/// Two programs that were built for size: `http_server`, and a program that prints hello.
pub struct Small {
    pub http_server: PathBuf,
    /// Size of `http_server` in bytes.
    size: f64,
    /// Size of the program that prints hello, in bytes.
    hello: f64,
}

impl Small {
    pub fn build() -> Result<Self, String> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let output = Command::new(root.join("tests/checks/static"))
            .args(["x86_64", "size"])
            .output()
            .map_err(|_| "no tests/checks/static".to_owned())?;
        let text = String::from_utf8_lossy(&output.stdout);
        let size = |program: &str| -> Option<f64> {
            let prefix = format!("static: {program} for x86_64: ");
            let line = text.lines().find_map(|line| line.strip_prefix(&prefix))?;
            line.split_once(" bytes")?.0.parse().ok()
        };
        let (Some(size), Some(hello)) = (size("http_server"), size("hello")) else {
            let errors = String::from_utf8_lossy(&output.stderr);
            let why = errors
                .lines()
                .last()
                .unwrap_or("the script printed no size");
            return Err(why.trim_start_matches("static: skipped: ").to_owned());
        };
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
        let built = "x86_64-unknown-linux-musl/small/examples/http_server";
        Ok(Self {
            http_server: target.join(built),
            size,
            hello,
        })
    }
}

pub fn measure(table: &mut Table) {
    let name = "http_server, static musl, x86-64";
    match Small::build() {
        Ok(Small { size, hello, .. }) => {
            let row = table.row(name, size / 1024.0, "KiB");
            row.goal(Goal::AtMost(400.0)).note(&format!(
                "a program that prints hello: {} KiB",
                number(hello / 1024.0)
            ));
        }
        Err(why) => table.skip(name, &why),
    }
}
