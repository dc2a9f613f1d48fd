//! Tests the numbers of `Master::loads` at moments when the exact numbers are known.

use std::cell::RefCell;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::rc::Rc;

use cluster::{
    Address, Connection, ListenerLoad, Master, SchedulingPolicy, Signal, Worker, WorkerLoad,
    WorkerProcess,
};

use crate::harness::{
    Log, answer_pings, cluster, count_returned, in_background, serve_after_one_byte, serve_id,
    stop, talk, wait_until, when, when_all_wait, when_listening,
};

crate::scenarios! {
    loads_of_new_workers_are_zero
    loads_count_dispatched_and_received_connections
    loads_count_open_connections
    loads_count_returned_connections
    loads_count_connections_waiting_for_a_worker
    loads_count_connections_of_closed_listeners
    loads_contain_no_exited_workers
    loads_report_the_backlog_of_a_listener
    loads_report_the_backlog_of_a_shared_listener
    loads_report_the_backlog_of_shards
    loads_list_listeners_in_order
}

fn load_of(master: &Master, worker: &WorkerProcess) -> WorkerLoad {
    let loads = master.loads().workers;
    let mut own = loads.iter().filter(|load| load.worker == worker.id());
    *own.next().unwrap()
}

/// Returns the numbers of dispatched, received, open and returned connections.
fn figures(load: &WorkerLoad) -> [u64; 4] {
    [load.dispatched, load.received, load.open, load.returned]
}

fn listener_load(master: &Master) -> ListenerLoad {
    let mut listeners = master.loads().listeners;
    assert_eq!(listeners.len(), 1, "{listeners:?}");
    listeners.remove(0)
}

fn connect(address: SocketAddr, clients: usize) -> Vec<TcpStream> {
    let connect = |_| TcpStream::connect(address).unwrap();
    (0..clients).map(connect).collect()
}

/// Sends a byte from each client and returns what each client receives.
fn read_all(clients: Vec<TcpStream>) -> Vec<String> {
    let read = |mut client: TcpStream| {
        let _ = client.write_all(b"x");
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    };
    clients.into_iter().map(read).collect()
}

fn loads_of_new_workers_are_zero() {
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
                let own = listener_load(master);
                assert_eq!(own.address.to_string(), address.to_string());
                assert_eq!((own.accepted, own.queued), (0, Some(0)));
                log.add("zero");
                master.on_all_disconnected_once(|master| {
                    assert_eq!(master.loads(), cluster::Loads::default());
                });
                master.disconnect();
                master.disconnect();
            });
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    assert_eq!(entries.take(), ["zero"]);
}

fn loads_count_dispatched_and_received_connections() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                connect_next(master, address, 0, log)
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

/// Waits until each worker waits for a connection, checks the loads after `served` connections, and
/// connects the next client.
///
/// The workers have equal loads only if they take strict turns. A worker that does not receive its
/// connection in time loses its turn, and the connection returns to the master. Equal loads are
/// therefore asserted only if no connection has returned.
fn connect_next(master: &Master, address: SocketAddr, served: u64, log: Log) {
    when_all_wait(master, move |master| {
        let workers = master.loads().workers;
        for load in &workers {
            assert_eq!(
                [load.received + load.returned, 0],
                [load.dispatched, load.open]
            );
        }
        let mut received: Vec<_> = workers.iter().map(|load| load.received).collect();
        received.sort_unstable();
        if count_returned(master) == 0 {
            assert_eq!(received, [served / 2, served.div_ceil(2)]);
        }
        assert_eq!(received.iter().sum::<u64>(), served);
        let own = listener_load(master);
        assert_eq!((own.accepted, own.queued), (served, Some(0)));
        if served == 20 {
            log.add(served.to_string());
            return master.disconnect();
        }
        in_background(
            master,
            move || talk(address, b"").unwrap(),
            move |master, _| {
                connect_next(master, address, served + 1, log);
            },
        );
    });
}

/// Holds the connections that the worker receives. A message `ping` is answered. Any other message
/// contains a number, and the worker closes that number of its oldest connections.
fn hold(worker: &Worker) {
    let held = Rc::new(RefCell::new(Vec::<Connection>::new()));
    let own = Rc::clone(&held);
    worker.on_message(move |worker, message| match message.bytes() {
        b"ping" => drop(worker.send(b"pong")),
        count => {
            let closed: Vec<_> = own.borrow_mut().drain(..usize::from(count[0])).collect();
            drop(closed);
        }
    });
    let listener = worker.listen("127.0.0.1:0").unwrap();
    listener.set_connection_callback(move |_, connection| held.borrow_mut().push(connection));
    worker.run().unwrap();
}

/// Checks the number of open connections. The number may be too high for a while, because a worker
/// that receives nothing reports again only when at most half of the connections in its last report
/// are still open.
fn loads_count_open_connections() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let only = master.fork().unwrap();
            when_listening(master, 1, move |master, address| {
                let clients = connect(address, 8);
                let seen = log.clone();
                when_received(master, 8, move |master| {
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
                                    seen.add("all closed");
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
    assert_eq!(entries.take(), ["all closed"]);
}

/// Makes the worker close `count` connections and calls `then` afterwards.
fn close(
    master: &Master,
    worker: &WorkerProcess,
    count: u8,
    then: impl FnOnce(&Master, WorkerProcess) + 'static,
) {
    let _ = worker.send(&[count]).unwrap();
    let worker = worker.clone();
    when_all_wait(master, move |master| then(master, worker));
}

/// Calls `then` when workers have received `count` connections.
fn when_received(master: &Master, count: u64, then: impl FnOnce(&Master) + 'static) {
    when(
        master,
        move |master| master.ledger().received == count,
        then,
    );
}

/// Checks the loads when a stopped idle worker does not receive its connections: they are counted
/// as returned, and go to another worker.
fn loads_count_returned_connections() {
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
                        let [dispatched, received, open, returned] =
                            figures(&load_of(master, &first));
                        assert_eq!((received, open), (0, 0), "the worker is stopped");
                        assert_eq!(
                            dispatched, returned,
                            "every dispatched connection was returned"
                        );
                        assert!(returned >= 1);
                        // If the second worker was late, the master has reclaimed a connection from
                        // it, too, and dispatched the connection to it again.
                        let [dispatched, received, _, returned] =
                            figures(&load_of(master, &second));
                        assert_eq!((dispatched - returned, received), (4, 4));
                        assert_eq!(listener_load(master).accepted, 4);
                        first.process().kill(Signal::CONT);
                        log.add("done");
                        master.disconnect();
                    });
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["done"]);
}

fn loads_count_connections_waiting_for_a_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let only = master.fork().unwrap();
            when_listening(master, 1, move |master, address| {
                when_all_wait(master, move |master| {
                    stop(&only);
                    // The master still treats the stopped worker as idle, and dispatches one
                    // connection to it. From then on, the master treats it as busy, so the other
                    // connections stay in the backlog.
                    let clients = connect(address, 3);
                    let stopped = only.clone();
                    when_accepted(master, 1, move |master| {
                        let load = load_of(master, &stopped);
                        assert_eq!((figures(&load), load.queued()), ([1, 0, 0, 0], 1));
                        wait_until("the backlog", || {
                            (listener_load(master).queued == Some(2)).then_some(())
                        });
                        stopped.process().kill(Signal::CONT);
                        in_background(
                            master,
                            || read_all(clients),
                            move |master, answers| {
                                assert_eq!(answers, ["1"; 3]);
                                when_all_wait(master, move |master| {
                                    let load = load_of(master, &stopped);
                                    assert_eq!((figures(&load), load.queued()), ([3, 3, 0, 0], 0));
                                    log.add("done");
                                    master.disconnect();
                                });
                            },
                        );
                    });
                });
            });
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["done"]);
}

/// Calls `then` when the master has accepted `count` connections.
fn when_accepted(master: &Master, count: u64, then: impl FnOnce(&Master) + 'static) {
    when(
        master,
        move |master| master.ledger().accepted == count,
        then,
    );
}

/// Checks that the numbers start at the worker's fork and include connections of listeners that the
/// worker has closed.
fn loads_count_connections_of_closed_listeners() {
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
                log.add("done");
                only.disconnect();
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            drop(listener.accept().unwrap().unwrap());
            listener.close();
            let _ = worker.send(b"closed").unwrap();
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["done"]);
}

fn loads_contain_no_exited_workers() {
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

fn loads_report_the_backlog_of_a_listener() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                when_all_wait(master, move |master| {
                    let clients = move || connect(address, 30);
                    in_background(master, clients, move |master, clients| {
                        when_received(master, 2, move |master| {
                            wait_until("the backlog", || {
                                let own = listener_load(master);
                                assert_eq!(own.accepted, 2, "one connection for each worker");
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
                                    let own = listener_load(master);
                                    assert_eq!((own.accepted, own.queued), (30, Some(0)));
                                    log.add("done");
                                    master.disconnect();
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
    assert_eq!(entries.take(), ["done"]);
}

fn loads_report_the_backlog_of_a_shared_listener() {
    assert_backlog_of_stopped_workers(SchedulingPolicy::Shared);
}

fn loads_report_the_backlog_of_shards() {
    assert_backlog_of_stopped_workers(SchedulingPolicy::Sharded);
}

/// Checks the reported backlog under a policy in which the workers accept, while all workers are
/// stopped.
fn assert_backlog_of_stopped_workers(policy: SchedulingPolicy) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            when_listening(master, 2, move |master, address| {
                when_all_wait(master, move |master| {
                    master.workers().iter().for_each(stop);
                    let clients = connect(address, 30);
                    wait_until("the backlog", || {
                        (listener_load(master).queued == Some(30)).then_some(())
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
                            assert_eq!(figures, [[0; 4]; 2], "the master does not count them");
                            let own = listener_load(master);
                            assert_eq!((own.accepted, own.queued), (0, Some(0)));
                            log.add("done");
                            master.disconnect();
                        },
                    );
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["done"]);
}

fn loads_list_listeners_in_order() {
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
                assert_eq!(
                    queued,
                    [Some(0), None, Some(0)],
                    "the backlog of a path is unknown"
                );
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
