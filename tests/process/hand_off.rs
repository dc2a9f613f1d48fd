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
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cluster::{Ledger, Master, Worker, WorkerProcess};
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
pub const OTHER_PASSES: u32 = 3;
/// Environment variable that makes a worker serve with a callback.
pub const BY_CALLBACK: &str = "BY_CALLBACK";
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
    play_worker_faults(
        &ONE_CONNECTION_EACH,
        "worker.before_write",
        WRITE_PASSES,
        MayLose::Nothing,
    );
}

fn hand_off_survives_a_fault_after_writing() {
    play_worker_faults(
        &ONE_CONNECTION_EACH,
        "worker.after_write",
        WRITE_PASSES,
        MayLose::Nothing,
    );
}

fn hand_off_survives_a_fault_after_receiving_frames() {
    play_worker_faults(
        &ONE_CONNECTION_EACH,
        "worker.after_read",
        OTHER_PASSES,
        MayLose::Nothing,
    );
}

fn hand_off_survives_a_fault_after_receiving_a_connection() {
    play_worker_faults(
        &ONE_CONNECTION_EACH,
        "worker.after_receive",
        OTHER_PASSES,
        MayLose::ReceivedConnection,
    );
}

fn hand_off_survives_a_kill_before_dispatch() {
    play_kills(
        &ONE_CONNECTION_EACH,
        "master.before_dispatch",
        &[2, 3, 7, 10],
        MayLose::Nothing,
    );
}

fn hand_off_survives_a_kill_after_dispatch() {
    play_kills(
        &ONE_CONNECTION_EACH,
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
    play_kills(
        &ONE_CONNECTION_EACH,
        "master.after_write",
        &[1],
        MayLose::Nothing,
    );
}

fn hand_off_survives_a_kill_before_processing_a_frame() {
    play_kills(
        &ONE_CONNECTION_EACH,
        "master.before_frame",
        &[2, 3, 7, 10],
        MayLose::ReceivedConnection,
    );
}

fn hand_off_survives_a_kill_after_processing_a_frame() {
    play_kills(
        &ONE_CONNECTION_EACH,
        "master.after_frame",
        &[2, 3, 7, 10],
        MayLose::ReceivedConnection,
    );
}

/// The clients that may remain without an answer after workers have failed.
#[derive(Clone, Copy)]
pub enum MayLose {
    Nothing,
    /// For each failed worker, at most one client, namely one whose connection the worker had
    /// received.
    ReceivedConnection,
    /// Any connection that a failed worker had received. The clients check that each lost connection
    /// belonged to a failed worker.
    OwnConnections,
}

impl MayLose {
    /// Returns the maximum number of clients without an answer after `failed` workers have failed.
    fn limit(self, failed: u64) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::ReceivedConnection => failed,
            Self::OwnConnections => u64::MAX,
        }
    }
}

/// The results of the clients in one round, or in all rounds.
#[derive(Clone, Copy, Default)]
pub struct Outcome {
    pub connected: u64,
    /// Number of connections that ended without an answer to their last request.
    pub unanswered: u64,
    /// Number of times that a worker must have received a connection.
    pub answered: u64,
    /// Whether the worker was observed in the stopped state.
    stopped: bool,
}

/// Clients on a thread beside workers that fail.
pub trait Clients: Send {
    /// Sends at least one request.
    fn step(&mut self, outcome: &mut Outcome);
    /// Disconnects the clients. Only the worker that does not fail is left by then.
    fn end(self: Box<Self>, outcome: &mut Outcome);
}

/// The clients of a test, its workers, and what the ledger must say at the end.
pub struct Traffic {
    pub clients: fn(SocketAddr) -> Box<dyn Clients>,
    pub serve: fn(Worker),
    /// Number of further clients that a worker may lose if the fault closes its channel. Unlike the
    /// other faults, this one does not keep the worker from receiving a connection.
    pub lost_by_closed_channel: u64,
    pub check: fn(&Ledger, &Outcome),
}

const ONE_CONNECTION_EACH: Traffic = Traffic {
    clients: |address| Box::new(OneConnectionEach(address)),
    serve,
    lost_by_closed_channel: 0,
    // Expect that workers have received every accepted connection. This includes the connections
    // of clients without an answer, because only a worker that has received a connection can lose
    // it.
    check: |ledger, outcome| {
        let connected = outcome.connected;
        assert_eq!((ledger.accepted, ledger.received), (connected, connected));
        assert_eq!((ledger.dropped, ledger.closed_by_peer), (0, 0));
    },
};

/// Clients that connect one after the other. Each reads one answer.
struct OneConnectionEach(SocketAddr);

impl Clients for OneConnectionEach {
    fn step(&mut self, outcome: &mut Outcome) {
        outcome.add(talk(self.0, b""));
    }

    fn end(self: Box<Self>, _: &mut Outcome) {}
}

impl std::ops::AddAssign for Outcome {
    fn add_assign(&mut self, other: Self) {
        self.connected += other.connected;
        self.unanswered += other.unanswered;
        self.answered += other.answered;
        self.stopped |= other.stopped;
    }
}

impl Outcome {
    fn add(&mut self, answer: std::io::Result<String>) {
        self.connected += 1;
        match answer {
            Ok(id) if id.ends_with('.') && id.matches('.').count() == 1 => self.answered += 1,
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
pub fn play_worker_faults(
    traffic: &'static Traffic,
    point: &'static str,
    passes: u32,
    may_lose: MayLose,
) {
    cluster(
        move |master| {
            let healthy = master.fork().unwrap();
            let play = Rc::new(Play {
                traffic,
                point,
                may_lose,
                left: RefCell::new(plan(passes)),
                clients: RefCell::default(),
                total: Cell::default(),
                rounds: Cell::new(0),
                faults: Cell::new(0),
                healthy: healthy.clone(),
            });
            healthy.on_listening(move |master, _, address| {
                let address = address.to_string().parse().unwrap();
                let (play, clients) = (Rc::clone(&play), traffic.clients);
                // Let the clients connect before any worker runs that may fail.
                in_background(
                    master,
                    move || clients(address),
                    |master, clients| {
                        play.clients.replace(Some(clients));
                        play.next(master);
                    },
                );
            });
        },
        traffic.serve,
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
    traffic: &'static Traffic,
    point: &'static str,
    may_lose: MayLose,
    left: RefCell<Vec<Round>>,
    /// The clients between two rounds.
    clients: RefCell<Option<Box<dyn Clients>>>,
    total: Cell<Outcome>,
    rounds: Cell<u64>,
    /// Number of rounds in which the worker has failed as planned.
    faults: Cell<u64>,
    healthy: WorkerProcess,
}

impl Play {
    fn next(self: Rc<Self>, master: &Master) {
        let mut clients = self.clients.take().unwrap();
        let Some(round) = self.left.borrow_mut().pop() else {
            let mut total = self.total.get();
            let work = move || {
                clients.end(&mut total);
                total
            };
            return in_background(master, work, move |master, total| self.end(master, total));
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
                Rc::clone(play).next(master);
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
            move || {
                let outcome = step_until_failure(&mut *clients, pid, kills);
                (clients, outcome)
            },
            move |master, (clients, outcome)| {
                play.clients.replace(Some(clients));
                play.count(round, outcome);
                has_failed.set(outcome.stopped);
                // Disconnect the worker if it was stopped and has continued. If the worker has
                // exited, the call does nothing.
                failing.disconnect_within(Duration::from_millis(500));
                end_part(&play, master);
            },
        );
    }

    fn count(&self, round: Round, outcome: Outcome) {
        let Round { fault, pass, .. } = round;
        let is_closed = u64::from(fault == "close");
        let further = is_closed * self.traffic.lost_by_closed_channel;
        let allowed = self.may_lose.limit(1).saturating_add(further);
        let step = format!("{}:{fault}:{pass}", self.point);
        assert!(outcome.unanswered <= allowed, "{step}: unanswered clients");
        let mut total = self.total.get();
        total += outcome;
        self.total.set(total);
    }

    fn end(&self, master: &Master, total: Outcome) {
        let (rounds, faults) = (self.rounds.get(), self.faults.get());
        println!(
            "{}: {rounds} rounds, {faults} faults, {} clients, {} answers, {} unanswered",
            self.point, total.connected, total.answered, total.unanswered
        );
        assert_eq!(faults, rounds, "some workers never passed the point");
        let check = self.traffic.check;
        assert_no_idle_connection_closed(master);
        self.healthy.disconnect();
        self.healthy
            .on_exit(move |master, _, _| check(&master.ledger(), &total));
    }
}

/// Steps the clients until the worker has failed, and then once more. If the worker is stopped,
/// kills the worker if `kills` is set, and continues it otherwise.
fn step_until_failure(clients: &mut dyn Clients, pid: u32, kills: bool) -> Outcome {
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
                // Check again, because only `waitpid` reports the stop, and the master may call it
                // first.
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        let mut outcome = Outcome::default();
        let end = Instant::now() + scaled(FAULT_TIMEOUT);
        loop {
            let has_failed = !is_alive(pid) || stopped.load(Ordering::SeqCst);
            assert!(
                has_failed || Instant::now() < end,
                "no worker passes this point"
            );
            clients.step(&mut outcome);
            if has_failed {
                break;
            }
        }
        is_over.store(true, Ordering::SeqCst);
        outcome.stopped = stopped.load(Ordering::SeqCst);
        outcome
    })
}

/// Call this function before the last worker disconnects. Afterwards, a worker that is late may park
/// a connection whose listener has closed, although the client has hung up.
fn assert_no_idle_connection_closed(master: &Master) {
    assert_eq!(master.ledger().idle_closed, 0);
}

fn has_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.contains(") T ")
}

/// Kills a worker at every N-th pass of the fault point, for each N in `passes`, while clients
/// connect.
///
/// The master never kills the first worker, so one worker always serves clients.
pub fn play_kills(
    traffic: &'static Traffic,
    point: &'static str,
    passes: &[u32],
    may_lose: MayLose,
) {
    if let Ok(plan) = std::env::var(FAULT) {
        return play_kills_under_load(traffic, &plan, may_lose);
    }
    for every in passes {
        with_env(FAULT, &format!("{point}:kill:{every}:again"), || {});
    }
}

fn play_kills_under_load(traffic: &'static Traffic, plan: &str, may_lose: MayLose) {
    let plan = plan.to_owned();
    cluster(
        move |master| {
            let kills = Arc::new(AtomicU32::new(0));
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
                let (kills, clients) = (Arc::clone(&all), traffic.clients);
                in_background(
                    master,
                    move || {
                        let mut clients = clients(address);
                        let mut outcome = step_until_killed(&mut *clients, &kills);
                        clients.end(&mut outcome);
                        outcome
                    },
                    move |master, outcome| {
                        master.remove_callback(replace);
                        let kills = u64::from(all.load(Ordering::SeqCst));
                        let (connected, unanswered) = (outcome.connected, outcome.unanswered);
                        println!(
                            "{plan}: {connected} clients, {kills} kills, {unanswered} unanswered"
                        );
                        assert!(unanswered <= may_lose.limit(kills));
                        let check = traffic.check;
                        assert_no_idle_connection_closed(master);
                        master.on_all_disconnected_once(move |master| {
                            check(&master.ledger(), &outcome);
                        });
                        master.disconnect_within(scaled(Duration::from_secs(20)));
                    },
                );
            });
        },
        traffic.serve,
    );
}

/// Steps the clients until 40 clients per round have connected and 5 workers per round were killed.
fn step_until_killed(clients: &mut dyn Clients, kills: &AtomicU32) -> Outcome {
    let mut outcome = Outcome::default();
    let least = rounds();
    while outcome.connected < 40 * u64::from(least) || kills.load(Ordering::SeqCst) < 5 * least {
        clients.step(&mut outcome);
    }
    outcome
}
