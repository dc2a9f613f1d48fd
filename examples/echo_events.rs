//! An echo server whose workers hold many connections at once, with callbacks. The master counts
//! the requests.
//!
//! Usage:     cargo run --release --example echo_events
//! then:      nc 127.0.0.1 8007       and type something
//! and stop:  Ctrl-C
//!
//! Options:   --addr 127.0.0.1:8007   --workers 4

mod usage;

use std::cell::{Cell, RefCell};
use std::io::{ErrorKind, Read, Write};
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{Connection, Interest, LogWriter, Master, Role, Signal, WatchId, Worker};
use lexopt::prelude::*;

/// If at least this number of bytes waits to be written to a client, the worker stops reading from
/// that client.
const MAX_PENDING: usize = 64 << 10;
/// Time after which a client that neither sends nor receives is disconnected. Without a limit,
/// silent clients would use up the worker's descriptors.
const IDLE_MAX: Duration = Duration::from_secs(30);

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
    let log = LogWriter::stdout().attached_to(master);
    let hints = LogWriter::stderr().attached_to(master);
    let requests = Rc::new(Cell::new(0));
    let (total, counts) = (Rc::clone(&requests), log.clone());
    let report = master.set_interval(Duration::from_secs(1), move |_| {
        counts.line(format_args!("requests = {}", total.get()));
    });
    // The workers, not this timer, keep the master running.
    master.unreference(report);
    master.on_exit(|master, worker, status| {
        // No worker is replaced. When all workers have exited, `run` returns the first failure.
        if !status.success() {
            master.give_up(format!("worker {} exited ({status})", worker.id()));
        }
    });
    // Start the workers. Each message `notifyRequest` counts as one request.
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
            log.line(format_args!("listening on {address}"));
            let address = address.to_string().replace(':', " ");
            hints.line(format_args!("try: nc {address}"));
        }
    });
    for signal in [Signal::INT, Signal::TERM] {
        master.on_signal(signal, |master, _| {
            // Make the workers exit at once, because a connection that never ends would keep its
            // worker running.
            for worker in master.workers() {
                let _ = worker.send(b"shutdown");
            }
            master.disconnect();
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
    // Ignore SIGINT. A terminal sends the signal to all processes, but the master ends its workers
    // itself.
    worker.on_signal(Signal::INT, |_, _| {})?;
    worker
        .listen(addr)?
        .set_connection_callback(|worker, connection| {
            let is_nonblocking = connection.set_nonblocking(true).is_ok();
            let last_event = Rc::new(Cell::new(Instant::now()));
            let (latest, mut pending) = (Rc::clone(&last_event), Vec::new());
            let echo = move |worker: &Worker, connection: &Connection| {
                latest.set(Instant::now());
                echo(worker, connection, &mut pending)
            };
            if is_nonblocking {
                // If `watch` fails, for example because no descriptor is free, its error is
                // dropped. The error owns the connection, so the connection closes.
                if let Ok(watch) = worker.watch(connection, Interest::Readable, echo) {
                    close_when_idle(worker, watch, last_event);
                }
            }
        });
    worker.run()
}

/// Closes the connection when the client has neither sent nor received anything for `IDLE_MAX`.
fn close_when_idle(worker: &Worker, watch: WatchId, last_event: Rc<Cell<Instant>>) {
    let left = IDLE_MAX.saturating_sub(last_event.get().elapsed());
    if left.is_zero() {
        return worker.unwatch(watch);
    }
    let again = move |worker: &Worker| close_when_idle(worker, watch, last_event);
    // The connection, not this timer, keeps the worker running.
    worker.unreference(worker.set_timeout(left, again));
}

/// Reads and writes as much as possible without blocking. Returns the event to wait for, or `None`
/// when the connection has ended or failed.
fn echo(worker: &Worker, mut connection: &Connection, pending: &mut Vec<u8>) -> Option<Interest> {
    let mut buffer = [0; 4096];
    let mut ended = false;
    while pending.len() < MAX_PENDING {
        match connection.read(&mut buffer) {
            Ok(0) => {
                ended = true;
                break;
            }
            Ok(length) => {
                pending.extend_from_slice(&buffer[..length]);
                // Ignore an error: the master's count is then too low, but the client is served.
                let _ = worker.send(b"notifyRequest");
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(_) => return None,
        }
    }
    while !pending.is_empty() {
        match connection.write(pending) {
            Ok(length) => drop(pending.drain(..length)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(_) => return None,
        }
    }
    match pending.len() {
        0 if ended => None,
        0 => Some(Interest::Readable),
        // At the limit, stop reading until the client has read some bytes.
        MAX_PENDING.. => Some(Interest::Writable),
        // After end-of-file the socket stays readable, so wait only until it is writable.
        _ if ended => Some(Interest::Writable),
        _ => Some(Interest::Both),
    }
}

fn main() -> cluster::Result<()> {
    let (addr, workers) = usage::or_exit(usage::header!("echo_events.rs"), options());
    match cluster::init()? {
        Role::Master(role) => master(&role, workers),
        Role::Worker(role) => worker(&role, &addr),
    }
}
