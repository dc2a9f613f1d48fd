//! Contains the event loop of both roles, with a poller, timers, signals, watched descriptors,
//! lists of callbacks, and logs.
//!
//! The modules contain no logic for workers, listeners or frames. `token::Token` only identifies
//! the channel, process, listener or other owner to which a ready descriptor belongs.

pub(crate) mod backoff;
pub(crate) mod callback_methods;
pub(crate) mod callbacks;
pub(crate) mod event_loop;
pub(crate) mod log;
pub(crate) mod timers;
pub(crate) mod token;
