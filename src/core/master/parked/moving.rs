//! Moving idle connections from one worker to another, on listeners whose workers accept. The
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

/// The maximum number of idle connections that one call of `move_held` moves to workers. The next
/// iteration of the event loop moves the next ones.
///
/// A larger number delays the other work of the event loop. A smaller number takes more iterations.
/// No benchmark chose this value.
const MOVE_BATCH: usize = 1024;

/// A worker that may receive idle connections.
#[derive(Clone, Copy, Debug)]
struct Receiver {
    worker: WorkerId,
    user: User,
}

impl<C, F> MasterCore<C, F> {
    /// Moves an idle connection to a worker that serves the listener and has the user of the worker
    /// that parked the connection, but not to `from`. Holds the connection if there is no such
    /// worker.
    pub(super) fn move_parked(
        &mut self,
        handle: HandleId,
        from: Option<WorkerId>,
        connection: HandOff<C>,
        history: ParkHistory,
    ) {
        match (self.next_receiver(handle, from, history.by), connection) {
            (Some(worker), connection) => {
                if let HandOff::Held(resumed) = &connection {
                    self.parked.remove(resumed.connection);
                }
                self.ledger.received += 1;
                self.actions.push_back(Action::MoveParked {
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
                if from.is_some_and(|from| self.may_receive(handle, from)) {
                    self.move_held_at(handle, self.now.saturating_add(RETRY_DELAY));
                }
            }
            (None, HandOff::Held(_)) => {}
        }
    }

    /// Returns whether the worker serves the listener and may receive idle connections.
    fn may_receive(&self, handle: HandleId, worker: WorkerId) -> bool {
        let listener = self.listeners.get(&handle);
        let entry = self.workers.get(&worker);
        listener.is_some_and(|listener| listener.members.serving().any(|member| member == worker))
            && entry.is_some_and(WorkerEntry::may_listen)
    }

    /// Returns the worker that receives the listener's next idle connection, which a worker of the
    /// user `parked_by` has parked. The workers take turns. Returns `None` while another master takes
    /// over, because the connection goes to that master.
    fn next_receiver(
        &mut self,
        handle: HandleId,
        from: Option<WorkerId>,
        parked_by: Option<User>,
    ) -> Option<WorkerId> {
        if self.parked.keeper == Keeper::OtherMaster {
            return None;
        }
        let listener = self.listeners.get_mut(&handle)?;
        let may_receive = |receiver: &Receiver| {
            Some(receiver.worker) != from && parked_by.is_none_or(|user| receiver.user == user)
        };
        let last = listener.last_receiver;
        let mut receivers = receivers(listener, &self.workers).filter(may_receive);
        let first = receivers.clone().next();
        let later = receivers.find(|receiver| Some(receiver.worker) > last);
        let next = later.or(first).map(|receiver| receiver.worker);
        drop(receivers);
        listener.last_receiver = next.or(last);
        next
    }

    /// Moves the idle connections that the master holds to the workers that serve the listener.
    pub(in super::super) fn move_held(&mut self, handle: HandleId) {
        let moves = |listener: &&Listener<C>| {
            !listener.master_accepts() && self.parked.keeper == Keeper::ThisMaster
        };
        let listener = self.listeners.get(&handle).filter(moves);
        let Some(listener) = listener.filter(|_| self.parked.len() > 0) else {
            return;
        };
        let receivers = receivers(listener, &self.workers);
        let may_go = move |entry: &Entry| {
            let user = entry.history.by;
            let may_move = |receiver: Receiver| user.is_none_or(|user| receiver.user == user);
            entry.handle == handle && receivers.clone().any(may_move)
        };
        let mut held = self.parked.entries.filter(may_go);
        let is_more = held.len() > MOVE_BATCH;
        held.truncate(MOVE_BATCH);
        for connection in held {
            let entry = self.parked.get(connection);
            let history = entry.map(|entry| entry.history).unwrap_or_default();
            let resumed = Resumed {
                connection,
                times_parked: history.times,
            };
            self.move_parked(handle, None, HandOff::Held(resumed), history);
        }
        if is_more {
            let now = self.now;
            self.move_held_at(handle, now);
        }
    }

    /// Holds a connection that was not sent to a worker, because the worker has not read the
    /// earlier ones. The master tries again after `RETRY_DELAY`.
    pub(crate) fn not_moved(&mut self, handle: HandleId, connection: C, history: ParkHistory) {
        self.ledger.received -= 1;
        self.hold(handle, connection, history);
        let retry = self.now.saturating_add(RETRY_DELAY);
        self.move_held_at(handle, retry);
    }

    fn move_held_at(&mut self, handle: HandleId, time: Time) {
        if let Some(listener) = self.listeners.get_mut(&handle) {
            listener.dispatch_from = Some(time);
        }
    }
}

/// Returns the workers that serve the listener and may receive idle connections. During the grace
/// period of a drain, the last workers still serve, although they are disconnecting.
fn receivers<'a, C>(
    listener: &'a Listener<C>,
    workers: &'a SortedMap<WorkerId, WorkerEntry>,
) -> impl Iterator<Item = Receiver> + Clone + 'a {
    let is_draining = matches!(listener.stage, Stage::Draining(Some(_)));
    let serves =
        move |entry: &&WorkerEntry| entry.may_listen() || is_draining && entry.is_writable();
    listener.members.serving().filter_map(move |worker| {
        let user = workers.get(&worker).filter(serves)?.user;
        Some(Receiver { worker, user })
    })
}
