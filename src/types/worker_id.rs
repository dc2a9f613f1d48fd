//! The number by which a worker is known.

/// The number of a worker: 1 for the first, never used twice by one master.
///
/// Node: `worker.id`. It is the key of [`Master::worker`](crate::Master::worker), and the worker
/// itself knows it as [`Worker::id`](crate::Worker::id), which has an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(u32);

impl WorkerId {
    /// The last number. It still fits the poller on systems of 32 bits, where three bits of each key
    /// say what kind of descriptor it is.
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

/// For an id that has travelled as a number, in a message say.
impl From<u32> for WorkerId {
    fn from(number: u32) -> Self {
        Self(number)
    }
}

impl std::fmt::Display for WorkerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
