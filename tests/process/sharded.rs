//! Tests of sharded listeners. Each worker has its own listener, and all listeners have the same
//! port.
//!
//! No client may be lost while workers are killed, disconnected and replaced. The waiting clients
//! of a killed worker are reset only if no other worker replaces it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use cluster::{Master, SchedulingPolicy, Signal, Worker, WorkerProcess};

use crate::harness::{
    Log, answer_pings, cluster, in_background, scaled, serve_after_one_byte, stop, talk,
    wait_for_state, wait_until, when_all_wait, when_listening,
};

crate::scenarios! {
    killing_idle_workers_of_shards_loses_no_client
    replacing_workers_of_shards_loses_no_client
    disconnecting_all_workers_of_shards_loses_no_client
    stop_of_shards_under_load_loses_no_client
    replacement_serves_the_clients_of_the_killed_worker
    clients_of_a_killed_worker_are_reset_at_a_stop
    shards_receive_equal_shares
    shards_have_one_port
    shards_have_one_port_with_ipv6: IPV6
    unix_socket_is_shared_under_the_sharded_policy
    sharded_port_of_another_cluster_is_an_error
    sharded_port_serves_again_while_an_old_worker_disconnects
}

/// Maximum time until a client has its answer.
const PATIENCE: Duration = Duration::from_secs(20);

fn shard(master: &Master) {
    let policy = SchedulingPolicy::Sharded;
    master.set_scheduling_policy(policy).unwrap();
}

/// Numbers of a load's failed clients, by kind of failure.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub refused: u64,
    pub reset: u64,
    pub timed_out: u64,
    /// Number of clients whose answers were incomplete or unexpected.
    pub wrong: u64,
}

impl Count {
    pub const NO_FAILURE: Self = Self {
        refused: 0,
        reset: 0,
        timed_out: 0,
        wrong: 0,
    };

    pub fn sum(all: impl IntoIterator<Item = Self>) -> Self {
        all.into_iter().fold(Self::default(), |sum, more| Self {
            refused: sum.refused + more.refused,
            reset: sum.reset + more.reset,
            timed_out: sum.timed_out + more.timed_out,
            wrong: sum.wrong + more.wrong,
        })
    }

    pub fn fail(&mut self, error: &std::io::Error) {
        match error.kind() {
            ErrorKind::ConnectionRefused => self.refused += 1,
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => self.reset += 1,
            ErrorKind::TimedOut | ErrorKind::WouldBlock => self.timed_out += 1,
            _ => panic!("{error}"),
        }
    }
}

fn ask(address: SocketAddr) -> std::io::Result<String> {
    let mut client = TcpStream::connect(address)?;
    client.set_read_timeout(Some(scaled(PATIENCE)))?;
    let mut answer = String::new();
    client.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A load of several threads. Each thread connects clients one after another, until the load ends
/// or a connection is refused.
pub struct Load {
    ended: Arc<AtomicBool>,
    answered: Arc<AtomicU32>,
    threads: Vec<JoinHandle<Count>>,
}

impl Load {
    pub fn begin(address: SocketAddr) -> Self {
        let (ended, answered) = (Arc::default(), Arc::default());
        let threads = (0..16).map(|_| {
            let (ended, answered) = (Arc::clone(&ended), Arc::clone(&answered));
            std::thread::spawn(move || Self::run(address, &ended, &answered))
        });
        let threads = threads.collect();
        Self {
            ended,
            answered,
            threads,
        }
    }

    fn run(address: SocketAddr, ended: &AtomicBool, answered: &AtomicU32) -> Count {
        let mut count = Count::default();
        while !ended.load(Ordering::SeqCst) && count.refused == 0 {
            match ask(address) {
                Ok(answer) if answer.ends_with('.') && answer.matches('.').count() == 1 => {
                    answered.fetch_add(1, Ordering::SeqCst);
                }
                Ok(_) => count.wrong += 1,
                Err(error) => count.fail(&error),
            }
        }
        count
    }

    /// Returns the counter of answered clients.
    pub fn answered(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.answered)
    }

    /// Ends the load, and returns the number of answered clients and the failures.
    pub fn end(self) -> (u64, Count) {
        self.ended.store(true, Ordering::SeqCst);
        self.join()
    }

    /// Waits until every thread has ended, and returns the number of answered clients and the
    /// failures.
    ///
    /// A refused connection also ends its thread.
    fn join(self) -> (u64, Count) {
        let counts = self.threads.into_iter().map(|own| own.join().unwrap());
        let count = Count::sum(counts);
        (self.answered.load(Ordering::SeqCst).into(), count)
    }
}

fn serve(worker: &Worker) {
    answer_pings(worker);
    for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
        let id = format!("{}.", worker.id());
        let _ = connection.unwrap().write_all(id.as_bytes());
    }
}

/// Returns the number of different sockets that a worker has open. Duplicate descriptors count
/// once.
fn count_sockets(worker: &WorkerProcess) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", worker.process().id())).unwrap();
    let links = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    let sockets = links.filter(|link| link.to_string_lossy().starts_with("socket:"));
    sockets.collect::<BTreeSet<PathBuf>>().len()
}

/// Kills a worker while its application has no connection.
///
/// The application has none while the worker has exactly `idle_sockets` sockets open, as an idle
/// worker does. The worker is stopped while its sockets are counted.
fn kill_between_connections(worker: &WorkerProcess, idle_sockets: usize) {
    let pid = worker.process().id();
    wait_until("a worker without a connection", || {
        worker.process().kill(Signal::STOP);
        wait_for_state(pid, ") T ");
        let has_no_connection = count_sockets(worker) == idle_sockets;
        let signal = if has_no_connection {
            Signal::KILL
        } else {
            Signal::CONT
        };
        worker.process().kill(signal);
        has_no_connection.then_some(())
    });
}

fn killing_idle_workers_of_shards_loses_no_client() {
    const KILLS: u32 = 24;
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            shard(master);
            when_listening(master, 4, move |master, address| {
                when_all_wait(master, move |master| {
                    let idle_sockets = count_sockets(&master.workers()[0]);
                    let load = RefCell::new(Some(Load::begin(address)));
                    let replace = master.on_exit(|master, _, _| drop(master.fork().unwrap()));
                    let kills = Cell::new(0);
                    let next = move |master: &Master| {
                        if kills.get() < KILLS {
                            kills.set(kills.get() + 1);
                            return kill_between_connections(&master.workers()[1], idle_sockets);
                        }
                        let log = log.clone();
                        let load = load.take().unwrap();
                        in_background(
                            master,
                            move || load.end(),
                            move |master, (answered, rest)| {
                                assert_eq!(rest, Count::NO_FAILURE);
                                assert!(answered > 1000, "only {answered}: too few to be a load");
                                log.add("all answered");
                                master.remove_callback(replace);
                                master.disconnect();
                            },
                        );
                    };
                    next(master);
                    master.on_listening(move |master, _, _| next(master));
                });
            });
            (0..4).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve(&worker),
    );
    assert_eq!(entries.take(), ["all answered"]);
}

fn replacing_workers_of_shards_loses_no_client() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            shard(master);
            when_listening(master, 2, move |master, address| {
                let load = Load::begin(address);
                let at_exit = log.clone();
                master.on_exit(move |_, worker, status| {
                    assert_eq!(worker.exited_after_disconnect(), Some(true));
                    assert!(status.success(), "{status}");
                    at_exit.add("exited");
                });
                grow_and_shrink(master, 5, move |master| {
                    in_background(
                        master,
                        move || load.end(),
                        move |master, (answered, rest)| {
                            assert_eq!(rest, Count::NO_FAILURE);
                            assert!(answered > 1000, "only {answered}: too few to be a load");
                            log.add("all answered");
                            master.disconnect();
                        },
                    );
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve(&worker),
    );
    let entries = entries.take();
    let answered = entries.iter().position(|entry| entry == "all answered");
    assert_eq!((answered, entries.len()), (Some(5 * 4), 5 * 4 + 1 + 2));
}

/// Grows from two workers to six and disconnects the four oldest, `times` times. Then calls `then`.
fn grow_and_shrink(master: &Master, times: u32, then: impl FnOnce(&Master) + 'static) {
    if times == 0 {
        return then(master);
    }
    let mut missing = 4;
    let then = Rc::new(Cell::new(Some(then)));
    let grown = move |master: &Master, _: &WorkerProcess, _: &cluster::Address| {
        missing -= 1;
        if missing > 0 {
            return;
        }
        let running = Rc::new(Cell::new(4));
        for worker in &master.workers()[..4] {
            worker.disconnect();
            let (running, then) = (Rc::clone(&running), Rc::clone(&then));
            worker.on_exit(move |master, _, _| {
                running.set(running.get() - 1);
                if running.get() == 0 {
                    grow_and_shrink(master, times - 1, then.take().unwrap());
                }
            });
        }
    };
    let grown = Rc::new(RefCell::new(grown));
    for _ in 0..4 {
        let grown = Rc::clone(&grown);
        let new = master.fork().unwrap();
        new.on_listening(move |master, worker, address| {
            grown.borrow_mut()(master, worker, address);
        });
    }
}

/// Returns the number of connections that wait in the kernel's backlogs of all shards.
fn queued(master: &Master) -> u64 {
    let listeners = master.loads().listeners;
    listeners.iter().map(|load| load.queued.unwrap()).sum()
}

/// Sends one byte from each client, and returns the answers. Panics if a client has no answer.
fn read_all(clients: Vec<TcpStream>) -> Vec<String> {
    for mut client in &clients {
        client.write_all(b"x").unwrap();
    }
    let read = |mut client: TcpStream| {
        client.set_read_timeout(Some(scaled(PATIENCE))).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    };
    clients.into_iter().map(read).collect()
}

fn disconnecting_all_workers_of_shards_loses_no_client() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            shard(master);
            when_listening(master, 4, move |master, address| {
                // The four workers may have received one client each. The other clients wait in the
                // kernel.
                let connect = |_| TcpStream::connect(address).unwrap();
                let clients: Vec<_> = (0..60).map(connect).collect();
                wait_until("the backlog", || (queued(master) >= 56).then_some(()));
                master.disconnect();
                in_background(
                    master,
                    || read_all(clients),
                    move |_, answers| {
                        let answered = answers.iter().filter(|answer| !answer.is_empty());
                        log.add(answered.count().to_string());
                    },
                );
            });
            (0..4).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["60"]);
}

fn stop_of_shards_under_load_loses_no_client() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            shard(master);
            when_listening(master, 4, move |master, address| {
                let load = Load::begin(address);
                let threads = load.threads.len() as u64;
                wait_until("a load", || {
                    (load.answered.load(Ordering::SeqCst) > 500).then_some(())
                });
                master.disconnect();
                in_background(
                    master,
                    move || load.join(),
                    move |_, (_, count)| {
                        let refused = threads;
                        let expected = Count {
                            refused,
                            ..Count::NO_FAILURE
                        };
                        assert_eq!(
                            count, expected,
                            "only the last client of each thread is refused"
                        );
                        log.add("refused at last");
                    },
                );
            });
            (0..4).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve(&worker),
    );
    assert_eq!(entries.take(), ["refused at last"]);
}

/// Stops two workers, queues clients for both, kills the first worker, and calls `then` once this
/// worker has exited.
fn with_a_killed_worker(
    master: &Master,
    then: impl FnOnce(&Master, WorkerProcess, Vec<TcpStream>) + 'static,
) {
    shard(master);
    when_listening(master, 2, move |master, address| {
        when_all_wait(master, move |master| {
            let [first, second] = <[_; 2]>::try_from(master.workers()).unwrap();
            stop(&first);
            stop(&second);
            // The kernel selects the same worker for all 60 clients with a probability of only 1 in
            // 2^59.
            let connect = |_| TcpStream::connect(address).unwrap();
            let clients: Vec<_> = (0..60).map(connect).collect();
            wait_until("the backlog", || (queued(master) == 60).then_some(()));
            first.process().kill(Signal::KILL);
            let then = Cell::new(Some((then, second, clients)));
            first.on_exit(move |master, _, _| {
                let (then, second, clients) = then.take().unwrap();
                then(master, second, clients);
            });
        });
    });
    (0..2).for_each(|_| drop(master.fork().unwrap()));
}

fn replacement_serves_the_clients_of_the_killed_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            with_a_killed_worker(master, move |master, second, clients| {
                let replacement = master.fork().unwrap();
                let waiting = Cell::new(Some((clients, log)));
                replacement.on_listening(move |master, replacement, _| {
                    let (clients, log) = waiting.take().unwrap();
                    let replacement = replacement.id().to_string();
                    let own = second.id().to_string();
                    second.process().kill(Signal::CONT);
                    in_background(
                        master,
                        || read_all(clients),
                        move |master, answers| {
                            let by =
                                |id: &str| answers.iter().filter(|answer| *answer == id).count();
                            let (by_replacement, by_other) = (by(&replacement), by(&own));
                            assert!(by_replacement > 0 && by_other > 0, "{answers:?}");
                            log.add((by_replacement + by_other).to_string());
                            master.disconnect();
                        },
                    );
                });
            });
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["60"]);
}

/// Checks which clients are served if a worker is killed, and all workers are disconnected before a
/// replacement starts.
///
/// The killed worker's clients are reset, and the other clients are served.
fn clients_of_a_killed_worker_are_reset_at_a_stop() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            with_a_killed_worker(master, move |master, second, clients| {
                let own = second.id().to_string();
                second.process().kill(Signal::CONT);
                master.disconnect();
                let read = || {
                    // Let all clients send before the first one reads. A read from a client of the
                    // killed worker waits until the connection is reset, and the reset comes only
                    // after all other clients are served.
                    let send = |mut client: &TcpStream| drop(client.write_all(b"x"));
                    clients.iter().for_each(send);
                    clients.into_iter().map(read_answer).collect::<Vec<_>>()
                };
                in_background(master, read, move |_, answers| {
                    let served = answers.iter().flatten().filter(|answer| **answer == own);
                    let served = served.count();
                    let reset = answers.iter().filter(|answer| answer.is_none()).count();
                    assert!(served > 0 && reset > 0, "{served} and {reset}");
                    log.add((served + reset).to_string());
                });
            });
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["60"]);
}

/// Returns the client's answer, or `None` if the connection is reset.
fn read_answer(mut client: TcpStream) -> Option<String> {
    client.set_read_timeout(Some(scaled(PATIENCE))).unwrap();
    let mut answer = String::new();
    match client.read_to_string(&mut answer) {
        Ok(_) => Some(answer),
        Err(error) => {
            let mut count = Count::default();
            count.fail(&error);
            assert_eq!(count.reset, 1, "{error}");
            None
        }
    }
}

/// Checks that no worker receives more than 1.2 times as many connections as another.
///
/// With 10,000 clients, chance alone exceeds this ratio in fewer than 2 of 10,000 runs. With more
/// clients, the test would exceed its deadline on an emulated machine.
fn shards_receive_equal_shares() {
    const CLIENTS: u32 = 10_000;
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            shard(master);
            when_listening(master, 8, move |master, address| {
                let has_failed = Arc::new(AtomicBool::new(false));
                let part = move || {
                    let mut parts = BTreeMap::new();
                    for _ in 0..CLIENTS / 4 {
                        let answer = ask(address);
                        // Stop if another thread has failed, so that the first failure ends the
                        // test.
                        if has_failed.fetch_or(answer.is_err(), Ordering::SeqCst) {
                            break;
                        }
                        *parts.entry(answer.unwrap()).or_insert(0) += 1;
                    }
                    parts
                };
                let work = move || {
                    let threads = (0..4).map(|_| std::thread::spawn(part.clone()));
                    let threads: Vec<_> = threads.collect();
                    let mut sum = BTreeMap::new();
                    for thread in threads {
                        for (worker, count) in thread.join().unwrap() {
                            *sum.entry(worker).or_insert(0) += count;
                        }
                    }
                    sum
                };
                in_background(master, work, move |master, parts: BTreeMap<_, u32>| {
                    assert_eq!(parts.len(), 8);
                    assert_eq!(parts.values().sum::<u32>(), CLIENTS);
                    let (least, most) = (parts.values().min(), parts.values().max());
                    let ratio = f64::from(*most.unwrap()) / f64::from(*least.unwrap());
                    println!("maximum/minimum {ratio:.3}");
                    assert!(ratio <= 1.2, "{parts:?}");
                    let ledger = master.ledger();
                    assert_eq!(ledger.accepted, 0, "the master accepts nothing");
                    log.add("equal");
                    master.disconnect();
                });
            });
            (0..8).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve(&worker),
    );
    assert_eq!(entries.take(), ["equal"]);
}

fn shards_have_one_port() {
    one_port("127.0.0.1:0");
}

fn shards_have_one_port_with_ipv6() {
    one_port("[::1]:0");
}

/// Checks that all workers receive the same port if each of them requests port 0, and that all of
/// them serve it.
fn one_port(any_port: &'static str) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            shard(master);
            let addresses = log.clone();
            master.on_listening(move |_, _, address| addresses.add(address.to_string()));
            when_listening(master, 4, move |master, address| {
                let own: SocketAddr = any_port.parse().unwrap();
                assert_eq!(address.ip(), own.ip());
                let work = move || {
                    let mut answers = BTreeSet::new();
                    wait_until("all", || {
                        answers.insert(talk(address, b"").unwrap());
                        (answers.len() == 4).then_some(())
                    });
                };
                in_background(master, work, |master, ()| master.disconnect());
            });
            (0..4).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| crate::harness::serve_id(&worker, any_port),
    );
    let addresses = entries.take();
    assert_eq!(addresses, [&*addresses[0]; 4]);
}

fn unix_socket_is_shared_under_the_sharded_policy() {
    const PATH: &str = "SHARDED_PATH";
    let directory = cluster::is_master().then(|| tempfile::tempdir().unwrap());
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            shard(master);
            let path = directory.as_ref().unwrap().path().join("socket");
            let mut missing = 2;
            let own = path.clone();
            master.on_listening(move |master, _, address| {
                assert_eq!(address.to_string(), own.to_str().unwrap());
                missing -= 1;
                if missing > 0 {
                    return;
                }
                let (own, log) = (own.clone(), log.clone());
                let work = move || {
                    let mut answers = BTreeSet::new();
                    wait_until("both", || {
                        let mut client = UnixStream::connect(&own).unwrap();
                        let mut answer = String::new();
                        client.read_to_string(&mut answer).unwrap();
                        answers.insert(answer);
                        (answers.len() == 2).then_some(())
                    });
                };
                in_background(master, work, move |master, ()| {
                    assert_eq!(master.ledger().accepted, 0);
                    log.add("both");
                    master.disconnect();
                });
            });
            for _ in 0..2 {
                drop(master.fork_with([(PATH, &path)]).unwrap());
            }
        },
        |worker| {
            let path = PathBuf::from(std::env::var_os(PATH).unwrap());
            for connection in worker.listen(path.as_path()).unwrap().incoming() {
                let id = worker.id().to_string();
                connection.unwrap().write_all(id.as_bytes()).unwrap();
            }
        },
    );
    assert_eq!(entries.take(), ["both"]);
}

/// Checks that `listen` fails on another cluster's port.
///
/// If it succeeded, the kernel would distribute clients among both clusters' shards.
fn sharded_port_of_another_cluster_is_an_error() {
    use nix::sys::socket::{setsockopt, sockopt::ReusePort};
    use std::os::fd::AsFd as _;
    cluster(
        |master| {
            shard(master);
            // Create a socket with the same options as a listener of another master that the same
            // user runs.
            let (socket, address) = crate::harness::reserve_port();
            setsockopt(&socket, ReusePort, &true).unwrap();
            nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::new(16).unwrap()).unwrap();
            let error = master.listen(address.to_string()).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::EADDRINUSE), "{error}");
            assert!(matches!(error, cluster::Error::Listen { .. }));
            drop(socket);
            // Listen on the port once the other socket is closed, which must succeed.
            let listener = master.listen(address.to_string()).unwrap();
            let _ = listener.as_fd();
            drop(listener);
        },
        |_| {},
    );
}

/// Checks that a sharded port is served again if one worker is killed while another is
/// disconnecting and still serves its shard.
///
/// The next worker must listen on the same port.
fn sharded_port_serves_again_while_an_old_worker_disconnects() {
    const PORT: &str = "SHARDED_PORT";
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            shard(master);
            let (reserved, address) = crate::harness::reserve_port();
            let fork = move |master: &Master| master.fork_with([(PORT, address.to_string())]);
            let fork = move |master: &Master| fork(master).unwrap();
            let listening = Cell::new(0);
            let rest = Cell::new(None);
            master.on_listening(move |master, worker, _| {
                let _ = &reserved;
                listening.set(listening.get() + 1);
                match listening.get() {
                    1 => {}
                    2 => {
                        // Connect clients to both shards. The clients stay silent, so the
                        // disconnecting worker is still busy when the next worker listens.
                        let clients = [(); 30].map(|()| TcpStream::connect(address).unwrap());
                        rest.set(Some(clients));
                        let [disconnecting, killed] = &master.workers()[..] else {
                            unreachable!("there are two workers")
                        };
                        disconnecting.disconnect();
                        killed.process().kill(Signal::KILL);
                        killed.on_exit(move |master, _, _| drop(fork(master)));
                    }
                    _ => {
                        let (id, log, clients) = (worker.id(), log.clone(), rest.take());
                        let work = move || talk(address, b"").unwrap();
                        in_background(master, work, move |master, answer| {
                            assert_eq!(answer, format!("{id}."));
                            // Check that the disconnecting worker has not exited in the meantime.
                            assert!(master.workers().len() == 2);
                            log.add("served");
                            drop(clients);
                            master.disconnect();
                        });
                    }
                }
            });
            (0..2).for_each(|_| drop(fork(master)));
        },
        |worker| {
            for connection in worker
                .listen(std::env::var(PORT).unwrap())
                .unwrap()
                .incoming()
            {
                let mut connection = connection.unwrap();
                let id = worker.id().to_string();
                // Do not read in the third worker. It inherits silent clients from the killed
                // worker's shard, and would wait for them.
                if id != "3" {
                    let _ = connection.read(&mut [0]);
                }
                let _ = connection.write_all(format!("{id}.").as_bytes());
            }
        },
    );
    assert_eq!(entries.take(), ["served"]);
}
