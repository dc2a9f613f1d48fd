//! Measures the latency of busy clients beside silent and idle clients.

use std::time::Duration;

use super::clients::{Clients, Outcome, Plan};
use super::server::{Mode, Service, WORK};
use super::{GET_WORK, NONE, POLICIES, WORKERS, share};
use crate::ROUNDS;
use crate::table::{Goal, Table, ratios};
use crate::usage::allow_many_descriptors;

const SILENT: usize = 100;
const IDLE: usize = 1_000;
/// Number of busy clients. With fewer clients, requests would wait for a client.
const BUSY: usize = 64;

pub fn measure(table: &mut Table) {
    allow_many_descriptors();
    for (policy, name) in POLICIES {
        let title = format!("{name}: p99 beside {SILENT} silent and {IDLE} idle clients");
        match measure_policy(policy) {
            Ok(rounds) => show(table, &title, &rounds),
            Err(why) => table.skip(&title, &why),
        }
    }
}

/// Returns the outcomes of each round without and with the silent and idle clients.
fn measure_policy(policy: &str) -> Result<Vec<[Outcome; 2]>, String> {
    let alone = Service::start(policy, WORKERS, Mode::Park)?;
    let beside = Service::start(policy, WORKERS, Mode::Park)?;
    let plan = Plan {
        idle: IDLE,
        silent: SILENT,
        ..NONE
    };
    let others = Clients::start(beside.server.address, plan);
    let round = |_| [&alone, &beside].map(measure_one);
    let rounds = (0..=ROUNDS).map(round).skip(1).collect();
    let others = others.stop();
    assert_eq!(others.idle_lost + others.silent_closed, 0);
    Ok(rounds)
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
    std::thread::sleep(Duration::from_millis(share(2_000) as u64));
    clients.stop()
}

fn show(table: &mut Table, title: &str, rounds: &[[Outcome; 2]]) {
    let p99 = |which: usize| -> Vec<_> {
        let rounds = rounds.iter();
        rounds.map(|round| round[which].latency(0.99)).collect()
    };
    let note = rounds.last().unwrap().each_ref().map(Outcome::text);
    table
        .row(title, ratios(&p99(1), &p99(0)), "× without them")
        .goal(Goal::AtMost(1.1))
        .note(&format!(
            "last round without: {}; with: {}",
            note[0], note[1]
        ));
    let failed: u64 = rounds.iter().flatten().map(Outcome::failed).sum();
    table
        .row(&format!("{title}, failed"), failed as f64, "requests")
        .goal(Goal::AtMost(0.0));
}
