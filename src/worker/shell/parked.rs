//! Giving connections back to the master.

use std::os::fd::{AsFd as _, OwnedFd};

use super::WorkerShell;
use super::sockets::Socket;
use crate::core::worker::ListenerId;
use crate::sys;
use crate::types::connection_id::ConnectionId;
use crate::wire::frame::{HandleId, ToMaster};

/// Where a connection comes from, and where it goes when the application parks it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Origin {
    /// The listener that counts the connection.
    pub(crate) listener: Option<ListenerId>,
    /// The master's handle of the listener if the master dispatches the listener's connections. The
    /// handle stays valid after the listener has closed.
    pub(crate) handle: Option<HandleId>,
    /// The connection's id if the master holds a copy.
    pub(crate) held: Option<ConnectionId>,
    /// How often the connection has been parked.
    pub(crate) parked: u32,
}

impl WorkerShell {
    /// Lets the master close its copy of a connection, because the application keeps or has closed
    /// the connection.
    pub(crate) fn detach(&self, origin: &Origin) {
        if let Some(connection) = origin.held {
            self.core.borrow_mut().detach(connection);
            // Act at once, because the client receives end-of-file only when the master has closed
            // its copy.
            self.act();
        }
    }

    /// Returns whether the master would hold the connection.
    pub(crate) fn can_park(&self, origin: &Origin) -> bool {
        let is_dispatched = origin.held.is_some() || origin.handle.is_some();
        is_dispatched && self.core.borrow().is_writable() && self.poller.is_own()
    }

    /// Gives a connection to the master, which holds it until its client sends something.
    pub(crate) fn park(&self, fd: OwnedFd, origin: &Origin) {
        self.fault("worker.before_park");
        let mut core = self.core.borrow_mut();
        core.connection_closed(origin.listener);
        // A forked child only closes its copy of the connection.
        let is_writable = core.is_writable() && self.poller.is_own();
        match (origin.held, origin.handle) {
            // The options are the same for the master's copy.
            _ if sys::socket::reset_options(fd.as_fd()).is_err() || !is_writable => {
                if let Some(connection) = origin.held {
                    core.detach(connection);
                }
            }
            (Some(connection), _) => core.park_again(connection),
            (None, Some(handle)) => {
                self.channel.queue(&ToMaster::Park { handle }, Some(fd));
            }
            (None, None) => {}
        }
        // Report that the worker is idle in the same write, if it will find its queue empty anyway.
        let listener = origin.listener.filter(|id| self.is_queue_empty(*id));
        if let Some(listener) = listener {
            core.found_empty_again(listener);
        }
        drop(core);
        self.act();
        self.flush_channel();
        self.fault("worker.after_park");
    }

    /// Returns whether the listener has a queue that is known to be empty.
    fn is_queue_empty(&self, listener: ListenerId) -> bool {
        let socket = self.socket(listener);
        let socket = socket.as_deref().map(|registered| &**registered);
        matches!(socket, Some(Socket::Queue(queue)) if sys::queue::is_empty(queue))
    }
}
