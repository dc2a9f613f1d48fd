//! What both roles run on: one poller, timers, signals, watched descriptors, and lists of callbacks.
//!
//! Nothing here knows about workers, listeners or frames.

pub(crate) mod callbacks;
pub(crate) mod event_loop;
pub(crate) mod fault;
pub(crate) mod timers;
