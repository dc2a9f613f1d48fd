//! Measures the latency when 1 request in 100 sleeps for 50 ms.

use std::time::{Duration, Instant};

use crate::load::{Answered, drive, drive_on_time};
use crate::server::{BARE, GET_SLOW, GET_TIMES, Server, now};
use crate::table::{Figure, Goal, Table, ratios};
use crate::usage::allow_many_descriptors;
use crate::{ROUNDS, share};

const WORKERS: usize = 8;
const CLIENTS: usize = 32;
/// Time of each round in milliseconds.
const TIME: usize = 3_000;
/// Mean number of connections per second in the open loop. The gaps between connections are random.
const RATE: f64 = 8_000.0;
/// One request in `SLOW` is slow.
const SLOW: usize = 100;
/// Limit in milliseconds above which a wait is attributed to a slow request. On a busy machine, the
/// kernel's scheduler may cause shorter waits. The limit is half the time of a slow request.
const SCHEDULING: f64 = 25.0;

/// Percentiles of the latency. The JSON contains all of them, the table those that have a name.
const PERCENTILES: [(f64, &str); 7] = [
    (50.0, "p50"),
    (75.0, ""),
    (90.0, ""),
    (95.0, ""),
    (99.0, "p99"),
    (99.5, ""),
    (99.9, "p99.9"),
];

type Play = fn(&Server, usize) -> Outcome;

/// The result of one round. Times are in milliseconds.
struct Outcome {
    connections: usize,
    /// The latency at each of the `PERCENTILES`.
    latencies: [f64; PERCENTILES.len()],
    /// The longest time that a connection waited while a worker was idle.
    longest: f64,
    /// Number of connections that were queued behind a slow request for longer than `SCHEDULING`
    /// while another worker was idle.
    queued_behind: f64,
}

/// The times of one connection, in nanoseconds of the monotonic clock.
struct Times {
    worker: i64,
    slow: bool,
    started: i64,
    connected: i64,
    /// The time when the worker received the connection.
    accepted: i64,
    /// The time when the worker answered.
    answered: i64,
    ended: i64,
}

pub fn measure(table: &mut Table) {
    let servers = [BARE, "rr", "none", "sharded"].map(|name| Server::start(name, WORKERS));
    allow_many_descriptors();
    let loads = [
        ("8,000 connections/s", open_loop as Play),
        ("32 clients", closed_loop),
    ];
    for (load, play) in loads {
        let mut outcomes = servers.each_ref().map(|_| Vec::new());
        for round in 0..=ROUNDS {
            for (server, outcomes) in servers.iter().zip(&mut outcomes) {
                let outcome = server.as_ref().map(|server| play(server, round));
                outcomes.extend(outcome.ok().filter(|_| round > 0));
            }
        }
        show(table, load, &servers, &outcomes);
    }
}

fn show(
    table: &mut Table,
    load: &str,
    servers: &[Result<Server, String>],
    outcomes: &[Vec<Outcome>],
) {
    let titles = ["bare loop", "round robin", "shared", "sharded"];
    for (number, title) in titles.iter().enumerate() {
        let title = format!("{load}: {title}");
        if let Err(why) = &servers[number] {
            table.skip(&title, why);
            continue;
        }
        for (at, (percentile, name)) in PERCENTILES.iter().enumerate() {
            let latency = |outcomes: &Vec<Outcome>| each(outcomes, |outcome| outcome.latencies[at]);
            let own = latency(&outcomes[number]);
            table.point(&title, *percentile, own.clone());
            if name.is_empty() {
                continue;
            }
            let ratios = ratios(&own, &latency(&outcomes[0]));
            let row = table.row(&format!("{title}, {name}"), ratios, "× bare");
            row.note(&Figure::from(own).in_unit("ms"));
            if number > 0 && at > 0 {
                row.goal(Goal::AtMost(1.0));
            }
        }
        let own = &outcomes[number];
        let count: usize = own.iter().map(|outcome| outcome.connections).sum();
        let queued_behind: f64 = own.iter().map(|outcome| outcome.queued_behind).sum();
        let longest = Figure::from(each(own, |outcome| outcome.longest)).in_unit("ms");
        let name = format!("{title}, queued behind a slow request while a worker was idle");
        let row = table.row(&name, queued_behind, "connections");
        row.note(&format!(
            "of {count}; longest wait while a worker was idle {longest}"
        ));
        if number > 0 {
            row.goal(Goal::AtMost(0.0));
        }
    }
}

fn each(outcomes: &[Outcome], value: impl Fn(&Outcome) -> f64) -> Vec<f64> {
    outcomes.iter().map(value).collect()
}

/// Simulates random arrivals at half of the workers' capacity, in the same sequence for all
/// servers.
fn open_loop(server: &Server, round: usize) -> Outcome {
    let mut random = fastrand::Rng::with_seed(round as u64);
    let mut time = now() as f64;
    let end = time + share(TIME) as f64 * 1e6;
    let requests = std::iter::from_fn(|| {
        time -= (1.0 - random.f64()).ln() * 1e9 / RATE;
        let request = match random.usize(0..SLOW) {
            0 => GET_SLOW,
            _ => GET_TIMES,
        };
        (time < end).then_some((time as i64, request))
    });
    let mut all = Vec::new();
    drive_on_time(server.address, requests, |answered| {
        all.push(Times::of(&answered))
    });
    Outcome::of(&all)
}

/// Simulates clients that connect again as soon as they have an answer. Most workers are then busy
/// with a slow request, because a slow request takes longer than all other requests between two
/// slow ones.
fn closed_loop(server: &Server, _: usize) -> Outcome {
    let end = Instant::now() + Duration::from_millis(share(TIME) as u64);
    let mut count = 0;
    let next = || {
        count += 1;
        let request = match count % SLOW {
            0 => GET_SLOW,
            _ => GET_TIMES,
        };
        (Instant::now() < end).then_some(request)
    };
    let mut all = Vec::new();
    drive(server.address, CLIENTS, next, |answered| {
        all.push(Times::of(&answered))
    });
    Outcome::of(&all)
}

impl Times {
    fn of(answered: &Answered<'_>) -> Self {
        let [worker, accepted, written] = answered.numbers()[..] else {
            panic!("no times");
        };
        Self {
            worker,
            slow: answered.request == GET_SLOW,
            started: answered.started,
            connected: answered.connected,
            accepted,
            answered: written,
            ended: answered.ended,
        }
    }
}

impl Outcome {
    fn of(all: &[Times]) -> Self {
        let mut latencies: Vec<_> = all
            .iter()
            .map(|times| millis(times.ended - times.started))
            .collect();
        latencies.sort_by(f64::total_cmp);
        let at = |(percentile, _)| {
            let index = (latencies.len() as f64 * percentile / 100.0) as usize;
            latencies[index.min(latencies.len() - 1)]
        };
        let idle = Idle::new(all);
        let waits = all
            .iter()
            .map(|times| millis(idle.between(times.connected, times.accepted)));
        let slow: Vec<_> = all.iter().filter(|times| times.slow).collect();
        let behind = |times: &&Times| {
            let before = slow.iter().filter(|slow| slow.worker == times.worker);
            let waits = before.map(|slow| {
                let from = times.connected.max(slow.accepted);
                idle.between(from, times.accepted.min(slow.answered).max(from))
            });
            millis(waits.sum()) > SCHEDULING
        };
        Outcome {
            connections: all.len(),
            latencies: PERCENTILES.map(at),
            longest: waits.fold(0.0, f64::max),
            queued_behind: all.iter().filter(behind).count() as f64,
        }
    }
}

fn millis(nanos: i64) -> f64 {
    nanos as f64 / 1e6
}

/// The times at which a worker became busy or idle. Each entry contains the time of a change, the
/// total time before the change during which at least one worker was idle, and whether a worker is
/// idle after the change.
struct Idle(Vec<(i64, i64, bool)>);

impl Idle {
    fn new(all: &[Times]) -> Self {
        let begins = all.iter().map(|times| (times.accepted, 1));
        let ends = all.iter().map(|times| (times.answered, -1));
        let mut changes: Vec<_> = begins.chain(ends).collect();
        changes.sort_unstable();
        // All workers are idle before the first change. The first entry has the time 0, which is
        // earlier than any change, because the monotonic clock starts at boot.
        let mut idle = Self(vec![(0, 0, true)]);
        let mut busy = 0;
        for (time, change) in changes {
            busy += change;
            idle.0.push((time, idle.until(time), busy < WORKERS as i64));
        }
        idle
    }

    fn between(&self, from: i64, to: i64) -> i64 {
        self.until(to) - self.until(from)
    }

    fn until(&self, time: i64) -> i64 {
        let next = self.0.partition_point(|step| step.0 <= time);
        let (started, sum, idle) = self.0[next - 1];
        sum + if idle { time - started } else { 0 }
    }
}
