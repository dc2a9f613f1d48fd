//! A worker that sends each message back.
//!
//! Type:      cargo run --example echo
#![allow(clippy::print_stdout)]

use cluster::Role;

fn main() -> cluster::Result<()> {
    match cluster::init()? {
        Role::Master(master) => {
            let worker = master.fork()?;
            let _ = worker.send(b"hi there")?;
            worker.on_message(|_, worker, message| {
                println!("{}", String::from_utf8_lossy(message.bytes()));
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
