//! The workers of one listener.

use crate::types::sorted_map::SortedMap;
use crate::types::user::User;
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
    user: User,
    /// Whether the worker has sent `Listening`, because its application has the listener.
    is_listening: bool,
}

/// The workers that may still receive or return connections of one listener.
#[derive(Debug)]
pub(super) struct Members {
    members: SortedMap<WorkerId, Member>,
    /// The number of workers that serve the listener, by user. No number is 0.
    serving_users: SortedMap<User, usize>,
}

impl Members {
    pub(super) const fn new() -> Self {
        Self {
            members: SortedMap::new(),
            serving_users: SortedMap::new(),
        }
    }

    /// Adds a worker that serves the listener.
    pub(super) fn add(&mut self, worker: WorkerId, user: User) {
        self.remove(worker);
        let member = Member {
            state: State::Serving,
            user,
            is_listening: false,
        };
        self.members.insert(worker, member);
        *self.serving_users.get_or_insert_with(user, || 0) += 1;
    }

    /// Removes the worker. Returns whether it was a member.
    pub(super) fn remove(&mut self, worker: WorkerId) -> bool {
        self.end(worker);
        self.members.remove(&worker).is_some()
    }

    /// Returns whether no worker may receive connections that a worker of this user has parked,
    /// because all workers that serve the listener have other users.
    pub(super) fn excludes(&self, parked_by: Option<User>) -> bool {
        let is_served_by = |user| self.serving_users.contains_key(&user);
        !self.serving_users.is_empty() && !parked_by.is_none_or(is_served_by)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    pub(super) fn contains(&self, worker: WorkerId) -> bool {
        self.members.contains_key(&worker)
    }

    /// Returns whether there is any member other than this worker.
    pub(super) fn has_others(&self, worker: Option<WorkerId>) -> bool {
        self.members.keys().any(|other| Some(*other) != worker)
    }

    pub(super) fn is_serving(&self, worker: WorkerId) -> bool {
        self.members
            .get(&worker)
            .is_some_and(|member| member.state == State::Serving)
    }

    pub(super) fn is_closing(&self, worker: WorkerId) -> bool {
        self.members
            .get(&worker)
            .is_some_and(|member| member.state == State::Closing)
    }

    /// Returns the workers that serve the listener.
    pub(super) fn serving(&self) -> impl Iterator<Item = WorkerId> + Clone + '_ {
        let serving = self
            .members
            .iter()
            .filter(|(_, member)| member.state == State::Serving);
        serving.map(|(worker, _)| *worker)
    }

    /// Returns the workers for which the listener has ended, and whose applications still have it.
    pub(super) fn ended(&self) -> impl Iterator<Item = WorkerId> + '_ {
        let has_ended = |member: &Member| member.state == State::Ended && member.is_listening;
        let ended = self
            .members
            .iter()
            .filter(move |(_, member)| has_ended(member));
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
        let member = self.members.get_mut(&worker)?;
        Some(std::mem::replace(&mut member.is_listening, true))
    }

    /// Ends the listener for the worker. Returns whether the worker served it.
    pub(super) fn end(&mut self, worker: WorkerId) -> bool {
        let serving = self.members.get_mut(&worker);
        let Some(member) = serving.filter(|member| member.state == State::Serving) else {
            return false;
        };
        member.state = State::Ended;
        let count = self.serving_users.get_or_insert_with(member.user, || 0);
        *count = count.saturating_sub(1);
        if *count == 0 {
            self.serving_users.remove(&member.user);
        }
        true
    }

    /// Records that the worker has released the listener.
    pub(super) fn release(&mut self, worker: WorkerId) {
        self.end(worker);
        if let Some(member) = self.members.get_mut(&worker) {
            member.is_listening = false;
        }
    }

    /// Begins to close the worker's queue. Returns `false` if the queue is already being closed.
    pub(super) fn begin_closing(&mut self, worker: WorkerId) -> bool {
        self.end(worker);
        if let Some(member) = self.members.get_mut(&worker) {
            return std::mem::replace(&mut member.state, State::Closing) != State::Closing;
        }
        true
    }
}
