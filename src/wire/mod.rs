//! Bytes and descriptors between two processes: the frames, and the channel that carries them.
//!
//! Nothing here knows what a frame means to the master or to a worker.

pub(crate) mod channel;
pub(crate) mod frame;
