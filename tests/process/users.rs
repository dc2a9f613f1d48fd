//! Tests parked connections of workers with different users. A worker may keep a copy of what it
//! parks, so the connection goes only to workers of the same user.

use std::net::SocketAddr;

use cluster::{Master, SchedulingPolicy, Settings, SpawnOptions};

use crate::harness::{NOBODY, OWN_PROGRAM, cluster, in_background, when_listening};
use crate::parked::{Client, PARK, serve};

crate::scenarios! {
    parked_connections_return_to_workers_of_their_user_rr: ROOT
    parked_connections_return_to_workers_of_their_user_none: ROOT
}

/// The workers 1 and 2 are root, and the workers 3 and 4 are `nobody`.
fn is_nobody(worker: u32) -> bool {
    worker > 2
}

struct Clients {
    of_root: Vec<Client>,
    of_nobody: Vec<Client>,
}

/// Connects clients until workers of both users have served several of them. Each client sends
/// several requests.
fn connect(address: SocketAddr) -> Clients {
    let mut clients = Clients {
        of_root: Vec::new(),
        of_nobody: Vec::new(),
    };
    while clients.of_root.len() < 4 || clients.of_nobody.len() < 4 {
        let mut client = Client::connect(address);
        let user = is_nobody(client.ask(PARK).0);
        for requests in 2..6 {
            let (worker, number) = client.ask(PARK);
            assert_eq!((is_nobody(worker), number), (user, requests));
        }
        match user {
            true => clients.of_nobody.push(client),
            false => clients.of_root.push(client),
        }
    }
    clients
}

/// Disconnects the first worker of `nobody`. Once it has exited, runs `check` on a thread, and then
/// calls `then`.
fn disconnect_one_of_nobody(
    master: &Master,
    mut clients: Clients,
    check: impl FnOnce(&mut Clients) + Send + 'static,
    then: impl FnOnce(&Master, Clients) + 'static,
) {
    let workers = master.workers();
    let worker = workers.iter().find(|worker| is_nobody(worker.id().get()));
    let worker = worker.unwrap();
    let work = move || {
        check(&mut clients);
        clients
    };
    let mut rest = Some((work, then));
    worker.on_exit(move |master, worker, status| {
        assert!(status.success(), "worker {}: {status}", worker.id());
        let (work, then) = rest.take().unwrap();
        in_background(master, work, then);
    });
    worker.disconnect();
}

fn return_to_their_user(policy: SchedulingPolicy) {
    let after_first = |clients: &mut Clients| {
        for client in &mut clients.of_nobody {
            assert_eq!(client.ask(PARK).0, 4);
        }
        for client in &mut clients.of_root {
            assert!(!is_nobody(client.ask(PARK).0));
        }
    };
    let after_second = |clients: &mut Clients| {
        for client in &mut clients.of_nobody {
            assert_eq!(client.line(), "");
        }
        for client in &mut clients.of_root {
            assert!(!is_nobody(client.ask(PARK).0));
        }
    };
    cluster(
        move |master| {
            master.set_scheduling_policy(policy).unwrap();
            when_listening(master, 4, move |master, address| {
                in_background(
                    master,
                    move || connect(address),
                    move |master, clients| {
                        disconnect_one_of_nobody(
                            master,
                            clients,
                            after_first,
                            move |master, clients| {
                                disconnect_one_of_nobody(
                                    master,
                                    clients,
                                    after_second,
                                    |master, clients| {
                                        let closed = clients.of_nobody.len() as u64;
                                        assert_eq!(master.ledger().idle_closed, closed);
                                        assert_eq!(master.ledger().dropped, 0);
                                        master.disconnect();
                                    },
                                );
                            },
                        );
                    },
                );
            });
            let root = Settings::default().exec(OWN_PROGRAM);
            let nobody = root.clone().uid(NOBODY).gid(NOBODY);
            for settings in [&root, &root, &nobody, &nobody] {
                master.fork_as(SpawnOptions::new(settings.clone())).unwrap();
            }
        },
        serve,
    );
}

fn parked_connections_return_to_workers_of_their_user_rr() {
    return_to_their_user(SchedulingPolicy::RoundRobin);
}

fn parked_connections_return_to_workers_of_their_user_none() {
    return_to_their_user(SchedulingPolicy::Shared);
}
