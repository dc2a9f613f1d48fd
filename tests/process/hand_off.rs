//! Tests of workers that fail at each step of the hand-off, in each of several ways (`FAULTS`).
//!
//! Every client must be served exactly once, except a client whose connection a failing worker had
//! already received. The ledger must agree.
//!
//! `CLUSTER_TEST_ROUNDS=N cargo test --test process hand_off` plays every combination N times. The
//! faults are compiled only with debug assertions. Without debug assertions, the tests are ignored.

use std::cell::{Cell, RefCell};
use std::io::Write as _;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cluster::{Master, Worker, WorkerProcess};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{answer, cluster, in_background, is_alive, rounds, scaled, talk, with_env};

/// Environment variable that selects a fault point, a fault and a pass (see `src/wire/fault.rs`). A
/// fault point is a place in the code at which a worker can fail. A pass is one execution of this
/// place.
const FAULT: &str = "CLUSTER_FAULT";
const FAULTS: [&str; 5] = ["kill", "stop", "exit", "close", "garble"];
/// Number of passes that are tested at the fault points that concern writes. For each of these
/// passes, the test starts a worker that fails there.
const WRITE_PASSES: u32 = 8;
/// Number of passes that are tested at the fault points that do not concern writes. For each of
/// these passes, the test starts a worker that fails there.
const OTHER_PASSES: u32 = 3;
/// Environment variable that makes a worker serve with a callback.
const BY_CALLBACK: &str = "BY_CALLBACK";
/// Time after which the test gives up if the worker has not failed. Usually the worker fails far
/// earlier.
const FAULT_TIMEOUT: Duration = Duration::from_secs(30);

crate::scenarios! {
    hand_off_survives_a_fault_before_writing: FAULT_POINTS
    hand_off_survives_a_fault_after_writing: FAULT_POINTS
    hand_off_survives_a_fault_after_receiving_frames: FAULT_POINTS
    hand_off_survives_a_fault_after_receiving_a_connection: FAULT_POINTS
    hand_off_survives_a_kill_before_dispatch: FAULT_POINTS
    hand_off_survives_a_kill_after_dispatch: FAULT_POINTS
    hand_off_survives_a_kill_after_writing: FAULT_POINTS
    hand_off_survives_a_kill_before_processing_a_frame: FAULT_POINTS
    hand_off_survives_a_kill_after_processing_a_frame: FAULT_POINTS
}

fn hand_off_survives_a_fault_before_writing() {
    play_worker_faults("worker.before_write", WRITE_PASSES, MayLose::Nothing);
}

fn hand_off_survives_a_fault_after_writing() {
    play_worker_faults("worker.after_write", WRITE_PASSES, MayLose::Nothing);
}

fn hand_off_survives_a_fault_after_receiving_frames() {
    play_worker_faults("worker.after_read", OTHER_PASSES, MayLose::Nothing);
}

fn hand_off_survives_a_fault_after_receiving_a_connection() {
    play_worker_faults(
        "worker.after_receive",
        OTHER_PASSES,
        MayLose::ReceivedConnection,
    );
}

fn hand_off_survives_a_kill_before_dispatch() {
    play_kills("master.before_dispatch", &[2, 3, 7, 10], MayLose::Nothing);
}

fn hand_off_survives_a_kill_after_dispatch() {
    play_kills(
        "master.after_dispatch",
        &[2, 3, 7, 10],
        MayLose::ReceivedConnection,
    );
}

/// Kills each worker once the master has written to its channel for the first time after the
/// preamble. This write contains the reply to the bind request.
///
/// The master has not dispatched a connection to the worker by then, so no client may be lost.
fn hand_off_survives_a_kill_after_writing() {
    play_kills("master.after_write", &[1], MayLose::Nothing);
}

fn hand_off_survives_a_kill_before_processing_a_frame() {
    play_kills(
        "master.before_frame",
        &[2, 3, 7, 10],
        MayLose::ReceivedConnection,
    );
}

fn hand_off_survives_a_kill_after_processing_a_frame() {
    play_kills(
        "master.after_frame",
        &[2, 3, 7, 10],
        MayLose::ReceivedConnection,
    );
}

/// Clients that are allowed to receive no answer.
#[derive(Clone, Copy)]
enum MayLose {
    Nothing,
    /// For each failed worker, at most one client, namely one whose connection the worker had
    /// received.
    ReceivedConnection,
}

/// The results of the clients in one round, or in one run of kills.
struct Outcome {
    connected: u64,
    unanswered: u64,
    /// Whether the worker was observed in the stopped state.
    stopped: bool,
}

impl Outcome {
    fn add(&mut self, answer: std::io::Result<String>) {
        self.connected += 1;
        match answer {
            Ok(id) if id.ends_with('.') && id.matches('.').count() == 1 => {}
            Ok(answer) if answer.is_empty() => self.unanswered += 1,
            Ok(answer) => panic!("served twice: {answer:?}"),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                self.unanswered += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[derive(Clone, Copy)]
struct Round {
    fault: &'static str,
    /// Number of the pass of the fault point at which the worker fails, counted from 1.
    pass: u32,
    by_callback: bool,
}

fn plan(passes: u32) -> Vec<Round> {
    let mut plan = Vec::new();
    for _ in 0..rounds() {
        for fault in FAULTS {
            for pass in 1..=passes {
                for by_callback in [false, true] {
                    plan.push(Round {
                        fault,
                        pass,
                        by_callback,
                    });
                }
            }
        }
    }
    plan
}

/// Runs one worker that serves during the whole test, and forks workers that fail, one after
/// another.
fn play_worker_faults(point: &'static str, passes: u32, may_lose: MayLose) {
    cluster(
        |master| {
            let healthy = master.fork().unwrap();
            let play = Rc::new(Play {
                point,
                may_lose,
                left: RefCell::new(plan(passes)),
                connected: Cell::new(0),
                unanswered: Cell::new(0),
                rounds: Cell::new(0),
                faults: Cell::new(0),
                healthy: healthy.clone(),
            });
            healthy.on_listening(move |master, _, address| {
                let address = address.to_string().parse().unwrap();
                Rc::clone(&play).next(master, address);
            });
        },
        serve,
    );
}

fn serve(worker: Worker) {
    let listener = worker.listen("127.0.0.1:0").unwrap();
    let id = format!("{}.", worker.id());
    if std::env::var_os(BY_CALLBACK).is_some() {
        answer(&listener, id);
        return worker.run().unwrap();
    }
    for connection in listener.incoming() {
        let _ = connection.unwrap().write_all(id.as_bytes());
    }
}

struct Play {
    point: &'static str,
    may_lose: MayLose,
    left: RefCell<Vec<Round>>,
    connected: Cell<u64>,
    unanswered: Cell<u64>,
    rounds: Cell<u64>,
    /// Number of rounds in which the worker has failed as planned.
    faults: Cell<u64>,
    healthy: WorkerProcess,
}

impl Play {
    fn next(self: Rc<Self>, master: &Master, address: SocketAddr) {
        let Some(round) = self.left.borrow_mut().pop() else {
            return self.end();
        };
        let plan = format!("{}:{}:{}", self.point, round.fault, round.pass);
        let by_callback = round.by_callback.then_some((BY_CALLBACK, "1"));
        let env = [(FAULT, plan.as_str())].into_iter().chain(by_callback);
        let failing = master.fork_with(env).unwrap();
        // End the round after the clients have finished and the worker has exited, in either order.
        let parts = Rc::new(Cell::new(2));
        let end_part = move |play: &Rc<Self>, master: &Master| {
            parts.set(parts.get() - 1);
            if parts.get() == 0 {
                Rc::clone(play).next(master, address);
            }
        };
        let (play, end_worker) = (Rc::clone(&self), end_part.clone());
        let has_failed = Rc::new(Cell::new(false));
        let failed = Rc::clone(&has_failed);
        failing.on_exit(move |master, worker, _| {
            // Count a worker as failed if it exited although no disconnect was requested. A worker
            // that the fault has stopped exits only after a disconnect. For such a worker, the code
            // below has already set `has_failed`.
            let by_itself = worker.exited_after_disconnect() == Some(false);
            failed.set(failed.get() || by_itself);
            play.rounds.set(play.rounds.get() + 1);
            play.faults.set(play.faults.get() + u64::from(failed.get()));
            end_worker(&play, master);
        });
        // Send messages, so that the worker also passes the fault points for frames. Connections
        // alone would not do this, because they arrive in the worker's queue.
        failing.on_listening(|master, worker, _| {
            let listener = worker.clone();
            let send = move |_: &Master| drop(listener.send(b"a message"));
            let timer = master.set_interval(Duration::from_millis(1), send);
            master.unreference(timer);
            worker.on_exit(move |master, _, _| master.clear_timer(timer));
        });
        let pid = failing.process().id();
        let kills = self.left.borrow().len() % 2 == 0;
        let play = self;
        in_background(
            master,
            move || clients(address, pid, kills),
            move |master, outcome| {
                play.count(round, &outcome);
                has_failed.set(outcome.stopped);
                // Disconnect the worker if it was stopped and has continued. If the worker has
                // exited, the call does nothing.
                failing.disconnect_within(Duration::from_millis(500));
                end_part(&play, master);
            },
        );
    }

    fn count(&self, round: Round, outcome: &Outcome) {
        let allowed = match self.may_lose {
            MayLose::Nothing => 0,
            MayLose::ReceivedConnection => 1,
        };
        let Round { fault, pass, .. } = round;
        let step = format!("{}:{fault}:{pass}", self.point);
        assert!(outcome.unanswered <= allowed, "{step}: unanswered clients");
        self.connected.set(self.connected.get() + outcome.connected);
        self.unanswered
            .set(self.unanswered.get() + outcome.unanswered);
    }

    fn end(&self) {
        let (connected, unanswered) = (self.connected.get(), self.unanswered.get());
        let (rounds, faults) = (self.rounds.get(), self.faults.get());
        println!(
            "{}: {rounds} rounds, {faults} faults, {connected} clients, {unanswered} unanswered",
            self.point
        );
        assert_eq!(faults, rounds, "some workers never passed the point");
        self.healthy.disconnect();
        self.healthy.on_exit(move |master, _, _| {
            let ledger = master.ledger();
            assert_eq!(ledger.accepted, connected);
            // Expect that workers have received every accepted connection. This includes the
            // connections of clients without an answer, because only a worker that has received a
            // connection can lose it.
            assert_eq!(ledger.received, connected, "{ledger:?}");
            assert_eq!((ledger.dropped, ledger.closed_by_peer), (0, 0));
        });
    }
}

/// Connects clients, one after another, until the worker has failed, and then one more client. If
/// the worker is stopped, kills the worker if `kills` is set, and continues it otherwise.
fn clients(address: SocketAddr, pid: u32, kills: bool) -> Outcome {
    let is_over = AtomicBool::new(false);
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                if has_stopped(pid) {
                    stopped.store(true, Ordering::SeqCst);
                    let signal = if kills {
                        Signal::SIGKILL
                    } else {
                        Signal::SIGCONT
                    };
                    // Ignore an error, because the worker may have exited. The kernel does not
                    // reuse its process ID this soon.
                    let _ = kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal);
                }
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        let mut outcome = Outcome {
            connected: 0,
            unanswered: 0,
            stopped: false,
        };
        let end = Instant::now() + scaled(FAULT_TIMEOUT);
        loop {
            let has_failed = !is_alive(pid) || stopped.load(Ordering::SeqCst);
            assert!(
                has_failed || Instant::now() < end,
                "no worker passes this point"
            );
            outcome.add(talk(address, b""));
            if has_failed {
                break;
            }
        }
        is_over.store(true, Ordering::SeqCst);
        outcome.stopped = stopped.load(Ordering::SeqCst);
        outcome
    })
}

fn has_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.contains(") T ")
}

/// Kills a worker at every N-th pass of the fault point, for each N in `passes`, while clients
/// connect.
///
/// The master never kills the first worker, so one worker always serves clients.
fn play_kills(point: &'static str, passes: &[u32], may_lose: MayLose) {
    if let Ok(plan) = std::env::var(FAULT) {
        return play_kills_under_load(&plan, may_lose);
    }
    for every in passes {
        with_env(FAULT, &format!("{point}:kill:{every}:again"), || {});
    }
}

fn play_kills_under_load(plan: &str, may_lose: MayLose) {
    let plan = plan.to_owned();
    cluster(
        |master| {
            let kills = Arc::new(AtomicU64::new(0));
            let (count, all) = (Arc::clone(&kills), kills);
            let replace = master.on_exit(move |master, _, _| {
                count.fetch_add(1, Ordering::SeqCst);
                master.fork().unwrap();
            });
            let first = master.fork().unwrap();
            first.on_listening(move |master, _, address| {
                (0..2).for_each(|_| drop(master.fork().unwrap()));
                let address = address.to_string().parse().unwrap();
                let (all, plan) = (Arc::clone(&all), plan.clone());
                let kills = Arc::clone(&all);
                in_background(
                    master,
                    move || connect_until_killed(address, &kills),
                    move |master, outcome| {
                        master.remove_callback(replace);
                        let kills = all.load(Ordering::SeqCst);
                        let Outcome {
                            connected,
                            unanswered,
                            ..
                        } = outcome;
                        println!(
                            "{plan}: {connected} clients, {kills} kills, {unanswered} unanswered"
                        );
                        let allowed = match may_lose {
                            MayLose::Nothing => 0,
                            MayLose::ReceivedConnection => kills,
                        };
                        assert!(unanswered <= allowed);
                        master.on_all_disconnected_once(move |master| {
                            let ledger = master.ledger();
                            assert_eq!((ledger.accepted, ledger.received), (connected, connected));
                        });
                        master.disconnect_within(scaled(Duration::from_secs(20)));
                    },
                );
            });
        },
        serve,
    );
}

/// Connects clients until 40 clients per round have connected and 5 workers per round were killed.
fn connect_until_killed(address: SocketAddr, kills: &AtomicU64) -> Outcome {
    let mut outcome = Outcome {
        connected: 0,
        unanswered: 0,
        stopped: false,
    };
    let least = u64::from(rounds());
    while outcome.connected < 40 * least || kills.load(Ordering::SeqCst) < 5 * least {
        outcome.add(talk(address, b""));
    }
    outcome
}
