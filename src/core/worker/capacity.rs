//! Decides whether the worker takes more connections of a listener, and reports this to the master.
//!
//! A listener is *paused* while the worker should leave its connections to other workers. The
//! reason is either that the application holds as many connections as it wants, or that descriptors
//! are scarce. The worker sends `Pause` when a pause begins. After the pause, the worker sends
//! `Idle` once the listener's queue is found empty. The worker also sends `Pause` when the
//! application removes the listener's callback.

use super::listener::{Entry, Receiver, Stage};
use super::{Disconnect, Event, ListenerId, WorkerCore};
use crate::wire::frame::ToMaster;

/// The last report about a queue that the worker sent to the master. The table lists the events at
/// which the worker sends the next report.
///
/// | report | event | next |
/// |---|---|---|
/// | `Withheld` | the queue is found empty while the listener is not paused | `Idle` |
/// | `Idle` | the queue is found empty after more connections were received | `Idle` |
/// | `Idle` | a connection closes, none was received, and at most half of `open` are open | `Idle` |
/// | `Idle` | the listener is paused, or its callback is removed | `Withheld` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueueReport {
    /// The master dispatches nothing, because the worker has sent `Pause`, or nothing yet. Not the
    /// same as `is_paused`, which is the reason to send `Pause`.
    Withheld,
    /// The worker has reported that the queue is empty and that it wants connections.
    Idle {
        /// The number of connections received from the queue by the time of the report.
        received: u64,
        /// The number of connections that the application held at the time of the report.
        open: u32,
    },
}

// Reports and notifications.
impl<F> WorkerCore<F> {
    /// Records that the listener's queue was found empty while the application waits for a
    /// connection. Reports this to the master, unless the master already knows or the listener is
    /// paused.
    pub(crate) fn found_empty(&mut self, listener: ListenerId) {
        let is_paused = self.is_paused(listener);
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        let is_known = matches!(entry.report,
            QueueReport::Idle { received, .. } if received == entry.received);
        if !is_known && !is_paused {
            self.send_idle(listener);
        }
    }

    /// Records that the queue was found empty when the application parked a connection, before it
    /// waits for the next one. Sends no report if the last one is `Withheld`, because a pause ends
    /// only when the application waits for a connection.
    pub(crate) fn found_empty_at_park(&mut self, listener: ListenerId) {
        self.empty_at_park = Some(listener);
        let entry = self.listeners.get(&listener);
        if entry.is_some_and(|entry| entry.report != QueueReport::Withheld) {
            self.found_empty(listener);
        }
    }

    /// Returns whether the queue was found empty when the application parked its last connection.
    /// The application then waits for the next connection without trying to receive one first,
    /// because the attempt would cost a system call and almost always fail. Returns `false` for a
    /// draining queue, which closes when such an attempt finds it empty, and from the second call
    /// on. If the result is `true`, also sends the idle report that `found_empty_at_park` left out
    /// after a pause.
    pub(crate) fn take_empty_at_park(&mut self, listener: ListenerId) -> bool {
        let was_empty = self.empty_at_park.take() == Some(listener);
        let skips_attempt = was_empty && !self.is_draining(listener);
        if skips_attempt {
            self.found_empty(listener);
        }
        skips_attempt
    }

    fn send_idle(&mut self, listener: ListenerId) {
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        if let (Stage::Open(Some(handle)), true) = (entry.stage, entry.has_queue()) {
            let received = entry.received;
            let open = u32::try_from(entry.open_connections).unwrap_or(u32::MAX);
            entry.report = QueueReport::Idle { received, open };
            self.send(ToMaster::Idle {
                handle,
                received,
                open,
            });
        }
    }

    /// Sends `Pause` if the listener is paused and the master has not been notified.
    fn send_pause_if_paused(&mut self, listener: ListenerId) {
        if self.is_paused(listener) {
            self.send_pause(listener);
        }
    }

    fn send_pause(&mut self, listener: ListenerId) {
        if let Some(entry) = self.listeners.get_mut(&listener) {
            let report = std::mem::replace(&mut entry.report, QueueReport::Withheld);
            if let (Some(handle), true) = (entry.handle(), report != QueueReport::Withheld) {
                self.send(ToMaster::Pause { handle });
            }
        }
    }

    fn send_pauses(&mut self) {
        for listener in self.paused_listeners() {
            self.send_pause_if_paused(listener);
        }
    }

    /// Lets the callback accept, if there is one and the listener is not paused.
    pub(crate) fn notify_ready(&mut self, listener: ListenerId) {
        let entry = self.listeners.get(&listener);
        let is_served = entry.is_some_and(|entry| entry.has_callback() && entry.is_open());
        if is_served && !self.is_paused(listener) && !self.is_datagram(listener) {
            self.events.push_back(Event::ListenerReady(listener));
        }
    }

    /// Notifies the callbacks of the listeners in `were_paused` that are no longer paused.
    pub(super) fn notify_unpaused(&mut self, were_paused: Vec<ListenerId>) {
        for listener in were_paused {
            self.notify_ready(listener);
        }
    }
}

// Received and closed connections.
impl<F> WorkerCore<F> {
    /// Passes the listener's connections to a callback from now on.
    pub(crate) fn use_callback(&mut self, listener: ListenerId) {
        if let Some(entry) = self.listeners.get_mut(&listener) {
            entry.receiver = Receiver::Callback;
            self.notify_ready(listener);
        }
    }

    /// Keeps the listener's connections for calls to `accept` from now on. The master dispatches
    /// none until such a call.
    pub(crate) fn remove_callback(&mut self, listener: ListenerId) {
        if let Some(entry) = self.listeners.get_mut(&listener) {
            entry.receiver = Receiver::Accept;
            self.send_pause(listener);
        }
    }

    /// Records that the application has received a connection. Returns whether the connection must
    /// be dropped, because it exceeds the limit of a listener that drops the excess.
    pub(crate) fn connection_opened(&mut self, listener: ListenerId) -> bool {
        self.open_connections += 1;
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return false;
        };
        let is_excess = entry.drops_excess && entry.is_at_limit();
        entry.open_connections += 1;
        entry.received += u64::from(entry.has_queue());
        self.send_pause_if_paused(listener);
        is_excess
    }

    /// Returns the number of connections that the application holds.
    pub(crate) fn open_connections(&self) -> u64 {
        self.open_connections
    }

    /// Records that the application has a connection that comes from no listener.
    pub(crate) fn connection_adopted(&mut self) {
        self.open_connections += 1;
    }

    pub(crate) fn connection_closed(&mut self, listener: Option<ListenerId>) {
        let paused = self.paused_listeners();
        self.open_connections = self.open_connections.saturating_sub(1);
        let entry = listener.and_then(|id| Some((id, self.listeners.get_mut(&id)?)));
        if let Some((listener, entry)) = entry {
            entry.open_connections = entry.open_connections.saturating_sub(1);
            // Report again, so that the master's number of open connections stays roughly right.
            if let QueueReport::Idle { received, open } = entry.report {
                let is_half = entry.open_connections <= u64::from(open) / 2;
                if received == entry.received && is_half {
                    self.send_idle(listener);
                }
            }
        }
        self.notify_unpaused(paused);
    }
}

// Connection limits and scarce descriptors.
impl<F> WorkerCore<F> {
    /// Returns whether the worker should leave the listener's connections to other workers for now.
    /// The reason is either that the listener is at its limit, or that descriptors are scarce.
    ///
    /// A draining listener pauses only while no descriptor is left, because no other worker can
    /// take its connections.
    pub(crate) fn is_paused(&self, listener: ListenerId) -> bool {
        let Some(entry) = self.listeners.get(&listener) else {
            return false;
        };
        let is_full = entry.is_at_limit() && !entry.drops_excess;
        let is_scarce = self
            .scarce_fds_limit
            .is_some_and(|limit| entry.has_callback() && self.open_connections >= limit);
        let lacks_fds = entry.has_queue() && (self.backing_off || is_scarce);
        match entry.stage {
            Stage::Open(_) => is_full || lacks_fds,
            // A pause loses no connections, because those in the queue wait there until a
            // descriptor is available.
            Stage::Draining(_) => entry.has_queue() && self.backing_off,
            Stage::Requested
            | Stage::Abandoned
            | Stage::Failed(_)
            | Stage::ServingParked(_)
            | Stage::Closed => false,
        }
    }

    pub(super) fn paused_listeners(&self) -> Vec<ListenerId> {
        let is_limited = self.scarce_fds_limit.is_some() || self.backing_off;
        let limited = self
            .listeners
            .iter()
            .filter(|(_, entry)| is_limited || entry.connection_limit.is_some());
        let limited = limited.map(|(listener, _)| *listener);
        limited.filter(|id| self.is_paused(*id)).collect()
    }

    /// Sets the maximum number of this listener's connections that the application wants to hold.
    ///
    /// A disconnecting worker ignores the limit and serves all remaining connections, unless the
    /// listener drops the excess.
    pub(crate) fn set_connection_limit(&mut self, listener: ListenerId, limit: Option<u64>) {
        let serves_all = self.disconnect == Disconnect::Received;
        let Some(entry) = self.listeners.get_mut(&listener) else {
            return;
        };
        if serves_all && !entry.drops_excess {
            return;
        }
        entry.connection_limit = limit;
        self.send_pause_if_paused(listener);
        self.notify_ready(listener);
    }

    /// Drops connections beyond the limit from now on, instead of leaving them to other workers.
    pub(crate) fn drop_excess(&mut self, listener: ListenerId) {
        if let Some(entry) = self.listeners.get_mut(&listener) {
            entry.drops_excess = true;
            self.notify_ready(listener);
        }
    }

    /// Leaves connections beyond the limit to other workers from now on, instead of dropping them.
    /// In a disconnecting worker, lifts the limit.
    pub(crate) fn keep_excess(&mut self, listener: ListenerId) {
        let serves_all = self.disconnect == Disconnect::Received;
        if let Some(entry) = self.listeners.get_mut(&listener) {
            entry.drops_excess = false;
            if serves_all {
                entry.connection_limit = None;
            }
            self.send_pause_if_paused(listener);
        }
    }

    /// Limits the listeners with a callback and a queue to the number of connections that the
    /// application holds now, but to at least one, because descriptors are scarce.
    pub(crate) fn fds_scarce(&mut self) {
        // Allow at least one connection, because a process may start with hardly any free
        // descriptors.
        let held = self.open_connections.max(1);
        let limit = self.scarce_fds_limit;
        self.scarce_fds_limit = Some(limit.map_or(held, |limit| limit.min(held)));
        self.send_pauses();
    }

    /// Lifts the limit of `fds_scarce`, because there are plenty of descriptors.
    pub(crate) fn fds_plentiful(&mut self) {
        if self.scarce_fds_limit.is_some() {
            let paused = self.paused_listeners();
            self.scarce_fds_limit = None;
            self.notify_unpaused(paused);
        }
    }

    /// Leaves the connections in the queues to other workers until `backoff_elapsed`, because no
    /// descriptor is left.
    pub(crate) fn fds_exhausted(&mut self) {
        self.backing_off = true;
        self.send_pauses();
    }

    /// Ends the pause of `fds_exhausted`, because descriptors may be available.
    pub(crate) fn backoff_elapsed(&mut self) {
        let paused = self.paused_listeners();
        self.backing_off = false;
        self.notify_unpaused(paused);
    }
}

impl Entry {
    fn is_at_limit(&self) -> bool {
        self.connection_limit
            .is_some_and(|limit| self.open_connections >= limit)
    }
}
