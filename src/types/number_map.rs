//! A map from numbers to values, for many entries.

use super::chunks::{Chunks, Entry};

impl<V> Entry for (u64, V) {
    type Key = u64;

    fn key(&self) -> u64 {
        self.0
    }
}

/// A map from numbers to values, whose entries are sorted.
#[derive(Debug)]
pub(crate) struct NumberMap<V>(Chunks<(u64, V)>);

impl<V> NumberMap<V> {
    pub(crate) const fn new() -> Self {
        Self(Chunks::new())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.len() == 0
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn get(&self, number: u64) -> Option<&V> {
        self.0.get(&number).map(|(_, value)| value)
    }

    pub(crate) fn get_mut(&mut self, number: u64) -> Option<&mut V> {
        self.0.get_mut(&number).map(|(_, value)| value)
    }

    /// Adds an entry. Replaces the value if the number has one.
    pub(crate) fn insert(&mut self, number: u64, value: V) {
        self.0.insert((number, value));
    }

    pub(crate) fn remove(&mut self, number: u64) -> Option<V> {
        self.0.remove(&number).map(|(_, value)| value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &V)> {
        self.0.iter().map(|(number, value)| (*number, value))
    }

    /// Returns the entries with higher numbers than `number`.
    pub(crate) fn after(&self, number: u64) -> impl Iterator<Item = (u64, &V)> {
        let rest = self.0.iter_from(&number.saturating_add(1));
        rest.map(|(number, value)| (*number, value))
    }
}

impl<V> Default for NumberMap<V> {
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
        fn number_map_behaves_like_a_btree_map(calls in prop::collection::vec((0..4, 0u64..20, any::<u8>()), 0..200)) {
            let (mut map, mut model) = (NumberMap::new(), BTreeMap::new());
            for (call, number, value) in calls {
                if call == 0 {
                    prop_assert_eq!(map.remove(number), model.remove(&number));
                } else {
                    map.insert(number, value);
                    model.insert(number, value);
                }
                prop_assert_eq!(map.get(number), model.get(&number));
                prop_assert_eq!(map.get_mut(number), model.get_mut(&number));
                prop_assert_eq!((map.len(), map.is_empty()), (model.len(), model.is_empty()));
                prop_assert!(map.iter().eq(model.iter().map(|(number, value)| (*number, value))));
                let after = model.range((Bound::Excluded(number), Bound::Unbounded));
                prop_assert!(map.after(number).eq(after.map(|(number, value)| (*number, value))));
            }
        }
    }
}
