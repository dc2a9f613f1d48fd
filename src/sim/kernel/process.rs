//! Processes and their channels, as plain data.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::process::ExitStatus;

use super::socket::{Client, Port};
use crate::core::master::Attachment;
use crate::core::worker::{self as worker_core, ListenerId, WorkerCore};
use crate::types::signal::Signal;
use crate::types::time::Time;
use crate::wire::channel::inbox::Inbox;
use crate::wire::frame::{FrameError, HandleId, ToMaster, ToWorker};

/// The number of frames that fit into a channel between the writer and the reader. Small, so that
/// channels are often full.
const CAPACITY: usize = 6;

/// A frame and the descriptor that travels with it.
#[derive(Debug)]
pub(crate) struct Parcel<F> {
    pub(crate) frame: Result<F, FrameError>,
    pub(crate) with: Attachment,
    /// The kernel dropped the attached descriptor, because the receiver had none left.
    pub(crate) lost_fd: bool,
}

impl<F> Parcel<F> {
    pub(crate) fn new(frame: Result<F, FrameError>, with: Attachment) -> Self {
        Self {
            frame,
            with,
            lost_fd: false,
        }
    }
}

/// One direction of a channel.
#[derive(Debug)]
pub(crate) struct Pipe<F> {
    /// Frames that the writer has not written.
    pub(crate) outbox: VecDeque<Parcel<F>>,
    /// Frames that the reader has not read.
    pub(crate) wire: VecDeque<Parcel<F>>,
    /// The writer can write nothing more.
    pub(crate) is_broken: bool,
}

impl<F> Default for Pipe<F> {
    fn default() -> Self {
        Self {
            outbox: VecDeque::new(),
            wire: VecDeque::new(),
            is_broken: false,
        }
    }
}

impl<F> Pipe<F> {
    pub(crate) fn queue(&mut self, frame: F, with: Attachment) {
        if !self.is_broken {
            self.outbox.push_back(Parcel::new(Ok(frame), with));
        }
    }

    /// Nothing more is written. Frames that have been written can still be read.
    pub(crate) fn break_off(&mut self) {
        self.is_broken = true;
        self.outbox.clear();
    }

    pub(crate) fn can_write(&self) -> bool {
        !self.outbox.is_empty() && self.wire.len() < CAPACITY
    }

    /// Writes one frame, which `inspect` may change. Returns whether there was one, and space for it.
    pub(crate) fn write(&mut self, inspect: impl FnOnce(&mut Parcel<F>)) -> bool {
        let can_write = self.can_write();
        if can_write {
            let mut parcel = self.outbox.pop_front().expect("a frame");
            inspect(&mut parcel);
            self.wire.push_back(parcel);
        }
        can_write
    }

    /// All frames that the reader has not read.
    pub(crate) fn parcels(&self) -> impl Iterator<Item = &Parcel<F>> {
        self.wire.iter().chain(&self.outbox)
    }
}

/// The progress of a worker's events, on one level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Life {
    #[default]
    Forked,
    Online,
    Disconnected,
    Gone,
}

/// A detached process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detached {
    Running,
    /// It has exited, and the master has not reaped it.
    Zombie(ExitStatus),
    Reaped(ExitStatus),
    /// Its last event has been delivered.
    Gone,
}

impl Detached {
    pub(crate) fn is_running(self) -> bool {
        self == Self::Running
    }
}

/// The state of a worker's process.
///
/// ```text
///   Running <--> Stopped --- SIGKILL, or continued with a signal pending ---> Zombie --> Reaped
///      '---------- it exits or a signal kills it --------------------------------^
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ProcessState {
    #[default]
    Running,
    Stopped {
        /// A signal that arrived while the process was stopped.
        pending: Option<Signal>,
    },
    Zombie(ExitStatus),
    /// Another process may have its id now.
    Reaped(ExitStatus),
}

/// Counters of what happened to one worker, which show whether a test reaches enough.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) dispatched: usize,
    pub(crate) received: usize,
    pub(crate) reclaimed: usize,
    /// Frames of the worker that the master has processed.
    pub(crate) frames: u64,
    /// Frames that the master sent, other than messages.
    pub(crate) answers: u64,
    /// `Idle` frames that claim more connections than the worker received.
    pub(crate) false_claims: usize,
    /// Channels that the master discarded unread.
    pub(crate) discarded: usize,
}

/// A worker's process.
#[derive(Debug, Default)]
pub(crate) struct Process {
    pub(crate) core: WorkerCore<()>,
    pub(crate) actions: VecDeque<worker_core::Action>,
    pub(crate) state: ProcessState,
    /// The progress of its events, on the level of the worker and of the cluster.
    pub(crate) life: [Life; 2],
    /// The master's end of the channel of a raw worker. A raw worker is no program of ours: the
    /// driver writes its bytes, and decides when it exits.
    pub(crate) inbox: Option<Inbox>,
    /// It has sent frames of its own making: nothing that it says is a proof.
    pub(crate) is_liar: bool,
    /// Its application does not care about the connections that it holds.
    pub(crate) is_careless: bool,
    /// The listeners that its application has.
    pub(crate) listeners: Vec<ListenerId>,
    /// Copies of the master's listeners, and ends of queues.
    pub(crate) shared: BTreeMap<ListenerId, HandleId>,
    /// Private listeners.
    pub(crate) private: BTreeMap<ListenerId, Port>,
    /// The listeners that its poller watches for a callback.
    pub(crate) watched: BTreeSet<ListenerId>,
    pub(crate) held: Vec<(Client, ListenerId)>,
    /// The connection limit of each listener, where it was set before the first connection.
    pub(crate) limits: BTreeMap<ListenerId, usize>,
    /// It has hardly any descriptors left.
    pub(crate) fds_are_scarce: bool,
    /// The listener on which its application blocks in `accept`.
    pub(crate) accepting: Option<ListenerId>,
    pub(crate) up: Pipe<ToMaster>,
    pub(crate) down: Pipe<ToWorker>,
    /// The worker has frames that it has not tried to write.
    pub(crate) is_unflushed: bool,
    /// The worker's end closes when everything is written.
    pub(crate) is_closing: bool,
    /// One side has shut the channel down: neither can write any more.
    pub(crate) is_shut: bool,
    /// The descriptor of each end is open.
    pub(crate) master_end: bool,
    pub(crate) worker_end: bool,
    /// The process must have exited at this time.
    pub(crate) deadline: Option<Time>,
    /// The master writes nothing to it before this time.
    pub(crate) master_backoff: Time,
    /// The worker leaves its queues alone before this time.
    pub(crate) worker_backoff: Option<Time>,
    /// The numbers of the last messages sent and received, up and down.
    pub(crate) sent: [u32; 2],
    pub(crate) received: [u32; 2],
    pub(crate) counters: Counters,
}

impl Default for WorkerCore<()> {
    fn default() -> Self {
        Self::new()
    }
}

impl Process {
    pub(crate) fn new(inbox: Option<Inbox>) -> Self {
        Self {
            is_liar: inbox.is_some(),
            inbox,
            master_end: true,
            worker_end: true,
            ..Self::default()
        }
    }

    /// The process exits: everything that it has open closes.
    pub(crate) fn exit(&mut self, status: ExitStatus) {
        self.state = ProcessState::Zombie(status);
        self.close_end();
        self.shared.clear();
        self.private.clear();
        self.watched.clear();
        self.held.clear();
        self.listeners.clear();
        self.actions.clear();
        self.core = WorkerCore::new();
    }

    /// Closes the worker's descriptor of the channel. The master can still read its frames.
    pub(crate) fn close_end(&mut self) {
        self.worker_end = false;
        self.up.break_off();
        self.down.wire.clear();
    }

    /// The master closes its descriptor of the channel, and reads nothing more.
    pub(crate) fn close_master_end(&mut self) {
        self.down.break_off();
        self.up.wire.clear();
        self.is_shut = true;
        self.master_end = false;
    }

    pub(crate) fn is_raw(&self) -> bool {
        self.inbox.is_some()
    }

    pub(crate) fn is_alive(&self) -> bool {
        matches!(
            self.state,
            ProcessState::Running | ProcessState::Stopped { .. }
        )
    }

    pub(crate) fn is_running(&self) -> bool {
        self.state == ProcessState::Running
    }

    pub(crate) fn is_reaped(&self) -> bool {
        matches!(self.state, ProcessState::Reaped(_))
    }

    pub(crate) fn status(&self) -> Option<ExitStatus> {
        match self.state {
            ProcessState::Running | ProcessState::Stopped { .. } => None,
            ProcessState::Zombie(status) | ProcessState::Reaped(status) => Some(status),
        }
    }

    /// Whether all its events have been delivered.
    pub(crate) fn has_gone(&self) -> bool {
        self.life == [Life::Gone; 2]
    }

    /// Whether its library has something to do besides reading.
    pub(crate) fn has_work(&self, now: Time) -> bool {
        let is_due = self.worker_backoff.is_some_and(|time| time <= now);
        let can_act = !self.actions.is_empty() || self.is_unflushed || self.core.has_events();
        let can_write = self.worker_end && self.up.can_write();
        self.is_running() && !self.is_raw() && (is_due || can_act || can_write)
    }

    /// Whether its library has anything to do.
    pub(crate) fn is_busy(&self, now: Time) -> bool {
        let is_over = !self.worker_end || self.is_shut || !self.master_end;
        let can_read = !self.down.wire.is_empty() || is_over && self.core.is_connected();
        self.has_work(now) || self.is_running() && !self.is_raw() && can_read
    }
}
