//! One server: its processes, its log, and its workers.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process_group};

/// How long the server may take for one step.
const DEADLINE: Duration = Duration::from_secs(30);

/// A server in a process group of its own, which the drop kills.
pub(crate) struct Server {
    master: Child,
    log: Receiver<String>,
    workers: BTreeMap<u64, Worker>,
    generation: u64,
    address: Option<SocketAddr>,
}

#[derive(Debug)]
struct Worker {
    process: Pid,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Starting,
    Ready,
    Disconnecting,
}

impl Server {
    /// Starts an example on any port, and waits until two workers are ready.
    pub(crate) fn start(example: &str, policy: &str) -> (Self, SocketAddr) {
        let own = std::env::current_exe().unwrap();
        let built = own.ancestors().nth(2).unwrap();
        // Reset SIGHUP, which `nohup`, for example, sets to be ignored. A pool does not reload if
        // SIGHUP was ignored when it started.
        let mut master = Command::new("env")
            .arg("--default-signal=HUP")
            .arg(built.join("examples").join(example))
            .arg("127.0.0.1:0")
            .env("CLUSTER_SCHED_POLICY", policy)
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        let lines = BufReader::new(master.stderr.take().unwrap()).lines();
        let (sender, log) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let mut this = Self {
            master,
            log,
            workers: BTreeMap::new(),
            generation: 0,
            address: None,
        };
        this.wait(|this| this.is_settled() && this.workers.len() > 1);
        let address = this.address.unwrap();
        (this, address)
    }

    /// Reads the log until the condition holds.
    fn wait(&mut self, condition: impl Fn(&Self) -> bool) {
        let end = Instant::now() + DEADLINE;
        while !condition(self) {
            let left = end.saturating_duration_since(Instant::now());
            let line = self.log.recv_timeout(left);
            self.process(&line.unwrap_or_else(|error| panic!("{error}: {:?}", self.workers)));
        }
    }

    fn process(&mut self, line: &str) {
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["worker", id, "is", "process", process] => {
                let process = Pid::from_raw(process.parse().unwrap()).unwrap();
                let state = State::Starting;
                let worker = Worker { process, state };
                self.workers.insert(id.parse().unwrap(), worker);
            }
            ["worker", _, "listens", "on", address] => {
                let address = address.rsplit('/').next().unwrap();
                self.address = Some(address.parse().unwrap());
            }
            ["generation", generation, "serves"] => {
                self.generation = generation.parse().unwrap();
            }
            ["slot", _, "worker", id, ref event @ ..] => {
                let id = id.parse().unwrap();
                match event {
                    ["is", "ready"] => self.set_state(id, State::Ready),
                    ["is", "disconnecting"] => self.set_state(id, State::Disconnecting),
                    ["has", "exited"] => drop(self.workers.remove(&id).unwrap()),
                    // `kill_worker` has killed and removed this worker.
                    _ => assert!(!self.workers.contains_key(&id), "{line}"),
                }
            }
            _ => {}
        }
    }

    fn set_state(&mut self, id: u64, state: State) {
        // A worker that was killed may have a pending event.
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.state = state;
        }
    }

    /// Returns whether all workers are ready.
    fn is_settled(&self) -> bool {
        self.workers
            .values()
            .all(|worker| worker.state == State::Ready)
    }

    /// Reloads the server, and waits until the old workers have exited.
    pub(crate) fn reload(&mut self) {
        let next = self.generation + 1;
        let master = Pid::from_child(&self.master);
        kill_process(master, Signal::HUP).unwrap();
        self.wait(|this| this.generation == next && this.is_settled());
    }

    /// Kills the oldest worker, and waits until its replacement is ready.
    pub(crate) fn kill_worker(&mut self) {
        let slots = self.workers.len();
        let (_, worker) = self.workers.pop_first().unwrap();
        kill_process(worker.process, Signal::KILL).unwrap();
        self.wait(|this| this.workers.len() == slots && this.is_settled());
    }

    /// Stops the server, and checks that it leaves no process behind.
    pub(crate) fn stop(mut self) {
        let master = Pid::from_child(&self.master);
        kill_process(master, Signal::TERM).unwrap();
        // The log ends when the last process exits.
        let end = loop {
            if let Err(end) = self.log.recv_timeout(DEADLINE) {
                break end;
            }
        };
        assert_eq!(
            end,
            RecvTimeoutError::Disconnected,
            "the server does not stop"
        );
        assert!(self.master.wait().unwrap().success());
        assert!(
            test_kill_process_group(master).is_err(),
            "a process is left"
        );
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.master), Signal::KILL);
        let _ = self.master.wait();
    }
}
