//! Child processes: starting them, signalling them and waiting for them.
//!
//! - `program`: the program of a child, and how the parent starts it
//! - `child`: the steps of the child between `fork` and `execve`
//! - `report`: the reports of the child to its parent meanwhile
//! - `pid`: the identity of a child, its signals and its exit

pub(super) mod child;
pub(super) mod pid;
mod program;
mod report;

pub use pid::Usage;
pub(crate) use pid::{Exit, Pid, Unreaped};
pub(super) use program::Started;
pub(crate) use program::{Failure, Program};
