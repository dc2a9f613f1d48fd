//! Prints the events of four workers: one succeeds, one exits with an error code, one is killed by a
//! signal, and one listens and is disconnected.
//!
//! Type:      cargo run --example worker_events
#![allow(clippy::print_stdout)]

use std::os::unix::process::ExitStatusExt;

use cluster::{Master, Role, Worker};

fn master(master: &Master) -> cluster::Result<()> {
    master.on_online(|_, worker| {
        println!("{}: yay, it responded after it was forked", worker.id());
    });
    master.on_listening(|_, worker, address| {
        println!("{}: is now connected to {address}", worker.id());
    });
    master.on_disconnect(|_, worker| println!("{}: has disconnected", worker.id()));
    for part in ["success", "failure", "signal", "server"] {
        let worker = master.fork_with([("PART", part)])?;
        worker.on_listening(|_, worker, _| drop(worker.disconnect().clone()));
        worker.on_exit(|_, worker, status| match (status.code(), status.signal()) {
            (Some(0), _) => println!("{}: success!", worker.id()),
            (Some(code), _) => println!("{}: exited with error code: {code}", worker.id()),
            (None, signal) => println!("{}: was killed by signal: {signal:?}", worker.id()),
        });
    }
    master.run()
}

fn worker(worker: &Worker) -> cluster::Result<()> {
    match std::env::var("PART").unwrap_or_default().as_str() {
        "failure" => std::process::exit(3),
        "signal" => std::process::abort(),
        "server" => {
            let listener = worker.listen("127.0.0.1:0")?;
            listener
                .incoming()
                .try_for_each(|connection| connection.map(drop))
        }
        _ => Ok(()),
    }
}

fn main() -> cluster::Result<()> {
    match cluster::init()? {
        Role::Master(role) => master(&role),
        Role::Worker(role) => worker(&role),
    }
}
