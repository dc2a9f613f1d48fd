//! Sticky sessions: while the workers stay the same, each IP address always gets the same worker.
//! The worker can therefore keep the sessions of its clients in memory. When a worker exits, only
//! its own clients move.
//!
//! Behind a proxy or NAT, many clients have one address, and one worker gets all of them. Use
//! `sticky_ports` or `sticky_cookie` there.
//!
//! Usage:     cargo run --release --example sticky
//! then:      curl http://127.0.0.1:8000/ (again and again, and from elsewhere)
//! and stop:  Ctrl-C
//!
//! Optional arguments: another address and the number of workers, as in `-- 127.0.0.1:8001 4`

mod hello;
mod usage;

use std::ffi::OsString;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;

use cluster::{LogWriter, Role, WorkerId};
use lexopt::ValueExt;

/// Returns a pseudo-random score that is always the same for one worker and client. Each client
/// gets the worker with the highest score (rendezvous hashing), so a worker that starts or exits
/// moves no client between other workers.
fn score(worker: WorkerId, client: IpAddr) -> u64 {
    let mut hasher = DefaultHasher::new();
    (worker, client).hash(&mut hasher);
    hasher.finish()
}

fn main() -> cluster::Result<()> {
    let (source, cores) = (
        usage::header!("sticky.rs"),
        cluster::available_parallelism(),
    );
    let defaults = ["127.0.0.1:8000", &cores.to_string()];
    let [address, workers] = usage::arguments(source, defaults);
    let workers: usize = usage::or_exit(source, OsString::from(workers).parse());
    match cluster::init()? {
        Role::Master(master) => {
            master.set_scheduler(|peer, workers| {
                let client = peer?.ip();
                let ids = workers.iter().map(|load| load.worker);
                ids.max_by_key(|id| score(*id, client))
            });
            let log = LogWriter::stdout().attached_to(&master);
            let at_exit = log.clone();
            master.on_listening(move |_, worker, address| {
                let (id, pid) = (worker.id(), worker.process().id());
                log.line(format_args!("worker {id} {pid} listening on {address}"));
            });
            master.on_exit(move |master, worker, status| {
                at_exit.line(format_args!("worker {} exited ({status})", worker.id()));
                // No worker is replaced. When all workers have exited, `run` returns the first of
                // these errors.
                master.give_up(format!("worker {} exited ({status})", worker.id()));
            });
            for _ in 0..workers {
                master.fork()?;
            }
            master.run()
        }
        Role::Worker(worker) => {
            for connection in worker.listen(address.as_str())?.incoming() {
                let _ = hello::answer(connection?, "", &format!("worker {}\n", worker.id()));
            }
            Ok(())
        }
    }
}
