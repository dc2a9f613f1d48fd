//! The error numbers of the system that the crate gives as reasons itself.

pub(crate) use libc::{EADDRINUSE, EBADF, EINVAL, EMFILE, ENAMETOOLONG};
