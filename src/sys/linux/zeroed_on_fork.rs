//! A number that becomes 0 in a forked child.

use std::sync::atomic::AtomicUsize;

/// Allocates a number in its own page, which the kernel zeroes in a child (`MADV_WIPEONFORK` in
/// madvise(2), since Linux 4.14).
///
/// Returns `None` if the system does not support this, and under Miri, which does not implement the
/// call.
pub(in crate::sys) fn allocate() -> Option<&'static AtomicUsize> {
    const INVALID_ADVICE: libc::c_int = -1;
    if cfg!(miri) {
        return None;
    }
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let size = usize::try_from(size).ok()?;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses an unused address, so the call changes no memory in use.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), size, access, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return None;
    }
    // Detect emulators that accept and ignore any advice.
    // SAFETY: the page is mapped, and a kernel rejects this advice.
    let accepts_any = unsafe { libc::madvise(page, size, INVALID_ADVICE) } == 0;
    // SAFETY: the page is mapped, private and anonymous, and has no other user yet.
    let wiped = unsafe { libc::madvise(page, size, libc::MADV_WIPEONFORK) } == 0;
    if accepts_any || !wiped {
        // SAFETY: nothing refers to the page.
        unsafe { libc::munmap(page, size) };
        return None;
    }
    // SAFETY: the page is zero, aligned, and stays mapped for the life of the process.
    Some(unsafe { &*page.cast::<AtomicUsize>() })
}
