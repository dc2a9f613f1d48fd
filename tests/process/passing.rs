//! Tests that an upgrade passes idle connections to the new master.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{BufRead as _, BufReader, IoSlice, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::parent_id;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cluster::pool::{Pool, PoolOptions, ignore_pool_signals};
use cluster::{Connection, Error, Ledger, ListenOptions, Master, Role, SchedulingPolicy, Worker};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::fstat;
use nix::unistd::Pid;

use crate::harness::{
    cluster, in_background, is_alive, is_watched, scaled, wait_until, when_listening,
};
use crate::parked::when_ledger;
use crate::pool::{ADDRESS, RELEASE, Server, pid, quick, wait_for_exit};

crate::scenarios! {
    idle_connections_outlive_upgrades_rr
    idle_connections_outlive_upgrades_none
    idle_connections_outlive_upgrades_sharded
    idle_connections_outlive_changes_of_the_policy
    silent_connections_outlive_upgrades
    connection_parked_while_draining_goes_to_the_new_master_rr
    connection_parked_while_draining_goes_to_the_new_master_none
    connection_parked_in_the_first_of_three_masters_goes_to_the_third
    requests_at_the_takeover_are_answered_rr
    requests_at_the_takeover_are_answered_none
    requests_at_the_takeover_are_answered_sharded
    failed_upgrade_keeps_idle_connections
    idle_connections_stay_if_sigquit_ends_the_old_master
    stop_ends_at_the_deadline_if_the_successor_never_reads
    connections_are_held_again_if_the_successor_is_gone
    passed_connection_keeps_its_number_of_requests_rr
    passed_connection_keeps_its_number_of_requests_none
    invalid_messages_of_a_predecessor_are_discarded
    connections_beyond_the_descriptor_limit_are_closed_and_counted
}

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
            let options = ListenOptions::from(address.as_str());
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

/// Clients that send one request after another on their connections, until this value is dropped.
struct Busy {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Busy {
    fn start(address: SocketAddr, count: usize) -> Self {
        let (stop, answered) = <(Arc<AtomicBool>, Arc<AtomicU64>)>::default();
        let client = |_| {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            std::thread::spawn(move || {
                let mut client = Client::connect(address);
                for number in 1.. {
                    assert_eq!(client.ask().1, number);
                    answered.fetch_add(1, Ordering::SeqCst);
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                }
            })
        };
        let threads = (0..count).map(client).collect();
        Self {
            stop,
            answered,
            threads,
        }
    }

    /// Waits until `count` more requests have been answered.
    fn wait(&self, count: u64) {
        let end = self.answered.load(Ordering::SeqCst) + count;
        wait_until("answers", || {
            (self.answered.load(Ordering::SeqCst) >= end).then_some(())
        });
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        let threads = self.threads.into_iter();
        threads.for_each(|thread| thread.join().expect("each request is answered"));
    }
}

fn idle_connections_outlive_upgrades_rr() {
    idle_connections_outlive_upgrades("rr");
}

fn idle_connections_outlive_upgrades_none() {
    idle_connections_outlive_upgrades("none");
}

fn idle_connections_outlive_upgrades_sharded() {
    idle_connections_outlive_upgrades("sharded");
}

fn idle_connections_outlive_upgrades(policy: &str) {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start(policy);
    let mut idle = clients(&server, 100);
    let busy = Busy::start(server.address, 4);
    for upgrade in 1..=3 {
        busy.wait(20);
        let old = take_over(&server);
        wait_for_exit(old);
        let master = server.master();
        assert_ne!(master, old);
        for client in &mut idle[..50] {
            assert_eq!(client.ask(), (master, upgrade + 1));
        }
    }
    busy.end();
    for client in &mut idle[50..] {
        assert_eq!(client.ask(), (server.master(), 2));
    }
    drop(idle);
    server.stop_and_check(assert_nothing_closed);
}

/// Each release uses another policy than the one before.
fn idle_connections_outlive_changes_of_the_policy() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("sharded");
    let mut clients = clients(&server, 20);
    for (upgrade, policy) in ["rr", "none", "rr"].iter().enumerate() {
        server.release(policy);
        wait_for_exit(take_over(&server));
        for client in &mut clients {
            assert_eq!(client.ask(), (server.master(), upgrade as u64 + 2));
        }
    }
    drop(clients);
    server.stop_and_check(assert_nothing_closed);
}

/// The clients send their first request only after the upgrade.
fn silent_connections_outlive_upgrades() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    server.release("waits for data");
    wait_for_exit(take_over(&server));
    let clients = (0..20).map(|_| Client::connect(server.address));
    let mut clients: Vec<_> = clients.collect();
    // This client connects last, so the master has accepted the others.
    assert_eq!(Client::connect(server.address).ask(), (server.master(), 1));
    wait_for_exit(take_over(&server));
    for client in &mut clients {
        assert_eq!(client.ask(), (server.master(), 1));
        assert_eq!(client.ask(), (server.master(), 2));
    }
    drop(clients);
    server.stop_and_check(assert_nothing_closed);
}

fn connection_parked_while_draining_goes_to_the_new_master_rr() {
    connection_parked_while_draining_goes_to_the_new_master("rr");
}

fn connection_parked_while_draining_goes_to_the_new_master_none() {
    connection_parked_while_draining_goes_to_the_new_master("none");
}

/// Checks two clients. Only the connection of the second client has been parked before the upgrade.
fn connection_parked_while_draining_goes_to_the_new_master(policy: &str) {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start(policy);
    let mut clients = [false, true].map(|is_parked| {
        let mut client = Client::connect(server.address);
        if is_parked {
            client.ask();
        }
        client.send(HOLD);
        assert_eq!(client.line(), "held");
        (client, 1 + u64::from(is_parked))
    });
    let old = take_over(&server);
    assert!(is_alive(pid(old)), "its workers are busy");
    for (client, requests) in &mut clients {
        assert_eq!(client.ask(), (old, *requests));
        let (master, count) = client.ask();
        assert_eq!(count, *requests + 1);
        // With a shared listener, the old worker may receive the next request before it learns that
        // it is disconnecting.
        assert!(master == server.master() || policy == "none" && master == old);
    }
    wait_for_exit(old);
    for (client, requests) in &mut clients {
        assert_eq!(client.ask(), (server.master(), *requests + 2));
    }
    drop(clients);
    server.stop_and_check(assert_nothing_closed);
}

fn connection_parked_in_the_first_of_three_masters_goes_to_the_third() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    let mut client = Client::connect(server.address);
    assert_eq!(client.ask(), (server.master(), 1));
    client.send(HOLD);
    assert_eq!(client.line(), "held");
    let first = take_over(&server);
    let second = take_over(&server);
    wait_until("the exits of the second master's workers", || {
        let output = server.group.output();
        let of_second = format!("{second}: slot");
        let exited = output.lines().filter(|line| line.starts_with(&of_second));
        let exited = exited.filter(|line| line.ends_with("has exited"));
        (exited.count() == 2).then_some(())
    });
    // Without anything to wait for, the second master would exit within milliseconds.
    std::thread::sleep(100 * MS);
    assert!(is_alive(pid(second)), "the first master still serves");
    assert_eq!(client.ask(), (first, 2));
    wait_for_exit(first);
    wait_for_exit(second);
    assert_eq!(client.ask(), (server.master(), 3));
    drop(client);
    server.stop_and_check(assert_nothing_closed);
}

fn requests_at_the_takeover_are_answered_rr() {
    requests_at_the_takeover_are_answered("rr");
}

fn requests_at_the_takeover_are_answered_none() {
    requests_at_the_takeover_are_answered("none");
}

fn requests_at_the_takeover_are_answered_sharded() {
    requests_at_the_takeover_are_answered("sharded");
}

fn requests_at_the_takeover_are_answered(policy: &str) {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start(policy);
    let mut clients = clients(&server, 40);
    for round in 1..=3 {
        let old = server.master();
        kill(old, Signal::SIGUSR2).unwrap();
        // Send requests before, during and after the takeover.
        let mut clients = clients.iter_mut().collect::<Vec<_>>().into_iter();
        let mut sent = Vec::new();
        for client in clients.by_ref().take(20) {
            client.send("ask");
            sent.push(client);
            // The pauses spread the requests over the takeover.
            std::thread::sleep(3 * MS);
        }
        server.wait_for("this master has taken over", round);
        for client in clients {
            client.send("ask");
            sent.push(client);
        }
        for client in sent {
            assert_eq!(client.receive().1, round as u64 + 1);
        }
        wait_for_exit(old);
    }
    drop(clients);
    server.stop_and_check(assert_nothing_closed);
}

fn failed_upgrade_keeps_idle_connections() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    let mut clients = clients(&server, 20);
    let master = server.master();
    server.release("exits");
    kill(master, Signal::SIGUSR2).unwrap();
    wait_until("a failed upgrade", || {
        let output = server.group.output();
        output.contains("the new master failed").then_some(())
    });
    for client in &mut clients {
        assert_eq!(client.ask(), (master, 2));
    }
    server.release("good");
    wait_until("the exit of the rejected master", || {
        let others = server.masters().into_iter();
        let mut others = others.filter(|other| *other != master);
        (!others.any(|other| is_alive(pid(other)))).then_some(())
    });
    upgrade(&server, master);
    wait_for_exit(master);
    for client in &mut clients {
        assert_eq!(client.ask(), (server.master(), 3));
    }
    drop(clients);
    server.stop_and_check(assert_nothing_closed);
}

/// The old master receives SIGQUIT while one of its workers is busy. The old master then kills its
/// workers and exits.
fn idle_connections_stay_if_sigquit_ends_the_old_master() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    let mut clients = clients(&server, 20);
    let mut busy = Client::connect(server.address);
    busy.send(HOLD);
    assert_eq!(busy.line(), "held");
    let old = take_over(&server);
    kill(old, Signal::SIGQUIT).unwrap();
    wait_for_exit(old);
    for client in &mut clients {
        assert_eq!(client.ask(), (server.master(), 2));
    }
    drop((clients, busy));
    server.stop();
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

/// Starts a worker, and passes the connections of `count` clients to a successor once the worker
/// listens. Calls `then` with the successor's end of the stream and the clients, whose connections
/// have been parked.
fn with_successor(
    master: &Master,
    count: usize,
    deadline: Duration,
    then: impl FnOnce(&Master, UnixStream, Vec<Client>) + 'static,
) {
    when_listening(master, 1, move |master, address| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        master.pass_parked(ours, deadline).unwrap();
        let ask = move || {
            let mut clients: Vec<_> = (0..count).map(|_| Client::connect(address)).collect();
            for client in &mut clients {
                assert_eq!(client.ask().1, 1);
            }
            clients
        };
        in_background(master, ask, move |master, clients| {
            let mut rest = Some((then, theirs, clients));
            let own = Rc::new(Cell::new(None));
            let id = Rc::clone(&own);
            own.set(Some(master.set_interval(MS, move |master| {
                if master.ledger().parked == count as u64 {
                    master.clear_timer(id.get().unwrap());
                    let (then, theirs, clients) = rest.take().unwrap();
                    then(master, theirs, clients);
                }
            })));
        });
    });
    drop(master.fork().unwrap());
}

fn stop_ends_at_the_deadline_if_the_successor_never_reads() {
    const CLIENTS: usize = 40;
    const DEADLINE: Duration = Duration::from_millis(1500);
    let start = Instant::now();
    let kept = Rc::new(RefCell::new(None));
    let ledger = Rc::new(Cell::new(None));
    let noted = Rc::clone(&ledger);
    cluster(
        |master| {
            let errors = count_errors(master);
            with_successor(master, CLIENTS, DEADLINE, move |master, theirs, clients| {
                let passed = master.ledger().passed;
                assert!((1..CLIENTS as u64).contains(&passed), "{passed}");
                kept.replace(Some((theirs, clients)));
                master.disconnect();
                let begin = Instant::now();
                master.on_error(move |master, _, error| {
                    let is_timeout = matches!(error, Error::Io { reason, .. }
                        if reason.kind() == std::io::ErrorKind::TimedOut);
                    assert!(is_timeout, "{error}");
                    assert!(begin.elapsed() <= DEADLINE + scaled(500 * MS));
                    assert_eq!(errors.get(), 1);
                    noted.set(Some(master.ledger()));
                    drop(kept.take());
                });
            });
        },
        serve,
    );
    assert!(start.elapsed() >= DEADLINE);
    let ledger = ledger.take().expect("the error is reported");
    assert_eq!(ledger.passed + ledger.idle_closed, CLIENTS as u64);
}

fn connections_are_held_again_if_the_successor_is_gone() {
    const CLIENTS: usize = 40;
    cluster(
        |master| {
            let errors = count_errors(master);
            let deadline = scaled(Duration::from_secs(60));
            with_successor(master, CLIENTS, deadline, move |master, theirs, clients| {
                let passed = usize::try_from(master.ledger().passed).unwrap();
                assert!((1..CLIENTS).contains(&passed), "{passed}");
                drop(theirs);
                let mut clients = clients;
                let ask = move || {
                    for client in &mut clients[passed..] {
                        assert_eq!(client.ask().1, 2);
                    }
                    clients
                };
                in_background(master, ask, move |master, clients| {
                    assert_eq!(errors.get(), 1);
                    drop(clients);
                    master.disconnect();
                });
            });
        },
        serve,
    );
}

/// Returns the bytes of a message that passes connections of a listening socket. `parked` contains
/// the number of requests of each connection.
pub fn message(version: u8, count: u8, socket: &impl std::os::fd::AsFd, parked: &[u32]) -> Vec<u8> {
    let socket = fstat(socket).unwrap();
    let mut bytes = vec![version, count];
    bytes.extend(socket.st_dev.to_be_bytes());
    bytes.extend(socket.st_ino.to_be_bytes());
    parked
        .iter()
        .for_each(|parked| bytes.extend(parked.to_be_bytes()));
    bytes
}

pub fn send(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let rights = if fds.is_empty() { &[][..] } else { &rights };
    let bytes = [IoSlice::new(bytes)];
    sendmsg::<()>(stream.as_raw_fd(), &bytes, rights, MsgFlags::empty(), None).unwrap();
}

pub fn connect_pair(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

fn passed_connection_keeps_its_number_of_requests_rr() {
    passed_connection_keeps_its_number_of_requests(SchedulingPolicy::RoundRobin);
}

fn passed_connection_keeps_its_number_of_requests_none() {
    passed_connection_keeps_its_number_of_requests(SchedulingPolicy::Shared);
}

/// The passed connection's client sends its request before the first worker listens.
fn passed_connection_keeps_its_number_of_requests(policy: SchedulingPolicy) {
    cluster(
        move |master| {
            master.set_scheduling_policy(policy).unwrap();
            let socket = TcpListener::bind("127.0.0.1:0").unwrap();
            let (first, server_end) = connect_pair(&socket);
            let copy = socket.try_clone().unwrap();
            let address = copy.local_addr().unwrap().to_string();
            let listener = master.listen(socket).unwrap();
            let (ours, theirs) = UnixStream::pair().unwrap();
            let has_ended = Rc::new(Cell::new(false));
            let ended = Rc::clone(&has_ended);
            master
                .receive_parked(ours, move |_| ended.set(true))
                .unwrap();
            // Send the bytes one by one, as a stream may deliver them.
            let bytes = message(1, 1, &copy, &[6]);
            send(&theirs, &bytes[..1], &[server_end.as_raw_fd()]);
            bytes[1..]
                .iter()
                .for_each(|byte| send(&theirs, &[*byte], &[]));
            drop((server_end, copy));
            let mut client = Client(BufReader::new(first));
            client.send("ask");
            let ask = move || (client.receive().1, client.ask().1);
            in_background(master, ask, move |master, requests| {
                assert_eq!(requests, (7, 8));
                let resumed = match policy {
                    SchedulingPolicy::RoundRobin => 2,
                    _ => 0,
                };
                assert_eq!(master.ledger().resumed, resumed);
                assert!(!has_ended.get());
                drop((theirs, listener));
                master.disconnect();
            });
            let parked = |ledger: &Ledger| ledger.parked == 1;
            when_ledger(master, parked, move |master| {
                drop(master.fork_with([("LISTEN", address)]).unwrap());
            });
        },
        |worker| {
            let address = std::env::var("LISTEN").unwrap();
            for connection in worker.listen(address.as_str()).unwrap().incoming() {
                answer(connection.unwrap());
            }
        },
    );
}

fn invalid_messages_of_a_predecessor_are_discarded() {
    cluster(
        |master| {
            let listener = master.listen("127.0.0.1:0").unwrap();
            let other = TcpListener::bind("127.0.0.1:0").unwrap();
            let (_client, connection) = connect_pair(&other);
            let file = File::open("/dev/null").unwrap();
            let [connection, file, listening] =
                [connection.as_raw_fd(), file.as_raw_fd(), other.as_raw_fd()];
            let socket = listener.as_fd();
            let unknown = message(2, 1, &socket, &[1]);
            let none = message(1, 0, &socket, &[]);
            let many = message(1, 65, &socket, &[1; 65]);
            let foreign = message(1, 1, &other, &[1]);
            let one = message(1, 1, &socket, &[1]);
            let three = message(1, 3, &socket, &[1; 3]);
            // Each case has a message, its descriptors, the number of connections that are counted,
            // and the number of errors.
            let cases: [(&[u8], Vec<RawFd>, u64, u32); 10] = [
                (&unknown, vec![connection; 3], 3, 1),
                (&none, vec![connection], 1, 1),
                (&many, vec![connection; 65], 65, 1),
                (&foreign, vec![connection], 1, 0),
                (&one, vec![file], 1, 0),
                (&one, vec![listening], 1, 0),
                (&one, vec![connection; 100], 100, 1),
                (&one[..9], vec![connection; 2], 2, 0),
                (&three, vec![file; 2], 3, 0),
                (&[], vec![], 0, 0),
            ];
            let errors = count_errors(master);
            let left = Rc::new(Cell::new(cases.len()));
            let (mut counted, mut reported) = (0, 0);
            for (bytes, fds, count, error) in cases {
                let (ours, theirs) = UnixStream::pair().unwrap();
                let left = Rc::clone(&left);
                master
                    .receive_parked(ours, move |_| left.set(left.get() - 1))
                    .unwrap();
                if !bytes.is_empty() {
                    send(&theirs, bytes, &fds);
                    send(&theirs, &[9; 300], &fds[..1]);
                }
                // The second message has one descriptor and an unknown version, so its connection
                // is lost too. A stream reports at most one invalid message.
                counted += count + u64::from(!bytes.is_empty());
                reported += error.max(u32::from(!bytes.is_empty()));
            }
            drop(other);
            let own = Rc::new(Cell::new(None));
            let id = Rc::clone(&own);
            let mut listener = Some(listener);
            own.set(Some(master.set_interval(MS, move |master| {
                if left.get() == 0 {
                    master.clear_timer(id.get().unwrap());
                    let ledger = master.ledger();
                    assert_eq!((ledger.parked, ledger.idle_closed), (counted, counted));
                    assert_eq!(errors.get(), reported);
                    drop(listener.take());
                }
            })));
        },
        |_| unreachable!("no worker"),
    );
}

fn connections_beyond_the_descriptor_limit_are_closed_and_counted() {
    cluster(
        |master| {
            let listener = master.listen("127.0.0.1:0").unwrap();
            let address: SocketAddr = listener.address().to_string().parse().unwrap();
            let client = TcpStream::connect(address).unwrap();
            let (ours, theirs) = UnixStream::pair().unwrap();
            let has_ended = Rc::new(Cell::new(false));
            let ended = Rc::clone(&has_ended);
            master
                .receive_parked(ours, move |_| ended.set(true))
                .unwrap();
            let bytes = message(1, 64, &listener.as_fd(), &[1; 64]);
            send(&theirs, &bytes, &[client.as_raw_fd(); 64]);
            drop(theirs);
            let errors = count_errors(master);
            let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            let free = File::open("/dev/null").unwrap().as_raw_fd();
            setrlimit(
                Resource::RLIMIT_NOFILE,
                free.unsigned_abs() as u64 + 10,
                hard,
            )
            .unwrap();
            let own = Rc::new(Cell::new(None));
            let id = Rc::clone(&own);
            let mut kept = Some((listener, client));
            own.set(Some(master.set_interval(MS, move |master| {
                if has_ended.get() {
                    master.clear_timer(id.get().unwrap());
                    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
                    let ledger = master.ledger();
                    assert_eq!(ledger.parked, 64);
                    // The kernel has found at most 10 free descriptors.
                    assert!((54..64).contains(&ledger.idle_closed), "{ledger:?}");
                    assert_eq!(ledger.in_flight(), 64 - ledger.idle_closed);
                    assert_eq!(errors.get(), 1);
                    drop(kept.take());
                }
            })));
        },
        |_| unreachable!("no worker"),
    );
}
