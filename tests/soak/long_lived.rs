//! A worker that runs through all rounds and executes the master's commands.

use std::cell::RefCell;
use std::rc::Rc;

use cluster::{Master, Worker, WorkerProcess};

use crate::measure::{Sample, Series};

/// The prefix of commands and their answers. No other message has this prefix.
pub const ORDER: &str = "order ";
const MEASURE: &str = "order measure";

/// Executes the master's commands in the worker, outside of callbacks, until the worker is
/// disconnected.
pub fn run_orders(worker: &Worker, job: impl Fn(&Worker, u64)) {
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

/// The master's handle for a long-lived worker.
pub struct LongLived {
    worker: WorkerProcess,
    answer: Rc<RefCell<Option<String>>>,
    series: Series,
}

impl LongLived {
    /// Takes over a worker's handle. The worker must call [`run_orders`].
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

    /// Sends the worker the command to do its job `count` times.
    pub fn order(&self, count: u64) {
        self.send(&format!("{ORDER}{count}"));
    }

    fn send(&self, order: &str) {
        assert!(self.answer.borrow().is_none());
        let _ = self.worker.send(order.as_bytes()).unwrap();
    }

    /// Runs the master's loop until the answer arrives.
    pub fn wait(&self, master: &Master) -> String {
        run_until(master, || self.answer.borrow().is_some());
        self.answer.take().unwrap()
    }

    /// Measures the worker. The master must be measured after this call, because a read buffer
    /// keeps the size of its last message. The answer to this command is short, so the master's
    /// buffer then has the same size in every round.
    pub fn measure(&mut self, master: &Master) {
        self.send(MEASURE);
        self.series.add(Sample::from_text(&self.wait(master)));
    }

    pub fn check(&self) {
        self.series.check();
    }
}

/// Runs the master's loop until `done` returns `true`.
pub fn run_until(master: &Master, mut done: impl FnMut() -> bool) {
    while !done() {
        master.dispatch(None).unwrap();
    }
}
