//! Short connections, by both policies, while workers die.

use std::cell::Cell;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;

use cluster::{AddressType, Listener, Master, Settings, Worker};
use nix::sys::signal::raise;

use crate::client::Clients;
use crate::harness::{cluster, share_listeners};
use crate::long_lived::{LongLived, obey, turn_until};
use crate::measure::{Sample, Series};

crate::scenarios! {
    connections_by_round_robin
    connections_of_a_shared_listener
}

const UNIX: &str = "unix";
/// Set for a worker that dies after so many connections.
const LAST: &str = "LAST";
const SERVED_IN_A_LIFE: u32 = 500;

fn connections_by_round_robin() {
    cluster(|master| play(master, "round robin"), serve);
}

fn connections_of_a_shared_listener() {
    let play = |master: &Master| {
        share_listeners(master);
        play(master, "shared listener");
    };
    cluster(play, serve);
}

fn serve(worker: Worker) {
    if let Some(last) = std::env::var_os(LAST) {
        serve_and_die(&worker, last.to_str().unwrap());
    } else {
        let (tcp, unix) = listen(&worker);
        tcp.on_connection(|_, mut connection| answer(&mut connection));
        unix.on_connection(|_, mut connection| answer(&mut connection));
        obey(&worker, |_, _| unreachable!());
    }
}

fn listen(worker: &Worker) -> (Listener, Listener<std::os::unix::net::UnixStream>) {
    let tcp = worker.listen("127.0.0.1:0").unwrap();
    (tcp, worker.listen(Path::new(UNIX)).unwrap())
}

fn answer(connection: &mut impl Write) {
    // The client may have been reset by the end of another worker.
    let _ = connection.write_all(b"!");
}

/// Blocks in `accept` for one listener and has a callback for the other. All connections that it
/// gets are answered: it dies between two of them, and loses no client.
fn serve_and_die(worker: &Worker, last: &str) {
    let (tcp, unix) = listen(worker);
    let left = Rc::new(Cell::new(SERVED_IN_A_LIFE));
    let (count, how) = (Rc::clone(&left), last.to_owned());
    unix.on_connection(move |worker, mut connection| {
        answer(&mut connection);
        drop(connection);
        count_down(worker, &count, &how);
    });
    for connection in tcp.incoming() {
        answer(&mut connection.unwrap());
        count_down(worker, &left, last);
    }
}

fn count_down(worker: &Worker, left: &Cell<u32>, last: &str) {
    left.set(left.get().saturating_sub(1));
    match (left.get(), last) {
        (1.., _) => {}
        (0, "exit") => std::process::exit(0),
        (0, "kill") => raise(nix::sys::signal::SIGKILL).unwrap(),
        (0, _) => drop(worker.disconnect()),
    }
}

/// The worker that dies again and again.
#[derive(Default)]
struct Mortal {
    lives: Cell<u64>,
    /// Whether it gets another life.
    goes_on: Cell<bool>,
    listening: Cell<u32>,
}

impl Mortal {
    fn fork(&self, master: &Master) {
        let last = ["exit", "kill", "disconnect"][usize::try_from(self.lives.get() % 3).unwrap()];
        self.lives.set(self.lives.get() + 1);
        master.fork_with([(LAST, last)]).unwrap();
    }
}

fn play(master: &Master, name: &str) {
    let directory = tempfile::tempdir().unwrap();
    master.setup_master(Settings::default().cwd(directory.path()));
    master.on_error(|_, _, error| panic!("{error}"));
    let (mortal, address) = follow(master);
    let mut clients = Clients::new(master);
    let mut long_lived = LongLived::new(master.fork().unwrap(), name);
    let mut series = Series::new(&format!("{name}, master"));
    turn_until(master, || mortal.listening.get() == 2);
    let unix = directory.path().join(UNIX);
    let mut played = 0;
    for _ in 0..crate::ROUNDS {
        start(master, &mortal);
        let tcp = address.get().unwrap();
        let times = crate::share(25_000);
        let failures = clients.connect(master, (tcp, &unix), times);
        assert_eq!(failures, 0, "of {times}");
        played += times;
        stop(master, &mortal, &long_lived);
        long_lived.measure(master);
        series.add(Sample::now());
    }
    clients.end();
    println!("{name}: {played} connections, {} lives", mortal.lives.get());
    series.check();
    long_lived.check();
    master.disconnect(|_| {});
}

/// Gives the mortal worker its lives, and finds out where the workers listen.
fn follow(master: &Master) -> (Rc<Mortal>, Rc<Cell<Option<SocketAddr>>>) {
    let (mortal, address) = (Rc::new(Mortal::default()), Rc::new(Cell::new(None)));
    let replaced = Rc::clone(&mortal);
    master.on_exit(move |master, _, _| {
        if replaced.goes_on.get() {
            replaced.fork(master);
        }
    });
    let (counted, found) = (Rc::clone(&mortal), Rc::clone(&address));
    master.on_listening(move |_, _, address| {
        counted.listening.set(counted.listening.get() + 1);
        if address.address_type == AddressType::Tcp4 {
            found.set(Some(address.to_string().parse().unwrap()));
        }
    });
    (mortal, address)
}

fn start(master: &Master, mortal: &Mortal) {
    mortal.goes_on.set(true);
    mortal.listening.set(0);
    mortal.fork(master);
    turn_until(master, || mortal.listening.get() == 2);
}

/// Waits until nothing is left of the round.
fn stop(master: &Master, mortal: &Mortal, long_lived: &LongLived) {
    mortal.goes_on.set(false);
    for worker in master.workers() {
        if worker.id() != long_lived.worker().id() {
            worker.disconnect();
        }
    }
    turn_until(master, || master.workers().len() == 1);
    turn_until(master, || master.ledger().in_hand() == 0);
}
