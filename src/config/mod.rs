//! The application's requests as data: worker settings and call options.
//!
//! This module checks the requests and fills in defaults. `master`, `worker` and `sys` carry the
//! requests out.
//!
//! `config` and `worker` import each other, because `Settings::main` takes a closure whose argument
//! is a `Worker`.

pub(crate) mod env;
pub(crate) mod inspect_port;
pub(crate) mod listen;
pub(crate) mod send;
pub(crate) mod settings;
pub(crate) mod spawn;
pub(crate) mod stdio;
