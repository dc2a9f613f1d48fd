//! Measures the cost of one loop iteration with many inactive timers, watches, workers and other
//! items. The cost should not depend on the number of items.

use std::cell::Cell;
use std::io::Write as _;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use cluster::{Interest, Master, Role, Settings, Signal, Worker};
use nix::sys::signal::kill;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use crate::ROUNDS;
use crate::harness::{Group, SCENARIO};
use crate::server::end;
use crate::table::{Figure, Goal, Table, number, ratios};
use crate::usage::{allow_many_descriptors, calls};

/// The role of a process whose loop is measured.
pub const SCALING: &str = "scaling";

const KINDS: [&str; 7] = [
    "waiting connections",
    "workers",
    "timers",
    "watches",
    "listeners",
    "timers of a worker",
    "watches of a worker",
];
const COUNTS: [usize; 3] = [10, 100, 1_000];
/// Number of loop iterations in one batch.
const ITERATIONS: u32 = 5_000;
/// Time of the inactive timers and of other waits that must not end. It is longer than all rounds
/// together.
const HOUR: Duration = Duration::from_secs(3600);
/// Maximum number of connections that the master dispatches to one worker (`MAX_WINDOW` in
/// `src/core/dispatch`). These connections are in the worker's queue. To make `count` connections
/// wait in the master, the benchmark therefore makes `count + QUEUE`.
const QUEUE: usize = 16;

pub fn measure(table: &mut Table) {
    allow_many_descriptors();
    for kind in KINDS {
        let mut loops = COUNTS.map(|count| Loop::start(kind, count));
        let mut costs = [const { Vec::new() }; COUNTS.len()];
        for round in 0..=ROUNDS {
            for (measured, costs) in loops.iter_mut().zip(&mut costs) {
                let cost = measured.run_batch();
                costs.extend((round > 0).then_some(cost));
            }
        }
        for (count, costs) in COUNTS.iter().zip(&costs) {
            table.point(kind, *count as f64, costs.clone());
        }
        let [few, hundred, many] = &costs;
        let name = format!("{kind}: CPU of an iteration with 1,000");
        let note = [few, hundred, many].map(|costs| Figure::from(costs.clone()).in_unit("µs"));
        table
            .row(&name, ratios(many, few), "× with 10")
            .goal(Goal::AtMost(1.5))
            .note(&format!("10, 100, 1,000: {}", note.join("; ")));
        let name = format!("{kind}: system calls of an iteration");
        match loops
            .iter_mut()
            .map(Loop::count_calls)
            .collect::<Result<Vec<_>, _>>()
        {
            Ok(counts) => {
                let last = counts[COUNTS.len() - 1];
                let all = counts.iter().map(|count| number(*count));
                let all = all.collect::<Vec<_>>().join("; ");
                table
                    .row(&name, last / counts[0], "× with 10")
                    .goal(Goal::AtMost(1.1))
                    .note(&format!("10, 100, 1,000: {all}"));
            }
            Err(why) => table.skip(&name, &why),
        }
        loops.iter().for_each(|measured| end(&measured.group));
    }
}

/// A process that runs a batch of loop iterations on request.
struct Loop {
    group: Group,
    process: Pid,
    batches: u32,
}

impl Loop {
    fn start(kind: &str, count: usize) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let command = command.env(SCENARIO, SCALING);
        let group = Group::start(command.args([kind, &count.to_string()])).unwrap();
        let process = Pid::from_raw(group.line("process ").parse().unwrap());
        let batches = 0;
        Self {
            group,
            process,
            batches,
        }
    }

    /// Runs a batch, and returns the CPU time of one iteration in microseconds.
    fn run_batch(&mut self) -> f64 {
        self.batches += 1;
        kill(self.process, nix::sys::signal::Signal::SIGUSR1).unwrap();
        let line = self.group.line(&format!("batch {}: ", self.batches));
        line.parse::<f64>().unwrap()
    }

    /// Runs a batch, and returns the number of system calls of one iteration.
    fn count_calls(&mut self) -> Result<f64, String> {
        let process = self.process;
        let calls = calls(&[process], || {
            self.run_batch();
        })?;
        let sum: u64 = calls.values().sum();
        Ok(sum as f64 / f64::from(ITERATIONS))
    }
}

fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)
        .unwrap()
        .into()
}

/// Counts the iterations of one batch, and prints the CPU time of one iteration at the end of the
/// batch.
struct Batch {
    number: Rc<Cell<u32>>,
    start: Duration,
    left: u32,
}

impl Batch {
    /// Counts one iteration, and returns the interest for the next one. Returns `None` in the
    /// batch's last iteration, because `None` ends the watch.
    fn next(&mut self) -> Option<Interest> {
        self.left -= 1;
        if self.left > 0 {
            return Some(Interest::Readable);
        }
        let time = (cpu_time() - self.start).as_secs_f64() * 1e6 / f64::from(ITERATIONS);
        self.number.set(self.number.get() + 1);
        println!("batch {}: {time}", self.number.get());
        None
    }
}

/// Returns a socket that is always readable, and its peer.
fn readable() -> (UnixStream, UnixStream) {
    let (here, mut there) = UnixStream::pair().unwrap();
    there.write_all(b"x").unwrap();
    (here, there)
}

/// Adds the inactive items, and runs the loop with the methods that `Master` and `Worker` share.
macro_rules! measured {
    ($role:expr, $what:ty, $kind:expr, $count:expr) => {{
        let role: &$what = $role;
        let mut others = Vec::new();
        for _ in 0..$count {
            match $kind {
                "timers" => role.unreference(role.set_timeout(HOUR, |_| {})),
                "watches" => {
                    let (here, there) = UnixStream::pair().unwrap();
                    let stay = |_: &$what, _: &UnixStream| Some(Interest::Readable);
                    role.unreference(role.watch(here, Interest::Readable, stay).unwrap());
                    others.push(there);
                }
                _ => {}
            }
        }
        let count = Rc::new(Cell::new(0));
        let on_signal = move |role: &$what, _| {
            let (here, there) = readable();
            let mut batch = Batch {
                number: Rc::clone(&count),
                start: cpu_time(),
                left: ITERATIONS,
            };
            let next = move |_: &$what, _: &UnixStream| {
                let _ = &there;
                batch.next()
            };
            role.watch(here, Interest::Readable, next).unwrap();
        };
        role.on_signal(Signal::USR1, on_signal).unwrap();
        // Add the only referenced timer last. If the loop searched all items for one that keeps it
        // running, the search would take longest with this order.
        role.set_timeout(HOUR, |_| {});
        println!("process {}", std::process::id());
        role.run().unwrap();
        drop(others);
    }};
}

/// Runs the measured loop in the process that the benchmark has started. If the kind is about a
/// worker, runs the loop in a worker of this process.
pub fn run_loop() {
    let Role::Master(master) = cluster::init().unwrap() else {
        return;
    };
    let mut args = std::env::args().skip(1);
    let kind = args.next().unwrap();
    let count: usize = args.next().unwrap().parse().unwrap();
    if let Some(kind) = kind.strip_suffix(" of a worker") {
        let kind = kind.to_owned();
        run_in_worker(&master, move |worker| {
            measured!(&worker, Worker, kind.as_str(), count);
        });
        return master.run().unwrap();
    }
    let mut listeners = Vec::new();
    match kind.as_str() {
        "waiting connections" => queue_connections(&master, count),
        "workers" => {
            (0..count).for_each(|_| run_in_worker(&master, |worker| worker.run().unwrap()));
            let online = Rc::new(Cell::new(0));
            let seen = Rc::clone(&online);
            master.on_online(move |_, _| seen.set(seen.get() + 1));
            while online.get() < count {
                master.dispatch(None).unwrap();
            }
        }
        "listeners" => {
            listeners.extend((0..count).map(|_| master.listen("127.0.0.1:0").unwrap()));
        }
        _ => {}
    }
    measured!(&master, Master, kind.as_str(), count);
    drop(listeners);
}

fn run_in_worker(master: &Master, main: impl Fn(Worker) + 'static) {
    let settings = Settings::default().main(move |worker| {
        main(worker);
        0
    });
    master.fork_as(settings).unwrap();
}

/// Makes `count` connections wait in the master. The scheduler selects one worker for all of them,
/// and that worker never finishes its first connection.
fn queue_connections(master: &Master, count: usize) {
    let workers = count.div_ceil(QUEUE) + 2;
    master.set_scheduler(|_, workers| workers.iter().map(|load| load.worker).min());
    let listener = master.listen("127.0.0.1:0").unwrap();
    let address = listener.address().to_string();
    let all = count + QUEUE;
    for number in 0..workers {
        run_in_worker(master, move |worker| {
            let listener = worker.listen("127.0.0.1:0").unwrap();
            if number == 0 {
                listener.set_connection_callback(|_, _| std::thread::sleep(HOUR));
                return worker.run().unwrap();
            }
            let _ = listener.accept();
        });
    }
    let listening = Rc::new(Cell::new(0));
    let seen = Rc::clone(&listening);
    master.on_listening(move |_, _, _| seen.set(seen.get() + 1));
    while listening.get() < workers {
        master.dispatch(None).unwrap();
    }
    // Run the clients in a worker, because the system calls of a thread in this process would be
    // counted.
    run_in_worker(master, move |_worker| {
        let connect = |_| TcpStream::connect(&address).unwrap();
        let clients: Vec<_> = (0..all).map(connect).collect();
        std::thread::sleep(HOUR);
        drop(clients);
    });
    while master.ledger().accepted < all as u64 {
        master.dispatch(Some(Duration::from_millis(10))).unwrap();
    }
    // Leak the listener, because it must stay open until the process exits.
    std::mem::forget(listener);
}
