//! Carries out what [`WorkerCore`] decides, on the channel and on the sockets of this worker. Never
//! calls the application.
//!
//! This file has the shell's state, the actions of the core, and notifications. Methods for the
//! application belong in `worker`, and decisions in `core`.

mod accept;
mod channel;
mod sockets;

pub(crate) use accept::Accepted;
pub(crate) use sockets::{Socket, SocketOwner};

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::core::worker::{Action, ListenerId, WorkerCore};
use crate::error::Error;
use crate::runtime::backoff::Backoff;
use crate::runtime::event_loop::Token;
use crate::sys::fd::NoLingerFd;
use crate::sys::interruptible_accept::InterruptibleAccept;
use crate::sys::poll::Poller;
use crate::types::sorted_map::SortedMap;
use crate::types::time::Time;
use crate::wire::channel::Channel;
use crate::wire::channel::inbox::READ_SIZE;
use crate::wire::driver::ChannelDriver;
use crate::wire::frame::{ToMaster, ToWorker};
use crate::wire::receipts::Receipt;
use sockets::SocketEntry;

/// Time that a worker waits at its end for the master to read the final frames.
///
/// With less, a busy master may lose them; with more, a stuck master holds up the end of the worker. A
/// worker must not outlive its master by more than one second.
const SHUTDOWN_FLUSH: Duration = Duration::from_secs(1);
/// Number of the channel in its `Token`: a worker has only one.
const CHANNEL: u32 = 0;

pub(crate) struct WorkerShell {
    pub(crate) core: RefCell<WorkerCore<Vec<NoLingerFd>>>,
    poller: Poller,
    channel: ChannelDriver<ToWorker, ToMaster>,
    sockets: RefCell<SortedMap<ListenerId, SocketEntry>>,
    /// The process's limit of descriptors when the application last set a callback.
    fd_limit: Cell<u64>,
    /// The last attempt to receive a connection failed for lack of descriptors.
    is_out_of_fds: Cell<bool>,
    start: Instant,
    /// Interrupts this process when it blocks in `accept`; made by `prepare_to_block`.
    interrupt: OnceCell<InterruptibleAccept>,
    backoff: Cell<Backoff>,
    /// Errors outside any call of the application that it has not got yet.
    errors: RefCell<VecDeque<Error>>,
    /// Receipts that the application has not got yet.
    receipts: RefCell<VecDeque<Receipt>>,
    /// The buffer into which the channel and UDP sockets read.
    scratch: RefCell<Vec<u8>>,
}

impl std::fmt::Debug for WorkerShell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerShell").finish_non_exhaustive()
    }
}

impl WorkerShell {
    /// `start` is the origin of [`Time`].
    pub(crate) fn new(channel: UnixStream, poller: Poller, start: Instant) -> io::Result<Self> {
        let channel = Channel::new(channel, &poller, Token::Channel(CHANNEL).key())?;
        let shell = Self {
            core: RefCell::new(WorkerCore::new()),
            poller,
            channel: ChannelDriver::new(None, Some(channel)),
            sockets: RefCell::default(),
            fd_limit: Cell::new(u64::MAX),
            is_out_of_fds: Cell::new(false),
            start,
            interrupt: OnceCell::new(),
            backoff: Cell::default(),
            errors: RefCell::default(),
            receipts: RefCell::default(),
            scratch: RefCell::new(vec![0; READ_SIZE]),
        };
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

    /// Schedules another attempt at what the system lacks resources for.
    fn back_off(&self) {
        let mut backoff = self.backoff.get();
        backoff.start(self.start.elapsed());
        self.backoff.set(backoff);
    }

    /// Returns the latest time at which `tick` must be called.
    pub(crate) fn deadline(&self) -> Option<Time> {
        self.backoff.get().deadline()
    }

    /// Retries what is due.
    pub(crate) fn tick(&self) {
        if self.deadline().is_some() && self.backoff.get().is_due(self.start.elapsed()) {
            self.backoff.take();
            self.core.borrow_mut().backoff_elapsed();
            self.act();
            self.flush_channel();
        }
    }

    /// Carries out all actions and flushes the channel. Nothing of this needs a callback.
    pub(crate) fn act(&self) {
        if self.core.borrow().has_actions() {
            self.carry_all_out();
        }
    }

    /// Separate from `act`, which is called several times for each message and usually finds nothing
    /// to do.
    #[inline(never)]
    fn carry_all_out(&self) {
        let mut must_flush = false;
        let is_own = self.poller.is_own();
        loop {
            let action = self.core.borrow_mut().next_action();
            match action {
                // A foreign process closes its copies and does nothing else: the rest concerns the
                // process that created the worker.
                Some(Action::Send(_) | Action::AttachSynFilter(_) | Action::CloseChannel)
                    if !is_own => {}
                Some(Action::Send(frame)) => {
                    must_flush = true;
                    self.channel.queue(&frame, None);
                }
                Some(Action::CloseListener(listener)) => self.close_socket(listener),
                Some(Action::AttachSynFilter(listener)) => self.attach_syn_filter(listener),
                Some(Action::CloseChannel) => {
                    must_flush = true;
                    self.channel.with(Channel::close);
                }
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
        self.channel
            .with(|channel| channel.flush_blocking(SHUTDOWN_FLUSH));
    }
}
