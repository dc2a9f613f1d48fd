//! Measures connections that stay open between requests.

mod clients;
mod cost;
mod latency;
mod operation;
mod rivals;
pub mod server;

use clients::Plan;

pub use cost::{measure as cost, measure_parked, watch};
pub use latency::measure as latency;
pub use operation::{kills, reloads, threads, upgrades};
pub use rivals::measure as rivals;

/// Number of workers of each measured server.
const WORKERS: usize = 2;

/// The body of every answer.
const BODY: &str = "hello world\n";
const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
/// A request that keeps a worker of [`server`] busy for [`server::WORK`].
const GET_WORK: &[u8] = b"GET /work HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// The policies as arguments of [`server::Service::start`], and their names in the table.
const POLICIES: [(&str, &str); 3] = [
    ("rr", "round robin"),
    ("none", "shared"),
    ("sharded", "sharded"),
];

/// A plan without clients.
const NONE: Plan = Plan {
    busy: 0,
    idle: 0,
    silent: 0,
    request: GET,
    rate: None,
};
