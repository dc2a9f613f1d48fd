//! The use of a channel by the shells of both roles.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use crate::error::{Error, SendError};
use crate::types::worker_id::WorkerId;
use crate::wire::channel::inbox::Arrival;
use crate::wire::channel::{Channel, Flushed, Received};
use crate::wire::frame::{Frame, FrameError};
use crate::wire::receipts::{Receipt, ReceiptId};

/// A channel that may be closed at any time.
///
/// No method returns a reference to the channel, so that a shell may act on the channel again while it
/// handles a result.
#[derive(Debug)]
pub(crate) struct ChannelDriver<In, Out> {
    /// The worker at the other end; `None` for the master.
    peer: Option<WorkerId>,
    /// `None` after it was closed.
    channel: RefCell<Option<Channel<In, Out>>>,
}

/// The duty of the shell after it sent a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// Nothing.
    Settled,
    /// The channel must be flushed.
    Queued,
}

/// The result of flushing a channel.
#[derive(Debug)]
pub(crate) struct Flush {
    pub(crate) next: AfterFlush,
    pub(crate) receipts: Vec<Receipt>,
    /// Something is queued that can still be written.
    pub(crate) is_writing: bool,
}

/// The duty of the shell after a flush.
#[derive(Debug)]
pub(crate) enum AfterFlush {
    Nothing,
    /// Flush again after a while, and report the error if there is one.
    BackOff(Option<Error>),
    /// Close the channel.
    Close(io::Error),
}

/// The treatment of data that the peer has written and this process has not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unprocessed {
    /// The kernel closes it with the socket.
    Leave,
    /// It is read, and its descriptors are closed one by one.
    Discard,
}

impl<In: Frame, Out: Frame> ChannelDriver<In, Out> {
    pub(crate) fn new(peer: Option<WorkerId>, channel: Option<Channel<In, Out>>) -> Self {
        let channel = RefCell::new(channel);
        Self { peer, channel }
    }

    /// Runs `call` on the channel, if it is open.
    pub(crate) fn with<T>(&self, call: impl FnOnce(&mut Channel<In, Out>) -> T) -> Option<T> {
        self.channel.borrow_mut().as_mut().map(call)
    }

    /// Removes the channel without closing it.
    pub(crate) fn take(&self) -> Option<Channel<In, Out>> {
        self.channel.take()
    }

    /// Queues a frame of the crate itself.
    pub(crate) fn queue(&self, frame: &Out, fd: Option<OwnedFd>) {
        let fd = fd.map(|fd| Rc::new(fd.into()));
        self.with(|channel| channel.queue(frame, fd));
    }

    /// Sends a message of the application, or queues it.
    pub(crate) fn send(
        &self,
        message: &[u8],
        fds: Vec<OwnedFd>,
        receipt: Option<ReceiptId>,
    ) -> Result<Sent, SendError> {
        let sent = self.with(|channel| {
            channel.send(message, fds, receipt)?;
            Ok(match channel.is_settled() {
                true => Sent::Settled,
                false => Sent::Queued,
            })
        });
        sent.unwrap_or(Err(SendError::ChannelClosed))
    }

    /// Returns whether the application may go on sending without a pause.
    pub(crate) fn has_capacity(&self) -> bool {
        self.with(|channel| channel.has_capacity()) == Some(true)
    }

    pub(crate) fn is_writing(&self) -> bool {
        self.with(|channel| channel.is_writing()) == Some(true)
    }

    /// Writes what the socket takes; `None` if the channel is closed.
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

    /// Reads once. A closed channel has nothing to read.
    pub(crate) fn receive(&self, scratch: &mut [u8]) -> io::Result<Received> {
        let received = self.with(|channel| channel.receive(scratch));
        received.unwrap_or(Ok(Received::Nothing))
    }

    /// Returns the next frame that has been read. A closed channel has none.
    pub(crate) fn next(&self) -> Result<Option<Arrival<In>>, FrameError> {
        self.with(Channel::next).unwrap_or(Ok(None))
    }

    /// Closes the channel in both directions. Returns the last receipts.
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

    /// Returns the error that the channel is broken.
    pub(crate) fn broken(&self, reason: io::Error) -> Error {
        let worker = self.peer;
        Error::Channel { worker, reason }
    }
}
