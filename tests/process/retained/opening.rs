//! Tests which listeners a master can retain: new ones, existing ones, and those of workers.

use std::cell::Cell;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use cluster::{ListenOptions, Master, SchedulingPolicy};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::{EADDRINUSE, EINVAL};

use super::{
    ADDRESS, NONE, RR, SHARDED, ask_path, disconnect, end_all, fork_at, next_worker_serves_all,
    read, serve_path,
};
use crate::harness::{Log, cluster, in_background, serve_id, talk, wait_until};

crate::scenarios! {
    listen_rejects_listeners_that_cannot_be_retained
    port_zero_is_the_same_port_in_master_and_worker
    existing_listener_is_shared_rr
    existing_listener_is_shared_none
    existing_listener_is_shared_sharded
    existing_unix_socket_is_shared
    listener_opened_by_a_worker_can_be_retained
}

/// Asserts that `listen` fails, and returns the errno and the text of the error. The errno is
/// `None` if the error does not come from the system.
#[track_caller]
fn refused<S>(master: &Master, options: impl Into<ListenOptions<S>>) -> (Option<i32>, String) {
    let error = master.listen(options).unwrap_err();
    assert!(matches!(error, cluster::Error::Listen { .. }), "{error}");
    (error.raw_os_error(), error.to_string())
}

fn listen_rejects_listeners_that_cannot_be_retained() {
    cluster(
        |master| {
            let own = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = own.local_addr().unwrap();
            let (errno, text) = refused(master, address);
            assert_eq!(errno, Some(EADDRINUSE));
            assert!(text.contains(&address.to_string()), "{text}");
            drop(own);
            // Drop one of two handles. The listener must stay open until the second handle is
            // dropped.
            let retained = master.listen(address).unwrap();
            let again = master.listen(address).unwrap();
            drop(retained);
            drop(TcpStream::connect(address).unwrap());
            drop(again);
            TcpStream::connect(address).unwrap_err();

            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("socket");
            std::fs::write(&path, "not a socket").unwrap();
            assert_eq!(refused(master, &path).0, Some(EADDRINUSE));
            assert!(path.exists());

            let any = || ListenOptions::from("127.0.0.1:0");
            for options in [
                any().exclusive(true),
                any().reuse_port(true),
                ListenOptions::fd(0),
            ] {
                let (errno, text) = refused(master, options);
                assert!(errno.is_none() && text.contains("workers"), "{text}");
            }
            refused(master, "no port here");
            let datagrams: OwnedFd = UdpSocket::bind("127.0.0.1:0").unwrap().into();
            assert_eq!(
                refused(master, TcpListener::from(datagrams)).0,
                Some(EINVAL)
            );
            let (pair, _other) = UnixStream::pair().unwrap();
            let connected = UnixListener::from(OwnedFd::from(pair));
            assert_eq!(refused(master, connected).0, Some(EINVAL));
            let listener = UnixListener::bind(directory.path().join("unix")).unwrap();
            let listener = TcpListener::from(OwnedFd::from(listener));
            assert_eq!(refused(master, listener).0, Some(EINVAL));

            master.set_scheduling_policy(NONE).unwrap_err();
        },
        |_| unreachable!("no worker is forked"),
    );
}

fn port_zero_is_the_same_port_in_master_and_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let retained = [0, 0].map(|port| master.listen(port).unwrap());
            let ports = retained
                .each_ref()
                .map(|retained| retained.address().port().unwrap());
            assert_ne!(ports[0], ports[1]);
            let mut seen = Vec::new();
            let mut retained = Some(retained);
            master.on_listening(move |master, _, address| {
                seen.push(address.port().unwrap());
                if seen.len() == 2 {
                    assert_eq!(seen, ports);
                    log.add("the same");
                    retained.take();
                    master.disconnect();
                }
            });
            master.fork().unwrap();
        },
        |worker| {
            let _listeners = [0, 0].map(|port| worker.listen(port).unwrap());
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["the same"]);
}

/// Checks that two workers share a listener that the application opened before the master retained
/// it. The application keeps a duplicate of the listener.
///
/// The first worker requests only the listener's port, and the second worker requests its address.
fn existing_listener_is_shared(policy: SchedulingPolicy) {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            let listener = TcpListener::bind("0.0.0.0:0").unwrap();
            let shared = listener.try_clone().unwrap();
            let port = listener.local_addr().unwrap().port();
            let address = SocketAddr::from(([127, 0, 0, 1], port));
            // Connect a client before the listener is retained. A worker must serve this client
            // also.
            let early = TcpStream::connect(address).unwrap();
            let retained = master.listen(listener).unwrap();
            assert_eq!(retained.address().to_string(), format!("0.0.0.0:{port}"));
            let flags = fcntl(retained.as_fd(), FcntlArg::F_GETFL).unwrap();
            // Only with round robin does the master accept. With other policies, it does not change
            // the mode.
            let is_nonblocking = OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK);
            assert_eq!(is_nonblocking, policy == SchedulingPolicy::RoundRobin);

            let mut rest = Some((retained, shared, early, log));
            let listening = Cell::new(0);
            master.on_listening(move |master, _, _| {
                listening.set(listening.get() + 1);
                if listening.get() < 2 {
                    return;
                }
                let (retained, shared, early, log) = rest.take().unwrap();
                let work = move || {
                    let first = read(early);
                    assert!(["1", "2"].contains(&&*first), "{first:?}");
                    let mut seen = std::collections::BTreeSet::new();
                    wait_until("both", || {
                        // Connect two clients at a time, because single clients might always reach
                        // the same idle worker.
                        let clients = [(); 2].map(|()| TcpStream::connect(address).unwrap());
                        seen.extend(clients.map(read));
                        (seen.len() == 2).then_some(())
                    });
                };
                in_background(master, work, move |master, ()| {
                    drop(retained);
                    master.on_all_disconnected_once(move |_| {
                        // The application's duplicate keeps the socket open, so clients can still
                        // connect.
                        let patience = Duration::from_millis(500);
                        let _client = TcpStream::connect_timeout(&address, patience).unwrap();
                        shared.accept().unwrap();
                        log.add("both");
                    });
                    master.disconnect();
                    master.disconnect();
                });
            });
            for own in [port.to_string(), format!("0.0.0.0:{port}")] {
                master.fork_with([(ADDRESS, own)]).unwrap();
            }
        },
        |worker| serve_id(&worker, &std::env::var(ADDRESS).unwrap()),
    );
    assert_eq!(entries.take(), ["both"]);
}

fn existing_listener_is_shared_rr() {
    existing_listener_is_shared(RR);
}

fn existing_listener_is_shared_none() {
    existing_listener_is_shared(NONE);
}

fn existing_listener_is_shared_sharded() {
    existing_listener_is_shared(SHARDED);
}

fn existing_unix_socket_is_shared() {
    crate::harness::for_both_policies(|| {
        let directory = cluster::is_master().then(|| tempfile::tempdir().unwrap());
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                let path = directory.as_ref().unwrap().path().join("socket");
                let retained = master.listen(UnixListener::bind(&path).unwrap()).unwrap();
                assert_eq!(retained.address().to_string(), path.to_str().unwrap());
                let early = UnixStream::connect(&path).unwrap();
                let own = path.clone();
                fork_at(master, &path, move |master| {
                    let work = move || {
                        assert_eq!(read(early), "1");
                        (ask_path(&own), own)
                    };
                    in_background(master, work, move |master, (answer, own)| {
                        assert_eq!(answer, "1");
                        drop(retained);
                        master.on_all_disconnected_once(move |_| {
                            assert!(own.exists(), "the application owns the file");
                            let error = UnixStream::connect(&own).unwrap_err();
                            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                            log.add("closed");
                        });
                        master.disconnect();
                        master.disconnect();
                    });
                });
            },
            |worker| serve_path(&worker),
        );
        assert_eq!(entries.take(), ["closed"]);
    });
}

/// Retains a listener that a worker has opened, while this worker is disconnecting. The listener
/// must stay open for the next worker.
fn listener_opened_by_a_worker_can_be_retained() {
    crate::harness::for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                crate::harness::when_listening(master, 1, move |master, address| {
                    // Serve a client first. The listener then stays open for a grace period after
                    // the worker has begun to disconnect.
                    let client = move || talk(address, b"").unwrap();
                    in_background(master, client, move |master, _| {
                        master.workers()[0].disconnect();
                        let retained = master.listen("127.0.0.1:0").unwrap();
                        assert_eq!(retained.address().to_string(), address.to_string());
                        end_all(master, disconnect, move |master| {
                            next_worker_serves_all(master, address, move |master| {
                                log.add("served");
                                master.on_all_disconnected_once(move |_| drop(retained));
                                master.disconnect();
                            });
                        });
                    });
                });
                master.fork().unwrap();
            },
            |worker| serve_id(&worker, "127.0.0.1:0"),
        );
        assert_eq!(entries.take(), ["served"]);
    });
}
