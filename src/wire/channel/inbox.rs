//! What has come by a channel: bytes and descriptors in, frames out.

use std::collections::VecDeque;

use crate::sys::fd::NoLingerFd;
use crate::wire::frame::{Frame, FrameError, HEADER, Header, MAX_BATCH};

/// How much one call reads at most, beside the rest of a long message.
pub(crate) const READ_SIZE: usize = 64 << 10;
/// Descriptors that arrived ahead of their frames. Two batches of an honest peer can be under way.
pub(crate) const MAX_EARLY_FDS: usize = 2 * MAX_BATCH;

/// A message that is longer than this, and has not come yet, is read to where it stays.
pub(super) const LARGE_BODY: usize = 8 << 10;
/// How much is read beyond the end of such a message.
pub(super) const EXTRA_READ: usize = 1 << 10;

/// A frame with its descriptors.
#[derive(Debug)]
pub(crate) struct Arrival<F> {
    pub(crate) frame: F,
    pub(crate) fds: Vec<NoLingerFd>,
    /// Some of its descriptors did not get through.
    pub(crate) lost_fds: bool,
}

/// Turns pieces into frames.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    bytes: Vec<u8>,
    /// Where the first unread frame begins.
    start: usize,
    /// The header of a long message, and what has come of its body. It comes before `bytes`.
    long: Option<(Header, Vec<u8>)>,
    /// The last frame has come in this way.
    was_long: bool,
    /// Descriptors whose first frame has not been read, and whether there were more of them.
    batches: VecDeque<(Vec<NoLingerFd>, bool)>,
    /// The rest of the batch whose frames are being read; `None` for one that is lost.
    fds: VecDeque<Option<NoLingerFd>>,
}

impl Inbox {
    pub(crate) fn push(&mut self, mut piece: &[u8]) {
        if let Some((header, body)) = &mut self.long {
            let missing = header.length - body.len();
            let (first, rest) = piece.split_at(missing.min(piece.len()));
            body.extend_from_slice(first);
            piece = rest;
        }
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(piece);
    }

    /// Where the rest of a long message belongs, and how much that is.
    pub(super) fn place(&mut self) -> Option<(&mut Vec<u8>, usize)> {
        let (header, body) = self.long.as_mut()?;
        let missing = header.length - body.len();
        (missing > 0).then_some((body, missing))
    }

    /// Whether the next frame has not begun, and is likely to be a long message, as the last one was.
    pub(super) fn awaits_long(&self) -> bool {
        self.was_long && self.is_empty()
    }

    /// Whether nothing is left of what has been read.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.long.is_none()
    }

    /// The descriptors whose frames have not been read to their end.
    pub(super) fn fds(&self) -> impl Iterator<Item = &NoLingerFd> {
        let batches = self.batches.iter().flat_map(|(fds, _)| fds);
        batches.chain(self.fds.iter().flatten())
    }

    pub(crate) fn push_fds(&mut self, fds: Vec<NoLingerFd>, lost: bool) {
        if lost || !fds.is_empty() {
            self.batches.push_back((fds, lost));
        }
    }

    pub(crate) fn next<F: Frame>(&mut self) -> Result<Option<Arrival<F>>, FrameError> {
        if self.has_too_many_early() {
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
        let lost_fds = fds.len() < header.fds;
        Ok(Some(Arrival {
            frame,
            fds,
            lost_fds,
        }))
    }

    fn next_frame<F: Frame>(&mut self) -> Result<Option<(Header, F)>, FrameError> {
        if let Some((header, body)) = self.long.take() {
            if body.len() < header.length {
                self.long = Some((header, body));
                return Ok(None);
            }
            self.was_long = true;
            return Ok(Some((header, F::message(body))));
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
                self.long = Some((header, body));
                self.clear();
            }
            return Ok(None);
        };
        let frame = F::decode(header.kind, header.fds, body)?;
        self.was_long = false;
        self.start += HEADER + header.length;
        if self.start == self.bytes.len() {
            self.clear();
        }
        Ok(Some((header, frame)))
    }

    /// All bytes have been read.
    fn clear(&mut self) {
        self.start = 0;
        self.bytes.clear();
        // What many at once have needed is not kept for ever.
        self.bytes.shrink_to(READ_SIZE);
    }

    fn has_too_many_early(&self) -> bool {
        let early: usize = self.batches.iter().map(|(fds, _)| fds.len().max(1)).sum();
        early > MAX_EARLY_FDS
    }

    /// A batch of so many descriptors belongs to the frames that follow.
    fn open_batch(&mut self, count: usize) -> Result<(), FrameError> {
        let Some((fds, lost)) = self.batches.pop_front() else {
            return Err(FrameError::Descriptors);
        };
        let fits = fds.len() == count || lost && fds.len() < count;
        if !fits || !self.fds.is_empty() {
            return Err(FrameError::Descriptors);
        }
        let missing = count - fds.len();
        self.fds.extend(fds.into_iter().map(Some));
        // The kernel makes room for the first ones first.
        self.fds.extend((0..missing).map(|_| None));
        Ok(())
    }
}

#[cfg(any(test, fuzzing))]
impl Inbox {
    /// How many bytes and descriptors it holds.
    pub(crate) fn sizes(&self) -> (usize, usize) {
        let early: usize = self.batches.iter().map(|(fds, _)| fds.len()).sum();
        let long = self.long.as_ref().map_or(0, |(_, body)| body.len());
        (self.bytes.len() + long, self.fds.len() + early)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::ToMaster;
    use proptest::prelude::*;

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
