//! What the fuzz targets in `tests/fuzz` do with their input. The same is done in the tests, with
//! random input and with what the fuzzer has found worth keeping.
//!
//! `frame` is about the decoder. `master_input` is about all that one worker can say to the master:
//! a hostile one, whose bytes go through a channel's inbox into the core, and an honest one beside
//! it, whose promises are looked after. Kernel, clock and program are scripted by the input, too.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::time::Duration;

use crate::config::settings::SchedulingPolicy;
use crate::core::dispatch::{MAX_WINDOW, Sequenced};
use crate::core::event::{EmittedEvent, Event};
use crate::core::master::{Action, Attachment, MasterCore};
use crate::core::worker::{self as worker_core, Listen, ListenerId, WorkerCore};
use crate::error::Error;
use crate::sys::fd::NoLingerFd;
use crate::types::endpoint::{BindFlags, Endpoint, Kind, Place};
use crate::types::errno;
use crate::types::signal::Signal;
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;
use crate::wire::channel::inbox::{Arrival, Inbox, InboxSize, MAX_EARLY_FDS, READ_SIZE};
use crate::wire::frame::{
    BATCH_OFFSET, Frame, FrameError, HEADER, HandleId, HandleKey, Header, MAX_BATCH, MAX_BODY,
    MAX_FDS, ToMaster, ToWorker,
};

/// The input, from which everything is decided; zeroes when it is used up.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    fn wide(&mut self) -> u64 {
        let mut bytes = [0; 8];
        let taken = self.take(8);
        bytes[..taken.len()].copy_from_slice(taken);
        u64::from_le_bytes(bytes)
    }

    /// Small numbers mostly, because most of what has a number here has a small one.
    fn long(&mut self) -> u64 {
        match self.byte() {
            small @ 0..=239 => u64::from(small),
            _ => self.wide(),
        }
    }

    fn number(&mut self) -> u32 {
        let long = self.long();
        u32::try_from(long).unwrap_or(u32::MAX)
    }
}

/// Descriptors that the kernel might bring.
fn descriptors(count: usize) -> Vec<NoLingerFd> {
    thread_local! {
        static NULL: File = File::open("/dev/null").expect("/dev/null");
    }
    let copy = |_| NULL.with(|null| OwnedFd::from(null.try_clone().expect("a descriptor")).into());
    (0..count).map(copy).collect()
}

/// What is decoded is encoded to the same bytes, and however the bytes are cut into pieces, the
/// same frames come out and the same error ends them.
#[doc(hidden)]
pub fn frame(data: &[u8]) {
    let mut script = Script(data);
    let batches = [script.byte(), script.byte()];
    let count = usize::from(script.byte()) % 16;
    let cuts = script.take(count);
    let bytes = script.0;
    round_trip::<ToMaster>(bytes);
    round_trip::<ToWorker>(bytes);
    cut::<ToMaster>(bytes, cuts, batches);
    cut::<ToWorker>(bytes, cuts, batches);
}

fn round_trip<F: Frame>(bytes: &[u8]) {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else {
        return;
    };
    let Ok(header) = Header::decode(*header) else {
        return;
    };
    assert!(header.length <= MAX_BODY && header.fds <= MAX_FDS);
    let Some(body) = rest.get(..header.length) else {
        return;
    };
    if let Ok(frame) = F::decode(header.kind, header.fds, body) {
        let mut again = Vec::new();
        frame.encode(header.fds, &mut again);
        // Filled in when the descriptors leave.
        again[BATCH_OFFSET] = bytes[BATCH_OFFSET];
        assert_eq!(again, bytes[..HEADER + header.length]);
    }
}

fn cut<F: Frame + PartialEq + std::fmt::Debug>(bytes: &[u8], cuts: &[u8], batches: [u8; 2]) {
    let mut pieces = Vec::new();
    let mut rest = bytes;
    for cut in cuts {
        let (piece, later) = rest.split_at(rest.len().min((*cut).into()));
        pieces.push(piece);
        rest = later;
    }
    pieces.push(rest);
    assert_eq!(read::<F>(&pieces, batches), read::<F>(&[bytes], batches));
}

/// A frame, how many descriptors it has, and whether it should have more.
type Read<F> = (F, usize, bool);

/// Reads frames until there is an error. Before them two batches of descriptors arrive, not all of
/// them complete.
fn read<F: Frame>(pieces: &[&[u8]], batches: [u8; 2]) -> (Vec<Read<F>>, Option<FrameError>) {
    let mut inbox = Inbox::default();
    for batch in batches {
        inbox.push_fds(
            descriptors(usize::from(batch) % (2 * MAX_FDS)),
            batch >= 128,
        );
    }
    let mut frames = Vec::new();
    for piece in pieces {
        inbox.push(piece);
        loop {
            match inbox.next() {
                Ok(None) => break,
                Ok(Some(arrival)) => {
                    let Arrival {
                        frame,
                        fds,
                        lost_fds,
                        is_last: _,
                    } = arrival;
                    frames.push((frame, fds.len(), lost_fds));
                }
                Err(error) => return (frames, Some(error)),
            }
        }
    }
    (frames, None)
}

/// Whatever one worker says, the master goes on, its memory stays bounded, its ledger is right, and
/// the other worker's clients are served.
#[doc(hidden)]
pub fn master_input(data: &[u8]) {
    play(data);
}

/// How often what has happened; a script in which nothing does is worth nothing.
type Reached = BTreeMap<&'static str, usize>;

fn play(data: &[u8]) -> Reached {
    let mut script = Script(data);
    let mut world = World::new(script.byte());
    while !script.is_over() {
        world.step(&mut script);
        world.check();
    }
    world.finish();
    world.count(SERVED, world.honest.served);
    world.reached
}

const SERVED: &str = "connections served by the honest worker";
const GIVEN: &str = "connections given to the hostile worker";
const TAKEN: &str = "connections it took";
const CAME_BACK: &str = "connections taken back from it";
const GIVEN_ELSEWHERE: &str = "connections taken back from the honest one";
const LIES: &str = "times it said it took what it did not";
const DENIED: &str = "listeners it was denied";
const UNREAD_MAX: &str = "times it was cut off";

/// A connection, by number.
type Client = u32;

/// The most listeners that the README allows a worker.
const MOST_LISTENERS: usize = 64;
/// The most connections that one `Accept` may bring.
const ACCEPTED_AT_ONCE: usize = 64;
/// How many connections the kernel has room for in a queue.
const ROOM: usize = 40;
/// How many connections a worker that lives in its loop takes in a turn.
const TAKEN_AT_ONCE: u32 = 16;

/// A listener of the master's.
#[derive(Default)]
struct Port {
    backlog: VecDeque<Client>,
    came: Vec<Client>,
    watched: bool,
    shut: bool,
    unbound: bool,
    datagram: bool,
}

/// The connections on their way to one worker. The worker and the master take from it.
#[derive(Default)]
struct Queue {
    connections: VecDeque<Sequenced<Client>>,
    /// The worker has made its end useless.
    shut: bool,
}

/// The worker that says what the script has it say.
struct Hostile {
    id: WorkerId,
    inbox: Inbox,
    /// The master's end of its channel.
    open: bool,
    exited: bool,
    frames: u64,
    /// Frames for it.
    answers: u64,
    online: bool,
    /// How often it has asked for each endpoint.
    asked: BTreeMap<u32, u32>,
    /// Its listeners, with how many connections it has taken of each.
    taken: BTreeMap<HandleId, u64>,
}

impl Hostile {
    fn new(id: WorkerId) -> Self {
        Self {
            id,
            inbox: Inbox::default(),
            open: true,
            exited: false,
            frames: 0,
            answers: 0,
            online: false,
            asked: BTreeMap::new(),
            taken: BTreeMap::new(),
        }
    }
}

/// The worker whose program does what programs should do.
struct Honest {
    id: WorkerId,
    core: WorkerCore,
    to_master: VecDeque<ToMaster>,
    to_worker: VecDeque<(ToWorker, Attachment)>,
    listeners: Vec<ListenerId>,
    /// Its copies of listeners and its ends of queues.
    sockets: BTreeMap<ListenerId, Attachment>,
    /// Those of which the poller tells.
    watched: BTreeSet<ListenerId>,
    held: Vec<(Client, ListenerId)>,
    served: usize,
    accepting: Option<ListenerId>,
    /// The master's end of its channel, and its own.
    master_end: bool,
    worker_end: bool,
    exited: bool,
    /// The program of the master wants it to leave.
    dismissed: bool,
}

impl Honest {
    fn new(id: WorkerId) -> Self {
        Self {
            id,
            core: WorkerCore::new(),
            to_master: VecDeque::new(),
            to_worker: VecDeque::new(),
            listeners: Vec::new(),
            sockets: BTreeMap::new(),
            watched: BTreeSet::new(),
            held: Vec::new(),
            served: 0,
            accepting: None,
            master_end: true,
            worker_end: true,
            exited: false,
            dismissed: false,
        }
    }
}

type Master = MasterCore<Client, Vec<NoLingerFd>>;

struct World {
    policy: SchedulingPolicy,
    master: Master,
    now: Time,
    ports: BTreeMap<HandleId, Port>,
    queues: BTreeMap<(HandleId, WorkerId), Queue>,
    /// Queues that could not be emptied when they were to be closed.
    resting: Vec<(HandleId, WorkerId)>,
    /// The system tells how many connections are in a queue.
    counts: bool,
    hostile: Hostile,
    honest: Honest,
    clients: Client,
    /// Those that a worker has, and those that left while they waited.
    taken: BTreeSet<Client>,
    swept: BTreeSet<Client>,
    /// How many came out of queues.
    out_of_queues: u64,
    lied: bool,
    binding_fails: bool,
    sharing_fails: bool,
    accepting_fails: bool,
    giving_fails: bool,
    taking_back_fails: bool,
    taking_fails: bool,
    /// What the program does when the next event comes.
    reaction: u8,
    awaited: bool,
    disconnected: u32,
    reached: Reached,
}

/// A few endpoints that both workers use, and many that only the hostile one asks for.
fn endpoint(number: u32) -> Endpoint {
    let port = u16::try_from(number / 8).unwrap_or(u16::MAX);
    let ip = Place::Ip(SocketAddr::from(([127, 0, 0, 1], port)));
    match number % 8 {
        0..=2 => Endpoint::new(Kind::Tcp, ip),
        3 => Endpoint::new(Kind::Tcp, Place::Port(port)),
        4 => Endpoint::new(Kind::Unix, Place::Path(format!("/{port}").into())),
        5 => Endpoint::new(Kind::Tcp, Place::Fd(port.into())),
        6 => Endpoint::new(Kind::Unix, Place::Fd(port.into())),
        _ => Endpoint::new(Kind::Udp, ip),
    }
}

/// Forks a worker.
fn forked(master: &mut Master) -> WorkerId {
    let worker = master.next_worker_id().expect("a number");
    master.forked(worker);
    worker
}

impl World {
    fn new(choice: u8) -> Self {
        let policy = if choice % 4 == 3 {
            SchedulingPolicy::Shared
        } else {
            SchedulingPolicy::RoundRobin
        };
        let mut master = MasterCore::new(policy);
        let hostile = Hostile::new(forked(&mut master));
        let honest = Honest::new(forked(&mut master));
        let mut world = Self {
            policy,
            master,
            now: Time::ZERO,
            ports: BTreeMap::new(),
            queues: BTreeMap::new(),
            resting: Vec::new(),
            counts: choice & 4 == 0,
            hostile,
            honest,
            clients: 0,
            taken: BTreeSet::new(),
            swept: BTreeSet::new(),
            out_of_queues: 0,
            lied: false,
            binding_fails: false,
            sharing_fails: false,
            accepting_fails: false,
            giving_fails: false,
            taking_back_fails: false,
            taking_fails: false,
            reaction: 0,
            awaited: false,
            disconnected: 0,
            reached: Reached::new(),
        };
        world.settle();
        world
    }

    fn count(&mut self, what: &'static str, times: usize) {
        *self.reached.entry(what).or_default() += times;
    }

    /// Tells the core something. Not much may come of it.
    fn tell<T>(&mut self, fact: impl FnOnce(&mut Master) -> T) -> T {
        let before = self.master.sizes();
        let connections = usize::try_from(self.master.in_hand()).unwrap_or(usize::MAX);
        let connections = connections + self.queued();
        let result = fact(&mut self.master);
        let after = self.master.sizes();
        // Each worker may leave each listener, and what the one had goes to the other.
        let actions = 16 + ACCEPTED_AT_ONCE + connections + 8 * before.handles.max(after.handles);
        assert!(
            after.actions <= before.actions + actions,
            "too many actions"
        );
        assert!(after.events <= before.events + 12, "too many events");
        result
    }

    /// Carries out what the core decided, then lets the program see its events.
    fn settle(&mut self) {
        loop {
            while let Some(action) = self.master.next_action() {
                self.act(action);
            }
            let Some(emit) = self.master.next_event() else {
                break;
            };
            self.deliver(&emit);
        }
    }

    fn deliver(&mut self, emit: &EmittedEvent<Vec<NoLingerFd>>) {
        if let Event::Disconnected = emit.event {
            assert!(self.awaited, "nobody asked");
            self.awaited = false;
            self.disconnected += 1;
        }
        if let (Event::Error(error), Some(worker)) = (&emit.event, emit.worker) {
            if let Error::Frame { .. } = **error {
                assert_eq!(worker, self.hostile.id, "the honest one speaks well");
            }
        }
        match std::mem::take(&mut self.reaction) {
            0 => {}
            choice => self.program(choice),
        }
    }

    fn port(&mut self, handle: HandleId) -> &mut Port {
        let port = self.ports.get_mut(&handle).expect("no such listener");
        assert!(!port.unbound, "the listener is gone");
        port
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
                has_waited: _,
            } => self.give(handle, worker, connection),
            Action::Reclaim {
                handle,
                worker,
                at_most,
            } => self.reclaim(handle, worker, at_most),
            Action::CountQueued { handle, worker } => self.count_queue(handle, worker),
            Action::CloseQueue { handle, worker } => self.close_queue(handle, worker),
            Action::Bind {
                handle, endpoint, ..
            } => {
                let result = self.bind(handle, &endpoint);
                self.tell(|core| core.bound(handle, result));
            }
            Action::Watch { handle } => self.port(handle).watched = true,
            Action::Unwatch { handle } => self.port(handle).watched = false,
            Action::Accept { handle, at_most } => self.accept(handle, at_most),
            Action::RemoveFile { handle } | Action::AttachSynFilter { handle } => {
                self.port(handle).shut = true;
            }
            Action::DetachSynFilter { handle } => self.port(handle).shut = false,
            Action::Unbind { handle } => {
                let port = self.port(handle);
                port.unbound = true;
                port.watched = false;
            }
            Action::CloseChannel { worker } => self.close_channel(worker),
            Action::DiscardChannel { worker } => {
                assert_eq!(worker, self.hostile.id, "only liars are cut off");
                self.hostile.open = false;
                self.count(UNREAD_MAX, 1);
            }
            Action::StopListening { .. } | Action::WatchHangUp { .. } => {}
            Action::Unblock { .. } => {} // Nobody blocks here.
            Action::BindShard { .. } | Action::SelectShards { .. } => {
                unreachable!("not with these policies")
            }
            Action::Signal { worker, .. } => {
                assert!(self.master.exit_status(worker).is_none(), "a reaped pid");
            }
        }
    }

    fn send(&mut self, worker: WorkerId, frame: ToWorker, with: Attachment) {
        if let (
            Attachment::Listener(handle) | Attachment::Queue(handle),
            ToWorker::Reply { request, .. },
        ) = (with, &frame)
        {
            if std::mem::take(&mut self.sharing_fails) {
                let request = *request;
                let failed = errno::EMFILE;
                return self.tell(|core| core.share_failed(handle, worker, request, failed));
            }
        }
        if let Attachment::Queue(handle) = with {
            let previous = self.queues.insert((handle, worker), Queue::default());
            assert!(previous.is_none(), "a second queue");
        }
        if worker == self.hostile.id {
            assert!(self.hostile.open, "send on a closed channel");
            self.tell_hostile(&frame);
        } else if worker == self.honest.id {
            assert!(self.honest.master_end, "send on a closed channel");
            self.honest.to_worker.push_back((frame, with));
        }
    }

    fn queued(&self) -> usize {
        let queues = self.queues.values();
        queues.map(|queue| queue.connections.len()).sum()
    }

    fn give(&mut self, handle: HandleId, worker: WorkerId, connection: Sequenced<Client>) {
        let queue = self.queues.get_mut(&(handle, worker)).expect("a queue");
        let is_exhausted = std::mem::take(&mut self.giving_fails);
        if is_exhausted || queue.shut || queue.connections.len() >= ROOM {
            return self.tell(|core| core.not_dispatched(handle, worker, connection, is_exhausted));
        }
        queue.connections.push_back(connection);
        let trusted = worker == self.honest.id || !self.lied;
        assert!(
            !trusted || queue.connections.len() <= MAX_WINDOW as usize,
            "given too far ahead"
        );
        self.count(GIVEN, (worker == self.hostile.id).into());
    }

    /// Takes out so many connections. Returns whether none is left, if that is known.
    fn take_out(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        at_most: usize,
    ) -> Option<(Vec<Sequenced<Client>>, Option<bool>)> {
        let queue = self.queues.get_mut(&(handle, worker))?;
        let there = queue.connections.len();
        let (count, is_empty) = if std::mem::take(&mut self.taking_back_fails) {
            (at_most.min(there / 2), None)
        } else {
            (at_most.min(there), Some(at_most > there))
        };
        let back: Vec<_> = queue.connections.drain(..count).collect();
        let from = if worker == self.honest.id {
            GIVEN_ELSEWHERE
        } else {
            CAME_BACK
        };
        self.count(from, count);
        Some((back, is_empty))
    }

    fn reclaim(&mut self, handle: HandleId, worker: WorkerId, at_most: usize) {
        let Some((back, is_empty)) = self.take_out(handle, worker, at_most) else {
            return;
        };
        if is_empty.is_none() {
            self.tell(|core| core.cannot_reclaim(handle));
        }
        let is_empty = is_empty == Some(true);
        self.tell(|core| core.reclaimed(handle, worker, back, is_empty));
    }

    fn count_queue(&mut self, handle: HandleId, worker: WorkerId) {
        let queue = self.queues.get(&(handle, worker));
        if let Some(queue) = queue.filter(|_| self.counts) {
            let queued = queue.connections.len() as u64;
            self.tell(|core| core.counted(handle, worker, queued));
        }
    }

    fn close_queue(&mut self, handle: HandleId, worker: WorkerId) {
        match self.take_out(handle, worker, usize::MAX) {
            Some((back, None)) => {
                self.resting.push((handle, worker));
                self.tell(|core| core.reclaimed(handle, worker, back, false));
            }
            outcome => {
                self.queues.remove(&(handle, worker));
                let back = outcome.map(|(back, _)| back).unwrap_or_default();
                self.tell(|core| core.queue_closed(handle, worker, back));
            }
        }
    }

    /// The master's program looks where all connections are.
    fn look_at_ledger(&mut self) {
        let queues: Vec<_> = self.queues.keys().copied().collect();
        for (handle, worker) in queues {
            self.count_queue(handle, worker);
        }
        self.settle();
        let taken = self.master.ledger().taken;
        if self.counts && !self.lied {
            assert_eq!(taken, self.out_of_queues, "taken out of queues");
        }
    }

    fn bind(&mut self, handle: HandleId, endpoint: &Endpoint) -> Result<Option<SocketAddr>, i32> {
        if std::mem::take(&mut self.binding_fails) {
            return Err(98);
        }
        let datagram = endpoint.kind == Kind::Udp;
        let port = Port {
            datagram,
            ..Port::default()
        };
        assert!(self.ports.insert(handle, port).is_none(), "bound twice");
        Ok(endpoint.address())
    }

    fn accept(&mut self, handle: HandleId, at_most: u64) {
        assert!(at_most <= ACCEPTED_AT_ONCE as u64);
        if std::mem::take(&mut self.accepting_fails) {
            let error = io::Error::from_raw_os_error(24);
            return self.tell(|core| core.accept_failed(handle, error));
        }
        for _ in 0..at_most {
            let Some(client) = self.port(handle).backlog.pop_front() else {
                return self.tell(|core| core.drained(handle));
            };
            self.tell(|core| core.accepted(handle, client));
        }
        self.tell(|core| core.accept_done(handle));
    }

    /// What was written before is heard.
    fn close_channel(&mut self, worker: WorkerId) {
        if worker == self.hostile.id {
            while self.feed() {}
            self.hostile.open = false;
        } else if worker == self.honest.id {
            while let Some(frame) = self.honest.to_master.pop_front() {
                self.hear(frame);
            }
            self.honest.master_end = false;
        }
        self.tell(|core| core.channel_closed(worker));
    }

    // The hostile worker.

    fn tell_hostile(&mut self, frame: &ToWorker) {
        self.hostile.answers += 1;
        match frame {
            ToWorker::Reply {
                result: Ok(bound), ..
            } => drop(self.hostile.taken.insert(bound.handle, 0)),
            ToWorker::Reply {
                result: Err(errno::EMFILE),
                ..
            } => self.count(DENIED, 1),
            ToWorker::Reply { .. }
            | ToWorker::ListenerClosed { .. }
            | ToWorker::Disconnect
            | ToWorker::Message(_) => {}
        }
    }

    /// It takes the first connection out of its queue, if there is one.
    fn rob(&mut self, handle: HandleId) -> bool {
        let Some(client) = self.take(handle, self.hostile.id) else {
            return false;
        };
        assert!(self.taken.insert(client), "client {client} taken twice");
        *self.hostile.taken.entry(handle).or_default() += 1;
        self.count(TAKEN, 1);
        true
    }

    /// One takes out of its queue what comes first.
    fn take(&mut self, handle: HandleId, worker: WorkerId) -> Option<Client> {
        let queue = self.queues.get_mut(&(handle, worker))?;
        let client = queue.connections.pop_front()?.connection;
        self.out_of_queues += 1;
        Some(client)
    }

    /// Bytes arrive, with descriptors, of which some may be lost.
    fn arrive(&mut self, bytes: &[u8], fds: usize, lost: bool) {
        if !self.hostile.open {
            return;
        }
        self.hostile.inbox.push_fds(descriptors(fds), lost);
        self.hostile.inbox.push(bytes);
        while self.feed() {
            self.settle();
        }
        self.settle();
        let InboxSize { bytes, fds } = self.hostile.inbox.size();
        assert!(bytes <= HEADER + MAX_BODY + READ_SIZE);
        assert!(!self.hostile.open || fds <= MAX_EARLY_FDS + MAX_BATCH);
    }

    /// As the shell does it. Returns whether there was a frame.
    fn feed(&mut self) -> bool {
        if !self.hostile.open {
            return false;
        }
        let id = self.hostile.id;
        let arrival = match self.hostile.inbox.next() {
            Ok(None) => return false,
            Ok(Some(arrival)) => arrival,
            Err(error) => {
                self.tell(|core| core.violation(id, error));
                assert!(!self.master.is_connected(id));
                return false;
            }
        };
        if arrival.lost_fds {
            self.tell(|core| core.error(Some(id), Error::no_descriptors(Some(id))));
        }
        if let ToMaster::Message(bytes) = arrival.frame {
            let fds = arrival.fds;
            self.tell(|core| core.message(id, bytes, fds));
        } else {
            if let ToMaster::Idle { handle, taken, .. } = arrival.frame {
                if taken > self.has_taken(handle) {
                    self.lied = true;
                    self.count(LIES, 1);
                }
            }
            self.tell(|core| core.frame(id, arrival.frame));
        }
        self.hostile.frames += 1;
        true
    }

    /// A well-formed frame, in one or two pieces.
    fn speak(&mut self, script: &mut Script<'_>) {
        let frame = self.invent(script);
        let (fds, lost) = if matches!(frame, ToMaster::Message(_)) {
            let choices = [(0, false), (1, false), (3, false), (1, true)];
            choices[usize::from(script.byte()) % 4]
        } else {
            (0, false)
        };
        let mut bytes = Vec::new();
        let announced = fds + usize::from(lost);
        frame.encode(announced, &mut bytes);
        bytes[BATCH_OFFSET] = u8::try_from(announced).unwrap_or(0);
        let at = usize::from(script.byte()).min(bytes.len());
        let (first, second) = bytes.split_at(at);
        self.arrive(first, fds, lost);
        self.arrive(second, 0, false);
    }

    fn has_taken(&self, handle: HandleId) -> u64 {
        self.hostile.taken.get(&handle).copied().unwrap_or(0)
    }

    fn invent(&self, script: &mut Script<'_>) -> ToMaster {
        let choice = script.byte();
        let handle = HandleId(u32::from(choice / 8));
        match choice % 8 {
            0 => ToMaster::Online,
            1 => ToMaster::Listen {
                request: script.number(),
                key: HandleKey {
                    endpoint: endpoint(script.number()),
                    index: script.number(),
                },
                flags: BindFlags::default(),
            },
            2 => ToMaster::Listening { handle },
            3 => ToMaster::Idle {
                handle,
                taken: script.long(),
                open: script.number(),
            },
            // A lie that may be believed.
            4 => ToMaster::Idle {
                handle,
                taken: self.has_taken(handle).saturating_add(script.long()),
                open: script.number(),
            },
            5 => ToMaster::Release { handle },
            6 => ToMaster::Pause { handle },
            _ if choice == 255 => ToMaster::DisconnectRequest,
            _ => ToMaster::Message(vec![0; choice.into()]),
        }
    }

    /// The hostile worker takes a connection or says something true, as one of ours would, or
    /// does harm to itself.
    fn admit(&mut self, choice: u8) {
        let hostile = &mut self.hostile;
        let (kind, more) = (choice % 8, u32::from(choice / 8));
        let listeners = hostile.taken.len().max(1);
        let listener = hostile.taken.keys().nth(more as usize % listeners).copied();
        let frame = match (kind, listener) {
            _ if !std::mem::replace(&mut hostile.online, true) => ToMaster::Online,
            (0, _) | (_, None) => {
                let asked = hostile.asked.entry(more).or_default();
                let index = *asked;
                *asked += 1;
                let endpoint = endpoint(more);
                ToMaster::Listen {
                    request: 1,
                    key: HandleKey { endpoint, index },
                    flags: BindFlags::default(),
                }
            }
            (1, Some(handle)) => {
                self.rob(handle);
                return;
            }
            (4, Some(handle)) => ToMaster::Pause { handle },
            (5, Some(handle)) if more % 4 == 3 => {
                hostile.taken.remove(&handle);
                ToMaster::Release { handle }
            }
            (5, Some(handle)) if more % 4 == 2 => {
                let queue = self.queues.get_mut(&(handle, hostile.id));
                if let Some(queue) = queue {
                    queue.shut = true;
                }
                return;
            }
            (2 | 3, Some(handle)) => {
                self.rob(handle);
                let taken = self.has_taken(handle);
                let open = 0;
                ToMaster::Idle {
                    handle,
                    taken,
                    open,
                }
            }
            (_, Some(handle)) => {
                while self.rob(handle) {}
                let taken = self.has_taken(handle);
                let open = 0;
                ToMaster::Idle {
                    handle,
                    taken,
                    open,
                }
            }
        };
        let mut bytes = Vec::new();
        frame.encode(0, &mut bytes);
        self.arrive(&bytes, 0, false);
    }

    /// The channel of the hostile worker ends.
    fn hang_up(&mut self) {
        if self.hostile.open {
            let id = self.hostile.id;
            self.hostile.open = false;
            self.tell(|core| core.channel_closed(id));
        }
    }

    fn die(&mut self) {
        let id = self.hostile.id;
        if !std::mem::replace(&mut self.hostile.exited, true) {
            self.tell(|core| core.exited(id, ExitStatus::from_raw(9)));
        }
    }

    /// A new one, if the old one is gone.
    fn replace(&mut self) {
        if !self.hostile.open && self.hostile.exited {
            self.hostile = Hostile::new(forked(&mut self.master));
        }
    }

    // The honest worker.

    /// The master reads what the honest worker said.
    fn hear(&mut self, frame: ToMaster) {
        let id = self.honest.id;
        self.tell(|core| core.frame(id, frame));
    }

    fn master_reads(&mut self) -> bool {
        if !self.honest.master_end {
            return false;
        }
        if let Some(frame) = self.honest.to_master.pop_front() {
            self.hear(frame);
            return true;
        }
        if !self.honest.worker_end {
            let id = self.honest.id;
            self.honest.master_end = false;
            self.tell(|core| core.channel_closed(id));
        }
        false
    }

    fn worker_reads(&mut self) -> bool {
        let honest = &mut self.honest;
        if !honest.worker_end {
            return false;
        }
        let Some((frame, with)) = honest.to_worker.pop_front() else {
            if !honest.master_end {
                honest.worker_end = false;
                honest.core.channel_closed();
                self.work();
            }
            return false;
        };
        let outcome = honest.core.frame(frame);
        if let Some(listener) = outcome.expect("the master speaks well") {
            honest.sockets.insert(listener, with);
        }
        self.work();
        true
    }

    /// The honest worker does what its core decided and what its program does at once.
    fn work(&mut self) {
        loop {
            let honest = &mut self.honest;
            if let Some(action) = honest.core.next_action() {
                match action {
                    worker_core::Action::Send(frame) if honest.master_end => {
                        honest.to_master.push_back(frame);
                    }
                    worker_core::Action::Send(_) | worker_core::Action::CloseChannel => {
                        honest.worker_end = false;
                        honest.to_worker.clear();
                        honest.core.channel_closed();
                    }
                    worker_core::Action::CloseListener(listener) => {
                        honest.sockets.remove(&listener);
                        honest.watched.remove(&listener);
                    }
                    worker_core::Action::AttachSynFilter(_) => {
                        unreachable!("nobody listens alone here")
                    }
                }
                continue;
            }
            match honest.core.next_event() {
                Some(worker_core::Event::Look(listener)) => {
                    let core = &honest.core;
                    if core.is_served(listener) && !core.leaves_to_others(listener) {
                        honest.watched.insert(listener);
                    } else {
                        honest.watched.remove(&listener);
                    }
                    self.accept_all(listener);
                }
                Some(worker_core::Event::Message(_) | worker_core::Event::Disconnect) => {}
                None if self.accepts() => {}
                None => break,
            }
        }
    }

    /// Whether `accept` had something for the program that waits in it.
    fn accepts(&mut self) -> bool {
        let Some(listener) = self.honest.accepting else {
            return false;
        };
        let left = self.honest.core.leaves_to_others(listener);
        if !left && self.try_accept(listener) || self.honest.core.has_ended(listener) {
            self.honest.accepting = None;
            return true;
        }
        false
    }

    /// A callback gets what its listener has.
    fn accept_all(&mut self, listener: ListenerId) {
        for _ in 0..TAKEN_AT_ONCE {
            if self.honest.core.leaves_to_others(listener) {
                self.honest.watched.remove(&listener);
                return;
            }
            if !self.try_accept(listener) {
                return;
            }
        }
        if self.honest.core.is_ending(listener) {
            self.honest.core.look(listener);
        }
    }

    /// The honest worker takes a connection or accepts one for itself, as the shell does it. Returns
    /// whether there was something.
    fn try_accept(&mut self, listener: ListenerId) -> bool {
        let client = match self.honest.sockets.get(&listener) {
            Some(Attachment::Queue(_)) if std::mem::take(&mut self.taking_fails) => {
                self.honest.core.descriptors_lack();
                None
            }
            Some(Attachment::Queue(handle)) => self.take(*handle, self.honest.id),
            Some(Attachment::Listener(handle)) => {
                let port = self.ports.get_mut(handle).expect("known");
                port.backlog.pop_front()
            }
            Some(Attachment::None | Attachment::Shard(..)) | None => return false,
        };
        let honest = &mut self.honest;
        if let Some(client) = client {
            honest.core.connection_opened(listener);
            assert!(self.taken.insert(client), "client {client} taken twice");
            honest.served += 1;
            honest.held.push((client, listener));
            return true;
        }
        if !honest.core.is_ending(listener) {
            honest.core.found_empty(listener);
        } else if !honest.core.leaves_to_others(listener) {
            honest.core.close(listener);
        }
        false
    }

    /// The honest worker's program waits, in `accept` or for events in general, and its poller tells
    /// of listeners.
    fn turn(&mut self) {
        if self.honest.accepting.is_none() {
            self.honest.core.wait_for_events();
        }
        for listener in self.honest.watched.clone() {
            self.accept_all(listener);
        }
        self.work();
    }

    /// The honest worker's program goes on: listens, accepts, lets go of what it has.
    fn serve(&mut self, choice: u8) {
        let honest = &mut self.honest;
        match choice % 8 {
            0 if honest.listeners.len() < 4 => {
                let endpoint = endpoint((choice / 8).into());
                let listener = honest.core.listen(endpoint, BindFlags::default());
                honest.listeners.push(listener);
            }
            1 | 2 if !honest.held.is_empty() => {
                let at = usize::from(choice / 8) % honest.held.len();
                let (_, listener) = honest.held.swap_remove(at);
                honest.core.connection_closed(Some(listener));
            }
            3 => self.turn(),
            4..=7 if !honest.listeners.is_empty() => {
                let at = usize::from(choice / 8) % honest.listeners.len();
                let listener = honest.listeners[at];
                match honest.core.listen_result(listener) {
                    Listen::Pending => {}
                    Listen::Failed(_) => {
                        honest.core.forget(listener);
                        honest.listeners.swap_remove(at);
                    }
                    Listen::Done(_) => self.use_listener(listener, choice),
                }
            }
            _ => {}
        }
        self.work();
    }

    fn use_listener(&mut self, listener: ListenerId, choice: u8) {
        let honest = &mut self.honest;
        if honest.core.is_datagram(listener) {
            return;
        }
        if choice >= 192 {
            // The program changes its mind about how many connections it wants.
            let most = (choice & 32 == 0).then_some(0);
            honest.core.set_most(listener, most);
        } else if choice >= 128 {
            if honest.accepting != Some(listener) {
                honest.core.forget(listener);
                honest.listeners.retain(|known| *known != listener);
            }
        } else if choice % 8 == 4 {
            honest.core.listening(listener);
        } else if choice % 8 == 5 {
            honest.core.serve(listener);
        } else if honest.accepting.is_none() && !honest.core.is_served(listener) {
            honest.accepting = Some(listener);
        }
    }

    // The master's program, its kernel and the clock.

    fn program(&mut self, choice: u8) {
        let (hostile, honest) = (self.hostile.id, self.honest.id);
        match choice % 32 {
            0..=3 => self.tell(|core| core.disconnect(hostile)),
            4..=5 => self.tell(|core| core.kill(hostile, Signal::TERM)),
            6 => self.tell(|core| core.signal(hostile, Signal::TERM)),
            7..=10 => self.tell(|core| core.close_channel(hostile)),
            11 => self.tell(|core| core.reference(hostile, choice & 32 != 0)),
            12..=14 => {
                let source = io::Error::from_raw_os_error(32);
                let worker = Some(hostile);
                self.tell(|core| core.error(worker, Error::Channel { worker, source }));
            }
            15..=16 => self.replace(),
            17 => self.tell(MasterCore::setup),
            18..=21 => {
                let mut swept = BTreeSet::new();
                let gone =
                    |client: &Client| client % 4 == u32::from(choice / 64) && swept.insert(*client);
                self.tell(|core| core.sweep(usize::MAX, gone));
                self.swept.extend(swept);
            }
            22 => {
                self.honest.dismissed = true;
                self.tell(|core| core.disconnect(honest));
            }
            23 => {
                self.honest.dismissed = true;
                self.awaited |= choice & 32 != 0;
                let awaited = self.awaited;
                self.tell(|core| core.disconnect_all(awaited));
            }
            24 => {
                self.honest.dismissed = true;
                self.tell(|core| core.close_channel(honest));
            }
            25 => self.binding_fails = true,
            26 => self.accepting_fails = true,
            27 => self.giving_fails = true,
            28 => self.taking_back_fails = true,
            29 => self.sharing_fails = true,
            30 => self.taking_fails = true,
            _ => self.look_at_ledger(),
        }
    }

    fn come(&mut self, choice: u8, count: u8) {
        let open: Vec<_> = self
            .ports
            .iter()
            .filter(|(_, port)| port.is_open())
            .collect();
        if open.is_empty() {
            return;
        }
        let handle = *open[usize::from(choice) % open.len()].0;
        for _ in 0..count {
            self.knock(handle);
        }
        self.wake();
    }

    /// A client comes.
    fn knock(&mut self, handle: HandleId) {
        self.clients += 1;
        let client = self.clients;
        let port = self.port(handle);
        port.backlog.push_back(client);
        port.came.push(client);
    }

    /// The poller tells of the listeners that it watches, again and again.
    fn wake(&mut self) {
        let ready = |(_, port): &(&HandleId, &Port)| port.watched && !port.backlog.is_empty();
        while let Some((handle, _)) = self.ports.iter().find(ready) {
            let handle = *handle;
            self.tell(|core| core.readable(handle));
            self.settle();
        }
    }

    fn pass(&mut self, millis: u8) {
        self.now += Duration::from_millis(millis.into());
        let now = self.now;
        self.honest.core.rested();
        self.work();
        for (handle, worker) in std::mem::take(&mut self.resting) {
            self.close_queue(handle, worker);
        }
        self.tell(|core| core.tick(now));
        self.settle();
        let deadline = self.master.deadline();
        assert!(deadline.is_none_or(|next| next > now), "the loop spins");
    }

    fn step(&mut self, script: &mut Script<'_>) {
        match script.byte() % 32 {
            0..=9 => self.speak(script),
            10 => {
                let (length, fds) = (script.byte(), script.byte());
                let bytes = script.take(length.into());
                // Descriptors come rarely, and then by the dozen: they cost a system call each.
                let few = usize::from(fds).saturating_sub(192);
                self.arrive(bytes, few, fds == 191);
            }
            11..=16 => self.serve(script.byte()),
            17..=18 => drop(self.master_reads()),
            19..=20 => drop(self.worker_reads()),
            21 => self.exchange(),
            22..=24 => self.come(script.byte(), script.byte()),
            25 => self.wake(),
            26 => self.pass(script.byte()),
            27 => self.hang_up(),
            28 => self.die(),
            29 => self.reaction = script.byte(),
            30 => self.program(script.byte()),
            _ => self.admit(script.byte()),
        }
        self.settle();
    }

    /// What is under way between the master and the honest worker arrives.
    fn exchange(&mut self) {
        loop {
            self.turn();
            let heard = self.master_reads();
            self.settle();
            if !self.worker_reads() && !heard {
                break;
            }
        }
    }

    // What must be true.

    fn check(&self) {
        let ledger = self.master.ledger();
        assert_eq!(ledger.in_hand(), self.master.in_hand(), "{ledger:?}");
        assert!(self.master.is_index_consistent(), "the index is wrong");
        let waits = self.master.has_stuck_connection();
        assert!(!waits, "someone waits in vain: {:?}", self.master);
        for (handle, port) in &self.ports {
            assert_eq!(self.master.is_bound(*handle), !port.unbound);
        }
        assert!(
            self.honest.dismissed || self.master.is_connected(self.honest.id),
            "the honest worker was cut off"
        );
        let sizes = self.master.sizes();
        assert_eq!((sizes.actions, sizes.events), (0, 0), "not settled");
        assert!(sizes.handles <= 2 * MOST_LISTENERS + self.resting.len());
        // What has come back from one queue, and what is in two others.
        let most = 3 * ROOM * sizes.handles;
        let in_hand = usize::try_from(ledger.in_hand()).expect("few");
        assert!(in_hand <= most, "too many in hand: {ledger:?}");
        assert!(self.lied || self.queued() <= in_hand, "some are forgotten");
        // Two for each listener, and one that tells it to leave.
        assert!(self.hostile.answers <= 2 * self.hostile.frames + 1);
    }

    /// The hostile worker dies, and the honest one serves everybody. Then all ends.
    fn finish(&mut self) {
        self.sharing_fails = false;
        self.accepting_fails = false;
        self.giving_fails = false;
        self.taking_back_fails = false;
        self.taking_fails = false;
        self.reaction = 0;
        self.hang_up();
        self.settle();
        self.die();
        self.settle();
        let is_served = !self.honest.dismissed;
        if is_served {
            self.serve_all();
        }
        self.disconnected = 0;
        self.awaited = true;
        self.honest.dismissed = true;
        self.tell(|core| core.disconnect_all(true));
        self.settle();
        if is_served {
            self.serve_rest();
        }
        let id = self.honest.id;
        self.honest.exited = true;
        self.tell(|core| core.exited(id, ExitStatus::from_raw(0)));
        self.settle();
        self.pass(100);
        assert_eq!(self.disconnected, 1, "the end of disconnect");
        assert_eq!(self.master.sizes().handles, 0);
        assert_eq!(self.master.ledger().in_hand(), 0);
        assert!(self.ports.values().all(|port| port.unbound));
        assert!(self.queues.is_empty(), "a queue was forgotten");
        let taken = self.master.ledger().taken;
        assert!(self.lied || taken == self.out_of_queues, "{taken} taken");
        assert_eq!(self.policy, self.master.policy());
    }

    /// Everybody who has come is served, and one more at each listener.
    fn serve_all(&mut self) {
        self.exchange();
        let open: Vec<_> = self
            .ports
            .iter()
            .filter(|(_, port)| port.is_open())
            .collect();
        let open: Vec<_> = open.into_iter().map(|(handle, _)| *handle).collect();
        for handle in open {
            self.knock(handle);
        }
        let now = self.clients;
        self.serve_until(|world| {
            let bound = |port: &&Port| !port.unbound && !port.datagram;
            let mut backlogs = world.ports.values().filter(bound);
            backlogs.all(|port| port.backlog.is_empty()) && world.master.in_hand() == 0
        });
        assert_eq!(now, self.clients);
        for port in self.ports.values().filter(|port| !port.unbound) {
            let has_left = |c: &&Client| self.taken.contains(c) || self.swept.contains(c);
            assert_eq!(port.came.iter().find(|c| !has_left(c)), None, "lost");
        }
    }

    fn serve_rest(&mut self) {
        self.serve_until(|world| !world.honest.worker_end && !world.honest.master_end);
    }

    /// The honest program serves all its listeners until the goal is reached.
    fn serve_until(&mut self, goal: impl Fn(&Self) -> bool) {
        for _ in 0..10_000 {
            if goal(self) {
                return;
            }
            for listener in self.honest.listeners.clone() {
                let honest = &mut self.honest;
                if let Listen::Done(_) = honest.core.listen_result(listener) {
                    honest.core.set_most(listener, None);
                    if honest.accepting != Some(listener) {
                        honest.core.serve(listener);
                    }
                }
            }
            while let Some((_, listener)) = self.honest.held.pop() {
                self.honest.core.connection_closed(Some(listener));
            }
            self.exchange();
            self.wake();
            self.pass(100);
            self.settle();
            self.check();
        }
        panic!("somebody is not served: {:?}", self.master);
    }
}

impl Port {
    fn is_open(&self) -> bool {
        !self.unbound && !self.shut && !self.datagram
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::path::Path;

    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    use super::*;

    /// Runs what the fuzzer has found worth keeping.
    fn replay(target: &str, run: fn(&[u8])) {
        let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
        let corpus = std::fs::read_dir(corpora.join(target)).expect("a corpus");
        let inputs: Vec<_> = corpus.map(|input| input.expect("input").path()).collect();
        assert!(inputs.len() > 20, "only {} inputs", inputs.len());
        for input in inputs {
            println!("{}", input.display());
            run(&std::fs::read(input).expect("input"));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "reads files; slow")]
    fn frame_corpus() {
        replay("frame", frame);
    }

    #[test]
    #[cfg_attr(miri, ignore = "reads files; slow")]
    fn master_input_corpus() {
        replay("master_input", master_input);
    }

    /// Miri takes a thousand times as long.
    const LONGEST: usize = if cfg!(miri) { 40 } else { 600 };

    /// Frames that may be right but for their bodies.
    fn frames() -> impl Strategy<Value = Vec<u8>> {
        let kind = prop_oneof![0..10u8, 64..70u8, Just(127)];
        let body = proptest::collection::vec(prop_oneof![0..5u8, any::<u8>()], 0..40);
        let one = (kind, 0..3u8, 0..4u8, body).prop_map(|(kind, fds, batch, body)| {
            let length = u8::try_from(body.len()).unwrap_or(0);
            [&[length, 0, 0, 0, 1, kind, fds, batch], &body[..]].concat()
        });
        proptest::collection::vec(one, 0..8).prop_map(|frames| frames.concat())
    }

    /// What is said in one go, in the language of `World::step`.
    type Scene = BoxedStrategy<Vec<u8>>;

    fn many(scene: impl Strategy<Value = Vec<u8>> + 'static, most: usize) -> Scene {
        let scenes = proptest::collection::vec(scene, 0..most);
        scenes.prop_map(|scenes| scenes.concat()).boxed()
    }

    fn both(first: Scene, second: Scene) -> Scene {
        let pair = (first, second);
        pair.prop_map(|(first, second)| [first, second].concat())
            .boxed()
    }

    /// One or two that both workers use mostly, seldom one of many.
    fn endpoints() -> impl Strategy<Value = u8> {
        prop_oneof![6 => Just(0), 2 => 3..8u8, 1 => 0..32u8]
    }

    /// Handles count from 1, and few scripts get beyond the third.
    fn handles() -> impl Strategy<Value = u8> {
        prop_oneof![8 => Just(1), 3 => 2..4u8, 1 => 0..32u8]
    }

    /// Numbers of connections: as they should be, at the limits, and beyond.
    fn numbers() -> impl Strategy<Value = u8> {
        let most = u8::try_from(MAX_WINDOW).expect("few");
        prop_oneof![12 => 0..4u8, 2 => 4..=most, 1 => Just(most + 1), 1 => 0..240u8]
    }

    /// The hostile worker says a frame; `255` does not cut it in two.
    fn spoken(frame: &[u8], cut: u8) -> Vec<u8> {
        [&[0], frame, &[cut]].concat()
    }

    fn frame_of(kind: u8, handle: u8) -> u8 {
        handle * 8 + kind
    }

    /// It goes online, listens and is idle, as one of ours would.
    fn arrival() -> Scene {
        endpoints()
            .prop_map(|endpoint| vec![31, 0, 31, endpoint * 8, 31, 7])
            .boxed()
    }

    /// It takes something, or says something true.
    fn admission() -> Scene {
        any::<u8>().prop_map(|choice| vec![31, choice]).boxed()
    }

    /// It says something that is hardly true.
    fn lie() -> Scene {
        let ready = || (handles(), numbers());
        let frame = prop_oneof![
            1 => Just(vec![0]),
            3 => (numbers(), endpoints(), 0..3u8).prop_map(|(r, e, index)| vec![1, r, e, index]),
            1 => handles().prop_map(|handle| vec![frame_of(2, handle)]),
            3 => ready().prop_map(|(h, taken)| vec![frame_of(3, h), taken]),
            9 => ready().prop_map(|(h, beyond)| vec![frame_of(4, h), beyond]),
            1 => handles().prop_map(|handle| vec![frame_of(5, handle)]),
            3 => handles().prop_map(|handle| vec![frame_of(6, handle)]),
            1 => (0..31u8, 0..4u8).prop_map(|(length, fds)| vec![frame_of(7, length), fds]),
            1 => Just(vec![255]),
        ];
        let cut = prop_oneof![3 => Just(255), 1 => 0..30u8];
        (frame, cut)
            .prop_map(|(frame, cut)| spoken(&frame, cut))
            .boxed()
    }

    /// A new one asks for more listeners than it may have.
    fn greed() -> Scene {
        let one = |n: u16| {
            let [low, high] = n.to_le_bytes();
            spoken(&[1, 1, 0, 255, low, high, 0, 0, 0, 0, 0, 0], 255)
        };
        let most = u16::try_from(MOST_LISTENERS).expect("few");
        let all: Vec<_> = (0..most + 10).map(|n| n + 100).flat_map(one).collect();
        both(succession(), Just(all).boxed())
    }

    /// It dies, and another one comes.
    fn succession() -> Scene {
        let gone = prop_oneof![Just(vec![27, 28, 30, 15]), Just(vec![28, 27, 30, 15])];
        both(gone.boxed(), arrival())
    }

    /// The program of the honest worker listens, and serves what it has.
    fn service() -> Scene {
        let scene = (endpoints(), 4..8u8);
        scene
            .prop_map(|(endpoint, deed)| vec![11, endpoint * 8, 21, 11, 4, 11, deed, 21])
            .boxed()
    }

    /// The program of the honest worker closes a listener, perhaps when the master has no descriptor
    /// to empty the queue with, and asks for it again.
    fn second_thoughts() -> Scene {
        let lack = prop_oneof![Just(vec![]), Just(vec![30, 28])];
        let close = (16..24u8).prop_map(|at| vec![11, at * 8 + 7, 21]);
        both(both(lack.boxed(), close.boxed()), service())
    }

    /// One thing happens in the honest worker, to a client, or between the two and the master.
    fn event() -> Scene {
        prop_oneof![
            4 => (0..4u8, 0..8u8).prop_map(|(at, deed)| vec![11, at * 8 + deed]),
            1 => (128..=255u8).prop_map(|change| vec![11, change]),
            4 => (0..4u8, numbers()).prop_map(|(at, count)| vec![22, at, count]),
            3 => Just(vec![21]),
            1 => Just(vec![17]),
            1 => Just(vec![19]),
            1 => Just(vec![25]),
            1 => (0..150u8).prop_map(|millis| vec![26, millis]),
        ]
        .boxed()
    }

    /// The master's program does something, at once or when the next event comes. It dismisses the
    /// honest worker seldom, because then less is looked at.
    fn call() -> Scene {
        let choice = prop_oneof![20 => 0..22u8, 1 => 22..25u8, 15 => 25..32u8];
        let choice = (choice, 0..8u8).prop_map(|(choice, more)| choice + more * 32);
        let when = prop_oneof![1 => Just(29), 3 => Just(30)];
        (when, choice)
            .prop_map(|(when, choice)| vec![when, choice])
            .boxed()
    }

    fn junk() -> Scene {
        let bytes = proptest::collection::vec(any::<u8>(), 0..20);
        let scene = (bytes, any::<u8>());
        scene
            .prop_map(|(bytes, fds)| {
                let length = u8::try_from(bytes.len()).expect("few");
                [&[10, length, fds], &bytes[..]].concat()
            })
            .boxed()
    }

    /// Scripts that get far: both workers listen, connections come and go, and lies are told.
    fn scripts() -> impl Strategy<Value = Vec<u8>> {
        let policy = prop_oneof![5 => Just(vec![0]), 1 => Just(vec![3])];
        let beginning = prop_oneof![
            4 => both(service(), arrival()),
            1 => both(arrival(), service()),
            1 => many(event(), 4),
        ];
        let middle = prop_oneof![
            300 => event(),
            200 => admission(),
            20 => lie(),
            20 => call(),
            20 => service(),
            5 => second_thoughts(),
            20 => succession(),
            4 => junk(),
            1 => greed(),
        ];
        let opened = both(policy.boxed(), beginning.boxed());
        both(opened, many(middle, LONGEST / 10))
    }

    /// How far so many scripts must get together: about a tenth of what is usual.
    const ENOUGH: [(&str, usize); 8] = [
        (SERVED, 3000),
        (GIVEN, 150),
        (TAKEN, 80),
        (CAME_BACK, 70),
        (GIVEN_ELSEWHERE, 8),
        (LIES, 25),
        (DENIED, 60),
        (UNREAD_MAX, 50),
    ];
    const SCRIPTS: u32 = 1024;

    #[test]
    fn any_script_survives_the_master_input_target() {
        let config = ProptestConfig::default();
        let config = ProptestConfig {
            // They are quick, and there is much to reach.
            cases: config.cases.saturating_mul(4),
            failure_persistence: None,
            ..config
        };
        let cases = config.cases;
        let total = RefCell::new(Reached::new());
        let run = |script: Vec<u8>| {
            for (what, times) in play(&script) {
                *total.borrow_mut().entry(what).or_default() += times;
            }
            Ok(())
        };
        let outcome = TestRunner::new(config).run(&scripts(), run);
        outcome.unwrap_or_else(|error| panic!("{error}"));
        let total = total.take();
        println!("{total:#?}");
        if cases >= SCRIPTS {
            for (what, enough) in ENOUGH {
                assert!(
                    total.get(what).is_some_and(|times| *times >= enough),
                    "{what}: {total:?}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn any_frames_survive_the_frame_target(cuts: [u8; 6], frames in frames()) {
            let control = [cuts[0], cuts[1], 4, cuts[2], cuts[3], cuts[4], cuts[5]];
            frame(&[&control, &frames[..]].concat());
        }

        #[test]
        fn any_bytes_survive_the_master_input_target(
            input in proptest::collection::vec(any::<u8>(), 0..LONGEST)
        ) {
            master_input(&input);
        }
    }
}
