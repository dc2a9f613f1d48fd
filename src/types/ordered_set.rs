//! A set of small keys in their order.
//!
//! All sets use the same code, because they store each key as a number.

use std::marker::PhantomData;
use std::ops::Bound;
use std::os::fd::RawFd;
use std::time::Duration;

use super::chunks::{self, Chunks};
use super::time::Time;

/// A key that a set stores as a number. The numbers have the order of the keys, and are less than
/// `u128::MAX`.
pub(crate) trait Key: Copy {
    fn pack(self) -> u128;
    fn unpack(packed: u128) -> Self;
}

/// An id that is a number of 32 bits.
pub(crate) trait Id: Copy {
    fn number(self) -> u32;
    fn from_number(number: u32) -> Self;
}

impl Id for u32 {
    fn number(self) -> u32 {
        self
    }

    fn from_number(number: u32) -> Self {
        number
    }
}

/// A descriptor's number, which is never negative.
impl Id for RawFd {
    fn number(self) -> u32 {
        self.unsigned_abs()
    }

    fn from_number(number: u32) -> Self {
        Self::try_from(number).unwrap_or(Self::MAX)
    }
}

/// Returns the lowest 32 bits of a packed key.
#[allow(clippy::cast_possible_truncation)]
pub(crate) fn low_number(packed: u128) -> u32 {
    packed as u32
}

impl<T: Id> Key for T {
    fn pack(self) -> u128 {
        self.number().into()
    }

    fn unpack(packed: u128) -> Self {
        Self::from_number(low_number(packed))
    }
}

impl Key for u64 {
    fn pack(self) -> u128 {
        self.into()
    }

    #[allow(clippy::cast_possible_truncation)]
    fn unpack(packed: u128) -> Self {
        packed as Self
    }
}

impl<T: Id, U: Id> Key for (T, U) {
    fn pack(self) -> u128 {
        u128::from(self.0.number()) << 32 | self.1.pack()
    }

    fn unpack(packed: u128) -> Self {
        (T::unpack(packed >> 32), U::unpack(packed))
    }
}

impl<T: Id> Key for (Time, T) {
    fn pack(self) -> u128 {
        let (seconds, nanos) = (self.0.as_secs(), self.0.subsec_nanos());
        u128::from(seconds) << 64 | u128::from(nanos) << 32 | self.1.pack()
    }

    fn unpack(packed: u128) -> Self {
        let (seconds, nanos) = (u64::unpack(packed >> 64), low_number(packed >> 32));
        (Duration::new(seconds, nanos), T::unpack(packed))
    }
}

impl chunks::Entry for u128 {
    type Key = Self;

    fn key(&self) -> Self {
        *self
    }
}

/// A set whose elements are sorted.
pub(crate) struct OrderedSet<T> {
    packed: Chunks<u128>,
    key: PhantomData<T>,
}

impl<T: Key> OrderedSet<T> {
    pub(crate) const fn new() -> Self {
        Self {
            packed: Chunks::new(),
            key: PhantomData,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.packed.len() == 0
    }

    pub(crate) fn len(&self) -> usize {
        self.packed.len()
    }

    pub(crate) fn contains(&self, key: T) -> bool {
        self.packed.get(&key.pack()).is_some()
    }

    pub(crate) fn insert(&mut self, key: T) {
        self.packed.insert(key.pack());
    }

    /// Removes a key. Returns whether the set contained it.
    pub(crate) fn remove(&mut self, key: T) -> bool {
        self.packed.remove(&key.pack()).is_some()
    }

    pub(crate) fn first(&self) -> Option<T> {
        self.packed.first().copied().map(T::unpack)
    }

    pub(crate) fn iter(&self) -> Iter<'_, T> {
        self.range((Bound::Unbounded, Bound::Unbounded))
    }

    /// Returns the elements between two bounds.
    pub(crate) fn range(&self, (from, to): (Bound<T>, Bound<T>)) -> Iter<'_, T> {
        let from = match from {
            Bound::Included(key) => key.pack(),
            Bound::Excluded(key) => key.pack() + 1,
            Bound::Unbounded => 0,
        };
        let end = match to {
            Bound::Included(key) => key.pack() + 1,
            Bound::Excluded(key) => key.pack(),
            Bound::Unbounded => u128::MAX,
        };
        Iter {
            packed: self.packed.iter_from(&from),
            end,
            key: PhantomData,
        }
    }

    pub(crate) fn retain(&mut self, mut is_kept: impl FnMut(T) -> bool) {
        let removed: Vec<_> = self.iter().filter(|key| !is_kept(*key)).collect();
        for key in removed {
            self.remove(key);
        }
    }

    /// Replaces one key of the set by another one. `None` means no key.
    pub(crate) fn replace(&mut self, old: Option<T>, new: Option<T>) {
        let (old, new) = (old.map(T::pack), new.map(T::pack));
        if old != new {
            if let Some(old) = old {
                self.packed.remove(&old);
            }
            if let Some(new) = new {
                self.packed.insert(new);
            }
        }
    }
}

/// The elements of a set in their order.
pub(crate) struct Iter<'a, T> {
    packed: chunks::Iter<'a, u128>,
    /// The first number after the elements. No key is the highest number.
    end: u128,
    key: PhantomData<T>,
}

impl<T: Key> Iterator for Iter<'_, T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        let packed = self.packed.next().copied();
        packed.filter(|packed| *packed < self.end).map(T::unpack)
    }
}

impl<T: Key> Default for OrderedSet<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Key + std::fmt::Debug> std::fmt::Debug for OrderedSet<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl<T: Key> FromIterator<T> for OrderedSet<T> {
    fn from_iter<I: IntoIterator<Item = T>>(keys: I) -> Self {
        let mut set = Self::new();
        for key in keys {
            set.insert(key);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::connection_id::ConnectionId;
    use crate::types::worker_id::WorkerId;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn keep_order<T: Key + Ord + std::fmt::Debug>(
        one: T,
        other: T,
    ) -> std::result::Result<(), TestCaseError> {
        prop_assert_eq!(T::unpack(one.pack()), one);
        prop_assert_eq!(one.pack().cmp(&other.pack()), one.cmp(&other));
        Ok(())
    }

    proptest! {
        #[test]
        fn packed_keys_keep_their_values_and_order(
            one in any::<(u64, u32, u32, u32)>(), other in any::<(u64, u32, u32, u32)>(), equal in 0..3,
        ) {
            // Make the first parts of the keys equal, so that the later parts decide.
            let other = match equal {
                0 => other,
                1 => (one.0, other.1, other.2, other.3),
                _ => (one.0, one.1, one.2, other.3),
            };
            let time = |n: (u64, u32, u32, u32)| Duration::new(n.0, n.1 % 1_000_000_000);
            let key = |n: (u64, u32, u32, u32)| (time(n), WorkerId::new(n.3));
            keep_order(key(one), key(other))?;
            let key = |n: (u64, u32, u32, u32)| (WorkerId::new(n.2), ConnectionId(n.3));
            keep_order(key(one), key(other))?;
            keep_order(one.0, other.0)?;
            keep_order(ConnectionId(one.3), ConnectionId(other.3))?;
        }

        #[test]
        fn ordered_set_behaves_like_a_btree_set(calls in prop::collection::vec((0..4, 0u64..20, 0u64..20), 0..200)) {
            let (mut set, mut model) = (OrderedSet::new(), BTreeSet::new());
            for (call, key, other) in calls {
                match call {
                    0 => {
                        set.insert(key);
                        model.insert(key);
                    }
                    1 => {
                        prop_assert_eq!(set.remove(key), model.remove(&key));
                    }
                    2 => {
                        set.replace(Some(key), Some(other));
                        if key != other {
                            model.remove(&key);
                            model.insert(other);
                        }
                    }
                    _ => {
                        set.retain(|kept| kept != key);
                        model.retain(|kept| *kept != key);
                    }
                }
                prop_assert_eq!(set.contains(other), model.contains(&other));
                prop_assert_eq!((set.len(), set.is_empty()), (model.len(), model.is_empty()));
                prop_assert_eq!(set.first(), model.first().copied());
                prop_assert!(set.iter().eq(model.iter().copied()));
                let after = (Bound::Excluded(key), Bound::Unbounded);
                prop_assert!(set.range(after).eq(model.range(after).copied()));
            }
        }
    }

    #[test]
    fn longest_time_is_packed() {
        let key = (Time::MAX, WorkerId::new(u32::MAX));
        assert_eq!(<(Time, WorkerId)>::unpack(key.pack()), key);
    }
}
