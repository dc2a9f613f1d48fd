//! Tests the time limits of a pool's workers: until they are ready, and between their heartbeats.

use std::time::Duration;

use cluster::pool::{FailureCause, HEARTBEAT, Pool, PoolEvent, READY, Readiness, SLOT};

use super::{MS, note, quick, serve_slot};
use crate::harness::{Log, cluster, spin};

crate::scenarios! {
    worker_that_is_never_ready_is_killed
    worker_without_heartbeat_is_killed
    worker_reports_its_own_readiness
    pool_without_limits_sets_no_timers
}

fn worker_that_is_never_ready_is_killed() {
    cluster(
        |master| {
            let pool = Pool::new(master, quick().workers(1).startup_timeout(50 * MS));
            pool.on_event(|pool, master, event| {
                if let PoolEvent::WorkerFailed(death) = event {
                    assert_eq!(death.cause, FailureCause::StartupTimeout);
                    assert!(death.age >= 50 * MS);
                    pool.stop_at_once(master);
                }
            });
        },
        // The worker comes online, but never listens.
        |worker| worker.run().unwrap(),
    );
}

fn worker_without_heartbeat_is_killed() {
    cluster(
        |master| {
            let pool = Pool::new(master, quick().heartbeat_timeout(Some(400 * MS)));
            pool.on_event(|pool, master, event| {
                if let PoolEvent::WorkerFailed(death) = event {
                    assert_eq!(
                        (death.slot, death.cause),
                        (1, FailureCause::HeartbeatTimeout)
                    );
                    let status = pool.status(master);
                    let other = status.slots[0].worker.as_ref().unwrap();
                    assert!(other.age >= 400 * MS, "the other worker sends heartbeats");
                    pool.stop_at_once(master);
                }
            });
        },
        |worker| {
            worker.set_interval(20 * MS, |worker| drop(worker.send(HEARTBEAT)));
            let listener = worker.listen("127.0.0.1:0").unwrap();
            if std::env::var(SLOT).unwrap() == "1" {
                loop {
                    spin();
                }
            }
            listener.incoming().for_each(drop);
        },
    );
}

fn worker_reports_its_own_readiness() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let pool = Pool::new(master, quick().workers(1).readiness(Readiness::Message));
            note(&pool, &log);
            let at_listening = log.clone();
            master.on_listening(move |_, _, _| at_listening.add("listening"));
            pool.on_event(|pool, master, event| {
                if matches!(event, PoolEvent::WorkerReady { .. }) {
                    pool.stop(master);
                }
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let _ = worker.send(READY).unwrap();
            listener.incoming().for_each(drop);
        },
    );
    assert_eq!(
        entries.take(),
        [
            "listening",
            "slot 0: worker 1 is ready",
            "ready",
            "stopping",
            "slot 0: worker 1 is disconnecting",
            "not ready",
            "slot 0: worker 1 has exited"
        ]
    );
}

fn pool_without_limits_sets_no_timers() {
    cluster(
        |master| {
            let pool = Pool::new(master, quick());
            while pool.status(master).ready_workers() < 2 {
                master.dispatch(None).unwrap();
            }
            while let Some(left) = master.time_left() {
                assert_eq!(left, Duration::ZERO, "a timer is set");
                master.dispatch(Some(Duration::ZERO)).unwrap();
            }
            pool.stop(master);
        },
        |worker| serve_slot(&worker),
    );
}
