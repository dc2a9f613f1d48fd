//! Tests of socket activation and notifications, between systemd and the master, and between the
//! master and workers that do not use this crate.
//!
//! The tests run the real `systemd-socket-activate` and `systemd-notify`. The foreign workers are
//! written in Python or use the `sd_notify` crate.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram, UnixListener, UnixStream};
use std::process::{Child, Command, Output, Stdio as StandardStream};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cluster::systemd::{self, ListenFd};
use cluster::{Error, Interest, ListenOptions, Master, Settings, Signal, Stdio};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::kill;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use crate::harness::{
    Log, NOBODY, OWN_PROGRAM, SCENARIO, SIGNALS, cluster, fork_patiently, in_background,
    is_watched, note_messages, reserve_port, talk, wait_until, watched,
};

crate::scenarios! {
    socket_activated_service_serves: SYSTEMD
    clients_wait_for_the_next_start_of_a_service
    listen_fds_rejects_descriptors_that_were_not_passed
    worker_receives_named_descriptors
    conversion_checks_the_kind_of_a_descriptor
    conflicting_descriptors_are_an_error_of_fork
    systemd_receives_notifications
    invalid_notify_socket_is_an_error
    notification_does_not_block_on_a_full_socket
    workers_do_not_inherit_systemd_variables
    worker_notifies_readiness_itself: SYSTEMD
    foreign_workers_share_a_port
    foreign_workers_of_another_user_share_a_port: ROOT
    foreign_workers_in_python_share_a_port: PYTHON
}

/// Runs a service with two workers until SIGTERM arrives.
fn serve() {
    const NAME: &str = "LISTENER_FD";
    SIGNALS.store(true, Ordering::SeqCst);
    let passed = systemd::listen_fds().unwrap();
    cluster(
        |master| {
            assert_eq!(passed.len(), 1);
            assert_eq!(passed[0].name(), Some("web"));
            assert_close_on_exec(&passed[0]);
            let end = |master: &Master, _| master.disconnect();
            master.on_signal(Signal::TERM, end).unwrap();
            let number = passed[0].as_fd().as_raw_fd().to_string();
            for _ in 0..2 {
                master.fork_with([(NAME, &number)]).unwrap();
            }
        },
        |worker| {
            assert!(systemd::listen_fds().unwrap().is_empty());
            let number = std::env::var(NAME).unwrap().parse().unwrap();
            let listener = worker.listen(ListenOptions::fd(number)).unwrap();
            for connection in listener.incoming() {
                let id = worker.id().to_string();
                connection.unwrap().write_all(id.as_bytes()).unwrap();
            }
        },
    );
    TcpListener::try_from(passed.into_iter().next().unwrap()).unwrap();
}

/// Sends requests until both workers have answered, and then stops the service.
fn ask_and_end(service: &mut Child, address: SocketAddr) {
    let mut served = BTreeSet::new();
    wait_until("both workers", || {
        served.extend(talk(address, b"").ok());
        assert!(
            matches!(service.try_wait(), Ok(None)),
            "the service has exited"
        );
        (served.len() >= 2).then_some(())
    });
    assert!(served.iter().eq(["1", "2"]), "{served:?}");
    let number = Pid::from_raw(i32::try_from(service.id()).unwrap());
    kill(number, nix::sys::signal::Signal::SIGTERM).unwrap();
    let status = service.wait().unwrap();
    assert!(status.success(), "{status}");
}

const POLICIES: [&str; 3] = ["rr", "none", "sharded"];

/// Checks that the first client makes systemd-socket-activate start the master, which serves the
/// client.
fn socket_activated_service_serves() {
    if is_watched() {
        return serve();
    }
    for policy in POLICIES {
        let (_reserved, address) = reserve_port();
        let service = watched();
        let mut command = Command::new("systemd-socket-activate");
        command
            .arg(format!("--listen={address}"))
            .arg("--fdname=web");
        command.arg(format!("--setenv=CLUSTER_SCHED_POLICY={policy}"));
        for name in [SCENARIO, "TMPDIR"] {
            let value = std::env::var(name).unwrap();
            command.arg(format!("--setenv={name}={value}"));
        }
        for (name, value) in variables(&service) {
            let (name, value) = (name.to_str().unwrap(), value.to_str().unwrap());
            command.arg(format!("--setenv={name}={value}"));
        }
        let mut service = command.arg(service.get_program()).spawn().unwrap();
        ask_and_end(&mut service, address);
    }
}

/// Checks that clients that connect while the service is stopped wait for its next start.
fn clients_wait_for_the_next_start_of_a_service() {
    if is_watched() {
        return serve();
    }
    for policy in POLICIES {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let start = || {
            let arrange = "LISTEN_FDS=1; LISTEN_FDNAMES=web; exec 3<&0 4<&- </dev/null";
            let mut command = passing(arrange);
            command.env("CLUSTER_SCHED_POLICY", policy);
            command.stdin(OwnedFd::from(listener.try_clone().unwrap()));
            command.spawn().unwrap()
        };
        ask_and_end(&mut start(), address);
        let early = std::thread::spawn(move || talk(address, b"").unwrap());
        // The next start serves the client, even if the client connects only now.
        let mut next = start();
        assert!(["1", "2"].contains(&early.join().unwrap().as_str()));
        ask_and_end(&mut next, address);
    }
}

/// Returns the environment variables that the command sets.
fn variables(command: &Command) -> impl Iterator<Item = (&OsStr, &OsStr)> {
    let variables = command.get_envs();
    variables.filter_map(|(name, value)| Some((name, value?)))
}

/// Returns a command that runs this scenario in a shell. Before that, the shell runs the commands
/// in `arrange`, which set up descriptors and variables.
fn passing(arrange: &str) -> Command {
    let script = format!(
        "unset LISTEN_FDS LISTEN_FDNAMES LISTEN_PIDFDID
         LISTEN_PID=$$
         exec 3</dev/null 4</dev/null 5<&-
         {arrange}
         export LISTEN_PID LISTEN_FDS LISTEN_FDNAMES LISTEN_PIDFDID
         exec \"$0\""
    );
    let own = watched();
    let mut command = Command::new("sh");
    command.args(["-c", &script]).arg(own.get_program());
    command.envs(variables(&own));
    command
}

#[track_caller]
fn assert_close_on_exec(fd: &impl std::os::fd::AsFd) {
    let flags = fcntl(fd, FcntlArg::F_GETFD).unwrap();
    assert_eq!(flags, FdFlag::FD_CLOEXEC.bits());
}

/// Environment variable with the path of a file that the process opens before it calls
/// `listen_fds`.
const FILE: &str = "OWN_FILE";

/// Calls `listen_fds`, and prints the result for the parent process.
fn print_passed() {
    let own = std::env::var_os(FILE).map(|file| File::open(file).unwrap());
    let names: Vec<_> = [
        "LISTEN_PID",
        "LISTEN_FDS",
        "LISTEN_FDNAMES",
        "LISTEN_PIDFDID",
    ]
    .into();
    let values = || names.iter().map(std::env::var_os).collect::<Vec<_>>();
    let before = values();
    let passed = systemd::listen_fds();
    assert_eq!(values(), before);
    assert!(
        systemd::listen_fds().unwrap().is_empty(),
        "the second call returned descriptors"
    );
    match passed {
        Ok(passed) => {
            passed.iter().for_each(assert_close_on_exec);
            let numbers = passed.iter().map(|fd| fd.as_fd().as_raw_fd());
            let names = passed.iter().map(ListenFd::name);
            println!("{:?}", numbers.zip(names).collect::<Vec<_>>());
        }
        Err(Error::Environment { variable, .. }) => println!("{variable}"),
        Err(other) => println!("{other}"),
    }
    if let Some(own) = own {
        assert!(own.metadata().is_ok(), "the process's own file was closed");
    }
}

fn listen_fds_rejects_descriptors_that_were_not_passed() {
    if is_watched() {
        return print_passed();
    }
    let cases = [
        ("LISTEN_FDS=2", r"[(3, None), (4, None)]"),
        (
            "LISTEN_FDS=2; LISTEN_FDNAMES=a:b; LISTEN_PIDFDID=7",
            r#"[(3, Some("a")), (4, Some("b"))]"#,
        ),
        ("LISTEN_FDS=0", "[]"),
        ("LISTEN_PID=1; LISTEN_FDS=2", "[]"),
        ("unset LISTEN_PID; LISTEN_FDS=2", "[]"),
        (":", "[]"),
        ("LISTEN_PID=me; LISTEN_FDS=2", "LISTEN_PID"),
        ("LISTEN_FDS=two", "LISTEN_FDS"),
        ("LISTEN_FDS=-1", "LISTEN_FDS"),
        ("LISTEN_FDS=$(printf '\\377')", "LISTEN_FDS"),
        // `LISTEN_FDS` includes a descriptor that is not open.
        ("LISTEN_FDS=1000000", "LISTEN_FDS"),
        ("LISTEN_FDS=65535", "LISTEN_FDS"),
        ("LISTEN_FDS=3", "LISTEN_FDS"),
        ("LISTEN_FDS=2; exec 3<&-", "LISTEN_FDS"),
        // The process opens descriptor 4 itself, so the descriptor was not passed.
        (
            "LISTEN_FDS=2; exec 4<&-; export OWN_FILE=/dev/null",
            "LISTEN_FDS",
        ),
        ("LISTEN_FDS=2; LISTEN_FDNAMES=a", "LISTEN_FDNAMES"),
        ("LISTEN_FDS=2; LISTEN_FDNAMES=a:b:c", "LISTEN_FDNAMES"),
        ("LISTEN_FDS=2; LISTEN_FDNAMES=", "LISTEN_FDNAMES"),
    ];
    for (arrange, expected) in cases {
        assert_eq!(output_of(&mut passing(arrange)), expected, "{arrange}");
    }
}

/// Returns the command's output, and asserts that the command succeeds.
#[track_caller]
fn output_of(command: &mut Command) -> String {
    let Output { status, stdout, .. } = command.stderr(StandardStream::inherit()).output().unwrap();
    assert!(status.success(), "{status}");
    String::from_utf8(stdout).unwrap().trim_end().to_owned()
}

fn worker_receives_named_descriptors() {
    let passed = systemd::listen_fds().unwrap();
    assert_eq!(passed.is_empty(), cluster::is_master());
    let log = Log::default();
    let entries = log.clone();
    let expected = Rc::new(RefCell::new(String::new()));
    let addresses = Rc::clone(&expected);
    cluster(
        |master| {
            note_messages(master, &log);
            let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
            let unix = UnixListener::bind_addr(&abstract_address("unix")).unwrap();
            let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
            let (port, other) = (tcp.local_addr().unwrap(), udp.local_addr().unwrap());
            addresses.replace(format!("{port} {other}"));
            let fds: [(&str, OwnedFd); 3] = [
                ("tcp", tcp.into()),
                ("unix", unix.into()),
                ("the udp one", udp.into()),
            ];
            master.setup_master(Settings::default().listen_fds(fds));
            master.on_exit(|master, worker, status| {
                assert!(status.success(), "{status}");
                if worker.id().get() == 1 {
                    master.setup_master(Settings::default().silent(true));
                    let silent = master.fork().unwrap();
                    assert!(silent.process().take_stdio(3).is_none());
                }
            });
            // Set a wrong value, which the crate must replace.
            master.fork_with([("LISTEN_PID", "1")]).unwrap();
        },
        |worker| {
            let numbers = passed.iter().map(|fd| fd.as_fd().as_raw_fd());
            assert!(numbers.eq([3, 4, 5]));
            let names = passed.iter().filter_map(ListenFd::name);
            assert!(names.eq(["tcp", "unix", "the udp one"]));
            let [tcp, unix, udp] = passed.try_into().unwrap();
            let tcp = TcpListener::try_from(tcp).unwrap().local_addr().unwrap();
            let udp = UdpSocket::try_from(udp).unwrap().local_addr().unwrap();
            UnixListener::try_from(unix).unwrap();
            let _ = worker.send(format!("{tcp} {udp}").as_bytes()).unwrap();
        },
    );
    let expected = expected.take();
    let expected = [1, 2].map(|worker| format!("{worker} {expected}"));
    assert_eq!(entries.take(), expected);
}

fn conversion_checks_the_kind_of_a_descriptor() {
    let passed = systemd::listen_fds().unwrap();
    cluster(
        |master| {
            let tcp = || TcpListener::bind("127.0.0.1:0").unwrap().into();
            let udp = || UdpSocket::bind("127.0.0.1:0").unwrap().into();
            let fds: [(&str, OwnedFd); 6] = [
                ("idle", reserve_port().0),
                ("tcp", tcp()),
                ("udp", udp()),
                ("pair", UnixStream::pair().unwrap().0.into()),
                ("datagrams", UnixDatagram::unbound().unwrap().into()),
                ("file", File::open("/dev/null").unwrap().into()),
            ];
            master.setup_master(Settings::default().listen_fds(fds));
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
            master.fork().unwrap();
        },
        |_| {
            let [idle, tcp, udp, pair, datagrams, file] = passed.try_into().unwrap();
            let is = |result: Result<(), Error>, expected: &str| {
                assert_eq!(result.unwrap_err().to_string(), expected);
            };
            is(
                TcpListener::try_from(idle).map(drop),
                "descriptor 3 (\"idle\") is a TCP socket that does not listen, \
                 expected a TCP listener",
            );
            is(
                UdpSocket::try_from(tcp).map(drop),
                "descriptor 4 (\"tcp\") is a TCP listener, expected a UDP socket",
            );
            is(
                TcpListener::try_from(udp).map(drop),
                "descriptor 5 (\"udp\") is a UDP socket, expected a TCP listener",
            );
            is(
                UnixListener::try_from(pair).map(drop),
                "descriptor 6 (\"pair\") is a Unix stream socket that does not listen, \
                 expected a Unix listener",
            );
            is(
                UdpSocket::try_from(datagrams).map(drop),
                "descriptor 7 (\"datagrams\") is a Unix datagram socket, expected a UDP socket",
            );
            is(
                TcpListener::try_from(file).map(drop),
                "descriptor 8 (\"file\") is neither a stream nor a datagram socket, \
                 expected a TCP listener",
            );
        },
    );
}

fn conflicting_descriptors_are_an_error_of_fork() {
    cluster(
        |master| {
            let null = || File::open("/dev/null").unwrap();
            let four = || std::iter::repeat_n(Stdio::inherit(), 4);
            let invalid_name = Settings::default().listen_fds([("a:b", null())]);
            let both = Settings::default()
                .listen_fds([("a", null())])
                .stdio(four());
            for (settings, reason) in [
                (invalid_name, "\"a:b\" is not a valid name of a descriptor"),
                (both, "descriptor 3 is in stdio and in listen_fds"),
            ] {
                master.setup_master(settings);
                let error = master.fork().unwrap_err().to_string();
                let expected = format!("cannot prepare its descriptors: {reason}");
                assert!(error.ends_with(&expected), "{error}");
            }
            let none: [(&str, File); 0] = [];
            master.setup_master(Settings::default().listen_fds(none));
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
            master.fork().unwrap();
        },
        |_| assert!(std::env::var_os("LISTEN_FDS").is_none()),
    );
}

/// Returns all datagrams that wait at the socket.
fn received(socket: &UnixDatagram) -> Vec<String> {
    socket.set_nonblocking(true).unwrap();
    let mut buffer = [0; 4096];
    let next = || {
        socket
            .recv(&mut buffer)
            .map(|length| buffer[..length].to_vec())
    };
    let received = std::iter::repeat_with(next).map_while(Result::ok);
    received
        .map(|text| String::from_utf8(text).unwrap())
        .collect()
}

/// Returns an abstract socket address that no other test uses.
fn abstract_address(name: &str) -> UnixAddr {
    let name = format!("cluster-test-{}-{name}", std::process::id());
    UnixAddr::from_abstract_name(name).unwrap()
}

fn monotonic_time() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap().into()
}

fn systemd_receives_notifications() {
    if is_watched() {
        let sent = [
            systemd::notify("READY=1\nMAINPID=7"),
            systemd::status("serves\nSTOPPING=1"),
            systemd::reloading(),
        ];
        assert!(sent.into_iter().all(Result::unwrap));
        return;
    }
    assert!(
        !systemd::notify("READY=1").unwrap(),
        "sent without NOTIFY_SOCKET"
    );
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let abstract_name = abstract_address("notify");
    let name = std::str::from_utf8(abstract_name.as_abstract_name().unwrap()).unwrap();
    for (socket, address) in [
        (
            UnixDatagram::bind(&path).unwrap(),
            path.to_str().unwrap().to_owned(),
        ),
        (
            UnixDatagram::bind_addr(&abstract_name).unwrap(),
            format!("@{name}"),
        ),
    ] {
        let before = monotonic_time();
        output_of(watched().env("NOTIFY_SOCKET", &address));
        let after = monotonic_time();
        let [ready, status, reloading] = received(&socket).try_into().unwrap();
        assert_eq!(ready, "READY=1\nMAINPID=7");
        assert_eq!(status, "STATUS=serves STOPPING=1");
        let time = reloading
            .strip_prefix("RELOADING=1\nMONOTONIC_USEC=")
            .unwrap();
        let time = Duration::from_micros(time.parse().unwrap());
        let micro = Duration::from_micros(1);
        assert!((before..=after).contains(&(time + micro)), "{time:?}");
    }
}

fn invalid_notify_socket_is_an_error() {
    if is_watched() {
        return println!("{}", systemd::notify("READY=1").unwrap_err());
    }
    let directory = tempfile::tempdir().unwrap();
    let stale = directory.path().join("stale");
    drop(UnixDatagram::bind(&stale).unwrap());
    let missing = directory.path().join("missing");
    for address in [
        stale.to_str().unwrap(),
        missing.to_str().unwrap(),
        "@unbound",
        &format!("/{}", "x".repeat(200)),
        &format!("@{}", "x".repeat(200)),
    ] {
        let error = output_of(watched().env("NOTIFY_SOCKET", address));
        let expected = "cannot send to NOTIFY_SOCKET: ";
        assert!(error.starts_with(expected), "{address}: {error}");
    }
    for address in ["", "@", "notify", "vsock:2:1234"] {
        let error = output_of(watched().env("NOTIFY_SOCKET", address));
        let expected = format!(
            "environment variable NOTIFY_SOCKET is {address:?}, \
             expected an absolute path or a name after @ (vsock is not supported)"
        );
        assert_eq!(error, expected);
    }
}

fn notification_does_not_block_on_a_full_socket() {
    if is_watched() {
        let sent = std::iter::repeat_with(|| systemd::notify("WATCHDOG=1"));
        let failed = sent.take(100_000).find_map(Result::err);
        let Some(Error::Io { reason, .. }) = failed else {
            panic!("{failed:?}");
        };
        assert_eq!(reason.kind(), ErrorKind::WouldBlock);
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    output_of(watched().env("NOTIFY_SOCKET", &path));
    assert!(!received(&socket).is_empty());
}

/// Shell command that prints the shell's process ID and environment.
const SHELL: &str = "echo own=$$ && env";

fn workers_do_not_inherit_systemd_variables() {
    const SYSTEMD_VARIABLES: [&str; 7] = [
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_PIDFDID",
        "LISTEN_FDNAMES",
        "NOTIFY_SOCKET",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
    ];
    if !is_watched() {
        let mut command = watched();
        command
            .envs(SYSTEMD_VARIABLES.map(|name| (name, "1")))
            .env("INHERITED", "1");
        output_of(&mut command);
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = |id: u32| directory.path().join(id.to_string());
    let script = format!("{{ {SHELL}; }} > \"$OUTPUT\"");
    cluster(
        |master| {
            let null = File::open("/dev/null").unwrap();
            let shell = Settings::default().exec("/bin/sh").args(["-c", &script]);
            master.setup_master(shell);
            master.fork_with([("OUTPUT", file(1))]).unwrap();
            let env = [("OUTPUT", file(2)), ("NOTIFY_SOCKET", "/overridden".into())];
            master.fork_with(env).unwrap();
            master.setup_master(Settings::default().listen_fds([("null", null)]));
            let env = [("OUTPUT", file(3)), ("LISTEN_PID", "1".into())];
            master.fork_with(env).unwrap();
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        },
        |_| unreachable!("the workers are shells"),
    );
    let own = |id: u32, name: &str| {
        let text = std::fs::read_to_string(file(id)).unwrap();
        let mut values = text.lines().filter_map(|line| line.split_once('='));
        let found = values.find(|(own, _)| *own == name);
        found.map(|(_, value)| value.to_owned())
    };
    for id in 1..=3 {
        assert_eq!(own(id, "INHERITED").unwrap(), "1");
        assert_eq!(own(id, "CLUSTER_UNIQUE_ID").unwrap(), id.to_string());
    }
    for name in SYSTEMD_VARIABLES {
        assert_eq!(own(1, name), None, "{name}");
        let expected = (name == "NOTIFY_SOCKET").then_some("/overridden");
        assert_eq!(own(2, name).as_deref(), expected, "{name}");
    }
    assert_eq!(own(3, "LISTEN_PID"), own(3, "own"));
    assert_eq!(own(3, "LISTEN_FDS").unwrap(), "1");
    assert_eq!(own(3, "LISTEN_FDNAMES").unwrap(), "null");
    assert_eq!(own(3, "NOTIFY_SOCKET"), None);
}

/// Checks that a worker can notify its readiness with `systemd-notify`. The master receives the
/// notification, as systemd would.
fn worker_notifies_readiness_itself() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notify");
    let notifications = Rc::new(RefCell::new(Vec::new()));
    cluster(
        |master| {
            let socket = UnixDatagram::bind(&path).unwrap();
            let received_so_far = Rc::clone(&notifications);
            let receive = move |_: &Master, socket: &UnixDatagram| {
                // `systemd-notify` waits until its descriptor is closed. `received` calls `recv`
                // without a control buffer, so the kernel closes the descriptor.
                received_so_far.borrow_mut().extend(received(socket));
                Some(Interest::Readable)
            };
            let watch = master.watch(socket, Interest::Readable, receive).unwrap();
            master.on_exit(move |master, _, status| {
                assert!(status.success(), "{status}");
                master.unwatch(watch);
            });
            let settings = Settings::default().exec("/usr/bin/env");
            master.setup_master(settings.args(["systemd-notify", "--ready"]));
            master.fork_with([("NOTIFY_SOCKET", &path)]).unwrap();
        },
        |_| unreachable!("the worker is systemd-notify"),
    );
    let notifications = notifications.take();
    assert!(
        notifications
            .iter()
            .any(|text| text.lines().any(|line| line == "READY=1")),
        "{notifications:?}"
    );
}

/// Environment variable that is set only for workers that do not use this crate.
const FOREIGN: &str = "FOREIGN";

/// Runs a worker that finds its listener with another crate, which checks `LISTEN_PID`.
fn run_foreign_worker() -> ! {
    let fds = sd_notify::listen_fds_with_names().unwrap();
    let [(number, name)] = <[_; 1]>::try_from(fds.collect::<Vec<_>>()).unwrap();
    assert_eq!((number, name.as_str()), (3, "web"));
    #[allow(unsafe_code)]
    // SAFETY: the master passed this open descriptor to this process, and no other code owns it.
    let listener = unsafe { <TcpListener as std::os::fd::FromRawFd>::from_raw_fd(number) };
    loop {
        let (mut connection, _) = listener.accept().unwrap();
        write!(connection, "{}", std::process::id()).unwrap();
    }
}

/// Python program that serves a listener in the same way as [`run_foreign_worker`].
const PYTHON: &str = "
import os, socket
assert os.environ['LISTEN_PID'] == str(os.getpid())
assert os.environ['LISTEN_FDS'] == '1' and os.environ['LISTEN_FDNAMES'] == 'web'
assert os.environ['CLUSTER_UNIQUE_ID'] in ('1', '2', '3')
listener = socket.socket(fileno=3)
while True:
    connection, _ = listener.accept()
    connection.sendall(str(os.getpid()).encode())
    connection.close()
";

fn foreign_workers_share_a_port() {
    if std::env::var_os(FOREIGN).is_some() {
        run_foreign_worker();
    }
    share_a_port(Settings::default());
}

/// Starts foreign workers as another user. Such a worker has a copy of the master's memory until
/// `execve`, while other workers share the memory, so the crate takes another code path.
fn foreign_workers_of_another_user_share_a_port() {
    if std::env::var_os(FOREIGN).is_some() {
        run_foreign_worker();
    }
    let settings = Settings::default().exec(OWN_PROGRAM);
    share_a_port(settings.uid(NOBODY).gid(NOBODY));
}

fn foreign_workers_in_python_share_a_port() {
    let settings = Settings::default().exec("/usr/bin/env");
    share_a_port(settings.args(["python3", "-c", PYTHON]));
}

/// Serves with two foreign workers, kills one of them, and checks that its replacement also
/// answers.
fn share_a_port(settings: Settings) {
    cluster(
        |master| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            master.setup_master(settings.listen_fds([("web", listener)]));
            let fork = |master: &Master| fork_patiently(|| master.fork_with([(FOREIGN, "1")]));
            let pids = [fork(master), fork(master)].map(|worker| worker.process().id());
            let stopping = Rc::new(Cell::new(false));
            let end = Rc::clone(&stopping);
            master.on_exit(move |master, worker, status| {
                if stopping.get() {
                    assert_eq!(signal(status), Some(libc::SIGTERM), "{status}");
                    return;
                }
                assert_eq!(worker.process().id(), pids[0]);
                assert_eq!(signal(status), Some(libc::SIGKILL), "{status}");
                let new = fork(master).process().id();
                let (end, expected) = (Rc::clone(&end), [pids[1], new]);
                in_background(
                    master,
                    move || wait_for_all(address, expected),
                    move |master, ()| {
                        end.set(true);
                        for worker in master.workers() {
                            worker.process().kill(Signal::TERM);
                        }
                    },
                );
            });
            in_background(
                master,
                move || wait_for_all(address, pids),
                |master, ()| {
                    master.workers()[0].process().kill(Signal::KILL);
                },
            );
        },
        |_| unreachable!("the workers do not use this crate"),
    );
}

fn signal(status: std::process::ExitStatus) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(&status)
}

/// Sends requests until both processes have answered.
fn wait_for_all(address: SocketAddr, pids: [u32; 2]) {
    let mut missing = BTreeSet::from(pids);
    wait_until("both", || {
        // Ignore an error, because the client may have connected to the killed worker.
        let answer = talk(address, b"").unwrap_or_default();
        missing.remove(&answer.parse().unwrap_or_default());
        missing.is_empty().then_some(())
    });
}
