//! The ids of connections that a process holds while their clients send nothing.

/// Identifies a connection of which the master holds a copy while a worker serves the connection or
/// while the connection is parked. In a worker, identifies a connection that the worker holds while
/// it is parked. Numbers are reused, but no two connections have the same number at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ConnectionId(pub(crate) u32);

/// A map for connections, whose ids are small numbers.
#[derive(Debug)]
pub(crate) struct ConnectionMap<T>(Vec<Option<T>>);

impl<T> ConnectionMap<T> {
    pub(crate) fn get(&self, id: ConnectionId) -> Option<&T> {
        self.0.get(id.0 as usize)?.as_ref()
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &T> {
        self.0.iter().flatten()
    }

    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut().flatten()
    }

    pub(crate) fn insert(&mut self, id: ConnectionId, value: T) {
        let at = id.0 as usize;
        if self.0.len() <= at {
            self.0.resize_with(at + 1, || None);
        }
        self.0[at] = Some(value);
    }

    pub(crate) fn remove(&mut self, id: ConnectionId) -> Option<T> {
        let removed = self.0.get_mut(id.0 as usize)?.take();
        // Return the memory after a peak.
        if self.0.last().is_some_and(Option::is_none) {
            let used = self.0.iter().rposition(Option::is_some);
            self.0.truncate(used.map_or(0, |last| last + 1));
            if self.0.is_empty() {
                self.0 = Vec::new();
            }
        }
        removed
    }
}

impl<T> Default for ConnectionMap<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}
