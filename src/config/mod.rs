//! What the application asks for, as data: settings of workers, and options of calls.
//!
//! Values are checked and completed here. Carrying them out is the business of `master`, `worker`
//! and `sys`.

pub(crate) mod listen;
pub(crate) mod send;
pub(crate) mod settings;
