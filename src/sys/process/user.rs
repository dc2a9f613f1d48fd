//! The user of this process.

use crate::types::user::User;

/// Returns the effective user and group of this process.
pub(crate) fn effective() -> User {
    // SAFETY: geteuid has no preconditions.
    let uid = unsafe { libc::geteuid() };
    // SAFETY: getegid has no preconditions.
    let gid = unsafe { libc::getegid() };
    User { uid, gid }
}
