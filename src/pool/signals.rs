//! The signals with which an operator controls a pool.

use cluster::{CallbackId, Error, Master, Result, Signal, Worker};

use super::Pool;
use super::core::Core;
use super::event::{PoolEvent, UpgradeFailure};

/// The effect of a signal on a pool. See [`Pool::on_signal`] for an example.
///
/// Node has no counterpart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SignalAction {
    /// Calls [`Pool::stop`], or [`Pool::stop_at_once`] if the workers have been disconnecting for
    /// at least one second. Has no effect if the pool stops because a new master has taken over.
    Stop,
    /// Calls [`Pool::stop_at_once`].
    StopAtOnce,
    /// Calls [`Pool::reload`].
    Reload,
    /// Calls [`Pool::upgrade`]. If the new master cannot be started, [`PoolEvent::UpgradeFailed`]
    /// contains the reason.
    Upgrade,
    /// Adds a slot to the pool.
    Grow,
    /// Removes the pool's last slot, unless it is the only slot.
    Shrink,
}

/// The actions that [`Pool::on_default_signals`] assigns. In gunicorn, the signals have similar
/// effects, but SIGINT stops the workers at once.
const DEFAULTS: [(Signal, SignalAction); 7] = [
    (Signal::TERM, SignalAction::Stop),
    (Signal::INT, SignalAction::Stop),
    (Signal::QUIT, SignalAction::StopAtOnce),
    (Signal::HUP, SignalAction::Reload),
    (Signal::USR2, SignalAction::Upgrade),
    (Signal::TTIN, SignalAction::Grow),
    (Signal::TTOU, SignalAction::Shrink),
];

/// The signals that [`Pool::on_default_signals`] leaves ignored if the process was started with
/// them ignored. The kernel sends these signals without an operator's request, for example when the
/// terminal is closed. The other default signals come only from an operator or a service manager.
/// The pool must handle them even if a shell script has started the process in the background, with
/// SIGINT and SIGQUIT ignored.
const LEFT_IGNORED: [Signal; 3] = [Signal::HUP, Signal::TTIN, Signal::TTOU];

impl Pool {
    /// Assigns [actions](SignalAction) to seven signals. The actions resemble gunicorn's.
    ///
    /// - SIGTERM and SIGINT call [`stop`](Self::stop). A second signal ends the
    ///   [`stop_delay`](super::PoolOptions::stop_delay), if there is one. The next signal, or the
    ///   second one without a delay, calls [`stop_at_once`](Self::stop_at_once). A signal has no
    ///   effect less than one second after the previous step, because one Ctrl-C may arrive twice:
    ///   from the terminal, and from a parent that forwards it. The signals also have no effect if
    ///   the pool stops because a new master has taken over.
    /// - SIGQUIT calls [`stop_at_once`](Self::stop_at_once).
    /// - SIGHUP calls [`reload`](Self::reload).
    /// - SIGUSR2 calls [`upgrade`](Self::upgrade).
    /// - SIGTTIN adds a slot.
    /// - SIGTTOU removes the last slot, unless it is the only slot.
    ///
    /// Node has no counterpart.
    ///
    /// If the process was started with SIGHUP, SIGTTIN or SIGTTOU ignored, that signal stays
    /// ignored ([`Master::is_signal_ignored`]). Under nohup(1), the pool therefore does not reload
    /// when its terminal is closed. To reload at SIGHUP even then, call
    /// [`on_signal`](Self::on_signal).
    ///
    /// Other callbacks for these signals are still called. To change a signal's effect, call
    /// [`on_signal`](Self::on_signal) for each signal instead of this method. Use
    /// [`Master::remove_callback`] to remove the callbacks.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`Master::on_signal`].
    ///
    /// See the [module](super) for an example.
    pub fn on_default_signals(&self, master: &Master) -> Result<Vec<CallbackId>> {
        let stays_ignored =
            |signal: Signal| LEFT_IGNORED.contains(&signal) && master.is_signal_ignored(signal);
        let signals = DEFAULTS
            .into_iter()
            .filter(|(signal, _)| !stays_ignored(*signal));
        let ids = signals.map(|(signal, action)| self.on_signal(master, signal, action));
        ids.collect()
    }

    /// Assigns an effect on the pool to a signal.
    ///
    /// Node has no counterpart.
    ///
    /// Use [`Master::remove_callback`] to remove the callback.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`Master::on_signal`].
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
            SignalAction::Stop => self.input(master, Core::stop_signal_received),
            SignalAction::StopAtOnce => self.stop_at_once(master),
            SignalAction::Reload => self.reload(master),
            SignalAction::Upgrade => {
                if let Err(error) = self.upgrade(master) {
                    let reason = if matches!(error, Error::InitProcess) {
                        UpgradeFailure::InitProcess
                    } else {
                        UpgradeFailure::NotStarted(error.to_string())
                    };
                    self.emit(master, PoolEvent::UpgradeFailed { reason });
                }
            }
            SignalAction::Grow => self.scale(master, self.slots() + 1),
            SignalAction::Shrink if self.slots() > 1 => self.scale(master, self.slots() - 1),
            SignalAction::Shrink => {}
        }
    }
}

/// Makes a worker ignore the signals of [`Pool::on_default_signals`].
///
/// A terminal sends some of these signals to all processes of the foreground group. Only the master
/// may act on these signals, because the master itself disconnects the workers.
///
/// Node has no counterpart.
///
/// Call this function in a worker before the worker serves clients.
///
/// # Errors
///
/// Returns the same errors as [`Worker::on_signal`].
///
/// See the [module](super) for an example.
pub fn ignore_pool_signals(worker: &Worker) -> Result<()> {
    for (signal, _) in DEFAULTS {
        worker.on_signal(signal, |_, _| {})?;
    }
    Ok(())
}
