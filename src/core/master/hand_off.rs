//! A connection on its way to a worker, and its end if no worker receives it.

use super::MasterCore;
use crate::types::connection_id::ConnectionId;

/// A connection on its way to a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HandOff<C> {
    /// A new connection, of which the master keeps no copy.
    New(C),
    /// A copy of a connection that the master holds.
    Held(Resumed),
}

/// A connection that the master holds, and that goes to a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resumed {
    pub(crate) connection: ConnectionId,
    /// The number of times that the connection has been parked.
    pub(crate) times_parked: u32,
}

impl<C, F> MasterCore<C, F> {
    /// Closes a connection that no worker receives.
    pub(super) fn close_hand_off(&mut self, hand_off: HandOff<C>) {
        match hand_off {
            HandOff::New(connection) => drop(connection),
            HandOff::Held(resumed) => self.close_held(resumed.connection),
        }
    }

    /// Closes connections that no worker can serve, except those that go to the other master.
    pub(super) fn drop_hand_offs(&mut self, dropped: Vec<HandOff<C>>) {
        let dropped = self.pass_held(dropped);
        self.ledger.dropped += dropped.len() as u64;
        for hand_off in dropped {
            self.close_hand_off(hand_off);
        }
    }
}
