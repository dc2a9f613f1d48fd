//! The states of an upgrade, in which a new master takes over.

use std::num::NonZeroUsize;
use std::process::ExitStatus;
use std::time::Duration;

use cluster::WorkerId;

use super::super::event::{PoolEvent, UpgradeFailure};
use super::{Action, Core, Time};

/// The state of an upgrade to a new master.
///
/// | from | input | to |
/// |---|---|---|
/// | `Idle` | a new master was started | `Pending` |
/// | `Pending` | the new master has taken over | `Succeeded`; the pool stops |
/// | `Pending` | the new master has exited | `Idle` |
/// | `Pending` | the new master is late, or the pool stops | `Idle`; the new master is rejected |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Upgrade {
    Idle,
    /// The new master is running and must take over by the deadline. After the deadline, the driver
    /// checks whether the new master has taken over, because its report may not have been read yet.
    Pending {
        new_master: WorkerId,
        deadline: Time,
    },
    Succeeded {
        new_master: WorkerId,
    },
}

/// Whether an old master still serves, because this pool has not taken over from it.
///
/// | from | input | to |
/// |---|---|---|
/// | | the pool is created | `Done` |
/// | `Done` | `await_takeover`, before the pool has workers | `Pending` |
/// | `Pending` | `took_over` | `Done` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takeover {
    Pending,
    Done,
}

/// The state of a new master whose upgrade has failed. The core removes the new master when its
/// process exits.
///
/// | from | input | to |
/// |---|---|---|
/// | | the upgrade has failed, and SIGTERM was sent | `Terminating` |
/// | `Terminating` | the drain timeout has passed | `Killed` |
/// | `Terminating` | the pool is stopped at once | `Killed` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RejectedMaster {
    Terminating { exit_by: Time },
    Killed,
}

impl Core {
    /// Records that an old master serves until this pool takes over.
    pub(in super::super) fn await_takeover(&mut self) {
        self.takeover = Takeover::Pending;
    }

    pub(in super::super) fn took_over(&mut self) {
        self.takeover = Takeover::Done;
    }

    /// Returns whether an upgrade can begin.
    pub(in super::super) fn can_upgrade(&self) -> bool {
        !self.is_stopping() && self.upgrade == Upgrade::Idle && !self.awaits_takeover()
    }

    /// Returns whether an old master still serves, because this pool has not taken over.
    pub(in super::super) fn awaits_takeover(&self) -> bool {
        self.takeover == Takeover::Pending
    }

    /// Returns whether a new master has taken over from this pool.
    pub(in super::super) fn is_upgraded(&self) -> bool {
        self.new_master().is_some()
    }

    /// Returns the new master that has taken over from this pool.
    pub(in super::super) fn new_master(&self) -> Option<WorkerId> {
        match self.upgrade {
            Upgrade::Succeeded { new_master } => Some(new_master),
            Upgrade::Idle | Upgrade::Pending { .. } => None,
        }
    }

    /// Returns the number of slots to pass to a new master. Returns `None` if the number is that of
    /// this pool's options, because the new master then uses its own options. Also returns `None`
    /// for 0 slots, because a pool without slots never has a quorum, so the new master could not
    /// take over.
    pub(in super::super) fn handed_over_slots(&self) -> Option<NonZeroUsize> {
        let slots = NonZeroUsize::new(self.slots.len());
        slots.filter(|slots| slots.get() != self.options.workers)
    }

    pub(in super::super) fn new_master_started(&mut self, new_master: WorkerId, now: Time) {
        let deadline = now.saturating_add(self.upgrade_timeout());
        self.upgrade = Upgrade::Pending {
            new_master,
            deadline,
        };
    }

    /// Returns the time in which a new master must take over.
    pub(super) fn upgrade_timeout(&self) -> Duration {
        let options = &self.options;
        // The new master's workers may take the whole start-up timeout. The new master then waits
        // for its `min_ready_time`. Add `min_ready_time` a second time as a reserve for the start
        // of the new master's program.
        let ready = options.min_ready_time.saturating_mul(2);
        options.startup_timeout.saturating_add(ready)
    }

    /// Records that the new master has taken over, and then stops this pool. Does nothing if the
    /// new master's upgrade has failed.
    pub(in super::super) fn new_master_took_over(&mut self, new_master: WorkerId, now: Time) {
        if self.pending_master() == Some(new_master) {
            self.upgrade = Upgrade::Succeeded { new_master };
            self.actions.push_back(Action::ReleaseSocketFiles);
            self.actions.push_back(Action::PassParked(new_master));
            self.drain(now);
            self.emit(PoolEvent::Upgraded);
        }
    }

    /// Records that the new master has missed its deadline and can no longer take over.
    pub(in super::super) fn new_master_is_late(&mut self, new_master: WorkerId, now: Time) {
        if self.pending_master() == Some(new_master) {
            self.fail_upgrade(UpgradeFailure::Timeout, now);
        }
    }

    pub(in super::super) fn new_master_exited(&mut self, new_master: WorkerId, status: ExitStatus) {
        self.rejected_masters.remove(&new_master);
        if self.pending_master() == Some(new_master) {
            self.end_upgrade(UpgradeFailure::Exited(status));
        }
    }

    /// Fails the pending upgrade, if there is one. The new master may already have clients, so the
    /// pool first sends SIGTERM. The pool kills the process only after the drain timeout.
    pub(super) fn fail_upgrade(&mut self, reason: UpgradeFailure, now: Time) {
        if let Some(new_master) = self.pending_master() {
            self.end_upgrade(reason);
            let exit_by = now.saturating_add(self.options.drain_timeout);
            self.rejected_masters
                .insert(new_master, RejectedMaster::Terminating { exit_by });
            self.actions
                .push_back(Action::TerminateNewMaster(new_master));
        }
    }

    pub(super) fn tick_upgrade(&mut self, now: Time) {
        match self.upgrade {
            Upgrade::Pending {
                new_master,
                deadline,
            } if deadline <= now => self.actions.push_back(Action::EndTakeover(new_master)),
            Upgrade::Pending { .. } | Upgrade::Idle | Upgrade::Succeeded { .. } => {}
        }
        for (id, state) in &mut self.rejected_masters {
            if matches!(state, RejectedMaster::Terminating { exit_by } if *exit_by <= now) {
                *state = RejectedMaster::Killed;
                self.actions.push_back(Action::Kill(*id));
            }
        }
    }

    /// Returns the earliest deadline of the upgrade and the rejected masters.
    pub(super) fn upgrade_deadline(&self) -> Option<Time> {
        let pending = match self.upgrade {
            Upgrade::Pending { deadline, .. } => Some(deadline),
            Upgrade::Idle | Upgrade::Succeeded { .. } => None,
        };
        let rejected = self.rejected_masters.values();
        let rejected = rejected.filter_map(|state| match state {
            RejectedMaster::Terminating { exit_by } => Some(*exit_by),
            RejectedMaster::Killed => None,
        });
        rejected.chain(pending).min()
    }

    fn pending_master(&self) -> Option<WorkerId> {
        match self.upgrade {
            Upgrade::Pending { new_master, .. } => Some(new_master),
            Upgrade::Idle | Upgrade::Succeeded { .. } => None,
        }
    }

    fn end_upgrade(&mut self, reason: UpgradeFailure) {
        self.upgrade = Upgrade::Idle;
        self.emit(PoolEvent::UpgradeFailed { reason });
    }
}
