//! Tests of the round-robin policy. Each connection must reach the right worker, and no connection
//! may be lost.

mod callbacks;
mod queues;
mod rotation;
mod slow_requests;
mod stopped_workers;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use cluster::{Connection, Interest, Master, Worker};

use crate::harness::{Scenario, when};

/// The scenarios of all modules.
pub const SCENARIOS: &[&[Scenario]] = &[
    callbacks::SCENARIOS,
    queues::SCENARIOS,
    rotation::SCENARIOS,
    slow_requests::SCENARIOS,
    stopped_workers::SCENARIOS,
];

/// Connects a client, and sends its request immediately.
fn request(address: SocketAddr) -> TcpStream {
    let mut client = TcpStream::connect(address).unwrap();
    client.write_all(b"x").unwrap();
    client
}

/// Sends `request` from each client.
fn ask(clients: &mut [TcpStream], request: &[u8]) {
    for client in clients {
        client.write_all(request).unwrap();
    }
}

/// Keeps a connection open until its client disconnects.
fn hold(worker: &Worker, connection: Connection) {
    let watch = |_: &Worker, mut connection: &Connection| {
        let _ = connection.read(&mut [0]);
        None
    };
    worker.watch(connection, Interest::Readable, watch).unwrap();
}

/// Reads each client's answer to its end, and returns the sorted answers.
fn read_all(clients: Vec<TcpStream>) -> Vec<String> {
    let read = |mut client: TcpStream| {
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    };
    let mut answers: Vec<_> = clients.into_iter().map(read).collect();
    answers.sort();
    answers
}

/// Calls `then` once the master has accepted exactly `count` connections.
fn when_accepted(master: &Master, count: u64, then: impl FnOnce(&Master) + 'static) {
    when(
        master,
        move |master| master.ledger().accepted == count,
        then,
    );
}
