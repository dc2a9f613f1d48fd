//! The measured servers: a bare loop, and a pool of this crate.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::time::Duration;

use cluster::pool::{Pool, PoolOptions, ignore_pool_signals};
use cluster::{
    Connection, Interest, ListenOptions, Listener, Master, Role, SchedulingPolicy, Worker, systemd,
};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{ForkResult, Pid, fork};

use crate::harness::{SCENARIO, wait_until};
use crate::server::Server;
use crate::usage::family;

/// The role of a bare keep-alive server. Environment variable: [`WORKERS`].
pub const BARE_KEEP_ALIVE: &str = "bare-keep-alive";
/// The role of a pool's processes. Environment variables: [`POLICY`], [`WORKERS`], [`MODE`].
pub const POOL: &str = "pool";

/// The policy of the pool: `rr`, `none` or `sharded`.
const POLICY: &str = "POLICY";
const WORKERS: &str = "WORKERS";
/// The name of a [`Mode`].
const MODE: &str = "MODE";

/// Time after which a parked connection is closed. It is longer than all benchmarks together.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// Maximum number of parked connections, instead of half of the descriptor limit. It is more than
/// all clients of one benchmark.
const MAX_PARKED: usize = 12_000;

/// The time that the request for `/work` keeps a worker busy.
pub const WORK: Duration = Duration::from_millis(1);

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nhello world\n";
/// The answer before the server closes the connection.
const LAST_ANSWER: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nConnection: close\r\n\r\nhello world\n";

pub fn start_bare(workers: usize) -> Server {
    let mut command = Command::new(std::env::current_exe().unwrap());
    Server::run(
        command
            .env(SCENARIO, BARE_KEEP_ALIVE)
            .env(WORKERS, workers.to_string()),
    )
}

/// The way in which a worker of the pool handles connections.
#[derive(Clone, Copy, PartialEq)]
pub enum Mode {
    /// Blocks, and closes each connection after one request.
    Close,
    /// Blocks, and parks a connection after each request.
    Park,
    /// Watches its connections with the worker's event loop.
    Watch,
    /// Serves each connection on its own thread.
    Thread,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Close => "close",
            Self::Park => "park",
            Self::Watch => "watch",
            Self::Thread => "thread",
        }
    }

    /// Returns the mode of this process.
    fn own() -> Self {
        let name = std::env::var(MODE).unwrap();
        let mut modes = [Self::Close, Self::Park, Self::Watch, Self::Thread].into_iter();
        modes.find(|mode| mode.name() == name).unwrap()
    }
}

/// A running pool.
pub struct Service {
    pub server: Server,
}

impl Service {
    pub fn start(policy: &str, workers: usize, mode: Mode) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .env(SCENARIO, POOL)
            .env(POLICY, policy)
            .env(WORKERS, workers.to_string())
            .env(MODE, mode.name());
        let server = Server::run(&mut command);
        server.group.line("ready");
        Self { server }
    }

    /// Returns the number of lines in the pool's log that contain one of the texts.
    pub fn count(&self, texts: &[&str]) -> usize {
        let output = self.server.group.output();
        let matches = |line: &&str| texts.iter().any(|text| line.contains(text));
        output.lines().filter(matches).count()
    }

    /// Returns the process that is the master now.
    fn master(&self) -> Pid {
        let output = self.server.group.output();
        let mut lines = output.lines().rev();
        let master = lines.find_map(|line| line.strip_prefix("master "));
        Pid::from_raw(master.unwrap().parse().unwrap())
    }

    /// Returns the workers that exist now.
    pub fn workers(&self) -> Vec<Pid> {
        family(self.master()).split_off(1)
    }

    /// Sends a signal to the master, and waits for another line in the log that contains one of the
    /// texts.
    pub fn signal(&self, signal: Signal, texts: &[&str]) {
        let before = self.count(texts);
        kill(self.master(), signal).unwrap();
        let is_done = || (self.count(texts) > before).then_some(());
        wait_until(&format!("a line with one of {texts:?}"), is_done);
    }

    /// Replaces the master, and waits until the old master has exited.
    pub fn upgrade(&self) {
        let old = self.master();
        self.signal(Signal::SIGUSR2, &["a new master has taken over"]);
        // Leave the exit status to `server::end`. This process is a subreaper, so later masters are
        // its children too.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        waitid(Id::Pid(old), flags).unwrap();
    }
}

/// Runs processes that share a listener. Each process has its own epoll instance, and serves the
/// connections that it has accepted until they end.
pub fn bare_keep_alive() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    for _ in 0..workers() {
        #[allow(unsafe_code)]
        // SAFETY: this process has one thread, so no other thread holds a lock at the fork.
        let forked = unsafe { fork() };
        if let ForkResult::Child = forked.unwrap() {
            set_pdeathsig(Signal::SIGKILL).unwrap();
            serve_with_epoll(&listener);
        }
    }
    println!("listening on {}", listener.local_addr().unwrap());
    nix::unistd::pause();
}

fn serve_with_epoll(listener: &TcpListener) -> ! {
    const LISTENER: u64 = u64::MAX;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
    let event = EpollEvent::new(interest, LISTENER);
    epoll.add(listener, event).unwrap();
    let mut connections: Vec<Option<TcpStream>> = Vec::new();
    let mut events = [EpollEvent::empty(); 64];
    loop {
        let ready = epoll.wait(&mut events, EpollTimeout::NONE).unwrap();
        for event in &events[..ready] {
            if event.data() == LISTENER {
                match listener.accept() {
                    Ok((connection, _)) => {
                        let index = connections.len() as u64;
                        let event = EpollEvent::new(EpollFlags::EPOLLIN, index);
                        epoll.add(connection.as_fd(), event).unwrap();
                        connections.push(Some(connection));
                    }
                    // Another process has accepted the connection.
                    Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                }
                continue;
            }
            let slot = &mut connections[usize::try_from(event.data()).unwrap()];
            let connection = slot.as_mut().unwrap();
            if !matches!(answer(connection, true), Ok(true)) {
                *slot = None;
            }
        }
    }
}

fn workers() -> usize {
    std::env::var(WORKERS).unwrap().parse().unwrap()
}

/// Runs the master or a worker of a pool.
pub fn pool() -> cluster::Result<()> {
    let passed = systemd::listen_fds()?;
    match cluster::init()? {
        Role::Master(master) => supervise(&master, passed),
        Role::Worker(worker) => serve(&worker),
    }
}

fn supervise(master: &Master, passed: Vec<systemd::ListenFd>) -> cluster::Result<()> {
    // Make the kernel kill only the first master with the benchmark. The parent of a later master
    // is the previous master, which exits after the upgrade.
    if passed.is_empty() {
        set_pdeathsig(Signal::SIGKILL).unwrap();
    }
    let policy: SchedulingPolicy = std::env::var(POLICY).unwrap().parse().unwrap();
    master.set_scheduling_policy(policy)?;
    master.set_max_parked(MAX_PARKED);
    let options = PoolOptions::default()
        .workers(workers())
        // Shorten the delays, so that a run contains many reloads and respawns.
        .min_ready_time(Duration::from_millis(50))
        .drain_timeout(Duration::from_secs(5))
        .back_off(Duration::from_millis(1))
        .back_off_cap(Duration::from_millis(1))
        .max_failures(u32::MAX);
    let pool = Pool::new(master, options);
    pool.adopt(master, passed)?;
    let address = pool.listen(master, "127.0.0.1:0")?;
    println!("master {}\nlistening on {address}", std::process::id());
    pool.on_event(|_, _, event| println!("{event}"));
    pool.on_default_signals(master)?;
    master.run()
}

fn serve(worker: &Worker) -> cluster::Result<()> {
    ignore_pool_signals(worker)?;
    let mode = Mode::own();
    let parks = mode == Mode::Park;
    let options = ListenOptions::from("127.0.0.1:0").idle_timeout(IDLE_TIMEOUT);
    let listener = worker.listen(options.wait_for_data(parks))?;
    match mode {
        Mode::Close | Mode::Park => serve_in_turn(&listener, parks),
        Mode::Watch => serve_in_loop(worker, &listener),
        Mode::Thread => serve_on_threads(worker, &listener),
    }
}

fn serve_in_turn(listener: &Listener, parks: bool) -> cluster::Result<()> {
    for connection in listener.incoming() {
        let mut connection = connection?;
        if let Ok(true) = answer(&mut connection, parks) {
            connection.park();
        }
    }
    Ok(())
}

fn serve_in_loop(worker: &Worker, listener: &Listener) -> cluster::Result<()> {
    let next = |_: &Worker, mut connection: &Connection| {
        let answered = answer(&mut connection, true);
        matches!(answered, Ok(true)).then_some(Interest::Readable)
    };
    listener.set_connection_callback(move |worker, connection| {
        worker.watch(connection, Interest::Readable, next).unwrap();
    });
    worker.run()
}

fn serve_on_threads(worker: &Worker, listener: &Listener) -> cluster::Result<()> {
    let token = worker.disconnect_token();
    for connection in listener.incoming() {
        let (mut stream, guard) = connection?.into_parts();
        let token = token.clone();
        std::thread::spawn(move || {
            while let Ok(true) = answer(&mut stream, !token.is_disconnecting()) {}
            // Drop the guard last, so that the client receives end-of-file first.
            drop(stream);
            drop(guard);
        });
    }
    // Wait for the threads.
    worker.run()
}

/// Answers one request. Returns whether the connection stays open, which needs both `keeps_alive`
/// and the client's consent.
fn answer(connection: &mut (impl Read + Write), keeps_alive: bool) -> io::Result<bool> {
    let mut request = [0; 1024];
    let mut length = 0;
    while !request[..length].ends_with(b"\r\n\r\n") {
        match connection.read(&mut request[length..])? {
            0 => return Ok(false),
            more => length += more,
        }
    }
    let request = &request[..length];
    if request.starts_with(b"GET /work ") {
        std::thread::sleep(WORK);
    }
    let keeps_alive = keeps_alive && !request.ends_with(b"Connection: close\r\n\r\n");
    connection.write_all(if keeps_alive { ANSWER } else { LAST_ANSWER })?;
    Ok(keeps_alive)
}
