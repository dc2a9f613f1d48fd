//! Plays scenarios on simulated old kernels, in which a seccomp filter makes newer system calls
//! fail. The crate needs a fallback for each of these calls.

use std::io::Write as _;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use cluster::{Interest, ListenOptions, Master, Role, Signal, Worker};
use libtest_mimic::Trial;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::harness::{Log, ROOT, SIGNALS, Scenario, run_with};
use crate::refused::refuse_calls;

crate::scenarios! {
    workers_serve_and_exit
}

/// Environment variable with the system that this process and its descendants simulate.
const SYSTEM: &str = "SYSTEM";

struct System {
    name: &'static str,
    missing: &'static [libc::c_long],
    /// System calls that fail with `refusal`, as in sandboxes.
    forbidden: &'static [libc::c_long],
    refusal: libc::c_int,
    /// Whether only SIGCHLD reports the exits of children.
    signals: bool,
    has_proc: bool,
}

/// The number of the system call fchmodat2(2) on x86-64, AArch64 and RISC-V. The crate `libc` has a
/// constant for it only on some targets.
const FCHMODAT2: libc::c_long = 452;

/// System calls that were added after 2016 and that this crate, the standard library or `polling`
/// uses.
const NEW_CALLS: &[libc::c_long] = &[
    libc::SYS_clone3,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_close_range,
    libc::SYS_statx,
    libc::SYS_openat2,
    libc::SYS_faccessat2,
    FCHMODAT2,
    libc::SYS_epoll_pwait2,
];

const SYSTEMS: &[System] = &[
    without("clone3", &[libc::SYS_clone3]),
    System {
        signals: true,
        ..without("pidfds", &[libc::SYS_clone3, libc::SYS_pidfd_open])
    },
    without("pidfd_send_signal", &[libc::SYS_pidfd_send_signal]),
    without("close_range", &[libc::SYS_close_range]),
    System {
        signals: true,
        ..without("calls_newer_than_2016", NEW_CALLS)
    },
    // `clone3` must fail with ENOSYS here, and not with EPERM like the calls below. Only ENOSYS
    // makes the C library fall back to creating threads with `clone`.
    System {
        signals: true,
        forbidden: &[
            libc::SYS_pidfd_open,
            libc::SYS_pidfd_send_signal,
            libc::SYS_close_range,
        ],
        ..without("calls_refused_by_a_sandbox", &[libc::SYS_clone3])
    },
    // This filter allows the pidfds of Linux 5.3, but not `pidfd_send_signal`.
    System {
        forbidden: &[libc::SYS_pidfd_send_signal],
        ..without("permission_for_pidfd_send_signal", &[])
    },
    System {
        forbidden: &[libc::SYS_pidfd_send_signal],
        refusal: libc::EACCES,
        ..without("access_to_pidfd_send_signal", &[])
    },
    System {
        forbidden: &[libc::SYS_waitid],
        ..without("permission_for_waitid", &[])
    },
];

/// Systems without /proc. Only root can hide it, so other users skip these systems.
const WITHOUT_PROC: &[System] = &[
    System {
        has_proc: false,
        ..without("proc", &[])
    },
    System {
        has_proc: false,
        signals: true,
        ..without("proc_and_calls_newer_than_2016", NEW_CALLS)
    },
];

const fn without(name: &'static str, missing: &'static [libc::c_long]) -> System {
    System {
        name,
        missing,
        forbidden: &[],
        refusal: libc::EPERM,
        signals: false,
        has_proc: true,
    }
}

/// The scenarios played on every system. Each scenario covers how a worker starts, serves clients,
/// receives signals or exits.
const SCENARIO_NAMES: &[&str] = &[
    "workers_serve_and_exit",
    "events_are_emitted_once_and_in_order",
    "exit_reports_code_or_signal",
    "children_inherit_only_their_channel",
    "sequential_connections_rotate_exactly",
    "connection_in_a_queue_survives_a_killed_worker",
    "shared_listener_serves",
    "kill_disconnects_before_the_signal",
    "disconnect_all_calls_back_once_after_the_last_exit",
    "orphans_exit_within_a_second",
    "kill_infinite_loop",
    "foreign_workers_share_a_port",
    "copy_runs_from_fork_to_exit",
    "resource_usage_is_known_after_exit",
    "exit_of_a_detached_process_is_delivered_and_leaves_no_zombie",
    "group_of_a_worker_ends_before_its_exit_event",
];

pub fn trials(scenarios: &[&'static Scenario]) -> Vec<Trial> {
    let play = |system: &'static System, scenario: &'static str| {
        let known = scenarios.iter().any(|known| known.name == scenario);
        assert!(known, "no scenario {scenario}");
        let name = format!("{scenario}_without_{}", system.name);
        let env = [(SYSTEM, system.name)];
        Trial::test(name, move || run_with(scenario, &env))
    };
    let each = |system| {
        SCENARIO_NAMES
            .iter()
            .map(move |scenario| play(system, scenario))
    };
    let mut trials: Vec<_> = SYSTEMS.iter().flat_map(each).collect();
    // Also play this scenario without `clone3`: `fork` then waits until the child reports whether a
    // step has failed.
    trials.push(play(&SYSTEMS[0], "missing_program_is_an_error_of_fork"));
    let without_proc = |system| ROOT.of(play(system, "workers_serve_and_exit"));
    trials.extend(WITHOUT_PROC.iter().map(without_proc));
    trials
}

/// Makes this process simulate the system that the environment names. Workers inherit the
/// simulation from their master.
pub fn become_old() {
    let Ok(name) = std::env::var(SYSTEM) else {
        return;
    };
    let mut systems = SYSTEMS.iter().chain(WITHOUT_PROC);
    let system = systems.find(|system| system.name == name).unwrap();
    SIGNALS.store(system.signals, Ordering::SeqCst);
    if cluster::is_worker() {
        return;
    }
    if !system.has_proc {
        hide_proc();
    }
    for (calls, errno) in [
        (system.missing, libc::ENOSYS),
        (system.forbidden, system.refusal),
    ] {
        if !calls.is_empty() {
            refuse_calls(calls, errno);
        }
    }
}

/// Hides /proc from this process and its descendants.
fn hide_proc() {
    const NOTHING: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NOTHING, "/", NOTHING, private, NOTHING).unwrap();
    let nothing = MsFlags::empty();
    mount(Some("empty"), "/proc", Some("tmpfs"), nothing, NOTHING).unwrap();
    assert!(!Path::new("/proc/self").exists());
}

/// Returns the number of open descriptors below 256, without using /proc.
fn count_fds() -> usize {
    let is_open = |number: &i32| {
        #[allow(unsafe_code)]
        // SAFETY: the borrowed descriptor is used only for `F_GETFD`, which fails if the descriptor
        // is not open.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*number) };
        fcntl(fd, FcntlArg::F_GETFD).is_ok()
    };
    (0..256).filter(is_open).count()
}

const SOCKET: &str = "SOCKET";

/// Checks that a worker serves a port and a path until it is killed, and that another worker exits
/// with a code.
fn workers_serve_and_exit() {
    let before = count_fds();
    match cluster::init().unwrap() {
        Role::Master(master) => {
            assert_workers_serve_and_exit(&master);
            drop(master);
            let signals = if SIGNALS.load(Ordering::SeqCst) { 2 } else { 0 };
            assert_eq!(count_fds(), before + signals);
        }
        Role::Worker(worker) => serve(&worker),
    }
}

fn serve(worker: &Worker) {
    if worker.id().get() == 2 {
        std::process::exit(7);
    }
    let path = PathBuf::from(std::env::var_os(SOCKET).unwrap());
    let options = ListenOptions::from(path.as_path());
    let unix = worker.listen(options.readable_all(true)).unwrap();
    unix.set_connection_callback(|_, mut connection| connection.write_all(b"path").unwrap());
    let tcp = worker.listen("127.0.0.1:0").unwrap();
    tcp.set_connection_callback(|_, mut connection| connection.write_all(b"port").unwrap());
    worker.run().unwrap();
    panic!("`run` returned without a disconnect request");
}

fn assert_workers_serve_and_exit(master: &Master) {
    let log = Log::default();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let first = master.fork_with([(SOCKET, path.as_path())]).unwrap();
    let second = master.fork().unwrap();
    let (file, answers) = (path.clone(), log.clone());
    first.on_listening(move |master, _, address| {
        let Some(port) = address.port() else {
            let mode = file.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o444, 0o444);
            return;
        };
        let (unix, log) = (UnixStream::connect(&file).unwrap(), answers.clone());
        let tcp = TcpStream::connect(("127.0.0.1", port)).unwrap();
        read_to_end(master, unix, move |master, answer| {
            log.add(answer);
            read_to_end(master, tcp, move |master, answer| {
                log.add(answer);
                master.workers()[0].process().kill(Signal::KILL);
            });
        });
    });
    let exits = log.clone();
    master.on_exit(move |_, worker, status| exits.add(format!("{} {status}", worker.id())));
    drop((first, second));
    master.run().unwrap();
    let mut seen = log.take();
    seen.sort();
    let statuses = ["1 signal: 9 (SIGKILL)", "2 exit status: 7"];
    assert_eq!(seen, [&statuses[..], &["path", "port"]].concat());
    assert!(
        !path.exists(),
        "the last worker's exit removes the socket file"
    );
}

/// Reads the stream until end-of-file and calls `then` with the content.
fn read_to_end(
    master: &Master,
    stream: impl Into<OwnedFd>,
    then: impl FnOnce(&Master, String) + 'static,
) {
    let mut then = Some(then);
    let mut answer = Vec::new();
    let more = move |master: &Master, stream: &OwnedFd| {
        let mut buffer = [0; 64];
        let read = nix::unistd::read(stream, &mut buffer).unwrap();
        answer.extend(&buffer[..read]);
        if read > 0 {
            return Some(Interest::Readable);
        }
        then.take().unwrap()(master, String::from_utf8(answer.clone()).unwrap());
        None
    };
    master
        .watch(stream.into(), Interest::Readable, more)
        .unwrap();
}
