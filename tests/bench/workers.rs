//! The same with more workers, and how many of them wake for one connection.

use crate::costs::{Variant, compare, figure};
use crate::server::{BARE, Server};
use crate::table::{Goal, Table};

/// A worker sleeps until a connection is there, and perhaps until its request is; if it slept more
/// often, it was woken for what another one got.
const SLEEPS: f64 = 2.0;

pub fn measure(table: &mut Table) {
    for workers in [8, 64] {
        let most = Some(Goal::AtMost(1.1));
        let variants = [
            ("bare loop", BARE, None),
            ("round robin", "rr", None),
            ("shared", "none", most),
            ("sharded", "sharded", most),
        ]
        .map(|(name, server, goal)| Variant {
            title: format!("{name}, {workers} workers"),
            server: Server::start(server, workers),
            goal,
        });
        let rounds = compare(table, &variants);
        let (bare, shared) = (0, 2);
        let sleeps = |variant: usize| figure(&rounds, |round| round[variant].unwrap().sleeps);
        table
            .row(
                &format!("stampede: shared, {workers} workers"),
                sleeps(shared),
                "sleeps",
            )
            .goal(Goal::AtMost(SLEEPS))
            .note(&format!("bare loop {}", sleeps(bare).in_unit("")));
    }
}
