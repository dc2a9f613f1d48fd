//! Carries out the decisions of [`WorkerCore`] on the channel and on this worker's sockets. The
//! shell never calls the application.
//!
//! This file contains the shell's state, the core's actions, and notifications. Methods for the
//! application belong in `worker`, and decisions in `core`.

mod accept;
mod channel;
mod lingering;
mod parked;
mod sockets;
mod std_listener;

pub(crate) use accept::{Accepted, Blocked};
pub(crate) use parked::{Origin, Registration, StreamOptions};
pub(crate) use sockets::{Socket, SocketOwner};

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use crate::core::worker::{Action, ListenerId, WorkerCore};
use crate::error::Error;
use crate::runtime::backoff::Backoff;
use crate::runtime::token::Token;
use crate::sys;
use crate::sys::channel::AdoptedChannel;
use crate::sys::fd::NoLingerFd;
use crate::sys::interruptible_accept::InterruptibleAccept;
use crate::sys::poll::Poller;
use crate::sys::shared_number::Writer;
use crate::types::connection_id::ConnectionMap;
use crate::types::sorted_map::SortedMap;
use crate::types::time::{Time, earlier};
use crate::wire::channel::Channel;
use crate::wire::driver::ChannelDriver;
use crate::wire::frame::{ToMaster, ToWorker};
use crate::wire::receipts::Receipt;
use crate::worker::disconnect_token::DisconnectToken;
use lingering::Lingering;
use parked::{ParkedConnection, Turn};
use sockets::SocketEntry;
use std_listener::StdSockets;

/// Maximum time that an exiting worker waits for the channel to accept its final frames.
///
/// With a shorter time, the frames may be lost if the master is busy. With a longer time, a stuck
/// master delays the worker's exit. A worker must not outlive its master by more than one second.
const SHUTDOWN_FLUSH: Duration = Duration::from_secs(1);
/// The channel's number in its `Token`. Any fixed number works, because a worker has only one
/// channel.
const CHANNEL: u32 = 0;

pub(crate) struct WorkerShell {
    pub(crate) core: RefCell<WorkerCore<Vec<NoLingerFd>>>,
    poller: Poller,
    channel: ChannelDriver<ToWorker, ToMaster>,
    pub(crate) disconnect_token: DisconnectToken,
    /// The number that shows the master how many connections the application has open (see
    /// `publish_in_service`). `None` if the system does not support such a number.
    in_service: Option<Writer>,
    sockets: RefCell<SortedMap<ListenerId, SocketEntry>>,
    /// The process's descriptor limit when the application last set a callback. Before the first
    /// callback, the value is `u64::MAX`, so that descriptors never count as scarce.
    fd_limit: Cell<u64>,
    /// Whether the last attempt to receive a connection failed for lack of descriptors.
    is_out_of_fds: Cell<bool>,
    start: Instant,
    /// Interrupts this process when it blocks in `accept`. Empty until `prepare_to_block` creates
    /// it.
    interrupt: OnceCell<InterruptibleAccept>,
    backoff: Cell<Backoff>,
    /// The connections that this worker holds while their clients send nothing.
    parked: RefCell<ConnectionMap<ParkedConnection>>,
    /// The finished connections whose clients may still be sending.
    lingering: RefCell<ConnectionMap<Lingering>>,
    turn: Cell<Turn>,
    std_sockets: RefCell<StdSockets>,
    /// Whether a connection was parked since the last check of the poller. Its data may have arrived
    /// before it could interrupt `accept`, so the worker checks the poller once more before it blocks.
    has_newly_parked: Cell<bool>,
    /// Errors that no call of the application could return and that have not been delivered.
    errors: RefCell<VecDeque<Error>>,
    /// Receipts that have not been delivered to the application.
    receipts: RefCell<VecDeque<Receipt>>,
    /// The buffer into which the channel reads.
    scratch: RefCell<Vec<u8>>,
    /// The buffer into which UDP sockets read, empty until the first datagram.
    datagram: RefCell<Vec<u8>>,
}

impl std::fmt::Debug for WorkerShell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerShell").finish_non_exhaustive()
    }
}

impl WorkerShell {
    /// Returns the shell of a new worker. `start` is the origin of [`Time`].
    pub(crate) fn new(channel: AdoptedChannel, poller: Poller, start: Instant) -> io::Result<Self> {
        let AdoptedChannel {
            stream,
            token,
            shared_number,
        } = channel;
        let channel = Channel::new(stream, &poller, Token::Channel(CHANNEL).key())?;
        let mut core = WorkerCore::new();
        // Leave the other half of the descriptors to the application.
        let limit = usize::try_from(sys::fd::limit()).unwrap_or(usize::MAX);
        core.set_parked_limit(limit / 2);
        let shell = Self {
            core: RefCell::new(core),
            poller,
            channel: ChannelDriver::new(None, Some(channel)),
            disconnect_token: DisconnectToken::new(token.into()),
            in_service: shared_number.and_then(Writer::new),
            sockets: RefCell::default(),
            fd_limit: Cell::new(u64::MAX),
            is_out_of_fds: Cell::new(false),
            start,
            interrupt: OnceCell::new(),
            backoff: Cell::default(),
            parked: RefCell::default(),
            lingering: RefCell::default(),
            turn: Cell::new(Turn::Parked),
            std_sockets: RefCell::default(),
            has_newly_parked: Cell::new(false),
            errors: RefCell::default(),
            receipts: RefCell::default(),
            scratch: RefCell::default(),
            datagram: RefCell::default(),
        };
        shell.publish_in_service();
        shell.act();
        Ok(shell)
    }

    /// Returns whether an error or a receipt waits for the application.
    pub(crate) fn has_notifications(&self) -> bool {
        self.count_errors() > 0 || self.count_receipts() > 0
    }

    pub(crate) fn count_errors(&self) -> usize {
        self.errors.borrow().len()
    }

    pub(crate) fn count_receipts(&self) -> usize {
        self.receipts.borrow().len()
    }

    pub(crate) fn next_error(&self) -> Option<Error> {
        self.errors.borrow_mut().pop_front()
    }

    pub(crate) fn next_receipt(&self) -> Option<Receipt> {
        self.receipts.borrow_mut().pop_front()
    }

    pub(crate) fn report(&self, error: Error) {
        self.errors.borrow_mut().push_back(error);
    }

    fn report_io(&self, attempt: &'static str, reason: io::Error) {
        self.report(Error::Io { attempt, reason });
    }

    /// Returns the time on the clock of this worker's deadlines.
    pub(crate) fn now(&self) -> Time {
        self.start.elapsed()
    }

    /// Schedules a retry of the steps for which the system lacks resources.
    fn back_off(&self) {
        let mut backoff = self.backoff.get();
        backoff.start(self.now());
        self.backoff.set(backoff);
    }

    /// Returns the time by which `tick` must be called.
    pub(crate) fn deadline(&self) -> Option<Time> {
        let parked = self.core.borrow().parked_deadline();
        let deadline = earlier(self.backoff.get().deadline(), parked);
        earlier(deadline, self.std_deadline())
    }

    /// Carries out the retries and checks that are due, and closes the parked connections that have
    /// expired.
    pub(crate) fn tick(&self) {
        self.check_std_sockets();
        if self.core.borrow().parked_deadline().is_some() {
            self.expire_parked();
        }
        let backoff = self.backoff.get().deadline();
        if backoff.is_some() && self.backoff.get().is_due(self.now()) {
            self.backoff.take();
            self.core.borrow_mut().backoff_elapsed();
            self.act();
            self.flush_channel();
        }
    }

    /// Carries out all actions and flushes the channel. The method calls no callbacks.
    pub(crate) fn act(&self) {
        if self.core.borrow().has_actions() {
            self.carry_out_actions();
        }
    }

    /// Carries out the actions and flushes the channel. The method is separate from `act` and not
    /// inlined, so that `act` stays small. `act` is called several times for each message and
    /// usually finds nothing to do.
    #[inline(never)]
    fn carry_out_actions(&self) {
        let mut must_flush = false;
        let is_own = self.poller.is_own();
        loop {
            let action = self.core.borrow_mut().next_action();
            match action {
                // A foreign process only closes its copies of the sockets, because the other
                // actions concern the process that created the worker.
                Some(
                    Action::Send(_)
                    | Action::AttachSynFilter(_)
                    | Action::SendLeaving
                    | Action::CloseChannel
                    | Action::MarkDisconnecting,
                ) if !is_own => {}
                Some(Action::Send(frame)) => {
                    must_flush = true;
                    self.channel.queue(&frame, None);
                }
                Some(Action::CloseListener(listener)) => self.close_socket(listener),
                Some(Action::AttachSynFilter(listener)) => self.attach_syn_filter(listener),
                Some(Action::CloseParked(id)) => self.close_parked(id),
                Some(Action::SendLeaving) => must_flush |= self.send_leaving(),
                Some(Action::CloseChannel) => {
                    must_flush = true;
                    self.channel.with(Channel::close);
                }
                Some(Action::MarkDisconnecting) => self.disconnect_token.mark(),
                None => break,
            }
        }
        if must_flush {
            self.flush_channel();
        }
    }
}

impl Drop for WorkerShell {
    fn drop(&mut self) {
        if self.poller.is_own() {
            self.core.borrow_mut().release_parked();
        }
        let start = Instant::now();
        loop {
            let has_more = self.send_leaving();
            let left = SHUTDOWN_FLUSH.saturating_sub(start.elapsed());
            self.channel.with(|channel| channel.flush_blocking(left));
            if !has_more || left.is_zero() {
                break;
            }
        }
        if self.poller.is_own() {
            // An error means that the system lacks resources. The connections then close at once.
            let _ = self.wait_for_lingering();
        }
    }
}
