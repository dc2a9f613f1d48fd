//! Reaps orphans: children that the process has not started but adopted, because their parent has
//! exited.

use std::time::Duration;

use crate::error::Error;
use crate::master::Master;
use crate::sys::process::Pid;

/// The time that an exited child stays available to the application before the master reaps it.
///
/// With a shorter time, an application whose threads wait for their own children late would lose
/// their status. With a longer time, more zombies exist while many orphans exit. No benchmark chose
/// the value.
const GRACE: Duration = Duration::from_secs(1);

/// Whether the master reaps orphans, and which of them have exited.
#[derive(Debug, Default)]
pub(super) enum Orphans {
    /// The master does not reap orphans.
    #[default]
    Ignored,
    /// No child had exited at the last check. The next SIGCHLD triggers another check.
    Watched,
    /// These children had exited at the last check. A timer triggers the next check.
    Exited(Vec<Pid>),
}

impl Master {
    /// Reaps exited children of this process that are not the master's, one to two seconds after
    /// their exit.
    ///
    /// Node has no counterpart.
    ///
    /// If a process exits before its children, the kernel makes them children of process 1, or of
    /// the nearest ancestor that is a subreaper (`PR_SET_CHILD_SUBREAPER`). If that ancestor does
    /// not wait for them, each of them stays a zombie and occupies a process id. A
    /// [`Pool`](crate::pool::Pool) that is process 1, for example in a container, makes this call
    /// itself. An application that is a subreaper makes it after it has become one.
    ///
    /// The master cannot tell orphans from children that the application has started itself. The
    /// application must therefore wait for its own children within one second after their exit, or
    /// not make this call. Without orphans, the master does not wake up. The call cannot be undone.
    ///
    /// The master finds exited children in `/proc`. Without it, the master finds only one child per
    /// second. If SIGCHLD cannot be handled, an [`error`](Self::on_error) event reports the reason.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// if std::process::id() == 1 {
    ///     master.reap_orphans();
    /// }
    /// # }
    /// ```
    pub fn reap_orphans(&self) {
        if let Err(reason) = self.watch_children() {
            let attempt = "handle SIGCHLD";
            let error = Error::Io { attempt, reason };
            return self.shell.core.borrow_mut().error(None, error);
        }
        let is_ignored = matches!(*self.orphans.borrow(), Orphans::Ignored);
        if is_ignored {
            self.await_orphans(self.shell.exited_orphans());
        }
    }

    /// Checks for exited orphans after SIGCHLD.
    pub(super) fn check_orphans(&self) {
        let is_watched = matches!(*self.orphans.borrow(), Orphans::Watched);
        if is_watched {
            self.await_orphans(self.shell.exited_orphans());
        }
    }

    fn await_orphans(&self, exited: Vec<Pid>) {
        if exited.is_empty() {
            self.orphans.replace(Orphans::Watched);
            return;
        }
        self.orphans.replace(Orphans::Exited(exited));
        let timer = self.set_timeout(GRACE, Self::reap_exited_orphans);
        self.unreference(timer);
    }

    /// Reaps the orphans that had already exited at the last check, and waits for those that have
    /// exited since.
    fn reap_exited_orphans(&self) {
        let Orphans::Exited(earlier) = self.orphans.take() else {
            return;
        };
        let exited = self.shell.exited_orphans().into_iter();
        exited
            .filter(|pid| earlier.contains(pid))
            .for_each(Pid::reap);
        self.await_orphans(self.shell.exited_orphans());
    }
}
