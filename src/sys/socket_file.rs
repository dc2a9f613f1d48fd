//! Unix listeners and their socket files.
//!
//! A socket file is identified by its directory, device and inode instead of its path, because
//! another process may rename directories or replace the file.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Component, Path, PathBuf};

use crate::sys;
use crate::sys::file::{self, FileStatus};
use crate::sys::owner::Owner;
use crate::types::endpoint::BindFlags;
use crate::types::errno;

/// The file of a Unix listener. Dropping the value removes the file, unless another file has
/// replaced it.
#[derive(Debug)]
pub(crate) struct SocketFile {
    directory: OwnedFd,
    name: OsString,
    status: FileStatus,
    /// The process that removes the file.
    owner: Owner,
    /// Whether the file stays when this value is dropped.
    is_persistent: bool,
}

/// Listens on `path`, which must be absolute.
///
/// # Errors
///
/// Returns an error if a file with this path exists, or if the system rejects the path. An existing
/// file stays.
pub(crate) fn listen(path: &Path, flags: &BindFlags) -> io::Result<(OwnedFd, SocketFile)> {
    let has_zero = path.as_os_str().as_bytes().contains(&0);
    let (Some(parent), Some(name), false) = (path.parent(), path.file_name(), has_zero) else {
        return Err(io::Error::from_raw_os_error(errno::EINVAL));
    };
    let directory = file::open_directory(parent)?;
    // std checks the length itself, and its error has no number.
    let is_too_long = |error: &io::Error| error.kind() == io::ErrorKind::InvalidInput;
    let bound = match UnixListener::bind(path) {
        // The system limits a path to about 100 bytes, so try the form relative to the current
        // directory. Otherwise bind the absolute form, because the system reports the path as it
        // was bound, and the next master may have another current directory.
        Err(error) if is_too_long(&error) => {
            let current_dir = std::env::current_dir();
            let short = current_dir.map_or_else(|_| path.into(), |dir| shortest(path, &dir));
            UnixListener::bind(short.as_path())
        }
        bound => bound,
    };
    let listener = bound.map_err(|error| {
        let errno = is_too_long(&error).then_some(errno::ENAMETOOLONG);
        io::Error::from_raw_os_error(error.raw_os_error().or(errno).unwrap_or(errno::EINVAL))
    })?;
    let status = file::status_at(&directory, name)?;
    if !status.is_socket() {
        // Another process has already replaced the file.
        return Err(io::Error::from_raw_os_error(errno::EADDRINUSE));
    }
    let socket_file = SocketFile {
        directory,
        name: name.into(),
        status,
        owner: Owner::current(),
        is_persistent: false,
    };
    let mut mode = status.mode;
    if flags.readable_all {
        mode |= 0o444;
    }
    if flags.writable_all {
        mode |= 0o222;
    }
    if mode != status.mode {
        file::change_mode_at(&socket_file.directory, name, status, mode & 0o7777)?;
    }
    listener.set_nonblocking(true)?;
    let listener = OwnedFd::from(listener);
    sys::listen::listen(&listener, flags.backlog)?;
    Ok((listener, socket_file))
}

impl SocketFile {
    /// Takes over the file of a socket that another process has bound.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no socket file with this path.
    pub(crate) fn inherit(path: &Path) -> io::Result<Self> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let directory = file::open_directory(parent)?;
        let status = file::status_at(&directory, name)?;
        if !status.is_socket() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Self {
            directory,
            name: name.into(),
            status,
            owner: Owner::current(),
            is_persistent: false,
        })
    }

    /// Returns whether the file is still in its place, and no other file has replaced it.
    pub(crate) fn is_in_place(&self) -> bool {
        let found = file::status_at(&self.directory, &self.name);
        found.is_ok_and(|found| found.is_same_file(self.status))
    }

    /// Returns whether `path` leads to this file. It may not, although the file is in its place, if a
    /// symbolic link to a directory was switched. If the system cannot tell, returns true.
    pub(crate) fn is_at(&self, path: &Path) -> bool {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return true;
        };
        let found = file::open_directory(parent).and_then(|at| file::status_at(&at, name));
        match found {
            Ok(found) => found.is_same_file(self.status),
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }

    /// Drops this value without removing the file.
    pub(crate) fn persist(mut self) {
        self.is_persistent = true;
    }

    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// Returns the absolute form of a path that `listen` may have shortened relative to the current
/// directory.
///
/// # Errors
///
/// Returns an error if the system does not report the current directory.
pub(crate) fn absolute(path: &Path) -> io::Result<PathBuf> {
    if path.is_absolute() {
        return Ok(path.into());
    }
    let mut absolute = std::env::current_dir()?;
    for component in path.components() {
        if component == Component::ParentDir {
            // Remove the last component. The result is the parent directory, because the system
            // reports the current directory without symbolic links.
            absolute.pop();
        } else {
            absolute.push(component);
        }
    }
    Ok(absolute)
}

/// Returns the shorter of `path` and the same path relative to `current_dir`. Both arguments must
/// be absolute.
fn shortest(path: &Path, current_dir: &Path) -> PathBuf {
    let longest_common = current_dir
        .ancestors()
        .enumerate()
        .find_map(|(levels, parent)| Some((levels, path.strip_prefix(parent).ok()?)));
    // Each `..` leads to the parent in the path, because the system reports the current directory
    // without symbolic links.
    let relative = longest_common.map(|(levels, rest)| Path::new(&"../".repeat(levels)).join(rest));
    let length = |path: &Path| path.as_os_str().len();
    match relative {
        Some(relative) if (1..length(path)).contains(&length(&relative)) => relative,
        _ => path.into(),
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.owner.is_current() && !self.is_persistent && self.is_in_place() {
            let _ = file::remove_at(&self.directory, &self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn absolute_reverses_shortest() {
        let here = std::env::current_dir().unwrap();
        for path in [
            here.join("a"),
            here.parent().unwrap().join("a/b"),
            "/a".into(),
        ] {
            assert_eq!(absolute(&shortest(&path, &here)).unwrap(), path);
        }
    }

    #[test]
    fn shortest_prefers_the_relative_path_if_it_is_shorter() {
        let cases = [
            ("/a/b/c", "/a/b", "c"),
            ("/a/b/c", "/a/b/d", "../c"),
            ("/run/c", "/home/user/deep", "/run/c"),
            ("/a", "/", "a"),
            ("/a/b", "/a/c/d/e/f", "/a/b"),
            ("/a", "/a", "/a"),
        ];
        for (path, current_dir, expected) in cases {
            assert_eq!(
                shortest(path.as_ref(), current_dir.as_ref()),
                Path::new(expected)
            );
        }
    }

    #[test]
    fn drop_removes_only_its_own_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let flags = BindFlags::default();
        drop(listen(&path, &flags).unwrap());
        assert!(!path.exists());
        let (_listener, file) = listen(&path, &flags).unwrap();
        let error = listen(&path, &flags).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(errno::EADDRINUSE));
        assert!(path.exists(), "the file of another listener stays");
        std::fs::rename(&path, directory.path().join("away")).unwrap();
        std::fs::write(&path, "another file").unwrap();
        drop(file);
        assert!(path.exists());
    }

    #[test]
    fn drop_removes_the_file_from_a_renamed_directory() {
        let directory = tempfile::tempdir().unwrap();
        let [own, moved] = ["own", "moved"].map(|name| directory.path().join(name));
        std::fs::create_dir(&own).unwrap();
        let (_listener, file) = listen(&own.join("socket"), &BindFlags::default()).unwrap();
        std::fs::rename(&own, &moved).unwrap();
        std::fs::create_dir(&own).unwrap();
        // Create another name for the same file at the original path. A `drop` that used the path
        // instead of the directory would remove this name.
        std::fs::hard_link(moved.join("socket"), own.join("socket")).unwrap();
        drop(file);
        assert!(own.join("socket").exists());
        assert!(!moved.join("socket").exists());
    }

    #[test]
    fn flags_allow_all_users_to_connect() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let flags = BindFlags {
            readable_all: true,
            writable_all: true,
            ..BindFlags::default()
        };
        let _listener = listen(&path, &flags).unwrap();
        let mode = std::fs::metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o666, 0o666);
    }

    #[test]
    fn invalid_paths_are_errors_with_a_number() {
        let path = Path::new("/tmp").join("x".repeat(120));
        let error = listen(&path, &BindFlags::default()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(errno::ENAMETOOLONG));
        let error = listen("/tmp/a\0b".as_ref(), &BindFlags::default()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(errno::EINVAL));
    }
}
