//! Exchanges bytes and descriptors between two processes. The modules define the frames, the
//! channel that carries frames, and the channel code that the shells of both roles share.
//!
//! The modules do not depend on what a frame means to the master or to a worker.

pub(crate) mod channel;
pub(crate) mod driver;
pub(crate) mod fault;
pub(crate) mod frame;
pub(crate) mod message;
pub(crate) mod receipts;
