//! Tests applications that choose the worker for each connection.

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use cluster::{Master, Role, Signal, Worker, WorkerId, WorkerLoad, WorkerProcess};

use crate::harness::{
    Log, answer_pings, cluster, in_background, serve_after_one_byte, serve_id, stop, talk, when,
    when_all_wait, when_listening,
};

crate::scenarios! {
    scheduler_chooses_by_the_peer_address
    scheduler_sees_no_peer_address_of_a_unix_socket
    scheduler_sees_the_loads
    no_choice_means_round_robin
    choice_of_a_worker_that_is_no_candidate_means_round_robin
    busy_worker_receives_chosen_connections_later
    client_of_a_killed_chosen_worker_is_served_once
    disconnecting_worker_is_not_chosen_again
    master_accepts_at_most_sixteen_connections_per_worker
    latest_scheduler_is_called
    scheduler_may_replace_itself
    waiting_clients_that_disconnect_reach_no_worker
    scheduler_may_send_messages
}

fn answer_ids(worker: &Worker) {
    answer_pings(worker);
    serve_id(worker, "127.0.0.1:0");
}

/// Returns the candidate with this ID.
fn candidate(number: u32, workers: &[WorkerLoad]) -> Option<WorkerId> {
    let mut ids = workers.iter().map(|load| load.worker);
    ids.find(|id| id.get() == number)
}

/// Sends a byte and returns the answer.
fn finish(mut client: TcpStream) -> String {
    client.write_all(b"x").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}

fn fork_two(master: &Master) {
    (0..2).for_each(|_| drop(master.fork().unwrap()));
}

/// Returns a worker's ID for the peer, based on the last digit of the peer's port.
fn chosen_for(peer: SocketAddr) -> u32 {
    1 + u32::from(peer.port()) % 10 % 3
}

fn scheduler_chooses_by_the_peer_address() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduler(|peer, workers| {
                let ids: Vec<_> = workers.iter().map(|load| load.worker.get()).collect();
                assert_eq!(ids, [1, 2, 3]);
                candidate(chosen_for(peer.unwrap()), workers)
            });
            when_listening(master, 3, move |master, address| {
                let work = move || {
                    for _ in 0..300 {
                        let client = TcpStream::connect(address).unwrap();
                        let own = client.local_addr().unwrap();
                        assert_eq!(finish(client), chosen_for(own).to_string());
                    }
                };
                in_background(master, work, move |master, ()| {
                    assert_eq!(master.ledger().received, 300);
                    log.add("all served as chosen");
                    master.disconnect();
                });
            });
            (0..3).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["all served as chosen"]);
}

fn scheduler_sees_no_peer_address_of_a_unix_socket() {
    const PATH: &str = "SCHEDULER_PATH";
    let directory = cluster::is_master().then(|| tempfile::tempdir().unwrap());
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let calls = log.clone();
            master.set_scheduler(move |peer, workers| {
                calls.add(format!("{peer:?}"));
                candidate(1, workers)
            });
            let path = directory.as_ref().unwrap().path().join("socket");
            let only = master.fork_with([(PATH, &path)]).unwrap();
            only.on_listening(move |master, only, _| {
                let path = path.clone();
                let work = move || {
                    let mut answer = String::new();
                    let mut client = UnixStream::connect(path).unwrap();
                    client.read_to_string(&mut answer).unwrap();
                    answer
                };
                let (log, only) = (log.clone(), only.clone());
                in_background(master, work, move |_, answer| {
                    log.add(answer);
                    only.disconnect();
                });
            });
        },
        |worker| {
            let path = PathBuf::from(std::env::var_os(PATH).unwrap());
            for connection in worker.listen(path.as_path()).unwrap().incoming() {
                connection.unwrap().write_all(b"served").unwrap();
            }
        },
    );
    assert_eq!(entries.take(), ["None", "served"]);
}

/// Checks that the loads that the scheduler receives do not yet include the connection for which it
/// chooses a worker.
fn scheduler_sees_the_loads() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (seen, shown) = (log.clone(), log);
            master.set_scheduler(move |_, workers| {
                let loads = workers.iter().map(|load| (load.dispatched, load.queued()));
                seen.add(format!("{:?}", loads.collect::<Vec<_>>()));
                let least_loaded = workers
                    .iter()
                    .min_by_key(|load| (load.dispatched, load.worker));
                least_loaded.map(|load| load.worker)
            });
            when_listening(master, 2, move |master, address| {
                when_all_wait(master, move |master| {
                    master.workers().iter().for_each(stop);
                    let clients = move || [(); 4].map(|()| TcpStream::connect(address).unwrap());
                    in_background(master, clients, move |master, clients| {
                        when(
                            master,
                            move |_| shown.len() == 4,
                            move |master| {
                                for worker in master.workers() {
                                    worker.process().kill(Signal::CONT);
                                }
                                in_background(
                                    master,
                                    || clients.map(finish),
                                    |master, answers| {
                                        assert_eq!(answers, ["1", "2", "1", "2"]);
                                        master.disconnect();
                                    },
                                );
                            },
                        );
                    });
                });
            });
            fork_two(master);
        },
        |worker| serve_after_one_byte(&worker),
    );
    let expected = [
        "[(0, 0), (0, 0)]",
        "[(1, 1), (0, 0)]",
        "[(1, 1), (1, 1)]",
        "[(2, 2), (1, 1)]",
    ];
    assert_eq!(entries.take(), expected);
}

fn no_choice_means_round_robin() {
    assert_round_robin(|_| None);
}

/// Checks that the master uses round robin if the scheduler chooses a worker that is not a
/// candidate. The chosen worker has been forked but does not listen.
fn choice_of_a_worker_that_is_no_candidate_means_round_robin() {
    assert_round_robin(Some);
}

fn assert_round_robin(choose: fn(WorkerId) -> Option<WorkerId>) {
    const SILENT: &str = "SILENT";
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let no_candidate = master.fork_with([(SILENT, "1")]).unwrap().id();
            master.set_scheduler(move |_, workers| {
                assert_eq!(candidate(no_candidate.get(), workers), None);
                choose(no_candidate)
            });
            when_listening(master, 2, move |master, address| {
                connect_next(master, address, log)
            });
            fork_two(master);
        },
        |worker| {
            if std::env::var_os(SILENT).is_some() {
                answer_pings(&worker);
                return worker.run().unwrap();
            }
            answer_ids(&worker);
        },
    );
    let entries = entries.take();
    let (first, second) = (&entries[0], &entries[1]);
    assert_ne!(first, second);
    for turns in entries.chunks(2) {
        assert_eq!(turns, [first.clone(), second.clone()]);
    }
    assert_eq!(entries.len(), 40);
}

/// Connects clients one after another. Before each client, waits until every worker waits for a
/// connection.
fn connect_next(master: &Master, address: SocketAddr, log: Log) {
    when_all_wait(master, move |master| {
        in_background(
            master,
            move || talk(address, b"").unwrap(),
            move |master, id| {
                log.add(id);
                if log.len() < 40 {
                    return connect_next(master, address, log);
                }
                master.disconnect();
            },
        );
    });
}

fn busy_worker_receives_chosen_connections_later() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let calls = log.clone();
            master.set_scheduler(move |_, workers| {
                calls.add("called");
                candidate(1, workers)
            });
            when_listening(master, 2, move |master, address| {
                let clients = move || [(); 3].map(|()| TcpStream::connect(address).unwrap());
                in_background(master, clients, move |master, [first, second, third]| {
                    let served = |master: &Master| {
                        let ledger = master.ledger();
                        (ledger.accepted, ledger.received) == (3, 1)
                    };
                    when(master, served, move |master| {
                        // Worker 2 is idle all the time. If the master wrongly dispatched a
                        // connection to it, this would happen within 100 ms.
                        master.set_timeout(Duration::from_millis(100), move |master| {
                            assert_eq!(master.ledger().received, 1);
                            let work = move || [first, second, third].map(finish);
                            in_background(master, work, move |master, answers| {
                                log.add(answers.join(" "));
                                master.disconnect();
                            });
                        });
                    });
                });
            });
            fork_two(master);
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["called", "called", "called", "1 1 1"]);
}

/// Stops the first worker, connects three clients, and calls `then` once the master has accepted
/// them. The scheduler chooses the first worker as long as that worker is a candidate.
fn with_clients_of_a_stopped_worker(
    master: &Master,
    log: &Log,
    then: impl FnOnce(&Master, WorkerProcess, [TcpStream; 3]) + 'static,
) {
    let calls = log.clone();
    master.set_scheduler(move |_, workers| {
        calls.add(format!("{} may be chosen", workers.len()));
        candidate(1, workers).or(candidate(2, workers))
    });
    when_listening(master, 2, move |master, address| {
        when_all_wait(master, move |master| {
            let first = master.workers().remove(0);
            stop(&first);
            let clients = move || [(); 3].map(|()| TcpStream::connect(address).unwrap());
            in_background(master, clients, move |master, clients| {
                let accepted = |master: &Master| master.ledger().accepted == 3;
                when(master, accepted, move |master| then(master, first, clients));
            });
        });
    });
    fork_two(master);
}

const CALLED_AGAIN: [&str; 6] = [
    "2 may be chosen",
    "2 may be chosen",
    "2 may be chosen",
    "1 may be chosen",
    "1 may be chosen",
    "1 may be chosen",
];

fn client_of_a_killed_chosen_worker_is_served_once() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let outcome = log.clone();
            with_clients_of_a_stopped_worker(master, &log, move |master, first, clients| {
                first.process().kill(Signal::KILL);
                in_background(
                    master,
                    || clients.map(finish),
                    move |master, answers| {
                        assert_eq!(answers, ["2", "2", "2"]);
                        let ledger = master.ledger();
                        assert_eq!((ledger.accepted, ledger.received), (3, 3));
                        outcome.add("served");
                        master.disconnect();
                    },
                );
            });
        },
        |worker| serve_after_one_byte(&worker),
    );
    let entries = entries.take();
    assert_eq!(entries[..6], CALLED_AGAIN);
    assert_eq!(entries[6..], ["served"]);
}

/// Checks that a disconnecting worker is not chosen. A callback disconnects the worker, and no
/// other event makes the master call the scheduler.
fn disconnecting_worker_is_not_chosen_again() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let outcome = log.clone();
            with_clients_of_a_stopped_worker(master, &log, move |master, first, clients| {
                let stopped = first.clone();
                let second = master.workers().remove(1);
                second.on_message_once(move |_, _, _| {
                    stopped.disconnect();
                });
                let _ = second.send(b"ping").unwrap();
                in_background(
                    master,
                    || clients.map(finish),
                    move |master, answers| {
                        assert_eq!(answers, ["2", "2", "2"]);
                        outcome.add("served");
                        first.process().kill(Signal::CONT);
                        master.disconnect();
                    },
                );
            });
        },
        |worker| serve_after_one_byte(&worker),
    );
    let entries = entries.take();
    assert_eq!(entries[..6], CALLED_AGAIN);
    assert_eq!(entries[6..], ["served"]);
}

fn master_accepts_at_most_sixteen_connections_per_worker() {
    const CLIENTS: usize = 100;
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduler(|_, workers| candidate(1, workers));
            when_listening(master, 2, move |master, address| {
                when_all_wait(master, move |master| {
                    let chosen = master.workers().remove(0);
                    stop(&chosen);
                    let clients = move || {
                        let connect = |_| TcpStream::connect(address).unwrap();
                        (0..CLIENTS).map(connect).collect::<Vec<_>>()
                    };
                    in_background(master, clients, move |master, clients| {
                        let is_reached = |master: &Master| master.ledger().accepted >= 2 * 16;
                        when(master, is_reached, move |master| {
                            // All clients are connected. A master without a limit would accept more
                            // clients within 100 ms.
                            master.set_timeout(Duration::from_millis(100), move |master| {
                                assert_eq!(master.ledger().accepted, 2 * 16);
                                chosen.process().kill(Signal::CONT);
                                let work = || clients.into_iter().map(finish).collect::<Vec<_>>();
                                in_background(master, work, move |master, answers| {
                                    assert_eq!(answers, ["1"; CLIENTS]);
                                    log.add("all");
                                    master.disconnect();
                                });
                            });
                        });
                    });
                });
            });
            fork_two(master);
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["all"]);
}

fn latest_scheduler_is_called() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                let ask = move || [(); 8].map(|()| talk(address, b"").unwrap());
                master.set_scheduler(|_, workers| candidate(1, workers));
                in_background(master, ask, move |master, answers| {
                    log.add(answers.concat());
                    master.set_scheduler(|_, workers| candidate(2, workers));
                    in_background(master, ask, move |master, answers| {
                        log.add(answers.concat());
                        master.disconnect();
                    });
                });
            });
            fork_two(master);
        },
        |worker| answer_ids(&worker),
    );
    assert_eq!(entries.take(), ["11111111", "22222222"]);
}

/// Checks that a scheduler can install another scheduler while it runs.
fn scheduler_may_replace_itself() {
    let log = Log::default();
    let entries = log.clone();
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let master = Rc::new(master);
            let weak = Rc::downgrade(&master);
            let first = log.clone();
            master.set_scheduler(move |_, workers| {
                first.add("first");
                let second = first.clone();
                let master = weak.upgrade().unwrap();
                master.set_scheduler(move |_, workers| {
                    second.add("second");
                    candidate(2, workers)
                });
                candidate(1, workers)
            });
            when_listening(&master, 2, move |master, address| {
                let ask = move || [(); 3].map(|()| talk(address, b"").unwrap());
                in_background(master, ask, move |master, answers| {
                    log.add(answers.concat());
                    master.disconnect();
                });
            });
            fork_two(&master);
            master.run().unwrap();
        }
        Role::Worker(worker) => return answer_ids(&worker),
    }
    assert_eq!(entries.take(), ["first", "second", "second", "122"]);
}

/// Checks that the master closes a connection whose client disconnects while the connection waits
/// for a busy worker. More clients wait than the master checks in one iteration.
fn waiting_clients_that_disconnect_reach_no_worker() {
    const WAITING: usize = 12;
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduler(|_, workers| candidate(1, workers));
            when_listening(master, 2, move |master, address| {
                when_all_wait(master, move |master| {
                    let stopped = master.workers().remove(0);
                    stop(&stopped);
                    let connect = move || {
                        let connect = |_| TcpStream::connect(address).unwrap();
                        (0..16 + WAITING).map(connect).collect::<Vec<_>>()
                    };
                    in_background(master, connect, move |master, mut clients| {
                        let accepted = |m: &Master| m.ledger().accepted == 16 + WAITING as u64;
                        when(master, accepted, move |master| {
                            // The worker's queue holds the first 16 connections, so the others wait
                            // in the master.
                            let waiting = clients.split_off(16);
                            waiting.into_iter().for_each(reset);
                            stopped.process().kill(Signal::CONT);
                            let work = || clients.into_iter().map(finish).collect::<Vec<_>>();
                            in_background(master, work, move |master, answers| {
                                assert_eq!(answers, ["1"; 16]);
                                let is_empty = |master: &Master| master.ledger().in_flight() == 0;
                                when(master, is_empty, move |master| {
                                    let ledger = master.ledger();
                                    let closed = ledger.closed_by_peer;
                                    log.add(format!("{} served, {closed} closed", ledger.received));
                                    master.disconnect();
                                });
                            });
                        });
                    });
                });
            });
            fork_two(master);
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["16 served, 12 closed"]);
}

/// Closes the connection with a reset.
fn reset(client: TcpStream) {
    use nix::sys::socket::{setsockopt, sockopt::Linger};

    let (l_onoff, l_linger) = (1, 0);
    setsockopt(&client, Linger, &nix::libc::linger { l_onoff, l_linger }).unwrap();
}

fn scheduler_may_send_messages() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                let workers = master.workers();
                let calls = Rc::new(Cell::new(0));
                let own = Rc::clone(&calls);
                master.set_scheduler(move |_, candidates| {
                    own.set(own.get() + 1);
                    for worker in &workers {
                        let _ = worker.send(b"ping").unwrap();
                    }
                    candidate(2, candidates)
                });
                let ask = move || [(); 8].map(|()| talk(address, b"").unwrap());
                in_background(master, ask, move |master, answers| {
                    log.add(format!("{} {}", calls.get(), answers.concat()));
                    master.disconnect();
                });
            });
            fork_two(master);
        },
        |worker| answer_ids(&worker),
    );
    assert_eq!(entries.take(), ["8 22222222"]);
}
