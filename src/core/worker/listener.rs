//! Opening, draining and closing a worker's listener.

use std::collections::VecDeque;
use std::net::SocketAddr;

use super::capacity::QueueReport;
use super::{Action, ListenStatus, WorkerCore};
use crate::types::connection_id::ConnectionId;
use crate::types::endpoint::{BindFlags, Endpoint, Kind, Parking};
use crate::types::errno;
use crate::types::handle::HandleId;
use crate::types::handle::HandleKey;
use crate::types::policy::SchedulingPolicy;
use crate::types::poll_number::next_poll_number;
use crate::types::protocol::FrameError;
use crate::types::protocol::Violation;
use crate::wire::frame::{Bound, ToMaster, Unreceived};

/// Identifies a listener of this worker. The number is reused only after the listener's entry has
/// been removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ListenerId(pub(crate) u32);

/// The stage of a listener.
///
/// | stage | event | next |
/// |---|---|---|
/// | (none) | `listen` | `Requested` |
/// | (none) | `listen_privately` | `Open(None)` |
/// | (none) | `listen` or `listen_privately`, while the worker is disconnecting | `Closed` |
/// | `Requested` | reply | `Open(Some(_))` or `Failed` |
/// | `Requested` | `close`, `forget`, or the worker disconnects | `Abandoned` |
/// | `Abandoned` | reply | removed, and released if it was bound |
/// | `Open` | the master ends and drains it, or the worker disconnects (private listeners) | `Draining`; `Closed` for datagrams |
/// | `Open` | the master ends it, and no other worker serves the idle clients that have sent something | `ServingParked`; `Closed` if there are none |
/// | `ServingParked` | the application has received the last of their connections | `Closed` |
/// | `Open`, `Draining`, `ServingParked` | `close`, `forget`, or the master ends it, and other workers continue to serve | `Closed` |
/// | all but `Failed` | the channel closes | `Closed` |
///
/// The payload of `Open`, `Draining` and `ServingParked` is the master's handle of the listener.
/// Private listeners have no handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Requested,
    /// The worker no longer needs the listener, and closes it when the reply arrives.
    Abandoned,
    /// The master rejected the request. The value is the errno.
    Failed(i32),
    Open(Option<HandleId>),
    /// The listener receives no new connections. The application can still accept those in the
    /// backlog or queue.
    Draining(Option<HandleId>),
    /// The application can still receive the parked connections whose clients have sent something.
    ServingParked(Option<HandleId>),
    Closed,
}

/// The part of the application that receives a listener's connections.
///
/// | receiver | event | next |
/// |---|---|---|
/// | `Accept` | `use_callback` | `Callback` |
/// | `Callback` | `remove_callback` | `Accept` |
/// | `Accept` | `use_std` | `Std` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Receiver {
    /// Blocking calls of `accept`.
    Accept,
    Callback,
    /// Code that accepts from a copy of the listening socket, without this crate.
    Std,
}

#[derive(Debug)]
pub(super) struct Entry {
    kind: Kind,
    /// The key that the worker requested from the master. `None` for a private listener.
    key: Option<HandleKey>,
    address: Option<SocketAddr>,
    policy: SchedulingPolicy,
    pub(super) stage: Stage,
    pub(super) receiver: Receiver,
    /// The number of connections received from the queue.
    pub(super) received: u64,
    /// The last report about the queue that the worker sent to the master.
    pub(super) report: QueueReport,
    /// The number of this listener's connections that the application holds.
    pub(super) open_connections: u64,
    /// The maximum number of open connections that the application wants.
    pub(super) connection_limit: Option<u64>,
    /// Whether connections beyond the limit are received and dropped, instead of being left to
    /// other workers.
    pub(super) drops_excess: bool,
    /// Whether the listener keeps the application running.
    pub(super) referenced: bool,
    /// Whether the worker has sent `Listening` to the master.
    listening_sent: bool,
    /// How connections that the worker holds itself are treated while their clients are silent.
    pub(super) parking: Parking,
    /// The parked connections whose clients have sent something.
    pub(super) resumed: VecDeque<ConnectionId>,
}

impl Entry {
    /// Returns the key under which the master has bound, or may bind, a listener for this worker.
    fn key_in_use(&self) -> Option<&HandleKey> {
        match self.stage {
            // The master may already have bound the abandoned listener. The reply frees the key.
            Stage::Requested
            | Stage::Abandoned
            | Stage::Open(_)
            | Stage::Draining(_)
            | Stage::ServingParked(_) => self.key.as_ref(),
            Stage::Failed(_) | Stage::Closed => None,
        }
    }

    pub(super) fn handle(&self) -> Option<HandleId> {
        match self.stage {
            Stage::Open(handle) | Stage::Draining(handle) | Stage::ServingParked(handle) => handle,
            Stage::Requested | Stage::Abandoned | Stage::Failed(_) | Stage::Closed => None,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(
            self.stage,
            Stage::Open(_) | Stage::Draining(_) | Stage::ServingParked(_)
        )
    }

    pub(super) fn has_callback(&self) -> bool {
        self.receiver == Receiver::Callback
    }

    pub(super) fn has_queue(&self) -> bool {
        self.key.is_some() && self.policy == SchedulingPolicy::RoundRobin
    }

    /// Returns whether the worker holds connections of the listener while their clients are silent.
    pub(super) fn holds_connections(&self) -> bool {
        matches!(self.stage, Stage::Open(_)) && !self.has_queue() && self.receiver != Receiver::Std
    }
}

// Listener queries.
impl<F> WorkerCore<F> {
    pub(crate) fn listen_status(&self, listener: ListenerId) -> ListenStatus {
        match self.listeners.get(&listener) {
            Some(entry) => match entry.stage {
                Stage::Requested => ListenStatus::Pending,
                Stage::Failed(errno) => ListenStatus::Failed(errno),
                Stage::Open(_)
                | Stage::Draining(_)
                | Stage::ServingParked(_)
                | Stage::Abandoned
                | Stage::Closed => ListenStatus::Done(entry.address),
            },
            // The listener was abandoned, and the reply has removed it.
            None => ListenStatus::Done(None),
        }
    }

    /// Returns whether the application can expect no more connections.
    pub(crate) fn has_ended(&self, listener: ListenerId) -> bool {
        match self.listeners.get(&listener) {
            Some(entry) => match entry.stage {
                // A listener in the last two of these stages has not ended, because it closes only when
                // `accept` finds no connection.
                Stage::Requested
                | Stage::Open(_)
                | Stage::Draining(_)
                | Stage::ServingParked(_) => false,
                Stage::Failed(_) | Stage::Abandoned | Stage::Closed => true,
            },
            None => true,
        }
    }

    pub(crate) fn is_datagram(&self, listener: ListenerId) -> bool {
        let entry = self.listeners.get(&listener);
        entry.is_some_and(|entry| entry.kind == Kind::Udp)
    }

    /// Returns whether any callback waits for connections or datagrams.
    pub(crate) fn has_any_callback(&self) -> bool {
        self.listeners.values().any(Entry::has_callback)
    }

    pub(crate) fn has_callback(&self, listener: ListenerId) -> bool {
        let entry = self.listeners.get(&listener);
        entry.is_some_and(Entry::has_callback)
    }

    /// Returns the master's handle of a listener. Returns `None` for a private listener, and for a
    /// listener that is not open.
    pub(crate) fn handle(&self, listener: ListenerId) -> Option<HandleId> {
        self.listeners.get(&listener)?.handle()
    }

    /// Returns whether the listener's connections come through one of the master's queues.
    pub(crate) fn has_queue(&self, listener: ListenerId) -> bool {
        self.listeners.get(&listener).is_some_and(Entry::has_queue)
    }

    /// Returns whether the listener ends when its backlog or queue is empty.
    pub(crate) fn is_draining(&self, listener: ListenerId) -> bool {
        let entry = self.listeners.get(&listener);
        entry.is_some_and(|entry| matches!(entry.stage, Stage::Draining(_)))
    }
}

impl<F> WorkerCore<F> {
    /// Returns whether the listener accepts nothing more, and ends when the application has
    /// received the parked connections whose clients have sent something.
    pub(crate) fn is_serving_parked(&self, listener: ListenerId) -> bool {
        let entry = self.listeners.get(&listener);
        entry.is_some_and(|entry| matches!(entry.stage, Stage::ServingParked(_)))
    }

    /// Requests a listener, or a datagram socket, from the master.
    pub(crate) fn listen(&mut self, endpoint: Endpoint, flags: BindFlags) -> ListenerId {
        let index = self.unused_index(&endpoint);
        let kind = endpoint.kind;
        let key = HandleKey { endpoint, index };
        let requested = Some(key.clone());
        let policy = SchedulingPolicy::RoundRobin;
        let listener = self.add(kind, requested, Stage::Requested, policy, flags.parking);
        if self.listen_status(listener) == ListenStatus::Pending {
            self.send(ToMaster::Listen {
                request: listener.0,
                key,
                flags,
            });
        }
        listener
    }

    /// Adds a private listener, which is a socket unknown to the master.
    pub(crate) fn listen_privately(&mut self, kind: Kind, parking: Parking) -> ListenerId {
        let (stage, policy) = (Stage::Open(None), SchedulingPolicy::Shared);
        self.add(kind, None, stage, policy, parking)
    }

    /// Returns a number that no listener has.
    fn next_listener(&mut self) -> ListenerId {
        let is_used = |number| self.listeners.contains_key(&ListenerId(number));
        self.last_listener = next_poll_number(self.last_listener, is_used);
        ListenerId(self.last_listener)
    }

    /// Adds a listener in the given stage, or in `Closed` if the worker is disconnecting.
    fn add(
        &mut self,
        kind: Kind,
        key: Option<HandleKey>,
        stage: Stage,
        policy: SchedulingPolicy,
        parking: Parking,
    ) -> ListenerId {
        let listener = self.next_listener();
        let is_late = self.closes_new_listeners();
        let entry = Entry {
            kind,
            key,
            address: None,
            policy,
            stage: if is_late { Stage::Closed } else { stage },
            receiver: Receiver::Accept,
            received: 0,
            report: QueueReport::Withheld,
            open_connections: 0,
            connection_limit: None,
            drops_excess: false,
            referenced: true,
            listening_sent: false,
            parking,
            resumed: VecDeque::new(),
        };
        self.listeners.insert(listener, entry);
        listener
    }

    /// Sends `Listening` once, after the application has received the listener.
    pub(crate) fn listening(&mut self, listener: ListenerId) {
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        if let (Some(handle), false) = (entry.handle(), entry.listening_sent) {
            entry.listening_sent = true;
            self.send(ToMaster::Listening { handle });
        }
    }

    /// Processes the master's reply to a `Listen` frame. Returns the listener if the reply carries
    /// a descriptor for it.
    ///
    /// # Errors
    ///
    /// Returns a violation if the worker does not wait for this reply.
    pub(super) fn replied(
        &mut self,
        listener: ListenerId,
        result: Result<Bound, i32>,
    ) -> Result<Option<ListenerId>, FrameError> {
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return Err(FrameError::Violation(Violation::UnexpectedReply));
        };
        let is_abandoned = match entry.stage {
            Stage::Requested => false,
            Stage::Abandoned => true,
            Stage::Failed(_)
            | Stage::Open(_)
            | Stage::Draining(_)
            | Stage::ServingParked(_)
            | Stage::Closed => {
                return Err(FrameError::Violation(Violation::RepeatedReply));
            }
        };
        match result {
            Ok(bound) => {
                entry.address = bound.address;
                entry.policy = bound.policy;
                entry.stage = Stage::Open(Some(bound.handle));
                if is_abandoned {
                    self.forget(listener);
                }
                Ok(Some(listener))
            }
            Err(errno) => {
                entry.stage = Stage::Failed(errno);
                if is_abandoned {
                    self.forget(listener);
                }
                Ok(None)
            }
        }
    }

    /// Processes a reply whose descriptor was lost, because this process has no descriptor left.
    ///
    /// # Errors
    ///
    /// Returns the same errors as `frame`.
    pub(crate) fn listener_fd_lost(
        &mut self,
        request: u32,
        handle: HandleId,
    ) -> Result<(), FrameError> {
        self.replied(ListenerId(request), Err(errno::EMFILE))?;
        self.send(ToMaster::Release { handle });
        Ok(())
    }

    /// Closes a listener. The master reclaims the connections in its queue.
    pub(crate) fn close(&mut self, listener: ListenerId) {
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        match entry.stage {
            Stage::Requested => entry.stage = Stage::Abandoned,
            Stage::Open(handle) | Stage::Draining(handle) | Stage::ServingParked(handle) => {
                entry.stage = Stage::Closed;
                // Begin to send the parked connections to the master before the listener is
                // released, because the master may no longer have the listener afterwards.
                self.all_leave(listener);
                if let Some(handle) = handle {
                    self.send(ToMaster::Release { handle });
                }
                self.actions.push_back(Action::CloseListener(listener));
            }
            Stage::Abandoned | Stage::Failed(_) | Stage::Closed => {}
        }
    }

    /// Closes a listener that the application has dropped, and removes it. If the master has not
    /// replied, the reply removes it.
    pub(crate) fn forget(&mut self, listener: ListenerId) {
        self.close(listener);
        let is_settled = |entry: &Entry| entry.stage != Stage::Abandoned;
        if self.listeners.get(&listener).is_some_and(is_settled) {
            self.listeners.remove(&listener);
        }
    }

    /// Starts draining a listener, because it receives no new connections. The application still
    /// serves the backlog or queue, and the listener closes once the backlog or queue is empty. A
    /// datagram socket closes immediately.
    pub(super) fn drain(&mut self, listener: ListenerId) {
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        if entry.kind == Kind::Udp {
            return self.close(listener);
        }
        if let Stage::Open(handle) = entry.stage {
            entry.stage = Stage::Draining(handle);
        }
        self.idle_leave(Some(listener));
        self.notify_ready(listener);
    }

    /// Ends a listener that this worker no longer accepts from, although no other worker serves it.
    /// The application still serves the parked connections whose clients have sent something.
    fn serve_parked(&mut self, listener: ListenerId) {
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        // A draining listener serves these connections anyway.
        if let Stage::Open(handle) = entry.stage {
            entry.stage = Stage::ServingParked(handle);
            self.idle_leave(Some(listener));
            self.notify_ready(listener);
            self.close_if_served(listener);
        }
    }

    /// Closes a listener that serves only parked connections, if the application has received them.
    pub(crate) fn close_if_served(&mut self, listener: ListenerId) {
        if self.is_serving_parked(listener) && !self.has_resumed(listener) {
            self.close(listener);
        }
    }

    /// Processes the master's report that the listener has ended for this worker.
    pub(super) fn ended(&mut self, handle: HandleId, unreceived: Unreceived) {
        let Some(listener) = self.by_handle(handle) else {
            return;
        };
        self.ending.retain(|other| *other != listener);
        match unreceived {
            Unreceived::GoToOthers => self.ending.push(listener),
            Unreceived::AreServed => self.drain(listener),
            Unreceived::ParkedAreServed => self.serve_parked(listener),
        }
    }

    /// Closes the listeners that other workers continue to serve. The shell calls this when it has processed
    /// all frames that have arrived. If the worker was busy for a while, a later one of these frames
    /// may report that no other worker serves the listener any more.
    pub(crate) fn frames_processed(&mut self) {
        for listener in std::mem::take(&mut self.ending) {
            self.close(listener);
        }
    }

    /// Returns whether `frames_processed` has listeners to close.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn has_ending(&self) -> bool {
        !self.ending.is_empty()
    }

    pub(super) fn by_handle(&self, handle: HandleId) -> Option<ListenerId> {
        let mut all = self.listeners.iter();
        let found = all.find(|(_, entry)| entry.handle() == Some(handle));
        found.map(|(listener, _)| *listener)
    }

    pub(super) fn listeners_where(&self, is_wanted: impl Fn(&Entry) -> bool) -> Vec<ListenerId> {
        let wanted = self.listeners.iter().filter(|(_, entry)| is_wanted(entry));
        wanted.map(|(listener, _)| *listener).collect()
    }

    /// Returns the lowest index that no listener of this worker uses on an endpoint.
    fn unused_index(&self, endpoint: &Endpoint) -> u32 {
        let keys = self.listeners.values().filter_map(Entry::key_in_use);
        let keys = keys.filter(|key| key.endpoint == *endpoint);
        let used: Vec<_> = keys.map(|key| key.index).collect();
        let is_unused = |index: &u32| !used.contains(index);
        (0..).find(is_unused).unwrap_or(u32::MAX)
    }
}
