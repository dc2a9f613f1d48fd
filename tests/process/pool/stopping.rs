//! Tests how a pool stops, and how it disconnects its workers.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use cluster::Settings;
use cluster::pool::{Pool, PoolEvent, Readiness, ignore_pool_signals};
use nix::sys::signal::{Signal, kill};

use super::{HOLD, MS, Server, pid, quick, server};
use crate::harness::{Log, cluster, is_alive, is_watched, wait_until};

crate::scenarios! {
    worker_of_this_crate_receives_a_request_instead_of_the_signal
    program_that_has_closed_its_channel_receives_the_signal
    stop_at_once_kills_a_new_master_that_does_not_serve
    second_signal_or_sigquit_kills_busy_workers
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

/// Runs workers that ignore SIGTERM, as those of the examples do, in a pool for programs that do not
/// use this crate.
fn worker_of_this_crate_receives_a_request_instead_of_the_signal() {
    cluster(
        |master| {
            let options = quick()
                .workers(2)
                .disconnect_signal(Some(cluster::Signal::TERM));
            let pool = Pool::new(master, options);
            pool.on_event(|pool, master, event| match event {
                PoolEvent::Reloaded { .. } => pool.stop(master),
                PoolEvent::QuorumReached => pool.reload(master),
                PoolEvent::WorkerShutDown { killed, .. } => assert!(!killed, "{event}"),
                _ => {}
            });
        },
        |worker| {
            ignore_pool_signals(&worker).unwrap();
            let listener = worker.listen("127.0.0.1:0").unwrap();
            assert_eq!(listener.incoming().count(), 0);
        },
    );
}

fn program_that_has_closed_its_channel_receives_the_signal() {
    const SCRIPT: &str = "trap 'exit 0' TERM; eval \"exec $CLUSTER_CHANNEL_FD>&-\"
        while :; do sleep 0.05; done";
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.setup_master(Settings::default().exec("/bin/bash").args(["-c", SCRIPT]));
            let options = quick().workers(1).readiness(Readiness::Alive(MS));
            let options = options.disconnect_signal(Some(cluster::Signal::TERM));
            let pool = Pool::new(master, options);
            pool.on_event(move |_, _, event| log.add(event.to_string()));
            master.on_disconnect(move |master, _| pool.stop(master));
        },
        |_| unreachable!(),
    );
    let entries = entries.take();
    let has_exited = "slot 0: worker 1 has exited".to_owned();
    assert!(entries.contains(&has_exited), "{entries:?}");
}
