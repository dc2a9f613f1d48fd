//! Tests the messages between the masters: valid ones, invalid ones, and too many.

use std::cell::Cell;
use std::fs::File;
use std::io::BufReader;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use cluster::{Ledger, SchedulingPolicy};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{Client, MS, VERSION, answer, count_errors, message, send};
use crate::harness::{cluster, in_background};
use crate::parked::when_ledger;

crate::scenarios! {
    passed_connection_keeps_its_number_of_requests_rr
    passed_connection_keeps_its_number_of_requests_none
    invalid_messages_of_a_predecessor_are_discarded
    connections_beyond_the_descriptor_limit_are_closed_and_counted
}

pub fn connect_pair(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

fn passed_connection_keeps_its_number_of_requests_rr() {
    passed_connection_keeps_its_number_of_requests(SchedulingPolicy::RoundRobin);
}

fn passed_connection_keeps_its_number_of_requests_none() {
    passed_connection_keeps_its_number_of_requests(SchedulingPolicy::Shared);
}

/// The passed connection's client sends its request before the first worker listens.
fn passed_connection_keeps_its_number_of_requests(policy: SchedulingPolicy) {
    cluster(
        move |master| {
            master.set_scheduling_policy(policy).unwrap();
            let socket = TcpListener::bind("127.0.0.1:0").unwrap();
            let (first, server_end) = connect_pair(&socket);
            let copy = socket.try_clone().unwrap();
            let address = copy.local_addr().unwrap().to_string();
            let listener = master.listen(socket).unwrap();
            let (ours, theirs) = UnixStream::pair().unwrap();
            let has_ended = Rc::new(Cell::new(false));
            let ended = Rc::clone(&has_ended);
            master
                .receive_parked(ours, move |_| ended.set(true))
                .unwrap();
            // Send the bytes one by one, as a stream may deliver them.
            let bytes = message(VERSION, 1, &copy, &[6]);
            send(&theirs, &bytes[..1], &[server_end.as_raw_fd()]);
            bytes[1..]
                .iter()
                .for_each(|byte| send(&theirs, &[*byte], &[]));
            drop((server_end, copy));
            let mut client = Client(BufReader::new(first));
            client.send("ask");
            let ask = move || (client.receive().1, client.ask().1);
            in_background(master, ask, move |master, requests| {
                assert_eq!(requests, (7, 8));
                let resumed = match policy {
                    SchedulingPolicy::RoundRobin => 2,
                    _ => 0,
                };
                assert_eq!(master.ledger().resumed, resumed);
                assert!(!has_ended.get());
                drop((theirs, listener));
                master.disconnect();
            });
            let parked = |ledger: &Ledger| ledger.parked == 1;
            when_ledger(master, parked, move |master| {
                drop(master.fork_with([("LISTEN", address)]).unwrap());
            });
        },
        |worker| {
            let address = std::env::var("LISTEN").unwrap();
            for connection in worker.listen(address.as_str()).unwrap().incoming() {
                answer(connection.unwrap());
            }
        },
    );
}

fn invalid_messages_of_a_predecessor_are_discarded() {
    cluster(
        |master| {
            let listener = master.listen("127.0.0.1:0").unwrap();
            let other = TcpListener::bind("127.0.0.1:0").unwrap();
            let (_client, connection) = connect_pair(&other);
            let file = File::open("/dev/null").unwrap();
            let [connection, file, listening] =
                [connection.as_raw_fd(), file.as_raw_fd(), other.as_raw_fd()];
            let socket = listener.as_fd();
            let unknown = message(VERSION - 1, 1, &socket, &[1]);
            let none = message(VERSION, 0, &socket, &[]);
            let many = message(VERSION, 65, &socket, &[1; 65]);
            let foreign = message(VERSION, 1, &other, &[1]);
            let one = message(VERSION, 1, &socket, &[1]);
            let three = message(VERSION, 3, &socket, &[1; 3]);
            // Each case has a message, its descriptors, the number of connections that are counted,
            // and the number of errors.
            let cases: [(&[u8], Vec<RawFd>, u64, u32); 10] = [
                (&unknown, vec![connection; 3], 3, 1),
                (&none, vec![connection], 1, 1),
                (&many, vec![connection; 65], 65, 1),
                (&foreign, vec![connection], 1, 0),
                (&one, vec![file], 1, 0),
                (&one, vec![listening], 1, 0),
                (&one, vec![connection; 100], 100, 1),
                (&one[..9], vec![connection; 2], 2, 0),
                (&three, vec![file; 2], 3, 0),
                (&[], vec![], 0, 0),
            ];
            let errors = count_errors(master);
            let left = Rc::new(Cell::new(cases.len()));
            let (mut counted, mut reported) = (0, 0);
            for (bytes, fds, count, error) in cases {
                let (ours, theirs) = UnixStream::pair().unwrap();
                let left = Rc::clone(&left);
                master
                    .receive_parked(ours, move |_| left.set(left.get() - 1))
                    .unwrap();
                if !bytes.is_empty() {
                    send(&theirs, bytes, &fds);
                    send(&theirs, &[9; 300], &fds[..1]);
                }
                // The second message has one descriptor and an unknown version, so its connection
                // is lost too. A stream reports at most one invalid message.
                counted += count + u64::from(!bytes.is_empty());
                reported += error.max(u32::from(!bytes.is_empty()));
            }
            drop(other);
            let own = Rc::new(Cell::new(None));
            let id = Rc::clone(&own);
            let mut listener = Some(listener);
            own.set(Some(master.set_interval(MS, move |master| {
                if left.get() == 0 {
                    master.clear_timer(id.get().unwrap());
                    let ledger = master.ledger();
                    assert_eq!((ledger.parked, ledger.idle_closed), (counted, counted));
                    assert_eq!(errors.get(), reported);
                    drop(listener.take());
                }
            })));
        },
        |_| unreachable!("no worker"),
    );
}

fn connections_beyond_the_descriptor_limit_are_closed_and_counted() {
    cluster(
        |master| {
            let listener = master.listen("127.0.0.1:0").unwrap();
            let address: SocketAddr = listener.address().to_string().parse().unwrap();
            let client = TcpStream::connect(address).unwrap();
            let (ours, theirs) = UnixStream::pair().unwrap();
            let has_ended = Rc::new(Cell::new(false));
            let ended = Rc::clone(&has_ended);
            master
                .receive_parked(ours, move |_| ended.set(true))
                .unwrap();
            let bytes = message(VERSION, 64, &listener.as_fd(), &[1; 64]);
            send(&theirs, &bytes, &[client.as_raw_fd(); 64]);
            drop(theirs);
            let errors = count_errors(master);
            let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            let free = File::open("/dev/null").unwrap().as_raw_fd();
            setrlimit(
                Resource::RLIMIT_NOFILE,
                free.unsigned_abs() as u64 + 10,
                hard,
            )
            .unwrap();
            let own = Rc::new(Cell::new(None));
            let id = Rc::clone(&own);
            let mut kept = Some((listener, client));
            own.set(Some(master.set_interval(MS, move |master| {
                if has_ended.get() {
                    master.clear_timer(id.get().unwrap());
                    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
                    let ledger = master.ledger();
                    assert_eq!(ledger.parked, 64);
                    // The kernel has found at most 10 free descriptors.
                    assert!((54..64).contains(&ledger.idle_closed), "{ledger:?}");
                    assert_eq!(ledger.in_flight(), 64 - ledger.idle_closed);
                    assert_eq!(errors.get(), 1);
                    drop(kept.take());
                }
            })));
        },
        |_| unreachable!("no worker"),
    );
}
