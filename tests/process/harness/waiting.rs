//! Waits for conditions, in the master's loop or outside of it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{Interest, Master, WorkerProcess};

use super::{DEADLINE, scaled};

/// Calls `ask` every millisecond until `ask` returns a value, and returns this value.
///
/// Use this function for conditions whose change causes no event. Panics if the wait takes longer
/// than half of [`DEADLINE`], so that the panic names the condition before the test is treated as
/// hanging.
#[track_caller]
pub fn wait_until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + scaled(DEADLINE) / 2;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs blocking work on a thread while the master's loop continues, and then calls `then` with the
/// result.
pub fn in_background<T: Send + 'static>(
    master: &Master,
    work: impl FnOnce() -> T + Send + 'static,
    then: impl FnOnce(&Master, T) + 'static,
) {
    let (done, signal) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let result = work();
        drop(signal);
        result
    });
    let mut rest = Some((thread, then));
    let finish = move |master: &Master, _: &UnixStream| {
        let (thread, then) = rest.take().unwrap();
        then(master, thread.join().unwrap());
        None
    };
    master.watch(done, Interest::Readable, finish).unwrap();
}

/// Calls `then` with the listener's address once `workers` workers have reported that they listen.
pub fn when_listening(
    master: &Master,
    workers: usize,
    then: impl FnOnce(&Master, SocketAddr) + 'static,
) {
    let mut then = Some(then);
    let mut count = 0;
    master.on_listening(move |master, _, address| {
        count += 1;
        if count == workers {
            let address = address.to_string().parse().unwrap();
            then.take().unwrap()(master, address);
        }
    });
}

/// Checks the condition every millisecond, and calls `then` when it is true.
///
/// Use this function for conditions whose change causes no event, while the master's loop
/// continues.
pub fn when(
    master: &Master,
    condition: impl Fn(&Master) -> bool + 'static,
    then: impl FnOnce(&Master) + 'static,
) {
    master.set_timeout(Duration::from_millis(1), move |master| {
        if condition(master) {
            then(master);
        } else {
            when(master, condition, then);
        }
    });
}

/// Calls `then` once every worker has answered two pings, one after the other. Workers must call
/// `answer_pings`, and no client may connect in the meantime.
///
/// A worker that enters `accept` handles messages before it reports to the master that it is idle.
/// The answer to the first ping may therefore precede the report, but the answer to the second ping
/// follows it. When the master calls `then`, it has thus received the reports of all workers.
pub fn when_all_wait(master: &Master, then: impl FnOnce(&Master) + 'static) {
    let workers = master.workers();
    let mut unanswered: BTreeMap<_, _> = workers.iter().map(|worker| (worker.id(), 2)).collect();
    let mut then = Some(then);
    let own = Rc::new(Cell::new(None));
    let id = Rc::clone(&own);
    own.set(Some(master.on_message(move |master, worker, _| {
        match unanswered.get_mut(&worker.id()) {
            Some(2) => {
                unanswered.insert(worker.id(), 1);
                ping(worker);
            }
            Some(_) | None => drop(unanswered.remove(&worker.id())),
        }
        if unanswered.is_empty() {
            master.remove_callback(id.get().unwrap());
            then.take().unwrap()(master);
        }
    })));
    workers.iter().for_each(ping);
}

fn ping(worker: &WorkerProcess) {
    let _ = worker.send(b"ping").unwrap();
}
