//! Drives the decoders and the simulated kernel with a fuzzer's input.
//!
//! The fuzz targets in `tests/fuzz` call `frame`, `parked_message` and `master_input`. The unit
//! tests call these functions with random inputs and with the inputs in `tests/corpus`. Each input in the corpus
//! covers a case that the others do not cover.

mod decode;
mod parked_message;
mod script;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::fd::OwnedFd;

use crate::sys::fd::NoLingerFd;
pub use decode::frame;
pub use parked_message::parked_message;

/// Checks the master with one hostile worker and one well-behaved worker. The hostile worker writes
/// arbitrary bytes.
///
/// The hostile worker must not stop the master, exhaust the master's memory or unbalance the
/// ledger. The well-behaved worker must be able to serve its clients.
pub fn master_input(data: &[u8]) {
    script::run(data);
}

/// The unread rest of an input. After the end of the input, `byte`, `long` and `number` return 0.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the next `length` bytes, or all remaining bytes if fewer remain.
    fn bytes(&mut self, length: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    /// Returns the next number. If the first byte is below 240, the byte is the number. If it is
    /// 240 or above, the next eight bytes are the number.
    fn long(&mut self) -> u64 {
        match self.byte() {
            small @ 0..=239 => u64::from(small),
            _ => {
                let mut bytes = [0; 8];
                let given = self.bytes(8);
                bytes[..given.len()].copy_from_slice(given);
                u64::from_le_bytes(bytes)
            }
        }
    }

    fn number(&mut self) -> u32 {
        u32::try_from(self.long()).unwrap_or(u32::MAX)
    }
}

/// Returns `count` open descriptors, for an inbox that treats them as if they had arrived through a
/// channel.
fn descriptors(count: usize) -> Vec<NoLingerFd> {
    thread_local! {
        static NULL: File = File::open("/dev/null").expect("/dev/null");
    }
    let copy = |_| NULL.with(|null| OwnedFd::from(null.try_clone().expect("a descriptor")).into());
    (0..count).map(copy).collect()
}
