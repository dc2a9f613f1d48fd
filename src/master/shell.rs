//! The master's hands: carries out what [`MasterCore`] decides, on real processes, channels and
//! listeners. Never calls the program.

use std::any::Any;
use std::cell::{Cell, RefCell, RefMut};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::io::{self, Write as _};
use std::mem::ManuallyDrop;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::{Rc, Weak};
use std::time::Instant;

use crate::config::settings::{
    CHANNEL_FD, INSPECT_PORT, InspectPort, SchedulingPolicy, Settings, StdioKind, UNIQUE_ID,
    WORKER_PID, WRAPPED,
};
use crate::core::dispatch::Sequenced;
use crate::core::event::ExitReport;
use crate::core::master::{ACCEPT_BATCH, Action, Attachment, MasterCore};
use crate::error::{Error, SendError};
use crate::init::{become_worker, is_wrapped_master};
use crate::master::shard_group::ShardGroup;
use crate::runtime::event_loop::Token;
use crate::sys;
use crate::sys::bind::{BoundSocket, adopt_socket, bind};
use crate::sys::fd::NoLingerFd;
use crate::sys::listen::PortSharing;
use crate::sys::poll::{Interest, Poller, Registered};
use crate::sys::process::{Exit, Failure, Pid, Program, Unreaped, Usage};
use crate::sys::queue::{Dequeued, Queue};
use crate::sys::socket_file::SocketFile;
use crate::systemd::{self, LISTEN_PID};
use crate::types::address::Address;
use crate::types::endpoint::{BindFlags, Endpoint, Kind, Place};
use crate::types::errno;
use crate::types::loads::Loads;
use crate::types::message::UntakenFds;
use crate::types::signal::Signal;
use crate::types::sorted_map::SortedMap;
use crate::types::time::{Time, earlier};
use crate::types::worker_id::WorkerId;
use crate::wire::channel::inbox::{Arrival, READ_SIZE};
use crate::wire::channel::outbox::ReceiptId;
use crate::wire::channel::{BACKOFF, Channel, Flushed, Received};
use crate::wire::frame::{FrameError, HandleId, ToMaster, ToWorker, preamble};

pub(crate) type Core = MasterCore<NoLingerFd, Vec<NoLingerFd>>;

/// The descriptors and process of a worker or a detached process.
#[derive(Debug)]
pub(crate) struct WorkerIo {
    pub(crate) id: WorkerId,
    pub(crate) pid: Pid,
    /// `None` when it is closed, and for a detached process.
    channel: RefCell<Option<Channel<ToMaster, ToWorker>>>,
    /// Readable when the process ends, where the kernel has such descriptors. It is not waited for while
    /// the process cannot be reaped.
    process: RefCell<Option<Registered<OwnedFd>>>,
    /// The master's ends of the worker's pipes, by the worker's number.
    pub(crate) stdio: RefCell<SortedMap<usize, UnixStream>>,
    /// Set when it has ended, if it is known.
    pub(crate) usage: Cell<Option<Usage>>,
    /// Set when the worker has left the table.
    pub(crate) exit_report: Cell<Option<ExitReport>>,
}

impl WorkerIo {
    /// Whether more has come by the channel than the last read had room for.
    pub(crate) fn has_more(&self) -> bool {
        self.with_channel(|channel| channel.has_more()) == Some(true)
    }

    /// Runs `call` on the channel, if it is open.
    fn with_channel<T>(
        &self,
        call: impl FnOnce(&mut Channel<ToMaster, ToWorker>) -> T,
    ) -> Option<T> {
        self.channel.borrow_mut().as_mut().map(call)
    }
}

/// How many waiting connections are checked in one iteration of the loop. With more, each iteration costs
/// more while connections wait: with 8, 5 µs instead of 0.8 (`cargo bench -- scaling`). With fewer,
/// connections whose clients have hung up are counted for longer.
const SWEEP: usize = 2;
/// How many frames are heard when a channel closes: more than a socket holds that nobody has enlarged.
const LAST_FRAMES: u32 = 65_536;
/// How many descriptors stay open of the messages among these frames, whose events wait. With those that
/// arrived ahead of their frames (`MAX_EARLY_FDS`), one worker has at most 256 open in the master.
const LAST_FDS: usize = 128;

/// How many more descriptors may arrive with messages.
#[derive(Clone, Copy, Debug)]
enum FdsLeft {
    Unlimited,
    AtMost(usize),
    /// Some were too many.
    Spent,
}

/// Whether descriptors are reported as too many. The first ones are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Report {
    Nothing,
    Loss,
}

impl FdsLeft {
    /// Closes the descriptors that are too many.
    fn take(&mut self, fds: &mut Vec<NoLingerFd>) -> Report {
        match *self {
            Self::Unlimited => Report::Nothing,
            Self::AtMost(left) => match left.checked_sub(fds.len()) {
                Some(rest) => {
                    *self = Self::AtMost(rest);
                    Report::Nothing
                }
                None => {
                    fds.truncate(left);
                    *self = Self::Spent;
                    Report::Loss
                }
            },
            Self::Spent => {
                fds.clear();
                Report::Nothing
            }
        }
    }
}

/// What one call of `feed` found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Processed {
    Nothing,
    More,
    /// The same, and nothing is left.
    Drained,
    /// A frame that takes the master some time: others should have their turn after it.
    Yield,
}

/// A socket that is bound for the workers. The file goes first: as long as it is there, nobody else
/// can have it.
#[derive(Debug)]
struct MasterSocket {
    is_path: bool,
    file: Option<SocketFile>,
    /// More than one if it is sharded.
    sockets: Vec<Rc<Registered<OwnedFd>>>,
    /// If it is sharded, and the kernel lets a program select.
    group: Option<ShardGroup>,
    /// With the real port; none for a Unix path.
    address: Option<SocketAddr>,
    backlog: u32,
}

impl MasterSocket {
    fn get(&self, shard: usize) -> io::Result<&Rc<Registered<OwnedFd>>> {
        let socket = self.sockets.get(shard);
        socket.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// A listener that the program keeps.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) handle: HandleId,
    pub(crate) address: Address,
    /// The first one, if it is sharded.
    pub(crate) socket: Rc<Registered<OwnedFd>>,
}

#[derive(Debug)]
pub(crate) struct MasterShell {
    pub(crate) core: RefCell<Core>,
    poller: Poller,
    began: Instant,
    workers: RefCell<BTreeMap<WorkerId, Rc<WorkerIo>>>,
    unreaped: Unreaped,
    listeners: RefCell<SortedMap<HandleId, MasterSocket>>,
    /// By which workers get their connections.
    queues: RefCell<BTreeMap<(HandleId, WorkerId), Queue>>,
    /// Channels that have something to write; some more than once.
    unflushed: RefCell<VecDeque<WorkerId>>,
    /// What is tried again after a while.
    resting: RefCell<Retries>,
    /// Messages that have been written or lost.
    receipts: RefCell<VecDeque<(WorkerId, ReceiptId, bool)>>,
    /// Workers of whom more has arrived than they may be heard in one turn.
    pending: RefCell<BTreeSet<WorkerId>>,
    /// Workers whose channels have something that could not be written yet.
    writing: RefCell<BTreeSet<WorkerId>>,
    /// Workers without a channel whose end only SIGCHLD tells.
    unwatched_exits: RefCell<BTreeSet<WorkerId>>,
    /// In a worker that executes nothing: what its master owns. The master would notice if it were
    /// dropped. It stays reachable, so that a leak checker finds real leaks.
    abandoned: RefCell<Vec<ManuallyDrop<Box<dyn Any>>>>,
    /// The closure that chooses the inspect port is running.
    is_choosing_port: Cell<bool>,
    /// What came with the message of which the program is being told.
    pub(crate) delivering_fds: RefCell<Weak<UntakenFds>>,
    /// What channels read into.
    scratch: RefCell<Vec<u8>>,
}

/// Steps that failed for lack of resources, and are retried later.
#[derive(Debug, Default)]
struct Retries {
    /// Channels that have something to write.
    channels: BTreeSet<WorkerId>,
    /// Queues that are to be closed, and may have something in them.
    queues: Vec<(HandleId, WorkerId)>,
    /// Workers that have ended and cannot be reaped: another process traces them, a debugger say. The
    /// descriptors of their processes stay readable, and are not waited for meanwhile.
    processes: Vec<WorkerId>,
    until: Option<Time>,
}

impl Retries {
    fn rest_from(&mut self, now: Time) {
        self.until.get_or_insert(now.saturating_add(BACKOFF));
    }
}

/// Clears a flag when it is dropped, also by a panic.
struct Reset<'a>(&'a Cell<bool>);

impl Drop for Reset<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

impl MasterShell {
    /// Time is counted from `began`.
    pub(crate) fn new(policy: SchedulingPolicy, poller: Poller, began: Instant) -> Self {
        Self {
            core: RefCell::new(MasterCore::new(policy)),
            poller,
            began,
            workers: RefCell::default(),
            unreaped: Unreaped::default(),
            listeners: RefCell::default(),
            queues: RefCell::default(),
            unflushed: RefCell::default(),
            resting: RefCell::default(),
            receipts: RefCell::default(),
            pending: RefCell::default(),
            writing: RefCell::default(),
            unwatched_exits: RefCell::default(),
            abandoned: RefCell::default(),
            is_choosing_port: Cell::new(false),
            delivering_fds: RefCell::default(),
            scratch: RefCell::new(vec![0; READ_SIZE]),
        }
    }

    /// The core, for a decision that is made now.
    pub(crate) fn decide(&self) -> RefMut<'_, Core> {
        let mut core = self.core.borrow_mut();
        core.set_time(self.began.elapsed());
        core
    }

    /// # Errors
    ///
    /// This process has not created the master.
    pub(crate) fn check_own(&self) -> crate::error::Result<()> {
        if self.poller.is_own() {
            Ok(())
        } else {
            Err(Error::ForeignProcess)
        }
    }

    /// Starts a worker, or a detached process. Where the kernel has no descriptors for processes,
    /// `watch_children` makes
    /// the loop wake up for SIGCHLD. In a worker that executes nothing, `abandon_watches` forgets what
    /// else is in the loop, and returns the descriptors.
    pub(crate) fn fork(
        &self,
        settings: &Settings,
        extra: impl IntoIterator<Item = (OsString, OsString)>,
        watch_children: impl FnOnce() -> io::Result<()>,
        abandon_watches: impl FnOnce() -> Vec<RawFd>,
    ) -> Result<Rc<WorkerIo>, Failure> {
        if settings.main.is_some() && sys::threads::has_other_threads() == Some(true) {
            let reason = "the master has other threads, whose locks the copy would hold for ever";
            let error = io::Error::new(io::ErrorKind::Deadlock, reason);
            return Err(("copy the master", error));
        }
        let making = |error| ("make a channel", error);
        self.unreaped.reap();
        // The program's own code first: it may fork, too.
        let extra: Vec<_> = extra.into_iter().collect();
        let inspect_port = settings.inspect_port.as_ref();
        let inspect_port = inspect_port.map(|port| self.choose_port(port)).transpose();
        let inspect_port = inspect_port.map_err(|error| ("choose its inspect port", error))?;
        let id = self.core.borrow().next_worker_id();
        let used_up = || io::Error::other("all numbers of workers have been used");
        let id = id.ok_or_else(|| ("number it", used_up()))?;
        let preparing = |error| ("prepare its descriptors", error);
        let stdio = Stdios::new(settings).map_err(preparing)?;
        let (ours, low) = UnixStream::pair().map_err(making)?;
        ours.set_nonblocking(true).map_err(making)?;
        // Where there is no such option, nothing is sent out of band.
        let _ = sys::socket::enable_oob_inline(&ours);
        // It fits into an empty socket.
        sys::socket::send(&ours, &preamble(id), &[]).map_err(making)?;
        let key = Token::Channel(id.get()).key();
        let channel = Channel::new(ours, &self.poller, key).map_err(making)?;
        let theirs = sys::fd::duplicate(low.as_raw_fd(), stdio.beyond()).map_err(making)?;
        drop(low);

        let number = theirs.as_raw_fd();
        let preparing = |error| ("prepare it", error);
        let passed = settings.passed_fds();
        let (pid, process) = if let Some(main) = &settings.main {
            // A closure has what the master has.
            if !passed.is_empty() || settings.is_detached() {
                let reason = "listen_fds and detached are for programs that are executed";
                return Err(preparing(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    reason,
                )));
            }
            if !extra.iter().all(|(k, v)| sys::env::is_valid(k, v)) {
                return Err(preparing(io::ErrorKind::InvalidInput.into()));
            }
            let mut child = Program::default();
            surround(&mut child, settings).map_err(preparing)?;
            child.stdio(stdio.theirs);
            // The worker would print it once more.
            let _ = std::io::stdout().flush();
            let abandon = || {
                let inert = sys::fd::inert()?;
                let mut numbers = self.abandon(inert.as_fd())?;
                // The application may have other handles of these.
                for number in abandon_watches() {
                    sys::fd::replace(number, inert.as_fd())?;
                }
                // The rest is in frames to which the child does not return.
                numbers.extend(channel.descriptors().iter().map(AsRawFd::as_raw_fd));
                numbers.extend(stdio.ours.values().map(AsRawFd::as_raw_fd));
                numbers.extend(settings.descriptors());
                Ok(numbers)
            };
            let begin = || {
                systemd::remove_variables();
                crate::runtime::fault::point("begin", || Some(Pid::own()), Some(&channel));
                for (name, value) in &extra {
                    sys::env::set(name, value);
                }
                let worker = become_worker(id, inspect_port, number).map_err(|error| {
                    io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(errno::EINVAL))
                })?;
                Ok(|| main.run(worker))
            };
            child.fork(number, &self.unreaped, abandon, begin)?
        } else {
            let mut env = systemd::inherited_environment();
            env.extend(extra);
            if is_wrapped_master() {
                env.insert(WRAPPED.into(), "1".into());
            }
            if !passed.is_empty() {
                let announced = systemd::set_listen_variables(&mut env, passed);
                announced.map_err(|error| ("prepare its descriptors", error))?;
            }
            if !settings.is_detached() {
                env.insert(UNIQUE_ID.into(), id.to_string().into());
                env.insert(CHANNEL_FD.into(), number.to_string().into());
                env.remove(&OsString::from(WORKER_PID));
            }
            if let Some(port) = inspect_port {
                env.insert(INSPECT_PORT.into(), port.to_string().into());
            }
            let mut program = program(settings, env).map_err(preparing)?;
            program.stdio(stdio.theirs);
            if settings.is_detached() {
                program.detach();
            } else {
                program.pid_variable(WORKER_PID);
            }
            if !passed.is_empty() {
                program.pid_variable(LISTEN_PID);
            }
            program.spawn(number, &self.unreaped)?
        };
        drop(theirs);

        let key = Token::Process(id.get()).key();
        let process = match process {
            Some(fd) => self.poller.add(fd, key, Some(Interest::Readable)).map(Some),
            None => watch_children().map(|()| None),
        };
        let process = process.map_err(|error| {
            // Nobody would notice its end.
            pid.discard(None, &self.unreaped);
            ("watch it", error)
        })?;
        let mut core = self.core.borrow_mut();
        let channel = if settings.is_detached() {
            core.detached(id);
            if process.is_none() {
                self.unwatched_exits.borrow_mut().insert(id);
            }
            // The kernel closed the other end when the program was executed.
            None
        } else {
            core.forked(id);
            Some(channel)
        };
        drop(core);
        let worker_io = Rc::new(WorkerIo {
            id,
            pid,
            channel: RefCell::new(channel),
            process: RefCell::new(process),
            stdio: RefCell::new(stdio.ours),
            usage: Cell::new(None),
            exit_report: Cell::new(None),
        });
        self.workers.borrow_mut().insert(id, Rc::clone(&worker_io));
        Ok(worker_io)
    }

    /// Asks for the next inspect port.
    fn choose_port(&self, port: &InspectPort) -> io::Result<u16> {
        // A closure that forks would be asked for the port of that worker, without end.
        if self.is_choosing_port.replace(true) {
            let reason = "the closure that chooses it forks a worker";
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, reason));
        }
        let _choosing = Reset(&self.is_choosing_port);
        Ok(port.next())
    }

    /// Lets go of everything: the workers leave when their channels close.
    pub(crate) fn close(&self) {
        for worker_io in self.workers.take().into_values() {
            if let Some(channel) = worker_io.channel.take() {
                // Shut, too: a child that the application has forked may have copies.
                channel.discard();
            }
            worker_io.process.take();
            worker_io.stdio.take();
        }
    }

    /// In a worker that executes nothing: takes out what is the master's, and returns the descriptors of
    /// what no value owns any more. Where the application may have another handle, `inert` takes the
    /// number: closed, it would soon be that of something else, which this handle would use or close.
    fn abandon(&self, inert: BorrowedFd<'_>) -> io::Result<Vec<RawFd>> {
        self.poller.abandon(inert)?;
        let (workers, listeners) = (self.workers.take(), self.listeners.take());
        let queues = self.queues.take();
        let policy = self.core.borrow().policy();
        let core = self.core.replace(MasterCore::new(policy));
        let mut numbers = self.unreaped.abandon();
        for worker_io in workers.values() {
            let (channel, process) = (worker_io.channel.take(), worker_io.process.take());
            let stdio = worker_io.stdio.take();
            let descriptors = channel.iter().flat_map(Channel::descriptors);
            numbers.extend(descriptors.map(|fd| fd.as_raw_fd()));
            numbers.extend(process.iter().map(|process| process.as_raw_fd()));
            numbers.extend(stdio.values().map(AsRawFd::as_raw_fd));
            self.keep((channel, process, stdio));
        }
        for listener in listeners.values() {
            let file = listener.file.iter().map(SocketFile::directory);
            numbers.extend(file.map(|directory| directory.as_raw_fd()));
            for socket in &listener.sockets {
                // Of the application's `MasterListener`.
                if Rc::strong_count(socket) > 1 {
                    sys::fd::replace(socket.as_raw_fd(), inert)?;
                } else {
                    numbers.push(socket.as_raw_fd());
                }
            }
            numbers.extend(listener.group.iter().map(ShardGroup::number));
        }
        let ends = queues.values().flat_map(Queue::descriptors);
        numbers.extend(ends.map(|end| end.as_raw_fd()));
        numbers.extend(core.waiting().map(|fd| fd.as_fd().as_raw_fd()));
        let undelivered = core.message_fds().flatten();
        numbers.extend(undelivered.map(|fd| fd.as_fd().as_raw_fd()));
        // The message that is being delivered.
        let delivering_fds = self
            .delivering_fds
            .borrow()
            .upgrade()
            .map(|untaken| untaken.take());
        numbers.extend(
            delivering_fds
                .iter()
                .flatten()
                .map(|fd| fd.as_fd().as_raw_fd()),
        );
        self.keep((workers, listeners, queues, core, delivering_fds));
        Ok(numbers)
    }

    /// In a worker that executes nothing: keeps what its master owns, without ever dropping it.
    fn keep(&self, value: impl Any) {
        let value: Box<dyn Any> = Box::new(value);
        self.abandoned.borrow_mut().push(ManuallyDrop::new(value));
    }

    /// The last event of the process has been delivered.
    pub(crate) fn forget(&self, worker: WorkerId) {
        self.unwatched_exits.borrow_mut().remove(&worker);
        if let Some(worker_io) = self.workers.borrow_mut().remove(&worker) {
            worker_io.stdio.take();
        }
    }

    pub(crate) fn worker_io(&self, worker: WorkerId) -> Option<Rc<WorkerIo>> {
        self.workers.borrow().get(&worker).map(Rc::clone)
    }

    /// Runs `call` on the worker's channel, if it is open.
    fn with_channel<T>(
        &self,
        worker: WorkerId,
        call: impl FnOnce(&mut Channel<ToMaster, ToWorker>) -> T,
    ) -> Option<T> {
        self.worker_io(worker)?.with_channel(call)
    }

    /// When `tick` is needed at the latest.
    pub(crate) fn deadline(&self) -> Option<Time> {
        earlier(self.core.borrow().deadline(), self.resting.borrow().until)
    }

    /// Tells the core the time, if it has to wait for anything, and which of the waiting clients have
    /// left. Something is `due` when `deadline` has said, and nothing has happened since. Returns whether
    /// anything may have come of it.
    pub(crate) fn tick(&self, due: Option<Time>) -> bool {
        // Most often nothing is.
        if due.is_none() && !self.core.borrow().has_waiting() {
            return false;
        }
        let now = self.began.elapsed();
        let mut resting = self.resting.borrow_mut();
        if resting.until.is_some_and(|until| until <= now) {
            let rested = std::mem::take(&mut *resting);
            drop(resting);
            self.unflushed.borrow_mut().extend(rested.channels);
            for (handle, worker) in rested.queues {
                self.close_queue(handle, worker);
            }
            for worker in rested.processes {
                self.wait_for_end(worker);
            }
        } else {
            drop(resting);
        }
        let mut core = self.core.borrow_mut();
        core.set_time(now);
        if due.is_some_and(|due| due <= now) {
            core.tick(now);
        }
        if core.has_waiting() {
            core.sweep(SWEEP, |connection| {
                sys::fd::is_closed_by_peer(connection.as_fd())
            });
        }
        true
    }

    /// A point at which tests make this worker fail. The first one is spared.
    fn fault(&self, name: &str, worker: WorkerId) {
        let elsewhere: Option<&Channel<ToMaster, ToWorker>> = None;
        let worker_io = || {
            self.worker_io(worker)
                .filter(|worker_io| worker_io.id.get() > 1)
        };
        crate::runtime::fault::point(name, || Some(worker_io()?.pid), elsewhere);
    }

    /// Carries out everything that needs no callback.
    pub(crate) fn act(&self) {
        if self.core.borrow().has_actions() || !self.unflushed.borrow().is_empty() {
            self.carry_all_out();
        }
    }

    /// Not a part of `act`, which most often finds nothing, several times for each message.
    #[inline(never)]
    fn carry_all_out(&self) {
        // All of it concerns the process that has created it.
        while self.poller.is_own() {
            let action = self.core.borrow_mut().next_action();
            match action {
                Some(action) => self.carry_out(action),
                None if self.unflushed.borrow().is_empty() => break,
                None => self.flush(),
            }
        }
    }

    fn carry_out(&self, action: Action<NoLingerFd>) {
        match action {
            Action::Send {
                worker,
                frame,
                with,
            } => {
                let shared = match with {
                    Attachment::None => Ok(None),
                    Attachment::Listener(handle) => self.share(handle, 0).map(Some),
                    Attachment::Shard(handle, shard) => self.share_shard(handle, shard).map(Some),
                    Attachment::Queue(handle) => self.open_queue(handle, worker).map(Some),
                };
                let fd = match (shared, with, &frame) {
                    (Ok(fd), _, _) => fd.map(|fd| Rc::new(fd.into())),
                    (
                        Err(error),
                        Attachment::Listener(handle)
                        | Attachment::Shard(handle, _)
                        | Attachment::Queue(handle),
                        ToWorker::Reply { request, .. },
                    ) => {
                        let errno = error.raw_os_error().unwrap_or(0);
                        let mut core = self.decide();
                        return core.share_failed(handle, worker, *request, errno);
                    }
                    (Err(_), _, _) => None,
                };
                self.with_channel(worker, |channel| channel.queue(&frame, fd));
                self.unflushed.borrow_mut().push_back(worker);
            }
            Action::Dispatch {
                handle,
                worker,
                connection,
                has_waited,
            } => {
                if has_waited && sys::fd::is_closed_by_peer(connection.connection.as_fd()) {
                    self.decide().hung_up(handle, worker);
                } else {
                    self.give(handle, worker, connection);
                }
            }
            Action::Reclaim {
                handle,
                worker,
                at_most,
            } => {
                let queues = self.queues.borrow();
                let Some(queue) = queues.get(&(handle, worker)) else {
                    return;
                };
                let (back, state) = reclaim(queue, at_most);
                let mut core = self.decide();
                if state == QueueState::Unknown {
                    core.cannot_reclaim(handle);
                }
                let is_empty = state == QueueState::Empty;
                core.reclaimed(handle, worker, back, is_empty);
            }
            Action::CountQueued { handle, worker } => self.count(handle, worker),
            Action::CloseQueue { handle, worker } => self.close_queue(handle, worker),
            Action::Bind {
                handle,
                endpoint,
                flags,
                policy,
            } => {
                let result = self.bind(handle, &endpoint, &flags, policy);
                let result = result.map_err(|error| error.raw_os_error().unwrap_or(errno::EINVAL));
                self.core.borrow_mut().bound(handle, result);
            }
            Action::BindShard {
                handle,
                flags,
                worker,
                request,
            } => {
                let result = self.bind_shard(handle, &flags);
                let result = result.map_err(|error| error.raw_os_error().unwrap_or(errno::EINVAL));
                let mut core = self.decide();
                core.shard_bound(handle, worker, request, result);
            }
            Action::SelectShards { handle, shards } => {
                let listeners = self.listeners.borrow();
                let Some(listener) = listeners.get(&handle) else {
                    return;
                };
                let selected = match &listener.group {
                    Some(group) => group.select(&shards),
                    None => listener
                        .get(0)
                        .and_then(|own| sys::filter::select_sockets(own, &shards)),
                };
                if let Err(source) = selected {
                    let attempt = "choose where newcomers go";
                    let error = Error::Io { attempt, source };
                    self.core.borrow_mut().error(None, error);
                }
            }
            Action::Unblock { handle, shard } => {
                if let Some(listener) = self.listeners.borrow().get(&handle) {
                    let all = listener.sockets.iter().enumerate();
                    let chosen = all.filter(|(at, _)| shard.is_none_or(|shard| *at == shard));
                    for (_, socket) in chosen {
                        // It cannot fail: the descriptor is open.
                        let _ = sys::fd::set_nonblocking(socket.as_fd(), true);
                    }
                }
            }
            Action::Watch { handle } => self.set_interest(handle, Some(Interest::Readable)),
            Action::Unwatch { handle } => self.set_interest(handle, None),
            Action::Accept { handle, at_most } => self.accept(handle, at_most),
            Action::RemoveFile { handle } => {
                if let Some(listener) = self.listeners.borrow_mut().get_mut(&handle) {
                    listener.file = None;
                }
            }
            // Where it cannot be done, the backlog is emptied with the door open.
            Action::AttachSynFilter { handle } => {
                if let Some(listener) = self.listeners.borrow().get(&handle) {
                    if let Some(group) = &listener.group {
                        let _ = group.ignore();
                        return;
                    }
                    for socket in &listener.sockets {
                        if listener.is_path {
                            sys::listen::shut_down(socket);
                        } else {
                            let _ = sys::filter::attach_syn_filter(socket);
                        }
                    }
                }
            }
            Action::DetachSynFilter { handle } => {
                if let Some(listener) = self.listeners.borrow().get(&handle) {
                    if let Some(group) = &listener.group {
                        let _ = group.admit();
                        return;
                    }
                    for socket in &listener.sockets {
                        let _ = sys::filter::detach_syn_filter(socket);
                    }
                }
            }
            Action::WatchHangUp { handle } => self.watch_hang_up(handle),
            Action::StopListening { handle } => {
                if let Some(listener) = self.listeners.borrow().get(&handle) {
                    for socket in &listener.sockets {
                        sys::listen::shut_down(socket);
                    }
                }
            }
            Action::Unbind { handle } => {
                self.listeners.borrow_mut().remove(&handle);
            }
            Action::CloseChannel { worker } => {
                if let Some(worker_io) = self.worker_io(worker) {
                    self.hear_to_the_end(&worker_io);
                }
                self.channel_closed(worker);
            }
            Action::DiscardChannel { worker } => self.drop_channel(worker),
            Action::Signal { worker, signal } => {
                if let Some(worker_io) = self.worker_io(worker) {
                    let process = worker_io.process.borrow();
                    let process = process.as_ref().map(|process| process.as_fd());
                    // It fails only for a process that has ended, which is noticed by itself.
                    let _ = worker_io.pid.signal(process, signal.number());
                }
            }
        }
    }

    fn bind(
        &self,
        handle: HandleId,
        endpoint: &Endpoint,
        flags: &BindFlags,
        policy: SchedulingPolicy,
    ) -> io::Result<Option<SocketAddr>> {
        if let Place::Fd(number) = endpoint.place {
            let listeners = self.listeners.borrow();
            let mut sockets = listeners.values().flat_map(|own| &own.sockets);
            if sockets.any(|own| own.as_fd().as_raw_fd() == number) {
                // It is not the program's to lend.
                return Err(io::Error::from_raw_os_error(errno::EBADF));
            }
        }
        let is_sharded = policy == SchedulingPolicy::Sharded;
        let sharing = match is_sharded {
            true => PortSharing::Create,
            false => PortSharing::Exclusive,
        };
        let bound = bind(endpoint, flags, sharing)?;
        // Workers that wait in `accept` itself take strict turns. What is lent is others', too.
        let waits = policy != SchedulingPolicy::RoundRobin && endpoint.kind != Kind::Udp;
        if waits && !endpoint.is_borrowed() {
            sys::fd::set_nonblocking(bound.socket.as_fd(), false)?;
        }
        // Without a selector the kernel chooses a shard by a hash, and selecting is an error.
        let group = is_sharded.then(|| ShardGroup::new(&bound.socket, flags, &self.poller, handle));
        self.add(handle, bound, flags, group.and_then(Result::ok))
    }

    fn add(
        &self,
        handle: HandleId,
        bound: BoundSocket,
        flags: &BindFlags,
        group: Option<ShardGroup>,
    ) -> io::Result<Option<SocketAddr>> {
        let BoundSocket {
            file,
            socket,
            address,
        } = bound;
        let key = Token::Listener(handle.0).key();
        let socket = self.poller.add(socket, key, None)?;
        let is_path = file.is_some();
        let bound = MasterSocket {
            is_path,
            file,
            sockets: vec![Rc::new(socket)],
            group,
            address,
            backlog: flags.backlog,
        };
        self.listeners.borrow_mut().insert(handle, bound);
        Ok(address)
    }

    /// One more listener with the address of the first.
    fn bind_shard(&self, handle: HandleId, flags: &BindFlags) -> io::Result<()> {
        let mut listeners = self.listeners.borrow_mut();
        let listener = listeners.get_mut(&handle);
        let listener = listener.ok_or(io::ErrorKind::NotFound)?;
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

    /// Opens a listener, or finds it open, and keeps it until it is released.
    pub(crate) fn listen(&self, endpoint: &Endpoint, flags: &BindFlags) -> io::Result<Kept> {
        // A worker may just have asked for the same.
        self.act();
        let mut core = self.decide();
        if let Some(handle) = core.retain(endpoint) {
            drop(core);
            self.act();
            return self.kept(handle);
        }
        let (handle, policy) = (core.next_handle(), core.policy_of(endpoint));
        drop(core);
        let address = self.bind(handle, endpoint, flags, policy)?;
        let mut core = self.decide();
        core.retained(handle, endpoint.clone(), address, policy);
        drop(core);
        self.act();
        self.kept(handle)
    }

    /// Keeps a listener that is open already.
    pub(crate) fn adopt(&self, kind: Kind, socket: OwnedFd, flags: &BindFlags) -> io::Result<Kept> {
        let endpoint = adopt_socket(kind, &socket, flags.backlog)?;
        self.act();
        let handle = self.decide().next_handle();
        let bound = BoundSocket {
            file: None,
            address: endpoint.address(),
            socket,
        };
        let address = self.add(handle, bound, flags, None)?;
        self.decide().adopted(handle, endpoint, address);
        self.act();
        self.kept(handle)
    }

    pub(crate) fn removes_file(&self, handle: HandleId) -> bool {
        let listeners = self.listeners.borrow();
        let listener = listeners.get(&handle);
        listener.is_some_and(|listener| listener.file.is_some())
    }

    pub(crate) fn set_removes_file(&self, handle: HandleId, removes: bool) -> io::Result<()> {
        let path = self.core.borrow().path_of(handle);
        let mut listeners = self.listeners.borrow_mut();
        let (Some(listener), Some(path)) = (listeners.get_mut(&handle), path) else {
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

    fn kept(&self, handle: HandleId) -> io::Result<Kept> {
        let listeners = self.listeners.borrow();
        let listener = listeners.get(&handle).ok_or(io::ErrorKind::NotFound)?;
        let address = self.core.borrow().address_of(handle);
        Ok(Kept {
            handle,
            address: address.ok_or(io::ErrorKind::NotFound)?,
            socket: Rc::clone(listener.get(0)?),
        })
    }

    /// The application may give a descriptor of the listener to any process.
    pub(crate) fn mark_borrowed(&self, handle: HandleId) {
        self.core.borrow_mut().mark_borrowed(handle);
    }

    /// The poller reports a listener, or that it has hung up.
    pub(crate) fn readable(&self, handle: HandleId) {
        if self.core.borrow().master_accepts(handle) {
            return self.decide().readable(handle);
        }
        let stopped: Vec<_> = match self.listeners.borrow().get(&handle) {
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
            self.decide().was_shut_down(handle, outcome);
        }
        self.act();
    }

    /// Makes a listener, or one of its shards, listen again that another process shut down. The poller
    /// does not report it until `watch_hang_up`: a process that shuts it down again and again costs
    /// the master no more than that.
    fn listen_again(&self, handle: HandleId, shard: usize) -> io::Result<()> {
        let mut listeners = self.listeners.borrow_mut();
        let listener = listeners.get_mut(&handle);
        let listener = listener.ok_or(io::ErrorKind::NotFound)?;
        let socket = Rc::clone(listener.get(shard)?);
        socket.set_interest(None)?;
        // The kernel lets no Unix socket listen again.
        let address = listener.address.ok_or(io::ErrorKind::Unsupported)?;
        sys::listen::listen_again(&socket, &address, listener.backlog)?;
        if let Some(group) = &mut listener.group {
            group.readd(shard);
        }
        Ok(())
    }

    fn watch_hang_up(&self, handle: HandleId) {
        let listeners = self.listeners.borrow();
        let sockets = listeners.get(&handle).into_iter();
        for socket in sockets.flat_map(|listener| &listener.sockets) {
            if let Err(source) = socket.watch_hang_up() {
                let attempt = "watch a listener";
                let error = Error::Io { attempt, source };
                self.core.borrow_mut().error(None, error);
            }
        }
    }

    /// Connections have reached the selector of a sharded listener: its selection does not hold.
    pub(crate) fn selector_readable(&self, handle: HandleId) {
        let listeners = self.listeners.borrow();
        let group = listeners.get(&handle).and_then(|own| own.group.as_ref());
        let count = group.map_or(0, |group| group.reset(ACCEPT_BATCH));
        drop(listeners);
        self.decide().misdirected(handle, count);
        self.act();
    }

    /// The program lets go of a listener that it has kept.
    pub(crate) fn release(&self, handle: HandleId) {
        if self.poller.is_own() {
            self.decide().release(handle);
            self.act();
        } else {
            // The copies of this process.
            drop(self.listeners.borrow_mut().remove(&handle));
        }
    }

    /// A copy of the listener for a worker.
    fn share(&self, handle: HandleId, shard: usize) -> io::Result<OwnedFd> {
        match self.listeners.borrow().get(&handle) {
            Some(listener) => listener.get(shard)?.try_clone(),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// The same of a shard. Somebody who has left it may have been made not to wait for it.
    fn share_shard(&self, handle: HandleId, shard: usize) -> io::Result<OwnedFd> {
        let copy = self.share(handle, shard)?;
        sys::fd::set_nonblocking(copy.as_fd(), false)?;
        Ok(copy)
    }

    /// Makes a queue. Returns the worker's end.
    fn open_queue(&self, handle: HandleId, worker: WorkerId) -> io::Result<OwnedFd> {
        let queue = Queue::new()?;
        let theirs = queue.worker_end()?;
        self.queues.borrow_mut().insert((handle, worker), queue);
        Ok(theirs)
    }

    fn give(&self, handle: HandleId, worker: WorkerId, connection: Sequenced<NoLingerFd>) {
        self.fault("master.gives", worker);
        let given = match self.queues.borrow().get(&(handle, worker)) {
            Some(queue) => queue.send(connection.sequence, &connection.connection),
            None => Err(io::ErrorKind::NotFound.into()),
        };
        match given {
            // This process's own copy is closed here.
            Ok(()) => self.fault("master.has_given", worker),
            Err(source) => {
                let is_exhausted = sys::socket::is_exhaustion(&source);
                let mut core = self.decide();
                core.not_dispatched(handle, worker, connection, is_exhausted);
                if is_exhausted {
                    let worker = Some(worker);
                    core.error(worker, Error::Exhausted { worker, source });
                }
            }
        }
    }

    /// Closes a queue when nothing is left in it; if there are no descriptors, after a while.
    fn close_queue(&self, handle: HandleId, worker: WorkerId) {
        let mut queues = self.queues.borrow_mut();
        let mut core = self.decide();
        let Some(queue) = queues.get(&(handle, worker)) else {
            return core.queue_closed(handle, worker, Vec::new());
        };
        let (back, state) = reclaim(queue, usize::MAX);
        if state == QueueState::Empty {
            queues.remove(&(handle, worker));
            core.queue_closed(handle, worker, back);
        } else {
            core.reclaimed(handle, worker, back, false);
            let mut resting = self.resting.borrow_mut();
            resting.queues.push((handle, worker));
            resting.rest_from(self.began.elapsed());
        }
    }

    fn count(&self, handle: HandleId, worker: WorkerId) {
        let queues = self.queues.borrow();
        let queued = queues.get(&(handle, worker)).and_then(Queue::count);
        if let Some(queued) = queued {
            self.decide().counted(handle, worker, queued);
        }
    }

    /// How busy all are.
    pub(crate) fn loads(&self) -> Loads {
        self.count_all();
        let (workers, listeners) = self.core.borrow().loads();
        let own = self.listeners.borrow();
        let counted = listeners.into_iter().map(|(handle, mut load)| {
            let sockets = own.get(&handle).map_or(&[][..], |own| &own.sockets);
            let queued = sockets
                .iter()
                .map(|socket| sys::listen::backlog_length(socket));
            load.queued = queued.sum();
            load
        });
        Loads {
            workers,
            listeners: counted.collect(),
        }
    }

    /// Learns what busy workers have taken and not said yet.
    pub(crate) fn count_all(&self) {
        for (handle, worker) in self.queues.borrow().keys() {
            self.count(*handle, *worker);
        }
        self.act();
    }

    fn set_interest(&self, handle: HandleId, interest: Option<Interest>) {
        if let Some(listener) = self.listeners.borrow().get(&handle) {
            let set = listener
                .get(0)
                .and_then(|socket| socket.set_interest(interest));
            if let Err(source) = set {
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
        let listener = listeners.get(&handle).map(|own| own.get(0));
        let Some(Ok(socket)) = listener else {
            return;
        };
        let mut core = self.core.borrow_mut();
        let is_sole = core.is_sole(handle);
        if !is_sole {
            // Another owner may have cleared the flag, and accepting would wait. It cannot fail: the
            // descriptor is open.
            let _ = sys::fd::set_nonblocking(socket.as_fd(), true);
        }
        for _ in 0..at_most {
            let accepted = match is_sole {
                true => sys::listen::accept(&***socket),
                false => sys::listen::accept_if_ready(&***socket),
            };
            match accepted {
                Ok(stream) => core.accepted(handle, stream.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return core.drained(handle);
                }
                Err(error) if sys::listen::is_shutdown_error(&error) && core.is_ending(handle) => {
                    return core.drained(handle);
                }
                Err(error)
                    if sys::listen::is_shutdown_error(&error) && !core.is_borrowed(handle) =>
                {
                    drop((core, listeners));
                    let outcome = self.listen_again(handle, 0);
                    return self.decide().was_shut_down(handle, outcome);
                }
                Err(error) if sys::listen::is_connection_error(&error) => {}
                Err(error) => return core.accept_failed(handle, error),
            }
        }
        core.accept_done(handle);
    }

    fn flush(&self) {
        let next = || self.unflushed.borrow_mut().pop_front();
        while let Some(worker) = next() {
            let flushed = self.with_channel(worker, |channel| {
                let outcome = channel.flush();
                self.collect_receipts(worker, channel);
                self.note_writing(worker, channel.is_writing());
                outcome
            });
            self.fault("master.has_written", worker);
            match flushed {
                Some(Ok(Flushed::Exhausted(error))) => self.rest(worker, error),
                Some(Err(source)) => self.channel_failed(worker, source),
                Some(Ok(Flushed::Done)) | None => {}
            }
        }
    }

    fn note_writing(&self, worker: WorkerId, is_writing: bool) {
        let mut writing = self.writing.borrow_mut();
        if is_writing {
            writing.insert(worker);
        } else {
            writing.remove(&worker);
        }
    }

    /// Writes to this channel again after a while.
    fn rest(&self, worker: WorkerId, error: Option<io::Error>) {
        let mut resting = self.resting.borrow_mut();
        resting.channels.insert(worker);
        resting.rest_from(self.began.elapsed());
        drop(resting);
        if let Some(source) = error {
            let worker = Some(worker);
            let error = Error::Exhausted { worker, source };
            self.core.borrow_mut().error(worker, error);
        }
    }

    fn collect_receipts(&self, worker: WorkerId, channel: &mut Channel<ToMaster, ToWorker>) {
        let receipts = channel.take_receipts().into_iter();
        let receipts = receipts.map(|(id, written)| (worker, id, written));
        self.receipts.borrow_mut().extend(receipts);
    }

    pub(crate) fn count_receipts(&self) -> usize {
        self.receipts.borrow().len()
    }

    /// A message of which it is known now whether it has been written, and whether it has.
    pub(crate) fn next_receipt(&self) -> Option<(WorkerId, ReceiptId, bool)> {
        self.receipts.borrow_mut().pop_front()
    }

    /// Whether a message waits to be written.
    pub(crate) fn is_writing(&self) -> bool {
        !self.writing.borrow().is_empty() || !self.unflushed.borrow().is_empty()
    }

    /// Whether there is something to tell the program.
    pub(crate) fn has_notifications(&self) -> bool {
        self.core.borrow().has_events() || !self.receipts.borrow().is_empty()
    }

    /// A channel can be written to again.
    pub(crate) fn writable(&self, worker: WorkerId) {
        self.with_channel(worker, Channel::retry);
        self.unflushed.borrow_mut().push_back(worker);
    }

    /// Reads once from a worker's channel.
    fn receive(&self, worker: &WorkerIo) -> io::Result<Received> {
        let mut scratch = self.scratch.borrow_mut();
        let received = worker.with_channel(|channel| channel.receive(&mut scratch));
        received.unwrap_or(Ok(Received::Nothing))
    }

    /// Reads once from a worker's channel, and closes it at its end. Returns whether there is
    /// something to feed.
    pub(crate) fn read(&self, worker: &WorkerIo) -> bool {
        match self.receive(worker) {
            Ok(Received::Something) => return true,
            Ok(Received::Nothing) => {}
            Ok(Received::End) => self.channel_closed(worker.id),
            Err(source) => self.channel_failed(worker.id, source),
        }
        false
    }

    /// Feeds one frame that has arrived.
    pub(crate) fn feed(&self, worker_io: &WorkerIo) -> Processed {
        self.feed_with_fds(worker_io, &mut FdsLeft::Unlimited)
    }

    /// Feeds one frame that has arrived, without the descriptors that are too many.
    fn feed_with_fds(&self, worker_io: &WorkerIo, fds_left: &mut FdsLeft) -> Processed {
        let next = |channel: &mut Channel<_, _>| (channel.next(), channel.is_drained());
        let worker = worker_io.id;
        match worker_io.with_channel(next) {
            None | Some((Ok(None), _)) => Processed::Nothing,
            Some((
                Ok(Some(Arrival {
                    frame,
                    mut fds,
                    lost_fds,
                })),
                is_last,
            )) => {
                let lost_fds = fds_left.take(&mut fds) == Report::Loss || lost_fds;
                let fed = match (&frame, is_last) {
                    (ToMaster::Listen { .. }, _) => Processed::Yield,
                    (_, true) => Processed::Drained,
                    (_, false) => Processed::More,
                };
                // Nothing about a message depends on the time.
                let mut core = self.core.borrow_mut();
                if lost_fds {
                    core.error(Some(worker), Error::no_descriptors(Some(worker)));
                }
                match frame {
                    ToMaster::Message(bytes) => core.message(worker, bytes, fds),
                    frame @ (ToMaster::Online
                    | ToMaster::Listen { .. }
                    | ToMaster::Listening { .. }
                    | ToMaster::Idle { .. }
                    | ToMaster::Release { .. }
                    | ToMaster::DisconnectRequest
                    | ToMaster::Pause { .. }) => {
                        self.fault("master.has_decoded", worker);
                        core.set_time(self.began.elapsed());
                        core.frame(worker, frame);
                        self.fault("master.has_heard", worker);
                    }
                }
                fed
            }
            Some((Err(error), _)) => {
                self.decide().violation(worker, error);
                Processed::Nothing
            }
        }
    }

    /// More of this worker's frames have arrived than it may be heard in one turn.
    pub(crate) fn process_later(&self, worker: WorkerId) {
        self.pending.borrow_mut().insert(worker);
    }

    /// Whether there are frames of this worker's that have arrived and not been heard.
    pub(crate) fn is_pending(&self, worker: WorkerId) -> bool {
        self.pending.borrow().contains(&worker)
    }

    pub(crate) fn has_pending(&self) -> bool {
        !self.pending.borrow().is_empty()
    }

    /// Who is to be heard now, and not whoever becomes so meanwhile.
    pub(crate) fn pending(&self) -> Vec<WorkerId> {
        let pending = self.pending.borrow();
        // Most often nobody, and this is asked in each turn.
        if pending.is_empty() {
            return Vec::new();
        }
        pending.iter().copied().collect()
    }

    pub(crate) fn may_process(&self, worker: WorkerId) -> bool {
        self.pending.borrow_mut().remove(&worker)
    }

    /// Lets the worker write nothing more, and feeds what it has written. The events wait: this may be
    /// inside a call of the program's.
    fn hear_to_the_end(&self, worker: &WorkerIo) {
        worker.with_channel(Channel::shut);
        // What was read before may be half of it.
        let (mut left, mut fds_left) = (LAST_FRAMES, FdsLeft::AtMost(LAST_FDS));
        loop {
            while left > 0 && self.feed_with_fds(worker, &mut fds_left) != Processed::Nothing {
                left -= 1;
            }
            if left == 0 {
                let source = FrameError::State("left more unsaid than is listened to");
                self.decide().violation(worker.id, source);
            }
            let believed = self.core.borrow().is_connected(worker.id);
            if !believed || !matches!(self.receive(worker), Ok(Received::Something)) {
                break;
            }
        }
    }

    fn channel_failed(&self, worker: WorkerId, source: io::Error) {
        // One that asks and asks and never reads an answer may not care for the end either.
        let is_offence = source.kind() == io::ErrorKind::OutOfMemory;
        let error = Error::Channel {
            worker: Some(worker),
            source,
        };
        let mut core = self.decide();
        if is_offence {
            core.signal(worker, Signal::KILL);
        }
        core.error(Some(worker), error);
        // What it has said before still counts.
        core.close_channel(worker);
    }

    fn channel_closed(&self, worker: WorkerId) {
        self.drop_channel(worker);
        self.decide().channel_closed(worker);
    }

    fn drop_channel(&self, worker: WorkerId) {
        let Some(worker_io) = self.worker_io(worker) else {
            return;
        };
        if let Some(mut channel) = worker_io.channel.take() {
            channel.shut();
            self.collect_receipts(worker, &mut channel);
            self.note_writing(worker, false);
            channel.discard();
        }
        let is_reaped = self.core.borrow().exit_status(worker).is_some();
        if worker_io.process.borrow().is_none() && !is_reaped {
            self.unwatched_exits.borrow_mut().insert(worker);
        }
    }

    pub(crate) fn try_reap(&self, worker: WorkerId) {
        // A signal that waits is for the process, and not for whoever gets its number next.
        self.act();
        let Some(worker_io) = self.worker_io(worker) else {
            return;
        };
        let reaped = self.core.borrow().exit_status(worker).is_some();
        if reaped || worker_io.exit_report.get().is_some() {
            return;
        }
        let process = worker_io.process.borrow();
        let waited = worker_io.pid.try_wait(process.as_deref());
        drop(process);
        let end = match waited {
            Ok(None) => return self.reap_later(&worker_io),
            Ok(Some(end)) => end,
            Err(source) => {
                let error = Error::ExitStatus { worker, source };
                self.core.borrow_mut().error(Some(worker), error);
                Exit::unknown()
            }
        };
        drop(worker_io.process.take());
        self.unwatched_exits.borrow_mut().remove(&worker);
        worker_io.usage.set(end.usage);
        self.decide().exited(worker, end.status);
    }

    /// The process has no status for its parent. If its descriptor says that it has ended, it says so
    /// until the process is reaped: it is left alone for a while.
    fn reap_later(&self, worker_io: &WorkerIo) {
        let process = worker_io.process.borrow();
        let Some(process) = process.as_ref().filter(|process| process.is_watched()) else {
            return;
        };
        // It cannot fail: the descriptor is in the poller.
        let _ = process.set_interest(None);
        let mut resting = self.resting.borrow_mut();
        resting.processes.push(worker_io.id);
        resting.rest_from(self.began.elapsed());
    }

    /// Undoes `reap_later`.
    fn wait_for_end(&self, worker: WorkerId) {
        let Some(worker_io) = self.worker_io(worker) else {
            return;
        };
        let process = worker_io.process.borrow();
        let watched = process
            .as_ref()
            .map(|process| process.set_interest(Some(Interest::Readable)));
        if let Some(Err(source)) = watched {
            let attempt = "wait for the end of a worker";
            let error = Error::Io { attempt, source };
            self.core.borrow_mut().error(Some(worker), error);
            let mut resting = self.resting.borrow_mut();
            resting.processes.push(worker);
            resting.rest_from(self.began.elapsed());
        }
    }

    /// Whether a worker may end without anything to tell it: its channel is closed, only SIGCHLD is
    /// left, and somebody else has that.
    pub(crate) fn has_unwatched_exits(&self) -> bool {
        !self.unwatched_exits.borrow().is_empty() && !sys::signal::is_handled(sys::signal::CHLD)
    }

    /// The workers that may end like this.
    pub(crate) fn unwatched_exits(&self) -> Vec<WorkerId> {
        self.unwatched_exits.borrow().iter().copied().collect()
    }

    /// The workers whose end only SIGCHLD tells.
    pub(crate) fn unwatched(&self) -> Vec<WorkerId> {
        let workers = self.workers.borrow();
        let unwatched = workers
            .values()
            .filter(|worker_io| worker_io.process.borrow().is_none());
        unwatched.map(|worker_io| worker_io.id).collect()
    }

    /// Queues a message and writes what can be written. Returns whether the program may go on
    /// without a pause.
    pub(crate) fn send(
        &self,
        worker: &WorkerIo,
        message: &[u8],
        fds: Vec<OwnedFd>,
        receipt: Option<ReceiptId>,
    ) -> std::result::Result<bool, SendError> {
        let sent = worker.with_channel(|channel| {
            channel.send(message, fds, receipt)?;
            Ok(channel.is_settled())
        });
        let is_settled = sent.unwrap_or(Err(SendError::ChannelClosed))?;
        if is_settled {
            return Ok(true);
        }
        self.unflushed.borrow_mut().push_back(worker.id);
        self.act();
        Ok(worker.with_channel(|channel| channel.has_room()) == Some(true))
    }
}

/// What is left of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum QueueState {
    Empty,
    PerhapsMore,
    /// It cannot be looked at for lack of descriptors.
    Unknown,
}

/// Takes out so many connections.
fn reclaim(queue: &Queue, at_most: usize) -> (Vec<Sequenced<NoLingerFd>>, QueueState) {
    let mut back = Vec::new();
    while back.len() < at_most {
        match queue.reclaim() {
            Ok(Dequeued::Connection(sequence, connection)) => back.push(Sequenced {
                sequence,
                connection,
            }),
            Ok(Dequeued::Empty | Dequeued::Closed) => return (back, QueueState::Empty),
            Err(_) => return (back, QueueState::Unknown),
        }
    }
    (back, QueueState::PerhapsMore)
}

/// The program of a worker, without its descriptors.
fn program(settings: &Settings, env: SortedMap<OsString, OsString>) -> io::Result<Program> {
    let mut exec = settings.exec.clone().unwrap_or_default();
    let is_own = std::env::current_exe().is_ok_and(|own| own == exec);
    let own_name = std::env::args_os().next().filter(|_| is_own);
    let name = own_name.unwrap_or_else(|| exec.clone().into());
    if settings.cwd.is_some() {
        // It is relative to where the master is.
        exec = std::path::absolute(exec)?;
    }
    let exec_args = settings.exec_args.iter().flatten().cloned();
    let args = settings.args.iter().flatten().cloned();
    let args = std::iter::once(name).chain(exec_args).chain(args);
    let mut program = Program::new(exec.into(), args, env)?;
    surround(&mut program, settings)?;
    Ok(program)
}

/// Says where the worker runs, and as whom.
fn surround(program: &mut Program, settings: &Settings) -> io::Result<()> {
    if let Some(cwd) = &settings.cwd {
        program.cwd(cwd.clone().into())?;
    }
    program.identity(settings.uid, settings.gid);
    if settings.leads_session() {
        program.setsid();
    }
    Ok(())
}

/// What a worker gets as descriptors 0, 1 and so on, and the master's ends of the pipes.
#[derive(Default)]
struct Stdios {
    theirs: Vec<Option<OwnedFd>>,
    ours: SortedMap<usize, UnixStream>,
}

impl Stdios {
    fn new(settings: &Settings) -> io::Result<Self> {
        let wanted = settings.effective_stdio()?;
        let mut stdios = Self::default();
        // Where they all go there must be none of them before.
        let beyond = RawFd::try_from(wanted.len()).unwrap_or(RawFd::MAX);
        for (number, wanted) in wanted.into_iter().enumerate() {
            let away = |fd: OwnedFd| sys::fd::duplicate(fd.as_raw_fd(), beyond);
            let theirs = match wanted.0 {
                // Left as they are, open or not.
                StdioKind::Inherit if number <= 2 => None,
                StdioKind::Inherit => {
                    let number = RawFd::try_from(number).unwrap_or(RawFd::MAX);
                    Some(sys::fd::duplicate(number, beyond)?)
                }
                StdioKind::Null => {
                    let mut options = std::fs::File::options();
                    let null = options.read(true).write(true).open("/dev/null")?;
                    Some(away(null.into())?)
                }
                StdioKind::Pipe => {
                    let (ours, theirs) = UnixStream::pair()?;
                    stdios.ours.insert(number, ours);
                    Some(away(theirs.into())?)
                }
                StdioKind::Fd(fd) => Some(sys::fd::duplicate(fd.as_raw_fd(), beyond)?),
            };
            stdios.theirs.push(theirs);
        }
        Ok(stdios)
    }

    /// A number that none of them will have.
    fn beyond(&self) -> RawFd {
        RawFd::try_from(self.theirs.len()).map_or(RawFd::MAX, |count| count.max(3))
    }
}
