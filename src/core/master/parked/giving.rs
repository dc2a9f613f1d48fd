//! Giving idle connections from one worker to another, on listeners whose workers accept. The
//! workers hold these connections. If a listener ends for a worker, the master holds the worker's
//! connections until another worker serves the listener.

use super::passing::Keeper;
use super::{HandOff, Resumed};
use crate::core::master::accept::RETRY_DELAY;
use crate::core::master::listener::{Listener, Stage};
use crate::core::master::workers::WorkerEntry;
use crate::core::master::{Action, MasterCore};
use crate::types::handle::HandleId;
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;

/// The maximum number of idle connections that one call of `give_held` gives to workers. The next
/// iteration of the event loop gives the next ones.
///
/// A larger number delays the other work of the event loop. A smaller number takes more iterations.
/// No benchmark chose this value.
const GIVE_BATCH: usize = 1024;

impl<C, F> MasterCore<C, F> {
    /// Gives an idle connection to a worker that serves the listener, but not to `from`. Holds the
    /// connection if there is no such worker.
    pub(super) fn give(
        &mut self,
        handle: HandleId,
        from: Option<WorkerId>,
        connection: HandOff<C>,
        times_parked: u32,
    ) {
        match (self.next_adopter(handle, from), connection) {
            (Some(worker), connection) => {
                if let HandOff::Held(resumed) = &connection {
                    self.parked.remove(resumed.connection);
                }
                self.ledger.received += 1;
                self.actions.push_back(Action::Adopt {
                    handle,
                    worker,
                    connection,
                    times_parked,
                });
            }
            (None, HandOff::New(connection)) => {
                self.hold(handle, connection, times_parked);
                // `from` may have closed its listener and listened again before it parked this
                // connection. Otherwise, it will soon no longer serve the listener.
                if from.is_some_and(|from| self.may_adopt(handle, from)) {
                    self.give_held_at(handle, self.now.saturating_add(RETRY_DELAY));
                }
            }
            (None, HandOff::Held(_)) => {}
        }
    }

    /// Returns whether the worker serves the listener and may receive idle connections.
    fn may_adopt(&self, handle: HandleId, worker: WorkerId) -> bool {
        let listener = self.listeners.get(&handle);
        let entry = self.workers.get(&worker);
        listener.is_some_and(|own| own.members.serving().any(|member| member == worker))
            && entry.is_some_and(WorkerEntry::may_listen)
    }

    /// Returns the worker that receives the listener's next idle connection. The workers take
    /// turns. During the grace period of a drain, the last workers still serve, although they are
    /// disconnecting. Returns `None` while another master takes over, because the connection goes to
    /// that master.
    fn next_adopter(&mut self, handle: HandleId, from: Option<WorkerId>) -> Option<WorkerId> {
        if self.parked.keeper == Keeper::OtherMaster {
            return None;
        }
        let listener = self.listeners.get_mut(&handle)?;
        let workers = &self.workers;
        let is_draining = matches!(listener.stage, Stage::Draining(Some(_)));
        let serves_on =
            |entry: &WorkerEntry| entry.may_listen() || is_draining && entry.is_writable();
        let may_adopt =
            |worker: &WorkerId| Some(*worker) != from && workers.get(worker).is_some_and(serves_on);
        let last = listener.last_adopter;
        let mut next = listener.members.serving().filter(may_adopt);
        let later = next.find(|worker| Some(*worker) > last);
        let next = later.or_else(|| listener.members.serving().find(may_adopt));
        listener.last_adopter = next.or(last);
        next
    }

    /// Gives the idle connections that the master holds to the workers that serve the listener.
    pub(in super::super) fn give_held(&mut self, handle: HandleId) {
        let is_done = |listener: &Listener<C>| listener.master_accepts();
        if self.parked.len() == 0 || self.listeners.get(&handle).is_none_or(is_done) {
            return;
        }
        let mut held = self.parked.entries.filter(|entry| entry.handle == handle);
        let is_more = held.len() > GIVE_BATCH;
        held.truncate(GIVE_BATCH);
        for connection in held {
            let times_parked = self
                .parked
                .get(connection)
                .map_or(0, |entry| entry.times_parked);
            let resumed = Resumed {
                connection,
                times_parked,
            };
            self.give(handle, None, HandOff::Held(resumed), times_parked);
        }
        if is_more {
            let now = self.now;
            self.give_held_at(handle, now);
        }
    }

    /// Takes back a connection that was not sent to a worker, because the worker has not read the
    /// earlier ones. The master holds the connection, and tries again after `RETRY_DELAY`.
    pub(crate) fn not_adopted(&mut self, handle: HandleId, connection: C, times_parked: u32) {
        self.ledger.received -= 1;
        self.hold(handle, connection, times_parked);
        let retry = self.now.saturating_add(RETRY_DELAY);
        self.give_held_at(handle, retry);
    }

    fn give_held_at(&mut self, handle: HandleId, time: Time) {
        if let Some(listener) = self.listeners.get_mut(&handle) {
            listener.dispatch_from = Some(time);
        }
    }
}
