//! Tests applications that do unusual things at unusual times.

use std::cell::{Cell, RefCell};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{Error, ListenOptions, Role, SendOptions, Signal};
use nix::libc::{EMFILE, ENAMETOOLONG};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::harness::{
    Log, answer_pings, cluster, for_both_policies, in_background, note_messages, share_listeners,
    stop, when_all_wait, when_listening,
};

crate::scenarios! {
    worker_at_its_connection_limit_disconnects
    connection_limit_is_kept_while_clients_wait
    udp_socket_passes_to_a_new_worker_while_the_old_one_is_busy
    loop_backs_off_from_a_listener_that_was_shut_down
    fork_inside_fork_succeeds
    dropping_the_master_disconnects_its_workers
    listen_beyond_the_limit_is_an_error
    backlog_of_a_workers_own_listener_is_served_at_disconnect
    backlog_of_a_disconnecting_worker_is_served_in_batches
    disconnecting_worker_leaves_a_shared_listener_open
    on_drop_callback_cannot_run_the_loop
    exclusive_listener_of_a_disconnected_worker_accepts_nothing
    panic_in_on_written_keeps_other_callbacks
    panic_in_on_message_keeps_other_messages
    panic_in_a_disconnect_callback_keeps_other_callbacks
    run_waits_for_the_disconnect_callback
    message_to_an_unreferenced_worker_is_written
}

fn part() -> String {
    std::env::var("PART").unwrap_or_default()
}

fn worker_at_its_connection_limit_disconnects() {
    for_both_policies(|| {
        cluster(
            |master| {
                master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
                for part in ["callback", "accept"] {
                    master.fork_with([("PART", part)]).unwrap();
                }
                when_listening(master, 2, |master, _| master.disconnect());
            },
            |worker| {
                let listener = worker.listen("127.0.0.1:0").unwrap();
                listener.set_max_connections(Some(0));
                if part() == "accept" {
                    assert!(listener.accept().unwrap().is_none());
                } else {
                    listener.set_connection_callback(|_, _| panic!("unexpected connection"));
                    worker.run().unwrap();
                }
            },
        );
    });
}

/// Checks that a worker never holds more connections than its limit. The master may dispatch more
/// connections to a quick worker, but the worker returns the excess.
fn connection_limit_is_kept_while_clients_wait() {
    const CLIENTS: u64 = 40;
    let served = Rc::new(Cell::new(0));
    let count = Rc::clone(&served);
    cluster(
        |master| {
            let mut clients = Vec::new();
            master.on_message(move |master, worker, message| match message.bytes() {
                b"served" => {
                    count.set(count.get() + 1);
                    // The worker must not have received another connection, because its limit is 1.
                    let ledger = master.ledger();
                    assert_eq!(ledger.received, count.get());
                    // After one quick answer, the master may already have dispatched the next
                    // connection to the worker.
                    assert!(ledger.in_flight() <= 1, "{ledger:?}");
                    drop(clients.pop());
                    let _ = worker.send(b"next").unwrap();
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
            let slot = Rc::clone(&held);
            listener.set_connection_callback(move |worker, connection| {
                assert!(slot.replace(Some(connection)).is_none());
                let _ = worker.send(b"served").unwrap();
            });
            listener.set_max_connections(Some(1));
            // Send the address last. The master connects clients when it receives the address, and
            // has then processed all frames that the worker sent before.
            let address = listener.local_addr().unwrap().to_string();
            let _ = worker.send(address.as_bytes()).unwrap();
            worker.on_message(move |worker, _| {
                drop(held.take());
                let _ = worker.send(b"free").unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(served.get(), CLIENTS);
}

fn udp_socket_passes_to_a_new_worker_while_the_old_one_is_busy() {
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
                .set_message_callback(|_, _, _, _| {});
            worker.run().unwrap();
        },
    );
    let addresses = entries.take();
    assert_eq!(addresses.len(), 2);
    assert_eq!(addresses[0], addresses[1], "the same socket");
}

/// Checks that the loop does not spin when a listener has been shut down and therefore stays
/// readable.
fn loop_backs_off_from_a_listener_that_was_shut_down() {
    for_both_policies(|| {
        let times = Rc::new(RefCell::new(Vec::new()));
        let seen = Rc::clone(&times);
        let listener_of_master = TcpListener::bind("127.0.0.1:0").unwrap();
        cluster(
            |master| {
                let fd = listener_of_master.as_raw_fd().to_string();
                let worker = master.fork_with([("FD", fd)]).unwrap();
                master.on_listening(move |_, _, _| {
                    shutdown(listener_of_master.as_raw_fd(), Shutdown::Both).unwrap();
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
                    let _ = worker.send(b"error").unwrap();
                });
                let fd = std::env::var("FD").unwrap().parse().unwrap();
                let listener = worker.listen(ListenOptions::fd(fd)).unwrap();
                listener.set_connection_callback(|_, _| {});
                worker.run().unwrap();
            },
        );
        let times = seen.take();
        assert!(times.len() >= 3);
        // Two back-offs of 100 ms separate the first and the third error. Allow 50 ms less, because
        // the callback for the first error may run late. A loop that spins would take far less.
        assert!(times[2] - times[0] >= Duration::from_millis(150));
    });
}

fn fork_inside_fork_succeeds() {
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
            let _ = worker.send(part().as_bytes()).unwrap();
        },
    );
    let mut entries = entries.take();
    entries.sort();
    assert_eq!(entries, ["1 inner", "2 outer"]);
}

fn dropping_the_master_disconnects_its_workers() {
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
            // The application still owns the worker's handle, but dropping the master must have
            // closed the channel.
            assert!(!worker.is_connected());
            let pid = Pid::from_raw(i32::try_from(worker.process().id()).unwrap());
            assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 0));
        }
        Role::Worker(worker) => {
            let _ = worker.send(b"here").unwrap();
            worker.run().unwrap();
            assert_eq!(worker.exited_after_disconnect(), Some(false));
        }
    }
}

fn listen_beyond_the_limit_is_an_error() {
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
            drop(worker.listen("127.0.0.1:0").unwrap());
            let long = PathBuf::from("x".repeat(70_000));
            let error = worker.listen(&long).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(ENAMETOOLONG), "{error}");
        },
    );
}

fn backlog_of_a_workers_own_listener_is_served_at_disconnect() {
    let answers = Rc::new(RefCell::new(Vec::new()));
    let received = Rc::clone(&answers);
    cluster(
        |master| {
            master.on_message(move |master, worker, message| {
                let address = String::from_utf8_lossy(message.bytes()).into_owned();
                stop(worker);
                let clients = [(); 5].map(|()| TcpStream::connect(&address).unwrap());
                worker.disconnect();
                worker.process().kill(Signal::CONT);
                let received = Rc::clone(&received);
                let read = move || {
                    clients.map(|mut client| {
                        let mut text = String::new();
                        client.read_to_string(&mut text).unwrap();
                        text
                    })
                };
                in_background(master, read, move |_, texts| {
                    received.borrow_mut().extend(texts)
                });
            });
            master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
            master.fork().unwrap();
        },
        |worker| {
            let own = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = own.local_addr().unwrap().to_string();
            let listener = worker.listen(own).unwrap();
            let _ = worker.send(address.as_bytes()).unwrap();
            for connection in listener.incoming() {
                connection.unwrap().write_all(b"hello").unwrap();
            }
        },
    );
    assert_eq!(answers.take(), ["hello"; 5]);
}

/// Checks that a disconnecting worker does not shut down a listener that it shares with another
/// worker. Both workers receive the listener by message, and one aborts during its disconnect.
/// Checks that a worker with a callback serves the backlog of a closing listener in several
/// iterations, so that its timers, signals and messages do not wait for the end of the backlog.
fn backlog_of_a_disconnecting_worker_is_served_in_batches() {
    const CLIENTS: u32 = 400;
    cluster(
        |master| {
            master.on_message(|_, worker, _| {
                worker.disconnect();
            });
            let worker = master.fork().unwrap();
            worker.on_exit(|_, _, status| assert!(status.success(), "{status}"));
        },
        |worker| {
            let options = ListenOptions::from("127.0.0.1:0").exclusive(true);
            let listener = worker.listen(options).unwrap();
            let address = listener.local_addr().unwrap();
            let clients = (0..CLIENTS).map(|_| TcpStream::connect(address).unwrap());
            let _clients: Vec<_> = clients.collect();
            let served = Rc::new(Cell::new(0));
            let counter = Rc::clone(&served);
            listener.set_connection_callback(move |worker, _| {
                if counter.get() == 0 {
                    // The first callback returns when the master has disconnected this worker.
                    let token = worker.disconnect_token();
                    let mut fds = [PollFd::new(token.as_fd(), PollFlags::POLLIN)];
                    poll(&mut fds, PollTimeout::NONE).unwrap();
                }
                counter.set(counter.get() + 1);
            });
            let _ = worker.send(b"disconnect this worker").unwrap();
            let mut most = 0;
            while served.get() < CLIENTS {
                let before = served.get();
                worker.dispatch(None).unwrap();
                most = most.max(served.get() - before);
            }
            assert!(most < 2 * 16, "{most} connections in one iteration");
            worker.run().unwrap();
        },
    );
}

fn disconnecting_worker_leaves_a_shared_listener_open() {
    let listener_of_master = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener_of_master.local_addr().unwrap();
    let answered = Rc::new(Cell::new(false));
    let set = Rc::clone(&answered);
    cluster(
        |master| {
            let workers = ["aborting", "serves"].map(|part| master.fork_with([("PART", part)]));
            let [aborting, serves] = workers.map(Result::unwrap);
            for worker in [&aborting, &serves] {
                let copy = listener_of_master.try_clone().unwrap();
                let _ = worker.send_with_fds(b"here", vec![copy.into()]).unwrap();
            }
            drop(listener_of_master);
            let mut ready = 0;
            let disconnecting = aborting.clone();
            master.on_message(move |_, _, _| {
                ready += 1;
                if ready == 2 {
                    disconnecting.disconnect();
                }
            });
            aborting.on_exit(move |master, _, status| {
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
                    listener.set_connection_callback(|_, mut connection| {
                        connection.write_all(b"hello").unwrap();
                    });
                } else {
                    // Keep the listener open until the abort, without accepting from it.
                    std::mem::forget(listener);
                }
                let _ = worker.send(b"ready").unwrap();
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

fn on_drop_callback_cannot_run_the_loop() {
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
            listener.set_drop_callback(|worker, _| {
                let nested = worker.dispatch(Some(Duration::ZERO));
                assert!(matches!(nested, Err(Error::AlreadyRunning)));
                let _ = worker.send(b"dropped").unwrap();
            });
            assert!(listener.accept().unwrap().is_none());
        },
    );
    assert_eq!(entries.take(), ["1 pong", "1 pong", "1 dropped"]);
}

fn exclusive_listener_of_a_disconnected_worker_accepts_nothing() {
    let occupied = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = occupied.local_addr().unwrap();
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
            assert_eq!(listener.local_addr(), None);
            assert!(listener.accept().unwrap().is_none());
        },
    );
}

fn panic_in_on_written_keeps_other_callbacks() {
    cluster(
        |master| {
            master.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
            master.fork().unwrap();
        },
        |worker| {
            let called = Rc::new(Cell::new(0));
            for number in 0..3 {
                let called = Rc::clone(&called);
                let options = SendOptions::new().on_written(move |_, _| {
                    called.set(called.get() + 1);
                    if number == 0 {
                        resume_unwind(Box::new(()));
                    }
                });
                let _ = worker.send_with(b"x", options).unwrap();
            }
            worker.disconnect();
            assert!(catch_unwind(AssertUnwindSafe(|| worker.run())).is_err());
            worker.run().unwrap();
            assert_eq!(called.get(), 3);
        },
    );
}

fn panic_in_on_message_keeps_other_messages() {
    cluster(
        |master| {
            let received = Rc::new(Cell::new(0));
            let count = Rc::clone(&received);
            master.on_message(move |_, worker, message| match message.bytes() {
                // Block until the worker has sent all other messages, so that the master's next
                // read receives them together.
                b"wait" => {
                    let mut sent = UnixStream::from(message.take_fds().remove(0));
                    sent.read_exact(&mut [0]).unwrap();
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
            assert_eq!(received.get(), 2);
        },
        |worker| {
            let (mut here, there) = UnixStream::pair().unwrap();
            let _ = worker.send_with_fds(b"wait", vec![there.into()]).unwrap();
            for message in [&b"panic"[..], b"one", b"two"] {
                let _ = worker.send(message).unwrap();
            }
            here.write_all(b"!").unwrap();
            worker.run().unwrap();
        },
    );
}

fn panic_in_a_disconnect_callback_keeps_other_callbacks() {
    let called = Rc::new(Cell::new(0));
    cluster(
        |master| {
            for number in 0..3 {
                let called = Rc::clone(&called);
                master.on_all_disconnected_once(move |_| {
                    called.set(called.get() + 1);
                    if number == 0 {
                        resume_unwind(Box::new(()));
                    }
                });
                master.disconnect();
                master.disconnect();
            }
            assert!(catch_unwind(AssertUnwindSafe(|| master.run())).is_err());
        },
        |_| unreachable!(),
    );
    assert_eq!(called.get(), 3);
}

fn run_waits_for_the_disconnect_callback() {
    let called = Rc::new(Cell::new(false));
    let set = Rc::clone(&called);
    cluster(
        |master| {
            master.fork().unwrap().process().unreference();
            master.on_all_disconnected_once(move |_| set.set(true));
            master.disconnect();
        },
        |worker| worker.run().unwrap(),
    );
    assert!(called.get());
}

fn message_to_an_unreferenced_worker_is_written() {
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            let written = Rc::new(Cell::new(false));
            let set = Rc::clone(&written);
            let options = SendOptions::new().on_written(move |_, _| set.set(true));
            let _ = worker.send_with(&[0; 1 << 20], options).unwrap();
            worker.process().unreference();
            // Let the worker continue only after the loop has become idle. The timer is
            // unreferenced, so it does not keep `run` from returning.
            stop(&worker);
            let stopped = worker.clone();
            let timer = master.set_timeout(Duration::from_millis(20), move |_| {
                stopped.process().kill(Signal::CONT);
            });
            master.unreference(timer);
            master.run().unwrap();
            assert!(written.get());
            // The harness expects that no process is left, so the master must wait for the worker
            // now.
            worker.process().reference();
            worker.disconnect();
        },
        |worker| {
            worker.on_message(|_, message| assert_eq!(message.bytes().len(), 1 << 20));
            worker.run().unwrap();
        },
    );
}
