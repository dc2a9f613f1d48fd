//! Simulates a worker's shell, which carries out the actions of the worker's core, and a worker's
//! application, which calls the core.

pub(crate) mod application;
pub(crate) mod lingering;
mod parked;

use super::process::{Parcel, Received};
use super::socket::{Connection, PortState};
use super::{BACKOFF, Failure, KNOWN, World};
use crate::core::master::Attachment;
use crate::core::worker::{Action, Event, ListenerId};
use crate::types::protocol::FrameError;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::{ToMaster, ToWorker};

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

    /// Reads one frame in the worker, or the end of its channel. If the frame ends a listener, also
    /// reads the frames that have arrived after it. Returns whether there was anything to read.
    pub(crate) fn worker_reads(&mut self, worker: WorkerId) -> bool {
        let now = self.now;
        let process = self.process(worker);
        if !process.worker_end {
            return self.close_worker_channel(worker);
        }
        if process.down.wire.is_empty() {
            let is_over = process.is_shut || !process.master_end;
            return is_over && self.close_worker_channel(worker);
        }
        loop {
            let process = self.process(worker);
            let Some(parcel) = process.down.wire.pop_front() else {
                break;
            };
            if parcel.lost_fd {
                process.worker_backoff = process.worker_backoff.or(Some(now + BACKOFF));
            }
            self.worker_processes(worker, parcel);
            self.gather_from_worker(worker);
            // The shell processes all frames that have arrived before it closes a listener.
            if !self.process(worker).core.has_ending() {
                break;
            }
        }
        self.process(worker).core.frames_processed();
        self.gather_from_worker(worker);
        true
    }

    fn worker_processes(&mut self, worker: WorkerId, parcel: Parcel<ToWorker>) {
        let now = self.now;
        let process = self.process(worker);
        let frame = parcel.frame.expect("the master's frames are well formed");
        if let ToWorker::Message(bytes) = frame {
            return process.core.message(bytes, ());
        }
        if let (
            ToWorker::MoveParked {
                handle,
                times_parked,
            },
            Some(client),
        ) = (&frame, parcel.connection)
        {
            let held = process.core.hold_moved(*handle, *times_parked, now);
            return self.keep(worker, held, client);
        }
        let handle = match parcel.attachment {
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
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        while let Some(action) = process.core.next_action() {
            if let Action::CloseParked(id) = action {
                // Close the connection at once, as the shell does, because the core may give its
                // number to the next connection.
                if let Some(client) = process.parked.remove(&id) {
                    let fate = &self.fates[client.client as usize];
                    let is_private = fate.port.is_none();
                    let may_lose = is_private || !process.core.is_connected();
                    assert!(may_lose || !fate.is_pending, "closed with a request");
                }
                process.lingering.remove(&id);
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
                    port.state = PortState::Closing;
                }
            }
            Action::MarkDisconnecting => {
                assert!(!process.is_marked, "marked twice");
                process.is_marked = true;
            }
            Action::CloseParked(_) => unreachable!("closed when gathered"),
            Action::SendLeaving => self.send_leaving(worker),
            Action::CloseChannel => {
                let is_idle = process.held.is_empty()
                    && process.parked.is_empty()
                    && process.lingering.is_empty();
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
            process.up.close_writer();
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
        let is_serving_parked = process.core.is_serving_parked(listener);
        if (is_turn || is_serving_parked) && self.resume_parked(worker, listener) {
            return true;
        }
        if is_serving_parked {
            self.process(worker).core.close_if_served(listener);
            self.gather_from_worker(worker);
            return false;
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
                let client = client.map(|client| Connection::new(client, &self.closed));
                let client =
                    client.and_then(|client| self.hold_if_silent(worker, listener, client));
                client.map(|client| (client, None))
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
                times_parked: resumed.map_or(0, |resumed| resumed.times_parked),
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
        let (times_parked, is_held) = (received.times_parked, received.resumed.is_some());
        if !self.process(worker).is_liar {
            self.check_sole(worker, client);
        }
        let process = self.process(worker);
        process.held.push(received);
        process.counters.received += 1;
        if let Some(limit) = process.limits.get(&listener) {
            let held = process.held.iter();
            let held = held.filter(|received| received.listener == listener);
            let is_allowed = held.count() <= *limit || process.core.closes_new_listeners();
            assert!(is_allowed, "more connections than the application wants");
        }
        self.mark_served(worker, client, times_parked, is_held);
    }
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
