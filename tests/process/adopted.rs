//! Tests masters that adopt orphans: processes whose parent has exited. The kernel gives orphans to
//! process 1, or to the nearest ancestor that is a subreaper.

use std::io::BufRead as _;
use std::process::Command;
use std::time::{Duration, Instant};

use cluster::pool::{Pool, PoolOptions};
use cluster::{Master, Role, Worker};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::host::{is_process_1, output_of, start_as_process_1};
use crate::inherited::signals;

crate::scenarios! {
    pool_that_is_process_1_reaps_orphans: PID_NAMESPACE
    orphans_are_reaped_without_a_list_of_children: PID_NAMESPACE
    host_that_is_process_1_gets_the_status_of_its_children: PID_NAMESPACE
    pool_without_the_option_reaps_no_orphans: PID_NAMESPACE
    pool_that_is_not_process_1_reaps_no_orphans
    subreaper_reaps_orphans_on_request
}

/// Runs `play` as process 1 of a new PID namespace. Asserts that the process exits with success and
/// that its output is only `done`.
fn as_process_1(play: impl FnOnce()) {
    if is_process_1() {
        return play();
    }
    let mut first = start_as_process_1("1");
    let lines: Vec<_> = output_of(&mut first).lines().map(Result::unwrap).collect();
    let status = first.wait().unwrap();
    assert!(status.success(), "{status}");
    assert_eq!(lines, ["done"]);
}

/// Mounts a `/proc` for the PID namespace of this process, as a container runtime does.
fn mount_proc() {
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).unwrap();
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), NONE).unwrap();
}

/// Calls `start`, which forks a worker that makes two orphans. Then calls `check` with the orphans'
/// process ids every 10 ms, and exits when `check` returns `true`.
fn with_orphans(start: impl FnOnce(&Master), check: impl FnMut(&[Pid]) -> bool + 'static) {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            start(&master);
            let mut check = Some(check);
            master.on_message(move |master, _, message| {
                let text = String::from_utf8_lossy(message.bytes()).into_owned();
                let numbers = text.lines().map(|line| line.parse().unwrap());
                let orphans: Vec<_> = numbers.map(Pid::from_raw).collect();
                assert_eq!(orphans.len(), 2);
                let mut check = check.take().unwrap();
                master.set_interval(Duration::from_millis(10), move |_| {
                    if check(&orphans) {
                        println!("done");
                        std::process::exit(0);
                    }
                });
            });
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            make_orphans(&worker);
            worker.run().unwrap();
        }
    }
}

/// Starts two processes whose parent exits before them, and sends their ids to the master.
///
/// The processes keep the output open, so the ids are sent only after both processes have exited.
fn make_orphans(worker: &Worker) {
    let mut shell = Command::new("sh");
    shell.args(["-c", "sleep .01 & echo $!; sleep .02 & echo $!"]);
    let output = shell.output().unwrap();
    let _ = worker.send(&output.stdout).unwrap();
}

fn start_pool(master: &Master) {
    // The pool works without this handle, and forks its worker in the loop.
    let _ = Pool::new(master, PoolOptions::default().workers(1));
}

fn is_reaped(pid: &Pid) -> bool {
    kill(*pid, None) == Err(nix::Error::ESRCH)
}

fn pool_that_is_process_1_reaps_orphans() {
    as_process_1(|| {
        mount_proc();
        with_orphans(start_pool, |orphans| orphans.iter().all(is_reaped));
    });
}

/// Keeps the `/proc` of the parent PID namespace, in which processes have other ids. The master can
/// therefore not find its children there.
fn orphans_are_reaped_without_a_list_of_children() {
    as_process_1(|| with_orphans(start_pool, |orphans| orphans.iter().all(is_reaped)));
}

/// Starts a child that exits with code 7, and waits until it is a zombie.
fn exited_child() -> std::process::Child {
    let child = Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    let ended = WaitStatus::Exited(pid, 7);
    assert_eq!(waitid(Id::Pid(pid), flags).unwrap(), ended);
    child
}

/// Lets the host wait for its child 300 ms after the child's exit, as a busy thread might. The
/// master must not reap the child within one second. If a lack of cores delays the host for longer,
/// the test does not know which of the two comes first, and uses another child.
fn host_that_is_process_1_gets_the_status_of_its_children() {
    as_process_1(|| {
        mount_proc();
        let (mut begun, mut child) = (Instant::now(), exited_child());
        let mut has_waited = false;
        with_orphans(start_pool, move |orphans| {
            if !has_waited && begun.elapsed() > Duration::from_millis(300) {
                let status = child.wait();
                if begun.elapsed() < Duration::from_secs(1) {
                    assert_eq!(status.unwrap().code(), Some(7));
                    has_waited = true;
                } else {
                    (begun, child) = (Instant::now(), exited_child());
                }
            }
            has_waited && orphans.iter().all(is_reaped)
        });
    });
}

/// Returns whether this process handles SIGCHLD, as a master that reaps orphans does.
fn handles_sigchld() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    signals(&status, "SigCgt:").contains(&Signal::SIGCHLD)
}

fn pool_without_the_option_reaps_no_orphans() {
    as_process_1(|| {
        let Role::Master(master) = cluster::init().unwrap() else {
            unreachable!("no worker is forked");
        };
        let options = PoolOptions::default();
        let _ = Pool::new(&master, options.clone().reap_orphans(false));
        assert!(!handles_sigchld());
        let _ = Pool::new(&master, options);
        assert!(handles_sigchld());
        println!("done");
    });
}

fn pool_that_is_not_process_1_reaps_no_orphans() {
    let Role::Master(master) = cluster::init().unwrap() else {
        unreachable!("no worker is forked");
    };
    start_pool(&master);
    assert!(!handles_sigchld());
}

fn subreaper_reaps_orphans_on_request() {
    let start = |master: &Master| {
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let mut own = exited_child();
        master.reap_orphans();
        // `reap_orphans` has found the host's own child as a zombie, but must not have reaped it.
        assert_eq!(own.wait().unwrap().code(), Some(7));
        master.fork().unwrap();
    };
    with_orphans(start, |orphans| orphans.iter().all(is_reaped));
}
