//! Tests new clients that send nothing, on listeners that wait for data. The worker, or the kernel,
//! holds their connections.

use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::pool::{Pool, PoolEvent};
use cluster::{Connection, ListenOptions, Master, Worker};

use super::{MS, disconnect};
use crate::harness::{
    cluster, for_policies_without_dispatch, in_background, wait_until, when, when_listening,
};
use crate::parked::{CLOSE, Client, PARK, answer, serve_with, with_clients};
use crate::pool::quick;

crate::scenarios! {
    silent_clients_occupy_no_worker_that_accepts
    silent_clients_occupy_no_worker_with_a_callback
    silent_unix_clients_occupy_no_worker_that_accepts
    silent_new_clients_survive_a_reload
    worker_closes_silent_new_clients_after_the_timeout_for_first_data
    held_client_that_has_sent_is_served_before_a_disconnect
    held_client_of_a_private_listener_that_has_sent_is_served_before_a_disconnect
    requests_at_the_end_of_a_stop_are_answered
    unix_request_at_the_end_of_a_stop_is_answered
}

/// A request after which the worker reads another one before it answers.
const SLOW: u8 = b's';

/// More than a worker holds in one batch.
const SILENT: usize = 100;

fn waiting_for_data() -> ListenOptions {
    ListenOptions::from("127.0.0.1:0").wait_for_data(true)
}

fn connect(address: SocketAddr) -> Vec<Client> {
    (0..SILENT).map(|_| Client::connect(address)).collect()
}

fn ask_beside_silent_clients(address: SocketAddr) {
    let mut silent = connect(address);
    for _ in 0..20 {
        assert_eq!(Client::connect(address).ask(CLOSE).1, 1);
    }
    for client in &mut silent {
        assert_eq!(client.ask(CLOSE).1, 1);
    }
}

fn silent_clients_occupy_no_worker_that_accepts() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 2, ask_beside_silent_clients, disconnect),
            |worker| serve_with(&worker, waiting_for_data()),
        );
    });
}

fn silent_clients_occupy_no_worker_with_a_callback() {
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 2, ask_beside_silent_clients, disconnect),
            |worker| {
                let listener = worker.listen(waiting_for_data()).unwrap();
                listener.set_connection_callback(answer);
                worker.run().unwrap();
            },
        );
    });
}

fn silent_unix_clients_occupy_no_worker_that_accepts() {
    for_policies_without_dispatch(|| {
        let path = std::env::temp_dir().join("silent");
        let bound = path.clone();
        cluster(
            |master| {
                master.on_listening(move |master, _, _| {
                    let path = bound.clone();
                    let ask = move || {
                        let connect = || UnixStream::connect(&path).unwrap();
                        let silent: Vec<_> = (0..SILENT).map(|_| connect()).collect();
                        for mut client in std::iter::once(connect()).chain(silent) {
                            client.write_all(b"x").unwrap();
                            client.read_exact(&mut [0]).unwrap();
                        }
                    };
                    in_background(master, ask, disconnect);
                });
                drop(master.fork().unwrap());
            },
            |worker| serve_unix(&worker, ListenOptions::from(path.as_path())),
        );
    });
}

fn serve_unix(worker: &Worker, options: ListenOptions<UnixStream>) {
    for connection in worker
        .listen(options.wait_for_data(true))
        .unwrap()
        .incoming()
    {
        let mut connection = connection.unwrap();
        if let Ok(1) = connection.read(&mut [0]) {
            connection.write_all(b"y").unwrap();
        }
    }
}

fn silent_new_clients_survive_a_reload() {
    let pool = |master: &Master| {
        let pool = Pool::new(master, quick());
        pool.listen(master, "127.0.0.1:0").unwrap();
        let silent: Rc<RefCell<Option<Vec<Client>>>> = Rc::default();
        let clients = Rc::clone(&silent);
        let own = pool.clone();
        when_listening(master, 2, move |master, address| {
            let connect_and_ask = move || {
                let silent = connect(address);
                // Each worker has accepted what was in its backlog before its second answer.
                for _ in 0..20 {
                    Client::connect(address).ask(CLOSE);
                }
                silent
            };
            in_background(master, connect_and_ask, move |master, silent| {
                clients.replace(Some(silent));
                own.reload(master);
            });
        });
        pool.on_event(move |pool, master, event| match event {
            PoolEvent::Reloaded { .. } => {
                let mut clients = silent.take().unwrap();
                let own = pool.clone();
                let ask = move || {
                    for client in &mut clients {
                        let (id, requests) = client.ask(CLOSE);
                        assert!([3, 4].contains(&id));
                        assert_eq!(requests, 1);
                    }
                };
                in_background(master, ask, move |master, ()| own.stop(master));
            }
            PoolEvent::WorkerShutDown { killed, .. } => assert!(!killed),
            _ => {}
        });
    };
    for_policies_without_dispatch(|| {
        cluster(pool, |worker| serve_with(&worker, waiting_for_data()));
    });
}

fn worker_closes_silent_new_clients_after_the_timeout_for_first_data() {
    let clients = |address| {
        let start = Instant::now();
        assert_eq!(Client::connect(address).line(), "", "end-of-file");
        let elapsed = start.elapsed();
        assert!(elapsed >= 900 * MS, "{elapsed:?}");
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, clients, disconnect),
            |worker| {
                let options = waiting_for_data().first_data_timeout(Duration::from_secs(1));
                serve_with(&worker, options);
            },
        );
    });
}

fn answer_or_wait<S: Read + Write>(worker: &Worker, mut connection: Connection<S>) {
    let mut request = [0];
    while let Ok(1) = connection.read(&mut request) {
        if request[0] != SLOW {
            let line = format!("{} {}\n", worker.id(), connection.requests());
            let _ = connection.write_all(line.as_bytes());
            return;
        }
    }
}

/// The client that the worker holds sends its request while the worker serves another client. The
/// worker then finds the request and the disconnect at the same time.
fn held_client_that_has_sent_is_served_before_a_disconnect() {
    let connect = |address| {
        let held = Client::connect(address);
        Client::connect(address).ask(CLOSE);
        let mut busy = Client::connect(address);
        busy.send(SLOW);
        (held, busy)
    };
    let then = |master: &Master, (mut held, mut busy): (Client, Client)| {
        let is_busy = |master: &Master| master.loads().workers[0].in_service == Some(1);
        when(master, is_busy, move |master| {
            held.send(CLOSE);
            master.disconnect();
            // The master has sent the worker's frame when it calls this callback.
            master.set_timeout(MS, move |master| {
                let finish = move || {
                    busy.send(CLOSE);
                    assert_eq!(busy.line(), "1 1");
                    assert_eq!(held.line(), "1 1");
                };
                in_background(master, finish, |_, ()| {});
            });
        });
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, connect, then),
            |worker| {
                let listener = worker.listen(waiting_for_data()).unwrap();
                listener.set_connection_callback(answer_or_wait);
                worker.run().unwrap();
            },
        );
    });
}

fn expect_answer(client: &mut UnixStream) {
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "1 1\n");
}

/// The kernel does not hold the clients of a Unix socket, and a worker with a private listener reads
/// its channel before it looks for requests.
fn held_client_of_a_private_listener_that_has_sent_is_served_before_a_disconnect() {
    let path = std::env::temp_dir().join("held");
    let bound = path.clone();
    let connect = move || {
        let [held, mut quick, mut busy] = [(); 3].map(|()| UnixStream::connect(&bound).unwrap());
        quick.write_all(&[CLOSE]).unwrap();
        expect_answer(&mut quick);
        busy.write_all(&[SLOW]).unwrap();
        (held, busy)
    };
    let then = |master: &Master, (mut held, mut busy): (UnixStream, UnixStream)| {
        let is_busy = |master: &Master| master.loads().workers[0].in_service == Some(1);
        when(master, is_busy, move |master| {
            held.write_all(&[CLOSE]).unwrap();
            master.disconnect();
            // The master has sent the worker's frame when it calls this callback.
            master.set_timeout(MS, move |master| {
                let finish = move || {
                    busy.write_all(&[CLOSE]).unwrap();
                    expect_answer(&mut busy);
                    expect_answer(&mut held);
                };
                in_background(master, finish, |_, ()| {});
            });
        });
    };
    cluster(
        |master| {
            let work = Cell::new(Some((connect, then)));
            master.on_message(move |master, _, _| {
                let (connect, then) = work.take().unwrap();
                in_background(master, connect, then);
            });
            drop(master.fork().unwrap());
        },
        |worker| {
            let options = ListenOptions::from(path.as_path()).exclusive(true);
            let listener = worker.listen(options.wait_for_data(true)).unwrap();
            let _ = worker.send(b"listening").unwrap();
            for connection in listener.incoming() {
                answer_or_wait(&worker, connection.unwrap());
            }
        },
    );
}

/// Returns the file that a worker writes once it knows that it disconnects.
fn mark() -> PathBuf {
    std::env::temp_dir().join("disconnecting")
}

/// Disconnects all workers, waits until a worker knows it, and then calls `ask`. Blocks the master
/// meanwhile, so that the listener's grace period does not end.
fn ask_disconnecting_worker(master: &Master, ask: impl FnOnce() + 'static) {
    master.disconnect();
    // The master calls this callback later in the same iteration of the loop, when it has sent the
    // worker's frame. A later iteration could find that the grace period has ended.
    master.set_timeout(Duration::ZERO, move |_| {
        wait_until("a disconnecting worker", || mark().exists().then_some(()));
        std::fs::remove_file(mark()).unwrap();
        ask();
    });
}

fn mark_when_disconnecting(worker: &Worker) {
    worker.on_disconnecting(|worker| {
        // The worker has processed the frame when it calls this callback.
        worker.set_timeout(MS, |_| std::fs::write(mark(), "").unwrap());
    });
}

fn requests_at_the_end_of_a_stop_are_answered() {
    let connect = |address| {
        let mut parked = Client::connect(address);
        parked.ask(PARK);
        let silent = Client::connect(address);
        // The worker has accepted the silent client when it answers this one.
        Client::connect(address).ask(CLOSE);
        (parked, silent)
    };
    let then = |master: &Master, (mut parked, mut silent): (Client, Client)| {
        ask_disconnecting_worker(master, move || {
            assert_eq!(parked.ask(CLOSE), (1, 2));
            assert_eq!(silent.ask(CLOSE), (1, 1));
        });
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, connect, then),
            |worker| {
                mark_when_disconnecting(&worker);
                let listener = worker.listen(waiting_for_data()).unwrap();
                listener.set_connection_callback(answer);
                worker.run().unwrap();
            },
        );
    });
}

fn unix_request_at_the_end_of_a_stop_is_answered() {
    let path = std::env::temp_dir().join("end");
    let bound = path.clone();
    let connect = move || {
        let [silent, mut other] = [(); 2].map(|()| UnixStream::connect(&bound).unwrap());
        other.write_all(&[CLOSE]).unwrap();
        expect_answer(&mut other);
        silent
    };
    let then = |master: &Master, mut silent: UnixStream| {
        ask_disconnecting_worker(master, move || {
            silent.write_all(&[CLOSE]).unwrap();
            expect_answer(&mut silent);
        });
    };
    for_policies_without_dispatch(|| {
        let connect = connect.clone();
        cluster(
            |master| {
                master.on_listening_once(move |master, _, _| in_background(master, connect, then));
                drop(master.fork().unwrap());
            },
            |worker| {
                mark_when_disconnecting(&worker);
                let options = ListenOptions::from(path.as_path()).wait_for_data(true);
                let listener = worker.listen(options).unwrap();
                listener.set_connection_callback(answer_or_wait);
                worker.run().unwrap();
            },
        );
    });
}
