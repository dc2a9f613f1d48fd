//! Starts child processes, signals them and waits for them.
//!
//! - `program`: the child's program, and how the parent starts it
//! - `child`: the child's steps between `fork` and `execve`
//! - `report`: the child's reports to its parent during these steps
//! - `pid`: the child's identity, its signals and its exit
//! - `user`: the user of this process, which its children have by default
//! - `children`: the children that have exited, including those that other code has started

pub(super) mod child;
mod children;
pub(super) mod pid;
mod program;
mod report;
pub(crate) mod user;

pub(crate) use children::exited_children;
pub use pid::Usage;
pub(crate) use pid::{ChildState, Exit, GroupSearch, Pid, Unreaped};
pub(super) use program::Started;
pub(crate) use program::{Failure, ForkedProcess, Program};
