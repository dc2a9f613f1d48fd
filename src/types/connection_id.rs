//! The ids of connections that a process holds while their clients send nothing.

use super::ordered_set::Id;

/// Identifies a connection of which the master holds a copy: one that is parked, that was parked
/// before and is now with a worker, or that waits for its first bytes. In a worker, identifies a
/// connection that the worker holds while it is parked. Numbers are reused, but no two connections
/// of a process have the same number at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ConnectionId(pub(crate) u32);

impl Id for ConnectionId {
    fn number(self) -> u32 {
        self.0
    }

    fn from_number(number: u32) -> Self {
        Self(number)
    }
}

/// A map for connections, whose ids are small numbers.
#[derive(Debug)]
pub(crate) struct ConnectionMap<T> {
    values: Vec<Option<T>>,
    /// The number of values that are not `None`.
    count: usize,
}

impl<T> ConnectionMap<T> {
    pub(crate) fn get(&self, id: ConnectionId) -> Option<&T> {
        self.values.get(id.0 as usize)?.as_ref()
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &T> {
        self.values.iter().flatten()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(crate) fn into_values(self) -> impl Iterator<Item = T> {
        self.values.into_iter().flatten()
    }

    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.values.iter_mut().flatten()
    }

    pub(crate) fn insert(&mut self, id: ConnectionId, value: T) {
        let at = id.0 as usize;
        if self.values.len() <= at {
            self.values.resize_with(at + 1, || None);
        }
        let previous = self.values[at].replace(value);
        self.count += usize::from(previous.is_none());
    }

    pub(crate) fn remove(&mut self, id: ConnectionId) -> Option<T> {
        let removed = self.values.get_mut(id.0 as usize)?.take()?;
        self.count -= 1;
        if self.count == 0 {
            // Return the memory after a peak.
            self.values = Vec::new();
        }
        Some(removed)
    }
}

impl<T> Default for ConnectionMap<T> {
    fn default() -> Self {
        Self {
            values: Vec::new(),
            count: 0,
        }
    }
}
