//! Tests that copies of the master serve clients, with each scheduling policy.

use std::net::SocketAddr;

use cluster::{Error, SchedulingPolicy, Settings, Signal};

use super::{cluster_without_exec, set_main};
use crate::harness::{
    Log, in_background, note_events, note_messages, of, serve_id, talk, when_listening,
};

crate::scenarios! {
    copy_runs_from_fork_to_exit
    copies_serve_round_robin
    copies_serve_from_a_shared_listener
    copies_serve_from_shards
}

fn copy_runs_from_fork_to_exit() {
    let log = Log::default();
    let entries = log.clone();
    let master_pid = std::process::id();
    cluster_without_exec(|master| {
        note_events(master, &log);
        note_messages(master, &log);
        let settings = Settings::default().cwd("/").inspect_port(9000);
        master.setup_master(settings.main(move |worker| {
            assert!(cluster::is_worker() && !cluster::is_master());
            assert_ne!(std::process::id(), master_pid);
            let again = cluster::init().map(drop).unwrap_err();
            assert!(matches!(again, Error::AlreadyInitialized), "{again}");
            for (name, _) in std::env::vars_os() {
                assert!(
                    !name.to_string_lossy().starts_with("CLUSTER_CH"),
                    "{name:?}"
                );
            }
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let greeting = format!(
                "{} {} {} {}",
                worker.id(),
                worker.inspect_port().unwrap(),
                std::env::current_dir().unwrap().display(),
                std::env::var("NAME").unwrap(),
            );
            let _ = worker.send(greeting.as_bytes()).unwrap();
            worker.on_message(|worker, message| {
                let text = String::from_utf8_lossy(message.bytes()).to_uppercase();
                let _ = worker.send(text.as_bytes()).unwrap();
            });
            assert!(listener.accept().unwrap().is_none());
            3
        }));
        for name in ["a", "b"] {
            let worker = master.fork_with([("NAME", name)]).unwrap();
            let _ = worker.send(b"to you").unwrap();
            worker.on_message(|_, worker, message| {
                if message.bytes() == b"TO YOU" {
                    worker.disconnect();
                }
            });
        }
        assert_eq!(std::env::var_os("NAME"), None);
    });
    let entries = entries.take();
    for (worker, port, name) in [(1, 9000, "a"), (2, 9001, "b")] {
        let greeting = format!("{worker} {port} / {name}");
        let expected = [
            "fork",
            "online",
            "listening",
            &greeting,
            "TO YOU",
            "disconnect Some(true)",
            "exit Some(true) exit status: 3",
        ];
        assert_eq!(of(worker, &entries), expected);
    }
    assert_eq!(entries.len(), 14, "{entries:?}");
}

/// Sends requests until both workers have answered, and asserts that no other worker answers.
fn ask_until_all_answer(address: SocketAddr, workers: [&str; 2]) {
    let mut missing = workers.to_vec();
    while !missing.is_empty() {
        let answer = talk(address, b"").unwrap();
        assert!(workers.contains(&answer.as_str()), "{answer}");
        missing.retain(|worker| *worker != answer);
    }
}

/// Serves with two workers, kills one of them, and checks that its replacement also answers.
fn serve(policy: SchedulingPolicy) {
    cluster_without_exec(|master| {
        master.set_scheduling_policy(policy).unwrap();
        set_main(master, |worker| serve_id(&worker, "127.0.0.1:0"));
        for _ in 0..2 {
            master.fork().unwrap();
        }
        when_listening(master, 2, |master, address| {
            let ask = move || ask_until_all_answer(address, ["1", "2"]);
            in_background(master, ask, move |master, ()| {
                master.workers()[0].process().kill(Signal::KILL);
                master.on_exit_once(move |master, _, _| {
                    let replacement = master.fork().unwrap();
                    replacement.on_listening(move |master, _, _| {
                        let ask = move || ask_until_all_answer(address, ["2", "3"]);
                        in_background(master, ask, |master, ()| master.disconnect());
                    });
                });
            });
        });
    });
}

fn copies_serve_round_robin() {
    serve(SchedulingPolicy::RoundRobin);
}

fn copies_serve_from_a_shared_listener() {
    serve(SchedulingPolicy::Shared);
}

fn copies_serve_from_shards() {
    serve(SchedulingPolicy::Sharded);
}
