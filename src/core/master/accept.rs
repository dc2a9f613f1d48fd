//! Accepting connections, and handling listeners that fail or are shut down.

use std::io;

use super::listener::{AcceptState, Stage};
use super::{Action, HandOff, MasterCore};
use crate::error::Error;
use crate::types::endpoint::Kind;
use crate::types::handle::HandleId;
use crate::types::time::Time;
use crate::types::user::ParkHistory;

/// The maximum number of connections that are accepted from one listener before the event loop
/// serves other descriptors.
///
/// With a larger number, a busy listener delays messages, timers and other listeners for longer.
/// With a smaller number, the poller is called more often for the same number of connections.
/// `cargo bench -- connections` measures the cost.
pub(crate) const ACCEPT_BATCH: u64 = 64;

/// The delay before the next attempt after a failure to accept, dispatch or move a connection. Also
/// the delay after another process has shut the listener down.
///
/// Without a delay, the event loop would spin while the listener stays readable, for example while
/// no descriptor is free. With a longer delay, clients wait longer although a descriptor is free
/// again. No benchmark chose this value.
pub(super) const RETRY_DELAY: Time = Time::from_millis(100);

impl<C, F> MasterCore<C, F> {
    /// Accepts connections after the poller has reported that the listener is readable.
    pub(crate) fn readable(&mut self, handle: HandleId) {
        if let Some(listener) = self.listeners.get_mut(&handle) {
            if listener.accept_state == AcceptState::Watched && listener.stage != Stage::Unbound {
                listener.accept_state = AcceptState::Ready;
                self.accept_if_possible(handle);
            }
        }
    }

    pub(crate) fn accepted(&mut self, handle: HandleId, connection: C) {
        self.ledger.accepted += 1;
        match self.listeners.get_mut(&handle) {
            Some(listener) if listener.stage != Stage::Unbound => {
                listener.has_accepted = true;
                if listener.holds_new() && self.parked.space().is_some() {
                    listener.dispatcher.count_accepted();
                    return self.hold(handle, connection, ParkHistory::default());
                }
                listener.ready.use_reserved();
                listener.dispatcher.push(HandOff::New(connection));
                self.dispatch_waiting(handle);
            }
            _ => self.ledger.dropped += 1,
        }
    }

    /// Records that the shell has accepted as many connections as the `Accept` action allowed. The
    /// backlog may contain more.
    pub(crate) fn accept_done(&mut self, handle: HandleId) {
        let space = self.parked.space();
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if listener.accept_state == AcceptState::Accepting {
            // Watch the listener if there is capacity. The poller then reports the rest of the
            // backlog after the event loop has served other descriptors.
            let has_capacity = listener.capacity(space) > 0;
            listener.accept_state = match has_capacity {
                true => AcceptState::Watched,
                false => AcceptState::Ready,
            };
            self.watch(handle, has_capacity);
            self.await_space(handle);
            self.dispatch_rest(handle);
            self.rebalance(handle);
            self.resume_if_served(handle);
        }
    }

    /// Records that the backlog is empty.
    pub(crate) fn backlog_emptied(&mut self, handle: HandleId) {
        let space = self.parked.space();
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if listener.accept_state == AcceptState::Accepting {
            // Without capacity, stop watching and leave new connections in the backlog.
            let has_capacity = listener.capacity(space) > 0;
            listener.accept_state = match has_capacity {
                true => AcceptState::Watched,
                false => AcceptState::Ready,
            };
            // Do not watch a Unix listener that the master has shut down for a drain, because the
            // poller would report it endlessly.
            let is_unwatchable = listener.is_unwatchable();
            self.watch(handle, has_capacity && !is_unwatchable);
            self.await_space(handle);
            self.dispatch_rest(handle);
            self.rebalance(handle);
            self.unbind_if_drained(handle);
            self.resume_if_served(handle);
        }
    }

    pub(crate) fn accept_failed(&mut self, handle: HandleId, reason: io::Error) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if listener.accept_state == AcceptState::Accepting {
            let until = self.now.saturating_add(RETRY_DELAY);
            listener.accept_state = AcceptState::BackingOff(until);
            let address = listener.public_address().to_string();
            self.watch(handle, false);
            self.error(None, Error::Accept { address, reason });
            self.dispatch_rest(handle);
            self.rebalance(handle);
            self.resume_if_served(handle);
        }
    }

    /// Reports that another process has shut down the listener or one of its shards. The `outcome`
    /// is the result of the shell's attempt to listen on it again.
    pub(crate) fn shut_down_by_other(&mut self, handle: HandleId, outcome: io::Result<()>) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        let address = listener.public_address().to_string();
        let again = self.now.saturating_add(RETRY_DELAY);
        if listener.master_accepts() {
            listener.accept_state = AcceptState::BackingOff(again);
            self.watch(handle, false);
        } else if listener.key.endpoint.kind == Kind::Tcp {
            listener.hang_up_from = Some(again);
        }
        self.error(None, Error::ShutDown { address, outcome });
        self.select_shards(handle);
        self.dispatch_rest(handle);
        self.rebalance(handle);
        self.resume_if_served(handle);
    }

    /// Watches for the next shutdown once the delay after the last shutdown has passed.
    pub(super) fn watch_hang_up_if_due(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if listener.hang_up_from.is_some_and(|time| time <= self.now) {
            listener.hang_up_from = None;
            self.actions.push_back(Action::WatchHangUp { handle });
        }
    }

    /// Passes resumed connections, whose clients have sent something while the master held them, to
    /// the dispatcher, as far as it has capacity. Then accepts new connections if the backlog may
    /// contain one and the master has capacity for it.
    pub(super) fn accept_if_possible(&mut self, handle: HandleId) {
        let space = self.parked.space();
        let listener = self.listeners.get(&handle);
        let before = listener.map_or(0, |listener| listener.capacity(space));
        let resumed = self.dispatch_resumed(handle);
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if listener.accept_state != AcceptState::Ready || listener.stage == Stage::Unbound {
            return;
        }
        // Use the capacity that `dispatch_resumed` has left, even if no worker is idle any more,
        // because this part is reserved for new connections. They are dispatched behind the resumed
        // ones.
        let capacity = before.saturating_sub(resumed).max(listener.capacity(space));
        if capacity > 0 && listener.dispatch_from.is_none() {
            listener.accept_state = AcceptState::Accepting;
            listener.ready.reserve(capacity);
            let at_most = capacity.min(ACCEPT_BATCH);
            self.actions.push_back(Action::Accept { handle, at_most });
        } else {
            // Stop watching, because the level-triggered poller would wake the event loop
            // repeatedly until the master can accept again.
            self.watch(handle, false);
            self.await_space(handle);
        }
    }

    pub(super) fn watch(&mut self, handle: HandleId, watched: bool) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if listener.watched != watched && listener.stage != Stage::Unbound {
            listener.watched = watched;
            self.actions.push_back(match watched {
                true => Action::Watch { handle },
                false => Action::Unwatch { handle },
            });
        }
    }
}
