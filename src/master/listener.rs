//! A listener that belongs to the master.

use std::os::fd::{AsFd, BorrowedFd};
use std::rc::{Rc, Weak};

use crate::error::{Error, Result};
use crate::master::shell::{MasterShell, RetainedListener};
use crate::types::address::Address;

/// A listener that the master keeps open, whether workers have it or not.
///
/// Node has no counterpart. It comes from [`Master::listen`](crate::Master::listen). As long as it
/// lives, who connects waits in the kernel's queue when there is no worker, and the next worker that
/// listens serves him: nobody is refused or reset when all workers die or are replaced. A worker
/// that leaves lets go of it; the last ones still serve what the master has accepted, and no more.
/// [`Master::run`](crate::Master::run) and the callback of
/// [`Master::disconnect`](crate::Master::disconnect) do not wait for it.
///
/// When it is dropped, it is a listener as any other: it closes with its last worker, which first
/// serves what waits, or at once if no worker has it; then whoever waits is reset. A Unix socket's
/// file goes with it, unless the socket was passed to `listen`. So a program that stops for good drops
/// it before it calls `disconnect`; one that leaves the queue to another process, which has the
/// same socket, lets it live until all workers have left.
///
/// Another process may have the same socket, if it was passed to `listen`, or from the first call of
/// [`as_fd`](AsFd::as_fd) on. The master changes nothing then that the other process would notice, save
/// that the socket is set not to block. Otherwise new clients of a TCP port are ignored while the last
/// workers leave, and then the socket stops listening in all processes that have a copy.
///
/// With the sharded policy workers have listeners of their own beside it, and who waits for a worker
/// that has died waits for one to take its place: as many workers are needed as have been before.
/// Newcomers do not go there, and who comes when no worker is left is served by the next one. A
/// listener that was passed to `listen` is shared instead.
///
/// ```no_run
/// # fn f(master: &cluster::Master) -> cluster::Result<()> {
/// use cluster::Signal;
///
/// let listener = master.listen("127.0.0.1:8000")?;
/// let mut kept = Some(listener);
/// master.on_signal(Signal::TERM, move |master, _| {
///     drop(kept.take()); // who waits is served by those who leave
///     master.disconnect(|_| {});
/// })?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use = "it is let go of when it is dropped"]
pub struct MasterListener {
    master: Weak<MasterShell>,
    listener: RetainedListener,
}

impl MasterListener {
    pub(crate) fn new(master: &Rc<MasterShell>, listener: RetainedListener) -> Self {
        let master = Rc::downgrade(master);
        Self { master, listener }
    }

    /// Returns where clients connect, with the real port.
    ///
    /// Node: `server.address()`.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// let listener = master.listen("127.0.0.1:0")?;
    /// println!("port {:?}", listener.address().port);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn address(&self) -> Address {
        self.listener.address.clone()
    }
}

impl MasterListener {
    /// Returns whether this process removes the file of a Unix socket when the listener closes.
    ///
    /// Node has no counterpart. See [`set_removes_file`](Self::set_removes_file), which has an example.
    #[must_use]
    pub fn removes_file(&self) -> bool {
        let master = self.master.upgrade();
        master.is_some_and(|master| master.removes_file(self.listener.handle))
    }

    /// Says who removes the file of a Unix socket: this process, when the listener closes, or somebody
    /// else. Without it the file goes, unless the socket was passed to
    /// [`listen`](crate::Master::listen).
    ///
    /// Node has no counterpart. A program that leaves the listener to its successor leaves the file, too;
    /// the successor takes it. Nothing happens for other listeners, or when the master is gone.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if this process is to remove the file, and there is none.
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
        let set = master.set_removes_file(self.listener.handle, removes);
        set.map_err(Error::io("find the file of a Unix socket"))
    }
}

/// The listening socket, which can be given to another process. From now on the master takes it that one
/// has a copy. With the sharded policy this is one of several sockets, to which all new connections go when
/// the listener is dropped and the last workers leave; no filter can be attached to it.
impl AsFd for MasterListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        if let Some(master) = self.master.upgrade() {
            master.mark_borrowed(self.listener.handle);
        }
        self.listener.socket.as_fd()
    }
}

impl Drop for MasterListener {
    fn drop(&mut self) {
        if let Some(master) = self.master.upgrade() {
            master.release(self.listener.handle);
        }
    }
}
