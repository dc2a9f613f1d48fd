//! The file that contains the master's process id.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process;

/// The file of `--pid-file`. Without the option, the methods do nothing.
#[derive(Debug)]
pub(crate) struct PidFile {
    path: Option<PathBuf>,
}

impl PidFile {
    /// Returns an error if the file's directory cannot be entered.
    pub(crate) fn new(path: Option<PathBuf>) -> Result<Self, String> {
        if let Some(path) = &path {
            let directory = match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent.join("."),
                _ => PathBuf::from("."),
            };
            fs::metadata(directory)
                .map_err(|error| format!("cannot use --pid-file {}: {error}", path.display()))?;
        }
        Ok(Self { path })
    }

    /// Writes this process's id. A reader sees either the previous content or the whole id, because
    /// the file is replaced by a complete one.
    pub(crate) fn write(&self) -> Result<(), String> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        let mut new = OsString::from(path);
        new.push(format!(".{}", process::id()));
        let replaced = fs::write(&new, format!("{}\n", process::id()))
            .and_then(|()| fs::rename(&new, path))
            .inspect_err(|_| drop(fs::remove_file(&new)));
        replaced.map_err(|error| format!("cannot write --pid-file {}: {error}", path.display()))
    }

    /// Removes the file, unless it contains another process's id, for example that of a new master.
    pub(crate) fn remove(&self) {
        let Some(path) = &self.path else {
            return;
        };
        let content: io::Result<String> = fs::read_to_string(path);
        if content.is_ok_and(|content| content.trim_end() == process::id().to_string()) {
            // Ignore an error. This process exits soon, and a reader of the file can check whether
            // the process exists.
            let _ = fs::remove_file(path);
        }
    }
}
