//! An application with its own `poll` loop that hosts a master. The loop also serves a status port,
//! which reports the number of workers and the ledger.
//!
//! Type:      cargo run --release --example embedded
//! then:      nc 127.0.0.1 8008       (a worker answers)
//!            nc 127.0.0.1 8009       (the host answers)
//! and stop:  Ctrl-C
//!
//! Options:   --addr 127.0.0.1:8008   --status 127.0.0.1:8009

use std::io::{ErrorKind, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::time::Duration;

use cluster::{LogWriter, Master, Role, Signal, Worker};
use lexopt::prelude::*;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

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
    for signal in [Signal::INT, Signal::TERM] {
        master.on_signal(signal, |master, _| master.disconnect())?;
    }
    for _ in 0..2 {
        master.fork()?;
    }
    while !master.workers().is_empty() {
        let mut fds = [
            PollFd::new(status.as_fd(), PollFlags::POLLIN),
            PollFd::new(master.as_fd(), PollFlags::POLLIN),
        ];
        // Round up to the next millisecond, so that `poll` does not return before a timer is due.
        let wait = master
            .time_left()
            .map(|time| time + Duration::from_micros(999));
        let wait = wait.map_or(Ok(PollTimeout::NONE), PollTimeout::try_from);
        match poll(&mut fds, wait.unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        serve_status(&status, master)?;
        master.dispatch(Some(Duration::ZERO))?;
    }
    Ok(())
}

fn serve_status(status: &TcpListener, master: &Master) -> std::io::Result<()> {
    loop {
        match status.accept() {
            Ok((mut client, _)) => {
                let workers = master.workers();
                let text = format!("{} workers, {:?}\n", workers.len(), master.ledger());
                // The write fails if the client has disconnected.
                let _ = client.write_all(text.as_bytes());
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn worker(worker: &Worker, addr: &str) -> Outcome {
    worker.on_signal(Signal::INT, |_, _| {})?;
    for connection in worker.listen(addr)?.incoming() {
        let answer = format!("hello from worker {}\n", worker.id());
        let _ = connection?.write_all(answer.as_bytes());
    }
    Ok(())
}

fn main() -> Outcome {
    let role = cluster::init()?;
    let (addr, status) = options()?;
    match role {
        Role::Master(master) => host(&master, &status),
        Role::Worker(role) => worker(&role, &addr),
    }
}
