//! Checks which workers a pool keeps running, replaces and upgrades, and how this affects clients.

mod failures;
mod reloads;
mod reports;
mod stopping;
mod time_limits;
mod upgrades;

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use cluster::pool::{Pool, PoolOptions, SLOT, ignore_pool_signals};
use cluster::{Role, Worker};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::counting::Counts;
use crate::harness::{Group, Log, Scenario, is_alive, reserve_port, scaled, wait_until, watched};

/// The scenarios of all modules.
pub const SCENARIOS: &[&[Scenario]] = &[
    failures::SCENARIOS,
    reloads::SCENARIOS,
    reports::SCENARIOS,
    stopping::SCENARIOS,
    time_limits::SCENARIOS,
    upgrades::SCENARIOS,
];

const MS: Duration = Duration::from_millis(1);

/// Returns pool options with short periods and without jitter.
pub fn quick() -> PoolOptions {
    PoolOptions::default()
        .workers(2)
        .jitter(0)
        .back_off(20 * MS)
        .min_ready_time(20 * MS)
}

/// Logs the pool's events.
fn note(pool: &Pool, log: &Log) {
    let log = log.clone();
    pool.on_event(move |_, _, event| log.add(event.to_string()));
}

fn serve_slot(worker: &Worker) {
    let listener = worker.listen("127.0.0.1:0").unwrap();
    let slot = std::env::var(SLOT).unwrap();
    for connection in listener.incoming() {
        let _ = connection.unwrap().write_all(slot.as_bytes());
    }
}

/// Environment variable with the path to a file. The content of the file selects how [`server`]
/// behaves.
pub const RELEASE: &str = "RELEASE";
/// Request that keeps a worker busy until the client sends 512 more bytes or closes the connection.
pub const HOLD: &[u8] = b"hold";
/// Environment variable with the address on which [`server`] listens.
pub const ADDRESS: &str = "ADDRESS";

/// Runs a pool's master or one of the pool's workers. The master prints the pool's events.
pub fn server(options: PoolOptions) {
    let address = std::env::var(ADDRESS).unwrap();
    let release = std::env::var(RELEASE).map(|path| std::fs::read_to_string(path).unwrap());
    let release = release.unwrap_or_else(|_| "good".to_owned());
    let passed = cluster::systemd::listen_fds().unwrap();
    match cluster::init().unwrap() {
        Role::Master(master) => {
            assert_ne!(release, "no master");
            if release == "blocked master" {
                SigSet::all().thread_block().unwrap();
                println!("master {}", std::process::id());
                loop {
                    std::thread::park();
                }
            }
            let pool = Pool::new(&master, options);
            pool.adopt(&master, passed).unwrap();
            pool.listen(&master, address.as_str()).unwrap();
            let own = std::process::id();
            println!("master {own}");
            pool.on_event(move |_, _, event| println!("{own}: {event}"));
            pool.on_default_signals(&master).unwrap();
            pool.notify_systemd(&master).unwrap();
            if release == "master without workers" {
                pool.scale(&master, 0);
            }
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            ignore_pool_signals(&worker).unwrap();
            match release.as_str() {
                "exits" => std::process::exit(1),
                "never ready" => return worker.run().unwrap(),
                "aborts" => {
                    worker.set_timeout(5 * MS, |_| std::process::abort());
                }
                _ => {}
            }
            let listener = worker.listen(address.as_str()).unwrap();
            for connection in listener.incoming() {
                let mut connection = connection.unwrap();
                let mut request = [0; 512];
                let length = connection.read(&mut request).unwrap_or(0);
                // Ignore an error, because the client may have closed the connection.
                let _ = if request.starts_with(HOLD) {
                    connection
                        .write_all(HOLD)
                        .and_then(|()| connection.read_exact(&mut request))
                } else if length > 0 {
                    connection.write_all(b"served\n")
                } else {
                    Ok(())
                };
            }
        }
    }
}

fn is_served(answer: &str) -> bool {
    answer == "served\n"
}

/// The scenario's server. It runs in another process group.
pub struct Server {
    pub group: Group,
    pub address: SocketAddr,
    release: PathBuf,
}

impl Server {
    pub fn start(policy: &str) -> Self {
        Self::start_with(policy, &[])
    }

    pub fn start_with(policy: &str, env: &[(&str, &str)]) -> Self {
        // Become a subreaper, so that a new master becomes this process's child when the old master
        // exits.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let (reserved, address) = reserve_port();
        let release = std::env::temp_dir().join("release");
        std::fs::write(&release, "good").unwrap();
        let mut command: Command = watched();
        command
            .env(ADDRESS, address.to_string())
            .env(RELEASE, &release)
            .env("CLUSTER_SCHED_POLICY", policy)
            .envs(env.iter().copied());
        let group = Group::start(&mut command).unwrap();
        let server = Self {
            group,
            address,
            release,
        };
        server.wait_for(": ready", 1);
        drop(reserved);
        server
    }

    /// Returns the number of output lines that end with `end`.
    pub fn count(&self, end: &str) -> usize {
        let output = self.group.output();
        output.lines().filter(|line| line.ends_with(end)).count()
    }

    pub fn wait_for(&self, end: &str, count: usize) {
        let deadline = Instant::now() + scaled(Duration::from_secs(60));
        while self.count(end) < count {
            let masters = self.masters();
            let all_exited = !masters.is_empty() && !masters.into_iter().any(|m| is_alive(pid(m)));
            let is_past_deadline = Instant::now() > deadline;
            let has_lines = self.count(end) >= count;
            let output = || format!("{count} x {end:?}\n{}", self.group.output());
            assert!(
                has_lines || !all_exited && !is_past_deadline,
                "{}",
                output()
            );
            // Check again, because the output is a file, and nothing reports its growth.
            std::thread::sleep(MS);
        }
    }

    pub fn masters(&self) -> Vec<Pid> {
        let output = self.group.output();
        let masters = output
            .lines()
            .filter_map(|line| line.strip_prefix("master "));
        masters
            .map(|pid| Pid::from_raw(pid.parse().unwrap()))
            .collect()
    }

    /// Returns the newest master.
    pub fn master(&self) -> Pid {
        *self.masters().last().unwrap()
    }

    pub fn workers(&self) -> Vec<Pid> {
        children(self.master())
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.master(), signal).unwrap();
    }

    pub fn release(&self, what: &str) {
        std::fs::write(&self.release, what).unwrap();
    }

    pub fn stop(self) {
        self.stop_and_check(|_| {});
    }

    /// Stops the newest master, waits for its exit, and calls `check` with the complete output.
    pub fn stop_and_check(self, check: impl FnOnce(&Self)) {
        let master = self.master();
        self.end_of(master, check);
    }

    /// Does the same as [`Server::stop_and_check`], but stops this master.
    pub fn end_of(self, master: Pid, check: impl FnOnce(&Self)) {
        // Ignore an error, because an earlier signal may already have stopped the master.
        let _ = kill(master, Signal::SIGTERM);
        self.finish(master, check);
    }

    /// Waits for the exit of this master and of all other processes, and calls `check` with the
    /// complete output.
    pub fn finish(self, master: Pid, check: impl FnOnce(&Self)) {
        wait_for_exit(master);
        let status = self.group.end().unwrap();
        println!("{}", self.group.output());
        assert!(status.success(), "{status}");
        check(&self);
        std::fs::remove_file(&self.release).unwrap();
    }
}

pub fn pid(pid: Pid) -> u32 {
    pid.as_raw().unsigned_abs()
}

pub fn wait_for_exit(master: Pid) {
    wait_until("the exit of the master", || {
        (!is_alive(pid(master))).then_some(())
    });
}

pub fn children(parent: Pid) -> Vec<Pid> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let children = std::fs::read_to_string(path).unwrap_or_default();
    children
        .split_whitespace()
        .map(|pid| Pid::from_raw(pid.parse().unwrap()))
        .collect()
}

#[track_caller]
fn assert_no_client_lost(counts: Counts) {
    println!("{counts:?}");
    assert_eq!(counts.lost(), 0, "{counts:?}");
    assert!(counts.answered > 100, "{counts:?}");
}

/// Returns the duration of long tests: `CLUSTER_TEST_FIRE` seconds if the variable is set,
/// otherwise 4 seconds.
fn test_duration() -> Duration {
    let wanted = std::env::var("CLUSTER_TEST_FIRE").ok();
    Duration::from_secs(wanted.map_or(4, |wanted| wanted.parse().expect("a number")))
}
