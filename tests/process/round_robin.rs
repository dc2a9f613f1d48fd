//! Who gets the connections, and that none is lost.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::rc::Rc;
use std::time::Duration;

use cluster::{Interest, Signal};

use crate::harness::{
    Log, answer_pings, cluster, in_background, rest, serve_id, stop, talk, when_all_wait,
    when_listening,
};

crate::scenarios! {
    sequential_connections_rotate_exactly
    a_slow_request_holds_up_nobody_else
    busy_workers_leave_connections_to_the_kernel
    a_connection_outlives_the_worker_it_was_given_to
    a_client_that_leaves_while_it_waits_is_counted
    callback_workers_hold_many_connections
    clients_cannot_use_up_a_workers_descriptors
    what_a_callback_has_not_got_goes_to_others
    a_connection_that_was_taken_is_not_given_again
    a_callback_inside_accept_cannot_lose_the_connection
}

fn sequential_connections_rotate_exactly() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 4, move |master, address| next(master, address, log));
            (0..4).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            answer_pings(&worker);
            serve_id(&worker, "127.0.0.1:0");
        },
    );
    let entries = entries.take();
    for round in entries.chunks(4) {
        assert_eq!(round, &entries[..4]);
    }
    let everybody: BTreeSet<_> = entries[..4].iter().collect();
    assert_eq!((entries.len(), everybody.len()), (100, 4));
}

/// One connection after the other, each when everybody waits for one.
fn next(master: &cluster::Master, address: SocketAddr, log: Log) {
    when_all_wait(master, move |master| {
        let work = move || talk(address, b"").unwrap();
        in_background(master, work, move |master, id| {
            log.add(id);
            if log.len() < 100 {
                return next(master, address, log);
            }
            let ledger = master.ledger();
            assert_eq!((ledger.accepted, ledger.taken), (100, 100));
            master.disconnect(|_| {});
        });
    });
}

/// Reads one byte, answers the id: a client that says nothing keeps the worker.
fn serve_after_one_byte(worker: &cluster::Worker) {
    answer_pings(worker);
    for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
        let mut connection = connection.unwrap();
        if connection.read_exact(&mut [0]).is_ok() {
            let id = worker.id().to_string();
            let _ = connection.write_all(id.as_bytes());
        }
    }
}

fn a_slow_request_holds_up_nobody_else() {
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
                    master.disconnect(|_| {});
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
                    // All thirty are connected, and two workers hold one each.
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
                        master.disconnect(|_| {});
                    });
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["30"]);
}

/// Two idle workers wait in `accept`, and the one whose turn it is has been stopped.
fn with_a_stopped_worker(
    master: &cluster::Master,
    then: impl FnOnce(&cluster::Master, SocketAddr, cluster::WorkerProcess) + 'static,
) {
    when_listening(master, 2, move |master, address| {
        // It is not the turn of whoever was the last.
        let round = move || [(); 2].map(|()| talk(address, b"x").unwrap());
        in_background(master, round, move |master, [_, last]| {
            when_all_wait(master, move |master| {
                let is_next = |worker: &cluster::WorkerProcess| worker.id().to_string() != last;
                let next = master.workers().into_iter().find(is_next).unwrap();
                stop(&next);
                then(master, address, next);
            });
        });
    });
    (0..2).for_each(|_| drop(master.fork().unwrap()));
}

fn a_connection_outlives_the_worker_it_was_given_to() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            with_a_stopped_worker(master, move |master, address, stopped| {
                // The first is given to the stopped worker, the second to the other one.
                let second = move || {
                    let mut first = TcpStream::connect(address).unwrap();
                    first.write_all(b"x").unwrap();
                    (first, talk(address, b"x").unwrap())
                };
                in_background(master, second, move |master, (mut first, second)| {
                    assert_eq!(master.ledger().in_hand(), 1, "with the stopped worker");
                    assert_ne!(second, stopped.id().to_string());
                    stopped.process().kill(Signal::KILL);
                    let read = move || {
                        let mut answer = String::new();
                        first.read_to_string(&mut answer).unwrap();
                        answer
                    };
                    in_background(master, read, move |master, answer| {
                        assert_eq!(answer, second, "the other worker served it");
                        let ledger = master.ledger();
                        assert_eq!((ledger.accepted, ledger.taken), (4, 4));
                        log.add("served");
                        master.disconnect(|_| {});
                    });
                });
            });
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["served"]);
}

fn a_client_that_leaves_while_it_waits_is_counted() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            with_a_stopped_worker(master, move |master, address, stopped| {
                // The second keeps the other worker busy, so that the first has nobody to go to
                // when the stopped worker dies.
                let clients = move || [(); 2].map(|()| TcpStream::connect(address).unwrap());
                in_background(master, clients, move |master, [first, mut second]| {
                    let victim = stopped.clone();
                    until(master, move |master| {
                        let taken = master.ledger().taken == 3;
                        if taken {
                            victim.process().kill(Signal::KILL);
                        }
                        taken
                    });
                    let clients = RefCell::new(Some(first));
                    stopped.on_exit(move |master, _, _| {
                        assert_eq!(master.ledger().in_hand(), 1, "waits in the master");
                        reset(clients.take().unwrap());
                        second.write_all(b"x").unwrap();
                    });
                });
                let log = log.clone();
                let all_done = move |master: &cluster::Master| {
                    let ledger = master.ledger();
                    if ledger.closed_by_peer == 1 && log.len() == 0 {
                        log.add(format!("{} of {}", ledger.taken, ledger.accepted));
                        master.disconnect(|_| {});
                    }
                    ledger.closed_by_peer == 1
                };
                until(master, all_done);
            });
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["3 of 4"]);
}

/// Asks every millisecond.
fn until(master: &cluster::Master, done: impl Fn(&cluster::Master) -> bool + 'static) {
    master.set_timeout(Duration::from_millis(1), move |master| {
        if !done(master) {
            until(master, done);
        }
    });
}

/// Closes so that the other side gets a reset.
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
                    master.disconnect(|_| {});
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.on_connection(|worker, connection| {
                let echo = |_: &cluster::Worker, mut connection: &cluster::Connection| {
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

/// Two callback workers; the first has several connections under way when its callback, at the
/// first of them, closes the listener or breaks down.
fn what_a_callback_has_not_got_goes_to_others() {
    for how in ["close", "abort"] {
        if std::env::var_os("HOW").is_none_or(|own| own == how) {
            callback_that_ends(how);
        }
    }
}

fn callback_that_ends(how: &'static str) {
    // A process has one cluster: the two ways are played by children of this one.
    if std::env::var_os("HOW").is_none() {
        let own = std::env::current_exe().unwrap();
        let status = std::process::Command::new(own).env("HOW", how).status();
        return assert!(status.unwrap().success(), "{how}");
    }
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 1, move |master, address| {
                when_all_wait(master, move |master| {
                    let first = master.workers().remove(0);
                    stop(&first);
                    // All of these are given to the only worker there is.
                    let connect = move |_| TcpStream::connect(address).unwrap();
                    let clients: Vec<_> = (0..5).map(connect).collect();
                    when_accepted(master, 5, move |master| {
                        let second = master.fork_with([("SECOND", "1")]).unwrap();
                        second.on_listening(move |_, _, _| first.process().kill(Signal::CONT));
                        in_background(
                            master,
                            move || read_all(clients),
                            move |master, answers| {
                                log.add(answers.join(" "));
                                master.disconnect(|_| {});
                            },
                        );
                    });
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            answer_pings(&worker);
            let listener = Rc::new(worker.listen("127.0.0.1:0").unwrap());
            let own = Rc::downgrade(&listener);
            let is_second = std::env::var_os("SECOND").is_some();
            listener.on_connection(move |_, mut connection| {
                if is_second {
                    return connection.write_all(b"second").unwrap();
                }
                connection.write_all(b"first").unwrap();
                match how {
                    "close" => own.upgrade().unwrap().close(),
                    _ => std::process::abort(),
                }
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["first second second second second"]);
}

/// Reads each answer to its end; in alphabetical order.
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

/// Calls back when the master has accepted, and given, so many.
fn when_accepted(
    master: &cluster::Master,
    count: u64,
    then: impl FnOnce(&cluster::Master) + 'static,
) {
    let then = RefCell::new(Some(then));
    until(master, move |master| {
        let accepted = master.ledger().accepted == count;
        if accepted {
            then.take().unwrap()(master);
        }
        accepted
    });
}

/// The master cuts a worker off in a callback for its message; the word that the worker has taken
/// another connection arrived together with the message, and has not been looked at.
fn a_connection_that_was_taken_is_not_given_again() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 1, move |master, address| {
                when_all_wait(master, move |master| {
                    let first = master.workers().remove(0);
                    stop(&first);
                    let connect = move |_| TcpStream::connect(address).unwrap();
                    let clients: Vec<_> = (0..2).map(connect).collect();
                    // Both are given to the first; only then there is another worker.
                    when_accepted(master, 2, move |master| {
                        first.on_message(|_, worker, _| worker.process().disconnect());
                        let second = master.fork().unwrap();
                        let waiting = RefCell::new(Some((first, clients, log)));
                        second.on_listening(move |master, _, _| {
                            let (first, mut clients, log) = waiting.take().unwrap();
                            first.process().kill(Signal::CONT);
                            for client in &mut clients {
                                client.read_exact(&mut [0]).unwrap();
                            }
                            rest(&first);
                            in_background(
                                master,
                                move || read_all(clients),
                                move |master, more| {
                                    log.add(more.concat());
                                    master.disconnect(|_| {});
                                },
                            );
                        });
                    });
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            answer_pings(&worker);
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let served = RefCell::new(Vec::new());
            listener.on_connection(move |worker, mut connection| {
                connection.write_all(b"x").unwrap();
                worker.send(b"served one").unwrap();
                // Open until the end, so that only the master's own copy could give an answer.
                served.borrow_mut().push(connection);
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), [""], "a second answer");
}

/// A connection and a signal come at once, and the signal's callback closes the listener.
fn a_callback_inside_accept_cannot_lose_the_connection() {
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
            let close = move |_: &cluster::Worker, _| own.upgrade().unwrap().close();
            worker.on_signal(Signal::USR1, close).unwrap();
            for connection in listener.incoming() {
                connection.unwrap().write_all(b"served").unwrap();
            }
            worker.disconnect().run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["served"]);
}

fn clients_cannot_use_up_a_workers_descriptors() {
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
                    // Each that leaves makes room for another.
                    for mut client in clients {
                        client.read_exact(&mut [0]).unwrap();
                        answered += 1;
                    }
                    answered
                };
                in_background(master, work, move |master, answered| {
                    log.add(answered.to_string());
                    assert_eq!(master.ledger().accepted, 120);
                    master.disconnect(|_| {});
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            use nix::sys::resource::{Resource, getrlimit, setrlimit};
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.on_connection(|worker, mut connection| {
                connection.write_all(b"x").unwrap();
                // Held until its client leaves.
                let watch = |_: &cluster::Worker, mut connection: &cluster::Connection| {
                    let _ = connection.read(&mut [0]);
                    None
                };
                worker.watch(connection, Interest::Readable, watch).unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), [CLIENTS.to_string()]);
}
