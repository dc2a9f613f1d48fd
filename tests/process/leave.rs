//! Tests how workers disconnect and exit: requested by the master, by themselves, killed, or with a
//! closed channel.

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
    worker_exits_after_disconnect_by_the_master
    worker_exits_after_its_own_disconnect
    worker_exits_after_its_own_kill
    kill_disconnects_before_the_signal
    worker_exits_when_the_master_closes_its_channel
    disconnect_waits_for_connections
    disconnect_all_calls_back_once_after_the_last_exit
    disconnect_all_without_workers_calls_back_after_the_call
    disconnect_during_start_up_lets_workers_exit
    disconnect_callback_can_fork_workers_on_the_same_port
    repeated_and_mixed_disconnect_requests_count_once
    disconnect_loses_no_client_in_the_backlog
    disconnect_loses_no_client_of_the_second_listener
    disconnect_loses_no_client_of_a_backlog_of_several_batches
    shared_backlog_of_full_batches_is_served_to_its_end
    slow_callback_does_not_shorten_the_time_for_handshakes
    listener_requested_before_the_channel_closed_is_not_leaked
    messages_after_the_last_connection_are_delivered
    final_message_is_delivered_though_a_callback_owns_the_listener
}

/// Forks one worker that runs `worker`. When the worker's first message arrives, the master calls
/// `end_worker`. Returns `exited_after_disconnect` at the `disconnect` event, and at the `exit`
/// event together with the exit status.
fn flags_and_status(
    end_worker: impl FnOnce(&cluster::WorkerProcess) + 'static,
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
            let mut end_worker = Some(end_worker);
            forked.on_message(move |_, worker, _| {
                assert_eq!(worker.exited_after_disconnect(), None);
                if let Some(end_worker) = end_worker.take() {
                    end_worker(worker);
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
    let _ = worker.send(b"ready").unwrap();
    worker.run().unwrap();
}

fn worker_exits_after_disconnect_by_the_master() {
    let seen = flags_and_status(
        |worker| assert_eq!(worker.disconnect(), worker),
        |worker| {
            // Check that an idle listener without a callback does not delay the exit.
            let _listener = worker.listen("127.0.0.1:0").unwrap();
            ready_then_run(&worker);
            assert_eq!(worker.exited_after_disconnect(), Some(true));
            std::process::exit(5);
        },
    );
    assert_eq!(seen, ["Some(true)", "Some(true) (Some(5), None)"]);
}

fn worker_exits_after_its_own_disconnect() {
    let seen = flags_and_status(
        |_| {},
        |worker| {
            let _listener = worker.listen("127.0.0.1:0").unwrap();
            let is_inside = Rc::new(Cell::new(true));
            let callback_is_inside = Rc::clone(&is_inside);
            worker.on_disconnect(move |_| assert!(!callback_is_inside.get(), "inside the call"));
            worker.disconnect().disconnect();
            assert!(worker.is_connected(), "the master has not replied yet");
            is_inside.set(false);
            worker.run().unwrap();
            assert_eq!(worker.exited_after_disconnect(), Some(true));
        },
    );
    assert_eq!(seen, ["Some(true)", "Some(true) (Some(0), None)"]);
}

fn worker_exits_after_its_own_kill() {
    let seen = flags_and_status(
        |_| {},
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let client = std::thread::spawn(move || TcpStream::connect(address).unwrap());
            // Check that an open connection does not delay the exit after `kill`.
            let connection = listener.accept().unwrap().unwrap();
            worker.kill();
            worker.run().unwrap();
            drop((connection, client));
        },
    );
    assert_eq!(seen, ["Some(true)", "Some(true) (Some(0), None)"]);
}

fn kill_disconnects_before_the_signal() {
    let seen = flags_and_status(
        |worker| worker.kill(Signal::USR1),
        |worker| {
            ready_then_run(&worker);
            // Wait for the signal, which arrives only after the channel has closed.
            loop {
                nix::unistd::pause();
            }
        },
    );
    assert_eq!(seen, ["Some(true)", "Some(true) (None, Some(10))"]);
}

fn worker_exits_when_the_master_closes_its_channel() {
    let seen = flags_and_status(
        |worker| {
            worker.process().disconnect();
            assert!(!worker.is_connected());
        },
        |worker| {
            let _listener = worker.listen("127.0.0.1:0").unwrap();
            // The timer would keep the worker running if the closed channel did not make `run`
            // return.
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
                        assert_eq!(message.bytes(), b"disconnecting");
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
            assert!(
                listener.accept().unwrap().is_none(),
                "a connection after disconnect"
            );
            let _ = worker.send(b"disconnecting").unwrap();
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

fn disconnect_all_calls_back_once_after_the_last_exit() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let at_exit = log.clone();
            master.on_exit(move |_, _, _| at_exit.add("exit"));
            when_listening(master, 3, move |master, _| {
                let (first, second) = (log.clone(), log.clone());
                master.on_all_disconnected_once(move |master| {
                    assert!(master.workers().is_empty());
                    first.add("first callback");
                });
                master.on_all_disconnected_once(move |_| second.add("second callback"));
                master.disconnect();
                log.add("after the call");
            });
            (0..3).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    let end = ["first callback", "second callback"];
    let mut expected = vec!["after the call", "exit", "exit", "exit"];
    expected.extend(end);
    assert_eq!(entries.take(), expected);
}

fn disconnect_all_without_workers_calls_back_after_the_call() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let late = log.clone();
            master.on_all_disconnected_once(move |_| late.add("callback"));
            master.disconnect();
            log.add("after the call");
        },
        |_| unreachable!(),
    );
    assert_eq!(entries.take(), ["after the call", "callback"]);
}

fn disconnect_during_start_up_lets_workers_exit() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let at_exit = log.clone();
            master.on_exit(move |_, worker, status| {
                at_exit.add(format!("{status} {:?}", worker.exited_after_disconnect()));
            });
            master.on_listening(|_, _, _| panic!("listening after disconnect"));
            master.fork().unwrap();
            master.fork().unwrap();
            master.on_all_disconnected_once(move |_| log.add("callback"));
            master.disconnect();
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    let exit = "exit status: 0 Some(true)";
    assert_eq!(entries.take(), [exit, exit, "callback"]);
}

fn disconnect_callback_can_fork_workers_on_the_same_port() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let round = Cell::new(0);
            master.on_listening(move |master, _, address| {
                log.add(format!("round {}", round.get()));
                if round.replace(round.get() + 1) == 0 {
                    let env = [("ADDRESS", address.to_string())];
                    master.on_all_disconnected_once(move |master| {
                        drop(master.fork_with(env).unwrap())
                    });
                    master.disconnect();
                } else {
                    master.disconnect();
                }
            });
            master.fork().unwrap();
        },
        |worker| {
            // The second worker listens on the first worker's port. This succeeds only if the
            // master has closed the first listener before it calls the callback.
            let address = std::env::var("ADDRESS");
            serve_id(&worker, address.as_deref().unwrap_or("127.0.0.1:0"));
        },
    );
    assert_eq!(entries.take(), ["round 0", "round 1"]);
}

fn repeated_and_mixed_disconnect_requests_count_once() {
    let seen = flags_and_status(
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

fn disconnect_loses_no_client_in_the_backlog() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                // Each of the two workers receives at most one client. The other clients wait in
                // the backlog when the master disconnects the workers.
                let work = move || {
                    let connect = |_| TcpStream::connect(address).unwrap();
                    (0..40).map(connect).collect::<Vec<_>>()
                };
                in_background(master, work, move |master, mut clients| {
                    // `connect` may return before the connection is in the backlog, so wait for the
                    // backlog to fill.
                    let waiting = 40 - master.ledger().accepted;
                    wait_until("the backlog", || {
                        (backlog(address) == waiting).then_some(())
                    });
                    master.disconnect();
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

fn disconnect_loses_no_client_of_the_second_listener() {
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
                // The worker waits for a connection on the first listener while a client connects
                // to the second.
                let work = move || {
                    let waiting = TcpStream::connect(address).unwrap();
                    (talk(first, b"").unwrap(), waiting)
                };
                let log = log.clone();
                in_background(master, work, move |master, (answer, mut waiting)| {
                    log.add(answer);
                    wait_until("the backlog", || (backlog(address) == 1).then_some(()));
                    master.disconnect();
                    let work = move || {
                        let mut answer = String::new();
                        waiting.read_to_string(&mut answer).unwrap();
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

/// Checks that a disconnect loses no client of a long backlog. During a callback of the master,
/// more clients connect than the master accepts in one batch. The callback then disconnects all
/// workers.
fn disconnect_loses_no_client_of_a_backlog_of_several_batches() {
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
                // Provoke a late disconnect: this callback takes longer than the time that the
                // master allows for handshakes in flight. The master must serve the whole backlog
                // nevertheless.
                std::thread::sleep(Duration::from_millis(200));
                master.disconnect();
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
            listener.set_connection_callback(|_, mut connection| {
                connection.write_all(b"served").unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), [CLIENTS.to_string()]);
}

/// Checks that a worker empties the backlog even if the last connections fill a batch exactly. In
/// this case, no short batch tells the worker that the backlog is empty.
fn shared_backlog_of_full_batches_is_served_to_its_end() {
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
                master.disconnect();
                // When the worker continues, it finds the disconnect request and all connections at
                // once.
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
            listener.set_connection_callback(|_, mut connection| {
                connection.write_all(b"served").unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["32"]);
}

fn slow_callback_does_not_shorten_the_time_for_handshakes() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 1, move |master, address| {
                let work = move || talk(address, b"").unwrap();
                in_background(master, work, move |master, _| {
                    // This is the slow callback.
                    std::thread::sleep(Duration::from_millis(200));
                    let began = Instant::now();
                    master.on_all_disconnected_once(move |_| {
                        let is_long_enough = began.elapsed() >= Duration::from_millis(100);
                        log.add(is_long_enough.to_string());
                    });
                    master.disconnect();
                    master.disconnect();
                });
            });
            master.fork().unwrap();
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    assert_eq!(entries.take(), ["true"]);
}

/// Checks that a listener is not leaked if the master closes the channel while the worker's bind
/// request is pending.
fn listener_requested_before_the_channel_closed_is_not_leaked() {
    let log = Log::default();
    let entries = log.clone();
    let (_reserved, address) = reserve_port();
    cluster(
        |master| {
            let worker = master
                .fork_with([("ADDRESS", address.to_string())])
                .unwrap();
            worker.on_online(|_, worker| {
                // Wait until the worker sleeps, because it does so only once it has sent its bind
                // request.
                wait_until_asleep(worker);
                worker.process().disconnect();
            });
            let at_exit = log.clone();
            worker.on_exit(move |master, _, status| {
                at_exit.add(status.to_string());
                TcpStream::connect(address).unwrap_err();
                let log = at_exit.clone();
                master.on_all_disconnected_once(move |_| log.add("all exited"));
                master.disconnect();
            });
        },
        |worker| {
            let address = std::env::var("ADDRESS").unwrap();
            let listener = worker.listen(address.as_str()).unwrap();
            listener.set_connection_callback(|_, _| panic!("unexpected connection"));
            // The worker has already read end-of-file, so nothing wakes the loop later. If the
            // listener kept the loop running, `run` would never return.
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["exit status: 0", "all exited"]);
}

fn messages_after_the_last_connection_are_delivered() {
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
            let _ = worker.send(b"final message").unwrap();
            let seen = Rc::new(Cell::new(false));
            let at_disconnect = Rc::clone(&seen);
            worker.on_disconnect(move |_| at_disconnect.set(true));
            worker.run().unwrap();
            assert!(seen.get() && !worker.is_connected());
        },
    );
    assert_eq!(entries.take(), ["final message"]);
}

fn final_message_is_delivered_though_a_callback_owns_the_listener() {
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
            // Send more than the socket buffer holds, so that part of the message is still unsent
            // when this closure returns.
            let _ = worker.send(&vec![0; 800_000]).unwrap();
        },
    );
    assert_eq!(entries.take(), ["800000"]);
}

/// Returns the number of connections in the backlog of the listener at this address.
fn backlog(address: SocketAddr) -> u64 {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let port = format!(":{:04X}", address.port());
    let queues = table.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let is_listening = fields[1].ends_with(&port) && fields[3] == "0A";
        is_listening.then(|| fields[4].to_owned())
    });
    let queues = queues.unwrap();
    let (_, received) = queues.split_once(':').unwrap();
    u64::from_str_radix(received, 16).unwrap()
}
