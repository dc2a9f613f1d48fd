//! A kernel without a system: processes, channels, listeners and clients as plain data, driven
//! through random schedules, with a virtual clock.
//!
//! Both cores run as they are. A schedule is a list of plain [`Step`]s, each the smallest thing that
//! can happen: an action carried out, a frame written or read, an event delivered, a call of a
//! program's, a failure. After each the promises of the crate are checked. A schedule that fails is
//! shortened and printed as a test, to be copied to the end of this file.
//!
//! ```sh
//! CLUSTER_SIMULATION_STEPS=100000000 cargo test --release a_million_steps
//! CLUSTER_SIMULATION_SEED=7 cargo test a_million_steps # one schedule alone
//! ```

mod ending;
mod kernel;
mod shrink;
mod world;

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use fastrand::Rng;

use crate::config::settings::SchedulingPolicy;
use crate::core::dispatch::STALL_TIMEOUT;
use crate::core::worker::Listen;
use crate::types::endpoint::BindFlags;
use crate::types::ledger::Ledger;
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::{FrameError, HandleId, HandleKey, ToMaster};
use ending::Ending;
use world::{QUEUE, World, endpoint};

/// How many steps all schedules have together, unless `CLUSTER_SIMULATION_STEPS` says otherwise.
const STEPS: u64 = 2_000_000;
const STEPS_OF_ONE: u64 = 2000;

/// What the master's program calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Fork,
    /// It starts a detached process.
    Detach,
    /// From now on `run` waits for the exit of a process.
    Ref,
    /// From now on `run` does not.
    Unref,
    Disconnect,
    DisconnectWithin,
    Kill,
    Signal,
    CloseChannel,
    Send,
    DisconnectAll,
    DisconnectAllWithin,
    /// It opens a listener and keeps it.
    Keep,
    /// It keeps one that was open already.
    Adopt,
    /// It lets go of one.
    Release,
}

/// What a worker's program does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Listen,
    ListenAlone,
    Accept,
    Serve,
    /// It looks whether the master has answered to a `Listen`.
    Answer,
    Close,
    Forget,
    Limit,
    /// Its descriptors run out, or suffice again.
    Scarce,
    /// It waits for events in general, and ends when there is nothing left to wait for.
    Wait,
    Send,
    Leave,
    Kill,
    CloseChannel,
    Exit,
}

/// What only a broken or hostile worker sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    Garbled,
    Online,
    Listen,
    Listening,
    Ready,
    /// No lie, but as bad: it takes a connection and closes it.
    Take,
    Close,
    Revoke,
    Leaving,
    Message,
}

/// What the system refuses the next time it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Failure {
    Accept,
    Bind,
    /// A copy of a listener.
    Share,
    /// To send a descriptor.
    Send,
    /// A descriptor for a worker, which has no room for it.
    Receive,
    /// To take back what a worker was given.
    TakeBack,
}

/// The smallest things that can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// A client connects to a listener.
    Connect,
    /// A client gives up.
    HangUp,
    /// So many milliseconds pass.
    Pass,
    /// The master does one thing.
    Master,
    /// Its program does.
    Call(Call),
    /// The same, in the next callback.
    InCallback(Call),
    Fail(Failure),
    /// A worker does one thing.
    Worker,
    /// Its program does.
    Program(Deed),
    Kill,
    /// A detached process exits.
    End,
    Stop,
    Continue,
    /// A worker's channel is closed behind its back.
    Cut,
    Lie(Lie),
}

/// What happens, to which worker, and which one of what there is. Numbers choose among what exists,
/// so that every list of steps has a meaning.
type Step = (What, u8, u8);

#[derive(Clone, Debug)]
struct Case {
    policy: SchedulingPolicy,
    ending: Ending,
    steps: Vec<Step>,
}

impl Case {
    fn random(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let shared = rng.u8(0..4) == 0;
        let policy = if shared {
            SchedulingPolicy::Shared
        } else {
            SchedulingPolicy::RoundRobin
        };
        let ending = if rng.bool() {
            Ending::Stop
        } else {
            Ending::Kill
        };
        // Half of the schedules are without liars: only there is a word of a worker's a proof of
        // anything. And in some of them nothing at all goes wrong.
        let trouble = Trouble {
            lies: rng.bool(),
            faults: rng.u8(0..4) > 0,
            calls: rng.u8(0..4) > 0,
            limits: rng.u8(0..8) == 0,
        };
        let steps = (0..STEPS_OF_ONE).map(|_| step(&mut rng, trouble)).collect();
        Self {
            policy,
            ending,
            steps,
        }
    }

    /// Returns where the connections went.
    fn replay(&self) -> Ledger {
        let mut world = World::new(self.policy);
        for step in &self.steps {
            world.step(*step);
        }
        world.end(self.ending);
        world.master.ledger()
    }
}

/// What may go wrong in a schedule.
#[derive(Clone, Copy, Debug)]
struct Trouble {
    lies: bool,
    faults: bool,
    calls: bool,
    /// Programs cannot decide how many connections they want.
    limits: bool,
}

fn step(rng: &mut Rng, trouble: Trouble) -> Step {
    let what = match rng.u8(0..=255) {
        0..=1 => What::Call(Call::Fork),
        2..=19 => What::Connect,
        20..=22 => What::Pass,
        23..=25 if trouble.calls => call(rng),
        26..=28 if trouble.faults => fault(rng),
        29 if trouble.lies => What::Lie(lie(rng)),
        30..=79 => What::Program(deed(rng, trouble)),
        80..=159 => What::Worker,
        _ => What::Master,
    };
    let n = if what == What::Pass {
        rng.u8(0..20)
    } else {
        rng.u8(..)
    };
    (what, rng.u8(0..8), n)
}

fn call(rng: &mut Rng) -> What {
    let call = match rng.u8(0..44) {
        0..=11 => Call::Fork,
        12..=19 => Call::Send,
        20..=21 => Call::Disconnect,
        22..=23 => Call::DisconnectWithin,
        24..=25 => Call::Kill,
        26 => Call::Signal,
        27 => Call::CloseChannel,
        28 => Call::DisconnectAll,
        29 => Call::DisconnectAllWithin,
        30..=32 => Call::Keep,
        33..=34 => Call::Adopt,
        35..=37 => Call::Release,
        40 => Call::Detach,
        41 => Call::Ref,
        42 => Call::Unref,
        _ => return What::InCallback(Call::Fork),
    };
    if rng.bool() {
        What::InCallback(call)
    } else {
        What::Call(call)
    }
}

fn fault(rng: &mut Rng) -> What {
    match rng.u8(0..64) {
        0..=3 => What::Kill,
        4..=7 => What::Stop,
        8..=23 => What::Continue,
        24 => What::Cut,
        25..=30 => What::Fail(Failure::Accept),
        31..=34 => What::Fail(Failure::Bind),
        35..=37 => What::Fail(Failure::Share),
        38..=41 => What::Fail(Failure::Send),
        42..=43 => What::Fail(Failure::Receive),
        44..=45 => What::Fail(Failure::TakeBack),
        46..=47 => What::End,
        _ => What::HangUp,
    }
}

fn deed(rng: &mut Rng, trouble: Trouble) -> Deed {
    if trouble.limits && rng.bool() {
        return if rng.u8(0..8) == 0 {
            Deed::Serve
        } else {
            Deed::Limit
        };
    }
    match rng.u8(0..=127) {
        0..=9 => Deed::Listen,
        10..=11 => Deed::ListenAlone,
        12..=50 => Deed::Accept,
        51..=55 => Deed::Serve,
        56..=60 => Deed::Answer,
        61..=109 => Deed::Close,
        110 => Deed::Forget,
        111..=112 => Deed::Limit,
        113 => Deed::Scarce,
        114..=117 => Deed::Wait,
        118 => Deed::Send,
        119 if trouble.calls => Deed::Leave,
        120 if trouble.faults && rng.bool() => {
            let last = [Deed::Kill, Deed::CloseChannel, Deed::Exit];
            last[rng.usize(0..last.len())]
        }
        _ => Deed::Accept,
    }
}

fn lie(rng: &mut Rng) -> Lie {
    let lies = [
        Lie::Garbled,
        Lie::Online,
        Lie::Listen,
        Lie::Listening,
        Lie::Ready,
        Lie::Ready,
        Lie::Take,
        Lie::Close,
        Lie::Revoke,
        Lie::Leaving,
        Lie::Message,
    ];
    lies[rng.usize(0..lies.len())]
}

/// For schedules that have failed once.
#[cfg_attr(not(test), expect(dead_code))]
fn replay(policy: SchedulingPolicy, ending: Ending, steps: &[Step]) {
    let steps = steps.to_vec();
    let case = Case {
        policy,
        ending,
        steps,
    };
    case.replay();
}

/// Whether the variable of the environment is set, and to what.
fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().expect("a number"))
}

/// Runs all schedules from a seed. Returns where the connections went.
#[allow(clippy::print_stdout)]
fn run(seeds: std::ops::Range<u64>) -> Ledger {
    let mut total = Ledger::default();
    for seed in seeds {
        let case = Case::random(seed);
        let Some(ledger) = shrink::outcome(&case) else {
            let shrunk = shrink::shrink(&case);
            println!("CLUSTER_SIMULATION_SEED={seed} fails, and so does:\n");
            println!("{}", shrink::as_test(&shrunk));
            shrunk.replay();
            panic!("it failed before");
        };
        total.taken += ledger.taken;
        total.closed_by_peer += ledger.closed_by_peer;
        total.dropped += ledger.dropped;
    }
    total
}

#[test]
fn a_million_steps() {
    let steps = number("CLUSTER_SIMULATION_STEPS").unwrap_or(STEPS);
    let alone = number("CLUSTER_SIMULATION_SEED");
    let total = match alone {
        Some(seed) => run(seed..seed + 1),
        None => run(0..steps.div_ceil(STEPS_OF_ONE)),
    };
    // The schedules are worth something only if they reach all of it.
    let reached = total.taken > 5000 && total.closed_by_peer > 5 && total.dropped > 300;
    assert!(alone.is_some() || reached, "{total:?}");
}

/// What a program does that serves one listener until it ends, and then ends itself.
fn serve(world: &mut World, worker: WorkerId, n: u8) {
    let process = &world.processes[&worker];
    let (deed, n) = match process.listeners.first() {
        // However little one wants: when all leave, whoever is left is served.
        None => (Deed::Listen, n % 4 * 5),
        Some(_) if !process.held.is_empty() => (Deed::Close, n),
        Some(listener) if process.core.has_ended(*listener) => {
            return world.die(worker, ExitStatus::from_raw(0));
        }
        Some(listener) if process.core.listen_result(*listener) == Listen::Pending => return,
        Some(_) if worker.get() % 2 == 0 => (Deed::Serve, n),
        Some(_) => (Deed::Accept, n),
    };
    world.program_step(worker, deed, n);
}

/// One step of a world in which everybody does what he should.
fn friendly_step(world: &mut World, rng: &mut Rng) {
    match rng.u8(0..8) {
        0..=2 => world.step((What::Master, 0, rng.u8(..))),
        3..=5 => world.step((What::Worker, rng.u8(..), rng.u8(..))),
        6 => world.step((What::Pass, 0, rng.u8(0..20))),
        _ => {
            if let Some(worker) = world.living(rng.u8(..)) {
                serve(world, worker, rng.u8(..));
                world.check();
            }
        }
    }
}

/// Everybody is told to leave while clients wait, and in half of the worlds workers die as long as
/// one of them lives: all clients are served.
#[test]
fn stopping_loses_nobody() {
    for seed in 0..500 {
        let mut rng = Rng::with_seed(seed);
        let mut world = World::new(SchedulingPolicy::RoundRobin);
        for _ in 0..3 {
            world.step((What::Call(Call::Fork), 0, 0));
        }
        while world.ports.is_empty() {
            friendly_step(&mut world, &mut rng);
        }
        for _ in 0..rng.u32(0..1000) {
            if rng.u8(0..16) == 0 {
                world.step((What::Connect, 0, 0));
            }
            friendly_step(&mut world, &mut rng);
        }
        world.call(Call::DisconnectAll, None, 0);
        let mut steps = 0;
        while world.master.has_workers() {
            let alive = world.processes.values().filter(|p| p.alive).count();
            if seed % 2 == 0 && alive > 1 && rng.u8(0..200) == 0 {
                world.step((What::Kill, rng.u8(..), 0));
            }
            friendly_step(&mut world, &mut rng);
            steps += 1;
            assert!(steps < 100_000, "seed {seed}: it never ends");
        }
        let ledger = world.master.ledger();
        assert_eq!(ledger.dropped, 0, "seed {seed}: {ledger:?}");
        assert_eq!(world.served, world.clients(), "seed {seed}");
    }
}

/// All workers are disconnected, without and with a deadline, and a detached process goes on.
#[test]
fn nothing_waits_for_a_detached_process_nor_ends_it() {
    for call in [Call::DisconnectAll, Call::DisconnectAllWithin] {
        let mut world = World::new(SchedulingPolicy::RoundRobin);
        let process = world.detach();
        assert!(!world.master.has_workers());
        let worker = world.fork();
        world.settle();
        world.call(call, None, 0);
        world.run(3, |world| world.disconnected > 0);
        assert!(world.processes[&worker].has_gone());
        assert!(world.detached[&process].runs());
        assert!(!world.master.has_workers());
        world.call(Call::Ref, Some(process), 0);
        assert!(world.master.has_workers());
        world.call(Call::DisconnectAll, None, 0);
        world.run(3, |world| world.disconnected > 1);
        world.step((What::End, 0, 0));
        world.settle();
        assert!(!world.master.has_workers());
    }
}

/// Workers die, leave and come, and now and then there is none of them: as long as the listener is
/// kept, all clients are served.
#[test]
fn nobody_is_lost_while_a_listener_is_kept() {
    for seed in 0..500 {
        let mut rng = Rng::with_seed(seed);
        let policy = if seed % 4 == 0 {
            SchedulingPolicy::Shared
        } else {
            SchedulingPolicy::RoundRobin
        };
        let mut world = World::new(policy);
        world.call(Call::Keep, None, 0);
        let turn = |world: &mut World, rng: &mut Rng| match rng.u8(0..3) {
            0 => world.step((What::Master, 0, rng.u8(..))),
            1 => world.step((What::Worker, rng.u8(..), rng.u8(..))),
            _ => {
                world.step((What::Pass, 0, rng.u8(0..4)));
                if let Some(worker) = world.living(rng.u8(..)) {
                    serve(world, worker, 3);
                    world.check();
                }
            }
        };
        for _ in 0..2000 {
            match rng.u8(..) {
                0..=15 => world.step((What::Connect, 0, 0)),
                16..=17 => world.step((What::Call(Call::Fork), 0, 0)),
                18 => world.step((What::Kill, rng.u8(..), 0)),
                19 => world.step((What::Call(Call::Disconnect), rng.u8(..), 0)),
                20 => world.step((What::Call(Call::DisconnectAll), 0, 0)),
                _ => turn(&mut world, &mut rng),
            }
        }
        let mut steps = 0;
        while world.served < world.clients() {
            if world.living(0).is_none() {
                world.step((What::Call(Call::Fork), 0, 0));
            }
            turn(&mut world, &mut rng);
            steps += 1;
            assert!(steps < 100_000, "seed {seed}: somebody waits for ever");
        }
        assert_eq!(world.master.ledger().dropped, 0, "seed {seed}");
        world.end(Ending::Stop);
    }
}

/// Workers that all listen on the same.
fn listeners(count: u32) -> (World, Vec<WorkerId>) {
    let mut world = World::new(SchedulingPolicy::RoundRobin);
    let workers: Vec<_> = (0..count).map(|_| world.fork()).collect();
    for &worker in &workers {
        world.settle();
        world.program_step(worker, Deed::Listen, 15);
    }
    world.settle();
    (world, workers)
}

/// Four well-behaved workers, clients one after the other: everybody serves the same number.
#[test]
fn sequential_clients_rotate_exactly() {
    let (mut world, workers) = listeners(4);
    let mut served = [0; 4];
    for _ in 0..1000 {
        for &worker in &workers {
            world.program_step(worker, Deed::Accept, 0);
            world.settle();
        }
        world.step((What::Connect, 0, 0));
        world.settle();
        for (worker, served) in workers.iter().zip(&mut served) {
            world.program_step(*worker, Deed::Accept, 0);
            *served += world.processes[worker].held.len();
            world.close_connection(*worker, 0);
        }
        world.settle();
    }
    assert_eq!(served, [250; 4]);
}

/// A worker that takes nothing, whatever it says, holds up nobody: what it does not take goes to the
/// one who serves. When it is cut off, they all are served.
#[test]
fn a_hoarder_holds_up_nobody() {
    let (mut world, workers) = listeners(2);
    let (honest, hoarder) = (workers[0], workers[1]);
    world.step((What::Stop, 1, 0));
    let says = |taken| {
        let handle = HandleId(1);
        Ok(ToMaster::Idle {
            handle,
            taken,
            open: 0,
        })
    };
    for round in 0..200 {
        world.say(hoarder, says(0));
        for _ in 0..round % 4 {
            world.step((What::Connect, 0, 0));
        }
        world.settle();
        for _ in 0..4 {
            world.program_step(honest, Deed::Accept, 0);
            world.settle();
            world.close_connection(honest, 0);
            world.pass(STALL_TIMEOUT);
            world.settle();
        }
        assert!(world.clients() - world.served <= 1, "round {round}");
    }
    // It says that it has taken all it was given, again and again, and has taken nothing.
    for taken in 0..1000 {
        world.step((What::Connect, 0, 0));
        world.say(hoarder, says(taken));
        world.settle();
        if !world.processes[&hoarder].alive {
            break;
        }
        assert!(world.queues[&(HandleId(1), hoarder)].len() <= QUEUE);
    }
    world.say(hoarder, Err(FrameError::State("garbled")));
    world.settle();
    while world.served < world.clients() {
        let before = world.served;
        world.program_step(honest, Deed::Accept, 0);
        world.settle();
        world.program_step(honest, Deed::Accept, 0);
        world.close_connection(honest, 0);
        assert!(world.served > before, "{before} are served");
    }
    assert!(!world.processes[&hoarder].alive);
}

/// For want of descriptors a worker rests, but not for ever.
#[test]
fn a_worker_that_lost_connections_serves_again() {
    let (mut world, workers) = listeners(1);
    world.program_step(workers[0], Deed::Serve, 0);
    for _ in 0..20 {
        world.step((What::Fail(Failure::Receive), 0, 0));
        world.step((What::Connect, 0, 0));
        world.settle();
        world.program_step(workers[0], Deed::Accept, 0);
    }
    assert!(world.served < world.clients());
    world.calm_down();
    for _ in 0..200 {
        world.pass(Time::from_millis(10));
        world.settle();
        world.program_step(workers[0], Deed::Accept, 0);
    }
    assert_eq!(world.served, world.clients());
}

/// What one worker says, however much it is, takes up no more room than its listeners may.
#[test]
fn a_talker_bloats_nothing() {
    let (mut world, workers) = listeners(1);
    let talker = workers[0];
    for round in 0..1500_u32 {
        let handle = HandleId(1);
        let key = HandleKey {
            endpoint: endpoint(0),
            index: round + 1,
        };
        let flags = BindFlags::default();
        let frame = match round % 4 {
            0 => ToMaster::Message(vec![0; 4]),
            1 => ToMaster::Pause { handle },
            2 => ToMaster::Idle {
                handle,
                taken: 0,
                open: 0,
            },
            _ => ToMaster::Listen {
                request: round,
                key,
                flags,
            },
        };
        world.say(talker, Ok(frame));
        world.step((What::Stop, 0, 0));
        world.settle();
        assert!(world.processes[&talker].alive, "round {round}");
        if round % 100 == 99 {
            let size = format!("{:?}", world.master).len();
            assert!(size < 1 << 20, "{size} bytes after {round} rounds");
        }
    }
}

// Schedules that have failed once.

#[test]
fn who_is_idle_gets_what_others_have_also_if_accepting_fails() {
    let steps = [
        (What::Fail(Failure::Send), 0, 0),
        (What::Call(Call::Fork), 0, 0),
        (What::Master, 0, 0),
        (What::Worker, 0, 0),
        (What::Worker, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Program(Deed::Listen), 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Call(Call::Fork), 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Worker, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Call(Call::Fork), 0, 0),
        (What::Master, 0, 0),
        (What::Worker, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Program(Deed::Listen), 2, 13),
        (What::Worker, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Kill, 0, 0),
        (What::Master, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Connect, 0, 0),
        (What::Master, 0, 0),
        (What::Connect, 0, 0),
        (What::Connect, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Program(Deed::Listen), 0, 8),
        (What::Master, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Worker, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Worker, 0, 0),
        (What::Program(Deed::Accept), 1, 0),
        (What::Worker, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Program(Deed::Close), 1, 0),
        (What::Program(Deed::Accept), 1, 0),
        (What::Worker, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Master, 0, 0),
        (What::Program(Deed::Accept), 0, 0),
        (What::Worker, 0, 0),
        (What::Worker, 0, 0),
        (What::Master, 0, 0),
        (What::Fail(Failure::Accept), 0, 0),
        (What::Master, 0, 0),
    ];
    replay(SchedulingPolicy::RoundRobin, Ending::Kill, &steps);
}
