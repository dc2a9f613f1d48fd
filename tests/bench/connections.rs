//! Measures the CPU time per short connection of servers with two workers. The time includes all
//! processes of a server.

use crate::costs::{Variant, compare, figure, ratio};
use crate::peers;
use crate::server::{BARE, Server};
use crate::table::{Goal, Table};

const WORKERS: usize = 2;

pub fn measure(table: &mut Table) {
    let variant = |title: &str, server, goal| Variant {
        title: title.to_owned(),
        server,
        goal,
    };
    let at_most = |limit| Some(Goal::AtMost(limit));
    let variants = [
        variant("bare loop", Server::start(BARE, WORKERS), None),
        variant("round robin", Server::start("rr", WORKERS), at_most(1.75)),
        variant("shared", Server::start("none", WORKERS), at_most(1.1)),
        variant("sharded", Server::start("sharded", WORKERS), at_most(1.1)),
        variant("Node, round robin", peers::node("rr", WORKERS), None),
        variant("Node, none", peers::node("none", WORKERS), None),
        variant("nginx", peers::nginx(WORKERS, "0"), None),
        variant("gunicorn, sync", peers::gunicorn(WORKERS), None),
        variant("prefork (crate)", peers::prefork(WORKERS), None),
    ];
    let rounds = compare(table, &variants);
    let (own, node) = (1, 4);
    let name = "round robin vs. Node";
    if let Err(why) = &variants[node].server {
        return table.skip(name, why);
    }
    let ratios = figure(&rounds, |round| ratio(round, own, node));
    table.row(name, ratios, "× Node's").goal(Goal::AtMost(0.25));
}
