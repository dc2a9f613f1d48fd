//! Serves requests of new and of persistent connections, and checks that the heap does not grow
//! after start-up.

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use cluster::{Interest, ListenOptions, Master, Worker};

use crate::harness::{cluster, when_listening};
use crate::long_lived::run_until;
use crate::measure::{Heap, set_round_alarm};

crate::scenarios! {
    serving_leaves_the_heap_unchanged_after_start_up
}

const WORKERS: usize = 2;
/// Number of connections that stay open.
const PERSISTENT: usize = 8;
/// Number of requests before the first measurement and between two measurements.
const REQUESTS: usize = 1_000;
/// Number of measurements.
const MEASUREMENTS: usize = 11;
/// Maximum growth of the master's heap. An ordered set allocates its first block when it first has
/// an element, and keeps the block. The set of the stalled workers, for example, is empty until a
/// worker first waits for a core. A leak in every 1,000th request exceeds the limit.
const SLACK: Heap = Heap {
    bytes: 2048,
    blocks: 8,
};
/// The length of an answer: the heap of the worker, and its id.
const ANSWER: usize = Heap::LENGTH + 1;

fn serving_leaves_the_heap_unchanged_after_start_up() {
    cluster(play, serve);
}

/// Answers each request with the heap and the id of this worker.
fn serve(worker: Worker) {
    let options = ListenOptions::from("127.0.0.1:0").wait_for_data(true);
    for connection in worker.listen(options).unwrap().incoming() {
        let mut connection = connection.unwrap();
        let mut request = [0];
        if matches!(connection.read(&mut request), Ok(1)) {
            let mut answer = [u8::try_from(worker.id().get()).unwrap(); ANSWER];
            answer[..Heap::LENGTH].copy_from_slice(&Heap::now().to_bytes());
            connection.write_all(&answer).unwrap();
            connection.park();
        }
    }
}

/// The heap of the master and of each worker.
type Heaps = [Heap; 1 + WORKERS];

fn play(master: &Master) {
    set_round_alarm();
    let address = Rc::new(Cell::new(None));
    let found = Rc::clone(&address);
    when_listening(master, WORKERS, move |_, address| found.set(Some(address)));
    (0..WORKERS).for_each(|_| drop(master.fork().unwrap()));
    run_until(master, || address.get().is_some());
    let address = address.get().unwrap();
    // Allocate the memory for the results now, because the heap is measured while the test runs.
    let mut measured: Vec<Heaps> = Vec::with_capacity(MEASUREMENTS);
    let answers = Rc::new(Cell::new(None));
    let (orders, theirs) = UnixStream::pair().unwrap();
    let client = std::thread::spawn(move || run_client(address, &theirs));
    let received = Rc::clone(&answers);
    let read = move |_: &Master, mut stream: &UnixStream| {
        let mut answer = [0; WORKERS * Heap::LENGTH];
        stream.read_exact(&mut answer).ok()?;
        received.set(Some(answer));
        Some(Interest::Readable)
    };
    let watched = orders.try_clone().unwrap();
    let watched = master.watch(watched, Interest::Readable, read).unwrap();
    while measured.len() < MEASUREMENTS {
        // Make many requests at once in the first series, so that no queue needs more memory later.
        let count = if measured.is_empty() { PERSISTENT } else { 1 };
        (&orders).write_all(&[count.try_into().unwrap()]).unwrap();
        run_until(master, || answers.get().is_some());
        // Wait until the master holds all persistent connections again.
        run_until(master, || master.ledger().in_flight() == PERSISTENT as u64);
        let answer = answers.take().unwrap();
        let (first, second) = answer.split_at(Heap::LENGTH);
        measured.push([
            Heap::now(),
            Heap::from_bytes(first),
            Heap::from_bytes(second),
        ]);
    }
    master.unwatch(watched);
    drop(orders);
    client.join().unwrap();
    println!("serving: {} requests", MEASUREMENTS * REQUESTS);
    let (first, last) = (measured[0], measured[MEASUREMENTS - 1]);
    assert_eq!(first[1..], last[1..], "the workers' heaps: {measured:?}");
    let growth = last[0].growth_since(first[0]);
    assert!(
        growth.bytes <= SLACK.bytes && growth.blocks <= SLACK.blocks,
        "the master's heap: {measured:?}"
    );
    master.disconnect();
}

/// Makes a series of requests for each order, and then sends the heap of each worker to the master.
/// An order is the number of requests that are made at the same time on connections of each kind.
fn run_client(address: SocketAddr, mut orders: &UnixStream) {
    let connect = || TcpStream::connect(address).unwrap();
    let mut persistent: [_; PERSISTENT] = std::array::from_fn(|_| connect());
    let mut order = [0];
    while matches!(orders.read(&mut order), Ok(1)) {
        let count = usize::from(order[0]);
        let mut heaps = [[0; Heap::LENGTH]; WORKERS];
        for _ in 0..REQUESTS / count / 2 {
            let mut new: Vec<_> = (0..count).map(|_| connect()).collect();
            persistent.rotate_left(count);
            let mut all: Vec<_> = persistent.iter_mut().take(count).chain(&mut new).collect();
            for connection in &mut all {
                connection.write_all(b"?").unwrap();
            }
            for connection in all {
                let (heap, worker) = read_answer(connection);
                heaps[worker - 1] = heap;
            }
        }
        orders.write_all(heaps.as_flattened()).unwrap();
    }
}

/// Returns the heap and the id of the worker that answers.
fn read_answer(connection: &mut TcpStream) -> ([u8; Heap::LENGTH], usize) {
    let mut answer = [0; ANSWER];
    connection.read_exact(&mut answer).unwrap();
    let (heap, id) = answer.split_at(Heap::LENGTH);
    (heap.try_into().unwrap(), id[0].into())
}
