//! The sockets that are bound for workers: binding, accepting, sharing and closing them.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::rc::Rc;

use super::MasterShell;
use crate::core::master::{ACCEPT_BATCH, Ownership};
use crate::master::passed_name;
use crate::master::shard_group::{Reset, ShardGroup};
use crate::runtime::token::Token;
use crate::sys;
use crate::sys::bind::{BoundSocket, adopt_socket, bind};
use crate::sys::listen::PortSharing;
use crate::sys::poll::{Interest, Registered};
use crate::sys::socket_file::SocketFile;
use crate::types::address::Address;
use crate::types::endpoint::{BindAddress, BindFlags, Endpoint, Kind};
use crate::types::errno;
use crate::types::handle::HandleId;
use crate::types::policy::SchedulingPolicy;
use crate::types::worker_id::WorkerId;

/// A socket that is bound for workers, or all shards of a sharded listener.
#[derive(Debug)]
pub(super) struct MasterSocket {
    is_unix: bool,
    /// The name with which the socket was passed to this process, if any.
    name: Option<String>,
    /// The socket's file. The field is declared before `sockets` so that the file is removed before
    /// the sockets close. Another process that notices the close can then bind the path at once.
    pub(super) file: Option<SocketFile>,
    /// The socket, or all shards if the listener is sharded.
    pub(super) sockets: Vec<Rc<Registered<OwnedFd>>>,
    /// The group of the shards. `None` if the listener is not sharded, or if the selector could not
    /// be created.
    pub(super) group: Option<ShardGroup>,
    /// The address with the actual port. `None` for a Unix socket.
    address: Option<SocketAddr>,
    backlog: u32,
}

impl MasterSocket {
    fn get(&self, shard: usize) -> io::Result<&Rc<Registered<OwnedFd>>> {
        let socket = self.sockets.get(shard);
        socket.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// A socket to be added to the table.
struct NewSocket {
    bound: BoundSocket,
    is_unix: bool,
    name: Option<String>,
    group: Option<ShardGroup>,
}

/// A listener or UDP socket that the application retains.
#[derive(Debug)]
pub(crate) struct RetainedListener {
    pub(crate) handle: HandleId,
    pub(crate) address: Address,
    /// The socket, or the first shard if the listener is sharded.
    pub(crate) socket: Rc<Registered<OwnedFd>>,
}

// Opening listeners.
impl MasterShell {
    pub(super) fn bind_for_worker(
        &self,
        handle: HandleId,
        endpoint: &Endpoint,
        flags: &BindFlags,
        policy: SchedulingPolicy,
    ) {
        let result = self.bind(handle, endpoint, flags, policy);
        let result = result.map_err(|error| errno::errno_of(&error));
        self.core.borrow_mut().bound(handle, result);
    }

    pub(super) fn bind_shard_for_worker(
        &self,
        handle: HandleId,
        flags: &BindFlags,
        worker: WorkerId,
        request: u32,
    ) {
        let result = self.bind_shard(handle, flags);
        let result = result.map_err(|error| errno::errno_of(&error));
        let mut core = self.core_now();
        core.shard_bound(handle, worker, request, result);
    }

    fn bind(
        &self,
        handle: HandleId,
        endpoint: &Endpoint,
        flags: &BindFlags,
        policy: SchedulingPolicy,
    ) -> io::Result<Option<SocketAddr>> {
        if let BindAddress::Fd(number) = endpoint.address {
            let listeners = self.sockets.borrow();
            let mut sockets = listeners.values().flat_map(|own| &own.sockets);
            if sockets.any(|own| own.as_fd().as_raw_fd() == number) {
                // The descriptor is one of the master's own sockets. The application did not open
                // it and must not name it.
                return Err(io::Error::from_raw_os_error(errno::EBADF));
            }
        }
        let is_sharded = policy == SchedulingPolicy::Sharded;
        let sharing = match is_sharded {
            true => PortSharing::Create,
            false => PortSharing::Exclusive,
        };
        let bound = bind(endpoint, flags, sharing)?;
        // Make the socket block, because workers that block in `accept` take strict turns. A
        // borrowed descriptor stays non-blocking, because other processes may also use it.
        let blocks = policy != SchedulingPolicy::RoundRobin && endpoint.kind != Kind::Udp;
        if blocks && !endpoint.is_borrowed() {
            sys::fd::set_nonblocking(bound.socket.as_fd(), false)?;
        }
        // If the selector cannot be created, continue without one. `select_shards` then selects
        // through the first shard. If the kernel supports no selection, it chooses a shard by a
        // hash, and `select_shards` reports an error.
        let group = is_sharded.then(|| ShardGroup::new(&bound.socket, flags, &self.poller, handle));
        let socket = NewSocket {
            bound,
            is_unix: endpoint.kind == Kind::Unix,
            name: None,
            group: group.and_then(Result::ok),
        };
        self.add_socket(handle, socket, flags.backlog)
    }

    fn add_socket(
        &self,
        handle: HandleId,
        new: NewSocket,
        backlog: u32,
    ) -> io::Result<Option<SocketAddr>> {
        let BoundSocket {
            file,
            socket,
            address,
        } = new.bound;
        let key = Token::Listener(handle.0).key();
        let socket = self.poller.add(socket, key, None)?;
        let bound = MasterSocket {
            is_unix: new.is_unix,
            name: new.name,
            file,
            sockets: vec![Rc::new(socket)],
            group: new.group,
            address,
            backlog,
        };
        self.sockets.borrow_mut().insert(handle, bound);
        Ok(address)
    }

    /// Binds one more shard to the address of the first shard.
    fn bind_shard(&self, handle: HandleId, flags: &BindFlags) -> io::Result<()> {
        let mut sockets = self.sockets.borrow_mut();
        let listener = sockets.get_mut(&handle).ok_or(io::ErrorKind::NotFound)?;
        let address = sys::listen::local_addr(listener.get(0)?);
        let address = address.ok_or(io::ErrorKind::AddrNotAvailable)?;
        let socket = sys::listen::listen_tcp(&address, flags, PortSharing::Join)?;
        sys::fd::set_nonblocking(socket.as_fd(), false)?;
        if let Some(group) = &mut listener.group {
            sys::filter::lock_filter(&socket)?;
            group.add(listener.sockets.len());
        }
        let key = Token::Listener(handle.0).key();
        let socket = self.poller.add(socket, key, None)?;
        listener.sockets.push(Rc::new(socket));
        Ok(())
    }

    /// Retains the listener on `endpoint` until `release`. If no listener on it is open, opens one
    /// first.
    pub(crate) fn listen(
        &self,
        endpoint: &Endpoint,
        flags: &BindFlags,
    ) -> io::Result<RetainedListener> {
        // Carry out pending actions first, because a worker may have just requested the same
        // endpoint.
        self.act();
        let mut core = self.core_now();
        if let Some(handle) = core.retain(endpoint) {
            core.set_parking(handle, flags.parking);
            drop(core);
            self.act();
            return self.retained(handle);
        }
        let (handle, policy) = (core.next_handle(), core.policy_of(endpoint));
        drop(core);
        let address = self.bind(handle, endpoint, flags, policy)?;
        let mut core = self.core_now();
        core.retained(handle, endpoint.clone(), address, policy);
        core.set_parking(handle, flags.parking);
        drop(core);
        self.act();
        self.retained(handle)
    }

    /// Adds a socket that was passed to this process, and retains it.
    pub(crate) fn adopt(
        &self,
        kind: Kind,
        socket: OwnedFd,
        name: Option<String>,
        backlog: u32,
    ) -> io::Result<RetainedListener> {
        let endpoint = adopt_socket(kind, &socket, backlog)?;
        self.act();
        let mut core = self.core_now();
        let handle = core.next_handle();
        // Do not change the mode of a listener from which the master does not accept. Another
        // process with a copy, such as a program that does not use this crate, may block in
        // `accept`. If the listener became non-blocking, that `accept` would fail.
        if kind == Kind::Udp || core.policy_of(&endpoint) == SchedulingPolicy::RoundRobin {
            sys::fd::set_nonblocking(socket.as_fd(), true)?;
        }
        drop(core);
        let bound = BoundSocket {
            file: None,
            address: endpoint.socket_addr(),
            socket,
        };
        let endpoint = passed_name::requested(name.as_deref(), endpoint);
        let socket = NewSocket {
            bound,
            is_unix: kind == Kind::Unix,
            name,
            group: None,
        };
        let address = self.add_socket(handle, socket, backlog)?;
        self.core_now().adopted(handle, endpoint, address);
        self.act();
        self.retained(handle)
    }

    /// Retains every listener and UDP socket that is open for new workers, except borrowed
    /// descriptors.
    pub(crate) fn retain_all(&self) -> Vec<RetainedListener> {
        self.act();
        let handles = self.core_now().retain_all();
        let retained = handles.into_iter().map(|handle| self.retained(handle));
        retained.filter_map(Result::ok).collect()
    }

    fn retained(&self, handle: HandleId) -> io::Result<RetainedListener> {
        let sockets = self.sockets.borrow();
        let listener = sockets.get(&handle).ok_or(io::ErrorKind::NotFound)?;
        let address = self.core.borrow().address_of(handle);
        Ok(RetainedListener {
            handle,
            address: address.ok_or(io::ErrorKind::NotFound)?,
            socket: Rc::clone(listener.get(0)?),
        })
    }
}

// Retained listeners.
impl MasterShell {
    /// Returns the name under which to pass the listener to another master.
    pub(crate) fn name_of(&self, handle: HandleId) -> String {
        let sockets = self.sockets.borrow();
        let passed = sockets.get(&handle).and_then(|own| own.name.clone());
        // An empty name cannot be passed on (see `Settings::listen_fds`).
        let passed = passed.filter(|name| !name.is_empty());
        let core = self.core.borrow();
        let generated = || core.endpoint_of(handle).map(passed_name::name_of);
        passed.unwrap_or_else(|| generated().unwrap_or_default().to_owned())
    }

    pub(crate) fn removes_file(&self, handle: HandleId) -> bool {
        let sockets = self.sockets.borrow();
        let listener = sockets.get(&handle);
        let file = listener.and_then(|listener| listener.file.as_ref());
        file.is_some_and(SocketFile::is_in_place)
    }

    pub(crate) fn has_lost_path(&self, handle: HandleId) -> bool {
        let path = self.core.borrow().path_of(handle);
        let sockets = self.sockets.borrow();
        let file = sockets
            .get(&handle)
            .and_then(|listener| listener.file.as_ref());
        file.zip(path)
            .is_some_and(|(file, path)| !file.is_at(&path))
    }

    pub(crate) fn set_removes_file(&self, handle: HandleId, removes: bool) -> io::Result<()> {
        let path = self.core.borrow().path_of(handle);
        let mut sockets = self.sockets.borrow_mut();
        let (Some(listener), Some(path)) = (sockets.get_mut(&handle), path) else {
            return Ok(());
        };
        if !removes {
            listener
                .file
                .take()
                .into_iter()
                .for_each(SocketFile::persist);
        } else if listener.file.is_none() {
            listener.file = Some(SocketFile::inherit(&path)?);
        }
        Ok(())
    }

    pub(crate) fn has_foreign_copies(&self, handle: HandleId) -> bool {
        !self.core.borrow().is_sole(handle)
    }

    pub(crate) fn set_foreign_copies(&self, handle: HandleId, may_exist: bool) {
        let ownership = match may_exist {
            true => Ownership::Joint,
            false => Ownership::Sole,
        };
        self.core.borrow_mut().set_ownership(handle, ownership);
    }

    pub(crate) fn is_requested(&self, handle: HandleId) -> bool {
        self.core.borrow().is_requested(handle)
    }

    /// Releases a retained listener.
    pub(crate) fn release(&self, handle: HandleId) {
        if self.poller.is_own() {
            self.core_now().release(handle);
            self.act();
        } else {
            // In a forked child, only close this process's copies of the sockets.
            drop(self.sockets.borrow_mut().remove(&handle));
        }
    }
}

// Accepting connections, and recovering from shutdowns.
impl MasterShell {
    /// Handles a listener that the poller has reported as readable or as hung up.
    pub(crate) fn listener_ready(&self, handle: HandleId) {
        if self.core.borrow().master_accepts(handle) {
            return self.core_now().readable(handle);
        }
        let stopped: Vec<_> = match self.sockets.borrow().get(&handle) {
            Some(listener) => {
                let sockets = listener.sockets.iter().enumerate();
                let has_hung_up = |fd| sys::poll::has_hung_up(fd).unwrap_or(true);
                let stopped = sockets.filter(|(_, socket)| has_hung_up(socket.as_fd()));
                stopped.map(|(shard, _)| shard).collect()
            }
            None => return,
        };
        for shard in stopped {
            let outcome = self.listen_again(handle, shard);
            self.core_now().shut_down_by_other(handle, outcome);
        }
        self.act();
    }

    /// Makes a listener, or one of its shards, listen again after another process has shut it down.
    ///
    /// The poller does not report the listener again until `watch_hang_up` or, if the master
    /// accepts, `set_interest` is called. This pause limits the cost of a process that shuts the
    /// listener down repeatedly.
    fn listen_again(&self, handle: HandleId, shard: usize) -> io::Result<()> {
        let mut sockets = self.sockets.borrow_mut();
        let listener = sockets.get_mut(&handle).ok_or(io::ErrorKind::NotFound)?;
        let socket = Rc::clone(listener.get(shard)?);
        socket.set_interest(None)?;
        // The kernel does not let a Unix socket listen again.
        let address = listener.address.ok_or(io::ErrorKind::Unsupported)?;
        sys::listen::listen_again(&socket, &address, listener.backlog)?;
        if let Some(group) = &mut listener.group {
            group.readd(shard);
        }
        Ok(())
    }

    pub(super) fn watch_hang_up(&self, handle: HandleId) {
        let sockets = self.sockets.borrow();
        let sockets = sockets.get(&handle).into_iter();
        for socket in sockets.flat_map(|listener| &listener.sockets) {
            if let Err(source) = socket.watch_hang_up() {
                self.report_io("watch a listener", source);
            }
        }
    }

    /// Closes connections that have reached a sharded listener's selector, and notifies the core.
    /// Connections reach the selector if another process has detached the BPF program or shut a
    /// shard down, or if their handshakes complete while the listener is draining.
    pub(crate) fn selector_ready(&self, handle: HandleId) {
        let sockets = self.sockets.borrow();
        let group = sockets.get(&handle).and_then(|own| own.group.as_ref());
        let reset = group.map(|group| group.reset(ACCEPT_BATCH));
        drop(sockets);
        let Reset { count, failure } = reset.unwrap_or_default();
        let mut core = self.core_now();
        core.misdirected(handle, count);
        if let Some(reason) = failure {
            core.selector_failed(handle, reason);
        }
        drop(core);
        self.act();
    }

    pub(super) fn set_interest(&self, handle: HandleId, interest: Option<Interest>) {
        if let Some(listener) = self.sockets.borrow().get(&handle) {
            let socket = listener.get(0);
            if let Err(source) = socket.and_then(|socket| socket.set_interest(interest)) {
                self.report_io("watch a listener", source);
            }
        }
    }

    pub(super) fn accept(&self, handle: HandleId, at_most: u64) {
        let sockets = self.sockets.borrow();
        let listener = sockets.get(&handle).map(|own| own.get(0));
        let Some(Ok(socket)) = listener else {
            return;
        };
        let mut core = self.core.borrow_mut();
        let is_sole = core.is_sole(handle);
        if !is_sole {
            // Make the listener non-blocking again, because another process may have made it
            // blocking, and `accept` would wait. The call cannot fail, because the descriptor is
            // open.
            let _ = sys::fd::set_nonblocking(socket.as_fd(), true);
        }
        for _ in 0..at_most {
            let accepted = match is_sole {
                true => sys::listen::accept(&***socket),
                false => sys::listen::accept_if_ready(&***socket),
            };
            match accepted {
                Ok(stream) => {
                    if core.holds_new(handle) {
                        self.check_surplus(&mut core);
                    }
                    core.accepted(handle, stream.into());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return core.backlog_emptied(handle);
                }
                Err(error) if sys::listen::is_shutdown_error(&error) && core.is_ending(handle) => {
                    return core.backlog_emptied(handle);
                }
                Err(error)
                    if sys::listen::is_shutdown_error(&error) && !core.is_borrowed(handle) =>
                {
                    drop((core, sockets));
                    let outcome = self.listen_again(handle, 0);
                    return self.core_now().shut_down_by_other(handle, outcome);
                }
                Err(error) if sys::listen::is_connection_error(&error) => {}
                Err(error) => return core.accept_failed(handle, error),
            }
        }
        core.accept_done(handle);
    }
}

// Sharing listeners with workers.
impl MasterShell {
    /// Returns a copy of a listener, or of one of its shards, for a worker.
    pub(super) fn share(&self, handle: HandleId, shard: usize) -> io::Result<OwnedFd> {
        match self.sockets.borrow().get(&handle) {
            Some(listener) => listener.get(shard)?.try_clone(),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Returns a copy of a shard, and makes the shard block. `unblock` may have made the shard
    /// non-blocking for the worker that had it earlier.
    pub(super) fn share_shard(&self, handle: HandleId, shard: usize) -> io::Result<OwnedFd> {
        let copy = self.share(handle, shard)?;
        sys::fd::set_nonblocking(copy.as_fd(), false)?;
        Ok(copy)
    }

    pub(super) fn defer_accept(&self, handle: HandleId, seconds: u32) {
        if let Some(listener) = self.sockets.borrow().get(&handle) {
            for socket in &listener.sockets {
                sys::listen::defer_accept(socket, seconds);
            }
        }
    }

    pub(super) fn select_shards(&self, handle: HandleId, shards: &[usize]) {
        let sockets = self.sockets.borrow();
        let Some(listener) = sockets.get(&handle) else {
            return;
        };
        let selected = match &listener.group {
            Some(group) => group.select(shards),
            None => listener
                .get(0)
                .and_then(|own| sys::filter::select_sockets(own, shards)),
        };
        if let Err(source) = selected {
            if sys::socket::is_exhaustion(&source) {
                self.core_now().select_later(handle);
            }
            self.report_io("select the shards for new connections", source);
        }
    }

    /// Makes `accept` on the listener, or on one of its shards, return at once in all processes.
    pub(super) fn unblock(&self, handle: HandleId, shard: Option<usize>) {
        if let Some(listener) = self.sockets.borrow().get(&handle) {
            let all = listener.sockets.iter().enumerate();
            let chosen = all.filter(|(at, _)| shard.is_none_or(|shard| *at == shard));
            for (_, socket) in chosen {
                // The call cannot fail, because the descriptor is open.
                let _ = sys::fd::set_nonblocking(socket.as_fd(), true);
            }
        }
    }
}

// Closing listeners.
impl MasterShell {
    pub(super) fn remove_file(&self, handle: HandleId) {
        if let Some(listener) = self.sockets.borrow_mut().get_mut(&handle) {
            listener.file = None;
        }
    }

    /// Keeps new connections out of the backlog: drops requests for new TCP connections, and shuts
    /// a Unix socket down. If the system does not support SYN filters, TCP connections still arrive
    /// while the backlog is being emptied.
    pub(super) fn attach_syn_filter(&self, handle: HandleId) {
        if let Some(listener) = self.sockets.borrow().get(&handle) {
            if let Some(group) = &listener.group {
                let _ = group.ignore();
                return;
            }
            for socket in &listener.sockets {
                if listener.is_unix {
                    sys::listen::shut_down(socket);
                } else {
                    let _ = sys::filter::attach_syn_filter(socket);
                }
            }
        }
    }

    pub(super) fn detach_syn_filter(&self, handle: HandleId) {
        if let Some(listener) = self.sockets.borrow().get(&handle) {
            if let Some(group) = &listener.group {
                let _ = group.admit();
                return;
            }
            for socket in &listener.sockets {
                let _ = sys::filter::detach_syn_filter(socket);
            }
        }
    }

    /// Shuts the listener down in all processes that have a copy.
    pub(super) fn stop_listening(&self, handle: HandleId) {
        if let Some(listener) = self.sockets.borrow().get(&handle) {
            for socket in &listener.sockets {
                sys::listen::shut_down(socket);
            }
        }
    }

    pub(super) fn unbind(&self, handle: HandleId) {
        self.sockets.borrow_mut().remove(&handle);
    }
}
