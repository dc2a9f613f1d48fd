//! A listener that the master retains.

use std::os::fd::{AsFd, BorrowedFd};
use std::rc::{Rc, Weak};

use crate::error::{Error, Result};
use crate::master::shell::{MasterShell, RetainedListener};
use crate::types::address::Address;

/// A listener that the master retains, whether workers have it or not.
///
/// Node has no counterpart. It comes from [`Master::listen`](crate::Master::listen). As long as the value
/// exists, connections wait in the kernel's backlog when there is no worker, and the next worker that
/// listens serves them. No client is refused or reset when all workers exit or are replaced. A worker
/// that disconnects closes its copy; the last workers still serve what the master has accepted, and no
/// more. [`Master::run`](crate::Master::run) and a [`disconnect`](crate::Master::disconnect) of all
/// workers do not wait for a retained listener.
///
/// When the value is dropped, the listener closes with its last worker, which first serves what waits. If
/// no worker has it, it closes at once, and waiting connections are reset. The file of a Unix socket is
/// then removed, unless the socket was passed to `listen`. An application that stops for good therefore
/// drops the value before it calls `disconnect`. One that leaves the backlog to another process with the
/// same socket keeps the value until all workers have exited.
///
/// Another process may have the same socket, if the socket was passed to `listen`, or after the first call
/// of [`as_fd`](AsFd::as_fd). The master then changes nothing that the other process would notice, except
/// that the socket is non-blocking. Otherwise, new clients of a TCP port are ignored while the last
/// workers disconnect, and then the socket stops listening in all processes that have a copy.
///
/// With the sharded policy, each worker has its own listener. Connections that waited for an exited worker
/// wait for its replacement, so as many workers are needed as before. New connections do not go to the
/// listener of an exited worker; if no worker is left, the next one serves them. A listener that was passed
/// to `listen` is shared instead.
///
/// The type is not `Send`, as the [`Master`](crate::Master) is not. Another thread or process gets a copy of
/// the descriptor ([`AsFd`]).
///
/// ```no_run
/// # fn f(master: &cluster::Master) -> cluster::Result<()> {
/// use cluster::Signal;
///
/// let mut listener = Some(master.listen("127.0.0.1:8000")?);
/// master.on_signal(Signal::TERM, move |master, _| {
///     drop(listener.take()); // the disconnecting workers serve the waiting clients
///     master.disconnect();
/// })?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use = "the listener closes when it is dropped"]
pub struct MasterListener {
    master: Weak<MasterShell>,
    retained: RetainedListener,
}

impl MasterListener {
    pub(super) fn new(master: &Rc<MasterShell>, retained: RetainedListener) -> Self {
        let master = Rc::downgrade(master);
        Self { master, retained }
    }

    /// Returns the address to which clients connect, with the real port.
    ///
    /// Node: `server.address()`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// let listener = master.listen("127.0.0.1:0")?;
    /// println!("port {:?}", listener.address().port());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn address(&self) -> Address {
        self.retained.address.clone()
    }

    /// Returns whether this process removes the file of a Unix socket when the listener closes.
    ///
    /// Node has no counterpart. See [`set_removes_file`](Self::set_removes_file), which has an example.
    #[must_use]
    pub fn removes_file(&self) -> bool {
        let master = self.master.upgrade();
        master.is_some_and(|master| master.removes_file(self.retained.handle))
    }

    /// Sets whether this process removes the file of a Unix socket when the listener closes. By default it
    /// does, unless the socket was passed to [`listen`](crate::Master::listen).
    ///
    /// Node has no counterpart. An application that leaves the listener to its successor leaves the file,
    /// too, and the successor removes it. Nothing happens for other listeners, or when the master has been
    /// dropped.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if `removes` is true and there is no file.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use std::path::Path;
    ///
    /// let listener = master.listen(Path::new("app.sock"))?;
    /// assert!(listener.removes_file());
    /// listener.set_removes_file(false)?;
    /// # Ok(()) }
    /// ```
    pub fn set_removes_file(&self, removes: bool) -> Result<()> {
        let Some(master) = self.master.upgrade() else {
            return Ok(());
        };
        master.check_own()?;
        let set = master.set_removes_file(self.retained.handle, removes);
        set.map_err(Error::io("find the file of a Unix socket"))
    }
}

/// The listening socket, which can be given to another process. After the first call, the master assumes
/// that another process has a copy. With the sharded policy this is one of several sockets. All new
/// connections go to it when the value is dropped and the last workers disconnect. No filter can be
/// attached to it.
impl AsFd for MasterListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        if let Some(master) = self.master.upgrade() {
            master.mark_borrowed(self.retained.handle);
        }
        self.retained.socket.as_fd()
    }
}

impl Drop for MasterListener {
    fn drop(&mut self) {
        if let Some(master) = self.master.upgrade() {
            master.release(self.retained.handle);
        }
    }
}
