//! The path of the program that this process executes.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::platform::own_program::{candidates, status};

/// Returns the absolute path by which this process's program was called. Returns `None` if no known
/// path leads to the program.
///
/// Symbolic links in the path stay unresolved. If a link is changed later, executing the path
/// starts the program behind the new link. The caller must determine the path before it changes its
/// working directory.
pub(crate) fn own_program() -> Option<PathBuf> {
    let own = status();
    let is_own = |path: &PathBuf| match (path.metadata(), &own) {
        (Ok(file), Ok(own)) => is_same_file(&file, own),
        // If the system does not report which file this process executes, accept any path that
        // exists.
        (file, Err(_)) => file.is_ok(),
        (Err(_), Ok(_)) => false,
    };
    let mut paths = candidates().into_iter().filter_map(absolute);
    paths.find(is_own)
}

/// Makes a path absolute. If the variable `PWD` names the working directory, uses its value as a
/// shell does, because getcwd(3) would resolve symbolic links.
fn absolute(path: PathBuf) -> Option<PathBuf> {
    if path.is_absolute() {
        return Some(path);
    }
    let logical = std::env::var_os("PWD").map(PathBuf::from);
    let logical = logical.filter(|directory| directory.is_absolute() && is_current(directory));
    let directory = logical.map_or_else(std::env::current_dir, Ok).ok()?;
    std::path::absolute(directory.join(path)).ok()
}

fn is_current(directory: &Path) -> bool {
    match (directory.metadata(), Path::new(".").metadata()) {
        (Ok(directory), Ok(current)) => is_same_file(&directory, &current),
        (Ok(_) | Err(_), _) => false,
    }
}

fn is_same_file(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}
