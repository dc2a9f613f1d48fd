//! Runs random schedules of a master that parks connections, passes them to another master, and
//! receives connections from a third one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use super::super::Resumed;
use super::*;
use crate::core::dispatch::Sequenced;
use crate::core::master::QueueState;
use crate::types::endpoint::{BindAddress, BindFlags, Endpoint, Kind};
use crate::types::handle::HandleKey;
use crate::types::policy::SchedulingPolicy;
use crate::types::user::User;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::ToMaster;

type Core = MasterCore<u32, ()>;

/// A worker that receives connections from its queue.
#[derive(Default)]
struct Worker {
    queue: VecDeque<Sequenced<HandOff<u32>>>,
    received: u64,
    /// The connections that the application has.
    new: Vec<u32>,
    held: Vec<ConnectionId>,
}

struct World {
    core: Core,
    handle: HandleId,
    workers: BTreeMap<WorkerId, Worker>,
    /// The master's copies.
    copies: BTreeSet<ConnectionId>,
    /// The connections that wait until they are passed.
    passing: VecDeque<ConnectionId>,
    backlog: u32,
    last_client: u32,
    passed: u64,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            core: Core::new(SchedulingPolicy::RoundRobin),
            handle: HandleId(0),
            workers: BTreeMap::new(),
            copies: BTreeSet::new(),
            passing: VecDeque::new(),
            backlog: 0,
            last_client: 0,
            passed: 0,
        };
        world.fork();
        world.fork();
        world
    }

    fn fork(&mut self) {
        let worker = self.core.next_worker_id().unwrap();
        self.core.forked(worker, User::default());
        self.core.frame(worker, ToMaster::Online);
        self.workers.insert(worker, Worker::default());
        let endpoint = Endpoint::new(Kind::Tcp, BindAddress::Port(1));
        let listen = ToMaster::Listen {
            request: 1,
            key: HandleKey { endpoint, index: 0 },
            flags: BindFlags::default(),
        };
        self.core.frame(worker, listen);
        self.act();
        self.report_idle(worker);
    }

    fn next_client(&mut self) -> u32 {
        self.last_client += 1;
        self.last_client
    }

    fn report_idle(&mut self, worker: WorkerId) {
        let Worker {
            received,
            new,
            held,
            ..
        } = &self.workers[&worker];
        let idle = ToMaster::Idle {
            handle: self.handle,
            received: *received,
            open: u32::try_from(new.len() + held.len()).unwrap(),
        };
        self.core.frame(worker, idle);
    }

    /// Carries out all actions, as the shell does.
    fn act(&mut self) {
        while let Some(action) = self.core.next_action() {
            match action {
                Action::Bind { handle, .. } => {
                    self.handle = handle;
                    self.core.bound(handle, Ok(None));
                }
                Action::Accept { handle, at_most } => {
                    for _ in 0..u64::from(self.backlog).min(at_most) {
                        self.backlog -= 1;
                        let client = self.next_client();
                        self.core.accepted(handle, client);
                    }
                    match self.backlog {
                        0 => self.core.backlog_emptied(handle),
                        _ => self.core.accept_done(handle),
                    }
                }
                Action::Dispatch {
                    worker, connection, ..
                } => {
                    let queue = &mut self.workers.get_mut(&worker).unwrap().queue;
                    queue.push_back(connection);
                }
                Action::Reclaim {
                    handle,
                    worker,
                    at_most,
                } => {
                    let queue = &mut self.workers.get_mut(&worker).unwrap().queue;
                    let count = queue.len().min(at_most);
                    let reclaimed = queue.drain(..count).collect();
                    let state = match queue.is_empty() {
                        true => QueueState::Empty,
                        false => QueueState::PerhapsMore,
                    };
                    self.core.reclaimed(handle, worker, reclaimed, state);
                }
                Action::CountQueued { handle, worker } => {
                    let queued = self.workers[&worker].queue.len() as u64;
                    self.core.counted(handle, worker, queued);
                }
                Action::CloseQueue { handle, worker } => {
                    let worker_queue = &mut self.workers.get_mut(&worker).unwrap().queue;
                    let queue = std::mem::take(worker_queue).into();
                    self.core.queue_closed(handle, worker, queue);
                }
                Action::CloseChannel { worker } => self.core.channel_closed(worker),
                Action::Hold { id, .. } => assert!(self.copies.insert(id)),
                Action::Pass { id, connection, .. } => {
                    let is_new = self.copies.insert(id);
                    assert_eq!(is_new, connection.is_some());
                    assert!(!self.passing.contains(&id), "passed twice");
                    self.passing.push_back(id);
                }
                Action::CloseHeld { id } => assert!(self.copies.remove(&id)),
                _ => {}
            }
        }
        while self.core.next_event().is_some() {}
        let ledger = self.core.ledger();
        assert_eq!(ledger.in_flight(), self.core.in_flight(), "{ledger:?}");
        assert_eq!(ledger.passed, self.passed);
        assert_eq!(self.core.parked.count_passing(), self.passing.len());
        if self.core.parked.keeper == Keeper::OtherMaster {
            assert_eq!(self.core.parked.count_idle(), 0, "idle and not passed");
            let mut waiting = self.core.waiting();
            assert!(waiting.all(|hand_off| matches!(hand_off, HandOff::New(_))));
        }
    }

    fn step(&mut self, step: u8, pick: u8) {
        let pick = usize::from(pick);
        let worker = self.workers.keys().nth(pick % 2).copied();
        let copy = self.copies.iter().nth(pick % self.copies.len().max(1));
        let copy = copy.copied();
        match (step, worker, copy) {
            (0..3, ..) => {
                self.backlog += 1;
                self.core.readable(self.handle);
            }
            (3..9, Some(id), _) => self.receive(id),
            (9..12, Some(id), _) => {
                let worker = self.workers.get_mut(&id).unwrap();
                if let Some(client) = worker.new.pop() {
                    self.core.park(id, self.handle, client, 1);
                }
            }
            (12..15, Some(id), _) => {
                let worker = self.workers.get_mut(&id).unwrap();
                if let Some(connection) = worker.held.pop() {
                    let frame = match pick % 4 {
                        0 => ToMaster::Detach { connection },
                        _ => ToMaster::ParkAgain { connection },
                    };
                    self.core.frame(id, frame);
                }
            }
            (15..19, _, Some(copy)) => self.core.data_arrived(copy),
            (19, _, Some(copy)) => self.core.idle_hung_up(copy),
            (20, ..) => self.core.pass_parked(),
            (21..24, ..) => {
                if let Some(id) = self.passing.pop_front() {
                    self.passed += 1;
                    self.core.passed(id);
                }
            }
            (24, ..) if pick % 4 == 0 => {
                self.passing.clear();
                self.core.end_passing();
            }
            (25, ..) => {
                let client = self.next_client();
                let handle = (pick % 3 != 0).then_some(self.handle);
                let history = ParkHistory {
                    times: 3,
                    by: Some(User::default()),
                };
                self.core.receive_parked(handle, client, history);
            }
            (26, Some(id), _) if pick % 4 == 0 => {
                self.replace(id);
            }
            (27, Some(id), _) if pick % 4 == 0 => {
                self.core.frame(
                    id,
                    ToMaster::Release {
                        handle: self.handle,
                    },
                );
                self.act();
                self.replace(id);
            }
            _ => {}
        }
        self.act();
    }

    /// Makes a worker receive a connection, or report that its queue is empty.
    fn receive(&mut self, id: WorkerId) {
        let worker = self.workers.get_mut(&id).unwrap();
        let Some(Sequenced { connection, .. }) = worker.queue.pop_front() else {
            return self.report_idle(id);
        };
        worker.received += 1;
        match connection {
            HandOff::New(client) => worker.new.push(client),
            HandOff::Held(Resumed { connection, .. }) => worker.held.push(connection),
        }
    }

    /// Kills a worker, and forks another one.
    fn replace(&mut self, id: WorkerId) {
        self.core.exited(id, ExitStatus::from_raw(9));
        self.act();
        self.workers.remove(&id);
        self.fork();
    }
}

/// Number of random schedules. Miri needs seconds for each.
const SCHEDULES: u64 = if cfg!(miri) { 2 } else { 500 };

#[test]
fn random_schedules_keep_the_ledger_and_pass_all_idle_connections() {
    let mut passed = 0;
    for seed in 0..SCHEDULES {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut world = World::new();
        for _ in 0..400 {
            world.step(random.u8(..28), random.u8(..));
        }
        world.core.disconnect_all();
        world.act();
        let workers: Vec<_> = world.workers.keys().copied().collect();
        for worker in workers {
            world.core.exited(worker, ExitStatus::from_raw(9));
            world.act();
        }
        while let Some(id) = world.passing.pop_front() {
            world.passed += 1;
            world.core.passed(id);
        }
        world.act();
        assert_eq!(world.core.ledger().in_flight(), 0, "seed {seed}");
        assert!(world.copies.is_empty(), "seed {seed}: {:?}", world.copies);
        passed += world.passed;
    }
    assert!(passed > 10 * SCHEDULES, "{passed} connections");
}
