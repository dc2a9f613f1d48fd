//! The process groups of workers that do not use this crate.
//!
//! Such a worker may consist of several processes, for example a shell and the server that it has
//! started. The worker's process leads a group, and the others are its members. When the leader
//! has exited, the master kills the members, because they would otherwise serve for ever.
//!
//! If the master has asked the leader to end, the members get the same signal instead, so that they
//! can finish their requests. Each process inherits the worker's end of the channel, so
//! end-of-file tells that the members have exited. Until then the leader is not reaped, because its
//! process id, which is also the id of the group, could otherwise be reused.

use super::{MasterShell, WorkerIo};
use crate::types::signal::Signal;

/// The state of a worker's process group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GroupState {
    /// The worker leads no group.
    None,
    Running,
    /// The leader has been sent this signal, which asks it to end.
    Ending(Signal),
    /// The leader has exited, and the members have been sent the signal, too.
    Draining,
    /// The group has been killed.
    Killed,
}

impl MasterShell {
    /// Records that a worker's process has been sent a signal, and kills its group if the signal is
    /// SIGKILL.
    pub(super) fn leader_signalled(&self, worker_io: &WorkerIo, signal: Signal) {
        match (worker_io.group.get(), signal) {
            (GroupState::None, _) => {}
            (state, Signal::KILL) => {
                self.signal_group(worker_io, Signal::KILL);
                worker_io.group.set(GroupState::Killed);
                if state == GroupState::Draining {
                    self.watch_exit(worker_io.id);
                }
            }
            (GroupState::Running, Signal::TERM | Signal::INT | Signal::QUIT) => {
                worker_io.group.set(GroupState::Ending(signal));
            }
            (GroupState::Draining, _) => self.signal_group(worker_io, signal),
            (GroupState::Running | GroupState::Ending(_) | GroupState::Killed, _) => {}
        }
    }

    /// Ends the group of a worker whose process may have exited. Returns whether the members are
    /// draining, so that the process must not be reaped yet.
    pub(super) fn drain_group(&self, worker_io: &WorkerIo) -> bool {
        let (state, process) = (worker_io.group.get(), worker_io.process.borrow());
        if state == GroupState::None || !worker_io.pid.has_exited(process.as_deref()) {
            return false;
        }
        let is_open = worker_io.channel.with(|_| ()).is_some();
        match (state, process.as_ref()) {
            (GroupState::Ending(signal), Some(process)) if is_open => {
                // Stop watching the process, because its descriptor stays readable. The call cannot
                // fail, because the descriptor is registered with the poller.
                let _ = process.set_interest(None);
                self.signal_group(worker_io, signal);
                worker_io.group.set(GroupState::Draining);
                true
            }
            (GroupState::Draining, _) if is_open => true,
            _ => {
                self.signal_group(worker_io, Signal::KILL);
                worker_io.group.set(GroupState::Killed);
                false
            }
        }
    }

    /// Lets the loop reap a worker's process after its channel has closed.
    pub(super) fn group_drained(&self, worker_io: &WorkerIo) {
        if worker_io.group.get() == GroupState::Draining {
            self.watch_exit(worker_io.id);
        }
    }

    fn signal_group(&self, worker_io: &WorkerIo, signal: Signal) {
        let process = worker_io.process.borrow();
        // Ignore the error, because the group may have ended.
        let _ = worker_io
            .pid
            .signal_group(process.as_deref(), signal.number());
    }
}
