//! Word of when a message is written, the order of messages, and those that have to wait.

use std::cell::{Cell, RefCell};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use cluster::{Error, Message, SendError, SendOptions, Signal, Worker, WorkerProcess};

use crate::harness::StoppedMaster;
use crate::harness::{Log, cluster, note_events, note_messages, stop};

crate::scenarios! {
    written_is_told_once_and_never_inside_the_call
    written_is_told_while_a_worker_waits_in_accept
    written_is_an_error_when_the_worker_is_gone
    written_is_an_error_when_the_master_has_gone
    a_send_that_fails_calls_nothing_back
    messages_keep_their_order_with_and_without_descriptors
    nothing_is_lost_above_the_high_water_mark
    a_chain_of_messages_keeps_nothing_else_from_happening
}

pub(super) fn is_refused(outcome: cluster::Result<bool>, expected: SendError) {
    match outcome {
        Err(Error::Send { reason, .. }) => assert_eq!(reason, expected),
        outcome => panic!("{outcome:?}"),
    }
}

/// Notes how often each message was told to be written, or lost; panics inside the call.
#[derive(Clone, Default)]
struct Told {
    inside: Rc<Cell<bool>>,
    outcomes: Rc<RefCell<Vec<(usize, bool)>>>,
    sent: Rc<Cell<usize>>,
}

impl Told {
    /// Sends one more, with the length given. Returns what `send_with` does.
    fn send<R: 'static>(
        &self,
        length: usize,
        send: impl FnOnce(&[u8], SendOptions<R>) -> cluster::Result<bool>,
    ) -> bool {
        let number = self.sent.replace(self.sent.get() + 1);
        let told = self.clone();
        let options = SendOptions::new().on_written(move |_, outcome| {
            assert!(!told.inside.get(), "inside the call");
            if let Err(error) = &outcome {
                let reason = SendError::ChannelClosed;
                assert!(matches!(error, Error::Send { reason: r, .. } if *r == reason));
            }
            told.outcomes.borrow_mut().push((number, outcome.is_ok()));
        });
        self.inside.set(true);
        let sent = send(&vec![0; length], options).unwrap();
        self.inside.set(false);
        sent
    }

    /// Sends to whoever does not read, until it is told to pause this many times.
    fn fill<R: 'static>(
        &self,
        mut send: impl FnMut(&[u8], SendOptions<R>) -> cluster::Result<bool>,
    ) {
        let mut pauses = 0;
        while pauses < 10 {
            pauses += u32::from(!self.send(30_000, &mut send));
        }
        assert!(self.outcomes.borrow().is_empty(), "inside a call");
    }

    /// Each once and in the order of sending; those that are lost are the last.
    fn check(&self) -> (usize, usize) {
        let outcomes = self.outcomes.take();
        let numbers: Vec<_> = outcomes.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, (0..self.sent.get()).collect::<Vec<_>>());
        let written = outcomes.partition_point(|(_, written)| *written);
        assert!(outcomes[written..].iter().all(|(_, written)| !written));
        (written, outcomes.len() - written)
    }
}

fn written_is_told_once_and_never_inside_the_call() {
    let log = Log::default();
    let entries = log.clone();
    let told = Told::default();
    let in_master = told.clone();
    cluster(
        |master| {
            note_events(master, &log);
            note_messages(master, &log);
            let worker = master.fork().unwrap();
            for length in [0, 1, 100_000, 1 << 20, 3] {
                told.send(length, |bytes, options| worker.send_with(bytes, options));
            }
        },
        |worker| {
            let count = Cell::new(0);
            let told = Told::default();
            worker.on_message(move |worker, message| {
                told.send(message.bytes().len(), |bytes, options| {
                    worker.send_with(bytes, options)
                });
                count.set(count.get() + 1);
                if count.get() < 5 {
                    return;
                }
                let told = told.clone();
                let last = SendOptions::new().on_written(move |worker: &Worker, outcome| {
                    outcome.unwrap();
                    assert_eq!(told.check(), (5, 0));
                    worker.disconnect();
                });
                worker.send_with(b"last", last).unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(in_master.check(), (5, 0));
    let mut entries = entries.take();
    let end = entries.split_off(entries.len() - 3);
    let expected = [
        "1 last",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(end, expected);
    assert_eq!(entries.len(), 2 + 5);
}

fn written_is_told_while_a_worker_waits_in_accept() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            note_messages(master, &log);
            let worker = master.fork().unwrap();
            worker.on_message(|_, worker, message| {
                if message.bytes() == b"written" {
                    worker.disconnect();
                }
            });
        },
        |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            let options = SendOptions::new().on_written(|worker: &Worker, outcome| {
                outcome.unwrap();
                worker.send(b"written").unwrap();
            });
            worker.send_with(b"message", options).unwrap();
            assert!(listener.accept().unwrap().is_none());
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 listening",
        "1 message",
        "1 written",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn written_is_an_error_when_the_worker_is_gone() {
    let log = Log::default();
    let entries = log.clone();
    let told = Told::default();
    let in_master = told.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            worker.on_online(move |_, worker| {
                stop(worker);
                told.fill(|bytes, options| worker.send_with(bytes, options));
                worker.process().kill(Signal::KILL);
                let told = told.clone();
                // The last event comes after all of them.
                worker.on_exit(move |_, _, _| {
                    assert_eq!(told.outcomes.borrow().len(), told.sent.get());
                });
            });
        },
        |worker| worker.run().unwrap(),
    );
    let (written, lost) = in_master.check();
    assert!(written > 0 && lost > 0, "{written} written, {lost} lost");
    let expected = [
        "1 fork",
        "1 online",
        "1 disconnect Some(false)",
        "1 exit Some(false) signal: 9 (SIGKILL)",
    ];
    assert_eq!(entries.take(), expected);
}

fn written_is_an_error_when_the_master_has_gone() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            // It reads nothing until the worker has written what it could, and then never.
            worker.on_message(|_, worker, message| {
                let Some(fd) = message.take_fds().pop() else {
                    return;
                };
                let filled = &mut UnixStream::from(fd);
                filled.read_exact(&mut [0]).unwrap();
                worker.process().disconnect();
            });
        },
        |worker| {
            let (mut filled, theirs) = UnixStream::pair().unwrap();
            worker.send_with_fds(b"wait", vec![theirs.into()]).unwrap();
            let told = Told::default();
            told.fill(|bytes, options| worker.send_with(bytes, options));
            filled.write_all(b"x").unwrap();
            worker.on_error(|_, error| panic!("{error}"));
            worker.run().unwrap();
            assert_eq!(worker.exited_after_disconnect(), Some(false));
            let (written, lost) = told.check();
            assert!(written > 0 && lost > 0, "{written} written, {lost} lost");
            is_refused(worker.send(b"x"), SendError::ChannelClosed);
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "1 disconnect Some(false)",
        "1 exit Some(false) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

fn a_send_that_fails_calls_nothing_back() {
    let log = Log::default();
    let entries = log.clone();
    fn never<R>() -> SendOptions<R> {
        SendOptions::new().on_written(|_, _| panic!("send_with has failed"))
    }
    let too_long = vec![0; (1 << 20) + 1];
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            is_refused(worker.send_with(&too_long, never()), SendError::TooLong);
            worker.on_online(|_, worker| {
                stop(worker);
                while worker.send(&[0; 64 << 10]).is_ok() {}
                let full = worker.send_with(&[0; 64 << 10], never());
                is_refused(full, SendError::QueueFull);
                worker.process().kill(Signal::KILL);
            });
            let closed = |_: &_, worker: &WorkerProcess| {
                is_refused(worker.send_with(b"", never()), SendError::ChannelClosed);
            };
            worker.on_disconnect(closed);
            worker.on_exit(move |master, worker, _| closed(master, worker));
        },
        |worker| {
            let outcome = worker.send_with(&vec![0; (1 << 20) + 1], never());
            is_refused(outcome, SendError::TooLong);
            worker.on_message(|_, _| {});
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "cannot send to worker 1: longer than 1048576 bytes",
        "1 online",
        "cannot send to worker 1: too much waits to be sent",
        "cannot send to worker 1: too much waits to be sent",
        "1 disconnect Some(false)",
        "cannot send to worker 1: the channel is closed",
        "1 exit Some(false) signal: 9 (SIGKILL)",
    ];
    assert_eq!(entries.take(), expected);
}

/// The number, then bytes that are up to that many: short and long ones in turn.
fn numbered(number: u32) -> Vec<u8> {
    let length = [0, 3, 70_000, 10, 200_000][number as usize % 5];
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.resize(4 + length, number.to_le_bytes()[0]);
    bytes
}

fn fds_of(number: u32) -> usize {
    [0, 1, 0, 16, 2, 0, 0][number as usize % 7]
}

const MESSAGES: u32 = 140;

fn send_all<R: 'static>(mut send: impl FnMut(&[u8], SendOptions<R>) -> cluster::Result<bool>) {
    for number in 0..MESSAGES {
        let mut options = SendOptions::new();
        for _ in 0..fds_of(number) {
            let (end, mut writer) = UnixStream::pair().unwrap();
            writer.write_all(&number.to_le_bytes()).unwrap();
            options = options.fd(end);
        }
        send(&numbered(number), options).unwrap();
    }
}

/// Takes the next one. Returns whether it was the last.
fn take_one(next: &Cell<u32>, message: &Message) -> bool {
    let number = next.replace(next.get() + 1);
    assert!(message.bytes() == numbered(number), "message {number}");
    let fds = message.take_fds();
    assert_eq!(fds.len(), fds_of(number), "of message {number}");
    for fd in fds {
        let mut content = Vec::new();
        UnixStream::from(fd).read_to_end(&mut content).unwrap();
        assert_eq!(content, number.to_le_bytes());
    }
    next.get() == MESSAGES
}

fn messages_keep_their_order_with_and_without_descriptors() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            send_all(|bytes, options| worker.send_with(bytes, options));
            let next = Cell::new(0);
            worker.on_message(move |_, worker, message| {
                if take_one(&next, message) {
                    worker.disconnect();
                }
            });
        },
        |worker| {
            let next = Rc::new(Cell::new(0));
            let received = Rc::clone(&next);
            worker.on_message(move |_, message| {
                take_one(&next, message);
            });
            send_all(|bytes, options| worker.send_with(bytes, options));
            worker.run().unwrap();
            assert_eq!(received.get(), MESSAGES);
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

const PIECE: usize = 10_000;

/// Sends numbered pieces until told to pause a few times, and returns how many.
fn send_beyond(mut send: impl FnMut(&[u8]) -> cluster::Result<bool>) -> u32 {
    let mut pauses = 0;
    let mut sent = 0u32;
    while pauses < 20 {
        let mut piece = sent.to_le_bytes().to_vec();
        piece.resize(PIECE, 0);
        let may_go_on = send(&piece).unwrap();
        assert!(!may_go_on || pauses == 0, "there is less room than before");
        pauses += u32::from(!may_go_on);
        sent += 1;
    }
    sent
}

/// The other side is stopped meanwhile.
fn nothing_is_lost_above_the_high_water_mark() {
    let log = Log::default();
    let entries = log.clone();
    let in_order = |next: &Cell<u32>, bytes: &[u8]| {
        let number = next.replace(next.get() + 1);
        assert_eq!(bytes[..4], number.to_le_bytes());
        assert_eq!(bytes.len(), PIECE);
    };
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            let count = Rc::new(Cell::new(0));
            let sent = Rc::clone(&count);
            worker.on_online(move |_, worker| {
                stop(worker);
                sent.set(send_beyond(|bytes| worker.send(bytes)));
                worker.send(b"end").unwrap();
                worker.process().kill(Signal::CONT);
            });
            let (next, at_end) = (Cell::new(0u32), log.clone());
            worker.on_message(move |_, worker, message| match message.bytes() {
                [b'g', b'o', b't', number @ ..] => {
                    assert_eq!(number, count.get().to_le_bytes());
                    assert!(worker.send(b"").unwrap(), "there is room again");
                    at_end.add("all there");
                }
                [b's', b'e', b'n', b't', number @ ..] => {
                    assert_eq!(number, next.get().to_le_bytes());
                    at_end.add("all here");
                    worker.disconnect();
                }
                bytes => in_order(&next, bytes),
            });
        },
        |worker| {
            let next = Cell::new(0u32);
            worker.on_message(move |worker, message| match message.bytes() {
                b"end" => {
                    let got = [&b"got"[..], &next.get().to_le_bytes()].concat();
                    worker.send(&got).unwrap();
                }
                b"" => {
                    let stopped = StoppedMaster::new();
                    let sent = send_beyond(|bytes| worker.send(bytes));
                    drop(stopped);
                    let sent = [&b"sent"[..], &sent.to_le_bytes()].concat();
                    worker.send(&sent).unwrap();
                }
                bytes => in_order(&next, bytes),
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "all there",
        "all here",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

/// Whoever sends the next one as soon as one is written never comes to an end.
fn a_chain_of_messages_keeps_nothing_else_from_happening() {
    fn next(worker: &WorkerProcess) {
        let own = worker.clone();
        let options = SendOptions::new().on_written(move |_, outcome| {
            if outcome.is_ok() && own.is_connected() {
                next(&own);
            }
        });
        let _ = worker.send_with(b"", options);
    }
    fn next_in_worker(worker: &Worker) {
        let options = SendOptions::new().on_written(|worker: &Worker, _| {
            if worker.is_connected() {
                next_in_worker(worker);
            }
        });
        let _ = worker.send_with(b"", options);
    }
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            master.fork().unwrap().on_online(move |master, worker| {
                next(worker);
                let (log, worker) = (log.clone(), worker.clone());
                master.set_timeout(Duration::from_millis(1), move |_| {
                    log.add("the timer");
                    worker.send(b"leave").unwrap();
                });
            });
        },
        |worker| {
            next_in_worker(&worker);
            worker.on_message(|worker, message| {
                if message.bytes() == b"leave" {
                    worker.set_timeout(Duration::from_millis(1), |worker| {
                        worker.disconnect();
                    });
                }
            });
            worker.run().unwrap();
        },
    );
    let entries: Vec<_> = entries.take();
    let expected = [
        "1 fork",
        "1 online",
        "the timer",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries, expected);
}
