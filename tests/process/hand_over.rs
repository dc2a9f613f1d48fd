//! Workers that fail at each step of the hand-over, in each way. Every client is served, once, unless
//! its connection was in the hands of the worker's program already; and the ledger agrees.
//!
//! `CLUSTER_TEST_ROUNDS=N cargo test --test process hand_over` plays every combination N times. The
//! faults are built in only with debug assertions; without these the tests are counted as ignored.

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

use crate::harness::{answer, cluster, in_background, is_alive, rounds, talk, with_env};

/// The faults of `src/fault.rs`.
const FAULT: &str = "CLUSTER_FAULT";
const FAULTS: [&str; 5] = ["kill", "stop", "exit", "close", "garble"];
/// How often a worker writes until it has served a connection, and how often it does the rest: at
/// which passes of its point it fails.
const WRITES: u32 = 8;
const OTHERS: u32 = 3;
/// Makes a worker serve by a callback.
const BY_CALLBACK: &str = "BY_CALLBACK";
/// How long clients come until the fault must have happened: far longer than it takes.
const LONGEST: Duration = Duration::from_secs(30);

crate::scenarios! {
    hand_over_survives_a_fault_before_writing: FAULT_POINTS
    hand_over_survives_a_fault_after_writing: FAULT_POINTS
    hand_over_survives_a_fault_after_receiving: FAULT_POINTS
    hand_over_survives_a_fault_after_taking: FAULT_POINTS
    hand_over_survives_a_death_before_giving: FAULT_POINTS
    hand_over_survives_a_death_after_giving: FAULT_POINTS
    hand_over_survives_a_death_after_writing: FAULT_POINTS
    hand_over_survives_a_death_before_hearing: FAULT_POINTS
    hand_over_survives_a_death_after_hearing: FAULT_POINTS
}

fn hand_over_survives_a_fault_before_writing() {
    worker_fails("worker.writes", WRITES, Lost::Nobody);
}

fn hand_over_survives_a_fault_after_writing() {
    worker_fails("worker.has_written", WRITES, Lost::Nobody);
}

fn hand_over_survives_a_fault_after_receiving() {
    worker_fails("worker.has_received", OTHERS, Lost::Nobody);
}

fn hand_over_survives_a_fault_after_taking() {
    worker_fails("worker.has_taken", OTHERS, Lost::WhoWasTaken);
}

fn hand_over_survives_a_death_before_giving() {
    master_sees_deaths("master.gives", &[2, 3, 7, 10], Lost::Nobody);
}

fn hand_over_survives_a_death_after_giving() {
    master_sees_deaths("master.has_given", &[2, 3, 7, 10], Lost::WhoWasTaken);
}

/// The answer to a worker's question is all that it is written: whoever dies of it, dies before it is
/// given anything.
fn hand_over_survives_a_death_after_writing() {
    master_sees_deaths("master.has_written", &[1], Lost::Nobody);
}

fn hand_over_survives_a_death_before_hearing() {
    master_sees_deaths("master.has_decoded", &[2, 3, 7, 10], Lost::WhoWasTaken);
}

fn hand_over_survives_a_death_after_hearing() {
    master_sees_deaths("master.has_heard", &[2, 3, 7, 10], Lost::WhoWasTaken);
}

/// Who may get no answer.
#[derive(Clone, Copy)]
enum Lost {
    Nobody,
    /// The one client whose connection a failing worker had taken.
    WhoWasTaken,
}

/// What became of the clients of one round.
struct Outcome {
    came: u64,
    unanswered: u64,
    /// The worker was seen to have stopped.
    stopped: bool,
}

impl Outcome {
    fn add(&mut self, answer: std::io::Result<String>) {
        self.came += 1;
        match answer {
            Ok(id) if id.ends_with('.') && id.matches('.').count() == 1 => {}
            Ok(nothing) if nothing.is_empty() => self.unanswered += 1,
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

/// One worker serves all the time; others come one after the other, and fail.
fn worker_fails(point: &'static str, passes: u32, lost: Lost) {
    cluster(
        |master| {
            let healthy = master.fork().unwrap();
            let play = Rc::new(Play {
                point,
                lost,
                left: RefCell::new(plan(passes)),
                came: Cell::new(0),
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
    lost: Lost,
    left: RefCell<Vec<Round>>,
    came: Cell<u64>,
    unanswered: Cell<u64>,
    rounds: Cell<u64>,
    /// Rounds in which the worker has failed.
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
        // The round is over when the clients are and the worker is.
        let parts = Rc::new(Cell::new(2));
        let part_is_over = move |play: &Rc<Self>, master: &Master| {
            parts.set(parts.get() - 1);
            if parts.get() == 0 {
                Rc::clone(play).next(master, address);
            }
        };
        let (play, over) = (Rc::clone(&self), part_is_over.clone());
        let has_failed = Rc::new(Cell::new(false));
        let failed = Rc::clone(&has_failed);
        failing.on_exit(move |master, worker, _| {
            // It has left before it was asked to, or has stopped and went on.
            let by_itself = worker.exited_after_disconnect() == Some(false);
            failed.set(failed.get() || by_itself);
            play.rounds.set(play.rounds.get() + 1);
            play.faults.set(play.faults.get() + u64::from(failed.get()));
            over(&play, master);
        });
        // Connections come by another way than words: there is something to receive, too.
        failing.on_listening(|master, worker, _| {
            let listener = worker.clone();
            let speak = move |_: &Master| drop(listener.send(b"a word"));
            let timer = master.set_interval(Duration::from_millis(1), speak);
            master.unref(timer);
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
                // Whoever has only been stopped, or failed later than the last client came.
                failing.disconnect_within(Duration::from_millis(500));
                part_is_over(&play, master);
            },
        );
    }

    fn count(&self, round: Round, outcome: &Outcome) {
        let allowed = match self.lost {
            Lost::Nobody => 0,
            Lost::WhoWasTaken => 1,
        };
        let Round { fault, pass, .. } = round;
        let at = format!("{}:{fault}:{pass}", self.point);
        assert!(outcome.unanswered <= allowed, "{at}: nobody answered");
        self.came.set(self.came.get() + outcome.came);
        self.unanswered
            .set(self.unanswered.get() + outcome.unanswered);
    }

    fn end(&self) {
        let (came, unanswered) = (self.came.get(), self.unanswered.get());
        let (rounds, faults) = (self.rounds.get(), self.faults.get());
        println!(
            "{}: {rounds} rounds, {faults} faults, {came} clients, {unanswered} unanswered",
            self.point
        );
        assert_eq!(faults, rounds, "the faults are not where workers pass");
        self.healthy.disconnect();
        self.healthy.on_exit(move |master, _, _| {
            let ledger = master.ledger();
            assert_eq!(ledger.accepted, came);
            // Whoever got no answer was in some program's hands.
            assert_eq!(ledger.taken, came, "{ledger:?}");
            assert_eq!((ledger.dropped, ledger.closed_by_peer), (0, 0));
        });
    }
}

/// Clients come until the worker has failed and one more has been served. A worker that has stopped
/// is killed or goes on.
fn clients(address: SocketAddr, pid: u32, kills: bool) -> Outcome {
    let over = AtomicBool::new(false);
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                if has_stopped(pid) {
                    stopped.store(true, Ordering::SeqCst);
                    let signal = if kills {
                        Signal::SIGKILL
                    } else {
                        Signal::SIGCONT
                    };
                    // It may be gone by now, and nobody else gets its number so soon.
                    let _ = kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal);
                }
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        let mut outcome = Outcome {
            came: 0,
            unanswered: 0,
            stopped: false,
        };
        let end = Instant::now() + LONGEST;
        loop {
            let has_failed = !is_alive(pid) || stopped.load(Ordering::SeqCst);
            assert!(
                has_failed || Instant::now() < end,
                "workers do not pass here"
            );
            outcome.add(talk(address, b""));
            if has_failed {
                break;
            }
        }
        over.store(true, Ordering::SeqCst);
        outcome.stopped = stopped.load(Ordering::SeqCst);
        outcome
    })
}

fn has_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.contains(") T ")
}

/// The master kills workers at this point, each time it has been passed so often, while clients come;
/// the first one is spared, so that there is always one.
fn master_sees_deaths(point: &'static str, passes: &[u32], lost: Lost) {
    if let Ok(plan) = std::env::var(FAULT) {
        return storm(&plan, lost);
    }
    for every in passes {
        with_env(FAULT, &format!("{point}:kill:{every}:again"), || {});
    }
}

fn storm(plan: &str, lost: Lost) {
    let plan = plan.to_owned();
    cluster(
        |master| {
            let deaths = Arc::new(AtomicU64::new(0));
            let (count, all) = (Arc::clone(&deaths), deaths);
            let replace = master.on_exit(move |master, _, _| {
                count.fetch_add(1, Ordering::SeqCst);
                master.fork().unwrap();
            });
            let first = master.fork().unwrap();
            first.on_listening(move |master, _, address| {
                (0..2).for_each(|_| drop(master.fork().unwrap()));
                let address = address.to_string().parse().unwrap();
                let (all, plan) = (Arc::clone(&all), plan.clone());
                let deaths = Arc::clone(&all);
                in_background(
                    master,
                    move || many_clients(address, &deaths),
                    move |master, outcome| {
                        master.off(replace);
                        let deaths = all.load(Ordering::SeqCst);
                        let Outcome {
                            came, unanswered, ..
                        } = outcome;
                        println!(
                            "{plan}: {came} clients, {deaths} deaths, {unanswered} unanswered"
                        );
                        let allowed = match lost {
                            Lost::Nobody => 0,
                            Lost::WhoWasTaken => deaths,
                        };
                        assert!(unanswered <= allowed);
                        master.disconnect_within(Duration::from_secs(20), move |master| {
                            let ledger = master.ledger();
                            assert_eq!((ledger.accepted, ledger.taken), (came, came));
                        });
                    },
                );
            });
        },
        serve,
    );
}

/// Clients come, and go on coming until some workers have died.
fn many_clients(address: SocketAddr, deaths: &AtomicU64) -> Outcome {
    let mut outcome = Outcome {
        came: 0,
        unanswered: 0,
        stopped: false,
    };
    let least = u64::from(rounds());
    while outcome.came < 40 * least || deaths.load(Ordering::SeqCst) < 5 * least {
        outcome.add(talk(address, b""));
    }
    outcome
}
