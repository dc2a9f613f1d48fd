//! Processing the workers' frames. See [`wire::frame`](crate::wire::frame) for their format.

use std::rc::Rc;

use super::{HandOff, MasterCore, workers::WorkerEntry};
use crate::core::dispatch::Dispatcher;
use crate::core::master::event::{Event, Level};
use crate::types::handle::HandleId;
use crate::types::protocol::FrameError;
use crate::types::protocol::Violation;
use crate::types::worker_id::WorkerId;
use crate::wire::frame::ToMaster;

const NOT_ONLINE: FrameError = FrameError::Violation(Violation::NotOnline);

impl<C, F> MasterCore<C, F> {
    /// Emits a message from the worker, with the descriptors that arrived with it. A worker that
    /// has not sent `Online` is killed instead.
    pub(crate) fn message(&mut self, worker: WorkerId, bytes: Vec<u8>, fds: F) {
        match self.workers.get(&worker) {
            Some(entry) if entry.is_online() => {
                self.emit(Level::Cluster, Some(worker), Event::Message { bytes, fds });
            }
            Some(_) => self.violation(worker, NOT_ONLINE),
            None => {}
        }
    }
}

impl<C, F> MasterCore<C, F> {
    /// Processes a frame that has arrived. For a message, the shell calls `message` instead. For a
    /// parked connection, it calls `park`.
    pub(crate) fn frame(&mut self, worker: WorkerId, frame: ToMaster) {
        if self.is_connected(worker) {
            if let Err(error) = self.process(worker, frame) {
                self.violation(worker, error);
            }
        }
    }

    fn process(&mut self, worker: WorkerId, frame: ToMaster) -> Result<(), FrameError> {
        let entry = self.workers.get(&worker);
        let is_online = entry.is_some_and(WorkerEntry::is_online);
        if !is_online && frame != ToMaster::Online {
            return Err(NOT_ONLINE);
        }
        match frame {
            ToMaster::Online => self.online(worker),
            ToMaster::Listen {
                request,
                key,
                flags,
            } => match entry.is_some_and(WorkerEntry::may_listen) {
                true => self.listen(worker, request, key, flags),
                false => Ok(()),
            },
            ToMaster::Listening { handle } => self.listening(worker, handle),
            ToMaster::Idle {
                handle,
                received,
                open,
            } => self.idle(worker, handle, received, open),
            ToMaster::Release { handle } => {
                let listener = self.listeners.get(&handle);
                let members = listener.map(|listener| &listener.members);
                let has_it = members
                    .is_some_and(|members| members.contains(worker) && !members.is_closing(worker));
                if !has_it {
                    return Err(FrameError::Violation(Violation::UnknownRelease));
                }
                self.leave_listener(handle, worker);
                Ok(())
            }
            ToMaster::DisconnectRequest => {
                self.begin_disconnect(&[worker]);
                Ok(())
            }
            ToMaster::Pause { handle } => {
                let dispatcher = self.dispatcher(handle);
                let dispatcher =
                    dispatcher.ok_or(FrameError::Violation(Violation::UnknownPause))?;
                dispatcher.pause(worker)?;
                self.reclaim_all(handle, worker);
                Ok(())
            }
            // The connection did not arrive, because this process had no free descriptor. The
            // kernel has closed it, which disconnected the client.
            ToMaster::Park { .. } => Ok(()),
            // Does not occur, because the shell calls `message`.
            ToMaster::Message(_) => Ok(()),
            ToMaster::ParkAgain { connection } => self.parked_again(worker, connection),
            ToMaster::Detach { connection } => self.detached_connection(worker, connection),
        }
    }

    fn online(&mut self, worker: WorkerId) -> Result<(), FrameError> {
        let Some(entry) = self.workers.get_mut(&worker) else {
            return Ok(());
        };
        if entry.is_online() {
            return Err(FrameError::Violation(Violation::RepeatedOnline));
        }
        entry.online();
        self.emit_both(worker, || Event::Online);
        Ok(())
    }

    fn listening(&mut self, worker: WorkerId, handle: HandleId) -> Result<(), FrameError> {
        let not_held = FrameError::Violation(Violation::UnknownListening);
        let listener = self.listeners.get_mut(&handle).ok_or(not_held)?;
        if listener.members.listening(worker).ok_or(not_held)? {
            return Err(FrameError::Violation(Violation::RepeatedListening));
        }
        let address = Rc::new(listener.public_address());
        self.emit_both(worker, || Event::Listening(Rc::clone(&address)));
        Ok(())
    }

    /// Returns the dispatcher of a listener whose workers have queues.
    ///
    /// Returns `None` for any other listener. Its workers accept connections themselves, so their
    /// frames must not make the master accept.
    fn dispatcher(&mut self, handle: HandleId) -> Option<&mut Dispatcher<HandOff<C>>> {
        let listener = self.listeners.get_mut(&handle)?;
        listener
            .master_accepts()
            .then_some(&mut listener.dispatcher)
    }

    fn idle(
        &mut self,
        worker: WorkerId,
        handle: HandleId,
        received: u64,
        open: u32,
    ) -> Result<(), FrameError> {
        let now = self.now;
        let dispatcher = self.dispatcher(handle);
        let dispatcher = dispatcher.ok_or(FrameError::Violation(Violation::UnknownIdle))?;
        let received = dispatcher.idle_reported(worker, received, open, now)?;
        self.count_received(received);
        self.dispatch_waiting(handle);
        // Reclaim before accepting, because the connections queued behind a slow request are older
        // than those in the backlog.
        if !self.rebalance(handle) {
            self.accept_if_possible(handle);
        }
        self.check_backlog_if_draining(handle);
        Ok(())
    }
}
