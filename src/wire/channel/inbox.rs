//! Assembles frames from received bytes and descriptors. An inbox is the receiving half of a
//! channel.

use std::collections::VecDeque;
use std::ops::Range;

use crate::sys::fd::NoLingerFd;
use crate::types::protocol::FrameError;
use crate::wire::frame::Frame;
use crate::wire::frame::header::{HEADER, Header, MAX_BATCH};

/// The maximum number of bytes of one read, besides the rest of a large body (`LARGE_BODY`).
///
/// With a smaller value, a burst of frames takes more system calls. With a larger value, each process
/// and each inbox keep more memory after a burst.
///
/// A buffer of this size fills 16 pages with musl's allocator, which adds 20 bytes. A buffer of 64 KiB
/// would take 19 pages, and the allocator would write to the last one.
pub(crate) const READ_SIZE: usize = (64 << 10) - 20;
/// The maximum number of descriptors that may arrive before their frames.
///
/// A well-behaved peer has at most two batches in flight, because it sends the next batch only when
/// the last batch's frames are written.
pub(crate) const MAX_EARLY_FDS: usize = 2 * MAX_BATCH;

/// The length in bytes above which an incomplete body is *large*. The rest of a large body is read
/// directly into its final buffer, which saves a copy.
///
/// With a smaller value, short messages take an allocation and a second system call. With a larger
/// value, longer messages are copied.
pub(super) const LARGE_BODY: usize = 8 << 10;
/// The number of bytes beyond a large body's end that the same read may return. Also the length of
/// a read that begins a frame when a large body is likely.
///
/// The value leaves space for the next frame's header and for short frames. With a larger value,
/// more of the next large body is copied. With a smaller value, short frames after a large body
/// take another system call.
pub(super) const EXTRA_READ: usize = 1 << 10;

/// A received frame with its descriptors.
#[derive(Debug)]
pub(crate) struct Arrival<F> {
    pub(crate) frame: F,
    pub(crate) fds: Vec<NoLingerFd>,
    /// Whether the kernel dropped some of the frame's descriptors.
    pub(crate) lost_fds: bool,
    /// Whether the inbox holds no bytes after the frame.
    pub(crate) is_last: bool,
}

/// A frame with a large body, which may be incomplete.
#[derive(Debug)]
struct LargeFrame {
    header: Header,
    body: Vec<u8>,
}

impl LargeFrame {
    fn missing(&self) -> usize {
        self.header.length - self.body.len()
    }
}

/// The body of a complete frame.
enum Body {
    /// A large body that arrived in pieces.
    Large(Vec<u8>),
    /// The range of any other body in the inbox's `bytes`.
    Small(Range<usize>),
}

/// The buffer of an incomplete large body.
pub(super) struct UnfinishedBody<'a> {
    pub(super) body: &'a mut Vec<u8>,
    /// The number of bytes that the body lacks, at least 1.
    pub(super) missing: usize,
}

/// A batch of descriptors that arrived in one system call before any of its frames was decoded.
#[derive(Debug)]
struct EarlyBatch {
    fds: Vec<NoLingerFd>,
    /// Whether the kernel dropped the batch's last descriptors.
    lost_fds: bool,
}

/// Assembles frames from the pieces in which they arrive.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    bytes: Vec<u8>,
    /// The offset in `bytes` of the first frame that has not been decoded.
    start: usize,
    /// The large frame that precedes `bytes` in the stream.
    large: Option<LargeFrame>,
    /// Whether the last decoded frame had a large body that arrived in pieces.
    last_was_large: bool,
    /// The batches of descriptors whose first frame has not been decoded, in the order of arrival.
    early: VecDeque<EarlyBatch>,
    /// The remaining descriptors of the current batch, whose first frame has been decoded. `None`
    /// stands for a descriptor that the kernel dropped.
    fds: VecDeque<Option<NoLingerFd>>,
}

impl Inbox {
    /// Adds received bytes. If a large body is incomplete, the first bytes belong to that body.
    pub(crate) fn push(&mut self, mut piece: &[u8]) {
        if let Some(large) = &mut self.large {
            let (first, rest) = piece.split_at(large.missing().min(piece.len()));
            large.body.extend_from_slice(first);
            piece = rest;
        }
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(piece);
    }

    /// Returns the buffer for the rest of a large body, or `None` if the next bytes do not belong
    /// to a large body.
    pub(super) fn unfinished_body(&mut self) -> Option<UnfinishedBody<'_>> {
        let large = self.large.as_mut()?;
        let missing = large.missing();
        let body = &mut large.body;
        (missing > 0).then_some(UnfinishedBody { body, missing })
    }

    /// Returns whether no byte of the next frame has arrived and the frame is likely to have a
    /// large body. A large body is likely if the last frame had one.
    pub(super) fn expects_large_body(&self) -> bool {
        self.last_was_large && self.is_empty()
    }

    /// Returns whether all received bytes have been decoded.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.large.is_none()
    }

    /// Returns the descriptors whose frames have not been decoded.
    pub(super) fn fds(&self) -> impl Iterator<Item = &NoLingerFd> {
        let early = self.early.iter().flat_map(|batch| &batch.fds);
        early.chain(self.fds.iter().flatten())
    }

    /// Adds the descriptors of one system call. `lost_fds` says whether the kernel dropped some.
    pub(crate) fn push_fds(&mut self, fds: Vec<NoLingerFd>, lost_fds: bool) {
        if lost_fds || !fds.is_empty() {
            self.early.push_back(EarlyBatch { fds, lost_fds });
        }
    }

    /// Returns the next complete frame with its descriptors, or `None` if no frame is complete.
    pub(crate) fn next<F: Frame>(&mut self) -> Result<Option<Arrival<F>>, FrameError> {
        if self.has_too_many_early_fds() {
            return Err(FrameError::Descriptors);
        }
        let Some((header, body)) = self.next_body()? else {
            return Ok(None);
        };
        let frame = match body {
            Body::Large(body) => F::message(body),
            Body::Small(range) => {
                let end = range.end;
                let frame = F::decode(header.kind, header.fds, &self.bytes[range])?;
                self.advance_to(end);
                frame
            }
        };
        let fds = self.take_fds(header)?;
        Ok(Some(Arrival {
            lost_fds: fds.len() < header.fds,
            is_last: self.is_empty(),
            frame,
            fds,
        }))
    }

    /// Returns the next complete frame's header and body, or `None` if no frame is complete. A large
    /// body is removed from the inbox.
    fn next_body(&mut self) -> Result<Option<(Header, Body)>, FrameError> {
        if let Some(large) = self.large.take() {
            if large.missing() > 0 {
                self.large = Some(large);
                return Ok(None);
            }
            self.last_was_large = true;
            return Ok(Some((large.header, Body::Large(large.body))));
        }
        let unread = &self.bytes[self.start..];
        let Some((header, rest)) = unread.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let header = Header::decode(*header)?;
        if rest.len() < header.length {
            if header.is_message() && header.length > LARGE_BODY {
                let mut body = Vec::with_capacity(header.length);
                body.extend_from_slice(rest);
                self.large = Some(LargeFrame { header, body });
                self.clear();
            }
            return Ok(None);
        }
        let start = self.start + HEADER;
        Ok(Some((header, Body::Small(start..start + header.length))))
    }

    /// Continues with the frame at the offset `start` in `bytes`. The frame before it was decoded.
    fn advance_to(&mut self, start: usize) {
        self.last_was_large = false;
        self.start = start;
        if self.start == self.bytes.len() {
            self.clear();
        }
    }

    /// Returns the descriptors of the frame that has this header. There are fewer than the header
    /// announces if the kernel dropped some.
    fn take_fds(&mut self, header: Header) -> Result<Vec<NoLingerFd>, FrameError> {
        if header.batch > 0 {
            self.open_batch(header.batch)?;
        }
        if header.fds > self.fds.len() {
            return Err(FrameError::Descriptors);
        }
        let fds = (0..header.fds).filter_map(|_| self.fds.pop_front()?);
        Ok(fds.collect())
    }

    /// Clears `bytes`. The caller has decoded or moved all of them.
    fn clear(&mut self) {
        self.start = 0;
        self.bytes.clear();
        // Release the excess capacity, because a burst must not occupy memory forever.
        self.bytes.shrink_to(READ_SIZE);
    }

    /// Returns whether the descriptors in `early` exceed the limit. A batch of which the kernel
    /// dropped all descriptors counts as one descriptor, so that the number of batches is also
    /// limited.
    fn has_too_many_early_fds(&self) -> bool {
        let early = self.early.iter().map(|batch| batch.fds.len().max(1));
        early.sum::<usize>() > MAX_EARLY_FDS
    }

    /// Moves the descriptors of the oldest batch from `early` to `fds`, from which the next frames
    /// take them. `count` is the batch's size as stated by its first frame.
    ///
    /// # Errors
    ///
    /// Returns an error if no batch has arrived, or if the previous batch has descriptors left.
    /// Also returns an error if more than `count` descriptors arrived, or fewer although the kernel
    /// dropped none.
    fn open_batch(&mut self, count: usize) -> Result<(), FrameError> {
        let Some(EarlyBatch { fds, lost_fds }) = self.early.pop_front() else {
            return Err(FrameError::Descriptors);
        };
        let fits = fds.len() == count || lost_fds && fds.len() < count;
        if !fits || !self.fds.is_empty() {
            return Err(FrameError::Descriptors);
        }
        let missing = count - fds.len();
        self.fds.extend(fds.into_iter().map(Some));
        // The kernel installs a batch's descriptors in order, so only the last ones can be missing.
        self.fds.extend((0..missing).map(|_| None));
        Ok(())
    }
}

/// The numbers of bytes and descriptors in an inbox.
#[cfg(any(test, fuzzing))]
pub(crate) struct InboxSize {
    pub(crate) bytes: usize,
    pub(crate) fds: usize,
}

#[cfg(any(test, fuzzing))]
impl Inbox {
    pub(crate) fn size(&self) -> InboxSize {
        let early = self.early.iter().map(|batch| batch.fds.len());
        let large = self.large.as_ref().map_or(0, |large| large.body.len());
        InboxSize {
            bytes: self.bytes.len() + large,
            fds: self.fds.len() + early.sum::<usize>(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::ToMaster;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_are_whole_however_their_bytes_arrive(
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
                while let Some(arrival) = inbox.next::<ToMaster>().unwrap() {
                    let ToMaster::Message(body) = arrival.frame else { unreachable!() };
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
