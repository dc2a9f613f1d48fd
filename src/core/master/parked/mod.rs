//! Connections that the master holds: parked connections, and the master's copies of those that
//! were parked before.
//!
//! A worker parks a connection when it has answered a request and the client may send another one.
//! The first time, the worker sends the connection to the master. From then on, the master keeps
//! its own copy. It dispatches a copy to a worker whenever the client sends something, and the
//! worker only reports that it has parked the connection again, or that it keeps the connection.
//! Therefore an idle connection is not closed because a worker ends, except if the workers that remain
//! have other users (see below).
//!
//! On a listener with `wait_for_data`, the master also holds each new connection until the client
//! sends something. While the listener drains, new connections go to a worker at once.
//!
//! ```text
//! from        event                                                        to
//! ----------  -----------------------------------------------------------  ----------
//! (none)      a worker parks a connection for the first time               Idle
//! (none)      a connection is accepted on a listener with `wait_for_data`  Idle
//! Idle        the client sends something                                   Ready
//! Ready       the dispatcher chooses a worker                              Dispatched
//! Dispatched  the connection is reclaimed from the worker's queue          Ready
//! Dispatched  the worker parks the connection again                        Idle
//! Dispatched  the worker keeps the connection, or its channel closes       (removed)
//! Ready       the client hangs up before a worker receives the connection  (removed)
//! Idle        the client hangs up or is silent for too long, the master    (removed)
//!             holds too many connections, or the listener closes
//! ```
//!
//! If another master takes over (see `passing`), the connections go to it.
//!
//! With the other policies, the workers hold idle connections themselves. When a listener ends for a
//! worker, the worker parks them in the master, which moves them to another worker that serves the
//! listener. While no other worker does, the connections are `Idle` here, and the next worker
//! receives them. They close if the listener ends for all workers. The connections that another
//! master has passed go to workers in the same way.
//!
//! A worker may keep a copy of a connection that it parks. The connection therefore goes only to
//! workers of the same user. If all workers that serve the listener have other users, it closes
//! (`close_excluded`).
//!
//! The master never shuts a connection down. It only closes its copy, so that a process which has
//! another copy can go on.

mod last_check;
mod moving;
mod passing;
mod ready;
mod settings;
mod users;

use std::ops::Bound;

use super::listener::{AcceptState, Listener, Stage};
use super::{Action, HandOff, MasterCore, Resumed};
use crate::core::dispatch::{Sequenced, Undispatched};
use crate::core::parked::{CONNECTIONS_MAX, Expiries, Expiry, Slab};
use crate::types::connection_id::ConnectionId;
use crate::types::endpoint::Kind;
use crate::types::handle::HandleId;
use crate::types::ordered_set::OrderedSet;
use crate::types::protocol::{FrameError, Violation};
use crate::types::time::Time;
use crate::types::user::{ParkHistory, User};
use crate::types::worker_id::WorkerId;
use passing::Keeper;
pub(super) use ready::ReadyQueue;

#[derive(Debug)]
struct Entry {
    handle: HandleId,
    state: State,
    history: ParkHistory,
}

/// The state of a connection that the master holds. See the [module](self) for the transitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The master waits until the client sends something.
    Idle(Expiry),
    /// The client has sent something, and the connection waits for a worker.
    Ready,
    /// The connection is in the worker's queue, or the worker serves it.
    Dispatched(WorkerId),
    /// The connection waits until the shell has passed it to the other master.
    Passing,
}

/// The table of the connections that the master holds.
#[derive(Debug)]
pub(super) struct ParkedTable {
    entries: Slab<Entry>,
    /// The idle connections.
    expiries: Expiries,
    /// The connections that workers have, by worker.
    dispatched: OrderedSet<(WorkerId, ConnectionId)>,
    /// The connections that wait until the shell has passed them to the other master.
    passing: OrderedSet<ConnectionId>,
    keeper: Keeper,
    /// The maximum number of connections that the master holds.
    limit: usize,
    /// The listeners from which the master accepts nothing, because it may hold no further
    /// connection.
    blocked: OrderedSet<HandleId>,
}

impl ParkedTable {
    pub(super) fn new() -> Self {
        Self {
            entries: Slab::new(),
            expiries: Expiries::new(),
            dispatched: OrderedSet::new(),
            passing: OrderedSet::new(),
            keeper: Keeper::ThisMaster,
            limit: CONNECTIONS_MAX,
            blocked: OrderedSet::new(),
        }
    }

    /// Returns how many new connections the master may accept in order to hold them, or `None` if
    /// it holds none at all. Idle connections count as free space, because one is closed for each
    /// new connection beyond the limit.
    pub(super) fn space(&self) -> Option<u64> {
        let free = self.limit.saturating_sub(self.len());
        (self.limit > 0).then_some((free + self.expiries.len()) as u64)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    fn get(&self, connection: ConnectionId) -> Option<&Entry> {
        self.entries.get(connection)
    }

    fn get_mut(&mut self, connection: ConnectionId) -> Option<&mut Entry> {
        self.entries.get_mut(connection)
    }

    fn state(&self, connection: ConnectionId) -> Option<State> {
        self.get(connection).map(|entry| entry.state)
    }

    /// Changes the state of a connection, and updates the ordered sets. Returns the changed entry.
    fn set(&mut self, connection: ConnectionId, state: State) -> Option<&Entry> {
        let entry = self.get_mut(connection)?;
        let old = std::mem::replace(&mut entry.state, state);
        self.unlink(connection, old);
        self.link(connection, state);
        self.get(connection)
    }

    fn link(&mut self, connection: ConnectionId, state: State) {
        match state {
            State::Idle(expiry) => self.expiries.insert(expiry, connection),
            State::Ready => {}
            State::Dispatched(worker) => self.dispatched.insert((worker, connection)),
            State::Passing => self.passing.insert(connection),
        }
    }

    fn unlink(&mut self, connection: ConnectionId, state: State) {
        match state {
            State::Idle(expiry) => self.expiries.remove(expiry, connection),
            State::Ready => {}
            State::Dispatched(worker) => drop(self.dispatched.remove((worker, connection))),
            State::Passing => drop(self.passing.remove(connection)),
        }
    }

    /// Adds a connection under a free number. Returns the number, or `None` if there is no free
    /// number.
    fn insert(&mut self, entry: Entry) -> Option<ConnectionId> {
        let state = entry.state;
        let connection = self.entries.insert(entry)?;
        self.link(connection, state);
        Some(connection)
    }

    fn remove(&mut self, connection: ConnectionId) -> Option<Entry> {
        let entry = self.entries.remove(connection)?;
        self.unlink(connection, entry.state);
        Some(entry)
    }

    /// Records that a connection is dispatched to the worker.
    pub(super) fn dispatched<C>(&mut self, connection: &HandOff<C>, worker: WorkerId) {
        if let HandOff::Held(resumed) = connection {
            self.set(resumed.connection, State::Dispatched(worker));
        }
    }

    /// Reclaims a connection that the worker has not received, so that the connection waits again. Returns `false` if the master must ignore the copy on its way to the worker, because
    /// the worker has already reported the connection as parked or detached.
    pub(super) fn reclaim<C>(&mut self, connection: &HandOff<C>, worker: WorkerId) -> bool {
        let HandOff::Held(Resumed { connection, .. }) = connection else {
            return true;
        };
        let is_dispatched = self.state(*connection) == Some(State::Dispatched(worker));
        if is_dispatched {
            self.set(*connection, State::Ready);
        }
        is_dispatched
    }

    /// Returns the user to whose workers a connection is restricted, if any.
    pub(super) fn parked_by<C>(&self, connection: &HandOff<C>) -> Option<User> {
        match connection {
            HandOff::New(_) => None,
            HandOff::Held(resumed) => self.get(resumed.connection)?.history.by,
        }
    }

    /// Returns the latest time at which `expire_parked` must be called.
    pub(super) fn deadline(&self) -> Option<Time> {
        let (expiry, _) = self.expiries.first()?;
        Some(expiry.time())
    }

    /// Returns the number of idle connections.
    #[cfg(any(test, fuzzing))]
    pub(super) fn count_idle(&self) -> usize {
        self.expiries.len()
    }

    /// Returns the connections of one worker.
    fn held_by(&self, worker: WorkerId) -> Vec<ConnectionId> {
        let from = (worker, ConnectionId(0));
        let to = (worker, ConnectionId(u32::MAX));
        let all = self
            .dispatched
            .range((Bound::Included(from), Bound::Included(to)));
        all.map(|(_, connection)| connection).collect()
    }

    /// Returns whether a connection of the listener is idle.
    pub(super) fn is_any_idle_on(&self, handle: HandleId) -> bool {
        let mut idle = self.expiries.iter();
        idle.any(|connection| {
            let entry = self.get(connection);
            entry.is_some_and(|entry| entry.handle == handle)
        })
    }

    /// Returns whether a connection is idle.
    #[cfg(any(test, fuzzing))]
    pub(super) fn is_idle(&self, connection: ConnectionId) -> bool {
        matches!(self.state(connection), Some(State::Idle(_)))
    }

    /// Returns the idle connections of one listener.
    fn idle_on(&self, handle: HandleId) -> Vec<ConnectionId> {
        let is_on = |connection: &ConnectionId| {
            self.get(*connection)
                .is_some_and(|entry| entry.handle == handle)
        };
        self.expiries.iter().filter(is_on).collect()
    }
}

// Parking.
impl<C, F> MasterCore<C, F> {
    /// Takes a connection that the worker parks for the first time, or that a worker with a copy of
    /// the listener can no longer hold. If the listener has closed, closes the connection. Kills a
    /// worker that has not sent `Online`, or that has never had the listener, unless the listener
    /// no longer exists.
    pub(crate) fn park(
        &mut self,
        worker: WorkerId,
        handle: HandleId,
        connection: C,
        times_parked: u32,
    ) {
        if !self.is_connected(worker) {
            return;
        }
        let entry = self.workers.get(&worker);
        let has_had = entry.is_some_and(|entry| entry.is_online() && entry.has_had(handle));
        let listener = self.listeners.get(&handle);
        let is_datagram = |own: &Listener<C>| own.key.endpoint.kind == Kind::Udp;
        // Report no violation if the listener no longer exists. The worker may have joined it, but
        // `WorkerEntry::joined` forgets such listeners, so the master cannot check this.
        if listener.is_some_and(|own| !has_had || is_datagram(own)) {
            return self.violation(worker, FrameError::Violation(Violation::UnknownPark));
        }
        let history = ParkHistory {
            times: times_parked,
            by: entry.map(|entry| entry.user),
        };
        self.ledger.parked += 1;
        self.give_or_hold(handle, Some(worker), connection, history);
    }

    /// Moves an idle connection to a worker other than `from`, if the listener's workers hold idle
    /// connections. Otherwise holds the connection.
    fn give_or_hold(
        &mut self,
        handle: HandleId,
        from: Option<WorkerId>,
        connection: C,
        history: ParkHistory,
    ) {
        let listener = self.listeners.get(&handle);
        match listener.is_some_and(|own| !own.master_accepts()) {
            true => self.move_parked(handle, from, HandOff::New(connection), history),
            false => self.hold(handle, connection, history),
        }
    }

    /// Holds a connection until its client sends something. If the master holds too many
    /// connections, closes the one that would expire first.
    pub(super) fn hold(&mut self, handle: HandleId, connection: C, history: ParkHistory) {
        if self.parked.keeper == Keeper::OtherMaster {
            return self.pass_new(handle, connection, history);
        }
        let Some(timeout) = self.silence_timeout(handle, history) else {
            self.ledger.idle_closed += 1;
            return;
        };
        if self.parked.len() >= self.parked.limit {
            let Some((_, first)) = self.parked.expiries.first() else {
                // No held connection is idle, so close the new one instead.
                self.ledger.idle_closed += 1;
                return;
            };
            self.ledger.idle_closed += 1;
            self.close_held(first);
        }
        let entry = Entry {
            handle,
            state: State::Idle(self.parked.expiries.next_expiry(self.now, timeout)),
            history,
        };
        match self.parked.insert(entry) {
            Some(id) => self.actions.push_back(Action::Hold { id, connection }),
            None => self.ledger.idle_closed += 1,
        }
    }

    /// Returns how long the client of a connection may be silent. Returns `None` if the listener has
    /// closed, if it closes as soon as its workers have emptied its backlog, or if no worker may
    /// receive the connection. A client that would send a request meanwhile would wait in vain.
    fn silence_timeout(&self, handle: HandleId, history: ParkHistory) -> Option<Time> {
        let listener = self.listeners.get(&handle)?;
        let has_ended = matches!(listener.stage, Stage::Emptying | Stage::Unbound);
        let is_closed = has_ended || listener.excludes(history.by);
        (!is_closed).then(|| match history.times {
            0 => listener.parking.first_data_timeout(),
            1.. => listener.parking.idle_timeout(),
        })
    }

    /// Processes a worker's report that it has parked a connection again.
    ///
    /// # Errors
    ///
    /// Returns a violation if the worker does not have the connection.
    pub(super) fn parked_again(
        &mut self,
        worker: WorkerId,
        connection: ConnectionId,
    ) -> Result<(), FrameError> {
        if self.parked.state(connection) != Some(State::Dispatched(worker)) {
            return Err(FrameError::Violation(Violation::UnknownConnection));
        }
        self.ledger.parked += 1;
        let user = self.workers.get(&worker).map(|entry| entry.user);
        let Some(entry) = self.parked.get_mut(connection) else {
            return Ok(());
        };
        entry.history = ParkHistory {
            times: entry.history.times.saturating_add(1),
            by: user,
        };
        self.hold_again(connection);
        Ok(())
    }

    /// Holds a connection again until its client sends something. The master already has a copy.
    fn hold_again(&mut self, connection: ConnectionId) {
        let Some(&Entry {
            handle, history, ..
        }) = self.parked.get(connection)
        else {
            return;
        };
        if self.parked.keeper == Keeper::OtherMaster {
            return self.pass(connection);
        }
        match self.silence_timeout(handle, history) {
            Some(timeout) => {
                let state = State::Idle(self.parked.expiries.next_expiry(self.now, timeout));
                self.parked.set(connection, state);
                self.actions.push_back(Action::AwaitData { id: connection });
                self.space_freed();
            }
            None => {
                self.ledger.idle_closed += 1;
                self.close_held(connection);
            }
        }
    }

    /// Processes a worker's report that it keeps or has closed a connection. The master closes its
    /// copy.
    ///
    /// # Errors
    ///
    /// Returns a violation if the worker does not have the connection.
    pub(super) fn detached_connection(
        &mut self,
        worker: WorkerId,
        connection: ConnectionId,
    ) -> Result<(), FrameError> {
        if self.parked.state(connection) != Some(State::Dispatched(worker)) {
            return Err(FrameError::Violation(Violation::UnknownConnection));
        }
        self.close_held(connection);
        Ok(())
    }

    /// Closes the master's copy of a connection.
    pub(super) fn close_held(&mut self, connection: ConnectionId) {
        if self.parked.remove(connection).is_some() {
            self.actions.push_back(Action::CloseHeld { id: connection });
            self.space_freed();
        }
    }

    /// Accepts from the listeners that wait until the master may hold another connection.
    fn space_freed(&mut self) {
        if self.parked.space() != Some(0) {
            for handle in std::mem::take(&mut self.parked.blocked).iter() {
                self.accept_if_possible(handle);
            }
        }
    }

    /// Records that the master accepts nothing from the listener, if the reason is that the master
    /// may hold no further connection.
    pub(super) fn await_space(&mut self, handle: HandleId) {
        let listener = self.listeners.get(&handle);
        let holds_new = listener.is_some_and(Listener::holds_new);
        if holds_new && self.parked.space() == Some(0) {
            self.parked.blocked.insert(handle);
        }
    }

    /// Closes the master's copies of the connections that the worker has received, because its
    /// channel has closed. Leaves out listeners whose queue for the worker has not been closed yet,
    /// because the queue may still contain some of their connections.
    pub(super) fn close_held_by(&mut self, worker: WorkerId) {
        for connection in self.parked.held_by(worker) {
            let handle = self.parked.get(connection).map(|entry| entry.handle);
            let listener = handle.and_then(|handle| self.listeners.get(&handle));
            if !listener.is_some_and(|listener| listener.members.contains(worker)) {
                self.close_held(connection);
            }
        }
    }

    /// Closes the idle connections of a listener that closes.
    pub(super) fn close_idle(&mut self, handle: HandleId) {
        for connection in self.parked.idle_on(handle) {
            self.ledger.idle_closed += 1;
            self.close_held(connection);
        }
    }

    /// Closes the connections whose clients have been silent for too long.
    pub(super) fn expire_parked(&mut self) {
        while self.parked.deadline().is_some_and(|time| time <= self.now) {
            let Some((_, connection)) = self.parked.expiries.first() else {
                return;
            };
            self.ledger.expired += 1;
            self.close_held(connection);
        }
    }
}

// Reports from the shell about idle connections.
impl<C, F> MasterCore<C, F> {
    /// Records that the client of an idle connection has sent something.
    pub(crate) fn data_arrived(&mut self, connection: ConnectionId) {
        let Some(&Entry {
            handle,
            state: State::Idle(_),
            history,
        }) = self.parked.get(connection)
        else {
            return;
        };
        // The listener exists, because closing a listener also closes its idle connections. If its
        // workers accept and none of them serves it, the next one receives the connection with its
        // data.
        let listener = self.listeners.get_mut(&handle);
        let Some(listener) = listener.filter(|listener| listener.master_accepts()) else {
            return;
        };
        self.parked.set(connection, State::Ready);
        self.ledger.resumed += u64::from(history.times > 0);
        let resumed = Resumed {
            connection,
            times_parked: history.times,
        };
        listener.ready.connections.push_back(resumed);
        self.accept_if_possible(handle);
    }

    /// Records that the client of an idle connection has hung up.
    pub(crate) fn idle_hung_up(&mut self, connection: ConnectionId) {
        if matches!(self.parked.state(connection), Some(State::Idle(_))) {
            self.ledger.closed_by_peer += 1;
            self.close_held(connection);
        }
    }

    /// Records that an idle connection cannot be watched. The master closes it.
    pub(crate) fn not_held(&mut self, connection: ConnectionId) {
        if matches!(self.parked.state(connection), Some(State::Idle(_))) {
            self.ledger.idle_closed += 1;
            self.close_held(connection);
        }
    }
}

// Dispatching.
impl<C, F> MasterCore<C, F> {
    /// Passes resumed connections to the dispatcher, as far as it has capacity. If the backlog may
    /// have connections too, leaves a part of the capacity to them. Returns how many connections
    /// were passed.
    pub(super) fn dispatch_resumed(&mut self, handle: HandleId) -> u64 {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return 0;
        };
        if listener.ready.is_empty() || !listener.may_resume() {
            return 0;
        }
        let capacity = listener.dispatcher.capacity();
        match listener.may_have_backlog() {
            true => {
                let share = listener.ready.share(capacity);
                self.dispatch_at_most(handle, share)
            }
            false => self.dispatch_at_least(handle, capacity),
        }
    }

    /// Passes resumed connections to the dispatcher after the master has accepted. They get the
    /// capacity that new connections have not used, even if it is the window of a worker that is
    /// busy now.
    pub(super) fn dispatch_rest(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        let unused = std::mem::take(&mut listener.ready.reserved);
        let at_most = listener.dispatcher.capacity().max(unused);
        if listener.may_resume() {
            self.dispatch_at_least(handle, at_most);
        }
    }

    /// Passes resumed connections to the dispatcher: `first` of them, and then further ones as long
    /// as the dispatcher has capacity. Returns how many were passed.
    ///
    /// The dispatcher may still have all its capacity after the first ones. For fairness, an idle
    /// worker may have left them to workers that are busy.
    fn dispatch_at_least(&mut self, handle: HandleId, first: u64) -> u64 {
        let mut passed = 0;
        let mut next = first;
        while next > 0 {
            passed += self.dispatch_at_most(handle, next);
            let listener = self.listeners.get(&handle);
            let has_ready = |listener: &&Listener<C>| !listener.ready.is_empty();
            next = listener
                .filter(has_ready)
                .map_or(0, |listener| listener.dispatcher.capacity());
        }
        passed
    }

    /// Passes at most `share` resumed connections to the dispatcher, and those for which no worker is
    /// idle, because all idle workers have other users. Returns how many were passed, without the
    /// latter.
    fn dispatch_at_most(&mut self, handle: HandleId, share: u64) -> u64 {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return 0;
        };
        let mut passed = 0;
        while passed < share {
            let Some(resumed) = listener.ready.connections.pop_front() else {
                break;
            };
            let connection = HandOff::Held(resumed);
            let user = self.parked.parked_by(&connection);
            passed += u64::from(!listener.dispatcher.must_wait(user));
            listener.dispatcher.push_resumed(connection, user);
        }
        self.dispatch_waiting(handle);
        passed
    }

    /// Reclaims a connection that the worker has not received. Returns `false` if the connection
    /// does not wait again, because the worker has already reported it as parked or detached, or
    /// because no worker may receive it.
    pub(in super::super) fn reclaim_hand_off(
        &mut self,
        handle: HandleId,
        connection: &HandOff<C>,
        worker: WorkerId,
    ) -> bool {
        if !self.parked.reclaim(connection, worker) {
            return false;
        }
        // If another master takes over, it decides which of its workers may receive the connection.
        let is_kept = self.parked.keeper == Keeper::ThisMaster;
        let user = self.parked.parked_by(connection);
        let listener = self.listeners.get(&handle);
        let is_excluded =
            is_kept && listener.is_some_and(|listener| listener.members.excludes(user));
        match connection {
            HandOff::Held(resumed) if is_excluded => {
                self.close_held(resumed.connection);
                false
            }
            HandOff::Held(_) | HandOff::New(_) => true,
        }
    }

    /// Returns those reclaimed connections that go to another worker. If a worker reported a
    /// connection as parked or detached while the connection was in its queue, this report counts,
    /// and the connection is left out. So is a connection that no worker may receive.
    pub(super) fn keep_reclaimed(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        connections: Vec<Sequenced<HandOff<C>>>,
    ) -> Vec<Undispatched<HandOff<C>>> {
        let count = connections.len();
        let mut kept = Vec::with_capacity(count);
        for connection in connections {
            if self.reclaim_hand_off(handle, &connection.connection, worker) {
                let user = self.parked.parked_by(&connection.connection);
                kept.push(Undispatched { connection, user });
            }
        }
        let left_out = (count - kept.len()) as u64;
        if let Some(listener) = self.listeners.get_mut(&handle).filter(|_| left_out > 0) {
            let received = listener.dispatcher.drop_reclaimed(worker, left_out);
            self.count_received(received);
            self.ledger.dropped += left_out;
        }
        kept
    }

    /// Drops the listener's resumed connections that the dispatcher does not have.
    pub(super) fn drop_ready(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        let ready = std::mem::take(&mut listener.ready.connections);
        let dropped = ready.into_iter().map(HandOff::Held).collect();
        self.drop_hand_offs(dropped);
    }
}

impl<C> Listener<C> {
    /// Returns whether resumed connections may go to the dispatcher. While the master accepts, the
    /// rest of the dispatcher's capacity is for the new connections.
    fn may_resume(&self) -> bool {
        let is_reserved = self.accept_state == AcceptState::Accepting && !self.holds_new();
        self.may_dispatch() && self.stage != Stage::Pausing && !is_reserved
    }
}
