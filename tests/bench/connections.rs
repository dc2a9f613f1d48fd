//! CPU time of all processes of a server for one short connection, with two workers.

use crate::ROUNDS;
use crate::load::short_connections;
use crate::server::{BARE, Server};
use crate::table::{Figure, Goal, Table};
use crate::usage::{cpu_time, family, sleeps};

const CLIENTS: usize = 32;

/// What one round has shown, for each connection: times in microseconds.
#[derive(Clone, Copy, Default)]
struct Costs {
    cpu: f64,
    sleeps: f64,
    client: f64,
}

pub fn measure(table: &mut Table) {
    let variants = [
        (BARE, "bare loop"),
        ("rr", "round robin"),
        ("none", "shared"),
        ("sharded", "sharded"),
    ];
    let servers = variants.map(|(name, title)| (title, Server::start(name, 2)));
    let rounds = rounds(&servers);
    for (number, (title, server)) in servers.iter().enumerate() {
        if let Err(why) = server {
            table.skip(title, why);
            continue;
        }
        let all = |value: fn(&Costs) -> f64| {
            let values = rounds.iter().map(|round| value(&round[number]));
            Figure::from(values.collect::<Vec<_>>())
        };
        let ratios: Vec<_> = rounds
            .iter()
            .map(|round| round[number].cpu / round[0].cpu)
            .collect();
        let row = table.row(title, ratios, "× bare");
        row.note(&format!(
            "{}; {} sleeps, client {}",
            all(|costs| costs.cpu).in_unit("µs"),
            all(|costs| costs.sleeps).in_unit(""),
            all(|costs| costs.client).in_unit("µs")
        ));
        match *title {
            "round robin" => row.goal(Goal::AtMost(1.75)),
            "shared" | "sharded" => row.goal(Goal::AtMost(1.1)),
            _ => row,
        };
    }
}

fn rounds<const N: usize>(servers: &[(&str, Result<Server, &str>); N]) -> Vec<[Costs; N]> {
    let round = |_| {
        servers
            .each_ref()
            .map(|(_, server)| server.as_ref().map_or_else(|_| Costs::default(), cost))
    };
    (0..=ROUNDS).map(round).skip(1).collect()
}

fn cost(server: &Server) -> Costs {
    let processes = family(server.group.pid());
    let before = (cpu_time(&processes), sleeps(&processes));
    let load = short_connections(server.address, CLIENTS);
    let after = (cpu_time(&processes), sleeps(&processes));
    #[allow(clippy::cast_precision_loss)]
    let (connections, sleeps) = (load.connections as f64, (after.1 - before.1) as f64);
    Costs {
        cpu: (after.0 - before.0).as_secs_f64() * 1e6 / connections,
        sleeps: sleeps / connections,
        client: load.cpu.as_secs_f64() * 1e6 / connections,
    }
}
