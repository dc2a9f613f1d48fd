//! Simulates clients. Each client thread keeps many connections in flight.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

use crate::peers::check_installed;
use crate::server::{GET, now};

/// Milliseconds without any answer after which the benchmark panics.
const ANSWER_TIMEOUT: u16 = 10_000;

/// A connection that the server has answered.
pub struct Answered<'a> {
    pub request: &'static [u8],
    /// The bytes that were read until the server closed the connection.
    pub answer: &'a [u8],
    /// The time when the client called `connect`. In [`drive_on_time`], the time when the client
    /// should have called `connect`.
    pub started: i64,
    /// The time when `connect` returned.
    pub connected: i64,
    pub ended: i64,
}

impl Answered<'_> {
    /// Returns the numbers in the answer's body.
    pub fn numbers(&self) -> Vec<i64> {
        let answer = std::str::from_utf8(self.answer).unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        body.split(' ')
            .map(|number| number.parse().unwrap())
            .collect()
    }
}

struct Client {
    stream: TcpStream,
    request: &'static [u8],
    answer: Vec<u8>,
    started: i64,
    connected: i64,
}

impl Client {
    fn connect(address: SocketAddr, request: &'static [u8]) -> Self {
        let started = now();
        let mut stream = TcpStream::connect(address).unwrap();
        let connected = now();
        stream.write_all(request).unwrap();
        let answer = Vec::new();
        Self {
            stream,
            request,
            answer,
            started,
            connected,
        }
    }

    fn answered(&self) -> Answered<'_> {
        let Self {
            request,
            answer,
            started,
            connected,
            ..
        } = self;
        let (request, started, connected) = (*request, *started, *connected);
        assert!(
            answer.starts_with(b"HTTP/1."),
            "{}",
            String::from_utf8_lossy(answer)
        );
        Answered {
            request,
            answer,
            started,
            connected,
            ended: now(),
        }
    }
}

/// The connections in flight.
struct Open {
    epoll: Epoll,
    clients: Vec<Option<Client>>,
    free: Vec<usize>,
    events: Vec<EpollEvent>,
}

impl Open {
    fn new() -> Self {
        Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap(),
            clients: Vec::new(),
            free: Vec::new(),
            events: vec![EpollEvent::empty(); 64],
        }
    }

    fn is_empty(&self) -> bool {
        self.free.len() == self.clients.len()
    }

    fn add(&mut self, client: Client) {
        let number = self.free.pop().unwrap_or_else(|| {
            self.clients.push(None);
            self.clients.len() - 1
        });
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
        let event = EpollEvent::new(interest, number as u64);
        self.epoll.add(&client.stream, event).unwrap();
        self.clients[number] = Some(client);
    }

    /// Waits until a connection is readable, and returns the connections that have been answered
    /// completely by then.
    fn answered(&mut self) -> Vec<Client> {
        let mut buffer = [0; 4096];
        let ready = self.epoll.wait(&mut self.events, ANSWER_TIMEOUT).unwrap();
        assert!(ready > 0, "no answer within ten seconds");
        let mut answered = Vec::new();
        for event in &self.events[..ready] {
            let number = usize::try_from(event.data()).unwrap();
            let client = self.clients[number].as_mut().unwrap();
            let length = client.stream.read(&mut buffer).unwrap();
            client.answer.extend_from_slice(&buffer[..length]);
            // If EPOLLRDHUP was reported before the read, the whole answer has been read, because
            // it is shorter than the buffer.
            if length == 0 || event.events().contains(EpollFlags::EPOLLRDHUP) {
                answered.extend(self.clients[number].take());
                self.free.push(number);
            }
        }
        answered
    }
}

/// Runs `clients` clients. Each client makes one connection after another until `next` returns
/// `None`.
pub fn drive(
    address: SocketAddr,
    clients: usize,
    mut next: impl FnMut() -> Option<&'static [u8]>,
    mut answered: impl FnMut(Answered<'_>),
) {
    let mut open = Open::new();
    for request in std::iter::from_fn(&mut next).take(clients) {
        open.add(Client::connect(address, request));
    }
    while !open.is_empty() {
        for client in open.answered() {
            answered(client.answered());
            // Start the next connection before the answered one is closed at the end of this
            // iteration, so that at least `clients` connections are open until `next` returns
            // `None`.
            if let Some(request) = next() {
                open.add(Client::connect(address, request));
            }
        }
    }
}

/// Starts a client at each given time of the monotonic clock, even if other clients still wait for
/// their answers. A client's wait counts from the given time, not from the actual `connect`.
pub fn drive_on_time(
    address: SocketAddr,
    requests: impl IntoIterator<Item = (i64, &'static [u8])>,
    mut answered: impl FnMut(Answered<'_>),
) {
    let mut open = Open::new();
    let mut requests = requests.into_iter().peekable();
    while requests.peek().is_some() || !open.is_empty() {
        while let Some((started, request)) = requests.next_if(|(time, _)| *time <= now()) {
            let mut client = Client::connect(address, request);
            client.started = started;
            open.add(client);
        }
        if let Some((next, _)) = requests.peek() {
            let left = Duration::from_nanos((next - now()).max(0).unsigned_abs());
            // Wait with `ppoll`, because `epoll_wait` has a resolution of only milliseconds.
            let mut ready = [PollFd::new(open.epoll.0.as_fd(), PollFlags::POLLIN)];
            if ppoll(&mut ready, Some(left.into()), None).unwrap() == 0 {
                continue;
            }
        }
        for client in open.answered() {
            answered(client.answered());
        }
    }
}

/// The work that the clients did, and their CPU time.
pub struct Load {
    pub connections: u64,
    /// User and system time of the clients.
    pub cpu: Duration,
}

/// Makes short connections for one second, with `wrk` as the client if it is installed and with
/// [`drive`] otherwise. The clients have one thread per core, so that no core goes idle. Waking an
/// idle core would dominate the measurement.
pub fn short_connections(address: SocketAddr, clients: usize) -> Load {
    let threads = cluster::available_parallelism();
    if !has_wrk() {
        let before = used_by(UsageWho::RUSAGE_SELF);
        let connections = own_clients(address, clients, threads);
        let cpu = used_by(UsageWho::RUSAGE_SELF) - before;
        return Load { connections, cpu };
    }
    let before = used_by(UsageWho::RUSAGE_CHILDREN);
    let output = Command::new("wrk")
        .args(["-d1s", &format!("-t{threads}"), &format!("-c{clients}")])
        .args(["-H", "Connection: close", &format!("http://{address}/")])
        .output()
        .unwrap();
    let cpu = used_by(UsageWho::RUSAGE_CHILDREN) - before;
    let output = String::from_utf8(output.stdout).unwrap();
    assert!(
        !output.contains("Non-2xx") && !output.contains("Socket errors"),
        "{output}"
    );
    let count = output
        .lines()
        .find_map(|line| line.trim().split_once(" requests in "));
    let connections = count.unwrap().0.parse().unwrap();
    Load { connections, cpu }
}

pub fn has_wrk() -> bool {
    check_installed("wrk", "-v").is_ok()
}

fn own_clients(address: SocketAddr, clients: usize, threads: usize) -> u64 {
    let end = Instant::now() + Duration::from_secs(1);
    let count = || {
        let mut count = 0;
        let next = || (Instant::now() < end).then_some(GET);
        drive(address, clients / threads, next, |_| count += 1);
        count
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(count)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    })
}

/// Returns the user and system time of `who`.
fn used_by(who: UsageWho) -> Duration {
    let usage = getrusage(who).unwrap();
    let micros = |time: TimeVal| time.tv_sec() * 1_000_000 + time.tv_usec();
    let micros = micros(usage.user_time()) + micros(usage.system_time());
    Duration::from_micros(micros.unsigned_abs())
}
