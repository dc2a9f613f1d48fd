//! The error numbers that the crate produces or recognizes outside `sys`.
//!
//! This module and `signal` only name constants of `libc`. Calls of `libc` belong to `sys`.

pub(crate) use libc::{
    EADDRINUSE, EAGAIN, EBADF, EINVAL, EMFILE, EMSGSIZE, ENAMETOOLONG, ENFILE, ENOBUFS, ENOMEM,
    ENOSPC,
};

/// Returns the system's error number, or `EINVAL` if the error has none. In a reply to a worker, 0
/// means success.
pub(crate) fn errno_of(error: &std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(EINVAL)
}
