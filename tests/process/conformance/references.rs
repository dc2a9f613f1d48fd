//! Tests `reference` and `unreference` in workers, `set_max_connections`, and adopted connections.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use cluster::{Interest, SchedulingPolicy, Signal, Worker};

use crate::harness::{
    Log, answer_pings, assert_each, cluster, in_background, note_events, note_messages,
    wait_until_asleep, when_listening,
};

crate::scenarios! {
    rr_handle_close
    rr_handle_keep_loop_alive
    rr_handle_ref_unref
    rr_ref
    process_disconnect
    http_server_drop_connections_in_cluster
    send_socket_to_worker_http_server
    connection_beyond_the_limit_is_dropped_none
    workers_receive_connections_up_to_their_limit_rr
    workers_receive_connections_up_to_their_limit_none
    workers_receive_connections_up_to_a_late_limit_rr
    workers_receive_connections_up_to_a_late_limit_none
    limit_of_one_serves_connections_one_by_one_rr
    limit_of_one_serves_connections_one_by_one_none
}

/// The events of a worker that listens and then exits by itself.
const LISTENED_AND_EXITED: [&str; 5] = [
    "1 fork",
    "1 online",
    "1 listening",
    "1 disconnect Some(false)",
    "1 exit Some(false) exit status: 0",
];

/// Runs `worker` in one worker process and returns all events. The master sends nothing to the
/// worker.
fn events_of_one_worker(worker: impl FnOnce(&Worker)) -> Vec<String> {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            assert_eq!(master.scheduling_policy(), SchedulingPolicy::RoundRobin);
            note_events(master, &log);
            master.fork().unwrap();
        },
        |role| worker(&role),
    );
    entries.take()
}

fn rr_handle_close() {
    let events = events_of_one_worker(|worker| {
        let listener = worker.listen("127.0.0.1:0").unwrap();
        listener.set_connection_callback(|_, _| panic!("no client connects"));
        worker.process().unreference();
        listener.close();
        worker.run().unwrap();
        assert!(
            worker.is_connected(),
            "run returned because nothing keeps it running"
        );
    });
    assert_eq!(events, LISTENED_AND_EXITED);
}

/// Checks that a listener keeps the worker's loop running while nothing happens. The master waits
/// until the worker sleeps before it sends each message, and each message is answered.
///
/// Node's test waits for three seconds instead.
fn rr_handle_keep_loop_alive() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            assert_eq!(master.scheduling_policy(), SchedulingPolicy::RoundRobin);
            note_events(master, &log);
            note_messages(master, &log);
            let worker = master.fork().unwrap();
            let mut answers = 0;
            worker.on_message(move |_, worker, _| {
                wait_until_asleep(worker);
                answers += 1;
                if answers < 3 {
                    let _ = worker.send(b"ping").unwrap();
                } else {
                    worker.process().kill(Signal::KILL);
                }
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            worker.process().unreference();
            answer_pings(&worker);
            let _ = worker.send(b"ready").unwrap();
            worker.run().unwrap();
            panic!("{listener:?} was open");
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 ready",
        "1 pong",
        "1 pong",
        "1 disconnect Some(false)",
        "1 exit Some(false) signal: 9 (SIGKILL)",
    ];
    assert_eq!(entries.take(), expected);
}

/// Checks `unreference` and `reference` on an open listener. Node's test calls `unref` before the
/// listener is open, but `listen` returns only when the listener is open.
fn rr_handle_ref_unref() {
    let events = events_of_one_worker(|worker| {
        let listener = worker.listen("127.0.0.1:0").unwrap();
        listener.set_connection_callback(|_, _| panic!("no client connects"));
        listener.unreference();
        listener.reference();
        listener.unreference();
        worker.process().unreference();
        worker.run().unwrap();
        assert!(
            worker.is_connected(),
            "run returned because nothing keeps it running"
        );
    });
    assert_eq!(events, LISTENED_AND_EXITED);
}

fn rr_ref() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            assert_eq!(master.scheduling_policy(), SchedulingPolicy::RoundRobin);
            note_events(master, &log);
            note_messages(master, &log);
            let worker = master.fork().unwrap();
            worker.on_message(|_, worker, _| worker.process().kill(Signal::KILL));
        },
        |worker| {
            let listener = Rc::new(worker.listen("127.0.0.1:0").unwrap());
            let served = Rc::new(Cell::new(0));
            let (own, count) = (Rc::clone(&listener), Rc::clone(&served));
            listener.set_connection_callback(move |_, _| {
                count.set(count.get() + 1);
                own.close();
            });
            // Only the listener keeps the loop running now. `run` must return after the connection
            // callback has closed the listener.
            worker.process().unreference();
            listener.unreference();
            listener.reference();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            worker.run().unwrap();
            assert_eq!(served.get(), 1);
            assert!(
                matches!(listener.accept(), Ok(None)),
                "the listener is closed"
            );
            drop(client);
            // Now the channel keeps the loop running, so the last `run` must not return.
            worker.process().reference();
            let _ = worker.send(b"done").unwrap();
            worker.run().unwrap();
            panic!("the channel was open");
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 done",
        "1 disconnect Some(false)",
        "1 exit Some(false) signal: 9 (SIGKILL)",
    ];
    assert_eq!(entries.take(), expected);
}

fn process_disconnect() {
    let events = events_of_one_worker(|worker| {
        let listener = worker.listen("127.0.0.1:0").unwrap();
        listener.set_connection_callback(|_, _| panic!("no client connects"));
        worker.process().disconnect();
        worker.run().unwrap();
        assert!(!worker.is_connected());
        assert_eq!(worker.exited_after_disconnect(), Some(false));
    });
    assert_eq!(events, LISTENED_AND_EXITED);
}

fn http_server_drop_connections_in_cluster() {
    // The master counts the dropped connection as received, because the worker received the
    // connection before dropping it.
    connection_beyond_the_limit_is_dropped(SchedulingPolicy::RoundRobin, "(1, 1, 0)");
}

fn connection_beyond_the_limit_is_dropped_none() {
    // The master counts no connection, because the worker accepts from the shared listener itself.
    connection_beyond_the_limit_is_dropped(SchedulingPolicy::Shared, "(0, 0, 0)");
}

fn connection_beyond_the_limit_is_dropped(policy: SchedulingPolicy, sums: &str) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            note_events(master, &log);
            note_messages(master, &log);
            let worker = master.fork().unwrap();
            worker.on_exit(move |master, _, _| {
                let ledger = master.ledger();
                let sums = (ledger.accepted, ledger.received, ledger.dropped);
                log.add(format!("{sums:?}"));
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_max_connections(Some(0));
            listener.set_connection_callback(|_, _| panic!("the limit is zero"));
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let own = client.local_addr().unwrap();
            let dropped = Rc::new(Cell::new(0));
            let count = Rc::clone(&dropped);
            listener.set_drop_callback(move |worker, connection| {
                count.set(count.get() + 1);
                assert_eq!(connection.peer_addr().unwrap(), own);
                drop(connection);
                assert_eq!((&client).read(&mut [0]).unwrap(), 0);
                let _ = worker.send(b"drop").unwrap();
                worker.disconnect();
            });
            worker.run().unwrap();
            assert_eq!(dropped.get(), 1);
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 drop",
        "1 disconnect Some(true)",
        sums,
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

/// Checks that a worker's disconnect waits for an adopted connection to close. Node's worker runs
/// an HTTP server, but here the worker itself adopts and counts the connection.
fn send_socket_to_worker_http_server() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            note_messages(master, &log);
            let worker = master.fork().unwrap();
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let mut client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
            let (socket, _) = server.accept().unwrap();
            let _ = worker
                .send_with_fds(b"socket", vec![socket.into()])
                .unwrap();
            let mut answers = 0;
            worker.on_message(move |_, worker, _| {
                // The worker is disconnecting when it processes the first ping. A worker that did
                // not wait for the connection would exit between its answers.
                answers += 1;
                if answers < 3 {
                    let _ = worker.send(b"ping").unwrap();
                    return;
                }
                client.write_all(b"bye").unwrap();
                assert_eq!(client.read(&mut [0]).unwrap(), 0);
                log.add("client closed");
            });
        },
        |worker| {
            let handled = Rc::new(Cell::new(0));
            let count = Rc::clone(&handled);
            worker.on_message(move |worker, message| {
                if message.bytes() == b"ping" {
                    let _ = worker.send(b"pong").unwrap();
                    return;
                }
                let [fd]: [OwnedFd; 1] = message.take_fds().try_into().unwrap();
                let connection = worker.adopt(TcpStream::from(fd));
                count.set(count.get() + 1);
                worker.disconnect();
                let _ = worker.send(b"handled").unwrap();
                let until_bye = |_: &Worker, mut connection: &cluster::Connection| {
                    let mut text = [0; 3];
                    connection.read_exact(&mut text).unwrap();
                    assert_eq!(&text, b"bye");
                    None
                };
                worker
                    .watch(connection, Interest::Readable, until_bye)
                    .unwrap();
            });
            worker.run().unwrap();
            assert_eq!(handled.get(), 1);
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 handled",
        "1 pong",
        "1 pong",
        "client closed",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn workers_receive_connections_up_to_their_limit_rr() {
    workers_receive_connections_up_to_their_limit(SchedulingPolicy::RoundRobin, false);
}

fn workers_receive_connections_up_to_their_limit_none() {
    workers_receive_connections_up_to_their_limit(SchedulingPolicy::Shared, false);
}

fn workers_receive_connections_up_to_a_late_limit_rr() {
    workers_receive_connections_up_to_their_limit(SchedulingPolicy::RoundRobin, true);
}

fn workers_receive_connections_up_to_a_late_limit_none() {
    workers_receive_connections_up_to_their_limit(SchedulingPolicy::Shared, true);
}

/// Lets three workers with the limits 0, 1 and 9 serve ten clients that stay connected. If `late`,
/// a worker sets its limit only after it has set the connection callback. Otherwise, it sets the
/// same limit before and after.
fn workers_receive_connections_up_to_their_limit(policy: SchedulingPolicy, late: bool) {
    let log = Log::default();
    let entries = log.clone();
    let served: Rc<RefCell<BTreeMap<String, usize>>> = Rc::default();
    let sums = Rc::clone(&served);
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            note_events(master, &log);
            for limit in ["0", "1", "9"] {
                master.fork_with([("LIMIT", limit)]).unwrap();
            }
            when_listening(master, 3, move |master, address| {
                in_background(
                    master,
                    move || talk_to_ten(address),
                    move |master, limits| {
                        for limit in limits {
                            *served.borrow_mut().entry(limit).or_default() += 1;
                        }
                        master.disconnect();
                    },
                );
            });
        },
        |worker| {
            let limit = std::env::var("LIMIT").unwrap();
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let max_connections = Some(limit.parse().unwrap());
            if !late {
                listener.set_max_connections(max_connections);
            }
            listener.set_connection_callback(move |worker, mut connection| {
                connection.write_all(limit.as_bytes()).unwrap();
                let until_end = |_: &Worker, mut connection: &cluster::Connection| {
                    assert_eq!(connection.read(&mut [0]).unwrap(), 0);
                    None
                };
                worker
                    .watch(connection, Interest::Readable, until_end)
                    .unwrap();
            });
            listener.set_max_connections(max_connections);
            worker.run().unwrap();
        },
    );
    let expected = [("1".to_owned(), 1), ("9".to_owned(), 9)];
    assert_eq!(sums.take(), BTreeMap::from(expected));
    let expected = [
        "fork",
        "online",
        "listening",
        "disconnect Some(true)",
        "exit Some(true) exit status: 0",
    ];
    assert_each(3, &entries.take(), &expected);
}

/// Connects ten clients and returns the workers' answers. All clients stay connected until the last
/// answer has arrived.
fn talk_to_ten(address: SocketAddr) -> Vec<String> {
    let clients = [(); 10].map(|()| TcpStream::connect(address).unwrap());
    let answer = |mut client: &TcpStream| {
        let mut limit = [0];
        client.read_exact(&mut limit).unwrap();
        String::from_utf8(limit.to_vec()).unwrap()
    };
    clients.iter().map(answer).collect()
}

fn limit_of_one_serves_connections_one_by_one_rr() {
    limit_of_one_serves_connections_one_by_one(SchedulingPolicy::RoundRobin);
}

fn limit_of_one_serves_connections_one_by_one_none() {
    limit_of_one_serves_connections_one_by_one(SchedulingPolicy::Shared);
}

fn limit_of_one_serves_connections_one_by_one(policy: SchedulingPolicy) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            note_events(master, &log);
            master.fork().unwrap();
            when_listening(master, 1, move |master, address| {
                let one_by_one = move || {
                    let clients = [(); 3].map(|()| TcpStream::connect(address).unwrap());
                    for mut client in clients {
                        assert_eq!(client.read(&mut [0]).unwrap(), 1);
                    }
                };
                in_background(master, one_by_one, |master, ()| {
                    master.disconnect();
                });
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_max_connections(Some(1));
            let busy = Rc::new(Cell::new(false));
            let served = Rc::new(Cell::new(0));
            let count = Rc::clone(&served);
            listener.set_connection_callback(move |worker, mut connection| {
                assert!(!busy.replace(true), "one at a time");
                count.set(count.get() + 1);
                connection.write_all(b"x").unwrap();
                let busy = Rc::clone(&busy);
                let until_end = move |_: &Worker, mut connection: &cluster::Connection| {
                    assert_eq!(connection.read(&mut [0]).unwrap(), 0);
                    busy.set(false);
                    None
                };
                worker
                    .watch(connection, Interest::Readable, until_end)
                    .unwrap();
            });
            worker.run().unwrap();
            assert_eq!(served.get(), 3);
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}
