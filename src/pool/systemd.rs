//! Notifications from a pool to systemd.

use std::cell::Cell;
use std::rc::Rc;

use cluster::{Master, Result, systemd};

use super::Pool;
use super::event::PoolEvent;

impl Pool {
    /// Keeps systemd informed of the pool's state and feeds the watchdog.
    ///
    /// The pool reports that the service is ready when it has a
    /// [quorum](super::PoolOptions::quorum). Reloads, the pool's stop and a status line are also
    /// reported. If systemd's watchdog is enabled, the pool feeds the watchdog four times per
    /// timeout while the pool has a quorum.
    ///
    /// After an [upgrade](Self::upgrade), the new master reports that it is now the main process.
    /// Set `NotifyAccess=all` in the unit file, because systemd otherwise ignores this report.
    ///
    /// Node has no counterpart.
    ///
    /// Call this method before the loop runs. If `NOTIFY_SOCKET` is not set, nothing happens. A
    /// later notification is dropped if it cannot be sent.
    ///
    /// # Errors
    ///
    /// Returns the same errors as [`systemd::watchdog`] and [`systemd::notify`].
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) -> cluster::Result<()> {
    /// pool.notify_systemd(master)?;
    /// # Ok(()) }
    /// ```
    pub fn notify_systemd(&self, master: &Master) -> Result<()> {
        let watchdog_timeout = systemd::watchdog()?;
        if !systemd::status("starting")? {
            return Ok(());
        }
        let is_ready = Rc::new(Cell::new(false));
        if let Some(timeout) = watchdog_timeout {
            let is_ready = Rc::clone(&is_ready);
            let timer = master.set_interval(timeout / 4, move |_| {
                if is_ready.get() {
                    let _ = systemd::notify("WATCHDOG=1");
                }
            });
            // Unreference the timer, because the watchdog must not keep the loop running after the
            // pool has stopped.
            master.unreference(timer);
        }
        self.on_event(move |pool, master, event| {
            is_ready.set(pool.is_ready_service());
            // Ignore errors, such as a full socket queue, because nothing can report them.
            let _ = pool.notify_of_event(event);
            let status = pool.status(master);
            let (ready, slots) = (status.ready_workers(), status.slots.len());
            let _ = systemd::status(&format!("{ready} of {slots} workers are ready; {event}"));
        });
        Ok(())
    }

    /// Returns whether this process is the service's main process and is ready. In an upgrade, the
    /// old master is the main process until the new one has taken over.
    fn is_ready_service(&self) -> bool {
        self.has_quorum() && self.0.old_master.borrow().is_none()
    }

    fn notify_of_event(&self, event: &PoolEvent) -> Result<bool> {
        let begins_or_reloaded = matches!(
            event,
            PoolEvent::QuorumReached
                | PoolEvent::TookOver
                | PoolEvent::Reloaded { .. }
                | PoolEvent::ReloadFailed { .. }
        );
        if begins_or_reloaded && self.is_ready_service() {
            let pid = std::process::id();
            // Also feed the watchdog, because the watchdog timeout may expire before the timer's
            // next tick.
            return systemd::notify(&format!("READY=1\nMAINPID={pid}\nWATCHDOG=1"));
        }
        if matches!(event, PoolEvent::Reloading { .. }) {
            return systemd::reloading();
        }
        // Do not send STOPPING=1 after an upgrade, because it would end the service, whose main
        // process is now the new master.
        let stops = self.is_stopping() && !self.0.core.borrow().is_upgraded();
        if stops && *event == PoolEvent::QuorumLost {
            return systemd::notify("STOPPING=1");
        }
        Ok(false)
    }
}
