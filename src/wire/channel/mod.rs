//! Implements one end of the socketpair between the master and a worker. A channel carries frames
//! and their descriptors in both directions.
//!
//! The kernel keeps bytes in order, but the kernel does not know frames. A frame may arrive in
//! pieces, and its descriptors may arrive with an earlier piece. The channel keeps frames and
//! descriptors together by two rules:
//!
//! - The kernel sends all descriptors of a system call with the call's first byte. Once any byte
//!   has been written, the writer does not send the call's descriptors again.
//! - Descriptors arrive in order, and no later than their frame's first byte. The reader queues the
//!   descriptors, and each frame takes the number of descriptors that its header states.
//!
//! The descriptors of one system call are a *batch*. The first frame with descriptors in a batch
//! states how many descriptors the batch has. If the kernel drops some of them, the reader can
//! therefore determine which frames the lost descriptors belonged to.
//!
//! # Limits
//!
//! A *protocol frame* is a frame that the crate itself sends, as opposed to the application's
//! message.
//!
//! | quantity | limit | consequence |
//! |---|---|---|
//! | bytes that wait in this process, plus one more message | `HIGH_WATER` | `has_capacity` advises a pause |
//! | bytes that wait in this process, plus the message to send | `HARD_LIMIT` | `send` fails |
//! | bytes that wait in this process | `UNREAD_MAX` | the peer is disconnected |
//! | protocol frames with a descriptor that wait in this process | `FRAMES_WITH_FD_MAX` | the peer is disconnected |
//! | bytes in the body of a frame from the peer | `MAX_BODY` | the peer is disconnected |
//! | descriptors that arrived before their frames | `inbox::MAX_EARLY_FDS` | the peer is disconnected |
//!
//! In a process that did not create the channel, such as a forked child, the channel neither reads
//! nor writes. If two processes used one end of the socketpair, frames would be lost or mixed.

pub(crate) mod inbox;
pub(crate) mod outbox;
#[cfg(test)]
mod tests;

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::error::SendError;
use crate::sys::fd::NoLingerFd;
use crate::sys::poll::{Interest, Poller, Registered};
use crate::sys::socket::{self, Piece, Space};
use crate::types::protocol::{FrameError, MAX_BODY, MAX_FDS};
use crate::wire::frame::Frame;
use crate::wire::frame::header::Header;
use crate::wire::receipts::{Receipt, ReceiptId};
use inbox::{Arrival, EXTRA_READ, Inbox, READ_SIZE};
use outbox::{Batch, Outbox};

/// The number of bytes above which `has_capacity` advises the application to pause. The channel
/// compares this number with the sum of the unwritten bytes and the last message's length.
///
/// The last message's length is an estimate of the next message's length. If any bytes are queued,
/// the next message must also wait in the queue.
///
/// A larger value delays the advice and uses more memory. If the value were below the usual message
/// length, the application would pause whenever any bytes are queued. The public API documents the
/// value.
const HIGH_WATER: usize = 64 << 10;
/// The number of unwritten bytes above which `send` fails. The value bounds the memory that an
/// application can use for a peer that does not read. A message of `MAX_BODY` bytes must fit. The
/// public API documents the value.
const HARD_LIMIT: usize = 8 << 20;
/// The number of unwritten bytes above which the peer is disconnected.
///
/// Only protocol frames can exceed `HARD_LIMIT` by more than the length of a header, and each frame
/// from the peer causes only a few protocol frames. A space of 1 MiB holds thousands of protocol
/// frames. A well-behaved peer never leaves this number of frames unread.
const UNREAD_MAX: usize = HARD_LIMIT + (1 << 20);
/// The number of bytes that must be added to the queue of a full socket before the next attempt to
/// write.
///
/// The poller reports new capacity, but an application that only sends does not run the event loop
/// and receives no report. With a smaller value, this application makes more useless system calls.
/// With a larger value, more messages are queued although the peer reads.
const RETRY: usize = 4 << 10;

/// The result of one attempt to write.
#[derive(Debug)]
pub(crate) enum Flushed {
    /// The channel has written all bytes that the socket accepts, or the peer has closed its end.
    /// If bytes are still queued, the poller reports new capacity.
    Done,
    /// The system lacks memory or descriptors. Retry after the back-off delay. The error is `Some`
    /// for the first failure of a series only.
    Exhausted(Option<io::Error>),
}

/// The result of one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    Data,
    Nothing,
    /// The peer has closed its end, and the channel has read everything that the peer wrote.
    EndOfFile,
}

/// The state of the sending direction. A write that fails for lack of memory or descriptors does
/// not change the state.
///
/// | state | event | next state |
/// |---|---|---|
/// | `Open` | `close` | `Closing` |
/// | `Closing` | all bytes are written; the socket is shut down | `Closed` |
/// | `Open`, `Closing` | a write fails, but not for lack of resources | `Closed` |
/// | any | `shut_down`; the socket is shut down | `Closed` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WriteState {
    Open,
    /// The channel still writes queued frames, but no longer queues new ones.
    Closing,
    /// The channel can write nothing, and its queue is empty.
    Closed,
}

/// The outcome of the last attempt to write. The channel expects the next attempt to have the same
/// outcome.
///
/// | state | event | next state |
/// |---|---|---|
/// | any | a write takes all bytes | `Available` |
/// | any | a write takes fewer bytes or would block | `Full` |
/// | any | a write fails for lack of memory or descriptors | `Exhausted` |
/// | `Full` | `retry_write` | `Available` |
/// | any | the write state becomes `Closed` | `Available` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Capacity {
    Available,
    /// The peer must read first. Until `retry_write`, the channel writes only if more than
    /// `retry_above` bytes are queued.
    Full {
        retry_above: usize,
    },
    /// The system lacks memory or descriptors. The channel's owner retries after the back-off
    /// delay.
    Exhausted,
}

/// Whether the last read filled its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LastRead {
    /// The read did not fill its buffer. Either no data is left in the socket, or the kernel ended
    /// the read after a batch of descriptors.
    Partial,
    /// The read filled its buffer, so more data may be left.
    Full,
}

/// One end of a channel, which receives frames of type `In` and sends frames of type `Out`.
#[derive(Debug)]
pub(crate) struct Channel<In, Out> {
    socket: Registered<UnixStream>,
    /// The events that the poller reports for the socket.
    interest: Option<Interest>,
    inbox: Inbox,
    last_read: LastRead,
    outbox: Outbox,
    write_state: WriteState,
    capacity: Capacity,
    /// Whether a frame was lost before it was written.
    has_lost_frames: bool,
    /// The length of the application's last message in bytes.
    last_message_length: usize,
    /// The limit of unwritten protocol frames with a descriptor. It is a field, so that both directions
    /// of the channel have equal code.
    frames_with_fd_max: usize,
    direction: PhantomData<(In, Out)>,
}

#[cfg(debug_assertions)]
impl<In, Out> Channel<In, Out> {
    /// Simulates an application that closes the channel's descriptor, for fault injection.
    pub(crate) fn shut_socket(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Writes bytes that need not be a valid frame, for fault injection.
    pub(crate) fn write_raw(&self, bytes: &[u8]) {
        let _ = socket::send(&self.socket, bytes, &[]);
    }
}

/// The result of one system call that reads.
struct Read {
    result: io::Result<Piece>,
    /// The maximum number of bytes that the call could read.
    capacity: usize,
}

impl<In: Frame, Out: Frame> Channel<In, Out> {
    /// Creates a channel and adds its non-blocking socket to `poller`. The poller reports `key`
    /// when the socket is readable.
    pub(crate) fn new(socket: UnixStream, poller: &Poller, key: usize) -> io::Result<Self> {
        let interest = Some(Interest::Readable);
        Ok(Self {
            socket: poller.add(socket, key, interest)?,
            interest,
            inbox: Inbox::default(),
            last_read: LastRead::Partial,
            outbox: Outbox::default(),
            write_state: WriteState::Open,
            capacity: Capacity::Available,
            has_lost_frames: false,
            last_message_length: 0,
            frames_with_fd_max: Out::FRAMES_WITH_FD_MAX,
            direction: PhantomData,
        })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Returns the channel's own descriptor and all descriptors that are queued in either
    /// direction.
    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let queued = self.inbox.fds().chain(self.outbox.fds());
        let queued = queued.map(|fd| fd.as_fd());
        std::iter::once(self.as_fd()).chain(queued).collect()
    }

    /// Returns whether all frames have been written and none was lost.
    pub(crate) fn is_flushed(&self) -> bool {
        self.outbox.is_empty() && !self.has_lost_frames
    }

    /// Returns whether all frames are written and no receipt is outstanding.
    pub(crate) fn is_settled(&self) -> bool {
        self.outbox.is_empty() && !self.outbox.has_receipts()
    }

    /// Returns whether frames are queued, a flush would write none of them, and the poller reports
    /// when the socket has capacity again.
    pub(crate) fn is_blocked(&self) -> bool {
        let is_watched = matches!(self.interest, Some(Interest::Writable | Interest::Both));
        let queued = self.outbox.len();
        is_watched && queued > 0 && queued <= self.retry_above()
    }

    /// Returns whether frames are queued that can still be written.
    pub(crate) fn is_writing(&self) -> bool {
        !self.outbox.is_empty() && self.write_state != WriteState::Closed
    }

    /// Queues a protocol frame, with its descriptor, if any. After `close`, the frame is lost.
    pub(crate) fn queue(&mut self, frame: &Out, fd: Option<Rc<NoLingerFd>>) {
        if self.write_state != WriteState::Open {
            self.has_lost_frames = true;
            return;
        }
        let mut bytes = Vec::new();
        frame.encode(usize::from(fd.is_some()), &mut bytes);
        self.outbox.push_protocol_frame(&bytes, fd);
    }

    /// Sends the application's message. If no frame is queued and the message has no descriptors,
    /// the channel writes immediately, and queues only the remainder. Otherwise, the channel queues
    /// the whole message. After the call, `has_capacity` returns whether the application should
    /// continue.
    ///
    /// # Errors
    ///
    /// Returns an error if the channel is closed for writing or belongs to another process, if the
    /// message exceeds a limit, or if the queue is full. No part of the message is then sent.
    pub(crate) fn send(
        &mut self,
        message: &[u8],
        fds: Vec<OwnedFd>,
        receipt: Option<ReceiptId>,
    ) -> Result<(), SendError> {
        if self.write_state != WriteState::Open || !self.socket.is_own() {
            return Err(SendError::ChannelClosed);
        }
        if message.len() > MAX_BODY {
            return Err(SendError::TooLong);
        }
        if fds.len() > MAX_FDS {
            return Err(SendError::TooManyDescriptors);
        }
        if self.outbox.len() + message.len() > HARD_LIMIT {
            return Err(SendError::QueueFull);
        }
        self.last_message_length = message.len();
        let header = Header::of_message(message.len(), fds.len());
        let pieces = [&header[..], message];
        if self.outbox.is_empty() && fds.is_empty() {
            let (written, is_full) = match socket::send_two(&self.socket, pieces) {
                Ok(written) => (written, written < header.len() + message.len()),
                // `flush` handles any other error, because its write fails with the same error.
                Err(error) => (0, error.kind() == io::ErrorKind::WouldBlock),
            };
            self.outbox.push_remainder(pieces, written);
            self.set_full(is_full);
        } else {
            let fds = fds.into_iter().map(NoLingerFd::from).map(Rc::new);
            self.outbox.push(pieces, fds);
        }
        if let Some(receipt) = receipt {
            self.outbox.add_receipt(receipt);
        }
        Ok(())
    }

    /// Returns the receipts of the messages that have been written or lost since the last call.
    pub(crate) fn take_receipts(&mut self) -> Vec<Receipt> {
        if !self.outbox.has_receipts() {
            return Vec::new();
        }
        let receipt = |is_written| move |id| Receipt { id, is_written };
        let written = self.outbox.take_receipts().into_iter();
        let mut receipts: Vec<_> = written.map(receipt(true)).collect();
        if self.write_state == WriteState::Closed {
            receipts.extend(self.outbox.drain_receipts().map(receipt(false)));
        }
        receipts
    }

    /// Returns whether the application may continue to send without a pause.
    pub(crate) fn has_capacity(&self) -> bool {
        let queued = self.outbox.len();
        queued == 0 || queued + self.last_message_length <= HIGH_WATER
    }

    /// Writes as much as the socket accepts. After a write has filled the socket, writes nothing
    /// until `retry_write` or until more than `RETRY` additional bytes are queued.
    ///
    /// # Errors
    ///
    /// Returns an error if the socket is broken, in which case the queued frames are lost. Returns
    /// `OutOfMemory` if more than `UNREAD_MAX` bytes, or more than `FRAMES_WITH_FD_MAX` protocol frames
    /// with a descriptor, are unwritten.
    ///
    /// If the peer has closed its end, `flush` returns no error. `receive` reports the end-of-file
    /// after everything that the peer wrote earlier.
    pub(crate) fn flush(&mut self) -> io::Result<Flushed> {
        if !self.socket.is_own() {
            return Ok(Flushed::Done);
        }
        let had_nothing_queued = self.outbox.is_empty();
        let was_exhausted = self.is_exhausted();
        match self.write() {
            Err(error) if socket::is_exhaustion(&error) => {
                self.capacity = Capacity::Exhausted;
                self.check_length()?;
                self.watch_writable(false)?;
                return Ok(Flushed::Exhausted((!was_exhausted).then_some(error)));
            }
            Err(error) => {
                self.close_writing();
                self.watch_writable(false)?;
                let closed = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
                return if closed.contains(&error.kind()) {
                    Ok(Flushed::Done)
                } else {
                    Err(error)
                };
            }
            Ok(()) => {}
        }
        self.check_length()?;
        if self.outbox.is_empty() && self.write_state == WriteState::Closing {
            self.shut_down();
        }
        let is_queued = !self.outbox.is_empty();
        // Watch the socket for capacity while frames are queued. Stop watching only in a call of
        // `flush` that began with an empty queue, because a socket that was full is likely to fill
        // up again soon.
        if is_queued || had_nothing_queued {
            self.watch_writable(is_queued)?;
        }
        Ok(Flushed::Done)
    }

    /// Returns the number of unwritten protocol frames that have a descriptor.
    pub(crate) fn frames_with_fd(&self) -> usize {
        self.outbox.frames_with_fd()
    }

    fn check_length(&self) -> io::Result<()> {
        if self.outbox.len() > UNREAD_MAX || self.outbox.frames_with_fd() > self.frames_with_fd_max
        {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        while self.outbox.len() > self.retry_above() {
            let Batch { bytes, fds } = self.outbox.next_batch();
            match socket::send(&self.socket, bytes, &fds) {
                Ok(written) => {
                    let is_full = written < bytes.len();
                    self.outbox.advance(written);
                    self.set_full(is_full);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.set_full(true),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Returns the queue length, in bytes, up to which `write` writes nothing.
    fn retry_above(&self) -> usize {
        match self.capacity {
            Capacity::Full { retry_above } => retry_above,
            Capacity::Available | Capacity::Exhausted => 0,
        }
    }

    /// Records whether the last write filled the socket.
    fn set_full(&mut self, is_full: bool) {
        let retry_above = self.outbox.len() + RETRY;
        self.capacity = match is_full {
            true => Capacity::Full { retry_above },
            false => Capacity::Available,
        };
    }

    /// Lets the next `flush` write, because the socket may have capacity again.
    pub(crate) fn retry_write(&mut self) {
        if let Capacity::Full { .. } = self.capacity {
            self.capacity = Capacity::Available;
        }
    }

    /// Returns whether writing waits for memory or descriptors. The poller does not report when
    /// they are available, so the caller must retry.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.capacity == Capacity::Exhausted
    }

    /// Sets whether the poller reports the channel when it is readable.
    pub(crate) fn watch_readable(&mut self, watch: bool) -> io::Result<()> {
        let writable = matches!(self.interest, Some(Interest::Writable | Interest::Both));
        self.set_interest(watch, writable)
    }

    fn watch_writable(&mut self, watch: bool) -> io::Result<()> {
        let readable = matches!(self.interest, Some(Interest::Readable | Interest::Both));
        self.set_interest(readable, watch)
    }

    fn set_interest(&mut self, readable: bool, writable: bool) -> io::Result<()> {
        let interest = match (readable, writable) {
            (false, false) => None,
            (true, false) => Some(Interest::Readable),
            (false, true) => Some(Interest::Writable),
            (true, true) => Some(Interest::Both),
        };
        if self.interest == interest {
            return Ok(());
        }
        self.interest = interest;
        self.socket.set_interest(interest)
    }

    /// Writes all queued frames, and blocks while the peer does not read. Stops when a write fails
    /// or `limit` has passed.
    pub(crate) fn flush_blocking(&mut self, limit: Duration) {
        if !self.socket.is_own() {
            return;
        }
        let start = Instant::now();
        let _ = self.socket.set_nonblocking(false);
        while !self.outbox.is_empty() {
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() || self.socket.set_write_timeout(Some(left)).is_err() {
                break;
            }
            let Batch { bytes, fds } = self.outbox.next_batch();
            match socket::send_blocking(&self.socket, bytes, &fds) {
                Ok(written) => self.outbox.advance(written),
                Err(_) => break,
            }
        }
    }

    /// Reads from the socket once. Afterwards, `next` returns the frames.
    ///
    /// `scratch` is only used during the call, and keeps its capacity.
    pub(crate) fn receive(&mut self, scratch: &mut Vec<u8>) -> io::Result<Received> {
        if !self.socket.is_own() {
            return Ok(Received::Nothing);
        }
        scratch.clear();
        let Read { result, capacity } = self.read(scratch);
        match result {
            Ok(Piece { bytes: 0, .. }) => Ok(Received::EndOfFile),
            Ok(piece) => {
                self.last_read = match piece.bytes == capacity {
                    true => LastRead::Full,
                    false => LastRead::Partial,
                };
                self.inbox.push(scratch);
                self.inbox.push_fds(piece.fds, piece.lost_fds);
                Ok(Received::Data)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
            // If the peer closes its end with unread data, the kernel reports a reset instead of
            // end-of-file.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Received::EndOfFile),
            Err(error) => Err(error),
        }
    }

    fn read(&mut self, scratch: &mut Vec<u8>) -> Read {
        let mut no_body = Vec::new();
        // If another large message is likely, read little more than its header now. The next call
        // can then read the body directly into its final buffer.
        let without_body = match self.inbox.expects_large_body() {
            true => EXTRA_READ,
            false => READ_SIZE,
        };
        let (body, missing, beyond) = match self.inbox.unfinished_body() {
            Some(large) => (large.body, large.missing, EXTRA_READ),
            None => (&mut no_body, 0, without_body),
        };
        let first = Space {
            buffer: body,
            max: missing,
        };
        let second = Space {
            buffer: scratch,
            max: beyond,
        };
        Read {
            result: socket::receive_into(self.socket.as_fd(), first, second),
            capacity: missing + beyond,
        }
    }

    /// Returns whether the last read filled its buffer, in which case the socket may hold more
    /// data.
    pub(crate) fn has_more(&self) -> bool {
        self.last_read == LastRead::Full
    }

    /// Returns the next complete frame with its descriptors, or `None` if no frame is complete.
    pub(crate) fn next(&mut self) -> Result<Option<Arrival<In>>, FrameError> {
        self.inbox.next()
    }

    /// Makes `flush` close the channel once all queued frames are written. The peer reads these
    /// frames before end-of-file.
    pub(crate) fn close(&mut self) {
        if self.write_state == WriteState::Open {
            self.write_state = WriteState::Closing;
        }
    }

    /// Sets the write state to `Closed` and discards the queued frames.
    fn close_writing(&mut self) {
        self.write_state = WriteState::Closed;
        self.capacity = Capacity::Available;
        self.has_lost_frames |= !self.outbox.is_empty();
        self.outbox.clear();
    }

    /// Shuts the socket down, so that neither side can write. Data in the socket can still be read.
    pub(crate) fn shut_down(&mut self) {
        self.close_writing();
        // A forked child must not shut the socket down, because the shutdown also affects the
        // parent's channel.
        if self.socket.is_own() {
            let _ = self.socket.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Closes the channel and discards the data that the peer has written.
    ///
    /// The descriptors in the data are closed one by one as `NoLingerFd`. If the kernel closed them
    /// with the socket, `close` could block on a connection with SO_LINGER set.
    pub(crate) fn discard(mut self) {
        self.shut_down();
        if !self.socket.is_own() {
            return;
        }
        let mut scratch = [0; 4096];
        let has_data = |piece: &Piece| piece.bytes > 0;
        while socket::receive(self.socket.as_fd(), &mut scratch).is_ok_and(|piece| has_data(&piece))
        {
        }
    }
}
