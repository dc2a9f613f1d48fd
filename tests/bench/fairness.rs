//! Measures the distribution of connections among eight workers.

use crate::ROUNDS;
use crate::load::drive;
use crate::server::{BARE, GET_WORKER, Server};
use crate::table::{Goal, Table};

const WORKERS: usize = 8;
const SEQUENTIAL: usize = 1_600;
const CONCURRENT: usize = 16_000;
/// Number of connections in the rows named `long`. With the policy `sharded`, the kernel's hash
/// distributes connections evenly only over many connections.
const LONG_RUN: usize = 100_000;

/// A function that reduces the workers' counts to one figure.
type Measure = fn(&[f64]) -> f64;
const SPREAD: (Measure, &str) = (|counts| max(counts) - min(counts), "max − min");
const TO_LEAST: (Measure, &str) = (|counts| max(counts) / min(counts), "max/min");
const TO_MEAN: (Measure, &str) = (
    |counts| max(counts) * WORKERS as f64 / counts.iter().sum::<f64>(),
    "max/mean",
);

/// One row of the table: its title, the server's name, the numbers of clients, connections and
/// rounds, the measure with its name, and the goal.
type Case = (
    &'static str,
    &'static str,
    [usize; 3],
    (Measure, &'static str),
    Option<f64>,
);
const CASES: [Case; 10] = [
    (
        "bare loop, 1 client",
        BARE,
        [1, SEQUENTIAL, ROUNDS],
        SPREAD,
        None,
    ),
    (
        "round robin, 1 client",
        "rr",
        [1, SEQUENTIAL, ROUNDS],
        SPREAD,
        Some(0.0),
    ),
    (
        "shared, 1 client",
        "none",
        [1, SEQUENTIAL, ROUNDS],
        SPREAD,
        Some(0.0),
    ),
    (
        "bare loop, 64 clients",
        BARE,
        [64, CONCURRENT, ROUNDS],
        TO_LEAST,
        None,
    ),
    (
        "round robin, 64 clients",
        "rr",
        [64, CONCURRENT, ROUNDS],
        TO_LEAST,
        Some(1.02),
    ),
    (
        "round robin, 64 clients, long",
        "rr",
        [64, LONG_RUN, 1],
        TO_LEAST,
        Some(1.02),
    ),
    (
        "bare loop, 32 clients",
        BARE,
        [32, CONCURRENT, ROUNDS],
        TO_MEAN,
        None,
    ),
    (
        "shared, 32 clients",
        "none",
        [32, CONCURRENT, ROUNDS],
        TO_MEAN,
        Some(1.05),
    ),
    (
        "bare loop, 32 clients, long",
        BARE,
        [32, LONG_RUN, 1],
        TO_LEAST,
        None,
    ),
    (
        "sharded, 32 clients, long",
        "sharded",
        [32, LONG_RUN, 1],
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
        row.note(&format!("{connections} connections per round"));
        if let Some(goal) = goal {
            row.goal(Goal::AtMost(*goal));
        }
    }
}

/// Returns the number of connections that each worker received.
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

fn max(counts: &[f64]) -> f64 {
    counts.iter().copied().fold(f64::MIN, f64::max)
}

fn min(counts: &[f64]) -> f64 {
    counts.iter().copied().fold(f64::MAX, f64::min)
}
