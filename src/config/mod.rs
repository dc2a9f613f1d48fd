//! The application's requests as data: worker settings and call options.
//!
//! This module checks the values and fills in defaults. `master`, `worker` and `sys` use them.
//!
//! `Settings::main` takes a closure whose argument is a `Worker`. So `config` and `worker` import
//! each other.

pub(crate) mod env;
pub(crate) mod inspect_port;
pub(crate) mod listen;
pub(crate) mod send;
pub(crate) mod settings;
pub(crate) mod spawn;
pub(crate) mod stdio;
