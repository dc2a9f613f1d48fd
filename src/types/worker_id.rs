//! Worker ids.

use super::ordered_set::Id;
use super::poll_number::POLL_NUMBER_MAX;

/// A worker's id: 1 for the first worker. A master never uses an id twice.
///
/// Node: `worker.id`.
///
/// Use the id, or its plain number, to look up the worker with
/// [`Master::worker`](crate::Master::worker). In the worker, [`Worker::id`](crate::Worker::id)
/// returns the id. See [`init`](crate::init()) for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(u32);

impl WorkerId {
    /// The highest id. On 64-bit systems, every number fits into a key of the poller. The range is
    /// larger there than that of other numbers, because ids are never reused.
    pub(crate) const MAX: u32 = if usize::BITS > u32::BITS {
        u32::MAX
    } else {
        POLL_NUMBER_MAX
    };

    pub(crate) const fn new(number: u32) -> Self {
        Self(number)
    }

    /// Returns the id as a plain number, which is at least 1.
    ///
    /// ```
    /// fn port(id: cluster::WorkerId) -> u32 {
    ///     9000 + id.get()
    /// }
    /// # let _ = port;
    /// ```
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl Id for WorkerId {
    fn number(self) -> u32 {
        self.0
    }

    fn from_number(number: u32) -> Self {
        Self(number)
    }
}

impl From<WorkerId> for u32 {
    fn from(id: WorkerId) -> Self {
        id.0
    }
}

impl std::fmt::Display for WorkerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
