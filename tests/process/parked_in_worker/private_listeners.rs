//! Tests parked connections of private listeners.

use std::cell::Cell;
use std::net::SocketAddr;

use cluster::{ListenOptions, Listener, Master, Worker};

use super::{ask_in_turn, disconnect};
use crate::harness::{cluster, in_background};
use crate::parked::{Client, PARK, answer};

crate::scenarios! {
    private_connections_can_be_parked
    private_connections_can_be_parked_with_a_callback
    private_parked_connections_close_at_the_disconnect
}

fn serve_privately(worker: Worker, callback: bool) {
    let options = ListenOptions::from("127.0.0.1:0").exclusive(true);
    let listener: Listener = worker.listen(options).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let _ = worker.send(address.as_bytes()).unwrap();
    if callback {
        listener.set_connection_callback(answer);
        worker.run().unwrap();
        return;
    }
    for connection in listener.incoming() {
        answer(&worker, connection.unwrap());
    }
}

/// Runs `clients` with the address that the worker sends.
fn with_private_clients<T: Send + 'static>(
    master: &Master,
    clients: impl FnOnce(SocketAddr) -> T + Send + 'static,
    then: impl FnOnce(&Master, T) + 'static,
) {
    let work = Cell::new(Some((clients, then)));
    master.on_message(move |master, _, message| {
        let text = String::from_utf8(message.bytes().to_vec()).unwrap();
        let address = text.parse().unwrap();
        let (clients, then) = work.take().unwrap();
        in_background(master, move || clients(address), then);
    });
    drop(master.fork().unwrap());
}

fn private_connections_can_be_parked() {
    cluster(
        |master| with_private_clients(master, ask_in_turn, disconnect),
        |worker| serve_privately(worker, false),
    );
}

fn private_connections_can_be_parked_with_a_callback() {
    cluster(
        |master| with_private_clients(master, ask_in_turn, disconnect),
        |worker| serve_privately(worker, true),
    );
}

fn private_parked_connections_close_at_the_disconnect() {
    let clients = |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        client
    };
    let then = |master: &Master, mut client: Client| {
        master.disconnect();
        in_background(master, move || assert_eq!(client.line(), ""), |_, ()| {});
    };
    cluster(
        |master| with_private_clients(master, clients, then),
        |worker| serve_privately(worker, false),
    );
}
