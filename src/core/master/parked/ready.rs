//! The connections of one listener whose clients have sent something.

use std::collections::VecDeque;

use super::Resumed;

/// The source of the next connection, if both the backlog and the resumed connections have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NextSource {
    Backlog,
    Resumed,
}

/// The connections of one listener whose clients have sent something, and that the dispatcher does
/// not have yet.
#[derive(Debug)]
pub(in super::super) struct ReadyQueue {
    pub(super) connections: VecDeque<Resumed>,
    next: NextSource,
    /// The part of the dispatcher's capacity that is left to new connections while the master
    /// accepts.
    pub(super) reserved: u64,
}

impl ReadyQueue {
    pub(in super::super) const fn new() -> Self {
        Self {
            connections: VecDeque::new(),
            next: NextSource::Resumed,
            reserved: 0,
        }
    }

    pub(in super::super) fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    #[cfg(any(test, fuzzing))]
    pub(in super::super) fn len(&self) -> usize {
        self.connections.len()
    }

    /// Leaves a part of the dispatcher's capacity to new connections, because the master begins to
    /// accept.
    pub(in super::super) fn reserve(&mut self, capacity: u64) {
        self.reserved = capacity;
    }

    /// Records that a new connection uses one unit of the reserved capacity.
    pub(in super::super) fn use_reserved(&mut self) {
        self.reserved = self.reserved.saturating_sub(1);
    }

    /// Returns how many of the next `capacity` connections are resumed ones, if the backlog has
    /// connections too. The sources take turns, so that neither makes the other one wait forever.
    pub(super) fn share(&mut self, capacity: u64) -> u64 {
        let half = capacity / 2;
        if capacity % 2 == 0 || self.is_empty() {
            return half;
        }
        match self.next {
            NextSource::Backlog => {
                self.next = NextSource::Resumed;
                half
            }
            NextSource::Resumed => {
                self.next = NextSource::Backlog;
                half + 1
            }
        }
    }
}
