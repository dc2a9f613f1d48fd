//! Tests requests on connections that workers hold when all workers, or one of them, are stopped.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd as _;
use std::time::Instant;

use cluster::pool::Pool;
use cluster::{ListenOptions, Master, WorkerProcess};

use super::{BUSY, KILL, disconnect, only, serve_slowly, serve_slowly_on};
use crate::harness::{
    cluster, for_all_policies, in_background, share_listeners, when, when_listening,
};
use crate::parked::{CLOSE, Client, PARK, with_clients};
use crate::pool::quick;

crate::scenarios! {
    pool_stop_serves_requests_that_have_arrived
    workers_that_disconnect_together_serve_requests_that_have_arrived
    worker_that_was_busy_when_the_last_others_disconnected_serves_its_clients
    workers_of_a_borrowed_descriptor_serve_requests_that_have_arrived
    idle_connections_of_a_worker_that_kills_itself_stay_open
    many_idle_connections_of_a_worker_that_kills_itself_stay_open
}

const WORKERS: u32 = 3;

/// The clients of all workers.
struct Clients {
    /// One client of each worker, whose worker waits for another request of it.
    busy: Vec<Client>,
    /// Clients that have sent a request while their workers were busy.
    waiting: Vec<Client>,
}

/// Parks connections in each worker, makes all workers busy, and then sends requests on the parked
/// connections.
fn ask_busy_workers(address: SocketAddr) -> Clients {
    let mut all = Vec::new();
    let count = |all: &[(u32, Client)], id| all.iter().filter(|(own, _)| *own == id).count();
    while (1..=WORKERS).any(|id| count(&all, id) < 3) {
        // Connect a client for each worker before any of them sends a request. A worker waits for the
        // request of its client, so the kernel gives the next connection to another worker.
        let connect = |_| Client::connect(address);
        let mut clients: Vec<_> = (0..WORKERS).map(connect).collect();
        clients.iter_mut().for_each(|client| client.send(PARK));
        for mut client in clients {
            all.push((client.answer().0, client));
        }
    }
    let busy = (1..=WORKERS).map(|id| {
        let index = all.iter().position(|(own, _)| *own == id).unwrap();
        all.swap_remove(index).1
    });
    let mut busy: Vec<_> = busy.collect();
    busy.iter_mut().for_each(|client| client.send(BUSY));
    let mut waiting: Vec<_> = all.into_iter().map(|(_, client)| client).collect();
    waiting.iter_mut().for_each(|client| client.send(CLOSE));
    Clients { busy, waiting }
}

/// Calls `stop` while all workers are busy, lets them go on after the grace period has ended, and
/// expects all answers.
fn stop_busy_workers(master: &Master, clients: Clients, stop: impl FnOnce(&Master) + 'static) {
    let are_busy = |master: &Master| {
        master
            .loads()
            .workers
            .iter()
            .all(|load| load.in_service == Some(1))
    };
    when(master, are_busy, move |master| {
        stop(master);
        // Longer than the grace period of a listener.
        master.set_timeout(std::time::Duration::from_millis(150), move |master| {
            let finish = move || {
                let Clients { busy, waiting } = clients;
                for mut client in busy {
                    client.send(CLOSE);
                    assert_eq!(client.line().split(' ').nth(1), Some("2"));
                }
                for mut client in waiting {
                    assert_eq!(client.line().split(' ').nth(1), Some("2"));
                }
            };
            in_background(master, finish, |_, ()| {});
        });
    });
}

fn pool_stop_serves_requests_that_have_arrived() {
    for_all_policies(|| {
        cluster(
            |master| {
                let pool = Pool::new(master, quick().workers(WORKERS as usize));
                pool.listen(master, "127.0.0.1:0").unwrap();
                when_listening(master, WORKERS as usize, move |master, address| {
                    let ask = move || ask_busy_workers(address);
                    in_background(master, ask, move |master, clients| {
                        stop_busy_workers(master, clients, move |master| pool.stop(master));
                    });
                });
            },
            serve_slowly,
        );
    });
}

fn workers_that_disconnect_together_serve_requests_that_have_arrived() {
    let then = |master: &Master, clients| {
        stop_busy_workers(master, clients, |master| {
            let ids: Vec<_> = master.workers().iter().map(WorkerProcess::id).collect();
            master.disconnect_workers(&ids);
        });
    };
    for_all_policies(|| {
        cluster(
            |master| with_clients(master, WORKERS as usize, ask_busy_workers, then),
            serve_slowly,
        );
    });
}

fn worker_that_was_busy_when_the_last_others_disconnected_serves_its_clients() {
    let then = |master: &Master, clients| {
        stop_busy_workers(master, clients, |master| {
            // When the first worker disconnects, the others still serve its listener.
            only(master, 1).disconnect();
            master.disconnect();
        });
    };
    for_all_policies(|| {
        cluster(
            |master| with_clients(master, WORKERS as usize, ask_busy_workers, then),
            serve_slowly,
        );
    });
}

fn workers_of_a_borrowed_descriptor_serve_requests_that_have_arrived() {
    let then = |master: &Master, clients| stop_busy_workers(master, clients, Master::disconnect);
    for_all_policies(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        cluster(
            |master| {
                let number = listener.as_raw_fd().to_string();
                when_listening(master, WORKERS as usize, move |master, address| {
                    in_background(master, move || ask_busy_workers(address), then);
                });
                for _ in 0..WORKERS {
                    master.fork_with([("FD", &number)]).unwrap();
                }
            },
            |worker| {
                let number = std::env::var("FD").unwrap().parse().unwrap();
                serve_slowly_on(&worker, ListenOptions::fd(number));
            },
        );
    });
}

fn idle_connections_of_a_worker_that_kills_itself_stay_open() {
    let clients = |address| {
        let mut first = Client::connect(address);
        let (id, _) = first.ask(PARK);
        let mut other = Client::connect(address);
        let start = Instant::now();
        // Find a connection to the same worker.
        while other.ask(PARK).0 != id {
            assert!(start.elapsed().as_secs() < 60, "no second connection");
            other = Client::connect(address);
        }
        (first, other.ask(KILL).0)
    };
    let then = |master: &Master, (mut first, killed): (Client, u32)| {
        let has_exited = |master: &Master| master.workers().len() == 1;
        when(master, has_exited, move |master| {
            let ask = move || {
                let (next, requests) = first.ask(PARK);
                assert_eq!((next == killed, requests), (false, 2));
            };
            in_background(master, ask, disconnect);
        });
    };
    for_all_policies(|| {
        cluster(
            |master| with_clients(master, 2, clients, then),
            serve_slowly,
        )
    });
}

/// The worker has more idle connections than its channel queues at a time (`MAX_BATCH`).
fn many_idle_connections_of_a_worker_that_kills_itself_stay_open() {
    const CLIENTS: usize = 200;
    cluster(
        |master| {
            share_listeners(master);
            let retained = master.listen("127.0.0.1:0").unwrap();
            when_listening(master, 1, move |master, address| {
                let connect = move || {
                    let connect = |_| Client::connect(address);
                    let mut all: Vec<_> = (0..CLIENTS).map(connect).collect();
                    for client in &mut all {
                        client.ask(PARK);
                    }
                    all.pop().unwrap().ask(KILL);
                    all
                };
                in_background(master, connect, move |master, mut all| {
                    let has_exited = |master: &Master| master.workers().is_empty();
                    when(master, has_exited, move |master| {
                        master.fork().unwrap();
                        let ask = move || {
                            let asked = all.iter_mut().map(|client| client.ask(PARK));
                            assert!(asked.into_iter().all(|answer| answer == (2, 2)));
                        };
                        in_background(master, ask, move |master, ()| {
                            drop(retained);
                            master.disconnect();
                        });
                    });
                });
            });
            master.fork().unwrap();
        },
        serve_slowly,
    );
}
