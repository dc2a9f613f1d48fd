//! Drives the decoder and the simulated kernel by the bytes of a fuzzer.
//!
//! The fuzz targets in `tests/fuzz` call these functions. The tests call them too, with random input
//! and with the inputs of `tests/corpus`, each of which reaches something that others do not.

mod decode;
mod script;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::fd::OwnedFd;

use crate::sys::fd::NoLingerFd;
pub use decode::frame;

/// Checks the master with one hostile worker, whose bytes are arbitrary, and an honest one.
///
/// The hostile worker must not stop the master, bloat it, make its ledger wrong, or keep the honest
/// worker's clients from being served.
pub fn master_input(data: &[u8]) {
    script::run(data);
}

/// The input, which decides everything. Zeroes follow its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `length` bytes, or what is left.
    fn bytes(&mut self, length: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    /// A number of one byte if the byte is below 240, or else of the next eight bytes.
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

/// Descriptors, as the kernel might attach them to bytes.
fn descriptors(count: usize) -> Vec<NoLingerFd> {
    thread_local! {
        static NULL: File = File::open("/dev/null").expect("/dev/null");
    }
    let copy = |_| NULL.with(|null| OwnedFd::from(null.try_clone().expect("a descriptor")).into());
    (0..count).map(copy).collect()
}
