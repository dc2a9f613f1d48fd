//! Reloads this crate's pool and other servers under the same load.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use super::clients::{Clients, Outcome, Plan};
use super::server::{Mode, Service};
use super::{NONE, POLICIES, WORKERS};
use crate::harness::wait_until;
use crate::peers;
use crate::server::Server;
use crate::table::{Goal, Table};
use crate::usage::family;

const BUSY: usize = 16;
const IDLE: usize = 200;
const RELOADS: usize = 5;
/// Time between two reloads.
const PAUSE: Duration = Duration::from_millis(500);

pub fn measure(table: &mut Table) {
    let (hup, usr2) = (Signal::SIGHUP, Signal::SIGUSR2);
    let rivals = [
        ("nginx", peers::nginx(WORKERS, "1h"), hup),
        ("HAProxy", peers::haproxy(), usr2),
        ("gunicorn, gthread", peers::gunicorn_threads(WORKERS), hup),
        ("Node's cluster", peers::node_http(WORKERS), hup),
    ];
    for (title, server, signal) in rivals {
        match server.and_then(|server| reload(&server, signal)) {
            Ok(outcome) => show(table, title, &outcome, false),
            Err(why) => table.skip(title, &why),
        }
    }
    for (policy, title) in POLICIES {
        let service = Service::start(policy, WORKERS, Mode::Park);
        match reload(&service.server, hup) {
            Ok(outcome) => show(table, title, &outcome, true),
            Err(why) => table.skip(title, &why),
        }
    }
}

/// Reloads a server under load. Returns an error if the server closes idle connections even without
/// a reload.
fn reload(server: &Server, signal: Signal) -> Result<Outcome, String> {
    let control = Clients::start(server.address, Plan { idle: 1, ..NONE });
    // Observe an idle connection for this time.
    std::thread::sleep(PAUSE);
    if control.stop().idle_lost > 0 {
        return Err("closes idle connections without a reload".to_owned());
    }
    let plan = Plan {
        busy: BUSY,
        idle: IDLE,
        ..NONE
    };
    let clients = Clients::start(server.address, plan);
    let master = server.group.pid();
    for _ in 0..RELOADS {
        let old = family(master).split_off(1);
        kill(master, signal).unwrap();
        wait_until("the exit of the old workers", || {
            let now = family(master);
            (!old.iter().any(|worker| now.contains(worker))).then_some(())
        });
        std::thread::sleep(PAUSE);
    }
    Ok(clients.stop())
}

fn show(table: &mut Table, title: &str, outcome: &Outcome, has_goals: bool) {
    let survived = IDLE as f64 - outcome.idle_lost as f64;
    let name = format!("{title}: surviving idle connections");
    let row = table.row(&name, survived, &format!("of {IDLE}"));
    if has_goals {
        row.goal(Goal::AtLeast(IDLE as f64));
    }
    let name = format!("{title}: failed");
    let row = table.row(&name, outcome.failed() as f64, "requests");
    row.note(&outcome.text());
    if has_goals {
        row.goal(Goal::AtMost(0.0));
    }
}
