//! Implements the `frame` target, which tests the frame decoder.

use super::{Input, descriptors};
use crate::types::protocol::{FrameError, MAX_BODY, MAX_FDS};
use crate::wire::channel::inbox::{Arrival, Inbox};
use crate::wire::frame::header::{BATCH_OFFSET, HEADER, Header};
use crate::wire::frame::{Frame, ToMaster, ToWorker};

/// Decodes the input both as frames to the master and as frames to a worker. Checks that decoded
/// frames encode to the same bytes.
///
/// Also checks that an inbox returns the same frames if the bytes arrive in several pieces.
pub fn frame(data: &[u8]) {
    let mut input = Input(data);
    let batches = [input.byte(), input.byte()];
    let count = usize::from(input.byte()) % 16;
    let cuts = input.bytes(count);
    let bytes = input.0;
    round_trip::<ToMaster>(bytes);
    round_trip::<ToWorker>(bytes);
    cut::<ToMaster>(bytes, cuts, batches);
    cut::<ToWorker>(bytes, cuts, batches);
}

fn round_trip<F: Frame>(bytes: &[u8]) {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else {
        return;
    };
    let Ok(header) = Header::decode(*header) else {
        return;
    };
    assert!(header.length <= MAX_BODY && header.fds <= MAX_FDS);
    let Some(body) = rest.get(..header.length) else {
        return;
    };
    if let Ok(frame) = F::decode(header.kind, header.fds, body) {
        let mut again = Vec::new();
        frame.encode(header.fds, &mut again);
        // Copy the batch size, because `encode` leaves it at 0. The outbox sets the batch size when
        // it writes the descriptors.
        again[BATCH_OFFSET] = bytes[BATCH_OFFSET];
        assert_eq!(again, bytes[..HEADER + header.length]);
    }
}

fn cut<F: Frame + PartialEq + std::fmt::Debug>(bytes: &[u8], cuts: &[u8], batches: [u8; 2]) {
    let mut pieces = Vec::new();
    let mut rest = bytes;
    for cut in cuts {
        let (piece, remainder) = rest.split_at(rest.len().min((*cut).into()));
        pieces.push(piece);
        rest = remainder;
    }
    pieces.push(rest);
    assert_eq!(read::<F>(&pieces, batches), read::<F>(&[bytes], batches));
}

/// An arrived frame, with the number of its descriptors.
#[derive(Debug, PartialEq)]
struct Read<F> {
    frame: F,
    fds: usize,
    lost_fds: bool,
}

/// Reads frames until the end of the pieces or the first error. Two batches of descriptors arrive
/// before the bytes. `batches` determines their sizes, and whether they have lost descriptors.
fn read<F: Frame>(pieces: &[&[u8]], batches: [u8; 2]) -> (Vec<Read<F>>, Option<FrameError>) {
    let mut inbox = Inbox::default();
    for batch in batches {
        inbox.push_fds(
            descriptors(usize::from(batch) % (2 * MAX_FDS)),
            batch >= 128,
        );
    }
    let mut frames = Vec::new();
    for piece in pieces {
        inbox.push(piece);
        loop {
            match inbox.next() {
                Ok(None) => break,
                Ok(Some(arrival)) => {
                    let Arrival {
                        frame,
                        fds,
                        lost_fds,
                        ..
                    } = arrival;
                    let fds = fds.len();
                    frames.push(Read {
                        frame,
                        fds,
                        lost_fds,
                    });
                }
                Err(error) => return (frames, Some(error)),
            }
        }
    }
    (frames, None)
}
