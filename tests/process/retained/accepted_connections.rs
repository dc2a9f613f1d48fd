//! Tests which worker serves connections that the master has already accepted.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use cluster::{Master, MasterListener};

use super::{RR, end_all, fork, kill, listen};
use crate::harness::{Log, cluster, in_background, serve_after_one_byte, when};

crate::scenarios! {
    scheduler_runs_only_when_there_is_a_worker_to_choose
    disconnecting_workers_serve_accepted_connections
}

/// Connects five clients, and calls `then` once the first worker has received one of them. The
/// other four wait in this worker's queue.
fn with_five_accepted(
    master: &Master,
    workers: usize,
    then: impl FnOnce(&Master, MasterListener, SocketAddr, Vec<TcpStream>) + 'static,
) {
    let (retained, address) = listen(master, RR);
    master.set_scheduler(|_, workers| Some(workers[0].worker));
    fork(master, workers, move |master| {
        let connect = |_| TcpStream::connect(address).unwrap();
        let clients: Vec<_> = (0..5).map(connect).collect();
        when_received(master, 1, 5, move |master| {
            then(master, retained, address, clients);
        });
    });
}

/// Sends one byte from each client, and returns all answers as one string. Ignores clients whose
/// connections were closed or reset.
fn ask_all(clients: Vec<TcpStream>) -> String {
    let ask = |mut client: TcpStream| {
        let mut answer = String::new();
        let said = client.write_all(b"x");
        let _ = said.and_then(|()| client.read_to_string(&mut answer));
        answer
    };
    clients.into_iter().map(ask).collect()
}

/// Kills the only worker, so that its queued connections wait in the master until the next worker
/// starts. Checks that the scheduler does not run in the meantime: it would panic, because the list
/// of workers is empty.
fn scheduler_runs_only_when_there_is_a_worker_to_choose() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            with_five_accepted(master, 1, move |master, retained, _, clients| {
                end_all(master, kill, move |master| {
                    assert_eq!(master.ledger().in_flight(), 4);
                    drop(master.fork().unwrap());
                    let work = move || ask_all(clients);
                    in_background(master, work, move |master, answers| {
                        log.add(answers);
                        master.on_all_disconnected_once(move |_| drop(retained));
                        master.disconnect();
                    });
                });
            });
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["2222"]);
}

/// Checks that a disconnecting worker serves connections from a killed worker's queue.
///
/// Connections that arrive later wait for the next worker.
fn disconnecting_workers_serve_accepted_connections() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            with_five_accepted(master, 2, move |master, retained, address, clients| {
                let client = TcpStream::connect(address).unwrap();
                let later = log.clone();
                master.on_all_disconnected_once(move |master| {
                    let ledger = master.ledger();
                    assert_eq!((ledger.accepted, ledger.received), (5, 5));
                    drop(master.fork().unwrap());
                    let work = move || ask_all(vec![client]);
                    in_background(master, work, move |master, answer| {
                        later.add(answer);
                        drop(retained);
                        master.disconnect();
                    });
                });
                master.disconnect();
                kill(&master.workers()[0]);
                let work = move || ask_all(clients);
                in_background(master, work, move |_, answers| log.add(answers));
            });
        },
        |worker| serve_after_one_byte(&worker),
    );
    let mut entries = entries.take();
    entries.sort();
    assert_eq!(entries, ["2222", "3"]);
}

/// Calls `then` once the master has accepted `accepted` connections and workers have received
/// `received` of them.
fn when_received(
    master: &Master,
    received: u64,
    accepted: u64,
    then: impl FnOnce(&Master) + 'static,
) {
    let is_reached = move |master: &Master| {
        let ledger = master.ledger();
        (ledger.received, ledger.accepted) == (received, accepted)
    };
    when(master, is_reached, then);
}
