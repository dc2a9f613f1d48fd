//! The process groups of workers with [`Settings::listen_fds`](crate::Settings::listen_fds()).
//!
//! The program of such a worker does not have to use this crate, and can consist of several
//! processes, for example a shell and the server that it has started. The worker's process leads a group, and the
//! others are its members. When the leader has exited, the master kills the members, because they
//! would otherwise serve forever.
//!
//! If the master has sent the leader SIGTERM, SIGINT or SIGQUIT, the members receive the same signal
//! instead of SIGKILL, so that they can finish their requests. The master then checks every 100 ms
//! whether a member is left, because no event reports the end of a group. While a member is left, the
//! master does not reap the leader, because the group's id is the leader's process id, which could
//! otherwise be reused.
//!
//! Without a usable `/proc`, the master assumes that each member has inherited the worker's end of
//! the channel. It then reads end-of-file when all have exited. `/proc` is preferred, because a
//! member may have closed its copy, and a process that has left the group may have kept one.
//!
//! If the kernel has no process descriptors, the members are killed even after such a signal,
//! because the loop could not wait for their end before it reaps the leader.

use super::{MasterShell, WorkerIo};
use crate::sys::process::{ChildState, GroupSearch, Pid};
use crate::types::signal::Signal;

/// The state of a worker's process group.
///
/// ```text
/// from                       event                                                 to
/// -------------------------  ----------------------------------------------------  --------
/// Running                    the leader is sent SIGTERM, SIGINT or SIGQUIT         Ending
/// Running                    the leader has exited                                 Killed
/// Ending                     the leader has exited, and a member may be left       Draining
/// Ending                     the leader has exited, and no member is left, or the  Killed
///                            kernel has no process descriptors
/// Draining                   no member is left                                     Killed
/// Running, Ending, Draining  the leader is sent SIGKILL                            Killed
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GroupState {
    /// The worker leads no group.
    None,
    /// The leader has not been sent SIGTERM, SIGINT or SIGQUIT.
    Running,
    /// The leader has been sent this signal: SIGTERM, SIGINT or SIGQUIT.
    Ending(Signal),
    /// The leader has exited, and the members have been sent the signal that the leader had been
    /// sent. They may still run. This member was found last.
    Draining(Option<Pid>),
    /// The group has been killed.
    Killed,
}

/// The members of a group whose leader has exited.
enum Members {
    None,
    /// Some may still run. One of them is known, if a search has found it.
    Left(Option<Pid>),
}

/// When a process that belongs to a group may be reaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reap {
    Now,
    /// In a later attempt, because its group is draining, or because the process was still running
    /// and has no process descriptor.
    Later,
}

/// Returns the members of a worker's group. `last` is the member that was found last.
fn find_members(worker_io: &WorkerIo, last: Option<Pid>) -> Members {
    match worker_io.pid.find_group_member(last) {
        GroupSearch::Found(member) => Members::Left(Some(member)),
        GroupSearch::Empty => Members::None,
        // Assume that a member is left, because the next search may succeed. Only a deadline, if one
        // is set, limits the time.
        GroupSearch::Failed => Members::Left(last),
        GroupSearch::Impossible if worker_io.channel.is_open() => Members::Left(None),
        GroupSearch::Impossible => Members::None,
    }
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
                if matches!(state, GroupState::Draining(_)) {
                    self.watch_exit(worker_io.id);
                }
            }
            (GroupState::Running, Signal::TERM | Signal::INT | Signal::QUIT) => {
                worker_io.group.set(GroupState::Ending(signal));
            }
            (GroupState::Draining(_), _) => self.signal_group(worker_io, signal),
            (GroupState::Running | GroupState::Ending(_) | GroupState::Killed, _) => {}
        }
    }

    /// Drains or kills the group of a worker if its process has exited. Returns when the process may
    /// be reaped.
    pub(super) fn settle_group(&self, worker_io: &WorkerIo) -> Reap {
        let (state, process) = (worker_io.group.get(), worker_io.process.borrow());
        if state == GroupState::None {
            return Reap::Now;
        }
        if worker_io.pid.child_state(process.as_deref()) != ChildState::Exited {
            // Without a process descriptor, do not let the caller reap a process that exits only
            // now, because its members could no longer be killed. SIGCHLD will report the exit.
            // Signal 0 fails if other code has already reaped the process. In that case, let the
            // caller try, so that it reports the unknown exit status.
            let exists = || worker_io.pid.signal_group(process.as_deref(), 0).is_ok();
            return match process.is_none() && exists() {
                true => Reap::Later,
                false => Reap::Now,
            };
        }
        let members = match state {
            GroupState::Ending(_) if process.is_some() => find_members(worker_io, None),
            GroupState::Draining(last) => find_members(worker_io, last),
            GroupState::None | GroupState::Running | GroupState::Ending(_) | GroupState::Killed => {
                Members::None
            }
        };
        drop(process);
        let Members::Left(member) = members else {
            self.signal_group(worker_io, Signal::KILL);
            worker_io.group.set(GroupState::Killed);
            return Reap::Now;
        };
        if let GroupState::Ending(signal) = state {
            self.signal_group(worker_io, signal);
        }
        worker_io.group.set(GroupState::Draining(member));
        self.reap_later(worker_io);
        Reap::Later
    }

    /// Lets the loop check a draining group in its next iteration, because the channel has closed,
    /// probably with the last member.
    pub(super) fn recheck_draining_group(&self, worker_io: &WorkerIo) {
        if matches!(worker_io.group.get(), GroupState::Draining(_)) {
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
