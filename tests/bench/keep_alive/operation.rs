//! Counts the requests and connections that reloads, scalings, upgrades and killed workers lose.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use super::clients::{Clients, Outcome, Plan};
use super::server::{Mode, Service};
use super::{NONE, POLICIES, WORKERS};
use crate::share;
use crate::table::{Goal, Table};
use crate::usage::allow_many_descriptors;

const BUSY: usize = 64;
const IDLE: usize = 10_000;
/// Number of busy clients of workers with threads. A thread that serves an idle client would not
/// notice that its worker disconnects.
const THREADS: usize = 50;
/// Time for which the clients continue after the last operation.
const AFTERWARDS: Duration = Duration::from_millis(500);
/// The text with which the pool reports that it has killed a worker that did not shut down.
const KILLED: &str = " was killed";
/// Time between two kills.
const KILL_INTERVAL: Duration = Duration::from_millis(100);

pub fn reloads(table: &mut Table) {
    let (reloads, scalings) = (share(50), share(20));
    let title = format!("{reloads} reloads, {scalings} scalings");
    for_each_policy(table, &title, |table, title, policy| {
        let (service, outcome) = operate_parked(policy, |service| {
            for _ in 0..reloads {
                service.signal(Signal::SIGHUP, &[" serves"]);
            }
            for number in 0..scalings {
                match number % 2 {
                    0 => service.signal(Signal::SIGTTIN, &[" is ready"]),
                    _ => service.signal(Signal::SIGTTOU, &[" has exited", KILLED]),
                }
            }
        });
        show(table, title, &outcome, Some(0.0));
        let killed = service.count(&[KILLED]) as f64;
        let row = table.row(&format!("{title}, killed"), killed, "workers");
        row.goal(Goal::AtMost(0.0));
    });
}

pub fn upgrades(table: &mut Table) {
    let upgrades = share(10);
    let title = format!("{upgrades} upgrades");
    for_each_policy(table, &title, |table, title, policy| {
        let (_, outcome) = operate_parked(policy, |service| {
            for _ in 0..upgrades {
                service.upgrade();
            }
        });
        show(table, title, &outcome, Some(0.0));
    });
}

pub fn kills(table: &mut Table) {
    let kills = share(600);
    let title = format!("{kills} killed workers");
    for_each_policy(table, &title, |table, title, policy| {
        let mut killed = 0;
        let (_, outcome) = operate_parked(policy, |service| {
            while killed < kills {
                // A worker parks a connection after the client has its answer. Before the first
                // kill, this pause lets the workers park the connections of the last idle clients.
                std::thread::sleep(KILL_INTERVAL);
                // Choose the workers in turn. After a kill, the list is short until the pool has
                // forked a replacement, so fall back to the first worker. Count only signals that
                // reach a process, because a listed worker may have exited since.
                let workers = service.workers();
                let worker = workers.get(killed % WORKERS).or(workers.first());
                if worker.is_some_and(|worker| kill(*worker, Signal::SIGKILL).is_ok()) {
                    killed += 1;
                }
            }
        });
        let goal = (policy == "rr").then_some(kills as f64);
        show(table, title, &outcome, goal);
    });
}

pub fn threads(table: &mut Table) {
    let reloads = share(10);
    let title = format!("{reloads} reloads, a thread for each connection");
    let plan = Plan {
        busy: THREADS,
        ..NONE
    };
    for_each_policy(table, &title, |table, title, policy| {
        let service = Service::start(policy, WORKERS, Mode::Thread);
        let (_, outcome) = operate(service, plan, |service| {
            for _ in 0..reloads {
                service.signal(Signal::SIGHUP, &[" serves"]);
            }
        });
        let row = table.row(
            &format!("{title}, failed"),
            outcome.failed() as f64,
            "requests",
        );
        row.goal(Goal::AtMost(0.0)).note(&outcome.text());
    });
}

/// Calls `measure` with a title and the policy for each policy.
fn for_each_policy(
    table: &mut Table,
    title: &str,
    mut measure: impl FnMut(&mut Table, &str, &str),
) {
    allow_many_descriptors();
    for (policy, name) in POLICIES {
        measure(table, &format!("{name}: {title}"), policy);
    }
}

/// Calls `operator` while busy and idle clients use a pool that parks connections.
fn operate_parked(policy: &str, operator: impl FnOnce(&Service)) -> (Service, Outcome) {
    let plan = Plan {
        busy: BUSY,
        idle: share(IDLE),
        ..NONE
    };
    operate(Service::start(policy, WORKERS, Mode::Park), plan, operator)
}

/// Calls `operator` while the clients use the pool.
fn operate(service: Service, plan: Plan, operator: impl FnOnce(&Service)) -> (Service, Outcome) {
    let clients = Clients::start(service.server.address, plan);
    operator(&service);
    std::thread::sleep(AFTERWARDS);
    (service, clients.stop())
}

/// Adds the rows of one run. The goal is the maximum number of failed requests. If there is a goal,
/// no idle connection may be closed.
fn show(table: &mut Table, title: &str, outcome: &Outcome, goal: Option<f64>) {
    let name = format!("{title}, failed");
    let failed = table.row(&name, outcome.failed() as f64, "requests");
    failed.note(&outcome.text());
    if let Some(goal) = goal {
        failed.goal(Goal::AtMost(goal));
    }
    let name = format!("{title}, idle connections closed");
    let lost = table.row(&name, outcome.idle_lost as f64, "connections");
    lost.note(&format!("of {}", share(IDLE)));
    if goal.is_some() {
        lost.goal(Goal::AtMost(0.0));
    }
}
