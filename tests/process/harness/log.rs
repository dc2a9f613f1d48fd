//! Records a scenario's events and messages, in order.

use std::cell::RefCell;
use std::rc::Rc;

use cluster::{Master, WorkerProcess};

/// A scenario's events, in order.
#[derive(Clone, Default)]
pub struct Log(Rc<RefCell<Vec<String>>>);

impl Log {
    pub fn add(&self, entry: impl Into<String>) {
        self.0.borrow_mut().push(entry.into());
    }

    pub fn take(&self) -> Vec<String> {
        self.0.take()
    }

    pub fn len(&self) -> usize {
        self.0.borrow().len()
    }
}

/// Logs the workers' events and the errors in the master, but no messages. Entries are, for
/// example, "1 online" or "2 exit Some(true) exit status: 0". Errors are logged without a worker's
/// id.
pub fn note_events(master: &Master, log: &Log) {
    let note = |event: &'static str| {
        let log = log.clone();
        move |_: &Master, worker: &WorkerProcess| log.add(format!("{} {event}", worker.id()))
    };
    master.on_fork(note("fork"));
    master.on_online(note("online"));
    let listening = note("listening");
    master.on_listening(move |master, worker, _| listening(master, worker));
    let at_disconnect = log.clone();
    master.on_disconnect(move |_, worker| {
        let flag = worker.exited_after_disconnect();
        at_disconnect.add(format!("{} disconnect {flag:?}", worker.id()));
    });
    let at_exit = log.clone();
    master.on_exit(move |_, worker, status| {
        let flag = worker.exited_after_disconnect();
        at_exit.add(format!("{} exit {flag:?} {status}", worker.id()));
    });
    let at_error = log.clone();
    master.on_error(move |_, _, error| at_error.add(error.to_string()));
}

/// Logs every worker's messages in the master, for example "1 ready".
pub fn note_messages(master: &Master, log: &Log) {
    let log = log.clone();
    master.on_message(move |_, worker, message| {
        let text = String::from_utf8_lossy(message.bytes());
        log.add(format!("{} {text}", worker.id()));
    });
}

/// Returns the entries of one worker in their order, without the worker's id.
pub fn of(worker: u32, entries: &[String]) -> Vec<&str> {
    let prefix = format!("{worker} ");
    let own = entries
        .iter()
        .filter_map(|entry| entry.strip_prefix(&prefix));
    own.collect()
}

/// Asserts that each of `workers` workers has exactly the expected entries, in order, and that no
/// other entries exist.
#[track_caller]
pub fn assert_each(workers: u32, entries: &[String], expected: &[&str]) {
    for worker in 1..=workers {
        assert_eq!(of(worker, entries), expected, "worker {worker}");
    }
    let all = expected.len() * workers as usize;
    assert_eq!(entries.len(), all, "{entries:?}");
}
