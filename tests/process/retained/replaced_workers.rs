//! Tests under load that killing or replacing all workers refuses no client.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cluster::{Master, SchedulingPolicy, WorkerProcess};

use super::{NONE, RR, SHARDED, disconnect, end_all, fork, kill, listen};
use crate::harness::{Log, cluster, in_background, wait_until};
use crate::sharded::{Count, Load};

crate::scenarios! {
    killing_all_workers_refuses_no_client_rr
    killing_all_workers_refuses_no_client_none
    killing_all_workers_refuses_no_client_sharded
    replacing_all_workers_loses_no_client_rr
    replacing_all_workers_loses_no_client_none
    replacing_all_workers_loses_no_client_sharded
}

const WORKERS: u32 = 4;
const ROUNDS: u32 = 6;

/// Minimum number of clients that are served between two replacements of the workers.
const SERVED: u32 = 20;

/// Starts workers, and replaces all of them `rounds` times under load.
///
/// In each round all workers end, and new workers start after the last one has exited. A round
/// begins once at least `SERVED` more clients have their answers.
fn replace_workers(
    master: &Master,
    rounds: u32,
    answered: Arc<AtomicU32>,
    end: fn(&WorkerProcess),
    then: Box<dyn FnOnce(&Master)>,
) {
    fork(master, WORKERS as usize, move |master| {
        if rounds == 0 {
            return then(master);
        }
        let before = answered.load(Ordering::SeqCst);
        let enough = move || {
            let count = answered.load(Ordering::SeqCst);
            (count >= before + SERVED).then(|| Arc::clone(&answered))
        };
        in_background(
            master,
            || wait_until("clients that have been served", enough),
            move |master, answered| {
                end_all(master, end, move |master| {
                    replace_workers(master, rounds - 1, answered, end, then);
                });
            },
        );
    });
}

fn under_load(policy: SchedulingPolicy, end: fn(&WorkerProcess), check: impl Fn(Count) + 'static) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (retained, address) = listen(master, policy);
            let load = Load::begin(address);
            let answered = load.answered();
            let finish = move |master: &Master| {
                in_background(
                    master,
                    move || load.end(),
                    move |master, (_, count)| {
                        check(count);
                        let ledger = master.ledger();
                        assert_eq!((ledger.dropped, ledger.in_flight()), (0, 0), "{ledger:?}");
                        log.add("all");
                        drop(retained);
                        master.disconnect();
                    },
                );
            };
            replace_workers(master, ROUNDS, answered, end, Box::new(finish));
        },
        |worker| {
            for connection in worker.listen("127.0.0.1:0").unwrap().incoming() {
                let id = format!("{}.", worker.id());
                let _ = connection.unwrap().write_all(id.as_bytes());
            }
        },
    );
    assert_eq!(entries.take(), ["all"]);
}

fn killing_all_workers_refuses_no_client(policy: SchedulingPolicy) {
    under_load(policy, kill, |count| {
        // Each killed worker may lose the one connection that it is serving.
        let cut_off = count.reset + count.wrong;
        assert!(cut_off <= u64::from(WORKERS * ROUNDS), "{count:?}");
        assert_eq!((count.refused, count.timed_out), (0, 0));
    });
}

fn killing_all_workers_refuses_no_client_rr() {
    killing_all_workers_refuses_no_client(RR);
}

fn killing_all_workers_refuses_no_client_none() {
    killing_all_workers_refuses_no_client(NONE);
}

fn killing_all_workers_refuses_no_client_sharded() {
    killing_all_workers_refuses_no_client(SHARDED);
}

fn replacing_all_workers_loses_no_client(policy: SchedulingPolicy) {
    under_load(policy, disconnect, |count| {
        assert_eq!(count, Count::NO_FAILURE);
    });
}

fn replacing_all_workers_loses_no_client_rr() {
    replacing_all_workers_loses_no_client(RR);
}

fn replacing_all_workers_loses_no_client_none() {
    replacing_all_workers_loses_no_client(NONE);
}

fn replacing_all_workers_loses_no_client_sharded() {
    replacing_all_workers_loses_no_client(SHARDED);
}
