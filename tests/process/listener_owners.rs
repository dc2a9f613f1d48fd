//! Tests listening sockets with several owners, and what one owner cannot do to the others.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cluster::{Error, Master, MasterListener, SchedulingPolicy, Worker};
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{Shutdown, getsockopt, shutdown, sockopt};
use nix::unistd::Pid;

use crate::exhaustion::leave_free;
use crate::harness::{Log, cluster, for_both_policies, in_background, scaled, talk, wait_until};

crate::scenarios! {
    released_listener_has_no_filter_if_another_process_may_have_it_rr
    released_listener_has_no_filter_if_another_process_may_have_it_none
    released_listener_has_no_filter_if_another_process_may_have_it_sharded
    released_unix_listener_still_listens_if_another_process_may_have_it
    adopting_detaches_the_syn_filter_of_a_predecessor
    adopting_keeps_a_filter_of_the_application
    stopped_port_refuses_clients_despite_a_copy_in_a_child_of_a_worker_none
    stopped_port_refuses_clients_despite_a_copy_in_a_child_of_a_worker_sharded
    worker_cannot_change_shard_selection
    shard_selection_is_restored_when_a_worker_detaches_it
    shard_selection_is_restored_after_a_shortage_of_descriptors
    listener_listens_again_when_a_worker_shuts_it_down_none
    listener_listens_again_when_a_worker_shuts_it_down_sharded
    listener_listens_again_when_another_owner_shuts_it_down_rr
    shutdown_of_a_unix_listener_by_a_worker_is_an_error
    master_keeps_accepting_when_another_owner_clears_o_nonblock
    worker_keeps_answering_when_another_worker_clears_o_nonblock
}

const RR: SchedulingPolicy = SchedulingPolicy::RoundRobin;
const NONE: SchedulingPolicy = SchedulingPolicy::Shared;
const SHARDED: SchedulingPolicy = SchedulingPolicy::Sharded;

/// Timeout of `connect`. It is shorter than a second, because the kernel retransmits the SYN after
/// one second, and the retransmission would hide a dropped SYN.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(800);

const ANY_PORT: &str = "127.0.0.1:0";
/// Environment variable with the path or address on which workers listen.
const ADDRESS: &str = "OWNERS_ADDRESS";

fn listen(master: &Master, policy: SchedulingPolicy) -> (MasterListener, SocketAddr) {
    master.set_scheduling_policy(policy).unwrap();
    let listener = master.listen(ANY_PORT).unwrap();
    let address = listener.address().to_string().parse().unwrap();
    (listener, address)
}

fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    TcpStream::connect_timeout(&address, scaled(CONNECT_TIMEOUT))
}

/// Forks `count` workers and calls `then` when all of them listen.
fn fork(master: &Master, count: usize, then: impl FnOnce(&Master) + 'static) {
    crate::harness::when_listening(master, count, move |master, _| then(master));
    (0..count).for_each(|_| drop(master.fork().unwrap()));
}

/// Serves `address` and replies to each message with the result of `act`.
fn serve(worker: &Worker, address: &str, act: fn(&[u8]) -> String) {
    worker.on_message(move |worker, message| {
        let _ = worker.send(act(message.bytes()).as_bytes()).unwrap();
    });
    crate::harness::serve_id(worker, address);
}

/// Sends a message to a worker and calls `then` with the worker's reply.
fn ask(master: &Master, worker: usize, message: &str, then: impl FnOnce(&Master, &str) + 'static) {
    let (then, own) = (Cell::new(Some(then)), std::rc::Rc::new(Cell::new(None)));
    let id = own.clone();
    own.set(Some(master.on_message(move |master, _, message| {
        master.remove_callback(id.get().unwrap());
        let text = String::from_utf8(message.bytes().to_vec()).unwrap();
        then.take().unwrap()(master, &text);
    })));
    let _ = master.workers()[worker].send(message.as_bytes()).unwrap();
}

fn empty_reply(_: &[u8]) -> String {
    String::new()
}

/// Returns copies of this process's listening sockets.
fn listening_sockets() -> Vec<OwnedFd> {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name());
    let numbers: Vec<RawFd> = names.filter_map(|n| n.to_str()?.parse().ok()).collect();
    let listening = numbers.into_iter().filter_map(|number| {
        #[allow(unsafe_code)]
        // SAFETY: the process has one thread, which has closed only the directory's descriptor
        // since the listing. `getsockopt` fails for a closed descriptor.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let is_listening = getsockopt(&fd, sockopt::AcceptConn) == Ok(true);
        is_listening.then(|| fd.try_clone_to_owned().unwrap())
    });
    listening.collect()
}

const RETURN: u16 = 0x06;

fn statement(code: u16, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf, k }
}

/// Sets a socket option whose value is a BPF program.
fn attach(
    socket: &impl AsFd,
    option: libc::c_int,
    program: &mut [libc::sock_filter],
) -> nix::Result<()> {
    let program = libc::sock_fprog {
        len: program.len().try_into().unwrap(),
        filter: program.as_mut_ptr(),
    };
    let size = libc::socklen_t::try_from(size_of_val(&program)).unwrap();
    let fd = socket.as_fd().as_raw_fd();
    let value = (&raw const program).cast();
    #[allow(unsafe_code)]
    // SAFETY: the option takes a `sock_fprog`, which points to a live program of the given length.
    Errno::result(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, option, value, size) }).map(drop)
}

/// Returns the filter that a master attaches while a listener drains. The filter drops TCP segments
/// with SYN and without ACK.
fn syn_filter() -> [libc::sock_filter; 5] {
    [
        statement(0x30, 0, 13),
        statement(0x54, 0, 0x12),
        statement(0x15, 1, 0x02),
        statement(RETURN, 0, 0),
        statement(RETURN, 0, u32::MAX),
    ]
}

/// Checks that clients can connect to the other owner's copy while the master drains the listener,
/// and after the master has closed it.
fn released_listener_has_no_filter(policy: SchedulingPolicy) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (listener, address) = listen(master, policy);
            let other = TcpListener::from(listener.as_fd().try_clone_to_owned().unwrap());
            fork(master, 2, move |master| {
                drop(listener);
                master.on_all_disconnected_once(move |_| {
                    let client = connect(address).map(drop);
                    log.add(format!("afterwards {client:?}"));
                    // Block: on a busy machine, the kernel may queue a connection only after
                    // `connect` has returned. Accept any connection. It may be that of an earlier
                    // client, because the workers may have left one in the backlog.
                    other.set_nonblocking(false).unwrap();
                    log.add(format!("accepted {}", other.accept().is_ok()));
                });
                master.disconnect();
                let client = connect(address).map(drop);
                assert!(client.is_ok(), "while the listener drains: {client:?}");
            });
        },
        |worker| serve(&worker, ANY_PORT, empty_reply),
    );
    assert_eq!(entries.take(), ["afterwards Ok(())", "accepted true"]);
}

fn released_listener_has_no_filter_if_another_process_may_have_it_rr() {
    released_listener_has_no_filter(RR);
}

fn released_listener_has_no_filter_if_another_process_may_have_it_none() {
    released_listener_has_no_filter(NONE);
}

fn released_listener_has_no_filter_if_another_process_may_have_it_sharded() {
    released_listener_has_no_filter(SHARDED);
}

fn serve_path(worker: &Worker, act: fn(&[u8]) -> String) {
    let path = PathBuf::from(std::env::var_os(ADDRESS).unwrap());
    worker.on_message(move |worker, message| {
        let _ = worker.send(act(message.bytes()).as_bytes()).unwrap();
    });
    worker.on_disconnect(|_| std::process::exit(0));
    for connection in worker.listen(path.as_path()).unwrap().incoming() {
        let Ok(mut connection) = connection else {
            // An error means that the socket no longer listens. The worker must still receive
            // messages.
            return worker.run().unwrap();
        };
        let id = worker.id().to_string();
        let _ = connection.write_all(id.as_bytes());
    }
}

fn released_unix_listener_still_listens_if_another_process_may_have_it() {
    for_both_policies(|| {
        let directory = cluster::is_master().then(|| tempfile::tempdir().unwrap());
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                let path = directory.as_ref().unwrap().path().join("socket");
                let listener = master.listen(path.as_path()).unwrap();
                listener.set_removes_file(false).unwrap();
                let other = UnixListener::from(listener.as_fd().try_clone_to_owned().unwrap());
                let rest = Cell::new(Some((listener, other, path.clone(), log)));
                master.on_listening(move |master, _, _| {
                    let (listener, other, path, log) = rest.take().unwrap();
                    drop(listener);
                    master.on_all_disconnected_once(move |_| {
                        let client = UnixStream::connect(path).map(drop);
                        other.set_nonblocking(true).unwrap();
                        log.add(format!("{client:?} {}", other.accept().is_ok()));
                    });
                    master.disconnect();
                });
                master.fork_with([(ADDRESS, path)]).unwrap();
            },
            |worker| serve_path(&worker, empty_reply),
        );
        assert_eq!(entries.take(), ["Ok(()) true"]);
    });
}

fn adopting_detaches_the_syn_filter_of_a_predecessor() {
    cluster(
        |master| {
            let listener = TcpListener::bind(ANY_PORT).unwrap();
            let address = listener.local_addr().unwrap();
            attach(&listener, libc::SO_ATTACH_FILTER, &mut syn_filter()).unwrap();
            let error = connect(address).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TimedOut);
            let listener = master.listen(listener).unwrap();
            connect(address).unwrap();
            drop(listener);
        },
        |_| {},
    );
}

fn adopting_keeps_a_filter_of_the_application() {
    cluster(
        |master| {
            let listener = TcpListener::bind(ANY_PORT).unwrap();
            let address = listener.local_addr().unwrap();
            let mut drop_all = [statement(RETURN, 0, 0)];
            attach(&listener, libc::SO_ATTACH_FILTER, &mut drop_all).unwrap();
            let listener = master.listen(listener).unwrap();
            let error = connect(address).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TimedOut);
            drop(listener);
        },
        |_| {},
    );
}

/// Checks that a stopped port refuses clients although a child of a worker still has a copy of the
/// listener. The master does not know this child.
fn stopped_port_refuses_clients(policy: SchedulingPolicy) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (listener, address) = listen(master, policy);
            fork(master, 2, move |master| {
                ask(master, 1, "", move |master, child| {
                    let child = Pid::from_raw(child.parse().unwrap());
                    drop(listener);
                    master.on_all_disconnected_once(move |_| {
                        let client = connect(address);
                        kill(child, Signal::SIGKILL).unwrap();
                        log.add(format!("{:?}", client.map_err(|error| error.kind())));
                    });
                    master.disconnect();
                });
            });
        },
        |worker| {
            serve(&worker, ANY_PORT, |_| {
                let copies = listening_sockets();
                // Use `dup`, because its descriptors are not close-on-exec, so the child inherits
                // them.
                let inherited = |copy: &OwnedFd| nix::unistd::dup(copy).unwrap();
                let inherited: Vec<_> = copies.iter().map(inherited).collect();
                let mut child = Command::new("sleep");
                child.arg("1000").stdin(Stdio::null());
                let child = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
                drop(inherited);
                child.unwrap().id().to_string()
            });
        },
    );
    assert_eq!(entries.take(), ["Err(ConnectionRefused)"]);
}

fn stopped_port_refuses_clients_despite_a_copy_in_a_child_of_a_worker_none() {
    stopped_port_refuses_clients(NONE);
}

fn stopped_port_refuses_clients_despite_a_copy_in_a_child_of_a_worker_sharded() {
    stopped_port_refuses_clients(SHARDED);
}

/// Returns how many of 200 clients each worker answers.
fn shares(address: SocketAddr) -> BTreeMap<String, u32> {
    let mut shares = BTreeMap::new();
    for _ in 0..200 {
        *shares.entry(talk(address, b"").unwrap()).or_default() += 1;
    }
    shares
}

/// Asserts that each of three workers has answered at least 30 of 200 clients. The mean is 67, and
/// fewer than 30 are very unlikely.
fn assert_even(shares: &BTreeMap<String, u32>) {
    let is_even = shares.len() == 3 && shares.values().all(|part| *part >= 30);
    assert!(is_even, "{shares:?}");
}

/// The socket option's number, because some versions of the C library do not declare it.
const SO_DETACH_REUSEPORT_BPF: libc::c_int = 68;

/// Tries to change how the kernel distributes connections among the shards, by the means that `how`
/// names. Returns the result as text.
fn interfere(how: &[u8]) -> String {
    let [shard] = &listening_sockets()[..1] else {
        unreachable!("one socket")
    };
    let to_third = &mut [statement(RETURN, 0, 2)];
    let result = match how {
        b"select" => attach(shard, libc::SO_ATTACH_REUSEPORT_CBPF, to_third),
        b"filter" => attach(shard, libc::SO_ATTACH_FILTER, to_third),
        _ => attach(shard, SO_DETACH_REUSEPORT_BPF, to_third),
    };
    format!("{result:?}")
}

fn worker_cannot_change_shard_selection() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (listener, address) = listen(master, SHARDED);
            fork(master, 3, move |master| {
                let own = log.clone();
                ask(master, 2, "select", move |master, answer| {
                    log.add(format!("select {answer}"));
                    in_background(
                        master,
                        move || shares(address),
                        |master, shares| {
                            assert_even(&shares);
                            ask(master, 2, "filter", move |master, answer| {
                                own.add(format!("filter {answer}"));
                                drop(listener);
                                master.disconnect();
                            });
                        },
                    );
                });
            });
        },
        |worker| serve(&worker, ANY_PORT, interfere),
    );
    assert_eq!(entries.take(), ["select Err(EPERM)", "filter Err(EPERM)"]);
}

/// Connects clients until an event has set `seen`.
fn connect_until_seen(address: SocketAddr, seen: &AtomicBool) {
    wait_until("the event", || {
        // Ignore errors, because a client may be reset while the selection program is detached.
        let _ = talk(address, b"");
        seen.load(Ordering::SeqCst).then_some(())
    });
}

fn shard_selection_is_restored_when_a_worker_detaches_it() {
    cluster(
        |master| {
            let (listener, address) = listen(master, SHARDED);
            let seen = Arc::new(AtomicBool::new(false));
            let own = Arc::clone(&seen);
            master.on_error(move |_, worker, _| {
                assert!(worker.is_none());
                own.store(true, Ordering::SeqCst);
            });
            fork(master, 3, move |master| {
                ask(master, 2, "detach", move |master, answer| {
                    assert_eq!(answer, "Ok(())");
                    let work = move || {
                        connect_until_seen(address, &seen);
                        shares(address)
                    };
                    in_background(master, work, |master, shares| {
                        assert_even(&shares);
                        drop(listener);
                        master.disconnect();
                    });
                });
            });
        },
        |worker| serve(&worker, ANY_PORT, interfere),
    );
}

/// Like [`interfere`], or connects 100 clients to the address in the message.
fn interfere_or_connect(message: &[u8]) -> String {
    let Ok(address) = String::from_utf8_lossy(message).parse::<SocketAddr>() else {
        return interfere(message);
    };
    (0..100).for_each(|_| std::mem::forget(connect(address).unwrap()));
    String::new()
}

/// Checks that the master accepts the connections that have reached no shard once it has free
/// descriptors again. The clients are in a worker, because the master has no descriptor for them.
fn shard_selection_is_restored_after_a_shortage_of_descriptors() {
    cluster(
        |master| {
            let (listener, address) = listen(master, SHARDED);
            let restore = Rc::new(Cell::new(None::<Box<dyn Fn()>>));
            let (own, mut listener) = (Rc::clone(&restore), Some(listener));
            master.on_error(move |master, _, error| match error {
                Error::Accept { .. } => own.take().into_iter().for_each(|restore| restore()),
                Error::Misdirected { .. } => {
                    let Some(listener) = listener.take() else {
                        return;
                    };
                    in_background(
                        master,
                        move || shares(address),
                        move |master, shares| {
                            assert_even(&shares);
                            drop(listener);
                            master.disconnect();
                        },
                    );
                }
                error => panic!("{error}"),
            });
            fork(master, 3, move |master| {
                ask(master, 2, "detach", move |master, answer| {
                    assert_eq!(answer, "Ok(())");
                    restore.set(Some(Box::new(leave_free(0))));
                    ask(master, 1, &address.to_string(), |_, _| {});
                });
            });
        },
        |worker| serve(&worker, ANY_PORT, interfere_or_connect),
    );
}

fn shut_down(_: &[u8]) -> String {
    // Shut down only the first descriptor. A worker that waits in `accept` has two descriptors of
    // the same listener.
    shutdown(listening_sockets()[0].as_raw_fd(), Shutdown::Both).unwrap();
    "done".to_owned()
}

/// Checks that after a worker has shut the listener down, the port stays the same and each worker
/// serves again.
fn listener_listens_again(policy: SchedulingPolicy) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (listener, address) = listen(master, policy);
            let errors = Cell::new(0);
            let rest = Cell::new(Some((listener, log)));
            master.on_error(move |master, worker, error| {
                assert!(worker.is_none(), "{error}");
                errors.set(errors.get() + 1);
                // Shut the listener down again, until it has been shut down three times.
                if errors.get() < 3 {
                    return ask(master, 1, "", |_, _| {});
                }
                let (listener, log) = rest.take().unwrap();
                let work = move || {
                    let mut seen = std::collections::BTreeSet::new();
                    wait_until("all workers", || {
                        // Connect two clients at a time, so that both workers serve a shared
                        // listener.
                        let clients = [(); 2].map(|()| connect(address).unwrap());
                        seen.extend(clients.map(|mut client| {
                            let mut answer = String::new();
                            client
                                .set_read_timeout(Some(scaled(Duration::from_secs(20))))
                                .unwrap();
                            client.read_to_string(&mut answer).unwrap();
                            answer
                        }));
                        (seen.len() == 2).then_some(())
                    });
                };
                in_background(master, work, move |master, ()| {
                    log.add("all");
                    drop(listener);
                    master.on_all_disconnected_once(move |_| {
                        let error = connect(address).unwrap_err();
                        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                    });
                    master.disconnect();
                });
            });
            fork(master, 2, |master| ask(master, 1, "", |_, _| {}));
        },
        |worker| serve(&worker, ANY_PORT, shut_down),
    );
    assert_eq!(entries.take(), ["all"]);
}

fn listener_listens_again_when_a_worker_shuts_it_down_none() {
    listener_listens_again(NONE);
}

fn listener_listens_again_when_a_worker_shuts_it_down_sharded() {
    listener_listens_again(SHARDED);
}

fn listener_listens_again_when_another_owner_shuts_it_down_rr() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (listener, address) = listen(master, RR);
            let other = listener.as_fd().try_clone_to_owned().unwrap();
            let rest = Cell::new(Some((listener, log)));
            master.on_error(move |master, worker, error| {
                assert!(worker.is_none(), "{error}");
                let (listener, log) = rest.take().unwrap();
                let work = move || talk(address, b"").unwrap();
                in_background(master, work, move |master, answer| {
                    log.add(answer);
                    drop(listener);
                    master.disconnect();
                });
            });
            fork(master, 1, move |_| {
                shutdown(other.as_raw_fd(), Shutdown::Both).unwrap();
            });
        },
        |worker| serve(&worker, ANY_PORT, empty_reply),
    );
    assert_eq!(entries.take(), ["1"]);
}

/// Checks that the master reports the shutdown as exactly one error. Unlike a TCP socket, a Unix
/// socket that was shut down cannot listen again.
fn shutdown_of_a_unix_listener_by_a_worker_is_an_error() {
    let directory = cluster::is_master().then(|| tempfile::tempdir().unwrap());
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduling_policy(NONE).unwrap();
            let path = directory.as_ref().unwrap().path().join("socket");
            let listener = Cell::new(Some(master.listen(path.as_path()).unwrap()));
            master.on_error(move |master, worker, error| {
                assert!(worker.is_none(), "{error}");
                let path = listener.take().unwrap().address().to_string();
                assert!(error.to_string().contains(&path), "{error}");
                log.add("error");
                // Wait, to check that no second error is reported.
                master.set_timeout(Duration::from_millis(300), |master| master.disconnect());
            });
            master.on_listening(|master, _, _| ask(master, 0, "", |_, _| {}));
            master.fork_with([(ADDRESS, path)]).unwrap();
        },
        |worker| serve_path(&worker, shut_down),
    );
    assert_eq!(entries.take(), ["error"]);
}

fn master_keeps_accepting_when_another_owner_clears_o_nonblock() {
    const ROUNDS: u32 = 20;
    fn play(master: &Master, other: TcpListener, rounds_left: u32, listener: MasterListener) {
        if rounds_left == 0 {
            drop(listener);
            return master.disconnect();
        }
        other.set_nonblocking(false).unwrap();
        let address = other.local_addr().unwrap();
        let work = move || talk(address, b"").unwrap();
        in_background(master, work, move |master, answer| {
            assert_eq!(answer, "1");
            play(master, other, rounds_left - 1, listener);
        });
    }
    cluster(
        |master| {
            master.set_scheduling_policy(RR).unwrap();
            let other = TcpListener::bind(ANY_PORT).unwrap();
            let address = other.local_addr().unwrap().to_string();
            let listener = master.listen(other.try_clone().unwrap()).unwrap();
            let rest = Cell::new(Some((other, listener)));
            master.on_listening(move |master, _, _| {
                let (other, listener) = rest.take().unwrap();
                play(master, other, ROUNDS, listener);
            });
            master.fork_with([(ADDRESS, address)]).unwrap();
        },
        |worker| serve(&worker, &std::env::var(ADDRESS).unwrap(), empty_reply),
    );
}

/// Checks that a worker is not blocked when another worker clears `O_NONBLOCK` and exits. The flag
/// applies to all copies of a shared listener.
fn worker_keeps_answering_when_another_worker_clears_o_nonblock() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (listener, address) = listen(master, NONE);
            fork(master, 2, move |master| {
                ask(master, 1, "block", move |master, _| {
                    master.workers()[1].disconnect();
                });
                let rest = Cell::new(Some((listener, log)));
                master.workers()[1].on_exit(move |master, _, _| {
                    let (listener, log) = rest.take().unwrap();
                    let work = move || talk(address, b"").unwrap();
                    in_background(master, work, move |master, answer| {
                        assert_eq!(answer, "1");
                        ask(master, 0, "", move |master, answer| {
                            log.add(answer);
                            drop(listener);
                            master.disconnect();
                        });
                    });
                });
            });
        },
        |worker| {
            worker.on_message(|worker, message| {
                if message.bytes() == b"block" {
                    for socket in listening_sockets() {
                        TcpListener::from(socket).set_nonblocking(false).unwrap();
                    }
                }
                let _ = worker.send(b"received").unwrap();
            });
            let listener = worker.listen(ANY_PORT).unwrap();
            crate::harness::answer(&listener, worker.id());
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["received"]);
}
