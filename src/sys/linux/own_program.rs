//! The paths by which the kernel knows this process's program.

use std::ffi::{CStr, OsStr};
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

/// Returns the status of the file that this process executes, even if the file has been deleted.
///
/// # Errors
///
/// Returns an error if `/proc` is not mounted.
pub(in crate::sys) fn status() -> io::Result<Metadata> {
    // Prefer the path that readlink(2) returns. QEMU's user mode emulates only this call, so the
    // status of the link itself is that of the emulator.
    let linked = std::env::current_exe().and_then(std::fs::metadata);
    linked.or_else(|_| std::fs::metadata("/proc/self/exe"))
}

/// Returns the paths at which this process's program may be, the preferred one first.
pub(in crate::sys) fn candidates() -> Vec<PathBuf> {
    // If the kernel has executed the loader, both paths below lead to the loader instead of the
    // program.
    if is_run_by_loader() {
        return Vec::new();
    }
    let called = called_path().filter(|_| !has_changed_identity());
    let paths = [called, std::env::current_exe().ok()];
    paths.into_iter().flatten().collect()
}

/// Returns the pathname that was passed to execve(2), with `PATH` already searched.
///
/// For a script's interpreter, the pathname is that of the script.
fn called_path() -> Option<PathBuf> {
    // SAFETY: getauxval has no preconditions.
    let address = unsafe { libc::getauxval(libc::AT_EXECFN) };
    let address = usize::try_from(address)
        .ok()
        .filter(|address| *address != 0)?;
    // SAFETY: the kernel has written a zero-terminated string to this address. The string is part
    // of the process's initial stack, which is never freed.
    let path = unsafe { CStr::from_ptr(std::ptr::with_exposed_provenance(address)) };
    let path = PathBuf::from(OsStr::from_bytes(path.to_bytes()));
    // Reject a path in `/proc` or `/dev/fd`, because it may lead to another file in another
    // process. The kernel reports such a path for a program that was executed by its descriptor
    // (execveat(2)).
    let is_relative_to_process = path.starts_with("/proc") || path.starts_with("/dev/fd");
    (!is_relative_to_process).then_some(path)
}

/// Returns whether a set-user-ID or set-group-ID bit has changed the user or group of this process.
/// The user who called the program may then own a symbolic link in the called path, and must not
/// use it to choose a program that is executed as the other user.
fn has_changed_identity() -> bool {
    // SAFETY: the function has no preconditions.
    let users = [unsafe { libc::getuid() }, unsafe { libc::geteuid() }];
    // SAFETY: the function has no preconditions.
    let groups = [unsafe { libc::getgid() }, unsafe { libc::getegid() }];
    users[0] != users[1] || groups[0] != groups[1]
}

/// Returns whether executing the program has raised the rights of this process, because the file
/// has a set-user-ID or set-group-ID bit or capabilities (`AT_SECURE` in getauxval(3)).
pub(in crate::sys) fn is_secure_mode() -> bool {
    // SAFETY: getauxval has no preconditions.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

/// Returns whether the dynamic loader was executed with this program as its argument, as in
/// `ld.so ./program`. The kernel then reports no address of a loader (`AT_BASE` in getauxval(3)). A
/// statically linked program has no loader, so the result is `false`.
fn is_run_by_loader() -> bool {
    // SAFETY: getauxval has no preconditions.
    !cfg!(target_feature = "crt-static") && unsafe { libc::getauxval(libc::AT_BASE) } == 0
}
