//! The path of the program that this process executes, and of the script that has executed it.

use std::fs::{File, Metadata};
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use super::platform::own_program::{candidates, is_secure_mode, status};

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

/// Returns the absolute path of the script that has executed this process's program and has passed
/// its own path as `argv[0]`, as `exec -a "$0" program` does in bash. Returns `None` if `argv[0]`
/// contains no slash, or if its file is not an executable script. Also returns `None` if executing
/// the program has raised the rights of this process.
///
/// The caller must determine the path before it changes its working directory.
pub(crate) fn wrapper_script() -> Option<PathBuf> {
    // The user with the lower rights chooses `argv[0]`, and its file would be executed with the
    // higher rights.
    if is_secure_mode() {
        return None;
    }
    let name = std::env::args_os().next()?;
    if !name.as_bytes().contains(&b'/') {
        return None;
    }
    absolute(name.into()).filter(|path| is_script(path))
}

/// Returns whether a file is executable and begins with `#!`.
fn is_script(path: &Path) -> bool {
    // Check the file's type first, because opening a FIFO can block.
    let is_executable = path
        .metadata()
        .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
    let mut start = [0; 2];
    let read = |mut file: File| file.read_exact(&mut start);
    is_executable && File::open(path).and_then(read).is_ok() && start == *b"#!"
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_executable_file_with_an_interpreter_line_is_a_script() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        for (text, mode, expected) in [
            ("#!/bin/sh\n", 0o755, true),
            ("#!/bin/sh\n", 0o644, false),
            ("exit 0\n", 0o755, false),
            ("#", 0o755, false),
            ("", 0o755, false),
        ] {
            std::fs::write(&path, text).unwrap();
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(&path, permissions).unwrap();
            assert_eq!(is_script(&path), expected, "{text:?} {mode:o}");
        }
        assert!(!is_script(directory.path()));
        assert!(!is_script(&std::env::current_exe().unwrap()));
        assert!(!is_script(&directory.path().join("missing")));
    }
}
