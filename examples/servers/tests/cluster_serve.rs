//! Runs `tiny_http`, in the example `activated`, behind the tool `cluster-serve`. Reloads it ten
//! times under load, kills five of its processes, and prints the failures of the clients by kind.
//!
//! `cargo build -p cluster-serve` builds the tool.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[allow(dead_code, reason = "this test has HTTP clients only")]
mod clients;

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use clients::{CLIENTS, Counts, Load};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// How long the tool may take for one step.
const DEADLINE: Duration = Duration::from_secs(30);
const RELOADS: u32 = 10;
const KILLS: u32 = 5;
const WORKERS: u32 = 2;
/// The answers between two reloads, or two kills.
const ANSWERS: u64 = 50;

/// The tool, in a process group of its own, which the drop kills.
struct Tool {
    process: Child,
    log: Receiver<String>,
}

impl Tool {
    fn start() -> Self {
        let own = std::env::current_exe().unwrap();
        let built = own.ancestors().nth(2).unwrap();
        let tool = built.join("cluster-serve");
        assert!(tool.exists(), "run `cargo build -p cluster-serve` first");
        // Undo that `nohup`, for instance, ignores HUP.
        let mut process = Command::new("env")
            .arg("--default-signal=HUP")
            .arg(tool)
            .args(["--listen", "127.0.0.1:0", "--readiness", "100ms"])
            .args(["--workers", &WORKERS.to_string(), "--"])
            .arg(built.join("examples/activated"))
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let (sender, log) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self { process, log }
    }

    /// Reads the log until a line contains `text`, and returns the rest of the line.
    fn wait_for(&self, text: &str) -> String {
        loop {
            let line = self.log.recv_timeout(DEADLINE);
            let line = line.unwrap_or_else(|error| panic!("{text:?}: {error}"));
            if let Some((_, rest)) = line.split_once(text) {
                return rest.to_owned();
            }
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    /// Kills the oldest process, and waits until its replacement is ready.
    fn kill_worker(&self) {
        let own = self.pid().as_raw_pid();
        let children = std::fs::read_to_string(format!("/proc/{own}/task/{own}/children"));
        let children = children.unwrap();
        let oldest = children.split_whitespace().next().unwrap();
        let oldest = Pid::from_raw(oldest.parse().unwrap()).unwrap();
        kill_process(oldest, Signal::KILL).unwrap();
        self.wait_for(" is ready");
    }

    /// Lets `once` disturb the tool `times` times under load. `once` receives the number of the
    /// disturbance, from 1 on.
    fn disturb(&self, address: SocketAddr, times: u32, once: impl Fn(&Self, u32)) -> Counts {
        let load = Load::begin(address, clients::http);
        for number in 1..=times {
            load.wait_for_answers(ANSWERS);
            once(self, number);
        }
        load.wait_for_answers(ANSWERS);
        load.end()
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = kill_process_group(self.pid(), Signal::KILL);
        let _ = self.process.wait();
    }
}

/// A process that ends at SIGTERM loses the requests that it is serving, at a reload as if it were
/// killed. No other client fails.
#[test]
fn tiny_http_behind_the_tool_loses_only_requests_in_service() {
    let mut tool = Tool::start();
    let address = tool.wait_for(" listening on ").parse().unwrap();
    (0..WORKERS).for_each(|_| drop(tool.wait_for(" is ready")));
    let reloads = tool.disturb(address, RELOADS, |tool, generation| {
        kill_process(tool.pid(), Signal::HUP).unwrap();
        tool.wait_for(&format!(" generation {generation} serves"));
    });
    println!("activated: reloads: {reloads:?}");
    let kills = tool.disturb(address, KILLS, |tool, _| tool.kill_worker());
    println!("activated: kills: {kills:?}");
    for (counts, ends) in [(&reloads, RELOADS * WORKERS), (&kills, KILLS)] {
        assert_eq!(
            (counts.refused, counts.timed_out, counts.wrong),
            (0, 0, 0),
            "{counts:?}"
        );
        assert!(counts.reset <= u64::from(ends) * CLIENTS, "{counts:?}");
    }
    kill_process(tool.pid(), Signal::TERM).unwrap();
    assert!(tool.process.wait().unwrap().success());
}
