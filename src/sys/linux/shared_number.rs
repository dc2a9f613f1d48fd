//! A number in memory that two processes share: one process writes it, and the other reads it.
//!
//! Neither writing nor reading needs a system call. A system call for each change would increase a
//! worker's CPU time for each connection by a few percent.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys::check;
use crate::sys::socket::without_signals;

/// The size of the file. Its only page is mapped as a whole.
const SIZE: usize = size_of::<AtomicU32>();

/// The reading side.
#[derive(Debug)]
pub(crate) struct SharedNumber(NonNull<AtomicU32>);

impl SharedNumber {
    /// Creates a number with the value 0. Also returns the descriptor from which the other process
    /// makes the [`Writer`]. Returns `None` if the system does not support this, and under Miri.
    ///
    /// The file is sealed, so that no process can shrink it (`F_SEAL_SHRINK` in fcntl(2), since
    /// Linux 3.17). An access beyond the file's end would kill this process with SIGBUS.
    pub(crate) fn create() -> Option<(Self, OwnedFd)> {
        if cfg!(miri) {
            return None;
        }
        let file = sealed_file().ok()?;
        let page = map(&file, libc::PROT_READ)?;
        Some((Self(page), file))
    }

    pub(crate) fn get(&self) -> u32 {
        // SAFETY: the page stays mapped until this value is dropped.
        unsafe { self.0.as_ref() }.load(Ordering::Relaxed)
    }
}

impl Drop for SharedNumber {
    fn drop(&mut self) {
        // SAFETY: the page was mapped with this size, and nothing else refers to it.
        unsafe { libc::munmap(self.0.as_ptr().cast(), SIZE) };
    }
}

/// The writing side.
#[derive(Debug)]
pub(crate) struct Writer(&'static AtomicU32);

impl Writer {
    /// Returns `None` if the file cannot be mapped.
    pub(crate) fn new(file: OwnedFd) -> Option<Self> {
        let page = map(&file, libc::PROT_READ | libc::PROT_WRITE)?;
        // SAFETY: the page is aligned, and stays mapped for the life of the process.
        Some(Self(unsafe { page.as_ref() }))
    }

    pub(crate) fn set(&self, value: u32) {
        self.0.store(value, Ordering::Relaxed);
    }
}

/// Creates a file in memory whose size cannot change.
fn sealed_file() -> io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // Make the system call directly, because glibc has the function only since 2.27.
    // SAFETY: the name is a string with a terminating zero.
    let number = unsafe { libc::syscall(libc::SYS_memfd_create, c"cluster".as_ptr(), flags) };
    let number = check(libc::c_int::try_from(number).unwrap_or(-1))?;
    // SAFETY: the kernel has just opened the descriptor, so nothing else owns it.
    let file = unsafe { OwnedFd::from_raw_fd(number) };
    // With a file size limit of 0 (RLIMIT_FSIZE in getrlimit(2)), ftruncate fails and raises
    // SIGXFSZ.
    without_signals(&[(libc::SIGXFSZ, libc::EFBIG)], || {
        // SAFETY: ftruncate changes no memory of this process.
        check(unsafe { libc::ftruncate(file.as_raw_fd(), SIZE as libc::off_t) })
    })?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
    Ok(file)
}

fn map(file: &OwnedFd, access: libc::c_int) -> Option<NonNull<AtomicU32>> {
    let (number, flags) = (file.as_raw_fd(), libc::MAP_SHARED);
    // SAFETY: the kernel chooses an unused address, so the call changes no memory in use.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), SIZE, access, flags, number, 0) };
    match page == libc::MAP_FAILED {
        true => None,
        false => NonNull::new(page.cast()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reader_sees_what_the_writer_has_set() {
        let (number, file) = SharedNumber::create().unwrap();
        assert_eq!(number.get(), 0);
        let writer = Writer::new(file).unwrap();
        for value in [1, u32::MAX, 0] {
            writer.set(value);
            assert_eq!(number.get(), value);
        }
    }

    #[test]
    fn no_process_can_change_the_size_of_the_file() {
        let (_number, file) = SharedNumber::create().unwrap();
        for size in [0, 1, 8192] {
            // SAFETY: ftruncate changes no memory of this process.
            let truncated = check(unsafe { libc::ftruncate(file.as_raw_fd(), size) });
            let error = truncated.unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{size}");
        }
    }

    #[test]
    fn socket_cannot_be_mapped() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Writer::new(socket.into()).is_none());
    }
}
