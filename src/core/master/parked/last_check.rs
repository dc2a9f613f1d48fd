//! The idle connections that the shell checks once more before the master closes them.
//!
//! The poller may not have reported yet that a client has sent something, for example because the
//! event loop was busy. Before a report that may close idle connections, the shell therefore peeks
//! at them, and reports what it finds by `data_arrived` or `idle_hung_up`.

use super::State;
use crate::core::master::listener::{Listener, Stage};
use crate::core::master::{Action, MasterCore};
use crate::types::connection_id::ConnectionId;
use crate::types::time::Time;

impl<C, F> MasterCore<C, F> {
    /// Returns the idle connections that `tick` closes at the time `now`, or that close soon
    /// afterwards because their listener's grace period ends.
    pub(crate) fn closing_at(&mut self, now: Time) -> Vec<ConnectionId> {
        let mut closing: Vec<_> = self.parked.expiries.due(now).collect();
        for handle in self.listeners.due(now) {
            let listener = self.listeners.get(&handle);
            let ends =
                |own: &Listener<C>| matches!(own.stage, Stage::Draining(Some(end)) if end <= now);
            if listener.is_some_and(ends) {
                closing.extend(self.parked.idle_on(handle));
            }
        }
        closing.retain(|connection| self.is_stored(*connection));
        closing
    }

    /// Returns the idle connection that closes if the master holds another one. Returns `None` if
    /// none closes. The shell checks the returned connections until one is silent.
    pub(crate) fn next_surplus(&self) -> Option<ConnectionId> {
        if self.parked.len() < self.parked.limit {
            return None;
        }
        let (_, first) = self.parked.expiries.first()?;
        self.is_stored(first).then_some(first)
    }

    /// Returns whether the shell has already received the connection. Otherwise, the shell may
    /// still have an earlier connection with the same number.
    fn is_stored(&self, connection: ConnectionId) -> bool {
        let mut actions = self.actions.iter();
        let is_idle = matches!(self.parked.state(connection), Some(State::Idle(_)));
        is_idle
            && !actions.any(|action| matches!(action, Action::Hold { id, .. } if *id == connection))
    }
}
