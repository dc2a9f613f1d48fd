//! Tests connections that the master has dispatched to a worker that is stopped and does not run.

use std::cell::RefCell;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use cluster::{Master, Signal, WorkerProcess};

use super::{ask, read_all, request, when_accepted};
use crate::harness::{
    Log, cluster, in_background, scaled, serve_after_one_byte, stop, when, when_all_wait,
    when_listening,
};

crate::scenarios! {
    connection_of_a_stopped_worker_goes_to_an_idle_one
    connection_in_a_queue_survives_a_killed_worker
    client_that_disconnects_while_it_waits_is_counted
}

/// Keeps a worker busy until the master treats it as slow. From then on, the worker receives only
/// one connection at a time.
fn make_worker_slow(
    master: &Master,
    address: SocketAddr,
    then: impl FnOnce(&Master, String) + 'static,
) {
    let taken = master.ledger().received + 1;
    let mut client = TcpStream::connect(address).unwrap();
    let is_received = move |master: &Master| master.ledger().received == taken;
    when(master, is_received, move |master| {
        master.set_timeout(Duration::from_millis(5), move |master| {
            client.write_all(b"x").unwrap();
            let read = move || read_all(vec![client]).concat();
            in_background(master, read, then);
        });
    });
}

/// Stops the next worker in the rotation while both workers wait in `accept`, and calls `then`.
///
/// When it calls `then`, the master treats both workers as slow, so it dispatches no connection
/// ahead of time.
fn with_a_stopped_worker(
    master: &Master,
    then: impl FnOnce(&Master, SocketAddr, WorkerProcess) + 'static,
) {
    let stop_next = move |master: &Master, address, last: String| {
        when_all_wait(master, move |master| {
            let is_next = |worker: &WorkerProcess| worker.id().to_string() != last;
            let next = master.workers().into_iter().find(is_next).unwrap();
            stop(&next);
            then(master, address, next);
        });
    };
    when_listening(master, 2, move |master, address| {
        // Make both workers slow, one after the other. `last` is the worker that served the last
        // connection, so the other worker is next.
        make_worker_slow(master, address, move |master, _| {
            make_worker_slow(master, address, move |master, last| {
                stop_next(master, address, last);
            });
        });
    });
    (0..2).for_each(|_| drop(master.fork().unwrap()));
}

fn connection_of_a_stopped_worker_goes_to_an_idle_one() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            with_a_stopped_worker(master, move |master, address, stopped| {
                let talk = move || {
                    let began = Instant::now();
                    let mut client = request(address);
                    let mut answer = [0];
                    client.read_exact(&mut answer).unwrap();
                    assert!(began.elapsed() < scaled(Duration::from_secs(1)));
                    (client, char::from(answer[0]).to_string())
                };
                in_background(master, talk, move |master, (client, answer)| {
                    assert_ne!(answer, stopped.id().to_string());
                    stopped.process().kill(Signal::CONT);
                    when_all_wait(master, move |master| {
                        let ledger = master.ledger();
                        assert_eq!((ledger.accepted, ledger.received), (3, 3));
                        let rest = move || read_all(vec![client]).concat();
                        in_background(master, rest, move |master, rest| {
                            log.add(rest);
                            master.disconnect();
                        });
                    });
                });
            });
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), [""], "the client has a second answer");
}

/// Connects two clients, and calls `then`. The first client keeps the running worker busy, and the
/// master dispatches the second to the stopped worker.
fn with_a_busy_worker(
    master: &Master,
    address: SocketAddr,
    then: impl FnOnce(&Master, [TcpStream; 2]) + 'static,
) {
    let before = master.ledger().received;
    let first = TcpStream::connect(address).unwrap();
    let is_received = move |master: &Master| master.ledger().received == before + 1;
    when(master, is_received, move |master| {
        let second = TcpStream::connect(address).unwrap();
        when_accepted(master, before + 2, move |master| {
            assert_eq!(
                master.ledger().in_flight(),
                1,
                "the second client is with the stopped worker"
            );
            then(master, [first, second]);
        });
    });
}

fn connection_in_a_queue_survives_a_killed_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            with_a_stopped_worker(master, move |master, address, stopped| {
                with_a_busy_worker(master, address, move |_, clients| {
                    stopped.process().kill(Signal::KILL);
                    let rest = RefCell::new(Some((clients, log)));
                    stopped.on_exit(move |master, stopped, _| {
                        let (mut clients, log) = rest.take().unwrap();
                        ask(&mut clients, b"x");
                        let killed = stopped.id().to_string();
                        let read = move || read_all(clients.into());
                        in_background(master, read, move |master, answers| {
                            assert_eq!(answers[0], answers[1], "one worker served both clients");
                            assert_ne!(answers[0], killed);
                            let ledger = master.ledger();
                            assert_eq!((ledger.accepted, ledger.received), (4, 4));
                            log.add("served");
                            master.disconnect();
                        });
                    });
                });
            });
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["served"]);
}

fn client_that_disconnects_while_it_waits_is_counted() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            with_a_stopped_worker(master, move |master, address, stopped| {
                // Keep the other worker busy, so that no idle worker can receive the second client
                // when the stopped worker is killed.
                with_a_busy_worker(master, address, move |master, [mut first, second]| {
                    stopped.process().kill(Signal::KILL);
                    let client = RefCell::new(Some(second));
                    stopped.on_exit(move |master, _, _| {
                        assert_eq!(
                            master.ledger().in_flight(),
                            1,
                            "the second client waits in the master"
                        );
                        reset(client.take().unwrap());
                    });
                    let is_counted = |master: &Master| master.ledger().closed_by_peer == 1;
                    when(master, is_counted, move |master| {
                        let ledger = master.ledger();
                        log.add(format!("{} of {}", ledger.received, ledger.accepted));
                        first.write_all(b"x").unwrap();
                        master.disconnect();
                    });
                });
            });
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["3 of 4"]);
}

/// Closes the client's connection with a reset.
fn reset(client: TcpStream) {
    let linger = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    nix::sys::socket::setsockopt(&client, nix::sys::socket::sockopt::Linger, &linger).unwrap();
}
