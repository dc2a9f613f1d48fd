//! Simulates keep-alive clients: thousands of connections in one thread.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};

use super::BODY;

/// Time without a complete answer after which a request has failed.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Delay before a client connects again after a failure. Without it, the clients of a server that
/// refuses every connection would use all CPU time.
const RETRY: Duration = Duration::from_millis(20);
/// Maximum number of idle and silent clients that connect or send at the same time. It is smaller
/// than the backlogs of all measured servers, because a full backlog delays clients by a second.
const WINDOW: usize = 64;
/// Maximum time between two checks for retries and the end of the run.
const TICK: Duration = Duration::from_millis(10);
/// Time between two checks for timeouts. A check visits all clients.
const EXPIRY: Duration = Duration::from_millis(500);

/// The clients of one thread.
#[derive(Clone, Copy)]
pub struct Plan {
    /// Number of clients that send one request after another.
    pub busy: usize,
    /// Number of clients that send one request at the start and one at the end.
    pub idle: usize,
    /// Number of clients that connect and send nothing.
    pub silent: usize,
    pub request: &'static [u8],
    /// Mean number of requests per second of all busy clients together. The gaps between requests
    /// are random. `None` if each busy client sends its next request as soon as it has an answer.
    pub rate: Option<f64>,
}

/// The observations of the clients of one run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Number of requests with the expected answer.
    pub ok: u64,
    /// Number of refused connections.
    pub refused: u64,
    /// Number of requests whose connection was reset or closed before the end of the answer.
    pub reset: u64,
    /// Number of requests without a complete answer after [`ANSWER_TIMEOUT`].
    pub timed_out: u64,
    /// Number of requests with an unexpected answer.
    pub wrong: u64,
    /// Number of idle clients whose connection did not carry both of their requests.
    pub idle_lost: u64,
    /// Number of silent clients whose connection the server closed.
    pub silent_closed: u64,
    /// Latencies of the busy clients' answered requests in microseconds. With a rate, a latency
    /// begins when the request was due, even if all busy clients were waiting then.
    pub latencies: Histogram<u64>,
}

impl Default for Outcome {
    fn default() -> Self {
        Self {
            ok: 0,
            refused: 0,
            reset: 0,
            timed_out: 0,
            wrong: 0,
            idle_lost: 0,
            silent_closed: 0,
            latencies: Histogram::new(3).unwrap(),
        }
    }
}

impl Outcome {
    pub fn failed(&self) -> u64 {
        self.refused + self.reset + self.timed_out + self.wrong
    }

    /// Returns a quantile of the latency in milliseconds, or infinity if there is no answer.
    pub fn latency(&self, quantile: f64) -> f64 {
        if self.latencies.is_empty() {
            return f64::INFINITY;
        }
        self.latencies.value_at_quantile(quantile) as f64 / 1e3
    }

    /// Describes the requests in one line.
    pub fn text(&self) -> String {
        let Self {
            ok,
            refused,
            reset,
            timed_out,
            wrong,
            ..
        } = self;
        let counts = format!(
            "{ok} answered; {refused} refused, {reset} reset, {timed_out} timed out, {wrong} wrong"
        );
        if self.latencies.is_empty() {
            return counts;
        }
        let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|quantile| self.latency(quantile));
        format!("{counts}; p50 {p50:.2}, p99 {p99:.2}, p99.9 {p999:.2} ms")
    }
}

/// Clients that run in their own thread.
pub struct Clients {
    must_stop: Arc<AtomicBool>,
    /// `None` after the end of the run.
    thread: Option<JoinHandle<Outcome>>,
}

impl Clients {
    /// Starts the clients. Returns when each idle client has its first answer or has failed, and
    /// each silent client is connected.
    pub fn start(address: SocketAddr, plan: Plan) -> Self {
        let must_stop = Arc::new(AtomicBool::new(false));
        let (set_up, is_set_up) = channel();
        let run = Run::new(address, plan, Arc::clone(&must_stop));
        let thread = Some(std::thread::spawn(move || run.run(&set_up)));
        // An error means that the thread has panicked. `stop` reports it.
        let _ = is_set_up.recv();
        Self { must_stop, thread }
    }

    /// Waits for the answers in flight and lets each idle client send its second request.
    pub fn stop(mut self) -> Outcome {
        self.must_stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Clients {
    /// Ends the thread, so that no clients disturb the next benchmark if this one panics.
    fn drop(&mut self) {
        self.must_stop.store(true, Ordering::Relaxed);
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Busy,
    Idle,
    Silent,
}

enum State {
    Connecting,
    /// The client has sent a request.
    Waiting,
    /// The client has an answer after which the server closes the connection.
    Closing,
    /// The client has no request in flight.
    Resting,
}

struct Client {
    kind: Kind,
    stream: TcpStream,
    state: State,
    /// The time when the current state began. With a rate, the time when the request was due.
    since: Instant,
    answer: Vec<u8>,
}

struct Run {
    address: SocketAddr,
    plan: Plan,
    must_stop: Arc<AtomicBool>,
    epoll: Epoll,
    clients: Vec<Option<Client>>,
    /// Unused indexes of `clients`.
    unused: Vec<usize>,
    /// The busy clients that rest, as indexes of `clients`.
    resting: VecDeque<usize>,
    /// The times at which busy clients connect again after a failure.
    retries: VecDeque<Instant>,
    /// Number of idle and silent clients that are connecting or waiting.
    settling: usize,
    random: fastrand::Rng,
    /// The time when the next request is due if the plan has a rate.
    due: Instant,
    next_expiry: Instant,
    outcome: Outcome,
}

impl Run {
    fn new(address: SocketAddr, plan: Plan, must_stop: Arc<AtomicBool>) -> Self {
        Self {
            address,
            plan,
            must_stop,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap(),
            clients: Vec::new(),
            unused: Vec::new(),
            resting: VecDeque::new(),
            retries: VecDeque::new(),
            settling: 0,
            // Use the same sequence of gaps for all servers.
            random: fastrand::Rng::with_seed(0),
            due: Instant::now(),
            next_expiry: Instant::now(),
            outcome: Outcome::default(),
        }
    }

    fn run(mut self, set_up: &Sender<()>) -> Outcome {
        let idle = std::iter::repeat_n(Kind::Idle, self.plan.idle);
        for kind in idle.chain(std::iter::repeat_n(Kind::Silent, self.plan.silent)) {
            self.poll_while(|run| run.settling >= WINDOW);
            self.connect(kind);
        }
        self.poll_while(|run| run.settling > 0);
        // Ignore the result: `start` waits for this message, so sending it does not fail.
        let _ = set_up.send(());
        (0..self.plan.busy).for_each(|_| self.connect(Kind::Busy));
        self.due = Instant::now();
        while !self.must_stop.load(Ordering::Relaxed) {
            self.connect_again();
            self.send_due_requests();
            self.poll();
        }
        self.poll_while(|run| run.is_any_busy_client_waiting());
        for index in 0..self.clients.len() {
            if self.is_resting_idle_client(index) {
                self.poll_while(|run| run.settling >= WINDOW);
            }
            // Check again, because the server may have closed the connection in the meantime.
            if self.is_resting_idle_client(index) {
                self.settling += 1;
                self.send(index, Instant::now());
            }
        }
        self.poll_while(|run| run.settling > 0);
        self.outcome
    }

    fn is_any_busy_client_waiting(&self) -> bool {
        let waits = |client: &Client| {
            client.kind == Kind::Busy && matches!(client.state, State::Waiting | State::Connecting)
        };
        self.clients.iter().flatten().any(waits)
    }

    fn is_resting_idle_client(&self, index: usize) -> bool {
        let client = self.clients[index].as_ref();
        client.is_some_and(|client| {
            client.kind == Kind::Idle && matches!(client.state, State::Resting)
        })
    }

    fn connect(&mut self, kind: Kind) {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let stream = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
        match connect(stream.as_raw_fd(), &SockaddrStorage::from(self.address)) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(error) => panic!("cannot connect to {}: {error}", self.address),
        }
        let index = self.unused.pop().unwrap_or_else(|| {
            self.clients.push(None);
            self.clients.len() - 1
        });
        let event = EpollEvent::new(EpollFlags::EPOLLOUT, index as u64);
        self.epoll.add(&stream, event).unwrap();
        self.settling += usize::from(kind != Kind::Busy);
        self.clients[index] = Some(Client {
            kind,
            stream: stream.into(),
            state: State::Connecting,
            since: Instant::now(),
            answer: Vec::new(),
        });
    }

    fn connect_again(&mut self) {
        let now = Instant::now();
        while self.retries.front().is_some_and(|time| *time <= now) {
            self.retries.pop_front();
            self.connect(Kind::Busy);
        }
    }

    fn send_due_requests(&mut self) {
        while let Some(index) = self.resting.front().copied() {
            let now = Instant::now();
            let due = match self.plan.rate {
                None => now,
                Some(_) if self.due > now => return,
                Some(rate) => {
                    let gap = -(1.0 - self.random.f64()).ln() / rate;
                    let next = self.due + Duration::from_secs_f64(gap);
                    std::mem::replace(&mut self.due, next)
                }
            };
            self.resting.pop_front();
            self.send(index, due);
        }
    }

    fn send(&mut self, index: usize, due: Instant) {
        let client = self.clients[index].as_mut().unwrap();
        (client.state, client.since) = (State::Waiting, due);
        match client.stream.write(self.plan.request) {
            Ok(written) => assert_eq!(written, self.plan.request.len()),
            Err(_) => self.fail(index, |outcome| &mut outcome.reset),
        }
    }

    fn poll_while(&mut self, condition: impl Fn(&Self) -> bool) {
        while condition(self) {
            self.poll();
        }
    }

    /// Waits until a connection is ready, a request is due, or [`TICK`] is over.
    fn poll(&mut self) {
        let now = Instant::now();
        if self.next_expiry <= now {
            self.next_expiry = now + EXPIRY;
            self.expire();
        }
        let mut timeout = TICK;
        if self.plan.rate.is_some() && !self.resting.is_empty() {
            timeout = timeout.min(self.due.saturating_duration_since(now));
        }
        // Wait with `ppoll`, because `epoll_wait` has a resolution of only milliseconds.
        let mut ready = [PollFd::new(self.epoll.0.as_fd(), PollFlags::POLLIN)];
        if ppoll(&mut ready, Some(timeout.into()), None).unwrap() == 0 {
            return;
        }
        let mut events = [EpollEvent::empty(); 64];
        let ready = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap();
        for event in &events[..ready] {
            self.handle(usize::try_from(event.data()).unwrap());
        }
    }

    /// Fails the requests that have waited for too long.
    fn expire(&mut self) {
        for index in 0..self.clients.len() {
            let Some(client) = &self.clients[index] else {
                continue;
            };
            let waits = !matches!(client.state, State::Resting);
            if waits && client.since.elapsed() > ANSWER_TIMEOUT {
                self.fail(index, |outcome| &mut outcome.timed_out);
            }
        }
    }

    fn handle(&mut self, index: usize) {
        let client = self.clients[index].as_mut().unwrap();
        if let State::Connecting = client.state {
            return self.connected(index);
        }
        let mut buffer = [0; 4096];
        match client.stream.read(&mut buffer) {
            Ok(0) => self.closed(index),
            Ok(length) => {
                client.answer.extend_from_slice(&buffer[..length]);
                self.received(index);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => self.closed(index),
        }
    }

    fn connected(&mut self, index: usize) {
        let client = self.clients[index].as_mut().unwrap();
        match client.stream.take_error().unwrap() {
            None => {}
            Some(error) if error.kind() == ErrorKind::ConnectionRefused => {
                return self.fail(index, |outcome| &mut outcome.refused);
            }
            Some(_) => return self.fail(index, |outcome| &mut outcome.reset),
        }
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN, index as u64);
        self.epoll.modify(&client.stream, &mut event).unwrap();
        match client.kind {
            Kind::Idle => self.send(index, Instant::now()),
            Kind::Busy | Kind::Silent => self.rest(index),
        }
    }

    /// Marks the client as resting. A busy client then waits for its next request.
    fn rest(&mut self, index: usize) {
        let client = self.clients[index].as_mut().unwrap();
        client.state = State::Resting;
        match client.kind {
            Kind::Busy => self.resting.push_back(index),
            Kind::Idle | Kind::Silent => self.settling -= 1,
        }
    }

    fn received(&mut self, index: usize) {
        let client = self.clients[index].as_mut().unwrap();
        let keeps_alive = match Answer::parse(&client.answer) {
            Answer::Partial => return,
            Answer::Complete { keeps_alive } if matches!(client.state, State::Waiting) => {
                keeps_alive
            }
            Answer::Complete { .. } | Answer::Wrong => {
                return self.fail(index, |outcome| &mut outcome.wrong);
            }
        };
        client.answer.clear();
        self.outcome.ok += 1;
        if client.kind == Kind::Busy {
            let micros = client.since.elapsed().as_micros();
            self.outcome
                .latencies
                .record(u64::try_from(micros).unwrap())
                .unwrap();
        }
        if keeps_alive {
            self.rest(index);
        } else {
            (client.state, client.since) = (State::Closing, Instant::now());
        }
    }

    /// Handles the end of a connection that the server has closed.
    fn closed(&mut self, index: usize) {
        let client = self.clients[index].as_ref().unwrap();
        match (&client.state, client.kind) {
            (State::Connecting | State::Waiting, _) => {
                return self.fail(index, |outcome| &mut outcome.reset);
            }
            (State::Closing, Kind::Busy) => {}
            (State::Resting, Kind::Busy) => self.resting.retain(|resting| *resting != index),
            (State::Closing, _) => {
                self.outcome.idle_lost += 1;
                self.settling -= 1;
            }
            (State::Resting, Kind::Idle) => self.outcome.idle_lost += 1,
            (State::Resting, Kind::Silent) => self.outcome.silent_closed += 1,
        }
        let kind = client.kind;
        self.remove(index);
        if kind == Kind::Busy && !self.must_stop.load(Ordering::Relaxed) {
            self.connect(kind);
        }
    }

    fn fail(&mut self, index: usize, count: fn(&mut Outcome) -> &mut u64) {
        *count(&mut self.outcome) += 1;
        self.resting.retain(|resting| *resting != index);
        let client = self.clients[index].as_ref().unwrap();
        match client.kind {
            Kind::Busy => self.retries.push_back(Instant::now() + RETRY),
            Kind::Idle | Kind::Silent => {
                self.outcome.idle_lost += u64::from(client.kind == Kind::Idle);
                self.settling -= usize::from(!matches!(client.state, State::Resting));
            }
        }
        self.remove(index);
    }

    fn remove(&mut self, index: usize) {
        // Dropping the stream removes it from the epoll instance, because there is no other copy.
        self.clients[index] = None;
        self.unused.push(index);
    }
}

enum Answer {
    Partial,
    Complete {
        /// Whether the server keeps the connection open.
        keeps_alive: bool,
    },
    Wrong,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Self {
        let mut headers = [httparse::EMPTY_HEADER; 16];
        let mut response = httparse::Response::new(&mut headers);
        let body = match response.parse(bytes) {
            Ok(httparse::Status::Complete(head)) => &bytes[head..],
            Ok(httparse::Status::Partial) => return Self::Partial,
            Err(_) => return Self::Wrong,
        };
        let header = |name: &str| {
            let mut headers = response.headers.iter();
            headers.find(|header| header.name.eq_ignore_ascii_case(name))
        };
        let length = header("Content-Length").map(|length| length.value);
        if response.code != Some(200)
            || length != Some(BODY.len().to_string().as_bytes())
            || !BODY.as_bytes().starts_with(body)
        {
            return Self::Wrong;
        }
        if body.len() < BODY.len() {
            return Self::Partial;
        }
        let connection = header("Connection").map(|connection| connection.value);
        let closes = connection.is_some_and(|value| value.eq_ignore_ascii_case(b"close"));
        let keeps_alive = !closes;
        Self::Complete { keeps_alive }
    }
}
