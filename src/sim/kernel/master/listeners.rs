//! Simulates how the master opens a listener, accepts connections from it, and closes it.

use std::io;
use std::net::SocketAddr;

use super::{MAX_ACCEPTED, listener_of};
use crate::sim::kernel::process::Process;
use crate::sim::kernel::socket::{Connection, Port, PortState};
use crate::sim::kernel::{Failure, World};
use crate::types::endpoint::Endpoint;
use crate::types::errno;
use crate::types::handle::HandleId;

impl World {
    pub(super) fn port(&mut self, handle: HandleId) -> &mut Port {
        let port = self.ports.get_mut(&handle).expect("an open listener");
        assert!(!port.is_unbound(), "the listener is closed");
        port
    }

    pub(super) fn filter(&mut self, handle: HandleId) {
        let is_ours = !self.retained.contains(&handle) && !self.adopted.contains(&handle);
        assert!(is_ours, "not only ours");
        self.port(handle).state = PortState::Closing;
    }

    pub(super) fn bind(
        &mut self,
        handle: HandleId,
        endpoint: &Endpoint,
    ) -> Result<Option<SocketAddr>, i32> {
        let is_in_use = self.ports.values().any(|port| port.occupies(endpoint));
        if is_in_use || self.failing.remove(&Failure::Bind) {
            return Err(errno::EADDRINUSE);
        }
        assert!(handle.0 > self.last_port, "bound twice");
        self.last_port = handle.0;
        self.ports.insert(handle, Port::new(endpoint.clone()));
        Ok(endpoint.socket_addr())
    }

    pub(super) fn unbind(&mut self, handle: HandleId) {
        assert!(!self.retained.contains(&handle), "the application has it");
        let port = self.port(handle);
        port.state = PortState::Unbound;
        port.is_watched = false;
        self.forget_port(handle);
    }

    /// Removes a listener and its backlog if no process has a descriptor of the listener.
    pub(crate) fn forget_port(&mut self, handle: HandleId) {
        let is_unbound = self.ports.get(&handle).is_some_and(Port::is_unbound);
        let has_copy = |process: &Process| {
            let mut travelling = process.down.parcels();
            process.shared.values().any(|shared| *shared == handle)
                || travelling.any(|parcel| listener_of(parcel.attachment) == Some(handle))
        };
        if is_unbound && !self.processes.values().any(has_copy) {
            self.ports.remove(&handle);
        }
    }

    pub(super) fn accept(&mut self, handle: HandleId, at_most: u64) {
        assert!(at_most <= MAX_ACCEPTED as u64);
        assert!(self.master.master_accepts(handle), "workers accept");
        if self.failing.remove(&Failure::Accept) {
            let error = io::Error::from_raw_os_error(errno::EMFILE);
            return self.report(|core| core.accept_failed(handle, error));
        }
        for _ in 0..at_most {
            let Some(client) = self.port(handle).backlog.pop_front() else {
                return self.report(|core| core.backlog_emptied(handle));
            };
            let connection = Connection::new(client, &self.closed);
            if self.master.holds_new(handle) {
                self.check_surplus();
            }
            self.report(|core| core.accepted(handle, connection));
        }
        self.report(|core| core.accept_done(handle));
    }
}
