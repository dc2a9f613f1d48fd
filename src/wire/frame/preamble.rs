//! Encodes the preamble, the first bytes in a channel, and recognizes it in inherited descriptors.

use super::header::HEADER;
use super::kind;
use crate::types::protocol::VERSION;
use crate::types::worker_id::WorkerId;

/// The preamble's length in bytes, including its header.
pub(crate) const PREAMBLE_LENGTH: usize = HEADER + 4;

/// Returns the preamble that the master writes to the channel of `worker`, with one or two
/// descriptors, before any other frame.
pub(crate) fn preamble(worker: WorkerId) -> [u8; PREAMBLE_LENGTH] {
    let mut bytes = [0; PREAMBLE_LENGTH];
    bytes[..HEADER].copy_from_slice(&[4, 0, 0, 0, VERSION, kind::PREAMBLE, 1, 1]);
    bytes[HEADER..].copy_from_slice(&worker.get().to_le_bytes());
    bytes
}

/// Returns the format's version, or `None` if `bytes` are not a preamble of any version.
pub(crate) fn preamble_version(bytes: [u8; PREAMBLE_LENGTH]) -> Option<u8> {
    let [4, 0, 0, 0, version, kind::PREAMBLE, 1, 1, ..] = bytes else {
        return None;
    };
    Some(version)
}
