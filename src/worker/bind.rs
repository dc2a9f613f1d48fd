//! How a worker gets its listeners and sockets.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use crate::config::listen::BindRequest;
use crate::core::worker::ListenerId;
use crate::error::Result;
use crate::sys;
use crate::sys::bind::{self, BoundSocket, bind};
use crate::sys::listen::PortSharing;
use crate::types::endpoint::{BindFlags, Endpoint, Kind};
use crate::worker::Worker;
use crate::worker::shell::SocketOwner;

/// A listener or socket, with its address if it has one.
type Opened = (ListenerId, Option<SocketAddr>);

impl Worker {
    /// Opens the first that can be had of what the program wants. The outer error is that of the
    /// wait for the master, the inner one that of the system.
    pub(super) fn open(&self, bind_request: &mut BindRequest) -> Result<io::Result<Opened>> {
        self.inner.event_loop.check_own()?;
        if let Some(socket) = bind_request.take_socket() {
            return Ok(self.open_socket(socket, bind_request));
        }
        let endpoints = match bind_request.resolve() {
            Ok(endpoints) => endpoints,
            Err(error) => return Ok(Err(error)),
        };
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for endpoint in endpoints {
            let opened = if bind_request.is_alone() {
                self.open_alone(&endpoint, bind_request)
            } else {
                self.open_shared(endpoint, bind_request.flags)?
            };
            match opened {
                Ok(opened) => return Ok(Ok(opened)),
                Err(error) => last = error,
            }
        }
        Ok(Err(last))
    }

    /// Asks the master.
    fn open_shared(&self, endpoint: Endpoint, flags: BindFlags) -> Result<io::Result<Opened>> {
        let shell = &self.inner.shell;
        let asked = endpoint.address();
        let id = shell.core.borrow_mut().listen(endpoint, flags);
        let answer = shell.wait_for_reply(id).inspect_err(|_| shell.close(id))?;
        Ok(match answer {
            Ok(bound) => {
                shell.core.borrow_mut().listening(id);
                shell.act();
                Ok((id, bound.or(asked)))
            }
            Err(error) => {
                shell.close(id);
                Err(error)
            }
        })
    }

    /// Binds in this process; the master is not asked.
    fn open_alone(&self, endpoint: &Endpoint, bind_request: &BindRequest) -> io::Result<Opened> {
        let shell = &self.inner.shell;
        if shell.core.borrow().is_disconnecting() {
            let id = shell.core.borrow_mut().listen_privately(endpoint.kind);
            return Ok((id, endpoint.address()));
        }
        let sharing = match bind_request.reuse_port {
            true => PortSharing::Join,
            false => PortSharing::Exclusive,
        };
        let bound = bind(endpoint, &bind_request.flags, sharing)?;
        let address = bound.address;
        let owner = match endpoint.is_borrowed() {
            true => SocketOwner::Application,
            false => SocketOwner::ThisWorker,
        };
        let id = shell.add_exclusive(endpoint.kind, bound, owner)?;
        Ok((id, address))
    }

    /// Uses a socket that the worker has already.
    fn open_socket(&self, socket: OwnedFd, bind_request: &BindRequest) -> io::Result<Opened> {
        bind::prepare(&socket, bind_request.flags.backlog)?;
        let address = sys::listen::local_addr(&socket);
        let bound = BoundSocket {
            file: None,
            socket,
            address,
        };
        // Of TCP or Unix, which makes no difference from here on.
        let id = self
            .inner
            .shell
            .add_exclusive(Kind::Tcp, bound, SocketOwner::Application)?;
        Ok((id, address))
    }
}
