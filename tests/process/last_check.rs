//! Tests that an idle connection stays open if its client has sent something, although the process
//! that holds it was too busy to notice.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use cluster::{Connection, ListenOptions, Master, Worker};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::harness::{cluster, for_policies_without_dispatch};
use crate::parked::{Client, PARK, answer, serve_with, with_clients};

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

/// Stops the master's loop when a value is sent, and continues it when the next one is sent. Each
/// call of `send` returns when the master has received the value.
fn brake(master: &Master) -> SyncSender<()> {
    let (brake, received) = sync_channel(0);
    let interval = master.set_interval(Duration::from_millis(1), move |_| {
        if received.try_recv().is_ok() {
            let _ = received.recv();
        }
    });
    master.unreference(interval);
    brake
}

fn client_is_answered_although_the_master_was_busy_at_the_idle_timeout() {
    cluster(
        |master| {
            let brake = brake(master);
            let clients = move |address| {
                let mut client = Client::connect(address);
                client.ask(PARK);
                // Let the master hold the connection.
                std::thread::sleep(Duration::from_millis(50));
                brake.send(()).unwrap();
                client.send(PARK);
                std::thread::sleep(EXPIRED);
                brake.send(()).unwrap();
                assert_eq!(client.line(), "1 2");
            };
            with_clients(master, 1, clients, |master, ()| {
                assert_eq!(master.ledger().expired, 0);
                master.disconnect();
            });
        },
        |worker| serve_with(&worker, short_timeout()),
    );
}

/// The master reads first that the worker has parked the second connection, because that happened
/// before the client of the first connection sent something.
fn client_that_has_sent_something_stays_beyond_the_maximum() {
    cluster(
        |master| {
            master.set_max_parked(1);
            let brake = brake(master);
            let clients = move |address| {
                let mut first = Client::connect(address);
                first.ask(PARK);
                let mut second = Client::connect(address);
                second.send(BUSY);
                assert_eq!(second.line(), "busy");
                brake.send(()).unwrap();
                second.ask(PARK);
                // Let the worker park the connection.
                std::thread::sleep(Duration::from_millis(50));
                first.send(PARK);
                brake.send(()).unwrap();
                assert_eq!(first.line(), "1 2");
            };
            with_clients(master, 1, clients, disconnect);
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
    cluster(
        |master| {
            let brake = brake(master);
            let clients = move |address| {
                let mut client = Client::connect(address);
                client.ask(PARK);
                // Let the master hold the connection, and let it begin the drain.
                std::thread::sleep(Duration::from_millis(50));
                client.send(PARK);
                assert_eq!(client.line(), "1 2");
                brake.send(()).unwrap();
                client.send(PARK);
                std::thread::sleep(Duration::from_millis(200));
                brake.send(()).unwrap();
                assert_eq!(client.line(), "1 3");
            };
            with_clients(master, 1, clients, |_, ()| {});
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            for connection in listener.incoming() {
                let connection = connection.unwrap();
                if connection.requests() == 2 {
                    worker.disconnect();
                }
                answer(&worker, connection);
            }
        },
    );
}
