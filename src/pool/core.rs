//! The decisions of a pool. Pure: the time is an argument.
//!
//! The life of a worker in its slot:
//!
//! ```text
//!                fork          ready          trial is over          told            exit
//!   (nothing) --------> booting -----> proving -------------> serving ------> leaving -----> (gone)
//!                          |  only if it replaces another |       |               |
//!                          +------ dies, or boot is over -+-------+ dies          | drain is over:
//!                                        |                                        | killed
//!                                        v
//!                    replacement, at once or after the back-off; or given up
//! ```
//!
//! One *rollout* at a time replaces workers: all of them for a reload, single ones for their limits. It
//! takes them in batches: successors are forked beside those who serve, prove themselves, and only
//! then are the others told to leave. It ends at the first successor that dies.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::process::ExitStatus;
use std::time::Duration;

use cluster::{Usage, WorkerId};

use super::event::{Cause, Death, GiveUp, Limit, PoolEvent};
use super::options::PoolOptions;

/// The time since the pool began.
pub(super) type Time = Duration;

/// The shortest time after which something is tried again that may fail at once.
const SHORTEST: Duration = Duration::from_millis(1);

/// What the shell is to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Fork a worker for this slot, and say what came of it by `forked` or `not_forked`.
    Fork {
        slot: usize,
        generation: u64,
    },
    /// A generation begins. If it has no settings of its own, it has those of `base`.
    Begin {
        generation: u64,
        base: u64,
    },
    Leave(WorkerId),
    /// Everybody is told, at once.
    LeaveAll,
    /// Kill a worker or a new master.
    Kill(WorkerId),
    /// The new master serves: leave the files of the listeners to it.
    HandOver,
    /// Close the channel from the new master.
    CloseUpgrade,
    /// Ask a new master to leave, and wait for its exit.
    Dismiss(WorkerId),
    /// Say what everybody has, by `measured`.
    Look,
    /// Ask the program what becomes of this slot, and say it by `decide`.
    Ask(Death),
    Tell(PoolEvent),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Booting,
    Ready,
    Leaving,
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) slot: usize,
    pub(super) pid: u32,
    pub(super) generation: u64,
    pub(super) forked: Time,
    ready: Option<Time>,
    /// When it is killed if it is not ready.
    boot_by: Time,
    /// When it was last known to be alive.
    beat: Time,
    expires: Option<Time>,
    most_connections: Option<u64>,
    /// When it is killed; it has been told to leave.
    leaves_by: Option<Time>,
    /// Why it has been killed.
    killed: Option<Cause>,
}

impl Member {
    pub(super) fn state(&self) -> State {
        match (self.leaves_by, self.ready) {
            (Some(_), _) => State::Leaving,
            (None, Some(_)) => State::Ready,
            (None, None) => State::Booting,
        }
    }
}

#[derive(Debug)]
pub(super) struct Slot {
    /// Serves, or boots to do so.
    pub(super) current: Option<WorkerId>,
    /// Boots or proves itself beside it.
    pub(super) successor: Option<WorkerId>,
    pub(super) generation: u64,
    /// Deaths since a worker was stable.
    failures: u32,
    deaths: VecDeque<Time>,
    pub(super) restart_at: Option<Time>,
    pub(super) held: bool,
    /// A replacement for a limit has failed: not again before this.
    recycle_from: Time,
    pub(super) restarts: u64,
    pub(super) last_death: Option<Death>,
}

impl Slot {
    /// Whether it is to be filled by one of this generation, and not by one of a rollout that was
    /// called off while it was forked.
    fn lacks(&self, generation: u64) -> bool {
        self.current.is_none() && self.generation == generation
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Until all successors are ready.
    Booting,
    /// Until this time all of them must live.
    Trial(Time),
    /// Until those who were replaced have gone.
    Retiring,
}

#[derive(Debug)]
struct Rollout {
    /// All slots are brought to this generation; `None`: those that have reached a limit.
    reload: Option<u64>,
    /// Successors by slot; `None` until they are forked.
    batch: BTreeMap<usize, Option<WorkerId>>,
    phase: Phase,
    canary: bool,
    replaced: usize,
    retiring: BTreeSet<WorkerId>,
}

/// Whether the pool stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    No,
    /// Workers that have not left by then are killed.
    Draining {
        by: Time,
    },
    AtOnce,
}

/// How far an upgrade has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Upgrade {
    None,
    /// The new master has until then to say that it serves.
    Pending {
        successor: WorkerId,
        by: Time,
    },
    Succeeded,
}

/// A new master that has failed and has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dismissed {
    /// It has been asked to leave, and is killed then.
    Leaving {
        by: Time,
    },
    Killed,
}

#[derive(Debug)]
pub(super) struct Core {
    options: PoolOptions,
    pub(super) slots: Vec<Slot>,
    pub(super) members: BTreeMap<WorkerId, Member>,
    /// Of those who serve, if no reload is under way or was stopped half-way.
    pub(super) generation: u64,
    last_generation: u64,
    reload_wanted: bool,
    recycle: BTreeMap<usize, (WorkerId, Limit)>,
    rollout: Option<Rollout>,
    stop: Stop,
    upgrade: Upgrade,
    dismissed: BTreeMap<WorkerId, Dismissed>,
    pub(super) quorum: bool,
    pub(super) deaths: u64,
    look_at: Option<Time>,
    /// When the shell was to come next.
    planned: Option<Time>,
    random: u64,
    commands: VecDeque<Command>,
}

impl Core {
    pub(super) fn new(mut options: PoolOptions, now: Time, seed: u64) -> Self {
        options.jitter = options.jitter.min(100);
        options.surge = options.surge.max(1);
        options.look = options.look.max(SHORTEST);
        // Whom time alone proves ready is not late before that time.
        if let Some(time) = options.readiness.alive_at(Time::ZERO) {
            options.boot = options.boot.saturating_add(time);
        }
        let looks = options.max_connections.is_some() || options.max_memory.is_some();
        let look_at = looks.then(|| now.saturating_add(options.look));
        let workers = options.workers;
        let mut core = Self {
            options,
            slots: Vec::new(),
            members: BTreeMap::new(),
            generation: 0,
            last_generation: 0,
            reload_wanted: false,
            recycle: BTreeMap::new(),
            rollout: None,
            stop: Stop::No,
            upgrade: Upgrade::None,
            dismissed: BTreeMap::new(),
            quorum: false,
            deaths: 0,
            look_at,
            planned: None,
            // Never zero, which the generator would stay at.
            random: seed | 1,
            commands: VecDeque::new(),
        };
        core.scale(workers, now);
        core
    }

    pub(super) fn next_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    pub(super) fn options(&self) -> &PoolOptions {
        &self.options
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop != Stop::No
    }

    /// Whether the pool has stopped, and every process that it has started has exited, except for a
    /// new master that serves.
    pub(super) fn is_over(&self) -> bool {
        self.is_stopping() && self.members.is_empty() && self.dismissed.is_empty()
    }

    /// Whether workers may still be forked with the settings of this generation when another one
    /// begins.
    pub(super) fn uses(&self, generation: u64) -> bool {
        let serves = |slot: &Slot| slot.generation == generation;
        self.generation == generation || self.slots.iter().any(serves)
    }

    pub(super) fn is_reloading(&self) -> bool {
        self.reload_wanted || self.rollout.as_ref().is_some_and(|r| r.reload.is_some())
    }

    pub(super) fn ready_workers(&self) -> usize {
        let ready = |member: &&Member| member.state() == State::Ready;
        self.members.values().filter(ready).count()
    }

    fn tell(&mut self, event: PoolEvent) {
        self.commands.push_back(Command::Tell(event));
    }

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

    fn fork(&mut self, slot: usize, generation: u64) {
        self.commands.push_back(Command::Fork { slot, generation });
    }

    /// After every input: what follows from it.
    fn settle(&mut self, now: Time) {
        self.roll(now);
        let quorum = self.options.quorum_of(self.slots.len());
        let is_ready = !self.is_stopping() && self.ready_workers() >= quorum;
        if is_ready != self.quorum {
            self.quorum = is_ready;
            self.tell(PoolEvent::Quorum(is_ready));
        }
    }
}

// What the program wants.
impl Core {
    pub(super) fn scale(&mut self, workers: usize, now: Time) {
        if self.is_stopping() {
            return;
        }
        while self.slots.len() < workers {
            self.slots.push(Slot {
                current: None,
                successor: None,
                generation: self.generation,
                failures: 0,
                deaths: VecDeque::new(),
                restart_at: None,
                held: false,
                recycle_from: Time::ZERO,
                restarts: 0,
                last_death: None,
            });
            self.fork(self.slots.len() - 1, self.generation);
        }
        while self.slots.len() > workers {
            let Some(slot) = self.slots.pop() else {
                break;
            };
            let number = self.slots.len();
            self.recycle.remove(&number);
            if let Some(rollout) = &mut self.rollout {
                rollout.batch.remove(&number);
            }
            for worker in slot.current.into_iter().chain(slot.successor) {
                self.leave(worker, now);
            }
        }
        self.settle(now);
    }

    /// One that is wanted while another is under way comes after it.
    pub(super) fn reload(&mut self, now: Time) {
        if !self.is_stopping() {
            self.reload_wanted = true;
            self.settle(now);
        }
    }

    /// Back to those who have not been told to leave yet.
    pub(super) fn cancel_reload(&mut self, now: Time) {
        self.reload_wanted = false;
        if self.rollout.as_ref().is_some_and(|r| r.reload.is_some()) {
            self.fail(None, now);
        }
        self.settle(now);
    }

    pub(super) fn retry(&mut self, now: Time) {
        if self.is_stopping() {
            return;
        }
        for slot in &mut self.slots {
            if std::mem::take(&mut slot.held) {
                slot.restart_at = Some(now);
            }
        }
        self.tick(now);
    }

    pub(super) fn stop(&mut self, now: Time) {
        if self.is_stopping() {
            return;
        }
        let by = now.saturating_add(self.options.drain);
        self.stop = Stop::Draining { by };
        self.reload_wanted = false;
        self.rollout = None;
        self.recycle.clear();
        self.look_at = None;
        for slot in &mut self.slots {
            (slot.current, slot.successor, slot.restart_at) = (None, None, None);
        }
        for member in self.members.values_mut() {
            member.leaves_by.get_or_insert(by);
        }
        // Workers that have not been forked yet are not needed.
        self.commands
            .retain(|command| !matches!(command, Command::Fork { .. }));
        self.fail_upgrade("the pool stops".to_owned(), now);
        self.commands.push_back(Command::LeaveAll);
        self.settle(now);
    }

    pub(super) fn stop_at_once(&mut self, now: Time) {
        self.stop(now);
        self.stop = Stop::AtOnce;
        for (worker, member) in &mut self.members {
            member.leaves_by = Some(now);
            member.killed.get_or_insert(Cause::Died);
            self.commands.push_back(Command::Kill(*worker));
        }
        for (successor, state) in &mut self.dismissed {
            *state = Dismissed::Killed;
            self.commands.push_back(Command::Kill(*successor));
        }
    }

    pub(super) fn decide(&mut self, slot: usize, decision: GiveUp, now: Time) {
        match decision {
            _ if self.is_stopping() => {}
            GiveUp::Stop => self.stop(now),
            GiveUp::Hold => {}
            GiveUp::RetryAfter(pause) => {
                if let Some(slot) = self.slots.get_mut(slot).filter(|slot| slot.held) {
                    slot.held = false;
                    slot.restart_at = Some(now.saturating_add(pause));
                }
            }
        }
    }
}

// What happens to workers.
impl Core {
    pub(super) fn forked(
        &mut self,
        slot: usize,
        generation: u64,
        worker: WorkerId,
        pid: u32,
        now: Time,
    ) {
        let expires = self.options.max_age;
        let expires = expires.map(|age| now.saturating_add(self.jittered_time(age)));
        let most_connections = self.options.max_connections;
        let most_connections = most_connections.map(|most| self.jittered(most));
        let member = Member {
            slot,
            pid,
            generation,
            forked: now,
            ready: None,
            boot_by: now.saturating_add(self.options.boot),
            beat: now,
            expires,
            most_connections,
            leaves_by: None,
            killed: None,
        };
        self.members.insert(worker, member);
        if self.is_stopping() {
            return self.forked_in_vain(worker, now);
        }
        let is_successor = self.is_awaited(slot, generation);
        if let Some(rollout) = self.rollout.as_mut().filter(|_| is_successor) {
            rollout.batch.insert(slot, Some(worker));
        }
        match self.slots.get_mut(slot) {
            Some(slot) if is_successor => slot.successor = Some(worker),
            Some(slot) if slot.lacks(generation) => slot.current = Some(worker),
            // The program has changed its mind meanwhile.
            _ => self.leave(worker, now),
        }
    }

    /// The pool was stopped while this worker was being forked: the deadline of the stop holds for it.
    fn forked_in_vain(&mut self, worker: WorkerId, now: Time) {
        let (leaves_by, killed, command) = match self.stop {
            Stop::AtOnce => (now, Some(Cause::Died), Command::Kill(worker)),
            Stop::Draining { by } => (by, None, Command::Leave(worker)),
            Stop::No => return,
        };
        if let Some(member) = self.members.get_mut(&worker) {
            member.leaves_by = Some(leaves_by);
            member.killed = killed;
            self.commands.push_back(command);
        }
    }

    pub(super) fn not_forked(&mut self, slot: usize, generation: u64, error: String, now: Time) {
        let death = Death {
            slot,
            worker: None,
            generation,
            cause: Cause::NotForked,
            error: Some(error),
            status: None,
            age: Duration::ZERO,
            usage: None,
        };
        if self.is_awaited(slot, generation) {
            self.fail(Some(death), now);
        } else if self.slots.get(slot).is_some_and(|s| s.lacks(generation)) {
            self.died(death, None, now);
        }
        self.settle(now);
    }

    /// Whether a successor is being forked for this slot. At the same moment the slot may be filled.
    fn is_awaited(&self, slot: usize, generation: u64) -> bool {
        let rollout = self.rollout.as_ref();
        rollout.is_some_and(|rollout| {
            let of_it = rollout.reload.is_none_or(|reload| reload == generation);
            of_it && rollout.batch.get(&slot) == Some(&None)
        })
    }

    pub(super) fn is_ready(&mut self, worker: WorkerId, now: Time) {
        let Some(member) = self.members.get_mut(&worker) else {
            return;
        };
        if member.state() == State::Booting && member.killed.is_none() {
            member.ready = Some(now);
            member.beat = now;
            let slot = member.slot;
            self.tell(PoolEvent::Ready { slot, worker });
            self.settle(now);
        }
    }

    pub(super) fn beats(&mut self, worker: WorkerId, now: Time) {
        if let Some(member) = self.members.get_mut(&worker) {
            member.beat = now;
        }
    }

    pub(super) fn measured(
        &mut self,
        worker: WorkerId,
        connections: Option<u64>,
        memory: Option<u64>,
        now: Time,
    ) {
        let Some(member) = self.members.get(&worker) else {
            return;
        };
        let exceeds = |most: Option<u64>, is: Option<u64>| match (most, is) {
            (Some(most), Some(is)) => is >= most,
            _ => false,
        };
        let limit = if exceeds(member.most_connections, connections) {
            Limit::Connections
        } else if exceeds(self.options.max_memory, memory) {
            Limit::Memory
        } else {
            return;
        };
        self.recycle(worker, limit, now);
        self.settle(now);
    }

    /// The process has ended.
    pub(super) fn exited(
        &mut self,
        worker: WorkerId,
        status: ExitStatus,
        usage: Option<Usage>,
        now: Time,
    ) {
        let Some(member) = self.members.remove(&worker) else {
            return;
        };
        let number = member.slot;
        if let Some(rollout) = &mut self.rollout {
            rollout.retiring.remove(&worker);
        }
        if member.state() == State::Leaving {
            let killed = member.killed.is_some();
            let left = PoolEvent::Left {
                slot: number,
                worker,
                killed,
            };
            self.tell(left);
            return self.settle(now);
        }
        let unforced = match member.ready {
            Some(_) => Cause::Died,
            None => Cause::NeverReady,
        };
        let death = Death {
            slot: number,
            worker: Some((worker, member.pid)),
            generation: member.generation,
            cause: member.killed.unwrap_or(unforced),
            error: None,
            status: Some(status),
            age: now.saturating_sub(member.forked),
            usage,
        };
        let was_current = self.slots.get(number).map(|slot| slot.current) == Some(Some(worker));
        let rollout = self.rollout.as_ref();
        let in_batch = rollout.is_some_and(|r| r.batch.get(&number) == Some(&Some(worker)));
        if in_batch {
            self.fail(Some(death.clone()), now);
        }
        if was_current {
            self.died(death, member.ready, now);
        }
        self.settle(now);
    }

    /// Nobody serves in this slot now, or the one who was to replace him does.
    fn died(&mut self, death: Death, ready: Option<Time>, now: Time) {
        self.deaths += 1;
        let number = death.slot;
        let (most, within) = self.options.give_up;
        let stable = self.options.stable;
        self.tell(PoolEvent::Died(death.clone()));
        let is_stopping = self.is_stopping();
        let Some(slot) = self.slots.get_mut(number).filter(|_| !is_stopping) else {
            return;
        };
        slot.last_death = Some(death.clone());
        slot.current = slot.successor.take();
        if ready.is_some_and(|ready| now.saturating_sub(ready) >= stable) {
            slot.failures = 0;
        }
        slot.failures += 1;
        slot.deaths.push_back(now);
        let is_past = |death: &Time| now.saturating_sub(*death) > within;
        while slot.deaths.front().is_some_and(is_past) {
            slot.deaths.pop_front();
        }
        if slot.deaths.len() > usize::try_from(most).unwrap_or(usize::MAX) {
            slot.deaths.clear();
            slot.failures = 0;
            slot.held = slot.current.is_none();
            if slot.held {
                self.tell(PoolEvent::GivenUp { slot: number });
                self.commands.push_back(Command::Ask(death));
            }
            return;
        }
        if slot.current.is_none() {
            let doublings = slot.failures.saturating_sub(2).min(31);
            let again = slot.failures > 1;
            let pause = self.options.back_off.saturating_mul(1 << doublings);
            let pause = pause.min(self.options.back_off_cap).max(SHORTEST);
            let pause = if again {
                self.jittered_time(pause)
            } else {
                Duration::ZERO
            };
            self.slots[number].restart_at = Some(now.saturating_add(pause));
            self.restart(now);
        }
    }

    fn leave(&mut self, worker: WorkerId, now: Time) {
        let end = now.saturating_add(self.options.drain);
        if let Some(member) = self.members.get_mut(&worker) {
            if member.leaves_by.is_none() {
                member.leaves_by = Some(end);
                self.commands.push_back(Command::Leave(worker));
            }
        }
    }

    /// Fills the slots whose time has come.
    fn restart(&mut self, now: Time) {
        let awaited = self.rollout.as_ref().map(|rollout| &rollout.batch);
        for (number, slot) in self.slots.iter_mut().enumerate() {
            let is_due = slot.restart_at.is_some_and(|at| at <= now);
            // A successor that is on its way fills it, too.
            if is_due && awaited.is_none_or(|batch| !batch.contains_key(&number)) {
                slot.restart_at = None;
                slot.restarts += 1;
                let generation = slot.generation;
                self.commands.push_back(Command::Fork {
                    slot: number,
                    generation,
                });
            }
        }
    }
}

// Replacing workers.
impl Core {
    fn recycle(&mut self, worker: WorkerId, limit: Limit, now: Time) {
        let Some(slot) = self.members.get(&worker).map(|member| member.slot) else {
            return;
        };
        let serves = self.slots.get(slot).filter(|s| s.current == Some(worker));
        let is_due = serves.is_some_and(|slot| slot.recycle_from <= now);
        if is_due && !self.is_stopping() && !self.recycle.contains_key(&slot) {
            self.recycle.insert(slot, (worker, limit));
        }
    }

    /// Takes the rollout as far as it goes now, or begins one.
    fn roll(&mut self, now: Time) {
        while !self.is_stopping() {
            let Some(rollout) = &mut self.rollout else {
                if !self.begin(now) {
                    return;
                }
                continue;
            };
            let is_ready = |worker: &Option<WorkerId>| {
                let member = worker.and_then(|worker| self.members.get(&worker));
                // A worker that has been killed has failed: its exit will end the rollout.
                member.is_some_and(|member| member.ready.is_some() && member.killed.is_none())
            };
            let are_ready = rollout.batch.values().all(is_ready);
            match rollout.phase {
                // The slots of the batch have been removed: no successor is left to wait for.
                Phase::Booting | Phase::Trial(_) if rollout.batch.is_empty() => {
                    rollout.phase = Phase::Retiring;
                }
                Phase::Booting | Phase::Trial(_) if !are_ready => return,
                Phase::Booting => {
                    let trial = match self.options.canary {
                        Some((_, time)) if rollout.canary => time,
                        _ => self.options.trial,
                    };
                    rollout.phase = Phase::Trial(now.saturating_add(trial));
                }
                Phase::Trial(end) if end <= now => self.promote(now),
                Phase::Retiring if rollout.retiring.is_empty() => self.next_batch(),
                Phase::Trial(_) | Phase::Retiring => return,
            }
        }
    }

    /// Returns whether there was something to begin.
    fn begin(&mut self, now: Time) -> bool {
        let is_old = |member: &Member| {
            let expired = member.expires.is_some_and(|at| at <= now);
            expired && member.state() == State::Ready && member.killed.is_none()
        };
        let members = self.members.iter();
        let old: Vec<_> = members
            .filter(|(_, member)| is_old(member))
            .map(|(w, _)| *w)
            .collect();
        for worker in old {
            self.recycle(worker, Limit::Age, now);
        }
        let reload = std::mem::take(&mut self.reload_wanted);
        if reload {
            self.last_generation += 1;
            let generation = self.last_generation;
            let base = self.generation;
            self.commands.push_back(Command::Begin { generation, base });
            self.tell(PoolEvent::Reloading { generation });
        } else if self.recycle.is_empty() {
            return false;
        }
        self.rollout = Some(Rollout {
            reload: reload.then_some(self.last_generation),
            batch: BTreeMap::new(),
            phase: Phase::Retiring,
            canary: reload && self.options.canary.is_some(),
            replaced: 0,
            retiring: BTreeSet::new(),
        });
        true
    }

    fn next_batch(&mut self) {
        let Some(rollout) = &mut self.rollout else {
            return;
        };
        let first = rollout.replaced == 0;
        rollout.canary &= first;
        let size = match self.options.canary {
            Some((workers, _)) if rollout.canary => workers.max(1),
            _ => self.options.surge,
        };
        let mut forks = Vec::new();
        let mut told = Vec::new();
        if let Some(generation) = rollout.reload {
            let slots = self.slots.iter().enumerate();
            let old = slots.filter(|(_, slot)| slot.generation != generation);
            forks.extend(old.map(|(number, _)| (number, generation)).take(size));
        } else {
            while forks.len() < size {
                let Some((number, (worker, limit))) = self.recycle.pop_first() else {
                    break;
                };
                // It may have died meanwhile, and been replaced.
                let slot = self.slots.get(number);
                if let Some(slot) = slot.filter(|slot| slot.current == Some(worker)) {
                    forks.push((number, slot.generation));
                    told.push(PoolEvent::Recycling {
                        slot: number,
                        worker,
                        limit,
                    });
                }
            }
        }
        if forks.is_empty() {
            let reload = rollout.reload;
            self.rollout = None;
            if let Some(generation) = reload {
                self.generation = generation;
                self.tell(PoolEvent::Reloaded { generation });
            }
            return;
        }
        rollout.batch = forks.iter().map(|(number, _)| (*number, None)).collect();
        rollout.phase = Phase::Booting;
        told.into_iter().for_each(|event| self.tell(event));
        for (number, generation) in forks {
            self.fork(number, generation);
        }
    }

    /// All successors have proved themselves.
    fn promote(&mut self, now: Time) {
        let Some(rollout) = &mut self.rollout else {
            return;
        };
        let batch = std::mem::take(&mut rollout.batch);
        rollout.phase = Phase::Retiring;
        rollout.replaced += batch.len();
        let mut leaving = Vec::new();
        for (number, worker) in batch {
            let Some(slot) = self.slots.get_mut(number) else {
                continue;
            };
            if let Some(generation) = rollout.reload {
                slot.generation = generation;
            }
            if slot.current != worker {
                leaving.extend(slot.current.take());
                slot.current = worker;
            }
            slot.successor = None;
            slot.restart_at = None;
            slot.held = false;
            slot.failures = 0;
            self.recycle.remove(&number);
        }
        rollout.retiring = leaving.iter().copied().collect();
        for worker in leaving {
            self.leave(worker, now);
        }
    }

    /// A successor has died, or the program wants to go back.
    fn fail(&mut self, death: Option<Death>, now: Time) {
        let Some(rollout) = self.rollout.take() else {
            return;
        };
        let again = now.saturating_add(self.options.back_off_cap.max(SHORTEST));
        for (number, worker) in rollout.batch {
            let Some(slot) = self.slots.get_mut(number) else {
                continue;
            };
            if rollout.reload.is_none() {
                slot.recycle_from = again;
            }
            // One whose predecessor has died meanwhile is in its place, and stays.
            if slot.successor.is_some() && slot.successor == worker {
                slot.successor = None;
                worker
                    .into_iter()
                    .for_each(|worker| self.leave(worker, now));
            }
        }
        match (rollout.reload, death) {
            (Some(generation), death) => self.tell(PoolEvent::ReloadFailed {
                generation,
                replaced: rollout.replaced,
                death,
            }),
            (None, Some(death)) => self.tell(PoolEvent::RecyclingFailed(death)),
            (None, None) => {}
        }
        self.restart(now);
    }
}

// Upgrades.
impl Core {
    /// Whether an upgrade can begin.
    pub(super) fn can_upgrade(&self) -> bool {
        !self.is_stopping() && self.upgrade == Upgrade::None
    }

    /// Whether a new master serves instead of this pool.
    pub(super) fn has_successor(&self) -> bool {
        self.upgrade == Upgrade::Succeeded
    }

    /// A new master has been started.
    pub(super) fn upgrading(&mut self, successor: WorkerId, now: Time) {
        // The new master's own trial may begin as late as its workers may become ready.
        let PoolOptions { boot, trial, .. } = &self.options;
        let time = boot.saturating_add(trial.saturating_mul(2));
        let by = now.saturating_add(time);
        self.upgrade = Upgrade::Pending { successor, by };
    }

    /// The new master has said that it serves.
    pub(super) fn upgraded(&mut self, now: Time) {
        if let Upgrade::Pending { .. } = self.upgrade {
            self.upgrade = Upgrade::Succeeded;
            self.commands.push_back(Command::CloseUpgrade);
            self.commands.push_back(Command::HandOver);
            self.stop(now);
            self.tell(PoolEvent::Upgraded);
        }
    }

    /// A new master has ended.
    pub(super) fn successor_exited(&mut self, successor: WorkerId, status: ExitStatus) {
        self.dismissed.remove(&successor);
        if self.pending_successor() == Some(successor) {
            self.end_upgrade(status.to_string());
        }
    }

    fn pending_successor(&self) -> Option<WorkerId> {
        match self.upgrade {
            Upgrade::Pending { successor, .. } => Some(successor),
            Upgrade::None | Upgrade::Succeeded => None,
        }
    }

    fn end_upgrade(&mut self, reason: String) {
        self.upgrade = Upgrade::None;
        self.commands.push_back(Command::CloseUpgrade);
        self.tell(PoolEvent::UpgradeFailed { reason });
    }

    /// Fails the pending upgrade, if there is one. The new master may have clients already: like a
    /// worker, it is asked to leave, and is killed after the drain time.
    fn fail_upgrade(&mut self, reason: String, now: Time) {
        if let Some(successor) = self.pending_successor() {
            self.end_upgrade(reason);
            let by = now.saturating_add(self.options.drain);
            self.dismissed.insert(successor, Dismissed::Leaving { by });
            self.commands.push_back(Command::Dismiss(successor));
        }
    }

    fn tick_upgrade(&mut self, now: Time) {
        if matches!(self.upgrade, Upgrade::Pending { by, .. } if by <= now) {
            self.fail_upgrade("not ready in time".to_owned(), now);
        }
        for (successor, state) in &mut self.dismissed {
            if matches!(state, Dismissed::Leaving { by } if *by <= now) {
                *state = Dismissed::Killed;
                self.commands.push_back(Command::Kill(*successor));
            }
        }
    }
}

// What happens with time.
impl Core {
    /// When `tick` is to be called, at the latest.
    pub(super) fn next_deadline(&mut self) -> Option<Time> {
        let options = &self.options;
        let of_member = |member: &Member| {
            if member.killed.is_some() {
                return None;
            }
            match member.state() {
                State::Leaving => member.leaves_by,
                State::Booting => {
                    let alive = options.readiness.alive_at(member.forked);
                    alive.into_iter().chain([member.boot_by]).min()
                }
                State::Ready => {
                    let beat = options.heartbeat;
                    let beat = beat.map(|within| member.beat.saturating_add(within));
                    let slot = self.slots.get(member.slot);
                    let from = slot.map_or(Time::ZERO, |slot| slot.recycle_from);
                    let waits = self.recycle.contains_key(&member.slot) || self.rollout.is_some();
                    let age = member.expires.filter(|_| !waits);
                    let age = age.map(|age| age.max(from));
                    beat.into_iter().chain(age).min()
                }
            }
        };
        let is_killed = |worker: &WorkerId| {
            let member = self.members.get(worker);
            member.is_some_and(|member| member.killed.is_some())
        };
        let trial = self.rollout.as_ref().and_then(|r| match r.phase {
            // The exit of a killed successor ends the trial.
            Phase::Trial(_) if r.batch.values().flatten().any(is_killed) => None,
            Phase::Trial(end) => Some(end),
            Phase::Booting | Phase::Retiring => None,
        });
        let upgrade = match self.upgrade {
            Upgrade::Pending { by, .. } => Some(by),
            Upgrade::None | Upgrade::Succeeded => None,
        };
        let dismissed = self.dismissed.values().filter_map(|state| match state {
            Dismissed::Leaving { by } => Some(*by),
            Dismissed::Killed => None,
        });
        let awaited = self.rollout.as_ref().map(|rollout| &rollout.batch);
        let slots = self.slots.iter().enumerate();
        let restarts = slots
            .filter(|(number, _)| awaited.is_none_or(|batch| !batch.contains_key(number)))
            .filter_map(|(_, slot)| slot.restart_at);
        let members = self.members.values().filter_map(of_member);
        let next = members.chain(restarts).chain(trial).chain(self.look_at);
        let next = next.chain(upgrade).chain(dismissed);
        self.planned = next.min();
        self.planned
    }

    pub(super) fn tick(&mut self, now: Time) {
        self.forgive_absence(now);
        let mut kills = Vec::new();
        let mut alive = Vec::new();
        for (worker, member) in &mut self.members {
            if member.killed.is_some() {
                continue;
            }
            let heartbeat = self.options.heartbeat;
            let is_silent = heartbeat.is_some_and(|h| member.beat.saturating_add(h) <= now);
            let cause = match member.state() {
                State::Leaving if member.leaves_by <= Some(now) => Some(Cause::Died),
                State::Booting if member.boot_by <= now => Some(Cause::BootDeadline),
                State::Ready if is_silent => Some(Cause::Hung),
                State::Leaving | State::Booting | State::Ready => None,
            };
            if cause.is_some() {
                member.killed = cause;
                kills.push(*worker);
            } else if member.state() == State::Booting {
                let proof = self.options.readiness.alive_at(member.forked);
                alive.extend(proof.filter(|at| *at <= now).map(|_| *worker));
            }
        }
        self.commands.extend(kills.into_iter().map(Command::Kill));
        for worker in alive {
            self.is_ready(worker, now);
        }
        if self.look_at.is_some_and(|at| at <= now) {
            self.look_at = Some(now.saturating_add(self.options.look));
            self.commands.push_back(Command::Look);
        }
        self.tick_upgrade(now);
        if !self.is_stopping() {
            self.restart(now);
        }
        self.settle(now);
    }

    /// A master that did not run, because it was stopped or the machine slept, has not heard what its
    /// workers said meanwhile.
    fn forgive_absence(&mut self, now: Time) {
        let late = self.planned.map_or(Time::ZERO, |at| now.saturating_sub(at));
        let PoolOptions {
            boot, heartbeat, ..
        } = &self.options;
        let is_long = |clock: Duration| late > clock / 4;
        for member in self.members.values_mut() {
            if is_long(*boot) {
                member.boot_by = now.saturating_add(*boot);
            }
            if heartbeat.is_some_and(is_long) {
                member.beat = now;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use proptest::prelude::*;

    use super::super::generations::Generations;
    use super::super::options::Readiness;
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const SECOND: Duration = Duration::from_secs(1);

    fn options(workers: usize) -> PoolOptions {
        PoolOptions::default().workers(workers).jitter(0)
    }

    /// A world in which workers behave as they are told to, and time passes when nothing else happens.
    struct World {
        core: Core,
        now: Time,
        last: u32,
        /// When workers were forked, for which slot and generation.
        forks: Vec<(Time, usize, u64)>,
        told: Vec<PoolEvent>,
        left: Vec<u32>,
        killed: Vec<u32>,
        asked: Vec<usize>,
        /// Forks fail.
        is_poor: bool,
        looks: u32,
        /// The shell's; settings are a number here.
        generations: Generations<u32>,
        /// The settings of every generation that there ever was.
        settings: BTreeMap<u64, Option<u32>>,
        /// Called while the next worker is being forked, as closures in settings may do.
        in_fork: Option<fn(&mut Core, Time)>,
        /// New masters that have not ended.
        successors: BTreeSet<u32>,
        dismissed: Vec<u32>,
    }

    impl World {
        fn new(options: PoolOptions) -> Self {
            let core = Core::new(options, Time::ZERO, 7);
            let mut world = Self {
                core,
                now: Time::ZERO,
                last: 0,
                forks: Vec::new(),
                told: Vec::new(),
                left: Vec::new(),
                killed: Vec::new(),
                asked: Vec::new(),
                is_poor: false,
                looks: 0,
                generations: Generations::new(),
                settings: BTreeMap::from([(0, None)]),
                in_fork: None,
                successors: BTreeSet::new(),
                dismissed: Vec::new(),
            };
            world.act();
            world
        }

        /// One whose workers are all ready.
        fn serving(options: PoolOptions) -> Self {
            let mut world = Self::new(options);
            world.all_ready();
            world.told.clear();
            world.forks.clear();
            world
        }

        fn act(&mut self) {
            while let Some(command) = self.core.next_command() {
                match command {
                    Command::Fork { slot, generation } => {
                        let of_generation = self.generations.of(generation);
                        assert_eq!(Some(&of_generation), self.settings.get(&generation));
                        self.forks.push((self.now, slot, generation));
                        if let Some(call) = self.in_fork.take() {
                            self.input(call);
                        }
                        if self.is_poor {
                            let error = "poor".to_owned();
                            self.core.not_forked(slot, generation, error, self.now);
                        } else {
                            self.last += 1;
                            let pid = 1000 + self.last;
                            let worker = WorkerId::from(self.last);
                            self.core.forked(slot, generation, worker, pid, self.now);
                        }
                    }
                    Command::Begin { generation, base } => {
                        let core = &self.core;
                        let unused = self.generations.begin(generation, base, |g| core.uses(g));
                        drop(unused);
                        let settings = self.generations.of(generation);
                        let other = self.settings.insert(generation, settings);
                        assert_eq!(other, None, "a generation begins once");
                    }
                    Command::HandOver | Command::CloseUpgrade => {}
                    Command::Dismiss(successor) => self.dismissed.push(successor.get()),
                    Command::Leave(worker) => self.left.push(worker.get()),
                    Command::LeaveAll => self.left.extend(self.members()),
                    Command::Kill(worker) => self.killed.push(worker.get()),
                    Command::Look => self.looks += 1,
                    Command::Ask(death) => self.asked.push(death.slot),
                    Command::Tell(event) => self.told.push(event),
                }
            }
        }

        fn input(&mut self, input: impl FnOnce(&mut Core, Time)) {
            input(&mut self.core, self.now);
            self.act();
        }

        fn ready(&mut self, worker: u32) {
            self.input(|core, now| core.is_ready(worker.into(), now));
        }

        fn all_ready(&mut self) {
            let workers = self.members();
            for worker in workers {
                self.ready(worker);
            }
        }

        fn dies(&mut self, worker: u32) {
            let status = ExitStatus::from_raw(1 << 8);
            self.input(|core, now| core.exited(worker.into(), status, None, now));
        }

        /// Lets time pass, with all that is due in it.
        fn pass(&mut self, time: Duration) {
            let end = self.now + time;
            while let Some(next) = self.core.next_deadline().filter(|next| *next <= end) {
                self.now = self.now.max(next);
                self.input(Core::tick);
                let next = self.core.next_deadline();
                assert!(next.is_none_or(|next| next > self.now), "it spins");
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

        /// Returns the new master.
        fn upgrade(&mut self) -> u32 {
            assert!(self.core.can_upgrade());
            self.last += 1;
            let successor = self.last;
            self.successors.insert(successor);
            self.input(|core, now| core.upgrading(successor.into(), now));
            successor
        }

        fn successor_exits(&mut self, successor: u32) {
            assert!(self.successors.remove(&successor));
            let status = ExitStatus::from_raw(0);
            self.input(|core, _| core.successor_exited(successor.into(), status));
        }

        /// The processes that have been killed exit.
        fn bury(&mut self) {
            for process in std::mem::take(&mut self.killed) {
                if self.successors.contains(&process) {
                    self.successor_exits(process);
                } else {
                    self.dies(process);
                }
            }
        }

        fn upgrade_failures(&self) -> Vec<&str> {
            let failures = self.told.iter().filter_map(|event| {
                let PoolEvent::UpgradeFailed { reason } = event else {
                    return None;
                };
                Some(reason.as_str())
            });
            failures.collect()
        }

        fn current(&self) -> Vec<Option<u32>> {
            let number = |slot: &Slot| slot.current.map(WorkerId::get);
            self.core.slots.iter().map(number).collect()
        }

        fn members(&self) -> Vec<u32> {
            self.core
                .members
                .keys()
                .map(|worker| worker.get())
                .collect()
        }
    }

    #[test]
    fn slots_are_filled_and_nothing_more_is_planned() {
        let mut world = World::new(options(3));
        assert_eq!(
            world.forks,
            [(Time::ZERO, 0, 0), (Time::ZERO, 1, 0), (Time::ZERO, 2, 0)]
        );
        world.ready(1);
        assert!(!world.core.quorum);
        world.ready(2);
        assert_eq!(world.told.last(), Some(&PoolEvent::Quorum(true)));
        world.ready(3);
        assert_eq!(world.core.next_deadline(), None);
    }

    #[test]
    fn nobody_is_late_whom_time_proves_ready() {
        let readiness = Readiness::Alive(60 * SECOND);
        let mut world = World::new(options(1).readiness(readiness).boot(30 * SECOND));
        world.pass(60 * SECOND);
        assert_eq!(world.killed, []);
        assert!(world.core.quorum);
    }

    #[test]
    fn a_crash_loop_backs_off_and_gives_up() {
        let mut world = World::new(options(1).give_up(8, 60 * SECOND));
        while world.asked.is_empty() {
            if let [Some(worker)] = world.current()[..] {
                world.dies(worker);
            } else if let Some(next) = world.core.next_deadline() {
                world.pass(next - world.now);
            }
        }
        let times: Vec<_> = world
            .forks
            .iter()
            .map(|(at, _, _)| at.as_millis())
            .collect();
        assert_eq!(times, [0, 0, 100, 300, 700, 1500, 3100, 6300, 12700]);
        assert!(world.told.contains(&PoolEvent::GivenUp { slot: 0 }));
        world.input(|core, now| core.decide(0, GiveUp::Hold, now));
        world.pass(3600 * SECOND);
        assert_eq!(world.forks.len(), 9, "nothing more afterwards");
        world.input(Core::retry);
        assert_eq!(world.forks.len(), 10);
    }

    #[test]
    fn a_slot_is_tried_again_when_the_program_says_so() {
        let mut world = World::new(options(1).give_up(0, SECOND));
        world.dies(1);
        assert_eq!(world.asked, [0]);
        world.input(|core, now| core.decide(0, GiveUp::RetryAfter(5 * SECOND), now));
        world.pass(4999 * MS);
        assert_eq!(world.forks.len(), 1);
        world.pass(MS);
        assert_eq!(world.forks.len(), 2);
        world.dies(2);
        world.input(|core, now| core.decide(0, GiveUp::Stop, now));
        assert!(world.core.is_over());
    }

    #[test]
    fn the_pause_has_a_cap_and_a_stable_worker_ends_it() {
        let mut world = World::new(options(1).give_up(100, SECOND));
        for _ in 0..20 {
            let [Some(worker)] = world.current()[..] else {
                panic!("empty")
            };
            world.dies(worker);
            world.pass(30 * SECOND);
        }
        let slot = &world.core.slots[0];
        assert_eq!(slot.restart_at, None);
        let worker = slot.current.unwrap().get();
        world.ready(worker);
        world.pass(9999 * MS);
        world.dies(worker);
        assert_eq!(
            world.core.slots[0].restart_at,
            Some(world.now + 30 * SECOND)
        );
        world.pass(30 * SECOND);
        let worker = world.core.slots[0].current.unwrap().get();
        world.ready(worker);
        world.pass(10 * SECOND);
        world.dies(worker);
        assert_eq!(world.forks.last().unwrap().0, world.now, "at once");
    }

    #[test]
    fn jitter_makes_pauses_longer_and_not_shorter() {
        let mut core = Core::new(options(0).jitter(50), Time::ZERO, 3);
        let pauses: BTreeSet<_> = (0..1000).map(|_| core.jittered_time(SECOND)).collect();
        assert!(pauses.len() > 300);
        assert!(*pauses.first().unwrap() >= SECOND);
        assert!(*pauses.last().unwrap() < 1500 * MS);
        assert!(*pauses.last().unwrap() > 1450 * MS);
    }

    #[test]
    fn a_fork_that_fails_is_a_death() {
        let mut world = World::new(options(0));
        world.is_poor = true;
        world.input(|core, now| core.scale(1, now));
        let PoolEvent::Died(death) = &world.told[0] else {
            panic!("{:?}", world.told)
        };
        assert_eq!((death.cause, death.worker), (Cause::NotForked, None));
        world.is_poor = false;
        world.pass(100 * MS);
        assert!(world.core.slots[0].current.is_some());
    }

    #[test]
    fn who_is_not_ready_in_time_is_killed() {
        let mut world = World::new(options(1));
        world.pass(29_999 * MS);
        assert!(world.killed.is_empty());
        world.pass(MS);
        assert_eq!(world.killed, [1]);
        // Too late.
        world.ready(1);
        world.dies(1);
        assert!(world.told.iter().any(
            |event| matches!(event, PoolEvent::Died(death) if death.cause == Cause::BootDeadline)
        ));
        assert_eq!(world.current(), [Some(2)]);
    }

    #[test]
    fn time_proves_a_stranger_ready() {
        let readiness = Readiness::Alive(2 * SECOND);
        let mut world = World::new(options(1).readiness(readiness));
        world.pass(1999 * MS);
        assert_eq!(world.core.ready_workers(), 0);
        world.pass(MS);
        assert_eq!(world.core.ready_workers(), 1);
        assert_eq!(world.core.next_deadline(), None);
    }

    #[test]
    fn a_reload_goes_one_by_one() {
        let mut world = World::serving(options(2));
        world.input(Core::reload);
        assert_eq!(world.forks, [(Time::ZERO, 0, 1)]);
        world.ready(3);
        assert!(world.left.is_empty(), "it has to prove itself");
        world.pass(SECOND);
        assert_eq!(world.left, [1]);
        assert_eq!(world.forks.len(), 1, "the old one is still there");
        world.dies(1);
        assert_eq!(world.forks[1..], [(SECOND, 1, 1)]);
        world.ready(4);
        world.pass(SECOND);
        world.dies(2);
        assert_eq!(world.current(), [Some(3), Some(4)]);
        assert_eq!(world.core.generation, 1);
        assert_eq!(
            world.told.last(),
            Some(&PoolEvent::Reloaded { generation: 1 })
        );
        assert_eq!(world.core.next_deadline(), None);
    }

    #[test]
    fn a_reload_with_surge_replaces_all_together() {
        let mut world = World::serving(options(3).surge(3));
        world.input(Core::reload);
        assert_eq!(world.forks.len(), 3);
        world.ready(4);
        world.ready(5);
        world.pass(5 * SECOND);
        assert!(world.left.is_empty());
        world.ready(6);
        world.pass(SECOND);
        assert_eq!(world.left, [1, 2, 3]);
    }

    #[test]
    fn a_reload_that_fails_changes_nothing() {
        for dies_when_ready in [false, true] {
            let mut world = World::serving(options(2));
            for round in 1..=20 {
                world.input(Core::reload);
                let successor = world.last;
                if dies_when_ready {
                    world.ready(successor);
                    world.pass(999 * MS);
                }
                world.dies(successor);
                let Some(PoolEvent::ReloadFailed {
                    generation,
                    replaced,
                    death,
                }) = world.told.last()
                else {
                    panic!("{:?}", world.told)
                };
                assert_eq!((*generation, *replaced), (round, 0));
                assert_eq!(death.as_ref().unwrap().worker.unwrap().0.get(), successor);
            }
            assert_eq!(world.current(), [Some(1), Some(2)]);
            assert_eq!(world.forks.len(), 20);
            assert!(world.left.is_empty());
            assert_eq!(world.core.generation, 0);
            assert_eq!(world.core.next_deadline(), None);
            // Whoever dies now is replaced by one of the old generation.
            world.dies(1);
            assert_eq!(world.forks.last(), Some(&(world.now, 0, 0)));
        }
    }

    #[test]
    fn a_reload_that_is_never_ready_fails() {
        let mut world = World::serving(options(1));
        world.input(Core::reload);
        world.pass(30 * SECOND);
        assert_eq!(world.killed, [2]);
        world.dies(2);
        assert!(matches!(
            world.told.last(),
            Some(PoolEvent::ReloadFailed { .. })
        ));
        assert_eq!(world.current(), [Some(1)]);
    }

    #[test]
    fn canaries_serve_beside_all_others() {
        let canary = options(4).canary(2, 60 * SECOND);
        let mut world = World::serving(canary.clone());
        world.input(Core::reload);
        assert_eq!(world.forks.len(), 2);
        world.all_ready();
        world.pass(59 * SECOND);
        assert!(world.left.is_empty());
        world.input(Core::cancel_reload);
        assert_eq!(world.left, [5, 6]);
        assert_eq!(world.current(), [Some(1), Some(2), Some(3), Some(4)]);
        assert!(matches!(
            world.told.last(),
            Some(PoolEvent::ReloadFailed { death: None, .. })
        ));

        let mut world = World::serving(canary);
        world.input(Core::reload);
        world.all_ready();
        world.pass(60 * SECOND);
        assert_eq!(world.left, [1, 2]);
        world.dies(1);
        world.dies(2);
        assert_eq!(world.forks.len(), 3, "then one by one");
    }

    #[test]
    fn a_second_reload_comes_after_the_first() {
        let mut world = World::serving(options(1));
        world.input(Core::reload);
        world.input(Core::reload);
        world.input(Core::reload);
        assert_eq!(world.forks.len(), 1);
        world.all_ready();
        world.pass(SECOND);
        world.dies(1);
        assert_eq!(world.forks.len(), 2);
        world.all_ready();
        world.pass(SECOND);
        world.dies(2);
        assert_eq!(world.forks.len(), 2);
        assert_eq!(world.core.generation, 2);
    }

    #[test]
    fn who_dies_during_a_reload_is_replaced_by_its_successor() {
        let mut world = World::serving(options(1));
        world.input(Core::reload);
        world.dies(1);
        assert_eq!(world.forks.len(), 1);
        assert_eq!(world.current(), [Some(2)]);
        world.ready(2);
        world.pass(SECOND);
        assert_eq!(world.core.generation, 1);

        let mut world = World::serving(options(1));
        world.input(Core::reload);
        world.dies(1);
        world.dies(2);
        world.pass(SECOND);
        assert_eq!(world.forks.last(), Some(&(100 * MS, 0, 0)));
    }

    #[test]
    fn limits_replace_before_they_end() {
        let mut world = World::serving(options(2).max_age(60 * SECOND));
        world.pass(60 * SECOND);
        assert_eq!(world.forks.len(), 1, "one at a time");
        assert!(world.told.contains(&PoolEvent::Recycling {
            slot: 0,
            worker: 1.into(),
            limit: Limit::Age
        }));
        assert!(world.left.is_empty());
        world.all_ready();
        world.pass(SECOND);
        assert_eq!(world.left, [1]);
        world.dies(1);
        assert_eq!(world.forks.len(), 2);
        world.dies(4);
        assert!(matches!(
            world.told.last(),
            Some(PoolEvent::RecyclingFailed(_))
        ));
        assert_eq!(world.current(), [Some(3), Some(2)]);
        world.pass(29 * SECOND);
        assert_eq!(world.forks.len(), 2, "not again and again");
        world.pass(SECOND);
        assert_eq!(world.forks.len(), 3);
    }

    #[test]
    fn connections_and_memory_are_limits() {
        let limits = options(2).max_connections(100).max_memory(1000);
        let mut world = World::serving(limits);
        world.pass(5 * SECOND);
        assert_eq!(world.looks, 1);
        world.input(|core, now| core.measured(1.into(), Some(99), Some(999), now));
        assert!(world.forks.is_empty());
        world.input(|core, now| core.measured(1.into(), Some(100), None, now));
        assert_eq!(world.forks.len(), 1);
        world.input(|core, now| core.measured(2.into(), None, Some(1000), now));
        world.all_ready();
        world.pass(SECOND);
        world.dies(1);
        let limits: Vec<_> = world
            .told
            .iter()
            .filter_map(|event| {
                let PoolEvent::Recycling { slot, limit, .. } = event else {
                    return None;
                };
                Some((*slot, *limit))
            })
            .collect();
        assert_eq!(limits, [(0, Limit::Connections), (1, Limit::Memory)]);
    }

    #[test]
    fn who_does_not_beat_is_killed() {
        let mut world = World::serving(options(2).heartbeat(10 * SECOND));
        world.pass(9 * SECOND);
        world.input(|core, now| core.beats(1.into(), now));
        world.pass(SECOND);
        assert_eq!(world.killed, [2]);
        world.dies(2);
        assert!(
            world
                .told
                .iter()
                .any(|event| matches!(event, PoolEvent::Died(death) if death.cause == Cause::Hung))
        );
        // The master was stopped for an hour.
        world.core.next_deadline();
        world.now += 3600 * SECOND;
        world.input(Core::tick);
        assert_eq!(world.killed, [2]);
        world.pass(10 * SECOND);
        assert_eq!(world.killed.len(), 2);
    }

    #[test]
    fn scaling_adds_and_removes_at_the_end() {
        let mut world = World::serving(options(2));
        world.input(|core, now| core.scale(4, now));
        assert_eq!(world.forks.len(), 2);
        world.all_ready();
        world.input(|core, now| core.scale(1, now));
        assert_eq!(world.left, [4, 3, 2]);
        world.pass(30 * SECOND);
        assert_eq!(world.killed, [2, 3, 4], "the drain is over");
        for worker in [2, 3, 4] {
            world.dies(worker);
        }
        assert!(world.told.contains(&PoolEvent::Left {
            slot: 1,
            worker: 2.into(),
            killed: true
        }));
        assert_eq!(world.current(), [Some(1)]);
        assert_eq!(world.forks.len(), 2);
    }

    #[test]
    fn a_stop_ends() {
        let mut world = World::serving(options(2));
        world.dies(1);
        world.input(Core::reload);
        world.input(Core::stop);
        world.pass(29 * SECOND);
        assert!(world.killed.is_empty());
        world.dies(2);
        world.input(Core::reload);
        world.input(|core, now| core.scale(9, now));
        world.pass(SECOND);
        let left = world.members();
        assert_eq!(world.killed, left);
        let forks = world.forks.len();
        left.into_iter().for_each(|worker| world.dies(worker));
        assert!(world.core.is_over());
        assert_eq!(world.core.next_deadline(), None);
        assert_eq!(world.forks.len(), forks);
    }

    #[test]
    fn a_second_stop_kills() {
        let mut world = World::serving(options(2));
        world.input(Core::stop);
        world.input(Core::stop_at_once);
        assert_eq!(world.killed, [1, 2]);
    }

    #[test]
    fn stop_at_once_kills_every_new_master() {
        for is_second in [false, true] {
            let mut world = World::serving(options(1));
            let failed = world.upgrade();
            world.pass(32 * SECOND);
            assert_eq!(world.upgrade_failures(), ["not ready in time"]);
            let pending = world.upgrade();
            if is_second {
                world.input(Core::stop);
                assert_eq!(world.killed, []);
            }
            world.input(Core::stop_at_once);
            assert_eq!(world.dismissed, [failed, pending]);
            assert_eq!(world.killed, [1, failed, pending]);
            assert_eq!(world.core.next_deadline(), None);
            world.bury();
            assert!(world.core.is_over());
        }
    }

    #[test]
    fn new_master_that_serves_outlives_the_stop() {
        let mut world = World::serving(options(1));
        world.upgrade();
        world.input(Core::upgraded);
        assert_eq!(world.told.last(), Some(&PoolEvent::Upgraded));
        assert!(world.core.has_successor());
        world.input(Core::stop_at_once);
        assert_eq!(
            (&world.killed[..], &world.dismissed[..]),
            (&[1][..], &[][..])
        );
        world.bury();
        assert!(world.core.is_over());
    }

    #[test]
    fn failed_upgrade_changes_nothing_and_the_next_one_can_begin() {
        let mut world = World::serving(options(1).drain(5 * SECOND));
        let first = world.upgrade();
        world.successor_exits(first);
        assert_eq!(world.upgrade_failures(), ["exit status: 0"]);
        assert_eq!(world.dismissed, []);
        assert_eq!(world.core.next_deadline(), None);
        let second = world.upgrade();
        world.pass(32 * SECOND);
        assert_eq!(world.dismissed, [second]);
        let third = world.upgrade();
        world.pass(5 * SECOND);
        assert_eq!(world.killed, [second], "its time to leave is over");
        world.bury();
        world.successor_exits(third);
        assert_eq!(world.current(), [Some(1)]);
        assert_eq!(world.core.next_deadline(), None);
    }

    #[test]
    fn worker_that_is_being_forked_at_a_stop_ends_with_the_others() {
        for (stop, killed) in [
            (Core::stop as fn(&mut Core, Time), false),
            (Core::stop_at_once, true),
        ] {
            let mut world = World::serving(options(1));
            world.in_fork = Some(stop);
            world.input(|core, now| core.scale(3, now));
            assert_eq!(world.members(), [1, 2], "the third one is not forked");
            assert_eq!(world.left.contains(&2), !killed);
            assert_eq!(world.killed, if killed { &[1, 2][..] } else { &[] });
            world.pass(30 * SECOND);
            assert_eq!(world.killed, [1, 2]);
        }
    }

    #[test]
    fn reload_goes_on_at_once_when_its_batch_is_scaled_away() {
        let mut world = World::serving(options(3).surge(2).canary(3, 60 * SECOND));
        world.input(Core::reload);
        world.all_ready();
        world.input(|core, now| core.scale(1, now));
        world.ready(4);
        world.pass(59 * SECOND);
        assert_eq!(world.core.generation, 0, "one of them is left");
        world.input(|core, now| core.scale(0, now));
        assert_eq!(world.core.generation, 1);
        assert!(world.told.contains(&PoolEvent::Reloaded { generation: 1 }));
    }

    #[test]
    fn successor_that_has_been_killed_replaces_nobody() {
        let mut world = World::serving(options(1).heartbeat(SECOND).trial(SECOND));
        world.input(|core, now| core.beats(1.into(), now));
        world.input(Core::reload);
        world.ready(2);
        world.pass(500 * MS);
        world.input(|core, now| core.beats(1.into(), now));
        // Its trial ends at the moment at which it is known to hang.
        world.pass(500 * MS);
        assert_eq!(world.killed, [2]);
        assert_eq!(world.left, []);
        world.bury();
        assert_eq!(world.current(), [Some(1)]);
        assert!(matches!(
            world.told.last(),
            Some(PoolEvent::ReloadFailed { replaced: 0, .. })
        ));
    }

    #[test]
    fn failed_reload_does_not_postpone_the_replacement_for_a_limit() {
        let mut world = World::serving(options(1).max_age(60 * SECOND));
        world.pass(50 * SECOND);
        world.input(Core::reload);
        let successor = world.last;
        world.dies(successor);
        world.pass(10 * SECOND);
        assert!(world.told.contains(&PoolEvent::Recycling {
            slot: 0,
            worker: 1.into(),
            limit: Limit::Age
        }));
    }

    #[test]
    fn settings_of_the_generation_that_serves_outlive_failed_reloads() {
        let mut world = World::serving(options(2));
        world.reload_with(7);
        for _ in 0..2 {
            world.all_ready();
            world.pass(SECOND);
            let old = *world.left.last().unwrap();
            world.dies(old);
        }
        assert_eq!(world.core.generation, 1);
        world.reload_with(8);
        world.all_ready();
        world.pass(SECOND);
        let old = *world.left.last().unwrap();
        world.dies(old);
        let successor = world.last;
        world.dies(successor);
        assert_eq!(world.core.generation, 1, "the second slot has failed");
        world.input(|core, now| core.scale(1, now));
        world.reload_with(9);
        let successor = world.last;
        world.dies(successor);
        world.input(|core, now| core.scale(2, now));
        let (_, slot, generation) = *world.forks.last().unwrap();
        assert_eq!((slot, world.generations.of(generation)), (1, Some(7)));
    }

    #[derive(Clone, Debug)]
    enum Step {
        AllReady,
        /// All workers that have been asked to leave exit.
        AllLeave,
        Ready(usize),
        Dies(usize),
        Pass(u16),
        Scale(usize),
        Reload,
        ReloadWith(u32),
        Cancel,
        Retry,
        Poor(bool),
        Measured(usize),
        Upgrade,
        /// The new master says that it serves.
        Upgraded,
        SuccessorExits(usize),
        Stop,
        StopAtOnce,
        /// While the next worker is being forked.
        InFork(usize),
    }

    const IN_FORK: [fn(&mut Core, Time); 5] = [
        |core, now| core.scale(1, now),
        |core, now| core.scale(4, now),
        Core::reload,
        Core::stop,
        Core::stop_at_once,
    ];

    /// Steps that begin and end generations.
    fn step_of_generations() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => any::<u32>().prop_map(Step::ReloadWith),
            1 => Just(Step::Reload),
            1 => Just(Step::Cancel),
            4 => Just(Step::AllReady),
            4 => Just(Step::AllLeave),
            3 => any::<usize>().prop_map(Step::Dies),
            4 => (0u16..2_000).prop_map(Step::Pass),
            2 => (0usize..4).prop_map(Step::Scale),
            1 => (0..IN_FORK.len() - 2).prop_map(Step::InFork),
        ]
    }

    /// Calls of the application, and events, that do not stop the pool.
    fn step_before_a_stop() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => any::<usize>().prop_map(Step::Ready),
            5 => any::<usize>().prop_map(Step::Dies),
            6 => (0u16..40_000).prop_map(Step::Pass),
            1 => (0usize..6).prop_map(Step::Scale),
            2 => Just(Step::Reload),
            2 => any::<u32>().prop_map(Step::ReloadWith),
            1 => Just(Step::Cancel),
            1 => Just(Step::Retry),
            1 => any::<bool>().prop_map(Step::Poor),
            2 => any::<usize>().prop_map(Step::Measured),
            2 => Just(Step::Upgrade),
            1 => any::<usize>().prop_map(Step::SuccessorExits),
            1 => (0..IN_FORK.len() - 2).prop_map(Step::InFork),
        ]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            40 => step_before_a_stop(),
            1 => (0..IN_FORK.len()).prop_map(Step::InFork),
            1 => Just(Step::Upgraded),
            1 => Just(Step::Stop),
            1 => Just(Step::StopAtOnce),
        ]
    }

    impl World {
        fn step(&mut self, step: &Step) {
            let pick = |world: &Self, at: usize| {
                let count = world.core.members.len().max(1);
                world.members().get(at % count).copied()
            };
            match *step {
                Step::AllReady => self.all_ready(),
                Step::AllLeave => {
                    let members = self.core.members.iter();
                    let leaving = members.filter(|(_, m)| m.state() == State::Leaving);
                    let leaving: Vec<_> = leaving.map(|(worker, _)| worker.get()).collect();
                    leaving.into_iter().for_each(|worker| self.dies(worker));
                }
                Step::Ready(at) => pick(self, at).into_iter().for_each(|w| self.ready(w)),
                Step::Dies(at) => pick(self, at).into_iter().for_each(|w| self.dies(w)),
                Step::Pass(time) => self.pass(u32::from(time) * MS),
                Step::Scale(workers) => self.input(|core, now| core.scale(workers, now)),
                Step::Reload => self.input(Core::reload),
                Step::ReloadWith(settings) => self.reload_with(settings),
                Step::Cancel => self.cancel_reload(),
                Step::Retry => self.input(Core::retry),
                Step::Poor(is_poor) => self.is_poor = is_poor,
                Step::Measured(at) => {
                    if let Some(worker) = pick(self, at) {
                        self.input(|core, now| core.measured(worker.into(), Some(5), None, now));
                    }
                }
                Step::Upgrade if self.core.can_upgrade() => drop(self.upgrade()),
                Step::Upgrade => {}
                Step::Upgraded => self.input(Core::upgraded),
                Step::SuccessorExits(at) => {
                    let count = self.successors.len().max(1);
                    if let Some(&successor) = self.successors.iter().nth(at % count) {
                        self.successor_exits(successor);
                    }
                }
                Step::Stop => self.input(Core::stop),
                Step::StopAtOnce => self.input(Core::stop_at_once),
                Step::InFork(which) => self.in_fork = Some(IN_FORK[which]),
            }
        }

        /// Checks the invariants.
        fn check(&self, most: usize) {
            let core = &self.core;
            let staying = core
                .members
                .values()
                .filter(|m| m.state() != State::Leaving);
            assert!(staying.count() <= most);
            for (worker, member) in &core.members {
                let slot = core.slots.get(member.slot);
                let is_in_place = slot
                    .is_some_and(|slot| [slot.current, slot.successor].contains(&Some(*worker)));
                assert_eq!(is_in_place, member.state() != State::Leaving);
            }
            for slot in &core.slots {
                assert!(
                    slot.current
                        .is_none_or(|worker| core.members.contains_key(&worker))
                );
                let successor = slot.successor;
                assert!(successor.is_none_or(|worker| core.members.contains_key(&worker)));
                let is_empty = slot.current.is_none() && slot.successor.is_none();
                let is_due = slot.restart_at.is_some();
                assert!(!is_empty || slot.held || is_due || core.is_stopping());
                assert!(self.generations.of(slot.generation) == self.settings[&slot.generation]);
            }
            // New slots get the settings that the serving generation began with.
            let next = core.generation;
            assert_eq!(self.generations.of(next), self.settings[&next]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever happens, nobody is forgotten, there are never more workers than allowed, and when
        /// the world has come to rest all slots are full.
        #[test]
        fn any_schedule(
            steps in prop::collection::vec(step(), 0..60),
            surge in 1usize..4,
            canary in prop::option::of(1usize..3),
            age in prop::option::of(20u64..200),
        ) {
            let mut options = options(3).surge(surge).max_connections(5).give_up(5, 60 * SECOND);
            options.canary = canary.map(|workers| (workers, 20 * SECOND));
            options.max_age = age.map(Duration::from_secs);
            let mut world = World::new(options);
            for step in &steps {
                world.step(step);
                world.check(world.core.slots.len() + surge.max(canary.unwrap_or(0)));
            }
            world.in_fork = None;
            world.is_poor = false;
            let is_stopped = world.core.is_stopping();
            world.core.options.max_age = None;
            for member in world.core.members.values_mut() {
                member.expires = None;
            }
            for _ in 0..60 {
                world.input(Core::retry);
                world.all_ready();
                world.pass(31 * SECOND);
                world.bury();
            }
            if !is_stopped {
                prop_assert!(world.current().iter().all(Option::is_some));
                prop_assert_eq!(world.core.members.len(), world.core.slots.len());
            }
            prop_assert!(world.core.rollout.is_none());
            world.input(Core::stop);
            world.pass(30 * SECOND);
            world.bury();
            prop_assert!(world.core.is_over());
            prop_assert_eq!(world.core.next_deadline(), None);
        }

        /// A worker has the settings with which its generation began, however many generations have
        /// failed since.
        #[test]
        fn every_generation_keeps_its_settings(
            steps in prop::collection::vec(step_of_generations(), 0..80),
            surge in 1usize..3,
        ) {
            let mut world = World::serving(options(2).surge(surge).give_up(u32::MAX, SECOND));
            for step in &steps {
                // `World::act` compares the settings of every fork.
                world.step(step);
                world.check(world.core.slots.len() + surge);
                let known = world.generations.count();
                prop_assert!(known <= world.core.slots.len().max(4) + 2, "{known} are kept");
            }
        }

        /// In whatever state a stop finds the pool, every process that the pool has started is
        /// killed by the deadline, or at once, and the pool does not wait for those that exit
        /// before.
        #[test]
        fn a_stop_ends_by_its_deadline(
            before in prop::collection::vec(step_before_a_stop(), 0..40),
            stop in prop_oneof![
                2 => Just(Step::Stop),
                2 => Just(Step::StopAtOnce),
                1 => (3..IN_FORK.len()).prop_map(Step::InFork),
            ],
            after in prop::collection::vec(step(), 0..10),
            surge in 1usize..4,
            canary in prop::option::of(1usize..3),
            drain in 1u64..60,
        ) {
            let drain = Duration::from_secs(drain);
            let mut options = options(3).surge(surge).max_connections(5).drain(drain);
            options.canary = canary.map(|workers| (workers, 20 * SECOND));
            options.heartbeat = canary.map(|_| 30 * SECOND);
            let mut world = World::new(options);
            for step in &before {
                world.step(step);
            }
            world.is_poor = false;
            world.step(&stop);
            if let Step::InFork(_) = stop {
                // One more worker, in case no fork is pending.
                let slots = world.core.slots.len();
                world.input(|core, now| core.scale(slots + 1, now));
            }
            prop_assert!(world.core.is_stopping());
            let begin = world.now;
            let mut at_once = world.core.stop == Stop::AtOnce;
            for step in &after {
                let rest = (begin + drain).saturating_sub(world.now);
                if let Step::Pass(time) = step {
                    world.pass(rest.min(u32::from(*time) * MS));
                } else {
                    world.step(step);
                }
                at_once |= matches!(step, Step::StopAtOnce);
            }
            let alive = |world: &World| {
                let killed: BTreeSet<_> = world.killed.iter().copied().collect();
                let successors = world.successors.iter().copied();
                let successors = successors.filter(|_| !world.core.has_successor());
                let alive = world.members().into_iter().chain(successors);
                alive.filter(|process| !killed.contains(process)).count()
            };
            prop_assert!(!at_once || alive(&world) == 0, "alive: {:?}", world.core);
            // Half of the workers exit before the deadline.
            let mut early = world.core.members.keys().map(|worker| worker.get());
            let early: Vec<_> = early.by_ref().step_by(2).collect();
            early.into_iter().for_each(|worker| world.dies(worker));
            world.killed.retain(|process| {
                world.core.members.contains_key(&WorkerId::from(*process))
                    || world.successors.contains(process)
            });
            let end = (begin + drain).saturating_sub(world.now);
            world.pass(end);
            prop_assert_eq!(alive(&world), 0, "alive: {:?}", world.core);
            world.bury();
            prop_assert!(world.core.is_over());
            prop_assert_eq!(world.core.next_deadline(), None);
        }
    }
}
