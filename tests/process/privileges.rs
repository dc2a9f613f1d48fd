//! Tests which privileges a worker of another user loses, and that `init` fails in a process that
//! has a worker's environment but is not a worker.

use std::collections::BTreeSet;
use std::fs::{File, Permissions};
use std::io::{Read as _, Seek as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::{BindOptions, Error, ListenOptions, Master, Settings, SpawnOptions, Worker};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Gid, Pid, Uid, getppid};

use crate::harness::{
    LeasedProgram, Log, NOBODY, OWN_PROGRAM, children, cluster, for_both_policies, fork_patiently,
    has_state, is_alive, note_messages, open_fds, scaled, try_patiently, wait_for_state,
    wait_until, with_env,
};
use crate::host::{end_child, fork_of_the_host, without_process_descriptors};
use crate::refused::{self, refuse_calls};

crate::scenarios! {
    worker_of_another_user_keeps_no_privileges_of_root: ROOT
    failed_step_of_fork_is_named_and_leaves_no_process: ROOT
    id_that_means_unchanged_is_an_error: ROOT
    capabilities_that_survive_setuid_are_dropped: SETPRIV
    root_worker_keeps_its_capabilities: ROOT
    fork_returns_when_a_child_of_another_user_is_stopped: ROOT
    fork_returns_when_a_child_of_another_user_is_stopped_on_old_kernels: ROOT
    child_that_exits_slowly_is_reaped_before_the_next_fork: ROOT
    fork_returns_when_a_child_without_exec_of_another_user_is_stopped: ROOT_AND_FAULT_POINTS
    fork_returns_when_a_child_without_exec_of_another_user_is_stopped_on_old_kernels: ROOT_AND_FAULT_POINTS
    worker_that_cannot_be_signalled_is_an_error: SETPRIV
    worker_of_another_user_cannot_access_the_master: ROOT
    worker_cannot_access_a_worker_of_another_user: ROOT
    worker_gets_only_sockets_of_the_host_by_number: ROOT
    init_with_invalid_worker_variables_is_an_error
    foreign_descriptor_is_refused_as_a_channel
    unix_socket_that_is_no_stream_is_refused_as_a_channel
    foreign_stream_is_refused_as_a_channel
}

fn settings_of_nobody() -> Settings {
    Settings::default()
        .exec(OWN_PROGRAM)
        .uid(NOBODY)
        .gid(NOBODY)
}

/// Returns the lines of `/proc/self/status` about users, groups and capabilities.
pub fn credentials() -> Vec<String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let fields = [
        "Uid:", "Gid:", "Groups:", "CapInh:", "CapPrm:", "CapEff:", "CapAmb:",
    ];
    let is_listed = |line: &&str| fields.iter().any(|field| line.starts_with(field));
    let joined = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    status.lines().filter(is_listed).map(joined).collect()
}

type Attempts = fn(&Worker) -> Vec<String>;

fn report(worker: &Worker, attempts: Attempts) {
    let not_refused = attempts(worker);
    let _ = worker.send(format!("{not_refused:?}").as_bytes()).unwrap();
}

/// Runs `attempts` in a worker with these settings. Asserts that the kernel refuses all of them.
fn assert_all_refused(settings: Settings, attempts: Attempts) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_messages(master, &log);
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
            master.setup_master(settings);
            fork_patiently(|| master.fork());
        },
        |worker| report(&worker, attempts),
    );
    assert_eq!(entries.take(), ["1 []"]);
}

/// Returns the attempts that did not fail with the expected errno.
fn not_refused_of<T: std::fmt::Debug>(
    attempts: impl IntoIterator<Item = (&'static str, nix::Result<T>, Errno)>,
) -> Vec<String> {
    let attempts = attempts.into_iter();
    let others = attempts.filter(|(_, result, errno)| result.as_ref().err() != Some(errno));
    others
        .map(|(what, result, _)| format!("{what}: {result:?}"))
        .collect()
}

fn worker_of_another_user_keeps_no_privileges_of_root() {
    if cluster::is_master() {
        nix::unistd::setgroups(&[Gid::from_raw(0), Gid::from_raw(1), Gid::from_raw(4)]).unwrap();
    }
    assert_all_refused(settings_of_nobody(), |_| {
        let user = "Uid: 65534 65534 65534 65534";
        let group = "Gid: 65534 65534 65534 65534";
        let none = "0000000000000000";
        let sets = ["Inh", "Prm", "Eff", "Amb"].map(|set| format!("Cap{set}: {none}"));
        let [inheritable, permitted, effective, ambient] = sets.each_ref();
        let sets = [inheritable, permitted, effective, ambient].map(String::as_str);
        let expected = [&[user, group, "Groups:"], &sets[..]].concat();
        assert_eq!(credentials(), expected);

        let (user, group) = (Uid::from_raw(0), Gid::from_raw(0));
        let nobody = Uid::from_raw(NOBODY);
        let perm = Errno::EPERM;
        not_refused_of([
            ("setuid", nix::unistd::setuid(user), perm),
            ("seteuid", nix::unistd::seteuid(user), perm),
            (
                "setresuid",
                nix::unistd::setresuid(nobody, nobody, user),
                perm,
            ),
            ("setgid", nix::unistd::setgid(group), perm),
            ("setegid", nix::unistd::setegid(group), perm),
            ("setgroups", nix::unistd::setgroups(&[group]), perm),
        ])
    });
}

/// Checks that a fork fails with the id that means "unchanged" in system calls.
fn id_that_means_unchanged_is_an_error() {
    cluster(
        |master| {
            let settings = Settings::default;
            for settings in [settings().uid(u32::MAX), settings().gid(u32::MAX)] {
                let fork = || master.fork_as(SpawnOptions::new(settings.clone()));
                let error = try_patiently(fork).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{error}");
            }
        },
        |_| unreachable!(),
    );
}

/// Checks that a worker also loses the capabilities that the kernel keeps when a process changes
/// its user. The master has ambient capabilities with `SECBIT_NO_SETUID_FIXUP`, and in one case it
/// also sets `PR_SET_KEEPCAPS`.
fn capabilities_that_survive_setuid_are_dropped() {
    const RAISED: &str = "RAISED";
    let Ok(how) = std::env::var(RAISED) else {
        for how in ["exec", "main", "main that keeps"] {
            let status = Command::new("setpriv")
                .args([
                    "--inh-caps=+setuid,+setgid",
                    "--ambient-caps=+setuid,+setgid",
                ])
                .args(["--securebits=+no_setuid_fixup"])
                .arg(std::env::current_exe().unwrap())
                .env(RAISED, how)
                .status()
                .unwrap();
            assert!(status.success(), "{how}: {status}");
        }
        return;
    };
    if cluster::is_master() {
        assert!(credentials().contains(&"CapAmb: 00000000000000c0".to_owned()));
        nix::sys::prctl::set_keepcaps(how == "main that keeps").unwrap();
    }
    let attempts: Attempts = |_| {
        let is_empty = |set: &String| !set.starts_with("Cap") || set.ends_with(" 0000000000000000");
        let mut left: Vec<_> = credentials()
            .into_iter()
            .filter(|set| !is_empty(set))
            .collect();
        let (user, group) = (Uid::from_raw(0), Gid::from_raw(0));
        left.extend(not_refused_of([
            ("setuid", nix::unistd::setuid(user), Errno::EPERM),
            ("setgid", nix::unistd::setgid(group), Errno::EPERM),
        ]));
        left
    };
    let main = move |worker: Worker| {
        report(&worker, attempts);
        0
    };
    let settings = match how.as_str() {
        "exec" => settings_of_nobody(),
        _ => settings_of_nobody().main(main),
    };
    assert_all_refused(settings, attempts);
}

/// Checks two settings with which the worker keeps its capabilities: the user 0 (root), and a
/// change of only the group.
fn root_worker_keeps_its_capabilities() {
    const SETTINGS: &str = "SETTINGS";
    let Ok(how) = std::env::var(SETTINGS) else {
        for how in ["user 0", "another group"] {
            with_env(SETTINGS, how, || unreachable!());
        }
        return;
    };
    let settings = match how.as_str() {
        "user 0" => Settings::default().uid(0).gid(NOBODY),
        _ => Settings::default().gid(NOBODY),
    };
    let log = Log::default();
    let entries = log.clone();
    let effective = || {
        let credentials = credentials();
        let mut sets = credentials
            .into_iter()
            .filter(|set| set.starts_with("CapEff"));
        sets.next().unwrap()
    };
    cluster(
        |master| {
            note_messages(master, &log);
            master.setup_master(settings);
            fork_patiently(|| master.fork());
        },
        |worker| worker.send(effective().as_bytes()).map(drop).unwrap(),
    );
    assert_eq!(entries.take(), [format!("1 {}", effective())]);
}

/// Asserts that `fork` fails with a timeout, because the child, which runs as another user, does
/// not start in time.
fn assert_fork_gives_up(master: &Master) {
    let begun = Instant::now();
    let error = master.fork().unwrap_err();
    let waited = begun.elapsed();
    println!("{error} after {waited:?}");
    // The limit is one second, but on a busy machine this process may have to wait for a processor.
    assert!(waited < scaled(Duration::from_secs(10)), "{waited:?}");
    match error {
        Error::Fork { step, reason, .. } => {
            assert_eq!(step.to_string(), "wait until it starts");
            assert_eq!(reason.kind(), std::io::ErrorKind::TimedOut);
        }
        error => panic!("{error}"),
    }
    assert!(master.workers().is_empty());
}

/// Waits until the killed child has exited. This may take long on a busy machine. Then asserts that
/// the next `fork` leaves no zombie.
fn assert_next_fork_leaves_no_zombie(master: &Master) {
    wait_until("the exit of the child", || {
        (!children().into_iter().any(is_alive)).then_some(())
    });
    master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
    master.setup_master(Settings::default().exec("/bin/true"));
    let next = master.fork().unwrap();
    assert_eq!(children(), [next.process().id()]);
}

/// Checks that `fork` returns when a signal stops the child. Any process of the child's user may
/// send this signal.
fn fork_returns_when_a_child_of_another_user_is_stopped() {
    let program = Arc::new(LeasedProgram::new());
    cluster(
        |master| {
            let leased = Arc::clone(&program);
            let stopper = std::thread::spawn(move || {
                leased.with_child(|child| {
                    nix::sys::signal::kill(child, nix::sys::signal::SIGSTOP).ok()
                });
            });
            master.setup_master(settings_of_nobody().exec(program.path()));
            // Retry, because on a busy machine `fork` may time out before the thread has stopped
            // the child.
            while !stopper.is_finished() {
                assert_fork_gives_up(master);
            }
            stopper.join().unwrap();
            assert_next_fork_leaves_no_zombie(master);
        },
        |_| unreachable!("the worker executes another program"),
    );
}

fn fork_returns_when_a_child_of_another_user_is_stopped_on_old_kernels() {
    without_process_descriptors();
    fork_returns_when_a_child_of_another_user_is_stopped();
}

/// Starts a process that traces `child`. Returns `None` if the child has exited.
fn start_tracer(child: Pid) -> Option<Pid> {
    let (begun, tracer_begins) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    let ForkResult::Parent { child: tracer } = fork_of_the_host() else {
        let options = nix::sys::ptrace::Options::empty();
        if nix::sys::ptrace::seize(child, options).is_ok() {
            nix::unistd::write(&tracer_begins, b"!").unwrap();
        }
        drop(tracer_begins);
        loop {
            nix::unistd::pause();
        }
    };
    drop(tracer_begins);
    if File::from(begun).read(&mut [0]).unwrap() == 0 {
        end_child(tracer);
        return None;
    }
    Some(tracer)
}

/// Checks that the next `fork` reaps a child that exits slowly. The test attaches a tracer to the
/// child, because a traced child stays a zombie until its tracer exits. In practice, a child that
/// waits for a device can exit as slowly.
fn child_that_exits_slowly_is_reaped_before_the_next_fork() {
    let program = Arc::new(LeasedProgram::new());
    cluster(
        |master| {
            let leased = Arc::clone(&program);
            let tracer_thread = std::thread::spawn(move || {
                let attach = |child: Pid| {
                    // Stop the child first. On some kernels, a tracer would wait until the child has
                    // left `execve`, and would then find that the child has exited.
                    nix::sys::signal::kill(child, nix::sys::signal::SIGSTOP).ok()?;
                    wait_until("the child's stop or exit", || {
                        (!has_state(child.as_raw().unsigned_abs(), ") S ")).then_some(())
                    });
                    let tracer = start_tracer(child)?;
                    Some((child.as_raw().unsigned_abs(), tracer))
                };
                leased.with_child(attach)
            });
            master.setup_master(settings_of_nobody().exec(program.path()));
            while !tracer_thread.is_finished() {
                assert_fork_gives_up(master);
            }
            let (child, tracer) = tracer_thread.join().unwrap();
            wait_for_state(child, ") Z ");
            end_child(tracer);
            assert!(children().contains(&child));
            assert_next_fork_leaves_no_zombie(master);
        },
        |_| unreachable!("the worker executes another program"),
    );
}

fn fork_returns_when_a_child_without_exec_of_another_user_is_stopped() {
    with_env("CLUSTER_FAULT", "begin:stop:1", || {
        cluster(
            |master| {
                master.setup_master(settings_of_nobody().main(|_| panic!("the child is stopped")));
                assert_fork_gives_up(master);
                assert_next_fork_leaves_no_zombie(master);
            },
            |_| unreachable!("no program is executed"),
        );
    });
}

fn fork_returns_when_a_child_without_exec_of_another_user_is_stopped_on_old_kernels() {
    without_process_descriptors();
    fork_returns_when_a_child_without_exec_of_another_user_is_stopped();
}

fn failed_step_of_fork_is_named_and_leaves_no_process() {
    cluster(
        |master| {
            master.on_fork(|_, _| panic!("no worker was forked"));
            master.on_exit(|_, _, _| panic!("no worker was forked"));
            master.setup_master(settings_of_nobody());
            // Seccomp filters accumulate and cannot be removed, so the child fails at the first
            // refused step. Refuse the child's last step first. Each new filter then makes an
            // earlier step fail.
            let steps = [
                (libc::SYS_capset, libc::EPERM, "give up its capabilities"),
                (refused::SETRESUID, libc::EACCES, "change its user"),
                (refused::SETRESGID, libc::EDOM, "change its groups"),
                (refused::SETGROUPS, libc::ENOTSUP, "change its groups"),
            ];
            for (call, errno, expected) in steps {
                refuse_calls(&[call], errno);
                match try_patiently(|| master.fork()).unwrap_err() {
                    Error::Fork { step, reason, .. } => {
                        assert_eq!(step.to_string(), expected);
                        assert_eq!(reason.raw_os_error(), Some(errno));
                    }
                    error => panic!("{error}"),
                }
                assert!(master.workers().is_empty());
                let remaining = waitpid(None, Some(WaitPidFlag::__WALL));
                assert_eq!(remaining, Err(Errno::ECHILD), "no zombie is left");
            }
        },
        |_| unreachable!("no worker was forked"),
    );
}

/// Checks that the application learns why a worker does not end: the master may change the worker's
/// user, but has no CAP_KILL.
fn worker_that_cannot_be_signalled_is_an_error() {
    const END: &str = "END";
    if std::env::var_os(END).is_none() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
        let status = Command::new("setpriv")
            .args(["--inh-caps=-kill", "--bounding-set=-kill"])
            .arg(std::env::current_exe().unwrap())
            .env(END, directory.path().join("end"))
            .status()
            .unwrap();
        return assert!(status.success(), "{status}");
    }
    let log = Log::default();
    let entries = log.clone();
    let end = || std::path::PathBuf::from(std::env::var_os(END).unwrap());
    cluster(
        |master| {
            let errors = log.clone();
            master.on_error(move |_, worker, error| {
                errors.add(format!("{} {error}", worker.unwrap().id()));
                File::create(end()).unwrap();
            });
            master.on_exit(move |_, _, status| log.add(status.to_string()));
            master.on_online(|master, _| master.disconnect_within(Duration::ZERO));
            master.setup_master(settings_of_nobody());
            fork_patiently(|| master.fork());
        },
        |worker| {
            // Run until the master has failed to kill this worker.
            worker.set_interval(Duration::from_millis(1), move |_| {
                if end().exists() {
                    std::process::exit(0);
                }
            });
            worker.run().unwrap();
        },
    );
    let refused = "1 cannot send a signal to a worker: Operation not permitted (os error 1)";
    assert_eq!(entries.take(), [refused, "exit status: 0"]);
}

fn open(path: String) -> nix::Result<File> {
    File::open(path).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap()))
}

fn file_names(path: String) -> nix::Result<usize> {
    let names = std::fs::read_dir(path).map(Iterator::count);
    names.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap()))
}

/// Opens a process descriptor of another process, and returns its number.
fn process_descriptor(pid: Pid) -> libc::c_long {
    #[allow(unsafe_code)]
    // SAFETY: `pidfd_open` receives its arguments by value and accesses no memory of this process.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    Errno::result(fd).unwrap()
}

/// Tries to copy another process's descriptors and returns the results.
fn copies_of_descriptors(pid: Pid) -> Vec<(&'static str, nix::Result<libc::c_long>, Errno)> {
    let process = process_descriptor(pid);
    let copy = |number: libc::c_long| {
        #[allow(unsafe_code)]
        // SAFETY: `pidfd_getfd` receives its arguments by value and accesses no memory of this
        // process.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process, number, 0) };
        ("pidfd_getfd", Errno::result(fd), Errno::EPERM)
    };
    (0..64).map(copy).collect()
}

/// Tries to access another process in several ways. Returns the attempts that the kernel did not
/// refuse.
fn successful_accesses(pid: Pid) -> Vec<String> {
    let (denied, perm) = (Errno::EACCES, Errno::EPERM);
    let of = |name: &str| format!("/proc/{pid}/{name}");
    let files = ["fd/0", "fd/3", "mem", "environ", "maps"].map(|name| (of(name), name));
    let files = files.map(|(path, _)| ("a file of /proc", open(path).map(|_| ()), denied));
    let mut found = not_refused_of(files);
    found.extend(not_refused_of([("fd", file_names(of("fd")), denied)]));
    found.extend(not_refused_of([
        ("attach", nix::sys::ptrace::attach(pid), perm),
        (
            "seize",
            nix::sys::ptrace::seize(pid, nix::sys::ptrace::Options::empty()),
            perm,
        ),
        ("kill", nix::sys::signal::kill(pid, None), perm),
    ]));
    found.extend(not_refused_of(copies_of_descriptors(pid)));
    found
}

fn worker_of_another_user_cannot_access_the_master() {
    assert_all_refused(settings_of_nobody(), |_| successful_accesses(getppid()));
}

/// Checks that a worker cannot access a worker of another user. Each worker has its own user,
/// because the kernel allows more between processes of one user.
fn worker_cannot_access_a_worker_of_another_user() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_messages(master, &log);
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
            master.setup_master(settings_of_nobody());
            let target = fork_patiently(|| master.fork());
            target.on_online(|master, target| {
                master.setup_master(Settings::default().uid(1).gid(1));
                let pid = target.process().id().to_string();
                fork_patiently(|| master.fork_with([("TARGET", pid.as_str())]));
            });
            master.on_message(move |_, worker, _| {
                target.disconnect();
                worker.disconnect();
            });
        },
        |worker| {
            if let Ok(target) = std::env::var("TARGET") {
                let target = Pid::from_raw(target.parse().unwrap());
                let found = format!("{:?}", successful_accesses(target));
                let _ = worker.send(found.as_bytes()).unwrap();
            }
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["2 []"]);
}

/// Sockets that the application has opened in the master, so that workers may request them by
/// number.
struct HostSockets {
    tcp: TcpListener,
    unix: UnixListener,
    udp: UdpSocket,
    _directory: tempfile::TempDir,
}

impl HostSockets {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            tcp: TcpListener::bind("127.0.0.1:0").unwrap(),
            unix: UnixListener::bind(directory.path().join("socket")).unwrap(),
            udp: UdpSocket::bind("127.0.0.1:0").unwrap(),
            _directory: directory,
        }
    }

    fn descriptions(&self) -> BTreeSet<String> {
        let (tcp, unix, udp) = (&self.tcp, &self.unix, &self.udp);
        let numbers = [
            ("tcp", tcp.as_raw_fd()),
            ("unix", unix.as_raw_fd()),
            ("udp", udp.as_raw_fd()),
        ];
        numbers
            .map(|(kind, number)| format!("{kind} {number}"))
            .into()
    }
}

/// Requests the master's descriptors 0 to 63 by their numbers, each as every kind of socket.
/// Returns the kinds and numbers of the sockets that the worker receives.
fn request_all_numbers(worker: &Worker) -> String {
    let mut opened = BTreeSet::new();
    for number in 0..64 {
        let tcp = worker.listen(ListenOptions::fd(number)).map(drop);
        let unix = worker.listen(ListenOptions::unix_fd(number)).map(drop);
        let udp = worker.bind(BindOptions::fd(number)).map(drop);
        let kinds = [("tcp", tcp), ("unix", unix), ("udp", udp)];
        let open = kinds.into_iter().filter(|(_, result)| result.is_ok());
        opened.extend(open.map(|(kind, _)| format!("{kind} {number}")));
    }
    format!("{opened:?}")
}

/// Opens one socket of each kind through the master and keeps the sockets open.
fn open_all_kinds(worker: &Worker) {
    let directory = tempfile::tempdir().unwrap();
    let tcp = worker.listen("127.0.0.1:0").unwrap();
    let unix = worker
        .listen(directory.path().join("own").as_path())
        .unwrap();
    let udp = worker.bind("127.0.0.1:0").unwrap();
    tcp.set_connection_callback(|_, _| {});
    unix.set_connection_callback(|_, _| {});
    udp.set_message_callback(|_, _, _, _| {});
    let _ = worker.send(b"open").unwrap();
    worker.run().unwrap();
}

fn request_after_the_first_opened(master: &Master, log: &Log) {
    note_messages(master, log);
    master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
    let first = master.fork().unwrap();
    master.on_message(move |master, worker, _| {
        if *worker == first {
            master.setup_master(settings_of_nobody());
            master.fork_with([("ASKS", "1")]).unwrap();
        } else {
            first.disconnect();
        }
    });
}

fn worker_gets_only_sockets_of_the_host_by_number() {
    for_both_policies(|| {
        let host_sockets = cluster::is_master().then(HostSockets::new);
        let expected = host_sockets.as_ref().map(HostSockets::descriptions);
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| request_after_the_first_opened(master, &log),
            |worker| {
                if std::env::var_os("ASKS").is_none() {
                    return open_all_kinds(&worker);
                }
                let _ = worker
                    .send(request_all_numbers(&worker).as_bytes())
                    .unwrap();
            },
        );
        let expected = format!("2 {:?}", expected.unwrap());
        assert_eq!(entries.take(), ["1 open".to_owned(), expected]);
    });
}

/// Environment variable that marks a process with a worker's variables but without a master.
const NO_MASTER: &str = "STRANGER";

/// Returns the flags of the descriptor and of its open file description, or `None` if the
/// descriptor is not open.
fn flags(number: RawFd) -> Option<(i32, i32)> {
    let get = |arg| {
        #[allow(unsafe_code)]
        // SAFETY: F_GETFD and F_GETFL only read flags, and fail if the descriptor is not open.
        let flags = unsafe { libc::fcntl(number, arg) };
        (flags >= 0).then_some(flags)
    };
    Some((get(libc::F_GETFD)?, get(libc::F_GETFL)?))
}

/// Checks that `init` fails and changes no descriptor. Prints the error.
fn print_error_of_init() {
    let state = || (0..8).map(flags).collect::<Vec<_>>();
    let before = (state(), open_fds());
    // Request a signal at the parent's exit, as each worker does. Without this request, `init`
    // would treat the process as a master.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).unwrap();
    let error = cluster::init().unwrap_err();
    assert!(matches!(error, Error::Environment { .. }), "{error}");
    assert_eq!((state(), open_fds()), before);
    println!("{error}");
}

/// Runs a process that has a worker's variables but no master, with `input` as its standard input.
/// Returns the process's output.
fn run_without_master(
    id: Option<&str>,
    channel: Option<&str>,
    input: std::process::Stdio,
) -> String {
    // Set CLUSTER_WORKER_PID in the shell, because its value must be the id of the process that
    // calls `init`.
    let script = "CLUSTER_WORKER_PID=$$ exec \"$0\"";
    let mut command = Command::new("sh");
    command
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap());
    command.env(NO_MASTER, "1").stdin(input);
    command.envs(id.map(|id| ("CLUSTER_UNIQUE_ID", id)));
    command.envs(channel.map(|channel| ("CLUSTER_CHANNEL_FD", channel)));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn init_with_invalid_worker_variables_is_an_error() {
    if std::env::var_os(NO_MASTER).is_some() {
        return print_error_of_init();
    }
    let number = "a number set by a master";
    let channel = "the descriptor of a channel to a master";
    let (id, fd) = ("CLUSTER_UNIQUE_ID", "CLUSTER_CHANNEL_FD");
    let cases = [
        (Some("1"), None, fd, "", number),
        (None, Some("3"), id, "", number),
        (Some("one"), Some("3"), id, "one", number),
        (Some(""), Some("3"), id, "", number),
        (Some("-1"), Some("3"), id, "-1", number),
        (Some("4294967296"), Some("3"), id, "4294967296", number),
        (Some("1"), Some("three"), fd, "three", number),
        (Some("1"), Some("-1"), fd, "-1", number),
        (Some("1"), Some("0 "), fd, "0 ", number),
        (Some("1"), Some("99999999999"), fd, "99999999999", number),
        (Some("1"), Some("4294967295"), fd, "2147483647", channel),
        (Some("1"), Some("999"), fd, "999", channel),
        (Some("1"), Some("0"), fd, "0", channel),
        (Some("1"), Some("1"), fd, "1", channel),
        (Some("1"), Some("2"), fd, "2", channel),
    ];
    for (id, fd, variable, value, expected) in cases {
        let text = run_without_master(id, fd, std::process::Stdio::null());
        let expected =
            format!("environment variable {variable} is {value:?}, expected {expected}\n");
        assert_eq!(text, expected);
    }
}

/// Passes a descriptor of `kind` as the channel. Asserts that `init` refuses the descriptor and
/// does not change its flags.
fn assert_refused_as_a_channel(kind: &str, descriptor: impl Into<OwnedFd>) {
    let descriptor = descriptor.into();
    let before = fcntl(&descriptor, FcntlArg::F_GETFL).unwrap();
    let text = run_without_master(Some("1"), Some("0"), descriptor.try_clone().unwrap().into());
    let expected = "environment variable CLUSTER_CHANNEL_FD is \"0\", \
                    expected the descriptor of a channel to a master\n";
    assert_eq!(text, expected, "{kind}");
    let after = fcntl(&descriptor, FcntlArg::F_GETFL).unwrap();
    assert_eq!(before, after, "{kind}: the flags are unchanged");
}

/// Asserts that a read has failed because it would block. This shows that the peer is still open
/// and has written nothing.
fn assert_silence(error: std::io::Error) {
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
}

fn foreign_descriptor_is_refused_as_a_channel() {
    if std::env::var_os(NO_MASTER).is_some() {
        return print_error_of_init();
    }
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"as it was").unwrap();
    file.rewind().unwrap();
    assert_refused_as_a_channel("file", file.try_clone().unwrap());
    assert_eq!(file.stream_position().unwrap(), 0);
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "as it was");

    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
    let (mut other, _) = server.accept().unwrap();
    assert_refused_as_a_channel("TCP connection", client.try_clone().unwrap());
    assert_refused_as_a_channel("TCP listener", server);
    other.set_nonblocking(true).unwrap();
    assert_silence(other.read(&mut [0]).unwrap_err());
    drop(client);

    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    assert_refused_as_a_channel("pipe", writer.try_clone().unwrap());
    assert_silence(File::from(reader).read(&mut [0]).unwrap_err());
    drop(writer);
}

fn unix_socket_that_is_no_stream_is_refused_as_a_channel() {
    if std::env::var_os(NO_MASTER).is_some() {
        return print_error_of_init();
    }
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    assert_refused_as_a_channel("datagram socket", theirs.try_clone().unwrap());
    ours.set_nonblocking(true).unwrap();
    assert_silence(ours.recv(&mut [0]).unwrap_err());
    drop(theirs);

    let directory = tempfile::tempdir().unwrap();
    let server = UnixListener::bind(directory.path().join("server")).unwrap();
    assert_refused_as_a_channel("Unix listener", server);
}

/// Checks that `init` refuses a Unix stream socket whose peer is not a master.
fn foreign_stream_is_refused_as_a_channel() {
    if std::env::var_os(NO_MASTER).is_some() {
        return print_error_of_init();
    }
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    assert_refused_as_a_channel("Unix pair", theirs.try_clone().unwrap());
    ours.set_nonblocking(true).unwrap();
    assert_silence(ours.read(&mut [0]).unwrap_err());

    // `init` must leave the data of other protocols in the socket.
    let data = b"data that is no frame of the crate";
    ours.write_all(data).unwrap();
    assert_refused_as_a_channel("Unix pair with data", theirs.try_clone().unwrap());
    let mut received = [0; 34];
    let mut theirs = theirs;
    theirs.read_exact(&mut received).unwrap();
    assert_eq!(&received, data);

    let directory = tempfile::tempdir().unwrap();
    let server = UnixListener::bind(directory.path().join("server")).unwrap();
    let client = UnixStream::connect(directory.path().join("server")).unwrap();
    let (mut other, _) = server.accept().unwrap();
    assert_refused_as_a_channel("Unix connection", client.try_clone().unwrap());
    other.set_nonblocking(true).unwrap();
    assert_silence(other.read(&mut [0]).unwrap_err());
}
