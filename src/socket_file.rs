//! Unix sockets and the files by which they are known.

use std::fs::Metadata;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Component, Path, PathBuf};

use crate::endpoint::BindFlags;
use crate::sys::{self, errno};

/// The file of a listening socket, which is removed when this is dropped: unless the file has been
/// replaced meanwhile, and belongs to somebody else.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

/// Listens on `path`, which is absolute. A file that is there already is an error, and stays.
pub(crate) fn listen(path: &Path, flags: &BindFlags) -> io::Result<(OwnedFd, SocketFile)> {
    // The system takes about a hundred bytes; from where we are the way may be shorter.
    let short = std::env::current_dir().map_or_else(|_| path.into(), |here| shortest(path, &here));
    let listener = UnixListener::bind(&short).map_err(|error| {
        // What std finds wrong before the system can.
        let wrong = error.kind() == io::ErrorKind::InvalidInput && error.raw_os_error().is_none();
        let has_zero = path.as_os_str().as_bytes().contains(&0);
        match (wrong, has_zero) {
            (false, _) => error,
            (true, true) => io::Error::from_raw_os_error(errno::EINVAL),
            (true, false) => io::Error::from_raw_os_error(errno::ENAMETOOLONG),
        }
    })?;
    let metadata = std::fs::symlink_metadata(path)?;
    let file = SocketFile {
        path: path.into(),
        device: metadata.dev(),
        inode: metadata.ino(),
    };
    let mut mode = metadata.mode();
    if flags.readable_all {
        mode |= 0o444;
    }
    if flags.writable_all {
        mode |= 0o222;
    }
    if mode != metadata.mode() {
        let is_ours = |found: &Metadata| file.is(found);
        sys::fd::change_mode(path, mode & 0o7777, is_ours)?;
    }
    listener.set_nonblocking(true)?;
    let listener = OwnedFd::from(listener);
    sys::listen::listen(&listener, flags.backlog)?;
    Ok((listener, file))
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

impl SocketFile {
    fn is(&self, found: &Metadata) -> bool {
        found.dev() == self.device && found.ino() == self.inode
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| self.is(&found)) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
