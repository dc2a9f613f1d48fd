//! Tests cluster programs that a worker of another cluster starts.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use cluster::{Error, Master, Role, Settings, Worker};
use nix::sched::{CloneFlags, setns, unshare};

use crate::harness::{Log, in_background, talk, when_listening};

crate::scenarios! {
    program_below_several_wrappers_has_its_own_workers
    program_with_the_process_id_of_a_worker_is_a_master: PID_NAMESPACE
    worker_that_executes_its_program_again_gets_an_error
}

/// Environment variable with the role of a program that a scenario starts.
const KIND: &str = "NESTED";

fn kind() -> Option<String> {
    std::env::var(KIND).ok()
}

/// Returns settings for a shell that forks this program. The last command of the script keeps the
/// shell from executing the program without a fork.
fn behind_a_shell(args: &[&str]) -> Settings {
    let own = std::env::current_exe().unwrap().into_os_string();
    let script = ["-c".into(), "\"$0\" \"$@\"; exit $?".into(), own];
    let args = args.iter().map(Into::into);
    Settings::default()
        .exec("/bin/sh")
        .args(script.into_iter().chain(args))
}

/// Runs until the only worker has exited, and checks its status.
fn run_worker(master: &Master) {
    let statuses = Log::default();
    let log = statuses.clone();
    master.on_exit(move |_, _, status| log.add(status.to_string()));
    master.run().unwrap();
    assert_eq!(statuses.take(), ["exit status: 0"]);
}

/// Forks a worker, disconnects it after a client has received its answer, and checks its exit
/// status.
fn serve_a_client(master: &Master) {
    when_listening(master, 1, |master, address| {
        let ask = move || talk(address, b"").unwrap();
        in_background(master, ask, |master, answer| {
            assert_eq!(answer, "hello");
            master.disconnect();
        });
    });
    master.fork().unwrap();
    run_worker(master);
}

fn say_hello(worker: &Worker) {
    for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
        connection.unwrap().write_all(b"hello").unwrap();
    }
}

/// Starts four masters, each below the previous one. The worker of each master except the last is a
/// shell that forks the next master. The worker of the last master runs this program, and serves a
/// client.
fn program_below_several_wrappers_has_its_own_workers() {
    const LEVELS: usize = 4;
    let level = std::env::args()
        .nth(1)
        .map_or(1, |level| level.parse().unwrap());
    match cluster::init().unwrap() {
        Role::Master(master) if level < LEVELS => {
            let next = (level + 1).to_string();
            master.fork_as(behind_a_shell(&[&next])).unwrap();
            run_worker(&master);
        }
        Role::Master(master) => serve_a_client(&master),
        Role::Worker(worker) => {
            assert_eq!(level, LEVELS);
            say_hello(&worker);
        }
    }
}

/// Starts a cluster program as process 2 of a PID namespace. Its ancestor is a worker that is also
/// process 2, but of the surrounding PID namespace. The worker either calls `init` or only wraps
/// the program.
fn program_with_the_process_id_of_a_worker_is_a_master() {
    match kind().as_deref() {
        None => {
            for kind in ["worker", "wrapper"] {
                start_in_pid_namespace(
                    Command::new(std::env::current_exe().unwrap()).env(KIND, kind),
                );
            }
        }
        Some("nested") if cluster::is_master() => {
            assert_eq!(std::env::var("CLUSTER_WORKER_PID").unwrap(), "2");
            assert_eq!(std::process::id(), 2);
            let Role::Master(master) = cluster::init().unwrap() else {
                unreachable!("the process is a master");
            };
            serve_a_client(&master);
        }
        Some("nested") => {
            let Role::Worker(worker) = cluster::init().unwrap() else {
                unreachable!("the process is a worker");
            };
            assert_ne!(std::env::var("CLUSTER_WORKER_PID").unwrap(), "2");
            say_hello(&worker);
        }
        Some("wrapper") if std::process::id() == 2 => start_nested(),
        Some(_) => match cluster::init().unwrap() {
            Role::Master(master) => {
                assert_eq!(std::process::id(), 1);
                master.fork().unwrap();
                run_worker(&master);
            }
            Role::Worker(worker) => {
                assert_eq!(std::process::id(), 2);
                start_nested();
                drop(worker);
            }
        },
    }
}

/// Starts this scenario as process 2 of a new PID namespace. Process 1 is a shell.
fn start_nested() {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "\"$0\"; exit $?"]);
    start_in_pid_namespace(
        shell
            .arg(std::env::current_exe().unwrap())
            .env(KIND, "nested"),
    );
}

/// Runs a command as process 1 of a new PID namespace.
fn start_in_pid_namespace(command: &mut Command) {
    let namespace = std::fs::File::open("/proc/self/ns/pid_for_children").unwrap();
    unshare(CloneFlags::CLONE_NEWPID).unwrap();
    let status = command.status().unwrap();
    setns(namespace, CloneFlags::CLONE_NEWPID).unwrap();
    assert!(status.success(), "{status}");
}

fn worker_that_executes_its_program_again_gets_an_error() {
    if kind().is_some() {
        assert!(cluster::is_worker());
        let error = cluster::init().unwrap_err();
        let Error::Environment { variable, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(variable, "CLUSTER_CHANNEL_FD");
        return;
    }
    match cluster::init().unwrap() {
        Role::Master(master) => {
            master.fork().unwrap();
            run_worker(&master);
        }
        Role::Worker(_worker) => {
            let own = std::env::current_exe().unwrap();
            panic!("{}", Command::new(own).env(KIND, "again").exec());
        }
    }
}
