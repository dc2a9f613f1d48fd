//! Every decision of the master. Pure: facts come in as method calls, and what is to be done goes
//! out as [`Action`]s (at once, without the program) and [`Emit`]s (when the loop turns, by the
//! program's callbacks). No descriptor, no clock, no system call.

mod handles;
mod listeners;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::process::ExitStatus;
use std::rc::Rc;

use crate::config::settings::SchedulingPolicy;
use crate::core::dispatch::Sequenced;
use crate::core::event::{Emit, Event, ExitReport, Level, WorkerState};
use crate::error::Error;
use crate::runtime::timers::{Time, earlier};
use crate::types::address::Address;
use crate::types::endpoint::{BindFlags, Endpoint};
use crate::types::ledger::Ledger;
use crate::types::loads::{ListenerLoad, WorkerLoad};
use crate::types::message::Message;
use crate::types::signal::Signal;
use crate::types::sorted_map::SortedMap;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::{FrameError, HandleId, HandleKey, ToMaster, ToWorker};
use handles::Handles;
pub(crate) use listeners::ACCEPT_BATCH;
use listeners::{AcceptState, Handle, Stage};

/// What the shell does at once.
#[derive(Debug)]
pub(crate) enum Action<C> {
    Send {
        worker: WorkerId,
        frame: ToWorker,
        with: Attachment,
    },
    /// Put a connection into a worker's queue; if that fails, the answer is `not_dispatched`.
    Dispatch {
        handle: HandleId,
        worker: WorkerId,
        connection: Sequenced<C>,
        /// It has waited in the master: if its client has hung up, the answer is `hung_up`.
        has_waited: bool,
    },
    /// Take so many connections out of a worker's queue; the answer is `reclaimed`.
    Reclaim {
        handle: HandleId,
        worker: WorkerId,
        at_most: usize,
    },
    /// Find out how many connections are in a worker's queue; the answer is `counted`, where the
    /// system has one.
    CountQueued {
        handle: HandleId,
        worker: WorkerId,
    },
    /// Close a worker's queue, for both sides; the answer is `queue_closed`, with what was in it.
    CloseQueue {
        handle: HandleId,
        worker: WorkerId,
    },
    /// Bind and listen; the answer is `bound`.
    Bind {
        handle: HandleId,
        endpoint: Endpoint,
        flags: BindFlags,
        policy: SchedulingPolicy,
    },
    /// Bind one more shard; the answer is `shard_bound`.
    BindShard {
        handle: HandleId,
        flags: BindFlags,
        worker: WorkerId,
        request: u32,
    },
    /// From now on newcomers go to these shards.
    SelectShards {
        handle: HandleId,
        shards: Vec<usize>,
    },
    /// Whoever accepts from the listener, or from this shard of it, must not wait any more.
    Unblock {
        handle: HandleId,
        shard: Option<usize>,
    },
    /// Tell when the listener is readable.
    Watch {
        handle: HandleId,
    },
    Unwatch {
        handle: HandleId,
    },
    /// Accept; the answers are `accepted`, then `accept_done`, `drained` or `accept_failed`. A shut
    /// door is no failure if it was ours to shut.
    Accept {
        handle: HandleId,
        at_most: u64,
    },
    /// Remove the file of a Unix path, so that nobody finds the way any more.
    RemoveFile {
        handle: HandleId,
    },
    /// Let nobody new into the backlog, as far as the system can; for good, if it is a Unix path.
    AttachSynFilter {
        handle: HandleId,
    },
    /// Undo `ShutDoor`.
    DetachSynFilter {
        handle: HandleId,
    },
    /// Report, by `was_shut_down`, that a process has shut the listener down, or a shard.
    WatchHangUp {
        handle: HandleId,
    },
    /// End the listener in all processes that have a copy, known or not.
    StopListening {
        handle: HandleId,
    },
    Unbind {
        handle: HandleId,
    },
    /// Let the worker write nothing more, feed what it has written, then `channel_closed`. In this
    /// order: its last words still count.
    CloseChannel {
        worker: WorkerId,
    },
    /// Close the channel unread.
    DiscardChannel {
        worker: WorkerId,
    },
    Signal {
        worker: WorkerId,
        signal: Signal,
    },
}

/// The descriptor that goes with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attachment {
    None,
    /// A copy of the listener.
    Listener(HandleId),
    /// A copy of one of its shards.
    Shard(HandleId, usize),
    /// The end of a new queue out of which connections are taken.
    Queue(HandleId),
}

const EARLY: FrameError = FrameError::State("spoke before it was online");

/// How many errors are told of a worker whose channel is closed.
const LATE_ERRORS: u32 = 16;

#[derive(Debug)]
struct WorkerEntry {
    /// As far as the program has been told.
    state: WorkerState,
    online: bool,
    connected: bool,
    /// What it has written is still read, but it gets nothing more.
    deaf: bool,
    /// Errors since its channel closed.
    late_errors: u32,
    leaving: bool,
    exited_after_disconnect: Option<bool>,
    /// Sent when the channel is closed.
    kill_signal: Option<Signal>,
    status: Option<ExitStatus>,
    /// It is killed then, if it has not exited before.
    deadline: Option<Time>,
    /// [`run`](crate::Master::run) waits for its end.
    referenced: bool,
    /// What it has had of listeners that it has left.
    past: WorkerLoad,
}

/// A detached process is not a worker: it has no channel, and it is not in the table of workers.
/// Decisions about all workers do not concern it.
#[derive(Debug)]
struct DetachedEntry {
    state: Detached,
    /// Errors so far, of which at most `LATE_ERRORS` are delivered.
    late_errors: u32,
}

#[derive(Clone, Copy, Debug)]
enum Detached {
    /// [`run`](crate::Master::run) may return before it exits.
    Released,
    /// [`run`](crate::Master::run) waits for its exit.
    Referenced,
    Exited(ExitStatus),
}

impl Detached {
    fn status(self) -> Option<ExitStatus> {
        match self {
            Self::Released | Self::Referenced => None,
            Self::Exited(status) => Some(status),
        }
    }
}

#[derive(Debug)]
pub(crate) struct MasterCore<C> {
    policy: SchedulingPolicy,
    is_policy_frozen: bool,
    /// The program says which worker gets which connection.
    chooses: bool,
    now: Time,
    last_worker: u32,
    last_handle: u32,
    workers: BTreeMap<WorkerId, WorkerEntry>,
    detached: BTreeMap<WorkerId, DetachedEntry>,
    /// How many workers and detached processes [`run`](crate::Master::run) waits for.
    referenced: usize,
    handles: Handles<C>,
    /// The listener whose waiting connections were checked last.
    last_swept: HandleId,
    keys: SortedMap<HandleKey, HandleId>,
    /// The one listen whose `Bind` is being carried out.
    binding: SortedMap<HandleId, (HandleKey, WorkerId, u32)>,
    ledger: Ledger,
    /// Whether someone waits for the end of `disconnect_all`.
    awaited: bool,
    /// Whoever is still there then is killed.
    stop_by: Option<Time>,
    /// The workers that have a deadline, by its time.
    deadlines: BTreeSet<(Time, WorkerId)>,
    actions: VecDeque<Action<C>>,
    events: VecDeque<Emit>,
}

impl<C> MasterCore<C> {
    pub(crate) fn new(policy: SchedulingPolicy) -> Self {
        Self {
            policy,
            is_policy_frozen: false,
            chooses: false,
            now: Time::ZERO,
            last_worker: 0,
            last_handle: 0,
            workers: BTreeMap::new(),
            detached: BTreeMap::new(),
            referenced: 0,
            handles: Handles::new(),
            last_swept: HandleId(0),
            keys: SortedMap::new(),
            binding: SortedMap::new(),
            ledger: Ledger::default(),
            awaited: false,
            stop_by: None,
            deadlines: BTreeSet::new(),
            actions: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    // What the shell asks.

    /// Whether `next_action` would return one.
    pub(crate) fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    pub(crate) fn next_action(&mut self) -> Option<Action<C>> {
        self.actions.pop_front()
    }

    /// The next callbacks to call. A worker's state changes here, and here it leaves the table, so
    /// that both are what the event says however many events wait.
    pub(crate) fn next_event(&mut self) -> Option<Emit> {
        self.handles.index_changed();
        let Some(emit) = self.events.pop_front() else {
            let finished = self.is_over();
            if finished {
                (self.awaited, self.stop_by) = (false, None);
            }
            return finished.then_some(Emit {
                level: Level::Cluster,
                worker: None,
                event: Event::Disconnected,
            });
        };
        if let (Level::Worker, Some(worker)) = (emit.level, emit.worker) {
            let state = match emit.event {
                Event::Online => Some(WorkerState::Online),
                Event::Listening(_) => Some(WorkerState::Listening),
                Event::Disconnect => Some(WorkerState::Disconnected),
                Event::Exit(_) => {
                    let left = self.workers.remove(&worker);
                    let was_referenced = left.is_some_and(|left| left.referenced);
                    self.referenced -= usize::from(was_referenced);
                    None
                }
                Event::DetachedExit(_) => {
                    self.detached.remove(&worker);
                    None
                }
                Event::Setup
                | Event::Fork
                | Event::Message(_)
                | Event::Error(_)
                | Event::Disconnected => None,
            };
            if let (Some(state), Some(entry)) = (state, self.workers.get_mut(&worker)) {
                entry.state = state;
            }
        }
        Some(emit)
    }

    /// Whether `next_event` would return one.
    pub(crate) fn has_events(&self) -> bool {
        !self.events.is_empty() || self.is_over()
    }

    /// Whether the end of `disconnect_all` has come, and someone waits for it. What the program
    /// keeps does not count.
    fn is_over(&self) -> bool {
        self.awaited && self.workers.is_empty() && !self.handles.any_is_busy()
    }

    /// When `tick` is needed at the latest.
    pub(crate) fn deadline(&self) -> Option<Time> {
        let worker = self.deadlines.first().map(|(time, _)| *time);
        let due = earlier(worker, self.stop_by);
        earlier(due, self.handles.deadline())
    }

    pub(crate) fn ledger(&self) -> Ledger {
        self.ledger
    }

    pub(crate) fn policy(&self) -> SchedulingPolicy {
        self.policy
    }

    pub(crate) fn worker_ids(&self) -> impl Iterator<Item = WorkerId> + '_ {
        self.workers.keys().copied()
    }

    /// Whether there are processes whose end [`run`](crate::Master::run) waits for.
    pub(crate) fn has_workers(&self) -> bool {
        self.awaited || self.referenced > 0
    }

    /// Whether the process is in the table of workers.
    pub(crate) fn is_worker(&self, process: WorkerId) -> bool {
        self.workers.contains_key(&process)
    }

    /// `None` for a worker that has left the table, and for a detached process that has ended.
    pub(crate) fn state(&self, process: WorkerId) -> Option<WorkerState> {
        let worker = self.workers.get(&process).map(|entry| entry.state);
        let detached = || self.detached.get(&process);
        worker.or_else(|| detached().map(|_| WorkerState::Disconnected))
    }

    pub(crate) fn is_connected(&self, worker: WorkerId) -> bool {
        self.workers
            .get(&worker)
            .is_some_and(|entry| entry.connected)
    }

    pub(crate) fn exit_status(&self, process: WorkerId) -> Option<ExitStatus> {
        match (self.workers.get(&process), self.detached.get(&process)) {
            (Some(worker), _) => worker.status,
            (None, Some(detached)) => detached.state.status(),
            (None, None) => None,
        }
    }

    fn is_running(&self, process: WorkerId) -> bool {
        let is_known = self.is_worker(process) || self.detached.contains_key(&process);
        is_known && self.exit_status(process).is_none()
    }

    pub(crate) fn exited_after_disconnect(&self, worker: WorkerId) -> Option<bool> {
        self.workers.get(&worker)?.exited_after_disconnect
    }

    /// Whether any accepted connection waits in the master.
    pub(crate) fn has_waiting(&self) -> bool {
        self.handles.has_waiting()
    }

    /// All connections that were accepted and given to nobody, when no action is left to carry out.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = &C> {
        let handles = self.handles.values();
        handles.flat_map(|handle| handle.connections.waiting())
    }

    /// The messages that the program is to be told of.
    pub(crate) fn messages(&self) -> impl Iterator<Item = &Message> {
        self.events.iter().filter_map(|emit| {
            if let Event::Message(message) = &emit.event {
                Some(message)
            } else {
                None
            }
        })
    }

    /// What workers and listeners have had so far.
    pub(crate) fn loads(&self) -> (Vec<WorkerLoad>, Vec<(HandleId, ListenerLoad)>) {
        let all = self.workers.iter().map(|(id, entry)| (*id, entry.past));
        let mut workers: BTreeMap<_, _> = all.collect();
        let now = self.handles.values();
        for load in now.flat_map(|handle| handle.connections.loads()) {
            if let Some(sum) = workers.get_mut(&load.worker) {
                sum.add(&load);
            }
        }
        let open = self.handles.iter();
        let open = open.filter(|(_, handle)| handle.stage != Stage::Unbound);
        let listeners = open.map(|(id, handle)| {
            let load = ListenerLoad {
                address: Address::new(&handle.key.endpoint, handle.address),
                accepted: handle.connections.accepted(),
                queued: None,
            };
            (*id, load)
        });
        (workers.into_values().collect(), listeners.collect())
    }

    /// Whether there is a connection of which the program is to say who gets it.
    pub(crate) fn has_unscheduled(&self) -> bool {
        self.chooses && self.unscheduled().is_some()
    }

    /// A connection of which the program is to say who gets it.
    pub(crate) fn unscheduled(&self) -> Option<(HandleId, u64, &C)> {
        let handle = self.handles.first_unscheduled()?;
        let (place, connection) = self.handles.get(&handle)?.connections.unscheduled()?;
        Some((handle, place, connection))
    }

    /// What those have had so far who may get a connection of this listener.
    pub(crate) fn candidates(&self, handle: HandleId) -> Vec<WorkerLoad> {
        let entry = self.handles.get(&handle);
        entry.map_or_else(Vec::new, |entry| entry.connections.candidates().collect())
    }

    // What the program does.

    /// From now on it says itself which worker gets which connection.
    pub(crate) fn use_scheduler(&mut self) {
        self.chooses = true;
        for handle in self.handles.ids() {
            if let Some(entry) = self.handles.get_mut(&handle) {
                entry.connections.use_scheduler();
            }
        }
    }

    /// It has chosen this worker for a connection, or none in particular.
    pub(crate) fn choose(&mut self, handle: HandleId, place: u64, worker: Option<WorkerId>) {
        if let Some(entry) = self.handles.get_mut(&handle) {
            entry.connections.choose(place, worker);
            self.distribute(handle);
        }
    }

    /// Fails once the policy is frozen by the first fork, or by the first listener that is kept.
    pub(crate) fn set_policy(&mut self, policy: SchedulingPolicy) -> Result<(), Error> {
        if self.is_policy_frozen {
            return Err(Error::PolicyFrozen);
        }
        self.policy = policy;
        Ok(())
    }

    pub(crate) fn setup(&mut self) {
        self.emit(Level::Cluster, None, Event::Setup);
    }

    /// The id that the next worker gets, if its fork succeeds. `None` when all have been used: an id
    /// never names a second worker.
    pub(crate) fn next_worker_id(&self) -> Option<WorkerId> {
        let is_left = self.last_worker < WorkerId::MAX;
        is_left.then(|| WorkerId::new(self.last_worker + 1))
    }

    /// A worker with the id of `next_worker_id` has been forked.
    pub(crate) fn forked(&mut self, worker: WorkerId) {
        self.is_policy_frozen = true;
        self.last_worker = worker.get();
        let entry = WorkerEntry {
            state: WorkerState::None,
            online: false,
            connected: true,
            deaf: false,
            late_errors: 0,
            leaving: false,
            exited_after_disconnect: None,
            kill_signal: None,
            status: None,
            deadline: None,
            referenced: true,
            past: WorkerLoad::new(worker),
        };
        self.workers.insert(worker, entry);
        self.referenced += 1;
        self.emit(Level::Cluster, Some(worker), Event::Fork);
    }

    /// A detached process has been started, with the id of `next_worker_id`, which no worker gets.
    pub(crate) fn detached(&mut self, process: WorkerId) {
        self.last_worker = process.get();
        let entry = DetachedEntry {
            state: Detached::Released,
            late_errors: 0,
        };
        self.detached.insert(process, entry);
    }

    pub(crate) fn disconnect(&mut self, worker: WorkerId) {
        self.begin_leave(&[worker]);
    }

    /// The same, and kills the worker if it has not exited `within` this time. Of several
    /// deadlines the first one counts.
    pub(crate) fn disconnect_within(&mut self, worker: WorkerId, within: Time) {
        let deadline = self.now.saturating_add(within);
        if let Some(entry) = self.workers.get_mut(&worker) {
            let earlier = entry.deadline.is_some_and(|earlier| earlier <= deadline);
            if entry.status.is_none() && !earlier {
                if let Some(later) = entry.deadline.replace(deadline) {
                    self.deadlines.remove(&(later, worker));
                }
                self.deadlines.insert((deadline, worker));
            }
        }
        self.begin_leave(&[worker]);
    }

    /// Disconnects everybody; `Disconnected` is emitted when nobody is left.
    pub(crate) fn disconnect_all(&mut self, awaited: bool) {
        self.awaited |= awaited;
        let everybody: Vec<_> = self.worker_ids().collect();
        self.begin_leave(&everybody);
    }

    /// The same, and kills whoever has not exited `within` this time.
    pub(crate) fn disconnect_all_within(&mut self, within: Time) {
        let deadline = self.now.saturating_add(within);
        let first = self.stop_by.map_or(deadline, |other| other.min(deadline));
        self.stop_by = Some(first);
        self.disconnect_all(true);
    }

    /// Disconnects the worker, then sends the signal.
    pub(crate) fn kill(&mut self, worker: WorkerId, signal: Signal) {
        match self.workers.get_mut(&worker) {
            Some(entry) if entry.connected => {
                entry.kill_signal = Some(signal);
                self.begin_leave(&[worker]);
            }
            Some(_) | None => self.signal(worker, signal),
        }
    }

    /// Signals the process at once.
    pub(crate) fn signal(&mut self, worker: WorkerId, signal: Signal) {
        if self.is_running(worker) {
            self.actions.push_back(Action::Signal { worker, signal });
        }
    }

    /// Whether [`run`](crate::Master::run) waits for the end of this process.
    pub(crate) fn reference(&mut self, process: WorkerId, referenced: bool) {
        let was_referenced = if let Some(entry) = self.workers.get_mut(&process) {
            std::mem::replace(&mut entry.referenced, referenced)
        } else if let Some(entry) = self.detached.get_mut(&process) {
            let state = match (entry.state, referenced) {
                (Detached::Exited(_), _) => return,
                (_, true) => Detached::Referenced,
                (_, false) => Detached::Released,
            };
            let previous = std::mem::replace(&mut entry.state, state);
            matches!(previous, Detached::Referenced)
        } else {
            return;
        };
        self.referenced -= usize::from(was_referenced);
        self.referenced += usize::from(referenced);
    }

    /// Closes the channel without a word, which makes the worker leave at once.
    pub(crate) fn close_channel(&mut self, worker: WorkerId) {
        let Some(entry) = self.workers.get_mut(&worker) else {
            return;
        };
        if entry.connected && !entry.deaf {
            entry.deaf = true;
            let handles: Vec<_> = self.handles_of(worker).collect();
            for handle in handles {
                if let Some(entry) = self.handles.get_mut(&handle) {
                    entry.connections.end(worker);
                }
            }
            self.actions.push_back(Action::CloseChannel { worker });
        }
    }

    /// Reports an error to the worker's and the cluster's callbacks.
    pub(crate) fn error(&mut self, worker: Option<WorkerId>, error: Error) {
        let error = Rc::new(error);
        // The last event of a worker is its exit, which may be waiting to be delivered. It does not
        // wait for ever: whoever causes an error in his callback for errors has the result anyway.
        if let Some(worker) = worker {
            let known = (
                self.workers.get_mut(&worker),
                self.detached.get_mut(&worker),
            );
            let (late_errors, is_connected) = match known {
                (Some(entry), _) => (&mut entry.late_errors, entry.connected),
                (None, Some(entry)) => (&mut entry.late_errors, false),
                (None, None) => return,
            };
            if *late_errors >= LATE_ERRORS {
                return;
            }
            *late_errors += u32::from(!is_connected);
        }
        let is_exit = |emit: &Emit| {
            let is_last = matches!(emit.event, Event::Exit(_) | Event::DetachedExit(_));
            worker.is_some() && emit.worker == worker && is_last
        };
        let exit = self.events.iter().position(is_exit);
        let at = exit.unwrap_or(self.events.len());
        // Inserted in reverse: each before the one inserted last.
        let levels = [Level::Cluster, Level::Worker];
        let concerned = if worker.is_some() { 2 } else { 1 };
        for level in levels.into_iter().take(concerned) {
            let event = Event::Error(Rc::clone(&error));
            let emit = Emit {
                level,
                worker,
                event,
            };
            self.events.insert(at, emit);
        }
    }

    // What happens.

    /// A frame. A message that may have descriptors comes by `message`.
    pub(crate) fn frame(&mut self, worker: WorkerId, frame: ToMaster) {
        if self.is_connected(worker) {
            if let Err(error) = self.understand(worker, frame) {
                self.violation(worker, error);
            }
        }
    }

    pub(crate) fn message(&mut self, worker: WorkerId, message: Message) {
        match self.workers.get(&worker) {
            Some(entry) if entry.connected && entry.online => {
                self.emit(Level::Cluster, Some(worker), Event::Message(message));
            }
            Some(_) => self.violation(worker, EARLY),
            None => {}
        }
    }

    /// The worker is broken or hostile: nothing more is believed, and it is not left running.
    pub(crate) fn violation(&mut self, worker: WorkerId, source: FrameError) {
        if !self.is_connected(worker) {
            return; // Nothing of it is believed any more, the rest of what it said neither.
        }
        let error = Error::Frame {
            worker: Some(worker),
            source,
        };
        self.error(Some(worker), error);
        self.signal(worker, Signal::KILL);
        self.actions.push_back(Action::DiscardChannel { worker });
        self.channel_closed(worker);
    }

    pub(crate) fn channel_closed(&mut self, worker: WorkerId) {
        let Some(entry) = self.workers.get_mut(&worker) else {
            return;
        };
        if !entry.connected {
            return;
        }
        entry.connected = false;
        entry.exited_after_disconnect = Some(entry.leaving);
        let (kill_signal, status) = (entry.kill_signal, entry.status);
        let handles: Vec<_> = self.handles_of(worker).collect();
        for handle in handles {
            self.leave_handle(handle, worker);
        }
        self.emit_both(worker, || Event::Disconnect);
        match (status, kill_signal) {
            (Some(_), _) => self.depart(worker),
            (None, Some(signal)) => self.signal(worker, signal),
            (None, None) => {}
        }
    }

    pub(crate) fn exited(&mut self, worker: WorkerId, status: ExitStatus) {
        let Some(entry) = self.workers.get_mut(&worker) else {
            return self.detached_exited(worker, status);
        };
        if entry.status.is_some() {
            return;
        }
        entry.status = Some(status);
        if let Some(deadline) = entry.deadline.take() {
            self.deadlines.remove(&(deadline, worker));
        }
        if entry.connected {
            // What it sent before it died still counts.
            self.close_channel(worker);
        } else {
            self.depart(worker);
        }
    }

    fn detached_exited(&mut self, process: WorkerId, status: ExitStatus) {
        if self.is_running(process) {
            self.reference(process, false);
            if let Some(entry) = self.detached.get_mut(&process) {
                entry.state = Detached::Exited(status);
            }
            self.emit(Level::Worker, Some(process), Event::DetachedExit(status));
        }
    }

    /// Checks at most `at_most` waiting connections, and removes those of which `gone` says that the
    /// client has hung up. All have their turn, call by call.
    pub(crate) fn sweep(&mut self, at_most: usize, mut gone: impl FnMut(&C) -> bool) {
        let mut left = at_most;
        for handle in self.handles.waiting_after(self.last_swept, at_most) {
            if left == 0 {
                break;
            }
            let Some(entry) = self.handles.get_mut(&handle) else {
                continue;
            };
            let swept = entry.connections.sweep(left, &mut gone);
            left -= swept.checked;
            self.last_swept = handle;
            self.ledger.closed_by_peer += swept.gone;
            if swept.gone > 0 {
                // It may have been the last that a listener waited for, and there is room for others.
                self.pull(handle);
                self.recheck_if_draining(handle);
            }
        }
    }

    /// The time is now `now`, which never goes back. What is due is left to `tick`.
    pub(crate) fn set_time(&mut self, now: Time) {
        self.now = self.now.max(now);
    }

    /// The same, and what is due happens.
    pub(crate) fn tick(&mut self, now: Time) {
        self.set_time(now);
        if self.deadline().is_none_or(|deadline| deadline > self.now) {
            return;
        }
        self.end_stragglers();
        for handle in self.handles.due(self.now) {
            let Some(entry) = self.handles.get_mut(&handle) else {
                continue;
            };
            if matches!(entry.stage, Stage::Draining(Some(quiet)) if quiet <= self.now) {
                entry.stage = Stage::Draining(None);
                self.finish_drain(handle);
            }
            self.let_go_of_shards(handle);
            self.watch_hang_up_if_due(handle);
            if let Some(entry) = self.handles.get_mut(&handle) {
                if entry.gives_from.is_some_and(|time| time <= self.now) {
                    entry.gives_from = None;
                    self.distribute(handle);
                    self.pull(handle);
                }
            }
            if let Some(entry) = self.handles.get_mut(&handle) {
                if matches!(entry.accept_state, AcceptState::BackingOff(until) if until <= self.now)
                {
                    entry.accept_state = AcceptState::Ready;
                    self.pull(handle);
                }
            }
            self.balance(handle);
        }
    }

    /// Kills those whose deadline is over. Their end is noticed as any other.
    fn end_stragglers(&mut self) {
        let is_over = |deadline: &Time| *deadline <= self.now;
        let mut stragglers = Vec::new();
        if self.stop_by.as_ref().is_some_and(is_over) {
            self.stop_by = None;
            stragglers.extend(self.workers.keys().copied());
        }
        while let Some(&(deadline, worker)) = self.deadlines.first().filter(|(d, _)| is_over(d)) {
            self.deadlines.remove(&(deadline, worker));
            stragglers.push(worker);
        }
        for worker in stragglers {
            if let Some(entry) = self.workers.get_mut(&worker) {
                entry.deadline = None;
            }
            self.signal(worker, Signal::KILL);
        }
    }

    // How it is decided.

    fn emit(&mut self, level: Level, worker: Option<WorkerId>, event: Event) {
        self.events.push_back(Emit {
            level,
            worker,
            event,
        });
    }

    fn emit_both(&mut self, worker: WorkerId, event: impl Fn() -> Event) {
        for level in [Level::Worker, Level::Cluster] {
            self.emit(level, Some(worker), event());
        }
    }

    fn hears(&self, worker: WorkerId) -> bool {
        let entry = self.workers.get(&worker);
        entry.is_some_and(|entry| entry.connected && !entry.deaf)
    }

    fn send(&mut self, worker: WorkerId, frame: ToWorker, with: Attachment) {
        if self.hears(worker) {
            self.actions.push_back(Action::Send {
                worker,
                frame,
                with,
            });
        }
    }

    fn handles_of(&self, worker: WorkerId) -> impl Iterator<Item = HandleId> + '_ {
        let mine = move |(_, handle): &(&HandleId, &Handle<C>)| handle.members.contains(&worker);
        self.handles.iter().filter(mine).map(|(id, _)| *id)
    }

    fn understand(&mut self, worker: WorkerId, frame: ToMaster) -> Result<(), FrameError> {
        let Some(entry) = self.workers.get_mut(&worker) else {
            return Ok(());
        };
        if !entry.online && frame != ToMaster::Online {
            return Err(EARLY);
        }
        match frame {
            ToMaster::Online => {
                if std::mem::replace(&mut entry.online, true) {
                    return Err(FrameError::State("was online already"));
                }
                self.emit_both(worker, || Event::Online);
            }
            ToMaster::Listen {
                request,
                key,
                flags,
            } => {
                // A worker that leaves gets no answer: it does not wait for one.
                if !entry.leaving && !entry.deaf {
                    self.listen(worker, request, key, flags)?;
                }
            }
            ToMaster::Listening { handle } => {
                let listened = self.handles.get_mut(&handle);
                let Some(listened) = listened.filter(|h| h.members.contains(&worker)) else {
                    return Err(FrameError::State("listening on what it has not"));
                };
                if !listened.listening.insert(worker) {
                    return Err(FrameError::State("was listening already"));
                }
                let address = Rc::new(Address::new(&listened.key.endpoint, listened.address));
                self.emit_both(worker, || Event::Listening(Rc::clone(&address)));
            }
            ToMaster::Idle {
                handle,
                taken,
                open,
            } => {
                let Some(entry) = self.handles.get_mut(&handle) else {
                    return Err(FrameError::State("ready for a listener it has not"));
                };
                let taken = entry.connections.idle(worker, (taken, open), self.now)?;
                self.taken(taken);
                self.distribute(handle);
                // Who waits behind a slow request came before those in the backlog.
                if !self.balance(handle) {
                    self.pull(handle);
                }
                self.recheck_if_draining(handle);
            }
            ToMaster::Release { handle } => {
                let has = |entry: &Handle<C>| {
                    entry.members.contains(&worker) && !entry.leaving.contains(&worker)
                };
                if !self.handles.get(&handle).is_some_and(has) {
                    return Err(FrameError::State("closed a listener it has not"));
                }
                self.leave_handle(handle, worker);
            }
            ToMaster::DisconnectRequest => self.begin_leave(&[worker]),
            ToMaster::Pause { handle } => {
                let Some(entry) = self.handles.get_mut(&handle) else {
                    return Err(FrameError::State("revoked from a listener it has not"));
                };
                entry.connections.revoke(worker)?;
                self.reclaim_all(handle, worker);
            }
            ToMaster::Message(bytes) => self.message(worker, Message::new(bytes, Vec::new())),
        }
        Ok(())
    }

    /// Tells workers to leave. A listener that others serve ends for them at once; one that nobody
    /// else serves is drained first, so that whoever is in its backlog still gets an answer.
    fn begin_leave(&mut self, workers: &[WorkerId]) {
        let mut leaving = BTreeSet::new();
        for &worker in workers {
            if let Some(entry) = self.workers.get_mut(&worker) {
                if entry.connected && !entry.leaving {
                    entry.leaving = true;
                    leaving.insert(worker);
                    self.send(worker, ToWorker::Disconnect, Attachment::None);
                }
            }
        }
        let affected = |(_, handle): &(&HandleId, &Handle<C>)| {
            handle.stage == Stage::Open && !handle.serving.is_disjoint(&leaving)
        };
        let handles: Vec<_> = self
            .handles
            .iter()
            .filter(affected)
            .map(|(id, _)| *id)
            .collect();
        for handle in handles {
            if self.handles[&handle].serving.is_subset(&leaving) {
                self.begin_drain(handle);
            } else {
                for &worker in &leaving {
                    self.end(handle, worker, false);
                }
            }
        }
    }

    fn depart(&mut self, worker: WorkerId) {
        let Some(entry) = self.workers.get(&worker) else {
            return;
        };
        if let Some(status) = entry.status {
            let exited_after_disconnect = entry.leaving;
            let exit_report = ExitReport {
                status,
                exited_after_disconnect,
            };
            self.emit_both(worker, || Event::Exit(exit_report));
        }
    }
}

/// What tests and fuzzers look at.
#[cfg(any(test, fuzzing))]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) processes: usize,
    pub(crate) handles: usize,
    pub(crate) actions: usize,
    pub(crate) events: usize,
}

#[cfg(any(test, fuzzing))]
impl<C> MasterCore<C> {
    pub(crate) fn sizes(&self) -> Sizes {
        Sizes {
            processes: self.workers.len() + self.detached.len(),
            handles: self.handles.len(),
            actions: self.actions.len(),
            events: self.events.len(),
        }
    }

    pub(crate) fn in_hand(&self) -> u64 {
        self.handles.values().map(|h| h.connections.in_hand()).sum()
    }

    /// Whether a connection waits although someone could take it.
    pub(crate) fn someone_waits_in_vain(&self) -> bool {
        self.handles.values().any(|handle| {
            let waits = handle.connections.has_waiting();
            let unlooked =
                handle.accept_state == AcceptState::Ready && handle.stage != Stage::Pausing;
            let left = handle.connections.to_reclaim(Time::ZERO).is_some();
            let open = handle.is_balanced();
            open && handle.connections.room() > 0 && (waits || unlooked || left)
        })
    }

    /// Whether the index of listeners says what they say themselves.
    pub(crate) fn is_index_right(&self) -> bool {
        let all = || self.handles.values();
        let deadlines = all().map(Handle::deadline);
        let is_left = |handle: &Handle<C>| handle.stays() && handle.members.is_empty();
        let is_unscheduled = |handle: &Handle<C>| handle.connections.unscheduled().is_some();
        let mut unscheduled = self.handles.iter().filter(|(_, h)| is_unscheduled(h));
        self.handles.deadline() == deadlines.fold(None, earlier)
            && self.handles.has_waiting() == all().any(|h| h.connections.has_waiting())
            && self.handles.any_is_busy() != all().all(is_left)
            && self.handles.first_unscheduled() == unscheduled.next().map(|(id, _)| *id)
    }

    pub(crate) fn is_bound(&self, handle: HandleId) -> bool {
        let entry = self.handles.get(&handle);
        // Of one that workers have copies of, the master's is closed with the last of these.
        entry.is_some_and(|entry| entry.stage != Stage::Unbound || !entry.master_accepts())
    }
}
