//! Simulates the master's shell, which carries out the actions of the master's core, and the
//! master's application, which calls the core.

use std::io;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use super::process::{Detached, Parcel, ProcessState};
use super::socket::{
    Client, Connection, Fate, Held, Location, Port, PortState, QUEUE_CAPACITY, Queue, Queued,
    endpoint,
};
use super::{BACKOFF, Fact, Failure, KNOWN, Master, World};
use crate::core::dispatch::{MAX_WINDOW, Sequenced};
use crate::core::master::{Action, Attachment, Handoff, Resumed};
use crate::error::{Error, SendError};
use crate::types::connection_id::ConnectionId;
use crate::types::endpoint::{Endpoint, Kind};
use crate::types::errno;
use crate::types::signal::Signal;
use crate::types::time::{Time, earlier};
use crate::types::worker_id::WorkerId;
use crate::wire::channel::inbox::Arrival;
use crate::wire::frame::{HandleId, ToMaster, ToWorker};

/// The maximum number of workers that are alive.
const MAX_WORKERS: usize = 5;
/// The maximum number of detached processes that are running.
const MAX_DETACHED: usize = 2;
/// The maximum number of connections that a single `Accept` action accepts.
const MAX_ACCEPTED: usize = 64;

/// A call by the master's application.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Fork,
    /// Starts a detached process.
    Detach,
    /// Makes `run` wait until a process exits.
    Ref,
    /// Makes `run` no longer wait for a process.
    Unref,
    Disconnect,
    DisconnectWithin,
    Kill,
    Signal,
    CloseChannel,
    Send,
    DisconnectAll,
    DisconnectAllWithin,
    /// Retains a listener. Opens it first if no suitable listener is open.
    Retain,
    /// Adopts a socket that was open before the master received it, and retains it.
    Adopt,
    /// Releases a retained listener.
    Release,
    /// Limits the number of connections that the master holds.
    LimitParked,
    /// Sets a scheduler.
    UseScheduler,
    /// Passes the parked connections to another master.
    PassParked,
    /// Ends the other master.
    EndSuccessor,
}

/// Returns the listener's handle if the attachment is a copy of a listener.
pub(crate) fn listener_of(attachment: Attachment) -> Option<HandleId> {
    match attachment {
        Attachment::Listener(handle) => Some(handle),
        Attachment::None | Attachment::Queue(_) | Attachment::Shard(..) => None,
    }
}

// Inputs and actions of the master's core.
impl World {
    /// Calls the master's core with an input, and checks that the number of resulting actions and
    /// events is bounded.
    pub(crate) fn report<T>(&mut self, fact: impl FnOnce(&mut Master) -> T) -> T {
        let before = self.master.sizes();
        let in_flight = usize::try_from(self.master.in_flight()).unwrap_or(usize::MAX);
        let connections = in_flight + self.count_queued();
        let result = fact(&mut self.master);
        let after = self.master.sizes();
        let workers = before.processes.max(after.processes).max(2);
        let handles = before.handles.max(after.handles);
        // Allow four actions for each pair of a listener and a worker, because one input may remove
        // every worker from every listener.
        let max = 16 + MAX_ACCEPTED + connections + self.held.len() + 4 * handles * workers;
        let actions = after.actions - before.actions;
        assert!(actions <= max, "{actions} actions after one fact");
        let events = after.events - before.events;
        assert!(events <= 6 * workers, "{events} events after one fact");
        result
    }

    /// Returns the number of connections in all queues.
    pub(crate) fn count_queued(&self) -> usize {
        let queues = self.queues.values();
        queues.map(|queue| queue.connections.len()).sum()
    }

    pub(crate) fn act(&mut self, action: Action<Client>) {
        match action {
            Action::Send {
                worker,
                frame,
                with,
            } => self.send(worker, frame, with),
            Action::Dispatch {
                handle,
                worker,
                connection,
                has_waited,
            } => self.dispatch(handle, worker, connection, has_waited),
            Action::Hold { id, connection } => self.hold_connection(id, connection),
            Action::AwaitData { id } => self.await_data(id),
            Action::CloseHeld { id } => self.close_held(id),
            Action::Adopt {
                handle,
                worker,
                connection,
                parked,
            } => self.give(handle, worker, connection, parked),
            Action::Reclaim {
                handle,
                worker,
                at_most,
            } => self.reclaim(handle, worker, at_most),
            Action::CountQueued { handle, worker } => self.count_queue(handle, worker),
            Action::Pass { id, connection, .. } => self.pass_connection(id, connection),
            Action::CloseQueue { handle, worker } => self.close_queue(handle, worker),
            Action::Bind {
                handle, endpoint, ..
            } => {
                let result = self.bind(handle, &endpoint);
                self.report(|core| core.bound(handle, result));
            }
            Action::Watch { handle } => self.port(handle).is_watched = true,
            Action::Unwatch { handle } => self.port(handle).is_watched = false,
            // Do nothing. Like a system without this option, the simulated kernel never defers a
            // connection.
            Action::DeferAccept { .. } => {}
            Action::RemoveFile { handle }
            | Action::AttachSynFilter { handle }
            | Action::StopListening { handle } => self.filter(handle),
            Action::DetachSynFilter { handle } => {
                assert!(!self.adopted.contains(&handle), "not only ours");
                let port = self.port(handle);
                assert_eq!(port.kind(), Kind::Tcp, "its file is gone");
                port.state = PortState::Open;
            }
            Action::Unbind { handle } => self.unbind(handle),
            // Do nothing. No simulated worker shuts a listener down, so there is no hang-up to
            // watch. No simulated worker blocks in a system call, so there is no call to unblock.
            Action::WatchHangUp { .. } | Action::Unblock { .. } => {}
            Action::BindShard { .. } | Action::SelectShards { .. } => {
                unreachable!("no policy of this kernel has shards")
            }
            Action::Accept { handle, at_most } => self.accept(handle, at_most),
            Action::CloseChannel { worker } => self.close_channel(worker),
            Action::DiscardChannel { worker } => {
                let process = self.process(worker);
                assert!(process.is_liar, "an honest worker's channel is discarded");
                process.counters.discarded += 1;
                process.close_master_end();
            }
            Action::Signal { worker, signal } => self.signal(worker, signal),
        }
    }
}

// Channels to workers.
impl World {
    fn send(&mut self, worker: WorkerId, frame: ToWorker, with: Attachment) {
        if let (
            ToWorker::Reply { request, .. },
            Attachment::Listener(handle) | Attachment::Queue(handle),
        ) = (&frame, with)
        {
            assert!(!self.port(handle).is_unbound());
            if self.failing.remove(&Failure::Share) {
                self.unshared.insert((handle, worker));
                let (request, error) = (*request, errno::EMFILE);
                return self.report(|core| core.share_failed(handle, worker, request, error));
            }
        }
        if let Attachment::Queue(handle) = with {
            self.unshared.remove(&(handle, worker));
            let previous = self.queues.insert((handle, worker), Queue::default());
            assert!(previous.is_none(), "a second queue for one worker");
        }
        let process = self.process(worker);
        assert!(process.master_end, "send on a closed channel");
        process.counters.answers += 1;
        process.down.queue(frame, with);
        self.unflushed.insert(worker);
    }

    /// Writes one frame to a worker. If the frame carries a descriptor and `failing` contains
    /// `Send`, nothing is written. If `failing` contains `Receive`, the descriptor is lost.
    pub(crate) fn master_writes(&mut self, worker: WorkerId) {
        let now = self.now;
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        if !process.master_end || process.master_backoff > now {
            return;
        }
        if !process.worker_end || process.is_shut {
            return process.down.break_off();
        }
        let carries = |parcel: &Parcel<_>| !matches!(parcel.with, Attachment::None);
        let first = process.down.outbox.front();
        if first.is_some_and(carries) && self.failing.remove(&Failure::Send) {
            process.master_backoff = now + BACKOFF;
            // 109 is ETOOMANYREFS on most targets: too many descriptors are in flight.
            let reason = io::Error::from_raw_os_error(109);
            let worker = Some(worker);
            return self.report(|core| core.error(worker, Error::Exhausted { worker, reason }));
        }
        let failing = &mut self.failing;
        let written = process.down.write(|parcel| {
            if carries(parcel) && failing.remove(&Failure::Receive) {
                parcel.with = Attachment::None;
                parcel.lost_fd = true;
            }
        });
        if written {
            self.unflushed.insert(worker);
        }
    }

    /// Requests that the master write to a worker, if frames are queued and the channel has space.
    pub(crate) fn flush(&mut self, worker: WorkerId) {
        if self.process(worker).down.can_write() {
            self.unflushed.insert(worker);
        }
    }

    /// Reads and processes one frame from a worker. Returns whether there was a frame.
    pub(crate) fn master_reads(&mut self, worker: WorkerId) -> bool {
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        if !process.master_end {
            return false;
        }
        let arrival = match &mut process.inbox {
            Some(inbox) => inbox.next().transpose(),
            None => process.up.wire.pop_front().map(|parcel| {
                process.to_park.extend(parcel.connection);
                parcel.frame.map(|frame| Arrival {
                    frame,
                    fds: Vec::new(),
                    lost_fds: false,
                    is_last: process.up.wire.is_empty(),
                })
            }),
        };
        match arrival {
            None => return false,
            Some(Ok(arrival)) => self.process_frame(worker, arrival),
            Some(Err(error)) => {
                self.report(|core| core.violation(worker, error));
                assert!(!self.master.is_connected(worker));
            }
        }
        true
    }

    /// Reads one frame from a worker, or the end of its channel. Returns whether there was a frame.
    pub(crate) fn master_receives(&mut self, worker: WorkerId) -> bool {
        let has_read = self.master_reads(worker);
        let process = &self.processes[&worker];
        let is_over = !process.worker_end || process.is_shut;
        if !has_read && process.master_end && is_over {
            self.handle(Fact::End(worker));
        }
        has_read
    }

    fn process_frame(&mut self, worker: WorkerId, arrival: Arrival<ToMaster>) {
        let Arrival {
            frame,
            fds,
            lost_fds,
            ..
        } = arrival;
        if lost_fds {
            let worker = Some(worker);
            self.report(|core| core.error(worker, Error::no_descriptors(worker)));
        }
        self.process(worker).counters.frames += 1;
        if let ToMaster::Idle {
            handle, received, ..
        } = frame
        {
            self.check_claim(handle, worker, received);
        }
        match frame {
            ToMaster::Message(bytes) => self.report(|core| core.message(worker, bytes, fds)),
            ToMaster::Park { handle, parked } => {
                let is_lost = self.processes[&worker].is_raw() && fds.is_empty();
                self.read_parked(worker, handle, parked, is_lost);
            }
            frame @ (ToMaster::Online
            | ToMaster::Listen { .. }
            | ToMaster::Listening { .. }
            | ToMaster::Idle { .. }
            | ToMaster::Release { .. }
            | ToMaster::DisconnectRequest
            | ToMaster::Pause { .. }
            | ToMaster::ParkAgain { .. }
            | ToMaster::Detach { .. }) => {
                self.note_report(worker, &frame);
                self.report(|core| core.frame(worker, frame));
            }
        }
    }

    /// Reads a connection that a worker parks. If the connection `is_lost`, or `failing` contains
    /// `Park`, the master has no free descriptor number for it.
    fn read_parked(&mut self, worker: WorkerId, handle: HandleId, parked: u32, is_lost: bool) {
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        let connection = process.to_park.pop_front();
        if self.failing.remove(&Failure::Park) || is_lost {
            let error = Error::no_descriptors(Some(worker));
            self.report(|core| core.error(Some(worker), error));
            let frame = ToMaster::Park { handle, parked };
            return self.report(|core| core.frame(worker, frame));
        }
        assert!(connection.is_some() || process.is_liar, "parks nothing");
        let connection = connection.unwrap_or_else(|| self.own_connection());
        self.report(|core| core.park(worker, handle, connection, parked));
    }

    /// Returns a connection to a client that is a worker itself. The client has sent something.
    fn own_connection(&mut self) -> Client {
        let client = u32::try_from(self.fates.len()).expect("few clients");
        self.served += 1;
        self.fates.push(Fate {
            served: true,
            has_sent: true,
            is_pending: client % 2 == 0,
            left: client % 8 == 7,
            ..Fate::default()
        });
        Connection::new(client, &self.closed)
    }

    /// Records a worker's report about a connection that the master holds, before the master
    /// processes the report.
    fn note_report(&mut self, worker: WorkerId, frame: &ToMaster) {
        let (ToMaster::Detach { connection } | ToMaster::ParkAgain { connection }) = frame else {
            return;
        };
        let queues = self.queues.iter();
        let own = queues.filter(|((_, of), _)| *of == worker);
        let mut queued = own.flat_map(|(_, queue)| &queue.connections);
        let is_early = queued.any(|queued| {
            let id = queued.resumed.map(|resumed| resumed.connection);
            id == Some(*connection)
        });
        self.early_reports += u64::from(is_early);
        let held = self.held.get_mut(connection);
        let held = held.filter(|held| held.location == Location::Worker(worker));
        if let (ToMaster::Detach { .. }, Some(held)) = (frame, held) {
            held.location = Location::Detached;
        }
    }

    pub(crate) fn master_reads_end(&mut self, worker: WorkerId) {
        self.process(worker).close_master_end();
        self.report(|core| core.channel_closed(worker));
    }

    /// Closes a worker's channel, as the shell does. The master first processes the frames that the
    /// worker has written, until it has read all of them or has disconnected the worker.
    fn close_channel(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        process.is_shut = true;
        process.down.break_off();
        while self.master_reads(worker) && self.master.is_connected(worker) {}
        self.master_reads_end(worker);
    }

    fn signal(&mut self, worker: WorkerId, signal: Signal) {
        let status = ExitStatus::from_raw(signal.number());
        if let Some(detached) = self.detached.get(&worker) {
            let may_signal = self.signalled.contains(&worker);
            assert!(may_signal, "a signal that the application did not send");
            match detached {
                Detached::Running | Detached::Zombie(_) => self.end_detached(worker, status),
                Detached::Reaped(_) | Detached::Gone => panic!("signal to a reaped pid"),
            }
            return;
        }
        let process = self.process(worker);
        assert!(!process.is_reaped(), "signal to a reaped pid");
        match &mut process.state {
            // A raw worker ignores signals, because the driver decides when it exits.
            _ if process.inbox.is_some() => {}
            ProcessState::Stopped { pending } if signal != Signal::KILL => *pending = Some(signal),
            ProcessState::Running | ProcessState::Stopped { .. } => self.exit(worker, status),
            ProcessState::Zombie(_) | ProcessState::Reaped(_) => {}
        }
    }
}

// Opening and closing listeners.
impl World {
    fn port(&mut self, handle: HandleId) -> &mut Port {
        let port = self.ports.get_mut(&handle).expect("an open listener");
        assert!(!port.is_unbound(), "the listener is closed");
        port
    }

    fn filter(&mut self, handle: HandleId) {
        let is_ours = !self.retained.contains(&handle) && !self.adopted.contains(&handle);
        assert!(is_ours, "not only ours");
        self.port(handle).state = PortState::Filtered;
    }

    fn bind(&mut self, handle: HandleId, endpoint: &Endpoint) -> Result<Option<SocketAddr>, i32> {
        let is_in_use = self.ports.values().any(|port| port.occupies(endpoint));
        if is_in_use || self.failing.remove(&Failure::Bind) {
            return Err(errno::EADDRINUSE);
        }
        assert!(handle.0 > self.last_port, "bound twice");
        self.last_port = handle.0;
        self.ports.insert(handle, Port::new(endpoint.clone()));
        Ok(endpoint.address())
    }

    fn unbind(&mut self, handle: HandleId) {
        assert!(!self.retained.contains(&handle), "the application has it");
        let port = self.port(handle);
        port.state = PortState::Unbound;
        port.is_watched = false;
        self.forget_port(handle);
    }

    /// Removes a listener and its backlog if no process has a descriptor of the listener.
    pub(crate) fn forget_port(&mut self, handle: HandleId) {
        let is_unbound = self.ports.get(&handle).is_some_and(Port::is_unbound);
        let has_copy = |process: &super::Process| {
            let mut travelling = process.down.parcels();
            process.shared.values().any(|shared| *shared == handle)
                || travelling.any(|parcel| listener_of(parcel.with) == Some(handle))
        };
        if is_unbound && !self.processes.values().any(has_copy) {
            self.ports.remove(&handle);
        }
    }

    fn accept(&mut self, handle: HandleId, at_most: u64) {
        assert!(at_most <= MAX_ACCEPTED as u64);
        assert!(self.master.master_accepts(handle), "workers accept");
        if self.failing.remove(&Failure::Accept) {
            let error = io::Error::from_raw_os_error(errno::EMFILE);
            return self.report(|core| core.accept_failed(handle, error));
        }
        for _ in 0..at_most {
            let Some(client) = self.port(handle).backlog.pop_front() else {
                return self.report(|core| core.drained(handle));
            };
            let connection = Connection::new(client, &self.closed);
            self.report(|core| core.accepted(handle, connection));
        }
        self.report(|core| core.accept_done(handle));
    }
}

// Connections that the master holds.
impl World {
    /// Returns whether the client of a connection on its way to a worker has hung up.
    pub(crate) fn is_gone(&self, handoff: &Handoff<Client>) -> bool {
        let client = match handoff {
            Handoff::New(connection) => Some(connection.client),
            Handoff::Held(Resumed { connection, .. }) => {
                self.held.get(connection).and_then(Held::client)
            }
        };
        client.is_none_or(|client| self.fates[client as usize].left)
    }

    /// Carries out `Action::Hold`: stores the connection and marks it as waiting for data. If
    /// `failing` contains `Hold`, reports instead that it cannot be watched.
    fn hold_connection(&mut self, id: ConnectionId, connection: Client) {
        let is_failing = self.failing.remove(&Failure::Hold);
        let held = Held {
            copy: (!is_failing).then_some(connection),
            is_awaited: !is_failing,
            is_unwatched: is_failing,
            location: Location::Master,
            since: self.now,
        };
        let previous = self.held.insert(id, held);
        assert!(previous.is_none(), "a second connection with one number");
        assert!(self.held.len() <= self.parked_limit_max, "holds too many");
        if is_failing {
            // Allow for one unexplained close (see `check_closing`). If the master has accepted
            // more connections at once than it may hold, it may already have given this number to
            // another connection, and `not_held` closes that one.
            self.failed_holds += 1;
            self.report(|core| core.not_held(id));
        }
    }

    fn await_data(&mut self, id: ConnectionId) {
        let now = self.now;
        let held = self.held.get_mut(&id).expect("a held connection");
        held.location = Location::Master;
        held.since = now;
        self.watch_held(id);
    }

    /// Makes the poller watch a held connection. If `failing` contains `Hold`, this fails.
    fn watch_held(&mut self, id: ConnectionId) {
        let is_failing = self.failing.remove(&Failure::Hold);
        let held = self.held.get_mut(&id).expect("a held connection");
        held.is_awaited = !is_failing;
        held.is_unwatched = is_failing;
        if is_failing {
            self.report(|core| core.not_held(id));
        }
    }

    /// Puts a connection into the stream to the other master.
    fn pass_connection(&mut self, id: ConnectionId, connection: Option<Client>) {
        if connection.is_some() {
            let held = Held {
                copy: connection,
                is_awaited: false,
                is_unwatched: false,
                location: Location::Master,
                since: self.now,
            };
            let previous = self.held.insert(id, held);
            assert!(previous.is_none(), "a second connection with one number");
            assert!(self.held.len() <= self.parked_limit_max, "holds too many");
        }
        let held = self.held.get_mut(&id).expect("a held connection");
        held.location = Location::Master;
        if held.copy.is_none() {
            self.report(|core| core.not_passed(id));
        } else if self.has_successor {
            assert!(!self.passing.contains(&id), "passed twice");
            self.passing.push_back(id);
        }
    }

    /// Makes the other master read a connection from the stream.
    pub(super) fn successor_reads(&mut self) {
        if let Some(id) = self.passing.pop_front() {
            let held = self.held.get_mut(&id).expect("a held connection");
            held.location = Location::Detached;
            self.passed.extend(held.client());
            self.report(|core| core.passed(id));
        }
    }

    fn close_held(&mut self, id: ConnectionId) {
        let held = self.held.remove(&id).expect("a held connection");
        self.check_closing(&held);
    }

    /// Makes the master handle a held connection that its poller has reported, as the shell does.
    /// The event may belong to an earlier connection with the same number.
    pub(crate) fn held_ready(&mut self, id: ConnectionId) {
        let Some(held) = self.held.get_mut(&id) else {
            return;
        };
        held.is_awaited = false;
        let Some(client) = held.client() else {
            return;
        };
        let fate = self.fates[client as usize];
        if fate.is_pending {
            self.report(|core| core.data_arrived(id));
        } else if fate.left {
            self.report(|core| core.idle_hung_up(id));
        } else {
            self.watch_held(id);
        }
    }
}

/// The connections that the master has reclaimed from a queue.
type Reclaimed = Vec<Sequenced<Handoff<Client>>>;

// Workers' queues.
impl World {
    fn dispatch(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        connection: Sequenced<Handoff<Client>>,
        has_waited: bool,
    ) {
        if has_waited && self.is_gone(&connection.connection) {
            return self.report(|core| core.hung_up(handle, worker, connection.connection));
        }
        let is_exhausted = self.failing.remove(&Failure::Send);
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        let queue = self.queues.get_mut(&(handle, worker));
        let is_unshared = self.unshared.contains(&(handle, worker));
        assert!(queue.is_some() || is_unshared, "dispatched to no queue");
        let has_space = |queue: &&mut Queue| {
            !is_exhausted && !queue.is_shut && queue.connections.len() < QUEUE_CAPACITY
        };
        let Some(queue) = queue.filter(has_space) else {
            return self
                .report(|core| core.not_dispatched(handle, worker, connection, is_exhausted));
        };
        let (client, resumed) = match connection.connection {
            Handoff::New(client) => (client, None),
            Handoff::Held(resumed) => {
                let held = self
                    .held
                    .get_mut(&resumed.connection)
                    .expect("a held connection");
                held.location = Location::Worker(worker);
                let copy = held.copy.as_ref().expect("a copy");
                (Client::clone(copy), Some(resumed))
            }
        };
        queue.connections.push_back(Queued {
            sequence: connection.sequence,
            connection: client,
            resumed,
        });
        process.counters.dispatched += 1;
        let is_trusted = !process.is_liar || !self.has_false_claims;
        let is_within = queue.connections.len() <= MAX_WINDOW as usize;
        assert!(is_within || !is_trusted, "dispatched too far ahead");
    }

    /// Reclaims at most `at_most` connections from a queue. Returns the connections, and whether
    /// the queue was found empty. If `failing` contains `Reclaim`, the second value is `None`.
    /// Returns `None` if the queue does not exist.
    fn take_back(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
        at_most: usize,
    ) -> Option<(Reclaimed, Option<bool>)> {
        let is_failing = self.failing.remove(&Failure::Reclaim);
        let queue = self.queues.get_mut(&(handle, worker))?;
        let queued = queue.connections.len();
        let (count, is_empty) = if is_failing {
            (at_most.min(queued / 2), None)
        } else {
            (at_most.min(queued), Some(at_most > queued))
        };
        let reclaimed: Vec<_> = queue.connections.drain(..count).collect();
        for resumed in reclaimed.iter().filter_map(|queued| queued.resumed) {
            let held = self.held.get_mut(&resumed.connection);
            if let Some(held) = held.filter(|held| held.location == Location::Worker(worker)) {
                held.location = Location::Master;
            }
        }
        let reclaimed = reclaimed.into_iter().map(Queued::reclaim).collect();
        self.process(worker).counters.reclaimed += count;
        Some((reclaimed, is_empty))
    }

    fn reclaim(&mut self, handle: HandleId, worker: WorkerId, at_most: usize) {
        let Some((reclaimed, is_empty)) = self.take_back(handle, worker, at_most) else {
            return;
        };
        if is_empty.is_none() {
            self.report(|core| core.cannot_reclaim(handle));
        }
        let is_empty = is_empty == Some(true);
        self.report(|core| core.reclaimed(handle, worker, reclaimed, is_empty));
    }

    fn count_queue(&mut self, handle: HandleId, worker: WorkerId) {
        let queue = self.queues.get(&(handle, worker));
        if let Some(queue) = queue.filter(|_| self.config.counts_queues) {
            let queued = queue.connections.len() as u64;
            self.report(|core| core.counted(handle, worker, queued));
        }
    }

    /// Reclaims all connections in a queue, and closes the queue. If reclaiming fails, schedules
    /// another attempt.
    pub(crate) fn close_queue(&mut self, handle: HandleId, worker: WorkerId) {
        match self.take_back(handle, worker, usize::MAX) {
            Some((reclaimed, None)) => {
                self.unclosed.push((handle, worker));
                self.closes_at.get_or_insert(self.now + BACKOFF);
                self.report(|core| core.reclaimed(handle, worker, reclaimed, false));
            }
            outcome => {
                self.queues.remove(&(handle, worker));
                let reclaimed = outcome.map(|(reclaimed, _)| reclaimed).unwrap_or_default();
                self.report(|core| core.queue_closed(handle, worker, reclaimed));
            }
        }
    }

    /// Receives the first connection in the worker's queue.
    pub(crate) fn receive(&mut self, handle: HandleId, worker: WorkerId) -> Option<Queued> {
        let queue = self.queues.get_mut(&(handle, worker))?;
        let queued = queue.connections.pop_front()?;
        queue.received += 1;
        self.received += 1;
        Some(queued)
    }

    /// Receives the first connection in the worker's queue, without the knowledge of the worker's
    /// core.
    pub(crate) fn receive_secretly(
        &mut self,
        handle: HandleId,
        worker: WorkerId,
    ) -> Option<Queued> {
        let queued = self.receive(handle, worker)?;
        let parked = queued.resumed.map_or(0, |resumed| resumed.parked);
        self.mark_served(queued.connection.client, parked, queued.resumed.is_some());
        self.process(worker).counters.received += 1;
        Some(queued)
    }

    /// Returns the number of connections that a worker has received from its queue.
    pub(crate) fn count_received(&self, handle: HandleId, worker: WorkerId) -> u64 {
        let queue = self.queues.get(&(handle, worker));
        queue.map_or(0, |queue| queue.received)
    }

    /// Reports the length of every queue to the master's core.
    pub(crate) fn count_queues(&mut self) {
        let queues: Vec<_> = self.queues.keys().copied().collect();
        for (handle, worker) in queues {
            self.count_queue(handle, worker);
        }
    }
}

// Calls by the master's application.
impl World {
    /// Calls the master on behalf of its application. `process` is the worker or detached process
    /// that the call concerns, if any. `n` selects the endpoint, the listener or the time limit of
    /// the call.
    pub(crate) fn call(&mut self, call: Call, process: Option<WorkerId>, n: u8) {
        self.master.set_time(self.now);
        let within = Time::from_millis(u64::from(n) * 4);
        let by = |deadline: Option<Time>, now: Time| earlier(deadline, Some(now + within));
        match (call, process) {
            (Call::Fork, _) => {
                if self.processes.values().filter(|p| p.is_alive()).count() < MAX_WORKERS {
                    self.fork();
                }
            }
            (Call::Detach, _) => {
                if self.detached.values().filter(|d| d.is_running()).count() < MAX_DETACHED {
                    self.detach();
                }
            }
            (Call::DisconnectAll, _) => self.disconnect_all(true),
            (Call::DisconnectAllWithin, _) => {
                self.awaited = true;
                self.stop_by = by(self.stop_by, self.now);
                self.report(|core| core.disconnect_all_within(within));
            }
            // Retain a listener on any port, on a fixed port, or at a path.
            (Call::Retain, _) => self.retain(&endpoint([0, 8, 4][usize::from(n % 3)])),
            (Call::Adopt, _) => self.adopt(endpoint([8, 4][usize::from(n % 2)])),
            (Call::Release, _) => {
                if let Some(at) = usize::from(n).checked_rem(self.retained.len()) {
                    let handle = self.retained.swap_remove(at);
                    self.report(|core| core.release(handle));
                }
            }
            (Call::LimitParked, _) => self.limit_parked(usize::from(n % 8) * 3),
            (Call::UseScheduler, _) => self.report(Master::use_scheduler),
            // Pass only while no action is pending, because the shell first carries out the actions
            // for the previous successor.
            (Call::PassParked, _) if self.master_is_idle() => {
                self.has_successor = true;
                self.report(Master::pass_parked);
            }
            (Call::PassParked, _) => {}
            (Call::EndSuccessor, _) if self.has_successor => {
                self.has_successor = false;
                self.passing.clear();
                self.report(Master::end_passing);
            }
            (Call::EndSuccessor, _) => {}
            (_, None) => {}
            (Call::Ref, Some(id)) => {
                let is_known = match self.detached.get(&id) {
                    Some(detached) => matches!(detached, Detached::Running | Detached::Zombie(_)),
                    None => self.master.is_worker(id),
                };
                self.referenced.extend(is_known.then_some(id));
                self.report(|core| core.reference(id, true));
            }
            (Call::Unref, Some(id)) => {
                self.referenced.remove(&id);
                self.report(|core| core.reference(id, false));
            }
            (Call::Disconnect, Some(id)) => self.report(|core| core.disconnect(id)),
            (Call::DisconnectWithin, Some(id)) => {
                let now = self.now;
                if let Some(process) = self.processes.get_mut(&id) {
                    process.deadline = by(process.deadline, now);
                }
                self.report(|core| core.disconnect_within(id, within));
            }
            (Call::Kill, Some(id)) => {
                self.signalled.insert(id);
                self.report(|core| core.kill(id, Signal::TERM));
            }
            (Call::Signal, Some(id)) => {
                self.signalled.insert(id);
                self.report(|core| core.signal(id, Signal::KILL));
            }
            (Call::CloseChannel, Some(id)) => self.report(|core| core.close_channel(id)),
            (Call::Send, Some(id)) => self.send_message(id),
        }
    }

    pub(crate) fn disconnect_all(&mut self, awaited: bool) {
        self.awaited |= awaited;
        self.report(|core| core.disconnect_all(awaited));
    }

    fn send_message(&mut self, id: WorkerId) {
        let Some(process) = self.processes.get_mut(&id) else {
            let (worker, reason) = (Some(id), SendError::ChannelClosed);
            return self.report(|core| core.error(worker, Error::Send { worker, reason }));
        };
        if process.master_end && !process.down.is_broken {
            process.sent[1] += 1;
            let message = process.sent[1].to_le_bytes().to_vec();
            let message = ToWorker::Message(message);
            process.down.queue(message, Attachment::None);
            self.unflushed.insert(id);
        }
    }

    fn retain(&mut self, endpoint: &Endpoint) {
        let shared = self.report(|core| core.retain(endpoint));
        let handle = shared.or_else(|| {
            let handle = self.master.next_handle();
            let address = self.bind(handle, endpoint).ok()?;
            let policy = self.master.policy_of(endpoint);
            self.report(|core| core.retained(handle, endpoint.clone(), address, policy));
            Some(handle)
        });
        self.retained.extend(handle);
    }

    fn adopt(&mut self, endpoint: Endpoint) {
        let handle = self.master.next_handle();
        if let Ok(address) = self.bind(handle, &endpoint) {
            self.report(|core| core.adopted(handle, endpoint, address));
            self.retained.push(handle);
            self.adopted.insert(handle);
        }
    }

    /// Releases all listeners that the application retains.
    pub(crate) fn release_all(&mut self) {
        while !self.retained.is_empty() {
            self.call(Call::Release, None, 0);
        }
    }
}
