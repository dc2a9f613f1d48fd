//! The values that an old master passes to a new master in an upgrade.
//!
//! The old master writes the values as fields to the channel between the masters. A field consists
//! of its number (1 byte), the length of the value in bytes (4 bytes, big-endian) and the value. A
//! master skips fields whose number it does not know. If a field is missing, the master uses its
//! own options. Masters of different releases can therefore replace each other. A number must never
//! change its meaning, and the number of a removed field must not be used again.

use std::io;
use std::num::NonZeroUsize;

/// Identifies the field whose value is the pool's number of slots (8 bytes, big-endian).
const SLOTS: u8 = 1;

/// The values that an old master passes to a new master.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PassedValues {
    /// The number of slots, or `None` if the new master uses the number in its own options.
    pub(super) slots: Option<NonZeroUsize>,
}

impl PassedValues {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Some(slots) = self.slots {
            push_field(&mut bytes, SLOTS, &(slots.get() as u64).to_be_bytes());
        }
        bytes
    }

    /// Parses the fields.
    ///
    /// # Errors
    ///
    /// Returns an error of the kind `InvalidData` if a field is incomplete or its value is invalid.
    pub(super) fn decode(mut bytes: &[u8]) -> io::Result<Self> {
        let mut passed = Self::default();
        while !bytes.is_empty() {
            let (number, value, rest) = split_field(bytes).ok_or_else(invalid)?;
            if number == SLOTS {
                passed.slots = Some(parse_slots(value).ok_or_else(invalid)?);
            }
            bytes = rest;
        }
        Ok(passed)
    }
}

fn push_field(bytes: &mut Vec<u8>, number: u8, value: &[u8]) {
    let length = u32::try_from(value.len()).unwrap_or(u32::MAX);
    bytes.push(number);
    bytes.extend(length.to_be_bytes());
    bytes.extend(value);
}

/// Returns the number and the value of the first field, and the bytes after the field.
fn split_field(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (number, rest) = bytes.split_first()?;
    let (length, rest) = rest.split_first_chunk()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    let (value, rest) = rest.split_at_checked(length)?;
    Some((*number, value, rest))
}

fn parse_slots(value: &[u8]) -> Option<NonZeroUsize> {
    let slots = u64::from_be_bytes(value.try_into().ok()?);
    NonZeroUsize::new(usize::try_from(slots).ok()?)
}

fn invalid() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "invalid field")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn unknown_fields_are_skipped() {
        let slots = NonZeroUsize::new(3);
        let mut bytes = Vec::new();
        push_field(&mut bytes, 200, b"of a later release");
        bytes.extend(PassedValues { slots }.encode());
        push_field(&mut bytes, 201, b"");
        assert_eq!(
            PassedValues::decode(&bytes).unwrap(),
            PassedValues { slots }
        );
    }

    #[test]
    fn older_release_passes_no_fields() {
        assert_eq!(PassedValues::decode(b"").unwrap(), PassedValues::default());
        assert!(PassedValues::default().encode().is_empty());
    }

    #[test]
    fn incomplete_and_invalid_fields_are_errors() {
        let slots = NonZeroUsize::new(3);
        let bytes = PassedValues { slots }.encode();
        for length in 1..bytes.len() {
            assert!(PassedValues::decode(&bytes[..length]).is_err(), "{length}");
        }
        for value in [&[0; 8][..], &[1; 7], &[1; 9], &[]] {
            let mut bytes = Vec::new();
            push_field(&mut bytes, SLOTS, value);
            assert!(PassedValues::decode(&bytes).is_err(), "{value:?}");
        }
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes: Vec<u8>) {
            let _ = PassedValues::decode(&bytes);
        }

        #[test]
        fn decode_returns_what_encode_was_given(slots: Option<NonZeroUsize>) {
            let passed = PassedValues { slots };
            prop_assert_eq!(PassedValues::decode(&passed.encode()).unwrap(), passed);
        }
    }
}
