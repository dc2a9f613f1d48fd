//! Tests that upgrades of a pool close no idle connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use nix::sys::signal::{Signal, kill};

use super::{Client, HOLD, MS, assert_nothing_closed, clients, server, take_over, upgrade};
use crate::harness::{is_alive, is_watched, wait_until};
use crate::pool::{Server, pid, quick, wait_for_exit};

crate::scenarios! {
    idle_connections_outlive_upgrades_rr
    idle_connections_outlive_upgrades_none
    idle_connections_outlive_upgrades_sharded
    idle_connections_outlive_changes_of_the_policy
    silent_connections_outlive_upgrades
    connection_parked_while_draining_goes_to_the_new_master_rr
    connection_parked_while_draining_goes_to_the_new_master_none
    connection_parked_in_the_first_of_three_masters_goes_to_the_third
    requests_at_the_takeover_are_answered_rr
    requests_at_the_takeover_are_answered_none
    requests_at_the_takeover_are_answered_sharded
    failed_upgrade_keeps_idle_connections
    idle_connections_stay_if_sigquit_ends_the_old_master
}

/// Clients that send one request after another on their connections, until this value is dropped.
struct Busy {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU32>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Busy {
    fn start(address: SocketAddr, count: usize) -> Self {
        let (stop, answered) = <(Arc<AtomicBool>, Arc<AtomicU32>)>::default();
        let client = |_| {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            std::thread::spawn(move || {
                let mut client = Client::connect(address);
                for number in 1.. {
                    assert_eq!(client.ask().1, number);
                    answered.fetch_add(1, Ordering::SeqCst);
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                }
            })
        };
        let threads = (0..count).map(client).collect();
        Self {
            stop,
            answered,
            threads,
        }
    }

    /// Waits until `count` more requests have been answered.
    fn wait(&self, count: u32) {
        let end = self.answered.load(Ordering::SeqCst) + count;
        wait_until("answers", || {
            (self.answered.load(Ordering::SeqCst) >= end).then_some(())
        });
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        let threads = self.threads.into_iter();
        threads.for_each(|thread| thread.join().expect("each request is answered"));
    }
}

fn idle_connections_outlive_upgrades_rr() {
    idle_connections_outlive_upgrades("rr");
}

fn idle_connections_outlive_upgrades_none() {
    idle_connections_outlive_upgrades("none");
}

fn idle_connections_outlive_upgrades_sharded() {
    idle_connections_outlive_upgrades("sharded");
}

fn idle_connections_outlive_upgrades(policy: &str) {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start(policy);
    let mut idle = clients(&server, 100);
    let busy = Busy::start(server.address, 4);
    for upgrade in 1..=3 {
        busy.wait(20);
        let old = take_over(&server);
        wait_for_exit(old);
        let master = server.master();
        assert_ne!(master, old);
        for client in &mut idle[..50] {
            assert_eq!(client.ask(), (master, upgrade + 1));
        }
    }
    busy.end();
    for client in &mut idle[50..] {
        assert_eq!(client.ask(), (server.master(), 2));
    }
    drop(idle);
    server.stop_and_check(assert_nothing_closed);
}

/// Each release uses another policy than the one before.
fn idle_connections_outlive_changes_of_the_policy() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("sharded");
    let mut clients = clients(&server, 20);
    for (upgrade, policy) in ["rr", "none", "rr"].iter().enumerate() {
        server.release(policy);
        wait_for_exit(take_over(&server));
        for client in &mut clients {
            assert_eq!(client.ask(), (server.master(), upgrade as u64 + 2));
        }
    }
    drop(clients);
    server.stop_and_check(assert_nothing_closed);
}

/// The clients send their first request only after the upgrade.
fn silent_connections_outlive_upgrades() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    server.release("waits for data");
    wait_for_exit(take_over(&server));
    let clients = (0..20).map(|_| Client::connect(server.address));
    let mut clients: Vec<_> = clients.collect();
    // This client connects last, so the master has accepted the others.
    assert_eq!(Client::connect(server.address).ask(), (server.master(), 1));
    wait_for_exit(take_over(&server));
    for client in &mut clients {
        assert_eq!(client.ask(), (server.master(), 1));
        assert_eq!(client.ask(), (server.master(), 2));
    }
    drop(clients);
    server.stop_and_check(assert_nothing_closed);
}

fn connection_parked_while_draining_goes_to_the_new_master_rr() {
    connection_parked_while_draining_goes_to_the_new_master("rr");
}

fn connection_parked_while_draining_goes_to_the_new_master_none() {
    connection_parked_while_draining_goes_to_the_new_master("none");
}

/// Checks two clients. Only the connection of the second client has been parked before the upgrade.
fn connection_parked_while_draining_goes_to_the_new_master(policy: &str) {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start(policy);
    let mut clients = [false, true].map(|is_parked| {
        let mut client = Client::connect(server.address);
        if is_parked {
            client.ask();
        }
        client.send(HOLD);
        assert_eq!(client.line(), "held");
        (client, 1 + u64::from(is_parked))
    });
    let old = take_over(&server);
    assert!(is_alive(pid(old)), "its workers are busy");
    for (client, requests) in &mut clients {
        assert_eq!(client.ask(), (old, *requests));
        let (master, count) = client.ask();
        assert_eq!(count, *requests + 1);
        // With a shared listener, the old worker may receive the next request before it learns that
        // it is disconnecting.
        assert!(master == server.master() || policy == "none" && master == old);
    }
    wait_for_exit(old);
    for (client, requests) in &mut clients {
        assert_eq!(client.ask(), (server.master(), *requests + 2));
    }
    drop(clients);
    server.stop_and_check(assert_nothing_closed);
}

fn connection_parked_in_the_first_of_three_masters_goes_to_the_third() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    let mut client = Client::connect(server.address);
    assert_eq!(client.ask(), (server.master(), 1));
    client.send(HOLD);
    assert_eq!(client.line(), "held");
    let first = take_over(&server);
    let second = take_over(&server);
    wait_until("the exits of the second master's workers", || {
        let output = server.group.output();
        let of_second = format!("{second}: slot");
        let exited = output.lines().filter(|line| line.starts_with(&of_second));
        let exited = exited.filter(|line| line.ends_with("has exited"));
        (exited.count() == 2).then_some(())
    });
    // Without anything to wait for, the second master would exit within milliseconds.
    std::thread::sleep(100 * MS);
    assert!(is_alive(pid(second)), "the first master still serves");
    assert_eq!(client.ask(), (first, 2));
    wait_for_exit(first);
    wait_for_exit(second);
    assert_eq!(client.ask(), (server.master(), 3));
    drop(client);
    server.stop_and_check(assert_nothing_closed);
}

fn requests_at_the_takeover_are_answered_rr() {
    requests_at_the_takeover_are_answered("rr");
}

fn requests_at_the_takeover_are_answered_none() {
    requests_at_the_takeover_are_answered("none");
}

fn requests_at_the_takeover_are_answered_sharded() {
    requests_at_the_takeover_are_answered("sharded");
}

fn requests_at_the_takeover_are_answered(policy: &str) {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start(policy);
    let mut clients = clients(&server, 40);
    for round in 1..=3 {
        let old = server.master();
        kill(old, Signal::SIGUSR2).unwrap();
        // Send requests before, during and after the takeover.
        let mut clients = clients.iter_mut().collect::<Vec<_>>().into_iter();
        let mut sent = Vec::new();
        for client in clients.by_ref().take(20) {
            client.send("ask");
            sent.push(client);
            // The pauses spread the requests over the takeover.
            std::thread::sleep(3 * MS);
        }
        server.wait_for("this master has taken over", round);
        for client in clients {
            client.send("ask");
            sent.push(client);
        }
        for client in sent {
            assert_eq!(client.receive().1, round as u64 + 1);
        }
        wait_for_exit(old);
    }
    drop(clients);
    server.stop_and_check(assert_nothing_closed);
}

fn failed_upgrade_keeps_idle_connections() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    let mut clients = clients(&server, 20);
    let master = server.master();
    server.release("exits");
    kill(master, Signal::SIGUSR2).unwrap();
    wait_until("a failed upgrade", || {
        let output = server.group.output();
        output.contains("the new master failed").then_some(())
    });
    for client in &mut clients {
        assert_eq!(client.ask(), (master, 2));
    }
    server.release("good");
    wait_until("the exit of the rejected master", || {
        let others = server.masters().into_iter();
        let mut others = others.filter(|other| *other != master);
        (!others.any(|other| is_alive(pid(other)))).then_some(())
    });
    upgrade(&server, master);
    wait_for_exit(master);
    for client in &mut clients {
        assert_eq!(client.ask(), (server.master(), 3));
    }
    drop(clients);
    server.stop_and_check(assert_nothing_closed);
}

/// The old master receives SIGQUIT while one of its workers is busy. The old master then kills its
/// workers and exits.
fn idle_connections_stay_if_sigquit_ends_the_old_master() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    let mut clients = clients(&server, 20);
    let mut busy = Client::connect(server.address);
    busy.send(HOLD);
    assert_eq!(busy.line(), "held");
    let old = take_over(&server);
    kill(old, Signal::SIGQUIT).unwrap();
    wait_for_exit(old);
    for client in &mut clients {
        assert_eq!(client.ask(), (server.master(), 2));
    }
    drop((clients, busy));
    server.stop();
}
