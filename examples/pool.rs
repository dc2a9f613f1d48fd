//! A production server: a pool that keeps workers running, with reloads, upgrades, signals, and systemd.
//!
//! Type:      cargo run --release --example pool
//! reload:    kill -HUP, upgrade: kill -USR2, scale: kill -TTIN and -TTOU, stop: kill -TERM

use std::io::{Read, Write};

use cluster::pool::{Pool, PoolOptions, ignore_pool_signals};
use cluster::{Connection, LogWriter, Role, systemd};

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 6\r\n\r\nhello\n";

fn main() -> cluster::Result<()> {
    let passed = systemd::listen_fds()?;
    let address = std::env::args().nth(1);
    let address = address.as_deref().unwrap_or("127.0.0.1:8000");
    match cluster::init()? {
        Role::Master(master) => {
            let log = LogWriter::stderr().attached_to(&master);
            let pool = Pool::new(&master, PoolOptions::default());
            pool.adopt(&master, passed)?;
            let bound = pool.listen(&master, address)?;
            log.line(format_args!("listening on {bound}"));
            pool.on_event(move |_, _, event| log.line(event));
            pool.on_default_signals(&master)?;
            pool.notify_systemd(&master)?;
            master.run()
        }
        Role::Worker(worker) => {
            ignore_pool_signals(&worker)?;
            let listener = worker.listen(address)?;
            listener.incoming().try_for_each(|client| client.map(serve))
        }
    }
}

fn serve(mut client: Connection) {
    let read = client.read(&mut [0; 4096]);
    let _ = read.and_then(|_| client.write_all(ANSWER));
}
