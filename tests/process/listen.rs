//! Listening: ports, families, errors, and who shares what.

use std::net::{TcpListener, TcpStream};

use cluster::{AddressType, Error, SchedulingPolicy};

use crate::harness::{Log, cluster, in_background, serve_id, talk, wait_until, when_listening};

crate::scenarios! {
    port_zero_is_the_same_port_in_every_worker
    the_second_listen_on_port_zero_is_another_port
    ipv6
    address_in_use_is_an_error_and_nothing_remains
    an_unresolvable_address_is_an_error
    a_closed_listener_goes_on_for_others
    the_port_is_free_when_the_last_worker_has_left
    shared_listener_serves
    shared_listener_with_callbacks
}

fn port_zero_is_the_same_port_in_every_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.on_listening(move |master, _, address| {
                log.add(address.to_string());
                if log.len() == 3 {
                    master.disconnect(|_| {});
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

fn the_second_listen_on_port_zero_is_another_port() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.on_listening(move |master, _, address| {
                log.add(address.to_string());
                if log.len() == 4 {
                    master.disconnect(|_| {});
                }
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            let first = worker.listen("127.0.0.1:0").unwrap();
            let second = worker.listen("127.0.0.1:0").unwrap();
            assert_ne!(first.local_addr(), second.local_addr());
            worker.run().unwrap();
        },
    );
    let mut entries = entries.take();
    assert_eq!(entries.len(), 4);
    entries.sort();
    entries.dedup();
    assert_eq!(entries.len(), 2);
}

fn ipv6() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.on_listening(|_, _, address| {
                assert_eq!(address.address.as_deref(), Some("::1"));
                assert_eq!(address.address_type, AddressType::Tcp6);
            });
            when_listening(master, 1, move |master, address| {
                in_background(
                    master,
                    move || talk(address, b""),
                    move |master, answer| {
                        log.add(answer.unwrap());
                        master.disconnect(|_| {});
                    },
                );
            });
            master.fork().unwrap();
        },
        |worker| serve_id(&worker, "[::1]:0"),
    );
    assert_eq!(entries.take(), ["1"]);
}

fn address_in_use_is_an_error_and_nothing_remains() {
    for_both_policies(|| {
        let log = Log::default();
        let entries = log.clone();
        let held = std::cell::RefCell::new(None);
        cluster(
            |master| {
                // Somebody else has the port: the master's own program.
                let other = TcpListener::bind("127.0.0.1:0").unwrap();
                let address = other.local_addr().unwrap();
                held.replace(Some(other));
                master.on_error(|_, _, error| panic!("{error}"));
                master.on_message(move |_, worker, message| {
                    log.add(String::from_utf8_lossy(message.bytes()));
                    drop(held.take());
                    worker.send(b"free").unwrap();
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
                worker.send(b"in use").unwrap();
                worker.on_message(move |worker, message| {
                    assert_eq!(message.bytes(), b"free");
                    let listener = worker.listen(address.as_str()).unwrap();
                    assert_eq!(listener.local_addr().to_string(), address);
                    worker.disconnect();
                });
                worker.run().unwrap();
            },
        );
        assert_eq!(entries.take(), ["in use"]);
    });
}

fn an_unresolvable_address_is_an_error() {
    cluster(
        |master| drop(master.fork().unwrap()),
        |worker| {
            let error = worker.listen("no port here").unwrap_err();
            assert!(matches!(error, Error::Listen { .. }), "{error}");
            assert!(error.to_string().contains("no port here"), "{error}");
        },
    );
}

fn a_closed_listener_goes_on_for_others() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            when_listening(master, 2, move |master, address| {
                master.workers()[0].send(b"close").unwrap();
                master.on_message(move |master, _, _| {
                    let log = log.clone();
                    let work = move || [(); 4].map(|()| talk(address, b"").unwrap());
                    in_background(master, work, move |master, answers| {
                        log.add(answers.concat());
                        master.disconnect(|_| {});
                    });
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let id = worker.id().to_string();
            listener.on_connection(move |_, mut connection| {
                use std::io::Write as _;
                connection.write_all(id.as_bytes()).unwrap();
            });
            worker.on_message(move |worker, _| {
                listener.close();
                worker.send(b"closed").unwrap();
            });
            worker.run().unwrap();
        },
    );
    let entries = entries.take();
    let [answers] = &entries[..] else {
        panic!("{entries:?}")
    };
    // Ids are given in the order of the forks, but either may be the first to listen.
    assert!(answers == "2222", "worker 1 has closed: {answers}");
}

fn the_port_is_free_when_the_last_worker_has_left() {
    cluster(
        |master| {
            when_listening(master, 2, |master, address| {
                master.disconnect(move |_| {
                    let refused = TcpStream::connect(address).unwrap_err();
                    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
                    TcpListener::bind(address).unwrap();
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
}

pub fn for_both_policies(play: impl Fn()) {
    // A process has one cluster: the second policy is tested by a child of this one.
    const POLICY: &str = "CLUSTER_SCHED_POLICY";
    play();
    if std::env::var_os(POLICY).is_none() {
        let own = std::env::current_exe().unwrap();
        let status = std::process::Command::new(own).env(POLICY, "none").status();
        assert!(status.unwrap().success());
    }
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
                    // Until everybody has had one: who is woken is the kernel's choice.
                    let mut seen = std::collections::BTreeSet::new();
                    wait_until("all three", || {
                        seen.insert(talk(address, b"").unwrap());
                        (seen.len() == 3).then_some(())
                    });
                    seen.into_iter().collect::<String>()
                };
                in_background(master, work, move |master, seen| {
                    log.add(seen);
                    assert_eq!(master.ledger().accepted, 0, "the workers accept");
                    master.disconnect(|_| {});
                });
            });
            (0..3).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
    assert_eq!(entries.take(), ["123"]);
}

fn shared_listener_with_callbacks() {
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
                    master.disconnect(|_| {});
                });
            });
            (0..2).for_each(|_| drop(master.fork().unwrap()));
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.on_connection(|_, mut connection| {
                use std::io::Write as _;
                connection.write_all(b"hello").unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["50"]);
}
