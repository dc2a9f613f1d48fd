//! Tests `Connection::finish`: clients that send more than the worker reads, that send forever, or
//! that never close.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{Connection, Master, Worker};

use crate::clients::{self, BODY, CLIENTS, post};
use crate::harness::{
    Log, cluster, for_both_policies, in_background, scaled, talk, wait_until, when_listening,
};

crate::scenarios! {
    finish_delivers_the_answer_to_clients_that_send_more
    finish_in_a_callback_delivers_the_answer_to_clients_that_send_more
    finish_disconnects_a_client_that_sends_for_ever
    finish_disconnects_a_client_that_sends_slowly
    finish_disconnects_a_client_that_never_closes
    finish_in_a_callback_delays_no_other_client
    finish_in_a_callback_keeps_a_disconnecting_worker_running
    finish_in_a_forked_child_delivers_the_answer
}

const ANSWER: &str = "answer\n";

/// The limits of `finish`, as its documentation states them.
const SILENCE_MAX: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(5);

/// Connects clients that send a body, which the worker does not read before it answers.
fn post_all(address: SocketAddr) {
    clients::post_all(address, b"", |answer| answer == ANSWER);
}

/// Forks a worker, runs `clients` on a thread once the worker listens, and then disconnects the
/// worker.
fn with_clients(master: &Master, clients: fn(SocketAddr)) {
    when_listening(master, 1, move |master, address| {
        let work = move || clients(address);
        in_background(master, work, |master, ()| master.disconnect());
    });
    master.fork().unwrap();
}

/// Answers a client without reading, and sends the time that `finish` took to the master.
fn finish(worker: &Worker, mut connection: Connection) {
    connection.write_all(ANSWER.as_bytes()).unwrap();
    let start = Instant::now();
    connection.finish();
    let millis = start.elapsed().as_millis().to_string();
    let _ = worker.send(millis.as_bytes()).unwrap();
}

fn serve_blocking(worker: Worker) {
    for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
        finish(&worker, connection.unwrap());
    }
}

fn serve_with_callbacks(worker: Worker) {
    let listener = worker.listen("127.0.0.1:0").unwrap();
    listener.set_connection_callback(finish);
    worker.run().unwrap();
}

/// Runs `clients` against one worker, and returns the times that `finish` took.
fn times(clients: fn(SocketAddr), worker: fn(Worker)) -> Vec<Duration> {
    let times = Log::default();
    let entries = times.clone();
    cluster(
        |master| {
            master.on_message(move |_, _, message| {
                times.add(String::from_utf8_lossy(message.bytes()));
            });
            with_clients(master, clients);
        },
        worker,
    );
    let millis = entries
        .take()
        .into_iter()
        .map(|millis| millis.parse().unwrap());
    millis.map(Duration::from_millis).collect()
}

fn finish_delivers_the_answer_to_clients_that_send_more() {
    for_both_policies(|| drop(times(post_all, serve_blocking)));
}

fn finish_in_a_callback_delivers_the_answer_to_clients_that_send_more() {
    for_both_policies(|| drop(times(post_all, serve_with_callbacks)));
}

/// Connects a client that reads the answer but does not close the connection.
fn connect_and_read(address: SocketAddr) -> TcpStream {
    let mut client = TcpStream::connect(address).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, ANSWER);
    client
}

fn finish_disconnects_a_client_that_sends_for_ever() {
    let send_for_ever = |address| {
        let mut client = TcpStream::connect(address).unwrap();
        while client.write_all(BODY).is_ok() {}
        assert_eq!(talk(address, b"").unwrap(), ANSWER);
    };
    let times = times(send_for_ever, serve_blocking);
    assert_eq!(times.len(), 2);
}

fn finish_disconnects_a_client_that_sends_slowly() {
    let send_slowly = |address| {
        let mut client = connect_and_read(address);
        while client.write_all(b"x").is_ok() {
            // The pause is what makes the client slow.
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(talk(address, b"").unwrap(), ANSWER);
    };
    let times = times(send_slowly, serve_blocking);
    assert!(times[0] >= TIMEOUT, "{times:?}");
}

fn finish_disconnects_a_client_that_never_closes() {
    let stay_open = |address| {
        let _client = connect_and_read(address);
        assert_eq!(talk(address, b"").unwrap(), ANSWER);
    };
    let times = times(stay_open, serve_blocking);
    assert!(
        (SILENCE_MAX..scaled(TIMEOUT)).contains(&times[0]),
        "{times:?}"
    );
}

fn finish_in_a_callback_delays_no_other_client() {
    let stay_open = |address| {
        let mut client = connect_and_read(address);
        for _ in 0..CLIENTS {
            assert_eq!(talk(address, b"").unwrap(), ANSWER);
        }
        // Wait until the worker's loop closes the first connection at `TIMEOUT`.
        wait_until("the end of the connection", || client.write_all(b"x").err());
    };
    let times = times(stay_open, serve_with_callbacks);
    assert_eq!(times.len(), CLIENTS + 1);
    assert!(times.iter().max() < Some(&scaled(SILENCE_MAX)), "{times:?}");
}

/// Lets the client send its body after the worker was disconnected. The worker must keep reading,
/// or the client's write would fail.
fn finish_in_a_callback_keeps_a_disconnecting_worker_running() {
    let disconnect_first = |address| {
        let mut client = connect_and_read(address);
        wait_until("the disconnect", || TcpStream::connect(address).err());
        client.write_all(BODY).unwrap();
    };
    cluster(
        |master| {
            master.on_message(|_, worker, _| {
                worker.disconnect();
            });
            with_clients(master, disconnect_first);
            master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        },
        serve_with_callbacks,
    );
}

/// Calls `finish` in a child that a callback has forked. The child has no loop, so `finish` must
/// wait itself.
fn finish_in_a_forked_child_delivers_the_answer() {
    let fork_and_finish = |worker: Worker| {
        let listener = worker.listen("127.0.0.1:0").unwrap();
        let child = Rc::new(std::cell::Cell::new(None));
        let forked = Rc::clone(&child);
        listener.set_connection_callback(move |_, mut connection| {
            connection.write_all(ANSWER.as_bytes()).unwrap();
            #[allow(unsafe_code)]
            // SAFETY: a worker of this test has one thread.
            match unsafe { nix::unistd::fork() }.unwrap() {
                nix::unistd::ForkResult::Child => {
                    connection.finish();
                    std::process::exit(0);
                }
                nix::unistd::ForkResult::Parent { child } => forked.set(Some(child)),
            }
        });
        worker.run().unwrap();
        nix::sys::wait::waitpid(child.take(), None).unwrap();
    };
    let post_once = |address| assert_eq!(post(address, b"").unwrap(), ANSWER);
    cluster(|master| with_clients(master, post_once), fork_and_finish);
}
