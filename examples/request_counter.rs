//! The workers answer requests, and the master counts them.
//!
//! Usage:     cargo run --release --example request_counter
//! then:      curl http://127.0.0.1:8000/
//! and stop:  Ctrl-C
//!
//! Optional argument: another address, as in `-- 127.0.0.1:8001`

mod hello;
mod usage;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use cluster::{LogWriter, Master, Role, Worker};

fn master(master: &Master) -> cluster::Result<()> {
    let log = LogWriter::stdout().attached_to(master);
    let requests = Rc::new(Cell::new(0));
    let (total, counts) = (Rc::clone(&requests), log.clone());
    let report = master.set_interval(Duration::from_secs(1), move |_| {
        counts.line(format_args!("requests = {}", total.get()));
    });
    // The workers, not this timer, keep the master running.
    master.unreference(report);
    master.on_listening_once(move |_, _, address| {
        log.line(format_args!("listening on {address}"));
    });
    master.on_exit(|master, worker, status| {
        // No worker is replaced. When all workers have exited, `run` returns the first failure.
        if !status.success() {
            master.give_up(format!("worker {} exited ({status})", worker.id()));
        }
    });
    // Start the workers. Each message `notifyRequest` counts as one request.
    for _ in 0..cluster::available_parallelism() {
        let requests = Rc::clone(&requests);
        master.fork()?.on_message(move |_, _, message| {
            if message.bytes() == b"notifyRequest" {
                requests.set(requests.get() + 1);
            }
        });
    }
    master.run()
}

fn worker(worker: &Worker, address: &str) -> cluster::Result<()> {
    for connection in worker.listen(address)?.incoming() {
        let _ = hello::answer(connection?, "", "hello world\n");
        // Notify the master about the request.
        let _ = worker.send(b"notifyRequest")?;
    }
    Ok(())
}

fn main() -> cluster::Result<()> {
    let [address] = usage::arguments(usage::header!("request_counter.rs"), ["127.0.0.1:8000"]);
    match cluster::init()? {
        Role::Master(role) => master(&role),
        Role::Worker(role) => worker(&role, &address),
    }
}
