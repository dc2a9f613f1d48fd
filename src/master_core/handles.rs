//! All listeners, with an index of what the loop asks about them in each iteration: the next deadline,
//! and whether a connection waits. The answers do not depend on how many listeners there are.
//!
//! A listener that has been changed leaves the index until `index_changed`. Until then it is asked
//! itself, so that the answers are right at any time.

use std::collections::BTreeSet;
use std::ops::Bound;

use super::listeners::Handle;
use crate::frame::HandleId;
use crate::sorted_map::SortedMap;
use crate::timers::{Time, earlier};

#[derive(Debug)]
pub(super) struct Handles<C> {
    entries: SortedMap<HandleId, Entry<C>>,
    deadlines: BTreeSet<(Time, HandleId)>,
    /// The listeners for which a connection waits in the master.
    waiting: BTreeSet<HandleId>,
    /// Those with a connection for which the scheduler is to choose a worker.
    unscheduled: BTreeSet<HandleId>,
    /// How many have members, or close when they have none.
    busy: usize,
    /// The listeners that are not in the index, and perhaps some that are gone.
    changed: Vec<HandleId>,
}

#[derive(Debug)]
struct Entry<C> {
    handle: Handle<C>,
    /// What the index says about it; `None` while it has been changed.
    indexed: Option<Outlook>,
}

/// What the loop asks about a listener.
#[derive(Clone, Copy, Debug)]
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
            waits: handle.connections.anyone_waits(),
            is_unscheduled: handle.connections.unchosen().is_some(),
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
        if let Some(Outlook {
            deadline,
            waits,
            is_unscheduled,
            is_busy,
        }) = entry.indexed.take()
        {
            if let Some(deadline) = deadline {
                self.deadlines.remove(&(deadline, *id));
            }
            if waits {
                self.waiting.remove(id);
            }
            if is_unscheduled {
                self.unscheduled.remove(id);
            }
            self.busy -= usize::from(is_busy);
            self.changed.push(*id);
        }
        Some(&mut entry.handle)
    }

    pub(super) fn insert(&mut self, id: HandleId, handle: Handle<C>) -> &mut Handle<C> {
        self.remove(&id);
        self.changed.push(id);
        let indexed = None;
        let entry = || Entry { handle, indexed };
        &mut self.entries.get_or_insert_with(id, entry).handle
    }

    pub(super) fn remove(&mut self, id: &HandleId) {
        self.get_mut(id);
        self.entries.remove(id);
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

    /// Takes all listeners into the index.
    pub(super) fn index_changed(&mut self) {
        while let Some(id) = self.changed.pop() {
            let entry = self.entries.get_mut(&id);
            let Some(entry) = entry.filter(|entry| entry.indexed.is_none()) else {
                continue;
            };
            let outlook = Outlook::of(&entry.handle);
            entry.indexed = Some(outlook);
            self.deadlines
                .extend(outlook.deadline.map(|time| (time, id)));
            self.waiting.extend(outlook.waits.then_some(id));
            self.unscheduled
                .extend(outlook.is_unscheduled.then_some(id));
            self.busy += usize::from(outlook.is_busy);
        }
    }

    /// The listeners that are not in the index.
    fn changed(&self) -> impl Iterator<Item = (HandleId, Outlook)> + '_ {
        self.changed.iter().filter_map(|id| {
            let entry = self.entries.get(id)?;
            Some((*id, Outlook::of(&entry.handle)))
        })
    }

    /// The first time at which one of them has something to do.
    pub(super) fn deadline(&self) -> Option<Time> {
        let first = self.deadlines.first().map(|(time, _)| *time);
        let changed = self.changed().map(|(_, outlook)| outlook.deadline);
        changed.fold(first, earlier)
    }

    /// Those that have something to do now.
    pub(super) fn due(&mut self, now: Time) -> Vec<HandleId> {
        self.index_changed();
        let due = self.deadlines.iter().take_while(|(time, _)| *time <= now);
        due.map(|(_, id)| *id).collect()
    }

    pub(super) fn anyone_waits(&self) -> bool {
        !self.waiting.is_empty() || self.changed().any(|(_, outlook)| outlook.waits)
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

    /// The first one with a connection for which the scheduler is to choose a worker.
    pub(super) fn first_unscheduled(&self) -> Option<HandleId> {
        let changed = self.changed().filter(|(_, outlook)| outlook.is_unscheduled);
        let changed = changed.map(|(id, _)| id).min();
        let first = self.unscheduled.first().copied();
        first.into_iter().chain(changed).min()
    }

    /// Whether any has members, or closes when it has none.
    pub(super) fn any_is_busy(&self) -> bool {
        self.busy > 0 || self.changed().any(|(_, outlook)| outlook.is_busy)
    }
}

impl<C> std::ops::Index<&HandleId> for Handles<C> {
    type Output = Handle<C>;

    fn index(&self, id: &HandleId) -> &Handle<C> {
        &self.entries[id].handle
    }
}
