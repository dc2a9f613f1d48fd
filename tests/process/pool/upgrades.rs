//! Tests upgrades of a pool, in which a new master takes over from the old one.

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use cluster::pool::{Pool, PoolEvent};
use cluster::{Master, Role, Settings, SpawnOptions};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{getpgid, getsid};

use super::{
    MS, RELEASE, Server, assert_no_client_lost, children, is_served, quick, serve_slot, server,
    wait_for_exit,
};
use crate::counting::Load;
use crate::harness::{WATCHED, cluster, is_watched, wait_until};

crate::scenarios! {
    reloads_scalings_and_upgrades_lose_no_client_rr
    reloads_scalings_and_upgrades_lose_no_client_none
    unix_socket_passes_from_master_to_master
    broken_upgrades_change_nothing
    new_master_that_stops_does_not_take_over
    rejected_new_master_does_not_take_over
    new_master_that_has_not_taken_over_refuses_an_upgrade
    new_master_stays_in_the_session_and_process_group
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
                // The next master finds the socket by its absolute path.
                std::env::set_current_dir("/").unwrap();
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
    // The next master binds the path again if the file has been removed.
    std::fs::remove_file(&path).unwrap();
    let old = server.master();
    kill(old, Signal::SIGUSR2).unwrap();
    wait_for_exit(old);
    ask();
    server.stop();
    assert!(!path.exists());
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

/// Checks that a new master does not take over if it stops in the loop iteration in which its
/// minimum ready time ends.
fn new_master_that_stops_does_not_take_over() {
    if !is_watched() {
        return expect_no_takeover(|_| {});
    }
    new_master(|pool, master| {
        // Let the minimum ready time, which is 1 ms, end during this callback.
        std::thread::sleep(5 * MS);
        pool.stop(master);
    });
}

/// Checks that a new master does not take over if its old master has shut down the channel's
/// reading direction, because the upgrade has failed.
fn rejected_new_master_does_not_take_over() {
    if !is_watched() {
        return expect_no_takeover(|channel| channel.shutdown(Shutdown::Read).unwrap());
    }
    new_master(|pool, master| {
        // Stop after the timer of the takeover, which is set to 1 ms.
        let pool = pool.clone();
        master.set_timeout(5 * MS, move |master| pool.stop(master));
    });
}

/// Starts a new master in another process, whose role is [`new_master`], and expects that it exits
/// without a takeover. Calls `prepare` with the old master's end of the channel first.
fn expect_no_takeover(prepare: impl Fn(&UnixStream)) {
    const PREDECESSOR: &str = "cluster-predecessor";
    cluster(
        |master| {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            prepare(&ours);
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

/// Runs a new master, and calls `on_quorum` when its worker is ready.
fn new_master(on_quorum: impl Fn(&Pool, &Master) + 'static) {
    let passed = cluster::systemd::listen_fds().unwrap();
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let pool = Pool::new(&master, quick().workers(1).min_ready_time(MS));
            pool.adopt(&master, passed).unwrap();
            pool.on_event(move |pool, master, event| match event {
                PoolEvent::QuorumReached => on_quorum(pool, master),
                PoolEvent::TookOver => panic!("it has taken over"),
                _ => {}
            });
            master.run().unwrap();
        }
        Role::Worker(worker) => serve_slot(&worker),
    }
}

fn new_master_that_has_not_taken_over_refuses_an_upgrade() {
    if is_watched() {
        return server(quick());
    }
    let server = Server::start("rr");
    let old = server.master();
    server.release("never ready");
    server.signal(Signal::SIGUSR2);
    wait_until("a new master", || (server.master() != old).then_some(()));
    let new = server.master();
    // Without a handler, the signal would end the new master.
    wait_until("a worker", || (!children(new).is_empty()).then_some(()));
    server.signal(Signal::SIGUSR2);
    let refusal = "the new master failed: this master has not taken over yet";
    server.wait_for(&format!("{new}: {refusal}"), 1);
    kill(old, Signal::SIGTERM).unwrap();
    for master in [old, new] {
        wait_for_exit(master);
    }
    assert!(server.group.end().unwrap().success());
    std::fs::remove_file(&server.release).unwrap();
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
