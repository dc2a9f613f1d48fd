//! Tests of workers that fail when they park a connection, in each of several ways.
//!
//! Connections that are idle at that moment stay open, and every request is served at most once.
//! Only the connection that is being parked may be lost with its worker.
//!
//! `CLUSTER_TEST_ROUNDS=N cargo test --test process hand_off_of_parked` plays every combination N
//! times.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use cluster::{ListenOptions, Worker};

use crate::hand_off::{
    BY_CALLBACK, Clients, MayLose, OTHER_PASSES, Outcome, Traffic, play_kills, play_worker_faults,
};
use crate::harness::with_env;
use crate::parked::{PARK, answer};

/// Connections that stay idle while the workers fail.
const IDLE: usize = 8;
/// Idle time after which a connection is closed. Idle connections stay open for all rounds.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// Connections that send requests while the workers fail, one after the other.
///
/// Only the first request of a connection reaches the fault points for parking. Two or three workers
/// take turns, so this number is no multiple of 2 or 3. Otherwise, every first request might reach
/// the worker that does not fail.
const BUSY: usize = 5;

crate::scenarios! {
    hand_off_of_parked_connections_survives_a_fault_before_parking: FAULT_POINTS
    hand_off_of_parked_connections_survives_a_fault_after_parking: FAULT_POINTS
    hand_off_of_parked_connections_survives_a_kill_before_parking: FAULT_POINTS
    hand_off_of_parked_connections_survives_a_kill_after_parking: FAULT_POINTS
    shared_listener_loses_only_connections_of_a_worker_that_fails_before_parking: FAULT_POINTS
    shared_listener_loses_only_connections_of_a_worker_that_fails_after_parking: FAULT_POINTS
}

fn hand_off_of_parked_connections_survives_a_fault_before_parking() {
    let may_lose = MayLose::ReceivedConnection;
    play_worker_faults(&ROUND_ROBIN, "worker.before_park", OTHER_PASSES, may_lose);
}

fn hand_off_of_parked_connections_survives_a_fault_after_parking() {
    let may_lose = MayLose::Nothing;
    play_worker_faults(&ROUND_ROBIN, "worker.after_park", OTHER_PASSES, may_lose);
}

fn hand_off_of_parked_connections_survives_a_kill_before_parking() {
    let may_lose = MayLose::ReceivedConnection;
    play_kills(&ROUND_ROBIN, "master.before_park", &[1, 2, 3, 7], may_lose);
}

fn hand_off_of_parked_connections_survives_a_kill_after_parking() {
    let may_lose = MayLose::ReceivedConnection;
    play_kills(&ROUND_ROBIN, "master.after_park", &[1, 2, 3, 7], may_lose);
}

fn shared_listener_loses_only_connections_of_a_worker_that_fails_before_parking() {
    play_with_shared_listener("worker.before_park");
}

fn shared_listener_loses_only_connections_of_a_worker_that_fails_after_parking() {
    play_with_shared_listener("worker.after_park");
}

fn play_with_shared_listener(point: &'static str) {
    with_env("CLUSTER_SCHED_POLICY", "none", || {
        play_worker_faults(&SHARED, point, OTHER_PASSES, MayLose::OwnConnections);
    });
}

const ROUND_ROBIN: Traffic = Traffic {
    clients: |address| Box::new(KeepAlive::connect(address, Lost::AnyConnection)),
    serve,
    // A worker answers one more request, but cannot park the connection afterwards.
    lost_by_closed_channel: 1,
    check: |ledger, outcome| {
        assert_eq!(ledger.accepted, outcome.connected);
        assert_eq!((ledger.dropped, ledger.expired), (0, 0));
        let may_be_received = outcome.answered..=outcome.answered + outcome.unanswered;
        assert!(may_be_received.contains(&ledger.received), "{ledger:?}");
    },
};

/// The master's ledger does not count the connections that workers accept.
const SHARED: Traffic = Traffic {
    clients: |address| Box::new(KeepAlive::connect(address, Lost::ConnectionOfFailingWorker)),
    serve,
    lost_by_closed_channel: 0,
    check: |ledger, _| assert_eq!((ledger.dropped, ledger.expired), (0, 0)),
};

fn serve(worker: Worker) {
    let options = ListenOptions::from("127.0.0.1:0").idle_timeout(IDLE_TIMEOUT);
    let listener = worker.listen(options).unwrap();
    if std::env::var_os(BY_CALLBACK).is_some() {
        listener.set_connection_callback(answer);
        return worker.run().unwrap();
    }
    for connection in listener.incoming() {
        answer(&worker, connection.unwrap());
    }
}

/// The connections that may be lost.
#[derive(Clone, Copy, PartialEq)]
enum Lost {
    AnyConnection,
    /// A connection whose last request was not served by the first worker, which does not fail.
    ConnectionOfFailingWorker,
}

struct KeepAlive {
    address: SocketAddr,
    lost: Lost,
    idle: Vec<Client>,
    busy: [Option<Client>; BUSY],
    /// What the idle clients add to the outcome of the first step.
    before: Outcome,
}

struct Client {
    stream: BufReader<TcpStream>,
    requests: u64,
    /// The id of the worker that served the last request, or 0.
    worker: u32,
}

impl Client {
    fn connect(address: SocketAddr, outcome: &mut Outcome) -> Self {
        outcome.connected += 1;
        Self {
            stream: BufReader::new(TcpStream::connect(address).unwrap()),
            requests: 0,
            worker: 0,
        }
    }

    /// Sends a request and checks the answer. Returns whether the connection is still open.
    fn ask(&mut self, outcome: &mut Outcome) -> bool {
        let mut line = String::new();
        let mut exchange = |stream: &mut BufReader<TcpStream>| {
            stream.get_mut().write_all(&[PARK])?;
            stream.read_line(&mut line)
        };
        match exchange(&mut self.stream) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) if is_hang_up(&error) => return false,
            Err(error) => panic!("{error}"),
        }
        let (worker, requests) = line.trim_end().split_once(' ').expect("an answer");
        self.worker = worker.parse().unwrap();
        // The number is greater if a worker that failed has served the request as well.
        assert_eq!(requests.parse(), Ok(self.requests + 1), "{line:?}");
        self.requests += 1;
        outcome.answered += 1;
        true
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    let kinds = [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
    kinds.contains(&error.kind())
}

impl KeepAlive {
    fn connect(address: SocketAddr, lost: Lost) -> Self {
        let mut before = Outcome::default();
        let idle = std::iter::repeat_with(|| {
            let mut client = Client::connect(address, &mut before);
            assert!(client.ask(&mut before), "the first worker does not fail");
            client
        });
        Self {
            address,
            lost,
            idle: idle.take(IDLE).collect(),
            busy: [const { None }; BUSY],
            before,
        }
    }
}

impl Clients for KeepAlive {
    /// Replaces one client by a new one, and sends a request from each.
    fn step(&mut self, outcome: &mut Outcome) {
        *outcome += std::mem::take(&mut self.before);
        // Send the first request at once, because a new connection occupies its worker until then.
        // If only one worker is left, it could serve no other client.
        self.busy.rotate_right(1);
        self.busy[0] = Some(Client::connect(self.address, outcome));
        for place in &mut self.busy {
            let Some(client) = place else { continue };
            if !client.ask(outcome) {
                let is_allowed = self.lost == Lost::AnyConnection || client.worker != 1;
                assert!(is_allowed, "the first worker's connection was closed");
                outcome.unanswered += 1;
                *place = None;
            }
        }
    }

    /// Sends a request from each idle client, and disconnects all clients.
    fn end(mut self: Box<Self>, outcome: &mut Outcome) {
        for client in &mut self.idle {
            assert!(client.ask(outcome), "an idle connection was closed");
        }
    }
}
