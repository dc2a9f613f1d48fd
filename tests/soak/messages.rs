//! Sends short and long messages to a worker and back, with and without descriptors.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use cluster::{Master, Message, SendOptions, Worker};

use crate::harness::cluster;
use crate::long_lived::{LongLived, ORDER, run_orders, run_until};
use crate::measure::{Sample, Series};

crate::scenarios! {
    messages_leave_memory_bounded
}

/// Maximum number of messages in flight.
const AT_ONCE: u64 = 500;
const LONGEST: usize = 1 << 20;

fn messages_leave_memory_bounded() {
    cluster(exchange, |worker| {
        worker.on_message(echo);
        run_orders(&worker, |_, _| unreachable!());
    });
}

fn echo(worker: &Worker, message: &Message) {
    if message.bytes().starts_with(ORDER.as_bytes()) {
        return;
    }
    let fds = message.take_fds().into_iter();
    let options = fds.fold(SendOptions::new(), SendOptions::fd);
    let _ = worker.send_with(message.bytes(), options).unwrap();
}

/// Returns the length in bytes of the message with this number.
fn length(number: u64) -> usize {
    match number % 500 {
        77 => LONGEST,
        rest => 8 + usize::try_from(rest % 200).unwrap(),
    }
}

/// Returns the number of descriptors of the message with this number.
fn descriptors(number: u64) -> u64 {
    match number % 1000 {
        1 => 16,
        rest if rest % 64 == 2 => 1,
        _ => 0,
    }
}

#[derive(Default)]
struct Counters {
    sent: Cell<u64>,
    written: Cell<u64>,
    returned: Cell<u64>,
}

fn exchange(master: &Master) {
    let counters = Rc::new(Counters::default());
    master.on_error(|_, _, error| panic!("{error}"));
    let counted = Rc::clone(&counters);
    master.on_message(move |_, _, message| check(message, &counted));
    let mut long_lived = LongLived::new(master.fork().unwrap(), "messages");
    let mut series = Series::new("messages, master");
    let null = File::open("/dev/null").unwrap();
    for round in 1..=crate::ROUNDS {
        let last = round * crate::work_per_round(50_000);
        while counters.sent.get() < last {
            let batch = AT_ONCE.min(last - counters.sent.get());
            for _ in 0..batch {
                send(long_lived.worker(), &counters, &null);
            }
            run_until(master, || counters.returned.get() == counters.sent.get());
        }
        run_until(master, || counters.written.get() == counters.sent.get());
        long_lived.measure(master);
        series.add(Sample::now());
    }
    drop(null);
    println!("messages: {} round trips", counters.returned.get());
    series.check();
    long_lived.check();
    master.disconnect();
}

fn send(worker: &cluster::WorkerProcess, counters: &Rc<Counters>, null: &File) {
    let number = counters.sent.get();
    counters.sent.set(number + 1);
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.resize(length(number), 0);
    let copies = (0..descriptors(number)).map(|_| OwnedFd::from(null.try_clone().unwrap()));
    let options = copies.fold(SendOptions::new(), SendOptions::fd);
    let counted = Rc::clone(counters);
    let options = options.on_written(move |_, result| {
        result.unwrap();
        counted.written.set(counted.written.get() + 1);
    });
    let _ = worker.send_with(&bytes, options).unwrap();
}

/// Checks that a returned message is complete and in order.
fn check(message: &Message, counters: &Counters) {
    let bytes = message.bytes();
    if bytes.starts_with(ORDER.as_bytes()) {
        return;
    }
    let number = counters.returned.get();
    assert_eq!(bytes[..8], number.to_le_bytes());
    assert_eq!(bytes.len(), length(number));
    assert_eq!(message.take_fds().len() as u64, descriptors(number));
    counters.returned.set(number + 1);
}
