//! A production server: a pool that keeps workers running, with keep-alive connections, reloads,
//! upgrades, signals, and systemd.
//!
//! Usage:     cargo run --release --example pool
//! reload:    kill -HUP, upgrade: kill -USR2, scale: kill -TTIN and -TTOU, stop: kill -TERM
//!
//! Optional argument: another address, as in `-- 127.0.0.1:8001`

mod hello;
mod usage;

use cluster::pool::{Pool, PoolOptions, ignore_pool_signals};
use cluster::{ListenOptions, LogWriter, Role, systemd};

fn main() -> cluster::Result<()> {
    let [address] = usage::arguments(usage::header!("pool.rs"), ["127.0.0.1:8000"]);
    let passed = systemd::listen_fds()?;
    match cluster::init()? {
        Role::Master(master) => {
            let log = LogWriter::stderr().attached_to(&master);
            let pool = Pool::new(&master, PoolOptions::default());
            pool.adopt(&master, passed)?;
            let bound = pool.listen(&master, address.as_str())?;
            log.line(format_args!("listening on {bound}"));
            let errors = log.clone();
            master.on_error(move |_, _, error| errors.line(error));
            pool.on_event(move |_, _, event| log.line(event));
            pool.on_default_signals(&master)?;
            pool.notify_systemd(&master)?;
            master.run()
        }
        Role::Worker(worker) => {
            ignore_pool_signals(&worker)?;
            // With round robin, the default, silent clients occupy no worker: a connection waits in
            // the master for its first bytes, and again after each answer.
            let options = ListenOptions::from(address).wait_for_data(true);
            for connection in worker.listen(options)?.incoming() {
                // Ignore an error, because a client that disconnects must not stop the worker.
                let _ = hello::answer(connection?, "", "hello\n");
            }
            Ok(())
        }
    }
}
