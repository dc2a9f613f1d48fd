#![doc = include_str!("../README.md")]

mod address;
mod callbacks;
mod channel;
mod error;
mod event;
mod event_loop;
mod frame;
mod ledger;
mod listener;
mod master;
mod master_core;
mod master_shell;
mod message;
mod role;
mod round_robin;
mod settings;
mod signal;
#[cfg(test)]
mod simulation;
#[allow(unsafe_code)]
mod sys;
mod timers;
mod worker;
mod worker_core;
mod worker_id;
mod worker_process;
mod worker_shell;

pub use address::{Address, AddressType};
pub use callbacks::CallbackId;
pub use error::{Error, Result, SendError};
pub use event::WorkerState;
pub use event_loop::WatchId;
pub use frame::FrameError;
pub use ledger::Ledger;
pub use listener::{Connection, Incoming, Listener};
pub use master::Master;
pub use message::Message;
pub use role::{Role, available_parallelism, init, is_master, is_worker};
pub use settings::{SchedulingPolicy, Settings, UnknownPolicy};
pub use signal::Signal;
pub use sys::poll::Interest;
pub use timers::TimerId;
pub use worker::Worker;
pub use worker_id::WorkerId;
pub use worker_process::{Process, WorkerProcess};
