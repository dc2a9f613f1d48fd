//! What waits to be written to a channel.

use std::cell::Cell;
use std::collections::VecDeque;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::rc::Rc;

use crate::sys::fd::NoLingerFd;
use crate::wire::frame::{BATCH, MAX_BATCH, MAX_FDS};

/// How much one call writes at most.
const WRITE_SIZE: usize = 64 << 10;
// A frame has at most 16 descriptors, and a call takes 64.
const _: () = assert!(MAX_FDS < MAX_BATCH);

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

/// Frames that wait to be written.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    bytes: VecDeque<u8>,
    /// How many bytes have been written since the beginning.
    written: u64,
    /// Each descriptor with the place of its frame's first byte, counted like `written`.
    fds: VecDeque<(u64, Rc<NoLingerFd>)>,
    /// Where the last frames begin that are the crate's own and have descriptors.
    own: VecDeque<u64>,
    /// Where the frames end whose descriptors have left with the last batch. The next one leaves
    /// when these have: so the reader never has more than two.
    batch_end: u64,
    /// Each message of which the program wants to hear, with the place of its last byte.
    receipts: VecDeque<(u64, ReceiptId)>,
}

impl Outbox {
    /// How many bytes there are.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn fds(&self) -> impl Iterator<Item = &NoLingerFd> {
        self.fds.iter().map(|(_, fd)| &**fd)
    }

    /// How many descriptors there are of the crate's own.
    pub(super) fn count_own(&self) -> usize {
        self.own.len()
    }

    /// Takes a frame, in pieces, with its descriptors.
    pub(super) fn push<const N: usize>(
        &mut self,
        frame: [&[u8]; N],
        fds: impl IntoIterator<Item = Rc<NoLingerFd>>,
    ) {
        let place = self.written + self.bytes.len() as u64;
        for fd in fds {
            self.fds.push_back((place, fd));
        }
        for piece in frame {
            self.bytes.extend(piece);
        }
    }

    /// Takes what is left of a frame of which so much has been written, when nothing was waiting.
    pub(super) fn push_rest(&mut self, pieces: [&[u8]; 2], written: usize) {
        self.written += written as u64;
        if written == pieces[0].len() + pieces[1].len() {
            return;
        }
        let skipped = written.min(pieces[0].len());
        self.bytes.extend(&pieces[0][skipped..]);
        self.bytes.extend(&pieces[1][written - skipped..]);
    }

    /// What is pushed next is a frame of the crate's own, with a descriptor.
    pub(super) fn note_own(&mut self) {
        self.own.push_back(self.written + self.bytes.len() as u64);
    }

    /// What the next call should write: bytes up to a limit, and the descriptors of the frames
    /// that begin in them.
    pub(super) fn next(&mut self) -> (&[u8], Vec<BorrowedFd<'_>>) {
        let (length, count) = self.next_batch();
        if let (Some((place, _)), Ok(count @ 1..)) = (self.fds.front(), u8::try_from(count)) {
            let header = usize::try_from(place - self.written).ok();
            if let Some(batch) = header.and_then(|at| self.bytes.get_mut(at + BATCH)) {
                *batch = count;
            }
        }
        let fds = self.fds.iter().take(count);
        let fds = fds.map(|(_, fd)| fd.as_fd()).collect();
        (&self.bytes.as_slices().0[..length], fds)
    }

    /// How many bytes, and how many descriptors.
    fn next_batch(&self) -> (usize, usize) {
        let (bytes, _) = self.bytes.as_slices();
        let mut length = bytes.len().min(WRITE_SIZE);
        if let Some(rest @ 1..) = self.batch_end.checked_sub(self.written) {
            return (length.min(usize::try_from(rest).unwrap_or(length)), 0);
        }
        if let Some((place, _)) = self.fds.get(MAX_BATCH) {
            // A frame does not begin before its descriptors can be sent. The limit of descriptors
            // in one frame keeps this from being zero.
            let before = usize::try_from(place - self.written).unwrap_or(length);
            length = length.min(before);
        }
        let end = self.written + length as u64;
        let fds = self.fds.iter().take_while(|(place, _)| *place < end);
        (length, fds.count())
    }

    /// So many bytes have been written, and if any, all of the descriptors that `next` gave.
    pub(super) fn written(&mut self, bytes: usize) {
        let (length, fds) = self.next_batch();
        if bytes > 0 && fds > 0 {
            self.batch_end = self.written + length as u64;
            self.fds.drain(..fds);
        }
        self.bytes.drain(..bytes);
        self.written += bytes as u64;
        let left = self.own.partition_point(|place| *place < self.written);
        self.own.drain(..left);
        if self.bytes.is_empty() {
            if self.bytes.capacity() > WRITE_SIZE {
                self.bytes = VecDeque::new();
            }
            self.fds.shrink_to(MAX_BATCH);
        }
    }

    /// What has been pushed last is the message of this receipt.
    pub(super) fn want_receipt(&mut self, receipt: ReceiptId) {
        let end = self.written + self.bytes.len() as u64;
        self.receipts.push_back((end, receipt));
    }

    /// The messages that have been written since the last call.
    pub(super) fn take_receipts(&mut self) -> Vec<ReceiptId> {
        let done = self
            .receipts
            .partition_point(|(end, _)| *end <= self.written);
        let receipts = self.receipts.drain(..done).map(|(_, receipt)| receipt);
        let receipts = receipts.collect();
        if self.receipts.is_empty() {
            self.receipts.shrink_to(MAX_BATCH);
        }
        receipts
    }

    pub(super) fn has_receipts(&self) -> bool {
        !self.receipts.is_empty()
    }

    /// The messages that never will be written.
    pub(super) fn lose_receipts(&mut self) -> impl Iterator<Item = ReceiptId> {
        self.receipts.drain(..).map(|(_, receipt)| receipt)
    }

    /// Forgets what waits, but for the receipts, which the program still wants.
    pub(super) fn clear(&mut self) {
        self.bytes = VecDeque::new();
        self.fds.clear();
        self.own.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::{Frame as _, ToMaster};
    use std::fs::File;
    use std::os::fd::OwnedFd;

    #[test]
    fn descriptors_do_not_run_ahead_of_their_frames() {
        let null = Rc::new(NoLingerFd::from(OwnedFd::from(
            File::open("/dev/null").unwrap(),
        )));
        let mut outbox = Outbox::default();
        for _ in 0..30 {
            let mut bytes = Vec::new();
            ToMaster::Message(vec![0; 30]).encode(MAX_FDS, &mut bytes);
            outbox.push([&bytes[..]], std::iter::repeat_n(Rc::clone(&null), MAX_FDS));
        }
        // However little of a call is written, its descriptors have left, and no others leave before
        // its frames have.
        for expected in [MAX_BATCH, 0, 0] {
            assert_eq!(outbox.next().1.len(), expected);
            outbox.written(1);
        }
    }
}
