//! Tests workers and masters that are killed, and what is then known about the workers.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::time::Duration;

use cluster::{Signal, WorkerProcess};

use super::events::Events;
use crate::harness::{
    Log, cluster, is_alive, is_watched, run_until_killed, spin, wait_until, watched,
};
use crate::scenarios;

scenarios! {
    worker_kill
    worker_kill_signal
    worker_isdead
    worker_isconnected
    kill_infinite_loop
    primary_kill
}

/// Returns the events that occur when `kill` is called as soon as the worker listens.
fn events_of_kill_when_listening(kill: fn(&WorkerProcess)) -> Vec<String> {
    let events = Events::default();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            events.log(master, &worker);
            worker.on_listening(move |_, worker, _| kill(worker));
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            assert!(listener.accept().unwrap().is_none(), "no client connects");
            run_until_killed(&worker);
        },
    );
    events.take()
}

fn worker_kill() {
    let expected = [
        "listening Listening",
        "disconnect Some(false) Disconnected",
        "exit signal: 9 (SIGKILL) Dead",
    ];
    let events = events_of_kill_when_listening(|worker| worker.process().kill(Signal::KILL));
    assert_eq!(events, expected);
}

/// Checks that `kill` disconnects the worker first, so that `exited_after_disconnect` is
/// `Some(true)`.
///
/// Node's documentation describes this behaviour, but newer versions of Node behave differently.
fn worker_kill_signal() {
    let expected = [
        "listening Listening",
        "disconnect Some(true) Disconnected",
        "exit signal: 9 (SIGKILL) Dead",
    ];
    let events = events_of_kill_when_listening(|worker| worker.kill(Signal::KILL));
    assert_eq!(events, expected);
}

fn worker_isdead() {
    let events = Events::default();
    let log = Log::default();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            events.log(master, &worker);
            log.add(worker.is_dead().to_string());
            worker.on_message(|_, worker, _| {
                assert!(!worker.is_dead());
                worker.kill(Signal::TERM);
            });
            let log = log.clone();
            worker.on_exit(move |_, worker, _| log.add(worker.is_dead().to_string()));
        },
        |worker| {
            assert!(!worker.is_dead());
            let _ = worker.send(b"readyToDie").unwrap();
            run_until_killed(&worker);
        },
    );
    assert_eq!(log.take(), ["false", "true"]);
    let expected = [
        "readyToDie",
        "disconnect Some(true) Disconnected",
        "exit signal: 15 (SIGTERM) Dead",
    ];
    assert_eq!(events.take(), expected);
}

fn worker_isconnected() {
    let events = Events::default();
    let log = Log::default();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            events.log(master, &worker);
            log.add(worker.is_connected().to_string());
            worker.on_message(|_, worker, _| {
                assert!(worker.is_connected());
                worker.disconnect();
            });
            let log = log.clone();
            worker.on_disconnect(move |_, worker| log.add(worker.is_connected().to_string()));
        },
        |worker| {
            let log = Log::default();
            log.add(worker.is_connected().to_string());
            // Register two callbacks, because Node emits the event on both the process and the
            // worker object.
            for _ in 0..2 {
                let log = log.clone();
                worker.on_disconnect(move |worker| log.add(worker.is_connected().to_string()));
            }
            let _ = worker.send(b"readyToDisconnect").unwrap();
            worker.run().unwrap();
            assert_eq!(log.take(), ["true", "false", "false"]);
        },
    );
    assert_eq!(log.take(), ["true", "false"]);
    let expected = [
        "readyToDisconnect",
        "disconnect Some(true) Disconnected",
        "exit exit status: 0 Dead",
    ];
    assert_eq!(events.take(), expected);
}

fn kill_infinite_loop() {
    let events = Events::default();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            events.log(master, &worker);
            worker.on_online(|_, worker| worker.process().kill(Signal::TERM));
        },
        |_| {
            loop {
                spin();
            }
        },
    );
    let expected = [
        "disconnect Some(false) Disconnected",
        "exit signal: 15 (SIGTERM) Dead",
    ];
    assert_eq!(events.take(), expected);
}

fn primary_kill() {
    if !is_watched() {
        let mut master = watched().stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(master.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let pid: u32 = line.trim_end().parse().unwrap();
        assert_eq!(master.wait().unwrap().code(), Some(0));
        wait_until("the worker's exit", || (!is_alive(pid)).then_some(()));
        return;
    }
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            worker.on_listening(|master, worker, _| {
                let worker = worker.clone();
                master.set_timeout(Duration::ZERO, move |_| {
                    assert!(worker.is_connected() && is_alive(worker.process().id()));
                    println!("{}", worker.process().id());
                    std::process::exit(0);
                });
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            assert!(listener.accept().unwrap().is_none(), "no client connects");
        },
    );
    unreachable!("the master exits in the timer");
}
