//! Notifications to systemd, like sd_notify(3), and the watchdog.

use std::ffi::OsStr;
use std::time::Duration;

use super::environment::{
    NOTIFY_SOCKET, WATCHDOG_PID, WATCHDOG_USEC, is_addressed_to, parse, variable,
};
use crate::error::{Error, Result};
use crate::sys;

/// Sends a notification to systemd. Returns `false` if the environment does not contain
/// `NOTIFY_SOCKET`.
///
/// The format of `state` is described in sd_notify(3). Examples are `READY=1`, `STOPPING=1` and
/// `WATCHDOG=1`. Separate several assignments with line breaks.
///
/// The master may call this function at any time. A worker has no `NOTIFY_SOCKET` unless
/// [`Master::fork_with`](crate::Master::fork_with) sets the variable. systemd ignores notifications
/// from processes other than the main process unless `NotifyAccess` permits them. The call never
/// waits.
///
/// Node has no counterpart.
///
/// # Errors
///
/// - Returns [`Error::Environment`] if `NOTIFY_SOCKET` is neither an absolute path nor an abstract
///   name, written as `@` and the name. `vsock:` addresses are not supported.
/// - Returns [`Error::Io`] if sending fails. For example, no process receives from this socket, the
///   text is too long, or systemd's queue is full
///   ([`WouldBlock`](std::io::ErrorKind::WouldBlock)).
///
/// A service can serve clients even if systemd receives no notifications. Log the error and
/// continue.
///
/// ```
/// // Outside of systemd:
/// # if std::env::var_os("NOTIFY_SOCKET").is_none() {
/// assert!(!cluster::systemd::notify("READY=1")?);
/// # }
/// # Ok::<(), cluster::Error>(())
/// ```
pub fn notify(state: &str) -> Result<bool> {
    let Some(address) = std::env::var_os(NOTIFY_SOCKET) else {
        return Ok(false);
    };
    if !is_address(&address) {
        return Err(Error::Environment {
            variable: NOTIFY_SOCKET,
            value: address.to_string_lossy().into_owned(),
            expected: "an absolute path or a name after @ (vsock is not supported)",
        });
    }
    let sent = sys::socket::send_datagram(&address, state.as_bytes());
    sent.map_err(Error::io("send to NOTIFY_SOCKET"))?;
    Ok(true)
}

fn is_address(address: &OsStr) -> bool {
    match address.as_encoded_bytes() {
        [b'/', ..] => true,
        [b'@', name @ ..] => !name.is_empty(),
        _ => false,
    }
}

/// Sends a status text (`STATUS=`) to systemd. Returns the result of [`notify`].
///
/// Line breaks in `text` become spaces. Each line of a notification is an assignment, so an
/// untrusted text with line breaks could otherwise add assignments.
///
/// Node has no counterpart.
///
/// # Errors
///
/// Returns the same errors as [`notify`].
///
/// ```
/// # fn f(error: std::io::Error) -> cluster::Result<()> {
/// cluster::systemd::status(&format!("cannot reach the database: {error}"))?;
/// # Ok(()) }
/// ```
pub fn status(text: &str) -> Result<bool> {
    notify(&status_line(text))
}

fn status_line(text: &str) -> String {
    format!("STATUS={}", text.replace(['\n', '\r'], " "))
}

/// Notifies systemd that the service is reloading its configuration. Returns the result of
/// [`notify`].
///
/// The notification is `RELOADING=1` with the current time. systemd requires the time for services
/// of `Type=notify-reload`. Send `READY=1` with [`notify`] when the reload is complete.
///
/// Node has no counterpart.
///
/// # Errors
///
/// Returns the same errors as [`notify`].
///
/// ```
/// # fn f(master: &cluster::Master) -> cluster::Result<()> {
/// use cluster::{Signal, systemd};
///
/// master.on_signal(Signal::HUP, |_, _| {
///     let _ = systemd::reloading();
///     // Read the configuration, and fork workers that use it.
///     let _ = systemd::notify("READY=1");
/// })?;
/// # Ok(()) }
/// ```
pub fn reloading() -> Result<bool> {
    let now = sys::monotonic_time().as_micros();
    notify(&format!("RELOADING=1\nMONOTONIC_USEC={now}"))
}

/// Returns the watchdog timeout, or `None` if systemd has no watchdog for this process.
///
/// systemd treats the service as failed if it receives no `WATCHDOG=1` from [`notify`] within the
/// timeout. Half of the timeout is a good interval for the notifications. The function reads
/// `WATCHDOG_USEC` and `WATCHDOG_PID`. The application may call this function at any time. See the
/// [module](crate::systemd) for an example.
///
/// Node has no counterpart.
///
/// # Errors
///
/// Returns [`Error::Environment`] in the following cases:
///
/// - One of the two variables is not valid UTF-8.
/// - `WATCHDOG_USEC` is set, and `WATCHDOG_PID` is set but is not a process id.
/// - `WATCHDOG_USEC` is neither empty nor a positive number, although `WATCHDOG_PID` is missing or
///   contains this process's id.
pub fn watchdog() -> Result<Option<Duration>> {
    let (pid, time) = (variable(WATCHDOG_PID), variable(WATCHDOG_USEC));
    parse_watchdog(std::process::id(), pid?, time?)
}

fn parse_watchdog(own: u32, pid: Option<String>, time: Option<String>) -> Result<Option<Duration>> {
    let Some(time) = time.filter(|time| !time.is_empty()) else {
        return Ok(None);
    };
    if let Some(pid) = pid {
        if !is_addressed_to(own, WATCHDOG_PID, pid)? {
            return Ok(None);
        }
    }
    let expected = "a number of microseconds above 0";
    let time: std::num::NonZeroU64 = parse(WATCHDOG_USEC, time, expected)?;
    Ok(Some(Duration::from_micros(time.get())))
}

#[cfg(test)]
mod tests {
    use super::super::environment::tests::rejected;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn watchdog_applies_to_one_process() {
        let watchdog = |pid: Option<&str>, time: Option<&str>| {
            parse_watchdog(7, pid.map(str::to_owned), time.map(str::to_owned))
        };
        let time = Some(Duration::from_millis(3));
        assert_eq!(watchdog(Some("7"), Some("3000")).unwrap(), time);
        assert_eq!(watchdog(None, Some("3000")).unwrap(), time);
        assert_eq!(watchdog(Some("8"), Some("3000")).unwrap(), None);
        assert_eq!(watchdog(Some("7"), None).unwrap(), None);
        assert_eq!(rejected(watchdog(Some("x"), Some("3000"))), WATCHDOG_PID);
        assert_eq!(watchdog(Some("x"), Some("")).unwrap(), None, "not set");
        for time in ["0", "-1", "soon"] {
            assert_eq!(rejected(watchdog(None, Some(time))), WATCHDOG_USEC);
        }
    }

    #[test]
    fn status_is_a_single_assignment() {
        let text = "cannot\nREADY=1\r\nMAINPID=1";
        assert_eq!(status_line(text), "STATUS=cannot READY=1  MAINPID=1");
    }

    #[test]
    fn notify_address_is_a_path_or_an_abstract_name() {
        for address in ["/run/notify", "@notify"] {
            assert!(is_address(address.as_ref()), "{address}");
        }
        for address in ["", "@", "run/notify", "vsock:2:9999", "vsock-stream:2:9"] {
            assert!(!is_address(address.as_ref()), "{address}");
        }
    }

    proptest! {
        #[test]
        fn no_input_panics(pid: Option<String>, text: Option<String>) {
            let _ = parse_watchdog(7, pid, text.clone());
            is_address(text.clone().unwrap_or_default().as_ref());
            let line = status_line(&text.unwrap_or_default());
            prop_assert!(!line.contains(['\n', '\r']));
        }
    }
}
