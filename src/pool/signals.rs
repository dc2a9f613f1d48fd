//! What the operator's signals do to a pool.

use cluster::{CallbackId, Master, Result, Signal, Worker};

use super::Pool;
use super::event::PoolEvent;

/// What a signal makes a pool do, for [`Pool::on_signal`], which has an example.
///
/// Node has no counterpart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// [`Pool::stop`], and at the second time [`Pool::stop_at_once`].
    Stop,
    /// [`Pool::stop_at_once`].
    StopAtOnce,
    /// [`Pool::reload`].
    Reload,
    /// [`Pool::upgrade`]; if that cannot even begin, [`PoolEvent::UpgradeFailed`] says why.
    Upgrade,
    /// One slot more.
    Grow,
    /// One slot fewer; the last one stays.
    Shrink,
}

/// What each signal does by custom.
const USUAL: [(Signal, Action); 7] = [
    (Signal::TERM, Action::Stop),
    (Signal::INT, Action::Stop),
    (Signal::QUIT, Action::StopAtOnce),
    (Signal::HUP, Action::Reload),
    (Signal::USR2, Action::Upgrade),
    (Signal::TTIN, Action::Grow),
    (Signal::TTOU, Action::Shrink),
];

impl Pool {
    /// Gives the signals the meaning that they have by custom: TERM and INT stop the pool, and at once
    /// when one comes for the second time; QUIT stops it at once; HUP reloads; USR2 upgrades; TTIN and TTOU make it one
    /// slot larger and smaller.
    ///
    /// Node has no counterpart. The callbacks run beside others for the same signal; whoever wants
    /// another meaning for one of them calls [`on_signal`](Self::on_signal) for each instead.
    ///
    /// # Errors
    ///
    /// As [`Master::on_signal`].
    ///
    /// See the [module](super) for an example.
    pub fn on_usual_signals(&self, master: &Master) -> Result<()> {
        for (signal, action) in USUAL {
            self.on_signal(master, signal, action)?;
        }
        Ok(())
    }

    /// Makes the pool do something when a signal comes.
    ///
    /// Node has no counterpart. The callback can be removed with [`Master::off`].
    ///
    /// # Errors
    ///
    /// As [`Master::on_signal`].
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::Signal;
    /// use cluster::pool::Action;
    ///
    /// pool.on_signal(master, Signal::USR1, Action::Reload)?;
    /// # Ok(()) }
    /// ```
    pub fn on_signal(&self, master: &Master, signal: Signal, action: Action) -> Result<CallbackId> {
        let pool = self.clone();
        master.on_signal(signal, move |master, _| pool.act_on(master, action))
    }

    fn act_on(&self, master: &Master, action: Action) {
        match action {
            Action::Stop if self.is_stopping() => self.stop_at_once(master),
            Action::Stop => self.stop(master),
            Action::StopAtOnce => self.stop_at_once(master),
            Action::Reload => self.reload(master),
            Action::Upgrade => {
                if let Err(error) = self.upgrade(master) {
                    let reason = error.to_string();
                    self.tell(master, PoolEvent::UpgradeFailed { reason });
                }
            }
            Action::Grow => self.scale(master, self.slots() + 1),
            Action::Shrink if self.slots() > 1 => self.scale(master, self.slots() - 1),
            Action::Shrink => {}
        }
    }
}

/// Makes a worker ignore the signals that a terminal sends to everybody, and that a pool has a meaning
/// for: the master tells it when to leave.
///
/// Node has no counterpart. For a worker, which calls it before it serves.
///
/// # Errors
///
/// As [`Worker::on_signal`].
///
/// See the [module](super) for an example.
pub fn leave_signals_to_master(worker: &Worker) -> Result<()> {
    for (signal, _) in USUAL {
        worker.on_signal(signal, |_, _| {})?;
    }
    Ok(())
}
