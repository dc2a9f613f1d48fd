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
/// `ld.so ./program`. The kernel then reports no address of a loader (`AT_BASE` in getauxval(3)),
/// although the program needs one.
fn is_run_by_loader() -> bool {
    // SAFETY: getauxval has no preconditions.
    let has_loader = unsafe { libc::getauxval(libc::AT_BASE) } != 0;
    !has_loader && names_loader()
}

/// Returns whether the program's headers name a dynamic loader (`PT_INTERP` in elf(5)). A statically
/// linked program names none. `target_feature = "crt-static"` does not tell this, because other
/// linkers than the compiler's own link statically without it.
fn names_loader() -> bool {
    unsafe extern "C" fn visit(
        object: *mut libc::dl_phdr_info,
        _size: libc::size_t,
        result: *mut libc::c_void,
    ) -> libc::c_int {
        // SAFETY: the pointer is valid for reads during this call.
        let object = unsafe { &*object };
        let count = usize::from(object.dlpi_phnum);
        // SAFETY: the object has this number of headers, which nobody changes.
        let headers = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, count) };
        let names_loader = headers
            .iter()
            .any(|header| header.p_type == libc::PT_INTERP);
        // SAFETY: the caller below passes a pointer to a `bool`.
        unsafe { *result.cast() = names_loader };
        // Stop, because the first object is the program.
        1
    }

    let mut result = false;
    // SAFETY: `visit` keeps no pointer, and `result` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut result).cast()) };
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamic_program_names_a_loader() {
        assert_eq!(names_loader(), !cfg!(target_feature = "crt-static"));
        assert!(!is_run_by_loader());
    }
}
