//! One end of the socketpair between master and worker: frames in and out, with the descriptors
//! that belong to them.
//!
//! The kernel keeps bytes in order but knows nothing of frames: a frame may arrive in pieces, and
//! its descriptors with an earlier piece. Two facts make it come out right. All descriptors of a
//! call leave with its first byte, so that once anything is written none of them is sent again.
//! And they arrive no later than the first byte of the frame they belong to, in order, so that the
//! reader keeps a queue of them and each frame takes as many as its header says.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use crate::error::SendError;
use crate::frame::{Frame, FrameError, HEADER, Header, MAX_BODY, MAX_FDS};
use crate::sys::poll::{Interest, Poller, Registered};
use crate::sys::socket::{self, MAX_FDS_PER_CALL};

/// Above this many bytes waiting, `send` tells the program to slow down.
const HIGH_WATER: usize = 64 << 10;
/// Above this many bytes waiting, `send` refuses.
const HARD_LIMIT: usize = 8 << 20;
/// Above this many bytes waiting, a peer that reads nothing is cut off. Frames of the crate's own
/// may use the room beyond the hard limit; there are few of them for each that the peer sends.
const CUT_OFF: usize = HARD_LIMIT + (1 << 20);
/// How much one call writes at most.
const WRITE_SIZE: usize = 64 << 10;
/// How much one call reads at most, and so how long one peer keeps the loop.
pub(crate) const READ_SIZE: usize = 64 << 10;
/// Descriptors that arrived ahead of their frames. Two calls of an honest peer can be under way.
const MAX_EARLY_FDS: usize = 2 * MAX_FDS_PER_CALL;

/// Names a message of the program's until it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ReceiptId(u64);

impl ReceiptId {
    /// Returns one that this process has not used before.
    pub(crate) fn next() -> Self {
        thread_local! {
            static LAST: Cell<u64> = const { Cell::new(0) };
        }
        LAST.set(LAST.get() + 1);
        Self(LAST.get())
    }
}

/// Turns pieces into frames.
#[derive(Debug, Default)]
struct Inbox {
    bytes: Vec<u8>,
    /// Where the first unread frame begins.
    start: usize,
    fds: VecDeque<OwnedFd>,
}

impl Inbox {
    fn push(&mut self, piece: &[u8]) {
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.bytes.shrink_to(READ_SIZE);
        } else if self.start > 0 {
            self.bytes.drain(..self.start);
        }
        self.start = 0;
        self.bytes.extend_from_slice(piece);
    }

    fn next<F: Frame>(&mut self) -> Result<Option<(F, Vec<OwnedFd>)>, FrameError> {
        let unread = &self.bytes[self.start..];
        let Some((header, rest)) = unread.split_first_chunk::<HEADER>() else {
            return self.incomplete();
        };
        let header = Header::decode(*header)?;
        let Some(body) = rest.get(..header.length) else {
            return self.incomplete();
        };
        if header.fds > self.fds.len() {
            return Err(FrameError::Descriptors);
        }
        let frame = F::decode(header.kind, header.fds, body)?;
        self.start += HEADER + header.length;
        Ok(Some((frame, self.fds.drain(..header.fds).collect())))
    }

    fn incomplete<T>(&self) -> Result<Option<T>, FrameError> {
        if self.fds.len() > MAX_EARLY_FDS {
            return Err(FrameError::Descriptors);
        }
        Ok(None)
    }
}

/// Frames that wait to be written.
#[derive(Debug, Default)]
struct Outbox {
    bytes: VecDeque<u8>,
    /// How many bytes have been written since the beginning.
    written: u64,
    /// Each descriptor with the place of its frame's first byte, counted like `written`.
    fds: VecDeque<(u64, Rc<OwnedFd>)>,
    /// Each message of which the program wants to hear, with the place of its last byte.
    receipts: VecDeque<(u64, ReceiptId)>,
}

impl Outbox {
    fn push(&mut self, frame: &[u8], fds: impl IntoIterator<Item = Rc<OwnedFd>>) {
        let place = self.written + self.bytes.len() as u64;
        self.fds.extend(fds.into_iter().map(|fd| (place, fd)));
        self.bytes.extend(frame);
    }

    /// What the next call should write: bytes up to a limit, and the descriptors of the frames
    /// that begin in them.
    fn next(&self) -> (&[u8], Vec<BorrowedFd<'_>>) {
        let (bytes, _) = self.bytes.as_slices();
        let mut length = bytes.len().min(WRITE_SIZE);
        if let Some((place, _)) = self.fds.get(MAX_FDS_PER_CALL) {
            // A frame does not begin before its descriptors can be sent. The limit of descriptors
            // in one frame keeps this from being zero.
            let before = usize::try_from(place - self.written).unwrap_or(length);
            length = length.min(before);
        }
        let end = self.written + length as u64;
        let fds = self.fds.iter().take_while(|(place, _)| *place < end);
        (&bytes[..length], fds.map(|(_, fd)| fd.as_fd()).collect())
    }

    fn written(&mut self, bytes: usize, fds: usize) {
        self.bytes.drain(..bytes);
        self.written += bytes as u64;
        if bytes > 0 {
            self.fds.drain(..fds);
        }
        if self.bytes.is_empty() {
            self.bytes.shrink_to(WRITE_SIZE);
        }
    }

    /// What has been pushed last is the message of this receipt.
    fn want_receipt(&mut self, receipt: ReceiptId) {
        let end = self.written + self.bytes.len() as u64;
        self.receipts.push_back((end, receipt));
    }

    /// The messages that have been written since the last call.
    fn take_receipts(&mut self) -> Vec<ReceiptId> {
        let done = self
            .receipts
            .partition_point(|(end, _)| *end <= self.written);
        self.receipts
            .drain(..done)
            .map(|(_, receipt)| receipt)
            .collect()
    }

    /// Forgets what waits, but for the receipts, which the program still wants.
    fn clear(&mut self) {
        self.bytes = VecDeque::new();
        self.fds.clear();
    }
}

// A frame has at most 16 descriptors, and a call takes 64.
const _: () = assert!(MAX_FDS < MAX_FDS_PER_CALL);

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
    /// Nothing can be written any more.
    broken: bool,
    /// Something was to be written and has not been.
    lost: bool,
    /// To be closed when everything is written.
    closing: bool,
    /// Whether the poller tells when something can be read.
    waits_to_read: bool,
    waits_to_write: bool,
    direction: PhantomData<(In, Out)>,
}

impl<In: Frame, Out: Frame> Channel<In, Out> {
    /// The socket must not block.
    pub(crate) fn new(socket: UnixStream, poller: &Poller, key: usize) -> io::Result<Self> {
        Ok(Self {
            socket: poller.add(socket, key, Some(Interest::Readable))?,
            inbox: Inbox::default(),
            outbox: Outbox::default(),
            broken: false,
            lost: false,
            closing: false,
            waits_to_read: true,
            waits_to_write: false,
            direction: PhantomData,
        })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether everything queued has reached the other side's socket.
    pub(crate) fn is_flushed(&self) -> bool {
        self.outbox.bytes.is_empty() && !self.lost
    }

    /// Whether something waits to be written, and can be.
    pub(crate) fn is_writing(&self) -> bool {
        !self.outbox.bytes.is_empty() && !self.broken
    }

    /// Queues a frame of the crate's own.
    pub(crate) fn queue(&mut self, frame: &Out, fds: impl IntoIterator<Item = Rc<OwnedFd>>) {
        self.lost |= self.broken || self.closing;
        if !self.broken && !self.closing {
            let fds: Vec<_> = fds.into_iter().collect();
            let mut bytes = Vec::new();
            frame.encode(fds.len(), &mut bytes);
            self.outbox.push(&bytes, fds);
        }
    }

    /// Queues a message of the program's; `has_room` tells whether the program should slow down.
    pub(crate) fn send(
        &mut self,
        message: &Out,
        length: usize,
        fds: Vec<OwnedFd>,
        receipt: Option<ReceiptId>,
    ) -> Result<(), SendError> {
        if self.broken || self.closing {
            return Err(SendError::ChannelClosed);
        }
        if length > MAX_BODY {
            return Err(SendError::TooLong);
        }
        if fds.len() > MAX_FDS {
            return Err(SendError::TooManyDescriptors);
        }
        if self.outbox.bytes.len() + length > HARD_LIMIT {
            return Err(SendError::QueueFull);
        }
        self.queue(message, fds.into_iter().map(Rc::new));
        if let Some(receipt) = receipt {
            self.outbox.want_receipt(receipt);
        }
        Ok(())
    }

    /// The messages of which it is known now whether they have been written, and whether they have.
    pub(crate) fn take_receipts(&mut self) -> Vec<(ReceiptId, bool)> {
        let written = self.outbox.take_receipts();
        let mut receipts: Vec<_> = written.into_iter().map(|id| (id, true)).collect();
        if self.broken {
            let lost = self.outbox.receipts.drain(..);
            receipts.extend(lost.map(|(_, id)| (id, false)));
        }
        receipts
    }

    /// Whether the program may go on sending without a pause.
    pub(crate) fn has_room(&self) -> bool {
        self.outbox.bytes.len() <= HIGH_WATER
    }

    /// Writes what can be written now.
    ///
    /// # Errors
    ///
    /// The channel is of no more use for writing; what was queued is gone. That the other side has
    /// closed is no error: reading will tell, after what it wrote before.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        let outcome = self.write();
        if let Err(error) = outcome {
            self.broken = true;
            self.lost = true;
            self.outbox.clear();
            self.wait_to_write(false)?;
            let closed = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
            return if closed.contains(&error.kind()) {
                Ok(())
            } else {
                Err(error)
            };
        }
        if self.outbox.bytes.len() > CUT_OFF {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        if self.outbox.bytes.is_empty() && self.closing {
            self.shut();
        }
        self.wait_to_write(!self.outbox.bytes.is_empty())
    }

    fn write(&mut self) -> io::Result<()> {
        while !self.outbox.bytes.is_empty() {
            let (bytes, fds) = self.outbox.next();
            let count = fds.len();
            match socket::send(&self.socket, bytes, &fds) {
                Ok(written) => self.outbox.written(written, count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
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
        let _ = self.socket.set_nonblocking(false);
        let _ = self.socket.set_write_timeout(Some(patience));
        while !self.outbox.bytes.is_empty() {
            let (bytes, fds) = self.outbox.next();
            let count = fds.len();
            match socket::send_waiting(&self.socket, bytes, &fds) {
                Ok(written) => self.outbox.written(written, count),
                Err(_) => break,
            }
        }
    }

    /// Reads once. The frames are then got with `next`.
    pub(crate) fn receive(&mut self, scratch: &mut [u8]) -> io::Result<Received> {
        match socket::receive(&self.socket, scratch, &mut self.inbox.fds) {
            Ok(0) => Ok(Received::End),
            Ok(read) => {
                self.inbox.push(&scratch[..read]);
                Ok(Received::Something)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
            // The other side ended without having read everything.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Received::End),
            Err(error) => Err(error),
        }
    }

    /// Returns the next complete frame with its descriptors.
    pub(crate) fn next(&mut self) -> Result<Option<(In, Vec<OwnedFd>)>, FrameError> {
        self.inbox.next()
    }

    /// Closes when everything queued is written: the other side reads it, then end-of-file.
    pub(crate) fn close(&mut self) {
        self.closing = true;
    }

    /// From now on neither side can write; what was written can still be read.
    pub(crate) fn shut(&mut self) {
        self.broken = true;
        self.lost |= !self.outbox.bytes.is_empty();
        self.outbox.clear();
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{HandleId, ToMaster, ToWorker};
    use proptest::prelude::*;
    use std::fs::File;
    use std::io::{Read as _, Write as _};

    type MasterEnd = Channel<ToMaster, ToWorker>;
    type WorkerEnd = Channel<ToWorker, ToMaster>;

    fn pair() -> (MasterEnd, WorkerEnd) {
        let (a, b) = UnixStream::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        b.set_nonblocking(true).unwrap();
        let poller = Poller::new().unwrap();
        let master = Channel::new(a, &poller, 1).unwrap();
        (master, Channel::new(b, &poller, 2).unwrap())
    }

    /// Reads all that is there.
    fn drain(end: &mut WorkerEnd) -> Vec<(ToWorker, Vec<OwnedFd>)> {
        let mut frames = Vec::new();
        let mut scratch = vec![0; READ_SIZE];
        while end.receive(&mut scratch).unwrap() == Received::Something {
            while let Some(frame) = end.next().unwrap() {
                frames.push(frame);
            }
        }
        frames
    }

    fn connection(number: u64) -> ToWorker {
        let handle = HandleId(1);
        ToWorker::Connection { handle, number }
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
    fn descriptors_stay_with_their_frames() {
        let (mut master, mut worker) = pair();
        let mut readers = Vec::new();
        for number in 0..200 {
            let (reader, fd) = marked();
            readers.push(reader);
            master.queue(&connection(number), [Rc::new(fd)]);
            if number % 3 == 0 {
                master.queue(&ToWorker::Message(vec![7; 3000]), []);
            }
        }
        let mut frames = Vec::new();
        while frames.len() < 267 {
            master.flush().unwrap();
            frames.extend(drain(&mut worker));
        }
        let mut readers = readers.into_iter();
        let mut numbers = 0..200;
        for (frame, fds) in frames {
            if let ToWorker::Connection { number, .. } = frame {
                assert_eq!(Some(number), numbers.next());
                let [fd] = fds.try_into().unwrap();
                assert!(is_same(readers.next().unwrap(), fd), "number {number}");
            } else {
                assert_eq!((frame, fds.len()), (ToWorker::Message(vec![7; 3000]), 0));
            }
        }
        assert_eq!(numbers.next(), None);
    }

    #[test]
    fn a_long_message_with_a_descriptor_arrives_whole() {
        let (mut master, mut worker) = pair();
        let (reader, fd) = marked();
        let text = vec![9; 800_000];
        let message = ToWorker::Message(text.clone());
        let receipt = ReceiptId::next();
        let sent = master.send(&message, text.len(), vec![fd], Some(receipt));
        sent.unwrap();
        master.flush().unwrap();
        assert_eq!(master.take_receipts(), [], "not all of it");
        let mut frames = Vec::new();
        while frames.is_empty() {
            master.flush().unwrap();
            frames.extend(drain(&mut worker));
        }
        let (frame, mut fds) = frames.remove(0);
        assert_eq!(frame, message);
        assert!(is_same(reader, fds.remove(0)));
        assert!(master.is_flushed());
        assert_eq!(master.take_receipts(), [(receipt, true)]);
    }

    #[test]
    fn received_descriptors_close_on_exec() {
        let (mut master, mut worker) = pair();
        let (_reader, fd) = marked();
        master.queue(&connection(1), [Rc::new(fd)]);
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
        let message = ToWorker::Message(vec![0; 64 << 10]);
        let (mut slow, mut sent) = (0, 0);
        let refused = loop {
            match master.send(&message, 64 << 10, Vec::new(), None) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
            master.flush().unwrap();
            slow += usize::from(!master.has_room());
        };
        assert_eq!(refused, SendError::QueueFull);
        assert!(master.outbox.bytes.len() <= HARD_LIMIT);
        assert!(slow > 100 && slow < sent, "first true, then false");
    }

    #[test]
    fn the_limits_of_a_message() {
        let (mut master, _worker) = pair();
        let long = master.send(&ToWorker::Message(vec![]), MAX_BODY + 1, Vec::new(), None);
        assert_eq!(long, Err(SendError::TooLong));
        let fds = (0..17).map(|_| marked().1).collect();
        let many = master.send(&ToWorker::Message(vec![]), 0, fds, None);
        assert_eq!(many, Err(SendError::TooManyDescriptors));
    }

    #[test]
    fn descriptors_nobody_announced_are_an_error() {
        let (mut master, worker) = pair();
        let junk = [0; 3];
        let (_keep, fd) = marked();
        let mut outcome = Ok(None);
        for _ in 0..4 {
            let fds = [fd.as_fd(); MAX_FDS_PER_CALL];
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
        worker.queue(&ToMaster::Message(b"last words".to_vec()), []);
        // Unread data turns the end into a reset.
        master.queue(&ToWorker::Disconnect, []);
        master.flush().unwrap();
        worker.flush().unwrap();
        drop(worker);
        let mut scratch = [0; 64];
        assert_eq!(master.receive(&mut scratch).unwrap(), Received::Something);
        let (frame, _) = master.next().unwrap().unwrap();
        assert_eq!(frame, ToMaster::Message(b"last words".to_vec()));
        assert_eq!(master.receive(&mut scratch).unwrap(), Received::End);
        master.queue(&ToWorker::Disconnect, []);
        assert!(master.flush().is_ok(), "a dead peer is no error");
    }

    #[test]
    fn a_receipt_tells_what_was_lost() {
        let (mut master, worker) = pair();
        let receipts = [ReceiptId::next(), ReceiptId::next()];
        for receipt in receipts {
            let message = ToWorker::Message(vec![0; 500_000]);
            let sent = master.send(&message, 500_000, Vec::new(), Some(receipt));
            sent.unwrap();
        }
        drop(worker);
        master.flush().unwrap();
        assert_eq!(master.take_receipts(), receipts.map(|id| (id, false)));
    }

    #[test]
    fn what_was_written_before_closing_has_been_said() {
        let (mut master, mut worker) = pair();
        worker.queue(&ToMaster::Leaving, []);
        worker.close();
        worker.flush().unwrap();
        assert!(worker.is_flushed());
        worker.queue(&ToMaster::Online, []);
        assert!(!worker.is_flushed(), "but not what came later");
        let mut scratch = [0; 64];
        assert_eq!(master.receive(&mut scratch).unwrap(), Received::Something);
        assert_eq!(master.next().unwrap().unwrap().0, ToMaster::Leaving);
        assert_eq!(master.receive(&mut scratch).unwrap(), Received::End);
    }

    #[test]
    fn after_shut_the_other_side_cannot_write() {
        let (mut master, mut worker) = pair();
        worker.queue(&ToMaster::Leaving, []);
        worker.flush().unwrap();
        assert!(worker.is_flushed());
        master.shut();
        worker.queue(&ToMaster::Online, []);
        worker.flush().unwrap();
        assert!(!worker.is_flushed(), "so it knows that this was not heard");
        let mut scratch = [0; 64];
        assert_eq!(master.receive(&mut scratch).unwrap(), Received::Something);
        assert_eq!(master.next().unwrap().unwrap().0, ToMaster::Leaving);
    }

    proptest! {
        #[test]
        fn frames_come_out_however_they_are_cut(
            sizes in proptest::collection::vec(0..3000usize, 1..20),
            cuts in proptest::collection::vec(1..500usize, 1..50),
        ) {
            let mut bytes = Vec::new();
            for (n, size) in sizes.iter().enumerate() {
                let fill = u8::try_from(n).unwrap();
                ToMaster::Message(vec![fill; *size]).encode(0, &mut bytes);
            }
            let mut inbox = Inbox::default();
            let mut rest = &bytes[..];
            let mut seen = Vec::new();
            for cut in cuts.iter().cycle() {
                let (piece, later) = rest.split_at(rest.len().min(*cut));
                inbox.push(piece);
                rest = later;
                while let Some((frame, _)) = inbox.next::<ToMaster>().unwrap() {
                    let ToMaster::Message(body) = frame else { unreachable!() };
                    seen.push(body.len());
                }
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(seen, sizes);
        }

        #[test]
        fn any_bytes_are_frames_or_an_error(pieces: Vec<Vec<u8>>) {
            let mut inbox = Inbox::default();
            for piece in pieces {
                inbox.push(&piece);
                while let Ok(Some(_)) = inbox.next::<ToMaster>() {}
            }
        }
    }
}
