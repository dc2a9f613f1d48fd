//! The measured servers: bare loops without this crate, and the same server with this crate.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{FromRawFd as _, IntoRawFd as _};
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use cluster::{Role, SchedulingPolicy};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, killpg};
use nix::sys::socket::{Backlog, listen};
use nix::sys::wait::waitpid;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{ForkResult, Pid, fork};
use sendfd::{RecvWithFd as _, SendWithFd as _};

use crate::harness::{Group, SCENARIO};

/// The role of a measured server's process.
pub const SERVER: &str = "serve";
/// The time that a slow request takes.
const SLOW: Duration = Duration::from_millis(50);

/// The request that every server here and every peer answers.
pub const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
/// A request for the worker's number.
pub const GET_WORKER: &[u8] = b"GET /worker HTTP/1.1\r\nHost: localhost\r\n\r\n";
/// A request for the worker's number, and for the times when the worker received the connection and
/// answered.
pub const GET_TIMES: &[u8] = b"GET /times HTTP/1.1\r\nHost: localhost\r\n\r\n";
/// A request like [`GET_TIMES`] that the worker answers after [`SLOW`].
pub const GET_SLOW: &[u8] = b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// A group of processes that serve requests at an address.
pub struct Server {
    pub group: Group,
    pub address: SocketAddr,
}

impl Server {
    /// Starts a server. The name is `BARE`, `BARE_DISPATCH`, or a policy of this crate.
    pub fn start(name: &str, workers: usize) -> Result<Self, String> {
        let known = [BARE, BARE_DISPATCH].contains(&name);
        if !known && name.parse::<SchedulingPolicy>().is_err() {
            return Err("no such policy".to_owned());
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .env(SCENARIO, SERVER)
            .args([name, &workers.to_string()]);
        Ok(Self::run(&mut command))
    }

    /// Starts a program that prints its address when it listens, and waits for the address.
    pub fn run(command: &mut Command) -> Self {
        let group = Group::start(command).unwrap();
        let address = group.line("listening on ").parse().unwrap();
        Self { group, address }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        end(&self.group);
    }
}

/// Kills the group and waits for all its processes. This process is a subreaper, so orphans are its
/// children.
pub fn end(group: &Group) {
    killpg(group.pid(), Signal::SIGKILL).unwrap();
    while waitpid(Pid::from_raw(-group.pid().as_raw()), None).is_ok() {}
}

/// The name of the server with plain `accept` loops.
pub const BARE: &str = "bare";
/// The name of the minimal server in which one process accepts connections and dispatches them to
/// others.
pub const BARE_DISPATCH: &str = "bare-dispatch";

/// Returns the time of the monotonic clock in nanoseconds. All processes share this clock.
pub fn now() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() * 1_000_000_000 + now.tv_nsec()
}

/// Runs the measured server in a process that the benchmark has started.
pub fn serve() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let [policy, workers] = &args[..] else {
        panic!("{args:?}");
    };
    let workers = workers.parse().unwrap();
    match policy.as_str() {
        BARE => bare(workers),
        BARE_DISPATCH => bare_dispatch(workers),
        policy => clustered(policy.parse().unwrap(), workers),
    }
}

/// Runs the baseline, in which processes share a listener and wait in `accept`.
fn bare(workers: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // Use the same backlog as this crate's default.
    listen(&listener, Backlog::new(511).unwrap()).unwrap();
    for number in 1..=workers {
        #[allow(unsafe_code)]
        // SAFETY: this process has one thread, so no other thread holds a lock at the fork.
        let forked = unsafe { fork() };
        if let ForkResult::Child = forked.unwrap() {
            set_pdeathsig(Signal::SIGKILL).unwrap();
            for connection in listener.incoming() {
                let connection = connection.unwrap();
                let _ = answer(connection, number, now());
            }
        }
    }
    println!("listening on {}", listener.local_addr().unwrap());
    nix::unistd::pause();
}

/// Runs a minimal server in which one process accepts connections and dispatches them to the
/// others. The other processes receive connections in strict turns, even if they are busy.
fn bare_dispatch(workers: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listen(&listener, Backlog::new(511).unwrap()).unwrap();
    let mut queues = Vec::new();
    for number in 1..=workers {
        let (master, worker) = UnixDatagram::pair().unwrap();
        #[allow(unsafe_code)]
        // SAFETY: this process has one thread, so no other thread holds a lock at the fork.
        let forked = unsafe { fork() };
        if let ForkResult::Child = forked.unwrap() {
            set_pdeathsig(Signal::SIGKILL).unwrap();
            let mut fds = [0];
            while worker.recv_with_fd(&mut [0], &mut fds).is_ok() {
                #[allow(unsafe_code)]
                // SAFETY: the descriptor was just received, and no other value owns it.
                let connection = unsafe { TcpStream::from_raw_fd(fds[0]) };
                let _ = answer(connection, number, now());
            }
        }
        queues.push(master);
    }
    println!("listening on {}", listener.local_addr().unwrap());
    for (connection, queue) in listener.incoming().zip(queues.iter().cycle()) {
        let fds = [connection.unwrap().into_raw_fd()];
        queue.send_with_fd(&[0], &fds).unwrap();
        nix::unistd::close(fds[0]).unwrap();
    }
}

fn clustered(policy: SchedulingPolicy, workers: usize) {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            master.set_scheduling_policy(policy).unwrap();
            let mut count = 0;
            master.on_listening(move |_, _, address| {
                count += 1;
                if count == workers {
                    println!("listening on {address}");
                }
            });
            for _ in 0..workers {
                master.fork().unwrap();
            }
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            let number = worker.id().to_string().parse().unwrap();
            for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
                let connection = connection.unwrap();
                let _ = answer(connection, number, now());
            }
        }
    }
}

fn answer(mut connection: impl Read + Write, worker: usize, received: i64) -> io::Result<()> {
    let mut request = [0; 1024];
    let mut length = 0;
    while !request[..length].ends_with(b"\r\n\r\n") {
        match connection.read(&mut request[length..])? {
            0 => return Ok(()),
            more => length += more,
        }
    }
    if request.starts_with(b"GET / ") {
        return connection.write_all(
            b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nConnection: close\r\n\r\nhello world\n",
        );
    }
    if request.starts_with(b"GET /slow ") {
        std::thread::sleep(SLOW);
    }
    let body = match request.starts_with(b"GET /worker ") {
        true => format!("{worker}"),
        false => format!("{worker} {received} {}", now()),
    };
    let length = body.len();
    let head = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length:";
    connection.write_all(format!("{head} {length}\r\n\r\n{body}").as_bytes())
}
