//! Tests that clients wait in the kernel while no worker runs, and that a later worker serves them.

use cluster::SchedulingPolicy;

use super::{NONE, RR, SHARDED, disconnect, end_all, fork, kill, listen, next_worker_serves_all};
use crate::harness::{Log, cluster, serve_id};

crate::scenarios! {
    clients_wait_for_the_next_worker_rr
    clients_wait_for_the_next_worker_none
    clients_wait_for_the_next_worker_sharded
}

fn clients_wait_for_the_next_worker(policy: SchedulingPolicy) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (retained, address) = listen(master, policy);
            next_worker_serves_all(master, address, move |master| {
                fork(master, 3, move |master| {
                    end_all(master, kill, move |master| {
                        next_worker_serves_all(master, address, move |master| {
                            fork(master, 3, move |master| {
                                end_all(master, disconnect, move |master| {
                                    next_worker_serves_all(master, address, move |master| {
                                        log.add("all");
                                        master.on_all_disconnected_once(move |_| drop(retained));
                                        master.disconnect();
                                    });
                                });
                            });
                        });
                    });
                });
            });
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    assert_eq!(entries.take(), ["all"]);
}

fn clients_wait_for_the_next_worker_rr() {
    clients_wait_for_the_next_worker(RR);
}

fn clients_wait_for_the_next_worker_none() {
    clients_wait_for_the_next_worker(NONE);
}

fn clients_wait_for_the_next_worker_sharded() {
    clients_wait_for_the_next_worker(SHARDED);
}
