//! Checks which workers a pool keeps running, replaces and upgrades, and how this affects clients.

use std::cell::{Cell, RefCell};
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::pool::{
    FailureAction, FailureCause, HEARTBEAT, Limit, Pool, PoolEvent, PoolOptions, READY, Readiness,
    ReloadFailure, SLOT, ignore_pool_signals,
};
use cluster::{Error, Role, Settings, SpawnOptions, Worker};
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::unistd::{Pid, getpgid, getsid};

use crate::counting::{Counts, Load};
use crate::harness::{
    Group, Log, WATCHED, cluster, is_alive, is_watched, note_messages, of, reserve_port, scaled,
    talk, wait_until, watched,
};

crate::scenarios! {
    dead_worker_is_replaced_in_its_slot
    crash_loop_ends_when_the_pool_gives_up
    crash_loop_forks_at_the_configured_times
    failed_fork_is_treated_as_a_death
    disconnect_by_the_application_is_treated_as_a_failure
    worker_that_is_never_ready_is_killed
    worker_without_heartbeat_is_killed
    worker_reports_its_own_readiness
    old_workers_are_replaced_without_a_gap
    busy_workers_are_replaced_without_a_gap
    large_workers_are_replaced_without_a_gap
    reload_applies_new_settings
    failed_reloads_keep_the_settings_of_the_serving_generation
    reload_before_the_first_fork_uses_its_own_settings
    detached_workers_are_not_forked
    pool_without_limits_sets_no_timers
    status_reports_workers_and_failures
    failure_limit_callback_chooses_retry_give_up_or_stop
    reloads_scalings_and_upgrades_lose_no_client_rr
    reloads_scalings_and_upgrades_lose_no_client_none
    unix_socket_passes_from_master_to_master
    pool_notifies_systemd
    broken_reloads_change_nothing
    broken_upgrades_change_nothing
    stop_at_once_kills_a_new_master_that_does_not_serve
    new_master_that_stops_does_not_take_over
    new_master_stays_in_the_session_and_process_group
    killed_workers_lose_only_received_connections
    second_signal_or_sigquit_kills_busy_workers
}

const MS: Duration = Duration::from_millis(1);

/// Returns pool options with short periods and without jitter.
pub fn quick() -> PoolOptions {
    PoolOptions::default()
        .workers(2)
        .jitter(0)
        .back_off(20 * MS)
        .min_ready_time(20 * MS)
}

/// Logs the pool's events.
fn note(pool: &Pool, log: &Log) {
    let log = log.clone();
    pool.on_event(move |_, _, event| log.add(event.to_string()));
}

fn serve_slot(worker: &Worker) {
    let listener = worker.listen("127.0.0.1:0").unwrap();
    let slot = std::env::var(SLOT).unwrap();
    for connection in listener.incoming() {
        let _ = connection.unwrap().write_all(slot.as_bytes());
    }
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

/// Checks the times and the number of forks in a crash loop that runs for [`test_duration`].
///
/// The pool has one worker and adds no jitter. Its failure limit and failure window keep it from
/// ever giving up. All other options have their defaults.
fn crash_loop_forks_at_the_configured_times() {
    let forks = Rc::new(RefCell::new(Vec::new()));
    let noted_forks = Rc::clone(&forks);
    cluster(
        |master| {
            let options = PoolOptions::default().workers(1).jitter(0);
            let pool = Pool::new(master, options.max_failures(u32::MAX).failure_window(MS));
            let begin = Instant::now();
            master.on_fork(move |_, _| noted_forks.borrow_mut().push(begin.elapsed()));
            master.set_timeout(test_duration(), move |master| pool.stop(master));
        },
        |_| std::process::exit(1),
    );
    let forks = forks.take();
    println!("{forks:?}");
    let pauses = std::iter::successors(Some(100 * MS), |pause| Some(*pause * 2));
    let mut least = vec![Duration::ZERO, Duration::ZERO];
    for pause in pauses.map(|pause| pause.min(Duration::from_secs(30))) {
        let next = least[least.len() - 1] + pause;
        if next > test_duration() {
            break;
        }
        least.push(next);
    }
    assert_eq!(forks.len(), least.len(), "{forks:?}");
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
                    std::hint::spin_loop();
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
            "slot 0: worker 1 is disconnecting",
            "not ready",
            "slot 0: worker 1 has exited"
        ]
    );
}

fn old_workers_are_replaced_without_a_gap() {
    assert_replaced_without_a_gap(quick().max_age(Some(30 * MS)), Limit::Age, |_| {});
}

fn busy_workers_are_replaced_without_a_gap() {
    assert_replaced_without_a_gap(
        quick().max_connections(Some(5)),
        Limit::Connections,
        |address| {
            std::thread::spawn(move || while talk(address, b"").is_ok() {});
        },
    );
}

fn large_workers_are_replaced_without_a_gap() {
    assert_replaced_without_a_gap(quick().max_memory(Some(32 << 20)), Limit::Memory, |_| {
        // Write to every page, so that it is resident. Keep the memory reachable, so that a leak
        // checker does not report it.
        thread_local!(static MEMORY: RefCell<Vec<u8>> = RefCell::default());
        MEMORY.set(vec![1u8; 64 << 20]);
    });
}

/// Checks that a pool of one worker has a ready worker at every moment while it replaces a worker
/// that has reached `limit`.
fn assert_replaced_without_a_gap(options: PoolOptions, limit: Limit, reach_limit: fn(SocketAddr)) {
    let recycled = Rc::new(Cell::new(0));
    let seen = Rc::clone(&recycled);
    cluster(
        |master| {
            let pool = Pool::new(master, options.workers(1).check_interval(5 * MS));
            pool.listen(master, "127.0.0.1:0").unwrap();
            pool.on_event(move |pool, master, event| match event {
                PoolEvent::Recycling { limit: found, .. } => {
                    assert_eq!(*found, limit);
                    seen.set(seen.get() + 1);
                }
                PoolEvent::WorkerShutDown { killed, .. } => {
                    assert!(!killed);
                    if seen.get() >= 3 {
                        pool.stop(master);
                    }
                }
                PoolEvent::QuorumLost => assert!(pool.is_stopping(), "a gap"),
                PoolEvent::WorkerReady { .. }
                | PoolEvent::WorkerDisconnecting { .. }
                | PoolEvent::QuorumReached
                | PoolEvent::RecyclingPostponed { .. } => {}
                other => panic!("{other}"),
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            reach_limit(listener.local_addr().unwrap());
            for connection in listener.incoming() {
                let _ = connection.unwrap().write_all(b"served");
            }
        },
    );
    assert!(recycled.get() >= 3);
}

fn reload_applies_new_settings() {
    let args = |release: &str| Settings::default().args([release.to_owned()]);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.setup_master(args("one"));
            let pool = Pool::new(master, quick());
            let messages = log.clone();
            master.on_message(move |_, _, message| {
                messages.add(String::from_utf8_lossy(message.bytes()));
            });
            note(&pool, &log);
            pool.on_event(move |pool, master, event| match event {
                PoolEvent::QuorumReached => pool.reload_with(master, args("broken")),
                PoolEvent::ReloadFailed { generation: 1, .. } => {
                    let status = pool.status(master);
                    assert_eq!((status.ready_workers(), status.generation), (2, 0));
                    let worker = status.slots[0].worker.as_ref().unwrap().worker;
                    let worker = master.worker(worker).unwrap();
                    worker.process().kill(cluster::Signal::KILL);
                }
                PoolEvent::WorkerFailed(_) => pool.reload_with(master, args("two")),
                PoolEvent::Reloaded { generation: 2, .. } => pool.stop(master),
                _ => {}
            });
        },
        |worker| {
            let release = std::env::args().nth(1).unwrap();
            assert_ne!(release, "broken");
            let _ = worker.send(release.as_bytes()).unwrap();
            serve_slot(&worker);
        },
    );
    let entries = entries.take();
    let count = |what: &str| entries.iter().filter(|entry| *entry == what).count();
    // Expect one more worker of the old release if the killed worker was replaced before the
    // reload.
    assert!((2..=3).contains(&count("one")), "{entries:?}");
    assert_eq!(count("two"), 2, "{entries:?}");
}

fn with_args(release: &str) -> Settings {
    Settings::default().args([release])
}

/// Sends the process's first argument to the master, and serves until the master disconnects the
/// worker.
fn send_release_and_serve(worker: &Worker) {
    let release = std::env::args().nth(1).unwrap();
    let _ = worker.send(release.as_bytes()).unwrap();
    if let Ok(listener) = worker.listen("127.0.0.1:0") {
        listener.incoming().for_each(drop);
    }
}

/// Checks the settings after three reloads. Only the first reload succeeds.
///
/// The second reload replaces the worker in slot 0 and fails in slot 1. Then the pool is scaled
/// down to slot 0 alone, and the third reload fails there.
fn failed_reloads_keep_the_settings_of_the_serving_generation() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.setup_master(with_args("initial"));
            let pool = Pool::new(master, quick());
            note_messages(master, &log);
            let is_first = Cell::new(true);
            let is_last = Cell::new(false);
            pool.on_event(move |pool, master, event| match event {
                PoolEvent::QuorumReached if is_first.replace(false) => {
                    pool.reload_with(master, with_args("serves"));
                }
                PoolEvent::Reloaded { generation: 1, .. } => {
                    pool.reload_with(master, with_args("not in slot 1"));
                }
                PoolEvent::ReloadFailed {
                    generation: 2,
                    replaced,
                    ..
                } => {
                    assert_eq!(*replaced, 1);
                    pool.scale(master, 1);
                    pool.reload_with(master, with_args("broken"));
                }
                PoolEvent::ReloadFailed { .. } => {
                    pool.scale(master, 2);
                    is_last.set(true);
                }
                PoolEvent::WorkerReady { .. } if is_last.get() => pool.stop(master),
                _ => {}
            });
        },
        |worker| {
            let release = std::env::args().nth(1).unwrap();
            let slot = std::env::var(SLOT).unwrap();
            if release == "broken" || release == "not in slot 1" && slot == "1" {
                std::process::exit(1);
            }
            send_release_and_serve(&worker);
        },
    );
    let entries = entries.take();
    assert!(entries.last().unwrap().ends_with(" serves"), "{entries:?}");
}

fn reload_before_the_first_fork_uses_its_own_settings() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.setup_master(with_args("one"));
            let pool = Pool::new(master, quick());
            pool.reload_with(master, with_args("two"));
            note_messages(master, &log);
            pool.on_event(|pool, master, event| {
                if let PoolEvent::Reloaded { .. } = event {
                    pool.stop(master);
                }
            });
        },
        |worker| send_release_and_serve(&worker),
    );
    let entries = entries.take();
    for (worker, release) in [(1, "one"), (2, "one"), (3, "two"), (4, "two")] {
        let messages = of(worker, &entries);
        // Allow no message, because the first workers may be disconnected before they send one.
        let is_silent = messages.is_empty() && release == "one";
        assert!(is_silent || messages == [release], "{entries:?}");
    }
}

/// Checks that a pool rejects settings for detached workers.
///
/// A pool is not notified when a detached process exits, so a stop would never finish.
fn detached_workers_are_not_forked() {
    cluster(
        |master| {
            let pool = Pool::new(master, quick());
            pool.on_event(|pool, master, event| match event {
                PoolEvent::QuorumReached => {
                    let settings = Settings::default().exec("/bin/true").detached(true);
                    pool.reload_with(master, settings);
                }
                PoolEvent::ReloadFailed { reason, .. } => {
                    let ReloadFailure::WorkerFailed(death) = reason else {
                        panic!("{reason}")
                    };
                    assert_eq!(death.cause, FailureCause::ForkFailed);
                    let error = death.error.as_deref();
                    assert_eq!(error, Some("a detached process is not a worker"));
                    pool.stop(master);
                }
                _ => {}
            });
        },
        |worker| serve_slot(&worker),
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

fn status_reports_workers_and_failures() {
    cluster(
        |master| {
            let pool = Pool::new(master, quick().workers(2));
            pool.on_event(|pool, master, event| match event {
                PoolEvent::QuorumReached if pool.status(master).failures == 0 => {
                    let status = pool.status(master);
                    let worker = status.slots[1].worker.as_ref().unwrap().worker;
                    let worker = master.worker(worker).unwrap();
                    worker.process().kill(cluster::Signal::KILL);
                }
                PoolEvent::WorkerReady { slot: 1, .. } if pool.status(master).failures == 1 => {
                    check_status(&pool.status(master));
                    pool.stop(master);
                }
                _ => {}
            });
        },
        |worker| serve_slot(&worker),
    );
}

fn check_status(status: &cluster::pool::Status) {
    assert_eq!(
        (status.ready_workers(), status.failures, status.generation),
        (2, 1, 0)
    );
    let worker = status.slots[1].worker.as_ref().unwrap();
    let json: serde_json::Value = serde_json::from_str(&status.to_json()).unwrap();
    assert_eq!(json["ready"], true);
    assert_eq!(json["slots"][0]["last_failure"], serde_json::Value::Null);
    assert_eq!(json["slots"][1]["worker"]["pid"], worker.pid);
    assert_eq!(json["slots"][1]["worker"]["state"], "ready");
    assert_eq!(json["slots"][1]["restarts"], 1);
    let death = &json["slots"][1]["last_failure"];
    assert_eq!(
        (&death["signal"], &death["cause"]),
        (&9.into(), &"exited".into())
    );
    assert!(death["code"].is_null());
    assert!(death["usage"]["max_rss"].as_u64().unwrap() > 100_000);
    let text = status.to_string();
    assert!(
        text.starts_with("ready: generation 0, 2 ready of 2, 1 failures, up"),
        "{text}"
    );
    assert!(
        text.contains("1 restarts, last: exited (signal: 9 (SIGKILL))"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 4, "{text}");
    let metrics = status.to_prometheus();
    let mut names = Vec::new();
    for line in metrics.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            names.push(rest.split(' ').next().unwrap());
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').unwrap();
            value.parse::<f64>().unwrap();
            assert!(name.starts_with(names.last().unwrap()), "{line}");
        }
    }
    assert!(
        metrics.contains("\ncluster_pool_workers{state=\"ready\"} 2\n"),
        "{metrics}"
    );
    assert!(
        metrics.contains("\ncluster_slot_restarts_total{slot=\"1\"} 1\n"),
        "{metrics}"
    );
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

/// Environment variable with the path to a file. The content of the file selects how [`server`]
/// behaves.
pub const RELEASE: &str = "RELEASE";
/// Request that keeps a worker busy until the client sends 512 more bytes or closes the connection.
pub const HOLD: &[u8] = b"hold";
/// Environment variable with the address on which [`server`] listens.
pub const ADDRESS: &str = "ADDRESS";

/// Runs a pool's master or one of the pool's workers. The master prints the pool's events.
pub fn server(options: PoolOptions) {
    let address = std::env::var(ADDRESS).unwrap();
    let release = std::env::var(RELEASE).map(|path| std::fs::read_to_string(path).unwrap());
    let release = release.unwrap_or_else(|_| "good".to_owned());
    let passed = cluster::systemd::listen_fds().unwrap();
    match cluster::init().unwrap() {
        Role::Master(master) => {
            assert_ne!(release, "no master");
            if release == "blocked master" {
                SigSet::all().thread_block().unwrap();
                println!("master {}", std::process::id());
                loop {
                    std::thread::park();
                }
            }
            let pool = Pool::new(&master, options);
            pool.adopt(&master, passed).unwrap();
            pool.listen(&master, address.as_str()).unwrap();
            let own = std::process::id();
            println!("master {own}");
            pool.on_event(move |_, _, event| println!("{own}: {event}"));
            pool.on_default_signals(&master).unwrap();
            pool.notify_systemd(&master).unwrap();
            if release == "master without workers" {
                pool.scale(&master, 0);
            }
            master.run().unwrap();
        }
        Role::Worker(worker) => {
            ignore_pool_signals(&worker).unwrap();
            match release.as_str() {
                "exits" => std::process::exit(1),
                "never ready" => return worker.run().unwrap(),
                "aborts" => {
                    worker.set_timeout(5 * MS, |_| std::process::abort());
                }
                _ => {}
            }
            let listener = worker.listen(address.as_str()).unwrap();
            for connection in listener.incoming() {
                let mut connection = connection.unwrap();
                let mut request = [0; 512];
                let length = connection.read(&mut request).unwrap_or(0);
                // Ignore an error, because the client may have closed the connection.
                let _ = if request.starts_with(HOLD) {
                    connection
                        .write_all(HOLD)
                        .and_then(|()| connection.read_exact(&mut request))
                } else if length > 0 {
                    connection.write_all(b"served\n")
                } else {
                    Ok(())
                };
            }
        }
    }
}

fn is_served(answer: &str) -> bool {
    answer == "served\n"
}

/// The scenario's server. It runs in another process group.
pub struct Server {
    pub group: Group,
    pub address: SocketAddr,
    release: PathBuf,
}

impl Server {
    pub fn start(policy: &str) -> Self {
        Self::start_with(policy, &[])
    }

    pub fn start_with(policy: &str, env: &[(&str, &str)]) -> Self {
        // Become a subreaper, so that a new master becomes this process's child when the old master
        // exits.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let (reserved, address) = reserve_port();
        let release = std::env::temp_dir().join("release");
        std::fs::write(&release, "good").unwrap();
        let mut command: Command = watched();
        command
            .env(ADDRESS, address.to_string())
            .env(RELEASE, &release)
            .env("CLUSTER_SCHED_POLICY", policy)
            .envs(env.iter().copied());
        let group = Group::start(&mut command).unwrap();
        let server = Self {
            group,
            address,
            release,
        };
        server.wait_for(": ready", 1);
        drop(reserved);
        server
    }

    /// Returns the number of output lines that end with `end`.
    pub fn count(&self, end: &str) -> usize {
        let output = self.group.output();
        output.lines().filter(|line| line.ends_with(end)).count()
    }

    pub fn wait_for(&self, end: &str, count: usize) {
        let deadline = Instant::now() + scaled(Duration::from_secs(60));
        while self.count(end) < count {
            let masters = self.masters();
            let all_exited = !masters.is_empty() && !masters.into_iter().any(|m| is_alive(pid(m)));
            let is_past_deadline = Instant::now() > deadline;
            let has_lines = self.count(end) >= count;
            let output = || format!("{count} x {end:?}\n{}", self.group.output());
            assert!(
                has_lines || !all_exited && !is_past_deadline,
                "{}",
                output()
            );
            // Check again, because the output is a file, and nothing reports its growth.
            std::thread::sleep(MS);
        }
    }

    pub fn masters(&self) -> Vec<Pid> {
        let output = self.group.output();
        let masters = output
            .lines()
            .filter_map(|line| line.strip_prefix("master "));
        masters
            .map(|pid| Pid::from_raw(pid.parse().unwrap()))
            .collect()
    }

    /// Returns the newest master.
    pub fn master(&self) -> Pid {
        *self.masters().last().unwrap()
    }

    pub fn workers(&self) -> Vec<Pid> {
        children(self.master())
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.master(), signal).unwrap();
    }

    pub fn release(&self, what: &str) {
        std::fs::write(&self.release, what).unwrap();
    }

    pub fn stop(self) {
        self.stop_and_check(|_| {});
    }

    /// Stops the newest master, waits for its exit, and calls `check` with the complete output.
    pub fn stop_and_check(self, check: impl FnOnce(&Self)) {
        let master = self.master();
        self.end_of(master, check);
    }

    /// Does the same as [`Server::stop_and_check`], but stops this master.
    pub fn end_of(self, master: Pid, check: impl FnOnce(&Self)) {
        // Ignore an error, because an earlier signal may already have stopped the master.
        let _ = kill(master, Signal::SIGTERM);
        self.finish(master, check);
    }

    /// Waits for the exit of this master and of all other processes, and calls `check` with the
    /// complete output.
    pub fn finish(self, master: Pid, check: impl FnOnce(&Self)) {
        wait_for_exit(master);
        let status = self.group.end().unwrap();
        println!("{}", self.group.output());
        assert!(status.success(), "{status}");
        check(&self);
        std::fs::remove_file(&self.release).unwrap();
    }
}

pub fn pid(pid: Pid) -> u32 {
    pid.as_raw().unsigned_abs()
}

pub fn wait_for_exit(master: Pid) {
    wait_until("the exit of the master", || {
        (!is_alive(pid(master))).then_some(())
    });
}

pub fn children(parent: Pid) -> Vec<Pid> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let children = std::fs::read_to_string(path).unwrap_or_default();
    children
        .split_whitespace()
        .map(|pid| Pid::from_raw(pid.parse().unwrap()))
        .collect()
}

#[track_caller]
fn assert_no_client_lost(counts: Counts) {
    println!("{counts:?}");
    assert_eq!(counts.lost(), 0, "{counts:?}");
    assert!(counts.answered > 100, "{counts:?}");
}

fn reloads_scalings_and_upgrades_lose_no_client_rr() {
    reloads_scalings_and_upgrades_lose_no_client("rr");
}

fn reloads_scalings_and_upgrades_lose_no_client_none() {
    reloads_scalings_and_upgrades_lose_no_client("none");
}

fn reloads_scalings_and_upgrades_lose_no_client(policy: &str) {
    if is_watched() {
        return server(quick().min_ready_time(5 * MS));
    }
    let server = Server::start(policy);
    let load = Load::start(server.address, 4, is_served);
    let mut ready = 2;
    for round in 1..=50 {
        server.signal(Signal::SIGHUP);
        server.wait_for(" serves", round);
        if round % 5 == 0 {
            let of_slot_2 = |what: &str| {
                let output = server.group.output();
                let lines = output.lines().filter(|line| line.contains(": slot 2: "));
                lines.filter(|line| line.ends_with(what)).count()
            };
            for (signal, outcome) in [
                (Signal::SIGTTIN, "is ready"),
                (Signal::SIGTTOU, "has exited"),
            ] {
                let before = of_slot_2(outcome);
                server.signal(signal);
                wait_until("slot 2", || (of_slot_2(outcome) > before).then_some(()));
                load.wait_for_requests(20);
            }
            let old = server.master();
            server.signal(Signal::SIGUSR2);
            wait_until("a new master", || (server.master() != old).then_some(()));
            wait_for_exit(old);
            ready += 1;
            server.wait_for(": ready", ready - 1);
        }
    }
    assert_no_client_lost(load.end());
    server.stop();
}

/// Checks that the socket file exists without interruption, even if a new master fails, and is
/// removed at the end.
fn unix_socket_passes_from_master_to_master() {
    const PATH: &str = "server.sock";
    if is_watched() {
        let passed = cluster::systemd::listen_fds().unwrap();
        let directory = PathBuf::from(std::env::var(RELEASE).unwrap());
        let directory = directory.parent().unwrap();
        let path = directory.join(PATH);
        match cluster::init().unwrap() {
            Role::Master(master) => {
                let is_broken = directory.join("broken").exists();
                let options = quick().workers(if is_broken { 0 } else { 1 });
                let pool = Pool::new(&master, options);
                pool.adopt(&master, passed).unwrap();
                pool.listen(&master, path.as_path()).unwrap();
                let own = std::process::id();
                println!("master {own}");
                pool.on_event(move |_, _, event| println!("{own}: {event}"));
                pool.on_default_signals(&master).unwrap();
                if is_broken {
                    // Stop the new master before it serves a listener. It exits normally, but the
                    // upgrade fails.
                    pool.stop(&master);
                }
                master.run().unwrap();
            }
            Role::Worker(worker) => {
                let listener = worker.listen(path).unwrap();
                for connection in listener.incoming() {
                    let _ = connection.unwrap().write_all(b"served");
                }
            }
        }
        return;
    }
    // Change the directory to use a shorter path. The kernel records this path as the socket's
    // address, and the length of an address is limited.
    std::env::set_current_dir(std::env::temp_dir()).unwrap();
    let server = Server::start("rr");
    let path = std::env::temp_dir().join(PATH);
    let ask = || {
        let mut answer = String::new();
        let mut client = UnixStream::connect(&path).unwrap();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "served");
    };
    ask();
    for round in 1..=3 {
        let broken = std::env::temp_dir().join("broken");
        std::fs::write(&broken, "").unwrap();
        let old = server.master();
        kill(old, Signal::SIGUSR2).unwrap();
        server.wait_for(&format!("{old}: the new master failed: exit status: 0"), 1);
        ask();
        std::fs::remove_file(broken).unwrap();
        kill(old, Signal::SIGUSR2).unwrap();
        wait_for_exit(old);
        server.wait_for(": ready", 1 + round);
        ask();
    }
    server.stop();
    assert!(!path.exists());
}

/// Checks the pool's notifications. This process acts as the service manager and receives them.
fn pool_notifies_systemd() {
    const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";
    if is_watched() {
        return server(quick().stop_delay(500 * MS));
    }
    let path = std::env::temp_dir().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager
        .set_read_timeout(Some(scaled(Duration::from_secs(20))))
        .unwrap();
    let receive = || {
        let mut buffer = [0; 1024];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    };
    let ready_of = |master: Pid| format!("READY=1\nMAINPID={master}\nWATCHDOG=1");
    // Skip status texts and watchdog notifications, because their number varies.
    let next_notification = || loop {
        let notification = receive();
        if !notification.starts_with("STATUS=") && notification != "WATCHDOG=1" {
            return notification;
        }
    };
    let server = Server::start_with(
        "rr",
        &[
            (NOTIFY_SOCKET, path.to_str().unwrap()),
            ("WATCHDOG_USEC", "20000"),
        ],
    );
    assert_eq!(next_notification(), ready_of(server.master()));
    while receive() != "WATCHDOG=1" {}
    server.signal(Signal::SIGHUP);
    let reloading = next_notification();
    let time = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=");
    assert!(time.unwrap().parse::<u64>().unwrap() > 0, "{reloading}");
    assert_eq!(next_notification(), ready_of(server.master()));

    let old = server.master();
    server.signal(Signal::SIGUSR2);
    wait_until("a new master", || (server.master() != old).then_some(()));
    assert_eq!(next_notification(), ready_of(server.master()));
    wait_for_exit(old);
    while receive() != "WATCHDOG=1" {}

    // Check that the pool sends no watchdog notification without a quorum.
    server.release("exits");
    for worker in server.workers() {
        kill(worker, Signal::SIGKILL).unwrap();
    }
    server.wait_for(": not ready", 2);
    manager.set_nonblocking(true).unwrap();
    let silence = std::iter::from_fn(|| manager.recv(&mut [0; 1024]).ok());
    silence.for_each(drop);
    manager.set_nonblocking(false).unwrap();
    server.release("good");
    loop {
        let notification = receive();
        assert_ne!(
            notification, "WATCHDOG=1",
            "a watchdog notification before the pool was ready"
        );
        if notification.starts_with("READY=1") {
            break;
        }
    }
    server.signal(Signal::SIGTERM);
    assert_eq!(next_notification(), "STOPPING=1");
    // Check that the watchdog does not expire while the pool stops.
    while receive() != "WATCHDOG=1" {}
    server.stop();
    std::fs::remove_file(path).unwrap();
}

fn broken_reloads_change_nothing() {
    if is_watched() {
        // No worker stays ready for this time, so a worker that aborts late also fails the reload.
        let options = quick().min_ready_time(Duration::from_secs(1000));
        return server(options.startup_timeout(150 * MS));
    }
    let server = Server::start("rr");
    let load = Load::start(server.address, 4, is_served);
    let workers = server.workers();
    let broken = ["exits", "never ready", "aborts"];
    for round in 0..20 {
        server.release(broken[round % 3]);
        server.signal(Signal::SIGHUP);
        wait_until("a failure", || {
            let output = server.group.output();
            let failures = output
                .lines()
                .filter(|line| line.contains(" failed after 0 replaced"));
            (failures.count() > round).then_some(())
        });
        load.wait_for_requests(20);
    }
    wait_until("the exit of the failed workers", || {
        (server.workers().len() == 2).then_some(())
    });
    assert_eq!(server.workers(), workers);
    assert_no_client_lost(load.end());
    server.release("good");
    server.stop();
}

fn broken_upgrades_change_nothing() {
    if is_watched() {
        // A worker that aborts late must also fail the upgrade. A longer minimum ready time would
        // delay the failures of masters that never take over.
        let options = quick().min_ready_time(Duration::from_secs(1));
        return server(options.startup_timeout(300 * MS));
    }
    let server = Server::start("rr");
    let (master, workers) = (server.master(), server.workers());
    let failures = Cell::new(0);
    let fail = |broken: &str| {
        server.release(broken);
        kill(master, Signal::SIGUSR2).unwrap();
        failures.set(failures.get() + 1);
        wait_until("a failure", || {
            let output = server.group.output();
            let own = format!("{master}: the new master failed");
            let lines = output.lines().filter(|line| line.starts_with(&own));
            (lines.count() == failures.get()).then_some(())
        });
    };
    let load = Load::start(server.address, 4, is_served);
    for broken in [
        "no master",
        "master without workers",
        "exits",
        "never ready",
    ]
    .repeat(2)
    {
        fail(broken);
        load.wait_for_requests(20);
    }
    assert_no_client_lost(load.end());
    // Do not run a load here, because workers that abort after becoming ready lose their clients.
    fail("aborts");
    wait_until("the exit of the failed workers", || {
        (children(master).len() == 2).then_some(())
    });
    assert_eq!(children(master), workers);
    let load = Load::start(server.address, 4, is_served);
    load.wait_for_requests(200);
    assert_no_client_lost(load.end());
    server.release("good");
    kill(master, Signal::SIGTERM).unwrap();
    wait_for_exit(master);
    assert!(server.group.end().unwrap().success());
    std::fs::remove_file(&server.release).unwrap();
}

/// Checks that an immediate stop (by a second signal or SIGQUIT) also kills a new master that
/// blocks SIGTERM and does not serve. The drain time is longer than the test, so the kill cannot
/// come from the drain deadline.
fn stop_at_once_kills_a_new_master_that_does_not_serve() {
    if is_watched() {
        let long = Duration::from_secs(1000);
        return server(quick().startup_timeout(long).drain_timeout(long));
    }
    for signals in [&[Signal::SIGTERM, Signal::SIGINT][..], &[Signal::SIGQUIT]] {
        let server = Server::start("rr");
        let old = server.master();
        server.release("blocked master");
        server.signal(Signal::SIGUSR2);
        wait_until("a new master", || (server.master() != old).then_some(()));
        for (round, signal) in signals.iter().enumerate() {
            if round > 0 {
                // The pool ignores a repeated stop signal for one second.
                std::thread::sleep(1100 * MS);
            }
            kill(old, *signal).unwrap();
            server.wait_for(": the new master failed: the pool is stopping", 1);
        }
        assert!(server.group.end().unwrap().success());
        std::fs::remove_file(&server.release).unwrap();
    }
}

/// Checks that a new master does not take over if it stops in the loop iteration in which its
/// minimum ready time ends.
fn new_master_that_stops_does_not_take_over() {
    const PREDECESSOR: &str = "cluster-predecessor";
    if !is_watched() {
        return cluster(
            |master| {
                let (mut ours, theirs) = UnixStream::pair().unwrap();
                let own = std::env::current_exe().unwrap();
                let settings = Settings::default().exec(own).detached(true).setsid(false);
                let settings = settings.listen_fds([(PREDECESSOR, theirs)]);
                let successor = master
                    .fork_as(SpawnOptions::new(settings).envs([WATCHED]))
                    .unwrap();
                successor.process().reference();
                successor.on_exit(move |_, _, status| {
                    assert!(status.success());
                    let length = ours.read(&mut [0]).unwrap();
                    assert_eq!(length, 0, "the new master reported that it serves");
                });
            },
            |_| unreachable!(),
        );
    }
    let passed = cluster::systemd::listen_fds().unwrap();
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let pool = Pool::new(&master, quick().workers(1).min_ready_time(MS));
            pool.adopt(&master, passed).unwrap();
            pool.on_event(|pool, master, event| {
                if let PoolEvent::QuorumReached = event {
                    // Let the minimum ready time, which is 1 ms, end during this callback.
                    std::thread::sleep(5 * MS);
                    pool.stop(master);
                }
            });
            master.run().unwrap();
        }
        Role::Worker(worker) => serve_slot(&worker),
    }
}

/// Checks that a signal to the process group stops both masters if it arrives during an upgrade,
/// and the new master if it arrives after the upgrade.
fn new_master_stays_in_the_session_and_process_group() {
    if is_watched() {
        return server(quick());
    }
    for release in ["never ready", "good"] {
        let server = Server::start("rr");
        let old = server.master();
        let session_and_group = |master| {
            (
                getpgid(Some(master)).unwrap(),
                getsid(Some(master)).unwrap(),
            )
        };
        let expected = session_and_group(old);
        server.release(release);
        server.signal(Signal::SIGUSR2);
        wait_until("a new master", || (server.master() != old).then_some(()));
        let new = server.master();
        if release == "good" {
            server.wait_for(": ready", 2);
            wait_for_exit(old);
        }
        assert_eq!(session_and_group(new), expected);
        killpg(server.group.pid(), Signal::SIGINT).unwrap();
        for master in [old, new] {
            wait_for_exit(master);
        }
        assert!(server.group.end().unwrap().success());
        std::fs::remove_file(&server.release).unwrap();
    }
}

/// Returns the duration of long tests: `CLUSTER_TEST_FIRE` seconds if the variable is set,
/// otherwise 4 seconds.
fn test_duration() -> Duration {
    let wanted = std::env::var("CLUSTER_TEST_FIRE").ok();
    Duration::from_secs(wanted.map_or(4, |wanted| wanted.parse().expect("a number")))
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

/// Checks that a second signal or SIGQUIT kills a worker that stays busy.
fn second_signal_or_sigquit_kills_busy_workers() {
    if is_watched() {
        return server(quick());
    }
    for signals in [&[Signal::SIGTERM, Signal::SIGINT][..], &[Signal::SIGQUIT]] {
        let server = Server::start("rr");
        let mut client = std::net::TcpStream::connect(server.address).unwrap();
        client.write_all(HOLD).unwrap();
        client.read_exact(&mut [0; HOLD.len()]).unwrap();
        for (round, signal) in signals.iter().enumerate() {
            if round > 0 {
                server.wait_for(" has exited", 1);
                // The pool ignores a repeated stop signal for one second.
                std::thread::sleep(1100 * MS);
            }
            assert!(is_alive(pid(server.master())));
            server.signal(*signal);
        }
        assert!(server.group.end().unwrap().success());
        assert_eq!(
            server.count(" was killed"),
            3 - signals.len(),
            "{}",
            server.group.output()
        );
        std::fs::remove_file(&server.release).unwrap();
        drop(client);
    }
}
