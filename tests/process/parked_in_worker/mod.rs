//! Tests connections that a worker holds itself while they are parked: with the policies `none` and
//! `sharded`, and on private listeners.

mod closing;
mod ended_workers;
mod paused_listeners;
mod private_listeners;
mod resuming;
mod silent_clients;
mod stopping;

use std::io::Read as _;
use std::net::SocketAddr;
use std::time::Duration;

use cluster::{Connection, ListenOptions, Master, Worker, WorkerProcess};

use crate::harness::Scenario;
use crate::parked::{Client, PARK, answer};

/// The scenarios of all modules.
pub const SCENARIOS: &[&[Scenario]] = &[
    closing::SCENARIOS,
    ended_workers::SCENARIOS,
    paused_listeners::SCENARIOS,
    private_listeners::SCENARIOS,
    resuming::SCENARIOS,
    silent_clients::SCENARIOS,
    stopping::SCENARIOS,
];

const MS: Duration = Duration::from_millis(1);

/// Request after which the worker waits for another request before it answers.
const BUSY: u8 = b'b';
/// Request after whose answer the worker kills itself.
const KILL: u8 = b'k';

fn serve_slowly(worker: Worker) {
    serve_slowly_on(&worker, "127.0.0.1:0".into());
}

fn serve_slowly_on(worker: &Worker, options: ListenOptions) {
    for connection in worker.listen(options).unwrap().incoming() {
        let mut connection = connection.unwrap();
        let mut next = [0];
        if connection.peek(&mut next).is_ok_and(|length| length == 1) && next[0] == BUSY {
            wait_for_request(&mut connection);
        }
        answer(worker, connection);
        if next[0] == KILL {
            worker.kill();
        }
    }
}

/// Reads the request `BUSY`, and waits for the next one.
fn wait_for_request(connection: &mut Connection) {
    let mut next = [0];
    let _ = connection.read_exact(&mut next);
    let _ = connection.peek(&mut next);
}

fn disconnect<T>(master: &Master, _: T) {
    master.disconnect();
}

fn serve_with_callback(worker: Worker) {
    let listener = worker.listen("127.0.0.1:0").unwrap();
    listener.set_connection_callback(answer);
    worker.run().unwrap();
}

fn ask_in_turn(address: SocketAddr) {
    let mut clients: Vec<_> = (0..100).map(|_| Client::connect(address)).collect();
    let first: Vec<_> = clients.iter_mut().map(|client| client.ask(PARK)).collect();
    for requests in 2..=5 {
        for (client, (id, _)) in clients.iter_mut().zip(&first) {
            assert_eq!(client.ask(PARK), (*id, requests));
        }
    }
}

fn only(master: &Master, id: u32) -> WorkerProcess {
    let mut workers = master.workers().into_iter();
    workers.find(|worker| worker.id().get() == id).unwrap()
}

fn ask_all(clients: &mut [Client]) -> Vec<(u32, u64)> {
    clients.iter_mut().map(|client| client.ask(PARK)).collect()
}
