//! Implements the `master_input` target. An input is a script for the master, a hostile worker and
//! a well-behaved worker (`honest` in the code).
//!
//! The hostile worker is raw: it runs no code of this crate, and the script writes its bytes into
//! the master's inbox for the worker. The well-behaved worker runs this crate, and its application
//! serves clients. The script also controls the clients, the master's application, the clock, and
//! the operations that fail. After each step, the master has carried out all its actions.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use super::{Input, descriptors};
use crate::core::worker::{ListenStatus, ListenerId};
use crate::error::Error;
use crate::sim::kernel::socket::{Port, Queued, endpoint};
use crate::sim::kernel::worker::requested_parking;
use crate::sim::kernel::{Call, Config, Ending, Fact, Failure, Master, ROUNDS, World, nth};
use crate::types::connection_id::ConnectionId;
use crate::types::endpoint::{BindFlags, Kind};
use crate::types::errno;
use crate::types::policy::SchedulingPolicy;
use crate::types::protocol::MAX_BODY;
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;
use crate::wire::channel::inbox::{MAX_EARLY_FDS, READ_SIZE};
use crate::wire::frame::header::{BATCH_OFFSET, HEADER, MAX_BATCH};
use crate::wire::frame::{Bound, Frame, HandleId, HandleKey, ToMaster, ToWorker};

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
/// The maximum number of listeners of the well-behaved worker's application.
const MAX_HONEST_LISTENERS: usize = 4;

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

/// The state of the hostile worker.
struct Hostile {
    id: WorkerId,
    is_online: bool,
    /// For each endpoint number, the number of times that `cooperate` has requested the endpoint.
    requested: BTreeMap<u32, u32>,
    listeners: BTreeSet<HandleId>,
    /// The connections that the worker has received and not closed, each with its listener.
    received: Vec<(HandleId, Queued)>,
}

impl Hostile {
    fn new(id: WorkerId) -> Self {
        Self {
            id,
            is_online: false,
            requested: BTreeMap::new(),
            listeners: BTreeSet::new(),
            received: Vec::new(),
        }
    }
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
            if self.world.deliver_next().is_none() {
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
}

// The hostile worker.
impl Script {
    fn hostile_reads(&mut self) {
        while let Some(frame) = self.world.raw_reads(self.hostile.id) {
            if let ToWorker::Reply { result, .. } = frame {
                match result {
                    Ok(Bound { handle, .. }) => drop(self.hostile.listeners.insert(handle)),
                    Err(errno) => self.denied += usize::from(errno == errno::EMFILE),
                }
            }
        }
    }

    /// Writes bytes and `fds` descriptors from the hostile worker to the master, which processes
    /// them. `lost_fds` tells the master that the kernel has dropped more descriptors.
    fn write(&mut self, bytes: &[u8], fds: usize, lost_fds: bool) {
        let id = self.hostile.id;
        let process = self.world.process(id);
        if !process.master_end || !process.worker_end {
            return;
        }
        let inbox = process.inbox.as_mut().expect("a raw worker");
        inbox.push_fds(descriptors(fds), lost_fds);
        inbox.push(bytes);
        while self.world.master_reads(id) {
            self.settle();
        }
        self.settle();
        let process = self.world.process(id);
        let size = process.inbox.as_ref().expect("a raw worker").size();
        assert!(size.bytes <= HEADER + MAX_BODY + READ_SIZE);
        assert!(!process.master_end || size.fds <= MAX_EARLY_FDS + MAX_BATCH);
    }

    /// Writes a well-formed frame from the hostile worker to the master, in one or two pieces.
    fn write_frame(&mut self, input: &mut Input<'_>) {
        let frame = self.invent(input);
        let (fds, lost_fds) = match frame {
            ToMaster::Message(_) => {
                let choices = [(0, false), (1, false), (3, false), (1, true)];
                choices[usize::from(input.byte()) % 4]
            }
            ToMaster::Park { .. } => [(1, false), (0, true)][usize::from(input.byte()) % 8 / 7],
            ToMaster::Online
            | ToMaster::Listen { .. }
            | ToMaster::Listening { .. }
            | ToMaster::Idle { .. }
            | ToMaster::Release { .. }
            | ToMaster::DisconnectRequest
            | ToMaster::Pause { .. }
            | ToMaster::ParkAgain { .. }
            | ToMaster::Detach { .. } => (0, false),
        };
        let mut bytes = Vec::new();
        let announced = fds + usize::from(lost_fds);
        frame.encode(announced, &mut bytes);
        bytes[BATCH_OFFSET] = u8::try_from(announced).unwrap_or(0);
        let at = usize::from(input.byte()).min(bytes.len());
        let (first, second) = bytes.split_at(at);
        self.write(first, fds, lost_fds);
        self.write(second, 0, false);
    }

    fn invent(&self, input: &mut Input<'_>) -> ToMaster {
        let choice = input.byte();
        let handle = HandleId(u32::from(choice / 8));
        let received = self.world.count_received(handle, self.hostile.id);
        match choice % 8 {
            0 => ToMaster::Online,
            1 => ToMaster::Listen {
                request: input.number(),
                key: HandleKey {
                    endpoint: endpoint(input.number()),
                    index: input.number(),
                },
                flags: BindFlags::default(),
            },
            2 => ToMaster::Listening { handle },
            3 => ToMaster::Idle {
                handle,
                received: input.long(),
                open: input.number(),
            },
            // Add the input's number to the real count of received connections. The master accepts
            // any sum up to the number of dispatched connections, and would reject most arbitrary
            // numbers.
            4 => ToMaster::Idle {
                handle,
                received: received.saturating_add(input.long()),
                open: input.number(),
            },
            5 => ToMaster::Release { handle },
            6 => ToMaster::Pause { handle },
            _ if choice == 255 => ToMaster::DisconnectRequest,
            _ if choice == 15 => ToMaster::Park {
                handle: HandleId(input.number()),
                parked: 1,
            },
            _ if choice == 23 => ToMaster::ParkAgain {
                connection: self.connection(input.number()),
            },
            _ if choice == 31 => ToMaster::Detach {
                connection: self.connection(input.number()),
            },
            _ => ToMaster::Message(vec![0; choice.into()]),
        }
    }

    /// Returns the id `number`. If `number` is 200 or more, returns instead the id of a connection
    /// in one of the hostile worker's queues, if there is one.
    fn connection(&self, number: u32) -> ConnectionId {
        let queues = self.world.queues.iter();
        let own = queues.filter(|((_, worker), _)| *worker == self.hostile.id);
        let queued = own.flat_map(|(_, queue)| &queue.connections);
        let held = queued.filter_map(|queued| queued.resumed);
        let own = match number {
            200.. => nth(held, number.to_le_bytes()[0]),
            _ => None,
        };
        own.map_or(ConnectionId(number), |resumed| resumed.connection)
    }

    /// Makes the hostile worker park, close or keep each connection that it has received, as a
    /// well-behaved worker does. The client's number decides.
    fn dispose_of_received(&mut self) {
        for (handle, queued) in std::mem::take(&mut self.hostile.received) {
            let Queued {
                connection,
                resumed,
                ..
            } = queued;
            let frame = match (connection.client % 4, resumed) {
                (0, None) => continue,
                (0, Some(resumed)) => ToMaster::Detach {
                    connection: resumed.connection,
                },
                (1, _) => {
                    self.hostile.received.push((
                        handle,
                        Queued {
                            sequence: queued.sequence,
                            connection,
                            resumed,
                        },
                    ));
                    continue;
                }
                (_, Some(resumed)) => ToMaster::ParkAgain {
                    connection: resumed.connection,
                },
                (_, None) => {
                    let process = self.world.process(self.hostile.id);
                    process.to_park.push_back(connection);
                    ToMaster::Park { handle, parked: 1 }
                }
            };
            let fds = usize::from(matches!(frame, ToMaster::Park { .. }));
            let mut bytes = Vec::new();
            frame.encode(fds, &mut bytes);
            bytes[BATCH_OFFSET] = u8::try_from(fds).unwrap_or(0);
            self.write(&bytes, fds, false);
        }
    }

    /// Makes the hostile worker behave well, except that it may shut its own queue down.
    fn cooperate(&mut self, choice: u8) {
        let (id, kind, more) = (self.hostile.id, choice % 8, u32::from(choice / 8));
        let count = self.hostile.listeners.len().max(1);
        let mut listeners = self.hostile.listeners.iter();
        let listener = listeners.nth(more as usize % count).copied();
        let frame = match (kind, listener) {
            _ if !std::mem::replace(&mut self.hostile.is_online, true) => ToMaster::Online,
            (0, _) | (_, None) => {
                let requested = self.hostile.requested.entry(more).or_default();
                let index = *requested;
                *requested += 1;
                let endpoint = endpoint(more);
                ToMaster::Listen {
                    request: 1,
                    key: HandleKey { endpoint, index },
                    flags: BindFlags::default(),
                }
            }
            (1, Some(handle)) => {
                self.receive(handle);
                return;
            }
            (4, Some(handle)) => ToMaster::Pause { handle },
            (5, Some(handle)) if more % 4 == 3 => {
                self.hostile.listeners.remove(&handle);
                ToMaster::Release { handle }
            }
            (5, Some(handle)) if more % 4 == 2 => {
                if let Some(queue) = self.world.queues.get_mut(&(handle, id)) {
                    queue.is_shut = true;
                }
                return;
            }
            (2 | 3, Some(handle)) => {
                self.receive(handle);
                self.dispose_of_received();
                self.idle(handle)
            }
            (_, Some(handle)) => {
                while self.receive(handle) {}
                self.dispose_of_received();
                self.idle(handle)
            }
        };
        let mut bytes = Vec::new();
        frame.encode(0, &mut bytes);
        self.write(&bytes, 0, false);
    }

    fn receive(&mut self, handle: HandleId) -> bool {
        let id = self.hostile.id;
        if !self.world.processes[&id].is_alive() {
            return false;
        }
        let queued = self.world.receive_secretly(handle, id);
        let is_any = queued.is_some();
        let queued = queued.map(|queued| (handle, queued));
        self.hostile.received.extend(queued);
        is_any
    }

    /// Returns a truthful `Idle` frame.
    fn idle(&self, handle: HandleId) -> ToMaster {
        ToMaster::Idle {
            handle,
            received: self.world.count_received(handle, self.hostile.id),
            open: 0,
        }
    }

    fn close_hostile_channel(&mut self) {
        let id = self.hostile.id;
        if self.world.process(id).master_end {
            self.world.process(id).close_end();
            self.world.handle(Fact::End(id));
        }
    }

    fn exit_hostile(&mut self) {
        let id = self.hostile.id;
        if self.world.process(id).is_alive() {
            self.hostile.received.clear();
            self.world.exit(id, ExitStatus::from_raw(9));
            self.world.handle(Fact::Exit(id));
        }
    }

    /// Forks another hostile worker if the current one has exited and its channel is closed.
    fn replace_hostile(&mut self) {
        let process = &self.world.processes[&self.hostile.id];
        if !process.master_end && !process.is_alive() {
            self.hostile = Hostile::new(self.world.fork_raw());
        }
    }
}

// The well-behaved worker.
impl Script {
    fn honest_reads(&mut self) -> bool {
        let has_read = self.world.worker_reads(self.honest);
        self.world.flush(self.honest);
        self.run_honest();
        has_read
    }

    /// Runs the well-behaved worker's library, and resumes the application that blocks in `accept`.
    /// Repeats both as long as `accept` returns.
    fn run_honest(&mut self) {
        loop {
            self.world.run_worker(self.honest);
            if !self.world.try_blocking_accept(self.honest) {
                break;
            }
        }
    }

    /// Makes the well-behaved worker's application wait for events, unless it blocks in `accept`.
    /// Then makes the worker's poller report every watched listener, whether ready or not.
    fn poll_honest(&mut self) {
        let process = self.world.process(self.honest);
        if process.accepting.is_none() {
            process.core.waiting_for_events();
        }
        self.world.poll_listeners(self.honest);
        self.run_honest();
    }

    /// Makes the well-behaved worker's application use, open or close a listener, or close a
    /// connection.
    fn run_honest_application(&mut self, choice: u8) {
        let process = self.world.process(self.honest);
        let count = process.listeners.len();
        match choice % 8 {
            0 if count < MAX_HONEST_LISTENERS => {
                let endpoint = endpoint((choice / 8).into());
                let parking = requested_parking(self.parking);
                self.world.listen_with(self.honest, endpoint, parking);
            }
            1 => self.world.close_connection(self.honest, choice / 8),
            2 => self.world.park_connection(self.honest, choice / 8),
            3 => self.poll_honest(),
            4..=7 if count > 0 => {
                let listener = process.listeners[usize::from(choice / 8) % count];
                match process.core.listen_status(listener) {
                    ListenStatus::Pending => {}
                    ListenStatus::Failed(_) => self.world.drop_listener(self.honest, listener),
                    ListenStatus::Done(_) => self.use_listener(listener, choice),
                }
            }
            _ => {}
        }
        self.run_honest();
    }

    fn use_listener(&mut self, listener: ListenerId, choice: u8) {
        let process = self.world.process(self.honest);
        let core = &mut process.core;
        if core.is_datagram(listener) {
            return;
        }
        if choice >= 192 {
            let limit = (choice & 32 == 0).then_some(0);
            core.set_connection_limit(listener, limit);
        } else if choice >= 128 {
            if process.accepting != Some(listener) {
                self.world.drop_listener(self.honest, listener);
            }
        } else if choice % 8 == 4 {
            core.listening(listener);
        } else if choice % 8 == 5 {
            core.use_callback(listener);
        } else if process.accepting.is_none() && !core.has_callback(listener) {
            process.accepting = Some(listener);
        }
    }

    /// Delivers frames between the master and the well-behaved worker until none is in flight.
    fn exchange(&mut self) {
        loop {
            self.poll_honest();
            let has_received = self.world.master_receives(self.honest);
            self.settle();
            if !self.honest_reads() && !has_received {
                break;
            }
        }
    }
}

// The master's application, the system, the clients and the clock.
impl Script {
    fn call(&mut self, choice: u8) {
        let (hostile, honest) = (Some(self.hostile.id), Some(self.honest));
        let flag = choice & 32 != 0;
        let world = &mut self.world;
        match choice % 32 {
            0..=3 => world.call(Call::Disconnect, hostile, 0),
            4..=5 => world.call(Call::Kill, hostile, 0),
            6 => world.call(Call::Signal, hostile, 0),
            7..=10 => world.call(Call::CloseChannel, hostile, 0),
            11 if flag => world.call(Call::Ref, hostile, 0),
            11 => world.call(Call::Unref, hostile, 0),
            12..=14 => {
                // 32 is EPIPE: the peer has closed its end of the channel.
                let (worker, reason) = (hostile, io::Error::from_raw_os_error(32));
                world.report(|core| core.error(worker, Error::Channel { worker, reason }));
            }
            15..=16 => self.replace_hostile(),
            17 if flag && choice >= 128 => world.call(Call::UseScheduler, None, 0),
            17 if flag => world.call(Call::LimitParked, None, choice / 64),
            17 => world.report(Master::setup),
            18..=21 => self.sweep(choice / 64),
            22..=24 => {
                self.honest_is_dismissed = true;
                match choice % 32 {
                    22 => world.call(Call::Disconnect, honest, 0),
                    23 => world.disconnect_all(flag),
                    _ => world.call(Call::CloseChannel, honest, 0),
                }
            }
            25 => drop(world.failing.insert(Failure::Bind)),
            26 => drop(world.failing.insert(Failure::Accept)),
            27 => drop(world.failing.insert(Failure::Send)),
            28 => drop(world.failing.insert(Failure::Reclaim)),
            29 if flag => drop(world.failing.insert(Failure::Hold)),
            29 => drop(world.failing.insert(Failure::Share)),
            30 if flag => drop(world.failing.insert(Failure::Park)),
            30 => drop(world.failing.insert(Failure::Receive)),
            _ => {
                world.count_queues();
                self.settle();
                self.world.check_received();
            }
        }
    }

    /// Makes a quarter of the clients that wait in the master hang up.
    fn sweep(&mut self, quarter: u8) {
        self.world.sweep(usize::MAX, |client, fate| {
            fate.left || client % 4 == quarter.into()
        });
    }

    fn connect(&mut self, choice: u8, count: u8) {
        for _ in 0..count {
            self.world.connect(choice);
        }
        self.poll();
    }

    /// Makes a client send a request, connect silently or hang up, or advances the clock by 100
    /// seconds.
    fn client_event(&mut self, choice: u8) {
        let n = choice / 8;
        match choice % 8 {
            0..=1 => self.world.send_request(n),
            2..=4 => self.world.send_on_held(n),
            5 => self.world.connect_silently(n),
            6 => self.world.hang_up(n),
            // Exceed the default idle timeout, which is 60 seconds.
            _ => return self.pass_time(Time::from_secs(100)),
        }
        self.poll();
    }

    /// Makes the master's poller report ready listeners until no listener is ready.
    fn poll(&mut self) {
        let is_ready = |(_, port): &(&HandleId, &Port)| port.is_ready();
        while let Some((handle, _)) = self.world.ports.iter().find(is_ready) {
            self.world.handle(Fact::Readable(*handle));
            self.settle();
        }
        loop {
            let reported = self.world.reported_held().next();
            let Some(id) = reported else {
                return;
            };
            self.world.handle(Fact::Held(id));
            self.settle();
        }
    }

    fn pass(&mut self, millis: u8) {
        self.pass_time(Time::from_millis(millis.into()));
    }

    fn pass_time(&mut self, time: Time) {
        self.world.pass(time);
        self.run_honest();
        self.world.flush(self.honest);
        self.world.flush(self.hostile.id);
        // The events of one iteration may make something due at once, such as the sweep of a
        // listener that begins to drain. The next iteration must then be enough.
        for _ in 0..2 {
            self.world.handle(Fact::Time);
            self.settle();
        }
        let deadline = self.world.master.deadline();
        let is_later = |deadline| deadline > self.world.now();
        assert!(deadline.is_none_or(is_later), "the loop spins");
    }
}

// The end of a script.
impl Script {
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
