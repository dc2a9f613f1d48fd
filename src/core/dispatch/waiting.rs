//! The connections that have been accepted and are not in a worker's queue. Each has a target: the
//! next worker by the dispatcher's rules, or the worker that the application's scheduler chooses.

use super::member::Member;
use super::{Dispatcher, Sequenced, Undispatched};
use crate::types::ordered_set::OrderedSet;
use crate::types::user::User;
use crate::types::worker_id::WorkerId;

/// A connection that has been accepted and is not in a worker's queue.
#[derive(Debug)]
pub(super) struct Waiting<C> {
    pub(super) connection: C,
    /// The user to whose workers the connection is restricted, if any.
    pub(super) user: Option<User>,
    pub(super) target: Target,
}

impl<C> Waiting<C> {
    /// Returns whether the scheduler may choose the worker for this connection.
    pub(super) fn may_choose(&self, member: &Member) -> bool {
        member.is_candidate() && self.user.is_none_or(|user| member.user == user)
    }
}

/// The waiting connections that are restricted to the workers of one user.
#[derive(Debug)]
pub(super) struct Restricted {
    /// The number of all these connections.
    pub(super) waiting: u64,
    /// The sequence numbers of the connections that are assigned to no worker.
    pub(super) unassigned: OrderedSet<u64>,
}

impl Restricted {
    pub(super) fn new() -> Self {
        Self {
            waiting: 0,
            unassigned: OrderedSet::new(),
        }
    }
}

/// The destination of a waiting connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// The next worker according to the dispatcher's rules.
    Next,
    /// Unknown, because the scheduler has not been called for the connection.
    Unscheduled,
    /// The worker that the scheduler has chosen.
    Assigned(WorkerId),
}

/// The result of one call of [`sweep`](Dispatcher::sweep).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Swept<C> {
    /// The number of connections that were checked.
    pub(crate) checked: usize,
    /// The checked connections whose clients are gone.
    pub(crate) closed: Vec<C>,
}

impl<C> Dispatcher<C> {
    pub(super) fn waiting_count(&self) -> u64 {
        self.waiting.len() as u64
    }

    /// Returns the connections that have been accepted and not been dispatched.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = &C> {
        self.waiting.iter().map(|(_, waiting)| &waiting.connection)
    }

    pub(crate) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Lets the scheduler choose the worker of each connection from now on.
    pub(crate) fn use_scheduler(&mut self) {
        self.has_scheduler = true;
    }

    /// Returns the first connection for which the scheduler has not been called and has a worker to
    /// choose from, with its sequence number.
    pub(crate) fn unscheduled(&self) -> Option<(u64, &C)> {
        if self.candidate_count == 0 {
            return None;
        }
        self.unscheduled.iter().find_map(|sequence| {
            let waiting = self.waiting.get(sequence)?;
            let mut members = self.members.iter();
            let has_choice = members.any(|(_, member)| waiting.may_choose(member));
            has_choice.then_some((sequence, &waiting.connection))
        })
    }

    /// Assigns an unscheduled connection to the scheduler's choice.
    ///
    /// If `worker` is `None` or may not be chosen, the connection goes to the next worker according
    /// to the rules.
    pub(crate) fn choose(&mut self, sequence: u64, worker: Option<WorkerId>) {
        if !self.unscheduled.contains(sequence) {
            return;
        }
        let Some(waiting) = self.waiting.get(sequence) else {
            return;
        };
        let candidate = worker.filter(|worker| {
            let member = self.members.get(worker);
            member.is_some_and(|member| waiting.may_choose(member))
        });
        if let Some(Undispatched { connection, user }) = self.dequeue(sequence) {
            let target = candidate.map_or(Target::Next, Target::Assigned);
            self.enqueue(connection, user, target);
        }
    }

    /// Adds a waiting connection. If the connection is restricted, `user` is the user to whose
    /// workers it may go.
    fn enqueue(&mut self, connection: Sequenced<C>, user: Option<User>, target: Target) {
        let Sequenced {
            sequence,
            connection,
        } = connection;
        let restricted = user.map(|user| self.restricted.get_or_insert_with(user, Restricted::new));
        let unassigned = match restricted {
            Some(restricted) => {
                restricted.waiting += 1;
                &mut restricted.unassigned
            }
            None => &mut self.unassigned,
        };
        match target {
            Target::Next => {
                unassigned.insert(sequence);
            }
            Target::Unscheduled => {
                self.unscheduled.insert(sequence);
            }
            Target::Assigned(worker) => {
                self.update(worker, |member| member.assigned.insert(sequence));
            }
        }
        let waiting = Waiting {
            connection,
            user,
            target,
        };
        self.waiting.insert(sequence, waiting);
    }

    pub(super) fn dequeue(&mut self, sequence: u64) -> Option<Undispatched<C>> {
        let Waiting {
            connection,
            user,
            target,
        } = self.waiting.remove(sequence)?;
        let restricted = user.and_then(|user| self.restricted.get_mut(&user));
        let unassigned = match restricted {
            Some(restricted) => {
                restricted.waiting -= 1;
                &mut restricted.unassigned
            }
            None => &mut self.unassigned,
        };
        match target {
            Target::Next => {
                unassigned.remove(sequence);
            }
            Target::Unscheduled => {
                self.unscheduled.remove(sequence);
            }
            Target::Assigned(worker) => {
                self.update(worker, |member| member.assigned.remove(sequence));
            }
        }
        let connection = Sequenced {
            sequence,
            connection,
        };
        Some(Undispatched { connection, user })
    }

    pub(super) fn default_target(&self) -> Target {
        if self.has_scheduler {
            Target::Unscheduled
        } else {
            Target::Next
        }
    }

    /// Adds a connection that has just been accepted.
    pub(crate) fn push(&mut self, connection: C) {
        self.accepted += 1;
        self.push_resumed(connection, None);
    }

    /// Adds a connection whose client has sent something while the master held it. If the connection
    /// is restricted, `user` is the user to whose workers it may go.
    pub(crate) fn push_resumed(&mut self, connection: C, user: Option<User>) {
        self.last_sequence += 1;
        let connection = Sequenced {
            sequence: self.last_sequence,
            connection,
        };
        self.enqueue(connection, user, self.default_target());
    }

    /// Counts a connection that has been accepted, and that the master holds until its client sends
    /// something.
    pub(crate) fn count_accepted(&mut self) {
        self.accepted += 1;
    }

    /// Adds connections that have already been dispatched once, and marks them as having waited,
    /// because their clients may have hung up in the meantime.
    pub(super) fn push_back(&mut self, connections: impl IntoIterator<Item = Undispatched<C>>) {
        for Undispatched { connection, user } in connections {
            self.last_delayed = self.last_delayed.max(connection.sequence);
            self.enqueue(connection, user, self.default_target());
        }
    }

    /// Checks at most `limit` waiting connections, and removes those for which `is_gone` returns
    /// true. Each call continues after the connection that the previous call checked last. If no
    /// later connection waits, the call starts again at the first one.
    pub(crate) fn sweep(&mut self, limit: usize, mut is_gone: impl FnMut(&C) -> bool) -> Swept<C> {
        if self.waiting.after(self.last_swept).next().is_none() {
            self.last_swept = 0;
        }
        let mut swept = Swept {
            checked: 0,
            closed: Vec::new(),
        };
        let mut gone = Vec::new();
        for (sequence, waiting) in self.waiting.after(self.last_swept).take(limit) {
            swept.checked += 1;
            self.last_swept = sequence;
            gone.extend(is_gone(&waiting.connection).then_some(sequence));
        }
        for sequence in gone {
            let closed = self.dequeue(sequence);
            swept
                .closed
                .extend(closed.map(|closed| closed.connection.connection));
        }
        swept
    }

    /// Removes and returns all waiting connections.
    pub(crate) fn take_waiting(&mut self) -> Vec<C> {
        self.take_waiting_if(|_| true)
    }

    /// Removes and returns the waiting connections for which `is_wanted` returns true.
    pub(crate) fn take_waiting_if(&mut self, is_wanted: impl Fn(&C) -> bool) -> Vec<C> {
        let wanted = self.waiting.iter();
        let wanted = wanted.filter(|(_, waiting)| is_wanted(&waiting.connection));
        let sequences: Vec<_> = wanted.map(|(sequence, _)| sequence).collect();
        let all = sequences.into_iter();
        let taken = all.filter_map(|sequence| self.dequeue(sequence));
        taken.map(|taken| taken.connection.connection).collect()
    }
}
