//! Measures the costs of a short connection for several servers in turn.

use std::net::SocketAddr;

use nix::unistd::Pid;

use crate::ROUNDS;
use crate::load::short_connections;
use crate::server::Server;
use crate::table::{Figure, Goal, Table};
use crate::usage::{cpu_time, family, sleeps};

const CLIENTS: usize = 32;

/// The costs per connection in one round. Times are in microseconds.
#[derive(Clone, Copy)]
pub struct Costs {
    /// User and system time of the server's processes.
    pub cpu: f64,
    /// Voluntary context switches of the server's processes.
    pub sleeps: f64,
    /// User and system time of the clients.
    pub client: f64,
}

pub struct Variant {
    pub title: String,
    pub server: Result<Server, String>,
    pub goal: Option<Goal>,
}

/// The costs of one round, in the order of the variants. A missing variant has `None`.
pub type Round = Vec<Option<Costs>>;

/// Measures the variants in turn, adds a row for each, and returns the rounds. The row contains the
/// variant's CPU time per connection as a multiple of the first variant's in the same round.
pub fn compare(table: &mut Table, variants: &[Variant]) -> Vec<Round> {
    let turn = |variant: &Variant| {
        let server = variant.server.as_ref().ok()?;
        Some(measure(server.address, &family(server.group.pid())))
    };
    let round = |_| variants.iter().map(turn).collect();
    let rounds: Vec<Round> = (0..=ROUNDS).map(round).skip(1).collect();
    for (number, variant) in variants.iter().enumerate() {
        if let Err(why) = &variant.server {
            table.skip(&variant.title, why);
            continue;
        }
        let own =
            |value: fn(&Costs) -> f64| figure(&rounds, |round| value(&round[number].unwrap()));
        let (cpu, sleeps, client) = (
            own(|own| own.cpu),
            own(|own| own.sleeps),
            own(|own| own.client),
        );
        let ratio = figure(&rounds, |round| ratio(round, number, 0));
        let row = table.row(&variant.title, ratio, "× bare");
        let (cpu, client) = (cpu.in_unit("µs"), client.in_unit("µs"));
        row.note(&format!(
            "{cpu}; clients {client}; {} sleeps",
            sleeps.in_unit("")
        ));
        if let Some(goal) = variant.goal {
            row.goal(goal);
        }
    }
    rounds
}

/// Returns the CPU time per connection of variant `one` as a multiple of that of variant `other`.
pub fn ratio(round: &Round, one: usize, other: usize) -> f64 {
    round[one].unwrap().cpu / round[other].unwrap().cpu
}

pub fn figure(rounds: &[Round], value: impl Fn(&Round) -> f64) -> Figure {
    rounds.iter().map(value).collect::<Vec<_>>().into()
}

/// Makes short connections to `address` for one second, and returns the costs of `processes` per
/// connection.
pub fn measure(address: SocketAddr, processes: &[Pid]) -> Costs {
    let before = (cpu_time(processes), sleeps(processes));
    let load = short_connections(address, CLIENTS);
    let after = (cpu_time(processes), sleeps(processes));
    #[allow(clippy::cast_precision_loss)]
    let (connections, sleeps) = (load.connections as f64, (after.1 - before.1) as f64);
    Costs {
        cpu: (after.0 - before.0).as_secs_f64() * 1e6 / connections,
        sleeps: sleeps / connections,
        client: load.cpu.as_secs_f64() * 1e6 / connections,
    }
}
