//! Starts workers that exit in many ways.

use std::cell::Cell;
use std::io::Read as _;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::Duration;

use cluster::{BindOptions, Error, Master, Settings, Signal, Stdio, Worker, WorkerProcess};
use nix::sys::signal::raise;
use nix::sys::socket::{MsgFlags, send};

use crate::harness::{cluster, run_until_killed};
use crate::measure::{Sample, Series};

crate::scenarios! {
    respawns_leave_memory_bounded
}

/// Number of workers that run at the same time.
const AT_ONCE: usize = 4;
/// Environment variable that selects how a worker exits. The value is an index into `WAYS`.
const WAY: &str = "WAY";
const UNIX: &str = "unix";

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    ExitsWithCode,
    ExitsWhileListening,
    KillsItself,
    IsKilled,
    IsKilledWhileListening,
    IsTerminated,
    IsDisconnected,
    IgnoresDisconnect,
    Disconnects,
    ClosesChannel,
    SendsFinalMessage,
    WritesToAPipe,
    ExitsBeforeOnline,
    SendsGarbage,
    IsForeignProgram,
    CannotBeExecuted,
}

use Way::*;

const WAYS: [Way; 16] = [
    ExitsWithCode,
    ExitsWhileListening,
    KillsItself,
    IsKilled,
    IsKilledWhileListening,
    IsTerminated,
    IsDisconnected,
    IgnoresDisconnect,
    Disconnects,
    ClosesChannel,
    SendsFinalMessage,
    WritesToAPipe,
    ExitsBeforeOnline,
    SendsGarbage,
    IsForeignProgram,
    CannotBeExecuted,
];

fn respawns_leave_memory_bounded() {
    let number = std::env::var(WAY).ok();
    let way = number.map(|number| WAYS[number.parse::<usize>().unwrap()]);
    match way {
        Some(ExitsBeforeOnline) => std::process::exit(4),
        Some(SendsGarbage) => send_garbage(),
        _ => cluster(respawn, |worker| play_way(&worker, way.unwrap())),
    }
}

fn send_garbage() {
    let channel: RawFd = std::env::var("CLUSTER_CHANNEL_FD")
        .unwrap()
        .parse()
        .unwrap();
    send(channel, b"GET / HTTP/1.1", MsgFlags::MSG_NOSIGNAL).unwrap();
    nix::unistd::pause();
}

fn play_way(worker: &Worker, way: Way) {
    match way {
        ExitsWithCode => std::process::exit(3),
        KillsItself => raise(nix::sys::signal::SIGKILL).unwrap(),
        ExitsWhileListening => listen_on_everything(worker, || std::process::exit(0)),
        IsKilledWhileListening => listen_on_everything(worker, || run_until_killed(worker)),
        IsKilled | IsTerminated | IgnoresDisconnect => run_until_killed(worker),
        IsDisconnected => listen_on_everything(worker, || worker.run().unwrap()),
        Disconnects => worker.disconnect().run().unwrap(),
        ClosesChannel => worker.process().disconnect(),
        SendsFinalMessage => {
            let fd = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
            let _ = worker.send_with_fds(b"final message", vec![fd]).unwrap();
        }
        WritesToAPipe => println!("a line for a pipe"),
        ExitsBeforeOnline | SendsGarbage | IsForeignProgram | CannotBeExecuted => unreachable!(),
    }
}

/// Calls `then` with a TCP listener, a UDP socket and a Unix listener open.
fn listen_on_everything(worker: &Worker, then: impl FnOnce()) {
    let _tcp = worker.listen("127.0.0.1:0").unwrap();
    let _udp = worker.bind(BindOptions::from("127.0.0.1:0")).unwrap();
    let _unix = worker.listen(Path::new(UNIX)).unwrap();
    then();
}

/// Counts of events. Unless stated otherwise, a count covers all rounds.
#[derive(Default)]
struct Tally {
    /// Number of workers that this round still has to start.
    left: Cell<u64>,
    started: Cell<usize>,
    forked: Cell<u64>,
    exited: Cell<u64>,
    malformed: Cell<u64>,
    not_executed: Cell<u64>,
    final_messages: Cell<u64>,
}

fn increment(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}

fn respawn(master: &Master) {
    let directory = tempfile::tempdir().unwrap();
    master.setup_master(Settings::default().cwd(directory.path()));
    let tally = Rc::new(Tally::default());
    count_events(master, &tally);
    let mut series = Series::new("respawns, master");
    for _ in 0..crate::ROUNDS {
        tally.left.set(crate::work_per_round(500));
        for _ in 0..AT_ONCE {
            start_one(master, &tally);
        }
        master.run().unwrap();
        assert!(!directory.path().join(UNIX).exists());
        series.add(Sample::now());
    }
    assert_eq!(tally.exited, tally.forked);
    let each = u64::try_from(tally.started.get() / WAYS.len()).unwrap();
    for counter in [&tally.malformed, &tally.not_executed, &tally.final_messages] {
        assert!((each..=each + 1).contains(&counter.get()), "{counter:?}");
    }
    println!("respawns: {}", tally.started.get());
    series.check();
}

fn count_events(master: &Master, tally: &Rc<Tally>) {
    let counted = Rc::clone(tally);
    master.on_error(move |_, _, error| {
        assert!(error.to_string().contains("frame of version 47"), "{error}");
        increment(&counted.malformed);
    });
    let counted = Rc::clone(tally);
    master.on_message(move |_, _, message| {
        assert_eq!(message.bytes(), b"final message");
        increment(&counted.final_messages);
    });
    let counted = Rc::clone(tally);
    master.on_exit(move |master, _, _| {
        increment(&counted.exited);
        start_one(master, &counted);
    });
}

/// Starts the next worker of this round, if one is left. If the worker's program cannot be
/// executed, tries the next worker.
fn start_one(master: &Master, tally: &Tally) {
    while let Some(left) = tally.left.get().checked_sub(1) {
        tally.left.set(left);
        let number = tally.started.get();
        tally.started.set(number + 1);
        let way = WAYS[number % WAYS.len()];
        master.setup_master(settings(way));
        match master.fork_with([(WAY, (number % WAYS.len()).to_string())]) {
            Ok(worker) => {
                increment(&tally.forked);
                return follow_way(&worker, way);
            }
            Err(error) => {
                assert!(matches!(error, Error::Fork { .. }), "{error}");
                assert_eq!(way, CannotBeExecuted);
                increment(&tally.not_executed);
            }
        }
    }
}

fn settings(way: Way) -> Settings {
    let program = match way {
        IsForeignProgram => "/bin/true".into(),
        CannotBeExecuted => "/nowhere".into(),
        _ => std::env::current_exe().unwrap(),
    };
    let output = match way {
        WritesToAPipe => Stdio::pipe(),
        _ => Stdio::null(),
    };
    let stdio = [Stdio::null(), output, Stdio::inherit()];
    Settings::default().exec(program).stdio(stdio)
}

/// Does the master's part of `way`, if it has one. When the worker exits, checks its status and its
/// standard output.
fn follow_way(worker: &WorkerProcess, way: Way) {
    worker.on_online(move |_, worker| match way {
        IsKilled => worker.process().kill(Signal::KILL),
        IsTerminated => worker.kill(Signal::TERM),
        IgnoresDisconnect => drop(worker.disconnect_within(Duration::from_millis(1))),
        _ => {}
    });
    let mut listeners = 0;
    worker.on_listening(move |_, worker, _| {
        listeners += 1;
        match way {
            IsKilledWhileListening if listeners == 3 => worker.process().kill(Signal::KILL),
            IsDisconnected if listeners == 3 => drop(worker.disconnect()),
            _ => {}
        }
    });
    let output = worker.process().take_stdio(1);
    worker.on_exit(move |_, _, status| {
        assert_eq!(status, expected_status(way), "{way:?}");
        let mut text = String::new();
        let read = output
            .as_ref()
            .map(|mut output| output.read_to_string(&mut text));
        assert_eq!(read.is_some(), way == WritesToAPipe);
        assert_eq!(text.is_empty(), way != WritesToAPipe);
    });
}

fn expected_status(way: Way) -> ExitStatus {
    let (code, signal) = match way {
        ExitsWithCode => (3, 0),
        ExitsBeforeOnline => (4, 0),
        IsTerminated => (0, 15),
        KillsItself | IgnoresDisconnect | IsKilled | IsKilledWhileListening | SendsGarbage => {
            (0, 9)
        }
        _ => (0, 0),
    };
    ExitStatus::from_raw(code << 8 | signal)
}
