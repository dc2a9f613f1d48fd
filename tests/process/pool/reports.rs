//! Tests what a pool reports: its status, and its notifications to systemd.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use cluster::pool::{Pool, PoolEvent};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{MS, Server, quick, serve_slot, server, wait_for_exit};
use crate::harness::{cluster, is_watched, scaled, wait_until};

crate::scenarios! {
    status_reports_workers_and_failures
    pool_notifies_systemd
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
    let master = server.master();
    server.finish(master, |_| {});
    std::fs::remove_file(path).unwrap();
}
