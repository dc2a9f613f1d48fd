//! Exchanges bytes and descriptors between two processes. The modules define the frames, the
//! channel that carries frames, and the channel code that the shells share. `parked_message`
//! defines the messages between two masters. A shell is the code of the master or a worker that
//! carries out the decisions of `core`.
//!
//! These modules do not decide how the master or a worker reacts to a frame. `core` decides that.

pub(crate) mod channel;
pub(crate) mod driver;
pub(crate) mod fault;
pub(crate) mod frame;
pub(crate) mod message;
pub(crate) mod parked_message;
pub(crate) mod receipts;
