//! Every decision of the worker.
//!
//! Pure, like [`master`](crate::core::master): facts come in as method calls, [`Action`]s and
//! [`Event`]s go out. The descriptors of a message are any type `F`.
//!
//! This file holds the life of the worker and of its channel. `listener` holds the life of one
//! listener, `capacity` decides whether the worker takes more connections.

mod capacity;
mod listener;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;

use crate::types::endpoint::Endpoint;
use crate::types::sorted_map::SortedMap;
use crate::wire::frame::{FrameError, HandleId, ToMaster, ToWorker};
pub(crate) use listener::ListenerId;
use listener::{Entry, Stage};

/// An action that the shell carries out at once.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Send(ToMaster),
    /// Close this worker's copy of a listener or datagram socket, or its end of a queue.
    CloseListener(ListenerId),
    /// Keep new connections out of the backlog of a private listener.
    AttachSynFilter(ListenerId),
    /// Close the channel once everything queued is written.
    CloseChannel,
}

/// An event for the application's callbacks; `F` is the descriptors that arrive with a message.
#[derive(Debug)]
pub(crate) enum Event<F> {
    /// The listener's callback may accept from its backlog or queue, which may be empty.
    ListenerReady(ListenerId),
    Message {
        bytes: Vec<u8>,
        fds: F,
    },
    Disconnect,
}

/// The progress of a `listen`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ListenStatus {
    /// The master has not replied.
    Pending,
    /// Open, or closed already because the worker is disconnecting.
    Done(Option<SocketAddr>),
    /// The errno.
    Failed(i32),
}

/// The state of the channel, as this worker sees it.
///
/// | state | event | next | what happens |
/// |---|---|---|---|
/// | `Open` | the application or the end of a disconnect closes it | `Closing` | [`Action::CloseChannel`]; frames are no longer sent |
/// | `Open`, `Closing` | end of file, an error, or a malformed frame | `Closed` | all listeners close, [`Event::Disconnect`] |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChannelState {
    Open,
    Closing,
    Closed,
}

/// How far a disconnect has come.
///
/// | state | event | next | what happens |
/// |---|---|---|---|
/// | `NotRequested` | the application calls `disconnect` or `kill` before the channel is closed | `Requested` | the master is sent `DisconnectRequest` |
/// | `NotRequested`, `Requested` | `Disconnect` arrives | `Received` | limits are lifted, private listeners drain, pending listens are abandoned |
///
/// It outlives the channel: a channel that closes before `Received` was closed unexpectedly, and
/// the worker exits at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disconnect {
    NotRequested,
    /// This worker has sent a request to the master.
    Requested,
    /// The master has ordered or confirmed it.
    Received,
}

#[derive(Debug)]
pub(crate) struct WorkerCore<F> {
    channel: ChannelState,
    disconnect: Disconnect,
    /// The application called `kill`: the channel closes without waiting for connections.
    killed: bool,
    /// The channel keeps the application running.
    referenced: bool,
    /// The maximum number of connections that callbacks may hold, once descriptors have become
    /// scarce.
    connection_limit: Option<u64>,
    /// No descriptor was left for a connection: queues are paused until `backoff_elapsed`.
    backing_off: bool,
    last_listener: u32,
    listeners: SortedMap<ListenerId, Entry>,
    /// The indices in use, by the endpoint as it was requested.
    indices: SortedMap<Endpoint, BTreeSet<u32>>,
    /// Connections that the application holds, whatever listener they came from.
    open_connections: u64,
    actions: VecDeque<Action>,
    events: VecDeque<Event<F>>,
}

// Queries of the shell.
impl<F> WorkerCore<F> {
    /// The first frame of a worker says that it is online.
    pub(crate) fn new() -> Self {
        Self {
            channel: ChannelState::Open,
            disconnect: Disconnect::NotRequested,
            killed: false,
            referenced: true,
            connection_limit: None,
            backing_off: false,
            last_listener: 0,
            listeners: SortedMap::new(),
            indices: SortedMap::new(),
            open_connections: 0,
            actions: VecDeque::from([Action::Send(ToMaster::Online)]),
            events: VecDeque::new(),
        }
    }

    /// Whether `next_action` would return one.
    pub(crate) fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    pub(crate) fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    pub(crate) fn next_event(&mut self) -> Option<Event<F>> {
        self.events.pop_front()
    }

    /// Whether `next_event` would return one.
    pub(crate) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Whether the channel is not closed yet.
    pub(crate) fn is_connected(&self) -> bool {
        self.channel != ChannelState::Closed
    }

    /// `None` until the channel is closed.
    pub(crate) fn exited_after_disconnect(&self) -> Option<bool> {
        (!self.is_connected()).then_some(self.disconnect == Disconnect::Received)
    }

    /// Whether listeners are closed as soon as they are requested.
    pub(crate) fn is_disconnecting(&self) -> bool {
        self.disconnect == Disconnect::Received || self.channel != ChannelState::Open
    }

    /// Whether the worker should exit no matter what the application still waits for: the channel
    /// closed unexpectedly, or the application killed the worker.
    pub(crate) fn must_exit(&self) -> bool {
        !self.is_connected() && (self.disconnect != Disconnect::Received || self.killed)
    }

    /// Whether nothing of the cluster keeps the application running.
    pub(crate) fn is_finished(&self) -> bool {
        let channel = match self.channel {
            ChannelState::Open => self.referenced,
            // Its `disconnect` event is still to come.
            ChannelState::Closing => true,
            ChannelState::Closed => false,
        };
        let is_active = |entry: &Entry| entry.referenced && entry.is_open();
        let listens = self.listeners.values().any(is_active);
        self.must_exit() || !(channel || self.open_connections > 0 || listens)
    }

    /// Whether a disconnecting worker can close its channel: it has no listener and no connection.
    pub(crate) fn is_drained(&self) -> bool {
        let disconnects =
            self.disconnect == Disconnect::Received && self.channel == ChannelState::Open;
        let listens = || self.listeners.values().any(Entry::is_open);
        disconnects && self.open_connections == 0 && !listens()
    }
}

// Calls of the application.
impl<F> WorkerCore<F> {
    /// Sets whether the channel, or a listener, keeps the application running.
    pub(crate) fn reference(&mut self, listener: Option<ListenerId>, referenced: bool) {
        match listener {
            None => self.referenced = referenced,
            Some(listener) => {
                if let Some(entry) = self.listeners.get_mut(&listener) {
                    entry.referenced = referenced;
                }
            }
        }
    }

    /// The application waits for events in general. A disconnecting worker closes its channel here,
    /// when it is drained. Not earlier: an application that blocks may want to send something after
    /// its last connection.
    pub(crate) fn waiting_for_events(&mut self) {
        self.close_unused_listeners();
        if self.is_drained() {
            self.close_channel();
        }
    }

    /// Closes the listeners that have no callback, if the worker is disconnecting.
    pub(crate) fn close_unused_listeners(&mut self) {
        if self.disconnect == Disconnect::Received {
            let is_unused = |entry: &Entry| !entry.has_callback && entry.is_open();
            for listener in self.listeners_where(is_unused) {
                self.close(listener);
            }
        }
    }

    /// Requests a disconnect from the master.
    pub(crate) fn disconnect(&mut self) {
        if self.is_connected() && self.disconnect == Disconnect::NotRequested {
            self.disconnect = Disconnect::Requested;
            self.send(ToMaster::DisconnectRequest);
        }
    }

    /// Disconnects without waiting for connections. The master still receives the request, so that it
    /// expects the exit.
    pub(crate) fn kill(&mut self) {
        self.killed = true;
        self.disconnect();
        if self.disconnect == Disconnect::Received {
            self.close_channel();
        }
    }

    /// Closes the channel without asking the master.
    pub(crate) fn close_channel(&mut self) {
        if self.channel == ChannelState::Open {
            self.channel = ChannelState::Closing;
            self.actions.push_back(Action::CloseChannel);
        }
    }
}

// Facts about the channel.
impl<F> WorkerCore<F> {
    pub(crate) fn channel_closed(&mut self) {
        if !self.is_connected() {
            return;
        }
        self.channel = ChannelState::Closed;
        for entry in self.listeners.values_mut() {
            if !matches!(entry.stage, Stage::Failed(_)) {
                entry.stage = Stage::Closed;
            }
        }
        let all = self.listeners.keys().copied().map(Action::CloseListener);
        self.actions.extend(all);
        self.events.push_back(Event::Disconnect);
    }

    /// A message has arrived, with its descriptors.
    pub(crate) fn message(&mut self, bytes: Vec<u8>, fds: F) {
        self.events.push_back(Event::Message { bytes, fds });
    }

    /// Processes a frame of the master. A message that may have descriptors comes by `message`.
    ///
    /// Returns the listener to which the frame's descriptor belongs, if it has one.
    ///
    /// # Errors
    ///
    /// [`FrameError::Violation`] if the frame is invalid in the present state.
    pub(crate) fn frame(&mut self, frame: ToWorker) -> Result<Option<ListenerId>, FrameError>
    where
        F: Default,
    {
        match frame {
            ToWorker::Reply { request, result } => {
                return self.replied(ListenerId(request), result);
            }
            ToWorker::ListenerClosed { handle, drain } => {
                if let Some(listener) = self.by_handle(handle) {
                    if drain {
                        self.drain(listener);
                    } else {
                        self.close(listener);
                    }
                }
            }
            ToWorker::Disconnect => self.disconnect_received(),
            ToWorker::Message(bytes) => self.message(bytes, F::default()),
        }
        Ok(None)
    }

    fn disconnect_received(&mut self) {
        self.disconnect = Disconnect::Received;
        let paused = self.paused_listeners();
        let mut private = Vec::new();
        for (listener, entry) in self.listeners.iter_mut() {
            if !entry.drops_excess {
                // The last worker receives everything that is left, however many connections it has.
                entry.connection_limit = None;
            }
            match entry.stage {
                // The master does not reply to a disconnecting worker.
                Stage::Requested => entry.stage = Stage::Abandoned,
                Stage::Open(None) => private.push(*listener),
                Stage::Open(Some(_))
                | Stage::Abandoned
                | Stage::Failed(_)
                | Stage::Draining(_)
                | Stage::Closed => {}
            }
        }
        for listener in private {
            self.actions.push_back(Action::AttachSynFilter(listener));
            self.drain(listener);
        }
        self.resume(paused);
        if self.killed {
            self.close_channel();
        }
    }

    fn send(&mut self, frame: ToMaster) {
        if self.channel == ChannelState::Open {
            self.actions.push_back(Action::Send(frame));
        }
    }
}
