//! What a pool does by itself, and when: every number has its default here.

use std::time::Duration;

use cluster::Signal;

/// What a [`Pool`](super::Pool) does by itself, and when.
///
/// Node has no counterpart: there, every program writes this again. Each clock has a name of its own,
/// and a default. A default of `None` is off, and costs nothing.
///
/// ```
/// use std::time::Duration;
/// use cluster::pool::PoolOptions;
///
/// let options = PoolOptions::default()
///     .workers(4)
///     .drain(Duration::from_secs(10))
///     .max_age(Duration::from_secs(3600));
/// # let _ = options;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolOptions {
    /// How many slots there are, each with a worker. The default is the number of cores.
    pub workers: usize,
    /// What proves that a worker is ready. The default is that it listens.
    pub readiness: Readiness,
    /// How long a worker may take from its fork until it is ready; it is killed then. With
    /// [`Readiness::Alive`] nobody is late. 30 s.
    pub boot: Duration,
    /// A worker that dies is replaced at once. If its replacement dies, too, this time passes before
    /// the next one, and twice as long each time after that. 100 ms.
    pub back_off: Duration,
    /// The longest time before a worker is replaced. 30 s.
    pub back_off_cap: Duration,
    /// By how much of themselves times and limits are made longer at random, in percent from 0 to
    /// 100, so that what began together does not end together: pauses before a replacement,
    /// [`max_age`](Self::max_age) and [`max_connections`](Self::max_connections). 10.
    pub jitter: u32,
    /// A worker that was ready for so long is taken for healthy: its death is the first one again.
    /// 10 s.
    pub stable: Duration,
    /// A slot that loses more workers than this number within this time is given up, and the program
    /// decides what comes of it ([`Pool::on_give_up`](super::Pool::on_give_up)). 8 in 60 s.
    pub give_up: (u32, Duration),
    /// How long a worker that replaces another must stay alive after it is ready, before the other
    /// one is told to leave. 1 s.
    pub trial: Duration,
    /// How many workers are replaced together, and so how many more than
    /// [`workers`](Self::workers) there may be meanwhile; at least 1. 1.
    pub surge: usize,
    /// A reload begins with this number of workers, which serve beside all others for this time:
    /// then the reload goes on, or goes back. `None`.
    pub canary: Option<(usize, Duration)>,
    /// How long a worker that was told to leave may take; it is killed then. 30 s.
    pub drain: Duration,
    /// After this time since its fork a worker is replaced. `None`.
    pub max_age: Option<Duration>,
    /// After it has received so many connections from the master a worker is replaced; with round
    /// robin only, as the master knows of no others. Looked at every [`look`](Self::look). `None`.
    pub max_connections: Option<u64>,
    /// When it has more bytes of memory resident a worker is replaced; Linux only. Looked at every
    /// [`look`](Self::look). `None`.
    pub max_memory: Option<u64>,
    /// How often workers are looked at for the two limits above, if there are such; at least 1 ms. 5 s.
    pub look: Duration,
    /// A worker that is ready and does not send [`BEAT`](super::BEAT) within this time is killed. Time
    /// in which the master did not run does not count. `None`.
    pub heartbeat: Option<Duration>,
    /// With how many workers that are ready the pool is ready: at least 1, and all of them if there are
    /// fewer slots. `None`, which is more than half of the slots.
    pub quorum: Option<usize>,
    /// The signal that tells a worker to leave, for programs that are not written with this crate.
    /// `None`: it is told over the channel.
    pub leave_signal: Option<Signal>,
}

/// What proves that a worker is ready, for [`PoolOptions::readiness`].
///
/// Node has no counterpart. See [`PoolOptions::readiness`](PoolOptions::readiness()) for an example.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Readiness {
    /// Its event `listening`.
    Listening,
    /// Its event `online`.
    Online,
    /// It has sent [`READY`](super::READY).
    Told,
    /// It has lived so long: for programs that are not written with this crate.
    Alive(Duration),
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            workers: cluster::available_parallelism(),
            readiness: Readiness::Listening,
            boot: Duration::from_secs(30),
            back_off: Duration::from_millis(100),
            back_off_cap: Duration::from_secs(30),
            jitter: 10,
            stable: Duration::from_secs(10),
            give_up: (8, Duration::from_secs(60)),
            trial: Duration::from_secs(1),
            surge: 1,
            canary: None,
            drain: Duration::from_secs(30),
            max_age: None,
            max_connections: None,
            max_memory: None,
            look: Duration::from_secs(5),
            heartbeat: None,
            quorum: None,
            leave_signal: None,
        }
    }
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $type:ty $(=> $wrap:expr)?;)*) => {
        impl PoolOptions {
            $(
                $(#[$doc])*
                #[must_use]
                pub fn $name(mut self, $name: $type) -> Self {
                    self.$name = setters!(@value $name $($wrap)?);
                    self
                }
            )*
        }
    };
    (@value $name:ident) => { $name };
    (@value $name:ident $wrap:expr) => { $wrap($name) };
}

setters! {
    /// Sets [`workers`](Self::workers), the number of slots. See [`PoolOptions`] for an example.
    workers: usize;
    /// Sets [`readiness`](Self::readiness), what proves that a worker is ready.
    ///
    /// ```
    /// use cluster::pool::{PoolOptions, Readiness};
    ///
    /// let options = PoolOptions::default().readiness(Readiness::Told);
    /// # let _ = options;
    /// ```
    readiness: Readiness;
    /// Sets [`boot`](Self::boot), how long a worker may take to be ready. See [`PoolOptions`] for an
    /// example.
    boot: Duration;
    /// Sets [`back_off`](Self::back_off), the first pause before a replacement. See [`PoolOptions`]
    /// for an example.
    back_off: Duration;
    /// Sets [`back_off_cap`](Self::back_off_cap), the longest pause before a replacement. See
    /// [`PoolOptions`] for an example.
    back_off_cap: Duration;
    /// Sets [`jitter`](Self::jitter), in percent from 0 to 100; what is beyond counts as 100. See
    /// [`PoolOptions`] for an example.
    jitter: u32;
    /// Sets [`stable`](Self::stable), after which a worker is taken for healthy. See [`PoolOptions`]
    /// for an example.
    stable: Duration;
    /// Sets [`trial`](Self::trial), how long a new worker proves itself. See [`PoolOptions`] for an
    /// example.
    trial: Duration;
    /// Sets [`surge`](Self::surge), how many workers are replaced together. See [`PoolOptions`] for
    /// an example.
    surge: usize;
    /// Sets [`drain`](Self::drain), how long a worker may take to leave. See [`PoolOptions`] for an
    /// example.
    drain: Duration;
    /// Sets [`max_age`](Self::max_age), after which a worker is replaced. See [`PoolOptions`] for an
    /// example.
    max_age: Duration => Some;
    /// Sets [`max_connections`](Self::max_connections), after which a worker is replaced. See
    /// [`PoolOptions`] for an example.
    max_connections: u64 => Some;
    /// Sets [`max_memory`](Self::max_memory), in bytes, beyond which a worker is replaced. See
    /// [`PoolOptions`] for an example.
    max_memory: u64 => Some;
    /// Sets [`look`](Self::look), how often workers are looked at. See [`PoolOptions`] for an example.
    look: Duration;
    /// Sets [`heartbeat`](Self::heartbeat), after which a silent worker is killed. See
    /// [`BEAT`](super::BEAT) for an example.
    heartbeat: Duration => Some;
    /// Sets [`quorum`](Self::quorum), the number of workers that make a pool ready. See
    /// [`PoolOptions`] for an example.
    quorum: usize => Some;
    /// Sets [`leave_signal`](Self::leave_signal), which tells workers to leave. See [`PoolOptions`]
    /// for an example.
    leave_signal: Signal => Some;
}

impl PoolOptions {
    /// Sets [`give_up`](Self::give_up): more than so many deaths within this time.
    ///
    /// ```
    /// use std::time::Duration;
    /// use cluster::pool::PoolOptions;
    ///
    /// let options = PoolOptions::default().give_up(3, Duration::from_secs(10));
    /// # let _ = options;
    /// ```
    #[must_use]
    pub fn give_up(mut self, deaths: u32, within: Duration) -> Self {
        self.give_up = (deaths, within);
        self
    }

    /// Sets [`canary`](Self::canary): so many workers first, for this time.
    ///
    /// ```
    /// use std::time::Duration;
    /// use cluster::pool::PoolOptions;
    ///
    /// let options = PoolOptions::default().canary(1, Duration::from_secs(60));
    /// # let _ = options;
    /// ```
    #[must_use]
    pub fn canary(mut self, workers: usize, time: Duration) -> Self {
        self.canary = Some((workers, time));
        self
    }

    /// With so many slots, how many ready workers make the pool ready.
    pub(super) fn quorum_of(&self, slots: usize) -> usize {
        let wanted = self.quorum.unwrap_or(slots / 2 + 1);
        wanted.clamp(1, slots.max(1))
    }
}

impl Readiness {
    /// When a worker is ready that was forked at this time, if time alone proves it.
    pub(super) fn alive_at(self, forked: Duration) -> Option<Duration> {
        match self {
            Self::Alive(time) => Some(forked.saturating_add(time)),
            Self::Listening | Self::Online | Self::Told => None,
        }
    }
}
