//! The file that contains the master's process id.
//!
//! A master locks its file (flock(2)), so that a second instance with the same option does not start.
//! The kernel releases the lock when the master exits, so the file of a killed master is replaced.

use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::parent_id;
use std::path::{Path, PathBuf};
use std::process;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Maximum number of names that are tried for a new file.
const NAMES_MAX: u32 = 100;

/// The file of `--pid-file`. Without the option, the methods do nothing.
#[derive(Debug)]
pub(crate) struct PidFile {
    path: Option<PathBuf>,
    /// The lock of the file that this process has written.
    lock: RefCell<Option<Flock<File>>>,
}

impl PidFile {
    /// Checks that a pid file can be written to the path.
    ///
    /// # Errors
    ///
    /// Returns an error if the file's directory cannot be entered, if another instance uses the file,
    /// or if the path is that of a file that must not be replaced, such as /dev/null.
    pub(crate) fn new(path: Option<PathBuf>) -> Result<Self, String> {
        if let Some(path) = &path {
            let directory = match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent.join("."),
                _ => PathBuf::from("."),
            };
            let checked = fs::metadata(directory).and_then(|_| check_replaceable(path));
            checked
                .map_err(|error| format!("cannot use --pid-file {}: {error}", path.display()))?;
        }
        Ok(Self {
            path,
            lock: RefCell::default(),
        })
    }

    /// Writes this process's id. A reader sees either the previous content or the whole id, because
    /// the file is replaced by a complete one.
    pub(crate) fn write(&self) -> Result<(), String> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        let replaced = check_replaceable(path).and_then(|()| replace(path));
        let lock = replaced
            .map_err(|error| format!("cannot write --pid-file {}: {error}", path.display()))?;
        self.lock.replace(lock);
        Ok(())
    }

    /// Removes the file, unless it contains another process's id, for example that of a new master.
    pub(crate) fn remove(&self) {
        let Some(path) = &self.path else {
            return;
        };
        let content = check_replaceable(path).and_then(|()| fs::read_to_string(path));
        if content.is_ok_and(|content| content.trim_end() == process::id().to_string()) {
            // Ignore an error. This process exits soon, and a reader of the file can check whether
            // the process exists.
            let _ = fs::remove_file(path);
        }
    }
}

/// Replaces the file by a new one with this process's id. Returns the lock of the new file.
///
/// The directory may belong to another user, and the name of the new file is predictable. The file is
/// therefore created, and a file or link with this name is neither opened nor removed.
fn replace(path: &Path) -> io::Result<Option<Flock<File>>> {
    for number in 0..NAMES_MAX {
        let mut new = OsString::from(path);
        new.push(format!(".{}.{number}", process::id()));
        let file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644) // Only the owner may write, even with a umask of 0.
            .open(&new);
        return match file {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(error) => Err(error),
            Ok(mut file) => {
                let written = writeln!(file, "{}", process::id());
                // Some file systems have no locks. The file is then used without one.
                let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).ok();
                written
                    .and_then(|()| fs::rename(&new, path))
                    .inspect_err(|_| drop(fs::remove_file(&new)))?;
                Ok(lock)
            }
        };
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Returns whether another process has locked the file.
fn is_locked(path: &Path) -> io::Result<bool> {
    let locked = Flock::lock(File::open(path)?, FlockArg::LockSharedNonblock);
    Ok(matches!(locked, Err((_, Errno::EWOULDBLOCK))))
}

/// Returns an error if the file is a device, a socket or a pipe, has other content than a process
/// id, or is in use by another instance. The system replaces no directory.
fn check_replaceable(path: &Path) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(data) if data.is_dir() => Ok(()),
        Ok(data) if data.is_file() => {
            let content = fs::read(path)?;
            let is_id = |byte: &u8| byte.is_ascii_digit() || byte.is_ascii_whitespace();
            if !content.iter().all(is_id) {
                return Err(io::Error::other("the file does not contain a process id"));
            }
            let content = String::from_utf8_lossy(&content);
            let owner = content.trim();
            // In an upgrade, the new master replaces the file of the old one, which is its parent.
            let may_replace = [process::id(), parent_id()].map(|id| id.to_string());
            if may_replace.iter().any(|id| id == owner) || !is_locked(path)? {
                return Ok(());
            }
            Err(io::Error::other(format!("process {owner} uses it")))
        }
        Ok(_) => Err(io::Error::other("not a regular file")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
