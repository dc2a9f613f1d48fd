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
        for (number, (policy, name)) in POLICIES.iter().enumerate() {
            let (new, parked) = (&costs[2 + 2 * number], &costs[3 + 2 * number]);
            let title = format!("{busy} clients: {name}, parked or new");
            let limit = match (*policy, busy) {
                ("rr", 32) => 0.6,
                _ => 0.5,
            };
            if parked.is_empty() {
                table.skip(&title, "not measured");
                continue;
            }
            table
                .row(&title, ratios(parked, new), "× new connection")
                .goal(Goal::AtMost(limit));
            if *policy != "rr" {
                let title = format!("{busy} clients: {name}, parked");
                let row = table.row(&title, ratios(parked, &costs[1]), "× bare keep-alive");
                row.goal(Goal::AtMost(1.5));
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

/// Measures the cost of 10,000 parked connections in the master.
pub fn idle(table: &mut Table) {
    allow_many_descriptors();
    let services: Result<Vec<_>, _> = IDLE
        .map(|_| Service::start("rr", WORKERS, Mode::Park))
        .into_iter()
        .collect();
    let services = match services {
        Ok(services) => services,
        Err(why) => return table.skip("parked connections in the master", &why),
    };
    let many = &services[IDLE.len() - 1].server;
    let processes = family(many.group.pid());
    let before = mapped(processes[0], "Anonymous:");
    let idle = |(service, idle): (&Service, usize)| {
        Clients::start(service.server.address, Plan { idle, ..NONE })
    };
    let clients: Vec<_> = services.iter().zip(IDLE).map(idle).collect();
    let bytes = (mapped(processes[0], "Anonymous:") - before) * 1024.0;
    table
        .row("memory of a parked connection", bytes / 10_000.0, "bytes")
        .goal(Goal::AtMost(256.0));
    let title = "10,000 parked connections: system calls";
    match calls(&processes, || std::thread::sleep(QUIET)) {
        Ok(calls) => {
            let count: u64 = calls.values().sum();
            let row = table.row(title, count as f64, "in 2 s");
            row.goal(Goal::AtMost(0.0)).note(&format!("{calls:?}"));
        }
        Err(why) => table.skip(title, &why),
    }
    let variant = |service| Variant {
        title: String::new(),
        server: Ok(service),
        request: GET,
    };
    let variants: Vec<_> = services.into_iter().map(variant).collect();
    let costs = measure_in_turn(&variants, 32);
    let notes = costs.iter().map(|own| Figure::from(own.clone()).median);
    let notes: Vec<_> = notes.map(number).collect();
    table
        .row(
            "CPU of a request beside 10,000 parked connections",
            ratios(&costs[IDLE.len() - 1], &costs[0]),
            "× beside 10",
        )
        .goal(Goal::AtMost(1.1))
        .note(&format!("10, 100, 1,000, 10,000: {} µs", notes.join("; ")));
    for (clients, idle) in clients.into_iter().zip(IDLE) {
        let lost = clients.stop().idle_lost;
        let title = format!("{idle} parked connections: closed by the server");
        table
            .row(&title, lost as f64, "connections")
            .goal(Goal::AtMost(0.0));
    }
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
