//! The error numbers that the crate produces or recognizes outside `sys`.
//!
//! The numbers are constants of `libc`, as in `signal`, which says why they are not in `sys`.

pub(crate) use libc::{
    EADDRINUSE, EAGAIN, EBADF, EINVAL, EMFILE, EMSGSIZE, ENAMETOOLONG, ENFILE, ENOBUFS, ENOMEM,
    ENOSPC,
};

/// Returns the system's error number. Returns `EINVAL` instead of 0 if the error has none, because
/// 0 means success in a reply to a worker.
pub(crate) fn errno_of(error: &std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(EINVAL)
}
