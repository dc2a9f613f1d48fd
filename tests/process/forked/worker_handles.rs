//! Tests that the handles of a worker are inert in a forked child.

use std::cell::{Cell, RefCell};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use cluster::{
    Connection, Interest, ListenOptions, Listener, SchedulingPolicy, Signal, UdpSocket, Worker,
};
use nix::sys::signal::{Signal as Number, raise};
use nix::unistd::ForkResult;

use super::{Uses, count, expect_foreign, expect_success, fork, is_idle};
use crate::harness::{cluster, wait_until};

crate::scenarios! {
    handles_of_a_worker_are_inert_in_a_forked_child_rr
    handles_of_a_worker_are_inert_in_a_forked_child_none
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
