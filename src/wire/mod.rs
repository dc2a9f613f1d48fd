//! Exchanges bytes and descriptors between two processes: the frames, the channel that carries
//! them, and the parts of the shells that both roles share.
//!
//! These modules do not depend on what a frame means to the master or to a worker.

pub(crate) mod channel;
pub(crate) mod driver;
pub(crate) mod fault;
pub(crate) mod frame;
pub(crate) mod receipts;
