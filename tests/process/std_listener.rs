//! Tests servers that accept connections without the crate, on their own threads, and servers that
//! take an iterator of streams. Here the servers are a few lines of the standard library.

use std::cell::{Cell, RefCell};
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;

use cluster::pool::{Pool, PoolEvent, PoolOptions, READY, Readiness};
use cluster::{ListenOptions, Listener, Master, Signal, Worker};

use crate::harness::{
    Log, cluster, for_policies_without_dispatch, in_background, reserve_port, scaled,
    share_listeners, talk, when, when_listening, with_env,
};
use crate::sharded::{Count, Load};

crate::scenarios! {
    reloads_of_std_listeners_lose_no_client
    killed_workers_with_std_listeners_refuse_no_client
    idle_std_listener_ends_at_a_disconnect
    std_listener_ends_although_the_worker_has_accepted_before
    std_listener_ends_after_its_last_client
    std_listener_ends_alone
    std_listener_of_the_last_worker_serves_its_backlog
    worker_waits_for_connections_of_its_std_listener
    std_listener_of_a_closed_channel_ends
    unix_std_listener_ends_at_a_disconnect
    into_std_is_unsupported_with_round_robin
    reloads_of_private_std_listeners_lose_no_client
    reloads_of_workers_with_streams_lose_no_client
    worker_waits_for_streams
}

/// Answers a client.
fn serve(mut stream: TcpStream) {
    let _ = stream.write_all(format!("{}.", std::process::id()).as_bytes());
}

/// Accepts connections until `accept` fails, and serves each on a thread.
fn accept_all(listener: &TcpListener, serve: fn(TcpStream)) -> io::Error {
    loop {
        match listener.accept() {
            Ok((stream, _)) => drop(std::thread::spawn(move || serve(stream))),
            Err(error) => return error,
        }
    }
}

/// Runs the worker while a thread accepts the listener's connections. Returns the error that ended
/// the thread.
fn run_beside(worker: &Worker, listener: TcpListener, serve: fn(TcpStream)) -> io::Error {
    let server = std::thread::spawn(move || accept_all(&listener, serve));
    worker.run().unwrap();
    server.join().unwrap()
}

/// Runs the worker while the listener's connections are accepted without the crate.
fn serve_std(worker: &Worker, options: impl Into<ListenOptions>) {
    let listener = worker.listen(options).unwrap().into_std().unwrap();
    let error = run_beside(worker, listener, serve);
    // At the end, `accept` fails with EINVAL, or with EWOULDBLOCK if the listener is not retained.
    let is_end = matches!(
        error.kind(),
        io::ErrorKind::InvalidInput | io::ErrorKind::WouldBlock
    );
    assert!(is_end, "{error}");
}

/// The disturbance that a test repeats in a pool under load.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Disturbance {
    Reload,
    /// A worker is killed, and the pool replaces it.
    Kill,
}

/// A pool of three workers under load.
struct Disturbed {
    pool: Pool,
    disturbance: Disturbance,
    left: Cell<u32>,
    load: RefCell<Option<Load>>,
    check: fn(&Count),
}

impl Disturbed {
    /// Starts the pool, and the load once all workers are ready. Disturbs the pool `times` times,
    /// while clients are served. Then checks the failures, and stops the pool.
    fn start(
        master: &Master,
        listen: Listen,
        disturbance: Disturbance,
        times: u32,
        check: fn(&Count),
    ) {
        let options = PoolOptions::default().workers(3).jitter(0);
        let options = options.back_off(Duration::from_millis(20));
        // A private listener causes no `listening` event.
        let options = match listen {
            Listen::Shared => options,
            Listen::Privately(_) => options.readiness(Readiness::Message),
        };
        let pool = Pool::new(master, options.min_ready_time(Duration::ZERO));
        let address = match listen {
            Listen::Shared => {
                let address = pool.listen(master, "127.0.0.1:0").unwrap();
                address.socket_addr().unwrap()
            }
            Listen::Privately(address) => address,
        };
        let this = Rc::new(Self {
            pool: pool.clone(),
            disturbance,
            left: Cell::new(times),
            load: RefCell::default(),
            check,
        });
        let ready = Cell::new(0);
        pool.on_event(move |_, master, event| match (event, disturbance) {
            (PoolEvent::WorkerReady { .. }, _) => {
                ready.set(ready.get() + 1);
                if ready.get() == 3 {
                    *this.load.borrow_mut() = Some(Load::begin(address));
                }
                if ready.get() == 3 || ready.get() > 3 && disturbance == Disturbance::Kill {
                    this.next(master);
                }
            }
            (PoolEvent::Reloaded { .. }, _) => this.next(master),
            (PoolEvent::WorkerShutDown { killed, .. }, _) => assert!(!killed),
            (PoolEvent::WorkerFailed(failure), Disturbance::Reload) => panic!("{failure}"),
            _ => {}
        });
    }

    /// Disturbs the pool once the load has received 200 more answers, or ends the load.
    fn next(self: &Rc<Self>, master: &Master) {
        let this = Rc::clone(self);
        if self.left.get() == 0 {
            let load = self.load.take().unwrap();
            let ended = move |master: &Master, (answered, count): (u64, Count)| {
                println!("{answered} answers, {count:?}");
                (this.check)(&count);
                this.pool.stop(master);
            };
            return in_background(master, move || load.end(), ended);
        }
        self.left.set(self.left.get() - 1);
        let answered = self.load.borrow().as_ref().unwrap().answered();
        let end = answered.load(Ordering::SeqCst) + 200;
        let has_answers = move |_: &Master| answered.load(Ordering::SeqCst) >= end;
        when(master, has_answers, move |master| match this.disturbance {
            Disturbance::Reload => this.pool.reload(master),
            Disturbance::Kill => master.workers()[0].process().kill(Signal::KILL),
        });
    }
}

/// The way in which the workers listen.
#[derive(Clone, Copy)]
enum Listen {
    /// The pool retains a listener on any port.
    Shared,
    /// Each worker binds its own listener on this address.
    Privately(SocketAddr),
}

fn reloads_of_std_listeners_lose_no_client() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| {
                let reload = Disturbance::Reload;
                Disturbed::start(master, Listen::Shared, reload, 10, |count| {
                    assert_eq!(*count, Count::NO_FAILURE);
                });
            },
            |worker| serve_std(&worker, "127.0.0.1:0"),
        );
    });
}

fn killed_workers_with_std_listeners_refuse_no_client() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| {
                Disturbed::start(master, Listen::Shared, Disturbance::Kill, 5, |count| {
                    assert_eq!((count.refused, count.timed_out), (0, 0));
                    // The load has 16 clients at a time, so a kill loses at most 16 connections.
                    assert!(count.reset + count.wrong <= 5 * 16, "{count:?}");
                });
            },
            |worker| serve_std(&worker, "127.0.0.1:0"),
        );
    });
}

/// Retains the listener until the only worker exits. Otherwise, the master would shut the listener
/// down, and `accept` would end for this reason too.
fn retain<S: 'static>(master: &Master, options: impl Into<ListenOptions<S>>) {
    let listener = master.listen(options).unwrap();
    let listener = Cell::new(Some(listener));
    master.on_exit(move |_, _, status| {
        assert!(status.success(), "{status}");
        drop(listener.take());
    });
}

/// Disconnects the only worker once `count` clients have received answers.
fn disconnect_after_clients(master: &Master, count: usize) {
    when_listening(master, 1, move |master, address| {
        let clients = move || {
            for _ in 0..count {
                assert!(talk(address, b"").unwrap().ends_with('.'));
            }
        };
        in_background(master, clients, |master, ()| master.disconnect());
    });
    master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
    master.fork().unwrap();
}

fn idle_std_listener_ends_at_a_disconnect() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| {
                retain(master, "127.0.0.1:0");
                disconnect_after_clients(master, 0);
            },
            |worker| serve_std(&worker, "127.0.0.1:0"),
        );
    });
}

/// Checks that a thread does not inherit a blocked signal from the thread that has called the
/// crate's `accept`.
fn std_listener_ends_although_the_worker_has_accepted_before() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| {
                retain(master, "127.0.0.1:0");
                disconnect_after_clients(master, 1);
            },
            |worker| {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                serve(listener.accept().unwrap().unwrap().into_stream());
                run_beside(&worker, listener.into_std().unwrap(), serve);
            },
        );
    });
}

fn std_listener_ends_after_its_last_client() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| disconnect_after_clients(master, 1),
            |worker| serve_std(&worker, "127.0.0.1:0"),
        );
    });
}

fn std_listener_ends_alone() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            share_listeners(master);
            when_listening(master, 2, move |master, address| {
                let workers = master.workers();
                let last = workers[1].process().id();
                workers[0].disconnect();
                workers[0].on_exit(move |master, _, status| {
                    assert!(status.success(), "{status}");
                    let log = log.clone();
                    let clients = move || [(); 20].map(|()| talk(address, b"").unwrap());
                    in_background(master, clients, move |master, answers| {
                        assert_eq!(answers, [(); 20].map(|()| format!("{last}.")));
                        log.add("answered");
                        master.disconnect();
                    });
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_std(&worker, "127.0.0.1:0"),
    );
    assert_eq!(entries.take(), ["answered"]);
}

fn std_listener_of_the_last_worker_serves_its_backlog() {
    const CLIENTS: usize = 50;
    for_policies_without_dispatch(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                when_listening(master, 1, move |master, address| {
                    // The worker does not accept until it receives a message.
                    let clients = [(); CLIENTS].map(|()| TcpStream::connect(address).unwrap());
                    let worker = &master.workers()[0];
                    worker.disconnect();
                    let _ = worker.send(b"accept").unwrap();
                    let answers = move || clients.map(read_to_end);
                    in_background(master, answers, move |_, answers| {
                        assert!(answers.iter().all(|answer| answer.ends_with('.')));
                        log.add("answered");
                    });
                });
                master.fork().unwrap();
            },
            |worker| {
                let listener = worker.listen("127.0.0.1:0").unwrap().into_std().unwrap();
                let (begin, wait) = mpsc::channel();
                worker.on_message(move |_, _| begin.send(()).unwrap());
                let server = std::thread::spawn(move || {
                    wait.recv().unwrap();
                    accept_all(&listener, serve)
                });
                worker.run().unwrap();
                server.join().unwrap();
            },
        );
        assert_eq!(entries.take(), ["answered"]);
    });
}

fn read_to_end(mut stream: TcpStream) -> String {
    let mut answer = String::new();
    stream
        .set_read_timeout(Some(scaled(Duration::from_secs(20))))
        .unwrap();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Sends one byte, waits for one byte from the client, and then answers the request.
fn serve_after_one_byte(mut stream: TcpStream) {
    stream.write_all(b"-").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    serve(stream);
}

/// Disconnects the only worker while a client waits for its answer. Lets the client send its byte
/// only after the worker has reported that it still waits for the client.
fn disconnect_before_the_answer(master: &Master, log: Log) {
    when_listening(master, 1, move |master, address| {
        let connect = move || {
            let mut client = TcpStream::connect(address).unwrap();
            client.read_exact(&mut [0]).unwrap();
            client
        };
        in_background(master, connect, move |master, mut client| {
            let worker = &master.workers()[0];
            worker.disconnect();
            worker.on_message_once(move |master, _, message| {
                assert_eq!(message.bytes(), b"waiting");
                let answer = move || {
                    client.write_all(b"x").unwrap();
                    read_to_end(client)
                };
                in_background(master, answer, move |_, answer| {
                    assert!(answer.ends_with('.'), "{answer:?}");
                    log.add("answered");
                });
            });
        });
    });
    master.fork().unwrap();
}

/// Makes the worker report, 300 ms after its disconnect request, that it still waits for its
/// client.
fn report_that_it_waits(worker: &Worker) {
    worker.on_disconnecting(|worker| {
        worker.set_timeout(Duration::from_millis(300), |worker| {
            assert!(worker.is_connected(), "the worker does not wait");
            let _ = worker.send(b"waiting").unwrap();
        });
    });
}

fn worker_waits_for_connections_of_its_std_listener() {
    for_policies_without_dispatch(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| disconnect_before_the_answer(master, log),
            |worker| {
                report_that_it_waits(&worker);
                let listener = worker.listen("127.0.0.1:0").unwrap().into_std().unwrap();
                run_beside(&worker, listener, serve_after_one_byte);
            },
        );
        assert_eq!(entries.take(), ["answered"]);
    });
}

fn std_listener_of_a_closed_channel_ends() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| {
                retain(master, "127.0.0.1:0");
                master.fork().unwrap();
            },
            |worker| {
                worker.set_timeout(Duration::from_millis(20), |worker| {
                    worker.process().disconnect();
                });
                serve_std(&worker, "127.0.0.1:0");
            },
        );
    });
}

fn unix_std_listener_ends_at_a_disconnect() {
    let name = |own: u32| format!("\0cluster-test-std-listener-{own}");
    cluster(
        |master| {
            share_listeners(master);
            retain(master, PathBuf::from(name(std::process::id())));
            master.on_listening(move |master, _, _| {
                let address = std::os::unix::net::SocketAddr::from_abstract_name(
                    &name(std::process::id())[1..],
                );
                let ask = move || {
                    let mut stream = UnixStream::connect_addr(&address.unwrap()).unwrap();
                    let mut answer = String::new();
                    stream.read_to_string(&mut answer).unwrap();
                    answer
                };
                in_background(master, ask, |master, answer| {
                    assert_eq!(answer, "hello");
                    master.disconnect();
                });
            });
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
            master.fork().unwrap();
        },
        |worker| {
            let path = PathBuf::from(name(std::os::unix::process::parent_id()));
            let listener: Listener<UnixStream> = worker.listen(path).unwrap();
            let listener = listener.into_std().unwrap();
            let server = std::thread::spawn(move || {
                while let Ok((mut stream, _)) = listener.accept() {
                    stream.write_all(b"hello").unwrap();
                }
            });
            worker.run().unwrap();
            server.join().unwrap();
        },
    );
}

fn into_std_is_unsupported_with_round_robin() {
    cluster(
        |master| {
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
            master.fork().unwrap();
        },
        |worker| {
            let listener: Listener = worker.listen("127.0.0.1:0").unwrap();
            let error = listener.into_std().unwrap_err();
            let cluster::Error::Io { reason, .. } = error else {
                panic!("{error}");
            };
            assert_eq!(reason.kind(), io::ErrorKind::Unsupported);
            worker.disconnect().run().unwrap();
        },
    );
}

fn reloads_of_private_std_listeners_lose_no_client() {
    const ADDRESS: &str = "CLUSTER_TEST_ADDRESS";
    let Some(address) = std::env::var_os(ADDRESS) else {
        let (_reserved, address) = reserve_port();
        return with_env(ADDRESS, &address.to_string(), || {});
    };
    let address: SocketAddr = address.to_str().unwrap().parse().unwrap();
    cluster(
        |master| {
            let listen = Listen::Privately(address);
            Disturbed::start(master, listen, Disturbance::Reload, 10, |count| {
                assert_eq!(*count, Count::NO_FAILURE);
            });
        },
        |worker| {
            let options = ListenOptions::from(address).reuse_port(true);
            let listener = worker.listen(options).unwrap().into_std().unwrap();
            let _ = worker.send(READY).unwrap();
            run_beside(&worker, listener, serve);
        },
    );
}

/// Runs `play` with every policy, each in a child process.
fn for_all_policies(play: impl Fn()) {
    for policy in ["rr", "none", "sharded"] {
        if std::env::var("CLUSTER_SCHED_POLICY").is_ok_and(|own| own != policy) {
            continue;
        }
        with_env("CLUSTER_SCHED_POLICY", policy, &play);
    }
}

/// Serves each stream on a thread, like a server that takes an iterator.
fn serve_streams(streams: impl Iterator<Item = io::Result<TcpStream>>, serve: fn(TcpStream)) {
    for stream in streams {
        let stream = stream.unwrap();
        std::thread::spawn(move || serve(stream));
    }
}

fn reloads_of_workers_with_streams_lose_no_client() {
    for_all_policies(|| {
        cluster(
            |master| {
                let reload = Disturbance::Reload;
                Disturbed::start(master, Listen::Shared, reload, 10, |count| {
                    assert_eq!(*count, Count::NO_FAILURE);
                });
            },
            |worker| {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                serve_streams(listener.streams(), serve);
                worker.run().unwrap();
            },
        );
    });
}

fn worker_waits_for_streams() {
    for_all_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| disconnect_before_the_answer(master, log),
            |worker| {
                report_that_it_waits(&worker);
                let listener = worker.listen("127.0.0.1:0").unwrap();
                serve_streams(listener.streams(), serve_after_one_byte);
                worker.run().unwrap();
            },
        );
        assert_eq!(entries.take(), ["answered"]);
    });
}
