//! Tests of children that the application forks, for example to serve each connection in a child.
//!
//! The children have copies of all the crate's handles, and must not affect the process that
//! created the handles.

use std::cell::{Cell, RefCell};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cluster::pool::{Pool, PoolOptions, SignalAction};
use cluster::{
    Connection, Error, Interest, ListenOptions, Listener, Master, MasterListener, Role,
    SchedulingPolicy, Settings, Signal, SpawnOptions, UdpSocket, Worker, WorkerProcess,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal as Number, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

use crate::harness::{
    SIGNALS, answer_pings, cluster, in_background, talk, wait_until, when_listening,
};

crate::scenarios! {
    child_per_connection_leaves_its_worker_alone_rr
    child_per_connection_leaves_its_worker_alone_none
    child_per_connection_leaves_its_worker_alone_sharded
    handles_of_a_worker_are_inert_in_a_forked_child_rr
    handles_of_a_worker_are_inert_in_a_forked_child_none
    handles_of_a_master_are_inert_in_a_forked_child
    pool_is_inert_in_a_forked_child
    signal_with_a_callback_does_nothing_in_a_forked_child_that_has_the_handle
    loop_ends_in_a_child_forked_by_a_callback
}

fn fork() -> ForkResult {
    #[allow(unsafe_code)]
    // SAFETY: the parent has one thread, so no other thread can hold a lock that the child needs.
    unsafe { nix::unistd::fork() }.unwrap()
}

/// Runs `play` in a child and asserts that the child succeeds. The child calls `exit`, so that exit
/// handlers run.
fn in_child(play: impl FnOnce()) {
    match fork() {
        ForkResult::Child => {
            play();
            std::process::exit(0);
        }
        ForkResult::Parent { child } => expect_success(child),
    }
}

#[track_caller]
fn expect_success(child: Pid) {
    assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0)));
}

/// Returns whether the loop has nothing to process, that is, whether its poller reports no ready
/// descriptor.
fn is_idle(poller: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(poller.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() == 0
}

#[track_caller]
fn expect_foreign<T, E: Into<Error>>(result: std::result::Result<T, E>) {
    match result.map_err(Into::into) {
        Err(Error::ForeignProcess) => {}
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("the call succeeded"),
    }
}

/// Connects clients one after another. The worker forks a child for each client, and the child
/// answers the client and returns from `main`.
fn child_per_connection(policy: SchedulingPolicy) {
    const CLIENTS: usize = 5;
    let served = Rc::new(Cell::new(0));
    let counted = Rc::clone(&served);
    match cluster::init().unwrap() {
        Role::Master(master) => {
            master.set_scheduling_policy(policy).unwrap();
            master.on_error(|_, _, error| panic!("{error}"));
            master.on_exit(|_, worker, status| {
                assert!(status.success(), "{status}");
                assert_eq!(worker.exited_after_disconnect(), Some(true));
            });
            when_listening(&master, 1, move |master, address| {
                let ask = move || [(); CLIENTS].map(|()| talk(address, b"").unwrap());
                in_background(master, ask, move |master, answers| {
                    assert_eq!(answers, ["served"; CLIENTS]);
                    counted.set(answers.len());
                    master.disconnect();
                });
            });
            master.fork().unwrap();
            master.run().unwrap();
            assert_eq!(served.get(), CLIENTS);
        }
        Role::Worker(worker) => {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            for connection in listener.incoming() {
                let mut connection = connection.unwrap();
                match fork() {
                    ForkResult::Child => return connection.write_all(b"served").unwrap(),
                    ForkResult::Parent { child } => expect_success(child),
                }
            }
        }
    }
}

fn child_per_connection_leaves_its_worker_alone_rr() {
    child_per_connection(SchedulingPolicy::RoundRobin);
}

fn child_per_connection_leaves_its_worker_alone_none() {
    child_per_connection(SchedulingPolicy::Shared);
}

fn child_per_connection_leaves_its_worker_alone_sharded() {
    child_per_connection(SchedulingPolicy::Sharded);
}

/// A worker's handles of several kinds.
struct WorkerHandles {
    connection: Connection,
    listener: Listener,
    blocking: Listener,
    exclusive: Listener<UnixStream>,
    udp: UdpSocket,
    watch: cluster::WatchId,
    timer: cluster::TimerId,
    worker: Worker,
}

/// A list of names and functions. Each function uses the handles in a child.
type Uses<H> = [(&'static str, fn(&H))];

/// Uses of a worker's handles. Each child performs one of them and then drops all handles.
const WORKER_USES: &Uses<WorkerHandles> = &[
    ("nothing", |_| {}),
    ("Worker::send", |handles| {
        expect_foreign(handles.worker.send(b"from a child"))
    }),
    ("Worker::disconnect", |handles| {
        handles.worker.disconnect();
    }),
    ("Worker::kill", |handles| handles.worker.kill()),
    ("OwnProcess::disconnect", |handles| {
        handles.worker.process().disconnect()
    }),
    ("Worker::run", |handles| {
        expect_foreign(handles.worker.run())
    }),
    ("Worker::dispatch", |handles| {
        expect_foreign(handles.worker.dispatch(Some(Duration::ZERO)));
    }),
    ("Worker::listen", |handles| {
        expect_foreign(handles.worker.listen("127.0.0.1:0"));
        expect_foreign(
            handles
                .worker
                .listen(ListenOptions::from("127.0.0.1:0").exclusive(true)),
        );
    }),
    ("Worker::bind", |handles| {
        expect_foreign(handles.worker.bind("127.0.0.1:0"))
    }),
    ("Worker::watch", |handles| {
        let (one, _) = UnixStream::pair().unwrap();
        expect_foreign(handles.worker.watch(one, Interest::Readable, |_, _| None));
    }),
    ("Worker::unwatch", |handles| {
        handles.worker.unwatch(handles.watch)
    }),
    ("Worker::as_fd", |handles| {
        drop(handles.worker.as_fd().try_clone_to_owned())
    }),
    ("Worker::on_signal", |handles| {
        expect_foreign(handles.worker.on_signal(Signal::USR1, |_, _| {}));
        expect_foreign(handles.worker.on_signal(Signal::USR2, |_, _| {}));
    }),
    ("a signal", |_| raise(Number::SIGUSR1).unwrap()),
    ("Worker::set_timeout", |handles| {
        handles
            .worker
            .set_timeout(Duration::ZERO, |_| panic!("it ran"));
        handles.worker.clear_timer(handles.timer);
    }),
    ("Listener::accept", |handles| {
        expect_foreign(handles.listener.accept());
        expect_foreign(handles.blocking.accept());
        expect_foreign(handles.exclusive.accept());
    }),
    ("Listener::incoming", |handles| {
        expect_foreign(handles.blocking.incoming().next().unwrap());
    }),
    ("Listener::on_connection", |handles| {
        handles
            .blocking
            .set_connection_callback(|_, _| panic!("it was called"));
    }),
    ("Listener::on_drop", |handles| {
        handles.blocking.set_max_connections(Some(0));
        handles
            .blocking
            .set_drop_callback(|_, _| panic!("it was called"));
    }),
    ("Listener::close", |handles| {
        handles.listener.close();
        handles.blocking.close();
        handles.exclusive.close();
    }),
    ("UdpSocket::recv_from", |handles| {
        expect_foreign(handles.udp.recv_from(&mut [0; 8]));
    }),
    ("UdpSocket::on_message", |handles| {
        handles
            .udp
            .set_message_callback(|_, _, _, _| panic!("it was called"));
    }),
    ("UdpSocket::close", |handles| handles.udp.close()),
    ("Connection::write", |handles| {
        (&handles.connection).write_all(b"c").unwrap();
    }),
];

/// The number of calls of each of a worker's callbacks.
#[derive(Default)]
struct Seen {
    pongs: Cell<u32>,
    connections: Cell<u32>,
    datagrams: Cell<u32>,
    signals: Cell<u32>,
    watched: Cell<u32>,
    timeouts: Cell<u32>,
}

fn count(counter: &Cell<u32>) {
    counter.set(counter.get() + 1);
}

/// Calls `cause`, and runs the worker's loop until the counter has been incremented.
#[track_caller]
fn dispatch_until_counted(what: &str, worker: &Worker, counter: &Cell<u32>, cause: impl FnOnce()) {
    let before = counter.get();
    cause();
    wait_until(what, || {
        worker.dispatch(Some(Duration::from_millis(1))).unwrap();
        (counter.get() == before + 1).then_some(())
    });
}

impl WorkerHandles {
    /// Checks that no child has woken the parent's loop, and that the parent's handles still work.
    fn check(&self, seen: &Rc<Seen>, path: &Path, mut watched: &UnixStream) {
        let worker = &self.worker;
        assert!(is_idle(worker), "the child has woken its parent");
        assert!(worker.is_connected() && !worker.is_disconnecting());
        dispatch_until_counted("an answer", worker, &seen.pongs, || {
            let _ = worker.send(b"ping").unwrap();
        });
        for listener in [&self.listener, &self.blocking] {
            let connect = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            if std::ptr::eq(listener, &self.listener) {
                let client = RefCell::new(None);
                dispatch_until_counted("a connection", worker, &seen.connections, || {
                    client.replace(Some(connect()));
                });
            } else {
                let _client = connect();
                assert!(listener.accept().unwrap().is_some());
            }
        }
        let _client = UnixStream::connect(path).unwrap();
        assert!(self.exclusive.accept().unwrap().is_some());
        dispatch_until_counted("a datagram", worker, &seen.datagrams, || {
            let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            client
                .send_to(b"?", self.udp.local_addr().unwrap())
                .unwrap();
        });
        dispatch_until_counted("a signal", worker, &seen.signals, || {
            raise(Number::SIGUSR1).unwrap()
        });
        dispatch_until_counted("a watched descriptor", worker, &seen.watched, || {
            watched.write_all(b"!").unwrap();
        });
        let timed = Rc::clone(seen);
        dispatch_until_counted("a timer", worker, &seen.timeouts, || {
            worker.set_timeout(Duration::ZERO, move |_| count(&timed.timeouts));
        });
        // Empty the loop, so that the next check finds only events that a child has caused.
        while !is_idle(worker) {
            worker.dispatch(Some(Duration::ZERO)).unwrap();
        }
    }
}

fn use_all_handles(worker: Worker) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let seen = Rc::<Seen>::default();
    let (watched, other) = UnixStream::pair().unwrap();
    let counted = Rc::clone(&seen);
    worker.on_message(move |_, _| count(&counted.pongs));
    let listener = worker.listen("127.0.0.1:0").unwrap();
    let counted = Rc::clone(&seen);
    listener.set_connection_callback(move |_, _| count(&counted.connections));
    let blocking = worker.listen("127.0.0.2:0").unwrap();
    let exclusive = ListenOptions::from(path.as_path()).exclusive(true);
    let exclusive = worker.listen(exclusive).unwrap();
    let udp = worker.bind("127.0.0.1:0").unwrap();
    let counted = Rc::clone(&seen);
    udp.set_message_callback(move |_, _, _, _| count(&counted.datagrams));
    let counted = Rc::clone(&seen);
    let on_signal = move |_: &Worker, _| count(&counted.signals);
    worker.on_signal(Signal::USR1, on_signal).unwrap();
    let counted = Rc::clone(&seen);
    let on_watched = move |_: &Worker, mut watched: &UnixStream| {
        watched.read_exact(&mut [0]).unwrap();
        count(&counted.watched);
        Some(Interest::Readable)
    };
    let watch = worker
        .watch(watched, Interest::Readable, on_watched)
        .unwrap();
    let timer = worker.set_timeout(Duration::from_secs(600), |_| {
        panic!("the timer fired early")
    });
    let mut client = TcpStream::connect(blocking.local_addr().unwrap()).unwrap();
    let connection = blocking.accept().unwrap().unwrap();
    let handles = WorkerHandles {
        connection,
        listener,
        blocking,
        exclusive,
        udp,
        watch,
        timer,
        worker,
    };
    handles.check(&seen, &path, &other);
    for (name, use_handle) in WORKER_USES {
        println!("{name}");
        match fork() {
            ForkResult::Child => {
                use_handle(&handles);
                drop(handles);
                std::process::exit(0);
            }
            ForkResult::Parent { child } => expect_success(child),
        }
        handles.check(&seen, &path, &other);
    }
    // Check that the client receives the byte that a child has written, but no end-of-file, because
    // the parent still has the connection open.
    client.read_exact(&mut [0]).unwrap();
    client.set_nonblocking(true).unwrap();
    assert!(client.read(&mut [0]).is_err());
    assert!(path.exists());
}

fn handles_of_a_worker_are_inert(policy: SchedulingPolicy) {
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            master.on_error(|_, _, error| panic!("{error}"));
            master.on_message(|_, worker, message| {
                assert_eq!(message.bytes(), b"ping");
                let _ = worker.send(b"pong").unwrap();
            });
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
            master.fork().unwrap();
        },
        use_all_handles,
    );
}

fn handles_of_a_worker_are_inert_in_a_forked_child_rr() {
    handles_of_a_worker_are_inert(SchedulingPolicy::RoundRobin);
}

fn handles_of_a_worker_are_inert_in_a_forked_child_none() {
    handles_of_a_worker_are_inert(SchedulingPolicy::Shared);
}

/// A master's handles of several kinds.
struct MasterHandles {
    worker: WorkerProcess,
    tcp: MasterListener,
    unix: MasterListener,
    watch: cluster::WatchId,
    master: Master,
}

const MASTER_USES: &Uses<MasterHandles> = &[
    ("nothing", |_| {}),
    ("Master::fork", |handles| {
        expect_foreign(handles.master.fork());
        let copy = Settings::default().main(|_| 0);
        expect_foreign(
            handles
                .master
                .fork_as(SpawnOptions::new(copy).env("NAME", "value")),
        );
    }),
    ("Master::listen", |handles| {
        expect_foreign(handles.master.listen("127.0.0.1:0"))
    }),
    ("Master::retain_all", |handles| {
        assert!(handles.master.retain_all().is_empty());
    }),
    ("Master::pass_parked", |handles| {
        let (one, _) = UnixStream::pair().unwrap();
        expect_foreign(handles.master.pass_parked(one, Duration::ZERO));
        let (one, _) = UnixStream::pair().unwrap();
        expect_foreign(
            handles
                .master
                .receive_parked(one, |_| panic!("it was called")),
        );
    }),
    ("Master::run", |handles| {
        expect_foreign(handles.master.run())
    }),
    ("Master::dispatch", |handles| {
        expect_foreign(handles.master.dispatch(Some(Duration::ZERO)));
    }),
    ("Master::disconnect", |handles| {
        handles
            .master
            .on_all_disconnected_once(|_| panic!("it was called"));
        handles.master.disconnect()
    }),
    ("Master::disconnect_within", |handles| {
        handles
            .master
            .on_all_disconnected_once(|_| panic!("it was called"));
        handles.master.disconnect_within(Duration::ZERO);
    }),
    ("Master::watch", |handles| {
        let (one, _) = UnixStream::pair().unwrap();
        expect_foreign(handles.master.watch(one, Interest::Readable, |_, _| None));
    }),
    ("Master::unwatch", |handles| {
        handles.master.unwatch(handles.watch)
    }),
    ("Master::on_signal", |handles| {
        expect_foreign(handles.master.on_signal(Signal::USR1, |_, _| {}));
        expect_foreign(handles.master.on_signal(Signal::USR2, |_, _| {}));
    }),
    ("a signal", |_| raise(Number::SIGUSR1).unwrap()),
    ("Master::set_timeout", |handles| {
        handles
            .master
            .set_timeout(Duration::ZERO, |_| panic!("it ran"));
    }),
    ("Master::loads", |handles| {
        let _ = (handles.master.loads(), handles.master.ledger());
    }),
    ("WorkerProcess::send", |handles| {
        expect_foreign(handles.worker.send(b"from a child"))
    }),
    ("WorkerProcess::disconnect", |handles| {
        handles.worker.disconnect();
        handles.worker.disconnect_within(Duration::ZERO);
    }),
    ("WorkerProcess::kill", |handles| {
        handles.worker.kill(Signal::KILL)
    }),
    ("Process::kill", |handles| {
        handles.worker.process().kill(Signal::KILL)
    }),
    ("Process::disconnect", |handles| {
        handles.worker.process().disconnect()
    }),
    ("MasterListener::set_removes_file", |handles| {
        expect_foreign(handles.unix.set_removes_file(false));
        expect_foreign(handles.unix.set_removes_file(true));
    }),
    ("MasterListener::set_foreign_copies", |handles| {
        handles.unix.set_foreign_copies(true);
    }),
];

/// Runs the master's loop until `ask` returns a value.
#[track_caller]
fn dispatch_until<T>(what: &str, master: &Master, mut ask: impl FnMut() -> Option<T>) -> T {
    wait_until(what, || {
        master.dispatch(Some(Duration::from_millis(1))).unwrap();
        ask()
    })
}

/// Runs the master's loop until a server's answer is complete, and returns the answer.
fn answer_of(mut client: impl std::io::Read, master: &Master) -> String {
    let mut answer = String::new();
    dispatch_until("an answer", master, || {
        let mut bytes = [0; 16];
        match client.read(&mut bytes) {
            Ok(0) => Some(()),
            Ok(read) => {
                answer.push_str(std::str::from_utf8(&bytes[..read]).unwrap());
                None
            }
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                None
            }
        }
    });
    answer
}

fn answer_at(address: SocketAddr, master: &Master) -> String {
    let client = TcpStream::connect(address).unwrap();
    client.set_nonblocking(true).unwrap();
    answer_of(client, master)
}

/// Environment variable with the path on which the worker listens.
const UNIX: &str = "UNIX_PATH";

fn serve_both(worker: &Worker) {
    answer_pings(worker);
    let tcp = worker.listen("127.0.0.1:0").unwrap();
    tcp.set_connection_callback(|_, mut connection| connection.write_all(b"tcp").unwrap());
    let path = PathBuf::from(std::env::var_os(UNIX).unwrap());
    let unix = worker.listen(path.as_path()).unwrap();
    unix.set_connection_callback(|_, mut connection| connection.write_all(b"unix").unwrap());
    worker.run().unwrap();
}

fn handles_of_a_master_are_inert_in_a_forked_child() {
    SIGNALS.store(true, Ordering::SeqCst);
    let master = match cluster::init().unwrap() {
        Role::Master(master) => master,
        Role::Worker(worker) => return serve_both(&worker),
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    master.on_error(|_, _, error| panic!("{error}"));
    master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
    let pongs = Rc::new(Cell::new(0));
    let counted = Rc::clone(&pongs);
    master.on_message(move |_, _, _| count(&counted));
    let signals = Rc::new(Cell::new(0));
    let counted = Rc::clone(&signals);
    master
        .on_signal(Signal::USR1, move |_, _| count(&counted))
        .unwrap();
    let (watched, _other) = UnixStream::pair().unwrap();
    let never = |_: &Master, _: &UnixStream| panic!("nothing was written");
    let watch = master.watch(watched, Interest::Readable, never).unwrap();
    let tcp = master.listen("127.0.0.1:0").unwrap();
    let unix = master.listen(path.as_path()).unwrap();
    let address: SocketAddr = tcp.address().to_string().parse().unwrap();
    let worker = master.fork_with([(UNIX, &path)]).unwrap();
    let handles = MasterHandles {
        worker,
        tcp,
        unix,
        watch,
        master,
    };
    let check = |handles: &MasterHandles| {
        let MasterHandles { worker, master, .. } = handles;
        assert!(is_idle(master), "the child has woken its parent");
        let before = pongs.get();
        let _ = worker.send(b"ping").unwrap();
        dispatch_until("an answer", master, || (pongs.get() > before).then_some(()));
        assert_eq!(answer_at(address, master), "tcp");
        let client = UnixStream::connect(&path).unwrap();
        client.set_nonblocking(true).unwrap();
        assert_eq!(answer_of(client, master), "unix");
        let before = signals.get();
        raise(Number::SIGUSR1).unwrap();
        dispatch_until("a signal", master, || {
            (signals.get() > before).then_some(())
        });
        // Process the remaining events, such as the worker's report that it is idle, so that the
        // next check finds only events that a child has caused.
        wait_until("an idle loop", || {
            master.dispatch(Some(Duration::from_millis(10))).unwrap();
            is_idle(master).then_some(())
        });
    };
    // Connect once to each listener and wait until the loop is idle. The first check expects an
    // idle loop, and the worker's start-up causes events.
    assert_eq!(answer_at(address, &handles.master), "tcp");
    let client = UnixStream::connect(&path).unwrap();
    client.set_nonblocking(true).unwrap();
    assert_eq!(answer_of(client, &handles.master), "unix");
    let master = &handles.master;
    wait_until("an idle loop", || {
        master.dispatch(Some(Duration::from_millis(10))).unwrap();
        is_idle(master).then_some(())
    });
    check(&handles);
    for (name, use_handle) in MASTER_USES {
        println!("{name}");
        match fork() {
            ForkResult::Child => {
                use_handle(&handles);
                let MasterHandles {
                    worker,
                    tcp,
                    unix,
                    master,
                    ..
                } = handles;
                // Drop one listener before the master and one after it, to test both orders.
                drop(tcp);
                drop(master);
                drop((unix, worker));
                std::process::exit(0);
            }
            ForkResult::Parent { child } => expect_success(child),
        }
        check(&handles);
    }
    assert!(handles.worker.is_connected() && !handles.worker.is_dead());
    handles.master.unwatch(handles.watch);
    handles.master.disconnect();
    handles.master.run().unwrap();
    drop(handles);
    assert!(!path.exists(), "the parent removes the socket file");
}

type PoolUse = fn(&Pool, &Master);

const POOL_USES: &[(&str, PoolUse)] = &[
    ("nothing", |_, _| {}),
    ("Pool::listen", |pool, master| {
        expect_foreign(pool.listen(master, "127.0.0.1:0"))
    }),
    ("Pool::upgrade", |pool, master| {
        expect_foreign(pool.upgrade(master))
    }),
    ("Pool::on_signal", |pool, master| {
        expect_foreign(pool.on_signal(master, Signal::USR1, SignalAction::Stop));
    }),
    ("Pool::stop", |pool, master| pool.stop(master)),
    ("Pool::stop_at_once", |pool, master| {
        pool.stop_at_once(master)
    }),
    ("Pool::reload", |pool, master| pool.reload(master)),
    ("Pool::scale", |pool, master| {
        pool.scale(master, 3);
        pool.scale(master, 1);
    }),
    ("a signal", |_, _| raise(Number::SIGTERM).unwrap()),
];

fn pool_is_inert_in_a_forked_child() {
    SIGNALS.store(true, Ordering::SeqCst);
    cluster(
        |master| {
            master.on_error(|_, _, error| panic!("{error}"));
            let pool = Pool::new(master, PoolOptions::default().workers(1));
            pool.on_default_signals(master).unwrap();
            let address = pool.listen(master, "127.0.0.1:0").unwrap();
            let address: SocketAddr = address.to_string().parse().unwrap();
            assert_eq!(answer_at(address, master), "pool");
            let first = master.workers()[0].process().id();
            for (name, use_handle) in POOL_USES {
                println!("{name}");
                in_child(|| {
                    use_handle(&pool, master);
                    drop(pool.clone());
                });
                assert_eq!(answer_at(address, master), "pool");
                let workers = master.workers();
                let pids: Vec<_> = workers.iter().map(|w| w.process().id()).collect();
                assert_eq!(pids, [first]);
                assert!(!pool.is_stopping());
            }
            pool.stop(master);
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            for connection in listener.incoming() {
                connection.unwrap().write_all(b"pool").unwrap();
            }
        },
    );
}

/// Checks that the worker's `run` returns an error in a child that a callback forks, and delivers
/// no more events there.
fn loop_ends_in_a_child_forked_by_a_callback() {
    cluster(
        |master| {
            master.on_error(|_, _, error| panic!("{error}"));
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
            let mut received = 0;
            master.on_message(move |_, worker, message| {
                assert_eq!(message.bytes(), b"in the parent");
                received += 1;
                if received == 2 {
                    worker.disconnect();
                }
            });
            let worker = master.fork().unwrap();
            worker.on_online(|_, worker| {
                let _ = worker.send(b"first").unwrap();
                let _ = worker.send(b"second").unwrap();
            });
        },
        |worker| {
            let own = std::process::id();
            worker.on_message(move |worker, message| {
                assert_eq!(std::process::id(), own, "{message:?}");
                if message.bytes() == b"first" {
                    // Add another event that is due in this iteration. The loop must deliver this
                    // event only in the parent.
                    worker.set_timeout(Duration::ZERO, move |_| {
                        assert_eq!(std::process::id(), own);
                    });
                    if let ForkResult::Parent { child } = fork() {
                        expect_success(child);
                    }
                }
                if std::process::id() == own {
                    let _ = worker.send(b"in the parent").unwrap();
                }
            });
            let ended = worker.run();
            if std::process::id() == own {
                ended.unwrap();
            } else {
                expect_foreign(ended);
            }
        },
    );
}

/// Raises a signal, for which this process has a callback, in a child that has a copy of the handle,
/// and in a child that drops the copy.
fn raise_in_children<T>(handle: T) -> T {
    in_child(|| raise(Number::SIGUSR1).unwrap());
    match fork() {
        ForkResult::Child => {
            drop(handle);
            raise(Number::SIGUSR1).unwrap();
            std::process::exit(0);
        }
        ForkResult::Parent { child } => {
            let killed = WaitStatus::Signaled(child, Number::SIGUSR1, false);
            assert_eq!(waitpid(child, None), Ok(killed));
            handle
        }
    }
}

fn signal_with_a_callback_does_nothing_in_a_forked_child_that_has_the_handle() {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let own = |_: &Master, _| panic!("the signal was for a child");
            master.on_signal(Signal::USR1, own).unwrap();
            let master = raise_in_children(master);
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
            master.fork().unwrap();
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            let own = |_: &Worker, _| panic!("the signal was for a child");
            worker.on_signal(Signal::USR1, own).unwrap();
            let worker = raise_in_children(worker);
            worker.dispatch(Some(Duration::ZERO)).unwrap();
        }
    }
}
