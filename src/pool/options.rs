//! The options of a pool, with their defaults.

use std::time::Duration;

use cluster::Signal;

/// The options of a [`Pool`](super::Pool): sizes, timeouts and limits.
///
/// Node has no counterpart.
///
/// Each method replaces the value of one option. An option that may be absent takes an [`Option`],
/// and costs nothing while it is `None`. The methods whose names begin with `get_` return the
/// values.
///
/// ```
/// use std::time::Duration;
/// use cluster::pool::PoolOptions;
///
/// let options = PoolOptions::default()
///     .workers(4)
///     .drain_timeout(Duration::from_secs(10))
///     .max_age(Some(Duration::from_secs(3600)));
/// assert_eq!(options.get_workers(), 4);
/// assert_eq!(options.max_age(None).get_max_age(), None);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolOptions {
    pub(super) workers: usize,
    pub(super) readiness: Readiness,
    pub(super) startup_timeout: Duration,
    pub(super) back_off: Duration,
    pub(super) back_off_cap: Duration,
    pub(super) back_off_reset: Duration,
    pub(super) jitter: u32,
    pub(super) max_failures: u32,
    pub(super) failure_window: Duration,
    pub(super) min_ready_time: Duration,
    pub(super) surge: usize,
    pub(super) canary: Option<Canary>,
    pub(super) drain_timeout: Duration,
    pub(super) max_age: Option<Duration>,
    pub(super) max_connections: Option<u64>,
    pub(super) max_memory: Option<u64>,
    pub(super) check_interval: Duration,
    pub(super) heartbeat_timeout: Option<Duration>,
    pub(super) quorum: Option<usize>,
    pub(super) disconnect_signal: Option<Signal>,
}

/// The proof that a worker is ready, for [`PoolOptions::readiness`].
///
/// Node has no counterpart.
///
/// See [`PoolOptions::readiness`] for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Readiness {
    /// The worker's event `listening`.
    Listening,
    /// The worker's event `online`.
    Online,
    /// The message [`READY`](super::READY) from the worker.
    Message,
    /// The worker has run for this time since its fork. This is for programs that do not use this
    /// crate.
    Alive(Duration),
}

/// The first step of a reload, for [`PoolOptions::canary`].
///
/// Node has no counterpart.
///
/// See [`PoolOptions::canary`] for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Canary {
    /// The number of new workers in the first step. 0 is treated as 1.
    pub workers: usize,
    /// The time for which they serve beside all old workers.
    pub duration: Duration,
}

impl Canary {
    /// Makes a first step of `workers` new workers, which serve beside all old workers for `duration`.
    ///
    /// Node has no counterpart.
    ///
    /// See [`PoolOptions::canary`] for an example.
    #[must_use]
    pub fn new(workers: usize, duration: Duration) -> Self {
        Self { workers, duration }
    }
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            workers: cluster::available_parallelism(),
            readiness: Readiness::Listening,
            startup_timeout: Duration::from_secs(30),
            back_off: Duration::from_millis(100),
            back_off_cap: Duration::from_secs(30),
            back_off_reset: Duration::from_secs(10),
            jitter: 10,
            max_failures: 8,
            failure_window: Duration::from_secs(60),
            min_ready_time: Duration::from_secs(1),
            surge: 1,
            canary: None,
            drain_timeout: Duration::from_secs(30),
            max_age: None,
            max_connections: None,
            max_memory: None,
            check_interval: Duration::from_secs(5),
            heartbeat_timeout: None,
            quorum: None,
            disconnect_signal: None,
        }
    }
}

/// Implements a method that sets an option, and one that returns it.
macro_rules! accessors {
    ($(
        $(#[$set_doc:meta])* $set:ident,
        $(#[$get_doc:meta])* $get:ident: $type:ty;
    )*) => {
        impl PoolOptions {
            $(
                $(#[$set_doc])*
                #[must_use]
                pub fn $set(mut self, $set: $type) -> Self {
                    self.$set = $set;
                    self
                }

                $(#[$get_doc])*
                #[must_use]
                pub fn $get(&self) -> $type {
                    self.$set
                }
            )*
        }
    };
}

accessors! {
    /// Sets the number of slots; each slot has one worker. The default is
    /// [`available_parallelism`](cluster::available_parallelism). See [`PoolOptions`] for an example.
    workers,
    /// Returns the number of slots. See [`PoolOptions`] for an example.
    get_workers: usize;

    /// Sets the proof that a worker is ready. The default is [`Readiness::Listening`].
    ///
    /// ```
    /// use cluster::pool::{PoolOptions, Readiness};
    ///
    /// let options = PoolOptions::default().readiness(Readiness::Message);
    /// assert_eq!(options.get_readiness(), Readiness::Message);
    /// ```
    readiness,
    /// Returns the proof that a worker is ready. See [`readiness`](Self::readiness) for an example.
    get_readiness: Readiness;

    /// Sets the longest time from the fork of a worker until it is ready. A worker that takes longer is
    /// killed. With [`Readiness::Alive`] the timeout begins when that time has passed. The default is
    /// 30 s. See [`PoolOptions`] for an example.
    startup_timeout,
    /// Returns the longest time from the fork of a worker until it is ready. See [`PoolOptions`] for an
    /// example.
    get_startup_timeout: Duration;

    /// Sets the first pause before a failed worker is replaced. The first failure is replaced without a
    /// pause, the second one after this time, and each further one after twice the previous pause. The
    /// default is 100 ms. See [`PoolOptions`] for an example.
    back_off,
    /// Returns the first pause before a failed worker is replaced. See [`PoolOptions`] for an example.
    get_back_off: Duration;

    /// Sets the longest pause before a failed worker is replaced. The default is 30 s. See
    /// [`PoolOptions`] for an example.
    back_off_cap,
    /// Returns the longest pause before a failed worker is replaced. See [`PoolOptions`] for an example.
    get_back_off_cap: Duration;

    /// Sets how long a worker must have been ready for its failure to count as the first one again. The
    /// default is 10 s. See [`PoolOptions`] for an example.
    back_off_reset,
    /// Returns how long a worker must have been ready for its failure to count as the first one again.
    /// See [`PoolOptions`] for an example.
    get_back_off_reset: Duration;

    /// Sets by how many percent times and limits are lengthened at random, so that workers that started
    /// together are not replaced together. It applies to the pause before a replacement,
    /// [`max_age`](Self::max_age) and [`max_connections`](Self::max_connections). Values above 100 are
    /// treated as 100. The default is 10. See [`PoolOptions`] for an example.
    jitter,
    /// Returns by how many percent times and limits are lengthened at random. See [`PoolOptions`] for an
    /// example.
    get_jitter: u32;

    /// Sets how many workers of one slot may fail within the
    /// [`failure_window`](Self::failure_window). One more failure reaches the failure limit, and
    /// [`Pool::set_failure_limit_callback`](super::Pool::set_failure_limit_callback) decides what
    /// happens to the slot. The default is 8.
    ///
    /// ```
    /// use std::time::Duration;
    /// use cluster::pool::PoolOptions;
    ///
    /// let options = PoolOptions::default()
    ///     .max_failures(3)
    ///     .failure_window(Duration::from_secs(10));
    /// # let _ = options;
    /// ```
    max_failures,
    /// Returns how many workers of one slot may fail within the failure window. See
    /// [`PoolOptions`] for an example.
    get_max_failures: u32;

    /// Sets the time within which the failures of a slot are counted. The default is 60 s. See
    /// [`max_failures`](Self::max_failures) for an example.
    failure_window,
    /// Returns the time within which the failures of a slot are counted. See [`PoolOptions`] for an
    /// example.
    get_failure_window: Duration;

    /// Sets how long a new worker must be ready before the old worker of its slot is disconnected. The
    /// default is 1 s. See [`PoolOptions`] for an example.
    min_ready_time,
    /// Returns how long a new worker must be ready before the old worker of its slot is disconnected.
    /// See [`PoolOptions`] for an example.
    get_min_ready_time: Duration;

    /// Sets how many workers are replaced at the same time, and so how many workers a pool may have in
    /// addition to its slots. 0 is treated as 1. The default is 1. See [`PoolOptions`] for an example.
    surge,
    /// Returns how many workers are replaced at the same time. See [`PoolOptions`] for an example.
    get_surge: usize;

    /// Sets the first step of a reload: some new workers, which serve beside all old ones for a while.
    /// The reload then continues, unless one of them has failed or
    /// [`Pool::cancel_reload`](super::Pool::cancel_reload) was called. The default is `None`.
    ///
    /// ```
    /// use std::time::Duration;
    /// use cluster::pool::{Canary, PoolOptions};
    ///
    /// let canary = Canary::new(1, Duration::from_secs(60));
    /// let options = PoolOptions::default().canary(Some(canary));
    /// # let _ = options;
    /// ```
    canary,
    /// Returns the first step of a reload. See [`PoolOptions`] for an example.
    get_canary: Option<Canary>;

    /// Sets how long a worker may take to exit after the pool has disconnected it. A worker that takes
    /// longer is killed. The default is 30 s. See [`PoolOptions`] for an example.
    drain_timeout,
    /// Returns how long a worker may take to exit after the pool has disconnected it. See
    /// [`PoolOptions`] for an example.
    get_drain_timeout: Duration;

    /// Sets the time since its fork after which a worker is replaced. The default is `None`. See
    /// [`PoolOptions`] for an example.
    max_age,
    /// Returns the time since its fork after which a worker is replaced. See [`PoolOptions`] for an
    /// example.
    get_max_age: Option<Duration>;

    /// Sets the number of connections after which a worker is replaced. It counts the connections that
    /// the worker received from the master, so it has an effect with round robin alone. It is checked
    /// every [`check_interval`](Self::check_interval). The default is `None`. See [`PoolOptions`] for an
    /// example.
    max_connections,
    /// Returns the number of connections after which a worker is replaced. See [`PoolOptions`] for an
    /// example.
    get_max_connections: Option<u64>;

    /// Sets the resident memory, in bytes, at which a worker is replaced. It has an effect on Linux
    /// alone, and is checked every [`check_interval`](Self::check_interval). The default is `None`. See
    /// [`PoolOptions`] for an example.
    max_memory,
    /// Returns the resident memory, in bytes, at which a worker is replaced. See [`PoolOptions`] for an
    /// example.
    get_max_memory: Option<u64>;

    /// Sets how often [`max_connections`](Self::max_connections) and [`max_memory`](Self::max_memory)
    /// are checked, if one of them is set. Less than 1 ms is treated as 1 ms. The default is 5 s. See
    /// [`PoolOptions`] for an example.
    check_interval,
    /// Returns how often connections and memory are checked. See [`PoolOptions`] for an example.
    get_check_interval: Duration;

    /// Sets the longest time between two [`HEARTBEAT`](super::HEARTBEAT) messages of a ready worker. A
    /// worker that is silent for longer is killed. Time in which the master did not run is not counted.
    /// The default is `None`. See [`HEARTBEAT`](super::HEARTBEAT) for an example.
    heartbeat_timeout,
    /// Returns the longest time between two heartbeats of a ready worker. See [`PoolOptions`] for an
    /// example.
    get_heartbeat_timeout: Option<Duration>;

    /// Sets how many workers must be ready for the pool to be ready. The number is at least 1, and at
    /// most the number of slots. The default is `None`, which stands for more than half of the slots.
    /// See [`PoolOptions`] for an example.
    quorum,
    /// Returns how many workers must be ready for the pool to be ready. See [`PoolOptions`] for an
    /// example.
    get_quorum: Option<usize>;

    /// Sets the signal that is sent to a worker instead of a disconnect request. This is for programs
    /// that do not use this crate. The default is `None`, which requests the disconnect over the
    /// channel. See [`PoolOptions`] for an example.
    disconnect_signal,
    /// Returns the signal that is sent to a worker instead of a disconnect request. See
    /// [`PoolOptions`] for an example.
    get_disconnect_signal: Option<Signal>;
}

impl PoolOptions {
    /// Returns how many ready workers make a pool with this number of slots ready.
    pub(super) fn quorum_of(&self, slots: usize) -> usize {
        let quorum = self.quorum.unwrap_or(slots / 2 + 1);
        quorum.clamp(1, slots.max(1))
    }
}

impl Readiness {
    /// Returns when a worker that was forked at `forked` becomes ready, if time alone is the proof.
    pub(super) fn ready_at(self, forked: Duration) -> Option<Duration> {
        match self {
            Self::Alive(time) => Some(forked.saturating_add(time)),
            Self::Listening | Self::Online | Self::Message => None,
        }
    }
}
