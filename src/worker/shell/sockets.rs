//! A worker's sockets: shared listeners, queues, UDP sockets, and sockets that the worker opened
//! itself.

use std::cell::Cell;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use super::WorkerShell;
use crate::core::worker::ListenerId;
use crate::error::{Error, Result};
use crate::runtime::token::Token;
use crate::sys;
use crate::sys::bind::BoundSocket;
use crate::sys::poll::{Interest, Registered};
use crate::sys::socket_file::SocketFile;
use crate::sys::std_accept::StdAccept;
use crate::types::endpoint::{Kind, Parking};

/// A socket from which a worker receives connections or datagrams.
#[derive(Debug)]
pub(crate) enum Socket {
    Listener(SharedListener),
    /// The worker's end of a queue of connections that the master has accepted.
    Queue(OwnedFd),
    Datagrams(UdpSocket),
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Listener(listener) => listener.fd.as_fd(),
            Self::Queue(fd) => fd.as_fd(),
            Self::Datagrams(socket) => socket.as_fd(),
        }
    }
}

/// A listener of which other processes may have copies.
#[derive(Debug)]
pub(crate) struct SharedListener {
    pub(super) fd: OwnedFd,
    pub(super) mode: Cell<AcceptMode>,
}

/// Whether this process expects `accept` on a shared listener to block. All copies of the listener
/// share the kernel's flag.
///
/// | state | event | next state |
/// |---|---|---|
/// | `Blocking` | `unblock` | `NonBlocking` |
/// | `Blocking` | `accept` fails with `WouldBlock` | `NonBlocking` |
///
/// `accept` fails with `WouldBlock` if another process has made the listener non-blocking, or if
/// the descriptor limit no longer allows a wait in `accept`. A worker never makes its listener
/// block again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AcceptMode {
    Blocking,
    NonBlocking,
}

/// The party that opened a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SocketOwner {
    /// The master opened the socket, and other workers may have copies.
    Master,
    /// This worker opened the socket. Only processes that this worker forked have copies.
    ThisWorker,
    /// The application passed the socket to this crate, and any process may have a copy.
    Application,
}

/// A socket in the worker's table.
#[derive(Debug)]
pub(super) struct SocketEntry {
    /// The file of a Unix socket that only this worker listens on. The field is declared first so
    /// that the file is removed before the socket closes. Another process that notices the close
    /// can then bind the path at once.
    file: Option<SocketFile>,
    pub(super) socket: Rc<Registered<Socket>>,
    pub(super) owner: SocketOwner,
    /// The `accept` calls of other code, if it has a copy of the listener.
    pub(super) std: Option<StdAccept>,
}

/// A socket to be added to the worker's table.
struct NewSocket {
    fd: OwnedFd,
    file: Option<SocketFile>,
    mode: AcceptMode,
    owner: SocketOwner,
}

impl WorkerShell {
    pub(crate) fn socket(&self, listener: ListenerId) -> Option<Rc<Registered<Socket>>> {
        let sockets = self.sockets.borrow();
        sockets.get(&listener).map(|entry| Rc::clone(&entry.socket))
    }

    /// Adds a copy of a shared listener or socket, or the worker's end of a queue.
    pub(super) fn add_shared(&self, listener: ListenerId, fd: OwnedFd, mode: AcceptMode) {
        let new = NewSocket {
            fd,
            file: None,
            mode,
            owner: SocketOwner::Master,
        };
        if let Err(source) = self.add(listener, new) {
            self.report_io("wait for a shared listener", source);
            self.core.borrow_mut().close(listener);
        }
    }

    /// Adds a socket that this worker has opened without the master. If the worker is disconnecting
    /// or its channel has closed, the socket is closed and the returned listener has already ended.
    pub(crate) fn add_exclusive(
        &self,
        kind: Kind,
        parking: Parking,
        bound: BoundSocket,
        owner: SocketOwner,
    ) -> io::Result<ListenerId> {
        let listener = self.core.borrow_mut().listen_privately(kind, parking);
        if !self.core.borrow().closes_new_listeners() {
            let new = NewSocket {
                fd: bound.socket,
                file: bound.file,
                mode: AcceptMode::NonBlocking,
                owner,
            };
            self.add(listener, new)
                .inspect_err(|_| self.close(listener))?;
        }
        Ok(listener)
    }

    fn add(&self, listener: ListenerId, new: NewSocket) -> io::Result<()> {
        let NewSocket {
            fd,
            file,
            mode,
            owner,
        } = new;
        let core = self.core.borrow();
        let socket = if core.is_datagram(listener) {
            Socket::Datagrams(fd.into())
        } else if core.has_queue(listener) {
            Socket::Queue(fd)
        } else {
            let mode = Cell::new(mode);
            Socket::Listener(SharedListener { fd, mode })
        };
        drop(core);
        let key = Token::Listener(listener.0).key();
        let entry = SocketEntry {
            file,
            socket: Rc::new(self.poller.add(socket, key, None)?),
            owner,
            std: None,
        };
        self.sockets.borrow_mut().insert(listener, entry);
        Ok(())
    }

    /// Sets whether the poller reports a socket when it is readable.
    pub(crate) fn watch(&self, listener: ListenerId, watch: bool) {
        let interest = watch.then_some(Interest::Readable);
        let socket = self.socket(listener);
        if let Some(Err(source)) = socket.map(|socket| socket.set_interest(interest)) {
            self.report_io("wait for a shared listener", source);
        }
    }

    /// Watches a socket if it has a callback and is not paused for a limit of connections or
    /// descriptors. Stops watching it otherwise.
    pub(crate) fn update_watch(&self, listener: ListenerId) {
        let core = self.core.borrow();
        let is_wanted = core.has_callback(listener) && !core.is_paused(listener);
        drop(core);
        self.watch(listener, is_wanted);
    }

    /// Delivers a socket's connections or datagrams to a callback from now on.
    pub(crate) fn serve(&self, listener: ListenerId) {
        self.fd_limit.set(sys::fd::limit());
        if let Err(error) = self.unblock(listener) {
            self.report(error);
        }
        self.core.borrow_mut().use_callback(listener);
        self.act();
        self.update_watch(listener);
    }

    /// Returns whether `accept` on this listener blocks.
    pub(crate) fn is_blocking(&self, listener: ListenerId) -> bool {
        let socket = self.socket(listener);
        let socket = socket.as_deref().map(|registered| &**registered);
        matches!(socket, Some(Socket::Listener(shared)) if shared.mode.get() == AcceptMode::Blocking)
    }

    /// Makes `accept` on this listener return at once, in all processes that have a copy.
    pub(crate) fn unblock(&self, listener: ListenerId) -> Result<()> {
        let socket = self.socket(listener).filter(|socket| socket.is_own());
        if let Some(Socket::Listener(shared)) = socket.as_deref().map(|socket| &**socket) {
            if shared.mode.replace(AcceptMode::NonBlocking) == AcceptMode::Blocking {
                sys::fd::set_nonblocking(shared.fd.as_fd(), true)
                    .map_err(Error::io("change a shared listener"))?;
            }
        }
        Ok(())
    }

    /// Closes a listener or socket at the application's request.
    pub(crate) fn close(&self, listener: ListenerId) {
        self.core.borrow_mut().forget(listener);
        self.act();
    }

    pub(super) fn close_socket(&self, listener: ListenerId) {
        let mut entry = self.sockets.borrow_mut().remove(&listener);
        let std = entry.as_mut().and_then(|entry| entry.std.take());
        if let Some(accept) = std.filter(|_| self.poller.is_own()) {
            self.end_std_listener(accept);
        }
        if let (Some(interrupt), Some(entry)) = (self.interrupt.get(), &entry) {
            // The call cannot fail, because both descriptors are open.
            let _ = interrupt.release(entry.socket.as_fd());
        }
        let own = entry.filter(|entry| entry.owner == SocketOwner::ThisWorker);
        if let Some(entry) = own.filter(|_| self.poller.is_own()) {
            if let Socket::Listener(own) = &**entry.socket {
                // Shut the listener down, because a process that this worker forked may have a
                // copy. Clients would otherwise wait in that copy's backlog forever.
                sys::listen::shut_down(&own.fd);
            }
        }
    }

    /// Keeps new connections out of the backlog of a listener that this worker opened.
    ///
    /// Attaches the SYN filter to a TCP listener. Removes the file of a Unix socket, and shuts the
    /// socket down. Other listeners also belong to other processes and stay unchanged. If the
    /// system does not support SYN filters, or if the Unix address is abstract, connections still
    /// arrive while the backlog is being emptied.
    pub(super) fn attach_syn_filter(&self, listener: ListenerId) {
        let mut sockets = self.sockets.borrow_mut();
        let entry = sockets.get_mut(&listener);
        let Some(entry) = entry.filter(|entry| entry.owner == SocketOwner::ThisWorker) else {
            return;
        };
        let was_path = entry.file.take().is_some();
        match &**entry.socket {
            Socket::Listener(own) if was_path => sys::listen::shut_down(&own.fd),
            Socket::Listener(own) => drop(sys::filter::attach_syn_filter(&own.fd)),
            Socket::Queue(_) | Socket::Datagrams(_) => {}
        }
    }
}
