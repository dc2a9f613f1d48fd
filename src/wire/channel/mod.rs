//! One end of the socketpair between the master and a worker: frames in and out, with the descriptors
//! that belong to them.
//!
//! The kernel keeps bytes in order but knows nothing of frames. A frame may arrive in pieces, and its
//! descriptors together with an earlier piece. Two facts keep frames and descriptors together:
//!
//! - All descriptors of a system call are sent with its first byte. Once anything has been written, no
//!   descriptor of the call is sent again.
//! - Descriptors arrive in order, and no later than the first byte of their frame. The reader queues
//!   them, and each frame takes the number that its header states.
//!
//! The first frame of each batch states how many descriptors the batch had. If the kernel dropped
//! some, the reader knows to which frames they belonged.
//!
//! # Limits
//!
//! | what | limit | beyond it |
//! |---|---|---|
//! | bytes that the peer has not read, messages of the application | `HARD_LIMIT`; advice to pause from `HIGH_WATER` | `send` fails |
//! | the same, with frames of the crate itself | `UNREAD_MAX`, `UNREAD_FDS_MAX` | the peer is disconnected |
//! | bytes that the peer has sent, in one frame | `MAX_BODY` | the peer is disconnected |
//! | descriptors that arrived before their frames | `inbox::MAX_EARLY_FDS` | the peer is disconnected |
//!
//! In a process that did not create it, a channel neither reads nor writes: the creator would lose
//! the data.

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
use crate::sys::socket::{self, Piece};
use crate::wire::frame::{Frame, FrameError, Header, MAX_BODY, MAX_FDS};
use crate::wire::receipts::{Receipt, ReceiptId};
use inbox::{Arrival, EXTRA_READ, Inbox};
use outbox::{Batch, Outbox};

/// Number of unwritten bytes, counting one more message of the last message's length, above which
/// `send` advises the application to pause.
///
/// The next message is counted because a long message that the socket takes at once is not copied. A
/// larger value delays the advice and uses more memory; below the length of usual messages, the
/// application would pause after each of them. The value is documented in the public API.
const HIGH_WATER: usize = 64 << 10;
/// Number of unwritten bytes above which `send` fails. Bounds the memory that an application can use
/// for a peer that does not read; the value is documented in the public API. A message of
/// `MAX_BODY` bytes must fit.
const HARD_LIMIT: usize = 8 << 20;
/// Number of unwritten bytes above which a peer that reads nothing is disconnected. Only frames of the
/// crate itself may exceed `HARD_LIMIT`, and the peer causes a few of these with each frame that it
/// sends. 1 MiB holds more than 20,000 of them, which no honest peer leaves unread.
const UNREAD_MAX: usize = HARD_LIMIT + (1 << 20);
/// Number of unwritten frames of the crate itself with a descriptor, above which the peer is
/// disconnected. Each of these keeps a descriptor open. An honest peer causes a few for each of the 64
/// listeners that it may have.
const UNREAD_FDS_MAX: usize = 256;
/// Number of further bytes that are queued for a full socket before the next attempt to write.
///
/// The poller reports capacity, but an application that only sends does not run the event loop. With a
/// smaller value such an application makes more useless system calls; with a larger value more of its
/// messages are queued although the peer reads.
const RETRY: usize = 4 << 10;

/// The result of one attempt to write.
#[derive(Debug)]
pub(crate) enum Flushed {
    /// Everything is written that the socket has capacity for; the poller reports further capacity.
    Done,
    /// The system lacks memory or descriptors; try again after a while. The error comes with the first
    /// failure of a series.
    Exhausted(Option<io::Error>),
}

/// The result of one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    Data,
    Nothing,
    /// The peer has closed its end, and everything that it wrote has been read.
    EndOfFile,
}

/// Whether frames can be written.
///
/// | state | event | next state |
/// |---|---|---|
/// | `Open` | `close` | `Closing` |
/// | `Closing` | everything is written; the socket is shut down | `Closed` |
/// | `Open`, `Closing` | a write fails, but not for lack of resources | `Closed` |
/// | any | `shut_down`; the socket is shut down | `Closed` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WriteState {
    Open,
    /// Queued frames are still written, but no frame is queued any more.
    Closing,
    /// Nothing can be written, and nothing is queued.
    Closed,
}

/// Whether the next attempt to write is likely to succeed.
///
/// | state | event | next state |
/// |---|---|---|
/// | any | a write takes all bytes | `Available` |
/// | any | a write takes fewer bytes or would block | `Full` |
/// | any | a write fails for lack of memory or descriptors | `Exhausted` |
/// | `Full` | `retry_write` | `Available` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Capacity {
    Available,
    /// The peer has to read first. Until `retry_write`, nothing is written unless more than this
    /// number of bytes are queued.
    Full {
        retry_above: usize,
    },
    /// The system lacks memory or descriptors. The owner of the channel flushes again after a while.
    Exhausted,
}

/// The data that the last read left in the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LastRead {
    /// Nothing.
    Partial,
    /// Perhaps more: the read filled the buffer.
    Full,
}

/// Frames of type `In` come in, frames of type `Out` go out.
#[derive(Debug)]
pub(crate) struct Channel<In, Out> {
    socket: Registered<UnixStream>,
    /// The events that the poller reports.
    interest: Option<Interest>,
    inbox: Inbox,
    last_read: LastRead,
    outbox: Outbox,
    write_state: WriteState,
    capacity: Capacity,
    /// A frame was queued and will never be written.
    has_lost_frames: bool,
    /// Length of the last message of the application, in bytes.
    last_message_length: usize,
    direction: PhantomData<(In, Out)>,
}

#[cfg(debug_assertions)]
impl<In, Out> Channel<In, Out> {
    /// For tests: acts as an application that closes the channel's descriptor.
    pub(crate) fn shut_socket(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// For tests: writes bytes that need not be a frame.
    pub(crate) fn write_raw(&self, bytes: &[u8]) {
        let _ = socket::send(&self.socket, bytes, &[]);
    }
}

/// One call of a reading function.
struct Read {
    result: io::Result<Piece>,
    /// Number of bytes that went to the body of a large message; the others are in the buffer.
    into_body: usize,
    /// Number of bytes that the call could have read.
    capacity: usize,
}

impl<In: Frame, Out: Frame> Channel<In, Out> {
    /// Adds a non-blocking socket to `poller`, which reports it with `key` when it is readable.
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
            direction: PhantomData,
        })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Returns the channel's own descriptor, and all that are queued in either direction.
    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let queued = self.inbox.fds().chain(self.outbox.fds());
        let queued = queued.map(|fd| fd.as_fd());
        std::iter::once(self.as_fd()).chain(queued).collect()
    }

    /// Returns whether all frames have been written to the socket.
    pub(crate) fn is_flushed(&self) -> bool {
        self.outbox.is_empty() && !self.has_lost_frames
    }

    /// Returns whether everything is written, and no receipt is outstanding.
    pub(crate) fn is_settled(&self) -> bool {
        self.outbox.is_empty() && !self.outbox.has_receipts()
    }

    /// Returns whether something is queued that can still be written.
    pub(crate) fn is_writing(&self) -> bool {
        !self.outbox.is_empty() && self.write_state != WriteState::Closed
    }

    /// Queues a frame of the crate itself. A frame that comes too late is lost.
    pub(crate) fn queue(&mut self, frame: &Out, fd: Option<Rc<NoLingerFd>>) {
        if self.write_state != WriteState::Open {
            self.has_lost_frames = true;
            return;
        }
        let mut bytes = Vec::new();
        frame.encode(usize::from(fd.is_some()), &mut bytes);
        self.outbox.push_own(&bytes, fd);
    }

    /// Sends a message of the application: at once, if nothing is queued; the rest is queued.
    /// Afterwards `has_capacity` returns whether the application should pause.
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
                // After any other error `flush` fails, too, and handles it.
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

    /// Returns whether the application may go on sending without a pause.
    pub(crate) fn has_capacity(&self) -> bool {
        let queued = self.outbox.len();
        queued == 0 || queued + self.last_message_length <= HIGH_WATER
    }

    /// Writes what the socket takes now. After the socket was full, writes nothing until
    /// `retry_write`, or until much more is queued.
    ///
    /// # Errors
    ///
    /// Nothing can be written any more, and the queued frames are lost; or more is unread than an honest
    /// peer leaves unread (`OutOfMemory`). It is no error if the peer has closed its end: reading
    /// reports that, after everything that the peer wrote before.
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
        // After a full socket more frames are likely to find it full. The poller therefore goes on
        // reporting capacity until it has done so once with nothing to write.
        if is_queued || had_nothing_queued {
            self.watch_writable(is_queued)?;
        }
        Ok(Flushed::Done)
    }

    fn check_length(&self) -> io::Result<()> {
        if self.outbox.len() > UNREAD_MAX || self.outbox.own_fds() > UNREAD_FDS_MAX {
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

    /// Returns the number of queued bytes up to which nothing is written.
    fn retry_above(&self) -> usize {
        match self.capacity {
            Capacity::Full { retry_above } => retry_above,
            Capacity::Available | Capacity::Exhausted => 0,
        }
    }

    /// Notes whether the socket was full at the last write.
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

    /// Returns whether writing waits for memory or descriptors, of which no poller reports.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.capacity == Capacity::Exhausted
    }

    /// Makes the poller report the channel when it is readable, or not.
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

    /// Writes until everything is written or `limit` is over; waits for the peer to read.
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

    /// Reads once. `next` then returns the frames.
    pub(crate) fn receive(&mut self, scratch: &mut [u8]) -> io::Result<Received> {
        if !self.socket.is_own() {
            return Ok(Received::Nothing);
        }
        let Read {
            result,
            into_body,
            capacity,
        } = self.read(scratch);
        match result {
            Ok(Piece { bytes: 0, .. }) => Ok(Received::EndOfFile),
            Ok(piece) => {
                self.last_read = match piece.bytes == capacity {
                    true => LastRead::Full,
                    false => LastRead::Partial,
                };
                self.inbox.push(&scratch[..piece.bytes - into_body]);
                self.inbox.push_fds(piece.fds, piece.lost_fds);
                Ok(Received::Data)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
            // The peer closed its end before it had read everything.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Received::EndOfFile),
            Err(error) => Err(error),
        }
    }

    fn read(&mut self, scratch: &mut [u8]) -> Read {
        let socket = self.socket.as_fd();
        let Some(large) = self.inbox.unfinished_body() else {
            // If another large message is likely, read little more than its header: the body is then
            // read directly into its final buffer.
            let capacity = match self.inbox.expects_large_body() {
                true => EXTRA_READ,
                false => scratch.len(),
            };
            return Read {
                result: socket::receive(socket, &mut scratch[..capacity]),
                into_body: 0,
                capacity,
            };
        };
        let before = large.body.len();
        let extra = &mut scratch[..EXTRA_READ];
        let result = socket::receive_into(socket, large.body, large.missing, extra);
        Read {
            result,
            into_body: large.body.len() - before,
            capacity: large.missing + EXTRA_READ,
        }
    }

    /// Returns whether the last read filled its buffer, so that the socket may hold more.
    pub(crate) fn has_more(&self) -> bool {
        self.last_read == LastRead::Full
    }

    /// Returns the next complete frame with its descriptors.
    pub(crate) fn next(&mut self) -> Result<Option<Arrival<In>>, FrameError> {
        self.inbox.next()
    }

    /// Closes the channel as soon as everything queued is written. The peer reads it, then
    /// end-of-file.
    pub(crate) fn close(&mut self) {
        if self.write_state == WriteState::Open {
            self.write_state = WriteState::Closing;
        }
    }

    /// Makes the write state `Closed`. Queued frames are lost.
    fn close_writing(&mut self) {
        self.write_state = WriteState::Closed;
        self.capacity = Capacity::Available;
        self.has_lost_frames |= !self.outbox.is_empty();
        self.outbox.clear();
    }

    /// Shuts the socket down: neither side can write any more. Data in the socket can still be read.
    pub(crate) fn shut_down(&mut self) {
        self.close_writing();
        // In a foreign process this would shut the channel down for its creator.
        if self.socket.is_own() {
            let _ = self.socket.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Closes the channel and discards what the peer has written. Descriptors among it are closed one
    /// by one as `NoLingerFd`: if the kernel closed them with the socket, a connection with SO_LINGER
    /// set could make `close` wait.
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
