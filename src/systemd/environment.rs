//! The environment variables of systemd's protocols, and the environment that workers inherit.

use std::ffi::{OsStr, OsString};
use std::io;

use crate::config::env::TO_WORKER;
use crate::config::stdio::Stdio;
use crate::error::{Error, Result};
use crate::sys;
use crate::types::sorted_map::SortedMap;

pub(super) const LISTEN_FDS: &str = "LISTEN_FDS";
pub(crate) const LISTEN_PID: &str = "LISTEN_PID";
/// A variable that identifies the process like `LISTEN_PID`, but by the inode number of its pidfd.
/// Unlike a process id, this number is never reused. This crate checks only `LISTEN_PID`.
const LISTEN_PIDFDID: &str = "LISTEN_PIDFDID";
pub(super) const LISTEN_FDNAMES: &str = "LISTEN_FDNAMES";
pub(super) const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";
pub(super) const WATCHDOG_USEC: &str = "WATCHDOG_USEC";
pub(super) const WATCHDOG_PID: &str = "WATCHDOG_PID";

/// The variables that concern only the master.
const TO_MASTER: [&str; 7] = [
    LISTEN_FDS,
    LISTEN_PID,
    LISTEN_PIDFDID,
    LISTEN_FDNAMES,
    NOTIFY_SOCKET,
    WATCHDOG_USEC,
    WATCHDOG_PID,
];

/// The maximum length of a descriptor name that systemd accepts, in bytes.
const MAX_NAME: usize = 255;

/// Returns the value of an environment variable, or `None` if the variable is not set.
///
/// # Errors
///
/// Returns an error if the value is not valid UTF-8.
pub(super) fn variable(variable: &'static str) -> Result<Option<String>> {
    let text = std::env::var_os(variable).map(OsString::into_string);
    text.transpose().map_err(|value| Error::Environment {
        variable,
        value: value.to_string_lossy().into_owned(),
        expected: "text in UTF-8",
    })
}

pub(super) fn parse<T: std::str::FromStr>(
    variable: &'static str,
    value: String,
    expected: &'static str,
) -> Result<T> {
    value.parse().map_err(|_| Error::Environment {
        variable,
        value,
        expected,
    })
}

/// Returns whether the value of `LISTEN_PID` or `WATCHDOG_PID` is the process id `own`.
pub(super) fn is_addressed_to(own: u32, variable: &'static str, pid: String) -> Result<bool> {
    Ok(parse::<u32>(variable, pid, "a process id")? == own)
}

/// Removes the variables of systemd, and those that this crate sets for workers, from the
/// environment of a worker that executes no program.
pub(crate) fn remove_variables() {
    for name in TO_MASTER.into_iter().chain(TO_WORKER) {
        sys::env::remove(name);
    }
}

/// Returns the environment that workers inherit, without the variables that concern only the
/// master. If this process is itself a worker of another master, the variables of that master are
/// also left out.
pub(crate) fn inherited_environment() -> SortedMap<OsString, OsString> {
    let own = TO_MASTER.iter().chain(&TO_WORKER);
    let is_inherited = |name: &OsStr| own.clone().all(|own| name != *own);
    std::env::vars_os()
        .filter(|(name, _)| is_inherited(name))
        .collect()
}

/// Sets the variables that announce passed descriptors to a worker, and removes the variables with
/// another process's id. `LISTEN_PID` is set later, because the process id is unknown before the
/// fork.
///
/// # Errors
///
/// Returns an error if one of the names is not valid (see `is_descriptor_name`).
pub(crate) fn set_listen_variables(
    env: &mut SortedMap<OsString, OsString>,
    passed: &[(String, Stdio)],
) -> io::Result<()> {
    let names: Vec<_> = passed.iter().map(|(name, _)| name.as_str()).collect();
    if let Some(name) = names.iter().find(|name| !is_descriptor_name(name)) {
        let reason = format!("{name:?} is not a valid name of a descriptor");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    for name in [LISTEN_PID, LISTEN_PIDFDID] {
        env.remove(&OsString::from(name));
    }
    env.insert(LISTEN_FDS.into(), names.len().to_string().into());
    env.insert(LISTEN_FDNAMES.into(), names.join(":").into());
    Ok(())
}

/// Returns whether `name` may be passed as a descriptor's name. An empty name is invalid, because a
/// list with one empty name looks like an empty list.
fn is_descriptor_name(name: &str) -> bool {
    let is_valid = |byte: u8| (b' '..=b'~').contains(&byte) && byte != b':';
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(is_valid)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Returns the name of the variable that an [`Error::Environment`] contains. Panics if `result`
    /// is not this error.
    pub(in crate::systemd) fn rejected<T: std::fmt::Debug>(result: Result<T>) -> &'static str {
        let Err(Error::Environment { variable, .. }) = result else {
            panic!("{result:?}");
        };
        variable
    }

    #[test]
    fn listen_variables_announce_the_descriptors() {
        let fds = ["web", "the other one"].map(|name| (name.to_owned(), Stdio::null()));
        let stale = [LISTEN_PID, LISTEN_PIDFDID].map(|name| (name.into(), "1".into()));
        let mut env = SortedMap::from_iter(stale);
        set_listen_variables(&mut env, &fds).unwrap();
        assert_eq!(env.len(), 2);
        let value = |name: &str| env[&OsString::from(name)].to_str().unwrap();
        assert_eq!(value(LISTEN_FDS), "2");
        assert_eq!(value(LISTEN_FDNAMES), "web:the other one");
        for name in ["", "a:b", "a\nb", "ä", &"x".repeat(256)] {
            let fds = [(name.to_owned(), Stdio::null())];
            let error = set_listen_variables(&mut env, &fds).unwrap_err();
            assert!(error.to_string().contains(&format!("{name:?}")));
        }
    }
}
