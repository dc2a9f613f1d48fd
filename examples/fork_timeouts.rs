//! Sets a timeout for each worker, from its fork until it listens. Worker 1 listens, worker 2 never
//! listens, and worker 3 exits.
//!
//! Usage:     cargo run --example fork_timeouts

mod usage;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use cluster::{LogWriter, Master, Role, Worker, WorkerId};

const TIMEOUT: Duration = Duration::from_millis(500);

fn error_message(log: &LogWriter, id: WorkerId) {
    log.line(format_args!(
        "worker {id}: something must be wrong with the connection ..."
    ));
}

fn master(master: &Master) -> cluster::Result<()> {
    let log = LogWriter::stdout().attached_to(master);
    let timeouts = Rc::new(RefCell::new(BTreeMap::new()));
    let (set, listening, exited) = (Rc::clone(&timeouts), Rc::clone(&timeouts), timeouts);
    let errors = log.clone();
    master.on_fork(move |master, worker| {
        let (late, log) = (worker.clone(), errors.clone());
        let timeout = master.set_timeout(TIMEOUT, move |_| {
            error_message(&log, late.id());
            late.disconnect();
        });
        set.borrow_mut().insert(worker.id(), timeout);
    });
    let errors = log.clone();
    master.on_listening(move |master, worker, address| {
        log.line(format_args!("worker {} listens on {address}", worker.id()));
        if let Some(timeout) = listening.borrow_mut().remove(&worker.id()) {
            master.clear_timer(timeout);
        }
        worker.disconnect();
    });
    master.on_exit(move |master, worker, _| {
        // Only a worker that has not listened still has an entry. If its timeout has fired, the
        // error has already been printed, and the worker was disconnected. In this case,
        // `exited_after_disconnect` returns `Some(true)`.
        if let Some(timeout) = exited.borrow_mut().remove(&worker.id()) {
            master.clear_timer(timeout);
            if worker.exited_after_disconnect() != Some(true) {
                error_message(&errors, worker.id());
            }
        }
    });
    for _ in 0..3 {
        master.fork()?;
    }
    master.run()
}

fn worker(worker: &Worker) -> cluster::Result<()> {
    match worker.id().get() {
        1 => drop(worker.listen("127.0.0.1:0")?.accept()?),
        2 => worker.run()?,
        _ => {}
    }
    Ok(())
}

fn main() -> cluster::Result<()> {
    let [] = usage::arguments(usage::header!("fork_timeouts.rs"), []);
    match cluster::init()? {
        Role::Master(role) => master(&role),
        Role::Worker(role) => worker(&role),
    }
}
