//! Tests with hostile workers, which write arbitrary bytes to their channel.
//!
//! The master must survive and not block. Its memory, its descriptors and its CPU time for a
//! hostile worker must stay within the limits in this module.

pub mod attacker;
mod descriptors;
mod floods;
mod invalid_frames;
pub mod measurements;
mod queues;
mod unread_channel;

use std::cell::Cell;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::rc::Rc;
use std::time::Duration;

use cluster::{Error, Master, Signal, WorkerProcess};

use crate::harness::{Log, Scenario, cluster, scaled, serve_id, when};
use attacker::{ATTACKER, Attacker, online};
use measurements::{Measurements, Peak, cpu_time, measure_clients, median};

/// The scenarios of all modules.
pub const SCENARIOS: &[&[Scenario]] = &[
    descriptors::SCENARIOS,
    floods::SCENARIOS,
    invalid_frames::SCENARIOS,
    queues::SCENARIOS,
    unread_channel::SCENARIOS,
];

// Limits on the master's resources that a single worker may occupy.

/// Maximum memory for received bytes: one incomplete frame of up to 1 MiB, and the 64 KiB of one
/// read.
const BYTES_IN: usize = (1 << 20) + (64 << 10);
/// Maximum memory for bytes that wait for a worker that does not read (`UNREAD_MAX` in
/// `src/wire/channel`).
const BYTES_OUT: usize = 9 << 20;
/// Maximum number of received descriptors, including those whose frames are still incomplete.
pub const FDS_IN: usize = 144;
/// Maximum number of descriptors that wait with their frames for a worker that does not read.
const FDS_OUT: usize = 512;
/// Maximum number of connections that the master dispatches to a worker between two idle reports.
const WINDOW: usize = 16;
const LISTENERS: usize = 64;
/// Descriptors per listener: the listening socket and both ends of the queue.
const FDS_PER_LISTENER: usize = 3;
/// Descriptors per worker: the channel, the disconnect token and the process descriptor.
const FDS_PER_WORKER: usize = 3;

/// Tolerance for the memory that the measurement uses and the allocator retains.
const SLACK_BYTES: usize = 4 << 20;
const SLACK_FDS: usize = 8;
/// Maximum factor by which an attack may increase the master's median CPU time between a client's
/// arrival and its acceptance. The largest measured factor is 21, in the flood of Idle and Pause
/// frames, of which the master processes at most 64 per iteration. Without the limit of 64 frames,
/// the factor is 100.
const WORK_FACTOR_MAX: u32 = 50;
/// Lower bound for the median without an attack. The test replaces a smaller median with this
/// bound, because cache misses alone could increase a smaller median by more than
/// `WORK_FACTOR_MAX`.
const WORK_MIN: Duration = Duration::from_micros(20);
/// Maximum number of loop iterations from a client's arrival until the test sees that the master
/// has accepted the client. In the worst allowed case, the master accepts the client in the second
/// iteration, after that iteration has called the measuring watch. The watch then sees the
/// acceptance in the third iteration.
const ITERATIONS_MAX: u32 = 3;
/// Maximum number of messages from one worker between two calls of the measuring watch.
///
/// The value is twice the master's limit of 64 messages per iteration, because parts of two
/// iterations lie between two calls.
const MESSAGES_MAX: u32 = 2 * 64;
/// Maximum duration of one iteration. An iteration takes longer if `close` blocks on one of the
/// descriptors from `connection_that_blocks_in_close`.
const ITERATION_MAX: Duration = Duration::from_secs(5);
/// Maximum time until the exit of an attacker that the master or the test has to kill.
const PATIENCE: Duration = Duration::from_secs(60);
/// Environment variable that is set only in the process of the neighbour in [`measure_baseline`].
const NEIGHBOUR: &str = "NEIGHBOUR";

/// Expected outcome of an attack.
#[derive(Clone, Copy)]
enum Outcome {
    /// The master disconnects and kills the attacker, and reports why.
    Disconnected(&'static str),
    /// Like `Disconnected`, but the master also reports an error about another frame, which was
    /// pending when the master disconnected the attacker.
    DisconnectedTwice(&'static str, &'static str),
    /// The attacker breaks no rule. The test kills it after the clients have been served.
    Tolerated,
    /// Like `Tolerated`, but the master may first report an error that begins with this text,
    /// because the attacker's final messages exceed a limit.
    ToleratedWithLoss(&'static str),
}

#[derive(Clone, Copy)]
struct Case {
    attack: fn(&Attacker),
    outcome: Outcome,
    /// Maximum additional memory of the master, without [`SLACK_BYTES`].
    bytes: usize,
    /// Maximum number of additional descriptors of the master, without [`SLACK_FDS`].
    fds: usize,
    /// Whether the attack continues until the test kills the attacker.
    is_continuous: bool,
    /// Callback in the master, called when the attacker's first message arrives.
    reply: fn(&Master, &WorkerProcess),
}

impl Case {
    fn new(attack: fn(&Attacker), outcome: Outcome) -> Self {
        Self {
            attack,
            outcome,
            bytes: BYTES_IN,
            fds: FDS_PER_WORKER,
            is_continuous: false,
            reply: |_, _| {},
        }
    }

    fn tolerated(attack: fn(&Attacker)) -> Self {
        Self::new(attack, Outcome::Tolerated)
    }

    fn flood(attack: fn(&Attacker)) -> Self {
        let is_continuous = true;
        Self {
            is_continuous,
            ..Self::tolerated(attack)
        }
    }
}

/// Runs the attack beside a well-behaved worker, which serves clients before and during the attack.
fn attack_beside_honest_worker(case: Case) {
    if let Some(attacker) = Attacker::of_this_process() {
        attacker.send(&online());
        (case.attack)(&attacker);
        attacker.wait_to_be_killed();
    }
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let honest = master.fork().unwrap();
            honest.on_listening(move |master, _, address| {
                let address = address.to_string().parse().unwrap();
                let log = log.clone();
                measure_baseline(master, address, move |master, quiet| {
                    attack(master, address, quiet, case, &log);
                });
            });
        },
        |worker| {
            if std::env::var_os(NEIGHBOUR).is_some() {
                // Ignore an error, because the worker may already be disconnecting when it sends
                // its last reply.
                worker.on_message(|worker, _| drop(worker.send(b"pong")));
                let _ = worker.send(b"ready").unwrap();
                worker.run().unwrap();
            } else {
                serve_id(&worker, "127.0.0.1:0");
            }
        },
    );
    let expected = match case.outcome {
        Outcome::Disconnected(why) => vec![why, "disconnect", "killed"],
        Outcome::DisconnectedTwice(why, late) => vec![why, late, "disconnect", "killed"],
        Outcome::Tolerated | Outcome::ToleratedWithLoss(_) => vec!["disconnect", "killed"],
    };
    let mut events = entries.take();
    if let Outcome::ToleratedWithLoss(why) = case.outcome {
        if events.first().is_some_and(|event| event.starts_with(why)) {
            events.remove(0);
        }
    }
    assert_eq!(events, expected);
}

/// Measures the well-behaved worker beside a neighbour that breaks no rule.
///
/// The neighbour and the master exchange messages without a pause. Each sends a message as soon as
/// it has received one.
fn measure_baseline(
    master: &Master,
    address: SocketAddr,
    then: impl FnOnce(&Master, Measurements) + 'static,
) {
    let neighbour = master.fork_with([(NEIGHBOUR, "1")]).unwrap();
    neighbour.on_message(|_, neighbour, _| {
        let _ = neighbour.send(b"ping");
    });
    let mut then = Some(then);
    neighbour.on_online(move |master, neighbour| {
        let (neighbour, then) = (neighbour.clone(), then.take().unwrap());
        let finish = move |_: &Master, quiet| {
            let mut rest = Some((then, quiet));
            neighbour.on_exit(move |master, _, _| {
                let (then, quiet) = rest.take().unwrap();
                then(master, quiet);
            });
            neighbour.disconnect();
        };
        measure_clients(master, address, finish);
    });
}

/// Returns whether the address sanitizer is in use, which changes memory use and speed.
/// `ASAN_OPTIONS` is set in these runs.
fn is_instrumented() -> bool {
    std::env::var_os("ASAN_OPTIONS").is_some()
}

fn attack(master: &Master, address: SocketAddr, mut quiet: Measurements, case: Case, log: &Log) {
    let peak = Peak::from_now(master);
    let attacker = master.fork_with([(ATTACKER, "1")]).unwrap();
    note_attacker_events(&attacker, log);
    let missing = Rc::new(Cell::new(2));
    let finish = Rc::new(move |master: &Master| {
        missing.set(missing.get() - 1);
        if missing.get() == 0 {
            println!("bytes {} fds {}", peak.more_bytes(), peak.more_fds());
            let bounded = peak.more_bytes() <= case.bytes + SLACK_BYTES;
            assert!(bounded || is_instrumented(), "bytes");
            assert!(peak.more_fds() <= case.fds + SLACK_FDS, "descriptors");
            master.disconnect();
        }
    });
    let exited = Rc::clone(&finish);
    let is_tolerated = matches!(
        case.outcome,
        Outcome::Tolerated | Outcome::ToleratedWithLoss(_)
    );
    attacker.on_exit(move |master, _, status| {
        let is_killed = status.signal() == Some(9);
        assert!(
            is_killed || !is_tolerated,
            "the attack has failed: {status}"
        );
        exited(master);
    });
    let served =
        move |master: &Master, attacker: &WorkerProcess, mut busy: Measurements, cpu_before| {
            quiet.show("quiet");
            busy.show("busy");
            assert!(busy.longest_iteration < scaled(ITERATION_MAX), "blocked");
            assert!(
                busy.iterations
                    .iter()
                    .all(|iterations| *iterations <= ITERATIONS_MAX),
                "accepted too late"
            );
            assert!(
                busy.max_messages <= MESSAGES_MAX,
                "too many messages in one iteration"
            );
            let most = WORK_FACTOR_MAX * median(&quiet.work).max(WORK_MIN);
            assert!(median(&busy.work) < most || is_instrumented(), "delayed");
            if matches!(
                case.outcome,
                Outcome::Tolerated | Outcome::ToleratedWithLoss(_)
            ) {
                assert!(!attacker.is_dead());
                // Wait for the flood, because the attacker may have lacked a core since its start.
                // If the flood has stopped, the test ends after `PATIENCE`.
                let (attacker, pid) = (attacker.clone(), attacker.process().id());
                let is_flooding =
                    move |_: &Master| !case.is_continuous || cpu_time(pid) > cpu_before;
                when(master, is_flooding, move |_| {
                    attacker.process().kill(Signal::KILL);
                });
            }
            master.unreference(
                master.set_timeout(scaled(PATIENCE), |_| panic!("the attacker was not killed")),
            );
            finish(master);
        };
    let mut served = Some(served);
    attacker.on_message(move |master, attacker, _| {
        let Some(mut served) = served.take() else {
            return;
        };
        (case.reply)(master, attacker);
        let cpu_before = cpu_time(attacker.process().id());
        let attacker = attacker.clone();
        measure_clients(master, address, move |master, busy| {
            served(master, &attacker, busy, cpu_before);
        });
    });
}

/// Logs the attacker's errors, disconnect and exit. Leaves out errors that `send` has already
/// returned, and prefixes that name the worker.
pub fn note_attacker_events(attacker: &WorkerProcess, log: &Log) {
    let (at_error, at_end, at_exit) = (log.clone(), log.clone(), log.clone());
    let prefix = [
        format!("invalid frame from worker {}: ", attacker.id()),
        format!("lost the channel to worker {}: ", attacker.id()),
    ];
    attacker.on_error(move |_, _, error| {
        if let Error::Send { .. } = error {
            return; // `send` has already returned this error.
        }
        let text = error.to_string();
        let found = prefix.iter().find_map(|prefix| text.strip_prefix(prefix));
        at_error.add(found.unwrap_or(&text));
    });
    attacker.on_disconnect(move |_, _| at_end.add("disconnect"));
    attacker.on_exit(move |_, _, status| match status.signal() {
        Some(9) => at_exit.add("killed"),
        _ => at_exit.add(status.to_string()),
    });
}

/// Descriptors for a worker with its own listener and a second one for `wait_for_the_master`.
const FDS_WITH_TWO_LISTENERS: usize = FDS_PER_WORKER + 2 * FDS_PER_LISTENER;
