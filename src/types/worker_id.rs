//! The number of a worker.

/// The number of a worker: 1 for the first. A master never uses a number twice.
///
/// Node: `worker.id`. It is the key of [`Master::worker`](crate::Master::worker), and the worker
/// itself gets it from [`Worker::id`](crate::Worker::id), which has an example. The master finds a worker
/// by a plain number, too, for instance one that came in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(u32);

impl WorkerId {
    /// The highest number. It has to fit into a key of the poller. On 32-bit systems three bits of each
    /// key are taken by the kind of the descriptor.
    pub(crate) const MAX: u32 = if usize::BITS > u32::BITS {
        u32::MAX
    } else {
        u32::MAX >> 3
    };

    pub(crate) const fn new(number: u32) -> Self {
        Self(number)
    }

    /// Returns the plain number, 1 or more.
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
