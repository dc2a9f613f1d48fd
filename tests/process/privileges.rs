//! What a worker that has given up its user and group cannot do any more, and what becomes of
//! programs that call themselves workers.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::{BindOptions, Error, ListenOptions, Master, Settings, Worker};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Gid, Pid, Uid, getppid};

use crate::harness::{
    LeasedProgram, Log, NOBODY, OWN_PROGRAM, children, cluster, for_both_policies, is_alive,
    note_messages, open_fds, refuse_calls, wait_for_state, wait_until, with_env,
};
use crate::host::{end_child, fork_of_the_host, without_process_descriptors};

crate::scenarios! {
    nothing_of_root_is_left_and_nothing_comes_back: ROOT
    a_step_that_fails_is_named_and_nobody_is_forked: ROOT
    capabilities_that_outlive_the_user_are_given_up: SETPRIV
    a_worker_that_stays_root_keeps_its_capabilities: ROOT
    fork_returns_when_a_child_of_another_user_is_stopped: ROOT
    fork_returns_when_a_child_of_another_user_is_stopped_on_old_kernels: ROOT
    a_child_that_takes_long_to_end_is_reaped_before_the_next_fork: ROOT
    fork_returns_when_a_copy_of_another_user_is_stopped: ROOT_AND_FAULT_POINTS
    fork_returns_when_a_copy_of_another_user_is_stopped_on_old_kernels: ROOT_AND_FAULT_POINTS
    a_worker_of_another_user_cannot_reach_into_the_master: ROOT
    a_worker_cannot_reach_into_one_of_another_user: ROOT
    by_number_a_worker_gets_what_the_host_has_opened_and_nothing_else: ROOT
    strangers_with_our_variables_get_an_error
    a_strangers_descriptor_is_no_channel
    a_unix_socket_that_is_no_stream_is_no_channel
    a_strangers_stream_is_no_channel
}

fn nobodys() -> Settings {
    Settings::default()
        .exec(OWN_PROGRAM)
        .uid(NOBODY)
        .gid(NOBODY)
}

/// The fields of `/proc/self/status` that say what the process may do.
fn powers() -> Vec<String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let fields = [
        "Uid:", "Gid:", "Groups:", "CapInh:", "CapPrm:", "CapEff:", "CapAmb:",
    ];
    let told = |line: &&str| fields.iter().any(|field| line.starts_with(field));
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    status.lines().filter(told).map(words).collect()
}

type Attempts = fn(&Worker) -> Vec<String>;

fn report(worker: &Worker, attempts: Attempts) {
    let done = attempts(worker);
    worker.send(format!("{done:?}").as_bytes()).unwrap();
}

/// Plays a worker that reports what it should not have been able to do.
fn cluster_of_the_powerless(settings: Settings, attempts: Attempts) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_messages(master, &log);
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
            master.setup_master(settings);
            master.fork().unwrap();
        },
        |worker| report(&worker, attempts),
    );
    assert_eq!(entries.take(), ["1 []"]);
}

/// Those that did not fail with the errno that goes with them.
fn unless_refused<T: std::fmt::Debug>(
    attempts: impl IntoIterator<Item = (&'static str, nix::Result<T>, Errno)>,
) -> Vec<String> {
    let attempts = attempts.into_iter();
    let others = attempts.filter(|(_, result, errno)| result.as_ref().err() != Some(errno));
    others
        .map(|(what, result, _)| format!("{what}: {result:?}"))
        .collect()
}

fn nothing_of_root_is_left_and_nothing_comes_back() {
    if cluster::is_master() {
        nix::unistd::setgroups(&[Gid::from_raw(0), Gid::from_raw(1), Gid::from_raw(4)]).unwrap();
    }
    cluster_of_the_powerless(nobodys(), |_| {
        let user = "Uid: 65534 65534 65534 65534";
        let group = "Gid: 65534 65534 65534 65534";
        let none = "0000000000000000";
        let sets = ["Inh", "Prm", "Eff", "Amb"].map(|set| format!("Cap{set}: {none}"));
        let [inheritable, permitted, effective, ambient] = sets.each_ref();
        let sets = [inheritable, permitted, effective, ambient].map(String::as_str);
        let expected = [&[user, group, "Groups:"], &sets[..]].concat();
        assert_eq!(powers(), expected);

        let (user, group) = (Uid::from_raw(0), Gid::from_raw(0));
        let nobody = Uid::from_raw(NOBODY);
        let perm = Errno::EPERM;
        unless_refused([
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

/// A master that has capabilities which outlive a change of user, by either way of having them.
fn capabilities_that_outlive_the_user_are_given_up() {
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
        assert!(powers().contains(&"CapAmb: 00000000000000c0".to_owned()));
        nix::sys::prctl::set_keepcaps(how == "main that keeps").unwrap();
    }
    let attempts: Attempts = |_| {
        let is_empty = |set: &String| !set.starts_with("Cap") || set.ends_with(" 0000000000000000");
        let mut left: Vec<_> = powers().into_iter().filter(|set| !is_empty(set)).collect();
        let (user, group) = (Uid::from_raw(0), Gid::from_raw(0));
        left.extend(unless_refused([
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
        "exec" => nobodys(),
        _ => nobodys().main(main),
    };
    cluster_of_the_powerless(settings, attempts);
}

/// User 0 is root, and another group alone gives up no user.
fn a_worker_that_stays_root_keeps_its_capabilities() {
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
        let powers = powers();
        let mut sets = powers.into_iter().filter(|set| set.starts_with("CapEff"));
        sets.next().unwrap()
    };
    cluster(
        |master| {
            note_messages(master, &log);
            master.setup_master(settings);
            master.fork().unwrap();
        },
        |worker| worker.send(effective().as_bytes()).map(drop).unwrap(),
    );
    assert_eq!(entries.take(), [format!("1 {}", effective())]);
}

/// Forks a child of another user that is held up.
fn assert_fork_gives_up(master: &Master) {
    let begun = Instant::now();
    let error = master.fork().unwrap_err();
    let waited = begun.elapsed();
    println!("{error} after {waited:?}");
    // It ends at a second, but this process may have to wait for a processor.
    assert!(waited < Duration::from_secs(10), "{waited:?}");
    match error {
        Error::Fork {
            attempt, source, ..
        } => {
            assert_eq!(attempt, "wait until it starts");
            assert_eq!(source.kind(), std::io::ErrorKind::TimedOut);
        }
        error => panic!("{error}"),
    }
    assert!(master.workers().is_empty());
}

/// A child that was killed may need some time to end, be it for lack of a processor.
fn assert_next_fork_leaves_no_zombie(master: &Master) {
    wait_until("the end of the child", || {
        (!children().into_iter().any(is_alive)).then_some(())
    });
    master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
    master.setup_master(Settings::default().exec("/bin/true"));
    let next = master.fork().unwrap();
    assert_eq!(children(), [next.process().id()]);
}

/// The other user has nothing but the permission to signal it.
fn fork_returns_when_a_child_of_another_user_is_stopped() {
    let program = Arc::new(LeasedProgram::new());
    cluster(
        |master| {
            let leased = Arc::clone(&program);
            let stopping = std::thread::spawn(move || {
                let child = leased.wait_for_child();
                nix::sys::signal::kill(child, nix::sys::signal::SIGSTOP).unwrap();
            });
            master.setup_master(nobodys().exec(program.path()));
            // On a busy machine a child may need too much time to be held up at all.
            while !stopping.is_finished() {
                assert_fork_gives_up(master);
            }
            stopping.join().unwrap();
            assert_next_fork_leaves_no_zombie(master);
        },
        |_| unreachable!("it executes another program"),
    );
}

fn fork_returns_when_a_child_of_another_user_is_stopped_on_old_kernels() {
    without_process_descriptors();
    fork_returns_when_a_child_of_another_user_is_stopped();
}

/// Another process traces the child, which keeps it from being reaped, as waiting for a device would.
fn a_child_that_takes_long_to_end_is_reaped_before_the_next_fork() {
    let program = Arc::new(LeasedProgram::new());
    cluster(
        |master| {
            let leased = Arc::clone(&program);
            let tracing = std::thread::spawn(move || {
                let child = leased.wait_for_child();
                let (begun, tracer_begins) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
                let ForkResult::Parent { child: tracer } = fork_of_the_host() else {
                    nix::sys::ptrace::seize(child, nix::sys::ptrace::Options::empty()).unwrap();
                    nix::unistd::write(&tracer_begins, b"!").unwrap();
                    loop {
                        nix::unistd::pause();
                    }
                };
                File::from(begun).read_exact(&mut [0]).unwrap();
                (child.as_raw().unsigned_abs(), tracer)
            });
            master.setup_master(nobodys().exec(program.path()));
            while !tracing.is_finished() {
                assert_fork_gives_up(master);
            }
            let (child, tracer) = tracing.join().unwrap();
            wait_for_state(child, ") Z ");
            end_child(tracer);
            assert!(children().contains(&child));
            assert_next_fork_leaves_no_zombie(master);
        },
        |_| unreachable!("it executes another program"),
    );
}

fn fork_returns_when_a_copy_of_another_user_is_stopped() {
    with_env("CLUSTER_FAULT", "begin:stop:1", || {
        cluster(
            |master| {
                master.setup_master(nobodys().main(|_| panic!("it is stopped")));
                assert_fork_gives_up(master);
                assert_next_fork_leaves_no_zombie(master);
            },
            |_| unreachable!("nothing is executed"),
        );
    });
}

fn fork_returns_when_a_copy_of_another_user_is_stopped_on_old_kernels() {
    without_process_descriptors();
    fork_returns_when_a_copy_of_another_user_is_stopped();
}

fn a_step_that_fails_is_named_and_nobody_is_forked() {
    cluster(
        |master| {
            master.on_fork(|_, _| panic!("nothing was forked"));
            master.on_exit(|_, _, _| panic!("nothing was forked"));
            master.setup_master(nobodys());
            // A filter stays: the earlier step comes later.
            let steps = [
                (libc::SYS_capset, libc::EPERM, "give up its capabilities"),
                (libc::SYS_setresuid, libc::EACCES, "change its user"),
                (libc::SYS_setresgid, libc::EDOM, "change its groups"),
                (libc::SYS_setgroups, libc::ENOTSUP, "change its groups"),
            ];
            for (call, errno, step) in steps {
                refuse_calls(&[call], errno);
                match master.fork().unwrap_err() {
                    Error::Fork {
                        attempt, source, ..
                    } => {
                        assert_eq!(attempt, step);
                        assert_eq!(source.raw_os_error(), Some(errno));
                    }
                    error => panic!("{error}"),
                }
                assert!(master.workers().is_empty());
                let nobody = waitpid(None, Some(WaitPidFlag::__WALL));
                assert_eq!(nobody, Err(Errno::ECHILD), "and not even a zombie");
            }
        },
        |_| unreachable!("nothing was forked"),
    );
}

fn open(path: String) -> nix::Result<File> {
    File::open(path).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap()))
}

fn file_names(path: String) -> nix::Result<usize> {
    let names = std::fs::read_dir(path).map(Iterator::count);
    names.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap()))
}

/// A descriptor by which the kernel knows another process.
fn process_descriptor(pid: Pid) -> libc::c_long {
    #[allow(unsafe_code)]
    // SAFETY: the call takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    Errno::result(fd).unwrap()
}

/// Copies of another process's descriptors.
fn copies_of_descriptors(pid: Pid) -> Vec<(&'static str, nix::Result<libc::c_long>, Errno)> {
    let process = process_descriptor(pid);
    let copy = |number: libc::c_long| {
        #[allow(unsafe_code)]
        // SAFETY: the call takes three integers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process, number, 0) };
        ("pidfd_getfd", Errno::result(fd), Errno::EPERM)
    };
    (0..64).map(copy).collect()
}

/// All the ways into another process, each of which must be closed.
fn ways_into(pid: Pid) -> Vec<String> {
    let (denied, perm) = (Errno::EACCES, Errno::EPERM);
    let of = |name: &str| format!("/proc/{pid}/{name}");
    let files = ["fd/0", "fd/3", "mem", "environ", "maps"].map(|name| (of(name), name));
    let files = files.map(|(path, _)| ("a file of /proc", open(path).map(|_| ()), denied));
    let mut found = unless_refused(files);
    found.extend(unless_refused([("fd", file_names(of("fd")), denied)]));
    found.extend(unless_refused([
        ("attach", nix::sys::ptrace::attach(pid), perm),
        (
            "seize",
            nix::sys::ptrace::seize(pid, nix::sys::ptrace::Options::empty()),
            perm,
        ),
        ("kill", nix::sys::signal::kill(pid, None), perm),
    ]));
    found.extend(unless_refused(copies_of_descriptors(pid)));
    found
}

fn a_worker_of_another_user_cannot_reach_into_the_master() {
    cluster_of_the_powerless(nobodys(), |_| ways_into(getppid()));
}

/// One user for each of them: what the kernel allows among processes of the same user, nobody can
/// forbid.
fn a_worker_cannot_reach_into_one_of_another_user() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_messages(master, &log);
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
            master.setup_master(nobodys());
            let victim = master.fork().unwrap();
            victim.on_online(|master, victim| {
                master.setup_master(Settings::default().uid(1).gid(1));
                let pid = victim.process().id().to_string();
                master.fork_with([("VICTIM", pid)]).unwrap();
            });
            master.on_message(move |_, worker, _| {
                victim.disconnect();
                worker.disconnect();
            });
        },
        |worker| {
            if let Ok(victim) = std::env::var("VICTIM") {
                let victim = Pid::from_raw(victim.parse().unwrap());
                let found = format!("{:?}", ways_into(victim));
                worker.send(found.as_bytes()).unwrap();
            }
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["2 []"]);
}

/// What the host's program has opened, and may be asked for.
struct Lent {
    tcp: TcpListener,
    unix: UnixListener,
    udp: UdpSocket,
    _home: tempfile::TempDir,
}

impl Lent {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        Self {
            tcp: TcpListener::bind("127.0.0.1:0").unwrap(),
            unix: UnixListener::bind(home.path().join("lent")).unwrap(),
            udp: UdpSocket::bind("127.0.0.1:0").unwrap(),
            _home: home,
        }
    }

    fn by_number(&self) -> BTreeSet<String> {
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

/// Whatever a worker gets when it asks for all numbers that the master may have.
fn had_by_number(worker: &Worker) -> String {
    let mut had = BTreeSet::new();
    for number in 0..64 {
        let tcp = worker.listen(ListenOptions::fd(number)).map(drop);
        let unix = worker.listen(ListenOptions::unix_fd(number)).map(drop);
        let udp = worker.bind(BindOptions::fd(number)).map(drop);
        let kinds = [("tcp", tcp), ("unix", unix), ("udp", udp)];
        let open = kinds.into_iter().filter(|(_, result)| result.is_ok());
        had.extend(open.map(|(kind, _)| format!("{kind} {number}")));
    }
    format!("{had:?}")
}

/// Opens one of each kind with the master's help, and keeps it.
fn open_all_kinds(worker: &Worker) {
    let home = tempfile::tempdir().unwrap();
    let tcp = worker.listen("127.0.0.1:0").unwrap();
    let unix = worker.listen(home.path().join("own").as_path()).unwrap();
    let udp = worker.bind("127.0.0.1:0").unwrap();
    tcp.on_connection(|_, _| {});
    unix.on_connection(|_, _| {});
    udp.on_message(|_, _, _, _| {});
    worker.send(b"open").unwrap();
    worker.run().unwrap();
}

fn ask_when_the_first_is_ready(master: &Master, log: &Log) {
    note_messages(master, log);
    master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
    let first = master.fork().unwrap();
    master.on_message(move |master, worker, _| {
        if *worker == first {
            master.setup_master(nobodys());
            master.fork_with([("ASKS", "1")]).unwrap();
        } else {
            first.disconnect();
        }
    });
}

fn by_number_a_worker_gets_what_the_host_has_opened_and_nothing_else() {
    for_both_policies(|| {
        let lent = cluster::is_master().then(Lent::new);
        let expected = lent.as_ref().map(Lent::by_number);
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| ask_when_the_first_is_ready(master, &log),
            |worker| {
                if std::env::var_os("ASKS").is_none() {
                    return open_all_kinds(&worker);
                }
                worker.send(had_by_number(&worker).as_bytes()).unwrap();
            },
        );
        let expected = format!("2 {:?}", expected.unwrap());
        assert_eq!(entries.take(), ["1 open".to_owned(), expected]);
    });
}

/// Set for a process that has our variables and no master.
const STRANGER: &str = "STRANGER";

/// A descriptor as its owner left it: its flags, and what belongs to all copies.
fn flags(number: RawFd) -> Option<(i32, i32)> {
    let get = |arg| {
        #[allow(unsafe_code)]
        // SAFETY: these commands only read the flags, whatever the number is.
        let flags = unsafe { libc::fcntl(number, arg) };
        (flags >= 0).then_some(flags)
    };
    Some((get(libc::F_GETFD)?, get(libc::F_GETFL)?))
}

/// Prints the error of `init`, which must have left everything as it was.
fn be_a_stranger() {
    let state = || (0..8).map(flags).collect::<Vec<_>>();
    let before = (state(), open_fds());
    let error = cluster::init().unwrap_err();
    assert!(matches!(error, Error::Environment { .. }), "{error}");
    assert_eq!((state(), open_fds()), before);
    println!("{error}");
}

/// What a stranger hears whose standard input is `input`.
fn stranger(id: Option<&str>, channel: Option<&str>, input: std::process::Stdio) -> String {
    // The variables are for the process that has this number.
    let script = "CLUSTER_WORKER_PID=$$ exec \"$0\"";
    let mut command = Command::new("sh");
    command
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap());
    command.env(STRANGER, "1").stdin(input);
    command.envs(id.map(|id| ("CLUSTER_UNIQUE_ID", id)));
    command.envs(channel.map(|channel| ("CLUSTER_CHANNEL_FD", channel)));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn strangers_with_our_variables_get_an_error() {
    if std::env::var_os(STRANGER).is_some() {
        return be_a_stranger();
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
        let text = stranger(id, fd, std::process::Stdio::null());
        let expected =
            format!("environment variable {variable} is {value:?}, expected {expected}\n");
        assert_eq!(text, expected);
    }
}

/// The number is that of a descriptor of `kind`, whose other side looks at it afterwards.
fn refused_as_a_channel(kind: &str, descriptor: impl Into<OwnedFd>) {
    let descriptor = descriptor.into();
    let before = fcntl(&descriptor, FcntlArg::F_GETFL).unwrap();
    let text = stranger(Some("1"), Some("0"), descriptor.try_clone().unwrap().into());
    let expected = "environment variable CLUSTER_CHANNEL_FD is \"0\", \
                    expected the descriptor of a channel to a master\n";
    assert_eq!(text, expected, "{kind}");
    let after = fcntl(&descriptor, FcntlArg::F_GETFL).unwrap();
    assert_eq!(before, after, "{kind}: it blocks as before");
}

/// Nothing has been written, and the other side is still there.
fn assert_silence(error: std::io::Error) {
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
}

fn a_strangers_descriptor_is_no_channel() {
    if std::env::var_os(STRANGER).is_some() {
        return be_a_stranger();
    }
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"as it was").unwrap();
    file.rewind().unwrap();
    refused_as_a_channel("file", file.try_clone().unwrap());
    assert_eq!(file.stream_position().unwrap(), 0);
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "as it was");

    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
    let (mut other, _) = server.accept().unwrap();
    refused_as_a_channel("TCP connection", client.try_clone().unwrap());
    refused_as_a_channel("TCP listener", server);
    other.set_nonblocking(true).unwrap();
    assert_silence(other.read(&mut [0]).unwrap_err());
    drop(client);

    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    refused_as_a_channel("pipe", writer.try_clone().unwrap());
    assert_silence(File::from(reader).read(&mut [0]).unwrap_err());
    drop(writer);
}

fn a_unix_socket_that_is_no_stream_is_no_channel() {
    if std::env::var_os(STRANGER).is_some() {
        return be_a_stranger();
    }
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    refused_as_a_channel("datagram socket", theirs.try_clone().unwrap());
    ours.set_nonblocking(true).unwrap();
    assert_silence(ours.recv(&mut [0]).unwrap_err());
    drop(theirs);

    let home = tempfile::tempdir().unwrap();
    let server = UnixListener::bind(home.path().join("server")).unwrap();
    refused_as_a_channel("Unix listener", server);
}

/// It is all that a channel is, but for what is at its other end.
fn a_strangers_stream_is_no_channel() {
    if std::env::var_os(STRANGER).is_some() {
        return be_a_stranger();
    }
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    refused_as_a_channel("Unix pair", theirs.try_clone().unwrap());
    ours.set_nonblocking(true).unwrap();
    assert_silence(ours.read(&mut [0]).unwrap_err());

    // What is said there is not for us, and stays.
    let words = b"what a stranger says to a stranger";
    ours.write_all(words).unwrap();
    refused_as_a_channel("Unix pair with words", theirs.try_clone().unwrap());
    let mut heard = [0; 34];
    let mut theirs = theirs;
    theirs.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, words);

    let home = tempfile::tempdir().unwrap();
    let server = UnixListener::bind(home.path().join("server")).unwrap();
    let client = UnixStream::connect(home.path().join("server")).unwrap();
    let (mut other, _) = server.accept().unwrap();
    refused_as_a_channel("Unix connection", client.try_clone().unwrap());
    other.set_nonblocking(true).unwrap();
    assert_silence(other.read(&mut [0]).unwrap_err());
}
