//! The decisions of the master.
//!
//! The shell (`src/master/shell`) reports facts by method calls. `MasterCore` produces actions and
//! events. The shell carries out each [`Action`] at once, without calling the application. The
//! application's callbacks receive the events in a later step of the event loop.
//!
//! The core uses no descriptors, clocks or system calls. A connection is any type `C`, and the
//! descriptors of a message are any type `F`.
//!
//! | module | what it decides |
//! |---|---|
//! | `workers` | the life of a worker: fork, disconnect, kill, exit |
//! | `detached` | the life of a detached process |
//! | `frames` | how the master responds to a worker's frame |
//! | `listener`, `member` | the states of one listener, and of a worker that has it |
//! | `listener_table` | the next deadline, and which listeners have waiting connections |
//! | `listen` | which listener a worker receives |
//! | `accept` | when to accept |
//! | `parked` | connections that the master holds while their clients send nothing |
//! | `queues` | when to dispatch and to reclaim; `dispatch` chooses the worker |
//! | `leave` | how a worker leaves a listener, and what happens to its queue |
//! | `drain` | how a listener drains and closes |
//! | `shards` | which shard a worker receives, and which shards receive new connections |
//! | `retain` | listeners that the application retains |
//!
//! # When a worker exits
//!
//! The connections in the worker's queue go to other workers, and the worker's final frames are
//! still processed:
//!
//! 1. The shell calls `exited` (`workers`). The worker receives no more connections or frames, and
//!    the core produces the action `CloseChannel`.
//! 2. The shell processes the final frames, and calls `channel_closed` (`workers`).
//! 3. The core calls `leave_listener` (`leave`) for each of the worker's listeners, and produces
//!    the action `CloseQueue`.
//! 4. The shell empties the queue, and calls `queue_closed` (`queues`). The connections return to
//!    the dispatcher, which keeps their order and dispatches them again.
//! 5. If no worker serves the listener and the application does not retain it, the listener closes,
//!    and the connections are counted as dropped.

mod accept;
mod action;
mod detached;
mod drain;
pub(crate) mod event;
mod frames;
mod hand_off;
mod leave;
mod listen;
mod listener;
mod listener_table;
mod member;
mod parked;
mod queues;
mod retain;
mod shards;
#[cfg(test)]
#[allow(clippy::wildcard_enum_match_arm)]
mod tests;
mod workers;

use std::collections::VecDeque;

use crate::core::master::event::{EmittedEvent, Event, Level, WorkerState};
use crate::error::Error;
#[cfg(any(test, fuzzing))]
use crate::types::connection_id::ConnectionId;
use crate::types::handle::{HandleId, HandleKey};
use crate::types::ledger::Ledger;
use crate::types::loads::{ListenerLoad, WorkerLoad};
use crate::types::ordered_set::OrderedSet;
use crate::types::policy::SchedulingPolicy;
use crate::types::sorted_map::SortedMap;
use crate::types::time::{Time, earlier};
use crate::types::worker_id::WorkerId;
use crate::wire::frame::{Bound, ToWorker, Unreceived};
pub(crate) use accept::ACCEPT_BATCH;
pub(crate) use action::{Action, Attachment};
use detached::DetachedEntry;
pub(crate) use hand_off::{HandOff, Resumed};
use listen::PendingBind;
pub(crate) use listener::Ownership;
use listener::{AcceptState, Listener, Stage};
use listener_table::ListenerTable;
use parked::ParkedTable;
pub(crate) use queues::QueueState;
use workers::WorkerEntry;

#[derive(Debug)]
pub(crate) struct MasterCore<C, F> {
    policy: SchedulingPolicy,
    /// Whether the policy can no longer be changed, because a worker was forked or a listener
    /// retained.
    is_policy_frozen: bool,
    /// Whether the application's scheduler chooses the worker of each connection.
    has_scheduler: bool,
    now: Time,
    last_worker: u32,
    last_handle: u32,
    workers: SortedMap<WorkerId, WorkerEntry>,
    detached: SortedMap<WorkerId, DetachedEntry>,
    /// The number of workers and detached processes that [`run`](crate::Master::run) waits for.
    referenced: usize,
    listeners: ListenerTable<C>,
    parked: ParkedTable,
    /// The listener whose waiting connections were checked last (see [`sweep`](Self::sweep)).
    last_swept: HandleId,
    /// The listener of each key. A worker that requests a key joins the key's listener.
    keys: SortedMap<HandleKey, HandleId>,
    /// The requests whose `Bind` action has not been answered.
    binding: SortedMap<HandleId, PendingBind>,
    ledger: Ledger,
    /// Whether `Disconnected` must be emitted at the end of `disconnect_all`.
    is_end_awaited: bool,
    /// The time at which all workers that have not exited are killed.
    stop_deadline: Option<Time>,
    /// The workers that have a deadline, sorted by its time.
    deadlines: OrderedSet<(Time, WorkerId)>,
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
            workers: SortedMap::new(),
            detached: SortedMap::new(),
            referenced: 0,
            listeners: ListenerTable::new(),
            parked: ParkedTable::new(),
            last_swept: HandleId(0),
            keys: SortedMap::new(),
            binding: SortedMap::new(),
            ledger: Ledger::default(),
            is_end_awaited: false,
            stop_deadline: None,
            deadlines: OrderedSet::new(),
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
    /// Returns [`Error::PolicyFrozen`] after the first fork of a worker, or after the application
    /// has retained a listener.
    pub(crate) fn set_policy(&mut self, policy: SchedulingPolicy) -> Result<(), Error> {
        if self.is_policy_frozen {
            return Err(Error::PolicyFrozen);
        }
        self.policy = policy;
        Ok(())
    }

    /// Emits the `Setup` event after the settings have changed.
    pub(crate) fn setup(&mut self) {
        self.emit(Level::Cluster, None, Event::Setup);
    }

    fn send(&mut self, worker: WorkerId, frame: ToWorker, attachment: Attachment) {
        if self.is_writable(worker) {
            self.actions.push_back(Action::Send {
                worker,
                frame,
                attachment,
            });
        }
    }

    /// Answers a worker's request to listen.
    fn reply(
        &mut self,
        worker: WorkerId,
        request: u32,
        result: Result<Bound, i32>,
        attachment: Attachment,
    ) {
        self.send(worker, ToWorker::Reply { request, result }, attachment);
    }

    /// Rejects a worker's request to listen.
    fn reject(&mut self, worker: WorkerId, request: u32, errno: i32) {
        self.reply(worker, request, Err(errno), Attachment::None);
    }

    /// Notifies a worker that it receives no new connections from a listener. `unreceived` is what becomes
    /// of the connections that its application has not received.
    fn send_listener_closed(&mut self, handle: HandleId, worker: WorkerId, unreceived: Unreceived) {
        let frame = ToWorker::ListenerClosed { handle, unreceived };
        self.send(worker, frame, Attachment::None);
    }

    /// Returns the worker's listeners.
    fn listeners_of(&self, worker: WorkerId) -> impl Iterator<Item = HandleId> + '_ {
        let listeners = self.listeners.iter();
        let own = listeners.filter(move |(_, listener)| listener.members.contains(worker));
        own.map(|(handle, _)| *handle)
    }
}

// Actions and events.
impl<C, F> MasterCore<C, F> {
    /// Returns whether there are pending actions.
    pub(crate) fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    pub(crate) fn next_action(&mut self) -> Option<Action<C>> {
        self.actions.pop_front()
    }

    /// Returns whether there are pending events.
    pub(crate) fn has_events(&self) -> bool {
        !self.events.is_empty() || self.is_over()
    }

    /// Returns the next event.
    ///
    /// Only this method updates the state that the application sees, and removes a worker from the
    /// table at its last event. Therefore the state and the table agree with the event that is
    /// being delivered, even if more events are pending.
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

    /// Returns the event for the end of `disconnect_all`, if the end has been reached.
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

    /// Returns whether an awaited `disconnect_all` has ended. A retained listener delays the end
    /// only while it has members.
    fn is_over(&self) -> bool {
        self.is_end_awaited && self.workers.is_empty() && !self.listeners.any_delays_end()
    }

    /// Returns the descriptors of all messages that have not been delivered.
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

// Time and deadlines.
impl<C, F> MasterCore<C, F> {
    /// Returns the latest time at which `tick` must be called, or `None` if nothing is due by time.
    pub(crate) fn deadline(&self) -> Option<Time> {
        let worker = self.deadlines.first().map(|(time, _)| time);
        let due = earlier(worker, self.stop_deadline);
        let due = earlier(due, self.parked.deadline());
        earlier(due, self.listeners.deadline())
    }

    /// Sets the time, unless `now` is earlier than the present setting. Only `tick` processes
    /// deadlines.
    pub(crate) fn set_time(&mut self, now: Time) {
        self.now = self.now.max(now);
    }

    /// Sets the time, and processes all deadlines that have expired.
    pub(crate) fn tick(&mut self, now: Time) {
        self.set_time(now);
        if self.deadline().is_none_or(|deadline| deadline > self.now) {
            return;
        }
        self.kill_overdue();
        self.expire_parked();
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
        self.select_if_due(handle);
        if let Some(listener) = self.listeners.get_mut(&handle) {
            if listener.dispatch_from.is_some_and(|time| time <= self.now) {
                listener.dispatch_from = None;
                self.move_held(handle);
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

// Waiting connections, loads and the scheduler.
impl<C, F> MasterCore<C, F> {
    pub(crate) fn ledger(&self) -> Ledger {
        self.ledger
    }

    /// Returns whether any accepted connection waits in the master.
    pub(crate) fn has_waiting(&self) -> bool {
        self.listeners.has_waiting()
    }

    /// Returns all connections that wait in the master. Call it only after all actions have been
    /// carried out, because pending actions also own connections.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = &HandOff<C>> {
        let listeners = self.listeners.values();
        listeners.flat_map(|listener| listener.dispatcher.waiting())
    }

    /// Checks at most `limit` waiting connections, and closes those for which `is_gone` returns
    /// true because their client has hung up. Each call starts at the listener after the one that
    /// the previous call checked last. Within a listener, a call continues after the connection
    /// that was checked last. While a listener drains or pauses, `deadline` schedules its sweeps.
    pub(crate) fn sweep(&mut self, limit: usize, mut is_gone: impl FnMut(&HandOff<C>) -> bool) {
        let mut left = limit;
        for handle in self.listeners.waiting_after(self.last_swept, limit) {
            if left == 0 {
                break;
            }
            let Some(listener) = self.listeners.get_mut(&handle) else {
                continue;
            };
            listener.swept_at = self.now;
            let swept = listener.dispatcher.sweep(left, &mut is_gone);
            left -= swept.checked;
            self.last_swept = handle;
            let is_any_closed = !swept.closed.is_empty();
            self.ledger.closed_by_peer += swept.closed.len() as u64;
            for closed in swept.closed {
                self.close_hand_off(closed);
            }
            if is_any_closed {
                // The closed connections free capacity, so accept more. They may also have been the
                // last ones for which a drain or the end of a pause has waited.
                self.accept_if_possible(handle);
                self.check_backlog_if_draining(handle);
            }
        }
    }

    /// Returns the loads of all workers, and of all listeners that have not been closed.
    pub(crate) fn loads(&self) -> (Vec<WorkerLoad>, Vec<(HandleId, ListenerLoad)>) {
        let past = self.workers.iter();
        let past = past.map(|(worker, entry)| (*worker, entry.past_load));
        let mut workers: SortedMap<_, _> = past.collect();
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

    /// Lets the application's scheduler choose the worker of each connection from now on.
    pub(crate) fn use_scheduler(&mut self) {
        self.has_scheduler = true;
        for handle in self.listeners.ids() {
            if let Some(listener) = self.listeners.get_mut(&handle) {
                listener.dispatcher.use_scheduler();
                // With a scheduler, busy workers have capacity too.
                self.accept_if_possible(handle);
            }
        }
    }

    /// Returns whether the scheduler must be called for a connection.
    pub(crate) fn has_unscheduled(&self) -> bool {
        self.has_scheduler && self.unscheduled().is_some()
    }

    /// Returns the next connection for which the scheduler has not been called, with its listener
    /// and its sequence number.
    pub(crate) fn unscheduled(&self) -> Option<(HandleId, u64, &HandOff<C>)> {
        let handle = self.listeners.first_unscheduled()?;
        let (sequence, connection) = self.listeners.get(&handle)?.dispatcher.unscheduled()?;
        Some((handle, sequence, connection))
    }

    /// Returns the loads of the workers that the scheduler may choose for this connection of the
    /// listener.
    pub(crate) fn candidates(&self, handle: HandleId, sequence: u64) -> Vec<WorkerLoad> {
        let listener = self.listeners.get(&handle);
        listener.map_or_else(Vec::new, |listener| {
            listener.dispatcher.candidates(sequence).collect()
        })
    }

    /// Records the scheduler's choice for a connection. With `None`, the connection goes to the
    /// next idle worker.
    pub(crate) fn choose(&mut self, handle: HandleId, sequence: u64, worker: Option<WorkerId>) {
        if let Some(listener) = self.listeners.get_mut(&handle) {
            listener.dispatcher.choose(sequence, worker);
            self.dispatch_waiting(handle);
        }
    }
}

// Listener queries.
impl<C, F> MasterCore<C, F> {
    /// Returns whether only this master and its workers are meant to have copies of the listener.
    pub(crate) fn is_sole(&self, handle: HandleId) -> bool {
        self.listeners.get(&handle).is_some_and(Listener::is_sole)
    }

    /// Returns whether the application supplied the descriptor. In this case the application may
    /// shut the listener down itself.
    pub(crate) fn is_borrowed(&self, handle: HandleId) -> bool {
        let listener = self.listeners.get(&handle);
        listener.is_some_and(|listener| listener.key.endpoint.is_borrowed())
    }

    /// Returns whether the master accepts the listener's connections.
    pub(crate) fn master_accepts(&self, handle: HandleId) -> bool {
        let listener = self.listeners.get(&handle);
        listener.is_some_and(Listener::master_accepts)
    }

    /// Returns whether the listener no longer exists, or is in a stage other than `Open`.
    pub(crate) fn is_ending(&self, handle: HandleId) -> bool {
        let listener = self.listeners.get(&handle);
        listener.is_none_or(|listener| listener.stage != Stage::Open)
    }
}

/// Sizes of the core's collections, for tests and fuzzers.
#[cfg(any(test, fuzzing))]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) processes: usize,
    pub(crate) handles: usize,
    /// The number of connections that the master holds.
    pub(crate) held: usize,
    pub(crate) actions: usize,
    pub(crate) events: usize,
}

#[cfg(any(test, fuzzing))]
impl<C, F> MasterCore<C, F> {
    pub(crate) fn sizes(&self) -> Sizes {
        Sizes {
            processes: self.workers.len() + self.detached.len(),
            handles: self.listeners.len(),
            held: self.parked.len(),
            actions: self.actions.len(),
            events: self.events.len(),
        }
    }

    /// Returns whether the master waits until the client of the connection sends something.
    pub(crate) fn is_idle(&self, connection: ConnectionId) -> bool {
        self.parked.is_idle(connection)
    }

    /// Returns the number of connections that wait until their clients send something.
    pub(crate) fn count_idle(&self) -> usize {
        self.parked.count_idle()
    }

    pub(crate) fn in_flight(&self) -> u64 {
        let listeners = self.listeners.values();
        let listeners: u64 = listeners
            .map(|each| each.dispatcher.in_flight() + each.ready.len() as u64)
            .sum();
        listeners + self.parked.count_idle() as u64 + self.parked.count_passing() as u64
    }

    /// Returns whether a connection is stuck although a worker has capacity for it. A connection is
    /// stuck if it waits in the master, if it was already reclaimable at the last tick, or if it
    /// may become reclaimable later but its listener has no deadline. It is also stuck if it may be
    /// in a backlog that the master has not checked.
    pub(crate) fn has_stuck_connection(&self, last_tick: Time) -> bool {
        self.listeners.values().any(|listener| {
            let dispatcher = &listener.dispatcher;
            let is_unchecked = listener.accept_state == AcceptState::Ready
                && listener.stage != Stage::Pausing
                && !(listener.holds_new() && listener.capacity(self.parked.space()) == 0);
            let is_forgotten = dispatcher.may_have_reclaimable() && listener.deadline().is_none();
            let is_reclaimable = dispatcher.reclaimable(last_tick).is_some() || is_forgotten;
            // A connection that the scheduler has assigned may wait for a busy worker.
            let is_waiting = dispatcher.waits_beside_idle_worker() && !self.has_scheduler;
            let is_ready = !listener.ready.is_empty() && listener.stage != Stage::Pausing;
            let is_stuck = is_ready || is_unchecked || is_reclaimable;
            let has_capacity = dispatcher.capacity() > 0;
            listener.may_dispatch() && (is_waiting || has_capacity && is_stuck)
        })
    }

    /// Returns whether the index of the listener table agrees with the listeners.
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
        // If workers have copies of the socket, the master keeps its copy open until the last
        // worker has closed its own.
        listener.is_some_and(|each| each.stage != Stage::Unbound || !each.master_accepts())
    }

    /// Returns whether all workers that serve the listener have other users than the worker that parked
    /// a connection.
    pub(crate) fn excludes(
        &self,
        handle: HandleId,
        parked_by: Option<crate::types::user::User>,
    ) -> bool {
        let listener = self.listeners.get(&handle);
        listener.is_some_and(|listener| listener.members.excludes(parked_by))
    }

    /// Returns whether the master closes idle connections of the listener instead of holding them:
    /// the listener has closed, or closes as soon as its workers have emptied its backlog.
    pub(crate) fn closes_idle(&self, handle: HandleId) -> bool {
        let listener = self.listeners.get(&handle);
        listener.is_none_or(|own| matches!(own.stage, Stage::Emptying | Stage::Unbound))
    }
}
