//! Tests of stalled workers, which do not receive a dispatched connection in time.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use cluster::{Master, Signal, WorkerProcess};

use crate::harness::{
    Log, cluster, in_background, scaled, serve_after_one_byte, stop, when, when_all_wait,
    when_listening,
};

crate::scenarios! {
    connection_of_two_stopped_workers_goes_to_the_one_that_continues
}

/// Maximum time in which the client must have its answer. The first penalty of a stalled worker
/// lasts 40 ms.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until the master has reclaimed the connection, and calls `then` with the worker that did
/// not receive it.
fn when_reclaimed(master: &Master, then: impl FnOnce(&Master, WorkerProcess) + 'static) {
    let stalled = |master: &Master| {
        let loads = master.loads().workers;
        let load = loads.into_iter().find(|load| load.returned > 0)?;
        let mut workers = master.workers().into_iter();
        workers.find(|worker| worker.id() == load.worker)
    };
    let is_reclaimed = move |master: &Master| stalled(master).is_some();
    when(master, is_reclaimed, move |master| {
        then(master, stalled(master).unwrap());
    });
}

/// Checks that the master dispatches a connection to a worker whose penalty has ended, even if no
/// other event occurs.
///
/// The master reclaims the connection from the first worker and dispatches it to the second one,
/// which is stopped too. Then the first worker continues, but sends no frame, because its state has
/// not changed. Only the end of its penalty can make the master dispatch the connection to it
/// again.
fn connection_of_two_stopped_workers_goes_to_the_one_that_continues() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                when_all_wait(master, move |master| {
                    master.workers().iter().for_each(stop);
                    let mut client = TcpStream::connect(address).unwrap();
                    when_reclaimed(master, move |master, stalled| {
                        stalled.process().kill(Signal::CONT);
                        let answer = move || {
                            client.set_read_timeout(Some(scaled(PATIENCE))).unwrap();
                            client.write_all(b"x").unwrap();
                            let mut answer = String::new();
                            client.read_to_string(&mut answer).unwrap();
                            answer
                        };
                        in_background(master, answer, move |master, answer| {
                            assert_eq!(answer, stalled.id().to_string());
                            log.add("answered");
                            for worker in master.workers() {
                                worker.process().kill(Signal::CONT);
                            }
                            master.disconnect();
                        });
                    });
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_after_one_byte(&worker),
    );
    assert_eq!(entries.take(), ["answered"]);
}
