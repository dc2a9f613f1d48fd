//! Counts the server's system calls for a short connection.

use crate::load::drive;
use crate::server::{BARE, GET, Server};
use crate::table::{Table, number};
use crate::usage::{calls, family};

const WORKERS: usize = 2;
const CLIENTS: usize = 32;
const CONNECTIONS: usize = 5_000;

pub fn measure(table: &mut Table) {
    let names = [
        ("bare loop", BARE),
        ("round robin", "rr"),
        ("shared", "none"),
        ("sharded", "sharded"),
    ];
    for (title, name) in names {
        let counted = Server::start(name, WORKERS).and_then(|server| count(&server));
        match counted {
            Ok(calls) => {
                let sum: f64 = calls.iter().map(|call| call.1).sum();
                let text = calls
                    .iter()
                    .map(|(name, count)| format!("{name} {}", number(*count)));
                let row = table.row(title, sum, "per connection");
                row.note(&text.collect::<Vec<_>>().join(", "));
            }
            Err(why) => table.skip(title, &why),
        }
    }
}

/// Returns the name and the number per connection of each system call, with the most frequent call
/// first.
fn count(server: &Server) -> Result<Vec<(String, f64)>, String> {
    let calls = calls(&family(server.group.pid()), || {
        let mut left = CONNECTIONS;
        let next = || {
            left = left.checked_sub(1)?;
            Some(GET)
        };
        drive(server.address, CLIENTS, next, |_| {});
    })?;
    let each = calls
        .into_iter()
        .map(|(name, count)| (name, count as f64 / CONNECTIONS as f64));
    // Leave out calls that were made only a few times in total, because they are not part of
    // serving a connection.
    let mut each: Vec<_> = each.filter(|call| call.1 > 0.001).collect();
    each.sort_by(|one, other| other.1.total_cmp(&one.1));
    Ok(each)
}
