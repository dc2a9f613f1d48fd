//! Placeholder.
#![allow(dead_code)]

mod address;
mod callbacks;
mod channel;
mod error;
mod frame;
mod ledger;
mod master_core;
mod message;
mod round_robin;
mod settings;
mod signal;
#[cfg(test)]
mod simulation;
#[allow(unsafe_code)]
mod sys;
mod timers;
mod worker_core;
mod worker_id;

pub use address::{Address, AddressType};
pub use callbacks::CallbackId;
pub use error::{Error, Result, SendError};
pub use frame::FrameError;
pub use ledger::Ledger;
pub use master_core::WorkerState;
pub use message::Message;
pub use settings::{SchedulingPolicy, Settings, UnknownPolicy};
pub use signal::Signal;
pub use sys::poll::Interest;
pub use timers::TimerId;
pub use worker_id::WorkerId;
