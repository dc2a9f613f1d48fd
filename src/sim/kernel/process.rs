//! Represents processes and their channels as plain data.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::process::ExitStatus;

use super::socket::{Client, Port};
use super::worker::lingering::Lingering;
use crate::core::master::{Attachment, Resumed};
use crate::core::worker::{self as worker_core, ListenerId, WorkerCore};
use crate::types::connection_id::ConnectionId;
use crate::types::handle::HandleId;
use crate::types::protocol::FrameError;
use crate::types::signal::Signal;
use crate::types::time::Time;
use crate::types::user::User;
use crate::wire::channel::inbox::Inbox;
use crate::wire::frame::{ToMaster, ToWorker};

/// The number of written and unread frames that fit into one direction of a channel. The number is
/// small, so that channels are often full.
const CAPACITY: usize = 6;

/// A connection that a worker's application has received.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) client: Client,
    pub(crate) listener: ListenerId,
    /// The master's handle of the listener. `None` for a private listener.
    pub(crate) handle: Option<HandleId>,
    /// The connection's id, and the number of times that it has been parked, if the master holds a
    /// copy.
    pub(crate) resumed: Option<Resumed>,
    /// The number of times that the connection has been parked.
    pub(crate) times_parked: u32,
}

/// A frame and the descriptor that it carries. The frame is an error if the writer wrote bytes that
/// are not a frame.
#[derive(Debug)]
pub(crate) struct Parcel<F> {
    pub(crate) frame: Result<F, FrameError>,
    pub(crate) attachment: Attachment,
    /// The connection that a worker parks with this frame, or that the master moves to a worker.
    pub(crate) connection: Option<Client>,
    /// Whether the kernel dropped the attached descriptor, because the receiver's descriptors were
    /// exhausted.
    pub(crate) lost_fd: bool,
}

impl<F> Parcel<F> {
    pub(crate) fn new(frame: Result<F, FrameError>, attachment: Attachment) -> Self {
        Self {
            frame,
            attachment,
            connection: None,
            lost_fd: false,
        }
    }
}

/// One direction of a channel.
#[derive(Debug)]
pub(crate) struct Pipe<F> {
    /// The frames that the writer has not written.
    pub(crate) outbox: VecDeque<Parcel<F>>,
    /// The frames that the writer has written and the reader has not read.
    pub(crate) wire: VecDeque<Parcel<F>>,
    /// Whether the writer can no longer write.
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
    pub(crate) fn queue(&mut self, frame: F, attachment: Attachment) {
        if !self.is_broken {
            self.outbox.push_back(Parcel::new(Ok(frame), attachment));
        }
    }

    /// Queues a frame that carries a connection.
    pub(crate) fn queue_connection(&mut self, frame: F, connection: Client) {
        if !self.is_broken {
            let mut parcel = Parcel::new(Ok(frame), Attachment::None);
            parcel.connection = Some(connection);
            self.outbox.push_back(parcel);
        }
    }

    /// Stops the writer, and drops its unwritten frames. The reader can still read frames that have
    /// been written.
    pub(crate) fn close_writer(&mut self) {
        self.is_broken = true;
        self.outbox.clear();
    }

    pub(crate) fn can_write(&self) -> bool {
        !self.outbox.is_empty() && self.wire.len() < CAPACITY
    }

    /// Writes the first frame in the outbox if there is space. `inspect` may change the frame
    /// before it is written. Returns whether a frame was written.
    pub(crate) fn write(&mut self, inspect: impl FnOnce(&mut Parcel<F>)) -> bool {
        let can_write = self.can_write();
        if can_write {
            let mut parcel = self.outbox.pop_front().expect("a frame");
            inspect(&mut parcel);
            self.wire.push_back(parcel);
        }
        can_write
    }

    /// Returns all frames that the reader has not read, whether written or not.
    pub(crate) fn parcels(&self) -> impl Iterator<Item = &Parcel<F>> {
        self.wire.iter().chain(&self.outbox)
    }
}

/// The last event in a worker's lifecycle that was delivered on one level. The variants are in the
/// order of the events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Life {
    #[default]
    Forked,
    Online,
    Disconnected,
    Gone,
}

/// The state of a detached process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detached {
    Running,
    /// The process has exited, but the master has not reaped it.
    Zombie(ExitStatus),
    Reaped(ExitStatus),
    /// The process's last event has been delivered.
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
        /// The last signal that arrived while the process was stopped. It kills the process when
        /// the process continues.
        pending: Option<Signal>,
    },
    Zombie(ExitStatus),
    /// The master has reaped the process, and another process may have its id now.
    Reaped(ExitStatus),
}

/// Counters for one worker. `check` compares `answers` with `frames`, because each frame may cause
/// only a few answers. With the other counters, a test checks that its scripts reach enough cases.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) dispatched: usize,
    pub(crate) received: usize,
    pub(crate) reclaimed: usize,
    /// The number of the worker's frames that the master has processed.
    pub(crate) frames: u64,
    /// The number of frames that the master's core has sent to the worker, without the messages of
    /// the application.
    pub(crate) answers: u64,
    /// The number of `Idle` frames that reported more connections than the worker had received.
    pub(crate) false_claims: usize,
    /// 1 if the master has discarded the worker's channel without reading the remaining frames, and
    /// 0 otherwise.
    pub(crate) discarded: usize,
}

/// A worker's process, including its library and its application.
#[derive(Debug, Default)]
pub(crate) struct Process {
    pub(crate) user: User,
    pub(crate) core: WorkerCore<()>,
    pub(crate) actions: VecDeque<worker_core::Action>,
    pub(crate) state: ProcessState,
    /// The last delivered events on the worker's level and on the cluster's level.
    pub(crate) life: [Life; 2],
    /// The inbox of the master's end of the channel if the worker is raw. A raw worker runs no code
    /// of this crate: the driver writes the worker's bytes and decides when the worker exits.
    pub(crate) inbox: Option<Inbox>,
    /// Whether the worker is raw or has sent forged frames. The checks do not trust this worker's
    /// frames.
    pub(crate) is_liar: bool,
    /// Whether the worker's application has killed the worker, closed the channel or dropped a
    /// listener. Only such a worker may close its channel while it holds connections.
    pub(crate) is_careless: bool,
    /// Whether the worker's disconnect tokens are readable.
    pub(crate) is_marked: bool,
    /// Whether the worker's application was notified that the worker is disconnecting.
    pub(crate) was_notified: bool,
    /// The listeners of the worker's application.
    pub(crate) listeners: Vec<ListenerId>,
    /// The master's listeners of which the worker has a copy or a queue, by the listeners' ids in
    /// the worker.
    pub(crate) shared: BTreeMap<ListenerId, HandleId>,
    /// The listeners that the worker has opened itself and shares with no other process.
    pub(crate) private: BTreeMap<ListenerId, Port>,
    /// The listeners that the worker's poller watches for a callback.
    pub(crate) watched: BTreeSet<ListenerId>,
    /// The open connections of the worker's application, each with its listener.
    pub(crate) held: Vec<Received>,
    /// The connections that the worker holds while their clients send nothing.
    pub(crate) parked: BTreeMap<ConnectionId, Client>,
    pub(crate) lingering: BTreeMap<ConnectionId, Lingering>,
    /// The connections that a raw worker parks with its next frames. If there are none, the worker
    /// parks a connection that it has opened itself.
    pub(crate) to_park: VecDeque<Client>,
    /// The connection limits that were set when the listeners were opened. A limit is removed when
    /// the application changes it, because the application may then hold more connections.
    pub(crate) limits: BTreeMap<ListenerId, usize>,
    /// Whether few of the process's descriptors are free.
    pub(crate) fds_are_scarce: bool,
    /// The listener on which the worker's application blocks in `accept`.
    pub(crate) accepting: Option<ListenerId>,
    pub(crate) up: Pipe<ToMaster>,
    pub(crate) down: Pipe<ToWorker>,
    /// Whether the worker has frames that it has not tried to write.
    pub(crate) is_unflushed: bool,
    /// Whether the worker shuts the channel down once all its frames are written.
    pub(crate) is_closing: bool,
    /// Whether one side has shut the channel down, so that neither side can write.
    pub(crate) is_shut: bool,
    /// Whether the descriptor of the master's end is open.
    pub(crate) master_end: bool,
    /// Whether the descriptor of the worker's end is open.
    pub(crate) worker_end: bool,
    /// The time by which the process must have exited, or `None` if it may run forever.
    pub(crate) deadline: Option<Time>,
    /// The time before which the master writes nothing to the worker.
    pub(crate) master_backoff: Time,
    /// The time at which the worker's back-off ends, or `None` if the worker does not back off.
    pub(crate) worker_backoff: Option<Time>,
    /// The numbers of the last messages sent to the master and to the worker.
    pub(crate) sent: [u32; 2],
    /// The numbers of the last messages that the master and the worker received.
    pub(crate) received: [u32; 2],
    pub(crate) counters: Counters,
}

impl Default for WorkerCore<()> {
    fn default() -> Self {
        Self::new()
    }
}

impl Process {
    pub(crate) fn new(user: User, inbox: Option<Inbox>) -> Self {
        Self {
            user,
            is_liar: inbox.is_some(),
            inbox,
            master_end: true,
            worker_end: true,
            ..Self::default()
        }
    }

    /// Makes the process exit, which closes all its descriptors.
    pub(crate) fn exit(&mut self, status: ExitStatus) {
        self.state = ProcessState::Zombie(status);
        self.close_end();
        self.shared.clear();
        self.private.clear();
        self.watched.clear();
        self.held.clear();
        self.parked.clear();
        self.lingering.clear();
        self.to_park.clear();
        self.listeners.clear();
        self.actions.clear();
        self.core = WorkerCore::new();
    }

    /// Closes the worker's descriptor of the channel. The master can still read the frames that the
    /// worker has written.
    pub(crate) fn close_end(&mut self) {
        self.worker_end = false;
        self.up.close_writer();
        self.down.wire.clear();
    }

    /// Closes the master's descriptor of the channel. The master reads no more frames.
    pub(crate) fn close_master_end(&mut self) {
        self.down.close_writer();
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

    /// Returns whether all events of the worker have been delivered on both levels.
    pub(crate) fn has_gone(&self) -> bool {
        self.life == [Life::Gone; 2]
    }

    /// Returns whether the worker's library has work to do besides reading.
    pub(crate) fn has_work(&self, now: Time) -> bool {
        let is_due = self.worker_backoff.is_some_and(|time| time <= now);
        let can_act = !self.actions.is_empty() || self.is_unflushed || self.core.has_events();
        let can_write = self.worker_end && self.up.can_write();
        self.is_running() && !self.is_raw() && (is_due || can_act || can_write)
    }

    /// Returns whether the worker's library has any work to do, including reading.
    pub(crate) fn is_busy(&self, now: Time) -> bool {
        let is_over = !self.worker_end || self.is_shut || !self.master_end;
        let can_read = !self.down.wire.is_empty() || is_over && self.core.is_connected();
        self.has_work(now) || self.is_running() && !self.is_raw() && can_read
    }
}
