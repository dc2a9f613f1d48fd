//! Checks that a worker that keeps its connection for a long time delays no other client.
//!
//! The simulation resembles a benchmark of two keep-alive connections: each of two clients connects
//! again when its connection closes. A worker serves one connection at a time and reads nothing
//! from its channel in the meantime. After a signal, a worker closes its connection and
//! disconnects.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use fastrand::Rng;

use super::Schedule;
use super::preemption::Runner;
use super::step::{StepKind, step};
use crate::core::worker::ListenStatus;
use crate::sim::kernel::worker::application::WorkerCall;
use crate::sim::kernel::{Call, World};
use crate::types::policy::SchedulingPolicy;
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;

/// The number of connected clients, and of workers without the signal, that `replenish` maintains.
const SERVING: usize = 2;
/// The number of a fixed port in `requested_endpoint` and in `Call::Retain`.
const FIXED_PORT: u8 = 1;
/// The maximum time until a client is served. It is longer than a stalled worker's penalty, which
/// lasts up to one second.
const PATIENCE: Time = Time::from_secs(3);

struct Scene {
    schedule: Schedule,
    rng: Rng,
    /// The workers that have received the signal.
    signalled: BTreeSet<WorkerId>,
}

impl Scene {
    fn new(seed: u64) -> Self {
        let mut scene = Self {
            schedule: Schedule::new(SchedulingPolicy::RoundRobin),
            rng: Rng::with_seed(seed),
            signalled: BTreeSet::new(),
        };
        // Retain the listener. Otherwise, it would close while all workers disconnect, and clients
        // that connect then would be refused.
        scene.world().call(Call::Retain, None, FIXED_PORT);
        scene
    }

    fn world(&mut self) -> &mut World {
        &mut self.schedule.world
    }

    fn living(&self) -> Vec<WorkerId> {
        let processes = self.schedule.world.processes.iter();
        let living = processes.filter(|(_, process)| process.is_alive());
        living.map(|(worker, _)| *worker).collect()
    }

    /// Returns the number of connections that workers serve.
    fn kept(&self) -> usize {
        let processes = self.schedule.world.processes.values();
        processes.map(|process| process.held.len()).sum()
    }

    /// Returns the number of clients that have connected and have never been served.
    fn waiting(&self) -> u64 {
        self.schedule.world.clients() - self.schedule.world.served
    }

    /// Forks a worker if fewer than `SERVING` workers have not received the signal. Connects a
    /// client if fewer than `SERVING` clients are connected.
    fn replenish(&mut self) {
        let lasting = self.living().into_iter();
        if lasting.filter(|id| !self.signalled.contains(id)).count() < SERVING {
            self.schedule.step(step(StepKind::Call(Call::Fork), 0, 0));
        }
        let waiting = usize::try_from(self.waiting()).unwrap();
        if self.kept() + waiting < SERVING {
            self.schedule.step(step(StepKind::Connect, 0, 0));
        }
    }

    /// Makes one step of a worker: of its library if the library has work, otherwise of its
    /// application. A worker that serves a connection does nothing until the signal, and then
    /// closes the connection.
    fn worker_step(&mut self, worker: WorkerId, n: u8) {
        let is_signalled = self.signalled.contains(&worker);
        let world = self.world();
        let process = &world.processes[&worker];
        if !process.held.is_empty() {
            if is_signalled {
                world.close_connection(worker, 0);
                world.gather_from_worker(worker);
            }
        } else if process.is_busy(world.now()) {
            world.worker_step(worker, n);
        } else {
            self.application_step(worker, is_signalled);
        }
        self.world().check();
    }

    fn application_step(&mut self, worker: WorkerId, is_signalled: bool) {
        let world = self.world();
        let process = world.process(worker);
        if is_signalled && !process.core.closes_new_listeners() {
            // The signal's callback runs inside `accept`. The check above makes it run only once.
            process.core.disconnect();
            world.gather_from_worker(worker);
        }
        let process = &world.processes[&worker];
        let Some(listener) = process.listeners.first().copied() else {
            return world.call_worker(worker, WorkerCall::Listen, FIXED_PORT + 15);
        };
        if process.core.listen_status(listener) == ListenStatus::Pending {
            return;
        }
        if process.core.has_ended(listener) {
            return world.exit(worker, ExitStatus::from_raw(0));
        }
        world.call_worker(worker, WorkerCall::Accept, 0);
    }

    fn random_step(&mut self) {
        let n = self.rng.u8(..);
        let living = self.living();
        let worker = living.get(usize::from(self.rng.u8(..)) % living.len().max(1));
        match (self.rng.u8(..), worker.copied()) {
            (0..=5, _) => self.schedule.step(step(StepKind::Pass, 0, n % 25)),
            (6..=7, worker) => {
                let runner = worker.filter(|_| n % 4 > 0).map(Runner::Worker);
                let runner = runner.unwrap_or(Runner::Master);
                self.schedule.preemption.begin(runner, n);
            }
            (8, Some(worker)) => drop(self.signalled.insert(worker)),
            // Connections that close soon make the worker's reports quick, so that the window
            // grows.
            (9..=14, Some(worker)) => drop(self.world().close_connection(worker, 0)),
            (15..=130, Some(worker)) => {
                let runner = Some(Runner::Worker(worker));
                match self.schedule.preemption.step_preempted(runner) {
                    Some(time) => self.world().pass(time),
                    None => self.worker_step(worker, n),
                }
            }
            _ => self.schedule.step(step(StepKind::Master, 0, n)),
        }
    }

    /// Lets all processes run until every client is served. No connection closes in the meantime,
    /// except those of workers that have received the signal.
    fn settle(&mut self, seed: u64) {
        let end = self.world().now() + PATIENCE;
        loop {
            self.replenish();
            self.world().run_master();
            for worker in self.living() {
                for _ in 0..8 {
                    if self.living().contains(&worker) {
                        self.worker_step(worker, 0);
                    }
                }
            }
            self.world().run_master();
            if self.kept() == SERVING {
                return;
            }
            self.world().pass(Time::from_millis(5));
            assert!(self.world().now() < end, "seed {seed}: a client waits");
        }
    }
}

#[test]
fn worker_that_keeps_its_connection_delays_no_other_client() {
    let seeds = super::number("CLUSTER_SIMULATION_STEPS").map_or(200, |steps| steps / 2000);
    for seed in 0..seeds {
        let mut scene = Scene::new(seed);
        for _ in 0..10 {
            for _ in 0..200 {
                scene.replenish();
                scene.random_step();
            }
            scene.settle(seed);
        }
    }
}
