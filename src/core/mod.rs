//! The decisions of the master, the worker and the dispatcher, as pure state machines.
//!
//! The inputs are requests from the application, and facts: for example, a frame has arrived, a
//! process has exited, or the time has changed. The outputs are actions and events. The `core`
//! folder uses no descriptors, clocks or system calls.
//!
//! The *shells*, in `src/master/shell` and `src/worker/shell`, report the facts and carry out the
//! actions. `sim` runs these state machines through random schedules.

pub(crate) mod dispatch;
pub(crate) mod master;
pub(crate) mod parked;
pub(crate) mod worker;
