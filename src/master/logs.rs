//! The logs whose waiting lines the master's loop writes.

use std::time::Duration;

use crate::master::Master;
use crate::runtime::log::{AttachedLogs, LogWriter};

/// Delay before the next write to a log whose target was reported as writable but accepted no
/// bytes, such as a terminal with less space than one line feed needs.
///
/// With a much shorter delay, the loop would nearly spin. A longer delay holds the lines back
/// longer.
const LOG_BACK_OFF: Duration = Duration::from_millis(100);

impl Master {
    /// Lets the loop write the lines that wait in a log.
    pub(crate) fn attach_log(&self, log: &LogWriter) {
        self.logs.add(log, self.event_loop.poller());
    }

    /// Writes a line to standard error if `CLUSTER_DEBUG` is `1`.
    pub(super) fn log(&self, event: std::fmt::Arguments<'_>) {
        if let Some(log) = &self.debug_log {
            log.line(format_args!("{},Master {event}", std::process::id()));
        }
    }

    pub(super) fn log_ready(&self, number: u32) {
        if let Some(log) = self.logs.ready(number) {
            let timer = self.set_timeout(LOG_BACK_OFF, move |_| AttachedLogs::try_again(&log));
            self.unreference(timer);
        }
    }
}

impl LogWriter {
    /// Lets the master's loop write the waiting lines as soon as the log's target accepts them.
    ///
    /// Node has no counterpart.
    ///
    /// While no line waits, attaching costs nothing. The master's [`run`](Master::run) returns even
    /// if lines still wait. If the log is not attached, or after the master has been dropped,
    /// waiting lines are written together with the next line.
    ///
    /// ```no_run
    /// # fn f(master: &cluster::Master) {
    /// let log = cluster::LogWriter::stderr().attached_to(master);
    /// # }
    /// ```
    #[must_use]
    pub fn attached_to(self, master: &Master) -> Self {
        master.attach_log(&self);
        self
    }
}
