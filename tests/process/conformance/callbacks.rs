//! Tests callbacks that run once, callbacks that add and remove callbacks while they run, and
//! `unreference`.

use std::cell::{Cell, RefCell};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cluster::{CallbackId, Error, Interest, Master, Signal, Worker, WorkerProcess};

use crate::harness::{Log, SIGNALS, cluster, note_events};

crate::scenarios! {
    once_callbacks_of_the_cluster_run_once
    once_callbacks_of_a_worker_run_once
    once_callbacks_in_the_worker_run_once
    once_callbacks_for_signals_run_once
    callbacks_can_add_and_remove_callbacks
    callbacks_in_the_worker_can_add_and_remove_callbacks
    callback_cannot_reenter_the_loop
    unref_lets_run_return_in_the_master
    unref_and_ref_can_be_repeated
    unref_lets_run_return_in_the_worker
    unreferenced_worker_does_not_keep_the_loop_running
}

/// The cell from which a callback reads an ID that is known only after the callback is registered.
type OwnId = Rc<Cell<Option<CallbackId>>>;

fn once_callbacks_of_the_cluster_run_once() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let note = |event: &'static str| {
                let log = log.clone();
                move |_: &Master, worker: &WorkerProcess| {
                    log.add(format!("{} {event}", worker.id()))
                }
            };
            master.on_fork_once(note("fork"));
            master.on_online_once(note("online"));
            let noted = note("listening");
            master.on_listening_once(move |master, worker, _| noted(master, worker));
            let noted = note("message");
            master.on_message_once(move |master, worker, _| noted(master, worker));
            let noted = note("error");
            master.on_error_once(move |master, worker, _| noted(master, worker.unwrap()));
            master.on_disconnect_once(note("disconnect"));
            let noted = note("exit");
            master.on_exit_once(move |master, worker, status| {
                assert_eq!(status.code(), Some(0));
                noted(master, worker);
            });
            let at_setup = log.clone();
            master.on_setup_once(move |_, _| at_setup.add("setup"));
            let never = master.on_fork_once(|_, _| panic!("the callback was removed"));
            master.remove_callback(never);
            master.remove_callback(never);

            master.on_disconnect(|_, worker| drop(worker.send(b"too late").unwrap_err()));
            master.fork().unwrap();
            master.on_exit(|master, worker, _| {
                if worker.id().get() < 3 {
                    master.fork().unwrap();
                }
            });
        },
        |worker| {
            let _listener = worker.listen("127.0.0.1:0").unwrap();
            let _ = worker.send(b"one").unwrap();
            let _ = worker.send(b"two").unwrap();
            worker.disconnect().run().unwrap();
        },
    );
    let events = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 message",
        "1 disconnect",
        "1 error",
        "1 exit",
    ];
    let setup = ["setup"];
    assert_eq!(entries.take(), [&setup[..], &events].concat());
}

fn once_callbacks_of_a_worker_run_once() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            let note = |event: &'static str| {
                let log = log.clone();
                move |_: &Master, worker: &WorkerProcess| {
                    log.add(format!("{} {event}", worker.id()))
                }
            };
            let noted = note("listening");
            worker.on_listening_once(move |master, worker, _| noted(master, worker));
            let noted = note("error");
            worker.on_error_once(move |master, worker, _| noted(master, worker));
            let (first, second) = (note("message"), note("message"));
            // The second callback receives only the next message.
            worker.on_message_once(move |master, worker, _| {
                worker.on_message_once(move |master, worker, _| second(master, worker));
                first(master, worker);
            });
            worker.on_disconnect(|_, worker| {
                worker.send(b"too late").unwrap_err();
                worker.send(b"too late").unwrap_err();
            });
            worker.on_exit(|_, _, status| assert_eq!(status.code(), Some(0)));
        },
        |worker| {
            let _listeners = [(); 2].map(|()| worker.listen("127.0.0.1:0").unwrap());
            for message in 0..4 {
                let _ = worker.send(&[message]).unwrap();
            }
            worker.disconnect().run().unwrap();
        },
    );
    // The first message callback runs once and registers the second one. The second callback
    // receives the second message.
    let events = ["listening", "message", "message", "error"];
    assert_eq!(entries.take(), events.map(|event| format!("1 {event}")));
}

fn once_callbacks_in_the_worker_run_once() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            for message in ["one", "two", "three", "disconnect"] {
                let _ = worker.send(message.as_bytes()).unwrap();
            }
        },
        |worker| {
            let log = Log::default();
            let (first, second, always) = (log.clone(), log.clone(), log.clone());
            worker.on_message_once(move |worker, message| {
                first.add(format!(
                    "first {}",
                    String::from_utf8_lossy(message.bytes())
                ));
                // This callback receives only the next message.
                let second = second.clone();
                worker.on_message_once(move |_, message| {
                    second.add(format!(
                        "second {}",
                        String::from_utf8_lossy(message.bytes())
                    ));
                });
            });
            worker.on_message(move |worker, message| {
                always.add(String::from_utf8_lossy(message.bytes()));
                if message.bytes() == b"disconnect" {
                    worker.disconnect();
                }
            });
            let at_disconnect = log.clone();
            worker.on_disconnect_once(move |_| at_disconnect.add("on_disconnect"));
            worker.on_error_once(|_, error| panic!("{error}"));
            worker.run().unwrap();
            let expected = [
                "first one",
                "one",
                "two",
                "second two",
                "three",
                "disconnect",
                "on_disconnect",
            ];
            assert_eq!(log.take(), expected);
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn raise_usr1() {
    nix::sys::signal::raise(nix::sys::signal::SIGUSR1).unwrap();
}

fn once_callbacks_for_signals_run_once() {
    SIGNALS.store(true, Ordering::SeqCst);
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let (once, always) = (log.clone(), log);
            let on_once = move |_: &Master, _| once.add("once");
            master.on_signal_once(Signal::USR1, on_once).unwrap();
            let on_always = move |master: &Master, _| {
                always.add("always");
                match always.len() {
                    2 => raise_usr1(),
                    _ => drop(master.fork().unwrap()),
                }
            };
            master.on_signal(Signal::USR1, on_always).unwrap();
            // Set a timer, because a signal callback does not keep the loop running.
            master.set_timeout(Duration::ZERO, |_| {});
            raise_usr1();
            master.dispatch(Some(Duration::ZERO)).unwrap();
            master.dispatch(None).unwrap();
        },
        |worker| {
            let count = Rc::new(Cell::new((0, 0)));
            let (once, always) = (Rc::clone(&count), Rc::clone(&count));
            let on_once = move |_: &Worker, _| once.set((once.get().0 + 1, once.get().1));
            worker.on_signal_once(Signal::USR1, on_once).unwrap();
            let on_always = move |worker: &Worker, _| {
                always.set((always.get().0, always.get().1 + 1));
                match always.get().1 {
                    1 => raise_usr1(),
                    _ => drop(worker.disconnect()),
                }
            };
            worker.on_signal(Signal::USR1, on_always).unwrap();
            raise_usr1();
            worker.run().unwrap();
            assert_eq!(count.get(), (1, 2));
        },
    );
    let expected = [
        "once",
        "always",
        "always",
        "1 fork",
        "1 online",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn callbacks_can_add_and_remove_callbacks() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            let later = OwnId::default();
            let (victim, itself) = (Rc::clone(&later), OwnId::default());
            let (own, first) = (Rc::clone(&itself), log.clone());
            itself.set(Some(master.on_message(move |master, worker, _| {
                first.add("first");
                // Remove a callback that would run next. A callback may also add callbacks and
                // remove itself.
                master.remove_callback(victim.get().unwrap());
                let (all, one) = (first.clone(), first.clone());
                master.on_message(move |_, _, _| all.add("added to all"));
                worker.on_message(move |_, _, _| one.add("added to one"));
                master.remove_callback(own.get().unwrap());
                master.remove_callback(own.get().unwrap());
            })));
            later.set(Some(
                master.on_message(|_, _, _| panic!("the callback was removed")),
            ));
            let second = log.clone();
            worker.on_message(move |_, worker, message| {
                second.add("second");
                if message.bytes() == b"two" {
                    worker.disconnect();
                }
            });
            // Check that a callback that removes itself keeps its captured values until it returns.
            let dropped = OnDrop(log.clone());
            let own = OwnId::default();
            let itself = Rc::clone(&own);
            own.set(Some(worker.on_online(move |master, _| {
                master.remove_callback(itself.get().unwrap());
                dropped.0.add("called");
            })));
        },
        |worker| {
            let _ = worker.send(b"one").unwrap();
            let _ = worker.send(b"two").unwrap();
            worker.run().unwrap();
        },
    );
    let expected = [
        "called",
        "dropped",
        "first",
        // The worker's callbacks are a separate list and run after the cluster's callbacks.
        // Therefore the callback that "first" adds to the worker already receives the first
        // message.
        "second",
        "added to one",
        "added to all",
        "second",
        "added to one",
    ];
    assert_eq!(entries.take(), expected);
}

struct OnDrop(Log);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.add("dropped");
    }
}

fn callbacks_in_the_worker_can_add_and_remove_callbacks() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            let _ = worker.send(b"one").unwrap();
            let _ = worker.send(b"two").unwrap();
        },
        |worker| {
            let log = Log::default();
            let (later, itself) = (OwnId::default(), OwnId::default());
            let (victim, own) = (Rc::clone(&later), Rc::clone(&itself));
            let (first, last) = (log.clone(), log.clone());
            let dropped = OnDrop(log.clone());
            itself.set(Some(worker.on_message(move |worker, _| {
                dropped.0.add("first");
                worker.remove_callback(victim.get().unwrap());
                worker.remove_callback(own.get().unwrap());
                worker.remove_callback(own.get().unwrap());
                let first = first.clone();
                worker.on_message(move |worker, message| {
                    assert_eq!(message.bytes(), b"two");
                    first.add("added");
                    worker.disconnect();
                });
            })));
            later.set(Some(
                worker.on_message(|_, _| panic!("the callback was removed")),
            ));
            worker.on_message(move |_, _| last.add("last"));
            worker.run().unwrap();
            let expected = ["first", "dropped", "last", "last", "added"];
            assert_eq!(log.take(), expected);
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn callback_cannot_reenter_the_loop() {
    fn refused<T: std::fmt::Debug>(outcome: cluster::Result<T>) {
        assert!(matches!(outcome, Err(Error::AlreadyRunning)), "{outcome:?}");
    }
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let reenter = |master: &Master| {
                refused(master.run());
                refused(master.dispatch(None));
            };
            master.set_timeout(Duration::ZERO, reenter);
            master.on_online(move |master, _| reenter(master));
            master.on_exit(move |master, _, _| reenter(master));
            master.fork().unwrap();
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let socket = worker.bind("127.0.0.1:0").unwrap();
            worker.set_timeout(Duration::ZERO, move |worker| {
                refused(worker.run());
                refused(worker.dispatch(None));
                refused(listener.accept());
                refused(socket.recv_from(&mut []));
                worker.disconnect();
            });
            worker.on_disconnect(|worker| refused(worker.run()));
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 listening",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn unref_lets_run_return_in_the_master() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            // Check that `run` returns at once and calls no callback if all sources are
            // unreferenced.
            let interval = master.set_interval(Duration::from_millis(1), |_| panic!("an interval"));
            let timeout = master.set_timeout(Duration::from_secs(3600), |_| panic!("a timer"));
            let (watched, _peer) = UnixStream::pair().unwrap();
            let readable = Interest::Readable;
            let watch = master.watch(watched, readable, |_, _| panic!("a watch"));
            let watch = watch.unwrap();
            master.unreference(interval);
            master.unreference(timeout);
            master.unreference(watch);
            master.run().unwrap();
            master.clear_timer(interval);

            // Check that an unreferenced interval still fires while a referenced watch keeps the
            // loop running. The third tick closes the watched socket's peer, so the watch ends.
            let (ticks, ready) = (log.clone(), log.clone());
            let count = Cell::new(0);
            let other = Rc::new(RefCell::new(None));
            let end = Rc::clone(&other);
            let interval = master.set_interval(Duration::from_millis(1), move |_| {
                count.set(count.get() + 1);
                if count.get() == 3 {
                    ticks.add("three ticks");
                    drop(end.take());
                }
            });
            master.unreference(interval);
            let (peer, ours) = UnixStream::pair().unwrap();
            other.replace(Some(peer));
            let closed = move |_: &Master, _: &UnixStream| {
                ready.add("closed");
                None
            };
            master.watch(ours, readable, closed).unwrap();
            master.run().unwrap();
            master.clear_timer(interval);
            master.clear_timer(timeout);
            master.unwatch(watch);
        },
        |_| unreachable!("no worker is forked"),
    );
    assert_eq!(entries.take(), ["three ticks", "closed"]);
}

fn unref_and_ref_can_be_repeated() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let fired = log.clone();
            let timer = master.set_timeout(Duration::from_millis(2), move |_| fired.add("timer"));
            let (watched, peer) = UnixStream::pair().unwrap();
            let closed = move |_: &Master, _: &UnixStream| {
                log.add("closed");
                None
            };
            let watch = master.watch(watched, Interest::Readable, closed).unwrap();
            for _ in 0..2 {
                master.unreference(timer);
                master.unreference(watch);
            }
            master.run().unwrap();
            for _ in 0..2 {
                master.reference(timer);
                master.reference(watch);
            }
            master.unreference(watch);
            master.run().unwrap();
            master.reference(watch);
            drop(peer);
            master.run().unwrap();
            // The timer and the watch no longer exist, so these calls must have no effect.
            for _ in 0..2 {
                master.unreference(timer);
                master.reference(timer);
                master.unreference(watch);
                master.reference(watch);
            }
            master.run().unwrap();
        },
        |_| unreachable!("no worker is forked"),
    );
    assert_eq!(entries.take(), ["timer", "closed"]);
}

fn unref_lets_run_return_in_the_worker() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            worker.on_listening(|_, worker, _| drop(worker.disconnect().clone()));
            master.fork().unwrap();
        },
        |worker| {
            let interval = worker.set_interval(Duration::from_secs(3600), |_| panic!("too early"));
            let (watched, _peer) = UnixStream::pair().unwrap();
            let watch = worker.watch(watched, Interest::Readable, |_, _| panic!("a watch"));
            worker.unreference(interval);
            worker.unreference(watch.unwrap());
            let listener = worker.listen("127.0.0.1:0").unwrap();
            listener.set_connection_callback(|_, _| {});
            if worker.id().get() == 1 {
                // After the worker has disconnected, the unreferenced timer and watch must not keep
                // its loop running.
                worker.run().unwrap();
                assert_eq!(worker.exited_after_disconnect(), Some(true));
            } else {
                // With the channel and the listener unreferenced, `run` must return although the
                // worker is still connected.
                worker.process().unreference();
                listener.unreference();
                worker.run().unwrap();
                assert!(worker.is_connected());
                // A new timer is referenced, so it must keep the loop running until it fires.
                worker.set_timeout(Duration::from_millis(1), |worker| {
                    worker.process().reference();
                    worker.disconnect();
                });
                worker.run().unwrap();
                assert_eq!(worker.exited_after_disconnect(), Some(true));
            }
        },
    );
    let mut entries = entries.take();
    entries.sort();
    let expected = ["1", "2"].map(|id| {
        [
            "disconnect Some(true)",
            "exit Some(true) exit status: 0",
            "fork",
            "listening",
            "online",
        ]
        .map(|event| format!("{id} {event}"))
    });
    assert_eq!(entries, expected.concat());
}

fn unreferenced_worker_does_not_keep_the_loop_running() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            worker.process().unreference();
            worker.process().unreference();
            // Nothing but the unreferenced worker is left, so `run` must emit the pending events
            // and return.
            master.run().unwrap();
            assert_eq!(master.workers(), std::slice::from_ref(&worker));
            assert!(!worker.is_dead());
            log.add("run returned");
            // Check that an unreferenced worker still receives and answers messages while another
            // worker keeps the loop running.
            let other = master.fork().unwrap();
            let pinged = worker.clone();
            other.on_message(move |_, other, _| {
                let _ = pinged.send(b"ping").unwrap();
                let other = other.clone();
                let log = log.clone();
                pinged.on_message(move |_, _, _| {
                    log.add("answered");
                    other.disconnect();
                });
            });
            master.run().unwrap();
            assert_eq!(master.workers(), std::slice::from_ref(&worker));
            worker.process().reference();
            worker.process().reference();
            worker.disconnect();
        },
        |worker| {
            match worker.id().get() {
                1 => drop(worker.on_message(|worker, _| {
                    let _ = worker.send(b"pong").unwrap();
                })),
                _ => drop(worker.send(b"ping the other worker").unwrap()),
            }
            worker.run().unwrap();
        },
    );
    let mut entries = entries.take();
    // The position of the first worker's `online` event varies, because no `run` waits for the
    // event.
    let before = entries.len();
    entries.retain(|entry| entry != "1 online");
    assert_eq!(before - entries.len(), 1);
    let expected = [
        "1 fork",
        "run returned",
        "2 fork",
        "2 online",
        "answered",
        "2 disconnect Some(true)",
        "2 exit Some(true) exit status: 0",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries, expected);
}
