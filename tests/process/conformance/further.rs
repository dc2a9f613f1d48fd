//! Tests more behaviour that Node documents or that Node's users rely on. Each test has the name of
//! Node's test for the same behaviour.

use std::cell::{Cell, RefCell};
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use cluster::{SendOptions, Sent, Settings};

use crate::harness::for_both_policies;
use crate::harness::{
    Log, cluster, expect_listen_error, in_background, note_events, note_messages, open_fds,
    serve_id, talk, when_listening,
};

crate::scenarios! {
    bind_twice
    dgram_cluster_close_during_bind
    http_pipe
    invalid_message
    send_handle_twice
    server_restart_rr
    setup_primary_cumulative
}

/// Checks that a second cluster cannot listen on the first cluster's address. The second cluster
/// runs in a child process and receives the address in its environment.
fn bind_twice() {
    const ADDRESS: &str = "ADDRESS";
    if std::env::var_os(ADDRESS).is_some() {
        return second_cluster(ADDRESS);
    }
    for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                note_events(master, &log);
                when_listening(master, 1, move |master, address| {
                    let own = std::env::current_exe().unwrap();
                    let mut second = Command::new(own);
                    second.env(ADDRESS, address.to_string());
                    let play = move || second.status().unwrap().success();
                    in_background(master, play, move |master, success| {
                        assert!(success, "the second cluster");
                        let ask = move || talk(address, b"").unwrap();
                        in_background(master, ask, move |master, answer| {
                            log.add(format!("served by {answer}"));
                            master.disconnect();
                        });
                    });
                });
                master.fork().unwrap();
            },
            |worker| serve_id(&worker, "127.0.0.1:0"),
        );
        let expected = [
            "1 fork",
            "1 online",
            "1 listening",
            "served by 1",
            "1 disconnect Some(true)",
            "1 exit Some(true) exit status: 0",
        ];
        assert_eq!(entries.take(), expected);
    });
}

fn second_cluster(address: &str) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            note_messages(master, &log);
            master.fork().unwrap();
        },
        |worker| {
            let address = std::env::var(address).unwrap();
            expect_listen_error(&worker, &address, nix::libc::EADDRINUSE);
            let _ = worker.send(b"refused").unwrap();
            worker.disconnect().run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 refused",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

/// Checks sockets that are closed right after `bind`, and `bind` after a disconnect. Node's test
/// closes a socket during `bind`. Here `bind` waits for the answer, so no callback can close the
/// socket before `bind` returns.
fn dgram_cluster_close_during_bind() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            master.fork().unwrap();
        },
        |worker| {
            let before = open_fds();
            // Check that a socket that is closed at once releases its descriptor, and that the
            // worker can then bind another socket.
            for _ in 0..2 {
                let socket = worker.bind("127.0.0.1:0").unwrap();
                socket.set_message_callback(|_, _, _, _| panic!("the socket is closed"));
                let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
                client
                    .send_to(b"hello", socket.local_addr().unwrap())
                    .unwrap();
                socket.close();
                assert!(socket.recv_from(&mut [0]).unwrap().is_none());
                drop((socket, client));
                assert_eq!(open_fds(), before);
            }
            worker.disconnect();
            let socket = worker.bind("127.0.0.1:0").unwrap();
            socket.set_message_callback(|_, _, _, _| panic!("the socket was never open"));
            assert!(socket.recv_from(&mut [0]).unwrap().is_none());
            assert_eq!(open_fds(), before);
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 listening",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn http_pipe() {
    for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        let path = std::env::temp_dir().join("server.sock");
        cluster(
            |master| {
                note_events(master, &log);
                note_messages(master, &log);
                let path = path.clone();
                let worker = master.fork_with([("SOCKET", &path)]).unwrap();
                let expected = path.to_str().unwrap().to_owned();
                worker.on_listening(move |_, _, address| {
                    assert_eq!(address.path(), Some(expected.as_ref()));
                    assert!(matches!(address, cluster::Address::Unix(_)));
                    assert_eq!(address.port(), None);
                });
                worker.on_exit(move |_, _, _| assert!(!path.exists(), "left behind"));
            },
            |worker| {
                let path = std::env::var_os("SOCKET").unwrap();
                let listener = worker.listen(Path::new(&path)).unwrap();
                let mut client = UnixStream::connect(&path).unwrap();
                client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
                let mut connection = listener.accept().unwrap().unwrap();
                assert!(connection.peer_addr().unwrap().is_unnamed());
                let mut request = [0; 18];
                connection.read_exact(&mut request).unwrap();
                connection.write_all(b"HTTP/1.1 200 OK\r\n\r\nOK").unwrap();
                drop(connection);
                let mut answer = String::new();
                client.read_to_string(&mut answer).unwrap();
                assert!(answer.ends_with("OK"), "{answer}");
                let _ = worker.send(b"DONE").unwrap();
                std::process::exit(0);
            },
        );
        let expected = [
            "1 fork",
            "1 online",
            "1 listening",
            "1 DONE",
            "1 disconnect Some(false)",
            "1 exit Some(false) exit status: 0",
        ];
        assert_eq!(entries.take(), expected);
    });
}

/// Checks that messages with unusual bytes arrive unchanged. Internal frames have their own kinds,
/// so the crate cannot mistake an application's message for an internal frame.
///
/// Other tests show that the master disconnects a worker that sends malformed frames.
fn invalid_message() {
    let log = Log::default();
    let entries = log.clone();
    const MESSAGES: [&[u8]; 5] = [
        br#"{"cmd":"NODE_CLUSTER","ack":-1}"#,
        b"\0\0\0\0\0\0\0\0",
        b"\x01\0\0\0\x01\0\0\0\x01",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"",
    ];
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            master.on_online(move |_, worker| {
                for message in MESSAGES {
                    let log = log.clone();
                    let written = SendOptions::new().on_written(move |_, outcome| {
                        outcome.unwrap();
                        log.add("written");
                    });
                    assert_eq!(worker.send_with(message, written).unwrap(), Sent::Continue);
                }
            });
            let mut expected = MESSAGES.iter();
            worker.on_message(move |_, worker, message| {
                assert_eq!(message.bytes(), *expected.next().unwrap());
                if expected.len() == 0 {
                    worker.disconnect();
                }
            });
        },
        |worker| {
            worker.on_message(|worker, message| {
                let _ = worker.send(message.bytes()).unwrap();
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        &["1 fork", "1 online"][..],
        &["written"; 5],
        &[
            "1 disconnect Some(true)",
            "1 exit Some(true) exit status: 0",
        ],
    ];
    assert_eq!(entries.take(), expected.concat());
}

/// Checks that descriptors which the receiver does not take are closed. The client sees that its
/// connection is closed.
///
/// In Rust, a moved descriptor cannot be sent twice, so the worker sends a copy first.
fn send_handle_twice() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            note_messages(master, &log);
            master.fork().unwrap();
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let socket = listener.accept().unwrap().unwrap().into_stream();
            let copy = SendOptions::new().keep_open(&socket);
            let _ = worker.send_with(b"send-handle-1", copy).unwrap();
            let moved = SendOptions::new().fd(socket);
            let _ = worker.send_with(b"send-handle-2", moved).unwrap();
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            worker.disconnect().run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 send-handle-1",
        "1 send-handle-2",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn server_restart_rr() {
    let log = Log::default();
    let entries = log.clone();
    let ports = Rc::new(RefCell::new(Vec::new()));
    let seen = Rc::clone(&ports);
    cluster(
        |master| {
            note_events(master, &log);
            master.on_listening(move |_, _, address| ports.borrow_mut().push(address.port()));
            let first = master.fork().unwrap();
            first.on_listening(|master, first, _| {
                let first = first.clone();
                let second = master.fork().unwrap();
                second.on_exit(move |_, _, _| drop(first.disconnect().clone()));
            });
        },
        |worker| {
            if worker.id().get() == 1 {
                return serve_id(&worker, "127.0.0.1:0");
            }
            for _ in 0..2 {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                listener.close();
                // The first worker still listens on the address, so it must serve the client.
                assert_eq!(talk(listener.local_addr().unwrap(), b"").unwrap(), "1");
            }
            worker.process().disconnect();
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "2 fork",
        "2 online",
        "2 listening",
        "2 listening",
        "2 disconnect Some(false)",
        "2 exit Some(false) exit status: 0",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
    let ports = seen.take();
    assert_eq!(ports.len(), 3);
    assert!(ports.iter().all(|port| *port == ports[0]), "{ports:?}");
}

fn setup_primary_cumulative() {
    let count = Rc::new(Cell::new(0));
    let setups = Rc::clone(&count);
    cluster(
        |master| {
            assert_eq!(master.settings(), Settings::default());
            master.on_setup(move |_, _| count.set(count.get() + 1));
            master.setup_master(Settings::default());
            let mut expected = Settings::default()
                .exec(std::env::current_exe().unwrap())
                .args(std::env::args_os().skip(1))
                .exec_args([""; 0])
                .silent(false);
            assert_eq!(master.settings(), expected);
            let check = |change: Settings, expected: &Settings| {
                master.setup_master(change);
                assert_eq!(master.settings(), *expected);
            };
            expected = expected.exec("overridden");
            check(Settings::default().exec("overridden"), &expected);
            expected = expected.args(["foo", "bar"]);
            check(Settings::default().args(["foo", "bar"]), &expected);
            expected = expected.exec_args(["baz", "bang"]);
            check(Settings::default().exec_args(["baz", "bang"]), &expected);
            check(Settings::default(), &expected);
        },
        |_| unreachable!("no worker is forked"),
    );
    assert_eq!(setups.get(), 5);
}
