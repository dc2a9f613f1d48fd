//! The process groups of workers with [`Settings::listen_fds`](crate::Settings::listen_fds()).
//!
//! The program of such a worker may not use this crate, and may consist of several processes, for
//! example a shell and the server that it has started. The worker's process leads a group, and the
//! others are its members. When the leader has exited, the master kills the members, because they
//! would otherwise serve forever.
//!
//! If the master has sent the leader a signal that asks it to end, such as SIGTERM, the members
//! receive the same signal instead of SIGKILL, so that they can finish their requests. The master
//! then checks every 100 ms whether a member is left, because no event reports the end of a group.
//! Until then, the master does not reap the leader. The id of the group is the leader's process id,
//! which could otherwise be reused.
//!
//! If the system does not list the members, the master assumes that each has inherited the worker's
//! end of the channel, and reads end-of-file when all have exited. A member may have closed its
//! copy, and a process that has left the group may have kept one, so `/proc` is the better source.
//!
//! If the kernel has no process descriptors, the members are killed even after such a signal,
//! because the loop could not wait for their end before it reaps the leader.

use super::{MasterShell, WorkerIo};
use crate::types::signal::Signal;

/// The state of a worker's process group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GroupState {
    /// The worker leads no group.
    None,
    /// The leader has not been sent a signal that asks it to end.
    Running,
    /// The leader has been sent this signal, which asks it to end.
    Ending(Signal),
    /// The leader has exited, and the members have been sent the signal that the leader had been
    /// sent. They may still run.
    Draining,
    /// The group has been killed.
    Killed,
}

/// Returns whether a member of the worker's group is left. The leader has exited.
fn has_members(worker_io: &WorkerIo) -> bool {
    let is_open = || worker_io.channel.with(|_| ()).is_some();
    worker_io.pid.has_group_members().unwrap_or_else(is_open)
}

impl MasterShell {
    /// Records that a worker's process has been sent a signal. If the signal is SIGKILL, or if only
    /// the members still run, sends the signal to the group too.
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

    /// Ends the group of a worker if its process has exited. Returns whether the process must not
    /// be reaped yet, because the members are draining, or because the process was still running
    /// and has no process descriptor.
    pub(super) fn drain_group(&self, worker_io: &WorkerIo) -> bool {
        let (state, process) = (worker_io.group.get(), worker_io.process.borrow());
        if state == GroupState::None {
            return false;
        }
        if !worker_io.pid.has_exited(process.as_deref()) {
            // Without a process descriptor, do not let the caller reap a process that exits only
            // now, because its members could no longer be killed. SIGCHLD will report the exit.
            // Signal 0 fails if other code has already reaped the process. In that case, let the
            // caller try, so that it reports the unknown exit status.
            return process.is_none() && worker_io.pid.signal_group(process.as_deref(), 0).is_ok();
        }
        let may_drain = match state {
            GroupState::Ending(_) => process.is_some(),
            GroupState::Draining => true,
            GroupState::None | GroupState::Running | GroupState::Killed => false,
        };
        drop(process);
        if may_drain && has_members(worker_io) {
            if let GroupState::Ending(signal) = state {
                self.signal_group(worker_io, signal);
                worker_io.group.set(GroupState::Draining);
            }
            self.reap_later(worker_io);
            return true;
        }
        self.signal_group(worker_io, Signal::KILL);
        worker_io.group.set(GroupState::Killed);
        false
    }

    /// Checks a draining group now, because its channel has closed, probably with its last member.
    pub(super) fn check_draining_group(&self, worker_io: &WorkerIo) {
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
