//! Tests methods that add or remove callbacks, watches and settings, and the `all_disconnected`
//! event.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::rc::Rc;
use std::time::Duration;

use cluster::{Error, Interest, Listener, Master, SchedulingPolicy, Setting, Settings, Worker};

use crate::harness::{Log, cluster, in_background, talk, when_listening};

crate::scenarios! {
    accept_serves_after_the_connection_callback_is_removed_rr
    accept_serves_after_the_connection_callback_is_removed_none
    connection_callback_that_removes_itself_loses_no_connection_rr
    connection_callback_that_removes_itself_loses_no_connection_none
    connections_beyond_the_limit_wait_after_the_drop_callback_is_removed
    recv_from_receives_after_the_message_callback_is_removed
    udp_socket_closes_when_its_last_callback_removes_itself
    listener_of_a_disconnecting_worker_has_no_address
    unset_setting_has_its_default_in_the_next_worker
    watch_returns_a_source_that_it_cannot_watch
    all_disconnected_is_emitted_once_for_each_finished_disconnect
    worker_is_found_by_its_plain_number
}

/// The number of simultaneous clients. Each client receives one byte.
const CLIENTS: usize = 4;

/// Connects all clients before any of them is served, and adds their answers to the log.
fn connect_clients(master: &Master, address: SocketAddr, log: Log) {
    let clients = [(); CLIENTS].map(|()| TcpStream::connect(address).unwrap());
    let read = |mut client: TcpStream| {
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    };
    in_background(
        master,
        move || clients.map(read),
        move |master, answers| {
            answers.iter().for_each(|answer| log.add(answer));
            master.disconnect();
        },
    );
}

fn answers_of(
    policy: SchedulingPolicy,
    worker: impl FnOnce(&Worker, &Rc<Listener>),
) -> Vec<String> {
    let log = Log::default();
    let answers = log.clone();
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            when_listening(master, 1, move |master, address| {
                connect_clients(master, address, log);
            });
            master.fork().unwrap();
        },
        |role| {
            let listener = Rc::new(role.listen("127.0.0.1:0").unwrap());
            worker(&role, &listener);
            while let Some(mut connection) = listener.accept().unwrap() {
                connection.write_all(b"a").unwrap();
            }
        },
    );
    let mut answers = answers.take();
    answers.sort();
    answers
}

fn accept_serves_after_the_connection_callback_is_removed(policy: SchedulingPolicy) {
    let answers = answers_of(policy, |worker, listener| {
        let served = Rc::new(Cell::new(0));
        let count = Rc::clone(&served);
        listener.set_connection_callback(move |_, mut connection| {
            connection.write_all(b"c").unwrap();
            count.set(count.get() + 1);
        });
        while served.get() == 0 {
            worker.dispatch(None).unwrap();
        }
        listener.remove_connection_callback();
        // Remove the callback a second time, which must have no effect.
        listener.remove_connection_callback();
    });
    assert_eq!(answers.len(), CLIENTS, "{answers:?}");
    assert!(answers.contains(&"c".to_owned()), "{answers:?}");
}

fn accept_serves_after_the_connection_callback_is_removed_rr() {
    accept_serves_after_the_connection_callback_is_removed(SchedulingPolicy::RoundRobin);
}

fn accept_serves_after_the_connection_callback_is_removed_none() {
    accept_serves_after_the_connection_callback_is_removed(SchedulingPolicy::Shared);
}

fn connection_callback_that_removes_itself_loses_no_connection(policy: SchedulingPolicy) {
    let answers = answers_of(policy, |worker, listener| {
        let is_done = Rc::new(Cell::new(false));
        let (done, itself) = (Rc::clone(&is_done), Rc::downgrade(listener));
        listener.set_connection_callback(move |_, mut connection| {
            connection.write_all(b"c").unwrap();
            itself.upgrade().unwrap().remove_connection_callback();
            done.set(true);
        });
        while !is_done.get() {
            worker.dispatch(None).unwrap();
        }
        // The callback is removed, so the loop must serve no connection now.
        worker.dispatch(Some(Duration::from_millis(1))).unwrap();
    });
    assert_eq!(answers, ["a", "a", "a", "c"]);
}

fn connection_callback_that_removes_itself_loses_no_connection_rr() {
    connection_callback_that_removes_itself_loses_no_connection(SchedulingPolicy::RoundRobin);
}

fn connection_callback_that_removes_itself_loses_no_connection_none() {
    connection_callback_that_removes_itself_loses_no_connection(SchedulingPolicy::Shared);
}

/// Returns the first six bytes of an answer, without waiting for its end.
fn read_answer_start(mut client: &TcpStream) -> String {
    let mut answer = [0; 6];
    client.read_exact(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

fn connections_beyond_the_limit_wait_after_the_drop_callback_is_removed() {
    let log = Log::default();
    let answers = log.clone();
    cluster(
        |master| {
            when_listening(master, 1, move |master, address| {
                let with_callback = move || {
                    let held = TcpStream::connect(address).unwrap();
                    let answers = [read_answer_start(&held), talk(address, b"").unwrap()];
                    (held, answers)
                };
                in_background(master, with_callback, move |master, (held, answers)| {
                    answers.iter().for_each(|answer| log.add(answer));
                    let worker = master.workers().remove(0);
                    let _ = worker.send(b"remove").unwrap();
                    worker.on_message_once(move |master, worker, _| {
                        let waiting = TcpStream::connect(address).unwrap();
                        let _ = worker.send(b"release").unwrap();
                        let without_callback = move || read_answer_start(&waiting);
                        let worker = worker.clone();
                        in_background(master, without_callback, move |master, answer| {
                            log.add(answer);
                            drop(held);
                            // The worker can disconnect only after it has released the connection
                            // that it holds.
                            let _ = worker.send(b"release").unwrap();
                            master.disconnect();
                        });
                    });
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            let listener = Rc::new(worker.listen("127.0.0.1:0").unwrap());
            listener.set_max_connections(Some(1));
            let held = Rc::new(RefCell::new(None));
            let connections = Rc::clone(&held);
            listener.set_connection_callback(move |_, mut connection| {
                connection.write_all(b"served").unwrap();
                connections.replace(Some(connection));
            });
            listener.set_drop_callback(|_, mut connection| {
                connection.write_all(b"dropped").unwrap();
            });
            let itself = Rc::clone(&listener);
            worker.on_message(move |worker, message| {
                if message.bytes() == b"remove" {
                    itself.remove_drop_callback();
                    let _ = worker.send(b"removed").unwrap();
                } else {
                    held.take();
                }
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(answers.take(), ["served", "dropped", "served"]);
}

fn recv_from_receives_after_the_message_callback_is_removed() {
    cluster(
        |master| drop(master.fork().unwrap()),
        |worker| {
            let socket = worker.bind("127.0.0.1:0").unwrap();
            let address = socket.local_addr().unwrap();
            let received = Rc::new(Cell::new(0));
            let count = Rc::clone(&received);
            socket.set_message_callback(move |_, socket, bytes, _| {
                assert_eq!(bytes, b"one");
                count.set(count.get() + 1);
                socket.remove_message_callback();
            });
            let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            for text in [&b"one"[..], b"two"] {
                client.send_to(text, address).unwrap();
            }
            while received.get() == 0 {
                worker.dispatch(None).unwrap();
            }
            worker.dispatch(Some(Duration::from_millis(1))).unwrap();
            let mut buffer = [0; 16];
            let (length, from) = socket.recv_from(&mut buffer).unwrap().unwrap();
            assert_eq!(&buffer[..length], b"two");
            assert_eq!(from, client.local_addr().unwrap());
            assert_eq!(received.get(), 1);
            worker.disconnect();
            assert!(socket.recv_from(&mut buffer).unwrap().is_none());
        },
    );
}

fn udp_socket_closes_when_its_last_callback_removes_itself() {
    cluster(
        |master| drop(master.fork().unwrap()),
        |worker| {
            let socket = worker.bind("127.0.0.1:0").unwrap();
            let address = socket.local_addr().unwrap();
            let received = Rc::new(Cell::new(false));
            let seen = Rc::clone(&received);
            socket.set_message_callback(move |_, socket, _, _| {
                socket.remove_message_callback();
                seen.set(true);
            });
            drop(socket);
            let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            client.send_to(b"x", address).unwrap();
            while !received.get() {
                worker.dispatch(None).unwrap();
            }
            worker.disconnect().run().unwrap();
        },
    );
}

fn listener_of_a_disconnecting_worker_has_no_address() {
    cluster(
        |master| drop(master.fork().unwrap().disconnect().clone()),
        |worker| {
            // Process the disconnect request before the worker listens and binds.
            while worker.is_connected() {
                worker.dispatch(None).unwrap();
            }
            let listener = worker.listen("127.0.0.1:0").unwrap();
            assert_eq!(listener.local_addr(), None);
            assert!(listener.accept().unwrap().is_none());
            let socket = worker.bind("127.0.0.1:0").unwrap();
            assert_eq!(socket.local_addr(), None);
        },
    );
}

fn unset_setting_has_its_default_in_the_next_worker() {
    let log = Log::default();
    let directories = log.clone();
    let own = std::env::current_dir().unwrap();
    cluster(
        |master| {
            master.setup_master(Settings::default().cwd("/").silent(true));
            master.fork().unwrap();
            master.setup_master(Settings::default().unset(Setting::Cwd));
            assert_eq!(master.settings().get_cwd(), None);
            assert_eq!(master.settings().get_silent(), Some(true));
            master.fork().unwrap();
            master.on_message(move |_, worker, message| {
                let directory = String::from_utf8_lossy(message.bytes());
                log.add(format!("{} {directory}", worker.id()));
            });
        },
        |worker| {
            let directory = std::env::current_dir().unwrap();
            let _ = worker.send(directory.display().to_string().as_bytes());
            worker.disconnect().run().unwrap();
        },
    );
    let mut directories = directories.take();
    directories.sort();
    assert_eq!(
        directories,
        ["1 /".to_owned(), format!("2 {}", own.display())]
    );
}

fn watch_returns_a_source_that_it_cannot_watch() {
    cluster(
        |master| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(b"x").unwrap();
            let never = |_: &Master, _: &File| unreachable!("it was not watched");
            let error = master.watch(file, Interest::Readable, never).unwrap_err();
            assert!(matches!(error.error(), Error::Io { .. }), "{error:?}");
            assert!(error.to_string().starts_with("cannot watch a descriptor: "));
            assert_eq!(error.into_source().metadata().unwrap().len(), 1);
            let by_operator = || -> cluster::Result<()> {
                master.watch(tempfile::tempfile().unwrap(), Interest::Readable, never)?;
                Ok(())
            };
            assert!(matches!(by_operator(), Err(Error::Io { .. })));
        },
        |_| unreachable!("nothing is forked"),
    );
}

fn all_disconnected_is_emitted_once_for_each_finished_disconnect() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (always, once, removed) = (log.clone(), log.clone(), log.clone());
            master.on_all_disconnected(move |master| {
                assert!(master.workers().is_empty());
                always.add("always");
                if always.len() < 4 {
                    master.fork().unwrap();
                }
            });
            master.on_all_disconnected_once(move |_| once.add("once"));
            let id = master.on_all_disconnected(move |_| removed.add("removed"));
            master.remove_callback(id);
            when_listening(master, 1, |master, _| {
                master.disconnect();
                master.disconnect_within(Duration::from_secs(60));
            });
            let at_exit = log.clone();
            master.on_exit(move |master, _, _| {
                at_exit.add("exit");
                assert!(master.workers().is_empty());
            });
            master.fork().unwrap();
            // Disconnect all workers a second time when the second worker is online.
            master.on_online(|master, worker| {
                if worker.id().get() == 2 {
                    master.disconnect();
                }
            });
        },
        |worker| {
            let _listener = worker.listen("127.0.0.1:0").unwrap();
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["exit", "always", "once", "exit", "always"]);
}

fn worker_is_found_by_its_plain_number() {
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            let number = u32::from(worker.id());
            assert_eq!(number, 1);
            assert_eq!(master.worker(number), Some(worker.clone()));
            assert_eq!(master.worker(worker.id()), Some(worker));
            assert_eq!(master.worker(2_u32), None);
        },
        |worker| worker.disconnect().run().unwrap(),
    );
}
