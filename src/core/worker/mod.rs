//! The decisions of the worker.
//!
//! Like [`master`](crate::core::master), this state machine is pure. The shell reports facts by
//! method calls, and `WorkerCore` produces [`Action`]s and [`Event`]s. The descriptors of a message
//! are any type `F`.
//!
//! The top level contains the life of the worker and of its channel. `listener` contains the life
//! of one listener. `capacity` decides whether the worker takes more connections. `parked` contains
//! the connections that the worker holds while their clients send nothing. `std_listener` contains
//! the listeners and connections that the application uses without this crate.

mod capacity;
mod listener;
mod parked;
mod std_listener;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::SocketAddr;

use crate::types::connection_id::ConnectionId;
use crate::types::protocol::FrameError;
use crate::types::sorted_map::SortedMap;
use crate::wire::frame::{ToMaster, ToWorker};
pub(crate) use listener::ListenerId;
use listener::{Entry, Receiver, Stage};
use parked::ParkedTable;
pub(crate) use parked::{Held, LINGER_TIMEOUT, Leaving};

/// An action that the shell carries out at once.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Send(ToMaster),
    /// Closes this worker's copy of a listener or datagram socket, or its end of a queue.
    CloseListener(ListenerId),
    /// Keeps new connections out of a private listener's backlog.
    AttachSynFilter(ListenerId),
    /// Closes a connection that the worker holds.
    CloseParked(ConnectionId),
    /// Sends to the master the connections that `next_leaving` returns, as far as the channel has
    /// space. The shell continues when the channel has space again.
    SendLeaving,
    /// Closes the channel once all queued frames are written.
    CloseChannel,
    /// Makes the disconnect tokens report that this worker is disconnecting.
    MarkDisconnecting,
}

/// An event for the application's callbacks. `F` is the type of the descriptors that arrive with a
/// message.
#[derive(Debug)]
pub(crate) enum Event<F> {
    /// A listener's callback may accept connections. The backlog or queue may be empty.
    ListenerReady(ListenerId),
    Message {
        bytes: Vec<u8>,
        fds: F,
    },
    /// The worker is disconnecting from now on.
    Disconnecting,
    /// The channel is closed.
    Disconnect,
}

/// The progress of a call to `listen`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ListenStatus {
    /// The master has not replied.
    Pending,
    /// The listener is open, or has been closed, for example because the worker is disconnecting.
    /// The value is its address, if known.
    Done(Option<SocketAddr>),
    /// The listener could not be opened. The value is the errno.
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
    /// The shell still writes the queued frames, and closes the channel afterwards.
    Closing,
    Closed,
}

/// The progress of a disconnect.
///
/// | state | event | next | what happens |
/// |---|---|---|---|
/// | `NotRequested` | the application calls `disconnect` or `kill` before the channel is closed | `Requested` | the worker sends `DisconnectRequest`, if the channel is `Open` |
/// | `NotRequested`, `Requested` | `Disconnect` arrives | `Received` | limits are lifted, private listeners drain, pending listens are abandoned |
///
/// The value stays after the channel has closed. If the channel closes before `Received`, it closed
/// unexpectedly, and the worker exits immediately.
///
/// The first step that ends `NotRequested` or closes the channel also emits
/// [`Event::Disconnecting`] and [`Action::MarkDisconnecting`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disconnect {
    NotRequested,
    /// The application has requested the disconnect. If the channel was open, the worker has sent
    /// the request to the master.
    Requested,
    /// The master has requested or confirmed the disconnect.
    Received,
}

#[derive(Debug)]
pub(crate) struct WorkerCore<F> {
    channel: ChannelState,
    disconnect: Disconnect,
    /// Whether the application called `kill`, so that the channel closes without waiting for
    /// connections.
    killed: bool,
    /// Whether the channel keeps the application running.
    referenced: bool,
    /// The maximum number of connections that the application may hold while descriptors are
    /// scarce, or `None` while they are plentiful. The limit applies only to listeners with a
    /// callback and a queue.
    scarce_fds_limit: Option<u64>,
    /// Whether the queues are paused until `backoff_elapsed`, because no descriptor was left for a
    /// connection.
    backing_off: bool,
    /// The listener whose queue was found empty when the application parked its last connection,
    /// until the next attempt to receive one.
    empty_at_park: Option<ListenerId>,
    last_listener: u32,
    listeners: SortedMap<ListenerId, Entry>,
    /// The listeners that other workers continue to serve, until `frames_processed` closes them.
    ending: Vec<ListenerId>,
    /// The number of connections that the application holds, from any source.
    open_connections: u64,
    /// Whether the application may have connections as plain streams, which it closes without this
    /// crate.
    may_have_streams: bool,
    parked: ParkedTable,
    actions: VecDeque<Action>,
    events: VecDeque<Event<F>>,
}

// Construction and queries.
impl<F> WorkerCore<F> {
    /// Creates the state of a worker that has just started, which sends `Online` as its first
    /// frame.
    pub(crate) fn new() -> Self {
        Self {
            channel: ChannelState::Open,
            disconnect: Disconnect::NotRequested,
            killed: false,
            referenced: true,
            scarce_fds_limit: None,
            backing_off: false,
            empty_at_park: None,
            last_listener: 0,
            listeners: SortedMap::new(),
            ending: Vec::new(),
            open_connections: 0,
            may_have_streams: false,
            parked: ParkedTable::new(),
            actions: VecDeque::from([Action::Send(ToMaster::Online)]),
            events: VecDeque::new(),
        }
    }

    /// Returns whether there are pending actions.
    pub(crate) fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    pub(crate) fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    pub(crate) fn next_event(&mut self) -> Option<Event<F>> {
        self.events.pop_front()
    }

    /// Returns whether there are pending events.
    pub(crate) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Returns whether the channel is not closed.
    pub(crate) fn is_connected(&self) -> bool {
        self.channel != ChannelState::Closed
    }

    /// Returns whether a disconnect was received before the channel closed.
    ///
    /// Returns `None` while the channel is open.
    pub(crate) fn exited_after_disconnect(&self) -> Option<bool> {
        (!self.is_connected()).then_some(self.disconnect == Disconnect::Received)
    }

    /// Returns whether new listeners are closed from the start, because the worker is disconnecting
    /// or its channel is no longer open.
    pub(crate) fn closes_new_listeners(&self) -> bool {
        self.disconnect == Disconnect::Received || self.channel != ChannelState::Open
    }

    /// Returns whether the worker should exit regardless of what the application waits for.
    ///
    /// The worker should exit if the channel closed unexpectedly, or if the application killed the
    /// worker and the channel is closed.
    pub(crate) fn must_exit(&self) -> bool {
        !self.is_connected() && (self.disconnect != Disconnect::Received || self.killed)
    }

    /// Returns whether the application may stop running: the worker must exit, or neither the
    /// channel, a listener nor a connection keeps the application running.
    pub(crate) fn is_finished(&self) -> bool {
        let channel = match self.channel {
            ChannelState::Open => self.referenced,
            // Keep running until the channel is closed, so that the `disconnect` event is emitted.
            ChannelState::Closing => true,
            ChannelState::Closed => false,
        };
        let is_active = |entry: &Entry| entry.referenced && entry.is_open();
        let listens = self.listeners.values().any(is_active);
        self.must_exit() || !(channel || self.open_connections > 0 || listens)
    }

    /// Returns whether a disconnecting worker can close its channel, because it has no listener, no
    /// connection, no parked connection and no plain stream left.
    pub(crate) fn is_drained(&self) -> bool {
        let is_empty =
            self.open_connections == 0 && self.parked.is_empty() && !self.may_have_streams;
        is_empty && self.has_ended_listening()
    }

    /// Returns whether the worker is disconnecting, its listeners have ended, and its channel is
    /// open.
    fn has_ended_listening(&self) -> bool {
        let disconnects =
            self.disconnect == Disconnect::Received && self.channel == ChannelState::Open;
        disconnects && !self.listeners.values().any(Entry::is_open)
    }
}

// Requests from the application.
impl<F> WorkerCore<F> {
    /// Sets whether `listener` keeps the application running. If `listener` is `None`, sets this
    /// for the channel.
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

    /// Closes the listeners without a callback if the worker is disconnecting, and then the channel
    /// if the worker is drained. The shell calls this when the application runs the event loop.
    ///
    /// The channel must not close before this call, because an application that accepts with
    /// blocking calls may still send something after its last connection.
    pub(crate) fn waiting_for_events(&mut self) {
        self.close_unused_listeners();
        if self.is_drained() {
            self.close_channel();
        }
    }

    /// Closes the listeners on which only `accept` receives connections, if the worker is
    /// disconnecting.
    pub(crate) fn close_unused_listeners(&mut self) {
        if self.disconnect == Disconnect::Received {
            let is_unused = |entry: &Entry| entry.receiver == Receiver::Accept && entry.is_open();
            for listener in self.listeners_where(is_unused) {
                self.close(listener);
            }
        }
    }

    /// Requests a disconnect from the master.
    pub(crate) fn disconnect(&mut self) {
        if self.is_connected() && self.disconnect == Disconnect::NotRequested {
            self.notify_disconnecting();
            self.disconnect = Disconnect::Requested;
            self.send(ToMaster::DisconnectRequest);
        }
    }

    /// Disconnects without waiting for connections. The master still receives the disconnect
    /// request, and therefore expects the exit.
    pub(crate) fn kill(&mut self) {
        self.killed = true;
        self.disconnect();
        if self.disconnect == Disconnect::Received {
            self.release_parked();
            self.close_if_killed();
        }
    }

    /// Closes the channel of a killed worker after the last parked connection has left.
    pub(super) fn close_if_killed(&mut self) {
        if self.killed && self.disconnect == Disconnect::Received && !self.has_leaving() {
            self.close_channel();
        }
    }

    /// Closes the channel without asking the master. Frames that are already queued are still
    /// written.
    pub(crate) fn close_channel(&mut self) {
        if self.channel == ChannelState::Open {
            self.notify_disconnecting();
            self.channel = ChannelState::Closing;
            self.actions.push_back(Action::CloseChannel);
        }
    }

    /// Notifies the application of the first step of a disconnect. The caller must not have changed
    /// the state yet, because the state shows whether the step is the first one.
    fn notify_disconnecting(&mut self) {
        let is_first = self.disconnect == Disconnect::NotRequested;
        if is_first && self.channel == ChannelState::Open {
            self.actions.push_back(Action::MarkDisconnecting);
            self.events.push_back(Event::Disconnecting);
        }
    }
}

// Reports from the shell about the channel.
impl<F> WorkerCore<F> {
    pub(crate) fn channel_closed(&mut self) {
        if !self.is_connected() {
            return;
        }
        self.notify_disconnecting();
        self.channel = ChannelState::Closed;
        for entry in self.listeners.values_mut() {
            if !matches!(entry.stage, Stage::Failed(_)) {
                entry.stage = Stage::Closed;
            }
        }
        self.close_all_parked();
        let all = self.listeners.keys().copied().map(Action::CloseListener);
        self.actions.extend(all);
        self.events.push_back(Event::Disconnect);
    }

    /// Emits a message from the master, with the descriptors that arrived with it.
    pub(crate) fn message(&mut self, bytes: Vec<u8>, fds: F) {
        self.events.push_back(Event::Message { bytes, fds });
    }

    /// Processes a frame from the master. For a message, the shell calls `message` instead. For a
    /// connection that another worker parked, it calls `hold_moved`.
    ///
    /// Returns the listener to which the frame's descriptor belongs, or `None` if the frame has no
    /// descriptor.
    ///
    /// # Errors
    ///
    /// Returns [`FrameError::Violation`] if the frame is invalid in the present state.
    pub(crate) fn frame(&mut self, frame: ToWorker) -> Result<Option<ListenerId>, FrameError> {
        match frame {
            ToWorker::Reply { request, result } => {
                return self.replied(ListenerId(request), result);
            }
            ToWorker::ListenerClosed { handle, unreceived } => self.ended(handle, unreceived),
            ToWorker::Disconnect => self.disconnect_received(),
            // The connection did not arrive, because this process had no free descriptor. The
            // kernel has closed it, which disconnected the client. (For a `MoveParked` with its
            // descriptor, the shell calls `hold_moved`.)
            ToWorker::MoveParked { .. } => {}
            // Does not occur, because the shell calls `message`.
            ToWorker::Message(_) => {}
        }
        Ok(None)
    }

    fn disconnect_received(&mut self) {
        self.notify_disconnecting();
        self.disconnect = Disconnect::Received;
        let paused = self.paused_listeners();
        let mut private = Vec::new();
        for (listener, entry) in self.listeners.iter_mut() {
            if !entry.drops_excess {
                // Lift the limit, because the last worker of a draining listener must receive all
                // the remaining connections, however many there are.
                entry.connection_limit = None;
            }
            match entry.stage {
                // Abandon the request, because the master does not reply to a disconnecting worker.
                Stage::Requested => entry.stage = Stage::Abandoned,
                Stage::Open(None) => private.push(*listener),
                Stage::Open(Some(_))
                | Stage::Abandoned
                | Stage::Failed(_)
                | Stage::Draining(_)
                | Stage::ServingParked(_)
                | Stage::Closed => {}
            }
        }
        for listener in private {
            self.actions.push_back(Action::AttachSynFilter(listener));
            self.drain(listener);
        }
        self.notify_unpaused(paused);
        if self.killed {
            // Let the connections leave before the channel closes, because the listeners do not end
            // before that.
            self.release_parked();
            self.close_if_killed();
        }
    }

    /// Returns whether frames can be sent to the master.
    pub(crate) fn is_writable(&self) -> bool {
        self.channel == ChannelState::Open
    }

    /// Reports that the application has parked a connection that the master holds.
    pub(crate) fn park_again(&mut self, connection: ConnectionId) {
        self.send(ToMaster::ParkAgain { connection });
    }

    /// Reports that the application keeps or has closed a connection that the master holds.
    pub(crate) fn detach(&mut self, connection: ConnectionId) {
        self.send(ToMaster::Detach { connection });
    }

    fn send(&mut self, frame: ToMaster) {
        if self.channel == ChannelState::Open {
            self.actions.push_back(Action::Send(frame));
        }
    }
}
