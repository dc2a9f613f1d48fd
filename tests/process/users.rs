//! Tests workers of two users that serve the same listener.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use cluster::{Master, Settings};

use crate::harness::{
    NOBODY, OWN_PROGRAM, cluster, fork_patiently, in_background, share_listeners, when_listening,
};
use crate::parked::{Client, PARK, serve, when_ledger};

crate::scenarios! {
    parked_connection_returns_only_to_workers_of_the_same_user: ROOT
    idle_connections_close_when_the_last_worker_of_their_user_disconnects_rr: ROOT
    idle_connections_close_when_the_last_worker_of_their_user_disconnects_none: ROOT
}

/// The worker whose user is `nobody`. The workers with lower numbers have the master's user.
const NOBODYS: u32 = 3;

/// Forks two workers of the master's user and one of `nobody`, and then calls `then` with the
/// address of their listener.
fn with_two_users(master: &Master, then: impl FnOnce(&Master, SocketAddr) + 'static) {
    when_listening(master, 3, then);
    let settings = || Settings::default().exec(OWN_PROGRAM);
    for worker in 1..=3 {
        let settings = match worker == NOBODYS {
            true => settings().uid(NOBODY).gid(NOBODY),
            false => settings(),
        };
        master.setup_master(settings);
        let forked = fork_patiently(|| master.fork());
        assert_eq!(forked.id().get(), worker);
    }
}

/// Connects clients until workers of both users have served one. Returns a client of each: that of
/// the master's user first.
fn clients_of_both_users(address: SocketAddr) -> [Client; 2] {
    let (mut own, mut nobodys) = (None, None);
    while own.is_none() || nobodys.is_none() {
        // Connect a client for each worker before any of them sends a request. A worker waits for the
        // request of its client, so the kernel gives the next connection to another worker.
        let mut clients: Vec<_> = (1..=3).map(|_| Client::connect(address)).collect();
        clients.iter_mut().for_each(|client| client.send(PARK));
        for mut client in clients {
            match client.answer() {
                (NOBODYS, 1) => nobodys = Some(client),
                (_, 1) => own = Some(client),
                other => panic!("{other:?}"),
            }
        }
    }
    [own, nobodys].map(Option::unwrap)
}

fn parked_connection_returns_only_to_workers_of_the_same_user() {
    let ask = |address| {
        let clients = clients_of_both_users(address);
        clients.map(|mut client| {
            let workers = (0..50).map(|_| client.ask(PARK).0);
            workers.collect::<BTreeSet<_>>()
        })
    };
    cluster(
        move |master| {
            with_two_users(master, move |master, address| {
                in_background(
                    master,
                    move || ask(address),
                    |master, [own, nobodys]| {
                        assert!(!own.contains(&NOBODYS), "{own:?}");
                        assert_eq!(nobodys, BTreeSet::from([NOBODYS]));
                        master.disconnect();
                    },
                );
            });
        },
        serve,
    );
}

/// Disconnects `nobody`'s worker. Checks that only the clients that it has served are closed.
fn closes_idle_connections_of_the_last_worker(prepare: fn(&Master)) {
    cluster(
        move |master| {
            prepare(master);
            with_two_users(master, |master, address| {
                let connect = move || clients_of_both_users(address);
                in_background(master, connect, |master, clients| {
                    let worker = master.worker(NOBODYS).unwrap();
                    worker.disconnect();
                    let is_closed = |ledger: &cluster::Ledger| ledger.idle_closed > 0;
                    when_ledger(master, is_closed, |master| {
                        let [mut own, mut nobodys] = clients;
                        let ask = move || {
                            assert_eq!(nobodys.line(), "", "end-of-file");
                            own.ask(PARK)
                        };
                        in_background(master, ask, |master, (worker, requests)| {
                            assert_ne!(worker, NOBODYS);
                            assert_eq!(requests, 2);
                            master.disconnect();
                        });
                    });
                });
            });
        },
        serve,
    );
}

fn idle_connections_close_when_the_last_worker_of_their_user_disconnects_rr() {
    closes_idle_connections_of_the_last_worker(|_| {});
}

fn idle_connections_close_when_the_last_worker_of_their_user_disconnects_none() {
    closes_idle_connections_of_the_last_worker(share_listeners);
}
