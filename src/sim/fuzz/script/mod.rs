//! Implements the `master_input` target. An input is a script for the master, a hostile worker and
//! a well-behaved worker (`honest` in the code).
//!
//! The hostile worker is raw: it runs no code of this crate, and the script writes its bytes into
//! the master's inbox for the worker. The well-behaved worker runs this crate, and its application
//! serves clients. The script also controls the clients, the master's application, the clock, and
//! the operations that fail. After each step, the master has carried out all its actions.

mod honest;
mod hostile;
mod surroundings;

use std::collections::BTreeMap;

use super::Input;
use crate::core::worker::ListenStatus;
use crate::sim::kernel::socket::Port;
use crate::sim::kernel::{Config, Ending, ROUNDS, World};
use crate::types::endpoint::Kind;
use crate::types::policy::SchedulingPolicy;
use crate::types::worker_id::WorkerId;
use hostile::Hostile;

/// The number of times that each case occurred.
pub(super) type Reached = BTreeMap<&'static str, usize>;

pub(super) const SERVED: &str = "connections received by the honest worker";
pub(super) const DISPATCHED: &str = "connections dispatched to the hostile worker";
pub(super) const RECEIVED: &str = "connections received by the hostile worker";
pub(super) const RECLAIMED: &str = "connections reclaimed from the hostile worker";
pub(super) const RECLAIMED_FROM_HONEST: &str = "connections reclaimed from the honest worker";
pub(super) const FALSE_CLAIMS: &str = "claims of connections that were not received";
pub(super) const DENIED: &str = "listeners denied to the hostile worker";
pub(super) const DISCARDED: &str = "discarded channels";
pub(super) const PARKED: &str = "parked connections";
pub(super) const RESUMED: &str = "resumed connections";
pub(super) const EXPIRED: &str = "expired connections";
pub(super) const IDLE_CLOSED: &str = "idle connections that were closed early";
pub(super) const EARLY_REPORTS: &str = "reports of connections in the hostile worker's queue";

/// The maximum number of connections that a worker's callback receives in one iteration of the
/// worker's loop. The real loop (`worker::event_loop`) has the same limit.
const ACCEPT_BATCH: u32 = 16;

/// Runs a script, and returns the cases that it reached.
pub(super) fn run(data: &[u8]) -> Reached {
    let mut input = Input(data);
    let mut script = Script::new(input.byte());
    while !input.is_empty() {
        script.step(&mut input);
        script.check();
    }
    script.finish();
    script.reached()
}

struct Script {
    world: World,
    hostile: Hostile,
    honest: WorkerId,
    /// Whether the master's application has disconnected the well-behaved worker or closed its
    /// channel.
    honest_is_dismissed: bool,
    /// The number of the call that the master's application makes in its next callback, or 0 for
    /// none.
    reaction: u8,
    /// The number that selects how the master treats the connections of the well-behaved worker's
    /// listeners. See `requested_parking`.
    parking: u8,
    denied: usize,
}

impl Script {
    fn new(choice: u8) -> Self {
        let policy = if choice % 4 == 3 {
            SchedulingPolicy::Shared
        } else {
            SchedulingPolicy::RoundRobin
        };
        let mut world = World::new(Config {
            policy,
            counts_queues: choice & 4 == 0,
            accept_batch: ACCEPT_BATCH,
        });
        let hostile = Hostile::new(world.fork_raw());
        let honest = world.fork();
        let mut script = Self {
            world,
            hostile,
            honest,
            honest_is_dismissed: false,
            reaction: 0,
            parking: choice / 8 * 8,
            denied: 0,
        };
        script.settle();
        script
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 32 {
            0..=9 => self.write_frame(input),
            10 => {
                let (length, fds) = (input.byte(), input.byte());
                let bytes = input.bytes(length.into());
                // Attach up to 63 descriptors, so that a few writes exceed `MAX_EARLY_FDS`. Attach
                // them in only a quarter of the cases, because each costs a system call.
                let count = usize::from(fds).saturating_sub(192);
                self.write(bytes, count, fds == 191);
            }
            11..=15 => self.run_honest_application(input.byte()),
            16 => self.client_event(input.byte()),
            17..=18 => drop(self.world.master_receives(self.honest)),
            19..=20 => drop(self.honest_reads()),
            21 => self.exchange(),
            22..=24 => self.connect(input.byte(), input.byte()),
            25 => self.poll(),
            26 => self.pass(input.byte()),
            27 => self.close_hostile_channel(),
            28 => self.exit_hostile(),
            29 => self.reaction = input.byte(),
            30 => self.call(input.byte()),
            _ => self.cooperate(input.byte()),
        }
        self.settle();
    }

    /// Makes the master carry out all its actions and deliver all its events to its application.
    /// Also makes the hostile worker read all frames from the master.
    fn settle(&mut self) {
        loop {
            while self.world.carry_out_next() || self.world.flush_next() {}
            self.hostile_reads();
            if !self.world.master_is_idle() {
                continue;
            }
            if self.world.schedule_next() {
                continue;
            }
            if self.world.next_checked_event().is_none() {
                break;
            }
            match std::mem::take(&mut self.reaction) {
                0 => {}
                choice => self.call(choice),
            }
        }
    }

    fn check(&mut self) {
        self.world.check();
        let is_connected = self.world.master.is_connected(self.honest);
        assert!(
            is_connected || self.honest_is_dismissed,
            "the honest worker is disconnected"
        );
        assert!(self.world.master_is_idle(), "not settled");
        assert_eq!(self.world.master.sizes().events, 0, "not settled");
    }

    fn reached(&self) -> Reached {
        let mut reached = Reached::new();
        let mut count = |what, times| *reached.entry(what).or_default() += times;
        for process in self.world.processes.values() {
            let counters = process.counters;
            if process.inbox.is_none() {
                count(SERVED, counters.received);
                count(RECLAIMED_FROM_HONEST, counters.reclaimed);
            } else {
                count(DISPATCHED, counters.dispatched);
                count(RECEIVED, counters.received);
                count(RECLAIMED, counters.reclaimed);
                count(FALSE_CLAIMS, counters.false_claims);
                count(DISCARDED, counters.discarded);
            }
        }
        count(DENIED, self.denied);
        let ledger = self.world.master.ledger();
        let outcomes = [
            (PARKED, ledger.parked),
            (RESUMED, ledger.resumed),
            (EXPIRED, ledger.expired),
            (IDLE_CLOSED, ledger.idle_closed),
            (EARLY_REPORTS, self.world.early_reports),
        ];
        for (what, times) in outcomes {
            count(what, usize::try_from(times).expect("few connections"));
        }
        reached
    }

    /// Makes the hostile worker exit and the well-behaved worker serve all clients, and then ends
    /// all processes. If the master's application has disconnected the well-behaved worker or
    /// closed its channel, kills all workers and does not check that the clients are served.
    fn finish(&mut self) {
        self.world.failing.clear();
        self.reaction = 0;
        self.close_hostile_channel();
        self.settle();
        self.exit_hostile();
        self.settle();
        if self.honest_is_dismissed {
            return self.world.end(Ending::Kill);
        }
        self.serve_all();
        self.check();
        self.world.end(Ending::Stop);
    }

    /// Connects one more client to each open listener, and checks that all clients are served. The
    /// well-behaved worker's application sets a callback for each of its listeners, and removes the
    /// connection limits.
    fn serve_all(&mut self) {
        for _ in 0..2 {
            self.exchange();
            self.pass(100);
        }
        self.world.send_all_requests();
        let open = self.world.ports.values().filter(|port| port.is_open());
        let count = u8::try_from(open.count()).expect("few listeners");
        for n in 0..count {
            self.world.connect(n);
        }
        let process = self.world.process(self.honest);
        process.accepting = None;
        for listener in process.listeners.clone() {
            if let ListenStatus::Done(_) = process.core.listen_status(listener) {
                process.core.set_connection_limit(listener, None);
                process.core.use_callback(listener);
            }
        }
        self.poll();
        self.exchange();
        // Each round serves at least one client of each listener. If clients are still waiting
        // after `ROUNDS` rounds, they are treated as lost.
        self.world.run_until(ROUNDS, |world| {
            let is_empty = |port: &Port| {
                port.is_unbound() || port.kind() == Kind::Udp || port.backlog.is_empty()
            };
            let has_requests = world.has_unanswered();
            let is_all_idle = world.master.in_flight() == world.master.count_idle() as u64;
            world.ports.values().all(is_empty) && is_all_idle && !has_requests
        });
        self.world.check_served();
    }
}
