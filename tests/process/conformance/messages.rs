//! Tests messages with and without descriptors.

use std::cell::{Cell, RefCell};
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use cluster::{Interest, Message, Signal, Worker};

use crate::harness::{Log, cluster, note_events};

crate::scenarios! {
    net_send
    send_deadlock
    send_handle_large_payload
}

/// Takes the only descriptor of a message, and returns it as a socket.
fn socket(message: &Message) -> TcpStream {
    let [fd]: [OwnedFd; 1] = message.take_fds().try_into().unwrap();
    fd.into()
}

fn net_send() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            worker.on_message(move |master, worker, message| {
                log.add(String::from_utf8_lossy(message.bytes()));
                let _ = worker.send(b"got").unwrap();
                let (log, worker) = (log.clone(), worker.clone());
                let mut data = String::new();
                let read = move |_: &cluster::Master, mut socket: &TcpStream| {
                    let mut piece = [0; 64];
                    let length = socket.read(&mut piece).unwrap();
                    data.push_str(std::str::from_utf8(&piece[..length]).unwrap());
                    if length > 0 {
                        return Some(Interest::Readable);
                    }
                    log.add(format!("{data}, end"));
                    worker.process().kill(Signal::TERM);
                    None
                };
                let socket = socket(message);
                master.watch(socket, Interest::Readable, read).unwrap();
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let connection = listener.accept().unwrap().unwrap();
            let connection = RefCell::new(Some(connection));
            worker.on_message(move |_, message| {
                assert_eq!(message.bytes(), b"got");
                let mut connection = connection.take().unwrap();
                connection.write_all(b"hello").unwrap();
            });
            let _ = worker
                .send_with_fds(b"handle", vec![client.into()])
                .unwrap();
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "handle",
        "hello, end",
        "1 disconnect Some(false)",
        "1 exit Some(false) signal: 15 (SIGTERM)",
    ];
    assert_eq!(entries.take(), expected);
}

fn send_deadlock() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = server.local_addr().unwrap().port();
            let _ = worker.send(port.to_string().as_bytes()).unwrap();
            let receiver = worker.clone();
            let mut accepted = 0;
            let pass_on = move |_: &cluster::Master, server: &TcpListener| {
                let (socket, _) = server.accept().unwrap();
                let _ = receiver
                    .send_with_fds(b"handle", vec![socket.into()])
                    .unwrap();
                accepted += 1;
                (accepted < 2).then_some(Interest::Readable)
            };
            master.watch(server, Interest::Readable, pass_on).unwrap();
            // Take only the first socket that the worker returns. The second socket must be closed
            // although no callback takes it.
            let mut first = true;
            worker.on_message(move |_, _, message| {
                log.add(String::from_utf8_lossy(message.bytes()));
                if std::mem::take(&mut first) {
                    drop(socket(message));
                }
            });
        },
        |worker| {
            let handles = Rc::new(Cell::new(0));
            let received = Rc::clone(&handles);
            worker.on_message(move |worker, message| {
                if message.bytes() == b"handle" {
                    received.set(received.get() + 1);
                    let socket = socket(message).into();
                    let _ = worker.send_with_fds(b"reply", vec![socket]).unwrap();
                    return;
                }
                let port = std::str::from_utf8(message.bytes()).unwrap();
                connect_and_end_both(worker, port.parse().unwrap());
            });
            worker.run().unwrap();
            assert_eq!(handles.get(), 2);
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "reply",
        "reply",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

/// Connects two clients and shuts down their writing side. The worker disconnects when the server
/// has closed both connections.
fn connect_and_end_both(worker: &Worker, port: u16) {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let clients = [(); 2].map(|()| TcpStream::connect(address).unwrap());
    let open = Rc::new(Cell::new(clients.len()));
    for client in clients {
        client.shutdown(Shutdown::Write).unwrap();
        let open = Rc::clone(&open);
        let closed = move |worker: &Worker, mut client: &TcpStream| {
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            open.set(open.get() - 1);
            if open.get() == 0 {
                worker.disconnect();
            }
            None
        };
        worker.watch(client, Interest::Readable, closed).unwrap();
    }
}

fn send_handle_large_payload() {
    const LENGTH: u32 = 800_004;
    // The text repeats every 251 bytes. No usual buffer size is a multiple of 251, so the
    // comparison detects a lost or repeated buffer.
    let text = || (0..LENGTH).flat_map(|n| (n % 251).to_le_bytes().into_iter().take(1));
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
            let (mut accepted, _) = server.accept().unwrap();
            let text: Vec<_> = text().collect();
            let _ = worker.send_with_fds(&text, vec![client.into()]).unwrap();
            worker.on_message(move |_, _, message| {
                assert!(message.bytes() == text, "the same text");
                // Write to the descriptor to check that it still is the same connection.
                let mut client = socket(message);
                client.write_all(b"x").unwrap();
                drop(client);
                let mut text = String::new();
                accepted.read_to_string(&mut text).unwrap();
                log.add(format!("{} {text}", message.bytes().len()));
            });
        },
        |worker| {
            let count = Rc::new(Cell::new(0));
            let received = Rc::clone(&count);
            worker.on_message(move |worker, message| {
                received.set(received.get() + 1);
                assert!(message.bytes().iter().copied().eq(text()), "the text");
                let socket = socket(message).into();
                let _ = worker.send_with_fds(message.bytes(), vec![socket]).unwrap();
                // After this call, only unwritten messages keep the worker's loop running.
                worker.process().unreference();
            });
            worker.run().unwrap();
            assert_eq!(count.get(), 1);
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "800004 x",
        "1 disconnect Some(false)",
        "1 exit Some(false) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}
