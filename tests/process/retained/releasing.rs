//! Tests when a retained listener closes, and that its waiting clients are served.

use std::cell::{Cell, RefCell};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

use cluster::{Master, MasterListener};

use super::{
    ADDRESS, RR, ask_path, connect, end_all, fork, fork_at, kill, listen, read, serve_path,
};
use crate::harness::{Log, cluster, in_background, serve_id};

crate::scenarios! {
    released_listener_closes_with_the_last_worker
    released_listener_without_workers_closes_at_once
    waiting_clients_of_a_released_listener_are_served_at_a_stop
    waiting_clients_of_a_released_existing_listener_are_served_at_a_stop
    retained_listener_delays_neither_disconnect_nor_run
}

fn released_listener_closes_with_the_last_worker() {
    crate::harness::for_both_policies(|| {
        let directory = cluster::is_master().then(|| tempfile::tempdir().unwrap());
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                let path = directory.as_ref().unwrap().path().join("socket");
                let retained = master.listen(&path).unwrap();
                let own = path.clone();
                fork_at(master, &path, move |master| {
                    drop(retained);
                    let work = move || (ask_path(&own), own);
                    in_background(master, work, move |master, (answer, own)| {
                        assert_eq!(answer, "1");
                        kill(&master.workers()[0]);
                        master.on_exit(move |_, _, _| {
                            assert!(!own.exists());
                            log.add("removed");
                        });
                    });
                });
            },
            |worker| serve_path(&worker),
        );
        assert_eq!(entries.take(), ["removed"]);
    });
}

fn released_listener_without_workers_closes_at_once() {
    cluster(
        |master| {
            let (retained, address) = listen(master, RR);
            drop(TcpStream::connect(address).unwrap());
            drop(retained);
            let error = TcpStream::connect(address).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);

            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("socket");
            let retained = master.listen(&path).unwrap();
            let own_fds = crate::harness::open_fds().len();
            drop(UnixStream::connect(&path).unwrap());
            drop(retained);
            assert!(!path.exists());
            assert_eq!(crate::harness::open_fds().len(), own_fds - 2);

            // Release another listener after its workers have exited.
            let retained = RefCell::new(Some(master.listen("127.0.0.1:0").unwrap()));
            let address: SocketAddr = {
                let retained = retained.borrow();
                let retained = retained.as_ref().unwrap();
                retained.address().to_string().parse().unwrap()
            };
            fork(master, 2, move |master| {
                end_all(master, kill, move |_| {
                    let _client = TcpStream::connect(address).unwrap();
                    drop(retained.take());
                    let error = TcpStream::connect(address).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                });
            });
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
}

fn waiting_clients_of_a_released_listener_are_served_at_a_stop() {
    waiting_clients_are_served_at_a_stop(|master| {
        let any = "127.0.0.1:0";
        (master.listen(any).unwrap(), any.to_owned())
    });
}

fn waiting_clients_of_a_released_existing_listener_are_served_at_a_stop() {
    waiting_clients_are_served_at_a_stop(|master| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let name = listener.local_addr().unwrap().to_string();
        (master.listen(listener).unwrap(), name)
    });
}

/// Releases the retained listener, disconnects all workers, and checks that waiting clients are
/// still served.
///
/// `listen` returns the retained listener and the address that the workers request.
fn waiting_clients_are_served_at_a_stop(listen: fn(&Master) -> (MasterListener, String)) {
    crate::harness::for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        cluster(
            |master| {
                let (retained, name) = listen(master);
                let address: SocketAddr = retained.address().to_string().parse().unwrap();
                let worker = master.fork_with([(ADDRESS, name)]).unwrap();
                let rest = Cell::new(Some((retained, log)));
                worker.on_listening(move |master, _, _| {
                    let (retained, log) = rest.take().unwrap();
                    let clients = connect(address);
                    // The worker reads one byte from each client before it accepts the next one. No
                    // client has sent a byte, so at most one connection has been received. The
                    // others wait.
                    drop(retained);
                    master.on_all_disconnected_once(move |_| {
                        let error = TcpStream::connect(address).unwrap_err();
                        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                    });
                    master.disconnect();
                    master.disconnect();
                    let work = || {
                        for mut client in &clients {
                            client.write_all(b"x").unwrap();
                        }
                        clients.into_iter().map(read).collect::<Vec<_>>()
                    };
                    in_background(master, work, move |_, answers| {
                        log.add(answers.concat().len().to_string());
                    });
                });
            },
            |worker| {
                let name = std::env::var(ADDRESS).unwrap();
                for connection in worker.listen(name).unwrap().incoming() {
                    let mut connection = connection.unwrap();
                    connection.read_exact(&mut [0]).unwrap();
                    connection.write_all(b"x").unwrap();
                }
            },
        );
        assert_eq!(entries.take(), ["20"]);
    });
}

/// Checks that neither `disconnect` nor `run` waits for a retained listener. A callback of
/// `on_setup` owns the listener, which therefore stays open until the master is dropped.
fn retained_listener_delays_neither_disconnect_nor_run() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let (retained, address) = listen(master, RR);
            fork(master, 2, move |master| {
                master.on_all_disconnected_once(move |master| {
                    assert!(master.workers().is_empty());
                    drop(TcpStream::connect(address).unwrap());
                    log.add("disconnected");
                });
                master.disconnect();
            });
            master.on_setup(move |_, _| drop(retained.address()));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    assert_eq!(entries.take(), ["disconnected"]);
}
