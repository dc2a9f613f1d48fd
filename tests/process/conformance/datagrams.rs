//! Tests UDP sockets that all workers share.

use std::cell::{Cell, RefCell};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use cluster::{
    Address, BindOptions, Error, Interest, Master, SchedulingPolicy, Signal, UdpSocket, Worker,
};
use nix::errno::Errno;

use crate::harness::{
    Log, StoppedMaster, answer_pings, assert_each, cluster, note_events, note_messages, open_fds,
    stop,
};

crate::scenarios! {
    child_index_dgram
    dgram_1
    dgram_2
    dgram_ipv6only
    dgram_reuse
    dgram_reuseport
    disconnect_unshared_udp
    dgram_bind_socket_close_before_cluster_reply
    dgram_cluster_bind_error
    dgram_cluster_close_in_listening
    dgram_unref_in_cluster
    datagrams_to_a_borrowed_socket_are_distributed
    socket_that_arrives_just_before_a_disconnect_is_closed
}

/// Returns the events of a worker that binds `sockets` sockets and then disconnects by itself.
fn bind_and_disconnect_events(sockets: usize) -> Vec<&'static str> {
    let mut events = vec!["1 fork", "1 online"];
    events.extend(std::iter::repeat_n("1 listening", sockets));
    events.extend([
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ]);
    events
}

/// Runs `worker` in one worker process and returns all events.
fn events_of_one_worker(worker: impl FnOnce(&Worker)) -> Vec<String> {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            master.fork().unwrap();
        },
        |role| {
            role.on_error(|_, error| panic!("{error}"));
            worker(&role);
        },
    );
    entries.take()
}

/// Closes a socket and asserts that it is closed.
fn close(socket: &UdpSocket) {
    socket.close();
    assert_closed(socket);
}

fn assert_closed(socket: &UdpSocket) {
    assert!(socket.recv_from(&mut [0]).unwrap().is_none());
    assert_unbound(socket);
}

/// Asserts that a socket is closed. Unlike `assert_closed`, this function can be called in
/// callbacks, where `recv_from` fails.
fn assert_unbound(socket: &UdpSocket) {
    let error = socket.send_to(b"x", ("127.0.0.1", 9)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotConnected);
    assert!(socket.try_clone().is_err());
}

fn child_index_dgram() {
    let events = events_of_one_worker(|worker| {
        let first = [(); 2].map(|()| worker.bind(0).unwrap());
        let ports = [0, 1].map(|n: usize| first[n].local_addr().unwrap().port());
        assert_ne!(ports[0], ports[1], "two sockets");
        let closed = Rc::new(Cell::new(0));
        for socket in first {
            let closed = Rc::clone(&closed);
            // Provoke the reuse of an index, the number that distinguishes a worker's sockets on
            // port 0. Closing the first socket frees its index while the second socket is open.
            // When the second socket closes, the replacement of the first is already open.
            worker.set_timeout(Duration::ZERO, move |worker| {
                socket.close();
                assert_unbound(&socket);
                let again = worker.bind(0).unwrap();
                worker.set_timeout(Duration::ZERO, move |worker| {
                    again.close();
                    assert_unbound(&again);
                    closed.set(closed.get() + 1);
                    if closed.get() == 2 {
                        worker.disconnect();
                    }
                });
            });
        }
        worker.run().unwrap();
        assert_eq!(closed.get(), 2);
    });
    assert_eq!(events, bind_and_disconnect_events(4));
}

const WORKERS: u32 = 4;
const EACH: usize = 10;

/// Forks four workers and sends 40 datagrams when all workers have bound their sockets. The master
/// disconnects each worker that reports its share as received.
fn distribute_datagrams(
    master: &Master,
    log: &Log,
    addresses: Rc<RefCell<Vec<Address>>>,
    env: &str,
) {
    note_events(master, log);
    note_messages(master, log);
    master.on_listening(move |_, _, address| {
        let mut addresses = addresses.borrow_mut();
        addresses.push(address.clone());
        if addresses.len() == WORKERS as usize {
            let mut to = address.socket_addr().unwrap();
            if to.ip().is_unspecified() {
                to.set_ip([127, 0, 0, 1].into());
            }
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            for _ in 0..WORKERS as usize * EACH {
                let sent = socket.send_to(b"hello", to);
                assert_eq!(sent.unwrap(), 5);
            }
        }
    });
    master.on_message(|_, worker, _| drop(worker.disconnect().clone()));
    (0..WORKERS).for_each(|_| drop(master.fork_with([("SOCKET", env)]).unwrap()));
}

fn assert_distributed(entries: &[String], addresses: &[Address]) {
    let expected = [
        "fork",
        "online",
        "listening",
        "received 10",
        "disconnect Some(true)",
        "exit Some(true) exit status: 0",
    ];
    assert_each(WORKERS, entries, &expected);
    assert_eq!(addresses.len(), WORKERS as usize);
    assert!(addresses.iter().all(|address| *address == addresses[0]));
    assert!(addresses[0].socket_addr().unwrap().is_ipv4());
}

fn dgram_1() {
    let log = Log::default();
    let entries = log.clone();
    let addresses = Rc::default();
    let seen = Rc::clone(&addresses);
    cluster(
        |master| distribute_datagrams(master, &log, addresses, ""),
        |worker| {
            let socket = Rc::new(worker.bind(0).unwrap());
            let own = Rc::clone(&socket);
            let received = Rc::new(Cell::new(0));
            let count = Rc::clone(&received);
            socket.set_message_callback(move |worker, _, datagram, _| {
                assert_eq!(datagram, b"hello");
                count.set(count.get() + 1);
                if count.get() == EACH {
                    let _ = worker.send(b"received 10").unwrap();
                    own.close();
                }
            });
            worker.run().unwrap();
            assert_eq!(received.get(), EACH);
        },
    );
    let addresses = seen.take();
    assert_distributed(&entries.take(), &addresses);
    assert!(matches!(addresses[0], Address::Udp(address) if address.ip().is_unspecified()));
}

fn datagrams_to_a_borrowed_socket_are_distributed() {
    let log = Log::default();
    let entries = log.clone();
    let addresses = Rc::default();
    let seen = Rc::clone(&addresses);
    let number = Rc::new(Cell::new(None));
    let fd = Rc::clone(&number);
    cluster(
        |master| {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            fd.set(Some(socket.as_raw_fd()));
            let env = format!("{} {}", socket.as_raw_fd(), socket.local_addr().unwrap());
            distribute_datagrams(master, &log, addresses, &env);
            master.on_exit(move |master, _, _| {
                if master.workers().is_empty() {
                    // Check that the master's socket is still open and that no datagram is left in
                    // its buffer.
                    let address = socket.local_addr().unwrap();
                    assert_eq!(socket.send_to(b"own", address).unwrap(), 3);
                    let mut buffer = [0; 16];
                    let (length, _) = socket.recv_from(&mut buffer).unwrap();
                    assert_eq!(&buffer[..length], b"own");
                }
            });
        },
        |worker| {
            let socket = std::env::var("SOCKET").unwrap();
            let (number, address) = socket.split_once(' ').unwrap();
            let options = BindOptions::fd(number.parse().unwrap());
            let socket = worker.bind(options).unwrap();
            assert_eq!(socket.local_addr().unwrap().to_string(), address);
            let mut buffer = [0; 16];
            for _ in 0..EACH {
                let (length, _) = socket.recv_from(&mut buffer).unwrap().unwrap();
                assert_eq!(&buffer[..length], b"hello");
            }
            close(&socket);
            let _ = worker.send(b"received 10").unwrap();
            worker.run().unwrap();
        },
    );
    let addresses = seen.take();
    assert_distributed(&entries.take(), &addresses);
    let Address::Fd {
        number: fd, is_udp, ..
    } = addresses[0]
    else {
        panic!("{addresses:?}");
    };
    assert_eq!((Some(fd), is_udp), (number.get(), true));
}

fn dgram_2() {
    let log = Log::default();
    let entries = log.clone();
    let received = Rc::new(Cell::new(0));
    let count = Rc::clone(&received);
    cluster(
        |master| {
            note_events(master, &log);
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_nonblocking(true).unwrap();
            let port = socket.local_addr().unwrap().port().to_string();
            for _ in 0..WORKERS {
                let _ = master.fork().unwrap().send(port.as_bytes()).unwrap();
            }
            let receive = move |master: &Master, socket: &std::net::UdpSocket| {
                let mut buffer = [0; 16];
                let (length, _) = socket.recv_from(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], b"hello");
                count.set(count.get() + 1);
                if count.get() < 40 {
                    return Some(Interest::Readable);
                }
                let log = log.clone();
                master.on_all_disconnected_once(move |_| log.add("all exited"));
                master.disconnect();
                None
            };
            master.watch(socket, Interest::Readable, receive).unwrap();
        },
        |worker| {
            let socket = Rc::new(worker.bind(0).unwrap());
            socket.set_message_callback(|_, _, _, _| panic!("no process answers"));
            let messages = Rc::new(Cell::new(0));
            let count = Rc::clone(&messages);
            worker.on_message(move |worker, message| {
                count.set(count.get() + 1);
                let port = std::str::from_utf8(message.bytes()).unwrap();
                send_until_disconnect(worker, &socket, port.parse().unwrap());
            });
            worker.run().unwrap();
            assert_eq!(messages.get(), 1);
        },
    );
    assert_eq!(received.get(), 40);
    let mut entries = entries.take();
    assert_eq!(entries.pop().unwrap(), "all exited");
    // A worker may be disconnected before it has bound its socket, because the other workers may
    // already have sent all 40 datagrams.
    entries.retain(|entry| !entry.ends_with(" listening"));
    let expected = [
        "fork",
        "online",
        "disconnect Some(true)",
        "exit Some(true) exit status: 0",
    ];
    assert_each(WORKERS, &entries, &expected);
}

fn send_until_disconnect(worker: &Worker, socket: &Rc<UdpSocket>, port: u16) {
    let sender = Rc::clone(socket);
    let send = move |_: &Worker| match sender.send_to(b"hello", ("127.0.0.1", port)) {
        Ok(length) => assert_eq!(length, 5),
        // Sending fails once the disconnect has closed the socket.
        Err(error) => assert_eq!(error.kind(), ErrorKind::NotConnected),
    };
    let timer = worker.set_interval(Duration::from_millis(1), send);
    let socket = Rc::clone(socket);
    worker.on_disconnect(move |worker| {
        assert_unbound(&socket);
        worker.clear_timer(timer);
    });
}

fn dgram_ipv6only() {
    let events = events_of_one_worker(|worker| {
        // Bind the IPv4 socket first and let the kernel choose its port. A port that the kernel
        // chose for an IPv6-only socket might already be in use by another process's IPv4 socket,
        // and the second bind would fail.
        let v4 = worker.bind(("0.0.0.0", 0)).unwrap();
        let port = v4.local_addr().unwrap().port();
        let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        // A dual-stack socket needs the port in both families, so its bind must fail.
        let error = worker.bind(address).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EADDRINUSE as i32));
        let v6 = worker.bind(BindOptions::from(address).ipv6_only(true));
        let v6 = v6.unwrap();
        assert_eq!(v6.local_addr().unwrap(), address);
        close(&v6);
        close(&v4);
        worker.disconnect().run().unwrap();
    });
    assert_eq!(events, bind_and_disconnect_events(2));
}

/// Returns the socket's link in `/proc/self/fd`. The link contains the inode, which identifies the
/// socket.
fn identity(socket: &UdpSocket) -> std::path::PathBuf {
    let copy = socket.try_clone().unwrap();
    std::fs::read_link(format!("/proc/self/fd/{}", copy.as_raw_fd())).unwrap()
}

/// Binds two sockets with `option` to one port. Asserts that a socket without `option` cannot be
/// bound to this port.
fn two_on_one_port(worker: &Worker, option: fn(BindOptions) -> BindOptions) {
    let first = worker.bind(option(BindOptions::from(0))).unwrap();
    let port = first.local_addr().unwrap().port();
    let error = worker.bind(port).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::EADDRINUSE as i32));
    let second = worker.bind(option(BindOptions::from(port))).unwrap();
    assert_eq!(second.local_addr().unwrap(), first.local_addr().unwrap());
    assert_ne!(identity(&first), identity(&second));
    close(&first);
    close(&second);
}

fn dgram_reuse() {
    let events = events_of_one_worker(|worker| {
        two_on_one_port(worker, |options| options.reuse_addr(true));
        worker.disconnect().run().unwrap();
    });
    assert_eq!(events, bind_and_disconnect_events(2));
}

fn dgram_reuseport() {
    let events = events_of_one_worker(|worker| {
        // Stop the master to check that binding with `reuse_port` needs no answer from the master.
        let master = StoppedMaster::new();
        let bind = |port| worker.bind(BindOptions::from(port).reuse_port(true));
        let first = bind(0).unwrap();
        let second = bind(first.local_addr().unwrap().port()).unwrap();
        assert_eq!(second.local_addr().unwrap(), first.local_addr().unwrap());
        assert_ne!(identity(&first), identity(&second));
        close(&first);
        close(&second);
        drop(master);
        worker.disconnect().run().unwrap();
    });
    assert_eq!(events, bind_and_disconnect_events(0));
}

/// Sends a datagram and returns the answer.
fn request(address: SocketAddr) -> String {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.send_to(b"ping", address).unwrap();
    let mut answer = [0; 16];
    let (length, _) = socket.recv_from(&mut answer).unwrap();
    String::from_utf8(answer[..length].to_vec()).unwrap()
}

/// Answers each datagram with the worker's ID.
fn answer_id(worker: &Worker) {
    let socket = worker.bind(0).unwrap();
    let id = worker.id().to_string();
    while let Some((_, from)) = socket.recv_from(&mut [0; 16]).unwrap() {
        socket.send_to(id.as_bytes(), from).unwrap();
    }
}

fn disconnect_unshared_udp() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            assert_eq!(master.scheduling_policy(), SchedulingPolicy::RoundRobin);
            note_events(master, &log);
            let without = master.fork().unwrap();
            without.on_online(move |master, without| {
                let with = master.fork_with([("BINDS", "1")]).unwrap();
                let (log, without) = (log.clone(), without.clone());
                with.on_listening(move |_, with, address| {
                    let address = SocketAddr::from(([127, 0, 0, 1], address.port().unwrap()));
                    let pinged = with.clone();
                    without.disconnect();
                    without.on_disconnect(move |_, _| {
                        let _ = pinged.send(b"ping").unwrap();
                    });
                    // Wait for two answers. In the meantime, the worker processes everything that
                    // the other worker's disconnect has caused.
                    let (log, answers) = (log.clone(), Cell::new(0));
                    with.on_message(move |master, with, _| {
                        answers.set(answers.get() + 1);
                        if answers.get() == 1 {
                            let _ = with.send(b"ping").unwrap();
                            return;
                        }
                        log.add(format!("served by {}", request(address)));
                        master.disconnect();
                    });
                });
            });
        },
        |worker| match std::env::var_os("BINDS") {
            Some(_) => {
                answer_pings(&worker);
                answer_id(&worker);
            }
            None => worker.run().unwrap(),
        },
    );
    let mut entries = entries.take();
    // The first worker may exit at any time after its disconnect, so the position of its `exit`
    // event varies.
    let end = "1 exit Some(true) exit status: 0";
    let before = entries.len();
    entries.retain(|entry| entry != end);
    assert_eq!(before - entries.len(), 1);
    let expected = [
        "1 fork",
        "1 online",
        "2 fork",
        "2 online",
        "2 listening",
        "1 disconnect Some(true)",
        "served by 2",
        "2 disconnect Some(true)",
        "2 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries, expected);
}

/// Runs `worker` in one worker process and passes it a port that is in use. A socket of the master
/// holds the port until the worker exits. Returns all events.
fn with_port_in_use(worker: impl FnOnce(&Worker, u16)) -> Vec<String> {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let holder = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            let port = holder.local_addr().unwrap().port().to_string();
            let forked = master.fork_with([("PORT", port)]).unwrap();
            forked.on_exit(move |_, _, _| assert!(holder.local_addr().is_ok()));
        },
        |role| {
            role.on_error(|_, error| panic!("{error}"));
            worker(&role, std::env::var("PORT").unwrap().parse().unwrap());
        },
    );
    entries.take()
}

/// Checks that `bind` returns a closed socket if a disconnect precedes the bind request. The master
/// processes the disconnect first and does not answer the bind request.
///
/// Node's test closes the socket before the answer arrives. Here `bind` waits for the answer, so
/// the application cannot close the socket earlier.
fn dgram_bind_socket_close_before_cluster_reply() {
    let events = with_port_in_use(|worker, port| {
        worker.disconnect();
        let socket = worker.bind(port).unwrap();
        assert_closed(&socket);
        socket.set_message_callback(|_, _, _, _| panic!("the socket is closed"));
        worker.run().unwrap();
        close(&socket);
    });
    assert_eq!(events, bind_and_disconnect_events(0));
}

fn dgram_cluster_bind_error() {
    let events = with_port_in_use(|worker, port| {
        let before = open_fds();
        let error = worker.bind(port).unwrap_err();
        assert!(matches!(error, Error::Bind { .. }), "{error:?}");
        assert_eq!(error.raw_os_error(), Some(Errno::EADDRINUSE as i32));
        let reason = std::io::Error::from(Errno::EADDRINUSE);
        let expected = format!("cannot bind 0.0.0.0:{port}: {reason}");
        assert_eq!(error.to_string(), expected);
        assert_eq!(open_fds(), before, "no descriptor remains");
        worker.disconnect().run().unwrap();
    });
    assert_eq!(events, bind_and_disconnect_events(0));
}

fn dgram_cluster_close_in_listening() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            (0..3).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            worker.on_error(|_, error| panic!("{error}"));
            let socket = worker.bind(0).unwrap();
            close(&socket);
            worker.disconnect().run().unwrap();
        },
    );
    let expected = [
        "fork",
        "online",
        "listening",
        "disconnect Some(true)",
        "exit Some(true) exit status: 0",
    ];
    assert_each(3, &entries.take(), &expected);
}

/// Checks `unreference` after `bind`. Node's test calls `unref` while the bind request is pending,
/// but `bind` returns only after the request has completed.
fn dgram_unref_in_cluster() {
    let events = events_of_one_worker(|worker| {
        let socket = Rc::new(worker.bind("127.0.0.1:0").unwrap());
        let received = Rc::new(Cell::new(0));
        let (own, count) = (Rc::clone(&socket), Rc::clone(&received));
        socket.set_message_callback(move |_, _, datagram, _| {
            assert_eq!(datagram, b"x");
            count.set(count.get() + 1);
            own.unreference();
        });
        socket.unreference();
        worker.process().unreference();
        worker.run().unwrap();
        assert!(worker.is_connected());
        // The socket must still be open: referenced again, it must keep the loop running until it
        // receives a datagram.
        socket.reference();
        socket.send_to(b"x", socket.local_addr().unwrap()).unwrap();
        worker.run().unwrap();
        assert_eq!(received.get(), 1);
        assert!(worker.is_connected());
        let reported = Rc::new(Cell::new(false));
        let at_disconnect = Rc::clone(&reported);
        worker.on_disconnect(move |_| at_disconnect.set(true));
        worker.process().disconnect();
        worker.run().unwrap();
        assert!(
            reported.get(),
            "run waits for the disconnect although the channel is unreferenced"
        );
        assert!(!worker.is_connected());
    });
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 disconnect Some(false)",
        "1 exit Some(false) exit status: 0",
    ];
    assert_eq!(events, expected);
}

/// Checks that a disconnect closes a socket that has just arrived. While the worker waits for the
/// answer to its bind request, the master sends the bound socket and then disconnects the worker.
fn socket_that_arrives_just_before_a_disconnect_is_closed() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            worker.on_message(|master, worker, message| {
                // The byte makes the worker send its bind request. The master does not read the
                // request before this callback returns.
                let [go]: [OwnedFd; 1] = message.take_fds().try_into().unwrap();
                UnixStream::from(go).write_all(b"x").unwrap();
                stop(worker);
                let (before, worker) = (open_fds().len(), worker.clone());
                let own = Rc::new(Cell::new(None));
                let timer = Rc::clone(&own);
                let disconnect_when_bound = move |master: &Master| {
                    if open_fds().len() > before {
                        worker.disconnect();
                        worker.process().kill(Signal::CONT);
                        master.clear_timer(own.get().unwrap());
                    }
                };
                let every = Duration::from_millis(1);
                timer.set(Some(master.set_interval(every, disconnect_when_bound)));
            });
        },
        |worker| {
            worker.on_error(|_, error| panic!("{error}"));
            let (mut here, there) = UnixStream::pair().unwrap();
            let _ = worker.send_with_fds(b"ready", vec![there.into()]).unwrap();
            // Do not sleep here, because `stop` waits until the worker sleeps, and the worker must
            // then be waiting for the answer to its bind request.
            here.set_nonblocking(true).unwrap();
            while here.read(&mut [0]).is_err() {
                std::thread::yield_now();
            }
            let before = open_fds();
            let socket = worker.bind(0).unwrap();
            assert_ne!(open_fds(), before, "the socket has arrived");
            assert_closed(&socket);
            assert_eq!(open_fds(), before, "the socket is released");
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), bind_and_disconnect_events(1));
}
