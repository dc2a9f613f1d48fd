//! Makes short connections under the round-robin and the shared policy, while workers exit and are
//! replaced.

use std::cell::Cell;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;

use cluster::{Listener, Master, Settings, Worker};
use nix::sys::signal::raise;

use crate::client::Clients;
use crate::harness::{cluster, share_listeners};
use crate::long_lived::{LongLived, run_orders, run_until};
use crate::measure::{Sample, Series};

crate::scenarios! {
    connections_with_round_robin_leave_memory_bounded
    connections_to_a_shared_listener_leave_memory_bounded
}

const UNIX: &str = "unix";
/// The environment variable of a worker that exits after `CONNECTIONS_PER_WORKER` connections. The
/// value is the way in which the worker exits.
const END: &str = "END";
const CONNECTIONS_PER_WORKER: u32 = 500;

fn connections_with_round_robin_leave_memory_bounded() {
    cluster(|master| play(master, "round robin"), serve);
}

fn connections_to_a_shared_listener_leave_memory_bounded() {
    let play = |master: &Master| {
        share_listeners(master);
        play(master, "shared listener");
    };
    cluster(play, serve);
}

fn serve(worker: Worker) {
    if let Some(end) = std::env::var_os(END) {
        serve_and_exit(&worker, end.to_str().unwrap());
    } else {
        let (tcp, unix) = listen(&worker);
        tcp.set_connection_callback(|_, mut connection| answer(&mut connection));
        unix.set_connection_callback(|_, mut connection| answer(&mut connection));
        run_orders(&worker, |_, _| unreachable!());
    }
}

fn listen(worker: &Worker) -> (Listener, Listener<std::os::unix::net::UnixStream>) {
    let tcp = worker.listen("127.0.0.1:0").unwrap();
    (tcp, worker.listen(Path::new(UNIX)).unwrap())
}

fn answer(connection: &mut impl Write) {
    // Ignore an error here. The client then receives no answer and counts a failure, and the test
    // asserts that there are no failures.
    let _ = connection.write_all(b"!");
}

/// Serves one listener with blocking `accept` and the other with a callback. The worker exits
/// between two connections, so it answers every connection that it receives.
fn serve_and_exit(worker: &Worker, end: &str) {
    let (tcp, unix) = listen(worker);
    let left = Rc::new(Cell::new(CONNECTIONS_PER_WORKER));
    let (count, copy) = (Rc::clone(&left), end.to_owned());
    unix.set_connection_callback(move |worker, mut connection| {
        answer(&mut connection);
        drop(connection);
        count_down(worker, &count, &copy);
    });
    for connection in tcp.incoming() {
        answer(&mut connection.unwrap());
        count_down(worker, &left, end);
    }
}

fn count_down(worker: &Worker, left: &Cell<u32>, end: &str) {
    left.set(left.get().saturating_sub(1));
    match (left.get(), end) {
        (1.., _) => {}
        (0, "exit") => std::process::exit(0),
        (0, "kill") => raise(nix::sys::signal::SIGKILL).unwrap(),
        (0, _) => drop(worker.disconnect()),
    }
}

/// State of the worker that exits and is replaced repeatedly.
#[derive(Default)]
struct ShortLived {
    started: Cell<u64>,
    /// Whether the worker is replaced when it exits.
    is_replaced: Cell<bool>,
    listening: Cell<u32>,
}

impl ShortLived {
    fn fork(&self, master: &Master) {
        let end = ["exit", "kill", "disconnect"][usize::try_from(self.started.get() % 3).unwrap()];
        self.started.set(self.started.get() + 1);
        master.fork_with([(END, end)]).unwrap();
    }
}

fn play(master: &Master, name: &str) {
    let directory = tempfile::tempdir().unwrap();
    master.setup_master(Settings::default().cwd(directory.path()));
    master.on_error(|_, _, error| panic!("{error}"));
    let (short_lived, address) = register_callbacks(master);
    let mut clients = Clients::new(master);
    let mut long_lived = LongLived::new(master.fork().unwrap(), name);
    let mut series = Series::new(&format!("{name}, master"));
    run_until(master, || short_lived.listening.get() == 2);
    let unix = directory.path().join(UNIX);
    let mut played = 0;
    for _ in 0..crate::ROUNDS {
        start(master, &short_lived);
        let tcp = address.get().unwrap();
        let times = crate::work_per_round(25_000);
        let failures = clients.connect(master, (tcp, &unix), times);
        assert_eq!(failures, 0, "of {times}");
        played += times;
        stop(master, &short_lived, &long_lived);
        long_lived.measure(master);
        series.add(Sample::now());
    }
    clients.end();
    println!(
        "{name}: {played} connections, {} short-lived workers",
        short_lived.started.get()
    );
    series.check();
    long_lived.check();
    master.disconnect();
}

/// Registers callbacks that replace the short-lived worker when it exits, count the listening
/// workers, and record their TCP address. Returns the values that the callbacks update.
fn register_callbacks(master: &Master) -> (Rc<ShortLived>, Rc<Cell<Option<SocketAddr>>>) {
    let (short_lived, address) = (Rc::new(ShortLived::default()), Rc::new(Cell::new(None)));
    let replaced = Rc::clone(&short_lived);
    master.on_exit(move |master, _, _| {
        if replaced.is_replaced.get() {
            replaced.fork(master);
        }
    });
    let (counted, found) = (Rc::clone(&short_lived), Rc::clone(&address));
    master.on_listening(move |_, _, address| {
        counted.listening.set(counted.listening.get() + 1);
        if matches!(address, cluster::Address::Tcp(std::net::SocketAddr::V4(_))) {
            found.set(Some(address.to_string().parse().unwrap()));
        }
    });
    (short_lived, address)
}

fn start(master: &Master, short_lived: &ShortLived) {
    short_lived.is_replaced.set(true);
    short_lived.listening.set(0);
    short_lived.fork(master);
    run_until(master, || short_lived.listening.get() == 2);
}

/// Ends a round. Waits until only the long-lived worker is left and no connection is in flight.
fn stop(master: &Master, short_lived: &ShortLived, long_lived: &LongLived) {
    short_lived.is_replaced.set(false);
    for worker in master.workers() {
        if worker.id() != long_lived.worker().id() {
            worker.disconnect();
        }
    }
    run_until(master, || master.workers().len() == 1);
    run_until(master, || master.ledger().in_flight() == 0);
}
