//! The worker's hands: carries out what [`WorkerCore`] decides, on the channel and on shared
//! listeners. Never calls the program.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::config::settings::SchedulingPolicy;
use crate::core::worker::{Action, Listen, ListenerId, WorkerCore};
use crate::error::{Error, Result, SendError};
use crate::runtime::event_loop::Token;
use crate::sys;
use crate::sys::bind::BoundSocket;
use crate::sys::fd::NoLingerFd;
use crate::sys::interruptible_accept::InterruptibleAccept;
use crate::sys::poll::{
    Interest, Poller, Registered, is_writable, wait_readable, wait_readable_or_writable,
};
use crate::sys::process::Pid;
use crate::sys::queue::{self, Dequeued};
use crate::sys::socket_file::SocketFile;
use crate::types::endpoint::Kind;
use crate::types::errno;
use crate::types::message::Message;
use crate::types::sorted_map::SortedMap;
use crate::types::time::Time;
use crate::wire::channel::inbox::{Arrival, READ_SIZE};
use crate::wire::channel::outbox::ReceiptId;
use crate::wire::channel::{BACKOFF, Channel, Flushed, Received};
use crate::wire::frame::{FrameError, ToMaster, ToWorker};

/// How long a worker that ends waits for the master to read its last words.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How many descriptors callbacks leave for the rest of the program, and for connections that are
/// on their way already. One that finds no free descriptor would be lost by the kernel.
const SPARE_FDS: u64 = 32;
/// The channel is the only one of its kind here.
const CHANNEL: u32 = 0;

/// A socket that this process has a copy of, or to itself.
#[derive(Debug)]
pub(crate) enum Socket {
    Listener(SharedListener),
    /// Out of which the master's connections are taken.
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

/// A listener of which others have copies.
#[derive(Debug)]
pub(crate) struct SharedListener {
    fd: OwnedFd,
    /// Whether accepting from it waits, for all who have it.
    blocks: Cell<bool>,
}

/// What belongs to a listener.
#[derive(Debug)]
struct Kept {
    /// Of a Unix path on which this worker listens alone. Dropped before the socket: as long as it is
    /// there, nobody else can have it.
    file: Option<SocketFile>,
    socket: Rc<Registered<Socket>>,
    owner: SocketOwner,
}

/// Whose a listener is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SocketOwner {
    /// The master opened it, and other workers may have copies.
    Master,
    /// This worker opened it. Copies that processes have which it forked end with it.
    ThisWorker,
    /// The application had it before, and any process may have a copy.
    Application,
}

/// What came of accepting from a listener or taking out of a queue.
pub(crate) struct Accepted {
    pub(crate) fd: OwnedFd,
    /// One more than the program wants.
    pub(crate) is_over: bool,
}

pub(crate) struct WorkerShell {
    pub(crate) core: RefCell<WorkerCore>,
    poller: Poller,
    /// `None` when it is closed.
    channel: RefCell<Option<Channel<ToWorker, ToMaster>>>,
    sockets: RefCell<SortedMap<ListenerId, Kept>>,
    /// How many descriptors the program had room for when it last set a callback.
    fd_limit: Cell<u64>,
    /// There has been none for a connection since the last one was taken.
    lacks_descriptors: Cell<bool>,
    began: Instant,
    /// Lets this process block in `accept`, once it has.
    interrupt: OnceCell<InterruptibleAccept>,
    /// Something waits for the system to have room again.
    rest_until: Cell<Option<Time>>,
    /// What went wrong outside any call of the program's.
    errors: RefCell<VecDeque<Error>>,
    /// Messages that have been written or lost.
    receipts: RefCell<VecDeque<(ReceiptId, bool)>>,
    /// What the channel reads into.
    scratch: RefCell<Vec<u8>>,
}

impl std::fmt::Debug for WorkerShell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerShell").finish_non_exhaustive()
    }
}

impl WorkerShell {
    /// Time is counted from `began`.
    pub(crate) fn new(channel: UnixStream, poller: Poller, began: Instant) -> io::Result<Self> {
        let channel = Channel::new(channel, &poller, Token::Channel(CHANNEL).key())?;
        let shell = Self {
            core: RefCell::new(WorkerCore::new()),
            poller,
            channel: RefCell::new(Some(channel)),
            sockets: RefCell::default(),
            fd_limit: Cell::new(u64::MAX),
            lacks_descriptors: Cell::new(false),
            began,
            interrupt: OnceCell::new(),
            rest_until: Cell::new(None),
            errors: RefCell::default(),
            receipts: RefCell::default(),
            scratch: RefCell::new(vec![0; READ_SIZE]),
        };
        shell.act();
        Ok(shell)
    }

    /// Whether there is something to tell that is not an event of the core's.
    pub(crate) fn has_notifications(&self) -> bool {
        self.count_news() != (0, 0)
    }

    /// Whether something waits to be written.
    pub(crate) fn is_writing(&self) -> bool {
        let channel = self.channel.borrow();
        channel.as_ref().is_some_and(Channel::is_writing)
    }

    /// How many errors there are to tell, and how many messages that have been written or lost.
    pub(crate) fn count_news(&self) -> (usize, usize) {
        (self.errors.borrow().len(), self.receipts.borrow().len())
    }

    /// A message of which it is known now whether it has been written.
    pub(crate) fn next_receipt(&self) -> Option<(ReceiptId, Result<()>)> {
        let (id, written) = self.receipts.borrow_mut().pop_front()?;
        let lost = || Error::Send {
            worker: None,
            reason: SendError::ChannelClosed,
        };
        Some((id, written.then_some(()).ok_or_else(lost)))
    }

    pub(crate) fn next_error(&self) -> Option<Error> {
        self.errors.borrow_mut().pop_front()
    }

    pub(crate) fn report(&self, error: Error) {
        self.errors.borrow_mut().push_back(error);
    }

    /// Tries again after a while what the system has no room for.
    fn rest(&self) {
        let until = self.rest_until.get();
        let until = until.unwrap_or_else(|| self.began.elapsed().saturating_add(BACKOFF));
        self.rest_until.set(Some(until));
    }

    /// When `tick` is needed at the latest.
    pub(crate) fn deadline(&self) -> Option<Time> {
        self.rest_until.get()
    }

    /// Time has passed.
    pub(crate) fn tick(&self) {
        let is_over = |until: Time| until <= self.began.elapsed();
        if self.rest_until.get().is_some_and(is_over) {
            self.rest_until.set(None);
            self.core.borrow_mut().rested();
            self.act();
            self.flush_channel();
        }
    }

    pub(crate) fn socket(&self, listener: ListenerId) -> Option<Rc<Registered<Socket>>> {
        let sockets = self.sockets.borrow();
        sockets.get(&listener).map(|kept| Rc::clone(&kept.socket))
    }

    pub(crate) fn send(
        &self,
        message: &[u8],
        fds: Vec<OwnedFd>,
        receipt: Option<ReceiptId>,
    ) -> Result<bool> {
        if !self.poller.is_own() {
            return Err(Error::ForeignProcess);
        }
        let failed = |reason| Error::Send {
            worker: None,
            reason,
        };
        let mut channel = self.channel.borrow_mut();
        let Some(channel) = channel.as_mut() else {
            return Err(failed(SendError::ChannelClosed));
        };
        let sent = channel.send(message, fds, receipt);
        sent.map_err(failed)?;
        if !channel.is_settled() {
            self.flush(channel);
        }
        Ok(channel.has_room())
    }

    /// Waits for the channel, the poller, and a listener's socket if there is one; reads from the
    /// channel what has come. Returns whether the poller has something.
    pub(crate) fn wait(
        &self,
        poller: BorrowedFd<'_>,
        socket: Option<&Socket>,
        timeout: Option<Duration>,
    ) -> Result<bool> {
        let waited = match (self.channel.borrow().as_ref(), socket) {
            (None, _) => Ok([false; 2]),
            (Some(channel), None) => wait_readable([channel.as_fd(), poller], timeout),
            (Some(channel), Some(socket)) => {
                wait_readable([channel.as_fd(), poller, socket.as_fd()], timeout)
                    .map(|[channel, poller, _]| [channel, poller])
            }
        };
        let [channel, poller] = waited.map_err(Error::io("wait for a connection"))?;
        if channel {
            self.receive();
        }
        Ok(poller)
    }

    /// A point at which tests make this worker fail.
    pub(crate) fn fault(&self, name: &str) {
        if let Some(channel) = self.channel.borrow().as_ref() {
            fault(name, channel);
        }
    }

    /// Carries out everything that needs no callback.
    pub(crate) fn act(&self) {
        if self.core.borrow().has_actions() {
            self.carry_all_out();
        }
    }

    /// Not a part of `act`, which most often finds nothing, several times for each message.
    #[inline(never)]
    fn carry_all_out(&self) {
        let mut sent = false;
        let is_own = self.poller.is_own();
        loop {
            let action = self.core.borrow_mut().next_action();
            match action {
                // These concern the process that has created it. This one closes its copies.
                Some(Action::Send(_) | Action::AttachSynFilter(_) | Action::CloseChannel)
                    if !is_own => {}
                Some(Action::Send(frame)) => {
                    sent = true;
                    if let Some(channel) = self.channel.borrow_mut().as_mut() {
                        channel.queue(&frame, None);
                    }
                }
                Some(Action::CloseListener(listener)) => self.close_socket(listener),
                Some(Action::AttachSynFilter(listener)) => self.attach_syn_filter(listener),
                Some(Action::CloseChannel) => {
                    sent = true;
                    if let Some(channel) = self.channel.borrow_mut().as_mut() {
                        channel.close();
                    }
                }
                None => break,
            }
        }
        if sent {
            self.flush_channel();
        }
    }

    pub(crate) fn flush_channel(&self) {
        if let Some(channel) = self.channel.borrow_mut().as_mut() {
            channel.retry();
            self.flush(channel);
        }
    }

    /// Writes what can be written, and tells the core if that was everything.
    fn flush(&self, channel: &mut Channel<ToWorker, ToMaster>) {
        fault("worker.writes", channel);
        let flushed = channel.flush();
        fault("worker.has_written", channel);
        match flushed {
            Ok(Flushed::Done) => {}
            Ok(Flushed::Exhausted(error)) => {
                self.rest();
                let worker = None;
                let error = error.map(|source| Error::Exhausted { worker, source });
                self.errors.borrow_mut().extend(error);
            }
            Err(source) => {
                let worker = None;
                self.report(Error::Channel { worker, source });
                // Reading finds the end now, and all comes to its end.
                channel.shut();
            }
        }
        for receipt in channel.take_receipts() {
            self.receipts.borrow_mut().push_back(receipt);
        }
    }

    /// Reads once from the channel and feeds the frames.
    pub(crate) fn receive(&self) -> Received {
        let mut channel = self.channel.borrow_mut();
        let mut scratch = self.scratch.borrow_mut();
        let received = channel
            .as_mut()
            .map(|channel| channel.receive(&mut scratch));
        drop((channel, scratch));
        let received = match received {
            None => return Received::Nothing,
            Some(Ok(received)) => received,
            Some(Err(source)) => {
                let worker = None;
                self.report(Error::Channel { worker, source });
                Received::End
            }
        };
        if received == Received::Something {
            self.fault("worker.has_received");
            while self.feed() {}
        }
        if received == Received::End {
            self.cut_off();
        }
        received
    }

    /// Feeds one frame that has arrived. Returns whether there may be more.
    fn feed(&self) -> bool {
        let next = |channel: &mut Channel<_, _>| (channel.next(), channel.is_drained());
        let next = self.channel.borrow_mut().as_mut().map(next);
        let (outcome, is_last) = match next {
            None | Some((Ok(None), _)) => return false,
            Some((Ok(Some(arrival)), is_last)) => (self.understand(arrival), is_last),
            Some((Err(error), _)) => (Err(error), true),
        };
        match outcome {
            Ok(()) => {
                self.act();
                !is_last
            }
            Err(source) => {
                let worker = None;
                self.report(Error::Frame { worker, source });
                self.cut_off();
                false
            }
        }
    }

    fn understand(&self, arrival: Arrival<ToWorker>) -> std::result::Result<(), FrameError> {
        let Arrival {
            frame,
            fds,
            lost_fds,
        } = arrival;
        let mut core = self.core.borrow_mut();
        if lost_fds {
            self.report(Error::no_descriptors(None));
            self.rest();
            if let ToWorker::Reply {
                request,
                result: Ok(bound),
            } = &frame
            {
                return core.listener_lost(*request, bound.handle);
            }
        }
        match frame {
            ToWorker::Message(bytes) => core.message(Message::new(bytes, fds)),
            ToWorker::Reply { ref result, .. } => {
                // What the master binds for workers that accept for themselves waits, unless one of
                // them has changed that.
                let blocks = result
                    .as_ref()
                    .is_ok_and(|bound| bound.policy != SchedulingPolicy::RoundRobin);
                let listener = core.frame(frame)?;
                drop(core);
                let fd = fds.into_iter().next().map(NoLingerFd::into_owned_fd);
                if let (Some(listener), Some(fd)) = (listener, fd) {
                    self.adopt(listener, fd, blocks);
                }
            }
            ToWorker::ListenerClosed { .. } | ToWorker::Disconnect => {
                core.frame(frame)?;
            }
        }
        Ok(())
    }

    /// Whether the channel wakes the poller. In `accept` it is waited for beside the poller, which
    /// would otherwise be ready each time the channel is.
    pub(crate) fn read_by_poller(&self, by_poller: bool) -> Result<()> {
        match self.channel.borrow_mut().as_mut() {
            Some(channel) => channel
                .wait_to_read(by_poller)
                .map_err(Error::io("wait for the channel")),
            None => Ok(()),
        }
    }

    /// Keeps the copy of a shared listener or socket, or the end of a queue.
    fn adopt(&self, listener: ListenerId, fd: OwnedFd, blocks: bool) {
        if let Err(source) = self.keep(listener, fd, blocks, (None, SocketOwner::Master)) {
            let attempt = "wait for a shared listener";
            self.report(Error::Io { attempt, source });
            self.core.borrow_mut().close(listener);
        }
    }

    fn keep(
        &self,
        listener: ListenerId,
        fd: OwnedFd,
        blocks: bool,
        (file, owner): (Option<SocketFile>, SocketOwner),
    ) -> io::Result<()> {
        let core = self.core.borrow();
        let socket = if core.is_datagram(listener) {
            Socket::Datagrams(fd.into())
        } else if core.has_queue(listener) {
            Socket::Queue(fd)
        } else {
            let blocks = Cell::new(blocks);
            Socket::Listener(SharedListener { fd, blocks })
        };
        drop(core);
        let key = Token::Listener(listener.0).key();
        let kept = Kept {
            file,
            socket: Rc::new(self.poller.add(socket, key, None)?),
            owner,
        };
        self.sockets.borrow_mut().insert(listener, kept);
        Ok(())
    }

    /// Keeps a socket of which the master knows nothing. A worker that leaves gets a listener that has
    /// ended.
    pub(crate) fn keep_alone(
        &self,
        kind: Kind,
        bound: BoundSocket,
        owner: SocketOwner,
    ) -> io::Result<ListenerId> {
        let listener = self.core.borrow_mut().listen_alone(kind);
        if !self.core.borrow().is_leaving() {
            let kept = self.keep(listener, bound.socket, false, (bound.file, owner));
            kept.inspect_err(|_| self.close(listener))?;
        }
        Ok(listener)
    }

    fn close_socket(&self, listener: ListenerId) {
        let kept = self.sockets.borrow_mut().remove(&listener);
        if let (Some(interrupt), Some(kept)) = (self.interrupt.get(), &kept) {
            // It cannot fail: both descriptors are open.
            let _ = interrupt.release(kept.socket.as_fd());
        }
        let own = kept.filter(|kept| kept.owner == SocketOwner::ThisWorker);
        if let Some(kept) = own.filter(|_| self.poller.is_own()) {
            if let Socket::Listener(own) = &**kept.socket {
                // A process that this one has forked may have a copy: clients would wait there for ever.
                sys::listen::shut_down(&own.fd);
            }
        }
    }

    /// Where it cannot be done, the backlog is emptied with the door open. So is one that others
    /// have, too: it would be shut for them as well.
    fn attach_syn_filter(&self, listener: ListenerId) {
        let mut sockets = self.sockets.borrow_mut();
        let kept = sockets.get_mut(&listener);
        let Some(kept) = kept.filter(|kept| kept.owner == SocketOwner::ThisWorker) else {
            return;
        };
        let was_path = kept.file.take().is_some();
        match &**kept.socket {
            Socket::Listener(own) if was_path => sys::listen::shut_down(&own.fd),
            Socket::Listener(own) => drop(sys::filter::attach_syn_filter(&own.fd)),
            Socket::Queue(_) | Socket::Datagrams(_) => {}
        }
    }

    fn cut_off(&self) {
        if let Some(mut channel) = self.channel.take() {
            channel.shut();
            for receipt in channel.take_receipts() {
                self.receipts.borrow_mut().push_back(receipt);
            }
        }
        self.core.borrow_mut().channel_closed();
        self.act();
    }

    /// Waits until the master has answered. Events wait meanwhile.
    pub(crate) fn wait_for_answer(
        &self,
        listener: ListenerId,
    ) -> Result<io::Result<Option<SocketAddr>>> {
        loop {
            self.act();
            match self.core.borrow().listen_result(listener) {
                Listen::Done(address) => return Ok(Ok(address)),
                Listen::Failed(errno) => return Ok(Err(io::Error::from_raw_os_error(errno))),
                Listen::Pending => {}
            }
            self.wait_for_channel()?;
        }
    }

    /// Waits until something has come by the channel. Events wait meanwhile.
    fn wait_for_channel(&self) -> Result<()> {
        let waited = match self.channel.borrow().as_ref() {
            Some(channel) if channel.is_flushed() => {
                wait_readable([channel.as_fd()], None).map(drop)
            }
            Some(channel) if channel.is_exhausted() => {
                wait_readable([channel.as_fd()], Some(BACKOFF)).map(drop)
            }
            Some(channel) => wait_readable_or_writable(channel.as_fd()),
            None => Ok(()),
        };
        waited.map_err(Error::io("wait for the master"))?;
        self.flush_channel();
        self.receive();
        Ok(())
    }

    /// Takes the next connection out of the queue or accepts it from the listener, if there is one.
    /// A listener that is ending closes when there is none.
    pub(crate) fn try_accept(&self, listener: ListenerId) -> Result<Option<Accepted>> {
        let Some(socket) = self.socket(listener).filter(|socket| socket.is_own()) else {
            return Ok(None);
        };
        let taken = match &**socket {
            Socket::Listener(shared) => self.try_shared(listener, &shared.fd)?,
            Socket::Queue(queue) => self.try_queue(queue)?,
            Socket::Datagrams(_) => None,
        };
        if let Some(fd) = taken {
            return Ok(Some(self.accepted(listener, fd)));
        }
        let mut core = self.core.borrow_mut();
        if !core.is_ending(listener) {
            core.found_empty(listener);
        } else if !core.leaves_to_others(listener) {
            core.close(listener);
        }
        drop(core);
        self.act();
        Ok(None)
    }

    /// The program gets a connection.
    fn accepted(&self, listener: ListenerId, fd: OwnedFd) -> Accepted {
        let mut core = self.core.borrow_mut();
        let is_over = core.connection_opened(listener);
        if core.has_queue(listener) {
            self.count_descriptors(&mut core, &fd);
        }
        drop(core);
        self.act();
        Accepted { fd, is_over }
    }

    /// Whether accepting from this listener waits.
    pub(crate) fn blocks(&self, listener: ListenerId) -> bool {
        let socket = self.socket(listener);
        let socket = socket.as_deref().map(|registered| &**registered);
        matches!(socket, Some(Socket::Listener(shared)) if shared.blocks.get())
    }

    /// From now on accepting from this listener waits no more, for nobody who has it.
    pub(crate) fn unblock(&self, listener: ListenerId) -> Result<()> {
        let socket = self.socket(listener).filter(|socket| socket.is_own());
        if let Some(Socket::Listener(shared)) = socket.as_deref().map(|socket| &**socket) {
            if shared.blocks.replace(false) {
                sys::fd::set_nonblocking(shared.fd.as_fd(), true)
                    .map_err(Error::io("change a shared listener"))?;
            }
        }
        Ok(())
    }

    /// Makes that the channel, and `signals`, interrupt who waits in `accept`.
    /// Returns whether they have not done so before: what has come by them has to be looked for.
    pub(crate) fn prepare_to_block(&self, signals: BorrowedFd<'_>) -> io::Result<bool> {
        let is_new = self.interrupt.get().is_none();
        if is_new {
            let interrupt = InterruptibleAccept::new()?;
            interrupt.add(signals)?;
            if let Some(channel) = self.channel.borrow().as_ref() {
                interrupt.add(channel.as_fd())?;
            }
            let _ = self.interrupt.set(interrupt);
            // The kernel tells of room only to whom it has refused some since.
            self.flush_channel();
        }
        Ok(is_new)
    }

    /// Whether there is something to read or to write on the channel; it is read or written then.
    /// As long as there is, `accept_blocking` would not be interrupted by it.
    pub(crate) fn process_frames(&self) -> Result<bool> {
        let channel = self.channel.borrow();
        // What the system has no room for is tried again by `tick`.
        let waits = channel.as_ref();
        let waits = waits.filter(|channel| channel.is_writing() && !channel.is_exhausted());
        let writable = waits.map(|channel| is_writable(channel.as_fd()));
        drop(channel);
        let writable = writable.transpose();
        if writable.map_err(Error::io("wait for the channel"))? == Some(true) {
            self.flush_channel();
            return Ok(true);
        }
        Ok(self.receive() != Received::Nothing)
    }

    /// Waits in `accept`. `None` if something else has happened, or the time has come, or if
    /// the listener turns out not to block.
    pub(crate) fn accept_blocking(
        &self,
        listener: ListenerId,
        deadline: Option<Time>,
    ) -> Result<Option<Accepted>> {
        let socket = self.socket(listener);
        let socket = socket.as_deref().map(|socket| &**socket);
        let (Some(Socket::Listener(shared)), Some(interrupt)) = (socket, self.interrupt.get())
        else {
            return Ok(None);
        };
        // A deadline that the clock never reaches is none.
        let deadline = deadline.and_then(|deadline| self.began.checked_add(deadline));
        match interrupt.accept(shared.fd.as_fd(), deadline) {
            Ok(fd) => Ok(fd.map(|fd| self.accepted(listener, fd))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                shared.blocks.set(false);
                Ok(None)
            }
            Err(error) if sys::listen::is_connection_error(&error) => Ok(None),
            Err(source) => {
                let attempt = "accept a connection";
                Err(Error::Io { attempt, source })
            }
        }
    }

    /// Whether accepting failed because another process has shut down a TCP listener of the master's,
    /// which makes it listen again.
    pub(crate) fn listens_again(&self, listener: ListenerId, error: &Error) -> bool {
        let Error::Io { source, .. } = error else {
            return false;
        };
        let sockets = self.sockets.borrow();
        let kept = sockets.get(&listener);
        let Some(kept) = kept.filter(|kept| kept.owner == SocketOwner::Master) else {
            return false;
        };
        let Socket::Listener(shared) = &**kept.socket else {
            return false;
        };
        sys::listen::is_shutdown_error(source) && sys::listen::local_addr(&shared.fd).is_some()
    }

    fn try_shared(&self, listener: ListenerId, shared: &OwnedFd) -> Result<Option<OwnedFd>> {
        loop {
            // Any process that has a copy may have cleared the flag, and accepting would wait. It cannot
            // fail: the descriptor is open.
            let _ = sys::fd::set_nonblocking(shared.as_fd(), true);
            match sys::listen::accept(shared) {
                Ok(fd) => return Ok(Some(fd)),
                Err(error) if sys::listen::is_connection_error(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(source) => {
                    let is_ending = self.core.borrow().is_ending(listener);
                    if is_ending && sys::listen::is_shutdown_error(&source) {
                        return Ok(None);
                    }
                    let attempt = "accept a connection";
                    return Err(Error::Io { attempt, source });
                }
            }
        }
    }

    fn try_queue(&self, queue: &OwnedFd) -> Result<Option<OwnedFd>> {
        match queue::receive(queue.as_fd()) {
            Ok(Dequeued::Connection(_, connection)) => {
                self.lacks_descriptors.set(false);
                Ok(Some(connection.into_owned_fd()))
            }
            // The master has let go of it; what becomes of this worker the channel tells.
            Ok(Dequeued::Empty | Dequeued::Closed) => Ok(None),
            Err(source) if source.raw_os_error() == Some(errno::EMFILE) => {
                if !self.lacks_descriptors.replace(true) {
                    self.report(Error::no_descriptors(None));
                }
                self.core.borrow_mut().descriptors_lack();
                self.rest();
                Ok(None)
            }
            Err(source) => {
                let attempt = "take a connection";
                Err(Error::Io { attempt, source })
            }
        }
    }

    /// The kernel gives out the lowest number that is free: it tells how many are.
    fn count_descriptors(&self, core: &mut WorkerCore, fd: &OwnedFd) {
        let Ok(number) = u64::try_from(fd.as_raw_fd()) else {
            return;
        };
        let limit = self.fd_limit.get();
        if number + SPARE_FDS > limit {
            core.descriptors_run_out();
        } else if number + 2 * SPARE_FDS <= limit {
            core.descriptors_suffice();
        }
    }

    /// Receives a datagram, if there is one.
    pub(crate) fn try_receive(
        &self,
        listener: ListenerId,
        buffer: &mut [u8],
    ) -> Result<Option<(usize, SocketAddr)>> {
        let socket = self.socket(listener).filter(|socket| socket.is_own());
        let Some(Socket::Datagrams(socket)) = socket.as_deref().map(|socket| &**socket) else {
            return Ok(None);
        };
        match socket.recv_from(buffer) {
            Ok(received) => Ok(Some(received)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(source) => {
                let attempt = "receive a datagram";
                Err(Error::Io { attempt, source })
            }
        }
    }

    /// The same, into a buffer that is long enough for any.
    pub(crate) fn try_receive_any(
        &self,
        listener: ListenerId,
    ) -> Result<Option<(Vec<u8>, SocketAddr)>> {
        let mut scratch = self.scratch.borrow_mut();
        let received = self.try_receive(listener, &mut scratch)?;
        Ok(received.map(|(length, from)| (scratch[..length].to_vec(), from)))
    }

    /// Sends the connections of a listener to a callback from now on.
    pub(crate) fn serve(&self, listener: ListenerId) {
        self.fd_limit.set(sys::fd::limit());
        if let Err(error) = self.unblock(listener) {
            self.report(error);
        }
        self.core.borrow_mut().serve(listener);
        self.act();
        self.watch_if_wanted(listener);
    }

    /// Whether a shared listener wakes the poller.
    pub(crate) fn watch(&self, listener: ListenerId, watch: bool) {
        let interest = watch.then_some(Interest::Readable);
        let shared = self.socket(listener);
        if let Some(Err(source)) = shared.map(|shared| shared.set_interest(interest)) {
            let attempt = "wait for a shared listener";
            self.report(Error::Io { attempt, source });
        }
    }

    pub(crate) fn close(&self, listener: ListenerId) {
        self.core.borrow_mut().forget(listener);
        self.act();
    }

    pub(crate) fn connection_closed(&self, listener: Option<ListenerId>) {
        self.core.borrow_mut().connection_closed(listener);
    }

    /// Makes a listener with a callback wake the poller as long as the program wants more.
    pub(crate) fn watch_if_wanted(&self, listener: ListenerId) {
        let core = self.core.borrow();
        let wanted = core.is_served(listener) && !core.leaves_to_others(listener);
        drop(core);
        self.watch(listener, wanted);
    }
}

fn fault(name: &str, channel: &Channel<ToWorker, ToMaster>) {
    crate::runtime::fault::point(name, || Some(Pid::own()), Some(channel));
}

impl Drop for WorkerShell {
    fn drop(&mut self) {
        if let Some(channel) = self.channel.borrow_mut().as_mut() {
            channel.flush_blocking(LAST_WORDS);
        }
    }
}
