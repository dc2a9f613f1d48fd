//! The workers of one listener.

use crate::types::sorted_map::SortedMap;
use crate::types::worker_id::WorkerId;

/// The role of a worker in serving the listener.
///
/// ```text
/// from            event                                                    to
/// --------------  -------------------------------------------------------  -------
/// Serving         the listener ends for this worker, or for all workers    Ended
/// Serving, Ended  the worker releases the listener, or its channel closes  Closing
/// Closing         its queue is closed                                      (removed)
/// ```
///
/// A worker without a queue does not become `Closing`, but is removed immediately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The worker is eligible for new connections.
    Serving,
    /// The worker is not eligible for new connections, but may still receive or return earlier
    /// ones.
    Ended,
    /// The connections in the worker's queue are being reclaimed, and the queue is being closed.
    Closing,
}

#[derive(Clone, Copy, Debug)]
struct Member {
    state: State,
    /// Whether the worker has sent `Listening`, because its application has the listener.
    is_listening: bool,
}

/// The workers that may still receive or return connections of one listener.
#[derive(Debug)]
pub(super) struct Members(SortedMap<WorkerId, Member>);

impl Members {
    pub(super) const fn new() -> Self {
        Self(SortedMap::new())
    }

    /// Adds a worker that serves the listener.
    pub(super) fn add(&mut self, worker: WorkerId) {
        let member = Member {
            state: State::Serving,
            is_listening: false,
        };
        self.0.insert(worker, member);
    }

    /// Removes the worker. Returns whether it was a member.
    pub(super) fn remove(&mut self, worker: WorkerId) -> bool {
        self.0.remove(&worker).is_some()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn contains(&self, worker: WorkerId) -> bool {
        self.0.contains_key(&worker)
    }

    /// Returns whether there is any member other than this worker.
    pub(super) fn has_others(&self, worker: Option<WorkerId>) -> bool {
        self.0.keys().any(|other| Some(*other) != worker)
    }

    pub(super) fn is_serving(&self, worker: WorkerId) -> bool {
        self.0
            .get(&worker)
            .is_some_and(|member| member.state == State::Serving)
    }

    pub(super) fn is_closing(&self, worker: WorkerId) -> bool {
        self.0
            .get(&worker)
            .is_some_and(|member| member.state == State::Closing)
    }

    /// Returns the workers that serve the listener.
    pub(super) fn serving(&self) -> impl Iterator<Item = WorkerId> + '_ {
        let serving = self
            .0
            .iter()
            .filter(|(_, member)| member.state == State::Serving);
        serving.map(|(worker, _)| *worker)
    }

    /// Returns the workers for which the listener has ended, and whose applications still have it.
    pub(super) fn ended(&self) -> impl Iterator<Item = WorkerId> + '_ {
        let has_ended = |member: &Member| member.state == State::Ended && member.is_listening;
        let ended = self.0.iter().filter(move |(_, member)| has_ended(member));
        ended.map(|(worker, _)| *worker)
    }

    /// Returns whether any worker serves the listener.
    pub(super) fn is_served(&self) -> bool {
        self.serving().next().is_some()
    }

    /// Records that the worker has sent `Listening`. Returns whether the worker had already sent
    /// it.
    ///
    /// Returns `None` if the worker does not have the listener.
    pub(super) fn listening(&mut self, worker: WorkerId) -> Option<bool> {
        let member = self.0.get_mut(&worker)?;
        Some(std::mem::replace(&mut member.is_listening, true))
    }

    /// Ends the listener for the worker. Returns whether the worker served it.
    pub(super) fn end(&mut self, worker: WorkerId) -> bool {
        match self.0.get_mut(&worker) {
            Some(member) if member.state == State::Serving => {
                member.state = State::Ended;
                true
            }
            Some(_) | None => false,
        }
    }

    /// Records that the worker has released the listener.
    pub(super) fn release(&mut self, worker: WorkerId) {
        self.end(worker);
        if let Some(member) = self.0.get_mut(&worker) {
            member.is_listening = false;
        }
    }

    /// Begins to close the worker's queue. Returns `false` if the queue is already being closed.
    pub(super) fn begin_closing(&mut self, worker: WorkerId) -> bool {
        if let Some(member) = self.0.get_mut(&worker) {
            return std::mem::replace(&mut member.state, State::Closing) != State::Closing;
        }
        true
    }
}
