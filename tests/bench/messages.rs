//! Measures round trips, one-way messages, and long messages between two processes.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cluster::{Role, Sent};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::unistd::Pid;

use crate::ROUNDS;
use crate::harness::{Group, SCENARIO};
use crate::peers::node_program;
use crate::server::end;
use crate::table::{Figure, Goal, Table, ratios};
use crate::usage::{cpu_time, family};

/// The role of a process that exchanges and counts messages.
pub const MESSAGES: &str = "messages";

const SHORT: usize = 32;
const LONG: usize = 64 << 10;
/// Time of the warm-up, in which messages are not counted.
const WARM_UP: Duration = Duration::from_millis(300);
const TIME: Duration = Duration::from_millis(1000);
/// A time that is longer than any run. After the result has been printed, the start time moves into
/// the future by this time, so that the result is not printed again.
const NEVER: Duration = Duration::from_secs(600);
/// The line that the counting process prints at the end of the warm-up.
const COUNTING: &str = "counts";
/// The prefix of the line that the counting process prints at the end of `TIME`. The number of
/// messages follows.
const COUNTED: &str = "counted ";

pub fn measure(table: &mut Table) {
    let own = |args: [&str; 2]| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(SCENARIO, MESSAGES).args(args);
        Ok(command)
    };
    let mut kinds = [
        own(["bare", "round-trip"]),
        own(["cluster", "round-trip"]),
        node_program("messages.js", &["round-trip"]),
        own(["cluster", "one-way"]),
        node_program("messages.js", &["one-way"]),
        own(["bare", "long"]),
        own(["cluster", "long"]),
        own(["polled", "round-trip"]),
        own(["polled", "long"]),
    ];
    let _one_core = OneCore::new();
    let mut rates = kinds.each_ref().map(|_| Vec::new());
    for _ in 0..ROUNDS {
        for (kind, rates) in kinds.iter_mut().zip(&mut rates) {
            if let Ok(command) = kind {
                rates.push(rate(command));
            }
        }
    }
    let rows = [
        ("round trip, 32 bytes", 1, 0, "× socketpair", Some(0.8)),
        (
            "the same vs. a bare loop that polls",
            1,
            7,
            "× polled",
            None,
        ),
        ("round trip, 32 bytes", 1, 2, "× Node's", None),
        ("one way, 32 bytes", 3, 4, "× Node's", Some(10.0)),
        ("one way, 64 KiB", 6, 5, "× socketpair", Some(0.8)),
        (
            "the same vs. a bare loop that polls",
            6,
            8,
            "× polled",
            None,
        ),
    ];
    for (name, own, other, unit, goal) in rows {
        if let Err(why) = &kinds[other] {
            table.skip(name, why);
            continue;
        }
        let row = table.row(name, ratios(&rates[own], &rates[other]), unit);
        let [own, other] = [own, other].map(|kind| Figure::from(rates[kind].clone()));
        row.note(&format!(
            "{} vs. {}",
            own.in_unit("per second of CPU"),
            other.in_unit("")
        ));
        if let Some(goal) = goal {
            row.goal(Goal::AtLeast(goal));
        }
    }
}

/// Returns the number of messages per second of CPU time of both processes.
fn rate(command: &mut Command) -> f64 {
    let group = Group::start(command).unwrap();
    group.line(COUNTING);
    let processes = family(group.pid());
    let before = cpu_time(&processes);
    let count: f64 = group.line(COUNTED).parse().unwrap();
    let used = cpu_time(&processes) - before;
    end(&group);
    count / used.as_secs_f64()
}

/// Restricts this process, and the processes that it starts, to one core until this value is
/// dropped.
///
/// Two processes that wait for each other use several times more CPU time on two cores than on one.
/// Without the restriction, the result would depend on the kernel's placement.
struct OneCore(CpuSet);

impl OneCore {
    fn new() -> Self {
        let all = sched_getaffinity(Pid::this()).unwrap();
        let mut one = CpuSet::new();
        let mut cores = 0..CpuSet::count();
        one.set(cores.rfind(|core| all.is_set(*core).unwrap()).unwrap())
            .unwrap();
        sched_setaffinity(Pid::this(), &one).unwrap();
        Self(all)
    }
}

impl Drop for OneCore {
    fn drop(&mut self) {
        sched_setaffinity(Pid::this(), &self.0).unwrap();
    }
}

/// Exchanges messages in a process that the benchmark has started. The process's arguments select
/// the program and the kind of messages.
pub fn count() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    match args[..] {
        [mode @ ("bare" | "polled"), "round-trip"] => {
            let mut message = [0; SHORT];
            count_from(mode, "echo", |peer| {
                peer.write_all(&message)?;
                peer.read_exact(&mut message)
            });
        }
        [mode @ ("bare" | "polled"), "long"] => {
            let mut message = vec![0; LONG];
            count_from(mode, "write", |peer| peer.read_exact(&mut message));
        }
        [mode @ ("bare" | "polled"), "echo"] => echo(Bare::new(stdin(), mode)),
        [mode @ ("bare" | "polled"), "write"] => write(Bare::new(stdin(), mode)),
        ["cluster", "round-trip"] => round_trip(),
        ["cluster", "one-way"] => one_way(SHORT),
        ["cluster", "long"] => one_way(LONG),
        _ => panic!("{args:?}"),
    }
}

/// Counts the messages within `TIME` after the warm-up. Prints `COUNTING` when it starts to count,
/// and `COUNTED` with the number at the end. The process then continues until the benchmark kills
/// it.
struct Counter {
    count: u64,
    start: Instant,
    warm: bool,
}

impl Counter {
    fn new() -> Self {
        Self {
            count: 0,
            start: Instant::now(),
            warm: false,
        }
    }

    fn add(&mut self) {
        self.count += 1;
        // Read the clock only for every 64th message, because reading it for each one would distort
        // the cost of short messages.
        if self.count % 64 != 0 {
            return;
        }
        if !self.warm && self.start.elapsed() > WARM_UP {
            println!("{COUNTING}");
            *self = Self {
                warm: true,
                ..Self::new()
            };
        } else if self.warm && self.start.elapsed() > TIME {
            println!("{COUNTED}{}", self.count);
            self.start += NEVER;
        }
    }
}

/// A blocking socket, or a non-blocking socket with a poller. The socket with a poller is the
/// fairer comparison, because a program that waits for more than one descriptor needs a poller.
struct Bare {
    socket: UnixStream,
    poller: Option<Epoll>,
}

impl Bare {
    fn new(socket: UnixStream, mode: &str) -> Self {
        let poller = (mode == "polled").then(|| {
            socket.set_nonblocking(true).unwrap();
            let poller = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
            let event = EpollEvent::new(EpollFlags::EPOLLIN, 0);
            poller.add(&socket, event).unwrap();
            poller
        });
        Self { socket, poller }
    }

    fn wait_for(&self, flags: EpollFlags) {
        let poller = self.poller.as_ref().unwrap();
        let mut event = EpollEvent::new(flags, 0);
        if flags != EpollFlags::EPOLLIN {
            poller.modify(&self.socket, &mut event).unwrap();
        }
        poller
            .wait(std::slice::from_mut(&mut event), EpollTimeout::NONE)
            .unwrap();
    }
}

impl Read for Bare {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.poller.is_some() {
            self.wait_for(EpollFlags::EPOLLIN);
        }
        self.socket.read(buffer)
    }
}

impl Write for Bare {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        loop {
            match self.socket.write(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.wait_for(EpollFlags::EPOLLOUT);
                }
                written => return written,
            }
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Counts messages from a peer process. The peer is another instance of this program, with the
/// other end of a socket pair as its standard input.
fn count_from(mode: &str, peer: &str, mut message: impl FnMut(&mut Bare) -> std::io::Result<()>) {
    let (here, there) = UnixStream::pair().unwrap();
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args([mode, peer])
        .stdin(Stdio::from(OwnedFd::from(there)))
        .spawn()
        .unwrap();
    let mut here = Bare::new(here, mode);
    let mut counter = Counter::new();
    while message(&mut here).is_ok() {
        counter.add();
    }
    process.wait().unwrap();
}

fn stdin() -> UnixStream {
    UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap())
}

fn echo(mut peer: Bare) {
    let mut message = [0; SHORT];
    while peer.read_exact(&mut message).is_ok() {
        peer.write_all(&message).unwrap();
    }
}

fn write(mut peer: Bare) {
    let message = vec![0; LONG];
    while peer.write_all(&message).is_ok() {}
}

/// Exchanges messages between the master and a worker. The worker counts the round trips.
fn round_trip() {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            master.on_message(|_, worker, message| {
                let _ = worker.send(message.bytes()).unwrap();
            });
            master.fork().unwrap();
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            let mut counter = Counter::new();
            worker.on_message(move |worker, message| {
                counter.add();
                let _ = worker.send(message.bytes()).unwrap();
            });
            let _ = worker.send(&[0; SHORT]).unwrap();
            worker.run().unwrap();
        }
    }
}

/// Sends messages from a worker to the master. The master counts the messages.
fn one_way(length: usize) {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let mut counter = Counter::new();
            master.on_message(move |_, _, _| counter.add());
            master.fork().unwrap();
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            let message = vec![0; length];
            while worker.is_connected() {
                while matches!(worker.send(&message), Ok(Sent::Continue)) {}
                let _ = worker.dispatch(None);
            }
        }
    }
}
