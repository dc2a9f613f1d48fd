//! Listeners on which the application accepts without this crate, and connections that it has as
//! plain streams.
//!
//! No call of this crate tells when such a listener's backlog is empty, or when such a connection
//! closes. The shell checks both repeatedly, but only while the worker is disconnecting.

use super::listener::{Entry, Receiver, Stage};
use super::{ListenerId, WorkerCore};

impl<F> WorkerCore<F> {
    /// Records that other code accepts the listener's connections from now on. The parked
    /// connections leave, because that code cannot receive them.
    pub(crate) fn use_std(&mut self, listener: ListenerId) {
        if let Some(entry) = self.listeners.get_mut(&listener) {
            entry.receiver = Receiver::Std;
            self.may_have_streams = true;
            self.all_leave(listener);
        }
    }

    /// Returns whether other code accepts the listener's connections.
    pub(super) fn is_std(&self, listener: ListenerId) -> bool {
        let entry = self.listeners.get(&listener);
        entry.is_some_and(|entry| entry.receiver == Receiver::Std)
    }

    /// Records that the application has received a connection as a plain stream.
    pub(crate) fn stream_taken(&mut self) {
        self.may_have_streams = true;
    }

    /// Records that all plain streams are closed. Call this method only if [`awaits_streams`] is
    /// true, so that no further stream can follow.
    ///
    /// [`awaits_streams`]: Self::awaits_streams
    pub(crate) fn streams_closed(&mut self) {
        self.may_have_streams = false;
    }

    /// Returns whether the worker disconnects as soon as all plain streams are closed and its
    /// connections are served.
    pub(crate) fn awaits_streams(&self) -> bool {
        self.may_have_streams && self.has_ended_listening()
    }

    /// Returns the draining listeners on which other code accepts. The shell closes a listener when
    /// its backlog is empty.
    pub(crate) fn draining_std_listeners(&self) -> Vec<ListenerId> {
        match self.may_have_streams {
            true => self.listeners_where(Entry::is_draining_std),
            false => Vec::new(),
        }
    }

    /// Returns whether the listener stays open although the application has dropped its handle.
    pub(crate) fn outlives_handle(&self, listener: ListenerId) -> bool {
        let entry = self.listeners.get(&listener);
        entry.is_some_and(|entry| entry.receiver != Receiver::Accept)
    }
}

impl Entry {
    fn is_draining_std(&self) -> bool {
        self.receiver == Receiver::Std && matches!(self.stage, Stage::Draining(_))
    }
}
