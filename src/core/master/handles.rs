//! All listeners, with an index of what the loop asks about them in each iteration: the next deadline,
//! and whether a connection waits. The answers do not depend on how many listeners there are.
//!
//! After a listener has been changed, its index entry is stale until `index_changed`. Until then the
//! listener is asked itself, so that the answers are right at any time. Most changes, several for each
//! connection, change nothing that the index says, and cost no search in it.

use std::collections::BTreeSet;
use std::ops::Bound;

use super::listeners::Handle;
use crate::runtime::timers::{Time, earlier};
use crate::types::sorted_map::SortedMap;
use crate::wire::frame::HandleId;

#[derive(Debug)]
pub(super) struct Handles<C> {
    entries: SortedMap<HandleId, Entry<C>>,
    deadlines: BTreeSet<(Time, HandleId)>,
    /// The listeners for which a connection waits in the master.
    waiting: BTreeSet<HandleId>,
    /// The listeners with a connection for which the scheduler has not chosen a worker.
    unscheduled: BTreeSet<HandleId>,
    /// How many have members, or close when they have none.
    busy: usize,
    /// The listeners whose index is stale, and perhaps some that are gone.
    changed: Vec<HandleId>,
}

#[derive(Debug)]
struct Entry<C> {
    handle: Handle<C>,
    /// The answers in the index.
    indexed: Outlook,
    index: Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Index {
    Current,
    /// The listener has been changed since.
    Stale,
}

/// The answers about one listener.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Outlook {
    deadline: Option<Time>,
    waits: bool,
    is_unscheduled: bool,
    is_busy: bool,
}

impl Outlook {
    fn of<C>(handle: &Handle<C>) -> Self {
        Self {
            deadline: handle.deadline(),
            waits: handle.connections.has_waiting(),
            is_unscheduled: handle.connections.unscheduled().is_some(),
            is_busy: !(handle.stays() && handle.members.is_empty()),
        }
    }
}

impl<C> Handles<C> {
    pub(super) fn new() -> Self {
        Self {
            entries: SortedMap::new(),
            deadlines: BTreeSet::new(),
            waiting: BTreeSet::new(),
            unscheduled: BTreeSet::new(),
            busy: 0,
            changed: Vec::new(),
        }
    }

    pub(super) fn get(&self, id: &HandleId) -> Option<&Handle<C>> {
        self.entries.get(id).map(|entry| &entry.handle)
    }

    pub(super) fn contains_key(&self, id: &HandleId) -> bool {
        self.entries.contains_key(id)
    }

    /// The listener, to be changed.
    pub(super) fn get_mut(&mut self, id: &HandleId) -> Option<&mut Handle<C>> {
        let entry = self.entries.get_mut(id)?;
        if entry.index == Index::Current {
            entry.index = Index::Stale;
            self.changed.push(*id);
        }
        Some(&mut entry.handle)
    }

    pub(super) fn insert(&mut self, id: HandleId, handle: Handle<C>) -> &mut Handle<C> {
        self.remove(&id);
        self.changed.push(id);
        let entry = || Entry {
            handle,
            indexed: Outlook::default(),
            index: Index::Stale,
        };
        &mut self.entries.get_or_insert_with(id, entry).handle
    }

    pub(super) fn remove(&mut self, id: &HandleId) {
        if let Some(entry) = self.entries.remove(id) {
            self.reindex(*id, entry.indexed, Outlook::default());
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&HandleId, &Handle<C>)> {
        self.entries.iter().map(|(id, entry)| (id, &entry.handle))
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &Handle<C>> {
        self.entries.values().map(|entry| &entry.handle)
    }

    pub(super) fn ids(&self) -> Vec<HandleId> {
        self.entries.keys().copied().collect()
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Makes the index current.
    pub(super) fn index_changed(&mut self) {
        while let Some(id) = self.changed.pop() {
            let entry = self.entries.get_mut(&id);
            let Some(entry) = entry.filter(|entry| entry.index == Index::Stale) else {
                continue;
            };
            entry.index = Index::Current;
            let new = Outlook::of(&entry.handle);
            let old = std::mem::replace(&mut entry.indexed, new);
            if old != new {
                self.reindex(id, old, new);
            }
        }
    }

    fn reindex(&mut self, id: HandleId, old: Outlook, new: Outlook) {
        if let Some(time) = old.deadline {
            self.deadlines.remove(&(time, id));
        }
        self.deadlines.extend(new.deadline.map(|time| (time, id)));
        if old.waits {
            self.waiting.remove(&id);
        }
        self.waiting.extend(new.waits.then_some(id));
        if old.is_unscheduled {
            self.unscheduled.remove(&id);
        }
        self.unscheduled.extend(new.is_unscheduled.then_some(id));
        self.busy = self.busy + usize::from(new.is_busy) - usize::from(old.is_busy);
    }

    fn is_current(&self, id: HandleId) -> bool {
        let entry = self.entries.get(&id);
        entry.is_some_and(|entry| entry.index == Index::Current)
    }

    /// The listeners whose index is stale.
    fn changed(&self) -> impl Iterator<Item = (HandleId, Outlook)> + '_ {
        self.changed.iter().filter_map(|id| {
            let entry = self.entries.get(id)?;
            let is_stale = entry.index == Index::Stale;
            is_stale.then(|| (*id, Outlook::of(&entry.handle)))
        })
    }

    /// The first time at which one of them has something to do.
    pub(super) fn deadline(&self) -> Option<Time> {
        let mut indexed = self.deadlines.iter();
        let first = indexed.find(|(_, id)| self.is_current(*id));
        let changed = self.changed().map(|(_, outlook)| outlook.deadline);
        changed.fold(first.map(|(time, _)| *time), earlier)
    }

    /// Those that have something to do now.
    pub(super) fn due(&mut self, now: Time) -> Vec<HandleId> {
        self.index_changed();
        let due = self.deadlines.iter().take_while(|(time, _)| *time <= now);
        due.map(|(_, id)| *id).collect()
    }

    pub(super) fn has_waiting(&self) -> bool {
        self.waiting.iter().any(|id| self.is_current(*id))
            || self.changed().any(|(_, outlook)| outlook.waits)
    }

    /// Listeners for which connections wait, in rotation: those after `last` first.
    pub(super) fn waiting_after(&mut self, last: HandleId, at_most: usize) -> Vec<HandleId> {
        self.index_changed();
        let after = (Bound::Excluded(last), Bound::Unbounded);
        let before = (Bound::Unbounded, Bound::Included(last));
        let after = self.waiting.range(after);
        let all = after.chain(self.waiting.range(before));
        all.take(at_most).copied().collect()
    }

    /// The first listener with a connection for which the scheduler has not chosen a worker.
    pub(super) fn first_unscheduled(&self) -> Option<HandleId> {
        let changed = self.changed().filter(|(_, outlook)| outlook.is_unscheduled);
        let changed = changed.map(|(id, _)| id).min();
        let mut indexed = self.unscheduled.iter().copied();
        let first = indexed.find(|id| self.is_current(*id));
        first.into_iter().chain(changed).min()
    }

    /// Whether any has members, or closes when it has none.
    pub(super) fn any_is_busy(&self) -> bool {
        let stale = self.changed.iter().filter_map(|id| self.entries.get(id));
        let stale = stale.filter(|entry| entry.index == Index::Stale && entry.indexed.is_busy);
        self.busy > stale.count() || self.changed().any(|(_, outlook)| outlook.is_busy)
    }
}

impl<C> std::ops::Index<&HandleId> for Handles<C> {
    type Output = Handle<C>;

    fn index(&self, id: &HandleId) -> &Handle<C> {
        &self.entries[id].handle
    }
}
