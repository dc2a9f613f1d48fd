//! The settings of a worker's descriptors.

use std::os::fd::OwnedFd;
use std::rc::Rc;

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
