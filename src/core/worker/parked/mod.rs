//! Connections that the worker holds while their clients send nothing.
//!
//! With round robin, the master holds parked connections. For the other listeners, the worker does:
//! for those whose connections it accepts itself, and for private ones.
//!
//! ```text
//! from         event                                                          to
//! -----------  -------------------------------------------------------------  ---------
//! (none)       the application parks a connection                             Idle
//! (none)       a client connects to a listener with `wait_for_data`, and has  Idle
//!              sent nothing yet
//! (none)       the master moves another worker's connection to this worker    Idle
//! (none)       the application parks a connection, or the master moves one,   Leaving
//!              but the listener receives no more connections
//! Idle         the client sends something                                     Ready
//! Ready        the application receives the connection                        (removed)
//! Idle         the client hangs up or is silent for too long, or the worker   (removed)
//!              holds too many connections
//! Idle         the listener drains, or serves only parked connections         Leaving
//! Idle, Ready  the listener closes                                            Leaving
//! Leaving      the shell sends the connection to the master                   (removed)
//! any          the channel closes                                             (removed)
//! ```
//!
//! A connection of a private listener is removed instead of becoming `Leaving`, because no other
//! worker can serve it.
//!
//! The table also contains the finished connections whose clients may still be sending, with every
//! policy. See [`lingering`] for their state `Lingering`.

mod lingering;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

pub(crate) use lingering::LINGER_TIMEOUT;

use super::{Action, ListenerId, WorkerCore};
use crate::core::parked::{CONNECTIONS_MAX, Expiries, Expiry, Slab};
use crate::types::connection_id::ConnectionId;
use crate::types::handle::HandleId;
use crate::types::time::{Time, earlier};

/// Stands for the listener of a connection that the master has sent, if this worker does not have
/// that listener. No listener has this number.
const NO_LISTENER: ListenerId = ListenerId(0);

#[derive(Debug)]
struct Entry {
    listener: ListenerId,
    /// The master's handle of the listener, or `None` for a private listener.
    handle: Option<HandleId>,
    /// The number of times that the connection has been parked.
    times_parked: u32,
    state: State,
}

/// The state of a connection that the worker holds. See the [module](self) for the transitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The worker waits until the client sends something, at most until this time.
    Idle(Expiry),
    /// The client has sent something, and the connection waits for the application.
    Ready,
    /// The connection waits until the channel has space for it.
    Leaving,
    /// The worker discards what the client sends, at most until this time.
    Lingering(Expiry),
}

impl State {
    fn expiry(self) -> Option<Expiry> {
        match self {
            Self::Idle(expiry) | Self::Lingering(expiry) => Some(expiry),
            Self::Ready | Self::Leaving => None,
        }
    }
}

/// The shell's task for a connection that the application has parked, that the master has sent, or
/// whose client has sent nothing yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// Watch for data or a hang-up from the client, and then call `data_arrived` or `hung_up`.
    Idle(ConnectionId),
    /// Keep the connection until `next_leaving` returns it.
    Leaving(ConnectionId),
    Closed,
}

/// A connection that waits to be sent to the master.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaving {
    pub(crate) id: ConnectionId,
    pub(crate) handle: HandleId,
    pub(crate) times_parked: u32,
}

/// The table of the connections that the worker holds.
#[derive(Debug)]
pub(super) struct ParkedTable {
    entries: Slab<Entry>,
    /// The idle and the lingering connections.
    expiries: Expiries,
    leaving: VecDeque<ConnectionId>,
    /// The maximum number of connections that the worker holds.
    limit: usize,
    /// The time at which the worker checks the expiries, if there are any. It is not later than the
    /// first expiry, and it does not move when that connection is resumed. A worker that blocks would
    /// otherwise set its timer again for nearly every request.
    alarm: Option<Time>,
}

impl ParkedTable {
    pub(super) fn new() -> Self {
        Self {
            entries: Slab::new(),
            expiries: Expiries::new(),
            leaving: VecDeque::new(),
            limit: CONNECTIONS_MAX,
            alarm: None,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.len() == 0
    }

    fn insert(&mut self, entry: Entry) -> Option<ConnectionId> {
        let state = entry.state;
        let id = self.entries.insert(entry)?;
        if let Some(expiry) = state.expiry() {
            self.expiries.insert(expiry, id);
            self.alarm = earlier(self.alarm, Some(expiry.time()));
        }
        if state == State::Leaving {
            self.leaving.push_back(id);
        }
        Some(id)
    }

    /// Removes the next connection that leaves.
    fn next_leaving(&mut self) -> Option<Leaving> {
        loop {
            let id = self.leaving.pop_front()?;
            let removed = self.remove(id);
            let handle = removed.as_ref().and_then(|entry| entry.handle);
            if let (Some(Entry { times_parked, .. }), Some(handle)) = (removed, handle) {
                return Some(Leaving {
                    id,
                    handle,
                    times_parked,
                });
            }
        }
    }

    /// Changes the state of a connection that is not leaving.
    fn set(&mut self, id: ConnectionId, state: State) {
        if let Some(entry) = self.entries.get_mut(id) {
            let old = std::mem::replace(&mut entry.state, state);
            if let Some(expiry) = old.expiry() {
                self.expiries.remove(expiry, id);
            }
            if let Some(expiry) = state.expiry() {
                self.expiries.insert(expiry, id);
            }
            if state == State::Leaving {
                self.leaving.push_back(id);
            }
        }
    }

    fn remove(&mut self, id: ConnectionId) -> Option<Entry> {
        let entry = self.entries.remove(id)?;
        if let Some(expiry) = entry.state.expiry() {
            self.expiries.remove(expiry, id);
        }
        Some(entry)
    }

    fn state(&self, id: ConnectionId) -> Option<State> {
        self.entries.get(id).map(|entry| entry.state)
    }
}

// Requests from the application, and reports from the shell.
impl<F> WorkerCore<F> {
    /// Sets the maximum number of connections that the worker holds.
    pub(crate) fn set_parked_limit(&mut self, limit: usize) {
        self.parked.limit = limit.min(CONNECTIONS_MAX);
    }

    /// Holds a connection of the listener until its client sends something. If the worker holds too
    /// many connections, closes the one that expires first. If the listener receives no more
    /// connections, the connection goes to the master, or is closed if the listener is private.
    pub(crate) fn hold(
        &mut self,
        listener: ListenerId,
        handle: Option<HandleId>,
        times_parked: u32,
        now: Time,
    ) -> Held {
        let entry = self.listeners.get(&listener);
        let state = match (entry.filter(|entry| entry.holds_connections()), handle) {
            _ if !self.is_writable() => return Held::Closed,
            (Some(entry), _) => {
                let timeout = match times_parked {
                    0 => entry.parking.first_data_timeout(),
                    1.. => entry.parking.idle_timeout(),
                };
                State::Idle(self.parked.expiries.next_expiry(now, timeout))
            }
            (None, Some(_)) => State::Leaving,
            (None, None) => return Held::Closed,
        };
        let entry = Entry {
            listener,
            handle,
            times_parked,
            state,
        };
        if state == State::Leaving {
            let inserted = self.parked.insert(entry);
            self.actions.push_back(Action::SendLeaving);
            return inserted.map_or(Held::Closed, Held::Leaving);
        }
        let inserted = self.insert_within_limit(entry);
        inserted.map_or(Held::Closed, Held::Idle)
    }

    /// Returns whether the worker holds new connections of the listener until their clients send
    /// something. The last connections of a draining listener pass to the application at once, and
    /// also new connections if the worker can hold no more.
    pub(crate) fn holds_silent(&self, listener: ListenerId) -> bool {
        let entry = self.listeners.get(&listener);
        let is_full = self.parked.entries.len() >= self.parked.limit;
        entry.is_some_and(|entry| entry.parking.waits_for_data() && entry.holds_connections())
            && self.is_writable()
            && (!is_full || self.next_surplus().is_some())
    }

    /// Adds a connection. If the worker holds too many, closes the one that expires first of the
    /// others, or the new one if no other can be closed.
    fn insert_within_limit(&mut self, entry: Entry) -> Option<ConnectionId> {
        // Choose before the insertion, because the new connection may expire before all others.
        // Close after it, so that the new connection has another number.
        let is_full = self.parked.entries.len() >= self.parked.limit;
        let surplus = self.next_surplus();
        let id = self.parked.insert(entry)?;
        if is_full {
            self.close_parked(surplus.unwrap_or(id));
        }
        Some(id)
    }

    /// Holds a connection that the master has sent. A connection of a listener that receives no
    /// more goes back to the master. If other code accepts on the listener, the connection closes,
    /// because that code cannot receive it, and the master might send it again and again.
    pub(crate) fn hold_moved(&mut self, handle: HandleId, times_parked: u32, now: Time) -> Held {
        let listener = self.by_handle(handle).unwrap_or(NO_LISTENER);
        match self.is_datagram(listener) || self.is_std(listener) {
            true => Held::Closed,
            false => self.hold(listener, Some(handle), times_parked, now),
        }
    }

    /// Records that the client of an idle connection has sent something. Returns the listener that
    /// passes the connection to the application.
    pub(crate) fn data_arrived(&mut self, id: ConnectionId) -> Option<ListenerId> {
        if !matches!(self.parked.state(id), Some(State::Idle(_))) {
            return None;
        }
        let listener = self.parked.entries.get(id)?.listener;
        let entry = self.listeners.get_mut(&listener)?;
        entry.resumed.push_back(id);
        self.parked.set(id, State::Ready);
        Some(listener)
    }

    /// Records that the client of an idle or lingering connection has hung up, or that the
    /// connection cannot be watched. Closes the connection.
    pub(crate) fn hung_up(&mut self, id: ConnectionId) {
        if self.parked.state(id).and_then(State::expiry).is_some() {
            self.close_parked(id);
        }
    }

    /// Returns the idle connections. The shell checks them once more before they leave or close.
    pub(crate) fn idle_connections(&self) -> Vec<ConnectionId> {
        let is_idle = |entry: &Entry| matches!(entry.state, State::Idle(_));
        self.parked.entries.filter(is_idle)
    }

    /// Returns the connections that `expire_parked` closes. The shell checks them once more before,
    /// because the poller may not have reported yet that their clients have sent something.
    pub(crate) fn expiring(&self, now: Time) -> Vec<ConnectionId> {
        self.parked.expiries.due(now).collect()
    }

    /// Returns the connection that closes if the worker holds another one, or `None` if none
    /// closes. The shell checks the returned connections until one is silent.
    pub(crate) fn next_surplus(&self) -> Option<ConnectionId> {
        let is_full = self.parked.entries.len() >= self.parked.limit;
        let (_, first) = self.parked.expiries.first().filter(|_| is_full)?;
        Some(first)
    }

    /// Closes the connections whose clients have been silent for too long.
    pub(crate) fn expire_parked(&mut self, now: Time) {
        if self.parked_deadline().is_none_or(|alarm| alarm > now) {
            return;
        }
        self.extend_late(now);
        loop {
            let first = self.parked.expiries.first();
            let Some((_, id)) = first.filter(|(expiry, _)| expiry.time() <= now) else {
                self.parked.alarm = first.map(|(expiry, _)| expiry.time());
                return;
            };
            self.close_parked(id);
        }
    }

    fn close_parked(&mut self, id: ConnectionId) {
        if self.parked.remove(id).is_some() {
            self.actions.push_back(Action::CloseParked(id));
        }
    }
}

// Queries, and connections that leave the table.
impl<F> WorkerCore<F> {
    /// Returns the time by which `expire_parked` must be called. Without an idle or lingering
    /// connection there is none, so that an idle worker sleeps.
    pub(crate) fn parked_deadline(&self) -> Option<Time> {
        self.parked.expiries.first().and(self.parked.alarm)
    }

    /// Returns whether the client of a parked connection of this listener has sent something.
    pub(crate) fn has_resumed(&self, listener: ListenerId) -> bool {
        let entry = self.listeners.get(&listener);
        entry.is_some_and(|entry| !entry.resumed.is_empty())
    }

    /// Removes the listener's next connection whose client has sent something. Returns the
    /// connection, and the number of times that it has been parked.
    pub(crate) fn next_resumed(&mut self, listener: ListenerId) -> Option<(ConnectionId, u32)> {
        let entry = self.listeners.get_mut(&listener)?;
        let id = entry.resumed.pop_front()?;
        let removed = self.parked.remove(id)?;
        Some((id, removed.times_parked))
    }

    /// Removes and returns the next connection that the shell sends to the master.
    pub(crate) fn next_leaving(&mut self) -> Option<Leaving> {
        let leaving = self.parked.next_leaving();
        self.close_if_killed();
        leaving
    }

    pub(crate) fn has_leaving(&self) -> bool {
        !self.parked.leaving.is_empty()
    }

    /// Lets the idle connections of one listener, or of all listeners, leave. Those whose clients
    /// have sent something stay for the application.
    pub(super) fn idle_leave(&mut self, listener: Option<ListenerId>) {
        self.leave_where(|entry| {
            let is_own = listener.is_none_or(|listener| entry.listener == listener);
            is_own && matches!(entry.state, State::Idle(_))
        });
    }

    /// Lets all connections of a listener leave, because it closes.
    pub(super) fn all_leave(&mut self, listener: ListenerId) {
        if let Some(entry) = self.listeners.get_mut(&listener) {
            entry.resumed = VecDeque::new();
        }
        self.leave_where(|entry| entry.listener == listener && entry.state != State::Leaving);
    }

    /// Lets all connections leave, because the application no longer has the worker.
    pub(crate) fn release_parked(&mut self) {
        for listener in self.listeners_where(|entry| !entry.resumed.is_empty()) {
            self.all_leave(listener);
        }
        self.idle_leave(None);
    }

    fn leave_where(&mut self, is_wanted: impl Fn(&Entry) -> bool) {
        if self.parked.is_empty() {
            return;
        }
        for id in self.parked.entries.filter(is_wanted) {
            let entry = self.parked.entries.get(id);
            if entry.is_some_and(|entry| entry.handle.is_some()) {
                self.parked.set(id, State::Leaving);
            } else {
                self.close_parked(id);
            }
        }
        if self.has_leaving() {
            self.actions.push_back(Action::SendLeaving);
        }
    }

    /// Closes all connections, because the channel has closed.
    pub(super) fn close_all_parked(&mut self) {
        for id in self.parked.entries.filter(|_| true) {
            self.close_parked(id);
        }
        self.parked = ParkedTable {
            limit: self.parked.limit,
            ..ParkedTable::new()
        };
    }
}
