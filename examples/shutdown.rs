//! A worker with a connection that never ends is asked to shut down, and killed when its time is
//! over. With the argument `polite` it closes its connections when it is asked.
//!
//! Type:      cargo run --example shutdown
//!            cargo run --example shutdown -- polite
#![allow(clippy::print_stdout)]

use std::cell::RefCell;
use std::net::TcpStream;
use std::rc::Rc;
use std::time::Duration;

use cluster::{Interest, Master, Role, Signal, Worker};

const PATIENCE: Duration = Duration::from_millis(500);

fn master(master: &Master) -> cluster::Result<()> {
    let worker = master.fork()?;
    worker.on_message(|master, worker, _| {
        // It has a client now.
        let _ = worker.send(b"shutdown");
        let straggler = worker.disconnect().clone();
        let timeout = master.set_timeout(PATIENCE, move |_| {
            println!("its time is over");
            // Not `straggler.kill`, which would go on waiting for it to disconnect.
            straggler.process().kill(Signal::KILL);
        });
        worker.on_disconnect(move |master, _| master.clear_timer(timeout));
    });
    worker.on_exit(|_, _, status| println!("the worker has ended: {status}"));
    // A client who stays as long as the worker lets him.
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
        .on_connection(move |worker, connection| {
            // Connections never end.
            open.borrow_mut().push(connection);
            let _ = worker.send(b"connected");
        });
    worker.on_message(move |_, message| {
        if message.bytes() == b"shutdown" && polite {
            // Initiate graceful close of any connections to the server.
            connections.borrow_mut().clear();
        }
    });
    worker.run()
}

fn main() -> cluster::Result<()> {
    let polite = std::env::args().nth(1).as_deref() == Some("polite");
    match cluster::init()? {
        Role::Master(role) => master(&role),
        Role::Worker(role) => worker(&role, polite),
    }
}
