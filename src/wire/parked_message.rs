//! The messages by which a master passes parked connections to the master that takes over from it.
//!
//! The messages travel over a Unix stream. The connections' descriptors are attached to the first
//! byte of their message, in the order of the connections. All numbers are big-endian.
//!
//! | bytes | field |
//! |---|---|
//! | 1 | the version, which is 2 |
//! | 1 | the number of connections, from 1 to 64 |
//! | 8 | the device of the listening socket |
//! | 8 | the inode of the listening socket |
//! | 12 for each connection | the number of times that it has been parked, and the uid and the gid of
//! the worker that parked it last, both 4,294,967,295 if none has |
//!
//! A reader that does not know the version cannot find the end of the message. It discards the rest
//! of the stream, and closes all descriptors that arrive.

pub(crate) mod inbox;

use crate::types::socket_id::SocketId;
use crate::types::user::{ParkHistory, User};

/// The maximum number of connections in one message.
///
/// With a larger number, a reader without enough descriptors loses more connections at once, and
/// some systems allow no more than 253 descriptors. With a smaller one, the masters make more
/// system calls. No benchmark chose the value.
pub(crate) const MAX_CONNECTIONS: usize = 64;

/// The length of the longest message in bytes.
pub(crate) const MAX_LENGTH: usize = HEADER_LENGTH + MAX_CONNECTIONS * PARKED_LENGTH;

const VERSION: u8 = 2;
const HEADER_LENGTH: usize = 18;
const PARKED_LENGTH: usize = 3 * size_of::<u32>();

/// The id that no user and no group has (chown(2)).
const NO_ID: u32 = u32::MAX;

/// A message without its descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ParkedMessage {
    /// The listening socket that accepted the connections.
    pub(crate) socket: SocketId,
    /// The history of each connection.
    pub(crate) histories: Vec<ParkHistory>,
}

/// The result of parsing the bytes that have arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// The message has at least this number of further bytes.
    Incomplete(usize),
    Complete(ParkedMessage),
}

/// The reason why the bytes are not a valid message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Invalid {
    UnknownVersion,
    /// The number of connections is 0 or too high.
    Count,
    /// There are bytes after the message.
    Excess,
}

impl ParkedMessage {
    /// Returns the bytes of the message. The message must have at least one connection and at most
    /// `MAX_CONNECTIONS`.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(MAX_LENGTH);
        let count = u8::try_from(self.histories.len()).unwrap_or(u8::MAX);
        bytes.extend([VERSION, count]);
        bytes.extend(self.socket.device.to_be_bytes());
        bytes.extend(self.socket.inode.to_be_bytes());
        for history in &self.histories {
            let User { uid, gid } = history.by.unwrap_or(User {
                uid: NO_ID,
                gid: NO_ID,
            });
            for number in [history.times, uid, gid] {
                bytes.extend(number.to_be_bytes());
            }
        }
        bytes
    }

    /// Parses the first bytes of a message.
    ///
    /// # Errors
    ///
    /// Returns an error if no further bytes can make these bytes a message.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Parsed, Invalid> {
        let Some((&version, rest)) = bytes.split_first() else {
            return Ok(Parsed::Incomplete(HEADER_LENGTH));
        };
        if version != VERSION {
            return Err(Invalid::UnknownVersion);
        }
        let Some((&count, rest)) = rest.split_first() else {
            return Ok(Parsed::Incomplete(HEADER_LENGTH - bytes.len()));
        };
        let count = usize::from(count);
        if count == 0 || count > MAX_CONNECTIONS {
            return Err(Invalid::Count);
        }
        let length = HEADER_LENGTH + count * PARKED_LENGTH;
        let header = rest.split_first_chunk().and_then(|(device, rest)| {
            let (inode, rest) = rest.split_first_chunk()?;
            let (device, inode) = (u64::from_be_bytes(*device), u64::from_be_bytes(*inode));
            Some((SocketId { device, inode }, rest))
        });
        match (header, length.checked_sub(bytes.len())) {
            (_, None) => Err(Invalid::Excess),
            (Some((socket, rest)), Some(0)) => {
                let histories = rest.chunks_exact(PARKED_LENGTH).filter_map(parse_history);
                let histories = histories.collect();
                Ok(Parsed::Complete(Self { socket, histories }))
            }
            (_, Some(missing)) => Ok(Parsed::Incomplete(missing)),
        }
    }
}

/// Parses the history of one connection.
fn parse_history(bytes: &[u8]) -> Option<ParkHistory> {
    let mut numbers = bytes.chunks_exact(size_of::<u32>());
    let mut next = || Some(u32::from_be_bytes(numbers.next()?.try_into().ok()?));
    let times = next()?;
    let user = User {
        uid: next()?,
        gid: next()?,
    };
    let is_none = user.uid == NO_ID && user.gid == NO_ID;
    Some(ParkHistory {
        times,
        by: (!is_none).then_some(user),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message() -> impl Strategy<Value = ParkedMessage> {
        let user = (0..NO_ID, 0..NO_ID).prop_map(|(uid, gid)| User { uid, gid });
        let history = (any::<u32>(), proptest::option::of(user));
        let history = history.prop_map(|(times, by)| ParkHistory { times, by });
        let histories = proptest::collection::vec(history, 1..=MAX_CONNECTIONS);
        (any::<u64>(), any::<u64>(), histories).prop_map(|(device, inode, histories)| {
            ParkedMessage {
                socket: SocketId { device, inode },
                histories,
            }
        })
    }

    #[test]
    fn unknown_versions_and_counts_are_errors() {
        for version in [0, 1, u8::MAX] {
            let invalid = ParkedMessage::parse(&[version]);
            assert_eq!(invalid, Err(Invalid::UnknownVersion));
        }
        for count in [0, 65, u8::MAX] {
            assert_eq!(ParkedMessage::parse(&[VERSION, count]), Err(Invalid::Count));
        }
    }

    proptest! {
        #[test]
        fn parse_returns_the_encoded_message(message in message()) {
            let bytes = message.encode();
            prop_assert!(bytes.len() <= MAX_LENGTH);
            let parsed = ParkedMessage::parse(&bytes);
            prop_assert_eq!(parsed, Ok(Parsed::Complete(message)));
        }

        #[test]
        fn reader_that_asks_for_the_missing_bytes_finds_the_end(
            message in message(),
            next in any::<[u8; 8]>(),
            pieces in proptest::collection::vec(1..50_usize, 0..50),
        ) {
            let length = message.encode().len();
            let mut stream = message.encode();
            stream.extend(next);
            let (mut read, mut pieces) = (0, pieces.into_iter());
            let parsed = loop {
                match ParkedMessage::parse(&stream[..read]).unwrap() {
                    Parsed::Incomplete(missing) => {
                        prop_assert!(missing > 0);
                        read += missing.min(pieces.next().unwrap_or(usize::MAX));
                    }
                    Parsed::Complete(parsed) => break parsed,
                }
            };
            prop_assert_eq!((read, parsed), (length, message));
        }

        #[test]
        fn bytes_after_a_message_are_an_error(message in message(), next: u8) {
            let mut bytes = message.encode();
            bytes.push(next);
            prop_assert_eq!(ParkedMessage::parse(&bytes), Err(Invalid::Excess));
        }

        #[test]
        fn no_input_panics(bytes: Vec<u8>, body in any::<[u8; MAX_LENGTH]>()) {
            let _ = ParkedMessage::parse(&bytes);
            for count in 0..=u8::MAX {
                let mut bytes = vec![VERSION, count];
                bytes.extend(body);
                for length in [2, 10, 18, 30, MAX_LENGTH, MAX_LENGTH + 2] {
                    if let Ok(Parsed::Complete(message)) = ParkedMessage::parse(&bytes[..length]) {
                        prop_assert_eq!(message.encode(), &bytes[..length]);
                    }
                }
            }
        }
    }
}
