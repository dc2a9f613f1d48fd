//! Opens a worker's listeners and sockets.

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

/// A listener or socket that the worker has opened.
pub(super) struct Opened {
    pub(super) id: ListenerId,
    /// The bound address. `None` for a Unix socket, and if the worker is disconnecting or its
    /// channel has closed.
    pub(super) address: Option<SocketAddr>,
}

impl Worker {
    /// Opens a listener on the socket that the request contains. If the request contains an address
    /// instead, opens a listener or socket on this address. If the address resolves to several,
    /// uses the first that can be opened.
    ///
    /// The outer error means that waiting for the master failed or that this process did not create
    /// the worker. The inner error means that opening failed.
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
            let opened = if bind_request.is_private() {
                self.open_private(&endpoint, bind_request)
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

    /// Requests a shared listener or socket from the master.
    fn open_shared(&self, endpoint: Endpoint, flags: BindFlags) -> Result<io::Result<Opened>> {
        let shell = &self.inner.shell;
        let id = shell.core.borrow_mut().listen(endpoint, flags);
        let answer = shell.wait_for_reply(id).inspect_err(|_| shell.close(id))?;
        Ok(match answer {
            Ok(address) => {
                shell.core.borrow_mut().listening(id);
                shell.act();
                Ok(Opened { id, address })
            }
            Err(error) => {
                shell.close(id);
                Err(error)
            }
        })
    }

    /// Binds an address in this process, without the master.
    fn open_private(&self, endpoint: &Endpoint, bind_request: &BindRequest) -> io::Result<Opened> {
        let shell = &self.inner.shell;
        if shell.core.borrow().closes_new_listeners() {
            let (kind, parking) = (endpoint.kind, bind_request.flags.parking);
            let id = shell.core.borrow_mut().listen_privately(kind, parking);
            return Ok(Opened { id, address: None });
        }
        let sharing = match bind_request.reuse_port {
            true => PortSharing::Join,
            false => PortSharing::Exclusive,
        };
        let bound = bind(endpoint, &bind_request.flags, sharing)?;
        let deferred_seconds = bind_request.flags.parking.deferred_seconds();
        if deferred_seconds > 0 && !endpoint.is_borrowed() {
            sys::listen::defer_accept(&bound.socket, deferred_seconds);
        }
        let address = bound.address;
        let owner = match endpoint.is_borrowed() {
            true => SocketOwner::Application,
            false => SocketOwner::ThisWorker,
        };
        let parking = bind_request.flags.parking;
        let id = shell.add_exclusive(endpoint.kind, parking, bound, owner)?;
        Ok(Opened { id, address })
    }

    /// Opens a listener on a socket that the application passed, without the master.
    fn open_socket(&self, socket: OwnedFd, bind_request: &BindRequest) -> io::Result<Opened> {
        bind::prepare(&socket, bind_request.flags.backlog)?;
        let address = sys::listen::local_addr(&socket);
        let bound = BoundSocket {
            file: None,
            socket,
            address,
        };
        // Pass `Kind::Tcp` even for a Unix socket, because the kind makes no difference after the
        // socket has been opened.
        let (parking, owner) = (bind_request.flags.parking, SocketOwner::Application);
        let shell = &self.inner.shell;
        let id = shell.add_exclusive(Kind::Tcp, parking, bound, owner)?;
        Ok(Opened { id, address })
    }
}
