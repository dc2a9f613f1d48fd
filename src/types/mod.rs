//! Plain values that every other module may use.
//!
//! The types contain no policy and depend on no other module, apart from the descriptors that a
//! message carries. Only dropping these descriptors makes a system call.

pub(crate) mod address;
pub(crate) mod endpoint;
pub(crate) mod errno;
pub(crate) mod fork_step;
pub(crate) mod ledger;
pub(crate) mod loads;
pub(crate) mod message;
pub(crate) mod signal;
pub(crate) mod sorted_map;
pub(crate) mod time;
pub(crate) mod violation;
pub(crate) mod worker_id;
