//! Tests of detached processes (`Settings::detached`), which are not workers. The master does not
//! wait for them unless they are referenced, and only the application ends them.

use std::cell::{Cell, RefCell};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::rc::Rc;
use std::time::Duration;

use cluster::{Error, Master, SendError, Settings, Signal, Stdio, WorkerProcess, WorkerState};
use nix::sys::signal::{Signal as RawSignal, kill, killpg};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, getpgid, getpgrp, getsid};

use crate::harness::{
    Group, Log, cluster, is_alive, is_watched, note_events, wait_for_state, wait_until, watched,
};

crate::scenarios! {
    run_returns_while_a_detached_process_runs
    run_waits_for_a_referenced_detached_process
    disconnect_calls_back_while_a_detached_process_runs
    disconnect_within_spares_a_detached_process
    worker_disconnect_within_spares_a_detached_process
    worker_kill_signals_a_detached_process_at_once
    detached_process_is_in_no_table_and_emits_no_cluster_event
    exit_of_a_detached_process_is_delivered_and_leaves_no_zombie
    messages_to_a_detached_process_fail_without_endless_errors
    detached_process_leads_a_session_unless_setsid_is_false
    worker_leads_a_session_if_setsid_is_true
    detached_process_survives_the_end_of_its_master
}

/// Starts a program that exits when the returned stream is closed.
fn start(master: &Master, settings: Settings) -> (WorkerProcess, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let settings = settings
        .exec("/bin/cat")
        .args([""; 0])
        .stdio([Stdio::fd(theirs)])
        .detached(true);
    (master.fork_as(settings).unwrap(), ours)
}

fn is_running(process: &WorkerProcess) -> bool {
    !process.is_dead() && is_alive(process.process().id())
}

/// Makes `run` wait for the process, and closes the stream, so that the process exits.
fn end(process: &WorkerProcess, life: &RefCell<Option<UnixStream>>) {
    process.process().reference();
    life.take();
}

fn run_returns_while_a_detached_process_runs() {
    cluster(
        |master| {
            let (process, life) = start(master, Settings::default());
            master.run().unwrap();
            assert!(is_running(&process));
            end(&process, &RefCell::new(Some(life)));
            master.run().unwrap();
            assert!(process.is_dead());
        },
        |_| unreachable!(),
    );
}

fn run_waits_for_a_referenced_detached_process() {
    cluster(
        |master| {
            let (process, life) = start(master, Settings::default());
            process.process().reference();
            process.process().unreference();
            process.process().reference();
            master.set_timeout(Duration::from_millis(1), move |_| drop(life));
            master.run().unwrap();
            assert_eq!(process.process().exit_status().unwrap().code(), Some(0));
        },
        |_| unreachable!(),
    );
}

/// Starts a detached process and a worker, and calls `disconnect` with a callback. The callback
/// asserts that the worker has exited and that the detached process still runs.
fn assert_disconnect_spares(disconnect: impl FnOnce(&Master, Box<dyn FnOnce(&Master)>)) {
    let called = Rc::new(Cell::new(false));
    let set = Rc::clone(&called);
    cluster(
        |master| {
            let (process, life) = start(master, Settings::default());
            master.fork().unwrap();
            let life = RefCell::new(Some(life));
            let check = move |master: &Master| {
                assert!(master.workers().is_empty());
                assert!(is_running(&process));
                set.set(true);
                end(&process, &life);
            };
            disconnect(master, Box::new(check));
        },
        |worker| worker.run().unwrap(),
    );
    assert!(called.get());
}

fn disconnect_calls_back_while_a_detached_process_runs() {
    assert_disconnect_spares(|master, then| {
        master.on_all_disconnected_once(then);
        master.disconnect()
    });
}

/// Checks a deadline of zero, which kills every worker but no detached process.
fn disconnect_within_spares_a_detached_process() {
    assert_disconnect_spares(|master, then| {
        master.on_all_disconnected_once(then);
        master.disconnect_within(Duration::ZERO)
    });
}

fn worker_disconnect_within_spares_a_detached_process() {
    cluster(
        |master| {
            let (process, life) = start(master, Settings::default());
            process.disconnect();
            process.disconnect_within(Duration::ZERO);
            process.process().disconnect();
            let life = RefCell::new(Some(life));
            let handle = process.clone();
            // Let the process exit only after the deadline of zero has passed. The exit status 0
            // then shows that the deadline has not killed the process.
            master.set_timeout(Duration::from_millis(1), move |_| end(&handle, &life));
            master.run().unwrap();
            assert_eq!(process.process().exit_status().unwrap().code(), Some(0));
        },
        |_| unreachable!(),
    );
}

fn worker_kill_signals_a_detached_process_at_once() {
    cluster(
        |master| {
            for by_process in [false, true] {
                let (process, life) = start(master, Settings::default());
                process.process().reference();
                if by_process {
                    process.process().kill(Signal::INT);
                } else {
                    process.kill(Signal::INT);
                }
                master.run().unwrap();
                let status = process.process().exit_status().unwrap();
                assert_eq!(status.signal(), Some(Signal::INT.number()));
                drop(life);
            }
        },
        |_| unreachable!(),
    );
}

fn detached_process_is_in_no_table_and_emits_no_cluster_event() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let (process, life) = start(master, Settings::default());
            assert!(master.workers().is_empty());
            assert_eq!(master.worker(process.id()), None);
            assert!(master.loads().workers.is_empty());
            assert_eq!(process.state(), WorkerState::Disconnected);
            assert!(!process.is_connected());
            let worker = master.fork().unwrap();
            assert_ne!(worker.id(), process.id());
            assert_eq!(master.workers(), [worker]);
            let log = log.clone();
            process.on_disconnect(|_, _| panic!("it was never connected"));
            process.on_exit(move |_, process, status| {
                assert_eq!(process.state(), WorkerState::Dead);
                assert_eq!(process.exited_after_disconnect(), Some(false));
                log.add(format!("detached {status}"));
            });
            assert_eq!(process.exited_after_disconnect(), None);
            let life = RefCell::new(Some(life));
            master.on_all_disconnected_once(move |_| end(&process, &life));
            master.disconnect();
        },
        |worker| worker.run().unwrap(),
    );
    let expected = [
        "2 fork",
        "2 online",
        "2 disconnect Some(true)",
        "2 exit Some(true) exit status: 0",
        "detached exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn exit_of_a_detached_process_is_delivered_and_leaves_no_zombie() {
    let exits = Rc::new(Cell::new(0));
    let count = Rc::clone(&exits);
    cluster(
        |master| {
            let (process, life) = start(master, Settings::default());
            process.on_exit(move |_, process, status| {
                assert_eq!(status.code(), Some(0));
                assert!(process.process().usage().is_some());
                let process = process.process().id();
                let waited = waitpid(Pid::from_raw(process.try_into().unwrap()), None);
                assert_eq!(waited, Err(nix::Error::ECHILD));
                count.set(count.get() + 1);
            });
            drop(life);
            // Dispatch events here, because `run` does not wait for an unreferenced process.
            while !process.is_dead() {
                master.dispatch(None).unwrap();
            }
        },
        |_| unreachable!(),
    );
    assert_eq!(exits.get(), 1);
}

/// Checks that the error callback is called only 16 times (`LATE_ERRORS_MAX` in
/// `src/core/master/workers.rs`), although each call causes another error.
fn messages_to_a_detached_process_fail_without_endless_errors() {
    let errors = Rc::new(Cell::new(0));
    let count = Rc::clone(&errors);
    cluster(
        |master| {
            let (process, life) = start(master, Settings::default());
            process.on_error(move |_, process, error| {
                let reason = SendError::ChannelClosed;
                let worker = Some(process.id());
                assert!(matches!(error, Error::Send { worker: w, reason: r, .. }
                    if *w == worker && *r == reason));
                count.set(count.get() + 1);
                process.send(b"again").unwrap_err();
            });
            process.send(b"one").unwrap_err();
            end(&process, &RefCell::new(Some(life)));
        },
        |_| unreachable!(),
    );
    assert_eq!(errors.get(), 16);
}

fn group_and_session(process: &WorkerProcess) -> (Pid, Pid) {
    let process = Pid::from_raw(process.process().id().try_into().unwrap());
    (
        getpgid(Some(process)).unwrap(),
        getsid(Some(process)).unwrap(),
    )
}

fn detached_process_leads_a_session_unless_setsid_is_false() {
    cluster(
        |master| {
            let (leader, life) = start(master, Settings::default());
            let own = Pid::from_raw(leader.process().id().try_into().unwrap());
            assert_eq!(group_and_session(&leader), (own, own));
            end(&leader, &RefCell::new(Some(life)));
            let (member, life) = start(master, Settings::default().setsid(false));
            let ours = (getpgrp(), getsid(None).unwrap());
            assert_eq!(group_and_session(&member), ours);
            end(&member, &RefCell::new(Some(life)));
        },
        |_| unreachable!(),
    );
}

fn worker_leads_a_session_if_setsid_is_true() {
    cluster(
        |master| {
            let ours = (getpgrp(), getsid(None).unwrap());
            assert_eq!(group_and_session(&master.fork().unwrap()), ours);
            master.setup_master(Settings::default().setsid(true));
            let leader = master.fork().unwrap();
            let own = Pid::from_raw(leader.process().id().try_into().unwrap());
            assert_eq!(group_and_session(&leader), (own, own));
            master.disconnect();
        },
        |worker| worker.run().unwrap(),
    );
}

/// Checks that a detached process survives in two cases: the master returns, or another process
/// kills the master's process group.
fn detached_process_survives_the_end_of_its_master() {
    const KILLED: &str = "KILLED";
    if is_watched() {
        return cluster(
            |master| {
                let sleep = Settings::default().exec("/bin/sleep").args(["1000"]);
                let process = master.fork_as(sleep.detached(true)).unwrap();
                println!("detached {}", process.process().id());
                if std::env::var_os(KILLED).is_some() {
                    let worker = master.fork().unwrap();
                    worker.on_online(|_, worker| println!("worker {}", worker.process().id()));
                }
            },
            |worker| worker.run().unwrap(),
        );
    }
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    for is_killed in [false, true] {
        let mut command = watched();
        if is_killed {
            command.env(KILLED, "1");
        }
        let group = Group::start(&mut command).unwrap();
        let detached: i32 = group.line("detached ").parse().unwrap();
        let detached = Pid::from_raw(detached);
        if is_killed {
            let worker = group.line("worker ").parse().unwrap();
            killpg(group.pid(), RawSignal::SIGTERM).unwrap();
            wait_until("the worker's end", || (!is_alive(worker)).then_some(()));
        }
        let status = group.end().unwrap();
        assert_eq!(status.success(), !is_killed);
        wait_for_state(detached.as_raw().unsigned_abs(), ") S ");
        kill(detached, RawSignal::SIGKILL).unwrap();
        waitpid(detached, None).unwrap();
    }
}
