//! Support for systemd's socket activation, notifications and watchdog.
//!
//! This module also works with other programs that follow these protocols, such as `s6`, Podman and
//! `systemfd`.
//!
//! Node has no counterpart.
//!
//! The master is the service's main process. With [`listen_fds`], the master takes the sockets that
//! systemd has opened. With [`notify`], the master notifies systemd of the service's state. Workers
//! do not inherit `NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID` and `LISTEN_*` from the master's
//! environment. Without this rule, a worker that sends `READY=1` for itself would report that the
//! whole service is ready.
//!
//! If a worker should send notifications, set `NOTIFY_SOCKET` with
//! [`Master::fork_with`](crate::Master::fork_with). To pass descriptors to a worker by systemd's
//! protocol, use [`Settings::listen_fds`](crate::Settings::listen_fds()).
//!
//! ```no_run
//! use cluster::{Role, systemd};
//!
//! fn main() -> cluster::Result<()> {
//!     let passed = systemd::listen_fds()?;
//!     match cluster::init()? {
//!         Role::Master(master) => {
//!             let mut listeners = Vec::new();
//!             for fd in passed {
//!                 listeners.push(master.adopt(fd)?);
//!             }
//!             master.fork()?;
//!             master.on_listening(|_, _, _| drop(systemd::notify("READY=1")));
//!             if let Some(timeout) = systemd::watchdog()? {
//!                 master.set_interval(timeout / 2, |_| drop(systemd::notify("WATCHDOG=1")));
//!             }
//!             master.run()
//!         }
//!         Role::Worker(worker) => {
//!             let listener = worker.listen("127.0.0.1:8000")?; // as in the socket unit
//!             for connection in listener.incoming() {
//!                 drop(connection?);
//!             }
//!             Ok(())
//!         }
//!     }
//! }
//! ```

// `sockets` and `notification` contain the public API. `environment` contains the variables that
// both of them use and decides which variables workers inherit.
mod environment;
mod notification;
mod sockets;

pub(crate) use environment::{
    LISTEN_PID, inherited_environment, remove_variables, set_listen_variables,
};
pub use notification::{notify, reloading, status, watchdog};
pub use sockets::{ListenFd, listen_fds};
