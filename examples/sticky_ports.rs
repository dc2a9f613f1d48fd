//! Sticky sessions behind a proxy: each slot of the pool has its own port, and the proxy chooses the
//! port by a cookie. A replacement listens on the port of its slot.
//!
//! Usage:     cargo run --release --example sticky_ports
//! proxy:     haproxy -f src/guide/files/haproxy-slots.cfg
//! then:      curl --cookie jar --cookie-jar jar http://127.0.0.1/ (again and again)
//! reload:    kill -HUP, upgrade: kill -USR2, stop: kill -TERM
//!
//! Optional arguments: another host, first port and number of slots, as in `-- 127.0.0.1 8001 2`

mod hello;
mod usage;

use std::error::Error;
use std::ffi::OsString;

use cluster::pool::{Pool, PoolOptions, SLOT, ignore_pool_signals};
use cluster::{ListenOptions, LogWriter, Role, systemd};
use lexopt::ValueExt as _;

fn main() -> Result<(), Box<dyn Error>> {
    let source = usage::header!("sticky_ports.rs");
    let [host, port, slots] = usage::arguments(source, ["127.0.0.1", "8000", "4"]);
    let port: u16 = usage::or_exit(source, OsString::from(port).parse());
    let slots: u16 = usage::or_exit(source, OsString::from(slots).parse());
    // A port above 65535 is an error of `listen`.
    let address = |slot: u16| format!("{host}:{}", u32::from(port) + u32::from(slot));
    let passed = systemd::listen_fds()?;
    match cluster::init()? {
        Role::Master(master) => {
            let pool = Pool::new(&master, PoolOptions::default().workers(slots.into()));
            pool.adopt(&master, passed)?;
            // The pool keeps each port open. While a worker is replaced, its clients wait.
            for slot in 0..slots {
                pool.listen(&master, address(slot))?;
            }
            let log = LogWriter::stderr().attached_to(&master);
            pool.on_event(move |_, _, event| log.line(event));
            pool.on_default_signals(&master)?;
            Ok(master.run()?)
        }
        Role::Worker(worker) => {
            ignore_pool_signals(&worker)?;
            let slot = std::env::var(SLOT)?.parse()?;
            let body = format!("slot {slot}, worker {}\n", worker.id());
            let options = ListenOptions::from(address(slot)).wait_for_data(true);
            for connection in worker.listen(options)?.incoming() {
                // Ignore an error, because a client that disconnects must not stop the worker.
                let _ = hello::answer(connection?, "", &body);
            }
            Ok(())
        }
    }
}
