//! The pool's sockets: which of them pass to a new master, and which of them close after an
//! upgrade.
//!
//! A socket is the *service's own* if a master of this service opened it and the application has
//! not passed it to another process. Only the masters of the service and their workers then have
//! copies. All other sockets also belong to the application, a service manager or another process.
//! The pool uses these sockets, but does nothing that the other process would notice.

use std::os::fd::{AsFd as _, OwnedFd};

use cluster::{Error, Master, Result, WorkerId, WorkerState};

use super::{Pool, PoolListener, Readiness};

/// The properties of a passed socket. For each socket, the old master encodes them in one byte and
/// writes the byte to the channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PassedSocket {
    /// Whether the new master must remove the socket's file when the socket closes.
    pub(super) removes_file: bool,
    /// Whether the socket is the service's own.
    pub(super) is_own: bool,
    /// Whether the pool serves its status on the socket. A release that does not know this property
    /// treats the socket as a listener that no worker requests, and closes it.
    pub(super) is_status: bool,
    /// Whether the path of a Unix socket no longer leads to the socket.
    pub(super) has_lost_path: bool,
}

impl PassedSocket {
    const REMOVES_FILE: u8 = 1;
    const OWN: u8 = 2;
    const STATUS: u8 = 4;
    const LOST_PATH: u8 = 8;

    pub(super) fn encode(self) -> u8 {
        let bit = |is_set: bool, bit: u8| if is_set { bit } else { 0 };
        bit(self.removes_file, Self::REMOVES_FILE)
            | bit(self.is_own, Self::OWN)
            | bit(self.is_status, Self::STATUS)
            | bit(self.has_lost_path, Self::LOST_PATH)
    }

    pub(super) fn decode(byte: u8) -> Self {
        Self {
            removes_file: byte & Self::REMOVES_FILE != 0,
            is_own: byte & Self::OWN != 0,
            is_status: byte & Self::STATUS != 0,
            has_lost_path: byte & Self::LOST_PATH != 0,
        }
    }
}

/// A copy of a socket for a new master.
pub(super) struct SocketCopy {
    pub(super) name: String,
    pub(super) fd: OwnedFd,
    pub(super) properties: PassedSocket,
}

impl Pool {
    /// Retains the sockets that only workers have opened, and returns a copy of each socket that
    /// the master holds for workers.
    pub(super) fn copy_sockets(&self, master: &Master) -> Result<Vec<SocketCopy>> {
        self.recognize_foreign_copies();
        let mut worker_sockets = self.0.worker_sockets.borrow_mut();
        let listeners = self.0.listeners.borrow();
        for listener in master.retain_all() {
            let mut known = listeners.iter().chain(&*worker_sockets);
            let address = listener.address();
            if known.all(|known| known.listener.address() != address) {
                let is_own = !listener.has_foreign_copies();
                worker_sockets.push(PoolListener { listener, is_own });
            }
        }
        let copies = listeners.iter().chain(&*worker_sockets).map(|socket| {
            let PoolListener { listener, is_own } = socket;
            let properties = PassedSocket {
                removes_file: listener.removes_file(),
                is_own: *is_own,
                is_status: false,
                has_lost_path: listener.has_lost_path(),
            };
            let fd = listener.as_fd().try_clone_to_owned();
            Ok(SocketCopy {
                name: listener.name(),
                fd: fd.map_err(Error::io("copy a socket for a new master"))?,
                properties,
            })
        });
        let servers = self.0.status_servers.borrow();
        let status_copies = servers.iter().map(|server| {
            let fd = server.copy_socket();
            Ok(SocketCopy {
                name: "cluster-status".to_owned(),
                fd: fd.map_err(Error::io("copy a socket for a new master"))?,
                properties: PassedSocket {
                    removes_file: server.removes_file(),
                    is_own: true,
                    is_status: true,
                    has_lost_path: server.has_lost_path(),
                },
            })
        });
        copies.chain(status_copies).collect()
    }

    /// Records which sockets are no longer the service's own, because the application has passed
    /// them to another process. Does nothing while another master runs, because that master's
    /// copies also count as foreign copies.
    fn recognize_foreign_copies(&self) {
        if self.is_only_master() {
            for socket in &mut *self.0.listeners.borrow_mut() {
                socket.is_own &= !socket.listener.has_foreign_copies();
            }
        }
    }

    /// Returns whether no other master of the service is running: neither the old master that started
    /// this one, nor a new master that this one has started.
    fn is_only_master(&self) -> bool {
        self.0.old_master.borrow().is_none()
            && !self.0.is_old_master_running.get()
            && self.0.new_masters.borrow().is_empty()
    }

    /// Handles the exit of an old or a new master, or the failed start of a new one. If no other
    /// master of the service is left, no other process has the service's own sockets, so the master
    /// drains them when they close.
    pub(super) fn other_master_exited(&self, master: &Master) {
        if !self.is_only_master() {
            return;
        }
        let (listeners, worker_sockets) =
            (self.0.listeners.borrow(), self.0.worker_sockets.borrow());
        let all = listeners.iter().chain(&*worker_sockets);
        for socket in all.filter(|socket| socket.is_own) {
            socket.listener.set_foreign_copies(false);
        }
        drop((listeners, worker_sockets));
        if !self.0.core.borrow().is_upgraded() {
            // Release the sockets that a failed upgrade has retained. From then on, each socket
            // closes when its last worker has closed it, as before the upgrade.
            drop(self.0.worker_sockets.take());
        }
        self.close_unrequested(master);
    }

    /// Closes the service's own sockets that this master has inherited, and that neither a worker
    /// nor the application has requested. The new release does not use them.
    ///
    /// Does nothing while another master runs, because the sockets would stay open in that master.
    /// Also does nothing while a worker is missing or has not listened yet, because that worker may
    /// request one of the sockets.
    pub(super) fn close_unrequested(&self, master: &Master) {
        if !self.is_only_master() || !self.have_workers_listened(master) {
            return;
        }
        let is_used = |socket: &PoolListener| !socket.is_own || socket.listener.is_requested();
        let listeners = self.0.listeners.take().into_iter();
        let (used, unused): (Vec<_>, Vec<_>) = listeners.partition(is_used);
        self.0.listeners.replace(used);
        // Close the sockets only after the borrow has ended, because closing runs code of the
        // master.
        drop(unused);
    }

    /// Returns whether each slot has a ready worker that has opened its sockets, or has
    /// been given up.
    fn have_workers_listened(&self, master: &Master) -> bool {
        let core = self.0.core.borrow();
        let has_listened = |id: &WorkerId| match core.options().readiness {
            // Assume that a ready worker has opened all of its sockets, because no event shows that
            // a worker has opened its last one.
            Readiness::Listening | Readiness::Message => true,
            // A program that does not use this crate requests no socket. A ready worker is such a
            // program if it has not called `init`.
            Readiness::Online | Readiness::Alive(_) => {
                let worker = master.worker(*id);
                let state = worker.map(|worker| worker.state());
                matches!(state, Some(WorkerState::Listening | WorkerState::None))
            }
        };
        core.has_all_workers() && core.workers().keys().all(has_listened)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_returns_the_encoded_properties_of_a_socket() {
        for bits in 0..16 {
            let properties = PassedSocket {
                removes_file: bits & 1 != 0,
                is_own: bits & 2 != 0,
                is_status: bits & 4 != 0,
                has_lost_path: bits & 8 != 0,
            };
            assert_eq!(PassedSocket::decode(properties.encode()), properties);
        }
        assert_eq!(PassedSocket::default().encode(), 0);
    }
}
