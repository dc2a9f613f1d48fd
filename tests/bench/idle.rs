//! Measures memory, wake-ups and system calls of an idle master and its workers.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::peers::{self, build};
use crate::server::Server;
use crate::size::Small;
use crate::table::{Goal, Table};
use crate::usage::{calls, cpu_time, family, mapped, switches};

const WORKERS: usize = 8;
const TIME: Duration = Duration::from_secs(2);

pub fn memory(table: &mut Table) {
    let builds = [
        ("http_server", http_server()),
        (
            "the same, static",
            Small::build().map(|small| small.http_server),
        ),
    ];
    for (name, built) in builds {
        let program = match built {
            Ok(program) => program,
            Err(why) => {
                table.skip(name, &why);
                continue;
            }
        };
        for workers in [1, WORKERS, 64] {
            let own = memory_of(&serve(&program, workers));
            let title = format!("{name}: master, {workers} idle workers, resident");
            let row = table.row(&title, own.master, "KiB");
            row.goal(Goal::AtMost(2048.0));
            row.note(&format!("{} KiB private", own.master_private));
            let title = format!("{name}: each of {workers} workers, private");
            let row = table.row(&title, own.private, "KiB");
            row.goal(Goal::AtMost(400.0));
            row.note(&format!("at most {} KiB resident", own.resident));
        }
    }
    match peers::node("rr", WORKERS) {
        Ok(server) => {
            let node = memory_of(&server);
            table.row("Node's master, resident", node.master, "KiB");
            table.row("Node's workers, private, each", node.private, "KiB");
        }
        Err(why) => table.skip("Node", &why),
    }
}

/// Builds the example `http_server`, and returns its path. The benchmark measures this example
/// instead of its own binary, which maps far more memory than a server.
fn http_server() -> Result<PathBuf, String> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    build(&manifest, target, &["--example", "http_server"])?;
    Ok(target.join("release/examples/http_server"))
}

fn serve(program: &Path, workers: usize) -> Server {
    let mut command = Command::new(program);
    command.args(["--policy", "rr", "--addr", "127.0.0.1:0"]);
    Server::run(command.args(["--workers", &workers.to_string()]))
}

/// The memory of a master and of its workers in KiB. The rest of the resident memory is shared with
/// the other processes, and is mostly the program's code.
struct Memory {
    master: f64,
    master_private: f64,
    /// The private memory of each worker.
    private: Vec<f64>,
    /// The largest resident memory of a worker.
    resident: f64,
}

fn memory_of(server: &Server) -> Memory {
    let processes = family(server.group.pid());
    let private = |process| mapped(process, "Private_Clean:") + mapped(process, "Private_Dirty:");
    let (master, workers) = (processes[0], &processes[1..]);
    let resident = workers.iter().map(|worker| mapped(*worker, "Rss:"));
    Memory {
        master: mapped(master, "Rss:"),
        master_private: private(master),
        private: workers.iter().map(|worker| private(*worker)).collect(),
        resident: resident.fold(0.0, f64::max),
    }
}

pub fn measure(table: &mut Table) {
    for policy in ["rr", "none", "sharded"] {
        let server = match Server::start(policy, WORKERS) {
            Ok(server) => server,
            Err(why) => {
                table.skip(policy, &why);
                continue;
            }
        };
        let processes = family(server.group.pid());
        let before = (switches(&processes), cpu_time(&processes));
        std::thread::sleep(TIME);
        let after = (switches(&processes), cpu_time(&processes));
        let row = table.row(
            &format!("{policy}: wake-ups"),
            (after.0 - before.0) as f64,
            "in 2 s",
        );
        row.goal(Goal::AtMost(0.0))
            .note(&format!("{:?} of CPU", after.1 - before.1));
        let name = format!("{policy}: system calls");
        match calls(&processes, || std::thread::sleep(TIME)) {
            Ok(calls) => {
                let count: u64 = calls.values().sum();
                let row = table
                    .row(&name, count as f64, "in 2 s")
                    .goal(Goal::AtMost(0.0));
                if count > 0 {
                    row.note(&format!("{calls:?}"));
                }
            }
            Err(why) => table.skip(&name, &why),
        }
    }
}
