//! Prints the events of four workers: one succeeds, one exits with an error code, one is killed by
//! a signal, and one listens and is disconnected.
//!
//! Usage:     cargo run --example worker_events

mod usage;

use std::os::unix::process::ExitStatusExt;

use cluster::{LogWriter, Master, Role, Worker};

fn master(master: &Master) -> cluster::Result<()> {
    let output = LogWriter::stdout().attached_to(master);
    let log = output.clone();
    master.on_online(move |_, worker| {
        log.line(format_args!(
            "{}: yay, it responded after it was forked",
            worker.id()
        ));
    });
    let log = output.clone();
    master.on_listening(move |_, worker, address| {
        log.line(format_args!(
            "{}: is now connected to {address}",
            worker.id()
        ));
    });
    let log = output.clone();
    master.on_disconnect(move |_, worker| {
        log.line(format_args!("{}: has disconnected", worker.id()));
    });
    for part in ["success", "failure", "signal", "server"] {
        let worker = master.fork_with([("PART", part)])?;
        worker.on_listening(|_, worker, _| drop(worker.disconnect().clone()));
        let log = output.clone();
        worker.on_exit(move |_, worker, status| {
            let id = worker.id();
            match (status.code(), status.signal()) {
                (Some(0), _) => log.line(format_args!("{id}: success!")),
                (Some(code), _) => log.line(format_args!("{id}: exited with error code: {code}")),
                (None, signal) => log.line(format_args!("{id}: was killed by signal: {signal:?}")),
            }
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
    let [] = usage::arguments(usage::header!("worker_events.rs"), []);
    match cluster::init()? {
        Role::Master(role) => master(&role),
        Role::Worker(role) => worker(&role),
    }
}
