//! Notifications from a pool to systemd.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::rc::Rc;
use std::time::Duration;

use cluster::{Error, Master, Result, systemd};

use super::Pool;
use super::event::PoolEvent;

pub(super) const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// The pause before the pool tries again to send a state after systemd's queue was full.
///
/// A shorter pause costs more attempts while systemd is busy. With a longer pause, systemd learns
/// the service's state later. The value is an estimate without a benchmark.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// The maximum number of states that wait for space in systemd's queue. If one more state is added,
/// the oldest is dropped. A reload adds two states, so 16 states are 8 reloads. A larger number
/// only keeps more states that are outdated when systemd receives them.
const MAX_WAITING: usize = 16;

impl Pool {
    /// Keeps systemd informed of the pool's state and feeds the watchdog.
    ///
    /// The pool reports that the service is ready when it has a
    /// [quorum](super::PoolOptions::quorum). Reloads, the pool's stop and a status line are also
    /// reported. If systemd's watchdog is enabled, the pool feeds the watchdog four times per
    /// timeout while the pool has a quorum, and while it stops.
    ///
    /// After an [upgrade](Self::upgrade), the old master reports that the new master is now the
    /// main process. `NotifyAccess=main`, the default for `Type=notify`, is therefore enough.
    ///
    /// Node has no counterpart.
    ///
    /// Call this method after [`adopt`](Self::adopt) and before the loop runs. If `NOTIFY_SOCKET`
    /// is not set, the method only checks the variables of the watchdog. The pool never waits for
    /// systemd. If systemd cannot be notified, the pool emits [`PoolEvent::NotificationFailed`] and
    /// continues. If systemd's queue is full, the pool drops status lines and watchdog
    /// notifications, and sends the service's state again later.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`systemd::watchdog`].
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) -> cluster::Result<()> {
    /// pool.notify_systemd(master)?;
    /// # Ok(()) }
    /// ```
    pub fn notify_systemd(&self, master: &Master) -> Result<()> {
        let watchdog_timeout = systemd::watchdog()?;
        if std::env::var_os(NOTIFY_SOCKET).is_none() {
            return Ok(());
        }
        let notifier = Rc::new(Notifier::default());
        if self.is_main_process() {
            notifier.send_if_possible(self, master, || systemd::status("starting"));
        }
        if let Some(timeout) = watchdog_timeout {
            let (pool, notifier) = (self.clone(), Rc::clone(&notifier));
            let timer = master.set_interval(timeout / 4, move |master| {
                if notifier.feeds_watchdog.get() {
                    notifier.send_if_possible(&pool, master, || systemd::notify("WATCHDOG=1"));
                }
            });
            // Unreference the timer, because the watchdog must not keep the loop running after the
            // pool has stopped.
            master.unreference(timer);
        }
        self.on_event(move |pool, master, event| {
            if matches!(event, PoolEvent::NotificationFailed { .. }) {
                return;
            }
            let is_healthy = pool.has_quorum() || pool.is_stopping();
            notifier
                .feeds_watchdog
                .set(pool.is_main_process() && is_healthy);
            if let Some(state) = pool.state_after(event, notifier.last.get()) {
                notifier.send(pool, master, state);
            }
            if pool.is_main_process() {
                let status = pool.status(master);
                let (ready, slots) = (status.ready_workers(), status.slots.len());
                let text = format!("{ready} of {slots} workers are ready; {event}");
                notifier.send_if_possible(pool, master, || systemd::status(&text));
            }
        });
        Ok(())
    }

    /// Returns whether this process is the service's main process. In an upgrade, the old master is
    /// the main process until the new master has taken over.
    fn is_main_process(&self) -> bool {
        self.0.old_master.borrow().is_none() && !self.0.core.borrow().is_upgraded()
    }

    /// Returns the state to report for this event, or `None` if the event does not change the
    /// state. `last` is the state that was reported last.
    fn state_after(&self, event: &PoolEvent, last: Option<State>) -> Option<State> {
        if *event == PoolEvent::Upgraded {
            // Report the new master's state, because with `NotifyAccess=main` systemd ignores the
            // new master's own report if it arrives before this one.
            return self.new_main_process().map(|pid| State::Ready { pid });
        }
        if !self.is_main_process() {
            return None;
        }
        if self.is_stopping() {
            return (last != Some(State::Stopping)).then_some(State::Stopping);
        }
        let begins_or_reloaded = matches!(
            event,
            PoolEvent::QuorumReached
                | PoolEvent::TookOver
                | PoolEvent::Reloaded { .. }
                | PoolEvent::ReloadFailed { .. }
        );
        if begins_or_reloaded && self.has_quorum() {
            let pid = std::process::id();
            return Some(State::Ready { pid });
        }
        matches!(event, PoolEvent::Reloading { .. }).then_some(State::Reloading)
    }
}

/// A state of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The service is ready, and its main process has this process id.
    Ready {
        pid: u32,
    },
    Reloading,
    Stopping,
}

impl State {
    fn send(self) -> Result<bool> {
        match self {
            // Also feed the watchdog, because the watchdog timeout may expire before the timer's
            // next tick.
            Self::Ready { pid } => systemd::notify(&format!("READY=1\nMAINPID={pid}\nWATCHDOG=1")),
            Self::Reloading => systemd::reloading(),
            Self::Stopping => systemd::notify("STOPPING=1"),
        }
    }
}

/// Sends a pool's notifications, and keeps states while systemd's queue is full.
#[derive(Debug, Default)]
struct Notifier {
    /// The states that wait for space in systemd's queue, oldest first.
    waiting: RefCell<VecDeque<State>>,
    /// The state that was added to `waiting` last.
    last: Cell<Option<State>>,
    /// Whether this process was the service's main process, and had a quorum or was stopping, at the
    /// last event. The timer feeds the watchdog only while this is `true`, and therefore never
    /// before READY=1 is due. A stopping pool has its own deadline, which may be later than the
    /// watchdog timeout.
    feeds_watchdog: Cell<bool>,
    /// Whether the last attempt failed.
    has_failed: Cell<bool>,
}

impl Notifier {
    /// Sends a state, or queues it behind states that are already waiting.
    fn send(self: &Rc<Self>, pool: &Pool, master: &Master, state: State) {
        let mut waiting = self.waiting.borrow_mut();
        let is_first = waiting.is_empty();
        if waiting.len() == MAX_WAITING {
            waiting.pop_front();
        }
        waiting.push_back(state);
        self.last.set(Some(state));
        drop(waiting);
        if is_first {
            self.send_waiting(pool, master);
        }
    }

    fn send_waiting(self: &Rc<Self>, pool: &Pool, master: &Master) {
        loop {
            let next = self.waiting.borrow().front().copied();
            let Some(state) = next else {
                return;
            };
            let sent = state.send();
            let is_full = matches!(&sent, Err(Error::Io { reason, .. }) if reason.kind() == ErrorKind::WouldBlock);
            self.record(pool, master, sent);
            if is_full {
                let (notifier, pool) = (Rc::clone(self), pool.clone());
                let retry = move |master: &Master| notifier.send_waiting(&pool, master);
                let timer = master.set_timeout(RETRY_PAUSE, retry);
                // Unreference the timer. A receiver that never reads would otherwise keep the loop
                // running forever.
                return master.unreference(timer);
            }
            self.waiting.borrow_mut().pop_front();
        }
    }

    /// Sends a notification, unless states are waiting. If the notification cannot be sent, it is
    /// dropped.
    fn send_if_possible(&self, pool: &Pool, master: &Master, send: impl FnOnce() -> Result<bool>) {
        if self.waiting.borrow().is_empty() {
            self.record(pool, master, send());
        }
    }

    /// Records the result of a notification. Emits an event if it failed and the previous
    /// notification did not.
    fn record(&self, pool: &Pool, master: &Master, sent: Result<bool>) {
        let had_failed = self.has_failed.replace(sent.is_err());
        if let Err(error) = sent {
            if !had_failed {
                let reason = error.to_string();
                pool.emit(master, PoolEvent::NotificationFailed { reason });
            }
        }
    }
}
