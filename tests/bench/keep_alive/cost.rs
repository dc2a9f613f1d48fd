//! Measures the CPU time per request. The time includes all processes of a server.

use std::time::Duration;

use super::clients::{Clients, Plan};
use super::server::{Mode, Service, start_bare};
use super::{GET, NONE, POLICIES, WORKERS, share};
use crate::ROUNDS;
use crate::server::{self, BARE, Server};
use crate::table::{Figure, Goal, Table, number, ratios};
use crate::usage::{allow_many_descriptors, calls, cpu_time, family, mapped};

/// Numbers of busy clients.
const BUSY: [usize; 2] = [2, 32];
/// Number of busy clients of workers that watch their connections.
const WATCHED: usize = 50;
/// Numbers of idle clients.
const IDLE: [usize; 4] = [10, 100, 1_000, 10_000];
/// Time for which an idle server is observed.
const QUIET: Duration = Duration::from_secs(2);

/// A server and the request that it is measured with.
struct Variant {
    title: String,
    server: Result<Service, String>,
    request: &'static [u8],
}

impl Variant {
    fn bare(title: &str, server: Server, request: &'static [u8]) -> Self {
        let (title, server) = (title.to_owned(), Ok(Service { server }));
        Self {
            title,
            server,
            request,
        }
    }
}

/// Compares keep-alive connections with a new connection for each request.
pub fn measure(table: &mut Table) {
    let new_connection = server::GET;
    let bare = Server::start(BARE, WORKERS).unwrap();
    let mut variants = vec![
        Variant::bare("bare loop, new connection", bare, new_connection),
        Variant::bare("bare keep-alive loop", start_bare(WORKERS), GET),
    ];
    for (policy, name) in POLICIES {
        variants.push(Variant {
            title: format!("{name}, new connection"),
            server: Service::start(policy, WORKERS, Mode::Close),
            request: new_connection,
        });
        variants.push(Variant {
            title: format!("{name}, parked"),
            server: Service::start(policy, WORKERS, Mode::Park),
            request: GET,
        });
    }
    for busy in BUSY {
        let costs = measure_in_turn(&variants, busy);
        for (variant, own) in variants.iter().zip(&costs) {
            let title = format!("{busy} clients: {}", variant.title);
            match &variant.server {
                Ok(_) => {
                    let note = Figure::from(own.clone()).in_unit("µs");
                    let row = table.row(&title, ratios(own, &costs[0]), "× bare, new connection");
                    row.note(&note);
                }
                Err(why) => table.skip(&title, why),
            }
        }
        // The variants of a policy follow the two bare loops in pairs.
        for ((policy, name), pair) in POLICIES.iter().zip(costs[2..].chunks_exact(2)) {
            let [new, parked] = pair else { unreachable!() };
            if parked.is_empty() {
                continue;
            }
            let title = format!("{busy} clients: {name}, parked");
            let limit = match (*policy, busy) {
                ("rr", 32) => 0.6,
                _ => 0.5,
            };
            table
                .row(&title, ratios(parked, new), "× new connection")
                .goal(Goal::AtMost(limit));
            if *policy != "rr" {
                table
                    .row(&title, ratios(parked, &costs[1]), "× bare keep-alive")
                    .goal(Goal::AtMost(1.5));
            }
        }
    }
}

/// Compares workers that watch their connections with bare event loops.
pub fn watch(table: &mut Table) {
    let bare = Variant::bare("bare keep-alive loop", start_bare(WORKERS), GET);
    let variants = POLICIES.map(|(policy, name)| Variant {
        title: format!("{WATCHED} watched connections: {name}"),
        server: Service::start(policy, WORKERS, Mode::Watch),
        request: GET,
    });
    let variants: Vec<_> = std::iter::once(bare).chain(variants).collect();
    let costs = measure_in_turn(&variants, WATCHED);
    for (variant, own) in variants.iter().zip(&costs).skip(1) {
        let note = Figure::from(own.clone()).in_unit("µs");
        table
            .row(&variant.title, ratios(own, &costs[0]), "× bare keep-alive")
            .goal(Goal::AtMost(1.1))
            .note(&note);
    }
}

/// Measures the cost of parked connections, and of requests beside them.
pub fn idle(table: &mut Table) {
    allow_many_descriptors();
    for (policy, name) in POLICIES {
        let start = |_| Service::start(policy, WORKERS, Mode::Park);
        match IDLE.iter().map(start).collect() {
            Ok(services) => idle_beside(table, name, services),
            Err(why) => table.skip(name, &why),
        }
    }
}

/// Measures one policy. `services` contains one pool for each number in [`IDLE`].
fn idle_beside(table: &mut Table, name: &str, services: Vec<Service>) {
    let most = family(services[IDLE.len() - 1].server.group.pid());
    let memory = || most.iter().map(|process| mapped(*process, "Anonymous:"));
    let before: f64 = memory().sum();
    let connect = |(service, idle): (&Service, usize)| {
        Clients::start(service.server.address, Plan { idle, ..NONE })
    };
    let clients: Vec<_> = services.iter().zip(IDLE).map(connect).collect();
    let bytes = (memory().sum::<f64>() - before) * 1024.0 / IDLE[IDLE.len() - 1] as f64;
    table
        .row(&format!("{name}: a parked connection"), bytes, "bytes")
        .goal(Goal::AtMost(256.0))
        .note("in all processes, besides the kernel's");
    let title = format!("{name}: system calls with 10,000 parked connections");
    match calls(&most, || std::thread::sleep(QUIET)) {
        Ok(calls) => {
            let count: u64 = calls.values().sum();
            let row = table.row(&title, count as f64, "in 2 s");
            row.goal(Goal::AtMost(0.0)).note(&format!("{calls:?}"));
        }
        Err(why) => table.skip(&title, &why),
    }
    let variant = |service| Variant {
        title: String::new(),
        server: Ok(service),
        request: GET,
    };
    let variants: Vec<_> = services.into_iter().map(variant).collect();
    let costs = measure_in_turn(&variants, 32);
    let medians = costs.iter().map(|own| Figure::from(own.clone()).median);
    let medians: Vec<_> = medians.map(number).collect();
    table
        .row(
            &format!("{name}: CPU of a request beside 10,000 parked connections"),
            ratios(&costs[IDLE.len() - 1], &costs[0]),
            "× beside 10",
        )
        .goal(Goal::AtMost(1.1))
        .note(&format!(
            "10, 100, 1,000, 10,000: {} µs",
            medians.join("; ")
        ));
    let lost: u64 = clients
        .into_iter()
        .map(|clients| clients.stop().idle_lost)
        .sum();
    let title = format!("{name}: parked connections that the server closed");
    table
        .row(&title, lost as f64, "connections")
        .goal(Goal::AtMost(0.0));
}

/// Measures the variants in turn. Returns, for each variant, the CPU time per request in
/// microseconds of each round, or nothing if the variant is missing.
fn measure_in_turn(variants: &[Variant], busy: usize) -> Vec<Vec<f64>> {
    let mut costs = vec![Vec::new(); variants.len()];
    for round in 0..=ROUNDS {
        for (variant, costs) in variants.iter().zip(&mut costs) {
            let Ok(service) = &variant.server else {
                continue;
            };
            let cost = measure_one(&service.server, variant.request, busy);
            costs.extend((round > 0).then_some(cost));
        }
    }
    costs
}

/// Runs busy clients for one second. The clients have one thread per core, so that no core goes
/// idle. Waking an idle core would dominate the measurement.
fn measure_one(server: &Server, request: &'static [u8], busy: usize) -> f64 {
    let threads = cluster::available_parallelism().min(busy);
    let plan = Plan {
        busy: busy / threads,
        request,
        ..NONE
    };
    let processes = family(server.group.pid());
    let before = cpu_time(&processes);
    let start = |_| Clients::start(server.address, plan);
    let clients: Vec<_> = (0..threads).map(start).collect();
    std::thread::sleep(Duration::from_millis(share(1_000) as u64));
    let answered = |clients: Clients| {
        let outcome = clients.stop();
        assert_eq!(outcome.failed(), 0, "{}", outcome.text());
        outcome.ok
    };
    let requests: u64 = clients.into_iter().map(answered).sum();
    (cpu_time(&processes) - before).as_secs_f64() * 1e6 / requests as f64
}
