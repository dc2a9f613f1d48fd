//! The life of a worker, from fork to exit.

use std::process::ExitStatus;
use std::rc::Rc;

use super::listener::Stage;
use super::{Action, Attachment, MasterCore};
use crate::core::master::event::{EmittedEvent, Event, ExitReport, Level, WorkerState};
use crate::error::Error;
use crate::types::handle::HandleId;
use crate::types::loads::WorkerLoad;
use crate::types::ordered_set::OrderedSet;
use crate::types::protocol::FrameError;
use crate::types::signal::Signal;
use crate::types::time::Time;
use crate::types::user::User;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::{ToWorker, Unreceived};

/// The maximum number of errors that are delivered for a process after its channel has closed.
///
/// An error callback may cause the next error, for example by sending to the process. Without a
/// limit, the exit, which is the process's last event, would never be delivered. Errors beyond the
/// limit are dropped, but the calls that caused them still return them.
const LATE_ERRORS_MAX: u32 = 16;

/// The number of joined listeners at which a worker's entry forgets those that no longer exist.
/// With a lower number, workers that listen often cost more time. With a higher number, each worker
/// costs more memory.
const JOINED_MAX: usize = 128;

/// The state of a worker's channel and process.
///
/// ```text
/// from                  event                               to
/// --------------------  ----------------------------------  -------------------------
/// Starting              the worker sends `Online`           Online
/// Starting, Online      the application closes the channel  Closing
/// Starting, Online      the process exits                   Closing, with its status
/// Closing               the worker sends `Online`           Closing, with `is_online`
/// Closing               the process exits                   Closing, with its status
/// Closing, with status  the channel is closed               Exited
/// Starting, Online,     the channel is closed               Disconnected
///   Closing, no status
/// Disconnected          the process exits                   Exited
/// Exited                the application is notified         (removed)
/// ```
#[derive(Clone, Copy, Debug)]
enum Life {
    /// The worker has been forked and has not sent `Online`.
    Starting,
    /// The worker has sent `Online`, so its application runs.
    Online,
    /// The channel is write-closed. The master sends nothing more, but still processes the worker's
    /// final frames.
    Closing {
        is_online: bool,
        status: Option<ExitStatus>,
    },
    /// The channel is closed, and the process has not exited.
    Disconnected,
    Exited(ExitStatus),
}

#[derive(Debug)]
pub(super) struct WorkerEntry {
    pub(super) user: User,
    life: Life,
    /// The state that the application was last notified of.
    pub(super) reported: WorkerState,
    /// Whether the master or the worker has requested the disconnect.
    disconnect_requested: bool,
    /// The signal to send once the channel is closed.
    kill_signal: Option<Signal>,
    /// The time at which the worker is killed if it has not exited.
    deadline: Option<Time>,
    /// Whether [`run`](crate::Master::run) waits for the worker's exit.
    pub(super) referenced: bool,
    /// The number of errors delivered since the worker's channel was closed.
    late_errors: u32,
    /// The worker's load on listeners that it has left.
    pub(super) past_load: WorkerLoad,
    /// The listeners that the worker has joined, including those that it has left. The worker can
    /// park only their connections.
    joined: OrderedSet<HandleId>,
}

impl WorkerEntry {
    fn new(worker: WorkerId, user: User) -> Self {
        Self {
            user,
            life: Life::Starting,
            reported: WorkerState::None,
            disconnect_requested: false,
            kill_signal: None,
            deadline: None,
            referenced: true,
            late_errors: 0,
            past_load: WorkerLoad::new(worker),
            joined: OrderedSet::new(),
        }
    }

    /// Records that the worker has joined a listener. If there are many, forgets those that no
    /// longer exist, because a worker may listen any number of times.
    pub(super) fn joined(&mut self, handle: HandleId, exists: impl Fn(HandleId) -> bool) {
        if self.joined.len() >= JOINED_MAX {
            self.joined.retain(exists);
        }
        self.joined.insert(handle);
    }

    /// Returns whether the worker has, or has had, the listener.
    pub(super) fn has_had(&self, handle: HandleId) -> bool {
        self.joined.contains(handle)
    }

    /// Returns whether the master still processes the worker's frames.
    fn is_connected(&self) -> bool {
        match self.life {
            Life::Starting | Life::Online | Life::Closing { .. } => true,
            Life::Disconnected | Life::Exited(_) => false,
        }
    }

    /// Returns whether frames can be sent to the worker.
    pub(super) fn is_writable(&self) -> bool {
        match self.life {
            Life::Starting | Life::Online => true,
            Life::Closing { .. } | Life::Disconnected | Life::Exited(_) => false,
        }
    }

    /// Returns whether the worker has sent `Online` and its channel is not closed.
    pub(super) fn is_online(&self) -> bool {
        match self.life {
            Life::Online => true,
            Life::Closing { is_online, .. } => is_online,
            Life::Starting | Life::Disconnected | Life::Exited(_) => false,
        }
    }

    /// Returns whether the master answers the worker's requests to listen. A disconnecting worker
    /// does not wait for an answer.
    pub(super) fn may_listen(&self) -> bool {
        self.is_writable() && !self.disconnect_requested
    }

    fn status(&self) -> Option<ExitStatus> {
        match self.life {
            Life::Starting | Life::Online | Life::Disconnected => None,
            Life::Closing { status, .. } => status,
            Life::Exited(status) => Some(status),
        }
    }

    /// Records that the worker has sent `Online`.
    pub(super) fn online(&mut self) {
        match &mut self.life {
            life @ Life::Starting => *life = Life::Online,
            Life::Closing { is_online, .. } => *is_online = true,
            Life::Online | Life::Disconnected | Life::Exited(_) => {}
        }
    }
}

// Reports from the shell about workers.
impl<C, F> MasterCore<C, F> {
    /// Records that a worker of the user has been forked with the id that `next_worker_id` returned.
    pub(crate) fn forked(&mut self, worker: WorkerId, user: User) {
        self.is_policy_frozen = true;
        self.last_worker = worker.get();
        self.workers.insert(worker, WorkerEntry::new(worker, user));
        self.referenced += 1;
        self.emit(Level::Cluster, Some(worker), Event::Fork);
    }

    /// Kills a worker that broke the protocol, and ignores its later frames.
    pub(crate) fn violation(&mut self, worker: WorkerId, reason: FrameError) {
        if !self.is_connected(worker) {
            return;
        }
        let error = Error::Frame {
            worker: Some(worker),
            reason,
        };
        self.error(Some(worker), error);
        self.signal(worker, Signal::KILL);
        self.actions.push_back(Action::DiscardChannel { worker });
        self.channel_closed(worker);
    }

    pub(crate) fn channel_closed(&mut self, worker: WorkerId) {
        let Some(entry) = self.workers.get_mut(&worker) else {
            return;
        };
        if !entry.is_connected() {
            return;
        }
        let (status, kill_signal) = (entry.status(), entry.kill_signal);
        entry.life = match status {
            Some(status) => Life::Exited(status),
            None => Life::Disconnected,
        };
        let handles: Vec<_> = self.listeners_of(worker).collect();
        for handle in handles {
            self.leave_listener(handle, worker);
        }
        self.close_held_by(worker);
        self.emit_both(worker, || Event::Disconnect);
        match (status, kill_signal) {
            (Some(status), _) => self.emit_exit(worker, status),
            (None, Some(signal)) => self.signal(worker, signal),
            (None, None) => {}
        }
    }

    pub(crate) fn exited(&mut self, worker: WorkerId, status: ExitStatus) {
        let Some(entry) = self.workers.get_mut(&worker) else {
            return self.detached_exited(worker, status);
        };
        if entry.status().is_some() {
            return;
        }
        if let Some(deadline) = entry.deadline.take() {
            self.deadlines.remove((deadline, worker));
        }
        if entry.is_connected() {
            // Close the channel first. The shell then processes the worker's final frames, and
            // `exit` is emitted after them.
            self.close_for_writing(worker, Some(status));
        } else {
            entry.life = Life::Exited(status);
            self.emit_exit(worker, status);
        }
    }

    /// Stops sending to the worker. `status` is the exit status if the worker's process has exited.
    ///
    /// The worker's earlier frames are still processed. The shell calls `channel_closed`
    /// afterwards.
    fn close_for_writing(&mut self, worker: WorkerId, status: Option<ExitStatus>) {
        let Some(entry) = self.workers.get_mut(&worker) else {
            return;
        };
        let was_writable = entry.is_writable();
        entry.life = Life::Closing {
            is_online: entry.is_online(),
            status,
        };
        if was_writable {
            let handles: Vec<_> = self.listeners_of(worker).collect();
            for handle in handles {
                if let Some(listener) = self.listeners.get_mut(&handle) {
                    listener.dispatcher.end(worker);
                }
            }
            self.actions.push_back(Action::CloseChannel { worker });
        }
    }

    fn emit_exit(&mut self, worker: WorkerId, status: ExitStatus) {
        let entry = self.workers.get(&worker);
        let exit_report = ExitReport {
            status,
            exited_after_disconnect: entry.is_some_and(|entry| entry.disconnect_requested),
        };
        self.emit_both(worker, || Event::Exit(exit_report));
    }

    /// Kills the workers whose deadline has expired. The master processes their exits like any
    /// other exit.
    pub(super) fn kill_overdue(&mut self) {
        let is_over = |deadline: &Time| *deadline <= self.now;
        let mut overdue = Vec::new();
        if self.stop_deadline.as_ref().is_some_and(is_over) {
            self.stop_deadline = None;
            overdue.extend(self.workers.keys().copied());
        }
        while let Some((deadline, worker)) = self.deadlines.first().filter(|(d, _)| is_over(d)) {
            self.deadlines.remove((deadline, worker));
            overdue.push(worker);
        }
        for worker in overdue {
            if let Some(entry) = self.workers.get_mut(&worker) {
                entry.deadline = None;
            }
            self.signal(worker, Signal::KILL);
        }
    }
}

// Requests from the application.
impl<C, F> MasterCore<C, F> {
    pub(crate) fn disconnect(&mut self, worker: WorkerId) {
        self.begin_disconnect(&[worker]);
    }

    pub(crate) fn disconnect_workers(&mut self, workers: &[WorkerId]) {
        self.begin_disconnect(workers);
    }

    /// Disconnects the worker, and kills it if it has not exited after the time `within`. If there
    /// are several deadlines, the earliest one applies.
    pub(crate) fn disconnect_within(&mut self, worker: WorkerId, within: Time) {
        let deadline = self.now.saturating_add(within);
        if let Some(entry) = self.workers.get_mut(&worker) {
            let is_earliest = entry.deadline.is_none_or(|earlier| deadline < earlier);
            if entry.status().is_none() && is_earliest {
                if let Some(later) = entry.deadline.replace(deadline) {
                    self.deadlines.remove((later, worker));
                }
                self.deadlines.insert((deadline, worker));
            }
        }
        self.begin_disconnect(&[worker]);
    }

    /// Disconnects all workers. The core emits `Disconnected` as soon as all workers have exited and
    /// no listener is open except those that the application retains.
    pub(crate) fn disconnect_all(&mut self) {
        self.is_end_awaited = true;
        let workers: Vec<_> = self.worker_ids().collect();
        self.begin_disconnect(&workers);
    }

    /// Disconnects all workers, and kills those that have not exited after the time `within`.
    pub(crate) fn disconnect_all_within(&mut self, within: Time) {
        let deadline = self.now.saturating_add(within);
        let earliest = self
            .stop_deadline
            .map_or(deadline, |other| other.min(deadline));
        self.stop_deadline = Some(earliest);
        self.disconnect_all();
    }

    /// Disconnects the worker, and sends the signal once its channel is closed. If the channel is
    /// already closed, sends the signal immediately.
    pub(crate) fn kill(&mut self, worker: WorkerId, signal: Signal) {
        match self.workers.get_mut(&worker) {
            Some(entry) if entry.is_connected() => {
                entry.kill_signal = Some(signal);
                self.begin_disconnect(&[worker]);
            }
            Some(_) | None => self.signal(worker, signal),
        }
    }

    /// Sends the signal to the process immediately, without a disconnect.
    pub(crate) fn signal(&mut self, worker: WorkerId, signal: Signal) {
        if self.is_running(worker) {
            self.actions.push_back(Action::Signal { worker, signal });
        }
    }

    /// Sets whether [`run`](crate::Master::run) waits for the exit of this process.
    pub(crate) fn reference(&mut self, process: WorkerId, referenced: bool) {
        let was_referenced = match self.workers.get_mut(&process) {
            Some(entry) => Some(std::mem::replace(&mut entry.referenced, referenced)),
            None => self
                .detached
                .get_mut(&process)
                .and_then(|entry| entry.reference(referenced)),
        };
        if let Some(was_referenced) = was_referenced {
            self.referenced -= usize::from(was_referenced);
            self.referenced += usize::from(referenced);
        }
    }

    /// Closes the channel without a `Disconnect` frame. A worker that has not received such a frame
    /// before treats this as unexpected, and exits immediately.
    pub(crate) fn close_channel(&mut self, worker: WorkerId) {
        let entry = self.workers.get(&worker);
        if entry.is_some_and(WorkerEntry::is_writable) {
            self.close_for_writing(worker, None);
        }
    }

    /// Reports an error to the callbacks of the cluster, and of the worker if there is one.
    pub(crate) fn error(&mut self, worker: Option<WorkerId>, error: Error) {
        let error = Rc::new(error);
        if worker.is_some_and(|worker| !self.count_late_error(worker)) {
            return;
        }
        // The exit must stay the last event of a process, so insert the error before a pending exit
        // event.
        let is_exit = |emitted: &EmittedEvent<F>| {
            let is_last = matches!(emitted.event, Event::Exit(_) | Event::DetachedExit(_));
            worker.is_some() && emitted.worker == worker && is_last
        };
        let exit = self.events.iter().position(is_exit);
        let index = exit.unwrap_or(self.events.len());
        // Insert at one index in reverse order, so that the worker's callbacks come first.
        let levels = match worker {
            Some(_) => &[Level::Cluster, Level::Worker][..],
            None => &[Level::Cluster],
        };
        for level in levels {
            let emitted = EmittedEvent {
                level: *level,
                worker,
                event: Event::Error(Rc::clone(&error)),
            };
            self.events.insert(index, emitted);
        }
    }

    /// Returns whether an error of this process may still be delivered, and counts the error if the
    /// channel is closed.
    fn count_late_error(&mut self, process: WorkerId) -> bool {
        let (late_errors, is_late) = if let Some(entry) = self.workers.get_mut(&process) {
            let is_late = !entry.is_connected();
            (&mut entry.late_errors, is_late)
        } else if let Some(entry) = self.detached.get_mut(&process) {
            (&mut entry.late_errors, true)
        } else {
            return false;
        };
        if *late_errors >= LATE_ERRORS_MAX {
            return false;
        }
        *late_errors += u32::from(is_late);
        true
    }
}

// Disconnecting workers.
impl<C, F> MasterCore<C, F> {
    /// Sends `Disconnect` to the workers, and ends their listeners.
    ///
    /// If other workers serve a listener, it ends for the disconnecting workers without a drain,
    /// except that they empty the backlogs of their shards. If no other worker serves a listener,
    /// it drains, so that the connections in its backlog are served. A retained listener stays open
    /// for the next worker.
    pub(super) fn begin_disconnect(&mut self, workers: &[WorkerId]) {
        let mut disconnecting = OrderedSet::new();
        for &worker in workers {
            if let Some(entry) = self.workers.get_mut(&worker) {
                if entry.is_connected() && !entry.disconnect_requested {
                    entry.disconnect_requested = true;
                    disconnecting.insert(worker);
                    self.send(worker, ToWorker::Disconnect, Attachment::None);
                }
            }
        }
        let is_disconnecting = |worker: WorkerId| disconnecting.contains(worker);
        let mut handles = self.listeners.ids();
        handles.retain(|handle| {
            let listener = &self.listeners[handle];
            listener.stage == Stage::Open && listener.members.serving().any(is_disconnecting)
        });
        for handle in handles {
            let members = &self.listeners[&handle].members;
            if members.serving().all(is_disconnecting) {
                self.begin_drain(handle);
            } else {
                for worker in disconnecting.iter() {
                    self.end_for(handle, worker, Unreceived::GoToOthers);
                }
                self.close_excluded(handle);
            }
        }
    }
}

// Worker queries.
impl<C, F> MasterCore<C, F> {
    /// Returns the id that the next worker gets if its fork succeeds.
    ///
    /// Returns `None` if all ids have been used, because an id is never reused.
    pub(crate) fn next_worker_id(&self) -> Option<WorkerId> {
        let is_left = self.last_worker < WorkerId::MAX;
        is_left.then(|| WorkerId::new(self.last_worker + 1))
    }

    pub(crate) fn worker_ids(&self) -> impl Iterator<Item = WorkerId> + '_ {
        self.workers.keys().copied()
    }

    /// Returns whether [`run`](crate::Master::run) has to wait for the exit of a process or for the
    /// end of `disconnect_all`.
    pub(crate) fn keeps_loop_alive(&self) -> bool {
        self.is_end_awaited || self.referenced > 0
    }

    /// Returns whether the process is in the table of workers.
    pub(crate) fn is_worker(&self, process: WorkerId) -> bool {
        self.workers.contains_key(&process)
    }

    /// Returns the state that the application was last notified of. The state of a detached process
    /// is always `Disconnected`, because it has no channel.
    ///
    /// Returns `None` after the application has been notified that the process exited.
    pub(crate) fn state(&self, process: WorkerId) -> Option<WorkerState> {
        let worker = self.workers.get(&process).map(|entry| entry.reported);
        let detached = || self.detached.get(&process);
        worker.or_else(|| detached().map(|_| WorkerState::Disconnected))
    }

    pub(crate) fn is_connected(&self, worker: WorkerId) -> bool {
        let entry = self.workers.get(&worker);
        entry.is_some_and(WorkerEntry::is_connected)
    }

    pub(super) fn is_writable(&self, worker: WorkerId) -> bool {
        let entry = self.workers.get(&worker);
        entry.is_some_and(WorkerEntry::is_writable)
    }

    pub(crate) fn exit_status(&self, process: WorkerId) -> Option<ExitStatus> {
        match (self.workers.get(&process), self.detached.get(&process)) {
            (Some(worker), _) => worker.status(),
            (None, Some(detached)) => detached.state.status(),
            (None, None) => None,
        }
    }

    pub(super) fn is_running(&self, process: WorkerId) -> bool {
        let is_known = self.is_worker(process) || self.detached.contains_key(&process);
        is_known && self.exit_status(process).is_none()
    }

    /// Returns whether a disconnect was requested before the channel closed.
    ///
    /// Returns `None` while the channel is open.
    pub(crate) fn exited_after_disconnect(&self, worker: WorkerId) -> Option<bool> {
        let entry = self.workers.get(&worker)?;
        (!entry.is_connected()).then_some(entry.disconnect_requested)
    }
}
