//! Tests that a service does not exit with success if its workers have failed.

use std::net::TcpListener;
use std::time::Duration;

use cluster::pool::{FailureAction, Pool, PoolEvent, PoolOptions, SLOT, WorkerFailure};
use cluster::{Error, Master, Role};
use libtest_mimic::{Failed, Trial};

use crate::harness::{Group, cluster, example};
use crate::pool::quick;

crate::scenarios! {
    run_returns_the_failure_that_stopped_the_pool
    dispatch_returns_the_failure_that_stopped_the_pool
    run_waits_for_other_work_after_a_pool_has_given_up
    run_succeeds_after_a_slot_was_given_up
    stop_chosen_at_the_failure_limit_is_an_error
}

pub fn trials() -> Vec<Trial> {
    ["sticky", "http_server", "pool"]
        .map(|name| {
            Trial::test(format!("{name}_fails_if_its_workers_fail"), || {
                fails_if_its_workers_fail(name)
            })
        })
        .into()
}

fn limited() -> PoolOptions {
    let window = Duration::from_secs(60);
    quick().max_failures(2).failure_window(window)
}

/// Runs a pool whose workers exit with code 3, and checks the error that stops the pool. `run` runs
/// the master's loop until that error, and returns the error.
fn crash_loop(run: impl FnOnce(&Master) -> Error) {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let _pool = Pool::new(&master, limited());
            let error = run(&master);
            assert!(error.to_string().ends_with("(exit status: 3)"), "{error}");
            let Error::GaveUp { reason, .. } = error else {
                panic!("{error}");
            };
            let failure = reason.downcast_ref::<WorkerFailure>().unwrap();
            assert_eq!(failure.status.unwrap().code(), Some(3));
            assert!(master.workers().is_empty());
            master.run().expect("the error is returned once");
        }
        Role::Worker(_) => std::process::exit(3),
    }
}

fn run_returns_the_failure_that_stopped_the_pool() {
    crash_loop(|master| master.run().unwrap_err());
}

fn dispatch_returns_the_failure_that_stopped_the_pool() {
    crash_loop(|master| {
        loop {
            if let Err(error) = master.dispatch(None) {
                return error;
            }
        }
    });
}

fn run_waits_for_other_work_after_a_pool_has_given_up() {
    crash_loop(|master| {
        let begin = std::time::Instant::now();
        master.set_timeout(Duration::from_secs(1), |_| {});
        let error = master.run().unwrap_err();
        assert!(begin.elapsed() >= Duration::from_secs(1));
        error
    });
}

fn run_succeeds_after_a_slot_was_given_up() {
    cluster(
        |master| {
            let pool = Pool::new(master, limited());
            pool.on_event(|pool, master, event| {
                if let PoolEvent::FailureLimitReached { slot: 1, .. } = event {
                    let pool = pool.clone();
                    // The pool decides after this event, so check its decision later.
                    master.set_timeout(Duration::from_millis(50), move |master| {
                        assert!(pool.status(master).slots[1].is_given_up);
                        assert!(!pool.is_stopping());
                        pool.stop(master);
                    });
                }
            });
            // Make the workers of slot 1 exit once worker 1, in slot 0, listens. Because slot 0 is
            // healthy, the pool gives up only slot 1 by default.
            master.on_listening(|master, _, _| {
                for worker in master.workers().into_iter().skip(1) {
                    let _ = worker.send(b"exit");
                }
            });
            master.on_online(|_, worker| {
                if worker.id().get() > 2 {
                    let _ = worker.send(b"exit");
                }
            });
        },
        |worker| {
            if std::env::var(SLOT).unwrap() == "1" {
                worker.on_message(|_, _| std::process::exit(3));
                worker.run().unwrap();
            } else {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                listener.incoming().for_each(drop);
            }
        },
    );
}

fn stop_chosen_at_the_failure_limit_is_an_error() {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let pool = Pool::new(&master, limited());
            pool.set_failure_limit_callback(|_, _, _| FailureAction::StopPool);
            assert!(matches!(master.run(), Err(Error::GaveUp { .. })));
        }
        Role::Worker(_) => std::process::exit(3),
    }
}

/// Checks that an example exits with 1 if its address is in use, so that its workers or its master
/// cannot listen.
fn fails_if_its_workers_fail(name: &str) -> Result<(), Failed> {
    let other = TcpListener::bind("127.0.0.1:0")?;
    let address = other.local_addr()?.to_string();
    let mut command = example(name);
    if name == "http_server" {
        command.args(["--workers", "2", "--addr"]);
    }
    let server = Group::start(command.arg(&address))?;
    assert_eq!(server.end()?.code(), Some(1), "{}", server.output());
    Ok(())
}
