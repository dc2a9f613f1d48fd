//! Messages: there and back, one way, and long ones.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cluster::Role;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::unistd::Pid;

use crate::ROUNDS;
use crate::harness::{Group, SCENARIO};
use crate::peers::node_program;
use crate::server::end;
use crate::table::{Figure, Goal, Table, ratios};
use crate::usage::{cpu_time, family};

/// The role of a process that counts messages.
pub const MESSAGES: &str = "messages";

const SHORT: usize = 32;
const LONG: usize = 64 << 10;
/// What goes before is not counted.
const WARM_UP: Duration = Duration::from_millis(300);
const TIME: Duration = Duration::from_millis(1000);
/// Nobody goes on for so long.
const PATIENCE: Duration = Duration::from_secs(600);
/// What is said when it begins, and when it is over.
const BEGUN: &str = "counts";
const COUNTED: &str = "counted ";

pub fn measure(table: &mut Table) {
    let own = |args: [&str; 2]| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(SCENARIO, MESSAGES).args(args);
        Ok(command)
    };
    let mut kinds = [
        own(["bare", "there-and-back"]),
        own(["cluster", "there-and-back"]),
        node_program("messages.js", &["there-and-back"]),
        own(["cluster", "one-way"]),
        node_program("messages.js", &["one-way"]),
        own(["bare", "long"]),
        own(["cluster", "long"]),
        own(["polled", "there-and-back"]),
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
        ("there and back, 32 bytes", 1, 0, "× socketpair", Some(0.8)),
        (
            "the same, beside a bare loop that polls",
            1,
            7,
            "× polled",
            None,
        ),
        ("there and back, 32 bytes", 1, 2, "× Node's", None),
        ("one way, 32 bytes", 3, 4, "× Node's", Some(10.0)),
        ("one way, 64 KiB", 6, 5, "× socketpair", Some(0.8)),
        (
            "the same, beside a bare loop that polls",
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
            "{} beside {}",
            own.in_unit("a second of CPU"),
            other.in_unit("")
        ));
        if let Some(goal) = goal {
            row.goal(Goal::AtLeast(goal));
        }
    }
}

/// Messages for a second of CPU time, of both processes.
fn rate(command: &mut Command) -> f64 {
    let group = Group::start(command).unwrap();
    group.line(BEGUN);
    let processes = family(group.pid());
    let before = cpu_time(&processes);
    let count: f64 = group.line(COUNTED).parse().unwrap();
    let used = cpu_time(&processes) - before;
    end(&group);
    count / used.as_secs_f64()
}

/// While it lives, this process and those that it starts have one core. Two that wait for each other
/// cost a multiple on two, and where the scheduler puts them is an accident.
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

/// In the process that counts.
pub fn count() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    match args[..] {
        [way @ ("bare" | "polled"), "there-and-back"] => {
            let mut message = [0; SHORT];
            count_from(way, "echo", |other| {
                other.write_all(&message)?;
                other.read_exact(&mut message)
            });
        }
        [way @ ("bare" | "polled"), "long"] => {
            let mut message = vec![0; LONG];
            count_from(way, "write", |other| other.read_exact(&mut message));
        }
        [way @ ("bare" | "polled"), "echo"] => echo(Bare::new(stdin(), way)),
        [way @ ("bare" | "polled"), "write"] => write(Bare::new(stdin(), way)),
        ["cluster", "there-and-back"] => there_and_back(),
        ["cluster", "one-way"] => one_way(SHORT),
        ["cluster", "long"] => one_way(LONG),
        _ => panic!("{args:?}"),
    }
}

/// Counts for a time, and says when that begins, and how many there were. Then it lets go on what
/// goes on: whoever has started this ends it.
struct Counter {
    count: u64,
    begun: Instant,
    warm: bool,
}

impl Counter {
    fn new() -> Self {
        Self {
            count: 0,
            begun: Instant::now(),
            warm: false,
        }
    }

    fn add(&mut self) {
        self.count += 1;
        // The clock is cheap, but not beside a short message.
        if self.count % 64 != 0 {
            return;
        }
        if !self.warm && self.begun.elapsed() > WARM_UP {
            println!("{BEGUN}");
            *self = Self {
                warm: true,
                ..Self::new()
            };
        } else if self.warm && self.begun.elapsed() > TIME {
            println!("{COUNTED}{}", self.count);
            self.begun += PATIENCE;
        }
    }
}

/// A socket that waits by itself, or one that does not and is waited for, as in every program that waits
/// for more than one thing.
struct Bare {
    socket: UnixStream,
    poller: Option<Epoll>,
}

impl Bare {
    fn new(socket: UnixStream, way: &str) -> Self {
        let poller = (way == "polled").then(|| {
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

/// Counts messages that come through a socket whose other end this program has, too.
fn count_from(way: &str, other: &str, mut message: impl FnMut(&mut Bare) -> std::io::Result<()>) {
    let (here, there) = UnixStream::pair().unwrap();
    let mut other = Command::new(std::env::current_exe().unwrap())
        .args([way, other])
        .stdin(Stdio::from(OwnedFd::from(there)))
        .spawn()
        .unwrap();
    let mut here = Bare::new(here, way);
    let mut counter = Counter::new();
    while message(&mut here).is_ok() {
        counter.add();
    }
    other.wait().unwrap();
}

fn stdin() -> UnixStream {
    UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap())
}

fn echo(mut other: Bare) {
    let mut message = [0; SHORT];
    while other.read_exact(&mut message).is_ok() {
        other.write_all(&message).unwrap();
    }
}

fn write(mut other: Bare) {
    let message = vec![0; LONG];
    while other.write_all(&message).is_ok() {}
}

/// The worker counts.
fn there_and_back() {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            master.on_message(|_, worker, message| {
                worker.send(message.bytes()).unwrap();
            });
            master.fork().unwrap();
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            let mut counter = Counter::new();
            worker.on_message(move |worker, message| {
                counter.add();
                worker.send(message.bytes()).unwrap();
            });
            worker.send(&[0; SHORT]).unwrap();
            worker.run().unwrap();
        }
    }
}

/// The master counts.
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
                while worker.send(&message).is_ok_and(|room| room) {}
                let _ = worker.dispatch(None);
            }
        }
    }
}
