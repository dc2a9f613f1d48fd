//! What keeps a worker running, how many connections it takes, and connections from elsewhere.

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
    what_is_beyond_the_limit_is_dropped_none
    limits_share_out_connections_rr
    limits_share_out_connections_none
    late_limits_share_out_connections_rr
    late_limits_share_out_connections_none
    a_limit_of_one_serves_one_after_the_other_rr
    a_limit_of_one_serves_one_after_the_other_none
}

/// What the master is told of a worker that listens and then ends by itself.
const ENDED: [&str; 5] = [
    "1 fork",
    "1 online",
    "1 listening",
    "1 disconnect Some(false)",
    "1 exit Some(false) exit status: 0",
];

/// Forks one worker, to which nobody says a word, and returns all events.
fn left_alone(worker: impl FnOnce(&Worker)) -> Vec<String> {
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
    let events = left_alone(|worker| {
        let listener = worker.listen("127.0.0.1:0").unwrap();
        listener.on_connection(|_, _| panic!("nobody connects"));
        worker.process().unref();
        listener.close();
        worker.run().unwrap();
        assert!(worker.is_connected(), "it ends for want of work");
    });
    assert_eq!(events, ENDED);
}

/// Without Node's three seconds: whoever answers one message after the other and sleeps in between
/// has found again and again that there is something to wait for.
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
                    worker.send(b"ping").unwrap();
                } else {
                    worker.process().kill(Signal::KILL);
                }
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            worker.process().unref();
            answer_pings(&worker);
            worker.send(b"ready").unwrap();
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

/// There is no listener before `listen` has returned; it is let go of right after that.
fn rr_handle_ref_unref() {
    let events = left_alone(|worker| {
        let listener = worker.listen("127.0.0.1:0").unwrap();
        listener.on_connection(|_, _| panic!("nobody connects"));
        listener.unref();
        listener.ref_();
        listener.unref();
        worker.process().unref();
        worker.run().unwrap();
        assert!(worker.is_connected(), "it ends for want of work");
    });
    assert_eq!(events, ENDED);
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
            listener.on_connection(move |_, _| {
                count.set(count.get() + 1);
                own.close();
            });
            // It alone keeps the worker, until its connection closes it.
            worker.process().unref();
            listener.unref();
            listener.ref_();
            let client = TcpStream::connect(listener.local_addr()).unwrap();
            worker.run().unwrap();
            assert_eq!(served.get(), 1);
            assert!(matches!(listener.accept(), Ok(None)), "it is closed");
            drop(client);
            // And now the channel keeps it.
            worker.process().ref_();
            worker.send(b"done").unwrap();
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
    let events = left_alone(|worker| {
        let listener = worker.listen("127.0.0.1:0").unwrap();
        listener.on_connection(|_, _| panic!("nobody connects"));
        worker.process().disconnect();
        worker.run().unwrap();
        assert!(!worker.is_connected());
        assert_eq!(worker.exited_after_disconnect(), Some(false));
    });
    assert_eq!(events, ENDED);
}

fn http_server_drop_connections_in_cluster() {
    // It was not refused: the master counts it as taken.
    what_is_beyond_the_limit_is_dropped(SchedulingPolicy::RoundRobin, "(1, 1, 0)");
}

fn what_is_beyond_the_limit_is_dropped_none() {
    // The master knows nothing of it.
    what_is_beyond_the_limit_is_dropped(SchedulingPolicy::Shared, "(0, 0, 0)");
}

fn what_is_beyond_the_limit_is_dropped(policy: SchedulingPolicy, sums: &str) {
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
                let sums = (ledger.accepted, ledger.taken, ledger.dropped);
                log.add(format!("{sums:?}"));
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_max_connections(Some(0));
            listener.on_connection(|_, _| panic!("one too many"));
            let client = TcpStream::connect(listener.local_addr()).unwrap();
            let own = client.local_addr().unwrap();
            let dropped = Rc::new(Cell::new(0));
            let count = Rc::clone(&dropped);
            listener.on_drop(move |worker, connection| {
                count.set(count.get() + 1);
                assert_eq!(connection.peer_addr().unwrap(), own);
                drop(connection);
                assert_eq!((&client).read(&mut [0]).unwrap(), 0);
                worker.send(b"drop").unwrap();
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

/// A server here is the worker itself: it counts the connection, and does not leave before it has
/// ended.
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
            worker
                .send_with_fds(b"socket", vec![socket.into()])
                .unwrap();
            let mut answers = 0;
            worker.on_message(move |_, worker, _| {
                // It has been told to leave when it gets the first of these; between the answers it
                // would.
                answers += 1;
                if answers < 3 {
                    worker.send(b"ping").unwrap();
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
                    worker.send(b"pong").unwrap();
                    return;
                }
                let [fd]: [OwnedFd; 1] = message.take_fds().try_into().unwrap();
                let connection = worker.adopt(TcpStream::from(fd));
                count.set(count.get() + 1);
                worker.disconnect();
                worker.send(b"handled").unwrap();
                let until_bye = |_: &Worker, mut connection: &cluster::Connection| {
                    let mut word = [0; 3];
                    connection.read_exact(&mut word).unwrap();
                    assert_eq!(&word, b"bye");
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

fn limits_share_out_connections_rr() {
    limits_share_out_connections(SchedulingPolicy::RoundRobin, false);
}

fn limits_share_out_connections_none() {
    limits_share_out_connections(SchedulingPolicy::Shared, false);
}

fn late_limits_share_out_connections_rr() {
    limits_share_out_connections(SchedulingPolicy::RoundRobin, true);
}

fn late_limits_share_out_connections_none() {
    limits_share_out_connections(SchedulingPolicy::Shared, true);
}

/// Three workers with the limits 0, 1 and 9 serve ten clients, all of which stay. They set the limit
/// when they are ready for connections already, or before.
fn limits_share_out_connections(policy: SchedulingPolicy, late: bool) {
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
                        master.disconnect(|_| {});
                    },
                );
            });
        },
        |worker| {
            let limit = std::env::var("LIMIT").unwrap();
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let most = Some(limit.parse().unwrap());
            if !late {
                listener.set_max_connections(most);
            }
            listener.on_connection(move |worker, mut connection| {
                connection.write_all(limit.as_bytes()).unwrap();
                let until_end = |_: &Worker, mut connection: &cluster::Connection| {
                    assert_eq!(connection.read(&mut [0]).unwrap(), 0);
                    None
                };
                worker
                    .watch(connection, Interest::Readable, until_end)
                    .unwrap();
            });
            listener.set_max_connections(most);
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

/// Returns who answered, when all ten clients have an answer; they are open until then.
fn talk_to_ten(address: SocketAddr) -> Vec<String> {
    let clients = [(); 10].map(|()| TcpStream::connect(address).unwrap());
    let answer = |mut client: &TcpStream| {
        let mut limit = [0];
        client.read_exact(&mut limit).unwrap();
        String::from_utf8(limit.to_vec()).unwrap()
    };
    clients.iter().map(answer).collect()
}

fn a_limit_of_one_serves_one_after_the_other_rr() {
    a_limit_of_one_serves_one_after_the_other(SchedulingPolicy::RoundRobin);
}

fn a_limit_of_one_serves_one_after_the_other_none() {
    a_limit_of_one_serves_one_after_the_other(SchedulingPolicy::Shared);
}

fn a_limit_of_one_serves_one_after_the_other(policy: SchedulingPolicy) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            note_events(master, &log);
            master.fork().unwrap();
            when_listening(master, 1, move |master, address| {
                let one_after_the_other = move || {
                    let clients = [(); 3].map(|()| TcpStream::connect(address).unwrap());
                    for mut client in clients {
                        assert_eq!(client.read(&mut [0]).unwrap(), 1);
                    }
                };
                in_background(master, one_after_the_other, |master, ()| {
                    master.disconnect(|_| {});
                });
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_max_connections(Some(1));
            let busy = Rc::new(Cell::new(false));
            let served = Rc::new(Cell::new(0));
            let count = Rc::clone(&served);
            listener.on_connection(move |worker, mut connection| {
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
