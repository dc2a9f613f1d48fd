//! Tests more of Node's behaviour when workers disconnect and exit.

use std::cell::{Cell, RefCell};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use cluster::{Error, Interest, Master, Role, SendError, Worker};

use crate::harness::for_both_policies;
use crate::harness::of;
use crate::harness::{
    Log, answer_pings, cluster, in_background, is_alive, note_events, serve_id, wait_until,
    when_listening,
};

crate::scenarios! {
    concurrent_disconnect
    disconnect_race
    forced_exit
    primary_error
    shared_leak
    worker_destroy
    worker_no_exit
    worker_wait_server_close
}

/// The events of an idle worker that is disconnected.
const DISCONNECTED: [&str; 4] = [
    "fork",
    "online",
    "disconnect Some(true)",
    "exit Some(true) exit status: 0",
];

/// Checks that six workers can disconnect themselves at the same time. At each `disconnect` event,
/// the master sends a message to all workers. Some of these workers have already exited.
fn concurrent_disconnect() {
    const WORKERS: u32 = 6;
    let log = Log::default();
    let entries = log.clone();
    let failures = Rc::new(Cell::new(0));
    let failed = Rc::clone(&failures);
    let errors = Rc::new(Cell::new(0));
    let reported = Rc::clone(&errors);
    cluster(
        |master| {
            let workers: Vec<_> = (0..WORKERS).map(|_| master.fork().unwrap()).collect();
            let missing = Cell::new(WORKERS);
            let all_workers = workers.clone();
            master.on_online(move |_, _| {
                missing.set(missing.get() - 1);
                if missing.get() == 0 {
                    for worker in &all_workers {
                        let _ = worker.send(b"disconnect").unwrap();
                    }
                }
            });
            let (at_disconnect, at_exit) = (log.clone(), log);
            master.on_disconnect(move |_, worker| {
                assert_eq!(worker.exited_after_disconnect(), Some(true));
                at_disconnect.add(format!("{} disconnect", worker.id()));
                for other in &workers {
                    match other.send(b"disconnect") {
                        Ok(_) => {}
                        Err(Error::Send { reason, .. }) => {
                            assert_eq!(reason, SendError::ChannelClosed);
                            failures.set(failures.get() + 1);
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            });
            master.on_error(move |_, worker, error| {
                let reason = SendError::ChannelClosed;
                assert!(matches!(error, Error::Send { reason: r, .. } if *r == reason));
                assert!(worker.is_some());
                errors.set(errors.get() + 1);
            });
            master.on_exit(move |_, worker, status| {
                at_exit.add(format!("{} exit {status}", worker.id()));
            });
        },
        |worker| {
            worker.on_message(|worker, _| {
                if worker.is_connected() {
                    worker.disconnect();
                }
            });
            worker.run().unwrap();
        },
    );
    let entries = entries.take();
    for worker in 1..=WORKERS {
        assert_eq!(of(worker, &entries), ["disconnect", "exit exit status: 0"]);
    }
    // Sending to a worker fails in the worker's own `disconnect` event, so at least one send fails
    // for each worker. There may be fewer `error` events than failures, because a failure after the
    // worker's `exit` event emits none.
    assert!(failed.get() >= WORKERS, "{failed:?}");
    assert!(
        (WORKERS..=failed.get()).contains(&reported.get()),
        "{reported:?}"
    );
}

/// Logs when all workers have exited and all listeners are closed.
fn note_completion(master: &Master, log: &Log) {
    let log = log.clone();
    master.on_exit(move |master, _, _| {
        if master.workers().is_empty() {
            let log = log.clone();
            master.on_all_disconnected_once(move |_| log.add("completed"));
            master.disconnect();
        }
    });
}

/// Checks that the disconnect completes if a second worker is disconnected while the first is still
/// disconnecting. The first worker has the listener, and the second worker may just have requested
/// the same listener.
fn disconnect_race() {
    for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                note_events(master, &log);
                note_completion(master, &log);
                let first = master.fork().unwrap();
                first.on_message(|master, first, _| {
                    let second = master.fork().unwrap();
                    first.disconnect();
                    second.on_online(|_, second| drop(second.disconnect().clone()));
                });
            },
            |worker| {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                if worker.id().get() == 1 {
                    let _ = worker.send(b"listening").unwrap();
                }
                assert!(listener.accept().unwrap().is_none());
            },
        );
        let mut entries = entries.take();
        // The second worker may process the disconnect before it requests the listener, so its
        // `listening` event may be missing.
        entries.retain(|entry| entry != "2 listening");
        let mut listened = DISCONNECTED.to_vec();
        listened.insert(2, "listening");
        assert_eq!(of(1, &entries), listened);
        assert_eq!(of(2, &entries), DISCONNECTED);
        assert_eq!(entries[9..], ["completed"]);
    });
}

/// Checks that a worker exits at once when the master closes its channel, even if a timer is set.
/// After a disconnect request, in contrast, the worker waits for its timer, so its exit code is 42.
fn forced_exit() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let requested = master.fork().unwrap();
            requested.on_online(|_, worker| drop(worker.disconnect().clone()));
            let closed = master.fork().unwrap();
            closed.on_online(|_, worker| worker.process().disconnect());
        },
        |worker| {
            worker.on_disconnect(|worker| {
                let exit = |_: &Worker| std::process::exit(42);
                worker.set_timeout(Duration::from_millis(10), exit);
            });
            worker.run().unwrap();
        },
    );
    let entries = entries.take();
    let end = ["disconnect Some(true)", "exit Some(true) exit status: 42"];
    assert_eq!(of(1, &entries)[2..], end);
    let end = ["disconnect Some(false)", "exit Some(false) exit status: 0"];
    assert_eq!(of(2, &entries)[2..], end);
    assert_eq!(entries.len(), 8);
}

/// Checks that the workers exit when their master panics. The master is a child of this process.
fn primary_error() {
    const PLAY: &str = "PANICS";
    if std::env::var_os(PLAY).is_none() {
        let own = std::env::current_exe().unwrap();
        let mut child = Command::new(own)
            .env(PLAY, "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut pids = String::new();
        let mut stdout = child.stdout.take().unwrap();
        // The workers inherit the output, so end-of-file means that all workers have exited.
        stdout.read_to_string(&mut pids).unwrap();
        // A Rust program that panics exits with 101, and Node exits with 1 after an exception.
        assert_eq!(child.wait().unwrap().code(), Some(101));
        let pids: Vec<u32> = pids.lines().map(|pid| pid.parse().unwrap()).collect();
        assert_eq!(pids.len(), 2);
        wait_until("the workers' exit", || {
            pids.iter().all(|pid| !is_alive(*pid)).then_some(())
        });
        return;
    }
    match cluster::init().unwrap() {
        Role::Master(master) => {
            when_listening(&master, 2, |master, _| {
                for worker in master.workers() {
                    assert!(is_alive(worker.process().id()));
                    println!("{}", worker.process().id());
                }
                panic!("a failure that is part of the test");
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
            master.run().unwrap();
        }
        Role::Worker(worker) => serve_id(&worker, "127.0.0.1:0"),
    }
}

/// Checks that a connected client receives an answer when both workers are disconnected. The second
/// worker has just come online and is requesting the listener.
fn shared_leak() {
    for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                note_events(master, &log);
                let first = master.fork().unwrap();
                let at_listening = log.clone();
                first.on_listening(move |master, first, address| {
                    let address: SocketAddr = address.to_string().parse().unwrap();
                    let (first, log) = (first.clone(), at_listening.clone());
                    master.fork().unwrap().on_online(move |master, second| {
                        let (first, second) = (first.clone(), second.clone());
                        let client = TcpStream::connect(address).unwrap();
                        first.disconnect();
                        second.disconnect();
                        let (log, mut answer) = (log.clone(), [0; 3]);
                        let read = move |_: &_, mut client: &TcpStream| {
                            client.read_exact(&mut answer).unwrap();
                            log.add(String::from_utf8_lossy(&answer));
                            None
                        };
                        master.watch(client, Interest::Readable, read).unwrap();
                    });
                });
                note_completion(master, &log);
            },
            |worker| {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                for connection in listener.incoming() {
                    connection.unwrap().write_all(b"bye").unwrap();
                }
            },
        );
        let mut entries = entries.take();
        // Unlike in Node, the disconnect loses no connection, so the client receives its answer.
        // The answer's position varies.
        for (entry, count) in [("bye", 1..2), ("2 listening", 0..2)] {
            let before = entries.len();
            entries.retain(|other| other != entry);
            assert!(count.contains(&(before - entries.len())), "{entry}");
        }
        let mut listened = DISCONNECTED.to_vec();
        listened.insert(2, "listening");
        assert_eq!(of(1, &entries), listened);
        assert_eq!(of(2, &entries), DISCONNECTED);
        assert_eq!(entries[9..], ["completed"]);
    });
}

fn worker_destroy() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            if worker.id().get() == 1 {
                let count = Rc::new(Cell::new(0));
                let destroyed = Rc::clone(&count);
                // `destroy` after the disconnect must have no effect.
                worker.on_disconnect(move |worker| {
                    worker.destroy();
                    count.set(count.get() + 1);
                });
                assert!(std::ptr::eq(worker.disconnect(), &raw const worker));
                worker.run().unwrap();
                assert_eq!(destroyed.get(), 1);
            } else {
                worker.destroy();
                worker.run().unwrap();
            }
            assert!(!worker.is_connected());
        },
    );
    let entries = entries.take();
    assert_eq!(of(1, &entries), DISCONNECTED);
    assert_eq!(of(2, &entries), DISCONNECTED);
    assert_eq!(entries.len(), 8);
}

/// Checks that a disconnected worker runs until it has nothing of its own to wait for.
fn worker_no_exit() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = server.local_addr().unwrap().to_string();
            let worker = master.fork_with([("ADDRESS", address)]).unwrap();
            let connection = Rc::new(RefCell::new(None));
            let accepted = Rc::clone(&connection);
            let at_connection = worker.clone();
            let accept = move |_: &_, server: &TcpListener| {
                accepted.replace(Some(server.accept().unwrap().0));
                at_connection.disconnect();
                None
            };
            master.watch(server, Interest::Readable, accept).unwrap();
            master.on_disconnect(move |_, worker| {
                let mut connection = connection.take().unwrap();
                for _ in 0..3 {
                    connection.write_all(b"?").unwrap();
                    let mut answer = [0; 4];
                    connection.read_exact(&mut answer).unwrap();
                    log.add(format!("open: {}", String::from_utf8_lossy(&answer)));
                    assert!(!worker.is_dead());
                }
            });
        },
        |worker| {
            let connection = TcpStream::connect(std::env::var("ADDRESS").unwrap()).unwrap();
            // The master writes only after its `disconnect` event, so the worker must be
            // disconnected when it reads.
            let answer = |worker: &Worker, mut connection: &TcpStream| {
                if connection.read(&mut [0]).unwrap() == 0 {
                    return None;
                }
                let answer: &[u8] = if worker.is_connected() {
                    b"yes."
                } else {
                    b"not."
                };
                connection.write_all(answer).unwrap();
                Some(Interest::Readable)
            };
            worker
                .watch(connection, Interest::Readable, answer)
                .unwrap();
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 disconnect Some(true)",
        "open: not.",
        "open: not.",
        "open: not.",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

/// Checks that the channel stays open while a client's connection is open.
fn worker_wait_server_close() {
    for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                note_events(master, &log);
                let at_listening = log.clone();
                when_listening(master, 1, move |master, address| {
                    let connect = move || {
                        let mut client = TcpStream::connect(address).unwrap();
                        client.read_exact(&mut [0; 5]).unwrap();
                        client
                    };
                    in_background(master, connect, move |master, client| {
                        let worker = master.workers().remove(0);
                        worker.disconnect();
                        // Wait until the port is free, because from then on only the connection
                        // keeps the worker running.
                        let unbound = move || {
                            wait_until("the listener to close", || {
                                TcpListener::bind(address).map(drop).ok()
                            });
                        };
                        in_background(master, unbound, move |_, ()| {
                            let _ = worker.send(b"ping").unwrap();
                            let client = Cell::new(Some(client));
                            worker.on_message(move |_, worker, _| {
                                assert!(worker.is_connected());
                                at_listening.add("waits");
                                drop(client.take());
                            });
                        });
                    });
                });
                master.fork().unwrap();
            },
            |worker| {
                let closed = Rc::new(Cell::new(false));
                let was_closed = Rc::clone(&closed);
                answer_pings(&worker);
                let listener = worker.listen("127.0.0.1:0").unwrap();
                listener.set_connection_callback(move |worker, mut connection| {
                    connection.write_all(b"hello").unwrap();
                    let closed = Rc::clone(&closed);
                    let end = move |_: &_, mut connection: &cluster::Connection| {
                        assert_eq!(connection.read(&mut [0]).unwrap(), 0);
                        closed.set(true);
                        None
                    };
                    worker.watch(connection, Interest::Readable, end).unwrap();
                });
                worker.on_disconnect(move |_| assert!(was_closed.get(), "too early"));
                worker.run().unwrap();
            },
        );
        let expected = [
            "1 fork",
            "1 online",
            "1 listening",
            "waits",
            "1 disconnect Some(true)",
            "1 exit Some(true) exit status: 0",
        ];
        assert_eq!(entries.take(), expected);
    });
}
