//! Stops that end by a deadline, whatever the workers do.

use std::cell::{Cell, RefCell};
use std::io::Read as _;
use std::net::TcpStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cluster::{Master, Settings, Signal, Worker, WorkerProcess};

use crate::harness::{
    Log, cluster, for_both_policies, is_alive, note_events, of, rest, stop, wait_for_state,
};

crate::scenarios! {
    stragglers_are_killed_at_the_deadline_of_all
    stragglers_are_killed_at_deadlines_of_their_own
    whoever_leaves_in_time_is_not_killed
    of_several_deadlines_the_first_counts
    a_worker_is_ended_by_the_first_of_its_own_deadline_and_that_of_all
    a_deadline_of_nothing_kills_at_once
    a_worker_without_channel_that_does_not_exit_is_killed
    a_deadline_after_a_disconnect_is_kept
    a_deadline_counts_from_the_call
    a_deadline_for_the_dead_is_harmless
    a_deadline_ends_a_worker_whose_signal_is_pending
    a_deadline_ends_a_worker_that_has_not_begun
    a_deadline_is_for_those_forked_meanwhile_too
    a_deadline_keeps_the_callback_of_an_earlier_stop
    a_new_round_has_a_deadline_of_its_own
}

/// What those get that are to be killed: long enough to see that they are not killed before.
const SOON: Duration = Duration::from_millis(400);
/// How much later than its deadline a stop may be seen to end, on a machine that does much else.
const NOISE: Duration = Duration::from_secs(5);
/// No test waits for it.
const LATE: Duration = Duration::from_secs(600);

const LEFT: &str = "exit Some(true) exit status: 0";
const KILLED: &str = "exit Some(true) signal: 9 (SIGKILL)";

/// What a worker does when it is to leave, and how it then ends.
const KINDS: &[(&str, &str)] = &[
    ("accepting", LEFT),
    ("running", LEFT),
    ("serving", KILLED),
    ("holding", KILLED),
    ("looping", KILLED),
    ("stopped", KILLED),
    ("deaf", KILLED),
    ("lingering", KILLED),
];

fn part() -> String {
    std::env::var("PART").unwrap()
}

fn fork(master: &Master, part: &str) -> WorkerProcess {
    master.fork_with([("PART", part)]).unwrap()
}

fn loop_for_ever() -> ! {
    loop {
        std::hint::spin_loop();
    }
}

/// Says so when it is where the deadline is to find it.
fn work(worker: Worker) {
    let ready = |worker: &Worker| {
        worker.send(b"ready").unwrap();
    };
    // Each to one of its own, where nobody else takes its connection.
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
            let _client = TcpStream::connect(listener.local_addr()).unwrap();
            let connection = listener.accept().unwrap().unwrap();
            ready(&worker);
            let _ = (&*connection).read(&mut [0]);
        }
        "holding" => {
            let listener = listen();
            let _client = TcpStream::connect(listener.local_addr()).unwrap();
            let held = RefCell::new(Vec::new());
            listener.on_connection(move |worker, connection| {
                held.borrow_mut().push(connection);
                worker.send(b"ready").unwrap();
            });
            worker.run().unwrap();
        }
        "looping" => {
            ready(&worker);
            loop_for_ever();
        }
        "deaf" => {
            // It gets the signal and the request to leave, and does neither.
            worker.on_signal(Signal::TERM, |_, _| {}).unwrap();
            worker.set_timeout(LATE, |_| {});
            ready(&worker);
            worker.run().unwrap();
        }
        "lingering" => {
            ready(&worker);
            worker.run().unwrap();
            assert!(!worker.is_connected());
            loop_for_ever();
        }
        "mute" => {
            ready(&worker);
            worker.process().disconnect();
            worker.run().unwrap();
            loop_for_ever();
        }
        _ => {
            ready(&worker);
            worker.run().unwrap();
        }
    }
}

/// Brings a worker that is ready to where its kind is when it is to leave.
fn settle(worker: &WorkerProcess, part: &str) {
    match part {
        "stopped" => stop(worker),
        "looping" => wait_for_state(worker.process().id(), ") R "),
        _ => rest(worker),
    }
}

/// Calls back when a worker of each of these kinds is where it should be.
fn when_all_are_busy(
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

/// When a worker's exit, or the callback for all, came.
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

/// The end of something that was to end at a deadline.
#[track_caller]
fn assert_at(deadline: Instant, end: Instant) {
    assert!(end >= deadline, "{:?} too early", deadline - end);
    println!("{:?} after the deadline", end - deadline);
    assert!(end < deadline + NOISE, "{:?} too late", end - deadline);
}

const ALL: &[&str] = &[
    "accepting",
    "running",
    "serving",
    "holding",
    "looping",
    "stopped",
    "deaf",
    "lingering",
];

/// Stops one of each kind by `begin`, and looks at their ends.
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
            when_all_are_busy(master, ALL, move |master, workers| {
                at.set(Some(Instant::now()));
                begin(master, workers, call);
                assert_eq!(workers.len(), master.workers().len(), "nobody has left yet");
            });
        },
        work,
    );
    assert_eq!(called.get(), expect_call);
    let entries = entries.take();
    let deadline = began.get().unwrap() + SOON;
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

fn stragglers_are_killed_at_the_deadline_of_all() {
    for_both_policies(|| {
        stop_all_kinds(
            |master, _, called| {
                let expected = master.workers().len();
                assert_eq!(expected, KINDS.len());
                master.disconnect_within(SOON, move |master| {
                    assert!(master.workers().is_empty());
                    assert!(!called.replace(true));
                });
            },
            true,
        );
    });
}

fn stragglers_are_killed_at_deadlines_of_their_own() {
    for_both_policies(|| {
        stop_all_kinds(
            |_, workers, _| {
                for worker in workers {
                    assert_eq!(worker.disconnect_within(SOON), worker);
                }
            },
            false,
        );
    });
}

/// A stop of workers of these kinds; the events of each, and when they ended.
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
            when_all_are_busy(master, parts, move |master, workers| {
                at.set(Some(Instant::now()));
                begin(master, workers);
            });
        },
        work,
    );
    (entries.take(), exits, began.get().unwrap())
}

/// A time that is known when the workers are at work.
type Began = Rc<Cell<Option<Instant>>>;

/// Gives a deadline to the workers that are there when so many have exited: those had to end by
/// themselves.
fn stop_the_rest_after(master: &Master, exits: usize, deadline: Duration, began: &Began) {
    let mut count = 0;
    let began = Rc::clone(began);
    master.on_exit(move |master, _, _| {
        count += 1;
        if count == exits {
            assert!(!master.workers().is_empty());
            assert!(master.workers().iter().all(|worker| !worker.is_dead()));
            began.set(Some(Instant::now()));
            master.disconnect_within(deadline, |_| {});
        }
    });
}

#[track_caller]
fn assert_ends(entries: &[String], ends: &[&str]) {
    for (worker, end) in (1..).zip(ends) {
        assert_eq!(of(worker, entries).last(), Some(end), "worker {worker}");
    }
}

/// With so long a deadline nothing but leaving ends the test in time.
fn whoever_leaves_in_time_is_not_killed() {
    for_both_policies(|| {
        let parts = &["accepting", "running", "running"];
        let (entries, exits, began) = stopped_by(parts, |master, workers| {
            workers[2].disconnect_within(LATE);
            master.disconnect_within(LATE, |_| {});
        });
        assert_ends(&entries, &[LEFT; 3]);
        // No deadline stays behind that `run` would wait for.
        assert!((1..=3).all(|worker| exits.of(worker) < began + NOISE));
        assert!(began.elapsed() < NOISE);
    });
}

fn of_several_deadlines_the_first_counts() {
    let parts = &["looping", "looping", "stopped", "stopped"];
    let (entries, exits, began) = stopped_by(parts, |_, workers| {
        let orders = [
            [SOON, LATE],
            [LATE, SOON],
            [SOON, SOON * 2],
            [SOON * 2, SOON],
        ];
        for (worker, deadlines) in workers.iter().zip(orders) {
            for deadline in deadlines {
                worker.disconnect_within(deadline);
            }
        }
    });
    assert_ends(&entries, &[KILLED; 4]);
    (1..=4).for_each(|worker| assert_at(began + SOON, exits.of(worker)));
}

fn a_worker_is_ended_by_the_first_of_its_own_deadline_and_that_of_all() {
    let rest = Began::default();
    let at = Rc::clone(&rest);
    let parts = &["looping", "looping", "looping"];
    let (entries, exits, began) = stopped_by(parts, move |master, workers| {
        master.disconnect_within(LATE, |_| {});
        workers[0].disconnect_within(SOON);
        workers[1].disconnect_within(LATE);
        stop_the_rest_after(master, 1, SOON, &at);
    });
    assert_ends(&entries, &[KILLED; 3]);
    assert_at(began + SOON, exits.of(1));
    let deadline = rest.get().unwrap() + SOON;
    (2..=3).for_each(|worker| assert_at(deadline, exits.of(worker)));
}

fn a_deadline_of_nothing_kills_at_once() {
    let rest = Began::default();
    let at = Rc::clone(&rest);
    let parts = &["looping", "stopped", "holding", "looping"];
    let (entries, exits, began) = stopped_by(parts, move |master, workers| {
        for worker in &workers[..2] {
            worker
                .disconnect_within(LATE)
                .disconnect_within(Duration::ZERO);
            assert!(!worker.is_dead(), "never inside the call");
        }
        stop_the_rest_after(master, 2, Duration::ZERO, &at);
    });
    assert_ends(&entries, &[KILLED; 4]);
    (1..=2).for_each(|worker| assert_at(began, exits.of(worker)));
    (3..=4).for_each(|worker| assert_at(rest.get().unwrap(), exits.of(worker)));
}

/// It has left as far as the cluster is concerned, and its process has not.
fn a_worker_without_channel_that_does_not_exit_is_killed() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let mute = fork(master, "mute");
            let lingering = fork(master, "lingering");
            lingering.on_message(|_, worker, _| {
                worker.disconnect();
            });
            let mut gone = 0;
            master.on_disconnect(move |master, worker| {
                assert!(!worker.is_connected() && !worker.is_dead());
                gone += 1;
                if gone == 2 {
                    mute.disconnect_within(Duration::from_millis(10));
                    stop_the_rest_after(master, 1, Duration::from_millis(10), &Began::default());
                }
            });
        },
        work,
    );
    let entries = entries.take();
    // It closed its channel without a word before it was asked.
    let by_itself = "exit Some(false) signal: 9 (SIGKILL)";
    assert_ends(&entries, &[by_itself, KILLED]);
}

fn a_deadline_after_a_disconnect_is_kept() {
    let rest = Began::default();
    let at = Rc::clone(&rest);
    let parts = &["holding", "looping"];
    let (entries, exits, began) = stopped_by(parts, move |master, workers| {
        master.disconnect(|_| {});
        workers[0].disconnect().disconnect_within(SOON);
        stop_the_rest_after(master, 1, SOON, &at);
    });
    assert_ends(&entries, &[KILLED; 2]);
    assert_at(began + SOON, exits.of(1));
    assert_at(rest.get().unwrap() + SOON, exits.of(2));
}

/// The callback that calls it has taken longer than the deadline.
fn a_deadline_counts_from_the_call() {
    let (own, all) = (Began::default(), Began::default());
    let (at, at_rest) = (Rc::clone(&own), Rc::clone(&all));
    let parts = &["looping", "looping"];
    let (entries, exits, _) = stopped_by(parts, move |master, workers| {
        // The callback that gives the other one its deadline, too.
        master.on_exit(|_, _, _| be_busy());
        stop_the_rest_after(master, 1, SOON, &at_rest);
        be_busy();
        at.set(Some(Instant::now()));
        workers[0].disconnect_within(SOON);
    });
    assert_ends(&entries, &[KILLED; 2]);
    assert_at(own.get().unwrap() + SOON, exits.of(1));
    assert_at(all.get().unwrap() + SOON, exits.of(2));
}

/// For longer than the deadlines here are.
fn be_busy() {
    let began = Instant::now();
    while began.elapsed() < SOON * 2 {
        std::hint::spin_loop();
    }
}

fn a_deadline_for_the_dead_is_harmless() {
    let log = Log::default();
    let entries = log.clone();
    let over = Rc::new(Cell::new(0));
    let count = Rc::clone(&over);
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
                master.disconnect_within(Duration::ZERO, move |_| {
                    ended.disconnect_within(LATE);
                    count.set(count.get() + 1);
                });
            });
        },
        work,
    );
    assert_eq!(over.get(), 1);
    let ends = [
        "fork",
        "online",
        "disconnect Some(false)",
        "exit Some(false) signal: 9 (SIGKILL)",
    ];
    assert_eq!(of(1, &entries.take()), ends);
}

/// `kill` disconnects first, and its signal waits for that; one worker takes no notice of the signal
/// either.
fn a_deadline_ends_a_worker_whose_signal_is_pending() {
    let rest = Began::default();
    let at = Rc::clone(&rest);
    let parts = &["looping", "holding", "deaf", "deaf"];
    let (entries, exits, began) = stopped_by(parts, move |master, workers| {
        for worker in &workers[..3] {
            worker.kill(Signal::TERM);
            worker.disconnect_within(SOON);
        }
        workers[3].process().kill(Signal::TERM);
        stop_the_rest_after(master, 3, SOON, &at);
    });
    assert_ends(&entries, &[KILLED; 4]);
    (1..=3).for_each(|worker| assert_at(began + SOON, exits.of(worker)));
    assert_at(rest.get().unwrap() + SOON, exits.of(4));
}

/// A program that never calls `init`.
fn a_deadline_ends_a_worker_that_has_not_begun() {
    let (log, times) = (Log::default(), Times::default());
    let (entries, exits) = (log.clone(), times.clone());
    let (began, rest) = (Began::default(), Began::default());
    let (at, began_later) = (Rc::clone(&began), Rc::clone(&rest));
    cluster(
        |master| {
            note_events(master, &log);
            times.note_exits(master);
            master.setup_master(Settings::default().exec("/bin/sleep").args(["600"]));
            let workers = [(); 2].map(|()| master.fork().unwrap());
            at.set(Some(Instant::now()));
            workers[0].disconnect_within(SOON);
            stop_the_rest_after(master, 1, SOON, &began_later);
        },
        |_| unreachable!("it sleeps"),
    );
    let entries = entries.take();
    assert_ends(&entries, &[KILLED; 2]);
    assert_at(began.get().unwrap() + SOON, exits.of(1));
    assert_at(rest.get().unwrap() + SOON, exits.of(2));
}

fn a_deadline_is_for_those_forked_meanwhile_too() {
    let over = Rc::new(Cell::new(false));
    let set = Rc::clone(&over);
    let (_, exits, began) = stopped_by(&["looping"], move |master, _| {
        master.disconnect_within(SOON, move |_| set.set(true));
        fork(master, "running");
    });
    assert!(over.get());
    (1..=2).for_each(|worker| assert_at(began + SOON, exits.of(worker)));
}

fn a_deadline_keeps_the_callback_of_an_earlier_stop() {
    let calls = Log::default();
    let seen = calls.clone();
    let (entries, ..) = stopped_by(&["stopped"], move |master, _| {
        let (first, second, third) = (calls.clone(), calls.clone(), calls);
        master.disconnect(move |_| first.add("first"));
        master.disconnect_within(SOON, move |_| second.add("second"));
        master.disconnect_within(LATE, move |_| third.add("third"));
    });
    assert_ends(&entries, &[KILLED]);
    assert_eq!(seen.take(), ["first", "second", "third"]);
}

/// What is forked after a stop is not killed by its deadline.
fn a_new_round_has_a_deadline_of_its_own() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            note_events(master, &log);
            let first = fork(master, "running");
            first.on_message(|master, _, _| {
                master.disconnect_within(SOON, |master| {
                    let second = fork(master, "running");
                    // It sees the time of the first deadline go by.
                    second.on_message(|master, worker, _| {
                        let worker = worker.clone();
                        master.set_timeout(SOON * 2, move |_| {
                            worker.disconnect();
                        });
                    });
                });
            });
        },
        work,
    );
    assert_ends(&entries.take(), &[LEFT; 2]);
}
