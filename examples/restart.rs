//! Replaces workers that exit. Each worker exits at once; the fifth is not replaced.
//!
//! Usage:     cargo run --example restart

mod usage;

use cluster::{LogWriter, Role};

fn main() -> cluster::Result<()> {
    let [] = usage::arguments(usage::header!("restart.rs"), []);
    match cluster::init()? {
        Role::Master(master) => {
            let log = LogWriter::stdout().attached_to(&master);
            master.on_exit(move |master, worker, status| {
                let pid = worker.process().id();
                if worker.id().get() < 5 {
                    log.line(format_args!(
                        "worker {pid} exited ({status}). restarting..."
                    ));
                    let _ = master.fork();
                } else {
                    log.line(format_args!("worker {pid} exited ({status}). enough."));
                }
            });
            master.fork()?;
            master.run()
        }
        Role::Worker(worker) => std::process::exit(i32::try_from(worker.id().get()).unwrap_or(1)),
    }
}
