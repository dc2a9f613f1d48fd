//! An echo server whose workers hold many connections at once, with callbacks, and a master that
//! counts what they did.
//!
//! Type:      cargo run --release --example echo_events
//! then:      nc 127.0.0.1 8007       and type something
//! and stop:  Ctrl-C
//!
//! Options:   --addr 127.0.0.1:8007   --workers 4
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::cell::{Cell, RefCell};
use std::io::{ErrorKind, Read, Write};
use std::rc::Rc;
use std::time::Duration;

use cluster::{Connection, Interest, Master, Role, Signal, Worker};
use lexopt::prelude::*;

/// While this much waits for a client that does not read, nothing more is read from it.
const MOST_WAITING: usize = 64 << 10;

fn options() -> Result<(String, usize), lexopt::Error> {
    let mut addr = "127.0.0.1:8007".to_owned();
    let mut workers = cluster::available_parallelism();
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            Long("addr") => addr = args.value()?.string()?,
            Long("workers") => workers = args.value()?.parse()?,
            Short(_) | Long(_) | Value(_) => return Err(arg.unexpected()),
        }
    }
    Ok((addr, workers))
}

fn master(master: &Master, workers: usize) -> cluster::Result<()> {
    // Count requests.
    let requests = Rc::new(Cell::new(0));
    let total = Rc::clone(&requests);
    let report = master.set_interval(Duration::from_secs(1), move |_| {
        println!("requests = {}", total.get());
    });
    // Start workers and listen for messages that say `notifyRequest`.
    for _ in 0..workers {
        let requests = Rc::clone(&requests);
        master.fork()?.on_message(move |_, _, message| {
            if message.bytes() == b"notifyRequest" {
                requests.set(requests.get() + 1);
            }
        });
    }
    let first = RefCell::new(true);
    master.on_listening(move |_, _, address| {
        if first.replace(false) {
            println!("listening on {address}");
            eprintln!("try: nc {}", address.to_string().replace(':', " "));
        }
    });
    for signal in [Signal::INT, Signal::TERM] {
        master.on_signal(signal, move |master, _| {
            // Connections that never end would keep a worker from leaving.
            for worker in master.workers() {
                let _ = worker.send(b"shutdown");
            }
            // And the interval would keep the master running.
            master.disconnect(move |master| master.clear_timer(report));
        })?;
    }
    master.run()
}

fn worker(worker: &Worker, addr: &str) -> cluster::Result<()> {
    worker.on_message(|worker, message| {
        if message.bytes() == b"shutdown" {
            worker.kill();
        }
    });
    // A terminal sends this to everybody: the master tells its workers when to leave.
    worker.on_signal(Signal::INT, |_, _| {})?;
    worker.listen(addr)?.on_connection(|worker, connection| {
        let watched = connection.set_nonblocking(true).is_ok();
        let mut waiting = Vec::new();
        let echo =
            move |worker: &Worker, connection: &Connection| echo(worker, connection, &mut waiting);
        if watched {
            // Without descriptors left the connection is dropped, which closes it.
            let _ = worker.watch(connection, Interest::Readable, echo);
        }
    });
    worker.run()
}

/// Reads what is there, writes what can be written, and says what to wait for.
fn echo(worker: &Worker, mut connection: &Connection, waiting: &mut Vec<u8>) -> Option<Interest> {
    let mut buffer = [0; 4096];
    let mut ended = false;
    while waiting.len() < MOST_WAITING {
        match connection.read(&mut buffer) {
            Ok(0) => {
                ended = true;
                break;
            }
            Ok(length) => {
                waiting.extend_from_slice(&buffer[..length]);
                // A master that does not keep up misses one: it is only a count.
                let _ = worker.send(b"notifyRequest");
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(_) => return None,
        }
    }
    while !waiting.is_empty() {
        match connection.write(waiting) {
            Ok(length) => drop(waiting.drain(..length)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(_) => return None,
        }
    }
    match waiting.len() {
        0 if ended => None,
        0 => Some(Interest::Readable),
        // It stays readable after its end, or is not to be read for the moment.
        MOST_WAITING.. => Some(Interest::Writable),
        _ if ended => Some(Interest::Writable),
        _ => Some(Interest::Both),
    }
}

fn main() -> cluster::Result<()> {
    let role = cluster::init()?;
    let (addr, workers) = options().unwrap_or_else(|usage| {
        eprintln!("{usage}");
        std::process::exit(2);
    });
    match role {
        Role::Master(role) => master(&role, workers),
        Role::Worker(role) => worker(&role, &addr),
    }
}
