//! Tests of retained listeners, which the master keeps open. While workers are killed, disconnected
//! and replaced, no connection may be lost except those that a killed worker is serving.

mod accepted_connections;
mod opening;
mod releasing;
mod replaced_workers;
mod waiting_clients;

use std::cell::Cell;
use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cluster::{Master, MasterListener, SchedulingPolicy, Signal, WorkerProcess};

use crate::harness::{Scenario, in_background, scaled};

/// The scenarios of all modules.
pub const SCENARIOS: &[&[Scenario]] = &[
    accepted_connections::SCENARIOS,
    opening::SCENARIOS,
    releasing::SCENARIOS,
    replaced_workers::SCENARIOS,
    waiting_clients::SCENARIOS,
];

const RR: SchedulingPolicy = SchedulingPolicy::RoundRobin;
const NONE: SchedulingPolicy = SchedulingPolicy::Shared;
const SHARDED: SchedulingPolicy = SchedulingPolicy::Sharded;

/// Maximum time until a client has its answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Environment variable with the address on which the worker listens.
const ADDRESS: &str = "RETAINED_ADDRESS";

fn listen(master: &Master, policy: SchedulingPolicy) -> (MasterListener, SocketAddr) {
    master.set_scheduling_policy(policy).unwrap();
    let retained = master.listen("127.0.0.1:0").unwrap();
    let address = retained.address().to_string().parse().unwrap();
    (retained, address)
}

/// Forks `count` workers, and calls `then` once all of them listen.
fn fork(master: &Master, count: usize, then: impl FnOnce(&Master) + 'static) {
    let (missing, then) = (Cell::new(count), Cell::new(Some(then)));
    let id = std::rc::Rc::new(Cell::new(None));
    let own = id.clone();
    id.set(Some(master.on_listening(move |master, _, _| {
        missing.set(missing.get() - 1);
        if missing.get() == 0 {
            master.remove_callback(own.get().unwrap());
            then.take().unwrap()(master);
        }
    })));
    (0..count).for_each(|_| drop(master.fork().unwrap()));
}

/// Ends all workers by calling `end` for each, and calls `then` once they have exited.
fn end_all(master: &Master, end: impl Fn(&WorkerProcess), then: impl FnOnce(&Master) + 'static) {
    let missing = std::rc::Rc::new(Cell::new(master.workers().len()));
    let then = std::rc::Rc::new(Cell::new(Some(then)));
    for worker in master.workers() {
        let (missing, then) = (missing.clone(), then.clone());
        worker.on_exit(move |master, _, _| {
            missing.set(missing.get() - 1);
            if missing.get() == 0 {
                then.take().unwrap()(master);
            }
        });
        end(&worker);
    }
}

fn kill(worker: &WorkerProcess) {
    worker.process().kill(Signal::KILL);
}

fn disconnect(worker: &WorkerProcess) {
    worker.disconnect();
}

fn connect(address: SocketAddr) -> Vec<TcpStream> {
    (0..20)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect()
}

fn read(mut client: impl std::io::Read) -> String {
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}

/// Connects clients while no worker is running, and then starts one worker. This worker must serve
/// all of them.
fn next_worker_serves_all(
    master: &Master,
    address: SocketAddr,
    then: impl FnOnce(&Master) + 'static,
) {
    assert!(master.workers().is_empty());
    let clients = connect(address);
    let before = master.ledger().accepted;
    let worker = master.fork().unwrap();
    assert_eq!(
        master.ledger().accepted,
        before,
        "accepted without a worker"
    );
    let read_all = || {
        let patient = |client: &TcpStream| client.set_read_timeout(Some(scaled(PATIENCE))).unwrap();
        clients.iter().for_each(patient);
        clients.into_iter().map(read).collect::<Vec<_>>()
    };
    in_background(master, read_all, move |master, answers| {
        assert_eq!(answers, vec![worker.id().to_string(); 20]);
        then(master);
    });
}

fn serve_path(worker: &cluster::Worker) {
    let path = PathBuf::from(std::env::var_os(ADDRESS).unwrap());
    for connection in worker.listen(path.as_path()).unwrap().incoming() {
        let id = worker.id().to_string();
        let _ = connection.unwrap().write_all(id.as_bytes());
    }
}

fn ask_path(path: &Path) -> String {
    read(UnixStream::connect(path).unwrap())
}

/// Forks a worker that listens on `path`, and calls `then` once the worker is listening.
fn fork_at(master: &Master, path: &Path, then: impl FnOnce(&Master) + 'static) {
    let worker = master.fork_with([(ADDRESS, path)]).unwrap();
    let then = Cell::new(Some(then));
    worker.on_listening(move |master, _, _| then.take().unwrap()(master));
}
