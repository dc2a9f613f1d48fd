//! Tests that a paused listener resumes no parked connection.

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;

use cluster::{Connection, Listener, Worker};

use super::{MS, disconnect};
use crate::harness::{cluster, for_policies_without_dispatch};
use crate::parked::{Client, PARK, with_clients};

crate::scenarios! {
    paused_listener_resumes_no_connection
    paused_listener_with_a_callback_resumes_no_connection
}

/// Request that makes the worker send a line, keep the connection for 200 ms, and then send another
/// line.
const HOLD: u8 = b'h';

thread_local! {
    /// Whether the worker keeps a connection, so that its listener is paused.
    static HOLDS: Cell<bool> = const { Cell::new(false) };
}

fn answer_or_hold(worker: &Worker, mut connection: Connection) {
    let mut request = [0];
    match connection.read(&mut request) {
        Ok(1) if request[0] == HOLD => {
            HOLDS.set(true);
            connection.write_all(b"holding\n").unwrap();
            let held = Cell::new(Some(connection));
            worker.set_timeout(200 * MS, move |_| {
                HOLDS.set(false);
                let _ = held.take().unwrap().write_all(b"held\n");
            });
        }
        Ok(1) => {
            assert!(!HOLDS.get(), "the listener is paused");
            let line = format!("{} {}\n", worker.id(), connection.requests());
            connection.write_all(line.as_bytes()).unwrap();
            connection.park();
        }
        _ => {}
    }
}

fn hold_and_park(address: SocketAddr) {
    let mut parked = Client::connect(address);
    parked.ask(PARK);
    let mut held = Client::connect(address);
    held.send(HOLD);
    assert_eq!(held.line(), "holding");
    assert_eq!(parked.ask(PARK).1, 2);
    assert_eq!(held.line(), "held");
}

fn listen_with_limit(worker: &Worker) -> Listener {
    let listener = worker.listen("127.0.0.1:0").unwrap();
    listener.set_max_connections(Some(1));
    listener
}

fn paused_listener_resumes_no_connection() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, hold_and_park, disconnect),
            |worker| {
                for connection in listen_with_limit(&worker).incoming() {
                    answer_or_hold(&worker, connection.unwrap());
                }
            },
        );
    });
}

fn paused_listener_with_a_callback_resumes_no_connection() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, hold_and_park, disconnect),
            |worker| {
                listen_with_limit(&worker).set_connection_callback(answer_or_hold);
                worker.run().unwrap();
            },
        );
    });
}
