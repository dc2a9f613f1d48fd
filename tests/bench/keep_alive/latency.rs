//! Measures the latency of busy clients beside silent and idle clients.

use std::time::Duration;

use super::clients::{Clients, Outcome, Plan};
use super::server::{Mode, Service, WORK};
use super::{GET_WORK, NONE, POLICIES, WORKERS};
use crate::table::{Goal, Table, ratios};
use crate::usage::allow_many_descriptors;
use crate::{ROUNDS, share};

const SILENT: usize = 100;
const IDLE: usize = 1_000;
/// Number of busy clients. With fewer clients, requests would wait for a client.
const BUSY: usize = 64;

pub fn measure(table: &mut Table) {
    allow_many_descriptors();
    for (policy, name) in POLICIES {
        let title = format!("{name}: beside {SILENT} silent and {IDLE} idle clients");
        let (rounds, others) = measure_policy(policy);
        show(table, &title, &rounds, &others);
    }
}

/// Returns the outcomes of each round without and with the silent and idle clients, and the outcome
/// of the silent and idle clients.
fn measure_policy(policy: &str) -> (Vec<[Outcome; 2]>, Outcome) {
    let alone = Service::start(policy, WORKERS, Mode::Park);
    let beside = Service::start(policy, WORKERS, Mode::Park);
    let plan = Plan {
        idle: IDLE,
        silent: SILENT,
        ..NONE
    };
    let others = Clients::start(beside.server.address, plan);
    let round = |_| [&alone, &beside].map(measure_one);
    let rounds = (0..=ROUNDS).map(round).skip(1).collect();
    (rounds, others.stop())
}

/// Runs busy clients at half of the workers' capacity.
fn measure_one(service: &Service) -> Outcome {
    let plan = Plan {
        busy: BUSY,
        request: GET_WORK,
        rate: Some(WORKERS as f64 / WORK.as_secs_f64() / 2.0),
        ..NONE
    };
    let clients = Clients::start(service.server.address, plan);
    // This is the duration of the measurement.
    std::thread::sleep(Duration::from_millis(share(2_000) as u64));
    clients.stop()
}

fn show(table: &mut Table, title: &str, rounds: &[[Outcome; 2]], others: &Outcome) {
    let p99 = |which: usize| -> Vec<_> {
        let rounds = rounds.iter();
        rounds.map(|round| round[which].latency(0.99)).collect()
    };
    let note = rounds.last().unwrap().each_ref().map(Outcome::text);
    table
        .row(
            &format!("{title}, p99"),
            ratios(&p99(1), &p99(0)),
            "× alone",
        )
        .goal(Goal::AtMost(1.1))
        .note(&format!(
            "last round alone: {}; beside: {}",
            note[0], note[1]
        ));
    let failed: u64 = rounds.iter().flatten().map(Outcome::failed).sum();
    table
        .row(&format!("{title}, failed"), failed as f64, "requests")
        .goal(Goal::AtMost(0.0));
    let closed = others.idle_lost + others.silent_closed;
    let title = format!("{title}, closed");
    table
        .row(&title, closed as f64, "silent and idle connections")
        .goal(Goal::AtMost(0.0))
        .note(&others.text());
}
