//! Detached processes: children of the master without a channel.
//!
//! A detached process is not a worker, and it is not in the table of workers. Decisions about all workers
//! do not concern it.

use std::process::ExitStatus;

use super::MasterCore;
use crate::core::event::{Event, Level};
use crate::types::worker_id::WorkerId;

#[derive(Debug)]
pub(super) struct DetachedEntry {
    pub(super) state: Detached,
    /// The number of delivered errors, at most `LATE_ERRORS_MAX`.
    pub(super) late_errors: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Detached {
    /// [`run`](crate::Master::run) may return before it exits.
    Unreferenced,
    /// [`run`](crate::Master::run) waits for its exit.
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
    /// Sets whether [`run`](crate::Master::run) waits for its exit. Returns whether it did before;
    /// `None` if the process has exited.
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
    /// A detached process has been started with the id of `next_worker_id`, which no worker gets.
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
