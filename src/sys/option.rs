//! Socket options.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};

use super::check;

/// Returns the size of a value as the socket calls expect it.
pub(super) fn size_of_value<T>(value: &T) -> libc::socklen_t {
    libc::socklen_t::try_from(size_of_val(value)).unwrap_or(0)
}

/// Sets an option. `T` is the C type of its value.
pub(super) fn set<T>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: the kernel reads at most as many bytes as the value has, which lives through the call.
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

/// Sets an option of the level `SOL_SOCKET` whose value is an integer.
pub(super) fn set_int(
    socket: BorrowedFd<'_>,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, name, &value)
}

/// Reads an option. Bytes that the kernel does not write stay zero.
///
/// # Safety
///
/// Any bytes, and all zeroes too, are a valid `T`.
pub(super) unsafe fn get<T>(socket: RawFd, level: libc::c_int, name: libc::c_int) -> io::Result<T> {
    // SAFETY: the caller promises that all zeroes are valid.
    let mut value: T = unsafe { std::mem::zeroed() };
    let mut size = size_of_value(&value);
    // SAFETY: value and size are writable, and the size is that of the value.
    check(unsafe {
        libc::getsockopt(socket, level, name, (&raw mut value).cast(), &raw mut size)
    })?;
    Ok(value)
}

/// Reads an option of the level `SOL_SOCKET` whose value is an integer.
pub(super) fn get_int(socket: RawFd, name: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: any bytes are a valid integer.
    unsafe { get(socket, libc::SOL_SOCKET, name) }
}
