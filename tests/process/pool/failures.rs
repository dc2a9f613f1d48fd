//! Tests what a pool does when workers fail: it replaces them, waits between attempts, or gives up.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::pool::{FailureAction, FailureCause, Pool, PoolEvent, PoolOptions};
use cluster::{Error, Settings};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{MS, Server, is_served, note, pid, quick, serve_slot, server, test_duration};
use crate::counting::Load;
use crate::harness::{Log, cluster, is_alive, is_watched, scaled, wait_until};

crate::scenarios! {
    dead_worker_is_replaced_in_its_slot
    crash_loop_ends_when_the_pool_gives_up
    crash_loop_forks_at_the_configured_times
    failed_fork_is_treated_as_a_death
    disconnect_by_the_application_is_treated_as_a_failure
    failure_limit_callback_chooses_retry_give_up_or_stop
    killed_workers_lose_only_received_connections
}

fn dead_worker_is_replaced_in_its_slot() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let pool = Pool::new(master, quick().workers(3));
            note(&pool, &log);
            let failures = Cell::new(0);
            pool.on_event(move |pool, master, event| {
                if let PoolEvent::WorkerReady { slot: 1, .. } = event {
                    let status = pool.status(master);
                    let worker = status.slots[1].worker.as_ref().unwrap();
                    assert_eq!(status.slots[1].restarts, failures.get());
                    if failures.get() == 2 {
                        return pool.stop(master);
                    }
                    failures.set(failures.get() + 1);
                    let worker = master.worker(worker.worker).unwrap();
                    worker.process().kill(cluster::Signal::KILL);
                }
            });
        },
        |worker| serve_slot(&worker),
    );
    let entries = entries.take();
    let of_slot = |entry: &&String| entry.starts_with("slot 1");
    let mut of_slot = entries.iter().filter(of_slot);
    let mut assert_next = |part: &str| {
        let entry = of_slot.next().unwrap();
        assert!(entry.contains(part), "{entry:?} is not {part:?}");
    };
    for _ in 0..2 {
        assert_next("is ready");
        assert_next("(signal: 9 (SIGKILL))");
    }
    assert_next("is ready");
    assert_next("is disconnecting");
    assert_next("has exited");
}

fn crash_loop_ends_when_the_pool_gives_up() {
    let forks = Rc::new(RefCell::new(Vec::new()));
    let noted_forks = Rc::clone(&forks);
    cluster(
        |master| {
            let options = quick()
                .workers(1)
                .max_failures(6)
                .failure_window(Duration::from_secs(60));
            let pool = Pool::new(master, options);
            master.on_fork(move |_, _| noted_forks.borrow_mut().push(Instant::now()));
            pool.set_failure_limit_callback(|_, _, death| {
                assert_eq!(
                    (death.slot, death.cause),
                    (0, FailureCause::ExitedBeforeReady)
                );
                assert_eq!(death.status.unwrap().code(), Some(3));
                assert!(death.usage.is_some());
                FailureAction::GiveUp
            });
            pool.on_event(|pool, master, event| {
                if matches!(event, PoolEvent::FailureLimitReached { .. }) {
                    assert!(pool.status(master).slots[0].is_given_up);
                    let pool = pool.clone();
                    // Wait for longer than the next back-off pause would be, to check that the pool
                    // forks no worker.
                    master.set_timeout(2000 * MS, move |master| {
                        assert_eq!(pool.status(master).slots[0].restarts, 6);
                        pool.stop(master);
                    });
                }
            });
        },
        |_| std::process::exit(3),
    );
    let forks = forks.take();
    let pauses: Vec<_> = forks.windows(2).map(|pair| pair[1] - pair[0]).collect();
    println!("{pauses:?}");
    assert_eq!(forks.len(), 7);
    for (pause, least) in pauses.iter().zip([0, 20, 40, 80, 160, 320]) {
        assert!(*pause >= least * MS, "{pauses:?}");
    }
}

/// Checks the times of the forks in a crash loop that runs for about [`test_duration`].
///
/// The pool has one worker and adds no jitter. Its failure limit and failure window keep it from
/// ever giving up. All other options have their defaults.
fn crash_loop_forks_at_the_configured_times() {
    let pauses = std::iter::successors(Some(100 * MS), |pause| Some(*pause * 2));
    let mut least = vec![Duration::ZERO, Duration::ZERO];
    for pause in pauses.map(|pause| pause.min(Duration::from_secs(30))) {
        let next = least[least.len() - 1] + pause;
        if next > test_duration() {
            break;
        }
        least.push(next);
    }
    let forks = Rc::new(RefCell::new(Vec::new()));
    let (noted_forks, expected) = (Rc::clone(&forks), least.len());
    cluster(
        |master| {
            let options = PoolOptions::default().workers(1).jitter(0);
            let pool = Pool::new(master, options.max_failures(u32::MAX).failure_window(MS));
            let begin = Instant::now();
            master.on_fork(move |master, _| {
                let mut forks = noted_forks.borrow_mut();
                forks.push(begin.elapsed());
                if forks.len() == expected {
                    pool.stop(master);
                }
            });
        },
        |_| std::process::exit(1),
    );
    let forks = forks.take();
    println!("{forks:?}");
    assert_eq!(forks.len(), expected, "{forks:?}");
    assert!(
        forks.iter().zip(&least).all(|(fork, least)| fork >= least),
        "{forks:?}"
    );
}

fn failed_fork_is_treated_as_a_death() {
    cluster(
        |master| {
            master.setup_master(Settings::default().exec("/nowhere/at/all"));
            let pool = Pool::new(
                master,
                quick()
                    .max_failures(2)
                    .failure_window(Duration::from_secs(60)),
            );
            let failures = Cell::new(0);
            pool.on_event(move |pool, _, event| match event {
                PoolEvent::WorkerFailed(death) => {
                    assert_eq!(death.cause, FailureCause::ForkFailed);
                    let error = death.error.as_deref().unwrap();
                    assert!(error.contains("/nowhere/at/all"), "{error}");
                    failures.set(failures.get() + 1);
                }
                PoolEvent::FailureLimitReached { .. } => assert!(failures.get() >= 3),
                // By default, the pool stops if no worker is ready when a slot reaches its failure
                // limit. Any other event must come from this stop.
                event => assert!(pool.is_stopping(), "{event}"),
            });
            assert!(matches!(master.run(), Err(Error::GaveUp { .. })));
        },
        |_| unreachable!(),
    );
}

fn disconnect_by_the_application_is_treated_as_a_failure() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let pool = Pool::new(master, quick().workers(1));
            pool.on_event(move |pool, master, event| match event {
                PoolEvent::QuorumReached => {
                    master.workers()[0].disconnect();
                }
                PoolEvent::WorkerFailed(failure) => {
                    assert_eq!(failure.cause, FailureCause::Exited);
                    log.add(failure.status.unwrap().to_string());
                    pool.stop(master);
                }
                _ => {}
            });
        },
        |worker| serve_slot(&worker),
    );
    assert_eq!(entries.take(), ["exit status: 0"]);
}

fn failure_limit_callback_chooses_retry_give_up_or_stop() {
    let calls = Rc::new(Cell::new(0));
    let count = Rc::clone(&calls);
    cluster(
        |master| {
            let pool = Pool::new(
                master,
                quick()
                    .workers(1)
                    .max_failures(0)
                    .failure_window(Duration::from_secs(1)),
            );
            pool.set_failure_limit_callback(move |_, _, _| {
                count.set(count.get() + 1);
                match count.get() {
                    1 => FailureAction::RetryAfter(30 * MS),
                    2 => FailureAction::GiveUp,
                    _ => FailureAction::StopPool,
                }
            });
            let given_up = Cell::new(0);
            pool.on_event(move |pool, master, event| {
                if matches!(event, PoolEvent::FailureLimitReached { .. }) {
                    given_up.set(given_up.get() + 1);
                    if given_up.get() == 2 {
                        let pool = pool.clone();
                        master.set_timeout(30 * MS, move |master| pool.retry(master));
                    }
                }
            });
            assert!(matches!(master.run(), Err(Error::GaveUp { .. })));
        },
        |_| std::process::exit(1),
    );
    assert_eq!(calls.get(), 3);
}

fn killed_workers_lose_only_received_connections() {
    if is_watched() {
        let options = quick().workers(4).max_failures(u32::MAX).failure_window(MS);
        return server(options.back_off_cap(100 * MS));
    }
    let server = Server::start("rr");
    wait_until("all workers", || {
        (server.workers().len() == 4).then_some(())
    });
    let load = Load::start(server.address, 4, is_served);
    load.wait_for_requests(500);
    let before = measure(server.master());
    let end = Instant::now() + test_duration();
    let (mut kills, mut rounds) = (0, 0);
    while Instant::now() < end {
        let workers = server.workers();
        if let Some(worker) = fastrand::choice(workers) {
            // Count the kill only if it succeeds, because a disconnecting worker may exit by
            // itself.
            let was_alive = is_alive(pid(worker));
            kills += u64::from(was_alive && kill(worker, Signal::SIGKILL).is_ok());
        }
        rounds += 1;
        if rounds % 50 == 0 || test_duration() < Duration::from_secs(10) && rounds % 10 == 0 {
            server.signal(Signal::SIGHUP);
        }
        // The pause is the rate of the kills.
        std::thread::sleep(100 * MS);
    }
    load.wait_for_requests(500);
    let counts = load.end();
    println!("{kills} kills, {counts:?}");
    // Allow one lost client for each kill, because a worker holds one connection at a time.
    assert!(counts.lost() <= kills, "{counts:?} with {kills} kills");
    assert_eq!(
        (counts.refused, counts.timed_out, counts.failed),
        (0, 0, 0),
        "{counts:?}"
    );
    let deadline = Instant::now() + scaled(Duration::from_secs(20));
    let (all_alive, (fds, kib)) = loop {
        let workers = server.workers();
        let all_alive = workers.len() == 4 && workers.iter().all(|worker| is_alive(pid(*worker)));
        let after = measure(server.master());
        if all_alive && after.0 <= before.0 || Instant::now() > deadline {
            break (all_alive, after);
        }
        // Check again, because nothing reports that the master has closed a descriptor.
        std::thread::sleep(MS);
    };
    println!("before {before:?}, after {:?}", (fds, kib));
    assert!(
        all_alive,
        "{:?}\n{}",
        server.workers(),
        server.group.output()
    );
    // Allow fewer descriptors than in `before`, which may include connections in flight.
    assert!(fds <= before.0, "{}", server.group.output());
    assert!(kib <= before.1 + 1024, "the master's memory has grown");
    server.stop();
}

/// Returns a process's number of open descriptors, and its resident memory in KiB.
fn measure(process: Pid) -> (usize, u64) {
    let fds = std::fs::read_dir(format!("/proc/{process}/fd"))
        .unwrap()
        .count();
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    let kib = line.trim().trim_end_matches(" kB").parse().unwrap();
    (fds, kib)
}
