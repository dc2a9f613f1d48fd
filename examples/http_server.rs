//! A web server on every core, with workers that block, and with keep-alive connections.
//!
//! Usage:     cargo run --release --example http_server
//! then:      curl -i http://127.0.0.1:8000/
//! and stop:  Ctrl-C
//!
//! Options:   --addr 127.0.0.1:8000   --workers 4   --policy rr|none|sharded

mod hello;
mod usage;

use std::cell::RefCell;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use cluster::{
    ListenOptions, LogWriter, Master, Role, SchedulingPolicy, Signal, Worker, WorkerProcess,
};
use lexopt::prelude::*;

/// The time after a disconnect until a worker that has not exited is killed.
const GRACE: Duration = Duration::from_secs(10);

struct Options {
    addr: SocketAddr,
    workers: usize,
    policy: Option<SchedulingPolicy>,
}

fn options() -> Result<Options, lexopt::Error> {
    let mut options = Options {
        addr: (Ipv4Addr::LOCALHOST, 8000).into(),
        workers: cluster::available_parallelism(),
        policy: None,
    };
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            Long("addr") => options.addr = args.value()?.parse()?,
            Long("workers") => options.workers = args.value()?.parse()?,
            Long("policy") => options.policy = Some(args.value()?.parse()?),
            Short(_) | Long(_) | Value(_) => return Err(arg.unexpected()),
        }
    }
    Ok(options)
}

fn master(master: &Master, options: &Options) -> cluster::Result<()> {
    if let Some(policy) = options.policy {
        master.set_scheduling_policy(policy)?;
    }
    let (output, errors) = (
        LogWriter::stdout().attached_to(master),
        LogWriter::stderr().attached_to(master),
    );
    let listening = Rc::new(RefCell::new(Vec::new()));

    let log = output.clone();
    master.on_online(move |_, worker| {
        log.line(format_args!(
            "worker {} {}",
            worker.id(),
            worker.process().id()
        ));
    });
    let (seen, wanted) = (Rc::clone(&listening), options.workers);
    let hints = errors.clone();
    master.on_listening(move |_, worker, address| {
        // Each worker listens once, so it is added once.
        let mut seen = seen.borrow_mut();
        seen.push(worker.id());
        if seen.len() == wanted {
            output.line(format_args!("listening on {address}"));
            hints.line(format_args!("try: curl -i http://{address}/"));
        }
    });
    let replace = master.on_exit(move |master, worker, status| {
        if worker.exited_after_disconnect() == Some(true) {
            return;
        }
        errors.line(format_args!("worker {} exited ({status})", worker.id()));
        // Do not replace a worker that exited with a code before it listened. Its replacement would
        // probably fail too.
        let failed_at_startup =
            status.code().is_some() && !listening.borrow().contains(&worker.id());
        if failed_at_startup {
            // After the other workers have exited, `run` returns this error.
            master.give_up(format!("worker {} exited ({status})", worker.id()));
            master.disconnect();
        } else if let Err(error) = master.fork() {
            errors.line(&error);
            // Give up only if no other worker is left to serve clients.
            if master.workers().iter().all(WorkerProcess::is_dead) {
                master.give_up(error);
            }
        }
    });
    for signal in [Signal::INT, Signal::TERM] {
        master.on_signal(signal, move |master, _| {
            // A worker that fails now is not replaced: its replacement would not be disconnected.
            master.remove_callback(replace);
            master.disconnect_within(GRACE);
        })?;
    }
    for _ in 0..options.workers {
        master.fork()?;
    }
    master.run()
}

fn worker(worker: &Worker, options: &Options) -> cluster::Result<()> {
    // Ignore these signals. A terminal sends SIGINT to all processes, and a service manager may do
    // so with SIGTERM, but the master disconnects its workers itself.
    for signal in [Signal::INT, Signal::TERM] {
        worker.on_signal(signal, |_, _| {})?;
    }
    // With round robin, the default, silent clients occupy no worker: a connection waits in the
    // master for its first bytes, and again after each answer.
    let listen = ListenOptions::from(options.addr).wait_for_data(true);
    let headers = format!("X-Worker: {}\r\nContent-Type: text/plain\r\n", worker.id());
    for connection in worker.listen(listen)?.incoming() {
        // Ignore an error, because a client that disconnects must not stop the worker.
        let _ = hello::answer(connection?, &headers, "hello world\n");
    }
    Ok(())
}

fn main() -> ExitCode {
    let options = usage::or_exit(usage::header!("http_server.rs"), options());
    let outcome = cluster::init().and_then(|role| match role {
        Role::Master(role) => master(&role, &options),
        Role::Worker(role) => worker(&role, &options),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            LogWriter::stderr().line(error);
            ExitCode::FAILURE
        }
    }
}
