//! Simulates a worker's application, which calls the worker's core.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use crate::core::master::Attachment;
use crate::core::worker::{ListenStatus, ListenerId};
use crate::sim::kernel::process::{ProcessState, Received};
use crate::sim::kernel::socket::{Client, Port, endpoint};
use crate::sim::kernel::{KNOWN, World, nth};
use crate::types::endpoint::{BindFlags, Endpoint, Kind, Parking};
use crate::types::policy::SchedulingPolicy;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::ToMaster;

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
    /// Closes a connection whose client may still be sending.
    Finish,
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
                if !process.core.closes_new_listeners() {
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
            (WorkerCall::CloseConnection, _) => drop(self.close_connection(worker, n)),
            (WorkerCall::Finish, _) => self.finish_connection(worker, n),
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
    /// connection. Returns the descriptor, which closes when it is dropped.
    pub(crate) fn close_connection(&mut self, worker: WorkerId, n: u8) -> Option<Client> {
        let process = self.process(worker);
        let at = usize::from(n).checked_rem(process.held.len())?;
        let received = process.held.swap_remove(at);
        process.core.connection_closed(Some(received.listener));
        if let Some(resumed) = received.resumed {
            process.core.detach(resumed.connection);
        }
        Some(received.client)
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
            times_parked,
        } = process.held.swap_remove(at);
        let core = &mut process.core;
        core.connection_closed(Some(listener));
        if handle.is_none() || self.config.policy != SchedulingPolicy::RoundRobin {
            let held = core.hold(listener, handle, times_parked + 1, self.now);
            return self.keep(worker, held, client);
        }
        match (resumed, handle) {
            (Some(resumed), _) if core.is_writable() => core.park_again(resumed.connection),
            (None, Some(handle)) if core.is_writable() && core.has_queue(listener) => {
                let frame = ToMaster::Park {
                    handle,
                    times_parked: 1,
                };
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
        self.poll_parked(worker);
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
/// selects the timeouts, and whether new connections wait for data.
pub(crate) fn requested_parking(n: u8) -> Parking {
    let [idle_seconds, first_data_seconds, wait_for_data] = match n / 40 {
        2 => [Some(1), None, None],
        3 => [Some(2), None, None],
        4 => [Some(2), Some(1), Some(1)],
        5 => [None, None, Some(1)],
        6 => [None, None, Some(0)],
        _ => [None, None, None],
    };
    Parking {
        idle_seconds,
        first_data_seconds,
        wait_for_data: wait_for_data.map(|value| value == 1),
    }
}

/// Returns one of the five endpoints that workers request. `n` modulo 5 selects any port, a fixed
/// port, a path, a descriptor of the master, or a UDP address.
pub(crate) fn requested_endpoint(n: u8) -> Endpoint {
    endpoint([0, 8, 4, 29, 7][usize::from(n % 5)])
}
