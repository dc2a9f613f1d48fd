//! Tests that invalid frames disconnect the worker that sent them.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;

use cluster::{Master, SchedulingPolicy, Settings};

use super::attacker::{
    ATTACKER, Attacker, DETACH, DISCONNECT_REQUEST, IDLE, LISTEN, LISTENER_CLOSED, LISTENING,
    MESSAGE, NO_HANDLE, ONLINE, PARK, PARK_AGAIN, PAUSE, RELEASE, REPLY, SHARED_INDEX, VERSION,
    frame, handle_frame, idle, listen, message, numbers, online,
};
use super::{PATIENCE, note_attacker_events};
use crate::harness::{Log, cluster, in_background, scaled, serve_id, talk};

crate::scenarios! {
    garbled_frame_disconnects_the_worker
    oversized_frame_disconnects_the_worker
    program_that_ignores_its_channel_exits_without_an_error
    frames_in_the_wrong_state_disconnect_the_worker
    idle_report_without_a_queue_disconnects_the_worker_none
    idle_report_without_a_queue_disconnects_the_worker_sharded
    random_frames_are_tolerated_or_disconnect_the_worker
}

/// Runs a shell as a worker, and returns the worker's events. The shell writes `bytes` to its
/// channel and waits to be killed.
///
/// `bytes` is in printf(1)'s notation.
fn worker_that_writes(bytes: &str) -> Vec<String> {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            let script = format!("printf '{bytes}' >&$CLUSTER_CHANNEL_FD; exec sleep 600");
            let settings = Settings::default().exec("/bin/sh");
            master.setup_master(settings.args(["-c".to_owned(), script]));
            let (at_error, at_end, at_exit) = (log.clone(), log.clone(), log);
            master.on_error(move |_, worker, error| {
                assert_eq!(worker.map(|worker| worker.id().get()), Some(1));
                at_error.add(error.to_string());
            });
            master.on_disconnect(move |_, _| at_end.add("disconnect"));
            master.on_exit(move |_, worker, status| {
                let flag = worker.exited_after_disconnect();
                at_exit.add(format!("{:?} {flag:?}", status.signal()));
            });
            master.fork().unwrap();
        },
        |_| unreachable!("the worker is a shell"),
    );
    entries.take()
}

fn expect_disconnected(bytes: &str, why: &str) {
    let seen = worker_that_writes(bytes);
    let error = format!("invalid frame from worker 1: {why}");
    assert_eq!(seen, [error.as_str(), "disconnect", "Some(9) Some(false)"]);
}

fn idle_report_without_a_queue_disconnects_the_worker_none() {
    report_idle_without_a_queue(SchedulingPolicy::Shared);
}

fn idle_report_without_a_queue_disconnects_the_worker_sharded() {
    report_idle_without_a_queue(SchedulingPolicy::Sharded);
}

/// Lets the worker report that it is idle for a retained listener. The listener has no queue,
/// because workers accept from it themselves. A master that believed the report would block in
/// `accept` on this listener.
fn report_idle_without_a_queue(policy: SchedulingPolicy) {
    const FIRST_HANDLE: u32 = 1;
    if let Some(attacker) = Attacker::of_this_process() {
        attacker.send(&after_online([listen(0), idle(FIRST_HANDLE, 0)].concat()));
        attacker.wait_to_be_killed();
    }
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.set_scheduling_policy(policy).unwrap();
            let listener = master.listen("127.0.0.1:0").unwrap();
            let at_error = log.clone();
            master.on_error(move |_, _, error| at_error.add(error.to_string()));
            master.on_exit(move |_, worker, status| {
                // This line only makes the closure own the listener, so that the listener stays
                // open until the worker exits.
                let _ = &listener;
                let flag = worker.exited_after_disconnect();
                log.add(format!("{:?} {flag:?}", status.signal()));
            });
            master.fork_with([(ATTACKER, "1")]).unwrap();
        },
        |_| unreachable!("the worker is the attacker"),
    );
    let error = "invalid frame from worker 1: idle for a listener without a queue for the worker";
    assert_eq!(entries.take(), [error, "Some(9) Some(false)"]);
}

fn garbled_frame_disconnects_the_worker() {
    expect_disconnected(
        "GET / HTTP/1.1",
        "frame of version 47, this program supports version 3",
    );
}

fn oversized_frame_disconnects_the_worker() {
    let why = "frame of 2147483647 bytes, the limit is 1048576";
    expect_disconnected(r"\377\377\377\177\003\177\000\000", why);
}

fn program_that_ignores_its_channel_exits_without_an_error() {
    let log = Log::default();
    let entries = log.clone();
    cluster(
        |master| {
            master.setup_master(Settings::default().exec("/bin/true").args(["x"]));
            master.on_online(|_, _| panic!("the program never calls `init`"));
            master.on_error(|_, _, error| panic!("{error}"));
            master.on_exit(move |_, _, status| log.add(status.to_string()));
            master.fork().unwrap();
        },
        |_| unreachable!(),
    );
    assert_eq!(entries.take(), ["exit status: 0"]);
}

/// Frames that make the master disconnect the worker, and the error that the master reports.
struct Violation {
    frames: fn(&Attacker) -> Vec<u8>,
    why: &'static str,
}

/// Handle of the well-behaved worker's listener, which is the first handle that the master assigns.
const SHARED_HANDLE: u32 = 1;

/// Shares the well-behaved worker's listener, and returns `frames` for the caller to send.
fn after_joining(attacker: &Attacker, frames: Vec<u8>) -> Vec<u8> {
    attacker.send(&online());
    assert_eq!(attacker.listen(SHARED_INDEX).handle, SHARED_HANDLE);
    frames
}

fn after_online(frames: Vec<u8>) -> Vec<u8> {
    [online(), frames].concat()
}

fn violations() -> Vec<Violation> {
    let violation = |frames, why| Violation { frames, why };
    let early = "frame sent before the worker was online";
    let mut all = vec![
        violation(|_| listen(1), early),
        violation(|_| handle_frame(LISTENING, SHARED_HANDLE), early),
        violation(|_| idle(SHARED_HANDLE, 0), early),
        violation(|_| handle_frame(RELEASE, SHARED_HANDLE), early),
        violation(|_| frame(DISCONNECT_REQUEST, 0, &[]), early),
        violation(|_| handle_frame(PAUSE, SHARED_HANDLE), early),
        violation(|_| message(b"x"), early),
        violation(
            |_| after_online(online()),
            "second report that the worker is online",
        ),
    ];
    all.extend(violations_without_a_listener());
    all.extend(violations_with_a_listener());
    all.extend(malformed_frames());
    all
}

/// Returns frames about a listener that does not exist, or that only another worker has.
fn violations_without_a_listener() -> Vec<Violation> {
    let violation = |frames, why| Violation { frames, why };
    let (ready_why, listening_why) = (
        "idle for a listener without a queue for the worker",
        "report of listening on a listener that the worker does not have",
    );
    let release_why = "release of a listener that the worker does not have";
    vec![
        violation(
            |_| after_online(handle_frame(LISTENING, NO_HANDLE)),
            listening_why,
        ),
        violation(
            |_| after_online(handle_frame(LISTENING, SHARED_HANDLE)),
            listening_why,
        ),
        violation(|_| after_online(idle(NO_HANDLE, 0)), ready_why),
        violation(|_| after_online(idle(SHARED_HANDLE, 0)), ready_why),
        violation(
            |_| after_online(handle_frame(RELEASE, NO_HANDLE)),
            release_why,
        ),
        violation(
            |_| after_online(handle_frame(RELEASE, SHARED_HANDLE)),
            release_why,
        ),
        violation(
            |attacker| {
                attacker.send(&online());
                let (here, _there) = UnixStream::pair().unwrap();
                park(attacker, SHARED_HANDLE, here.as_raw_fd())
            },
            "parked connection of a listener that the worker never had",
        ),
        violation(
            |_| after_online(handle_frame(PAUSE, NO_HANDLE)),
            "pause of a listener without queues",
        ),
        violation(
            |_| after_online(handle_frame(PAUSE, SHARED_HANDLE)),
            "pause of a queue that the worker does not have",
        ),
    ]
}

fn violations_with_a_listener() -> Vec<Violation> {
    let violation = |frames, why| Violation { frames, why };
    vec![
        violation(
            |attacker| after_joining(attacker, listen(SHARED_INDEX)),
            "second request for a listener with the same index",
        ),
        violation(
            |attacker| after_joining(attacker, idle(SHARED_HANDLE, 1)),
            "more connections received than were dispatched",
        ),
        violation(
            |attacker| after_joining(attacker, idle(SHARED_HANDLE, u64::MAX)),
            "more connections received than were dispatched",
        ),
        violation(
            |attacker| {
                after_joining(
                    attacker,
                    [handle_frame(RELEASE, SHARED_HANDLE), idle(SHARED_HANDLE, 0)].concat(),
                )
            },
            "idle for a listener without a queue for the worker",
        ),
        violation(
            |attacker| after_joining(attacker, handle_frame(RELEASE, SHARED_HANDLE).repeat(2)),
            "release of a listener that the worker does not have",
        ),
        violation(
            |attacker| {
                let frames = [
                    handle_frame(RELEASE, SHARED_HANDLE),
                    handle_frame(PAUSE, SHARED_HANDLE),
                ];
                after_joining(attacker, frames.concat())
            },
            "pause of a queue that the worker does not have",
        ),
        violation(
            |attacker| {
                let join = after_joining(attacker, Vec::new());
                attacker.send(&join);
                let (reader, _writer) = nix::unistd::pipe().unwrap();
                park(attacker, SHARED_HANDLE, reader.as_raw_fd())
            },
            "parked descriptor that is no connection",
        ),
        violation(
            |attacker| {
                let join = after_joining(attacker, Vec::new());
                attacker.send(&join);
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                park(attacker, SHARED_HANDLE, listener.as_raw_fd())
            },
            "parked descriptor that is no connection",
        ),
        violation(
            |attacker| after_joining(attacker, frame(PARK, 0, &numbers(&[SHARED_HANDLE, 1]))),
            "invalid number of descriptors",
        ),
        violation(
            |attacker| after_joining(attacker, frame(PARK_AGAIN, 0, &numbers(&[0]))),
            "report of a connection that the worker does not have",
        ),
        violation(
            |attacker| after_joining(attacker, frame(DETACH, 0, &numbers(&[u32::MAX]))),
            "report of a connection that the worker does not have",
        ),
    ]
}

/// Sends a frame that parks `fd` for the listener. Returns no frames for the caller to send.
fn park(attacker: &Attacker, handle: u32, fd: RawFd) -> Vec<u8> {
    attacker.send_with_fds(&frame(PARK, 1, &numbers(&[handle, 1])), &[fd]);
    Vec::new()
}

fn malformed_frames() -> Vec<Violation> {
    let violation = |frames, why| Violation { frames, why };
    vec![
        violation(|_| frame(0, 0, &[]), "unknown kind of frame 0"),
        violation(|_| frame(20, 0, &[0; 4]), "unknown kind of frame 20"),
        violation(|_| frame(255, 0, &[]), "unknown kind of frame 255"),
        violation(
            |_| frame(REPLY, 0, &numbers(&[1, 98])),
            "unknown kind of frame 65",
        ),
        violation(
            |_| frame(LISTENER_CLOSED, 0, &[0; 5]),
            "unknown kind of frame 66",
        ),
        violation(|_| frame(ONLINE, 0, b"x"), "malformed frame of kind 1"),
        violation(|_| frame(RELEASE, 0, b"abc"), "malformed frame of kind 6"),
        violation(|_| frame(IDLE, 0, &[0; 20]), "malformed frame of kind 4"),
        violation(|_| frame(IDLE, 0, &[0; 8]), "malformed frame of kind 4"),
        violation(|_| frame(PAUSE, 0, &[0; 12]), "malformed frame of kind 5"),
        violation(|_| frame(LISTEN, 0, &[0; 12]), "malformed frame of kind 2"),
        violation(|_| frame(MESSAGE, 17, &[]), "invalid number of descriptors"),
        violation(
            |_| after_online(frame(MESSAGE, 1, &[])),
            "invalid number of descriptors",
        ),
        violation(
            |_| vec![0, 0, 0, 0, VERSION, MESSAGE, 0, 1],
            "invalid number of descriptors",
        ),
        violation(
            |_| vec![0, 0, 0, 0, VERSION, MESSAGE, 2, 1],
            "invalid number of descriptors",
        ),
        violation(
            |_| vec![0, 0, 0, 0, VERSION, MESSAGE, 1, 65],
            "invalid number of descriptors",
        ),
        violation(
            |attacker| {
                attacker.send_with_fds(&after_online(frame(MESSAGE, 2, &[])), &[0]);
                Vec::new()
            },
            "invalid number of descriptors",
        ),
        violation(
            |attacker| {
                attacker.send_with_fds(&frame(ONLINE, 1, &[]), &[0]);
                Vec::new()
            },
            "invalid number of descriptors",
        ),
    ]
}

/// Runs `count` attackers one after another, and checks after each that the well-behaved worker
/// still answers. `play` receives the attacker's index.
fn run_attackers(count: usize, play: fn(&Attacker, usize), log: &Log) {
    if let Some(attacker) = Attacker::of_this_process() {
        let which = std::env::var(ATTACKER).unwrap();
        play(&attacker, which.parse().unwrap());
        std::process::exit(0);
    }
    cluster(
        |master| {
            let log = log.clone();
            let honest = master.fork().unwrap();
            honest.on_listening(move |master, _, address| {
                let address = address.to_string().parse().unwrap();
                next_attacker(master, address, 0, count, &log);
            });
            honest.on_error(|_, _, error| panic!("{error}"));
            honest.on_exit(|_, _, status| assert!(status.success()));
        },
        |worker| serve_id(&worker, "127.0.0.1:0"),
    );
}

fn next_attacker(master: &Master, address: SocketAddr, which: usize, count: usize, log: &Log) {
    if which == count {
        return master.disconnect();
    }
    let attacker = master.fork_with([(ATTACKER, which.to_string())]).unwrap();
    note_attacker_events(&attacker, log);
    let log = log.clone();
    let late = master.set_timeout(scaled(PATIENCE), move |_| {
        panic!("attacker {which} was not killed")
    });
    attacker.on_exit(move |master, _, _| {
        master.clear_timer(late);
        let log = log.clone();
        let work = move || assert_eq!(talk(address, b"").unwrap(), "1");
        in_background(master, work, move |master, ()| {
            next_attacker(master, address, which + 1, count, &log);
        });
    });
}

fn frames_in_the_wrong_state_disconnect_the_worker() {
    let log = Log::default();
    let play = |attacker: &Attacker, which: usize| {
        attacker.send(&(violations()[which].frames)(attacker));
        attacker.wait_to_be_killed();
    };
    run_attackers(violations().len(), play, &log);
    let seen = log.take();
    let expected: Vec<_> = violations()
        .iter()
        .flat_map(|violation| [violation.why, "disconnect", "killed"])
        .collect();
    assert_eq!(seen, expected);
}

/// Environment variable with the number of seeds. For each seed, one worker sends random frames.
const SEEDS: &str = "CLUSTER_TEST_SEEDS";

fn seeds() -> usize {
    std::env::var(SEEDS).map_or(20, |seeds| seeds.parse().unwrap())
}

/// Returns random bytes, which usually begin with a protocol frame.
fn noise(random: &mut fastrand::Rng) -> Vec<u8> {
    let bytes = |random: &mut fastrand::Rng, most: usize| -> Vec<u8> {
        (0..random.usize(..most)).map(|_| random.u8(..)).collect()
    };
    let small = random.u32(..4);
    match random.u8(..16) {
        0 => bytes(random, 5000),
        1..3 => {
            let (kind, body) = (random.u8(..12), bytes(random, 30));
            frame(kind, 0, &body)
        }
        3 => listen(small),
        4 => handle_frame(LISTENING, small),
        5 | 6 => idle(small, random.u64(..3)),
        7 => handle_frame(RELEASE, small),
        8 => handle_frame(PAUSE, small),
        9 => frame(DISCONNECT_REQUEST, 0, &[]),
        10 => {
            let mut changed = [listen(small), idle(small, 0)].concat();
            let at = random.usize(..changed.len());
            changed[at] = random.u8(..);
            changed
        }
        _ => message(&bytes(random, 3000)),
    }
}

/// Checks that a worker that sends random frames exits normally, or is disconnected for an invalid
/// frame.
///
/// `CLUSTER_TEST_SEEDS` is the number of seeds, and `SEED` is the first seed.
fn random_frames_are_tolerated_or_disconnect_the_worker() {
    let log = Log::default();
    let play = |attacker: &Attacker, which: usize| {
        let first: u64 = std::env::var("SEED").map_or_else(|_| 0, |seed| seed.parse().unwrap());
        let mut random = fastrand::Rng::with_seed(first + which as u64);
        attacker.send(&online());
        for _ in 0..200 {
            attacker.send(&noise(&mut random));
        }
    };
    run_attackers(seeds(), play, &log);
    let mut seen = log.take().into_iter();
    for which in 0..seeds() {
        let mut next = || seen.next().unwrap();
        let mut event = next();
        let has_error = event != "disconnect";
        if has_error {
            event = next();
        }
        assert_eq!(event, "disconnect", "{which}");
        let status = next();
        let possible = status == "exit status: 0" || has_error && status == "killed";
        assert!(possible, "{which}: {status}");
    }
    assert_eq!(seen.next(), None);
}
