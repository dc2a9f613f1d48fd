//! Tests that the handles of a master and of a pool are inert in a forked child.

use std::cell::Cell;
use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cluster::pool::{Pool, PoolOptions, SignalAction};
use cluster::{
    Interest, Master, MasterListener, Role, Settings, Signal, SpawnOptions, Worker, WorkerProcess,
};
use nix::sys::signal::{Signal as Number, raise};
use nix::unistd::ForkResult;

use super::{Uses, count, expect_foreign, expect_success, fork, in_child, is_idle};
use crate::harness::{SIGNALS, answer_pings, cluster, wait_until};

crate::scenarios! {
    handles_of_a_master_are_inert_in_a_forked_child
    pool_is_inert_in_a_forked_child
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
