//! Implements the `parked_message` target, which tests the messages that pass parked connections
//! from one master to the next.

use super::{Input, descriptors};
use crate::types::user::ParkHistory;
use crate::wire::parked_message::inbox::{Arrival, Inbox};
use crate::wire::parked_message::{Invalid, MAX_CONNECTIONS, MAX_LENGTH, ParkedMessage, Parsed};

/// The maximum number of descriptors of one read. The kernel's limit is 253.
const MAX_READ_FDS: u8 = 253;

/// One read from the stream.
#[derive(Clone, Copy)]
struct Read {
    max_bytes: usize,
    fds: u8,
}

/// The messages of a stream, and whether the stream becomes invalid after them.
#[derive(Debug, PartialEq)]
struct Stream {
    messages: Vec<ParkedMessage>,
    is_invalid: bool,
}

/// Reads the input as the stream of a hostile predecessor, in pieces with arbitrary descriptors.
///
/// Checks that decoded messages encode to the same bytes, that the pieces do not change the
/// messages, that memory and open descriptors are bounded, and that each descriptor is returned
/// once.
pub fn parked_message(data: &[u8]) {
    let mut input = Input(data);
    let count = input.byte() % 16;
    let read = |input: &mut Input<'_>| Read {
        max_bytes: usize::from(input.byte()).max(1),
        fds: input.byte().min(MAX_READ_FDS),
    };
    let reads: Vec<_> = (0..count).map(|_| read(&mut input)).collect();
    let bytes = input.0;
    round_trip(bytes);
    let whole = receive(bytes, &[]);
    let without_fds: Vec<_> = reads.iter().map(|read| Read { fds: 0, ..*read }).collect();
    assert_eq!(receive(bytes, &without_fds), whole);
    let with_fds = receive(bytes, &reads);
    // Too many descriptors can only make the stream invalid earlier.
    assert!(whole.messages.starts_with(&with_fds.messages));
    assert!(with_fds == whole || with_fds.is_invalid);
}

fn round_trip(bytes: &[u8]) {
    for length in 0..=bytes.len().min(MAX_LENGTH + 1) {
        let bytes = &bytes[..length];
        match ParkedMessage::parse(bytes) {
            Ok(Parsed::Incomplete(missing)) => {
                assert!(missing > 0 && length + missing <= MAX_LENGTH);
            }
            Ok(Parsed::Complete(message)) => {
                assert_eq!(message.encode(), bytes);
                let longer = [bytes, &[0]].concat();
                assert_eq!(ParkedMessage::parse(&longer), Err(Invalid::Excess));
                let allocated = message.histories.capacity() * size_of::<ParkHistory>();
                assert!(allocated <= 3 * length, "{allocated} bytes for {length}");
            }
            Err(_) => {}
        }
    }
}

/// Reads the stream to its end. After the last element of `reads`, each read takes as many bytes as
/// the inbox requests, without descriptors.
fn receive(bytes: &[u8], reads: &[Read]) -> Stream {
    let mut inbox = Inbox::default();
    let (mut messages, mut is_invalid) = (Vec::new(), false);
    let (mut rest, mut open, mut encoded) = (bytes, 0, Vec::new());
    let mut reads = reads.iter();
    while !rest.is_empty() {
        let (max_bytes, fds) = reads
            .next()
            .map_or((usize::MAX, 0), |read| (read.max_bytes, read.fds.into()));
        let missing = inbox.missing();
        assert!((1..=MAX_LENGTH).contains(&missing));
        let (piece, later) = rest.split_at(missing.min(max_bytes).min(rest.len()));
        rest = later;
        open += fds;
        let closed = match inbox.push(piece, descriptors(fds)) {
            Arrival::Incomplete => {
                assert!(!is_invalid && open <= MAX_CONNECTIONS);
                continue;
            }
            Arrival::Complete(message, fds) => {
                assert!(!is_invalid);
                encoded.extend(message.encode());
                messages.push(message);
                fds
            }
            Arrival::Invalid(fds) => {
                assert!(!is_invalid);
                is_invalid = true;
                fds
            }
            Arrival::Discarded(fds) => {
                assert!(is_invalid);
                fds
            }
        };
        assert_eq!(closed.len(), open, "each descriptor is returned once");
        open = 0;
    }
    assert_eq!(inbox.take_fds().len(), open);
    assert!(bytes.starts_with(&encoded));
    Stream {
        messages,
        is_invalid,
    }
}
