//! The processes and descriptors of an upgrade, in which a new master takes over from an old
//! master.
//!
//! The old master starts the new master and passes copies of its sockets and one end of a channel
//! by the protocol with which systemd passes sockets. Both masters then accept connections from the
//! same sockets. When the new master has had a quorum for `min_ready_time`, it writes a byte to the
//! channel. The old master then passes its parked connections over the channel, and its pool stops.
//! If the new master exits early or misses the deadline, the upgrade fails and the old master
//! continues. The old master first shuts down its reading direction, so that the new master can no
//! longer write the byte.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use cluster::systemd::ListenFd;
use cluster::{
    Error, Interest, Master, Result, Settings, Signal, SpawnOptions, TimerId, WorkerId,
    WorkerProcess,
};

use super::event::{PoolEvent, UpgradeFailure};
use super::passed_values::PassedValues;
use super::sockets::PassedSocket;
use super::status::StatusSocket;
use super::systemd::NOTIFY_SOCKET;
use super::{Pool, PoolListener};

/// The descriptor name of the channel to the old master.
///
/// The old master writes one byte for each socket to the channel (see [`PassedSocket`]), and then
/// the fields of a [`PassedValues`]. Once the new master has taken over, the old master passes its
/// parked connections ([`Master::pass_parked`]). The old master keeps its end open until it exits,
/// or until its pool is stopped at once.
const CHANNEL: &str = "cluster-predecessor";

/// The byte with which a new master reports that it has taken over. The new master writes nothing
/// else, so the old master accepts any byte.
const TOOK_OVER: u8 = b'S';

/// The old master's channel and this process's takeover state, in a process that has not yet taken
/// over.
#[derive(Debug)]
pub(super) struct OldMaster {
    channel: UnixStream,
    /// The indexes, in `Inner::listeners`, of the listeners whose socket files this process
    /// inherits.
    inherits_files: Vec<usize>,
    /// The timer that runs while the pool has a quorum. When it fires, this process takes over.
    takeover_timer: Option<TimerId>,
}

/// A new master that this process has started and that has not exited.
pub(super) struct NewMaster {
    pub(super) process: WorkerProcess,
    channel: Rc<UnixStream>,
    /// A copy of the channel for the parked connections. `None` after the new master has taken
    /// over.
    passing: Option<UnixStream>,
}

// The new master's side of an upgrade.
impl Pool {
    /// Adopts the sockets that systemd, or the old master of an [upgrade](Self::upgrade), has
    /// passed to this process. Like the listeners of [`listen`](Self::listen), adopted sockets stay
    /// open until the pool stops, except unused sockets after an upgrade.
    ///
    /// Node has no counterpart.
    ///
    /// Workers share the listeners by listening on the same addresses, and the UDP sockets by
    /// binding the same addresses. Call `adopt` before `listen`, so that `listen` reuses an adopted
    /// listener instead of opening a new one.
    ///
    /// After an upgrade, the new release may not use all sockets of the old release. The pool waits
    /// until the old master has exited and all workers are ready. With
    /// [`Readiness::Online`](super::Readiness::Online) or
    /// [`Readiness::Alive`](super::Readiness::Alive), the pool also waits until each worker that has
    /// called [`init`](cluster::init()) listens. It then closes each socket whose address neither a
    /// worker nor [`listen`](Self::listen) has requested. The kernel resets the clients in the
    /// socket's backlog, and the file of a Unix socket is removed. If a worker requests the address
    /// later, the master opens a new socket. Sockets that systemd has passed stay open.
    ///
    /// If the old pool was [scaled](Self::scale) to a number of slots other than its
    /// [`PoolOptions::workers`](super::PoolOptions::workers), this pool receives the same number of
    /// slots. If the old pool was scaled to 0 slots, this pool uses its own options, because it
    /// could not take over without workers.
    ///
    /// A Unix socket of the old master whose path no longer leads to it is closed, because no client
    /// can connect to it. The next `listen` binds the path again.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`Master::adopt`]. If a descriptor cannot be adopted, the pool
    /// still adopts all others and returns the first error. Also returns [`Error::Io`] if the
    /// channel to the old master is broken. In this case, the pool adopts nothing.
    ///
    /// ```no_run
    /// # use cluster::pool::{Pool, PoolOptions};
    /// use cluster::{Role, systemd};
    ///
    /// # fn main() -> cluster::Result<()> {
    /// let passed = systemd::listen_fds()?;
    /// if let Role::Master(master) = cluster::init()? {
    ///     let pool = Pool::new(&master, PoolOptions::default());
    ///     pool.adopt(&master, passed)?;
    ///     pool.listen(&master, "127.0.0.1:8000")?;
    /// }
    /// # Ok(()) }
    /// ```
    pub fn adopt(&self, master: &Master, mut passed: Vec<ListenFd>) -> Result<()> {
        let is_channel = |passed: &ListenFd| passed.name() == Some(CHANNEL);
        let channel = passed.iter().position(is_channel);
        let mut encoded = Vec::new();
        if let Some(channel) = channel.map(|index| passed.remove(index)) {
            encoded = self.connect_to_old_master(channel, passed.len())?;
        }
        let mut result = Ok(());
        for (index, passed) in passed.into_iter().enumerate() {
            let socket = encoded.get(index).copied().map(PassedSocket::decode);
            let PassedSocket {
                removes_file,
                is_own,
                is_status,
                has_lost_path,
            } = socket.unwrap_or_default();
            if has_lost_path {
                // No client can connect to the socket. The old master still serves its backlog, and
                // `listen` and `serve_status` bind the path again.
                continue;
            }
            if is_status {
                let socket = StatusSocket::passed(passed.into(), removes_file);
                match socket.map_err(Error::io("take over a status socket")) {
                    Ok(socket) => self.0.inherited_status_sockets.borrow_mut().push(socket),
                    Err(error) => result = result.and(Err(error)),
                }
                continue;
            }
            let listener = match master.adopt(passed) {
                Ok(listener) => listener,
                Err(error) => {
                    result = result.and(Err(error));
                    continue;
                }
            };
            let mut listeners = self.0.listeners.borrow_mut();
            let mut old_master = self.0.old_master.borrow_mut();
            if let Some(old_master) = old_master.as_mut().filter(|_| removes_file) {
                old_master.inherits_files.push(listeners.len());
            }
            listeners.push(PoolListener { listener, is_own });
        }
        result
    }

    /// Reads what the old master has written to the channel, and keeps the channel for the
    /// takeover. Returns the encoded properties of the sockets, one byte for each socket.
    fn connect_to_old_master(&self, channel: ListenFd, sockets: usize) -> Result<Vec<u8>> {
        let mut channel = UnixStream::from(OwnedFd::from(channel));
        let mut encoded = vec![0; sockets];
        // A non-blocking read is enough, because the old master wrote these bytes before it started
        // this process.
        let read = channel.set_nonblocking(true);
        let read = read.and_then(|()| channel.read_exact(&mut encoded));
        let passed = read.and_then(|()| read_passed_values(&mut channel));
        let passed = passed.map_err(Error::io("read from the old master"))?;
        self.0.core.borrow_mut().await_takeover();
        if let Some(slots) = passed.slots {
            // Change only the core and do not carry out its actions, because `adopt` must not fork.
            // The loop forks the workers in its next iteration.
            let now = self.now();
            self.0.core.borrow_mut().scale(slots.get(), now);
        }
        self.0.old_master.replace(Some(OldMaster {
            channel,
            inherits_files: Vec::new(),
            takeover_timer: None,
        }));
        Ok(encoded)
    }

    /// Restarts the takeover timer after the pool has reached its quorum. This process takes over
    /// if the pool keeps its quorum for `min_ready_time`.
    pub(super) fn restart_takeover_timer(&self, master: &Master) {
        self.stop_takeover_timer(master);
        if let Some(old_master) = self.0.old_master.borrow_mut().as_mut() {
            let pool = self.clone();
            let min_ready_time = self.0.core.borrow().options().min_ready_time;
            let take_over = move |master: &Master| pool.take_over(master);
            let timer = master.set_timeout(min_ready_time, take_over);
            old_master.takeover_timer = Some(timer);
        }
    }

    pub(super) fn stop_takeover_timer(&self, master: &Master) {
        if let Some(old_master) = self.0.old_master.borrow_mut().as_mut() {
            if let Some(timer) = old_master.takeover_timer.take() {
                master.clear_timer(timer);
            }
        }
    }

    fn take_over(&self, master: &Master) {
        // Check the quorum, because the pool may have lost it in this iteration of the loop. The
        // `QuorumLost` event, which stops the timer, is delivered only later.
        if !self.has_quorum() {
            return;
        }
        let Some(mut old_master) = self.0.old_master.take() else {
            return;
        };
        if old_master.channel.write_all(&[TOOK_OVER]).is_err() && is_connected(&old_master.channel)
        {
            // The old master has rejected this process, and sends SIGTERM. It continues to serve.
            self.0.old_master.replace(Some(old_master));
            return;
        }
        self.0.core.borrow_mut().took_over();
        let listeners = self.0.listeners.borrow();
        let indexes = old_master.inherits_files.into_iter();
        for inherited in indexes.filter_map(|index| listeners.get(index)) {
            // Ignore an error. Usually, the file has already been removed, so no client can connect
            // through it. After any other error (for example, if no descriptor is free), the file
            // merely remains when this master closes the socket.
            let _ = inherited.listener.set_removes_file(true);
        }
        drop(listeners);
        self.take_over_status(master);
        self.watch_exit_of_old_master(master, old_master.channel);
        self.emit(master, PoolEvent::TookOver);
    }

    /// Receives the old master's parked connections, and watches for its exit. The end-of-file on
    /// the channel means that the old master has exited, or that it has killed its workers and is
    /// about to exit ([`stop_at_once`](Self::stop_at_once)).
    fn watch_exit_of_old_master(&self, master: &Master, channel: UnixStream) {
        let pool = self.clone();
        let on_end = move |master: &Master| {
            pool.0.is_old_master_running.set(false);
            pool.other_master_exited(master);
        };
        self.0.is_old_master_running.set(true);
        // Ignore an error. The master then does not notice the old master's exit and continues to
        // treat the sockets as shared with another process. It does not drain the sockets when they
        // close. The old master's parked connections are closed.
        let _ = master.receive_parked(channel, on_end);
    }
}

/// Returns whether the old master has not exited. The channel must be non-blocking.
fn is_connected(mut channel: &UnixStream) -> bool {
    let read = channel.read(&mut [0]);
    read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// Reads the fields from the channel, which must be non-blocking.
fn read_passed_values(channel: &mut UnixStream) -> io::Result<PassedValues> {
    let mut bytes = Vec::new();
    match channel.read_to_end(&mut bytes) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => PassedValues::decode(&bytes),
    }
}

// The old master's side of an upgrade.
impl Pool {
    /// Starts a new master from the program's file, which may contain a new release. When the new
    /// master has taken over, this pool stops. No client is refused in the meantime.
    ///
    /// The new master receives a copy of every listener and UDP socket that this master holds for
    /// its workers, including those that only workers have opened. If the kernel chose a port, the
    /// new workers receive the same port when they request port 0. Of a sharded listener, the new
    /// master receives only the first shard, to which all new connections then go. The new workers
    /// share this shard, and the old workers serve the connections in the other shards. The new
    /// master does not receive private sockets of workers, descriptors that workers request by
    /// their numbers, and sockets that workers open after this call.
    ///
    /// Connections that workers have [parked](cluster::Connection::park) pass to the new master
    /// when it has taken over, and so do connections that this master's workers park while they
    /// drain. No idle connection is closed, unless the new master cannot hold it
    /// ([`Master::receive_parked`]).
    ///
    /// The new master runs this process's program with the same arguments. The path of the program
    /// is the default of [`Settings::exec`](Settings::exec()), so its symbolic links are resolved
    /// when the new master starts. If a script has executed the program and has passed its own path
    /// as `argv[0]` ([`Master::wrapper_script`]), the upgrade executes the script instead, as nginx
    /// does. The script then reads its configuration again, and receives the arguments of this
    /// process. It must execute the program without a fork, because the new master must have the
    /// process id of the script. Workers execute the program itself.
    ///
    /// The new master must call [`adopt`](Self::adopt) to receive this master's sockets. The new
    /// master forks its own workers.
    ///
    /// The new master takes over when it has had a [quorum](super::PoolOptions::quorum) for
    /// [`min_ready_time`](super::PoolOptions::min_ready_time). The upgrade then ends with
    /// [`PoolEvent::Upgraded`], and this pool stops. The upgrade fails if the new master exits,
    /// this pool stops, or the new master misses its deadline. The deadline is
    /// [`startup_timeout`](super::PoolOptions::startup_timeout) plus twice `min_ready_time` after
    /// the start. A failed upgrade ends with [`PoolEvent::UpgradeFailed`], and this pool continues
    /// unless it is stopping.
    ///
    /// If the upgrade fails while the new master is running, the new master receives SIGTERM. If
    /// the new master has not exited within [`drain_timeout`](super::PoolOptions::drain_timeout),
    /// the pool kills it. [`stop_at_once`](Self::stop_at_once) kills the new master immediately.
    ///
    /// Node has no counterpart.
    ///
    /// An upgrade changes the master's process id, so a master with process id 1 cannot upgrade. A
    /// master also cannot upgrade if its parent ends the service when the master exits, as the init
    /// process of some containers does. The pool does not detect such a parent. An application that
    /// upgrades must have only one pool. The new master's pool keeps the number of slots
    /// ([`adopt`](Self::adopt)). If an upgrade is in progress or the pool is stopping, nothing
    /// happens. If this master is itself a new master that has not taken over yet, the upgrade fails
    /// with [`UpgradeFailure::TakeoverPending`]. The
    /// [`stop_delay`](super::PoolOptions::stop_delay) is part of the stop.
    ///
    /// The new master is a [detached](Settings::detached()) process, so [`Master::workers`] does
    /// not contain it. As in nginx and gunicorn, the new master stays in this master's session
    /// and process group. A signal to the process group, such as SIGINT for Ctrl-C in a terminal,
    /// therefore reaches both masters.
    ///
    /// # Errors
    ///
    /// Returns [`Error::InitProcess`] if this process has the process id 1. Returns the same errors
    /// as [`Master::fork`]. Also returns [`Error::Io`] if the channel to the new master or a copy
    /// of a socket cannot be created, for instance because no descriptor is free.
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) -> cluster::Result<()> {
    /// pool.upgrade(master)?;
    /// # Ok(()) }
    /// ```
    pub fn upgrade(&self, master: &Master) -> Result<()> {
        let core = self.0.core.borrow();
        let (can_upgrade, awaits_takeover) = (core.can_upgrade(), core.awaits_takeover());
        drop(core);
        if awaits_takeover {
            let reason = UpgradeFailure::TakeoverPending;
            self.emit(master, PoolEvent::UpgradeFailed { reason });
        }
        if !can_upgrade {
            return Ok(());
        }
        if std::process::id() == 1 {
            return Err(Error::InitProcess);
        }
        // If the start has failed, release the sockets that `copy_sockets` has retained, because no
        // new master uses copies of them.
        self.start_new_master(master)
            .inspect_err(|_| self.other_master_exited(master))
    }

    fn start_new_master(&self, master: &Master) -> Result<()> {
        let created = UnixStream::pair().and_then(|(ours, theirs)| {
            // Copy the channel now, so that the parked connections can be passed later even if no
            // descriptor is free.
            let passing = ours.try_clone()?;
            Ok((ours, passing, theirs))
        });
        let created = created.map_err(Error::io("create a channel to a new master"))?;
        let (mut ours, passing, theirs) = created;
        let sockets = self.copy_sockets(master)?;
        let mut bytes: Vec<u8> = sockets
            .iter()
            .map(|socket| socket.properties.encode())
            .collect();
        let slots = self.0.core.borrow().handed_over_slots();
        bytes.extend(PassedValues { slots }.encode());
        // The channel has space for these bytes. Later reads must not wait.
        let written = ours.write_all(&bytes);
        let written = written.and_then(|()| ours.set_nonblocking(true));
        written.map_err(Error::io("write to a new master"))?;
        let sockets = sockets.into_iter().map(|socket| (socket.name, socket.fd));
        let channel = (CHANNEL.to_owned(), OwnedFd::from(theirs));
        let mut settings = Settings::default()
            .listen_fds([channel].into_iter().chain(sockets))
            .detached(true)
            // Keep the new master in this process group, so that a signal to the group stops both
            // masters.
            .setsid(false);
        if let Some(script) = master.wrapper_script() {
            settings = settings.exec(script);
        }
        // Pass these variables explicitly, because forked processes do not inherit them. The new
        // master needs them when it becomes the service's main process.
        let variables = [NOTIFY_SOCKET, "WATCHDOG_USEC"];
        let variables = variables.map(|name| Some((name, std::env::var_os(name)?)));
        let new_master =
            master.fork_as(SpawnOptions::new(settings).envs(variables.into_iter().flatten()))?;
        let started = NewMaster {
            process: new_master.clone(),
            channel: Rc::new(ours),
            passing: Some(passing),
        };
        self.watch_new_master(master, started)
            .inspect_err(|_| new_master.process().kill(Signal::KILL))
    }

    /// Watches the new master and reports its takeover and exit to the core.
    fn watch_new_master(&self, master: &Master, new_master: NewMaster) -> Result<()> {
        let pool = self.clone();
        let id = new_master.process.id();
        let on_readable = move |master: &Master, channel: &Rc<UnixStream>| {
            // Ignore end-of-file, because the new master's exit or the deadline ends the upgrade.
            if !matches!((&**channel).read(&mut [0]), Ok(1)) {
                return None;
            }
            pool.input(master, |core, now| core.new_master_took_over(id, now));
            // Keep the channel open, even if the upgrade has failed, because the new master treats
            // end-of-file as the exit of this process.
            Some(Interest::Readable)
        };
        let channel = Rc::clone(&new_master.channel);
        let watch = master.watch(channel, Interest::Readable, on_readable)?;
        master.unreference(watch);
        let pool = self.clone();
        new_master.process.on_exit(move |master, _, status| {
            pool.0.new_masters.borrow_mut().remove(&id);
            pool.input(master, |core, _| core.new_master_exited(id, status));
            pool.other_master_exited(master);
        });
        let mut new_masters = self.0.new_masters.borrow_mut();
        new_masters.insert(id, new_master);
        drop(new_masters);
        self.input(master, |core, now| core.new_master_started(id, now));
        Ok(())
    }

    /// Returns the process id of the new master that has taken over, if it has not exited.
    pub(super) fn new_main_process(&self) -> Option<u32> {
        let new_master = self.0.core.borrow().new_master()?;
        let new_masters = self.0.new_masters.borrow();
        Some(new_masters.get(&new_master)?.process.process().id())
    }

    /// Passes the parked connections to the new master, for at most `drain_timeout`.
    pub(super) fn pass_parked(&self, master: &Master, new_master: WorkerId) {
        let mut new_masters = self.0.new_masters.borrow_mut();
        let new_master = new_masters.get_mut(&new_master);
        let passing = new_master.and_then(|new_master| new_master.passing.take());
        drop(new_masters);
        if let Some(passing) = passing {
            let deadline = self.0.core.borrow().options().drain_timeout;
            // Ignore an error. This master then closes its parked connections when it exits.
            let _ = master.pass_parked(passing, deadline);
        }
    }

    /// Makes the master pass no further connections to the new master.
    pub(super) fn end_passing(&self, new_master: WorkerId) {
        if let Some(new_master) = self.0.new_masters.borrow().get(&new_master) {
            // Ignore an error, because it means that the new master has exited.
            let _ = new_master.channel.shutdown(Shutdown::Both);
        }
    }

    /// Leaves the listeners' socket files to the new master.
    pub(super) fn release_socket_files(&self) {
        let (listeners, others) = (self.0.listeners.borrow(), self.0.worker_sockets.borrow());
        let all = listeners.iter().chain(&*others);
        // The new master has bound the path of a socket that has lost it. This process removes the
        // file, which is elsewhere, at its end.
        for PoolListener { listener, .. } in all.filter(|own| !own.listener.has_lost_path()) {
            // Ignore the result. `set_removes_file(false)` fails only in a forked child of the
            // master, which does not run this code.
            let _ = listener.set_removes_file(false);
        }
    }

    /// Makes it impossible for a new master to take over. Returns whether it has taken over before.
    pub(super) fn end_takeover(&self, new_master: WorkerId) -> bool {
        let new_masters = self.0.new_masters.borrow();
        let Some(new_master) = new_masters.get(&new_master) else {
            return false;
        };
        let mut channel = &*new_master.channel;
        // After this call, the new master cannot write. A byte that it has written before can still
        // be read. Ignore an error, because it means that the new master has exited.
        let _ = channel.shutdown(Shutdown::Read);
        matches!(channel.read(&mut [0]), Ok(1))
    }

    /// Sends SIGTERM to a new master and keeps the loop running until the new master has exited.
    pub(super) fn terminate_new_master(&self, new_master: WorkerId) {
        self.end_takeover(new_master);
        if let Some(new_master) = self.0.new_masters.borrow().get(&new_master) {
            let process = new_master.process.process();
            process.reference();
            process.kill(Signal::TERM);
        }
    }
}
