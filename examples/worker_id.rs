//! A master and two workers that print their ids.
//!
//! Type:      cargo run --example worker_id
#![allow(clippy::print_stdout)]

use cluster::Role;

fn main() -> cluster::Result<()> {
    match cluster::init()? {
        Role::Master(master) => {
            println!("I am master");
            master.fork()?;
            master.fork()?;
            master.run()
        }
        Role::Worker(worker) => {
            println!("I am worker #{}", worker.id());
            Ok(())
        }
    }
}
