//! Schedules a new attempt after the system has run out of a resource. The module makes no system
//! calls, because the time is an argument.

use std::time::Duration;

use crate::types::time::Time;

/// The time between a failure for lack of memory or descriptors and the next attempt.
///
/// No event reports that the resource is available again. A longer time delays frames and
/// connections that could continue. A shorter time costs CPU time while the system is short of
/// resources. A person does not notice a delay of 100 ms, and ten attempts per second are cheap. No
/// benchmark chose the value.
///
/// This is also the time between two checks of a draining process group: a longer time delays the
/// worker's `exit` event, and a shorter time reads `/proc` more often.
pub(crate) const BACKOFF: Duration = Duration::from_millis(100);

/// The time of the next attempt, if one is scheduled. Further failures do not change this time. The
/// default value has no scheduled attempt.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Backoff {
    deadline: Option<Time>,
}

impl Backoff {
    /// Schedules the next attempt, unless an attempt is scheduled already.
    pub(crate) fn start(&mut self, now: Time) {
        self.deadline.get_or_insert(now.saturating_add(BACKOFF));
    }

    pub(crate) fn deadline(self) -> Option<Time> {
        self.deadline
    }

    pub(crate) fn is_due(self, now: Time) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_failures_do_not_postpone_the_attempt() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.deadline(), None);
        assert!(!backoff.is_due(Time::MAX));
        backoff.start(Time::ZERO);
        backoff.start(BACKOFF / 2);
        assert_eq!(backoff.deadline(), Some(BACKOFF));
        assert!(!backoff.is_due(BACKOFF / 2));
        assert!(backoff.is_due(BACKOFF));
    }
}
