//! Detached processes: children of the master without a channel.
//!
//! A detached process is not a worker, and the table of workers does not contain it. Calls that
//! concern all workers do not affect detached processes.

use std::process::ExitStatus;

use super::MasterCore;
use crate::core::master::event::{Event, Level};
use crate::types::worker_id::WorkerId;

#[derive(Debug)]
pub(super) struct DetachedEntry {
    pub(super) state: Detached,
    /// The number of delivered errors, at most `LATE_ERRORS_MAX`.
    pub(super) late_errors: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Detached {
    /// The process runs, and [`run`](crate::Master::run) may return before its exit.
    Unreferenced,
    /// The process runs, and [`run`](crate::Master::run) waits for its exit.
    Referenced,
    Exited(ExitStatus),
}

impl Detached {
    pub(super) fn status(self) -> Option<ExitStatus> {
        match self {
            Self::Unreferenced | Self::Referenced => None,
            Self::Exited(status) => Some(status),
        }
    }
}

impl DetachedEntry {
    /// Sets whether [`run`](crate::Master::run) waits for the process's exit, and returns the
    /// previous setting.
    ///
    /// Returns `None` if the process has already exited.
    pub(super) fn reference(&mut self, referenced: bool) -> Option<bool> {
        let was_referenced = match self.state {
            Detached::Unreferenced => false,
            Detached::Referenced => true,
            Detached::Exited(_) => return None,
        };
        self.state = match referenced {
            true => Detached::Referenced,
            false => Detached::Unreferenced,
        };
        Some(was_referenced)
    }
}

impl<C, F> MasterCore<C, F> {
    /// Records that a detached process has been started with the id that `next_worker_id` returned.
    /// No worker uses this id.
    pub(crate) fn detached(&mut self, process: WorkerId) {
        self.last_worker = process.get();
        let entry = DetachedEntry {
            state: Detached::Unreferenced,
            late_errors: 0,
        };
        self.detached.insert(process, entry);
    }

    pub(super) fn detached_exited(&mut self, process: WorkerId, status: ExitStatus) {
        if self.is_running(process) {
            self.reference(process, false);
            if let Some(entry) = self.detached.get_mut(&process) {
                entry.state = Detached::Exited(status);
            }
            self.emit(Level::Worker, Some(process), Event::DetachedExit(status));
        }
    }
}
