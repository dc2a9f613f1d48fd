//! A map for many entries that are mostly added and removed in the order of their numbers.
//!
//! Each instantiation of `BTreeMap` adds several kilobytes to the size of the program.
//! `SortedQueue` adds less. A number that is higher or lower than all others is added, and the
//! lowest number is removed, in constant time.

use std::collections::VecDeque;

/// The number of entries whose memory an empty queue keeps. If it is 0, each entry of a queue that is
/// mostly empty costs an allocation. If it is larger, a queue uses more memory after a peak. No
/// benchmark chose this value.
const KEPT: usize = 64;

/// A map from numbers to values, whose entries are sorted.
#[derive(Debug)]
pub(crate) struct SortedQueue<V>(VecDeque<(u64, V)>);

impl<V> SortedQueue<V> {
    pub(crate) const fn new() -> Self {
        Self(VecDeque::new())
    }

    /// Returns the index of the number's entry. If the number has no entry, returns `Err` with the
    /// index at which to insert one.
    fn search(&self, number: u64) -> Result<usize, usize> {
        match (self.0.front(), self.0.back()) {
            (_, Some((last, _))) if *last < number => Err(self.0.len()),
            (Some((first, _)), _) if *first == number => Ok(0),
            _ => self.0.binary_search_by(|(other, _)| other.cmp(&number)),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn get(&self, number: u64) -> Option<&V> {
        let index = self.search(number).ok()?;
        self.0.get(index).map(|(_, value)| value)
    }

    pub(crate) fn get_mut(&mut self, number: u64) -> Option<&mut V> {
        let index = self.search(number).ok()?;
        self.0.get_mut(index).map(|(_, value)| value)
    }

    /// Adds an entry. Replaces the value if the number has one.
    pub(crate) fn insert(&mut self, number: u64, value: V) {
        match self.search(number) {
            Ok(index) => self.0[index].1 = value,
            Err(index) => self.0.insert(index, (number, value)),
        }
    }

    pub(crate) fn remove(&mut self, number: u64) -> Option<V> {
        let index = self.search(number).ok()?;
        let removed = self.0.remove(index);
        if self.0.is_empty() && self.0.capacity() > KEPT {
            // Return the memory after a peak.
            self.0 = VecDeque::new();
        }
        removed.map(|(_, value)| value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &V)> {
        self.0.iter().map(|(number, value)| (*number, value))
    }

    /// Returns the entries with higher numbers than `number`.
    pub(crate) fn after(&self, number: u64) -> impl Iterator<Item = (u64, &V)> {
        let from = self.0.partition_point(|(other, _)| *other <= number);
        self.iter().skip(from)
    }
}

impl<V> Default for SortedQueue<V> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::ops::Bound;

    proptest! {
        #[test]
        fn sorted_queue_behaves_like_a_btree_map(calls in prop::collection::vec((0..4, 0u64..20, any::<u8>()), 0..200)) {
            let (mut queue, mut model) = (SortedQueue::new(), BTreeMap::new());
            for (call, number, value) in calls {
                if call == 0 {
                    prop_assert_eq!(queue.remove(number), model.remove(&number));
                } else {
                    queue.insert(number, value);
                    model.insert(number, value);
                }
                prop_assert_eq!(queue.get(number), model.get(&number));
                prop_assert_eq!(queue.get_mut(number), model.get_mut(&number));
                prop_assert_eq!((queue.len(), queue.is_empty()), (model.len(), model.is_empty()));
                prop_assert!(queue.iter().eq(model.iter().map(|(number, value)| (*number, value))));
                let after = model.range((Bound::Excluded(number), Bound::Unbounded));
                prop_assert!(queue.after(number).eq(after.map(|(number, value)| (*number, value))));
            }
        }
    }
}
