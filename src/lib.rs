//! [guide]: crate::guide
//! [questions]: crate::guide#if-you-ask
//! [quick_start]: crate::guide::quick_start
//! [how_it_works]: crate::guide::how_it_works
//! [writing_workers]: crate::guide::writing_workers
//! [servers]: crate::guide::servers
//! [pools]: crate::guide::pools
//! [deploying]: crate::guide::deploying
//! [devices]: crate::guide::devices
//! [operating]: crate::guide::operating
//! [from_node]: crate::guide::from_node
//! [guarantees]: crate::guide::guarantees
//! [costs]: crate::guide::costs
//! [limits]: crate::guide::limits
//! [design]: crate::guide::design
//! [glossary]: crate::guide::glossary
//! [set_scheduler]: Master::set_scheduler
//! [set_scheduling_policy]: Master::set_scheduling_policy
//! [examples]: crate::guide::quick_start#examples
//! [tests]: https://docs.rs/crate/cluster/latest/source/tests/process/
//! [changelog]: https://docs.rs/crate/cluster/latest/source/CHANGELOG.md
//! [conformance]: https://docs.rs/crate/cluster/latest/source/tests/CONFORMANCE.md
//! [static]: https://docs.rs/crate/cluster/latest/source/tests/checks/static
//! [mit]: https://docs.rs/crate/cluster/latest/source/LICENSE-MIT
//! [apache]: https://docs.rs/crate/cluster/latest/source/LICENSE-APACHE
//!
#![cfg_attr(doc, doc = include_str!("guide/pictures/inline.md"))]
#![doc = include_str!("../README.md")]

// The rendered documentation uses the first definition of each link. These definitions therefore
// replace the relative paths at the end of README.md, which work on the repository's page.

// Where to start: `core` makes the decisions, and each `mod.rs` in `core` describes those of its
// module. `master` and `worker` are the public API and carry the decisions out. `wire` defines the
// protocol between the processes. `sys` makes the system calls.

// Lets `pool` name the public API by the paths that an application uses (`cluster::…`).
extern crate self as cluster;

mod config;
mod core;
mod error;
#[cfg(doc)]
pub mod guide;
mod init;
mod master;
pub mod pool;
mod runtime;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod sim;
#[allow(unsafe_code)]
mod sys;
pub mod systemd;
mod types;
mod wire;
mod worker;

pub use config::inspect_port::InspectPort;
pub use config::listen::{BindOptions, ListenOptions};
pub use config::send::{SendOptions, Sent};
pub use config::settings::{Setting, Settings};
pub use config::spawn::SpawnOptions;
pub use config::stdio::Stdio;
pub use core::master::event::WorkerState;
pub use error::{Error, Result, SendError, WatchError};
pub use init::{Role, available_parallelism, init, is_master, is_worker};
pub use master::Master;
pub use master::listener::MasterListener;
pub use master::process::Process;
pub use master::worker_process::WorkerProcess;
pub use runtime::callbacks::CallbackId;
pub use runtime::event_loop::{LoopId, WatchId};
pub use runtime::log::LogWriter;
pub use runtime::timers::TimerId;
pub use sys::poll::Interest;
pub use sys::process::Usage;
pub use types::address::Address;
pub use types::fork_step::ForkStep;
pub use types::ledger::Ledger;
pub use types::loads::{ListenerLoad, Loads, WorkerLoad};
pub use types::policy::{SchedulingPolicy, UnknownPolicy};
pub use types::protocol::{FrameError, Violation};
pub use types::signal::{InvalidSignal, Signal};
pub use types::worker_id::WorkerId;
pub use wire::message::Message;
pub use worker::Worker;
pub use worker::connection::Connection;
pub use worker::disconnect_token::DisconnectToken;
pub use worker::guard::ConnectionGuard;
pub use worker::listener::{Incoming, Listener};
pub use worker::own_process::OwnProcess;
pub use worker::std_listener::Streams;
pub use worker::udp_socket::UdpSocket;

/// Returns the worker id `number`, for the unit tests of the pool. The pool uses only the public
/// API, and the public API has no constructor for worker ids.
#[cfg(test)]
fn worker_id(number: u32) -> WorkerId {
    WorkerId::new(number)
}
