//! What a pool tells systemd.

use std::cell::Cell;
use std::rc::Rc;

use cluster::{Master, Result, systemd};

use super::Pool;
use super::event::PoolEvent;

impl Pool {
    /// Tells systemd how the pool is: that it is ready when it has a
    /// [quorum](super::PoolOptions::quorum()), that it reloads, that it stops; and feeds the watchdog, if
    /// there is one, as long as there is a quorum, four times in its time.
    ///
    /// Node has no counterpart. Call it before the loop turns. When it has [taken over](Self::upgrade), a new
    /// master says that it is the main process: `NotifyAccess=all` allows it to. Nothing happens if systemd
    /// has not started this process. What cannot be sent later on is left out.
    ///
    /// # Errors
    ///
    /// As [`systemd::watchdog`] and [`systemd::notify`].
    ///
    /// ```no_run
    /// # fn f(pool: &cluster::pool::Pool, master: &cluster::Master) -> cluster::Result<()> {
    /// pool.tell_systemd(master)?;
    /// # Ok(()) }
    /// ```
    pub fn tell_systemd(&self, master: &Master) -> Result<()> {
        let watchdog = systemd::watchdog()?;
        if !systemd::status("starting")? {
            return Ok(());
        }
        let is_fed = Rc::new(Cell::new(false));
        let feeds = Rc::clone(&is_fed);
        if let Some(time) = watchdog {
            let feed = master.set_interval(time / 4, move |_| {
                if feeds.get() {
                    let _ = systemd::notify("WATCHDOG=1");
                }
            });
            // The pool keeps the loop going.
            master.unref(feed);
        }
        self.on_event(move |pool, master, event| {
            let reload_ends = matches!(
                event,
                PoolEvent::Reloaded { .. } | PoolEvent::ReloadFailed { .. }
            );
            let begins = matches!(event, PoolEvent::Quorum(true) | PoolEvent::TookOver);
            // As long as there is a predecessor, that one is the service. It is again if this one fails.
            let is_ready = pool.has_quorum() && pool.0.predecessor.borrow().is_none();
            is_fed.set(is_ready);
            let sent = if is_ready && (begins || reload_ends) {
                ready()
            } else if matches!(event, PoolEvent::Reloading { .. }) {
                systemd::reloading()
            // Of a service that has a new main process, this would be the end.
            } else if *event == PoolEvent::Quorum(false)
                && pool.is_stopping()
                && !pool.0.core.borrow().has_successor()
            {
                systemd::notify("STOPPING=1")
            } else {
                Ok(false)
            };
            // It may not listen at this moment, and there is nobody else to tell.
            drop(sent);
            let status = pool.status(master);
            let (ready, slots) = (status.ready_workers(), status.slots.len());
            let _ = systemd::status(&format!("{ready} of {slots} workers are ready; {event}"));
        });
        Ok(())
    }
}

fn ready() -> Result<bool> {
    // Fed, too: until the next time there may be none to feed it.
    let own = std::process::id();
    systemd::notify(&format!("READY=1\nMAINPID={own}\nWATCHDOG=1"))
}
