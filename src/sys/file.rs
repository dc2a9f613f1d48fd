//! Files that are named relative to an open directory, so that renaming the directory does not
//! affect them.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

pub(crate) use super::platform::file::change_mode_at;

use super::check;
use super::platform::file::{NAME_ONLY, STATUS_FLAGS};
use crate::types::socket_id::SocketId;

pub(super) fn c_string(text: &OsStr) -> io::Result<CString> {
    Ok(CString::new(text.as_bytes())?)
}

/// Opens a directory, so that its files can be named relative to it.
pub(crate) fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let path = c_string(path.as_os_str())?;
    let flags = NAME_ONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
    // SAFETY: the path is zero-terminated and lives through the call.
    let number = check(unsafe { libc::open(path.as_ptr(), flags) })?;
    // SAFETY: the kernel has just opened the descriptor for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// The identity and the mode of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileStatus {
    /// The device and inode numbers. Their types differ between systems, but all fit into `i128`.
    id: (i128, i128),
    pub(crate) mode: libc::mode_t,
}

impl FileStatus {
    pub(crate) fn is_socket(self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFSOCK
    }

    /// Returns whether both statuses belong to the same file. The file's mode may have changed.
    pub(crate) fn is_same_file(self, other: Self) -> bool {
        self.id == other.id
    }
}

impl From<libc::stat> for FileStatus {
    fn from(stat: libc::stat) -> Self {
        Self {
            id: (stat.st_dev.into(), stat.st_ino.into()),
            mode: stat.st_mode,
        }
    }
}

/// Returns a file's status. For a symbolic link, returns the link's own status.
pub(crate) fn status_at(directory: &OwnedFd, name: &OsStr) -> io::Result<FileStatus> {
    let name = c_string(name)?;
    // SAFETY: all zeroes is a valid `stat`.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the name is zero-terminated, and the pointer is valid for writes of a `stat`.
    check(unsafe {
        libc::fstatat(
            directory.as_raw_fd(),
            name.as_ptr(),
            &raw mut stat,
            STATUS_FLAGS,
        )
    })?;
    Ok(stat.into())
}

/// Returns the identity of a socket.
pub(crate) fn socket_id(socket: BorrowedFd<'_>) -> io::Result<SocketId> {
    socket_id_of(socket.as_raw_fd())
}

/// Returns the identity of the socket with this number, or an error if the number is not open.
pub(super) fn socket_id_of(number: RawFd) -> io::Result<SocketId> {
    // SAFETY: all zeroes is a valid `stat`.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid for writes of a `stat`.
    check(unsafe { libc::fstat(number, &raw mut stat) })?;
    let FileStatus {
        id: (device, inode),
        ..
    } = stat.into();
    // The types differ between systems, but none has more than 64 bits.
    let bits = |number: i128| u64::try_from(number & i128::from(u64::MAX)).unwrap_or(0);
    Ok(SocketId {
        device: bits(device),
        inode: bits(inode),
    })
}

pub(crate) fn remove_at(directory: &OwnedFd, name: &OsStr) -> io::Result<()> {
    let name = c_string(name)?;
    // SAFETY: the name is zero-terminated and lives through the call.
    check(unsafe { libc::unlinkat(directory.as_raw_fd(), name.as_ptr(), 0) })?;
    Ok(())
}
