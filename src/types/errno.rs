//! The error numbers that the crate returns itself.

pub(crate) use libc::{EADDRINUSE, EBADF, EINVAL, EMFILE, ENAMETOOLONG};
