//! The pool's decisions, as a pure state machine.
//!
//! The inputs are methods of [`Core`] for process events (`forked`, `exited`), application calls
//! (`reload`, `stop`) and the time. The outputs are [`Action`]s, which the driver takes with
//! [`Core::next_action`]. The core uses no descriptors, clocks or system calls. Worker settings
//! belong to the driver, which keeps them for each generation.
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
use self::slots::QuorumShare;
pub(super) use self::slots::Slot;
use self::stop::StopState;
use self::upgrade::{RejectedMaster, Takeover, Upgrade};
pub(super) use self::worker::Worker;
use super::event::PoolEvent;
use super::failure::WorkerFailure;
use super::options::PoolOptions;
use super::status::WorkerPhase;

/// The time since the pool was created.
pub(super) type Time = Duration;

/// The shortest pause before the pool repeats an operation that may fail immediately.
///
/// Without this minimum, a back-off or check interval of zero would make the loop spin. With a
/// pause of 1 ms, there are at most 1,000 repetitions per second. A longer minimum would override
/// short intervals that the application has chosen.
const MIN_PAUSE: Duration = Duration::from_millis(1);

/// An action for the driver.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Forks a worker for the slot. The driver reports `forked` or `fork_failed`.
    Fork { slot: usize, generation: u64 },
    /// Stores the settings of a new generation. If the application has passed no settings, the new
    /// generation has those of `base`.
    BeginGeneration { generation: u64, base: u64 },
    /// Disconnects a worker.
    Disconnect(WorkerId),
    /// Disconnects all workers.
    DisconnectAll,
    /// Sends SIGKILL to a worker or a new master.
    Kill(WorkerId),
    /// Leaves the listeners' socket files to the new master.
    ReleaseSocketFiles,
    /// Passes the parked connections to the new master.
    PassParked(WorkerId),
    /// Stops passing connections, because the pool stops at once.
    EndPassing(WorkerId),
    /// Makes it impossible for a new master to take over from now on. The driver then reports with
    /// `new_master_took_over` or `new_master_is_late` whether the new master had taken over before.
    EndTakeover(WorkerId),
    /// Sends SIGTERM to a new master and keeps the loop running until the new master has exited.
    TerminateNewMaster(WorkerId),
    /// Measures each worker's connections and memory. The driver reports the values with
    /// `measured`.
    MeasureWorkers,
    /// Lets the application decide what happens to the failed worker's slot. The driver reports the
    /// decision with `failure_action_chosen`.
    RequestDecision(WorkerFailure),
    /// Makes `Master::run` return an error, because this failure has stopped the pool.
    GiveUp(WorkerFailure),
    /// Delivers an event to the application.
    EmitEvent(PoolEvent),
}

/// Whether enough workers are ready.
///
/// | from | input | to |
/// |---|---|---|
/// | `NotYetReached`, `Lost` | enough workers are ready | `Reached` |
/// | `Reached` | too few workers are ready, or the pool stops | `Lost` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quorum {
    NotYetReached,
    Reached,
    Lost,
}

/// The state of a pool, with its options.
#[derive(Debug)]
pub(super) struct Core {
    options: PoolOptions,
    slots: Vec<Slot>,
    workers: BTreeMap<WorkerId, Worker>,
    /// The generation of the last complete reload, or 0 before the first one. New slots belong to
    /// this generation.
    generation: u64,
    last_generation: u64,
    reload_requested: bool,
    /// The workers that have reached a limit and are not yet being replaced, by slot.
    limits_reached: BTreeMap<usize, LimitReached>,
    rollout: Option<Rollout>,
    stop: StopState,
    takeover: Takeover,
    upgrade: Upgrade,
    /// The new masters whose upgrade has failed and that have not exited.
    rejected_masters: BTreeMap<WorkerId, RejectedMaster>,
    quorum: Quorum,
    failures: u64,
    /// The time of the next measurement of connections and memory.
    next_check: Option<Time>,
    /// The most recent result of `next_deadline`. A tick compares this deadline with the current
    /// time to determine how late the tick is.
    next_tick: Option<Time>,
    random: u64,
    actions: VecDeque<Action>,
}

impl Core {
    pub(super) fn new(mut options: PoolOptions, now: Time, seed: u64) -> Self {
        options.jitter = options.jitter.min(100);
        options.surge = options.surge.max(1);
        options.check_interval = options.check_interval.max(MIN_PAUSE);
        // With `Readiness::Alive(time)`, a worker becomes ready only when it has run for `time`, so
        // the start-up timeout begins only then.
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
            takeover: Takeover::Done,
            upgrade: Upgrade::Idle,
            rejected_masters: BTreeMap::new(),
            quorum: Quorum::NotYetReached,
            failures: 0,
            next_check,
            next_tick: None,
            // Set a bit, because a generator with the state 0 returns only zeros.
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

    /// Returns the workers that have not exited.
    pub(super) fn workers(&self) -> &BTreeMap<WorkerId, Worker> {
        &self.workers
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn has_quorum(&self) -> bool {
        self.quorum == Quorum::Reached
    }

    pub(super) fn failures(&self) -> u64 {
        self.failures
    }

    pub(super) fn is_reloading(&self) -> bool {
        self.reload_requested || self.rollout.as_ref().is_some_and(Rollout::is_reload)
    }

    /// Returns whether workers may still be forked with this generation's settings. Returns `true`
    /// for the current generation, and for any other generation while a slot belongs to it.
    pub(super) fn uses(&self, generation: u64) -> bool {
        let has_generation = |slot: &Slot| slot.generation == generation;
        self.generation == generation || self.slots.iter().any(has_generation)
    }

    pub(super) fn ready_workers(&self) -> usize {
        let is_ready = |worker: &&Worker| worker.phase() == WorkerPhase::Ready;
        self.workers.values().filter(is_ready).count()
    }

    /// Returns whether each slot has a ready worker or has been given up.
    pub(super) fn has_all_workers(&self) -> bool {
        let is_ready = |slot: &Slot| {
            let worker = slot.worker().and_then(|worker| self.workers.get(&worker));
            worker.is_some_and(Worker::is_ready)
        };
        self.slots
            .iter()
            .all(|slot| slot.is_given_up() || is_ready(slot))
    }

    fn emit(&mut self, event: PoolEvent) {
        self.actions.push_back(Action::EmitEvent(event));
    }

    /// Returns `value` increased by a random amount of at most `PoolOptions::jitter` percent.
    fn jittered(&mut self, value: u64) -> u64 {
        // The generator is Marsaglia's xorshift.
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

    /// Advances the rollout and emits an event if the quorum was reached or lost. Each input that
    /// changes the number of slots or of ready workers, or after which a rollout can begin or
    /// continue, must end with this call.
    fn settle(&mut self, now: Time) {
        self.advance_rollout(now);
        let slots = self.slots.iter();
        let counted = slots.filter(|slot| slot.quorum_share == QuorumShare::Counted);
        let needed = self.options.quorum_of(counted.count());
        let has_quorum = !self.is_stopping() && self.ready_workers() >= needed;
        if has_quorum != self.has_quorum() {
            let (quorum, event) = match has_quorum {
                true => (Quorum::Reached, PoolEvent::QuorumReached),
                false => (Quorum::Lost, PoolEvent::QuorumLost),
            };
            self.quorum = quorum;
            self.emit(event);
        }
    }
}
