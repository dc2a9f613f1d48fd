//! Tests that slow requests delay no other client, and that excess clients wait in the kernel.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use cluster::Master;

use super::{ask, read_all, request};
use crate::harness::{
    Log, cluster, in_background, serve_after_one_byte, talk, when, when_listening,
};

crate::scenarios! {
    slow_request_does_not_delay_other_clients
    connections_behind_a_slow_request_are_reclaimed
    busy_workers_leave_connections_to_the_kernel
    quick_workers_leave_most_connections_to_the_kernel
}

fn slow_request_does_not_delay_other_clients() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                let mut slow = TcpStream::connect(address).unwrap();
                let work = move || {
                    let quick: Vec<_> = (0..20).map(|_| talk(address, b"x").unwrap()).collect();
                    slow.write_all(b"x").unwrap();
                    let mut answer = String::new();
                    slow.read_to_string(&mut answer).unwrap();
                    let other = if answer == "1" { "2" } else { "1" };
                    quick.iter().filter(|answer| *answer == other).count()
                };
                // Without this wait, a worker that lacks a core for 20 ms would lose the slow
                // client's connection to the other worker.
                let is_received = |master: &Master| {
                    let workers = master.loads().workers;
                    workers.iter().any(|worker| worker.in_service != Some(0))
                };
                when(master, is_received, move |master| {
                    in_background(master, work, move |master, by_other| {
                        log.add(by_other.to_string());
                        master.disconnect();
                    });
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["20"]);
}

fn busy_workers_leave_connections_to_the_kernel() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                let clients = move || {
                    let connect = |_| TcpStream::connect(address).unwrap();
                    (0..30).map(connect).collect::<Vec<_>>()
                };
                in_background(master, clients, move |master, mut clients| {
                    // Although 30 clients are connected, the master has accepted at most one for
                    // each worker. The other clients wait in the kernel.
                    let ledger = master.ledger();
                    assert!(ledger.accepted <= 2, "{ledger:?}");
                    let talk = move || {
                        for client in &mut clients {
                            client.write_all(b"x").unwrap();
                        }
                        let mut answers = Vec::new();
                        for mut client in clients {
                            let mut answer = String::new();
                            client.read_to_string(&mut answer).unwrap();
                            answers.push(answer);
                        }
                        answers.iter().filter(|answer| !answer.is_empty()).count()
                    };
                    in_background(master, talk, move |master, answered| {
                        log.add(answered.to_string());
                        master.disconnect();
                    });
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["30"]);
}

/// Maximum number of connections that the master dispatches to a worker between two idle reports.
const WINDOW: u64 = 16;

fn connections_behind_a_slow_request_are_reclaimed() {
    const ROUNDS: usize = 5;
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                let round = move || {
                    let requests = |count| (0..count).map(|_| request(address));
                    let mut quick: Vec<_> = requests(150).collect();
                    // The workers have answered quickly by now, so the master dispatches
                    // connections ahead of time.
                    let mut slow = TcpStream::connect(address).unwrap();
                    quick.extend(requests(150));
                    let quick = read_all(quick).len();
                    slow.write_all(b"x").unwrap();
                    assert_eq!(read_all(vec![slow]).concat().len(), 1);
                    quick
                };
                let work = move || (0..ROUNDS).map(|_| round()).sum::<usize>();
                in_background(master, work, move |master, quick| {
                    let ledger = master.ledger();
                    assert_eq!(ledger.accepted, ledger.received);
                    log.add(quick.to_string());
                    master.disconnect();
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), [(ROUNDS * 300).to_string()]);
}

fn quick_workers_leave_most_connections_to_the_kernel() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                two_slow_requests_among_many(master, address, 5, log);
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["402"; 5]);
}

/// Plays rounds of many quick requests and two slow ones. The slow requests usually keep both
/// workers busy.
///
/// The rounds repeat until connections have been queued behind a slow request in `times` rounds.
fn two_slow_requests_among_many(master: &Master, address: SocketAddr, times: u32, log: Log) {
    if times == 0 {
        return master.disconnect();
    }
    let before = master.ledger().accepted;
    let connect = move || {
        let mut clients: Vec<_> = (0..150).map(|_| request(address)).collect();
        let slow = [(); 2].map(|()| TcpStream::connect(address).unwrap());
        clients.extend((0..250).map(|_| request(address)));
        (slow, clients)
    };
    in_background(master, connect, move |master, (mut slow, mut clients)| {
        master.set_timeout(Duration::from_millis(50), move |master| {
            let ledger = master.ledger();
            assert!(ledger.in_flight() <= 2 * WINDOW, "{ledger:?}");
            // Both slow requests may have reached the same worker. The other worker has then served
            // all quick requests, and the round does not count.
            let has_queued = ledger.accepted < before + 402 && ledger.in_flight() > 0;
            let end = move || {
                ask(&mut slow, b"x");
                clients.extend(slow);
                read_all(clients)
            };
            in_background(master, end, move |master, answers| {
                assert!(answers.iter().all(|answer| answer.len() == 1));
                if has_queued {
                    log.add(answers.len().to_string());
                }
                two_slow_requests_among_many(master, address, times - u32::from(has_queued), log);
            });
        });
    });
}
