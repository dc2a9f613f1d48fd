//! One end of the socketpair between master and worker: frames in and out, with the descriptors
//! that belong to them.
//!
//! The kernel keeps bytes in order but knows nothing of frames: a frame may arrive in pieces, and
//! its descriptors with an earlier piece. Two facts make it come out right. All descriptors of a
//! call leave with its first byte, so that once anything is written none of them is sent again.
//! And they arrive no later than the first byte of the frame they belong to, in order, so that the
//! reader keeps a queue of them and each frame takes as many as its header says. The first frame of
//! each batch says how many the batch had, so that if the kernel had to drop some, the reader knows
//! whose they were.
//!
//! In a process that did not create it, a channel neither reads nor writes: both would be its creator's
//! loss.

pub(crate) mod inbox;
pub(crate) mod outbox;

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
use inbox::{Arrival, EXTRA_READ, Inbox};
use outbox::{Outbox, ReceiptId};

/// When one more message such as the last would make more bytes wait than this, `send` tells the program
/// to slow down: a long one that does not wait need not be copied.
const HIGH_WATER: usize = 64 << 10;
/// Above this many bytes waiting, `send` refuses.
const HARD_LIMIT: usize = 8 << 20;
/// Above this many bytes waiting, a peer that reads nothing is cut off. Frames of the crate's own
/// may use the room beyond the hard limit; there are few of them for each that the peer sends.
const UNREAD_MAX: usize = HARD_LIMIT + (1 << 20);
/// The same for descriptors of the crate's own that wait: a few for each listener that a peer may have.
const UNREAD_FDS_MAX: usize = 256;
/// How many more bytes wait before it is tried again to write to a socket that had no room. The poller
/// tells of room, but a program that only sends does not ask it.
const RETRY: usize = 4 << 10;
/// How long to wait before writing again when the system has no room.
pub(crate) const BACKOFF: Duration = Duration::from_millis(100);

/// What one attempt to write achieved.
#[derive(Debug)]
pub(crate) enum Flushed {
    /// All that the other side has room for; the poller tells when it has more.
    Done,
    /// The system has run out of something: it is to be tried again after a while. The error comes
    /// with the first attempt of several.
    Exhausted(Option<io::Error>),
}

/// What one read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    Something,
    Nothing,
    /// The other side has closed, and everything it wrote has been read.
    End,
}

/// Frames of type `In` come in, frames of type `Out` go out.
#[derive(Debug)]
pub(crate) struct Channel<In, Out> {
    socket: Registered<UnixStream>,
    inbox: Inbox,
    outbox: Outbox,
    /// The last read has found all that it had room for.
    has_more: bool,
    /// How long the last message was.
    last: usize,
    /// Nothing can be written any more.
    broken: bool,
    /// Something was to be written and has not been.
    lost: bool,
    /// The system has no room for what is to be written; it is tried again later.
    exhausted: bool,
    /// The socket has had no room; it is tried again when so many bytes wait, or there is room.
    full_until: usize,
    /// To be closed when everything is written.
    closing: bool,
    /// Whether the poller tells when something can be read.
    waits_to_read: bool,
    waits_to_write: bool,
    direction: PhantomData<(In, Out)>,
}

#[cfg(debug_assertions)]
impl<In, Out> Channel<In, Out> {
    /// For tests: as if the program had closed it behind our back.
    pub(crate) fn shut_socket(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// For tests: what no frame is.
    pub(crate) fn write_raw(&self, bytes: &[u8]) {
        let _ = socket::send(&self.socket, bytes, &[]);
    }
}

impl<In: Frame, Out: Frame> Channel<In, Out> {
    /// The socket must not block.
    pub(crate) fn new(socket: UnixStream, poller: &Poller, key: usize) -> io::Result<Self> {
        Ok(Self {
            socket: poller.add(socket, key, Some(Interest::Readable))?,
            inbox: Inbox::default(),
            outbox: Outbox::default(),
            has_more: false,
            last: 0,
            broken: false,
            lost: false,
            exhausted: false,
            full_until: 0,
            closing: false,
            waits_to_read: true,
            waits_to_write: false,
            direction: PhantomData,
        })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// All descriptors that it has, of its own and on their way.
    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let on_their_way = self.inbox.fds().chain(self.outbox.fds());
        let on_their_way = on_their_way.map(|fd| fd.as_fd());
        std::iter::once(self.as_fd()).chain(on_their_way).collect()
    }

    /// Whether everything queued has reached the other side's socket.
    pub(crate) fn is_flushed(&self) -> bool {
        self.outbox.is_empty() && !self.lost
    }

    /// Whether everything has been written, and nothing is to be done or told about it.
    pub(crate) fn is_settled(&self) -> bool {
        self.outbox.is_empty() && !self.outbox.has_receipts() && !self.exhausted
    }

    /// Whether something waits to be written, and can be.
    pub(crate) fn is_writing(&self) -> bool {
        !self.outbox.is_empty() && !self.broken
    }

    /// Queues a frame of the crate's own.
    pub(crate) fn queue(&mut self, frame: &Out, fd: Option<Rc<NoLingerFd>>) {
        self.lost |= self.broken || self.closing;
        if !self.broken && !self.closing {
            if fd.is_some() {
                self.outbox.note_own();
            }
            let mut bytes = Vec::new();
            frame.encode(usize::from(fd.is_some()), &mut bytes);
            self.outbox.push([&bytes], fd);
        }
    }

    /// Sends a message of the program's: at once, if nothing waits; what does not fit is queued.
    /// `has_room` tells whether the program should slow down.
    pub(crate) fn send(
        &mut self,
        message: &[u8],
        fds: Vec<OwnedFd>,
        receipt: Option<ReceiptId>,
    ) -> Result<(), SendError> {
        if self.broken || self.closing || !self.socket.is_own() {
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
        self.last = message.len();
        let header = Header::of_message(message.len(), fds.len());
        let pieces = [&header[..], message];
        if self.outbox.is_empty() && fds.is_empty() {
            let (written, full) = match socket::send_two(&self.socket, pieces) {
                Ok(written) => (written, written < header.len() + message.len()),
                // If it fails for another reason, so does `flush`, which deals with it.
                Err(error) => (0, error.kind() == io::ErrorKind::WouldBlock),
            };
            self.outbox.push_rest(pieces, written);
            self.was_full(full);
        } else {
            let fds = fds.into_iter().map(NoLingerFd::from).map(Rc::new);
            self.outbox.push(pieces, fds);
        }
        if let Some(receipt) = receipt {
            self.outbox.want_receipt(receipt);
        }
        Ok(())
    }

    /// The messages of which it is known now whether they have been written, and whether they have.
    pub(crate) fn take_receipts(&mut self) -> Vec<(ReceiptId, bool)> {
        if !self.outbox.has_receipts() {
            return Vec::new();
        }
        let written = self.outbox.take_receipts();
        let mut receipts: Vec<_> = written.into_iter().map(|id| (id, true)).collect();
        if self.broken {
            let lost = self.outbox.lose_receipts();
            receipts.extend(lost.map(|id| (id, false)));
        }
        receipts
    }

    /// Whether the program may go on sending without a pause.
    pub(crate) fn has_room(&self) -> bool {
        let waiting = self.outbox.len();
        waiting == 0 || waiting + self.last <= HIGH_WATER
    }

    /// Writes what can be written now; if the socket had no room lately, not before `retry` or when much
    /// more waits.
    ///
    /// # Errors
    ///
    /// The channel is of no more use for writing; what was queued is gone. That the other side has
    /// closed is no error: reading will tell, after what it wrote before.
    pub(crate) fn flush(&mut self) -> io::Result<Flushed> {
        if !self.socket.is_own() {
            return Ok(Flushed::Done);
        }
        let had_nothing = self.outbox.is_empty();
        match self.write() {
            Err(error) if socket::is_exhaustion(&error) => {
                self.check_length()?;
                self.wait_to_write(false)?;
                let first = !std::mem::replace(&mut self.exhausted, true);
                return Ok(Flushed::Exhausted(first.then_some(error)));
            }
            Err(error) => {
                self.broken = true;
                self.lost = true;
                self.outbox.clear();
                self.wait_to_write(false)?;
                let closed = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
                return if closed.contains(&error.kind()) {
                    Ok(Flushed::Done)
                } else {
                    Err(error)
                };
            }
            Ok(()) => self.exhausted = false,
        }
        self.check_length()?;
        if self.outbox.is_empty() && self.closing {
            self.shut();
        }
        let has_left = !self.outbox.is_empty();
        // Where something has waited, more is likely to wait soon: the poller goes on to tell of room,
        // until it has done so for nothing.
        if has_left || had_nothing {
            self.wait_to_write(has_left)?;
        }
        Ok(Flushed::Done)
    }

    fn check_length(&self) -> io::Result<()> {
        if self.outbox.len() > UNREAD_MAX || self.outbox.count_own() > UNREAD_FDS_MAX {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        while self.outbox.len() > self.full_until {
            let (bytes, fds) = self.outbox.next();
            match socket::send(&self.socket, bytes, &fds) {
                Ok(written) => {
                    let was_all = written == bytes.len();
                    self.outbox.written(written);
                    self.was_full(!was_all);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.was_full(true),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The socket has had no room for all that was to be written, or it has.
    fn was_full(&mut self, full: bool) {
        self.full_until = if full { self.outbox.len() + RETRY } else { 0 };
    }

    /// There may be room in the socket again.
    pub(crate) fn retry(&mut self) {
        self.full_until = 0;
    }

    /// Whether writing has to wait for something that no poller tells.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.exhausted
    }

    /// Whether the poller is to tell when something can be read.
    pub(crate) fn wait_to_read(&mut self, wait: bool) -> io::Result<()> {
        if self.waits_to_read != wait {
            self.waits_to_read = wait;
            self.update_interest()?;
        }
        Ok(())
    }

    fn wait_to_write(&mut self, wait: bool) -> io::Result<()> {
        if self.waits_to_write != wait {
            self.waits_to_write = wait;
            self.update_interest()?;
        }
        Ok(())
    }

    fn update_interest(&self) -> io::Result<()> {
        self.socket
            .set_interest(match (self.waits_to_read, self.waits_to_write) {
                (false, false) => None,
                (true, false) => Some(Interest::Readable),
                (false, true) => Some(Interest::Writable),
                (true, true) => Some(Interest::Both),
            })
    }

    /// Waits for the other side to make room, and writes, until all is written or the time over.
    pub(crate) fn flush_blocking(&mut self, patience: Duration) {
        if !self.socket.is_own() {
            return;
        }
        let began = Instant::now();
        let _ = self.socket.set_nonblocking(false);
        while !self.outbox.is_empty() {
            let left = patience.saturating_sub(began.elapsed());
            if left.is_zero() || self.socket.set_write_timeout(Some(left)).is_err() {
                break;
            }
            let (bytes, fds) = self.outbox.next();
            match socket::send_blocking(&self.socket, bytes, &fds) {
                Ok(written) => self.outbox.written(written),
                Err(_) => break,
            }
        }
    }

    /// Reads once. The frames are then got with `next`.
    pub(crate) fn receive(&mut self, scratch: &mut [u8]) -> io::Result<Received> {
        if !self.socket.is_own() {
            return Ok(Received::Nothing);
        }
        let socket = self.socket.as_fd();
        let (received, placed, most) = match self.inbox.place() {
            None => {
                // Another one is likely, and is read to where it stays once its header is known.
                let most = if self.inbox.awaits_long() {
                    EXTRA_READ
                } else {
                    scratch.len()
                };
                (socket::receive(socket, &mut scratch[..most]), 0, most)
            }
            Some((body, missing)) => {
                let before = body.len();
                let beyond = &mut scratch[..EXTRA_READ];
                let received = socket::receive_into(socket, body, missing, beyond);
                (received, body.len() - before, missing + EXTRA_READ)
            }
        };
        match received {
            Ok(Piece { bytes: 0, .. }) => Ok(Received::End),
            Ok(piece) => {
                self.has_more = piece.bytes == most;
                self.inbox.push(&scratch[..piece.bytes - placed]);
                self.inbox.push_fds(piece.fds, piece.lost_fds);
                Ok(Received::Something)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
            // The other side ended without having read everything.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Received::End),
            Err(error) => Err(error),
        }
    }

    /// Whether the last read found all that it had room for.
    pub(crate) fn has_more(&self) -> bool {
        self.has_more
    }

    /// Whether nothing is left of what has been read.
    pub(crate) fn is_drained(&self) -> bool {
        self.inbox.is_empty()
    }

    /// Returns the next complete frame with its descriptors.
    pub(crate) fn next(&mut self) -> Result<Option<Arrival<In>>, FrameError> {
        self.inbox.next()
    }

    /// Closes when everything queued is written: the other side reads it, then end-of-file.
    pub(crate) fn close(&mut self) {
        self.closing = true;
    }

    /// From now on neither side can write; what was written can still be read.
    pub(crate) fn shut(&mut self) {
        self.broken = true;
        self.lost |= !self.outbox.is_empty();
        self.outbox.clear();
        // It would end the channel for all processes that have a copy.
        if self.socket.is_own() {
            let _ = self.socket.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Closes without regard to what the other side has written. Descriptors among it are let go of
    /// one by one: left to the kernel, their end might be waited for.
    pub(crate) fn discard(mut self) {
        self.shut();
        if !self.socket.is_own() {
            return;
        }
        let mut scratch = [0; 4096];
        let is_something = |piece: &Piece| piece.bytes > 0;
        while socket::receive(self.socket.as_fd(), &mut scratch)
            .is_ok_and(|piece| is_something(&piece))
        {}
    }
}

#[cfg(test)]
mod tests {
    use super::inbox::{LARGE_BODY, READ_SIZE};
    use super::*;
    use crate::sys::poll::ReadyList;
    use crate::wire::frame::{HEADER, MAX_BATCH, ToMaster, ToWorker};
    use proptest::prelude::*;
    use std::fs::File;
    use std::io::{Read as _, Write as _};

    type MasterEnd = Channel<ToMaster, ToWorker>;
    type WorkerEnd = Channel<ToWorker, ToMaster>;

    fn pair() -> (MasterEnd, WorkerEnd) {
        pair_in(&Poller::new().unwrap())
    }

    fn pair_in(poller: &Poller) -> (MasterEnd, WorkerEnd) {
        let (a, b) = UnixStream::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        b.set_nonblocking(true).unwrap();
        let master = Channel::new(a, poller, 1).unwrap();
        (master, Channel::new(b, poller, 2).unwrap())
    }

    /// Reads all that is there.
    fn drain(end: &mut WorkerEnd) -> Vec<(ToWorker, Vec<OwnedFd>)> {
        let mut frames = Vec::new();
        let mut scratch = vec![0; READ_SIZE];
        while end.receive(&mut scratch).unwrap() == Received::Something {
            while let Some(arrival) = end.next().unwrap() {
                assert!(!arrival.lost_fds);
                let fds = arrival.fds.into_iter().map(NoLingerFd::into_owned_fd);
                frames.push((arrival.frame, fds.collect()));
            }
        }
        frames
    }

    /// A frame that carries a descriptor.
    fn numbered(number: u64) -> ToWorker {
        ToWorker::Message(number.to_le_bytes().into())
    }

    /// A pipe's writing end, marked by what can be read from the other one.
    fn marked() -> (UnixStream, OwnedFd) {
        let (reader, writer) = UnixStream::pair().unwrap();
        (reader, writer.into())
    }

    fn is_same(mut reader: UnixStream, fd: OwnedFd) -> bool {
        File::from(fd).write_all(b"x").unwrap();
        let mut byte = [0];
        reader.read_exact(&mut byte).is_ok()
    }

    #[test]
    fn who_has_no_room_is_left_alone_until_it_may_have_some() {
        let (mut master, mut worker) = pair();
        let waiting = |master: &MasterEnd| master.outbox.len();
        while waiting(&master) == 0 {
            master.send(&[7; 3000], Vec::new(), None).unwrap();
        }
        let before = waiting(&master);
        drain(&mut worker);
        master.flush().unwrap();
        assert_eq!(waiting(&master), before, "the poller has not told of room");
        master.retry();
        master.flush().unwrap();
        assert_eq!(waiting(&master), 0);
    }

    #[test]
    fn descriptors_stay_with_their_frames() {
        let (mut master, mut worker) = pair();
        let mut readers = Vec::new();
        for number in 0..200 {
            let (reader, fd) = marked();
            readers.push(reader);
            master.queue(&numbered(number), Some(Rc::new(fd.into())));
            if number % 3 == 0 {
                master.queue(&ToWorker::Message(vec![7; 3000]), None);
            }
        }
        let mut frames = Vec::new();
        while frames.len() < 267 {
            master.retry();
            master.flush().unwrap();
            frames.extend(drain(&mut worker));
        }
        let mut readers = readers.into_iter();
        let mut numbers = 0..200;
        for (frame, fds) in frames {
            let Ok([fd]) = <[OwnedFd; 1]>::try_from(fds) else {
                assert_eq!(frame, ToWorker::Message(vec![7; 3000]));
                continue;
            };
            assert_eq!(Some(frame), numbers.next().map(numbered));
            assert!(is_same(readers.next().unwrap(), fd));
        }
        assert_eq!(numbers.next(), None);
    }

    #[test]
    fn a_long_message_with_a_descriptor_arrives_whole() {
        let (mut master, mut worker) = pair();
        let (reader, fd) = marked();
        let text = vec![9; 800_000];
        let receipt = ReceiptId::next();
        let sent = master.send(&text, vec![fd], Some(receipt));
        sent.unwrap();
        master.flush().unwrap();
        assert_eq!(master.take_receipts(), [], "not all of it");
        let mut frames = Vec::new();
        while frames.is_empty() {
            master.retry();
            master.flush().unwrap();
            frames.extend(drain(&mut worker));
        }
        let (frame, mut fds) = frames.remove(0);
        assert_eq!(frame, ToWorker::Message(text));
        assert!(is_same(reader, fds.remove(0)));
        assert!(master.is_flushed());
        assert_eq!(master.take_receipts(), [(receipt, true)]);
    }

    #[test]
    fn received_descriptors_close_on_exec() {
        let (mut master, mut worker) = pair();
        let (_reader, fd) = marked();
        master.queue(&numbered(1), Some(Rc::new(fd.into())));
        master.flush().unwrap();
        let (_, fds) = drain(&mut worker).remove(0);
        let path = format!("/proc/self/fdinfo/{}", {
            use std::os::fd::AsRawFd as _;
            fds[0].as_raw_fd()
        });
        let info = std::fs::read_to_string(path).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = u32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
        assert_ne!(flags & 0o2_000_000, 0, "O_CLOEXEC");
    }

    #[test]
    fn a_reader_that_never_reads_costs_a_bounded_amount() {
        let (mut master, _worker) = pair();
        let message = vec![0; 64 << 10];
        let (mut slow, mut sent) = (0, 0);
        let refused = loop {
            match master.send(&message, Vec::new(), None) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
            master.flush().unwrap();
            slow += usize::from(!master.has_room());
        };
        assert_eq!(refused, SendError::QueueFull);
        assert!(master.outbox.len() <= HARD_LIMIT);
        assert!(slow > 100 && slow < sent, "first true, then false");
    }

    #[test]
    fn messages_of_all_lengths_arrive_whole_however_they_are_cut() {
        let (mut master, mut worker) = pair();
        let mut lengths: Vec<_> = [
            0,
            1,
            LARGE_BODY - 1,
            LARGE_BODY,
            LARGE_BODY + 1,
            EXTRA_READ,
            READ_SIZE,
            MAX_BODY,
        ]
        .into();
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..300 {
            let most = 1 << rng.u32(0..18);
            lengths.push(rng.usize(0..most));
        }
        let messages = lengths
            .iter()
            .enumerate()
            .map(|(n, length)| vec![n.to_le_bytes()[0]; *length]);
        let messages: Vec<_> = messages.collect();
        let mut waiting = messages.iter();
        let mut frames = Vec::new();
        while frames.len() < messages.len() {
            for message in waiting.by_ref().take(rng.usize(0..4)) {
                master.send(message, Vec::new(), None).unwrap();
            }
            master.retry();
            master.flush().unwrap();
            frames.extend(drain(&mut worker));
        }
        for (frame, message) in frames.into_iter().zip(messages) {
            assert!(frame.1.is_empty() && frame.0 == ToWorker::Message(message));
        }
        assert!(master.is_flushed());
    }

    #[test]
    fn one_long_message_after_the_other_is_read_to_where_it_stays() {
        let (mut master, mut worker) = pair();
        let mut scratch = vec![0; READ_SIZE];
        // How much each read brings, and whether it found more than it had room for.
        let mut read = |length: usize| {
            master.send(&vec![7; length], Vec::new(), None).unwrap();
            let mut reads = Vec::new();
            loop {
                let before = worker.inbox.sizes().0;
                assert_eq!(worker.receive(&mut scratch).unwrap(), Received::Something);
                reads.push((worker.inbox.sizes().0 - before, worker.has_more()));
                if let Some(arrival) = worker.next().unwrap() {
                    assert_eq!(arrival.frame, ToWorker::Message(vec![7; length]));
                    assert!(worker.is_drained());
                    return reads;
                }
            }
        };
        // The header of a long message is not kept with it.
        let (long, short) = (READ_SIZE, 100);
        assert_eq!(read(long), [(READ_SIZE, true), (HEADER, false)]);
        let (first, rest) = (EXTRA_READ, HEADER + long - EXTRA_READ);
        assert_eq!(read(long), [(first, true), (rest, false)]);
        assert_eq!(read(short), [(HEADER + short, false)]);
        assert_eq!(read(long), [(READ_SIZE, true), (HEADER, false)]);
        let (middle, rest) = (6000, HEADER + 6000 - EXTRA_READ);
        assert_eq!(read(middle), [(first, true), (rest, false)], "in two");
        assert_eq!(read(long), [(READ_SIZE, true), (HEADER, false)]);
    }

    #[test]
    fn a_long_message_is_to_wait_only_once() {
        let (mut master, mut worker) = pair();
        let send = |master: &mut MasterEnd, length| {
            master.send(&vec![0; length], Vec::new(), None).unwrap();
            master.flush().unwrap();
            (master.has_room(), master.is_flushed())
        };
        loop {
            match send(&mut master, HIGH_WATER) {
                (has_room, true) => assert!(has_room, "nothing waits"),
                (has_room, false) => break assert!(!has_room, "the next one would wait, too"),
            }
        }
        while !master.is_flushed() {
            drain(&mut worker);
            master.retry();
            master.flush().unwrap();
        }
        while send(&mut master, 100).1 {}
        assert!(master.has_room(), "for many that are short");
    }

    #[test]
    fn room_is_told_of_until_there_is_nothing_to_write() {
        let poller = Poller::new().unwrap();
        let (mut master, mut worker) = pair_in(&poller);
        let is_told = || {
            let mut ready = ReadyList::new();
            poller.wait(Some(Duration::ZERO), &mut ready).unwrap();
            ready.iter().any(|ready| ready.key == 1 && ready.writable)
        };
        assert!(!is_told(), "nothing has waited");
        for _ in 0..2 {
            while master.is_flushed() {
                master.send(&[0; 3000], Vec::new(), None).unwrap();
                master.flush().unwrap();
            }
            assert!(!is_told(), "there is none");
            drain(&mut worker);
            assert!(is_told());
            master.retry();
            master.flush().unwrap();
            assert!(master.is_flushed() && is_told(), "for what may come next");
        }
        master.flush().unwrap();
        assert!(!is_told(), "nothing has come");
    }

    #[test]
    fn a_full_socket_is_not_tried_for_each_message() {
        let (mut master, mut worker) = pair();
        let send = |master: &mut MasterEnd| {
            master.send(&[0; 100], Vec::new(), None).unwrap();
            master.flush().unwrap();
        };
        let fill = |master: &mut MasterEnd| {
            while master.is_flushed() {
                send(master);
            }
        };
        fill(&mut master);
        drain(&mut worker);
        send(&mut master);
        assert!(!master.is_flushed(), "nobody has told of room");
        master.retry();
        master.flush().unwrap();
        assert!(master.is_flushed());
        fill(&mut master);
        drain(&mut worker);
        for _ in 0..RETRY / 100 {
            send(&mut master);
        }
        assert!(master.is_flushed(), "it was tried all the same");
    }

    #[test]
    fn the_limits_of_a_message() {
        let (mut master, _worker) = pair();
        let long = master.send(&vec![0; MAX_BODY + 1], Vec::new(), None);
        assert_eq!(long, Err(SendError::TooLong));
        let fds = (0..17).map(|_| marked().1).collect();
        let many = master.send(b"", fds, None);
        assert_eq!(many, Err(SendError::TooManyDescriptors));
    }

    #[test]
    fn descriptors_nobody_announced_are_an_error() {
        let (mut master, worker) = pair();
        let junk = [0; 3];
        let (_keep, fd) = marked();
        let mut outcome = Ok(None);
        for _ in 0..4 {
            let fds = [fd.as_fd(); MAX_BATCH];
            socket::send(&worker.socket, &junk[..1], &fds).unwrap();
            let mut scratch = [0; 64];
            // A header of zeroes has version 0; one byte at a time it stays incomplete.
            assert_eq!(master.receive(&mut scratch).unwrap(), Received::Something);
            outcome = master.next();
            if outcome.is_err() {
                break;
            }
        }
        assert_eq!(outcome.unwrap_err(), FrameError::Descriptors);
    }

    #[test]
    fn what_was_written_before_the_end_is_read_before_the_end() {
        let (mut master, mut worker) = pair();
        worker.queue(&ToMaster::Message(b"last words".to_vec()), None);
        // Unread data turns the end into a reset.
        master.queue(&ToWorker::Disconnect, None);
        master.flush().unwrap();
        worker.flush().unwrap();
        drop(worker);
        let mut scratch = [0; 64];
        assert_eq!(master.receive(&mut scratch).unwrap(), Received::Something);
        let frame = master.next().unwrap().unwrap().frame;
        assert_eq!(frame, ToMaster::Message(b"last words".to_vec()));
        assert_eq!(master.receive(&mut scratch).unwrap(), Received::End);
        master.queue(&ToWorker::Disconnect, None);
        assert!(master.flush().is_ok(), "a dead peer is no error");
    }

    #[test]
    fn a_receipt_tells_what_was_lost() {
        let (mut master, worker) = pair();
        let receipts = [ReceiptId::next(), ReceiptId::next()];
        for receipt in receipts {
            let sent = master.send(&[0; 500_000], Vec::new(), Some(receipt));
            sent.unwrap();
        }
        drop(worker);
        master.flush().unwrap();
        assert_eq!(master.take_receipts(), receipts.map(|id| (id, false)));
    }

    #[test]
    fn what_was_written_before_closing_has_been_said() {
        let (mut master, mut worker) = pair();
        worker.queue(&ToMaster::DisconnectRequest, None);
        worker.close();
        worker.flush().unwrap();
        assert!(worker.is_flushed());
        worker.queue(&ToMaster::Online, None);
        assert!(!worker.is_flushed(), "but not what came later");
        let mut scratch = [0; 64];
        assert_eq!(master.receive(&mut scratch).unwrap(), Received::Something);
        assert_eq!(
            master.next().unwrap().unwrap().frame,
            ToMaster::DisconnectRequest
        );
        assert_eq!(master.receive(&mut scratch).unwrap(), Received::End);
    }

    #[test]
    fn after_shut_the_other_side_cannot_write() {
        let (mut master, mut worker) = pair();
        worker.queue(&ToMaster::DisconnectRequest, None);
        worker.flush().unwrap();
        assert!(worker.is_flushed());
        master.shut();
        worker.queue(&ToMaster::Online, None);
        worker.flush().unwrap();
        assert!(!worker.is_flushed(), "so it knows that this was not heard");
        let mut scratch = [0; 64];
        assert_eq!(master.receive(&mut scratch).unwrap(), Received::Something);
        assert_eq!(
            master.next().unwrap().unwrap().frame,
            ToMaster::DisconnectRequest
        );
    }

    proptest! {
        /// The system writes as much as it likes of what it is given, reads it in other pieces, and
        /// drops the last descriptors of some batches.
        #[test]
        fn lost_descriptors_are_those_of_their_own_frames(
            counts in proptest::collection::vec(0..=MAX_FDS, 1..40),
            writes in proptest::collection::vec((1..400usize, 0..4usize), 1..40),
        ) {
            let null = Rc::new(NoLingerFd::from(OwnedFd::from(File::open("/dev/null").unwrap())));
            let mut outbox = Outbox::default();
            for (n, count) in counts.iter().enumerate() {
                let mut bytes = Vec::new();
                let body = vec![u8::try_from(n).unwrap(); 30];
                ToMaster::Message(body).encode(*count, &mut bytes);
                outbox.push([&bytes[..]], std::iter::repeat_n(Rc::clone(&null), *count));
            }
            let mut inbox = Inbox::default();
            let (mut lost, mut got, mut seen) = (0, 0, 0);
            for (most, drops) in writes.iter().cycle() {
                let (bytes, fds) = outbox.next();
                let kept = fds.len().saturating_sub(*drops);
                let copies = fds[..kept].iter().map(|fd| fd.try_clone_to_owned().unwrap());
                inbox.push_fds(copies.map(NoLingerFd::from).collect(), kept < fds.len());
                lost += fds.len() - kept;
                let written = bytes.len().min(*most);
                inbox.push(&bytes[..written]);
                outbox.written(written);
                while let Some(arrival) = inbox.next::<ToMaster>().unwrap() {
                    let announced = counts[seen];
                    prop_assert_eq!(arrival.lost_fds, arrival.fds.len() < announced);
                    got += arrival.fds.len();
                    seen += 1;
                }
                if outbox.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(seen, counts.len());
            prop_assert_eq!(got + lost, counts.iter().sum::<usize>());
            prop_assert!(inbox.fds().next().is_none());
        }

    }
}
