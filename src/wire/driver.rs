//! Wraps a channel for the shells of the master and the worker. See `wire` for the term *shell*.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use crate::error::{Error, SendError};
use crate::types::protocol::FrameError;
use crate::types::worker_id::WorkerId;
use crate::wire::channel::inbox::Arrival;
use crate::wire::channel::{Channel, Flushed, Received};
use crate::wire::frame::Frame;
use crate::wire::receipts::{Receipt, ReceiptId};

/// A channel that may be closed at any time.
///
/// No method returns a reference to the channel, so that a shell may use the channel again while it
/// handles a result.
#[derive(Debug)]
pub(crate) struct ChannelDriver<In, Out> {
    /// The worker at the other end, or `None` if the peer is the master.
    peer: Option<WorkerId>,
    /// The channel, or `None` after it was closed.
    channel: RefCell<Option<Channel<In, Out>>>,
}

/// The shell's task after it has sent a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterSend {
    /// The shell has nothing to do. `has_capacity` is `true` if the application may continue to
    /// send without a pause.
    Done { has_capacity: bool },
    /// The shell must flush the channel.
    FlushNeeded,
}

/// The result of flushing a channel.
#[derive(Debug)]
pub(crate) struct Flush {
    pub(crate) next: AfterFlush,
    pub(crate) receipts: Vec<Receipt>,
    /// Whether the channel has queued bytes that can still be written.
    pub(crate) is_writing: bool,
}

/// The shell's task after a flush.
#[derive(Debug)]
pub(crate) enum AfterFlush {
    Nothing,
    /// Retry after the back-off delay, and report the error, if any.
    BackOff(Option<Error>),
    /// Close the channel.
    Close(io::Error),
}

/// The handling of data that the peer has written and this process has not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unprocessed {
    /// The kernel discards the data, and closes its descriptors, when the socket is closed.
    Leave,
    /// The channel reads the data and closes its descriptors one by one.
    Discard,
}

impl<In: Frame, Out: Frame> ChannelDriver<In, Out> {
    pub(crate) fn new(peer: Option<WorkerId>, channel: Option<Channel<In, Out>>) -> Self {
        let channel = RefCell::new(channel);
        Self { peer, channel }
    }

    /// Calls `call` with the channel and returns its result, or `None` if the channel is closed.
    pub(crate) fn with<T>(&self, call: impl FnOnce(&mut Channel<In, Out>) -> T) -> Option<T> {
        self.channel.borrow_mut().as_mut().map(call)
    }

    pub(crate) fn is_open(&self) -> bool {
        self.channel.borrow().is_some()
    }

    /// Takes the channel out of the driver without closing it.
    pub(crate) fn take(&self) -> Option<Channel<In, Out>> {
        self.channel.take()
    }

    /// Queues a frame that the crate itself sends, as opposed to a message of the application. Does
    /// nothing if the channel is closed.
    pub(crate) fn queue(&self, frame: &Out, fd: Option<OwnedFd>) {
        let fd = fd.map(|fd| Rc::new(fd.into()));
        self.with(|channel| channel.queue(frame, fd));
    }

    /// Returns the number of unwritten protocol frames that have a descriptor, or `None` if the
    /// channel is closed.
    pub(crate) fn frames_with_fd(&self) -> Option<usize> {
        self.with(|channel| channel.frames_with_fd())
    }

    /// Sends the application's message, or queues what the socket does not accept.
    pub(crate) fn send(
        &self,
        message: &[u8],
        fds: Vec<OwnedFd>,
        receipt: Option<ReceiptId>,
    ) -> Result<AfterSend, SendError> {
        let sent = self.with(|channel| {
            let was_blocked = channel.is_blocked();
            channel.send(message, fds, receipt)?;
            // Skip the flush if the channel is settled or stays blocked, because the flush would
            // write nothing. Flushing after each queued message made short messages a third slower
            // (`cargo bench -- messages`, one way).
            let stays_blocked = was_blocked && channel.is_blocked();
            let has_capacity = channel.has_capacity();
            Ok(match stays_blocked || channel.is_settled() {
                true => AfterSend::Done { has_capacity },
                false => AfterSend::FlushNeeded,
            })
        });
        sent.unwrap_or(Err(SendError::ChannelClosed))
    }

    /// Returns whether the application may continue to send without a pause. Returns `false` if the
    /// channel is closed.
    pub(crate) fn has_capacity(&self) -> bool {
        self.with(|channel| channel.has_capacity()) == Some(true)
    }

    pub(crate) fn is_writing(&self) -> bool {
        self.with(|channel| channel.is_writing()) == Some(true)
    }

    /// Writes as much as the socket accepts. Returns `None` if the channel is closed.
    pub(crate) fn flush(&self) -> Option<Flush> {
        self.with(|channel| {
            let next = match channel.flush() {
                Ok(Flushed::Done) => AfterFlush::Nothing,
                Ok(Flushed::Exhausted(error)) => {
                    AfterFlush::BackOff(error.map(|reason| self.exhausted(reason)))
                }
                Err(error) => AfterFlush::Close(error),
            };
            Flush {
                next,
                receipts: channel.take_receipts(),
                is_writing: channel.is_writing(),
            }
        })
    }

    /// Reads from the socket once. Returns `Received::Nothing` if the channel is closed.
    pub(crate) fn receive(&self, scratch: &mut Vec<u8>) -> io::Result<Received> {
        let received = self.with(|channel| channel.receive(scratch));
        received.unwrap_or(Ok(Received::Nothing))
    }

    /// Returns the next frame that has been read, or `None` if there is none or the channel is
    /// closed.
    pub(crate) fn next(&self) -> Result<Option<Arrival<In>>, FrameError> {
        self.with(Channel::next).unwrap_or(Ok(None))
    }

    /// Closes the channel in both directions. Returns the remaining receipts.
    pub(crate) fn close(&self, unprocessed: Unprocessed) -> Vec<Receipt> {
        let Some(mut channel) = self.take() else {
            return Vec::new();
        };
        channel.shut_down();
        let receipts = channel.take_receipts();
        match unprocessed {
            Unprocessed::Leave => drop(channel),
            Unprocessed::Discard => channel.discard(),
        }
        receipts
    }

    fn exhausted(&self, reason: io::Error) -> Error {
        let worker = self.peer;
        Error::Exhausted { worker, reason }
    }

    /// Returns the error to report when the channel fails for `reason`.
    pub(crate) fn broken(&self, reason: io::Error) -> Error {
        let worker = self.peer;
        Error::Channel { worker, reason }
    }
}
