//! A thousand workers.

use std::time::Duration;

use crate::ROUNDS;
use crate::costs::measure as cost;
use crate::server::Server;
use crate::table::{Figure, Goal, Table};
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

    // The master has done nothing yet but fork, and hear its workers.
    let start = |server: &Server| cpu_time(&[server.group.pid()]);
    let each = |time: Duration, workers: usize| time.as_secs_f64() * 1e6 / workers as f64;
    let (thousand, hundred) = (each(start(many), MANY), each(start(hundred), 100));
    table
        .row(
            "master's CPU from fork to listening",
            thousand / hundred,
            "× with 100",
        )
        .note(&format!("{thousand:.0} µs for each worker"));

    let master = |server: &Server| cost(server.address, &[server.group.pid()]).cpu;
    let rounds = (0..=ROUNDS).map(|_| [master(few), master(many)]).skip(1);
    let rounds: Vec<_> = rounds.collect();
    let ratios = rounds
        .iter()
        .map(|[few, many]| many / few)
        .collect::<Vec<_>>();
    let of = |number: usize| {
        Figure::from(rounds.iter().map(|round| round[number]).collect::<Vec<_>>()).in_unit("µs")
    };
    table
        .row("master's CPU for a connection", ratios, "× with 8")
        .goal(Goal::AtMost(1.3))
        .note(&format!("{} beside {}", of(1), of(0)));
}
