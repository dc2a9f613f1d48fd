//! Forks two workers of one program with different arguments: the first uses https, the second
//! http. The master prints the output of both.
//!
//! Usage:     cargo run --example setup_master

mod usage;

use std::io::{Read, Write};

use cluster::{Interest, LogWriter, Master, Role, Settings};

/// Forks a worker and prints its output.
fn show(master: &Master, log: LogWriter) -> cluster::Result<()> {
    let worker = master.fork()?;
    if let Some(output) = worker.process().take_stdio(1) {
        master.watch(output, Interest::Readable, move |_, mut output| {
            let mut bytes = [0; 1024];
            let length = output.read(&mut bytes).ok().filter(|length| *length > 0)?;
            let text = String::from_utf8_lossy(&bytes[..length]);
            let _ = write!(&log, "worker {} prints: {text}", worker.id());
            Some(Interest::Readable)
        })?;
    }
    Ok(())
}

fn main() -> cluster::Result<()> {
    match cluster::init()? {
        Role::Master(master) => {
            let [] = usage::arguments(usage::header!("setup_master.rs"), []);
            let log = LogWriter::stdout().attached_to(&master);
            master.setup_master(Settings::default().args(["--use", "https"]).silent(true));
            show(&master, log.clone())?; // https worker
            master.setup_master(Settings::default().args(["--use", "http"]));
            show(&master, log)?; // http worker
            master.run()
        }
        Role::Worker(_) => {
            let protocol = std::env::args().nth(2);
            let protocol = protocol.as_deref().unwrap_or("nothing");
            LogWriter::stdout().line(format_args!("I use {protocol}"));
            Ok(())
        }
    }
}
