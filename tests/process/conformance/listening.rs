//! Tests addresses, errors, backlogs and shared ports of listeners.

use std::cell::RefCell;
use std::io::{ErrorKind, Read as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd as _, BorrowedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use cluster::{ListenOptions, Master, SchedulingPolicy, Signal, Worker};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::harness::{
    Log, answer, close_at_exit, cluster, expect_listen_error, for_both_policies, idle_server,
    note_events, note_messages, open_fds, read_answer, reserve_both_families, reserve_port,
    serve_id, share_listeners, when_listening, with_env,
};
use crate::refused::refuse_calls;

crate::scenarios! {
    eaddrinuse
    shared_handle_bind_error
    bind_privileged_port
    shared_handle_bind_privileged_port
    server_restart_none
    worker_handle_close
    listening_port
    net_listen_backlog
    shared_listener_has_the_requested_backlog
    first_listen_call_sets_the_backlog
    net_listen_ipv6only_false: IPV6
    net_listen_ipv6only_rr: IPV6
    net_listen_ipv6only_none: IPV6
    net_listen
    closing_a_port_zero_listener_leaves_the_other_open
    worker_cannot_listen_on_a_port_twice
}

/// Asserts that listening on the address fails with `errno`. Sends the message `refused` to the
/// master.
fn report_refusal(worker: &Worker, address: &str, errno: i32) {
    expect_listen_error(worker, address, errno);
    let _ = worker.send(b"refused").unwrap();
}

/// Closes the channel without a disconnect request. The closed channel makes `run` return.
fn close_channel(worker: &Worker) {
    worker.process().disconnect();
    worker.run().unwrap();
    assert!(!worker.is_connected());
}

/// The events of a worker that reports a failed `listen` and closes its channel.
const REFUSED: [&str; 5] = [
    "1 fork",
    "1 online",
    "1 refused",
    "1 disconnect Some(false)",
    "1 exit Some(false) exit status: 0",
];

fn eaddrinuse() {
    let log = Log::default();
    let entries = log.clone();
    let (_reserved, address) = reserve_port();
    cluster(
        |master| {
            note_events(master, &log);
            note_messages(master, &log);
            let holder = RefCell::new(Some(TcpListener::bind(address).unwrap()));
            let worker = master
                .fork_with([("ADDRESS", address.to_string())])
                .unwrap();
            worker.on_message(move |_, worker, _| {
                drop(holder.take().unwrap());
                let _ = worker.send(b"free").unwrap();
            });
        },
        |worker| {
            let address = std::env::var("ADDRESS").unwrap();
            report_refusal(&worker, &address, nix::libc::EADDRINUSE);
            worker.on_message(move |worker, message| {
                assert_eq!(message.bytes(), b"free");
                let listener = worker.listen(address.as_str()).unwrap();
                assert_eq!(listener.local_addr().unwrap().to_string(), address);
                listener.close();
                worker.disconnect();
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 refused",
        "1 listening",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn shared_handle_bind_error() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            share_listeners(master);
            note_events(master, &log);
            note_messages(master, &log);
            let (server, address) = idle_server();
            let worker = master
                .fork_with([("ADDRESS", address.to_string())])
                .unwrap();
            close_at_exit(&worker, server);
        },
        |worker| {
            let address = std::env::var("ADDRESS").unwrap();
            report_refusal(&worker, &address, nix::libc::EADDRINUSE);
            close_channel(&worker);
        },
    );
    assert_eq!(entries.take(), REFUSED);
}

/// Runs `play` in a process that may not listen on port 42, even if root runs the tests.
fn unprivileged(play: impl FnOnce()) {
    const CAP_NET_BIND_SERVICE: nix::libc::c_ulong = 10;
    // Remove the capability from all programs that root executes afterwards. For other users this
    // call fails, but they do not have the capability.
    #[allow(unsafe_code)]
    // SAFETY: PR_CAPBSET_DROP takes its arguments by value and has no memory-safety preconditions.
    unsafe {
        nix::libc::prctl(nix::libc::PR_CAPBSET_DROP, CAP_NET_BIND_SERVICE, 0, 0, 0)
    };
    with_env("UNPRIVILEGED", "1", || {
        let may_bind = || match TcpListener::bind("127.0.0.1:42") {
            Err(error) => error.kind() != ErrorKind::PermissionDenied,
            Ok(_) => true,
        };
        if may_bind() {
            // On this system, every user may bind the port, so a seccomp filter must make `bind`
            // fail.
            refuse_calls(&[nix::libc::SYS_bind], nix::libc::EACCES);
            assert!(!may_bind());
        }
        play();
    });
}

fn privileged_port(before: impl FnOnce(&Master)) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            before(master);
            note_events(master, &log);
            note_messages(master, &log);
            master.fork().unwrap();
        },
        |worker| {
            report_refusal(&worker, "127.0.0.1:42", nix::libc::EACCES);
            close_channel(&worker);
        },
    );
    assert_eq!(entries.take(), REFUSED);
}

fn bind_privileged_port() {
    unprivileged(|| {
        privileged_port(|master| {
            assert_eq!(master.scheduling_policy(), SchedulingPolicy::RoundRobin);
        });
    });
}

fn shared_handle_bind_privileged_port() {
    unprivileged(|| privileged_port(share_listeners));
}

fn server_restart_none() {
    let log = Log::default();
    let entries = log.clone();
    let ports = Rc::new(RefCell::new(Vec::new()));
    let seen = Rc::clone(&ports);
    cluster(
        |master| {
            share_listeners(master);
            note_events(master, &log);
            master.on_listening(move |_, _, address| ports.borrow_mut().push(address.port()));
            let first = master.fork().unwrap();
            first.on_listening(|master, first, _| {
                let first = first.clone();
                let second = master.fork().unwrap();
                second.on_exit(move |_, _, _| drop(first.disconnect().clone()));
            });
        },
        |worker| {
            if worker.id().get() == 1 {
                return serve_id(&worker, "127.0.0.1:0");
            }
            for _ in 0..2 {
                worker.listen("127.0.0.1:0").unwrap().close();
            }
            close_channel(&worker);
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "2 fork",
        "2 online",
        "2 listening",
        "2 listening",
        "2 disconnect Some(false)",
        "2 exit Some(false) exit status: 0",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
    let ports = seen.take();
    assert_eq!(ports.len(), 3);
    assert!(ports.iter().all(|port| *port == ports[0]), "{ports:?}");
}

fn worker_handle_close() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            worker.on_exit(move |master, _, _| {
                let ledger = master.ledger();
                let sums = (ledger.accepted, ledger.received, ledger.dropped);
                log.add(format!("{sums:?}"));
            });
        },
        |worker| {
            let before = open_fds();
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(|_, _| panic!("the listener is closed"));
            // Let the worker report to the master that it is idle.
            worker.dispatch(Some(Duration::ZERO)).unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            // Only the connection can arrive from the master now. Wait for the connection, but
            // leave it in the queue.
            let mut fds = [PollFd::new(worker.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::NONE).unwrap();
            listener.close();
            worker.dispatch(Some(Duration::ZERO)).unwrap();
            // The master must reclaim the connection and drop it, because no other worker listens.
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            drop(client);
            assert_eq!(open_fds(), before);
            worker.disconnect().run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 disconnect Some(true)",
        "(1, 0, 1)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn listening_port() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            master.on_listening(|_, worker, address| {
                assert_ne!(address.port(), Some(0));
                assert_ne!(address.port(), None);
                assert!(matches!(address, cluster::Address::TcpPort(_)));
                worker.kill(Signal::KILL);
            });
            master.fork().unwrap();
        },
        |worker| {
            let listener = worker.listen(0).unwrap();
            listener.set_connection_callback(|_, _| panic!("no client connects"));
            assert_ne!(listener.local_addr().unwrap().port(), 0);
            // Block here, so that the worker cannot exit before the signal arrives.
            worker.on_disconnect(|_| std::thread::park());
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 disconnect Some(true)",
        "1 exit Some(true) signal: 9 (SIGKILL)",
    ];
    assert_eq!(entries.take(), expected);
}

/// Returns the backlogs of all TCP listeners in this process.
fn backlogs() -> Vec<u32> {
    use nix::sys::socket::{getsockopt, sockopt::AcceptConn};

    let entries = std::fs::read_dir("/proc/self/fd").unwrap();
    let numbers = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let numbers: Vec<i32> = numbers.map(|number| number.parse().unwrap()).collect();
    let listens = |number: &i32| {
        #[allow(unsafe_code)]
        // SAFETY: the process has one thread, which has closed only the directory's descriptor
        // since the listing. `getsockopt` fails for a closed descriptor.
        let fd = unsafe { BorrowedFd::borrow_raw(*number) };
        getsockopt(&fd, AcceptConn) == Ok(true)
    };
    numbers.into_iter().filter(listens).map(backlog).collect()
}

/// Returns the listener's backlog: the argument of `listen`, but at most the system's limit.
fn backlog(listener: RawFd) -> u32 {
    #[allow(unsafe_code)]
    // SAFETY: `tcp_info` contains only integers, so all-zero bytes are a valid value.
    let mut info: nix::libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut size = u32::try_from(size_of_val(&info)).unwrap();
    #[allow(unsafe_code)]
    // SAFETY: `info` and `size` are valid for writes, and `size` is the size of `info` in bytes.
    let result = unsafe {
        nix::libc::getsockopt(
            listener,
            nix::libc::IPPROTO_TCP,
            nix::libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut size,
        )
    };
    assert_eq!(result, 0);
    // The kernel stores a listener's backlog in this field (`tcp_get_info` in net/ipv4/tcp.c).
    info.tcpi_sacked
}

/// Forks workers one after another. Each worker listens with the next backlog in `requested`, where
/// 0 stands for the default backlog.
///
/// Returns a log with three kinds of entries: at each `listening` event the backlogs of the
/// master's listeners, the backlogs that each worker reports for its own listeners, and the exit
/// statuses.
fn listen_with_backlogs(requested: &'static [u32], before: impl FnOnce(&Master)) -> Vec<String> {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            before(master);
            note_messages(master, &log);
            let mut rest = requested.iter();
            let mut next = move |master: &Master| match rest.next() {
                Some(backlog) => {
                    let env = [("BACKLOG", backlog.to_string())];
                    master.fork_with(env).unwrap();
                }
                None => master.disconnect(),
            };
            next(master);
            let listening = log.clone();
            master.on_listening(move |_, _, _| listening.add(format!("master {:?}", backlogs())));
            master.on_message(move |master, _, _| next(master));
            master.on_exit(move |_, _, status| log.add(status.to_string()));
        },
        |worker| {
            let backlog = std::env::var("BACKLOG").unwrap().parse().unwrap();
            let options = ListenOptions::from("127.0.0.1:0");
            let options = match backlog {
                0 => options,
                backlog => options.backlog(backlog),
            };
            let listener = worker.listen(options).unwrap();
            listener.set_connection_callback(|_, _| panic!("no client connects"));
            let _ = worker.send(format!("{:?}", backlogs()).as_bytes()).unwrap();
            worker.run().unwrap();
        },
    );
    entries.take()
}

fn net_listen_backlog() {
    let seen = listen_with_backlogs(&[127], |_| {});
    assert_eq!(seen, ["master [127]", "1 []", "exit status: 0"]);
}

fn shared_listener_has_the_requested_backlog() {
    let seen = listen_with_backlogs(&[127], share_listeners);
    assert_eq!(seen, ["master [127]", "1 [127]", "exit status: 0"]);
}

fn first_listen_call_sets_the_backlog() {
    // The first worker listens with the default backlog, 511. The second worker's value must have
    // no effect.
    let mut seen = listen_with_backlogs(&[0, 127], |_| {});
    let exits = seen.split_off(4);
    let expected = ["master [511]", "1 []", "master [511]", "2 []"];
    assert_eq!(seen, expected);
    assert_eq!(exits, ["exit status: 0"; 2]);
}

/// Lets three workers listen on the same IPv6 port. Calls `then` when all of them listen, and then
/// disconnects all workers.
fn listen_on_ipv6(
    options: impl Fn(&str) -> ListenOptions,
    before: impl FnOnce(&Master),
    then: impl FnOnce(&Master, u16) + 'static,
) {
    let log = Log::default();
    let entries = log.clone();
    let listening = Rc::new(RefCell::new(Vec::new()));
    let addresses = Rc::clone(&listening);
    cluster(
        |master| {
            before(master);
            note_events(master, &log);
            let (reserved, port) = reserve_both_families();
            master.on_listening(move |_, _, address| listening.borrow_mut().push(address.clone()));
            when_listening(master, 3, move |master, address| {
                assert_eq!(address.port(), port);
                then(master, port);
                drop(reserved);
                master.disconnect();
            });
            (0..3).for_each(|_| {
                master.fork_with([("PORT", port.to_string())]).unwrap();
            });
        },
        |worker| {
            let port = std::env::var("PORT").unwrap();
            let listener = worker.listen(options(&format!("[::]:{port}"))).unwrap();
            listener.set_connection_callback(|_, _| {});
            worker.run().unwrap();
        },
    );
    let addresses = addresses.take();
    assert_eq!(addresses.len(), 3);
    assert!(addresses.iter().all(|address| *address == addresses[0]));
    assert!(
        matches!(addresses[0], cluster::Address::Tcp(address) if address.ip().is_unspecified())
    );
    assert!(addresses[0].socket_addr().unwrap().is_ipv6());
    let mut entries = entries.take();
    entries.sort();
    let events = [
        "disconnect Some(true)",
        "exit Some(true) exit status: 0",
        "fork",
        "listening",
        "online",
    ];
    let of_each = |id| events.map(|event| format!("{id} {event}"));
    assert_eq!(entries, [1, 2, 3].map(of_each).concat());
}

fn net_listen_ipv6only_false() {
    listen_on_ipv6(
        |address| ListenOptions::from(address),
        |_| {},
        |_, port| {
            // Check that the listener uses the port in both address families.
            let error = TcpListener::bind(("0.0.0.0", port)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AddrInUse);
            drop(TcpStream::connect(("0.0.0.0", port)).unwrap());
        },
    );
}

fn ipv6_only(before: impl FnOnce(&Master)) {
    listen_on_ipv6(
        |address| ListenOptions::from(address).ipv6_only(true),
        before,
        |_, port| {
            let refused = TcpStream::connect(("127.0.0.1", port)).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
            drop(TcpListener::bind(("0.0.0.0", port)).unwrap());
            drop(TcpStream::connect(("::1", port)).unwrap());
        },
    );
}

fn net_listen_ipv6only_rr() {
    ipv6_only(|_| {});
}

fn net_listen_ipv6only_none() {
    ipv6_only(share_listeners);
}

fn net_listen() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            master.on_listening(|_, _, address| {
                assert!(matches!(address, cluster::Address::TcpPort(_)));
                assert!(address.port().is_some_and(|port| port > 0));
            });
            master.fork().unwrap();
        },
        |worker| {
            let listener = worker.listen(ListenOptions::default()).unwrap();
            assert!(listener.local_addr().unwrap().ip().is_unspecified());
            // Exit while the listener is open.
            std::process::exit(0);
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 disconnect Some(false)",
        "1 exit Some(false) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

/// Checks that closing one listener on port 0 does not affect the worker's other listener on port
/// 0.
///
/// Node's test of this behaviour is `child-index-net`.
fn closing_a_port_zero_listener_leaves_the_other_open() {
    for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                note_events(master, &log);
                master.fork().unwrap();
            },
            |worker| {
                let [first, second] = [(); 2].map(|()| worker.listen("127.0.0.1:0").unwrap());
                answer(&second, "second");
                first.close();
                let third = worker.listen("127.0.0.1:0").unwrap();
                answer(&third, "third");
                assert_ne!(second.local_addr().unwrap(), third.local_addr().unwrap());
                assert_eq!(read_answer(&worker, second.local_addr().unwrap()), "second");
                assert_eq!(read_answer(&worker, third.local_addr().unwrap()), "third");
                worker.disconnect().run().unwrap();
            },
        );
        let expected = [
            "1 fork",
            "1 online",
            "1 listening",
            "1 listening",
            "1 listening",
            "1 disconnect Some(true)",
            "1 exit Some(true) exit status: 0",
        ];
        assert_eq!(entries.take(), expected);
    });
}

/// Checks that a worker cannot listen on its own port twice but can listen there after closing its
/// listener.
///
/// Node's test of this behaviour is `port-reuse-between-workers`.
fn worker_cannot_listen_on_a_port_twice() {
    for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                note_events(master, &log);
                note_messages(master, &log);
                let (reserved, address) = reserve_port();
                let env = [("ADDRESS", address.to_string())];
                let first = master.fork_with(env.clone()).unwrap();
                master.on_message(move |master, worker, _| {
                    let _ = &reserved;
                    match worker.id().get() {
                        1 if master.workers().len() == 1 => drop(master.fork_with(env.clone())),
                        1 => master.disconnect(),
                        _ => drop(first.send(b"again")),
                    }
                });
            },
            |worker| {
                let address = std::env::var("ADDRESS").unwrap();
                let listener = worker.listen(&address).unwrap();
                if worker.id().get() == 1 {
                    answer(&listener, "first");
                    expect_listen_error(&worker, &address, nix::libc::EADDRINUSE);
                    assert_eq!(
                        read_answer(&worker, listener.local_addr().unwrap()),
                        "first"
                    );
                    worker.on_message(move |worker, _| {
                        // The other worker also listens now, so the port stays in use.
                        listener.close();
                        let again = worker.listen(&address).unwrap();
                        assert_eq!(again.local_addr().unwrap().to_string(), address);
                        again.set_connection_callback(|_, _| {});
                        let _ = worker.send(b"again").unwrap();
                    });
                }
                let _ = worker.send(b"listens").unwrap();
                worker.run().unwrap();
            },
        );
        let mut entries = entries.take();
        // The order in which the workers disconnect varies.
        entries[10..].sort();
        let expected = [
            "1 fork",
            "1 online",
            "1 listening",
            "1 listens",
            "2 fork",
            "2 online",
            "2 listening",
            "2 listens",
            "1 listening",
            "1 again",
            "1 disconnect Some(true)",
            "1 exit Some(true) exit status: 0",
            "2 disconnect Some(true)",
            "2 exit Some(true) exit status: 0",
        ];
        assert_eq!(entries[..10], expected[..10]);
        assert_eq!(entries[10..], expected[10..]);
    });
}
