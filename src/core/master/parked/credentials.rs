//! The workers that may receive a connection that other workers have parked.
//!
//! A worker can keep a copy of every connection that it has had, and can read the client's next
//! requests with it. Therefore, a connection that a worker has parked goes only to workers with that
//! worker's user and group. Once none of these workers serves the listener and others do, the idle
//! connections close. Without this rule, a worker could read requests that are meant for another
//! user's worker.
//!
//! The dispatcher does not know the rule, because nearly all masters have workers of one user only.
//! If it chooses a worker that may not have the connection, the connection is assigned to another
//! one.

use super::{HandOff, MasterCore};
use crate::core::dispatch::Dispatched;
use crate::types::credentials::Credentials;
use crate::types::handle::HandleId;
use crate::types::worker_id::WorkerId;

impl<C, F> MasterCore<C, F> {
    pub(super) fn credentials(&self, worker: WorkerId) -> Option<Credentials> {
        self.workers.get(&worker).map(|entry| entry.credentials)
    }

    /// Returns whether a worker may have a connection that workers with these credentials have parked.
    /// `None` stands for a connection that no worker has parked.
    pub(super) fn may_have(&self, parked_by: Option<Credentials>, worker: WorkerId) -> bool {
        parked_by.is_none() || self.credentials(worker) == parked_by
    }

    /// Returns whether the listener is served, but by no worker that may have the connection.
    pub(super) fn is_foreign(&self, handle: HandleId, parked_by: Option<Credentials>) -> bool {
        let listener = self.listeners.get(&handle);
        listener.is_some_and(|own| {
            let mut serving = own.members.serving();
            own.members.is_served() && !serving.any(|worker| self.may_have(parked_by, worker))
        })
    }

    /// Closes the idle connections of the listener that none of its workers may have any more,
    /// because a worker no longer serves it.
    pub(in super::super) fn close_foreign(&mut self, handle: HandleId, left: WorkerId) {
        let credentials = self.credentials(left);
        if !self.is_foreign(handle, credentials) {
            return;
        }
        for connection in self.parked.idle_on(handle) {
            let entry = self.parked.get(connection);
            if entry.is_some_and(|entry| entry.parked_by == credentials) {
                self.ledger.idle_closed += 1;
                self.close_held(connection);
            }
        }
    }

    /// Returns whether the worker may have the connection for which the dispatcher has chosen it.
    pub(in super::super) fn may_receive(&self, hand_off: &HandOff<C>, worker: WorkerId) -> bool {
        match hand_off {
            HandOff::New(_) => true,
            HandOff::Held(resumed) => {
                let entry = self.parked.get(resumed.connection);
                entry.is_none_or(|entry| self.may_have(entry.parked_by, worker))
            }
        }
    }

    /// Assigns a connection to a worker that may have it, because the dispatcher has chosen another
    /// one. Drops the connection if there is none.
    pub(in super::super) fn redirect(
        &mut self,
        handle: HandleId,
        dispatched: Dispatched<HandOff<C>>,
    ) {
        let Dispatched {
            worker, connection, ..
        } = dispatched;
        let Some(listener) = self.listeners.get(&handle) else {
            return;
        };
        let may_receive = |other| self.may_receive(&connection.connection, other);
        let other = listener.dispatcher.least_loaded(may_receive);
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        let dropped = listener.dispatcher.redirect(worker, other, connection);
        self.drop_hand_offs(dropped.into_iter().collect());
    }
}
