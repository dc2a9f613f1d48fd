//! The error numbers that the crate produces or recognizes outside `sys`.
//!
//! This module and `signal` only name constants of `libc`. Calls of `libc` belong to `sys`.

pub(crate) use libc::{
    EADDRINUSE, EAGAIN, EBADF, EINVAL, EMFILE, EMSGSIZE, ENAMETOOLONG, ENFILE, ENOBUFS, ENOMEM,
    ENOSPC,
};
