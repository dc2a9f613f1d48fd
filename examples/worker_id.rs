//! A master and two workers that print their ids.
//!
//! Usage:     cargo run --example worker_id

mod usage;

use cluster::{LogWriter, Role};

fn main() -> cluster::Result<()> {
    let [] = usage::arguments(usage::header!("worker_id.rs"), []);
    match cluster::init()? {
        Role::Master(master) => {
            LogWriter::stdout().line("I am master");
            master.fork()?;
            master.fork()?;
            master.run()
        }
        Role::Worker(worker) => {
            LogWriter::stdout().line(format_args!("I am worker #{}", worker.id()));
            Ok(())
        }
    }
}
