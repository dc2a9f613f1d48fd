//! Sticky sessions: as long as its worker lives, a client always comes to the same one, which may
//! keep what it knows of that client in memory. When a worker goes, only its own clients move.
//!
//! Type:      cargo run --release --example sticky
//! then:      curl http://127.0.0.1:8000/ (again and again, and from elsewhere)
//! and stop:  Ctrl-C
//!
//! Another address may follow, and how many workers: `-- 127.0.0.1:8001 4`
#![allow(clippy::print_stdout)]

mod hello;

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;

use cluster::{Role, WorkerId};

/// How well the worker suits the client: by chance, but always the same. Each client gets the one
/// that suits it best (rendezvous hashing), so whoever comes or goes changes nothing between others.
fn suits(worker: WorkerId, client: IpAddr) -> u64 {
    let mut hasher = DefaultHasher::new();
    (worker, client).hash(&mut hasher);
    hasher.finish()
}

fn main() -> cluster::Result<()> {
    let mut args = std::env::args().skip(1);
    let address = args.next().unwrap_or_else(|| "127.0.0.1:8000".to_owned());
    let workers = args.next().and_then(|count| count.parse().ok());
    match cluster::init()? {
        Role::Master(master) => {
            master.set_scheduler(|peer, workers| {
                let client = peer?.ip();
                let ids = workers.iter().map(|load| load.worker);
                ids.max_by_key(|id| suits(*id, client))
            });
            master.on_listening(|_, worker, address| {
                let (id, pid) = (worker.id(), worker.process().id());
                println!("worker {id} {pid} listening on {address}");
            });
            master.on_exit(|_, worker, status| println!("worker {} died ({status})", worker.id()));
            for _ in 0..workers.unwrap_or_else(cluster::available_parallelism) {
                master.fork()?;
            }
            master.run()
        }
        Role::Worker(worker) => {
            for connection in worker.listen(address.as_str())?.incoming() {
                let _ = hello::answer(connection?, &format!("worker {}\n", worker.id()));
            }
            Ok(())
        }
    }
}
