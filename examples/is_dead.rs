//! Workers that kill themselves after one request, and a master that checks whether they are dead.
//!
//! Usage:     cargo run --example is_dead
//! then:      curl http://127.0.0.1:8000/     once for each worker
//!
//! Optional argument: another address, as in `-- 127.0.0.1:8001`

mod hello;
mod usage;

use cluster::{LogWriter, Master, Role, Worker};
use rustix::process::{Signal, getpid, kill_process};

fn master(master: &Master) -> cluster::Result<()> {
    let log = LogWriter::stdout().attached_to(master);
    log.line(format_args!("master {} is running", std::process::id()));
    for _ in 0..cluster::available_parallelism() {
        master.fork()?;
    }
    let (at_listening, at_fork) = (log.clone(), log.clone());
    master.on_listening_once(move |_, _, address| {
        at_listening.line(format_args!("listening on {address}"));
    });
    master.on_fork(move |_, worker| {
        at_fork.line(format_args!("worker is dead: {}", worker.is_dead()));
    });
    master.on_exit(move |_, worker, _| {
        log.line(format_args!("worker is dead: {}", worker.is_dead()));
    });
    master.run()
}

fn worker(worker: &Worker, address: &str) -> cluster::Result<()> {
    if let Some(connection) = worker.listen(address)?.accept()? {
        let text = format!("current process\n {}\n", worker.process().id());
        let _ = hello::answer(connection, "", &text);
        let _ = kill_process(getpid(), Signal::TERM);
    }
    Ok(())
}

fn main() -> cluster::Result<()> {
    let [address] = usage::arguments(usage::header!("is_dead.rs"), ["127.0.0.1:8000"]);
    match cluster::init()? {
        Role::Master(role) => master(&role),
        Role::Worker(role) => worker(&role, &address),
    }
}
