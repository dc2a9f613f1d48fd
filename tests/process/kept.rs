//! Listeners that the master keeps: nobody is lost when all workers die, leave and come.

use std::cell::{Cell, RefCell};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::SocketAddr as UnixAddress;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cluster::{ListenOptions, Master, MasterListener, SchedulingPolicy, Signal, WorkerProcess};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::{EADDRINUSE, EINVAL};

use crate::harness::{Log, cluster, in_background, serve_id, wait_until};
use crate::sharded::{Count, Load};

crate::scenarios! {
    who_comes_while_no_worker_lives_waits_for_the_next_rr
    who_comes_while_no_worker_lives_waits_for_the_next_none
    who_comes_while_no_worker_lives_waits_for_the_next_sharded
    killing_all_workers_refuses_nobody_rr
    killing_all_workers_refuses_nobody_none
    killing_all_workers_refuses_nobody_sharded
    replacing_all_workers_loses_nobody_rr
    replacing_all_workers_loses_nobody_none
    replacing_all_workers_loses_nobody_sharded
    what_cannot_be_kept_is_an_error_at_once
    port_zero_is_the_same_port_in_master_and_worker
    a_listener_that_was_open_is_shared_rr
    a_listener_that_was_open_is_shared_none
    a_listener_that_was_open_is_shared_sharded
    a_unix_socket_that_was_open_is_shared
    what_is_let_go_of_closes_with_the_last_worker
    what_is_let_go_of_without_workers_closes_at_once
    who_waits_when_it_is_let_go_of_is_served_by_those_who_leave
    who_waits_for_what_was_open_is_served_by_those_who_leave
    what_workers_have_opened_can_be_kept
    a_kept_listener_holds_up_neither_disconnect_nor_run
    the_scheduler_is_asked_when_there_is_somebody_to_choose
    the_last_to_leave_serve_what_has_been_accepted
}

const RR: SchedulingPolicy = SchedulingPolicy::RoundRobin;
const NONE: SchedulingPolicy = SchedulingPolicy::Shared;
const SHARDED: SchedulingPolicy = SchedulingPolicy::Sharded;

/// Longer than any answer takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// Names a worker's address where it is known before.
const ADDRESS: &str = "KEPT_ADDRESS";

fn listen(master: &Master, policy: SchedulingPolicy) -> (MasterListener, SocketAddr) {
    master.set_scheduling_policy(policy).unwrap();
    let kept = master.listen("127.0.0.1:0").unwrap();
    let address = kept.address().to_string().parse().unwrap();
    (kept, address)
}

/// Forks as many, and calls back when all of them listen.
fn fork(master: &Master, count: usize, then: impl FnOnce(&Master) + 'static) {
    let (missing, then) = (Cell::new(count), Cell::new(Some(then)));
    let id = std::rc::Rc::new(Cell::new(None));
    let own = id.clone();
    id.set(Some(master.on_listening(move |master, _, _| {
        missing.set(missing.get() - 1);
        if missing.get() == 0 {
            master.off(own.get().unwrap());
            then.take().unwrap()(master);
        }
    })));
    (0..count).for_each(|_| drop(master.fork().unwrap()));
}

/// Ends all workers, and calls back when they are gone.
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

fn leave(worker: &WorkerProcess) {
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

/// Clients connect when nobody lives; one worker comes, and serves them all.
fn all_are_served(master: &Master, address: SocketAddr, then: impl FnOnce(&Master) + 'static) {
    assert!(master.workers().is_empty());
    let clients = connect(address);
    let before = master.ledger().accepted;
    let worker = master.fork().unwrap();
    assert_eq!(master.ledger().accepted, before, "nobody to take them");
    let read_all = || {
        let patient = |client: &TcpStream| client.set_read_timeout(Some(PATIENCE)).unwrap();
        clients.iter().for_each(patient);
        clients.into_iter().map(read).collect::<Vec<_>>()
    };
    in_background(master, read_all, move |master, answers| {
        assert_eq!(answers, vec![worker.id().to_string(); 20]);
        then(master);
    });
}

fn who_comes_while_no_worker_lives_waits_for_the_next(policy: SchedulingPolicy) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (kept, address) = listen(master, policy);
            all_are_served(master, address, move |master| {
                fork(master, 3, move |master| {
                    end_all(master, kill, move |master| {
                        all_are_served(master, address, move |master| {
                            fork(master, 3, move |master| {
                                end_all(master, leave, move |master| {
                                    all_are_served(master, address, move |master| {
                                        log.add("all");
                                        master.disconnect(move |_| drop(kept));
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

fn who_comes_while_no_worker_lives_waits_for_the_next_rr() {
    who_comes_while_no_worker_lives_waits_for_the_next(RR);
}

fn who_comes_while_no_worker_lives_waits_for_the_next_none() {
    who_comes_while_no_worker_lives_waits_for_the_next(NONE);
}

fn who_comes_while_no_worker_lives_waits_for_the_next_sharded() {
    who_comes_while_no_worker_lives_waits_for_the_next(SHARDED);
}

const WORKERS: u32 = 4;
const ROUNDS: u32 = 6;

/// How many clients each generation of workers serves at least.
const SERVED: u64 = 20;

/// All workers end, and others come when the last one is gone; so many times, under a load of which so
/// many have been answered.
fn renew(
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
                    renew(master, rounds - 1, answered, end, then);
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
            let (kept, address) = listen(master, policy);
            let load = Load::begin(address);
            let answered = load.answered();
            let finish = move |master: &Master| {
                in_background(
                    master,
                    move || load.end(),
                    move |master, (_, count)| {
                        check(count);
                        let ledger = master.ledger();
                        assert_eq!((ledger.dropped, ledger.in_hand()), (0, 0), "{ledger:?}");
                        log.add("all");
                        drop(kept);
                        master.disconnect(|_| {});
                    },
                );
            };
            renew(master, ROUNDS, answered, end, Box::new(finish));
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

fn killing_all_workers_refuses_nobody(policy: SchedulingPolicy) {
    under_load(policy, kill, |count| {
        // Whom a worker had in hand when it was killed.
        let cut_off = count.reset + count.wrong;
        assert!(cut_off <= u64::from(WORKERS * ROUNDS), "{count:?}");
        assert_eq!((count.refused, count.timed_out), (0, 0));
    });
}

fn killing_all_workers_refuses_nobody_rr() {
    killing_all_workers_refuses_nobody(RR);
}

fn killing_all_workers_refuses_nobody_none() {
    killing_all_workers_refuses_nobody(NONE);
}

fn killing_all_workers_refuses_nobody_sharded() {
    killing_all_workers_refuses_nobody(SHARDED);
}

fn replacing_all_workers_loses_nobody(policy: SchedulingPolicy) {
    under_load(policy, leave, |count| {
        assert_eq!(count, Count::NO_FAILURE);
    });
}

fn replacing_all_workers_loses_nobody_rr() {
    replacing_all_workers_loses_nobody(RR);
}

fn replacing_all_workers_loses_nobody_none() {
    replacing_all_workers_loses_nobody(NONE);
}

fn replacing_all_workers_loses_nobody_sharded() {
    replacing_all_workers_loses_nobody(SHARDED);
}

/// The errno; none if it was not the system's.
#[track_caller]
fn refused<S>(master: &Master, options: impl Into<ListenOptions<S>>) -> (Option<i32>, String) {
    let error = master.listen(options).unwrap_err();
    assert!(matches!(error, cluster::Error::Listen { .. }), "{error}");
    (error.raw_os_error(), error.to_string())
}

fn what_cannot_be_kept_is_an_error_at_once() {
    cluster(
        |master| {
            let own = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = own.local_addr().unwrap();
            let (errno, text) = refused(master, address);
            assert_eq!(errno, Some(EADDRINUSE));
            assert!(text.contains(&address.to_string()), "{text}");
            drop(own);
            // It is there until both are dropped.
            let kept = master.listen(address).unwrap();
            let again = master.listen(address).unwrap();
            drop(kept);
            drop(TcpStream::connect(address).unwrap());
            drop(again);
            TcpStream::connect(address).unwrap_err();

            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("socket");
            std::fs::write(&path, "somebody else's").unwrap();
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
            let name = format!("kept-{}", std::process::id());
            let nameless = UnixAddress::from_abstract_name(name).unwrap();
            let nameless = UnixListener::bind_addr(&nameless).unwrap();
            assert_eq!(refused(master, nameless).0, None);
            let listener = UnixListener::bind(directory.path().join("unix")).unwrap();
            let listener = TcpListener::from(OwnedFd::from(listener));
            assert_eq!(refused(master, listener).0, Some(EINVAL));

            master.set_scheduling_policy(NONE).unwrap_err();
        },
        |_| unreachable!("nobody is forked"),
    );
}

fn port_zero_is_the_same_port_in_master_and_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let kept = [0, 0].map(|port| master.listen(port).unwrap());
            let ports = kept.each_ref().map(|kept| kept.address().port.unwrap());
            assert_ne!(ports[0], ports[1]);
            let mut seen = Vec::new();
            let mut kept = Some(kept);
            master.on_listening(move |master, _, address| {
                seen.push(address.port.unwrap());
                if seen.len() == 2 {
                    assert_eq!(seen, ports);
                    log.add("the same");
                    kept.take();
                    master.disconnect(|_| {});
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

/// A listener that another process has, too; by its address and by its port alone.
fn a_listener_that_was_open_is_shared(policy: SchedulingPolicy) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            let listener = TcpListener::bind("0.0.0.0:0").unwrap();
            let others = listener.try_clone().unwrap();
            let port = listener.local_addr().unwrap().port();
            let address = SocketAddr::from(([127, 0, 0, 1], port));
            // Somebody has waited since before we came.
            let early = TcpStream::connect(address).unwrap();
            let kept = master.listen(listener).unwrap();
            assert_eq!(kept.address().to_string(), format!("0.0.0.0:{port}"));
            let flags = fcntl(kept.as_fd(), FcntlArg::F_GETFL).unwrap();
            assert!(OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK));

            let mut rest = Some((kept, others, early, log));
            let listening = Cell::new(0);
            master.on_listening(move |master, _, _| {
                listening.set(listening.get() + 1);
                if listening.get() < 2 {
                    return;
                }
                let (kept, others, early, log) = rest.take().unwrap();
                let work = move || {
                    let first = read(early);
                    assert!(["1", "2"].contains(&&*first), "{first:?}");
                    let mut seen = std::collections::BTreeSet::new();
                    wait_until("both", || {
                        // Two at a time: one who has been slow comes after whoever is idle.
                        let clients = [(); 2].map(|()| TcpStream::connect(address).unwrap());
                        seen.extend(clients.map(read));
                        (seen.len() == 2).then_some(())
                    });
                };
                in_background(master, work, move |master, ()| {
                    drop(kept);
                    master.disconnect(move |_| {
                        // The door is open, and the other one has it.
                        let patience = Duration::from_millis(500);
                        let _client = TcpStream::connect_timeout(&address, patience).unwrap();
                        others.accept().unwrap();
                        log.add("both");
                    });
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

fn a_listener_that_was_open_is_shared_rr() {
    a_listener_that_was_open_is_shared(RR);
}

fn a_listener_that_was_open_is_shared_none() {
    a_listener_that_was_open_is_shared(NONE);
}

fn a_listener_that_was_open_is_shared_sharded() {
    a_listener_that_was_open_is_shared(SHARDED);
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

fn a_unix_socket_that_was_open_is_shared() {
    crate::harness::for_both_policies(|| {
        let directory = cluster::is_master().then(|| tempfile::tempdir().unwrap());
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                let path = directory.as_ref().unwrap().path().join("socket");
                let kept = master.listen(UnixListener::bind(&path).unwrap()).unwrap();
                assert_eq!(kept.address().to_string(), path.to_str().unwrap());
                let early = UnixStream::connect(&path).unwrap();
                let own = path.clone();
                fork_at(master, &path, move |master| {
                    let work = move || {
                        assert_eq!(read(early), "1");
                        (ask_path(&own), own)
                    };
                    in_background(master, work, move |master, (answer, own)| {
                        assert_eq!(answer, "1");
                        drop(kept);
                        master.disconnect(move |_| {
                            assert!(own.exists(), "it is not ours");
                            let error = UnixStream::connect(&own).unwrap_err();
                            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                            log.add("left");
                        });
                    });
                });
            },
            |worker| serve_path(&worker),
        );
        assert_eq!(entries.take(), ["left"]);
    });
}

/// Forks a worker that listens on a path.
fn fork_at(master: &Master, path: &Path, then: impl FnOnce(&Master) + 'static) {
    let worker = master.fork_with([(ADDRESS, path)]).unwrap();
    let then = Cell::new(Some(then));
    worker.on_listening(move |master, _, _| then.take().unwrap()(master));
}

fn what_is_let_go_of_closes_with_the_last_worker() {
    crate::harness::for_both_policies(|| {
        let directory = cluster::is_master().then(|| tempfile::tempdir().unwrap());
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                let path = directory.as_ref().unwrap().path().join("socket");
                let kept = master.listen(&path).unwrap();
                let own = path.clone();
                fork_at(master, &path, move |master| {
                    drop(kept);
                    let work = move || (ask_path(&own), own);
                    in_background(master, work, move |master, (answer, own)| {
                        assert_eq!(answer, "1");
                        kill(&master.workers()[0]);
                        master.on_exit(move |_, _, _| {
                            assert!(!own.exists());
                            log.add("gone");
                        });
                    });
                });
            },
            |worker| serve_path(&worker),
        );
        assert_eq!(entries.take(), ["gone"]);
    });
}

fn what_is_let_go_of_without_workers_closes_at_once() {
    cluster(
        |master| {
            let (kept, address) = listen(master, RR);
            drop(TcpStream::connect(address).unwrap());
            drop(kept);
            let error = TcpStream::connect(address).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);

            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("socket");
            let kept = master.listen(&path).unwrap();
            let own_fds = crate::harness::open_fds().len();
            drop(UnixStream::connect(&path).unwrap());
            drop(kept);
            assert!(!path.exists());
            assert_eq!(crate::harness::open_fds().len(), own_fds - 2);

            // After the workers.
            let kept = RefCell::new(Some(master.listen("127.0.0.1:0").unwrap()));
            let address: SocketAddr = {
                let kept = kept.borrow();
                let kept = kept.as_ref().unwrap();
                kept.address().to_string().parse().unwrap()
            };
            fork(master, 2, move |master| {
                end_all(master, kill, move |_| {
                    let _client = TcpStream::connect(address).unwrap();
                    drop(kept.take());
                    let error = TcpStream::connect(address).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                });
            });
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
}

fn who_waits_when_it_is_let_go_of_is_served_by_those_who_leave() {
    who_waits_is_served_at_a_stop(|master| {
        let any = "127.0.0.1:0";
        (master.listen(any).unwrap(), any.to_owned())
    });
}

fn who_waits_for_what_was_open_is_served_by_those_who_leave() {
    who_waits_is_served_at_a_stop(|master| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let name = listener.local_addr().unwrap().to_string();
        (master.listen(listener).unwrap(), name)
    });
}

/// Let go of, and then all are told to leave: that is a stop as any other. `listen` returns what
/// workers ask for, too.
fn who_waits_is_served_at_a_stop(listen: fn(&Master) -> (MasterListener, String)) {
    crate::harness::for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                let (kept, name) = listen(master);
                let address: SocketAddr = kept.address().to_string().parse().unwrap();
                let worker = master.fork_with([(ADDRESS, name)]).unwrap();
                let rest = Cell::new(Some((kept, log)));
                worker.on_listening(move |master, _, _| {
                    let (kept, log) = rest.take().unwrap();
                    let clients = connect(address);
                    // It may have one, that says nothing yet; the others wait.
                    drop(kept);
                    master.disconnect(move |_| {
                        let error = TcpStream::connect(address).unwrap_err();
                        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                    });
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

/// Workers were first; and they are on the way out, and nobody new comes in.
fn what_workers_have_opened_can_be_kept() {
    crate::harness::for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                crate::harness::when_listening(master, 1, move |master, address| {
                    master.workers()[0].disconnect();
                    let kept = master.listen("127.0.0.1:0").unwrap();
                    assert_eq!(kept.address().to_string(), address.to_string());
                    end_all(master, leave, move |master| {
                        all_are_served(master, address, move |master| {
                            log.add("served");
                            master.disconnect(move |_| drop(kept));
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

/// It lives until after the master.
fn a_kept_listener_holds_up_neither_disconnect_nor_run() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (kept, address) = listen(master, RR);
            fork(master, 2, move |master| {
                master.disconnect(move |master| {
                    assert!(master.workers().is_empty());
                    drop(TcpStream::connect(address).unwrap());
                    log.add("over");
                });
            });
            master.on_setup(move |_, _| drop(kept.address()));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    assert_eq!(entries.take(), ["over"]);
}

/// Five clients, of whom the first worker has taken one; the others are in its queue.
fn with_five_accepted(
    master: &Master,
    workers: usize,
    then: impl FnOnce(&Master, MasterListener, SocketAddr, Vec<TcpStream>) + 'static,
) {
    let (kept, address) = listen(master, RR);
    master.set_scheduler(|_, workers| Some(workers[0].worker));
    fork(master, workers, move |master| {
        let connect = |_| TcpStream::connect(address).unwrap();
        let clients: Vec<_> = (0..5).map(connect).collect();
        when_taken(master, 1, 5, move |master| {
            then(master, kept, address, clients);
        });
    });
}

fn serve_after_one_byte(worker: &cluster::Worker) {
    for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
        let mut connection = connection.unwrap();
        connection.read_exact(&mut [0]).unwrap();
        let id = worker.id().to_string();
        connection.write_all(id.as_bytes()).unwrap();
    }
}

/// All that is heard by clients that say a byte; some may be cut off.
fn ask_all(clients: Vec<TcpStream>) -> String {
    let ask = |mut client: TcpStream| {
        let mut answer = String::new();
        let said = client.write_all(b"x");
        let _ = said.and_then(|()| client.read_to_string(&mut answer));
        answer
    };
    clients.into_iter().map(ask).collect()
}

/// The only worker dies, and what was in its queue waits in the master for the next one.
fn the_scheduler_is_asked_when_there_is_somebody_to_choose() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            with_five_accepted(master, 1, move |master, kept, _, clients| {
                end_all(master, kill, move |master| {
                    assert_eq!(master.ledger().in_hand(), 4);
                    drop(master.fork().unwrap());
                    let work = move || ask_all(clients);
                    in_background(master, work, move |master, answers| {
                        log.add(answers);
                        master.disconnect(move |_| drop(kept));
                    });
                });
            });
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["2222"]);
}

/// Also what was in the queue of one that dies; and whoever comes afterwards is left to the next worker.
fn the_last_to_leave_serve_what_has_been_accepted() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            with_five_accepted(master, 2, move |master, kept, address, clients| {
                let client = TcpStream::connect(address).unwrap();
                let later = log.clone();
                master.disconnect(move |master| {
                    let ledger = master.ledger();
                    assert_eq!((ledger.accepted, ledger.taken), (5, 5));
                    drop(master.fork().unwrap());
                    let work = move || ask_all(vec![client]);
                    in_background(master, work, move |master, answer| {
                        later.add(answer);
                        drop(kept);
                        master.disconnect(|_| {});
                    });
                });
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

/// Calls back when so many have been taken, of so many that have been accepted.
fn when_taken(master: &Master, taken: u64, accepted: u64, then: impl FnOnce(&Master) + 'static) {
    master.set_timeout(Duration::from_millis(1), move |master| {
        let ledger = master.ledger();
        if (ledger.taken, ledger.accepted) == (taken, accepted) {
            then(master);
        } else {
            when_taken(master, taken, accepted, then);
        }
    });
}
