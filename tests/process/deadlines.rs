//! Tests of stops with a deadline (`disconnect_within`), which end at the deadline even if the
//! workers do not react.

use std::cell::{Cell, RefCell};
use std::io::Read as _;
use std::net::TcpStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{Master, Settings, Signal, Worker, WorkerProcess};

use crate::harness::{
    Log, cluster, for_both_policies, is_alive, note_events, of, scaled, spin, stop, wait_for_state,
    wait_until_asleep,
};

crate::scenarios! {
    workers_are_killed_at_the_deadline_of_the_master
    workers_are_killed_at_their_own_deadlines
    workers_that_exit_in_time_are_not_killed
    earliest_of_several_deadlines_applies
    earlier_of_the_workers_and_the_masters_deadline_applies
    zero_deadline_kills_at_once
    worker_without_channel_is_killed_at_the_deadline
    deadline_after_a_disconnect_applies
    deadline_starts_at_the_call
    deadline_for_exited_workers_does_nothing
    deadline_kills_a_worker_with_a_pending_signal
    deadline_kills_a_worker_that_never_called_init
    deadline_applies_to_workers_forked_meanwhile
    deadline_keeps_the_callback_of_an_earlier_stop
    next_stop_has_its_own_deadline
}

/// Maximum delay between a stop's deadline and its end on a machine with other load.
const TOLERANCE: Duration = Duration::from_secs(5);
/// Deadline that no test reaches.
const LATE: Duration = Duration::from_secs(600);

/// Deadline of the stops in which workers are killed. It is long enough for a test to distinguish a
/// kill at the deadline from an immediate kill, and for the other workers to exit before, although
/// workers that loop compete with them for the cores.
fn soon() -> Duration {
    scaled(Duration::from_secs(1))
}

const EXITED: &str = "exit Some(true) exit status: 0";
const KILLED: &str = "exit Some(true) signal: 9 (SIGKILL)";

/// Part of each worker during the stop, and the expected exit.
const KINDS: &[(&str, &str)] = &[
    ("accepting", EXITED),
    ("running", EXITED),
    ("serving", KILLED),
    ("holding", KILLED),
    ("looping", KILLED),
    ("stopped", KILLED),
    ("unresponsive", KILLED),
    ("lingering", KILLED),
];

fn part() -> String {
    std::env::var("PART").unwrap()
}

fn fork(master: &Master, part: &str) -> WorkerProcess {
    master.fork_with([("PART", part)]).unwrap()
}

fn spin_forever() -> ! {
    loop {
        spin();
    }
}

/// Plays the worker's part (`PART`, see [`KINDS`]). Sends `ready` shortly before the worker reaches
/// the state in which the stop finds it.
fn work(worker: Worker) {
    let ready = |worker: &Worker| {
        let _ = worker.send(b"ready").unwrap();
    };
    // Listen on a different address in each worker, so that each worker receives the connection
    // that is meant for it.
    let listen = || {
        worker
            .listen(format!("127.0.0.{}:0", worker.id()).as_str())
            .unwrap()
    };
    match part().as_str() {
        "accepting" => {
            let listener = listen();
            ready(&worker);
            assert!(listener.accept().unwrap().is_none());
        }
        "serving" => {
            let listener = listen();
            let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let connection = listener.accept().unwrap().unwrap();
            ready(&worker);
            let _ = (&*connection).read(&mut [0]);
        }
        "holding" => {
            let listener = listen();
            let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let held = RefCell::new(Vec::new());
            listener.set_connection_callback(move |worker, connection| {
                held.borrow_mut().push(connection);
                let _ = worker.send(b"ready").unwrap();
            });
            worker.run().unwrap();
        }
        "looping" => {
            ready(&worker);
            spin_forever();
        }
        "unresponsive" => {
            // The empty handler ignores the signal, and the timer keeps the loop running after the
            // disconnect.
            worker.on_signal(Signal::TERM, |_, _| {}).unwrap();
            worker.set_timeout(LATE, |_| {});
            ready(&worker);
            worker.run().unwrap();
        }
        "lingering" => {
            ready(&worker);
            worker.run().unwrap();
            assert!(!worker.is_connected());
            spin_forever();
        }
        "disconnected" => {
            ready(&worker);
            worker.process().disconnect();
            worker.run().unwrap();
            spin_forever();
        }
        _ => {
            ready(&worker);
            worker.run().unwrap();
        }
    }
}

/// Waits until a worker that has sent `ready` has reached its part's state. Stops the worker if its
/// part is `stopped`.
fn settle(worker: &WorkerProcess, part: &str) {
    match part {
        "stopped" => stop(worker),
        "looping" => wait_for_state(worker.process().id(), ") R "),
        _ => wait_until_asleep(worker),
    }
}

/// Forks a worker for each part, and calls `then` once each worker has reached its part's state.
fn when_all_are_settled(
    master: &Master,
    parts: &'static [&'static str],
    then: impl FnOnce(&Master, &[WorkerProcess]) + 'static,
) {
    let workers: Vec<_> = parts.iter().map(|part| fork(master, part)).collect();
    let mut then = Some(then);
    let mut ready = 0;
    master.on_message(move |master, _, message| {
        assert_eq!(message.bytes(), b"ready");
        ready += 1;
        if ready == workers.len() {
            for (worker, part) in workers.iter().zip(parts) {
                settle(worker, part);
            }
            then.take().unwrap()(master, &workers);
        }
    });
}

/// The times at which the workers exited, by worker id.
#[derive(Clone, Default)]
struct Times(Rc<RefCell<Vec<(u32, Instant)>>>);

impl Times {
    fn note_exits(&self, master: &Master) {
        let times = self.clone();
        master.on_exit(move |_, worker, _| {
            assert!(!is_alive(worker.process().id()));
            times
                .0
                .borrow_mut()
                .push((worker.id().get(), Instant::now()));
        });
    }

    fn of(&self, worker: u32) -> Instant {
        let times = self.0.borrow();
        times.iter().find(|(id, _)| *id == worker).unwrap().1
    }
}

/// Asserts that `end` is between the deadline and [`TOLERANCE`] after it.
#[track_caller]
fn assert_at(deadline: Instant, end: Instant) {
    assert!(end >= deadline, "{:?} too early", deadline - end);
    println!("{:?} after the deadline", end - deadline);
    assert!(
        end < deadline + scaled(TOLERANCE),
        "{:?} too late",
        end - deadline
    );
}

const ALL: &[&str] = &[
    "accepting",
    "running",
    "serving",
    "holding",
    "looping",
    "stopped",
    "unresponsive",
    "lingering",
];

/// Forks one worker of each kind, stops all of them with `begin`, and checks how they exit. The
/// closure `begin` may set its `Cell` in a callback. `expect_call` says whether the `Cell` must be
/// set in the end.
fn stop_all_kinds(
    begin: impl FnOnce(&Master, &[WorkerProcess], Rc<Cell<bool>>) + 'static,
    expect_call: bool,
) {
    let (log, times) = (Log::default(), Times::default());
    let (entries, exits) = (log.clone(), times.clone());
    let began = Began::default();
    let at = Rc::clone(&began);
    let called = Rc::new(Cell::new(false));
    let call = Rc::clone(&called);
    cluster(
        |master| {
            note_events(master, &log);
            times.note_exits(master);
            when_all_are_settled(master, ALL, move |master, workers| {
                at.set(Some(Instant::now()));
                begin(master, workers, call);
                assert_eq!(
                    workers.len(),
                    master.workers().len(),
                    "a worker exited inside the call"
                );
            });
        },
        work,
    );
    assert_eq!(called.get(), expect_call);
    let entries = entries.take();
    let deadline = began.get().unwrap() + soon();
    for (worker, (kind, end)) in (1..).zip(KINDS) {
        let events = of(worker, &entries);
        assert_eq!(events.last(), Some(end), "{kind}");
        let disconnects = events
            .iter()
            .filter(|event| event.starts_with("disconnect"));
        assert_eq!(
            disconnects.collect::<Vec<_>>(),
            [&"disconnect Some(true)"],
            "{kind}"
        );
        if *end == KILLED {
            assert_at(deadline, exits.of(worker));
        }
    }
    assert!(
        entries.iter().all(|entry| !entry.contains("error")),
        "{entries:?}"
    );
}

fn workers_are_killed_at_the_deadline_of_the_master() {
    for_both_policies(|| {
        stop_all_kinds(
            |master, _, called| {
                let expected = master.workers().len();
                assert_eq!(expected, KINDS.len());
                master.on_all_disconnected_once(move |master| {
                    assert!(master.workers().is_empty());
                    assert!(!called.replace(true));
                });
                master.disconnect_within(soon());
            },
            true,
        );
    });
}

fn workers_are_killed_at_their_own_deadlines() {
    for_both_policies(|| {
        stop_all_kinds(
            |_, workers, _| {
                for worker in workers {
                    assert_eq!(worker.disconnect_within(soon()), worker);
                }
            },
            false,
        );
    });
}

/// Forks workers with these parts and stops them with `begin`. Returns the events, the exit times
/// and the start time of the stop.
fn stopped_by(
    parts: &'static [&'static str],
    begin: impl FnOnce(&Master, &[WorkerProcess]) + 'static,
) -> (Vec<String>, Times, Instant) {
    let (log, times) = (Log::default(), Times::default());
    let (entries, exits) = (log.clone(), times.clone());
    let began = Began::default();
    let at = Rc::clone(&began);
    cluster(
        |master| {
            note_events(master, &log);
            times.note_exits(master);
            when_all_are_settled(master, parts, move |master, workers| {
                at.set(Some(Instant::now()));
                begin(master, workers);
            });
        },
        work,
    );
    (entries.take(), exits, began.get().unwrap())
}

/// The time at which a stop began. `None` until then.
type Began = Rc<Cell<Option<Instant>>>;

/// Sets a deadline for all workers once `exits` workers have exited, and asserts that the other
/// workers are still alive then.
fn stop_after_exits(master: &Master, exits: usize, deadline: Duration, began: &Began) {
    let mut count = 0;
    let began = Rc::clone(began);
    master.on_exit(move |master, _, _| {
        count += 1;
        if count == exits {
            assert!(!master.workers().is_empty());
            assert!(master.workers().iter().all(|worker| !worker.is_dead()));
            began.set(Some(Instant::now()));
            master.disconnect_within(deadline);
        }
    });
}

#[track_caller]
fn assert_ends(entries: &[String], ends: &[&str]) {
    for (worker, end) in (1..).zip(ends) {
        assert_eq!(of(worker, entries).last(), Some(end), "worker {worker}");
    }
}

/// Checks that workers exit by themselves before the deadline. The deadline is so late that the
/// test would fail if a stop waited for it.
fn workers_that_exit_in_time_are_not_killed() {
    for_both_policies(|| {
        let parts = &["accepting", "running", "running"];
        let (entries, exits, began) = stopped_by(parts, |master, workers| {
            workers[2].disconnect_within(LATE);
            master.disconnect_within(LATE);
        });
        assert_ends(&entries, &[EXITED; 3]);
        // Check that `run` has not waited for the deadline after the last worker exited.
        assert!((1..=3).all(|worker| exits.of(worker) < began + scaled(TOLERANCE)));
        assert!(began.elapsed() < scaled(TOLERANCE));
    });
}

fn earliest_of_several_deadlines_applies() {
    let parts = &["looping", "looping", "stopped", "stopped"];
    let (entries, exits, began) = stopped_by(parts, |_, workers| {
        let orders = [
            [soon(), LATE],
            [LATE, soon()],
            [soon(), soon() * 2],
            [soon() * 2, soon()],
        ];
        for (worker, deadlines) in workers.iter().zip(orders) {
            for deadline in deadlines {
                worker.disconnect_within(deadline);
            }
        }
    });
    assert_ends(&entries, &[KILLED; 4]);
    (1..=4).for_each(|worker| assert_at(began + soon(), exits.of(worker)));
}

fn earlier_of_the_workers_and_the_masters_deadline_applies() {
    let later = Began::default();
    let at = Rc::clone(&later);
    let parts = &["looping", "looping", "looping"];
    let (entries, exits, began) = stopped_by(parts, move |master, workers| {
        master.disconnect_within(LATE);
        workers[0].disconnect_within(soon());
        workers[1].disconnect_within(LATE);
        stop_after_exits(master, 1, soon(), &at);
    });
    assert_ends(&entries, &[KILLED; 3]);
    assert_at(began + soon(), exits.of(1));
    let deadline = later.get().unwrap() + soon();
    (2..=3).for_each(|worker| assert_at(deadline, exits.of(worker)));
}

fn zero_deadline_kills_at_once() {
    let later = Began::default();
    let at = Rc::clone(&later);
    let parts = &["looping", "stopped", "holding", "looping"];
    let (entries, exits, began) = stopped_by(parts, move |master, workers| {
        for worker in &workers[..2] {
            worker
                .disconnect_within(LATE)
                .disconnect_within(Duration::ZERO);
            assert!(!worker.is_dead(), "the worker exited inside the call");
        }
        stop_after_exits(master, 2, Duration::ZERO, &at);
    });
    assert_ends(&entries, &[KILLED; 4]);
    (1..=2).for_each(|worker| assert_at(began, exits.of(worker)));
    (3..=4).for_each(|worker| assert_at(later.get().unwrap(), exits.of(worker)));
}

/// Checks two workers whose channel has closed but whose process does not exit. One has closed its
/// channel by itself, and the master has disconnected the other.
fn worker_without_channel_is_killed_at_the_deadline() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let disconnected = fork(master, "disconnected");
            let lingering = fork(master, "lingering");
            lingering.on_message(|_, worker, _| {
                worker.disconnect();
            });
            let mut gone = 0;
            master.on_disconnect(move |master, worker| {
                assert!(!worker.is_connected() && !worker.is_dead());
                gone += 1;
                if gone == 2 {
                    disconnected.disconnect_within(Duration::from_millis(10));
                    stop_after_exits(master, 1, Duration::from_millis(10), &Began::default());
                }
            });
        },
        work,
    );
    let entries = entries.take();
    // Expect `Some(false)` for the first worker, because it closed its channel before the master
    // requested a disconnect.
    let by_itself = "exit Some(false) signal: 9 (SIGKILL)";
    assert_ends(&entries, &[by_itself, KILLED]);
}

fn deadline_after_a_disconnect_applies() {
    let later = Began::default();
    let at = Rc::clone(&later);
    let parts = &["holding", "looping"];
    let (entries, exits, began) = stopped_by(parts, move |master, workers| {
        master.disconnect();
        workers[0].disconnect().disconnect_within(soon());
        stop_after_exits(master, 1, soon(), &at);
    });
    assert_ends(&entries, &[KILLED; 2]);
    assert_at(began + soon(), exits.of(1));
    assert_at(later.get().unwrap() + soon(), exits.of(2));
}

/// Checks that the time to a deadline counts from the call that sets the deadline. The callbacks
/// that set a deadline first spin for longer than this time. If the time counted from the
/// callback's start, the workers would be killed too early.
fn deadline_starts_at_the_call() {
    let (own, all) = (Began::default(), Began::default());
    let (at, at_later) = (Rc::clone(&own), Rc::clone(&all));
    let parts = &["looping", "looping"];
    let (entries, exits, _) = stopped_by(parts, move |master, workers| {
        // Also spin before the second deadline is set. At the first exit, this callback runs before
        // the callback that sets the deadline.
        master.on_exit(|_, _, _| spin_past_the_deadline());
        stop_after_exits(master, 1, soon(), &at_later);
        spin_past_the_deadline();
        at.set(Some(Instant::now()));
        workers[0].disconnect_within(soon());
    });
    assert_ends(&entries, &[KILLED; 2]);
    assert_at(own.get().unwrap() + soon(), exits.of(1));
    assert_at(all.get().unwrap() + soon(), exits.of(2));
}

/// Spins for twice [`soon`].
fn spin_past_the_deadline() {
    let began = Instant::now();
    while began.elapsed() < soon() * 2 {
        spin();
    }
}

fn deadline_for_exited_workers_does_nothing() {
    let log = Log::default();
    let entries = log.clone();
    let called = Rc::new(Cell::new(0));
    let count = Rc::clone(&called);
    cluster(
        |master| {
            note_events(master, &log);
            let worker = fork(master, "running");
            worker.on_message(|_, worker, _| worker.process().kill(Signal::KILL));
            worker.on_disconnect(|_, worker| {
                worker.disconnect_within(Duration::ZERO);
            });
            master.on_exit(move |master, worker, _| {
                assert_eq!(worker.disconnect_within(Duration::ZERO), worker);
                let ended = worker.clone();
                let count = Rc::clone(&count);
                master.on_all_disconnected_once(move |_| {
                    ended.disconnect_within(LATE);
                    count.set(count.get() + 1);
                });
                master.disconnect_within(Duration::ZERO);
            });
        },
        work,
    );
    assert_eq!(called.get(), 1);
    let ends = [
        "fork",
        "online",
        "disconnect Some(false)",
        "exit Some(false) signal: 9 (SIGKILL)",
    ];
    assert_eq!(of(1, &entries.take()), ends);
}

/// Checks that a deadline also kills workers for which `kill` has been called, and a worker that
/// ignores the signal.
///
/// `kill` first disconnects the worker and then sends its signal, so the signal of a worker that
/// does not disconnect stays pending. The last worker is sent the signal directly.
fn deadline_kills_a_worker_with_a_pending_signal() {
    let later = Began::default();
    let at = Rc::clone(&later);
    let parts = &["looping", "holding", "unresponsive", "unresponsive"];
    let (entries, exits, began) = stopped_by(parts, move |master, workers| {
        for worker in &workers[..3] {
            worker.kill(Signal::TERM);
            worker.disconnect_within(soon());
        }
        workers[3].process().kill(Signal::TERM);
        stop_after_exits(master, 3, soon(), &at);
    });
    assert_ends(&entries, &[KILLED; 4]);
    (1..=3).for_each(|worker| assert_at(began + soon(), exits.of(worker)));
    assert_at(later.get().unwrap() + soon(), exits.of(4));
}

/// Checks that a deadline kills workers whose program never calls `init` and therefore does not
/// react to the disconnect.
fn deadline_kills_a_worker_that_never_called_init() {
    let (log, times) = (Log::default(), Times::default());
    let (entries, exits) = (log.clone(), times.clone());
    let (began, later) = (Began::default(), Began::default());
    let (at, began_later) = (Rc::clone(&began), Rc::clone(&later));
    cluster(
        |master| {
            note_events(master, &log);
            times.note_exits(master);
            master.setup_master(Settings::default().exec("/bin/sleep").args(["600"]));
            let workers = [(); 2].map(|()| master.fork().unwrap());
            at.set(Some(Instant::now()));
            workers[0].disconnect_within(soon());
            stop_after_exits(master, 1, soon(), &began_later);
        },
        |_| unreachable!("the workers run /bin/sleep"),
    );
    let entries = entries.take();
    assert_ends(&entries, &[KILLED; 2]);
    assert_at(began.get().unwrap() + soon(), exits.of(1));
    assert_at(later.get().unwrap() + soon(), exits.of(2));
}

fn deadline_applies_to_workers_forked_meanwhile() {
    let called = Rc::new(Cell::new(false));
    let set = Rc::clone(&called);
    let (_, exits, began) = stopped_by(&["looping"], move |master, _| {
        master.on_all_disconnected_once(move |_| set.set(true));
        master.disconnect_within(soon());
        fork(master, "running");
    });
    assert!(called.get());
    (1..=2).for_each(|worker| assert_at(began + soon(), exits.of(worker)));
}

fn deadline_keeps_the_callback_of_an_earlier_stop() {
    let calls = Log::default();
    let seen = calls.clone();
    let (entries, ..) = stopped_by(&["stopped"], move |master, _| {
        let (first, second, third) = (calls.clone(), calls.clone(), calls);
        master.on_all_disconnected_once(move |_| first.add("first"));
        master.disconnect();
        master.on_all_disconnected_once(move |_| second.add("second"));
        master.disconnect_within(soon());
        master.on_all_disconnected_once(move |_| third.add("third"));
        master.disconnect_within(LATE);
    });
    assert_ends(&entries, &[KILLED]);
    assert_eq!(seen.take(), ["first", "second", "third"]);
}

/// Checks that a worker that is forked after a stop survives that stop's deadline.
fn next_stop_has_its_own_deadline() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let first = fork(master, "running");
            first.on_message(|master, _, _| {
                master.on_all_disconnected_once(|master| {
                    let second = fork(master, "running");
                    // Disconnect the second worker only after the first stop's deadline, so that
                    // the test fails if that deadline kills it.
                    second.on_message(|master, worker, _| {
                        let worker = worker.clone();
                        master.set_timeout(soon() * 2, move |_| {
                            worker.disconnect();
                        });
                    });
                });
                master.disconnect_within(soon());
            });
        },
        work,
    );
    assert_ends(&entries.take(), &[EXITED; 2]);
}
