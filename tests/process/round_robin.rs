//! Tests of the round-robin policy. Each connection must reach the right worker, and no connection
//! may be lost.

use std::cell::RefCell;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{Connection, Interest, Listener, Master, Signal, Worker, WorkerProcess};

use crate::harness::{
    Log, answer_pings, cluster, count_returned, in_background, scaled, serve_after_one_byte, stop,
    talk, when, when_all_wait, when_listening, with_env,
};

crate::scenarios! {
    sequential_connections_rotate_exactly
    slow_request_does_not_delay_other_clients
    connections_behind_a_slow_request_are_reclaimed
    busy_workers_leave_connections_to_the_kernel
    quick_workers_leave_most_connections_to_the_kernel
    connection_of_a_stopped_worker_goes_to_an_idle_one
    connection_in_a_queue_survives_a_killed_worker
    queue_survives_a_killed_worker
    lowered_limit_returns_the_rest_to_others
    client_that_disconnects_while_it_waits_is_counted
    callback_workers_hold_many_connections
    clients_cannot_exhaust_a_workers_descriptors
    connections_that_a_callback_has_not_received_go_to_others
    received_connection_is_not_dispatched_again
    callback_inside_accept_cannot_lose_the_connection
}

/// Number of workers that take turns.
const WORKERS: usize = 4;

/// Checks that sequential clients reach the workers in strict turns.
///
/// On a loaded machine, a worker may receive its connection too late and lose its turn. The answer
/// to that client does not count, and a new rotation begins, perhaps in another order.
fn sequential_connections_rotate_exactly() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, WORKERS, move |master, address| {
                begin_rotation(master, address, log);
            });
            (0..WORKERS).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.len(), 100);
}

/// Keeps all workers busy at the same time, so that no worker is treated as stalled afterwards, and
/// then calls [`next`]. `log` contains the answers that count.
fn begin_rotation(master: &Master, address: SocketAddr, log: Log) {
    when_all_wait(master, move |master| {
        let received = master.ledger().received + WORKERS as u64;
        let clients = [(); WORKERS].map(|()| TcpStream::connect(address).unwrap());
        let all_are_busy = move |master: &Master| master.ledger().received == received;
        when(master, all_are_busy, move |master| {
            let mut clients = Vec::from(clients);
            ask(&mut clients, b"x");
            let read = move || read_all(clients);
            in_background(master, read, move |master, _| {
                next(master, address, Vec::new(), log);
            });
        });
    });
}

/// Connects clients one after another until 100 answers count. Each client connects only when all
/// workers wait in `accept`. `answers` contains the answers since the rotation began.
fn next(master: &Master, address: SocketAddr, mut answers: Vec<String>, log: Log) {
    if log.len() == 100 {
        let ledger = master.ledger();
        assert_eq!(ledger.accepted, ledger.received);
        return master.disconnect();
    }
    when_all_wait(master, move |master| {
        let before = count_returned(master);
        let work = move || talk(address, b"x").unwrap();
        in_background(master, work, move |master, id| {
            if count_returned(master) > before {
                return begin_rotation(master, address, log);
            }
            match answers.len().checked_sub(WORKERS) {
                Some(last) => assert_eq!(id, answers[last], "{answers:?}"),
                None => assert!(!answers.contains(&id), "{answers:?} and {id}"),
            }
            answers.push(id.clone());
            log.add(id);
            next(master, address, answers, log);
        });
    });
}

fn slow_request_does_not_delay_other_clients() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                let work = move || {
                    let mut slow = TcpStream::connect(address).unwrap();
                    let quick: Vec<_> = (0..20).map(|_| talk(address, b"x").unwrap()).collect();
                    slow.write_all(b"x").unwrap();
                    let mut answer = String::new();
                    slow.read_to_string(&mut answer).unwrap();
                    let other = if answer == "1" { "2" } else { "1" };
                    quick.iter().filter(|answer| *answer == other).count()
                };
                in_background(master, work, move |master, by_other| {
                    log.add(by_other.to_string());
                    master.disconnect();
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

/// Connects a client, and sends its request immediately.
fn request(address: SocketAddr) -> TcpStream {
    let mut client = TcpStream::connect(address).unwrap();
    client.write_all(b"x").unwrap();
    client
}

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

/// Sends `request` from each client.
fn ask(clients: &mut [TcpStream], request: &[u8]) {
    for client in clients {
        client.write_all(request).unwrap();
    }
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

/// Closes the client's connection with a reset.
fn reset(client: TcpStream) {
    let linger = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    nix::sys::socket::setsockopt(&client, nix::sys::socket::sockopt::Linger, &linger).unwrap();
}

fn callback_workers_hold_many_connections() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                let work = move || {
                    let connect = |_| TcpStream::connect(address).unwrap();
                    let mut clients: Vec<_> = (0..100).map(connect).collect();
                    let mut echoed = 0;
                    for round in 0..3u8 {
                        for client in &mut clients {
                            client.write_all(&[round]).unwrap();
                        }
                        for client in &mut clients {
                            let mut byte = [9];
                            client.read_exact(&mut byte).unwrap();
                            echoed += usize::from(byte == [round]);
                        }
                    }
                    echoed
                };
                in_background(master, work, move |master, echoed| {
                    log.add(echoed.to_string());
                    master.disconnect();
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(|worker, connection| {
                let echo = |_: &Worker, mut connection: &Connection| {
                    let mut byte = [0];
                    match connection.read(&mut byte) {
                        Ok(1) => connection.write_all(&byte).ok()?,
                        _ => return None,
                    }
                    Some(Interest::Readable)
                };
                worker.watch(connection, Interest::Readable, echo).unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["300"]);
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

/// Checks that a connection is served although a signal arrives together with it, and the signal's
/// callback closes the listener.
fn callback_inside_accept_cannot_lose_the_connection() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 1, move |master, address| {
                when_all_wait(master, move |master| {
                    let worker = master.workers().remove(0);
                    stop(&worker);
                    let connect = move || TcpStream::connect(address).unwrap();
                    in_background(master, connect, move |master, client| {
                        when_accepted(master, 1, move |_| {
                            worker.process().kill(Signal::USR1);
                            worker.process().kill(Signal::CONT);
                        });
                        let read = move || read_all(vec![client]).remove(0);
                        in_background(master, read, move |_, answer| log.add(answer));
                    });
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            answer_pings(&worker);
            let listener = Rc::new(worker.listen("127.0.0.1:0").unwrap());
            let own = Rc::downgrade(&listener);
            let close = move |_: &Worker, _| own.upgrade().unwrap().close();
            worker.on_signal(Signal::USR1, close).unwrap();
            for connection in listener.incoming() {
                connection.unwrap().write_all(b"served").unwrap();
            }
            worker.disconnect().run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["served"]);
}

fn clients_cannot_exhaust_a_workers_descriptors() {
    const CLIENTS: usize = 120;
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.on_error(|_, _, error| panic!("{error}"));
            when_listening(master, 1, move |master, address| {
                let work = move || {
                    let connect = |_| TcpStream::connect(address).unwrap();
                    let clients: Vec<_> = (0..CLIENTS).map(connect).collect();
                    let mut answered = 0;
                    // Read and drop one client after another, because each disconnect frees
                    // capacity for the next client.
                    for mut client in clients {
                        client.read_exact(&mut [0]).unwrap();
                        answered += 1;
                    }
                    answered
                };
                in_background(master, work, move |master, answered| {
                    log.add(answered.to_string());
                    assert_eq!(master.ledger().accepted, 120);
                    master.disconnect();
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            use nix::sys::resource::{Resource, getrlimit, setrlimit};
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(|worker, mut connection| {
                connection.write_all(b"x").unwrap();
                hold(worker, connection);
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), [CLIENTS.to_string()]);
}
