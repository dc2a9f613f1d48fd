//! The signals by which an operator controls a pool.

use cluster::{CallbackId, Master, Result, Signal, Worker};

use super::Pool;
use super::event::{PoolEvent, UpgradeFailure};

/// The effect of a signal on a pool, for [`Pool::on_signal`], which has an example.
///
/// Node has no counterpart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SignalAction {
    /// [`Pool::stop`]; [`Pool::stop_at_once`] if the pool is already stopping.
    Stop,
    /// [`Pool::stop_at_once`].
    StopAtOnce,
    /// [`Pool::reload`].
    Reload,
    /// [`Pool::upgrade`]. If the new master cannot be started, [`PoolEvent::UpgradeFailed`] gives the
    /// reason.
    Upgrade,
    /// Adds a slot.
    Grow,
    /// Removes the last slot, unless it is the only one.
    Shrink,
}

/// The default effects of signals. They are gunicorn's, except that the first SIGINT drains the pool.
const DEFAULTS: [(Signal, SignalAction); 7] = [
    (Signal::TERM, SignalAction::Stop),
    (Signal::INT, SignalAction::Stop),
    (Signal::QUIT, SignalAction::StopAtOnce),
    (Signal::HUP, SignalAction::Reload),
    (Signal::USR2, SignalAction::Upgrade),
    (Signal::TTIN, SignalAction::Grow),
    (Signal::TTOU, SignalAction::Shrink),
];

impl Pool {
    /// Gives signals their default effects on the pool, which are similar to gunicorn's.
    ///
    /// SIGTERM and SIGINT stop the pool; the second one stops it at once. SIGQUIT stops it at once,
    /// SIGHUP reloads it, and SIGUSR2 upgrades it. SIGTTIN adds a slot, and SIGTTOU removes one.
    ///
    /// Node has no counterpart.
    ///
    /// Other callbacks for the same signals are called, too. To give one of these signals another
    /// effect, call [`on_signal`](Self::on_signal) for each signal instead. The callbacks can be
    /// removed with [`Master::remove_callback`].
    ///
    /// # Errors
    ///
    /// As [`Master::on_signal`].
    ///
    /// See the [module](super) for an example.
    pub fn on_default_signals(&self, master: &Master) -> Result<Vec<CallbackId>> {
        let signals = DEFAULTS.into_iter();
        let ids = signals.map(|(signal, action)| self.on_signal(master, signal, action));
        ids.collect()
    }

    /// Gives a signal an effect on the pool.
    ///
    /// Node has no counterpart.
    ///
    /// The callback can be removed with [`Master::remove_callback`].
    ///
    /// # Errors
    ///
    /// As [`Master::on_signal`].
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) -> cluster::Result<()> {
    /// use cluster::Signal;
    /// use cluster::pool::SignalAction;
    ///
    /// pool.on_signal(master, Signal::USR1, SignalAction::Reload)?;
    /// # Ok(()) }
    /// ```
    pub fn on_signal(
        &self,
        master: &Master,
        signal: Signal,
        action: SignalAction,
    ) -> Result<CallbackId> {
        let pool = self.clone();
        master.on_signal(signal, move |master, _| {
            pool.signal_received(master, action);
        })
    }

    fn signal_received(&self, master: &Master, action: SignalAction) {
        match action {
            SignalAction::Stop if self.is_stopping() => self.stop_at_once(master),
            SignalAction::Stop => self.stop(master),
            SignalAction::StopAtOnce => self.stop_at_once(master),
            SignalAction::Reload => self.reload(master),
            SignalAction::Upgrade => {
                if let Err(error) = self.upgrade(master) {
                    let reason = UpgradeFailure::NotStarted(error.to_string());
                    self.emit(master, PoolEvent::UpgradeFailed { reason });
                }
            }
            SignalAction::Grow => self.scale(master, self.slots() + 1),
            SignalAction::Shrink if self.slots() > 1 => self.scale(master, self.slots() - 1),
            SignalAction::Shrink => {}
        }
    }
}

/// Makes a worker ignore the signals that control a pool.
///
/// A terminal sends some of them to all processes of the foreground group. The master alone acts on
/// them, and disconnects the workers.
///
/// Node has no counterpart.
///
/// A worker calls it before it serves.
///
/// # Errors
///
/// As [`Worker::on_signal`].
///
/// See the [module](super) for an example.
pub fn ignore_pool_signals(worker: &Worker) -> Result<()> {
    for (signal, _) in DEFAULTS {
        worker.on_signal(signal, |_, _| {})?;
    }
    Ok(())
}
