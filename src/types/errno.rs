//! The error numbers that the crate itself produces.

pub(crate) use libc::{EADDRINUSE, EBADF, EINVAL, EMFILE, EMSGSIZE, ENAMETOOLONG};
