//! Giving idle connections from one worker to another, on listeners whose workers accept. The
//! workers hold these connections. If a listener ends for a worker, the master holds the worker's
//! connections until another worker serves the listener.

use super::passing::Keeper;
use super::{Entry, HandOff, Resumed};
use crate::core::master::accept::RETRY_DELAY;
use crate::core::master::listener::{Listener, Stage};
use crate::core::master::workers::WorkerEntry;
use crate::core::master::{Action, MasterCore};
use crate::types::handle::HandleId;
use crate::types::sorted_map::SortedMap;
use crate::types::time::Time;
use crate::types::user::{ParkHistory, User};
use crate::types::worker_id::WorkerId;

/// The maximum number of idle connections that one call of `give_held` gives to workers. The next
/// iteration of the event loop gives the next ones.
///
/// A larger number delays the other work of the event loop. A smaller number takes more iterations.
/// No benchmark chose this value.
const GIVE_BATCH: usize = 1024;

/// A worker that may receive idle connections.
#[derive(Clone, Copy, Debug)]
struct Adopter {
    worker: WorkerId,
    user: User,
}

impl<C, F> MasterCore<C, F> {
    /// Gives an idle connection to a worker that serves the listener and has the user of the worker
    /// that parked the connection, but not to `from`. Holds the connection if there is no such
    /// worker.
    pub(super) fn give(
        &mut self,
        handle: HandleId,
        from: Option<WorkerId>,
        connection: HandOff<C>,
        history: ParkHistory,
    ) {
        match (self.next_adopter(handle, from, history.by), connection) {
            (Some(worker), connection) => {
                if let HandOff::Held(resumed) = &connection {
                    self.parked.remove(resumed.connection);
                }
                self.ledger.received += 1;
                self.actions.push_back(Action::Adopt {
                    handle,
                    worker,
                    connection,
                    history,
                });
            }
            (None, HandOff::New(connection)) => {
                self.hold(handle, connection, history);
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

    /// Returns the worker that receives the listener's next idle connection, which a worker of the
    /// user `parked_by` has parked. The workers take turns. Returns `None` while another master takes
    /// over, because the connection goes to that master.
    fn next_adopter(
        &mut self,
        handle: HandleId,
        from: Option<WorkerId>,
        parked_by: Option<User>,
    ) -> Option<WorkerId> {
        if self.parked.keeper == Keeper::OtherMaster {
            return None;
        }
        let listener = self.listeners.get_mut(&handle)?;
        let may_adopt = |adopter: &Adopter| {
            Some(adopter.worker) != from && parked_by.is_none_or(|user| adopter.user == user)
        };
        let last = listener.last_adopter;
        let mut adopters = adopters(listener, &self.workers).filter(may_adopt);
        let first = adopters.clone().next();
        let later = adopters.find(|adopter| Some(adopter.worker) > last);
        let next = later.or(first).map(|adopter| adopter.worker);
        drop(adopters);
        listener.last_adopter = next.or(last);
        next
    }

    /// Gives the idle connections that the master holds to the workers that serve the listener.
    pub(in super::super) fn give_held(&mut self, handle: HandleId) {
        let gives = |listener: &&Listener<C>| {
            !listener.master_accepts() && self.parked.keeper == Keeper::ThisMaster
        };
        let listener = self.listeners.get(&handle).filter(gives);
        let Some(listener) = listener.filter(|_| self.parked.len() > 0) else {
            return;
        };
        let adopters = adopters(listener, &self.workers);
        let may_go = move |entry: &Entry| {
            let user = entry.history.by;
            let is_given = |adopter: Adopter| user.is_none_or(|user| adopter.user == user);
            entry.handle == handle && adopters.clone().any(is_given)
        };
        let mut held = self.parked.entries.filter(may_go);
        let is_more = held.len() > GIVE_BATCH;
        held.truncate(GIVE_BATCH);
        for connection in held {
            let entry = self.parked.get(connection);
            let history = entry.map(|entry| entry.history).unwrap_or_default();
            let resumed = Resumed {
                connection,
                times_parked: history.times,
            };
            self.give(handle, None, HandOff::Held(resumed), history);
        }
        if is_more {
            let now = self.now;
            self.give_held_at(handle, now);
        }
    }

    /// Takes back a connection that was not sent to a worker, because the worker has not read the
    /// earlier ones. The master holds the connection, and tries again after `RETRY_DELAY`.
    pub(crate) fn not_adopted(&mut self, handle: HandleId, connection: C, history: ParkHistory) {
        self.ledger.received -= 1;
        self.hold(handle, connection, history);
        let retry = self.now.saturating_add(RETRY_DELAY);
        self.give_held_at(handle, retry);
    }

    fn give_held_at(&mut self, handle: HandleId, time: Time) {
        if let Some(listener) = self.listeners.get_mut(&handle) {
            listener.dispatch_from = Some(time);
        }
    }
}

/// Returns the workers that serve the listener and may receive idle connections. During the grace
/// period of a drain, the last workers still serve, although they are disconnecting.
fn adopters<'a, C>(
    listener: &'a Listener<C>,
    workers: &'a SortedMap<WorkerId, WorkerEntry>,
) -> impl Iterator<Item = Adopter> + Clone + 'a {
    let is_draining = matches!(listener.stage, Stage::Draining(Some(_)));
    let serves_on =
        move |entry: &&WorkerEntry| entry.may_listen() || is_draining && entry.is_writable();
    listener.members.serving().filter_map(move |worker| {
        let user = workers.get(&worker).filter(serves_on)?.user;
        Some(Adopter { worker, user })
    })
}
