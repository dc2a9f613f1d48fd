//! Every decision of the master.
//!
//! Facts come in as method calls. [`Action`]s go out for the shell, which carries them out at once,
//! without calling the application. Events go out for the callbacks of the application, in a later step
//! of the event loop. There is no descriptor, no clock and no system call: a connection is any type `C`,
//! and the descriptors of a message are any type `F`.
//!
//! | module | what it decides |
//! |---|---|
//! | `workers` | the life of a worker: fork, disconnect, kill, exit |
//! | `detached` | the life of a detached process |
//! | `frames` | what a worker's frame leads to |
//! | `listener`, `member` | the states of one listener, and of a worker that has it |
//! | `listener_table` | which listeners need attention |
//! | `listen` | which listener a worker gets |
//! | `accept` | when to accept |
//! | `queues` | when to dispatch and to reclaim; the choice of the worker is in `dispatch` |
//! | `leave` | how a worker leaves a listener, and what becomes of its queue |
//! | `drain` | how a listener drains and closes |
//! | `shards` | which shard a worker gets, and where new connections go |
//! | `retain` | listeners that the application retains |
//!
//! # When a worker exits
//!
//! The connections in its queue go to other workers, and its final frames are still processed:
//!
//! 1. `exited` (`workers`): the worker gets no more connections or frames. Action `CloseChannel`.
//! 2. The shell processes the final frames, and calls `channel_closed` (`workers`).
//! 3. `leave_listener` (`leave`), for each listener of the worker. Action `CloseQueue`.
//! 4. The shell empties the queue, and calls `queue_closed` (`queues`). The connections return to the
//!    dispatcher, which keeps their order, and are dispatched again.
//! 5. If no worker serves the listener any more, and the application does not retain it, the listener
//!    closes, and the connections are counted as dropped.

mod accept;
mod action;
mod detached;
mod drain;
mod frames;
mod leave;
mod listen;
mod listener;
mod listener_table;
mod member;
mod queues;
mod retain;
mod shards;
#[cfg(test)]
#[allow(clippy::wildcard_enum_match_arm)]
mod tests;
mod workers;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::config::policy::SchedulingPolicy;
use crate::core::event::{EmittedEvent, Event, Level, WorkerState};
use crate::error::Error;
use crate::types::ledger::Ledger;
use crate::types::loads::{ListenerLoad, WorkerLoad};
use crate::types::sorted_map::SortedMap;
use crate::types::time::{Time, earlier};
use crate::types::worker_id::WorkerId;
use crate::wire::frame::{Bound, HandleId, HandleKey, ToWorker};
pub(crate) use accept::ACCEPT_BATCH;
pub(crate) use action::{Action, Attachment};
use detached::DetachedEntry;
use listen::PendingBind;
use listener::{AcceptState, Listener, Stage};
use listener_table::ListenerTable;
use workers::WorkerEntry;

#[derive(Debug)]
pub(crate) struct MasterCore<C, F> {
    policy: SchedulingPolicy,
    is_policy_frozen: bool,
    /// The application chooses the worker of each connection.
    has_scheduler: bool,
    now: Time,
    last_worker: u32,
    last_handle: u32,
    workers: BTreeMap<WorkerId, WorkerEntry>,
    detached: BTreeMap<WorkerId, DetachedEntry>,
    /// How many workers and detached processes [`run`](crate::Master::run) waits for.
    referenced: usize,
    listeners: ListenerTable<C>,
    /// The listener whose waiting connections were swept last.
    last_swept: HandleId,
    keys: SortedMap<HandleKey, HandleId>,
    /// The requests whose `Bind` is being carried out.
    binding: SortedMap<HandleId, PendingBind>,
    ledger: Ledger,
    /// `Disconnected` follows at the end of `disconnect_all`.
    is_end_awaited: bool,
    /// All workers that have not exited by this time are killed.
    stop_deadline: Option<Time>,
    /// The workers that have a deadline, by its time.
    deadlines: BTreeSet<(Time, WorkerId)>,
    actions: VecDeque<Action<C>>,
    events: VecDeque<EmittedEvent<F>>,
}

impl<C, F> MasterCore<C, F> {
    pub(crate) fn new(policy: SchedulingPolicy) -> Self {
        Self {
            policy,
            is_policy_frozen: false,
            has_scheduler: false,
            now: Time::ZERO,
            last_worker: 0,
            last_handle: 0,
            workers: BTreeMap::new(),
            detached: BTreeMap::new(),
            referenced: 0,
            listeners: ListenerTable::new(),
            last_swept: HandleId(0),
            keys: SortedMap::new(),
            binding: SortedMap::new(),
            ledger: Ledger::default(),
            is_end_awaited: false,
            stop_deadline: None,
            deadlines: BTreeSet::new(),
            actions: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    pub(crate) fn policy(&self) -> SchedulingPolicy {
        self.policy
    }

    /// Sets the scheduling policy.
    ///
    /// # Errors
    ///
    /// After the first fork, or the first listener that the application retains.
    pub(crate) fn set_policy(&mut self, policy: SchedulingPolicy) -> Result<(), Error> {
        if self.is_policy_frozen {
            return Err(Error::PolicyFrozen);
        }
        self.policy = policy;
        Ok(())
    }

    /// The settings have changed.
    pub(crate) fn setup(&mut self) {
        self.emit(Level::Cluster, None, Event::Setup);
    }

    fn send(&mut self, worker: WorkerId, frame: ToWorker, with: Attachment) {
        if self.is_writable(worker) {
            self.actions.push_back(Action::Send {
                worker,
                frame,
                with,
            });
        }
    }

    /// Answers a request to listen.
    fn reply(
        &mut self,
        worker: WorkerId,
        request: u32,
        result: Result<Bound, i32>,
        with: Attachment,
    ) {
        self.send(worker, ToWorker::Reply { request, result }, with);
    }

    /// Rejects a request to listen.
    fn reject(&mut self, worker: WorkerId, request: u32, errno: i32) {
        self.reply(worker, request, Err(errno), Attachment::None);
    }

    /// Tells a worker that no new connections come from a listener. If it is to `drain` the listener, the
    /// worker serves the connections that have come.
    fn send_listener_closed(&mut self, handle: HandleId, worker: WorkerId, drain: bool) {
        let frame = ToWorker::ListenerClosed { handle, drain };
        self.send(worker, frame, Attachment::None);
    }

    /// Returns the listeners that the worker has.
    fn listeners_of(&self, worker: WorkerId) -> impl Iterator<Item = HandleId> + '_ {
        let listeners = self.listeners.iter();
        let own = listeners.filter(move |(_, listener)| listener.members.contains(worker));
        own.map(|(handle, _)| *handle)
    }
}

// Actions and events.
impl<C, F> MasterCore<C, F> {
    /// Whether `next_action` would return one.
    pub(crate) fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    pub(crate) fn next_action(&mut self) -> Option<Action<C>> {
        self.actions.pop_front()
    }

    /// Whether `next_event` would return one.
    pub(crate) fn has_events(&self) -> bool {
        !self.events.is_empty() || self.is_over()
    }

    /// Returns the next event.
    ///
    /// The state of a worker changes here, and here it leaves the table. So both agree with the event
    /// that is being delivered, however many events follow.
    pub(crate) fn next_event(&mut self) -> Option<EmittedEvent<F>> {
        self.listeners.index_changed();
        let Some(emitted) = self.events.pop_front() else {
            return self.next_end();
        };
        if let (Level::Worker, Some(worker)) = (emitted.level, emitted.worker) {
            self.apply(worker, &emitted.event);
        }
        Some(emitted)
    }

    /// Returns the end of `disconnect_all`, if it has come.
    fn next_end(&mut self) -> Option<EmittedEvent<F>> {
        if !self.is_over() {
            return None;
        }
        (self.is_end_awaited, self.stop_deadline) = (false, None);
        Some(EmittedEvent {
            level: Level::Cluster,
            worker: None,
            event: Event::Disconnected,
        })
    }

    fn apply(&mut self, process: WorkerId, event: &Event<F>) {
        let state = match event {
            Event::Online => WorkerState::Online,
            Event::Listening(_) => WorkerState::Listening,
            Event::Disconnect => WorkerState::Disconnected,
            Event::Exit(_) => {
                let removed = self.workers.remove(&process);
                let was_referenced = removed.is_some_and(|entry| entry.referenced);
                self.referenced -= usize::from(was_referenced);
                return;
            }
            Event::DetachedExit(_) => {
                self.detached.remove(&process);
                return;
            }
            Event::Setup
            | Event::Fork
            | Event::Message { .. }
            | Event::Error(_)
            | Event::Disconnected => return,
        };
        if let Some(entry) = self.workers.get_mut(&process) {
            entry.reported = state;
        }
    }

    /// Whether an awaited `disconnect_all` has ended. Retained listeners do not delay it.
    fn is_over(&self) -> bool {
        self.is_end_awaited && self.workers.is_empty() && !self.listeners.any_delays_end()
    }

    /// Returns the descriptors of the messages that have not been delivered.
    pub(crate) fn message_fds(&self) -> impl Iterator<Item = &F> {
        self.events.iter().filter_map(|emitted| {
            if let Event::Message { fds, .. } = &emitted.event {
                Some(fds)
            } else {
                None
            }
        })
    }

    fn emit(&mut self, level: Level, worker: Option<WorkerId>, event: Event<F>) {
        self.events.push_back(EmittedEvent {
            level,
            worker,
            event,
        });
    }

    fn emit_both(&mut self, worker: WorkerId, event: impl Fn() -> Event<F>) {
        for level in [Level::Worker, Level::Cluster] {
            self.emit(level, Some(worker), event());
        }
    }
}

// The time.
impl<C, F> MasterCore<C, F> {
    /// Returns the time at which `tick` is needed at the latest.
    pub(crate) fn deadline(&self) -> Option<Time> {
        let worker = self.deadlines.first().map(|(time, _)| *time);
        let due = earlier(worker, self.stop_deadline);
        earlier(due, self.listeners.deadline())
    }

    /// Sets the time, which never goes back. Deadlines are left to `tick`.
    pub(crate) fn set_time(&mut self, now: Time) {
        self.now = self.now.max(now);
    }

    /// Sets the time, and acts on each deadline that is over.
    pub(crate) fn tick(&mut self, now: Time) {
        self.set_time(now);
        if self.deadline().is_none_or(|deadline| deadline > self.now) {
            return;
        }
        self.kill_overdue();
        for handle in self.listeners.due(self.now) {
            self.tick_listener(handle);
        }
    }

    fn tick_listener(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if matches!(listener.stage, Stage::Draining(Some(grace)) if grace <= self.now) {
            listener.stage = Stage::Draining(None);
            self.finish_drain(handle);
        }
        self.end_departing(handle);
        self.watch_hang_up_if_due(handle);
        if let Some(listener) = self.listeners.get_mut(&handle) {
            if listener.dispatch_from.is_some_and(|time| time <= self.now) {
                listener.dispatch_from = None;
                self.dispatch_waiting(handle);
                self.accept_if_possible(handle);
            }
        }
        if let Some(listener) = self.listeners.get_mut(&handle) {
            if matches!(listener.accept_state, AcceptState::BackingOff(until) if until <= self.now)
            {
                listener.accept_state = AcceptState::Ready;
                self.accept_if_possible(handle);
            }
        }
        self.rebalance(handle);
    }
}

// Connections.
impl<C, F> MasterCore<C, F> {
    pub(crate) fn ledger(&self) -> Ledger {
        self.ledger
    }

    /// Whether any accepted connection waits in the master.
    pub(crate) fn has_waiting(&self) -> bool {
        self.listeners.has_waiting()
    }

    /// Returns all connections that wait in the master. Call it when all actions have been carried out.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = &C> {
        let listeners = self.listeners.values();
        listeners.flat_map(|listener| listener.dispatcher.waiting())
    }

    /// Checks at most `limit` waiting connections, and closes those for which `is_gone` is true because
    /// the client has hung up. Calls take turns through all connections.
    pub(crate) fn sweep(&mut self, limit: usize, mut is_gone: impl FnMut(&C) -> bool) {
        let mut left = limit;
        for handle in self.listeners.waiting_after(self.last_swept, limit) {
            if left == 0 {
                break;
            }
            let Some(listener) = self.listeners.get_mut(&handle) else {
                continue;
            };
            let swept = listener.dispatcher.sweep(left, &mut is_gone);
            left -= swept.checked;
            self.last_swept = handle;
            self.ledger.closed_by_peer += swept.closed;
            if swept.closed > 0 {
                // There is capacity for other connections, and a drain may be complete.
                self.accept_if_possible(handle);
                self.check_backlog_if_draining(handle);
            }
        }
    }

    /// Returns the loads of all workers, and of all listeners that are open.
    pub(crate) fn loads(&self) -> (Vec<WorkerLoad>, Vec<(HandleId, ListenerLoad)>) {
        let past = self.workers.iter();
        let past = past.map(|(worker, entry)| (*worker, entry.past_load));
        let mut workers: BTreeMap<_, _> = past.collect();
        let listeners = self.listeners.values();
        for load in listeners.flat_map(|listener| listener.dispatcher.loads()) {
            if let Some(sum) = workers.get_mut(&load.worker) {
                sum.add(&load);
            }
        }
        let open = self.listeners.iter();
        let open = open.filter(|(_, listener)| listener.stage != Stage::Unbound);
        let listeners = open.map(|(handle, listener)| {
            let load = ListenerLoad {
                address: listener.public_address(),
                accepted: listener.dispatcher.accepted(),
                queued: None,
            };
            (*handle, load)
        });
        (workers.into_values().collect(), listeners.collect())
    }

    /// Lets the application choose the worker of each further connection.
    pub(crate) fn use_scheduler(&mut self) {
        self.has_scheduler = true;
        for handle in self.listeners.ids() {
            if let Some(listener) = self.listeners.get_mut(&handle) {
                listener.dispatcher.use_scheduler();
            }
        }
    }

    /// Whether `unscheduled` would return a connection.
    pub(crate) fn has_unscheduled(&self) -> bool {
        self.has_scheduler && self.unscheduled().is_some()
    }

    /// Returns a connection for which the scheduler has not been called, with its listener and its
    /// sequence number.
    pub(crate) fn unscheduled(&self) -> Option<(HandleId, u64, &C)> {
        let handle = self.listeners.first_unscheduled()?;
        let (sequence, connection) = self.listeners.get(&handle)?.dispatcher.unscheduled()?;
        Some((handle, sequence, connection))
    }

    /// Returns the loads of the workers that may get a connection of this listener.
    pub(crate) fn candidates(&self, handle: HandleId) -> Vec<WorkerLoad> {
        let listener = self.listeners.get(&handle);
        listener.map_or_else(Vec::new, |listener| {
            listener.dispatcher.candidates().collect()
        })
    }

    /// The scheduler has chosen this worker for a connection, or `None` for the next idle one.
    pub(crate) fn choose(&mut self, handle: HandleId, sequence: u64, worker: Option<WorkerId>) {
        if let Some(listener) = self.listeners.get_mut(&handle) {
            listener.dispatcher.choose(sequence, worker);
            self.dispatch_waiting(handle);
        }
    }
}

// Questions of the shell about a listener.
impl<C, F> MasterCore<C, F> {
    /// Whether only this master and its workers have the listener, as far as is known.
    pub(crate) fn is_sole(&self, handle: HandleId) -> bool {
        self.listeners.get(&handle).is_some_and(Listener::is_sole)
    }

    /// Whether the application named the descriptor. It may shut the listener down itself.
    pub(crate) fn is_borrowed(&self, handle: HandleId) -> bool {
        let listener = self.listeners.get(&handle);
        listener.is_some_and(|listener| listener.key.endpoint.is_borrowed())
    }

    /// Whether the master accepts the connections of the listener.
    pub(crate) fn master_accepts(&self, handle: HandleId) -> bool {
        let listener = self.listeners.get(&handle);
        listener.is_some_and(Listener::master_accepts)
    }

    /// Whether the master keeps new connections out of the listener.
    pub(crate) fn is_ending(&self, handle: HandleId) -> bool {
        let listener = self.listeners.get(&handle);
        listener.is_none_or(|listener| listener.stage != Stage::Open)
    }
}

/// For tests and fuzzers.
#[cfg(any(test, fuzzing))]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) processes: usize,
    pub(crate) handles: usize,
    pub(crate) actions: usize,
    pub(crate) events: usize,
}

#[cfg(any(test, fuzzing))]
impl<C, F> MasterCore<C, F> {
    pub(crate) fn sizes(&self) -> Sizes {
        Sizes {
            processes: self.workers.len() + self.detached.len(),
            handles: self.listeners.len(),
            actions: self.actions.len(),
            events: self.events.len(),
        }
    }

    pub(crate) fn in_flight(&self) -> u64 {
        let listeners = self.listeners.values();
        listeners.map(|each| each.dispatcher.in_flight()).sum()
    }

    /// Whether a connection waits although a worker could receive it.
    pub(crate) fn has_stuck_connection(&self) -> bool {
        self.listeners.values().any(|listener| {
            let dispatcher = &listener.dispatcher;
            let is_unchecked =
                listener.accept_state == AcceptState::Ready && listener.stage != Stage::Pausing;
            let is_reclaimable = dispatcher.reclaimable(Time::ZERO).is_some();
            let is_stuck = dispatcher.has_waiting() || is_unchecked || is_reclaimable;
            listener.may_dispatch() && dispatcher.capacity() > 0 && is_stuck
        })
    }

    /// Whether the index of the listeners agrees with the listeners.
    pub(crate) fn is_index_consistent(&self) -> bool {
        let all = || self.listeners.values();
        let deadlines = all().map(Listener::deadline);
        let delays_end = |each: &Listener<C>| !(each.outlives_workers() && each.members.is_empty());
        let is_unscheduled = |each: &Listener<C>| each.dispatcher.unscheduled().is_some();
        let mut listeners = self.listeners.iter();
        let unscheduled = listeners.find(|(_, listener)| is_unscheduled(listener));
        self.listeners.deadline() == deadlines.fold(None, earlier)
            && self.listeners.has_waiting() == all().any(|each| each.dispatcher.has_waiting())
            && self.listeners.any_delays_end() == all().any(delays_end)
            && self.listeners.first_unscheduled() == unscheduled.map(|(handle, _)| *handle)
    }

    pub(crate) fn is_bound(&self, handle: HandleId) -> bool {
        let listener = self.listeners.get(&handle);
        // If workers have copies, the master's copy is closed with the last of these.
        listener.is_some_and(|each| each.stage != Stage::Unbound || !each.master_accepts())
    }
}
