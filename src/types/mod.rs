//! Plain values that every other module may use.
//!
//! Nothing here decides anything, makes a system call or knows a module outside of this folder,
//! except for descriptors that a value carries.

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
