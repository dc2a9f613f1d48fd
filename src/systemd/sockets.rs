//! Socket activation, with which systemd passes open descriptors to a service. See
//! sd_listen_fds(3).

use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

use super::environment::{
    LISTEN_FDNAMES, LISTEN_FDS, LISTEN_PID, is_addressed_to, parse, variable,
};
use crate::error::{Error, Result};
use crate::sys;
use crate::sys::fd::LISTEN_FDS_START;
use crate::sys::listen::{Family, SocketKind};
use crate::types::endpoint::Kind;

/// A descriptor that was passed to this process, such as a listener or a UDP socket.
///
/// `try_from` converts the descriptor into the standard library's [`TcpListener`], [`UnixListener`]
/// or [`UdpSocket`]. The conversion returns [`Error::Descriptor`] if the descriptor is of another
/// kind. `from` converts any descriptor into an `OwnedFd`.
///
/// The process that opened the descriptor has chosen its blocking mode. Processes that share the
/// descriptor can change the mode at any time. A `shutdown` affects all of these processes.
///
/// Node has no counterpart.
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
    /// Returns the descriptor's name, which is `FileDescriptorName` in systemd's unit file. Returns
    /// `None` if the descriptors were passed without names.
    ///
    /// Node has no counterpart.
    ///
    /// See [`ListenFd`] for an example.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Returns whether the descriptor is a Unix stream or datagram socket.
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
        self.socket_kind()
            .is_some_and(|kind| kind.family == Family::Unix)
    }

    fn socket_kind(&self) -> Option<SocketKind> {
        sys::listen::socket_kind(self.fd.as_raw_fd()).ok()
    }

    /// Returns the descriptor's kind, if a master can share the descriptor with workers.
    ///
    /// # Errors
    ///
    /// Returns [`Error::Descriptor`] if the descriptor is neither a TCP or Unix listener nor a UDP
    /// socket.
    pub(crate) fn kind(&self) -> Result<Kind> {
        match self.socket_kind() {
            Some(TCP_LISTENER) => Ok(Kind::Tcp),
            Some(UNIX_LISTENER) => Ok(Kind::Unix),
            Some(UDP_SOCKET) => Ok(Kind::Udp),
            _ => Err(self.mismatch("a TCP listener, a Unix listener or a UDP socket")),
        }
    }

    fn into_kind(self, expected: &'static str, wanted: SocketKind) -> Result<OwnedFd> {
        if self.socket_kind() == Some(wanted) {
            return Ok(self.fd);
        }
        Err(self.mismatch(expected))
    }

    fn mismatch(&self, expected: &'static str) -> Error {
        let kind = self.socket_kind();
        Error::Descriptor {
            number: self.fd.as_raw_fd(),
            name: self.name.clone(),
            found: kind.map_or("neither a stream nor a datagram socket", describe),
            expected,
        }
    }
}

const TCP_LISTENER: SocketKind = SocketKind {
    is_stream: true,
    family: Family::Internet,
    listens: true,
};
const UNIX_LISTENER: SocketKind = SocketKind {
    family: Family::Unix,
    ..TCP_LISTENER
};
const UDP_SOCKET: SocketKind = SocketKind {
    is_stream: false,
    family: Family::Internet,
    listens: false,
};

fn describe(kind: SocketKind) -> &'static str {
    match (kind.is_stream, kind.family, kind.listens) {
        (true, Family::Internet, true) => "a TCP listener",
        (true, Family::Internet, false) => "a TCP socket that does not listen",
        (true, Family::Unix, true) => "a Unix listener",
        (true, Family::Unix, false) => "a Unix stream socket that does not listen",
        (false, Family::Internet, _) => "a UDP socket",
        (false, Family::Unix, _) => "a Unix datagram socket",
        (_, Family::Other, _) => "neither an IP nor a Unix socket",
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

/// Returns the descriptors that systemd has passed to this process, in systemd's order.
///
/// The list is empty if systemd has passed no descriptors, or if `LISTEN_PID` is missing or
/// contains another process's id. Only the first call in a process returns descriptors, because its
/// caller owns them. Later calls return an empty list. The function marks the descriptors as
/// close-on-exec. The variables `LISTEN_FDS`, `LISTEN_PID` and `LISTEN_FDNAMES` stay in the
/// environment.
///
/// Call this function early in `main`, before the application opens descriptors, because passed
/// descriptors are identified only by their numbers. See [`ListenFd`] for an example.
///
/// Node has no counterpart.
///
/// # Errors
///
/// Returns [`Error::Environment`] and takes no descriptor in the following cases:
///
/// - One of the three variables is not valid UTF-8.
/// - `LISTEN_FDS` is set, but `LISTEN_PID` is not a process id.
/// - `LISTEN_PID` is this process's id, but `LISTEN_FDS` is not a number up to 65535.
/// - `LISTEN_FDNAMES` is set, but does not contain exactly one name for each of the descriptors
///   that systemd has passed to this process.
/// - One of the descriptors is not open, or is marked as close-on-exec. Passed descriptors never
///   have this mark, so this process must have opened the descriptor itself.
pub fn listen_fds() -> Result<Vec<ListenFd>> {
    /// Whether `listen_fds` has already been called in this process.
    static CALLED: AtomicBool = AtomicBool::new(false);
    if CALLED.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    let [pid, count, names] = [LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES].map(variable);
    let (pid, count, names) = (pid?, count?, names?);
    let Some(passed) = parse_passed(std::process::id(), pid, count, names)? else {
        return Ok(Vec::new());
    };
    let fds = sys::fd::adopt_passed(LISTEN_FDS_START, passed.count);
    let fds = fds.map_err(|_| Error::Environment {
        variable: LISTEN_FDS,
        value: passed.count.to_string(),
        expected: "the number of passed descriptors, from 3 on: one of them is not open, or was \
                   opened later",
    })?;
    let mut names = passed.names.map(Vec::into_iter);
    let passed = fds.into_iter().map(|fd| ListenFd {
        name: names.as_mut().and_then(Iterator::next),
        fd,
    });
    Ok(passed.collect())
}

/// The contents of `LISTEN_FDS` and `LISTEN_FDNAMES`. The count comes from the environment and may
/// be too large, so allocate no memory in proportion to the count.
#[derive(Debug, PartialEq, Eq)]
struct Passed {
    count: usize,
    names: Option<Vec<String>>,
}

/// Parses the values of `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES`. Returns `None` if no
/// descriptor was passed to the process with the id `own`.
fn parse_passed(
    own: u32,
    pid: Option<String>,
    count: Option<String>,
    names: Option<String>,
) -> Result<Option<Passed>> {
    let (Some(pid), Some(count)) = (pid, count) else {
        return Ok(None);
    };
    if !is_addressed_to(own, LISTEN_PID, pid)? {
        return Ok(None);
    }
    // Reject counts above 65535 as mistakes, because systemd passes far fewer descriptors.
    let count = parse::<u16>(LISTEN_FDS, count, "a number of descriptors up to 65535")?.into();
    if count == 0 {
        return Ok(None);
    }
    let split = |names: &String| names.split(':').map(str::to_owned).collect::<Vec<_>>();
    let split = names.as_ref().map(split);
    match (split, names) {
        (Some(split), Some(value)) if split.len() != count => Err(Error::Environment {
            variable: LISTEN_FDNAMES,
            value,
            expected: "one name for each descriptor of LISTEN_FDS, separated by colons",
        }),
        (names, _) => Ok(Some(Passed { count, names })),
    }
}

#[cfg(test)]
mod tests {
    use super::super::environment::tests::rejected;
    use super::*;
    use proptest::prelude::*;

    fn passed(pid: &str, count: &str, names: Option<&str>) -> Result<Option<Passed>> {
        let names = names.map(str::to_owned);
        parse_passed(7, Some(pid.to_owned()), Some(count.to_owned()), names)
    }

    #[test]
    fn all_descriptors_have_names_or_none_has() {
        let count = 2;
        let names = Some(vec!["web".to_owned(), String::new()]);
        let both = Passed { count, names };
        assert_eq!(passed("7", "2", Some("web:")).unwrap(), Some(both));
        let names = None;
        let nameless = Passed { count, names };
        assert_eq!(passed("7", "2", None).unwrap(), Some(nameless));
        for names in ["web", "a:b:c", ""] {
            let result = passed("7", "2", Some(names));
            assert_eq!(rejected(result), LISTEN_FDNAMES, "{names}");
        }
    }

    #[test]
    fn descriptors_for_another_process_are_ignored() {
        assert_eq!(passed("8", "nonsense", None).unwrap(), None);
        assert_eq!(passed("7", "0", Some("")).unwrap(), None);
        let one = Some("1".to_owned());
        assert_eq!(parse_passed(7, None, one, None).unwrap(), None);
        let own = Some("7".to_owned());
        assert_eq!(parse_passed(7, own, None, None).unwrap(), None);
    }

    #[test]
    fn errors_name_the_variable_that_is_not_a_number() {
        for pid in ["", "x", "-7", "4294967296"] {
            assert_eq!(rejected(passed(pid, "1", None)), LISTEN_PID, "{pid}");
        }
        for count in ["", "x", "-1", "1.0", "1000000", "18446744073709551616"] {
            assert_eq!(rejected(passed("7", count, None)), LISTEN_FDS, "{count}");
        }
    }

    #[test]
    fn announced_names_are_parsed() {
        let announced = passed("7", "2", Some("web:the other one"));
        let names = announced.unwrap().unwrap().names;
        assert_eq!(names.unwrap(), ["web", "the other one"]);
    }

    proptest! {
        #[test]
        fn no_input_panics(pid: Option<String>, count: Option<String>, names: Option<String>) {
            let _ = parse_passed(7, pid, count.clone(), names.clone());
            let _ = parse_passed(7, Some("7".to_owned()), count, names.clone());
            let _ = parse_passed(7, Some("7".to_owned()), Some("2".to_owned()), names);
        }
    }
}
