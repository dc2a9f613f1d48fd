//! Tests with descriptors that a hostile worker sends: too many, or some whose `close` blocks.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{IoSlice, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, RawFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{Master, Sent};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};

use super::attacker::{Attacker, MESSAGE, OWN_INDEX, frame, message};
use super::{Case, FDS_IN, FDS_PER_WORKER, ITERATION_MAX, Outcome, attack_beside_honest_worker};
use crate::harness::{Log, cluster, scaled};

crate::scenarios! {
    unannounced_descriptors_disconnect_the_worker
    descriptors_before_any_frame_disconnect_the_worker
    descriptors_that_the_application_ignores_are_closed
    descriptors_that_block_in_close_do_not_block_the_master
    excess_descriptors_that_block_in_close_do_not_block_the_master
    out_of_band_descriptors_do_not_block_the_master
    connection_that_blocks_in_close_does_not_block_the_master
}

/// Descriptors to send with one message: the most that a well-behaved peer sends with one call.
const ONE_CALL: [RawFd; 64] = [0; 64];

const UNANNOUNCED: Outcome = Outcome::Disconnected("invalid number of descriptors");

fn unannounced_descriptors_disconnect_the_worker() {
    let attack = |attacker: &Attacker| {
        attacker.start_clients();
        loop {
            attacker.send_with_fds(&message(b"x"), &ONE_CALL);
        }
    };
    let fds = FDS_PER_WORKER + FDS_IN + ONE_CALL.len();
    let case = Case::new(attack, UNANNOUNCED);
    attack_beside_honest_worker(Case { fds, ..case });
}

fn descriptors_before_any_frame_disconnect_the_worker() {
    let attack = |attacker: &Attacker| {
        attacker.start_clients();
        for byte in &message(b"")[..7] {
            attacker.send_with_fds(&[*byte], &ONE_CALL);
        }
    };
    let fds = FDS_PER_WORKER + FDS_IN + ONE_CALL.len();
    let case = Case::new(attack, UNANNOUNCED);
    attack_beside_honest_worker(Case { fds, ..case });
}

fn descriptors_that_the_application_ignores_are_closed() {
    let case = Case::flood(|attacker| {
        attacker.start_clients();
        loop {
            attacker.send_with_fds(&frame(MESSAGE, 16, b"x"), &ONE_CALL[..16]);
        }
    });
    let fds = FDS_PER_WORKER + FDS_IN;
    let outcome = Outcome::ToleratedWithLoss("no resources for the channel to worker 3: ");
    attack_beside_honest_worker(Case {
        fds,
        outcome,
        ..case
    });
}

/// Makes the last `close` of the socket block for `time`, no matter which process calls it. The
/// kernel waits for unsent data, and the peer does not read.
fn make_close_block(mut socket: &TcpStream, time: Duration) {
    let linger = nix::libc::linger {
        l_onoff: 1,
        l_linger: i32::try_from(time.as_secs()).unwrap(),
    };
    setsockopt(&socket, sockopt::Linger, &linger).unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 4096]).is_ok() {}
}

fn descriptors_that_block_in_close_do_not_block_the_master() {
    attack_beside_honest_worker(Case::tolerated(|attacker| {
        let (client, _peer) = connection_that_blocks_in_close();
        attacker.start_clients();
        let fds = [client.as_raw_fd()];
        attacker.send_with_fds(&frame(MESSAGE, 1, b"x"), &fds);
        drop(client);
        attacker.wait_to_be_killed();
    }));
}

/// Returns a connection whose last `close` blocks, and its peer, which does not read.
fn connection_that_blocks_in_close() -> (TcpStream, TcpStream) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
    make_close_block(&client, 4 * scaled(ITERATION_MAX));
    (client, server.accept().unwrap().0)
}

/// Sends more descriptors than a well-behaved peer sends with one call. If the master's buffer were
/// too small for them, the kernel would close the excess descriptors while the master reads, and
/// this `close` would block the master.
fn excess_descriptors_that_block_in_close_do_not_block_the_master() {
    let attack = |attacker: &Attacker| {
        let (client, _peer) = connection_that_blocks_in_close();
        attacker.start_clients();
        // Wait for a reply, which shows that the master has processed the start message. Otherwise
        // one read could return this message together with the descriptors, and the master ignores
        // all bytes of a read that has too many descriptors.
        attacker.listen(OWN_INDEX);
        let null = File::open("/dev/null").unwrap();
        let mut fds = [null.as_raw_fd(); 250];
        fds[249] = client.as_raw_fd();
        attacker.send_with_fds(&frame(MESSAGE, 1, b"x"), &fds);
        drop(client);
        attacker.wait_to_be_killed();
    };
    let why = Outcome::Disconnected("invalid number of descriptors");
    let case = Case::new(attack, why);
    attack_beside_honest_worker(Case { fds: 256, ..case });
}

/// Sends a descriptor with out-of-band data. Without SO_OOBINLINE, the kernel would skip the data
/// and close the descriptor while the master reads, and this `close` would block the master.
fn out_of_band_descriptors_do_not_block_the_master() {
    let attack = |attacker: &Attacker| {
        let (client, _peer) = connection_that_blocks_in_close();
        attacker.start_clients();
        let fds = [client.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_OOB;
        let byte = [IoSlice::new(b"o")];
        let sent = sendmsg::<()>(attacker.channel.as_raw_fd(), &byte, &rights, flags, None);
        if sent.is_err() {
            // Send a normal byte instead, because this system does not support out-of-band data on
            // Unix sockets.
            attacker.send(b"o");
        }
        drop(client);
        attacker.send(&message(b"x"));
        attacker.wait_to_be_killed();
    };
    let why = Outcome::Disconnected("frame of version 0, this program supports version 3");
    attack_beside_honest_worker(Case::new(attack, why));
}

/// Tests a connection whose last `close` blocks. The worker closes its copy first.
///
/// The master closes its own copy once the worker has reported that it has received the connection.
/// This `close` is the last one, and must not block the master.
fn connection_that_blocks_in_close_does_not_block_the_master() {
    let linger = scaled(Duration::from_secs(10));
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let last = Cell::new(Instant::now());
            let longest = Rc::new(Cell::new(Duration::ZERO));
            let most = Rc::clone(&longest);
            let heartbeat = move |_: &Master| {
                let since = last.replace(Instant::now()).elapsed();
                most.set(most.get().max(since));
            };
            master.unreference(master.set_interval(Duration::from_millis(10), heartbeat));
            let worker = master.fork().unwrap();
            worker.on_listening(|_, worker, address| {
                let address: SocketAddr = address.to_string().parse().unwrap();
                let client = RefCell::new(Some(TcpStream::connect(address).unwrap()));
                worker.on_message(move |_, worker, _| {
                    client.take();
                    worker.disconnect();
                });
            });
            worker.on_exit(move |_, _, status| {
                log.add(status.to_string());
                println!("{:?}", longest.get());
                assert!(longest.get() < linger / 2, "blocked {:?}", longest.get());
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let connection = listener.accept().unwrap().unwrap();
            make_close_block(&connection, linger);
            drop(connection);
            worker.set_timeout(Duration::ZERO, |worker| {
                assert_eq!(worker.send(b"waiting").unwrap(), Sent::Continue)
            });
            assert!(listener.accept().unwrap().is_none());
        },
    );
    assert_eq!(entries.take(), ["exit status: 0"]);
}
