//! Tests of a master that is process 1, as in a container.

use std::io::{BufRead as _, Read as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cluster::{Master, Role, Signal, WorkerProcess};
use nix::libc;
use nix::sys::signal::{Signal as Number, raise};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use super::{is_process_1, output_of, panic_on_errors, run_to_completion, start_as_process_1};
use crate::harness::{Log, SIGNALS, cluster, note_events, of, run_until_killed, scaled, spin};

crate::scenarios! {
    process_1_can_be_a_master: PID_NAMESPACE
    workers_exit_with_a_master_that_is_process_1: PID_NAMESPACE
}

/// Kills a worker that has a child of its own. The child becomes an orphan and then the host's
/// child, because the host is process 1.
///
/// The host then forks another worker. That worker must disconnect when the host receives SIGTERM,
/// as from a container runtime.
#[expect(clippy::zombie_processes, reason = "it is left behind")]
fn process_1_can_be_a_master() {
    if !is_process_1() {
        let mut first = start_as_process_1("1");
        let mut lines = output_of(&mut first).lines();
        let line = lines.next().unwrap().unwrap();
        assert_eq!(line, "ready");
        let number = Pid::from_raw(i32::try_from(first.id()).unwrap());
        nix::sys::signal::kill(number, Number::SIGTERM).unwrap();
        let status = first.wait().unwrap();
        assert!(status.success(), "{status}");
        return;
    }
    SIGNALS.store(true, Ordering::SeqCst);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            assert_eq!(std::process::id(), 1);
            panic_on_errors(master);
            note_events(master, &log);
            let end = |master: &Master, _| master.disconnect();
            master.on_signal(Signal::TERM, end).unwrap();
            master.on_message(|_, worker, message| kill_parent_of_orphan(worker, message.bytes()));
            master.fork_with([("PART", "parent")]).unwrap();
        },
        |worker| match std::env::var("PART").unwrap().as_str() {
            "parent" => {
                let mut command = Command::new("sh");
                command.args(["-c", "read line; exit 7"]);
                let child = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
                let _ = worker.send(&child.id().to_ne_bytes()).unwrap();
                run_until_killed(&worker);
            }
            _ => run_to_completion(&worker),
        },
    );
    let entries = entries.take();
    assert_eq!(
        of(1, &entries).last(),
        Some(&"exit Some(false) signal: 9 (SIGKILL)")
    );
    assert_eq!(
        of(2, &entries).last(),
        Some(&"exit Some(true) exit status: 0")
    );
}

/// Kills the orphan's parent, and checks that the host can reap the orphan, because the master has
/// not done so.
///
/// The orphan exits at end-of-file on its input.
fn kill_parent_of_orphan(parent: &WorkerProcess, orphan: &[u8]) {
    let orphan = u32::from_ne_bytes(orphan.try_into().unwrap());
    let orphan = Pid::from_raw(i32::try_from(orphan).unwrap());
    parent.process().kill(Signal::KILL);
    let end = Ok(WaitStatus::Exited(orphan, 7));
    parent.on_exit(move |master, _, _| {
        // Check that the orphan is a zombie, but do not reap it before the other worker has exited.
        // The master must not mistake the zombie for that worker's exit.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        assert_eq!(waitid(Id::Pid(orphan), flags), end);
        let other = master.fork_with([("PART", "other")]).unwrap();
        other.on_online(|_, _| println!("ready"));
        other.on_exit(move |_, _, _| assert_eq!(waitpid(orphan, None), end));
    });
}

fn workers_exit_with_a_master_that_is_process_1() {
    if !is_process_1() {
        let mut first = start_as_process_1("1");
        let mut output = output_of(&mut first);
        for _ in 0..3 {
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            assert_eq!(line, "ready\n");
        }
        first.kill().unwrap();
        assert_eq!(first.wait().unwrap().signal(), Some(libc::SIGKILL));
        let killed_at = Instant::now();
        let mut rest = String::new();
        // Read to end-of-file. All processes have the pipe as standard output, so end-of-file
        // arrives when the last of them has exited.
        output.read_to_string(&mut rest).unwrap();
        assert!(killed_at.elapsed() < scaled(Duration::from_secs(1)));
        assert_eq!(rest, "");
        return;
    }
    match cluster::init().unwrap() {
        Role::Master(master) => {
            for part in ["idle", "looping", "stopped"] {
                master.fork_with([("PART", part)]).unwrap();
            }
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            println!("ready");
            match std::env::var("PART").unwrap().as_str() {
                "looping" => loop {
                    spin();
                },
                "stopped" => raise(Number::SIGSTOP).unwrap(),
                _ => {}
            }
            worker.run().unwrap();
        }
    }
}
