//! How worlds end: in peace, or with everybody killed.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use super::kernel::Detached;
use super::world::World;
use super::{Call, Deed};
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;

/// How many times everybody has his turn before it counts as hanging. Each is worth 10 ms.
const TURNS: u32 = 3000;
const TURN: Time = Time::from_millis(10);

/// What is done when the steps are over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Everybody is asked to leave, and does what he should.
    Stop,
    /// Everybody is asked to leave, and killed.
    Kill,
}

impl World {
    /// Lets everything end, and checks the totals.
    pub(super) fn end(&mut self, ending: Ending) {
        self.calm_down();
        self.rest();
        self.disconnected = 0;
        self.call(Call::Release, None, 0);
        self.call(Call::DisconnectAll, None, 0);
        let living = self.processes.iter().filter(|(_, p)| p.alive);
        let living: Vec<_> = living.map(|(id, p)| (*id, p.liar)).collect();
        for (worker, is_liar) in living {
            if is_liar || ending == Ending::Kill {
                self.die(worker, ExitStatus::from_raw(9));
            } else {
                self.go_on(worker);
            }
        }
        self.run(TURNS, |world| world.disconnected > 0);
        assert!(
            self.master.worker_ids().next().is_none(),
            "someone never left"
        );
        assert_eq!(self.disconnected, 1, "the callback of disconnect");
        self.release_all();
        self.end_detached();
        self.rest();
        assert!(
            !self.master.has_workers(),
            "a process is waited for in vain"
        );
        assert_eq!(self.master.sizes().processes, 0, "a process is left");
        assert!(
            self.detached
                .values()
                .all(|process| *process == Detached::Gone)
        );
        assert!(self.master.sizes().handles == 0, "a listener is left");
        assert_eq!(self.master.ledger().in_hand(), 0);
        for process in self.processes.values() {
            assert!(process.has_gone(), "a worker's events are missing");
        }
        let ledger = self.master.ledger();
        let honest = !self.processes.values().any(|p| p.liar);
        assert!(!honest || self.count_lost() == ledger.dropped + ledger.closed_by_peer);
    }

    /// The master does all it has to do.
    fn rest(&mut self) {
        for n in 0..10_000_u32 {
            if self.master_sleeps() {
                return;
            }
            // Everything that is ready in its turn.
            self.master_step(n.to_le_bytes()[0]);
            self.check();
        }
        panic!("the master never rests");
    }

    /// Master and workers do what they have to do, whatever their programs do.
    pub(super) fn settle(&mut self) {
        loop {
            self.rest();
            let busy = self
                .processes
                .iter()
                .find(|(_, process)| process.is_busy(self.now()));
            let Some((&worker, _)) = busy else {
                return;
            };
            self.worker_step(worker, 0);
            self.check();
        }
    }

    /// Everybody does what he should, turn by turn, until `done`.
    pub(super) fn run(&mut self, turns: u32, done: impl Fn(&Self) -> bool) {
        for _ in 0..turns {
            if done(self) {
                return;
            }
            self.rest();
            let ids: Vec<_> = self.processes.keys().copied().collect();
            for id in ids {
                self.serve(id);
            }
            self.pass(TURN);
        }
        assert!(done(self), "it never ends");
    }

    /// A turn of a program that serves whatever it has, and ends when it is over.
    fn serve(&mut self, worker: WorkerId) {
        for _ in 0..8 {
            if self.processes[&worker].alive {
                self.worker_step(worker, 0);
                self.check();
            }
        }
        let held = self.processes[&worker].held.len();
        for n in 0..self.processes[&worker].listeners.len() {
            let n = u8::try_from(n).unwrap_or(0);
            let served = |world: &Self| {
                let process = &world.processes[&worker];
                process
                    .listeners
                    .get(usize::from(n))
                    .is_some_and(|l| process.core.is_served(*l))
            };
            if served(self) {
                self.program(worker, Deed::Accept, n);
            }
        }
        for _ in 0..held {
            self.program(worker, Deed::Close, 0);
        }
        self.program(worker, Deed::Wait, 0);
    }

    fn program(&mut self, worker: WorkerId, deed: Deed, n: u8) {
        if self.processes[&worker].alive {
            self.program_step(worker, deed, n);
            self.check();
        }
    }
}
