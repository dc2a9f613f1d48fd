//! Unix sockets and the files by which they are known.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Component, Path, PathBuf};

use crate::sys;
use crate::sys::fd::{self, FileStatus};
use crate::sys::owner::Owner;
use crate::types::endpoint::BindFlags;
use crate::types::errno;

/// The file of a listening socket, which is removed when this is dropped: unless the file has been
/// replaced meanwhile, and belongs to somebody else. It is known by its directory and not by its
/// path, which whoever may rename directories on the way could make lead to another file.
#[derive(Debug)]
pub(crate) struct SocketFile {
    directory: OwnedFd,
    name: OsString,
    status: FileStatus,
    /// No other process removes it.
    owner: Owner,
    /// Another process removes it.
    is_left: bool,
}

/// Listens on `path`, which is absolute. A file that is there already is an error, and stays.
pub(crate) fn listen(path: &Path, flags: &BindFlags) -> io::Result<(OwnedFd, SocketFile)> {
    // The system takes about a hundred bytes; from where we are the way may be shorter.
    let short = std::env::current_dir().map_or_else(|_| path.into(), |here| shortest(path, &here));
    let has_zero = path.as_os_str().as_bytes().contains(&0);
    let (Some(parent), Some(name), false) = (path.parent(), path.file_name(), has_zero) else {
        return Err(io::Error::from_raw_os_error(errno::EINVAL));
    };
    let directory = fd::open_directory(parent)?;
    let listener = UnixListener::bind(&short).map_err(|error| {
        // What std finds wrong before the system can.
        let too_long = error.kind() == io::ErrorKind::InvalidInput;
        let errno = too_long.then_some(errno::ENAMETOOLONG);
        io::Error::from_raw_os_error(error.raw_os_error().or(errno).unwrap_or(errno::EINVAL))
    })?;
    let status = fd::status_at(&directory, name)?;
    if !status.is_socket() {
        // Somebody else is at work there.
        return Err(io::Error::from_raw_os_error(errno::EADDRINUSE));
    }
    let file = SocketFile {
        directory,
        name: name.into(),
        status,
        owner: Owner::current(),
        is_left: false,
    };
    let mut mode = status.mode;
    if flags.readable_all {
        mode |= 0o444;
    }
    if flags.writable_all {
        mode |= 0o222;
    }
    if mode != status.mode {
        fd::change_mode_at(&file.directory, name, status, mode & 0o7777)?;
    }
    listener.set_nonblocking(true)?;
    let listener = OwnedFd::from(listener);
    sys::listen::listen(&listener, flags.backlog)?;
    Ok((listener, file))
}

impl SocketFile {
    /// The file of a socket that another process has bound there, and leaves to this one.
    ///
    /// # Errors
    ///
    /// There is no such file.
    pub(crate) fn inherit(path: &Path) -> io::Result<Self> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let directory = fd::open_directory(parent)?;
        let status = fd::status_at(&directory, name)?;
        if !status.is_socket() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Self {
            directory,
            name: name.into(),
            status,
            owner: Owner::current(),
            is_left: false,
        })
    }

    /// Leaves the file where it is.
    pub(crate) fn leave(mut self) {
        self.is_left = true;
    }

    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// Undoes what `listen` does to the paths of sockets, if that was done in this directory.
///
/// # Errors
///
/// The system does not say which directory this is.
pub(crate) fn absolute(path: &Path) -> io::Result<PathBuf> {
    if path.is_absolute() {
        return Ok(path.into());
    }
    let mut absolute = std::env::current_dir()?;
    for component in path.components() {
        if component == Component::ParentDir {
            // There is no link on the way up.
            absolute.pop();
        } else {
            absolute.push(component);
        }
    }
    Ok(absolute)
}

/// The shorter one of `path` and the way to it from `here`; both are absolute.
fn shortest(path: &Path, here: &Path) -> PathBuf {
    let (mut to, mut from) = (path.components(), here.components());
    let mut rest = (to.clone(), from.clone());
    while let (Some(a), Some(b)) = (to.next(), from.next()) {
        if a != b {
            break;
        }
        rest = (to.clone(), from.clone());
    }
    let up = rest.1.map(|_| Component::ParentDir);
    let relative: PathBuf = up.chain(rest.0).collect();
    // The way up leads through parents that links do not change: `here` has no links in it.
    let length = |path: &Path| path.as_os_str().as_bytes().len();
    if (1..length(path)).contains(&length(&relative)) {
        relative
    } else {
        path.into()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let found = fd::status_at(&self.directory, &self.name);
        let is_same = found.is_ok_and(|found| found.is_same(self.status));
        if is_same && self.owner.is_current() && !self.is_left {
            let _ = fd::remove_at(&self.directory, &self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn the_shorter_way_and_back() {
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
    fn the_shorter_way() {
        let cases = [
            ("/a/b/c", "/a/b", "c"),
            ("/a/b/c", "/a/b/d", "../c"),
            ("/run/c", "/home/user/deep", "/run/c"),
            ("/a", "/", "a"),
            ("/a/b", "/a/c/d/e/f", "/a/b"),
            ("/a", "/a", "/a"),
        ];
        for (path, here, expected) in cases {
            assert_eq!(shortest(path.as_ref(), here.as_ref()), Path::new(expected));
        }
    }

    #[test]
    fn only_its_own_file_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let flags = BindFlags::default();
        drop(listen(&path, &flags).unwrap());
        assert!(!path.exists());
        let (_listener, file) = listen(&path, &flags).unwrap();
        let error = listen(&path, &flags).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(errno::EADDRINUSE));
        assert!(path.exists(), "somebody else's stays");
        std::fs::rename(&path, directory.path().join("away")).unwrap();
        std::fs::write(&path, "another file").unwrap();
        drop(file);
        assert!(path.exists());
    }

    #[test]
    fn whoever_moves_its_directory_cannot_have_another_file_removed() {
        let directory = tempfile::tempdir().unwrap();
        let [own, moved] = ["own", "moved"].map(|name| directory.path().join(name));
        std::fs::create_dir(&own).unwrap();
        let (_listener, file) = listen(&own.join("socket"), &BindFlags::default()).unwrap();
        std::fs::rename(&own, &moved).unwrap();
        std::fs::create_dir(&own).unwrap();
        // The same file, at the path that was given.
        std::fs::hard_link(moved.join("socket"), own.join("socket")).unwrap();
        drop(file);
        assert!(own.join("socket").exists());
        assert!(!moved.join("socket").exists());
    }

    #[test]
    fn everybody_may_connect_if_the_program_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let flags = BindFlags {
            readable_all: true,
            writable_all: true,
            ..BindFlags::default()
        };
        let _kept = listen(&path, &flags).unwrap();
        let mode = std::fs::metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o666, 0o666);
    }

    #[test]
    fn a_path_that_cannot_be_is_an_error_with_a_number() {
        let path = Path::new("/tmp").join("x".repeat(120));
        let error = listen(&path, &BindFlags::default()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(errno::ENAMETOOLONG));
        let error = listen("/tmp/a\0b".as_ref(), &BindFlags::default()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(errno::EINVAL));
    }
}
