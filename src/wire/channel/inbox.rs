//! The receiving half of a channel: bytes and descriptors in, frames out.

use std::collections::VecDeque;

use crate::sys::fd::NoLingerFd;
use crate::wire::frame::{Frame, FrameError, HEADER, Header, MAX_BATCH};

/// Maximum number of bytes of one read, in addition to the rest of a large body.
///
/// A smaller value takes more system calls when many frames arrive at once. The buffer is allocated
/// once per process.
pub(crate) const READ_SIZE: usize = 64 << 10;
/// Maximum number of descriptors that may arrive before their frames. An honest peer has at most two
/// batches in flight: the next one is sent only when the frames of the last one are written.
pub(crate) const MAX_EARLY_FDS: usize = 2 * MAX_BATCH;

/// Length in bytes above which an incomplete body is *large*: its rest is read directly into its final
/// buffer instead of being copied there.
///
/// With a smaller value short messages take an allocation and a second system call; with a larger one
/// longer messages are copied.
pub(super) const LARGE_BODY: usize = 8 << 10;
/// Number of bytes that a read of a large body may read beyond its end.
///
/// It fits the header of the next frame and short frames. If it is larger, more of the next large body
/// has to be copied; if it is smaller, short frames after a large body take a system call of their own.
pub(super) const EXTRA_READ: usize = 1 << 10;

/// A frame with its descriptors.
#[derive(Debug)]
pub(crate) struct Arrival<F> {
    pub(crate) frame: F,
    pub(crate) fds: Vec<NoLingerFd>,
    /// The kernel dropped some of the frame's descriptors.
    pub(crate) lost_fds: bool,
    /// No byte is left of what has been read.
    pub(crate) is_last: bool,
}

/// A frame whose large body is incomplete.
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

/// The buffer of an incomplete large body.
pub(super) struct UnfinishedBody<'a> {
    pub(super) body: &'a mut Vec<u8>,
    /// Number of bytes that the body lacks, at least 1.
    pub(super) missing: usize,
}

/// Descriptors that arrived in one system call, none of whose frames has been decoded.
#[derive(Debug)]
struct EarlyBatch {
    fds: Vec<NoLingerFd>,
    /// The kernel dropped the last descriptors.
    lost_fds: bool,
}

/// Assembles frames from the pieces in which they arrive.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    bytes: Vec<u8>,
    /// Offset in `bytes` of the first frame that has not been decoded.
    start: usize,
    /// Comes before `bytes`.
    large: Option<LargeFrame>,
    /// The last decoded frame had a large body that arrived in pieces.
    last_was_large: bool,
    early: VecDeque<EarlyBatch>,
    /// Rest of the batch whose frames are being decoded; `None` for a descriptor that was dropped.
    fds: VecDeque<Option<NoLingerFd>>,
}

impl Inbox {
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

    /// Returns the buffer for the rest of a large body, if the next bytes belong to one.
    pub(super) fn unfinished_body(&mut self) -> Option<UnfinishedBody<'_>> {
        let large = self.large.as_mut()?;
        let missing = large.missing();
        let body = &mut large.body;
        (missing > 0).then_some(UnfinishedBody { body, missing })
    }

    /// Returns whether the next frame has not begun, and is likely to have a large body because the
    /// last one had.
    pub(super) fn expects_large_body(&self) -> bool {
        self.last_was_large && self.is_empty()
    }

    /// Returns whether all bytes have been decoded.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.large.is_none()
    }

    /// Returns the descriptors whose frames have not been decoded.
    pub(super) fn fds(&self) -> impl Iterator<Item = &NoLingerFd> {
        let early = self.early.iter().flat_map(|batch| &batch.fds);
        early.chain(self.fds.iter().flatten())
    }

    pub(crate) fn push_fds(&mut self, fds: Vec<NoLingerFd>, lost_fds: bool) {
        if lost_fds || !fds.is_empty() {
            self.early.push_back(EarlyBatch { fds, lost_fds });
        }
    }

    pub(crate) fn next<F: Frame>(&mut self) -> Result<Option<Arrival<F>>, FrameError> {
        if self.has_too_many_early_fds() {
            return Err(FrameError::Descriptors);
        }
        let Some((header, frame)) = self.next_frame()? else {
            return Ok(None);
        };
        if header.batch > 0 {
            self.open_batch(header.batch)?;
        }
        if header.fds > self.fds.len() {
            return Err(FrameError::Descriptors);
        }
        let fds: Vec<_> = match header.fds {
            0 => Vec::new(),
            count => self.fds.drain(..count).flatten().collect(),
        };
        Ok(Some(Arrival {
            lost_fds: fds.len() < header.fds,
            is_last: self.is_empty(),
            frame,
            fds,
        }))
    }

    fn next_frame<F: Frame>(&mut self) -> Result<Option<(Header, F)>, FrameError> {
        if let Some(large) = self.large.take() {
            if large.missing() > 0 {
                self.large = Some(large);
                return Ok(None);
            }
            self.last_was_large = true;
            return Ok(Some((large.header, F::message(large.body))));
        }
        let unread = &self.bytes[self.start..];
        let Some((header, rest)) = unread.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let header = Header::decode(*header)?;
        let Some(body) = rest.get(..header.length) else {
            if header.is_message() && header.length > LARGE_BODY {
                let mut body = Vec::with_capacity(header.length);
                body.extend_from_slice(rest);
                self.large = Some(LargeFrame { header, body });
                self.clear();
            }
            return Ok(None);
        };
        let frame = F::decode(header.kind, header.fds, body)?;
        self.last_was_large = false;
        self.start += HEADER + header.length;
        if self.start == self.bytes.len() {
            self.clear();
        }
        Ok(Some((header, frame)))
    }

    /// Forgets the bytes, all of which have been decoded or moved.
    fn clear(&mut self) {
        self.start = 0;
        self.bytes.clear();
        // A burst must not occupy memory for ever.
        self.bytes.shrink_to(READ_SIZE);
    }

    fn has_too_many_early_fds(&self) -> bool {
        let early = self.early.iter().map(|batch| batch.fds.len().max(1));
        early.sum::<usize>() > MAX_EARLY_FDS
    }

    /// Makes the first early batch, which had `count` descriptors, that of the next frames.
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
        // The kernel installs the descriptors of a batch in order, so the last ones are missing.
        self.fds.extend((0..missing).map(|_| None));
        Ok(())
    }
}

/// The contents of an inbox, counted.
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
