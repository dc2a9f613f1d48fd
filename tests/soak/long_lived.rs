//! The worker that lives through all rounds, and does in them what the master orders.

use std::cell::RefCell;
use std::rc::Rc;

use cluster::{Master, Worker, WorkerProcess};

use crate::measure::{Sample, Series};

/// What orders and the answers to them begin with, unlike all other messages.
pub const ORDER: &str = "order ";
const MEASURE: &str = "order measure";

/// In the worker: does what it is told, outside of any callback, until it is to leave.
pub fn obey(worker: &Worker, job: impl Fn(&Worker, u64)) {
    let order = Rc::new(RefCell::new(None));
    let received = Rc::clone(&order);
    worker.on_message(move |_, message| {
        let text = std::str::from_utf8(message.bytes()).unwrap_or_default();
        let text = text.starts_with(ORDER).then(|| text.to_owned());
        *received.borrow_mut() = text;
    });
    while worker.is_connected() {
        worker.dispatch(None).unwrap();
        let Some(order) = order.take() else { continue };
        let answer = if order == MEASURE {
            Sample::now().to_text()
        } else {
            let count = order.strip_prefix(ORDER).unwrap().parse().unwrap();
            job(worker, count);
            String::new()
        };
        let _ = worker.send(format!("{ORDER}{answer}").as_bytes()).unwrap();
    }
}

/// In the master: that worker.
pub struct LongLived {
    worker: WorkerProcess,
    answer: Rc<RefCell<Option<String>>>,
    series: Series,
}

impl LongLived {
    /// Adopts a worker of the scenario that calls [`obey`].
    pub fn new(worker: WorkerProcess, name: &str) -> Self {
        let answer = Rc::new(RefCell::new(None));
        let received = Rc::clone(&answer);
        worker.on_message(move |_, _, message| {
            let text = std::str::from_utf8(message.bytes()).unwrap_or_default();
            if let Some(text) = text.strip_prefix(ORDER) {
                *received.borrow_mut() = Some(text.to_owned());
            }
        });
        Self {
            worker,
            answer,
            series: Series::new(&format!("{name}, worker")),
        }
    }

    pub fn worker(&self) -> &WorkerProcess {
        &self.worker
    }

    /// Tells it to do its job so many times.
    pub fn order(&self, count: u64) {
        self.send(&format!("{ORDER}{count}"));
    }

    fn send(&self, order: &str) {
        assert!(self.answer.borrow().is_none());
        self.worker.send(order.as_bytes()).unwrap();
    }

    /// Turns the master's loop until the answer has come.
    pub fn wait(&self, master: &Master) -> String {
        turn_until(master, || self.answer.borrow().is_some());
        self.answer.take().unwrap()
    }

    /// Measures the worker. The master should come after it: where a message was read there is room
    /// for one as long until the next one is, and the answer to this is a short one.
    pub fn measure(&mut self, master: &Master) {
        self.send(MEASURE);
        self.series.add(Sample::from_text(&self.wait(master)));
    }

    pub fn check(&self) {
        self.series.check();
    }
}

pub fn turn_until(master: &Master, mut done: impl FnMut() -> bool) {
    while !done() {
        master.dispatch(None).unwrap();
    }
}
