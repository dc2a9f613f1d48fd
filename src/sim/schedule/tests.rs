//! Tests particular scenarios, and replays schedules that failed in the past.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use fastrand::Rng;

use super::step::{StepKind, step};
use super::{Ending, Schedule, replay};
use crate::core::dispatch::STALL_TIMEOUT;
use crate::core::worker::ListenStatus;
use crate::sim::kernel::socket::QUEUE_CAPACITY;
use crate::sim::kernel::worker::application::{WorkerCall, requested_endpoint};
use crate::sim::kernel::{Call, Failure, World};
use crate::types::endpoint::BindFlags;
use crate::types::handle::{HandleId, HandleKey};
use crate::types::policy::SchedulingPolicy;
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::ToMaster;

/// The handle of the first listener that a worker opens.
const HANDLE: HandleId = HandleId(1);

/// Makes a worker's application make its next call. The application opens one listener, serves the
/// listener until it ends, and then exits.
fn serve(world: &mut World, worker: WorkerId, n: u8) {
    let process = &world.processes[&worker];
    let has_callback = |listener| process.core.has_callback(listener);
    let (call, n) = match process.listeners.first().copied() {
        // Listen on any port. The connection limit is 0, 1, 2 or none, depending on `n`. The limit
        // 0 tests that a disconnecting worker ignores its limit. If it did not, clients would stay
        // unserved.
        None => (WorkerCall::Listen, n % 4 * 5),
        Some(_) if !process.held.is_empty() && n % 2 == 1 => (WorkerCall::Park, n),
        Some(_) if !process.held.is_empty() => (WorkerCall::CloseConnection, n),
        Some(listener) if process.core.has_ended(listener) => {
            return world.exit(worker, ExitStatus::from_raw(0));
        }
        Some(listener) if process.core.listen_status(listener) == ListenStatus::Pending => return,
        Some(listener) if worker.get() % 2 == 0 && !has_callback(listener) => {
            (WorkerCall::UseCallback, n)
        }
        Some(_) => (WorkerCall::Accept, n),
    };
    world.call_worker(worker, call, n);
}

impl Schedule {
    /// Lets a random worker serve its listener.
    fn serve_at_random(&mut self, rng: &mut Rng, n: u8) {
        if let Some(worker) = self.world.living(rng.u8(..)) {
            serve(&mut self.world, worker, n);
            self.world.check();
        }
    }

    /// Takes one random step, which is never a fault.
    fn faultless_step(&mut self, rng: &mut Rng) {
        match rng.u8(0..8) {
            0..=2 => self.step(step(StepKind::Master, 0, rng.u8(..))),
            3..=5 => self.step(step(StepKind::Worker, rng.u8(..), rng.u8(..))),
            6 => self.step(step(StepKind::Pass, 0, rng.u8(0..20))),
            _ => {
                let n = rng.u8(..);
                self.serve_at_random(rng, n);
            }
        }
    }
}

/// Checks that no client is lost if all workers disconnect while clients wait. With half of the
/// seeds, random workers are also killed, but never the last living worker.
#[test]
fn stopping_serves_all_clients() {
    for seed in 0..500 {
        let mut rng = Rng::with_seed(seed);
        let mut schedule = Schedule::new(SchedulingPolicy::RoundRobin);
        for _ in 0..3 {
            schedule.step(step(StepKind::Call(Call::Fork), 0, 0));
        }
        while schedule.world.ports.is_empty() {
            schedule.faultless_step(&mut rng);
        }
        for _ in 0..rng.u32(0..1000) {
            if rng.u8(0..16) == 0 {
                schedule.step(step(StepKind::Connect, 0, 0));
            }
            schedule.faultless_step(&mut rng);
        }
        schedule.world.call(Call::DisconnectAll, None, 0);
        let mut steps = 0;
        while schedule.world.master.keeps_loop_alive() {
            let processes = schedule.world.processes.values();
            let alive = processes.filter(|process| process.is_alive()).count();
            if seed % 2 == 0 && alive > 1 && rng.u8(0..200) == 0 {
                schedule.step(step(StepKind::Kill, rng.u8(..), 0));
            }
            schedule.faultless_step(&mut rng);
            steps += 1;
            assert!(steps < 100_000, "seed {seed}: it never ends");
        }
        let world = &schedule.world;
        let ledger = world.master.ledger();
        assert_eq!(ledger.dropped, 0, "seed {seed}: {ledger:?}");
        assert_eq!(world.served, world.clients(), "seed {seed}");
    }
}

/// Checks that a detached process survives `disconnect_all` and `disconnect_all_within`.
#[test]
fn disconnect_all_leaves_detached_processes_alone() {
    for call in [Call::DisconnectAll, Call::DisconnectAllWithin] {
        let mut schedule = Schedule::new(SchedulingPolicy::RoundRobin);
        let world = &mut schedule.world;
        let process = world.detach();
        assert!(!world.master.keeps_loop_alive());
        let worker = world.fork();
        world.settle();
        world.call(call, None, 0);
        world.run_until(3, |world| world.disconnected > 0);
        assert!(world.processes[&worker].has_gone());
        assert!(world.detached[&process].is_running());
        assert!(!world.master.keeps_loop_alive());
        world.call(Call::Ref, Some(process), 0);
        assert!(world.master.keeps_loop_alive());
        world.call(Call::DisconnectAll, None, 0);
        world.run_until(3, |world| world.disconnected > 1);
        schedule.step(step(StepKind::EndDetached, 0, 0));
        schedule.world.settle();
        assert!(!schedule.world.master.keeps_loop_alive());
    }
}

/// Checks that all clients of a retained listener are served, although workers are forked, killed
/// and disconnected at random. Sometimes no worker exists.
#[test]
fn retained_listener_loses_no_client() {
    for seed in 0..500 {
        let mut rng = Rng::with_seed(seed);
        let policy = match seed % 4 {
            0 => SchedulingPolicy::Shared,
            _ => SchedulingPolicy::RoundRobin,
        };
        let mut schedule = Schedule::new(policy);
        schedule.world.call(Call::Retain, None, 0);
        let go_on = |schedule: &mut Schedule, rng: &mut Rng| match rng.u8(0..3) {
            0 => schedule.step(step(StepKind::Master, 0, rng.u8(..))),
            1 => schedule.step(step(StepKind::Worker, rng.u8(..), rng.u8(..))),
            _ => {
                schedule.step(step(StepKind::Pass, 0, rng.u8(0..4)));
                schedule.serve_at_random(rng, 3);
            }
        };
        for _ in 0..2000 {
            match rng.u8(..) {
                0..=15 => schedule.step(step(StepKind::Connect, 0, 0)),
                16..=17 => schedule.step(step(StepKind::Call(Call::Fork), 0, 0)),
                18 => schedule.step(step(StepKind::Kill, rng.u8(..), 0)),
                19 => schedule.step(step(StepKind::Call(Call::Disconnect), rng.u8(..), 0)),
                20 => schedule.step(step(StepKind::Call(Call::DisconnectAll), 0, 0)),
                _ => go_on(&mut schedule, &mut rng),
            }
        }
        let mut steps = 0;
        while schedule.world.served < schedule.world.clients() {
            if schedule.world.living(0).is_none() {
                schedule.step(step(StepKind::Call(Call::Fork), 0, 0));
            }
            go_on(&mut schedule, &mut rng);
            steps += 1;
            assert!(steps < 100_000, "seed {seed}: a client is never served");
        }
        let ledger = schedule.world.master.ledger();
        assert_eq!(ledger.dropped, 0, "seed {seed}");
        schedule.world.end(Ending::Stop);
    }
}

/// Returns a schedule and its workers, all of which listen on the same endpoint.
fn listening_workers(count: u32) -> (Schedule, Vec<WorkerId>) {
    let mut schedule = Schedule::new(SchedulingPolicy::RoundRobin);
    let world = &mut schedule.world;
    let workers: Vec<_> = (0..count).map(|_| world.fork()).collect();
    for &worker in &workers {
        world.settle();
        world.call_worker(worker, WorkerCall::Listen, 15);
    }
    world.settle();
    (schedule, workers)
}

#[test]
fn sequential_clients_rotate_exactly() {
    let (mut schedule, workers) = listening_workers(4);
    let world = &mut schedule.world;
    let mut served = [0; 4];
    for _ in 0..1000 {
        for &worker in &workers {
            world.call_worker(worker, WorkerCall::Accept, 0);
            world.settle();
        }
        world.connect(0);
        world.settle();
        for (worker, served) in workers.iter().zip(&mut served) {
            world.call_worker(*worker, WorkerCall::Accept, 0);
            *served += world.processes[worker].held.len();
            world.close_connection(*worker, 0);
        }
        world.settle();
    }
    assert_eq!(served, [250; 4]);
}

/// Checks that connections go to another worker if the worker to which they are dispatched does not
/// receive them. Also checks that a worker cannot accumulate connections with false reports: the
/// master kills the worker when its queue is full, and the other worker then serves all clients.
#[test]
fn worker_that_receives_nothing_delays_no_client() {
    let (mut schedule, workers) = listening_workers(2);
    let world = &mut schedule.world;
    let (honest, hoarder) = (workers[0], workers[1]);
    world.stop(hoarder);
    let idle = |received| {
        Ok(ToMaster::Idle {
            handle: HANDLE,
            received,
            open: 0,
        })
    };
    for round in 0..200 {
        world.forge(hoarder, idle(0));
        for _ in 0..round % 4 {
            world.connect(0);
        }
        world.settle();
        for _ in 0..4 {
            world.call_worker(honest, WorkerCall::Accept, 0);
            world.settle();
            world.close_connection(honest, 0);
            world.pass(STALL_TIMEOUT);
            world.settle();
        }
        assert!(world.clients() - world.served <= 1, "round {round}");
    }
    // In each round, the hoarder now reports one more received connection, although it receives
    // none. When its queue is full, the master cannot dispatch another connection to it. Its next
    // report then exceeds the number of dispatched connections, so the master kills it.
    let mut reported = 0;
    while world.processes[&hoarder].is_alive() {
        assert!(reported <= QUEUE_CAPACITY as u64 + 1, "not killed");
        world.connect(0);
        world.forge(hoarder, idle(reported));
        world.settle();
        reported += 1;
    }
    while world.served < world.clients() {
        let before = world.served;
        world.call_worker(honest, WorkerCall::Accept, 0);
        world.settle();
        world.call_worker(honest, WorkerCall::Accept, 0);
        world.close_connection(honest, 0);
        assert!(world.served > before, "{before} are served");
    }
}

#[test]
fn worker_without_descriptors_serves_again_after_a_backoff() {
    let (mut schedule, workers) = listening_workers(1);
    let worker = workers[0];
    schedule
        .world
        .call_worker(worker, WorkerCall::UseCallback, 0);
    for _ in 0..20 {
        schedule.step(step(StepKind::Fail(Failure::Receive), 0, 0));
        schedule.world.connect(0);
        schedule.world.settle();
        schedule.world.call_worker(worker, WorkerCall::Accept, 0);
    }
    assert!(schedule.world.served < schedule.world.clients());
    schedule.world.failing.clear();
    for _ in 0..200 {
        schedule.world.pass(Time::from_millis(10));
        schedule.world.settle();
        schedule.world.call_worker(worker, WorkerCall::Accept, 0);
    }
    assert_eq!(schedule.world.served, schedule.world.clients());
}

/// Makes a client hang up while its connection waits in a draining master, whose only worker has no
/// descriptor for it. Only the clock advances, so the master must wake up by itself.
#[test]
fn drain_ends_after_the_last_waiting_client_has_hung_up() {
    let (mut schedule, workers) = listening_workers(1);
    let (world, worker) = (&mut schedule.world, workers[0]);
    world.call_worker(worker, WorkerCall::UseCallback, 0);
    world.call_worker(worker, WorkerCall::Accept, 0);
    world.settle();
    world.failing.insert(Failure::Receive);
    world.connect(0);
    world.settle();
    world.call_worker(worker, WorkerCall::Accept, 0);
    world.settle();
    world.disconnect_all();
    world.settle();
    assert!(world.master.has_waiting());
    world.hang_up(0);
    world.pass(Time::from_millis(20));
    world.run_master();
    assert_eq!(world.master.ledger().closed_by_peer, 1);
    world.run_until(100, |world| world.disconnected > 0);
}

#[test]
fn frames_of_one_worker_do_not_bloat_the_master() {
    let (mut schedule, workers) = listening_workers(1);
    let world = &mut schedule.world;
    let talker = workers[0];
    for round in 0..1500_u32 {
        let handle = HANDLE;
        let key = HandleKey {
            endpoint: requested_endpoint(0),
            index: round + 1,
        };
        let flags = BindFlags::default();
        let frame = match round % 4 {
            0 => ToMaster::Message(vec![0; 4]),
            1 => ToMaster::Pause { handle },
            2 => ToMaster::Idle {
                handle,
                received: 0,
                open: 0,
            },
            _ => ToMaster::Listen {
                request: round,
                key,
                flags,
            },
        };
        world.forge(talker, Ok(frame));
        world.stop(talker);
        world.settle();
        assert!(world.processes[&talker].is_alive(), "round {round}");
        if round % 100 == 99 {
            let size = format!("{:?}", world.master).len();
            assert!(size < 1 << 20, "{size} bytes after {round} rounds");
        }
    }
}

// Schedules that failed in the past.

#[test]
fn idle_worker_gets_queued_connections_after_accepting_fails() {
    let m = step(StepKind::Master, 0, 0);
    let w = step(StepKind::Worker, 0, 0);
    let steps = [
        &[step(StepKind::Fail(Failure::Send), 0, 0)][..],
        &[step(StepKind::Call(Call::Fork), 0, 0)],
        &[m, w, w, w, m],
        &[step(StepKind::WorkerCall(WorkerCall::Listen), 0, 0)],
        &[w, m, w, m, m, m, w, m, m, m],
        &[step(StepKind::Call(Call::Fork), 0, 0)],
        &[m, m, w, w, m, w, m, m, m],
        &[step(StepKind::Call(Call::Fork), 0, 0)],
        &[m, w, w, m, m, w, m],
        &[step(StepKind::WorkerCall(WorkerCall::Listen), 2, 13)],
        &[w, w, m, w, m, m, m, m],
        &[step(StepKind::Kill, 0, 0)],
        &[m, w, m, m],
        &[step(StepKind::Connect, 0, 0)],
        &[m],
        &[step(StepKind::Connect, 0, 0)],
        &[step(StepKind::Connect, 0, 0)],
        &[m, m, m, m, m],
        &[step(StepKind::WorkerCall(WorkerCall::Listen), 0, 8)],
        &[m, w, m, w, w, m, m, m, m, w],
        &[step(StepKind::WorkerCall(WorkerCall::Accept), 1, 0)],
        &[w, w, m, w, m, m],
        &[step(
            StepKind::WorkerCall(WorkerCall::CloseConnection),
            1,
            0,
        )],
        &[step(StepKind::WorkerCall(WorkerCall::Accept), 1, 0)],
        &[w, w, m, m, m, m],
        &[step(StepKind::WorkerCall(WorkerCall::Accept), 0, 0)],
        &[w, w, m],
        &[step(StepKind::Fail(Failure::Accept), 0, 0)],
        &[m],
    ]
    .concat();
    replay(SchedulingPolicy::RoundRobin, Ending::Kill, &steps);
}

/// Provokes a penalty of the only idle worker. A connection is in the queue of another worker that
/// does not run. The idle worker could receive the connection, but is treated as stalled. Unless
/// the end of the penalty wakes the master, the connection stays in the queue.
#[test]
fn end_of_a_penalty_wakes_the_master() {
    let m = step(StepKind::Master, 0, 0);
    let w = step(StepKind::Worker, 0, 0);
    let steps = [
        &[step(StepKind::Call(Call::Fork), 0, 0)][..],
        &[w, w, m],
        &[step(StepKind::Call(Call::Fork), 0, 0)],
        &[w, w, w],
        &[step(StepKind::Call(Call::Fork), 0, 0)],
        &[m, w, m, w, m, m],
        &[step(StepKind::Call(Call::Fork), 0, 0)],
        &[step(StepKind::WorkerCall(WorkerCall::Listen), 0, 8)],
        &[w, w, m, m, m, m, m, m, m, w, m, m, m],
        &[step(StepKind::Connect, 0, 0)],
        &[m, w, m, m, w],
        &[step(StepKind::WorkerCall(WorkerCall::Listen), 1, 8)],
        &[w, w, w, m, w, w, m, m, m, m, m, m, w],
        &[step(StepKind::Call(Call::Fork), 0, 0)],
        &[step(StepKind::WorkerCall(WorkerCall::Accept), 1, 0)],
        &[m, w],
        &[step(StepKind::WorkerCall(WorkerCall::Accept), 0, 0)],
        &[w, w, w, w, w, m, w, w],
        &[step(StepKind::Preempt, 4, 2)],
        &[w, w],
        &[step(StepKind::Pass, 0, 17)],
        &[step(StepKind::Preempt, 1, 1)],
        &[step(StepKind::WorkerCall(WorkerCall::Accept), 1, 0)],
    ]
    .concat();
    replay(SchedulingPolicy::RoundRobin, Ending::Kill, &steps);
}
