//! Checks a pool's notifications if the service manager trusts only the main process, does not
//! read, or cannot be reached.

use std::io::IoSliceMut;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use nix::unistd::Pid;

use crate::harness::{is_watched, scaled, talk, wait_until};
use crate::pool::{Server, children, quick, server, wait_for_exit};

crate::scenarios! {
    old_master_announces_the_new_main_process
    failed_upgrade_leaves_the_main_process
    pool_without_a_quorum_announces_its_stop
    pool_serves_without_a_reachable_manager
    pool_serves_with_a_manager_that_never_reads
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

    /// Returns the next notification, or `None` if the socket contains no notification.
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

    /// Sends notifications until the socket's queue is full.
    ///
    /// One sender is not enough: with `net.unix.max_dgram_qlen` = 512, as systemd sets it, the
    /// sender reaches the limit of its own send buffer first.
    fn fill(&self) {
        loop {
            let sender = UnixDatagram::unbound().unwrap();
            sender.set_nonblocking(true).unwrap();
            if sender.send_to(b"STATUS=full", &self.path).is_err() {
                return;
            }
            while sender.send_to(b"STATUS=full", &self.path).is_ok() {}
        }
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
    wait_for_exit(old);
    let new = server.master();
    let (mut main, mut announced) = (old, false);
    // The old master has exited, so the socket contains all its notifications.
    while let Some(notification) = manager.next() {
        let Notification { sender, text } = &notification;
        assert!(!text.contains("STOPPING"), "{text}");
        // The old master must send nothing after the announcement. The new master must send nothing
        // before it has taken over.
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
    // From now on, the new master is the main process, so the manager accepts its notifications.
    server.signal(Signal::SIGTERM);
    wait_until("STOPPING=1", || {
        let notification = manager.next()?;
        assert_eq!(notification.sender, new);
        (notification.text == "STOPPING=1").then_some(())
    });
    // A second signal could arrive after the master has removed its handlers, and end it.
    server.finish(new, |_| {});
    manager.remove();
}

/// Checks that the manager learns of the stop at once although the pool had lost its quorum before,
/// which the pool reports only once, and although a delay begins.
fn pool_without_a_quorum_announces_its_stop() {
    if is_watched() {
        let options = quick().startup_timeout(Duration::MAX);
        return server(options.stop_delay(Duration::MAX));
    }
    let manager = Manager::new();
    let server = manager.start();
    server.release("never ready");
    let killed = server.workers();
    for worker in &killed {
        kill(*worker, Signal::SIGKILL).unwrap();
    }
    server.wait_for(": not ready", 1);
    wait_until("new workers", || {
        let workers = server.workers();
        let are_new = workers.iter().all(|worker| !killed.contains(worker));
        (are_new && workers.len() == 2).then_some(())
    });
    server.signal(Signal::SIGTERM);
    wait_until("STOPPING=1", || {
        (manager.next()?.text == "STOPPING=1").then_some(())
    });
    let master = server.master();
    server.signal(Signal::SIGQUIT);
    server.finish(master, |_| {
        while let Some(notification) = manager.next() {
            assert_ne!(notification.text, "STOPPING=1");
        }
    });
    manager.remove();
}

/// Checks that a new master that fails sends no notification. With `NotifyAccess=all`, systemd
/// would accept the notification.
fn failed_upgrade_leaves_the_main_process() {
    if is_watched() {
        let options = quick().startup_timeout(Duration::from_millis(500));
        // A worker that gets no core for a while must still abort within this time.
        return server(options.min_ready_time(scaled(Duration::from_secs(1))));
    }
    let manager = Manager::new();
    let server = manager.start();
    let old = server.master();
    // The workers of this release abort soon after they are ready, so the new master reaches its
    // quorum and loses it.
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

/// Values of `NOTIFY_SOCKET` that are invalid, or that name an address on which no process
/// receives.
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
    manager.fill();
    let server = manager.start();
    server.signal(Signal::SIGHUP);
    server.wait_for(" serves", 1);
    assert_eq!(
        server
            .count("cannot send to NOTIFY_SOCKET: Resource temporarily unavailable (os error 11)"),
        1
    );
    // When the manager reads again, it must receive the pending states in their order.
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
    server.stop();
    manager.remove();
}
