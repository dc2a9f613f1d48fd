//! Tests how workers disconnect and exit, and which events follow.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::time::Duration;

use cluster::{Error, Master, Message, SchedulingPolicy, Signal, Worker, WorkerState};
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use crate::harness::{
    Log, StoppedMaster, answer_pings, close_at_exit, cluster, expect_listen_error, idle_server,
    in_background, note_events, note_messages, of, serve_id, share_listeners, talk, with_env,
};

crate::scenarios! {
    call_and_destroy
    disconnect_before_exit
    disconnect_exited_after_disconnect_race
    disconnect_idle_worker
    disconnect_leak
    disconnect_unshared_tcp
    disconnect_with_no_workers
    disconnect
    ipc_throw
    kill_disconnect
    worker_disconnect_on_error
    worker_disconnect
}

fn call_and_destroy() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            worker.on_disconnect(move |_, worker| {
                assert!(!worker.is_connected());
                worker.kill(Signal::TERM);
                log.add("killed");
            });
        },
        |worker| {
            assert!(worker.is_connected());
            worker.disconnect().run().unwrap();
        },
    );
    let mut entries = entries.take();
    // The signal races with the worker's own exit, so both statuses are possible.
    let end = entries.pop().unwrap();
    let ends = ["exit status: 0", "signal: 15 (SIGTERM)"];
    let ends = ends.map(|end| format!("1 exit Some(true) {end}"));
    assert!(ends.contains(&end), "{end}");
    let expected = ["1 fork", "1 online", "killed", "1 disconnect Some(true)"];
    assert_eq!(entries, expected);
}

fn disconnect_before_exit() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            worker.on_online(|_, worker| drop(worker.disconnect().clone()));
            worker.on_disconnect(move |master, worker| {
                log.add("worker disconnect");
                // `Master::workers` must still contain the worker, because only its exit removes
                // it.
                assert_eq!(master.workers(), std::slice::from_ref(worker));
                let log = log.clone();
                master.on_all_disconnected_once(move |_| log.add("all exited"));
                master.disconnect();
            });
        },
        |worker| worker.run().unwrap(),
    );
    let expected = [
        "1 fork",
        "1 online",
        "worker disconnect",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
        "all exited",
    ];
    assert_eq!(entries.take(), expected);
}

fn disconnect_exited_after_disconnect_race() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            master.fork().unwrap();
        },
        |worker| {
            let master = StoppedMaster::new();
            worker.disconnect();
            let count = Rc::new(Cell::new(0));
            let at_disconnect = Rc::clone(&count);
            worker.on_disconnect(move |worker| {
                assert!(!worker.is_connected());
                at_disconnect.set(at_disconnect.get() + 1);
            });
            assert_eq!(count.get(), 0, "called inside disconnect");
            for _ in 0..3 {
                worker.dispatch(Some(Duration::ZERO)).unwrap();
                assert_eq!(count.get(), 0, "before the master has answered");
                assert!(worker.is_connected());
            }
            drop(master);
            worker.run().unwrap();
            assert_eq!(count.get(), 1);
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn disconnect_idle_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            (0..2).for_each(|_| drop(master.fork().unwrap()));
            master.on_all_disconnected_once(move |master| {
                assert!(master.workers().is_empty());
                log.add("callback");
            });
            master.disconnect();
        },
        // Keep the worker running until the disconnect, because in Node an idle worker also keeps
        // running.
        |worker| worker.run().unwrap(),
    );
    let entries = entries.take();
    let expected = [
        "fork",
        "online",
        "disconnect Some(true)",
        "exit Some(true) exit status: 0",
    ];
    assert_eq!(of(1, &entries), expected);
    assert_eq!(of(2, &entries), expected);
    assert_eq!(entries[8..], ["callback"]);
}

fn disconnect_leak() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            share_listeners(master);
            note_events(master, &log);
            let worker = master.fork().unwrap();
            let (at_disconnect, at_exit) = (log.clone(), log.clone());
            worker.on_disconnect(move |_, _| at_disconnect.add("worker disconnect"));
            worker.on_exit(move |_, _, _| at_exit.add("worker exit"));
            // Check that the disconnect completes although a worker requests a listener meanwhile.
            // The callback runs only when all listeners are closed.
            master.on_all_disconnected_once(move |_| log.add("all exited"));
            master.disconnect();
        },
        |worker| {
            // The worker requests the listener before it processes the disconnect.
            let listener = worker.listen("127.0.0.1:0").unwrap();
            assert!(listener.accept().unwrap().is_none());
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "worker disconnect",
        "1 disconnect Some(true)",
        "worker exit",
        "1 exit Some(true) exit status: 0",
        "all exited",
    ];
    assert_eq!(entries.take(), expected);
}

fn disconnect_unshared_tcp() {
    with_env("CLUSTER_SCHED_POLICY", "none", || {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                assert_eq!(master.scheduling_policy(), SchedulingPolicy::Shared);
                note_events(master, &log);
                let without = master.fork().unwrap();
                let idle = RefCell::new(Some(without.clone()));
                without.on_online(move |master, _| {
                    let with = master.fork_with([("LISTENS", "1")]).unwrap();
                    let without = idle.take().unwrap();
                    let log = log.clone();
                    with.on_listening(move |_, with, address| {
                        let address = SocketAddr::from(([127, 0, 0, 1], address.port().unwrap()));
                        let pinged = with.clone();
                        without.disconnect();
                        without.on_disconnect(move |_, _| {
                            let _ = pinged.send(b"ping").unwrap();
                        });
                        // Wait for two answers. In the meantime, the worker processes everything
                        // that the other worker's disconnect has caused.
                        let (log, answers) = (log.clone(), Cell::new(0));
                        with.on_message(move |master, with, _| {
                            answers.set(answers.get() + 1);
                            if answers.get() == 1 {
                                let _ = with.send(b"ping").unwrap();
                                return;
                            }
                            log.add(format!("served by {}", talk(address, b"").unwrap()));
                            master.disconnect();
                        });
                    });
                });
            },
            |worker| match std::env::var_os("LISTENS") {
                Some(_) => {
                    answer_pings(&worker);
                    serve_id(&worker, "127.0.0.1:0");
                }
                None => worker.run().unwrap(),
            },
        );
        let mut entries = entries.take();
        // The first worker may exit at any time after its disconnect, so the position of its `exit`
        // event varies.
        let end = "1 exit Some(true) exit status: 0";
        let before = entries.len();
        entries.retain(|entry| entry != end);
        assert_eq!(before - entries.len(), 1);
        let expected = [
            "1 fork",
            "1 online",
            "2 fork",
            "2 online",
            "2 listening",
            "1 disconnect Some(true)",
            "served by 2",
            "2 disconnect Some(true)",
            "2 exit Some(true) exit status: 0",
        ];
        assert_eq!(entries, expected);
    });
}

fn disconnect_with_no_workers() {
    let called = Rc::new(Cell::new(0));
    let seen = Rc::clone(&called);
    cluster(
        |master| {
            let count = Rc::clone(&called);
            master.on_all_disconnected_once(move |_| count.set(count.get() + 1));
            master.disconnect();
            assert_eq!(called.get(), 0, "called inside disconnect");
        },
        |_| unreachable!("no worker is forked"),
    );
    assert_eq!(seen.get(), 1);
}

fn disconnect() {
    let log = Log::default();
    let entries = log.clone();
    let exits = Rc::new(Cell::new(0));
    let exited = Rc::clone(&exits);
    cluster(
        |master| {
            master.on_error(|_, _, error| panic!("{error}"));
            master.on_exit(move |_, worker, status| {
                assert_eq!(status.code(), Some(0));
                assert_eq!(worker.exited_after_disconnect(), Some(true));
                exits.set(exits.get() + 1);
            });
            let second_log = log.clone();
            round(master, log, move |master| {
                assert!(master.workers().is_empty());
                round(master, second_log, |_| {});
            });
        },
        |worker| {
            for _ in 0..2 {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                listener.set_connection_callback(|_, mut connection| {
                    use std::io::Write as _;
                    connection.write_all(b"echo").unwrap();
                });
            }
            worker.run().unwrap();
        },
    );
    let one_round = ["16 on 2 ports", "echo echo", "disconnected"];
    assert_eq!(entries.take(), [one_round, one_round].concat());
    assert_eq!(exited.get(), 16);
}

/// Forks eight workers, connects once to each port on which they listen, and disconnects all
/// workers. Calls `then` when the disconnect is complete.
fn round(master: &Master, log: Log, then: impl FnOnce(&Master) + 'static) {
    let listening: Rc<RefCell<BTreeMap<_, Vec<u16>>>> = Rc::default();
    let then = Rc::new(RefCell::new(Some(then)));
    for _ in 0..8 {
        let (listening, log, then) = (Rc::clone(&listening), log.clone(), Rc::clone(&then));
        let worker = master.fork().unwrap();
        worker.on_listening(move |master, worker, address| {
            let mut listening = listening.borrow_mut();
            listening
                .entry(worker.id())
                .or_default()
                .push(address.port().unwrap());
            let count = listening.values().map(Vec::len).sum::<usize>();
            if count < 16 {
                return;
            }
            assert_eq!(listening.len(), 8);
            assert!(
                listening.values().all(|ports| ports.len() == 2),
                "{listening:?}"
            );
            let ports: BTreeSet<_> = listening.values().flatten().copied().collect();
            log.add(format!("{count} on {} ports", ports.len()));
            let work = move || {
                let talk = |port| talk(SocketAddr::from(([127, 0, 0, 1], port)), b"").unwrap();
                ports.into_iter().map(talk).collect::<Vec<_>>()
            };
            let (log, then) = (log.clone(), then.take());
            in_background(master, work, move |master, answers| {
                log.add(answers.join(" "));
                master.on_all_disconnected_once(move |master| {
                    log.add("disconnected");
                    then.unwrap()(master);
                });
                master.disconnect();
            });
        });
    }
}

/// Asserts that listening on the address in `message` fails because the address is in use. Returns
/// the error.
fn listen_on_used_port(worker: &Worker, message: &Message) -> Error {
    let address = std::str::from_utf8(message.bytes()).unwrap();
    expect_listen_error(worker, address, nix::libc::EADDRINUSE)
}

/// Checks that a worker continues after a panic that unwinds through `run`. The panic stands in for
/// Node's uncaught exception.
fn ipc_throw() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let (server, address) = idle_server();
            let worker = master.fork().unwrap();
            let _ = worker.send(address.to_string().as_bytes()).unwrap();
            note_messages(master, &log);
            close_at_exit(&worker, server);
        },
        |worker| {
            worker.on_message(|worker, message| {
                let error = listen_on_used_port(worker, message);
                let _ = worker.send(b"error").unwrap();
                worker.disconnect();
                resume_unwind(Box::new(error));
            });
            let run = || worker.run();
            let thrown = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
            let error = thrown.downcast::<Error>().unwrap();
            assert_eq!(error.raw_os_error(), Some(nix::libc::EADDRINUSE));
            // Check that the channel still works after the panic, and that the requested disconnect
            // completes.
            let _ = worker.send(b"uncaught").unwrap();
            let count = Rc::new(Cell::new(0));
            let at_disconnect = Rc::clone(&count);
            worker.on_disconnect(move |_| at_disconnect.set(at_disconnect.get() + 1));
            worker.run().unwrap();
            assert_eq!(count.get(), 1);
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 error",
        "1 uncaught",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn kill_disconnect() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            match worker.id().get() {
                1 => drop(worker.disconnect()),
                _ => worker.kill(),
            }
            worker.run().unwrap();
            assert_eq!(worker.exited_after_disconnect(), Some(true));
        },
    );
    let entries = entries.take();
    let expected = [
        "fork",
        "online",
        "disconnect Some(true)",
        "exit Some(true) exit status: 0",
    ];
    assert_eq!(of(1, &entries), expected);
    assert_eq!(of(2, &entries), expected);
    assert_eq!(entries.len(), 8);
}

fn worker_disconnect_on_error() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            share_listeners(master);
            note_events(master, &log);
            let worker = master.fork().unwrap();
            let (server, address) = idle_server();
            let _ = worker.send(address.to_string().as_bytes()).unwrap();
            note_messages(master, &log);
            close_at_exit(&worker, server);
        },
        |worker| {
            worker.on_message(|worker, message| {
                listen_on_used_port(worker, message);
                let _ = worker.send(b"error").unwrap();
                worker.disconnect();
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 error",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn worker_disconnect() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            worker.on_listening(|_, worker, _| assert_eq!(worker.disconnect(), worker));
            let (at_disconnect, at_exit) = (log.clone(), log);
            worker.on_disconnect(move |_, worker| {
                assert_eq!(worker.exited_after_disconnect(), Some(true));
                assert_eq!(worker.state(), WorkerState::Disconnected);
                at_disconnect.add("worker disconnect");
            });
            worker.on_exit(move |_, worker, status| {
                assert_eq!(status.code(), Some(42));
                let pid = i32::try_from(worker.process().id()).unwrap();
                assert_eq!(kill(Pid::from_raw(pid), None), Err(Errno::ESRCH));
                at_exit.add("worker exit");
            });
        },
        |worker| {
            let _listener = worker.listen("127.0.0.1:0").unwrap();
            worker.on_disconnect(|_| std::process::exit(42));
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "worker disconnect",
        "1 disconnect Some(true)",
        "worker exit",
        "1 exit Some(true) exit status: 42",
    ];
    assert_eq!(entries.take(), expected);
}
