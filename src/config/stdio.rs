//! The settings of a worker's descriptors.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::rc::Rc;

use crate::config::settings::Settings;
use crate::sys;
use crate::sys::fd::LISTEN_FDS_START;

/// The setting of one of a worker's descriptors, for [`Settings::stdio`](crate::Settings::stdio).
///
/// Node: an entry of `settings.stdio`.
///
/// This type is not `Send`. Build the value on the master's thread.
///
/// ```
/// use cluster::{Settings, Stdio};
///
/// # fn f() -> std::io::Result<()> {
/// let log = std::fs::File::create("worker.log")?;
/// let stdio = [Stdio::null(), Stdio::fd(log), Stdio::inherit(), Stdio::pipe()];
/// let settings = Settings::default().stdio(stdio);
/// # let _ = settings;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Stdio(pub(crate) StdioKind);

#[derive(Clone, Debug)]
pub(crate) enum StdioKind {
    Inherit,
    Null,
    Pipe,
    Fd(Rc<OwnedFd>),
}

impl Stdio {
    /// Passes on the master's descriptor with the same number.
    ///
    /// Node: `'inherit'`.
    ///
    /// See [`Stdio`] for an example.
    #[must_use]
    pub fn inherit() -> Self {
        Self(StdioKind::Inherit)
    }

    /// Connects the descriptor to `/dev/null`.
    ///
    /// Node: `'ignore'`.
    ///
    /// See [`Stdio`] for an example.
    #[doc(alias = "ignore")]
    #[must_use]
    pub fn null() -> Self {
        Self(StdioKind::Null)
    }

    /// Connects the descriptor to the master. The master takes its end of the connection with
    /// [`Process::take_stdio`](crate::Process::take_stdio). Both ends can be read and written.
    ///
    /// The connection is a socket, so the worker cannot open it by a name such as `/dev/stdout`.
    ///
    /// Node: `'pipe'`.
    ///
    /// See [`Stdio`] for an example.
    #[must_use]
    pub fn pipe() -> Self {
        Self(StdioKind::Pipe)
    }

    /// Passes a copy of a descriptor to each worker.
    ///
    /// Node: a number or a stream.
    ///
    /// See [`Stdio`] for an example.
    #[must_use]
    pub fn fd(descriptor: impl Into<OwnedFd>) -> Self {
        Self(StdioKind::Fd(Rc::new(descriptor.into())))
    }
}

/// Two values of [`Stdio::fd`] are equal only if both come from the same call of `fd`. Any other
/// two values are equal if they are of the same kind.
impl PartialEq for Stdio {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (StdioKind::Fd(a), StdioKind::Fd(b)) => Rc::ptr_eq(a, b),
            (a, b) => std::mem::discriminant(a) == std::mem::discriminant(b),
        }
    }
}

impl Eq for Stdio {}

impl Settings {
    /// Returns the descriptors that [`stdio`](Self::stdio) copies into workers.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        let stdio = self.get_stdio().into_iter().flatten();
        stdio.filter_map(|stdio| match &stdio.0 {
            StdioKind::Fd(fd) => Some(fd.as_raw_fd()),
            StdioKind::Inherit | StdioKind::Null | StdioKind::Pipe => None,
        })
    }

    /// Returns the worker's complete list of descriptors. The list begins with the entries of
    /// `stdio`. Without `stdio`, the list begins with three pipes if the worker is `silent`. The
    /// descriptors of `listen_fds` follow from descriptor 3 on.
    ///
    /// # Errors
    ///
    /// Returns an error if both `stdio` and `listen_fds` define descriptor 3.
    pub(crate) fn effective_stdio(&self) -> io::Result<Vec<Stdio>> {
        let mut stdio = match (self.get_stdio(), self.get_silent()) {
            (Some(stdio), _) => stdio.to_vec(),
            (None, Some(true)) => vec![Stdio::pipe(); 3],
            (None, _) => Vec::new(),
        };
        let passed = self.passed_fds();
        if !passed.is_empty() {
            if stdio.len() > LISTEN_FDS_START {
                let reason = "descriptor 3 is in stdio and in listen_fds";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
            }
            stdio.resize(LISTEN_FDS_START, Stdio::inherit());
            stdio.extend(passed.iter().map(|(_, fd)| fd.clone()));
        }
        Ok(stdio)
    }

    pub(crate) fn passed_fds(&self) -> &[(String, Stdio)] {
        self.get_listen_fds().unwrap_or_default()
    }

    /// Returns whether `listen_fds` contains a TCP or Unix listener.
    pub(crate) fn passes_listener(&self) -> bool {
        self.passed_fds().iter().any(|(_, fd)| {
            let StdioKind::Fd(fd) = &fd.0 else {
                return false;
            };
            let kind = sys::listen::socket_kind(fd.as_raw_fd());
            kind.is_ok_and(|kind| kind.listens)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stdio_takes_precedence_over_silent() {
        let silent = Settings::default().silent(true);
        assert_eq!(silent.effective_stdio().unwrap(), vec![Stdio::pipe(); 3]);
        let both = silent.stdio([Stdio::null()]);
        assert_eq!(both.effective_stdio().unwrap(), [Stdio::null()]);
        assert_eq!(Settings::default().effective_stdio().unwrap(), []);
    }

    #[test]
    fn passed_descriptors_follow_the_first_three() {
        let null = || std::fs::File::open("/dev/null").unwrap();
        let passed = Settings::default().listen_fds([("a", null()), ("b", null())]);
        let [(_, a), (_, b)] = passed.passed_fds() else {
            panic!("{passed:?}");
        };
        let (a, b, inherit) = (a.clone(), b.clone(), Stdio::inherit());
        let expected = [
            Stdio::null(),
            inherit.clone(),
            inherit.clone(),
            a.clone(),
            b,
        ];
        let stdio = passed.clone().stdio([Stdio::null()]).effective_stdio();
        assert_eq!(stdio.unwrap(), expected);
        let three = vec![inherit; 3];
        passed
            .clone()
            .stdio(three.clone())
            .effective_stdio()
            .unwrap();
        let both = passed.stdio(three.into_iter().chain([a]));
        both.effective_stdio().unwrap_err();
    }
}
