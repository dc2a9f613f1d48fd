//! What the simulated kernel knows of processes, channels, listeners and connections.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::process::ExitStatus;
use std::rc::Rc;

use crate::core::master::Attachment;
use crate::core::worker::{self as worker_core, ListenerId, WorkerCore};
use crate::types::endpoint::Kind;
use crate::types::signal::Signal;
use crate::types::time::Time;
use crate::wire::frame::{FrameError, HandleId, ToMaster, ToWorker};

/// How many frames a channel holds that have been written and not read.
const CAPACITY: usize = 6;

/// All descriptors of one connection together: when the last one is closed, so is the connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) client: u32,
    closed: Rc<RefCell<Vec<u32>>>,
}

/// A descriptor of a connection.
pub(super) type Client = Rc<Connection>;

impl Connection {
    pub(super) fn new(client: u32, closed: &Rc<RefCell<Vec<u32>>>) -> Client {
        let closed = Rc::clone(closed);
        Rc::new(Self { client, closed })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.closed.borrow_mut().push(self.client);
    }
}

/// A frame and the descriptor that travels with it.
#[derive(Debug)]
pub(super) struct Parcel<F> {
    pub(super) frame: Result<F, FrameError>,
    pub(super) with: Attachment,
    /// The descriptor found no room where it should have arrived.
    pub(super) is_robbed: bool,
}

impl<F> Parcel<F> {
    pub(super) fn new(frame: Result<F, FrameError>, with: Attachment) -> Self {
        Self {
            frame,
            with,
            is_robbed: false,
        }
    }
}

/// What came of writing a frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Written {
    Something,
    Nothing,
    /// There is room for nothing more until the other side reads.
    Full,
}

/// One direction of a channel.
#[derive(Debug)]
pub(super) struct Way<F> {
    pub(super) outbox: VecDeque<Parcel<F>>,
    pub(super) wire: VecDeque<Parcel<F>>,
    /// The writer can write nothing more.
    pub(super) broken: bool,
    /// Something was to be written and has not been.
    pub(super) lost: bool,
}

impl<F> Way<F> {
    fn new() -> Self {
        Self {
            outbox: VecDeque::new(),
            wire: VecDeque::new(),
            broken: false,
            lost: false,
        }
    }

    pub(super) fn queue(&mut self, frame: F, with: Attachment) {
        self.lost |= self.broken;
        if !self.broken {
            self.outbox.push_back(Parcel::new(Ok(frame), with));
        }
    }

    /// What is not written yet never will be.
    pub(super) fn break_off(&mut self) {
        self.broken = true;
        self.lost |= !self.outbox.is_empty();
        self.outbox.clear();
    }

    pub(super) fn can_write(&self) -> bool {
        !self.outbox.is_empty() && self.wire.len() < CAPACITY
    }

    /// Writes one frame. `seen` looks at it.
    pub(super) fn write(&mut self, seen: impl FnOnce(&mut Parcel<F>)) -> Written {
        if self.wire.len() >= CAPACITY && !self.outbox.is_empty() {
            return Written::Full;
        }
        let Some(mut parcel) = self.outbox.pop_front() else {
            return Written::Nothing;
        };
        seen(&mut parcel);
        self.wire.push_back(parcel);
        Written::Something
    }
}

/// A listening socket.
#[derive(Debug, Default)]
pub(super) struct Port {
    pub(super) backlog: VecDeque<u32>,
    pub(super) shut: bool,
    pub(super) watched: bool,
    pub(super) kind: Option<Kind>,
    /// The master has closed its descriptor; a worker's copy keeps a shared one open.
    pub(super) unbound: bool,
}

impl Port {
    pub(super) fn lets_in(&self) -> bool {
        !self.unbound && !self.shut && self.kind != Some(Kind::Udp)
    }

    /// Whether the poller reports it.
    pub(super) fn is_ready(&self) -> bool {
        self.watched && !self.unbound && !self.backlog.is_empty()
    }
}

/// How far a worker's events have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Life {
    Forked,
    Online,
    Disconnected,
    Gone,
}

/// A detached process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Detached {
    Running,
    /// It has exited, and the master has not reaped it.
    Zombie(ExitStatus),
    Reaped(ExitStatus),
    /// Its last event has been delivered.
    Gone,
}

impl Detached {
    pub(super) fn runs(self) -> bool {
        self == Self::Running
    }
}

#[derive(Debug)]
pub(super) struct Process {
    pub(super) core: WorkerCore,
    pub(super) actions: VecDeque<worker_core::Action>,
    pub(super) alive: bool,
    pub(super) stopped: bool,
    /// Sent while it was stopped.
    pub(super) signal: Option<Signal>,
    /// Set when the master may learn of the death.
    pub(super) status: Option<ExitStatus>,
    /// The number of the process may belong to somebody else now.
    pub(super) reaped: bool,
    /// Its events so far, at the level of the worker and of the cluster.
    pub(super) life: [Life; 2],
    /// It has sent frames of its own making: its word means nothing any more.
    pub(super) liar: bool,
    /// Its own channel has been closed behind its back.
    pub(super) hurt: bool,
    /// The program has said that it does not care for what it holds.
    pub(super) careless: bool,
    pub(super) listeners: Vec<ListenerId>,
    /// The copies of the master's listeners, and the ends of queues.
    pub(super) shared: BTreeMap<ListenerId, HandleId>,
    /// Listeners of its own.
    pub(super) own: BTreeMap<ListenerId, Port>,
    pub(super) held: Vec<(Client, ListenerId)>,
    /// How many the program wants at most, where it has said so before the first.
    pub(super) limits: BTreeMap<ListenerId, usize>,
    /// It has hardly any descriptors left.
    pub(super) scarce: bool,
    /// The program waits in `accept`, and does nothing else meanwhile.
    pub(super) accepting: Option<ListenerId>,
    pub(super) up: Way<ToMaster>,
    pub(super) down: Way<ToWorker>,
    /// The worker has frames that it has not tried to write.
    pub(super) unflushed: bool,
    /// The worker's end closes when everything is written.
    pub(super) closing: bool,
    /// Shut down by one of the two: neither can write any more.
    pub(super) shut: bool,
    /// The descriptors of both ends.
    pub(super) master_end: bool,
    pub(super) worker_end: bool,
    /// It is to be gone then.
    pub(super) deadline: Option<Time>,
    /// The master writes nothing to it before this time.
    pub(super) rests_until: Time,
    /// The worker leaves its queues alone before this time.
    pub(super) rested_at: Option<Time>,
    /// The numbers of the last messages sent and received, up and down.
    pub(super) sent: [u32; 2],
    pub(super) received: [u32; 2],
}

impl Process {
    pub(super) fn new() -> Self {
        Self {
            core: WorkerCore::new(),
            actions: VecDeque::new(),
            alive: true,
            stopped: false,
            signal: None,
            status: None,
            reaped: false,
            life: [Life::Forked; 2],
            liar: false,
            hurt: false,
            careless: false,
            listeners: Vec::new(),
            shared: BTreeMap::new(),
            own: BTreeMap::new(),
            held: Vec::new(),
            limits: BTreeMap::new(),
            scarce: false,
            accepting: None,
            up: Way::new(),
            down: Way::new(),
            unflushed: false,
            closing: false,
            shut: false,
            master_end: true,
            worker_end: true,
            deadline: None,
            rests_until: Time::ZERO,
            rested_at: None,
            sent: [0; 2],
            received: [0; 2],
        }
    }

    /// Closes everything that it has.
    pub(super) fn die(&mut self, status: ExitStatus) {
        self.alive = false;
        self.status = Some(status);
        self.close_end();
        self.shared.clear();
        self.own.clear();
        self.held.clear();
        self.listeners.clear();
        self.actions.clear();
        self.core = WorkerCore::new();
    }

    /// The descriptor of the channel is closed; what has been written can still be read.
    pub(super) fn close_end(&mut self) {
        self.worker_end = false;
        self.up.break_off();
        self.down.wire.clear();
    }

    pub(super) fn has_gone(&self) -> bool {
        self.life == [Life::Gone; 2]
    }

    pub(super) fn runs(&self) -> bool {
        self.alive && !self.stopped
    }

    /// Whether it has something to do, whatever its program does.
    pub(super) fn is_busy(&self, now: Time) -> bool {
        let rested = self.rested_at.is_some_and(|time| time <= now);
        let to_do = rested || !self.actions.is_empty() || self.unflushed || self.core.has_events();
        let to_write = self.worker_end && self.up.can_write();
        let over = !self.worker_end || self.shut || !self.master_end;
        let to_read = !self.down.wire.is_empty() || over && self.core.is_connected();
        self.runs() && (to_do || to_write || to_read)
    }
}
