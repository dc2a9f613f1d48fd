//! Tests of workers that block in `accept` or `recv_from` while the system refuses these calls.
//!
//! The worker must report the error and must not spin. It must serve clients once the calls succeed
//! again, and must be able to disconnect before that.

use std::cell::Cell;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use cluster::{Error, Master, SchedulingPolicy, Worker};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

use crate::exhaustion::{connect_some, leave_free, read_all};
use crate::harness::{Log, cluster, in_background, note_messages, talk, when_listening};
use crate::refused::refuse_calls;

crate::scenarios! {
    worker_without_descriptors_accepts_after_the_shortage_rr
    worker_without_descriptors_accepts_after_the_shortage_none
    worker_without_descriptors_accepts_after_the_shortage_sharded
    worker_without_descriptors_disconnects_rr
    worker_without_descriptors_disconnects_none
    worker_without_descriptors_disconnects_sharded
    refused_accepts_are_reported_and_repeated
    refused_receives_are_reported_and_repeated
    errors_of_earlier_datagrams_do_not_end_recv_from
    errors_of_earlier_datagrams_do_not_keep_a_worker_busy
}

/// Serves one client before the shortage. With the policies `none` and `sharded`, the first call of
/// `accept` opens the descriptors that the worker needs in order to block. If this call came during
/// the shortage, it would fail to open them and would not block.
fn serve_first(listener: &cluster::Listener) {
    let mut first = listener.accept().unwrap().unwrap();
    first.write_all(b"served").unwrap();
}

/// Lets a worker run out of descriptors while clients wait, and asserts that the worker serves them
/// after the shortage.
///
/// The worker notifies the master of its errors, and a message from the master ends the shortage.
/// The worker must therefore process messages during the shortage.
fn accept_after_a_shortage(policy: SchedulingPolicy) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            when_listening(master, 1, move |master, address| {
                let clients = connect_some(address);
                read_all(master, clients, move |master, answers| {
                    log.add(format!("{answers:?}"));
                    master.disconnect();
                });
            });
            master.on_message(|_, worker, message| {
                assert_eq!(message.bytes(), b"out of descriptors");
                let _ = worker.send(b"continue").unwrap();
            });
            let worker = master.fork().unwrap();
            worker.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            serve_first(&listener);
            let restore = leave_free(0);
            let errors = Cell::new(0);
            worker.on_error(move |worker, error| {
                assert_eq!(error.raw_os_error(), Some(libc::EMFILE), "{error}");
                errors.set(errors.get() + 1);
                // With round robin, the worker reports a shortage once. With other policies, wait
                // for a second error, which shows that the worker has repeated the call.
                if errors.get() == 1 + u32::from(policy != SchedulingPolicy::RoundRobin) {
                    let _ = worker.send(b"out of descriptors").unwrap();
                }
            });
            worker.on_message(move |_, _| restore());
            for connection in listener.incoming() {
                connection.unwrap().write_all(b"served").unwrap();
            }
        },
    );
    assert_eq!(entries.take(), [format!("{:?}", ["served"; 10])]);
}

fn worker_without_descriptors_accepts_after_the_shortage_rr() {
    accept_after_a_shortage(SchedulingPolicy::RoundRobin);
}

fn worker_without_descriptors_accepts_after_the_shortage_none() {
    accept_after_a_shortage(SchedulingPolicy::Shared);
}

fn worker_without_descriptors_accepts_after_the_shortage_sharded() {
    accept_after_a_shortage(SchedulingPolicy::Sharded);
}

/// Disconnects a worker that has no free descriptor. No client waits, so the worker must end at
/// once. With round robin, the worker may report the shortage, because it checks for a free
/// descriptor before it reads its queue. With the other policies, the worker must report no error.
fn disconnect_without_descriptors(policy: SchedulingPolicy) {
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            when_listening(master, 1, |master, address| {
                let talk = move || talk(address, b"").unwrap();
                in_background(master, talk, |_, answer| assert_eq!(answer, "served"));
            });
            master.on_message(|master, _, _| master.disconnect());
            let worker = master.fork().unwrap();
            worker.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            serve_first(&listener);
            let _ = leave_free(0);
            if policy != SchedulingPolicy::RoundRobin {
                worker.on_error(|_, error| panic!("{error}"));
            }
            let _ = worker.send(b"out of descriptors").unwrap();
            assert!(listener.accept().unwrap().is_none());
        },
    );
}

fn worker_without_descriptors_disconnects_rr() {
    disconnect_without_descriptors(SchedulingPolicy::RoundRobin);
}

fn worker_without_descriptors_disconnects_none() {
    disconnect_without_descriptors(SchedulingPolicy::Shared);
}

fn worker_without_descriptors_disconnects_sharded() {
    disconnect_without_descriptors(SchedulingPolicy::Sharded);
}

/// Errors of accept(2) that the worker must report, besides EMFILE: shortages of system resources,
/// and a firewall rule (EPERM).
const ACCEPT_ERRORS: [i32; 4] = [libc::ENFILE, libc::ENOMEM, libc::ENOBUFS, libc::EPERM];

/// Number of errors after which a worker closes its socket.
const ERRORS: u32 = 3;

/// Calls `close` at the last of `ERRORS` errors, after asserting that the worker has paused between
/// the errors. Each error must be `errno`.
fn close_after_errors(worker: &Worker, errno: i32, close: impl Fn() + 'static) {
    let errors = Cell::new(0);
    // Begin before the first error, because the worker may get no core between the error and the
    // callback.
    let begun = Instant::now();
    worker.on_error(move |_, error| {
        assert!(matches!(error, Error::Io { .. }), "{error}");
        assert_eq!(error.raw_os_error(), Some(errno), "{error}");
        errors.set(errors.get() + 1);
        if errors.get() == ERRORS {
            // The worker pauses for 100 ms after each error.
            let pauses = (ERRORS - 1) * Duration::from_millis(100);
            assert!(begun.elapsed() >= pauses, "spins");
            close();
        }
    });
}

/// Asserts that each worker exits with success.
fn assert_success(master: &Master) {
    master.on_exit(|_, _, status| assert!(status.success(), "{status}"));
}

fn refused_accepts_are_reported_and_repeated() {
    cluster(
        |master| {
            master
                .set_scheduling_policy(SchedulingPolicy::Shared)
                .unwrap();
            assert_success(master);
            let listening = Cell::new(0);
            // Keep the connection open. It stays in the backlog, because no worker can accept it.
            let client = Cell::new(None);
            master.on_listening(move |_, _, address| {
                listening.set(listening.get() + 1);
                if listening.get() == ACCEPT_ERRORS.len() {
                    let address: SocketAddr = address.to_string().parse().unwrap();
                    client.set(Some(TcpStream::connect(address).unwrap()));
                }
            });
            for _ in ACCEPT_ERRORS {
                master.fork().unwrap();
            }
        },
        |worker| {
            let at = usize::try_from(worker.id().get()).unwrap() - 1;
            let errno = ACCEPT_ERRORS[at];
            let listener = std::rc::Rc::new(worker.listen("127.0.0.1:0").unwrap());
            refuse_calls(&[libc::SYS_accept4], errno);
            let closed = std::rc::Rc::clone(&listener);
            close_after_errors(&worker, errno, move || closed.close());
            assert!(listener.accept().unwrap().is_none());
        },
    );
}

fn refused_receives_are_reported_and_repeated() {
    cluster(
        |master| {
            assert_success(master);
            master.fork().unwrap();
        },
        |worker| {
            let socket = std::rc::Rc::new(worker.bind("127.0.0.1:0").unwrap());
            refuse_calls(&[libc::SYS_recvfrom], libc::ENOMEM);
            let closed = std::rc::Rc::clone(&socket);
            close_after_errors(&worker, libc::ENOMEM, move || closed.close());
            socket
                .send_to(b"to itself", socket.local_addr().unwrap())
                .unwrap();
            assert_eq!(socket.recv_from(&mut [0; 10]).unwrap(), None);
        },
    );
}

/// Sends a datagram to a port on which no process receives. Because of IP_RECVERR, the next call on
/// the socket then fails with ECONNREFUSED, the ICMP error of that datagram. `recv_from` must not
/// return this error.
fn errors_of_earlier_datagrams_do_not_end_recv_from() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_messages(master, &log);
            assert_success(master);
            master.fork().unwrap();
        },
        |worker| {
            let socket = worker.bind("127.0.0.1:0").unwrap();
            setsockopt(&socket.try_clone().unwrap(), sockopt::Ipv4RecvErr, &true).unwrap();
            let unused = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let nowhere = unused.local_addr().unwrap();
            drop(unused);
            socket.send_to(b"lost", nowhere).unwrap();
            let own = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            own.send_to(b"served", socket.local_addr().unwrap())
                .unwrap();
            let mut buffer = [0; 10];
            let (length, _) = socket.recv_from(&mut buffer).unwrap().unwrap();
            let _ = worker.send(&buffer[..length]).unwrap();
        },
    );
    assert_eq!(entries.take(), ["1 served"]);
}

/// Checks that the poller does not report a UDP socket again and again if only its error queue
/// contains a message.
fn errors_of_earlier_datagrams_do_not_keep_a_worker_busy() {
    cluster(
        |master| {
            assert_success(master);
            master.fork().unwrap();
        },
        |worker| {
            let socket = worker.bind("127.0.0.1:0").unwrap();
            setsockopt(&socket.try_clone().unwrap(), sockopt::Ipv4RecvErr, &true).unwrap();
            socket.set_message_callback(|_, _, _, _| panic!("no datagram has been sent"));
            let unused = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let nowhere = unused.local_addr().unwrap();
            drop(unused);
            worker.dispatch(Some(Duration::ZERO)).unwrap();
            let is_ready = |timeout| {
                let mut fds = [PollFd::new(worker.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, timeout).unwrap() == 1
            };
            assert!(!is_ready(PollTimeout::ZERO), "there is no error yet");
            socket.send_to(b"lost", nowhere).unwrap();
            assert!(is_ready(PollTimeout::NONE));
            // The kernel reports the error twice: as the socket's error, and in the queue.
            for _ in 0..3 {
                worker.dispatch(Some(Duration::ZERO)).unwrap();
            }
            assert!(!is_ready(PollTimeout::ZERO), "the error queue is not empty");
        },
    );
}
