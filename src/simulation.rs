//! A kernel without a system: processes, channels, listeners and clients as plain data, driven
//! through random schedules from a seed, with a virtual clock.
//!
//! Both cores run as they are. After every step the promises of the crate are checked; a failure
//! names the seed, and `CLUSTER_SIMULATION_SEED=N cargo test simulation` runs that schedule alone.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::time::Duration;

use fastrand::Rng;

use crate::endpoint::{BindFlags, Endpoint, Kind, Place};
use crate::event::{Event, Level, WorkerState};
use crate::frame::{HandleId, HandleKey, ToMaster, ToWorker};
use crate::ledger::Ledger;
use crate::master_core::{Action, MasterCore, With};
use crate::message::Message;
use crate::settings::SchedulingPolicy;
use crate::signal::Signal;
use crate::worker_core::{self, Listen, ListenerId, WorkerCore};
use crate::worker_id::WorkerId;

const SCHEDULES: u64 = 1000;
const STEPS: u32 = 1000;
const MOST_WORKERS: usize = 5;

/// A connection, by number.
type Client = u32;

/// One end of a channel: what the other end has written and this one has not read.
type Wire<F> = VecDeque<(F, With<Client>)>;

#[derive(Debug)]
struct Process {
    core: WorkerCore<Client>,
    alive: bool,
    /// Set when the master may learn of the death.
    status: Option<ExitStatus>,
    /// Whether the program leaves when its part is over, as programs should.
    polite: bool,
    /// It has sent frames of its own making: its word means nothing any more.
    liar: bool,
    listeners: Vec<ListenerId>,
    shared: BTreeMap<ListenerId, HandleId>,
    held: Vec<(Client, ListenerId)>,
    /// How many the program wants at most, where it has said so before the first.
    limits: BTreeMap<ListenerId, usize>,
    /// The program waits in `accept`, and does nothing else meanwhile.
    accepting: Option<ListenerId>,
    to_master: Wire<ToMaster>,
    to_worker: Wire<ToWorker>,
    /// The master's end is open.
    master_end: bool,
    /// The master has shut its end: the worker can write nothing more.
    shut: bool,
    /// The worker's end is open.
    worker_end: bool,
}

impl Process {
    fn new() -> Self {
        Self {
            core: WorkerCore::new(),
            alive: true,
            status: None,
            polite: true,
            liar: false,
            listeners: Vec::new(),
            shared: BTreeMap::new(),
            held: Vec::new(),
            limits: BTreeMap::new(),
            accepting: None,
            to_master: Wire::new(),
            to_worker: Wire::new(),
            master_end: true,
            shut: false,
            worker_end: true,
        }
    }
}

#[derive(Debug, Default)]
struct Port {
    backlog: VecDeque<Client>,
    shut: bool,
    watched: bool,
    shared: bool,
    kind: Option<Kind>,
    /// The master has closed its descriptor; a worker's copy keeps a shared one open.
    unbound: bool,
}

/// What was delivered for one worker, in order.
#[derive(Debug, Default)]
struct Seen(Vec<(Level, &'static str)>);

struct World {
    rng: Rng,
    now: Duration,
    master: MasterCore<Client>,
    processes: BTreeMap<WorkerId, Process>,
    ports: BTreeMap<HandleId, Port>,
    taken: BTreeSet<Endpoint>,
    seen: BTreeMap<WorkerId, Seen>,
    clients: u32,
    served: BTreeSet<Client>,
    accepting_fails: bool,
    awaited: u32,
    disconnected: u32,
    policy: SchedulingPolicy,
}

/// What a worker may ask for: any port, a port, a path, a descriptor of the master's, UDP.
fn endpoint(n: u16) -> Endpoint {
    let ip = |port| Place::Ip(SocketAddr::from(([127, 0, 0, 1], port)));
    match n {
        0 | 1 => Endpoint::new(Kind::Tcp, ip(n)),
        2 => Endpoint::new(Kind::Unix, Place::Path("/path".into())),
        3 => Endpoint::new(Kind::Tcp, Place::Fd(3)),
        _ => Endpoint::new(Kind::Udp, ip(0)),
    }
}

const ENDPOINTS: u16 = 5;

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let policy = if rng.u8(0..4) == 0 {
            SchedulingPolicy::Shared
        } else {
            SchedulingPolicy::RoundRobin
        };
        Self {
            rng,
            now: Duration::ZERO,
            master: MasterCore::new(policy),
            processes: BTreeMap::new(),
            ports: BTreeMap::new(),
            taken: BTreeSet::new(),
            seen: BTreeMap::new(),
            clients: 0,
            served: BTreeSet::new(),
            accepting_fails: false,
            awaited: 0,
            disconnected: 0,
            policy,
        }
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        self.rng.choice(from).cloned()
    }

    fn some_process(&mut self, which: impl Fn(&Process) -> bool) -> Option<WorkerId> {
        let ids: Vec<_> = self
            .processes
            .iter()
            .filter(|(_, p)| which(p))
            .map(|(id, _)| *id)
            .collect();
        self.pick(&ids)
    }

    // The master's side.

    fn fork(&mut self) {
        if self.processes.values().filter(|p| p.alive).count() >= MOST_WORKERS {
            return;
        }
        let announced = self.master.next_worker_id();
        let id = self.master.forked();
        assert_eq!(announced, id);
        let mut process = Process::new();
        process.polite = self.rng.u8(0..8) > 0;
        self.processes.insert(id, process);
        self.seen.insert(id, Seen::default());
        self.act_for_worker(id);
    }

    /// Carries out what the master's core decided, then lets the program see its events.
    fn settle(&mut self) {
        loop {
            while let Some(action) = self.master.next_action() {
                self.act(action);
            }
            let Some(emit) = self.master.next_event() else {
                break;
            };
            self.deliver(emit.level, emit.worker, &emit.event);
        }
    }

    fn act(&mut self, action: Action<Client>) {
        match action {
            Action::Send {
                worker,
                frame,
                with,
            } => {
                let process = self.processes.get_mut(&worker).expect("send to nobody");
                assert!(process.master_end, "send on a closed channel");
                process.to_worker.push_back((frame, with));
            }
            Action::Bind {
                handle, endpoint, ..
            } => {
                // Port 0 and what is open already always succeed; the others fail now and then.
                let may_fail = [self::endpoint(1), self::endpoint(2)].contains(&endpoint);
                let fails = self.taken.contains(&endpoint) || self.rng.u8(0..10) == 0;
                let result = if may_fail && fails {
                    Err(98)
                } else {
                    let port = Port {
                        shared: self.policy == SchedulingPolicy::Shared
                            || endpoint.kind == Kind::Udp,
                        kind: Some(endpoint.kind),
                        ..Port::default()
                    };
                    assert!(self.ports.insert(handle, port).is_none(), "bound twice");
                    if may_fail {
                        self.taken.insert(endpoint.clone());
                    }
                    Ok(endpoint.address())
                };
                self.master.bound(handle, result);
            }
            Action::Watch { handle } => self.port(handle).watched = true,
            Action::Unwatch { handle } => self.port(handle).watched = false,
            Action::RemoveFile { handle } => {
                self.port(handle).shut = true;
                self.taken.clear();
            }
            Action::ShutDoor { handle } => self.port(handle).shut = true,
            Action::OpenDoor { handle } => {
                let port = self.port(handle);
                assert_eq!(port.kind, Some(Kind::Tcp), "its file is gone");
                port.shut = false;
            }
            Action::Unbind { handle } => {
                let port = self.port(handle);
                port.unbound = true;
                port.watched = false;
                if !port.shared {
                    port.backlog.clear();
                }
                // In this world a listener's address is known by its number alone.
                self.taken.clear();
            }
            Action::Accept { handle, at_most } => {
                if std::mem::take(&mut self.accepting_fails) {
                    let error = io::Error::from_raw_os_error(24);
                    return self.master.accept_failed(handle, error);
                }
                for _ in 0..at_most {
                    let Some(client) = self.port(handle).backlog.pop_front() else {
                        return self.master.drained(handle);
                    };
                    self.master.accepted(handle, client);
                }
                self.master.accept_done(handle);
            }
            Action::CloseChannel { worker } => {
                let process = self.processes.get_mut(&worker).expect("close of nobody");
                process.shut = true;
                // As the shell does: everything that was written, before anything else is done.
                while self.master_reads(worker) {}
                self.master.channel_closed(worker);
                let process = self.processes.get_mut(&worker).expect("known");
                process.master_end = false;
            }
            Action::DiscardChannel { worker } => {
                let process = self.processes.get_mut(&worker).expect("close of nobody");
                process.master_end = false;
                process.shut = true;
                process.to_master.clear();
            }
            Action::Signal { worker, signal } => {
                let process = self.processes.get_mut(&worker).expect("signal to nobody");
                assert!(
                    self.master.exit_status(worker).is_none(),
                    "signal to a reaped pid"
                );
                if process.alive {
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

    fn deliver(&mut self, level: Level, worker: Option<WorkerId>, event: &Event) {
        let name = match event {
            Event::Setup => "setup",
            Event::Fork => "fork",
            Event::Online => "online",
            Event::Listening(_) => "listening",
            Event::Message(_) => "message",
            Event::Disconnect => "disconnect",
            Event::Exit(_) => "exit",
            Event::Error(_) => "error",
            Event::Disconnected => {
                assert!(self.awaited > 0, "nobody asked");
                assert!(!self.master.has_workers(), "someone is left");
                assert!(
                    self.ports.values().all(|port| port.unbound),
                    "listener left"
                );
                self.disconnected += 1;
                self.awaited = 0;
                return;
            }
        };
        let Some(worker) = worker else {
            return;
        };
        let state = self.master.state(worker);
        let flag = self.master.exited_after_disconnect(worker);
        match event {
            Event::Online => assert_eq!(state, Some(WorkerState::Online)),
            Event::Listening(_) => assert_eq!(state, Some(WorkerState::Listening)),
            Event::Disconnect => {
                assert_eq!(state, Some(WorkerState::Disconnected), "in the table");
                assert!(flag.is_some());
                assert!(!self.master.is_connected(worker));
            }
            Event::Exit(departure) => {
                assert_eq!(state, None, "no longer in the table");
                let seen = &self.seen[&worker].0;
                let before = seen.iter().filter(|(_, name)| *name == "disconnect");
                assert_eq!(before.count(), 2, "disconnect comes before exit");
                assert_eq!(Some(departure.status), self.processes[&worker].status);
            }
            Event::Setup
            | Event::Fork
            | Event::Message(_)
            | Event::Error(_)
            | Event::Disconnected => {}
        }
        let seen = &mut self.seen.get_mut(&worker).expect("known").0;
        seen.push((level, name));
        let (first, second) = match name {
            "message" => (Level::Cluster, Level::Worker),
            _ => (Level::Worker, Level::Cluster),
        };
        if name != "fork" && level == second {
            let before = seen.len().checked_sub(2).map(|at| seen[at]);
            assert_eq!(before, Some((first, name)), "wrong order of levels");
        }
        // What programs do in callbacks.
        match (level, name, self.rng.u8(0..16)) {
            (Level::Cluster, "exit", 0..=7) => self.fork(),
            (Level::Cluster, "online" | "listening", 0) => self.master.disconnect(worker),
            (Level::Cluster, "disconnect", 0) => self.master.kill(worker, Signal::TERM),
            (Level::Worker, "message", 0) => self.master.close_channel(worker),
            _ => {}
        }
    }

    /// Reads one frame of a worker.
    fn master_reads(&mut self, worker: WorkerId) -> bool {
        let Some(process) = self.processes.get_mut(&worker) else {
            return false;
        };
        if !process.master_end {
            return false;
        }
        let Some((frame, _)) = process.to_master.pop_front() else {
            return false;
        };
        let is_message = matches!(frame, ToMaster::Message(_));
        let message = is_message.then(|| Message::new(Vec::new(), Vec::new()));
        self.master.frame(worker, frame, message);
        true
    }

    // The workers' side.

    fn die(&mut self, worker: WorkerId, status: ExitStatus) {
        let process = self.processes.get_mut(&worker).expect("known");
        process.alive = false;
        process.status = Some(status);
        process.worker_end = false;
        process.to_worker.clear();
        process.shared.clear();
        process.held.clear();
        process.listeners.clear();
    }

    /// Carries out what a worker's core decided, and hands over its events.
    fn act_for_worker(&mut self, worker: WorkerId) {
        loop {
            let process = self.processes.get_mut(&worker).expect("known");
            if !process.alive {
                return;
            }
            if let Some(listener) = process.accepting {
                process.core.want(listener);
            }
            if let Some(action) = process.core.next_action() {
                match action {
                    worker_core::Action::Send(frame) => {
                        let open = process.worker_end || process.shut;
                        assert!(open, "worker sends on a closed channel");
                        if process.shut {
                            process.worker_end = false;
                            process.to_worker.clear();
                            process.core.channel_closed();
                        } else {
                            process.to_master.push_back((frame, With::Nothing));
                        }
                    }
                    worker_core::Action::CloseListener(listener) => {
                        process.shared.remove(&listener);
                    }
                    worker_core::Action::ShutDoor(_) => unreachable!("nobody listens alone here"),
                    worker_core::Action::CloseChannel => {
                        process.worker_end = false;
                        process.to_worker.clear();
                        process.core.channel_closed();
                    }
                }
                continue;
            }
            process.core.confirmed();
            match process.core.next_event() {
                None => {
                    if !self.accepts(worker) {
                        break;
                    }
                }
                Some(worker_core::Event::Connection(listener, client)) => {
                    process.core.delivered(listener);
                    self.receive(worker, client, listener);
                }
                Some(worker_core::Event::Drop(listener, client)) => {
                    process.core.delivered(listener);
                    let most = process.limits.get(&listener);
                    let held = process.held.iter().filter(|(_, from)| *from == listener);
                    assert!(most.is_none_or(|most| held.count() >= *most), "room enough");
                    self.receive(worker, client, listener);
                }
                Some(worker_core::Event::AcceptRest(listener)) => {
                    if let Some(handle) = process.shared.get(&listener).copied() {
                        self.accept_shared(worker, listener, handle);
                    }
                }
                Some(worker_core::Event::Message(_) | worker_core::Event::Disconnect) => {}
            }
        }
    }

    /// The program looks whether `accept` has something for it. Returns whether that changed
    /// anything.
    fn accepts(&mut self, worker: WorkerId) -> bool {
        let process = self.processes.get_mut(&worker).expect("known");
        let Some(listener) = process.accepting else {
            return false;
        };
        if let Some(client) = process.core.arrived(listener) {
            process.accepting = None;
            self.receive(worker, client, listener);
            return true;
        }
        if process.core.has_ended(listener) {
            process.accepting = None;
        }
        false
    }

    /// The program has a connection in its hands.
    fn receive(&mut self, worker: WorkerId, client: Client, listener: ListenerId) {
        let process = self.processes.get_mut(&worker).expect("known");
        process.held.push((client, listener));
        if let Some(most) = process.limits.get(&listener) {
            let held = process.held.iter().filter(|(_, from)| *from == listener);
            assert!(
                held.count() <= *most || process.core.is_leaving(),
                "more than the program wants"
            );
        }
        if !process.liar {
            assert!(self.served.insert(client), "client {client} served twice");
        }
    }

    fn worker_reads(&mut self, worker: WorkerId) {
        let process = self.processes.get_mut(&worker).expect("known");
        let Some((frame, with)) = process.to_worker.pop_front() else {
            return;
        };
        if !process.worker_end {
            return; // Written after the worker had closed.
        }
        let is_message = matches!(frame, ToWorker::Message(_));
        let message = is_message.then(|| Message::new(Vec::new(), Vec::new()));
        let (connection, handle) = match with {
            With::Nothing => (None, None),
            With::Connection(client) => (Some(client), None),
            With::Listener(handle) => (None, Some(handle)),
        };
        let outcome = process.core.frame(frame, connection, message);
        let listener = match outcome {
            Err(_) if process.liar => None,
            outcome => outcome.expect("the master is never wrong"),
        };
        if let (Some(listener), Some(handle)) = (listener, handle) {
            process.shared.insert(listener, handle);
        }
        self.act_for_worker(worker);
    }

    /// The program of one worker does something.
    fn program(&mut self, worker: WorkerId) {
        let what = self.rng.u8(0..40);
        let port = self.rng.u16(0..ENDPOINTS);
        let choice = self.rng.usize(0..64);
        let process = self.processes.get_mut(&worker).expect("known");
        if process.accepting.is_some() {
            return self.act_for_worker(worker);
        }
        let listener = process
            .listeners
            .get(choice % process.listeners.len().max(1))
            .copied();
        match (what, listener) {
            (0..=3, _) if process.listeners.len() < 3 => {
                let listener = process.core.listen(endpoint(port), BindFlags::default());
                process.listeners.push(listener);
                if choice % 4 == 0 {
                    process.limits.insert(listener, choice % 3);
                    process.core.set_most(listener, Some(choice as u64 % 3));
                }
            }
            (4..=18, Some(listener)) => {
                if let Some(handle) = process.shared.get(&listener).copied() {
                    self.accept_shared(worker, listener, handle);
                } else {
                    process.accepting = Some(listener);
                }
            }
            (19, Some(listener)) => process.core.serve(listener),
            (20..=21, Some(listener)) => match process.core.listen_result(listener) {
                Listen::Pending => {}
                Listen::Done(_) => process.core.listening(listener),
                Listen::Failed(_) => {
                    process.core.forget(listener);
                    process.listeners.retain(|l| *l != listener);
                }
            },
            (22..=32, _) if !process.held.is_empty() => {
                let at = choice % process.held.len();
                let (_, listener) = process.held.swap_remove(at);
                process.core.connection_closed(Some(listener));
            }
            (33, Some(listener)) => {
                process.core.forget(listener);
                process.listeners.retain(|l| *l != listener);
            }
            (34, _) => process.core.wait_for_events(),
            (35, _) if process.worker_end && !process.shut => {
                let message = ToMaster::Message(b"hello".to_vec());
                process.to_master.push_back((message, With::Nothing));
            }
            (36, Some(listener)) if choice >= 60 => {
                // From now on there may be more.
                process.limits.remove(&listener);
                match choice {
                    60 => process.core.drop_beyond(listener),
                    61 => process.core.set_most(listener, None),
                    _ => process.core.set_most(listener, Some(1)),
                }
            }
            (36, _) if choice == 3 => process.core.close_channel(),
            (36, _) if choice == 0 => process.core.disconnect(),
            (36, _) if choice == 1 => process.core.kill(),
            (37, _) if choice == 2 => self.die(worker, ExitStatus::from_raw(42 << 8)),
            _ => {}
        }
        self.act_for_worker(worker);
        let process = self.processes.get_mut(&worker).expect("known");
        if process.alive && process.polite && process.core.is_finished() {
            self.die(worker, ExitStatus::from_raw(0));
        }
    }

    fn accept_shared(&mut self, worker: WorkerId, listener: ListenerId, handle: HandleId) {
        let process = &self.processes[&worker];
        if process.core.leaves_to_others(listener) || process.core.is_datagram(listener) {
            return;
        }
        let port = self.ports.get_mut(&handle).expect("known");
        let client = port.backlog.pop_front();
        let core = &mut self.processes.get_mut(&worker).expect("known").core;
        match client {
            Some(client) => {
                core.connection_opened(listener);
                self.receive(worker, client, listener);
            }
            None if core.is_ending(listener) => core.close(listener),
            None => {}
        }
    }

    /// Something that no worker of ours would send.
    fn garbage(&mut self, worker: WorkerId) {
        let handle = HandleId(self.rng.u32(0..4));
        let number = self.rng.u64(0..4);
        let frame = match self.rng.u8(0..8) {
            0 => ToMaster::Online,
            1 => ToMaster::Listen {
                request: 1,
                key: HandleKey {
                    endpoint: endpoint(u16::try_from(number).unwrap_or(0)),
                    index: 0,
                },
                flags: BindFlags::default(),
            },
            2 => ToMaster::Listening { handle },
            3 => ToMaster::Ready {
                handle,
                credits: self.rng.u32(0..2000),
                taken: number,
            },
            4 => ToMaster::Refused { handle, number },
            5 => ToMaster::Close { handle },
            6 => ToMaster::Revoke { handle },
            _ => ToMaster::Leaving,
        };
        let process = self.processes.get_mut(&worker).expect("known");
        if process.worker_end && !process.shut {
            process.liar = true;
            process.to_master.push_back((frame, With::Nothing));
        }
    }

    // Time and chance.

    fn step(&mut self, hostile: bool) {
        match self.rng.u8(0..100) {
            0..=2 => self.fork(),
            3..=17 => {
                let takes = |p: &Port| !p.unbound && !p.shut && p.kind != Some(Kind::Udp);
                let open = self.ports.iter().filter(|(_, p)| takes(p));
                let open: Vec<_> = open.map(|(id, _)| *id).collect();
                if let Some(handle) = self.pick(&open) {
                    self.clients += 1;
                    let client = self.clients;
                    self.port(handle).backlog.push_back(client);
                }
            }
            18..=37 => {
                let reads = |p: &Process| p.alive && !p.to_worker.is_empty();
                if let Some(worker) = self.some_process(reads) {
                    self.worker_reads(worker);
                }
            }
            38..=57 => {
                if let Some(worker) = self.some_process(|p| !p.to_master.is_empty()) {
                    self.master_reads(worker);
                }
            }
            58..=77 => {
                if let Some(worker) = self.some_process(|p| p.alive) {
                    self.program(worker);
                }
            }
            78..=83 => {
                let watched = |p: &&Port| p.watched && !p.backlog.is_empty();
                let ready: Vec<_> = self
                    .ports
                    .iter()
                    .filter(|(_, p)| watched(p))
                    .map(|(id, _)| *id)
                    .collect();
                if let Some(handle) = self.pick(&ready) {
                    self.master.readable(handle);
                }
            }
            84..=87 => self.notice_eof(),
            88..=91 => self.notice_exit(),
            92..=94 => {
                self.now += Duration::from_millis(self.rng.u64(0..20));
                self.master.tick(self.now);
            }
            95 => {
                let parity = self.rng.u32(0..2);
                self.master.sweep(|client| client % 2 == parity);
            }
            96 if self.rng.u8(0..4) == 0 => {
                if let Some(worker) = self.some_process(|p| p.alive) {
                    self.die(worker, ExitStatus::from_raw(9));
                }
            }
            97 => self.accepting_fails = self.rng.bool(),
            98 => {
                if let Some(worker) = self.some_process(|_| true) {
                    match self.rng.u8(0..24) {
                        0..=2 => self.master.disconnect(worker),
                        3..=4 => self.master.kill(worker, Signal::TERM),
                        5 => self.master.signal(worker, Signal::KILL),
                        6 => {
                            self.awaited += 1;
                            self.master.disconnect_all(true);
                        }
                        7 if hostile => self.garbage(worker),
                        _ => {}
                    }
                }
            }
            _ => self.wake_worker_without_master(),
        }
        self.settle();
        self.check(hostile);
    }

    /// A worker whose master's end is closed reads end-of-file.
    fn wake_worker_without_master(&mut self) {
        let cut = |p: &Process| p.alive && p.worker_end && !p.master_end;
        if let Some(worker) = self.some_process(cut) {
            let process = self.processes.get_mut(&worker).expect("known");
            process.worker_end = false;
            process.core.channel_closed();
            self.act_for_worker(worker);
        }
    }

    fn notice_eof(&mut self) {
        let eof = |p: &Process| p.master_end && !p.worker_end && p.to_master.is_empty();
        if let Some(worker) = self.some_process(eof) {
            self.master.channel_closed(worker);
            let process = self.processes.get_mut(&worker).expect("known");
            process.master_end = false;
        }
    }

    fn notice_exit(&mut self) {
        let master = &self.master;
        let dead = self.processes.iter().filter(|(_, p)| !p.alive);
        let unreaped = dead
            .filter(|(id, _)| master.state(**id).is_some() && master.exit_status(**id).is_none());
        let ids: Vec<_> = unreaped.map(|(id, p)| (*id, p.status)).collect();
        if let Some((worker, Some(status))) = self.pick(&ids) {
            self.master.exited(worker, status);
        }
    }

    fn check(&self, hostile: bool) {
        let ledger = self.master.ledger();
        assert_eq!(ledger.in_hand(), self.master.in_hand(), "{ledger:?}");
        assert!(!self.master.someone_waits_in_vain(), "someone waits");
        for (handle, port) in &self.ports {
            assert_eq!(self.master.is_bound(*handle), !port.unbound);
        }
        if !hostile {
            assert!(ledger.taken <= self.served.len() as u64);
        }
    }

    /// Lets everything end, and checks the totals.
    fn finish(&mut self) {
        self.awaited += 1;
        self.disconnected = 0;
        self.master.disconnect_all(true);
        self.settle();
        for id in self.processes.keys().copied().collect::<Vec<_>>() {
            if self.processes[&id].alive {
                self.die(id, ExitStatus::from_raw(9));
            }
        }
        for _ in 0..10_000 {
            if !self.master.has_workers() {
                break;
            }
            // Callbacks fork now and then: whoever is new dies too.
            if let Some(worker) = self.some_process(|p| p.alive) {
                self.die(worker, ExitStatus::from_raw(9));
            }
            self.notice_exit();
            self.notice_eof();
            self.settle();
            self.check(true);
        }
        assert!(!self.master.has_workers(), "someone never left");
        assert_eq!(self.disconnected, 1, "the callback of disconnect");
        assert_eq!(self.master.ledger().in_hand(), 0);
        for (worker, seen) in &self.seen {
            for level in [Level::Worker, Level::Cluster] {
                for name in ["disconnect", "exit"] {
                    let times = seen.0.iter().filter(|s| **s == (level, name)).count();
                    assert_eq!(times, 1, "{name} of worker {worker}: {:?}", seen.0);
                }
            }
        }
    }
}

/// Returns where the connections went.
fn schedule(seed: u64) -> Ledger {
    let mut world = World::new(seed);
    // Half of the schedules are without liars: only there is a `taken` proof of anything.
    let hostile = world.rng.bool();
    for _ in 0..STEPS {
        world.step(hostile);
    }
    world.finish();
    world.master.ledger()
}

#[test]
fn a_million_steps() {
    let seed = std::env::var("CLUSTER_SIMULATION_SEED").ok();
    let seeds = match seed.map(|seed| seed.parse().expect("a number")) {
        Some(seed) => seed..seed + 1,
        None => 0..SCHEDULES,
    };
    let all = seeds == (0..SCHEDULES);
    let mut total = Ledger::default();
    for seed in seeds {
        match std::panic::catch_unwind(|| schedule(seed)) {
            Ok(ledger) => {
                total.taken += ledger.taken;
                total.closed_by_peer += ledger.closed_by_peer;
                total.dropped += ledger.dropped;
            }
            Err(panic) => {
                println!("failing schedule: CLUSTER_SIMULATION_SEED={seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    // The schedules are worth something only if they reach all of it.
    println!("{total:?}");
    assert!(!all || total.taken > 10_000 && total.closed_by_peer > 20 && total.dropped > 300);
}

impl World {
    /// One step of a program that serves until its listener ends, and then ends itself.
    fn serve(&mut self, worker: WorkerId) {
        let process = self.processes.get_mut(&worker).expect("known");
        let Some(&listener) = process.listeners.first() else {
            let listener = process.core.listen(endpoint(0), BindFlags::default());
            process.listeners.push(listener);
            // However little one wants: when all leave, whoever is left is served.
            let limits = [None, Some(0), Some(1), Some(2)];
            let most = limits[self.rng.usize(0..limits.len())];
            let process = self.processes.get_mut(&worker).expect("known");
            process.core.set_most(listener, most);
            return self.act_for_worker(worker);
        };
        if let Some((_, listener)) = process.held.pop() {
            process.core.connection_closed(Some(listener));
        } else if process.core.has_ended(listener) {
            return self.die(worker, ExitStatus::from_raw(0));
        } else if process.core.listen_result(listener) != Listen::Pending {
            if worker.get() % 2 == 0 {
                process.core.serve(listener);
            } else {
                process.accepting = Some(listener);
            }
        }
        self.act_for_worker(worker);
    }

    /// One step of a world in which everybody does what he should, but workers may die as long as
    /// one of them lives.
    fn friendly_step(&mut self, deaths: bool) {
        match self.rng.u8(0..60) {
            0..=19 => {
                if let Some(worker) = self.some_process(|p| p.alive && !p.to_worker.is_empty()) {
                    self.worker_reads(worker);
                }
            }
            20..=34 => {
                if let Some(worker) = self.some_process(|p| !p.to_master.is_empty()) {
                    self.master_reads(worker);
                }
            }
            35..=49 => {
                if let Some(worker) = self.some_process(|p| p.alive) {
                    self.serve(worker);
                }
            }
            50..=53 => {
                let ready = self
                    .ports
                    .iter()
                    .filter(|(_, p)| p.watched && !p.backlog.is_empty());
                let ready: Vec<_> = ready.map(|(id, _)| *id).collect();
                if let Some(handle) = self.pick(&ready) {
                    self.master.readable(handle);
                }
            }
            54..=56 => {
                self.now += Duration::from_millis(self.rng.u64(0..150));
                self.master.tick(self.now);
            }
            57 => self.notice_eof(),
            58 => self.notice_exit(),
            _ => {
                let alive = self.processes.values().filter(|p| p.alive).count();
                if deaths && alive > 1 && self.rng.u8(0..4) == 0 {
                    if let Some(worker) = self.some_process(|p| p.alive) {
                        self.die(worker, ExitStatus::from_raw(9));
                    }
                }
            }
        }
        // Nobody reacts to events here: whoever is gone is not replaced.
        while let Some(action) = self.master.next_action() {
            self.act(action);
        }
        while self.master.next_event().is_some() {
            while let Some(action) = self.master.next_action() {
                self.act(action);
            }
        }
        self.check(false);
    }
}

/// Everybody is told to leave while clients wait, and in half of the worlds workers die: all
/// clients are served.
#[test]
fn stopping_loses_nobody() {
    for seed in 0..500 {
        let mut world = World::new(seed);
        world.policy = SchedulingPolicy::RoundRobin;
        world.master = MasterCore::new(SchedulingPolicy::RoundRobin);
        for _ in 0..3 {
            world.master.forked();
            let id = world.master.worker_ids().last().expect("forked");
            world.processes.insert(id, Process::new());
            world.seen.insert(id, Seen::default());
            world.act_for_worker(id);
        }
        while world.master.worker_ids().count() == 3 && world.ports.is_empty() {
            world.friendly_step(false);
        }
        for _ in 0..world.rng.u32(0..300) {
            if world.rng.u8(0..8) == 0 {
                world.clients += 1;
                let client = world.clients;
                world.port(HandleId(1)).backlog.push_back(client);
            }
            world.friendly_step(false);
        }
        world.master.disconnect_all(true);
        let mut steps = 0;
        while world.master.has_workers() {
            world.friendly_step(seed % 2 == 0);
            steps += 1;
            assert!(steps < 100_000, "seed {seed}: it never ends");
        }
        let ledger = world.master.ledger();
        assert_eq!(ledger.dropped, 0, "seed {seed}: {ledger:?}");
        assert_eq!(world.served.len(), world.clients as usize, "seed {seed}");
    }
}

/// Four well-behaved workers, clients one after the other: everybody serves the same number.
#[test]
fn sequential_clients_rotate_exactly() {
    let mut world = World::new(0);
    world.policy = SchedulingPolicy::RoundRobin;
    world.master = MasterCore::new(SchedulingPolicy::RoundRobin);
    let mut listeners = BTreeMap::new();
    for _ in 0..4 {
        world.fork();
    }
    let ids: Vec<_> = world.processes.keys().copied().collect();
    for &id in &ids {
        let process = world.processes.get_mut(&id).expect("known");
        listeners.insert(id, process.core.listen(endpoint(0), BindFlags::default()));
        exchange(&mut world);
    }
    let mut served = BTreeMap::new();
    for client in 1..=1000 {
        for (&id, &listener) in &listeners {
            world.processes.get_mut(&id).expect("known").accepting = Some(listener);
            exchange(&mut world);
        }
        world.port(HandleId(1)).backlog.push_back(client);
        world.master.readable(HandleId(1));
        exchange(&mut world);
        for &id in &ids {
            let process = world.processes.get_mut(&id).expect("known");
            if let Some((_, listener)) = process.held.pop() {
                *served.entry(id).or_insert(0) += 1;
                process.core.connection_closed(Some(listener));
            }
        }
        exchange(&mut world);
    }
    assert_eq!(served.into_values().collect::<Vec<_>>(), [250; 4]);
}

/// Delivers everything that is under way.
fn exchange(world: &mut World) {
    let ids: Vec<_> = world.processes.keys().copied().collect();
    loop {
        let mut quiet = true;
        for &id in &ids {
            world.act_for_worker(id);
            while world.master_reads(id) {
                quiet = false;
            }
            world.settle();
            while !world.processes[&id].to_worker.is_empty() {
                quiet = false;
                world.worker_reads(id);
            }
        }
        if quiet {
            break;
        }
    }
}
