//! An application with its own `poll` loop that hosts a master. The loop also serves a status port,
//! which reports the number of workers and the ledger.
//!
//! Usage:     cargo run --release --example embedded
//! then:      nc 127.0.0.1 8008       (a worker answers)
//!            nc 127.0.0.1 8009       (the host answers)
//! and stop:  Ctrl-C
//!
//! Options:   --addr 127.0.0.1:8008   --status 127.0.0.1:8009

mod usage;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use cluster::{Interest, LogWriter, Master, Role, Signal, Worker};
use lexopt::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Time after which a client of the status port is disconnected.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn options() -> Result<(String, String), lexopt::Error> {
    let mut addr = "127.0.0.1:8008".to_owned();
    let mut status = "127.0.0.1:8009".to_owned();
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            Long("addr") => addr = args.value()?.string()?,
            Long("status") => status = args.value()?.string()?,
            Short(_) | Long(_) | Value(_) => return Err(arg.unexpected()),
        }
    }
    Ok((addr, status))
}

fn host(master: &Master, status: &str) -> Outcome {
    let status = TcpListener::bind(status)?;
    status.set_nonblocking(true)?;
    let own = status.local_addr()?;
    let log = LogWriter::stdout().attached_to(master);
    log.line(format_args!("status on {own}"));
    LogWriter::stderr().line(format_args!("try: nc {} {}", own.ip(), own.port()));
    master.on_listening(move |_, worker, address| {
        log.line(format_args!(
            "worker {} listening on {address}",
            worker.id()
        ));
    });
    master.on_exit(|master, worker, status| {
        if worker.exited_after_disconnect() != Some(true) {
            // No worker is replaced. When all workers have exited, `dispatch` or `run` returns this
            // error.
            master.give_up(format!("worker {} exited ({status})", worker.id()));
        }
    });
    for signal in [Signal::INT, Signal::TERM] {
        master.on_signal(signal, |master, _| master.disconnect())?;
    }
    for _ in 0..2 {
        master.fork()?;
    }
    while !master.workers().is_empty() {
        let mut fds = [
            PollFd::new(&status, PollFlags::IN),
            PollFd::new(&master, PollFlags::IN),
        ];
        let wait = master.time_left().map(Timespec::try_from).transpose()?;
        match poll(&mut fds, wait.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        serve_status(&status, master)?;
        master.dispatch(Some(Duration::ZERO))?;
    }
    // Deliver the remaining events.
    Ok(master.run()?)
}

fn serve_status(status: &TcpListener, master: &Master) -> std::io::Result<()> {
    loop {
        match status.accept() {
            Ok((mut client, _)) => {
                let workers = master.workers();
                let text = format!("{} workers, {:?}\n", workers.len(), master.ledger());
                // Ignore an error, because the client may have disconnected.
                let _ = client.write_all(text.as_bytes());
                let _ = finish(client, master);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            // The client has disconnected before it was accepted.
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Lets the loop discard what the client still sends. Otherwise TCP would reset the connection, and
/// the client might lose the answer. In a worker, `Connection::finish` does this.
fn finish(client: TcpStream, master: &Master) -> Outcome {
    client.shutdown(Shutdown::Write)?;
    client.set_nonblocking(true)?;
    let discard = |_: &Master, mut client: &TcpStream| {
        let read = client.read(&mut [0; 4096]);
        read.is_ok_and(|length| length > 0)
            .then_some(Interest::Readable)
    };
    let watch = master.watch(client, Interest::Readable, discard)?;
    let timer = master.set_timeout(FINISH_TIMEOUT, move |master| master.unwatch(watch));
    // The workers, not this client, keep the master running.
    master.unreference(watch);
    master.unreference(timer);
    Ok(())
}

fn worker(worker: &Worker, addr: &str) -> Outcome {
    worker.on_signal(Signal::INT, |_, _| {})?;
    for connection in worker.listen(addr)?.incoming() {
        let mut connection = connection?;
        let answer = format!("hello from worker {}\n", worker.id());
        let _ = connection.write_all(answer.as_bytes());
        connection.finish();
    }
    Ok(())
}

fn main() -> Outcome {
    let (addr, status) = usage::or_exit(usage::header!("embedded.rs"), options());
    let role = cluster::init()?;
    match role {
        Role::Master(master) => host(&master, &status),
        Role::Worker(role) => worker(&role, &addr),
    }
}
