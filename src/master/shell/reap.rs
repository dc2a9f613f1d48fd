//! Reaps processes that have exited, and lists the workers whose exit the system may not report.

use super::group::Reap;
use super::{MasterShell, WorkerIo};
use crate::error::Error;
use crate::sys;
use crate::sys::poll::Interest;
use crate::sys::process::{ChildState, Exit, Pid, exited_children};
use crate::types::ordered_set::OrderedSet;
use crate::types::worker_id::WorkerId;

impl MasterShell {
    /// Reaps a worker's process if it has exited.
    pub(crate) fn try_reap(&self, worker: WorkerId) {
        // Send pending signals first, because the process id may belong to another process once
        // this one is reaped.
        self.act();
        let Some(worker_io) = self.worker_io(worker) else {
            return;
        };
        let is_reaped = self.core.borrow().exit_status(worker).is_some();
        if is_reaped || worker_io.exit_report.get().is_some() {
            return;
        }
        if self.settle_group(&worker_io) == Reap::Later {
            return;
        }
        let process = worker_io.process.borrow();
        let waited = worker_io.pid.try_wait(process.as_deref());
        drop(process);
        let end = match waited {
            Ok(None) => return self.reap_later(&worker_io),
            Ok(Some(end)) => end,
            Err(reason) => {
                let error = Error::ExitStatus { worker, reason };
                self.core.borrow_mut().error(Some(worker), error);
                Exit::unknown()
            }
        };
        drop(worker_io.process.take());
        self.sigchld_only.borrow_mut().remove(worker);
        worker_io.usage.set(end.usage);
        self.core_now().exited(worker, end.status);
    }

    /// Returns whether a worker's process is known to be running.
    pub(crate) fn is_running(&self, worker_io: &WorkerIo) -> bool {
        let process = worker_io.process.borrow();
        worker_io.pid.child_state(process.as_deref()) == ChildState::Running
    }

    /// Stops watching a process that cannot be reaped yet, and schedules a retry. The descriptor of
    /// an exited process stays readable until the process is reaped, so the loop would spin.
    pub(super) fn reap_later(&self, worker_io: &WorkerIo) {
        let process = worker_io.process.borrow();
        let Some(process) = process.as_ref().filter(|process| process.is_watched()) else {
            return;
        };
        // The call cannot fail, because the descriptor is registered with the poller.
        let _ = process.set_interest(None);
        self.retry_process(worker_io.id);
    }

    /// Watches the process descriptor again, if there is one, so that the loop reaps the process.
    /// If watching fails, reports the error and schedules a retry.
    pub(super) fn watch_exit(&self, worker: WorkerId) {
        let Some(worker_io) = self.worker_io(worker) else {
            return;
        };
        let process = worker_io.process.borrow();
        let watched = process
            .as_ref()
            .map(|process| process.set_interest(Some(Interest::Readable)));
        if let Some(Err(reason)) = watched {
            let attempt = "wait for the exit of a worker";
            let error = Error::Io { attempt, reason };
            self.core.borrow_mut().error(Some(worker), error);
            self.retry_process(worker);
        }
    }

    fn retry_process(&self, worker: WorkerId) {
        let mut retries = self.retries.borrow_mut();
        retries.processes.push(worker);
        retries.backoff.start(self.start.elapsed());
    }

    /// Returns whether the master may miss the exit of a worker. The result is true if the channel
    /// of any worker is closed, only SIGCHLD would report that worker's exit, and another handler
    /// has replaced this crate's handler.
    pub(crate) fn may_miss_exits(&self) -> bool {
        !self.sigchld_only.borrow().is_empty() && !sys::signal::is_handled(sys::signal::CHLD)
    }

    /// Returns the workers without a channel whose exits only SIGCHLD reports.
    pub(crate) fn sigchld_only(&self) -> Vec<WorkerId> {
        self.sigchld_only.borrow().iter().collect()
    }

    /// Returns the exited children of this process that the master has not started.
    pub(crate) fn exited_orphans(&self) -> Vec<Pid> {
        let workers = self.workers.borrow();
        let own: OrderedSet<_> = workers.values().map(|worker_io| worker_io.pid).collect();
        exited_children(|child| own.contains(child) || self.unreaped.contains(child))
    }

    /// Returns the workers without a process descriptor.
    pub(crate) fn without_pidfd(&self) -> Vec<WorkerId> {
        let workers = self.workers.borrow();
        let without_pidfd = workers
            .values()
            .filter(|worker_io| worker_io.process.borrow().is_none());
        without_pidfd.map(|worker_io| worker_io.id).collect()
    }
}
