//! Bytes and descriptors between two processes: the frames, the channel that carries them, and what
//! both shells do with a channel.
//!
//! Nothing here knows what a frame means to the master or to a worker.

pub(crate) mod channel;
pub(crate) mod driver;
pub(crate) mod fault;
pub(crate) mod frame;
pub(crate) mod receipts;
