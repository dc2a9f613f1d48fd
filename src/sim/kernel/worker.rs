//! Simulates a worker's shell, which carries out the actions of the worker's core, and a worker's
//! application, which calls the core.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use super::process::{Parcel, ProcessState, Received};
use super::socket::{Connection, Port, PortState, endpoint};
use super::{BACKOFF, Failure, KNOWN, World, nth};
use crate::core::master::Attachment;
use crate::core::worker::{Action, Event, ListenStatus, ListenerId};
use crate::types::endpoint::{BindFlags, Endpoint, Kind, Parking};
use crate::types::policy::SchedulingPolicy;
use crate::types::protocol::FrameError;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::{ToMaster, ToWorker};

/// The maximum number of listeners of one worker's application.
const MAX_LISTENERS: usize = 3;

/// A call by a worker's application.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WorkerCall {
    Listen,
    ListenPrivately,
    /// Blocks in `accept` on a listener. If the listener has a callback, makes the poller report
    /// the listener instead.
    Accept,
    /// Sets a callback for connections.
    UseCallback,
    /// Confirms a listener that has been opened, or drops a listener that could not be opened.
    FinishListen,
    CloseConnection,
    /// Parks a connection.
    Park,
    DropListener,
    LimitConnections,
    /// Makes the process's descriptors scarce or plentiful.
    ChangeFds,
    /// Waits for events, or returns from `main` if nothing is left to wait for.
    Wait,
    Send,
    Disconnect,
    Kill,
    CloseChannel,
    Exit,
}

// A worker's event loop.
impl World {
    /// Makes the worker carry out an action, write a frame, deliver an event, or read a frame. `n`
    /// may make the worker read although an event or a frame to write is pending. Does nothing if
    /// the worker is not running.
    pub(crate) fn worker_step(&mut self, worker: WorkerId, n: u8) {
        let now = self.now;
        let process = self.process(worker);
        if !process.is_running() {
            return;
        }
        if process.worker_backoff.is_some_and(|time| time <= now) {
            process.worker_backoff = None;
            process.core.backoff_elapsed();
        } else if let Some(action) = process.actions.pop_front() {
            self.worker_acts(worker, action);
        } else if process.is_unflushed {
            self.worker_flushes(worker);
        } else if n % 4 != 3 && process.core.has_events() {
            let event = process.core.next_event().expect("an event");
            self.worker_delivers(worker, event);
        } else if n % 4 != 2 && process.worker_end && process.up.can_write() {
            process.is_unflushed = true;
        } else {
            self.worker_reads(worker);
        }
        self.gather_from_worker(worker);
    }

    /// Runs the worker until it has nothing to do besides reading.
    pub(crate) fn run_worker(&mut self, worker: WorkerId) {
        self.gather_from_worker(worker);
        while self.processes[&worker].has_work(self.now) {
            self.worker_step(worker, 0);
        }
    }

    /// Reads one frame in the worker, or the end of its channel. Returns whether there was anything
    /// to read.
    pub(crate) fn worker_reads(&mut self, worker: WorkerId) -> bool {
        let now = self.now;
        let process = self.process(worker);
        if !process.worker_end {
            return self.close_worker_channel(worker);
        }
        let Some(parcel) = process.down.wire.pop_front() else {
            let is_over = process.is_shut || !process.master_end;
            return is_over && self.close_worker_channel(worker);
        };
        if parcel.lost_fd {
            process.worker_backoff = process.worker_backoff.or(Some(now + BACKOFF));
        }
        self.worker_processes(worker, parcel);
        self.gather_from_worker(worker);
        true
    }

    fn worker_processes(&mut self, worker: WorkerId, parcel: Parcel<ToWorker>) {
        let now = self.now;
        let process = self.process(worker);
        let frame = parcel.frame.expect("the master's frames are well formed");
        if let (ToWorker::Adopt { handle, parked }, Some(client)) = (&frame, parcel.connection) {
            let held = process.core.adopt(*handle, *parked, now);
            return self.keep(worker, held, client);
        }
        let handle = match parcel.with {
            Attachment::None => None,
            Attachment::Listener(handle)
            | Attachment::Queue(handle)
            | Attachment::Shard(handle, _) => Some(handle),
        };
        let lost = if let ToWorker::Reply {
            request,
            result: Ok(bound),
        } = &frame
        {
            parcel.lost_fd.then_some((*request, bound.handle))
        } else {
            None
        };
        let outcome = if let Some((request, handle)) = lost {
            let outcome = process.core.listener_fd_lost(request, handle);
            self.forget_port(handle);
            outcome.map(|()| None)
        } else {
            process.core.frame(frame)
        };
        let process = self.process(worker);
        match outcome {
            Ok(Some(listener)) => drop(handle.map(|h| process.shared.insert(listener, h))),
            Ok(None) => {}
            Err(error) => {
                assert!(process.is_liar, "{error}");
                self.close_worker_channel(worker);
            }
        }
        handle.into_iter().for_each(|h| self.forget_port(h));
    }

    /// Closes the worker's end of the channel. Returns whether the worker's core still had the
    /// channel open.
    fn close_worker_channel(&mut self, worker: WorkerId) -> bool {
        let process = self.process(worker);
        let was_connected = process.core.is_connected();
        if was_connected {
            process.close_end();
            process.core.channel_closed();
            self.gather_from_worker(worker);
        }
        was_connected
    }

    pub(crate) fn gather_from_worker(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        while let Some(action) = process.core.next_action() {
            if let Action::CloseParked(id) = action {
                // Close the connection at once, as the shell does, because the core may give its
                // number to the next connection.
                process.parked.remove(&id);
            } else {
                process.actions.push_back(action);
            }
        }
    }

    fn worker_acts(&mut self, worker: WorkerId, action: Action) {
        let process = self.process(worker);
        match action {
            Action::Send(frame) => {
                if !process.is_closing && process.worker_end {
                    process.up.queue(frame, Attachment::None);
                }
                process.is_unflushed = true;
            }
            Action::CloseListener(listener) => {
                process.watched.remove(&listener);
                if let Some(handle) = process.shared.remove(&listener) {
                    self.forget_port(handle);
                } else if let Some(port) = process.private.remove(&listener) {
                    let core = &process.core;
                    let is_served = core.is_connected() && core.has_callback(listener);
                    let is_empty = port.backlog.is_empty();
                    assert!(is_empty || !is_served, "closed with clients in the backlog");
                }
            }
            Action::AttachSynFilter(listener) => {
                if let Some(port) = process.private.get_mut(&listener) {
                    port.state = PortState::Filtered;
                }
            }
            Action::MarkDisconnecting => {
                assert!(!process.is_marked, "marked twice");
                process.is_marked = true;
            }
            Action::CloseParked(_) => unreachable!("closed when gathered"),
            Action::HandOver => self.hand_over(worker),
            Action::CloseChannel => {
                let is_idle = process.held.is_empty() && process.parked.is_empty();
                assert!(
                    is_idle || process.is_careless,
                    "disconnects with connections"
                );
                process.is_closing = true;
                process.is_unflushed = true;
            }
        }
    }

    fn worker_flushes(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        if process.is_shut {
            process.up.break_off();
        }
        if process.up.write(|_| {}) {
            return;
        }
        process.is_unflushed = false;
        if process.up.outbox.is_empty() && process.is_closing && process.worker_end {
            process.is_shut = true;
            process.up.is_broken = true;
        }
    }

    fn worker_delivers(&mut self, worker: WorkerId, event: Event<()>) {
        match event {
            Event::ListenerReady(listener) => {
                let process = self.process(worker);
                let core = &process.core;
                if core.has_callback(listener) && !core.is_paused(listener) {
                    process.watched.insert(listener);
                } else {
                    process.watched.remove(&listener);
                }
                self.call_back(worker, listener);
            }
            Event::Message { bytes, fds: () } => self.check_message_to_worker(worker, &bytes),
            Event::Disconnecting => {
                let process = self.process(worker);
                assert!(process.is_marked, "the token is readable before the event");
                let was_notified = std::mem::replace(&mut process.was_notified, true);
                assert!(!was_notified, "notified twice");
            }
            Event::Disconnect => {
                let was_notified = self.process(worker).was_notified;
                assert!(was_notified, "`Disconnecting` precedes `Disconnect`");
            }
        }
    }
}

// Delivering connections to a worker's application.
impl World {
    /// Lets a callback receive the listener's connections, up to one batch.
    fn call_back(&mut self, worker: WorkerId, listener: ListenerId) {
        for _ in 0..self.config.accept_batch {
            let process = self.process(worker);
            if process.core.is_paused(listener) {
                process.watched.remove(&listener);
                return;
            }
            if !self.accept_next(worker, listener) {
                return;
            }
        }
        let core = &mut self.process(worker).core;
        if core.is_draining(listener) || core.has_queue(listener) {
            core.notify_ready(listener);
        }
    }

    /// Makes the worker's poller report a listener if the poller watches it.
    pub(crate) fn poll_listener(&mut self, worker: WorkerId, listener: ListenerId) {
        if self.process(worker).watched.contains(&listener) {
            self.call_back(worker, listener);
            self.gather_from_worker(worker);
        }
    }

    /// Makes the worker's poller report all watched listeners.
    pub(crate) fn poll_listeners(&mut self, worker: WorkerId) {
        for listener in self.process(worker).watched.clone() {
            self.poll_listener(worker, listener);
        }
    }

    /// Resumes an application that is blocked in `accept`. If there is a connection or the listener
    /// has ended, `accept` returns. Returns whether `accept` has returned.
    pub(crate) fn try_blocking_accept(&mut self, worker: WorkerId) -> bool {
        let process = self.process(worker);
        let Some(listener) = process.accepting else {
            return false;
        };
        let has_ended = process.core.has_ended(listener) && !process.core.has_events();
        let is_paused = process.core.is_paused(listener);
        let returns = has_ended || !is_paused && self.accept_next(worker, listener);
        if returns {
            self.process(worker).accepting = None;
        }
        self.gather_from_worker(worker);
        returns
    }

    /// Receives the next connection from the listener's queue, as the shell does. Without a queue,
    /// accepts the connection from the listener itself. Returns whether there was a connection.
    fn accept_next(&mut self, worker: WorkerId, listener: ListenerId) -> bool {
        self.poll_parked(worker);
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        if process.core.is_datagram(listener) {
            return false;
        }
        // New and parked connections take turns. On a draining listener, the parked ones come
        // first, because the listener closes when it is found empty.
        let is_turn = process.counters.received % 2 == 0 || process.core.is_draining(listener);
        if is_turn && self.resume_parked(worker, listener) {
            return true;
        }
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        let has_queue = process.core.has_queue(listener);
        let handle = process.shared.get(&listener).copied();
        let received = match handle {
            Some(_) if has_queue && self.failing.remove(&Failure::Receive) => {
                process.core.fds_exhausted();
                process.worker_backoff = process.worker_backoff.or(Some(self.now + BACKOFF));
                None
            }
            Some(handle) if has_queue => {
                let queued = self.receive(handle, worker);
                queued.map(|queued| (queued.connection, queued.resumed))
            }
            shared => {
                let port = match shared {
                    Some(handle) => self.ports.get_mut(&handle),
                    None => process.private.get_mut(&listener),
                };
                let Some(port) = port else {
                    return false;
                };
                let client = port.backlog.pop_front();
                client.map(|client| (Connection::new(client, &self.closed), None))
            }
        };
        let process = self.process(worker);
        let core = &mut process.core;
        if let Some((client, resumed)) = received {
            core.connection_opened(listener);
            match (has_queue, process.fds_are_scarce) {
                (false, _) => {}
                (true, true) => core.fds_scarce(),
                (true, false) => core.fds_plentiful(),
            }
            let received = Received {
                client,
                listener,
                handle,
                resumed,
                parked: resumed.map_or(0, |resumed| resumed.parked),
            };
            self.hold(worker, received);
            return true;
        }
        if self.resume_parked(worker, listener) {
            return true;
        }
        let core = &mut self.process(worker).core;
        if !core.is_draining(listener) {
            core.found_empty(listener);
        } else if !core.is_paused(listener) {
            core.close(listener);
        }
        false
    }

    /// Adds a connection to those that the application holds. Checks that the application does not
    /// hold more than its limit, unless the worker is disconnecting.
    pub(super) fn hold(&mut self, worker: WorkerId, received: Received) {
        let (client, listener) = (received.client.client, received.listener);
        let (parked, is_held) = (received.parked, received.resumed.is_some());
        if !self.process(worker).is_liar {
            self.check_sole(worker, client);
        }
        let process = self.process(worker);
        process.held.push(received);
        process.counters.received += 1;
        if let Some(limit) = process.limits.get(&listener) {
            let held = process.held.iter();
            let held = held.filter(|received| received.listener == listener);
            let is_allowed = held.count() <= *limit || process.core.is_disconnecting();
            assert!(is_allowed, "more connections than the application wants");
        }
        self.mark_served(client, parked, is_held);
    }
}

// Calls by a worker's application.
impl World {
    /// Makes the worker's application make `call`. If the library has work to do, the worker does
    /// one step of this work instead. If the application is blocked in `accept`, it retries the
    /// `accept` instead.
    pub(crate) fn call_worker(&mut self, worker: WorkerId, call: WorkerCall, n: u8) {
        if !self.is_ready_for_application(worker) {
            return self.worker_step(worker, n);
        }
        if self.processes[&worker].accepting.is_some() {
            self.try_blocking_accept(worker);
        } else {
            self.carry_out_call(worker, call, n);
        }
        self.gather_from_worker(worker);
    }

    #[allow(clippy::wildcard_enum_match_arm)]
    fn carry_out_call(&mut self, worker: WorkerId, call: WorkerCall, n: u8) {
        let process = self.process(worker);
        let listener = nth(process.listeners.iter().copied(), n);
        let can_listen = process.listeners.len() < MAX_LISTENERS;
        match (call, listener) {
            (WorkerCall::Listen, _) if can_listen => self.listen_with_limit(worker, n),
            (WorkerCall::ListenPrivately, _) if can_listen => {
                let listener = process.core.listen_privately(Kind::Tcp, Parking::default());
                process.listeners.push(listener);
                if !process.core.is_disconnecting() {
                    process.private.insert(listener, Port::new(endpoint(0)));
                }
            }
            (WorkerCall::Accept, Some(listener)) if process.core.has_callback(listener) => {
                self.poll_listener(worker, listener);
            }
            (WorkerCall::Accept, Some(listener)) => {
                process.accepting = Some(listener);
                self.try_blocking_accept(worker);
            }
            // Skip a pending listener, because the application gets its `Listener` only after the
            // master has replied.
            (WorkerCall::UseCallback, Some(listener))
                if process.core.listen_status(listener) != ListenStatus::Pending =>
            {
                process.core.use_callback(listener);
            }
            (WorkerCall::FinishListen, Some(listener)) => {
                match process.core.listen_status(listener) {
                    ListenStatus::Pending => {}
                    ListenStatus::Done(_) => process.core.listening(listener),
                    ListenStatus::Failed(_) => self.drop_listener(worker, listener),
                }
            }
            (WorkerCall::CloseConnection, _) => self.close_connection(worker, n),
            (WorkerCall::Park, _) => self.park_connection(worker, n),
            (WorkerCall::DropListener, Some(listener)) => self.drop_listener(worker, listener),
            (WorkerCall::LimitConnections, Some(listener)) => {
                // Stop checking the limit, because the new limit may be below the number of
                // connections that the application already holds.
                process.limits.remove(&listener);
                match n % 4 {
                    0 => process.core.drop_excess(listener),
                    1 => process.core.set_connection_limit(listener, None),
                    limit => {
                        let limit = u64::from(limit) - 2;
                        process.core.set_connection_limit(listener, Some(limit));
                    }
                }
            }
            (WorkerCall::ChangeFds, _) => process.fds_are_scarce = n % 2 == 0,
            (WorkerCall::Wait, _) => self.wait_for_events(worker),
            (WorkerCall::Send, _) => self.send_to_master(worker),
            (WorkerCall::Disconnect, _) => process.core.disconnect(),
            (WorkerCall::Kill, _) => {
                process.is_careless = true;
                process.core.kill();
            }
            (WorkerCall::CloseChannel, _) => {
                process.is_careless = true;
                process.core.close_channel();
            }
            (WorkerCall::Exit, _) => self.exit(worker, ExitStatus::from_raw(i32::from(n) << 8)),
            _ => {}
        }
    }

    /// Opens a listener. `n` selects the endpoint, a connection limit of 0, 1, 2 or none, and how
    /// the master treats the connections (`requested_parking`).
    fn listen_with_limit(&mut self, worker: WorkerId, n: u8) {
        let parking = requested_parking(n);
        let listener = self.listen_with(worker, requested_endpoint(n), parking);
        if let limit @ 0..=2 = n / 5 % 8 {
            let process = self.process(worker);
            process.limits.insert(listener, limit.into());
            process
                .core
                .set_connection_limit(listener, Some(limit.into()));
        }
    }

    pub(crate) fn listen_with(
        &mut self,
        worker: WorkerId,
        endpoint: Endpoint,
        parking: Parking,
    ) -> ListenerId {
        let process = self.process(worker);
        let flags = BindFlags {
            parking,
            ..BindFlags::default()
        };
        let listener = process.core.listen(endpoint, flags);
        process.listeners.push(listener);
        self.gather_from_worker(worker);
        listener
    }

    /// Makes the application drop a listener. Connections of the listener may still be open.
    pub(crate) fn drop_listener(&mut self, worker: WorkerId, listener: ListenerId) {
        let process = self.process(worker);
        process.is_careless = true;
        process.core.forget(listener);
        process.listeners.retain(|known| *known != listener);
    }

    /// Makes the application close one of its connections, if it has any. `n` selects the
    /// connection.
    pub(crate) fn close_connection(&mut self, worker: WorkerId, n: u8) {
        let process = self.process(worker);
        if let Some(at) = usize::from(n).checked_rem(process.held.len()) {
            let received = process.held.swap_remove(at);
            process.core.connection_closed(Some(received.listener));
            if let Some(resumed) = received.resumed {
                process.core.detach(resumed.connection);
            }
        }
    }

    /// Makes the application park one of its connections, if it has any. `n` selects the
    /// connection.
    pub(crate) fn park_connection(&mut self, worker: WorkerId, n: u8) {
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        let Some(at) = usize::from(n).checked_rem(process.held.len()) else {
            return;
        };
        let Received {
            client,
            listener,
            handle,
            resumed,
            parked,
        } = process.held.swap_remove(at);
        let core = &mut process.core;
        core.connection_closed(Some(listener));
        if handle.is_none() || self.config.policy != SchedulingPolicy::RoundRobin {
            let held = core.hold(listener, handle, parked + 1, self.now);
            return self.keep(worker, held, client);
        }
        match (resumed, handle) {
            (Some(resumed), _) if core.is_writable() => core.park_again(resumed.connection),
            (None, Some(handle)) if core.is_writable() && core.has_queue(listener) => {
                let frame = ToMaster::Park { handle, parked: 1 };
                process.up.queue_connection(frame, client);
                process.is_unflushed = true;
            }
            _ => {}
        }
        // Like the shell, report at once that the worker is idle if the queue is empty.
        let handle = process.shared.get(&listener);
        let queue = handle.and_then(|handle| self.queues.get(&(*handle, worker)));
        if queue.is_some_and(|queue| queue.connections.is_empty()) {
            core.found_empty(listener);
        }
    }

    pub(crate) fn send_to_master(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        if process.worker_end && !process.is_closing && !process.up.is_broken {
            process.sent[0] += 1;
            let message = process.sent[0].to_le_bytes().to_vec();
            let frame = ToMaster::Message(message);
            process.up.queue(frame, Attachment::None);
            process.is_unflushed = true;
        }
    }

    /// Makes the application wait for events. The application returns from `main` when nothing is
    /// left to wait for.
    pub(crate) fn wait_for_events(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        process.core.waiting_for_events();
        let is_finished = process.core.is_finished() && !process.core.has_events();
        if is_finished && process.up.outbox.is_empty() && process.actions.is_empty() {
            self.return_from_main(worker);
        }
    }

    /// Makes the process write as many of its frames as the channel has space for, and exit.
    fn return_from_main(&mut self, worker: WorkerId) {
        let process = self.process(worker);
        while !process.is_shut && process.up.write(|_| {}) {}
        self.exit(worker, ExitStatus::from_raw(0));
    }

    /// Returns whether the application can run: the process is running, and its library has carried
    /// out all actions and has tried to write all frames.
    pub(crate) fn is_ready_for_application(&self, worker: WorkerId) -> bool {
        let process = &self.processes[&worker];
        process.state == ProcessState::Running
            && process.actions.is_empty()
            && !process.is_unflushed
    }
}

/// Returns how the master treats the connections of a requested listener. `n` divided by 40
/// selects the idle timeout, and whether new connections wait for data.
pub(crate) fn requested_parking(n: u8) -> Parking {
    let [idle_seconds, wait_for_data] = match n / 40 {
        2 => [Some(1), None],
        3 => [Some(2), None],
        4 => [Some(1), Some(1)],
        5 => [None, Some(1)],
        6 => [None, Some(0)],
        _ => [None, None],
    };
    Parking {
        idle_seconds,
        wait_for_data: wait_for_data.map(|value| value == 1),
    }
}

/// Returns one of the five endpoints that workers request. `n` modulo 5 selects any port, a fixed
/// port, a path, a descriptor of the master, or a UDP address.
pub(crate) fn requested_endpoint(n: u8) -> Endpoint {
    endpoint([0, 8, 4, 29, 7][usize::from(n % 5)])
}

// Forged frames, and raw workers, which run no code of the library.
impl World {
    /// Writes a forged frame to the worker's channel, or invalid bytes if `frame` is an error. The
    /// checks no longer trust the worker afterwards.
    pub(crate) fn forge(&mut self, worker: WorkerId, frame: Result<ToMaster, FrameError>) {
        let process = self.process(worker);
        if process.worker_end && !process.is_shut {
            process.is_liar = true;
            process
                .up
                .wire
                .push_back(Parcel::new(frame, Attachment::None));
        }
    }

    /// Reads the next frame from the master in a raw worker, if there is a frame.
    pub(crate) fn raw_reads(&mut self, worker: WorkerId) -> Option<ToWorker> {
        let parcel = self.process(worker).down.wire.pop_front()?;
        self.flush(worker);
        parcel.frame.ok()
    }
}
