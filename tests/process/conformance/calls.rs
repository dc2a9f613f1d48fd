//! Every method of a worker, twice, in each of its states: nothing fails but what is sent in vain,
//! nothing comes twice, and there is no error to report.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use cluster::{
    Error, Master, Role, SendError, SendOptions, Signal, Worker, WorkerProcess, WorkerState,
};

use crate::harness::{Log, answer_pings, cluster, in_background, stop};

crate::scenarios! {
    calls_before_it_is_online
    calls_when_it_is_online
    calls_when_it_listens
    calls_when_it_is_leaving
    calls_when_it_has_disconnected
    calls_when_it_is_dead
    calls_when_it_has_ended_unnoticed
    calls_after_the_master
    calls_after_a_master_that_did_not_wait
    calls_in_the_worker
    calls_in_the_worker_without_a_master
}

/// All that makes a worker leave.
const WAYS: [&str; 6] = [
    "disconnect",
    "kill",
    "destroy",
    "process().kill",
    "process().disconnect",
    "everything",
];

fn leave(worker: &WorkerProcess, way: &str) {
    match way {
        "disconnect" => assert_eq!(worker.disconnect(), worker),
        "kill" => worker.kill(Signal::TERM),
        "destroy" => worker.destroy(Signal::TERM),
        "process().kill" => worker.process().kill(Signal::TERM),
        "process().disconnect" => worker.process().disconnect(),
        _ => {
            for way in &WAYS[..5] {
                leave(worker, way);
            }
        }
    }
}

/// What changes nothing.
fn ask(worker: &WorkerProcess, state: WorkerState, connected: bool, dead: bool) {
    for _ in 0..2 {
        assert_eq!(worker.state(), state);
        assert_eq!(worker.is_connected(), connected);
        assert_eq!(worker.is_dead(), dead);
        assert_eq!(worker.process().exit_status().is_some(), dead);
        assert_eq!(worker.exited_after_disconnect().is_none(), connected);
        assert!(worker.id().get() > 0 && worker.process().id() > 0);
        assert!(worker.process().take_stdio(1).is_none());
        worker.process().unref();
        worker.process().unref();
        worker.process().ref_();
        worker.process().ref_();
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

/// Sends in vain: twice an error, never an event for those that have ended.
fn send_in_vain(worker: &WorkerProcess) {
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

/// Forks a worker for each way to leave, brings it to a state, and makes it leave twice.
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
                    leave(worker, way);
                    leave(worker, way);
                };
                reach(master, &worker, Box::new(twice));
            }
        },
        |worker| {
            answer_pings(&worker);
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.on_connection(|_, _| {});
            worker.run().unwrap();
        },
    );
    entries.take()
}

/// Each worker has disconnected once and exited once, with its flag and one of these ends.
fn check(entries: &[String], expected: impl Fn(&str) -> (bool, &'static [&'static str])) {
    const ZERO: &str = "exit status: 0";
    assert_eq!(entries.len(), 2 * WAYS.len(), "{entries:?}");
    for way in WAYS {
        let prefix = format!("{way}: ");
        let own = entries
            .iter()
            .filter_map(|entry| entry.strip_prefix(&prefix));
        let own: Vec<_> = own.collect();
        let (flag, ends) = expected(way);
        assert_eq!(own[0], flag.to_string(), "{way}");
        let ends = ends.iter().map(|end| match *end {
            "0" => ZERO,
            _ => "signal: 15 (SIGTERM)",
        });
        let ends: Vec<_> = ends.map(|end| format!("{flag}, {end}")).collect();
        assert!(ends.contains(&own[1].to_owned()), "{way}: {}", own[1]);
    }
}

/// What the first way decides, as long as the worker is not leaving.
fn as_told(way: &str) -> (bool, &'static [&'static str]) {
    match way {
        "disconnect" => (true, &["0"]),
        "process().kill" => (false, &["15"]),
        "process().disconnect" => (false, &["0"]),
        // The signal may find it ending by itself.
        "kill" | "destroy" => (true, &["0", "15"]),
        // Signalled at once.
        _ => (true, &["0", "15"]),
    }
}

fn calls_before_it_is_online() {
    let entries = ways(|_, worker, leave_twice| {
        ask(worker, WorkerState::None, true, false);
        leave_twice(worker);
    });
    check(&entries, as_told);
}

/// Calls `then` once.
fn once(then: Box<dyn FnOnce(&WorkerProcess)>) -> impl FnMut(&WorkerProcess) {
    let mut then = Some(then);
    move |worker| {
        if let Some(then) = then.take() {
            then(worker);
        }
    }
}

fn calls_when_it_is_online() {
    let entries = ways(|_, worker, leave_twice| {
        let mut then = once(leave_twice);
        worker.on_online(move |_, worker| {
            ask(worker, WorkerState::Online, true, false);
            then(worker);
        });
    });
    check(&entries, as_told);
}

fn calls_when_it_listens() {
    let entries = ways(|_, worker, leave_twice| {
        let mut then = once(leave_twice);
        worker.on_listening(move |_, worker, _| {
            ask(worker, WorkerState::Listening, true, false);
            then(worker);
        });
    });
    check(&entries, as_told);
}

/// It cannot have heard of it: it is stopped meanwhile.
fn calls_when_it_is_leaving() {
    let entries = ways(|_, worker, leave_twice| {
        let mut then = once(leave_twice);
        worker.on_listening(move |_, worker, _| {
            stop(worker);
            worker.disconnect();
            ask(worker, WorkerState::Listening, true, false);
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

fn calls_when_it_has_disconnected() {
    let entries = ways(|_, worker, leave_twice| {
        worker.on_listening(|_, worker, _| {
            worker.disconnect();
        });
        let mut then = once(leave_twice);
        worker.on_disconnect(move |_, worker| {
            ask(worker, WorkerState::Disconnected, false, worker.is_dead());
            then(worker);
        });
    });
    check(&entries, |way| match way {
        "disconnect" | "process().disconnect" => (true, &["0"]),
        _ => (true, &["0", "15"]),
    });
}

/// In the callbacks for its end, and after them.
fn calls_when_it_is_dead() {
    let entries = ways(|_, worker, leave_twice| {
        worker.on_listening(|_, worker, _| {
            worker.disconnect();
        });
        let mut then = once(leave_twice);
        worker.on_exit(move |master, worker, _| {
            assert!(master.worker(worker.id()).is_none());
            ask(worker, WorkerState::Dead, false, true);
            then(worker);
            send_in_vain(worker);
            let worker = worker.clone();
            master.set_timeout(Duration::ZERO, move |_| {
                ask(&worker, WorkerState::Dead, false, true);
                leave(&worker, "everything");
                send_in_vain(&worker);
            });
        });
    });
    check(&entries, |_| (true, &["0"]));
}

/// It has ended, and the master has not looked yet: the program did not come back to its loop.
fn calls_when_it_has_ended_unnoticed() {
    let entries = ways(|_, worker, leave_twice| {
        let mut then = once(leave_twice);
        worker.on_listening(move |_, worker, _| {
            worker.process().kill(Signal::KILL);
            crate::harness::wait_for_state(worker.process().id(), ") Z ");
            ask(worker, WorkerState::Listening, true, false);
            then(worker);
        });
    });
    let asked = |way: &str| way != "process().kill" && way != "process().disconnect";
    assert_eq!(entries.len(), 2 * WAYS.len());
    for way in WAYS {
        let flag = asked(way);
        assert!(entries.contains(&format!("{way}: {flag}")), "{entries:?}");
        let end = format!("{way}: {flag}, signal: 9 (SIGKILL)");
        assert!(entries.contains(&end), "{entries:?}");
    }
}

fn calls_after_the_master() {
    let kept = Rc::new(RefCell::new(Vec::new()));
    let workers = Rc::clone(&kept);
    cluster(
        |master| {
            master.on_error(|_, _, error| panic!("{error}"));
            for _ in 0..2 {
                let worker = master.fork().unwrap();
                worker.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
                kept.borrow_mut().push(worker);
            }
        },
        |_| {},
    );
    // The harness has dropped it.
    let workers = workers.take();
    assert_ne!(workers[0], workers[1]);
    for worker in &workers {
        ask(worker, WorkerState::Dead, false, true);
        leave(worker, "everything");
        send_in_vain(worker);
        ask(worker, WorkerState::Dead, false, true);
        assert_eq!(worker.exited_after_disconnect(), Some(false));
    }
}

/// One that drops the master although it has workers loses all hold of them. They end.
fn calls_after_a_master_that_did_not_wait() {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let worker = master.fork().unwrap();
            let options = SendOptions::new().on_written(|_, _| panic!("there is no master"));
            worker.send_with(b"hello", options).unwrap();
            master.set_timeout(Duration::ZERO, |_| panic!("there is no master"));
            master.disconnect(|_| panic!("there is no master"));
            worker.on_exit(|_, _, _| panic!("there is no master"));
            drop(master);
            for _ in 0..2 {
                leave(&worker, "everything");
                send_in_vain(&worker);
                assert!(!worker.is_connected());
                assert!(!worker.is_dead(), "nobody has seen it end");
                worker.process().unref();
                worker.process().ref_();
            }
            // Nobody else waits for it.
            let pid = i32::try_from(worker.process().id()).unwrap();
            let pid = nix::unistd::Pid::from_raw(pid);
            let status = nix::sys::wait::waitpid(pid, None).unwrap();
            assert_eq!(status, nix::sys::wait::WaitStatus::Exited(pid, 0));
        }
        Role::Worker(worker) => worker.run().unwrap(),
    }
}

/// What a worker can do to leave.
const OWN_WAYS: [&str; 4] = ["disconnect", "kill", "destroy", "process().disconnect"];

fn leave_by_itself(worker: &Worker, way: &str) {
    match way {
        "disconnect" => assert!(std::ptr::eq(worker.disconnect(), worker)),
        "kill" => worker.kill(),
        "destroy" => worker.destroy(),
        _ => worker.process().disconnect(),
    }
}

fn leave_in_every_way(worker: &Worker) {
    for way in OWN_WAYS {
        leave_by_itself(worker, way);
    }
}

fn ask_itself(worker: &Worker) {
    for _ in 0..2 {
        assert!(!worker.is_dead());
        assert_eq!(
            worker.exited_after_disconnect().is_none(),
            worker.is_connected()
        );
        assert_eq!(worker.process().id(), std::process::id());
        assert_eq!(worker.inspect_port(), None);
        worker.process().unref();
        worker.process().ref_();
        let sent = worker.send(b"word");
        let reason = SendError::ChannelClosed;
        let in_vain = matches!(sent, Err(Error::Send { reason: r, .. }) if r == reason);
        assert!(sent.is_ok() || in_vain, "{sent:?}");
        assert!(sent.is_err() || worker.is_connected());
    }
}

/// Each way twice: at first, when the worker is leaving, in the callback for the end, and after it.
fn calls_in_the_worker() {
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
            listener.on_connection(|_, _| {});
            ask_itself(&worker);
            leave_by_itself(&worker, &way);
            leave_by_itself(&worker, &way);
            let own = way.clone();
            let count = Rc::new(std::cell::Cell::new(0));
            let disconnects = Rc::clone(&count);
            worker.on_disconnect(move |worker| {
                ask_itself(worker);
                assert!(!worker.is_connected());
                leave_by_itself(worker, &own);
                leave_in_every_way(worker);
                count.set(count.get() + 1);
            });
            while worker.is_connected() {
                worker.dispatch(None).unwrap();
                leave_by_itself(&worker, &way);
            }
            worker.run().unwrap();
            assert_eq!(disconnects.get(), 1);
            leave_in_every_way(&worker);
            ask_itself(&worker);
            assert!(listener.accept().unwrap().is_none());
            listener.close();
            listener.close();
            listener.unref();
            listener.ref_();
            listener.set_max_connections(Some(0));
            // A new one has ended before it began.
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

/// The master has closed the channel, and the worker has not looked yet.
fn calls_in_the_worker_without_a_master() {
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
            worker
                .send_with_fds(b"cut me off", vec![theirs.into()])
                .unwrap();
            // Closed after the channel.
            assert_eq!(ours.read(&mut [0]).unwrap(), 0);
            leave_by_itself(&worker, &way);
            leave_by_itself(&worker, &way);
            // What is sent now is an error at last.
            let told = Rc::new(std::cell::Cell::new(0));
            let count = Rc::clone(&told);
            let options = SendOptions::new().on_written(move |_, outcome| {
                outcome.unwrap_err();
                count.set(count.get() + 1);
            });
            let refused = worker.send_with(b"x", options).is_err();
            let listener = worker.listen("127.0.0.1:0").unwrap();
            assert!(listener.accept().unwrap().is_none());
            worker.run().unwrap();
            assert_eq!(told.get(), u32::from(!refused));
            assert_eq!(worker.exited_after_disconnect(), Some(false));
        },
    );
    assert_eq!(entries.take(), ["false, exit status: 0"; 4]);
}
