//! Reads and sets socket options.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};

use super::check;

/// Returns a value's size in the type that socket calls expect.
pub(super) fn size_of_value<T>(value: &T) -> libc::socklen_t {
    libc::socklen_t::try_from(size_of_val(value)).unwrap_or(0)
}

/// Sets an option. `T` is the C type of the option's value.
pub(super) fn set<T>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: the pointer is valid for reads of the value's size.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            size_of_value(value),
        )
    })?;
    Ok(())
}

/// Sets an integer option of the level `SOL_SOCKET`.
pub(super) fn set_int(
    socket: BorrowedFd<'_>,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, name, &value)
}

/// Reads an option. If the kernel writes fewer bytes than `T` has, the other bytes are zero.
///
/// # Safety
///
/// Every bit pattern must be a valid `T`.
pub(super) unsafe fn get<T>(socket: RawFd, level: libc::c_int, name: libc::c_int) -> io::Result<T> {
    // SAFETY: the caller promises that every bit pattern is a valid `T`.
    let mut value: T = unsafe { std::mem::zeroed() };
    let mut size = size_of_value(&value);
    // SAFETY: both pointers are valid for writes, and `size` is the value's size.
    check(unsafe {
        libc::getsockopt(socket, level, name, (&raw mut value).cast(), &raw mut size)
    })?;
    Ok(value)
}

/// Reads an integer option of the level `SOL_SOCKET`.
pub(super) fn get_int(socket: RawFd, name: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: every bit pattern is a valid `c_int`.
    unsafe { get(socket, libc::SOL_SOCKET, name) }
}
