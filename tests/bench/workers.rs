//! The same with more workers, and how many of them wake for one connection.

use crate::costs::{Round, Variant, compare, figure};
use crate::server::{BARE, Server};
use crate::table::{Goal, Table};

/// How many more sleeps a connection may cost than with the bare loop, where one worker wakes for
/// it: nobody else is to be woken.
const SLEEPS: f64 = 0.5;

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
        let sleeps = |round: &Round, variant: usize| round[variant].unwrap().sleeps;
        let more = figure(&rounds, |round| sleeps(round, shared) - sleeps(round, bare));
        let title = format!("stampede: shared, {workers} workers");
        table
            .row(&title, more, "sleeps more than bare")
            .goal(Goal::AtMost(SLEEPS));
    }
}
