#![doc = include_str!("../README.md")]

// So that the pool names things as any other program does.
extern crate self as cluster;

mod address;
mod bind;
mod callbacks;
mod channel;
mod endpoint;
mod error;
mod event;
mod event_loop;
mod fault;
mod frame;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod ledger;
mod listener;
mod loads;
mod master;
mod master_core;
mod master_listener;
mod master_shell;
mod message;
mod options;
pub mod pool;
mod role;
mod round_robin;
mod send_options;
mod settings;
mod shard_group;
mod signal;
#[cfg(test)]
mod simulation;
mod socket_file;
mod sorted_map;
#[allow(unsafe_code)]
mod sys;
pub mod systemd;
mod timers;
mod udp_socket;
mod worker;
mod worker_core;
mod worker_id;
mod worker_process;
mod worker_shell;

pub use address::{Address, AddressType};
pub use callbacks::CallbackId;
pub use error::{Error, Result, SendError};
pub use event::WorkerState;
pub use event_loop::{LoopId, WatchId};
pub use frame::FrameError;
pub use ledger::Ledger;
pub use listener::{Connection, Incoming, Listener};
pub use loads::{ListenerLoad, Loads, WorkerLoad};
pub use master::Master;
pub use master_listener::MasterListener;
pub use message::Message;
pub use options::{BindOptions, ListenOptions};
pub use role::{Role, available_parallelism, init, is_master, is_worker};
pub use send_options::SendOptions;
pub use settings::{InspectPort, SchedulingPolicy, Settings, Stdio, UnknownPolicy, WorkerMain};
pub use signal::Signal;
pub use sys::poll::Interest;
pub use sys::process::Usage;
pub use timers::TimerId;
pub use udp_socket::UdpSocket;
pub use worker::{OwnProcess, Worker};
pub use worker_id::WorkerId;
pub use worker_process::{Process, WorkerProcess};
