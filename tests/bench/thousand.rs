//! Measures the master's CPU time with a thousand workers.

use std::time::Duration;

use crate::ROUNDS;
use crate::costs::measure as cost;
use crate::server::{BARE_DISPATCH, Server};
use crate::table::{Figure, Goal, Table, ratios};
use crate::usage::{allow_many_descriptors, cpu_time, family};

const MANY: usize = 1_000;
const FEW: usize = 8;

pub fn measure(table: &mut Table) {
    allow_many_descriptors();
    let servers = [FEW, 100, MANY].map(|workers| Server::start("rr", workers).unwrap());
    let [few, hundred, many] = &servers;

    let online = family(many.group.pid()).len() - 1;
    let row = table.row("online", online as f64, "workers");
    row.goal(Goal::AtLeast(MANY as f64));

    // Up to this point, the master has only forked its workers and processed their frames, so its
    // CPU time is the cost of their start.
    let start = |server: &Server| cpu_time(&[server.group.pid()]);
    let each = |time: Duration, workers: usize| time.as_secs_f64() * 1e6 / workers as f64;
    let (thousand, hundred) = (each(start(many), MANY), each(start(hundred), 100));
    table
        .row(
            "master's CPU from fork to listening",
            thousand / hundred,
            "× with 100",
        )
        .note(&format!("{thousand:.0} µs per worker"));

    let bare = [FEW, MANY].map(|workers| Server::start(BARE_DISPATCH, workers).unwrap());
    let master = |server: &Server| cost(server.address, &[server.group.pid()]).cpu;
    let mut costs = [few, many, &bare[0], &bare[1]].map(|server| (server, Vec::new()));
    for round in 0..=ROUNDS {
        for (server, costs) in &mut costs {
            let cost = master(server);
            costs.extend((round > 0).then_some(cost));
        }
    }
    let rows = [
        ("master's CPU per connection", 1, 0, "× with 8"),
        ("the same, bare dispatcher", 3, 2, "× with 8"),
        ("master's CPU with 1,000", 1, 3, "× bare dispatcher"),
    ];
    for (name, own, other, unit) in rows {
        let row = table.row(name, ratios(&costs[own].1, &costs[other].1), unit);
        let [own_cost, other] =
            [own, other].map(|number| Figure::from(costs[number].1.clone()).in_unit("µs"));
        row.note(&format!("{own_cost} vs. {other}"));
        if (own, unit) == (1, "× with 8") {
            row.goal(Goal::AtMost(1.3));
        }
    }
}
