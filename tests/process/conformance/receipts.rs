//! Tests `on_written`, the order of messages, and messages that wait in the queue.

use std::cell::{Cell, RefCell};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use cluster::{Error, Message, SendError, SendOptions, Sent, Signal, Worker, WorkerProcess};

use crate::harness::StoppedMaster;
use crate::harness::{Log, cluster, note_events, note_messages, stop};

crate::scenarios! {
    on_written_runs_once_and_never_inside_send
    on_written_runs_while_the_worker_waits_in_accept
    on_written_reports_an_error_when_the_worker_is_killed
    on_written_reports_an_error_when_the_master_closes_the_channel
    failed_send_never_calls_on_written
    messages_keep_their_order_with_and_without_descriptors
    messages_above_the_high_water_mark_are_not_lost
    chain_of_messages_does_not_starve_other_events
}

pub(super) fn is_refused(outcome: cluster::Result<Sent>, expected: SendError) {
    match outcome {
        Err(Error::Send { reason, .. }) => assert_eq!(reason, expected),
        outcome => panic!("{outcome:?}"),
    }
}

/// Records each message's outcome. Panics if `on_written` runs inside `send_with`.
#[derive(Clone, Default)]
struct Receipts {
    inside: Rc<Cell<bool>>,
    outcomes: Rc<RefCell<Vec<(usize, bool)>>>,
    sent: Rc<Cell<usize>>,
}

impl Receipts {
    /// Sends a message of `length` bytes and returns the result of `send_with`.
    fn send<R: 'static>(
        &self,
        length: usize,
        send: impl FnOnce(&[u8], SendOptions<R>) -> cluster::Result<Sent>,
    ) -> Sent {
        let number = self.sent.replace(self.sent.get() + 1);
        let receipts = self.clone();
        let options = SendOptions::new().on_written(move |_, outcome| {
            assert!(!receipts.inside.get(), "called inside send_with");
            if let Err(error) = &outcome {
                let reason = SendError::ChannelClosed;
                assert!(matches!(error, Error::Send { reason: r, .. } if *r == reason));
            }
            receipts
                .outcomes
                .borrow_mut()
                .push((number, outcome.is_ok()));
        });
        self.inside.set(true);
        let sent = send(&vec![0; length], options).unwrap();
        self.inside.set(false);
        sent
    }

    /// Sends to a peer that does not read, until `send_with` has returned `Sent::Pause` ten times.
    fn fill<R: 'static>(
        &self,
        mut send: impl FnMut(&[u8], SendOptions<R>) -> cluster::Result<Sent>,
    ) {
        let mut pauses = 0;
        while pauses < 10 {
            pauses += u32::from(self.send(30_000, &mut send) == Sent::Pause);
        }
        assert!(self.outcomes.borrow().is_empty(), "called inside send_with");
    }

    /// Asserts that each message has one outcome, in the order of sending, and that all lost
    /// messages come last. Returns the numbers of written and lost messages.
    fn check(&self) -> (usize, usize) {
        let outcomes = self.outcomes.take();
        let numbers: Vec<_> = outcomes.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, (0..self.sent.get()).collect::<Vec<_>>());
        let written = outcomes.partition_point(|(_, written)| *written);
        assert!(outcomes[written..].iter().all(|(_, written)| !written));
        (written, outcomes.len() - written)
    }
}

fn on_written_runs_once_and_never_inside_send() {
    let log = Log::default();
    let entries = log.clone();
    let receipts = Receipts::default();
    let master_receipts = receipts.clone();
    cluster(
        |master| {
            note_events(master, &log);
            note_messages(master, &log);
            let worker = master.fork().unwrap();
            for length in [0, 1, 100_000, 1 << 20, 3] {
                let _ = receipts.send(length, |bytes, options| worker.send_with(bytes, options));
            }
        },
        |worker| {
            let count = Cell::new(0);
            let receipts = Receipts::default();
            worker.on_message(move |worker, message| {
                let _ = receipts.send(message.bytes().len(), |bytes, options| {
                    worker.send_with(bytes, options)
                });
                count.set(count.get() + 1);
                if count.get() < 5 {
                    return;
                }
                let receipts = receipts.clone();
                let last = SendOptions::new().on_written(move |worker: &Worker, outcome| {
                    outcome.unwrap();
                    assert_eq!(receipts.check(), (5, 0));
                    worker.disconnect();
                });
                let _ = worker.send_with(b"last", last).unwrap();
            });
            worker.run().unwrap();
        },
    );
    assert_eq!(master_receipts.check(), (5, 0));
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

fn on_written_runs_while_the_worker_waits_in_accept() {
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
                let _ = worker.send(b"written").unwrap();
            });
            let _ = worker.send_with(b"message", options).unwrap();
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

fn on_written_reports_an_error_when_the_worker_is_killed() {
    let log = Log::default();
    let entries = log.clone();
    let receipts = Receipts::default();
    let master_receipts = receipts.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            worker.on_online(move |_, worker| {
                stop(worker);
                receipts.fill(|bytes, options| worker.send_with(bytes, options));
                worker.process().kill(Signal::KILL);
                let receipts = receipts.clone();
                // All outcomes must precede the `exit` event.
                worker.on_exit(move |_, _, _| {
                    assert_eq!(receipts.outcomes.borrow().len(), receipts.sent.get());
                });
            });
        },
        |worker| worker.run().unwrap(),
    );
    let (written, lost) = master_receipts.check();
    assert!(written > 0 && lost > 0, "{written} written, {lost} lost");
    let expected = [
        "1 fork",
        "1 online",
        "1 disconnect Some(false)",
        "1 exit Some(false) signal: 9 (SIGKILL)",
    ];
    assert_eq!(entries.take(), expected);
}

fn on_written_reports_an_error_when_the_master_closes_the_channel() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let worker = master.fork().unwrap();
            // Block in the callback until the worker has filled the channel. The master then closes
            // the channel without reading.
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
            let _ = worker.send_with_fds(b"wait", vec![theirs.into()]).unwrap();
            let receipts = Receipts::default();
            receipts.fill(|bytes, options| worker.send_with(bytes, options));
            filled.write_all(b"x").unwrap();
            worker.on_error(|_, error| panic!("{error}"));
            worker.run().unwrap();
            assert_eq!(worker.exited_after_disconnect(), Some(false));
            let (written, lost) = receipts.check();
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

fn failed_send_never_calls_on_written() {
    let log = Log::default();
    let entries = log.clone();
    fn never<R>() -> SendOptions<R> {
        SendOptions::new().on_written(|_, _| panic!("called although send_with failed"))
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
        "cannot send to worker 1: the message is longer than 1048576 bytes",
        "1 online",
        "cannot send to worker 1: too many bytes are waiting to be sent",
        "cannot send to worker 1: too many bytes are waiting to be sent",
        "1 disconnect Some(false)",
        "cannot send to worker 1: the channel is closed",
        "1 exit Some(false) signal: 9 (SIGKILL)",
    ];
    assert_eq!(entries.take(), expected);
}

/// Returns the content of a message: its number and a filler. The length of the filler depends on
/// the number.
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

fn send_all<R: 'static>(mut send: impl FnMut(&[u8], SendOptions<R>) -> cluster::Result<Sent>) {
    for number in 0..MESSAGES {
        let mut options = SendOptions::new();
        for _ in 0..fds_of(number) {
            let (end, mut writer) = UnixStream::pair().unwrap();
            writer.write_all(&number.to_le_bytes()).unwrap();
            options = options.fd(end);
        }
        let _ = send(&numbered(number), options).unwrap();
    }
}

/// Checks the next message and returns whether it was the last.
fn check_next(next: &Cell<u32>, message: &Message) -> bool {
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
                if check_next(&next, message) {
                    worker.disconnect();
                }
            });
        },
        |worker| {
            let next = Rc::new(Cell::new(0));
            let received = Rc::clone(&next);
            worker.on_message(move |_, message| {
                check_next(&next, message);
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

/// Sends numbered pieces until `send` has returned `Sent::Pause` 20 times. Returns the number of
/// pieces.
fn send_beyond(mut send: impl FnMut(&[u8]) -> cluster::Result<Sent>) -> u32 {
    let mut pauses = 0;
    let mut sent = 0u32;
    while pauses < 20 {
        let mut piece = sent.to_le_bytes().to_vec();
        piece.resize(PIECE, 0);
        let is_paused = send(&piece).unwrap() == Sent::Pause;
        assert!(
            is_paused || pauses == 0,
            "the queue only grows, so send must go on advising a pause"
        );
        pauses += u32::from(is_paused);
        sent += 1;
    }
    sent
}

/// Checks that no message is lost when the queue exceeds the high-water mark. The receiver is
/// stopped while the sender fills the queue.
fn messages_above_the_high_water_mark_are_not_lost() {
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
                let _ = worker.send(b"end").unwrap();
                worker.process().kill(Signal::CONT);
            });
            let (next, at_end) = (Cell::new(0u32), log.clone());
            worker.on_message(move |_, worker, message| match message.bytes() {
                [b'g', b'o', b't', number @ ..] => {
                    assert_eq!(number, count.get().to_le_bytes());
                    assert_eq!(
                        worker.send(b"").unwrap(),
                        Sent::Continue,
                        "below the high-water mark again"
                    );
                    at_end.add("worker received all");
                }
                [b's', b'e', b'n', b't', number @ ..] => {
                    assert_eq!(number, next.get().to_le_bytes());
                    at_end.add("master received all");
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
                    let _ = worker.send(&got).unwrap();
                }
                b"" => {
                    let stopped = StoppedMaster::new();
                    let sent = send_beyond(|bytes| worker.send(bytes));
                    drop(stopped);
                    let sent = [&b"sent"[..], &sent.to_le_bytes()].concat();
                    let _ = worker.send(&sent).unwrap();
                }
                bytes => in_order(&next, bytes),
            });
            worker.run().unwrap();
        },
    );
    let expected = [
        "1 fork",
        "1 online",
        "worker received all",
        "master received all",
        "1 disconnect Some(true)",
        "1 exit Some(true) exit status: 0",
    ];
    assert_eq!(entries.take(), expected);
}

/// Checks that other events are processed although each `on_written` callback sends the next
/// message.
fn chain_of_messages_does_not_starve_other_events() {
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
                    let _ = worker.send(b"disconnect").unwrap();
                });
            });
        },
        |worker| {
            next_in_worker(&worker);
            worker.on_message(|worker, message| {
                if message.bytes() == b"disconnect" {
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
