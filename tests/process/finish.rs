//! Tests `Connection::finish`: clients that send more than the worker reads, that send forever, or
//! that never close.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cluster::{Connection, Master, Worker};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::clients::{self, BODY, post};
use crate::harness::{
    Log, cluster, for_all_policies, in_background, open_fds, scaled, talk, wait_until,
    when_listening,
};

crate::scenarios! {
    finish_delivers_the_answer_to_clients_that_send_more
    finish_in_a_callback_delivers_the_answer_to_clients_that_send_more
    finish_disconnects_a_client_that_sends_for_ever
    finish_disconnects_a_client_that_sends_slowly
    finish_disconnects_a_client_that_never_closes
    finish_delays_no_other_client
    finish_in_a_callback_delays_no_other_client
    hostile_clients_delay_no_other_client
    finished_connection_does_not_count_for_the_maximum
    oldest_finished_connection_closes_beyond_the_maximum_of_a_worker
    finish_keeps_an_exiting_worker_running
    finish_keeps_a_disconnecting_worker_running
    finish_in_a_callback_keeps_a_disconnecting_worker_running
    finish_in_a_forked_child_delivers_the_answer
    no_deadline_is_left_when_the_client_of_a_finished_connection_has_closed
}

const ANSWER: &str = "answer\n";

/// The limit of `finish`, as its documentation states it.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time that the call of `finish` takes.
const DELAY: Duration = Duration::from_secs(1);
/// Number of clients that never close their connections, and of other clients. They are few, so that
/// all are served within `TIMEOUT` even if the machine is busy.
const FEW: usize = 3;
/// Bytes that a slow client sends at once.
const BODY_PART: &[u8] = &[b'x'; 1000];

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
    for_all_policies(|| drop(times(post_all, serve_blocking)));
}

fn finish_in_a_callback_delivers_the_answer_to_clients_that_send_more() {
    for_all_policies(|| drop(times(post_all, serve_with_callbacks)));
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
        let start = Instant::now();
        let mut client = connect_and_read(address);
        while client.write_all(b"x").is_ok() {
            // The pause is what makes the client slow.
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(start.elapsed() >= TIMEOUT, "{:?}", start.elapsed());
    };
    for_all_policies(|| drop(times(send_slowly, serve_blocking)));
}

/// Waits until the worker closes a client's connection, and checks that this takes as long as the
/// limit of `finish`.
fn wait_for_timeout(address: SocketAddr) {
    let start = Instant::now();
    let mut client = connect_and_read(address);
    wait_until("the end of the connection", || client.write_all(b"x").err());
    assert!(start.elapsed() >= TIMEOUT, "{:?}", start.elapsed());
}

fn finish_disconnects_a_client_that_never_closes() {
    for_all_policies(|| {
        let times = times(wait_for_timeout, serve_blocking);
        assert!(times[0] < scaled(DELAY), "{times:?}");
    });
}

/// Returns whether the worker has not closed a client's connection.
fn is_open(mut client: &TcpStream) -> bool {
    client.set_nonblocking(true).unwrap();
    // The first write to a closed connection makes the kernel reset it.
    client.write(b"x").is_ok() && client.write(b"x").is_ok()
}

/// Connects clients that never close, and then other clients. The worker must serve the others
/// before it closes the first ones.
fn stay_open(address: SocketAddr) {
    let silent: Vec<_> = (0..FEW).map(|_| connect_and_read(address)).collect();
    for _ in 0..FEW {
        assert_eq!(talk(address, b"").unwrap(), ANSWER);
    }
    assert!(silent.iter().all(is_open));
}

fn finish_delays_no_other_client() {
    for_all_policies(|| {
        let times = times(stay_open, serve_blocking);
        assert_eq!(times.len(), 2 * FEW);
    });
}

fn finish_in_a_callback_delays_no_other_client() {
    for_all_policies(|| {
        let times = times(stay_open, serve_with_callbacks);
        assert_eq!(times.len(), 2 * FEW);
    });
}

/// Runs `clients` against two workers.
fn with_two_workers(clients: fn(SocketAddr), worker: fn(Worker)) {
    cluster(
        |master| {
            with_clients(master, clients);
            master.fork().unwrap();
        },
        worker,
    );
}

/// Serves clients that send a body, while others send slowly or never close.
fn hostile_clients_delay_no_other_client() {
    let clients = |address| {
        let is_over = AtomicBool::new(false);
        let connect = || (0..FEW).map(|_| connect_and_read(address));
        let (silent, slow): (Vec<_>, Vec<_>) = (connect().collect(), connect().collect());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::SeqCst) {
                    slow.iter()
                        .for_each(|mut client| drop(client.write(BODY_PART)));
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
            let answers = (0..FEW).map(|_| post(address, b""));
            let answers: Vec<_> = answers.collect();
            is_over.store(true, Ordering::SeqCst);
            assert!(
                answers
                    .iter()
                    .all(|answer| answer.as_deref().is_ok_and(|text| text == ANSWER)),
                "{answers:?}"
            );
        });
        assert!(silent.iter().all(is_open));
    };
    for_all_policies(|| with_two_workers(clients, serve_blocking));
}

fn finished_connection_does_not_count_for_the_maximum() {
    let serve = |worker: Worker| {
        let listener = worker.listen("127.0.0.1:0").unwrap();
        listener.set_max_connections(Some(1));
        for connection in listener.incoming() {
            finish(&worker, connection.unwrap());
        }
    };
    for_all_policies(|| drop(times(stay_open, serve)));
}

fn oldest_finished_connection_closes_beyond_the_maximum_of_a_worker() {
    let clients = |address| {
        let all: Vec<_> = (0..60).map(|_| connect_and_read(address)).collect();
        let (closed, open) = all.split_at(10);
        let has_open = || closed.iter().any(is_open);
        wait_until("the end of the oldest", || (!has_open()).then_some(()));
        assert!(open.iter().all(is_open));
    };
    for_all_policies(|| {
        // With this limit, a worker holds at most 50 connections, half of the limit.
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 100, hard).unwrap();
        drop(times(clients, serve_blocking));
    });
}

/// Lets the client send its body after the worker was disconnected. The worker must keep reading,
/// or the client's write would fail.
fn post_after_the_disconnect(worker: fn(Worker)) {
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
        worker,
    );
}

fn finish_keeps_an_exiting_worker_running() {
    for_all_policies(|| post_after_the_disconnect(serve_blocking));
}

fn finish_keeps_a_disconnecting_worker_running() {
    let serve_and_run = |worker: Worker| {
        for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
            finish(&worker, connection.unwrap());
        }
        worker.run().unwrap();
    };
    for_all_policies(|| post_after_the_disconnect(serve_and_run));
}

fn finish_in_a_callback_keeps_a_disconnecting_worker_running() {
    for_all_policies(|| post_after_the_disconnect(serve_with_callbacks));
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

/// Checks that a worker sleeps without a time limit after all its clients have left, although the
/// finished connection had one.
fn no_deadline_is_left_when_the_client_of_a_finished_connection_has_closed() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 1, |master, address| {
                let work = move || connect_and_read(address);
                in_background(master, work, |_, client| drop(client));
            });
            master.on_message(move |master, _, message| {
                log.add(String::from_utf8_lossy(message.bytes()));
                master.disconnect();
            });
            master.fork().unwrap();
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(|_, mut connection| {
                connection.write_all(ANSWER.as_bytes()).unwrap();
                connection.finish();
            });
            // Descriptors of the idle worker. Each connection adds one.
            let idle = open_fds().len();
            let mut has_connection = false;
            while worker.is_connected() {
                worker.dispatch(Some(Duration::from_millis(1))).unwrap();
                let had_connection =
                    std::mem::replace(&mut has_connection, open_fds().len() > idle);
                if had_connection && !has_connection {
                    let left = format!("{:?}", worker.time_left());
                    let _ = worker.send(left.as_bytes()).unwrap();
                }
            }
        },
    );
    assert_eq!(entries.take(), ["None"]);
}
