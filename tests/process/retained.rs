//! Tests of retained listeners, which the master keeps open. While workers are killed, disconnected
//! and replaced, no connection may be lost except those that a killed worker is serving.

use std::cell::{Cell, RefCell};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cluster::{ListenOptions, Master, MasterListener, SchedulingPolicy, Signal, WorkerProcess};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::{EADDRINUSE, EINVAL};

use crate::harness::{
    Log, cluster, in_background, scaled, serve_after_one_byte, serve_id, talk, wait_until, when,
};
use crate::sharded::{Count, Load};

crate::scenarios! {
    clients_wait_for_the_next_worker_rr
    clients_wait_for_the_next_worker_none
    clients_wait_for_the_next_worker_sharded
    killing_all_workers_refuses_no_client_rr
    killing_all_workers_refuses_no_client_none
    killing_all_workers_refuses_no_client_sharded
    replacing_all_workers_loses_no_client_rr
    replacing_all_workers_loses_no_client_none
    replacing_all_workers_loses_no_client_sharded
    listen_rejects_listeners_that_cannot_be_retained
    port_zero_is_the_same_port_in_master_and_worker
    existing_listener_is_shared_rr
    existing_listener_is_shared_none
    existing_listener_is_shared_sharded
    existing_unix_socket_is_shared
    released_listener_closes_with_the_last_worker
    released_listener_without_workers_closes_at_once
    waiting_clients_of_a_released_listener_are_served_at_a_stop
    waiting_clients_of_a_released_existing_listener_are_served_at_a_stop
    listener_opened_by_a_worker_can_be_retained
    retained_listener_delays_neither_disconnect_nor_run
    scheduler_runs_only_when_there_is_a_worker_to_choose
    disconnecting_workers_serve_accepted_connections
}

const RR: SchedulingPolicy = SchedulingPolicy::RoundRobin;
const NONE: SchedulingPolicy = SchedulingPolicy::Shared;
const SHARDED: SchedulingPolicy = SchedulingPolicy::Sharded;

/// Maximum time until a client has its answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Environment variable with the address on which the worker listens.
const ADDRESS: &str = "RETAINED_ADDRESS";

fn listen(master: &Master, policy: SchedulingPolicy) -> (MasterListener, SocketAddr) {
    master.set_scheduling_policy(policy).unwrap();
    let retained = master.listen("127.0.0.1:0").unwrap();
    let address = retained.address().to_string().parse().unwrap();
    (retained, address)
}

/// Forks `count` workers, and calls `then` once all of them listen.
fn fork(master: &Master, count: usize, then: impl FnOnce(&Master) + 'static) {
    let (missing, then) = (Cell::new(count), Cell::new(Some(then)));
    let id = std::rc::Rc::new(Cell::new(None));
    let own = id.clone();
    id.set(Some(master.on_listening(move |master, _, _| {
        missing.set(missing.get() - 1);
        if missing.get() == 0 {
            master.remove_callback(own.get().unwrap());
            then.take().unwrap()(master);
        }
    })));
    (0..count).for_each(|_| drop(master.fork().unwrap()));
}

/// Ends all workers by calling `end` for each, and calls `then` once they have exited.
fn end_all(master: &Master, end: impl Fn(&WorkerProcess), then: impl FnOnce(&Master) + 'static) {
    let missing = std::rc::Rc::new(Cell::new(master.workers().len()));
    let then = std::rc::Rc::new(Cell::new(Some(then)));
    for worker in master.workers() {
        let (missing, then) = (missing.clone(), then.clone());
        worker.on_exit(move |master, _, _| {
            missing.set(missing.get() - 1);
            if missing.get() == 0 {
                then.take().unwrap()(master);
            }
        });
        end(&worker);
    }
}

fn kill(worker: &WorkerProcess) {
    worker.process().kill(Signal::KILL);
}

fn disconnect(worker: &WorkerProcess) {
    worker.disconnect();
}

fn connect(address: SocketAddr) -> Vec<TcpStream> {
    (0..20)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect()
}

fn read(mut client: impl std::io::Read) -> String {
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    answer
}

/// Connects clients while no worker is running, and then starts one worker. This worker must serve
/// all of them.
fn next_worker_serves_all(
    master: &Master,
    address: SocketAddr,
    then: impl FnOnce(&Master) + 'static,
) {
    assert!(master.workers().is_empty());
    let clients = connect(address);
    let before = master.ledger().accepted;
    let worker = master.fork().unwrap();
    assert_eq!(
        master.ledger().accepted,
        before,
        "accepted without a worker"
    );
    let read_all = || {
        let patient = |client: &TcpStream| client.set_read_timeout(Some(scaled(PATIENCE))).unwrap();
        clients.iter().for_each(patient);
        clients.into_iter().map(read).collect::<Vec<_>>()
    };
    in_background(master, read_all, move |master, answers| {
        assert_eq!(answers, vec![worker.id().to_string(); 20]);
        then(master);
    });
}

fn clients_wait_for_the_next_worker(policy: SchedulingPolicy) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (retained, address) = listen(master, policy);
            next_worker_serves_all(master, address, move |master| {
                fork(master, 3, move |master| {
                    end_all(master, kill, move |master| {
                        next_worker_serves_all(master, address, move |master| {
                            fork(master, 3, move |master| {
                                end_all(master, disconnect, move |master| {
                                    next_worker_serves_all(master, address, move |master| {
                                        log.add("all");
                                        master.on_all_disconnected_once(move |_| drop(retained));
                                        master.disconnect();
                                    });
                                });
                            });
                        });
                    });
                });
            });
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    assert_eq!(entries.take(), ["all"]);
}

fn clients_wait_for_the_next_worker_rr() {
    clients_wait_for_the_next_worker(RR);
}

fn clients_wait_for_the_next_worker_none() {
    clients_wait_for_the_next_worker(NONE);
}

fn clients_wait_for_the_next_worker_sharded() {
    clients_wait_for_the_next_worker(SHARDED);
}

const WORKERS: u32 = 4;
const ROUNDS: u32 = 6;

/// Minimum number of clients that are served between two replacements of the workers.
const SERVED: u64 = 20;

/// Starts workers, and replaces all of them `rounds` times under load.
///
/// In each round all workers end, and new workers start after the last one has exited. A round
/// begins once at least `SERVED` more clients have their answers.
fn replace_workers(
    master: &Master,
    rounds: u32,
    answered: Arc<AtomicU64>,
    end: fn(&WorkerProcess),
    then: Box<dyn FnOnce(&Master)>,
) {
    fork(master, WORKERS as usize, move |master| {
        if rounds == 0 {
            return then(master);
        }
        let before = answered.load(Ordering::SeqCst);
        let enough = move || {
            let count = answered.load(Ordering::SeqCst);
            (count >= before + SERVED).then(|| Arc::clone(&answered))
        };
        in_background(
            master,
            || wait_until("clients that have been served", enough),
            move |master, answered| {
                end_all(master, end, move |master| {
                    replace_workers(master, rounds - 1, answered, end, then);
                });
            },
        );
    });
}

fn under_load(policy: SchedulingPolicy, end: fn(&WorkerProcess), check: impl Fn(Count) + 'static) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (retained, address) = listen(master, policy);
            let load = Load::begin(address);
            let answered = load.answered();
            let finish = move |master: &Master| {
                in_background(
                    master,
                    move || load.end(),
                    move |master, (_, count)| {
                        check(count);
                        let ledger = master.ledger();
                        assert_eq!((ledger.dropped, ledger.in_flight()), (0, 0), "{ledger:?}");
                        log.add("all");
                        drop(retained);
                        master.disconnect();
                    },
                );
            };
            replace_workers(master, ROUNDS, answered, end, Box::new(finish));
        },
        |worker| {
            for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
                let id = format!("{}.", worker.id());
                let _ = connection.unwrap().write_all(id.as_bytes());
            }
        },
    );
    assert_eq!(entries.take(), ["all"]);
}

fn killing_all_workers_refuses_no_client(policy: SchedulingPolicy) {
    under_load(policy, kill, |count| {
        // Each killed worker may lose the one connection that it is serving.
        let cut_off = count.reset + count.wrong;
        assert!(cut_off <= u64::from(WORKERS * ROUNDS), "{count:?}");
        assert_eq!((count.refused, count.timed_out), (0, 0));
    });
}

fn killing_all_workers_refuses_no_client_rr() {
    killing_all_workers_refuses_no_client(RR);
}

fn killing_all_workers_refuses_no_client_none() {
    killing_all_workers_refuses_no_client(NONE);
}

fn killing_all_workers_refuses_no_client_sharded() {
    killing_all_workers_refuses_no_client(SHARDED);
}

fn replacing_all_workers_loses_no_client(policy: SchedulingPolicy) {
    under_load(policy, disconnect, |count| {
        assert_eq!(count, Count::NO_FAILURE);
    });
}

fn replacing_all_workers_loses_no_client_rr() {
    replacing_all_workers_loses_no_client(RR);
}

fn replacing_all_workers_loses_no_client_none() {
    replacing_all_workers_loses_no_client(NONE);
}

fn replacing_all_workers_loses_no_client_sharded() {
    replacing_all_workers_loses_no_client(SHARDED);
}

/// Asserts that `listen` fails, and returns the errno and the text of the error. The errno is
/// `None` if the error does not come from the system.
#[track_caller]
fn refused<S>(master: &Master, options: impl Into<ListenOptions<S>>) -> (Option<i32>, String) {
    let error = master.listen(options).unwrap_err();
    assert!(matches!(error, cluster::Error::Listen { .. }), "{error}");
    (error.raw_os_error(), error.to_string())
}

fn listen_rejects_listeners_that_cannot_be_retained() {
    cluster(
        |master| {
            let own = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = own.local_addr().unwrap();
            let (errno, text) = refused(master, address);
            assert_eq!(errno, Some(EADDRINUSE));
            assert!(text.contains(&address.to_string()), "{text}");
            drop(own);
            // Drop one of two handles. The listener must stay open until the second handle is
            // dropped.
            let retained = master.listen(address).unwrap();
            let again = master.listen(address).unwrap();
            drop(retained);
            drop(TcpStream::connect(address).unwrap());
            drop(again);
            TcpStream::connect(address).unwrap_err();

            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("socket");
            std::fs::write(&path, "not a socket").unwrap();
            assert_eq!(refused(master, &path).0, Some(EADDRINUSE));
            assert!(path.exists());

            let any = || ListenOptions::from("127.0.0.1:0");
            for options in [
                any().exclusive(true),
                any().reuse_port(true),
                ListenOptions::fd(0),
            ] {
                let (errno, text) = refused(master, options);
                assert!(errno.is_none() && text.contains("workers"), "{text}");
            }
            refused(master, "no port here");
            let datagrams: OwnedFd = UdpSocket::bind("127.0.0.1:0").unwrap().into();
            assert_eq!(
                refused(master, TcpListener::from(datagrams)).0,
                Some(EINVAL)
            );
            let (pair, _other) = UnixStream::pair().unwrap();
            let connected = UnixListener::from(OwnedFd::from(pair));
            assert_eq!(refused(master, connected).0, Some(EINVAL));
            let listener = UnixListener::bind(directory.path().join("unix")).unwrap();
            let listener = TcpListener::from(OwnedFd::from(listener));
            assert_eq!(refused(master, listener).0, Some(EINVAL));

            master.set_scheduling_policy(NONE).unwrap_err();
        },
        |_| unreachable!("no worker is forked"),
    );
}

fn port_zero_is_the_same_port_in_master_and_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let retained = [0, 0].map(|port| master.listen(port).unwrap());
            let ports = retained
                .each_ref()
                .map(|retained| retained.address().port().unwrap());
            assert_ne!(ports[0], ports[1]);
            let mut seen = Vec::new();
            let mut retained = Some(retained);
            master.on_listening(move |master, _, address| {
                seen.push(address.port().unwrap());
                if seen.len() == 2 {
                    assert_eq!(seen, ports);
                    log.add("the same");
                    retained.take();
                    master.disconnect();
                }
            });
            master.fork().unwrap();
        },
        |worker| {
            let _listeners = [0, 0].map(|port| worker.listen(port).unwrap());
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["the same"]);
}

/// Checks that two workers share a listener that the application opened before the master retained
/// it. The application keeps a duplicate of the listener.
///
/// The first worker requests only the listener's port, and the second worker requests its address.
fn existing_listener_is_shared(policy: SchedulingPolicy) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            let listener = TcpListener::bind("0.0.0.0:0").unwrap();
            let shared = listener.try_clone().unwrap();
            let port = listener.local_addr().unwrap().port();
            let address = SocketAddr::from(([127, 0, 0, 1], port));
            // Connect a client before the listener is retained. A worker must serve this client
            // also.
            let early = TcpStream::connect(address).unwrap();
            let retained = master.listen(listener).unwrap();
            assert_eq!(retained.address().to_string(), format!("0.0.0.0:{port}"));
            let flags = fcntl(retained.as_fd(), FcntlArg::F_GETFL).unwrap();
            // Only with round robin does the master accept. With other policies, it does not change
            // the mode.
            let is_nonblocking = OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK);
            assert_eq!(is_nonblocking, policy == SchedulingPolicy::RoundRobin);

            let mut rest = Some((retained, shared, early, log));
            let listening = Cell::new(0);
            master.on_listening(move |master, _, _| {
                listening.set(listening.get() + 1);
                if listening.get() < 2 {
                    return;
                }
                let (retained, shared, early, log) = rest.take().unwrap();
                let work = move || {
                    let first = read(early);
                    assert!(["1", "2"].contains(&&*first), "{first:?}");
                    let mut seen = std::collections::BTreeSet::new();
                    wait_until("both", || {
                        // Connect two clients at a time, because single clients might always reach
                        // the same idle worker.
                        let clients = [(); 2].map(|()| TcpStream::connect(address).unwrap());
                        seen.extend(clients.map(read));
                        (seen.len() == 2).then_some(())
                    });
                };
                in_background(master, work, move |master, ()| {
                    drop(retained);
                    master.on_all_disconnected_once(move |_| {
                        // The application's duplicate keeps the socket open, so clients can still
                        // connect.
                        let patience = Duration::from_millis(500);
                        let _client = TcpStream::connect_timeout(&address, patience).unwrap();
                        shared.accept().unwrap();
                        log.add("both");
                    });
                    master.disconnect();
                    master.disconnect();
                });
            });
            for own in [port.to_string(), format!("0.0.0.0:{port}")] {
                master.fork_with([(ADDRESS, own)]).unwrap();
            }
        },
        |worker| serve_id(&worker, &std::env::var(ADDRESS).unwrap()),
    );
    assert_eq!(entries.take(), ["both"]);
}

fn existing_listener_is_shared_rr() {
    existing_listener_is_shared(RR);
}

fn existing_listener_is_shared_none() {
    existing_listener_is_shared(NONE);
}

fn existing_listener_is_shared_sharded() {
    existing_listener_is_shared(SHARDED);
}

fn serve_path(worker: &cluster::Worker) {
    let path = PathBuf::from(std::env::var_os(ADDRESS).unwrap());
    for connection in worker.listen(path.as_path()).unwrap().incoming() {
        let id = worker.id().to_string();
        let _ = connection.unwrap().write_all(id.as_bytes());
    }
}

fn ask_path(path: &Path) -> String {
    read(UnixStream::connect(path).unwrap())
}

fn existing_unix_socket_is_shared() {
    crate::harness::for_both_policies(|| {
        let directory = cluster::is_master().then(|| tempfile::tempdir().unwrap());
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                let path = directory.as_ref().unwrap().path().join("socket");
                let retained = master.listen(UnixListener::bind(&path).unwrap()).unwrap();
                assert_eq!(retained.address().to_string(), path.to_str().unwrap());
                let early = UnixStream::connect(&path).unwrap();
                let own = path.clone();
                fork_at(master, &path, move |master| {
                    let work = move || {
                        assert_eq!(read(early), "1");
                        (ask_path(&own), own)
                    };
                    in_background(master, work, move |master, (answer, own)| {
                        assert_eq!(answer, "1");
                        drop(retained);
                        master.on_all_disconnected_once(move |_| {
                            assert!(own.exists(), "the application owns the file");
                            let error = UnixStream::connect(&own).unwrap_err();
                            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                            log.add("closed");
                        });
                        master.disconnect();
                        master.disconnect();
                    });
                });
            },
            |worker| serve_path(&worker),
        );
        assert_eq!(entries.take(), ["closed"]);
    });
}

/// Forks a worker that listens on `path`, and calls `then` once the worker is listening.
fn fork_at(master: &Master, path: &Path, then: impl FnOnce(&Master) + 'static) {
    let worker = master.fork_with([(ADDRESS, path)]).unwrap();
    let then = Cell::new(Some(then));
    worker.on_listening(move |master, _, _| then.take().unwrap()(master));
}

fn released_listener_closes_with_the_last_worker() {
    crate::harness::for_both_policies(|| {
        let directory = cluster::is_master().then(|| tempfile::tempdir().unwrap());
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                let path = directory.as_ref().unwrap().path().join("socket");
                let retained = master.listen(&path).unwrap();
                let own = path.clone();
                fork_at(master, &path, move |master| {
                    drop(retained);
                    let work = move || (ask_path(&own), own);
                    in_background(master, work, move |master, (answer, own)| {
                        assert_eq!(answer, "1");
                        kill(&master.workers()[0]);
                        master.on_exit(move |_, _, _| {
                            assert!(!own.exists());
                            log.add("removed");
                        });
                    });
                });
            },
            |worker| serve_path(&worker),
        );
        assert_eq!(entries.take(), ["removed"]);
    });
}

fn released_listener_without_workers_closes_at_once() {
    cluster(
        |master| {
            let (retained, address) = listen(master, RR);
            drop(TcpStream::connect(address).unwrap());
            drop(retained);
            let error = TcpStream::connect(address).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);

            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("socket");
            let retained = master.listen(&path).unwrap();
            let own_fds = crate::harness::open_fds().len();
            drop(UnixStream::connect(&path).unwrap());
            drop(retained);
            assert!(!path.exists());
            assert_eq!(crate::harness::open_fds().len(), own_fds - 2);

            // Release another listener after its workers have exited.
            let retained = RefCell::new(Some(master.listen("127.0.0.1:0").unwrap()));
            let address: SocketAddr = {
                let retained = retained.borrow();
                let retained = retained.as_ref().unwrap();
                retained.address().to_string().parse().unwrap()
            };
            fork(master, 2, move |master| {
                end_all(master, kill, move |_| {
                    let _client = TcpStream::connect(address).unwrap();
                    drop(retained.take());
                    let error = TcpStream::connect(address).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                });
            });
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
}

fn waiting_clients_of_a_released_listener_are_served_at_a_stop() {
    waiting_clients_are_served_at_a_stop(|master| {
        let any = "127.0.0.1:0";
        (master.listen(any).unwrap(), any.to_owned())
    });
}

fn waiting_clients_of_a_released_existing_listener_are_served_at_a_stop() {
    waiting_clients_are_served_at_a_stop(|master| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let name = listener.local_addr().unwrap().to_string();
        (master.listen(listener).unwrap(), name)
    });
}

/// Releases the retained listener, disconnects all workers, and checks that waiting clients are
/// still served.
///
/// `listen` returns the retained listener and the address that the workers request.
fn waiting_clients_are_served_at_a_stop(listen: fn(&Master) -> (MasterListener, String)) {
    crate::harness::for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                let (retained, name) = listen(master);
                let address: SocketAddr = retained.address().to_string().parse().unwrap();
                let worker = master.fork_with([(ADDRESS, name)]).unwrap();
                let rest = Cell::new(Some((retained, log)));
                worker.on_listening(move |master, _, _| {
                    let (retained, log) = rest.take().unwrap();
                    let clients = connect(address);
                    // The worker reads one byte from each client before it accepts the next one. No
                    // client has sent a byte, so at most one connection has been received. The
                    // others wait.
                    drop(retained);
                    master.on_all_disconnected_once(move |_| {
                        let error = TcpStream::connect(address).unwrap_err();
                        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                    });
                    master.disconnect();
                    master.disconnect();
                    let work = || {
                        for mut client in &clients {
                            client.write_all(b"x").unwrap();
                        }
                        clients.into_iter().map(read).collect::<Vec<_>>()
                    };
                    in_background(master, work, move |_, answers| {
                        log.add(answers.concat().len().to_string());
                    });
                });
            },
            |worker| {
                let name = std::env::var(ADDRESS).unwrap();
                for connection in worker.listen(name).unwrap().incoming() {
                    let mut connection = connection.unwrap();
                    connection.read_exact(&mut [0]).unwrap();
                    connection.write_all(b"x").unwrap();
                }
            },
        );
        assert_eq!(entries.take(), ["20"]);
    });
}

/// Retains a listener that a worker has opened, while this worker is disconnecting. The listener
/// must stay open for the next worker.
fn listener_opened_by_a_worker_can_be_retained() {
    crate::harness::for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                crate::harness::when_listening(master, 1, move |master, address| {
                    // Serve a client first. The listener then stays open for a grace period after
                    // the worker has begun to disconnect.
                    let client = move || talk(address, b"").unwrap();
                    in_background(master, client, move |master, _| {
                        master.workers()[0].disconnect();
                        let retained = master.listen("127.0.0.1:0").unwrap();
                        assert_eq!(retained.address().to_string(), address.to_string());
                        end_all(master, disconnect, move |master| {
                            next_worker_serves_all(master, address, move |master| {
                                log.add("served");
                                master.on_all_disconnected_once(move |_| drop(retained));
                                master.disconnect();
                            });
                        });
                    });
                });
                master.fork().unwrap();
            },
            |worker| serve_id(&worker, "127.0.0.1:0"),
        );
        assert_eq!(entries.take(), ["served"]);
    });
}

/// Checks that neither `disconnect` nor `run` waits for a retained listener. A callback of
/// `on_setup` owns the listener, which therefore stays open until the master is dropped.
fn retained_listener_delays_neither_disconnect_nor_run() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (retained, address) = listen(master, RR);
            fork(master, 2, move |master| {
                master.on_all_disconnected_once(move |master| {
                    assert!(master.workers().is_empty());
                    drop(TcpStream::connect(address).unwrap());
                    log.add("disconnected");
                });
                master.disconnect();
            });
            master.on_setup(move |_, _| drop(retained.address()));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    assert_eq!(entries.take(), ["disconnected"]);
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
