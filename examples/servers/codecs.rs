//! Sends messages in two formats over one channel: JSON, which people can read, and a compact
//! format for frequent messages. A message is bytes; the application chooses their format.
//!
//! Usage:     cargo run -p cluster-servers --example codecs

#[path = "../usage/mod.rs"]
mod usage;

use std::error::Error;

use cluster::{LogWriter, Master, Role, Worker};
use serde::{Deserialize, Serialize};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Report {
    requests: u64,
    busiest: Option<String>,
}

/// The first byte of a message identifies its format.
const JSON: u8 = b'j';
const COMPACT: u8 = b'c';

fn json(report: &Report) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut message = vec![JSON];
    serde_json::to_writer(&mut message, report)?;
    Ok(message)
}

fn compact(report: &Report) -> Result<Vec<u8>, Box<dyn Error>> {
    Ok(postcard::to_extend(report, vec![COMPACT])?)
}

fn decode(message: &[u8]) -> Result<Report, Box<dyn Error>> {
    match message.split_first() {
        Some((&JSON, body)) => Ok(serde_json::from_slice(body)?),
        Some((&COMPACT, body)) => Ok(postcard::from_bytes(body)?),
        _ => Err("an empty message, or one of an unknown kind".into()),
    }
}

fn master(master: &Master) -> cluster::Result<()> {
    let log = LogWriter::stdout().attached_to(master);
    master.on_message(move |_, worker, message| match decode(message.bytes()) {
        Ok(report) => {
            let length = message.bytes().len();
            log.line(format_args!("{length} bytes: {report:?}"));
        }
        // Workers parse untrusted input, so their messages need not be well-formed.
        Err(error) => log.line(format_args!(
            "worker {} sent nonsense: {error}",
            worker.id()
        )),
    });
    master.fork()?;
    master.run()
}

fn worker(worker: &Worker) -> Result<(), Box<dyn Error>> {
    let report = Report {
        requests: 300,
        busiest: Some("/index.html".to_owned()),
    };
    let _ = worker.send(&json(&report)?)?;
    let _ = worker.send(&compact(&report)?)?;
    let _ = worker.send(b"?")?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let [] = usage::arguments(usage::header!("codecs.rs"), []);
    match cluster::init()? {
        Role::Master(role) => Ok(master(&role)?),
        Role::Worker(role) => worker(&role),
    }
}
