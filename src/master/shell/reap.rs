//! Reaps processes that have exited, and knows which exits nothing reports.

use super::{MasterShell, WorkerIo};
use crate::error::Error;
use crate::sys;
use crate::sys::poll::Interest;
use crate::sys::process::Exit;
use crate::types::worker_id::WorkerId;

impl MasterShell {
    /// Reaps the process of a worker if it has exited.
    pub(crate) fn try_reap(&self, worker: WorkerId) {
        // Pending signals first: afterwards the number may be that of another process.
        self.act();
        let Some(worker_io) = self.worker_io(worker) else {
            return;
        };
        let is_reaped = self.core.borrow().exit_status(worker).is_some();
        if is_reaped || worker_io.exit_report.get().is_some() {
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
        self.unwatched_exits.borrow_mut().remove(&worker);
        worker_io.usage.set(end.usage);
        self.core_now().exited(worker, end.status);
    }

    /// Backs off from a process that has no status for its parent. If its descriptor is readable, it
    /// stays readable until the process is reaped.
    fn reap_later(&self, worker_io: &WorkerIo) {
        let process = worker_io.process.borrow();
        let Some(process) = process.as_ref().filter(|process| process.is_watched()) else {
            return;
        };
        // The call cannot fail, because the descriptor is in the poller.
        let _ = process.set_interest(None);
        self.retry_process(worker_io.id);
    }

    /// Watches the process again after `reap_later`.
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

    /// Returns whether a worker may exit without any report: its channel is closed, only SIGCHLD would
    /// report the exit, and another handler has replaced the crate's.
    pub(crate) fn has_unwatched_exits(&self) -> bool {
        !self.unwatched_exits.borrow().is_empty() && !sys::signal::is_handled(sys::signal::CHLD)
    }

    /// Returns the workers of `has_unwatched_exits`.
    pub(crate) fn unwatched_exits(&self) -> Vec<WorkerId> {
        self.unwatched_exits.borrow().iter().copied().collect()
    }

    /// Returns the workers without a process descriptor.
    pub(crate) fn unwatched(&self) -> Vec<WorkerId> {
        let workers = self.workers.borrow();
        let unwatched = workers
            .values()
            .filter(|worker_io| worker_io.process.borrow().is_none());
        unwatched.map(|worker_io| worker_io.id).collect()
    }
}
