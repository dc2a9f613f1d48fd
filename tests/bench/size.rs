//! Measures the size of static programs that are built for size.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::table::{Goal, Table, number};

/// Two programs that were built for size: `http_server`, and a program that prints hello.
pub struct Small {
    pub http_server: PathBuf,
    /// The sizes with the standard library that comes with the compiler.
    stable: Sizes,
    /// The sizes with a standard library that is built from source, with unstable options.
    smallest: Sizes,
}

/// The sizes of two programs in bytes.
struct Sizes {
    http_server: f64,
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
        let size = |program: &str, how: &str| -> Option<f64> {
            let prefix = format!("static: {program} for x86_64{how}: ");
            let line = text.lines().find_map(|line| line.strip_prefix(&prefix))?;
            line.split_once(" bytes")?.0.parse().ok()
        };
        let sizes = |how: &str| {
            Some(Sizes {
                http_server: size("http_server", how)?,
                hello: size("hello", how)?,
            })
        };
        let (Some(stable), Some(smallest)) = (sizes(", stable"), sizes("")) else {
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
            stable,
            smallest,
        })
    }
}

pub fn measure(table: &mut Table) {
    let name = "http_server, static musl, x86-64";
    let small = match Small::build() {
        Ok(small) => small,
        Err(why) => return table.skip(name, &why),
    };
    let builds = [
        ("stable compiler", &small.stable, 640.0),
        ("unstable options", &small.smallest, 330.0),
    ];
    for (how, sizes, goal) in builds {
        let row = table.row(&format!("{name}, {how}"), sizes.http_server / 1024.0, "KiB");
        row.goal(Goal::AtMost(goal)).note(&format!(
            "a program that prints hello: {} KiB",
            number(sizes.hello / 1024.0)
        ));
    }
}
