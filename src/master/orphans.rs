//! Reaps orphans: children that this process has not started. The kernel gives them to this process
//! when their parent exits.

use std::time::Duration;

use crate::error::Error;
use crate::master::Master;
use crate::sys::process::Pid;
use crate::types::ordered_set::OrderedSet;

/// The time for which the master leaves an exited child to the application before it reaps the
/// child.
///
/// With a shorter time, an application that waits late for its own children loses their exit
/// statuses. With a longer time, more zombies exist while many orphans exit. No benchmark chose the
/// value.
const GRACE: Duration = Duration::from_secs(1);

/// The event after which the master next checks for exited orphans.
#[derive(Default)]
pub(super) enum OrphanCheck {
    /// No event. The master does not reap orphans.
    #[default]
    Never,
    /// SIGCHLD, because no orphan had exited at the last check. The function checks. Only this
    /// pointer refers to it, so the linker removes the function from programs that never call
    /// `reap_orphans`.
    AtSignal(fn(&Master)),
    /// A timer, because these orphans had exited at the last check.
    AtTimer(OrderedSet<Pid>),
}

impl Master {
    /// Starts to reap the children of this process that the master has not started, one to two
    /// seconds after they exit.
    ///
    /// Node has no counterpart.
    ///
    /// If a process exits before its children, the kernel makes them children of process 1, or of
    /// the nearest ancestor that is a subreaper (`PR_SET_CHILD_SUBREAPER`). If that ancestor does
    /// not wait for them, each of them stays a zombie and occupies a process id. A
    /// [`Pool`](crate::pool::Pool) that is process 1, for example in a container, calls this method
    /// itself. An application that makes itself a subreaper calls this method afterwards.
    ///
    /// The master cannot distinguish orphans from children that the application has started itself.
    /// An application that calls this method must therefore wait for its own children within one
    /// second after their exit. While no child exits, the master does not wake up. The call cannot
    /// be undone.
    ///
    /// The master finds exited children in `/proc`. Without `/proc`, the master reaps at most one
    /// orphan per second. If SIGCHLD cannot be handled, an [`error`](Self::on_error) event reports
    /// the reason.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// if std::process::id() == 1 {
    ///     master.reap_orphans();
    /// }
    /// # }
    /// ```
    pub fn reap_orphans(&self) {
        if self.event_loop.check_own().is_err() {
            return;
        }
        if let Err(reason) = self.watch_children() {
            let attempt = "handle SIGCHLD";
            let error = Error::Io { attempt, reason };
            return self.shell.core.borrow_mut().error(None, error);
        }
        let has_timer = matches!(*self.orphan_check.borrow(), OrphanCheck::AtTimer(_));
        if !has_timer {
            self.await_orphans();
        }
    }

    /// Checks for exited orphans after SIGCHLD. Does nothing if the master does not reap orphans,
    /// or if a timer will check anyway.
    pub(super) fn check_orphans(&self) {
        let check = match *self.orphan_check.borrow() {
            OrphanCheck::AtSignal(check) => check,
            OrphanCheck::Never | OrphanCheck::AtTimer(_) => return,
        };
        check(self);
    }

    /// Checks for exited orphans. If there are any, schedules the timer that reaps them.
    fn await_orphans(&self) {
        let exited: OrderedSet<_> = self.shell.exited_orphans().into_iter().collect();
        let next = if exited.is_empty() {
            OrphanCheck::AtSignal(Self::await_orphans)
        } else {
            let timer = self.set_timeout(GRACE, Self::reap_exited_orphans);
            self.unreference(timer);
            OrphanCheck::AtTimer(exited)
        };
        self.orphan_check.replace(next);
    }

    /// Reaps the orphans that had already exited at the last check. Orphans that have exited since
    /// then are reaped by the next timer.
    fn reap_exited_orphans(&self) {
        if let OrphanCheck::AtTimer(earlier) = self.orphan_check.take() {
            let exited = self.shell.exited_orphans().into_iter();
            exited
                .filter(|pid| earlier.contains(*pid))
                .for_each(Pid::reap);
        }
        self.await_orphans();
    }
}
