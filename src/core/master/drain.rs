//! How a listener drains, ends for its workers, and closes.

use super::listener::{AcceptState, Stage};
use super::{Action, MasterCore};
use crate::config::policy::SchedulingPolicy;
use crate::types::endpoint::Kind;
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::HandleId;

/// How long a draining listener that was ever used must have kept new connections out before it is
/// treated as empty.
///
/// Handshakes that are in flight over a network complete in that time. If it is shorter, the clients of
/// slow handshakes are reset. If it is longer, each disconnect of the last worker takes longer.
pub(super) const DRAIN_GRACE: Time = Time::from_millis(100);

// Draining.
impl<C, F> MasterCore<C, F> {
    /// All workers that serve the listener disconnect.
    pub(super) fn begin_drain(&mut self, handle: HandleId) {
        let now = self.now;
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if listener.is_retained() {
            return self.pause(handle);
        }
        let workers_accept = !listener.master_accepts();
        match listener.key.endpoint.kind {
            // It stays open until the last worker has released it, so that a new worker can have it. No
            // client waits for an answer to a queued datagram.
            Kind::Udp => self.finish_drain(handle),
            Kind::Tcp | Kind::Unix if listener.key.endpoint.is_borrowed() => {
                self.return_borrowed(handle);
            }
            Kind::Unix if listener.is_sole() => {
                // Without the file no client can connect, and there is no handshake to wait for.
                listener.stage = Stage::Draining(None);
                self.remove_key(handle);
                self.actions.push_back(Action::RemoveFile { handle });
                if !workers_accept {
                    // Workers that accept themselves would treat it as a failure.
                    self.actions.push_back(Action::AttachSynFilter { handle });
                }
                self.finish_drain(handle);
            }
            Kind::Tcp | Kind::Unix => {
                // The master does not know what workers have accepted themselves.
                let grace = match listener.has_accepted || workers_accept {
                    true => DRAIN_GRACE,
                    false => Time::ZERO,
                };
                listener.stage = Stage::Draining(Some(now.saturating_add(grace)));
                self.keep_new_connections_out(handle);
                if !workers_accept {
                    self.check_backlog(handle);
                } // Otherwise the workers continue to accept until the grace period is over.
            }
        }
    }

    /// Keeps new connections out, or sends them where another owner of the socket may accept them.
    fn keep_new_connections_out(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get(&handle) else {
            return;
        };
        if listener.is_sole() {
            self.actions.push_back(Action::AttachSynFilter { handle });
        } else if listener.policy == SchedulingPolicy::Sharded {
            // `MasterListener::as_fd` is the first shard.
            let shards = vec![0];
            self.actions
                .push_back(Action::SelectShards { handle, shards });
        }
    }

    /// Returns a borrowed listener to the application. It stays open there, with its backlog. Only the
    /// connections that have been accepted are served.
    fn return_borrowed(&mut self, handle: HandleId) {
        self.remove_key(handle);
        self.watch(handle, false);
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        match listener.policy {
            SchedulingPolicy::RoundRobin => {
                listener.stage = Stage::Draining(None);
                listener.accept_state = AcceptState::Closed;
                self.unbind_if_drained(handle);
            }
            SchedulingPolicy::Shared | SchedulingPolicy::Sharded => {
                self.end_for_all(handle, false);
                self.unbind(handle);
            }
        }
    }

    /// Lets the next worker that listens on the address get another listener.
    fn remove_key(&mut self, handle: HandleId) {
        self.keys.retain(|_, other| *other != handle);
    }

    /// The grace period is over.
    pub(super) fn finish_drain(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        match listener.policy {
            SchedulingPolicy::RoundRobin => self.check_backlog(handle),
            SchedulingPolicy::Shared | SchedulingPolicy::Sharded => {
                // Only the workers see the backlog. They close the listener when it is empty.
                listener.stage = Stage::Emptying;
                let shard = None;
                self.actions.push_back(Action::Unblock { handle, shard });
                for worker in self.serving(handle) {
                    self.send_listener_closed(handle, worker, true);
                }
            }
        }
    }

    /// Accepts although the poller has not reported a connection: only `accept` itself shows reliably
    /// that the backlog is empty.
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

    /// Continues a drain, or the end of a pause, that may have waited for the fact just processed.
    pub(super) fn check_backlog_if_draining(&mut self, handle: HandleId) {
        let stage = self.listeners.get(&handle).map(|listener| listener.stage);
        match stage {
            Some(Stage::Draining(None)) => self.check_backlog(handle),
            Some(Stage::Pausing) => self.resume_if_served(handle),
            Some(Stage::Open | Stage::Draining(Some(_)) | Stage::Emptying | Stage::Unbound)
            | None => {}
        }
    }

    /// Closes a draining listener whose backlog was just found empty. It stays open as long as a
    /// connection is in a worker's queue, because that connection may be reclaimed for another worker.
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
        if listener.dispatcher.in_flight() == 0 {
            self.unbind(handle);
        } else {
            self.count_queues(handle);
        }
    }

    /// Counts what is in the queues, if no connection waits in the master: a busy worker may have
    /// received everything and not reported it yet.
    pub(super) fn count_queues(&mut self, handle: HandleId) {
        let listener = self.listeners.get(&handle);
        if let Some(listener) = listener.filter(|listener| !listener.dispatcher.has_waiting()) {
            let workers = listener.dispatcher.workers_with_queued();
            let counts = workers.map(|worker| Action::CountQueued { handle, worker });
            self.actions.extend(counts);
        }
    }
}

// Ending a listener for workers.
impl<C, F> MasterCore<C, F> {
    pub(super) fn end_for_all(&mut self, handle: HandleId, drain: bool) {
        for worker in self.serving(handle) {
            self.end_for(handle, worker, drain);
        }
    }

    /// Ends the listener for one worker that serves it. If it is to `drain`, no other worker is left for
    /// what it has.
    pub(super) fn end_for(&mut self, handle: HandleId, worker: WorkerId, drain: bool) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if !listener.members.end(worker) {
            return;
        }
        match (listener.policy, drain) {
            // Only this worker can accept what is in the backlog of its shard. Handshakes that are in
            // flight complete first.
            (SchedulingPolicy::Sharded, false) => {
                let time = self.now.saturating_add(DRAIN_GRACE);
                listener.departing.insert((time, worker));
                return self.select_shards(handle);
            }
            (SchedulingPolicy::RoundRobin, false) => {
                listener.dispatcher.end(worker);
                self.reclaim_all(handle, worker);
            }
            _ => listener.dispatcher.end(worker),
        }
        self.send_listener_closed(handle, worker, drain);
    }
}

// Closing.
impl<C, F> MasterCore<C, F> {
    /// Closes the listener. Workers stay until they release it.
    pub(super) fn unbind(&mut self, handle: HandleId) {
        self.end_for_all(handle, true);
        if let Some(listener) = self.listeners.get_mut(&handle) {
            if listener.stage != Stage::Unbound {
                listener.stage = Stage::Unbound;
                listener.accept_state = AcceptState::Ready;
                self.ledger.dropped += listener.dispatcher.drop_waiting();
                let master_accepts = listener.master_accepts();
                self.remove_key(handle);
                if master_accepts {
                    self.close_socket(handle);
                } // Otherwise when the last worker has closed its copy.
            }
        }
    }

    pub(super) fn close_socket(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get(&handle) else {
            return;
        };
        if listener.is_sole() && listener.key.endpoint.kind != Kind::Udp {
            // A process that a worker has forked may have a copy, in whose backlog clients would wait
            // for ever.
            self.actions.push_back(Action::StopListening { handle });
        }
        self.actions.push_back(Action::Unbind { handle });
    }

    /// No worker serves the listener any more, and the application does not retain it. The worker
    /// `leaving` is about to close its copy.
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

    /// Workers that are disconnecting still serve their shards. The listener closes with the last of
    /// these workers, unless another worker listens on it before.
    fn empty_shards(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        listener.stage = Stage::Emptying;
        let departing = std::mem::take(&mut listener.departing);
        self.keep_new_connections_out(handle);
        let shard = None;
        self.actions.push_back(Action::Unblock { handle, shard });
        for (_, worker) in departing {
            self.send_listener_closed(handle, worker, true);
        }
    }
}
