//! Tests when a worker closes parked connections: the client hangs up, or a limit is reached.

use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Instant;

use cluster::{ListenOptions, Master, Worker};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{MS, ask_all, disconnect, only};
use crate::harness::{cluster, for_policies_without_dispatch, open_fds};
use crate::parked::{Client, PARK, serve, serve_with, with_clients};

crate::scenarios! {
    worker_closes_parked_clients_that_hang_up
    worker_closes_silent_clients_after_the_idle_timeout
    worker_closes_the_first_to_expire_beyond_its_maximum
}

/// Calls `then` with the number of open sockets of the only worker once `is_expected` returns true
/// for it. The worker must call `report_sockets`.
fn when_sockets(
    master: &Master,
    is_expected: impl Fn(u8) -> bool + 'static,
    then: impl FnOnce(&Master, u8) + 'static,
) {
    let then = Cell::new(Some(then));
    let own = Rc::new(Cell::new(None));
    let id = Rc::clone(&own);
    own.set(Some(master.on_message(move |master, worker, message| {
        let sockets = message.bytes()[0];
        if is_expected(sockets) {
            master.remove_callback(id.get().unwrap());
            then.take().unwrap()(master, sockets);
        } else {
            // Ask again, because the worker cannot report the moment at which a socket closes.
            std::thread::sleep(MS);
            let _ = worker.send(b"count").unwrap();
        }
    })));
    let _ = only(master, 1).send(b"count").unwrap();
}

fn report_sockets(worker: &Worker) {
    worker.on_message(|worker, _| {
        let fds = open_fds();
        let is_socket = |fd: &&PathBuf| fd.to_string_lossy().starts_with("socket:");
        let count = fds.iter().filter(is_socket).count();
        let _ = worker.send(&[u8::try_from(count).unwrap()]).unwrap();
    });
}

fn worker_closes_parked_clients_that_hang_up() {
    let connect = |address| {
        let mut clients: Vec<_> = (0..10).map(|_| Client::connect(address)).collect();
        ask_all(&mut clients);
        clients
    };
    let then = |master: &Master, clients: Vec<Client>| {
        let is_any = |_| true;
        when_sockets(master, is_any, move |master, all| {
            drop(clients);
            let is_less = move |count| count + 10 == all;
            when_sockets(master, is_less, disconnect);
        });
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, connect, then),
            |worker| {
                report_sockets(&worker);
                serve(worker);
            },
        );
    });
}

fn worker_closes_silent_clients_after_the_idle_timeout() {
    let clients = |address| {
        let mut client = Client::connect(address);
        let start = Instant::now();
        client.ask(PARK);
        assert_eq!(client.line(), "", "end-of-file");
        let elapsed = start.elapsed();
        assert!(elapsed >= 900 * MS, "{elapsed:?}");
    };
    for_policies_without_dispatch(|| {
        cluster(
            |master| with_clients(master, 1, clients, disconnect),
            |worker| {
                let options = ListenOptions::from("127.0.0.1:0");
                serve_with(&worker, options.idle_timeout(MS));
            },
        );
    });
}

fn worker_closes_the_first_to_expire_beyond_its_maximum() {
    let clients = |address| {
        let mut clients = Vec::new();
        for _ in 0..60 {
            let mut client = Client::connect(address);
            client.ask(PARK);
            clients.push(client);
        }
        let (closed, open) = clients.split_at_mut(10);
        assert!(closed.iter_mut().all(|client| client.line().is_empty()));
        assert!(ask_all(open).iter().all(|(_, requests)| *requests == 2));
    };
    for_policies_without_dispatch(|| {
        // With this limit, a worker holds at most 50 parked connections, half of the limit.
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 100, hard).unwrap();
        cluster(|master| with_clients(master, 1, clients, disconnect), serve);
    });
}
