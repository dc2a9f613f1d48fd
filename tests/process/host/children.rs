//! Tests that the master and the host reap and signal only their own children.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use cluster::{Signal, WorkerProcess};
use nix::libc;
use nix::sys::signal::{SaFlags, SigHandler, SigSet, Signal as Number};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::{
    PROCESS_1, child, count, disposition, exit_with_requested_code, fork_to_end_with, handle,
    is_process_1, panic_on_errors, run_to_completion, runs, start_as_process_1,
    without_process_descriptors,
};
use crate::harness::{
    Log, cluster, note_events, of, run_until_killed, wait_for_state, wait_until, with_env,
};
use crate::refused::refuse_calls;

crate::scenarios! {
    master_reaps_no_child_of_the_host
    host_that_waits_for_any_child_gets_its_own_children: EXIT_OF_REAPED_CHILDREN
    exits_are_reported_though_the_host_ignores_its_children: EXIT_OF_REAPED_CHILDREN
    reused_process_id_is_not_signalled: PID_NAMESPACE
    children_are_reaped_though_the_host_ignores_them_on_old_kernels
}

fn master_reaps_no_child_of_the_host() {
    let log = Log::default();
    let entries = log.clone();
    let children = Rc::new(RefCell::new(Vec::new()));
    let started_by_host = Rc::clone(&children);
    let early = child(11);
    wait_for_state(early.id(), ") Z ");
    children.borrow_mut().push(early);
    cluster(
        |master| {
            panic_on_errors(master);
            let started = Rc::clone(&children);
            master.on_online(move |_, _| {
                let child = child(12);
                wait_for_state(child.id(), ") Z ");
                started.borrow_mut().push(child);
            });
            master.on_exit(move |master, worker, status| {
                log.add(format!("{} {:?}", worker.id(), status.code()));
                children.borrow_mut().push(child(13));
                if worker.id().get() < 5 {
                    fork_to_end_with(master, 2);
                }
            });
            fork_to_end_with(master, 1);
        },
        |_| exit_with_requested_code(),
    );
    let codes = [(1, 1), (2, 2), (3, 2), (4, 2), (5, 2)];
    let expected = codes.map(|(worker, code)| format!("{worker} Some({code})"));
    assert_eq!(entries.take(), expected);
    let wait = |mut child: Child| child.wait().unwrap().code().unwrap();
    let mut codes: Vec<_> = started_by_host.take().into_iter().map(wait).collect();
    codes.sort_unstable();
    assert_eq!(codes, [11, 12, 12, 12, 12, 12, 13, 13, 13, 13, 13]);
}

type ExitCodes = Arc<Mutex<BTreeMap<i32, i32>>>;

fn note_exit(exit_codes: &ExitCodes, status: nix::Result<WaitStatus>) -> bool {
    let Ok(WaitStatus::Exited(pid, code)) = status else {
        return false;
    };
    let previous = exit_codes.lock().unwrap().insert(pid.as_raw(), code);
    assert_eq!(previous, None);
    true
}

/// Starts a thread that waits for any child, as a host may do, and notes the exit codes. The thread
/// ends when `stop` is set and no child remains.
fn wait_for_any_child(exit_codes: &ExitCodes, stop: &Arc<AtomicBool>) -> JoinHandle<()> {
    let (exit_codes, stop) = (Arc::clone(exit_codes), Arc::clone(stop));
    std::thread::spawn(move || {
        loop {
            let stopping = stop.load(Ordering::SeqCst);
            if !note_exit(&exit_codes, waitpid(None, None)) && stopping {
                return;
            }
            std::thread::yield_now();
        }
    })
}

#[expect(clippy::zombie_processes, reason = "all are waited for at once")]
fn host_that_waits_for_any_child_gets_its_own_children() {
    const ROUNDS: i32 = 30;
    let (exit_codes, stop) = (ExitCodes::default(), Arc::new(AtomicBool::new(false)));
    let started = Rc::new(RefCell::new(BTreeMap::new()));
    let started_by_host = Rc::clone(&started);
    let exits = Rc::new(Cell::new(0));
    let seen = Rc::clone(&exits);
    let waiting = cluster::is_master().then(|| wait_for_any_child(&exit_codes, &stop));
    let by_callbacks = Arc::clone(&exit_codes);
    cluster(
        |master| {
            panic_on_errors(master);
            master.on_exit(move |master, worker, status| {
                let round = i32::try_from(worker.id().get()).unwrap();
                assert_eq!(status.code(), Some(round));
                exits.set(round);
                let host_child = child(100 + round);
                let pid = i32::try_from(host_child.id()).unwrap();
                started.borrow_mut().insert(pid, 100 + round);
                if round < ROUNDS {
                    fork_to_end_with(master, round + 1);
                }
                note_exit(&by_callbacks, waitpid(None, Some(WaitPidFlag::WNOHANG)));
            });
            fork_to_end_with(master, 1);
        },
        |_| exit_with_requested_code(),
    );
    stop.store(true, Ordering::SeqCst);
    waiting.unwrap().join().unwrap();
    assert_eq!(seen.get(), ROUNDS);
    // Leave out the workers that the host has reaped before the master could. Their exit events
    // were not lost: the master reported all rounds.
    let mut waited_for = exit_codes.lock().unwrap();
    let expected = started_by_host.take();
    waited_for.retain(|pid, _| expected.contains_key(pid));
    assert_eq!(*waited_for, expected);
}

/// Makes the kernel reap children as soon as they exit. `how` chooses the disposition of SIGCHLD.
/// With `ignored`, the host ignores the signal. `default` and `handled` set SA_NOCLDWAIT, with the
/// default action and with a handler.
fn ignore_children(how: &str) {
    let none = SigSet::empty();
    let reap = SaFlags::SA_NOCLDWAIT;
    match how {
        "ignored" => handle(Number::SIGCHLD, SigHandler::SigIgn, SaFlags::empty(), none),
        "default" => handle(Number::SIGCHLD, SigHandler::SigDfl, reap, none),
        _ => handle(Number::SIGCHLD, SigHandler::Handler(count), reap, none),
    }
}

fn exits_are_reported_though_the_host_ignores_its_children() {
    const HOW: &str = "HOW";
    let Ok(how) = std::env::var(HOW) else {
        for how in ["ignored", "default", "handled"] {
            with_env(HOW, how, || unreachable!());
        }
        return;
    };
    if cluster::is_master() {
        ignore_children(&how);
    }
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            panic_on_errors(master);
            note_events(master, &log);
            (0..3).for_each(|code| fork_to_end_with(master, code));
            let killed = master.fork_with([("CODE", "none")]).unwrap();
            killed.on_online(|_, worker| worker.process().kill(Signal::KILL));
        },
        |worker| match std::env::var("CODE").unwrap().as_str() {
            "none" => run_until_killed(&worker),
            _ => exit_with_requested_code(),
        },
    );
    let entries = entries.take();
    for (worker, expected) in [
        (1, "exit status: 0"),
        (2, "exit status: 1"),
        (3, "exit status: 2"),
        (4, "signal: 9 (SIGKILL)"),
    ] {
        let last = format!("exit Some(false) {expected}");
        assert_eq!(of(worker, &entries).last(), Some(&last.as_str()), "{how}");
    }
}

/// Simulates an old kernel with a host that ignores its children, so that the kernel reaps the
/// workers. The master cannot get their exit status, and must report an error and the status 255.
fn children_are_reaped_though_the_host_ignores_them_on_old_kernels() {
    const HOW: &str = "HOW";
    let Ok(how) = std::env::var(HOW) else {
        for how in ["ignored", "default", "handled"] {
            with_env(HOW, how, || unreachable!());
        }
        return;
    };
    if cluster::is_master() {
        without_process_descriptors();
        ignore_children(&how);
    }
    let before = disposition(Number::SIGCHLD);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            master.fork().unwrap().on_online(|_, worker| {
                let child = child(0).id();
                let child = Pid::from_raw(i32::try_from(child).unwrap());
                wait_until("the exit of a child", || has_ended(child).then_some(()));
                worker.disconnect();
            });
        },
        |worker| run_to_completion(&worker),
    );
    // Get the error's text from the C library, because C libraries use different texts.
    let no_child = std::io::Error::from(nix::errno::Errno::ECHILD);
    let expected = [
        "1 fork".to_owned(),
        "1 online".to_owned(),
        "1 disconnect Some(true)".to_owned(),
        format!("cannot get the exit status of worker 1: {no_child}"),
        "1 exit Some(true) exit status: 255".to_owned(),
    ];
    assert_eq!(entries.take(), expected, "{how}");
    assert_eq!(disposition(Number::SIGCHLD), before, "{how}");
    let is_called = how == "handled";
    assert_eq!(runs(Number::SIGCHLD) > 0, is_called, "{how}");
}

/// Signals a worker that has exited and whose process ID a child of the host reuses. The signal
/// must not reach that child.
///
/// The master has not processed the worker's exit yet.
fn reused_process_id_is_not_signalled() {
    if !is_process_1() {
        // Test both `clone3` and the fallback to `fork`.
        for how in ["cloned", "forked"] {
            let status = start_as_process_1(how).wait().unwrap();
            assert!(status.success(), "{how}: {status}");
        }
        return;
    }
    if cluster::is_master() {
        ignore_children("ignored");
        if std::env::var(PROCESS_1).unwrap() == "forked" {
            refuse_calls(&[libc::SYS_clone3], libc::ENOSYS);
        }
    }
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            worker.on_online(|_, worker| signal_reused_process_id(worker));
        },
        |worker| {
            worker.on_message(|_, _| std::process::exit(0));
            worker.run().unwrap();
        },
    );
}

fn signal_reused_process_id(worker: &WorkerProcess) {
    let _ = worker.send(b"end").unwrap();
    let number = Pid::from_raw(i32::try_from(worker.process().id()).unwrap());
    wait_until("the exit of the worker", || has_ended(number).then_some(()));
    handle(
        Number::SIGCHLD,
        SigHandler::SigDfl,
        SaFlags::empty(),
        SigSet::empty(),
    );
    let mut foreign = wait_until("a child with the worker's process ID", || {
        child_with_pid(number)
    });
    worker.process().kill(Signal::KILL);
    let number = Pid::from_raw(i32::try_from(foreign.id()).unwrap());
    nix::sys::signal::kill(number, Number::SIGTERM).unwrap();
    let status = foreign.wait().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGTERM), "{status}");
}

/// Starts a child of the host with this process ID. Returns `None` if the ID is not free.
fn child_with_pid(number: Pid) -> Option<Child> {
    let last = (number.as_raw() - 1).to_string();
    std::fs::write("/proc/sys/kernel/ns_last_pid", last).unwrap();
    let mut child = Command::new("sleep").arg("600").spawn().unwrap();
    if i32::try_from(child.id()) == Ok(number.as_raw()) {
        return Some(child);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    None
}

fn has_ended(pid: Pid) -> bool {
    nix::sys::signal::kill(pid, None) == Err(nix::Error::ESRCH)
}
