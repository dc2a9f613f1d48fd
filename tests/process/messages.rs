//! Tests messages in both directions: order, size, descriptors, backpressure, and closed channels.

use std::cell::Cell;
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use cluster::{Error, SendError, Sent, Signal};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use crate::harness::{Log, cluster, open_fds};

crate::scenarios! {
    messages_arrive_once_and_in_order
    message_sent_before_the_worker_is_online_arrives
    cluster_on_message_is_called_before_worker_on_message
    descriptors_stay_with_their_messages
    descriptors_that_are_not_taken_are_closed
    final_messages_keep_a_bounded_number_of_descriptors_open
    send_reports_backpressure_of_a_worker_that_does_not_read
    send_after_disconnect_is_an_error_and_an_event
    error_in_on_error_does_not_block_the_loop
    error_in_on_error_does_not_delay_the_exit
    both_sides_can_send_large_messages_at_once
}

fn messages_arrive_once_and_in_order() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            let count = Cell::new(0u32);
            worker.on_message(move |_, worker, message| {
                let number = u32::from_le_bytes(message.bytes().try_into().unwrap());
                assert_eq!(number, count.replace(number + 1));
                if number == 9999 {
                    log.add("all");
                    worker.disconnect();
                }
            });
            for number in 0..10_000u32 {
                let _ = worker.send(&number.to_le_bytes()).unwrap();
            }
        },
        |worker| {
            worker.on_message(|worker, message| {
                let _ = worker.send(message.bytes()).unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["all"]);
}

fn message_sent_before_the_worker_is_online_arrives() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            assert_eq!(worker.send(b"early").unwrap(), Sent::Continue);
            assert_eq!(
                worker.send(b"").unwrap(),
                Sent::Continue,
                "an empty message is a message"
            );
            worker.on_message(move |_, _, message| {
                log.add(String::from_utf8_lossy(message.bytes()));
            });
        },
        |worker| {
            let count = Cell::new(0);
            worker.on_message(move |worker, message| {
                let _ = worker.send(message.bytes()).unwrap();
                count.set(count.get() + 1);
                if count.get() == 2 {
                    worker.disconnect();
                }
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["early", ""]);
}

fn cluster_on_message_is_called_before_worker_on_message() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            let (first, second) = (log.clone(), log);
            worker.on_message(move |_, worker, _| {
                second.add("worker");
                worker.disconnect();
            });
            master.on_message(move |_, _, message| {
                assert_eq!(message.bytes(), b"one");
                first.add("cluster");
            });
        },
        |worker| {
            let _ = worker.send(b"one").unwrap();
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["cluster", "worker"]);
}

fn descriptors_stay_with_their_messages() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            worker.on_message(move |_, worker, message| {
                let name = String::from_utf8_lossy(message.bytes()).into_owned();
                for fd in message.take_fds() {
                    let mut file = File::from(fd);
                    file.rewind().unwrap();
                    let mut content = String::new();
                    file.read_to_string(&mut content).unwrap();
                    assert_eq!(content, name);
                    log.add(name.clone());
                }
                if name == "end" {
                    worker.disconnect();
                }
            });
        },
        |worker| {
            for number in 0..100usize {
                let name = format!("message {number}");
                let fds = (0..number % 5).map(|_| {
                    let mut file = tempfile::tempfile().unwrap();
                    file.write_all(name.as_bytes()).unwrap();
                    file.into()
                });
                let _ = worker
                    .send_with_fds(name.as_bytes(), fds.collect())
                    .unwrap();
            }
            let _ = worker.send(b"end").unwrap();
            worker.run().unwrap();
        },
    );
    let expected: Vec<_> = (0..100)
        .flat_map(|number| vec![format!("message {number}"); number % 5])
        .collect();
    assert_eq!(entries.take(), expected);
}

fn descriptors_that_are_not_taken_are_closed() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            let (mut kept, sent) = UnixStream::pair().unwrap();
            let _ = worker
                .send_with_fds(b"not taken", vec![sent.into()])
                .unwrap();
            worker.on_message(move |_, worker, _| {
                let mut rest = Vec::new();
                kept.read_to_end(&mut rest).unwrap();
                log.add("closed");
                worker.disconnect();
            });
        },
        |worker| {
            worker.on_message(|worker, _| {
                worker.set_timeout(std::time::Duration::ZERO, |worker| {
                    let _ = worker.send(b"seen").unwrap();
                });
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["closed"]);
}

/// Checks that the master never has more than 256 descriptors of final messages open.
///
/// The worker sends messages with descriptors until its socket is full and then kills itself. The
/// master reads these messages together with the exit.
fn final_messages_keep_a_bounded_number_of_descriptors_open() {
    const FDS_MAX: usize = 256;
    let errors = Rc::new(Cell::new(0));
    let (counted, before) = (Rc::clone(&errors), Cell::new(0));
    let peak = Rc::new(Cell::new(0));
    let highest = Rc::clone(&peak);
    let received = Rc::new(Cell::new(0));
    let count = Rc::clone(&received);
    cluster(
        |master| {
            master.on_error(move |_, _, error| {
                assert!(matches!(error, Error::Exhausted { .. }), "{error}");
                counted.set(counted.get() + 1);
            });
            before.set(open_fds().len());
            master.on_message(move |_, _, _| {
                count.set(count.get() + 1);
                highest.set(highest.get().max(open_fds().len() - before.get()));
            });
            let worker = master.fork().unwrap();
            let pid = Pid::from_raw(i32::try_from(worker.process().id()).unwrap());
            waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).unwrap();
        },
        |worker| {
            let null = File::open("/dev/null").unwrap();
            let fds = || (0..16).map(|_| null.try_clone().unwrap().into()).collect();
            while worker.send_with_fds(&[0; 64], fds()).unwrap() == Sent::Continue {}
            nix::sys::signal::raise(nix::sys::signal::SIGKILL).unwrap();
        },
    );
    println!(
        "{} messages, {} descriptors, {} errors",
        received.get(),
        peak.get(),
        errors.get()
    );
    assert!(
        received.get() > 100,
        "the socket buffer holds too few messages"
    );
    assert!(peak.get() <= FDS_MAX, "{} descriptors", peak.get());
    assert!(errors.get() > 0);
}

fn send_reports_backpressure_of_a_worker_that_does_not_read() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            master.on_error(move |_, worker, error| {
                assert!(worker.is_some());
                log.add(error.to_string());
            });
            worker.on_online(|_, worker| {
                worker.process().kill(Signal::STOP);
                let message = vec![0; 64 << 10];
                let mut paused = 0;
                let error = loop {
                    match worker.send(&message) {
                        Ok(Sent::Continue) => assert_eq!(paused, 0),
                        Ok(_) => paused += 1,
                        Err(error) => break error,
                    }
                };
                let full = SendError::QueueFull;
                assert!(matches!(error, Error::Send { reason, .. } if reason == full));
                assert!(paused > 100, "8 MiB in pieces of 64 KiB");
                assert!(worker.is_connected(), "the channel stays open");
                worker.process().kill(Signal::KILL);
            });
        },
        |worker| worker.run().unwrap(),
    );
    assert_eq!(
        entries.take(),
        ["cannot send to worker 1: too many bytes are waiting to be sent"]
    );
}

fn send_after_disconnect_is_an_error_and_an_event() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            let (own, all) = (log.clone(), log);
            worker.on_error(move |_, _, error| own.add(format!("worker: {error}")));
            master.on_error(move |_, _, error| all.add(format!("cluster: {error}")));
            worker.on_disconnect(|_, worker| {
                let error = worker.send(b"hello?").unwrap_err();
                assert!(matches!(
                    error,
                    Error::Send {
                        reason: SendError::ChannelClosed,
                        ..
                    }
                ));
            });
        },
        |_| {},
    );
    let text = "cannot send to worker 1: the channel is closed";
    assert_eq!(
        entries.take(),
        [format!("worker: {text}"), format!("cluster: {text}")]
    );
}

fn error_in_on_error_does_not_block_the_loop() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            // Provoke an endless chain: as long as the worker is stopped and its channel is full,
            // each error callback causes the next error.
            worker.on_error(|_, worker, _| {
                let _ = worker.send(&[0; 64 << 10]);
            });
            worker.on_online(move |master, worker| {
                worker.process().kill(Signal::STOP);
                while worker.send(&[0; 64 << 10]).is_ok() {}
                let (worker, log) = (worker.clone(), log.clone());
                master.set_timeout(std::time::Duration::from_millis(1), move |_| {
                    log.add("the timer fired");
                    worker.process().kill(Signal::KILL);
                });
            });
        },
        |worker| worker.run().unwrap(),
    );
    assert_eq!(entries.take(), ["the timer fired"]);
}

fn error_in_on_error_does_not_delay_the_exit() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            worker.on_disconnect(|_, worker| drop(worker.send(b"x").unwrap_err()));
            worker.on_error(|_, worker, _| drop(worker.send(b"x").unwrap_err()));
            worker.on_exit(move |_, _, _| log.add("exit"));
        },
        |_| {},
    );
    assert_eq!(entries.take(), ["exit"]);
}

fn both_sides_can_send_large_messages_at_once() {
    let log = Log::default();
    let entries = log.clone();
    const COUNT: usize = 50;
    cluster(
        |master| {
            let worker = master.fork().unwrap();
            let message = vec![1; 100_000];
            for _ in 0..COUNT {
                let file = tempfile::tempfile().unwrap();
                let _ = worker.send_with_fds(&message, vec![file.into()]).unwrap();
            }
            let seen = Rc::new(Cell::new(0));
            worker.on_message(move |_, worker, message| {
                assert_eq!(
                    (message.bytes().len(), message.take_fds().len()),
                    (100_000, 1)
                );
                seen.set(seen.get() + 1);
                if seen.get() == COUNT {
                    log.add("all");
                    worker.disconnect();
                }
            });
        },
        |worker| {
            let message = vec![2; 100_000];
            for _ in 0..COUNT {
                let file = tempfile::tempfile().unwrap();
                let _ = worker.send_with_fds(&message, vec![file.into()]).unwrap();
            }
            worker.on_message(|_, message| {
                assert_eq!(
                    (message.bytes().len(), message.take_fds().len()),
                    (100_000, 1)
                );
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(entries.take(), ["all"]);
}
