//! The messages by which a master passes parked connections to the master that takes over from it.
//!
//! The messages travel over a Unix stream. The connections' descriptors are attached to the first
//! byte of their message, in the order of the connections. All numbers are big-endian.
//!
//! | bytes | field |
//! |---|---|
//! | 1 | the version, which is 1 |
//! | 1 | the number of connections, from 1 to 64 |
//! | 8 | the device of the listening socket |
//! | 8 | the inode of the listening socket |
//! | 4 for each connection | the number of times that the connection has been parked |
//!
//! A reader that does not know the version cannot find the end of the message. It discards the rest
//! of the stream, and closes all descriptors that arrive.

pub(crate) mod inbox;

use crate::types::socket_id::SocketId;

/// The maximum number of connections in one message.
///
/// With a larger number, a reader without enough descriptors loses more connections at once, and
/// some systems allow no more than 253 descriptors. With a smaller one, the masters make more
/// system calls. No benchmark chose the value.
pub(crate) const MAX_CONNECTIONS: usize = 64;

/// The length of the longest message in bytes.
pub(crate) const MAX_LENGTH: usize = HEADER_LENGTH + MAX_CONNECTIONS * PARKED_LENGTH;

const VERSION: u8 = 1;
const HEADER_LENGTH: usize = 18;
const PARKED_LENGTH: usize = size_of::<u32>();

/// A message without its descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ParkedMessage {
    /// The listening socket that accepted the connections.
    pub(crate) socket: SocketId,
    /// The number of times that each connection has been parked.
    pub(crate) times_parked: Vec<u32>,
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
        let count = u8::try_from(self.times_parked.len()).unwrap_or(u8::MAX);
        bytes.extend([VERSION, count]);
        bytes.extend(self.socket.device.to_be_bytes());
        bytes.extend(self.socket.inode.to_be_bytes());
        for times in &self.times_parked {
            bytes.extend(times.to_be_bytes());
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
                let times = rest.chunks_exact(PARKED_LENGTH);
                let times =
                    times.filter_map(|bytes| Some(u32::from_be_bytes(bytes.try_into().ok()?)));
                let times_parked = times.collect();
                Ok(Parsed::Complete(Self {
                    socket,
                    times_parked,
                }))
            }
            (_, Some(missing)) => Ok(Parsed::Incomplete(missing)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message() -> impl Strategy<Value = ParkedMessage> {
        let times = proptest::collection::vec(any::<u32>(), 1..=MAX_CONNECTIONS);
        (any::<u64>(), any::<u64>(), times).prop_map(|(device, inode, times_parked)| {
            ParkedMessage {
                socket: SocketId { device, inode },
                times_parked,
            }
        })
    }

    #[test]
    fn unknown_versions_and_counts_are_errors() {
        for version in [0, 2, u8::MAX] {
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
                for length in [2, 10, 18, 22, MAX_LENGTH, MAX_LENGTH + 2] {
                    if let Ok(Parsed::Complete(message)) = ParkedMessage::parse(&bytes[..length]) {
                        prop_assert_eq!(message.encode(), &bytes[..length]);
                    }
                }
            }
        }
    }
}
