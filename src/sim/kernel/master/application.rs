//! Simulates the master's application, which calls the master's core.

use crate::core::master::Attachment;
use crate::error::{Error, SendError};
use crate::sim::kernel::process::Detached;
use crate::sim::kernel::socket::endpoint;
use crate::sim::kernel::{Master, World};
use crate::types::endpoint::Endpoint;
use crate::types::signal::Signal;
use crate::types::time::{Time, earlier};
use crate::types::user::User;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::ToWorker;

/// The maximum number of workers that are alive.
const MAX_WORKERS: usize = 5;

/// The maximum number of detached processes that are running.
const MAX_DETACHED: usize = 2;

/// A call by the master's application.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// Forks a worker. One in eight has another user than the rest.
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

impl World {
    /// Calls the master on behalf of its application. `process` is the worker or detached process
    /// that the call concerns, if any. `n` selects the user, the endpoint, the listener or the time
    /// limit of the call.
    pub(crate) fn call(&mut self, call: Call, process: Option<WorkerId>, n: u8) {
        self.master.set_time(self.now);
        let within = Time::from_millis(u64::from(n) * 4);
        let by = |deadline: Option<Time>, now: Time| earlier(deadline, Some(now + within));
        match (call, process) {
            (Call::Fork, _) => {
                if self.processes.values().filter(|p| p.is_alive()).count() < MAX_WORKERS {
                    let uid = u32::from(n % 8 == 7);
                    self.fork_as(User { uid, gid: 0 });
                }
            }
            (Call::Detach, _) => {
                if self.detached.values().filter(|d| d.is_running()).count() < MAX_DETACHED {
                    self.detach();
                }
            }
            (Call::DisconnectAll, _) => self.disconnect_all(),
            (Call::DisconnectAllWithin, _) => {
                self.awaited = true;
                self.stop_by = by(self.stop_by, self.now);
                self.report(|core| core.disconnect_all_within(within));
            }
            // Retain a listener on any port, on a fixed port, or at a path.
            (Call::Retain, _) => self.retain(&endpoint([0, 8, 4][usize::from(n % 3)])),
            (Call::Adopt, _) => self.adopt(endpoint([8, 4][usize::from(n % 2)])),
            (Call::Release, _) => self.release(n),
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
            (Call::Ref, Some(id)) => self.reference(id),
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

    /// Makes `run` wait for the exit of a process.
    fn reference(&mut self, id: WorkerId) {
        let is_known = match self.detached.get(&id) {
            Some(detached) => matches!(detached, Detached::Running | Detached::Zombie(_)),
            None => self.master.is_worker(id),
        };
        self.referenced.extend(is_known.then_some(id));
        self.report(|core| core.reference(id, true));
    }

    pub(crate) fn disconnect_all(&mut self) {
        self.awaited = true;
        self.report(|core| core.disconnect_all());
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

    /// Releases the retained listener with the index `n` modulo the number of retained listeners.
    fn release(&mut self, n: u8) {
        if let Some(at) = usize::from(n).checked_rem(self.retained.len()) {
            let handle = self.retained.swap_remove(at);
            self.report(|core| core.release(handle));
        }
    }

    /// Releases all listeners that the application retains.
    pub(crate) fn release_all(&mut self) {
        while !self.retained.is_empty() {
            self.call(Call::Release, None, 0);
        }
    }
}
