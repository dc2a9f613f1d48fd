//! The master's hands: carries out what [`MasterCore`] decides, on real processes, channels and
//! listeners. Never calls the program.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Instant;

use crate::channel::{Channel, READ_SIZE, Received};
use crate::error::{Error, SendError};
use crate::event::Departure;
use crate::event_loop::Token;
use crate::frame::{HandleId, ToMaster, ToWorker};
use crate::master_core::{Action, MasterCore, With};
use crate::message::Message;
use crate::settings::{CHANNEL_FD, SchedulingPolicy, Settings, UNIQUE_ID};
use crate::signal::Signal;
use crate::sys;
use crate::sys::poll::{Interest, Poller, Registered};
use crate::sys::process::{Pid, Program};
use crate::worker_id::WorkerId;

/// How many connections may wait in the kernel's queue. Node: 511, too.
const BACKLOG: i32 = 511;

pub(crate) type Core = MasterCore<Rc<OwnedFd>>;

/// What is kept of a worker beside the core's knowledge.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) id: WorkerId,
    pub(crate) pid: Pid,
    /// `None` when it is closed.
    channel: RefCell<Option<Channel<ToMaster, ToWorker>>>,
    /// Readable when the process ends, where the kernel has such descriptors.
    process: RefCell<Option<Registered<OwnedFd>>>,
    /// Set when the worker has left the table.
    pub(crate) departure: Cell<Option<Departure>>,
}

#[derive(Debug)]
pub(crate) struct MasterShell {
    pub(crate) core: RefCell<Core>,
    poller: Poller,
    began: Instant,
    records: RefCell<BTreeMap<WorkerId, Rc<Record>>>,
    listeners: RefCell<BTreeMap<HandleId, Registered<TcpListener>>>,
    /// Channels that have something to write.
    unflushed: RefCell<BTreeSet<WorkerId>>,
    /// What channels read into.
    scratch: RefCell<Vec<u8>>,
}

impl MasterShell {
    /// Time is counted from `began`.
    pub(crate) fn new(policy: SchedulingPolicy, poller: Poller, began: Instant) -> Self {
        Self {
            core: RefCell::new(MasterCore::new(policy)),
            poller,
            began,
            records: RefCell::default(),
            listeners: RefCell::default(),
            unflushed: RefCell::default(),
            scratch: RefCell::new(vec![0; READ_SIZE]),
        }
    }

    /// The core, for a decision that is made now.
    pub(crate) fn decide(&self) -> RefMut<'_, Core> {
        let mut core = self.core.borrow_mut();
        core.set_time(self.began.elapsed());
        core
    }

    /// Starts a worker. Where the kernel has no descriptors for processes, `watch_children` makes
    /// the loop wake up for SIGCHLD.
    pub(crate) fn fork(
        &self,
        settings: &Settings,
        extra: impl IntoIterator<Item = (OsString, OsString)>,
        watch_children: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Rc<Record>> {
        let id = self.core.borrow().next_worker_id();
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let channel = Channel::new(ours, &self.poller, Token::Channel(id.get()).key())?;

        let mut env: BTreeMap<_, _> = std::env::vars_os().collect();
        env.extend(extra);
        env.insert(UNIQUE_ID.into(), id.to_string().into());
        env.insert(CHANNEL_FD.into(), theirs.as_raw_fd().to_string().into());
        let exec = settings.exec.clone().unwrap_or_default().into_os_string();
        let is_own = std::env::current_exe().is_ok_and(|own| own == *exec);
        let own_name = std::env::args_os().next().filter(|_| is_own);
        let name = own_name.unwrap_or_else(|| exec.clone());
        let args = std::iter::once(name).chain(settings.args.clone().unwrap_or_default());
        let pid = Program::new(exec, args, env)?.spawn(theirs.as_raw_fd())?;
        drop(theirs);

        let key = Token::Process(id.get()).key();
        let process = match pid.open() {
            Some(fd) => self.poller.add(fd, key, Some(Interest::Readable)).map(Some),
            None => watch_children().map(|()| None),
        };
        let process = process.inspect_err(|_| {
            // Nobody would notice its end.
            let _ = pid.signal(Signal::KILL.number());
            let _ = pid.wait();
        })?;
        self.core.borrow_mut().forked();
        let record = Rc::new(Record {
            id,
            pid,
            channel: RefCell::new(Some(channel)),
            process: RefCell::new(process),
            departure: Cell::new(None),
        });
        self.records.borrow_mut().insert(id, Rc::clone(&record));
        Ok(record)
    }

    /// The worker has left the table, and its last event has been delivered.
    pub(crate) fn forget(&self, worker: WorkerId) {
        self.records.borrow_mut().remove(&worker);
    }

    pub(crate) fn record(&self, worker: WorkerId) -> Option<Rc<Record>> {
        self.records.borrow().get(&worker).map(Rc::clone)
    }

    /// Runs `call` on the worker's channel, if it is open.
    fn with_channel<T>(
        &self,
        worker: WorkerId,
        call: impl FnOnce(&mut Channel<ToMaster, ToWorker>) -> T,
    ) -> Option<T> {
        let record = self.record(worker)?;
        let mut channel = record.channel.borrow_mut();
        channel.as_mut().map(call)
    }

    /// Tells the core the time, and which of the waiting clients have left meanwhile.
    pub(crate) fn tick(&self) {
        let mut core = self.core.borrow_mut();
        core.tick(self.began.elapsed());
        if core.anyone_waits() {
            core.sweep(|connection| sys::fd::is_hung_up(connection.as_fd()));
        }
    }

    /// Carries out everything that needs no callback.
    pub(crate) fn act(&self) {
        loop {
            let action = self.core.borrow_mut().next_action();
            match action {
                Some(action) => self.carry_out(action),
                None if self.unflushed.borrow().is_empty() => break,
                None => self.flush(),
            }
        }
    }

    fn carry_out(&self, action: Action<Rc<OwnedFd>>) {
        match action {
            Action::Send {
                worker,
                frame,
                with,
            } => {
                let fd = match (with, &frame) {
                    (With::Nothing, _) => None,
                    (With::Connection(connection), _) => Some(connection),
                    (With::Listener(handle), ToWorker::Reply { request, .. }) => {
                        match self.share(handle) {
                            Ok(listener) => Some(listener),
                            Err(error) => {
                                let errno = error.raw_os_error().unwrap_or(0);
                                let mut core = self.decide();
                                return core.share_failed(handle, worker, *request, errno);
                            }
                        }
                    }
                    (With::Listener(_), _) => None,
                };
                self.with_channel(worker, |channel| channel.queue(&frame, fd));
                self.unflushed.borrow_mut().insert(worker);
            }
            Action::Bind { handle, address } => {
                let result = self.bind(handle, address);
                let result = result.map_err(|error| error.raw_os_error().unwrap_or(0));
                self.core.borrow_mut().bound(handle, result);
            }
            Action::Watch { handle } => self.set_interest(handle, Some(Interest::Readable)),
            Action::Unwatch { handle } => self.set_interest(handle, None),
            Action::Accept { handle, at_most } => self.accept(handle, at_most),
            // Where it cannot be done, the backlog is emptied with the door open.
            Action::ShutDoor { handle } => {
                if let Some(listener) = self.listeners.borrow().get(&handle) {
                    let _ = sys::socket::shut_door(listener);
                }
            }
            Action::OpenDoor { handle } => {
                if let Some(listener) = self.listeners.borrow().get(&handle) {
                    let _ = sys::socket::open_door(listener);
                }
            }
            Action::Unbind { handle } => {
                self.listeners.borrow_mut().remove(&handle);
            }
            Action::CloseChannel { worker } => {
                self.with_channel(worker, Channel::shut);
                // Bounded by what the socket can hold, since nobody can write any more. What was
                // read before may be half of it. The events wait: this may be inside a call of
                // the program's.
                loop {
                    while self.feed(worker) {}
                    let received = self.receive(worker);
                    if !matches!(received, Ok(Received::Something)) {
                        break;
                    }
                }
                self.channel_closed(worker);
            }
            Action::DiscardChannel { worker } => self.drop_channel(worker),
            Action::Signal { worker, signal } => {
                if let Some(record) = self.record(worker) {
                    // It fails only for a process that has ended, which is noticed by itself.
                    let _ = record.pid.signal(signal.number());
                }
            }
        }
    }

    fn bind(&self, handle: HandleId, address: SocketAddr) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        sys::socket::set_backlog(&listener, BACKLOG)?;
        let address = listener.local_addr()?;
        let key = Token::Listener(handle.0).key();
        let listener = self.poller.add(listener, key, None)?;
        self.listeners.borrow_mut().insert(handle, listener);
        Ok(address)
    }

    /// A copy of the listener for a worker.
    fn share(&self, handle: HandleId) -> io::Result<Rc<OwnedFd>> {
        match self.listeners.borrow().get(&handle) {
            Some(listener) => Ok(Rc::new(listener.try_clone()?.into())),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn set_interest(&self, handle: HandleId, interest: Option<Interest>) {
        if let Some(listener) = self.listeners.borrow().get(&handle) {
            if let Err(source) = listener.set_interest(interest) {
                let error = Error::Io {
                    attempt: "watch a listener",
                    source,
                };
                self.core.borrow_mut().error(None, error);
            }
        }
    }

    fn accept(&self, handle: HandleId, at_most: u64) {
        let listeners = self.listeners.borrow();
        let Some(listener) = listeners.get(&handle) else {
            return;
        };
        let mut core = self.core.borrow_mut();
        for _ in 0..at_most {
            match listener.accept() {
                Ok((stream, _)) => core.accepted(handle, Rc::new(stream.into())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return core.drained(handle);
                }
                Err(error) if sys::socket::lost_before_accept(&error) => {}
                Err(error) => return core.accept_failed(handle, error),
            }
        }
        core.accept_done(handle);
    }

    fn flush(&self) {
        let unflushed = std::mem::take(&mut *self.unflushed.borrow_mut());
        for worker in unflushed {
            if let Some(Err(source)) = self.with_channel(worker, Channel::flush) {
                self.channel_failed(worker, source);
            }
        }
    }

    /// A channel can be written to again.
    pub(crate) fn writable(&self, worker: WorkerId) {
        self.unflushed.borrow_mut().insert(worker);
    }

    /// Reads once from a worker's channel.
    fn receive(&self, worker: WorkerId) -> io::Result<Received> {
        let mut scratch = self.scratch.borrow_mut();
        let received = self.with_channel(worker, |channel| channel.receive(&mut scratch));
        received.unwrap_or(Ok(Received::Nothing))
    }

    /// Reads once from a worker's channel, and closes it at its end. Returns whether there is
    /// something to feed.
    pub(crate) fn read(&self, worker: WorkerId) -> bool {
        match self.receive(worker) {
            Ok(Received::Something) => return true,
            Ok(Received::Nothing) => {}
            Ok(Received::End) => self.channel_closed(worker),
            Err(source) => self.channel_failed(worker, source),
        }
        false
    }

    /// Feeds one frame that has arrived. Returns whether there was one.
    pub(crate) fn feed(&self, worker: WorkerId) -> bool {
        match self.with_channel(worker, Channel::next) {
            None | Some(Ok(None)) => false,
            Some(Ok(Some((frame, fds)))) => {
                let mut core = self.decide();
                match frame {
                    ToMaster::Message(bytes) => {
                        let message = Message::new(bytes, fds);
                        core.frame(worker, ToMaster::Message(Vec::new()), Some(message));
                    }
                    frame @ (ToMaster::Online
                    | ToMaster::Listen { .. }
                    | ToMaster::Listening { .. }
                    | ToMaster::Ready { .. }
                    | ToMaster::Refused { .. }
                    | ToMaster::Close { .. }
                    | ToMaster::Leaving) => core.frame(worker, frame, None),
                }
                true
            }
            Some(Err(error)) => {
                self.decide().violation(worker, error);
                false
            }
        }
    }

    fn channel_failed(&self, worker: WorkerId, source: io::Error) {
        let error = Error::Channel {
            worker: Some(worker),
            source,
        };
        let mut core = self.decide();
        core.error(Some(worker), error);
        // What it has said it took must not be given to another.
        core.close_channel(worker);
    }

    fn channel_closed(&self, worker: WorkerId) {
        self.drop_channel(worker);
        self.decide().channel_closed(worker);
    }

    fn drop_channel(&self, worker: WorkerId) {
        if let Some(record) = self.record(worker) {
            drop(record.channel.take());
        }
    }

    pub(crate) fn try_reap(&self, worker: WorkerId) {
        let Some(record) = self.record(worker) else {
            return;
        };
        let reaped = self.core.borrow().exit_status(worker).is_some();
        if reaped || record.departure.get().is_some() {
            return;
        }
        let status = match record.pid.try_wait() {
            Ok(None) => return,
            Ok(Some(status)) => status,
            Err(source) => {
                let error = Error::ExitStatus { worker, source };
                self.core.borrow_mut().error(Some(worker), error);
                sys::process::unknown_status()
            }
        };
        drop(record.process.take());
        self.decide().exited(worker, status);
    }

    /// The workers whose end only SIGCHLD tells.
    pub(crate) fn unwatched(&self) -> Vec<WorkerId> {
        let records = self.records.borrow();
        let unwatched = records
            .values()
            .filter(|record| record.process.borrow().is_none());
        unwatched.map(|record| record.id).collect()
    }

    /// Queues a message and writes what can be written. Returns whether the program may go on
    /// without a pause.
    pub(crate) fn send(
        &self,
        worker: WorkerId,
        message: &[u8],
        fds: Vec<OwnedFd>,
    ) -> std::result::Result<bool, SendError> {
        let length = message.len();
        let frame = ToWorker::Message(message.to_vec());
        let queued = self.with_channel(worker, |channel| channel.send(&frame, length, fds));
        queued.unwrap_or(Err(SendError::ChannelClosed))?;
        self.unflushed.borrow_mut().insert(worker);
        self.act();
        Ok(self.with_channel(worker, |channel| channel.has_room()) == Some(true))
    }
}
