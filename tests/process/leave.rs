//! How workers leave: asked, by themselves, killed, cut off, or orphaned.

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::ExitStatusExt as _;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{Signal, Worker};

use crate::harness::{
    Log, cluster, in_background, reserve_port, serve_id, stop, talk, wait_until, wait_until_asleep,
    when_listening,
};

crate::scenarios! {
    asked_by_the_master
    by_itself
    by_itself_at_once
    killed_with_a_signal_after_disconnecting
    cut_off_without_a_word
    disconnect_waits_for_connections
    disconnect_all_calls_back_once_when_nobody_is_left
    disconnect_all_without_workers
    disconnect_before_the_worker_has_started
    a_new_round_from_inside_the_callback
    repeated_and_mixed_requests_to_leave
    no_client_in_the_backlog_is_lost
    no_client_of_the_second_listener_is_lost
    a_backlog_of_several_batches_is_not_lost
    a_shared_backlog_of_full_batches_ends
    a_slow_callback_does_not_shorten_the_time_for_handshakes
    a_listener_that_was_asked_for_too_late_is_not_left_behind
    last_words_after_the_last_connection
    last_words_of_a_worker_whose_callbacks_own_its_listener
}

/// Forks one worker that leaves in some way, and notes the flag at both events and the status.
fn leaving(
    what: impl FnOnce(&cluster::WorkerProcess) + 'static,
    worker: impl FnOnce(Worker),
) -> Vec<String> {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (at_disconnect, at_exit) = (log.clone(), log);
            master.on_disconnect(move |_, worker| {
                at_disconnect.add(format!("{:?}", worker.exited_after_disconnect()));
            });
            master.on_exit(move |_, worker, status| {
                let end = (status.code(), status.signal());
                at_exit.add(format!("{:?} {end:?}", worker.exited_after_disconnect()));
            });
            let forked = master.fork().unwrap();
            assert_eq!(forked.exited_after_disconnect(), None);
            let mut what = Some(what);
            forked.on_message(move |_, worker, _| {
                assert_eq!(worker.exited_after_disconnect(), None);
                if let Some(what) = what.take() {
                    what(worker);
                }
            });
        },
        worker,
    );
    entries.take()
}

fn ready_then_run(worker: &Worker) {
    assert!(worker.is_connected());
    worker.on_disconnect(|worker| assert!(!worker.is_connected()));
    worker.send(b"ready").unwrap();
    worker.run().unwrap();
}

fn asked_by_the_master() {
    let seen = leaving(
        |worker| assert_eq!(worker.disconnect(), worker),
        |worker| {
            // An idle listener and no callback: nothing it has to wait for.
            let _listener = worker.listen("127.0.0.1:0").unwrap();
            ready_then_run(&worker);
            assert_eq!(worker.exited_after_disconnect(), Some(true));
            std::process::exit(5);
        },
    );
    assert_eq!(seen, ["Some(true)", "Some(true) (Some(5), None)"]);
}

fn by_itself() {
    let seen = leaving(
        |_| {},
        |worker| {
            let _listener = worker.listen("127.0.0.1:0").unwrap();
            let inside = Rc::new(Cell::new(true));
            let still_inside = Rc::clone(&inside);
            worker.on_disconnect(move |_| assert!(!still_inside.get(), "not inside the call"));
            worker.disconnect().disconnect();
            assert!(worker.is_connected(), "the master has not agreed yet");
            inside.set(false);
            worker.run().unwrap();
            assert_eq!(worker.exited_after_disconnect(), Some(true));
        },
    );
    assert_eq!(seen, ["Some(true)", "Some(true) (Some(0), None)"]);
}

fn by_itself_at_once() {
    let seen = leaving(
        |_| {},
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let address = listener.local_addr();
            let client = std::thread::spawn(move || TcpStream::connect(address).unwrap());
            // A connection that is never closed does not keep it.
            let connection = listener.accept().unwrap().unwrap();
            worker.kill();
            worker.run().unwrap();
            drop((connection, client));
        },
    );
    assert_eq!(seen, ["Some(true)", "Some(true) (Some(0), None)"]);
}

fn killed_with_a_signal_after_disconnecting() {
    let seen = leaving(
        |worker| worker.kill(Signal::USR1),
        |worker| {
            ready_then_run(&worker);
            // The signal comes when the channel is closed.
            loop {
                nix::unistd::pause();
            }
        },
    );
    assert_eq!(seen, ["Some(true)", "Some(true) (None, Some(10))"]);
}

fn cut_off_without_a_word() {
    let seen = leaving(
        |worker| {
            worker.process().disconnect();
            assert!(!worker.is_connected());
        },
        |worker| {
            let _listener = worker.listen("127.0.0.1:0").unwrap();
            // It would go on for long if it were not cut off.
            worker.set_timeout(Duration::from_secs(600), |_| panic!("too long"));
            ready_then_run(&worker);
            assert_eq!(worker.exited_after_disconnect(), Some(false));
        },
    );
    assert_eq!(seen, ["Some(false)", "Some(false) (Some(0), None)"]);
}

fn disconnect_waits_for_connections() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let at_disconnect = log.clone();
            master.on_disconnect(move |_, _| at_disconnect.add("disconnect"));
            when_listening(master, 1, move |master, address| {
                let work = move || {
                    let mut client = TcpStream::connect(address).unwrap();
                    client.read_exact(&mut [0]).unwrap();
                    client
                };
                in_background(master, work, move |master, mut client| {
                    let worker = master.workers().remove(0);
                    worker.disconnect();
                    worker.on_message(move |_, worker, message| {
                        assert_eq!(message.bytes(), b"told");
                        assert!(worker.is_connected());
                        log.add("closing");
                        client.write_all(b"x").unwrap();
                    });
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let mut connection = listener.accept().unwrap().unwrap();
            connection.write_all(b"x").unwrap();
            assert!(listener.accept().unwrap().is_none(), "told to leave");
            worker.send(b"told").unwrap();
            worker
                .watch(
                    connection,
                    cluster::Interest::Readable,
                    |_, mut connection| {
                        connection.read_exact(&mut [0]).unwrap();
                        None
                    },
                )
                .unwrap();
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["closing", "disconnect"]);
}

fn disconnect_all_calls_back_once_when_nobody_is_left() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let at_exit = log.clone();
            master.on_exit(move |_, _, _| at_exit.add("exit"));
            when_listening(master, 3, move |master, _| {
                let (first, second) = (log.clone(), log.clone());
                master.disconnect(move |master| {
                    assert!(master.workers().is_empty());
                    first.add("first callback");
                });
                master.disconnect(move |_| second.add("second callback"));
                log.add("not inside the call");
            });
            (0..3).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    let end = ["first callback", "second callback"];
    let mut expected = vec!["not inside the call", "exit", "exit", "exit"];
    expected.extend(end);
    assert_eq!(entries.take(), expected);
}

fn disconnect_all_without_workers() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let late = log.clone();
            master.disconnect(move |_| late.add("callback"));
            log.add("after the call");
        },
        |_| unreachable!(),
    );
    assert_eq!(entries.take(), ["after the call", "callback"]);
}

fn disconnect_before_the_worker_has_started() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let at_exit = log.clone();
            master.on_exit(move |_, worker, status| {
                at_exit.add(format!("{status} {:?}", worker.exited_after_disconnect()));
            });
            master.on_listening(|_, _, _| panic!("it was leaving before it asked"));
            master.fork().unwrap();
            master.fork().unwrap();
            master.disconnect(move |_| log.add("callback"));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    let exit = "exit status: 0 Some(true)";
    assert_eq!(entries.take(), [exit, exit, "callback"]);
}

fn a_new_round_from_inside_the_callback() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let rounds = Cell::new(0);
            master.on_listening(move |master, _, address| {
                log.add(format!("round {}", rounds.get()));
                if rounds.replace(rounds.get() + 1) == 0 {
                    let env = [("ADDRESS", address.to_string())];
                    master.disconnect(move |master| drop(master.fork_with(env).unwrap()));
                } else {
                    master.disconnect(|_| {});
                }
            });
            master.fork().unwrap();
        },
        |worker| {
            // The same port again: the first round has left nothing behind.
            let address = std::env::var("ADDRESS");
            serve_id(&worker, address.as_deref().unwrap_or("127.0.0.1:0"));
        },
    );
    assert_eq!(entries.take(), ["round 0", "round 1"]);
}

fn repeated_and_mixed_requests_to_leave() {
    let seen = leaving(
        |worker| {
            worker.disconnect().disconnect();
            worker.kill(Signal::TERM);
            worker.kill(Signal::CONT);
            worker.process().disconnect();
            worker.process().disconnect();
            worker.kill(Signal::CONT);
        },
        |worker| {
            ready_then_run(&worker);
            worker.disconnect();
            worker.kill();
            assert!(worker.send(b"x").is_err());
            worker.run().unwrap();
        },
    );
    assert_eq!(seen[0], "Some(true)");
    assert_eq!(seen[1], "Some(true) (Some(0), None)");
}

fn no_client_in_the_backlog_is_lost() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                // Two are served, the others wait in the kernel when everybody is told to leave.
                let work = move || {
                    let connect = |_| TcpStream::connect(address).unwrap();
                    (0..40).map(connect).collect::<Vec<_>>()
                };
                in_background(master, work, move |master, mut clients| {
                    // A client may think it is connected before the kernel here does.
                    let waiting = 40 - master.ledger().accepted;
                    wait_until("the backlog", || {
                        (backlog(address) == waiting).then_some(())
                    });
                    master.disconnect(|_| {});
                    let work = move || {
                        let mut answered = 0;
                        for client in &mut clients {
                            client.write_all(b"x").unwrap();
                        }
                        for client in &mut clients {
                            let mut answer = String::new();
                            client.read_to_string(&mut answer).unwrap();
                            answered += usize::from(!answer.is_empty());
                        }
                        answered
                    };
                    in_background(master, work, move |_, answered| {
                        log.add(answered.to_string());
                    });
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
                let mut connection = connection.unwrap();
                connection.read_exact(&mut [0]).unwrap();
                connection.write_all(b"answer").unwrap();
            }
        },
    );
    assert_eq!(entries.take(), ["40"]);
}

fn no_client_of_the_second_listener_is_lost() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let mut first = None;
            master.on_listening(move |master, _, address| {
                let address = address.to_string().parse::<SocketAddr>().unwrap();
                let Some(first) = first.replace(address) else {
                    return;
                };
                // The worker waits for the first; meanwhile somebody comes to the second.
                let work = move || {
                    let waits = TcpStream::connect(address).unwrap();
                    (talk(first, b"").unwrap(), waits)
                };
                let log = log.clone();
                in_background(master, work, move |master, (answer, mut waits)| {
                    log.add(answer);
                    wait_until("the backlog", || (backlog(address) == 1).then_some(()));
                    master.disconnect(|_| {});
                    let work = move || {
                        let mut answer = String::new();
                        waits.read_to_string(&mut answer).unwrap();
                        answer
                    };
                    in_background(master, work, move |_, answer| log.add(answer));
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            let listeners = ["first", "second"].map(|name| {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                (name, listener)
            });
            for (name, listener) in &listeners {
                for connection in listener.incoming() {
                    connection.unwrap().write_all(name.as_bytes()).unwrap();
                }
            }
        },
    );
    assert_eq!(entries.take(), ["first", "second"]);
}

/// More clients than are accepted in one go come while a callback keeps the master, which then
/// tells everybody to leave.
fn a_backlog_of_several_batches_is_not_lost() {
    const CLIENTS: u64 = 200;
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 10, move |master, address| {
                let connect = move || {
                    let connect = |_| TcpStream::connect(address).unwrap();
                    (0..CLIENTS).map(connect).collect::<Vec<_>>()
                };
                let clients = std::thread::spawn(connect);
                wait_until("the backlog", || {
                    (backlog(address) == CLIENTS).then_some(())
                });
                // Longer ago than handshakes are given.
                std::thread::sleep(Duration::from_millis(200));
                master.disconnect(|_| {});
                let work = move || {
                    let mut answered = 0;
                    for mut client in clients.join().unwrap() {
                        let mut answer = String::new();
                        client.read_to_string(&mut answer).unwrap();
                        answered += usize::from(answer == "served");
                    }
                    answered
                };
                in_background(master, work, move |_, answered| {
                    log.add(answered.to_string())
                });
            });
            (0..10).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.on_connection(|_, mut connection| {
                connection.write_all(b"served").unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), [CLIENTS.to_string()]);
}

/// The last connections fill a batch exactly: nothing tells the worker that there are no more.
fn a_shared_backlog_of_full_batches_ends() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let policy = cluster::SchedulingPolicy::Shared;
            master.set_scheduling_policy(policy).unwrap();
            when_listening(master, 1, move |master, address| {
                let worker = master.workers().remove(0);
                stop(&worker);
                let connect = |_| TcpStream::connect(address).unwrap();
                let clients: Vec<_> = (0..32).map(connect).collect();
                master.disconnect(|_| {});
                // When it wakes it finds the request to leave, the end and all of them.
                master.set_timeout(Duration::from_millis(150), move |_| {
                    worker.process().kill(Signal::CONT);
                });
                let work = move || {
                    let answers = clients.into_iter().map(|mut client| {
                        let mut answer = String::new();
                        client.read_to_string(&mut answer).unwrap();
                        usize::from(answer == "served")
                    });
                    answers.sum::<usize>()
                };
                in_background(master, work, move |_, answered| {
                    log.add(answered.to_string())
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.on_connection(|_, mut connection| {
                connection.write_all(b"served").unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["32"]);
}

fn a_slow_callback_does_not_shorten_the_time_for_handshakes() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 1, move |master, address| {
                let work = move || talk(address, b"").unwrap();
                in_background(master, work, move |master, _| {
                    std::thread::sleep(Duration::from_millis(200));
                    let began = Instant::now();
                    master.disconnect(move |_| {
                        let open = began.elapsed() >= Duration::from_millis(100);
                        log.add(open.to_string());
                    });
                });
            });
            master.fork().unwrap();
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    assert_eq!(entries.take(), ["true"]);
}

/// The worker is cut off while its request to listen waits to be read.
fn a_listener_that_was_asked_for_too_late_is_not_left_behind() {
    let log = Log::default();
    let entries = log.clone();
    let (_reserved, address) = reserve_port();
    cluster(
        |master| {
            let worker = master
                .fork_with([("ADDRESS", address.to_string())])
                .unwrap();
            worker.on_online(|_, worker| {
                // Its request waits to be read when it waits for the answer.
                wait_until_asleep(worker);
                worker.process().disconnect();
            });
            let at_exit = log.clone();
            worker.on_exit(move |master, _, status| {
                at_exit.add(status.to_string());
                TcpStream::connect(address).unwrap_err();
                let log = at_exit.clone();
                master.disconnect(move |_| log.add("all gone"));
            });
        },
        |worker| {
            let address = std::env::var("ADDRESS").unwrap();
            let listener = worker.listen(address.as_str()).unwrap();
            listener.on_connection(|_, _| panic!("nobody can come"));
            // The end has been read already: nothing wakes the loop for it.
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["exit status: 0", "all gone"]);
}

fn last_words_after_the_last_connection() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            worker.on_listening(|_, worker, _| drop(worker.disconnect().clone()));
            worker.on_message(move |_, _, message| {
                log.add(String::from_utf8_lossy(message.bytes()));
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            assert!(listener.accept().unwrap().is_none());
            assert!(worker.is_connected());
            worker.send(b"served nobody").unwrap();
            let seen = Rc::new(Cell::new(false));
            let at_disconnect = Rc::clone(&seen);
            worker.on_disconnect(move |_| at_disconnect.set(true));
            worker.run().unwrap();
            assert!(seen.get() && !worker.is_connected());
        },
    );
    assert_eq!(entries.take(), ["served nobody"]);
}

fn last_words_of_a_worker_whose_callbacks_own_its_listener() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.fork().unwrap().on_message(move |_, _, message| {
                log.add(message.bytes().len().to_string());
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            worker.on_message(move |_, _| listener.close());
            // More than the socket holds.
            worker.send(&vec![0; 800_000]).unwrap();
        },
    );
    assert_eq!(entries.take(), ["800000"]);
}

/// How many connections the kernel holds for a listener.
fn backlog(address: SocketAddr) -> u64 {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let port = format!(":{:04X}", address.port());
    let queues = table.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let listens = fields[1].ends_with(&port) && fields[3] == "0A";
        listens.then(|| fields[4].to_owned())
    });
    let queues = queues.unwrap();
    let (_, received) = queues.split_once(':').unwrap();
    u64::from_str_radix(received, 16).unwrap()
}
