//! A worker that sends each message back.
//!
//! Usage:     cargo run --example echo

mod usage;

use cluster::{LogWriter, Role};

fn main() -> cluster::Result<()> {
    let [] = usage::arguments(usage::header!("echo.rs"), []);
    match cluster::init()? {
        Role::Master(master) => {
            let worker = master.fork()?;
            let _ = worker.send(b"hi there")?;
            let log = LogWriter::stdout().attached_to(&master);
            worker.on_message(move |_, worker, message| {
                log.line(String::from_utf8_lossy(message.bytes()));
                worker.disconnect();
            });
            master.run()
        }
        Role::Worker(worker) => {
            worker.on_message(|worker, message| {
                let _ = worker.send(message.bytes());
            });
            worker.run()
        }
    }
}
