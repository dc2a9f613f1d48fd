//! Checks a pool's notifications with a service manager that is strict, busy, or not there.

use std::io::IoSliceMut;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cluster::systemd;
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use nix::unistd::Pid;

use crate::harness::{is_alive, is_watched, talk, wait_until, watched};
use crate::pool::{Server, children, pid, quick, server};

crate::scenarios! {
    old_master_announces_the_new_main_process
    failed_upgrade_leaves_the_main_process
    pool_serves_without_a_reachable_manager
    pool_serves_with_a_manager_that_never_reads
    notification_never_waits
}

const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// A service manager that trusts only the main process, like systemd with `NotifyAccess=main`.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

/// A notification, and the process that sent it.
struct Notification {
    sender: Pid,
    text: String,
}

impl Notification {
    fn main_pid(&self) -> Option<Pid> {
        let mut lines = self.text.lines();
        let pid = lines.find_map(|line| line.strip_prefix("MAINPID="))?;
        Some(Pid::from_raw(pid.parse().unwrap()))
    }
}

impl Manager {
    fn new() -> Self {
        let path = std::env::temp_dir().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        setsockopt(&socket, sockopt::PassCred, &true).unwrap();
        Self { socket, path }
    }

    fn start(&self) -> Server {
        Server::start_with("rr", &[(NOTIFY_SOCKET, self.path.to_str().unwrap())])
    }

    /// Returns the next notification, or `None` if no notification waits.
    fn next(&self) -> Option<Notification> {
        let mut buffer = [0; 4096];
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let mut space = nix::cmsg_space!(nix::sys::socket::UnixCredentials);
        let socket = self.socket.as_raw_fd();
        let received =
            recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_DONTWAIT).ok()?;
        let length = received.bytes;
        let sender = received.cmsgs().unwrap().find_map(|message| match message {
            ControlMessageOwned::ScmCredentials(credentials) => Some(credentials.pid()),
            _ => None,
        });
        let text = String::from_utf8(buffer[..length].to_vec()).unwrap();
        Some(Notification {
            sender: Pid::from_raw(sender.unwrap()),
            text,
        })
    }

    fn remove(self) {
        std::fs::remove_file(self.path).unwrap();
    }
}

fn old_master_announces_the_new_main_process() {
    if is_watched() {
        return server(quick());
    }
    let manager = Manager::new();
    let server = manager.start();
    let old = server.master();
    server.signal(Signal::SIGUSR2);
    wait_until("the exit of the old master", || {
        (!is_alive(pid(old))).then_some(())
    });
    let new = server.master();
    let (mut main, mut announced) = (old, false);
    // All notifications of the old master wait in the socket, because it has exited.
    while let Some(notification) = manager.next() {
        let Notification { sender, text } = &notification;
        assert!(!text.contains("STOPPING"), "{text}");
        // Accept everything of the old master until the announcement, and nothing afterwards. The
        // new master is silent until it has taken over.
        assert!(!(announced && *sender == old), "the old master sent {text}");
        if *sender == main {
            main = notification.main_pid().unwrap_or(main);
            announced |= main == new && *sender == old;
        } else {
            assert_eq!(*sender, new);
            let has_taken_over = server.count(": this master has taken over") > 0;
            assert!(has_taken_over, "the new master sent {text}");
        }
    }
    assert_eq!(main, new, "the manager ignores the new master");
    // The manager accepts the new master's notifications from now on.
    server.signal(Signal::SIGTERM);
    wait_until("STOPPING=1", || {
        let notification = manager.next()?;
        assert_eq!(notification.sender, new);
        (notification.text == "STOPPING=1").then_some(())
    });
    server.stop_and_check(|_| {});
    manager.remove();
}

/// Checks that a new master that fails sends nothing, because with `NotifyAccess=all` systemd would
/// believe it.
fn failed_upgrade_leaves_the_main_process() {
    if is_watched() {
        let options = quick().startup_timeout(Duration::from_millis(500));
        return server(options.min_ready_time(Duration::from_millis(300)));
    }
    let manager = Manager::new();
    let server = manager.start();
    let old = server.master();
    // The workers of this release abort once they are ready, so the new master has a quorum for a
    // moment.
    server.release("aborts");
    server.signal(Signal::SIGUSR2);
    wait_until("a failed upgrade", || {
        let output = server.group.output();
        output.contains("the new master failed").then_some(())
    });
    wait_until("the exit of the new master", || {
        (children(old).len() == 2).then_some(())
    });
    while let Some(Notification { sender, text }) = manager.next() {
        assert_eq!(sender, old, "the new master sent {text}");
    }
    server.release("good");
    server.end_of(old, |_| {});
    manager.remove();
}

const UNREACHABLE: [&str; 7] = [
    "/no/such/socket",
    "@cluster-test-no-such-name",
    "vsock:2:1",
    "",
    "@",
    "notify",
    "/dev/null",
];

fn pool_serves_without_a_reachable_manager() {
    if is_watched() {
        return server(quick());
    }
    let long = format!("/{}", "x".repeat(300));
    for address in UNREACHABLE.into_iter().chain([long.as_str()]) {
        let server = Server::start_with("rr", &[(NOTIFY_SOCKET, address)]);
        assert_eq!(talk(server.address, b"request").unwrap(), "served\n");
        server.signal(Signal::SIGHUP);
        server.wait_for(" serves", 1);
        server.stop_and_check(|server| {
            let output = server.group.output();
            let warnings = output.matches("NOTIFY_SOCKET").count();
            assert_eq!(warnings, 1, "{address:?}:\n{output}");
        });
    }
}

fn pool_serves_with_a_manager_that_never_reads() {
    if is_watched() {
        return server(quick());
    }
    let manager = Manager::new();
    let filler = UnixDatagram::unbound().unwrap();
    filler.set_nonblocking(true).unwrap();
    while filler.send_to(b"STATUS=full", &manager.path).is_ok() {}
    let server = manager.start();
    server.signal(Signal::SIGHUP);
    server.wait_for(" serves", 1);
    assert_eq!(
        server
            .count("cannot send to NOTIFY_SOCKET: Resource temporarily unavailable (os error 11)"),
        1
    );
    // When the manager reads again, it learns the states that waited, in their order.
    let mut states = Vec::new();
    wait_until("the states", || {
        let text = manager.next()?.text;
        states.extend(
            ["READY=1", "RELOADING=1"]
                .into_iter()
                .filter(|state| text.starts_with(state)),
        );
        (states.len() == 3).then_some(())
    });
    assert_eq!(states, ["READY=1", "RELOADING=1", "READY=1"]);
    server.stop_and_check(|_| {});
    manager.remove();
}

fn notification_never_waits() {
    if is_watched() {
        while systemd::notify("WATCHDOG=1").is_ok() {}
        let begin = Instant::now();
        for _ in 0..100 {
            systemd::notify("WATCHDOG=1").unwrap_err();
        }
        // Each call would add its own wait.
        assert!(
            begin.elapsed() < Duration::from_secs(5),
            "{:?}",
            begin.elapsed()
        );
        return;
    }
    let manager = Manager::new();
    let status = watched()
        .env(NOTIFY_SOCKET, &manager.path)
        .status()
        .unwrap();
    assert!(status.success());
    manager.remove();
}
