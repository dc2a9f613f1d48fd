//! The queues from which workers receive their connections, and the loads that follow from them.

use std::io;
use std::os::fd::OwnedFd;

use super::MasterShell;
use super::parked::descriptor_of;
use crate::core::dispatch::{DispatchFailure, Sequenced};
use crate::core::master::{HandOff, QueueState, Resumed};
use crate::error::Error;
use crate::sys;
use crate::sys::fd::NoLingerFd;
use crate::sys::queue::{Dequeued, Label, Queue};
use crate::types::handle::HandleId;
use crate::types::loads::{Loads, WorkerLoad};
use crate::types::worker_id::WorkerId;

/// The result of reclaiming connections from a queue.
struct Reclaimed {
    connections: Vec<Sequenced<HandOff<NoLingerFd>>>,
    state: QueueState,
}

/// Takes at most `at_most` connections out of a queue.
fn reclaim(queue: &Queue, at_most: usize) -> Reclaimed {
    let mut connections = Vec::new();
    let state = loop {
        if connections.len() >= at_most {
            break QueueState::PerhapsMore;
        }
        let (label, copy) = match queue.reclaim() {
            Ok(Dequeued::Connection(label, copy)) => (label, Some(copy)),
            Ok(Dequeued::Lost(label)) => (label, None),
            Ok(Dequeued::Empty | Dequeued::Closed) => break QueueState::Empty,
            // Without a free descriptor, `reclaim` fails even if the queue is empty. An empty queue
            // can be closed nevertheless, which frees descriptors.
            Err(_) if queue.count() == Some(0) => break QueueState::Empty,
            Err(_) => break QueueState::Unknown,
        };
        let Label {
            sequence,
            held,
            times_parked,
        } = label;
        let connection = match (held, copy) {
            // The master still has its own copy.
            (Some(connection), _) => HandOff::Held(Resumed {
                connection,
                times_parked,
            }),
            (None, Some(copy)) => HandOff::New(copy),
            (None, None) => break QueueState::Unknown,
        };
        connections.push(Sequenced {
            sequence,
            connection,
        });
    };
    Reclaimed { connections, state }
}

impl MasterShell {
    /// Creates a queue, and returns the worker's end.
    pub(super) fn open_queue(&self, handle: HandleId, worker: WorkerId) -> io::Result<OwnedFd> {
        let queue = Queue::new()?;
        let worker_end = queue.worker_end()?;
        self.queues.borrow_mut().insert((handle, worker), queue);
        Ok(worker_end)
    }

    /// Puts a connection into a worker's queue. If the connection has waited and its client has
    /// hung up, the connection is dropped instead.
    pub(super) fn dispatch(
        &self,
        handle: HandleId,
        worker: WorkerId,
        connection: Sequenced<HandOff<NoLingerFd>>,
        has_waited: bool,
    ) {
        if has_waited && self.is_gone(&connection.connection) {
            let mut core = self.core_now();
            return core.hung_up(handle, worker, connection.connection);
        }
        self.fault("master.before_dispatch", worker);
        let dispatched = self.put_into_queue(handle, worker, &connection);
        match dispatched {
            // The kernel keeps a copy of the connection in the queue, so the master's copy can
            // close at the end of this method.
            Ok(()) => self.fault("master.after_dispatch", worker),
            Err(reason) => {
                let failure = match sys::socket::is_exhaustion(&reason) {
                    true => DispatchFailure::Exhausted,
                    false => DispatchFailure::QueueUnusable,
                };
                let mut core = self.core_now();
                core.not_dispatched(handle, worker, connection, failure);
                if failure == DispatchFailure::Exhausted {
                    let worker = Some(worker);
                    core.error(worker, Error::Exhausted { worker, reason });
                }
            }
        }
    }

    fn put_into_queue(
        &self,
        handle: HandleId,
        worker: WorkerId,
        connection: &Sequenced<HandOff<NoLingerFd>>,
    ) -> io::Result<()> {
        let (queues, held) = (self.queues.borrow(), self.held.borrow());
        let queue = queues.get(&(handle, worker));
        let queue = queue.ok_or(io::ErrorKind::NotFound)?;
        let hand_off = &connection.connection;
        let fd = descriptor_of(&held, hand_off).ok_or(io::ErrorKind::NotFound)?;
        let (held, times_parked) = match hand_off {
            HandOff::New(_) => (None, 0),
            HandOff::Held(resumed) => (Some(resumed.connection), resumed.times_parked),
        };
        let label = Label {
            sequence: connection.sequence,
            held,
            times_parked,
        };
        queue.send(label, fd)
    }

    pub(super) fn reclaim(&self, handle: HandleId, worker: WorkerId, at_most: usize) {
        let queues = self.queues.borrow();
        let Some(queue) = queues.get(&(handle, worker)) else {
            return;
        };
        let Reclaimed { connections, state } = reclaim(queue, at_most);
        let mut core = self.core_now();
        if state == QueueState::Unknown {
            core.cannot_reclaim(handle);
        }
        core.reclaimed(handle, worker, connections, state);
    }

    /// Reclaims all connections from a queue, and closes the queue. If the queue cannot be emptied,
    /// for instance for lack of descriptors, the shell tries again after the back-off delay.
    pub(super) fn close_queue(&self, handle: HandleId, worker: WorkerId) {
        let mut queues = self.queues.borrow_mut();
        let mut core = self.core_now();
        let Some(queue) = queues.get(&(handle, worker)) else {
            return core.queue_closed(handle, worker, Vec::new());
        };
        let Reclaimed { connections, state } = reclaim(queue, usize::MAX);
        if state == QueueState::Empty {
            queues.remove(&(handle, worker));
            core.queue_closed(handle, worker, connections);
        } else {
            core.reclaimed(handle, worker, connections, state);
            let mut retries = self.retries.borrow_mut();
            retries.queues.push((handle, worker));
            retries.backoff.start(self.start.elapsed());
        }
    }

    pub(super) fn count(&self, handle: HandleId, worker: WorkerId) {
        let queues = self.queues.borrow();
        let queued = queues.get(&(handle, worker)).and_then(Queue::count);
        if let Some(queued) = queued {
            self.core_now().counted(handle, worker, queued);
        }
    }

    /// Updates the core's counts of queued connections. Without this call, the counts may be too
    /// high, because a busy worker may have received connections since its last frame.
    pub(crate) fn count_all(&self) {
        for (handle, worker) in self.queues.borrow().keys() {
            self.count(*handle, *worker);
        }
        self.act();
    }

    /// Returns the loads of all workers and listeners.
    pub(crate) fn loads(&self) -> Loads {
        self.count_all();
        let (mut workers, listeners) = self.core.borrow().loads();
        self.add_in_service(&mut workers);
        let own = self.sockets.borrow();
        let counted = listeners.into_iter().map(|(handle, mut load)| {
            let sockets = own.get(&handle).map_or(&[][..], |own| &own.sockets);
            let queued = sockets
                .iter()
                .map(|socket| sys::listen::backlog_length(socket));
            load.queued = queued.sum();
            load
        });
        Loads {
            workers,
            listeners: counted.collect(),
        }
    }

    /// Sets `in_service` in each load.
    pub(crate) fn add_in_service(&self, loads: &mut [WorkerLoad]) {
        let workers = self.workers.borrow();
        for load in loads {
            let worker_io = workers.get(&load.worker);
            load.in_service = worker_io.and_then(|worker_io| worker_io.in_service());
        }
    }
}
