//! Ends a run. The workers serve the last clients, all processes exit, and the totals are checked.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use super::{Call, World};
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;

/// The number of rounds after which a run is treated as hanging.
pub(crate) const ROUNDS: u32 = 3000;
/// The virtual time that passes in each round.
const ROUND: Time = Time::from_millis(10);

/// The way in which the workers end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// All workers disconnect, and their applications serve the remaining clients. Workers that
    /// have forged frames are killed.
    Stop,
    /// All workers are killed after the master has begun to disconnect them.
    Kill,
}

impl World {
    /// Ends all workers as `ending` says, then all detached processes, and checks the totals.
    pub(crate) fn end(&mut self, ending: Ending) {
        self.failing.clear();
        self.run_master();
        self.disconnected = 0;
        self.call(Call::Release, None, 0);
        self.call(Call::DisconnectAll, None, 0);
        let living = self.processes.iter().filter(|(_, p)| p.is_alive());
        let living: Vec<_> = living.map(|(id, p)| (*id, p.is_liar)).collect();
        for (worker, is_liar) in living {
            if is_liar || ending == Ending::Kill {
                self.exit(worker, ExitStatus::from_raw(9));
            } else {
                self.resume(worker);
            }
        }
        self.run_until(ROUNDS, |world| world.disconnected > 0);
        let workers = self.master.worker_ids().count();
        assert_eq!(workers, 0, "workers that never exited");
        self.release_all();
        let detached: Vec<_> = self.detached.keys().copied().collect();
        for process in detached {
            self.end_detached(process, ExitStatus::from_raw(0));
        }
        self.run_master();
        self.check_end();
    }

    /// Runs all processes until `is_done` returns `true`. Panics after `rounds` rounds.
    pub(crate) fn run_until(&mut self, rounds: u32, is_done: impl Fn(&Self) -> bool) {
        for _ in 0..rounds {
            if is_done(self) {
                return;
            }
            self.run_master();
            let ids: Vec<_> = self.processes.keys().copied().collect();
            for id in ids {
                self.serve(id);
            }
            self.pass(ROUND);
        }
        assert!(is_done(self), "it never ends: {:?}", self.master);
    }

    /// Runs one round of a worker. The worker's application serves its connections, and returns
    /// from `main` when nothing is left to serve.
    fn serve(&mut self, worker: WorkerId) {
        for _ in 0..8 {
            self.worker_step(worker, 0);
            self.check();
        }
        if !self.is_ready_for_application(worker) {
            return;
        }
        if self.processes[&worker].accepting.is_some() {
            self.try_blocking_accept(worker);
        } else {
            let held = self.processes[&worker].held.len();
            self.poll_listeners(worker);
            for n in 0..held {
                match n % 3 {
                    0 => drop(self.close_connection(worker, 0)),
                    1 => self.park_connection(worker, 0),
                    _ => self.finish_connection(worker, 0),
                }
            }
            self.wait_for_events(worker);
            self.gather_from_worker(worker);
        }
        self.check();
    }
}
