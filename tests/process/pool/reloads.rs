//! Tests reloads of a pool, which replace all workers and may apply other settings.

use std::cell::{Cell, RefCell};
use std::io::Write as _;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use cluster::pool::{FailureCause, Limit, Pool, PoolEvent, PoolOptions, ReloadFailure, SLOT};
use cluster::{Settings, Worker};
use nix::sys::signal::Signal;

use super::{MS, Server, assert_no_client_lost, is_served, note, quick, serve_slot, server};
use crate::counting::Load;
use crate::harness::{Log, cluster, is_watched, note_messages, of, talk, wait_until};

crate::scenarios! {
    old_workers_are_replaced_without_a_gap
    busy_workers_are_replaced_without_a_gap
    large_workers_are_replaced_without_a_gap
    reload_applies_new_settings
    failed_reloads_keep_the_settings_of_the_serving_generation
    reload_before_the_first_fork_uses_its_own_settings
    detached_workers_are_not_forked
    broken_reloads_change_nothing
    reload_stops_when_replaced_workers_crash
}

/// Kills the first new worker when it has replaced the old worker of slot 0. The reload must not
/// replace the other two.
fn reload_stops_when_replaced_workers_crash() {
    let failed = Rc::new(Cell::new(None));
    let seen = Rc::clone(&failed);
    cluster(
        |master| {
            let pool = Pool::new(master, quick().workers(3).quorum(Some(3)));
            pool.listen(master, "127.0.0.1:0").unwrap();
            pool.on_event(move |pool, master, event| match event {
                PoolEvent::QuorumReached if pool.status(master).generation == 0 => {
                    pool.reload(master);
                }
                PoolEvent::WorkerShutDown { slot: 0, .. } if !pool.is_stopping() => {
                    let new = master.worker(4_u32).unwrap();
                    new.process().kill(cluster::Signal::KILL);
                }
                PoolEvent::ReloadFailed {
                    replaced,
                    reason: ReloadFailure::WorkerFailed(failure),
                    ..
                } => {
                    seen.set(Some((*replaced, failure.worker.unwrap().get())));
                    let old = [2_u32, 3].map(|old| master.worker(old).unwrap());
                    assert!(old.iter().all(|old| old.is_connected()), "{old:?}");
                    pool.stop(master);
                }
                PoolEvent::Reloaded { .. } => pool.stop(master),
                _ => {}
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.incoming().for_each(drop);
        },
    );
    assert_eq!(failed.get(), Some((1, 4)));
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
                | PoolEvent::Stopping
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
