//! Measures the CPU time per request. The time includes all processes of a server.

use std::time::Duration;

use super::clients::{Clients, Plan};
use super::server::{Mode, Service, start_bare};
use super::{GET, NONE, POLICIES, WORKERS};
use crate::server::{self, BARE, Server};
use crate::table::{Figure, Goal, Table, ratios};
use crate::usage::{allow_many_descriptors, calls, cpu_time, family, mapped};
use crate::{ROUNDS, share};

/// Numbers of busy clients.
const BUSY: [usize; 2] = [2, 32];
/// Number of busy clients in the benchmark of `Mode::Watch`, in which the workers' event loops
/// watch the connections.
const WATCHED: usize = 50;
/// Numbers of idle clients.
const IDLE: [usize; 4] = [10, 100, 1_000, 10_000];
/// Time for which an idle server is observed.
const QUIET: Duration = Duration::from_secs(2);

/// A server and the request that it is measured with.
struct Variant {
    title: String,
    server: Server,
    request: &'static [u8],
}

impl Variant {
    fn new(title: impl Into<String>, server: Server, request: &'static [u8]) -> Self {
        let title = title.into();
        Self {
            title,
            server,
            request,
        }
    }
}

/// The CPU time per request of one variant in each round, in microseconds, or the reason why the
/// variant could not be measured.
type Costs = Result<Vec<f64>, String>;

/// Compares keep-alive connections with a new connection for each request.
pub fn measure(table: &mut Table) {
    let new_connection = server::GET;
    let bare = Server::start(BARE, WORKERS).unwrap();
    let mut variants = vec![
        Variant::new("bare loop, new connection", bare, new_connection),
        Variant::new("bare keep-alive loop", start_bare(WORKERS), GET),
    ];
    for (policy, name) in POLICIES {
        let start = |mode| Service::start(policy, WORKERS, mode).server;
        let title = format!("{name}, new connection");
        variants.push(Variant::new(title, start(Mode::Close), new_connection));
        let title = format!("{name}, parked");
        variants.push(Variant::new(title, start(Mode::Park), GET));
    }
    for busy in BUSY {
        let costs = measure_in_turn(&variants, busy);
        for (variant, own) in variants.iter().zip(&costs) {
            let title = format!("{busy} clients: {}", variant.title);
            show(
                table,
                &title,
                [own, &costs[0]],
                "× bare, new connection",
                None,
            );
        }
        // The variants of a policy follow the two bare loops in pairs.
        for ((policy, name), pair) in POLICIES.iter().zip(costs[2..].chunks_exact(2)) {
            let [new, parked] = pair else { unreachable!() };
            let title = format!("{busy} clients: {name}, parked vs. new");
            let is_round_robin = *policy == "rr";
            let limit = if is_round_robin && busy > 2 { 0.6 } else { 0.5 };
            show(
                table,
                &title,
                [parked, new],
                "× new connection",
                Some(limit),
            );
            if !is_round_robin {
                let title = format!("{busy} clients: {name}, parked vs. bare");
                let base = &costs[1];
                show(
                    table,
                    &title,
                    [parked, base],
                    "× bare keep-alive",
                    Some(1.5),
                );
            }
        }
    }
}

/// Compares workers that watch their connections with bare event loops.
pub fn watch(table: &mut Table) {
    let bare = Variant::new("bare keep-alive loop", start_bare(WORKERS), GET);
    let variants = POLICIES.map(|(policy, name)| {
        let title = format!("{WATCHED} watched connections: {name}");
        let service = Service::start(policy, WORKERS, Mode::Watch);
        Variant::new(title, service.server, GET)
    });
    let variants: Vec<_> = std::iter::once(bare).chain(variants).collect();
    let costs = measure_in_turn(&variants, WATCHED);
    for (variant, own) in variants.iter().zip(&costs).skip(1) {
        show(
            table,
            &variant.title,
            [own, &costs[0]],
            "× bare keep-alive",
            Some(1.1),
        );
    }
}

/// Measures the cost of parked connections, and of requests beside them.
pub fn measure_parked(table: &mut Table) {
    allow_many_descriptors();
    for (policy, name) in POLICIES {
        let variants = IDLE.map(|idle| {
            let title = format!("{name}: a request beside {idle} parked connections");
            let service = Service::start(policy, WORKERS, Mode::Park);
            Variant::new(title, service.server, GET)
        });
        measure_beside_parked(table, name, &variants);
    }
}

/// Measures, for one policy, the memory of a parked connection, the system calls while all clients
/// are idle, and the cost of a request beside parked connections. `variants` contains one pool for
/// each number in [`IDLE`].
fn measure_beside_parked(table: &mut Table, name: &str, variants: &[Variant]) {
    let most = IDLE[IDLE.len() - 1];
    let processes = family(variants[IDLE.len() - 1].server.group.pid());
    let memory = || {
        processes
            .iter()
            .map(|process| mapped(*process, "Anonymous:"))
    };
    let before: f64 = memory().sum();
    let connect = |(variant, idle): (&Variant, usize)| {
        Clients::start(variant.server.address, Plan { idle, ..NONE })
    };
    let clients: Vec<_> = variants.iter().zip(IDLE).map(connect).collect();
    let bytes = (memory().sum::<f64>() - before) * 1024.0 / most as f64;
    table
        .row(&format!("{name}: a parked connection"), bytes, "bytes")
        .goal(Goal::AtMost(256.0))
        .note("in all processes, besides the kernel's memory");
    let title = format!("{name}: system calls with {most} parked connections");
    match calls(&processes, || std::thread::sleep(QUIET)) {
        Ok(calls) => {
            let count: u64 = calls.values().sum();
            let row = table.row(&title, count as f64, "in 2 s");
            row.goal(Goal::AtMost(0.0)).note(&format!("{calls:?}"));
        }
        Err(why) => table.skip(&title, &why),
    }
    let costs = measure_in_turn(variants, 32);
    for (idle, own) in IDLE.iter().zip(&costs) {
        if let Ok(own) = own {
            table.point(name, *idle as f64, own.clone());
        }
    }
    for (variant, own) in variants.iter().zip(&costs).skip(1) {
        show(
            table,
            &variant.title,
            [own, &costs[0]],
            "× beside 10",
            Some(1.1),
        );
    }
    let clients = clients.into_iter();
    let closed: u64 = clients.map(|clients| clients.stop().idle_lost).sum();
    let title = format!("{name}: parked connections that the server closed");
    table
        .row(&title, closed as f64, "connections")
        .goal(Goal::AtMost(0.0));
}

/// Adds a row with the costs of a variant as multiples of another variant's.
fn show(table: &mut Table, title: &str, costs: [&Costs; 2], unit: &str, goal: Option<f64>) {
    match costs {
        [Ok(own), Ok(base)] => {
            let row = table.row(title, ratios(own, base), unit);
            row.note(&Figure::from(own.clone()).in_unit("µs"));
            if let Some(goal) = goal {
                row.goal(Goal::AtMost(goal));
            }
        }
        [Err(why), _] | [_, Err(why)] => table.skip(title, why),
    }
}

/// Measures the variants in turn.
fn measure_in_turn(variants: &[Variant], busy: usize) -> Vec<Costs> {
    let mut costs = vec![Ok(Vec::new()); variants.len()];
    for round in 0..=ROUNDS {
        for (variant, costs) in variants.iter().zip(&mut costs) {
            let Ok(values) = costs else { continue };
            match measure_one(variant, busy) {
                Ok(cost) => values.extend((round > 0).then_some(cost)),
                Err(why) => *costs = Err(why),
            }
        }
    }
    costs
}

/// Runs busy clients for one second. If there are enough clients, they have one thread per core, so
/// that no core goes idle. Waking an idle core would dominate the measurement. Returns an error if
/// a request fails.
fn measure_one(variant: &Variant, busy: usize) -> Result<f64, String> {
    let threads = cluster::available_parallelism().min(busy);
    let plan = Plan {
        busy: busy / threads,
        request: variant.request,
        ..NONE
    };
    let processes = family(variant.server.group.pid());
    let before = cpu_time(&processes);
    let start = |_| Clients::start(variant.server.address, plan);
    let clients: Vec<_> = (0..threads).map(start).collect();
    // This is the duration of the measurement.
    std::thread::sleep(Duration::from_millis(share(1_000) as u64));
    let outcomes: Vec<_> = clients.into_iter().map(Clients::stop).collect();
    let time = (cpu_time(&processes) - before).as_secs_f64() * 1e6;
    if let Some(failed) = outcomes.iter().find(|outcome| outcome.failed() > 0) {
        return Err(failed.text());
    }
    let requests: u64 = outcomes.iter().map(|outcome| outcome.ok).sum();
    Ok(time / requests as f64)
}
