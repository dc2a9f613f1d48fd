//! Tests that idle workers take exact turns.

use std::net::{SocketAddr, TcpStream};

use cluster::Master;

use super::{ask, read_all};
use crate::harness::{
    Log, cluster, count_returned, in_background, serve_after_one_byte, talk, when, when_all_wait,
    when_listening,
};

crate::scenarios! {
    sequential_connections_rotate_exactly
}

/// Number of workers that take turns.
const WORKERS: usize = 4;

/// Checks that sequential clients reach the workers in strict turns.
///
/// On a loaded machine, a worker may receive its connection too late and lose its turn. The answer
/// to that client does not count, and a new rotation begins, perhaps in another order.
fn sequential_connections_rotate_exactly() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, WORKERS, move |master, address| {
                begin_rotation(master, address, log);
            });
            (0..WORKERS).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.len(), 100);
}

/// Keeps all workers busy at the same time, so that no worker is treated as stalled afterwards, and
/// then calls [`next`]. `log` contains the answers that count.
fn begin_rotation(master: &Master, address: SocketAddr, log: Log) {
    when_all_wait(master, move |master| {
        let received = master.ledger().received + WORKERS as u64;
        let clients = [(); WORKERS].map(|()| TcpStream::connect(address).unwrap());
        let all_are_busy = move |master: &Master| master.ledger().received == received;
        when(master, all_are_busy, move |master| {
            let mut clients = Vec::from(clients);
            ask(&mut clients, b"x");
            let read = move || read_all(clients);
            in_background(master, read, move |master, _| {
                next(master, address, Vec::new(), log);
            });
        });
    });
}

/// Connects clients one after another until 100 answers count. Each client connects only when all
/// workers wait in `accept`. `answers` contains the answers since the rotation began.
fn next(master: &Master, address: SocketAddr, mut answers: Vec<String>, log: Log) {
    if log.len() == 100 {
        let ledger = master.ledger();
        assert_eq!(ledger.accepted, ledger.received);
        return master.disconnect();
    }
    when_all_wait(master, move |master| {
        let before = count_returned(master);
        let work = move || talk(address, b"x").unwrap();
        in_background(master, work, move |master, id| {
            if count_returned(master) > before {
                return begin_rotation(master, address, log);
            }
            match answers.len().checked_sub(WORKERS) {
                Some(last) => assert_eq!(id, answers[last], "{answers:?}"),
                None => assert!(!answers.contains(&id), "{answers:?} and {id}"),
            }
            answers.push(id.clone());
            log.add(id);
            next(master, address, answers, log);
        });
    });
}
