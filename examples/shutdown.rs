//! Disconnects a worker whose connection never ends, and kills the worker after a timeout. With the
//! argument `polite`, the worker closes its connections when the master sends `shutdown`.
//!
//! Usage:     cargo run --example shutdown
//! or:        cargo run --example shutdown -- polite

mod usage;

use std::cell::RefCell;
use std::net::TcpStream;
use std::rc::Rc;
use std::time::Duration;

use cluster::{Interest, LogWriter, Master, Role, Signal, Worker};

const TIMEOUT: Duration = Duration::from_secs(2);

fn master(master: &Master) -> cluster::Result<()> {
    let log = LogWriter::stdout().attached_to(master);
    let worker = master.fork()?;
    let at_timeout = log.clone();
    worker.on_message(move |master, worker, _| {
        // The worker sends this message when it has a client.
        let _ = worker.send(b"shutdown");
        let straggler = worker.disconnect().clone();
        let log = at_timeout.clone();
        let timeout = master.set_timeout(TIMEOUT, move |_| {
            log.line("its time is over");
            // Do not use `straggler.kill`. It sends the signal only once the channel has closed,
            // and this worker may never close its channel.
            straggler.process().kill(Signal::KILL);
        });
        worker.on_disconnect(move |master, _| master.clear_timer(timeout));
    });
    worker.on_exit(move |_, _, status| {
        log.line(format_args!("the worker has ended: {status}"));
    });
    // Once the worker listens, connect a client that stays connected until the worker closes the
    // connection.
    worker.on_listening(|master, _, address| {
        if let Ok(client) = TcpStream::connect(address.to_string()) {
            let _ = master.watch(client, Interest::Readable, |_, _| None);
        }
    });
    master.run()
}

fn worker(worker: &Worker, polite: bool) -> cluster::Result<()> {
    let connections = Rc::new(RefCell::new(Vec::new()));
    let open = Rc::clone(&connections);
    worker
        .listen("127.0.0.1:0")?
        .set_connection_callback(move |worker, connection| {
            // Keep the connection open. Only a polite worker closes it, when the master sends
            // `shutdown`.
            open.borrow_mut().push(connection);
            let _ = worker.send(b"connected");
        });
    worker.on_message(move |_, message| {
        if message.bytes() == b"shutdown" && polite {
            // Close all connections.
            connections.borrow_mut().clear();
        }
    });
    worker.run()
}

fn main() -> cluster::Result<()> {
    let [manner] = usage::arguments(usage::header!("shutdown.rs"), ["rude"]);
    match cluster::init()? {
        Role::Master(role) => master(&role),
        Role::Worker(role) => worker(&role, manner == "polite"),
    }
}
