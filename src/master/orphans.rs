//! Reaps orphans: children that this process has not started. The kernel gives them to this process
//! when their parent exits.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::error::Error;
use crate::master::Master;
use crate::sys::process::Pid;

/// The time for which the master leaves an exited child to the application before it reaps the
/// child.
///
/// With a shorter time, an application that waits late for its own children loses their exit
/// statuses. With a longer time, more zombies exist while many orphans exit. No benchmark chose the
/// value.
const GRACE: Duration = Duration::from_secs(1);

/// Whether the master reaps orphans, and which of them have exited.
#[derive(Debug, Default)]
pub(super) enum Orphans {
    /// The master does not reap orphans.
    #[default]
    Ignored,
    /// No orphan had exited at the last check. The next SIGCHLD triggers another check.
    Watched,
    /// These orphans had exited at the last check. A timer triggers the next check.
    Exited(BTreeSet<Pid>),
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
        let is_ignored = matches!(*self.orphans.borrow(), Orphans::Ignored);
        if is_ignored {
            self.await_orphans();
        }
    }

    /// Checks for exited orphans after SIGCHLD. Does nothing if the master does not reap orphans,
    /// or if a timer will check anyway.
    pub(super) fn check_orphans(&self) {
        let is_watched = matches!(*self.orphans.borrow(), Orphans::Watched);
        if is_watched {
            self.await_orphans();
        }
    }

    /// Checks for exited orphans. If there are any, schedules the timer that reaps them.
    fn await_orphans(&self) {
        let exited: BTreeSet<_> = self.shell.exited_orphans().into_iter().collect();
        if exited.is_empty() {
            self.orphans.replace(Orphans::Watched);
            return;
        }
        self.orphans.replace(Orphans::Exited(exited));
        let timer = self.set_timeout(GRACE, Self::reap_exited_orphans);
        self.unreference(timer);
    }

    /// Reaps the orphans that had already exited at the last check. Orphans that have exited since
    /// then are reaped by the next timer.
    fn reap_exited_orphans(&self) {
        let Orphans::Exited(earlier) = self.orphans.take() else {
            return;
        };
        let exited = self.shell.exited_orphans().into_iter();
        exited
            .filter(|pid| earlier.contains(pid))
            .for_each(Pid::reap);
        self.await_orphans();
    }
}
