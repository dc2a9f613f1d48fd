//! Encodes and decodes the header of a frame, and defines the limits of the header's numbers.

use super::kind;
use crate::types::protocol::{FrameError, MAX_BODY, MAX_FDS, VERSION};

/// The header's length in bytes.
pub(crate) const HEADER: usize = 8;
/// The maximum number of descriptors that a single system call sends.
///
/// The value bounds the descriptors that are open in the reader before their frames are processed.
/// Linux accepts at most 253 descriptors in one call (`SCM_MAX_FD`, unix(7)). If the value were
/// below `MAX_FDS`, some frames would not fit into a batch.
pub(crate) const MAX_BATCH: usize = 64;
/// The offset of the batch size in the header. The outbox sets the batch size when it writes the
/// frame, because the size is unknown until then.
pub(crate) const BATCH_OFFSET: usize = 7;

/// A header with a supported version, whose numbers are within the limits. The header's kind may be
/// unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The length of the body in bytes.
    pub(crate) length: usize,
    pub(crate) kind: u8,
    /// The number of the frame's descriptors.
    pub(crate) fds: usize,
    /// The number of descriptors in the batch that begins with this frame, or 0 if none begins.
    pub(crate) batch: usize,
}

impl Header {
    /// Encodes a message's header. The caller ensures that `length` and `fds` are within the
    /// limits.
    pub(crate) fn of_message(length: usize, fds: usize) -> [u8; HEADER] {
        let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
        let fds = u8::try_from(fds).unwrap_or(u8::MAX);
        [a, b, c, d, VERSION, kind::MESSAGE, fds, 0]
    }

    pub(crate) fn is_message(self) -> bool {
        self.kind == kind::MESSAGE
    }

    pub(crate) fn decode(bytes: [u8; HEADER]) -> Result<Self, FrameError> {
        let [a, b, c, d, version, kind, fds, batch] = bytes;
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        let length = u32::from_le_bytes([a, b, c, d]);
        if length as usize > MAX_BODY {
            return Err(FrameError::TooLong(length));
        }
        let (fds, batch) = (usize::from(fds), usize::from(batch));
        let begins_batch = batch > 0;
        if fds > MAX_FDS || batch > MAX_BATCH || begins_batch && !(1..=batch).contains(&fds) {
            return Err(FrameError::Descriptors);
        }
        Ok(Self {
            length: length as usize,
            kind,
            fds,
            batch,
        })
    }
}
