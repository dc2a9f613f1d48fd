//! Connections that no worker may receive, because all workers that serve the listener have other
//! users than the worker that parked the connection.

use std::collections::VecDeque;

use crate::core::master::{HandOff, MasterCore};
use crate::types::handle::HandleId;

impl<C, F> MasterCore<C, F> {
    /// Closes the connections that no worker may receive, because all workers that serve the listener
    /// have other users than the worker that parked the connection. Call it after a worker has joined
    /// the listener or the listener has ended for a worker.
    ///
    /// Clients that have already sent something lose their requests, because no worker may read them.
    pub(in super::super) fn close_excluded(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        let parked = &self.parked;
        let by = |connection| parked.get(connection).and_then(|entry| entry.history.by);
        // Check these also during a pause, because a connection that waits in the dispatcher would
        // delay its end.
        let members = &listener.members;
        let is_excluded = |waiting: &HandOff<C>| members.excludes(parked.parked_by(waiting));
        let mut dropped = listener.dispatcher.take_waiting_if(is_excluded);
        listener.dispatcher.forget_unused_users();
        let ready = std::mem::take(&mut listener.ready.connections).into_iter();
        let (excluded, others) =
            ready.partition::<VecDeque<_>, _>(|own| listener.excludes(by(own.connection)));
        listener.ready.connections = others;
        dropped.extend(excluded.into_iter().map(HandOff::Held));
        let mut idle = parked.idle_on(handle);
        idle.retain(|connection| listener.excludes(by(*connection)));
        self.drop_hand_offs(dropped);
        for connection in idle {
            self.ledger.idle_closed += 1;
            self.close_held(connection);
        }
    }
}
