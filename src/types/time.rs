//! The time type, and the choice of the earlier deadline.

use std::time::Duration;

/// The time since the event loop was created.
pub(crate) type Time = Duration;

/// Returns the earlier of two deadlines, or the shorter of two timeouts. `None` means no limit.
pub(crate) fn earlier(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}
