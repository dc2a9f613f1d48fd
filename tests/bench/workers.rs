//! Measures the CPU time per short connection with 8 and 64 workers, and the number of workers that
//! wake for a connection.

use crate::costs::{Round, Variant, compare, figure};
use crate::server::{BARE, Server};
use crate::table::{Goal, Table};

/// Maximum number of sleeps per connection beyond the bare loop's sleeps. In the bare loop, the
/// kernel wakes one worker per connection.
const EXTRA_SLEEPS: f64 = 0.5;

pub fn measure(table: &mut Table) {
    for workers in [8, 64] {
        let goal = Some(Goal::AtMost(1.1));
        let variants = [
            ("bare loop", BARE, None),
            ("round robin", "rr", None),
            ("shared", "none", goal),
            ("sharded", "sharded", goal),
        ]
        .map(|(name, server, goal)| Variant {
            title: format!("{name}, {workers} workers"),
            server: Server::start(server, workers),
            goal,
        });
        let rounds = compare(table, &variants);
        let (bare, shared) = (0, 2);
        let sleeps = |round: &Round, variant: usize| round[variant].unwrap().sleeps;
        let more = figure(&rounds, |round| sleeps(round, shared) - sleeps(round, bare));
        let title = format!("thundering herd: shared, {workers} workers");
        table
            .row(&title, more, "more sleeps than bare")
            .goal(Goal::AtMost(EXTRA_SLEEPS));
    }
}
