//! The options of a pool, with their defaults.

use std::time::Duration;

use cluster::Signal;

/// The sizes, timeouts and limits of a [`Pool`](super::Pool).
///
/// Node has no counterpart.
///
/// Each option has a method that sets its value and a getter, whose name begins with `get_`. Some
/// methods take an [`Option`]. The value `None` then disables the feature or selects its default.
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
    pub(super) stop_delay: Duration,
    pub(super) drain_timeout: Duration,
    pub(super) max_age: Option<Duration>,
    pub(super) max_connections: Option<u64>,
    pub(super) max_memory: Option<u64>,
    pub(super) check_interval: Duration,
    pub(super) heartbeat_timeout: Option<Duration>,
    pub(super) quorum: Option<usize>,
    pub(super) disconnect_signal: Option<Signal>,
    pub(super) reap_orphans: bool,
}

/// The sign that a worker is ready, for [`PoolOptions::readiness`].
///
/// Node has no counterpart.
///
/// See [`PoolOptions::readiness`] for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Readiness {
    /// A worker is ready when its `listening` event occurs.
    Listening,
    /// A worker is ready when its `online` event occurs.
    Online,
    /// A worker is ready when it sends the message [`READY`](super::READY).
    Message,
    /// A worker is ready when it has run for this time since its fork. Use this variant for
    /// programs that do not use this crate.
    Alive(Duration),
}

/// The canary step of a reload, for [`PoolOptions::canary`].
///
/// Node has no counterpart.
///
/// See [`PoolOptions::canary`] for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Canary {
    /// The number of new workers in the canary step. The value 0 is treated as 1.
    pub workers: usize,
    /// The time for which the new workers serve clients together with all old workers.
    pub duration: Duration,
}

impl Canary {
    /// Creates a canary step. In this step, `workers` new workers serve clients together with all
    /// old workers for `duration`.
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
            stop_delay: Duration::ZERO,
            drain_timeout: Duration::from_secs(30),
            max_age: None,
            max_connections: None,
            max_memory: None,
            check_interval: Duration::from_secs(5),
            heartbeat_timeout: None,
            quorum: None,
            disconnect_signal: None,
            reap_orphans: true,
        }
    }
}

/// Implements a setter and a getter for each option.
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
    /// Sets the number of slots, at most 65,536. Each slot has one worker. The default is
    /// [`available_parallelism`](cluster::available_parallelism). See [`PoolOptions`] for an
    /// example.
    workers,
    /// Returns the number of slots. See [`PoolOptions`] for an example.
    get_workers: usize;

    /// Sets the sign by which the pool recognizes that a worker is ready. The default is
    /// [`Readiness::Listening`].
    ///
    /// ```
    /// use cluster::pool::{PoolOptions, Readiness};
    ///
    /// let options = PoolOptions::default().readiness(Readiness::Message);
    /// assert_eq!(options.get_readiness(), Readiness::Message);
    /// ```
    readiness,
    /// Returns the sign by which the pool recognizes that a worker is ready. See
    /// [`readiness`](Self::readiness) for an example.
    get_readiness: Readiness;

    /// Sets how long a worker may take to become ready after its fork. A worker that takes longer
    /// is killed. With [`Readiness::Alive`], the timeout begins only after the time of that
    /// variant. The default is 30 s. See [`PoolOptions`] for an example.
    startup_timeout,
    /// Returns how long a worker may take to become ready after its fork. See [`PoolOptions`] for
    /// an example.
    get_startup_timeout: Duration;

    /// Sets the pause between the second consecutive failure of a slot and its next fork. After the
    /// first failure, the pool forks a replacement immediately. Each failure after the second
    /// doubles the pause, up to [`back_off_cap`](Self::back_off_cap). A pause below 1 ms is treated
    /// as 1 ms. The default is 100 ms. See [`PoolOptions`] for an example.
    back_off,
    /// Returns the pause between the second consecutive failure of a slot and its next fork. See
    /// [`PoolOptions`] for an example.
    get_back_off: Duration;

    /// Sets the longest pause before the pool replaces a failed worker, without
    /// [`jitter`](Self::jitter). The default is 30 s. See [`PoolOptions`] for an example.
    back_off_cap,
    /// Returns the longest pause before the pool replaces a failed worker, without jitter. See
    /// [`PoolOptions`] for an example.
    get_back_off_cap: Duration;

    /// Sets how long a worker must stay ready before its slot's back-off is reset. If the worker
    /// fails after that time, the pool treats the failure as the slot's first. During a reload, a new
    /// worker that fails before that time also fails the reload ([`Pool::reload`](super::Pool::reload)).
    /// The default is 10 s. See [`PoolOptions`] for an example.
    back_off_reset,
    /// Returns how long a worker must stay ready before its slot's back-off is reset. See
    /// [`PoolOptions`] for an example.
    get_back_off_reset: Duration;

    /// Sets the maximum random increase of times and limits, in percent. Without the increase,
    /// workers that were forked together would also be replaced together. The increase applies to
    /// the pause before a replacement, [`max_age`](Self::max_age) and
    /// [`max_connections`](Self::max_connections). Values above 100 are treated as 100. The default
    /// is 10. See [`PoolOptions`] for an example.
    jitter,
    /// Returns the maximum random increase of times and limits, in percent. See [`PoolOptions`] for
    /// an example.
    get_jitter: u32;

    /// Sets how many workers of one slot may fail within the
    /// [`failure_window`](Self::failure_window). With one more failure, the slot reaches its
    /// failure limit. Failures with the cause
    /// [`OutOfResources`](super::FailureCause::OutOfResources) do not count. The default is 8.
    ///
    /// At the failure limit, the callback set with
    /// [`Pool::set_failure_limit_callback`](super::Pool::set_failure_limit_callback) decides what
    /// happens to the slot. Without a callback, the slot stays empty if another worker is ready. If
    /// no worker is ready, the pool stops, and [`Master::run`](cluster::Master::run) returns
    /// [`Error::GaveUp`](cluster::Error::GaveUp).
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

    /// Sets the length of the period in which a slot's failures are counted. The default is 60 s.
    /// See [`max_failures`](Self::max_failures) for an example.
    failure_window,
    /// Returns the length of the period in which a slot's failures are counted. See [`PoolOptions`]
    /// for an example.
    get_failure_window: Duration;

    /// Sets how long a new worker must stay ready before the pool disconnects the old worker of its
    /// slot. The default is 1 s. See [`PoolOptions`] for an example.
    min_ready_time,
    /// Returns how long a new worker must stay ready before the pool disconnects the old worker of
    /// its slot. See [`PoolOptions`] for an example.
    get_min_ready_time: Duration;

    /// Sets how many workers are replaced at the same time. During the replacement, the pool may
    /// have up to this number of workers in addition to one per slot. The value 0 is treated as 1.
    /// The default is 1. See [`PoolOptions`] for an example.
    surge,
    /// Returns how many workers are replaced at the same time. See [`PoolOptions`] for an example.
    get_surge: usize;

    /// Sets the canary step of a reload, in which some new workers serve clients together with all
    /// old workers. In this step, the canary's duration is used instead of
    /// [`min_ready_time`](Self::min_ready_time). After the duration, the reload replaces the other
    /// workers. The reload ends early if a new worker fails or
    /// [`Pool::cancel_reload`](super::Pool::cancel_reload) is called. With the default, `None`, a
    /// reload has no canary step.
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
    /// Returns the canary step of a reload, or `None` if a reload has none. See [`PoolOptions`] for
    /// an example.
    get_canary: Option<Canary>;

    /// Sets how long a pool that is stopping continues to serve before it disconnects its workers.
    /// Load balancers stop sending clients in the meantime. The default is zero. See
    /// [`Pool::stop`](super::Pool::stop).
    ///
    /// Choose a time in which every load balancer notices that the pool is not ready: the interval
    /// of its health checks, multiplied by the number of failures after which it removes the
    /// server. In Kubernetes, choose the time in which all nodes learn that the pod is terminating,
    /// usually a few seconds. A service manager must allow for the delay and the
    /// [`drain_timeout`](Self::drain_timeout) together (`TimeoutStopSec` in systemd.service(5),
    /// `terminationGracePeriodSeconds` in Kubernetes).
    ///
    /// ```
    /// use std::time::Duration;
    /// use cluster::pool::PoolOptions;
    ///
    /// let options = PoolOptions::default()
    ///     .stop_delay(Duration::from_secs(10))
    ///     .drain_timeout(Duration::from_secs(30));
    /// # let _ = options;
    /// ```
    stop_delay,
    /// Returns how long a pool that is stopping continues to serve before it disconnects its
    /// workers. See [`stop_delay`](Self::stop_delay) for an example.
    get_stop_delay: Duration;

    /// Sets how long a worker may take to exit after the pool has disconnected the worker. A worker
    /// that takes longer is killed. The default is 30 s. See [`PoolOptions`] for an example.
    drain_timeout,
    /// Returns how long a worker may take to exit after the pool has disconnected it. See
    /// [`PoolOptions`] for an example.
    get_drain_timeout: Duration;

    /// Sets the age at which a worker is replaced. The age is the time since the worker's fork. The
    /// default, `None`, sets no limit. See [`PoolOptions`] for an example.
    max_age,
    /// Returns the age at which a worker is replaced. See [`PoolOptions`] for an example.
    get_max_age: Option<Duration>;

    /// Sets the number of connections after which a worker is replaced. Only connections that the
    /// worker received from the master count, so this option needs round robin. The pool checks the
    /// number every [`check_interval`](Self::check_interval). The default, `None`, sets no limit.
    /// See [`PoolOptions`] for an example.
    max_connections,
    /// Returns the number of connections from the master after which a worker is replaced. See
    /// [`PoolOptions`] for an example.
    get_max_connections: Option<u64>;

    /// Sets the private memory, in bytes, at which a worker is replaced. Pages that the worker
    /// shares with the master or with other workers do not count, nor do pages that were swapped
    /// out. This option has an effect only on Linux. The pool checks the memory every
    /// [`check_interval`](Self::check_interval). The default, `None`, sets no limit. See
    /// [`PoolOptions`] for an example.
    ///
    /// The value is the sum of `Private_Clean` and `Private_Dirty` in `/proc/PID/smaps_rollup`. If
    /// a worker's resident memory has reached the limit, each check takes about 30 ms per GiB of
    /// this memory, during which the master does nothing else. Before Linux 4.14, all anonymous
    /// memory counts, including pages that the worker shares with the master. The same is true for
    /// workers that the master has no permission to trace (`PTRACE_MODE_READ` in ptrace(2)).
    ///
    /// If a new worker soon reaches the limit again, replacing it does not help, so the pool
    /// replaces such workers less and less often. If a worker is replaced for its memory at an age
    /// below [`back_off_cap`](Self::back_off_cap), its successor must reach a minimum age before
    /// the pool replaces it for its memory. At first, the minimum age is the check interval. The
    /// minimum age doubles with each such replacement, up to `back_off_cap`. It is reset when a
    /// worker is replaced that has lived at least `back_off_cap` longer than its minimum age. If a
    /// worker at the limit is too young, the pool emits
    /// [`PoolEvent::RecyclingPostponed`](super::PoolEvent::RecyclingPostponed).
    max_memory,
    /// Returns the private memory, in bytes, at which the pool replaces a worker. See
    /// [`PoolOptions`] for an example.
    get_max_memory: Option<u64>;

    /// Sets the interval at which the pool checks [`max_connections`](Self::max_connections) and
    /// [`max_memory`](Self::max_memory). An interval below 1 ms is treated as 1 ms. The default is
    /// 5 s. See [`PoolOptions`] for an example.
    check_interval,
    /// Returns the interval at which the pool checks connections and memory. See [`PoolOptions`]
    /// for an example.
    get_check_interval: Duration;

    /// Sets the longest time between two [`HEARTBEAT`](super::HEARTBEAT) messages of a ready
    /// worker. A worker that is silent for longer is killed. If the master itself did not run for a
    /// while, for example because it was stopped, the period starts again. The default, `None`,
    /// disables the check. See [`HEARTBEAT`](super::HEARTBEAT) for an example.
    heartbeat_timeout,
    /// Returns the longest time between two heartbeats that a ready worker sends. See
    /// [`PoolOptions`] for an example.
    get_heartbeat_timeout: Option<Duration>;

    /// Sets how many workers must be ready for the pool to be ready. A value outside the range from
    /// 1 to the number of slots is replaced by the nearer bound. The default is `None`, which
    /// stands for more than half of the slots. See [`PoolOptions`] for an example.
    ///
    /// A slot that is added after the pool has first become ready counts only when its first worker
    /// has become ready. A pool that grows therefore stays ready.
    quorum,
    /// Returns how many workers must be ready for the pool to be ready. See [`PoolOptions`] for an
    /// example.
    get_quorum: Option<usize>;

    /// Sets the signal that the pool sends to a worker instead of a disconnect request, if the worker
    /// does not use this crate. A worker that has called [`init`](cluster::init()) receives a
    /// disconnect request in any case. If the signal was ignored when the master started, it is also
    /// ignored in programs that do not change this, and the pool kills them after `drain_timeout`. With the default, `None`, the pool sends
    /// disconnect requests over the channel. See [`PoolOptions`] for an example.
    disconnect_signal,
    /// Returns the signal that the pool sends to a worker instead of a disconnect request. See
    /// [`PoolOptions`] for an example.
    get_disconnect_signal: Option<Signal>;

    /// Sets whether a pool in process 1, for example in a container, reaps orphans. The kernel
    /// makes orphaned processes children of process 1. Set `false` if the application reaps orphans
    /// itself, or waits for its own children later than one second after their exit. In any other
    /// process, this option has no effect. The default is `true`. See
    /// [`Master::reap_orphans`](cluster::Master::reap_orphans).
    ///
    /// ```
    /// use cluster::pool::PoolOptions;
    ///
    /// let options = PoolOptions::default().reap_orphans(false);
    /// assert!(!options.get_reap_orphans());
    /// ```
    reap_orphans,
    /// Returns whether a pool in process 1 reaps orphans. See
    /// [`reap_orphans`](Self::reap_orphans) for an example.
    get_reap_orphans: bool;
}

impl PoolOptions {
    /// Returns how many workers must be ready for a pool with this number of slots to be ready.
    pub(super) fn quorum_of(&self, slots: usize) -> usize {
        let quorum = self.quorum.unwrap_or(slots / 2 + 1);
        quorum.clamp(1, slots.max(1))
    }
}

impl Readiness {
    /// Returns the time at which a worker that was forked at time `forked` becomes ready. Returns
    /// `None` if readiness does not depend on time.
    pub(super) fn ready_at(self, forked: Duration) -> Option<Duration> {
        match self {
            Self::Alive(time) => Some(forked.saturating_add(time)),
            Self::Listening | Self::Online | Self::Message => None,
        }
    }
}
