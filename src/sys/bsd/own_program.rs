//! Finds the file of this process's program.

use std::fs::Metadata;
use std::io;
use std::path::{Path, PathBuf};

/// Returns the status of the file that this process executes.
pub(in crate::sys) fn status() -> io::Result<Metadata> {
    std::env::current_exe().and_then(std::fs::metadata)
}

/// Returns the paths at which this process's program may be, the preferred one first.
pub(in crate::sys) fn candidates() -> Vec<PathBuf> {
    let name = std::env::args_os().next().map(PathBuf::from);
    let paths = [name.and_then(find), std::env::current_exe().ok()];
    paths.into_iter().flatten().collect()
}

/// Returns whether executing the program has raised the rights of this process, because the file
/// has a set-user-ID or set-group-ID bit.
pub(in crate::sys) fn is_secure_mode() -> bool {
    // SAFETY: these functions have no preconditions.
    let (user, effective_user) = unsafe { (libc::getuid(), libc::geteuid()) };
    // SAFETY: these functions have no preconditions.
    let (group, effective_group) = unsafe { (libc::getgid(), libc::getegid()) };
    user != effective_user || group != effective_group
}

/// Searches `PATH` for a name without a slash. Returns any other path unchanged.
fn find(name: PathBuf) -> Option<PathBuf> {
    if name.parent() != Some(Path::new("")) {
        return Some(name);
    }
    let path = std::env::var_os("PATH")?;
    let mut candidates = std::env::split_paths(&path).map(|directory| directory.join(&name));
    candidates.find(|candidate| candidate.is_file())
}
