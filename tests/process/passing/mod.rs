//! Tests that an upgrade passes idle connections to the new master.

mod messages;
mod successors;
mod upgrades;

use std::cell::Cell;
use std::io::{BufRead as _, BufReader, IoSlice, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::parent_id;
use std::rc::Rc;
use std::time::Duration;

use cluster::pool::{Pool, PoolOptions, ignore_pool_signals};
use cluster::{Connection, ListenOptions, Master, Role, SchedulingPolicy, Worker};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::fstat;
use nix::unistd::{Pid, getegid, geteuid};

use crate::harness::{Scenario, scaled};
use crate::pool::{ADDRESS, RELEASE, Server};

/// The scenarios of all modules.
pub const SCENARIOS: &[&[Scenario]] = &[
    messages::SCENARIOS,
    successors::SCENARIOS,
    upgrades::SCENARIOS,
];

const MS: Duration = Duration::from_millis(1);

/// Request that keeps the worker busy until the client sends another line.
const HOLD: &str = "hold";

/// Runs a server whose workers answer each line with their master's process id and the number of
/// requests of the connection.
fn server(options: PoolOptions) {
    let address = std::env::var(ADDRESS).unwrap();
    let release = std::fs::read_to_string(std::env::var(RELEASE).unwrap()).unwrap();
    if release == "exits" {
        std::process::exit(1);
    }
    let passed = cluster::systemd::listen_fds().unwrap();
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let policy = match release.as_str() {
                "rr" => SchedulingPolicy::RoundRobin,
                "none" => SchedulingPolicy::Shared,
                _ => master.scheduling_policy(),
            };
            master.set_scheduling_policy(policy).unwrap();
            let pool = Pool::new(&master, options);
            pool.adopt(&master, passed).unwrap();
            pool.listen(&master, address.as_str()).unwrap();
            let own = std::process::id();
            println!("master {own}");
            pool.on_event(move |_, _, event| println!("{own}: {event}"));
            master.on_error(move |_, _, error| println!("{own}: error: {error}"));
            pool.on_default_signals(&master).unwrap();
            master.run().unwrap();
            println!("{own}: {:?}", master.ledger());
        }
        Role::Worker(worker) => {
            ignore_pool_signals(&worker).unwrap();
            // Some clients are silent during several upgrades, which take long on a busy machine.
            let options = ListenOptions::from(address.as_str()).idle_timeout(scaled(60_000 * MS));
            let options = options.wait_for_data(release == "waits for data");
            for connection in worker.listen(options).unwrap().incoming() {
                answer(connection.unwrap());
            }
        }
    }
}

fn answer(mut connection: Connection) {
    let line = |connection: &mut Connection| {
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') {
            match connection.read(&mut byte) {
                Ok(1) => line.push(byte[0]),
                _ => return None,
            }
        }
        Some(line)
    };
    let Some(mut request) = line(&mut connection) else {
        return;
    };
    if request.starts_with(HOLD.as_bytes()) {
        let _ = connection.write_all(b"held\n");
        let Some(next) = line(&mut connection) else {
            return;
        };
        request = next;
    }
    let answer = format!("{} {}\n", parent_id(), connection.requests());
    if !request.is_empty() && connection.write_all(answer.as_bytes()).is_ok() {
        connection.park();
    }
}

/// A client that keeps its connection open.
struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        let patience = Some(scaled(Duration::from_secs(40)));
        stream.set_read_timeout(patience).unwrap();
        Self(BufReader::new(stream))
    }

    fn send(&mut self, request: &str) {
        let line = format!("{request}\n");
        self.0.get_mut().write_all(line.as_bytes()).unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Returns the master whose worker has answered, and the number of requests.
    fn receive(&mut self) -> (Pid, u64) {
        let line = self.line();
        let (master, requests) = line.split_once(' ').expect("an answer");
        let master = Pid::from_raw(master.parse().unwrap());
        (master, requests.parse().unwrap())
    }

    fn ask(&mut self) -> (Pid, u64) {
        self.send("ask");
        self.receive()
    }
}

fn clients(server: &Server, count: usize) -> Vec<Client> {
    let master = server.master();
    let connect = |_| {
        let mut client = Client::connect(server.address);
        assert_eq!(client.ask(), (master, 1));
        client
    };
    (0..count).map(connect).collect()
}

/// Starts an upgrade, and waits until the new master has taken over. Returns the old master.
fn take_over(server: &Server) -> Pid {
    let old = server.master();
    upgrade(server, old);
    old
}

fn upgrade(server: &Server, old: Pid) {
    let before = server.count("this master has taken over");
    kill(old, Signal::SIGUSR2).unwrap();
    server.wait_for("this master has taken over", before + 1);
}

/// Checks that no master has reported an error, and that none but the last one has closed an idle
/// connection or dropped a connection.
fn assert_nothing_closed(server: &Server) {
    let output = server.group.output();
    assert!(!output.contains("error: "), "{output}");
    let last = format!("{}:", server.master());
    let ledgers = output.lines().filter(|line| line.contains("Ledger {"));
    for ledger in ledgers.filter(|line| !line.starts_with(&last)) {
        assert!(ledger.contains(" idle_closed: 0,"), "{ledger}");
        assert!(ledger.contains(" dropped: 0 "), "{ledger}");
    }
}

fn serve(worker: Worker) {
    for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
        answer(connection.unwrap());
    }
}

/// Counts the master's errors, and asserts that they concern no worker.
fn count_errors(master: &Master) -> Rc<Cell<u32>> {
    let errors = Rc::new(Cell::new(0));
    let counted = Rc::clone(&errors);
    master.on_error(move |_, worker, error| {
        assert!(worker.is_none(), "{error}");
        counted.set(counted.get() + 1);
    });
    errors
}

/// The version of the messages between two masters.
pub const VERSION: u8 = 2;

/// Returns the bytes of a message that passes connections of a listening socket. `parked` contains
/// the number of requests of each connection. The workers that parked them had this process's user.
pub fn message(version: u8, count: u8, socket: &impl std::os::fd::AsFd, parked: &[u32]) -> Vec<u8> {
    let socket = fstat(socket).unwrap();
    let mut bytes = vec![version, count];
    bytes.extend(socket.st_dev.to_be_bytes());
    bytes.extend(socket.st_ino.to_be_bytes());
    let user = [geteuid().as_raw(), getegid().as_raw()];
    for parked in parked {
        bytes.extend(parked.to_be_bytes());
        user.iter().for_each(|id| bytes.extend(id.to_be_bytes()));
    }
    bytes
}

pub fn send(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let rights = if fds.is_empty() { &[][..] } else { &rights };
    let bytes = [IoSlice::new(bytes)];
    sendmsg::<()>(stream.as_raw_fd(), &bytes, rights, MsgFlags::empty(), None).unwrap();
}
