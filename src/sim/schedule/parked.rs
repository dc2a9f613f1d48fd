//! Checks connections that are parked between the requests of their clients.

use fastrand::Rng;

use super::step::{StepKind, step};
use super::{Ending, Schedule};
use crate::core::worker::ListenStatus;
use crate::sim::kernel::Call;
use crate::sim::kernel::worker::WorkerCall;
use crate::types::policy::SchedulingPolicy;
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;

/// The number of a fixed port in `Call::Retain`, and in `WorkerCall::Listen` without a connection
/// limit.
const FIXED_PORT: u8 = 1;
const LISTEN: u8 = FIXED_PORT + 15;
/// The same port, with connections that wait for data.
const LISTEN_FOR_DATA: u8 = 5 * 40 + FIXED_PORT + 15;

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

/// Returns whether a client waits for the answer to a request.
fn is_any_pending(schedule: &Schedule) -> bool {
    let mut fates = schedule.world.fates.iter();
    fates.any(|fate| fate.is_pending && !fate.is_closed)
}

/// Checks that parked connections outlive the workers that have served them, and that all requests
/// are answered. Clients send many requests on each connection, and workers are forked and
/// disconnected at random. With half of the seeds, workers are also killed. This closes only the
/// connections that these workers have.
#[test]
fn idle_connections_outlive_their_workers() {
    let steps = super::number("CLUSTER_SIMULATION_STEPS").unwrap_or(0);
    for seed in 0..100 + steps / 2_000_000 {
        let mut rng = Rng::with_seed(seed);
        let (kills, waits) = (seed % 2 == 1, seed % 4 < 2);
        let listen = if waits { LISTEN_FOR_DATA } else { LISTEN };
        let mut schedule = Schedule::new(SchedulingPolicy::RoundRobin);
        schedule.world.limit_parked(1000);
        schedule.world.call(Call::Retain, None, FIXED_PORT);
        let mut killed_with = 0;
        let go_on = |schedule: &mut Schedule, rng: &mut Rng| match rng.u8(0..4) {
            0..=1 => schedule.step(step(StepKind::Master, 0, rng.u8(..))),
            2 => schedule.step(step(StepKind::Worker, rng.u8(..), rng.u8(..))),
            _ => {
                schedule.step(step(StepKind::Pass, 0, rng.u8(0..3)));
                if let Some(worker) = schedule.world.living(rng.u8(..)) {
                    serve(schedule, worker, listen, rng.u8(..));
                }
            }
        };
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
                        let process = &schedule.world.processes[&worker];
                        // A parked connection is lost only if its frame has not been written.
                        let unwritten = process.actions.len() + process.up.outbox.len();
                        killed_with += process.held.len() + unwritten;
                        let status = std::os::unix::process::ExitStatusExt::from_raw(9);
                        schedule.world.exit(worker, status);
                    }
                }
                _ => go_on(&mut schedule, &mut rng),
            }
        }
        let mut steps = 0;
        while is_any_pending(&schedule) {
            if schedule.world.living(0).is_none() {
                schedule.step(step(StepKind::Call(Call::Fork), 0, 0));
            }
            go_on(&mut schedule, &mut rng);
            steps += 1;
            assert!(steps < 100_000, "seed {seed}: a request is never answered");
        }
        let world = &schedule.world;
        let ledger = world.master.ledger();
        let closed = world.fates.iter().filter(|fate| fate.is_closed).count();
        assert!(closed <= killed_with, "seed {seed}: {closed} are closed");
        let outcomes = [ledger.dropped, ledger.idle_closed, ledger.expired];
        assert_eq!(outcomes, [0; 3], "seed {seed}");
        assert!(ledger.resumed > 10, "seed {seed}: {ledger:?}");
        schedule.world.end(Ending::Stop);
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
