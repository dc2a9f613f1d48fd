//! What a pool tells the program.

use std::process::ExitStatus;
use std::time::Duration;

use cluster::WorkerId;

/// What a pool tells the program, for [`Pool::on_event`](super::Pool::on_event), which has an example.
///
/// Node has no counterpart. Printed, it is one line for a log.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PoolEvent {
    /// A worker is ready.
    #[non_exhaustive]
    Ready {
        /// Its slot.
        slot: usize,
        /// Which worker.
        worker: WorkerId,
    },
    /// A worker has ended that was not told to leave, or could not be forked.
    Died(Death),
    /// A worker has ended that was told to leave.
    #[non_exhaustive]
    Left {
        /// Its slot.
        slot: usize,
        /// Which worker.
        worker: WorkerId,
        /// It took longer than [`PoolOptions::drain`](super::PoolOptions::drain()).
        killed: bool,
    },
    /// A worker has reached a limit; another one is on its way to replace it.
    #[non_exhaustive]
    Recycling {
        /// Its slot.
        slot: usize,
        /// Which worker.
        worker: WorkerId,
        /// Which limit.
        limit: Limit,
    },
    /// A worker that was to replace one which has reached a limit has died. That one goes on.
    RecyclingFailed(Death),
    /// A slot has lost more workers than [`PoolOptions::give_up`](super::PoolOptions::give_up())
    /// allows.
    #[non_exhaustive]
    GivenUp {
        /// Which slot.
        slot: usize,
    },
    /// Workers of this generation are about to replace all others.
    #[non_exhaustive]
    Reloading {
        /// Which generation; the first one is 0.
        generation: u64,
    },
    /// All workers are of this generation now.
    #[non_exhaustive]
    Reloaded {
        /// Which generation.
        generation: u64,
    },
    /// A reload was stopped: whoever had not been replaced goes on.
    #[non_exhaustive]
    ReloadFailed {
        /// The generation that did not come.
        generation: u64,
        /// How many workers had been replaced, and stay.
        replaced: usize,
        /// The worker that did not prove itself; `None` if the program has gone back.
        death: Option<Death>,
    },
    /// As many workers are ready as make the pool ready, or are not any more.
    Quorum(bool),
    /// This master has taken over from the one before, which leaves.
    TookOver,
    /// A new master has taken over; this one leaves.
    Upgraded,
    /// The new master did not prove itself; this one goes on.
    #[non_exhaustive]
    UpgradeFailed {
        /// Why.
        reason: String,
    },
}

/// The limit that a worker has reached.
///
/// Node has no counterpart. See [`PoolEvent::Recycling`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Limit {
    /// [`PoolOptions::max_age`](super::PoolOptions::max_age()).
    Age,
    /// [`PoolOptions::max_connections`](super::PoolOptions::max_connections()).
    Connections,
    /// [`PoolOptions::max_memory`](super::PoolOptions::max_memory()).
    Memory,
}

/// How a worker ended that was not told to leave.
///
/// Node has no counterpart. It comes with [`PoolEvent::Died`] and in the
/// [status](super::SlotStatus::last_death).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Death {
    /// The slot that it had.
    pub slot: usize,
    /// Which worker, and its process id; `None` if it could not be forked.
    pub worker: Option<(WorkerId, u32)>,
    /// Its generation.
    pub generation: u64,
    /// What it comes from.
    pub cause: Cause,
    /// Why there was no process, if there was none.
    pub error: Option<String>,
    /// How its process ended; `None` if there was none.
    pub status: Option<ExitStatus>,
    /// How long it lived.
    pub age: Duration,
    /// What it had used, if the system has told.
    pub usage: Option<cluster::Usage>,
}

/// What a death comes from.
///
/// Node has no counterpart. See [`Death::cause`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// It could not be forked.
    NotForked,
    /// It ended before it was ready.
    NeverReady,
    /// It was killed, because it was not ready in time.
    BootDeadline,
    /// It was ready, and ended.
    Died,
    /// It was killed, because it did not beat in time.
    Hung,
}

/// What becomes of a slot that has lost too many workers, for
/// [`Pool::on_give_up`](super::Pool::on_give_up), which has an example.
///
/// Node has no counterpart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GiveUp {
    /// The slot stays empty until the next reload, or [`Pool::retry`](super::Pool::retry).
    Hold,
    /// The slot is filled again after this time, and has all its chances anew.
    RetryAfter(Duration),
    /// The pool stops, as by [`Pool::stop`](super::Pool::stop).
    Stop,
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotForked => "could not be forked",
            Self::NeverReady => "ended before it was ready",
            Self::BootDeadline => "was not ready in time",
            Self::Died => "died",
            Self::Hung => "hung",
        })
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Age => "age",
            Self::Connections => "connections",
            Self::Memory => "memory",
        })
    }
}

impl std::fmt::Display for Death {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let slot = self.slot;
        match &self.worker {
            Some((worker, pid)) => write!(f, "slot {slot}: worker {worker} ({pid}) ")?,
            None => write!(f, "slot {slot}: worker ")?,
        }
        write!(f, "{}", self.cause)?;
        if let Some(error) = &self.error {
            write!(f, ": {error}")?;
        }
        if let Some(status) = self.status {
            let age = self.age.as_secs_f64();
            write!(f, " after {age:.1} s ({status})")?;
        }
        Ok(())
    }
}

impl std::fmt::Display for PoolEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ready { slot, worker } => write!(f, "slot {slot}: worker {worker} is ready"),
            Self::Died(death) => death.fmt(f),
            Self::Left {
                slot,
                worker,
                killed,
            } => {
                let how = if *killed { "was killed" } else { "has left" };
                write!(f, "slot {slot}: worker {worker} {how}")
            }
            Self::Recycling {
                slot,
                worker,
                limit,
            } => write!(f, "slot {slot}: worker {worker} is replaced ({limit})"),
            Self::RecyclingFailed(death) => write!(f, "no replacement: {death}"),
            Self::GivenUp { slot } => write!(f, "slot {slot}: too many deaths"),
            Self::Reloading { generation } => write!(f, "generation {generation} comes"),
            Self::Reloaded { generation } => write!(f, "generation {generation} serves"),
            Self::ReloadFailed {
                generation,
                replaced,
                death,
            } => {
                write!(
                    f,
                    "generation {generation} failed after {replaced} replaced"
                )?;
                match death {
                    Some(death) => write!(f, ": {death}"),
                    None => f.write_str(": called off"),
                }
            }
            Self::Quorum(true) => f.write_str("ready"),
            Self::Quorum(false) => f.write_str("not ready"),
            Self::TookOver => f.write_str("this master has taken over"),
            Self::Upgraded => f.write_str("a new master has taken over"),
            Self::UpgradeFailed { reason } => write!(f, "the new master failed: {reason}"),
        }
    }
}
