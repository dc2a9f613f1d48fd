//! Tests ports, address families, errors, and which workers share a listener.

use std::net::{TcpListener, TcpStream};

use cluster::{Error, SchedulingPolicy};

use crate::harness::{
    Log, cluster, for_both_policies, in_background, serve_id, talk, wait_until, when_listening,
};

crate::scenarios! {
    port_zero_is_the_same_port_in_every_worker
    second_listen_on_port_zero_gets_another_port
    ipv6_listener_serves: IPV6
    failed_listen_leaves_the_address_free
    unresolvable_address_is_an_error
    closing_a_listener_does_not_affect_other_workers
    port_is_free_after_the_last_worker_exits
    shared_listener_serves
    shared_listener_serves_with_callbacks
}

fn port_zero_is_the_same_port_in_every_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.on_listening(move |master, _, address| {
                log.add(address.to_string());
                if log.len() == 3 {
                    master.disconnect();
                }
            });
            (0..3).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    let entries = entries.take();
    assert_eq!(entries.len(), 3);
    assert!(
        entries
            .iter()
            .all(|port| *port == entries[0] && port != "0"),
        "{entries:?}"
    );
}

fn second_listen_on_port_zero_gets_another_port() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.on_listening(move |master, _, address| {
                log.add(address.to_string());
                if log.len() == 4 {
                    master.disconnect();
                }
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            let first = worker.listen("127.0.0.1:0").unwrap();
            let second = worker.listen("127.0.0.1:0").unwrap();
            assert_ne!(first.local_addr().unwrap(), second.local_addr().unwrap());
            worker.run().unwrap();
        },
    );
    let mut entries = entries.take();
    assert_eq!(entries.len(), 4);
    entries.sort();
    entries.dedup();
    assert_eq!(entries.len(), 2);
}

fn ipv6_listener_serves() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.on_listening(|_, _, address| {
                assert_eq!(address.socket_addr().unwrap().ip().to_string(), "::1");
                assert!(matches!(
                    address,
                    cluster::Address::Tcp(std::net::SocketAddr::V6(_))
                ));
            });
            when_listening(master, 1, move |master, address| {
                in_background(
                    master,
                    move || talk(address, b""),
                    move |master, answer| {
                        log.add(answer.unwrap());
                        master.disconnect();
                    },
                );
            });
            master.fork().unwrap();
        },
        |worker| serve_id(&worker, "[::1]:0"),
    );
    assert_eq!(entries.take(), ["1"]);
}

fn failed_listen_leaves_the_address_free() {
    for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        let holder = std::cell::RefCell::new(None);
        cluster(
            |master| {
                // The application in the master process uses the port.
                let other = TcpListener::bind("127.0.0.1:0").unwrap();
                let address = other.local_addr().unwrap();
                holder.replace(Some(other));
                master.on_error(|_, _, error| panic!("{error}"));
                master.on_message(move |_, worker, message| {
                    log.add(String::from_utf8_lossy(message.bytes()));
                    drop(holder.take());
                    let _ = worker.send(b"free").unwrap();
                });
                master.fork_with([("PORT", address.to_string())]).unwrap();
            },
            |worker| {
                let address = std::env::var("PORT").unwrap();
                let error = worker.listen(address.as_str()).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(nix::libc::EADDRINUSE));
                let text = error.to_string();
                assert!(
                    text.starts_with(&format!("cannot listen on {address}: ")),
                    "{text}"
                );
                let _ = worker.send(b"in use").unwrap();
                worker.on_message(move |worker, message| {
                    assert_eq!(message.bytes(), b"free");
                    let listener = worker.listen(address.as_str()).unwrap();
                    assert_eq!(listener.local_addr().unwrap().to_string(), address);
                    worker.disconnect();
                });
                worker.run().unwrap();
            },
        );
        assert_eq!(entries.take(), ["in use"]);
    });
}

fn unresolvable_address_is_an_error() {
    cluster(
        |master| drop(master.fork().unwrap()),
        |worker| {
            let error = worker.listen("no port here").unwrap_err();
            assert!(matches!(error, Error::Listen { .. }), "{error}");
            assert!(error.to_string().contains("no port here"), "{error}");
        },
    );
}

fn closing_a_listener_does_not_affect_other_workers() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                let _ = master.workers()[0].send(b"close").unwrap();
                master.on_message(move |master, _, _| {
                    let log = log.clone();
                    let work = move || [(); 4].map(|()| talk(address, b"").unwrap());
                    in_background(master, work, move |master, answers| {
                        log.add(answers.concat());
                        master.disconnect();
                    });
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let id = worker.id().to_string();
            listener.set_connection_callback(move |_, mut connection| {
                use std::io::Write as _;
                connection.write_all(id.as_bytes()).unwrap();
            });
            worker.on_message(move |worker, _| {
                listener.close();
                let _ = worker.send(b"closed").unwrap();
            });
            worker.run().unwrap();
        },
    );
    let entries = entries.take();
    let [answers] = &entries[..] else {
        panic!("{entries:?}")
    };
    // Worker 1 has closed its listener, so only worker 2 may answer.
    assert!(answers == "2222", "worker 1 has closed: {answers}");
}

fn port_is_free_after_the_last_worker_exits() {
    cluster(
        |master| {
            when_listening(master, 2, |master, address| {
                master.on_all_disconnected_once(move |_| {
                    let refused = TcpStream::connect(address).unwrap_err();
                    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
                    TcpListener::bind(address).unwrap();
                });
                master.disconnect();
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
}

fn shared_listener_serves() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master
                .set_scheduling_policy(SchedulingPolicy::Shared)
                .unwrap();
            when_listening(master, 3, move |master, address| {
                let work = move || {
                    // Connect until each worker has answered, because the kernel chooses which
                    // worker to wake.
                    let mut seen = std::collections::BTreeSet::new();
                    wait_until("answers from all three workers", || {
                        seen.insert(talk(address, b"").unwrap());
                        (seen.len() == 3).then_some(())
                    });
                    seen.into_iter().collect::<String>()
                };
                in_background(master, work, move |master, seen| {
                    log.add(seen);
                    assert_eq!(master.ledger().accepted, 0, "the workers accept");
                    master.disconnect();
                });
            });
            (0..3).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    assert_eq!(entries.take(), ["123"]);
}

fn shared_listener_serves_with_callbacks() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master
                .set_scheduling_policy(SchedulingPolicy::Shared)
                .unwrap();
            when_listening(master, 2, move |master, address| {
                let work = move || {
                    let answers = (0..50).map(|_| talk(address, b"").unwrap());
                    answers.filter(|answer| answer == "hello").count()
                };
                in_background(master, work, move |master, count| {
                    log.add(count.to_string());
                    master.disconnect();
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(|_, mut connection| {
                use std::io::Write as _;
                connection.write_all(b"hello").unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["50"]);
}
