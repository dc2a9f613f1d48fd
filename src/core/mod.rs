//! Every decision, as pure state machines: the master, the worker, and the dispatcher.
//!
//! Inputs are facts: a frame has arrived, a process has exited, the time is now. Outputs are actions
//! and events. There is no descriptor, no clock and no system call in this folder. The `master` and
//! `worker` folders carry the actions out, and `sim` runs the same code through random schedules.

pub(crate) mod dispatch;
pub(crate) mod event;
pub(crate) mod master;
pub(crate) mod worker;
