//! Plain values that every other module may use.
//!
//! The types depend on no other module, decide nothing and make no system calls.

pub(crate) mod address;
pub(crate) mod chunks;
pub(crate) mod connection_id;
pub(crate) mod endpoint;
pub(crate) mod errno;
pub(crate) mod fork_step;
pub(crate) mod handle;
pub(crate) mod ledger;
pub(crate) mod loads;
pub(crate) mod number_map;
pub(crate) mod ordered_set;
pub(crate) mod policy;
pub(crate) mod poll_number;
pub(crate) mod protocol;
pub(crate) mod signal;
pub(crate) mod socket_id;
pub(crate) mod sorted_map;
pub(crate) mod time;
pub(crate) mod user;
pub(crate) mod worker_id;
