//! The figures of `Master::loads`, each where it can be known exactly.

use std::cell::RefCell;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use cluster::{
    Address, Connection, ListenerLoad, Master, SchedulingPolicy, Signal, Worker, WorkerLoad,
    WorkerProcess,
};

use crate::harness::{
    Log, answer_pings, cluster, in_background, serve_id, stop, talk, wait_until, when_all_wait,
    when_listening,
};

crate::scenarios! {
    loads_of_workers_that_have_had_nothing
    loads_tell_what_was_given_and_taken
    loads_tell_what_is_open
    loads_tell_what_others_got
    loads_tell_what_waits_for_a_worker
    loads_outlive_a_listener
    loads_are_of_those_who_live
    loads_tell_who_waits_in_the_kernel
    loads_of_a_shared_listener_tell_who_waits
    loads_of_shards_tell_who_waits
    loads_of_listeners_come_in_order
}

fn load_of(master: &Master, worker: &WorkerProcess) -> WorkerLoad {
    let loads = master.loads().workers;
    let mut own = loads.iter().filter(|load| load.worker == worker.id());
    *own.next().unwrap()
}

/// Given, taken, open, refused.
fn figures(load: &WorkerLoad) -> [u64; 4] {
    [load.given, load.taken, load.open, load.refused]
}

fn of_listener(master: &Master) -> ListenerLoad {
    let mut listeners = master.loads().listeners;
    assert_eq!(listeners.len(), 1, "{listeners:?}");
    listeners.remove(0)
}

fn connect(address: SocketAddr, clients: usize) -> Vec<TcpStream> {
    let connect = |_| TcpStream::connect(address).unwrap();
    (0..clients).map(connect).collect()
}

/// What each client hears.
fn read_all(clients: Vec<TcpStream>) -> Vec<String> {
    let read = |mut client: TcpStream| {
        let _ = client.write_all(b"x");
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    };
    clients.into_iter().map(read).collect()
}

/// Reads one byte before it answers, so that whoever says nothing is held.
fn serve_after_one_byte(worker: &Worker) {
    answer_pings(worker);
    for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
        let mut connection = connection.unwrap();
        let _ = connection.read(&mut [0]);
        let id = worker.id().to_string();
        let _ = connection.write_all(id.as_bytes());
    }
}

fn loads_of_workers_that_have_had_nothing() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            assert_eq!(master.loads(), cluster::Loads::default());
            (0..2).for_each(|_| drop(master.fork().unwrap()));
            let loads = master.loads();
            let ids: Vec<_> = loads.workers.iter().map(|load| load.worker.get()).collect();
            assert_eq!((ids, loads.listeners), (vec![1, 2], Vec::new()));
            when_listening(master, 2, move |master, address| {
                let loads = master.loads();
                let figures: Vec<_> = loads.workers.iter().map(figures).collect();
                assert_eq!(figures, [[0; 4]; 2]);
                let own = of_listener(master);
                assert_eq!(own.address.to_string(), address.to_string());
                assert_eq!((own.accepted, own.queued), (0, Some(0)));
                log.add("nothing");
                master.disconnect(|master| {
                    assert_eq!(master.loads(), cluster::Loads::default());
                });
            });
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    assert_eq!(entries.take(), ["nothing"]);
}

fn loads_tell_what_was_given_and_taken() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                next(master, address, 0, log)
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            answer_pings(&worker);
            serve_id(&worker, "127.0.0.1:0");
        },
    );
    assert_eq!(entries.take(), ["20"]);
}

/// So many have been served, one after the other, and everybody waits for one.
fn next(master: &Master, address: SocketAddr, served: u64, log: Log) {
    when_all_wait(master, move |master| {
        let mut figures: Vec<_> = master.loads().workers.iter().map(figures).collect();
        figures.sort();
        let (less, more) = (served / 2, served.div_ceil(2));
        assert_eq!(figures, [[less, less, 0, 0], [more, more, 0, 0]]);
        let own = of_listener(master);
        assert_eq!((own.accepted, own.queued), (served, Some(0)));
        if served == 20 {
            log.add(served.to_string());
            return master.disconnect(|_| {});
        }
        in_background(
            master,
            move || talk(address, b"").unwrap(),
            move |master, _| {
                next(master, address, served + 1, log);
            },
        );
    });
}

/// Holds what it is given, and closes those that come first when it is told how many.
fn hold(worker: &Worker) {
    let held = Rc::new(RefCell::new(Vec::<Connection>::new()));
    let own = Rc::clone(&held);
    worker.on_message(move |worker, message| match message.bytes() {
        b"ping" => drop(worker.send(b"pong")),
        count => {
            let gone: Vec<_> = own.borrow_mut().drain(..usize::from(count[0])).collect();
            drop(gone);
        }
    });
    let listener = worker.listen("127.0.0.1:0").unwrap();
    listener.on_connection(move |_, connection| held.borrow_mut().push(connection));
    worker.run().unwrap();
}

/// "What it closes while it has nothing to take is known when half of them are gone."
fn loads_tell_what_is_open() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let only = master.fork().unwrap();
            when_listening(master, 1, move |master, address| {
                let clients = connect(address, 8);
                let seen = log.clone();
                until_taken(master, 8, move |master| {
                    when_all_wait(master, move |master| {
                        assert_eq!(figures(&load_of(master, &only)), [8, 8, 8, 0]);
                        close(master, &only, 3, move |master, only| {
                            let open = load_of(master, &only).open;
                            assert!((5..=8).contains(&open), "{open}");
                            close(master, &only, 1, move |master, only| {
                                assert_eq!(figures(&load_of(master, &only)), [8, 8, 4, 0]);
                                close(master, &only, 4, move |master, only| {
                                    assert_eq!(figures(&load_of(master, &only)), [8, 8, 0, 0]);
                                    drop(clients);
                                    seen.add("none");
                                    only.disconnect();
                                });
                            });
                        });
                    });
                });
            });
        },
        |worker| hold(&worker),
    );
    assert_eq!(entries.take(), ["none"]);
}

/// Calls back when the worker has closed so many.
fn close(
    master: &Master,
    worker: &WorkerProcess,
    count: u8,
    then: impl FnOnce(&Master, WorkerProcess) + 'static,
) {
    worker.send(&[count]).unwrap();
    let worker = worker.clone();
    when_all_wait(master, move |master| then(master, worker));
}

/// Calls back when workers have taken so many.
fn until_taken(master: &Master, count: u64, then: impl FnOnce(&Master) + 'static) {
    master.set_timeout(Duration::from_millis(1), move |master| {
        if master.ledger().taken == count {
            then(master);
        } else {
            until_taken(master, count, then);
        }
    });
}

/// What an idle worker that has been stopped does not take goes to another.
fn loads_tell_what_others_got() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                when_all_wait(master, move |master| {
                    let [first, second] = <[_; 2]>::try_from(master.workers()).unwrap();
                    stop(&first);
                    let answers = move || [(); 4].map(|()| talk(address, b"x").unwrap());
                    in_background(master, answers, move |master, answers| {
                        assert_eq!(answers, ["2"; 4]);
                        let [given, taken, open, refused] = figures(&load_of(master, &first));
                        assert_eq!((taken, open), (0, 0), "it has been stopped");
                        assert_eq!(given, refused, "all that it was given");
                        assert!(refused >= 1);
                        let [given, taken, _, refused] = figures(&load_of(master, &second));
                        assert_eq!((given, taken, refused), (4, 4, 0));
                        assert_eq!(of_listener(master).accepted, 4);
                        first.process().kill(Signal::CONT);
                        log.add("told");
                        master.disconnect(|_| {});
                    });
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["told"]);
}

fn loads_tell_what_waits_for_a_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let only = master.fork().unwrap();
            when_listening(master, 1, move |master, address| {
                when_all_wait(master, move |master| {
                    stop(&only);
                    // An idle worker is given one, and the rest stay in the kernel.
                    let clients = connect(address, 3);
                    let asked = only.clone();
                    until_accepted(master, 1, move |master| {
                        let load = load_of(master, &asked);
                        assert_eq!((figures(&load), load.waiting()), ([1, 0, 0, 0], 1));
                        wait_until("the rest", || {
                            (of_listener(master).queued == Some(2)).then_some(())
                        });
                        asked.process().kill(Signal::CONT);
                        in_background(
                            master,
                            || read_all(clients),
                            move |master, answers| {
                                assert_eq!(answers, ["1"; 3]);
                                when_all_wait(master, move |master| {
                                    let load = load_of(master, &asked);
                                    assert_eq!((figures(&load), load.waiting()), ([3, 3, 0, 0], 0));
                                    log.add("told");
                                    master.disconnect(|_| {});
                                });
                            },
                        );
                    });
                });
            });
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["told"]);
}

/// Calls back when the master has accepted so many.
fn until_accepted(master: &Master, count: u64, then: impl FnOnce(&Master) + 'static) {
    master.set_timeout(Duration::from_millis(1), move |master| {
        if master.ledger().accepted == count {
            then(master);
        } else {
            until_accepted(master, count, then);
        }
    });
}

/// They are "since it was forked", also when the worker has closed a listener.
fn loads_outlive_a_listener() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let only = master.fork().unwrap();
            when_listening(master, 1, move |master, address| {
                in_background(master, move || talk(address, b"").unwrap(), |_, _| {});
            });
            only.on_message(move |master, only, message| {
                assert_eq!(message.bytes(), b"closed");
                assert_eq!(figures(&load_of(master, only)), [1, 1, 0, 0]);
                assert_eq!(master.loads().listeners, []);
                log.add("told");
                only.disconnect();
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            drop(listener.accept().unwrap().unwrap());
            listener.close();
            worker.send(b"closed").unwrap();
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["told"]);
}

fn loads_are_of_those_who_live() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, _| {
                let [first, second] = <[_; 2]>::try_from(master.workers()).unwrap();
                first.process().kill(Signal::KILL);
                let own = log.clone();
                master.on_exit(move |master, _, _| {
                    let loads = master.loads().workers;
                    let ids: Vec<_> = loads.iter().map(|load| load.worker.get()).collect();
                    own.add(format!("{ids:?}"));
                    second.disconnect();
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    assert_eq!(entries.take(), ["[2]", "[]"]);
}

fn loads_tell_who_waits_in_the_kernel() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                when_all_wait(master, move |master| {
                    let clients = move || connect(address, 30);
                    in_background(master, clients, move |master, clients| {
                        until_taken(master, 2, move |master| {
                            wait_until("all of them", || {
                                let own = of_listener(master);
                                assert_eq!(own.accepted, 2, "one for each");
                                (own.queued == Some(28)).then_some(())
                            });
                            let loads = master.loads().workers;
                            let figures: Vec<_> = loads.iter().map(figures).collect();
                            assert_eq!(figures, [[1, 1, 1, 0]; 2]);
                            in_background(
                                master,
                                || read_all(clients),
                                move |master, answers| {
                                    assert_eq!(answers.len(), 30);
                                    let own = of_listener(master);
                                    assert_eq!((own.accepted, own.queued), (30, Some(0)));
                                    log.add("told");
                                    master.disconnect(|_| {});
                                },
                            );
                        });
                    });
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["told"]);
}

fn loads_of_a_shared_listener_tell_who_waits() {
    waiting_for_stopped_workers(SchedulingPolicy::Shared);
}

fn loads_of_shards_tell_who_waits() {
    waiting_for_stopped_workers(SchedulingPolicy::Sharded);
}

/// Where workers accept for themselves.
fn waiting_for_stopped_workers(policy: SchedulingPolicy) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            when_listening(master, 2, move |master, address| {
                when_all_wait(master, move |master| {
                    master.workers().iter().for_each(stop);
                    let clients = connect(address, 30);
                    wait_until("all of them", || {
                        (of_listener(master).queued == Some(30)).then_some(())
                    });
                    for worker in master.workers() {
                        worker.process().kill(Signal::CONT);
                    }
                    in_background(
                        master,
                        || read_all(clients),
                        move |master, answers| {
                            assert_eq!(answers.len(), 30);
                            let loads = master.loads().workers;
                            let figures: Vec<_> = loads.iter().map(figures).collect();
                            assert_eq!(figures, [[0; 4]; 2], "the master knows nothing of them");
                            let own = of_listener(master);
                            assert_eq!((own.accepted, own.queued), (0, Some(0)));
                            log.add("told");
                            master.disconnect(|_| {});
                        },
                    );
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["told"]);
}

fn loads_of_listeners_come_in_order() {
    const PATH: &str = "LOADS_PATH";
    let directory = cluster::is_master().then(|| tempfile::tempdir().unwrap());
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let path = directory.as_ref().unwrap().path().join("socket");
            let mut addresses = Vec::new();
            let only = master.fork_with([(PATH, &path)]).unwrap();
            only.on_listening(move |master, only, address: &Address| {
                addresses.push(address.to_string());
                if addresses.len() < 3 {
                    return;
                }
                let listeners = master.loads().listeners;
                let own: Vec<_> = listeners.iter().map(|l| l.address.to_string()).collect();
                assert_eq!(own, addresses);
                let queued: Vec<_> = listeners.iter().map(|load| load.queued).collect();
                assert_eq!(queued, [Some(0), None, Some(0)], "of paths nobody knows");
                log.add("in order");
                only.disconnect();
            });
        },
        |worker| {
            let path = std::env::var_os(PATH).unwrap();
            let _first = worker.listen("127.0.0.1:0").unwrap();
            let _second = worker.listen(Path::new(&path)).unwrap();
            let _third = worker.listen("127.0.0.2:0").unwrap();
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["in order"]);
}
