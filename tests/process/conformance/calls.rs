//! Calls the methods of a worker twice in each state. Checks that only `send` to a closed channel
//! fails, that no event is emitted twice, and that no `error` event is emitted.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use cluster::{
    Error, Master, Role, SendError, SendOptions, Signal, Worker, WorkerProcess, WorkerState,
};

use crate::harness::{Log, answer_pings, cluster, in_background, stop};

crate::scenarios! {
    calls_are_idempotent_before_online
    calls_are_idempotent_when_online
    calls_are_idempotent_when_listening
    calls_are_idempotent_while_disconnecting
    calls_are_idempotent_when_disconnected
    calls_are_idempotent_after_the_exit
    calls_are_idempotent_before_the_exit_is_noticed
    calls_are_idempotent_after_the_master_has_finished
    calls_are_idempotent_after_the_master_is_dropped_with_workers
    calls_in_the_worker_are_idempotent
    calls_in_the_worker_are_idempotent_after_the_channel_closes
}

/// Ways in which a master can stop a worker.
const WAYS: [&str; 6] = [
    "disconnect",
    "kill",
    "destroy",
    "process().kill",
    "process().disconnect",
    "everything",
];

fn stop_by(worker: &WorkerProcess, way: &str) {
    match way {
        "disconnect" => assert_eq!(worker.disconnect(), worker),
        "kill" => worker.kill(Signal::TERM),
        "destroy" => worker.destroy(Signal::TERM),
        "process().kill" => worker.process().kill(Signal::TERM),
        "process().disconnect" => worker.process().disconnect(),
        _ => {
            for way in &WAYS[..5] {
                stop_by(worker, way);
            }
        }
    }
}

/// Checks the worker's state and calls the methods that must not change the state.
fn check_state(worker: &WorkerProcess, state: WorkerState, connected: bool, dead: bool) {
    for _ in 0..2 {
        assert_eq!(worker.state(), state);
        assert_eq!(worker.is_connected(), connected);
        assert_eq!(worker.is_dead(), dead);
        assert_eq!(worker.process().exit_status().is_some(), dead);
        assert_eq!(worker.exited_after_disconnect().is_none(), connected);
        assert!(worker.id().get() > 0 && worker.process().id() > 0);
        assert!(worker.process().take_stdio(1).is_none());
        worker.process().unreference();
        worker.process().unreference();
        worker.process().reference();
        worker.process().reference();
        let _ = format!("{worker:?}");
        worker.on_online(|_, _| {});
        worker.on_listening(|_, _, _| {});
        worker.on_message(|_, _, _| {});
        worker.on_disconnect(|_, _| {});
        worker.on_exit(|_, _, _| {});
        worker.on_error(|_, _, _| {});
        assert_eq!(worker.clone(), *worker);
    }
}

/// Asserts that each `send` to a closed channel fails and that no `on_written` callback runs.
fn assert_sends_fail(worker: &WorkerProcess) {
    for _ in 0..2 {
        let outcomes = [
            worker.send(b"too late"),
            worker.send_with_fds(b"too late", vec![tempfile::tempfile().unwrap().into()]),
            worker.send_with(
                b"too late",
                SendOptions::new().on_written(|_, _| panic!("send_with has failed")),
            ),
        ];
        for outcome in outcomes {
            let reason = SendError::ChannelClosed;
            assert!(
                matches!(outcome, Err(Error::Send { reason: r, .. }) if r == reason),
                "{outcome:?}"
            );
        }
    }
}

/// Forks one worker for each way of stopping it. Returns the `disconnect` and `exit` events.
///
/// `reach` receives a closure that stops the worker twice. `reach` must arrange that the closure
/// runs when the worker is in the state under test.
fn ways(reach: impl Fn(&Master, &WorkerProcess, Box<dyn FnOnce(&WorkerProcess)>)) -> Vec<String> {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.on_error(|_, _, error| panic!("{error}"));
            for way in WAYS {
                let worker = master.fork().unwrap();
                let (at_disconnect, at_exit) = (log.clone(), log.clone());
                worker.on_disconnect(move |_, worker| {
                    let flag = worker.exited_after_disconnect().unwrap();
                    at_disconnect.add(format!("{way}: {flag}"));
                });
                worker.on_exit(move |_, worker, status| {
                    let flag = worker.exited_after_disconnect().unwrap();
                    at_exit.add(format!("{way}: {flag}, {status}"));
                });
                let twice = move |worker: &WorkerProcess| {
                    stop_by(worker, way);
                    stop_by(worker, way);
                };
                reach(master, &worker, Box::new(twice));
            }
        },
        |worker| {
            answer_pings(&worker);
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(|_, _| {});
            worker.run().unwrap();
        },
    );
    entries.take()
}

/// Asserts that each worker has disconnected once and exited once, with the expected flag and one
/// of the expected statuses.
fn check(entries: &[String], expected: impl Fn(&str) -> (bool, &'static [&'static str])) {
    const ZERO: &str = "exit status: 0";
    assert_eq!(entries.len(), 2 * WAYS.len(), "{entries:?}");
    for way in WAYS {
        let prefix = format!("{way}: ");
        let own = entries
            .iter()
            .filter_map(|entry| entry.strip_prefix(&prefix));
        let own: Vec<_> = own.collect();
        let (flag, statuses) = expected(way);
        assert_eq!(own[0], flag.to_string(), "{way}");
        let statuses = statuses.iter().map(|end| match *end {
            "0" => ZERO,
            _ => "signal: 15 (SIGTERM)",
        });
        let statuses: Vec<_> = statuses.map(|end| format!("{flag}, {end}")).collect();
        assert!(statuses.contains(&own[1].to_owned()), "{way}: {}", own[1]);
    }
}

/// Returns the expected `exited_after_disconnect` and the possible exit statuses of a worker that
/// is still connected when it is stopped in this way.
fn expected_outcome(way: &str) -> (bool, &'static [&'static str]) {
    match way {
        "disconnect" => (true, &["0"]),
        "process().kill" => (false, &["15"]),
        "process().disconnect" => (false, &["0"]),
        // The worker may exit by itself before the signal arrives.
        "kill" | "destroy" => (true, &["0", "15"]),
        // With "everything", the master sends the signal at once, but the worker may exit before
        // the signal arrives.
        _ => (true, &["0", "15"]),
    }
}

fn calls_are_idempotent_before_online() {
    let entries = ways(|_, worker, stop_twice| {
        check_state(worker, WorkerState::None, true, false);
        stop_twice(worker);
    });
    check(&entries, expected_outcome);
}

/// Wraps `then` in a closure that calls `then` only the first time.
fn once(then: Box<dyn FnOnce(&WorkerProcess)>) -> impl FnMut(&WorkerProcess) {
    let mut then = Some(then);
    move |worker| {
        if let Some(then) = then.take() {
            then(worker);
        }
    }
}

fn calls_are_idempotent_when_online() {
    let entries = ways(|_, worker, stop_twice| {
        let mut then = once(stop_twice);
        worker.on_online(move |_, worker| {
            check_state(worker, WorkerState::Online, true, false);
            then(worker);
        });
    });
    check(&entries, expected_outcome);
}

fn calls_are_idempotent_when_listening() {
    let entries = ways(|_, worker, stop_twice| {
        let mut then = once(stop_twice);
        worker.on_listening(move |_, worker, _| {
            check_state(worker, WorkerState::Listening, true, false);
            then(worker);
        });
    });
    check(&entries, expected_outcome);
}

/// Stops the worker with SIGSTOP before the calls, so that the worker cannot process the disconnect
/// request in the meantime.
fn calls_are_idempotent_while_disconnecting() {
    let entries = ways(|_, worker, stop_twice| {
        let mut then = once(stop_twice);
        worker.on_listening(move |_, worker, _| {
            stop(worker);
            worker.disconnect();
            check_state(worker, WorkerState::Listening, true, false);
            then(worker);
            worker.process().kill(Signal::CONT);
        });
    });
    check(&entries, |way| match way {
        "disconnect" | "process().disconnect" => (true, &["0"]),
        "process().kill" => (true, &["15"]),
        _ => (true, &["0", "15"]),
    });
}

fn calls_are_idempotent_when_disconnected() {
    let entries = ways(|_, worker, stop_twice| {
        worker.on_listening(|_, worker, _| {
            worker.disconnect();
        });
        let mut then = once(stop_twice);
        worker.on_disconnect(move |_, worker| {
            check_state(worker, WorkerState::Disconnected, false, worker.is_dead());
            then(worker);
        });
    });
    check(&entries, |way| match way {
        "disconnect" | "process().disconnect" => (true, &["0"]),
        _ => (true, &["0", "15"]),
    });
}

/// Calls each method in the `exit` callback, and once more after the callback.
fn calls_are_idempotent_after_the_exit() {
    let entries = ways(|_, worker, stop_twice| {
        worker.on_listening(|_, worker, _| {
            worker.disconnect();
        });
        let mut then = once(stop_twice);
        worker.on_exit(move |master, worker, _| {
            assert!(master.worker(worker.id()).is_none());
            check_state(worker, WorkerState::Dead, false, true);
            then(worker);
            assert_sends_fail(worker);
            let worker = worker.clone();
            master.set_timeout(Duration::ZERO, move |_| {
                check_state(&worker, WorkerState::Dead, false, true);
                stop_by(&worker, "everything");
                assert_sends_fail(&worker);
            });
        });
    });
    check(&entries, |_| (true, &["0"]));
}

/// Calls each method after the worker has exited and before the master's loop can notice the exit.
fn calls_are_idempotent_before_the_exit_is_noticed() {
    let entries = ways(|_, worker, stop_twice| {
        let mut then = once(stop_twice);
        worker.on_listening(move |_, worker, _| {
            worker.process().kill(Signal::KILL);
            crate::harness::wait_for_state(worker.process().id(), ") Z ");
            check_state(worker, WorkerState::Listening, true, false);
            then(worker);
        });
    });
    let disconnects = |way: &str| way != "process().kill" && way != "process().disconnect";
    assert_eq!(entries.len(), 2 * WAYS.len());
    for way in WAYS {
        let flag = disconnects(way);
        assert!(entries.contains(&format!("{way}: {flag}")), "{entries:?}");
        let end = format!("{way}: {flag}, signal: 9 (SIGKILL)");
        assert!(entries.contains(&end), "{entries:?}");
    }
}

fn calls_are_idempotent_after_the_master_has_finished() {
    let forked = Rc::new(RefCell::new(Vec::new()));
    let workers = Rc::clone(&forked);
    cluster(
        |master| {
            master.on_error(|_, _, error| panic!("{error}"));
            for _ in 0..2 {
                let worker = master.fork().unwrap();
                worker.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
                forked.borrow_mut().push(worker);
            }
        },
        |_| {},
    );
    // The harness has dropped the master by now. Check that the workers' handles are still valid.
    let workers = workers.take();
    assert_ne!(workers[0], workers[1]);
    for worker in &workers {
        check_state(worker, WorkerState::Dead, false, true);
        stop_by(worker, "everything");
        assert_sends_fail(worker);
        check_state(worker, WorkerState::Dead, false, true);
        assert_eq!(worker.exited_after_disconnect(), Some(false));
    }
}

/// Checks a worker's handle after the master has been dropped with the worker still running. The
/// worker exits because dropping the master closes the channel.
fn calls_are_idempotent_after_the_master_is_dropped_with_workers() {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let worker = master.fork().unwrap();
            let options = SendOptions::new().on_written(|_, _| panic!("there is no master"));
            let _ = worker.send_with(b"hello", options).unwrap();
            master.set_timeout(Duration::ZERO, |_| panic!("there is no master"));
            master.on_all_disconnected_once(|_| panic!("there is no master"));
            master.disconnect();
            worker.on_exit(|_, _, _| panic!("there is no master"));
            drop(master);
            for _ in 0..2 {
                stop_by(&worker, "everything");
                assert_sends_fail(&worker);
                assert!(!worker.is_connected());
                assert!(!worker.is_dead(), "the master did not see the exit");
                worker.process().unreference();
                worker.process().reference();
            }
            // Reap the worker here, because the dropped master has not reaped it.
            let pid = i32::try_from(worker.process().id()).unwrap();
            let pid = nix::unistd::Pid::from_raw(pid);
            let status = nix::sys::wait::waitpid(pid, None).unwrap();
            assert_eq!(status, nix::sys::wait::WaitStatus::Exited(pid, 0));
        }
        Role::Worker(worker) => worker.run().unwrap(),
    }
}

/// Ways in which a worker can stop itself.
const OWN_WAYS: [&str; 4] = ["disconnect", "kill", "destroy", "process().disconnect"];

fn stop_itself_by(worker: &Worker, way: &str) {
    match way {
        "disconnect" => assert!(std::ptr::eq(worker.disconnect(), worker)),
        "kill" => worker.kill(),
        "destroy" => worker.destroy(),
        _ => worker.process().disconnect(),
    }
}

fn stop_itself_in_every_way(worker: &Worker) {
    for way in OWN_WAYS {
        stop_itself_by(worker, way);
    }
}

fn check_own_state(worker: &Worker) {
    for _ in 0..2 {
        assert!(!worker.is_dead());
        assert_eq!(
            worker.exited_after_disconnect().is_none(),
            worker.is_connected()
        );
        assert_eq!(worker.process().id(), std::process::id());
        assert_eq!(worker.inspect_port(), None);
        worker.process().unreference();
        worker.process().reference();
        let sent = worker.send(b"text");
        let reason = SendError::ChannelClosed;
        let is_closed = matches!(sent, Err(Error::Send { reason: r, .. }) if r == reason);
        assert!(sent.is_ok() || is_closed, "{sent:?}");
        assert!(sent.is_err() || worker.is_connected());
    }
}

/// Makes a worker stop itself in each way: twice or more before the disconnect completes, inside
/// the `disconnect` callback, and afterwards.
fn calls_in_the_worker_are_idempotent() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.on_error(|_, _, error| panic!("{error}"));
            for way in OWN_WAYS {
                let worker = master.fork_with([("WAY", way)]).unwrap();
                let at_disconnect = log.clone();
                worker.on_disconnect(move |_, _| at_disconnect.add(format!("{way}: disconnect")));
                let at_exit = log.clone();
                worker.on_exit(move |_, worker, status| {
                    let flag = worker.exited_after_disconnect().unwrap();
                    at_exit.add(format!("{way}: {flag}, {status}"));
                });
            }
        },
        |worker| {
            let way = std::env::var("WAY").unwrap();
            worker.on_error(|_, error| panic!("{error}"));
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(|_, _| {});
            check_own_state(&worker);
            stop_itself_by(&worker, &way);
            stop_itself_by(&worker, &way);
            let own = way.clone();
            let count = Rc::new(std::cell::Cell::new(0));
            let disconnects = Rc::clone(&count);
            worker.on_disconnect(move |worker| {
                check_own_state(worker);
                assert!(!worker.is_connected());
                stop_itself_by(worker, &own);
                stop_itself_in_every_way(worker);
                count.set(count.get() + 1);
            });
            while worker.is_connected() {
                worker.dispatch(None).unwrap();
                stop_itself_by(&worker, &way);
            }
            worker.run().unwrap();
            assert_eq!(disconnects.get(), 1);
            stop_itself_in_every_way(&worker);
            check_own_state(&worker);
            assert!(listener.accept().unwrap().is_none());
            listener.close();
            listener.close();
            listener.unreference();
            listener.reference();
            listener.set_max_connections(Some(0));
            // Check that a listener or socket that a disconnected worker opens is closed from the
            // start.
            let late = worker.listen("127.0.0.1:0").unwrap();
            assert!(late.accept().unwrap().is_none());
            let socket = worker.bind("127.0.0.1:0").unwrap();
            assert!(socket.recv_from(&mut [0]).unwrap().is_none());
            worker.run().unwrap();
            assert_eq!(disconnects.get(), 1);
        },
    );
    let entries = entries.take();
    assert_eq!(entries.len(), 2 * OWN_WAYS.len(), "{entries:?}");
    for way in OWN_WAYS {
        assert!(
            entries.contains(&format!("{way}: disconnect")),
            "{entries:?}"
        );
        let flag = way != "process().disconnect";
        let end = format!("{way}: {flag}, exit status: 0");
        assert!(entries.contains(&end), "{entries:?}");
    }
}

/// Makes a worker stop itself in each way after the master has closed the channel, but before the
/// worker has noticed.
fn calls_in_the_worker_are_idempotent_after_the_channel_closes() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.on_error(|_, _, error| panic!("{error}"));
            for way in OWN_WAYS {
                let worker = master.fork_with([("WAY", way)]).unwrap();
                let log = log.clone();
                worker.on_message(move |master, worker, message| {
                    let fd = message.take_fds().pop().unwrap();
                    worker.process().disconnect();
                    in_background(master, move || drop(fd), |_, ()| {});
                });
                worker.on_exit(move |_, worker, status| {
                    let flag = worker.exited_after_disconnect().unwrap();
                    log.add(format!("{flag}, {status}"));
                });
            }
        },
        |worker| {
            use std::io::Read as _;
            let way = std::env::var("WAY").unwrap();
            worker.on_error(|_, error| panic!("{error}"));
            let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            let _ = worker
                .send_with_fds(b"close the channel", vec![theirs.into()])
                .unwrap();
            // The master closes its copy of `theirs` after the channel, so end-of-file on `ours`
            // means that the channel is closed.
            assert_eq!(ours.read(&mut [0]).unwrap(), 0);
            stop_itself_by(&worker, &way);
            stop_itself_by(&worker, &way);
            // Either `send_with` fails at once, or `on_written` receives an error later.
            let reported = Rc::new(std::cell::Cell::new(0));
            let count = Rc::clone(&reported);
            let options = SendOptions::new().on_written(move |_, outcome| {
                outcome.unwrap_err();
                count.set(count.get() + 1);
            });
            let refused = worker.send_with(b"x", options).is_err();
            let listener = worker.listen("127.0.0.1:0").unwrap();
            assert!(listener.accept().unwrap().is_none());
            worker.run().unwrap();
            assert_eq!(reported.get(), u32::from(!refused));
            assert_eq!(worker.exited_after_disconnect(), Some(false));
        },
    );
    assert_eq!(entries.take(), ["false, exit status: 0"; 4]);
}
