//! Tests new clients that send nothing, on listeners that wait for data. The worker, or the kernel,
//! holds their connections.

use std::cell::RefCell;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::pool::{Pool, PoolEvent};
use cluster::{ListenOptions, Master, Worker};

use super::{MS, disconnect};
use crate::harness::{cluster, for_policies_without_dispatch, in_background, when_listening};
use crate::parked::{CLOSE, Client, answer, serve_with, with_clients};
use crate::pool::quick;

crate::scenarios! {
    silent_clients_occupy_no_worker_that_accepts
    silent_clients_occupy_no_worker_with_a_callback
    silent_unix_clients_occupy_no_worker_that_accepts
    silent_new_clients_survive_a_reload
    worker_closes_silent_new_clients_after_the_timeout_for_first_data
}

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
        let mut client = Client::connect(address);
        let start = Instant::now();
        assert_eq!(client.line(), "", "end-of-file");
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
