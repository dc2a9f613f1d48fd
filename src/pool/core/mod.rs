//! The decisions of a pool, as a pure state machine.
//!
//! Inputs are methods of [`Core`]: facts (`forked`, `exited`), calls of the application (`reload`,
//! `stop`), and the time. Outputs are [`Action`]s, which the driver takes with [`Core::next_action`].
//! Descriptors, clocks and system calls do not belong here. Neither do the settings of workers, which
//! the driver keeps for each generation.
//!
//! | file | decides |
//! |---|---|
//! | `worker` | the states of one worker |
//! | `slots` | which worker a slot has, and when a failed worker is replaced |
//! | `rollout` | how workers are replaced: by a reload, or because of a limit |
//! | `upgrade` | how a new master takes over |
//! | `stop` | how the pool stops |
//! | `deadlines` | which transitions are due when time passes |

mod deadlines;
mod rollout;
mod slots;
mod stop;
mod upgrade;
mod worker;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use cluster::WorkerId;

use self::rollout::{LimitReached, Rollout};
pub(super) use self::slots::Slot;
use self::stop::StopState;
use self::upgrade::{RejectedMaster, Upgrade};
pub(super) use self::worker::Worker;
use super::event::PoolEvent;
use super::failure::WorkerFailure;
use super::options::PoolOptions;
use super::status::WorkerPhase;

/// The time since the pool was created.
pub(super) type Time = Duration;

/// The shortest pause before an operation is repeated that may fail at once.
///
/// Without it, a back-off or a check interval of zero would make the loop spin. 1 ms allows at most
/// 1,000 repetitions per second.
const MIN_PAUSE: Duration = Duration::from_millis(1);

/// An action for the driver.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Fork a worker for this slot, and report `forked` or `fork_failed`.
    Fork { slot: usize, generation: u64 },
    /// Keep the settings of a new generation. If it has no settings of its own, it gets those of `base`.
    BeginGeneration { generation: u64, base: u64 },
    /// Disconnect a worker.
    Disconnect(WorkerId),
    /// Disconnect all workers.
    DisconnectAll,
    /// Kill a worker or a new master.
    Kill(WorkerId),
    /// Leave the socket files of the listeners to the new master.
    ReleaseSocketFiles,
    /// Close the channel to the new master.
    CloseUpgradeChannel,
    /// Send SIGTERM to a new master, and keep the loop running until it has exited.
    TerminateNewMaster(WorkerId),
    /// Report the connections and the memory of each worker with `measured`.
    MeasureWorkers,
    /// Let the application decide about the slot of this worker, and report `failure_action_chosen`.
    RequestDecision(WorkerFailure),
    /// Deliver an event to the application.
    EmittedEvent(PoolEvent),
}

/// The state of a pool.
#[derive(Debug)]
pub(super) struct Core {
    options: PoolOptions,
    slots: Vec<Slot>,
    workers: BTreeMap<WorkerId, Worker>,
    /// The generation of new slots: the last one that was not stopped half-way.
    generation: u64,
    last_generation: u64,
    reload_requested: bool,
    /// Workers that have reached a limit and are not being replaced yet, by slot.
    limits_reached: BTreeMap<usize, LimitReached>,
    rollout: Option<Rollout>,
    stop: StopState,
    upgrade: Upgrade,
    /// New masters whose upgrade has failed, until they exit.
    rejected_masters: BTreeMap<WorkerId, RejectedMaster>,
    has_quorum: bool,
    failures: u64,
    /// When connections and memory are measured next.
    next_check: Option<Time>,
    /// The deadline that the driver was given last.
    next_tick: Option<Time>,
    random: u64,
    actions: VecDeque<Action>,
}

impl Core {
    pub(super) fn new(mut options: PoolOptions, now: Time, seed: u64) -> Self {
        options.jitter = options.jitter.min(100);
        options.surge = options.surge.max(1);
        options.check_interval = options.check_interval.max(MIN_PAUSE);
        // If time is the proof of readiness, the worker cannot be late before that time has passed.
        if let Some(time) = options.readiness.ready_at(Time::ZERO) {
            options.startup_timeout = options.startup_timeout.saturating_add(time);
        }
        let measures = options.max_connections.is_some() || options.max_memory.is_some();
        let next_check = measures.then(|| now.saturating_add(options.check_interval));
        let workers = options.workers;
        let mut core = Self {
            options,
            slots: Vec::new(),
            workers: BTreeMap::new(),
            generation: 0,
            last_generation: 0,
            reload_requested: false,
            limits_reached: BTreeMap::new(),
            rollout: None,
            stop: StopState::Running,
            upgrade: Upgrade::Idle,
            rejected_masters: BTreeMap::new(),
            has_quorum: false,
            failures: 0,
            next_check,
            next_tick: None,
            // The generator never leaves zero.
            random: seed | 1,
            actions: VecDeque::new(),
        };
        core.scale(workers, now);
        core
    }

    pub(super) fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    pub(super) fn options(&self) -> &PoolOptions {
        &self.options
    }

    pub(super) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The workers that have not exited.
    pub(super) fn workers(&self) -> &BTreeMap<WorkerId, Worker> {
        &self.workers
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn has_quorum(&self) -> bool {
        self.has_quorum
    }

    pub(super) fn failures(&self) -> u64 {
        self.failures
    }

    pub(super) fn is_reloading(&self) -> bool {
        self.reload_requested || self.rollout.as_ref().is_some_and(Rollout::is_reload)
    }

    /// Whether workers may still be forked with the settings of this generation when another one
    /// begins.
    pub(super) fn uses(&self, generation: u64) -> bool {
        let has_generation = |slot: &Slot| slot.generation == generation;
        self.generation == generation || self.slots.iter().any(has_generation)
    }

    pub(super) fn ready_workers(&self) -> usize {
        let is_ready = |worker: &&Worker| worker.phase() == WorkerPhase::Ready;
        self.workers.values().filter(is_ready).count()
    }

    fn emit(&mut self, event: PoolEvent) {
        self.actions.push_back(Action::EmittedEvent(event));
    }

    /// Lengthens a value at random by up to `PoolOptions::jitter` percent.
    fn jittered(&mut self, value: u64) -> u64 {
        // Marsaglia's xorshift.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let parts = self.random % 1000 * u64::from(self.options.jitter);
        let more = u128::from(value) * u128::from(parts) / 100_000;
        value.saturating_add(u64::try_from(more).unwrap_or(u64::MAX))
    }

    fn jittered_time(&mut self, time: Duration) -> Duration {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(self.jittered(nanos))
    }

    /// Advances the rollout and reports a change of the quorum. Called after every input.
    fn settle(&mut self, now: Time) {
        self.advance_rollout(now);
        let quorum = self.options.quorum_of(self.slots.len());
        let has_quorum = !self.is_stopping() && self.ready_workers() >= quorum;
        if has_quorum != self.has_quorum {
            self.has_quorum = has_quorum;
            self.emit(if has_quorum {
                PoolEvent::QuorumReached
            } else {
                PoolEvent::QuorumLost
            });
        }
    }
}
