//! Tests that an idle connection stays open if its client has sent something, although the process
//! that holds it was too busy to notice.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use cluster::{Connection, Ledger, ListenOptions, Master, Worker};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::harness::{cluster, for_policies_without_dispatch, in_background};
use crate::parked::{Client, PARK, answer, serve_with, when_ledger, with_clients};

crate::scenarios! {
    client_is_answered_although_its_worker_was_busy_at_the_idle_timeout
    client_is_answered_although_its_callback_worker_was_busy_at_the_idle_timeout
    client_is_answered_although_the_master_was_busy_at_the_idle_timeout
    client_that_has_sent_something_stays_beyond_the_maximum
    client_that_has_sent_something_stays_beyond_the_maximum_of_a_worker
    client_is_answered_although_the_master_was_busy_at_the_end_of_a_drain
}

/// Time after which a connection with the shortest idle timeout has expired. The timeout is one
/// second, and connections expire at the end of a second.
const EXPIRED: Duration = Duration::from_millis(2100);
/// Request that keeps the worker busy until another request follows.
const BUSY: u8 = b'b';

fn disconnect<T>(master: &Master, _: T) {
    master.disconnect();
}

fn short_timeout() -> ListenOptions {
    ListenOptions::from("127.0.0.1:0").idle_timeout(Duration::from_millis(1))
}

/// Answers a request. A client that sends `BUSY` first receives a line, and the worker then waits
/// for its request.
fn answer_or_wait(worker: &Worker, mut connection: Connection) {
    let mut next = [0];
    let peeked = connection.peek(&mut next);
    if peeked.is_ok() && next[0] == BUSY {
        connection.read_exact(&mut next).unwrap();
        connection.write_all(b"busy\n").unwrap();
    }
    answer(worker, connection);
}

fn serve_or_wait(worker: &Worker, options: ListenOptions) {
    for connection in worker.listen(options).unwrap().incoming() {
        answer_or_wait(worker, connection.unwrap());
    }
}

/// Lets a client send a request while the only worker is busy with another client for longer than
/// the idle timeout.
fn ask_a_busy_worker(address: SocketAddr) {
    let mut client = Client::connect(address);
    client.ask(PARK);
    let mut other = Client::connect(address);
    other.send(BUSY);
    assert_eq!(other.line(), "busy");
    client.send(PARK);
    std::thread::sleep(EXPIRED);
    assert_eq!(other.ask(PARK), (1, 1));
    assert_eq!(client.line(), "1 2");
}

fn client_is_answered_although_its_worker_was_busy_at_the_idle_timeout() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, ask_a_busy_worker, disconnect),
            |worker| serve_or_wait(&worker, short_timeout()),
        );
    });
}

fn client_is_answered_although_its_callback_worker_was_busy_at_the_idle_timeout() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, ask_a_busy_worker, disconnect),
            |worker| {
                let listener = worker.listen(short_timeout()).unwrap();
                listener.set_connection_callback(answer_or_wait);
                worker.run().unwrap();
            },
        );
    });
}

/// Parks a client's connection, calls `stall` in the master's loop, and then expects the answer to
/// the client's second request.
fn stall_master(master: &Master, stall: impl FnOnce(&Master, &mut Client) + 'static) {
    let connect = |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        client
    };
    with_clients(master, 1, connect, |master, mut client| {
        let is_parked = |ledger: &Ledger| ledger.parked == 1;
        when_ledger(master, is_parked, move |master| {
            stall(master, &mut client);
            let read = move || assert_eq!(client.line(), "1 2");
            in_background(master, read, |master, ()| {
                assert_eq!(master.ledger().expired, 0);
                master.disconnect();
            });
        });
    });
}

fn client_is_answered_although_the_master_was_busy_at_the_idle_timeout() {
    let stall = |_: &Master, client: &mut Client| {
        client.send(PARK);
        std::thread::sleep(EXPIRED);
    };
    cluster(
        |master| stall_master(master, stall),
        |worker| serve_with(&worker, short_timeout()),
    );
}

/// The master reads first that the worker has parked the second connection, because that happened
/// before the client of the first connection sent something.
fn client_that_has_sent_something_stays_beyond_the_maximum() {
    let connect = |address| {
        let mut first = Client::connect(address);
        first.ask(PARK);
        let mut second = Client::connect(address);
        second.send(BUSY);
        assert_eq!(second.line(), "busy");
        (first, second)
    };
    cluster(
        |master| {
            master.set_max_parked(1);
            with_clients(master, 1, connect, |master, (mut first, mut second)| {
                second.ask(PARK);
                // Let the worker park the connection.
                std::thread::sleep(Duration::from_millis(50));
                first.send(PARK);
                let read = move || assert_eq!(first.line(), "1 2");
                in_background(master, read, disconnect);
            });
        },
        |worker| serve_or_wait(&worker, "127.0.0.1:0".into()),
    );
}

fn client_that_has_sent_something_stays_beyond_the_maximum_of_a_worker() {
    let clients = |address| {
        let clients = (0..50).map(|_| Client::connect(address));
        let mut clients: Vec<_> = clients.collect();
        for client in &mut clients {
            client.ask(PARK);
        }
        let mut other = Client::connect(address);
        other.send(BUSY);
        assert_eq!(other.line(), "busy");
        clients[0].send(PARK);
        other.ask(PARK);
        assert_eq!(clients[0].line(), "1 2");
        assert_eq!(clients[1].line(), "", "end-of-file");
    };
    for_policies_without_dispatch(|| {
        // With this limit, a worker holds at most 50 parked connections, half of the limit.
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 100, hard).unwrap();
        cluster(
            |master| with_clients(master, 1, clients, disconnect),
            |worker| serve_or_wait(&worker, "127.0.0.1:0".into()),
        );
    });
}

fn client_is_answered_although_the_master_was_busy_at_the_end_of_a_drain() {
    let stall = |master: &Master, client: &mut Client| {
        master.disconnect();
        client.send(PARK);
        std::thread::sleep(Duration::from_millis(150));
    };
    cluster(
        |master| stall_master(master, stall),
        |worker| serve_with(&worker, "127.0.0.1:0".into()),
    );
}
