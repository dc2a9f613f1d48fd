//! Reloads each server ten times under load, and kills five of its workers, under each policy that
//! the server supports. Prints the failures of the clients by kind.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod clients;
mod server;

use std::net::SocketAddr;
use std::thread::scope;

use clients::{CLIENTS, Client, Counts, Load};
use server::Server;

const ALL: [&str; 3] = ["rr", "none", "sharded"];
/// The policies under which a worker has a listening socket.
const OWN_LISTENER: [&str; 2] = ["none", "sharded"];
/// A UDP socket is shared under every policy.
const UDP: [&str; 1] = ["rr"];

const RELOADS: u32 = 10;
const KILLS: u32 = 5;
/// The answers between two reloads, or two kills.
const ANSWERS: u64 = 50;

/// Puts a server under load, disturbs it `times` times, and returns the failures.
fn disturb(
    server: &mut Server,
    address: SocketAddr,
    client: Client,
    times: u32,
    once: fn(&mut Server),
) -> Counts {
    let load = Load::begin(address, client);
    for _ in 0..times {
        load.wait_for_answers(ANSWERS);
        once(server);
    }
    load.wait_for_answers(ANSWERS);
    load.end()
}

/// Checks a server under each policy. A reload must not cause a failure. A killed worker must not
/// cause more than `at_once` failures, the number of clients that it serves at once.
fn check(example: &str, policies: &[&str], client: Client, at_once: u64) {
    let run = |policy: &str| {
        let (mut server, address) = Server::start(example, policy);
        let reloads = disturb(&mut server, address, client, RELOADS, Server::reload);
        println!("{example} {policy}: reloads: {reloads:?}");
        let kills = disturb(&mut server, address, client, KILLS, Server::kill_worker);
        println!("{example} {policy}: kills: {kills:?}");
        server.stop();
        assert_eq!(reloads.failures(), [0; 4], "{example} {policy}: reloads");
        assert_eq!((kills.refused, kills.wrong), (0, 0), "{example} {policy}");
        let lost = if policies == UDP {
            kills.timed_out
        } else {
            assert_eq!(kills.timed_out, 0, "{example} {policy}: kills");
            kills.reset
        };
        // A worker with its own shard accepts clients before they have sent their requests, and holds
        // them until then, so a kill may lose all of them.
        let at_once = if policy == "sharded" {
            CLIENTS
        } else {
            at_once
        };
        assert!(lost <= u64::from(KILLS) * at_once, "{example} {policy}");
    };
    scope(|scope| {
        for policy in policies {
            scope.spawn(|| run(policy));
        }
    });
}

/// A worker with threads can serve all clients.
const THREADS: u64 = CLIENTS;

#[test]
fn khttp_loses_no_client_in_reloads() {
    check("khttp", &ALL, clients::http, 1);
}

#[test]
fn touche_loses_no_client_in_reloads() {
    check("touche", &ALL, clients::http, THREADS);
}

#[test]
fn tls_loses_no_client_in_reloads() {
    check("tls", &ALL, clients::https, THREADS);
}

#[test]
fn tiny_http_loses_no_client_in_reloads() {
    check("tiny_http", &OWN_LISTENER, clients::http, THREADS);
}

#[test]
fn rouille_loses_no_client_in_reloads() {
    check("rouille", &OWN_LISTENER, clients::http, THREADS);
}

#[test]
fn websocket_loses_no_session_without_a_close_frame_in_reloads() {
    check("websocket", &ALL, clients::websocket, THREADS);
}

#[test]
fn mailin_loses_no_client_in_reloads() {
    check("mailin", &ALL, clients::smtp, 1);
}

#[test]
fn dns_loses_no_client_in_reloads() {
    check("dns", &UDP, clients::dns, 1);
}
