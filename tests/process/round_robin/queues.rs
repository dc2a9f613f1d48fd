//! Tests that connections that a worker leaves in its queue go to another worker, and only those.

use std::cell::RefCell;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::rc::Rc;
use std::time::Duration;

use cluster::{Connection, Listener, Master, Signal, Worker, WorkerProcess};

use super::{ask, hold, read_all};
use crate::harness::{
    Log, answer_pings, cluster, in_background, stop, when_all_wait, when_listening, with_env,
};

crate::scenarios! {
    queue_survives_a_killed_worker
    lowered_limit_returns_the_rest_to_others
    connections_that_a_callback_has_not_received_go_to_others
    received_connection_is_not_dispatched_again
}

/// Number of connections that [`with_a_queue`] puts into the only worker's queue.
const QUEUED: usize = 5;

/// Stops the only worker, and calls `then` once `QUEUED` connections are in its queue. The clients
/// have not sent a request yet.
///
/// The master dispatches `QUEUED` connections ahead of time only to a worker that answers quickly.
/// Therefore this function first sends a burst of quick requests, and starts again if fewer
/// connections were dispatched. All clients connect before the first request is sent. Otherwise, a
/// worker on a machine with one core answers each request before the next client connects, and never
/// has a queue.
fn with_a_queue(
    master: &Master,
    address: SocketAddr,
    then: impl FnOnce(&Master, WorkerProcess, Vec<TcpStream>) + 'static,
) {
    let burst = move || {
        let connect = |_| TcpStream::connect(address).unwrap();
        let mut clients: Vec<_> = (0..60).map(connect).collect();
        ask(&mut clients, b"x");
        read_all(clients)
    };
    in_background(master, burst, move |master, _| {
        when_all_wait(master, move |master| {
            let worker = master.workers().remove(0);
            stop(&worker);
            let before = master.ledger().accepted;
            let connect = |_| TcpStream::connect(address).unwrap();
            let mut clients: Vec<_> = (0..QUEUED).map(connect).collect();
            master.set_timeout(Duration::from_millis(20), move |master| {
                if master.ledger().accepted == before + QUEUED as u64 {
                    return then(master, worker, clients);
                }
                worker.process().kill(Signal::CONT);
                ask(&mut clients, b"x");
                in_background(
                    master,
                    move || read_all(clients),
                    move |master, _| with_a_queue(master, address, then),
                );
            });
        });
    });
}

/// Forks a second worker with the same listener, and calls `then` once the worker is listening.
///
/// The second worker accepts no connection until it receives a message.
fn fork_second(master: &Master, then: impl FnOnce(&Master, &WorkerProcess) + 'static) {
    let second = master.fork_with([("SECOND", "1")]).unwrap();
    let mut then = Some(then);
    second.on_listening(move |master, worker, _| then.take().unwrap()(master, worker));
}

/// Serves connections in a callback, in a way that depends on the worker.
///
/// The first worker answers each request `x`, and calls `first` for any other request. The second
/// worker answers all requests, but only once it has received a message.
fn serve_by_callback(worker: &Worker, first: impl FnMut(&Worker, &Listener, Connection) + 'static) {
    answer_pings(worker);
    let listener = Rc::new(worker.listen("127.0.0.1:0").unwrap());
    let own = Rc::downgrade(&listener);
    if std::env::var_os("SECOND").is_some() {
        worker.on_message(move |_, _| {
            own.upgrade()
                .unwrap()
                .set_connection_callback(|_, mut connection| {
                    connection.read_exact(&mut [0]).unwrap();
                    connection.write_all(b"2").unwrap();
                });
        });
        return worker.run().unwrap();
    }
    let mut first = first;
    listener.set_connection_callback(move |worker, mut connection| {
        let mut byte = [0];
        connection.read_exact(&mut byte).unwrap();
        if byte == *b"x" {
            return connection.write_all(b"1").unwrap();
        }
        first(worker, &own.upgrade().unwrap(), connection);
    });
    worker.run().unwrap();
}

/// Checks that queued connections go to another worker if the callback for the first of them closes
/// the listener or aborts the process.
fn connections_that_a_callback_has_not_received_go_to_others() {
    if let Ok(how) = std::env::var("HOW") {
        return run_callback_that_ends(how);
    }
    for how in ["close", "abort"] {
        with_env("HOW", how, || {});
    }
}

fn run_callback_that_ends(how: String) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 1, move |master, address| {
                with_a_queue(master, address, move |master, first, mut clients| {
                    ask(&mut clients, b"!");
                    fork_second(master, move |master, second| {
                        first.process().kill(Signal::CONT);
                        let second = second.clone();
                        let others = clients.split_off(1);
                        let read_first = move || read_all(clients);
                        in_background(master, read_first, move |master, mut answers| {
                            let _ = second.send(b"go").unwrap();
                            let read = move || read_all(others);
                            in_background(master, read, move |master, more| {
                                answers.extend(more);
                                let ledger = master.ledger();
                                assert_eq!(ledger.accepted, ledger.received);
                                log.add(answers.join(" "));
                                master.disconnect();
                            });
                        });
                    });
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            serve_by_callback(&worker, move |_, listener, mut connection| {
                connection.write_all(b"1").unwrap();
                match how.as_str() {
                    "close" => listener.close(),
                    _ => std::process::abort(),
                }
            });
        },
    );
    assert_eq!(entries.take(), ["1 2 2 2 2"]);
}

fn queue_survives_a_killed_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 1, move |master, address| {
                with_a_queue(master, address, move |master, first, mut clients| {
                    ask(&mut clients, b"x");
                    fork_second(master, move |_, second| {
                        first.process().kill(Signal::KILL);
                        let rest = RefCell::new(Some((second.clone(), clients, log)));
                        first.on_exit(move |master, _, _| {
                            assert_eq!(master.ledger().in_flight(), QUEUED as u64);
                            let (second, clients, log) = rest.take().unwrap();
                            let _ = second.send(b"go").unwrap();
                            let read = move || read_all(clients);
                            in_background(master, read, move |master, answers| {
                                let ledger = master.ledger();
                                assert_eq!(ledger.accepted, ledger.received);
                                log.add(answers.join(" "));
                                master.disconnect();
                            });
                        });
                    });
                });
            });
            master.fork().unwrap();
        },
        |worker| serve_by_callback(&worker, |_, _, _| unreachable!()),
    );
    assert_eq!(entries.take(), ["2 2 2 2 2"]);
}

/// Checks that connections in a worker's queue go to another worker if the callback for the first
/// of them lowers the limit on open connections to 1.
fn lowered_limit_returns_the_rest_to_others() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 1, move |master, address| {
                with_a_queue(master, address, move |master, first, mut clients| {
                    ask(&mut clients, b"!");
                    fork_second(master, move |master, second| {
                        first.process().kill(Signal::CONT);
                        let second = second.clone();
                        let first_answer = move || (read_one(&clients[0]), clients);
                        in_background(master, first_answer, move |master, (one, clients)| {
                            let _ = second.send(b"go").unwrap();
                            let read = move || {
                                let others: String = clients[1..].iter().map(read_one).collect();
                                (others, clients)
                            };
                            in_background(master, read, move |master, (others, clients)| {
                                log.add(format!("{one}{others}"));
                                drop(clients);
                                master.disconnect();
                            });
                        });
                    });
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            serve_by_callback(&worker, |worker, listener, mut connection| {
                listener.set_max_connections(Some(1));
                connection.write_all(b"1").unwrap();
                hold(worker, connection);
            });
        },
    );
    assert_eq!(entries.take(), ["12222"]);
}

fn read_one(mut client: &TcpStream) -> char {
    let mut byte = [0];
    client.read_exact(&mut byte).unwrap();
    char::from(byte[0])
}

/// Checks that the master does not dispatch a connection again after a worker has received it. The
/// master disconnects the first worker in a callback for a message. This message arrives before, or
/// together with, the report that the worker has received the connections. A faulty master would
/// dispatch them to the second worker too.
fn received_connection_is_not_dispatched_again() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 1, move |master, address| {
                with_a_queue(master, address, move |master, first, mut clients| {
                    ask(&mut clients, b"!");
                    fork_second(master, move |master, second| {
                        let second = second.clone();
                        first.on_message(move |_, first, _| {
                            first.process().disconnect();
                            let _ = second.send(b"go").unwrap();
                        });
                        first.process().kill(Signal::CONT);
                        let read = move || read_all(clients);
                        in_background(master, read, move |master, answers| {
                            let ledger = master.ledger();
                            assert_eq!(ledger.accepted, ledger.received);
                            log.add(answers.join(" "));
                            master.disconnect();
                        });
                    });
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            let served = RefCell::new(Vec::new());
            serve_by_callback(&worker, move |worker, _, mut connection| {
                connection.write_all(b"1").unwrap();
                // Keep the connection open until the end, so that a second process with the
                // connection could also answer.
                served.borrow_mut().push(connection);
                if served.borrow().len() == QUEUED {
                    let _ = worker.send(b"served all").unwrap();
                }
            });
        },
    );
    assert_eq!(entries.take(), ["1 1 1 1 1"]);
}
