//! Divides frames into batches of bytes and descriptors. An outbox is the sending half of a
//! channel.
//!
//! An *offset* is a position in the stream, as the number of bytes since the channel was created.

use std::collections::VecDeque;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::rc::Rc;

use crate::sys::fd::NoLingerFd;
use crate::types::protocol::MAX_FDS;
use crate::wire::frame::header::{BATCH_OFFSET, MAX_BATCH};
use crate::wire::receipts::ReceiptId;

/// The maximum number of queued bytes that a single system call writes. With a smaller value, many
/// frames take more system calls. With a larger value, more memory stays allocated after a burst.
const WRITE_SIZE: usize = 64 << 10;
// A batch must have space for more descriptors than one frame can carry. `batch_size` depends on
// this.
const _: () = assert!(MAX_FDS < MAX_BATCH);

/// A descriptor that has not been written.
#[derive(Debug)]
struct QueuedFd {
    /// The offset of the first byte of the descriptor's frame.
    frame_start: u64,
    fd: Rc<NoLingerFd>,
}

/// A receipt that the application waits for.
#[derive(Debug)]
struct PendingReceipt {
    /// The offset of the end of the message.
    message_end: u64,
    id: ReceiptId,
}

/// The bytes that a single system call writes, and the descriptors of the frames that start in
/// these bytes.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) fds: Vec<BorrowedFd<'a>>,
}

/// The numbers of bytes and descriptors in a batch.
#[derive(Clone, Copy, Debug)]
struct BatchSize {
    bytes: usize,
    fds: usize,
}

/// The frames that have not been written.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    bytes: VecDeque<u8>,
    /// The offset of the first byte of `bytes`. All earlier bytes are written.
    written: u64,
    fds: VecDeque<QueuedFd>,
    /// The offsets of the protocol frames that have a descriptor.
    frames_with_fd: VecDeque<u64>,
    /// The offset of the end of the last batch that had descriptors. Later descriptors wait until
    /// all bytes up to this offset are written, so that the reader never holds descriptors of more
    /// than two batches.
    batch_end: u64,
    receipts: VecDeque<PendingReceipt>,
}

impl Outbox {
    /// Returns the number of bytes that have not been written.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn fds(&self) -> impl Iterator<Item = &NoLingerFd> {
        self.fds.iter().map(|queued| &*queued.fd)
    }

    /// Returns the number of unwritten protocol frames that have a descriptor.
    pub(super) fn frames_with_fd(&self) -> usize {
        self.frames_with_fd.len()
    }

    /// Returns the offset of the end of the queued bytes.
    fn end(&self) -> u64 {
        self.written + self.bytes.len() as u64
    }

    /// Queues a frame, which the caller passes in pieces, and its descriptors.
    pub(super) fn push<const N: usize>(
        &mut self,
        frame: [&[u8]; N],
        fds: impl IntoIterator<Item = Rc<NoLingerFd>>,
    ) {
        let frame_start = self.end();
        for fd in fds {
            self.fds.push_back(QueuedFd { frame_start, fd });
        }
        for piece in frame {
            self.bytes.extend(piece);
        }
    }

    /// Queues a protocol frame and its descriptor, if any.
    pub(super) fn push_protocol_frame(&mut self, frame: &[u8], fd: Option<Rc<NoLingerFd>>) {
        if fd.is_some() {
            self.frames_with_fd.push_back(self.end());
        }
        self.push([frame], fd);
    }

    /// Queues the rest of a frame whose first `written` bytes were written while the outbox was
    /// empty.
    pub(super) fn push_remainder(&mut self, pieces: [&[u8]; 2], written: usize) {
        self.written += written as u64;
        if written == pieces[0].len() + pieces[1].len() {
            return;
        }
        let skipped = written.min(pieces[0].len());
        self.bytes.extend(&pieces[0][skipped..]);
        self.bytes.extend(&pieces[1][written - skipped..]);
    }

    /// Returns the bytes and descriptors that the next system call should write. Stores the number
    /// of descriptors in the header of the batch's first frame with descriptors.
    pub(super) fn next_batch(&mut self) -> Batch<'_> {
        let BatchSize { bytes, fds } = self.batch_size();
        if let (Some(first), Ok(count @ 1..)) = (self.fds.front(), u8::try_from(fds)) {
            let header = usize::try_from(first.frame_start - self.written).ok();
            if let Some(batch) = header.and_then(|at| self.bytes.get_mut(at + BATCH_OFFSET)) {
                *batch = count;
            }
        }
        let fds = self.fds.iter().take(fds);
        Batch {
            bytes: &self.bytes.as_slices().0[..bytes],
            fds: fds.map(|queued| queued.fd.as_fd()).collect(),
        }
    }

    fn batch_size(&self) -> BatchSize {
        let (contiguous, _) = self.bytes.as_slices();
        let mut bytes = contiguous.len().min(WRITE_SIZE);
        if let Some(rest @ 1..) = self.batch_end.checked_sub(self.written) {
            let bytes = bytes.min(usize::try_from(rest).unwrap_or(bytes));
            return BatchSize { bytes, fds: 0 };
        }
        if let Some(beyond) = self.fds.get(MAX_BATCH) {
            // A frame whose descriptors do not fit into this batch waits for the next batch. This
            // batch still has bytes, because the first frame has fewer than `MAX_BATCH`
            // descriptors.
            let before = usize::try_from(beyond.frame_start - self.written).unwrap_or(bytes);
            bytes = bytes.min(before);
        }
        let end = self.written + bytes as u64;
        let fds = self.fds.iter();
        let fds = fds.take_while(|queued| queued.frame_start < end).count();
        BatchSize { bytes, fds }
    }

    /// Removes the batch's first `bytes` bytes, which have been written. If `bytes` is at least 1,
    /// also removes all descriptors of the batch, because the kernel has sent them.
    pub(super) fn advance(&mut self, bytes: usize) {
        let batch = self.batch_size();
        if bytes > 0 && batch.fds > 0 {
            self.batch_end = self.written + batch.bytes as u64;
            for _ in 0..batch.fds {
                self.fds.pop_front();
            }
        }
        self.bytes.drain(..bytes);
        self.written += bytes as u64;
        while self
            .frames_with_fd
            .front()
            .is_some_and(|at| *at < self.written)
        {
            self.frames_with_fd.pop_front();
        }
        if self.bytes.is_empty() {
            if self.bytes.capacity() > WRITE_SIZE {
                self.bytes = VecDeque::new();
            }
            self.fds.shrink_to(MAX_BATCH);
        }
    }

    /// Requests a receipt for the message that was queued last.
    pub(super) fn add_receipt(&mut self, id: ReceiptId) {
        let message_end = self.end();
        self.receipts.push_back(PendingReceipt { message_end, id });
    }

    /// Removes and returns the receipts of the messages that have been written.
    pub(super) fn take_receipts(&mut self) -> Vec<ReceiptId> {
        let is_written = |receipt: &PendingReceipt| receipt.message_end <= self.written;
        let written = self.receipts.partition_point(is_written);
        let receipts = (0..written).filter_map(|_| self.receipts.pop_front());
        let receipts = receipts.map(|receipt| receipt.id).collect();
        if self.receipts.is_empty() {
            self.receipts.shrink_to(MAX_BATCH);
        }
        receipts
    }

    pub(super) fn has_receipts(&self) -> bool {
        !self.receipts.is_empty()
    }

    /// Removes and returns all receipts. The caller writes nothing more.
    pub(super) fn drain_receipts(&mut self) -> impl Iterator<Item = ReceiptId> {
        let receipts = std::mem::take(&mut self.receipts).into_iter();
        receipts.map(|receipt| receipt.id)
    }

    /// Discards all frames, but keeps their receipts.
    pub(super) fn clear(&mut self) {
        self.bytes = VecDeque::new();
        self.fds.clear();
        self.frames_with_fd.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::{Frame as _, ToMaster};
    use std::fs::File;
    use std::os::fd::OwnedFd;

    #[test]
    fn next_batch_of_descriptors_waits_for_the_frames_of_the_previous_batch() {
        let null = Rc::new(NoLingerFd::from(OwnedFd::from(
            File::open("/dev/null").unwrap(),
        )));
        let mut outbox = Outbox::default();
        for _ in 0..30 {
            let mut bytes = Vec::new();
            ToMaster::Message(vec![0; 30]).encode(MAX_FDS, &mut bytes);
            outbox.push([&bytes[..]], std::iter::repeat_n(Rc::clone(&null), MAX_FDS));
        }
        // The kernel sends all descriptors of a batch with the first byte. The next calls must send
        // no descriptors until all bytes of the first batch are written.
        for expected in [MAX_BATCH, 0, 0] {
            assert_eq!(outbox.next_batch().fds.len(), expected);
            outbox.advance(1);
        }
    }
}
