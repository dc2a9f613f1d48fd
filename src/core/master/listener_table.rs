//! The table of listeners, with an index for the queries of each event loop iteration.
//!
//! The event loop asks for the next deadline, and whether any connection waits. The cost of a query
//! depends only on the number of listeners that have changed, not on the number of all listeners.
//!
//! Changing a listener makes its index entry stale until `index_changed` is called. In the
//! meantime, each query also reads the stale listeners themselves, so its answer is always correct.
//!
//! The index is updated late, because each connection causes several changes to its listener, and
//! most of them do not alter the index entry.

use std::ops::Bound;

use super::listener::Listener;
use crate::types::handle::HandleId;
use crate::types::ordered_set::OrderedSet;
use crate::types::sorted_map::SortedMap;
use crate::types::time::{Time, earlier};

#[derive(Debug)]
pub(super) struct ListenerTable<C> {
    entries: SortedMap<HandleId, Entry<C>>,
    deadlines: OrderedSet<(Time, HandleId)>,
    /// The listeners whose connections wait in the master.
    waiting: OrderedSet<HandleId>,
    /// The listeners with a connection for which the scheduler has not been called.
    unscheduled: OrderedSet<HandleId>,
    /// The number of listeners that delay the end of `disconnect_all`.
    delaying_end: usize,
    /// The listeners whose index entry is stale, and some that have been removed.
    changed: Vec<HandleId>,
}

#[derive(Debug)]
struct Entry<C> {
    listener: Listener<C>,
    /// The listener's properties that are in the index.
    indexed: IndexedProperties,
    index: Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Index {
    Current,
    /// The listener has been changed since it was indexed.
    Stale,
}

/// The indexed properties of one listener.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct IndexedProperties {
    deadline: Option<Time>,
    has_waiting: bool,
    is_unscheduled: bool,
    /// Whether the listener delays the end of `disconnect_all`: it has members, or closes once it
    /// has none.
    delays_end: bool,
}

impl IndexedProperties {
    fn of<C>(listener: &Listener<C>) -> Self {
        Self {
            deadline: listener.deadline(),
            has_waiting: listener.dispatcher.has_waiting(),
            is_unscheduled: listener.dispatcher.unscheduled().is_some(),
            delays_end: !(listener.outlives_workers() && listener.members.is_empty()),
        }
    }
}

impl<C> ListenerTable<C> {
    pub(super) fn new() -> Self {
        Self {
            entries: SortedMap::new(),
            deadlines: OrderedSet::new(),
            waiting: OrderedSet::new(),
            unscheduled: OrderedSet::new(),
            delaying_end: 0,
            changed: Vec::new(),
        }
    }

    pub(super) fn get(&self, id: &HandleId) -> Option<&Listener<C>> {
        self.entries.get(id).map(|entry| &entry.listener)
    }

    pub(super) fn contains_key(&self, id: &HandleId) -> bool {
        self.entries.contains_key(id)
    }

    /// Returns the listener for a change, and marks its index entry as stale.
    pub(super) fn get_mut(&mut self, id: &HandleId) -> Option<&mut Listener<C>> {
        let entry = self.entries.get_mut(id)?;
        if entry.index == Index::Current {
            entry.index = Index::Stale;
            self.changed.push(*id);
        }
        Some(&mut entry.listener)
    }

    pub(super) fn insert(&mut self, id: HandleId, listener: Listener<C>) -> &mut Listener<C> {
        self.remove(&id);
        self.changed.push(id);
        let entry = || Entry {
            listener,
            indexed: IndexedProperties::default(),
            index: Index::Stale,
        };
        &mut self.entries.get_or_insert_with(id, entry).listener
    }

    pub(super) fn remove(&mut self, id: &HandleId) {
        if let Some(entry) = self.entries.remove(id) {
            self.reindex(*id, entry.indexed, IndexedProperties::default());
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&HandleId, &Listener<C>)> {
        self.entries.iter().map(|(id, entry)| (id, &entry.listener))
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &Listener<C>> {
        self.entries.values().map(|entry| &entry.listener)
    }

    pub(super) fn ids(&self) -> Vec<HandleId> {
        self.entries.keys().copied().collect()
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Updates the stale index entries.
    pub(super) fn index_changed(&mut self) {
        while let Some(id) = self.changed.pop() {
            let entry = self.entries.get_mut(&id);
            let Some(entry) = entry.filter(|entry| entry.index == Index::Stale) else {
                continue;
            };
            entry.index = Index::Current;
            let new = IndexedProperties::of(&entry.listener);
            let old = std::mem::replace(&mut entry.indexed, new);
            if old != new {
                self.reindex(id, old, new);
            }
        }
    }

    fn reindex(&mut self, id: HandleId, old: IndexedProperties, new: IndexedProperties) {
        let key = |deadline: Option<Time>| deadline.map(|time| (time, id));
        self.deadlines.replace(key(old.deadline), key(new.deadline));
        let key = |is_member: bool| is_member.then_some(id);
        self.waiting
            .replace(key(old.has_waiting), key(new.has_waiting));
        self.unscheduled
            .replace(key(old.is_unscheduled), key(new.is_unscheduled));
        self.delaying_end =
            self.delaying_end + usize::from(new.delays_end) - usize::from(old.delays_end);
    }

    fn is_current(&self, id: HandleId) -> bool {
        let entry = self.entries.get(&id);
        entry.is_some_and(|entry| entry.index == Index::Current)
    }

    /// Returns the current properties of the listeners whose index entry is stale.
    fn changed(&self) -> impl Iterator<Item = (HandleId, IndexedProperties)> + '_ {
        self.changed.iter().filter_map(|id| {
            let entry = self.entries.get(id)?;
            let is_stale = entry.index == Index::Stale;
            is_stale.then(|| (*id, IndexedProperties::of(&entry.listener)))
        })
    }

    /// Returns the earliest deadline of all listeners.
    pub(super) fn deadline(&self) -> Option<Time> {
        let mut indexed = self.deadlines.iter();
        let first = indexed.find(|(_, id)| self.is_current(*id));
        let changed = self.changed().map(|(_, properties)| properties.deadline);
        changed.fold(first.map(|(time, _)| time), earlier)
    }

    /// Returns the listeners whose deadline has expired.
    pub(super) fn due(&mut self, now: Time) -> Vec<HandleId> {
        self.index_changed();
        let due = self.deadlines.iter().take_while(|(time, _)| *time <= now);
        due.map(|(_, id)| id).collect()
    }

    pub(super) fn has_waiting(&self) -> bool {
        self.waiting.iter().any(|id| self.is_current(id))
            || self.changed().any(|(_, properties)| properties.has_waiting)
    }

    /// Returns at most `limit` listeners that have waiting connections. The listeners are in the
    /// order of their handles, starting after `last` and wrapping around.
    pub(super) fn waiting_after(&mut self, last: HandleId, limit: usize) -> Vec<HandleId> {
        self.index_changed();
        let after = (Bound::Excluded(last), Bound::Unbounded);
        let before = (Bound::Unbounded, Bound::Included(last));
        let after = self.waiting.range(after);
        let all = after.chain(self.waiting.range(before));
        all.take(limit).collect()
    }

    /// Returns the first listener with a connection for which the scheduler has not been called.
    pub(super) fn first_unscheduled(&self) -> Option<HandleId> {
        let changed = self
            .changed()
            .filter(|(_, properties)| properties.is_unscheduled);
        let changed = changed.map(|(id, _)| id).min();
        let mut indexed = self.unscheduled.iter();
        let first = indexed.find(|id| self.is_current(*id));
        first.into_iter().chain(changed).min()
    }

    /// Returns whether any listener delays the end of `disconnect_all`.
    pub(super) fn any_delays_end(&self) -> bool {
        let stale = self.changed.iter().filter_map(|id| self.entries.get(id));
        let stale = stale.filter(|entry| entry.index == Index::Stale && entry.indexed.delays_end);
        self.delaying_end > stale.count()
            || self.changed().any(|(_, properties)| properties.delays_end)
    }
}

impl<C> std::ops::Index<&HandleId> for ListenerTable<C> {
    type Output = Listener<C>;

    fn index(&self, id: &HandleId) -> &Listener<C> {
        &self.entries[id].listener
    }
}
