//! Assembles messages from the bytes and descriptors that arrive from a predecessor.

use super::{MAX_CONNECTIONS, MAX_LENGTH, ParkedMessage, Parsed};
use crate::sys::fd::NoLingerFd;

/// The bytes and descriptors that have arrived and belong to an incomplete message.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    bytes: Vec<u8>,
    fds: Vec<NoLingerFd>,
    /// Whether the bytes are not a valid message. The rest of the stream is discarded.
    is_invalid: bool,
}

/// The result of one read.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// The message is incomplete.
    Incomplete,
    /// The message is complete. The number of its descriptors can differ from the number of its
    /// connections.
    Complete(ParkedMessage, Vec<NoLingerFd>),
    /// The stream is not valid from here on. The descriptors belong to no connection.
    Invalid(Vec<NoLingerFd>),
    /// The stream was already invalid. The descriptors belong to no connection.
    Discarded(Vec<NoLingerFd>),
}

impl Inbox {
    /// Returns the maximum number of bytes for the next read, at most [`MAX_LENGTH`]. All bytes of
    /// one read then belong to one message.
    pub(crate) fn missing(&self) -> usize {
        match ParkedMessage::parse(&self.bytes) {
            Ok(Parsed::Incomplete(missing)) if !self.is_invalid => missing,
            _ => MAX_LENGTH,
        }
    }

    /// Adds the result of one read of at most `missing` bytes.
    pub(crate) fn push(&mut self, bytes: &[u8], fds: Vec<NoLingerFd>) -> Arrival {
        if self.is_invalid {
            return Arrival::Discarded(fds);
        }
        self.bytes.extend(bytes);
        self.fds.extend(fds);
        match ParkedMessage::parse(&self.bytes) {
            Ok(Parsed::Complete(message)) => {
                self.bytes.clear();
                Arrival::Complete(message, self.take_fds())
            }
            Ok(Parsed::Incomplete(_)) if self.fds.len() <= MAX_CONNECTIONS => Arrival::Incomplete,
            Ok(Parsed::Incomplete(_)) | Err(_) => {
                self.is_invalid = true;
                Arrival::Invalid(self.take_fds())
            }
        }
    }

    /// Removes the descriptors of an incomplete message, because the stream has ended.
    pub(crate) fn take_fds(&mut self) -> Vec<NoLingerFd> {
        std::mem::take(&mut self.fds)
    }
}
