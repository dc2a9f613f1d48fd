//! The notifications of a pool to systemd.

use std::cell::Cell;
use std::rc::Rc;

use cluster::{Master, Result, systemd};

use super::Pool;
use super::event::PoolEvent;

impl Pool {
    /// Notifies systemd of the state of the pool, and feeds the watchdog.
    ///
    /// The service is ready when the pool has a [quorum](super::PoolOptions::quorum). Reloads, the stop and
    /// a status line are sent, too. While there is a quorum, the watchdog is fed four times in its
    /// timeout, if it is enabled. After an [upgrade](Self::upgrade) the new master reports that it is the
    /// main process, which systemd accepts with `NotifyAccess=all`.
    ///
    /// Node has no counterpart.
    ///
    /// Call it before the loop runs. If systemd has not started this process, nothing happens. A
    /// later notification that cannot be sent is dropped.
    ///
    /// # Errors
    ///
    /// As [`systemd::watchdog`] and [`systemd::notify`].
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
            // The watchdog does not keep the loop running; the pool does.
            master.unreference(timer);
        }
        self.on_event(move |pool, master, event| {
            is_ready.set(pool.is_ready_service());
            // The socket's queue may be full, and an error has no other receiver.
            let _ = pool.notify_of_event(event);
            let status = pool.status(master);
            let (ready, slots) = (status.ready_workers(), status.slots.len());
            let _ = systemd::status(&format!("{ready} of {slots} workers are ready; {event}"));
        });
        Ok(())
    }

    /// Whether this master is the service, and is ready. Until it has taken over, the old master is the
    /// service.
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
            // This feeds the watchdog, too: the next tick of the timer may be later than its timeout.
            return systemd::notify(&format!("READY=1\nMAINPID={pid}\nWATCHDOG=1"));
        }
        if matches!(event, PoolEvent::Reloading { .. }) {
            return systemd::reloading();
        }
        // STOPPING=1 would end a service whose main process is the new master.
        let stops = self.is_stopping() && !self.0.core.borrow().is_upgraded();
        if stops && *event == PoolEvent::QuorumLost {
            return systemd::notify("STOPPING=1");
        }
        Ok(false)
    }
}
