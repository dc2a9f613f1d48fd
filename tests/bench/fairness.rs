//! Who gets how many connections, of eight workers.

use crate::ROUNDS;
use crate::load::drive;
use crate::server::{BARE, GET_WORKER, Server};
use crate::table::{Goal, Table};

const WORKERS: usize = 8;
const IN_TURN: usize = 1_600;
const AT_ONCE: usize = 16_000;
/// A hash is even in the long run only.
const HASHED: usize = 100_000;

/// What the counts of the workers come to.
type Measure = fn(&[f64]) -> f64;
const SPREAD: (Measure, &str) = (
    |counts| most(counts) - least(counts),
    "between most and least",
);
const TO_LEAST: (Measure, &str) = (|counts| most(counts) / least(counts), "most/least");
const TO_MEAN: (Measure, &str) = (
    |counts| most(counts) * WORKERS as f64 / counts.iter().sum::<f64>(),
    "most/mean",
);

/// Whom it is about, how many clients and connections there are in how many rounds, and the goal.
type Case = (
    &'static str,
    &'static str,
    [usize; 3],
    (Measure, &'static str),
    Option<f64>,
);
const CASES: [Case; 10] = [
    (
        "bare loop, one after the other",
        BARE,
        [1, IN_TURN, ROUNDS],
        SPREAD,
        None,
    ),
    (
        "round robin, one after the other",
        "rr",
        [1, IN_TURN, ROUNDS],
        SPREAD,
        Some(0.0),
    ),
    (
        "shared, one after the other",
        "none",
        [1, IN_TURN, ROUNDS],
        SPREAD,
        Some(0.0),
    ),
    (
        "bare loop, 64 clients",
        BARE,
        [64, AT_ONCE, ROUNDS],
        TO_LEAST,
        None,
    ),
    (
        "round robin, 64 clients",
        "rr",
        [64, AT_ONCE, ROUNDS],
        TO_LEAST,
        Some(1.02),
    ),
    (
        "round robin, 64 clients, long",
        "rr",
        [64, HASHED, 1],
        TO_LEAST,
        Some(1.02),
    ),
    (
        "bare loop, 32 clients",
        BARE,
        [32, AT_ONCE, ROUNDS],
        TO_MEAN,
        None,
    ),
    (
        "shared, 32 clients",
        "none",
        [32, AT_ONCE, ROUNDS],
        TO_MEAN,
        Some(1.05),
    ),
    (
        "bare loop, 32 clients, long",
        BARE,
        [32, HASHED, 1],
        TO_LEAST,
        None,
    ),
    (
        "sharded, 32 clients, long",
        "sharded",
        [32, HASHED, 1],
        TO_LEAST,
        Some(1.15),
    ),
];

pub fn measure(table: &mut Table) {
    let servers = [BARE, "rr", "none", "sharded"].map(|name| (name, Server::start(name, WORKERS)));
    let server = |name: &str| &servers.iter().find(|server| server.0 == name).unwrap().1;
    let mut values = CASES.map(|_| Vec::new());
    for round in 0..ROUNDS {
        for ((_, name, [clients, connections, rounds], measure, _), values) in
            CASES.iter().zip(&mut values)
        {
            if let (Ok(server), true) = (server(name), round < *rounds) {
                values.push(measure.0(&counts(server, *clients, *connections)));
            }
        }
    }
    for ((title, name, [_, connections, _], measure, goal), values) in CASES.iter().zip(values) {
        if let Err(why) = server(name) {
            table.skip(title, why);
            continue;
        }
        let row = table.row(title, values, measure.1);
        row.note(&format!("{connections} connections a round"));
        if let Some(goal) = goal {
            row.goal(Goal::AtMost(*goal));
        }
    }
}

/// How many connections each worker got.
fn counts(server: &Server, clients: usize, connections: usize) -> Vec<f64> {
    let mut counts = vec![0.0; WORKERS];
    let mut left = connections;
    let next = || {
        left = left.checked_sub(1)?;
        Some(GET_WORKER)
    };
    drive(server.address, clients, next, |answered| {
        let worker = usize::try_from(answered.numbers()[0]).unwrap();
        counts[worker - 1] += 1.0;
    });
    counts
}

fn most(counts: &[f64]) -> f64 {
    counts.iter().copied().fold(f64::MIN, f64::max)
}

fn least(counts: &[f64]) -> f64 {
    counts.iter().copied().fold(f64::MAX, f64::min)
}
