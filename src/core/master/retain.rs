//! Listeners that the application retains, so that they stay open without workers.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::MasterCore;
use super::listener::{AcceptState, Ownership, Stage};
use crate::types::address::Address;
use crate::types::endpoint::{BindAddress, Endpoint, Kind, abstract_name};
use crate::types::handle::{HandleId, HandleKey};
use crate::types::policy::SchedulingPolicy;
use crate::wire::frame::Unreceived;

impl<C, F> MasterCore<C, F> {
    /// Retains an existing listener on this endpoint, and returns it.
    ///
    /// The first choice is a listener that is not retained. The second choice is a passed listener
    /// that has not been requested. If there is neither, and the endpoint has a fixed port or a
    /// path, an existing listener is retained one more time. Returns `None` if there is no suitable
    /// listener. The shell then opens one and calls `retained`.
    pub(crate) fn retain(&mut self, endpoint: &Endpoint) -> Option<HandleId> {
        let open = || self.handles_at(endpoint);
        let unretained = open().find(|handle| !self.listeners[handle].is_retained());
        let unrequested = || open().find(|handle| !self.listeners[handle].is_requested);
        let first = || open().next().filter(|_| !endpoint.is_any_port());
        let handle = unretained.or_else(unrequested).or_else(first)?;
        let listener = self.listeners.get_mut(&handle)?;
        listener.retained_by += 1;
        listener.is_requested = true;
        // A draining listener pauses from now on, because it must stay open.
        if self.reopen(handle) {
            self.pause(handle);
        }
        Some(handle)
    }

    /// Retains every listener and UDP socket that is open for new workers, and returns them.
    /// Borrowed descriptors are left out, because they belong to the application.
    pub(crate) fn retain_all(&mut self) -> Vec<HandleId> {
        let mut handles = self.listeners.ids();
        handles.retain(|handle| {
            let listener = &self.listeners[handle];
            let is_open = matches!(listener.stage, Stage::Open | Stage::Pausing);
            is_open && !listener.key.endpoint.is_borrowed()
        });
        for handle in &handles {
            if let Some(listener) = self.listeners.get_mut(handle) {
                listener.retained_by += 1;
            }
        }
        handles
    }

    /// Returns the listeners of an endpoint, sorted by index.
    fn handles_at<'a>(&'a self, endpoint: &'a Endpoint) -> impl Iterator<Item = HandleId> + 'a {
        let key = |index| HandleKey {
            endpoint: endpoint.clone(),
            index,
        };
        (0..).map_while(move |index| self.keys.get(&key(index)).copied())
    }

    /// Adds a listener that the shell has just opened, and retains it for the application.
    pub(crate) fn retained(
        &mut self,
        handle: HandleId,
        endpoint: Endpoint,
        address: Option<SocketAddr>,
        policy: SchedulingPolicy,
    ) {
        self.is_policy_frozen = true;
        let count = self.handles_at(&endpoint).count();
        let index = u32::try_from(count).unwrap_or(u32::MAX);
        let key = HandleKey { endpoint, index };
        let listener = self.add_listener(handle, key, address, policy);
        listener.retained_by = 1;
        if listener.master_accepts() {
            // Start in `Ready`, because the poller does not watch the listener, and its backlog may
            // have connections before a worker joins.
            listener.accept_state = AcceptState::Ready;
        }
        if policy == SchedulingPolicy::Sharded {
            (listener.shards, listener.spare_shard) = (vec![None], Some(0));
        }
    }

    /// Adds a retained socket that was open before the master received it, and that has not been
    /// requested yet.
    pub(crate) fn adopted(
        &mut self,
        handle: HandleId,
        endpoint: Endpoint,
        address: Option<SocketAddr>,
    ) {
        let policy = match self.policy_of(&endpoint) {
            // Use `Shared`, because the process that opened the listener may not have allowed other
            // sockets to share its port.
            SchedulingPolicy::Sharded => SchedulingPolicy::Shared,
            policy @ (SchedulingPolicy::RoundRobin | SchedulingPolicy::Shared) => policy,
        };
        let has_fixed_tcp_port = endpoint.kind == Kind::Tcp && !endpoint.is_any_port();
        self.retained(handle, endpoint, address, policy);
        if let Some(listener) = self.listeners.get_mut(&handle) {
            listener.ownership = Ownership::Joint;
            listener.is_requested = false;
        }
        // Add a second key for a listener on all addresses, because a worker that names no host
        // requests only the port.
        let unspecified = address.filter(|address| address.ip().is_unspecified());
        if let Some(address) = unspecified.filter(|_| has_fixed_tcp_port) {
            let endpoint = Endpoint::new(Kind::Tcp, BindAddress::Port(address.port()));
            let key = HandleKey { endpoint, index: 0 };
            self.keys.get_or_insert_with(key, || handle);
        }
    }

    /// Records whether a process outside the cluster may have a copy of the listener.
    pub(crate) fn set_ownership(&mut self, handle: HandleId, ownership: Ownership) {
        if let Some(listener) = self.listeners.get_mut(&handle) {
            listener.ownership = ownership;
        }
    }

    /// Returns whether a worker or the application has requested the listener.
    pub(crate) fn is_requested(&self, handle: HandleId) -> bool {
        let listener = self.listeners.get(&handle);
        listener.is_some_and(|listener| listener.is_requested)
    }

    /// Returns the endpoint by which workers request a listener.
    pub(crate) fn endpoint_of(&self, handle: HandleId) -> Option<&Endpoint> {
        Some(&self.listeners.get(&handle)?.key.endpoint)
    }

    /// Returns the path of a Unix socket's file, or `None` if the socket has no file.
    pub(crate) fn path_of(&self, handle: HandleId) -> Option<PathBuf> {
        match &self.listeners.get(&handle)?.key.endpoint.address {
            BindAddress::Path(path) if abstract_name(path).is_none() => Some(path.into()),
            BindAddress::Path(_)
            | BindAddress::Ip(_)
            | BindAddress::Port(_)
            | BindAddress::Fd(_) => None,
        }
    }

    /// Returns a listener's address in the form that the application receives.
    pub(crate) fn address_of(&self, handle: HandleId) -> Option<Address> {
        let listener = self.listeners.get(&handle)?;
        Some(listener.public_address())
    }

    /// Undoes one retention of a listener. After the last one, the listener closes if no worker
    /// serves it, and drains if it is pausing. Otherwise, it stays open for the workers that serve
    /// it.
    pub(crate) fn release(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        listener.retained_by -= 1;
        if listener.is_retained() {
            return;
        }
        if !listener.members.is_served() {
            let leaving = None;
            self.close_unserved(handle, leaving);
            self.remove_if_unused(handle);
        } else if listener.stage == Stage::Pausing {
            listener.stage = Stage::Open;
            // During the pause, connections waited for the next worker of their user.
            self.close_excluded(handle);
            self.begin_drain(handle);
        }
    }

    /// Pauses a retained listener when all workers that serve it are disconnecting. New connections
    /// wait for the next worker. If the workers accept the connections, the listener only ends for
    /// these workers.
    pub(super) fn pause(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        match listener.policy {
            SchedulingPolicy::RoundRobin => {
                listener.stage = Stage::Pausing;
                if listener.accept_state == AcceptState::Watched {
                    listener.accept_state = AcceptState::Ready;
                }
                self.watch(handle, false);
                self.resume_if_served(handle);
            }
            SchedulingPolicy::Shared | SchedulingPolicy::Sharded => {
                self.end_for_all(handle, Unreceived::GoToOthers);
            }
        }
    }

    /// Reopens a paused listener if its disconnecting workers have received all accepted
    /// connections, and notifies these workers that the listener has ended for them. If connections
    /// are still in flight, updates the count of connections in the workers' queues.
    pub(super) fn resume_if_served(&mut self, handle: HandleId) {
        let Some(listener) = self.listeners.get_mut(&handle) else {
            return;
        };
        if listener.stage != Stage::Pausing || listener.accept_state == AcceptState::Accepting {
            return;
        }
        if listener.dispatcher.in_flight() == 0 {
            listener.stage = Stage::Open;
            self.end_for_all(handle, Unreceived::AreServed);
        } else {
            self.count_queues(handle);
        }
    }
}
