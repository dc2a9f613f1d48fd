//! Tests a master whose successor does not read what it passes, or is gone.

use std::cell::{Cell, RefCell};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{Error, Master};

use super::{Client, MS, count_errors, serve};
use crate::harness::{cluster, in_background, scaled, when_listening};

crate::scenarios! {
    stop_ends_at_the_deadline_if_the_successor_never_reads
    connections_are_held_again_if_the_successor_is_gone
}

/// Starts a worker, and passes the connections of `count` clients to a successor once the worker
/// listens. Calls `then` with the successor's end of the stream and the clients, whose connections
/// have been parked.
fn with_successor(
    master: &Master,
    count: usize,
    deadline: Duration,
    then: impl FnOnce(&Master, UnixStream, Vec<Client>) + 'static,
) {
    when_listening(master, 1, move |master, address| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        master.pass_parked(ours, deadline).unwrap();
        let ask = move || {
            let mut clients: Vec<_> = (0..count).map(|_| Client::connect(address)).collect();
            for client in &mut clients {
                assert_eq!(client.ask().1, 1);
            }
            clients
        };
        in_background(master, ask, move |master, clients| {
            let mut rest = Some((then, theirs, clients));
            let own = Rc::new(Cell::new(None));
            let id = Rc::clone(&own);
            own.set(Some(master.set_interval(MS, move |master| {
                if master.ledger().parked == count as u64 {
                    master.clear_timer(id.get().unwrap());
                    let (then, theirs, clients) = rest.take().unwrap();
                    then(master, theirs, clients);
                }
            })));
        });
    });
    drop(master.fork().unwrap());
}

fn stop_ends_at_the_deadline_if_the_successor_never_reads() {
    const CLIENTS: usize = 40;
    const DEADLINE: Duration = Duration::from_millis(1500);
    let start = Instant::now();
    let kept = Rc::new(RefCell::new(None));
    let ledger = Rc::new(Cell::new(None));
    let noted = Rc::clone(&ledger);
    cluster(
        |master| {
            let errors = count_errors(master);
            with_successor(master, CLIENTS, DEADLINE, move |master, theirs, clients| {
                let passed = master.ledger().passed;
                assert!((1..CLIENTS as u64).contains(&passed), "{passed}");
                kept.replace(Some((theirs, clients)));
                master.disconnect();
                let begin = Instant::now();
                master.on_error(move |master, _, error| {
                    let is_timeout = matches!(error, Error::Io { reason, .. }
                        if reason.kind() == std::io::ErrorKind::TimedOut);
                    assert!(is_timeout, "{error}");
                    assert!(begin.elapsed() <= DEADLINE + scaled(500 * MS));
                    assert_eq!(errors.get(), 1);
                    noted.set(Some(master.ledger()));
                    drop(kept.take());
                });
            });
        },
        serve,
    );
    assert!(start.elapsed() >= DEADLINE);
    let ledger = ledger.take().expect("the error is reported");
    assert_eq!(ledger.passed + ledger.idle_closed, CLIENTS as u64);
}

fn connections_are_held_again_if_the_successor_is_gone() {
    const CLIENTS: usize = 40;
    cluster(
        |master| {
            let errors = count_errors(master);
            let deadline = scaled(Duration::from_secs(60));
            with_successor(master, CLIENTS, deadline, move |master, theirs, clients| {
                let passed = usize::try_from(master.ledger().passed).unwrap();
                assert!((1..CLIENTS).contains(&passed), "{passed}");
                drop(theirs);
                let mut clients = clients;
                let ask = move || {
                    for client in &mut clients[passed..] {
                        assert_eq!(client.ask().1, 2);
                    }
                    clients
                };
                in_background(master, ask, move |master, clients| {
                    assert_eq!(errors.get(), 1);
                    drop(clients);
                    master.disconnect();
                });
            });
        },
        serve,
    );
}
