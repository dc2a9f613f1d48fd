//! Tests that any callback may call any method. For each kind of callback, one process runs a
//! callback that calls the methods in a list, one after another.
//!
//! A callback is any code of the application that the crate runs: closures, iterators, conversions,
//! `as_fd`, and destructors.

mod master;
mod pool;
mod worker;

use std::cell::{Cell, RefCell};
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use cluster::{Master, MasterListener, Worker};

use crate::harness::{Scenario, with_env};

/// The scenarios of all modules.
pub const SCENARIOS: &[&[Scenario]] = &[master::SCENARIOS, pool::SCENARIOS, worker::SCENARIOS];

const MS: Duration = Duration::from_millis(1);

/// Environment variable that names the callback that this process tests.
const CALLBACK: &str = "CALLBACK";

/// A closure that calls the methods in a list when it is first called.
type Calls = Rc<dyn Fn()>;

/// A value that runs its closure when it is dropped.
struct OnDrop(Calls);

impl Drop for OnDrop {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// A source of a watch. Its `as_fd` calls the closure.
struct Source {
    stream: UnixStream,
    calls: Calls,
}

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (self.calls)();
        self.stream.as_fd()
    }
}

/// Borrows the value. A `move` closure that calls this function owns the value, and therefore drops
/// it.
fn keep(_: &OnDrop) {}

/// Returns a readable stream and its peer. The stream remains readable at least until the peer is
/// dropped.
fn readable() -> (UnixStream, UnixStream) {
    let (here, mut there) = UnixStream::pair().unwrap();
    there.write_all(b"x").unwrap();
    (here, there)
}

/// The handles that a master's callback can use.
struct Cluster {
    master: Master,
    listener: RefCell<Option<MasterListener>>,
}

/// Name of a method or a group of methods, and a function that calls them.
type Call<C> = (&'static str, fn(&C));

/// Name of a kind of callback, and a function that registers such a callback.
type Register<C> = (&'static str, fn(&C, Calls));

/// A source of a watch with an additional destructor, which runs after the `Source` is dropped.
struct Holder(Source, #[allow(dead_code)] OnDrop);

impl AsFd for Holder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Returns the closure that a callback calls. The closure calls the methods in `calls`, but only
/// the first time.
fn all_of<C: 'static>(
    target: &Rc<C>,
    calls: &'static [Call<C>],
    has_run: &Rc<Cell<bool>>,
) -> Calls {
    let (weak, has_run) = (Rc::downgrade(target), Rc::clone(has_run));
    Rc::new(move || {
        // Set the flag first, because a method that is called below may call this closure
        // recursively.
        if has_run.replace(true) {
            return;
        }
        let Some(target) = weak.upgrade() else {
            return;
        };
        for (name, call) in calls {
            println!("  {name}");
            call(&target);
        }
    })
}

/// Calls `play` once for each callback, in a separate process.
fn for_each<C>(callbacks: &[Register<C>], play: impl Fn(&Register<C>)) {
    for callback in callbacks {
        if std::env::var_os(CALLBACK).is_none() {
            println!("{}", callback.0);
        }
        with_env_once(callback.0, || play(callback));
    }
}

/// Runs `play` in a child process with the callback's name in the environment.
///
/// A process that tests another callback does nothing.
fn with_env_once(name: &str, play: impl FnOnce()) {
    match std::env::var_os(CALLBACK) {
        Some(own) if own == name => play(),
        Some(_) => {}
        None => with_env(CALLBACK, name, || {}),
    }
}

fn play_the_worker(worker: Worker) -> i32 {
    let _ = worker.send(b"hello");
    worker.on_message(|worker, _| {
        let _ = worker.send(b"hello again");
    });
    let Ok(listener) = worker.listen("127.0.0.1:0") else {
        return 0;
    };
    listener.set_connection_callback(|_, _| {});
    let _ = worker.run();
    0
}
