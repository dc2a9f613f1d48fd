//! What systemd hands to a service and hears from it. So do others that follow its protocols:
//! `s6`, Podman, `systemfd`.
//!
//! Node has no counterpart. The master is the service: it takes the listeners that systemd has
//! opened ([`listen_fds`]) and tells how it is ([`notify`]). Workers inherit nothing of this: their
//! environment is the master's without `NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID` and
//! `LISTEN_*`, or one that says `READY=1` of itself would say it of the whole service. A worker that
//! is to speak for itself is given `NOTIFY_SOCKET` by
//! [`Master::fork_with`](crate::Master::fork_with), and descriptors in systemd's way by
//! [`Settings::listen_fds`](crate::Settings::listen_fds()).
//!
//! ```no_run
//! use std::net::TcpListener;
//! use cluster::{Role, systemd};
//!
//! fn main() -> cluster::Result<()> {
//!     let passed = systemd::listen_fds()?;
//!     match cluster::init()? {
//!         Role::Master(master) => {
//!             let mut listeners = Vec::new();
//!             for passed in passed {
//!                 listeners.push(master.listen(TcpListener::try_from(passed)?)?);
//!             }
//!             master.fork()?;
//!             master.on_listening(|_, _, _| drop(systemd::notify("READY=1")));
//!             if let Some(longest) = systemd::watchdog()? {
//!                 master.set_interval(longest / 2, |_| drop(systemd::notify("WATCHDOG=1")));
//!             }
//!             master.run()
//!         }
//!         Role::Worker(worker) => {
//!             let listener = worker.listen("127.0.0.1:8000")?; // as in the socket unit
//!             for connection in listener.incoming() {
//!                 drop(connection?);
//!             }
//!             Ok(())
//!         }
//!     }
//! }
//! ```

use std::ffi::{OsStr, OsString};
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::config::settings::{Stdio, TO_WORKER};
use crate::error::{Error, Result};
use crate::sys;
use crate::sys::listen::SocketKind;
use crate::types::sorted_map::SortedMap;

const LISTEN_FDS: &str = "LISTEN_FDS";
pub(crate) const LISTEN_PID: &str = "LISTEN_PID";
/// Which process is meant, where numbers are used again. The number has to do.
const LISTEN_PIDFDID: &str = "LISTEN_PIDFDID";
const LISTEN_FDNAMES: &str = "LISTEN_FDNAMES";
const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";
const WATCHDOG_USEC: &str = "WATCHDOG_USEC";
const WATCHDOG_PID: &str = "WATCHDOG_PID";

/// What is said to this process alone.
const TO_THIS_PROCESS: [&str; 7] = [
    LISTEN_FDS,
    LISTEN_PID,
    LISTEN_PIDFDID,
    LISTEN_FDNAMES,
    NOTIFY_SOCKET,
    WATCHDOG_USEC,
    WATCHDOG_PID,
];

/// The number of the first descriptor that is passed.
pub(crate) const FIRST_FD: usize = 3;
/// The longest name of a descriptor that systemd takes, in bytes.
const LONGEST_NAME: usize = 255;

/// A descriptor that was passed to this process: a listener, a UDP socket, or something else.
///
/// Node has no counterpart. [`TcpListener`], [`UnixListener`] and [`UdpSocket`] of the standard library
/// are made of it by `try_from`, which is an [`Error::Descriptor`] if it is not of that kind; `OwnedFd`
/// is by `from`, whatever it is. It is as it came: whether it blocks is up to whoever opened it, and
/// may change while others have it, too. `shutdown` would end it for them as well.
///
/// ```no_run
/// use std::net::TcpListener;
///
/// # fn f() -> cluster::Result<()> {
/// for passed in cluster::systemd::listen_fds()? {
///     println!("{:?}", passed.name());
///     let listener = TcpListener::try_from(passed)?;
///     # let _ = listener;
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct ListenFd {
    name: Option<String>,
    fd: OwnedFd,
}

impl ListenFd {
    /// Returns the name that it was passed with, `FileDescriptorName` in systemd; `None` if none of
    /// those that were passed had a name.
    ///
    /// Node has no counterpart. See [`ListenFd`] for an example.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Returns whether it is a Unix socket.
    ///
    /// Node has no counterpart.
    ///
    /// ```no_run
    /// use std::os::unix::net::UnixListener;
    ///
    /// # fn f() -> cluster::Result<()> {
    /// for passed in cluster::systemd::listen_fds()? {
    ///     if passed.is_unix() {
    ///         let listener = UnixListener::try_from(passed)?;
    ///         # let _ = listener;
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn is_unix(&self) -> bool {
        let kind = sys::listen::kind_of(self.fd.as_raw_fd());
        kind.is_ok_and(|kind| kind.is_unix)
    }

    fn into_kind(self, expected: &'static str, wanted: SocketKind) -> Result<OwnedFd> {
        let kind = sys::listen::kind_of(self.fd.as_raw_fd()).ok();
        if kind == Some(wanted) {
            return Ok(self.fd);
        }
        Err(Error::Descriptor {
            number: self.fd.as_raw_fd(),
            name: self.name,
            found: kind.map_or("neither a stream nor a datagram socket", describe),
            expected,
        })
    }
}

const TCP_LISTENER: SocketKind = SocketKind {
    is_stream: true,
    is_unix: false,
    listens: true,
};
const UNIX_LISTENER: SocketKind = SocketKind {
    is_unix: true,
    ..TCP_LISTENER
};
const UDP_SOCKET: SocketKind = SocketKind {
    is_stream: false,
    is_unix: false,
    listens: false,
};

fn describe(kind: SocketKind) -> &'static str {
    match (kind.is_stream, kind.is_unix, kind.listens) {
        (true, false, true) => "a TCP listener",
        (true, false, false) => "a TCP socket that does not listen",
        (true, true, true) => "a Unix listener",
        (true, true, false) => "a Unix stream socket that does not listen",
        (false, false, _) => "a UDP socket",
        (false, true, _) => "a Unix datagram socket",
    }
}

impl AsFd for ListenFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<ListenFd> for OwnedFd {
    fn from(passed: ListenFd) -> Self {
        passed.fd
    }
}

impl TryFrom<ListenFd> for TcpListener {
    type Error = Error;

    fn try_from(passed: ListenFd) -> Result<Self> {
        Ok(passed.into_kind("a TCP listener", TCP_LISTENER)?.into())
    }
}

impl TryFrom<ListenFd> for UnixListener {
    type Error = Error;

    fn try_from(passed: ListenFd) -> Result<Self> {
        Ok(passed.into_kind("a Unix listener", UNIX_LISTENER)?.into())
    }
}

impl TryFrom<ListenFd> for UdpSocket {
    type Error = Error;

    fn try_from(passed: ListenFd) -> Result<Self> {
        Ok(passed.into_kind("a UDP socket", UDP_SOCKET)?.into())
    }
}

/// Takes the descriptors that systemd has passed to this process, in its order; none if it has not.
///
/// Node has no counterpart. Reads `LISTEN_FDS`, `LISTEN_PID` and `LISTEN_FDNAMES`, and leaves them in the
/// environment. They count only if `LISTEN_PID` is this process: else they were meant for another one.
/// The descriptors are closed on exec from now on, and are the caller's; a second call in the same
/// process returns none. Call it early in `main`, before the program opens descriptors, because those
/// that were passed are known by their numbers alone. See [`ListenFd`] for an example.
///
/// # Errors
///
/// [`Error::Environment`] if `LISTEN_PID` or `LISTEN_FDS` is no number, if `LISTEN_FDNAMES` has not one
/// name for each descriptor, or if one of the descriptors from 3 on is not open, or is closed on
/// exec, as what this program opens itself is. Nothing is taken then.
pub fn listen_fds() -> Result<Vec<ListenFd>> {
    /// The descriptors have one owner: the caller of the first call.
    static CALLED: AtomicBool = AtomicBool::new(false);
    if CALLED.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    let [pid, count, names] =
        [LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES].map(|name| text((name, std::env::var_os(name))));
    let [pid, count, names] = [pid?, count?, names?];
    let Some(passed) = parse_passed(std::process::id(), pid, count, names)? else {
        return Ok(Vec::new());
    };
    let fds = sys::fd::adopt_passed(FIRST_FD, passed.count).map_err(|_| Error::Environment {
        variable: LISTEN_FDS,
        value: passed.count.to_string(),
        expected: "the number of descriptors that were passed, from 3 on: one of them is not open, \
                   or was opened later",
    })?;
    let mut names = passed.names.map(Vec::into_iter);
    let passed = fds.into_iter().map(|fd| ListenFd {
        name: names.as_mut().and_then(Iterator::next),
        fd,
    });
    Ok(passed.collect())
}

fn text((variable, value): (&'static str, Option<OsString>)) -> Result<Option<String>> {
    let text = value.map(OsString::into_string).transpose();
    text.map_err(|value| Error::Environment {
        variable,
        value: value.to_string_lossy().into_owned(),
        expected: "text in UTF-8",
    })
}

fn number<T: std::str::FromStr>(
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

/// What the variables say. Nothing of it is as large as `count` says before that is found true.
#[derive(Debug, PartialEq, Eq)]
struct Passed {
    count: usize,
    names: Option<Vec<String>>,
}

/// Returns `None` if nothing was passed to this process, whose number is `own`.
fn parse_passed(
    own: u32,
    pid: Option<String>,
    count: Option<String>,
    names: Option<String>,
) -> Result<Option<Passed>> {
    let (Some(pid), Some(count)) = (pid, count) else {
        return Ok(None);
    };
    if number::<u32>(LISTEN_PID, pid, "the number of a process")? != own {
        return Ok(None);
    }
    // Far fewer than a descriptor's number can say: others are not open.
    let count = number::<u16>(LISTEN_FDS, count, "a number of descriptors up to 65535")?.into();
    if count == 0 {
        return Ok(None);
    }
    let split = |names: &String| names.split(':').map(str::to_owned).collect::<Vec<_>>();
    let split = names.as_ref().map(split);
    match (split, names) {
        (Some(split), Some(value)) if split.len() != count => Err(Error::Environment {
            variable: LISTEN_FDNAMES,
            value,
            expected: "as many names as LISTEN_FDS says, with colons between them",
        }),
        (names, _) => Ok(Some(Passed { count, names })),
    }
}

/// Tells systemd how the service is: `READY=1`, `STOPPING=1`, `WATCHDOG=1`, `MAINPID=` with a number, and
/// so on, as in sd_notify(3). Several assignments are lines of one text. Returns `false` if nobody
/// wants to know, that is, without `NOTIFY_SOCKET` in the environment.
///
/// Node has no counterpart. Anyone may call it at any time, in the master; a worker finds no
/// `NOTIFY_SOCKET`, unless [`Master::fork_with`](crate::Master::fork_with) has given it one. Whether
/// it is heard is the receiver's affair: systemd hears a service's main process alone, if
/// `NotifyAccess` does not say otherwise. If the receiver's queue is full, the call waits for room for
/// at most 100 ms.
///
/// # Errors
///
/// - [`Error::Environment`] if `NOTIFY_SOCKET` is neither an absolute path nor a name after `@`;
///   `vsock:` addresses are not supported;
/// - [`Error::Io`] if the system refuses to send: nobody has this socket, the receiver's queue is full
///   (`WouldBlock`), the text is too long.
///
/// ```
/// // Not under systemd.
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
            expected: "an absolute path, or a name after @; others, as vsock, are not supported",
        });
    }
    let sent = sys::socket::send_datagram(&address, state.as_bytes(), PATIENCE);
    sent.map_err(Error::io("send to NOTIFY_SOCKET"))?;
    Ok(true)
}

/// How long a notification waits for room.
const PATIENCE: Duration = Duration::from_millis(100);

fn is_address(address: &OsStr) -> bool {
    match address.as_encoded_bytes() {
        [b'/', ..] => true,
        [b'@', name @ ..] => !name.is_empty(),
        _ => false,
    }
}

/// Tells systemd in words how the service is: `STATUS=` of [`notify`], whose result it returns.
///
/// Node has no counterpart. A line break in `text` becomes a space: in what is sent, each line is an
/// assignment of its own, and a text that came from elsewhere could make one.
///
/// # Errors
///
/// Those of [`notify`].
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

/// Tells systemd that the service reads its configuration again: `RELOADING=1` of [`notify`], with the
/// time of now, which systemd wants of a service of `Type=notify-reload`. When that is done,
/// `notify("READY=1")` says so. Returns what [`notify`] returns.
///
/// Node has no counterpart.
///
/// # Errors
///
/// Those of [`notify`].
///
/// ```
/// # fn f(master: &cluster::Master) -> cluster::Result<()> {
/// use cluster::{Signal, systemd};
///
/// master.on_signal(Signal::HUP, |_, _| {
///     let _ = systemd::reloading();
///     // Read it, and fork workers that know it.
///     let _ = systemd::notify("READY=1");
/// })?;
/// # Ok(()) }
/// ```
pub fn reloading() -> Result<bool> {
    let now = sys::monotonic_time().as_micros();
    notify(&format!("RELOADING=1\nMONOTONIC_USEC={now}"))
}

/// Returns how long systemd waits for a `WATCHDOG=1` of [`notify`] before it takes the service for dead;
/// `None` if it does not wait, or waits for another process. Half of it is a good interval.
///
/// Node has no counterpart. Anyone may ask at any time. Reads `WATCHDOG_USEC` and `WATCHDOG_PID`. See
/// the [module](self) for an example.
///
/// # Errors
///
/// [`Error::Environment`] if `WATCHDOG_PID` is no number, or `WATCHDOG_USEC` no number above 0.
pub fn watchdog() -> Result<Option<Duration>> {
    let [pid, time] =
        [WATCHDOG_PID, WATCHDOG_USEC].map(|name| text((name, std::env::var_os(name))));
    parse_watchdog(std::process::id(), pid?, time?)
}

fn parse_watchdog(own: u32, pid: Option<String>, time: Option<String>) -> Result<Option<Duration>> {
    let Some(time) = time else {
        return Ok(None);
    };
    if let Some(pid) = pid {
        if number::<u32>(WATCHDOG_PID, pid, "the number of a process")? != own {
            return Ok(None);
        }
    }
    let expected = "a number of microseconds above 0";
    let time: std::num::NonZeroU64 = number(WATCHDOG_USEC, time, expected)?;
    Ok(Some(Duration::from_micros(time.get())))
}

/// In a worker that executes nothing: removes what concerns the master alone.
pub(crate) fn forget() {
    for name in TO_THIS_PROCESS.into_iter().chain(TO_WORKER) {
        sys::env::remove(name);
    }
}

/// What workers inherit of the environment. Not what is addressed to another worker, by which this
/// master was started.
pub(crate) fn inherited_environment() -> SortedMap<OsString, OsString> {
    let own = TO_THIS_PROCESS.iter().chain(&TO_WORKER);
    let is_inherited = |name: &OsStr| own.clone().all(|own| name != *own);
    std::env::vars_os()
        .filter(|(name, _)| is_inherited(name))
        .collect()
}

/// Tells a worker in its environment which descriptors it is passed; `LISTEN_PID` is missing yet.
///
/// # Errors
///
/// One of the names is not one that systemd would take.
pub(crate) fn announce(
    env: &mut SortedMap<OsString, OsString>,
    passed: &[(String, Stdio)],
) -> io::Result<()> {
    let names: Vec<_> = passed.iter().map(|(name, _)| name.as_str()).collect();
    if let Some(name) = names.iter().find(|name| !is_name(name)) {
        let reason = format!("{name:?} is no name for a descriptor");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
    }
    for name in [LISTEN_PID, LISTEN_PIDFDID] {
        env.remove(&OsString::from(name));
    }
    env.insert(LISTEN_FDS.into(), names.len().to_string().into());
    env.insert(LISTEN_FDNAMES.into(), names.join(":").into());
    Ok(())
}

/// None is empty: a list of one empty name would be a list of none.
fn is_name(name: &str) -> bool {
    let is_valid = |byte: u8| (b' '..=b'~').contains(&byte) && byte != b':';
    (1..=LONGEST_NAME).contains(&name.len()) && name.bytes().all(is_valid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn passed(pid: &str, count: &str, names: Option<&str>) -> Result<Option<Passed>> {
        let names = names.map(str::to_owned);
        parse_passed(7, Some(pid.to_owned()), Some(count.to_owned()), names)
    }

    fn complaint<T: std::fmt::Debug>(result: Result<T>) -> &'static str {
        let Err(Error::Environment { variable, .. }) = result else {
            panic!("{result:?}");
        };
        variable
    }

    #[test]
    fn what_was_passed_has_a_name_each_or_none() {
        let count = 2;
        let names = Some(vec!["web".to_owned(), String::new()]);
        let both = Passed { count, names };
        assert_eq!(passed("7", "2", Some("web:")).unwrap(), Some(both));
        let names = None;
        let nameless = Passed { count, names };
        assert_eq!(passed("7", "2", None).unwrap(), Some(nameless));
        for names in ["web", "a:b:c", ""] {
            assert_eq!(
                complaint(passed("7", "2", Some(names))),
                LISTEN_FDNAMES,
                "{names}"
            );
        }
    }

    #[test]
    fn what_was_passed_to_another_process_does_not_count() {
        assert_eq!(passed("8", "nonsense", None).unwrap(), None);
        assert_eq!(passed("7", "0", Some("")).unwrap(), None);
        let one = Some("1".to_owned());
        assert_eq!(parse_passed(7, None, one, None).unwrap(), None);
        let own = Some("7".to_owned());
        assert_eq!(parse_passed(7, own, None, None).unwrap(), None);
    }

    #[test]
    fn numbers_that_are_none_are_named() {
        for pid in ["", "x", "-7", "4294967296"] {
            assert_eq!(complaint(passed(pid, "1", None)), LISTEN_PID, "{pid}");
        }
        for count in ["", "x", "-1", "1.0", "1000000", "18446744073709551616"] {
            assert_eq!(complaint(passed("7", count, None)), LISTEN_FDS, "{count}");
        }
    }

    #[test]
    fn a_watchdog_waits_for_one_process() {
        let watchdog = |pid: Option<&str>, time: Option<&str>| {
            parse_watchdog(7, pid.map(str::to_owned), time.map(str::to_owned))
        };
        let time = Some(Duration::from_millis(3));
        assert_eq!(watchdog(Some("7"), Some("3000")).unwrap(), time);
        assert_eq!(watchdog(None, Some("3000")).unwrap(), time);
        assert_eq!(watchdog(Some("8"), Some("3000")).unwrap(), None);
        assert_eq!(watchdog(Some("7"), None).unwrap(), None);
        assert_eq!(complaint(watchdog(Some("x"), Some("3000"))), WATCHDOG_PID);
        for time in ["", "0", "-1", "soon"] {
            assert_eq!(complaint(watchdog(None, Some(time))), WATCHDOG_USEC);
        }
    }

    #[test]
    fn a_status_is_one_assignment() {
        let text = "cannot\nREADY=1\r\nMAINPID=1";
        assert_eq!(status_line(text), "STATUS=cannot READY=1  MAINPID=1");
    }

    #[test]
    fn sockets_have_a_path_or_an_abstract_name() {
        for address in ["/run/notify", "@notify"] {
            assert!(is_address(address.as_ref()), "{address}");
        }
        for address in ["", "@", "run/notify", "vsock:2:9999", "vsock-stream:2:9"] {
            assert!(!is_address(address.as_ref()), "{address}");
        }
    }

    #[test]
    fn what_is_announced_is_understood() {
        let fds = ["web", "the other one"].map(|name| (name.to_owned(), Stdio::null()));
        let stale = [LISTEN_PID, LISTEN_PIDFDID].map(|name| (name.into(), "1".into()));
        let mut env = SortedMap::from_iter(stale);
        announce(&mut env, &fds).unwrap();
        assert_eq!(env.len(), 2);
        let value = |name: &str| env[&OsString::from(name)].to_str().unwrap();
        let understood = passed("7", value(LISTEN_FDS), Some(value(LISTEN_FDNAMES)));
        let understood = understood.unwrap().unwrap();
        assert_eq!(understood.names.unwrap(), ["web", "the other one"]);
        for name in ["", "a:b", "a\nb", "ä", &"x".repeat(256)] {
            let fds = [(name.to_owned(), Stdio::null())];
            let error = announce(&mut env, &fds).unwrap_err();
            assert!(error.to_string().contains(&format!("{name:?}")));
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(pid: Option<String>, count: Option<String>, names: Option<String>) {
            let _ = parse_passed(7, pid.clone(), count.clone(), names.clone());
            let _ = parse_passed(7, Some("7".to_owned()), count.clone(), names.clone());
            let _ = parse_passed(7, Some("7".to_owned()), Some("2".to_owned()), names.clone());
            let _ = parse_watchdog(7, pid, count.clone());
            is_address(count.clone().unwrap_or_default().as_ref());
            let line = status_line(&count.unwrap_or_default());
            prop_assert!(!line.contains(['\n', '\r']));
        }
    }
}
