//! Requests to listen: a worker joins an open listener, or receives a new one.

use std::io;
use std::net::SocketAddr;

use super::listener::{Listener, Stage};
use super::{Action, Attachment, MasterCore};
use crate::error::Error;
use crate::types::address::Address;
use crate::types::endpoint::{BindFlags, Endpoint, Kind, Parking};
use crate::types::errno;
use crate::types::handle::{HandleId, HandleKey};
use crate::types::policy::SchedulingPolicy;
use crate::types::poll_number::next_poll_number;
use crate::types::protocol::FrameError;
use crate::types::protocol::Violation;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::{Bound, Unreceived};

/// The maximum number of listeners of one worker. The limit bounds the descriptors and the memory
/// that a broken worker can cost the master. Well-behaved workers use only a few.
const LISTENERS_PER_WORKER_MAX: usize = 64;

/// A request to listen whose `Bind` action the shell has not answered with `bound`.
#[derive(Debug)]
pub(super) struct PendingBind {
    key: HandleKey,
    parking: Parking,
    worker: WorkerId,
    request: u32,
}

impl<C, F> MasterCore<C, F> {
    pub(super) fn listen(
        &mut self,
        worker: WorkerId,
        request: u32,
        key: HandleKey,
        flags: BindFlags,
    ) -> Result<(), FrameError> {
        if self.listeners_of(worker).count() >= LISTENERS_PER_WORKER_MAX {
            self.reject(worker, request, errno::EMFILE);
            return Ok(());
        }
        if let Some(&handle) = self.keys.get(&key) {
            return self.join_existing(worker, request, handle, flags);
        }
        let handle = self.next_handle();
        let endpoint = key.endpoint.clone();
        let policy = self.policy_of(&endpoint);
        let pending = PendingBind {
            key,
            parking: flags.parking,
            worker,
            request,
        };
        self.binding.insert(handle, pending);
        self.actions.push_back(Action::Bind {
            handle,
            endpoint,
            flags,
            policy,
        });
        Ok(())
    }

    /// Processes a request for an address that already has a listener.
    fn join_existing(
        &mut self,
        worker: WorkerId,
        request: u32,
        handle: HandleId,
        flags: BindFlags,
    ) -> Result<(), FrameError> {
        let listener = &self.listeners[&handle];
        if listener.members.is_closing(worker) {
            // Reject the request, because the worker's previous queue is not closed yet. `EMFILE`
            // names the reason: the master lacked descriptors for reclaiming the queue's
            // connections.
            self.reject(worker, request, errno::EMFILE);
        } else if listener.members.contains(worker) {
            let keys = self.keys.values().filter(|other| **other == handle);
            if keys.count() == 1 {
                return Err(FrameError::Violation(Violation::RepeatedListen));
            }
            // Reject the request, because the worker already has this listener under another
            // endpoint. A passed listener may be found both by its port and by its address.
            self.reject(worker, request, errno::EADDRINUSE);
        } else if self.assign_shard(handle, worker) {
            self.set_parking(handle, flags.parking);
            self.join(worker, request, handle);
        } else {
            self.set_parking(handle, flags.parking);
            self.actions.push_back(Action::BindShard {
                handle,
                flags,
                worker,
                request,
            });
        }
        Ok(())
    }

    /// Returns the policy of a listener on this endpoint.
    pub(crate) fn policy_of(&self, endpoint: &Endpoint) -> SchedulingPolicy {
        match (endpoint.kind, self.policy) {
            // All workers read from one UDP socket, because the master does not distribute
            // datagrams.
            (Kind::Udp, _) => SchedulingPolicy::Shared,
            (kind, SchedulingPolicy::Sharded)
                if kind == Kind::Unix
                    || endpoint.is_borrowed()
                    || !cfg!(any(target_os = "linux", target_os = "android")) =>
            {
                SchedulingPolicy::Shared
            }
            (Kind::Tcp | Kind::Unix, policy) => policy,
        }
    }

    /// Returns a handle number that no listener has. Numbers are reused, because a worker can listen
    /// any number of times.
    pub(crate) fn next_handle(&mut self) -> HandleId {
        self.last_handle = next_poll_number(self.last_handle, |number| {
            let handle = HandleId(number);
            self.listeners.contains_key(&handle) || self.binding.contains_key(&handle)
        });
        HandleId(self.last_handle)
    }

    /// Completes a worker's request after its listener has been bound, or could not be bound.
    pub(crate) fn bound(&mut self, handle: HandleId, result: Result<Option<SocketAddr>, i32>) {
        let Some(pending) = self.binding.remove(&handle) else {
            return;
        };
        let PendingBind {
            key,
            parking,
            worker,
            request,
        } = pending;
        let address = match result {
            Ok(address) => address,
            Err(errno) => {
                self.report_occupant(worker, &key.endpoint, errno);
                return self.reject(worker, request, errno);
            }
        };
        let policy = self.policy_of(&key.endpoint);
        let listener = self.add_listener(handle, key, address, policy);
        if policy == SchedulingPolicy::Sharded {
            listener.shards = vec![Some(worker)];
        }
        self.set_parking(handle, parking);
        self.join(worker, request, handle);
        if policy == SchedulingPolicy::RoundRobin {
            self.watch(handle, true);
        }
    }

    /// Emits an error event if a worker's request failed because a retained socket that no worker
    /// has occupies the port. Such a socket was probably meant for this worker, but has a different
    /// address by mistake. The worker itself receives only the error number.
    fn report_occupant(&mut self, worker: WorkerId, endpoint: &Endpoint, errno: i32) {
        if errno != errno::EADDRINUSE {
            return;
        }
        let is_unserved = |own: &&Listener<C>| own.is_retained() && own.members.is_empty();
        let occupant = self.occupant(endpoint).filter(is_unserved);
        let occupied_by = occupant.map(Listener::public_address);
        if occupied_by.is_none() {
            return;
        }
        let address = endpoint.to_string();
        let reason = io::Error::from_raw_os_error(errno);
        let error = match endpoint.kind {
            Kind::Udp => Error::Bind {
                address,
                reason,
                occupied_by,
            },
            Kind::Tcp | Kind::Unix => Error::Listen {
                address,
                reason,
                occupied_by,
            },
        };
        self.error(Some(worker), error);
    }

    /// Returns the address of this master's own socket that occupies the endpoint's port, but was
    /// requested or passed with another address. Returns `None` if there is no such socket.
    pub(crate) fn occupant_address(&self, endpoint: &Endpoint) -> Option<Address> {
        self.occupant(endpoint).map(Listener::public_address)
    }

    fn occupant(&self, endpoint: &Endpoint) -> Option<&Listener<C>> {
        let address = endpoint.socket_addr()?;
        let overlaps = |bound: SocketAddr| {
            let is_any = bound.ip().is_unspecified() || address.ip().is_unspecified();
            bound.port() == address.port() && (is_any || bound.ip() == address.ip())
        };
        let is_occupant = |listener: &&Listener<C>| {
            let is_udp = listener.key.endpoint.kind == Kind::Udp;
            listener.address.is_some_and(overlaps)
                && is_udp == (endpoint.kind == Kind::Udp)
                && listener.key.endpoint != *endpoint
        };
        self.listeners.values().find(is_occupant)
    }

    /// Adds a listener that has been bound.
    pub(super) fn add_listener(
        &mut self,
        handle: HandleId,
        key: HandleKey,
        address: Option<SocketAddr>,
        policy: SchedulingPolicy,
    ) -> &mut Listener<C> {
        let mut listener = Listener::new(key.clone(), address, policy);
        if self.has_scheduler {
            listener.dispatcher.use_scheduler();
        }
        let can_listen_again = key.endpoint.kind != Kind::Udp && !key.endpoint.is_borrowed();
        if !listener.master_accepts() && can_listen_again {
            self.actions.push_back(Action::WatchHangUp { handle });
        }
        self.keys.insert(key, handle);
        self.listeners.insert(handle, listener)
    }

    /// Makes the worker serve the listener.
    pub(super) fn join(&mut self, worker: WorkerId, request: u32, handle: HandleId) {
        // If all serving workers are disconnecting, reopen the listener. End it below for those
        // workers, because the new worker takes their place.
        let relieved = match self.reopen(handle) {
            true => self.serving(handle),
            false => Vec::new(),
        };
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        let Some(user) = self.workers.get(&worker).map(|entry| entry.user) else {
            return;
        };
        listener.is_requested = true;
        listener.members.add(worker, user);
        listener.dispatcher.add(worker, user);
        let bound = Bound {
            handle,
            policy: listener.policy,
            address: listener.address,
        };
        if let Some(entry) = self.workers.get_mut(&worker) {
            let listeners = &self.listeners;
            entry.joined(handle, |other| listeners.contains_key(&other));
        }
        for worker in relieved {
            self.end_for(handle, worker, Unreceived::GoToOthers);
        }
        self.close_excluded(handle);
        let attachment = match bound.policy {
            SchedulingPolicy::RoundRobin => Attachment::Queue(handle),
            SchedulingPolicy::Shared => Attachment::Listener(handle),
            SchedulingPolicy::Sharded => {
                Attachment::Shard(handle, self.shard_index(handle, worker))
            }
        };
        self.reply(worker, request, Ok(bound), attachment);
        self.select_shards(handle);
        self.move_held(handle);
    }

    /// Opens the listener to new connections if all workers that serve it are disconnecting.
    /// Returns whether this was the case.
    pub(super) fn reopen(&mut self, handle: HandleId) -> bool {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return false;
        };
        match listener.stage {
            Stage::Open | Stage::Unbound => return false,
            Stage::Pausing => {}
            Stage::Draining(_) | Stage::Emptying => {
                if listener.key.endpoint.kind == Kind::Tcp && listener.is_sole() {
                    self.actions.push_back(Action::DetachSynFilter { handle });
                }
            }
        }
        listener.stage = Stage::Open;
        self.select_shards(handle);
        true
    }

    /// Returns the workers that serve the listener.
    pub(crate) fn serving(&self, handle: HandleId) -> Vec<WorkerId> {
        let listener = self.listeners.get(&handle);
        listener.map_or_else(Vec::new, |listener| listener.members.serving().collect())
    }

    /// Rejects a worker's request after its copy of the listener, or its queue, could not be
    /// created.
    pub(crate) fn share_failed(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        request: u32,
        errno: i32,
    ) {
        self.leave_listener(handle, worker);
        self.reject(worker, request, errno);
    }
}
