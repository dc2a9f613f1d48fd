//! Simulates the master's shell, which carries out the actions of the master's core, and the
//! master's application. As in the real shell, each kind of action has a file.

mod application;
mod channels;
mod listeners;
mod parked;
mod queues;

use super::socket::{Client, PortState};
use super::{Master, World};
use crate::core::master::{Action, Attachment};
use crate::types::endpoint::Kind;
use crate::types::handle::HandleId;
pub(crate) use application::Call;

/// The maximum number of connections that a single `Accept` action accepts.
const MAX_ACCEPTED: usize = 64;

/// Returns the listener's handle if the attachment is a copy of a listener.
pub(crate) fn listener_of(attachment: Attachment) -> Option<HandleId> {
    match attachment {
        Attachment::Listener(handle) => Some(handle),
        Attachment::None | Attachment::Queue(_) | Attachment::Shard(..) => None,
    }
}

impl World {
    /// Calls the master's core with an input, and checks that the number of resulting actions and
    /// events is bounded.
    pub(crate) fn report<T>(&mut self, input: impl FnOnce(&mut Master) -> T) -> T {
        let before = self.master.sizes();
        let in_flight = usize::try_from(self.master.in_flight()).unwrap_or(usize::MAX);
        let connections = in_flight + self.count_queued();
        let result = input(&mut self.master);
        let after = self.master.sizes();
        let workers = before.processes.max(after.processes).max(2);
        let handles = before.handles.max(after.handles);
        // Allow four actions for each pair of a listener and a worker, because one input may remove
        // every worker from every listener.
        let max = 16 + MAX_ACCEPTED + connections + self.held.len() + 4 * handles * workers;
        let actions = after.actions - before.actions;
        assert!(actions <= max, "{actions} actions after one input");
        let events = after.events - before.events;
        assert!(events <= 6 * workers, "{events} events after one input");
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
                attachment,
            } => self.send(worker, frame, attachment),
            Action::Dispatch {
                handle,
                worker,
                connection,
                has_waited,
            } => self.dispatch(handle, worker, connection, has_waited),
            Action::Hold { id, connection } => self.hold_connection(id, connection),
            Action::AwaitData { id } => self.await_data(id),
            Action::CloseHeld { id } => self.close_held(id),
            Action::MoveParked {
                handle,
                worker,
                connection,
                history,
            } => self.move_parked(handle, worker, connection, history),
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
