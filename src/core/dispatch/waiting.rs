//! The connections that have been accepted and are not in a worker's queue. Each has a target: the
//! next worker by the dispatcher's rules, or the worker that the application's scheduler chooses.

use super::member::Member;
use super::{Dispatcher, Sequenced};
use crate::types::worker_id::WorkerId;

/// A connection that has been accepted and is not in a worker's queue.
#[derive(Debug)]
pub(super) struct Waiting<C> {
    pub(super) connection: C,
    pub(super) target: Target,
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

    /// Returns the first connection for which the scheduler has not been called, with its sequence
    /// number.
    ///
    /// Returns `None` if there is no such connection, or no worker to choose from.
    pub(crate) fn unscheduled(&self) -> Option<(u64, &C)> {
        let sequence = self.unscheduled.first()?;
        if self.candidate_count == 0 {
            return None;
        }
        Some((sequence, &self.waiting.get(sequence)?.connection))
    }

    /// Assigns an unscheduled connection to the scheduler's choice.
    ///
    /// If `worker` is `None` or may not be chosen, the connection goes to the next worker according
    /// to the rules.
    pub(crate) fn choose(&mut self, sequence: u64, worker: Option<WorkerId>) {
        if !self.unscheduled.contains(sequence) {
            return;
        }
        let candidate = worker.filter(|worker| {
            let member = self.members.get(worker);
            member.is_some_and(Member::is_candidate)
        });
        if let Some(connection) = self.dequeue(sequence) {
            let target = candidate.map_or(Target::Next, Target::Assigned);
            self.enqueue(connection, target);
        }
    }

    pub(super) fn enqueue(&mut self, connection: Sequenced<C>, target: Target) {
        let Sequenced {
            sequence,
            connection,
        } = connection;
        match target {
            Target::Next => {
                self.unassigned.insert(sequence);
            }
            Target::Unscheduled => {
                self.unscheduled.insert(sequence);
            }
            Target::Assigned(worker) => {
                self.update(worker, |member| member.assigned.insert(sequence));
            }
        }
        let waiting = Waiting { connection, target };
        self.waiting.insert(sequence, waiting);
    }

    pub(super) fn dequeue(&mut self, sequence: u64) -> Option<Sequenced<C>> {
        let Waiting { connection, target } = self.waiting.remove(sequence)?;
        match target {
            Target::Next => {
                self.unassigned.remove(sequence);
            }
            Target::Unscheduled => {
                self.unscheduled.remove(sequence);
            }
            Target::Assigned(worker) => {
                self.update(worker, |member| member.assigned.remove(sequence));
            }
        }
        Some(Sequenced {
            sequence,
            connection,
        })
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
        self.push_resumed(connection);
    }

    /// Adds a connection whose client has sent something while the master held it.
    pub(crate) fn push_resumed(&mut self, connection: C) {
        self.last_sequence += 1;
        let connection = Sequenced {
            sequence: self.last_sequence,
            connection,
        };
        self.enqueue(connection, self.default_target());
    }

    /// Counts a connection that has been accepted, and that the master holds until its client sends
    /// something.
    pub(crate) fn count_accepted(&mut self) {
        self.accepted += 1;
    }

    /// Adds connections that have already been dispatched once, and marks them as having waited,
    /// because their clients may have hung up in the meantime.
    pub(super) fn push_back(&mut self, connections: Vec<Sequenced<C>>) {
        for connection in connections {
            self.last_delayed = self.last_delayed.max(connection.sequence);
            self.enqueue(connection, self.default_target());
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
            swept.closed.extend(closed.map(|closed| closed.connection));
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
        taken.map(|taken| taken.connection).collect()
    }
}
