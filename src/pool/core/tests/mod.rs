//! Tests of the core in a simulated pool, `World`. The tests control its processes and its time.

mod failures;
mod limits;
mod reload;
mod scaling;
mod schedules;
mod start_up;
mod stopping;
mod upgrade;

use super::super::event::{Limit, ReloadFailure, UpgradeFailure};
use super::super::failure::{FailureAction, FailureCause};
use super::super::generations::Generations;
use super::super::options::{Canary, Readiness};
use super::*;
use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

const MS: Duration = Duration::from_millis(1);

const SECOND: Duration = Duration::from_secs(1);

fn id(number: u32) -> WorkerId {
    crate::worker_id(number)
}

/// Returns the default options for `workers` slots, without jitter.
fn options(workers: usize) -> PoolOptions {
    PoolOptions::default().workers(workers).jitter(0)
}

/// A pool with simulated processes and a virtual clock.
struct World {
    core: Core,
    now: Time,
    last_id: u32,
    /// The time, slot and generation of each fork.
    forks: Vec<(Time, usize, u64)>,
    events: Vec<PoolEvent>,
    disconnected: Vec<u32>,
    killed: Vec<u32>,
    /// The failures for which a failure action was requested.
    limits_reached: Vec<WorkerFailure>,
    /// The failures with which the pool has given up.
    gave_up: Vec<WorkerFailure>,
    /// The cause with which all later forks fail, or `None` if they succeed.
    fork_failure: Option<FailureCause>,
    measurements: u32,
    /// The settings of the generations that still exist. In these tests, settings are numbers.
    generations: Generations<u32>,
    /// The settings of every generation since the pool was created.
    settings: BTreeMap<u64, Option<u32>>,
    /// A function that is called during the next fork, because an application's closure may also
    /// call the pool while the pool forks.
    during_fork: Option<fn(&mut Core, Time)>,
    /// The new masters that have not exited.
    new_masters: BTreeSet<u32>,
    terminated: Vec<u32>,
    /// Whether a late new master turns out to have taken over.
    has_taken_over: bool,
}

impl World {
    fn new(options: PoolOptions) -> Self {
        let core = Core::new(options, Time::ZERO, 7);
        let mut world = Self {
            core,
            now: Time::ZERO,
            last_id: 0,
            forks: Vec::new(),
            events: Vec::new(),
            disconnected: Vec::new(),
            killed: Vec::new(),
            limits_reached: Vec::new(),
            gave_up: Vec::new(),
            fork_failure: None,
            measurements: 0,
            generations: Generations::new(),
            settings: BTreeMap::from([(0, None)]),
            during_fork: None,
            new_masters: BTreeSet::new(),
            terminated: Vec::new(),
            has_taken_over: false,
        };
        world.carry_out_actions();
        world
    }

    /// Returns a pool in which all workers are ready. `events` and `forks` are empty.
    fn serving(options: PoolOptions) -> Self {
        let mut world = Self::new(options);
        world.all_ready();
        world.events.clear();
        world.forks.clear();
        world
    }

    fn carry_out_actions(&mut self) {
        while let Some(action) = self.core.next_action() {
            match action {
                Action::Fork { slot, generation } => {
                    let settings = self.generations.settings(generation);
                    assert_eq!(Some(&settings), self.settings.get(&generation));
                    self.forks.push((self.now, slot, generation));
                    if let Some(call) = self.during_fork.take() {
                        self.input(call);
                    }
                    if let Some(cause) = self.fork_failure {
                        let (error, now) = ("why".to_owned(), self.now);
                        self.core.fork_failed(slot, generation, cause, error, now);
                    } else {
                        self.last_id += 1;
                        let pid = 1000 + self.last_id;
                        let worker = id(self.last_id);
                        self.core.forked(slot, generation, worker, pid, self.now);
                    }
                }
                Action::BeginGeneration { generation, base } => {
                    let core = &self.core;
                    let unused = self.generations.begin(generation, base, |g| core.uses(g));
                    drop(unused);
                    let settings = self.generations.settings(generation);
                    let other = self.settings.insert(generation, settings);
                    assert_eq!(other, None, "a generation begins once");
                }
                Action::ReleaseSocketFiles | Action::PassParked(_) | Action::EndPassing(_) => {}
                Action::EndTakeover(new_master) if self.has_taken_over => {
                    self.core.new_master_took_over(new_master, self.now);
                }
                Action::EndTakeover(new_master) => {
                    self.core.new_master_is_late(new_master, self.now);
                }
                Action::TerminateNewMaster(new_master) => self.terminated.push(new_master.get()),
                Action::Disconnect(worker) => self.disconnected.push(worker.get()),
                Action::DisconnectAll => self.disconnected.extend(self.workers()),
                Action::Kill(worker) => self.killed.push(worker.get()),
                Action::MeasureWorkers => self.measurements += 1,
                Action::RequestDecision(failure) => self.limits_reached.push(failure),
                Action::GiveUp(failure) => self.gave_up.push(failure),
                Action::EmitEvent(event) => self.events.push(event),
            }
        }
    }

    fn input(&mut self, input: impl FnOnce(&mut Core, Time)) {
        input(&mut self.core, self.now);
        self.carry_out_actions();
    }

    /// Chooses the action for the last failure at a failure limit.
    fn choose(&mut self, action: FailureAction) {
        let failure = self.limits_reached.pop().unwrap();
        self.input(|core, now| core.failure_action_chosen(failure, action, now));
    }

    fn ready(&mut self, worker: u32) {
        self.input(|core, now| core.became_ready(id(worker), now));
    }

    fn all_ready(&mut self) {
        let workers = self.workers();
        for worker in workers {
            self.ready(worker);
        }
    }

    fn exit(&mut self, worker: u32) {
        let status = ExitStatus::from_raw(1 << 8);
        self.input(|core, now| core.exited(id(worker), status, None, now));
    }

    /// Advances the time, with a tick at each deadline.
    fn advance(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(next) = self.core.next_deadline().filter(|next| *next <= end) {
            self.now = self.now.max(next);
            self.input(Core::tick);
            let next = self.core.next_deadline();
            assert!(
                next.is_none_or(|next| next > self.now),
                "a tick leaves no deadline that is due"
            );
        }
        self.now = end;
    }

    fn reload_with(&mut self, settings: u32) {
        let _ = self.generations.replace_next(Some(settings));
        self.input(Core::reload);
    }

    fn cancel_reload(&mut self) {
        let _ = self.generations.replace_next(None);
        self.input(Core::cancel_reload);
    }

    /// Simulates the start of a new master in an upgrade. Returns the new master's id.
    fn upgrade(&mut self) -> u32 {
        assert!(self.core.can_upgrade());
        self.last_id += 1;
        let new_master = self.last_id;
        self.new_masters.insert(new_master);
        self.input(|core, now| core.new_master_started(id(new_master), now));
        new_master
    }

    fn exit_new_master(&mut self, new_master: u32) {
        assert!(self.new_masters.remove(&new_master));
        let status = ExitStatus::from_raw(0);
        self.input(|core, _| core.new_master_exited(id(new_master), status));
    }

    /// Simulates the exit of all processes that the pool has killed.
    fn exit_killed(&mut self) {
        for process in std::mem::take(&mut self.killed) {
            if self.new_masters.contains(&process) {
                self.exit_new_master(process);
            } else {
                self.exit(process);
            }
        }
    }

    fn upgrade_failures(&self) -> Vec<UpgradeFailure> {
        let failures = self.events.iter().filter_map(|event| {
            let PoolEvent::UpgradeFailed { reason } = event else {
                return None;
            };
            Some(reason.clone())
        });
        failures.collect()
    }

    fn slot_workers(&self) -> Vec<Option<u32>> {
        let number = |slot: &Slot| slot.worker().map(WorkerId::get);
        self.core.slots.iter().map(number).collect()
    }

    fn workers(&self) -> Vec<u32> {
        self.core
            .workers
            .keys()
            .map(|worker| worker.get())
            .collect()
    }
}

/// Returns the slots and workers of all `WorkerDisconnecting` events.
fn disconnecting(world: &World) -> Vec<(usize, WorkerId)> {
    let events = world.events.iter().filter_map(|event| {
        let PoolEvent::WorkerDisconnecting { slot, worker } = event else {
            return None;
        };
        Some((*slot, *worker))
    });
    events.collect()
}

/// Returns the times of the forks, in milliseconds.
fn fork_times(world: &World) -> Vec<u128> {
    let forks = world.forks.iter();
    forks.map(|(at, _, _)| at.as_millis()).collect()
}

fn limited(workers: usize) -> PoolOptions {
    options(workers).max_failures(0).failure_window(SECOND)
}
