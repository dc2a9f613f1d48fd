//! The base of both roles: one poller, timers, signals, watched descriptors, and lists of callbacks.
//!
//! Nothing here knows about workers, listeners or frames.

pub(crate) mod backoff;
pub(crate) mod callback_methods;
pub(crate) mod callbacks;
pub(crate) mod event_loop;
pub(crate) mod timers;
