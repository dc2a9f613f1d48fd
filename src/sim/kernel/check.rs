//! Checks the crate's guarantees after each step of a driver.

use super::process::{Detached, Life};
use super::socket::{Held, Location, Port, QUEUE_CAPACITY};
use super::{KNOWN, World};
use crate::core::master::event::{EmittedEvent, Event, Level, WorkerState};
use crate::error::Error;
use crate::sys::fd::NoLingerFd;
use crate::types::handle::HandleId;
use crate::types::policy::SchedulingPolicy;
use crate::types::time::earlier;
use crate::types::worker_id::WorkerId;

/// The maximum number of listeners of one worker, as documented in the guide (`guide/limits.md`).
pub(crate) const MAX_LISTENERS: usize = 64;

// Checks after each step.
impl World {
    pub(crate) fn check(&mut self) {
        self.check_closed();
        assert!(self.master.is_index_consistent(), "the index is wrong");
        let ledger = self.master.ledger();
        assert_eq!(ledger.in_flight(), self.master.in_flight(), "{ledger:?}");
        let lost = ledger.dropped + ledger.closed_by_peer + ledger.expired + ledger.idle_closed;
        let lost = lost + ledger.passed;
        assert!(self.lost <= lost, "a client is lost: {ledger:?}");
        let waits = self.awaited || !self.referenced.is_empty();
        assert_eq!(
            self.master.keeps_loop_alive(),
            waits,
            "{:?}",
            self.referenced
        );
        for process in self.detached.keys() {
            assert!(!self.master.is_worker(*process), "in the table of workers");
        }
        self.check_queued();
        self.check_bounds();
        if !self.master.has_actions() {
            self.check_at_rest();
        }
    }

    /// Adds the connections that have closed since the last check, and whose clients no worker has
    /// served, to `lost`. Leaves out those that a worker has closed without an application.
    fn check_closed(&mut self) {
        while let Some(client) = self.closed.borrow_mut().pop() {
            let fate = &mut self.fates[client as usize];
            fate.is_closed = true;
            self.lost += u64::from(!fate.served && !fate.is_in_worker);
        }
    }

    /// Checks that the master's memory is bounded, regardless of the workers' frames.
    fn check_bounds(&self) {
        let sizes = self.master.sizes();
        let workers = sizes.processes.max(2);
        let max = MAX_LISTENERS * workers + self.retained.len() + self.unclosed.len();
        assert!(sizes.handles <= max, "{} listeners", sizes.handles);
        // In the worst case, all queues of a listener are full, and the master also holds the
        // reclaimed connections of one more queue.
        let max = (workers + 1) * QUEUE_CAPACITY * sizes.handles + self.parked_limit_max;
        let in_flight = usize::try_from(self.master.in_flight()).expect("few connections");
        assert!(in_flight <= max, "{in_flight} connections in flight");
        for process in self.processes.values() {
            // Allow two answers to each of the worker's frames, and one disconnect frame.
            let counters = &process.counters;
            process.check_deadline();
            let is_bounded = counters.answers <= 2 * counters.frames + 1;
            assert!(is_bounded, "too many answers: {counters:?}");
        }
    }

    /// Checks conditions that hold only while the master has no action to carry out.
    fn check_at_rest(&self) {
        let waits = self.master.has_stuck_connection(self.ticked);
        assert!(!waits, "a connection waits in vain: {:?}", self.master);
        let is_passed = !self.has_successor || self.master.count_idle() == 0;
        assert!(is_passed, "an idle connection is not passed");
        for (id, held) in &self.held {
            // Only with round robin does the master dispatch a connection as soon as its data
            // arrives. With the other policies, the connection stays idle and unwatched, and the
            // next worker that serves the listener receives the connection with its data.
            let is_dispatched = self.config.policy == SchedulingPolicy::RoundRobin;
            let is_watched = held.is_awaited || !self.master.is_idle(*id) || !is_dispatched;
            assert!(is_watched, "{id:?} is idle and not watched");
        }
        assert_eq!(self.master.sizes().held, self.held.len(), "held");
        for (handle, port) in &self.ports {
            assert_eq!(self.master.is_bound(*handle), !port.is_unbound());
        }
        for (worker, process) in &self.processes {
            let by = earlier(process.deadline, self.stop_by);
            if let (Some(by), true) = (by, process.is_alive()) {
                assert!(by >= self.ticked, "worker {worker} outlives its deadline");
                let wakes = self.master.deadline().is_some_and(|time| time <= by);
                assert!(wakes, "no tick at the deadline of worker {worker}");
            }
        }
    }

    /// Checks that the master counts all connections in queues as in flight, unless a worker has
    /// claimed connections that it did not receive.
    fn check_queued(&self) {
        let in_flight = usize::try_from(self.master.in_flight()).expect("few connections");
        let is_complete = self.count_queued() <= in_flight;
        assert!(is_complete || self.has_false_claims, "forgotten in a queue");
    }

    /// Checks that no honest worker other than `worker` has the client's connection.
    pub(crate) fn check_sole(&self, worker: WorkerId, client: u32) {
        for (other, process) in &self.processes {
            let mut received = process.held.iter();
            let is_shared = *other != worker
                && !process.is_liar
                && received.any(|received| received.client.client == client);
            assert!(
                !is_shared,
                "workers {worker} and {other} have client {client}"
            );
        }
    }

    /// Records that a worker has received the client's connection and reads what the client has
    /// sent. Checks that an earlier worker has received the connection if and only if the
    /// connection has been parked, and that the earlier worker has the same user. If a worker has
    /// forged frames, checks only connections of which the master holds no copy. `times_parked` is the number of times that the connection has been
    /// parked, and `is_held` is whether the master holds a copy.
    pub(crate) fn mark_served(
        &mut self,
        worker: WorkerId,
        client: u32,
        times_parked: u32,
        is_held: bool,
    ) {
        let user = self.processes[&worker].user;
        let is_trusted = !self.processes.values().any(|process| process.is_liar);
        let fate = &mut self.fates[client as usize];
        if !is_held || is_trusted {
            assert_eq!(
                fate.served,
                times_parked > 0,
                "client {client} served twice"
            );
            let by = fate.had_by.unwrap_or(user);
            assert_eq!(by, user, "client {client} has another user's worker");
        }
        self.served += u64::from(!fate.served);
        (fate.served, fate.is_pending) = (true, false);
        fate.had_by = Some(user);
    }

    /// Checks that the master has a reason for closing its copy of a connection. The exit of a
    /// worker is not a reason while only the master has the connection.
    pub(crate) fn check_closing(&mut self, held: &Held) {
        let Some(client) = held.client().filter(|_| !held.is_unwatched) else {
            return;
        };
        let fate = self.fates[client as usize];
        let is_bound = fate.port.is_some_and(|port| self.master.is_bound(port));
        let closes_idle = fate.port.is_none_or(|port| self.master.closes_idle(port));
        let is_excluded = fate
            .port
            .is_some_and(|port| self.master.excludes(port, fate.had_by));
        let is_explained = is_excluded
            || match held.location {
                Location::Detached => true,
                Location::Worker(worker) => {
                    let is_liar = self.processes[&worker].is_liar;
                    is_liar || !is_bound || !self.master.is_connected(worker)
                }
                Location::Master => {
                    fate.left || closes_idle || self.held.len() + 1 >= self.parked_limit
                }
            };
        self.expired += u64::from(!is_explained);
        let is_known = self.expired <= self.master.ledger().expired + self.failed_holds;
        assert!(is_known, "client {client} is closed for no reason");
    }

    /// Checks that a worker reports no more connections than it received, unless it has forged
    /// frames.
    pub(crate) fn check_claim(&mut self, handle: HandleId, worker: WorkerId, claimed: u64) {
        let received = self.count_received(handle, worker);
        if claimed > received {
            let process = self.process(worker);
            assert!(process.is_liar, "{claimed} connections, not {received}");
            process.counters.false_claims += 1;
            self.has_false_claims = true;
        }
    }

    pub(crate) fn check_message_to_worker(&mut self, worker: WorkerId, message: &[u8]) {
        let number = number(message);
        let last = std::mem::replace(&mut self.process(worker).received[1], number);
        assert_eq!(number, last + 1, "a message is missing");
    }

    /// Checks the ledger's number of received connections. The number is exact only if the system
    /// counts the connections in queues and no worker has reported too many.
    pub(crate) fn check_received(&self) {
        if self.config.counts_queues && !self.has_false_claims {
            assert_eq!(self.master.ledger().received, self.received, "received");
        }
    }
}

// Checks of each event.
impl World {
    pub(crate) fn check_emit(&mut self, emit: &EmittedEvent<Vec<NoLingerFd>>) {
        let (level, event) = (emit.level, &emit.event);
        let kind = std::mem::discriminant(event);
        if let Event::Disconnected = event {
            self.check_disconnected();
        }
        let expected = self.second.take();
        let Some(worker) = emit.worker else {
            return assert!(expected.is_none(), "{event:?} in between");
        };
        let is_second = expected == Some((worker, kind));
        assert!(expected.is_none() || is_second, "{event:?} in between");
        if level == Level::Worker && !matches!(event, Event::DetachedExit(_)) {
            self.second = Some((worker, kind));
        } else {
            let is_single = matches!(
                event,
                Event::Fork | Event::Message { .. } | Event::DetachedExit(_)
            );
            assert!(is_second || is_single, "{event:?} on {level:?} level only");
        }
        if self.detached.contains_key(&worker) {
            self.check_detached_event(level, worker, event);
        } else {
            self.check_worker_event(level, worker, event);
        }
    }

    /// Checks the state after `disconnect_all` has finished.
    fn check_disconnected(&mut self) {
        assert!(self.awaited, "not requested");
        assert!(
            self.master.worker_ids().next().is_none(),
            "a worker is left"
        );
        let is_alive = self.processes.values().any(super::Process::is_alive);
        assert!(!is_alive, "a process is alive");
        let is_left = |(handle, port): (&HandleId, &Port)| {
            !port.is_unbound() && !self.retained.contains(handle)
        };
        assert!(!self.ports.iter().any(is_left), "a listener is left");
        self.disconnected += 1;
        self.awaited = false;
        self.stop_by = None;
    }

    fn check_worker_event(
        &mut self,
        level: Level,
        worker: WorkerId,
        event: &Event<Vec<NoLingerFd>>,
    ) {
        let state = self.master.state(worker);
        let flag = self.master.exited_after_disconnect(worker);
        let is_connected = self.master.is_connected(worker);
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        let (status, is_raw) = (process.status(), process.is_raw());
        let life = match level {
            Level::Worker => &mut process.life[0],
            Level::Cluster => &mut process.life[1],
        };
        match event {
            Event::Setup | Event::Disconnected | Event::DetachedExit(_) => {
                unreachable!("no event of a worker")
            }
            Event::Fork => assert_eq!(*life, Life::Forked),
            Event::Online => {
                assert_eq!(*life, Life::Forked, "is online once");
                assert_eq!(state, Some(WorkerState::Online));
                *life = Life::Online;
            }
            Event::Listening(_) => {
                assert_eq!(*life, Life::Online);
                assert_eq!(state, Some(WorkerState::Listening));
            }
            // The driver writes a raw worker's bytes, so its messages are arbitrary and not
            // numbered.
            Event::Message { .. } if is_raw => assert_eq!(*life, Life::Online),
            Event::Message { bytes, .. } => {
                assert_eq!(*life, Life::Online);
                let number = number(bytes);
                let last = std::mem::replace(&mut process.received[0], number);
                assert!(process.is_liar || number == last + 1, "message {number}");
            }
            Event::Disconnect => {
                assert!(*life < Life::Disconnected, "disconnects once");
                assert_eq!(state, Some(WorkerState::Disconnected), "in the table");
                assert!(flag.is_some() && !is_connected);
                *life = Life::Disconnected;
            }
            Event::Exit(exit_report) => {
                assert_eq!(*life, Life::Disconnected, "disconnect comes before exit");
                assert_eq!(state, None, "no longer in the table");
                assert_eq!(Some(exit_report.status), status);
                *life = Life::Gone;
                self.referenced.remove(&worker);
            }
            Event::Error(error) => {
                assert_ne!(*life, Life::Gone, "exit is the last event");
                let is_accused = matches!(**error, Error::Frame { .. });
                assert!(
                    process.is_liar || !is_accused,
                    "an honest worker is accused"
                );
            }
        }
    }

    fn check_detached_event(
        &mut self,
        level: Level,
        process: WorkerId,
        event: &Event<Vec<NoLingerFd>>,
    ) {
        let state = self.detached[&process];
        assert_ne!(state, Detached::Gone, "exit is the last event");
        let is_error = matches!(event, Event::Error(_));
        if let Event::DetachedExit(status) = event {
            assert_eq!((level, state), (Level::Worker, Detached::Reaped(*status)));
            self.detached.insert(process, Detached::Gone);
            assert_eq!(self.master.state(process), None);
        } else {
            assert!(is_error, "{event:?} of a process that is no worker");
        }
    }
}

// Checks at the end of a run.
impl World {
    /// Checks conditions that hold once all processes have exited and no listener is retained.
    pub(crate) fn check_end(&self) {
        assert_eq!(self.disconnected, 1, "the callback of disconnect");
        assert!(
            !self.master.keeps_loop_alive(),
            "a process is waited for in vain"
        );
        let sizes = self.master.sizes();
        assert_eq!((sizes.processes, sizes.handles), (0, 0), "left behind");
        let mut detached = self.detached.values();
        assert!(detached.all(|process| *process == Detached::Gone));
        for process in self.processes.values() {
            assert!(process.has_gone(), "a worker's events are missing");
        }
        assert!(self.ports.values().all(Port::is_unbound));
        assert!(self.queues.is_empty(), "a queue is forgotten");
        assert!(self.held.is_empty(), "a held connection is forgotten");
        assert_eq!(sizes.held, 0, "a held connection is forgotten");
        let ledger = self.master.ledger();
        assert_eq!(ledger.in_flight(), 0);
        assert_eq!(self.master.policy(), self.config.policy);
        if !self.has_false_claims {
            assert_eq!(ledger.received, self.received, "received");
            let lost = ledger.dropped + ledger.closed_by_peer + ledger.expired + ledger.idle_closed;
            let lost = lost + ledger.passed;
            let is_exact = ledger.parked > 0 || self.lost == lost;
            assert!(is_exact, "{} closed connections: {ledger:?}", self.lost);
        }
    }

    /// Returns whether a client of a bound listener waits for the answer to a request.
    pub(crate) fn has_unanswered(&self) -> bool {
        let mut fates = self.fates.iter();
        fates.any(|fate| {
            let port = fate.port.and_then(|handle| self.ports.get(&handle));
            let is_bound = port.is_some_and(|port| !port.is_unbound());
            is_bound && fate.is_pending && !fate.is_closed && !fate.left
        })
    }

    /// Checks that each client of a bound listener has been served or has hung up.
    pub(crate) fn check_served(&self) {
        let is_bound = |handle| {
            self.ports
                .get(&handle)
                .is_some_and(|port| !port.is_unbound())
        };
        let mut closed = 0;
        for (client, fate) in self.fates.iter().enumerate() {
            if fate.left || !fate.has_sent || !fate.port.is_some_and(is_bound) {
                continue;
            }
            if fate.is_closed {
                closed += u64::from(!fate.served && !fate.is_in_worker);
            } else {
                let is_served = fate.served && !fate.is_pending;
                assert!(is_served, "client {client} is lost");
            }
        }
        // Allow for three kinds of unserved clients:
        //
        // - The connection was closed as idle just after the client had sent a request (`expired`,
        //   `idle_closed`).
        // - The connection was passed to the other master, which answers the request (`passed`).
        // - A hostile worker reported the connection as detached or parked before the worker took
        //   it from its queue (`early_reports`).
        let ledger = self.master.ledger();
        let closes = ledger.expired + ledger.idle_closed + ledger.passed;
        let is_allowed = closed <= closes + self.early_reports;
        assert!(is_allowed, "{closed} clients are lost");
    }
}

/// Returns the number in a message of the simulated application.
fn number(message: &[u8]) -> u32 {
    u32::from_le_bytes(message.try_into().expect("four bytes"))
}
