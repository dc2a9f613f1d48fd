//! Simulates a kernel with a virtual clock. Processes, channels, listeners, queues and clients are
//! plain data.
//!
//! The cores of the master and of the workers run unchanged. The kernel carries out the cores'
//! actions and reports inputs to the cores. The driver [`schedule`](super::schedule) decides at
//! random when each action happens, and the driver [`fuzz`](super::fuzz) follows a fuzzer's input.
//! The master's actions wait until the driver lets the master carry them out, so that anything can
//! happen in the meantime.
//!
//! `check` verifies the crate's guarantees. The drivers call `check` after each step.

pub(crate) mod check;
mod ending;
mod master;
pub(crate) mod process;
pub(crate) mod socket;
pub(crate) mod worker;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::mem::Discriminant;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::rc::Rc;

use crate::core::master::event::{EmittedEvent, Event};
use crate::core::master::{HandOff, MasterCore};
use crate::sys::fd::NoLingerFd;
use crate::types::connection_id::ConnectionId;
use crate::types::handle::HandleId;
use crate::types::policy::SchedulingPolicy;
use crate::types::time::{Time, earlier};
use crate::types::user::User;
use crate::types::worker_id::WorkerId;
use crate::wire::channel::inbox::Inbox;
pub(crate) use ending::{Ending, ROUNDS};
pub(crate) use master::Call;
use process::{Detached, Process, ProcessState};
use socket::{Client, Fate, Held, Port, Queue};

/// The back-off delay of the shells after a descriptor could not be sent or received, or a queue
/// could not be emptied.
const BACKOFF: Time = Time::from_millis(100);
/// The number of waiting connections whose clients the shell checks in each tick. The number is
/// small, so that checking all waiting connections often takes several ticks.
const SWEEP: usize = 2;
/// The maximum number of connections that the master holds, unless the application changes it.
const PARKED_LIMIT: usize = 24;
/// The message of the panic for an unknown worker. Such a panic is a bug of the driver, which must
/// name only existing workers.
const KNOWN: &str = "a known worker";

/// An operation whose next occurrence fails. Later occurrences succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Failure {
    Accept,
    Bind,
    /// Copying a listener, or one end of a queue, for a worker.
    Share,
    /// Sending a descriptor.
    Send,
    /// Receiving a descriptor in a worker. The call fails because the worker has no free descriptor
    /// number.
    Receive,
    /// Reclaiming connections from a queue. At most half of the queue's connections are reclaimed
    /// before the failure.
    Reclaim,
    /// Watching a connection that the master holds.
    Hold,
    /// Receiving a parked connection in the master, which has no free descriptor number.
    Park,
}

/// An input that is ready for the master.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MasterInput {
    /// Connections are in the listener's backlog.
    Readable(HandleId),
    /// A frame of the worker can be read.
    Frame(WorkerId),
    /// The worker's channel has ended, and all its frames have been read.
    End(WorkerId),
    /// The client of a held connection has sent something or has hung up.
    Held(ConnectionId),
    /// The stream to the other master has space for a connection.
    Successor,
    /// The process has exited and can be reaped.
    Exit(WorkerId),
    /// The worker's channel has space for a frame that waits in the outbox.
    Writable(WorkerId),
    /// The application's scheduler must be called for a connection.
    Unscheduled,
    /// A deadline has passed, or waiting connections can be checked again.
    Time,
}

/// The configuration of the simulated kernel.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Config {
    pub(crate) policy: SchedulingPolicy,
    /// Whether the system reports the number of connections in a queue.
    pub(crate) counts_queues: bool,
    /// The maximum number of connections that a callback receives in one iteration of the worker's
    /// loop.
    pub(crate) accept_batch: u32,
}

/// The master's core, with simulated connections and real descriptors in messages.
pub(crate) type Master = MasterCore<Client, Vec<NoLingerFd>>;

/// The simulated kernel and its processes.
#[derive(Default)]
pub(crate) struct World {
    config: Config,
    now: Time,
    /// The time of the master's last tick.
    ticked: Time,
    pub(crate) master: Master,
    /// The workers whose queued frames the master must try to write.
    unflushed: BTreeSet<WorkerId>,
    /// The worker and the kind of the last event, if the event was delivered to the worker's
    /// callbacks (`Level::Worker`). The next event must be the same event for the master's
    /// callbacks (`Level::Cluster`). `None` after the exit of a detached process, because the
    /// master's callbacks do not receive that event.
    second: Option<(WorkerId, Discriminant<Event<Vec<NoLingerFd>>>)>,
    pub(crate) processes: BTreeMap<WorkerId, Process>,
    pub(crate) detached: BTreeMap<WorkerId, Detached>,
    /// The processes to which the application has sent a signal.
    signalled: BTreeSet<WorkerId>,
    /// The processes for whose exit the application waits.
    referenced: BTreeSet<WorkerId>,
    pub(crate) ports: BTreeMap<HandleId, Port>,
    pub(crate) queues: BTreeMap<(HandleId, WorkerId), Queue>,
    /// The connections that the master holds.
    pub(crate) held: BTreeMap<ConnectionId, Held>,
    /// The maximum number of connections that the master holds.
    parked_limit: usize,
    /// The highest value that `parked_limit` has had.
    parked_limit_max: usize,
    /// Whether another master takes over from the master.
    has_successor: bool,
    /// The connections that the other master will read.
    passing: VecDeque<ConnectionId>,
    /// The clients whose connections the other master has read.
    pub(crate) passed: Vec<u32>,
    /// The number of `Detach` and `ParkAgain` frames whose connection was still in the sending
    /// worker's queue.
    pub(crate) early_reports: u64,
    /// The number of times that the master could not hold a connection.
    failed_holds: u64,
    /// The number of held connections that the master closed for no reason that this kernel can
    /// see. An expiry in the ledger or a failed hold must account for each (see `check_closing`).
    expired: u64,
    /// The pairs of a listener and a worker for which sharing the listener failed.
    unshared: BTreeSet<(HandleId, WorkerId)>,
    /// The queues that the master could not empty and therefore could not close.
    unclosed: Vec<(HandleId, WorkerId)>,
    /// The time at which the master tries again to close the queues in `unclosed`.
    closes_at: Option<Time>,
    pub(crate) last_port: u32,
    /// The listeners that the application retains.
    pub(crate) retained: Vec<HandleId>,
    /// The listeners that the application has adopted. Another process opened them and may still
    /// have copies, so the master must not filter them.
    adopted: BTreeSet<HandleId>,
    pub(crate) fates: Vec<Fate>,
    /// The clients whose connections have closed since the last check.
    closed: Rc<RefCell<Vec<u32>>>,
    pub(crate) served: u64,
    /// The number of connections that have closed although no worker received them.
    lost: u64,
    /// The number of connections that workers have received from queues, or that the master has
    /// moved to workers (`Action::MoveParked`).
    received: u64,
    /// The number of connections that the master has moved to workers that had already exited.
    pub(crate) moved_to_exited: usize,
    /// Whether a worker has reported more connections than it received, so that the ledger may be
    /// wrong.
    pub(crate) has_false_claims: bool,
    pub(crate) failing: BTreeSet<Failure>,
    /// Whether the application waits until a `disconnect_all` has finished.
    awaited: bool,
    /// The number of times that a `disconnect_all` has finished. `end` resets the number.
    pub(crate) disconnected: u32,
    /// The time by which all workers must have exited, after `disconnect_all_within`.
    stop_by: Option<Time>,
    /// A buffer that `ready` reuses.
    inputs: Vec<MasterInput>,
}

impl Default for Master {
    fn default() -> Self {
        Self::new(SchedulingPolicy::default())
    }
}

/// Returns the element with the index `n` modulo the number of elements, or `None` if there are
/// none.
pub(crate) fn nth<T>(mut all: impl Iterator<Item = T> + Clone, n: u8) -> Option<T> {
    let count = all.clone().count();
    all.nth(usize::from(n).checked_rem(count)?)
}

impl World {
    pub(crate) fn new(config: Config) -> Self {
        let mut world = Self {
            config,
            master: MasterCore::new(config.policy),
            ..Self::default()
        };
        world.limit_parked(PARKED_LIMIT);
        world
    }

    /// Limits the number of connections that the master holds.
    pub(crate) fn limit_parked(&mut self, limit: usize) {
        self.parked_limit = limit;
        self.parked_limit_max = self.parked_limit_max.max(limit);
        self.master.set_parked_limit(limit);
    }

    pub(crate) fn process(&mut self, worker: WorkerId) -> &mut Process {
        self.processes.get_mut(&worker).expect(KNOWN)
    }

    /// Returns the number of clients that have connected.
    pub(crate) fn clients(&self) -> u64 {
        self.fates.len() as u64
    }

    /// Returns the living worker with the index `n` modulo the number of living workers.
    pub(crate) fn living(&self, n: u8) -> Option<WorkerId> {
        let alive = self.processes.iter().filter(|(_, p)| p.is_alive());
        nth(alive.map(|(id, _)| *id), n)
    }

    /// Returns the worker with the index `n` modulo the number of workers whose libraries have work
    /// to do.
    pub(crate) fn busy(&self, n: u8) -> Option<WorkerId> {
        let busy = self.processes.iter().filter(|(_, p)| p.is_busy(self.now));
        nth(busy.map(|(id, _)| *id), n)
    }

    pub(crate) fn now(&self) -> Time {
        self.now
    }

    pub(crate) fn pass(&mut self, time: Time) {
        self.now += time;
    }

    // Clients' actions.

    /// Connects a client to the open listener with the index `n` modulo the number of open
    /// listeners, and makes the client send a request. If no listener is open, the client that
    /// connected last sends a request instead.
    pub(crate) fn connect(&mut self, n: u8) {
        self.connect_silently(n);
        self.send_request(0);
    }

    /// Connects a client, as `connect` does, but sends no request yet. Does nothing if no listener
    /// is open.
    pub(crate) fn connect_silently(&mut self, n: u8) {
        let client = u32::try_from(self.fates.len()).expect("few clients");
        let ports = self.ports.iter_mut().map(|(id, port)| (Some(*id), port));
        let private = self
            .processes
            .values_mut()
            .flat_map(|process| process.private.values_mut());
        let all = ports.chain(private.map(|port| (None, port)));
        let mut open: Vec<_> = all.filter(|(_, port)| port.is_open()).collect();
        let count = open.len();
        if let Some(n) = usize::from(n).checked_rem(count) {
            let (id, port) = &mut open[n];
            port.backlog.push_back(client);
            let port = *id;
            self.fates.push(Fate {
                port,
                ..Fate::default()
            });
        }
    }

    /// Returns one of the last 16 clients. `n` selects the client.
    fn recent_client(&mut self, n: u8) -> Option<&mut Fate> {
        let ago = usize::from(n) % 16 + 1;
        let at = self.fates.len().checked_sub(ago)?;
        self.fates.get_mut(at)
    }

    /// Makes one of the last 16 clients send a request, unless it has hung up. `n` selects the
    /// client.
    pub(crate) fn send_request(&mut self, n: u8) {
        if let Some(fate) = self.recent_client(n) {
            fate.send_request();
        }
    }

    /// Sends a request from the client of one of the master's held connections. `n` selects the
    /// connection.
    pub(crate) fn send_on_held(&mut self, n: u8) {
        let client = nth(self.held.values(), n).and_then(Held::client);
        if let Some(client) = client {
            self.fates[client as usize].send_request();
        }
    }

    /// Makes every client whose connection is open send a request.
    pub(crate) fn send_all_requests(&mut self) {
        self.fates.iter_mut().for_each(Fate::send_request);
    }

    /// Makes one of the last 16 clients hang up. `n` selects the client.
    pub(crate) fn hang_up(&mut self, n: u8) {
        if let Some(fate) = self.recent_client(n) {
            fate.left = true;
        }
    }

    // Process lifecycle.

    pub(crate) fn fork(&mut self) -> WorkerId {
        self.fork_as(User::default())
    }

    pub(crate) fn fork_as(&mut self, user: User) -> WorkerId {
        let worker = self.add_worker(user, None);
        // Collect the worker's first action, which sends an `Online` frame.
        self.gather_from_worker(worker);
        worker
    }

    /// Forks a raw worker. The driver writes the worker's bytes.
    pub(crate) fn fork_raw(&mut self) -> WorkerId {
        self.add_worker(User::default(), Some(Inbox::default()))
    }

    fn add_worker(&mut self, user: User, inbox: Option<Inbox>) -> WorkerId {
        let id = self.master.next_worker_id().expect("a free number");
        self.processes.insert(id, Process::new(user, inbox));
        self.referenced.insert(id);
        self.report(|core| core.forked(id, user));
        id
    }

    pub(crate) fn detach(&mut self) -> WorkerId {
        let id = self.master.next_worker_id().expect("a free number");
        self.detached.insert(id, Detached::Running);
        self.report(|core| core.detached(id));
        id
    }

    /// Makes a detached process exit if it is running.
    pub(crate) fn end_detached(&mut self, process: WorkerId, status: ExitStatus) {
        if self.detached[&process].is_running() {
            self.detached.insert(process, Detached::Zombie(status));
        }
    }

    pub(crate) fn stop(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        if process.is_running() {
            process.state = ProcessState::Stopped { pending: None };
        }
    }

    /// Continues a stopped worker, or kills the worker if a signal is pending.
    pub(crate) fn resume(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        if let ProcessState::Stopped { pending } = process.state {
            process.state = ProcessState::Running;
            if let Some(signal) = pending {
                self.exit(worker, ExitStatus::from_raw(signal.number()));
            }
        }
    }

    /// Makes a worker exit, and closes its copies of listeners.
    pub(crate) fn exit(&mut self, worker: WorkerId, status: ExitStatus) {
        let process = self.process(worker);
        let mut handles: Vec<_> = process.shared.values().copied().collect();
        let travelling = process.down.parcels().map(|parcel| parcel.attachment);
        handles.extend(travelling.filter_map(master::listener_of));
        process.exit(status);
        for handle in handles {
            self.forget_port(handle);
        }
    }

    // The master's event loop.

    /// Makes the master carry out an action, write a frame, deliver an event, or handle an input.
    /// Returns the event if the master delivers one. `n` chooses between an event and an input, and
    /// among the inputs.
    pub(crate) fn master_step(&mut self, n: u8) -> Option<EmittedEvent<Vec<NoLingerFd>>> {
        if self.carry_out_next() || self.flush_next() {
            return None;
        }
        if n % 8 != 7 && self.master.has_events() {
            return self.next_checked_event();
        }
        if let Some(input) = self.ready(n / 8) {
            self.handle(input);
        }
        None
    }

    /// Returns whether the master has carried out all its actions and has no worker whose channel
    /// it still has to flush.
    pub(crate) fn master_is_idle(&self) -> bool {
        !self.master.has_actions() && self.unflushed.is_empty()
    }

    /// Returns whether no connection waits to be passed to the other master.
    pub(crate) fn is_passed(&self) -> bool {
        self.master_is_idle() && self.held.is_empty()
    }

    /// Carries out the master's first action. Returns whether there was an action.
    pub(crate) fn carry_out_next(&mut self) -> bool {
        let Some(action) = self.master.next_action() else {
            return false;
        };
        self.act(action);
        true
    }

    /// Tries to write one frame to the first worker in `unflushed`. Returns whether there was such
    /// a worker.
    pub(crate) fn flush_next(&mut self) -> bool {
        let Some(worker) = self.unflushed.pop_first() else {
            return false;
        };
        self.master_writes(worker);
        true
    }

    /// Takes the next event from the master's core, checks the event and returns it.
    pub(crate) fn next_checked_event(&mut self) -> Option<EmittedEvent<Vec<NoLingerFd>>> {
        let emit = self.master.next_event()?;
        self.check_emit(&emit);
        Some(emit)
    }

    /// Returns the input with the index `n` modulo the number of inputs that are ready for the
    /// master.
    fn ready(&mut self, n: u8) -> Option<MasterInput> {
        let mut inputs = std::mem::take(&mut self.inputs);
        inputs.clear();
        let ready = self.ports.iter().filter(|(_, port)| port.is_ready());
        inputs.extend(ready.map(|(handle, _)| MasterInput::Readable(*handle)));
        inputs.extend(self.reported_held().map(MasterInput::Held));
        if !self.passing.is_empty() {
            inputs.push(MasterInput::Successor);
        }
        for (worker, process) in &self.processes {
            if process.master_end {
                if !process.up.wire.is_empty() {
                    inputs.push(MasterInput::Frame(*worker));
                } else if !process.worker_end || process.is_shut {
                    inputs.push(MasterInput::End(*worker));
                }
                if process.down.can_write() && process.master_backoff <= self.now {
                    inputs.push(MasterInput::Writable(*worker));
                }
            }
            if let ProcessState::Zombie(_) = process.state {
                inputs.push(MasterInput::Exit(*worker));
            }
        }
        for (process, state) in &self.detached {
            if let Detached::Zombie(_) = state {
                inputs.push(MasterInput::Exit(*process));
            }
        }
        if self.master.has_unscheduled() {
            inputs.push(MasterInput::Unscheduled);
        }
        let is_due = |deadline| deadline <= self.now;
        let closes = self.closes_at.is_some_and(is_due);
        if self.master.deadline().is_some_and(is_due) || closes {
            inputs.push(MasterInput::Time);
        }
        let input = nth(inputs.iter().copied(), n);
        self.inputs = inputs;
        input
    }

    /// Returns the held connections that the master's poller reports.
    pub(crate) fn reported_held(&self) -> impl Iterator<Item = ConnectionId> + '_ {
        let awaited = self.held.iter().filter(|(_, held)| held.is_awaited);
        let reported = awaited.filter(|(_, held)| {
            let fate = held.client().map(|client| self.fates[client as usize]);
            fate.is_some_and(|fate| fate.is_pending || fate.left)
        });
        reported.map(|(id, _)| *id)
    }

    /// Reports an input to the master.
    pub(crate) fn handle(&mut self, input: MasterInput) {
        self.master.set_time(self.now);
        match input {
            MasterInput::Readable(handle) => self.report(|core| core.readable(handle)),
            MasterInput::Frame(worker) => drop(self.master_reads(worker)),
            MasterInput::End(worker) => self.master_reads_end(worker),
            MasterInput::Held(id) => self.held_ready(id),
            MasterInput::Successor => self.successor_reads(),
            MasterInput::Exit(process) => self.reap(process),
            MasterInput::Writable(worker) => drop(self.unflushed.insert(worker)),
            MasterInput::Unscheduled => drop(self.schedule_next()),
            MasterInput::Time => self.tick(),
        }
    }

    /// Calls the application's scheduler for the next connection. The scheduler chooses a worker or
    /// none, depending on the connection's number. Returns whether there was such a connection.
    pub(crate) fn schedule_next(&mut self) -> bool {
        let Some((handle, sequence, _)) = self.master.unscheduled() else {
            return false;
        };
        let candidates = self.master.candidates(handle, sequence);
        let at = usize::try_from(sequence).expect("few connections") % (candidates.len() + 1);
        let worker = candidates.get(at).map(|load| load.worker);
        self.report(|core| core.choose(handle, sequence, worker));
        true
    }

    fn reap(&mut self, process: WorkerId) {
        let status = if let Some(detached) = self.detached.get_mut(&process) {
            let Detached::Zombie(status) = *detached else {
                unreachable!("it is reaped once")
            };
            *detached = Detached::Reaped(status);
            self.referenced.remove(&process);
            status
        } else {
            let process = self.process(process);
            let ProcessState::Zombie(status) = process.state else {
                unreachable!("it is reaped once")
            };
            process.state = ProcessState::Reaped(status);
            status
        };
        self.report(|core| core.exited(process, status));
    }

    pub(crate) fn tick(&mut self) {
        self.ticked = self.now;
        if self.stop_by.is_some_and(|by| by <= self.now) {
            // Move the deadline to the workers that exist now. The deadline does not apply to
            // workers that are forked after it has passed.
            let by = self.stop_by.take();
            for process in self.processes.values_mut() {
                process.deadline = earlier(process.deadline, by);
            }
        }
        if self.closes_at.is_some_and(|time| time <= self.now) {
            self.closes_at = None;
            for (handle, worker) in std::mem::take(&mut self.unclosed) {
                self.close_queue(handle, worker);
            }
        }
        let now = self.now;
        for id in self.master.closing_at(now) {
            self.check_client(id);
        }
        let senders = self.idle_senders();
        self.report(|core| core.tick(now));
        let is_idle = |id: &ConnectionId| self.master.is_idle(*id);
        assert!(senders.iter().all(is_idle), "closed with a request");
        if self.master.has_waiting() {
            self.sweep(SWEEP, |_, fate| fate.left);
        }
    }

    /// Returns the idle connections whose clients have sent something, if the master waits for this.
    /// Returns none while actions are pending, because a connection's number may then have another
    /// meaning here than in the master.
    fn idle_senders(&self) -> Vec<ConnectionId> {
        if self.master.has_actions() {
            return Vec::new();
        }
        let is_sender = |held: &Held| {
            let fate = held.client().map(|client| self.fates[client as usize]);
            let is_waiting = |port| self.master.is_bound(port) && self.master.master_accepts(port);
            fate.is_some_and(|fate| fate.is_pending && fate.port.is_some_and(is_waiting))
        };
        let all = self.held.iter();
        let senders = all.filter(|(id, held)| self.master.is_idle(**id) && is_sender(held));
        senders.map(|(id, _)| *id).collect()
    }

    /// Checks at most `limit` connections that wait in the master, and closes those for which
    /// `has_left` returns true. Makes their clients hang up.
    pub(crate) fn sweep(&mut self, limit: usize, has_left: impl Fn(u32, &Fate) -> bool) {
        let mut fates = std::mem::take(&mut self.fates);
        let held = std::mem::take(&mut self.held);
        self.report(|core| {
            core.sweep(limit, |hand_off| {
                let client = match hand_off {
                    HandOff::New(connection) => Some(connection.client),
                    HandOff::Held(resumed) => held.get(&resumed.connection).and_then(Held::client),
                };
                client.is_none_or(|client| {
                    let fate = &mut fates[client as usize];
                    fate.left = has_left(client, fate);
                    fate.left
                })
            });
        });
        (self.fates, self.held) = (fates, held);
    }

    // Running until idle.

    /// Runs the master until it has nothing left to do.
    pub(crate) fn run_master(&mut self) {
        for n in 0..10_000_u32 {
            let has_events = self.master.has_events();
            if self.master_is_idle() && !has_events && self.ready(0).is_none() {
                return;
            }
            // Pass a different number to each step, because a constant number would always select
            // the same ready input.
            self.master_step(n.to_le_bytes()[0]);
            self.check();
        }
        panic!("the master never comes to rest");
    }

    /// Runs the master and the workers' libraries until they have nothing left to do.
    pub(crate) fn settle(&mut self) {
        loop {
            self.run_master();
            let Some(worker) = self.busy(0) else {
                return;
            };
            self.worker_step(worker, 0);
            self.check();
        }
    }
}
