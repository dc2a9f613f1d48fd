//! Programs that do unusual things at unusual times.

use std::cell::{Cell, RefCell};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{Error, ListenOptions, Role, SendOptions, Signal};
use nix::libc::{EMFILE, ENAMETOOLONG};
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::harness::{
    Log, answer_pings, cluster, for_both_policies, in_background, note_messages, share_listeners,
    stop, when_all_wait, when_listening,
};

crate::scenarios! {
    a_worker_at_its_limit_leaves
    a_limit_is_kept_while_clients_wait
    a_udp_socket_is_handed_on_while_the_old_worker_is_busy
    a_listener_that_somebody_shuts_is_looked_at_now_and_then
    a_fork_inside_a_fork
    a_dropped_master_lets_its_workers_go
    too_many_listeners_are_an_error
    a_listener_of_the_workers_own_is_emptied
    a_worker_that_leaves_shuts_no_door_for_others
    a_callback_for_drops_cannot_turn_the_loop
    an_exclusive_listen_in_a_worker_that_has_left_has_ended
    a_panic_in_one_receipt_leaves_the_others
    a_panic_over_one_message_leaves_the_others
    a_panic_in_one_callback_of_disconnect_leaves_the_others
    the_callback_of_disconnect_is_waited_for
    a_message_to_a_worker_that_is_let_go_is_written
}

fn part() -> String {
    std::env::var("PART").unwrap_or_default()
}

fn a_worker_at_its_limit_leaves() {
    for_both_policies(|| {
        cluster(
            |master| {
                master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
                for part in ["callback", "accept"] {
                    master.fork_with([("PART", part)]).unwrap();
                }
                when_listening(master, 2, |master, _| master.disconnect(|_| {}));
            },
            |worker| {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                listener.set_max_connections(Some(0));
                if part() == "accept" {
                    assert!(listener.accept().unwrap().is_none());
                } else {
                    listener.on_connection(|_, _| panic!("nobody comes"));
                    worker.run().unwrap();
                }
            },
        );
    });
}

/// What is accepted beyond the limit, because the worker may be quick, comes back and waits.
fn a_limit_is_kept_while_clients_wait() {
    const CLIENTS: u64 = 40;
    let served = Rc::new(Cell::new(0));
    let count = Rc::clone(&served);
    cluster(
        |master| {
            let mut clients = Vec::new();
            master.on_message(move |master, worker, message| match message.bytes() {
                b"served" => {
                    count.set(count.get() + 1);
                    // Nobody else has been taken: there is one place.
                    let ledger = master.ledger();
                    assert_eq!(ledger.taken, count.get());
                    // It has been quick with one, and so it may have been given two.
                    assert!(ledger.in_hand() <= 1, "{ledger:?}");
                    drop(clients.pop());
                    worker.send(b"next").unwrap();
                }
                b"free" => {
                    if count.get() == CLIENTS {
                        worker.disconnect();
                    }
                }
                address => {
                    let address = String::from_utf8_lossy(address).into_owned();
                    let connect = |_| TcpStream::connect(&address).unwrap();
                    clients.extend((0..CLIENTS).map(connect));
                }
            });
            master.fork().unwrap();
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let held = Rc::new(RefCell::new(None));
            let place = Rc::clone(&held);
            listener.on_connection(move |worker, connection| {
                assert!(place.replace(Some(connection)).is_none());
                worker.send(b"served").unwrap();
            });
            listener.set_max_connections(Some(1));
            // The master knows of all this when it reads what comes next.
            let address = listener.local_addr().to_string();
            worker.send(address.as_bytes()).unwrap();
            worker.on_message(move |worker, _| {
                drop(held.take());
                worker.send(b"free").unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(served.get(), CLIENTS);
}

fn a_udp_socket_is_handed_on_while_the_old_worker_is_busy() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let first = master.fork().unwrap();
            master.on_listening(move |master, worker, address| {
                log.add(address.to_string());
                if worker.id().get() == 1 {
                    stop(&first);
                    first.disconnect();
                    master.fork().unwrap();
                } else {
                    first.process().kill(Signal::CONT);
                    worker.disconnect();
                }
            });
            master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
        },
        |worker| {
            worker
                .bind("127.0.0.1:0")
                .unwrap()
                .on_message(|_, _, _, _| {});
            worker.run().unwrap();
        },
    );
    let addresses = entries.take();
    assert_eq!(addresses.len(), 2);
    assert_eq!(addresses[0], addresses[1], "the same socket");
}

/// It stays readable for ever: looking at it again at once would be all that the loop does.
fn a_listener_that_somebody_shuts_is_looked_at_now_and_then() {
    for_both_policies(|| {
        let times = Rc::new(RefCell::new(Vec::new()));
        let seen = Rc::clone(&times);
        let lent = TcpListener::bind("127.0.0.1:0").unwrap();
        cluster(
            |master| {
                let fd = lent.as_raw_fd().to_string();
                let worker = master.fork_with([("FD", fd)]).unwrap();
                master.on_listening(move |_, _, _| {
                    shutdown(lent.as_raw_fd(), Shutdown::Both).unwrap();
                });
                let note = move || {
                    times.borrow_mut().push(Instant::now());
                    if times.borrow().len() == 3 {
                        worker.disconnect();
                    }
                };
                let noted = note.clone();
                master.on_error(move |_, _, error| {
                    assert!(matches!(error, Error::Accept { .. }), "{error}");
                    noted();
                });
                master.on_message(move |_, _, _| note());
            },
            |worker| {
                worker.on_error(|worker, _| {
                    worker.send(b"error").unwrap();
                });
                let fd = std::env::var("FD").unwrap().parse().unwrap();
                let listener = worker.listen(ListenOptions::fd(fd)).unwrap();
                listener.on_connection(|_, _| {});
                worker.run().unwrap();
            },
        );
        let times = seen.take();
        assert!(times.len() >= 3);
        // The pause is 100 ms; word of it may be late once.
        assert!(times[2] - times[0] >= Duration::from_millis(150));
    });
}

fn a_fork_inside_a_fork() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_messages(master, &log);
            let inner = || {
                let worker = master.fork_with([("PART", "inner")]).unwrap();
                assert_eq!(worker.id().get(), 1);
                ("PART", "outer")
            };
            let outer = master.fork_with(std::iter::once_with(inner)).unwrap();
            assert_eq!(outer.id().get(), 2);
            let ids = master.workers().into_iter().map(|worker| worker.id().get());
            assert_eq!(ids.collect::<Vec<_>>(), [1, 2]);
        },
        |worker| {
            worker.send(part().as_bytes()).unwrap();
        },
    );
    let mut entries = entries.take();
    entries.sort();
    assert_eq!(entries, ["1 inner", "2 outer"]);
}

fn a_dropped_master_lets_its_workers_go() {
    match cluster::init().unwrap() {
        Role::Master(master) => {
            let worker = master.fork().unwrap();
            let online = Rc::new(Cell::new(false));
            let seen = Rc::clone(&online);
            worker.on_message(move |_, _, _| seen.set(true));
            while !online.get() {
                master.dispatch(None).unwrap();
            }
            drop(master);
            // The program still has it, and that is all that is left.
            assert!(!worker.is_connected());
            let pid = Pid::from_raw(i32::try_from(worker.process().id()).unwrap());
            assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 0));
        }
        Role::Worker(worker) => {
            worker.send(b"here").unwrap();
            worker.run().unwrap();
            assert_eq!(worker.exited_after_disconnect(), Some(false));
        }
    }
}

fn too_many_listeners_are_an_error() {
    cluster(
        |master| {
            master.on_error(|_, _, error| panic!("{error}"));
            master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
            master.fork().unwrap();
        },
        |worker| {
            let listeners = [(); 64].map(|()| worker.listen("127.0.0.1:0").unwrap());
            let error = worker.listen("127.0.0.1:0").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(EMFILE), "{error}");
            drop(listeners);
            worker.listen("127.0.0.1:0").unwrap();
            let long = PathBuf::from("x".repeat(70_000));
            let error = worker.listen(&long).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(ENAMETOOLONG), "{error}");
        },
    );
}

fn a_listener_of_the_workers_own_is_emptied() {
    let answers = Rc::new(RefCell::new(Vec::new()));
    let heard = Rc::clone(&answers);
    cluster(
        |master| {
            master.on_message(move |master, worker, message| {
                let address = String::from_utf8_lossy(message.bytes()).into_owned();
                stop(worker);
                let clients = [(); 5].map(|()| TcpStream::connect(&address).unwrap());
                worker.disconnect();
                worker.process().kill(Signal::CONT);
                let heard = Rc::clone(&heard);
                let read = move || {
                    clients.map(|mut client| {
                        let mut text = String::new();
                        client.read_to_string(&mut text).unwrap();
                        text
                    })
                };
                in_background(master, read, move |_, texts| {
                    heard.borrow_mut().extend(texts)
                });
            });
            master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
            master.fork().unwrap();
        },
        |worker| {
            let own = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = own.local_addr().unwrap().to_string();
            let listener = worker.listen(own).unwrap();
            worker.send(address.as_bytes()).unwrap();
            for connection in listener.incoming() {
                connection.unwrap().write_all(b"hello").unwrap();
            }
        },
    );
    assert_eq!(answers.take(), ["hello"; 5]);
}

/// Two workers have the same listener, by message; one is told to leave, and dies over it.
fn a_worker_that_leaves_shuts_no_door_for_others() {
    let lent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = lent.local_addr().unwrap();
    let answered = Rc::new(Cell::new(false));
    let set = Rc::clone(&answered);
    cluster(
        |master| {
            let workers = ["dies", "serves"].map(|part| master.fork_with([("PART", part)]));
            let [dies, serves] = workers.map(Result::unwrap);
            for worker in [&dies, &serves] {
                let copy = lent.try_clone().unwrap();
                worker.send_with_fds(b"here", vec![copy.into()]).unwrap();
            }
            drop(lent);
            let mut ready = 0;
            let leaves = dies.clone();
            master.on_message(move |_, _, _| {
                ready += 1;
                if ready == 2 {
                    leaves.disconnect();
                }
            });
            dies.on_exit(move |master, _, status| {
                assert_eq!(status.code(), None);
                let (set, serves) = (Rc::clone(&set), serves.clone());
                let talk = move || crate::harness::talk(address, b"");
                in_background(master, talk, move |_, answer| {
                    assert_eq!(answer.unwrap(), "hello");
                    set.set(true);
                    serves.disconnect();
                });
            });
        },
        |worker| {
            worker.on_message(|worker, message| {
                let [fd] = message.take_fds().try_into().unwrap();
                let listener = worker.listen(TcpListener::from(fd)).unwrap();
                if part() == "serves" {
                    listener.on_connection(|_, mut connection| {
                        connection.write_all(b"hello").unwrap();
                    });
                } else {
                    // Open, and served by nobody.
                    std::mem::forget(listener);
                }
                worker.send(b"ready").unwrap();
            });
            if part() == "serves" {
                return worker.run().unwrap();
            }
            let other = worker.listen("127.0.0.1:0").unwrap();
            assert!(other.accept().unwrap().is_none());
            std::process::abort();
        },
    );
    assert!(answered.get());
}

fn a_callback_for_drops_cannot_turn_the_loop() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            share_listeners(master);
            note_messages(master, &log);
            master.on_message(|_, worker, message| {
                if message.bytes() == b"dropped" {
                    worker.disconnect();
                }
            });
            when_listening(master, 1, move |master, address| {
                when_all_wait(master, move |master| {
                    let talk = move || crate::harness::talk(address, b"");
                    in_background(master, talk, |_, answer| assert_eq!(answer.unwrap(), ""));
                });
            });
            master.fork().unwrap();
        },
        |worker| {
            answer_pings(&worker);
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_max_connections(Some(0));
            listener.on_drop(|worker, _| {
                let nested = worker.dispatch(Some(Duration::ZERO));
                assert!(matches!(nested, Err(Error::AlreadyRunning)));
                worker.send(b"dropped").unwrap();
            });
            assert!(listener.accept().unwrap().is_none());
        },
    );
    assert_eq!(entries.take(), ["1 pong", "1 dropped"]);
}

fn an_exclusive_listen_in_a_worker_that_has_left_has_ended() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    cluster(
        |master| {
            master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
            let address = address.to_string();
            master.fork_with([("PART", address)]).unwrap();
        },
        |worker| {
            worker.disconnect().run().unwrap();
            let options = ListenOptions::from(part()).exclusive(true);
            let listener = worker.listen(options).unwrap();
            assert_eq!(listener.local_addr().to_string(), part());
            assert!(listener.accept().unwrap().is_none());
        },
    );
}

fn a_panic_in_one_receipt_leaves_the_others() {
    cluster(
        |master| {
            master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
            master.fork().unwrap();
        },
        |worker| {
            let told = Rc::new(Cell::new(0));
            for number in 0..3 {
                let told = Rc::clone(&told);
                let options = SendOptions::new().on_written(move |_, _| {
                    told.set(told.get() + 1);
                    if number == 0 {
                        resume_unwind(Box::new(()));
                    }
                });
                worker.send_with(b"x", options).unwrap();
            }
            worker.disconnect();
            assert!(catch_unwind(AssertUnwindSafe(|| worker.run())).is_err());
            worker.run().unwrap();
            assert_eq!(told.get(), 3);
        },
    );
}

fn a_panic_over_one_message_leaves_the_others() {
    cluster(
        |master| {
            let heard = Rc::new(Cell::new(0));
            let count = Rc::clone(&heard);
            master.on_message(move |_, worker, message| match message.bytes() {
                // By then all others are there, and are read at once.
                b"wait" => {
                    let mut said = UnixStream::from(message.take_fds().remove(0));
                    said.read_exact(&mut [0]).unwrap();
                }
                b"panic" => resume_unwind(Box::new(())),
                _ => {
                    count.set(count.get() + 1);
                    if count.get() == 2 {
                        worker.disconnect();
                    }
                }
            });
            master.fork().unwrap();
            assert!(catch_unwind(AssertUnwindSafe(|| master.run())).is_err());
            master.run().unwrap();
            assert_eq!(heard.get(), 2);
        },
        |worker| {
            let (mut here, there) = UnixStream::pair().unwrap();
            worker.send_with_fds(b"wait", vec![there.into()]).unwrap();
            for message in [&b"panic"[..], b"one", b"two"] {
                worker.send(message).unwrap();
            }
            here.write_all(b"!").unwrap();
            worker.run().unwrap();
        },
    );
}

fn a_panic_in_one_callback_of_disconnect_leaves_the_others() {
    let told = Rc::new(Cell::new(0));
    cluster(
        |master| {
            for number in 0..3 {
                let told = Rc::clone(&told);
                master.disconnect(move |_| {
                    told.set(told.get() + 1);
                    if number == 0 {
                        resume_unwind(Box::new(()));
                    }
                });
            }
            assert!(catch_unwind(AssertUnwindSafe(|| master.run())).is_err());
        },
        |_| unreachable!(),
    );
    assert_eq!(told.get(), 3);
}

fn the_callback_of_disconnect_is_waited_for() {
    let over = Rc::new(Cell::new(false));
    let set = Rc::clone(&over);
    cluster(
        |master| {
            master.fork().unwrap().process().unref();
            master.disconnect(move |_| set.set(true));
        },
        |worker| worker.run().unwrap(),
    );
    assert!(over.get());
}

fn a_message_to_a_worker_that_is_let_go_is_written() {
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            let written = Rc::new(Cell::new(false));
            let set = Rc::clone(&written);
            let options = SendOptions::new().on_written(move |_, _| set.set(true));
            worker.send_with(&[0; 1 << 20], options).unwrap();
            worker.process().unref();
            // It reads when the loop has come to rest; the timer alone would not keep it.
            stop(&worker);
            let stopped = worker.clone();
            let timer = master.set_timeout(Duration::from_millis(20), move |_| {
                stopped.process().kill(Signal::CONT);
            });
            master.unref(timer);
            master.run().unwrap();
            assert!(written.get());
            // For the harness it is waited for after all.
            worker.process().ref_();
            worker.disconnect();
        },
        |worker| {
            worker.on_message(|_, message| assert_eq!(message.bytes().len(), 1 << 20));
            worker.run().unwrap();
        },
    );
}
