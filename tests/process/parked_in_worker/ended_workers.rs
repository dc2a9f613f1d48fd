//! Tests what happens to parked connections when their worker or their listener ends.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::rc::Rc;

use cluster::pool::{Pool, PoolEvent};
use cluster::{Master, Signal, Worker};

use super::{ask_all, disconnect, only, serve_with_callback};
use crate::harness::{cluster, for_policies_without_dispatch, in_background, when_listening};
use crate::parked::{CLOSE, Client, PARK, answer, serve, with_clients};
use crate::pool::quick;

crate::scenarios! {
    remaining_worker_receives_parked_connections_of_a_disconnecting_one
    remaining_worker_receives_parked_connections_with_its_callback
    master_holds_parked_connections_until_a_worker_listens
    parked_connections_of_a_killed_worker_close
    idle_connections_survive_a_reload
    connection_parked_after_its_listener_closed_goes_to_another_worker
    only_worker_resumes_a_connection_of_its_closed_listener_on_its_next_one
}

/// Connects ten clients. Returns them with the ids of the workers that have parked their connections,
/// which may all be the same.
fn park_clients(address: SocketAddr) -> Vec<(Client, u32)> {
    let park = |_| {
        let mut client = Client::connect(address);
        let (id, _) = client.ask(PARK);
        (client, id)
    };
    (0..10).map(park).collect()
}

fn assert_given_to_the_remaining_worker(serve: fn(Worker)) {
    let then = |master: &Master, clients: Vec<(Client, u32)>| {
        let leaving = clients[0].1;
        let remaining = 3 - leaving;
        only(master, leaving).disconnect();
        let clients = Cell::new(Some(clients));
        master.on_exit_once(move |master, worker, _| {
            assert_eq!(worker.id().get(), leaving);
            let mut clients = clients.take().unwrap();
            let count = clients.iter().filter(|(_, id)| *id == leaving).count() as u64;
            let ask = move || {
                for (client, id) in &mut clients {
                    assert_eq!(client.ask(PARK), (remaining, 2), "first served by {id}");
                }
            };
            in_background(master, ask, move |master, ()| {
                let ledger = master.ledger();
                assert_eq!((ledger.parked, ledger.received), (count, count));
                master.disconnect();
            });
        });
    };
    for_policies_without_dispatch(|| {
        cluster(|master| with_clients(master, 2, park_clients, then), serve);
    });
}

fn remaining_worker_receives_parked_connections_of_a_disconnecting_one() {
    assert_given_to_the_remaining_worker(serve);
}

fn remaining_worker_receives_parked_connections_with_its_callback() {
    assert_given_to_the_remaining_worker(serve_with_callback);
}

fn master_holds_parked_connections_until_a_worker_listens() {
    let first = |address| {
        let mut clients: Vec<_> = (0..20).map(|_| Client::connect(address)).collect();
        ask_all(&mut clients);
        clients
    };
    let then = |master: &Master, clients: Vec<Client>| {
        only(master, 1).disconnect();
        let clients = Cell::new(Some(clients));
        master.on_exit_once(move |master, _, _| {
            let mut clients = clients.take().unwrap();
            assert_eq!(master.ledger().in_flight(), 20);
            // Send a request while no worker runs. The next worker must answer it.
            clients[0].send(PARK);
            drop(master.fork().unwrap());
            let ask = move || {
                assert_eq!(clients[0].line(), "2 2");
                assert!(
                    ask_all(&mut clients[1..])
                        .iter()
                        .all(|answer| *answer == (2, 2))
                );
                clients
            };
            in_background(master, ask, |master, clients| {
                drop(clients);
                assert_eq!(master.ledger().in_flight(), 0);
                master.disconnect();
            });
        });
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| {
                let listener = master.listen("127.0.0.1:0").unwrap();
                with_clients(master, 1, first, then);
                master.on_all_disconnected_once(move |_| drop(listener));
            },
            serve,
        );
    });
}

fn parked_connections_of_a_killed_worker_close() {
    let first = |address| {
        let mut client = Client::connect(address);
        client.ask(PARK);
        client
    };
    let then = |master: &Master, mut client: Client| {
        only(master, 1).process().kill(Signal::KILL);
        in_background(master, move || assert_eq!(client.line(), ""), disconnect);
    };
    for_policies_without_dispatch(|| {
        cluster(|master| with_clients(master, 1, first, then), serve);
    });
}

fn idle_connections_survive_a_reload() {
    const CLIENTS: usize = 200;
    let play = || {
        let pool = |master: &Master| {
            let pool = Pool::new(master, quick());
            pool.listen(master, "127.0.0.1:0").unwrap();
            let idle: Rc<RefCell<Option<Vec<Client>>>> = Rc::default();
            let clients = Rc::clone(&idle);
            let own = pool.clone();
            when_listening(master, 2, move |master, address| {
                let connect = move || {
                    let clients = (0..CLIENTS).map(|_| Client::connect(address));
                    let mut clients: Vec<_> = clients.collect();
                    ask_all(&mut clients);
                    clients
                };
                in_background(master, connect, move |master, idle| {
                    clients.replace(Some(idle));
                    own.reload(master);
                });
            });
            pool.on_event(move |pool, master, event| match event {
                PoolEvent::Reloaded { .. } => {
                    let mut clients = idle.take().unwrap();
                    let own = pool.clone();
                    let ask = move || {
                        let answers = ask_all(&mut clients);
                        assert!(answers.iter().all(|(id, _)| [3, 4].contains(id)));
                        assert!(answers.iter().all(|(_, requests)| *requests == 2));
                        let ids: BTreeSet<_> = answers.iter().map(|(id, _)| *id).collect();
                        assert_eq!(ids.len(), 2, "both workers have received some");
                    };
                    in_background(master, ask, move |master, ()| own.stop(master));
                }
                PoolEvent::WorkerShutDown { killed, .. } => assert!(!killed),
                _ => {}
            });
        };
        cluster(pool, serve);
    };
    for_policies_without_dispatch(play);
}

fn connection_parked_after_its_listener_closed_goes_to_another_worker() {
    let clients = |address| {
        let mut client = Client::connect(address);
        let (first, _) = client.ask(PARK);
        let (second, requests) = client.ask(PARK);
        assert_eq!(requests, 2);
        assert_ne!(first, second, "the first worker has closed its listener");
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 2, clients, disconnect),
            |worker| {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                if let Some(connection) = listener.accept().unwrap() {
                    if connection.requests() == 1 {
                        listener.close();
                    }
                    answer(&worker, connection);
                }
                worker.run().unwrap();
            },
        );
    });
}

/// Checks that a connection which is parked after its listener has closed returns to the same worker,
/// if this worker is the only one and listens again.
fn only_worker_resumes_a_connection_of_its_closed_listener_on_its_next_one() {
    let clients = |address| {
        let mut client = Client::connect(address);
        assert_eq!(client.ask(PARK), (1, 1));
        assert_eq!(client.ask(PARK), (1, 2));
        assert_eq!(client.ask(CLOSE), (1, 3));
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| {
                let listener = master.listen("127.0.0.1:0").unwrap();
                with_clients(master, 1, clients, disconnect);
                master.on_all_disconnected_once(move |_| drop(listener));
            },
            |worker| {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                let connection = listener.accept().unwrap().unwrap();
                listener.close();
                drop(listener);
                let next = worker.listen("127.0.0.1:0").unwrap();
                answer(&worker, connection);
                for connection in next.incoming() {
                    answer(&worker, connection.unwrap());
                }
            },
        );
    });
}
