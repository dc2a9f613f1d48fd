//! The world, and what happens in it step by step.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::rc::Rc;

use super::kernel::{Client, Connection, Detached, Life, Parcel, Port, Process, Written};
use super::{Call, Deed, Failure, Lie, Step, What};
use crate::config::settings::SchedulingPolicy;
use crate::core::dispatch::Sequenced;
use crate::core::event::{EmittedEvent, Event, Level, WorkerState};
use crate::core::master::{Action, Attachment, MasterCore};
use crate::core::worker::{self as worker_core, Listen, ListenerId};
use crate::error::{Error, SendError};
use crate::types::endpoint::{BindFlags, Endpoint, Kind, Place};
use crate::types::errno;
use crate::types::signal::Signal;
use crate::types::time::{Time, earlier};
use crate::types::worker_id::WorkerId;
use crate::wire::frame::{FrameError, HandleId, HandleKey, ToMaster, ToWorker};

const MOST_WORKERS: usize = 5;
const MOST_DETACHED: usize = 2;
const MOST_LISTENERS: usize = 3;
/// How many connections the kernel has room for in a queue.
pub(super) const QUEUE: usize = 40;
/// How long the shells wait when there was no room for a descriptor.
const RETRY: Time = Time::from_millis(100);
/// How many waiting connections the shell checks in each iteration; few, so that they take turns.
const SWEEP: usize = 2;
/// A worker is told of in the order in which it was forked.
const NOBODY: &str = "of a worker that was never forked";

/// What became of a client.
#[derive(Clone, Copy, Debug, Default)]
struct Fate {
    served: bool,
    left: bool,
}

/// What the master can find ready.
#[derive(Clone, Copy, Debug)]
enum Fact {
    Readable(HandleId),
    Frame(WorkerId),
    End(WorkerId),
    Exit(WorkerId),
    Writable(WorkerId),
    Time,
}

pub(super) struct World {
    now: Time,
    /// When the master looked at its clock last.
    ticked: Time,
    pub(super) master: MasterCore<Client, ()>,
    actions: VecDeque<Action<Client>>,
    /// Whose channels the master has not tried to write to.
    unflushed: BTreeSet<WorkerId>,
    /// What the program does in its next callback.
    callback: Option<(Call, u8)>,
    /// Of a pair of events the second, which must come next.
    second: Option<(WorkerId, &'static str)>,
    pub(super) processes: BTreeMap<WorkerId, Process>,
    pub(super) detached: BTreeMap<WorkerId, Detached>,
    /// Processes that the program has signalled.
    signalled: BTreeSet<WorkerId>,
    /// Processes whose end the program waits for.
    referenced: BTreeSet<WorkerId>,
    pub(super) ports: BTreeMap<HandleId, Port>,
    /// By which workers get their connections. The master has both ends of each.
    pub(super) queues: BTreeMap<(HandleId, WorkerId), VecDeque<Sequenced<Client>>>,
    /// To be closed, for which there was no descriptor.
    unclosed: Vec<(HandleId, WorkerId)>,
    closes_at: Option<Time>,
    last_port: HandleId,
    taken: BTreeSet<Endpoint>,
    /// What the master's program keeps, and what it has not opened itself.
    kept: Vec<HandleId>,
    adopted: BTreeSet<HandleId>,
    fates: Vec<Fate>,
    /// Connections of which nobody has a descriptor any more.
    closed: Rc<RefCell<Vec<u32>>>,
    pub(super) served: u64,
    /// Closed although no program had them.
    lost: u64,
    failing: BTreeSet<Failure>,
    awaited: bool,
    pub(super) disconnected: u32,
    /// Everybody is to be gone then.
    stop_by: Option<Time>,
    facts: Vec<Fact>,
}

/// What a worker may ask for: any port, a port, a path, a descriptor of the master's, UDP.
pub(super) fn endpoint(n: u8) -> Endpoint {
    let ip = |port: u8| Place::Ip(SocketAddr::from(([127, 0, 0, 1], u16::from(port))));
    match n % 5 {
        n @ (0 | 1) => Endpoint::new(Kind::Tcp, ip(n)),
        2 => Endpoint::new(Kind::Unix, Place::Path("/path".into())),
        3 => Endpoint::new(Kind::Tcp, Place::Fd(3)),
        _ => Endpoint::new(Kind::Udp, ip(0)),
    }
}

fn nth<T>(mut all: impl Iterator<Item = T> + Clone, n: u8) -> Option<T> {
    let count = all.clone().count();
    all.nth(usize::from(n).checked_rem(count)?)
}

impl World {
    pub(super) fn new(policy: SchedulingPolicy) -> Self {
        Self {
            now: Time::ZERO,
            ticked: Time::ZERO,
            master: MasterCore::new(policy),
            actions: VecDeque::new(),
            unflushed: BTreeSet::new(),
            callback: None,
            second: None,
            processes: BTreeMap::new(),
            detached: BTreeMap::new(),
            signalled: BTreeSet::new(),
            referenced: BTreeSet::new(),
            ports: BTreeMap::new(),
            queues: BTreeMap::new(),
            unclosed: Vec::new(),
            closes_at: None,
            last_port: HandleId(0),
            taken: BTreeSet::new(),
            kept: Vec::new(),
            adopted: BTreeSet::new(),
            fates: Vec::new(),
            closed: Rc::default(),
            served: 0,
            lost: 0,
            failing: BTreeSet::new(),
            awaited: false,
            disconnected: 0,
            stop_by: None,
            facts: Vec::new(),
        }
    }

    fn process(&mut self, worker: WorkerId) -> &mut Process {
        self.processes.get_mut(&worker).expect("known")
    }

    pub(super) fn clients(&self) -> u64 {
        self.fates.len() as u64
    }

    /// The n-th worker of those that are alive.
    pub(super) fn living(&self, n: u8) -> Option<WorkerId> {
        let alive = self.processes.iter().filter(|(_, p)| p.alive);
        nth(alive.map(|(id, _)| *id), n)
    }

    /// Does one step. Whatever it names is chosen among what exists, so that every list of steps
    /// has a meaning.
    pub(super) fn step(&mut self, step: Step) {
        let (what, who, n) = step;
        match what {
            What::Connect => self.connect(n),
            What::HangUp => self.hang_up(n),
            What::Pass => self.pass(Time::from_millis(n.into())),
            What::Master => self.master_step(n),
            What::Call(call) => {
                if self.actions.is_empty() && self.unflushed.is_empty() {
                    let detached = self.detached.iter();
                    let detached = detached.filter(|(_, process)| **process != Detached::Gone);
                    let detached = detached.map(|(id, _)| *id);
                    let handles: Vec<_> = self.master.worker_ids().chain(detached).collect();
                    self.call(call, nth(handles.into_iter(), who), n);
                } else {
                    self.master_step(n);
                }
            }
            What::InCallback(call) => self.callback = Some((call, n)),
            What::Fail(failure) => drop(self.failing.insert(failure)),
            What::Worker => {
                let busy = self.processes.iter().filter(|(_, p)| p.is_busy(self.now));
                if let Some(worker) = nth(busy.map(|(id, _)| *id), who) {
                    self.worker_step(worker, n);
                }
            }
            What::End => {
                let running = self.detached.iter().filter(|(_, process)| process.runs());
                if let Some(process) = nth(running.map(|(id, _)| *id), who) {
                    let status = ExitStatus::from_raw(i32::from(n) << 8);
                    self.detached.insert(process, Detached::Zombie(status));
                }
            }
            What::Program(_)
            | What::Kill
            | What::Stop
            | What::Continue
            | What::Cut
            | What::Lie(_) => {
                if let Some(worker) = self.living(who) {
                    self.step_of(worker, what, n);
                }
            }
        }
        self.check();
    }

    fn step_of(&mut self, worker: WorkerId, what: What, n: u8) {
        match what {
            What::Program(deed) => self.program_step(worker, deed, n),
            What::Kill => self.die(worker, ExitStatus::from_raw(9)),
            What::Stop => self.process(worker).stopped = true,
            What::Continue => self.go_on(worker),
            What::Cut => {
                let process = self.process(worker);
                process.hurt = true;
                process.close_end();
            }
            What::Lie(lie) => self.lie(worker, lie, n),
            What::Connect
            | What::HangUp
            | What::Pass
            | What::Master
            | What::Worker
            | What::End
            | What::Call(_)
            | What::InCallback(_)
            | What::Fail(_) => {}
        }
    }

    pub(super) fn now(&self) -> Time {
        self.now
    }

    pub(super) fn pass(&mut self, time: Time) {
        self.now += time;
    }

    /// From now on nothing unexpected happens.
    pub(super) fn calm_down(&mut self) {
        self.callback = None;
        self.failing.clear();
    }

    pub(super) fn count_lost(&self) -> u64 {
        self.lost
    }

    // Clients.

    fn connect(&mut self, n: u8) {
        let client = u32::try_from(self.fates.len()).expect("few");
        let ports = self.ports.values_mut();
        let own = self.processes.values_mut().flat_map(|p| p.own.values_mut());
        let mut open: Vec<_> = ports.chain(own).filter(|port| port.lets_in()).collect();
        let count = open.len();
        if let Some(n) = usize::from(n).checked_rem(count) {
            open[n].backlog.push_back(client);
            self.fates.push(Fate::default());
        }
    }

    /// One of those that came last gives up.
    fn hang_up(&mut self, n: u8) {
        let ago = usize::from(n) % 16 + 1;
        if let Some(at) = self.fates.len().checked_sub(ago) {
            self.fates[at].left = true;
        }
    }

    // The master.

    /// One thing that the master does: an action, a frame that it writes, an event that it
    /// delivers, or something that it finds ready.
    pub(super) fn master_step(&mut self, n: u8) {
        if let Some(action) = self.actions.pop_front() {
            self.act(action);
        } else if let Some(worker) = self.unflushed.pop_first() {
            self.master_writes(worker);
        } else if n % 8 != 7 && self.master.has_events() {
            let emit = self.master.next_event().expect("has one");
            self.deliver(&emit);
        } else if let Some(fact) = self.fact(n / 8) {
            self.master.set_time(self.now);
            self.happen(fact);
        }
        self.gather();
    }

    /// Whether the master has nothing to do.
    pub(super) fn master_sleeps(&mut self) -> bool {
        let busy = !self.actions.is_empty() || !self.unflushed.is_empty();
        !busy && !self.master.has_events() && self.fact(0).is_none()
    }

    fn gather(&mut self) {
        while let Some(action) = self.master.next_action() {
            self.actions.push_back(action);
        }
    }

    fn fact(&mut self, n: u8) -> Option<Fact> {
        let mut facts = std::mem::take(&mut self.facts);
        facts.clear();
        let ready = self.ports.iter().filter(|(_, port)| port.is_ready());
        facts.extend(ready.map(|(handle, _)| Fact::Readable(*handle)));
        for (worker, process) in &self.processes {
            if process.master_end {
                if !process.up.wire.is_empty() {
                    facts.push(Fact::Frame(*worker));
                } else if !process.worker_end || process.shut {
                    facts.push(Fact::End(*worker));
                }
                if process.down.can_write() && process.rests_until <= self.now {
                    facts.push(Fact::Writable(*worker));
                }
            }
            if !process.alive && !process.reaped {
                facts.push(Fact::Exit(*worker));
            }
        }
        for (process, state) in &self.detached {
            if let Detached::Zombie(_) = state {
                facts.push(Fact::Exit(*process));
            }
        }
        let is_due = |deadline| deadline <= self.now;
        let waits = self.master.has_waiting() && self.ticked < self.now;
        let closes = self.closes_at.is_some_and(is_due);
        if self.master.deadline().is_some_and(is_due) || waits || closes {
            facts.push(Fact::Time);
        }
        let fact = nth(facts.iter().copied(), n);
        self.facts = facts;
        fact
    }

    fn happen(&mut self, fact: Fact) {
        match fact {
            Fact::Readable(handle) => self.master.readable(handle),
            Fact::Frame(worker) => drop(self.master_reads(worker)),
            Fact::End(worker) => self.master_hears_the_end(worker),
            Fact::Exit(worker) if self.detached.contains_key(&worker) => {
                let Detached::Zombie(status) = self.detached[&worker] else {
                    unreachable!("it is reaped once")
                };
                self.detached.insert(worker, Detached::Reaped(status));
                self.referenced.remove(&worker);
                self.master.exited(worker, status);
            }
            Fact::Exit(worker) => {
                let process = self.process(worker);
                process.reaped = true;
                let status = process.status.expect("dead");
                self.master.exited(worker, status);
            }
            Fact::Writable(worker) => drop(self.unflushed.insert(worker)),
            Fact::Time => self.tick(),
        }
    }

    pub(super) fn tick(&mut self) {
        self.ticked = self.now;
        if self.stop_by.is_some_and(|by| by <= self.now) {
            // Whoever is forked from now on has not been told to leave.
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
        self.master.tick(self.now);
        let fates = &self.fates;
        let left = |connection: &Client| fates[connection.client as usize].left;
        if self.master.has_waiting() {
            self.master.sweep(SWEEP, left);
        }
    }

    fn master_hears_the_end(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        process.down.break_off();
        process.up.wire.clear();
        process.shut = true;
        process.master_end = false;
        self.master.channel_closed(worker);
    }

    /// Reads one frame of a worker.
    fn master_reads(&mut self, worker: WorkerId) -> bool {
        let process = self.processes.get_mut(&worker).expect("known");
        if !process.master_end {
            return false;
        }
        let Some(Parcel { frame, .. }) = process.up.wire.pop_front() else {
            return false;
        };
        match frame {
            Err(error) => self.master.violation(worker, error),
            Ok(frame) => self.master.frame(worker, frame),
        }
        true
    }

    fn master_writes(&mut self, worker: WorkerId) {
        let now = self.now;
        let process = self.processes.get_mut(&worker).expect("known");
        if !process.master_end || process.rests_until > now {
            return;
        }
        if !process.worker_end || process.shut {
            return process.down.break_off();
        }
        let carries = |parcel: &Parcel<_>| !matches!(parcel.with, Attachment::None);
        let first = process.down.outbox.front();
        if first.is_some_and(carries) && self.failing.remove(&Failure::Send) {
            // What the shell does when the kernel has no room for a descriptor on its way.
            process.rests_until = now + RETRY;
            let source = io::Error::from_raw_os_error(109);
            let worker = Some(worker);
            return self
                .master
                .error(worker, Error::Exhausted { worker, source });
        }
        let failing = &mut self.failing;
        let written = process.down.write(|parcel| {
            if carries(parcel) && failing.remove(&Failure::Receive) {
                parcel.with = Attachment::None;
                parcel.is_robbed = true;
            }
        });
        if written == Written::Something {
            self.unflushed.insert(worker);
        }
    }

    fn act(&mut self, action: Action<Client>) {
        match action {
            Action::Send {
                worker,
                frame,
                with,
            } => self.send(worker, frame, with),
            Action::Dispatch {
                handle,
                worker,
                connection,
                has_waited,
            } => {
                let client = connection.connection.client as usize;
                if has_waited && self.fates[client].left {
                    self.master.hung_up(handle, worker);
                } else {
                    self.give(handle, worker, connection);
                }
            }
            Action::Reclaim {
                handle,
                worker,
                at_most,
            } => self.reclaim(handle, worker, at_most),
            Action::CountQueued { handle, worker } => {
                if let Some(queue) = self.queues.get(&(handle, worker)) {
                    self.master.counted(handle, worker, queue.len() as u64);
                }
            }
            Action::CloseQueue { handle, worker } => self.close_queue(handle, worker),
            Action::Bind {
                handle, endpoint, ..
            } => {
                let result = self.bind(handle, &endpoint);
                self.master.bound(handle, result);
            }
            Action::Watch { handle } => self.port(handle).watched = true,
            Action::Unwatch { handle } => self.port(handle).watched = false,
            Action::RemoveFile { handle } => {
                self.shut(handle);
                self.taken.clear();
            }
            Action::AttachSynFilter { handle } => self.shut(handle),
            Action::DetachSynFilter { handle } => {
                let port = self.port(handle);
                assert_eq!(port.kind, Some(Kind::Tcp), "its file is gone");
                port.shut = false;
                assert!(!self.adopted.contains(&handle), "not our door");
            }
            Action::Unbind { handle } => self.unbind(handle),
            Action::StopListening { handle } => self.shut(handle),
            // No process shuts a listener down here.
            Action::WatchHangUp { .. } => {}
            // Nobody waits in the kernel here.
            Action::Unblock { .. } => {}
            Action::BindShard { .. } | Action::SelectShards { .. } => {
                unreachable!("there are no shards here")
            }
            Action::Accept { handle, at_most } => self.accept(handle, at_most),
            Action::CloseChannel { worker } => {
                let process = self.process(worker);
                process.shut = true;
                process.down.break_off();
                // As the shell does: everything that was written, before anything else is done.
                while self.master_reads(worker) {
                    if !self.master.is_connected(worker) {
                        break;
                    }
                }
                self.master_hears_the_end(worker);
            }
            Action::DiscardChannel { worker } => {
                let process = self.process(worker);
                assert!(process.liar, "an honest worker is cut off");
                process.down.break_off();
                process.up.wire.clear();
                process.shut = true;
                process.master_end = false;
            }
            Action::Signal { worker, signal } if self.detached.contains_key(&worker) => {
                assert!(self.signalled.contains(&worker), "the program has not");
                match self.detached[&worker] {
                    Detached::Running => {
                        let status = ExitStatus::from_raw(signal.number());
                        self.detached.insert(worker, Detached::Zombie(status));
                    }
                    Detached::Zombie(_) => {}
                    Detached::Reaped(_) | Detached::Gone => panic!("signal to a reaped pid"),
                }
            }
            Action::Signal { worker, signal } => {
                let process = self.process(worker);
                assert!(!process.reaped, "signal to a reaped pid");
                if process.stopped && signal != Signal::KILL {
                    process.signal = Some(signal);
                } else if process.alive {
                    self.die(worker, ExitStatus::from_raw(signal.number()));
                }
            }
        }
    }

    fn port(&mut self, handle: HandleId) -> &mut Port {
        let port = self.ports.get_mut(&handle).expect("no such listener");
        assert!(!port.unbound, "the listener is gone");
        port
    }

    fn shut(&mut self, handle: HandleId) {
        let is_ours = !self.kept.contains(&handle) && !self.adopted.contains(&handle);
        assert!(is_ours, "not our door");
        self.port(handle).shut = true;
    }

    fn send(&mut self, worker: WorkerId, frame: ToWorker, with: Attachment) {
        if let (
            ToWorker::Reply { request, .. },
            Attachment::Listener(handle) | Attachment::Queue(handle),
        ) = (&frame, with)
        {
            assert!(!self.port(handle).unbound);
            if self.failing.remove(&Failure::Share) {
                let error = errno::EMFILE;
                return self.master.share_failed(handle, worker, *request, error);
            }
        }
        if let Attachment::Queue(handle) = with {
            let other = self.queues.insert((handle, worker), VecDeque::new());
            assert!(other.is_none(), "two queues for one worker");
        }
        let process = self.process(worker);
        assert!(process.master_end, "send on a closed channel");
        process.down.queue(frame, with);
        self.unflushed.insert(worker);
    }

    fn give(&mut self, handle: HandleId, worker: WorkerId, connection: Sequenced<Client>) {
        let is_exhausted = self.failing.remove(&Failure::Send);
        let queue = self.queues.get_mut(&(handle, worker));
        match queue.filter(|queue| queue.len() < QUEUE && !is_exhausted) {
            Some(queue) => {
                queue.push_back(connection);
                let honest = !self.processes[&worker].liar;
                let bound = crate::core::dispatch::MAX_WINDOW as usize;
                assert!(!honest || queue.len() <= bound, "more than its share");
            }
            None => self
                .master
                .not_dispatched(handle, worker, connection, is_exhausted),
        }
    }

    fn reclaim(&mut self, handle: HandleId, worker: WorkerId, at_most: usize) {
        if self.failing.remove(&Failure::TakeBack) {
            self.master.cannot_reclaim(handle);
            return self.master.reclaimed(handle, worker, Vec::new(), false);
        }
        if let Some(queue) = self.queues.get_mut(&(handle, worker)) {
            let count = queue.len().min(at_most);
            let is_empty = count < at_most;
            let back = queue.drain(..count).collect();
            self.master.reclaimed(handle, worker, back, is_empty);
        }
    }

    fn close_queue(&mut self, handle: HandleId, worker: WorkerId) {
        let fails = self.failing.remove(&Failure::TakeBack);
        let queue = self.queues.remove(&(handle, worker));
        match queue {
            Some(queue) if fails => {
                self.queues.insert((handle, worker), queue);
                self.unclosed.push((handle, worker));
                self.closes_at.get_or_insert(self.now + RETRY);
            }
            queue => {
                let back = queue.unwrap_or_default().into();
                self.master.queue_closed(handle, worker, back);
            }
        }
    }

    fn bind(&mut self, handle: HandleId, endpoint: &Endpoint) -> Result<Option<SocketAddr>, i32> {
        // Port 0 and what is open already always succeed.
        let may_fail = [self::endpoint(1), self::endpoint(2)].contains(endpoint);
        if may_fail && self.taken.contains(endpoint) || self.failing.remove(&Failure::Bind) {
            return Err(errno::EADDRINUSE);
        }
        let port = Port {
            kind: Some(endpoint.kind),
            ..Port::default()
        };
        assert!(handle > self.last_port, "bound twice");
        self.last_port = handle;
        self.ports.insert(handle, port);
        if may_fail {
            self.taken.insert(endpoint.clone());
        }
        Ok(endpoint.address())
    }

    fn unbind(&mut self, handle: HandleId) {
        assert!(!self.kept.contains(&handle), "it was to be kept");
        let port = self.port(handle);
        port.unbound = true;
        port.watched = false;
        // In this world a listener's address is known by its number alone.
        self.taken.clear();
        self.forget_port(handle);
    }

    /// A listener is gone when nobody has a descriptor of it, and its backlog with it.
    fn forget_port(&mut self, handle: HandleId) {
        let Some(port) = self.ports.get(&handle) else {
            return;
        };
        let carries =
            |parcel: &Parcel<_>| matches!(parcel.with, Attachment::Listener(h) if h == handle);
        let has = |process: &Process| {
            let copies = process.shared.values().any(|shared| *shared == handle);
            copies
                || process.down.wire.iter().any(carries)
                || process.down.outbox.iter().any(carries)
        };
        if port.unbound && !self.processes.values().any(has) {
            self.ports.remove(&handle);
        }
    }

    fn accept(&mut self, handle: HandleId, at_most: u64) {
        if self.failing.remove(&Failure::Accept) {
            let error = io::Error::from_raw_os_error(errno::EMFILE);
            return self.master.accept_failed(handle, error);
        }
        for _ in 0..at_most {
            let Some(client) = self.port(handle).backlog.pop_front() else {
                return self.master.drained(handle);
            };
            let connection = Connection::new(client, &self.closed);
            self.master.accepted(handle, connection);
        }
        self.master.accept_done(handle);
    }

    // What the master's program does.

    pub(super) fn fork(&mut self) -> WorkerId {
        let id = self.master.next_worker_id().expect("a number");
        self.master.forked(id);
        self.processes.insert(id, Process::new());
        self.referenced.insert(id);
        // The first thing it does is to say that it is online.
        self.worker_gathers(id);
        id
    }

    pub(super) fn detach(&mut self) -> WorkerId {
        let id = self.master.next_worker_id().expect("a number");
        self.master.detached(id);
        self.detached.insert(id, Detached::Running);
        id
    }

    /// The program calls something, of a worker or detached process if there is one.
    pub(super) fn call(&mut self, call: Call, worker: Option<WorkerId>, n: u8) {
        self.master.set_time(self.now);
        let within = Time::from_millis(u64::from(n) * 4);
        match (call, worker) {
            (Call::Fork, _) => {
                if self.processes.values().filter(|p| p.alive).count() < MOST_WORKERS {
                    self.fork();
                }
            }
            (Call::Detach, _) => {
                if self.detached.values().filter(|d| d.runs()).count() < MOST_DETACHED {
                    self.detach();
                }
            }
            (Call::DisconnectAll, _) => {
                self.awaited = true;
                self.master.disconnect_all(true);
            }
            (Call::DisconnectAllWithin, _) => {
                self.awaited = true;
                let by = self.now + within;
                self.stop_by = Some(self.stop_by.map_or(by, |other| other.min(by)));
                self.master.disconnect_all_within(within);
            }
            (Call::Keep, _) => self.keep(&endpoint(n % 3)),
            (Call::Adopt, _) => self.adopt(endpoint(n % 2 + 1)),
            (Call::Release, _) => {
                if let Some(at) = usize::from(n).checked_rem(self.kept.len()) {
                    let handle = self.kept.swap_remove(at);
                    self.master.release(handle);
                }
            }
            (_, None) => {}
            (Call::Ref, Some(process)) => {
                let is_detached = self.detached.get(&process);
                if is_detached.is_none_or(|d| matches!(d, Detached::Running | Detached::Zombie(_)))
                {
                    self.referenced.insert(process);
                }
                self.master.reference(process, true);
            }
            (Call::Unref, Some(process)) => {
                self.referenced.remove(&process);
                self.master.reference(process, false);
            }
            (Call::Disconnect, Some(worker)) => self.master.disconnect(worker),
            (Call::DisconnectWithin, Some(worker)) => {
                let by = self.now + within;
                if let Some(process) = self.processes.get_mut(&worker) {
                    process.deadline = Some(process.deadline.map_or(by, |other| other.min(by)));
                }
                self.master.disconnect_within(worker, within);
            }
            (Call::Kill, Some(worker)) => {
                self.signalled.insert(worker);
                self.master.kill(worker, Signal::TERM);
            }
            (Call::Signal, Some(worker)) => {
                self.signalled.insert(worker);
                self.master.signal(worker, Signal::KILL);
            }
            (Call::CloseChannel, Some(worker)) => self.master.close_channel(worker),
            (Call::Send, Some(worker)) if self.detached.contains_key(&worker) => {
                let worker = Some(worker);
                let reason = SendError::ChannelClosed;
                self.master.error(worker, Error::Send { worker, reason });
            }
            (Call::Send, Some(worker)) => {
                let process = self.process(worker);
                if process.master_end && !process.down.broken {
                    process.sent[1] += 1;
                    let message = process.sent[1].to_le_bytes().to_vec();
                    let message = ToWorker::Message(message);
                    process.down.queue(message, Attachment::None);
                    self.unflushed.insert(worker);
                }
            }
        }
        self.gather();
    }

    fn keep(&mut self, endpoint: &Endpoint) {
        let handle = self.master.retain(endpoint).or_else(|| {
            let handle = self.master.next_handle();
            let address = self.bind(handle, endpoint).ok()?;
            let policy = self.master.policy_of(endpoint);
            self.master
                .retained(handle, endpoint.clone(), address, policy);
            Some(handle)
        });
        self.kept.extend(handle);
    }

    fn adopt(&mut self, endpoint: Endpoint) {
        let handle = self.master.next_handle();
        if let Ok(address) = self.bind(handle, &endpoint) {
            self.master.adopted(handle, endpoint, address);
            self.kept.push(handle);
            self.adopted.insert(handle);
        }
    }

    /// The program lets go of all that it keeps.
    pub(super) fn release_all(&mut self) {
        while !self.kept.is_empty() {
            self.call(Call::Release, None, 0);
        }
    }

    fn deliver(&mut self, emit: &EmittedEvent<()>) {
        let (level, event) = (emit.level, &emit.event);
        let name = name(event);
        if let Event::Disconnected = event {
            self.all_have_left();
        }
        let expected = self.second.take();
        if let Some(worker) = emit.worker {
            let is_second = expected == Some((worker, name));
            assert!(expected.is_none() || is_second, "{expected:?} should come");
            if level == Level::Worker && !matches!(event, Event::DetachedExit(_)) {
                self.second = Some((worker, name));
            } else {
                let alone = matches!(
                    event,
                    Event::Fork | Event::Message { .. } | Event::DetachedExit(_)
                );
                assert!(is_second || alone, "{name} at {level:?} without the other");
            }
            if self.detached.contains_key(&worker) {
                self.check_event_of_detached(level, worker, event);
            } else {
                self.check_event(level, worker, event);
            }
        } else {
            assert_eq!(expected, None, "should come first");
        }
        // What programs do in callbacks.
        if let Some((call, n)) = self.callback.take() {
            let worker = emit.worker.filter(|id| self.master.state(*id).is_some());
            self.call(call, worker, n);
        }
    }

    fn all_have_left(&mut self) {
        assert!(self.awaited, "nobody asked");
        assert!(self.master.worker_ids().next().is_none(), "someone is left");
        assert!(!self.processes.values().any(|p| p.alive), "someone lives");
        let is_left =
            |(handle, port): (&HandleId, &Port)| !port.unbound && !self.kept.contains(handle);
        let bound = self.ports.iter().any(is_left);
        assert!(!bound, "listener left");
        self.disconnected += 1;
        self.awaited = false;
        self.stop_by = None;
    }

    fn check_event(&mut self, level: Level, worker: WorkerId, event: &Event<()>) {
        let state = self.master.state(worker);
        let flag = self.master.exited_after_disconnect(worker);
        let connected = self.master.is_connected(worker);
        let process = self.processes.get_mut(&worker).expect(NOBODY);
        let life = match level {
            Level::Worker => &mut process.life[0],
            Level::Cluster => &mut process.life[1],
        };
        match event {
            Event::Setup | Event::Disconnected | Event::DetachedExit(_) => {
                unreachable!("of no worker")
            }
            Event::Fork => assert_eq!(*life, Life::Forked),
            Event::Online => {
                assert_eq!(*life, Life::Forked, "is online once");
                assert_eq!(state, Some(WorkerState::Online));
                *life = Life::Online;
            }
            Event::Listening(_) => {
                assert_eq!(*life, Life::Online);
                assert_eq!(state, Some(WorkerState::Listening));
            }
            Event::Message { bytes, fds: () } => {
                assert_eq!(*life, Life::Online);
                let number = number(bytes);
                let last = std::mem::replace(&mut process.received[0], number);
                assert!(process.liar || number == last + 1, "message {number}");
            }
            Event::Disconnect => {
                assert!(*life < Life::Disconnected, "disconnects once");
                assert_eq!(state, Some(WorkerState::Disconnected), "in the table");
                assert!(flag.is_some() && !connected);
                *life = Life::Disconnected;
            }
            Event::Exit(exit_report) => {
                assert_eq!(*life, Life::Disconnected, "disconnect comes before exit");
                assert_eq!(state, None, "no longer in the table");
                assert_eq!(Some(exit_report.status), process.status);
                *life = Life::Gone;
                self.referenced.remove(&worker);
            }
            Event::Error(_) => assert_ne!(*life, Life::Gone, "exit is the last"),
        }
    }

    fn check_event_of_detached(&mut self, level: Level, process: WorkerId, event: &Event<()>) {
        let state = self.detached[&process];
        assert_ne!(state, Detached::Gone, "exit is the last");
        let is_error = matches!(event, Event::Error(_));
        if let Event::DetachedExit(status) = event {
            assert_eq!((level, state), (Level::Worker, Detached::Reaped(*status)));
            self.detached.insert(process, Detached::Gone);
            assert_eq!(self.master.state(process), None);
        } else {
            assert!(is_error, "{event:?} of a process that is no worker");
        }
    }

    /// All detached processes exit.
    pub(super) fn end_detached(&mut self) {
        for process in self.detached.values_mut().filter(|process| process.runs()) {
            *process = Detached::Zombie(ExitStatus::from_raw(0));
        }
    }

    // The workers.

    pub(super) fn die(&mut self, worker: WorkerId, status: ExitStatus) {
        let process = self.process(worker);
        let shared = std::mem::take(&mut process.shared);
        let carries = |parcel: &Parcel<_>| match parcel.with {
            Attachment::Listener(handle) => Some(handle),
            Attachment::None | Attachment::Queue(_) | Attachment::Shard(..) => None,
        };
        let mut handles: Vec<_> = shared.into_values().collect();
        handles.extend(process.down.wire.iter().filter_map(carries));
        process.die(status);
        for handle in handles {
            self.forget_port(handle);
        }
    }

    /// A worker that has been stopped goes on.
    pub(super) fn go_on(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        process.stopped = false;
        if let Some(signal) = process.signal.take() {
            self.die(worker, ExitStatus::from_raw(signal.number()));
        }
    }

    /// The program returns from `main`: what it has to say is written before.
    pub(super) fn leave(&mut self, worker: WorkerId) {
        while !self.process(worker).shut && self.worker_writes(worker) == Written::Something {}
        self.die(worker, ExitStatus::from_raw(0));
    }

    /// One thing that a worker does: an action, a frame that it writes, an event that it delivers,
    /// or a frame that it reads.
    pub(super) fn worker_step(&mut self, worker: WorkerId, n: u8) {
        let now = self.now;
        let process = self.process(worker);
        if !process.runs() {
            return;
        }
        if process.rested_at.is_some_and(|time| time <= now) {
            process.rested_at = None;
            process.core.rested();
        } else if let Some(action) = process.actions.pop_front() {
            self.worker_acts(worker, action);
        } else if process.unflushed {
            self.worker_flushes(worker);
        } else if n % 4 != 3 && process.core.has_events() {
            let event = process.core.next_event().expect("has one");
            self.worker_delivers(worker, event);
        } else if n % 4 != 2 && process.worker_end && process.up.can_write() {
            process.unflushed = true;
        } else {
            self.worker_reads(worker);
        }
        self.worker_gathers(worker);
    }

    pub(super) fn worker_gathers(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        while let Some(action) = process.core.next_action() {
            process.actions.push_back(action);
        }
    }

    fn worker_acts(&mut self, worker: WorkerId, action: worker_core::Action) {
        let process = self.process(worker);
        match action {
            worker_core::Action::Send(frame) => {
                if process.closing {
                    process.up.lost = true;
                } else if process.worker_end {
                    process.up.queue(frame, Attachment::None);
                }
                process.unflushed = true;
            }
            worker_core::Action::CloseListener(listener) => {
                if let Some(handle) = process.shared.remove(&listener) {
                    self.forget_port(handle);
                } else if let Some(port) = process.own.remove(&listener) {
                    let served = process.core.is_connected() && process.core.is_served(listener);
                    let emptied = port.backlog.is_empty();
                    assert!(emptied || !served, "closed with clients in the backlog");
                }
            }
            worker_core::Action::AttachSynFilter(listener) => {
                if let Some(port) = process.own.get_mut(&listener) {
                    port.shut = true;
                }
            }
            worker_core::Action::CloseChannel => {
                let idle = process.held.is_empty();
                assert!(idle || process.careless, "leaves with connections in hand");
                process.closing = true;
                process.unflushed = true;
            }
        }
    }

    fn worker_flushes(&mut self, worker: WorkerId) {
        if self.process(worker).shut {
            self.process(worker).up.break_off();
        }
        if self.worker_writes(worker) == Written::Something {
            return;
        }
        let process = self.process(worker);
        process.unflushed = false;
        if process.up.outbox.is_empty() && process.closing && process.worker_end {
            process.shut = true;
            process.up.broken = true;
        }
    }

    fn worker_writes(&mut self, worker: WorkerId) -> Written {
        self.process(worker).up.write(|_| {})
    }

    fn worker_reads(&mut self, worker: WorkerId) {
        let now = self.now;
        let process = self.process(worker);
        if !process.worker_end {
            return self.cut_off(worker);
        }
        let Some(parcel) = process.down.wire.pop_front() else {
            if process.shut || !process.master_end {
                self.cut_off(worker);
            }
            return;
        };
        let frame = parcel.frame.expect("the master is never wrong");
        if parcel.is_robbed {
            process.rested_at = process.rested_at.or(Some(now + RETRY));
            if let ToWorker::Reply { request, result } = &frame {
                let handle = result.as_ref().expect("with a listener").handle;
                let outcome = process.core.listener_lost(*request, handle);
                assert!(process.liar || outcome.is_ok());
                return self.forget_port(handle);
            }
        }
        let handle = match parcel.with {
            Attachment::None => None,
            Attachment::Listener(handle)
            | Attachment::Queue(handle)
            | Attachment::Shard(handle, _) => Some(handle),
        };
        match process.core.frame(frame) {
            Ok(listener) => {
                if let (Some(listener), Some(handle)) = (listener, handle) {
                    process.shared.insert(listener, handle);
                }
            }
            Err(error) => {
                assert!(process.liar, "{error}");
                self.cut_off(worker);
            }
        }
        if let Some(handle) = handle {
            self.forget_port(handle);
        }
    }

    /// The worker finds its channel closed.
    fn cut_off(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        if process.core.is_connected() {
            process.close_end();
            process.core.channel_closed();
        }
    }

    fn worker_delivers(&mut self, worker: WorkerId, event: worker_core::Event) {
        let process = self.process(worker);
        match event {
            worker_core::Event::Look(listener) => self.accept_itself(worker, listener),
            worker_core::Event::Message(message) => {
                let number = number(message.bytes());
                let last = std::mem::replace(&mut process.received[1], number);
                assert_eq!(number, last + 1, "a message is missing");
            }
            worker_core::Event::Disconnect => {}
        }
    }

    /// The program has a connection in its hands.
    fn receive(&mut self, worker: WorkerId, client: Client, listener: ListenerId) {
        let process = self.processes.get_mut(&worker).expect("known");
        let number = client.client;
        process.held.push((client, listener));
        if let Some(most) = process.limits.get(&listener) {
            let held = process.held.iter().filter(|(_, from)| *from == listener);
            let allowed = held.count() <= *most || process.core.is_leaving();
            assert!(allowed, "more than the program wants");
        }
        let fate = &mut self.fates[number as usize];
        assert!(!fate.served, "client {number} served twice");
        fate.served = true;
        self.served += 1;
    }

    /// Takes from a queue, or accepts from a listener that the worker has a copy of or to itself.
    fn accept_itself(&mut self, worker: WorkerId, listener: ListenerId) {
        let process = self.processes.get_mut(&worker).expect("known");
        let core = &mut process.core;
        if core.leaves_to_others(listener) || core.is_datagram(listener) {
            return;
        }
        let has_queue = core.has_queue(listener);
        let client = match process.shared.get(&listener) {
            Some(_) if has_queue && self.failing.remove(&Failure::Receive) => {
                core.descriptors_lack();
                process.rested_at = process.rested_at.or(Some(self.now + RETRY));
                return;
            }
            Some(handle) if has_queue => {
                let queue = self.queues.get_mut(&(*handle, worker));
                let first = queue.and_then(VecDeque::pop_front);
                first.map(|first| first.connection)
            }
            Some(handle) => {
                let port = self.ports.get_mut(handle);
                let client = port.and_then(|port| port.backlog.pop_front());
                client.map(|client| Connection::new(client, &self.closed))
            }
            None => {
                let Some(port) = process.own.get_mut(&listener) else {
                    return;
                };
                let client = port.backlog.pop_front();
                client.map(|client| Connection::new(client, &self.closed))
            }
        };
        match client {
            Some(client) => {
                core.connection_opened(listener);
                // The number of a connection's descriptor tells how many there are.
                match (has_queue, process.scarce) {
                    (false, _) => {}
                    (true, true) => core.descriptors_run_out(),
                    (true, false) => core.descriptors_suffice(),
                }
                let is_ending = core.is_ending(listener);
                self.receive(worker, client, listener);
                if is_ending {
                    self.process(worker).core.look(listener);
                }
            }
            None if core.is_ending(listener) => core.close(listener),
            None => core.found_empty(listener),
        }
    }

    /// The program of one worker does something, when it has nothing else to do.
    pub(super) fn program_step(&mut self, worker: WorkerId, deed: Deed, n: u8) {
        let process = self.process(worker);
        if !process.runs() {
            return;
        }
        if !process.actions.is_empty() || process.unflushed {
            return self.worker_step(worker, n);
        }
        if process.accepting.is_some() {
            self.look(worker);
        } else {
            self.act_for_program(worker, deed, n);
        }
        self.worker_gathers(worker);
    }

    /// The program looks whether `accept` has something for it.
    fn look(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        let Some(listener) = process.accepting else {
            return;
        };
        let (ended, events) = (process.core.has_ended(listener), process.core.has_events());
        if ended && !events {
            process.accepting = None;
        } else {
            let held = process.held.len();
            self.accept_itself(worker, listener);
            let process = self.process(worker);
            if process.held.len() > held {
                process.accepting = None;
            }
        }
    }

    #[allow(clippy::wildcard_enum_match_arm)]
    fn act_for_program(&mut self, worker: WorkerId, deed: Deed, n: u8) {
        let process = self.process(worker);
        let listener = nth(process.listeners.iter().copied(), n);
        let has_room = process.listeners.len() < MOST_LISTENERS;
        match (deed, listener) {
            (Deed::Listen, _) if has_room => {
                let listener = process.core.listen(endpoint(n), BindFlags::default());
                process.listeners.push(listener);
                // Whether it wants only so many.
                if let limit @ 0..=2 = n / 5 % 8 {
                    process.limits.insert(listener, limit.into());
                    process.core.set_most(listener, Some(limit.into()));
                }
            }
            (Deed::ListenAlone, _) if has_room => {
                let listener = process.core.listen_alone(Kind::Tcp);
                process.listeners.push(listener);
                if !process.core.is_leaving() {
                    let kind = Some(Kind::Tcp);
                    let port = Port {
                        kind,
                        ..Port::default()
                    };
                    process.own.insert(listener, port);
                }
            }
            (Deed::Accept, Some(listener)) if !process.core.is_served(listener) => {
                process.accepting = Some(listener);
                self.look(worker);
            }
            (Deed::Accept, Some(listener)) => self.accept_itself(worker, listener),
            (Deed::Serve, Some(listener)) => process.core.serve(listener),
            (Deed::Answer, Some(listener)) => match process.core.listen_result(listener) {
                Listen::Pending => {}
                Listen::Done(_) => process.core.listening(listener),
                Listen::Failed(_) => {
                    process.core.forget(listener);
                    process.listeners.retain(|l| *l != listener);
                }
            },
            (Deed::Close, _) => self.close_connection(worker, n),
            (Deed::Forget, Some(listener)) => {
                process.careless = true;
                process.core.forget(listener);
                process.listeners.retain(|l| *l != listener);
            }
            (Deed::Limit, Some(listener)) => {
                // From now on there may be more.
                process.limits.remove(&listener);
                match n % 4 {
                    0 => process.core.drop_beyond(listener),
                    1 => process.core.set_most(listener, None),
                    most => process.core.set_most(listener, Some(u64::from(most) - 2)),
                }
            }
            (Deed::Wait, _) => {
                process.core.wait_for_events();
                let over = process.core.is_finished() && !process.core.has_events();
                if over && process.up.outbox.is_empty() && process.actions.is_empty() {
                    self.leave(worker);
                }
            }
            (Deed::Scarce, _) => process.scarce = n % 2 == 0,
            (Deed::Send, _) if process.worker_end && !process.closing && !process.up.broken => {
                process.sent[0] += 1;
                let message = process.sent[0].to_le_bytes().to_vec();
                process
                    .up
                    .queue(ToMaster::Message(message), Attachment::None);
                process.unflushed = true;
            }
            (Deed::Leave, _) => process.core.disconnect(),
            (Deed::Kill, _) => {
                process.careless = true;
                process.core.kill();
            }
            (Deed::CloseChannel, _) => {
                process.careless = true;
                process.core.close_channel();
            }
            (Deed::Exit, _) => self.die(worker, ExitStatus::from_raw(i32::from(n) << 8)),
            _ => {}
        }
    }

    pub(super) fn close_connection(&mut self, worker: WorkerId, n: u8) {
        let process = self.process(worker);
        if let Some(at) = usize::from(n).checked_rem(process.held.len()) {
            let (client, listener) = process.held.swap_remove(at);
            drop(client);
            process.core.connection_closed(Some(listener));
        }
    }

    /// Something that no worker of ours would send.
    fn lie(&mut self, worker: WorkerId, lie: Lie, n: u8) {
        let number = u64::from(n / 8);
        let handle = HandleId(self.last_port.0.saturating_sub(u32::from(n % 8) % 4));
        let frame = match lie {
            Lie::Garbled => Err(FrameError::State("garbled")),
            Lie::Online => Ok(ToMaster::Online),
            Lie::Listen => {
                let key = HandleKey {
                    endpoint: endpoint(n),
                    index: u32::from(n / 64),
                };
                Ok(ToMaster::Listen {
                    request: u32::from(n % 4),
                    key,
                    flags: BindFlags::default(),
                })
            }
            Lie::Listening => Ok(ToMaster::Listening { handle }),
            Lie::Ready => Ok(ToMaster::Idle {
                handle,
                taken: number % 4,
                open: u32::from(n),
            }),
            Lie::Take => return self.take_in_vain(worker, handle),
            Lie::Close => Ok(ToMaster::Release { handle }),
            Lie::Revoke => Ok(ToMaster::Pause { handle }),
            Lie::Leaving => Ok(ToMaster::DisconnectRequest),
            Lie::Message => Ok(ToMaster::Message(vec![n; 4])),
        };
        self.say(worker, frame);
    }

    /// The worker takes what it was given, and closes it.
    fn take_in_vain(&mut self, worker: WorkerId, handle: HandleId) {
        self.process(worker).liar = true;
        let queue = self.queues.get_mut(&(handle, worker));
        if let Some(first) = queue.and_then(VecDeque::pop_front) {
            self.fates[first.connection.client as usize].served = true;
        }
    }

    pub(super) fn say(&mut self, worker: WorkerId, frame: Result<ToMaster, FrameError>) {
        let process = self.process(worker);
        if !process.worker_end || process.shut {
            return;
        }
        process.liar = true;
        let parcel = Parcel::new(frame, Attachment::None);
        self.process(worker).up.wire.push_back(parcel);
    }

    // What is promised.

    pub(super) fn check(&mut self) {
        self.check_closed();
        assert!(self.master.is_index_consistent(), "the index is wrong");
        let ledger = self.master.ledger();
        assert_eq!(ledger.in_hand(), self.master.in_hand(), "{ledger:?}");
        let gone = ledger.dropped + ledger.closed_by_peer;
        assert!(self.lost <= gone, "a client is lost: {ledger:?}");
        let waits = self.awaited || !self.referenced.is_empty();
        assert_eq!(self.master.has_workers(), waits, "{:?}", self.referenced);
        let detached = self.detached.keys();
        for process in detached {
            assert!(!self.master.is_worker(*process), "in the table of workers");
        }
        if self.actions.is_empty() {
            self.check_at_rest();
        }
    }

    /// Somebody answers for each connection that is closed.
    fn check_closed(&mut self) {
        while let Some(client) = self.closed.borrow_mut().pop() {
            self.lost += u64::from(!self.fates[client as usize].served);
        }
    }

    /// What holds when the master has done what it decided.
    fn check_at_rest(&mut self) {
        assert!(!self.master.has_stuck_connection(), "someone waits");
        for (handle, port) in &self.ports {
            assert_eq!(self.master.is_bound(*handle), !port.unbound);
        }
        for (worker, process) in &self.processes {
            if !process.alive {
                continue;
            }
            let by = earlier(process.deadline, self.stop_by);
            if let Some(by) = by {
                assert!(by >= self.ticked, "worker {worker} outlives its deadline");
                let wakes = self.master.deadline().is_some_and(|time| time <= by);
                assert!(wakes, "nobody wakes for the deadline of worker {worker}");
            }
        }
    }
}

fn name(event: &Event<()>) -> &'static str {
    match event {
        Event::Setup => "setup",
        Event::Fork => "fork",
        Event::Online => "online",
        Event::Listening(_) => "listening",
        Event::Message { .. } => "message",
        Event::Disconnect => "disconnect",
        Event::Exit(_) => "exit",
        Event::DetachedExit(_) => "exit of a detached process",
        Event::Error(_) => "error",
        Event::Disconnected => "disconnected",
    }
}

fn number(bytes: &[u8]) -> u32 {
    let bytes = bytes.try_into();
    u32::from_le_bytes(bytes.expect("four bytes"))
}
