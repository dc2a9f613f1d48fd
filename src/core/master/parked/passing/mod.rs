//! Passing connections to another master, which takes over from this one, and receiving them.
//!
//! Once another master takes over, this master passes every connection that it holds, except those
//! that its workers have. When a worker parks a connection later, or does not receive it from its
//! queue, that connection is passed too. New connections still go to this master's workers.
//!
//! With the other policies, workers hold their idle connections until they disconnect. They then
//! park the connections here, and the connections are passed, even if other workers of this master
//! still serve the listener.
//!
//! ```text
//! from                 event                                         to
//! -------------------  --------------------------------------------  ---------
//! (none), Idle, Ready  another master takes over, or has taken over  Passing
//! With                 the worker parks the connection, or the       Passing
//!                      connection is reclaimed
//! Passing              the shell has passed the connection           (removed)
//! Passing              no more connections can be passed             Idle
//! ```

#[cfg(test)]
#[allow(clippy::wildcard_enum_match_arm)]
mod tests;

use super::{Entry, HandOff, MasterCore, ParkedTable, State};
use crate::core::master::Action;
use crate::types::connection_id::ConnectionId;
use crate::types::handle::HandleId;
use crate::types::user::ParkHistory;

/// The master that keeps connections until their clients send something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keeper {
    ThisMaster,
    /// The master that takes over from this one.
    OtherMaster,
}

impl ParkedTable {
    /// Returns the number of connections that wait until they are passed.
    #[cfg(any(test, fuzzing))]
    pub(in super::super) fn count_passing(&self) -> usize {
        self.passing.len()
    }

    /// Returns the idle connections of all listeners, sorted by listener, so that the connections
    /// of one listener share messages.
    fn idle(&self) -> Vec<ConnectionId> {
        let idle = self.expiries.iter().filter_map(|connection| {
            let entry = self.get(connection)?;
            Some((entry.handle, connection))
        });
        let mut idle: Vec<_> = idle.collect();
        idle.sort_unstable();
        idle.into_iter().map(|(_, connection)| connection).collect()
    }
}

// The master that passes connections.
impl<C, F> MasterCore<C, F> {
    /// Passes all parked connections that no worker has, and all that workers park from now on, to
    /// the other master.
    pub(crate) fn pass_parked(&mut self) {
        self.parked.keeper = Keeper::OtherMaster;
        for handle in self.listeners.ids() {
            let listener = self.listeners.get_mut(&handle);
            let ready = listener.map(|listener| std::mem::take(&mut listener.ready.connections));
            for resumed in ready.into_iter().flatten() {
                self.pass(resumed.connection);
            }
            // These connections may have delayed the listener's drain. `redistribute` also passes
            // the waiting connections of which the master has a copy, and then continues the drain
            // or ends a pause.
            self.redistribute(handle);
        }
        for connection in self.parked.idle() {
            self.pass(connection);
        }
    }

    /// Passes a connection of which the master has a copy.
    pub(super) fn pass(&mut self, connection: ConnectionId) {
        if let Some(&Entry {
            handle, history, ..
        }) = self.parked.set(connection, State::Passing)
        {
            self.actions.push_back(Action::Pass {
                id: connection,
                handle,
                history,
                connection: None,
            });
        }
    }

    /// Passes a connection of which the master has no copy.
    pub(super) fn pass_new(&mut self, handle: HandleId, connection: C, history: ParkHistory) {
        let is_full = self.parked.len() >= self.parked.limit;
        let entry = Entry {
            handle,
            state: State::Passing,
            history,
        };
        let id = (!is_full).then(|| self.parked.insert(entry)).flatten();
        let Some(id) = id else {
            self.ledger.idle_closed += 1;
            return;
        };
        self.actions.push_back(Action::Pass {
            id,
            handle,
            history,
            connection: Some(connection),
        });
    }

    /// Passes those of the listener's waiting connections of which the master has a copy. Does
    /// nothing while this master keeps its connections.
    pub(in super::super) fn pass_waiting(&mut self, handle: HandleId) {
        if self.parked.keeper == Keeper::ThisMaster {
            return;
        }
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        let is_held = |hand_off: &HandOff<C>| matches!(hand_off, HandOff::Held(_));
        let held = listener.dispatcher.take_waiting_if(is_held);
        self.drop_hand_offs(held);
    }

    /// Passes those of the connections of which the master has a copy, and returns the others.
    /// Returns all connections while this master keeps its connections.
    pub(in super::super) fn pass_held(&mut self, hand_offs: Vec<HandOff<C>>) -> Vec<HandOff<C>> {
        if self.parked.keeper == Keeper::ThisMaster {
            return hand_offs;
        }
        let mut others = Vec::new();
        for hand_off in hand_offs {
            match hand_off {
                HandOff::Held(resumed) if self.parked.get(resumed.connection).is_some() => {
                    self.pass(resumed.connection);
                }
                other @ (HandOff::Held(_) | HandOff::New(_)) => others.push(other),
            }
        }
        others
    }

    /// Records that a connection has been passed.
    pub(crate) fn passed(&mut self, connection: ConnectionId) {
        if self.parked.state(connection) == Some(State::Passing) {
            self.ledger.passed += 1;
            self.close_held(connection);
        }
    }

    /// Closes a connection that the other master could not use.
    pub(crate) fn not_passed(&mut self, connection: ConnectionId) {
        if self.parked.state(connection) == Some(State::Passing) {
            self.ledger.idle_closed += 1;
            self.close_held(connection);
        }
    }

    /// Records that no more connections can be passed. This master keeps them again, and closes
    /// those whose listeners have closed.
    pub(crate) fn end_passing(&mut self) {
        self.parked.keeper = Keeper::ThisMaster;
        for connection in std::mem::take(&mut self.parked.passing).iter() {
            self.hold_again(connection);
        }
        for handle in self.listeners.ids() {
            self.move_held(handle);
        }
    }
}

// The master that receives connections.
impl<C, F> MasterCore<C, F> {
    /// Takes a connection that another master has passed, and that the listener accepted. Closes
    /// the connection if this master does not have the listener (`None`).
    pub(crate) fn receive_parked(
        &mut self,
        handle: Option<HandleId>,
        connection: C,
        history: ParkHistory,
    ) {
        self.ledger.parked += 1;
        match handle {
            Some(handle) => self.give_or_hold(handle, None, connection, history),
            None => self.ledger.idle_closed += 1,
        }
    }

    /// Records that another master has passed connections that this master could not receive.
    pub(crate) fn lost_parked(&mut self, count: usize) {
        self.ledger.parked += count as u64;
        self.ledger.idle_closed += count as u64;
    }
}
