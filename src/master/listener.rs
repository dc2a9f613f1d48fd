//! A listener or UDP socket that the master retains, and the master's methods that retain one.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::rc::{Rc, Weak};

use crate::config::listen::{BindRequest, ListenOptions};
use crate::error::{Error, Result};
use crate::master::Master;
use crate::master::shell::{MasterShell, RetainedListener};
use crate::systemd::ListenFd;
use crate::types::address::Address;
use crate::types::endpoint::BACKLOG;

/// A listener or UDP socket that the master retains, even while no worker has it.
///
/// Node has no counterpart.
///
/// The methods [`Master::listen`](crate::Master::listen), [`Master::adopt`](crate::Master::adopt)
/// and [`Master::retain_all`](crate::Master::retain_all) return this type. While the value exists
/// and no worker has the listener, connections wait in the kernel's backlog, and the next worker
/// that listens serves them. When all workers exit or are replaced, no new client is refused and no
/// waiting client is reset. A worker that disconnects closes its copy. Unless the listener is
/// sharded, even the last worker serves only the connections that have already been accepted; the
/// others stay in the backlog. [`Master::run`](crate::Master::run) and a
/// [`disconnect`](crate::Master::disconnect) of all workers do not wait for a retained listener.
///
/// When the value is dropped, the listener closes with its last worker, which first serves the
/// backlog. If no worker has the listener, the listener closes at once, and the kernel resets the
/// waiting connections. When a Unix listener closes, the master removes the socket's file, unless
/// the socket was passed to this process ([`set_removes_file`](Self::set_removes_file) changes
/// this). If the application stops permanently, drop the value before the call of `disconnect`, so
/// that the workers serve the backlog. If another process with the same socket should serve the
/// backlog, keep the value until all workers have exited.
///
/// A process outside the cluster may have a copy of the socket if the socket was passed to this
/// process, or after the first call of [`as_fd`](AsFd::as_fd). The master then changes nothing that
/// the other process would notice, except that UDP sockets and, with round robin, listeners are
/// non-blocking. Clients that connect while the last workers disconnect may be reset. If the other
/// process has exited, call [`set_foreign_copies`](Self::set_foreign_copies).
///
/// If no process outside the cluster can have a copy, the master drops requests for new TCP
/// connections while the last workers disconnect. Afterwards, the master shuts the socket down, so
/// that copies in forked children stop listening too.
///
/// A UDP socket has no backlog and no handshakes. Datagrams wait in its receive buffer, as
/// connections do in a backlog.
///
/// With the sharded policy, each worker has its own listener. A worker that disconnects first
/// serves the backlog of its own listener. Connections that waited for a worker that exited without
/// this step wait for its replacement, so start as many workers as before. New connections do not
/// go to an exited worker's listener. If no worker serves, new connections go to one of the
/// listeners and wait there for the next worker; a disconnecting worker that has this listener
/// leaves the backlog to the next worker. A listener that was passed to this process is shared, not
/// sharded.
///
/// Like the [`Master`], this type is not `Send`. To use the socket on another thread or in another
/// process, copy the descriptor that [`AsFd`] returns.
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

impl Master {
    /// Opens a listener before the workers do, and retains it. Until the returned value is dropped,
    /// the listener stays open even if no worker has it.
    ///
    /// Node has no counterpart: in Node, a listener closes with its last worker.
    ///
    /// Workers that request the same address receive this listener. For example, `worker.listen(0)`
    /// receives the port that the kernel chose for `master.listen(0)`. If workers already have a
    /// listener on the address, the master retains that listener. If the master already retains it,
    /// the listener stays open until every `MasterListener` for it is dropped.
    ///
    /// The argument can also be a listening socket, for instance from systemd or from another
    /// process that served it before. Workers receive that socket if they request its address. The
    /// address of a Unix socket is its path, or its abstract name after a zero byte. A TCP listener
    /// on all addresses also matches requests that name only its port. With round robin, the call
    /// makes the socket non-blocking.
    ///
    /// The scheduling policy cannot change after this call. See [`MasterListener`] for how a
    /// retained listener behaves.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Listen`] if:
    ///
    /// - the address cannot be resolved, or the system refuses it, for instance because the address
    ///   is in use or not allowed, or because no descriptor is free;
    /// - the options contain [`exclusive`](ListenOptions::exclusive),
    ///   [`reuse_port`](ListenOptions::reuse_port) or [`fd`](ListenOptions::fd), which are only for
    ///   workers;
    /// - the argument is a socket that is not a stream socket of the requested kind, or that is a
    ///   Unix socket without a name.
    ///
    /// Returns [`Error::ForeignProcess`] in a process that did not create the master.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// let listener = master.listen("127.0.0.1:8000")?;
    /// println!("clients can connect to {}, and wait", listener.address());
    /// master.fork()?; // which requests "127.0.0.1:8000" and serves the clients
    /// master.run()
    /// # }
    /// ```
    pub fn listen<S>(&self, options: impl Into<ListenOptions<S>>) -> Result<MasterListener> {
        self.event_loop.check_own()?;
        let mut bind_request = options.into().bind_request;
        match self.open(&mut bind_request) {
            Ok(retained) => Ok(MasterListener::new(&self.shell, retained)),
            Err(reason) => Err(Error::Listen {
                address: bind_request.to_string(),
                occupied_by: self.occupant(&bind_request, &reason),
                reason,
            }),
        }
    }

    /// Returns the address of the master's own socket that occupies the requested port, if the
    /// request has failed because the address is in use.
    fn occupant(&self, bind_request: &BindRequest, reason: &io::Error) -> Option<Address> {
        if reason.kind() != io::ErrorKind::AddrInUse {
            return None;
        }
        let endpoints = bind_request.resolve().ok()?;
        let core = self.shell.core.borrow();
        endpoints
            .iter()
            .find_map(|endpoint| core.occupant_address(endpoint))
    }

    /// Retains a socket that was passed to this process, for instance by systemd or by an old
    /// master. Until the returned value is dropped, the socket stays open even if no worker has it.
    ///
    /// Node has no counterpart.
    ///
    /// The socket is a TCP listener, a Unix listener or a UDP socket. Workers receive it if they
    /// request its address. A host name stands for its first usable address. A worker that listens
    /// on `localhost:80` may therefore open `[::1]:80` although `127.0.0.1:80` was passed. The
    /// address of a Unix listener is its path, or its abstract name after a zero byte. A TCP
    /// listener on all addresses also matches requests that name only its port. The call makes a
    /// UDP socket non-blocking, and with round robin also a listener.
    ///
    /// If another master opened the socket for port 0 and passed it under its
    /// [name](MasterListener::name), workers receive the socket if they request port 0.
    ///
    /// The scheduling policy cannot change after this call. With the sharded policy, workers share
    /// the socket, because the process that opened it may not have allowed other sockets on its
    /// port.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Descriptor`] if the descriptor is none of these sockets, and
    /// [`Error::Listen`] if the socket cannot be used, for instance because it has no address.
    /// Returns [`Error::ForeignProcess`] in a process that did not create the master.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master, passed: Vec<cluster::systemd::ListenFd>) -> cluster::Result<()> {
    /// let mut sockets = Vec::new();
    /// for passed in passed {
    ///     sockets.push(master.adopt(passed)?);
    /// }
    /// # Ok(()) }
    /// ```
    pub fn adopt(&self, passed: ListenFd) -> Result<MasterListener> {
        self.event_loop.check_own()?;
        let kind = passed.kind()?;
        let name = passed.name().map(str::to_owned);
        let socket = OwnedFd::from(passed);
        let address = format!("descriptor {}", socket.as_raw_fd());
        match self.shell.adopt(kind, socket, name, BACKLOG) {
            Ok(retained) => Ok(MasterListener::new(&self.shell, retained)),
            Err(reason) => Err(Error::Listen {
                address,
                reason,
                occupied_by: None,
            }),
        }
    }

    /// Retains all listeners and UDP sockets that are open for workers, and returns them. The
    /// result includes sockets that were opened for a worker's request. It does not include
    /// descriptors that a worker has requested by number ([`ListenOptions::fd`]), because they
    /// belong to the application.
    ///
    /// Node has no counterpart.
    ///
    /// Use this method to pass all sockets to a new master, as
    /// [`Pool::upgrade`](crate::pool::Pool::upgrade) does.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> Result<(), Box<dyn std::error::Error>> {
    /// use std::os::fd::AsFd;
    /// use cluster::Settings;
    ///
    /// let sockets = master.retain_all();
    /// let mut passed = Vec::new();
    /// for socket in &sockets {
    ///     passed.push((socket.name(), socket.as_fd().try_clone_to_owned()?));
    /// }
    /// master.fork_as(Settings::default().detached(true).listen_fds(passed))?;
    /// # Ok(()) }
    /// ```
    #[must_use = "the sockets are released when the values are dropped"]
    pub fn retain_all(&self) -> Vec<MasterListener> {
        if self.event_loop.check_own().is_err() {
            return Vec::new();
        }
        let retained = self.shell.retain_all().into_iter();
        let listeners = retained.map(|retained| MasterListener::new(&self.shell, retained));
        listeners.collect()
    }

    /// Retains the socket that the request contains. If the request contains an address instead,
    /// retains the listener on this address, and opens the listener if necessary. If the address
    /// resolves to several, uses the first on which the master can listen.
    fn open(&self, bind_request: &mut BindRequest) -> io::Result<RetainedListener> {
        bind_request.check_for_master()?;
        if let Some(socket) = bind_request.take_socket() {
            let backlog = bind_request.flags.backlog;
            let retained = self.shell.adopt(bind_request.kind, socket, None, backlog)?;
            let mut core = self.shell.core.borrow_mut();
            core.set_parking(retained.handle, bind_request.flags.parking);
            return Ok(retained);
        }
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for endpoint in bind_request.resolve()? {
            match self.shell.listen(&endpoint, &bind_request.flags) {
                Ok(retained) => return Ok(retained),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

impl MasterListener {
    pub(super) fn new(master: &Rc<MasterShell>, retained: RetainedListener) -> Self {
        let master = Rc::downgrade(master);
        Self { master, retained }
    }

    /// Returns the address to which clients connect. If port 0 was requested, the address contains
    /// the port that the kernel chose.
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

    /// Returns the name under which to pass the listener to another master with
    /// [`Settings::listen_fds`](crate::Settings::listen_fds()). If the listener was itself passed
    /// to this process with a name, the result is that name. After the master has been dropped, the
    /// result is empty.
    ///
    /// Node has no counterpart.
    ///
    /// If this listener was opened for port 0, the name says so. The other master's workers then
    /// receive the listener when they request port 0, as this master's workers do.
    ///
    /// See [`Master::retain_all`](crate::Master::retain_all) for an example.
    #[must_use]
    pub fn name(&self) -> String {
        let master = self.master.upgrade();
        let name = master.map(|master| master.name_of(self.retained.handle));
        name.unwrap_or_default()
    }

    /// Returns whether a worker or the application has requested the listener's address. The result
    /// is `false` for a socket that was passed to this process and that has not been used yet, and
    /// after the master has been dropped.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// # fn f(mut inherited: Vec<cluster::MasterListener>) {
    /// // The new release does not use these addresses.
    /// inherited.retain(|listener| listener.is_requested());
    /// # }
    /// ```
    #[must_use]
    pub fn is_requested(&self) -> bool {
        let master = self.master.upgrade();
        master.is_some_and(|master| master.is_requested(self.retained.handle))
    }

    /// Returns whether a process outside the cluster may have a copy of the socket. After the
    /// master has been dropped, the result is `false`.
    ///
    /// Node has no counterpart.
    ///
    /// See [`set_foreign_copies`](Self::set_foreign_copies) for an example.
    #[must_use]
    pub fn has_foreign_copies(&self) -> bool {
        let master = self.master.upgrade();
        master.is_some_and(|master| master.has_foreign_copies(self.retained.handle))
    }

    /// Sets whether a process outside the cluster may have a copy of the socket. By default, a copy
    /// may exist if the socket was passed to this process, or after a call of
    /// [`as_fd`](AsFd::as_fd).
    ///
    /// Node has no counterpart.
    ///
    /// Set `may_exist` to `false` when the last other process with a copy has exited. The master
    /// then drains and closes the listener as if only this cluster had ever had it. If another
    /// process still has a copy, that process receives no more connections after the listener has
    /// closed here. After a later call of `as_fd`, the master assumes again that a copy may exist.
    /// The call has no effect after the master has been dropped.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master, inherited: cluster::MasterListener) {
    /// // The old master, which passed this listener, has exited.
    /// assert!(inherited.has_foreign_copies());
    /// inherited.set_foreign_copies(false);
    /// # }
    /// ```
    pub fn set_foreign_copies(&self, may_exist: bool) {
        if let Some(master) = self
            .master
            .upgrade()
            .filter(|master| master.check_own().is_ok())
        {
            master.set_foreign_copies(self.retained.handle, may_exist);
        }
    }

    /// Returns whether this process removes the file of a Unix socket when the listener closes.
    /// After the master has been dropped, the result is `false`.
    ///
    /// Node has no counterpart.
    ///
    /// See [`set_removes_file`](Self::set_removes_file) for an example.
    #[must_use]
    pub fn removes_file(&self) -> bool {
        let master = self.master.upgrade();
        master.is_some_and(|master| master.removes_file(self.retained.handle))
    }

    /// Returns whether the path of a Unix socket no longer leads to the socket, so that no client can
    /// connect. The file may have been removed or replaced, or a symbolic link to a directory in the
    /// path may have been switched.
    ///
    /// Node has no counterpart.
    ///
    /// The result is `false` for other kinds of listeners, if this process does not remove the file
    /// ([`removes_file`](Self::removes_file)), and after the master has been dropped.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) -> cluster::Result<()> {
    /// use std::path::Path;
    ///
    /// let listener = master.listen(Path::new("app.sock"))?;
    /// std::fs::remove_file("app.sock").ok();
    /// assert!(listener.has_lost_path());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn has_lost_path(&self) -> bool {
        let master = self.master.upgrade();
        master.is_some_and(|master| master.has_lost_path(self.retained.handle))
    }

    /// Sets whether this process removes the file of a Unix socket when the listener closes. By
    /// default, the process removes the file unless the socket was passed to this process.
    ///
    /// Node has no counterpart.
    ///
    /// If a successor takes over the listener, set `removes` to false here, and let the successor
    /// remove the file. The call has no effect on other kinds of listeners, or after the master has
    /// been dropped.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Io`] if `removes` is true and the system cannot find the file, for instance
    /// because the file does not exist or no descriptor is free.
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

/// Gives access to the listening socket, which can be passed to another process.
///
/// After a call, the master assumes that another process may have a copy, until
/// [`set_foreign_copies`](MasterListener::set_foreign_copies) says otherwise.
///
/// With the sharded policy, this socket is only the first of several shards. When the value is
/// dropped and the last workers disconnect, all new connections go to this shard. No process can
/// attach a SYN filter to the shard, because the master has locked its filter.
impl AsFd for MasterListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        if let Some(master) = self.master.upgrade() {
            master.set_foreign_copies(self.retained.handle, true);
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
