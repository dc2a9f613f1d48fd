//! Tests workers that receive connections in a callback: how many they hold, and that none is lost.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::rc::Rc;

use cluster::{Connection, Interest, Signal, Worker};

use super::{hold, read_all, when_accepted};
use crate::harness::{
    Log, answer_pings, cluster, in_background, stop, when_all_wait, when_listening,
};

crate::scenarios! {
    callback_workers_hold_many_connections
    clients_cannot_exhaust_a_workers_descriptors
    callback_inside_accept_cannot_lose_the_connection
}

fn callback_workers_hold_many_connections() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                let work = move || {
                    let connect = |_| TcpStream::connect(address).unwrap();
                    let mut clients: Vec<_> = (0..100).map(connect).collect();
                    let mut echoed = 0;
                    for round in 0..3u8 {
                        for client in &mut clients {
                            client.write_all(&[round]).unwrap();
                        }
                        for client in &mut clients {
                            let mut byte = [9];
                            client.read_exact(&mut byte).unwrap();
                            echoed += usize::from(byte == [round]);
                        }
                    }
                    echoed
                };
                in_background(master, work, move |master, echoed| {
                    log.add(echoed.to_string());
                    master.disconnect();
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(|worker, connection| {
                let echo = |_: &Worker, mut connection: &Connection| {
                    let mut byte = [0];
                    match connection.read(&mut byte) {
                        Ok(1) => connection.write_all(&byte).ok()?,
                        _ => return None,
                    }
                    Some(Interest::Readable)
                };
                worker.watch(connection, Interest::Readable, echo).unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["300"]);
}

/// Checks that a connection is served although a signal arrives together with it, and the signal's
/// callback closes the listener.
fn callback_inside_accept_cannot_lose_the_connection() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 1, move |master, address| {
                when_all_wait(master, move |master| {
                    let worker = master.workers().remove(0);
                    stop(&worker);
                    let connect = move || TcpStream::connect(address).unwrap();
                    in_background(master, connect, move |master, client| {
                        when_accepted(master, 1, move |_| {
                            worker.process().kill(Signal::USR1);
                            worker.process().kill(Signal::CONT);
                        });
                        let read = move || read_all(vec![client]).remove(0);
                        in_background(master, read, move |_, answer| log.add(answer));
                    });
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            answer_pings(&worker);
            let listener = Rc::new(worker.listen("127.0.0.1:0").unwrap());
            let own = Rc::downgrade(&listener);
            let close = move |_: &Worker, _| own.upgrade().unwrap().close();
            worker.on_signal(Signal::USR1, close).unwrap();
            for connection in listener.incoming() {
                connection.unwrap().write_all(b"served").unwrap();
            }
            worker.disconnect().run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["served"]);
}

fn clients_cannot_exhaust_a_workers_descriptors() {
    const CLIENTS: usize = 120;
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.on_error(|_, _, error| panic!("{error}"));
            when_listening(master, 1, move |master, address| {
                let work = move || {
                    let connect = |_| TcpStream::connect(address).unwrap();
                    let clients: Vec<_> = (0..CLIENTS).map(connect).collect();
                    let mut answered = 0;
                    // Read and drop one client after another, because each disconnect frees
                    // capacity for the next client.
                    for mut client in clients {
                        client.read_exact(&mut [0]).unwrap();
                        answered += 1;
                    }
                    answered
                };
                in_background(master, work, move |master, answered| {
                    log.add(answered.to_string());
                    assert_eq!(master.ledger().accepted, 120);
                    master.disconnect();
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            use nix::sys::resource::{Resource, getrlimit, setrlimit};
            let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(|worker, mut connection| {
                connection.write_all(b"x").unwrap();
                hold(worker, connection);
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), [CLIENTS.to_string()]);
}
