//! Tests of workers that do not receive their connection in time and are treated as stalled.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use cluster::{Master, Signal, Worker, WorkerProcess};

use crate::harness::{
    Log, answer_pings, cluster, in_background, stop, when_all_wait, when_listening,
};

crate::scenarios! {
    connection_of_two_stopped_workers_goes_to_the_one_that_continues
}

/// Maximum time until the client has its answer. A first penalty lasts 40 ms.
const PATIENCE: Duration = Duration::from_secs(20);

/// Answers each connection with the worker's id, after one byte has arrived.
fn serve(worker: &Worker) {
    answer_pings(worker);
    for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
        let mut connection = connection.unwrap();
        connection.read_exact(&mut [0]).unwrap();
        write!(connection, "{}", worker.id()).unwrap();
    }
}

/// Calls `then` with the worker from whose queue the connection was reclaimed.
fn when_reclaimed(master: &Master, then: impl FnOnce(&Master, WorkerProcess) + 'static) {
    master.set_timeout(Duration::from_millis(1), move |master| {
        let loads = master.loads().workers;
        let Some(load) = loads.into_iter().find(|load| load.returned > 0) else {
            return when_reclaimed(master, then);
        };
        let mut workers = master.workers().into_iter();
        let stalled = workers.find(|worker| worker.id() == load.worker).unwrap();
        then(master, stalled);
    });
}

/// Checks that the master needs no further event to reclaim the connection for a stalled worker.
///
/// The master reclaims the connection from the first worker for the second one, which does not run
/// either. Then the first worker runs again, and has nothing to report. The end of its penalty is
/// the only occasion on which the connection can return to it.
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
                            client.set_read_timeout(Some(PATIENCE)).unwrap();
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
        |worker| serve(&worker),
    );
    assert_eq!(entries.take(), ["answered"]);
}
