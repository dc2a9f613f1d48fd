//! Sends one message to all workers, and then another to one worker that it finds by its id.
//!
//! Usage:     cargo run --example broadcast

mod usage;

use cluster::{LogWriter, Master, Role, WorkerProcess};

fn each_worker(master: &Master, call: impl Fn(&WorkerProcess)) {
    for worker in master.workers() {
        call(&worker);
    }
}

fn main() -> cluster::Result<()> {
    let [] = usage::arguments(usage::header!("broadcast.rs"), []);
    match cluster::init()? {
        Role::Master(master) => {
            let first = master.fork()?.id();
            master.fork()?;
            master.fork()?;
            each_worker(&master, |worker| {
                let _ = worker.send(b"big announcement to all workers");
            });
            if let Some(worker) = master.worker(first) {
                let _ = worker.send(b"and something for you alone")?;
            }
            master.disconnect();
            master.run()
        }
        Role::Worker(worker) => {
            let log = LogWriter::stdout();
            worker.on_message(move |worker, message| {
                let text = String::from_utf8_lossy(message.bytes());
                log.line(format_args!("worker {}: {text}", worker.id()));
            });
            worker.run()
        }
    }
}
