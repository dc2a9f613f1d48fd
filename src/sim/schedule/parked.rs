//! Checks connections that are parked between the requests of their clients.

use fastrand::Rng;

use super::step::{StepKind, step};
use super::{Ending, Schedule};
use crate::core::worker::ListenStatus;
use crate::sim::kernel::socket::Fate;
use crate::sim::kernel::worker::application::WorkerCall;
use crate::sim::kernel::{Call, MasterInput, nth};
use crate::types::policy::SchedulingPolicy;
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;

/// The number of a fixed port in `Call::Retain`.
const FIXED_PORT: u8 = 1;
/// The number of the same port in `WorkerCall::Listen`, without a connection limit.
const LISTEN: u8 = FIXED_PORT + 15;
/// Like `LISTEN`, with an idle timeout of one second.
const LISTEN_BRIEFLY: u8 = 2 * 40 + FIXED_PORT + 15;
/// Like `LISTEN`, with new connections that wait for data.
const LISTEN_FOR_DATA: u8 = 5 * 40 + FIXED_PORT + 15;

/// Like `LISTEN_FOR_DATA`, with a timeout of one second for the first data, and an idle timeout of
/// two seconds.
const LISTEN_FOR_EARLY_DATA: u8 = 4 * 40 + FIXED_PORT + 15;

/// A number in `Call::Fork` of a worker with another user than those with the number 0.
const OTHER_USER: u8 = 7;

/// Makes the application of a worker make its next call. The application parks each connection that
/// it has received.
fn serve(schedule: &mut Schedule, worker: WorkerId, listen: u8, n: u8) {
    let world = &mut schedule.world;
    let process = &world.processes[&worker];
    let (call, n) = match process.listeners.first().copied() {
        None => (WorkerCall::Listen, listen),
        Some(_) if !process.held.is_empty() => (WorkerCall::Park, n),
        Some(listener) if process.core.has_ended(listener) => (WorkerCall::Wait, n),
        Some(listener) if process.core.listen_status(listener) == ListenStatus::Pending => return,
        Some(_) => (WorkerCall::Accept, n),
    };
    world.call_worker(worker, call, n);
    world.check();
}

/// Makes the master, a worker's library or a worker's application do something.
fn advance(schedule: &mut Schedule, rng: &mut Rng, listen: u8) {
    match rng.u8(0..4) {
        0..=1 => schedule.step(step(StepKind::Master, 0, rng.u8(..))),
        2 => schedule.step(step(StepKind::Worker, rng.u8(..), rng.u8(..))),
        _ => {
            schedule.step(step(StepKind::Pass, 0, rng.u8(0..3)));
            if let Some(worker) = schedule.world.living(rng.u8(..)) {
                serve(schedule, worker, listen, rng.u8(..));
            }
        }
    }
}

/// Returns the number of connections that close if the worker is killed. A connection that is
/// parked in the master is lost only if its frame has not been written.
fn count_with(schedule: &Schedule, worker: WorkerId) -> usize {
    let process = &schedule.world.processes[&worker];
    let moved = process.down.parcels();
    let moved = moved.filter(|parcel| parcel.connection.is_some()).count();
    let unwritten = process.actions.len() + process.up.outbox.len();
    process.held.len() + process.parked.len() + moved + unwritten
}

/// Returns whether a client waits for the answer to a request.
fn is_any_pending(schedule: &Schedule) -> bool {
    let mut fates = schedule.world.fates.iter();
    fates.any(|fate| fate.is_pending && !fate.is_closed)
}

/// Continues until no client waits for the answer to a request. Forks a worker if there is none.
fn answer_all(schedule: &mut Schedule, rng: &mut Rng, listen: u8, seed: u64) {
    let mut steps = 0;
    while is_any_pending(schedule) {
        if schedule.world.living(0).is_none() {
            schedule.step(step(StepKind::Call(Call::Fork), 0, 0));
        }
        advance(schedule, rng, listen);
        steps += 1;
        assert!(steps < 100_000, "seed {seed}: a request is never answered");
    }
}

/// Checks that parked connections outlive the workers that have served or held them, and that all
/// requests are answered. Clients send many requests on each connection, and workers are forked and
/// disconnected at random. With half of the seeds, workers are also killed. A kill may close only
/// the connections that the killed worker has, and those that the master moves to it after its
/// exit.
#[test]
fn idle_connections_outlive_their_workers() {
    for policy in [SchedulingPolicy::RoundRobin, SchedulingPolicy::Shared] {
        outlive_their_workers(policy);
    }
}

fn outlive_their_workers(policy: SchedulingPolicy) {
    let steps = super::number("CLUSTER_SIMULATION_STEPS").unwrap_or(0);
    let mut moved = 0;
    for seed in 0..100 + steps / 2_000_000 {
        let mut rng = Rng::with_seed(seed);
        let (kills, waits) = (seed % 2 == 1, seed % 4 < 2);
        let listen = if waits { LISTEN_FOR_DATA } else { LISTEN };
        let mut schedule = Schedule::new(policy);
        schedule.world.limit_parked(1000);
        schedule.world.call(Call::Retain, None, FIXED_PORT);
        let mut killed_with = 0;
        for _ in 0..3000 {
            match rng.u8(..) {
                0..=7 if schedule.world.clients() < 30 => {
                    schedule.step(step(StepKind::Connect, 0, 0));
                }
                8..=25 => schedule.step(step(StepKind::Request, 0, rng.u8(..))),
                26..=28 => schedule.step(step(StepKind::Call(Call::Fork), 0, 0)),
                29 => schedule.step(step(StepKind::Call(Call::Disconnect), rng.u8(..), 0)),
                30 if kills => {
                    if let Some(worker) = schedule.world.living(rng.u8(..)) {
                        killed_with += count_with(&schedule, worker);
                        let status = std::os::unix::process::ExitStatusExt::from_raw(9);
                        schedule.world.exit(worker, status);
                    }
                }
                _ => advance(&mut schedule, &mut rng, listen),
            }
        }
        answer_all(&mut schedule, &mut rng, listen, seed);
        let world = &schedule.world;
        let ledger = world.master.ledger();
        let closed = world.fates.iter().filter(|fate| fate.is_closed).count();
        let killed_with = killed_with + world.moved_to_exited;
        let is_explained = closed <= killed_with;
        assert!(
            is_explained,
            "seed {seed}: {closed} are closed, {killed_with} by kills"
        );
        let outcomes = [ledger.dropped, ledger.idle_closed, ledger.expired];
        assert_eq!(outcomes, [0; 3], "seed {seed}");
        // Workers of a shared listener park connections in the master only when they disconnect.
        let is_enough = ledger.resumed > 10 || policy == SchedulingPolicy::Shared;
        assert!(is_enough, "seed {seed}: {ledger:?}");
        moved += ledger.received;
        schedule.world.end(Ending::Stop);
    }
    assert!(moved > 1000, "{policy:?}: {moved} connections");
}

/// Checks that parked connections go only to workers of the user whose worker parked them (the
/// kernel checks each), that none of them closes while such a worker serves the listener, and that
/// all requests are answered. Workers of two users are forked and disconnected at random, but the
/// last one of a user stays.
#[test]
fn parked_connections_return_to_workers_of_their_user() {
    let steps = super::number("CLUSTER_SIMULATION_STEPS").unwrap_or(0);
    for policy in [SchedulingPolicy::RoundRobin, SchedulingPolicy::Shared] {
        let mut has_mixed = false;
        for seed in 0..100 + steps / 2_000_000 {
            has_mixed |= return_to_their_user(policy, seed);
        }
        assert!(has_mixed, "{policy:?}: both users have never served");
    }
}

/// Returns whether connections of both users have been parked.
fn return_to_their_user(policy: SchedulingPolicy, seed: u64) -> bool {
    let mut rng = Rng::with_seed(seed);
    let listen = if rng.bool() { LISTEN_FOR_DATA } else { LISTEN };
    let mut schedule = Schedule::new(policy);
    schedule.world.limit_parked(1000);
    schedule.world.call(Call::Retain, None, FIXED_PORT);
    for _ in 0..3000 {
        match rng.u8(..) {
            0..=7 if schedule.world.clients() < 30 => {
                schedule.step(step(StepKind::Connect, 0, 0));
            }
            8..=25 => schedule.step(step(StepKind::Request, 0, rng.u8(..))),
            26..=28 => {
                let choice = [0, OTHER_USER][usize::from(rng.bool())];
                schedule.step(step(StepKind::Call(Call::Fork), 0, choice));
            }
            29 => disconnect_one_of_several(&mut schedule, rng.u8(..)),
            _ => advance(&mut schedule, &mut rng, listen),
        }
    }
    answer_all(&mut schedule, &mut rng, listen, seed);
    let world = &schedule.world;
    let closed = world.fates.iter().filter(|fate| fate.is_closed).count();
    assert_eq!(closed, 0, "seed {seed}: {:?}", world.master.ledger());
    let mut users: Vec<_> = world.fates.iter().filter_map(|fate| fate.had_by).collect();
    users.sort_unstable();
    users.dedup();
    let has_mixed = users.len() == 2 && world.master.ledger().parked > 10;
    schedule.world.end(Ending::Stop);
    has_mixed
}

/// Disconnects the worker with the index `n` among those that serve the listener, unless it is the
/// last one of its user.
fn disconnect_one_of_several(schedule: &mut Schedule, n: u8) {
    let world = &mut schedule.world;
    let serving = world.master.serving(world.retained[0]);
    let Some(worker) = nth(serving.iter().copied(), n) else {
        return;
    };
    let user = world.processes[&worker].user;
    let own = serving
        .iter()
        .filter(|other| world.processes[other].user == user);
    if own.count() > 1 {
        world.call(Call::Disconnect, Some(worker), 0);
        world.check();
    }
}

/// Checks that idle connections outlive an upgrade, in which another master takes over and all
/// workers of the first one disconnect, and that all requests are answered. The masters may use
/// different policies. The new master's workers may start late.
#[test]
fn idle_connections_outlive_an_upgrade() {
    const POLICIES: [SchedulingPolicy; 2] =
        [SchedulingPolicy::RoundRobin, SchedulingPolicy::Shared];
    let steps = super::number("CLUSTER_SIMULATION_STEPS").unwrap_or(0);
    for seed in 0..100 + steps / 2_000_000 {
        let mut rng = Rng::with_seed(seed);
        let [old, new] = [0, 1].map(|bit| POLICIES[usize::from(seed >> bit & 1 == 1)]);
        let listen = if rng.bool() { LISTEN_FOR_DATA } else { LISTEN };
        let [mut old, mut new] = [old, new].map(|policy| {
            let mut schedule = Schedule::new(policy);
            schedule.world.limit_parked(1000);
            schedule.world.call(Call::Retain, None, FIXED_PORT);
            schedule
        });
        for _ in 0..3 {
            old.step(step(StepKind::Call(Call::Fork), 0, 0));
        }
        for _ in 0..1000 {
            match rng.u8(..) {
                0..=15 if old.world.clients() < 30 => old.step(step(StepKind::Connect, 0, 0)),
                16..=35 => old.step(step(StepKind::Request, 0, rng.u8(..))),
                _ => advance(&mut old, &mut rng, listen),
            }
        }
        old.world.run_master();
        old.world.call(Call::PassParked, None, 0);
        old.world.call(Call::DisconnectAll, None, 0);
        let mut steps = 0;
        while old.world.living(0).is_some() || !old.world.is_passed() || is_any_pending(&new) {
            match rng.u8(..) {
                0..=5 => old.step(step(StepKind::Request, 0, rng.u8(..))),
                6..=10 if steps < 2000 => new.step(step(StepKind::Request, 0, rng.u8(..))),
                11..=13 => new.step(step(StepKind::Call(Call::Fork), 0, 0)),
                14..=79 => advance(&mut new, &mut rng, listen),
                _ => advance(&mut old, &mut rng, listen),
            }
            for client in std::mem::take(&mut old.world.passed) {
                let (handle, fate) = (new.world.retained[0], old.world.fates[client as usize]);
                new.world.receive_passed(handle, fate);
                new.world.check();
            }
            steps += 1;
            assert!(steps < 100_000, "seed {seed}: a request is never answered");
        }
        let closed = |schedule: &Schedule| {
            let fates = schedule.world.fates.iter();
            fates.filter(|fate| fate.is_closed).count()
        };
        let ledger = old.world.master.ledger();
        assert_eq!(closed(&old) as u64, ledger.passed, "seed {seed}");
        let mut served = old.world.fates.iter().filter(|fate| fate.served);
        assert!(served.all(|fate| fate.is_closed), "seed {seed}: not passed");
        assert_eq!(new.world.clients(), ledger.passed, "seed {seed}");
        assert!(ledger.passed > 5, "seed {seed}: {ledger:?}");
        assert_eq!(closed(&new), 0, "seed {seed}");
        new.world.end(Ending::Stop);
        old.world.end(Ending::Stop);
    }
}

/// Checks that neither new nor resumed connections wait forever if there are always some of both.
#[test]
fn new_and_resumed_connections_both_advance() {
    let mut schedule = Schedule::new(SchedulingPolicy::RoundRobin);
    schedule.world.limit_parked(1000);
    let worker = schedule.world.fork();
    schedule.world.settle();
    schedule
        .world
        .call_worker(worker, WorkerCall::Listen, LISTEN);
    schedule.world.settle();
    let mut before = (0, 0);
    for round in 0..100 {
        // All served clients send another request, and new clients connect.
        schedule.world.send_all_requests();
        for _ in 0..4 {
            schedule.world.connect(0);
        }
        for _ in 0..8 {
            serve(&mut schedule, worker, LISTEN, 0);
            schedule.world.settle();
        }
        schedule.world.pass(Time::from_millis(1));
        let after = (
            schedule.world.served,
            schedule.world.master.ledger().resumed,
        );
        if round % 10 == 9 {
            let is_fair = after.0 > before.0 && after.1 > before.1;
            assert!(is_fair, "round {round}: {before:?} and {after:?}");
            before = after;
        }
    }
}

/// Returns a schedule in which one worker has served and parked the connections of `clients`
/// clients, which are idle.
fn with_idle_clients(clients: usize, listen: u8) -> (Schedule, WorkerId) {
    let mut schedule = Schedule::new(SchedulingPolicy::RoundRobin);
    schedule.world.limit_parked(clients);
    let worker = schedule.world.fork();
    schedule.world.settle();
    schedule
        .world
        .call_worker(worker, WorkerCall::Listen, listen);
    schedule.world.settle();
    (0..clients).for_each(|_| schedule.world.connect(0));
    serve_all(&mut schedule, worker);
    assert_eq!(schedule.world.held.len(), clients);
    (schedule, worker)
}

/// Serves and parks the connections of all clients that have sent something.
fn serve_all(schedule: &mut Schedule, worker: WorkerId) {
    for _ in 0..100 {
        serve(schedule, worker, LISTEN, 0);
        schedule.world.settle();
    }
}

/// Checks that a new client that sends nothing is closed earlier than a parked one, if the listener
/// has a shorter timeout for the first data.
#[test]
fn silent_new_client_expires_before_a_parked_one() {
    let (mut schedule, _) = with_idle_clients(1, LISTEN_FOR_EARLY_DATA);
    schedule.world.limit_parked(2);
    schedule.world.connect_silently(0);
    schedule.world.settle();
    for (seconds, closed) in [(1, [false, false]), (1, [false, true]), (1, [true, true])] {
        let fates = schedule.world.fates.iter();
        let is_closed: Vec<_> = fates.map(|fate| fate.is_closed).collect();
        assert_eq!(is_closed, closed);
        schedule.world.pass(Time::from_secs(seconds));
        schedule.world.settle();
    }
    assert_eq!(schedule.world.master.ledger().expired, 2);
    schedule.world.end(Ending::Stop);
}

/// Checks that a connection stays open if its client sends something before the master processes
/// the idle timeout, although the poller reports this only afterwards.
#[test]
fn request_before_the_idle_timeout_is_processed_is_answered() {
    let (mut schedule, worker) = with_idle_clients(10, LISTEN_BRIEFLY);
    schedule.world.pass(Time::from_secs(3));
    schedule.world.fates[..5]
        .iter_mut()
        .for_each(Fate::send_request);
    schedule.world.handle(MasterInput::Time);
    schedule.world.settle();
    serve_all(&mut schedule, worker);
    let ledger = schedule.world.master.ledger();
    assert_eq!((ledger.resumed, ledger.expired), (5, 5));
    let is_closed = |fate: &Fate| fate.is_closed;
    assert!(!schedule.world.fates[..5].iter().any(is_closed));
    schedule.world.end(Ending::Stop);
}

/// Checks that a connection stays open if its client sends something before the master reads that
/// a worker parks a connection beyond the maximum.
#[test]
fn request_before_the_maximum_is_exceeded_is_answered() {
    let (mut schedule, worker) = with_idle_clients(10, LISTEN_BRIEFLY);
    schedule.world.connect(0);
    schedule.world.settle();
    // Receive the new connection, and park it.
    serve(&mut schedule, worker, LISTEN, 0);
    serve(&mut schedule, worker, LISTEN, 0);
    schedule.world.run_worker(worker);
    schedule.world.fates[0].send_request();
    schedule.world.handle(MasterInput::Frame(worker));
    serve_all(&mut schedule, worker);
    let fates = &schedule.world.fates;
    let closed: Vec<_> = (0..11).filter(|client| fates[*client].is_closed).collect();
    assert_eq!(closed, [1]);
    assert!(!fates[0].is_pending);
    schedule.world.end(Ending::Stop);
}
