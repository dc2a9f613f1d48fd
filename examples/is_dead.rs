//! Workers that kill themselves after one request, and a master that checks whether they are dead.
//!
//! Type:      cargo run --example is_dead
//! then:      curl http://127.0.0.1:8000/     once for each worker
//!
//! Optional argument: another address, as in `-- 127.0.0.1:8001`
#![allow(clippy::print_stdout)]

mod hello;

use cluster::{Master, Role, Worker};
use nix::sys::signal::{Signal, raise};

fn master(master: &Master) -> cluster::Result<()> {
    println!("master {} is running", std::process::id());
    for _ in 0..cluster::available_parallelism() {
        master.fork()?;
    }
    master.on_listening_once(|_, _, address| println!("listening on {address}"));
    master.on_fork(|_, worker| println!("worker is dead: {}", worker.is_dead()));
    master.on_exit(|_, worker, _| println!("worker is dead: {}", worker.is_dead()));
    master.run()
}

fn worker(worker: &Worker, address: &str) -> cluster::Result<()> {
    if let Some(connection) = worker.listen(address)?.accept()? {
        let text = format!("current process\n {}\n", worker.process().id());
        let _ = hello::answer(connection, &text);
        let _ = raise(Signal::SIGTERM);
    }
    Ok(())
}

fn main() -> cluster::Result<()> {
    let address = std::env::args().nth(1);
    match cluster::init()? {
        Role::Master(role) => master(&role),
        Role::Worker(role) => worker(&role, address.as_deref().unwrap_or("127.0.0.1:8000")),
    }
}
