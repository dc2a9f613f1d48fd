//! The application's requests as data: settings of workers, and options of calls.
//!
//! Values are checked here and get their defaults here. `master`, `worker` and `sys` carry them out.

pub(crate) mod env;
pub(crate) mod inspect_port;
pub(crate) mod listen;
pub(crate) mod send;
pub(crate) mod settings;
pub(crate) mod spawn;
pub(crate) mod stdio;
