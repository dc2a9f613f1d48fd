//! Draining, ending and closing listeners.

use super::listener::{AcceptState, Listener, Stage};
use super::{Action, MasterCore};
use crate::types::endpoint::Kind;
use crate::types::handle::HandleId;
use crate::types::policy::SchedulingPolicy;
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::Unreceived;

/// The time between keeping new connections out of a backlog and treating the empty backlog as
/// final. It applies to draining listeners that may have served connections, and to the shards of
/// departing workers.
///
/// Most handshakes that are in flight over a network complete in that time, and the poller reports
/// the idle connections whose clients have already sent something. With a shorter time, the clients
/// of slow handshakes are reset. With a longer time, disconnects take longer. No benchmark chose
/// this value.
pub(super) const DRAIN_GRACE: Time = Time::from_millis(100);

// Starting and continuing a drain.
impl<C, F> MasterCore<C, F> {
    /// Starts draining the listener when all workers that serve it are disconnecting. A retained
    /// listener pauses instead. A borrowed TCP or Unix listener is returned to the application.
    pub(super) fn begin_drain(&mut self, handle: HandleId) {
        let grace_end = self.now.saturating_add(DRAIN_GRACE);
        // Allow time for the poller to report the idle connections whose clients have already sent
        // something.
        let idle_grace = self.parked.is_any_idle_on(handle).then_some(grace_end);
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if listener.is_retained() {
            return self.pause(handle);
        }
        self.end_for_busy(handle);
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        let workers_accept = !listener.master_accepts();
        match listener.key.endpoint.kind {
            // Leave the key in place, so that a new worker can still have the socket. The socket
            // closes when the last worker has released it. UDP has no handshakes, so no grace
            // period is needed.
            Kind::Udp => self.finish_drain(handle),
            Kind::Tcp | Kind::Unix if listener.key.endpoint.is_borrowed() => {
                self.return_borrowed(handle, idle_grace);
            }
            Kind::Unix if listener.is_sole() => {
                // Remove the file, so that no client can connect. Set a grace period only for idle
                // connections, because a Unix socket has no handshakes. If workers accept, the
                // master does not know whether they hold idle connections.
                let grace = match workers_accept {
                    true => Some(grace_end),
                    false => idle_grace,
                };
                listener.stage = Stage::Draining(grace);
                self.remove_key(handle);
                self.actions.push_back(Action::RemoveFile { handle });
                if !workers_accept {
                    // Attach the filter only if the master accepts. The action shuts a Unix socket
                    // down, and workers that accept themselves would treat this as a failure.
                    self.actions.push_back(Action::AttachSynFilter { handle });
                    self.check_backlog(handle);
                }
            }
            Kind::Tcp | Kind::Unix => {
                // Skip the grace period if the master has never accepted a connection, because a
                // handshake in flight is then unlikely. If workers accept, the master does not know
                // whether clients have connected.
                let grace = match listener.has_accepted || workers_accept || idle_grace.is_some() {
                    true => grace_end,
                    false => self.now,
                };
                listener.stage = Stage::Draining(Some(grace));
                self.keep_new_connections_out(handle);
                // If the workers accept, they continue until the grace period ends.
                if !workers_accept {
                    self.check_backlog(handle);
                }
            }
        }
    }

    /// Keeps new connections out if no process outside the cluster may have a copy of the socket.
    /// Otherwise, a sharded listener directs new connections to its first shard, where the other
    /// process can accept them.
    fn keep_new_connections_out(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get(&handle) else {
            return;
        };
        if listener.is_sole() {
            self.actions.push_back(Action::AttachSynFilter { handle });
        } else if listener.policy == SchedulingPolicy::Sharded {
            // Select the first shard, because `MasterListener::as_fd` returns it.
            let shards = vec![0];
            self.actions
                .push_back(Action::SelectShards { handle, shards });
        }
    }

    /// Returns a borrowed listener to the application. The application's descriptor keeps the
    /// listener and its backlog open. The workers serve only the connections that have already been
    /// accepted. `grace` is the end of the grace period for idle connections, if any.
    fn return_borrowed(&mut self, handle: HandleId, grace: Option<Time>) {
        self.remove_key(handle);
        self.watch(handle, false);
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        match listener.policy {
            SchedulingPolicy::RoundRobin => {
                listener.stage = Stage::Draining(grace);
                listener.accept_state = AcceptState::Closed;
                self.dispatch_rest(handle);
                self.unbind_if_drained(handle);
            }
            SchedulingPolicy::Shared | SchedulingPolicy::Sharded => {
                self.end_for_all(handle, Unreceived::ParkedAreServed);
                self.unbind(handle);
            }
        }
    }

    /// Removes the listener's key, so that the next worker that listens on the address receives
    /// another listener.
    fn remove_key(&mut self, handle: HandleId) {
        self.keys.retain(|_, other| *other != handle);
    }

    /// Continues a drain after its grace period has ended, or immediately if none is needed.
    pub(super) fn finish_drain(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        match listener.policy {
            SchedulingPolicy::RoundRobin => self.check_backlog(handle),
            SchedulingPolicy::Shared | SchedulingPolicy::Sharded => {
                // Let the workers close the listener when its backlog is empty, because only they
                // see the backlog.
                listener.stage = Stage::Emptying;
                let shard = None;
                self.actions.push_back(Action::Unblock { handle, shard });
                for worker in self.serving(handle) {
                    self.send_listener_closed(handle, worker, Unreceived::AreServed);
                }
            }
        }
    }

    /// Accepts even if the poller has not reported a connection, because only `accept` itself shows
    /// reliably that the backlog is empty.
    fn check_backlog(&mut self, handle: HandleId) {
        if let Some(listener) = self.listeners.get_mut(&handle) {
            match listener.accept_state {
                AcceptState::Watched => listener.accept_state = AcceptState::Ready,
                AcceptState::Closed => return self.unbind_if_drained(handle),
                AcceptState::Ready | AcceptState::Accepting | AcceptState::BackingOff(_) => {}
            }
            self.accept_if_possible(handle);
        }
    }

    /// Continues a drain, or ends a pause, after a change that may have completed it.
    pub(super) fn check_backlog_if_draining(&mut self, handle: HandleId) {
        let stage = self.listeners.get(&handle).map(|listener| listener.stage);
        match stage {
            Some(Stage::Draining(None)) => self.check_backlog(handle),
            Some(Stage::Pausing) => self.resume_if_served(handle),
            Some(Stage::Open | Stage::Draining(Some(_)) | Stage::Emptying | Stage::Unbound)
            | None => {}
        }
    }

    /// Closes a draining listener whose backlog has just been found empty, or from which the master
    /// no longer accepts.
    ///
    /// The listener stays open while a connection waits in the master or is in a worker's queue. A
    /// connection in a queue may still be reclaimed for another worker.
    pub(super) fn unbind_if_drained(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get(&handle) else {
            return;
        };
        let is_grace_over = match listener.stage {
            Stage::Draining(grace) => grace.is_none_or(|grace| grace <= self.now),
            Stage::Open | Stage::Emptying | Stage::Pausing | Stage::Unbound => false,
        };
        if !is_grace_over {
            return;
        }
        if listener.dispatcher.in_flight() == 0 && listener.ready.is_empty() {
            self.unbind(handle);
        } else {
            self.count_queues(handle);
        }
    }

    /// Counts the connections in the workers' queues, unless connections wait in the master. The
    /// count is needed because a busy worker may have received all its connections without having
    /// reported this.
    pub(super) fn count_queues(&mut self, handle: HandleId) {
        let listener = self.listeners.get(&handle);
        if let Some(listener) = listener.filter(|listener| !listener.dispatcher.has_waiting()) {
            let workers = listener.dispatcher.workers_with_queued();
            let counts = workers.map(|worker| Action::CountQueued { handle, worker });
            self.actions.extend(counts);
        }
    }
}

// Ending a listener for its workers.
impl<C, F> MasterCore<C, F> {
    /// Ends the listener for all workers that serve it.
    pub(super) fn end_for_all(&mut self, handle: HandleId, unreceived: Unreceived) {
        for worker in self.serving(handle) {
            self.end_for(handle, worker, unreceived);
        }
    }

    /// Ends the listener for one worker that serves it. `unreceived` is what becomes of the connections
    /// that its application has not received.
    pub(super) fn end_for(&mut self, handle: HandleId, worker: WorkerId, unreceived: Unreceived) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if !listener.members.end(worker) {
            return;
        }
        match (listener.policy, unreceived) {
            // Delay the end until handshakes in flight have completed, because only this worker can
            // accept the connections in its shard's backlog.
            (SchedulingPolicy::Sharded, Unreceived::GoToOthers) => {
                let time = self.now.saturating_add(DRAIN_GRACE);
                listener.departing.insert((time, worker));
                return self.select_shards(handle);
            }
            (SchedulingPolicy::RoundRobin, Unreceived::GoToOthers) => {
                listener.dispatcher.end(worker);
                self.reclaim_all(handle, worker);
            }
            _ => listener.dispatcher.end(worker),
        }
        self.send_listener_closed(handle, worker, unreceived);
    }

    /// Notifies the workers for which the listener has already ended that no other worker will serve
    /// it. Such a worker may have been busy since then, and still hold connections of clients that
    /// have sent something meanwhile.
    fn end_for_busy(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get(&handle) else {
            return;
        };
        if listener.master_accepts() {
            return;
        }
        let departing = &listener.departing;
        let serves_shard = |worker: &WorkerId| departing.iter().any(|(_, other)| other == *worker);
        let busy = listener.members.ended();
        let busy: Vec<_> = busy.filter(|worker| !serves_shard(worker)).collect();
        for worker in busy {
            self.send_listener_closed(handle, worker, Unreceived::ParkedAreServed);
        }
    }
}

// Closing listeners and their sockets.
impl<C, F> MasterCore<C, F> {
    /// Closes the listener. Workers remain its members until they release it.
    pub(super) fn unbind(&mut self, handle: HandleId) {
        self.end_for_busy(handle);
        self.end_for_all(handle, Unreceived::AreServed);
        if let Some(listener) = self.listeners.get_mut(&handle) {
            if listener.stage != Stage::Unbound {
                listener.stage = Stage::Unbound;
                listener.accept_state = AcceptState::Ready;
                let waiting = listener.dispatcher.take_waiting();
                let master_accepts = listener.master_accepts();
                self.drop_hand_offs(waiting);
                self.drop_ready(handle);
                self.close_idle(handle);
                self.remove_key(handle);
                // If the workers accept, close the socket only when the last of them has closed its
                // copy.
                if master_accepts {
                    self.close_socket(handle);
                }
            }
        }
    }

    pub(super) fn close_socket(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get(&handle) else {
            return;
        };
        if listener.is_sole() && listener.key.endpoint.kind != Kind::Udp {
            // Shut the socket down, because a process that a worker has forked may have a copy. The
            // copy would keep the backlog open, and clients would wait in it forever.
            self.actions.push_back(Action::StopListening { handle });
        }
        self.actions.push_back(Action::Unbind { handle });
    }

    /// Closes a listener that no worker serves and that the application does not retain. If the
    /// listener is sharded and other workers still have shards, they empty their shards first. The
    /// worker `leaving` is about to close its copy.
    pub(super) fn close_unserved(&mut self, handle: HandleId, leaving: Option<WorkerId>) {
        let Some(listener) = self.listeners.get(&handle) else {
            return;
        };
        let has_others = listener.members.has_others(leaving);
        match (listener.policy, listener.stage) {
            (SchedulingPolicy::Sharded, Stage::Unbound) => {}
            (SchedulingPolicy::Sharded, _) if has_others => self.empty_shards(handle),
            _ => self.unbind(handle),
        }
    }

    /// Lets the disconnecting workers empty their shards. The listener closes when the last of them
    /// has finished, unless another worker listens on it first.
    fn empty_shards(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        listener.stage = Stage::Emptying;
        let departing = std::mem::take(&mut listener.departing);
        self.keep_new_connections_out(handle);
        let shard = None;
        self.actions.push_back(Action::Unblock { handle, shard });
        for (_, worker) in departing.iter() {
            self.send_listener_closed(handle, worker, Unreceived::AreServed);
        }
    }

    /// Removes a listener that has no members and does not stay open without workers.
    pub(super) fn remove_if_unused(&mut self, handle: HandleId) {
        let is_unused = |each: &&Listener<C>| each.members.is_empty() && !each.outlives_workers();
        if let Some(listener) = self.listeners.get(&handle).filter(is_unused) {
            if !listener.master_accepts() {
                self.close_socket(handle);
            }
            self.listeners.remove(&handle);
        }
    }
}
