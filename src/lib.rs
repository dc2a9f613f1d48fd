#![doc = include_str!("../README.md")]

// So that the pool names things as any other program does.
extern crate self as cluster;

mod config;
mod core;
mod error;
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

pub use config::listen::{BindOptions, ListenOptions};
pub use config::send::SendOptions;
pub use config::settings::{
    InspectPort, SchedulingPolicy, Settings, Stdio, UnknownPolicy, WorkerMain,
};
pub use core::event::WorkerState;
pub use error::{Error, Result, SendError};
pub use init::{Role, available_parallelism, init, is_master, is_worker};
pub use master::Master;
pub use master::listener::MasterListener;
pub use master::worker_process::{Process, WorkerProcess};
pub use runtime::callbacks::CallbackId;
pub use runtime::event_loop::{LoopId, WatchId};
pub use runtime::timers::TimerId;
pub use sys::poll::Interest;
pub use sys::process::Usage;
pub use types::address::{Address, AddressType};
pub use types::ledger::Ledger;
pub use types::loads::{ListenerLoad, Loads, WorkerLoad};
pub use types::message::Message;
pub use types::signal::Signal;
pub use types::worker_id::WorkerId;
pub use wire::frame::FrameError;
pub use worker::listener::{Connection, Incoming, Listener};
pub use worker::udp_socket::UdpSocket;
pub use worker::{OwnProcess, Worker};
