//! Finished connections whose clients may still be sending. The worker discards what they send.
//!
//! ```text
//! from       event                                                            to
//! ---------  ---------------------------------------------------------------  ---------
//! (none)     the application finishes a connection                            Lingering
//! Lingering  the client closes, `LINGER_TIMEOUT` has passed, the shell has    (removed)
//!            discarded too many bytes, or the worker holds too many
//!            connections
//! Lingering  the channel closes                                               (removed)
//! ```
//!
//! A lingering connection no longer counts as open, because the application cannot use it. A
//! disconnecting worker keeps its channel open until its lingering connections are removed.

use super::{ConnectionId, Entry, NO_LISTENER, State, WorkerCore};
use crate::types::time::Time;

/// Maximum time from the call of `finish` until the connection is closed, besides the granularity
/// of one second.
///
/// With a longer time, more hostile clients occupy descriptors, and a disconnect takes longer. A
/// shorter time would disconnect clients that send a large request slowly. nginx allows 30 seconds
/// (`lingering_time`).
pub(crate) const LINGER_TIMEOUT: Time = Time::from_secs(5);
/// Maximum delay of the check for expired connections, without which a lingering connection starts
/// its time again.
///
/// With a longer delay, the clients of a busy worker may be disconnected although the worker has
/// read nothing. With a shorter delay, a hostile client gains time whenever the system is busy. No
/// benchmark chose this value.
const LATE: Time = Time::from_secs(1);

impl<F> WorkerCore<F> {
    /// Returns whether this worker can wait for the end of a connection.
    pub(crate) fn can_linger(&self) -> bool {
        self.is_writable()
    }

    /// Adds a connection that the application has finished. The shell discards what the client
    /// sends, and then calls `hung_up`. The connection that expires first closes if the worker holds
    /// too many. Returns `None` if the connection must close at once.
    pub(crate) fn linger(&mut self, now: Time) -> Option<ConnectionId> {
        let expiry = self.parked.expiries.next_expiry(now, LINGER_TIMEOUT);
        self.insert_within_limit(Entry {
            listener: NO_LISTENER,
            handle: None,
            times_parked: 0,
            state: State::Lingering(expiry),
        })
    }

    /// Starts the time of expired lingering connections again if the check for them is late. The
    /// worker was busy, so it has not read what their clients have sent.
    pub(super) fn extend_late(&mut self, now: Time) {
        let is_late = |id: &ConnectionId| {
            let state = self.parked.state(*id);
            matches!(state, Some(State::Lingering(expiry)) if expiry.time().saturating_add(LATE) < now)
        };
        let late: Vec<_> = self.parked.expiries.due(now).filter(is_late).collect();
        for id in late {
            let expiry = self.parked.expiries.next_expiry(now, LINGER_TIMEOUT);
            self.parked.set(id, State::Lingering(expiry));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::worker::Action;
    use crate::wire::frame::ToWorker;

    const NOW: Time = Time::from_millis(100);

    fn actions(core: &mut WorkerCore<()>) -> Vec<Action> {
        std::iter::from_fn(|| core.next_action()).collect()
    }

    /// Returns a core with lingering connections.
    fn lingering<const N: usize>() -> (WorkerCore<()>, [ConnectionId; N]) {
        let mut core = WorkerCore::new();
        actions(&mut core);
        let ids = [(); N].map(|()| core.linger(NOW).unwrap());
        (core, ids)
    }

    #[test]
    fn lingering_connection_closes_with_its_client_or_at_the_timeout() {
        let (mut core, [first, second]) = lingering();
        assert_eq!(core.data_arrived(first), None);
        core.hung_up(first);
        assert_eq!(actions(&mut core), [Action::CloseParked(first)]);
        assert_eq!(core.parked_deadline(), Some(Time::from_secs(6)));
        core.expire_parked(Time::from_secs(6));
        assert_eq!(actions(&mut core), [Action::CloseParked(second)]);
        assert_eq!(core.parked_deadline(), None);
    }

    #[test]
    fn lingering_connection_of_a_busy_worker_starts_its_time_again() {
        let (mut core, [id]) = lingering();
        core.expire_parked(Time::from_secs(20));
        assert_eq!(actions(&mut core), []);
        assert_eq!(core.parked_deadline(), Some(Time::from_secs(25)));
        core.expire_parked(Time::from_secs(25));
        assert_eq!(actions(&mut core), [Action::CloseParked(id)]);
    }

    #[test]
    fn oldest_lingering_connection_closes_beyond_the_limit() {
        let (mut core, [first, _]) = lingering();
        core.set_parked_limit(2);
        core.linger(NOW).unwrap();
        assert_eq!(actions(&mut core), [Action::CloseParked(first)]);
    }

    #[test]
    fn disconnecting_worker_waits_for_lingering_connections() {
        let (mut core, [id]) = lingering();
        core.frame(ToWorker::Disconnect).unwrap();
        core.release_parked();
        core.waiting_for_events();
        assert!(!core.is_drained());
        assert_eq!(actions(&mut core), [Action::MarkDisconnecting]);
        core.hung_up(id);
        assert_eq!(actions(&mut core), [Action::CloseParked(id)]);
        assert!(core.is_drained());
    }

    #[test]
    fn closed_channel_closes_lingering_connections() {
        let (mut core, [id]) = lingering();
        core.channel_closed();
        assert!(actions(&mut core).contains(&Action::CloseParked(id)));
        assert!(!core.can_linger());
    }
}
