//! Tests a worker's life from fork to exit: events, arguments, environment and identity.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use cluster::{Error, Master, Role, Sent, Settings, Signal, SpawnOptions, WorkerState};

use crate::harness::{Log, SIGNALS, cluster, is_alive, note_messages};
use crate::refused::refuse_calls;

crate::scenarios! {
    events_are_emitted_once_and_in_order
    final_messages_arrive_before_disconnect
    exit_reports_code_or_signal
    settings_reach_the_worker
    setup_is_emitted_by_setup_master_and_by_fork
    missing_program_is_an_error_of_fork
    worker_child_is_no_worker
    worker_behind_a_wrapper_is_a_worker_if_the_process_is_the_same: NICE
    wrappers_cannot_start_the_program_recursively
    unknown_policy_is_an_error
    policy_is_frozen_by_the_first_fork
    children_start_with_default_signals
    children_inherit_only_their_channel
    callbacks_may_change_callbacks_and_fork
    exits_are_noticed_without_process_descriptors
}

fn events_are_emitted_once_and_in_order() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let state = |name: &'static str, level: &'static str| {
                let log = log.clone();
                move |_: &Master, worker: &cluster::WorkerProcess| {
                    assert_eq!(worker.id().get(), 1);
                    log.add(format!("{level} {name} {:?}", worker.state()));
                }
            };
            master.on_fork(state("fork", "cluster"));
            master.on_online(state("online", "cluster"));
            let listening = state("listening", "cluster");
            let listening = RefCell::new(listening);
            master.on_listening(move |master, worker, address| {
                assert_eq!(address.socket_addr().unwrap().ip().to_string(), "127.0.0.1");
                assert!(matches!(
                    address,
                    cluster::Address::Tcp(std::net::SocketAddr::V4(_))
                ));
                assert_ne!(address.port(), Some(0));
                (listening.borrow_mut())(master, worker);
                worker.process().kill(Signal::KILL);
            });
            master.on_disconnect(|master, worker| {
                assert!(master.worker(worker.id()).is_some(), "still in the table");
                assert!(!worker.is_connected());
                assert_eq!(worker.exited_after_disconnect(), Some(false));
            });
            master.on_disconnect(state("disconnect", "cluster"));
            master.on_exit(|master, worker, status| {
                assert!(
                    master.worker(worker.id()).is_none(),
                    "no longer in the table"
                );
                assert!(worker.is_dead());
                assert_eq!(status.signal(), Some(9));
                assert_eq!(status.code(), None);
                assert_eq!(worker.process().exit_status(), Some(status));
                assert_eq!(worker.exited_after_disconnect(), Some(false));
                assert!(!is_alive(worker.process().id()));
            });
            let exit = RefCell::new(state("exit", "cluster"));
            master.on_exit(move |master, worker, _| (exit.borrow_mut())(master, worker));

            let worker = master.fork().unwrap();
            assert_eq!(worker.state(), WorkerState::None);
            assert!(worker.is_connected() && !worker.is_dead());
            assert_eq!(worker.exited_after_disconnect(), None);
            assert_eq!(master.workers(), std::slice::from_ref(&worker));
            worker.on_online(state("online", "worker"));
            let listening = RefCell::new(state("listening", "worker"));
            worker.on_listening(move |m, w, _| (listening.borrow_mut())(m, w));
            worker.on_disconnect(state("disconnect", "worker"));
            let exit = RefCell::new(state("exit", "worker"));
            worker.on_exit(move |m, w, _| (exit.borrow_mut())(m, w));
            assert_eq!(log.len(), 0, "nothing is emitted inside fork");
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            assert!(listener.accept().unwrap().is_none(), "no client connects");
        },
    );
    assert_eq!(
        entries.take(),
        [
            "cluster fork None",
            "worker online Online",
            "cluster online Online",
            "worker listening Listening",
            "cluster listening Listening",
            "worker disconnect Disconnected",
            "cluster disconnect Disconnected",
            "worker exit Dead",
            "cluster exit Dead",
        ]
    );
}

fn final_messages_arrive_before_disconnect() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (a, b, c, d) = (log.clone(), log.clone(), log.clone(), log);
            master.on_online(move |_, worker| a.add(format!("online {:?}", worker.state())));
            master.on_message(move |_, _, message| {
                b.add(String::from_utf8_lossy(message.bytes()));
            });
            master.on_disconnect(move |_, _| c.add("disconnect"));
            master.on_exit(move |_, _, status| d.add(format!("{:?}", status.code())));
            master.fork().unwrap();
        },
        |worker| {
            let _ = worker.send(b"first").unwrap();
            let _ = worker.send(b"second").unwrap();
            std::process::exit(42);
        },
    );
    let expected = ["online Online", "first", "second", "disconnect", "Some(42)"];
    assert_eq!(entries.take(), expected);
}

fn exit_reports_code_or_signal() {
    let seen = Rc::new(RefCell::new(BTreeMap::new()));
    let exits = Rc::clone(&seen);
    cluster(
        |master| {
            master.on_exit(move |_, worker, status| {
                let end = (status.code(), status.signal());
                exits.borrow_mut().insert(worker.id().get(), end);
                // Check that the methods of an exited worker still return. They must have no
                // effect.
                assert_eq!(worker.disconnect(), worker);
                worker.kill(Signal::KILL);
                worker.process().kill(Signal::KILL);
                worker.process().disconnect();
                assert!(worker.send(b"hello?").is_err());
            });
            for end in ["0", "7", "TERM"] {
                master.fork_with([("END", end)]).unwrap();
            }
        },
        |worker| match std::env::var("END").unwrap().parse() {
            Ok(code) => std::process::exit(code),
            Err(_) => {
                nix::sys::signal::raise(nix::sys::signal::SIGTERM).unwrap();
                drop(worker);
            }
        },
    );
    let expected = [
        (1, (Some(0), None)),
        (2, (Some(7), None)),
        (3, (None, Some(15))),
    ];
    assert_eq!(seen.take(), BTreeMap::from(expected));
}

fn settings_reach_the_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            assert_eq!(master.settings(), Settings::default());
            master.on_message(move |_, worker, message| {
                log.add(String::from_utf8_lossy(message.bytes()));
                worker.disconnect();
            });
            master.fork().unwrap();
            let own = std::env::current_exe().unwrap();
            let settings = master.settings();
            assert_eq!(settings.get_exec(), Some(own.as_path()));
            assert_eq!(
                settings.get_args(),
                Some(&[][..]),
                "the arguments of this process"
            );
            master.setup_master(Settings::default().args(["custom argument"]));
            assert_eq!(master.settings().get_exec(), Some(&*own), "unchanged");
            master.fork().unwrap();
        },
        |worker| {
            let args: Vec<_> = std::env::args().skip(1).collect();
            let text = format!("{} {args:?}", worker.id());
            let _ = worker.send(text.as_bytes()).unwrap();
            worker.run().unwrap();
        },
    );
    let mut entries = entries.take();
    entries.sort();
    assert_eq!(entries, ["1 []", "2 [\"custom argument\"]"]);
}

fn setup_is_emitted_by_setup_master_and_by_fork() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (setups, forks) = (log.clone(), log.clone());
            master.on_setup(move |_, settings| {
                setups.add(format!("setup {:?}", settings.get_args()))
            });
            master.on_fork(move |_, _| forks.add("fork"));
            master.setup_master(Settings::default().args(["a"]));
            master.fork().unwrap();
            assert_eq!(log.len(), 0, "nothing is emitted inside the call");
        },
        |_| {},
    );
    let setup = "setup Some([\"a\"])";
    assert_eq!(entries.take(), [setup, setup, "fork"]);
}

fn missing_program_is_an_error_of_fork() {
    cluster(
        |master| {
            master.on_fork(|_, _| panic!("no worker was forked"));
            master.on_exit(|_, _, _| panic!("no worker was forked"));
            master.setup_master(Settings::default().exec("/no/such/program"));
            let error = master.fork().unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::ENOENT), "{error}");
            assert!(error.to_string().contains("/no/such/program"), "{error}");
            master.setup_master(Settings::default().exec("/etc/passwd"));
            let error = master.fork().unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::EACCES), "{error}");
            let zero = master.fork_with([("NAME", "a\0b")]).unwrap_err();
            assert!(matches!(zero, Error::Fork { .. }), "{zero}");
            assert!(master.workers().is_empty());
        },
        |_| {},
    );
}

/// Environment variable that marks a program which a worker starts or a wrapper executes.
const CHILD: &str = "WORKERS_CHILD";

/// Checks that this process is a master, although a worker or a wrapper started it.
fn assert_is_master() {
    assert!(cluster::is_master() && !cluster::is_worker());
    match cluster::init().unwrap() {
        Role::Master(master) => {
            assert!(master.workers().is_empty());
            // Check that a detached process, which is not a worker, gets none of the variables that
            // the master sets for a worker.
            let settings = Settings::default().exec("/usr/bin/env").args::<&str>([]);
            let settings = settings.detached(true).silent(true);
            let program = master.fork_as(settings).unwrap();
            let mut output = String::new();
            let mut stream = program.process().take_stdio(1).unwrap();
            stream.read_to_string(&mut output).unwrap();
            assert!(output.contains("PATH="), "{output}");
            for name in ["WORKER_PID", "UNIQUE_ID", "CHANNEL_FD", "INSPECT_PORT"] {
                assert!(!output.contains(&format!("CLUSTER_{name}")), "{output}");
            }
            master.run().unwrap();
        }
        Role::Worker(worker) => panic!("worker {}", worker.id()),
    }
    assert!(cluster::is_master());
    println!("master");
}

fn worker_child_is_no_worker() {
    if std::env::var_os(CHILD).is_some() {
        return assert_is_master();
    }
    let log = Log::default();
    let entries = log.clone();
    // Record the environment. `init` must not change it, because other threads may read it at any
    // time.
    let environment: Vec<_> = std::env::vars_os().collect();
    assert_eq!(
        cluster::is_worker(),
        std::env::var_os("CLUSTER_UNIQUE_ID").is_some()
    );
    cluster(
        |master| {
            assert!(cluster::is_master() && !cluster::is_worker());
            assert!(matches!(cluster::init(), Err(Error::AlreadyInitialized)));
            master.on_message(move |_, worker, message| {
                log.add(String::from_utf8_lossy(message.bytes()));
                worker.disconnect();
            });
            master.setup_master(Settings::default().inspect_port(9229));
            master.fork().unwrap();
        },
        |worker| {
            assert!(cluster::is_worker() && !cluster::is_master());
            assert!(matches!(cluster::init(), Err(Error::AlreadyInitialized)));
            assert_eq!(std::env::vars_os().collect::<Vec<_>>(), environment);
            let own = std::env::current_exe().unwrap();
            let child = Command::new(own).env(CHILD, "1").output().unwrap();
            let _ = worker.send(&child.stdout).unwrap();
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["master\n"]);
}

/// Checks that a program cannot start itself endlessly through wrappers. Each wrapper is a shell
/// that forks this program with the same arguments. Behind the first wrapper, the program is a
/// master. Behind the second, `init` fails.
fn wrappers_cannot_start_the_program_recursively() {
    const REFUSED: i32 = 42;
    let depth = std::env::var(CHILD).map_or(0, |depth| depth.parse().unwrap());
    let master = match cluster::init() {
        Ok(Role::Master(master)) => master,
        Ok(Role::Worker(worker)) => panic!("worker {}", worker.id()),
        Err(Error::Environment { variable, .. }) => {
            assert_eq!((depth, variable), (2, "CLUSTER_WORKER_PID"));
            std::process::exit(REFUSED);
        }
        Err(error) => panic!("{error}"),
    };
    assert!(depth < 2, "the program has started itself again");
    let own = std::env::current_exe().unwrap();
    let settings = Settings::default().exec("/bin/sh");
    let settings = settings.args(["-c".into(), "\"$0\"; exit $?".into(), own.into_os_string()]);
    let statuses = Log::default();
    let log = statuses.clone();
    master.on_exit(move |_, _, status| log.add(format!("{:?}", status.code())));
    master
        .fork_as(SpawnOptions::new(settings).env(CHILD, (depth + 1).to_string()))
        .unwrap();
    master.run().unwrap();
    let expected = if depth == 1 { REFUSED } else { 0 };
    assert_eq!(statuses.take(), [format!("{:?}", Some(expected))]);
}

/// Starts the master's program through three wrappers: a shell that executes it, a shell that forks
/// it, and `env` with `nice`. The forked program is a master, and the other two are workers.
fn worker_behind_a_wrapper_is_a_worker_if_the_process_is_the_same() {
    let kind = std::env::var(CHILD);
    if kind.as_deref() == Ok("forked") {
        return assert_is_master();
    }
    let (log, ended) = (Log::default(), Rc::new(Cell::new(0)));
    let (entries, counted) = (log.clone(), Rc::clone(&ended));
    cluster(
        |master| {
            note_messages(master, &log);
            master.on_exit(move |_, _, status| {
                assert!(status.success(), "{status}");
                counted.set(counted.get() + 1);
            });
            let own = std::env::current_exe().unwrap();
            let wrappers = [
                ("/bin/sh", "executed", "exec \"$0\""),
                ("/usr/bin/env", "executed", "nice"),
                ("/bin/sh", "forked", "\"$0\"; exit $?"),
            ];
            for (exec, kind, script) in wrappers {
                let args = match script {
                    "nice" => vec!["nice".into(), own.clone().into_os_string()],
                    script => vec!["-c".into(), script.into(), own.clone().into_os_string()],
                };
                let settings = Settings::default().exec(exec).args(args);
                master
                    .fork_as(SpawnOptions::new(settings).env(CHILD, kind))
                    .unwrap();
            }
        },
        |worker| assert_eq!(worker.send(b"here").unwrap(), Sent::Continue),
    );
    let mut entries = entries.take();
    entries.sort();
    assert_eq!(entries, ["1 here", "2 here"]);
    assert_eq!(ended.get(), 3);
}

fn unknown_policy_is_an_error() {
    const IS_CHILD: &str = "POLICY_TEST";
    if std::env::var_os(IS_CHILD).is_some() {
        match cluster::init() {
            Err(error) => println!("{error}"),
            Ok(cluster::Role::Master(master)) => println!("{}", master.scheduling_policy()),
            Ok(cluster::Role::Worker(_)) => println!("worker"),
        }
        return;
    }
    let unknown = "environment variable CLUSTER_SCHED_POLICY is \"roundrobin\", \
                   expected \"rr\", \"none\" or \"sharded\"\n";
    let valid = [("rr", "rr\n"), ("none", "none\n"), ("sharded", "sharded\n")];
    let cases = [("roundrobin", unknown)].into_iter().chain(valid);
    for (value, expected) in cases {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let output = command
            .env(IS_CHILD, "1")
            .env("CLUSTER_SCHED_POLICY", value)
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
    }
}

fn policy_is_frozen_by_the_first_fork() {
    use cluster::SchedulingPolicy::{RoundRobin, Shared};
    cluster(
        |master| {
            assert_eq!(master.scheduling_policy(), RoundRobin);
            master.set_scheduling_policy(Shared).unwrap();
            master.fork().unwrap();
            let error = master.set_scheduling_policy(RoundRobin).unwrap_err();
            assert!(matches!(error, Error::PolicyFrozen));
            assert_eq!(master.scheduling_policy(), Shared);
        },
        |_| {},
    );
}

/// Runs `command` in a shell, which the master forks as a worker, and returns the command's output.
/// Calls `before` in the master before the fork.
fn output_of_shell(command: &str, before: impl FnOnce(&Master)) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    let script = format!("{{ {command}; }} > {}", file.path().display());
    cluster(
        |master| {
            before(master);
            master.setup_master(Settings::default().exec("/bin/sh").args(["-c", &script]));
            master.on_exit(|_, _, status| assert!(status.success()));
            master.fork().unwrap();
        },
        |_| unreachable!("the workers are shells"),
    );
    std::fs::read_to_string(file.path()).unwrap()
}

fn children_start_with_default_signals() {
    use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};

    let text = output_of_shell("cat /proc/self/status", |_| {
        let mut set = SigSet::empty();
        set.add(Signal::SIGUSR1);
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: SIG_IGN installs no handler, so no code runs in a signal context.
        unsafe { signal(Signal::SIGHUP, SigHandler::SigIgn) }.unwrap();
    });
    for field in ["SigBlk:", "SigIgn:"] {
        let value = text.lines().find_map(|line| line.strip_prefix(field));
        let bits = u64::from_str_radix(value.unwrap().trim(), 16).unwrap();
        // Leave the signals 32 and 33 out of the comparison, because the C library uses them
        // itself.
        assert_eq!(bits & !(0b11 << 31), 0, "{field} in {text}");
    }
}

fn children_inherit_only_their_channel() {
    let text = output_of_shell("echo $CLUSTER_CHANNEL_FD; ls -l /proc/$$/fd", |_| {});
    let mut lines = text.lines();
    let channel = lines.next().unwrap();
    let fds: Vec<_> = lines.filter_map(|line| line.split_once(" -> ")).collect();
    let extra: Vec<_> = fds
        .iter()
        .filter_map(|(left, _)| left.rsplit(' ').next())
        .filter(|fd| !["0", "1", "2"].contains(fd))
        // Keep only sockets. The only other descriptor here is the shell's saved copy of its
        // standard output.
        .filter(|fd| {
            fds.iter()
                .all(|(l, to)| !l.ends_with(fd) || to.starts_with("socket:"))
        })
        .collect();
    assert_eq!(extra, [channel], "{text}");
}

fn callbacks_may_change_callbacks_and_fork() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let inner = log.clone();
            let never = master.on_online(|_, _| panic!("removed by an earlier event"));
            master.on_fork(move |master, worker| {
                master.remove_callback(never);
                let log = inner.clone();
                worker.on_online(move |_, _| log.add("added in a callback"));
                if worker.id().get() == 1 {
                    master.fork().unwrap();
                }
            });
            master.on_exit(move |master, _, _| {
                log.add("exit");
                assert!(matches!(master.run(), Err(Error::AlreadyRunning)));
            });
            master.fork().unwrap();
        },
        |_| {},
    );
    let mut entries = entries.take();
    entries.sort();
    assert_eq!(
        entries,
        ["added in a callback", "added in a callback", "exit", "exit"]
    );
}

/// Checks that the master notices exits without process descriptors. Kernels before Linux 5.3 have
/// neither `clone3` nor `pidfd_open`.
fn exits_are_noticed_without_process_descriptors() {
    let calls = [nix::libc::SYS_clone3, nix::libc::SYS_pidfd_open];
    refuse_calls(&calls, nix::libc::ENOSYS);
    SIGNALS.store(true, Ordering::SeqCst);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            // The master must leave the application's own children to the application.
            let host_child = RefCell::new(Command::new("true").spawn().unwrap());
            master.on_exit(move |master, worker, status| {
                log.add(format!("{} {:?}", worker.id(), status.code()));
                match log.len() {
                    2 => drop(master.fork().unwrap()),
                    3 => assert!(host_child.borrow_mut().wait().unwrap().success()),
                    _ => {}
                }
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| std::process::exit(i32::try_from(worker.id().get()).unwrap()),
    );
    let mut entries = entries.take();
    entries.sort();
    assert_eq!(entries, ["1 Some(1)", "2 Some(2)", "3 Some(3)"]);
}
