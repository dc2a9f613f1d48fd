//! Simulates the connections that a worker's application has finished.

use super::World;
use crate::core::worker::LINGER_TIMEOUT;
use crate::sim::kernel::KNOWN;
use crate::sim::kernel::process::Process;
use crate::sim::kernel::socket::Client;
use crate::types::time::Time;
use crate::types::worker_id::WorkerId;

/// The maximum delay of a check after which a lingering connection still closes. With a longer
/// delay, its time starts again.
const LATE: Time = Time::from_secs(1);

/// A connection whose worker discards what the client sends.
#[derive(Debug)]
pub(crate) struct Lingering {
    client: Client,
    /// The time at which the worker closes the connection.
    end: Time,
}

impl Lingering {
    fn new(client: Client, now: Time) -> Self {
        Self {
            client,
            end: end_after(now),
        }
    }
}

/// Returns the time at which a connection closes whose time starts now. It is a whole second.
fn end_after(now: Time) -> Time {
    let end = now + LINGER_TIMEOUT;
    Time::from_secs(end.as_secs() + u64::from(end.subsec_nanos() > 0))
}

impl World {
    /// Makes the application finish one of its connections, if it has any. `n` selects the
    /// connection.
    pub(crate) fn finish_connection(&mut self, worker: WorkerId, n: u8) {
        let now = self.now;
        let Some(client) = self.close_connection(worker, n) else {
            return;
        };
        let process = self.process(worker);
        let can_linger = process.core.can_linger();
        if let Some(id) = can_linger.then(|| process.core.linger(now)).flatten() {
            process.lingering.insert(id, Lingering::new(client, now));
        }
        self.gather_from_worker(worker);
    }

    /// Makes the worker's poller report the lingering connections whose clients have hung up, and
    /// discards what the others have sent.
    pub(super) fn poll_lingering(&mut self, worker: WorkerId) {
        let process = self.processes.get_mut(&worker).expect(KNOWN);
        for (id, connection) in &process.lingering {
            let fate = &mut self.fates[connection.client.client as usize];
            fate.is_pending = false;
            if fate.left {
                process.core.hung_up(*id);
            }
        }
        self.gather_from_worker(worker);
    }

    /// Checks, after the worker has closed its expired connections, that no lingering connection
    /// has outlived its time.
    pub(super) fn check_expired_lingering(&mut self, worker: WorkerId) {
        let now = self.now;
        for connection in self.process(worker).lingering.values_mut() {
            if connection.end + LATE < now {
                connection.end = end_after(now);
            }
            assert!(now < connection.end, "a connection lingers for too long");
        }
    }
}

impl Process {
    /// Checks that the worker wakes up at the end of each lingering connection, and that it has no
    /// deadline without a connection.
    pub(crate) fn check_deadline(&self) {
        let deadline = self.core.parked_deadline();
        for connection in self.lingering.values() {
            let wakes = deadline.is_some_and(|time| time <= connection.end);
            assert!(wakes, "no tick at the end of a lingering connection");
        }
        let holds_any = !self.parked.is_empty() || !self.lingering.is_empty();
        assert!(holds_any || deadline.is_none(), "wakes up for nothing");
    }
}
